//! Changes to volumes that are not I/O: resize and delete.

use super::open::OpenError;
use crate::checkpoint::collect;
use crate::chunk::ChunkName;
use crate::manifest::{self, ManifestError, VolumeState};
use crate::store::ObjectStore;

/// Keys handed to the store in one deletion.
const DELETE_BATCH: u64 = 1000;
/// Chunks probed beyond the last one known when a volume is deleted: as many as an owner may have had on their way.
const IN_FLIGHT_MAX: u64 = 64;

/// Records a new size in bytes in the manifest, as the owner of `epoch`; the open volume must then be told by
/// [`super::Volume::set_size`].
pub async fn resize(store: &dyn ObjectStore, name: &str, epoch: u64, size: u64) -> Result<(), ManifestError> {
    manifest::update(store, name, epoch, |manifest| manifest.size = size).await.map(|_| ())
}

/// Deletes a volume that no daemon serves: marks it, deletes its chunks, then its manifest. Interrupted, it can be
/// called again. `progress` hears how many of how many chunks are gone.
pub async fn delete(store: &dyn ObjectStore, name: &str, progress: impl Fn(u64, u64)) -> Result<(), OpenError> {
    let error = |e| OpenError::manifest(name, e);
    let manifest = manifest::change(store, name, |manifest| {
        manifest.state = VolumeState::Deleting;
        Ok(())
    });
    let manifest = manifest.await.map_err(error)?;
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
    let checkpoints = collect::list(store, manifest.id).await?;
    for batch in checkpoints.chunks(DELETE_BATCH as usize) {
        store.delete(&batch.iter().map(|(key, _)| key.clone()).collect::<Vec<_>>()).await?;
    }
    manifest::remove(store, name).await.map_err(error)
}
