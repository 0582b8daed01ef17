//! The changes of one operation, until they are published as a whole.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::{Image, Journal};
use crate::alloc::Allocator;
use crate::blocks::{BODY_BYTES, BlockKind, Body, ReadBlocks, WriteBlocks};
use crate::disk::BlockAddress;
use crate::file::Page;
use crate::vfs::{Result, VfsError};

struct Change {
    kind: BlockKind,
    /// The version that was found; 0 for a new block.
    base: u64,
    /// `None`: freed.
    body: Option<Arc<Body>>,
}

/// See the module. What is dropped without [`Tx::publish`] never happened, but for numbers and addresses, which are not given out
/// again.
pub struct Tx<'a> {
    journal: &'a Journal,
    allocator: &'a Allocator,
    changes: BTreeMap<BlockAddress, Change>,
    contents: Vec<(BlockAddress, Page)>,
    freed: Vec<(BlockAddress, u64)>,
    blocks: i64,
    files: i64,
    /// The requests that this does; 0 where nobody wants to know.
    requests: [u64; 2],
}

impl<'a> Tx<'a> {
    /// No changes yet. The locks of all inodes whose blocks are changed must be held until it is published or dropped.
    pub fn new(journal: &'a Journal, allocator: &'a Allocator) -> Tx<'a> {
        Tx {
            journal,
            allocator,
            changes: BTreeMap::new(),
            contents: Vec::new(),
            freed: Vec::new(),
            blocks: 0,
            files: 0,
            requests: [0; 2],
        }
    }

    /// Sets a whole block, which may be new.
    pub fn put(&mut self, at: BlockAddress, kind: BlockKind, body: Arc<Body>) -> Result<()> {
        match self.changes.get_mut(&at) {
            Some(change) => change.body = Some(body),
            None => {
                let base = self.journal.cache.get(at, kind)?.map_or(0, |image| image.version);
                self.changes.insert(at, Change { kind, base, body: Some(body) });
            }
        }
        Ok(())
    }

    /// Gives a data block these contents. It is read with [`Journal::read_data`] from then on, and not written to as long as it is
    /// [`Journal::held`].
    pub fn put_contents(&mut self, at: BlockAddress, page: Page) {
        self.contents.push((at, page));
    }

    /// Of how many data blocks this has contents.
    pub fn contents(&self) -> usize {
        self.contents.len()
    }

    /// Notes that this does requests: after a crash the notes are there exactly if the changes are. 0 is none.
    pub fn note(&mut self, requests: [u64; 2]) {
        self.requests = requests;
    }

    /// Sets a whole block that was never on the disk: its address is new.
    pub fn put_new(&mut self, at: BlockAddress, kind: BlockKind, body: Arc<Body>) {
        let base = self.journal.cache.version(at);
        self.changes.entry(at).or_insert(Change { kind, base, body: None }).body = Some(body);
    }

    /// Counts files that were made, or removed.
    pub fn count_files(&mut self, files: i64) {
        self.files += files;
        self.blocks += files;
    }

    /// Counts blocks of data that were given addresses.
    pub fn count_blocks(&mut self, blocks: i64) {
        self.blocks += blocks;
    }

    /// Gives up blocks: they are discarded once the transaction is durable. Does not count them.
    pub fn discard(&mut self, at: BlockAddress, count: u64) {
        self.freed.push((at, count));
    }

    /// Gives up an inode's block.
    pub fn free_inode(&mut self, at: BlockAddress) {
        self.remove(at);
        self.count_files(-1);
    }

    /// Contiguous addresses that were never used.
    pub fn allocate(&self, count: u64) -> Result<BlockAddress> {
        self.allocator.addresses(count)
    }

    /// How many blocks this changes.
    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// Whether nothing was changed.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty() && self.contents.is_empty() && self.freed.is_empty()
    }

    fn remove(&mut self, at: BlockAddress) {
        let change = self.changes.entry(at).or_insert(Change { kind: BlockKind::Inode, base: 0, body: None });
        change.body = None;
        self.freed.push((at, 1));
    }

    /// Everybody sees the changes from now on. Returns the number of the transaction they belong to.
    ///
    /// # Errors
    /// If nothing can be changed any more; then it never happened.
    pub fn publish(self) -> Result<u64> {
        let mut state = self.journal.lock();
        if let Some(why) = &state.dead {
            return Err(super::dead(why));
        }
        let sequence = state.sequence;
        state.counts.blocks += self.blocks;
        state.counts.files += self.files;
        for request in self.requests {
            if request != 0 {
                state.host.note(request);
            }
        }
        for (at, count) in &self.freed {
            state.running.contents.extract_if(*at..*at + count, |_, _| true).for_each(drop);
            self.journal.held.free(*at, *count);
        }
        state.running.freed.extend_from_slice(&self.freed);
        for (at, page) in self.contents {
            self.journal.held.put(at, page.clone(), sequence);
            state.running.contents.insert(at, page);
        }
        for (at, change) in self.changes {
            let image = change.body.map(|body| {
                let version = match state.running.blocks.get(&at) {
                    Some(Some(running)) => running.version,
                    _ => change.base + 1,
                };
                Image { kind: change.kind, version, body }
            });
            self.journal.cache.put(at, image.clone(), sequence);
            state.running.blocks.insert(at, image);
        }
        Ok(sequence)
    }
}

impl ReadBlocks for Tx<'_> {
    fn read(&self, at: BlockAddress, kind: BlockKind) -> Result<Arc<Body>> {
        match self.changes.get(&at) {
            Some(Change { body: Some(body), kind: found, .. }) if *found == kind => Ok(body.clone()),
            Some(_) => Err(VfsError::Io(format!("metadata block {at} was freed or is not of kind {kind:?}"))),
            None => self.journal.read(at, kind),
        }
    }
}

impl WriteBlocks for Tx<'_> {
    fn modify(&mut self, at: BlockAddress, kind: BlockKind) -> Result<&mut Body> {
        if !self.changes.contains_key(&at) {
            let image = self.journal.cache.get(at, kind)?;
            let image = image.ok_or_else(|| VfsError::Io(format!("metadata block {at} ({kind:?}) is empty")))?;
            self.changes.insert(at, Change { kind, base: image.version, body: Some(image.body) });
        }
        match self.changes.get_mut(&at) {
            Some(Change { body: Some(body), kind: found, .. }) if *found == kind => Ok(Arc::make_mut(body)),
            _ => Err(VfsError::Io(format!("metadata block {at} was freed or is not of kind {kind:?}"))),
        }
    }

    fn make(&mut self, kind: BlockKind) -> Result<BlockAddress> {
        let at = self.allocator.addresses(1)?;
        self.changes.insert(at, Change { kind, base: 0, body: Some(Arc::new([0; BODY_BYTES])) });
        self.blocks += 1;
        Ok(at)
    }

    fn free(&mut self, at: BlockAddress) -> Result<()> {
        self.remove(at);
        self.blocks -= 1;
        Ok(())
    }
}
