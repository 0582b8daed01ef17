//! Why blocks could not be read.

use super::format::FormatError;
use super::name::ChunkName;
use crate::store::StoreError;
use crate::table::TableError;
use crate::types::Lba;

/// A failed read of a chunk. None of these is ever answered with data.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// An object the volume needs is not there.
    #[error("chunk {name} is missing from the bucket")]
    Missing {
        /// Which.
        name: ChunkName,
    },
    /// The object is not the chunk it should be.
    #[error("chunk {name} is damaged: {source}")]
    Header {
        /// Which.
        name: ChunkName,
        /// What is wrong with it.
        source: FormatError,
    },
    /// A frame does not match its checksum, twice in a row, or does not decode.
    #[error("chunk {name}: frame {frame} is damaged; it holds block {lba} of the volume")]
    Corrupt {
        /// Which chunk.
        name: ChunkName,
        /// Which frame of it.
        frame: u32,
        /// The first block of the volume that was asked for and stands in this frame.
        lba: Lba,
    },
    /// The object ends before the frames its header announced.
    #[error("chunk {name} is cut short: {have} bytes of {need}")]
    Truncated {
        /// Which chunk.
        name: ChunkName,
        /// Bytes its frames need.
        need: u64,
        /// Bytes there.
        have: u64,
    },
    /// The store failed for longer than a read waits, or in a way that waiting does not cure.
    #[error("cannot read the bucket: {0}")]
    Store(#[from] StoreError),
    /// The translation table failed.
    #[error("cannot read the translation table: {0}")]
    Table(#[from] TableError),
}
