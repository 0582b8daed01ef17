//! Changes to volumes that are not I/O: resize and delete.

use super::holds;
use super::open::OpenError;
use crate::crypt::Keys;
use crate::manifest::{self, ManifestError, VolumeState};
use crate::store::ObjectStore;

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

/// What is left of a volume that was deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deleted {
    /// Nothing.
    All,
    /// What its clones need, until the last of them goes.
    Held,
    /// Nothing of it, but the volume it was a clone of does not know that it is gone, because its manifest is locked.
    OriginLocked,
}

/// Deletes a volume whose lease is ours: marks it, which keeps others from opening it, deletes its objects, lets go of the
/// volume it is a clone of, then deletes its lease and its manifest. While clones hold it only its name goes. Interrupted, it
/// can be called again. `last_epoch` is the last one as far as the caller knows, 0 for a volume that was never opened: when
/// another host has claimed one since, the volume is that one's and nothing is done. `keys` are the volume's, if there are
/// any at hand: only the origin of an encrypted clone wants them. `progress` hears how many of how many objects are gone.
pub async fn delete(
    store: &dyn ObjectStore,
    name: &str,
    last_epoch: u64,
    keys: Option<&Keys>,
    progress: impl Fn(u64, u64),
) -> Result<Deleted, OpenError> {
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
        manifest.snapshots.retain(|snapshot| !snapshot.holds.is_empty());
        manifest.snapshots.iter_mut().for_each(|snapshot| snapshot.hidden = true);
        match manifest::replace(store, &manifest, version).await {
            Ok(_) => break manifest,
            Err(ManifestError::LostRace(_)) => {}
            Err(e) => return Err(error(e)),
        }
    };
    if manifest.is_held() {
        holds::move_away(store, &manifest).await?;
        return Ok(Deleted::Held);
    }
    // What was on its way when the last owner went may land after the listing; it is nothing to anybody.
    holds::delete_objects(store, manifest.id, progress).await?;
    let mut left = Deleted::All;
    if let Some(origin) = &manifest.origin
        && holds::release(store, origin, manifest.id, keys).await? == holds::Released::Locked
    {
        left = Deleted::OriginLocked;
    }
    holds::free_name(store, &manifest).await?;
    Ok(left)
}
