//! [`Vfs`] for [`Filesystem`]: each call by name.

use std::sync::PoisonError;

use super::{Filesystem, lock, noting};
use crate::vfs::{
    Access, Attributes, Credentials, DirChange, DirPage, Fallocate, FileLock, FsStat, Ino, Linked, LockOwner, Made,
    Make, NewAttributes, ReadData, Rename, Result, Seek, SetAttributes, SetXattr, Vfs, WriteAt, Written,
};

impl Vfs for Filesystem {
    fn statfs(&self) -> Result<FsStat> {
        Ok(self.stat())
    }

    fn lookup(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<Attributes> {
        self.do_lookup(who, dir, name)
    }

    fn make(&self, who: &Credentials, dir: Ino, name: &[u8], what: &Make, with: &NewAttributes) -> Result<Made> {
        self.do_make(who, dir, name, what, with)
    }

    fn link(&self, who: &Credentials, ino: Ino, dir: Ino, name: &[u8]) -> Result<Linked> {
        self.do_link(who, ino, dir, name)
    }

    fn unlink(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<DirChange> {
        self.do_remove(who, dir, name, false)
    }

    fn rmdir(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<DirChange> {
        self.do_remove(who, dir, name, true)
    }

    fn rename(
        &self,
        who: &Credentials,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        how: Rename,
    ) -> Result<(DirChange, DirChange)> {
        self.do_rename(who, from, to, how)
    }

    fn readdir(&self, who: &Credentials, dir: Ino, cookie: u64, max: usize) -> Result<DirPage> {
        self.do_readdir(who, dir, cookie, max)
    }

    fn parent(&self, dir: Ino) -> Result<Ino> {
        self.do_parent(dir)
    }

    fn getattr(&self, ino: Ino) -> Result<Attributes> {
        self.do_getattr(ino)
    }

    fn setattr(&self, who: &Credentials, ino: Ino, set: &SetAttributes, opened: bool) -> Result<Attributes> {
        self.do_setattr(who, ino, set, opened)
    }

    fn access(&self, who: &Credentials, ino: Ino, asked: Access) -> Result<Access> {
        self.do_access(who, ino, asked)
    }

    fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        self.do_readlink(ino)
    }

    fn getxattr(&self, who: &Credentials, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        self.do_getxattr(who, ino, name)
    }

    fn listxattr(&self, who: &Credentials, ino: Ino) -> Result<Vec<Vec<u8>>> {
        self.do_listxattr(who, ino)
    }

    fn setxattr(&self, who: &Credentials, ino: Ino, name: &[u8], value: &[u8], how: SetXattr) -> Result<()> {
        self.do_setxattr(who, ino, name, value, how)
    }

    fn removexattr(&self, who: &Credentials, ino: Ino, name: &[u8]) -> Result<()> {
        self.do_removexattr(who, ino, name)
    }

    fn hold(&self, ino: Ino) -> Result<()> {
        self.do_hold(ino)
    }

    fn end_recovery(&self) {
        if let Err(e) = self.do_end_recovery() {
            // They stay in the orphan directory, for the next opening.
            tracing::error!("files without names could not be freed: {e}");
        }
    }

    fn release(&self, ino: Ino) {
        if let Err(e) = self.do_release(ino) {
            // It stays in the orphan directory, from which the next opening frees it.
            tracing::error!(ino = ino.0, "a file without names could not be freed: {e}");
        }
    }

    fn read(&self, ino: Ino, offset: u64, len: u32) -> Result<ReadData> {
        self.do_read(ino, offset, len)
    }

    fn write_accepting(
        &self,
        who: &Credentials,
        ino: Ino,
        at: WriteAt,
        data: &[u8],
        accepted: &mut dyn FnMut(),
    ) -> Result<Written> {
        self.do_write(who, ino, at, data, accepted)
    }

    /// The size and the times are in one block: `data_only` saves nothing.
    fn fsync(&self, ino: Ino, _data_only: bool) -> Result<()> {
        self.do_fsync(ino)
    }

    fn fallocate(&self, who: &Credentials, ino: Ino, how: Fallocate, offset: u64, len: u64) -> Result<Attributes> {
        self.do_fallocate(who, ino, how, offset, len)
    }

    fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        self.do_seek(ino, offset, what)
    }

    fn clone_range(&self, who: &Credentials, from: (Ino, u64), to: (Ino, u64), len: u64) -> Result<u64> {
        self.do_clone(who, from, to, len)
    }

    fn lock(&self, ino: Ino, lock: &FileLock) -> Result<Option<FileLock>> {
        self.do_getattr(ino)?;
        Ok(self.file_locks.lock(ino, lock))
    }

    fn test_lock(&self, ino: Ino, lock: &FileLock) -> Result<Option<FileLock>> {
        self.do_getattr(ino)?;
        Ok(self.file_locks.test(ino, lock))
    }

    fn unlock(&self, ino: Ino, lock: &FileLock) -> Result<()> {
        self.file_locks.unlock(ino, lock);
        Ok(())
    }

    fn unlock_all(&self, ino: Ino, owner: LockOwner) -> Result<()> {
        self.file_locks.unlock_all(ino, owner);
        Ok(())
    }

    fn wait_for_unlock(&self, ino: Ino, then: Box<dyn FnOnce() + Send>) {
        self.file_locks.wait(ino, then);
    }

    fn commit(&self) -> Result<()> {
        self.journal.commit_all()
    }

    fn sync(&self) -> Result<()> {
        if self.options.read_only {
            return Ok(());
        }
        // What was accepted before is dirty from here on.
        drop(self.accepting.write().unwrap_or_else(PoisonError::into_inner));
        self.write_back_all()?;
        // The flush must begin after the data was written.
        self.journal.commit(self.journal.newest(), self.journal.ticket())
    }

    fn noting(&self, request: u64, change: &mut dyn FnMut()) {
        noting::during(request, change);
    }

    fn noted(&self) -> Vec<u64> {
        self.journal.noted().to_vec()
    }

    fn write_verifier(&self) -> [u8; 8] {
        *lock(&self.verifier)
    }
}
