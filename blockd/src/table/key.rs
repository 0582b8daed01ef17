//! Keys and values of the table, but for leaves. Pure; total on foreign bytes.
//!
//! The first byte of a key says what it is; numbers in keys are big-endian so that they sort.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Applied;
use super::space::{Dead, Usage};
use crate::chunk::{ChunkName, FormatError, FrameDirectory};
use crate::types::VolumeId;

/// A key made of a kind and a number.
pub type NumberKey = [u8; 9];

const LEAF: u8 = b'L';
const CHUNK: u8 = b'C';
const DEAD: u8 = b'D';
const USAGE: u8 = b'U';
const ZEROES: u8 = b'Z';
const BACK: u8 = b'B';
/// Key of the applied position.
pub const APPLIED: [u8; 1] = *b"A";
/// Key of the table's format and owner.
pub const FORMAT: [u8; 1] = *b"F";
/// Key of the newest relocated chunk.
pub const RELOCATED: [u8; 1] = *b"R";
/// Key of where the unknown relocated chunks of earlier owners begin.
pub const UNKNOWN: [u8; 1] = *b"S";
/// Key of where a clone's own history begins.
pub const ORIGIN: [u8; 1] = *b"O";
/// The version of tables without references.
pub const VERSION: u32 = 2;
/// The version of tables that have or had references; the newest one this code reads.
pub const REFER_VERSION: u32 = 3;
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
pub fn chunk(id: u64) -> NumberKey {
    number_key(CHUNK, id)
}

/// Key of how much of a chunk lives.
pub fn usage(id: u64) -> NumberKey {
    number_key(USAGE, id)
}

/// Key of a chunk that no block is mapped to any more.
pub fn dead(id: u64) -> NumberKey {
    number_key(DEAD, id)
}

/// Key of a span of zeroes that begins with this leaf.
pub fn zeroes(first_leaf: u64) -> NumberKey {
    number_key(ZEROES, first_leaf)
}

/// Key that says that a leaf refers to a chunk by the header of another one.
pub fn back(chunk: u64, leaf: u64) -> [u8; 17] {
    let mut key = [BACK; 17];
    key[1..9].copy_from_slice(&chunk.to_be_bytes());
    key[9..].copy_from_slice(&leaf.to_be_bytes());
    key
}

/// Chunk and leaf in a key made by [`back`].
pub fn back_place(key: &[u8]) -> Option<(u64, u64)> {
    let (chunk, leaf) = key.get(1..)?.split_first_chunk()?;
    Some((u64::from_be_bytes(*chunk), u64::from_be_bytes(leaf.try_into().ok()?)))
}

/// The number in a key made by one of the functions above, [`back`] apart.
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
    volume: [u8; 16],
    epoch: U64,
    payload_start: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct UsageValue {
    live: U32,
    total: U32,
    stored: U64,
    birth: U64,
    tombs: U32,
    /// 1: there are or were back rows.
    referred: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct DeadValue {
    birth: U64,
    death: U64,
    relocated: U64,
    stored: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Pair {
    a: U64,
    b: U64,
}

const _: () = assert!(size_of::<AppliedValue>() == 16);
const _: () = assert!(size_of::<FormatValue>() == 32);
const _: () = assert!(size_of::<ChunkValue>() == 32);
const _: () = assert!(size_of::<UsageValue>() == 32);
const _: () = assert!(size_of::<DeadValue>() == 32);
const _: () = assert!(size_of::<Pair>() == 16);

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
pub fn encode_format(volume: VolumeId, version: u32) -> Vec<u8> {
    let value = FormatValue { magic: MAGIC, version: version.into(), reserved: 0.into(), volume: volume.0 };
    value.as_bytes().to_vec()
}

/// Version and owner behind a value of [`FORMAT`]. The owner means something only in a known version.
pub fn decode_format(value: &[u8]) -> Option<(u32, VolumeId)> {
    let (value, _) = FormatValue::ref_from_prefix(value).ok()?;
    (value.magic == MAGIC).then(|| (value.version.get(), VolumeId(value.volume)))
}

/// Value of [`chunk`]: whose chunk it is, and its frame directory.
pub fn encode_chunk(name: &ChunkName, frames: &FrameDirectory) -> Vec<u8> {
    let value = ChunkValue {
        volume: name.volume.0,
        epoch: name.epoch.into(),
        payload_start: (frames.payload_start() as u32).into(),
        reserved: 0.into(),
    };
    let mut out = value.as_bytes().to_vec();
    frames.encode_rows(&mut out);
    out
}

/// Name and frame directory behind a value of [`chunk`] of `id`.
pub fn decode_chunk(id: u64, value: &[u8]) -> Result<(ChunkName, FrameDirectory), FormatError> {
    let (head, rows) = ChunkValue::ref_from_prefix(value)
        .map_err(|_| FormatError::Truncated { need: size_of::<ChunkValue>(), have: value.len() })?;
    let name = ChunkName { volume: VolumeId(head.volume), epoch: head.epoch.get(), seq: id };
    Ok((name, FrameDirectory::decode_rows(head.payload_start.get(), rows)?))
}

/// Value of [`usage`].
pub fn encode_usage(usage: &Usage) -> Vec<u8> {
    let value = UsageValue {
        live: usage.live.into(),
        total: usage.total.into(),
        stored: usage.stored.into(),
        birth: usage.birth.into(),
        tombs: usage.tombs.into(),
        referred: u32::from(usage.referred).into(),
    };
    value.as_bytes().to_vec()
}

/// What stands behind a value of [`usage`].
pub fn decode_usage(value: &[u8]) -> Option<Usage> {
    let value = UsageValue::ref_from_bytes(value).ok()?;
    let usage = Usage {
        live: value.live.get(),
        total: value.total.get(),
        stored: value.stored.get(),
        birth: value.birth.get(),
        tombs: value.tombs.get(),
        referred: value.referred.get() == 1,
    };
    (usage.referred || (usage.live <= usage.total && value.referred.get() == 0)).then_some(usage)
}

/// Value of [`dead`].
pub fn encode_dead(dead: &Dead) -> Vec<u8> {
    let value = DeadValue {
        birth: dead.birth.into(),
        death: dead.death.into(),
        relocated: dead.relocated.into(),
        stored: dead.stored.into(),
    };
    value.as_bytes().to_vec()
}

/// What stands behind a value of [`dead`].
pub fn decode_dead(value: &[u8]) -> Option<Dead> {
    let value = DeadValue::ref_from_bytes(value).ok()?;
    let dead = Dead {
        birth: value.birth.get(),
        death: value.death.get(),
        relocated: value.relocated.get(),
        stored: value.stored.get(),
    };
    (dead.birth < dead.death).then_some(dead)
}

/// Two numbers: the value of [`RELOCATED`] (newest number given to a relocated chunk; epoch up to which those that no
/// table knows were deleted) and of [`ORIGIN`] (last seq and last relocated chunk of the origin).
pub fn encode_pair(a: u64, b: u64) -> Vec<u8> {
    Pair { a: a.into(), b: b.into() }.as_bytes().to_vec()
}

/// What [`encode_pair`] encoded.
pub fn decode_pair(value: &[u8]) -> Option<(u64, u64)> {
    let value = Pair::ref_from_bytes(value).ok()?;
    Some((value.a.get(), value.b.get()))
}

/// Value of [`UNKNOWN`]: epochs, each with the first number unknown.
pub fn encode_pairs(pairs: &[(u64, u64)]) -> Vec<u8> {
    pairs.iter().flat_map(|(a, b)| encode_pair(*a, *b)).collect()
}

/// What [`encode_pairs`] encoded.
pub fn decode_pairs(value: &[u8]) -> Option<Vec<(u64, u64)>> {
    value.chunks(size_of::<Pair>()).map(decode_pair).collect()
}

/// Value of [`zeroes`]: one past the span's last leaf.
pub fn encode_zeroes(end_leaf: u64) -> Vec<u8> {
    end_leaf.to_le_bytes().to_vec()
}

/// The end behind a value of [`zeroes`].
pub fn decode_zeroes(value: &[u8]) -> Option<u64> {
    Some(u64::from_le_bytes(value.try_into().ok()?))
}
