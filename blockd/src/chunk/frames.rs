//! The frame directory of a chunk: where each frame stands and how to check it. Pure; total on foreign bytes.

use std::ops::Range;

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::format::{FormatError, MAX_HEADER, MAX_PAYLOAD_BLOCKS};
use crate::types::BLOCK;

/// The most blocks in one frame.
pub const FRAME_BLOCKS: usize = 16;
/// The most bytes in one frame, raw or encoded.
pub const FRAME_BYTES: usize = FRAME_BLOCKS * BLOCK;
/// The most bytes in one frame, stored.
pub const FRAME_STORED_BYTES: usize = FRAME_BYTES + FrameCipher::Aes256Gcm.overhead();

/// What was done to a frame's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameEncoding {
    /// Nothing.
    Raw = 0,
    /// LZ4 block format without a length prefix.
    Lz4 = 1,
    /// One Zstandard frame.
    Zstd = 2,
}

/// How a frame's bytes are encrypted, after they were encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum FrameCipher {
    /// Not at all.
    None = 0,
    /// By AES-256-GCM under a key of its chunk's own; the tag follows the bytes.
    Aes256Gcm = 1,
}

impl FrameCipher {
    /// What it adds to a frame, in bytes.
    pub const fn overhead(self) -> usize {
        match self {
            Self::None => 0,
            Self::Aes256Gcm => 16,
        }
    }
}

/// One row of a frame directory, as stored in chunks and in the translation table.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFrame {
    stored_len: U32,
    blocks: u8,
    encoding: u8,
    cipher: u8,
    reserved: u8,
    sum: U64,
}

/// Bytes of one directory row.
pub(super) const FRAME_ROW: usize = 16;
const _: () = assert!(size_of::<RawFrame>() == FRAME_ROW);

/// One frame: consecutive blocks of the payload, encoded together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Checksum of the stored bytes, see [`super::ChunkName::frame_sum`].
    pub sum: u64,
    /// Where its stored bytes begin in the object. 32 bits do: header and payload together stay below 273 MiB.
    pub offset: u32,
    /// Its stored bytes.
    pub stored_len: u32,
    /// The payload index of its first block.
    pub first_block: u16,
    /// Its blocks, 1 to [`FRAME_BLOCKS`].
    pub blocks: u8,
    /// How to undo what was done to it.
    pub encoding: FrameEncoding,
    /// How to undo what was done to it after that.
    pub cipher: FrameCipher,
}

const _: () = assert!(MAX_HEADER + MAX_PAYLOAD_BLOCKS * (BLOCK + 16) + 64 < 273 << 20);
// Many thousands of these are kept in memory.
const _: () = assert!(size_of::<Frame>() == 24);

impl Frame {
    /// The place of its stored bytes in the object.
    pub fn range(&self) -> Range<u64> {
        let offset = u64::from(self.offset);
        offset..offset + u64::from(self.stored_len)
    }

    /// Its length when decoded, in bytes.
    pub fn raw_len(&self) -> usize {
        usize::from(self.blocks) * BLOCK
    }
}

/// All frames of a chunk, in payload order and without gaps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameDirectory {
    payload_start: u32,
    frames: Vec<Frame>,
}

impl FrameDirectory {
    /// An empty directory of a chunk whose payload begins at byte `payload_start` of the object.
    pub(crate) fn new(payload_start: u32) -> Self {
        Self { payload_start, frames: Vec::new() }
    }

    /// Appends a frame; its place follows from those before it.
    pub(crate) fn push(&mut self, stored_len: u32, blocks: u8, encoding: FrameEncoding, sum: u64) {
        self.push_sealed(stored_len, blocks, encoding, FrameCipher::None, sum);
    }

    /// As [`Self::push`], of a frame that may be encrypted.
    pub(crate) fn push_sealed(
        &mut self,
        stored_len: u32,
        blocks: u8,
        encoding: FrameEncoding,
        cipher: FrameCipher,
        sum: u64,
    ) {
        self.frames.push(Frame {
            offset: self.end() as u32,
            stored_len,
            first_block: self.raw_blocks() as u16,
            blocks,
            encoding,
            cipher,
            sum,
        });
    }

    /// Where the payload begins in the object: the length of the header.
    pub fn payload_start(&self) -> u64 {
        self.payload_start.into()
    }

    /// Where the payload ends: the length of the object.
    pub fn end(&self) -> u64 {
        self.frames.last().map_or(self.payload_start.into(), |f| f.range().end)
    }

    /// Blocks in the payload.
    pub fn raw_blocks(&self) -> u64 {
        self.frames.last().map_or(0, |f| u64::from(f.first_block) + u64::from(f.blocks))
    }

    /// The frames in order; a frame's number is its position here.
    pub fn frames(&self) -> &[Frame] {
        &self.frames
    }

    /// Number of the frame that holds the payload block `index`, and the block's position in it.
    pub fn locate(&self, index: u16) -> Option<(u32, u8)> {
        let after = self.frames.partition_point(|f| f.first_block <= index);
        let number = after.checked_sub(1)?;
        let within = index - self.frames[number].first_block;
        (within < u16::from(self.frames[number].blocks)).then_some((number as u32, within as u8))
    }

    /// Memory in use, in bytes.
    pub fn memory(&self) -> usize {
        size_of::<Self>() + self.frames.capacity() * size_of::<Frame>()
    }

    /// Appends the rows of the directory to `out`.
    pub(crate) fn encode_rows(&self, out: &mut Vec<u8>) {
        for frame in &self.frames {
            let row = RawFrame {
                stored_len: frame.stored_len.into(),
                blocks: frame.blocks,
                encoding: frame.encoding as u8,
                cipher: frame.cipher as u8,
                reserved: 0,
                sum: frame.sum.into(),
            };
            out.extend_from_slice(row.as_bytes());
        }
    }

    /// Parses directory rows; every byte of `rows` must belong to one.
    pub(crate) fn decode_rows(payload_start: u32, rows: &[u8]) -> Result<Self, FormatError> {
        let rows = <[RawFrame]>::ref_from_bytes(rows)
            .map_err(|_| FormatError::Invalid("the frame directory has half a row"))?;
        let mut directory = Self::new(payload_start);
        // Bounded by the bytes that are really there.
        directory.frames.reserve_exact(rows.len());
        for row in rows {
            let encoding = match row.encoding {
                0 => FrameEncoding::Raw,
                1 => FrameEncoding::Lz4,
                2 => FrameEncoding::Zstd,
                code => return Err(FormatError::UnknownEncoding(code)),
            };
            let cipher = match row.cipher {
                0 => FrameCipher::None,
                1 => FrameCipher::Aes256Gcm,
                code => return Err(FormatError::UnknownCipher(code)),
            };
            let (blocks, stored_len) = (usize::from(row.blocks), row.stored_len.get());
            if blocks == 0 || blocks > FRAME_BLOCKS {
                return Err(FormatError::Invalid("a frame's block count is out of range"));
            }
            if directory.raw_blocks() as usize + blocks > MAX_PAYLOAD_BLOCKS {
                return Err(FormatError::Invalid("the frames hold too many blocks"));
            }
            let encoded_len = (stored_len as usize).checked_sub(cipher.overhead());
            let fits = encoded_len.is_some_and(|len| match encoding {
                FrameEncoding::Raw => len == blocks * BLOCK,
                _ => len > 0 && len < blocks * BLOCK,
            });
            if !fits || row.reserved != 0 {
                return Err(FormatError::Invalid("a frame's stored length does not fit"));
            }
            directory.push_sealed(stored_len, row.blocks, encoding, cipher, row.sum.get());
        }
        Ok(directory)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_found_in_their_frames() {
        let mut d = FrameDirectory::new(1000);
        d.push(100, 3, FrameEncoding::Lz4, 1);
        d.push(65536, 16, FrameEncoding::Raw, 2);
        d.push(5, 1, FrameEncoding::Zstd, 3);
        assert_eq!(d.locate(0), Some((0, 0)));
        assert_eq!(d.locate(2), Some((0, 2)));
        assert_eq!(d.locate(3), Some((1, 0)));
        assert_eq!(d.locate(18), Some((1, 15)));
        assert_eq!(d.locate(19), Some((2, 0)));
        assert_eq!(d.locate(20), None);
        assert_eq!(FrameDirectory::new(0).locate(0), None);
        assert_eq!(d.end(), 1000 + 100 + 65536 + 5);
        let mut rows = Vec::new();
        d.encode_rows(&mut rows);
        assert_eq!(FrameDirectory::decode_rows(1000, &rows).unwrap(), d);
        assert!(FrameDirectory::decode_rows(1000, &rows[..47]).is_err());
        for (at, value) in [(4, 0), (4, 17), (5, 3), (6, 2), (22, 1), (7, 1), (21, 1)] {
            let mut bad = rows.clone();
            bad[at] = value;
            assert!(FrameDirectory::decode_rows(1000, &bad).is_err(), "byte {at} = {value}");
        }
    }

    #[test]
    fn more_blocks_than_an_index_can_name_are_refused() {
        let mut d = FrameDirectory::new(0);
        for _ in 0..4095 {
            d.push(65536, 16, FrameEncoding::Raw, 0);
        }
        d.push(15 * 4096, 15, FrameEncoding::Raw, 0);
        let mut rows = Vec::new();
        d.encode_rows(&mut rows);
        assert_eq!(FrameDirectory::decode_rows(0, &rows).unwrap().raw_blocks(), 65535);
        rows.extend_from_within(..16);
        assert!(FrameDirectory::decode_rows(0, &rows).is_err());
    }
}
