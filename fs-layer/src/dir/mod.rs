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

mod area;
mod find;
mod leaf;
#[cfg(test)]
mod tests;
mod walk;

use std::ops::ControlFlow;

use area::{REACH_MAX, open, open_mut, verify_name};
use leaf::{DirLeaf, LeafRef};

use crate::blocks::{ReadBlocks, WriteBlocks};
use crate::disk::BlockAddress;
use crate::tree::{self, IN_INODE, InNode, Leaf, Root, Span, descend};
use crate::vfs::{Ino, Result, VfsError};

/// The least length of an area, in bytes.
pub const AREA_MIN: usize = 512;
/// The least key; those below are for `.` and `..`.
const KEY_MIN: u64 = 3;
/// Above the greatest key.
const KEY_END: u64 = 1 << 63;

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
    area::init(area, seed);
}

/// What `name` stands for.
pub fn lookup<B: ReadBlocks + ?Sized>(blocks: &B, area: &[u8], name: &[u8]) -> Result<Option<Target>> {
    verify_name(name)?;
    let (header, root) = open(area)?;
    Ok(find::lookup(blocks, header, root, name)?.map(|found| found.target))
}

/// Adds an entry and returns its key.
///
/// # Errors
/// [`Exists`](crate::vfs::VfsError::Exists) if the name is there: nothing was changed then. After any other error the transaction must not be
/// committed: the tree may be half changed.
pub fn insert<B: WriteBlocks + ?Sized>(blocks: &mut B, area: &mut [u8], name: &[u8], target: Target) -> Result<u64> {
    verify_name(name)?;
    let (header, root) = open_mut(area)?;
    let find::Free { key, mut place } = match find::free(blocks, header, root, name)? {
        Ok(free) => free,
        Err(_) => return Err(VfsError::Exists),
    };
    let distance = key - header.home(name);
    if distance > REACH_MAX {
        return Err(VfsError::NoSpace);
    }
    loop {
        let (path, index, room) = match place.take() {
            Some(place) => place,
            None => {
                let (path, node) = descend::<DirLeaf, B>(blocks, root, key)?;
                let leaf = LeafRef::open(&node).in_node::<DirLeaf>(path.leaf)?;
                (path, leaf.find(key, path.span).in_node::<DirLeaf>(path.leaf)?.0, leaf.has_room(name))
            }
        };
        if !room {
            tree::make_room::<DirLeaf, B>(blocks, &mut Root { node: root, blocks: &mut header.blocks }, &path)?;
            continue;
        }
        let node = leaf_mut(blocks, root, path.leaf)?;
        leaf::insert(node, index, key, name, target).in_node::<DirLeaf>(path.leaf)?;
        header.entries = header.entries.get().saturating_add(1).into();
        header.reach = header.reach.get().max(distance as u32).into();
        return Ok(key);
    }
}

/// Removes an entry and returns what it stood for.
///
/// # Errors
/// [`NotFound`](crate::vfs::VfsError::NotFound) if there is none: nothing was changed then. Others as for [`insert`].
pub fn remove<B: WriteBlocks + ?Sized>(blocks: &mut B, area: &mut [u8], name: &[u8]) -> Result<Target> {
    verify_name(name)?;
    let (header, root) = open_mut(area)?;
    let found = find::lookup(blocks, header, root, name)?.ok_or(VfsError::NotFound)?;
    let at = found.path.leaf;
    let node = leaf_mut(blocks, root, at)?;
    leaf::remove(node, found.index).in_node::<DirLeaf>(at)?;
    header.entries = header.entries.get().saturating_sub(1).into();
    if header.entries.get() == 0 {
        header.reach = 0.into();
    }
    tree::shrink::<DirLeaf, B>(blocks, &mut Root { node: root, blocks: &mut header.blocks }, &found.path)?;
    Ok(found.target)
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
    verify_name(name)?;
    let (header, root) = open_mut(area)?;
    let found = find::lookup(blocks, header, root, name)?.ok_or(VfsError::NotFound)?;
    let node = leaf_mut(blocks, root, found.path.leaf)?;
    leaf::replace(node, found.index, target).in_node::<DirLeaf>(found.path.leaf)?;
    Ok(found.target)
}

/// Calls `each` with the entries after the cookie `after` (0: all), in the order of their cookies, until it breaks. Returns whether the
/// end was reached.
pub fn list<B: ReadBlocks + ?Sized>(
    blocks: &B,
    area: &[u8],
    after: u64,
    mut each: impl FnMut(Entry<'_>) -> ControlFlow<()>,
) -> Result<bool> {
    let (_, root) = open(area)?;
    let mut cursor = after.saturating_add(1);
    while cursor < KEY_END {
        let (path, node) = descend::<DirLeaf, B>(blocks, root, cursor)?;
        let at = path.leaf;
        let leaf = LeafRef::open(&node).in_node::<DirLeaf>(at)?;
        leaf.check(path.span).in_node::<DirLeaf>(at)?;
        for index in leaf.find(cursor, path.span).in_node::<DirLeaf>(at)?.0..leaf.len() {
            if each(leaf.entry(index).in_node::<DirLeaf>(at)?).is_break() {
                return Ok(false);
            }
        }
        cursor = path.span.high;
        if cursor == Span::ALL.high {
            break;
        }
    }
    Ok(true)
}

/// How many entries there are.
pub fn count(area: &[u8]) -> Result<u64> {
    Ok(open(area)?.0.entries.get())
}

/// Whether there is none. An empty directory has no blocks.
pub fn is_empty(area: &[u8]) -> Result<bool> {
    Ok(count(area)? == 0)
}

/// How many blocks the tree has, the inode's not counted.
pub fn block_count(area: &[u8]) -> Result<u64> {
    Ok(open(area)?.0.blocks.get())
}

/// Moves a directory from an area to one of another length (inline attributes came or went).
pub fn refit<B: WriteBlocks + ?Sized>(blocks: &mut B, from: &[u8], to: &mut [u8]) -> Result<()> {
    let (header, root) = open(from)?;
    area::init(to, 0);
    let (to_header, to_root) = open_mut(to)?;
    *to_header = *header;
    tree::refit::<DirLeaf, B>(blocks, root, &mut Root { node: to_root, blocks: &mut to_header.blocks })
}

/// What [`walk`] meets.
pub trait Visit {
    /// A block of the tree, before what it holds. What `false` is returned for is left out: the caller has seen the block elsewhere. It must be
    /// so for blocks of this tree too, or a damaged tree may be visited without end.
    fn block(&mut self, at: BlockAddress) -> bool;
    /// An entry that is sound in itself; in the order of the keys.
    fn entry(&mut self, entry: Entry<'_>);
    /// A block, or the area (`None`), that is damaged. What hangs on it is not visited; the walk goes on.
    fn damage(&mut self, at: Option<BlockAddress>, what: String);
}

/// Visits everything in a directory and verifies it: order, hashes, lengths, the counts in the area.
pub fn walk<B: ReadBlocks + ?Sized>(blocks: &B, area: &[u8], visit: &mut dyn Visit) {
    walk::walk(blocks, area, visit);
}

/// A leaf to be changed, here or in its block.
fn leaf_mut<'a, B: WriteBlocks + ?Sized>(
    blocks: &'a mut B,
    root: &'a mut [u8],
    at: BlockAddress,
) -> Result<&'a mut [u8]> {
    Ok(if at == IN_INODE { root } else { blocks.modify(at, DirLeaf::KIND)?.as_mut_slice() })
}
