//! The cache of metadata blocks as they are now.
//!
//! A block that is newer than on its home place is *pinned*: it stays until its newest image is home. What is not pinned can be forgotten at any
//! time. Readers hold the lock of the inode that a block belongs to, so that nobody publishes a block while another reads it from the disk.
//!
//! Who reads blocks that are near each other gets their neighbours along, in one request. Nobody holds the locks of those: they are entered only if
//! they were not here, and nothing that could have been theirs was published, brought home or freed since before they were read. Where inodes are
//! read group after group, a thread reads the next ones ahead ([`BlockCache::run_ahead`]), the same way.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use blockd::buf::AlignedBuf;

use super::Image;
use super::ahead::{Ahead, GROUP, Listed, Nearby};
use super::shard::{Kept, Shard};
use crate::blocks::{BlockKind, Body};
use crate::disk::{BLOCK_BYTES, BlockAddress, Disk};
use crate::layout::{Opened, RawBlock, open};
use crate::vfs::{Result, VfsError};

const SHARDS: usize = 32;

/// See the module.
pub struct BlockCache {
    disk: Arc<dyn Disk>,
    filesystem: [u8; 8],
    shards: Vec<Mutex<Shard>>,
    /// Bytes.
    shard_max: usize,
    inodes: Nearby,
    directories: Nearby,
    listed: Listed,
    ahead: Mutex<Ahead>,
    ahead_changed: Condvar,
}

impl BlockCache {
    /// An empty cache of so many bytes.
    pub fn new(disk: Arc<dyn Disk>, filesystem: [u8; 8], bytes: usize) -> BlockCache {
        let shards = (0..SHARDS).map(|_| Mutex::default()).collect();
        let shard_max = (bytes / SHARDS).max(8 * BLOCK_BYTES);
        BlockCache {
            disk,
            filesystem,
            shards,
            shard_max,
            inodes: Nearby::default(),
            directories: Nearby::default(),
            listed: Listed::default(),
            ahead: Mutex::default(),
            ahead_changed: Condvar::new(),
        }
    }

    /// The body of a block that must be there.
    pub fn read(&self, at: BlockAddress, kind: BlockKind) -> Result<Arc<Body>> {
        match self.get(at, kind)? {
            Some(image) => Ok(image.body),
            None => Err(damaged(at, kind, "it is empty")),
        }
    }

    /// A block; `None` if it was never written or is freed.
    pub(super) fn get(&self, at: BlockAddress, kind: BlockKind) -> Result<Option<Image>> {
        if let Some(kept) = self.shard(at).use_block(at) {
            return match kept.image() {
                Some(image) if image.kind != kind => Err(damaged(at, kind, &format!("it is of kind {:?}", image.kind))),
                image => Ok(image),
            };
        }
        let nearby = match kind {
            BlockKind::Inode => &self.inodes,
            BlockKind::Directory => &self.directories,
            _ => return self.load(at, kind),
        };
        if kind == BlockKind::Inode
            && let Some((first, count)) = self.listed.group(at, self.disk.blocks())
        {
            return self.load_group(at, kind, first, count);
        }
        match nearby.group(at, self.disk.blocks()) {
            (_, 1) => self.load(at, kind),
            (first, count) => {
                if kind == BlockKind::Inode && self.lock_ahead().missed(first, self.disk.blocks()) {
                    self.ahead_changed.notify_one();
                }
                self.load_group(at, kind, first, count)
            }
        }
    }

    /// Some inodes of a directory with `count` entries were listed: they and the others are likely to be asked for.
    pub(super) fn listed(&self, inodes: impl Iterator<Item = BlockAddress>, count: u64) {
        self.listed.saw(inodes, count, (self.shard_max * SHARDS) as u64);
    }

    /// A block from the disk.
    fn load(&self, at: BlockAddress, kind: BlockKind) -> Result<Option<Image>> {
        let mut block = [0; BLOCK_BYTES];
        self.disk.read(at, &mut block).map_err(|e| damaged(at, kind, &e.to_string()))?;
        self.enter(at, kind, &block)
    }

    /// The same, with its neighbours as far as they are of the same kind.
    fn load_group(&self, at: BlockAddress, kind: BlockKind, first: BlockAddress, count: u64) -> Result<Option<Image>> {
        let Some(blocks) = self.load_neighbours(Some(at), kind, first, count) else {
            // It may be a neighbour's fault.
            return self.load(at, kind);
        };
        let block = blocks[(at - first) as usize * BLOCK_BYTES..].first_chunk().expect("the group holds the block");
        self.enter(at, kind, block)
    }

    /// Reads blocks, and enters those of this kind but for `at`, of which no locks are held.
    fn load_neighbours(
        &self,
        at: Option<BlockAddress>,
        kind: BlockKind,
        first: BlockAddress,
        count: u64,
    ) -> Option<AlignedBuf> {
        let before: Vec<u64> = (0..SHARDS).map(|index| self.shard_at(index).changes).collect();
        let mut blocks = AlignedBuf::for_overwrite(count as usize * BLOCK_BYTES);
        self.disk.read(first, &mut blocks).ok()?;
        for (neighbour, block) in (first..).zip(blocks.as_chunks::<BLOCK_BYTES>().0) {
            if Some(neighbour) == at || self.shard(neighbour).has(neighbour) {
                continue;
            }
            // What is damaged says so when somebody asks for it.
            let Opened::Sound { version, body } = open(Some(self.filesystem), neighbour, kind, block) else { continue };
            let kept = Kept::home(kind, version, body);
            let index = shard_of(neighbour);
            let mut shard = self.shard_at(index);
            if shard.changes == before[index] && !shard.has(neighbour) {
                shard.enter(neighbour, kept, self.shard_max);
            }
        }
        Some(blocks)
    }

    /// Reads inodes ahead of who reads them in order, until [`BlockCache::end_ahead`]; for a thread of its own.
    pub(super) fn run_ahead(&self) {
        let mut ahead = self.lock_ahead();
        ahead.runs = true;
        while !ahead.ended {
            let first = ahead.wanted.start;
            let count = (ahead.wanted.end.saturating_sub(first)).min(GROUP);
            if count == 0 {
                ahead = self.ahead_changed.wait(ahead).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            ahead.wanted.start += count;
            drop(ahead);
            // What can't be read says so when somebody asks for it.
            let _ = self.load_neighbours(None, BlockKind::Inode, first, count);
            ahead = self.lock_ahead();
        }
        ahead.runs = false;
    }

    /// Ends [`BlockCache::run_ahead`].
    pub(super) fn end_ahead(&self) {
        self.lock_ahead().ended = true;
        self.ahead_changed.notify_all();
    }

    fn lock_ahead(&self) -> MutexGuard<'_, Ahead> {
        self.ahead.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block that was read from the disk under the lock of what it belongs to.
    fn enter(&self, at: BlockAddress, kind: BlockKind, block: &RawBlock) -> Result<Option<Image>> {
        match open(Some(self.filesystem), at, kind, block) {
            Opened::Empty => Ok(None),
            Opened::Damaged(why) => Err(damaged(at, kind, &why)),
            Opened::Sound { version, body } => {
                let mut shard = self.shard(at);
                // Another reader may have entered it, or one that read ahead.
                if let Some(kept) = shard.peek(at) {
                    return Ok(kept.image());
                }
                let kept = Kept::home(kind, version, body);
                let image = kept.image();
                shard.enter(at, kept, self.shard_max);
                Ok(image)
            }
        }
    }

    /// Shows and pins what was published in transaction `sequence`.
    pub(super) fn put(&self, at: BlockAddress, image: Option<Image>, sequence: u64) {
        self.shard(at).pin(at, image, sequence, self.shard_max);
    }

    /// Lets go of a block of which this version is home; of a newer one not.
    pub(super) fn unpin(&self, at: BlockAddress, version: u64) {
        self.shard(at).unpin(at, version);
    }

    /// Forgets a block that was freed and is discarded.
    pub(super) fn forget(&self, at: BlockAddress) {
        self.shard(at).forget(at);
    }

    /// The version of a block as far as that is known here, else 0.
    pub(super) fn version(&self, at: BlockAddress) -> u64 {
        self.shard(at).peek(at).and_then(Kept::version).unwrap_or(0)
    }

    /// The transaction that last changed a pinned block, else 0.
    pub(super) fn changed_in(&self, at: BlockAddress) -> u64 {
        self.shard(at).changed_in(at)
    }

    fn shard(&self, at: BlockAddress) -> MutexGuard<'_, Shard> {
        self.shard_at(shard_of(at))
    }

    fn shard_at(&self, index: usize) -> MutexGuard<'_, Shard> {
        self.shards[index].lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn shard_of(at: BlockAddress) -> usize {
    (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 59) as usize
}

fn damaged(at: BlockAddress, kind: BlockKind, why: &str) -> VfsError {
    tracing::error!(block = at, ?kind, why, "a metadata block can't be read");
    VfsError::Io(format!("metadata block {at} ({kind:?}) can't be read: {why}; run `fsd check`"))
}
