//! A record of the journal: what one transaction changed, in whole blocks of the disk.
//!
//! The checksum is salted with the generation's secret number, and covers the record's number and place: neither what a former round
//! of the journal left nor what a user wrote into a file ever parses.

use std::sync::Arc;

use xxhash_rust::xxh3::Xxh3;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::Image;
use crate::blocks::{BODY_BYTES, BlockKind, Body};
use crate::disk::{BLOCK_BYTES, BlockAddress};

const MAGIC: [u8; 4] = *b"fsJR";
/// Of records without contents of data blocks, which programs understand that know no others.
const FORMAT: u32 = 1;
/// Of those with some.
const FORMAT_CONTENTS: u32 = 2;

/// The first bytes of a record.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct RecordHeader {
    magic: [u8; 4],
    format: U32,
    generation: U64,
    /// Numbers the transactions of the journal.
    pub sequence: U64,
    position: U64,
    /// Bytes behind the header; zeros follow up to the end of the block.
    payload_len: U64,
    items: U32,
    reserved: U32,
    /// XXH3-64 of header and payload, seeded with the salt, with zeros here.
    checksum: U64,
    reserved2: U64,
}

const _: () = assert!(size_of::<RecordHeader>() == 64);

const TAG_FULL: u8 = 1;
const TAG_CHANGED: u8 = 2;
const TAG_FREED: u8 = 3;
const TAG_CONTENTS: u8 = 4;

/// What each item of a record begins with. Of a full image `length` bytes follow, the rest of the body is zeros; of a changed block
/// `length` ranges; of freed blocks nothing, and `version` is their number; of a data block `length` bytes, the rest of it is zeros.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct ItemHeader {
    tag: u8,
    kind: u8,
    length: U16,
    reserved: U32,
    address: U64,
    version: U64,
    /// Of a changed block: the version that the ranges differ from.
    base: U64,
}

const _: () = assert!(size_of::<ItemHeader>() == 32);

/// Bytes of a block that changed; `length` bytes follow.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RangeHeader {
    offset: U16,
    length: U16,
}

/// Equal bytes between two ranges that do not part them.
const GAP_BYTES: usize = 16;

/// Writes a record.
pub struct Writer {
    bytes: Vec<u8>,
    items: u32,
    format: u32,
}

impl Writer {
    /// An empty record.
    pub fn new() -> Writer {
        Writer { bytes: vec![0; size_of::<RecordHeader>()], items: 0, format: FORMAT }
    }

    fn item(&mut self, tag: u8, kind: u8, length: usize, address: u64, version: u64, base: u64) {
        self.items += 1;
        let header = ItemHeader {
            tag,
            kind,
            length: U16::new(length as u16),
            reserved: U32::ZERO,
            address: U64::new(address),
            version: U64::new(version),
            base: U64::new(base),
        };
        self.bytes.extend_from_slice(header.as_bytes());
    }

    /// Adds a full image.
    pub fn full(&mut self, at: BlockAddress, image: &Image) {
        let length = length_without_zeros(&image.body[..]);
        self.item(TAG_FULL, image.kind as u8, length, at, image.version, 0);
        self.bytes.extend_from_slice(&image.body[..length]);
    }

    /// Adds what differs from `base`, or a full image where that is not much more; returns whether it was that.
    pub fn changed(&mut self, at: BlockAddress, image: &Image, base: &Image) -> bool {
        let ranges = differences(&base.body, &image.body);
        let bytes: usize = ranges.iter().map(|(_, length)| length + 4).sum();
        if bytes > BODY_BYTES / 2 {
            self.full(at, image);
            return true;
        }
        self.item(TAG_CHANGED, image.kind as u8, ranges.len(), at, image.version, base.version);
        for (offset, length) in ranges {
            let header = RangeHeader { offset: U16::new(offset as u16), length: U16::new(length as u16) };
            self.bytes.extend_from_slice(header.as_bytes());
            self.bytes.extend_from_slice(&image.body[offset..offset + length]);
        }
        false
    }

    /// Adds freed blocks.
    pub fn freed(&mut self, at: BlockAddress, count: u64) {
        self.item(TAG_FREED, 0, 0, at, count, 0);
    }

    /// Adds what a data block holds.
    pub fn contents(&mut self, at: BlockAddress, page: &[u8; BLOCK_BYTES]) {
        self.format = FORMAT_CONTENTS;
        let length = length_without_zeros(page);
        self.item(TAG_CONTENTS, 0, length, at, 0, 0);
        self.bytes.extend_from_slice(&page[..length]);
    }

    /// The record in whole blocks.
    pub fn finish(mut self, salt: u64, generation: u64, sequence: u64, position: u64) -> Vec<u8> {
        let header = RecordHeader {
            magic: MAGIC,
            format: U32::new(self.format),
            generation: U64::new(generation),
            sequence: U64::new(sequence),
            position: U64::new(position),
            payload_len: U64::new((self.bytes.len() - size_of::<RecordHeader>()) as u64),
            items: U32::new(self.items),
            reserved: U32::ZERO,
            checksum: U64::ZERO,
            reserved2: U64::ZERO,
        };
        self.bytes[..size_of::<RecordHeader>()].copy_from_slice(header.as_bytes());
        let sum = checksum(salt, &self.bytes);
        let at = std::mem::offset_of!(RecordHeader, checksum);
        self.bytes[at..at + 8].copy_from_slice(&sum.to_le_bytes());
        self.bytes.resize(self.bytes.len().next_multiple_of(BLOCK_BYTES), 0);
        self.bytes
    }
}

fn length_without_zeros(bytes: &[u8]) -> usize {
    bytes.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1)
}

/// The ranges in which two bodies differ: offset and length.
fn differences(old: &Body, new: &Body) -> Vec<(usize, usize)> {
    let mut ranges: Vec<(usize, usize)> = Vec::new();
    for (index, (a, b)) in old.chunks_exact(8).zip(new.chunks_exact(8)).enumerate() {
        if a != b {
            let offset = index * 8;
            match ranges.last_mut() {
                Some((start, length)) if offset - (*start + *length) < GAP_BYTES => *length = offset + 8 - *start,
                _ => ranges.push((offset, 8)),
            }
        }
    }
    ranges
}

const _: () = assert!(BODY_BYTES.is_multiple_of(8));

fn checksum(salt: u64, record: &[u8]) -> u64 {
    let at = std::mem::offset_of!(RecordHeader, checksum);
    let mut hash = Xxh3::with_seed(salt);
    hash.update(&record[..at]);
    hash.update(&[0; 8]);
    hash.update(&record[at + 8..]);
    hash.digest()
}

/// How many bytes the record is long whose first block this is, if it looks like the record of this place.
pub fn length(first: &[u8], generation: u64, position: u64) -> Option<(u64, usize)> {
    let (header, _) = RecordHeader::ref_from_prefix(first).ok()?;
    let fits = header.magic == MAGIC
        && [FORMAT, FORMAT_CONTENTS].contains(&header.format.get())
        && header.generation.get() == generation
        && header.position.get() == position;
    let bytes = usize::try_from(header.payload_len.get()).ok()?.checked_add(size_of::<RecordHeader>())?;
    fits.then_some((header.sequence.get(), bytes))
}

/// What a record holds of one block or range.
#[derive(Debug)]
pub enum Item {
    /// A full image.
    Full(BlockAddress, Image),
    /// Ranges that differ from the version `base`.
    Changed { at: BlockAddress, kind: BlockKind, version: u64, base: u64, ranges: Vec<(usize, Vec<u8>)> },
    /// Freed blocks.
    Freed(BlockAddress, u64),
    /// A data block.
    Contents(BlockAddress, Box<[u8; BLOCK_BYTES]>),
}

/// The items of a record of which all bytes are given; `None` if it is not sound.
pub fn parse(record: &[u8], salt: u64) -> Option<Vec<Item>> {
    let (header, mut rest) = RecordHeader::ref_from_prefix(record).ok()?;
    if header.checksum.get() != checksum(salt, record) {
        return None;
    }
    let mut items = Vec::new();
    for _ in 0..header.items.get() {
        let (item, after) = ItemHeader::ref_from_prefix(rest).ok()?;
        rest = after;
        let at = item.address.get();
        match item.tag {
            TAG_FULL => {
                let bytes = rest.split_off(..usize::from(item.length.get()))?;
                let mut body = [0; BODY_BYTES];
                body.get_mut(..bytes.len())?.copy_from_slice(bytes);
                let kind = BlockKind::from_code(item.kind)?;
                items.push(Item::Full(at, Image { kind, version: item.version.get(), body: Arc::new(body) }));
            }
            TAG_CHANGED => {
                let mut ranges = Vec::new();
                for _ in 0..item.length.get() {
                    let (range, after) = RangeHeader::ref_from_prefix(rest).ok()?;
                    rest = after;
                    let bytes = rest.split_off(..usize::from(range.length.get()))?;
                    let offset = usize::from(range.offset.get());
                    if offset + bytes.len() > BODY_BYTES {
                        return None;
                    }
                    ranges.push((offset, bytes.to_vec()));
                }
                let kind = BlockKind::from_code(item.kind)?;
                items.push(Item::Changed { at, kind, version: item.version.get(), base: item.base.get(), ranges });
            }
            TAG_FREED => items.push(Item::Freed(at, item.version.get())),
            TAG_CONTENTS if header.format.get() == FORMAT_CONTENTS => {
                let bytes = rest.split_off(..usize::from(item.length.get()))?;
                let mut block = Box::new([0; BLOCK_BYTES]);
                block.get_mut(..bytes.len())?.copy_from_slice(bytes);
                items.push(Item::Contents(at, block));
            }
            _ => return None,
        }
    }
    Some(items)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_and_damage_is_seen() {
        let mut old = [0u8; BODY_BYTES];
        old[..100].fill(1);
        let base = Image { kind: BlockKind::Inode, version: 3, body: Arc::new(old) };
        let mut new = old;
        new[40..44].fill(9);
        new[3000] = 5;
        let image = Image { kind: BlockKind::Inode, version: 4, body: Arc::new(new) };
        let mut writer = Writer::new();
        writer.full(10, &base);
        writer.changed(10, &image, &base);
        writer.freed(77, 1 << 40);
        let bytes = writer.finish(5, 1, 8, 300);
        assert_eq!(bytes.len(), BLOCK_BYTES);
        let (sequence, len) = length(&bytes, 1, 300).expect("its place");
        assert_eq!(sequence, 8);
        assert!(length(&bytes, 2, 300).is_none() && length(&bytes, 1, 301).is_none());
        let items = parse(&bytes[..len], 5).expect("sound");
        assert!(matches!(&items[0], Item::Full(10, image) if image.body[..] == old[..]));
        let Item::Changed { at: 10, version: 4, base: 3, ranges, .. } = &items[1] else { panic!("{:?}", items[1]) };
        let mut rebuilt = old;
        for (offset, bytes) in ranges {
            rebuilt[*offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        assert_eq!(rebuilt, new);
        assert!(matches!(items[2], Item::Freed(77, count) if count == 1 << 40));
        assert!(parse(&bytes[..len], 6).is_none());
        for at in [0, 30, 70, len - 1] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 4;
            assert!(parse(&damaged[..len], 5).is_none());
        }
    }

    #[test]
    fn a_record_stays_as_it_is() {
        let writer = with_metadata();
        kept("record-v1.bin", &writer.finish(SALT, 2, 17, 99), 3);
    }

    #[test]
    fn a_record_with_contents_stays_as_it_is() {
        let mut writer = with_metadata();
        let mut block = [7; BLOCK_BYTES];
        writer.contents(6000, &block);
        block[100..].fill(0);
        writer.contents(6001, &block);
        writer.contents(6002, &[0; BLOCK_BYTES]);
        let record = writer.finish(SALT, 2, 17, 99);
        let items = kept("record-v2.bin", &record, 6);
        let Item::Contents(6001, found) = &items[4] else { panic!("{:?}", items[4]) };
        assert_eq!(**found, block);
        // An item that records of format 1 don't have.
        let mut older = record.clone();
        older[4] = 1;
        let (_, len) = length(&older, 2, 99).expect("its place");
        let sum = checksum(SALT, &older[..len]);
        older[48..56].copy_from_slice(&sum.to_le_bytes());
        assert!(parse(&older[..len], SALT).is_none());
        older[4] = 3;
        assert!(length(&older, 2, 99).is_none());
    }

    const SALT: u64 = 0x1234_5678_9abc_def0;

    fn with_metadata() -> Writer {
        let image = Image { kind: BlockKind::Inode, version: 3, body: Arc::new([5; BODY_BYTES]) };
        let mut body = [5; BODY_BYTES];
        body[800..820].fill(9);
        let changed = Image { kind: BlockKind::Inode, version: 4, body: Arc::new(body) };
        let mut writer = Writer::new();
        writer.full(1000, &image);
        writer.changed(1000, &changed, &image);
        writer.freed(5000, 64);
        writer
    }

    /// The record is the kept one, which is sound.
    fn kept(name: &str, record: &[u8], count: usize) -> Vec<Item> {
        let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
        if !path.exists() && std::env::var_os("FS_WRITE_GOLDEN").is_some() {
            std::fs::write(&path, record).expect("the golden file can be written");
        }
        let golden = std::fs::read(&path).expect("the golden file is there");
        assert!(golden == record, "a record is not written as it was");
        let (sequence, len) = length(&golden, 2, 99).expect("its place");
        let items = parse(&golden[..len], SALT).expect("it is sound");
        assert_eq!((sequence, items.len()), (17, count));
        items
    }
}
