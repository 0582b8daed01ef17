//! The way from the root to a leaf.

use std::ops::Deref;
use std::sync::Arc;

use super::node::{branches, choose};
use super::{IN_INODE, InNode, LEVELS_MAX, Leaf, Span, header};
use crate::blocks::{Body, ReadBlocks};
use crate::disk::BlockAddress;
use crate::vfs::Result;

/// An inner node on a way, and where the way goes on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Step {
    /// Its block, or [`IN_INODE`].
    pub at: BlockAddress,
    /// Which of its branches.
    pub index: u16,
    /// How many branches it has.
    pub count: u16,
}

/// The way to a leaf. Good until the tree's shape changes.
#[derive(Clone, Copy, Debug)]
pub struct Path {
    steps: [Step; LEVELS_MAX],
    depth: usize,
    /// The leaf's block, or [`IN_INODE`].
    pub leaf: BlockAddress,
    /// What the leaf may hold.
    pub span: Span,
}

impl Path {
    /// The inner nodes from the root on.
    pub(super) fn steps(&self) -> &[Step] {
        &self.steps[..self.depth]
    }

    /// The address of the child that the `depth`th step leads to.
    pub(super) fn child(&self, depth: usize) -> BlockAddress {
        self.steps().get(depth + 1).map_or(self.leaf, |s| s.at)
    }
}

/// A node's bytes. Not to be kept while the block is changed: that would cost a copy.
pub enum Node<'a> {
    /// In the inode.
    Root(&'a [u8]),
    /// In a block.
    Block(Arc<Body>),
}

impl Deref for Node<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Node::Root(node) => node,
            Node::Block(body) => body.as_slice(),
        }
    }
}

/// The leaf that holds `key` if any does. Its header is sound, the rest is not yet verified.
pub fn descend<'a, L: Leaf, B: ReadBlocks + ?Sized>(blocks: &B, root: &'a [u8], key: u64) -> Result<(Path, Node<'a>)> {
    let mut path = Path { steps: [Step::default(); LEVELS_MAX], depth: 0, leaf: IN_INODE, span: Span::ALL };
    let mut node = Node::Root(root);
    let mut level = header(&node).in_node::<L>(IN_INODE)?.level;
    while level > 0 {
        let branches = branches(&node).in_node::<L>(path.leaf)?;
        let (index, child, span) = choose(branches, key, path.span).in_node::<L>(path.leaf)?;
        path.steps[path.depth] = Step { at: path.leaf, index: index as u16, count: branches.len() as u16 };
        path.depth += 1;
        path.leaf = child;
        path.span = span;
        node = Node::Block(blocks.read(child, L::KIND)?);
        let found = header(&node).in_node::<L>(child)?;
        level -= 1;
        if found.level != level {
            return Err(super::damaged::<L>(child, &format!("level {}, where {level} must be", found.level)));
        }
        if found.count.get() == 0 {
            return Err(super::damaged::<L>(child, "it is empty"));
        }
    }
    Ok((path, node))
}
