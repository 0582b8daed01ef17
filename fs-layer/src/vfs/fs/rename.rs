//! Renaming.

use zerocopy::little_endian::{U32, U64};

use super::noting;
use super::orphans::Fate;
use super::permission::{CHANGE, SEARCH, WRITE, check, check_name, check_sticky};
use super::write_back::Few;
use super::{Filesystem, kind_code, now};
use crate::dir::{self, Target};
use crate::inode::Inode;
use crate::layout::Content;
use crate::lock::{LockGuard, RENAME_LOCK};
use crate::vfs::{Credentials, DirChange, FileKind, Ino, LINK_MAX, ROOT, Rename, Result, VfsError};

impl Filesystem {
    pub(super) fn do_rename(
        &self,
        who: &Credentials,
        from: (Ino, &[u8]),
        to: (Ino, &[u8]),
        how: Rename,
    ) -> Result<(DirChange, DirChange)> {
        for name in [from.1, to.1] {
            if matches!(name, b"." | b"..") {
                return Err(VfsError::Invalid);
            }
            check_name(name)?;
        }
        self.write_back_before_replacing(from, to)?;
        self.begin()?;
        let same = from.0 == to.0;
        // Only under this lock a directory gets another parent: so who is above whom stays as it is.
        let rename_lock = if same { None } else { Some(self.exclusive(RENAME_LOCK)?) };
        let (above_from, above_to) =
            if same { (Vec::new(), Vec::new()) } else { (self.ancestors(from.0)?, self.ancestors(to.0)?) };
        let to_first = above_from.contains(&to.0) || !above_to.contains(&from.0) && to.0 < from.0;
        let (first, second) = if to_first { (to.0, from.0) } else { (from.0, to.0) };
        let first_guard = self.exclusive(first)?;
        let second_guard = if same { None } else { Some(self.exclusive(second)?) };

        let mut from_dir = self.load_directory(from.0)?;
        let mut to_dir = if same { None } else { Some(self.load_directory(to.0)?) };
        check(who, &from_dir, SEARCH)?;
        check(who, to_dir.as_ref().unwrap_or(&from_dir), SEARCH)?;
        let source = dir::lookup(&self.journal, &from_dir.content, from.1)?.ok_or(VfsError::NotFound)?;
        let target = {
            let to_dir = to_dir.as_ref().unwrap_or(&from_dir);
            dir::lookup(&self.journal, &to_dir.content, to.1)?
        };
        match (how, target) {
            (Rename::NoReplace, Some(_)) => return Err(VfsError::Exists),
            (Rename::Exchange, None) => return Err(VfsError::NotFound),
            _ => {}
        }
        check(who, &from_dir, CHANGE)?;
        check(who, to_dir.as_ref().unwrap_or(&from_dir), CHANGE)?;
        if to_dir.as_ref().unwrap_or(&from_dir).links.get() == 0 {
            return Err(VfsError::NotFound);
        }
        // Into itself: it would not hang on the root any more.
        if source.ino == to.0 || above_to.contains(&source.ino) {
            return Err(VfsError::Invalid);
        }
        if let Some(target) = target
            && (target.ino == from.0 || above_from.contains(&target.ino))
        {
            return Err(if how == Rename::Exchange { VfsError::Invalid } else { VfsError::NotEmpty });
        }
        let unchanged = {
            let to_change = to_dir.as_ref().unwrap_or(&from_dir).change.get();
            let from_change = from_dir.change.get();
            (DirChange { before: from_change, after: from_change }, DirChange { before: to_change, after: to_change })
        };
        if target.is_some_and(|target| target.ino == source.ino) {
            // Two names of one file: nothing happens.
            return Ok(unchanged);
        }

        let children = self.lock_children(source.ino, target.map(|target| target.ino))?;
        let mut moved = self.named(source)?;
        let mut replaced = target.map(|target| self.named(target)).transpose()?;
        check_sticky(who, &from_dir, &moved)?;
        if let Some(replaced) = &replaced {
            check_sticky(who, to_dir.as_ref().unwrap_or(&from_dir), replaced)?;
        }
        let is_dir = |inode: &Inode| inode.kind() == Some(FileKind::Directory);
        if !same && is_dir(&moved) {
            check(who, &moved, WRITE)?;
        }
        if let Some(replaced) = &replaced {
            if how == Rename::Exchange {
                if !same && is_dir(replaced) {
                    check(who, replaced, WRITE)?;
                }
            } else {
                match (is_dir(&moved), is_dir(replaced)) {
                    (true, false) => return Err(VfsError::NotDirectory),
                    (false, true) => return Err(VfsError::IsDirectory),
                    (true, true) if !dir::is_empty(&replaced.content)? => return Err(VfsError::NotEmpty),
                    _ => {}
                }
            }
        }
        // How many directories each of the two has more or fewer afterwards.
        let moved_dirs = i64::from(is_dir(&moved));
        let replaced_dirs = replaced.as_ref().map_or(0, |replaced| i64::from(is_dir(replaced)));
        let (from_links, to_links) = match how {
            Rename::Exchange => (replaced_dirs - moved_dirs, moved_dirs - replaced_dirs),
            _ => (-moved_dirs, moved_dirs - replaced_dirs),
        };
        if !same {
            let to_dir = to_dir.as_ref().unwrap_or(&from_dir);
            if i64::from(to_dir.links.get()) + to_links > i64::from(LINK_MAX)
                || i64::from(from_dir.links.get()) + from_links > i64::from(LINK_MAX)
            {
                return Err(VfsError::TooManyLinks);
            }
        }
        self.check_space(1, 0)?;

        let time = now();
        let mut tx = self.tx();
        let new = Target { ino: moved.ino, kind: source.kind };
        match (how, &replaced) {
            (Rename::Exchange, Some(replaced)) => {
                let old = Target { ino: replaced.ino, kind: target.map_or(0, |target| target.kind) };
                dir::replace(&mut tx, &mut from_dir.edit().content, from.1, old)?;
                dir::replace(&mut tx, &mut to_dir.as_mut().unwrap_or(&mut from_dir).edit().content, to.1, new)?;
            }
            (_, Some(_)) => {
                self.remove_entry(&mut tx, &mut from_dir, from.1)?;
                dir::replace(&mut tx, &mut to_dir.as_mut().unwrap_or(&mut from_dir).edit().content, to.1, new)?;
            }
            (_, None) => {
                self.remove_entry(&mut tx, &mut from_dir, from.1)?;
                self.add_entry(&mut tx, to_dir.as_mut().unwrap_or(&mut from_dir), to.1, new)?;
            }
        }
        add_links(&mut from_dir, from_links);
        add_links(to_dir.as_mut().unwrap_or(&mut from_dir), to_links);
        from_dir.edit().touch_contents(time);
        from_dir.save(&mut tx)?;
        if let Some(to_dir) = &mut to_dir {
            to_dir.edit().touch_contents(time);
            to_dir.save(&mut tx)?;
        }
        set_parent(&mut moved, to.0);
        moved.edit().touch(time);
        moved.save(&mut tx)?;
        let (mut fate, mut orphans) = (Fate::Lives, None);
        if let Some(replaced) = &mut replaced {
            if how == Rename::Exchange {
                set_parent(replaced, from.0);
                replaced.edit().touch(time);
                replaced.save(&mut tx)?;
            } else {
                (fate, orphans) = self.drop_name(&mut tx, replaced, time)?;
            }
        }
        tx.note(noting::requests());
        tx.publish()?;
        let changes = (
            DirChange { before: unchanged.0.before, after: from_dir.change.get() },
            DirChange { before: unchanged.1.before, after: to_dir.as_ref().unwrap_or(&from_dir).change.get() },
        );
        drop((orphans, children, second_guard, first_guard, rename_lock));
        if let Some(replaced) = replaced {
            self.meet_fate(replaced.ino, fate)?;
        }
        Ok(changes)
    }

    /// Who writes a new version of a file and renames it over the old one, and does not call fsync, means the new one to be whole when it is
    /// there: its data goes to the disk before the name does.
    fn write_back_before_replacing(&self, from: (Ino, &[u8]), to: (Ino, &[u8])) -> Result<()> {
        let find = |(dir, name): (Ino, &[u8])| -> Result<Option<Target>> {
            let _guard = self.shared(dir)?;
            dir::lookup(&self.journal, &self.load_directory(dir)?.content, name)
        };
        if find(to)?.is_none() {
            return Ok(());
        }
        match find(from)? {
            Some(source) if source.kind == kind_code(FileKind::File) => self.write_back(source.ino, Few::Home),
            _ => Ok(()),
        }
    }

    /// The directories above one, up to the root; under the rename lock.
    fn ancestors(&self, dir: Ino) -> Result<Vec<Ino>> {
        let mut above = Vec::new();
        let mut at = dir;
        while at != ROOT {
            let parent = {
                let _guard = self.shared(at)?;
                Ino(self.load_directory(at)?.parent.get())
            };
            if above.contains(&parent) {
                return Err(VfsError::Io(format!("directory {} is above itself; run `fsd check`", parent.0)));
            }
            above.push(parent);
            at = parent;
        }
        Ok(above)
    }

    fn lock_children(&self, source: Ino, target: Option<Ino>) -> Result<(LockGuard<'_>, Option<LockGuard<'_>>)> {
        let Some(target) = target else { return Ok((self.exclusive(source)?, None)) };
        let first = self.exclusive(source.min(target))?;
        let second = self.exclusive(source.max(target))?;
        Ok((first, Some(second)))
    }
}

fn add_links(dir: &mut Inode, links: i64) {
    let links = (i64::from(dir.links.get()) + links).max(0) as u32;
    dir.edit().links = U32::new(links);
}

fn set_parent(inode: &mut Inode, parent: Ino) {
    if inode.content_kind() == Some(Content::Directory) {
        inode.edit().parent = U64::new(parent.0);
    }
}
