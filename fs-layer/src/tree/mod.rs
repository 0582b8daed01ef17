//! The B+tree that directories and extent maps have in common: nodes, ways down, and how the tree's shape changes.
//!
//! The root is a node of its own length in the inode; all others fill the body of a block. What the leaves hold is the business of
//! a [`Leaf`]. The shape changes by steps each of which leaves a valid tree with the same contents: the root moves down into a block of its own
//! or comes up again, a node is split in two, two neighbours are merged, an empty node is freed. Whoever needs room in a leaf calls
//! [`make_room`] and looks again; whoever took something out of one calls [`shrink`].
//!
//! What must hold: levels count down by one to 0 at the leaves; a node's keys ascend and are in the span its parent gives it; no node but the
//! root is empty. A node is verified where it is touched, and whole before its contents are moved, so that damage is never spread. Nothing here
//! panics on any bytes.

mod change;
mod node;
mod path;
#[cfg(test)]
pub mod testing;
mod walk;

pub use change::{Root, make_room, refit, shrink, split_at};
pub use node::{NODE_HEADER_BYTES, NodeHeader, format, header};
pub use path::{Node, Path, descend};
pub use walk::{Walk, walk};

use crate::blocks::BlockKind;
use crate::disk::BlockAddress;
use crate::vfs::VfsError;

/// Stands for the root where a node's address is asked for: no node is in the superblock.
pub const IN_INODE: BlockAddress = 0;
/// More levels than a tree of any use has.
pub const LEVELS_MAX: usize = 10;

/// A result whose error says what is wrong with a node, without naming it.
pub type Sound<T> = std::result::Result<T, String>;

/// The keys that a node may hold: from `low` up to, not with, `high`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// The least key.
    pub low: u64,
    /// Above the greatest key; [`u64::MAX`]: no bound.
    pub high: u64,
}

impl Span {
    /// The root's.
    pub const ALL: Span = Span { low: 0, high: u64::MAX };

    /// Whether a key is in it.
    pub fn contains(self, key: u64) -> bool {
        self.low <= key && key < self.high
    }
}

/// What the leaves of a tree hold: records in the order of their keys. Nodes come with their header, which [`header`] has
/// accepted, and a level of 0.
pub trait Leaf {
    /// Of the blocks of this tree.
    const KIND: BlockKind;
    /// Whose node it is, for messages.
    const WHAT: &'static str;

    /// Whether records often come in the order of their keys: the last node is then split near its end.
    const ASCENDING: bool;

    /// Verifies all of a node.
    fn check(node: &[u8], span: Span) -> Sound<()>;

    /// Makes a node of this length an empty leaf.
    fn clear(node: &mut [u8]);

    /// Bytes that the records take in a node without gaps. The room of a node is its length without [`NODE_HEADER_BYTES`].
    fn used(node: &[u8]) -> Sound<usize>;

    /// Adds the records of `from`, whose keys are above those of `to`.
    fn append(to: &mut [u8], from: &[u8]) -> Sound<()>;

    /// Distributes the records of `from` over two nodes, both cleared before: about half of them, or all but a few if `most`, to the left one.
    /// Returns the first key of the right one.
    fn split(from: &[u8], left: &mut [u8], right: &mut [u8], most: bool) -> Sound<u64>;
}

/// The error for a node that is not what it must be.
pub fn damaged<L: Leaf>(at: BlockAddress, what: &str) -> VfsError {
    VfsError::Io(if at == IN_INODE {
        format!("the root of the {} in the inode is damaged: {what}; run fsd check", L::WHAT)
    } else {
        format!("block {at}, a node of a {}, is damaged: {what}; run fsd check", L::WHAT)
    })
}

/// Names the node in which something is wrong.
pub trait InNode<T> {
    /// The error of [`damaged`].
    fn in_node<L: Leaf>(self, at: BlockAddress) -> crate::vfs::Result<T>;
}

impl<T> InNode<T> for Sound<T> {
    fn in_node<L: Leaf>(self, at: BlockAddress) -> crate::vfs::Result<T> {
        self.map_err(|what| damaged::<L>(at, &what))
    }
}
