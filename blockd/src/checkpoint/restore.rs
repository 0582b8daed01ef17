//! Bringing a copy of the table back from the bucket.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use bytes::Bytes;
use futures::{FutureExt, StreamExt, TryStreamExt, stream};

use super::error::{CheckpointError, Flaw, Stand};
use super::format::{Checkpoint, Content, TableFile};
use super::seal::open_object;
use crate::crypt::Keys;
use crate::manifest::{CheckpointName, CheckpointPointer};
use crate::store::{ObjectStore, StoreErrorKind};
use crate::table::{Applied, Position, Stage, Table, TableHome};
use crate::types::VolumeId;
use crate::volume::Blocking;

/// Files fetched at the same time; each is held in memory as a whole, 32 MiB mostly.
const PARALLEL: usize = 6;
/// How often an object is fetched before it counts as damaged: it may have been damaged on the way.
const ATTEMPTS: usize = 3;

/// A table made of a checkpoint.
#[derive(Debug)]
pub struct Restored {
    /// It, open.
    pub table: Table,
    /// What it was made of.
    pub checkpoint: Checkpoint,
    /// Bytes that came from the bucket.
    pub fetched_bytes: u64,
}

/// Puts the checkpoint `pointer` in the place of the table in `home`, which must not be open, and opens it. Files that
/// are here already, in the present table or from an interrupted attempt, are not fetched.
///
/// # Errors
/// [`CheckpointError::is_damage`]: it is of no use. Else the same may succeed later, going on where this stopped; until
/// all files are here the present table stays.
pub async fn restore(
    store: &dyn ObjectStore,
    home: &TableHome,
    volume: VolumeId,
    pointer: &CheckpointPointer,
    blocking: Blocking,
    keys: Option<&Keys>,
) -> Result<Restored, CheckpointError> {
    let checkpoint = fetch_checkpoint(store, pointer, keys).await?;
    let fetched = Arc::new(AtomicU64::new(0));
    let stage = Arc::new(home.stage()?);
    let from = (store, keys, pointer.object.key());
    let files: Vec<_> = checkpoint
        .files
        .iter()
        .map(|file| bring(from.clone(), file.clone(), stage.clone(), blocking, fetched.clone()).boxed())
        .collect();
    // In a fixed order, so that a simulation repeats.
    stream::iter(files).buffered(PARALLEL).try_collect::<Vec<()>>().await?;
    let stage = Arc::into_inner(stage).expect("everything that held it is done");
    let (kept, home, whose) = (checkpoint.clone(), home.clone(), pointer.object.volume);
    let opened = blocking
        .run(move || {
            stage.commit(&kept.files.iter().map(|file| file.name.as_str()).collect::<BTreeSet<_>>())?;
            // A clone's first one is its origin's.
            Ok::<_, CheckpointError>(home.open(whose))
        })
        .await?;
    let key = pointer.object.key();
    let mut table = opened.map_err(|e| CheckpointError::damaged(&key, Flaw::Table(e.to_string())))?;
    let (expected, found) = (Stand::from(pointer), Stand { applied: table.applied(), position: table.position() });
    if found != expected {
        return Err(CheckpointError::damaged(&key, Flaw::Position { expected, found }));
    }
    if whose != volume {
        table = blocking.run(move || table.become_clone(volume).map(|()| table)).await?;
    }
    Ok(Restored { table, checkpoint, fetched_bytes: fetched.load(Relaxed) })
}

/// Sees that one file is in the stage.
async fn bring(
    (store, keys, key): (&dyn ObjectStore, Option<&Keys>, String),
    file: TableFile,
    stage: Arc<Stage>,
    blocking: Blocking,
    fetched: Arc<AtomicU64>,
) -> Result<(), CheckpointError> {
    let (there, row) = (stage.clone(), file.clone());
    if blocking.run(move || there.has(&row.name, row.size, |content| row.is(content))).await? {
        return Ok(());
    }
    let content = fetch_file(store, &key, &file, keys).await?;
    if matches!(file.content, Content::Object { .. }) {
        fetched.fetch_add(content.len() as u64, Relaxed);
    }
    Ok(blocking.run(move || stage.write(&file.name, &content)).await?)
}

/// Reads every object of the checkpoint and compares it with its checksum. `visit` hears the length of each file.
pub async fn verify(
    store: &dyn ObjectStore,
    pointer: &CheckpointPointer,
    keys: Option<&Keys>,
    visit: impl Fn(u64),
) -> Result<Checkpoint, CheckpointError> {
    let checkpoint = fetch_checkpoint(store, pointer, keys).await?;
    let key = pointer.object.key();
    let files: Vec<_> = checkpoint.files.iter().map(|file| fetch_file(store, &key, file, keys).boxed()).collect();
    let mut files = stream::iter(files).buffered(PARALLEL);
    while let Some(content) = files.try_next().await? {
        visit(content.len() as u64);
    }
    drop(files);
    Ok(checkpoint)
}

/// The checkpoint object that a manifest points to.
pub async fn fetch_checkpoint(
    store: &dyn ObjectStore,
    pointer: &CheckpointPointer,
    keys: Option<&Keys>,
) -> Result<Checkpoint, CheckpointError> {
    let checkpoint = fetch_object(store, &pointer.object, keys).await?;
    let found = Stand {
        applied: Applied { seq: checkpoint.seq, lsn: checkpoint.lsn },
        position: Position { seq: checkpoint.seq, relocated: checkpoint.relocated },
    };
    let expected = Stand::from(pointer);
    match expected == found {
        true => Ok(checkpoint),
        false => Err(CheckpointError::damaged(&pointer.object.key(), Flaw::Position { expected, found })),
    }
}

/// A checkpoint object.
pub async fn fetch_object(
    store: &dyn ObjectStore,
    name: &CheckpointName,
    keys: Option<&Keys>,
) -> Result<Checkpoint, CheckpointError> {
    let key = name.key();
    fetch(store, &key, keys, |bytes| Ok(Checkpoint::decode(&bytes, name)?)).await
}

/// The content of a file, verified. `key` is the checkpoint object's.
pub async fn fetch_file(
    store: &dyn ObjectStore,
    key: &str,
    file: &TableFile,
    keys: Option<&Keys>,
) -> Result<Bytes, CheckpointError> {
    let fit = |content: Bytes| match () {
        () if content.len() as u64 != file.size => Err(Flaw::Length { need: file.size, have: content.len() as u64 }),
        () if !file.is(&content) => Err(Flaw::Checksum),
        () => Ok(content),
    };
    match &file.content {
        Content::Inline(packed) => {
            let content = zstd::bulk::decompress(packed, file.size as usize);
            let content = content.map_err(|_| CheckpointError::damaged(key, Flaw::Checksum))?;
            fit(content.into()).map_err(|flaw| CheckpointError::damaged(key, flaw))
        }
        Content::Object { name, .. } => fetch(store, &name.file_key(), keys, fit).await,
    }
}

/// Reads an object until `parse` takes it, a few times.
async fn fetch<T>(
    store: &dyn ObjectStore,
    key: &str,
    keys: Option<&Keys>,
    parse: impl Fn(Bytes) -> Result<T, Flaw>,
) -> Result<T, CheckpointError> {
    let mut flaw = Flaw::Missing;
    for _ in 0..ATTEMPTS {
        let stored = match store.get(key).await {
            Ok((stored, _)) => stored,
            Err(e) if e.kind == StoreErrorKind::NotFound => return Err(CheckpointError::damaged(key, Flaw::Missing)),
            Err(e) => return Err(e.into()),
        };
        match open_object(keys, key, stored).ok_or(Flaw::Checksum).and_then(&parse) {
            Ok(value) => return Ok(value),
            Err(why) => flaw = why,
        }
    }
    Err(CheckpointError::damaged(key, flaw))
}
