//! Reads: dirty data, then the translation table, then zeroes; from memory at once where possible.

use bytes::Bytes;

use super::api::{Allocation, IoError, Outcome, ReadData, ReadNow, Token};
use super::block_cache::{PIECE_BLOCKS, Run};
use super::dirty::Source;
use super::engine::{Volume, blocks_of, within_block};
use super::job::{Done, ExtentPart, FetchError, Fetched, From, Missing};
use super::write::Merge;
use crate::buf::{AlignedBuf, Slice};
use crate::outgoing::{Outgoing, SHARE_MIN};
use crate::types::{BLOCK, BLOCK_SIZE, Lba, Lsn};
use crate::wal::writer::Payload;

/// Reads ahead in pieces of this many blocks, so that several requests to the bucket run side by side.
const PREFETCH_BLOCKS: u64 = 256;
/// Of a reader that has been followed for a while, in larger ones: a request to a bucket costs as much as a MiB or two.
const PREFETCH_BLOCKS_MAX: u64 = 1024;
/// Largest window ahead of a sequential reader, in blocks.
const WINDOW_MAX: u64 = 8192;
/// Sequential readers followed at once.
const STREAMS: usize = 8;
/// Prefetches on their way at once.
const PREFETCHES_MAX: usize = 24;

/// Who waits for fetched blocks.
#[derive(Default)]
pub(super) enum Waiter {
    #[default]
    Nobody,
    Read {
        token: Token,
        offset: u64,
        len: usize,
        holes: Vec<(u64, u64)>,
    },
    Merge(Box<Merge>),
}

/// A fetch under way.
#[derive(Default)]
pub(super) struct PendingRead {
    pub waiter: Waiter,
    /// Frames kept in the log for it.
    pub pins: Vec<u64>,
    /// Ranges fetched from the table: first block, count, position in the buffer in blocks.
    clean: Vec<(Lba, u64, usize)>,
    since: Lsn,
    /// For a prefetch: reads that found their blocks on the way.
    queue: Vec<(Token, u64, u32)>,
}

impl PendingRead {
    /// A fetch of the edge blocks of a sub-block write.
    pub fn for_merge(merge: Merge, pins: Vec<u64>) -> Self {
        Self { waiter: Waiter::Merge(Box::new(merge)), pins, ..Self::default() }
    }
}

/// Sequential readers and what is on its way for them.
#[derive(Default)]
pub(super) struct Readahead {
    streams: Vec<Stream>,
    /// Prefetches on their way: id, first block, count.
    flying: Vec<(u64, Lba, u64)>,
}

impl Readahead {
    /// The prefetch that brings one of the missing blocks.
    fn bringing(&self, missing: &[Missing]) -> Option<u64> {
        let brings = |part: &Missing| {
            let From::Table(lba) = part.from else { return None };
            let end = lba + part.blocks as u64;
            self.flying.iter().find(|(_, first, count)| *first < end && lba < first + count).map(|(id, ..)| *id)
        };
        missing.iter().find_map(brings)
    }
}

/// What a read is put together from, in order.
#[derive(Default)]
struct Parts<'a> {
    parts: Vec<Part<'a>>,
    /// Whole blocks so far.
    blocks: usize,
    /// Zeroes: first block, count.
    holes: Vec<(u64, u64)>,
    missing: Vec<Missing>,
    /// Frames that some of what is missing stands in.
    pins: Vec<u64>,
}

enum Part<'a> {
    Clean(Run<'a>),
    Logged(Slice),
    /// So many blocks of zeroes, or that have to be fetched.
    Empty(usize),
}

impl<'a> Parts<'a> {
    fn have(&mut self, run: Run<'a>) {
        self.blocks += run.bytes.len() / BLOCK;
        self.parts.push(Part::Clean(run));
    }

    fn have_slices(&mut self, slices: Vec<Slice>) {
        self.blocks += slices.iter().map(|slice| slice.len() / BLOCK).sum::<usize>();
        self.parts.extend(slices.into_iter().map(Part::Logged));
    }

    fn have_hole(&mut self, blocks: u64) {
        self.holes.push((self.blocks as u64, blocks));
        self.empty(blocks as usize);
    }

    fn miss(&mut self, blocks: u64, from: From) {
        match (self.missing.last_mut(), &from) {
            (Some(Missing { at, blocks: known, from: From::Table(_) }), From::Table(_))
                if *at + *known == self.blocks =>
            {
                *known += blocks as usize;
            }
            _ => self.missing.push(Missing { at: self.blocks, blocks: blocks as usize, from }),
        }
        self.empty(blocks as usize);
    }

    fn empty(&mut self, blocks: usize) {
        self.blocks += blocks;
        self.parts.push(Part::Empty(blocks));
    }

    /// Appends the `len` bytes from `skip` on.
    fn append_to(&self, out: &mut Outgoing, mut skip: usize, mut len: usize) {
        for part in &self.parts {
            let size = part.bytes();
            let from = skip.min(size);
            let taken = len.min(size - from);
            (skip, len) = (skip - from, len - taken);
            let range = from..from + taken;
            match part {
                Part::Clean(Run { bytes, kept: Some(kept) }) if taken >= SHARE_MIN => {
                    out.push(kept.slice_ref(&bytes[range]));
                }
                Part::Clean(run) => out.extend_from_slice(&run.bytes[range]),
                Part::Logged(slice) if taken >= SHARE_MIN => out.push(Bytes::from_owner(slice.slice(range))),
                Part::Logged(slice) => out.extend_from_slice(&slice[range]),
                Part::Empty(_) => out.extend_zeroes(taken),
            }
        }
    }

    /// A buffer for all of it, with zeroes or anything at all where something is missing.
    fn buffer(&self) -> AlignedBuf {
        let mut buf = AlignedBuf::for_overwrite(self.blocks * BLOCK);
        let mut at = 0;
        for part in &self.parts {
            let own = &mut buf[at..at + part.bytes()];
            at += own.len();
            match part.content() {
                Some(content) => own.copy_from_slice(content),
                None => own.fill(0),
            }
        }
        buf
    }
}

impl Part<'_> {
    fn bytes(&self) -> usize {
        match self {
            Part::Empty(blocks) => blocks * BLOCK,
            _ => self.content().map_or(0, <[u8]>::len),
        }
    }

    fn content(&self) -> Option<&[u8]> {
        match self {
            Part::Clean(run) => Some(run.bytes),
            Part::Logged(slice) => Some(slice),
            Part::Empty(_) => None,
        }
    }
}

struct Stream {
    next: Lba,
    /// What was to be let go before this was.
    passed: Lba,
    hits: u32,
    missed: bool,
    /// Requested up to here.
    ahead: Lba,
    window: u64,
}

impl Volume {
    /// Reads bytes into `out` if memory has them; otherwise a completion follows.
    pub fn read(&mut self, token: Token, offset: u64, len: u32, out: &mut Outgoing) -> ReadNow {
        if !self.in_range(offset, u64::from(len)) {
            return ReadNow::Failed(IoError::OutOfRange);
        }
        if self.gate.is_shut() {
            self.gate.hold_read(token, offset, len);
            return ReadNow::Pending;
        }
        if let Some(error) = self.read_error() {
            return ReadNow::Failed(error);
        }
        self.stats.reads += 1;
        self.stats.read_bytes += u64::from(len);
        if len == 0 {
            return ReadNow::Ready { holes: Vec::new() };
        }
        let (lba, blocks) = blocks_of(offset, u64::from(len));
        let answer = self.read_or_fetch(token, offset, len, out, true);
        self.follow_stream(lba, blocks, answer == ReadNow::Pending);
        answer
    }

    fn read_or_fetch(&mut self, token: Token, offset: u64, len: u32, out: &mut Outgoing, wait: bool) -> ReadNow {
        let (lba, blocks) = blocks_of(offset, u64::from(len));
        if blocks == 1 {
            // One block: answered without collecting anything.
            let skip = within_block(offset);
            if let Some(holes) = self.read_block(lba, skip..skip + len as usize, out) {
                self.stats.memory_hits += 1;
                return ReadNow::Ready { holes };
            }
        }
        let mut parts = Parts::default();
        for piece in self.dirty.pieces(lba, blocks) {
            match piece.found {
                Some((_, Source::Log { frame, block })) => match self.log.payload(frame, block, piece.blocks as u32) {
                    Payload::Memory(slices) => parts.have_slices(slices),
                    Payload::Logged(payload) => {
                        parts.pins.push(frame);
                        parts.miss(piece.blocks, From::Log(payload));
                    }
                },
                Some((_, Source::Zero { .. })) => parts.have_hole(piece.blocks),
                Some((_, Source::Refer { seq, index })) => {
                    parts.miss(piece.blocks, From::Chunk(self.backend.table.pin(seq), index));
                }
                None => {
                    let (mut lba, end) = (piece.lba, piece.lba + piece.blocks);
                    while lba < end {
                        match self.cache.run(lba, end - lba) {
                            Some(run) => {
                                parts.have(run);
                                lba += (run.bytes.len() / BLOCK) as u64;
                            }
                            None => {
                                parts.miss(1, From::Table(lba));
                                lba += 1;
                            }
                        }
                    }
                }
            }
        }
        let absent: usize = parts.missing.iter().map(|m| m.blocks).sum();
        self.stats.memory_hits += blocks - absent as u64;
        self.stats.memory_misses += absent as u64;
        if parts.missing.is_empty() {
            let skip = within_block(offset);
            parts.append_to(out, skip, len as usize);
            return ReadNow::Ready { holes: byte_holes(&parts.holes, skip, len as usize) };
        }
        if wait && let Some(id) = self.readahead.bringing(&parts.missing) {
            self.join_prefetch(id, token, offset, len);
            return ReadNow::Pending;
        }
        let data = parts.buffer();
        let Parts { missing, holes, pins, .. } = parts;
        for &frame in &pins {
            self.log.pin(frame);
        }
        let clean = missing
            .iter()
            .filter_map(|m| match m.from {
                From::Table(lba) => Some((lba, m.blocks as u64, m.at)),
                From::Log(_) | From::Chunk(..) => None,
            })
            .collect();
        let id = self.id_for();
        let backend = self.backend.clone();
        self.spawn(async move { Done::Read { id, result: backend.fetch(data, missing).await } });
        let waiter = Waiter::Read { token, offset, len: len as usize, holes };
        let since = self.log.accepted_lsn();
        self.reads.insert(id, PendingRead { waiter, pins, clean, since, queue: Vec::new() });
        ReadNow::Pending
    }

    fn read_block(
        &mut self,
        lba: Lba,
        range: std::ops::Range<usize>,
        out: &mut Outgoing,
    ) -> Option<Vec<(usize, usize)>> {
        match self.dirty.get(lba) {
            Some((_, Source::Log { frame, block })) => match self.log.payload(frame, block, 1) {
                Payload::Memory(slices) => {
                    out.extend_from_slice(&slices[0][range]);
                    Some(Vec::new())
                }
                Payload::Logged(_) => None,
            },
            Some((_, Source::Zero { .. })) => {
                let len = range.len();
                out.extend_zeroes(len);
                Some(vec![(0, len)])
            }
            Some((_, Source::Refer { .. })) => None,
            None => {
                out.extend_from_slice(&self.cache.get(lba)?[range]);
                Some(Vec::new())
            }
        }
    }

    /// One block from memory, or where else it has to be fetched from.
    pub(super) fn peek(&mut self, lba: Lba, own: &mut [u8]) -> Result<(), From> {
        match self.dirty.get(lba) {
            Some((_, Source::Log { frame, block })) => match self.log.payload(frame, block, 1) {
                Payload::Memory(slices) => own.copy_from_slice(&slices[0]),
                Payload::Logged(payload) => return Err(From::Log(payload)),
            },
            Some((_, Source::Zero { .. })) => own.fill(0),
            Some((_, Source::Refer { seq, index })) => return Err(From::Chunk(self.backend.table.pin(seq), index)),
            None => own.copy_from_slice(self.cache.get(lba).ok_or(From::Table(lba))?),
        }
        Ok(())
    }

    /// Keeps the frames behind dirty blocks in the log; the result goes to a [`PendingRead`].
    pub(super) fn pin_all(&mut self, lbas: impl Iterator<Item = Lba>) -> Vec<u64> {
        let mut pins = Vec::new();
        for lba in lbas {
            if let Some((_, Source::Log { frame, .. })) = self.dirty.get(lba) {
                self.log.pin(frame);
                pins.push(frame);
            }
        }
        pins
    }

    pub(super) fn unpin_all(&mut self, pins: &[u64]) {
        for &frame in pins {
            self.log.unpin(frame);
        }
    }

    pub(super) fn read_done(&mut self, id: u64, result: Result<Fetched, FetchError>) {
        let Some(pending) = self.reads.remove(&id) else { return };
        self.unpin_all(&pending.pins);
        if let Ok(fetched) = &result {
            self.cache_clean(&pending, &fetched.data);
        }
        match pending.waiter {
            Waiter::Nobody => {}
            Waiter::Merge(merge) => {
                self.edges_fetched(*merge, result.map(|f| f.data));
            }
            Waiter::Read { token, offset, len, mut holes } => {
                if let Err(error) = &result {
                    tracing::error!(volume = %self.name, offset, len, "read failed: {}", error.message);
                }
                let result = result.map_err(|e| IoError::Read(e.message)).map(|fetched| {
                    holes.extend(fetched.holes);
                    holes.sort_unstable();
                    let skip = within_block(offset);
                    let bytes = fetched.data.slice(skip..skip + len);
                    let holes = byte_holes(&holes, skip, len);
                    Outcome::Data(ReadData { bytes: bytes.into(), holes })
                });
                self.complete(token, result);
            }
        }
    }

    /// Keeps what was fetched, unless something newer was accepted for a block since the fetch began: the fetch may
    /// have seen the content from before.
    fn cache_clean(&mut self, pending: &PendingRead, data: &Bytes) {
        if self.purged_lsn > pending.since {
            // What was accepted meanwhile may have left the dirty map already.
            return;
        }
        for &(lba, blocks, at) in &pending.clean {
            let run = data.slice(at * BLOCK..(at + blocks as usize) * BLOCK);
            self.cache.insert_run(lba, &run, |lba| self.dirty.get(lba).is_none());
        }
    }

    /// Queues a read behind the prefetch `id`, which brings one of its blocks.
    fn join_prefetch(&mut self, id: u64, token: Token, offset: u64, len: u32) {
        let pending = self.reads.get_mut(&id).expect("a prefetch on its way is among the reads");
        pending.queue.push((token, offset, len));
    }

    fn follow_stream(&mut self, lba: Lba, blocks: u64, missed: bool) {
        let end = lba + blocks;
        let streams = &mut self.readahead.streams;
        let Some(at) = streams.iter().position(|s| s.next == lba) else {
            if missed {
                if streams.len() == STREAMS {
                    streams.remove(0);
                }
                streams.push(Stream { next: end, passed: lba, hits: 0, missed, ahead: end, window: 0 });
            }
            return;
        };
        let mut stream = streams.remove(at);
        stream.next = end;
        stream.hits += 1;
        stream.missed |= missed;
        if stream.hits >= 2 && stream.missed {
            if stream.window == 0 {
                stream.window = (blocks * 4).clamp(PREFETCH_BLOCKS / 2, WINDOW_MAX);
            }
            stream.ahead = stream.ahead.max(end);
            if stream.ahead < end + stream.window / 2 {
                let until = (end + stream.window).min(self.size.div_ceil(BLOCK_SIZE));
                let piece = (stream.window / 8).clamp(PREFETCH_BLOCKS, PREFETCH_BLOCKS_MAX).next_power_of_two();
                while stream.ahead < until && self.readahead.flying.len() < PREFETCHES_MAX {
                    // Aligned pieces, so that neighbouring streams and chunk frames meet.
                    let next = (stream.ahead + 1).next_multiple_of(piece).min(until);
                    self.fetch_ahead(stream.ahead, next - stream.ahead);
                    stream.ahead = next;
                }
                stream.window = (stream.window * 2).min(WINDOW_MAX).min(self.readahead_limit());
            }
            self.let_go_behind(&mut stream);
        }
        self.readahead.streams.push(stream);
    }

    /// Keeps no more of what a reader has passed than it may have. All of a long read would fill the cache, and memory
    /// that was not in use before, with what is probably not needed again soon. Who needs it finds it on the cache's disk.
    fn let_go_behind(&mut self, stream: &mut Stream) {
        let until = stream.next.saturating_sub(self.tuning.keep_sequential_blocks()) / PIECE_BLOCKS * PIECE_BLOCKS;
        let mut at = stream.passed.next_multiple_of(PIECE_BLOCKS);
        while at < until {
            self.cache.let_go(at);
            at += PIECE_BLOCKS;
            stream.passed = at;
        }
    }

    /// A window must fit in the cache several times over, or it would push itself out.
    fn readahead_limit(&self) -> u64 {
        (self.tuning.block_cache_bytes / BLOCK / 4) as u64
    }

    /// Fetches into memory what is not there.
    fn fetch_ahead(&mut self, lba: Lba, blocks: u64) {
        let wanted = |l: &Lba| self.dirty.get(*l).is_none() && !self.cache.has(*l);
        let Some(first) = (lba..lba + blocks).find(wanted) else { return };
        let last = (first..lba + blocks).rfind(wanted).unwrap_or(first);
        let blocks = last + 1 - first;
        let id = self.id_for();
        let backend = self.backend.clone();
        let missing = vec![Missing { at: 0, blocks: blocks as usize, from: From::Table(first) }];
        self.spawn(async move {
            // Here, where nobody waits for the memory.
            let data = AlignedBuf::for_overwrite(blocks as usize * BLOCK);
            Done::Prefetched { id, result: backend.fetch(data, missing).await }
        });
        let since = self.log.accepted_lsn();
        // What is dirty now may leave the dirty map before the fetch ends, and the fetch may have seen the table from
        // before that: only what the dirty map does not know is worth keeping.
        let gaps = self.dirty.pieces(first, blocks).into_iter().filter(|p| p.found.is_none());
        let clean = gaps.map(|p| (p.lba, p.blocks, (p.lba - first) as usize)).collect();
        self.reads.insert(id, PendingRead { clean, since, ..PendingRead::default() });
        self.readahead.flying.push((id, first, blocks));
    }

    pub(super) fn prefetch_done(&mut self, id: u64, result: Result<Fetched, FetchError>) {
        self.readahead.flying.retain(|(flying, ..)| *flying != id);
        let Some(pending) = self.reads.remove(&id) else { return };
        if let Ok(fetched) = &result {
            self.cache_clean(&pending, &fetched.data);
        }
        match pending.waiter {
            Waiter::Read { token, .. } => self.complete(token, Ok(Outcome::Done)),
            Waiter::Nobody | Waiter::Merge(_) => {}
        }
        for (token, offset, len) in pending.queue {
            let mut bytes = Outgoing::new();
            match self.read_or_fetch(token, offset, len, &mut bytes, false) {
                ReadNow::Ready { holes } => self.complete(token, Ok(Outcome::Data(ReadData { bytes, holes }))),
                ReadNow::Failed(error) => self.complete(token, Err(error)),
                ReadNow::Pending => {}
            }
        }
    }

    /// Brings a range into memory; answered when the first piece is on its way, or at once if nothing has to be.
    pub fn prefetch(&mut self, token: Token, offset: u64, len: u64) {
        if !self.in_range(offset, len) {
            self.complete(token, Err(IoError::OutOfRange));
            return;
        }
        let (lba, blocks) = blocks_of(offset, len);
        let mut at = lba;
        let end = lba + blocks.min(self.readahead_limit());
        while at < end && self.readahead.flying.len() < PREFETCHES_MAX {
            let next = (at + PREFETCH_BLOCKS).min(end);
            self.fetch_ahead(at, next - at);
            at = next;
        }
        self.complete(token, Ok(Outcome::Done));
    }

    /// Tells which parts of a range are allocated: at most `max` runs, from its start, without gaps.
    pub fn extents(&mut self, token: Token, offset: u64, len: u64, max: usize) {
        if self.gate.is_shut() {
            return self.gate.hold_extents(token, offset, len, max);
        }
        if let Some(error) = self.read_error() {
            return self.complete(token, Err(error));
        }
        if len == 0 || !self.in_range(offset, len) {
            self.complete(token, Err(IoError::OutOfRange));
            return;
        }
        let (lba, blocks) = blocks_of(offset, len);
        let parts = self
            .dirty
            .pieces(lba, blocks)
            .into_iter()
            .map(|piece| match piece.found {
                None => ExtentPart::Ask { lba: piece.lba, blocks: piece.blocks },
                Some((_, source)) => ExtentPart::Known {
                    blocks: piece.blocks,
                    allocation: match source {
                        Source::Log { .. } | Source::Refer { .. } => Allocation::Data,
                        Source::Zero { allocated: true } => Allocation::Zero,
                        Source::Zero { allocated: false } => Allocation::Hole,
                    },
                },
            })
            .collect();
        let skip = within_block(offset) as u64;
        let backend = self.backend.clone();
        self.spawn(async move {
            let mut done = backend.extents(token, parts, max.max(1)).await;
            if let Done::Extents { result: Ok(runs), .. } = &mut done {
                trim_runs(runs, skip, len);
            }
            done
        });
    }
}

/// Cuts block-aligned runs to the byte range asked for.
fn trim_runs(runs: &mut Vec<super::api::ExtentStatus>, skip: u64, len: u64) {
    if let Some(first) = runs.first_mut() {
        first.len -= skip;
    }
    let mut left = len;
    runs.retain_mut(|run| {
        run.len = run.len.min(left);
        left -= run.len;
        run.len > 0
    });
}

/// Turns hole ranges in blocks into byte ranges of the `len` bytes that start `skip` bytes into the first block.
fn byte_holes(holes: &[(u64, u64)], skip: usize, len: usize) -> Vec<(usize, usize)> {
    let mut out: Vec<(usize, usize)> = Vec::with_capacity(holes.len());
    for &(first, blocks) in holes {
        let from = (first as usize * BLOCK).saturating_sub(skip);
        let to = ((first + blocks) as usize * BLOCK - skip).min(len);
        match out.last_mut() {
            Some((start, size)) if *start + *size == from => *size = to - *start,
            _ if from < to => out.push((from, to - from)),
            _ => {}
        }
    }
    out
}
