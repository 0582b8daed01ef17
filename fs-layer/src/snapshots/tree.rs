//! The live tree and its snapshots as one tree. See the parent for what must hold.
//!
//! **A `.snapshots` of the user's own**, made before there were snapshots: as long as the live root has an entry of that name, that is what the name means,
//! and the snapshots are not visible. Once it is renamed or removed, the name belongs to the snapshots, and cannot be made any more.

use std::sync::{Arc, PoisonError, RwLock};

use super::numbers::{LIST, Number, Place, place};
use super::{DIRECTORY, Shelf, ShelfOptions, SnapshotError, SnapshotInfo, SnapshotSource};
use crate::vfs::{
    Access, Attributes, Credentials, DirChange, DirEntry, DirPage, Fallocate, FileKind, FileLock, Filesystem, FsStat,
    Ino, Linked, LockOwner, Made, Make, NAME_MAX, NewAttributes, Part, ROOT, ReadData, Rename, Result, Seek,
    SetAttributes, SetXattr, Vfs, VfsError, WriteAt, Written,
};

const NAME: &[u8] = DIRECTORY.as_bytes();

/// See the module.
pub struct SnapshotTree<L> {
    live: Arc<L>,
    shelf: Arc<Shelf>,
    /// Whether the live root has an entry of that name. Held while that changes.
    own: RwLock<bool>,
}

impl<L: Vfs> SnapshotTree<L> {
    /// Shows the snapshots of `source` in `live`.
    ///
    /// # Errors
    /// [`VfsError::Io`] if the live root cannot be read.
    pub fn new(live: Arc<L>, source: Arc<dyn SnapshotSource>, options: ShelfOptions) -> Result<SnapshotTree<L>> {
        let own = has_own(&*live)?;
        if own {
            tracing::warn!("the root has a {DIRECTORY} of its own: snapshots are not visible until it is renamed");
        }
        Ok(SnapshotTree { live, shelf: Shelf::new(source, options), own: RwLock::new(own) })
    }

    /// The snapshots.
    pub fn shelf(&self) -> &Arc<Shelf> {
        &self.shelf
    }

    /// Whether they can be seen in the tree.
    pub fn is_shown(&self) -> bool {
        !*self.own.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a snapshot of everything that was done before.
    ///
    /// # Errors
    /// If the disk fails, or the source cannot make it.
    pub fn create(&self, name: &str) -> std::result::Result<SnapshotInfo, SnapshotError> {
        self.live.sync().map_err(SnapshotError::Sync)?;
        self.shelf.create(name)
    }

    /// Deletes a snapshot. Files in it that somebody has open are [`VfsError::Stale`] from now on.
    ///
    /// # Errors
    /// If there is none, or the source cannot delete it.
    pub fn delete(&self, name: &str) -> std::result::Result<(), SnapshotError> {
        self.shelf.delete(name)
    }

    /// Runs a change of the entry `.snapshots` of the live root, if there is one, else fails with `instead`.
    #[cold]
    fn change_own<T>(&self, instead: VfsError, change: impl FnOnce() -> Result<T>) -> Result<T> {
        let mut own = self.own.write().unwrap_or_else(PoisonError::into_inner);
        if !*own {
            return Err(instead);
        }
        let result = change();
        // After an error of the disk it may be either; then it stays as it was known.
        *own = has_own(&*self.live).unwrap_or(*own);
        result
    }

    /// The directory of the snapshots.
    fn directory(&self) -> Attributes {
        let (count, changed) = self.shelf.summary();
        Attributes {
            ino: LIST,
            kind: FileKind::Directory,
            mode: 0o555,
            links: 2 + count as u32,
            uid: 0,
            gid: 0,
            size: count as u64,
            stored_bytes: 0,
            device: (0, 0),
            accessed: changed,
            modified: changed,
            changed,
            made: changed,
            change: changed.0 as u64,
        }
    }

    #[cold]
    fn lookup_outside(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<Attributes> {
        if name.len() > NAME_MAX {
            return Err(VfsError::NameTooLong);
        }
        match (place(dir), name) {
            (Place::Live, _) if self.is_shown() => {
                // With the live tree's word on whether the caller may look.
                self.live.lookup(who, dir, b".")?;
                Ok(self.directory())
            }
            (Place::Live, _) => self.live.lookup(who, dir, name),
            (Place::List, b".") => Ok(self.directory()),
            (Place::List, b"..") => self.live.getattr(ROOT),
            (Place::List, _) => self.shelf.root(self.shelf.find(name)?),
            (Place::In(number, inside), b"..") if inside == ROOT => {
                self.shelf.with(number, |tree| tree.lookup(who, ROOT, b".").map(drop))?;
                Ok(self.directory())
            }
            (Place::In(number, inside), _) => {
                self.shelf.with(number, |tree| tree.lookup(who, inside, name)).map(|found| number.attributes(found))
            }
            (Place::Nowhere, _) => Err(VfsError::Stale),
        }
    }

    /// What is there is there, and nothing can be made.
    #[cold]
    fn make_outside(&self, who: &Credentials, dir: Ino, name: &[u8], what: &Make) -> Result<Made> {
        let attributes = match self.lookup_outside(who, dir, name) {
            Ok(found) => found,
            Err(VfsError::NotFound) => return Err(VfsError::ReadOnly),
            Err(error) => return Err(error),
        };
        match what {
            Make::File { exclusive: false } if attributes.kind == FileKind::File => {
                let change = self.getattr(dir)?.change;
                Ok(Made { attributes, made: false, dir: DirChange { before: change, after: change } })
            }
            _ => Err(VfsError::Exists),
        }
    }

    #[cold]
    fn readdir_outside(&self, who: &Credentials, dir: Ino, cookie: u64, max: usize) -> Result<DirPage> {
        match place(dir) {
            Place::Live => self.live.readdir(who, dir, cookie, max),
            Place::List => {
                let all = self.shelf.list()?;
                let mut left = all.into_iter().filter(|(number, _)| number.cookie() > cookie);
                let entry = |(number, name): (Number, String)| DirEntry {
                    name: name.into_bytes(),
                    ino: number.ino(ROOT),
                    kind: FileKind::Directory,
                    cookie: number.cookie(),
                };
                let entries = left.by_ref().take(max).map(entry).collect();
                Ok(DirPage { entries, end: left.next().is_none() })
            }
            Place::In(number, inside) => {
                let mut page = self.shelf.with(number, |tree| tree.readdir(who, inside, cookie, max))?;
                for entry in &mut page.entries {
                    entry.ino = number.ino(entry.ino);
                }
                Ok(page)
            }
            Place::Nowhere => Err(VfsError::Stale),
        }
    }

    #[cold]
    fn getattr_outside(&self, ino: Ino) -> Result<Attributes> {
        match place(ino) {
            Place::Live => self.live.getattr(ino),
            Place::List => Ok(self.directory()),
            Place::In(number, ROOT) => self.shelf.root(number),
            Place::In(number, inside) => {
                self.shelf.with(number, |tree| tree.getattr(inside)).map(|found| number.attributes(found))
            }
            Place::Nowhere => Err(VfsError::Stale),
        }
    }

    /// Asks the tree of a snapshot about a file in it; `list` is what holds for their directory.
    #[cold]
    fn ask<T>(
        &self,
        ino: Ino,
        list: impl FnOnce() -> Result<T>,
        inside: impl FnOnce(&Filesystem, Ino) -> Result<T>,
    ) -> Result<T> {
        match place(ino) {
            Place::In(number, at) => self.shelf.with(number, |tree| inside(tree, at)),
            Place::List => list(),
            Place::Live | Place::Nowhere => Err(VfsError::Stale),
        }
    }
}

fn has_own(live: &impl Vfs) -> Result<bool> {
    match live.lookup(&Credentials::system(), ROOT, NAME) {
        Ok(_) => Ok(true),
        Err(VfsError::NotFound) => Ok(false),
        Err(error) => Err(error),
    }
}

#[inline]
fn is_live(ino: Ino) -> bool {
    place(ino) == Place::Live
}

/// Whether this is the name of the directory of the snapshots.
#[inline]
fn is_special(dir: Ino, name: &[u8]) -> bool {
    dir == ROOT && name == NAME
}

impl<L: Vfs> Vfs for SnapshotTree<L> {
    fn statfs(&self) -> Result<FsStat> {
        self.live.statfs()
    }

    fn part(&self, ino: Ino) -> Part {
        match place(ino) {
            Place::Live => Part::Live,
            Place::List => Part::SnapshotList,
            Place::In(..) | Place::Nowhere => Part::Snapshot,
        }
    }

    fn lookup(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<Attributes> {
        if is_live(dir) && !is_special(dir, name) {
            return self.live.lookup(who, dir, name);
        }
        self.lookup_outside(who, dir, name)
    }

    fn make(&self, who: &Credentials, dir: Ino, name: &[u8], what: &Make, with: &NewAttributes) -> Result<Made> {
        match place(dir) {
            Place::Live if !is_special(dir, name) => self.live.make(who, dir, name, what, with),
            Place::Live => self.change_own(VfsError::Exists, || self.live.make(who, dir, name, what, with)),
            _ => self.make_outside(who, dir, name, what),
        }
    }

    fn link(&self, who: &Credentials, ino: Ino, dir: Ino, name: &[u8]) -> Result<Linked> {
        match (place(ino), place(dir)) {
            (Place::Live, Place::Live) if !is_special(dir, name) => self.live.link(who, ino, dir, name),
            (Place::Live, Place::Live) => self.change_own(VfsError::Exists, || self.live.link(who, ino, dir, name)),
            (Place::In(a, _), Place::In(b, _)) if a == b => Err(VfsError::ReadOnly),
            (Place::Nowhere, _) | (_, Place::Nowhere) => Err(VfsError::Stale),
            _ => Err(VfsError::CrossDevice),
        }
    }

    fn unlink(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<DirChange> {
        match place(dir) {
            Place::Live if !is_special(dir, name) => self.live.unlink(who, dir, name),
            Place::Live => self.change_own(VfsError::ReadOnly, || self.live.unlink(who, dir, name)),
            _ => Err(VfsError::ReadOnly),
        }
    }

    fn rmdir(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<DirChange> {
        match place(dir) {
            Place::Live if !is_special(dir, name) => self.live.rmdir(who, dir, name),
            Place::Live => self.change_own(VfsError::ReadOnly, || self.live.rmdir(who, dir, name)),
            _ => Err(VfsError::ReadOnly),
        }
    }

    fn rename(
        &self,
        who: &Credentials,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        how: Rename,
    ) -> Result<(DirChange, DirChange)> {
        match (place(from.0), place(to.0)) {
            (Place::Live, Place::Live) => {
                let (special_from, special_to) = (is_special(from.0, from.1), is_special(to.0, to.1));
                if !special_from && !special_to {
                    return self.live.rename(who, from, to, how);
                }
                let instead = if special_to && how != Rename::Exchange { VfsError::Exists } else { VfsError::ReadOnly };
                self.change_own(instead, || self.live.rename(who, from, to, how))
            }
            (a, b) if a == Place::Nowhere || b == Place::Nowhere => Err(VfsError::Stale),
            (Place::List, Place::List) => Err(VfsError::ReadOnly),
            (Place::In(a, _), Place::In(b, _)) if a == b => Err(VfsError::ReadOnly),
            _ => Err(VfsError::CrossDevice),
        }
    }

    fn readdir(&self, who: &Credentials, dir: Ino, cookie: u64, max: usize) -> Result<DirPage> {
        if is_live(dir) {
            self.live.readdir(who, dir, cookie, max)
        } else {
            self.readdir_outside(who, dir, cookie, max)
        }
    }

    fn parent(&self, dir: Ino) -> Result<Ino> {
        match place(dir) {
            Place::Live => self.live.parent(dir),
            Place::List => Ok(ROOT),
            Place::In(number, ROOT) => self.shelf.root(number).map(|_| LIST),
            Place::In(number, inside) => {
                self.shelf.with(number, |tree| tree.parent(inside)).map(|parent| number.ino(parent))
            }
            Place::Nowhere => Err(VfsError::Stale),
        }
    }

    fn getattr(&self, ino: Ino) -> Result<Attributes> {
        if is_live(ino) { self.live.getattr(ino) } else { self.getattr_outside(ino) }
    }

    fn setattr(&self, who: &Credentials, ino: Ino, set: &SetAttributes, opened: bool) -> Result<Attributes> {
        if is_live(ino) { self.live.setattr(who, ino, set, opened) } else { Err(VfsError::ReadOnly) }
    }

    fn access(&self, who: &Credentials, ino: Ino, asked: Access) -> Result<Access> {
        if is_live(ino) {
            return self.live.access(who, ino, asked);
        }
        // Where the mode allows to write it is not forbidden here: who tries is told that nothing can be written.
        let list = || Ok(Access { write: asked.write && who.uid == 0, ..asked });
        self.ask(ino, list, |tree, at| tree.access(who, at, asked))
    }

    fn readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        if is_live(ino) {
            return self.live.readlink(ino);
        }
        self.ask(ino, || Err(VfsError::Invalid), |tree, at| tree.readlink(at))
    }

    fn getxattr(&self, who: &Credentials, ino: Ino, name: &[u8]) -> Result<Vec<u8>> {
        if is_live(ino) {
            return self.live.getxattr(who, ino, name);
        }
        self.ask(ino, || Err(VfsError::NoData), |tree, at| tree.getxattr(who, at, name))
    }

    fn listxattr(&self, who: &Credentials, ino: Ino) -> Result<Vec<Vec<u8>>> {
        if is_live(ino) {
            return self.live.listxattr(who, ino);
        }
        self.ask(ino, || Ok(Vec::new()), |tree, at| tree.listxattr(who, at))
    }

    fn setxattr(&self, who: &Credentials, ino: Ino, name: &[u8], value: &[u8], how: SetXattr) -> Result<()> {
        if is_live(ino) { self.live.setxattr(who, ino, name, value, how) } else { Err(VfsError::ReadOnly) }
    }

    fn removexattr(&self, who: &Credentials, ino: Ino, name: &[u8]) -> Result<()> {
        if is_live(ino) { self.live.removexattr(who, ino, name) } else { Err(VfsError::ReadOnly) }
    }

    /// In a snapshot every file has its names for ever, so that a hold only keeps the snapshot open.
    fn hold(&self, ino: Ino) -> Result<()> {
        if is_live(ino) {
            return self.live.hold(ino);
        }
        self.getattr_outside(ino)?;
        if let Place::In(number, _) = place(ino) {
            self.shelf.hold(number);
        }
        Ok(())
    }

    fn release(&self, ino: Ino) {
        match place(ino) {
            Place::Live => self.live.release(ino),
            Place::In(number, _) => self.shelf.release(number),
            Place::List | Place::Nowhere => {}
        }
    }

    fn end_recovery(&self) {
        self.live.end_recovery();
    }

    fn read(&self, ino: Ino, offset: u64, len: u32) -> Result<ReadData> {
        if is_live(ino) {
            return self.live.read(ino, offset, len);
        }
        self.ask(ino, || Err(VfsError::IsDirectory), |tree, at| tree.read(at, offset, len))
    }

    fn write_accepting(
        &self,
        who: &Credentials,
        ino: Ino,
        at: WriteAt,
        data: &[u8],
        accepted: &mut dyn FnMut(),
    ) -> Result<Written> {
        if !is_live(ino) {
            return Err(VfsError::ReadOnly);
        }
        self.live.write_accepting(who, ino, at, data, accepted)
    }

    fn fsync(&self, ino: Ino, data_only: bool) -> Result<()> {
        if is_live(ino) { self.live.fsync(ino, data_only) } else { Ok(()) }
    }

    fn fallocate(&self, who: &Credentials, ino: Ino, how: Fallocate, offset: u64, len: u64) -> Result<Attributes> {
        if is_live(ino) { self.live.fallocate(who, ino, how, offset, len) } else { Err(VfsError::ReadOnly) }
    }

    fn seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        if is_live(ino) {
            return self.live.seek(ino, offset, what);
        }
        self.ask(ino, || Err(VfsError::IsDirectory), |tree, at| tree.seek(at, offset, what))
    }

    fn clone_range(&self, who: &Credentials, from: (Ino, u64), to: (Ino, u64), len: u64) -> Result<u64> {
        match (place(from.0), place(to.0)) {
            (Place::Live, Place::Live) => self.live.clone_range(who, from, to, len),
            // Another volume's blocks, as far as the disk below is concerned.
            (_, Place::Live) => Err(VfsError::CrossDevice),
            _ => Err(VfsError::ReadOnly),
        }
    }

    fn lock(&self, ino: Ino, lock: &FileLock) -> Result<Option<FileLock>> {
        if is_live(ino) {
            return self.live.lock(ino, lock);
        }
        self.getattr_outside(ino)?;
        Ok(self.shelf.locks.lock(ino, lock))
    }

    fn test_lock(&self, ino: Ino, lock: &FileLock) -> Result<Option<FileLock>> {
        if is_live(ino) {
            return self.live.test_lock(ino, lock);
        }
        self.getattr_outside(ino)?;
        Ok(self.shelf.locks.test(ino, lock))
    }

    fn unlock(&self, ino: Ino, lock: &FileLock) -> Result<()> {
        if is_live(ino) {
            return self.live.unlock(ino, lock);
        }
        self.shelf.locks.unlock(ino, lock);
        Ok(())
    }

    fn unlock_all(&self, ino: Ino, owner: LockOwner) -> Result<()> {
        if is_live(ino) {
            return self.live.unlock_all(ino, owner);
        }
        self.shelf.locks.unlock_all(ino, owner);
        Ok(())
    }

    fn wait_for_unlock(&self, ino: Ino, then: Box<dyn FnOnce() + Send>) {
        if is_live(ino) {
            return self.live.wait_for_unlock(ino, then);
        }
        self.shelf.locks.wait(ino, then);
    }

    fn commit(&self) -> Result<()> {
        self.live.commit()
    }

    fn sync(&self) -> Result<()> {
        self.live.sync()
    }

    fn noting(&self, request: u64, change: &mut dyn FnMut()) {
        self.live.noting(request, change);
    }

    fn noted(&self) -> Vec<u64> {
        self.live.noted()
    }

    fn write_verifier(&self) -> [u8; 8] {
        self.live.write_verifier()
    }
}
