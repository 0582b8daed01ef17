//! Changes to volumes that are not I/O: resize and delete.

use super::open::OpenError;
use crate::chunk::ChunkName;
use crate::manifest::{self, ManifestError, VolumeState};
use crate::store::ObjectStore;
use crate::types::VolumeId;

/// Keys handed to the store in one deletion.
const DELETE_BATCH: u64 = 1000;
/// Chunks probed beyond the last one known when a volume is deleted: as many as an owner may have had on their way.
const IN_FLIGHT_MAX: u64 = 64;

/// Records a new size in bytes in the manifest; an open volume must then be told by [`super::Volume::set_size`].
pub async fn resize(store: &dyn ObjectStore, name: &str, size: u64) -> Result<(), ManifestError> {
    let (mut manifest, version) = manifest::load(store, name).await?;
    manifest.size = size;
    manifest::replace(store, &manifest, version).await.map(|_| ())
}

/// Deletes a volume that no daemon serves: marks it, deletes its chunks, then its manifest. Interrupted, it can be
/// called again. `progress` hears how many of how many chunks are gone.
pub async fn delete(store: &dyn ObjectStore, name: &str, progress: impl Fn(u64, u64)) -> Result<(), OpenError> {
    let error = |e| OpenError::manifest(name, e);
    let (mut manifest, version) = manifest::load(store, name).await.map_err(error)?;
    if manifest.state != VolumeState::Deleting {
        manifest.state = VolumeState::Deleting;
        manifest::replace(store, &manifest, version).await.map_err(error)?;
    }
    // Every chunk and seal ever put has a name that follows from the manifest, up to those that were on their way
    // when the last owner went.
    let settled: Vec<_> = manifest.epochs.iter().filter(|e| e.first_seq > 0).collect();
    let mut end = settled.last().map_or(0, |e| e.first_seq);
    if let Some(last) = settled.last() {
        let name = |seq| ChunkName { volume: manifest.id, epoch: last.epoch, seq };
        while super::own::data_chunk(store, name(end)).await?.is_some() {
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
    manifest::remove(store, name).await.map_err(error)
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
