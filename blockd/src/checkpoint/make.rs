//! Sending a copy of the table to the bucket.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::error::CheckpointError;
use super::format::{Checkpoint, Content, TableFile, file_sum};
use super::restore::fetch_object;
use super::seal::seal_object;
use crate::crypt::Keys;
use crate::manifest::{self, CheckpointName, CheckpointPointer, MAX_SNAPSHOTS, Manifest, ManifestError, Snapshot};
use crate::store::{ObjectStore, PutMode, StoreErrorKind};
use crate::table::{FrozenTable, Position, Table};
use crate::types::VolumeId;
use crate::volume::Blocking;

/// What the owner of a volume remembers from checkpoint to checkpoint.
#[derive(Debug)]
pub struct Keeper {
    name: String,
    volume: VolumeId,
    epoch: u64,
    /// The last number used.
    number: u64,
    /// What the durable manifest points to.
    current: Option<CheckpointPointer>,
    /// The rows of that, once they are known.
    base: Option<Checkpoint>,
    /// Table files of this process that the bucket has, by name.
    sent: BTreeMap<String, TableFile>,
    /// Keys this process may have written.
    written: BTreeSet<String>,
    /// Of the volume, if it is encrypted.
    keys: Option<Keys>,
    /// What earlier owners left behind was looked for.
    swept: bool,
}

/// What became of an attempt to make a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Made {
    /// The manifest points to a new one.
    Durable {
        /// It.
        pointer: CheckpointPointer,
        /// Bytes sent for it.
        sent_bytes: u64,
        /// Keys that it made superfluous, as far as this process knows. See [`super::collect::collect`].
        garbage: Vec<String>,
        /// The manifest that points to it.
        manifest: Box<Manifest>,
    },
    /// Too much would have to be sent for what changed.
    TooDear {
        /// About how many bytes.
        bytes: u64,
    },
}

/// What an attempt needs.
pub struct Ask<'a> {
    /// The bucket.
    pub store: &'a dyn ObjectStore,
    /// The table.
    pub table: &'a Arc<Table>,
    /// Where files are read and compressed.
    pub blocking: Blocking,
    /// Most bytes to send, if that matters.
    pub budget_bytes: Option<u64>,
    /// The wall clock, in milliseconds.
    pub now_ms: u64,
    /// Whether to give up, asked between two files.
    pub stop: &'a (dyn Fn() -> bool + Send + Sync),
}

impl Keeper {
    /// Of the owner of `epoch`, who found `current` in the manifest. `restored` is that checkpoint when the table was
    /// just made of it, so that its files need not be compared again.
    pub fn new(
        name: &str,
        volume: VolumeId,
        epoch: u64,
        current: Option<CheckpointPointer>,
        restored: Option<Checkpoint>,
        keys: Option<Keys>,
    ) -> Self {
        let is_object = |file: &&TableFile| matches!(file.content, Content::Object { .. });
        let files = restored.iter().flat_map(|checkpoint| &checkpoint.files).filter(is_object);
        Self {
            name: name.to_owned(),
            volume,
            epoch,
            number: 0,
            current,
            sent: files.map(|file| (file.name.clone(), file.clone())).collect(),
            base: restored,
            keys,
            written: BTreeSet::new(),
            swept: false,
        }
    }

    /// Sends a copy of the table as it is now, and points the manifest to it. After an error everything stands as it
    /// was, but for objects that nothing refers to; what was sent already is not sent again.
    pub async fn make(&mut self, ask: Ask<'_>) -> Result<Made, CheckpointError> {
        self.fetch_base(&ask).await;
        let candidates = self.candidates();
        if let Some(budget) = ask.budget_bytes {
            let known = |name: &str, size: u64| {
                [&self.sent, &candidates].iter().any(|files| files.get(name).is_some_and(|file| file.size == size))
            };
            // What is still in memory would be counted by what it takes there, which is far too much.
            let table = ask.table.clone();
            ask.blocking.run_low(move || table.persist()).await??;
            let bytes = ask.table.unknown_bytes(&known);
            if bytes > budget {
                return Ok(Made::TooDear { bytes });
            }
        }
        let table = ask.table.clone();
        let frozen = Arc::new(ask.blocking.run_low(move || table.freeze()).await??);
        let (checkpoint, pointer, sent_bytes) = self.send(&ask, &frozen).await?;
        let keys = self.keys.as_ref();
        let manifest =
            manifest::update(ask.store, &self.name, self.epoch, keys, |m| m.checkpoint = Some(pointer)).await?;
        let garbage = self.take_over(checkpoint, pointer);
        Ok(Made::Durable { pointer, sent_bytes, garbage, manifest: Box::new(manifest) })
    }

    /// Sends `frozen`, a copy of the table made before, and records it as the snapshot that `snapshot` makes of it, by one
    /// change of the manifest, which also makes it the newest checkpoint unless there is a newer one. Done again after
    /// an error, it goes on where it was.
    pub async fn record(
        &mut self,
        ask: &Ask<'_>,
        frozen: &Arc<FrozenTable>,
        snapshot: &(dyn Fn(CheckpointPointer) -> Snapshot + Send + Sync),
    ) -> Result<Made, CheckpointError> {
        self.fetch_base(ask).await;
        let (checkpoint, pointer, sent_bytes) = self.send(ask, frozen).await?;
        let row = snapshot(pointer);
        let keys = self.keys.as_ref();
        let manifest = manifest::try_update(ask.store, &self.name, self.epoch, keys, |m| {
            add_snapshot(m, &row)?;
            if m.checkpoint.is_none_or(|newest| Position::from(&newest) < Position::from(&pointer)) {
                m.checkpoint = Some(pointer);
            }
            Ok(())
        })
        .await?;
        let newest = manifest.checkpoint.filter(|newest| newest.object == pointer.object);
        // If not, what was sent may still serve the next one.
        let garbage = newest.map_or_else(Vec::new, |_| self.take_over(checkpoint, pointer));
        let pointer = manifest.checkpoint.unwrap_or(pointer);
        Ok(Made::Durable { pointer, sent_bytes, garbage, manifest: Box::new(manifest) })
    }

    /// Sends `frozen` and makes it the newest checkpoint by the change of the manifest that `apply` makes, whatever that
    /// changes besides.
    pub async fn publish(
        &mut self,
        ask: &Ask<'_>,
        frozen: &Arc<FrozenTable>,
        apply: &(dyn Fn(&mut Manifest) + Send + Sync),
    ) -> Result<Manifest, CheckpointError> {
        let (_, pointer, _) = self.send(ask, frozen).await?;
        let keys = self.keys.as_ref();
        let changed = manifest::update(ask.store, &self.name, self.epoch, keys, |m| {
            m.checkpoint = Some(pointer);
            apply(m);
        });
        Ok(changed.await?)
    }

    /// Learns what the last checkpoint consists of, if that is not known.
    async fn fetch_base(&mut self, ask: &Ask<'_>) {
        if let (Some(current), None) = (&self.current, &self.base) {
            // Without it every file is sent anew: no reason not to go on.
            match fetch_object(ask.store, &current.object, self.keys.as_ref()).await {
                Ok(base) => self.base = Some(base),
                Err(error) => {
                    tracing::warn!("the last checkpoint cannot be read, so all of the next one is sent: {error}")
                }
            }
        }
    }

    /// Sends the files of `frozen` that the bucket does not have, and the checkpoint object.
    async fn send(
        &mut self,
        ask: &Ask<'_>,
        frozen: &Arc<FrozenTable>,
    ) -> Result<(Checkpoint, CheckpointPointer, u64), CheckpointError> {
        let candidates = self.candidates();
        let mut sent_bytes = 0;
        let mut files = Vec::new();
        for file in frozen.files.files() {
            if (ask.stop)() {
                return Err(CheckpointError::Closing);
            }
            if let Some(sent) = self.sent.get(&file.name).filter(|sent| sent.size == file.size && file.lasting) {
                files.push(sent.clone());
                continue;
            }
            let (copy, name) = (frozen.clone(), file.name.clone());
            let (content, sum) = ask
                .blocking
                .run_low(move || {
                    let content = copy.files.read(&name)?;
                    let sum = file_sum(&content);
                    Ok::<_, std::io::Error>((content, sum))
                })
                .await??;
            if !file.lasting {
                files.push(TableFile::inline(file.name, &content)?);
                continue;
            }
            // An earlier owner's file of the same name need not be the same: both went on from one table on their own.
            let row = match candidates.get(&file.name) {
                Some(candidate) if candidate.size == file.size && candidate.sum == sum => candidate.clone(),
                _ => {
                    let name = self.next_name();
                    let (key, size) = (name.file_key(), content.len() as u64);
                    let stored = self.put(ask.store, &key, content).await?;
                    sent_bytes += stored;
                    TableFile { name: file.name.clone(), size, sum, content: Content::Object { name, stored } }
                }
            };
            self.sent.insert(file.name, row.clone());
            files.push(row);
        }
        let checkpoint = Checkpoint {
            name: self.next_name(),
            seq: frozen.applied.seq,
            lsn: frozen.applied.lsn,
            relocated: frozen.position.relocated,
            made_ms: ask.now_ms,
            files,
        };
        let own = self.put(ask.store, &checkpoint.name.key(), checkpoint.encode()).await?;
        let pointer = CheckpointPointer {
            object: checkpoint.name,
            seq: checkpoint.seq,
            lsn: checkpoint.lsn,
            relocated: checkpoint.relocated,
            bytes: checkpoint.file_bytes() + own,
            made_ms: checkpoint.made_ms,
        };
        Ok((checkpoint, pointer, sent_bytes + own))
    }

    /// Table files that an earlier checkpoint may have in the bucket, by name.
    fn candidates(&self) -> BTreeMap<String, TableFile> {
        let files = self.base.iter().flat_map(|base| &base.files);
        files.map(|file| (file.name.clone(), file.clone())).collect()
    }

    /// The durable manifest names `checkpoint` from now on. Returns what that makes superfluous.
    fn take_over(&mut self, checkpoint: Checkpoint, pointer: CheckpointPointer) -> Vec<String> {
        let keys: BTreeSet<String> = checkpoint.keys().collect();
        let before = self.base.iter().flat_map(Checkpoint::keys).chain(self.current.map(|old| old.object.key()));
        // A clone's first checkpoints share files with its origin's, which are not its to delete.
        let own = CheckpointName::prefix(self.volume);
        let garbage: BTreeSet<String> = before
            .chain(std::mem::take(&mut self.written))
            .filter(|key| !keys.contains(key) && key.starts_with(&own))
            .collect();
        self.sent.retain(|name, _| checkpoint.files.iter().any(|file| file.name == *name));
        self.current = Some(pointer);
        self.base = Some(checkpoint);
        garbage.into_iter().collect()
    }

    /// Whether to look for what earlier owners left behind; true once.
    pub fn sweep_once(&mut self) -> bool {
        !std::mem::replace(&mut self.swept, true)
    }

    /// The volume's keys, if it is encrypted.
    pub fn keys(&self) -> Option<&Keys> {
        self.keys.as_ref()
    }

    /// Whose checkpoints these are: volume name, volume, epoch.
    pub fn owner(&self) -> (&str, VolumeId, u64) {
        (&self.name, self.volume, self.epoch)
    }

    /// Leaves numbers to another keeper of the same epoch, as there is none outside of tests.
    #[cfg(test)]
    pub(super) fn make_room(&mut self, numbers: u64) {
        self.number += numbers;
    }

    fn next_name(&mut self) -> CheckpointName {
        self.number += 1;
        CheckpointName { volume: self.volume, epoch: self.epoch, number: self.number }
    }

    /// Stores an object once. Returns its length in the bucket.
    async fn put(&mut self, store: &dyn ObjectStore, key: &str, plain: Vec<u8>) -> Result<u64, CheckpointError> {
        self.written.insert(key.to_owned());
        let bytes: Bytes = seal_object(self.keys.as_ref(), key, plain);
        let len = bytes.len() as u64;
        match store.put(key, bytes.clone(), PutMode::Create).await {
            Ok(_) => Ok(len),
            // The names are ours alone, so this should be an attempt whose answer was lost on the way.
            Err(e) if e.kind == StoreErrorKind::Precondition => match store.get(key).await?.0 == bytes {
                true => Ok(len),
                false => Err(e.into()),
            },
            Err(e) => Err(e.into()),
        }
    }
}

/// Adds a snapshot to a manifest that may have it already.
pub fn add_snapshot(manifest: &mut Manifest, row: &Snapshot) -> Result<(), ManifestError> {
    if manifest.snapshots.iter().any(|there| there.id == row.id) {
        return Ok(());
    }
    if !row.hidden && manifest.snapshot(&row.name).is_some() {
        let (volume, snapshot) = (manifest.name.clone(), row.name.clone());
        return Err(ManifestError::SnapshotExists { volume, snapshot });
    }
    if manifest.snapshots.len() >= MAX_SNAPSHOTS {
        return Err(ManifestError::TooManySnapshots(manifest.name.clone()));
    }
    manifest.snapshots.push(row.clone());
    Ok(())
}
