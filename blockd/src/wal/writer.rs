//! The appending side of the log: a state machine that collects records into frames, places frames in segments and
//! follows what has been written and what is durable. It performs no I/O; it emits [`LogIo`]s and is told when they
//! are done.
//!
//! Order of durability: a frame is *kept* once the kernel is at work on it, on every earlier one and on its segment's
//! header: the end of this process does not stop that. A segment's header is written durably before any frame of that
//! segment counts as written; a frame counts as written only after every earlier one; the durable horizon covers a frame once the frame was
//! written with DSYNC, or an fdatasync that was started after its completion has ended.

use std::collections::VecDeque;
use std::io;
use std::sync::Arc;

use super::format::{
    ChainLink, FRAME_BLOCKS_MAX, FRAME_RECORDS_MAX, FrameHeader, Record, RecordKind, SegmentHeader, block_sum,
    header_blocks,
};
use super::scan::Recovered;
use crate::buf::{AlignedBuf, ArenaWriter, Slice};
use crate::types::{BLOCK, BLOCK_SIZE, Lba, Lsn, VolumeId};
use crate::volume::{LogIo, LogOp};

/// Free segments kept ready, as long as the limit allows.
const SEGMENTS_AHEAD: usize = 2;
/// Memory is taken from the allocator in pieces of this size.
const ARENA_BYTES: usize = 1 << 20;

/// Fixed properties of a log.
#[derive(Clone, Copy, Debug)]
pub struct LogOptions {
    /// The volume.
    pub volume: VolumeId,
    /// Epoch of its present owner.
    pub epoch: u64,
    /// Size of a segment in bytes.
    pub segment_bytes: u64,
    /// Most segments.
    pub segments_max: u32,
}

/// Where a record's payload went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placed {
    /// Its LSN.
    pub lsn: Lsn,
    /// Number of its frame; frames are numbered from 1 in order.
    pub frame: u64,
    /// First payload block within the frame.
    pub block: u32,
}

/// A frame and, while there is memory for it, its payload.
#[derive(Debug)]
pub struct Frame {
    /// LSN of its first record.
    pub first_lsn: Lsn,
    /// What it recorded.
    pub records: Arc<[Record]>,
    /// When it was sealed, driver clock.
    pub time_us: u64,
    /// Payload blocks.
    pub blocks: u32,
    sums: Arc<[u64]>,
    parts: Vec<Slice>,
    segment: u32,
    payload_offset: u64,
    written: bool,
    durable: bool,
    pins: u32,
}

impl Frame {
    /// LSN of the last record.
    pub fn last_lsn(&self) -> Lsn {
        self.first_lsn + self.records.len() as u64 - 1
    }

    /// Where `blocks` payload blocks from `block` on can be read.
    pub fn payload(&self, block: u32, blocks: u32) -> Payload {
        assert!(block + blocks <= self.blocks, "payload range outside the frame");
        if self.parts.is_empty() {
            return Payload::Logged(LoggedPayload {
                segment: self.segment,
                offset: self.payload_offset + u64::from(block) * BLOCK_SIZE,
                sums: self.sums.clone(),
                first: block as usize,
                blocks: blocks as usize,
            });
        }
        let (mut from, mut left) = (block as usize * BLOCK, blocks as usize * BLOCK);
        let mut found = Vec::with_capacity(1);
        for part in &self.parts {
            if left == 0 {
                break;
            }
            if from >= part.len() {
                from -= part.len();
                continue;
            }
            let n = left.min(part.len() - from);
            found.push(part.slice(from..from + n));
            left -= n;
            from = 0;
        }
        Payload::Memory(found)
    }
}

/// Payload of a frame, wherever it is.
#[derive(Clone, Debug)]
pub enum Payload {
    /// In memory, in order.
    Memory(Vec<Slice>),
    /// Only in the log.
    Logged(LoggedPayload),
}

/// A place in the log, with what is needed to verify it.
#[derive(Clone, Debug)]
pub struct LoggedPayload {
    /// Segment number.
    pub segment: u32,
    /// Byte offset within the segment.
    pub offset: u64,
    /// Number of blocks.
    pub blocks: usize,
    sums: Arc<[u64]>,
    first: usize,
}

impl LoggedPayload {
    /// `blocks` blocks from block `first` on of a frame whose payload begins at `payload` of `segment` and has `sums`.
    pub fn new(segment: u32, payload: u64, sums: Arc<[u64]>, first: usize, blocks: usize) -> Self {
        Self { segment, offset: payload + first as u64 * BLOCK_SIZE, blocks, sums, first }
    }

    /// Reads and verifies the payload. Blocking.
    pub fn read(&self, device: &dyn super::device::LogDevice) -> io::Result<AlignedBuf> {
        let mut buf = AlignedBuf::zeroed(self.blocks * BLOCK);
        device.read(self.segment, self.offset, &mut buf)?;
        for (i, (block, &sum)) in buf.chunks_exact(BLOCK).zip(&self.sums[self.first..]).enumerate() {
            if block_sum(block) != sum {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    format!(
                        "log segment {} is damaged at byte {}: checksum mismatch",
                        device.describe(self.segment),
                        self.offset + i as u64 * BLOCK_SIZE
                    ),
                ));
            }
        }
        Ok(buf)
    }
}

/// What the pending operation with this id is.
#[derive(Debug)]
enum Pending {
    SegmentHeader { done: bool, handed: bool },
    Frame { number: u64, last_lsn: Lsn, done: bool, handed: bool, dsync: bool },
}

impl Pending {
    /// Whether the end of this process cannot keep it from reaching the device.
    fn kept(&self) -> bool {
        let (Pending::SegmentHeader { done, handed } | Pending::Frame { done, handed, .. }) = self;
        *done || *handed
    }
}

#[derive(Debug, Default)]
struct Open {
    records: Vec<Record>,
    sums: Vec<u64>,
    parts: Vec<Slice>,
    blocks: usize,
}

#[derive(Debug)]
struct UsedSegment {
    segment: u32,
    /// Number of the first frame in it.
    first_frame: u64,
}

#[derive(Debug)]
struct Sync {
    ids: Vec<u64>,
    covers: u64,
}

/// The log of an open volume.
#[derive(Debug)]
pub struct LogWriter {
    options: LogOptions,
    anchor: u64,
    generation: u64,
    segment: u32,
    /// Next free byte of the current segment.
    offset: u64,
    used: VecDeque<UsedSegment>,
    free: VecDeque<u32>,
    segments: u32,
    /// Segments there may be at present.
    limit: u32,
    arena: Option<ArenaWriter>,
    open: Open,
    /// Sealed frames that are not yet destaged, oldest first.
    frames: VecDeque<Frame>,
    /// Number of `frames[0]`.
    base: u64,
    /// Operations in the order of their LSNs, for the written horizon.
    pending: VecDeque<(u64, Pending)>,
    next_id: u64,
    next_lsn: Lsn,
    /// Number of the last frame that counts as written, and as durable.
    written: u64,
    durable: u64,
    kept_lsn: Lsn,
    written_lsn: Lsn,
    durable_lsn: Lsn,
    /// Durable horizon recorded in the newest frame.
    recorded_lsn: Lsn,
    sync: Option<Sync>,
    /// Frames below this have no payload in memory.
    spilled: u64,
    memory: usize,
    dead: Option<Arc<str>>,
    frames_written: u64,
    syncs: u64,
}

impl LogWriter {
    /// Continues a recovered log in a fresh segment. Returns the writer and the header block which the caller must
    /// make durable at offset 0 of segment [`LogWriter::current_segment`], after it has made the needed segments
    /// durable, before anything else is done.
    ///
    /// # Panics
    /// When `recovered` names no free segment; the caller creates one first.
    pub fn open(options: LogOptions, mut recovered: Recovered, segments: u32) -> (Self, AlignedBuf) {
        assert!(options.segment_bytes >= 256 * 1024, "a segment holds at least a few frames");
        let generation = recovered.generation + 1;
        assert!(!recovered.free.is_empty(), "a log is opened with at least one free segment");
        let segment = recovered.free.remove(0);
        let header = SegmentHeader {
            segment,
            volume: options.volume,
            generation,
            anchor: generation,
            epoch: options.epoch,
            first_lsn: recovered.last_lsn + 1,
            durable_lsn: recovered.last_lsn,
            prev_end: 0,
            segment_bytes: options.segment_bytes,
            chain: recovered
                .needed
                .iter()
                .map(|n| ChainLink { generation: n.generation.into(), end: n.end.into() })
                .collect(),
        };
        let mut block = AlignedBuf::zeroed(BLOCK);
        header.encode(&mut block);
        let mut used = VecDeque::new();
        let mut frames = VecDeque::new();
        for found in recovered.frames {
            let number = frames.len() as u64 + 1;
            if used.back().is_none_or(|u: &UsedSegment| u.segment != found.segment) {
                used.push_back(UsedSegment { segment: found.segment, first_frame: number });
            }
            frames.push_back(Frame {
                first_lsn: found.header.first_lsn,
                time_us: 0,
                blocks: found.header.sums.len() as u32,
                records: found.header.records.into(),
                sums: found.header.sums.into(),
                parts: Vec::new(),
                segment: found.segment,
                payload_offset: found.payload_offset,
                written: true,
                durable: true,
                pins: 0,
            });
        }
        let last = frames.len() as u64;
        used.push_back(UsedSegment { segment, first_frame: last + 1 });
        let writer = Self {
            options,
            anchor: generation,
            generation,
            segment,
            offset: BLOCK_SIZE,
            used,
            free: recovered.free.into(),
            segments,
            limit: options.segments_max,
            arena: None,
            open: Open::default(),
            frames,
            base: 1,
            pending: VecDeque::new(),
            next_id: 1,
            next_lsn: recovered.last_lsn + 1,
            written: last,
            durable: last,
            kept_lsn: recovered.last_lsn,
            written_lsn: recovered.last_lsn,
            durable_lsn: recovered.last_lsn,
            recorded_lsn: recovered.last_lsn,
            sync: None,
            spilled: last + 1,
            memory: 0,
            dead: None,
            frames_written: 0,
            syncs: 0,
        };
        (writer, block)
    }

    /// The segment being filled.
    pub fn current_segment(&self) -> u32 {
        self.segment
    }

    /// LSN of the last accepted record.
    pub fn accepted_lsn(&self) -> Lsn {
        self.next_lsn - 1
    }

    /// Everything up to here survives a crash of the process.
    pub fn written_lsn(&self) -> Lsn {
        self.written_lsn
    }

    /// Everything up to here survives the end of this process: it is written, or the kernel is at work on it.
    pub fn kept_lsn(&self) -> Lsn {
        self.kept_lsn
    }

    /// Everything up to here survives a power cut.
    pub fn durable_lsn(&self) -> Lsn {
        self.durable_lsn
    }

    /// Number of the last frame that counts as written.
    pub fn written_frame(&self) -> u64 {
        self.written
    }

    /// Why the log is dead, if it is.
    pub fn dead(&self) -> Option<&Arc<str>> {
        self.dead.as_ref()
    }

    /// Bytes of payload memory held.
    pub fn memory(&self) -> usize {
        self.memory
    }

    /// Frames written and fdatasyncs done since opening.
    pub fn counters(&self) -> (u64, u64) {
        (self.frames_written, self.syncs)
    }

    /// Frames on their way to the device.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Whether an fdatasync is on its way.
    pub fn syncing(&self) -> bool {
        self.sync.is_some()
    }

    /// Payload blocks waiting in the open frame; 0 also when only records without payload wait.
    pub fn open_blocks(&self) -> usize {
        self.open.blocks
    }

    /// Payload blocks that were accepted and do not count as written yet.
    pub fn unwritten_blocks(&self) -> usize {
        let sealed = (self.written + 1).max(self.base)..self.base + self.frames.len() as u64;
        sealed.map(|number| self.frame(number).blocks as usize).sum::<usize>() + self.open.blocks
    }

    /// Whether the open frame holds any record.
    pub fn has_open_records(&self) -> bool {
        !self.open.records.is_empty()
    }

    /// Bytes of log in use and the most that may be.
    pub fn usage(&self) -> (u64, u64) {
        let full = (self.used.len() as u64).saturating_sub(1) * self.options.segment_bytes;
        (full + self.offset, u64::from(self.limit) * self.options.segment_bytes)
    }

    /// Most payload blocks a frame of this log takes.
    pub fn frame_blocks_max(&self) -> usize {
        FRAME_BLOCKS_MAX.min(self.options.segment_bytes as usize / BLOCK / 4)
    }

    /// Whether a record with `blocks` payload blocks fits into the open frame.
    pub fn fits(&self, blocks: usize) -> bool {
        self.open.records.len() < FRAME_RECORDS_MAX && self.open.blocks + blocks <= self.frame_blocks_max()
    }

    /// Whether the open frame could be placed now.
    pub fn can_seal(&self) -> bool {
        self.dead.is_none() && (self.room_for_open() || !self.free.is_empty())
    }

    fn room_for_open(&self) -> bool {
        let blocks = header_blocks(self.open.records.len(), self.open.blocks) + self.open.blocks;
        self.offset + blocks as u64 * BLOCK_SIZE <= self.options.segment_bytes
    }

    /// The number of a segment that should be created soon, if the limit allows one. Zeroing one takes about as long as
    /// filling one, so a writer in a hurry would wait for each if they were not made ahead.
    pub fn wants_segment(&self) -> Option<u32> {
        (self.free.len() < SEGMENTS_AHEAD && self.segments < self.limit).then_some(self.segments)
    }

    /// A segment asked for by [`LogWriter::wants_segment`] exists now.
    pub fn segment_created(&mut self, segment: u32) {
        self.segments = self.segments.max(segment + 1);
        self.free.push_back(segment);
    }

    /// Asks for no more segments than exist, because the device has no room for more.
    pub fn limit_segments(&mut self) {
        self.limit = self.segments;
    }

    /// Undoes [`LogWriter::limit_segments`]. Returns the number of the segment that showed the limit, if one did.
    pub fn lift_limit(&mut self) -> Option<u32> {
        let limited = self.limit < self.options.segments_max;
        self.limit = self.options.segments_max;
        limited.then_some(self.segments)
    }

    /// Adds a data record whose bytes are copied. The caller has checked [`LogWriter::fits`].
    pub fn append_copy(&mut self, lba: Lba, data: &[u8]) -> Placed {
        let slice = self.arena(data.len()).append_with(data.len(), |room| room.copy_from_slice(data));
        self.append_slice(lba, slice)
    }

    /// Adds a data record without copying. The caller has checked [`LogWriter::fits`].
    pub fn append_slice(&mut self, lba: Lba, data: Slice) -> Placed {
        assert!(!data.is_empty() && data.len().is_multiple_of(BLOCK), "payload is whole blocks");
        let blocks = data.len() / BLOCK;
        let at = self.open.blocks as u32;
        self.open.sums.extend(data.chunks_exact(BLOCK).map(block_sum));
        self.memory += data.len();
        match self.open.parts.last().and_then(|last| last.joined(&data)) {
            Some(joined) => *self.open.parts.last_mut().expect("just seen") = joined,
            None => self.open.parts.push(data),
        }
        self.open.blocks += blocks;
        self.append_record(Record { lba, blocks: blocks as u64, kind: RecordKind::Data { at } }, at)
    }

    /// Adds a trim or zero record.
    pub fn append_zero(&mut self, lba: Lba, blocks: u64, allocated: bool) -> Placed {
        self.append_record(Record { lba, blocks, kind: RecordKind::Zero { allocated } }, 0)
    }

    /// Adds a reference to `blocks` payload blocks of the chunk `seq`, from `index` on.
    pub fn append_refer(&mut self, lba: Lba, blocks: u64, seq: u64, index: u16) -> Placed {
        self.append_record(Record { lba, blocks, kind: RecordKind::Refer { seq, index } }, 0)
    }

    fn append_record(&mut self, record: Record, block: u32) -> Placed {
        self.open.records.push(record);
        let lsn = self.next_lsn;
        self.next_lsn += 1;
        Placed { lsn, frame: self.base + self.frames.len() as u64, block }
    }

    fn arena(&mut self, bytes: usize) -> &mut ArenaWriter {
        if self.arena.as_ref().is_none_or(|a| a.room() < bytes) {
            self.arena = Some(ArenaWriter::with_capacity(ARENA_BYTES.max(bytes)));
        }
        self.arena.as_mut().expect("just set")
    }

    /// Places the open frame, which may be empty, and emits its write. The caller has checked [`LogWriter::can_seal`].
    pub fn seal(&mut self, now_us: u64, wall_ms: u64, dsync: bool, out: &mut Vec<LogIo>) {
        if !self.room_for_open() {
            self.next_segment(out);
        }
        let open = std::mem::take(&mut self.open);
        let first_lsn = self.next_lsn - open.records.len() as u64;
        let header = FrameHeader {
            generation: self.generation,
            offset: self.offset,
            epoch: self.options.epoch,
            first_lsn,
            durable_lsn: self.durable_lsn,
            time_ms: wall_ms,
            records: open.records,
            sums: open.sums,
        };
        self.recorded_lsn = self.durable_lsn;
        let bytes = header.header_blocks() * BLOCK;
        let mut bufs = Vec::with_capacity(1 + open.parts.len());
        bufs.push(self.arena(bytes).append_with(bytes, |room| header.encode(room)));
        bufs.extend(open.parts.iter().cloned());
        let number = self.base + self.frames.len() as u64;
        let payload_offset = self.offset + bytes as u64;
        let last_lsn = self.next_lsn - 1;
        let id = self.issue(Pending::Frame { number, last_lsn, done: false, handed: false, dsync });
        out.push(LogIo { id, op: LogOp::Write { segment: self.segment, offset: self.offset, bufs, dsync } });
        self.offset += header.total_blocks() as u64 * BLOCK_SIZE;
        self.frames_written += 1;
        self.frames.push_back(Frame {
            first_lsn,
            time_us: now_us,
            blocks: header.sums.len() as u32,
            records: header.records.into(),
            sums: header.sums.into(),
            parts: open.parts,
            segment: self.segment,
            payload_offset,
            written: false,
            durable: false,
            pins: 0,
        });
    }

    fn next_segment(&mut self, out: &mut Vec<LogIo>) {
        let segment = self.free.pop_front().expect("can_seal was checked");
        let prev_end = self.offset;
        self.generation += 1;
        self.segment = segment;
        self.offset = BLOCK_SIZE;
        let header = SegmentHeader {
            segment,
            volume: self.options.volume,
            generation: self.generation,
            anchor: self.anchor,
            epoch: self.options.epoch,
            first_lsn: self.next_lsn - self.open.records.len() as u64,
            durable_lsn: self.durable_lsn,
            prev_end,
            segment_bytes: self.options.segment_bytes,
            chain: Vec::new(),
        };
        let slice = self.arena(BLOCK).append_with(BLOCK, |room| header.encode(room));
        let id = self.issue(Pending::SegmentHeader { done: false, handed: false });
        out.push(LogIo { id, op: LogOp::Write { segment, offset: 0, bufs: vec![slice], dsync: true } });
        self.used.push_back(UsedSegment { segment, first_frame: self.base + self.frames.len() as u64 });
    }

    fn issue(&mut self, pending: Pending) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        self.pending.push_back((id, pending));
        id
    }

    /// Starts an fdatasync of everything written and not yet durable, unless one is on its way or none is needed.
    /// Returns whether one was started.
    pub fn sync(&mut self, out: &mut Vec<LogIo>) -> bool {
        if self.sync.is_some() || self.written == self.durable || self.dead.is_some() {
            return false;
        }
        let mut segments: Vec<u32> = Vec::with_capacity(2);
        for number in self.durable + 1..=self.written {
            let segment = self.frame(number).segment;
            if segments.last() != Some(&segment) {
                segments.push(segment);
            }
        }
        let mut ids = Vec::with_capacity(segments.len());
        for segment in segments {
            ids.push(self.next_id);
            out.push(LogIo { id: self.next_id, op: LogOp::Sync { segment } });
            self.next_id += 1;
        }
        self.syncs += 1;
        self.sync = Some(Sync { ids, covers: self.written });
        true
    }

    /// The kernel is at work on a write: it will reach the device, unless that fails, even if this process ends now.
    pub fn handed(&mut self, id: u64) {
        if self.dead.is_some() {
            return;
        }
        if let Some((_, pending)) = self.pending.iter_mut().find(|(i, _)| *i == id) {
            let (Pending::SegmentHeader { handed, .. } | Pending::Frame { handed, .. }) = pending;
            *handed = true;
            self.advance_kept();
        }
    }

    fn advance_kept(&mut self) {
        for (_, pending) in &self.pending {
            if !pending.kept() {
                break;
            }
            if let Pending::Frame { last_lsn, .. } = pending {
                self.kept_lsn = self.kept_lsn.max(*last_lsn);
            }
        }
    }

    /// An operation ended. After any failure the log is dead: what was not acknowledged before never will be, and no
    /// fsync is retried, because the kernel may have dropped the pages it could not write.
    pub fn done(&mut self, id: u64, result: io::Result<()>) {
        if let Err(e) = result {
            self.dead.get_or_insert_with(|| e.to_string().into());
        }
        if self.dead.is_some() {
            return;
        }
        if let Some(sync) = &mut self.sync
            && let Some(at) = sync.ids.iter().position(|&i| i == id)
        {
            sync.ids.swap_remove(at);
            if sync.ids.is_empty() {
                let covers = sync.covers;
                self.sync = None;
                for number in self.durable + 1..=covers {
                    self.frame_mut(number).durable = true;
                }
                self.advance_durable();
            }
            return;
        }
        if let Some((_, pending)) = self.pending.iter_mut().find(|(i, _)| *i == id) {
            match pending {
                Pending::SegmentHeader { done, .. } | Pending::Frame { done, .. } => *done = true,
            }
        }
        self.advance_kept();
        while let Some((_, Pending::SegmentHeader { done: true, .. } | Pending::Frame { done: true, .. })) =
            self.pending.front()
        {
            if let Some((_, Pending::Frame { number, dsync, .. })) = self.pending.pop_front() {
                let frame = self.frame_mut(number);
                frame.written = true;
                frame.durable |= dsync;
                self.written_lsn = frame.last_lsn();
                self.written = number;
            }
        }
        self.advance_durable();
    }

    fn advance_durable(&mut self) {
        while self.durable < self.written && self.frame(self.durable + 1).durable {
            self.durable += 1;
            self.durable_lsn = self.frame(self.durable).last_lsn();
        }
    }

    /// Whether a frame that only repeats the durable horizon would say something new.
    pub fn horizon_unrecorded(&self) -> bool {
        self.recorded_lsn < self.durable_lsn
    }

    /// Whether every sealed frame is durable except the open one.
    pub fn all_durable(&self) -> bool {
        self.pending.is_empty() && self.written == self.durable
    }

    /// Numbers of the frames held, oldest first.
    pub fn frame_numbers(&self) -> std::ops::Range<u64> {
        self.base..self.base + self.frames.len() as u64
    }

    /// A frame held.
    ///
    /// # Panics
    /// When it was released or not sealed yet; the dirty map never refers to such a frame.
    pub fn frame(&self, number: u64) -> &Frame {
        &self.frames[(number - self.base) as usize]
    }

    fn frame_mut(&mut self, number: u64) -> &mut Frame {
        &mut self.frames[(number - self.base) as usize]
    }

    /// Payload of a frame, sealed or open.
    pub fn payload(&self, frame: u64, block: u32, blocks: u32) -> Payload {
        if frame < self.base + self.frames.len() as u64 {
            return self.frame(frame).payload(block, blocks);
        }
        let (mut from, mut left) = (block as usize * BLOCK, blocks as usize * BLOCK);
        let mut found = Vec::with_capacity(1);
        for part in &self.open.parts {
            if left > 0 && from < part.len() {
                let n = left.min(part.len() - from);
                found.push(part.slice(from..from + n));
                left -= n;
                from = 0;
            } else {
                from = from.saturating_sub(part.len());
            }
        }
        Payload::Memory(found)
    }

    /// Keeps a frame's place in the log from being recycled while somebody reads it.
    pub fn pin(&mut self, frame: u64) {
        if frame < self.base + self.frames.len() as u64 {
            self.frame_mut(frame).pins += 1;
        }
    }

    /// Undoes [`LogWriter::pin`].
    pub fn unpin(&mut self, frame: u64) {
        self.frame_mut(frame).pins -= 1;
    }

    /// Drops payload from memory, oldest first, until at most `budget` bytes are held. Only written frames qualify:
    /// they can be read from the log.
    pub fn spill(&mut self, budget: usize) {
        while self.memory > budget && self.spilled <= self.written {
            let number = self.spilled.max(self.base);
            if number > self.written {
                break;
            }
            let frame = self.frame_mut(number);
            let bytes: usize = frame.parts.iter().map(|p| p.len()).sum();
            frame.parts = Vec::new();
            self.memory -= bytes;
            self.spilled = number + 1;
        }
    }

    /// Lets go of the oldest frames, all of whose records are in the bucket because their LSNs reach up to `lsn` at
    /// most, and recycles their segments. Nothing may refer to them any more.
    pub fn release(&mut self, lsn: Lsn) {
        while let Some(frame) = self.frames.front() {
            if !frame.written || frame.last_lsn() > lsn || frame.pins > 0 {
                break;
            }
            if self.durable < self.base {
                // Never flushed here, but in the bucket: recovery starts after it.
                self.durable = self.base;
                self.durable_lsn = frame.last_lsn();
            }
            self.memory -= frame.parts.iter().map(|p| p.len()).sum::<usize>();
            self.frames.pop_front();
            self.base += 1;
        }
        while self.used.len() > 1 && self.used[1].first_frame <= self.base {
            let segment = self.used.pop_front().expect("two are there");
            self.free.push_back(segment.segment);
        }
    }
}
