//! Blocks in memory, and how many of them an operation touched.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use crate::blocks::{BODY_BYTES, BlockKind, Body, ReadBlocks, WriteBlocks};
use crate::disk::BlockAddress;
use crate::vfs::{Result, VfsError};

/// Blocks in memory.
#[derive(Default)]
pub struct MemoryBlocks {
    blocks: HashMap<BlockAddress, (BlockKind, Arc<Body>)>,
    next: BlockAddress,
    read: RefCell<HashSet<BlockAddress>>,
    changed: HashSet<BlockAddress>,
}

impl MemoryBlocks {
    /// None.
    pub fn new() -> MemoryBlocks {
        MemoryBlocks { next: 1000, ..MemoryBlocks::default() }
    }

    /// How many blocks there are.
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Their addresses.
    pub fn addresses(&self) -> Vec<BlockAddress> {
        let mut addresses: Vec<_> = self.blocks.keys().copied().collect();
        addresses.sort_unstable();
        addresses
    }

    /// How many blocks were read and changed, each counted once, since this was last asked.
    pub fn touched(&mut self) -> (usize, usize) {
        let read = std::mem::take(&mut *self.read.borrow_mut());
        let changed = std::mem::take(&mut self.changed);
        (read.union(&changed).count(), changed.len())
    }

    /// Puts bytes where no tree would.
    pub fn overwrite(&mut self, at: BlockAddress, change: impl FnOnce(&mut Body)) {
        change(Arc::make_mut(&mut self.blocks.get_mut(&at).expect("a block").1));
    }
}

impl ReadBlocks for MemoryBlocks {
    fn read(&self, at: BlockAddress, kind: BlockKind) -> Result<Arc<Body>> {
        self.read.borrow_mut().insert(at);
        match self.blocks.get(&at) {
            Some((found, body)) if *found == kind => Ok(body.clone()),
            _ => Err(VfsError::Io(format!("block {at} is not a {kind:?}"))),
        }
    }
}

impl WriteBlocks for MemoryBlocks {
    fn modify(&mut self, at: BlockAddress, kind: BlockKind) -> Result<&mut Body> {
        self.changed.insert(at);
        match self.blocks.get_mut(&at) {
            Some((found, body)) if *found == kind => Ok(Arc::make_mut(body)),
            _ => Err(VfsError::Io(format!("block {at} is not a {kind:?}"))),
        }
    }

    fn make(&mut self, kind: BlockKind) -> Result<BlockAddress> {
        self.next += 1;
        self.blocks.insert(self.next, (kind, Arc::new([0; BODY_BYTES])));
        Ok(self.next)
    }

    fn free(&mut self, at: BlockAddress) -> Result<()> {
        match self.blocks.remove(&at) {
            Some(_) => Ok(()),
            None => Err(VfsError::Io(format!("block {at} is freed twice"))),
        }
    }
}
