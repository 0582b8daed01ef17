//! Where the filesystem's blocks are: the engine in-process, an NBD server, a device or a file. The filesystem never
//! knows which.
//!
//! What must hold for each [`Disk`]: a block that was never written, or was discarded, reads as zeros; a write of one
//! aligned block of 4 KiB is never torn by the end of the *process*; what a flush covered survives a power cut.
//! Writes that no flush covered may be lost, each for itself, in any order.

mod counted;
pub mod engine;
mod file;
mod memory;
pub mod nbd;
mod overlay;

use std::io;

pub use counted::{CountedDisk, DiskCounts};
pub use file::FileDisk;
pub use memory::MemoryDisk;
pub use overlay::OverlayDisk;

/// Bytes of a block, the unit of all addresses of the filesystem.
pub const BLOCK_BYTES: usize = 4096;

/// The number of a block on the disk. Byte address divided by [`BLOCK_BYTES`].
pub type BlockAddress = u64;

/// A block device with an endless thin address space. All calls block, may be made from many threads at once, and
/// take whole blocks: the length of a buffer is a multiple of [`BLOCK_BYTES`].
pub trait Disk: Send + Sync {
    /// How many blocks can be addressed.
    fn blocks(&self) -> u64;

    /// Fills `buffer` with the blocks from `at` on.
    fn read(&self, at: BlockAddress, buffer: &mut [u8]) -> io::Result<()>;

    /// Writes the blocks from `at` on. Durable after the next [`Disk::flush`] that begins after this returned.
    fn write(&self, at: BlockAddress, data: &[u8]) -> io::Result<()>;

    /// Writes several runs of blocks; they may be under way at once, and none is ordered before another.
    ///
    /// # Errors
    /// The first one; which of the others were written is then unknown.
    fn write_all(&self, runs: &[(BlockAddress, &[u8])]) -> io::Result<()> {
        runs.iter().try_for_each(|(at, data)| self.write(*at, data))
    }

    /// Writes several runs of blocks, each in parts that follow each other, as [`Disk::write_all`] does: for memory that is not in one
    /// piece. Disks that can't do that put each run together first.
    ///
    /// # Errors
    /// As for [`Disk::write_all`].
    fn write_parts(&self, runs: &[(BlockAddress, Vec<&[u8]>)]) -> io::Result<()> {
        let whole: Vec<_> = runs.iter().map(|(at, parts)| (*at, parts.concat())).collect();
        let whole: Vec<_> = whole.iter().map(|(at, bytes)| (*at, &bytes[..])).collect();
        self.write_all(&whole)
    }

    /// Makes everything durable that was written or discarded before. After an error the disk is not to be trusted:
    /// the call is not repeated.
    fn flush(&self) -> io::Result<()>;

    /// Discards `count` blocks: they read as zeros and cost nothing from now on.
    fn discard(&self, at: BlockAddress, count: u64) -> io::Result<()>;

    /// Blocks that read as zeros will be written again and again: a disk on which the first time costs more has it now. Durable like a
    /// write. What the blocks hold becomes zeros.
    fn lay_out(&self, at: BlockAddress, count: u64) -> io::Result<()> {
        let _ = (at, count);
        Ok(())
    }

    /// Whether [`Disk::remap`] works.
    fn can_remap(&self) -> bool {
        false
    }

    /// Lets `count` blocks from `to` on hold what those from `from` on hold now, without moving data. The ranges do not overlap. Durable
    /// like a write.
    ///
    /// # Errors
    /// [`io::ErrorKind::Unsupported`] where the disk can't.
    fn remap(&self, from: BlockAddress, to: BlockAddress, count: u64) -> io::Result<()> {
        let _ = (from, to, count);
        Err(io::ErrorKind::Unsupported.into())
    }
}
