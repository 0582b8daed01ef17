//! Copies within the volume that move no data: several addresses refer to one block of a chunk.
//!
//! A copy is a write whose content is found when it is appended. What is dirty is appended again: bytes from memory or the log, zeroes,
//! and references as further references. What is clean is looked up by a job, which also pins the chunks it finds in the
//! table; when it ends, what nothing newer was accepted for since becomes a record that names chunk and index.
//!
//! A pin lasts until the table knows the reference and the dirty map does not. Up to then the chunk is neither moved nor deleted.
//! That is enough: chunks are applied in the order of LSNs, so where a reference is applied, its source is still
//! mapped to the same place.
//!
//! What may not be referred to is read and written: blocks that compaction moved, because a table that somebody else goes
//! on from need not know where they are now.

use std::collections::VecDeque;

use tokio::sync::oneshot;

use super::api::{Allocation, Completion, IoError, Token};
use super::dirty::Source;
use super::engine::{State, Volume};
use super::job::{Backend, Done, FETCH_PAUSE, FetchError, From};
use super::write::Append;
use crate::buf::{AlignedBuf, Slice};
use crate::chunk::ReadError;
use crate::table::{Pin, Table, TableError, Target};
use crate::types::{BLOCK, BLOCK_SIZE, Lba, Lsn};
use crate::wal::writer::Payload;

/// Blocks looked up at once.
const WINDOW: u64 = 16_384;
/// Blocks read at once where nothing can be referred to.
const READ_MAX: u64 = 1024;

/// Where the outcome of a copy goes.
pub type CopyReply = oneshot::Sender<Result<(), IoError>>;

/// A copy, as far as it is not appended yet.
pub(super) struct Copying {
    pub ticket: u64,
    from: Lba,
    to: Lba,
    blocks: u64,
    /// What stands at the source, as far as it was looked up, in order; and the accepted LSN when that was begun.
    found: VecDeque<Resolved>,
    since: Lsn,
    /// Of the last record appended.
    lsn: Lsn,
}

/// What stands at some blocks.
#[derive(Debug)]
pub(super) struct Resolved {
    lba: Lba,
    blocks: u64,
    content: Content,
}

#[derive(Clone, Debug)]
enum Content {
    /// Payload blocks of the pinned chunk, from this index on.
    Place(Pin, u16),
    Bytes(Slice),
    Zero {
        allocated: bool,
    },
}

impl Content {
    /// That of the `blocks` blocks from the one `by` further on.
    fn part(&self, by: u64, blocks: u64) -> Content {
        match self {
            Content::Place(pin, index) => Content::Place(pin.clone(), index + by as u16),
            Content::Bytes(bytes) => Content::Bytes(bytes.slice(by as usize * BLOCK..(by + blocks) as usize * BLOCK)),
            zero => zero.clone(),
        }
    }
}

/// Blocks to be looked up, or read back from the log.
pub(super) struct Ask {
    lba: Lba,
    blocks: u64,
    from: From,
}

/// A copy that waits for a job.
pub(super) struct PendingCopy {
    copy: Box<Copying>,
    /// Frames kept in the log for it.
    frames: Vec<u64>,
}

impl Copying {
    /// What was found to stand at the next blocks, as many as `most`.
    fn next_found(&mut self, most: u64) -> Option<(u64, Content)> {
        while self.found.front().is_some_and(|found| found.lba + found.blocks <= self.from) {
            self.found.pop_front();
        }
        let found = self.found.front().filter(|found| found.lba <= self.from)?;
        let by = self.from - found.lba;
        let blocks = most.min(found.blocks - by);
        Some((blocks, found.content.part(by, blocks)))
    }

    fn done(&mut self, blocks: u64, lsn: Lsn) {
        self.from += blocks;
        self.to += blocks;
        self.blocks -= blocks;
        self.lsn = lsn;
    }
}

/// What came of a part of a copy.
enum Step {
    /// It was appended, so many blocks.
    Done(u64),
    /// There is no room for it in the log now.
    Full,
    /// What stands there has to be found first.
    Unknown,
}

impl Volume {
    /// Makes `len` bytes from `to` on what the bytes from `from` on are, without reading or storing them again where that is
    /// possible. Whole blocks; the two ranges do not overlap. It is answered like a write, and a crash leaves a part of it
    /// as it may of a long write. What is written to the source meanwhile may be in the copy or not, block by block.
    pub fn copy(&mut self, token: Token, from: u64, to: u64, len: u64, fua: bool) {
        if self.gate.is_shut() {
            return self.gate.hold_copy(token, (from, to), len, fua);
        }
        if !self.in_range(from, len) {
            return self.complete(token, Err(IoError::OutOfRange));
        }
        if self.refuse(token, to, len) {
            return;
        }
        if [from, to, len].iter().any(|bytes| !bytes.is_multiple_of(BLOCK_SIZE)) {
            return self.complete(token, Err(IoError::Invalid("a copy is of whole blocks")));
        }
        if from < to + len && to < from + len {
            return self.complete(token, Err(IoError::Invalid("source and target of a copy overlap")));
        }
        self.stats.copies += 1;
        self.stats.copied_bytes += len;
        let ticket = self.ticket(Some(token), fua, 1);
        self.submit(Append::Copy(Box::new(Copying {
            ticket,
            from: from / BLOCK_SIZE,
            to: to / BLOCK_SIZE,
            blocks: len / BLOCK_SIZE,
            found: VecDeque::new(),
            since: 0,
            lsn: 0,
        })));
    }

    /// As [`Volume::copy`], for somebody who is not behind the driver.
    pub fn copy_for(&mut self, from: u64, to: u64, len: u64, fua: bool, reply: CopyReply) {
        // Drivers count from the other end.
        let token = Token(u64::MAX - self.id_for());
        self.replies.insert(token, reply);
        self.copy(token, from, to, len, fua);
    }

    /// Hands out an answer to somebody who is not behind the driver. Gives back those to others.
    pub(super) fn reply(&mut self, done: Completion) -> Option<Completion> {
        match self.replies.remove(&done.token) {
            Some(reply) => {
                // Whoever asked may be gone.
                let _ = reply.send(done.result.map(drop));
                None
            }
            None => Some(done),
        }
    }

    /// Appends as much of a copy as there is room for and as is known. Gives back what has to wait for room; what has to be
    /// looked up counts as taken.
    pub(super) fn append_copy(&mut self, mut copy: Box<Copying>) -> Option<Append> {
        while copy.blocks > 0 {
            if !self.tickets.contains_key(&copy.ticket) {
                return None;
            }
            if !self.in_range((copy.to + copy.blocks - 1) * BLOCK_SIZE, 1) {
                // The volume has become smaller.
                self.end_ticket(copy.ticket, Err(IoError::OutOfRange));
                return None;
            }
            // They stay what they are: nothing is appended to the source meanwhile.
            for piece in self.dirty.pieces(copy.from, copy.blocks.min(WINDOW)) {
                let mut left = piece.blocks;
                while left > 0 {
                    match self.append_part(&mut copy, left, piece.found) {
                        Step::Done(blocks) => left -= blocks,
                        Step::Full => return Some(Append::Copy(copy)),
                        Step::Unknown => {
                            self.resolve(copy, false);
                            return None;
                        }
                    }
                }
            }
        }
        self.part_appended(copy.ticket, copy.lsn);
        None
    }

    /// Appends some of the next `blocks` blocks of a copy, of which the dirty map knows `dirty`.
    fn append_part(&mut self, copy: &mut Copying, blocks: u64, dirty: Option<(Lsn, Source)>) -> Step {
        let most = self.record_blocks_max() as u64;
        // In the dirty map the source is asked for anew with each part.
        let dirty = dirty.and_then(|_| self.dirty.get(copy.from));
        let (blocks, content) = match dirty {
            Some((_, Source::Zero { allocated })) => (blocks, Content::Zero { allocated }),
            Some((_, Source::Refer { seq, index })) => (blocks, Content::Place(self.backend.table.pin(seq), index)),
            Some((lsn, Source::Log { frame, block })) => {
                let blocks = blocks.min(most);
                match self.log.payload(frame, block, blocks as u32) {
                    Payload::Memory(slices) => {
                        let first = slices[0].clone();
                        ((first.len() / BLOCK) as u64, Content::Bytes(first))
                    }
                    Payload::Logged(_) if lsn <= copy.since => match copy.next_found(blocks) {
                        Some(found) => found,
                        None => return Step::Unknown,
                    },
                    Payload::Logged(_) => return Step::Unknown,
                }
            }
            None => match copy.next_found(blocks) {
                // What was found then still stands there: nothing was accepted since for any block that is clean now.
                Some(found) if self.purged_lsn <= copy.since => found,
                _ => return Step::Unknown,
            },
        };
        let to = copy.to;
        let (blocks, lsn) = match content {
            Content::Bytes(bytes) => {
                let blocks = blocks.min(most);
                let len = blocks as usize * BLOCK;
                if !self.paced(len) || !self.make_room(blocks as usize) {
                    return Step::Full;
                }
                self.rate.count(len as u64);
                let placed = self.log.append_slice(to, bytes.slice(0..len));
                self.note(to, blocks, placed.lsn, Source::Log { frame: placed.frame, block: placed.block });
                (blocks, placed.lsn)
            }
            Content::Zero { allocated } => {
                if !self.make_room(0) {
                    return Step::Full;
                }
                let placed = self.log.append_zero(to, blocks, allocated);
                self.note(to, blocks, placed.lsn, Source::Zero { allocated });
                (blocks, placed.lsn)
            }
            Content::Place(pin, index) => {
                if !self.make_room(0) {
                    return Step::Full;
                }
                let seq = pin.chunk();
                let placed = self.log.append_refer(to, blocks, seq, index);
                self.note(to, blocks, placed.lsn, Source::Refer { seq, index });
                self.pins.push_back((placed.lsn, pin));
                self.stats.referred_blocks += blocks;
                (blocks, placed.lsn)
            }
        };
        copy.done(blocks, lsn);
        Step::Done(blocks)
    }

    /// Has a job look what stands at the next blocks of a copy's source.
    fn resolve(&mut self, mut copy: Box<Copying>, later: bool) {
        copy.since = self.log.accepted_lsn();
        copy.found.clear();
        let (mut asks, mut frames, mut logged) = (Vec::new(), Vec::new(), 0);
        for piece in self.dirty.pieces(copy.from, copy.blocks.min(WINDOW)) {
            match piece.found {
                None => asks.push(Ask { lba: piece.lba, blocks: piece.blocks, from: From::Table(piece.lba) }),
                Some((_, Source::Log { frame, block })) => {
                    let blocks = piece.blocks.min(READ_MAX - logged);
                    let payload = self.log.payload(frame, block, blocks as u32);
                    if let Payload::Logged(payload) = payload {
                        self.log.pin(frame);
                        frames.push(frame);
                        asks.push(Ask { lba: piece.lba, blocks, from: From::Log(payload) });
                        logged += blocks;
                    }
                }
                Some((_, Source::Zero { .. } | Source::Refer { .. })) => {}
            }
            if logged == READ_MAX {
                break;
            }
        }
        let id = self.id_for();
        let backend = self.backend.clone();
        self.copies.insert(id, PendingCopy { copy, frames });
        self.spawn(async move {
            if later && backend.closing.sleep(FETCH_PAUSE).await {
                let error = FetchError { message: "the volume is closing".into(), bucket: false };
                return Done::Resolved { id, result: Err(error) };
            }
            Done::Resolved { id, result: backend.resolve(asks).await }
        });
    }

    /// A job of [`Volume::resolve`] ended.
    pub(super) fn resolved(&mut self, id: u64, result: Result<Vec<Resolved>, FetchError>) {
        let Some(PendingCopy { mut copy, frames }) = self.copies.remove(&id) else { return };
        self.unpin_all(&frames);
        match result {
            _ if self.state != State::Open => self.end_ticket(copy.ticket, Err(IoError::Shutdown)),
            Ok(found) => {
                copy.found = found.into();
                if let Some(append) = self.append(Append::Copy(copy)) {
                    self.waiting.push_front(append);
                }
            }
            // As with any write: the bucket is waited for.
            Err(error) if error.bucket => self.resolve(copy, true),
            Err(error) => {
                let (from, message) = (copy.from * BLOCK_SIZE, &error.message);
                tracing::error!(volume = %self.name, from, "copy failed: its source cannot be read: {message}");
                self.end_ticket(copy.ticket, Err(IoError::Read(error.message)));
            }
        }
    }

    /// The dirty map knows of nothing up to `lsn` any more: what that referred to may be moved again.
    pub(super) fn unpin(&mut self, lsn: Lsn) {
        let before = self.pins.len();
        while self.pins.front().is_some_and(|(at, _)| *at <= lsn) {
            self.pins.pop_front();
        }
        if self.pins.len() < before {
            self.compact.look_again();
        }
    }
}

impl Backend {
    /// What stands at the blocks asked for, in order; from the first of them on as far as it was looked.
    async fn resolve(&self, asks: Vec<Ask>) -> Result<Vec<Resolved>, FetchError> {
        let mut found = Vec::with_capacity(asks.len());
        let mut left = READ_MAX;
        for Ask { lba, blocks, from } in asks {
            if let From::Log(payload) = from {
                let device = self.device.clone();
                let read = self.blocking.run(move || payload.read(device.as_ref())).await;
                let bytes = read.map_err(|e| FetchError { message: e.to_string().into(), bucket: false })?;
                found.push(Resolved { lba, blocks, content: Content::Bytes(bytes.into()) });
                continue;
            }
            let table = self.table.clone();
            let looked = self.blocking.run(move || look_up(&table, lba, blocks)).await;
            for (lba, blocks, content) in looked.map_err(ReadError::Table)? {
                if let Some(content) = content {
                    found.push(Resolved { lba, blocks, content });
                    continue;
                }
                let blocks = blocks.min(left);
                let mut bytes = AlignedBuf::zeroed(blocks as usize * BLOCK);
                self.reader.read(lba, &mut bytes).await?;
                found.push(Resolved { lba, blocks, content: Content::Bytes(bytes.into()) });
                left -= blocks;
                if left == 0 {
                    return Ok(found);
                }
            }
        }
        Ok(found)
    }
}

/// What the table knows of some blocks, in order; nothing of those that have to be read.
fn look_up(table: &Table, lba: Lba, blocks: u64) -> Result<Vec<(Lba, u64, Option<Content>)>, TableError> {
    let mut found = Vec::new();
    for (run, pin) in table.lookup_pinned(lba, blocks)? {
        match (run.target, pin) {
            (Target::Chunk { index, .. }, Some(pin)) => {
                found.push((run.lba, run.blocks, Some(Content::Place(pin, index))));
            }
            (Target::Chunk { .. }, None) => found.push((run.lba, run.blocks, None)),
            (Target::Zero, _) => found.push((run.lba, run.blocks, Some(Content::Zero { allocated: true }))),
            (Target::Hole, _) => {
                // Lookups do not tell long ranges of zeroes from holes.
                let (mut at, end) = (run.lba, run.lba + run.blocks);
                while at < end {
                    for (blocks, allocation) in table.allocations(at, end - at, 1024)? {
                        let allocated = allocation == Allocation::Zero;
                        found.push((at, blocks, Some(Content::Zero { allocated })));
                        at += blocks;
                    }
                }
            }
        }
    }
    Ok(found)
}
