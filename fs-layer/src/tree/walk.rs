//! A visit of everything in a tree, for the checker.

use super::change::check;
use super::node::branches;
use super::{IN_INODE, Leaf, Node, Span, header};
use crate::blocks::ReadBlocks;
use crate::disk::BlockAddress;

/// What a walk meets.
pub trait Walk {
    /// A block, before what it holds. What `false` is returned for is left out.
    fn block(&mut self, at: BlockAddress) -> bool;
    /// A sound leaf, in the order of the keys.
    fn leaf(&mut self, at: BlockAddress, node: &[u8]);
    /// A damaged node; what hangs on it is left out.
    fn damage(&mut self, at: BlockAddress, what: String);
}

/// Visits all nodes. Only these and the order of keys are verified here.
pub fn walk<L: Leaf, B: ReadBlocks + ?Sized>(blocks: &B, root: &[u8], to: &mut impl Walk) {
    let level = header(root).map_or(0, |h| h.level);
    visit::<L, B>(blocks, IN_INODE, &Node::Root(root), level, Span::ALL, to);
}

fn visit<L: Leaf, B: ReadBlocks + ?Sized>(
    blocks: &B,
    at: BlockAddress,
    node: &[u8],
    level: u8,
    span: Span,
    to: &mut impl Walk,
) {
    let sound = header(node).and_then(|found| match found.level == level {
        true => check::<L>(node, span),
        false => Err(format!("level {}, where {level} must be", found.level)),
    });
    if let Err(what) = sound {
        return to.damage(at, what);
    }
    let Ok(branches) = branches(node) else {
        if at != IN_INODE && L::used(node) == Ok(0) {
            return to.damage(at, "an empty leaf".to_string());
        }
        return to.leaf(at, node);
    };
    for (i, branch) in branches.iter().enumerate() {
        let child = branch.child.get();
        if !to.block(child) {
            continue;
        }
        let span = Span {
            low: if i == 0 { span.low } else { branch.key.get() },
            high: branches.get(i + 1).map_or(span.high, |next| next.key.get()),
        };
        match blocks.read(child, L::KIND) {
            Ok(body) => visit::<L, B>(blocks, child, &*body, level - 1, span, to),
            Err(e) => to.damage(child, e.to_string()),
        }
    }
}
