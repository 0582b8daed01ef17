//! The header of a node, and inner nodes: branches to children.
//!
//! Of an inner node's branches each leads to the keys from its own up to the next one's. The first branch's key is 0 and means
//! the node's least.

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{LEVELS_MAX, Sound, Span};
use crate::blocks::BODY_BYTES;
use crate::disk::BlockAddress;

/// The version of all nodes that this code writes and reads.
const VERSION: u8 = 1;
/// Bytes before the contents of a node.
pub const NODE_HEADER_BYTES: usize = 8;

/// What each node begins with.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct NodeHeader {
    version: u8,
    /// 0: a leaf.
    pub level: u8,
    /// Records, or branches.
    pub count: U16,
    /// The leaf's own; 0 in inner nodes.
    pub own: [U16; 2],
}

const _: () = assert!(size_of::<NodeHeader>() == NODE_HEADER_BYTES);
// Offsets in a node are 16 bits wide.
const _: () = assert!(BODY_BYTES < 1 << 16);

/// A child of an inner node.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Branch {
    /// The least key in the child; 0 for the first.
    pub key: U64,
    /// The address of the child's block.
    pub child: U64,
}

const BRANCH_BYTES: usize = 16;
const _: () = assert!(size_of::<Branch>() == BRANCH_BYTES);

/// Makes a node empty. All else becomes zeros, which cost nothing in the journal.
pub fn format(node: &mut [u8], level: u8) {
    node.fill(0);
    let header = NodeHeader { version: VERSION, level, count: U16::ZERO, own: [U16::ZERO; 2] };
    node[..NODE_HEADER_BYTES].copy_from_slice(header.as_bytes());
}

/// The header of a node.
pub fn header(node: &[u8]) -> Sound<NodeHeader> {
    let (header, _) = NodeHeader::read_from_prefix(node).map_err(|_| "too short".to_string())?;
    if header.version != VERSION {
        return Err(format!("version {} of a node is not known", header.version));
    }
    if usize::from(header.level) >= LEVELS_MAX {
        return Err(format!("level {} is too high", header.level));
    }
    Ok(header)
}

/// How many branches a node of this length can have.
pub(super) fn capacity(node_bytes: usize) -> usize {
    (node_bytes - NODE_HEADER_BYTES) / BRANCH_BYTES
}

/// The branches of an inner node.
pub(super) fn branches(node: &[u8]) -> Sound<&[Branch]> {
    let header = header(node)?;
    if header.level == 0 {
        return Err("a leaf where an inner node must be".to_string());
    }
    <[Branch]>::ref_from_prefix_with_elems(&node[NODE_HEADER_BYTES..], header.count.get().into())
        .map(|(branches, _)| branches)
        .map_err(|_| format!("{} branches do not fit", header.count))
}

/// Verifies all of an inner node.
pub(super) fn check(node: &[u8], span: Span) -> Sound<()> {
    let branches = branches(node)?;
    let mut low = span.low;
    for (i, branch) in branches.iter().enumerate() {
        let key = branch.key.get();
        if branch.child.get() == 0 {
            return Err(format!("branch {i} leads nowhere"));
        }
        if i == 0 && key != 0 {
            return Err("the first branch has a key".to_string());
        }
        if i > 0 && (key <= low || key >= span.high) {
            return Err(format!("branch {i} is out of order"));
        }
        low = low.max(key);
    }
    if branches.is_empty() { Err("an inner node without branches".to_string()) } else { Ok(()) }
}

/// The branch that leads to `key`, its child and what the child may hold.
pub(super) fn choose(branches: &[Branch], key: u64, span: Span) -> Sound<(usize, BlockAddress, Span)> {
    let index = branches.partition_point(|b| b.key.get() <= key).saturating_sub(1);
    let branch = branches.get(index).ok_or("an inner node without branches")?;
    let low = if index == 0 { span.low } else { branch.key.get() };
    let high = branches.get(index + 1).map_or(span.high, |b| b.key.get());
    if branch.child.get() == 0 {
        return Err(format!("branch {index} leads nowhere"));
    }
    if low < span.low || high > span.high || !(low..high).contains(&key) {
        return Err(format!("branch {index} is out of order"));
    }
    Ok((index, branch.child.get(), Span { low, high }))
}

/// Adds a branch as the `index`th of a sound node.
pub(super) fn insert(node: &mut [u8], index: usize, key: u64, child: BlockAddress) -> Sound<()> {
    let count = branches(node)?.len();
    let branches = <[Branch]>::mut_from_prefix_with_elems(&mut node[NODE_HEADER_BYTES..], count + 1);
    let (branches, _) = branches.map_err(|_| "no room for a branch")?;
    if index > count {
        return Err("fewer branches than there were".to_string());
    }
    branches.copy_within(index..count, index + 1);
    branches[index] = Branch { key: key.into(), child: child.into() };
    set_count(node, count + 1);
    Ok(())
}

/// Removes the `index`th branch of a sound node. What its child held is the one's before it, or if there is none, the next one's.
pub(super) fn remove(node: &mut [u8], index: usize) -> Sound<()> {
    let count = branches(node)?.len();
    let branches = <[Branch]>::mut_from_prefix_with_elems(&mut node[NODE_HEADER_BYTES..], count);
    let (branches, _) = branches.map_err(|_| "branches do not fit")?;
    if index >= count {
        return Err("fewer branches than there were".to_string());
    }
    branches.copy_within(index + 1.., index);
    branches[count - 1].as_mut_bytes().fill(0);
    branches[0].key = U64::ZERO;
    set_count(node, count - 1);
    Ok(())
}

/// Adds the branches of `from`; `key` is the least key below the first of them.
pub(super) fn append(to: &mut [u8], from: &[Branch], key: u64) -> Sound<()> {
    let count = branches(to)?.len();
    let all = <[Branch]>::mut_from_prefix_with_elems(&mut to[NODE_HEADER_BYTES..], count + from.len());
    let (all, _) = all.map_err(|_| "no room for the branches of a neighbour")?;
    all[count..].copy_from_slice(from);
    if let Some(first) = all.get_mut(count) {
        first.key = key.into();
    }
    let count = all.len();
    set_count(to, count);
    Ok(())
}

fn set_count(node: &mut [u8], count: usize) {
    node[2..4].copy_from_slice(&(count as u16).to_le_bytes());
}
