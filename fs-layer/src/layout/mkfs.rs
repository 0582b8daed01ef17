//! Making a filesystem.

use std::io;

use zerocopy::IntoBytes;
use zerocopy::little_endian::{U32, U64};

use super::InodeBody;
use super::header::{Opened, open, seal};
use super::superblock::{ALLOCATOR_BLOCKS, AllocatorBody, FIRST_FREE_INO, Geometry, HostBody, INO_ORPHANS};
use crate::blocks::{BODY_BYTES, BlockKind, Body};
use crate::dir;
use crate::disk::{BLOCK_BYTES, BlockAddress, Disk};
use crate::vfs::{FileKind, Ino, ROOT, Time};

/// How a filesystem is to be made.
#[derive(Clone, Debug)]
pub struct MkfsOptions {
    /// Its name, for people; at most 64 bytes.
    pub label: String,
    /// Names it for ever; made up if `None`.
    pub uuid: Option<[u8; 16]>,
    /// Blocks of each of the 64 journals; at least 128. The default is 64 MiB.
    pub journal_blocks: u64,
    /// Whether what is on the disk is given up.
    pub force: bool,
    /// Owner and group of the root directory.
    pub root_owner: (u32, u32),
    /// Permissions of the root directory.
    pub root_mode: u32,
    /// Bytes that may be stored; 0: as many as the disk has.
    pub quota_bytes: u64,
    /// Files that may exist; 0: no limit.
    pub quota_files: u64,
}

impl Default for MkfsOptions {
    fn default() -> MkfsOptions {
        MkfsOptions {
            label: String::new(),
            uuid: None,
            journal_blocks: (64 << 20) / BLOCK_BYTES as u64,
            force: false,
            root_owner: (0, 0),
            root_mode: 0o755,
            quota_bytes: 0,
            quota_files: 0,
        }
    }
}

/// Why a filesystem could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MkfsError {
    /// The disk holds one already.
    #[error("there is a filesystem on this disk already: its data would be lost; give --force to make a new one")]
    Exists,
    /// The disk is too small.
    #[error("the disk of {0} blocks is too small for journals of {1} blocks: make it larger, or the journals smaller")]
    TooSmall(u64, u64),
    /// Journals too small.
    #[error("a journal of {0} blocks is too small: at least 128")]
    Journal(u64),
    /// The disk failed.
    #[error("the disk failed: {0}")]
    Disk(#[from] io::Error),
}

/// Makes a filesystem. The superblock is written last, after a flush: a filesystem that was made halfway is none.
///
/// # Errors
/// See [`MkfsError`].
pub fn mkfs(disk: &dyn Disk, options: &MkfsOptions) -> Result<(), MkfsError> {
    if options.journal_blocks < 128 {
        return Err(MkfsError::Journal(options.journal_blocks));
    }
    let uuid = options.uuid.unwrap_or_else(|| uuid::Uuid::new_v4().into_bytes());
    let mut geometry = Geometry::plan(uuid, disk.blocks(), options.journal_blocks)
        .ok_or(MkfsError::TooSmall(disk.blocks(), options.journal_blocks))?;
    geometry.quota_bytes = options.quota_bytes;
    geometry.quota_files = options.quota_files;
    for at in [0, 1] {
        let mut block = [0; BLOCK_BYTES];
        disk.read(at, &mut block)?;
        if matches!(open(None, at, BlockKind::Super, &block), Opened::Sound { .. }) && !options.force {
            return Err(MkfsError::Exists);
        }
    }
    // What is left of another filesystem must read as zeros: an inode that was never made is a block of zeros.
    disk.discard(0, disk.blocks())?;
    disk.lay_out(geometry.journal(0), geometry.journal_blocks)?;

    let put = |at: BlockAddress, kind: BlockKind, body: &Body| {
        let mut block = [0; BLOCK_BYTES];
        seal(geometry.fragment(), at, kind, 1, body, &mut block);
        disk.write(at, &block)
    };
    let allocator = AllocatorBody::new(FIRST_FREE_INO, geometry.data_start);
    for at in ALLOCATOR_BLOCKS {
        put(at, BlockKind::Allocator, allocator.as_bytes().try_into().expect("a body"))?;
    }
    put(geometry.host(0), BlockKind::Host, HostBody::new(0, 1).as_body())?;
    let now = Time::now();
    for (ino, mode, owner) in [(ROOT, options.root_mode, options.root_owner), (Ino(INO_ORPHANS), 0o700, (0, 0))] {
        let mut body: Body = [0; BODY_BYTES];
        let inode = InodeBody::of_mut(&mut body);
        inode.begin(ino, FileKind::Directory, now);
        inode.mode = U32::new(mode & 0o7777);
        inode.links = U32::new(2);
        inode.uid = U32::new(owner.0);
        inode.gid = U32::new(owner.1);
        inode.parent = U64::new(ino.0);
        dir::init(&mut inode.content, rand::random());
        put(geometry.inode(ino).expect("the first inodes exist"), BlockKind::Inode, &body)?;
    }
    disk.flush()?;
    let body = geometry.body(&options.label, now.parts().0 as u64);
    for at in [0, 1] {
        put(at, BlockKind::Super, body.as_bytes().try_into().expect("a body"))?;
    }
    disk.flush()?;
    Ok(())
}
