//! What a running fsd says of itself: one line of JSON to each who connects to its Unix socket.

mod counted;
mod socket;

pub use counted::{CountedTree, TreeCounts};
pub use socket::{Admin, AdminError, ask};

use serde::{Deserialize, Serialize};

use crate::disk::DiskCounts;

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
    /// Calls of the tree.
    pub tree: TreeCounts,
    /// Calls of the disk.
    pub on_disk: DiskCounts,
}
