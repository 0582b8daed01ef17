//! Attributes: reading and changing them, and what reading a file does to them.

use zerocopy::little_endian::U32;

use super::permission::{SET_GID, WRITE, allowed, check, is_owner, without_set_ids};
use super::{Filesystem, now};
use crate::inode::Inode;
use crate::layout::InodeBody;
use crate::vfs::{Access, Attributes, Credentials, FileKind, Ino, Result, SetAttributes, SetTime, Time, VfsError};

/// After so long, reading a file changes its access time whatever it is.
const ACCESSED_AFTER_NS: i128 = 24 * 3600 * 1_000_000_000;

impl Filesystem {
    pub(super) fn do_getattr(&self, ino: Ino) -> Result<Attributes> {
        let _guard = self.shared(ino)?;
        Ok(self.load(ino)?.attributes())
    }

    pub(super) fn do_access(&self, who: &Credentials, ino: Ino, asked: Access) -> Result<Access> {
        let _guard = self.shared(ino)?;
        let may = allowed(who, &*self.load(ino)?);
        Ok(Access {
            read: asked.read && may.read,
            write: asked.write && may.write,
            execute: asked.execute && may.execute,
        })
    }

    pub(super) fn do_setattr(
        &self,
        who: &Credentials,
        ino: Ino,
        set: &SetAttributes,
        opened: bool,
    ) -> Result<Attributes> {
        self.begin()?;
        let guard = self.exclusive(ino)?;
        let mut inode = self.load(ino)?;
        may_set(who, &inode, set, opened)?;
        let time = now();
        let mut tx = self.tx();
        let (mut orphans, mut more) = (None, false);
        if let Some(size) = set.size {
            if size > inode.size.get() {
                self.check_space(1, 0)?;
            }
            (orphans, more) = self.set_size(&mut tx, &mut inode, size)?;
            let body = inode.edit();
            body.modified = time.into();
            if who.uid != 0 && set.mode.is_none() {
                body.mode = U32::new(without_set_ids(body));
            }
        }
        apply(who, inode.edit(), set, time);
        let owner = (set.uid.is_some() || set.gid.is_some()) && inode.kind() != Some(FileKind::Directory);
        if owner || set.size.is_some() {
            self.drop_capabilities(&mut tx, &mut inode)?;
        }
        inode.save(&mut tx)?;
        tx.publish()?;
        drop((orphans, guard));
        if more {
            self.reap(ino)?;
        }
        Ok(inode.attributes())
    }

    /// Notes that a file was read, as relatime does; its lock is not held. A failure of that is not the reader's.
    pub(super) fn note_read(&self, seen: &Inode) {
        if self.options.read_only || !self.options.access_times {
            return;
        }
        let stale = |body: &InodeBody, time: Time| {
            let accessed = Time::from(body.accessed);
            accessed <= body.modified.into()
                || accessed <= body.changed.into()
                || time.0 - accessed.0 > ACCESSED_AFTER_NS
        };
        let time = now();
        if !stale(seen, time) {
            return;
        }
        let noted = || -> Result<()> {
            self.begin()?;
            let _guard = self.exclusive(seen.ino)?;
            let mut inode = self.load(seen.ino)?;
            if stale(&inode, time) {
                inode.edit().accessed = time.into();
                let mut tx = self.tx();
                inode.save(&mut tx)?;
                tx.publish()?;
            }
            Ok(())
        };
        if let Err(e) = noted() {
            tracing::debug!(ino = seen.ino.0, "the access time could not be noted: {e}");
        }
    }
}

/// The rules of chmod, chown, truncate and utimensat.
fn may_set(who: &Credentials, inode: &Inode, set: &SetAttributes, opened: bool) -> Result<()> {
    let owner = is_owner(who, inode);
    if set.mode.is_some() && !owner {
        return Err(VfsError::NotPermitted);
    }
    if let Some(uid) = set.uid
        && who.uid != 0
        && !(owner && uid == inode.uid.get())
    {
        return Err(VfsError::NotPermitted);
    }
    if let Some(gid) = set.gid
        && who.uid != 0
        && !(owner && (gid == inode.gid.get() || who.in_group(gid)))
    {
        return Err(VfsError::NotPermitted);
    }
    if set.size.is_some() {
        match inode.kind() {
            Some(FileKind::File) => {}
            Some(FileKind::Directory) => return Err(VfsError::IsDirectory),
            _ => return Err(VfsError::Invalid),
        }
        if !opened {
            check(who, inode, WRITE)?;
        }
    }
    for time in [set.accessed, set.modified].into_iter().flatten() {
        match time {
            SetTime::At(_) if !owner => return Err(VfsError::NotPermitted),
            SetTime::Now if !owner && !opened => check(who, inode, WRITE)?,
            _ => {}
        }
    }
    Ok(())
}

fn apply(who: &Credentials, body: &mut InodeBody, set: &SetAttributes, time: Time) {
    let changes_owner = set.uid.is_some() || set.gid.is_some();
    if changes_owner && body.kind() != Some(FileKind::Directory) {
        body.mode = U32::new(without_set_ids(body));
    }
    if let Some(uid) = set.uid {
        body.uid = U32::new(uid);
    }
    if let Some(gid) = set.gid {
        body.gid = U32::new(gid);
    }
    if let Some(mode) = set.mode {
        let foreign = who.uid != 0 && !who.in_group(body.gid.get());
        body.mode = U32::new(mode & 0o7777 & if foreign { !SET_GID } else { !0 });
    }
    let at = |set: SetTime| match set {
        SetTime::Now => time,
        SetTime::At(time) => time,
    };
    if let Some(accessed) = set.accessed {
        body.accessed = at(accessed).into();
    }
    if let Some(modified) = set.modified {
        body.modified = at(modified).into();
    }
    if *set != SetAttributes::default() {
        body.touch(time);
    }
}
