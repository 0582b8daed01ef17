//! A part of the cache of metadata blocks.
//!
//! Most inodes are nearly all zeros, so that what is home is kept without them where that is an inode: ten and more take the memory of one block.
//! What is pinned is kept whole, because the journal has it whole too.

use std::collections::VecDeque;
use std::sync::Arc;

use super::Image;
use crate::blocks::{BODY_BYTES, BlockKind, Body};
use crate::disk::{BLOCK_BYTES, BlockAddress};
use crate::int_map::IntMap;
use crate::layout::XATTR_BYTES;

/// What an entry takes beside what it keeps, about.
const ENTRY_BYTES: usize = 128;
/// An inode with more than so many bytes is kept whole: it is as quickly read as it is put together.
const ENDS_MAX: usize = 1024;
/// Where the second end of an inode begins, that of its extended attributes.
const SECOND_END_AT: usize = BODY_BYTES - XATTR_BYTES;
/// Zeros are left out by so many bytes.
const GRAIN: usize = 64;

/// What is kept of a block.
pub(super) enum Kept {
    /// It was freed, and is to be discarded.
    Freed,
    Whole(Image),
    /// Of an inode.
    Ends(Ends),
}

/// An inode without the zeros behind its head and contents, and those behind its extended attributes.
pub(super) struct Ends {
    version: u64,
    first: usize,
    bytes: Box<[u8]>,
}

impl Ends {
    fn of(version: u64, body: &Body) -> Option<Ends> {
        let (first, second) = body.split_at(SECOND_END_AT);
        let (first, second) = (before_zeros(first), before_zeros(second));
        if first.len() + second.len() > ENDS_MAX {
            return None;
        }
        Some(Ends { version, first: first.len(), bytes: [first, second].concat().into() })
    }

    fn image(&self) -> Image {
        let (first, second) = self.bytes.split_at(self.first);
        let mut body = Arc::new([0; BODY_BYTES]);
        let whole = Arc::get_mut(&mut body).expect("nobody else has it yet");
        whole[..first.len()].copy_from_slice(first);
        whole[SECOND_END_AT..SECOND_END_AT + second.len()].copy_from_slice(second);
        Image { kind: BlockKind::Inode, version: self.version, body }
    }
}

fn before_zeros(bytes: &[u8]) -> &[u8] {
    let grains = bytes.chunks(GRAIN).rposition(|grain| grain != &[0; GRAIN][..grain.len()]);
    &bytes[..grains.map_or(0, |last| ((last + 1) * GRAIN).min(bytes.len()))]
}

impl Kept {
    /// Of a block that is home.
    pub fn home(kind: BlockKind, version: u64, body: &Body) -> Kept {
        let ends = if kind == BlockKind::Inode { Ends::of(version, body) } else { None };
        ends.map_or_else(|| Kept::Whole(Image { kind, version, body: Arc::new(*body) }), Kept::Ends)
    }

    /// The block; `None` if it was freed.
    pub fn image(&self) -> Option<Image> {
        match self {
            Kept::Freed => None,
            Kept::Whole(image) => Some(image.clone()),
            Kept::Ends(ends) => Some(ends.image()),
        }
    }

    /// Its version; `None` if it was freed.
    pub fn version(&self) -> Option<u64> {
        match self {
            Kept::Freed => None,
            Kept::Whole(image) => Some(image.version),
            Kept::Ends(ends) => Some(ends.version),
        }
    }

    fn bytes(&self) -> usize {
        ENTRY_BYTES
            + match self {
                Kept::Freed => 0,
                Kept::Whole(_) => BLOCK_BYTES,
                Kept::Ends(ends) => ends.bytes.len(),
            }
    }
}

struct Entry {
    kept: Kept,
    pinned: bool,
    used: bool,
    /// The transaction that last changed it.
    changed_in: u64,
}

/// See the module.
#[derive(Default)]
pub(super) struct Shard {
    entries: IntMap<BlockAddress, Entry>,
    clock: VecDeque<BlockAddress>,
    /// What the entries take.
    bytes: usize,
    /// How often something of this shard was published, brought home or freed.
    pub changes: u64,
}

impl Shard {
    pub fn has(&self, at: BlockAddress) -> bool {
        self.entries.contains_key(&at)
    }

    /// What is kept of a block, for somebody who needs it.
    pub fn use_block(&mut self, at: BlockAddress) -> Option<&Kept> {
        let entry = self.entries.get_mut(&at)?;
        entry.used = true;
        Some(&entry.kept)
    }

    /// The same, which says nothing about whether it will be needed again.
    pub fn peek(&self, at: BlockAddress) -> Option<&Kept> {
        self.entries.get(&at).map(|entry| &entry.kept)
    }

    /// The transaction that last changed a pinned block, else 0.
    pub fn changed_in(&self, at: BlockAddress) -> u64 {
        self.entries.get(&at).map_or(0, |entry| entry.changed_in)
    }

    /// Enters a block that is home and was not here.
    pub fn enter(&mut self, at: BlockAddress, kept: Kept, max: usize) {
        self.set(at, Entry { kept, pinned: false, used: false, changed_in: 0 }, max);
    }

    /// Enters and pins what transaction `sequence` published; `None`: it was freed.
    pub fn pin(&mut self, at: BlockAddress, image: Option<Image>, sequence: u64, max: usize) {
        self.changes += 1;
        let kept = image.map_or(Kept::Freed, Kept::Whole);
        self.set(at, Entry { kept, pinned: true, used: true, changed_in: sequence }, max);
    }

    /// Lets go of a block of which this version is home; of a newer one not.
    pub fn unpin(&mut self, at: BlockAddress, version: u64) {
        self.changes += 1;
        if let Some(entry) = self.entries.get_mut(&at)
            && let Kept::Whole(image) = &entry.kept
            && image.version == version
        {
            let kept = match image.kind {
                BlockKind::Inode => Ends::of(version, &image.body).map(Kept::Ends),
                _ => None,
            };
            self.bytes -= entry.kept.bytes();
            entry.kept = kept.unwrap_or_else(|| Kept::Whole(image.clone()));
            self.bytes += entry.kept.bytes();
            entry.pinned = false;
            entry.changed_in = 0;
        }
    }

    /// Lets go of a block that was freed and is discarded.
    pub fn forget(&mut self, at: BlockAddress) {
        self.changes += 1;
        if let Some(entry) = self.entries.get_mut(&at)
            && let Kept::Freed = entry.kept
        {
            entry.pinned = false;
            entry.used = false;
        }
    }

    fn set(&mut self, at: BlockAddress, entry: Entry, max: usize) {
        self.bytes += entry.kept.bytes();
        match self.entries.insert(at, entry) {
            Some(old) => self.bytes -= old.kept.bytes(),
            None => self.clock.push_back(at),
        }
        self.shrink(max);
    }

    /// Forgets what was not used lately until the rest takes at most `max` bytes, as far as it is not pinned.
    fn shrink(&mut self, max: usize) {
        let mut looks = 8;
        while self.bytes > max && looks > 0 {
            let Some(at) = self.clock.pop_front() else { return };
            let Some(entry) = self.entries.get_mut(&at) else { continue };
            if entry.pinned || entry.used {
                entry.used = false;
                self.clock.push_back(at);
                looks -= 1;
            } else {
                self.bytes -= entry.kept.bytes();
                self.entries.remove(&at);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inode(first: usize, second: usize) -> Body {
        let mut body = [0; BODY_BYTES];
        body[..first].fill(7);
        body[SECOND_END_AT..SECOND_END_AT + second].fill(9);
        body
    }

    #[test]
    fn an_inode_is_the_same_without_its_zeros() {
        for (first, second) in [(0, 0), (1, 0), (64, 1), (65, XATTR_BYTES), (192, 63), (700, 200), (SECOND_END_AT, 0)] {
            let body = inode(first, second);
            let kept = Kept::home(BlockKind::Inode, 5, &body);
            let image = kept.image().unwrap();
            assert_eq!((image.kind, image.version, kept.version()), (BlockKind::Inode, 5, Some(5)));
            assert!(*image.body == body, "{first} {second}");
            assert_eq!(kept.bytes() < BLOCK_BYTES, first + second <= ENDS_MAX, "{first} {second}");
        }
        // Whole trees of directories are looked through at each name: they stay whole.
        assert!(matches!(Kept::home(BlockKind::Directory, 5, &inode(100, 0)), Kept::Whole(_)));
    }

    #[test]
    fn what_is_kept_is_counted_and_limited() {
        let max = 100 * BLOCK_BYTES;
        let mut shard = Shard::default();
        let image = |at: u64| Image { kind: BlockKind::Inode, version: at, body: Arc::new(inode(200, 0)) };
        for at in 0..90 {
            shard.pin(at, Some(image(at)), 1, max);
        }
        assert!(shard.bytes >= 90 * BLOCK_BYTES);
        for at in 0..90 {
            shard.unpin(at, at);
        }
        assert!(shard.bytes < 10 * BLOCK_BYTES, "{}", shard.bytes);
        for at in 90..10_000 {
            shard.enter(at, Kept::home(BlockKind::Inode, at, &inode(200, 0)), max);
        }
        assert!(shard.bytes <= max && shard.entries.len() > 1000, "{} {}", shard.bytes, shard.entries.len());
        assert_eq!(shard.entries.values().map(|entry| entry.kept.bytes()).sum::<usize>(), shard.bytes);
        // Large ones make room for themselves.
        for at in 10_000..11_000 {
            shard.enter(at, Kept::home(BlockKind::Directory, at, &inode(200, 0)), max);
        }
        assert!(shard.bytes <= max && shard.entries.len() < 100, "{} {}", shard.bytes, shard.entries.len());
        // What is pinned stays, however much it is.
        for at in 0..200 {
            shard.pin(at, Some(image(at)), 2, max);
        }
        assert!((0..200).all(|at| shard.has(at) && shard.changed_in(at) == 2));
    }
}
