//! Clean blocks in memory, for hot reads.

use std::hash::{BuildHasherDefault, Hasher};

use quick_cache::UnitWeighter;
use quick_cache::unsync::Cache;

use crate::types::{BLOCK, Lba};

/// Mixes a block address the same way in every run, so that a simulated run evicts what it evicted before.
#[derive(Default)]
struct LbaHasher(u64);

impl Hasher for LbaHasher {
    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.write_u64(u64::from(*byte));
        }
    }

    /// The finalizer of SplitMix64: every bit of the address reaches every bit of the hash.
    fn write_u64(&mut self, lba: u64) {
        let mut x = (self.0 ^ lba).wrapping_add(0x9E37_79B9_7F4A_7C15);
        x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        self.0 = x ^ (x >> 31);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

/// A bounded cache of whole blocks. Only clean content lives here; the dirty map is asked first.
pub struct BlockCache {
    cache: Cache<Lba, Box<[u8; BLOCK]>, UnitWeighter, BuildHasherDefault<LbaHasher>>,
    capacity: usize,
}

impl BlockCache {
    /// A cache of at most `bytes`.
    pub fn new(bytes: usize) -> Self {
        let capacity = bytes / BLOCK;
        let items = capacity.max(1);
        let cache = Cache::with(items, items as u64, UnitWeighter, BuildHasherDefault::default(), Default::default());
        Self { cache, capacity }
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
