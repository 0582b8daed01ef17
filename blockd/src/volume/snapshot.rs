//! Snapshots of an open volume: a name for the state at the end of a chunk of the history.
//!
//! Order: a chunk is cut that ends with the newest write accepted; from then on its seq counts as held, so that neither
//! compaction nor deletion takes anything of that state; when the table knows that chunk, and before it learns of the
//! next, it is hard-linked; the copy is sent like any checkpoint; then one change of the manifest records the snapshot.
//! Requests are accepted and answered all the time; only the table stands still for the moment of the hard links.
//!
//! One thing is done at a time, in the order asked for, so that what is known here of the manifest's snapshots is never
//! older than a change made here.

use std::collections::VecDeque;
use std::sync::Arc;

use tokio::sync::oneshot;

use super::api::IoError;
use super::engine::{State, Volume};
use super::job::{Backend, Done, Pause, Stopped};
use crate::checkpoint::make::{Ask, add_snapshot};
use crate::checkpoint::{CheckpointError, CheckpointName, Made, collect};
use crate::manifest::{self, CheckpointPointer, Hold, Manifest, ManifestError, Snapshot, SnapshotId};
use crate::table::{FrozenTable, TableError};
use crate::types::Lsn;

/// Between two looks at the manifest while clones hold what was deleted here: whoever deletes the last of them says so
/// there.
const LOOK_US: u64 = 300_000_000;

/// A snapshot to be made.
#[derive(Clone, Debug)]
pub struct SnapshotOrder {
    /// Its identity.
    pub id: SnapshotId,
    /// Its name.
    pub name: String,
    /// The clone it is for, and for nothing else: nobody sees it then.
    pub hold: Option<Hold>,
}

/// Why a snapshot could not be made or deleted.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The volume takes no writes.
    #[error(transparent)]
    Refused(#[from] IoError),
    /// The manifest says no, or cannot be reached.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// The translation table could not be copied.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
}

/// Where the outcome goes: the manifest as it is then.
pub type SnapshotReply = oneshot::Sender<Result<Manifest, SnapshotError>>;

/// What is to be done.
enum Work {
    Create { order: SnapshotOrder, reply: SnapshotReply },
    Delete { name: String, reply: SnapshotReply },
    Look,
}

/// How far the present work is.
enum Stage {
    /// No chunk ends at or after `lsn` yet.
    Cutting { order: SnapshotOrder, reply: SnapshotReply, lsn: Lsn },
    /// The table does not know the chunk `seq` yet, or is being copied.
    Applying { order: SnapshotOrder, reply: SnapshotReply, seq: u64, lsn: Lsn, freezing: bool },
    /// The bucket and the manifest are at work on it.
    Recording { reply: Option<SnapshotReply>, seq: Option<u64> },
}

/// What a job found or did.
#[derive(Debug)]
pub(super) enum SnapshotDone {
    Frozen(Result<Arc<FrozenTable>, TableError>),
    Recorded(Result<(Box<Manifest>, Option<Made>), SnapshotError>),
    /// The manifest, and objects that what is gone from it needed.
    Looked(Result<(Box<Manifest>, Vec<String>), SnapshotError>),
}

/// See the module.
#[derive(Default)]
pub(super) struct Snapshots {
    /// As the manifest had them last.
    known: Vec<Snapshot>,
    queue: VecDeque<Work>,
    stage: Option<Stage>,
    /// Changes of the table, and bytes destaged for them, since the copy for the present one.
    newer: (u64, u64),
    look_us: u64,
}

impl Snapshots {
    /// As found by opening.
    pub fn new(known: Vec<Snapshot>) -> Self {
        Self { known, ..Self::default() }
    }

    /// How many there are.
    pub fn count(&self) -> u64 {
        self.known.len() as u64
    }

    /// Positions whose chunks must stay.
    pub fn positions(&self) -> Vec<u64> {
        let coming = match &self.stage {
            Some(Stage::Applying { seq, .. }) => Some(*seq),
            Some(Stage::Recording { seq, .. }) => *seq,
            _ => None,
        };
        self.known.iter().map(|snapshot| snapshot.seq).chain(coming).collect()
    }

    pub fn table_changed(&mut self, stored_bytes: u64) {
        self.newer.0 += 1;
        self.newer.1 += stored_bytes;
    }
}

impl Volume {
    /// Makes a snapshot of everything accepted so far. The answer comes when the durable manifest has it.
    pub fn create_snapshot(&mut self, order: SnapshotOrder, reply: SnapshotReply) {
        self.want_snapshot(Work::Create { order, reply });
    }

    /// Deletes the snapshot of this name, or hides it while clones need it.
    pub fn delete_snapshot(&mut self, name: &str, reply: SnapshotReply) {
        self.want_snapshot(Work::Delete { name: name.to_owned(), reply });
    }

    /// Reads anew which snapshots the manifest has: somebody else may have deleted the last clone of a hidden one.
    pub fn look_at_snapshots(&mut self) {
        self.snapshots.queue.push_back(Work::Look);
    }

    fn want_snapshot(&mut self, work: Work) {
        match (self.write_error(), work) {
            (None, work) => self.snapshots.queue.push_back(work),
            (Some(error), Work::Create { reply, .. } | Work::Delete { reply, .. }) => answer(reply, Err(error.into())),
            (Some(_), Work::Look) => {}
        }
    }

    /// Refuses what is not in the hands of a job: the volume closes, or is another host's.
    pub(super) fn refuse_snapshots(&mut self) {
        let why = self.write_error().unwrap_or(IoError::Shutdown);
        let s = &mut self.snapshots;
        let mut refused = Vec::new();
        for work in s.queue.drain(..) {
            if let Work::Create { reply, .. } | Work::Delete { reply, .. } = work {
                refused.push(reply);
            }
        }
        match s.stage.take() {
            Some(Stage::Cutting { reply, .. } | Stage::Applying { reply, freezing: false, .. }) => refused.push(reply),
            other => s.stage = other,
        }
        for reply in refused {
            answer(reply, Err(why.clone().into()));
        }
    }

    /// Starts what waits.
    pub(super) fn snapshot_some(&mut self) {
        if self.state != State::Open || self.failed.is_some() {
            return self.refuse_snapshots();
        }
        let hidden = self.snapshots.known.iter().any(|snapshot| snapshot.hidden);
        if hidden && self.snapshots.look_us <= self.now_us {
            if self.snapshots.look_us > 0 {
                self.snapshots.queue.push_back(Work::Look);
            }
            self.snapshots.look_us = self.now_us + LOOK_US;
        }
        if self.snapshots.stage.is_some() {
            return;
        }
        match self.snapshots.queue.pop_front() {
            None => {}
            Some(Work::Create { order, reply }) => {
                let lsn = self.log.accepted_lsn();
                self.snapshots.stage = Some(Stage::Cutting { order, reply, lsn });
                // All of it may be in chunks already.
                self.snapshot_cut();
            }
            Some(Work::Delete { name, reply }) => {
                self.snapshots.stage = Some(Stage::Recording { reply: Some(reply), seq: None });
                self.spawn(self.backend.clone().delete_snapshot(name));
            }
            Some(Work::Look) => {
                self.snapshots.stage = Some(Stage::Recording { reply: None, seq: None });
                self.spawn(self.backend.clone().look_at_snapshots(self.snapshots.known.clone()));
            }
        }
    }

    pub(super) fn snapshot_deadline(&self) -> Option<u64> {
        let s = &self.snapshots;
        if self.state != State::Open || self.failed.is_some() {
            return None;
        }
        if s.stage.is_none() && !s.queue.is_empty() {
            return Some(self.now_us);
        }
        s.known.iter().any(|snapshot| snapshot.hidden).then_some(s.look_us)
    }

    /// The LSN that the chunk must reach which is cut next, for the sake of a snapshot.
    pub(super) fn snapshot_waits_for(&self) -> Option<Lsn> {
        match &self.snapshots.stage {
            Some(Stage::Cutting { lsn, .. }) => Some(*lsn),
            _ => None,
        }
    }

    /// The seq at which the table has to stand still.
    pub(super) fn snapshot_keeps_at(&self) -> Option<u64> {
        match &self.snapshots.stage {
            Some(Stage::Applying { seq, .. }) => Some(*seq),
            _ => None,
        }
    }

    /// A chunk was cut: it may be the one waited for.
    pub(super) fn snapshot_cut(&mut self) {
        let (seq, last_lsn) = self.last_cut();
        match self.snapshots.stage.take() {
            Some(Stage::Cutting { order, reply, lsn }) if last_lsn >= lsn => {
                self.snapshots.stage = Some(Stage::Applying { order, reply, seq, lsn: last_lsn, freezing: false });
                // Before the manifest has it, and before anything can die at a later position.
                self.set_held(self.snapshots.positions());
                self.snapshot_applied();
            }
            other => self.snapshots.stage = other,
        }
    }

    /// The table learnt of a chunk: it may be the one waited for.
    pub(super) fn snapshot_applied(&mut self) {
        let ready = match &self.snapshots.stage {
            Some(Stage::Applying { seq, freezing: false, .. }) => self.is_applied(*seq),
            _ => false,
        };
        if ready && let Some(Stage::Applying { seq, freezing, .. }) = &mut self.snapshots.stage {
            if *seq == 0 {
                return self.record_snapshot(None);
            }
            *freezing = true;
            self.spawn(self.backend.clone().freeze());
        }
    }

    /// Sends the copy of the table and records the snapshot.
    fn record_snapshot(&mut self, frozen: Option<Arc<FrozenTable>>) {
        let Some(Stage::Applying { order, reply, seq, lsn, .. }) = self.snapshots.stage.take() else { return };
        self.snapshots.newer = (0, 0);
        self.snapshots.stage = Some(Stage::Recording { reply: Some(reply), seq: Some(seq) });
        let row = Snapshot {
            id: order.id,
            name: order.name,
            seq,
            lsn,
            size: self.size,
            made_ms: (self.wall)(),
            epoch: self.epoch,
            checkpoint: None,
            hidden: order.hold.is_some(),
            holds: order.hold.into_iter().collect(),
        };
        self.spawn(self.backend.clone().record_snapshot(frozen, row));
        self.apply_next();
    }

    pub(super) fn snapshot_done(&mut self, done: SnapshotDone) {
        let (result, made, garbage) = match done {
            SnapshotDone::Frozen(Ok(frozen)) => return self.record_snapshot(Some(frozen)),
            SnapshotDone::Frozen(Err(error)) => (Err(CheckpointError::Table(error).into()), None, Vec::new()),
            SnapshotDone::Recorded(Ok((manifest, made))) => (Ok(manifest), made, Vec::new()),
            SnapshotDone::Looked(Ok((manifest, garbage))) => (Ok(manifest), None, garbage),
            SnapshotDone::Recorded(Err(error)) | SnapshotDone::Looked(Err(error)) => (Err(error), None, Vec::new()),
        };
        let (reply, unknown) = match self.snapshots.stage.take() {
            Some(Stage::Recording { reply, seq }) => (reply, seq),
            Some(Stage::Applying { reply, .. } | Stage::Cutting { reply, .. }) => (Some(reply), None),
            None => (None, None),
        };
        let result = match result {
            Ok(manifest) => {
                self.snapshots.known = manifest.snapshots.clone();
                if let Some(Made::Durable { pointer, sent_bytes, garbage, .. }) = made
                    && self.checkpointed().is_none_or(|newest| newest.position.seq < pointer.seq)
                {
                    self.checkpoint_named(pointer, self.snapshots.newer, sent_bytes, garbage);
                }
                self.collect_later(garbage);
                Ok(*manifest)
            }
            Err(error) => {
                let not_ours = matches!(
                    &error,
                    SnapshotError::Manifest(ManifestError::NotOwner(_))
                        | SnapshotError::Checkpoint(CheckpointError::Manifest(ManifestError::NotOwner(_)))
                );
                if not_ours {
                    self.stop(Stopped::Fenced(error.to_string()));
                } else if unknown.is_some() && self.state == State::Open {
                    // It may have taken effect all the same: nothing is let go before that is known.
                    self.snapshots.queue.push_front(Work::Look);
                }
                Err(error)
            }
        };
        if result.is_ok() || unknown.is_none() {
            self.set_held(self.snapshots.positions());
        }
        if let Some(reply) = reply {
            answer(reply, result);
        }
        self.apply_next();
    }
}

/// Whoever asked may be gone.
fn answer(reply: SnapshotReply, result: Result<Manifest, SnapshotError>) {
    let _ = reply.send(result);
}

impl Backend {
    /// Reads the volume's manifest.
    pub async fn manifest(&self) -> Result<Manifest, ManifestError> {
        Ok(manifest::open(self.store.as_ref(), &self.name, self.keys.as_ref()).await?.0)
    }

    async fn freeze(self) -> Done {
        let table = self.table.clone();
        let frozen = match self.blocking.run_low(move || table.freeze()).await {
            Ok(frozen) => frozen.map(Arc::new),
            Err(error) => Err(TableError::Files(error)),
        };
        Done::Snapshot(SnapshotDone::Frozen(frozen))
    }

    async fn record_snapshot(self, frozen: Option<Arc<FrozenTable>>, row: Snapshot) -> Done {
        let closing = self.closing.clone();
        let result = tokio::select! {
            biased;
            // Whether the manifest has it is found out by whoever opens the volume next.
            () = closing.wait() => Err(CheckpointError::Closing.into()),
            result = self.try_record(frozen, row) => result,
        };
        Done::Snapshot(SnapshotDone::Recorded(result))
    }

    async fn try_record(
        &self,
        frozen: Option<Arc<FrozenTable>>,
        row: Snapshot,
    ) -> Result<(Box<Manifest>, Option<Made>), SnapshotError> {
        let mut pause = Pause::default();
        loop {
            let result = match &frozen {
                Some(frozen) => self.record_checkpoint(frozen, &row).await,
                None => self.change(|m| add_snapshot(m, &row)).await.map(|m| (Box::new(m), None)).map_err(Into::into),
            };
            match result {
                Err(error) if is_transient(&error) => {
                    self.set_trouble(Some(error.to_string()));
                    if self.closing.sleep(pause.next(&self.jitter)).await {
                        return Err(error);
                    }
                }
                result => {
                    if pause.was_needed() {
                        self.set_trouble(None);
                    }
                    return result;
                }
            }
        }
    }

    async fn record_checkpoint(
        &self,
        frozen: &Arc<FrozenTable>,
        row: &Snapshot,
    ) -> Result<(Box<Manifest>, Option<Made>), SnapshotError> {
        let ask = Ask {
            store: self.store.as_ref(),
            table: &self.table,
            blocking: self.blocking,
            budget_bytes: None,
            now_ms: row.made_ms,
            stop: &|| false,
        };
        let with = |pointer: CheckpointPointer| Snapshot { checkpoint: Some(pointer), ..row.clone() };
        let made = self.keeper.lock().await.record(&ask, frozen, &with).await?;
        match &made {
            Made::Durable { manifest, .. } => Ok((manifest.clone(), Some(made))),
            Made::TooDear { .. } => unreachable!("a snapshot may cost what it costs"),
        }
    }

    async fn delete_snapshot(self, name: String) -> Done {
        let result = async {
            let mut gone = None;
            let manifest = self
                .change(|manifest| {
                    let volume = manifest.name.clone();
                    let found = manifest.snapshots.iter().position(|s| !s.hidden && s.name == name);
                    let Some(at) = found else {
                        // An attempt whose answer was lost may have done it.
                        if gone.is_some() {
                            return Ok(());
                        }
                        return Err(ManifestError::NoSnapshot { volume, snapshot: name.clone() });
                    };
                    gone = Some(manifest.snapshots[at].clone());
                    if manifest.snapshots[at].holds.is_empty() {
                        manifest.snapshots.remove(at);
                    } else {
                        manifest.snapshots[at].hidden = true;
                    }
                    Ok(())
                })
                .await?;
            let garbage = self.objects_of(gone.iter().filter(|s| !manifest.snapshots.iter().any(|t| t.id == s.id)));
            let garbage = garbage.await;
            Ok((Box::new(manifest), garbage))
        };
        Done::Snapshot(SnapshotDone::Looked(result.await))
    }

    async fn look_at_snapshots(self, known: Vec<Snapshot>) -> Done {
        let mut pause = Pause::default();
        let result = loop {
            match self.manifest().await {
                Err(error) if error.is_transient() => {
                    if self.closing.sleep(pause.next(&self.jitter)).await {
                        break Err(CheckpointError::Closing.into());
                    }
                }
                Err(error) => break Err(error.into()),
                Ok(manifest) => {
                    let is_there = |s: &Snapshot| manifest.snapshots.iter().any(|t| t.id == s.id);
                    let garbage = self.objects_of(known.iter().filter(|s| !is_there(s))).await;
                    break Ok((Box::new(manifest), garbage));
                }
            }
        };
        Done::Snapshot(SnapshotDone::Looked(result))
    }

    /// The volume's own objects that these snapshots needed; others may need them as well.
    async fn objects_of(&self, snapshots: impl Iterator<Item = &Snapshot>) -> Vec<String> {
        let mut objects = Vec::new();
        for pointer in snapshots.filter_map(|snapshot| snapshot.checkpoint) {
            // Which files one that cannot be read needed is found by the next opening.
            let found = collect::objects(self.store.as_ref(), &pointer.object, self.keys.as_ref()).await;
            let own = CheckpointName::prefix(pointer.object.volume);
            objects.extend(found.into_iter().filter(|key| key.starts_with(&own)));
        }
        objects
    }

    async fn change(
        &self,
        apply: impl FnMut(&mut Manifest) -> Result<(), ManifestError>,
    ) -> Result<Manifest, ManifestError> {
        manifest::try_update(self.store.as_ref(), &self.name, self.epoch, self.keys.as_ref(), apply).await
    }
}

fn is_transient(error: &SnapshotError) -> bool {
    match error {
        SnapshotError::Manifest(error) | SnapshotError::Checkpoint(CheckpointError::Manifest(error)) => {
            error.is_transient()
        }
        SnapshotError::Checkpoint(CheckpointError::Store(error)) => error.is_transient(),
        _ => false,
    }
}
