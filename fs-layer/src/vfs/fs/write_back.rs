//! Bringing dirty pages to the disk.
//!
//! Data is written to its addresses first, and then the map that points to them is published: one flush covers both, and a map that survives
//! alone points to zeros, since the addresses were never used. One case needs a flush of its own: what a file had in its inode
//! may have been durable, so its block must be before the inode lets go of it.
//!
//! Much data is written without the file's lock, so that the writer can go on: first, with the lock, blocks that have no address get one, mapped as
//! unwritten; then the data is written; then, with the lock again, the map says so of every page that is still what was written.
//! Whatever takes addresses away from a file, or writes its blocks otherwise, waits for such a write first
//! ([`PageCache::wait_written`](crate::file::PageCache::wait_written)), and of those there is one at a time for each file.
//!
//! Where somebody waits for few pages, they go to the journal, as one transaction with the map. So do those whose addresses the journal
//! holds contents of already ([`Journal::held`](crate::journal::Journal::held)), however they are written back.
//!
//! What is written in order is written back by a thread in the background as soon as there is enough of it.

use zerocopy::little_endian::{U16, U64};

use super::Filesystem;
use super::truncate::data_error;
use crate::disk::{BLOCK_BYTES, BlockAddress};
use crate::extent::{self, Mapping};
use crate::file::{Page, Writing};
use crate::inode::Inode;
use crate::journal::Tx;
use crate::layout::Content;
use crate::lock::{LockGuard, LockMode};
use crate::vfs::{Ino, Result, VfsError};

/// Fewer pages than this are written with the lock held.
const APART_MIN: usize = 16;
/// The background leaves so many dirty pages of a file that is being written, so that it does not write the last one again and again.
const LEFT_MAX: usize = 256;

/// So few pages of a file are worth being in the journal when somebody waits for them.
const JOURNALED_MAX: usize = 4;

/// Where few dirty pages of a file go.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Few {
    /// To the journal first: somebody waits for them.
    ToJournal,
    /// To their addresses.
    Home,
}

/// Pages that were given their places on the disk.
struct Placed {
    runs: Vec<(BlockAddress, Vec<(u64, Page)>)>,
    /// How many of them had none before.
    new: usize,
    /// Where to go on.
    next: u64,
    writing: Writing,
}

enum Step {
    /// These are to be written.
    Write(Placed),
    /// Nothing is, or it was done; where to go on.
    Done(u64),
}

impl Filesystem {
    /// Pages that one transaction gives addresses to at most.
    fn pages_per_tx(&self) -> usize {
        (self.geometry.journal_blocks / 8).clamp(64, 4096) as usize
    }

    /// Blocks whose contents one transaction holds at most.
    fn contents_per_tx(&self) -> usize {
        (self.geometry.journal_blocks / 16).clamp(JOURNALED_MAX as u64, 1024) as usize
    }

    /// Writes all dirty pages of a file to the disk; no locks are held.
    pub(super) fn write_back(&self, ino: Ino, few: Few) -> Result<()> {
        let mut from = 0;
        while let Some(next) = self.pages.next_dirty(ino, from) {
            from = self.write_back_step(ino, next, few)?;
        }
        Ok(())
    }

    /// The same, by the background, of a file that is being written.
    pub(super) fn write_back_most(&self, ino: Ino) -> Result<()> {
        let mut from = 0;
        while self.pages.dirty_of(ino) > LEFT_MAX
            && let Some(next) = self.pages.next_dirty(ino, from)
        {
            from = self.write_back_step(ino, next, Few::Home)?;
        }
        Ok(())
    }

    /// Writes dirty pages from a block on; returns where to go on.
    fn write_back_step(&self, ino: Ino, from: u64, few: Few) -> Result<u64> {
        let _alone = LockGuard::new(&self.write_backs, ino, LockMode::Exclusive)?;
        // Whoever had the lock before may have written all of it.
        let Some(from) = self.pages.next_dirty(ino, from) else { return Ok(u64::MAX) };
        self.begin()?;
        let step = {
            let _guard = self.exclusive(ino)?;
            let mut inode = match Inode::load(&self.journal, ino) {
                Err(VfsError::Stale) => return Ok(u64::MAX),
                inode => inode?,
            };
            self.place(&mut inode, from, few)?
        };
        match step {
            Step::Done(next) => Ok(next),
            Step::Write(placed) => self.write_placed(ino, placed),
        }
    }

    /// Gives places to dirty pages from a block on; or writes them at once if they are few, or partly in the inode. The lock is held exclusively.
    fn place(&self, inode: &mut Inode, from: u64, few: Few) -> Result<Step> {
        let ino = inode.ino;
        let dirty = match inode.content_kind() {
            Some(Content::Extents) => self.pages.dirty(ino, from, self.pages_per_tx()),
            _ => Vec::new(),
        };
        if dirty.len() < APART_MIN {
            return self.write_back_some(inode, from, few, false).map(Step::Done);
        }
        self.pages.wait_written(ino);
        let next = dirty.last().map_or(u64::MAX, |(last, _)| last + 1);
        let size_blocks = inode.size.get().div_ceil(BLOCK_BYTES as u64);
        let before = extent::counts(&inode.content)?;
        let mut tx = self.tx();
        let mut placed = Placed { runs: Vec::new(), new: 0, next, writing: self.pages.begin_writing(ino) };
        let (mut index, mut changed, mut journaled) = (0, false, Vec::new());
        while let Some((block, _)) = dirty.get(index) {
            let block = *block;
            if tx.contents() >= self.contents_per_tx() {
                placed.next = block;
                break;
            }
            let wanted = follow(&dirty[index..]);
            let (at, count) = match extent::get(&tx, &inode.content, block)? {
                Mapping::Extent(extent) => (extent.address_of(block), (extent.end() - block).min(wanted as u64)),
                Mapping::Hole { .. } => {
                    let content = &mut inode.edit().content;
                    let ask = |tx: &mut Tx<'_>, count| tx.allocate(count);
                    let extent = extent::allocate(&mut tx, content, block, wanted as u32, true, size_blocks, ask)?;
                    changed = true;
                    let count = (extent.end() - block).min(wanted as u64);
                    placed.new += count as usize;
                    (extent.address_of(block), count)
                }
            };
            let pages = &dirty[index..index + count as usize];
            index += self.send(&mut tx, at, pages, false, &mut journaled, |at, page| {
                append(&mut placed.runs, at, [page.clone()]);
            });
        }
        if changed || !journaled.is_empty() {
            self.count_extents(&mut tx, inode, before)?;
            inode.save(&mut tx)?;
            tx.publish()?;
            self.pages.clean(ino, journaled.into_iter(), 0);
        }
        self.pages.placed(placed.new);
        Ok(Step::Write(placed))
    }

    /// Gives pages, which follow each other from an address on, to the transaction: `all` of them, or those that must go to the journal; and the others to
    /// `home`. Returns how many until the transaction is full; `journaled` are the blocks of those it has.
    fn send<'p>(
        &self,
        tx: &mut Tx<'_>,
        at: BlockAddress,
        pages: &'p [(u64, Page)],
        all: bool,
        journaled: &mut Vec<u64>,
        mut home: impl FnMut(BlockAddress, &'p (u64, Page)),
    ) -> usize {
        let held = self.journal.held(at, pages.len() as u64);
        for (index, (at, page)) in (at..).zip(pages).enumerate() {
            if !all && held.binary_search(&at).is_err() {
                home(at, page);
                continue;
            }
            if tx.contents() >= self.contents_per_tx() {
                return index;
            }
            tx.put_contents(at, page.1.clone());
            journaled.push(page.0);
        }
        pages.len()
    }

    /// Writes pages to their places, and notes it. The lock is not held.
    fn write_placed(&self, ino: Ino, placed: Placed) -> Result<u64> {
        let Placed { runs, new, next, writing } = placed;
        let parts: Vec<(BlockAddress, Vec<&[u8]>)> =
            runs.iter().map(|(at, pages)| (*at, pages.iter().map(|(_, page)| &page[..]).collect())).collect();
        let written = self.journal.disk().write_parts(&parts);
        drop(parts);
        drop(writing);
        let noted = written.map_err(|e| {
            tracing::error!(ino = ino.0, error = %e, "data of a file can't be written");
            VfsError::Io(format!("data of inode {}: {e}", ino.0))
        });
        let noted = noted.and_then(|()| self.note_written(ino, &runs));
        self.pages.unplaced(new);
        // The last first: who takes memory takes what was let go of last, so what is written next lies in order, and goes to the disk in long
        // pieces.
        for (_, mut pages) in runs.into_iter().rev() {
            while pages.pop().is_some() {}
        }
        noted.map(|()| next)
    }

    /// Lets the map say that pages are on the disk, as far as they are still what was written, where it was written.
    fn note_written(&self, ino: Ino, runs: &[(BlockAddress, Vec<(u64, Page)>)]) -> Result<()> {
        let ticket = self.journal.ticket();
        self.begin()?;
        let _guard = self.exclusive(ino)?;
        let mut inode = match Inode::load(&self.journal, ino) {
            Err(VfsError::Stale) => return Ok(()),
            inode => inode?,
        };
        if inode.content_kind() != Some(Content::Extents) {
            return Ok(());
        }
        let before = extent::counts(&inode.content)?;
        let mut tx = self.tx();
        let (mut changed, mut clean) = (false, Vec::new());
        for (at, pages) in runs {
            let mut index = 0;
            while index < pages.len() {
                let same = follow(&pages[index..]).min(self.pages.unchanged(ino, &pages[index..]));
                let block = pages[index].0;
                let Mapping::Extent(extent) = extent::get(&tx, &inode.content, block)? else {
                    index += 1;
                    continue;
                };
                let count = same.min((extent.end() - block) as usize);
                if count == 0 || extent.address_of(block) != at + index as u64 {
                    index += 1;
                    continue;
                }
                if extent.unwritten {
                    extent::mark_written(&mut tx, &mut inode.edit().content, block, block + count as u64)?;
                    changed = true;
                }
                clean.extend(block..block + count as u64);
                index += count;
            }
        }
        if changed {
            self.count_extents(&mut tx, &mut inode, before)?;
            inode.save(&mut tx)?;
            tx.publish()?;
        }
        self.pages.clean(ino, clean.iter().copied(), ticket);
        if !self.options.keeps_read {
            // The reader's system has them; only the last page may be written on.
            let last = (inode.size.get() / BLOCK_BYTES as u64).saturating_sub(1);
            self.pages.forget_clean(ino, clean.into_iter().filter(|block| *block < last));
        }
        Ok(())
    }

    /// Writes all dirty pages to the disk.
    pub(super) fn write_back_all(&self) -> Result<()> {
        let mut first_error = Ok(());
        for ino in self.pages.dirty_files() {
            if let Err(e) = self.write_back(ino, Few::Home) {
                tracing::error!(ino = ino.0, "data could not be written to the disk: {e}");
                first_error = first_error.and(Err(e));
            }
        }
        first_error
    }

    /// Writes back while so much is dirty that memory would run out; called without locks by who made it so.
    pub(super) fn relieve(&self) {
        if !self.pages.is_full() {
            return;
        }
        for ino in self.pages.dirty_files() {
            if let Err(e) = self.write_back(ino, Few::Home) {
                tracing::error!(ino = ino.0, "data could not be written to the disk: {e}; it stays in memory");
            }
            if !self.pages.is_full() {
                return;
            }
        }
    }

    /// Writes back dirty pages from a block on, as many as fit into one transaction, and publishes that. Returns where to go on. The file's
    /// lock is held exclusively. With `out`, also what would fit into the inode goes to blocks.
    pub(super) fn write_back_some(&self, inode: &mut Inode, from: u64, few: Few, out: bool) -> Result<u64> {
        let ino = inode.ino;
        let size = inode.size.get();
        let inline = inode.content_kind() == Some(Content::Inline);
        if inline && Self::fits_inline(size) && !out {
            return self.fold_in(inode);
        }
        let mut tx = self.tx();
        let mut changed = false;
        let mut from = from;
        let mut keeps_inline = false;
        if inline {
            // The first block comes along even if it is not dirty: the inode is to hold the map instead.
            let len = usize::from(inode.content_len.get());
            if len > 0 {
                keeps_inline = true;
                from = 0;
                let page = self.page(inode, 0)?;
                self.pages.write(ino, 0, || page, |_| ());
            }
            let body = inode.edit();
            body.set_content_kind(Content::Extents);
            body.content.fill(0);
            body.content_len = U16::ZERO;
            extent::init(&mut body.content);
            changed = true;
        }
        self.pages.wait_written(ino);
        let dirty = self.pages.dirty(ino, from, self.pages_per_tx());
        let Some((last, _)) = dirty.last() else { return Ok(u64::MAX) };
        let next = last + 1;
        let size_blocks = size.div_ceil(BLOCK_BYTES as u64);

        let before = extent::counts(&inode.content)?;
        let journals = few == Few::ToJournal && dirty.len() <= JOURNALED_MAX && self.journal.takes_contents();
        let mut runs: Vec<(BlockAddress, Vec<&[u8]>)> = Vec::new();
        let (mut index, mut journaled) = (0, Vec::new());
        while index < dirty.len() && tx.contents() < self.contents_per_tx() {
            let block = dirty[index].0;
            let wanted = follow(&dirty[index..]);
            let (at, count) = match extent::get(&tx, &inode.content, block)? {
                Mapping::Extent(extent) => {
                    let count = (extent.end() - block).min(wanted as u64);
                    if extent.unwritten {
                        extent::mark_written(&mut tx, &mut inode.edit().content, block, block + count)?;
                        changed = true;
                    }
                    (extent.address_of(block), count as usize)
                }
                Mapping::Hole { .. } => {
                    let content = &mut inode.edit().content;
                    let extent =
                        extent::allocate(&mut tx, content, block, wanted as u32, false, size_blocks, |tx, n| {
                            tx.allocate(n)
                        })?;
                    changed = true;
                    (extent.address_of(block), (extent.end() - block).min(wanted as u64) as usize)
                }
            };
            let pages = &dirty[index..index + count];
            index += self.send(&mut tx, at, pages, journals, &mut journaled, |at, (_, page)| {
                append(&mut runs, at, [&page[..]]);
            });
        }
        let (done, left) = dirty.split_at(index);
        let next = left.first().map_or(next, |(block, _)| *block);
        if !runs.is_empty() {
            self.journal.disk().write_parts(&runs).map_err(|e| data_error(inode, from, &e))?;
        }
        let ticket = if runs.is_empty() { 0 } else { self.journal.ticket() };
        if changed || !journaled.is_empty() {
            if keeps_inline && !runs.is_empty() {
                self.journal.commit(0, ticket)?;
            }
            self.count_extents(&mut tx, inode, before)?;
            inode.save(&mut tx)?;
            tx.publish()?;
        }
        self.pages.clean(ino, done.iter().map(|(block, _)| *block), ticket);
        Ok(next)
    }

    /// Puts the page of a file that became small again into the inode.
    fn fold_in(&self, inode: &mut Inode) -> Result<u64> {
        if self.pages.is_dirty(inode.ino, 0) {
            let page = self.page(inode, 0)?;
            let len = inode.size.get() as usize;
            let body = inode.edit();
            body.content[..len].copy_from_slice(&page[..len]);
            body.content[len..].fill(0);
            body.content_len = U16::new(len as u16);
            let mut tx = self.tx();
            inode.save(&mut tx)?;
            tx.publish()?;
        }
        self.pages.forget(inode.ino, 0, u64::MAX);
        Ok(u64::MAX)
    }
}

/// Adds pages to the runs; those that continue the last run become part of it.
fn append<T>(runs: &mut Vec<(BlockAddress, Vec<T>)>, at: BlockAddress, pages: impl IntoIterator<Item = T>) {
    match runs.last_mut() {
        Some((start, run)) if *start + run.len() as u64 == at => run.extend(pages),
        _ => runs.push((at, pages.into_iter().collect())),
    }
}

/// How many of these pages follow each other.
fn follow(pages: &[(u64, Page)]) -> usize {
    let Some((first, _)) = pages.first() else { return 0 };
    pages.iter().zip(*first..).take_while(|((found, _), expected)| found == expected).count()
}

/// How many blocks a count of bytes is.
pub(super) fn blocks(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES as u64)
}

/// For counters on the disk.
pub(super) fn field(number: u64) -> U64 {
    U64::new(number)
}
