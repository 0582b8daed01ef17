//! The header of a journal: where its records begin. Two copies, of which the newer sound one counts.

use std::io;

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::blocks::{BODY_BYTES, BlockKind};
use crate::disk::{BLOCK_BYTES, BlockAddress, Disk};
use crate::layout::{Opened, RawBlock, open, seal, seal_newer};

/// Blocks at the beginning of a journal for its header.
pub const HEADER_BLOCKS: u64 = 2;

/// The body of a journal's header.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct JournalHeader {
    /// Grows each time the journal is begun anew.
    pub generation: U64,
    /// A secret number that the records of this generation are checksummed with.
    pub salt: U64,
    /// Where the oldest record that counts is, in blocks since the generation began.
    pub tail_position: U64,
    /// Its number.
    pub tail_sequence: U64,
    reserved: [u8; BODY_BYTES - 32],
}

const _: () = assert!(size_of::<JournalHeader>() == BODY_BYTES);

impl JournalHeader {
    /// With these.
    pub fn new(generation: u64, salt: u64, tail_position: u64, tail_sequence: u64) -> JournalHeader {
        JournalHeader {
            generation: U64::new(generation),
            salt: U64::new(salt),
            tail_position: U64::new(tail_position),
            tail_sequence: U64::new(tail_sequence),
            reserved: [0; BODY_BYTES - 32],
        }
    }

    /// The block of version `version` and where it goes: the copies take turns, so that a torn one leaves the other. With `contents`, records may hold
    /// contents of data blocks, and who does not know those must not read on: for him the block is of a newer format.
    pub fn seal(
        &self,
        filesystem: [u8; 8],
        start: BlockAddress,
        version: u64,
        contents: bool,
    ) -> (BlockAddress, Box<RawBlock>) {
        let at = start + version % HEADER_BLOCKS;
        let mut block = Box::new([0; BLOCK_BYTES]);
        let body = self.as_bytes().try_into().expect("asserted above");
        let seal = if contents { seal_newer } else { seal };
        seal(filesystem, at, BlockKind::Journal, version, body, &mut block[..]);
        (at, block)
    }
}

/// The header and its version; `None` if the journal was never begun.
///
/// # Errors
/// If the disk fails, or no copy is sound and not both are empty.
pub fn load(disk: &dyn Disk, filesystem: [u8; 8], start: BlockAddress) -> io::Result<Option<(JournalHeader, u64)>> {
    let mut newest: Option<(JournalHeader, u64)> = None;
    let mut damage = Vec::new();
    for at in start..start + HEADER_BLOCKS {
        let mut block = [0; BLOCK_BYTES];
        disk.read(at, &mut block)?;
        match open(Some(filesystem), at, BlockKind::Journal, &block) {
            Opened::Empty => {}
            Opened::Damaged(why) => damage.push(format!("block {at}: {why}")),
            Opened::Sound { version, body } => {
                if newest.as_ref().is_none_or(|(_, newest)| *newest < version) {
                    let header = JournalHeader::read_from_bytes(body).expect("a header has the size of a body");
                    newest = Some((header, version));
                }
            }
        }
    }
    // One copy may be torn: then the other counts, or, if that was never written, no record was either, since a flush comes between.
    if newest.is_none() && damage.len() == HEADER_BLOCKS as usize {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("no header of the journal is sound: {damage:?}"),
        ));
    }
    Ok(newest)
}
