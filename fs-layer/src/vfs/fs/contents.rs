//! Reading and writing files.

use std::sync::PoisonError;

use blockd::buf::AlignedBuf;
use bytes::{Bytes, BytesMut};
use zerocopy::little_endian::{U16, U32};

use super::permission::without_set_ids;
use super::truncate::data_error;
use super::write_back::{Few, blocks, field};
use super::{Filesystem, now};
use crate::disk::BLOCK_BYTES;
use crate::extent::{self, FILE_BLOCKS_MAX, Mapping};
use crate::file::{PAGE_BYTES, Page};
use crate::inode::Inode;
use crate::journal::Tx;
use crate::layout::{CONTENT_BYTES, Content};
use crate::vfs::{
    Attributes, Credentials, FILE_SIZE_MAX, Fallocate, FileKind, Ino, ReadData, Result, Seek, VfsError, WriteAt,
    Written,
};

const BLOCK: u64 = BLOCK_BYTES as u64;
/// Who writes so many bytes goes on while they are copied.
const ACCEPTED: usize = 64 << 10;
/// Reads of so many bytes are large.
const LARGE: u64 = 128 << 10;

impl Filesystem {
    /// A regular file; its lock is held.
    pub(super) fn load_file(&self, ino: Ino) -> Result<Inode> {
        let inode = self.load(ino)?;
        match inode.kind() {
            Some(FileKind::File) => Ok(inode),
            Some(FileKind::Directory) => Err(VfsError::IsDirectory),
            Some(FileKind::Symlink) => Err(VfsError::Symlink),
            _ => Err(VfsError::Invalid),
        }
    }

    pub(super) fn do_read(&self, ino: Ino, offset: u64, len: u32) -> Result<ReadData> {
        let guard = self.shared(ino)?;
        let inode = self.load_file(ino)?;
        let size = inode.size.get();
        let end = offset.saturating_add(u64::from(len)).min(size);
        let data = if offset < end { self.read_range(&inode, offset, end)? } else { Bytes::new() };
        drop(guard);
        self.note_read(&inode);
        Ok(ReadData { end: offset.saturating_add(data.len() as u64) >= size, data })
    }

    fn read_range(&self, inode: &Inode, offset: u64, end: u64) -> Result<Bytes> {
        let whole_inline = inode.content_kind() == Some(Content::Inline) && Self::fits_inline(inode.size.get());
        if whole_inline && !self.pages.is_dirty(inode.ino, 0) {
            let content = &inode.content[offset as usize..end as usize];
            return Ok(Bytes::copy_from_slice(content));
        }
        if end - offset >= LARGE {
            return self.read_large(inode, offset, end);
        }
        let mut data = BytesMut::with_capacity((end - offset) as usize);
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        let mut copy = |block: u64, page: &[u8]| {
            let from = if block == first { (offset % BLOCK) as usize } else { 0 };
            let to = if block == last { ((end - 1) % BLOCK) as usize + 1 } else { PAGE_BYTES };
            data.extend_from_slice(&page[from..to]);
        };
        let mut block = first;
        while block <= last {
            if let Some(page) = self.pages.get(inode.ino, block) {
                copy(block, &page[..]);
                block += 1;
                continue;
            }
            let missing = self.missing(inode, block, last);
            let file_end = blocks(inode.size.get());
            let count = self.pages.read_ahead(inode.ino, block, missing).min(file_end - block);
            let mut bytes = AlignedBuf::for_overwrite(count as usize * PAGE_BYTES);
            self.load_blocks(inode, block, &mut bytes)?;
            for (at, page) in (block..block + missing).zip(bytes.chunks_exact(PAGE_BYTES)) {
                copy(at, page);
            }
            self.pages.insert(inode.ino, block, &bytes);
            block += missing;
        }
        Ok(data.freeze())
    }

    /// How many pages from `block` up to `last` are not here.
    fn missing(&self, inode: &Inode, block: u64, last: u64) -> u64 {
        (block..=last).take_while(|block| self.pages.get(inode.ino, *block).is_none()).count() as u64
    }

    /// The same for many bytes, which go from the disk to where the reader gets them from. Whoever asks for so much asks ahead himself.
    fn read_large(&self, inode: &Inode, offset: u64, end: u64) -> Result<Bytes> {
        let (first, last) = (offset / BLOCK, (end - 1) / BLOCK);
        let mut bytes = AlignedBuf::for_overwrite((last + 1 - first) as usize * PAGE_BYTES);
        let mut block = first;
        while block <= last {
            let at = (block - first) as usize * PAGE_BYTES;
            if let Some(page) = self.pages.get(inode.ino, block) {
                bytes[at..at + PAGE_BYTES].copy_from_slice(&page[..]);
                block += 1;
                continue;
            }
            let missing = self.missing(inode, block, last);
            let part = &mut bytes[at..at + missing as usize * PAGE_BYTES];
            self.load_blocks(inode, block, part)?;
            if self.options.keeps_read {
                self.pages.insert(inode.ino, block, part);
            }
            block += missing;
        }
        let from = (offset - first * BLOCK) as usize;
        Ok(Bytes::from_owner(bytes).slice(from..from + (end - offset) as usize))
    }

    /// Blocks as the disk has them, zeros behind the end of the file.
    fn load_blocks(&self, inode: &Inode, block: u64, bytes: &mut [u8]) -> Result<()> {
        let end = block + (bytes.len() / PAGE_BYTES) as u64;
        // What is read is not cleared first.
        let mut done = 0;
        match inode.content_kind() {
            Some(Content::Inline) if block == 0 => {
                let inline = inode.inline();
                bytes[..inline.len()].copy_from_slice(inline);
                done = inline.len();
            }
            Some(Content::Extents) => {
                let mut runs = Vec::new();
                extent::list(&self.journal, &inode.content, block, |extent| {
                    if extent.start >= end {
                        return std::ops::ControlFlow::Break(());
                    }
                    if !extent.unwritten {
                        runs.push(extent);
                    }
                    std::ops::ControlFlow::Continue(())
                })?;
                for extent in runs {
                    let (from, to) = (extent.start.max(block), extent.end().min(end));
                    let (start, stop) = ((from - block) as usize * PAGE_BYTES, (to - block) as usize * PAGE_BYTES);
                    bytes[done..start].fill(0);
                    let read = self.journal.read_data(extent.address_of(from), &mut bytes[start..stop]);
                    read.map_err(|e| data_error(inode, from, &e))?;
                    done = stop;
                }
            }
            _ => {}
        }
        bytes[done..].fill(0);
        let size = inode.size.get();
        if end * BLOCK > size {
            let keep = size.saturating_sub(block * BLOCK).min(bytes.len() as u64) as usize;
            bytes[keep..].fill(0);
        }
        Ok(())
    }

    /// A page as it is now.
    pub(super) fn page(&self, inode: &Inode, block: u64) -> Result<Page> {
        if let Some(page) = self.pages.get(inode.ino, block) {
            return Ok(page);
        }
        let mut page = Page::zeroed();
        self.load_blocks(inode, block, page.make_mut())?;
        Ok(page)
    }

    /// Writes to the page cache or the inode, not to its attributes. The lock is held, and [`Filesystem::before_growth`] was called if it grows; the inode is saved by the caller. Returns whether what is in
    /// the page cache should be written back.
    fn put_bytes(&self, inode: &mut Inode, offset: u64, data: &[u8]) -> Result<bool> {
        let mut worth = false;
        let end = offset + data.len() as u64;
        let size = inode.size.get();
        let inline = inode.content_kind() == Some(Content::Inline);
        if inline && Self::fits_inline(end.max(size)) && !self.pages.is_dirty(inode.ino, 0) {
            let body = inode.edit();
            body.content[offset as usize..end as usize].copy_from_slice(data);
            body.content_len = U16::new(body.content_len.get().max(end as u16));
            // A clean page of what it was before.
            self.pages.forget(inode.ino, 0, 1);
        } else {
            let mut done = 0;
            while done < data.len() {
                let at = offset + done as u64;
                let (block, from) = (at / BLOCK, (at % BLOCK) as usize);
                let left = data.len() - done;
                if from == 0 && left >= PAGE_BYTES {
                    let len = left - left % PAGE_BYTES;
                    worth |= self.pages.write_whole(inode.ino, block, &data[done..done + len]);
                    done += len;
                    continue;
                }
                let len = (PAGE_BYTES - from).min(left);
                let part = &data[done..done + len];
                let base = self.page(inode, block)?;
                self.pages.write(inode.ino, block, || base, |page| page[from..from + len].copy_from_slice(part));
                done += len;
            }
        }
        if end > size {
            inode.edit().size = field(end);
        }
        Ok(worth)
    }

    /// Of whole blocks, and so many that copying them takes a while, `accepted` is called before that.
    pub(super) fn do_write(
        &self,
        who: &Credentials,
        ino: Ino,
        at: WriteAt,
        data: &[u8],
        accepted: &mut dyn FnMut(),
    ) -> Result<Written> {
        self.begin()?;
        let guard = self.exclusive(ino)?;
        let mut inode = self.load_file(ino)?;
        let offset = match at {
            WriteAt::Offset(offset) => offset,
            WriteAt::End => inode.size.get(),
        };
        if data.is_empty() {
            return Ok(Written { offset, attributes: inode.attributes() });
        }
        let end = offset.checked_add(data.len() as u64).filter(|end| *end <= FILE_SIZE_MAX);
        let end = end.ok_or(VfsError::TooLarge)?;
        self.check_space(blocks(end - offset) + 1, 0)?;
        if end > inode.size.get() {
            self.before_growth(&mut inode)?;
        }
        let mut tx = self.tx();
        self.touch_written(who, &mut tx, &mut inode)?;
        // From here on whole blocks need no more than memory. Who made too much dirty waits below until less is.
        let early = data.len() >= ACCEPTED && (offset | end).is_multiple_of(BLOCK) && !self.pages.is_full();
        let accepting = early.then(|| self.accepting.read().unwrap_or_else(PoisonError::into_inner));
        if early {
            self.journal.check_alive()?;
            accepted();
        }
        let worth = self.put_bytes(&mut inode, offset, data)?;
        inode.save(&mut tx)?;
        tx.publish()?;
        drop((accepting, guard));
        if worth {
            self.write_soon(ino);
        }
        self.relieve();
        Ok(Written { offset, attributes: inode.attributes() })
    }

    /// What writing does to a file beside its contents.
    pub(super) fn touch_written(&self, who: &Credentials, tx: &mut Tx<'_>, inode: &mut Inode) -> Result<()> {
        let body = inode.edit();
        body.touch_contents(now());
        if who.uid != 0 {
            body.mode = U32::new(without_set_ids(body));
        }
        self.drop_capabilities(tx, inode)
    }

    pub(super) fn do_fsync(&self, ino: Ino) -> Result<()> {
        if self.options.read_only {
            return Ok(());
        }
        // A write that was accepted has the lock until its pages are dirty.
        drop(self.shared(ino)?);
        self.write_back(ino, Few::ToJournal)?;
        let (sequence, ticket) = {
            let _guard = self.shared(ino)?;
            let inode = self.load(ino)?;
            (self.journal.changed_in(inode.address()), self.pages.ticket(ino))
        };
        self.journal.commit(sequence, ticket)
    }

    pub(super) fn do_fallocate(
        &self,
        who: &Credentials,
        ino: Ino,
        how: Fallocate,
        offset: u64,
        len: u64,
    ) -> Result<Attributes> {
        self.begin()?;
        if len == 0 {
            return Err(VfsError::Invalid);
        }
        let end = offset.checked_add(len).filter(|end| *end <= FILE_SIZE_MAX).ok_or(VfsError::TooLarge)?;
        let grows = matches!(how, Fallocate::Allocate | Fallocate::ZeroRange);
        let zeros = !matches!(how, Fallocate::Allocate | Fallocate::KeepSize);
        let keeps = how != Fallocate::PunchHole;
        let _guard = self.exclusive(ino)?;
        let mut inode = self.load_file(ino)?;
        if keeps {
            self.check_space(blocks(len) + 1, 0)?;
        }
        if grows && end > inode.size.get() {
            self.before_growth(&mut inode)?;
            inode.edit().size = field(end);
        }
        if zeros {
            self.zero_range(&mut inode, offset, end)?;
        }
        if keeps {
            self.keep_space(&mut inode, offset, end)?;
        }
        let mut tx = self.tx();
        self.touch_written(who, &mut tx, &mut inode)?;
        inode.save(&mut tx)?;
        tx.publish()?;
        Ok(inode.attributes())
    }

    /// Lets a range read as zeros: whole blocks become a hole, parts of blocks are written.
    fn zero_range(&self, inode: &mut Inode, offset: u64, end: u64) -> Result<()> {
        let size = inode.size.get();
        // Within the inode there are no blocks.
        if inode.content_kind() == Some(Content::Inline) {
            let len = u64::from(inode.content_len.get());
            if self.pages.next_dirty(inode.ino, 0).is_none() {
                let (from, to) = (offset.min(len) as usize, end.min(len) as usize);
                inode.edit().content[from..to].fill(0);
                self.pages.forget(inode.ino, 0, u64::MAX);
                return Ok(());
            }
            self.write_back_whole(inode, false)?;
            if inode.content_kind() == Some(Content::Inline) {
                return self.zero_range(inode, offset, end);
            }
        }
        let (first, last) = (offset.div_ceil(BLOCK), if end >= size { blocks(end) } else { end / BLOCK });
        let part = |block: u64, from: u64, to: u64| -> Result<()> {
            let mapped =
                matches!(extent::get(&self.journal, &inode.content, block)?, Mapping::Extent(e) if !e.unwritten);
            if from < to && block * BLOCK < size && (mapped || self.pages.is_dirty(inode.ino, block)) {
                let page = self.page(inode, block)?;
                self.pages.write(inode.ino, block, || page, |page| page[from as usize..to as usize].fill(0));
            }
            Ok(())
        };
        if offset / BLOCK == (end - 1) / BLOCK && (!offset.is_multiple_of(BLOCK) || last <= offset / BLOCK) {
            part(offset / BLOCK, offset % BLOCK, (end - 1) % BLOCK + 1)?;
            return Ok(());
        }
        if !offset.is_multiple_of(BLOCK) {
            part(offset / BLOCK, offset % BLOCK, BLOCK)?;
        }
        if last < blocks(end) {
            part(last, 0, end % BLOCK)?;
        }
        if first < last {
            self.pages.forget(inode.ino, first, last);
            let mut from = first;
            loop {
                let mut tx = self.tx();
                let more = self.remove_range(&mut tx, inode, from, last, self.extents_per_tx())?;
                let Some(next) = more else {
                    inode.save(&mut tx)?;
                    tx.publish()?;
                    return Ok(());
                };
                inode.save(&mut tx)?;
                tx.publish()?;
                self.journal.make_room()?;
                from = next;
            }
        }
        Ok(())
    }

    /// Writes all dirty pages of a file back whose lock is held.
    pub(super) fn write_back_whole(&self, inode: &mut Inode, out: bool) -> Result<()> {
        let mut from = 0;
        while let Some(next) = self.pages.next_dirty(inode.ino, from) {
            from = self.write_back_some(inode, next, Few::Home, out)?;
            self.journal.make_room()?;
        }
        Ok(())
    }

    /// Gives addresses to the holes of a range, unwritten.
    fn keep_space(&self, inode: &mut Inode, offset: u64, end: u64) -> Result<()> {
        if inode.content_kind() == Some(Content::Inline) {
            if end <= CONTENT_BYTES as u64 && Self::fits_inline(inode.size.get()) {
                return Ok(());
            }
            self.leave_inode(inode)?;
        }
        let size_blocks = blocks(inode.size.get().max(end));
        let mut block = offset / BLOCK;
        let last = blocks(end);
        while block < last {
            let mut tx = self.tx();
            let before = extent::counts(&inode.content)?;
            for _ in 0..self.extents_per_tx() {
                if block >= last {
                    break;
                }
                block = match extent::get(&tx, &inode.content, block)? {
                    Mapping::Extent(extent) => extent.end(),
                    Mapping::Hole { end } => {
                        let wanted = (end.min(last) - block).min(u64::from(u32::MAX)) as u32;
                        let content = &mut inode.edit().content;
                        let ask = |tx: &mut Tx<'_>, count| tx.allocate(count);
                        extent::allocate(&mut tx, content, block, wanted, true, size_blocks, ask)?.end()
                    }
                };
            }
            self.count_extents(&mut tx, inode, before)?;
            inode.save(&mut tx)?;
            tx.publish()?;
            self.journal.make_room()?;
        }
        Ok(())
    }

    /// Lets a file have a map in its inode instead of its data.
    pub(super) fn leave_inode(&self, inode: &mut Inode) -> Result<()> {
        if inode.content_len.get() > 0 {
            let page = self.page(inode, 0)?;
            self.pages.write(inode.ino, 0, || page, |_| ());
        }
        self.write_back_whole(inode, true)?;
        if inode.content_kind() == Some(Content::Inline) {
            let body = inode.edit();
            body.set_content_kind(Content::Extents);
            body.content.fill(0);
            body.content_len = U16::ZERO;
            extent::init(&mut body.content);
        }
        Ok(())
    }

    pub(super) fn do_seek(&self, ino: Ino, offset: u64, what: Seek) -> Result<u64> {
        let _guard = self.shared(ino)?;
        let inode = self.load_file(ino)?;
        let size = inode.size.get();
        if offset >= size {
            return Err(VfsError::NoSuchAddress);
        }
        let found = match inode.content_kind() {
            Some(Content::Extents) => self.seek_blocks(&inode, offset, size, what)?,
            // Data in the inode, and what was not written back yet.
            _ => {
                let len = u64::from(inode.content_len.get());
                let in_inode = |block: u64| block == 0 && len > 0;
                self.seek_pages(inode.ino, offset, size, what, in_inode)
            }
        };
        match what {
            Seek::Hole => Ok(found.unwrap_or(size).min(size)),
            Seek::Data => found.filter(|found| *found < size).ok_or(VfsError::NoSuchAddress),
        }
    }

    fn seek_pages(&self, ino: Ino, offset: u64, size: u64, what: Seek, data: impl Fn(u64) -> bool) -> Option<u64> {
        let mut block = offset / BLOCK;
        while block < blocks(size) {
            let is_data = data(block) || self.pages.is_dirty(ino, block);
            if is_data == (what == Seek::Data) {
                return Some((block * BLOCK).max(offset));
            }
            block = match what {
                Seek::Data => self.pages.next_dirty(ino, block + 1)?,
                Seek::Hole => block + 1,
            };
        }
        None
    }

    fn seek_blocks(&self, inode: &Inode, offset: u64, size: u64, what: Seek) -> Result<Option<u64>> {
        let mut block = offset / BLOCK;
        loop {
            let mapped = extent::seek(&self.journal, &inode.content, block, what)?;
            let found = match what {
                Seek::Data => {
                    let dirty = self.pages.next_dirty(inode.ino, block);
                    mapped.into_iter().chain(dirty).min()
                }
                Seek::Hole => match mapped {
                    Some(hole) if hole * BLOCK < size && self.pages.is_dirty(inode.ino, hole) => {
                        block = hole + 1;
                        continue;
                    }
                    hole => hole,
                },
            };
            return Ok(found.map(|block| (block.min(FILE_BLOCKS_MAX) * BLOCK).max(offset)));
        }
    }
}
