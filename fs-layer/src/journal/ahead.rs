//! Which metadata blocks are read before somebody asks for them.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::disk::BlockAddress;

/// Blocks that are near the last one that was read: its neighbours may be next.
const NEAR: u64 = 4096;
/// How many blocks are read at once where that seems worth it: so few that a disk which reads ahead by itself, as a file does, is not waited for.
pub(super) const GROUP: u64 = 16;

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
