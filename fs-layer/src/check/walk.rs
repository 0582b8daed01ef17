//! Everything that hangs on one inode.

use std::sync::Arc;

use crate::blocks::{BlockKind, Body, ReadBlocks};
use crate::dir;
use crate::disk::{BLOCK_BYTES, BlockAddress, Disk};
use crate::extent::{self, Extent};
use crate::inode::{Inode, load_xattrs, xattr_blocks};
use crate::layout::{Content, Geometry, InodeBody, Opened, open};
use crate::vfs::{FileKind, Ino, Result, VfsError};

/// What was found.
pub(super) struct Walk<'a> {
    disk: &'a dyn Disk,
    geometry: &'a Geometry,
    pub problems: Vec<String>,
    /// Blocks and how many.
    pub claims: Vec<(BlockAddress, u64)>,
    /// Of a directory: the name, the file and what the entry says it is.
    pub entries: Vec<(Vec<u8>, Ino, u8)>,
}

/// Reads blocks from the disk, with all checks.
struct Blocks<'a> {
    disk: &'a dyn Disk,
    geometry: &'a Geometry,
}

impl ReadBlocks for Blocks<'_> {
    fn read(&self, at: BlockAddress, kind: BlockKind) -> Result<Arc<Body>> {
        let mut block = [0; BLOCK_BYTES];
        self.disk.read(at, &mut block).map_err(|e| VfsError::Io(format!("block {at}: {e}")))?;
        match open(Some(self.geometry.fragment()), at, kind, &block) {
            Opened::Sound { body, .. } => Ok(Arc::new(*body)),
            Opened::Empty => Err(VfsError::Io(format!("block {at} ({kind:?}) is empty"))),
            Opened::Damaged(why) => Err(VfsError::Io(format!("block {at} ({kind:?}): {why}"))),
        }
    }
}

impl<'a> Walk<'a> {
    pub fn new(disk: &'a dyn Disk, geometry: &'a Geometry) -> Walk<'a> {
        Walk { disk, geometry, problems: Vec::new(), claims: Vec::new(), entries: Vec::new() }
    }

    /// Looks at everything in an inode that is sound in itself.
    pub fn inode(&mut self, ino: Ino, body: &Body) {
        let blocks = Blocks { disk: self.disk, geometry: self.geometry };
        let inode = Inode::of(ino, self.geometry.inode_start + ino.0, body);
        match inode.content_kind() {
            Some(Content::Directory) => dir::walk(&blocks, &inode.content, self),
            Some(Content::Extents) => extent::walk(&blocks, &inode.content, self),
            _ => {}
        }
        match xattr_blocks(&blocks, &inode) {
            Ok(chain) => self.claims.extend(chain.iter().map(|at| (*at, 1))),
            Err(e) => self.problems.push(e.to_string()),
        }
        if let Err(e) = load_xattrs(&blocks, &inode) {
            self.problems.push(e.to_string());
        }
        if inode.more_block.get() != 0 {
            self.claims.push((inode.more_block.get(), 1));
            if let Err(e) = blocks.read(inode.more_block.get(), BlockKind::Symlink) {
                self.problems.push(e.to_string());
            }
        }
        self.sizes(&inode);
    }

    fn sizes(&mut self, inode: &InodeBody) {
        let size = inode.size.get();
        if inode.kind() == Some(FileKind::File) {
            if inode.content_kind() == Some(Content::Inline) && u64::from(inode.content_len.get()) > size {
                self.problems.push(format!("{} bytes in the inode of a file of {size}", inode.content_len));
            }
            if size > crate::vfs::FILE_SIZE_MAX {
                self.problems.push(format!("its size {size} is too large"));
            }
        }
    }
}

impl dir::Visit for Walk<'_> {
    fn block(&mut self, at: BlockAddress) -> bool {
        self.claims.push((at, 1));
        true
    }

    fn entry(&mut self, entry: dir::Entry<'_>) {
        self.entries.push((entry.name.to_vec(), entry.target.ino, entry.target.kind));
    }

    fn damage(&mut self, at: Option<BlockAddress>, what: String) {
        self.problems.push(describe(at, "directory", &what));
    }
}

impl extent::Visit for Walk<'_> {
    fn block(&mut self, at: BlockAddress) -> bool {
        self.claims.push((at, 1));
        true
    }

    fn extent(&mut self, extent: Extent) {
        self.claims.push((extent.address, u64::from(extent.count)));
    }

    fn damage(&mut self, at: Option<BlockAddress>, what: String) {
        self.problems.push(describe(at, "map", &what));
    }
}

fn describe(at: Option<BlockAddress>, of: &str, what: &str) -> String {
    match at {
        Some(at) => format!("block {at} of its {of}: {what}"),
        None => format!("the root of its {of}: {what}"),
    }
}
