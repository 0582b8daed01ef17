//! Metadata blocks as trees see them: whole, checked, by address.
//!
//! The cache and the journal are behind these traits: what [`WriteBlocks`] changes belongs to one transaction and becomes
//! durable, or not, as a whole. A body is what follows the header of a block (magic, kind, address, version,
//! checksum), which is the implementation's.

use std::sync::Arc;

use crate::disk::{BLOCK_BYTES, BlockAddress};
use crate::vfs::Result;

/// Bytes of the header that each metadata block begins with.
pub const HEADER_BYTES: usize = 64;
/// Bytes of a block that its kind may use.
pub const BODY_BYTES: usize = BLOCK_BYTES - HEADER_BYTES;

impl BlockKind {
    /// The kind of this code.
    pub fn from_code(code: u8) -> Option<BlockKind> {
        use BlockKind::*;
        [Super, Host, Allocator, Inode, Directory, Extents, Xattrs, Journal, Symlink]
            .into_iter()
            .find(|kind| *kind as u8 == code)
    }
}

/// The body of a block.
pub type Body = [u8; BODY_BYTES];

/// What a metadata block holds; a block of another kind than expected is damage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum BlockKind {
    /// The superblock.
    Super = 1,
    /// The block of a host slot.
    Host = 2,
    /// The allocator.
    Allocator = 3,
    /// An inode.
    Inode = 4,
    /// A node of a directory's tree.
    Directory = 5,
    /// A node of a file's extent tree.
    Extents = 6,
    /// Extended attributes that did not fit into the inode.
    Xattrs = 7,
    /// The header of a journal.
    Journal = 8,
    /// The end of a long symbolic link's target.
    Symlink = 9,
}

/// Reads metadata blocks.
pub trait ReadBlocks {
    /// The body of the block at `at` as it is now; later changes do not show.
    ///
    /// # Errors
    /// [`Io`](crate::vfs::VfsError::Io) if the disk fails or the block is not a sound one of this kind.
    fn read(&self, at: BlockAddress, kind: BlockKind) -> Result<Arc<Body>>;
}

impl<T: ReadBlocks + ?Sized> ReadBlocks for Arc<T> {
    fn read(&self, at: BlockAddress, kind: BlockKind) -> Result<Arc<Body>> {
        (**self).read(at, kind)
    }
}

/// Changes metadata blocks within one transaction.
pub trait WriteBlocks: ReadBlocks {
    /// The body of the block at `at`, to be changed.
    fn modify(&mut self, at: BlockAddress, kind: BlockKind) -> Result<&mut Body>;

    /// A new block of zeros in the data region.
    fn make(&mut self, kind: BlockKind) -> Result<BlockAddress>;

    /// Gives up blocks that [`WriteBlocks::make`] made: their address is never used again, and they are discarded once
    /// the transaction is durable.
    fn free(&mut self, at: BlockAddress) -> Result<()>;
}
