//! Keys and values of the table, but for leaves. Pure; total on foreign bytes.
//!
//! The first byte of a key says what it is; numbers in keys are big-endian so that they sort.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Applied;
use crate::chunk::{FormatError, FrameDirectory};
use crate::types::VolumeId;

/// A key made of a kind and a number.
pub type NumberKey = [u8; 9];

const LEAF: u8 = b'L';
const CHUNK: u8 = b'C';
const ZEROES: u8 = b'Z';
/// Key of the applied position.
pub const APPLIED: [u8; 1] = *b"A";
/// Key of the table's format and owner.
pub const FORMAT: [u8; 1] = *b"F";
/// The version this code writes and reads.
pub const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"BLKDTABL";

fn number_key(kind: u8, number: u64) -> NumberKey {
    let mut key = [kind; 9];
    key[1..].copy_from_slice(&number.to_be_bytes());
    key
}

/// Key of a leaf. `number` may be one past the last, as the end of a range.
pub fn leaf(number: u64) -> NumberKey {
    number_key(LEAF, number)
}

/// Key of a chunk's frame directory.
pub fn chunk(seq: u64) -> NumberKey {
    number_key(CHUNK, seq)
}

/// Key of a span of zeroes that begins with this leaf.
pub fn zeroes(first_leaf: u64) -> NumberKey {
    number_key(ZEROES, first_leaf)
}

/// The number in a key made by one of the functions above.
pub fn number(key: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(key.get(1..)?.try_into().ok()?))
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct AppliedValue {
    seq: U64,
    lsn: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct FormatValue {
    magic: [u8; 8],
    version: U32,
    reserved: U32,
    volume: [u8; 16],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ChunkValue {
    epoch: U64,
    payload_start: U32,
    reserved: U32,
}

const _: () = assert!(size_of::<AppliedValue>() == 16);
const _: () = assert!(size_of::<FormatValue>() == 32);
const _: () = assert!(size_of::<ChunkValue>() == 16);

/// Value of [`APPLIED`].
pub fn encode_applied(applied: Applied) -> Vec<u8> {
    let value = AppliedValue { seq: applied.seq.into(), lsn: applied.lsn.into() };
    value.as_bytes().to_vec()
}

/// The position behind a value of [`APPLIED`].
pub fn decode_applied(value: &[u8]) -> Option<Applied> {
    let value = AppliedValue::ref_from_bytes(value).ok()?;
    Some(Applied { seq: value.seq.get(), lsn: value.lsn.get() })
}

/// Value of [`FORMAT`].
pub fn encode_format(volume: VolumeId) -> Vec<u8> {
    let value = FormatValue { magic: MAGIC, version: VERSION.into(), reserved: 0.into(), volume: volume.0 };
    value.as_bytes().to_vec()
}

/// Version and owner behind a value of [`FORMAT`]. The owner means something only in a known version.
pub fn decode_format(value: &[u8]) -> Option<(u32, VolumeId)> {
    let (value, _) = FormatValue::ref_from_prefix(value).ok()?;
    (value.magic == MAGIC).then(|| (value.version.get(), VolumeId(value.volume)))
}

/// Value of [`chunk`]: the chunk's epoch and its frame directory.
pub fn encode_chunk(epoch: u64, frames: &FrameDirectory) -> Vec<u8> {
    let value =
        ChunkValue { epoch: epoch.into(), payload_start: (frames.payload_start() as u32).into(), reserved: 0.into() };
    let mut out = value.as_bytes().to_vec();
    frames.encode_rows(&mut out);
    out
}

/// Epoch and frame directory behind a value of [`chunk`].
pub fn decode_chunk(value: &[u8]) -> Result<(u64, FrameDirectory), FormatError> {
    let (head, rows) = ChunkValue::ref_from_prefix(value)
        .map_err(|_| FormatError::Truncated { need: size_of::<ChunkValue>(), have: value.len() })?;
    Ok((head.epoch.get(), FrameDirectory::decode_rows(head.payload_start.get(), rows)?))
}

/// Value of [`zeroes`]: one past the span's last leaf.
pub fn encode_zeroes(end_leaf: u64) -> Vec<u8> {
    end_leaf.to_le_bytes().to_vec()
}

/// The end behind a value of [`zeroes`].
pub fn decode_zeroes(value: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(value.try_into().ok()?))
}
