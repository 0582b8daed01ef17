//! Changes to volumes that are not I/O: resize and delete.

use super::open::OpenError;
use crate::checkpoint::collect;
use crate::chunk::ChunkName;
use crate::crypt::Keys;
use crate::lease;
use crate::manifest::{self, ManifestError, VolumeState};
use crate::store::ObjectStore;
use crate::types::VolumeId;

/// Keys handed to the store in one deletion.
const DELETE_BATCH: u64 = 1000;
/// Chunks probed beyond the last one known when a volume is deleted: as many as an owner may have had on their way.
const IN_FLIGHT_MAX: u64 = 64;

/// Records a new size in bytes in the manifest of a volume owned under `epoch`; an open volume must then be told by
/// [`super::Volume::set_size`].
pub async fn resize(
    store: &dyn ObjectStore,
    name: &str,
    epoch: u64,
    size: u64,
    keys: Option<&Keys>,
) -> Result<(), ManifestError> {
    manifest::update(store, name, epoch, keys, |manifest| manifest.size = size).await.map(drop)
}

/// Deletes a volume whose lease is ours: marks it, which keeps others from opening it, deletes its chunks, then its
/// lease and its manifest. Interrupted, it can be called again. `last_epoch` is the last one as far as the caller knows,
/// 0 for a volume that was never opened: when another host has claimed one since, the volume is that one's and nothing
/// is done. `progress` hears how many of how many chunks are gone.
pub async fn delete(
    store: &dyn ObjectStore,
    name: &str,
    last_epoch: u64,
    progress: impl Fn(u64, u64),
) -> Result<(), OpenError> {
    let error = |e| OpenError::manifest(name, e);
    // Deleting is the one change that needs no key.
    let manifest = loop {
        let (mut manifest, version) = manifest::load(store, name).await.map_err(error)?;
        if manifest.state == VolumeState::Deleting {
            break manifest;
        }
        if manifest.epochs.last().map_or(0, |last| last.epoch) != last_epoch {
            return Err(error(ManifestError::NotOwner(name.to_owned())));
        }
        manifest.state = VolumeState::Deleting;
        match manifest::replace(store, &manifest, version).await {
            Ok(_) => break manifest,
            Err(ManifestError::LostRace(_)) => {}
            Err(e) => return Err(error(e)),
        }
    };
    // Every chunk and seal ever put has a name that follows from the manifest, up to those that were on their way
    // when the last owner went.
    let settled: Vec<_> = manifest.epochs.iter().filter(|e| e.first_seq > 0).collect();
    let mut end = settled.last().map_or(0, |e| e.first_seq);
    if let Some(last) = settled.last() {
        let name = |seq| ChunkName { volume: manifest.id, epoch: last.epoch, seq };
        // Whatever it holds: who lost the key of an encrypted volume can delete it all the same.
        while super::own::stands(store, name(end)).await? {
            end += 1;
        }
    }
    let total = end + IN_FLIGHT_MAX;
    for (i, epoch) in settled.iter().enumerate() {
        let next = settled.get(i + 1).map_or(end, |e| e.first_seq);
        let mut seq = epoch.first_seq;
        while seq < next + IN_FLIGHT_MAX {
            let until = (seq + DELETE_BATCH).min(next + IN_FLIGHT_MAX);
            let keys: Vec<String> =
                (seq..until).map(|seq| ChunkName { volume: manifest.id, epoch: epoch.epoch, seq }.key()).collect();
            store.delete(&keys).await?;
            progress(until.min(total), total);
            seq = until;
        }
    }
    delete_relocated(store, manifest.id).await?;
    let checkpoints = collect::list(store, manifest.id).await?;
    for batch in checkpoints.chunks(DELETE_BATCH as usize) {
        store.delete(&batch.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>()).await?;
    }
    // Somebody else may have finished this deletion long ago, and made a new volume of the name.
    match manifest::load(store, name).await {
        Ok((found, _)) if found.id == manifest.id && found.state == VolumeState::Deleting => {
            lease::remove(store, name).await.map_err(OpenError::from)?;
            manifest::remove(store, name).await.map_err(error)
        }
        Ok(_) | Err(ManifestError::NotFound(_)) => Ok(()),
        Err(e) => Err(error(e)),
    }
}

/// Deletes what compaction wrote, and whatever else stands under the volume's prefixes: its numbers have gaps, so only
/// a listing tells them all.
async fn delete_relocated(store: &dyn ObjectStore, volume: VolumeId) -> Result<(), OpenError> {
    for spread in 0..=255u8 {
        let prefix = ChunkName::prefix(volume, spread);
        let mut after: Option<String> = None;
        loop {
            let page = store.list(&prefix, after.as_deref()).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.key.clone());
            store.delete(&page.into_iter().map(|entry| entry.key).collect::<Vec<_>>()).await?;
        }
    }
    Ok(())
}
