//! The discovery log page: which subsystems a host finds, and where.

use std::net::SocketAddr;

use zerocopy::{FromZeros, IntoBytes};

use super::DISCOVERY_NQN;
use super::controller::Host;
use super::data::{DiscoveryEntry, DiscoveryHeader, padded};
use super::server::Subsystems;

const TCP: u8 = 3;
const IPV4: u8 = 1;
const IPV6: u8 = 2;
const NVME: u8 = 2;
const THIS_DISCOVERY: u8 = 3;
/// No secure channel; flow control may be turned off.
const REQUIREMENTS: u8 = 2 | 1 << 2;

/// The entries for `host`, which asks at `local`; where the daemon listens on all addresses that is where it finds
/// everything.
pub fn entries(subsystems: &dyn Subsystems, listens: &[SocketAddr], local: SocketAddr, host: &Host) -> Vec<u8> {
    let mut places: Vec<SocketAddr> = Vec::new();
    for listen in listens {
        let place = if listen.ip().is_unspecified() { SocketAddr::new(local.ip(), listen.port()) } else { *listen };
        let place = SocketAddr::new(place.ip().to_canonical(), place.port());
        if !places.contains(&place) {
            places.push(place);
        }
    }
    let mut page = Vec::new();
    let local = SocketAddr::new(local.ip().to_canonical(), local.port());
    put(&mut page, DISCOVERY_NQN, THIS_DISCOVERY, local, 0);
    for subsystem in subsystems.list() {
        if !subsystem.admits(&host.nqn) {
            continue;
        }
        for (port, place) in (1..).zip(&places) {
            put(&mut page, &subsystem.nqn, NVME, *place, port);
        }
    }
    page
}

fn put(page: &mut Vec<u8>, nqn: &str, kind: u8, place: SocketAddr, port: u16) {
    let mut entry = DiscoveryEntry::new_zeroed();
    entry.transport = TCP;
    entry.family = if place.is_ipv4() { IPV4 } else { IPV6 };
    entry.kind = kind;
    entry.requirements = REQUIREMENTS;
    entry.port = port.into();
    entry.cntlid = 0xffff.into();
    entry.admin_entries = super::QUEUE_ENTRIES_MAX.into();
    entry.service = padded(&place.port().to_string(), b' ');
    entry.subsystem = padded(nqn, 0);
    entry.address = padded(&place.ip().to_string(), b' ');
    page.extend_from_slice(entry.as_bytes());
}

/// The whole page for entries of which `generation` counts the changes.
pub fn page(entries: &[u8], generation: u64) -> Vec<u8> {
    let mut head = DiscoveryHeader::new_zeroed();
    head.generation = generation.into();
    head.count = ((entries.len() / size_of::<DiscoveryEntry>()) as u64).into();
    [head.as_bytes(), entries].concat()
}
