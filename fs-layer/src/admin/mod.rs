//! What a running fsd says of itself, and does when told to: one line of JSON asks it over its Unix socket, one answers.

mod counted;
mod socket;

pub use counted::{CountedTree, TreeCounts};
pub use socket::{Admin, AdminError, Answers, ask, request};

use serde::{Deserialize, Serialize};

use crate::disk::DiskCounts;
use crate::snapshots::SnapshotInfo;

/// What a running fsd can be asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// What it does.
    Status,
    /// Its snapshots.
    SnapshotList,
    /// Make one.
    SnapshotCreate {
        /// What it is to be called.
        name: String,
    },
    /// Delete one.
    SnapshotDelete {
        /// What it is called.
        name: String,
    },
}

/// What it answers.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Answer {
    /// What it does.
    Status(Box<Status>),
    /// All snapshots, or the one that was made.
    Snapshots(Snapshots),
    /// It is done.
    Done,
    /// Why it is not.
    Error(String),
}

/// Snapshots of a running fsd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Snapshots {
    /// In the order in which they were made.
    pub snapshots: Vec<SnapshotInfo>,
    /// Whether they can be seen in the tree: not if its root has a `.snapshots` of its own.
    pub shown: bool,
}

/// What [`ask`] brings. Programs may read it as JSON; keys are only ever added.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct Status {
    /// Version of the program.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Seconds since it started.
    pub uptime_s: u64,
    /// Where the disk is.
    pub disk: String,
    /// How the tree can be reached, for instance `mounted on /mnt` or `NFS on 0.0.0.0:2049`.
    pub exports: Vec<String>,
    /// The identity of the filesystem, in hexadecimal.
    pub id: String,
    /// Bytes that fit.
    pub bytes_total: u64,
    /// Bytes still free.
    pub bytes_free: u64,
    /// Files that fit.
    pub files_total: u64,
    /// Files that can still be made.
    pub files_free: u64,
    /// Whether nothing can be changed.
    pub read_only: bool,
    /// Snapshots that are open; none where the disk can have none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshots_open: Option<u64>,
    /// Calls of the tree.
    pub tree: TreeCounts,
    /// Calls of the disk.
    pub on_disk: DiskCounts,
}
