//! blockd: durable block volumes on object storage.
//!
//! Writes become durable on a local write-ahead log ([`wal`]), are collected in a dirty map
//! ([`volume`]), destaged in order as immutable chunks ([`chunk`]) to an object store ([`store`]),
//! and found again through a translation table ([`table`]). [`export`] serves volumes over the network.
//!
//! Without the feature `engine` only what needs no database and no object store is here: the formats, the log, the
//! reactor and the NBD server, quick to compile for fuzzing. The feature `program` adds what every command line of this
//! project has: settings and words for people.
//!
//! Layers point one way: export → volume → (wal | table | chunk | cache) → store.

// The futures of the command line hold those of everything they call.
#![recursion_limit = "256"]
// Parts of what is left are for the engine only.
#![cfg_attr(not(feature = "engine"), allow(dead_code))]

#[cfg(feature = "engine")]
pub mod admin;
#[cfg(feature = "engine")]
pub mod attach;
pub mod buf;
#[cfg(feature = "engine")]
pub mod cache;
#[cfg(feature = "engine")]
pub mod check;
pub mod checkpoint;
pub mod chunk;
#[cfg(feature = "engine")]
pub mod cli;
#[cfg(feature = "program")]
pub mod config;
#[cfg(feature = "engine")]
pub mod crypt;
#[cfg(feature = "engine")]
pub mod daemon;
pub mod export;
pub mod lease;
pub mod manifest;
pub mod outgoing;
#[cfg(feature = "program")]
pub mod program;
pub mod reactor;
#[cfg(feature = "engine")]
pub mod store;
#[cfg(feature = "engine")]
pub mod table;
pub mod types;
#[cfg(feature = "engine")]
pub mod view;
pub mod volume;
pub mod wal;
