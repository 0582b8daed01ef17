//! A disk in memory, for tests: thin, endless, gone with the process.

use std::collections::BTreeMap;
use std::io;
use std::sync::{PoisonError, RwLock};

use super::{BLOCK_BYTES, BlockAddress, Disk};

type Block = Box<[u8; BLOCK_BYTES]>;

/// See the module.
pub struct MemoryDisk {
    blocks: u64,
    written: RwLock<BTreeMap<BlockAddress, Block>>,
}

impl MemoryDisk {
    /// A disk of so many blocks, all zeros.
    pub fn new(blocks: u64) -> MemoryDisk {
        MemoryDisk { blocks, written: RwLock::default() }
    }

    /// Another one that holds the same now.
    pub fn copy(&self) -> MemoryDisk {
        let written = self.written.read().unwrap_or_else(PoisonError::into_inner).clone();
        MemoryDisk { blocks: self.blocks, written: RwLock::new(written) }
    }

    /// How many blocks hold something.
    pub fn stored_blocks(&self) -> usize {
        self.written.read().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn check(&self, at: BlockAddress, count: u64) -> io::Result<()> {
        match at.checked_add(count) {
            Some(end) if end <= self.blocks => Ok(()),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, format!("blocks {at}+{count} are not on the disk"))),
        }
    }
}

impl Disk for MemoryDisk {
    fn blocks(&self) -> u64 {
        self.blocks
    }

    fn read(&self, at: BlockAddress, buffer: &mut [u8]) -> io::Result<()> {
        let count = (buffer.len() / BLOCK_BYTES) as u64;
        self.check(at, count)?;
        let written = self.written.read().unwrap_or_else(PoisonError::into_inner);
        buffer.fill(0);
        for (address, block) in written.range(at..at + count) {
            let offset = (address - at) as usize * BLOCK_BYTES;
            buffer[offset..offset + BLOCK_BYTES].copy_from_slice(&block[..]);
        }
        Ok(())
    }

    fn write(&self, at: BlockAddress, data: &[u8]) -> io::Result<()> {
        assert_eq!(data.len() % BLOCK_BYTES, 0, "whole blocks");
        self.check(at, (data.len() / BLOCK_BYTES) as u64)?;
        let mut written = self.written.write().unwrap_or_else(PoisonError::into_inner);
        for (index, chunk) in data.chunks_exact(BLOCK_BYTES).enumerate() {
            let block = written.entry(at + index as u64).or_insert_with(|| Box::new([0; BLOCK_BYTES]));
            block.copy_from_slice(chunk);
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, at: BlockAddress, count: u64) -> io::Result<()> {
        self.check(at, count)?;
        let mut written = self.written.write().unwrap_or_else(PoisonError::into_inner);
        let gone: Vec<_> = written.range(at..at + count).map(|(address, _)| *address).collect();
        for address in gone {
            written.remove(&address);
        }
        Ok(())
    }

    fn can_remap(&self) -> bool {
        true
    }

    fn remap(&self, from: BlockAddress, to: BlockAddress, count: u64) -> io::Result<()> {
        self.check(from, count)?;
        self.check(to, count)?;
        let mut written = self.written.write().unwrap_or_else(PoisonError::into_inner);
        for index in 0..count {
            match written.get(&(from + index)).cloned() {
                Some(block) => written.insert(to + index, block),
                None => written.remove(&(to + index)),
            };
        }
        Ok(())
    }
}
