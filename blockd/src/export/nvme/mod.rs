//! NVMe over TCP (NVM Express Base, NVM Command Set and TCP Transport specifications): every volume is a subsystem with one
//! namespace.
//!
//! [`pdu`], [`command`] and [`data`] are the wire format, pure and shared by both sides. [`server`] listens and reads
//! the Connect command of each queue on tokio. Admin and discovery queues stay there ([`admin`], [`discovery`]); an I/O
//! queue's socket moves to the reactor of its volume, where a [`session`] turns PDUs into requests. [`controller`] is what
//! the queues of one association share, [`namespace`] what all hosts of a volume share: its reservations. [`client`] is
//! the other side, for tools and tests.
//!
//! What must hold: no command is answered with an error because the daemon starts or stops, the connection ends instead
//! and the host asks again; a reservation is on disk before it is answered; once a queue's end is known to a host's new
//! association, nothing the old one sent takes effect any more.

pub mod admin;
pub mod client;
pub mod command;
pub mod controller;
pub mod data;
mod discovery;
mod features;
mod identify;
mod log_page;
pub mod namespace;
pub mod pdu;
mod queue;
pub mod reservation;
pub mod server;
pub mod session;
#[cfg(test)]
mod session_tests;

/// Bytes of a logical block: partition tables made over NBD, which knows only bytes, stay valid.
pub const LBA_BYTES: u64 = 512;
/// The one namespace of a subsystem.
pub const NSID: u32 = 1;
/// "All namespaces".
pub const NSID_ALL: u32 = u32::MAX;
/// Most bytes one command moves.
pub const TRANSFER_MAX: u32 = 4 << 20;
/// Most write data a command capsule of an I/O queue carries, in bytes. As much as hosts write at once, because what does not fit has to be
/// asked for, which takes a round trip.
pub const IN_CAPSULE_MAX: u32 = 1 << 20;
/// The same on the admin queue, fixed by the transport.
pub const ADMIN_IN_CAPSULE_MAX: u32 = 8 << 10;
/// Entries of a queue at most.
pub const QUEUE_ENTRIES_MAX: u16 = 1024;
/// I/O queues of a controller at most.
pub const IO_QUEUES_MAX: u16 = 128;
/// Namespaces a subsystem could have, by what it tells hosts.
pub const NAMESPACES_MAX: u32 = 1024;
/// Largest Compare-and-Write, in bytes.
pub const COMPARE_WRITE_MAX: u32 = 64 << 10;
/// Bytes that are never torn by a power cut: a block.
pub const ATOMIC_BYTES: u32 = 4096;
/// Name of the discovery subsystem.
pub const DISCOVERY_NQN: &str = "nqn.2014-08.org.nvmexpress.discovery";
/// Longest name of a subsystem or a host, in bytes.
pub const NQN_BYTES_MAX: usize = 223;
/// Specification version: 1.4.
pub const VERSION: u32 = 0x0001_0400;

/// Name of a volume's subsystem if it was given no other.
pub fn default_nqn(id: crate::types::VolumeId) -> String {
    format!("nqn.2014-08.org.nvmexpress:uuid:{}", uuid::Uuid::from_bytes(id.0).hyphenated())
}

/// Whose name [`default_nqn`] made `nqn`.
pub fn id_in_nqn(nqn: &str) -> Option<crate::types::VolumeId> {
    let (_, id) = nqn.rsplit_once(':')?;
    let id = crate::types::VolumeId(uuid::Uuid::parse_str(id).ok()?.into_bytes());
    (default_nqn(id) == nqn).then_some(id)
}

/// Says what is wrong with a name of a host or a subsystem.
///
/// # Errors
/// A sentence for the user.
pub fn check_nqn(nqn: &str) -> Result<(), String> {
    if nqn.len() > NQN_BYTES_MAX {
        return Err(format!("an NQN has at most {NQN_BYTES_MAX} bytes, this one has {}", nqn.len()));
    }
    let rest = nqn.strip_prefix("nqn.").unwrap_or_default();
    let date = rest.get(..7).is_some_and(|date| {
        date.bytes().enumerate().all(|(at, byte)| if at == 4 { byte == b'-' } else { byte.is_ascii_digit() })
    });
    if !date || !rest[7..].starts_with('.') || nqn.bytes().any(|byte| byte.is_ascii_control() || byte == b' ') {
        return Err(format!("{nqn:?} is no NQN; one looks like nqn.2014-08.org.nvmexpress:uuid:..."));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        let id = crate::types::VolumeId([7; 16]);
        check_nqn(&default_nqn(id)).unwrap();
        assert_eq!(id_in_nqn(&default_nqn(id)), Some(id));
        assert_eq!(id_in_nqn("nqn.2026-01.com.example:07070707-0707-0707-0707-070707070707"), None);
        check_nqn(DISCOVERY_NQN).unwrap();
        check_nqn("nqn.2026-01.com.example:disk").unwrap();
        for bad in ["", "nqn", "iqn.2026-01.com.example", "nqn.2026.com", "nqn.2026-01", "nqn.2026-01.a b"] {
            assert!(check_nqn(bad).is_err(), "{bad:?}");
        }
        assert!(check_nqn(&format!("nqn.2026-01.{}", "x".repeat(300))).is_err());
    }
}
