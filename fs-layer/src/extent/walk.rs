//! The checker's visit of an extent map.

use super::leaf::{ExtentLeaf, LeafRef};
use super::map::{claimed_end, claimed_start};
use super::{Counts, Visit, area};
use crate::blocks::ReadBlocks;
use crate::disk::BlockAddress;
use crate::tree::{self, IN_INODE};

struct Check<'a> {
    visit: &'a mut dyn Visit,
    counts: Counts,
    /// The end of the last extent with its reserve.
    end: u64,
    whole: bool,
}

impl tree::Walk for Check<'_> {
    fn block(&mut self, at: BlockAddress) -> bool {
        self.counts.nodes += 1;
        let seen = self.visit.block(at);
        self.whole &= seen;
        seen
    }

    fn leaf(&mut self, at: BlockAddress, node: &[u8]) {
        // The walk has verified the leaf.
        let Ok(leaf) = LeafRef::open(node) else { return };
        for index in 0..leaf.len() {
            let Ok(Some(extent)) = leaf.get(index) else { return };
            if claimed_start(&extent) < self.end {
                self.damage(at, format!("extent {index} overlaps the one before, in another leaf"));
                continue;
            }
            self.end = claimed_end(&extent);
            self.counts.extents += 1;
            self.counts.mapped += u64::from(extent.count);
            self.counts.unwritten += if extent.unwritten { extent.count.into() } else { 0 };
            self.visit.extent(extent);
        }
    }

    fn damage(&mut self, at: BlockAddress, what: String) {
        self.whole = false;
        self.visit.damage((at != IN_INODE).then_some(at), what);
    }
}

pub fn walk<B: ReadBlocks + ?Sized>(blocks: &B, area: &[u8], visit: &mut dyn Visit) {
    let (header, root) = match area::open(area) {
        Ok((header, root)) => (header, root),
        Err(e) => return visit.damage(None, e.to_string()),
    };
    let mut check = Check { visit, counts: Counts::default(), end: 0, whole: true };
    tree::walk::<ExtentLeaf, B>(blocks, root, &mut check);
    // Where something was left out the counts can't be right.
    if check.whole && check.counts != header.counts() {
        let what = format!("found {:?}, but the inode says {:?}", check.counts, header.counts());
        check.visit.damage(None, what);
    }
}
