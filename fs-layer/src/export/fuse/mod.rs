//! The tree as a directory of this machine: `fuser` in front of [`Vfs`].
//!
//! **Who checks permissions.** The kernel does, with the mount option `default_permissions`. It knows what a request
//! does not carry: supplementary groups, capabilities, user namespaces. So the tree is asked as [`Credentials::system`],
//! and what would follow from the caller's identity is said explicitly: the owner of what is made, and the set-id bits that a
//! write, a truncation or a change of owner takes away ([`ops`]). Access control lists are the kernel's too where the tree has them.
//!
//! **What the kernel may keep.** [`Sharing::Alone`]: nobody else changes the tree, and the kernel keeps names, attributes and
//! contents as long as it has memory. [`Sharing::Shared`]: something else does (NFS beside this mount), and it asks again after a second
//! and at each open. Writes go through to the tree at once in both.
//!
//! **Who holds files.** Each open file and directory is held ([`Vfs::hold`]) until its release, or the end of the mount. What the kernel merely knows is not: numbers
//! are never used again, so a forgotten one needs no account, and a removed one answers ESTALE, after which the kernel looks its
//! name up anew.
//!
//! **Locks.** With [`Sharing::Alone`] all locks are the kernel's: nobody else could be in their way. With [`Sharing::Shared`] fcntl locks are the tree's
//! ([`locks`]); flock stays with the kernel: `fuser` does not hand on which of the two a request is for, and the two must not meet.
//!
//! **Who reads requests.** One thread at a time: [`turns`]. What waits for answers is woken quickly: [`awake`].

mod awake;
mod convert;
mod locks;
mod mount;
mod ops;
mod readdir;
mod turns;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

#[cfg(doc)]
use crate::vfs::Credentials;
use crate::vfs::Vfs;

pub use mount::{MountError, Mounted, Stopper, clear_dead};

/// Who else changes the tree while it is mounted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// Nobody.
    Alone,
    /// Other exports of this process, or other hosts.
    Shared,
}

impl Sharing {
    /// How long names and attributes may be kept.
    pub(crate) fn keep(self) -> Duration {
        match self {
            Sharing::Alone => Duration::from_secs(86_400),
            Sharing::Shared => Duration::from_secs(1),
        }
    }
}

/// How a tree is mounted.
#[derive(Clone, Debug)]
pub struct FuseOptions {
    /// What stands in the first column of the mount table.
    pub source: String,
    /// Who else changes the tree.
    pub sharing: Sharing,
    /// Refuse changes.
    pub read_only: bool,
    /// Other users than the mounting one are let in. Always so for root.
    pub allow_other: bool,
    /// Set-id bits of programs count.
    pub suid: bool,
    /// Device files open devices.
    pub dev: bool,
    /// Requests that are worked on at once.
    pub threads: usize,
    /// How far ahead the kernel reads, in bytes.
    pub read_ahead: u64,
    /// Keep idle processors awake while requests follow each other, where waking them takes long.
    pub keep_awake: bool,
}

impl Default for FuseOptions {
    fn default() -> FuseOptions {
        FuseOptions {
            source: "fsd".to_owned(),
            sharing: Sharing::Alone,
            read_only: false,
            allow_other: true,
            suid: true,
            dev: true,
            threads: 16,
            read_ahead: 4 << 20,
            keep_awake: true,
        }
    }
}

/// Mounts `tree` on the directory and serves it from threads of its own until unmounted.
///
/// # Errors
/// If there is no FUSE, or no right to mount, or no such directory.
pub fn mount(tree: Arc<dyn Vfs>, directory: &Path, options: &FuseOptions) -> Result<Mounted, MountError> {
    let directory: PathBuf = std::fs::canonicalize(directory)
        .map_err(|source| MountError::Directory { directory: directory.to_owned(), source })?;
    if options.sharing == Sharing::Alone {
        // Whoever held files in the last run ended with its mount.
        tree.end_recovery();
    }
    let locks = locks::Locks::start(tree.clone()).map_err(MountError::Thread)?;
    mount::start(ops::FuseTree::new(tree, locks, options), directory, options)
}

#[cfg(test)]
mod tests;
