//! Pages of files in memory, within a budget.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::disk::BLOCK_BYTES;
use crate::journal::IntMap;
use crate::vfs::Ino;

/// Bytes of a page: a block.
pub const PAGE_BYTES: usize = BLOCK_BYTES;

/// The contents of a block of a file.
pub type Page = Arc<[u8; PAGE_BYTES]>;

/// The most pages that are read ahead.
const AHEAD_MAX: u64 = 256;
const SHARDS: usize = 32;

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
}

/// See the module.
pub struct PageCache {
    files: Vec<Mutex<IntMap<u64, Arc<Mutex<Pages>>>>>,
    clock: Mutex<VecDeque<(u64, u64)>>,
    dirty_files: Mutex<BTreeSet<u64>>,
    pages: AtomicUsize,
    dirty: AtomicUsize,
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
        let mut file = lock(&file);
        let slot = file.pages.get_mut(&block)?;
        slot.used = true;
        Some(slot.page.clone())
    }

    /// Enters a page as the disk has it, unless there is one.
    pub fn insert(&self, ino: Ino, block: u64, page: Page) {
        {
            let file = self.file_or_new(ino);
            let mut file = lock(&file);
            if file.pages.contains_key(&block) {
                return;
            }
            file.pages.insert(block, Slot { page, used: false });
        }
        self.added(ino, block);
    }

    /// Changes a page, which is `base` if it is not here, and makes it dirty.
    pub fn write(&self, ino: Ino, block: u64, base: impl FnOnce() -> Page, change: impl FnOnce(&mut [u8; PAGE_BYTES])) {
        let new = {
            let file = self.file_or_new(ino);
            let mut file = lock(&file);
            let mut new = false;
            let slot = file.pages.entry(block).or_insert_with(|| {
                new = true;
                Slot { page: base(), used: true }
            });
            change(Arc::make_mut(&mut slot.page));
            if file.dirty.insert(block) {
                self.dirty.fetch_add(1, Ordering::Relaxed);
                if file.dirty.len() == 1 {
                    lock(&self.dirty_files).insert(ino.0);
                }
            }
            new
        };
        if new {
            self.added(ino, block);
        }
    }

    /// Whether a page is dirty.
    pub fn is_dirty(&self, ino: Ino, block: u64) -> bool {
        self.file(ino).is_some_and(|file| lock(&file).dirty.contains(&block))
    }

    /// Dirty pages from a block on, in order, at most `max`.
    pub fn dirty(&self, ino: Ino, from: u64, max: usize) -> Vec<(u64, Page)> {
        let Some(file) = self.file(ino) else { return Vec::new() };
        let file = lock(&file);
        file.dirty.range(from..).take(max).map(|block| (*block, file.pages[block].page.clone())).collect()
    }

    /// The first dirty page at or after `from`.
    pub fn next_dirty(&self, ino: Ino, from: u64) -> Option<u64> {
        let file = self.file(ino)?;
        let file = lock(&file);
        file.dirty.range(from..).next().copied()
    }

    /// Says that pages were written to the disk, and which flush makes that durable.
    pub fn clean(&self, ino: Ino, blocks: impl Iterator<Item = u64>, ticket: u64) {
        let Some(file) = self.file(ino) else { return };
        let mut file = lock(&file);
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

    /// The flush that makes durable what was written back of a file; 0 if nothing was.
    pub fn ticket(&self, ino: Ino) -> u64 {
        self.file(ino).map_or_else(|| self.ticket.load(Ordering::Relaxed), |file| lock(&file).ticket)
    }

    /// Forgets pages from `from` up to (not with) `to`, dirty ones too.
    pub fn forget(&self, ino: Ino, from: u64, to: u64) {
        let Some(file) = self.file(ino) else { return };
        let mut file = lock(&file);
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
            self.ticket.fetch_max(lock(&file).ticket, Ordering::Relaxed);
        }
    }

    /// Whether [`PageCache::set_tail_clean`] was called.
    pub fn is_tail_clean(&self, ino: Ino) -> bool {
        self.file(ino).is_some_and(|file| lock(&file).tail_clean)
    }

    /// Notes that the file's last block is zeros behind its end.
    pub fn set_tail_clean(&self, ino: Ino) {
        lock(&self.file_or_new(ino)).tail_clean = true;
    }

    /// How many blocks to read at `block`, where `wanted` are asked for: more for who reads on where he left off.
    pub fn read_ahead(&self, ino: Ino, block: u64, wanted: u64) -> u64 {
        let file = self.file_or_new(ino);
        let mut file = lock(&file);
        let goes_on = block == file.next && block > 0 || block == 0 && wanted > 8;
        file.ahead = if goes_on { (file.ahead * 2).clamp(16, AHEAD_MAX) } else { 0 };
        let count = wanted + file.ahead;
        file.next = block + count;
        count
    }

    fn added(&self, ino: Ino, block: u64) {
        let pages = self.pages.fetch_add(1, Ordering::Relaxed) + 1;
        let entries = {
            let mut clock = lock(&self.clock);
            clock.push_back((ino.0, block));
            clock.len()
        };
        // Entries of pages that were forgotten otherwise stay in the clock.
        if pages <= self.max && entries <= 4 * self.max {
            return;
        }
        for _ in 0..8 {
            let Some((ino, block)) = lock(&self.clock).pop_front() else { return };
            let Some(file) = self.file(Ino(ino)) else { continue };
            let mut file = lock(&file);
            let dirty = file.dirty.contains(&block);
            let Some(slot) = file.pages.get_mut(&block) else { continue };
            if dirty || slot.used {
                slot.used = false;
                lock(&self.clock).push_back((ino, block));
                continue;
            }
            file.pages.remove(&block);
            if self.pages.fetch_sub(1, Ordering::Relaxed) <= self.max + 1 {
                return;
            }
        }
    }

    fn shard(&self, ino: Ino) -> &Mutex<IntMap<u64, Arc<Mutex<Pages>>>> {
        &self.files[(ino.0 % SHARDS as u64) as usize]
    }

    fn file(&self, ino: Ino) -> Option<Arc<Mutex<Pages>>> {
        lock(self.shard(ino)).get(&ino.0).cloned()
    }

    fn file_or_new(&self, ino: Ino) -> Arc<Mutex<Pages>> {
        lock(self.shard(ino)).entry(ino.0).or_default().clone()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
