//! A disk whose changes stay in memory, above one that is only read: so that the journal of what must not change can be replayed.

use std::collections::BTreeMap;
use std::io;
use std::ops::Deref;
use std::sync::{PoisonError, RwLock, RwLockWriteGuard};

use super::{BLOCK_BYTES, BlockAddress, Disk};

/// What was changed. Writes come after the discards of the same blocks, as each discard drops what was written before.
#[derive(Default)]
struct Changes {
    /// Without the zeros at their ends: most blocks of metadata are mostly zeros, and short in the journal.
    written: BTreeMap<BlockAddress, Box<[u8]>>,
    /// First block and the one behind the last of ranges that do not meet.
    discarded: BTreeMap<BlockAddress, BlockAddress>,
}

/// See the module. It grows with what is written, which for a replay is about what the journal holds.
pub struct OverlayDisk<D> {
    below: D,
    changes: RwLock<Changes>,
}

impl<D> OverlayDisk<D> {
    /// Nothing changed yet.
    pub fn new(below: D) -> OverlayDisk<D> {
        OverlayDisk { below, changes: RwLock::default() }
    }

    fn change(&self) -> RwLockWriteGuard<'_, Changes> {
        self.changes.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<D: Deref<Target: Disk> + Send + Sync> Disk for OverlayDisk<D> {
    fn blocks(&self) -> u64 {
        self.below.blocks()
    }

    fn read(&self, at: BlockAddress, buffer: &mut [u8]) -> io::Result<()> {
        self.below.read(at, buffer)?;
        let end = at + (buffer.len() / BLOCK_BYTES) as u64;
        let place = |block: BlockAddress| (block - at) as usize * BLOCK_BYTES;
        let changes = self.changes.read().unwrap_or_else(PoisonError::into_inner);
        // They do not meet, so those that reach into the buffer are the last ones that begin before its end.
        for (from, to) in changes.discarded.range(..end).rev().take_while(|(_, to)| **to > at) {
            buffer[place(at.max(*from))..place(end.min(*to))].fill(0);
        }
        for (block, bytes) in changes.written.range(at..end) {
            let (front, rest) = buffer[place(*block)..place(block + 1)].split_at_mut(bytes.len());
            front.copy_from_slice(bytes);
            rest.fill(0);
        }
        Ok(())
    }

    fn write(&self, at: BlockAddress, data: &[u8]) -> io::Result<()> {
        let mut changes = self.change();
        for (block, bytes) in (at..).zip(data.chunks_exact(BLOCK_BYTES)) {
            let len = bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            changes.written.insert(block, bytes[..len].into());
        }
        Ok(())
    }

    /// There is nothing that could be lost by itself.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, at: BlockAddress, count: u64) -> io::Result<()> {
        if count == 0 {
            return Ok(());
        }
        let (mut from, mut to) = (at, at.saturating_add(count));
        let mut changes = self.change();
        let gone: Vec<_> = changes.written.range(from..to).map(|(block, _)| *block).collect();
        for block in gone {
            changes.written.remove(&block);
        }
        while let Some((&first, &behind)) = changes.discarded.range(..=to).next_back().filter(|(_, end)| **end >= from)
        {
            changes.discarded.remove(&first);
            (from, to) = (from.min(first), to.max(behind));
        }
        changes.discarded.insert(from, to);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::disk::MemoryDisk;

    const BLOCKS: u64 = 40;

    fn all(disk: &dyn Disk) -> Vec<u8> {
        let mut bytes = vec![0; BLOCKS as usize * BLOCK_BYTES];
        disk.read(0, &mut bytes).unwrap();
        bytes
    }

    proptest! {
        #[test]
        fn it_reads_as_a_disk_would_and_leaves_the_one_below(
            changes in prop::collection::vec((0..BLOCKS, 1..9_u64, any::<Option<u8>>()), 1..40)
        ) {
            let (below, model) = (MemoryDisk::new(BLOCKS), MemoryDisk::new(BLOCKS));
            for disk in [&below, &model] {
                disk.write(0, &[0xee; BLOCKS as usize * BLOCK_BYTES]).unwrap();
            }
            let below: Arc<dyn Disk> = Arc::new(below);
            let overlay = OverlayDisk::new(below.clone());
            for (at, count, byte) in changes {
                let count = count.min(BLOCKS - at);
                for disk in [&overlay as &dyn Disk, &model] {
                    match byte {
                        Some(byte) => disk.write(at, &vec![byte; count as usize * BLOCK_BYTES]).unwrap(),
                        None => disk.discard(at, count).unwrap(),
                    }
                }
                let mut part = vec![0; count as usize * BLOCK_BYTES];
                overlay.read(at, &mut part).unwrap();
                prop_assert_eq!(&part[..], &all(&model)[at as usize * BLOCK_BYTES..][..part.len()]);
            }
            prop_assert_eq!(all(&overlay), all(&model));
            prop_assert!(all(&*below).iter().all(|byte| *byte == 0xee));
        }
    }
}
