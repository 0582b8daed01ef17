//! fs-layer: a shared-disk filesystem on a blockd volume.
//!
//! The address space of a volume is endless and only written blocks cost anything, so that numbers and addresses are
//! handed out by counting up and never used twice. [`disk`] is where blocks are, [`vfs`] what the exports see, [`snapshots`] adds to that what was.
//!
//! Layers point one way: export → (snapshots) → vfs → (file | dir | inode) → (lock | journal) → layout → disk. [`blocks`] is what trees need of the journal.

pub mod admin;
pub mod alloc;
pub mod blocks;
pub mod check;
pub mod cli;
pub mod config;
pub mod dir;
pub mod disk;
pub mod export;
pub mod extent;
pub mod file;
pub mod inode;
mod int_map;
pub mod journal;
pub mod layout;
pub mod lock;
mod mutex;
pub mod snapshots;
mod tree;
pub mod vfs;
pub mod waiting;

pub use layout::{MkfsError, MkfsOptions, mkfs};
pub use vfs::{Filesystem, OpenOptions};
