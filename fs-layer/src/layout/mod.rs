//! What is where on the disk, and how each block looks. Nothing here keeps state.
//!
//! Regions, in blocks: the superblock and its copy; the allocator's two copies; one block per host slot; the journals; the inodes (inode
//! number n is block `inode_start + n`); the data. All places stand in the superblock, so that small disks work. All integers are
//! little-endian; every metadata block begins with [`BlockHeader`], and whatever is not as written here is refused.

mod header;
mod inode;
mod mkfs;
mod superblock;

pub use header::{BlockHeader, Opened, RawBlock, open, seal, seal_newer};
pub use inode::{CONTENT_BYTES, Content, InodeBody, TimeField, XATTR_BYTES, flags};
pub use mkfs::{MkfsError, MkfsOptions, mkfs};
pub use superblock::{
    ALLOCATOR_BLOCKS, AllocatorBody, FIRST_FREE_INO, Geometry, HOST_SLOTS, HostBody, INO_ORPHANS, NOTED_MAX, SuperBody,
    load_superblock,
};
