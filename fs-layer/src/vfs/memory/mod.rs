//! A tree in memory, for tests of exports: POSIX rules, no disk. One mutex, no speed.
//!
//! Everything is lost when it is dropped. [`MemoryVfs::lose_unsynced`] plays a crash that lost data, as far as an export can tell.

mod contents;
mod locks;
mod tree;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, MutexGuard};

use super::*;
use crate::waiting::about_to_wait;
use locks::Locks;
use tree::Tree;

/// What [`Vfs::commit`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Commit {
    /// It succeeds.
    Works,
    /// It fails, as with a disk that is gone.
    Fails,
    /// It panics, as by a fault of the program.
    Panics,
    /// It waits until it is to do something else, as with a disk that is slow.
    Waits,
}

/// A tree in memory.
pub struct MemoryVfs {
    id: [u8; 16],
    tree: Mutex<Tree>,
    locks: Mutex<Locks>,
    verifier: AtomicU64,
    commits: AtomicU64,
    commit: Mutex<Commit>,
    commit_changed: Condvar,
}

impl Default for MemoryVfs {
    fn default() -> MemoryVfs {
        MemoryVfs {
            id: rand::random(),
            tree: Mutex::new(Tree::new()),
            locks: Mutex::new(Locks::default()),
            verifier: AtomicU64::new(rand::random()),
            commits: AtomicU64::new(0),
            commit: Mutex::new(Commit::Works),
            commit_changed: Condvar::new(),
        }
    }
}

impl MemoryVfs {
    fn tree(&self) -> MutexGuard<'_, Tree> {
        self.tree.lock().expect("no panic under the lock")
    }

    fn locks(&self) -> MutexGuard<'_, Locks> {
        self.locks.lock().expect("no panic under the lock")
    }

    /// Acts as if unsynced data may have been lost: the write verifier changes.
    pub fn lose_unsynced(&self) {
        self.verifier.fetch_add(1, Ordering::SeqCst);
    }

    /// Lets [`Vfs::commit`] do this from now on.
    pub fn let_commit(&self, commit: Commit) {
        *self.commit.lock().expect("no panic under the lock") = commit;
        self.commit_changed.notify_all();
    }

    /// How often [`Vfs::commit`] was called.
    pub fn commits(&self) -> u64 {
        self.commits.load(Ordering::SeqCst)
    }

    /// Holds that were not released, over all files.
    pub fn holds(&self) -> u64 {
        self.tree().holds()
    }
}

impl Vfs for MemoryVfs {
    fn statfs(&self) -> Result<FsStat> {
        let (files, bytes) = self.tree().usage();
        Ok(FsStat {
            id: self.id,
            bytes_total: 1 << 40,
            bytes_free: (1 << 40) - bytes,
            files_total: 1 << 30,
            files_free: (1 << 30) - files,
            read_only: false,
        })
    }

    fn lookup(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<Attributes> {
        self.tree().lookup(who, dir, name)
    }

    fn make(&self, who: &Credentials, dir: Ino, name: &[u8], what: &Make, with: &NewAttributes) -> Result<Made> {
        self.tree().make(who, dir, name, what, with)
    }

    fn link(&self, who: &Credentials, ino: Ino, dir: Ino, name: &[u8]) -> Result<Linked> {
        self.tree().link(who, ino, dir, name)
    }

    fn unlink(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<DirChange> {
        self.tree().remove(who, dir, name, false)
    }

    fn rmdir(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<DirChange> {
        self.tree().remove(who, dir, name, true)
    }

    fn rename(
        &self,
        who: &Credentials,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        how: Rename,
    ) -> Result<(DirChange, DirChange)> {
        self.tree().rename(who, from, to, how)
    }

    fn readdir(&self, who: &Credentials, dir: Ino, cookie: u64, max: usize) -> Result<DirPage> {
        self.tree().readdir(who, dir, cookie, max)
    }

    fn parent(&self, dir: Ino) -> Result<Ino> {
        self.tree().parent(dir)
    }

    fn getattr(&self, ino: Ino) -> Result<Attributes> {
        self.tree().getattr(ino)
    }

    fn setattr(&self, who: &Credentials, ino: Ino, set: &SetAttributes, opened: bool) -> Result<Attributes> {
        self.tree().setattr(who, ino, set, opened)
    }

    fn access(&self, who: &Credentials, ino: Ino, asked: Access) -> Result<Access> {
        self.tree().access(who, ino, asked)
    }

    fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        self.tree().readlink(ino)
    }

    fn getxattr(&self, who: &Credentials, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        self.tree().getxattr(who, ino, name)
    }

    fn listxattr(&self, _who: &Credentials, ino: Ino) -> Result<Vec<Vec<u8>>> {
        self.tree().listxattr(ino)
    }

    fn setxattr(&self, who: &Credentials, ino: Ino, name: &[u8], value: &[u8], how: SetXattr) -> Result<()> {
        self.tree().setxattr(who, ino, name, value, how)
    }

    fn removexattr(&self, who: &Credentials, ino: Ino, name: &[u8]) -> Result<()> {
        self.tree().removexattr(who, ino, name)
    }

    fn hold(&self, ino: Ino) -> Result<()> {
        self.tree().hold(ino)
    }

    fn release(&self, ino: Ino) {
        self.tree().release(ino);
    }

    fn read(&self, ino: Ino, offset: u64, len: u32) -> Result<ReadData> {
        self.tree().read(ino, offset, len)
    }

    fn write_accepting(
        &self,
        who: &Credentials,
        ino: Ino,
        at: WriteAt,
        data: &[u8],
        _accepted: &mut dyn FnMut(),
    ) -> Result<Written> {
        self.tree().write(who, ino, at, data)
    }

    fn fsync(&self, ino: Ino, _data_only: bool) -> Result<()> {
        self.tree().getattr(ino).map(drop)
    }

    fn fallocate(&self, who: &Credentials, ino: Ino, how: Fallocate, offset: u64, len: u64) -> Result<Attributes> {
        self.tree().fallocate(who, ino, how, offset, len)
    }

    fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        self.tree().seek(ino, offset, what)
    }

    fn clone_range(&self, who: &Credentials, from: (Ino, u64), to: (Ino, u64), len: u64) -> Result<u64> {
        self.tree().clone_range(who, from, to, len)
    }

    fn lock(&self, ino: Ino, lock: &FileLock) -> Result<Option<FileLock>> {
        self.tree().getattr(ino)?;
        Ok(self.locks().lock(ino, lock))
    }

    fn test_lock(&self, ino: Ino, lock: &FileLock) -> Result<Option<FileLock>> {
        self.tree().getattr(ino)?;
        Ok(self.locks().conflict(ino, lock))
    }

    fn unlock(&self, ino: Ino, lock: &FileLock) -> Result<()> {
        let woken = self.locks().unlock(ino, lock);
        woken.into_iter().for_each(|then| then());
        Ok(())
    }

    fn unlock_all(&self, ino: Ino, owner: LockOwner) -> Result<()> {
        let woken = self.locks().unlock_all(ino, owner);
        woken.into_iter().for_each(|then| then());
        Ok(())
    }

    fn wait_for_unlock(&self, ino: Ino, then: Box<dyn FnOnce() + Send>) {
        self.locks().wait(ino, then);
    }

    fn commit(&self) -> Result<()> {
        self.commits.fetch_add(1, Ordering::SeqCst);
        let mut commit = self.commit.lock().expect("no panic under the lock");
        if *commit == Commit::Waits {
            about_to_wait();
        }
        while *commit == Commit::Waits {
            commit = self.commit_changed.wait(commit).expect("no panic under the lock");
        }
        let how = *commit;
        drop(commit);
        match how {
            Commit::Works | Commit::Waits => Ok(()),
            Commit::Fails => Err(VfsError::Io("the disk of a test is gone".to_owned())),
            Commit::Panics => panic!("a fault that a test asked for"),
        }
    }

    fn sync(&self) -> Result<()> {
        Ok(())
    }

    /// Nothing outlives the process.
    fn noting(&self, _request: u64, change: &mut dyn FnMut()) {
        change();
    }

    fn noted(&self) -> Vec<u64> {
        Vec::new()
    }

    fn write_verifier(&self) -> [u8; 8] {
        self.verifier.load(Ordering::SeqCst).to_be_bytes()
    }
}
