//! When the translation table is copied to the bucket, and when what that made superfluous is deleted.
//!
//! A checkpoint is due after so many changes or so much time, as long as it costs little beside what was destaged: a
//! small change in a large table rewrites much of it. It is forced when there would be too many headers to read at an
//! opening otherwise. A volume that does not change makes no request.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use super::engine::{State, Volume};
use super::job::{Backend, Done, Stopped};
use super::own::BucketState;
use crate::checkpoint::make::Ask;
use crate::checkpoint::{CheckpointError, CheckpointPointer, Made, collect};
use crate::manifest::ManifestError;
use crate::table::{Applied, Position};

/// A checkpoint may cost this part of the bytes destaged since the last one.
const COST_PART: u64 = 20;
/// What any checkpoint may cost, in bytes.
const COST_FREE: u64 = 256 << 10;
/// So many times the usual number of changes force one.
const FORCE_CHANGES: u64 = 16;
/// So many times the usual age forces one.
const FORCE_AGE: u64 = 36;
/// Pauses after a failure.
const RETRY_MIN_US: u64 = 1_000_000;
const RETRY_MAX_US: u64 = 60_000_000;
/// How long an orderly end waits for the bucket to take one.
const CLOSE_LIMIT: Duration = Duration::from_secs(2);

/// A checkpoint that the durable manifest points to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DurableCheckpoint {
    /// How far it goes.
    pub position: Applied,
    /// The newest number of a relocated chunk then; 0 if there was none.
    pub relocated: u64,
    /// When this process learnt that it is durable, by the clock of [`Volume::advance`].
    pub at_us: u64,
}

/// What decides, beside time, whether a checkpoint is due.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CheckpointRule {
    /// Changes of the table since the last one.
    pub changes: u64,
    /// Bytes destaged for them.
    pub bytes: u64,
    /// The last estimate of what one costs that was too much, in bytes.
    pub cost: u64,
    /// Bytes of dead chunks that a new one would set free.
    pub waiting: u64,
}

impl CheckpointRule {
    /// What it may cost, in bytes.
    fn affordable(&self) -> u64 {
        self.bytes / COST_PART + COST_FREE + self.waiting
    }

    /// Whether one is due after so many changes, whatever the time: then what it may cost, which is no matter when it is
    /// forced.
    pub fn due(&self, changes: u64) -> Option<Option<u64>> {
        match () {
            () if self.changes >= changes * FORCE_CHANGES => Some(None),
            () if self.changes >= changes && self.cost <= self.affordable() => Some(Some(self.affordable())),
            () => None,
        }
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Checkpoints {
    durable: Option<DurableCheckpoint>,
    /// `durable` is from before this process and has not met the clock yet.
    unstamped: bool,
    running: bool,
    rule: CheckpointRule,
    /// Changes and bytes since the one that is being made was begun.
    newer: (u64, u64),
    /// When the first of the changes was seen.
    since_us: Option<u64>,
    retry_us: u64,
    pause_us: u64,
    /// Keys to delete and when, in order of time.
    garbage: VecDeque<(u64, Vec<String>)>,
    collecting: bool,
}

impl Checkpoints {
    /// As found by opening: the manifest's checkpoint, and how far the table is.
    pub fn begin(&mut self, pointer: Option<CheckpointPointer>, state: BucketState, table: Position, chunk_bytes: u64) {
        self.durable = pointer.map(|pointer| DurableCheckpoint {
            position: Applied { seq: pointer.seq, lsn: pointer.lsn },
            relocated: pointer.relocated,
            at_us: 0,
        });
        self.unstamped = true;
        let fresh = state.seq.saturating_sub(pointer.map_or(0, |pointer| pointer.seq));
        let moved = table.relocated > pointer.map_or(0, |pointer| pointer.relocated);
        self.rule.changes = fresh + u64::from(moved);
        // A guess, on the low side.
        self.rule.bytes = self.rule.changes * (chunk_bytes / 4);
    }

    pub fn set_waiting(&mut self, bytes: u64) {
        self.rule.waiting = bytes;
    }
}

impl Volume {
    /// The newest checkpoint that the durable manifest points to. What died at or before its position is needed neither
    /// by it nor by what follows.
    pub fn checkpointed(&self) -> Option<DurableCheckpoint> {
        self.checkpoints.durable
    }

    /// The table changed by something of which `stored_bytes` went to the bucket.
    pub(super) fn table_changed(&mut self, stored_bytes: u64) {
        let c = &mut self.checkpoints;
        c.rule.changes += 1;
        c.rule.bytes += stored_bytes;
        c.newer.0 += 1;
        c.newer.1 += stored_bytes;
        self.snapshots.table_changed(stored_bytes);
    }

    /// When the next checkpoint is due, and whether it is forced by then.
    fn checkpoint_due(&self) -> Option<(u64, bool)> {
        let c = &self.checkpoints;
        if c.running || c.rule.changes == 0 || self.state != State::Open || self.failed.is_some() {
            return None;
        }
        let since = c.since_us.unwrap_or(self.now_us);
        let at = |changes: u64, age: u64| if c.rule.changes >= changes { 0 } else { since.saturating_add(age) };
        let (changes, age) = (self.tuning.checkpoint_chunks.max(1), self.tuning.checkpoint_age_us);
        let usual = at(changes, age);
        // The first one makes the difference between all headers and few.
        let forced = match c.durable {
            None => usual,
            Some(_) => at(changes * FORCE_CHANGES, age.saturating_mul(FORCE_AGE)),
        };
        let cheap = if c.rule.cost <= c.rule.affordable() { usual } else { u64::MAX };
        let due = cheap.min(forced).max(c.retry_us);
        Some((due, forced <= due))
    }

    pub(super) fn checkpoint_deadline(&self) -> Option<u64> {
        let due = self.checkpoint_due().map(|(at, _)| at);
        let c = &self.checkpoints;
        let collect = c.garbage.front().filter(|_| self.may_collect()).map(|(at, _)| *at);
        [due, collect].into_iter().flatten().min()
    }

    fn may_collect(&self) -> bool {
        !self.checkpoints.collecting && self.state == State::Open && self.failed.is_none()
    }

    /// Starts what is due.
    pub(super) fn checkpoint_some(&mut self) {
        let now = self.now_us;
        let c = &mut self.checkpoints;
        if std::mem::take(&mut c.unstamped)
            && let Some(durable) = &mut c.durable
        {
            durable.at_us = now;
        }
        if c.rule.changes > 0 {
            c.since_us.get_or_insert(now);
        }
        if let Some((due, forced)) = self.checkpoint_due()
            && due <= now
        {
            let c = &mut self.checkpoints;
            c.running = true;
            c.newer = (0, 0);
            let budget = (!forced).then(|| c.rule.affordable());
            self.spawn(self.backend.clone().checkpoint(budget, (self.wall)()));
        }
        if self.may_collect()
            && self.checkpoints.garbage.front().is_some_and(|(due, _)| *due <= now)
            && let Some((_, keys)) = self.checkpoints.garbage.pop_front()
        {
            self.checkpoints.collecting = true;
            self.spawn(self.backend.clone().collect(keys));
        }
    }

    pub(super) fn checkpoint_made(&mut self, result: Result<Made, CheckpointError>) {
        let now = self.now_us;
        let c = &mut self.checkpoints;
        c.running = false;
        match result {
            Ok(Made::Durable { pointer, sent_bytes, garbage, .. }) => {
                let newer = c.newer;
                self.checkpoint_named(pointer, newer, sent_bytes, garbage);
            }
            Ok(Made::TooDear { bytes }) => c.rule.cost = bytes,
            Err(CheckpointError::Manifest(error @ ManifestError::NotOwner(_))) => {
                self.stop(Stopped::Fenced(error.to_string()));
            }
            Err(CheckpointError::Closing) => {}
            Err(error) => {
                if c.pause_us == 0 {
                    tracing::warn!(volume = %self.name, "cannot make a checkpoint, will retry: {error}");
                }
                c.pause_us = (2 * c.pause_us).clamp(RETRY_MIN_US, RETRY_MAX_US);
                c.retry_us = now + c.pause_us;
            }
        }
    }

    /// The durable manifest names this checkpoint; since its position the table has changed by `newer`, changes and bytes.
    pub(super) fn checkpoint_named(
        &mut self,
        pointer: CheckpointPointer,
        (changes, bytes): (u64, u64),
        sent_bytes: u64,
        garbage: Vec<String>,
    ) {
        let now = self.now_us;
        let c = &mut self.checkpoints;
        let position = Applied { seq: pointer.seq, lsn: pointer.lsn };
        c.durable = Some(DurableCheckpoint { position, relocated: pointer.relocated, at_us: now });
        c.rule = CheckpointRule { changes, bytes, cost: 0, waiting: 0 };
        c.since_us = (changes > 0).then_some(now);
        (c.pause_us, c.retry_us) = (0, 0);
        self.stats.checkpoints += 1;
        self.stats.checkpoint_sent_bytes += sent_bytes;
        self.stats.checkpoint_made_ms = pointer.made_ms;
        tracing::debug!(volume = %self.name, seq = pointer.seq, sent_bytes, "checkpoint durable");
        self.collect_later(garbage);
        self.checkpoint_durable(Position::from(&pointer));
    }

    /// Has objects of checkpoints deleted after the grace time, unless the manifest still reaches them then.
    pub(super) fn collect_later(&mut self, garbage: Vec<String>) {
        if !garbage.is_empty() {
            self.checkpoints.garbage.push_back((self.now_us + self.tuning.checkpoint_grace_us, garbage));
        }
    }

    pub(super) fn garbage_collected(&mut self, keys: Vec<String>, result: Result<usize, CheckpointError>) {
        let c = &mut self.checkpoints;
        c.collecting = false;
        match result {
            Ok(deleted) => tracing::debug!(volume = %self.name, deleted, "old checkpoint objects deleted"),
            Err(CheckpointError::Manifest(error @ ManifestError::NotOwner(_))) => {
                self.stop(Stopped::Fenced(error.to_string()));
            }
            Err(error) => {
                tracing::debug!(volume = %self.name, "old checkpoint objects are not deleted yet: {error}");
                c.garbage.push_back((self.now_us + RETRY_MAX_US, keys));
            }
        }
    }

    /// What an orderly end may spend on a checkpoint, if there is anything to copy.
    pub(super) fn closing_checkpoint(&self) -> Option<u64> {
        let c = &self.checkpoints;
        (c.rule.changes > 0 && !c.running && self.failed.is_none()).then(|| c.rule.affordable())
    }
}

impl Backend {
    /// Makes a checkpoint, unless that costs more than `budget_bytes`.
    pub async fn checkpoint(self, budget_bytes: Option<u64>, now_ms: u64) -> Done {
        let closing = self.closing.clone();
        let result = tokio::select! {
            biased;
            // What was sent and is not referred to is found at the next opening.
            () = closing.wait() => Err(CheckpointError::Closing),
            result = self.make_checkpoint(budget_bytes, now_ms) => result,
        };
        Done::Checkpoint { result }
    }

    async fn make_checkpoint(&self, budget_bytes: Option<u64>, now_ms: u64) -> Result<Made, CheckpointError> {
        let mut keeper = self.keeper.lock().await;
        let ask = Ask {
            store: self.store.as_ref(),
            table: &self.table,
            blocking: self.blocking,
            budget_bytes,
            now_ms,
            stop: &|| false,
        };
        let mut made = keeper.make(ask).await?;
        if let Made::Durable { garbage, .. } = &mut made
            && keeper.sweep_once()
        {
            let (_, volume, epoch) = keeper.owner();
            match collect::left_behind(self.store.as_ref(), volume, epoch).await {
                Ok(left) => garbage.extend(left),
                // The next opening looks again.
                Err(error) => tracing::debug!("cannot look for what earlier owners left behind: {error}"),
            }
        }
        Ok(made)
    }

    /// Deletes what no checkpoint needs any more.
    pub async fn collect(self, keys: Vec<String>) -> Done {
        let (name, epoch, volume_keys) = {
            let keeper = self.keeper.lock().await;
            let (name, _, epoch) = keeper.owner();
            (name.to_owned(), epoch, keeper.keys().cloned())
        };
        let result = tokio::select! {
            biased;
            () = self.closing.wait() => Err(CheckpointError::Closing),
            result = collect::collect(self.store.as_ref(), &name, epoch, volume_keys.as_ref(), &keys) => result,
        };
        Done::Collected { keys, result }
    }

    /// Writes the table to its files, and where `checkpoint_bytes` says so and it costs no more than that, a checkpoint
    /// to the bucket, so that whoever opens the volume next has no headers to read. A bucket that is slow or away is not
    /// waited for.
    pub async fn persist(self, checkpoint_bytes: Option<u64>, now_ms: u64) -> Done {
        let table = self.table.clone();
        if let Err(e) = self.blocking.run(move || table.persist()).await {
            tracing::warn!("cannot persist the translation table; the next start reads more chunk headers: {e}");
        }
        if checkpoint_bytes.is_some() {
            match tokio::time::timeout(CLOSE_LIMIT, self.make_checkpoint(checkpoint_bytes, now_ms)).await {
                Ok(Ok(made)) => tracing::debug!(?made, "checkpoint at the end"),
                Ok(Err(error)) => tracing::info!("no checkpoint at the end: {error}"),
                Err(_) => tracing::info!("no checkpoint at the end: the bucket does not answer in time"),
            }
        }
        Done::Persisted
    }
}

/// What jobs share of what was sent so far.
pub(super) type SharedKeeper = Arc<tokio::sync::Mutex<crate::checkpoint::Keeper>>;
