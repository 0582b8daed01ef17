//! Extents: which block of a file is where on the disk.
//!
//! A file's map is a B+tree of extents in the order of the file's blocks, and its root is in the inode: the *area* is the part of the
//! inode block that is left for contents. An extent says that `count` blocks of the file from `start` on are at `address` and the following ones.
//! Extents do not overlap, and those that continue each other are one.
//!
//! Addresses are cheap and never used twice, so that a file is given more of them at a time than are needed ([`window`]): an extent's *reserve* are
//! the addresses directly before and after its own that belong to the file's blocks directly before and after and were never used. A
//! block written there later continues the extent. What is removed takes the reserve at that side with it. After a crash the disk may hold, at an
//! address in reserve, what was written there for the same block of the same file by a transaction that was lost: until it is
//! flushed, a new block there may read as that rather than as zeros.
//!
//! What must hold: extents with their reserves ascend and do not overlap; no leaf but the root is empty; the counts in the area are true.
//! `docs/fs-format.md` has the bytes.
//!
//! An area always has the same length between [`init`], or [`refit`], and the next [`refit`]. Callers hold the file's lock. What is
//! damaged gives [`VfsError::Io`](crate::vfs::VfsError::Io) that names the block, or "the inode", whose number the caller knows. After any error
//! of a call that changes, the transaction must not be committed: the tree may be half changed.

mod area;
mod leaf;
mod map;
#[cfg(test)]
mod tests;
mod walk;
pub mod window;

use std::ops::ControlFlow;

use area::{open, open_mut};
use leaf::{ADDRESS_END, ExtentLeaf};
use map::{Map, collect};
use window::{Around, Plan};

use crate::blocks::{ReadBlocks, WriteBlocks};
use crate::disk::{BLOCK_BYTES, BlockAddress};
use crate::tree::{self, Root};
use crate::vfs::{FILE_SIZE_MAX, Result, Seek, VfsError};

/// The least length of an area, in bytes.
pub const AREA_MIN: usize = 512;
/// The number of blocks that the largest file has.
pub const FILE_BLOCKS_MAX: u64 = FILE_SIZE_MAX / BLOCK_BYTES as u64;

/// Some blocks of a file that lie one after the other on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The first block in the file.
    pub start: u64,
    /// Where it is on the disk.
    pub address: BlockAddress,
    /// How many blocks; at least 1.
    pub count: u32,
    /// Whether nothing was written yet: it reads as zeros, whatever is on the disk.
    pub unwritten: bool,
    /// How many addresses directly before are in reserve for the file's blocks directly before.
    pub before: u32,
    /// How many addresses directly after are in reserve for the file's blocks directly after.
    pub after: u32,
}

impl Extent {
    /// The first block of the file behind it.
    pub fn end(&self) -> u64 {
        self.start + u64::from(self.count)
    }

    /// Where a block of the file in it is on the disk.
    pub fn address_of(&self, block: u64) -> BlockAddress {
        self.address + (block - self.start)
    }
}

/// Blocks on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DiskRange {
    /// The first.
    pub address: BlockAddress,
    /// How many.
    pub count: u64,
}

/// What is at a block of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// The whole extent that it is in.
    Extent(Extent),
    /// Nothing, from the block asked for up to (not with) `end`: the next extent or [`FILE_BLOCKS_MAX`].
    Hole {
        /// The first block of the file behind the hole.
        end: u64,
    },
}

/// What [`remove`] did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Removed {
    /// What was freed: to be discarded once the transaction is durable.
    pub freed: Vec<DiskRange>,
    /// Where to go on in the next transaction; `None`: the range is a hole now.
    pub more: Option<u64>,
}

/// What stands in the area about the whole map.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Blocks of the file that have an address, unwritten ones too.
    pub mapped: u64,
    /// Those of them that are unwritten.
    pub unwritten: u64,
    /// Extents.
    pub extents: u64,
    /// Blocks of the tree, the inode's not counted.
    pub nodes: u64,
}

/// Makes an area an empty map.
///
/// # Panics
/// If the area is shorter than [`AREA_MIN`] or longer than a block.
pub fn init(area: &mut [u8]) {
    area::init(area);
}

/// What is at `block`.
pub fn get<B: ReadBlocks + ?Sized>(blocks: &B, area: &[u8], block: u64) -> Result<Mapping> {
    let (_, root) = open(area)?;
    let block = block.min(FILE_BLOCKS_MAX);
    let (left, right) = map::around(blocks, root, block)?;
    Ok(match left.filter(|left| left.end() > block) {
        Some(left) => Mapping::Extent(left),
        None => Mapping::Hole { end: right.map_or(FILE_BLOCKS_MAX, |right| right.start) },
    })
}

/// Calls `each` with the extents that end after `from`, in order, the first one whole, until it breaks. Returns whether the end was reached.
pub fn list<B: ReadBlocks + ?Sized>(
    blocks: &B,
    area: &[u8],
    from: u64,
    each: impl FnMut(Extent) -> ControlFlow<()>,
) -> Result<bool> {
    let (_, root) = open(area)?;
    map::list(blocks, root, from.min(FILE_BLOCKS_MAX), each)
}

/// The first block at or after `from` that was written ([`Seek::Data`]; `None` if there is none) or that was not ([`Seek::Hole`]; always
/// `Some`, maybe behind the end of the file). What is mapped and unwritten is a hole.
pub fn seek<B: ReadBlocks + ?Sized>(blocks: &B, area: &[u8], from: u64, what: Seek) -> Result<Option<u64>> {
    let mut at = from;
    let end = list(blocks, area, from, |extent| match what {
        Seek::Data if extent.unwritten => ControlFlow::Continue(()),
        Seek::Data => {
            at = at.max(extent.start);
            ControlFlow::Break(())
        }
        Seek::Hole if extent.unwritten || extent.start > at => ControlFlow::Break(()),
        Seek::Hole => {
            at = extent.end();
            ControlFlow::Continue(())
        }
    })?;
    Ok((what == Seek::Hole || !end).then_some(at))
}

/// Gives addresses to the file's blocks from `block` on, which is in a hole: as many as one range holds, 1 to `wanted`, never beyond the hole. They are
/// in the map afterwards. Returns only these blocks, without reserve, so that a caller goes on at `end()` if it wants more.
///
/// Takes them from the reserve around the block if there is one, else asks `ask` for a number of contiguous addresses that were never
/// used, as [`window::plan`] decides from `size_blocks`, the size of the file (after the write) in blocks.
///
/// # Errors
/// What `ask` returns; [`TooLarge`](crate::vfs::VfsError::TooLarge) at [`FILE_BLOCKS_MAX`]; [`Invalid`](crate::vfs::VfsError::Invalid) if the block is mapped.
pub fn allocate<B: WriteBlocks + ?Sized>(
    blocks: &mut B,
    area: &mut [u8],
    block: u64,
    wanted: u32,
    unwritten: bool,
    size_blocks: u64,
    ask: impl FnOnce(&mut B, u64) -> Result<BlockAddress>,
) -> Result<Extent> {
    if block >= FILE_BLOCKS_MAX {
        return Err(VfsError::TooLarge);
    }
    let (header, root) = open_mut(area)?;
    let (left, right) = map::around(blocks, root, block)?;
    if left.is_some_and(|left| left.end() > block) {
        return Err(VfsError::Invalid);
    }
    let around = Around { left, right, mapped: header.mapped.get(), size_blocks };
    let (address, count, before, after) = match window::plan(&around, block, wanted) {
        Plan::Reserve { address, count, before, after } => (address, count, before, after),
        Plan::Window { first, count } => {
            let address = ask(blocks, count)?;
            if address == 0 || address.saturating_add(count) > ADDRESS_END {
                return Err(VfsError::NoSpace);
            }
            let behind = first + count - block;
            let taken = behind.min(wanted.max(1).into());
            (address + (block - first), taken as u32, (block - first) as u32, (behind - taken) as u32)
        }
    };
    let new = Extent { start: block, address, count, unwritten, before, after };
    Map { blocks, header, root }.fill(new, left, right)?;
    Ok(Extent { before: 0, after: 0, ..new })
}

/// Maps a range of the file to given addresses (which were never used, or are another part's of a clone), over whatever was mapped there; returns
/// what that was. The work grows with the number of extents that are replaced: who replaces many calls [`remove`] first.
/// The reserve of `extent` is kept as far as nothing else is there.
pub fn insert<B: WriteBlocks + ?Sized>(blocks: &mut B, area: &mut [u8], extent: Extent) -> Result<Vec<DiskRange>> {
    let end = extent.start.saturating_add(extent.count.into());
    let disk_end = extent.address.saturating_add(extent.count.into()).saturating_add(extent.after.into());
    if end > FILE_BLOCKS_MAX {
        return Err(VfsError::TooLarge);
    }
    if extent.count == 0 || u64::from(extent.before) >= extent.address || disk_end > ADDRESS_END {
        return Err(VfsError::Invalid);
    }
    let (header, root) = open_mut(area)?;
    let mut map = Map { blocks, header, root };
    let mut freed = Vec::new();
    map.cut(extent.start, end, usize::MAX, |gone| collect(&mut freed, gone))?;
    let (left, right) = map.around(extent.start)?;
    let room_before = extent.start - left.map_or(0, |left| left.end());
    let room_after = right.map_or(FILE_BLOCKS_MAX, |right| right.start) - end;
    let new = Extent {
        before: u64::from(extent.before).min(room_before) as u32,
        after: u64::from(extent.after).min(room_after) as u32,
        ..extent
    };
    map.fill(new, left, right)?;
    Ok(freed)
}

/// Makes the blocks from `from` up to (not with) `to` a hole (`to` [`FILE_BLOCKS_MAX`] or more: up to the end), from the beginning on, at most
/// `max_extents` extents of it.
pub fn remove<B: WriteBlocks + ?Sized>(
    blocks: &mut B,
    area: &mut [u8],
    from: u64,
    to: u64,
    max_extents: usize,
) -> Result<Removed> {
    let (header, root) = open_mut(area)?;
    let mut freed = Vec::new();
    let more = Map { blocks, header, root }
        .cut(from, to.min(FILE_BLOCKS_MAX), max_extents.max(1), |gone| collect(&mut freed, gone))?;
    Ok(Removed { freed, more })
}

/// Says that the blocks from `from` up to (not with) `to` were written, those of them that are mapped. The work grows with the number of
/// extents in the range, here and in [`mark_unwritten`]: who changes many goes on in steps, along [`list`].
pub fn mark_written<B: WriteBlocks + ?Sized>(blocks: &mut B, area: &mut [u8], from: u64, to: u64) -> Result<()> {
    let (header, root) = open_mut(area)?;
    Map { blocks, header, root }.mark(from, to.min(FILE_BLOCKS_MAX), false)
}

/// Says that the blocks from `from` up to (not with) `to` read as zeros, those of them that are mapped: ZERO_RANGE, and what is to become of
/// them on the disk is the caller's.
pub fn mark_unwritten<B: WriteBlocks + ?Sized>(blocks: &mut B, area: &mut [u8], from: u64, to: u64) -> Result<()> {
    let (header, root) = open_mut(area)?;
    Map { blocks, header, root }.mark(from, to.min(FILE_BLOCKS_MAX), true)
}

/// What stands in the area about the whole map.
pub fn counts(area: &[u8]) -> Result<Counts> {
    Ok(open(area)?.0.counts())
}

/// Moves a map from an area to one of another length (inline attributes came or went).
pub fn refit<B: WriteBlocks + ?Sized>(blocks: &mut B, from: &[u8], to: &mut [u8]) -> Result<()> {
    let (header, root) = open(from)?;
    area::init(to);
    let (to_header, to_root) = open_mut(to)?;
    *to_header = *header;
    tree::refit::<ExtentLeaf, B>(blocks, root, &mut Root { node: to_root, blocks: &mut to_header.blocks })
}

/// What [`walk`] meets.
pub trait Visit {
    /// A block of the tree, before what it holds. What `false` is returned for is left out: the caller has seen the block elsewhere. It must be
    /// so for blocks of this tree too, or a damaged tree may be visited without end.
    fn block(&mut self, at: BlockAddress) -> bool;
    /// An extent that is sound in itself; in order.
    fn extent(&mut self, extent: Extent);
    /// A block, or the area (`None`), that is damaged. What hangs on it is not visited; the walk goes on.
    fn damage(&mut self, at: Option<BlockAddress>, what: String);
}

/// Visits everything in a map and verifies it: order, ranges, reserves, the counts in the area.
pub fn walk<B: ReadBlocks + ?Sized>(blocks: &B, area: &[u8], visit: &mut dyn Visit) {
    walk::walk(blocks, area, visit);
}
