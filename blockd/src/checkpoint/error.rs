//! Why a checkpoint cannot be made or used.

use std::io;

use super::format::CheckpointFormatError;
use crate::manifest::{CheckpointPointer, ManifestError};
use crate::store::StoreError;
use crate::table::{Applied, Position, TableError};

/// A failure with a checkpoint.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    /// The bucket does not hold what was put there. Waiting does not help.
    #[error("the checkpoint cannot be used: {key} {flaw}")]
    Damaged {
        /// Which object.
        key: String,
        /// What is wrong with it.
        flaw: Flaw,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The manifest could not be read or changed.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The table could not be copied or opened.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The local disk failed.
    #[error("the translation table's files: {0}")]
    Files(#[from] io::Error),
    /// The owner wants it to stop.
    #[error("the volume is closing")]
    Closing,
}

/// What is wrong with an object of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Flaw {
    /// It is gone.
    #[error("is missing from the bucket")]
    Missing,
    /// It has another length.
    #[error("is {have} bytes long, not {need}")]
    Length {
        /// Bytes there should be.
        need: u64,
        /// Bytes there are.
        have: u64,
    },
    /// It was changed.
    #[error("is damaged: its checksum does not match")]
    Checksum,
    /// It is not a checkpoint object, or not this one.
    #[error("is damaged: {0}")]
    Format(#[from] CheckpointFormatError),
    /// The files make no table.
    #[error("lists files that are no usable table: {0}")]
    Table(String),
    /// The files make a table at another position.
    #[error("holds the table at {found:?}, not at {expected:?}")]
    Position {
        /// As the manifest says.
        expected: Stand,
        /// As the table says.
        found: Stand,
    },
}

/// How far a table or a checkpoint is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stand {
    /// The history.
    pub applied: Applied,
    /// With the relocated chunks.
    pub position: Position,
}

impl From<&CheckpointPointer> for Stand {
    fn from(pointer: &CheckpointPointer) -> Self {
        Self { applied: Applied { seq: pointer.seq, lsn: pointer.lsn }, position: pointer.into() }
    }
}

impl CheckpointError {
    /// Whether this checkpoint will never be usable, whatever else is tried.
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Damaged { .. })
    }

    pub(super) fn damaged(key: &str, flaw: impl Into<Flaw>) -> Self {
        Self::Damaged { key: key.to_owned(), flaw: flaw.into() }
    }
}
