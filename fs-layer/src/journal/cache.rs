//! The cache of metadata blocks as they are now.
//!
//! A block that is newer than on its home place is *pinned*: it stays until its newest image is home. What is not pinned can be forgotten at any
//! time. Readers hold the lock of the inode that a block belongs to, so that nobody publishes a block while another reads it from the disk.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasherDefault, Hasher};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Image;
use crate::blocks::{BlockKind, Body};
use crate::disk::{BLOCK_BYTES, BlockAddress, Disk};
use crate::layout::{Opened, open};
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
}

/// See the module.
pub struct BlockCache {
    disk: Arc<dyn Disk>,
    filesystem: [u8; 8],
    shards: Vec<Mutex<Shard>>,
    shard_max: usize,
}

impl BlockCache {
    /// An empty cache of so many bytes.
    pub fn new(disk: Arc<dyn Disk>, filesystem: [u8; 8], bytes: usize) -> BlockCache {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        BlockCache { disk, filesystem, shards, shard_max: (bytes / BLOCK_BYTES / SHARDS).max(8) }
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
        let mut block = [0; BLOCK_BYTES];
        self.disk.read(at, &mut block).map_err(|e| damaged(at, kind, &e.to_string()))?;
        match open(Some(self.filesystem), at, kind, &block) {
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
        let new = Entry { image, pinned: true, used: true, changed_in: sequence };
        if shard.entries.insert(at, new).is_none() {
            shard.clock.push_back(at);
            shard.shrink(self.shard_max);
        }
    }

    /// Lets go of a block of which this version is home; of a newer one not.
    pub(super) fn unpin(&self, at: BlockAddress, version: u64) {
        if let Some(entry) = self.shard(at).entries.get_mut(&at)
            && entry.image.as_ref().is_some_and(|image| image.version == version)
        {
            entry.pinned = false;
            entry.changed_in = 0;
        }
    }

    /// Forgets a block that was freed and is discarded.
    pub(super) fn forget(&self, at: BlockAddress) {
        let mut shard = self.shard(at);
        if let Some(entry) = shard.entries.get_mut(&at)
            && entry.image.is_none()
        {
            entry.pinned = false;
            entry.used = false;
        }
    }

    /// The transaction that last changed a pinned block, else 0.
    pub(super) fn changed_in(&self, at: BlockAddress) -> u64 {
        self.shard(at).entries.get(&at).map_or(0, |entry| entry.changed_in)
    }

    fn shard(&self, at: BlockAddress) -> MutexGuard<'_, Shard> {
        let index = (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 59) as usize;
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
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
