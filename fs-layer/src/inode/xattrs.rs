//! Extended attributes: in the inode if all of them fit, else all of them in a chain of blocks.
//!
//! As bytes, one after the other: length of the name (u8), length of the value (u32), name, value. A block of the chain begins with the
//! address of the next one (u64; 0 at the end) and how many bytes follow (u32).

use zerocopy::little_endian::{U16, U64};

use super::Inode;
use crate::blocks::{BODY_BYTES, BlockKind, ReadBlocks, WriteBlocks};
use crate::journal::Tx;
use crate::layout::XATTR_BYTES;
use crate::vfs::{Result, VfsError};

/// The most that all attributes of a file may take, in bytes.
const TOTAL_MAX: usize = 256 << 10;
const CHAIN_HEAD: usize = 12;

/// A name and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Xattr {
    /// With its prefix.
    pub name: Vec<u8>,
    /// Up to 64 KiB.
    pub value: Vec<u8>,
}

fn damaged(inode: &Inode) -> VfsError {
    VfsError::Io(format!("the extended attributes of inode {} are damaged; run `fsd check`", inode.ino.0))
}

/// All attributes, in the order they were made.
pub fn load_xattrs(blocks: &dyn ReadBlocks, inode: &Inode) -> Result<Vec<Xattr>> {
    let mut bytes = inode.xattrs[..usize::from(inode.xattr_len.get())].to_vec();
    for at in chain(blocks, inode)? {
        let body = blocks.read(at, BlockKind::Xattrs)?;
        let len = u32::from_le_bytes(body[8..CHAIN_HEAD].try_into().expect("4 bytes")) as usize;
        bytes.extend_from_slice(body.get(CHAIN_HEAD..CHAIN_HEAD + len).ok_or_else(|| damaged(inode))?);
    }
    let (mut all, mut rest) = (Vec::new(), &bytes[..]);
    while !rest.is_empty() {
        let mut take = |len: usize| rest.split_off(..len).ok_or_else(|| damaged(inode));
        let name_len = usize::from(take(1)?[0]);
        let value_len = u32::from_le_bytes(take(4)?.try_into().expect("4 bytes")) as usize;
        all.push(Xattr { name: take(name_len)?.to_vec(), value: take(value_len)?.to_vec() });
    }
    Ok(all)
}

/// The blocks that hold attributes.
pub fn chain(blocks: &dyn ReadBlocks, inode: &Inode) -> Result<Vec<u64>> {
    let (mut all, mut at) = (Vec::new(), inode.xattr_block.get());
    while at != 0 {
        all.push(at);
        if all.len() > TOTAL_MAX / (BODY_BYTES - CHAIN_HEAD) + 1 {
            return Err(damaged(inode));
        }
        at = u64::from_le_bytes(blocks.read(at, BlockKind::Xattrs)?[..8].try_into().expect("8 bytes"));
    }
    Ok(all)
}

/// Sets all attributes.
///
/// # Errors
/// [`VfsError::NoSpace`] if they are more than a file may have.
pub fn save_xattrs(tx: &mut Tx<'_>, inode: &mut Inode, all: &[Xattr]) -> Result<()> {
    let mut bytes = Vec::new();
    for xattr in all {
        bytes.push(xattr.name.len() as u8);
        bytes.extend_from_slice(&(xattr.value.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&xattr.name);
        bytes.extend_from_slice(&xattr.value);
    }
    if bytes.len() > TOTAL_MAX {
        return Err(VfsError::NoSpace);
    }
    free_xattrs(tx, inode)?;
    if bytes.len() <= XATTR_BYTES {
        let body = inode.edit();
        body.xattrs[..bytes.len()].copy_from_slice(&bytes);
        body.xattr_len = U16::new(bytes.len() as u16);
        return Ok(());
    }
    let (mut next, mut count) = (0u64, 0u64);
    for chunk in bytes.chunks(BODY_BYTES - CHAIN_HEAD).rev() {
        let at = tx.make(BlockKind::Xattrs)?;
        let body = tx.modify(at, BlockKind::Xattrs)?;
        body[..8].copy_from_slice(&next.to_le_bytes());
        body[8..CHAIN_HEAD].copy_from_slice(&(chunk.len() as u32).to_le_bytes());
        body[CHAIN_HEAD..CHAIN_HEAD + chunk.len()].copy_from_slice(chunk);
        next = at;
        count += 1;
    }
    let body = inode.edit();
    body.xattr_block = U64::new(next);
    body.stored_blocks = U64::new(body.stored_blocks.get() + count);
    Ok(())
}

/// Removes all attributes.
pub fn free_xattrs(tx: &mut Tx<'_>, inode: &mut Inode) -> Result<()> {
    let gone = chain(tx, inode)?;
    for at in &gone {
        tx.free(*at)?;
    }
    let body = inode.edit();
    body.xattr_block = U64::ZERO;
    body.xattr_len = U16::ZERO;
    body.xattrs.fill(0);
    body.stored_blocks = U64::new(body.stored_blocks.get().saturating_sub(gone.len() as u64));
    Ok(())
}
