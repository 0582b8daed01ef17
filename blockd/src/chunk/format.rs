//! The header of a chunk: preamble, extents, frame directory. Pure; total on foreign bytes.

use xxhash_rust::xxh3::Xxh3;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::frames::{FRAME_ROW, FrameCipher, FrameDirectory};
use super::name::ChunkName;
use crate::types::{Lba, Lsn, VolumeId};

/// First bytes of every chunk.
pub const MAGIC: [u8; 8] = *b"BLKDCHNK";
/// The version of headers without references.
pub const VERSION: u16 = 1;
/// The newest version this code knows: that of headers with references.
pub const REFER_VERSION: u16 = 2;
/// The most blocks in a chunk's payload: an index into it is 16 bits wide.
pub const MAX_PAYLOAD_BLOCKS: usize = u16::MAX as usize;
/// The most rows of extents in a chunk; a reference takes two, any other extent one.
pub const MAX_EXTENTS: usize = 131_072;
/// One past the highest block address (2^64 bytes).
pub const MAX_LBA: u64 = 1 << 52;
/// The longest header.
pub const MAX_HEADER: usize = PREAMBLE + MAX_EXTENTS * EXTENT_ROW + MAX_PAYLOAD_BLOCKS * FRAME_ROW;

/// Bytes of the preamble.
pub const PREAMBLE: usize = 104;
const EXTENT_ROW: usize = 16;
const SUM_AT: usize = 16;
/// Keeps a header's checksum from being mistaken for another structure's.
const SUM_SEED: u64 = u64::from_le_bytes(*b"chunkhdr");

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Preamble {
    magic: [u8; 8],
    version: U16,
    kind: u8,
    reserved: u8,
    header_len: U32,
    header_sum: U64,
    volume: [u8; 16],
    epoch: U64,
    seq: U64,
    first_lsn: U64,
    last_lsn: U64,
    created_ms: U64,
    payload_len: U64,
    extents: U32,
    frames: U32,
    payload_blocks: U32,
    reserved2: U32,
}

const _: () = assert!(size_of::<Preamble>() == PREAMBLE);

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawExtent {
    lba: U64,
    blocks: [u8; 7],
    kind: u8,
}

const _: () = assert!(size_of::<RawExtent>() == EXTENT_ROW);

const DATA_ROW: u8 = 1;
const ZERO_ROW: u8 = 2;
const HOLE_ROW: u8 = 3;
/// Followed by a [`PLACE_ROW`].
const REFER_ROW: u8 = 4;
/// The chunk's sequence number in place of the address, and the index in place of the number of blocks.
const PLACE_ROW: u8 = 5;

/// Why bytes are not the chunk they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not a chunk at all.
    #[error("it does not begin like a chunk")]
    Magic,
    /// Written by a newer program.
    #[error(
        "format version {0} is unknown to this program, which knows versions up to {REFER_VERSION}; use a newer one"
    )]
    Version(u16),
    /// Shorter than it says.
    #[error("it ends after {have} bytes where {need} are needed")]
    Truncated {
        /// Bytes needed.
        need: usize,
        /// Bytes there.
        have: usize,
    },
    /// The header was changed.
    #[error("the checksum of the header does not match")]
    Checksum,
    /// A whole chunk in the wrong place.
    #[error("it is the chunk {found:?}")]
    Identity {
        /// Whose header it is.
        found: ChunkName,
    },
    /// A frame compressed in a way this program does not know.
    #[error("frame encoding {0} is unknown to this program; use a newer one")]
    UnknownEncoding(u8),
    /// A frame encrypted in a way this program does not know.
    #[error("frame cipher {0} is unknown to this program; use a newer one")]
    UnknownCipher(u8),
    /// Of an encrypted volume, and no key was given.
    #[error("it is encrypted, and this volume has no key")]
    Encrypted,
    /// Not encrypted, in an encrypted volume: nothing says who wrote it.
    #[error("it is not encrypted although its volume is")]
    Clear,
    /// Somebody changed it, put it in the place of another, or encrypted it with another key.
    #[error("it is not authentic: it was changed, is another chunk, or was written with another key")]
    Forged,
    /// A valid checksum over contradictions.
    #[error("{0}")]
    Invalid(&'static str),
}

/// What a chunk object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum ChunkKind {
    /// Blocks and zeroes of a range of LSNs.
    Data = 1,
    /// The end of an epoch: it stands where the epoch's next chunk would, so that a late owner cannot put one.
    Seal = 2,
    /// Blocks and zeroes that stood in other chunks: what was true after all chunks of the history up to a *basis* were
    /// applied. No part of the history itself.
    Relocated = 3,
}

/// What an extent says of its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// They stand in the payload, the first one at this index.
    Data {
        /// Payload index of the first block.
        index: u16,
    },
    /// They are zeroes and count as allocated.
    Zero,
    /// They are unmapped and read as zeroes.
    Hole,
    /// They are what the payload of another chunk holds, the first one at this index of it.
    Refer {
        /// That chunk's sequence number.
        seq: u64,
        /// Payload index of the first block.
        index: u16,
    },
}

impl ExtentKind {
    /// Rows of a header that it takes.
    fn rows(self) -> usize {
        if matches!(self, ExtentKind::Refer { .. }) { 2 } else { 1 }
    }

    /// Whether an extent of this kind and of `blocks` blocks goes on with `next`, at the next address.
    pub(crate) fn continues(self, blocks: u64, next: ExtentKind) -> bool {
        match (self, next) {
            // Indexes into the own payload follow each other.
            (ExtentKind::Data { .. }, ExtentKind::Data { .. })
            | (ExtentKind::Zero, ExtentKind::Zero)
            | (ExtentKind::Hole, ExtentKind::Hole) => true,
            (ExtentKind::Refer { seq, index }, ExtentKind::Refer { seq: other, index: first }) => {
                seq == other && u64::from(index) + blocks == u64::from(first)
            }
            _ => false,
        }
    }
}

/// Rows that extents take in a header.
pub(super) fn extent_rows(extents: &[ChunkExtent]) -> usize {
    extents.iter().map(|extent| extent.kind.rows()).sum()
}

/// Consecutive blocks of equal kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkExtent {
    /// First block.
    pub lba: Lba,
    /// Number of blocks, at least 1.
    pub blocks: u64,
    /// What they are.
    pub kind: ExtentKind,
}

/// A chunk's header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ChunkIndex {
    /// Its identity.
    pub name: ChunkName,
    /// What it is.
    pub kind: ChunkKind,
    /// The oldest LSN it holds; 0 in a seal; the basis, a seq, in a relocated chunk.
    pub first_lsn: Lsn,
    /// The newest LSN it holds; 0 in a seal; the newest LSN of the basis in a relocated chunk.
    pub last_lsn: Lsn,
    /// When it was made, Unix time in milliseconds.
    pub created_ms: u64,
    /// What it says, in address order, without overlaps.
    pub extents: Vec<ChunkExtent>,
    /// Where the payload's frames are.
    pub frames: FrameDirectory,
}

impl ChunkIndex {
    /// Length of the header of a chunk with so many rows of extents and frames.
    pub(super) fn header_len(rows: usize, frames: usize) -> usize {
        PREAMBLE + rows * EXTENT_ROW + frames * FRAME_ROW
    }

    /// Rows that its extents take.
    pub(crate) fn extent_rows(&self) -> usize {
        extent_rows(&self.extents)
    }

    /// Which blocks it says are what other chunks hold: the extents, and where the first block of each stands.
    pub fn references(&self) -> impl Iterator<Item = (&ChunkExtent, u64, u16)> {
        self.extents.iter().filter_map(|extent| match extent.kind {
            ExtentKind::Refer { seq, index } => Some((extent, seq, index)),
            _ => None,
        })
    }

    /// The seq of the history after which it is true: its own, or the basis of a relocated chunk.
    pub fn basis(&self) -> u64 {
        if self.kind == ChunkKind::Relocated { self.first_lsn } else { self.name.seq }
    }

    /// The whole object's length in bytes.
    pub fn object_len(&self) -> u64 {
        self.frames.end()
    }

    /// The header's bytes. The payload follows them.
    pub(super) fn encode(&self) -> Vec<u8> {
        let rows = self.extent_rows();
        let len = Self::header_len(rows, self.frames.frames().len());
        // More than that when the header is to be encrypted.
        debug_assert!(len as u64 <= self.frames.payload_start());
        let preamble = Preamble {
            magic: MAGIC,
            version: if rows > self.extents.len() { REFER_VERSION } else { VERSION }.into(),
            kind: self.kind as u8,
            reserved: 0,
            header_len: (len as u32).into(),
            header_sum: 0.into(),
            volume: self.name.volume.0,
            epoch: self.name.epoch.into(),
            seq: self.name.seq.into(),
            first_lsn: self.first_lsn.into(),
            last_lsn: self.last_lsn.into(),
            created_ms: self.created_ms.into(),
            payload_len: (self.frames.end() - self.frames.payload_start()).into(),
            extents: (rows as u32).into(),
            frames: (self.frames.frames().len() as u32).into(),
            payload_blocks: (self.frames.raw_blocks() as u32).into(),
            reserved2: 0.into(),
        };
        let mut out = Vec::with_capacity(len);
        out.extend_from_slice(preamble.as_bytes());
        for extent in &self.extents {
            let mut row = |lba: u64, blocks: u64, kind| {
                let mut narrow = [0; 7];
                narrow.copy_from_slice(&blocks.to_le_bytes()[..7]);
                out.extend_from_slice(RawExtent { lba: lba.into(), blocks: narrow, kind }.as_bytes());
            };
            match extent.kind {
                ExtentKind::Data { .. } => row(extent.lba, extent.blocks, DATA_ROW),
                ExtentKind::Zero => row(extent.lba, extent.blocks, ZERO_ROW),
                ExtentKind::Hole => row(extent.lba, extent.blocks, HOLE_ROW),
                ExtentKind::Refer { seq, index } => {
                    row(extent.lba, extent.blocks, REFER_ROW);
                    row(seq, index.into(), PLACE_ROW);
                }
            }
        }
        self.frames.encode_rows(&mut out);
        let sum = header_sum(&out);
        out[SUM_AT..SUM_AT + 8].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// Length of the header that `start`, the first bytes of an object, begins. Not yet verified, but bounded by
    /// [`MAX_HEADER`].
    pub fn peek_len(start: &[u8]) -> Result<usize, FormatError> {
        let (preamble, _) = Preamble::ref_from_prefix(start)
            .map_err(|_| FormatError::Truncated { need: PREAMBLE, have: start.len() })?;
        if preamble.magic != MAGIC {
            return Err(FormatError::Magic);
        }
        if !(VERSION..=REFER_VERSION).contains(&preamble.version.get()) {
            return Err(FormatError::Version(preamble.version.get()));
        }
        let len = preamble.header_len.get() as usize;
        if !(PREAMBLE..=MAX_HEADER).contains(&len) {
            return Err(FormatError::Invalid("the header's length is out of range"));
        }
        Ok(len)
    }

    /// Parses and verifies the header of `name`. `bytes` begins with the header; what follows it is ignored.
    pub fn decode(bytes: &[u8], name: &ChunkName) -> Result<Self, FormatError> {
        Self::decode_clear(bytes, name, None)
    }

    /// As [`Self::decode`]; with `payload_start`, of a header that was encrypted and took so many bytes of the object.
    pub(super) fn decode_clear(
        bytes: &[u8],
        name: &ChunkName,
        payload_start: Option<u32>,
    ) -> Result<Self, FormatError> {
        let len = Self::peek_len(bytes)?;
        let header = bytes.get(..len).ok_or(FormatError::Truncated { need: len, have: bytes.len() })?;
        let (preamble, rows) = Preamble::ref_from_prefix(header)
            .map_err(|_| FormatError::Invalid("the header's length is out of range"))?;
        if header_sum(header) != preamble.header_sum.get() {
            return Err(FormatError::Checksum);
        }
        // From here on the bytes are as somebody wrote them; what is left are contradictions and newer writers.
        let found =
            ChunkName { volume: VolumeId(preamble.volume), epoch: preamble.epoch.get(), seq: preamble.seq.get() };
        if found != *name {
            return Err(FormatError::Identity { found });
        }
        let kind = match preamble.kind {
            1 => ChunkKind::Data,
            2 => ChunkKind::Seal,
            3 => ChunkKind::Relocated,
            _ => return Err(FormatError::Invalid("the kind of chunk is unknown")),
        };
        if name.is_relocated() != (kind == ChunkKind::Relocated) {
            return Err(FormatError::Invalid("the kind of chunk and its number disagree"));
        }
        let (extents, frames) = (preamble.extents.get() as usize, preamble.frames.get() as usize);
        if extents > MAX_EXTENTS || frames > MAX_PAYLOAD_BLOCKS || Self::header_len(extents, frames) != len {
            return Err(FormatError::Invalid("the header's length and its row counts disagree"));
        }
        if preamble.reserved != 0 || preamble.reserved2.get() != 0 {
            return Err(FormatError::Invalid("a reserved field is not zero"));
        }
        if kind != ChunkKind::Relocated && preamble.first_lsn.get() > preamble.last_lsn.get() {
            return Err(FormatError::Invalid("the LSN range is reversed"));
        }
        let (extent_rows, frame_rows) = rows.split_at(extents * EXTENT_ROW);
        let frames = FrameDirectory::decode_rows(payload_start.unwrap_or(len as u32), frame_rows)?;
        let cipher = if payload_start.is_some() { FrameCipher::Aes256Gcm } else { FrameCipher::None };
        if frames.frames().iter().any(|frame| frame.cipher != cipher) {
            return Err(FormatError::Invalid("a frame is encrypted and its header is not, or the other way round"));
        }
        if frames.end() - frames.payload_start() != preamble.payload_len.get()
            || frames.raw_blocks() != u64::from(preamble.payload_blocks.get())
        {
            return Err(FormatError::Invalid("the payload's length and its frames disagree"));
        }
        let extents = decode_extents(extent_rows, frames.raw_blocks(), name.seq)?;
        let refers = extents.iter().any(|extent| matches!(extent.kind, ExtentKind::Refer { .. }));
        if refers != (preamble.version.get() == REFER_VERSION) {
            return Err(FormatError::Invalid("the version and the kinds of extents disagree"));
        }
        if kind == ChunkKind::Seal && !extents.is_empty() {
            return Err(FormatError::Invalid("a seal holds data"));
        }
        Ok(Self {
            name: *name,
            kind,
            first_lsn: preamble.first_lsn.get(),
            last_lsn: preamble.last_lsn.get(),
            created_ms: preamble.created_ms.get(),
            extents,
            frames,
        })
    }
}

fn decode_extents(rows: &[u8], payload_blocks: u64, own: u64) -> Result<Vec<ChunkExtent>, FormatError> {
    let rows = <[RawExtent]>::ref_from_bytes(rows).map_err(|_| FormatError::Invalid("the extents have half a row"))?;
    let mut extents = Vec::with_capacity(rows.len());
    let (mut end, mut index) = (0u64, 0u64);
    let mut rows = rows.iter().map(|row| {
        let mut wide = [0; 8];
        wide[..7].copy_from_slice(&row.blocks);
        (row.lba.get(), u64::from_le_bytes(wide), row.kind)
    });
    while let Some((lba, blocks, kind)) = rows.next() {
        if lba < end || blocks == 0 || lba >= MAX_LBA || blocks > MAX_LBA - lba {
            return Err(FormatError::Invalid("an extent is empty, out of order, or out of range"));
        }
        end = lba + blocks;
        let kind = match kind {
            DATA_ROW => {
                let first = index;
                index += blocks;
                if index > payload_blocks {
                    return Err(FormatError::Invalid("the extents exceed the payload"));
                }
                ExtentKind::Data { index: first as u16 }
            }
            ZERO_ROW => ExtentKind::Zero,
            HOLE_ROW => ExtentKind::Hole,
            REFER_ROW => match rows.next() {
                Some((seq, index, PLACE_ROW))
                    if seq != 0
                        && seq != u64::MAX
                        && seq != own
                        && index <= MAX_PAYLOAD_BLOCKS as u64
                        && blocks <= MAX_PAYLOAD_BLOCKS as u64 - index =>
                {
                    ExtentKind::Refer { seq, index: index as u16 }
                }
                _ => return Err(FormatError::Invalid("a reference names no place in another chunk")),
            },
            _ => return Err(FormatError::Invalid("the kind of an extent is unknown")),
        };
        extents.push(ChunkExtent { lba, blocks, kind });
    }
    if index != payload_blocks {
        return Err(FormatError::Invalid("the extents do not cover the payload"));
    }
    Ok(extents)
}

/// The checksum of a header: XXH3-64 over all of it, the checksum's own field taken as zeroes.
fn header_sum(header: &[u8]) -> u64 {
    let mut hash = Xxh3::with_seed(SUM_SEED);
    hash.update(&header[..SUM_AT]);
    hash.update(&[0; 8]);
    hash.update(&header[SUM_AT + 8..]);
    hash.digest()
}
