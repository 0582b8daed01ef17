//! The running daemon: it puts the layers together and owns everything that lives as long as the process.
//!
//! Order at the start: data directory (locked before anything in it is read), store, reactors, admin socket, volumes,
//! NBD sockets, the ready line. The admin socket answers while the volumes are still being listed and opened: what is
//! asked of one meanwhile comes before what the start would do with it. At the end the other way round: NBD listeners,
//! volumes (each flushes its log and closes it), reactors. [`volumes`] is the only place that opens and closes volumes;
//! [`keys`] holds the keys of encrypted ones and changes keys and settings.

mod clone;
mod data_dir;
mod exports;
mod hold;
mod keys;
mod rebuild;
mod release;
mod restore;
mod run;
mod signals;
mod snapshots;
#[cfg(test)]
mod start_tests;
mod status;
mod stranded;
mod views;
mod volumes;

pub use data_dir::{DataDir, DataDirError};
pub use keys::{KeyError, KeyRing};
pub(crate) use run::store_identity;
pub use run::{ServeOptions, run, run_embedded};
pub use volumes::{Daemon, VolumeError};
