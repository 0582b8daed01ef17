//! NFS versions 4.1 and 4.2 (RFC 8881, RFC 7862, RFC 8276) over a [`Vfs`](crate::vfs::Vfs).
//!
//! [`xdr`] and [`rpc`] are the wire, [`connection`] a TCP connection, `receiving` what has come on it, `threads` who serves it, [`server`] starting and stopping. [`compound`] runs a list of operations,
//! [`ops`] are these. [`attributes`], [`bitmap`], [`handle`] and [`status`] are what they speak of. [`state`] is what
//! clients hold, [`records`] what of that outlives the server, `exclusive` which creates were the same, `callback` calls to the client, `waiting` why. There are no delegations and no layouts.
//!
//! What must hold: no bytes from the network panic or make memory grow past what the sessions allow; a request runs once however often it is sent;
//! what was answered with success is durable, but for data that was answered UNSTABLE; what a client holds is given to nobody else while its lease lasts, a restart of the
//! server included.

pub mod attributes;
pub mod bitmap;
mod callback;
pub mod compound;
pub mod connection;
mod exclusive;
mod groups;
pub mod handle;
pub mod ops;
pub mod options;
mod receiving;
pub mod records;
pub mod rpc;
pub mod server;
pub mod state;
pub mod status;
mod threads;
mod waiting;
pub mod xdr;

pub use groups::Groups;
pub use options::{ExportOptions, Network, NfsOptions};
pub use records::{ClientRecords, DirectoryRecords, MemoryRecords, VfsRecords};
pub use server::{Server, Shared};
