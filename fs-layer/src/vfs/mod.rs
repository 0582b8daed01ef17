//! What an export sees: one POSIX tree.
//!
//! [`Vfs`] is POSIX by inode number, as NFS and FUSE both want it: names are looked up one at a time, files are known
//! by number, and the numbers are never used again, so a handle can be stale but never wrong. All rules (permissions,
//! sticky directories, set-id bits, limits) are enforced behind this trait, the same for each export.
//!
//! Calls block and may come from many threads at once. Each is atomic and seen by every later one. What has changed is
//! durable when [`Vfs::commit`] (names and attributes of everything done before), or [`Vfs::fsync`] (one file with its data), has
//! returned; before, a crash may take it back, in order: of two changes to names and attributes the later one never survives alone.

mod error;
mod fs;
pub mod memory;
mod types;

pub use error::{Result, VfsError};
pub(crate) use fs::file_locks::FileLocks;
pub(crate) use fs::kind_code;
pub use fs::{Filesystem, FilesystemStatus, OpenOptions};
pub use types::*;

/// [`Vfs::noting`] for a closure with a result.
pub fn noting<T>(vfs: &dyn Vfs, request: u64, change: impl FnOnce() -> T) -> T {
    let (mut change, mut result) = (Some(change), None);
    vfs.noting(request, &mut || result = change.take().map(|change| change()));
    result.expect("`noting` runs it once")
}

/// A POSIX tree. See the module for what must hold.
///
/// `who` is whom the call is checked against: every call with it fails with [`VfsError::Access`] or [`VfsError::NotPermitted`]
/// where POSIX says so. `ino` that does not exist (any more) is [`VfsError::Stale`]. A name is 1 to 255 bytes without `/` and NUL, else
/// [`VfsError::Invalid`] or [`VfsError::NameTooLong`]; `.` and `..` can be looked up and not made or removed. Whatever changes a
/// tree opened read-only fails with [`VfsError::ReadOnly`].
pub trait Vfs: Send + Sync {
    /// What this filesystem is and how full it is.
    fn statfs(&self) -> Result<FsStat>;

    /// Which part of the tree a file is in, by its number alone. See [`crate::snapshots`].
    fn part(&self, ino: Ino) -> Part {
        let _ = ino;
        Part::Live
    }

    // --- Names ---

    /// The file that `name` in `dir` names; `..` of the root is the root. Needs search permission.
    fn lookup(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<Attributes>;

    /// Makes `name` in `dir`. Its owner is `who`'s, or the directory's group where that has the set-group-ID bit. Only
    /// with [`Make::File`] and without `exclusive` an existing regular file is no error: it is returned as it is, `made` false.
    fn make(&self, who: &Credentials, dir: Ino, name: &[u8], what: &Make, with: &NewAttributes) -> Result<Made>;

    /// A further name for `ino`, not a directory.
    fn link(&self, who: &Credentials, ino: Ino, dir: Ino, name: &[u8]) -> Result<Linked>;

    /// Removes a name that is not a directory's. The file lives on while something holds it ([`Vfs::hold`]).
    fn unlink(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<DirChange>;

    /// Removes an empty directory.
    fn rmdir(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<DirChange>;

    /// Renames, replacing what has the new name, in one step. Returns the changes of both directories.
    fn rename(
        &self,
        who: &Credentials,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        how: Rename,
    ) -> Result<(DirChange, DirChange)>;

    /// Entries of a directory after `cookie` (0: from the beginning), without `.` and `..`, at most `max`. Cookies are above 2,
    /// and stay valid and in order whatever is made and removed meanwhile: an entry that stays is seen exactly once. Needs read
    /// permission, unless `who` is [`Credentials::system`].
    fn readdir(&self, who: &Credentials, dir: Ino, cookie: u64, max: usize) -> Result<DirPage>;

    /// The directory that `dir` is in.
    fn parent(&self, dir: Ino) -> Result<Ino>;

    // --- Attributes ---

    /// What the file is. Needs no permission.
    fn getattr(&self, ino: Ino) -> Result<Attributes>;

    /// Changes what `set` names, all or nothing, with the rules of chmod, chown, truncate and utimensat. Setting the size
    /// needs write permission, unless `opened`: the caller holds the file open for writing.
    fn setattr(&self, who: &Credentials, ino: Ino, set: &SetAttributes, opened: bool) -> Result<Attributes>;

    /// Which of the asked permissions `who` has.
    fn access(&self, who: &Credentials, ino: Ino, asked: Access) -> Result<Access>;

    /// Where a symbolic link points.
    fn readlink(&self, ino: Ino) -> Result<Vec<u8>>;

    /// The value of an extended attribute, `user.`, `trusted.`, `security.` or `system.posix_acl_*`.
    fn getxattr(&self, who: &Credentials, ino: Ino, name: &[u8]) -> Result<Vec<u8>>;

    /// The names of all extended attributes that `who` may see.
    fn listxattr(&self, who: &Credentials, ino: Ino) -> Result<Vec<Vec<u8>>>;

    /// Sets an extended attribute.
    fn setxattr(&self, who: &Credentials, ino: Ino, name: &[u8], value: &[u8], how: SetXattr) -> Result<()>;

    /// Removes an extended attribute; [`VfsError::NoData`] if it is not there.
    fn removexattr(&self, who: &Credentials, ino: Ino, name: &[u8]) -> Result<()>;

    // --- Open files ---

    /// Lets the file live on without names until as many [`Vfs::release`]s. Checks nothing: an export calls
    /// [`Vfs::access`] first, by the rules of its protocol.
    fn hold(&self, ino: Ino) -> Result<()>;

    /// Takes back one [`Vfs::hold`]. Without names and holds the file goes.
    fn release(&self, ino: Ino);

    /// Files without names that were held when the last run ended live on, and can be held again, until this is called:
    /// an export calls it when its clients had the time to ask for them (NFS: at the end of the grace period), one whose holders
    /// ended with the last run at once. More than one call does nothing more.
    fn end_recovery(&self) {}

    // --- Contents. Permission was checked when the file was opened. ---

    /// Bytes from `offset` on, up to `len`, fewer only at the end of the file.
    fn read(&self, ino: Ino, offset: u64, len: u32) -> Result<ReadData>;

    /// Writes at `at`, all of it or nothing. Clears set-id bits unless `who` may keep them. Returns where it was written and the attributes after.
    fn write(&self, who: &Credentials, ino: Ino, at: WriteAt, data: &[u8]) -> Result<Written> {
        self.write_accepting(who, ino, at, data, &mut || ())
    }

    /// As [`Vfs::write`], but may call `accepted`, once, as soon as it is certain that the bytes are written, unless this filesystem fails
    /// as a whole: who waits may go on, and every later call, a sync too, sees them. If it was not called the result says what happened.
    fn write_accepting(
        &self,
        who: &Credentials,
        ino: Ino,
        at: WriteAt,
        data: &[u8],
        accepted: &mut dyn FnMut(),
    ) -> Result<Written>;

    /// Everything written to the file before, its size and, unless `data_only`, its other attributes are durable on return, and
    /// so are its names.
    fn fsync(&self, ino: Ino, data_only: bool) -> Result<()>;

    /// fallocate(2) in all modes of [`Fallocate`].
    fn fallocate(&self, who: &Credentials, ino: Ino, how: Fallocate, offset: u64, len: u64) -> Result<Attributes>;

    /// lseek(2) with SEEK_DATA or SEEK_HOLE. [`VfsError::NoSuchAddress`] at or past the end, or without data after `offset`.
    fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64>;

    /// Lets `to` hold what `from` holds, as FICLONERANGE does: without moving data where the disk can. `len` 0: up to the end. Offsets and
    /// length are whole blocks, but for an end at the end of the source. Returns how many bytes are shared.
    fn clone_range(&self, who: &Credentials, from: (Ino, u64), to: (Ino, u64), len: u64) -> Result<u64>;

    // --- Locks ---

    /// Takes a lock, or changes the owner's own; or says who is in the way. Never waits: see [`Vfs::wait_for_unlock`].
    fn lock(&self, ino: Ino, lock: &FileLock) -> Result<Option<FileLock>>;

    /// Who would be in the way.
    fn test_lock(&self, ino: Ino, lock: &FileLock) -> Result<Option<FileLock>>;

    /// Gives up the part of the owner's locks of the same [`LockSpace`] in the range.
    fn unlock(&self, ino: Ino, lock: &FileLock) -> Result<()>;

    /// Gives up all locks of an owner on the file.
    fn unlock_all(&self, ino: Ino, owner: LockOwner) -> Result<()>;

    /// Calls `then` once, from any thread, when some lock of the file was given up after this call.
    fn wait_for_unlock(&self, ino: Ino, then: Box<dyn FnOnce() + Send>);

    // --- Durability ---

    /// Every change of names and attributes made before is durable on return. Many callers share one flush.
    fn commit(&self) -> Result<()>;

    /// Everything, data too, is durable on return.
    fn sync(&self) -> Result<()>;

    /// Runs `change` once. A name that it makes, removes or moves is noted as done for `request` (not 0) in the same step: after a crash
    /// [`Vfs::noted`] has the request exactly if the change survived. An export that is asked again by a client which heard no answer
    /// can tell by that. Within another call of this it is noted for both. Without memory over crashes nothing is noted.
    fn noting(&self, request: u64, change: &mut dyn FnMut());

    /// The requests that were noted before this opening, the last few hundred.
    fn noted(&self) -> Vec<u64>;

    /// Changes whenever writes that no fsync covered may have been lost since it was last asked for.
    fn write_verifier(&self) -> [u8; 8];
}
