//! From mapped blocks to frames: which frames a read needs and where their blocks go.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::sync::Arc;

use super::codec;
use super::frames::{FRAME_BYTES, Frame, FrameCipher};
use super::sealed::FrameKey;
use crate::cache;
use crate::crypt::Keys;
use crate::table::{ChunkDirectory, Mapped, Table, TableError, Target};
use crate::types::{BLOCK, Lba};

thread_local! {
    /// Where frames are decrypted that must be decoded after that.
    static CLEAR: RefCell<Vec<u8>> = RefCell::new(vec![0; FRAME_BYTES]);
}

/// Some consecutive blocks of a frame, and their place in the reader's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    from: usize,
    to: usize,
    blocks: usize,
}

/// A frame that a read needs.
#[derive(Clone, Debug)]
pub(super) struct Need {
    pub(super) directory: Arc<ChunkDirectory>,
    pub(super) number: u32,
    parts: Vec<Part>,
}

/// All that a read needs.
#[derive(Debug, Default)]
pub(super) struct Plan {
    /// In order of chunk and frame.
    pub(super) needs: Vec<Need>,
    /// Blocks without data: (first, number), relative to the read, in order, neighbours joined.
    pub(super) zeroes: Vec<(u64, u64)>,
}

impl Plan {
    /// The plan for a read from `lba` on that `mapped` describes.
    pub(super) fn new(table: &Table, lba: Lba, mapped: &[Mapped]) -> Result<Self, TableError> {
        let mut plan = Plan::default();
        let mut needs: BTreeMap<(u64, u32), Need> = BTreeMap::new();
        for run in mapped {
            let first = run.lba - lba;
            let Target::Chunk { seq, index } = run.target else {
                match plan.zeroes.last_mut() {
                    Some((start, blocks)) if *start + *blocks == first => *blocks += run.blocks,
                    _ => plan.zeroes.push((first, run.blocks)),
                }
                continue;
            };
            let directory = table.directory(seq)?;
            let mut done = 0;
            while done < run.blocks {
                let (number, within) = u16::try_from(u64::from(index) + done)
                    .ok()
                    .and_then(|index| directory.frames.locate(index))
                    .ok_or_else(|| {
                        TableError::Damaged(format!("block {} is mapped past the end of chunk {seq}", run.lba + done))
                    })?;
                let frame = &directory.frames.frames()[number as usize];
                let blocks = u64::from(frame.blocks - within).min(run.blocks - done);
                needs
                    .entry((seq, number))
                    .or_insert_with(|| Need { directory: directory.clone(), number, parts: Vec::with_capacity(1) })
                    .parts
                    .push(Part { from: within.into(), to: (first + done) as usize, blocks: blocks as usize });
                done += blocks;
            }
        }
        plan.needs = needs.into_values().collect();
        Ok(plan)
    }
}

impl Need {
    pub(super) fn key(&self) -> cache::FrameKey {
        cache::FrameKey { chunk: self.directory.name, frame: self.number }
    }

    pub(super) fn frame(&self) -> &Frame {
        &self.directory.frames.frames()[self.number as usize]
    }

    /// The first block of the read that stands in this frame, relative to the read.
    pub(super) fn first_block(&self) -> u64 {
        self.parts.first().map_or(0, |part| part.to as u64)
    }

    /// Checks `stored`, decrypts it with the volume's keys, decodes it, and copies its parts to where they belong in `out`. False when it is not the
    /// frame; `out` may then hold rubbish in the parts' places.
    pub(super) fn deliver(&self, stored: &[u8], keys: Option<&Keys>, out: &mut [u8]) -> bool {
        let frame = self.frame();
        if stored.len() != frame.stored_len as usize || self.directory.name.frame_sum(self.number, stored) != frame.sum
        {
            return false;
        }
        match keys {
            None => frame.cipher == FrameCipher::None && self.decode(stored, out),
            Some(keys) => frame.cipher != FrameCipher::None && self.decrypt(stored, keys, out),
        }
    }

    /// Decrypts and delivers a frame.
    fn decrypt(&self, stored: &[u8], keys: &Keys, out: &mut [u8]) -> bool {
        let frame = self.frame();
        let key = FrameKey::new(keys, &self.directory.name);
        let open = |clear: &mut [u8]| key.open(self.number, frame.blocks, frame.encoding, stored, clear);
        if let Some(whole) = self.whole(out)
            && frame.encoding == super::FrameEncoding::Raw
        {
            return open(whole);
        }
        CLEAR.with_borrow_mut(|clear| {
            let clear = &mut clear[..stored.len() - frame.cipher.overhead()];
            open(clear) && self.decode(clear, out)
        })
    }

    /// Where the frame belongs in `out`, if all of it does and in one piece.
    fn whole<'a>(&self, out: &'a mut [u8]) -> Option<&'a mut [u8]> {
        match self.parts[..] {
            [part] if part.from == 0 && part.blocks == usize::from(self.frame().blocks) => {
                Some(&mut out[part.to * BLOCK..(part.to + part.blocks) * BLOCK])
            }
            _ => None,
        }
    }

    /// Decodes and delivers a frame.
    fn decode(&self, stored: &[u8], out: &mut [u8]) -> bool {
        let frame = self.frame();
        if let Some(whole) = self.whole(out) {
            return codec::decompress(frame.encoding, stored, whole);
        }
        if frame.encoding == super::FrameEncoding::Raw {
            self.copy_parts(stored, out);
            return true;
        }
        let mut raw = [0; FRAME_BYTES];
        let raw = &mut raw[..frame.raw_len()];
        let good = codec::decompress(frame.encoding, stored, raw);
        if good {
            self.copy_parts(raw, out);
        }
        good
    }

    fn copy_parts(&self, raw: &[u8], out: &mut [u8]) {
        for part in &self.parts {
            let len = part.blocks * BLOCK;
            out[part.to * BLOCK..][..len].copy_from_slice(&raw[part.from * BLOCK..][..len]);
        }
    }
}
