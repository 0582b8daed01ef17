//! Blocks in memory, and how many of them an operation touched.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use proptest::prelude::*;
use proptest::sample::Index;

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

/// Wrong bytes in one node of a tree: in its area, or in one of its blocks.
#[derive(Clone, Debug)]
pub struct Damage {
    in_area: bool,
    which: Index,
    bytes: Vec<(Index, u8)>,
    in_the_header: bool,
}

/// Any damage.
pub fn damage() -> impl Strategy<Value = Damage> {
    let bytes = prop::collection::vec((any::<Index>(), any::<u8>()), 1..20);
    (any::<bool>(), any::<Index>(), bytes, any::<bool>()).prop_map(|(in_area, which, bytes, in_the_header)| Damage {
        in_area,
        which,
        bytes,
        in_the_header,
    })
}

impl Damage {
    /// Puts the bytes where no tree would.
    pub fn strike(&self, blocks: &mut MemoryBlocks, area: &mut [u8]) {
        let spoil = |node: &mut [u8]| {
            let reach = if self.in_the_header { 24.min(node.len()) } else { node.len() };
            for (at, byte) in &self.bytes {
                node[at.index(reach)] = *byte;
            }
        };
        if self.in_area || blocks.len() == 0 {
            spoil(area);
        } else {
            let addresses = blocks.addresses();
            blocks.overwrite(*self.which.get(&addresses), |body| spoil(body));
        }
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

/// Compares an area and its blocks with the bytes kept in `tests/golden`. With FSD_BLESS set a file that is not there is written.
pub fn golden(name: &str, area: &[u8], blocks: &MemoryBlocks) {
    let mut bytes = area.to_vec();
    for at in blocks.addresses() {
        bytes.extend_from_slice(blocks.blocks[&at].1.as_slice());
    }
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if !path.exists() && std::env::var_os("FSD_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
        std::fs::write(&path, &bytes).expect("a file");
    }
    let kept = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    assert!(kept == bytes, "{name}: the bytes written have changed");
}

/// Blocks in memory that cost next to nothing to get at, to measure the trees alone.
#[derive(Default)]
pub struct PlainBlocks {
    blocks: Vec<Arc<Body>>,
    free: usize,
}

impl PlainBlocks {
    /// How many blocks there are.
    pub fn len(&self) -> usize {
        self.blocks.len() - self.free
    }
}

impl ReadBlocks for PlainBlocks {
    fn read(&self, at: BlockAddress, _: BlockKind) -> Result<Arc<Body>> {
        Ok(self.blocks[at as usize - 1].clone())
    }
}

impl WriteBlocks for PlainBlocks {
    fn modify(&mut self, at: BlockAddress, _: BlockKind) -> Result<&mut Body> {
        Ok(Arc::make_mut(&mut self.blocks[at as usize - 1]))
    }

    fn make(&mut self, _: BlockKind) -> Result<BlockAddress> {
        self.blocks.push(Arc::new([0; BODY_BYTES]));
        Ok(self.blocks.len() as u64)
    }

    fn free(&mut self, _: BlockAddress) -> Result<()> {
        self.free += 1;
        Ok(())
    }
}

/// Nanoseconds that this thread has run: others' work does not count.
fn thread_ns() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").expect("schedstat");
    stat.split(' ').next().and_then(|ns| ns.parse().ok()).expect("a number")
}

/// Runs `operation` for 0 to `times` and says what one took.
pub fn time(what: &str, times: u64, mut operation: impl FnMut(u64)) {
    let start = thread_ns();
    (0..times).for_each(&mut operation);
    println!("{what}: {} ns", (thread_ns() - start) / times);
}
