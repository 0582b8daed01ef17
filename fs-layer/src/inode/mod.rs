//! Inodes in memory: a copy of the block that an operation reads and changes, and extended attributes.
//!
//! An [`Inode`] is valid as long as the lock of its number is held. Its changes are nothing until [`Inode::save`] puts them into a transaction.

mod xattrs;

use std::ops::Deref;
use std::sync::Arc;

pub use xattrs::{Xattr, chain as xattr_blocks, free_xattrs, load_xattrs, save_xattrs};
use zerocopy::FromZeros;

use crate::blocks::{BODY_BYTES, BlockKind, Body};
use crate::disk::BlockAddress;
use crate::journal::{Journal, Tx};
use crate::layout::InodeBody;
use crate::vfs::{Ino, Result, VfsError};

/// See the module.
#[derive(Clone)]
pub struct Inode {
    /// Its number.
    pub ino: Ino,
    at: BlockAddress,
    body: Arc<Body>,
    /// Whether its number was never used before, so that its block is not on the disk.
    new: bool,
}

impl Inode {
    /// As it is now.
    ///
    /// # Errors
    /// [`VfsError::Stale`] if there is none; [`VfsError::Io`] if its block is damaged.
    pub fn load(journal: &Journal, ino: Ino) -> Result<Inode> {
        let at = journal.geometry().inode(ino).ok_or(VfsError::Stale)?;
        let body = journal.find(at, BlockKind::Inode)?.ok_or(VfsError::Stale)?;
        if let Some(problem) = InodeBody::of(&body).problem(ino) {
            tracing::error!(ino = ino.0, block = at, problem, "an inode is damaged");
            return Err(VfsError::Io(format!("inode {} (block {at}) is damaged: {problem}; run `fsd check`", ino.0)));
        }
        Ok(Inode { ino, at, body, new: false })
    }

    /// One whose block was read already.
    pub fn of(ino: Ino, at: BlockAddress, body: &Body) -> Inode {
        Inode { ino, at, body: Arc::new(*body), new: false }
    }

    /// A new one, all zeros.
    pub fn new(journal: &Journal, ino: Ino) -> Result<Inode> {
        let at = journal.geometry().inode(ino).ok_or(VfsError::NoSpace)?;
        Ok(Inode { ino, at, body: Arc::new(<[u8; BODY_BYTES]>::new_zeroed()), new: true })
    }

    /// Its block.
    pub fn address(&self) -> BlockAddress {
        self.at
    }

    /// To be changed.
    pub fn edit(&mut self) -> &mut InodeBody {
        InodeBody::of_mut(Arc::make_mut(&mut self.body))
    }

    /// Puts it as it is into a transaction.
    pub fn save(&self, tx: &mut Tx<'_>) -> Result<()> {
        if self.new {
            tx.put_new(self.at, BlockKind::Inode, self.body.clone());
            return Ok(());
        }
        tx.put(self.at, BlockKind::Inode, self.body.clone())
    }
}

impl Deref for Inode {
    type Target = InodeBody;

    fn deref(&self) -> &InodeBody {
        InodeBody::of(&self.body)
    }
}
