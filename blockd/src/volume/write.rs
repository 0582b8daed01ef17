//! Writes, zeroes and trims: from a request to records in the open frame.

use bytes::Bytes;

use super::api::{IoError, Outcome, Token, WriteData};
use super::copy::Copying;
use super::dirty::Source;
use super::engine::{Ack, State, Volume, blocks_of, within_block};
use super::job::{Done, FetchError, From as Origin, Missing};
use super::read::PendingRead;
use crate::buf::{AlignedBuf, Slice};
use crate::types::{BLOCK, BLOCK_SIZE, Lba, Lsn};

/// Most payload blocks in one record, so that frames stay of a size that recovery and readers like.
const RECORD_BLOCKS_MAX: usize = 256;

/// A request that is not acknowledged yet because parts of it are not in the log.
pub(super) struct Ticket {
    /// Nobody waits for internal work.
    pub token: Option<Token>,
    fua: bool,
    /// Parts still to be appended.
    parts: u32,
}

/// Something to be appended to the log.
pub(super) enum Append {
    Data { ticket: u64, lba: Lba, data: Slice },
    Zero { ticket: u64, lba: Lba, blocks: u64, allocated: bool },
    Merge(Merge),
    Copy(Box<Copying>),
}

/// A sub-block write: merged with the rest of its blocks at the moment it is appended.
pub(super) struct Merge {
    ticket: u64,
    offset: u64,
    data: Vec<u8>,
    /// What must stand there for `data` to take its place.
    expected: Option<Vec<u8>>,
    /// Edge blocks, or with `expected` any, as they stood at the accepted LSN `since`, those in memory then included: once
    /// they have left it nobody may find them there again.
    known: Vec<(Lba, Box<[u8; BLOCK]>)>,
    since: Lsn,
    /// Blocks on their way, which stood like that at `since` as well.
    fetching: Vec<Lba>,
    /// The bucket failed when they were fetched last.
    failed: bool,
}

impl Merge {
    fn new(ticket: u64, offset: u64, data: Vec<u8>, expected: Option<Vec<u8>>) -> Self {
        Self { ticket, offset, data, expected, known: Vec::new(), since: 0, fetching: Vec::new(), failed: false }
    }
}

impl Append {
    pub fn ticket(&self) -> u64 {
        match self {
            Append::Data { ticket, .. } | Append::Zero { ticket, .. } => *ticket,
            Append::Merge(merge) => merge.ticket,
            Append::Copy(copy) => copy.ticket,
        }
    }

    fn bytes(&self) -> usize {
        match self {
            Append::Data { data, .. } => data.len(),
            // Of a copy, what has to be written is counted when it is known.
            Append::Zero { .. } | Append::Copy(_) => 0,
            Append::Merge(merge) => merge.data.len() + 2 * BLOCK,
        }
    }
}

impl Volume {
    pub(super) fn ticket(&mut self, token: Option<Token>, fua: bool, parts: u32) -> u64 {
        let id = self.id_for();
        self.tickets.insert(id, Ticket { token, fua, parts });
        id
    }

    pub(super) fn refuse(&mut self, token: Token, offset: u64, len: u64) -> bool {
        let error = if !self.in_range(offset, len) { Some(IoError::OutOfRange) } else { self.write_error() };
        if let Some(error) = error {
            self.complete(token, Err(error));
            return true;
        }
        if len == 0 {
            self.complete(token, Ok(Outcome::Done));
        }
        len == 0
    }

    /// Writes bytes. The answer is a completion: the write is in the log then, and durable if `fua`.
    pub fn write(&mut self, token: Token, offset: u64, data: WriteData<'_>, fua: bool) {
        if self.gate.is_shut() {
            return self.gate.hold_write(token, offset, data, fua);
        }
        let len = match &data {
            WriteData::Copy(bytes) => bytes.len(),
            WriteData::Owned(_, len) => *len,
        };
        if self.refuse(token, offset, len as u64) {
            return;
        }
        self.stats.writes += 1;
        self.stats.write_bytes += len as u64;
        let aligned = within_block(offset) == 0 && len.is_multiple_of(BLOCK);
        let lba = offset / BLOCK_SIZE;
        match data {
            // One record, room in the frame, nobody ahead: by far the most frequent case.
            WriteData::Copy(bytes) if aligned && self.admits(len) && self.make_room(len / BLOCK) => {
                let placed = self.log.append_copy(lba, bytes);
                self.note(
                    lba,
                    (len / BLOCK) as u64,
                    placed.lsn,
                    Source::Log { frame: placed.frame, block: placed.block },
                );
                self.rate.count(len as u64);
                self.acks.push_back(Ack { lsn: placed.lsn, token, fua });
            }
            WriteData::Owned(buf, _) if aligned => {
                self.submit_slices(token, lba, Slice::from(buf).slice(0..len), fua);
            }
            WriteData::Copy(bytes) if aligned => {
                self.submit_slices(token, lba, Slice::from(AlignedBuf::copy_of(bytes)), fua);
            }
            WriteData::Copy(bytes) => self.submit_unaligned(token, offset, bytes.to_vec(), fua),
            WriteData::Owned(buf, len) => self.submit_unaligned(token, offset, buf[..len].to_vec(), fua),
        }
    }

    pub(super) fn record_blocks_max(&self) -> usize {
        RECORD_BLOCKS_MAX.min(self.log.frame_blocks_max())
    }

    fn submit_slices(&mut self, token: Token, mut lba: Lba, data: Slice, fua: bool) {
        let step = self.record_blocks_max() * BLOCK;
        let ticket = self.ticket(Some(token), fua, data.len().div_ceil(step) as u32);
        let mut at = 0;
        while at < data.len() {
            let end = data.len().min(at + step);
            self.submit(Append::Data { ticket, lba, data: data.slice(at..end) });
            lba += ((end - at) / BLOCK) as u64;
            at = end;
        }
    }

    /// Splits off the partial blocks at both ends; they are merged with what stands there.
    fn submit_unaligned(&mut self, token: Token, offset: u64, data: Vec<u8>, fua: bool) {
        let end = offset + data.len() as u64;
        let body = offset.next_multiple_of(BLOCK_SIZE)..end / BLOCK_SIZE * BLOCK_SIZE;
        if body.start >= body.end {
            let ticket = self.ticket(Some(token), fua, 1);
            self.submit_merge(ticket, offset, data);
            return;
        }
        let step = self.record_blocks_max() * BLOCK;
        let (head, middle) = data.split_at((body.start - offset) as usize);
        let (middle, tail) = middle.split_at((body.end - body.start) as usize);
        let parts = usize::from(!head.is_empty()) + usize::from(!tail.is_empty()) + middle.len().div_ceil(step);
        let ticket = self.ticket(Some(token), fua, parts as u32);
        if !head.is_empty() {
            self.submit_merge(ticket, offset, head.to_vec());
        }
        for (i, piece) in middle.chunks(step).enumerate() {
            let lba = body.start / BLOCK_SIZE + (i * step / BLOCK) as u64;
            self.submit(Append::Data { ticket, lba, data: Slice::from(AlignedBuf::copy_of(piece)) });
        }
        if !tail.is_empty() {
            self.submit_merge(ticket, body.end, tail.to_vec());
        }
    }

    fn submit_merge(&mut self, ticket: u64, offset: u64, data: Vec<u8>) {
        self.submit(Append::Merge(Merge::new(ticket, offset, data, None)));
    }

    /// Writes `data` if `expected`, of the same length, stands there at that moment; else the answer is
    /// [`Outcome::Mismatch`]. Nothing comes between the comparison and the write.
    pub fn compare_write(&mut self, token: Token, offset: u64, expected: Vec<u8>, data: Vec<u8>, fua: bool) {
        assert_eq!(expected.len(), data.len(), "a comparison covers what is written");
        if self.gate.is_shut() {
            return self.gate.hold_compare_write(token, offset, expected, data, fua);
        }
        if self.refuse(token, offset, data.len() as u64) {
            return;
        }
        // One record, so that a crash leaves all of it or nothing.
        if blocks_of(offset, data.len() as u64).1 > self.record_blocks_max() as u64 {
            let error = IoError::Invalid("longer than a compare-and-write may be");
            return self.complete(token, Err(error));
        }
        self.stats.writes += 1;
        self.stats.write_bytes += data.len() as u64;
        let ticket = self.ticket(Some(token), fua, 1);
        self.submit(Append::Merge(Merge::new(ticket, offset, data, Some(expected))));
    }

    /// Zeroes a range of any length, in constant time. With `no_hole` the range counts as allocated afterwards.
    pub fn zero(&mut self, token: Token, offset: u64, len: u64, fua: bool, no_hole: bool) {
        if self.gate.is_shut() {
            return self.gate.hold_zero(token, offset, len, fua, no_hole);
        }
        if self.refuse(token, offset, len) {
            return;
        }
        self.stats.trims += 1;
        let end = offset + len;
        let body = offset.next_multiple_of(BLOCK_SIZE)..end / BLOCK_SIZE * BLOCK_SIZE;
        if body.start > body.end {
            let ticket = self.ticket(Some(token), fua, 1);
            self.submit_merge(ticket, offset, vec![0; len as usize]);
            return;
        }
        let (head, tail) = ((body.start - offset) as usize, (end - body.end) as usize);
        let blocks = (body.end - body.start) / BLOCK_SIZE;
        let parts = u32::from(head > 0) + u32::from(tail > 0) + u32::from(blocks > 0);
        let ticket = self.ticket(Some(token), fua, parts);
        if head > 0 {
            self.submit_merge(ticket, offset, vec![0; head]);
        }
        if blocks > 0 {
            self.submit(Append::Zero { ticket, lba: body.start / BLOCK_SIZE, blocks, allocated: no_hole });
        }
        if tail > 0 {
            self.submit_merge(ticket, body.end, vec![0; tail]);
        }
    }

    /// Discards the whole blocks of a range of any length, in constant time. Partial blocks are left as they are.
    pub fn trim(&mut self, token: Token, offset: u64, len: u64, fua: bool) {
        if self.gate.is_shut() {
            return self.gate.hold_trim(token, offset, len, fua);
        }
        if self.refuse(token, offset, len) {
            return;
        }
        self.stats.trims += 1;
        let mut end = offset + len;
        if end == self.size {
            // The last block of a volume may be partial; nothing lies behind it.
            end = end.next_multiple_of(BLOCK_SIZE);
        }
        let (first, last) = (offset.div_ceil(BLOCK_SIZE), end / BLOCK_SIZE);
        if first >= last {
            self.complete(token, Ok(Outcome::Done));
            return;
        }
        let ticket = self.ticket(Some(token), fua, 1);
        self.submit(Append::Zero { ticket, lba: first, blocks: last - first, allocated: false });
    }

    pub(super) fn submit(&mut self, append: Append) {
        if !self.waiting.is_empty() {
            self.stats.paced_writes += 1;
            self.waiting.push_back(append);
            return;
        }
        let bytes = append.bytes();
        if !self.admits(bytes) {
            self.stats.paced_writes += 1;
            self.waiting.push_back(append);
        } else if let Some(append) = self.append(append) {
            self.waiting.push_front(append);
        }
    }

    /// Whether a write of `bytes` may enter the log now, or has to wait behind others or for its pace.
    fn admits(&mut self, bytes: usize) -> bool {
        if !self.waiting.is_empty() {
            return false;
        }
        self.paced(bytes)
    }

    pub(super) fn paced(&mut self, bytes: usize) -> bool {
        let (used, capacity) = self.log.usage();
        self.paced_until = self.pacer.admit(self.now_us, bytes, used as f64 / capacity as f64);
        self.paced_until.is_none()
    }

    pub(super) fn append_waiting(&mut self) {
        while let Some(front) = self.waiting.front() {
            let bytes = front.bytes();
            if !self.paced(bytes) {
                break;
            }
            let Some(front) = self.waiting.pop_front() else { break };
            if let Some(back) = self.append(front) {
                self.waiting.push_front(back);
                break;
            }
        }
    }

    /// Makes the open frame take `blocks` more payload blocks, sealing it if need be.
    pub(super) fn make_room(&mut self, blocks: usize) -> bool {
        if blocks > self.record_blocks_max() {
            return false;
        }
        if !self.log.fits(blocks) && self.may_seal_full() {
            self.log.seal(self.now_us, (self.wall)(), false, &mut self.log_ios);
        }
        self.log.fits(blocks)
    }

    /// Appends, or gives back what cannot be appended yet. A merge that must fetch its blocks first counts as taken.
    pub(super) fn append(&mut self, append: Append) -> Option<Append> {
        match append {
            Append::Data { ticket, lba, data } => {
                let blocks = data.len() / BLOCK;
                if !self.make_room(blocks) {
                    return Some(Append::Data { ticket, lba, data });
                }
                self.rate.count(data.len() as u64);
                let placed = self.log.append_slice(lba, data);
                self.note(lba, blocks as u64, placed.lsn, Source::Log { frame: placed.frame, block: placed.block });
                self.part_appended(ticket, placed.lsn);
            }
            Append::Zero { ticket, lba, blocks, allocated } => {
                if !self.make_room(0) {
                    return Some(Append::Zero { ticket, lba, blocks, allocated });
                }
                let placed = self.log.append_zero(lba, blocks, allocated);
                self.note(lba, blocks, placed.lsn, Source::Zero { allocated });
                self.part_appended(ticket, placed.lsn);
            }
            Append::Merge(merge) => return self.append_merge(merge),
            Append::Copy(copy) => return self.append_copy(copy),
        }
        None
    }

    pub(super) fn note(&mut self, lba: Lba, blocks: u64, lsn: Lsn, source: Source) {
        self.dirty.insert(lba, blocks, lsn, source);
        self.cache.forget(lba, blocks);
        self.last_append_us = self.now_us;
    }

    pub(super) fn part_appended(&mut self, id: u64, lsn: Lsn) {
        let Some(ticket) = self.tickets.get_mut(&id) else { return };
        ticket.parts -= 1;
        if ticket.parts == 0
            && let Some(Ticket { token: Some(token), fua, .. }) = self.tickets.remove(&id)
        {
            // Its other parts have lower LSNs.
            self.acks.push_back(Ack { lsn, token, fua });
        }
    }

    /// Answers a write of which nothing more is to be appended, and that does not wait for the log.
    pub(super) fn end_ticket(&mut self, id: u64, result: Result<Outcome, IoError>) {
        if let Some(token) = self.tickets.remove(&id).and_then(|ticket| ticket.token) {
            self.complete(token, result);
        }
    }

    fn append_merge(&mut self, mut merge: Merge) -> Option<Append> {
        let (lba, blocks) = blocks_of(merge.offset, merge.data.len() as u64);
        if !self.make_room(blocks as usize) {
            return Some(Append::Merge(merge));
        }
        let start = within_block(merge.offset);
        let end = start + merge.data.len();
        let mut buf = AlignedBuf::zeroed(blocks as usize * BLOCK);
        let mut edges = Vec::with_capacity(2);
        if merge.expected.is_some() {
            edges.extend(0..blocks as usize);
        } else if start > 0 {
            edges.push(0);
        }
        if merge.expected.is_none() && !end.is_multiple_of(BLOCK) && (blocks > 1 || start == 0) {
            edges.push(blocks as usize - 1);
        }
        let (mut found, mut missing) = (Vec::new(), Vec::new());
        for edge in edges {
            let at = lba + edge as u64;
            let own = &mut buf[edge * BLOCK..(edge + 1) * BLOCK];
            match self.peek(at, own) {
                Ok(()) => found.push(edge),
                Err(from) => match merge.known.iter().find(|(l, _)| *l == at) {
                    // Nothing was accepted for it since, so what stood there then still does.
                    Some((_, block)) if self.unchanged_since(at, merge.since) => {
                        own.copy_from_slice(&block[..]);
                        found.push(edge);
                    }
                    _ => missing.push((at, from)),
                },
            }
        }
        if !missing.is_empty() {
            let block = |edge: usize| {
                let mut block = Box::new([0; BLOCK]);
                block.copy_from_slice(&buf[edge * BLOCK..(edge + 1) * BLOCK]);
                (lba + edge as u64, block)
            };
            merge.known = found.into_iter().map(block).collect();
            self.fetch_edges(merge, missing);
            return None;
        }
        if merge.expected.is_some_and(|expected| buf[start..end] != expected[..]) {
            self.end_ticket(merge.ticket, Ok(Outcome::Mismatch));
            return None;
        }
        buf[start..end].copy_from_slice(&merge.data);
        merge.data = Vec::new();
        self.append(Append::Data { ticket: merge.ticket, lba, data: Slice::from(buf) })
    }

    /// Whether nothing was accepted for a block after `since`. May say no without need, never yes without right.
    pub(super) fn unchanged_since(&self, lba: Lba, since: Lsn) -> bool {
        match self.dirty.get(lba) {
            Some((lsn, _)) => lsn <= since,
            None => self.purged_lsn <= since,
        }
    }

    /// Fetches what is not known of a merge's blocks; what is known must stand there now.
    fn fetch_edges(&mut self, mut merge: Merge, missing: Vec<(Lba, Origin)>) {
        merge.since = self.log.accepted_lsn();
        merge.fetching = missing.iter().map(|(lba, _)| *lba).collect();
        let later = std::mem::take(&mut merge.failed);
        let pins = self.pin_all(missing.iter().map(|(lba, _)| *lba));
        let parts =
            missing.into_iter().enumerate().map(|(at, (_, from))| Missing { at, blocks: 1, from }).collect::<Vec<_>>();
        let id = self.id_for();
        let data = AlignedBuf::zeroed(parts.len() * BLOCK);
        let backend = self.backend.clone();
        self.spawn(async move {
            let result = if later { backend.fetch_later(data, parts).await } else { backend.fetch(data, parts).await };
            Done::Read { id, result }
        });
        self.reads.insert(id, PendingRead::for_merge(merge, pins));
    }

    pub(super) fn edges_fetched(&mut self, mut merge: Merge, result: Result<Bytes, FetchError>) {
        let error = match result {
            _ if self.state != State::Open => IoError::Shutdown,
            Ok(data) => {
                for (lba, bytes) in std::mem::take(&mut merge.fetching).into_iter().zip(data.chunks_exact(BLOCK)) {
                    let mut block = Box::new([0; BLOCK]);
                    block.copy_from_slice(bytes);
                    merge.known.push((lba, block));
                }
                return self.append_again(merge);
            }
            // A write never fails because the bucket is away; it waits. Where each block is to be found is looked at anew: one
            // that was written meanwhile is no longer what the table says.
            Err(error) if error.bucket => {
                merge.fetching.clear();
                merge.failed = true;
                return self.append_again(merge);
            }
            Err(error) => {
                let (offset, message) = (merge.offset, &error.message);
                tracing::error!(volume = %self.name, offset, "write to a part of a block failed: its rest cannot be read: {message}");
                IoError::Read(error.message)
            }
        };
        self.end_ticket(merge.ticket, Err(error));
    }

    fn append_again(&mut self, merge: Merge) {
        if let Some(append) = self.append(Append::Merge(merge)) {
            self.waiting.push_front(append);
        }
    }
}
