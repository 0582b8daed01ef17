//! Clean blocks in memory, for hot reads.

use quick_cache::unsync::Cache;

use crate::types::{BLOCK, Lba};

/// A bounded cache of whole blocks. Only clean content lives here; the dirty map is asked first.
pub struct BlockCache {
    cache: Cache<Lba, Box<[u8; BLOCK]>>,
    capacity: usize,
}

impl BlockCache {
    /// A cache of at most `bytes`.
    pub fn new(bytes: usize) -> Self {
        let capacity = bytes / BLOCK;
        Self { cache: Cache::new(capacity.max(1)), capacity }
    }

    /// Changes the limit. What is over it leaves at once.
    pub fn resize(&mut self, bytes: usize) {
        self.capacity = bytes / BLOCK;
        self.cache.set_capacity(self.capacity.max(1) as u64);
    }

    /// A block, if it is here.
    pub fn get(&self, lba: Lba) -> Option<&[u8; BLOCK]> {
        self.cache.get(&lba).map(|block| &**block)
    }

    /// Keeps a clean block.
    pub fn insert(&mut self, lba: Lba, block: &[u8]) {
        if self.capacity == 0 {
            return;
        }
        let mut copy = Box::new([0; BLOCK]);
        copy.copy_from_slice(block);
        self.cache.insert(lba, copy);
    }

    /// Forgets a range because newer content was accepted. Costs the smaller of the range and the cache.
    pub fn forget(&mut self, lba: Lba, blocks: u64) {
        if self.cache.is_empty() {
            return;
        }
        if blocks <= self.cache.len() as u64 {
            for lba in lba..lba + blocks {
                self.cache.remove(&lba);
            }
        } else {
            self.cache.retain(|&key, _| !(lba..lba + blocks).contains(&key));
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.cache.len() * BLOCK
    }
}

impl std::fmt::Debug for BlockCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockCache({} of {} blocks)", self.cache.len(), self.capacity)
    }
}
