//! Snapshots of the tree, visible in it: `.snapshots/NAME/...` under the root, read-only, beside the live tree.
//!
//! **What one is.** A snapshot of the volume, taken after [`Vfs::sync`](crate::vfs::Vfs::sync). No freeze is needed: a volume's snapshot is a point in
//! the history of its writes, so it is at worst what a crash at that moment would have left, which the journal repairs; and all that
//! was done before is in it, because of the sync. Its journal is not settled and nothing may be written, so it is replayed
//! in memory ([`OverlayDisk`](crate::disk::OverlayDisk)) each time the snapshot is opened.
//!
//! **Who makes them** is a [`SnapshotSource`]: [`VolumeSnapshots`] for a volume of a blockd, in this process or elsewhere. Files and devices have none.
//!
//! **How they are shown.** [`SnapshotTree`] is a [`Vfs`](crate::vfs::Vfs) around the live one that looks at the high bits of each
//! number ([`numbers`]): one comparison for the live tree, and no lock. The [`Shelf`] knows which snapshots there are, opens them at first use with small
//! caches, and closes them when nobody used them for a while. A snapshot that was deleted is [`VfsError::Stale`](crate::vfs::VfsError::Stale) to
//! those who still know its files.
//!
//! What must hold: numbers of files are never shared between the live tree, snapshots and the directory itself, and stay the same as long as the
//! snapshot exists, over restarts too (but see [`numbers`] for collisions); what a snapshot shows never changes; nothing is ever written to its disk.

#[cfg(feature = "engine")]
mod engine;
pub mod numbers;
mod shelf;
mod source;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod tree;
mod volume;

pub use shelf::{Shelf, ShelfOptions};
pub use source::{SnapshotError, SnapshotInfo, SnapshotSource};
pub use tree::SnapshotTree;
pub use volume::VolumeSnapshots;

/// The directory under the root that has the snapshots.
pub const DIRECTORY: &str = ".snapshots";
