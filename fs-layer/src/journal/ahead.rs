//! Which metadata blocks are read before somebody asks for them.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::disk::BlockAddress;

/// Blocks that are near the last one that was read: its neighbours may be next.
const NEAR: u64 = 4096;
/// How many blocks are read at once where that seems worth it: so few that a disk which reads ahead by itself, as a file does, is not waited for.
pub(super) const GROUP: u64 = 16;

/// The same among inodes that somebody who lists their directory is likely to ask for, in the order of their names: nearly all of what is read will be
/// needed, and a large read takes little longer.
const LISTED_GROUP: u64 = 64;
/// What an inode in the cache takes, about.
const INODE_BYTES: u64 = 512;
/// The fewest entries that say where a directory's inodes are.
const LISTED_MIN: usize = 32;

/// The most groups that are read ahead.
const AHEAD_MAX: u64 = 16;

/// Inodes to be read ahead.
#[derive(Default)]
pub(super) struct Ahead {
    /// Where the next miss is if the reader goes on in order.
    expected: BlockAddress,
    /// How many groups were asked for ahead of that.
    groups: u64,
    pub wanted: Range<BlockAddress>,
    /// Whether a thread reads them.
    pub runs: bool,
    pub ended: bool,
}

impl Ahead {
    /// A group was not here. Returns whether something is to be read ahead.
    pub fn missed(&mut self, first: BlockAddress, blocks: u64) -> bool {
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
pub(super) struct Nearby {
    last: AtomicU64,
}

impl Nearby {
    /// What to read where `at` is wanted: the first block, and how many.
    pub fn group(&self, at: BlockAddress, blocks: u64) -> (BlockAddress, u64) {
        let last = self.last.swap(at, Ordering::Relaxed);
        if last == 0 || at.abs_diff(last) > NEAR {
            return (at, 1);
        }
        let first = at & !(GROUP - 1);
        let end = (first + GROUP).min(blocks).max(at + 1);
        (first, end - first)
    }
}

/// Where the inodes of the directory are that was listed last, if they are close together.
#[derive(Default)]
pub(super) struct Listed {
    first: AtomicU64,
    end: AtomicU64,
}

impl Listed {
    /// Some inodes of a directory with `count` entries, in any order. `bytes` are what the cache may take.
    pub fn saw(&self, inodes: impl Iterator<Item = BlockAddress>, count: u64, bytes: u64) {
        let mut inodes: Vec<_> = inodes.collect();
        if inodes.len() < LISTED_MIN {
            return;
        }
        inodes.sort_unstable();
        // A few may be old, or have come from elsewhere.
        let (low, high) = (inodes[inodes.len() / 8], inodes[inodes.len() - 1 - inodes.len() / 8]);
        let most = high - low + 1;
        let fits = count.saturating_mul(INODE_BYTES) <= bytes / 2;
        // One of four that are read along should be needed.
        let (first, end) = if fits && most <= count.saturating_mul(4) {
            (low.saturating_sub(most / 4), high + most / 4)
        } else {
            (0, 0)
        };
        self.first.store(first, Ordering::Relaxed);
        self.end.store(end, Ordering::Relaxed);
    }

    /// What to read where `at` is wanted, if it is among them: the first block, and how many.
    pub fn group(&self, at: BlockAddress, blocks: u64) -> Option<(BlockAddress, u64)> {
        if at < self.first.load(Ordering::Relaxed) || at >= self.end.load(Ordering::Relaxed) {
            return None;
        }
        let first = at & !(LISTED_GROUP - 1);
        Some((first, (first + LISTED_GROUP).min(blocks).max(at + 1) - first))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inodes_that_are_close_together_are_read_by_larger_groups() {
        let listed = Listed::default();
        assert_eq!(listed.group(7000, u64::MAX), None);
        // One of 100 entries is on each page, and one of them is old.
        let page = || [5].into_iter().chain((0..100).map(|n| 10_000 + n * 100));
        listed.saw(page(), 10_000, 1 << 30);
        assert_eq!(listed.group(15_001, u64::MAX), Some((14_976, 64)));
        assert_eq!(listed.group(15_001, 15_003), Some((14_976, 27)));
        assert_eq!(listed.group(5, u64::MAX), None);
        assert_eq!(listed.group(40_000, u64::MAX), None);
        // They are all over the disk; or too many for the cache; and a short listing says nothing.
        listed.saw(page(), 1000, 1 << 30);
        assert_eq!(listed.group(15_001, u64::MAX), None);
        listed.saw(page(), 10_000, 1 << 20);
        assert_eq!(listed.group(15_001, u64::MAX), None);
        listed.saw(page(), 10_000, 1 << 30);
        listed.saw([1, 2].into_iter(), 2, 1 << 30);
        assert!(listed.group(15_001, u64::MAX).is_some());
    }

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
