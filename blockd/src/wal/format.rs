//! On-disk layout of the write-ahead log, versions 1 and 2. Pure encoding and decoding; no I/O.
//!
//! A segment is one file of fixed size. Block 0 is a [`SegmentHeader`]; frames follow, each starting at a block
//! boundary: one or more header blocks, then the payload blocks. All integers are little-endian.
//! `docs/format.md` has the byte tables.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::types::{BLOCK, Lba, Lsn, VolumeId};

/// First bytes of a segment header.
pub const SEGMENT_MAGIC: [u8; 8] = *b"BLKDWAL\0";
/// First bytes of a frame header.
pub const FRAME_MAGIC: [u8; 4] = *b"BLKF";
/// The layout of segment headers, and of frames that hold no references.
pub const VERSION: u16 = 1;
/// The layout of frames that hold references, so that a program that does not know them says so.
pub const REFER_VERSION: u16 = 2;
/// Most payload blocks in one frame: 4 MiB.
pub const FRAME_BLOCKS_MAX: usize = 1024;
/// Most records in one frame.
pub const FRAME_RECORDS_MAX: usize = 1024;
/// Most older segments an anchor can name, which bounds the number of segments of a log.
pub const CHAIN_MAX: usize = 240;
/// LSNs and generations count from 1 and never come near this; a header that says so is none. Keeps sums with them
/// from overflowing.
const COUNT_MAX: u64 = u64::MAX / 2;

/// Checksum of one payload block.
pub fn block_sum(block: &[u8]) -> u64 {
    xxh3_64(block)
}

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Not written, or recycled: no frame or header of this generation starts here.
    #[error("no valid header")]
    Absent,
    /// Written by a newer blockd.
    #[error("log format version {0} is newer than this blockd understands; start a newer blockd")]
    Newer(u16),
}

/// One older segment a recovered log still needs: where it stands in the chain and where its valid part ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct ChainLink {
    /// Generation of the older segment.
    pub generation: U64,
    /// Byte offset at which its last valid frame ends.
    pub end: U64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawSegmentHeader {
    magic: [u8; 8],
    version: U16,
    chain_len: U16,
    segment: U32,
    volume: [u8; 16],
    generation: U64,
    anchor: U64,
    epoch: U64,
    first_lsn: U64,
    durable_lsn: U64,
    prev_end: U64,
    segment_bytes: U64,
    checksum: U64,
}
const _: () = assert!(size_of::<RawSegmentHeader>() == 96);
const _: () = assert!(size_of::<RawSegmentHeader>() + CHAIN_MAX * size_of::<ChainLink>() <= BLOCK);

/// Block 0 of a segment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// Number of the segment file.
    pub segment: u32,
    /// The volume whose log this is.
    pub volume: VolumeId,
    /// Grows by one each time any segment of this log is (re)used.
    pub generation: u64,
    /// Generation of the segment that the newest recovery started. Its header was made durable before anything
    /// of a later generation was written.
    pub anchor: u64,
    /// Epoch of the owner that wrote it.
    pub epoch: u64,
    /// LSN of the first record to be found in it.
    pub first_lsn: Lsn,
    /// Everything up to here was durable when the header was written.
    pub durable_lsn: Lsn,
    /// Where the valid part of generation - 1 ends, in bytes; 0 in an anchor.
    pub prev_end: u64,
    /// Size of every segment of this log, in bytes.
    pub segment_bytes: u64,
    /// In an anchor: the older segments that were still needed, oldest first.
    pub chain: Vec<ChainLink>,
}

impl SegmentHeader {
    /// Fills one block.
    ///
    /// # Panics
    /// When the chain is longer than [`CHAIN_MAX`], which the segment limit rules out.
    pub fn encode(&self, block: &mut [u8]) {
        assert!(self.chain.len() <= CHAIN_MAX && block.len() == BLOCK);
        block.fill(0);
        let raw = RawSegmentHeader {
            magic: SEGMENT_MAGIC,
            version: VERSION.into(),
            chain_len: (self.chain.len() as u16).into(),
            segment: self.segment.into(),
            volume: self.volume.0,
            generation: self.generation.into(),
            anchor: self.anchor.into(),
            epoch: self.epoch.into(),
            first_lsn: self.first_lsn.into(),
            durable_lsn: self.durable_lsn.into(),
            prev_end: self.prev_end.into(),
            segment_bytes: self.segment_bytes.into(),
            checksum: 0.into(),
        };
        block[..96].copy_from_slice(raw.as_bytes());
        for (slot, link) in block[96..].chunks_exact_mut(16).zip(&self.chain) {
            slot.copy_from_slice(link.as_bytes());
        }
        let sum = xxh3_64(block);
        block[88..96].copy_from_slice(&sum.to_le_bytes());
    }

    /// Reads block 0.
    pub fn decode(block: &[u8]) -> Result<Self, FormatError> {
        let (raw, rest) = RawSegmentHeader::ref_from_prefix(block).map_err(|_| FormatError::Absent)?;
        if raw.magic != SEGMENT_MAGIC || block.len() != BLOCK {
            return Err(FormatError::Absent);
        }
        let mut copy = [0u8; BLOCK];
        copy.copy_from_slice(block);
        copy[88..96].fill(0);
        if xxh3_64(&copy) != raw.checksum.get() {
            return Err(FormatError::Absent);
        }
        if raw.version.get() != VERSION {
            return Err(FormatError::Newer(raw.version.get()));
        }
        let chain_len = usize::from(raw.chain_len.get());
        let counts = 1..=COUNT_MAX;
        if chain_len > CHAIN_MAX || !counts.contains(&raw.generation.get()) || !counts.contains(&raw.first_lsn.get()) {
            return Err(FormatError::Absent);
        }
        let chain = rest.chunks_exact(16).take(chain_len).filter_map(|c| ChainLink::read_from_bytes(c).ok()).collect();
        Ok(Self {
            segment: raw.segment.get(),
            volume: VolumeId(raw.volume),
            generation: raw.generation.get(),
            anchor: raw.anchor.get(),
            epoch: raw.epoch.get(),
            first_lsn: raw.first_lsn.get(),
            durable_lsn: raw.durable_lsn.get(),
            prev_end: raw.prev_end.get(),
            segment_bytes: raw.segment_bytes.get(),
            chain,
        })
    }
}

/// What a record does to its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RecordKind {
    /// Written with the payload blocks starting at this index of the frame's payload.
    Data {
        /// First payload block.
        at: u32,
    },
    /// Zeroed; `allocated` tells "no hole" from a trim.
    Zero {
        /// Counts as allocated.
        allocated: bool,
    },
    /// A copy by reference: they are what this and the following payload blocks of a chunk of the volume hold. At most
    /// 65,535 blocks.
    Refer {
        /// The chunk's sequence number.
        seq: u64,
        /// Payload index of the first block.
        index: u16,
    },
}

/// One accepted write, trim, zero or copy. Its LSN is the frame's first LSN plus its index.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// First block.
    pub lba: Lba,
    /// Number of blocks, at least 1.
    pub blocks: u64,
    /// What happened to them.
    pub kind: RecordKind,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRecord {
    lba: U64,
    blocks: U64,
    at: U32,
    kind: u8,
    pad: [u8; 3],
}
const RECORD_BYTES: usize = size_of::<RawRecord>();
const _: () = assert!(RECORD_BYTES == 24);

const KIND_DATA: u8 = 1;
const KIND_TRIM: u8 = 2;
const KIND_ZERO: u8 = 3;
/// `blocks` is the chunk's sequence number then, and `at` the index and, above it, the number of blocks.
const KIND_REFER: u8 = 4;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawFrameHeader {
    magic: [u8; 4],
    version: U16,
    header_blocks: U16,
    generation: U64,
    offset: U64,
    epoch: U64,
    first_lsn: U64,
    durable_lsn: U64,
    time_ms: U64,
    records: U32,
    payload_blocks: U32,
    checksum: U64,
}
const FRAME_FIXED: usize = size_of::<RawFrameHeader>();
const _: () = assert!(FRAME_FIXED == 72);
const CHECKSUM_AT: usize = 64;

/// Header of a frame: who wrote it where and when, its records, and a checksum per payload block.
///
/// A frame without records carries only the durable horizon forward; a clean shutdown ends with one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrameHeader {
    /// Generation of the segment it stands in; salts the checksum, so bytes of an earlier use never parse.
    pub generation: u64,
    /// Byte offset within the segment at which it stands.
    pub offset: u64,
    /// Epoch of the writer.
    pub epoch: u64,
    /// LSN of the first record; of the next record to come when there is none.
    pub first_lsn: Lsn,
    /// Everything up to here was durable on the log device when the frame was written. Tells a torn tail from rot.
    pub durable_lsn: Lsn,
    /// Wall clock at writing, milliseconds since 1970; for reporting only.
    pub time_ms: u64,
    /// What was accepted, in LSN order.
    pub records: Vec<Record>,
    /// One checksum per payload block.
    pub sums: Vec<u64>,
}

/// Size of the header of a frame, in blocks.
pub fn header_blocks(records: usize, payload_blocks: usize) -> usize {
    (FRAME_FIXED + records * RECORD_BYTES + payload_blocks * 8).div_ceil(BLOCK)
}

impl FrameHeader {
    /// Header blocks and payload blocks.
    pub fn total_blocks(&self) -> usize {
        header_blocks(self.records.len(), self.sums.len()) + self.sums.len()
    }

    /// Number of header blocks.
    pub fn header_blocks(&self) -> usize {
        header_blocks(self.records.len(), self.sums.len())
    }

    /// LSN of the last record; `first_lsn - 1` when there is none.
    pub fn last_lsn(&self) -> Lsn {
        self.first_lsn + self.records.len() as u64 - 1
    }

    /// Fills `out`, which must be exactly [`FrameHeader::header_blocks`] long.
    pub fn encode(&self, out: &mut [u8]) {
        let blocks = self.header_blocks();
        assert!(out.len() == blocks * BLOCK, "frame header buffer has the wrong size");
        assert!(self.records.len() <= FRAME_RECORDS_MAX && self.sums.len() <= FRAME_BLOCKS_MAX);
        let refers = self.records.iter().any(|record| matches!(record.kind, RecordKind::Refer { .. }));
        let raw = RawFrameHeader {
            magic: FRAME_MAGIC,
            version: if refers { REFER_VERSION } else { VERSION }.into(),
            header_blocks: (blocks as u16).into(),
            generation: self.generation.into(),
            offset: self.offset.into(),
            epoch: self.epoch.into(),
            first_lsn: self.first_lsn.into(),
            durable_lsn: self.durable_lsn.into(),
            time_ms: self.time_ms.into(),
            records: (self.records.len() as u32).into(),
            payload_blocks: (self.sums.len() as u32).into(),
            checksum: 0.into(),
        };
        out[..FRAME_FIXED].copy_from_slice(raw.as_bytes());
        let mut at = FRAME_FIXED;
        for record in &self.records {
            let (kind, blocks, payload) = match record.kind {
                RecordKind::Data { at } => (KIND_DATA, record.blocks, at),
                RecordKind::Zero { allocated: false } => (KIND_TRIM, record.blocks, 0),
                RecordKind::Zero { allocated: true } => (KIND_ZERO, record.blocks, 0),
                RecordKind::Refer { seq, index } => {
                    assert!(record.blocks <= u64::from(u16::MAX), "a reference lies within one chunk");
                    (KIND_REFER, seq, u32::from(index) | (record.blocks as u32) << 16)
                }
            };
            let raw =
                RawRecord { lba: record.lba.into(), blocks: blocks.into(), at: payload.into(), kind, pad: [0; 3] };
            out[at..at + RECORD_BYTES].copy_from_slice(raw.as_bytes());
            at += RECORD_BYTES;
        }
        for sum in &self.sums {
            out[at..at + 8].copy_from_slice(&sum.to_le_bytes());
            at += 8;
        }
        out[at..].fill(0);
        let sum = xxh3_64_with_seed(out, self.generation);
        out[CHECKSUM_AT..CHECKSUM_AT + 8].copy_from_slice(&sum.to_le_bytes());
    }

    /// Generation that a header starting in `first_block` claims, if it looks like one at all; verified by
    /// [`FrameHeader::decode`].
    pub fn claimed_generation(first_block: &[u8]) -> Option<u64> {
        let (raw, _) = RawFrameHeader::ref_from_prefix(first_block).ok()?;
        let generation = raw.generation.get();
        (raw.magic == FRAME_MAGIC && (1..=COUNT_MAX).contains(&generation)).then_some(generation)
    }

    /// Number of header blocks a header starting in `first_block` claims, if it looks like a frame of `generation`
    /// at `offset`; the claim is verified by [`FrameHeader::decode`].
    pub fn claimed_blocks(first_block: &[u8], generation: u64, offset: u64) -> Result<usize, FormatError> {
        let (raw, _) = RawFrameHeader::ref_from_prefix(first_block).map_err(|_| FormatError::Absent)?;
        let blocks = usize::from(raw.header_blocks.get());
        let expected = header_blocks(FRAME_RECORDS_MAX, FRAME_BLOCKS_MAX);
        if raw.magic != FRAME_MAGIC
            || raw.generation.get() != generation
            || raw.offset.get() != offset
            || !(1..=expected).contains(&blocks)
        {
            return Err(FormatError::Absent);
        }
        Ok(blocks)
    }

    /// Reads the header of a frame of `generation` at `offset` from exactly its header blocks.
    pub fn decode(bytes: &[u8], generation: u64, offset: u64) -> Result<Self, FormatError> {
        let blocks = Self::claimed_blocks(bytes, generation, offset)?;
        if bytes.len() != blocks * BLOCK {
            return Err(FormatError::Absent);
        }
        let (raw, rest) = RawFrameHeader::ref_from_prefix(bytes).map_err(|_| FormatError::Absent)?;
        let mut hasher = xxhash_rust::xxh3::Xxh3::with_seed(generation);
        hasher.update(&bytes[..CHECKSUM_AT]);
        hasher.update(&[0; 8]);
        hasher.update(&bytes[CHECKSUM_AT + 8..]);
        if hasher.digest() != raw.checksum.get() {
            return Err(FormatError::Absent);
        }
        let version = raw.version.get();
        if version != VERSION && version != REFER_VERSION {
            return Err(FormatError::Newer(version));
        }
        let count = raw.records.get() as usize;
        let payload = raw.payload_blocks.get() as usize;
        if count > FRAME_RECORDS_MAX
            || payload > FRAME_BLOCKS_MAX
            || header_blocks(count, payload) != blocks
            || !(1..=COUNT_MAX).contains(&raw.first_lsn.get())
        {
            return Err(FormatError::Absent);
        }
        let mut records = Vec::with_capacity(count);
        for bytes in rest[..count * RECORD_BYTES].chunks_exact(RECORD_BYTES) {
            let raw = RawRecord::ref_from_bytes(bytes).map_err(|_| FormatError::Absent)?;
            let (at, lba) = (raw.at.get(), raw.lba.get());
            let in_payload = u64::from(at).checked_add(raw.blocks.get()).is_some_and(|end| end <= payload as u64);
            let (kind, blocks) = match raw.kind {
                KIND_DATA if in_payload => (RecordKind::Data { at }, raw.blocks.get()),
                KIND_TRIM => (RecordKind::Zero { allocated: false }, raw.blocks.get()),
                KIND_ZERO => (RecordKind::Zero { allocated: true }, raw.blocks.get()),
                KIND_REFER if version == REFER_VERSION => {
                    let (seq, index, blocks) = (raw.blocks.get(), at as u16, at >> 16);
                    if seq == 0 || seq == u64::MAX || u32::from(index) + blocks > u32::from(u16::MAX) {
                        return Err(FormatError::Absent);
                    }
                    (RecordKind::Refer { seq, index }, u64::from(blocks))
                }
                _ => return Err(FormatError::Absent),
            };
            if blocks == 0 || lba.checked_add(blocks).is_none_or(|end| end > u64::MAX / BLOCK as u64) {
                return Err(FormatError::Absent);
            }
            records.push(Record { lba, blocks, kind });
        }
        let sums = rest[count * RECORD_BYTES..]
            .chunks_exact(8)
            .take(payload)
            .map(|b| u64::from_le_bytes(b.try_into().expect("chunks of eight")))
            .collect();
        Ok(Self {
            generation,
            offset,
            epoch: raw.epoch.get(),
            first_lsn: raw.first_lsn.get(),
            durable_lsn: raw.durable_lsn.get(),
            time_ms: raw.time_ms.get(),
            records,
            sums,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(records: usize, payload: usize) -> FrameHeader {
        FrameHeader {
            generation: 7,
            offset: 8192,
            epoch: 3,
            first_lsn: 100,
            durable_lsn: 90,
            time_ms: 5,
            records: (0..records)
                .map(|i| Record {
                    lba: i as u64 * 9,
                    blocks: 1,
                    kind: if i < payload {
                        RecordKind::Data { at: i as u32 }
                    } else {
                        RecordKind::Zero { allocated: i % 2 == 0 }
                    },
                })
                .collect(),
            sums: (0..payload as u64).map(|i| i * 77).collect(),
        }
    }

    #[test]
    fn frame_header_round_trips_at_every_size() {
        for (records, payload) in [(0, 0), (1, 1), (32, 32), (1, 1024), (1024, 1024), (1024, 0), (200, 3)] {
            let header = header(records, payload);
            let mut bytes = vec![0; header.header_blocks() * BLOCK];
            header.encode(&mut bytes);
            assert_eq!(FrameHeader::decode(&bytes, 7, 8192).unwrap(), header);
            assert_eq!(FrameHeader::decode(&bytes, 8, 8192), Err(FormatError::Absent), "another generation");
            assert_eq!(FrameHeader::decode(&bytes, 7, 4096), Err(FormatError::Absent), "another place");
        }
    }

    #[test]
    fn references_make_a_frame_of_version_2() {
        let refer = |lba, blocks, seq, index| Record { lba, blocks, kind: RecordKind::Refer { seq, index } };
        let records = vec![refer(1 << 50, 65_000, 1 << 63 | 9, 535), refer(3, 1, 1, 0)];
        let referring = FrameHeader { records, ..header(0, 0) };
        let mut bytes = vec![0; BLOCK];
        referring.encode(&mut bytes);
        assert_eq!(bytes[4], 2);
        assert_eq!(FrameHeader::decode(&bytes, 7, 8192).unwrap(), referring);
        #[cfg(feature = "engine")]
        crate::chunk::testing::golden("log-frame-v2.bin", &bytes, true, |kept| {
            assert_eq!(FrameHeader::decode(kept, 7, 8192).unwrap(), referring);
        });
        let resummed = |bytes: &mut [u8]| {
            bytes[CHECKSUM_AT..CHECKSUM_AT + 8].fill(0);
            let sum = xxh3_64_with_seed(bytes, 7);
            bytes[CHECKSUM_AT..CHECKSUM_AT + 8].copy_from_slice(&sum.to_le_bytes());
        };
        for (at, value, expected) in [(4, 1, FormatError::Absent), (4, 3, FormatError::Newer(3))] {
            let mut bytes = bytes.clone();
            bytes[at] = value;
            resummed(&mut bytes);
            assert_eq!(FrameHeader::decode(&bytes, 7, 8192), Err(expected));
        }
        for bad in [refer(3, 1, 0, 0), refer(3, 1, u64::MAX, 0), refer(3, 0, 1, 0), refer(3, 65_001, 1, 535)] {
            FrameHeader { records: vec![bad], ..header(0, 0) }.encode(&mut bytes);
            assert_eq!(FrameHeader::decode(&bytes, 7, 8192), Err(FormatError::Absent));
        }
        FrameHeader { records: vec![refer(3, 1, 1, 65_534)], ..header(0, 0) }.encode(&mut bytes);
        assert!(FrameHeader::decode(&bytes, 7, 8192).is_ok());
    }

    #[test]
    fn every_flipped_bit_of_a_frame_header_is_noticed() {
        let header = header(3, 3);
        let mut bytes = vec![0; BLOCK];
        header.encode(&mut bytes);
        for bit in 0..BLOCK * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(FrameHeader::decode(&bytes, 7, 8192).is_err(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    fn segment() -> SegmentHeader {
        SegmentHeader {
            segment: 4,
            volume: VolumeId([9; 16]),
            generation: 12,
            anchor: 11,
            epoch: 2,
            first_lsn: 1000,
            durable_lsn: 900,
            prev_end: 65536,
            segment_bytes: 1 << 20,
            chain: vec![ChainLink { generation: 3.into(), end: 4096.into() }; CHAIN_MAX],
        }
    }

    #[test]
    fn segment_header_round_trips_and_notices_damage() {
        let header = segment();
        let mut block = vec![0; BLOCK];
        header.encode(&mut block);
        assert_eq!(SegmentHeader::decode(&block).unwrap(), header);
        for bit in (0..BLOCK * 8).step_by(7) {
            block[bit / 8] ^= 1 << (bit % 8);
            assert!(SegmentHeader::decode(&block).is_err(), "bit {bit}");
            block[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_newer_version_is_named() {
        let mut block = vec![0; BLOCK];
        segment().encode(&mut block);
        block[8] = 2;
        block[88..96].fill(0);
        let sum = xxh3_64(&block);
        block[88..96].copy_from_slice(&sum.to_le_bytes());
        assert_eq!(SegmentHeader::decode(&block), Err(FormatError::Newer(2)));
    }

    #[test]
    fn numbers_that_cannot_be_are_refused() {
        let mut block = vec![0; BLOCK];
        for number in [0, u64::MAX] {
            SegmentHeader { first_lsn: number, ..segment() }.encode(&mut block);
            assert_eq!(SegmentHeader::decode(&block), Err(FormatError::Absent));
            SegmentHeader { generation: number, ..segment() }.encode(&mut block);
            assert_eq!(SegmentHeader::decode(&block), Err(FormatError::Absent));
            FrameHeader { first_lsn: number, ..header(2, 1) }.encode(&mut block);
            assert_eq!(FrameHeader::decode(&block, 7, 8192), Err(FormatError::Absent));
            let record = Record { lba: 0, blocks: number, kind: RecordKind::Data { at: 1 } };
            FrameHeader { records: vec![record], ..header(1, 1) }.encode(&mut block);
            assert_eq!(FrameHeader::decode(&block, 7, 8192), Err(FormatError::Absent));
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..9000), generation: u64, offset: u64) {
            let _ = SegmentHeader::decode(&bytes);
            let _ = FrameHeader::decode(&bytes, generation, offset);
        }
    }
}
