//! Log pages of a volume's controllers.

use zerocopy::{FromZeros, IntoBytes};

use super::NSID;
use super::command::{admin, io};
use super::data::{ReservationRegistrant, ReservationStatus};
use super::reservation::{Notice, Reservations};

/// Log page identifiers.
pub mod id {
    pub const ERRORS: u8 = 0x01;
    pub const HEALTH: u8 = 0x02;
    pub const FIRMWARE: u8 = 0x03;
    pub const CHANGED_NAMESPACES: u8 = 0x04;
    pub const EFFECTS: u8 = 0x05;
    pub const DISCOVERY: u8 = 0x70;
    pub const RESERVATION: u8 = 0x80;
}

/// Errors: none is kept.
pub fn errors() -> Vec<u8> {
    vec![0; 64]
}

/// Health: a volume has no temperature and does not wear out.
pub fn health() -> Vec<u8> {
    let mut page = vec![0; 512];
    // 300 K, all of the spare.
    page[1..3].copy_from_slice(&300u16.to_le_bytes());
    page[3] = 100;
    page[4] = 10;
    page
}

/// Firmware: one slot, with this version.
pub fn firmware() -> Vec<u8> {
    let mut page = vec![0; 512];
    page[0] = 1;
    let revision: [u8; 8] = super::data::padded(env!("CARGO_PKG_VERSION"), b' ');
    page[8..16].copy_from_slice(&revision);
    page
}

/// The list of namespaces that changed.
pub fn changed_namespaces(changed: bool) -> Vec<u8> {
    let mut page = vec![0; 4096];
    if changed {
        page[..4].copy_from_slice(&NSID.to_le_bytes());
    }
    page
}

/// Which commands there are, and which of them change data.
pub fn effects(read_only: bool) -> Vec<u8> {
    const SUPPORTED: u32 = 1;
    const CHANGES_BLOCKS: u32 = 1 << 1;
    let mut page = vec![0; 4096];
    let mut put = |at: usize, effects: u32| page[at * 4..at * 4 + 4].copy_from_slice(&effects.to_le_bytes());
    for opcode in [
        admin::GET_LOG_PAGE,
        admin::IDENTIFY,
        admin::ABORT,
        admin::SET_FEATURES,
        admin::GET_FEATURES,
        admin::ASYNC_EVENT,
        admin::KEEP_ALIVE,
    ] {
        put(opcode.into(), SUPPORTED);
    }
    for opcode in [io::FLUSH, io::READ, io::COMPARE, io::VERIFY] {
        put(256 + usize::from(opcode), SUPPORTED);
    }
    if read_only {
        return page;
    }
    for opcode in [io::RESERVATION_REGISTER, io::RESERVATION_REPORT, io::RESERVATION_ACQUIRE, io::RESERVATION_RELEASE] {
        put(256 + usize::from(opcode), SUPPORTED);
    }
    for opcode in [io::WRITE, io::WRITE_ZEROES, io::DATASET_MANAGEMENT, io::COPY] {
        put(256 + usize::from(opcode), SUPPORTED | CHANGES_BLOCKS);
    }
    page
}

/// A reservation notice, `count` counting all there ever were; empty without one.
pub fn reservation(notice: Option<Notice>, count: u64, left: usize) -> Vec<u8> {
    let mut page = vec![0; 64];
    if let Some(notice) = notice {
        page[..8].copy_from_slice(&count.to_le_bytes());
        page[8] = notice as u8;
        page[9] = left.min(255) as u8;
        page[12..16].copy_from_slice(&NSID.to_le_bytes());
    }
    page
}

/// The extended reservation status.
pub fn reservation_report(state: &Reservations) -> Vec<u8> {
    const HOLDS: u8 = 1;
    // Controllers come and go.
    const DYNAMIC: u16 = 0xffff;
    let mut head = ReservationStatus::new_zeroed();
    head.generation = state.generation.into();
    head.kind = state.held.map_or(0, |(kind, _)| kind as u8);
    head.count = (state.registrants.len() as u16).into();
    head.persists = state.persists.into();
    let mut page = head.as_bytes().to_vec();
    for registrant in &state.registrants {
        let entry = ReservationRegistrant {
            cntlid: DYNAMIC.into(),
            status: if state.is_holder(&registrant.host) { HOLDS } else { 0 },
            reserved: [0; 5],
            key: registrant.key.into(),
            host_id: registrant.host,
            reserved2: [0; 32],
        };
        page.extend_from_slice(entry.as_bytes());
    }
    page
}
