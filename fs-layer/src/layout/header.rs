//! The header that each metadata block begins with, and how a block is sealed and checked.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::blocks::{BlockKind, Body, HEADER_BYTES};
use crate::disk::{BLOCK_BYTES, BlockAddress};

/// A block as it stands on the disk.
pub type RawBlock = [u8; BLOCK_BYTES];

const MAGIC: [u8; 4] = *b"fsLB";
const FORMAT: u8 = 1;
/// Of a journal's header as long as its records may hold contents of data blocks.
const FORMAT_CONTENTS: u8 = 2;

/// The first bytes of each metadata block.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct BlockHeader {
    magic: [u8; 4],
    kind: u8,
    format: u8,
    reserved: U16,
    /// CRC-32C of the block with zeros here.
    checksum: U32,
    reserved2: U32,
    /// The first 8 bytes of the filesystem's UUID.
    filesystem: [u8; 8],
    /// Where the block belongs.
    address: U64,
    /// Grows by one with each transaction that changes the block.
    version: U64,
    reserved3: [u8; 24],
}

const _: () = assert!(size_of::<BlockHeader>() == HEADER_BYTES);

const CHECKSUM_AT: usize = 8;

/// What a block on the disk turned out to be.
#[derive(Debug)]
pub enum Opened<'a> {
    /// Nothing but zeros: never written, or freed.
    Empty,
    /// A sound block.
    Sound {
        /// Of this version.
        version: u64,
        /// With this body.
        body: &'a Body,
    },
    /// Not what belongs there; the text says why.
    Damaged(String),
}

/// Makes the block with this body.
pub fn seal(filesystem: [u8; 8], at: BlockAddress, kind: BlockKind, version: u64, body: &Body, out: &mut [u8]) {
    seal_as(FORMAT, filesystem, at, kind, version, body, out);
}

/// The same of the newest format that blocks of this kind have.
pub fn seal_newer(filesystem: [u8; 8], at: BlockAddress, kind: BlockKind, version: u64, body: &Body, out: &mut [u8]) {
    seal_as(newest(kind), filesystem, at, kind, version, body, out);
}

fn newest(kind: BlockKind) -> u8 {
    if kind == BlockKind::Journal { FORMAT_CONTENTS } else { FORMAT }
}

fn seal_as(
    format: u8,
    filesystem: [u8; 8],
    at: BlockAddress,
    kind: BlockKind,
    version: u64,
    body: &Body,
    out: &mut [u8],
) {
    let header = BlockHeader {
        magic: MAGIC,
        kind: kind as u8,
        format,
        reserved: U16::ZERO,
        checksum: U32::ZERO,
        reserved2: U32::ZERO,
        filesystem,
        address: U64::new(at),
        version: U64::new(version),
        reserved3: [0; 24],
    };
    out[..HEADER_BYTES].copy_from_slice(header.as_bytes());
    out[HEADER_BYTES..BLOCK_BYTES].copy_from_slice(body);
    let checksum = crc32c::crc32c(&out[..BLOCK_BYTES]);
    out[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&checksum.to_le_bytes());
}

/// Checks a block. `filesystem` is `None` where it is not known yet (the superblock).
pub fn open(filesystem: Option<[u8; 8]>, at: BlockAddress, kind: BlockKind, block: &RawBlock) -> Opened<'_> {
    let (header, rest) = BlockHeader::ref_from_prefix(block).expect("a block is longer than its header");
    if header.magic != MAGIC {
        if block.iter().all(|byte| *byte == 0) {
            return Opened::Empty;
        }
        return Opened::Damaged("it is no metadata block".into());
    }
    let mut checksum = crc32c::crc32c(&block[..CHECKSUM_AT]);
    checksum = crc32c::crc32c_append(checksum, &[0; 4]);
    checksum = crc32c::crc32c_append(checksum, &block[CHECKSUM_AT + 4..]);
    if checksum != header.checksum.get() {
        return Opened::Damaged("its checksum is wrong".into());
    }
    if !(FORMAT..=newest(kind)).contains(&header.format) {
        return Opened::Damaged(format!("its format {} is newer than this program", header.format));
    }
    if filesystem.is_some_and(|filesystem| filesystem != header.filesystem) {
        return Opened::Damaged("it belongs to another filesystem".into());
    }
    if header.address.get() != at {
        return Opened::Damaged(format!("it belongs to address {}", header.address.get()));
    }
    if header.kind != kind as u8 {
        return Opened::Damaged(format!("it is of kind {} instead of {kind:?}", header.kind));
    }
    let body = rest.try_into().expect("a block is its header and its body");
    Opened::Sound { version: header.version.get(), body }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::blocks::BODY_BYTES;

    #[test]
    fn sealed_blocks_open_and_damaged_ones_say_why() {
        let body = [7; BODY_BYTES];
        let mut block = [0; BLOCK_BYTES];
        assert!(matches!(open(Some([1; 8]), 5, BlockKind::Inode, &block), Opened::Empty));
        seal([1; 8], 5, BlockKind::Inode, 9, &body, &mut block);
        assert!(matches!(open(Some([1; 8]), 5, BlockKind::Inode, &block), Opened::Sound { version: 9, .. }));
        assert!(matches!(open(Some([2; 8]), 5, BlockKind::Inode, &block), Opened::Damaged(_)));
        assert!(matches!(open(Some([1; 8]), 6, BlockKind::Inode, &block), Opened::Damaged(_)));
        assert!(matches!(open(Some([1; 8]), 5, BlockKind::Xattrs, &block), Opened::Damaged(_)));
        // Only the header of a journal has a newer format.
        seal_newer([1; 8], 5, BlockKind::Journal, 9, &body, &mut block);
        assert_eq!(block[5], 2);
        assert!(matches!(open(Some([1; 8]), 5, BlockKind::Journal, &block), Opened::Sound { version: 9, .. }));
        assert!(matches!(open(Some([1; 8]), 5, BlockKind::Inode, &block), Opened::Damaged(_)));
        seal([1; 8], 5, BlockKind::Inode, 9, &body, &mut block);
        for byte in [4, 12, 20, 900, 4095] {
            let mut damaged = block;
            damaged[byte] ^= 1;
            assert!(matches!(open(Some([1; 8]), 5, BlockKind::Inode, &damaged), Opened::Damaged(_)), "{byte}");
        }
    }
}
