//! Deleting what no checkpoint needs any more.

use std::collections::BTreeSet;

use super::error::CheckpointError;
use super::restore::fetch_object;
use crate::crypt::Keys;
use crate::manifest::{self, CheckpointName, Manifest, ManifestError};
use crate::store::{self, ObjectStore, StoreError};
use crate::types::VolumeId;

/// Deletes those of `garbage` that nothing the durable manifest names refers to, as the owner of `epoch`. Returns how
/// many. The grace must have passed: whoever read an older manifest may still be reading what that named.
///
/// # Errors
/// Nothing was deleted, or it may be tried again.
pub async fn collect(
    store: &dyn ObjectStore,
    name: &str,
    epoch: u64,
    keys: Option<&Keys>,
    garbage: &[String],
) -> Result<usize, CheckpointError> {
    let (manifest, _) = manifest::open(store, name, keys).await?;
    if manifest.settled().is_none_or(|last| last.epoch != epoch) {
        return Err(ManifestError::NotOwner(name.to_owned()).into());
    }
    let reached = reached(store, &manifest, keys).await?;
    let dead: Vec<String> = garbage.iter().filter(|key| !reached.contains(*key)).cloned().collect();
    store::delete_all(store, &dead).await?;
    Ok(dead.len())
}

/// Keys of all objects that the checkpoints named by `manifest` need.
///
/// # Errors
/// One of them cannot be read: then nobody knows what it needs, and nothing may be deleted.
pub async fn reached(
    store: &dyn ObjectStore,
    manifest: &Manifest,
    keys: Option<&Keys>,
) -> Result<BTreeSet<String>, CheckpointError> {
    let mut reached = BTreeSet::new();
    for name in manifest.held_checkpoints() {
        reached.extend(fetch_object(store, &name, keys).await?.keys());
    }
    Ok(reached)
}

/// Keys of the objects that the checkpoint `name` needs; only its own if it cannot be read.
pub async fn objects(store: &dyn ObjectStore, name: &CheckpointName, keys: Option<&Keys>) -> Vec<String> {
    match fetch_object(store, name, keys).await {
        Ok(checkpoint) => checkpoint.keys().collect(),
        Err(_) => vec![name.key()],
    }
}

/// Keys that owners before `epoch` left behind, those in use among them: what [`collect`] may be given.
pub async fn left_behind(
    store: &dyn ObjectStore,
    volume: VolumeId,
    epoch: u64,
) -> Result<Vec<String>, CheckpointError> {
    let keys = list(store, volume).await?;
    Ok(keys
        .into_iter()
        .map(|(key, _)| key)
        // What is none of ours is not ours to delete.
        .filter(|key| CheckpointName::parse(key).is_some_and(|name| name.epoch < epoch))
        .collect())
}

/// Every object under the volume's checkpoint prefix, and its length.
pub async fn list(store: &dyn ObjectStore, volume: VolumeId) -> Result<Vec<(String, u64)>, StoreError> {
    let found = store::list_all(store, &CheckpointName::prefix(volume)).await?;
    Ok(found.into_iter().map(|entry| (entry.key, entry.size)).collect())
}
