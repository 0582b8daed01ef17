//! Directories: names of files, found by a hash of the name.
//!
//! A directory is a B+tree of entries in the order of their keys, and its root is in the inode: what is called the *area*
//! is the part of the inode block that is left for contents. The root is a leaf at first, so that a small directory has no blocks at all.
//! The key of an entry is the 63-bit hash of its name, or the next free key after it; it is the cookie that reading the
//! directory goes on from, and never changes while the entry is there. How far any entry was ever put from its hash stands in the area, so
//! that a lookup knows how far to look, and removing an entry needs no trace of it.
//!
//! What must hold: keys ascend, each at or after its name's hash and no further from it than the area says; no name twice; no leaf but
//! the root is empty. `docs/fs-format.md` has the bytes.
//!
//! An area always has the same length between [`init`], or [`refit`], and the next [`refit`]. Callers hold the directory's lock. What
//! is damaged gives [`VfsError::Io`](crate::vfs::VfsError::Io) that names the block, or "the inode", whose number the caller knows.

use std::ops::ControlFlow;

use crate::blocks::{ReadBlocks, WriteBlocks};
use crate::disk::BlockAddress;
use crate::vfs::{Ino, Result};

/// The least length of an area, in bytes.
pub const AREA_MIN: usize = 512;

/// What a name stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The file.
    pub ino: Ino,
    /// What it is, in the caller's code.
    pub kind: u8,
}

/// An entry as it lies in its block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry<'a> {
    /// The name, 1 to 255 bytes.
    pub name: &'a [u8],
    /// What it stands for.
    pub target: Target,
    /// Its key, which is its cookie: above 2 and below 2^63.
    pub key: u64,
}

/// Makes an area an empty directory. `seed` is random, and different for each directory.
///
/// # Panics
/// If the area is shorter than [`AREA_MIN`] or longer than a block.
pub fn init(area: &mut [u8], seed: u64) {
    todo!()
}

/// What `name` stands for.
pub fn lookup<B: ReadBlocks + ?Sized>(blocks: &B, area: &[u8], name: &[u8]) -> Result<Option<Target>> {
    todo!()
}

/// Adds an entry and returns its key.
///
/// # Errors
/// [`Exists`](crate::vfs::VfsError::Exists) if the name is there: nothing was changed then. After any other error the transaction must not be
/// committed: the tree may be half changed.
pub fn insert<B: WriteBlocks + ?Sized>(blocks: &mut B, area: &mut [u8], name: &[u8], target: Target) -> Result<u64> {
    todo!()
}

/// Removes an entry and returns what it stood for.
///
/// # Errors
/// [`NotFound`](crate::vfs::VfsError::NotFound) if there is none: nothing was changed then. Others as for [`insert`].
pub fn remove<B: WriteBlocks + ?Sized>(blocks: &mut B, area: &mut [u8], name: &[u8]) -> Result<Target> {
    todo!()
}

/// Lets an existing entry stand for another file and returns what it stood for. Its key stays.
///
/// # Errors
/// As for [`remove`].
pub fn replace<B: WriteBlocks + ?Sized>(
    blocks: &mut B,
    area: &mut [u8],
    name: &[u8],
    target: Target,
) -> Result<Target> {
    todo!()
}

/// Calls `each` with the entries after the cookie `after` (0: all), in the order of their cookies, until it breaks. Returns whether the
/// end was reached.
pub fn list<B: ReadBlocks + ?Sized>(
    blocks: &B,
    area: &[u8],
    after: u64,
    mut each: impl FnMut(Entry<'_>) -> ControlFlow<()>,
) -> Result<bool> {
    todo!()
}

/// How many entries there are.
pub fn count(area: &[u8]) -> Result<u64> {
    todo!()
}

/// Whether there is none. An empty directory has no blocks.
pub fn is_empty(area: &[u8]) -> Result<bool> {
    Ok(count(area)? == 0)
}

/// How many blocks the tree has, the inode's not counted.
pub fn block_count(area: &[u8]) -> Result<u64> {
    todo!()
}

/// Moves a directory from an area to one of another length (inline attributes came or went).
pub fn refit<B: WriteBlocks + ?Sized>(blocks: &mut B, from: &[u8], to: &mut [u8]) -> Result<()> {
    todo!()
}

/// What [`walk`] meets.
pub trait Visit {
    /// A block of the tree, before what it holds. What `false` is returned for is left out: the caller has seen the block elsewhere.
    fn block(&mut self, at: BlockAddress) -> bool;
    /// An entry that is sound in itself; in the order of the keys.
    fn entry(&mut self, entry: Entry<'_>);
    /// A block, or the area (`None`), that is damaged. What hangs on it is not visited; the walk goes on.
    fn damage(&mut self, at: Option<BlockAddress>, what: String);
}

/// Visits everything in a directory and verifies it: order, hashes, lengths, the counts in the area.
pub fn walk<B: ReadBlocks + ?Sized>(blocks: &B, area: &[u8], visit: &mut dyn Visit) {
    todo!()
}
