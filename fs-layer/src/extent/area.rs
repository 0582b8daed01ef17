//! What stands in the inode before the root.

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::leaf::ExtentLeaf;
use super::{AREA_MIN, Counts};
use crate::blocks::BODY_BYTES;
use crate::tree::{self, IN_INODE, Leaf};
use crate::vfs::Result;

/// The version this code writes and reads.
const VERSION: u8 = 1;

/// What an area begins with.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct AreaHeader {
    version: u8,
    reserved: [u8; 7],
    /// Blocks of the tree.
    pub blocks: U64,
    /// Extents.
    pub extents: U64,
    /// Blocks of the file with an address.
    pub mapped: U64,
    /// Those of them that are unwritten.
    pub unwritten: U64,
}

const AREA_HEADER_BYTES: usize = 40;
const _: () = assert!(size_of::<AreaHeader>() == AREA_HEADER_BYTES);

impl AreaHeader {
    /// The counts as numbers.
    pub fn counts(&self) -> Counts {
        Counts {
            mapped: self.mapped.get(),
            unwritten: self.unwritten.get(),
            extents: self.extents.get(),
            nodes: self.blocks.get(),
        }
    }
}

/// Writes an empty map.
pub fn init(area: &mut [u8]) {
    assert!((AREA_MIN..=BODY_BYTES).contains(&area.len()), "an area of {} bytes", area.len());
    let (start, root) = area.split_at_mut(AREA_HEADER_BYTES);
    start.fill(0);
    start[0] = VERSION;
    ExtentLeaf::clear(root);
}

fn verify(header: &AreaHeader, area_bytes: usize) -> Result<()> {
    let wrong = |what: &str| Err(tree::damaged::<ExtentLeaf>(IN_INODE, what));
    if header.version != VERSION || header.reserved != [0; 7] {
        return wrong(&format!("version {} is not known", header.version));
    }
    if !(AREA_MIN..=BODY_BYTES).contains(&area_bytes) {
        return wrong(&format!("it has {area_bytes} bytes"));
    }
    Ok(())
}

/// The header and the root.
pub fn open(area: &[u8]) -> Result<(&AreaHeader, &[u8])> {
    let (header, root) =
        AreaHeader::ref_from_prefix(area).map_err(|_| tree::damaged::<ExtentLeaf>(IN_INODE, "too short"))?;
    verify(header, area.len())?;
    Ok((header, root))
}

/// The header and the root, to be changed.
pub fn open_mut(area: &mut [u8]) -> Result<(&mut AreaHeader, &mut [u8])> {
    let bytes = area.len();
    let (header, root) =
        AreaHeader::mut_from_prefix(area).map_err(|_| tree::damaged::<ExtentLeaf>(IN_INODE, "too short"))?;
    verify(header, bytes)?;
    Ok((header, root))
}
