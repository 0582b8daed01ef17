//! How many addresses a file is given at a time. Pure.
//!
//! Addresses are asked for in *windows*: a range of the file's blocks of which each belongs to one address of a range of the same
//! length. What of a window is not mapped yet is the reserve of the extents in it, so that a window is one extent in the end, in whatever order it is
//! filled. The size of a window is a power of two, and it begins at a multiple of it as far as there is no other; it is
//!
//! - at least four times what the file has already: a file that is written from its beginning to 16 TiB has 15 windows or fewer;
//! - at least 1/64 of the file: one that is filled at random comes to about 64 windows;
//! - at most 1024 times what the file has then: a few blocks far out reserve no more than 4 MiB each. A huge file that is filled
//!   by single blocks at random therefore starts with smaller windows.

use super::{Extent, FILE_BLOCKS_MAX};
use crate::disk::BlockAddress;

/// The smallest window, in blocks: 64 KiB.
pub const WINDOW_MIN: u64 = 16;
/// The largest window, in blocks: 8 TiB. The reserve of an extent fits into 32 bits.
pub const WINDOW_MAX: u64 = 1 << 31;
/// A window is at most this many times what the file has then.
const SPARSE_MAX: u64 = 1024;
/// A window is at least this part of the file.
const WINDOWS: u64 = 64;
/// A window is at least this many times what the file has.
const GROWTH: u64 = 4;

/// What is known of a file where a block without address is to be written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Around {
    /// The nearest extent before the block.
    pub left: Option<Extent>,
    /// The nearest extent after it.
    pub right: Option<Extent>,
    /// How many blocks of the file have an address.
    pub mapped: u64,
    /// The size of the file in blocks.
    pub size_blocks: u64,
}

/// Where addresses come from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// From the reserve of a neighbour. What stays in reserve on either side is to be this extent's.
    Reserve {
        /// Of the block.
        address: BlockAddress,
        /// How many blocks it is good for.
        count: u32,
        /// What of the neighbour's reserve before the block is taken over.
        before: u32,
        /// What of it behind the `count` blocks is taken over.
        after: u32,
    },
    /// From the disk: `count` contiguous addresses for the file's blocks from `first` on.
    Window {
        /// The first block of the window, at or before the block.
        first: u64,
        /// The length of the window.
        count: u64,
    },
}

/// Where the addresses of `block` and what follows it, up to `wanted`, come from.
pub fn plan(around: &Around, block: u64, wanted: u32) -> Plan {
    // The neighbours' reserves end where the hole does, in a sound map.
    let hole_end = around.right.map_or(FILE_BLOCKS_MAX, |r| r.start).max(block + 1);
    let taken = around.left.map_or(0, |l| (l.end() + u64::from(l.after)).min(hole_end));
    let kept = around.right.map_or(FILE_BLOCKS_MAX, |r| r.start.saturating_sub(r.before.into())).max(taken);
    let wanted = u64::from(wanted.max(1));
    match (around.left, around.right) {
        (Some(left), _) if block < taken => {
            let count = wanted.min(taken - block);
            Plan::Reserve {
                address: left.address_of(block),
                count: count as u32,
                before: 0,
                after: (taken - block - count) as u32,
            }
        }
        (_, Some(right)) if block >= kept => Plan::Reserve {
            address: right.address - (right.start - block),
            count: wanted.min(hole_end - block) as u32,
            before: (block - kept) as u32,
            after: 0,
        },
        _ => {
            let size = size(around, wanted);
            let first = (block - block % size).max(taken);
            let end = (block - block % size + size).max(block + wanted).min(kept);
            Plan::Window { first, count: end - first }
        }
    }
}

/// The size of a new window, not yet cut to where there is none.
fn size(around: &Around, wanted: u64) -> u64 {
    let power = |n: u64| n.min(WINDOW_MAX).next_power_of_two();
    let good = power(around.mapped.saturating_mul(GROWTH)).max(power(around.size_blocks / WINDOWS)).max(WINDOW_MIN);
    let most = power(around.mapped.saturating_add(wanted).saturating_mul(SPARSE_MAX));
    good.min(most).max(power(wanted))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn extent(start: u64, count: u32, before: u32, after: u32) -> Extent {
        Extent { start, address: 1 << 40, count, unwritten: false, before, after }
    }

    #[test]
    fn the_first_window_is_small() {
        let around = Around { left: None, right: None, mapped: 0, size_blocks: 1 };
        assert_eq!(plan(&around, 0, 1), Plan::Window { first: 0, count: 16 });
        assert_eq!(plan(&around, 0, 256), Plan::Window { first: 0, count: 256 });
        assert_eq!(plan(&around, 5, 16), Plan::Window { first: 0, count: 21 });
    }

    #[test]
    fn a_window_quadruples_the_file() {
        let left = Some(extent(0, 16, 0, 0));
        let around = Around { left, right: None, mapped: 16, size_blocks: 17 };
        assert_eq!(plan(&around, 16, 1), Plan::Window { first: 16, count: 48 });
    }

    #[test]
    fn far_out_little_is_reserved() {
        let far = FILE_BLOCKS_MAX - 5;
        let around = Around { left: None, right: None, mapped: 0, size_blocks: far + 1 };
        assert_eq!(plan(&around, far, 1), Plan::Window { first: FILE_BLOCKS_MAX - 1024, count: 1024 });
    }

    #[test]
    fn reserves_are_used_first() {
        let (left, right) = (extent(100, 10, 0, 20), extent(200, 10, 30, 0));
        let around = Around { left: Some(left), right: Some(right), mapped: 20, size_blocks: 210 };
        assert_eq!(plan(&around, 115, 4), Plan::Reserve { address: (1 << 40) + 15, count: 4, before: 0, after: 11 });
        assert_eq!(plan(&around, 180, 40), Plan::Reserve { address: (1 << 40) - 20, count: 20, before: 10, after: 0 });
        // The window is between the reserves.
        assert_eq!(plan(&around, 150, 1), Plan::Window { first: 130, count: 40 });
    }

    #[test]
    fn windows_stop_at_the_largest_size() {
        let left = Some(extent(0, 1 << 31, 0, 0));
        let around = Around { left, right: None, mapped: 1 << 31, size_blocks: (1 << 31) + 1 };
        assert_eq!(plan(&around, 1 << 31, u32::MAX), Plan::Window { first: 1 << 31, count: 1 << 31 });
    }
}
