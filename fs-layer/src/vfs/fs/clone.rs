//! Copies of ranges of files. What the disk can remap is shared: the target gets addresses of its own, and the disk lets them hold what
//! those of the source hold, without moving it.
//!
//! Order: what is dirty of the source is written to its addresses; new addresses are remapped to them; if that replaces something, a flush;
//! then the target's map is published. So a map that survives a crash alone never shows zeros where there was something before. A
//! clone of as many extents as one transaction takes is there as a whole or not at all; a longer one may be there from its beginning on.

use zerocopy::little_endian::U64;

use super::Filesystem;
use super::truncate::data_error;
use super::write_back::blocks;
use crate::disk::{BLOCK_BYTES, BlockAddress};
use crate::extent::{self, Extent};
use crate::inode::Inode;
use crate::journal::Tx;
use crate::layout::{Content, flags};
use crate::lock::LockGuard;
use crate::vfs::{Credentials, FILE_SIZE_MAX, Fallocate, Ino, Result, Seek, SetAttributes, VfsError, WriteAt};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Bytes read at once where nothing can be shared.
const COPY_BYTES: u64 = 1 << 20;

impl Filesystem {
    pub(super) fn do_clone(&self, who: &Credentials, from: (Ino, u64), to: (Ino, u64), len: u64) -> Result<u64> {
        self.begin()?;
        for ino in [from.0, to.0] {
            // Directories would have to be locked in another order.
            let _guard = self.shared(ino)?;
            self.load_file(ino)?;
        }
        let len = {
            let _guards = self.lock_both(from.0, to.0)?;
            let mut source = self.load_file(from.0)?;
            let target_size = if from.0 == to.0 { source.size.get() } else { self.load_file(to.0)?.size.get() };
            let len = check(source.size.get(), target_size, from, to, len)?;
            if len == 0 || self.journal.disk().can_remap() && self.share(who, &mut source, from.1, to, len)? {
                return Ok(len);
            }
            len
        };
        self.copy_range(who, from, to, len)
    }

    /// Locks one file, or two.
    fn lock_both(&self, one: Ino, other: Ino) -> Result<(LockGuard<'_>, Option<LockGuard<'_>>)> {
        let first = self.exclusive(one.min(other))?;
        let second = if one == other { None } else { Some(self.exclusive(one.max(other))?) };
        Ok((first, second))
    }

    /// Lets the target share what the source has, unless one write does the same. The locks are held.
    fn share(&self, who: &Credentials, source: &mut Inode, at: u64, to: (Ino, u64), len: u64) -> Result<bool> {
        self.write_back_whole(source, false)?;
        let in_inode = source.content_kind() == Some(Content::Inline);
        if in_inode && !source.inline().is_empty() && Self::fits_inline(source.size.get()) {
            return Ok(false);
        }
        let (mut pieces, mapped) = self.written(source, at / BLOCK, blocks(at + len))?;
        self.check_space(mapped, 0)?;
        // Now: if source and target are one file, writing it back changed it.
        let mut target = self.load_file(to.0)?;
        let (end, size) = (to.1 + len, target.size.get());
        if mapped > 0 {
            let disk = self.journal.disk();
            let mut address = self.tx().allocate(mapped)?;
            for piece in &mut pieces {
                let done = match in_inode {
                    true => disk.write(address, &block_of(source.inline())),
                    false => self.remap(piece, address),
                };
                done.map_err(|e| data_error(source, piece.start, &e))?;
                piece.start = piece.start - at / BLOCK + to.1 / BLOCK;
                piece.address = address;
                address += u64::from(piece.count);
            }
            if to.1 < size {
                self.journal.commit(0, self.journal.ticket())?;
            }
        }
        if target.content_kind() == Some(Content::Inline) {
            self.leave_inode(&mut target)?;
        }
        if end > size {
            self.before_growth(&mut target)?;
        }
        self.map(who, &mut target, (to.1, end), &pieces)?;
        Ok(true)
    }

    /// Lets new addresses hold what a piece of a locked file is. What of that is in the journal only is written.
    fn remap(&self, piece: &Extent, to: BlockAddress) -> std::io::Result<()> {
        let disk = self.journal.disk();
        let away = self.journal.away(piece.address, piece.count.into());
        disk.remap(piece.address, to, piece.count.into())?;
        away.iter().try_for_each(|(at, page)| disk.write(to + (at - piece.address), &page[..]))
    }

    /// What is written of a range of a file's blocks, in order, and how many blocks that is.
    fn written(&self, inode: &Inode, first: u64, end: u64) -> Result<(Vec<Extent>, u64)> {
        if inode.content_kind() != Some(Content::Extents) {
            // A short beginning of a long file may be in the inode; it gets an address with the clone.
            let beginning = Extent { start: 0, address: 0, count: 1, unwritten: false, before: 0, after: 0 };
            let there = first == 0 && !inode.inline().is_empty();
            return Ok(if there { (vec![beginning], 1) } else { (Vec::new(), 0) });
        }
        let (mut pieces, mut mapped) = (Vec::new(), 0);
        extent::list(&self.journal, &inode.content, first, |extent| {
            if extent.start >= end {
                return std::ops::ControlFlow::Break(());
            }
            let (start, stop) = (extent.start.max(first), extent.end().min(end));
            if !extent.unwritten {
                let (address, count) = (extent.address_of(start), (stop - start) as u32);
                pieces.push(Extent { start, address, count, unwritten: false, before: 0, after: 0 });
                mapped += stop - start;
            }
            std::ops::ControlFlow::Continue(())
        })?;
        Ok((pieces, mapped))
    }

    /// Makes the bytes from `from` up to `end` what is at the addresses of these pieces, and holes between.
    fn map(&self, who: &Credentials, inode: &mut Inode, (from, end): (u64, u64), pieces: &[Extent]) -> Result<()> {
        let (first, last) = (from / BLOCK, blocks(end));
        self.pages.wait_written(inode.ino);
        self.pages.forget(inode.ino, first, last);
        let mut tx = self.tx();
        // The size comes with the first transaction, so that nothing is mapped behind the end.
        if end >= inode.size.get() {
            let body = inode.edit();
            body.size = U64::new(end);
            // The rest of the last block is what the source has there.
            body.set_flag(flags::TAIL, !end.is_multiple_of(BLOCK));
        }
        self.touch_written(who, &mut tx, inode)?;
        let max = self.extents_per_tx();
        let mut next = self.remove_range(&mut tx, inode, first, last, max)?;
        while let Some(block) = next {
            tx = self.go_on(tx, inode)?;
            next = self.remove_range(&mut tx, inode, block, last, max)?;
        }
        for (index, part) in pieces.chunks(max).enumerate() {
            if index > 0 {
                tx = self.go_on(tx, inode)?;
            }
            let before = extent::counts(&inode.content)?;
            for piece in part {
                extent::insert(&mut tx, &mut inode.edit().content, *piece)?;
            }
            self.count_extents(&mut tx, inode, before)?;
        }
        inode.save(&mut tx)?;
        tx.publish()?;
        Ok(())
    }

    /// Publishes a transaction that became long, and begins the next.
    fn go_on<'a>(&'a self, mut tx: Tx<'a>, inode: &mut Inode) -> Result<Tx<'a>> {
        inode.save(&mut tx)?;
        tx.publish()?;
        self.journal.make_room()?;
        Ok(self.tx())
    }

    /// Copies by reading and writing, in steps that others see; holes stay holes.
    fn copy_range(&self, who: &Credentials, from: (Ino, u64), to: (Ino, u64), len: u64) -> Result<u64> {
        let mut done = 0;
        while done < len {
            let data = match self.do_seek(from.0, from.1 + done, Seek::Data) {
                Ok(at) => (at - from.1).min(len),
                Err(VfsError::NoSuchAddress) => len,
                Err(e) => return Err(e),
            };
            if data > done {
                self.do_fallocate(who, to.0, Fallocate::PunchHole, to.1 + done, data - done)?;
                done = data;
                continue;
            }
            let hole = match self.do_seek(from.0, from.1 + done, Seek::Hole) {
                Ok(at) => (at - from.1).min(len),
                Err(VfsError::NoSuchAddress) => break,
                Err(e) => return Err(e),
            };
            while done < hole {
                let now = (hole - done).min(COPY_BYTES) as u32;
                let read = self.do_read(from.0, from.1 + done, now)?;
                if read.data.is_empty() {
                    // It was cut meanwhile.
                    return Ok(done);
                }
                self.do_write(who, to.0, WriteAt::Offset(to.1 + done), &read.data, &mut || ())?;
                done += read.data.len() as u64;
            }
        }
        if self.do_getattr(to.0)?.size < to.1 + done {
            // A hole at the end.
            let size = SetAttributes { size: Some(to.1 + done), ..SetAttributes::default() };
            self.do_setattr(who, to.0, &size, true)?;
        }
        Ok(done)
    }
}

/// The block that begins with these bytes.
fn block_of(bytes: &[u8]) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    block[..bytes.len()].copy_from_slice(bytes);
    block
}

/// How many bytes a clone is of, if it may be; see [`Vfs::clone_range`](crate::vfs::Vfs::clone_range).
fn check(size: u64, target_size: u64, from: (Ino, u64), to: (Ino, u64), len: u64) -> Result<u64> {
    if !from.1.is_multiple_of(BLOCK) || !to.1.is_multiple_of(BLOCK) {
        return Err(VfsError::Invalid);
    }
    let len = if len == 0 { size.saturating_sub(from.1) } else { len };
    let end = from.1.checked_add(len).filter(|end| *end <= size).ok_or(VfsError::Invalid)?;
    let target_end = to.1.checked_add(len).ok_or(VfsError::Invalid)?;
    // A part of a block is shared only where nothing is behind it.
    if !len.is_multiple_of(BLOCK) && (end != size || target_end < target_size) {
        return Err(VfsError::Invalid);
    }
    if from.0 == to.0 && from.1 < target_end && to.1 < end {
        return Err(VfsError::Invalid);
    }
    if target_end > FILE_SIZE_MAX {
        return Err(VfsError::TooLarge);
    }
    Ok(len)
}
