//! The NBD protocol (`doc/proto.md` of the NBD project).
//!
//! [`proto`] is the wire format, pure and shared by both sides. [`server`] listens, [`handshake`] settles export and
//! options on tokio, then the socket moves to the export's reactor, where a [`session`] turns bytes into requests.
//! [`client`] is the other side, for tools and tests.

pub mod client;
pub mod handshake;
#[cfg(test)]
mod handshake_tests;
pub mod proto;
mod reply;
pub mod server;
pub mod session;
#[cfg(test)]
mod session_tests;
