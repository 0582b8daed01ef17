//! Clean blocks in memory, for hot reads.
//!
//! Two kinds of entries share one budget: single blocks, and *pieces*, which are runs of neighbours as one fetch brought them, kept
//! without copying them. A block may stand in an entry of each kind; what either says of it is its content.
//!
//! Pieces that a long reader has passed can be let go, see [`BlockCache::let_go`]. What is fetched again after that was needed
//! twice, and stays.

use std::cell::Cell;
use std::hash::{BuildHasherDefault, Hasher};

use bytes::Bytes;
use quick_cache::unsync::Cache;
use quick_cache::{OptionsBuilder, Weighter};

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

/// Blocks of the address range that one piece may cover; pieces are found by it.
pub const PIECE_BLOCKS: u64 = 256;
/// Fewer neighbours than this are kept as single blocks.
const PIECE_BLOCKS_MIN: u64 = 32;
/// A piece keeps all of the memory it came in, so it must be at least this part of it, or is copied.
const PIECE_PART_MIN: usize = 4;
/// A cache must have room for this many pieces to keep any.
const PIECES_MIN: usize = 32;
/// What is left of the budget for entries that were not asked for again yet: enough for what is read ahead of a few
/// sequential readers, see `Volume::readahead_limit`.
const PROVEN_PART: f64 = 0.75;
/// Stretches of [`PIECE_BLOCKS`] of which the cache remembers that it let them go: 16 GiB in order.
const LET_GO_REMEMBERED: usize = 1 << 14;
/// Set in the keys of pieces; addresses of blocks end far below.
const PIECE_KEY: u64 = 1 << 63;

enum Entry {
    Block(Box<[u8; BLOCK]>),
    Piece(Box<Piece>),
}

/// Blocks side by side in memory.
#[derive(Clone, Copy)]
pub struct Run<'a> {
    /// Their content.
    pub bytes: &'a [u8],
    /// What it is a part of, if it can be kept by others too.
    pub kept: Option<&'a Bytes>,
}

/// Neighbouring blocks in one stretch of [`PIECE_BLOCKS`].
struct Piece {
    /// The first block.
    lba: Lba,
    bytes: Bytes,
    /// Which blocks, counted from the first, are still what the volume holds.
    valid: [u64; PIECE_BLOCKS as usize / 64],
    /// Blocks of it that were found so far, each as often as it was.
    found: Cell<u32>,
    /// It was fetched before, and let go.
    again: bool,
}

impl Piece {
    fn key(lba: Lba) -> u64 {
        PIECE_KEY | (lba / PIECE_BLOCKS)
    }

    fn blocks(&self) -> u64 {
        (self.bytes.len() / BLOCK) as u64
    }

    /// Number of the block in the piece, if it is there and valid.
    fn find(&self, lba: Lba) -> Option<usize> {
        let at = lba.checked_sub(self.lba).filter(|at| *at < self.blocks())? as usize;
        self.is_valid(at).then_some(at)
    }

    fn is_valid(&self, at: usize) -> bool {
        self.valid[at / 64] & (1 << (at % 64)) != 0
    }

    fn set_valid(&mut self, at: usize, valid: bool) {
        let bit = 1 << (at % 64);
        if valid {
            self.valid[at / 64] |= bit;
        } else {
            self.valid[at / 64] &= !bit;
        }
    }

    fn valid_blocks(&self) -> u32 {
        self.valid.iter().map(|bits| bits.count_ones()).sum()
    }

    /// Up to `blocks` valid blocks from `lba` on.
    fn run(&self, lba: Lba, blocks: u64) -> Option<Run<'_>> {
        let from = self.find(lba)?;
        let most = (self.blocks() as usize).min(from + blocks as usize);
        let to = (from + 1..most).find(|at| !self.is_valid(*at)).unwrap_or(most);
        self.found.set(self.found.get().saturating_add((to - from) as u32));
        Some(Run { bytes: &self.bytes[from * BLOCK..to * BLOCK], kept: Some(&self.bytes) })
    }
}

/// An entry weighs its blocks.
#[derive(Clone)]
struct ByBlocks;

impl Weighter<u64, Entry> for ByBlocks {
    fn weight(&self, _: &u64, entry: &Entry) -> u64 {
        match entry {
            Entry::Block(_) => 1,
            Entry::Piece(piece) => piece.blocks(),
        }
    }
}

/// A bounded cache of whole blocks. Only clean content lives here; the dirty map is asked first.
pub struct BlockCache {
    cache: Cache<u64, Entry, ByBlocks, BuildHasherDefault<LbaHasher>>,
    capacity: usize,
    /// Whether there ever was a piece.
    has_pieces: bool,
    /// Pieces that were let go: one more than the number of the stretch, in the place of that number. Made when it is needed.
    let_go: Vec<u64>,
}

impl BlockCache {
    /// A cache of at most `bytes`.
    pub fn new(bytes: usize) -> Self {
        let capacity = bytes / BLOCK;
        let items = capacity.max(1);
        let options = OptionsBuilder::new()
            .estimated_items_capacity(items)
            .weight_capacity(items as u64)
            .hot_allocation(PROVEN_PART)
            .build()
            .expect("the capacity is said");
        let cache = Cache::with_options(options, ByBlocks, BuildHasherDefault::default(), Default::default());
        Self { cache, capacity, has_pieces: false, let_go: Vec::new() }
    }

    /// Changes the limit. What is over it leaves at once.
    pub fn resize(&mut self, bytes: usize) {
        self.capacity = bytes / BLOCK;
        self.cache.set_capacity(self.capacity.max(1) as u64);
    }

    /// A block, if it is here.
    pub fn get(&self, lba: Lba) -> Option<&[u8]> {
        self.run(lba, 1).map(|run| run.bytes)
    }

    /// As many of `blocks` blocks from `lba` on as are here side by side; at least one, if that one is here.
    pub fn run(&self, lba: Lba, blocks: u64) -> Option<Run<'_>> {
        // Whoever reads many neighbours is more likely to find them in a piece.
        if blocks > 1
            && let Some(run) = self.piece(lba).and_then(|piece| piece.run(lba, blocks))
        {
            return Some(run);
        }
        match self.cache.get(&lba) {
            Some(Entry::Block(block)) => Some(Run { bytes: &block[..], kept: None }),
            _ if blocks > 1 => None,
            _ => self.piece(lba)?.run(lba, 1),
        }
    }

    /// Whether a block is here, without counting as somebody who needs it.
    pub fn has(&self, lba: Lba) -> bool {
        let in_piece = || match self.cache.peek(&Piece::key(lba)) {
            Some(Entry::Piece(piece)) => piece.find(lba).is_some(),
            _ => false,
        };
        self.cache.contains_key(&lba) || (self.has_pieces && in_piece())
    }

    fn piece(&self, lba: Lba) -> Option<&Piece> {
        if !self.has_pieces {
            return None;
        }
        match self.cache.get(&Piece::key(lba)) {
            Some(Entry::Piece(piece)) => Some(piece),
            _ => None,
        }
    }

    /// Keeps a clean block.
    pub fn insert(&mut self, lba: Lba, block: &[u8]) {
        if self.capacity == 0 {
            return;
        }
        let mut copy = Box::new([0; BLOCK]);
        copy.copy_from_slice(block);
        self.cache.insert(lba, Entry::Block(copy));
    }

    /// Keeps the blocks from `lba` on of which `is_clean` says that they are still what the volume holds.
    pub fn insert_run(&mut self, lba: Lba, bytes: &Bytes, is_clean: impl Fn(Lba) -> bool) {
        let end = lba + (bytes.len() / BLOCK) as u64;
        let mut at = lba;
        while at < end {
            let until = end.min((at / PIECE_BLOCKS + 1) * PIECE_BLOCKS);
            let part = bytes.slice((at - lba) as usize * BLOCK..(until - lba) as usize * BLOCK);
            let again = self.was_let_go(at);
            let mut piece = Piece { lba: at, bytes: part, valid: [0; _], found: Cell::new(0), again };
            for lba in (at..until).filter(|lba| is_clean(*lba)) {
                piece.set_valid((lba - at) as usize, true);
            }
            self.insert_piece(piece, bytes.len());
            at = until;
        }
    }

    fn insert_piece(&mut self, mut piece: Piece, came_in: usize) {
        let valid = piece.valid_blocks();
        let known = self.piece(piece.lba).map_or(0, Piece::valid_blocks);
        if u64::from(valid) < PIECE_BLOCKS_MIN || valid <= known || self.capacity < PIECES_MIN * PIECE_BLOCKS as usize {
            let blocks = (piece.lba..).zip(piece.bytes.chunks_exact(BLOCK)).enumerate();
            for (_, (lba, block)) in blocks.filter(|(at, _)| piece.is_valid(*at)) {
                self.insert(lba, block);
            }
            return;
        }
        if piece.bytes.len() * PIECE_PART_MIN < came_in {
            piece.bytes = Bytes::copy_from_slice(&piece.bytes);
        }
        self.has_pieces = true;
        self.cache.insert(Piece::key(piece.lba), Entry::Piece(Box::new(piece)));
    }

    /// Lets go of the piece that begins with block `lba`, a multiple of [`PIECE_BLOCKS`], if it was found once at most, on
    /// average, and is here for the first time as far as is remembered.
    pub fn let_go(&mut self, lba: Lba) {
        if !self.has_pieces {
            return;
        }
        match self.cache.peek(&Piece::key(lba)) {
            Some(Entry::Piece(piece)) if !piece.again && u64::from(piece.found.get()) < 2 * piece.blocks() => {}
            _ => return,
        }
        self.cache.remove(&Piece::key(lba));
        self.let_go.resize(LET_GO_REMEMBERED, 0);
        let number = lba / PIECE_BLOCKS;
        self.let_go[number as usize % LET_GO_REMEMBERED] = number + 1;
    }

    /// Whether the stretch of block `lba` was let go, as far as is remembered.
    pub fn was_let_go(&self, lba: Lba) -> bool {
        let number = lba / PIECE_BLOCKS;
        self.let_go.get(number as usize % LET_GO_REMEMBERED) == Some(&(number + 1))
    }

    /// Forgets a range because newer content was accepted. Costs the smaller of the range and the cache.
    pub fn forget(&mut self, lba: Lba, blocks: u64) {
        if self.cache.is_empty() || blocks == 0 {
            return;
        }
        let range = lba..lba + blocks;
        if blocks > self.cache.weight() {
            self.cache.retain(|&key, entry| match entry {
                Entry::Block(_) => !range.contains(&key),
                Entry::Piece(piece) => range.end <= piece.lba || piece.lba + piece.blocks() <= range.start,
            });
            return;
        }
        for lba in range.clone() {
            self.cache.remove(&lba);
        }
        if !self.has_pieces {
            return;
        }
        for number in lba / PIECE_BLOCKS..=(range.end - 1) / PIECE_BLOCKS {
            let key = PIECE_KEY | number;
            if !self.cache.contains_key(&key) {
                continue;
            }
            let mut left = 0;
            if let Some(mut entry) = self.cache.peek_mut(&key)
                && let Entry::Piece(piece) = &mut *entry
            {
                let (first, end) = (piece.lba.max(range.start), (piece.lba + piece.blocks()).min(range.end));
                for lba in first..end {
                    piece.set_valid((lba - piece.lba) as usize, false);
                }
                left = piece.valid_blocks();
            }
            if left == 0 {
                self.cache.remove(&key);
            }
        }
    }

    /// Bytes held.
    pub fn bytes(&self) -> usize {
        self.cache.weight() as usize * BLOCK
    }
}

impl std::fmt::Debug for BlockCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockCache({} of {} blocks)", self.cache.weight(), self.capacity)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Blocks filled with the low byte of their address.
    fn run_of(lba: Lba, blocks: u64) -> Bytes {
        (lba..lba + blocks).flat_map(|lba| [lba as u8; BLOCK]).collect::<Vec<u8>>().into()
    }

    fn cache() -> BlockCache {
        BlockCache::new(64 << 20)
    }

    #[test]
    fn runs_are_kept_as_they_came_and_found_by_block() {
        let mut cache = cache();
        let bytes = run_of(200, 500);
        cache.insert_run(200, &bytes, |_| true);
        assert_eq!(cache.bytes(), 500 * BLOCK);
        for lba in 200..700 {
            assert_eq!(cache.get(lba).unwrap(), [lba as u8; BLOCK]);
            assert!(cache.has(lba));
        }
        assert!(cache.get(199).is_none() && cache.get(700).is_none() && !cache.has(700));
        // A run ends with its piece.
        let run = cache.run(300, 1000).unwrap().bytes;
        assert_eq!(run, &bytes[100 * BLOCK..312 * BLOCK]);
        assert_eq!(cache.run(300, 3).unwrap().bytes.len(), 3 * BLOCK);
    }

    #[test]
    fn what_was_overwritten_is_gone_and_single_blocks_fill_the_gap() {
        let mut cache = cache();
        cache.insert_run(0, &run_of(0, 512), |lba| lba != 7);
        assert!(cache.get(7).is_none());
        assert_eq!(cache.run(0, 512).unwrap().bytes.len(), 7 * BLOCK);
        cache.forget(250, 10);
        for lba in 250..260 {
            assert!(cache.run(lba, 4).is_none() && !cache.has(lba));
        }
        assert_eq!(cache.run(240, 100).unwrap().bytes.len(), 10 * BLOCK);
        cache.insert(255, &[1; BLOCK]);
        assert_eq!(cache.run(255, 10).unwrap().bytes, [1; BLOCK]);
        cache.forget(0, 256);
        assert!((0..256).all(|lba| !cache.has(lba)) && cache.has(260));
        assert_eq!(cache.bytes(), 256 * BLOCK);
        // More than there are entries.
        cache.forget(300, 1 << 40);
        assert_eq!(cache.bytes(), 0);
    }

    #[test]
    fn short_runs_and_small_caches_keep_single_blocks() {
        let mut cache = cache();
        cache.insert_run(10, &run_of(10, 20), |_| true);
        assert!(!cache.has_pieces);
        assert_eq!(cache.get(29).unwrap(), [29; BLOCK]);
        // A part of what a piece knows does not replace it.
        cache.insert_run(256, &run_of(256, 256), |_| true);
        cache.forget(256, 10);
        cache.insert_run(256, &run_of(256, 40), |_| true);
        assert!((256..512).all(|lba| cache.has(lba)));

        let mut small = BlockCache::new(1 << 20);
        small.insert_run(0, &run_of(0, 256), |_| true);
        assert!(small.bytes() <= 1 << 20 && !small.has_pieces);
        let mut none = BlockCache::new(0);
        none.insert_run(0, &run_of(0, 256), |_| true);
        assert!(none.get(0).is_none());
    }

    #[test]
    fn what_was_read_once_is_let_go_and_stays_when_it_is_fetched_again() {
        let mut cache = cache();
        cache.insert_run(0, &run_of(0, 1024), |_| true);
        for lba in 0..1024 {
            cache.get(lba);
        }
        // Needed again before it was let go.
        cache.run(512, 256);
        (0..3).for_each(|piece| cache.let_go(piece * 256));
        assert!(!cache.has(0) && !cache.has(511) && cache.has(512) && cache.has(768));
        assert_eq!(cache.bytes(), 512 * BLOCK);
        assert!(cache.was_let_go(0) && cache.was_let_go(300));
        assert!(!cache.was_let_go(512) && !cache.was_let_go(LET_GO_REMEMBERED as u64 * PIECE_BLOCKS));
        cache.insert_run(0, &run_of(0, 512), |_| true);
        cache.let_go(0);
        cache.let_go(256);
        assert!((0..1024).all(|lba| cache.get(lba) == Some(&[lba as u8; BLOCK][..])));
        // Single blocks are none of it.
        cache.insert(5000 * PIECE_BLOCKS, &[1; BLOCK]);
        cache.let_go(5000 * PIECE_BLOCKS);
        assert!(cache.has(5000 * PIECE_BLOCKS));
    }

    #[test]
    fn the_budget_holds_with_both_kinds() {
        let mut cache = cache();
        for piece in 0..200 {
            cache.insert_run(piece * 256, &run_of(piece * 256, 256), |_| true);
            cache.insert((1 << 30) | piece, &[0; BLOCK]);
            assert!(cache.bytes() <= 64 << 20);
        }
        assert!(cache.bytes() > 32 << 20);
        cache.resize(1 << 20);
        assert!(cache.bytes() <= 1 << 20);
    }
}
