//! What clones hold of the volume they were made of, and how that is let go.
//!
//! A hold stands in the origin's manifest, in the row of the snapshot the clone was made of. It is written before the
//! clone's manifest, and removed when the clone's objects are gone and before its manifest is: so whatever can be reached
//! is held. An origin that is deleted while it is held moves to `held/<volume>`, by which its name is free; whoever removes
//! the last hold there deletes the rest, and lets go of what that volume held itself.
//!
//! Both places have one owner of the truth at any time: a manifest under its name that is being deleted and is held is moved
//! first by whoever comes across it, and only then changed.

use futures::FutureExt;
use futures::future::BoxFuture;

use super::open::OpenError;
use crate::checkpoint::{collect, rebuild};
use crate::crypt::Keys;
use crate::lease;
use crate::manifest::{self, Hold, LockError, Manifest, ManifestError, Origin, Snapshot, VolumeState};
use crate::store::{self, ObjectStore, Version};
use crate::types::VolumeId;

/// What became of a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// It is gone.
    Gone,
    /// The origin's manifest can only be changed with its key: it is found to be of nobody when that snapshot is deleted.
    Locked,
}

/// Removes the hold that `clone` has on its origin. `keys` are the clone's, which are the origin's as well.
pub fn release<'a>(
    store: &'a dyn ObjectStore,
    origin: &'a Origin,
    clone: VolumeId,
    keys: Option<&'a Keys>,
) -> BoxFuture<'a, Result<Released, OpenError>> {
    async move {
        let error = |e| OpenError::manifest(&origin.name, e);
        loop {
            match manifest::load(store, &origin.name).await {
                Ok((found, _)) if found.id == origin.volume => {
                    if found.state == VolumeState::Deleting {
                        if !found.is_held() {
                            return Ok(Released::Gone);
                        }
                        move_away(store, &found).await?;
                        continue;
                    }
                    let removed = manifest::change(store, &origin.name, keys, |manifest| {
                        if manifest.id == origin.volume && manifest.state == VolumeState::Active {
                            remove(manifest, clone);
                        }
                        Ok(())
                    });
                    match removed.await {
                        // It may have begun to be deleted meanwhile.
                        Ok(manifest) if has(&manifest, clone) => continue,
                        Ok(_) => return Ok(Released::Gone),
                        Err(ManifestError::Lock(LockError::Locked(_) | LockError::NotEncrypted(_))) => {
                            return Ok(Released::Locked);
                        }
                        Err(ManifestError::NotFound(_)) => continue,
                        Err(e) => return Err(error(e)),
                    }
                }
                Ok(_) | Err(ManifestError::NotFound(_)) => return release_held(store, origin, clone, keys).await,
                Err(e) => return Err(error(e)),
            }
        }
    }
    .boxed()
}

/// As [`release`], where the origin is deleted and lives on for its clones only.
async fn release_held(
    store: &dyn ObjectStore,
    origin: &Origin,
    clone: VolumeId,
    keys: Option<&Keys>,
) -> Result<Released, OpenError> {
    let error = |e| OpenError::manifest(&origin.name, e);
    let (left, version) = loop {
        let Some((found, version)) = manifest::load_held(store, origin.volume).await.map_err(error)? else {
            return Ok(Released::Gone);
        };
        let mut left = found.clone();
        remove(&mut left, clone);
        if left == found {
            break (left, version);
        }
        match manifest::replace_held(store, &left, version).await {
            Ok(version) => break (left, version),
            Err(ManifestError::LostRace(_)) => {}
            Err(e) => return Err(error(e)),
        }
    };
    if !left.is_held() {
        finish_held(store, &left, &version, keys).await?;
    }
    Ok(Released::Gone)
}

/// Deletes what is left of a volume that nobody holds any more.
async fn finish_held(
    store: &dyn ObjectStore,
    left: &Manifest,
    version: &Version,
    keys: Option<&Keys>,
) -> Result<(), OpenError> {
    delete_objects(store, left.id, |_, _| {}).await?;
    if let Some(origin) = &left.origin {
        release(store, origin, left.id, keys).await?;
    }
    manifest::remove_held(store, left.id, version).await.map_err(|e| OpenError::manifest(&left.name, e))
}

fn has(manifest: &Manifest, clone: VolumeId) -> bool {
    manifest.snapshots.iter().any(|snapshot| snapshot.holds.iter().any(|hold| hold.volume == clone))
}

/// Removes the hold of `clone`, and snapshots that were kept for nothing else.
fn remove(manifest: &mut Manifest, clone: VolumeId) {
    for snapshot in &mut manifest.snapshots {
        snapshot.holds.retain(|hold| hold.volume != clone);
    }
    manifest.snapshots.retain(|snapshot| !snapshot.hidden || !snapshot.holds.is_empty());
}

/// Takes the manifest of a volume that is being deleted and is held to where it is found by the volume's identity, and frees
/// its name. Anybody may do this, and several at once.
pub(super) async fn move_away(store: &dyn ObjectStore, manifest: &Manifest) -> Result<(), OpenError> {
    let error = |e| OpenError::manifest(&manifest.name, e);
    let created = manifest::create_held(store, manifest).await.map_err(error)?;
    let freed = free_name(store, manifest).await?;
    match created {
        // Others have moved it and let go of it since: what was just written is nobody's.
        Some(version) if !freed => manifest::remove_held(store, manifest.id, &version).await.map_err(error),
        _ => Ok(()),
    }
}

/// Deletes lease and manifest of a volume that is being deleted, if its name is still its own: somebody else may have finished
/// long ago, and made a new volume of that name. Whether it was.
pub(super) async fn free_name(store: &dyn ObjectStore, manifest: &Manifest) -> Result<bool, OpenError> {
    let error = |e| OpenError::manifest(&manifest.name, e);
    match manifest::load(store, &manifest.name).await {
        Ok((found, version)) if found.id == manifest.id && found.state == VolumeState::Deleting => {
            lease::remove(store, &manifest.name).await?;
            manifest::remove(store, &manifest.name, &version).await.map_err(error)?;
            Ok(true)
        }
        Ok(_) | Err(ManifestError::NotFound(_)) => Ok(false),
        Err(e) => Err(error(e)),
    }
}

/// Deletes everything of a volume but manifest and lease. `progress` hears how many of how many objects are gone.
pub(super) async fn delete_objects(
    store: &dyn ObjectStore,
    volume: VolumeId,
    progress: impl Fn(u64, u64),
) -> Result<(), OpenError> {
    let chunks = rebuild::list_chunks(store, volume, |_, _| {}).await?;
    let chunks = chunks.into_iter().map(|chunk| chunk.name.key());
    let checkpoints = collect::list(store, volume).await?.into_iter().map(|(key, _)| key);
    let keys: Vec<String> = chunks.chain(checkpoints).collect();
    let total = keys.len() as u64;
    let mut done = 0;
    for batch in keys.chunks(store::DELETE_MAX) {
        store::delete_all(store, batch).await?;
        done += batch.len() as u64;
        progress(done, total);
    }
    Ok(())
}

/// Lets go of holds on `snapshot` whose clone never came to be, or is gone: what a clone's making or deletion left that was
/// interrupted. A clone that is being made at this very moment fails.
pub async fn release_stale(
    store: &dyn ObjectStore,
    manifest: &Manifest,
    snapshot: &Snapshot,
    keys: Option<&Keys>,
) -> Result<(), OpenError> {
    for hold in &snapshot.holds {
        let error = |e| OpenError::manifest(&hold.name, e);
        let other = match manifest::load(store, &hold.name).await {
            // What took the name of one that never was, below; whoever did that did not come to its end.
            Ok((found, _)) if found.id == hold.volume && is_tombstone(&found) => {
                super::delete(store, &hold.name, 0, keys, |_, _| {}).await?;
                continue;
            }
            Ok((found, _)) if found.id == hold.volume => continue,
            Ok(_) => true,
            Err(ManifestError::NotFound(_)) => false,
            Err(e) => return Err(error(e)),
        };
        if manifest::load_held(store, hold.volume).await.map_err(error)?.is_some() {
            continue;
        }
        let origin = origin_of(manifest, snapshot);
        if other {
            release(store, &origin, hold.volume, keys).await?;
            continue;
        }
        // Its name is taken first, so that nobody can finish making it.
        let tombstone = Manifest { origin: Some(origin), ..tombstone(manifest, hold) };
        match manifest::create(store, &tombstone).await {
            Ok(_) => super::delete(store, &hold.name, 0, keys, |_, _| {}).await.map(drop)?,
            Err(ManifestError::Exists(_)) => {}
            Err(e) => return Err(error(e)),
        }
    }
    Ok(())
}

/// What a clone of `snapshot` says of its origin.
pub fn origin_of(manifest: &Manifest, snapshot: &Snapshot) -> Origin {
    Origin {
        volume: manifest.id,
        name: manifest.name.clone(),
        snapshot: snapshot.id,
        epoch: manifest.epochs.last().map_or(snapshot.epoch, |last| last.epoch),
        seq: snapshot.seq,
        lsn: snapshot.lsn,
        checkpoint: snapshot.checkpoint,
    }
}

/// The manifest of a clone that is being deleted and never was.
fn tombstone(manifest: &Manifest, hold: &Hold) -> Manifest {
    Manifest {
        durability: manifest.durability,
        codec: manifest.codec,
        chunk_bytes: manifest.chunk_bytes,
        state: VolumeState::Deleting,
        created_ms: manifest.created_ms,
        origin: manifest.origin.clone(),
        ..Manifest::new(hold.volume, &hold.name, manifest.size)
    }
}

/// Whether it is such a manifest: a clone that was made has an epoch from the beginning.
fn is_tombstone(manifest: &Manifest) -> bool {
    manifest.state == VolumeState::Deleting && manifest.epochs.is_empty() && manifest.origin.is_some()
}

/// Goes on with a volume that is deleted but for what clones need, where an interruption left it to nobody: lets go of
/// holds whose clones are not there and, when no other is left, deletes the rest. Whether nothing of it is left.
pub async fn settle_held(store: &dyn ObjectStore, volume: VolumeId, keys: Option<&Keys>) -> Result<bool, OpenError> {
    let load = async || {
        let found = manifest::load_held(store, volume).await;
        found.map_err(|e| OpenError::manifest(&manifest::held_key(volume), e))
    };
    let Some((manifest, _)) = load().await? else { return Ok(true) };
    for snapshot in &manifest.snapshots {
        release_stale(store, &manifest, snapshot, keys).await?;
    }
    match load().await? {
        Some((left, _)) if left.is_held() => Ok(false),
        Some((left, version)) => finish_held(store, &left, &version, keys).await.map(|()| true),
        None => Ok(true),
    }
}

/// Whether none of the clones is there that a volume is kept for which is deleted but for them.
pub(crate) async fn is_left_alone(store: &dyn ObjectStore, held: &Manifest) -> Result<bool, OpenError> {
    for hold in held.snapshots.iter().flat_map(|snapshot| &snapshot.holds) {
        match manifest::load(store, &hold.name).await {
            Ok((found, _)) if found.id == hold.volume && !is_tombstone(&found) => return Ok(false),
            Ok(_) | Err(ManifestError::NotFound(_)) => {}
            Err(e) => return Err(OpenError::manifest(&hold.name, e)),
        }
        let kept = manifest::load_held(store, hold.volume).await;
        if kept.map_err(|e| OpenError::manifest(&hold.name, e))?.is_some() {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the origin still holds for `clone`.
pub(crate) async fn is_held(store: &dyn ObjectStore, origin: &Origin, clone: VolumeId) -> Result<bool, OpenError> {
    let error = |e| OpenError::manifest(&origin.name, e);
    match manifest::load(store, &origin.name).await {
        Ok((found, _)) if found.id == origin.volume => return Ok(has(&found, clone)),
        Ok(_) | Err(ManifestError::NotFound(_)) => {}
        Err(e) => return Err(error(e)),
    }
    let held = manifest::load_held(store, origin.volume).await.map_err(error)?;
    Ok(held.is_some_and(|(found, _)| has(&found, clone)))
}
