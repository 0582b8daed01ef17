//! What stands in the inode before the root, and the hash of names.

use xxhash_rust::xxh3::xxh3_64_with_seed;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::leaf::DirLeaf;
use super::{AREA_MIN, KEY_END, KEY_MIN};
use crate::blocks::BODY_BYTES;
use crate::tree::{self, IN_INODE, Leaf};
use crate::vfs::{NAME_MAX, Result, VfsError};

/// The version this code writes and reads.
const VERSION: u8 = 1;
/// XXH3 with the seed, 63 bits of it.
const HASH_XXH3: u8 = 1;
/// A few values only, so that names collide.
#[cfg(test)]
pub const HASH_WEAK: u8 = 255;
/// How far from its hash an entry can be.
pub const REACH_MAX: u64 = u32::MAX as u64;

/// What an area begins with.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct AreaHeader {
    version: u8,
    pub hash: u8,
    reserved: U16,
    /// The furthest that an entry was put from the hash of its name since the directory was last empty.
    pub reach: U32,
    /// Blocks of the tree.
    pub blocks: U64,
    /// Entries.
    pub entries: U64,
    seed: U64,
}

const AREA_HEADER_BYTES: usize = 32;
const _: () = assert!(size_of::<AreaHeader>() == AREA_HEADER_BYTES);

impl AreaHeader {
    /// Where an entry of this name belongs: [`KEY_MIN`] to `KEY_END - 1 - REACH_MAX`.
    pub fn home(&self, name: &[u8]) -> u64 {
        #[cfg(test)]
        if self.hash == HASH_WEAK {
            return KEY_MIN + xxh3_64_with_seed(name, self.seed.get()) % 5 * 3;
        }
        let hash = xxh3_64_with_seed(name, self.seed.get()) >> 1;
        if hash >= KEY_END - 1 - REACH_MAX { hash - REACH_MAX - 1 } else { hash.max(KEY_MIN) }
    }
}

/// Writes an empty directory.
pub fn init(area: &mut [u8], seed: u64) {
    assert!((AREA_MIN..=BODY_BYTES).contains(&area.len()), "an area of {} bytes", area.len());
    let header = AreaHeader {
        version: VERSION,
        hash: HASH_XXH3,
        reserved: U16::ZERO,
        reach: U32::ZERO,
        blocks: U64::ZERO,
        entries: U64::ZERO,
        seed: seed.into(),
    };
    let (start, root) = area.split_at_mut(AREA_HEADER_BYTES);
    start.copy_from_slice(header.as_bytes());
    DirLeaf::clear(root);
}

fn verify(header: &AreaHeader, area_bytes: usize) -> Result<()> {
    let wrong = |what: &str| Err(tree::damaged::<DirLeaf>(IN_INODE, what));
    let known = header.hash == HASH_XXH3;
    #[cfg(test)]
    let known = known || header.hash == HASH_WEAK;
    if header.version != VERSION || header.reserved != U16::ZERO {
        return wrong(&format!("version {} is not known", header.version));
    }
    if !known {
        return wrong(&format!("hash {} is not known", header.hash));
    }
    if !(AREA_MIN..=BODY_BYTES).contains(&area_bytes) {
        return wrong(&format!("it has {area_bytes} bytes"));
    }
    Ok(())
}

/// The header and the root.
pub fn open(area: &[u8]) -> Result<(&AreaHeader, &[u8])> {
    let (header, root) =
        AreaHeader::ref_from_prefix(area).map_err(|_| tree::damaged::<DirLeaf>(IN_INODE, "too short"))?;
    verify(header, area.len())?;
    Ok((header, root))
}

/// The header and the root, to be changed.
pub fn open_mut(area: &mut [u8]) -> Result<(&mut AreaHeader, &mut [u8])> {
    let bytes = area.len();
    let (header, root) =
        AreaHeader::mut_from_prefix(area).map_err(|_| tree::damaged::<DirLeaf>(IN_INODE, "too short"))?;
    verify(header, bytes)?;
    Ok((header, root))
}

/// Whether a name can stand in a directory at all.
pub fn verify_name(name: &[u8]) -> Result<()> {
    match name.len() {
        0 => Err(VfsError::Invalid),
        1..=NAME_MAX => Ok(()),
        _ => Err(VfsError::NameTooLong),
    }
}
