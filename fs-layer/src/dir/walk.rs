//! The checker's visit of a directory.

use super::area::{self, AreaHeader};
use super::leaf::{DirLeaf, LeafRef};
use super::{Entry, Visit};
use crate::blocks::ReadBlocks;
use crate::disk::BlockAddress;
use crate::tree::{self, IN_INODE};

struct Check<'a> {
    header: AreaHeader,
    visit: &'a mut dyn Visit,
    entries: u64,
    blocks: u64,
    /// Entries with the same hash or near, in which a name could be twice: key and name.
    near: Vec<(u64, Vec<u8>)>,
    whole: bool,
}

impl Check<'_> {
    fn entry(&mut self, at: BlockAddress, entry: Entry<'_>) {
        self.entries += 1;
        let (home, reach) = (self.header.home(entry.name), u64::from(self.header.reach.get()));
        if !(home..=home + reach).contains(&entry.key) {
            let name = String::from_utf8_lossy(entry.name);
            return tree::Walk::damage(self, at, format!("\"{name}\" is not where its hash {home:#x} leads"));
        }
        if reach > 0 {
            self.near.retain(|(key, _)| key + reach >= entry.key);
            if self.near.iter().any(|(_, name)| name == entry.name) {
                let name = String::from_utf8_lossy(entry.name);
                return tree::Walk::damage(self, at, format!("\"{name}\" is there twice"));
            }
            self.near.push((entry.key, entry.name.to_vec()));
        }
        self.visit.entry(entry);
    }
}

impl tree::Walk for Check<'_> {
    fn block(&mut self, at: BlockAddress) -> bool {
        self.blocks += 1;
        let seen = self.visit.block(at);
        self.whole &= seen;
        seen
    }

    fn leaf(&mut self, at: BlockAddress, node: &[u8]) {
        // The walk has verified the leaf.
        let Ok(leaf) = LeafRef::open(node) else { return };
        for index in 0..leaf.len() {
            match leaf.entry(index) {
                Ok(entry) => self.entry(at, entry),
                Err(what) => tree::Walk::damage(self, at, what),
            }
        }
    }

    fn damage(&mut self, at: BlockAddress, what: String) {
        self.whole = false;
        self.visit.damage((at != IN_INODE).then_some(at), what);
    }
}

pub fn walk<B: ReadBlocks + ?Sized>(blocks: &B, area: &[u8], visit: &mut dyn Visit) {
    let (header, root) = match area::open(area) {
        Ok((header, root)) => (*header, root),
        Err(e) => return visit.damage(None, e.to_string()),
    };
    let mut check = Check { header, visit, entries: 0, blocks: 0, near: Vec::new(), whole: true };
    tree::walk::<DirLeaf, B>(blocks, root, &mut check);
    // Where something was left out the counts can't be right.
    if check.whole && (check.entries, check.blocks) != (header.entries.get(), header.blocks.get()) {
        let (entries, blocks) = (check.entries, check.blocks);
        check.visit.damage(
            None,
            format!("{entries} entries in {blocks} blocks, but the inode says {} in {}", header.entries, header.blocks),
        );
    }
}
