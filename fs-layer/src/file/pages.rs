//! Pages of files in memory, within a budget.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::{PAGE_BYTES, Page};
use crate::int_map::IntMap;
use crate::mutex::lock;
use crate::vfs::Ino;
use crate::waiting::about_to_wait;

/// The most pages that are read ahead.
const AHEAD_MAX: u64 = 256;
const SHARDS: usize = 32;
/// So many pages written in order are worth being written back at once, while more are coming.
const STREAK: u64 = 1024;

struct Slot {
    page: Page,
    used: bool,
}

#[derive(Default)]
struct Pages {
    pages: BTreeMap<u64, Slot>,
    dirty: BTreeSet<u64>,
    /// What must be flushed for the data written back to be durable; see `Journal::ticket`.
    ticket: u64,
    /// Where a reader that goes on would go on.
    next: u64,
    ahead: u64,
    /// Whether the last block was looked at, so that it is zeros behind the end unless the file's flag says otherwise.
    tail_clean: bool,
    /// Where a writer that goes on would go on, and how many pages it wrote since they were worth being written back.
    write_next: u64,
    streak: u64,
    /// Writes of pages that are under way.
    writing: usize,
}

#[derive(Default)]
struct File {
    pages: Mutex<Pages>,
    /// Nothing is under way any more.
    written: Condvar,
}

/// A write of pages that is under way, until it is dropped.
pub struct Writing(Arc<File>);

impl Drop for Writing {
    fn drop(&mut self) {
        lock(&self.0.pages).writing -= 1;
        self.0.written.notify_all();
    }
}

/// See the module.
pub struct PageCache {
    files: Vec<Mutex<IntMap<u64, Arc<File>>>>,
    clock: Mutex<VecDeque<(u64, u64)>>,
    dirty_files: Mutex<BTreeSet<u64>>,
    pages: AtomicUsize,
    dirty: AtomicUsize,
    /// Dirty pages that have had addresses since their write began.
    placed: AtomicUsize,
    max: usize,
    /// The greatest ticket of files that were forgotten.
    ticket: AtomicU64,
}

impl PageCache {
    /// An empty one of so many bytes.
    pub fn new(bytes: usize) -> PageCache {
        PageCache {
            files: (0..SHARDS).map(|_| Mutex::default()).collect(),
            clock: Mutex::default(),
            dirty_files: Mutex::default(),
            pages: AtomicUsize::new(0),
            dirty: AtomicUsize::new(0),
            placed: AtomicUsize::new(0),
            max: (bytes / PAGE_BYTES).max(64),
            ticket: AtomicU64::new(0),
        }
    }

    /// How many pages are dirty.
    pub fn dirty_pages(&self) -> usize {
        self.dirty.load(Ordering::Relaxed)
    }

    /// Whether so many are dirty that writers should write back.
    pub fn is_full(&self) -> bool {
        self.dirty_pages() > self.max / 2
    }

    /// Files with dirty pages.
    pub fn dirty_files(&self) -> Vec<Ino> {
        lock(&self.dirty_files).iter().map(|ino| Ino(*ino)).collect()
    }

    /// A page, if it is here.
    pub fn get(&self, ino: Ino, block: u64) -> Option<Page> {
        let file = self.file(ino)?;
        let mut file = lock(&file.pages);
        let slot = file.pages.get_mut(&block)?;
        slot.used = true;
        Some(slot.page.clone())
    }

    /// Enters pages as the disk has them, from `block` on, where there are none.
    pub fn insert(&self, ino: Ino, block: u64, bytes: &[u8]) {
        let mut new = Vec::new();
        {
            let file = self.file_or_new(ino);
            let mut file = lock(&file.pages);
            for (at, bytes) in (block..).zip(bytes.as_chunks::<PAGE_BYTES>().0) {
                if let Entry::Vacant(entry) = file.pages.entry(at) {
                    entry.insert(Slot { page: Page::of(bytes), used: false });
                    new.push(at);
                }
            }
        }
        self.added(ino, &new);
    }

    /// Sets whole pages from `block` on, and makes them dirty. Returns whether so much was written in order that it should be written back.
    pub fn write_whole(&self, ino: Ino, block: u64, bytes: &[u8]) -> bool {
        let mut new = Vec::new();
        let worth = {
            let file = self.file_or_new(ino);
            let mut file = lock(&file.pages);
            let file = &mut *file;
            let was_clean = file.dirty.is_empty();
            let mut dirtied = 0;
            for (at, bytes) in (block..).zip(bytes.as_chunks::<PAGE_BYTES>().0) {
                match file.pages.entry(at) {
                    Entry::Occupied(mut slot) => slot.get_mut().page.set(bytes),
                    Entry::Vacant(entry) => {
                        entry.insert(Slot { page: Page::of(bytes), used: true });
                        new.push(at);
                    }
                }
                dirtied += usize::from(file.dirty.insert(at));
            }
            self.dirty.fetch_add(dirtied, Ordering::Relaxed);
            if was_clean && dirtied > 0 {
                lock(&self.dirty_files).insert(ino.0);
            }
            let pages = (bytes.len() / PAGE_BYTES) as u64;
            file.streak = if file.write_next == block { file.streak + pages } else { pages };
            file.write_next = block + pages;
            let worth = file.streak >= STREAK;
            if worth {
                file.streak = 0;
            }
            worth
        };
        self.added(ino, &new);
        worth
    }

    /// Changes a page, which is `base` if it is not here, and makes it dirty.
    pub fn write(&self, ino: Ino, block: u64, base: impl FnOnce() -> Page, change: impl FnOnce(&mut [u8; PAGE_BYTES])) {
        let new = {
            let file = self.file_or_new(ino);
            let mut file = lock(&file.pages);
            let mut new = false;
            let slot = file.pages.entry(block).or_insert_with(|| {
                new = true;
                Slot { page: base(), used: true }
            });
            change(slot.page.make_mut());
            if file.dirty.insert(block) {
                self.dirty.fetch_add(1, Ordering::Relaxed);
                if file.dirty.len() == 1 {
                    lock(&self.dirty_files).insert(ino.0);
                }
            }
            new
        };
        if new {
            self.added(ino, &[block]);
        }
    }

    /// Whether a page is dirty.
    pub fn is_dirty(&self, ino: Ino, block: u64) -> bool {
        self.file(ino).is_some_and(|file| lock(&file.pages).dirty.contains(&block))
    }

    /// Dirty pages from a block on, in order, at most `max`.
    pub fn dirty(&self, ino: Ino, from: u64, max: usize) -> Vec<(u64, Page)> {
        let Some(file) = self.file(ino) else { return Vec::new() };
        let file = lock(&file.pages);
        file.dirty.range(from..).take(max).map(|block| (*block, file.pages[block].page.clone())).collect()
    }

    /// The first dirty page at or after `from`.
    pub fn next_dirty(&self, ino: Ino, from: u64) -> Option<u64> {
        let file = self.file(ino)?;
        let file = lock(&file.pages);
        file.dirty.range(from..).next().copied()
    }

    /// Notes that pages of a file are being written to the disk, without its lock.
    pub fn begin_writing(&self, ino: Ino) -> Writing {
        let file = self.file_or_new(ino);
        lock(&file.pages).writing += 1;
        Writing(file)
    }

    /// Waits until no pages of a file are being written to the disk. With its lock held exclusively, none will be.
    pub fn wait_written(&self, ino: Ino) {
        let Some(file) = self.file(ino) else { return };
        let mut pages = lock(&file.pages);
        while pages.writing > 0 {
            about_to_wait();
            pages = file.written.wait(pages).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// How many of these pages, which follow each other, are still what they were, and dirty.
    pub fn unchanged(&self, ino: Ino, pages: &[(u64, Page)]) -> usize {
        let Some(file) = self.file(ino) else { return 0 };
        let file = lock(&file.pages);
        let is_same = |(block, page): &&(u64, Page)| {
            file.dirty.contains(block) && file.pages.get(block).is_some_and(|slot| slot.page.is_same(page))
        };
        pages.iter().take_while(is_same).count()
    }

    /// Notes that so many dirty pages have addresses now, so that their space is counted already.
    pub fn placed(&self, pages: usize) {
        self.placed.fetch_add(pages, Ordering::Relaxed);
    }

    /// Takes that back: they are not dirty any more, or no longer known to be placed.
    pub fn unplaced(&self, pages: usize) {
        self.placed.fetch_sub(pages, Ordering::Relaxed);
    }

    /// Dirty pages whose space is not counted yet.
    pub fn unplaced_pages(&self) -> usize {
        self.dirty_pages().saturating_sub(self.placed.load(Ordering::Relaxed))
    }

    /// How many pages of a file are dirty.
    pub fn dirty_of(&self, ino: Ino) -> usize {
        self.file(ino).map_or(0, |file| lock(&file.pages).dirty.len())
    }

    /// Says that pages were written to the disk, and which flush makes that durable.
    pub fn clean(&self, ino: Ino, blocks: impl Iterator<Item = u64>, ticket: u64) {
        let Some(file) = self.file(ino) else { return };
        let mut file = lock(&file.pages);
        for block in blocks {
            if file.dirty.remove(&block) {
                self.dirty.fetch_sub(1, Ordering::Relaxed);
            }
        }
        file.ticket = file.ticket.max(ticket);
        if file.dirty.is_empty() {
            lock(&self.dirty_files).remove(&ino.0);
        }
    }

    /// Forgets pages that are not dirty.
    pub fn forget_clean(&self, ino: Ino, blocks: impl Iterator<Item = u64>) {
        let Some(file) = self.file(ino) else { return };
        let mut file = lock(&file.pages);
        let mut gone = 0;
        for block in blocks {
            if !file.dirty.contains(&block) && file.pages.remove(&block).is_some() {
                gone += 1;
            }
        }
        self.pages.fetch_sub(gone, Ordering::Relaxed);
    }

    /// The flush that makes durable what was written back of a file; 0 if nothing was.
    pub fn ticket(&self, ino: Ino) -> u64 {
        self.file(ino).map_or_else(|| self.ticket.load(Ordering::Relaxed), |file| lock(&file.pages).ticket)
    }

    /// Forgets pages from `from` up to (not with) `to`, dirty ones too.
    pub fn forget(&self, ino: Ino, from: u64, to: u64) {
        let Some(file) = self.file(ino) else { return };
        let mut file = lock(&file.pages);
        let gone: Vec<u64> = file.pages.range(from..to).map(|(block, _)| *block).collect();
        for block in &gone {
            file.pages.remove(block);
            if file.dirty.remove(block) {
                self.dirty.fetch_sub(1, Ordering::Relaxed);
            }
        }
        self.pages.fetch_sub(gone.len(), Ordering::Relaxed);
        if file.dirty.is_empty() {
            lock(&self.dirty_files).remove(&ino.0);
        }
    }

    /// Forgets a file that is gone.
    pub fn forget_file(&self, ino: Ino) {
        self.forget(ino, 0, u64::MAX);
        if let Some(file) = lock(self.shard(ino)).remove(&ino.0) {
            self.ticket.fetch_max(lock(&file.pages).ticket, Ordering::Relaxed);
        }
    }

    /// Whether [`PageCache::set_tail_clean`] was called.
    pub fn is_tail_clean(&self, ino: Ino) -> bool {
        self.file(ino).is_some_and(|file| lock(&file.pages).tail_clean)
    }

    /// Notes that the file's last block is zeros behind its end.
    pub fn set_tail_clean(&self, ino: Ino) {
        lock(&self.file_or_new(ino).pages).tail_clean = true;
    }

    /// How many blocks to read at `block`, where `wanted` are asked for: more for who reads on where he left off.
    pub fn read_ahead(&self, ino: Ino, block: u64, wanted: u64) -> u64 {
        let file = self.file_or_new(ino);
        let mut file = lock(&file.pages);
        let goes_on = block == file.next && block > 0 || block == 0 && wanted > 8;
        file.ahead = if goes_on { (file.ahead * 2).clamp(16, AHEAD_MAX) } else { 0 };
        let count = wanted + file.ahead;
        file.next = block + count;
        count
    }

    fn added(&self, ino: Ino, blocks: &[u64]) {
        if blocks.is_empty() {
            return;
        }
        let pages = self.pages.fetch_add(blocks.len(), Ordering::Relaxed) + blocks.len();
        let entries = {
            let mut clock = lock(&self.clock);
            clock.extend(blocks.iter().map(|block| (ino.0, *block)));
            clock.len()
        };
        // Entries of pages that were forgotten otherwise stay in the clock.
        if pages > self.max || entries > 4 * self.max {
            self.evict(blocks.len());
        }
    }

    /// Forgets so many pages, or fewer if most are in use.
    fn evict(&self, count: usize) {
        let mut left = count;
        for _ in 0..8 * count {
            let Some((ino, block)) = lock(&self.clock).pop_front() else { return };
            let Some(file) = self.file(Ino(ino)) else { continue };
            let mut file = lock(&file.pages);
            let dirty = file.dirty.contains(&block);
            let Some(slot) = file.pages.get_mut(&block) else { continue };
            if dirty || slot.used {
                slot.used = false;
                lock(&self.clock).push_back((ino, block));
                continue;
            }
            file.pages.remove(&block);
            left -= 1;
            if self.pages.fetch_sub(1, Ordering::Relaxed) <= self.max + 1 || left == 0 {
                return;
            }
        }
    }

    fn shard(&self, ino: Ino) -> &Mutex<IntMap<u64, Arc<File>>> {
        &self.files[(ino.0 % SHARDS as u64) as usize]
    }

    fn file(&self, ino: Ino) -> Option<Arc<File>> {
        lock(self.shard(ino)).get(&ino.0).cloned()
    }

    fn file_or_new(&self, ino: Ino) -> Arc<File> {
        lock(self.shard(ino)).entry(ino.0).or_default().clone()
    }
}
