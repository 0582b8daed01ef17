//! A device in memory: the protocol's ceiling for measurements, and a stand-in for tests.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};

use bytes::Bytes;

use super::device::Device;
use super::log_io::writes_durably;
use crate::buf::{ArenaWriter, Slice};
use crate::outgoing::Outgoing;
use crate::types::BLOCK;
use crate::volume::{
    Allocation, Completion, Effect, ExtentStatus, IoError, JobDone, LogIo, LogOp, Outcome, ReadData, ReadNow, Token,
    WriteData,
};

/// Bytes of the toy log that are written round and round.
const LOG_BYTES: u64 = 64 << 20;

/// Memory that behaves like a volume: whole blocks are data, zero or hole; requests may be of any size and place.
///
/// With a log file it also does what a volume does to be durable: the writes of a turn go to the file as one frame,
/// FLUSH and FUA wait for it to be on the medium. Nothing ever reads that log.
pub struct RamDevice {
    data: Vec<u8>,
    blocks: Vec<Allocation>,
    read_only: bool,
    /// Reads are answered by a completion instead of at once.
    late_reads: bool,
    effects: VecDeque<Effect>,
    closing: bool,
    log: Option<Log>,
}

/// A log in the way of the real one, without its contents' meaning.
struct Log {
    fd: OwnedFd,
    /// See [`writes_durably`]; otherwise a sync follows.
    durable_writes: bool,
    head: u64,
    next_id: u64,
    frame: Vec<Slice>,
    arena: ArenaWriter,
    /// Answered when the frame being filled is written, or, if so marked, durable.
    waiting: Vec<(Token, bool)>,
    /// Frames that are being written; a sync that covers them follows.
    running: VecDeque<(u64, Vec<(Token, bool)>)>,
    /// Wait for the next sync to begin.
    unsynced: Vec<Token>,
    /// The sync that runs.
    syncing: Option<(u64, Vec<Token>)>,
}

impl RamDevice {
    /// `size` bytes of hole.
    pub fn new(size: usize) -> Self {
        Self {
            data: vec![0; size],
            blocks: vec![Allocation::Hole; size.div_ceil(BLOCK)],
            read_only: false,
            late_reads: false,
            effects: VecDeque::new(),
            closing: false,
            log: None,
        }
    }

    /// Answers reads by completions, to exercise that path.
    pub fn with_late_reads(mut self) -> Self {
        self.late_reads = true;
        self
    }

    /// Refuses writes.
    pub fn read_only(mut self) -> Self {
        self.read_only = true;
        self
    }

    /// Writes go through the log file `fd` first.
    pub fn with_log(mut self, fd: OwnedFd) -> Self {
        self.log = Some(Log {
            durable_writes: writes_durably(fd.as_fd()),
            fd,
            head: 0,
            next_id: 0,
            frame: Vec::new(),
            arena: ArenaWriter::with_capacity(4 << 20),
            waiting: Vec::new(),
            running: VecDeque::new(),
            unsynced: Vec::new(),
            syncing: None,
        });
        self
    }

    /// The bytes, for tests to look at.
    pub fn contents(&self) -> &[u8] {
        &self.data
    }

    fn complete(&mut self, token: Token, result: Result<Outcome, IoError>) {
        self.effects.push_back(Effect::Complete(Completion { token, result }));
    }

    fn range(&self, offset: u64, len: u64) -> Result<std::ops::Range<usize>, IoError> {
        match offset.checked_add(len) {
            Some(end) if end <= self.data.len() as u64 => Ok(offset as usize..end as usize),
            _ => Err(IoError::OutOfRange),
        }
    }

    fn writable(&self, offset: u64, len: u64) -> Result<std::ops::Range<usize>, IoError> {
        if self.closing {
            Err(IoError::Shutdown)
        } else if self.read_only {
            Err(IoError::ReadOnly)
        } else {
            self.range(offset, len)
        }
    }

    fn holes(&self, range: &std::ops::Range<usize>) -> Vec<(usize, usize)> {
        let mut holes: Vec<(usize, usize)> = Vec::new();
        let mut at = range.start;
        while at < range.end {
            let end = (at / BLOCK * BLOCK + BLOCK).min(range.end);
            if self.blocks[at / BLOCK] == Allocation::Hole {
                match holes.last_mut() {
                    Some((start, len)) if *start + *len == at - range.start => *len += end - at,
                    _ => holes.push((at - range.start, end - at)),
                }
            }
            at = end;
        }
        holes
    }

    /// Zeroes a range; whole blocks in it become `kind`, partly covered holes stay what they are.
    fn clear(&mut self, range: std::ops::Range<usize>, kind: Allocation) {
        self.data[range.clone()].fill(0);
        let last = if range.end == self.data.len() { self.blocks.len() } else { range.end / BLOCK };
        for block in range.start.div_ceil(BLOCK)..last {
            self.blocks[block] = kind;
        }
    }

    /// Answers a change now, or when the log has it.
    fn changed(&mut self, token: Token, payload: Option<&[u8]>, fua: bool) {
        let Some(log) = &mut self.log else {
            self.complete(token, Ok(Outcome::Done));
            return;
        };
        log.append(payload.unwrap_or(&[0; 1]));
        log.waiting.push((token, fua));
    }
}

impl Log {
    fn append(&mut self, payload: &[u8]) {
        // A block for the frame's header, then whole blocks of payload.
        for (part, extra) in [(&[][..], self.frame.is_empty()), (payload, true)] {
            let len = part.len().max(1).next_multiple_of(BLOCK);
            if !extra {
                continue;
            }
            if self.arena.room() < len {
                self.arena = ArenaWriter::with_capacity(len.max(4 << 20));
            }
            let slice = self.arena.append_with(len, |tail| {
                let (head, padding) = tail.split_at_mut(part.len());
                head.copy_from_slice(part);
                padding.fill(0);
            });
            match self.frame.last().and_then(|last| last.joined(&slice)) {
                Some(joined) => *self.frame.last_mut().expect("just seen") = joined,
                None => self.frame.push(slice),
            }
        }
    }

    fn advance(&mut self, effects: &mut VecDeque<Effect>) {
        // One frame at a time: what comes meanwhile shares the next one.
        if !self.frame.is_empty() && self.running.is_empty() {
            let bufs = std::mem::take(&mut self.frame);
            let len: usize = bufs.iter().map(|buf| buf.len()).sum();
            if self.head + len as u64 > LOG_BYTES {
                self.head = 0;
            }
            let waiting = std::mem::take(&mut self.waiting);
            let dsync = self.durable_writes && waiting.iter().any(|(_, durable)| *durable);
            let id = self.id();
            let op = LogOp::Write { segment: 0, offset: self.head, bufs, dsync };
            effects.push_back(Effect::Log(LogIo { id, op }));
            self.head += len as u64;
            self.running.push_back((id, waiting));
        }
        if self.syncing.is_none() && self.running.is_empty() && !self.unsynced.is_empty() {
            let id = self.id();
            effects.push_back(Effect::Log(LogIo { id, op: LogOp::Sync { segment: 0 } }));
            self.syncing = Some((id, std::mem::take(&mut self.unsynced)));
        }
    }

    fn id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }
}

impl Device for RamDevice {
    fn size(&self) -> u64 {
        self.data.len() as u64
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn read(&mut self, token: Token, offset: u64, len: u32, out: &mut Outgoing) -> ReadNow {
        let range = match self.range(offset, len.into()) {
            Ok(range) => range,
            Err(error) => return ReadNow::Failed(error),
        };
        let holes = self.holes(&range);
        if self.late_reads {
            let bytes = Bytes::copy_from_slice(&self.data[range]).into();
            self.complete(token, Ok(Outcome::Data(ReadData { bytes, holes })));
            return ReadNow::Pending;
        }
        out.extend_from_slice(&self.data[range]);
        ReadNow::Ready { holes }
    }

    fn write(&mut self, token: Token, offset: u64, data: WriteData<'_>, fua: bool) {
        let bytes = match &data {
            WriteData::Copy(bytes) => bytes,
            WriteData::Owned(buf, len) => &buf[..*len],
        };
        match self.writable(offset, bytes.len() as u64) {
            Ok(range) => {
                for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
                    self.blocks[block] = Allocation::Data;
                }
                self.data[range].copy_from_slice(bytes);
                self.changed(token, Some(bytes), fua);
            }
            Err(error) => self.complete(token, Err(error)),
        }
    }

    fn compare_write(&mut self, token: Token, offset: u64, expected: Vec<u8>, data: Vec<u8>, fua: bool) {
        match self.writable(offset, data.len() as u64) {
            Ok(range) if self.data[range.clone()] != expected[..] => self.complete(token, Ok(Outcome::Mismatch)),
            Ok(_) => self.write(token, offset, WriteData::Copy(&data), fua),
            Err(error) => self.complete(token, Err(error)),
        }
    }

    fn zero(&mut self, token: Token, offset: u64, len: u64, fua: bool, no_hole: bool) {
        match self.writable(offset, len) {
            Ok(range) => {
                self.clear(range, if no_hole { Allocation::Zero } else { Allocation::Hole });
                self.changed(token, None, fua);
            }
            Err(error) => self.complete(token, Err(error)),
        }
    }

    fn copy(&mut self, token: Token, from: u64, to: u64, len: u64, fua: bool) {
        let whole = [from, to, len].iter().all(|bytes| bytes.is_multiple_of(BLOCK as u64));
        match self.range(from, len) {
            Ok(_) if !whole || (from < to + len && to < from + len) => {
                self.complete(token, Err(IoError::Invalid("a copy is of whole blocks that do not overlap")));
            }
            Ok(range) => {
                let bytes = self.data[range].to_vec();
                self.write(token, to, WriteData::Copy(&bytes), fua);
            }
            Err(error) => self.complete(token, Err(error)),
        }
    }

    fn trim(&mut self, token: Token, offset: u64, len: u64, fua: bool) {
        self.zero(token, offset, len, fua, false);
    }

    fn flush(&mut self, token: Token) {
        match &mut self.log {
            None => self.complete(token, Ok(Outcome::Done)),
            Some(log) if log.waiting.is_empty() => log.unsynced.push(token),
            Some(log) => log.waiting.push((token, true)),
        }
    }

    fn extents(&mut self, token: Token, offset: u64, len: u64, max: usize) {
        let result = self.range(offset, len).map(|range| {
            let mut extents: Vec<ExtentStatus> = Vec::new();
            let mut at = range.start;
            while at < range.end {
                let allocation = self.blocks[at / BLOCK];
                let end = (at / BLOCK * BLOCK + BLOCK).min(range.end);
                let len = (end - at) as u64;
                let full = extents.len() == max;
                match extents.last_mut() {
                    Some(last) if last.allocation == allocation => last.len += len,
                    _ if full => break,
                    _ => extents.push(ExtentStatus { len, allocation }),
                }
                at = end;
            }
            Outcome::Extents(extents)
        });
        self.complete(token, result);
    }

    fn prefetch(&mut self, token: Token, offset: u64, len: u64) {
        let result = self.range(offset, len).map(|_| Outcome::Done);
        self.complete(token, result);
    }

    fn advance(&mut self, _now_us: u64) {
        if let Some(log) = &mut self.log {
            log.advance(&mut self.effects);
        }
    }

    fn next_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }

    fn log_handed(&mut self, _: u64) {}
    fn log_done(&mut self, id: u64, result: io::Result<()>) {
        let Some(log) = &mut self.log else {
            return;
        };
        let result = result.map_err(|error| IoError::LogDead(error.to_string().into()));
        let mut answers = Vec::new();
        match log.running.pop_front() {
            Some((first, waiting)) if first == id => {
                for (token, durable) in waiting {
                    if durable && !log.durable_writes && result.is_ok() {
                        log.unsynced.push(token);
                    } else {
                        answers.push(token);
                    }
                }
            }
            other => log.running.extend(other),
        }
        if let Some((_, waiting)) = log.syncing.take_if(|(sync, _)| *sync == id) {
            answers.extend(waiting);
        }
        for token in answers {
            self.complete(token, result.clone().map(|()| Outcome::Done));
        }
    }

    fn job_done(&mut self, _done: JobDone) {}

    fn deadline_us(&self) -> Option<u64> {
        None
    }

    fn close(&mut self) {
        self.closing = true;
    }

    fn closed(&self) -> bool {
        let quiet = |log: &Log| {
            log.waiting.is_empty() && log.running.is_empty() && log.unsynced.is_empty() && log.syncing.is_none()
        };
        self.closing && self.effects.is_empty() && self.log.as_ref().is_none_or(quiet)
    }

    fn log_fd(&self, _segment: u32) -> RawFd {
        self.log.as_ref().map_or(-1, |log| log.fd.as_raw_fd())
    }

    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
