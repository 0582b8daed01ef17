//! What clients hold: records of clients, sessions, opens and locks (RFC 8881 sections 2.4, 2.10, 8 and 9).
//!
//! One mutex guards the tables; nothing under it waits for a disk, but for a client's record that is struck out before what the client held is
//! given to another. [`client`] is a client's record, [`session`] its slots and kept replies, [`table`] finds
//! clients and lets them go, [`open`] and [`lock`] are share reservations and byte ranges, [`grace`] says who may take what
//! after a restart.
//!
//! What must hold: a state identifier names one state for ever; the count of [`Vfs::hold`](crate::vfs::Vfs::hold)s is that of the opens;
//! what a client held is free for others only after the client is struck out of the records.

pub mod client;
pub mod grace;
pub mod lock;
pub mod open;
mod ranges;
pub mod session;
pub mod stateid;
mod table;

pub use table::{Let, Table};
