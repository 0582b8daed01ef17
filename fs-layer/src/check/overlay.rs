//! A disk whose changes stay in memory: so that a check can replay the journal and leave everything as it is.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Mutex, PoisonError};

use crate::disk::{BLOCK_BYTES, BlockAddress, Disk};
use crate::layout::RawBlock;

/// See the module.
pub struct Overlay<'a> {
    below: &'a dyn Disk,
    changed: Mutex<BTreeMap<BlockAddress, Box<RawBlock>>>,
    discarded: Mutex<Vec<(BlockAddress, u64)>>,
}

impl<'a> Overlay<'a> {
    /// Nothing changed yet.
    pub fn new(below: &'a dyn Disk) -> Overlay<'a> {
        Overlay { below, changed: Mutex::default(), discarded: Mutex::default() }
    }
}

impl Disk for Overlay<'_> {
    fn blocks(&self) -> u64 {
        self.below.blocks()
    }

    fn read(&self, at: BlockAddress, buffer: &mut [u8]) -> io::Result<()> {
        self.below.read(at, buffer)?;
        let count = (buffer.len() / BLOCK_BYTES) as u64;
        // Addresses are not used again, so that what was discarded was not written afterwards.
        for (from, len) in self.discarded.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            for block in (*from).max(at)..(from + len).min(at + count) {
                let offset = (block - at) as usize * BLOCK_BYTES;
                buffer[offset..offset + BLOCK_BYTES].fill(0);
            }
        }
        for (block, bytes) in self.changed.lock().unwrap_or_else(PoisonError::into_inner).range(at..at + count) {
            let offset = (block - at) as usize * BLOCK_BYTES;
            buffer[offset..offset + BLOCK_BYTES].copy_from_slice(&bytes[..]);
        }
        Ok(())
    }

    fn write(&self, at: BlockAddress, data: &[u8]) -> io::Result<()> {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        for (index, chunk) in data.chunks_exact(BLOCK_BYTES).enumerate() {
            changed.insert(at + index as u64, Box::new(chunk.try_into().expect("whole blocks")));
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, at: BlockAddress, count: u64) -> io::Result<()> {
        let mut changed = self.changed.lock().unwrap_or_else(PoisonError::into_inner);
        let gone: Vec<_> = changed.range(at..at + count).map(|(at, _)| *at).collect();
        for at in gone {
            changed.remove(&at);
        }
        self.discarded.lock().unwrap_or_else(PoisonError::into_inner).push((at, count));
        Ok(())
    }
}
