//! A tree that counts what is asked of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use serde::{Deserialize, Serialize};

use crate::vfs::{
    Access, Attributes, Credentials, DirChange, DirPage, Fallocate, FileLock, FsStat, Ino, Linked, LockOwner, Made,
    Make, NewAttributes, Part, ReadData, Rename, Result, Seek, SetAttributes, SetXattr, Vfs, WriteAt, Written,
};

/// Calls of a tree since the start.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct TreeCounts {
    /// Names looked up.
    pub lookups: u64,
    /// Attributes asked for, links read, permissions asked.
    pub stats: u64,
    /// Pages of directories.
    pub listings: u64,
    /// Names made, removed and moved, and attributes set.
    pub changes: u64,
    /// Reads.
    pub reads: u64,
    /// Bytes they brought.
    pub read_bytes: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes they brought.
    pub write_bytes: u64,
    /// Requests to make something durable.
    pub syncs: u64,
    /// Files held open now.
    pub held: u64,
    /// Calls that failed because the disk did.
    pub io_errors: u64,
}

#[derive(Default)]
struct Counters {
    lookups: AtomicU64,
    stats: AtomicU64,
    listings: AtomicU64,
    changes: AtomicU64,
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    write_bytes: AtomicU64,
    syncs: AtomicU64,
    held: AtomicU64,
    io_errors: AtomicU64,
}

/// See the module.
pub struct CountedTree {
    tree: Arc<dyn Vfs>,
    counters: Counters,
}

impl CountedTree {
    /// Counts for `tree`.
    pub fn new(tree: Arc<dyn Vfs>) -> CountedTree {
        CountedTree { tree, counters: Counters::default() }
    }

    /// What was counted so far.
    pub fn counts(&self) -> TreeCounts {
        let of = &self.counters;
        TreeCounts {
            lookups: of.lookups.load(Relaxed),
            stats: of.stats.load(Relaxed),
            listings: of.listings.load(Relaxed),
            changes: of.changes.load(Relaxed),
            reads: of.reads.load(Relaxed),
            read_bytes: of.read_bytes.load(Relaxed),
            writes: of.writes.load(Relaxed),
            write_bytes: of.write_bytes.load(Relaxed),
            syncs: of.syncs.load(Relaxed),
            held: of.held.load(Relaxed),
            io_errors: of.io_errors.load(Relaxed),
        }
    }

    fn count<T>(&self, of: &AtomicU64, result: Result<T>) -> Result<T> {
        of.fetch_add(1, Relaxed);
        if matches!(result, Err(crate::vfs::VfsError::Io(_))) {
            self.counters.io_errors.fetch_add(1, Relaxed);
        }
        result
    }
}

impl Vfs for CountedTree {
    fn statfs(&self) -> Result<FsStat> {
        self.count(&self.counters.stats, self.tree.statfs())
    }

    fn part(&self, ino: Ino) -> Part {
        self.tree.part(ino)
    }

    fn lookup(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<Attributes> {
        self.count(&self.counters.lookups, self.tree.lookup(who, dir, name))
    }

    fn make(&self, who: &Credentials, dir: Ino, name: &[u8], what: &Make, with: &NewAttributes) -> Result<Made> {
        self.count(&self.counters.changes, self.tree.make(who, dir, name, what, with))
    }

    fn link(&self, who: &Credentials, ino: Ino, dir: Ino, name: &[u8]) -> Result<Linked> {
        self.count(&self.counters.changes, self.tree.link(who, ino, dir, name))
    }

    fn unlink(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<DirChange> {
        self.count(&self.counters.changes, self.tree.unlink(who, dir, name))
    }

    fn rmdir(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<DirChange> {
        self.count(&self.counters.changes, self.tree.rmdir(who, dir, name))
    }

    fn rename(
        &self,
        who: &Credentials,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        how: Rename,
    ) -> Result<(DirChange, DirChange)> {
        self.count(&self.counters.changes, self.tree.rename(who, from, to, how))
    }

    fn readdir(&self, who: &Credentials, dir: Ino, cookie: u64, max: usize) -> Result<DirPage> {
        self.count(&self.counters.listings, self.tree.readdir(who, dir, cookie, max))
    }

    fn parent(&self, dir: Ino) -> Result<Ino> {
        self.count(&self.counters.lookups, self.tree.parent(dir))
    }

    fn getattr(&self, ino: Ino) -> Result<Attributes> {
        self.count(&self.counters.stats, self.tree.getattr(ino))
    }

    fn setattr(&self, who: &Credentials, ino: Ino, set: &SetAttributes, opened: bool) -> Result<Attributes> {
        self.count(&self.counters.changes, self.tree.setattr(who, ino, set, opened))
    }

    fn access(&self, who: &Credentials, ino: Ino, asked: Access) -> Result<Access> {
        self.count(&self.counters.stats, self.tree.access(who, ino, asked))
    }

    fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        self.count(&self.counters.stats, self.tree.readlink(ino))
    }

    fn getxattr(&self, who: &Credentials, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        self.count(&self.counters.stats, self.tree.getxattr(who, ino, name))
    }

    fn listxattr(&self, who: &Credentials, ino: Ino) -> Result<Vec<Vec<u8>>> {
        self.count(&self.counters.stats, self.tree.listxattr(who, ino))
    }

    fn setxattr(&self, who: &Credentials, ino: Ino, name: &[u8], value: &[u8], how: SetXattr) -> Result<()> {
        self.count(&self.counters.changes, self.tree.setxattr(who, ino, name, value, how))
    }

    fn removexattr(&self, who: &Credentials, ino: Ino, name: &[u8]) -> Result<()> {
        self.count(&self.counters.changes, self.tree.removexattr(who, ino, name))
    }

    fn hold(&self, ino: Ino) -> Result<()> {
        self.tree.hold(ino)?;
        self.counters.held.fetch_add(1, Relaxed);
        Ok(())
    }

    fn release(&self, ino: Ino) {
        self.counters.held.fetch_sub(1, Relaxed);
        self.tree.release(ino);
    }

    fn end_recovery(&self) {
        self.tree.end_recovery();
    }

    fn read(&self, ino: Ino, offset: u64, len: u32) -> Result<ReadData> {
        let result = self.count(&self.counters.reads, self.tree.read(ino, offset, len));
        if let Ok(read) = &result {
            self.counters.read_bytes.fetch_add(read.data.len() as u64, Relaxed);
        }
        result
    }

    fn write_accepting(
        &self,
        who: &Credentials,
        ino: Ino,
        at: WriteAt,
        data: &[u8],
        accepted: &mut dyn FnMut(),
    ) -> Result<Written> {
        self.counters.write_bytes.fetch_add(data.len() as u64, Relaxed);
        self.count(&self.counters.writes, self.tree.write_accepting(who, ino, at, data, accepted))
    }

    fn fsync(&self, ino: Ino, data_only: bool) -> Result<()> {
        self.count(&self.counters.syncs, self.tree.fsync(ino, data_only))
    }

    fn fallocate(&self, who: &Credentials, ino: Ino, how: Fallocate, offset: u64, len: u64) -> Result<Attributes> {
        self.count(&self.counters.changes, self.tree.fallocate(who, ino, how, offset, len))
    }

    fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        self.count(&self.counters.stats, self.tree.seek(ino, offset, what))
    }

    fn clone_range(&self, who: &Credentials, from: (Ino, u64), to: (Ino, u64), len: u64) -> Result<u64> {
        self.count(&self.counters.changes, self.tree.clone_range(who, from, to, len))
    }

    fn lock(&self, ino: Ino, lock: &FileLock) -> Result<Option<FileLock>> {
        self.tree.lock(ino, lock)
    }

    fn test_lock(&self, ino: Ino, lock: &FileLock) -> Result<Option<FileLock>> {
        self.tree.test_lock(ino, lock)
    }

    fn unlock(&self, ino: Ino, lock: &FileLock) -> Result<()> {
        self.tree.unlock(ino, lock)
    }

    fn unlock_all(&self, ino: Ino, owner: LockOwner) -> Result<()> {
        self.tree.unlock_all(ino, owner)
    }

    fn wait_for_unlock(&self, ino: Ino, then: Box<dyn FnOnce() + Send>) {
        self.tree.wait_for_unlock(ino, then);
    }

    fn commit(&self) -> Result<()> {
        self.count(&self.counters.syncs, self.tree.commit())
    }

    fn sync(&self) -> Result<()> {
        self.count(&self.counters.syncs, self.tree.sync())
    }

    fn noting(&self, request: u64, change: &mut dyn FnMut()) {
        self.tree.noting(request, change);
    }

    fn noted(&self) -> Vec<u64> {
        self.tree.noted()
    }

    fn write_verifier(&self) -> [u8; 8] {
        self.tree.write_verifier()
    }
}
