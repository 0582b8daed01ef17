//! Bringing home what the journal holds, after a crash or at each opening.
//!
//! Replay may be cut short at any point and done again: a block is written home only if its version there is older, or it is torn. Contents of
//! data blocks are always written, those of the last record that has some.
//! Only after everything is home and flushed is the journal begun anew, with a new generation and a new secret number.

use std::collections::BTreeMap;
use std::sync::Arc;

use rand::Rng;

use super::Image;
use super::header::{self, HEADER_BLOCKS, JournalHeader};
use super::record::{self, Item};
use crate::blocks::{BlockKind, Body};
use crate::disk::{BLOCK_BYTES, BlockAddress, Disk};
use crate::layout::{Geometry, Opened, open, seal};
use crate::vfs::{Result, VfsError};

/// What replay found, and how the journal goes on.
#[derive(Clone, Debug)]
pub struct Replayed {
    /// Records that were found.
    pub records: u64,
    /// Blocks written home.
    pub blocks: u64,
    /// The number of the next transaction.
    pub next_sequence: u64,
    pub(super) salt: u64,
    pub(super) generation: u64,
    pub(super) header_version: u64,
}

impl Replayed {
    /// For a filesystem that is only read.
    pub fn none() -> Replayed {
        Replayed { records: 0, blocks: 0, next_sequence: 1, salt: 0, generation: 0, header_version: 0 }
    }
}

/// What becomes of a block.
enum Outcome {
    Image(Image),
    /// Home is newer than the differences seen so far.
    Newer,
    /// Of a data block.
    Contents(Box<[u8; BLOCK_BYTES]>),
    /// Home is torn or older: a full image must follow.
    Open(String),
}

struct Reader<'a> {
    disk: &'a dyn Disk,
    start: BlockAddress,
    len: u64,
    salt: u64,
    generation: u64,
}

impl Reader<'_> {
    fn blocks(&self, position: u64, count: u64) -> std::io::Result<Vec<u8>> {
        let mut bytes = vec![0; count as usize * BLOCK_BYTES];
        let at = position % self.len;
        let first = count.min(self.len - at);
        let (a, b) = bytes.split_at_mut(first as usize * BLOCK_BYTES);
        self.disk.read(self.start + at, a)?;
        if !b.is_empty() {
            self.disk.read(self.start, b)?;
        }
        Ok(bytes)
    }

    /// The record at a position: its number, its blocks and what it holds.
    fn record(&self, position: u64, first: &[u8], left: u64) -> std::io::Result<Option<(u64, u64, Vec<Item>)>> {
        let Some((sequence, bytes)) = record::length(first, self.generation, position) else { return Ok(None) };
        let blocks = bytes.div_ceil(BLOCK_BYTES) as u64;
        if blocks > left {
            return Ok(None);
        }
        let record = self.blocks(position, blocks)?;
        Ok(record::parse(&record[..bytes], self.salt).map(|items| (sequence, blocks, items)))
    }

    /// A sound record with a greater number behind `position`: then the one at `position` was durable once.
    fn later(&self, position: u64, tail: u64, sequence: u64) -> std::io::Result<Option<u64>> {
        const STEP: u64 = 256;
        let end = tail + self.len;
        let mut at = position;
        while at < end {
            let count = STEP.min(end - at);
            let bytes = self.blocks(at, count)?;
            for (index, block) in bytes.chunks_exact(BLOCK_BYTES).enumerate() {
                let at = at + index as u64;
                if let Some((found, ..)) = self.record(at, block, end - at)?
                    && found > sequence
                {
                    return Ok(Some(found));
                }
            }
            at += count;
        }
        Ok(None)
    }
}

/// Whether the journal of a host slot holds nothing that would have to be replayed.
///
/// # Errors
/// [`VfsError::Io`] if the disk fails.
pub fn is_settled(disk: &dyn Disk, geometry: &Geometry, slot: u64) -> Result<bool> {
    let failed = |e: std::io::Error| VfsError::Io(format!("the journal of host slot {slot} can't be read: {e}"));
    let start = geometry.journal(slot);
    let Some((header, _)) = header::load(disk, geometry.fragment(), start).map_err(failed)? else { return Ok(true) };
    let reader = Reader {
        disk,
        start: start + HEADER_BLOCKS,
        len: geometry.journal_blocks - HEADER_BLOCKS,
        salt: header.salt.get(),
        generation: header.generation.get(),
    };
    let tail = header.tail_position.get();
    let first = reader.blocks(tail, 1).map_err(failed)?;
    let found = reader.record(tail, &first, reader.len).map_err(failed)?;
    Ok(found.is_none_or(|(sequence, ..)| sequence != header.tail_sequence.get()))
}

/// Replays the journal of a host slot and begins it anew.
///
/// # Errors
/// [`VfsError::Io`] if the disk fails, a record is damaged that a later one proves to have been durable, or a block can't be put together.
pub fn replay(disk: &dyn Disk, geometry: &Geometry, slot: u64) -> Result<Replayed> {
    let failed = |e: std::io::Error| VfsError::Io(format!("the journal of host slot {slot} can't be replayed: {e}"));
    let fragment = geometry.fragment();
    let start = geometry.journal(slot);
    let header = header::load(disk, fragment, start).map_err(failed)?;
    let mut replayed = Replayed {
        records: 0,
        blocks: 0,
        next_sequence: 1,
        salt: rand::rng().random(),
        generation: 1,
        header_version: 0,
    };
    if let Some((header, version)) = header {
        let reader = Reader {
            disk,
            start: start + HEADER_BLOCKS,
            len: geometry.journal_blocks - HEADER_BLOCKS,
            salt: header.salt.get(),
            generation: header.generation.get(),
        };
        let (mut outcomes, mut freed) = (BTreeMap::new(), Vec::new());
        let tail = header.tail_position.get();
        let (mut position, mut sequence) = (tail, header.tail_sequence.get());
        while position < tail + reader.len {
            let first = reader.blocks(position, 1).map_err(failed)?;
            let found = reader.record(position, &first, tail + reader.len - position).map_err(failed)?;
            let Some((_, blocks, items)) = found.filter(|(found, ..)| *found == sequence) else {
                // The last record may be torn. But if a later one is there, this one was flushed.
                if let Some(later) = reader.later(position, tail, sequence).map_err(failed)? {
                    return Err(VfsError::Io(format!(
                        "record {sequence} of the journal of host slot {slot}, at block {}, is damaged, though record {later} \
                         behind it is sound: the disk lost or changed what it had flushed",
                        reader.start + position % reader.len
                    )));
                }
                break;
            };
            for item in items {
                apply(disk, fragment, item, &mut outcomes, &mut freed).map_err(failed)?;
            }
            position += blocks;
            sequence += 1;
            replayed.records += 1;
        }
        for (at, outcome) in &outcomes {
            match outcome {
                Outcome::Newer => {}
                // Nothing newer was written there: see `contents`.
                Outcome::Contents(block) => {
                    disk.write(*at, &block[..]).map_err(failed)?;
                    replayed.blocks += 1;
                }
                Outcome::Image(image) => {
                    if home_version(disk, fragment, *at, image.kind).map_err(failed)? < Some(image.version) {
                        let mut block = [0; BLOCK_BYTES];
                        seal(fragment, *at, image.kind, image.version, &image.body, &mut block);
                        disk.write(*at, &block).map_err(failed)?;
                        replayed.blocks += 1;
                    }
                }
                Outcome::Open(why) => {
                    return Err(VfsError::Io(format!("block {at} can't be put together from the journal: {why}")));
                }
            }
        }
        for (at, count) in freed {
            disk.discard(at, count).map_err(failed)?;
        }
        disk.flush().map_err(failed)?;
        replayed.next_sequence = sequence;
        replayed.generation = header.generation.get() + 1;
        replayed.header_version = version;
    }
    // The old records don't count any more from here on.
    replayed.header_version += 1;
    let header = JournalHeader::new(replayed.generation, replayed.salt, 0, replayed.next_sequence);
    let (at, block) = header.seal(fragment, start, replayed.header_version, false);
    disk.write(at, &block[..]).map_err(failed)?;
    disk.flush().map_err(failed)?;
    Ok(replayed)
}

/// The version of a block at its home; `None` if it is torn.
fn home_version(disk: &dyn Disk, fragment: [u8; 8], at: BlockAddress, kind: BlockKind) -> std::io::Result<Option<u64>> {
    Ok(match home(disk, fragment, at, kind)? {
        Ok(Some(image)) => Some(image.version),
        Ok(None) => Some(0),
        Err(_) => None,
    })
}

type Home = std::result::Result<Option<Image>, String>;

fn home(disk: &dyn Disk, fragment: [u8; 8], at: BlockAddress, kind: BlockKind) -> std::io::Result<Home> {
    let mut block = [0; BLOCK_BYTES];
    disk.read(at, &mut block)?;
    Ok(match open(Some(fragment), at, kind, &block) {
        Opened::Empty => Ok(None),
        Opened::Sound { version, body } => Ok(Some(Image { kind, version, body: Arc::new(*body) })),
        Opened::Damaged(why) => Err(why),
    })
}

fn apply(
    disk: &dyn Disk,
    fragment: [u8; 8],
    item: Item,
    outcomes: &mut BTreeMap<BlockAddress, Outcome>,
    freed: &mut Vec<(BlockAddress, u64)>,
) -> std::io::Result<()> {
    match item {
        Item::Full(at, image) => {
            outcomes.insert(at, Outcome::Image(image));
        }
        Item::Freed(at, count) => {
            let gone: Vec<_> = outcomes.range(at..at.saturating_add(count)).map(|(at, _)| *at).collect();
            for at in gone {
                outcomes.remove(&at);
            }
            freed.push((at, count));
        }
        Item::Contents(at, block) => {
            outcomes.insert(at, Outcome::Contents(block));
        }
        Item::Changed { at, kind, version, base, ranges } => {
            let before = match outcomes.remove(&at) {
                Some(Outcome::Image(image)) => Ok(Some(image)),
                // Home was newer than differences seen before; is it still?
                Some(Outcome::Newer) | None => home(disk, fragment, at, kind)?,
                Some(Outcome::Open(why)) => Err(why),
                Some(Outcome::Contents(_)) => Err("it is a block of data".into()),
            };
            let outcome = match before {
                Ok(Some(image)) if image.version >= version => Outcome::Newer,
                Ok(Some(mut image)) if image.version == base => {
                    let body: &mut Body = Arc::make_mut(&mut image.body);
                    for (offset, bytes) in ranges {
                        body[offset..offset + bytes.len()].copy_from_slice(&bytes);
                    }
                    image.version = version;
                    Outcome::Image(image)
                }
                Ok(found) => {
                    let found = found.map_or(0, |image| image.version);
                    Outcome::Open(format!("it has version {found}, and differences are from {base} to {version}"))
                }
                Err(why) => Outcome::Open(why),
            };
            outcomes.insert(at, outcome);
        }
    }
    Ok(())
}
