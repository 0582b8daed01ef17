//! Setting the size of a file.
//!
//! What a file has behind its end must never be seen again. In the page cache the rest of the last page is zeros; on the disk it is what was there
//! before until the page was written back. So a file that was cut in the middle of a block carries a flag until it is certain that the zeros are durable:
//! before it grows, they are written and flushed. A crash can also leave something there without the flag, if data survived and the size that
//! it belonged to did not: so the block is looked at before the file grows the first time.

use zerocopy::little_endian::{U16, U64};

use super::Filesystem;
use crate::disk::BLOCK_BYTES;
use crate::extent::{self, FILE_BLOCKS_MAX, Mapping};
use crate::inode::Inode;
use crate::journal::Tx;
use crate::layout::{CONTENT_BYTES, Content, flags};
use crate::lock::LockGuard;
use crate::vfs::{FILE_SIZE_MAX, Result, VfsError};

const BLOCK: u64 = BLOCK_BYTES as u64;

impl Filesystem {
    /// Removes extents from block `from` on, at most so many; returns whether there are none left.
    pub(super) fn remove_extents(&self, tx: &mut Tx<'_>, inode: &mut Inode, from: u64, max: usize) -> Result<bool> {
        self.remove_range(tx, inode, from, FILE_BLOCKS_MAX, max).map(|more| more.is_none())
    }

    /// Removes extents in a range of blocks; returns where to go on, if at all.
    pub(super) fn remove_range(
        &self,
        tx: &mut Tx<'_>,
        inode: &mut Inode,
        from: u64,
        to: u64,
        max: usize,
    ) -> Result<Option<u64>> {
        // A write that is under way must not come to addresses that are given up.
        self.pages.wait_written(inode.ino);
        let before = extent::counts(&inode.content)?;
        let removed = extent::remove(tx, &mut inode.edit().content, from, to, max)?;
        for range in &removed.freed {
            tx.discard(range.address, range.count);
        }
        self.count_extents(tx, inode, before)?;
        Ok(removed.more)
    }

    /// Counts the blocks that a file's map took or gave back since it had `before`. Those of its tree the transaction counted itself.
    pub(super) fn count_extents(&self, tx: &mut Tx<'_>, inode: &mut Inode, before: extent::Counts) -> Result<()> {
        let after = extent::counts(&inode.content)?;
        let blocks = |counts: extent::Counts| counts.mapped + counts.nodes;
        tx.count_blocks(after.mapped as i64 - before.mapped as i64);
        let body = inode.edit();
        body.stored_blocks = U64::new((body.stored_blocks.get() + blocks(after)).saturating_sub(blocks(before)));
        Ok(())
    }

    /// Makes ready for a greater size: the file's last block is zeros behind the end, durably.
    pub(super) fn before_growth(&self, inode: &mut Inode) -> Result<()> {
        if inode.has(flags::CUTTING) {
            // Cutting it failed halfway; what is left behind the end must not come back.
            return Err(VfsError::Io(format!("inode {} is not cut completely; mount again", inode.ino.0)));
        }
        if inode.content_kind() != Some(Content::Extents) {
            return Ok(());
        }
        let cut = inode.has(flags::TAIL);
        if !cut && self.pages.is_tail_clean(inode.ino) {
            return Ok(());
        }
        let (block, end) = (inode.size.get() / BLOCK, (inode.size.get() % BLOCK) as usize);
        if end != 0
            && let Mapping::Extent(extent) = extent::get(&self.journal, &inode.content, block)?
            && !extent.unwritten
        {
            self.pages.wait_written(inode.ino);
            let at = extent.address_of(block);
            let mut there = [0; BLOCK_BYTES];
            self.journal.read_data(at, &mut there).map_err(|e| data_error(inode, block, &e))?;
            // Without the flag, after a crash: data that was written back, of a size that did not survive.
            if cut || there[end..].iter().any(|byte| *byte != 0) {
                let mut tx = self.tx();
                tx.put_contents(at, self.page(inode, block)?);
                let sequence = tx.publish()?;
                self.journal.commit(sequence, 0)?;
            }
        }
        self.pages.set_tail_clean(inode.ino);
        inode.edit().set_flag(flags::TAIL, false);
        Ok(())
    }

    /// Sets the size, in the page cache and in a transaction. Returns a lock that is to be held until that is published, and whether
    /// [`Filesystem::reap`] has to go on afterwards.
    pub(super) fn set_size<'a>(
        &'a self,
        tx: &mut Tx<'_>,
        inode: &mut Inode,
        size: u64,
    ) -> Result<(Option<LockGuard<'a>>, bool)> {
        if size > FILE_SIZE_MAX {
            return Err(VfsError::TooLarge);
        }
        let old = inode.size.get();
        if size > old {
            self.before_growth(inode)?;
            inode.edit().size = U64::new(size);
            return Ok((None, false));
        }
        if size == old {
            return Ok((None, false));
        }
        let (keep, end) = (size.div_ceil(BLOCK), (size % BLOCK) as usize);
        let (mut guard, mut more) = (None, false);
        match inode.content_kind() {
            Some(Content::Inline) => {
                if end != 0 && self.pages.is_dirty(inode.ino, size / BLOCK) {
                    self.zero_page_from(inode, size / BLOCK, end)?;
                } else {
                    // What was read from the inode while the file was longer.
                    self.pages.forget(inode.ino, size / BLOCK, keep);
                }
                let len = usize::from(inode.content_len.get()).min(size as usize);
                let body = inode.edit();
                body.content[len..].fill(0);
                body.content_len = U16::new(len as u16);
            }
            Some(Content::Extents) => {
                if end != 0 {
                    let block = size / BLOCK;
                    let mapping = extent::get(&self.journal, &inode.content, block)?;
                    let written = matches!(mapping, Mapping::Extent(extent) if !extent.unwritten);
                    if written || self.pages.is_dirty(inode.ino, block) {
                        self.zero_page_from(inode, block, end)?;
                    }
                    inode.edit().set_flag(flags::TAIL, written);
                } else {
                    inode.edit().set_flag(flags::TAIL, false);
                }
                more = !self.remove_extents(tx, inode, keep, self.extents_per_tx())?;
                if more {
                    inode.edit().set_flag(flags::CUTTING, true);
                    guard = Some(self.add_orphan(tx, inode)?);
                } else if size == 0 && extent::counts(&inode.content)?.extents == 0 {
                    let body = inode.edit();
                    body.set_content_kind(Content::Inline);
                    body.content.fill(0);
                    body.content_len = U16::ZERO;
                }
            }
            _ => {}
        }
        // A page that is not dirty is what the disk has, also behind the end: it is read again when it is needed.
        self.pages.forget(inode.ino, keep, u64::MAX);
        inode.edit().size = U64::new(size);
        Ok((guard, more))
    }

    /// Makes a page zeros from byte `from` on.
    fn zero_page_from(&self, inode: &Inode, block: u64, from: usize) -> Result<()> {
        let page = self.page(inode, block)?;
        self.pages.write(inode.ino, block, || page, |page| page[from..].fill(0));
        Ok(())
    }

    /// Whether a file of this size is kept in its inode.
    pub(super) fn fits_inline(size: u64) -> bool {
        size <= CONTENT_BYTES as u64
    }
}

pub(super) fn data_error(inode: &Inode, block: u64, error: &std::io::Error) -> VfsError {
    tracing::error!(ino = inode.ino.0, block, %error, "data of a file can't be read or written");
    VfsError::Io(format!("block {block} of inode {}: {error}", inode.ino.0))
}
