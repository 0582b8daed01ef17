//! Locks of inodes, under which every operation runs.
//!
//! To be free of deadlocks everybody takes them in one order: a directory before what is in it, else by number; the lock of renames
//! across directories before all; an orphan directory after all. Reading takes them shared, changing exclusive. [`LockManager`] is what a lock server for many hosts will
//! implement; [`LocalLocks`] is for one.

mod local;

pub use local::LocalLocks;

use crate::vfs::{Ino, Result};

/// What a lock is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LockMode {
    /// To read, with others.
    Shared,
    /// To change, alone.
    Exclusive,
}

/// The number that stands for the lock of renames across directories.
pub const RENAME_LOCK: Ino = Ino(0);

/// Gives locks. See the module.
pub trait LockManager: Send + Sync {
    /// Waits for the lock.
    ///
    /// # Errors
    /// [`Io`](crate::vfs::VfsError::Io) if it can't be had any more: the lock server is gone.
    fn acquire(&self, ino: Ino, mode: LockMode) -> Result<()>;

    /// Gives it back.
    fn release(&self, ino: Ino, mode: LockMode);
}

/// A lock, until it is dropped.
pub struct LockGuard<'a> {
    manager: &'a dyn LockManager,
    ino: Ino,
    mode: LockMode,
}

impl<'a> LockGuard<'a> {
    /// Waits for the lock.
    ///
    /// # Errors
    /// See [`LockManager::acquire`].
    pub fn new(manager: &'a dyn LockManager, ino: Ino, mode: LockMode) -> Result<LockGuard<'a>> {
        manager.acquire(ino, mode)?;
        Ok(LockGuard { manager, ino, mode })
    }
}

impl Drop for LockGuard<'_> {
    fn drop(&mut self) {
        self.manager.release(self.ino, self.mode);
    }
}
