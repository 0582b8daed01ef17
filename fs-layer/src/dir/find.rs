//! Looking for a name: from its hash on, as far as any entry was ever put from its own.

use super::Target;
use super::area::AreaHeader;
use super::leaf::{DirLeaf, LeafRef};
use crate::blocks::ReadBlocks;
use crate::tree::{InNode, Path, Span, descend};
use crate::vfs::Result;

/// Where an entry is.
pub struct Found {
    pub path: Path,
    pub index: usize,
    pub target: Target,
}

/// Where an entry could be put.
pub struct Free {
    /// The least free key from the hash on.
    pub key: u64,
    /// The leaf and the index there, if they are known, and whether the leaf has room.
    pub place: Option<(Path, usize, bool)>,
}

/// The entry of a name.
pub fn lookup<B: ReadBlocks + ?Sized>(
    blocks: &B,
    header: &AreaHeader,
    root: &[u8],
    name: &[u8],
) -> Result<Option<Found>> {
    let home = header.home(name);
    let last = home + u64::from(header.reach.get());
    let mut cursor = home;
    loop {
        let (path, node) = descend::<DirLeaf, B>(blocks, root, cursor)?;
        let at = path.leaf;
        let leaf = LeafRef::open(&node).in_node::<DirLeaf>(at)?;
        let (start, exact) = leaf.find(cursor, path.span).in_node::<DirLeaf>(at)?;
        if home == last && !exact {
            return Ok(None);
        }
        for index in start..leaf.len() {
            if leaf.key(index).in_node::<DirLeaf>(at)? > last {
                return Ok(None);
            }
            let entry = leaf.entry(index).in_node::<DirLeaf>(at)?;
            if entry.name == name {
                return Ok(Some(Found { path, index, target: entry.target }));
            }
        }
        cursor = path.span.high;
        if cursor > last {
            return Ok(None);
        }
    }
}

/// The least free key for a name; or that it is there.
pub fn free<B: ReadBlocks + ?Sized>(
    blocks: &B,
    header: &AreaHeader,
    root: &[u8],
    name: &[u8],
) -> Result<std::result::Result<Free, Found>> {
    let home = header.home(name);
    let last = home + u64::from(header.reach.get());
    let mut free = Free { key: home, place: None };
    let mut cursor = home;
    loop {
        let (path, node) = descend::<DirLeaf, B>(blocks, root, cursor)?;
        let at = path.leaf;
        let leaf = LeafRef::open(&node).in_node::<DirLeaf>(at)?;
        let (start, exact) = leaf.find(cursor, path.span).in_node::<DirLeaf>(at)?;
        if cursor == home && !exact {
            free.place = Some((path, start, leaf.has_room(name)));
        }
        for index in start..leaf.len() {
            let entry = leaf.entry(index).in_node::<DirLeaf>(at)?;
            if entry.key > last && entry.key != free.key {
                return Ok(Ok(free));
            }
            if entry.key == free.key {
                free.key += 1;
            }
            if entry.name == name {
                return Ok(Err(Found { path, index, target: entry.target }));
            }
        }
        cursor = path.span.high;
        if cursor == Span::ALL.high || (cursor > last && cursor != free.key) {
            return Ok(Ok(free));
        }
    }
}
