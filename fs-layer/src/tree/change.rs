//! How a tree's shape changes, and its contents stay.

use zerocopy::little_endian::U64;

use super::node::{self, NODE_HEADER_BYTES, branches, capacity};
use super::path::Step;
use super::{IN_INODE, InNode, LEVELS_MAX, Leaf, Path, Sound, Span, format, header};
use crate::blocks::{BODY_BYTES, WriteBlocks};
use crate::disk::BlockAddress;
use crate::vfs::{Result, VfsError};

/// The root of a tree that is to be changed.
pub struct Root<'a> {
    /// The node in the inode.
    pub node: &'a mut [u8],
    /// How many blocks the tree has.
    pub blocks: &'a mut U64,
}

impl Root<'_> {
    fn make<L: Leaf, B: WriteBlocks + ?Sized>(&mut self, blocks: &mut B) -> Result<BlockAddress> {
        *self.blocks = self.blocks.get().saturating_add(1).into();
        blocks.make(L::KIND)
    }

    fn free<B: WriteBlocks + ?Sized>(&mut self, blocks: &mut B, at: BlockAddress) -> Result<()> {
        *self.blocks = self.blocks.get().saturating_sub(1).into();
        blocks.free(at)
    }

    /// Lets `change` change an inner node, here or in its block.
    fn inner<L: Leaf, B: WriteBlocks + ?Sized, T>(
        &mut self,
        blocks: &mut B,
        at: BlockAddress,
        change: impl FnOnce(&mut [u8]) -> Sound<T>,
    ) -> Result<T> {
        let node = if at == IN_INODE { &mut *self.node } else { blocks.modify(at, L::KIND)?.as_mut_slice() };
        node::check(node, Span::ALL).and_then(|()| change(node)).in_node::<L>(at)
    }
}

/// A node merges with a neighbour when less than this part of its room is used...
const SPARSE: usize = 4;

/// ...and this much of the room of `bytes` is enough for both.
fn merged_max(bytes: usize) -> usize {
    bytes / 4 * 3
}

/// Does one step towards room in the leaf that `path` leads to; the way there has to be looked for again.
pub fn make_room<L: Leaf, B: WriteBlocks + ?Sized>(blocks: &mut B, root: &mut Root<'_>, path: &Path) -> Result<()> {
    for (depth, step) in path.steps().iter().enumerate().rev() {
        let bytes = if step.at == IN_INODE { root.node.len() } else { BODY_BYTES };
        if usize::from(step.count) < capacity(bytes) {
            let most = L::ASCENDING && path.span.high == Span::ALL.high;
            return split::<L, B>(blocks, root, step, path.child(depth), most);
        }
    }
    push_down::<L, B>(blocks, root)
}

/// How many of a node's records or branches stay at the left when it is split.
pub fn split_at(count: usize, most: bool) -> usize {
    if most { count - count / 16 } else { count / 2 }
}

/// Copies a node to one of another length, which must have the room.
fn copy<L: Leaf>(from: &[u8], to: &mut [u8]) -> Sound<()> {
    check::<L>(from, Span::ALL)?;
    match header(from)?.level {
        0 => {
            L::clear(to);
            L::append(to, from)
        }
        level => {
            format(to, level);
            node::append(to, branches(from)?, 0)
        }
    }
}

/// Moves what the root holds into a block, which becomes its only child.
fn push_down<L: Leaf, B: WriteBlocks + ?Sized>(blocks: &mut B, root: &mut Root<'_>) -> Result<()> {
    let level = header(root.node).in_node::<L>(IN_INODE)?.level;
    if usize::from(level) + 1 >= LEVELS_MAX {
        return Err(VfsError::NoSpace);
    }
    let child = root.make::<L, B>(blocks)?;
    copy::<L>(root.node, blocks.modify(child, L::KIND)?).in_node::<L>(IN_INODE)?;
    format(root.node, level + 1);
    node::insert(root.node, 0, 0, child).in_node::<L>(IN_INODE)
}

/// Splits the child that `step` leads to; the node of the step has room for another branch.
fn split<L: Leaf, B: WriteBlocks + ?Sized>(
    blocks: &mut B,
    root: &mut Root<'_>,
    step: &Step,
    child: BlockAddress,
    most: bool,
) -> Result<()> {
    let old = blocks.read(child, L::KIND)?;
    let level = header(&*old).in_node::<L>(child)?.level;
    check::<L>(&*old, Span::ALL).in_node::<L>(child)?;
    let right = root.make::<L, B>(blocks)?;
    let key = if level == 0 {
        // Both halves are built beside the old node: the two blocks can't be borrowed at once.
        let (mut low, mut high) = ([0; BODY_BYTES], [0; BODY_BYTES]);
        L::clear(&mut low);
        L::clear(&mut high);
        let key = L::split(&*old, &mut low, &mut high, most).in_node::<L>(child)?;
        drop(old);
        blocks.modify(right, L::KIND)?.copy_from_slice(&high);
        blocks.modify(child, L::KIND)?.copy_from_slice(&low);
        key
    } else {
        let all = branches(&*old).in_node::<L>(child)?;
        let (low, high) = all.split_at(split_at(all.len(), most));
        let Some(key) = high.first().filter(|_| !low.is_empty()).map(|first| first.key.get()) else {
            return Err(super::damaged::<L>(child, "too few branches fill it"));
        };
        let node = blocks.modify(right, L::KIND)?;
        format(node, level);
        node::append(node, high, 0).in_node::<L>(child)?;
        let node = blocks.modify(child, L::KIND)?;
        format(node, level);
        node::append(node, low, 0).in_node::<L>(child)?;
        key
    };
    root.inner::<L, B, _>(blocks, step.at, |node| {
        node::insert(node, usize::from(step.index) + 1, key, right)?;
        node::check(node, Span::ALL)
    })
}

/// Frees and merges what has become empty or sparse on the way to a leaf from which something was removed.
pub fn shrink<L: Leaf, B: WriteBlocks + ?Sized>(blocks: &mut B, root: &mut Root<'_>, path: &Path) -> Result<()> {
    for (depth, step) in path.steps().iter().enumerate().rev() {
        let child = path.child(depth);
        let used = used::<L>(&*blocks.read(child, L::KIND)?).in_node::<L>(child)?;
        if used == 0 {
            root.free(blocks, child)?;
            // The last branch may go too: the node is then freed in turn, or becomes an empty leaf.
            root.inner::<L, B, _>(blocks, step.at, |node| node::remove(node, step.index.into()))?;
        } else if used >= (BODY_BYTES - NODE_HEADER_BYTES) / SPARSE || !merge::<L, B>(blocks, root, step, used)? {
            break;
        }
    }
    pull_up::<L, B>(blocks, root)
}

/// Merges the child that `step` leads to with a neighbour, if they fit together.
fn merge<L: Leaf, B: WriteBlocks + ?Sized>(
    blocks: &mut B,
    root: &mut Root<'_>,
    step: &Step,
    child_used: usize,
) -> Result<bool> {
    let index = usize::from(step.index);
    let parent = match step.at {
        IN_INODE => super::Node::Root(root.node),
        at => super::Node::Block(blocks.read(at, L::KIND)?),
    };
    let siblings = branches(&parent).in_node::<L>(step.at)?;
    for (left, neighbour) in [(Some(index), index + 1), (index.checked_sub(1), index.wrapping_sub(1))] {
        let (Some(left), Some(neighbour)) = (left, siblings.get(neighbour)) else { continue };
        let neighbour = neighbour.child.get();
        let used = used::<L>(&*blocks.read(neighbour, L::KIND)?).in_node::<L>(neighbour)?;
        if child_used + used > merged_max(BODY_BYTES) {
            continue;
        }
        let (into, from) = (siblings[left].child.get(), siblings[left + 1].child.get());
        let key = siblings[left + 1].key.get();
        drop(parent);
        let moved = blocks.read(from, L::KIND)?;
        check::<L>(&*moved, Span::ALL).in_node::<L>(from)?;
        let node = blocks.modify(into, L::KIND)?.as_mut_slice();
        check::<L>(node, Span::ALL).in_node::<L>(into)?;
        let (level, from_level) = (header(node).in_node::<L>(into)?.level, header(&*moved).in_node::<L>(from)?.level);
        match (level, from_level) {
            (0, 0) => L::append(node, &*moved),
            (a, b) if a == b => branches(&*moved).and_then(|moved| node::append(node, moved, key)),
            _ => Err(format!("level {level} beside {from_level}")),
        }
        .in_node::<L>(into)?;
        drop(moved);
        root.free(blocks, from)?;
        root.inner::<L, B, _>(blocks, step.at, |node| node::remove(node, left + 1))?;
        return Ok(true);
    }
    Ok(false)
}

/// Takes an only child's contents into the root while they fit well.
fn pull_up<L: Leaf, B: WriteBlocks + ?Sized>(blocks: &mut B, root: &mut Root<'_>) -> Result<()> {
    loop {
        if header(root.node).in_node::<L>(IN_INODE)?.level == 0 {
            return Ok(());
        }
        let child = match branches(root.node).in_node::<L>(IN_INODE)? {
            [] => {
                L::clear(root.node);
                return Ok(());
            }
            [only] => only.child.get(),
            _ => return Ok(()),
        };
        let node = blocks.read(child, L::KIND)?;
        // Half of the room stays free, so that the root does not go down again at once.
        if used::<L>(&*node).in_node::<L>(child)? > (root.node.len() - NODE_HEADER_BYTES) / 2 {
            return Ok(());
        }
        let level = header(root.node).in_node::<L>(IN_INODE)?.level;
        let below = header(&*node).in_node::<L>(child)?.level;
        if below + 1 != level {
            return Err(super::damaged::<L>(child, &format!("level {below} under {level}")));
        }
        copy::<L>(&*node, root.node).in_node::<L>(child)?;
        drop(node);
        root.free(blocks, child)?;
    }
}

/// Moves a root to one of another length.
pub fn refit<L: Leaf, B: WriteBlocks + ?Sized>(blocks: &mut B, from: &[u8], to: &mut Root<'_>) -> Result<()> {
    if used::<L>(from).in_node::<L>(IN_INODE)? <= capacity_bytes::<L>(from, to.node.len()).in_node::<L>(IN_INODE)? {
        return copy::<L>(from, to.node).in_node::<L>(IN_INODE);
    }
    let level = header(from).in_node::<L>(IN_INODE)?.level;
    if usize::from(level) + 1 >= LEVELS_MAX {
        return Err(VfsError::NoSpace);
    }
    let child = to.make::<L, B>(blocks)?;
    copy::<L>(from, blocks.modify(child, L::KIND)?).in_node::<L>(IN_INODE)?;
    format(to.node, level + 1);
    node::insert(to.node, 0, 0, child).in_node::<L>(IN_INODE)
}

/// What a node as `like` has room for if it is `bytes` long.
fn capacity_bytes<L: Leaf>(like: &[u8], bytes: usize) -> Sound<usize> {
    Ok(match header(like)?.level {
        0 => bytes - NODE_HEADER_BYTES,
        _ => capacity(bytes) * size_of::<node::Branch>(),
    })
}

/// Verifies all of a node.
pub(super) fn check<L: Leaf>(node: &[u8], span: Span) -> Sound<()> {
    if header(node)?.level == 0 { L::check(node, span) } else { node::check(node, span) }
}

/// Bytes that a node's contents need.
fn used<L: Leaf>(node: &[u8]) -> Sound<usize> {
    if header(node)?.level == 0 { L::used(node) } else { Ok(size_of_val(branches(node)?)) }
}
