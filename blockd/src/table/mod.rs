//! The translation table: where each block of a volume stands in the bucket.
//!
//! A cache of what the chunks say, never the truth: it can be thrown away and rebuilt from their headers. [`Table`]
//! applies one chunk per atomic batch ([`apply`]) and answers reads with one point lookup per 64 blocks ([`lookup`]).
//! [`relocate`] brings in what compaction moved and rebuilds a table from headers; [`space`] counts what lives and what is
//! dead, [`reclaim`] hands out what may be deleted; [`refer`] is for blocks that have several addresses. [`leaf`] and [`key`] know the bytes, [`rocks`] and [`memory`] keep them,
//! [`home`] opens a volume's table and replaces it by a copy.
//!
//! What must hold: the applied position travels in the same batch as the mappings, so that after a crash, which loses
//! everything since the last [`Table::persist`] or less, the table is exact for some prefix of the chunk sequence and
//! says which. Trims and zeroes of any length cost the same. Byte tables: `docs/format.md`.

use std::path::PathBuf;

use crate::types::{Lsn, VolumeId};

mod allocations;
mod apply;
mod changes;
mod home;
pub mod key;
mod kv;
pub mod leaf;
mod lookup;
mod memory;
mod pins;
mod reclaim;
mod refer;
mod relocate;
mod rocks;
mod simulate;
mod space;
mod spans;
#[allow(clippy::module_inception)] // the noun of this folder
mod table;

pub use changes::Change;
pub use home::{Stage, TableHome};
pub use kv::{FrozenFile, FrozenFiles};
pub use leaf::Target;
pub use lookup::{ChunkDirectory, Mapped};
pub use memory::MemKv;
pub use pins::Pin;
pub use reclaim::Doomed;
pub use relocate::{Gathered, Moved, Rebuild, RebuildKey};
pub use simulate::{random_chunk, simulate};
pub use space::{Dead, Position, Space, Usage};
pub use table::{FrozenTable, Table, TableStats};

/// How far the chunk sequence has been applied. Zeroes mean: nothing yet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Applied {
    /// The newest chunk's sequence number.
    pub seq: u64,
    /// The newest LSN in it.
    pub lsn: Lsn,
}

/// A failure of the translation table.
#[derive(Debug, thiserror::Error)]
pub enum TableError {
    /// The database does not open.
    #[error(
        "cannot open the translation table in {path}: {source} (if it is damaged, move the directory away: it is \
         rebuilt from the bucket)"
    )]
    Open {
        /// Its directory.
        path: PathBuf,
        /// The database's words.
        source: rocksdb::Error,
    },
    /// A database that is not a translation table.
    #[error("the database is not a translation table; choose another directory")]
    NotATable,
    /// The table of another volume.
    #[error("the translation table belongs to volume {found}, not to {expected}")]
    Foreign {
        /// Whose it is.
        found: VolumeId,
        /// Whose it should be.
        expected: VolumeId,
    },
    /// Written by an older program.
    #[error(
        "translation table version {found} is older than this program's; move it away: it is rebuilt from the bucket"
    )]
    Older {
        /// Its version.
        found: u32,
    },
    /// Written by a newer program.
    #[error(
        "translation table version {found} is unknown to this program; use a newer one, or move the table away: it is \
         rebuilt from the bucket"
    )]
    Newer {
        /// Its version.
        found: u32,
    },
    /// The database failed.
    #[error("translation table: {op} failed: {source}")]
    Engine {
        /// What was tried.
        op: &'static str,
        /// The database's words.
        source: rocksdb::Error,
    },
    /// Its files cannot be copied or replaced.
    #[error("the translation table's files: {0}")]
    Files(std::io::Error),
    /// A block is mapped to a chunk that has no entry, or had none any more when it was looked at.
    #[error(
        "the translation table is damaged: chunk {id:x} is not listed (move its directory away: it is rebuilt from the bucket)"
    )]
    Unlisted {
        /// The chunk's id.
        id: u64,
    },
    /// Of a table made of headers alone: what blocks refer to is not there.
    #[error(
        "block {lba} of volume {volume} is a copy by reference of a block of chunk {id:x}, which is missing from the \
         bucket, and no later chunk tells it again; restore that chunk, or the checkpoint"
    )]
    ReferenceLost {
        /// The volume.
        volume: VolumeId,
        /// The first such block.
        lba: crate::types::Lba,
        /// The chunk's id.
        id: u64,
    },
    /// An entry that makes no sense.
    #[error("the translation table is damaged: {0} (move its directory away: it is rebuilt from the bucket)")]
    Damaged(String),
    /// A chunk that is not the next one.
    #[error("chunk {got:?} cannot follow what is applied ({applied:?}): {why}")]
    OutOfOrder {
        /// How far the table is.
        applied: Applied,
        /// What was to be applied.
        got: crate::chunk::ChunkName,
        /// What is wrong.
        why: &'static str,
    },
}

#[cfg(test)]
mod space_tests;
#[cfg(test)]
mod tests;
