//! The cache of metadata blocks as they are now.
//!
//! A block that is newer than on its home place is *pinned*: it stays until its newest image is home. What is not pinned can be forgotten at any
//! time. Readers hold the lock of the inode that a block belongs to, so that nobody publishes a block while another reads it from the disk.
//!
//! Who reads blocks that are near each other gets their neighbours along, in one request. Nobody holds the locks of those: they are entered only if
//! they were not here, and nothing that could have been theirs was published, brought home or freed since before they were read. Where inodes are
//! read group after group, a thread reads the next ones ahead ([`BlockCache::run_ahead`]), the same way.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use blockd::buf::AlignedBuf;

use super::Image;
use crate::blocks::{BlockKind, Body};
use crate::disk::{BLOCK_BYTES, BlockAddress, Disk};
use crate::layout::{Opened, RawBlock, open};
use crate::vfs::{Result, VfsError};

/// Hashes numbers that are well spread after one multiplication.
#[derive(Default)]
pub struct IntHasher(u64);

impl Hasher for IntHasher {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    fn write_u64(&mut self, number: u64) {
        let mixed = (self.0 ^ number).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        self.0 = mixed ^ (mixed >> 32);
    }
}

/// A map of numbers; the same order in each run.
pub type IntMap<K, V> = HashMap<K, V, BuildHasherDefault<IntHasher>>;

const SHARDS: usize = 32;

/// Blocks that are near the last one that was read: its neighbours may be next.
const NEAR: u64 = 4096;
/// How many blocks are read at once where that seems worth it: so few that a disk which reads ahead by itself, as a file does, is not waited for.
const GROUP: u64 = 16;

/// The most groups that are read ahead.
const AHEAD_MAX: u64 = 16;

struct Entry {
    /// `None`: freed, and to be discarded.
    image: Option<Image>,
    pinned: bool,
    used: bool,
    /// The transaction that last changed it.
    changed_in: u64,
}

#[derive(Default)]
struct Shard {
    entries: IntMap<BlockAddress, Entry>,
    clock: VecDeque<BlockAddress>,
    /// How often something of this shard was published, brought home or freed.
    changes: u64,
}

/// See the module.
pub struct BlockCache {
    disk: Arc<dyn Disk>,
    filesystem: [u8; 8],
    shards: Vec<Mutex<Shard>>,
    shard_max: usize,
    inodes: Nearby,
    directories: Nearby,
    ahead: Mutex<Ahead>,
    ahead_changed: Condvar,
}

/// Inodes to be read ahead.
#[derive(Default)]
struct Ahead {
    /// Where the next miss is if the reader goes on in order.
    expected: BlockAddress,
    /// How many groups were asked for ahead of that.
    groups: u64,
    wanted: Range<BlockAddress>,
    /// Whether a thread reads them.
    runs: bool,
    ended: bool,
}

impl Ahead {
    /// A group was not here. Returns whether something is to be read ahead.
    fn missed(&mut self, first: BlockAddress, blocks: u64) -> bool {
        let asked = self.groups * GROUP;
        if first < self.expected && first + asked >= self.expected {
            // It is on its way.
            return false;
        }
        self.groups = if first == self.expected { (self.groups * 2).clamp(2, AHEAD_MAX) } else { 0 };
        let from = first + GROUP;
        self.expected = from + self.groups * GROUP;
        if self.groups == 0 || !self.runs {
            return false;
        }
        self.wanted = from.min(blocks)..self.expected.min(blocks);
        true
    }
}

/// Where blocks of a kind were read last.
#[derive(Default)]
struct Nearby {
    last: AtomicU64,
}

impl Nearby {
    /// What to read where `at` is wanted: the first block, and how many.
    fn group(&self, at: BlockAddress, blocks: u64) -> (BlockAddress, u64) {
        let last = self.last.swap(at, Ordering::Relaxed);
        if last == 0 || at.abs_diff(last) > NEAR {
            return (at, 1);
        }
        let first = at & !(GROUP - 1);
        let end = (first + GROUP).min(blocks).max(at + 1);
        (first, end - first)
    }
}

impl BlockCache {
    /// An empty cache of so many bytes.
    pub fn new(disk: Arc<dyn Disk>, filesystem: [u8; 8], bytes: usize) -> BlockCache {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        let shard_max = (bytes / BLOCK_BYTES / SHARDS).max(8);
        BlockCache {
            disk,
            filesystem,
            shards,
            shard_max,
            inodes: Nearby::default(),
            directories: Nearby::default(),
            ahead: Mutex::default(),
            ahead_changed: Condvar::new(),
        }
    }

    /// The body of a block that must be there.
    pub fn read(&self, at: BlockAddress, kind: BlockKind) -> Result<Arc<Body>> {
        match self.get(at, kind)? {
            Some(image) => Ok(image.body),
            None => Err(damaged(at, kind, "it is empty")),
        }
    }

    /// A block; `None` if it was never written or is freed.
    pub(super) fn get(&self, at: BlockAddress, kind: BlockKind) -> Result<Option<Image>> {
        if let Some(entry) = self.shard(at).entries.get_mut(&at) {
            entry.used = true;
            return match &entry.image {
                Some(image) if image.kind != kind => Err(damaged(at, kind, &format!("it is of kind {:?}", image.kind))),
                image => Ok(image.clone()),
            };
        }
        let nearby = match kind {
            BlockKind::Inode => &self.inodes,
            BlockKind::Directory => &self.directories,
            _ => return self.load(at, kind),
        };
        match nearby.group(at, self.disk.blocks()) {
            (_, 1) => self.load(at, kind),
            (first, count) => {
                if kind == BlockKind::Inode && self.lock_ahead().missed(first, self.disk.blocks()) {
                    self.ahead_changed.notify_one();
                }
                self.load_group(at, kind, first, count)
            }
        }
    }

    /// A block from the disk.
    fn load(&self, at: BlockAddress, kind: BlockKind) -> Result<Option<Image>> {
        let mut block = [0; BLOCK_BYTES];
        self.disk.read(at, &mut block).map_err(|e| damaged(at, kind, &e.to_string()))?;
        self.enter(at, kind, &block)
    }

    /// The same, with its neighbours as far as they are of the same kind.
    fn load_group(&self, at: BlockAddress, kind: BlockKind, first: BlockAddress, count: u64) -> Result<Option<Image>> {
        let Some(blocks) = self.load_neighbours(Some(at), kind, first, count) else {
            // It may be a neighbour's fault.
            return self.load(at, kind);
        };
        let block = blocks[(at - first) as usize * BLOCK_BYTES..].first_chunk().expect("the group holds the block");
        self.enter(at, kind, block)
    }

    /// Reads blocks, and enters those of this kind but for `at`, of which no locks are held.
    fn load_neighbours(
        &self,
        at: Option<BlockAddress>,
        kind: BlockKind,
        first: BlockAddress,
        count: u64,
    ) -> Option<AlignedBuf> {
        let before: Vec<u64> = (0..SHARDS).map(|index| self.shard_at(index).changes).collect();
        let mut blocks = AlignedBuf::for_overwrite(count as usize * BLOCK_BYTES);
        self.disk.read(first, &mut blocks).ok()?;
        for (neighbour, block) in (first..).zip(blocks.as_chunks::<BLOCK_BYTES>().0) {
            if Some(neighbour) == at || self.shard(neighbour).entries.contains_key(&neighbour) {
                continue;
            }
            // What is damaged says so when somebody asks for it.
            let Opened::Sound { version, body } = open(Some(self.filesystem), neighbour, kind, block) else { continue };
            let image = Image { kind, version, body: Arc::new(*body) };
            let index = shard_of(neighbour);
            let mut shard = self.shard_at(index);
            if shard.changes == before[index] && !shard.entries.contains_key(&neighbour) {
                let new = Entry { image: Some(image), pinned: false, used: false, changed_in: 0 };
                shard.entries.insert(neighbour, new);
                shard.clock.push_back(neighbour);
                shard.shrink(self.shard_max);
            }
        }
        Some(blocks)
    }

    /// Reads inodes ahead of who reads them in order, until [`BlockCache::end_ahead`]; for a thread of its own.
    pub(super) fn run_ahead(&self) {
        let mut ahead = self.lock_ahead();
        ahead.runs = true;
        while !ahead.ended {
            let first = ahead.wanted.start;
            let count = (ahead.wanted.end.saturating_sub(first)).min(GROUP);
            if count == 0 {
                ahead = self.ahead_changed.wait(ahead).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            ahead.wanted.start += count;
            drop(ahead);
            // What can't be read says so when somebody asks for it.
            let _ = self.load_neighbours(None, BlockKind::Inode, first, count);
            ahead = self.lock_ahead();
        }
        ahead.runs = false;
    }

    /// Ends [`BlockCache::run_ahead`].
    pub(super) fn end_ahead(&self) {
        self.lock_ahead().ended = true;
        self.ahead_changed.notify_all();
    }

    fn lock_ahead(&self) -> MutexGuard<'_, Ahead> {
        self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block that was read from the disk under the lock of what it belongs to.
    fn enter(&self, at: BlockAddress, kind: BlockKind, block: &RawBlock) -> Result<Option<Image>> {
        match open(Some(self.filesystem), at, kind, block) {
            Opened::Empty => Ok(None),
            Opened::Damaged(why) => Err(damaged(at, kind, &why)),
            Opened::Sound { version, body } => {
                let image = Image { kind, version, body: Arc::new(*body) };
                let mut shard = self.shard(at);
                let new = Entry { image: Some(image), pinned: false, used: false, changed_in: 0 };
                let entry = shard.entries.entry(at).or_insert(new);
                let image = entry.image.clone();
                shard.clock.push_back(at);
                shard.shrink(self.shard_max);
                Ok(image)
            }
        }
    }

    /// Shows and pins what was published in transaction `sequence`.
    pub(super) fn put(&self, at: BlockAddress, image: Option<Image>, sequence: u64) {
        let mut shard = self.shard(at);
        shard.changes += 1;
        let new = Entry { image, pinned: true, used: true, changed_in: sequence };
        if shard.entries.insert(at, new).is_none() {
            shard.clock.push_back(at);
            shard.shrink(self.shard_max);
        }
    }

    /// Lets go of a block of which this version is home; of a newer one not.
    pub(super) fn unpin(&self, at: BlockAddress, version: u64) {
        let mut shard = self.shard(at);
        shard.changes += 1;
        if let Some(entry) = shard.entries.get_mut(&at)
            && entry.image.as_ref().is_some_and(|image| image.version == version)
        {
            entry.pinned = false;
            entry.changed_in = 0;
        }
    }

    /// Forgets a block that was freed and is discarded.
    pub(super) fn forget(&self, at: BlockAddress) {
        let mut shard = self.shard(at);
        shard.changes += 1;
        if let Some(entry) = shard.entries.get_mut(&at)
            && entry.image.is_none()
        {
            entry.pinned = false;
            entry.used = false;
        }
    }

    /// The version of a block as far as that is known here, else 0.
    pub(super) fn version(&self, at: BlockAddress) -> u64 {
        let shard = self.shard(at);
        shard.entries.get(&at).and_then(|entry| entry.image.as_ref()).map_or(0, |image| image.version)
    }

    /// The transaction that last changed a pinned block, else 0.
    pub(super) fn changed_in(&self, at: BlockAddress) -> u64 {
        self.shard(at).entries.get(&at).map_or(0, |entry| entry.changed_in)
    }

    fn shard(&self, at: BlockAddress) -> MutexGuard<'_, Shard> {
        self.shard_at(shard_of(at))
    }

    fn shard_at(&self, index: usize) -> MutexGuard<'_, Shard> {
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn shard_of(at: BlockAddress) -> usize {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 59) as usize
}

impl Shard {
    /// Forgets what was not used lately until there are at most `max` entries, as far as they are not pinned.
    fn shrink(&mut self, max: usize) {
        let mut looks = 8;
        while self.entries.len() > max && looks > 0 {
            looks -= 1;
            let Some(at) = self.clock.pop_front() else { return };
            let Some(entry) = self.entries.get_mut(&at) else { continue };
            if entry.pinned || entry.used {
                entry.used = false;
                self.clock.push_back(at);
            } else {
                self.entries.remove(&at);
            }
        }
    }
}

fn damaged(at: BlockAddress, kind: BlockKind, why: &str) -> VfsError {
    tracing::error!(block = at, ?kind, why, "a metadata block can't be read");
    VfsError::Io(format!("metadata block {at} ({kind:?}) can't be read: {why}; run `fsd check`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_is_read_ahead_the_longer_it_is_read_in_order() {
        let mut ahead = Ahead { runs: true, ..Ahead::default() };
        let mut next = 100 * GROUP;
        assert!(!ahead.missed(next, u64::MAX));
        next += GROUP;
        for groups in [2, 4, 8, 16, 16] {
            assert!(ahead.missed(next, u64::MAX), "{groups}");
            assert_eq!(ahead.wanted, next + GROUP..next + (1 + groups) * GROUP);
            // The reader was faster than the thread.
            assert!(!ahead.missed(next + 2 * GROUP, u64::MAX));
            next += (1 + groups) * GROUP;
        }
        assert!(!ahead.missed(7 * GROUP, u64::MAX));
        // The disk ends.
        assert!(ahead.missed(8 * GROUP, 10 * GROUP));
        assert_eq!(ahead.wanted, 9 * GROUP..10 * GROUP);
    }
}
