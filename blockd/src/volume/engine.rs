//! The volume itself: its state, its clock, and what it answers when.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::api::{Completion, Effect, IoError, LogIo, Outcome, Token};
use super::block_cache::BlockCache;
use super::checkpoint::Checkpoints;
use super::compact::{Compact, CompactionTuning};
use super::copy::{CopyReply, PendingCopy};
use super::destage::Destage;
use super::dirty::DirtyMap;
use super::job::{Backend, Done, JobDone, Stopped};
use super::pace::Pacer;
use super::read::{PendingRead, Readahead};
use super::stats::VolumeStats;
use super::write::{Append, Ticket};
use crate::chunk::Codec;
use crate::manifest::Durability;
use crate::table::Pin;
use crate::types::{BLOCK, BLOCK_SIZE, Lsn, VolumeId};
use crate::wal::writer::LogWriter;

/// A wall clock in milliseconds since 1970; stamps frames and chunks, decides nothing.
pub type WallClock = Arc<dyn Fn() -> u64 + Send + Sync>;

/// Limits of one open volume.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Dirty payload kept in memory, in bytes; beyond that it is read from the log.
    pub dirty_memory_bytes: usize,
    /// Clean blocks kept in memory, in bytes.
    pub block_cache_bytes: usize,
    /// Of what one reader reads in order, kept in memory behind it, in bytes; the rest goes unless it is read again.
    pub keep_sequential_bytes: u64,
    /// A write waits at most this long before its chunk is cut, in microseconds.
    pub destage_age_us: u64,
    /// Chunks on their way to the bucket at once.
    pub puts_max: usize,
    /// Log writes on their way to the device at once while little is waiting.
    pub log_depth: usize,
    /// The table is copied to the bucket after so many chunks.
    pub checkpoint_chunks: u64,
    /// Or, if anything changed, after this long, in microseconds.
    pub checkpoint_age_us: u64,
    /// What a checkpoint made superfluous is kept this long for who may be reading it, in microseconds.
    pub checkpoint_grace_us: u64,
    /// When and how fast dead space is got back.
    pub compaction: CompactionTuning,
    /// How long a dead chunk is kept after the checkpoint that proved it dead became durable, in microseconds. Longer than
    /// any reader may go by an older state.
    pub delete_grace_us: u64,
    /// How long a read waits for a store that is away.
    pub read_patience: Duration,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            dirty_memory_bytes: 256 << 20,
            block_cache_bytes: 256 << 20,
            keep_sequential_bytes: 64 << 20,
            destage_age_us: 5_000_000,
            puts_max: 4,
            log_depth: 2,
            checkpoint_chunks: 256,
            checkpoint_age_us: 600_000_000,
            checkpoint_grace_us: 300_000_000,
            compaction: CompactionTuning::default(),
            delete_grace_us: 60_000_000,
            read_patience: Duration::from_secs(30),
        }
    }
}

impl Tuning {
    /// [`Self::keep_sequential_bytes`] in blocks.
    pub(super) fn keep_sequential_blocks(&self) -> u64 {
        self.keep_sequential_bytes / BLOCK_SIZE
    }
}

/// Most log writes on their way at once, however much is waiting.
const LOG_DEPTH_MAX: usize = 16;
/// Payload blocks that always justify a log write of their own beyond [`Tuning::log_depth`].
const LOG_BATCH_BLOCKS: usize = 64;
/// Fewer do as well, as many as this for each write on its way: who waits for one to end before the next is handed
/// over waits for the slowest the device has.
const LOG_BATCH_PER_WRITE: usize = 4;
/// After this long without writes the durable horizon is recorded, so that recovery can tell rot from a torn tail.
const HORIZON_IDLE_US: u64 = 1_000_000;
/// Pause before another attempt to make a log segment for which there was no room.
const SEGMENT_RETRY_US: u64 = 3_000_000;

/// An acknowledgement that waits for the kept horizon, see [`LogWriter::kept_lsn`].
pub(super) struct Ack {
    pub lsn: Lsn,
    pub token: Token,
    /// Wait for the durable horizon as well.
    pub fua: bool,
}

/// An open volume. See the [module](super) for how it is driven.
pub struct Volume {
    pub(super) id: VolumeId,
    pub(super) name: String,
    pub(super) size: u64,
    pub(super) durability: Durability,
    pub(super) codec: Codec,
    pub(super) chunk_bytes: u64,
    pub(super) epoch: u64,
    /// The first seq of the history that this owner writes.
    pub(super) first_seq: u64,
    pub(super) tuning: Tuning,
    pub(super) wall: WallClock,
    pub(super) now_us: u64,
    pub(super) log: LogWriter,
    pub(super) dirty: DirtyMap,
    pub(super) cache: BlockCache,
    pub(super) backend: Backend,
    pub(super) effects: VecDeque<Effect>,
    pub(super) log_ios: Vec<LogIo>,
    /// Acknowledgements by LSN.
    pub(super) acks: VecDeque<Ack>,
    /// Flushes and FUA writes by the LSN that must be durable.
    pub(super) flushes: VecDeque<(Lsn, Token)>,
    pub(super) tickets: HashMap<u64, Ticket>,
    /// Appends that wait for room in the log.
    pub(super) waiting: VecDeque<Append>,
    pub(super) reads: HashMap<u64, PendingRead>,
    /// Copies that wait for what stands at their sources.
    pub(super) copies: HashMap<u64, PendingCopy>,
    /// Who waits for copies, but for the driver.
    pub(super) replies: HashMap<Token, CopyReply>,
    /// The chunks that references in the dirty map name, by LSN.
    pub(super) pins: VecDeque<(Lsn, Pin)>,
    pub(super) readahead: Readahead,
    pub(super) next_id: u64,
    pub(super) destage: Destage,
    pub(super) compact: Compact,
    pub(super) pacer: Pacer,
    pub(super) paced_until: Option<u64>,
    /// Everything up to here has left the dirty map.
    pub(super) purged_lsn: Lsn,
    pub(super) creating_segment: bool,
    /// Why the log does not grow to its size, and when that is tried again.
    pub(super) no_segment: Option<(String, u64)>,
    pub(super) last_append_us: u64,
    pub(super) jobs: usize,
    pub(super) failed: Option<Arc<str>>,
    pub(super) state: State,
    pub(super) gate: super::gate::Gate,
    pub(super) eager: super::flush::Eager,
    pub(super) stats: VolumeStats,
    pub(super) rate: Rate,
    pub(super) checkpoints: Checkpoints,
    pub(super) snapshots: super::snapshot::Snapshots,
}

/// How far an orderly shutdown has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum State {
    Open,
    /// Waiting for log writes and for the horizon frame.
    Draining {
        horizon_written: bool,
        persisting: bool,
    },
    Closed,
}

/// Bytes accepted per second, smoothed, for the forecast of a full log.
#[derive(Debug, Default)]
pub(super) struct Rate {
    per_second: f64,
    bytes: u64,
    since_us: u64,
}

impl Rate {
    pub fn count(&mut self, bytes: u64) {
        self.bytes += bytes;
    }

    fn tick(&mut self, now_us: u64) {
        let elapsed = now_us.saturating_sub(self.since_us);
        if elapsed >= 1_000_000 {
            let rate = self.bytes as f64 * 1e6 / elapsed as f64;
            self.per_second += 0.3 * (rate - self.per_second);
            self.bytes = 0;
            self.since_us = now_us;
        }
    }
}

impl Volume {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its identity.
    pub fn id(&self) -> VolumeId {
        self.id
    }

    /// Size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The epoch this owner writes under.
    pub fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Changes the memory kept for clean blocks.
    pub fn set_block_cache_bytes(&mut self, bytes: usize) {
        self.tuning.block_cache_bytes = bytes;
        self.cache.resize(bytes);
    }

    /// Changes the memory kept for dirty payload.
    pub fn set_dirty_memory_bytes(&mut self, bytes: usize) {
        self.tuning.dirty_memory_bytes = bytes;
    }

    /// Compresses new chunks this way from now on; the manifest says so already.
    pub fn set_codec(&mut self, codec: Codec) {
        self.codec = codec;
    }

    /// Answers flushes this way from now on; the manifest says so already. Those that wait are answered the new
    /// way, too.
    pub fn set_durability(&mut self, durability: Durability) {
        self.durability = durability;
        self.answer_flushes();
    }

    /// Takes on a new size in bytes; the manifest has it already. What lies beyond a smaller size is trimmed, so that
    /// it reads as zeroes should the volume grow again.
    pub fn set_size(&mut self, size: u64) {
        if size < self.size {
            let old_end = self.size.div_ceil(BLOCK_SIZE);
            let lba = size.div_ceil(BLOCK_SIZE);
            if lba < old_end {
                let ticket = self.ticket(None, false, 1);
                self.submit(Append::Zero { ticket, lba, blocks: old_end - lba, allocated: false });
            }
        }
        self.size = size;
    }

    pub(super) fn id_for(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id
    }

    pub(super) fn complete(&mut self, token: Token, result: Result<Outcome, IoError>) {
        if let Some(completion) = self.at_gate(Completion { token, result }) {
            self.effects.push_back(Effect::Complete(completion));
        }
    }

    pub(super) fn spawn(&mut self, job: impl Future<Output = Done> + Send + 'static) {
        self.jobs += 1;
        self.effects.push_back(Effect::Spawn(Box::pin(async move { JobDone(job.await) })));
    }

    /// Why writes are refused, if they are.
    pub(super) fn write_error(&self) -> Option<IoError> {
        if let Some(reason) = self.log.dead() {
            return Some(IoError::LogDead(reason.clone()));
        }
        if let Some(reason) = &self.failed {
            return Some(IoError::Stopped(reason.clone()));
        }
        (self.state != State::Open || self.gate.releasing).then_some(IoError::Shutdown)
    }

    pub(super) fn in_range(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size)
    }

    /// The next thing the driver has to do.
    pub fn next_effect(&mut self) -> Option<Effect> {
        while let Some(effect) = self.effects.pop_front() {
            match effect {
                Effect::Complete(done) if !self.replies.is_empty() => {
                    if let Some(done) = self.reply(done) {
                        return Some(Effect::Complete(done));
                    }
                }
                effect => return Some(effect),
            }
        }
        if self.log_ios.is_empty() {
            return None;
        }
        self.effects.extend(self.log_ios.drain(..).map(Effect::Log));
        self.effects.pop_front()
    }

    /// Does what a batch of events made possible: appends what waited, seals frames, starts syncs, cuts chunks.
    /// `now_us` is a monotonic clock of the driver.
    pub fn advance(&mut self, now_us: u64) {
        self.now_us = self.now_us.max(now_us);
        self.pacer.tick(self.now_us);
        self.rate.tick(self.now_us);
        self.append_waiting();
        self.seal_open();
        self.answer_acks();
        self.sync_for_flushes();
        self.snapshot_some();
        self.cut_chunks();
        self.purge_some();
        self.log.spill(self.tuning.dirty_memory_bytes);
        self.want_segment();
        self.record_idle_horizon();
        self.checkpoint_some();
        self.reclaim();
        self.drain();
    }

    /// When [`Volume::advance`] wants to run again at the latest.
    pub fn deadline_us(&self) -> Option<u64> {
        let mut deadline = None;
        let mut earlier = |at: u64| deadline = Some(deadline.map_or(at, |d: u64| d.min(at)));
        if self.destage.purging() {
            earlier(self.now_us);
        }
        if let Some(at) = self.paced_until
            && !self.waiting.is_empty()
        {
            earlier(at);
        }
        if let Some(at) = self.destage_deadline() {
            earlier(at);
        }
        if let Some(at) = self.checkpoint_deadline() {
            earlier(at);
        }
        if let Some(at) = self.reclaim_deadline() {
            earlier(at);
        }
        if let Some(at) = self.snapshot_deadline() {
            earlier(at);
        }
        if let Some((_, at)) = &self.no_segment
            && self.state == State::Open
            && !self.creating_segment
        {
            earlier(*at);
        }
        if self.log.horizon_unrecorded() && self.state == State::Open {
            earlier(self.last_append_us + HORIZON_IDLE_US);
        }
        deadline
    }

    fn seal_open(&mut self) {
        while self.log.has_open_records() && self.log.can_seal() {
            let in_flight = self.log.in_flight();
            let worth_it = in_flight < self.tuning.log_depth
                || (in_flight < LOG_DEPTH_MAX
                    && self.log.open_blocks() >= LOG_BATCH_BLOCKS.min(LOG_BATCH_PER_WRITE * in_flight));
            if !worth_it {
                break;
            }
            self.log.seal(self.now_us, (self.wall)(), false, &mut self.log_ios);
            self.append_waiting();
        }
    }

    pub(super) fn may_seal_full(&self) -> bool {
        self.log.can_seal() && self.log.in_flight() < LOG_DEPTH_MAX
    }

    fn want_segment(&mut self) {
        if self.creating_segment || self.state != State::Open {
            return;
        }
        // Also when none is needed at the moment: so that it is seen when there is room again.
        let again = self.no_segment.as_ref().is_some_and(|(_, at)| self.now_us >= *at);
        let wanted = if again { self.log.lift_limit() } else { self.log.wants_segment() };
        if let Some(segment) = wanted {
            self.creating_segment = true;
            self.spawn(self.backend.clone().create_segment(segment));
        }
    }

    fn record_idle_horizon(&mut self) {
        let idle = self.now_us >= self.last_append_us + HORIZON_IDLE_US;
        if self.state == State::Open
            && idle
            && self.log.all_durable()
            && self.log.horizon_unrecorded()
            && !self.log.has_open_records()
            && self.log.can_seal()
        {
            self.log.seal(self.now_us, (self.wall)(), false, &mut self.log_ios);
        }
    }

    /// The kernel is at work on a log write, so that the end of this process does not stop it. A driver that cannot
    /// know need not call this: the end of the operation says the same, later.
    pub fn log_handed(&mut self, id: u64) {
        self.log.handed(id);
        self.answer_acks();
    }

    /// A log operation ended.
    pub fn log_done(&mut self, id: u64, result: io::Result<()>) {
        if let Err(e) = &result {
            tracing::error!(volume = %self.name, "log device failed, no more writes are acknowledged: {e}");
        }
        self.log.done(id, result);
        if self.log.dead().is_some() {
            self.fail_writes();
            return;
        }
        // Also those without records: they may be released before the next one is written.
        self.frames_written();
        self.answer_acks();
        self.answer_flushes();
    }

    /// Fails everything that waits for the log or the bucket.
    pub(super) fn fail_writes(&mut self) {
        let Some(error) = self.write_error() else { return };
        let mut tokens: Vec<Token> = self.acks.drain(..).map(|a| a.token).collect();
        tokens.extend(self.flushes.drain(..).map(|(_, token)| token));
        let mut tickets: Vec<(u64, Ticket)> = self.tickets.drain().collect();
        tickets.sort_unstable_by_key(|(id, _)| *id);
        tokens.extend(tickets.into_iter().filter_map(|(_, t)| t.token));
        self.waiting.clear();
        for token in tokens {
            self.complete(token, Err(error.clone()));
        }
    }

    fn answer_acks(&mut self) {
        let kept = self.log.kept_lsn();
        while let Some(ack) = self.acks.front() {
            if ack.lsn > kept {
                break;
            }
            let Some(Ack { lsn, token, fua }) = self.acks.pop_front() else { break };
            if fua {
                self.wait_durable(lsn, token);
            } else {
                self.complete(token, Ok(Outcome::Done));
            }
        }
    }

    /// A job ended.
    pub fn job_done(&mut self, done: JobDone) {
        self.jobs -= 1;
        match done.0 {
            Done::Stored { seq, result } => self.chunk_stored(seq, result),
            Done::Applied { seq, result } => self.chunk_applied(seq, result),
            Done::Read { id, result } => self.read_done(id, result),
            Done::Prefetched { id, result } => self.prefetch_done(id, result),
            Done::Resolved { id, result } => self.resolved(id, result),
            Done::Extents { token, result } => {
                self.complete(token, result.map(Outcome::Extents).map_err(IoError::Read));
            }
            Done::Segment { segment, result } => {
                self.creating_segment = false;
                match result {
                    Ok(()) => {
                        self.log.segment_created(segment);
                        if self.no_segment.take().is_some() {
                            tracing::info!(volume = %self.name, "the log grows again");
                        }
                    }
                    Err(e) => {
                        // Not fatal: the segments that exist are recycled as the bucket catches up. But it is tried
                        // again, for when there is only one, it is never free.
                        if self.no_segment.is_none() {
                            tracing::error!(volume = %self.name, "cannot extend the log, will retry: {e}");
                        }
                        self.log.limit_segments();
                        self.no_segment = Some((e.to_string(), self.now_us + SEGMENT_RETRY_US));
                    }
                }
            }
            Done::Checkpoint { result } => self.checkpoint_made(result),
            Done::Collected { keys, result } => self.garbage_collected(keys, result),
            Done::Compacted { started_us, quiet, result } => self.compacted(started_us, quiet, result),
            Done::Deleted(result) => self.deleted(result),
            // Of other devices.
            Done::Answer(_) => {}
            Done::Snapshot(done) => self.snapshot_done(done),
            Done::Persisted => {
                if let State::Draining { persisting, .. } = &mut self.state {
                    *persisting = false;
                }
            }
        }
    }

    pub(super) fn stop(&mut self, why: Stopped) {
        if let Stopped::Fenced(reason) = why {
            self.fence(&reason);
        }
    }

    /// Starts an orderly shutdown: what was accepted is made durable in the log, waiting requests are refused, the
    /// bucket is not waited for.
    pub fn close(&mut self) {
        if self.state != State::Open {
            return;
        }
        self.state = State::Draining { horizon_written: false, persisting: false };
        self.backend.closing.set();
        self.refuse_snapshots();
        self.fail_held(IoError::Shutdown);
        let waiting: Vec<Append> = self.waiting.drain(..).collect();
        for append in waiting {
            self.end_ticket(append.ticket(), Err(IoError::Shutdown));
        }
    }

    /// Whether an orderly shutdown is complete.
    pub fn closed(&self) -> bool {
        self.state == State::Closed
    }

    fn drain(&mut self) {
        let State::Draining { horizon_written, persisting } = self.state else { return };
        let dead = self.log.dead().is_some();
        if !dead {
            if self.log.in_flight() > 0 || self.log.syncing() {
                return;
            }
            if self.log.has_open_records() {
                if self.log.can_seal() {
                    return;
                }
                // The log is full and will not be emptied any more: what waits for a place in it was never accepted.
                let refused: Vec<Token> = self.acks.drain(..).map(|a| a.token).collect();
                for token in refused {
                    self.complete(token, Err(IoError::Shutdown));
                }
            }
            if !self.log.all_durable() {
                self.log.sync(&mut self.log_ios);
                return;
            }
            if !horizon_written && self.log.can_seal() {
                // Proves to the next recovery that the log ends here and everything before was durable.
                self.log.seal(self.now_us, (self.wall)(), true, &mut self.log_ios);
                self.state = State::Draining { horizon_written: true, persisting: true };
                self.spawn(self.backend.clone().persist(self.closing_checkpoint(), (self.wall)()));
                return;
            }
        }
        if self.jobs == 0 && !persisting {
            let left: Vec<Token> = self.flushes.drain(..).map(|(_, token)| token).collect();
            for token in left {
                self.complete(token, Err(IoError::Shutdown));
            }
            self.state = State::Closed;
        }
    }

    /// The file descriptor of a log segment.
    ///
    /// # Panics
    /// When the segment does not exist or the log has no files; the volume only names segments it opened.
    pub fn log_fd(&self, segment: u32) -> RawFd {
        self.backend.device.fd(segment).expect("the log's own segment is open")
    }

    /// Counters and gauges.
    pub fn stats(&self) -> VolumeStats {
        let (used, capacity) = self.log.usage();
        let filling = self.rate.per_second - self.pacer.drain_rate();
        let (log_frames, log_syncs) = self.log.counters();
        let space = self.compact.space;
        VolumeStats {
            accepted_lsn: self.log.accepted_lsn(),
            durable_lsn: self.log.durable_lsn(),
            destaged_lsn: self.destage.stored_lsn(),
            dirty_bytes: self.dirty_bytes(),
            behind_seconds: self.behind_us() as f64 / 1e6,
            log_used_bytes: used,
            log_capacity_bytes: capacity,
            log_full_in_seconds: (filling > 1024.0).then(|| capacity.saturating_sub(used) as f64 / filling),
            log_frames,
            log_syncs,
            dirty_memory_bytes: self.log.memory() as u64,
            cache_memory_bytes: self.cache.bytes() as u64,
            store_trouble: self.backend.trouble.lock().expect("no code panics while it holds this lock").clone(),
            compaction_trouble: self.compact.trouble.lock().expect("no code panics while it holds this lock").clone(),
            compacting: self.compact.is_running(),
            live_bytes: space.live_bytes,
            dead_bytes: space.stored_bytes - space.live_bytes,
            stored_bytes: space.stored_bytes,
            deletable_bytes: space.dead_bytes,
            foreign_bytes: space.foreign_bytes,
            bucket_chunks: space.chunks,
            log_trouble: self.no_segment.as_ref().map(|(why, _)| why.clone()),
            log_dead: self.log.dead().map(|r| r.to_string()),
            fenced: self.failed.as_ref().map(|r| r.to_string()),
            suspended: self.gate.is_shut(),
            snapshots: self.snapshots.count(),
            checkpoint_seq: self.checkpointed().map_or(0, |c| c.position.seq),
            checkpoint_lsn: self.checkpointed().map_or(0, |c| c.position.lsn),
            ..self.stats.clone()
        }
    }
}

/// Shared trouble report of a volume's jobs.
pub(super) type Trouble = Arc<Mutex<Option<String>>>;

/// Blocks a byte range touches: first block and count.
pub(crate) fn blocks_of(offset: u64, len: u64) -> (u64, u64) {
    let first = offset / BLOCK_SIZE;
    (first, (offset + len).div_ceil(BLOCK_SIZE) - first)
}

/// Position of a byte offset within its block.
pub(crate) fn within_block(offset: u64) -> usize {
    (offset % BLOCK_SIZE) as usize
}

const _: () = assert!(BLOCK as u64 == BLOCK_SIZE);
