//! Making a chunk out of dirty pieces.

use bytes::Bytes;

use super::codec::{Codec, Compressor};
use super::format::{
    ChunkExtent, ChunkIndex, ChunkKind, ExtentKind, MAX_EXTENTS, MAX_LBA, MAX_PAYLOAD_BLOCKS, extent_rows,
};
use super::frames::{FRAME_BLOCKS, FRAME_BYTES, FrameCipher, FrameDirectory};
use super::name::ChunkName;
use super::sealed::{self, FrameKey};
use crate::buf::{AlignedBuf, Slice};
use crate::crypt::Keys;
use crate::types::{BLOCK, Lba, Lsn};

/// Where addresses jump, a frame of at least this many blocks ends. Scattered blocks then share frames of 32 KiB,
/// which halves what a random read of them fetches and decodes at a few bytes of directory per block.
const FRAME_BLOCKS_AT_GAP: usize = 8;

/// Memory for a chunk is taken in multiples of this, in bytes.
const ROOM_STEP: usize = 64 << 10;

/// What a chunk is to say of some blocks.
#[derive(Clone, Debug)]
pub enum Piece {
    /// They hold this data; whole blocks.
    Data {
        /// First block.
        lba: Lba,
        /// Their bytes, a multiple of 4 KiB.
        data: Slice,
    },
    /// They read as zeroes.
    Zero {
        /// First block.
        lba: Lba,
        /// Number of blocks.
        blocks: u64,
        /// Whether they count as allocated; false is a hole (trim).
        allocated: bool,
    },
    /// They are what another chunk holds.
    Refer {
        /// First block.
        lba: Lba,
        /// Number of blocks.
        blocks: u64,
        /// That chunk's sequence number.
        seq: u64,
        /// Payload index of the first block.
        index: u16,
    },
}

/// What goes into a chunk. The pieces are sorted by address and do not overlap.
#[derive(Clone, Debug)]
pub struct ChunkDraft {
    /// Its identity; never used before. It also says whether the chunk is part of the history or relocated.
    pub name: ChunkName,
    /// The oldest LSN in it; the basis of a relocated chunk.
    pub first_lsn: Lsn,
    /// The newest LSN in it; that of the basis in a relocated chunk.
    pub last_lsn: Lsn,
    /// How to compress its frames.
    pub codec: Codec,
    /// Unix time in milliseconds.
    pub created_ms: u64,
    /// What it says.
    pub pieces: Vec<Piece>,
}

/// A chunk ready to be put.
#[derive(Clone, Debug)]
pub struct Chunk {
    /// The whole object.
    pub bytes: Bytes,
    /// Its header, as a reader would decode it.
    pub index: ChunkIndex,
}

/// Why a draft cannot become a chunk. Each but the last is a mistake of the caller.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// More payload than an index can name.
    #[error("chunk {0:?}: {1} blocks of payload exceed the limit of {MAX_PAYLOAD_BLOCKS}")]
    TooManyBlocks(ChunkName, usize),
    /// More extents than a header may list.
    #[error("chunk {0:?}: {1} rows of extents exceed the limit of {MAX_EXTENTS}")]
    TooManyExtents(ChunkName, usize),
    /// A piece that is empty, not whole blocks, out of order, or beyond the address space.
    #[error("chunk {0:?}: the piece at block {1} is {2}")]
    BadPiece(ChunkName, Lba, &'static str),
    /// The LSN range is reversed.
    #[error("chunk {0:?}: the LSN range {1} to {2} is reversed")]
    BadLsns(ChunkName, Lsn, Lsn),
    /// The compressor failed.
    #[error("chunk {0:?}: compression failed")]
    Compress(ChunkName, #[source] std::io::Error),
}

impl ChunkDraft {
    /// Compresses, encrypts with `keys` if the volume is encrypted, and lays out the chunk. CPU heavy (see
    /// `docs/performance.md`): call it off the async threads. Of one name no two drafts may ever be encrypted.
    pub fn encode(&self, keys: Option<&Keys>) -> Result<Chunk, ChunkError> {
        if !self.name.is_relocated() && self.first_lsn > self.last_lsn {
            return Err(ChunkError::BadLsns(self.name, self.first_lsn, self.last_lsn));
        }
        let extents = self.extents()?;
        let cuts = cut_frames(&extents);
        let header_len = sealed::stored_len(ChunkIndex::header_len(extent_rows(&extents), cuts.len()), keys);
        let key = keys.map(|keys| FrameKey::new(keys, &self.name));
        let cipher = if key.is_some() { FrameCipher::Aes256Gcm } else { FrameCipher::None };
        let payload_blocks: usize = cuts.iter().map(|blocks| usize::from(*blocks)).sum();

        // Large enough if nothing shrinks; aligned so that a directory can write it to its disk without a copy; of few
        // sizes so that the memory is used again.
        let room = (header_len + payload_blocks * BLOCK + cuts.len() * cipher.overhead()).next_multiple_of(ROOM_STEP);
        let mut bytes = AlignedBuf::for_overwrite(room);
        let mut end = header_len;
        let mut frames = FrameDirectory::new(header_len as u32);
        let mut compressor = Compressor::new(self.codec).map_err(|source| ChunkError::Compress(self.name, source))?;
        let mut payload = Payload::new(&self.pieces);
        for (number, blocks) in cuts.into_iter().enumerate() {
            let raw = payload.take(usize::from(blocks) * BLOCK);
            let (encoding, stored) =
                compressor.compress(raw).map_err(|source| ChunkError::Compress(self.name, source))?;
            let place = &mut bytes[end..end + stored.len() + cipher.overhead()];
            match &key {
                None => place.copy_from_slice(stored),
                Some(key) => key.seal(number as u32, blocks, encoding, stored, place),
            }
            let sum = self.name.frame_sum(number as u32, place);
            frames.push_sealed(place.len() as u32, blocks, encoding, cipher, sum);
            end += place.len();
        }
        let index = ChunkIndex {
            name: self.name,
            kind: if self.name.is_relocated() { ChunkKind::Relocated } else { ChunkKind::Data },
            first_lsn: self.first_lsn,
            last_lsn: self.last_lsn,
            created_ms: self.created_ms,
            extents,
            frames,
        };
        bytes[..header_len].copy_from_slice(&sealed::encode(&index, keys));
        Ok(Chunk { bytes: bytes.into_bytes(end), index })
    }

    /// The extents of the pieces, neighbours of one kind joined.
    fn extents(&self) -> Result<Vec<ChunkExtent>, ChunkError> {
        let mut extents: Vec<ChunkExtent> = Vec::with_capacity(self.pieces.len());
        let (mut end, mut index) = (0, 0usize);
        for piece in &self.pieces {
            let (lba, blocks, kind) = match piece {
                Piece::Data { lba, data } => {
                    if !data.len().is_multiple_of(BLOCK) {
                        return Err(ChunkError::BadPiece(self.name, *lba, "not whole blocks"));
                    }
                    let first = index;
                    index += data.len() / BLOCK;
                    if index > MAX_PAYLOAD_BLOCKS {
                        return Err(ChunkError::TooManyBlocks(self.name, index));
                    }
                    let kind = ExtentKind::Data { index: first as u16 };
                    (*lba, (data.len() / BLOCK) as u64, kind)
                }
                Piece::Zero { lba, blocks, allocated: true } => (*lba, *blocks, ExtentKind::Zero),
                Piece::Zero { lba, blocks, .. } => (*lba, *blocks, ExtentKind::Hole),
                Piece::Refer { lba, blocks, seq, index } => {
                    (*lba, *blocks, ExtentKind::Refer { seq: *seq, index: *index })
                }
            };
            let nowhere = |blocks: u64| match kind {
                ExtentKind::Refer { seq, index } => {
                    seq == 0
                        || seq == u64::MAX
                        || seq == self.name.seq
                        || blocks > MAX_PAYLOAD_BLOCKS as u64 - u64::from(index)
                }
                _ => false,
            };
            let problem = if blocks == 0 {
                Some("empty")
            } else if lba < end {
                Some("not after the one before it")
            } else if lba >= MAX_LBA || blocks > MAX_LBA - lba {
                Some("beyond the address space")
            } else if nowhere(blocks) {
                Some("no reference to a place in another chunk")
            } else {
                None
            };
            if let Some(problem) = problem {
                return Err(ChunkError::BadPiece(self.name, lba, problem));
            }
            match extents.last_mut() {
                Some(last) if lba == end && last.kind.continues(last.blocks, kind) => {
                    last.blocks += blocks;
                }
                _ => extents.push(ChunkExtent { lba, blocks, kind }),
            }
            end = lba + blocks;
        }
        let rows = extent_rows(&extents);
        if rows > MAX_EXTENTS {
            return Err(ChunkError::TooManyExtents(self.name, rows));
        }
        Ok(extents)
    }
}

/// A chunk of kind [`ChunkKind::Seal`]: put with `Create` under the first name an ended epoch has not used, it makes
/// every later put of that name by the epoch's owner fail.
pub fn encode_seal(name: ChunkName, created_ms: u64, keys: Option<&Keys>) -> Bytes {
    let index = ChunkIndex {
        name,
        kind: ChunkKind::Seal,
        first_lsn: 0,
        last_lsn: 0,
        created_ms,
        extents: Vec::new(),
        frames: FrameDirectory::new(sealed::stored_len(ChunkIndex::header_len(0, 0), keys) as u32),
    };
    sealed::encode(&index, keys).into()
}

/// The lengths in blocks of the frames for `extents`: full ones, cut early only where addresses jump.
fn cut_frames(extents: &[ChunkExtent]) -> Vec<u8> {
    let mut cuts = Vec::new();
    let mut open = 0usize;
    let mut end = None;
    for extent in extents {
        let ExtentKind::Data { .. } = extent.kind else {
            continue;
        };
        if end != Some(extent.lba) && open >= FRAME_BLOCKS_AT_GAP {
            cuts.push(open as u8);
            open = 0;
        }
        let mut left = extent.blocks as usize;
        while left > 0 {
            let take = left.min(FRAME_BLOCKS - open);
            open += take;
            left -= take;
            if open == FRAME_BLOCKS {
                cuts.push(open as u8);
                open = 0;
            }
        }
        end = Some(extent.lba + extent.blocks);
    }
    if open > 0 {
        cuts.push(open as u8);
    }
    cuts
}

/// The bytes of the data pieces, in order, handed out frame by frame without a copy where one piece holds them all.
struct Payload<'a> {
    pieces: std::slice::Iter<'a, Piece>,
    rest: &'a [u8],
    scratch: Vec<u8>,
}

impl<'a> Payload<'a> {
    fn new(pieces: &'a [Piece]) -> Self {
        Self { pieces: pieces.iter(), rest: &[], scratch: Vec::with_capacity(FRAME_BYTES) }
    }

    fn refill(&mut self) {
        while self.rest.is_empty() {
            match self.pieces.next() {
                Some(Piece::Data { data, .. }) => self.rest = data,
                Some(Piece::Zero { .. } | Piece::Refer { .. }) => {}
                None => return,
            }
        }
    }

    fn take(&mut self, len: usize) -> &[u8] {
        self.refill();
        if self.rest.len() >= len {
            let (taken, rest) = self.rest.split_at(len);
            self.rest = rest;
            return taken;
        }
        self.scratch.clear();
        while self.scratch.len() < len {
            self.refill();
            // The frames were cut from these very pieces, so they cannot run out.
            assert!(!self.rest.is_empty(), "frames exceed the payload");
            let (taken, rest) = self.rest.split_at(self.rest.len().min(len - self.scratch.len()));
            self.scratch.extend_from_slice(taken);
            self.rest = rest;
        }
        &self.scratch
    }
}
