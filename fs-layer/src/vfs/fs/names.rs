//! Looking up, making and removing names.

use std::ops::ControlFlow;

use zerocopy::little_endian::{U16, U32, U64};

use super::noting;
use super::orphans::Fate;
use super::permission::{CHANGE, READ, SEARCH, SET_GID, check, check_name, check_sticky};
use super::{Filesystem, kind_code, kind_of, now};
use crate::blocks::{BODY_BYTES, BlockKind, ReadBlocks, WriteBlocks};
use crate::dir::{self, Target};
use crate::disk::BLOCK_BYTES;
use crate::inode::Inode;
use crate::journal::Tx;
use crate::layout::{CONTENT_BYTES, InodeBody};
use crate::vfs::{
    Attributes, Credentials, DirChange, DirEntry, DirPage, FILE_SIZE_MAX, FileKind, Ino, LINK_MAX, Linked, Made, Make,
    NewAttributes, Result, SYMLINK_MAX, VfsError,
};

impl Filesystem {
    pub(super) fn do_lookup(&self, who: &Credentials, dir: Ino, name: &[u8]) -> Result<Attributes> {
        if name.len() > crate::vfs::NAME_MAX {
            return Err(VfsError::NameTooLong);
        }
        let guard = self.shared(dir)?;
        let parent = self.load_directory(dir)?;
        check(who, &parent, SEARCH)?;
        match name {
            b"." => return Ok(parent.attributes()),
            b".." => {
                let up = Ino(parent.parent.get());
                drop(guard);
                return self.do_getattr(up);
            }
            _ => check_name(name)?,
        }
        let target = dir::lookup(&self.journal, &parent.content, name)?.ok_or(VfsError::NotFound)?;
        let _child = self.shared(target.ino)?;
        self.named(target).map(|inode| inode.attributes())
    }

    /// The inode that an entry names; it must be there.
    pub(super) fn named(&self, target: Target) -> Result<Inode> {
        self.load(target.ino).map_err(|e| match e {
            VfsError::Stale => {
                tracing::error!(ino = target.ino.0, "a directory names an inode that is not there");
                VfsError::Io(format!("inode {} is named and not there; run `fsd check`", target.ino.0))
            }
            e => e,
        })
    }

    pub(super) fn do_make(
        &self,
        who: &Credentials,
        dir: Ino,
        name: &[u8],
        what: &Make,
        with: &NewAttributes,
    ) -> Result<Made> {
        self.begin()?;
        let _guard = self.exclusive(dir)?;
        let mut parent = self.load_directory(dir)?;
        check(who, &parent, SEARCH)?;
        if matches!(name, b"." | b"..") {
            return Err(VfsError::Exists);
        }
        check_name(name)?;
        let before = parent.change.get();
        if let Some(target) = dir::lookup(&self.journal, &parent.content, name)? {
            if !matches!(what, Make::File { exclusive: false }) {
                return Err(VfsError::Exists);
            }
            let _child = self.shared(target.ino)?;
            let found = self.named(target)?;
            return match found.kind() {
                Some(FileKind::File) => {
                    let dir = DirChange { before, after: before };
                    Ok(Made { attributes: found.attributes(), made: false, dir })
                }
                Some(FileKind::Directory) => Err(VfsError::IsDirectory),
                Some(FileKind::Symlink) => Err(VfsError::Symlink),
                _ => Err(VfsError::Exists),
            };
        }
        check(who, &parent, CHANGE)?;
        if parent.links.get() == 0 {
            return Err(VfsError::NotFound);
        }
        self.check_space(1, 1)?;
        let kind = match what {
            Make::File { .. } => FileKind::File,
            Make::Directory => FileKind::Directory,
            Make::Symlink(_) => FileKind::Symlink,
            Make::Special { kind, .. } => *kind,
        };
        if kind == FileKind::Directory && parent.links.get() >= LINK_MAX {
            return Err(VfsError::TooManyLinks);
        }
        if matches!(kind, FileKind::CharDevice | FileKind::BlockDevice) && who.uid != 0 {
            return Err(VfsError::NotPermitted);
        }

        let time = now();
        let ino = self.allocator.ino()?;
        let mut inode = Inode::new(&self.journal, ino)?;
        begin_inode(inode.edit(), ino, kind, who, &parent, with, time)?;
        let mut tx = self.tx();
        match what {
            Make::File { .. } => {
                let size = with.size.unwrap_or(0);
                if size > FILE_SIZE_MAX {
                    return Err(VfsError::TooLarge);
                }
                inode.edit().size = U64::new(size);
            }
            Make::Directory => {
                let body = inode.edit();
                body.links = U32::new(2);
                body.parent = U64::new(dir.0);
                dir::init(&mut body.content, rand::random());
                let links = parent.links.get() + 1;
                parent.edit().links = U32::new(links);
            }
            Make::Symlink(target) => put_target(&mut tx, &mut inode, target)?,
            Make::Special { device, .. } => {
                if !matches!(kind, FileKind::Fifo | FileKind::Socket | FileKind::CharDevice | FileKind::BlockDevice) {
                    return Err(VfsError::Invalid);
                }
                let body = inode.edit();
                (body.major, body.minor) = (U32::new(device.0), U32::new(device.1));
            }
        }
        inode.save(&mut tx)?;
        tx.count_files(1);
        self.add_entry(&mut tx, &mut parent, name, Target { ino, kind: kind_code(kind) })?;
        parent.edit().touch_contents(time);
        parent.save(&mut tx)?;
        tx.note(noting::requests());
        tx.publish()?;
        let dir = DirChange { before, after: parent.change.get() };
        Ok(Made { attributes: inode.attributes(), made: true, dir })
    }

    /// Adds an entry, and counts the blocks it took.
    pub(super) fn add_entry(&self, tx: &mut Tx<'_>, parent: &mut Inode, name: &[u8], target: Target) -> Result<()> {
        let before = dir::block_count(&parent.content)?;
        dir::insert(tx, &mut parent.edit().content, name, target)?;
        count_stored(parent, before)
    }

    /// Removes an entry, and counts the blocks it gave back.
    pub(super) fn remove_entry(&self, tx: &mut Tx<'_>, parent: &mut Inode, name: &[u8]) -> Result<()> {
        let before = dir::block_count(&parent.content)?;
        dir::remove(tx, &mut parent.edit().content, name)?;
        count_stored(parent, before)
    }

    pub(super) fn do_link(&self, who: &Credentials, ino: Ino, dir: Ino, name: &[u8]) -> Result<Linked> {
        self.begin()?;
        if ino == dir {
            return Err(VfsError::NotPermitted);
        }
        let _guard = self.exclusive(dir)?;
        let mut parent = self.load_directory(dir)?;
        check(who, &parent, SEARCH)?;
        if matches!(name, b"." | b"..") {
            return Err(VfsError::Exists);
        }
        check_name(name)?;
        // Whether it is a directory is looked at without its lock, which comes before the parent's there: a kind never changes.
        if self.load(ino)?.kind() == Some(FileKind::Directory) {
            return Err(VfsError::NotPermitted);
        }
        let _child = self.exclusive(ino)?;
        let mut inode = self.load(ino)?;
        if dir::lookup(&self.journal, &parent.content, name)?.is_some() {
            return Err(VfsError::Exists);
        }
        check(who, &parent, CHANGE)?;
        if parent.links.get() == 0 || inode.links.get() == 0 {
            return Err(VfsError::NotFound);
        }
        if inode.links.get() >= LINK_MAX {
            return Err(VfsError::TooManyLinks);
        }
        self.check_space(1, 0)?;
        let (time, before) = (now(), parent.change.get());
        let kind = inode.kind().ok_or(VfsError::Stale)?;
        let mut tx = self.tx();
        self.add_entry(&mut tx, &mut parent, name, Target { ino, kind: kind_code(kind) })?;
        parent.edit().touch_contents(time);
        parent.save(&mut tx)?;
        let links = inode.links.get() + 1;
        let body = inode.edit();
        body.links = U32::new(links);
        body.touch(time);
        inode.save(&mut tx)?;
        tx.note(noting::requests());
        tx.publish()?;
        let dir = DirChange { before, after: parent.change.get() };
        Ok(Linked { attributes: inode.attributes(), dir })
    }

    /// `unlink` and `rmdir`.
    pub(super) fn do_remove(&self, who: &Credentials, dir: Ino, name: &[u8], directory: bool) -> Result<DirChange> {
        self.begin()?;
        let guard = self.exclusive(dir)?;
        let mut parent = self.load_directory(dir)?;
        check(who, &parent, SEARCH)?;
        match name {
            b"." => return Err(if directory { VfsError::Invalid } else { VfsError::IsDirectory }),
            b".." => return Err(if directory { VfsError::NotEmpty } else { VfsError::IsDirectory }),
            _ => check_name(name)?,
        }
        let target = dir::lookup(&self.journal, &parent.content, name)?.ok_or(VfsError::NotFound)?;
        let child = self.exclusive(target.ino)?;
        let mut inode = self.named(target)?;
        check(who, &parent, CHANGE)?;
        check_sticky(who, &parent, &inode)?;
        match (inode.kind() == Some(FileKind::Directory), directory) {
            (true, false) => return Err(VfsError::IsDirectory),
            (false, true) => return Err(VfsError::NotDirectory),
            (true, true) if !dir::is_empty(&inode.content)? => return Err(VfsError::NotEmpty),
            _ => {}
        }
        let (time, before) = (now(), parent.change.get());
        let mut tx = self.tx();
        self.remove_entry(&mut tx, &mut parent, name)?;
        let body = parent.edit();
        body.touch_contents(time);
        if directory {
            body.links = U32::new(body.links.get().saturating_sub(1));
        }
        parent.save(&mut tx)?;
        let (fate, orphans) = self.drop_name(&mut tx, &mut inode, time)?;
        tx.note(noting::requests());
        tx.publish()?;
        let after = parent.change.get();
        drop((orphans, child, guard));
        self.meet_fate(target.ino, fate)?;
        Ok(DirChange { before, after })
    }

    pub(super) fn do_readdir(&self, who: &Credentials, dir: Ino, cookie: u64, max: usize) -> Result<DirPage> {
        let guard = self.shared(dir)?;
        let inode = self.load_directory(dir)?;
        if *who != Credentials::system() {
            check(who, &inode, READ)?;
        }
        let (mut entries, mut odd) = (Vec::new(), None);
        let end = dir::list(&self.journal, &inode.content, cookie, |entry| {
            if entries.len() >= max {
                return ControlFlow::Break(());
            }
            match kind_of(entry.target.kind) {
                Ok(kind) => {
                    let name = entry.name.to_vec();
                    entries.push(DirEntry { name, ino: entry.target.ino, kind, cookie: entry.key });
                }
                Err(e) => odd = Some(e),
            }
            ControlFlow::Continue(())
        })?;
        if let Some(e) = odd {
            return Err(e);
        }
        drop(guard);
        self.journal.listed(entries.iter().map(|entry| entry.ino), dir::count(&inode.content)?);
        self.note_read(&inode);
        Ok(DirPage { entries, end })
    }

    pub(super) fn do_parent(&self, dir: Ino) -> Result<Ino> {
        let _guard = self.shared(dir)?;
        Ok(Ino(self.load_directory(dir)?.parent.get()))
    }

    pub(super) fn do_readlink(&self, ino: Ino) -> Result<Vec<u8>> {
        let guard = self.shared(ino)?;
        let inode = self.load(ino)?;
        if inode.kind() != Some(FileKind::Symlink) {
            return Err(VfsError::Invalid);
        }
        let mut target = inode.inline().to_vec();
        if inode.more_block.get() != 0 {
            let more = self.journal.read(inode.more_block.get(), BlockKind::Symlink)?;
            let len = (inode.size.get() as usize).saturating_sub(target.len()).min(BODY_BYTES);
            target.extend_from_slice(&more[..len]);
        }
        drop(guard);
        self.note_read(&inode);
        Ok(target)
    }

    /// What becomes of a file that lost a name. To be published with the rest; the returned lock is held until then.
    pub(super) fn drop_name<'a>(
        &'a self,
        tx: &mut Tx<'_>,
        inode: &mut Inode,
        time: crate::vfs::Time,
    ) -> Result<(Fate, Option<crate::lock::LockGuard<'a>>)> {
        let directory = inode.kind() == Some(FileKind::Directory);
        let body = inode.edit();
        body.links = U32::new(if directory { 0 } else { body.links.get().saturating_sub(1) });
        body.touch(time);
        if inode.links.get() > 0 {
            inode.save(tx)?;
            return Ok((Fate::Lives, None));
        }
        self.bury(tx, inode)
    }
}

/// Counts the blocks that a directory's tree took or gave back since it had `before`.
fn count_stored(dir: &mut Inode, before: u64) -> Result<()> {
    let blocks = dir::block_count(&dir.content)?;
    let body = dir.edit();
    body.stored_blocks = U64::new((body.stored_blocks.get() + blocks).saturating_sub(before));
    body.size = U64::new((blocks + 1) * BLOCK_BYTES as u64);
    Ok(())
}

fn begin_inode(
    body: &mut InodeBody,
    ino: Ino,
    kind: FileKind,
    who: &Credentials,
    parent: &InodeBody,
    with: &NewAttributes,
    time: crate::vfs::Time,
) -> Result<()> {
    body.begin(ino, kind, time);
    let inherits = parent.mode.get() & SET_GID != 0;
    let (uid, mut gid) = (with.uid.unwrap_or(who.uid), if inherits { parent.gid.get() } else { who.gid });
    if uid != who.uid && who.uid != 0 {
        return Err(VfsError::NotPermitted);
    }
    if let Some(asked) = with.gid {
        if who.uid != 0 && asked != gid && !who.in_group(asked) {
            return Err(VfsError::NotPermitted);
        }
        gid = asked;
    }
    let mut mode = with.mode & 0o7777;
    if kind == FileKind::Directory {
        mode |= if inherits { SET_GID } else { 0 };
        body.size = U64::new(BLOCK_BYTES as u64);
    } else if mode & SET_GID != 0 && mode & 0o010 != 0 && who.uid != 0 && !who.in_group(gid) {
        mode &= !SET_GID;
    }
    if kind == FileKind::Symlink {
        mode = 0o777;
    }
    body.mode = U32::new(mode);
    body.uid = U32::new(uid);
    body.gid = U32::new(gid);
    body.links = U32::new(1);
    if let Some(time) = with.accessed {
        body.accessed = time.into();
    }
    if let Some(time) = with.modified {
        body.modified = time.into();
    }
    Ok(())
}

/// Stores a symlink's target: in the inode, and what is longer in a block.
fn put_target(tx: &mut Tx<'_>, inode: &mut Inode, target: &[u8]) -> Result<()> {
    if target.is_empty() || target.contains(&0) {
        return Err(VfsError::Invalid);
    }
    if target.len() > SYMLINK_MAX {
        return Err(VfsError::NameTooLong);
    }
    let (here, more) = target.split_at(target.len().min(CONTENT_BYTES));
    let body = inode.edit();
    body.content[..here.len()].copy_from_slice(here);
    body.content_len = U16::new(here.len() as u16);
    body.size = U64::new(target.len() as u64);
    if !more.is_empty() {
        let at = tx.make(BlockKind::Symlink)?;
        tx.modify(at, BlockKind::Symlink)?[..more.len()].copy_from_slice(more);
        let body = inode.edit();
        body.more_block = U64::new(at);
        body.stored_blocks = U64::new(1);
    }
    Ok(())
}
