//! Files without names: freed at once, or listed in the orphan directory of this host until nobody holds them.

use std::ops::ControlFlow;
use std::sync::atomic::Ordering;

use super::{Filesystem, SLOT, lock};
use crate::blocks::WriteBlocks;
use crate::dir::{self, Target};
use crate::extent;
use crate::inode::{Inode, free_xattrs};
use crate::journal::Tx;
use crate::layout::{Content, INO_ORPHANS, flags};
use crate::lock::LockGuard;
use crate::vfs::{Ino, Result, VfsError};

const ORPHANS: Ino = Ino(INO_ORPHANS + SLOT);

/// What became of a file that lost a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It has others, or somebody holds it.
    Lives,
    /// It is gone with the same transaction.
    Freed,
    /// It is an orphan, and is to be freed in transactions of its own.
    Dying,
}

impl Filesystem {
    /// How many extents one transaction removes at most.
    pub(super) fn extents_per_tx(&self) -> usize {
        (self.geometry.journal_blocks / 16).clamp(16, 1024) as usize
    }

    /// Puts a file without names into a transaction: freed, or as an orphan. The returned lock is to be held until that is published.
    pub(super) fn bury<'a>(&'a self, tx: &mut Tx<'_>, inode: &mut Inode) -> Result<(Fate, Option<LockGuard<'a>>)> {
        if self.is_held(inode.ino) {
            let guard = self.add_orphan(tx, inode)?;
            inode.save(tx)?;
            return Ok((Fate::Lives, Some(guard)));
        }
        let long = inode.content_kind() == Some(Content::Extents)
            && extent::counts(&inode.content)?.extents > self.extents_per_tx() as u64;
        if long {
            let guard = self.add_orphan(tx, inode)?;
            inode.save(tx)?;
            return Ok((Fate::Dying, Some(guard)));
        }
        let guard = self.free(tx, inode)?;
        Ok((Fate::Freed, guard))
    }

    /// Frees a file with all its blocks, of which there are few.
    fn free<'a>(&'a self, tx: &mut Tx<'_>, inode: &mut Inode) -> Result<Option<LockGuard<'a>>> {
        if inode.content_kind() == Some(Content::Extents) {
            self.remove_extents(tx, inode, 0, usize::MAX)?;
        }
        free_xattrs(tx, inode)?;
        if inode.more_block.get() != 0 {
            tx.free(inode.more_block.get())?;
        }
        let guard = if inode.has(flags::ORPHAN) { Some(self.remove_orphan(tx, inode)?) } else { None };
        tx.free_inode(inode.address());
        Ok(guard)
    }

    /// Lists a file among the orphans.
    pub(super) fn add_orphan<'a>(&'a self, tx: &mut Tx<'_>, inode: &mut Inode) -> Result<LockGuard<'a>> {
        let guard = self.exclusive(ORPHANS)?;
        if !inode.has(flags::ORPHAN) {
            let mut orphans = Inode::load(&self.journal, ORPHANS)?;
            self.add_entry(tx, &mut orphans, &name(inode.ino), Target { ino: inode.ino, kind: 0 })?;
            orphans.save(tx)?;
            inode.edit().set_flag(flags::ORPHAN, true);
        }
        Ok(guard)
    }

    /// Takes a file off the list.
    pub(super) fn remove_orphan<'a>(&'a self, tx: &mut Tx<'_>, inode: &mut Inode) -> Result<LockGuard<'a>> {
        let guard = self.exclusive(ORPHANS)?;
        let mut orphans = Inode::load(&self.journal, ORPHANS)?;
        self.remove_entry(tx, &mut orphans, &name(inode.ino))?;
        orphans.save(tx)?;
        inode.edit().set_flag(flags::ORPHAN, false);
        Ok(guard)
    }

    /// Does what is left to do for a file that lost a name; no locks are held.
    pub(super) fn meet_fate(&self, ino: Ino, fate: Fate) -> Result<()> {
        match fate {
            Fate::Lives => Ok(()),
            Fate::Freed => {
                self.forget(ino);
                Ok(())
            }
            Fate::Dying => self.reap(ino),
        }
    }

    fn forget(&self, ino: Ino) {
        self.pages.forget_file(ino);
        self.file_locks.forget(ino);
    }

    /// Frees an orphan that nobody holds, or finishes cutting it.
    pub(super) fn reap(&self, ino: Ino) -> Result<()> {
        loop {
            self.begin()?;
            let guard = self.exclusive(ino)?;
            let mut inode = match Inode::load(&self.journal, ino) {
                Err(VfsError::Stale) => return Ok(()),
                inode => inode?,
            };
            if !inode.has(flags::ORPHAN) {
                return Ok(());
            }
            let lives = inode.links.get() > 0;
            if !lives && self.is_held(ino) {
                return Ok(());
            }
            let from = if lives { inode.size.get().div_ceil(crate::disk::BLOCK_BYTES as u64) } else { 0 };
            let mut tx = self.tx();
            let more = inode.content_kind() == Some(Content::Extents)
                && !self.remove_extents(&mut tx, &mut inode, from, self.extents_per_tx())?;
            if more {
                inode.save(&mut tx)?;
                tx.publish()?;
                continue;
            }
            let orphans;
            if lives {
                inode.edit().set_flag(flags::CUTTING, false);
                orphans = Some(self.remove_orphan(&mut tx, &mut inode)?);
                inode.save(&mut tx)?;
            } else {
                orphans = self.free(&mut tx, &mut inode)?;
            }
            tx.publish()?;
            drop((orphans, guard));
            if !lives {
                self.forget(ino);
            }
            return Ok(());
        }
    }

    /// Frees what was left to be freed when the filesystem was last open; files without names that nobody holds only if `nameless`.
    pub(super) fn reap_orphans(&self, nameless: bool) -> Result<()> {
        let mut found = Vec::new();
        {
            let _guard = self.shared(ORPHANS)?;
            let orphans = Inode::load(&self.journal, ORPHANS)?;
            dir::list(&self.journal, &orphans.content, 0, |entry| {
                found.push(entry.target.ino);
                ControlFlow::Continue(())
            })?;
        }
        for ino in found {
            if let Err(e) = self.reap_left(ino, nameless) {
                // The space is lost until it is repaired; the rest goes on.
                tracing::error!(ino = ino.0, "an orphan could not be freed: {e}");
            }
        }
        Ok(())
    }

    fn reap_left(&self, ino: Ino, nameless: bool) -> Result<()> {
        if !nameless {
            let _guard = self.shared(ino)?;
            if Inode::load(&self.journal, ino)?.links.get() == 0 {
                return Ok(());
            }
        }
        self.reap(ino)
    }

    /// From now on what nobody holds is freed. In this order, so that a hold either comes before, and keeps its file, or is refused: both happen
    /// under the file's lock.
    pub(super) fn do_end_recovery(&self) -> Result<()> {
        if self.recovering.swap(false, Ordering::SeqCst) { self.reap_orphans(true) } else { Ok(()) }
    }

    pub(super) fn do_hold(&self, ino: Ino) -> Result<()> {
        let _guard = self.shared(ino)?;
        let inode = self.load(ino)?;
        let mut held = lock(&self.held);
        let count = held.entry(ino).or_insert(0);
        let recovering = self.recovering.load(Ordering::SeqCst) && inode.has(flags::ORPHAN);
        if inode.links.get() == 0 && *count == 0 && !recovering {
            held.remove(&ino);
            return Err(VfsError::Stale);
        }
        *count += 1;
        Ok(())
    }

    pub(super) fn do_release(&self, ino: Ino) -> Result<()> {
        {
            let mut held = lock(&self.held);
            let Some(count) = held.get_mut(&ino) else { return Ok(()) };
            *count -= 1;
            if *count > 0 {
                return Ok(());
            }
            held.remove(&ino);
        }
        if self.options.read_only {
            return Ok(());
        }
        let nameless = {
            let _guard = self.shared(ino)?;
            match Inode::load(&self.journal, ino) {
                Ok(inode) => inode.links.get() == 0,
                Err(VfsError::Stale) => false,
                Err(e) => return Err(e),
            }
        };
        if nameless { self.reap(ino) } else { Ok(()) }
    }
}

/// The name of an orphan in the orphan directory.
fn name(ino: Ino) -> Vec<u8> {
    format!("{:x}", ino.0).into_bytes()
}
