//! A disk that counts what is asked of it, and says when a thread is going to wait for it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use super::{BLOCK_BYTES, BlockAddress, Disk};
use crate::waiting::about_to_wait;

/// Calls of a disk since the start, and bytes they moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub struct DiskCounts {
    /// Reads.
    pub reads: u64,
    /// Bytes read.
    pub read_bytes: u64,
    /// Writes.
    pub writes: u64,
    /// Bytes written.
    pub write_bytes: u64,
    /// Flushes.
    pub flushes: u64,
    /// Time they took together, in microseconds.
    pub flush_us: u64,
    /// Bytes discarded.
    pub discard_bytes: u64,
    /// Bytes that were shared instead of copied.
    pub remap_bytes: u64,
    /// Calls that failed.
    pub errors: u64,
}

#[derive(Default)]
struct Counters {
    reads: AtomicU64,
    read_bytes: AtomicU64,
    writes: AtomicU64,
    write_bytes: AtomicU64,
    flushes: AtomicU64,
    flush_us: AtomicU64,
    discard_bytes: AtomicU64,
    remap_bytes: AtomicU64,
    errors: AtomicU64,
    /// What reads took lately, in microseconds.
    read_us: AtomicU64,
}

/// Reads that take less are not worth a word before.
const SHORT_US: u64 = 250;
/// Reads of so many bytes are, whatever others took.
const LONG_BYTES: usize = 128 << 10;

/// See the module.
pub struct CountedDisk {
    disk: Arc<dyn Disk>,
    counters: Counters,
}

impl CountedDisk {
    /// Counts for `disk`.
    pub fn new(disk: Arc<dyn Disk>) -> CountedDisk {
        CountedDisk { disk, counters: Counters::default() }
    }

    /// What was counted so far.
    pub fn counts(&self) -> DiskCounts {
        let of = &self.counters;
        DiskCounts {
            reads: of.reads.load(Relaxed),
            read_bytes: of.read_bytes.load(Relaxed),
            writes: of.writes.load(Relaxed),
            write_bytes: of.write_bytes.load(Relaxed),
            flushes: of.flushes.load(Relaxed),
            flush_us: of.flush_us.load(Relaxed),
            discard_bytes: of.discard_bytes.load(Relaxed),
            remap_bytes: of.remap_bytes.load(Relaxed),
            errors: of.errors.load(Relaxed),
        }
    }

    fn counted<T>(&self, result: io::Result<T>) -> io::Result<T> {
        if result.is_err() {
            self.counters.errors.fetch_add(1, Relaxed);
        }
        result
    }

    fn wrote(&self, bytes: usize) {
        self.counters.writes.fetch_add(1, Relaxed);
        self.counters.write_bytes.fetch_add(bytes as u64, Relaxed);
    }
}

impl Disk for CountedDisk {
    fn blocks(&self) -> u64 {
        self.disk.blocks()
    }

    fn read(&self, at: BlockAddress, buffer: &mut [u8]) -> io::Result<()> {
        let before = self.counters.read_us.load(Relaxed);
        if before >= SHORT_US || buffer.len() >= LONG_BYTES {
            about_to_wait();
        }
        self.counters.reads.fetch_add(1, Relaxed);
        self.counters.read_bytes.fetch_add(buffer.len() as u64, Relaxed);
        let start = Instant::now();
        let result = self.counted(self.disk.read(at, buffer));
        let took = start.elapsed().as_micros() as u64;
        self.counters.read_us.store(before - before / 8 + took / 8, Relaxed);
        result
    }

    fn write(&self, at: BlockAddress, data: &[u8]) -> io::Result<()> {
        about_to_wait();
        self.wrote(data.len());
        self.counted(self.disk.write(at, data))
    }

    fn write_all(&self, runs: &[(BlockAddress, &[u8])]) -> io::Result<()> {
        about_to_wait();
        for (_, data) in runs {
            self.wrote(data.len());
        }
        self.counted(self.disk.write_all(runs))
    }

    fn write_parts(&self, runs: &[(BlockAddress, Vec<&[u8]>)]) -> io::Result<()> {
        about_to_wait();
        for (_, parts) in runs {
            self.wrote(parts.iter().map(|part| part.len()).sum());
        }
        self.counted(self.disk.write_parts(runs))
    }

    fn flush(&self) -> io::Result<()> {
        about_to_wait();
        let start = Instant::now();
        let result = self.counted(self.disk.flush());
        self.counters.flushes.fetch_add(1, Relaxed);
        self.counters.flush_us.fetch_add(start.elapsed().as_micros() as u64, Relaxed);
        result
    }

    fn discard(&self, at: BlockAddress, count: u64) -> io::Result<()> {
        about_to_wait();
        self.counters.discard_bytes.fetch_add(count.saturating_mul(BLOCK_BYTES as u64), Relaxed);
        self.counted(self.disk.discard(at, count))
    }

    fn lay_out(&self, at: BlockAddress, count: u64) -> io::Result<()> {
        about_to_wait();
        self.counted(self.disk.lay_out(at, count))
    }

    fn can_remap(&self) -> bool {
        self.disk.can_remap()
    }

    fn remap(&self, from: BlockAddress, to: BlockAddress, count: u64) -> io::Result<()> {
        about_to_wait();
        self.counters.remap_bytes.fetch_add(count.saturating_mul(BLOCK_BYTES as u64), Relaxed);
        self.counted(self.disk.remap(from, to, count))
    }
}
