//! Bringing dirty pages to the disk.
//!
//! Data is written to its addresses first, and then the map that points to them is published: one flush covers both, and a map that survives
//! alone points to zeros, since the addresses were never used. One case needs a flush of its own: what a file had in its inode
//! may have been durable, so its block must be before the inode lets go of it.

use zerocopy::little_endian::{U16, U64};

use super::Filesystem;
use super::truncate::data_error;
use crate::disk::{BLOCK_BYTES, BlockAddress};
use crate::extent::{self, Mapping};
use crate::file::{PAGE_BYTES, Page};
use crate::inode::Inode;
use crate::layout::Content;
use crate::vfs::{Ino, Result, VfsError};

impl Filesystem {
    /// Pages that one transaction gives addresses to at most.
    fn pages_per_tx(&self) -> usize {
        (self.geometry.journal_blocks / 8).clamp(64, 4096) as usize
    }

    /// Writes all dirty pages of a file to the disk; no locks are held.
    pub(super) fn write_back(&self, ino: Ino) -> Result<()> {
        let mut from = 0;
        while let Some(next) = self.pages.next_dirty(ino, from) {
            self.begin()?;
            let _guard = self.exclusive(ino)?;
            let mut inode = match Inode::load(&self.journal, ino) {
                Err(VfsError::Stale) => return Ok(()),
                inode => inode?,
            };
            from = self.write_back_some(&mut inode, next, false)?;
        }
        Ok(())
    }

    /// Writes all dirty pages to the disk.
    pub(super) fn write_back_all(&self) -> Result<()> {
        let mut first_error = Ok(());
        for ino in self.pages.dirty_files() {
            if let Err(e) = self.write_back(ino) {
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
            if let Err(e) = self.write_back(ino) {
                tracing::error!(ino = ino.0, "data could not be written to the disk: {e}; it stays in memory");
            }
            if !self.pages.is_full() {
                return;
            }
        }
    }

    /// Writes back dirty pages from a block on, as many as fit into one transaction, and publishes that. Returns where to go on. The file's
    /// lock is held exclusively. With `out`, also what would fit into the inode goes to blocks.
    pub(super) fn write_back_some(&self, inode: &mut Inode, from: u64, out: bool) -> Result<u64> {
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
        let dirty = self.pages.dirty(ino, from, self.pages_per_tx());
        let Some((last, _)) = dirty.last() else { return Ok(u64::MAX) };
        let next = last + 1;
        let size_blocks = size.div_ceil(BLOCK_BYTES as u64);

        let before = extent::counts(&inode.content)?;
        let mut runs: Vec<(BlockAddress, Vec<u8>)> = Vec::new();
        let mut index = 0;
        while index < dirty.len() {
            let block = dirty[index].0;
            let wanted =
                dirty[index..].iter().zip(block..).take_while(|((found, _), expected)| found == expected).count();
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
            append(&mut runs, at, &dirty[index..index + count]);
            index += count;
        }
        let slices: Vec<(BlockAddress, &[u8])> = runs.iter().map(|(at, bytes)| (*at, &bytes[..])).collect();
        self.journal.disk().write_all(&slices).map_err(|e| data_error(inode, from, &e))?;
        let ticket = self.journal.ticket();
        if changed {
            if keeps_inline {
                self.journal.commit(0, ticket)?;
            }
            self.count_extents(&mut tx, inode, before)?;
            inode.save(&mut tx)?;
            tx.publish()?;
        }
        self.pages.clean(ino, dirty.iter().map(|(block, _)| *block), ticket);
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

/// Adds pages to the runs; one that continues the last run becomes part of it.
fn append(runs: &mut Vec<(BlockAddress, Vec<u8>)>, at: BlockAddress, pages: &[(u64, Page)]) {
    let goes_on = runs.last().is_some_and(|(start, bytes)| start + (bytes.len() / BLOCK_BYTES) as u64 == at);
    if !goes_on {
        runs.push((at, Vec::with_capacity(pages.len() * PAGE_BYTES)));
    }
    let (_, bytes) = runs.last_mut().expect("pushed if there was none");
    for (_, page) in pages {
        bytes.extend_from_slice(&page[..]);
    }
}

/// How many blocks a count of bytes is.
pub(super) fn blocks(bytes: u64) -> u64 {
    bytes.div_ceil(BLOCK_BYTES as u64)
}

/// For counters on the disk.
pub(super) fn field(number: u64) -> U64 {
    U64::new(number)
}
