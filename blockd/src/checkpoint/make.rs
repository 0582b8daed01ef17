//! Sending a copy of the table to the bucket.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;

use super::error::CheckpointError;
use super::format::{Checkpoint, Content, TableFile, file_sum};
use super::restore::fetch_object;
use super::seal::seal_object;
use crate::crypt::Keys;
use crate::manifest::{self, CheckpointName, CheckpointPointer};
use crate::store::{ObjectStore, PutMode, StoreErrorKind};
use crate::table::{FrozenTable, Table};
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
        if let (Some(current), None) = (&self.current, &self.base) {
            // Without it every file is sent anew: no reason not to go on.
            match fetch_object(ask.store, &current.object, self.keys.as_ref()).await {
                Ok(base) => self.base = Some(base),
                Err(error) => {
                    tracing::warn!("the last checkpoint cannot be read, so all of the next one is sent: {error}")
                }
            }
        }
        let candidates: BTreeMap<String, TableFile> = match &self.base {
            Some(base) => base.files.iter().map(|file| (file.name.clone(), file.clone())).collect(),
            None => BTreeMap::new(),
        };
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
        let frozen = ask.blocking.run_low(move || table.freeze()).await??;
        let frozen = Arc::new(frozen);
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
        self.finish(&ask, &frozen, files, sent_bytes).await
    }

    /// From files in the bucket to a manifest that says so.
    async fn finish(
        &mut self,
        ask: &Ask<'_>,
        frozen: &FrozenTable,
        files: Vec<TableFile>,
        mut sent_bytes: u64,
    ) -> Result<Made, CheckpointError> {
        let checkpoint = Checkpoint {
            name: self.next_name(),
            seq: frozen.applied.seq,
            lsn: frozen.applied.lsn,
            relocated: frozen.position.relocated,
            made_ms: ask.now_ms,
            files,
        };
        let own = self.put(ask.store, &checkpoint.name.key(), checkpoint.encode()).await?;
        sent_bytes += own;
        let pointer = CheckpointPointer {
            object: checkpoint.name,
            seq: checkpoint.seq,
            lsn: checkpoint.lsn,
            relocated: checkpoint.relocated,
            bytes: checkpoint.file_bytes() + own,
            made_ms: checkpoint.made_ms,
        };
        let keys = self.keys.as_ref();
        manifest::update(ask.store, &self.name, self.epoch, keys, |m| m.checkpoint = Some(pointer)).await?;
        // Durable from here on.
        let keys: BTreeSet<String> = checkpoint.keys().collect();
        let before = self.base.iter().flat_map(Checkpoint::keys).chain(self.current.map(|old| old.object.key()));
        let garbage: BTreeSet<String> =
            before.chain(std::mem::take(&mut self.written)).filter(|key| !keys.contains(key)).collect();
        self.sent.retain(|name, _| checkpoint.files.iter().any(|file| file.name == *name));
        self.current = Some(pointer);
        self.base = Some(checkpoint);
        Ok(Made::Durable { pointer, sent_bytes, garbage: garbage.into_iter().collect() })
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
