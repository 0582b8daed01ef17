//! Destaging: cutting chunks from written frames, following them into the bucket and the translation table, and
//! letting go of what is there.
//!
//! Order: a chunk is cut from frames that are in the log; several chunks are put at once; the stored horizon and the
//! table advance only over a contiguous prefix; extents leave the dirty map after the table knows them; frames and log
//! segments are released after their extents left the dirty map.

use std::collections::VecDeque;
use std::sync::Arc;

use super::dirty::Source;
use super::engine::{State, Volume};
use super::job::{ChunkInput, FrameInput, Stopped, StoredChunk};
use crate::chunk::{ChunkIndex, ChunkName};
use crate::manifest::Durability;
use crate::table::Space;
use crate::types::{BLOCK, BLOCK_SIZE, Lsn};
use crate::wal::format::{Record, RecordKind};
use crate::wal::writer::Payload;

/// Extents moved out of the dirty map per call of advance, so that requests are not held up.
const PURGE_STEP: usize = 256;
/// Most records in one chunk, where references count twice.
const CHUNK_RECORDS_MAX: usize = 32_768;
/// Chunks on their way at once when flushes wait for the bucket; the most there may ever be.
pub(crate) const OBJECT_PUTS_MAX: usize = 16;
/// Extents up to this many blocks stay in the block cache when they leave the dirty map; streams would only flush it.
const CACHEABLE_BLOCKS: u64 = 16;

struct InFlight {
    seq: u64,
    first_lsn: Lsn,
    last_lsn: Lsn,
    /// Payload bytes logged for it.
    bytes: u64,
    oldest_us: u64,
    stored: Option<Arc<ChunkIndex>>,
}

struct Purge {
    index: Arc<ChunkIndex>,
    next: usize,
}

/// State of destaging.
pub(super) struct Destage {
    next_seq: u64,
    /// Number and first LSN of the first frame not yet in a chunk.
    cut_frame: u64,
    cut_lsn: Lsn,
    /// Payload bytes in written frames from `cut_frame` on.
    uncut_bytes: u64,
    /// Last frame counted in `uncut_bytes`.
    counted_frame: u64,
    /// Cut and not yet in the table, by seq.
    chunks: VecDeque<InFlight>,
    applying: bool,
    purges: VecDeque<Purge>,
    stored_lsn: Lsn,
}

impl Destage {
    /// Starts after the bucket's state, which ends with chunk `last_seq` and `last_lsn`.
    pub fn new(last_seq: u64, last_lsn: Lsn) -> Self {
        Self {
            next_seq: last_seq + 1,
            cut_frame: 1,
            cut_lsn: last_lsn + 1,
            uncut_bytes: 0,
            counted_frame: 0,
            chunks: VecDeque::new(),
            applying: false,
            purges: VecDeque::new(),
            stored_lsn: last_lsn,
        }
    }

    /// Everything up to here is in the bucket.
    pub fn stored_lsn(&self) -> Lsn {
        self.stored_lsn
    }

    /// Whether no chunk is on its way to the bucket or the table.
    pub fn is_empty(&self) -> bool {
        self.chunks.is_empty()
    }

    /// Whether extents wait to leave the dirty map.
    pub fn purging(&self) -> bool {
        !self.purges.is_empty()
    }
}

impl Volume {
    /// Counts frames that have become written.
    pub(super) fn frames_written(&mut self) {
        let d = &mut self.destage;
        while d.counted_frame < self.log.written_frame() {
            d.counted_frame += 1;
            d.uncut_bytes += u64::from(self.log.frame(d.counted_frame).blocks) * BLOCK_SIZE;
        }
    }

    pub(super) fn dirty_bytes(&self) -> u64 {
        let flying: u64 =
            self.destage.chunks.iter().filter(|c| c.last_lsn > self.destage.stored_lsn).map(|c| c.bytes).sum();
        self.destage.uncut_bytes + flying + (self.log.unwritten_blocks() * BLOCK) as u64
    }

    /// Age of the oldest write that is not in the bucket.
    pub(super) fn behind_us(&self) -> u64 {
        let flying = self.destage.chunks.iter().find(|c| c.last_lsn > self.destage.stored_lsn).map(|c| c.oldest_us);
        let oldest = flying.or_else(|| self.oldest_uncut_us());
        oldest.map_or(0, |at| self.now_us.saturating_sub(at))
    }

    /// Frames without records are released as soon as everything before them is, cut or not.
    fn first_uncut_frame(&self) -> u64 {
        self.destage.cut_frame.max(self.log.frame_numbers().start)
    }

    fn oldest_uncut_us(&self) -> Option<u64> {
        let frames = self.first_uncut_frame()..=self.log.written_frame();
        frames.map(|n| self.log.frame(n)).find(|f| !f.records.is_empty()).map(|f| f.time_us)
    }

    pub(super) fn destage_deadline(&self) -> Option<u64> {
        if self.state != State::Open || self.failed.is_some() || self.destage.chunks.len() >= self.puts_max() {
            return None;
        }
        self.oldest_uncut_us().map(|at| at + self.tuning.destage_age_us)
    }

    fn puts_max(&self) -> usize {
        match self.durability {
            // Recovery takes a chunk this far behind a missing one for a proof that the bucket lost that.
            Durability::Local => self.tuning.puts_max.min(OBJECT_PUTS_MAX),
            Durability::Object => OBJECT_PUTS_MAX,
        }
    }

    /// Payload bytes that make a chunk: the configured size, or less for a log too small to wait for it.
    fn cut_bytes(&self) -> u64 {
        self.chunk_bytes.min(self.log.usage().1 / 8)
    }

    fn wants_cut(&self) -> bool {
        let Some(oldest) = self.oldest_uncut_us() else { return false };
        let (used, capacity) = self.log.usage();
        let flushed = self.durability == Durability::Object
            && self.flushes.front().is_some()
            && self.flushes.back().is_some_and(|(lsn, _)| *lsn >= self.destage.cut_lsn);
        flushed
            || self.snapshot_waits_for().is_some()
            || self.gate.releasing
            || self.destage.uncut_bytes >= self.cut_bytes()
            || self.now_us >= oldest + self.tuning.destage_age_us
            || (used > capacity / 2 && self.destage.chunks.is_empty())
    }

    pub(super) fn cut_chunks(&mut self) {
        while self.state == State::Open
            && self.failed.is_none()
            && self.destage.chunks.len() < self.puts_max()
            && self.wants_cut()
        {
            self.cut();
        }
    }

    fn cut(&mut self) {
        let limit = self.cut_bytes();
        let (mut bytes, mut records, mut oldest_us) = (0, 0, self.now_us);
        let mut frames = Vec::new();
        let mut last_lsn = self.destage.cut_lsn - 1;
        self.destage.cut_frame = self.first_uncut_frame();
        // A snapshot is the state at the end of a chunk.
        let stop = self.snapshot_waits_for().unwrap_or(Lsn::MAX);
        while self.destage.cut_frame <= self.log.written_frame()
            && bytes < limit
            && records < CHUNK_RECORDS_MAX
            && last_lsn < stop
        {
            let frame = self.log.frame(self.destage.cut_frame);
            if !frame.records.is_empty() {
                oldest_us = oldest_us.min(frame.time_us);
                bytes += u64::from(frame.blocks) * BLOCK_SIZE;
                // A reference takes two rows of a chunk's header, which has a limit.
                let refers = |record: &&Record| matches!(record.kind, RecordKind::Refer { .. });
                records += frame.records.len() + frame.records.iter().filter(refers).count();
                last_lsn = frame.last_lsn();
                frames.push(FrameInput {
                    first_lsn: frame.first_lsn,
                    records: frame.records.clone(),
                    payload: (frame.blocks > 0).then(|| frame.payload(0, frame.blocks)),
                });
            }
            self.destage.cut_frame += 1;
        }
        let d = &mut self.destage;
        d.uncut_bytes -= bytes;
        let first_lsn = d.cut_lsn;
        d.cut_lsn = last_lsn + 1;
        let seq = d.next_seq;
        d.next_seq += 1;
        d.chunks.push_back(InFlight { seq, first_lsn, last_lsn, bytes, oldest_us, stored: None });
        let input = ChunkInput {
            name: ChunkName { volume: self.id, epoch: self.epoch, seq },
            first_lsn,
            last_lsn,
            codec: self.codec,
            created_ms: (self.wall)(),
            frames,
        };
        self.spawn(self.backend.clone().store_chunk(input));
        self.snapshot_cut();
    }

    /// The last chunk that was cut, and the last LSN in it.
    pub(super) fn last_cut(&self) -> (u64, Lsn) {
        (self.destage.next_seq - 1, self.destage.cut_lsn - 1)
    }

    /// Whether the table knows all chunks up to `seq`.
    pub(super) fn is_applied(&self, seq: u64) -> bool {
        self.destage.chunks.front().is_none_or(|chunk| chunk.seq > seq)
    }

    pub(super) fn chunk_stored(&mut self, seq: u64, result: Result<StoredChunk, Stopped>) {
        let stored = match result {
            Ok(stored) => stored,
            Err(why) => return self.stop(why),
        };
        self.stats.chunks += 1;
        self.stats.chunk_raw_bytes += stored.raw_bytes;
        self.stats.chunk_stored_bytes += stored.stored_bytes;
        if let Some(chunk) = self.destage.chunks.iter_mut().find(|c| c.seq == seq) {
            chunk.stored = Some(stored.index);
        }
        // Only a contiguous prefix counts: a later chunk without its predecessors is no state of the volume.
        for chunk in &self.destage.chunks {
            if chunk.stored.is_none() {
                break;
            }
            if chunk.last_lsn > self.destage.stored_lsn {
                assert!(chunk.first_lsn == self.destage.stored_lsn + 1, "chunks cover the history without gaps");
                self.destage.stored_lsn = chunk.last_lsn;
                self.pacer.drained(chunk.bytes);
            }
        }
        self.answer_flushes();
        self.apply_next();
    }

    pub(super) fn apply_next(&mut self) {
        if self.destage.applying {
            return;
        }
        // A snapshot is taken of the table as it is after its last chunk.
        let last = self.snapshot_keeps_at().unwrap_or(u64::MAX);
        let next = self.destage.chunks.front().filter(|chunk| chunk.seq <= last);
        if let Some(index) = next.and_then(|chunk| chunk.stored.clone()) {
            self.destage.applying = true;
            self.spawn(self.backend.clone().apply(index));
        }
    }

    pub(super) fn chunk_applied(&mut self, seq: u64, result: Result<Space, Stopped>) {
        self.destage.applying = false;
        match result {
            Ok(space) => self.space_changed(space),
            Err(why) => return self.stop(why),
        }
        let Some(chunk) = self.destage.chunks.pop_front() else { return };
        assert!(chunk.seq == seq, "chunks are applied in order");
        if let Some(index) = chunk.stored {
            self.table_changed(index.object_len());
            self.destage.purges.push_back(Purge { index, next: 0 });
        }
        self.snapshot_applied();
        self.apply_next();
    }

    /// Moves extents that the table knows out of the dirty map, a few at a time.
    pub(super) fn purge_some(&mut self) {
        let mut budget = PURGE_STEP;
        while budget > 0
            && let Some(mut purge) = self.destage.purges.pop_front()
        {
            let upto = purge.index.last_lsn;
            while budget > 0
                && let Some(extent) = purge.index.extents.get(purge.next)
            {
                purge.next += 1;
                budget -= 1;
                let (log, cache) = (&self.log, &mut self.cache);
                self.dirty.remove_range(extent.lba, extent.blocks, upto, |lba, blocks, source| {
                    if let Source::Log { frame, block } = source
                        && blocks <= CACHEABLE_BLOCKS
                        && let Payload::Memory(slices) = log.payload(frame, block, blocks as u32)
                    {
                        let content = slices.iter().flat_map(|s| s.chunks_exact(BLOCK));
                        for (lba, bytes) in (lba..).zip(content) {
                            cache.insert(lba, bytes);
                        }
                    }
                });
            }
            if purge.next < purge.index.extents.len() {
                self.destage.purges.push_front(purge);
                return;
            }
            self.purged_lsn = upto;
            self.unpin(upto);
        }
        self.log.release(self.purged_lsn);
    }
}
