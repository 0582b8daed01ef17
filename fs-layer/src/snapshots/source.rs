//! Who makes, lists, opens and deletes snapshots.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::disk::Disk;
use crate::disk::nbd::NbdError;
use crate::vfs::VfsError;

/// A snapshot, as its source says.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct SnapshotInfo {
    /// What people call it.
    pub name: String,
    /// What the source says of it, always the same. Tells it from another one that was given its name; may be empty where the source says
    /// nothing.
    pub description: String,
}

/// Why something could not be done with snapshots.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// What was written before could not be made durable.
    #[error("what was written could not be made durable, so no snapshot was made: {0}")]
    Sync(#[source] VfsError),
    /// The server of the volume cannot be reached, or has no such export.
    #[error(transparent)]
    Server(#[from] NbdError),
    /// The blockd is not in this process, and only there it can be done.
    #[error("the volume is served by a blockd elsewhere, and only there this can be done{done}: {command}")]
    Elsewhere {
        /// What was done here.
        done: &'static str,
        /// What to type there.
        command: String,
    },
    /// The engine said no.
    #[error("{0}")]
    Refused(String),
    /// There is none of this name.
    #[error("there is no snapshot {0}; fsd snapshot list shows all")]
    Unknown(String),
    /// It is another one by now.
    #[error("snapshot {0} was deleted, and another one has its name")]
    Replaced(String),
}

/// Where snapshots of the disk come from. Calls block, and may come from many threads at once.
pub trait SnapshotSource: Send + Sync {
    /// All of them, in the order in which they were made.
    ///
    /// # Errors
    /// If the source cannot be asked.
    fn list(&self) -> Result<Vec<SnapshotInfo>, SnapshotError>;

    /// The disk as it was. It is only read.
    ///
    /// # Errors
    /// If it is gone, or cannot be reached.
    fn open(&self, snapshot: &SnapshotInfo) -> Result<Arc<dyn Disk>, SnapshotError>;

    /// Makes one of all that is durable on the disk.
    ///
    /// # Errors
    /// If it cannot be made, or not by this source.
    fn create(&self, name: &str) -> Result<(), SnapshotError>;

    /// Deletes one.
    ///
    /// # Errors
    /// As [`SnapshotSource::create`].
    fn delete(&self, name: &str) -> Result<(), SnapshotError>;
}
