//! Getting space back: compaction copies what lives out of mostly dead chunks, deletion removes chunks that nothing can
//! need any more.
//!
//! One job at a time of each kind, apart from destaging: the history never waits for them, nor does a read or a flush.
//! Order: a copy is in the bucket before the table refers to it; the table refers to it before the source counts as dead;
//! a source is deleted when a checkpoint in the bucket no longer refers to it, the grace time has passed since that was
//! durable, and no snapshot stands where it still lived. Without a checkpoint nothing is deleted, hence nothing is copied.
//!
//! Copies are put in a sequence of their own (see [`crate::chunk::RELOCATED`]). A crash can leave some that no table knows;
//! the next owner deletes them ([`sweep`]) once a checkpoint of its own exists, so that no older table is opened any more.

mod job;
mod policy;
mod sweep;

use std::collections::{BTreeSet, VecDeque};
use std::ops::Range;
use std::sync::{Arc, Mutex};

use super::engine::{State, Trouble, Volume};
use super::job::{Done, Stopped};
use crate::table::{Position, Space, Table, TableError};
pub(super) use job::{Deleted, Failure, Round};
pub use policy::CompactionTuning;
pub(super) use sweep::{Unswept, next_number};

/// Pause after a failure.
const RETRY_US: u64 = 5_000_000;
/// Between two deletions of a batch of chunks.
const DELETE_PAUSE_US: u64 = 1_000_000;

/// State of compaction and deletion.
pub(super) struct Compact {
    pub space: Space,
    pub trouble: Trouble,
    compacting: bool,
    /// Chunks were applied since compaction last found nothing to do: at all, and in a quiet moment.
    changed: bool,
    changed_since_quiet: bool,
    /// When the last chunk was applied.
    applied_us: u64,
    not_before_us: u64,
    /// Chunks that could not be copied.
    avoid: BTreeSet<u64>,
    /// Positions of snapshots.
    held: Vec<u64>,
    /// Durable checkpoints whose grace time has not passed, and when they were reported.
    checkpoints: VecDeque<(Position, Option<u64>)>,
    newest_checkpoint: Option<Position>,
    /// The newest one whose grace time has passed.
    safe: Option<Position>,
    deleting: bool,
    /// Something may have become free to be deleted.
    garbage: bool,
    delete_not_before_us: u64,
    /// What earlier owners left that the table may not know.
    unswept: Unswept,
}

impl Compact {
    /// `ended` are the epochs of earlier owners and the chunks of their histories.
    pub fn new(table: &Table, ended: impl Iterator<Item = (u64, Range<u64>)>) -> Result<Self, TableError> {
        Ok(Self {
            space: table.space(),
            trouble: Arc::new(Mutex::new(None)),
            compacting: false,
            changed: true,
            changed_since_quiet: true,
            applied_us: 0,
            not_before_us: 0,
            avoid: BTreeSet::new(),
            held: Vec::new(),
            checkpoints: VecDeque::new(),
            newest_checkpoint: None,
            safe: None,
            deleting: false,
            garbage: false,
            delete_not_before_us: 0,
            unswept: Unswept::new(table, ended)?,
        })
    }

    /// The positions of snapshots, as found by opening.
    pub fn hold(&mut self, held: Vec<u64>) {
        self.held = held;
    }

    /// Chunks may be moved or deleted that had to stay where they were before.
    pub fn look_again(&mut self) {
        self.changed = true;
        self.changed_since_quiet = true;
        self.garbage = true;
    }

    pub fn is_running(&self) -> bool {
        self.compacting
    }
}

impl Volume {
    /// Learns that a checkpoint of the table at `position` is durable and is what the durable manifest refers to: whoever
    /// opens the volume from now on begins with it, or with a table at a position at least as great. Chunks that died
    /// before it are deleted after the grace time.
    pub fn checkpoint_durable(&mut self, position: Position) {
        let c = &mut self.compact;
        if c.newest_checkpoint.is_none_or(|newest| position > newest) {
            c.newest_checkpoint = Some(position);
            // The clock may not have been seen yet; advance fills it in.
            c.checkpoints.push_back((position, None));
            c.changed = true;
            c.changed_since_quiet = true;
            self.count_waiting();
        }
    }

    /// What a checkpoint would set free, which is part of what it may cost.
    fn count_waiting(&mut self) {
        let waiting = self.waits_for_checkpoint();
        self.checkpoints.set_waiting(waiting);
    }

    /// The translation table, to look at.
    #[doc(hidden)]
    pub fn table(&self) -> &Table {
        &self.backend.table
    }

    /// The positions of the volume's snapshots, those kept for clones included: what lived there is not deleted. A new one
    /// must be made known before the manifest has it.
    pub fn set_held(&mut self, held: Vec<u64>) {
        self.compact.held = held;
        self.compact.garbage = true;
        self.compact.changed = true;
        self.compact.changed_since_quiet = true;
    }

    /// Bytes of dead chunks that only a newer checkpoint sets free.
    pub fn waits_for_checkpoint(&self) -> u64 {
        self.backend.table.waiting_bytes(self.compact.newest_checkpoint.unwrap_or_default(), &self.compact.held)
    }

    /// A chunk of the history was applied.
    pub(super) fn space_changed(&mut self, space: Space) {
        let c = &mut self.compact;
        c.space = space;
        c.changed = true;
        c.changed_since_quiet = true;
        c.applied_us = self.now_us;
        self.count_waiting();
    }

    /// When nothing was written for a while, what was left alone to be done in larger batches is done.
    fn quiet_at(&self) -> u64 {
        self.compact.applied_us + 2 * self.tuning.destage_age_us
    }

    fn may_reclaim(&self) -> bool {
        self.state == State::Open && self.failed.is_none() && !self.gate.is_shut() && !self.gate.releasing
    }

    pub(super) fn reclaim_deadline(&self) -> Option<u64> {
        if !self.may_reclaim() {
            return None;
        }
        let c = &self.compact;
        let compaction = (!c.compacting && c.newest_checkpoint.is_some() && self.tuning.compaction.rate > 0)
            .then(|| {
                let wanted = if c.changed { Some(0) } else { c.changed_since_quiet.then(|| self.quiet_at()) };
                wanted.map(|at| at.max(c.not_before_us))
            })
            .flatten();
        let matures = c.checkpoints.front().map(|(_, at)| at.unwrap_or(0) + self.tuning.delete_grace_us);
        let deletion = (!c.deleting && c.garbage && c.safe.is_some()).then_some(c.delete_not_before_us);
        [compaction, matures, deletion].into_iter().flatten().min()
    }

    /// Starts what is due.
    pub(super) fn reclaim(&mut self) {
        let (now, grace) = (self.now_us, self.tuning.delete_grace_us);
        let c = &mut self.compact;
        for (_, at) in &mut c.checkpoints {
            at.get_or_insert(now);
        }
        while let Some((position, Some(at))) = c.checkpoints.front().copied()
            && at + grace <= now
        {
            c.checkpoints.pop_front();
            c.safe = Some(position);
            c.garbage = true;
        }
        if !self.may_reclaim() {
            return;
        }
        self.start_compaction();
        self.start_deletion();
    }

    fn start_compaction(&mut self) {
        let quiet = self.now_us >= self.quiet_at();
        let c = &mut self.compact;
        let wanted = c.changed || (quiet && c.changed_since_quiet);
        if c.compacting
            || !wanted
            || self.now_us < c.not_before_us
            || c.newest_checkpoint.is_none()
            || self.tuning.compaction.rate == 0
        {
            return;
        }
        c.compacting = true;
        c.changed = false;
        if quiet {
            c.changed_since_quiet = false;
        }
        let order = job::Order {
            volume: self.id,
            epoch: self.epoch,
            codec: self.codec,
            chunk_bytes: self.chunk_bytes,
            created_ms: (self.wall)(),
            tuning: self.tuning.compaction,
            quiet,
            may_drop: c.unswept.is_empty(),
            held: c.held.clone(),
            avoid: c.avoid.clone(),
        };
        let started_us = self.now_us;
        let mut backend = self.backend.clone();
        backend.trouble = c.trouble.clone();
        self.spawn(async move { Done::Compacted { started_us, quiet, result: backend.compact(order).await } });
    }

    pub(super) fn compacted(&mut self, started_us: u64, quiet: bool, result: Result<Round, Failure>) {
        let c = &mut self.compact;
        c.compacting = false;
        match result {
            Ok(round) => {
                *c.trouble.lock().expect("no code panics while it holds this lock") = None;
                c.space = round.space;
                // Until a look finds nothing to do.
                if round.worked {
                    c.changed = true;
                    c.changed_since_quiet |= quiet;
                }
                let cost = (round.read_bytes + round.stored_bytes) as u128 * 1_000_000;
                c.not_before_us = started_us + (cost / u128::from(self.tuning.compaction.rate.max(1))) as u64;
                self.stats.relocated_chunks += round.chunks;
                self.stats.relocated_bytes += round.stored_bytes;
                self.stats.relocated_read_bytes += round.read_bytes;
                self.stats.relocated_blocks += round.moved_blocks;
                if round.worked {
                    self.table_changed(round.stored_bytes);
                }
                self.count_waiting();
            }
            Err(failure) => {
                c.changed = true;
                c.changed_since_quiet |= quiet;
                c.not_before_us = self.now_us + RETRY_US;
                c.avoid.extend(failure.avoid);
                match failure.stopped {
                    Some(stopped @ Stopped::Fenced(_)) => self.stop(stopped),
                    Some(Stopped::Closing) => {}
                    None => {
                        tracing::warn!(volume = %self.name, "compaction does not get on: {}", failure.message);
                        self.stats.compaction_failures += 1;
                        *c.trouble.lock().expect("no code panics while it holds this lock") = Some(failure.message);
                    }
                }
            }
        }
    }

    fn start_deletion(&mut self) {
        let c = &mut self.compact;
        let Some(upto) = c.safe else { return };
        if c.deleting || !c.garbage || self.now_us < c.delete_not_before_us {
            return;
        }
        c.deleting = true;
        c.garbage = false;
        let (held, backend) = (c.held.clone(), self.backend.clone());
        // No table of an earlier owner is opened once there is a checkpoint that is newer than all of them.
        let is_own = upto.seq >= self.first_seq || upto.relocated > sweep::base(self.epoch);
        let unswept = is_own.then(|| c.unswept.clone()).filter(Unswept::is_due);
        let (volume, epoch) = (self.id, self.epoch);
        self.spawn(async move {
            let result = match unswept {
                Some(unswept) => backend.sweep(volume, epoch, unswept).await,
                None => backend.delete_dead(epoch, upto, held).await,
            };
            Done::Deleted(result)
        });
    }

    pub(super) fn deleted(&mut self, result: Result<Deleted, String>) {
        let c = &mut self.compact;
        c.deleting = false;
        match result {
            Ok(deleted) => {
                c.space = deleted.space;
                if deleted.swept {
                    c.unswept = Unswept::default();
                    // What the unknown chunks kept from being dropped.
                    c.changed = true;
                    c.changed_since_quiet = true;
                }
                c.garbage |= deleted.more || deleted.swept;
                c.delete_not_before_us = self.now_us + if deleted.more { DELETE_PAUSE_US } else { 0 };
                self.stats.deleted_chunks += deleted.chunks;
                self.stats.deleted_bytes += deleted.bytes;
            }
            Err(message) => {
                tracing::warn!(volume = %self.name, "cannot delete dead chunks yet, will retry: {message}");
                c.garbage = true;
                c.delete_not_before_us = self.now_us + RETRY_US;
                self.stats.delete_failures += 1;
            }
        }
    }

    /// Whether what earlier owners left was looked for; that takes a checkpoint of this owner's own.
    pub fn is_swept(&self) -> bool {
        !self.compact.unswept.is_due()
    }

    /// Whether nothing is left to be compacted or deleted for now.
    pub fn is_tidy(&self) -> bool {
        let c = &self.compact;
        let off = c.newest_checkpoint.is_none() || self.tuning.compaction.rate == 0;
        let idle = off || !(c.compacting || c.changed || c.changed_since_quiet);
        idle && !c.deleting && !(c.garbage && c.safe.is_some()) && c.checkpoints.is_empty()
    }
}
