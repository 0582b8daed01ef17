//! Bringing the translation table up to the bucket's state when a volume is opened: from the table that is here, or from
//! the bucket's checkpoint, or from nothing; then from the chunk headers after that.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use super::beginning::Beginning;
use super::job::Blocking;
use super::open::OpenError;
use super::own::{self, Claim};
use crate::checkpoint::rebuild;
use crate::checkpoint::{Checkpoint, CheckpointError, Flaw, restore};
use crate::chunk::{ChunkIndex, ChunkName, ReadError, relocated_base};
use crate::crypt::Keys;
use crate::manifest::{self, CheckpointPointer, Manifest, Restored};
use crate::store::ObjectStore;
use crate::table::{Applied, Position, Table, TableError, TableHome};

/// Where the table came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TableFrom {
    /// It was here.
    Local,
    /// The bucket's checkpoint.
    Checkpoint {
        /// Bytes fetched for it.
        fetched_bytes: u64,
    },
    /// Chunk headers alone.
    Headers,
}

/// How far an opening is: so many of so many headers read. Shared with whoever shows it.
#[derive(Debug, Default)]
pub struct Progress {
    done: AtomicU64,
    total: AtomicU64,
}

impl Progress {
    /// Done and total; zeroes while nobody knows.
    pub fn get(&self) -> (u64, u64) {
        (self.done.load(Relaxed), self.total.load(Relaxed))
    }

    fn begin(&self, total: u64) {
        self.done.store(0, Relaxed);
        self.total.store(total, Relaxed);
    }

    fn step(&self) {
        self.done.fetch_add(1, Relaxed);
    }
}

/// What it takes.
pub(super) struct CatchUp<'a> {
    pub store: &'a dyn ObjectStore,
    pub home: &'a TableHome,
    pub blocking: Blocking,
    pub owner: [u8; 16],
    /// Forget table and checkpoint.
    pub rebuild: bool,
    pub progress: &'a Progress,
    /// Of the volume, if it is encrypted.
    pub keys: Option<&'a Keys>,
}

/// What came of it.
pub(super) struct CaughtUp {
    pub table: Table,
    pub from: TableFrom,
    /// The checkpoint the table was made of.
    pub restored: Option<Checkpoint>,
    /// Whether the manifest's checkpoint is of use, as far as it was looked at.
    pub checkpoint_sound: bool,
    pub headers_read: u64,
}

impl CatchUp<'_> {
    /// The table that is here, and how far it is or the bucket's checkpoint, whichever is further.
    pub async fn begin(&self, manifest: &Manifest) -> Result<(Table, Applied), OpenError> {
        let (home, volume) = (self.home.clone(), manifest.id);
        let table = self
            .blocking
            .run(move || {
                let table = home.open(volume)?;
                if table.applied() != Applied::default() || table.is_blank() {
                    return Ok(table);
                }
                // A rebuild that did not get to its end.
                drop(table);
                home.discard().map_err(TableError::Files)?;
                home.open(volume)
            })
            .await?;
        let local = table.applied();
        let known = match manifest.checkpoint {
            Some(pointer) if pointer.seq > local.seq => Applied { seq: pointer.seq, lsn: pointer.lsn },
            _ => local,
        };
        Ok((table, known))
    }

    /// When the newest chunk was cut, as far as that can be told.
    async fn written_ms(&self, claim: &Claim) -> u64 {
        let (manifest, state) = (&claim.manifest, &claim.state);
        if state.seq == 0 || state.written_ms != 0 {
            return state.written_ms;
        }
        let name = ChunkName { volume: manifest.id, epoch: manifest.epoch_of(state.seq), seq: state.seq };
        match own::data_chunk(self.store, name, self.keys).await {
            Ok(Some(index)) => index.created_ms,
            _ => manifest.checkpoint.map_or(0, |pointer| pointer.made_ms),
        }
    }

    /// Brings it to the state that was claimed.
    pub async fn finish(&self, local: Table, claim: &mut Claim) -> Result<CaughtUp, OpenError> {
        claim.state.written_ms = self.written_ms(claim).await;
        if self.rebuild {
            return self.rebuild(local, claim).await;
        }
        let pointer = claim.manifest.checkpoint;
        // A table that another owner's changes went past may know chunks that are gone, whatever its position.
        let ours = claim.previous.as_ref().is_none_or(|e| e.owner == self.owner);
        // Nor may one that compaction went past: the sources of what it moved are deleted.
        let newer = |pointer: &CheckpointPointer| !ours || Position::from(pointer) > local.position();
        let mut lost = None;
        let (table, from, restored) = match pointer.filter(newer) {
            None if ours => (local, TableFrom::Local, None),
            None => (self.empty(local, claim).await?, TableFrom::Headers, None),
            Some(pointer) => {
                // Its files are about to be replaced.
                drop(local);
                match restore::restore(self.store, self.home, claim.manifest.id, &pointer, self.blocking, self.keys)
                    .await
                {
                    Ok(restored) => {
                        let from = TableFrom::Checkpoint { fetched_bytes: restored.fetched_bytes };
                        (restored.table, from, Some(restored.checkpoint))
                    }
                    Err(e) if e.is_damage() => {
                        tracing::warn!(
                            volume = %claim.manifest.name,
                            "{e}; the translation table is made of chunk headers instead, which takes longer"
                        );
                        // These were noticed when the checkpoint had taken the table's place already.
                        let replaced =
                            matches!(e, CheckpointError::Damaged { flaw: Flaw::Table(_) | Flaw::Position { .. }, .. });
                        lost = Some(e.to_string());
                        self.fall_back(ours && !replaced, claim).await?
                    }
                    Err(e) => return Err(checkpoint_error(e)),
                }
            }
        };
        let empty = table.applied() == Applied::default() && claim.state.seq > 0;
        let from = if empty { TableFrom::Headers } else { from };
        let checkpoint_lost = |e, claim: &Claim| match (e, &lost) {
            (OpenError::Missing(missing), Some(checkpoint)) => {
                OpenError::CheckpointLost { name: claim.manifest.name.clone(), checkpoint: checkpoint.clone(), missing }
            }
            (e, _) => e,
        };
        // Chunks that a restore went back behind must not be applied, and a table from before it is no beginning.
        if missed_restore(&table, &claim.manifest) {
            return self.rebuild(table, claim).await.map_err(|e| checkpoint_lost(e, &*claim));
        }
        let (mut table, mut from) = (table, from);
        let mut headers_read =
            self.apply_headers(&table, &mut *claim).await.map_err(|e| checkpoint_lost(e, &*claim))?;
        if lost.is_some() && from == TableFrom::Local && !self.is_whole(&table, claim).await? {
            // It missed what compaction did before the checkpoint, and needs what was deleted then.
            (table, from) = (self.empty(table, claim).await?, TableFrom::Headers);
            headers_read = self.apply_headers(&table, &mut *claim).await.map_err(|e| checkpoint_lost(e, &*claim))?;
        }
        Ok(CaughtUp { table, from, restored, checkpoint_sound: lost.is_none(), headers_read })
    }

    /// With the checkpoint useless: the table that is here, if it can be relied on, else an empty one.
    async fn fall_back(
        &self,
        reliable: bool,
        claim: &Claim,
    ) -> Result<(Table, TableFrom, Option<Checkpoint>), OpenError> {
        let (home, volume) = (self.home.clone(), claim.manifest.id);
        let table = self.blocking.run(move || home.open(volume)).await?;
        if reliable {
            return Ok((table, TableFrom::Local, None));
        }
        Ok((self.empty(table, claim).await?, TableFrom::Headers, None))
    }

    /// Whether all chunks of this volume that blocks are mapped to are there.
    async fn is_whole(&self, table: &Table, claim: &Claim) -> Result<bool, OpenError> {
        let volume = claim.manifest.id;
        let listed = rebuild::list_chunks(self.store, volume, |_, _| {}).await?;
        let there: BTreeSet<ChunkName> = listed.iter().map(|chunk| chunk.name).collect();
        let used: Vec<u64> = table.with_usage(|used| used.keys().copied().collect());
        for id in used {
            let name = table.directory(id)?.name;
            if name.volume == volume && !there.contains(&name) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// A table before any chunk of the volume's own in place of `old`: an empty one, or that of the snapshot a clone was made
    /// of.
    async fn empty(&self, old: Table, claim: &Claim) -> Result<Table, OpenError> {
        let (home, volume) = (self.home.clone(), claim.manifest.id);
        if let Some(origin) = claim.manifest.origin.as_ref().filter(|origin| origin.seq > 0) {
            drop(old);
            let lost = |error: &CheckpointError| {
                tracing::warn!(
                    volume = %claim.manifest.name,
                    "{error}; what the clone begins with is made of chunk headers of {} instead, which takes longer",
                    origin.name
                );
            };
            let beginning =
                Beginning { store: self.store, home: self.home, blocking: self.blocking, keys: self.keys, lost: &lost };
            return beginning.table(origin, volume).await;
        }
        let made = self.blocking.run(move || {
            if old.is_blank() {
                return Ok(old);
            }
            drop(old);
            home.discard().map_err(TableError::Files)?;
            home.open(volume)
        });
        Ok(made.await?)
    }

    /// Applies the headers after the table's position. Returns how many.
    async fn apply_headers(&self, table: &Table, claim: &mut Claim) -> Result<u64, OpenError> {
        let (first, last) = (table.applied().seq + 1, claim.state.seq);
        self.progress.begin((last + 1).saturating_sub(first));
        // The claim has read the newest of them already; a reader's holes are errors, in order.
        let mut known = std::mem::take(&mut claim.headers);
        let known = known.split_off(&first);
        let unread_end = known.keys().next().copied().unwrap_or(last + 1);
        let contiguous = known.len() as u64 == last + 1 - unread_end.min(last + 1);
        let unread_end = if contiguous { unread_end } else { last + 1 };
        let manifest = &claim.manifest;
        let chunk = |seq| ChunkName { volume: manifest.id, epoch: manifest.epoch_of(seq), seq };
        let apply = |index: ChunkIndex| {
            self.progress.step();
            table.apply(&index).map_err(OpenError::from)
        };
        let missing = |e| match e {
            OpenError::Chunk(ReadError::Missing { name }) => OpenError::Missing(name.key()),
            e => e,
        };
        rebuild::read_headers(self.store, self.keys, (first..unread_end).map(chunk), apply).await.map_err(missing)?;
        for (_, index) in known.range(unread_end..) {
            apply(index.clone())?;
        }
        Ok((last + 1).saturating_sub(first))
    }

    /// A table from nothing but the chunks there are.
    async fn rebuild(&self, local: Table, claim: &mut Claim) -> Result<CaughtUp, OpenError> {
        let name = claim.manifest.name.clone();
        let table = self.empty(local, claim).await?;
        let listed = rebuild::list_chunks(self.store, claim.manifest.id, |_, _| {}).await?;
        let history = rebuild::history(&claim.manifest, &listed, claim.state.seq);
        // What the last checkpoint knew to be dead may have been deleted.
        let pointer = claim.manifest.checkpoint;
        let lost = rebuild::lost(&history.holes, pointer.map_or(0, |pointer| pointer.seq));
        if !lost.is_empty() {
            return Err(OpenError::Holes { name, holes: Holes(lost) });
        }
        if !history.holes.is_empty() {
            tracing::warn!(
                volume = %name,
                "chunks {} are not there; each was deleted when nothing referred to it any more, or is lost: from headers \
                 alone that cannot be told",
                Holes(history.holes.clone())
            );
        }
        let headers_read = (history.fresh.len() + 2 * history.relocated.len()) as u64;
        self.progress.begin(headers_read);
        tracing::info!(
            volume = %name,
            chunks = history.fresh.len(),
            relocated = history.relocated.len(),
            "rebuilding the translation table from chunk headers"
        );
        let upto = Applied { seq: claim.state.seq, lsn: claim.state.lsn };
        let fill = rebuild::fill::<OpenError>(
            self.store,
            self.keys,
            &history,
            &table,
            upto,
            |_| true,
            || self.progress.step(),
        );
        Box::pin(fill).await?;
        let mut checkpoint_sound = true;
        // A checkpoint that is of no use would only be in the way at the next opening.
        if let Some(pointer) = claim.manifest.checkpoint
            && let Err(error) = restore::verify(self.store, &pointer, self.keys, |_| {}).await
        {
            if !error.is_damage() {
                return Err(checkpoint_error(error));
            }
            checkpoint_sound = false;
            if history.holes.is_empty() {
                tracing::warn!(volume = %name, "{error}; the manifest names no checkpoint any more, until the next one is made");
                let epoch = claim.manifest.epochs.last().map_or(0, |e| e.epoch);
                let changed =
                    manifest::update(self.store, &name, epoch, self.keys, |manifest| manifest.checkpoint = None).await;
                claim.manifest = changed.map_err(|e| OpenError::manifest(&name, e))?;
            } else {
                // Its position says up to where chunks may be missing, should this be done again.
                tracing::warn!(volume = %name, "{error}; the next checkpoint takes its place");
            }
        }
        Ok(CaughtUp { table, from: TableFrom::Headers, restored: None, checkpoint_sound, headers_read })
    }
}

/// Whether the volume went back to a snapshot at a place that the table has not come to.
pub(crate) fn missed_restore(table: &Table, manifest: &Manifest) -> bool {
    let before = |r: &Restored| Position { seq: r.from_seq, relocated: relocated_base(r.epoch) };
    manifest.restores.last().is_some_and(|last| table.position() <= before(last))
}

pub(super) fn checkpoint_error(error: CheckpointError) -> OpenError {
    match error {
        CheckpointError::Store(e) => OpenError::Store(e),
        CheckpointError::Table(e) => OpenError::Table(e),
        e => OpenError::Checkpoint(e),
    }
}

/// Ranges of missing chunks, as people read them.
#[derive(Debug)]
pub struct Holes(pub Vec<(u64, u64)>);

impl std::fmt::Display for Holes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        const SHOWN: usize = 10;
        let ranges = self.0.iter().take(SHOWN).map(|(first, last)| match first == last {
            true => first.to_string(),
            false => format!("{first} to {last}"),
        });
        f.write_str(&ranges.collect::<Vec<_>>().join(", "))?;
        match self.0.len().checked_sub(SHOWN + 1) {
            Some(more) => write!(f, " and {} more ranges", more + 1),
            None => Ok(()),
        }
    }
}
