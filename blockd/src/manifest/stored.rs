//! Manifests in the bucket.

use bytes::Bytes;

use super::format::{Manifest, ManifestFormatError, VolumeState};
use super::lock::LockError;
use super::name::{InvalidName, check_name};
use super::snapshot::MAX_SNAPSHOTS;
use crate::crypt::Keys;
use crate::store::{ObjectStore, PutMode, StoreError, StoreErrorKind, Version};
use crate::types::VolumeId;

const PREFIX: &str = "volumes/";
const SUFFIX: &str = "/manifest";
/// Where manifests of volumes are that only clones need any more.
pub const HELD: &str = "held/";
/// So many lost races in a row are no races: the store refuses for a reason of its own.
const RACES_MAX: usize = 50;

/// A failure with a volume's manifest.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Somebody else wrote it since it was read. Load it again and decide anew.
    #[error("the manifest of volume {0:?} was changed by somebody else meanwhile")]
    LostRace(String),
    /// A volume of this name is there already.
    #[error("a volume named {0:?} exists already; choose another name")]
    Exists(String),
    /// No volume of this name.
    #[error("there is no volume named {0:?}")]
    NotFound(String),
    /// The name cannot be one.
    #[error(transparent)]
    Name(#[from] InvalidName),
    /// What was to be written could not be read again.
    #[error("the manifest of volume {name:?} cannot be written: {why}")]
    Unfit {
        /// The volume.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The object is not a manifest of this volume.
    #[error("the manifest of volume {name:?} is damaged: {source}")]
    Damaged {
        /// The volume.
        name: String,
        /// What is wrong with it.
        source: ManifestFormatError,
    },
    /// It is on its way out of the store.
    #[error("volume {0:?} is being deleted")]
    Deleting(String),
    /// A change that only its owner may make.
    #[error("another host has volume {0:?} now; `blockd volume show {0}` says which")]
    NotOwner(String),
    /// A snapshot of this name is there already.
    #[error("volume {volume:?} has a snapshot {snapshot:?} already; choose another name, or delete that one first")]
    SnapshotExists {
        /// The volume.
        volume: String,
        /// Its snapshot.
        snapshot: String,
    },
    /// No snapshot of this name.
    #[error("volume {volume:?} has no snapshot {snapshot:?}; `blockd snapshot list {volume}` shows those there are")]
    NoSnapshot {
        /// The volume.
        volume: String,
        /// What is not there.
        snapshot: String,
    },
    /// As many snapshots as there may be.
    #[error("volume {0:?} has {MAX_SNAPSHOTS} snapshots, those that clones need included, and can have no more")]
    TooManySnapshots(String),
    /// An encrypted volume without its key, or with a wrong one.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// The store failed. After a failed write its outcome is unknown: doing the same again finds out.
    #[error("cannot reach the manifest of the volume: {0}")]
    Store(#[from] StoreError),
}

impl ManifestError {
    /// Whether the same may succeed later without anybody doing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_transient())
    }
}

/// The object key of a volume's manifest.
pub fn key(name: &str) -> String {
    format!("{PREFIX}{name}{SUFFIX}")
}

/// Writes the manifest of a new volume.
pub async fn create(store: &dyn ObjectStore, manifest: &Manifest) -> Result<Version, ManifestError> {
    check_name(&manifest.name)?;
    let key = key(&manifest.name);
    put(store, &key, manifest, PutMode::Create).await?.ok_or_else(|| ManifestError::Exists(manifest.name.clone()))
}

/// Replaces a manifest that is still what it was when it was read as `version`.
pub async fn replace(store: &dyn ObjectStore, manifest: &Manifest, version: Version) -> Result<Version, ManifestError> {
    check_name(&manifest.name)?;
    put_over(store, &key(&manifest.name), manifest, version).await
}

async fn put_over(
    store: &dyn ObjectStore,
    key: &str,
    manifest: &Manifest,
    version: Version,
) -> Result<Version, ManifestError> {
    let replaced = put(store, key, manifest, PutMode::Replace(version)).await?;
    replaced.ok_or_else(|| ManifestError::LostRace(manifest.name.clone()))
}

/// The key of the manifest of a volume that is deleted but for what its clones need.
pub fn held_key(volume: VolumeId) -> String {
    format!("{HELD}{volume}")
}

/// Stores the manifest of a volume that is being deleted where its clones find it. Its version there if this did it.
pub async fn create_held(store: &dyn ObjectStore, manifest: &Manifest) -> Result<Option<Version>, ManifestError> {
    if manifest.state != VolumeState::Deleting {
        return Err(ManifestError::Unfit { name: manifest.name.clone(), why: "it is not being deleted" });
    }
    match store.put(&held_key(manifest.id), manifest.encode(), PutMode::Create).await {
        Ok(version) => Ok(Some(version)),
        Err(error) if error.kind == StoreErrorKind::Precondition => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Reads such a manifest; none when there is none.
pub async fn load_held(
    store: &dyn ObjectStore,
    volume: VolumeId,
) -> Result<Option<(Manifest, Version)>, ManifestError> {
    let key = held_key(volume);
    let (bytes, version) = match store.get(&key).await {
        Ok(found) => found,
        Err(error) if error.kind == StoreErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let damaged = |source| ManifestError::Damaged { name: key.clone(), source };
    let manifest = Manifest::decode(&bytes).map_err(damaged)?;
    if manifest.id != volume || manifest.state != VolumeState::Deleting {
        return Err(damaged(ManifestFormatError::Invalid("it is the manifest of another volume")));
    }
    Ok(Some((manifest, version)))
}

/// Replaces such a manifest that is still what it was when it was read as `version`.
pub async fn replace_held(
    store: &dyn ObjectStore,
    manifest: &Manifest,
    version: Version,
) -> Result<Version, ManifestError> {
    put_over(store, &held_key(manifest.id), manifest, version).await
}

/// Deletes such a manifest, if it is still what it was as `version`.
pub async fn remove_held(store: &dyn ObjectStore, volume: VolumeId, version: &Version) -> Result<(), ManifestError> {
    delete(store, &held_key(volume), version).await
}

/// What stands there in another version is somebody else's, and this one is gone.
async fn delete(store: &dyn ObjectStore, key: &str, version: &Version) -> Result<(), ManifestError> {
    match store.delete_version(key, version).await {
        Err(error) if error.kind != StoreErrorKind::Precondition => Err(error.into()),
        _ => Ok(()),
    }
}

/// The new version, or nothing when the condition did not hold.
async fn put(
    store: &dyn ObjectStore,
    key: &str,
    manifest: &Manifest,
    mode: PutMode,
) -> Result<Option<Version>, ManifestError> {
    if let Some(why) = manifest.problem() {
        return Err(ManifestError::Unfit { name: manifest.name.clone(), why });
    }
    if manifest.is_stale() {
        let why = "its volume is encrypted, and whoever changes it must have the key";
        return Err(ManifestError::Unfit { name: manifest.name.clone(), why });
    }
    let bytes: Bytes = manifest.encode();
    match store.put(key, bytes.clone(), mode).await {
        Ok(version) => return Ok(Some(version)),
        Err(error) if error.kind == StoreErrorKind::Precondition => {}
        Err(error) => return Err(error.into()),
    }
    // An earlier attempt of this very write, whose answer was lost, may be what stands there now.
    match store.get(key).await {
        Ok((found, version)) if found == bytes => Ok(Some(version)),
        Ok(_) => Ok(None),
        Err(error) if error.kind == StoreErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Reads the manifest of the volume `name` and believes it only if the owner of `keys` wrote it; of a volume that is not
/// encrypted, without keys. Its version is for [`replace`].
pub async fn open(
    store: &dyn ObjectStore,
    name: &str,
    keys: Option<&Keys>,
) -> Result<(Manifest, Version), ManifestError> {
    let (mut manifest, version) = load(store, name).await?;
    manifest.verify(keys)?;
    Ok((manifest, version))
}

/// Makes a change to the manifest of the volume `name`, on whatever stands there at the moment it takes effect: a lost
/// race reads it again. `apply` may therefore run several times and must be idempotent, and where it changes nothing,
/// nothing is written. So an earlier attempt whose answer was lost is recognised, and after an error of the store the
/// same call finds out. Returns the manifest as it stands then.
pub async fn change(
    store: &dyn ObjectStore,
    name: &str,
    keys: Option<&Keys>,
    mut apply: impl FnMut(&mut Manifest) -> Result<(), ManifestError>,
) -> Result<Manifest, ManifestError> {
    for _ in 0..RACES_MAX {
        let (old, version) = open(store, name, keys).await?;
        let mut new = old.clone();
        apply(&mut new)?;
        if new == old {
            return Ok(new);
        }
        match replace(store, &new, version).await {
            Ok(_) => return Ok(new),
            Err(ManifestError::LostRace(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Err(ManifestError::LostRace(name.to_owned()))
}

/// As [`change`], by the owner of `epoch`: refused as soon as a later one is settled.
pub async fn update(
    store: &dyn ObjectStore,
    name: &str,
    epoch: u64,
    keys: Option<&Keys>,
    mut apply: impl FnMut(&mut Manifest),
) -> Result<Manifest, ManifestError> {
    try_update(store, name, epoch, keys, |manifest| {
        apply(manifest);
        Ok(())
    })
    .await
}

/// As [`update`], with a change that may be refused.
pub async fn try_update(
    store: &dyn ObjectStore,
    name: &str,
    epoch: u64,
    keys: Option<&Keys>,
    mut apply: impl FnMut(&mut Manifest) -> Result<(), ManifestError>,
) -> Result<Manifest, ManifestError> {
    change(store, name, keys, |manifest| {
        if manifest.settled().is_none_or(|last| last.epoch != epoch) {
            return Err(ManifestError::NotOwner(name.to_owned()));
        }
        if manifest.state != VolumeState::Active {
            return Err(ManifestError::Deleting(name.to_owned()));
        }
        apply(manifest)
    })
    .await
}

/// Reads the manifest of the volume `name`, to look at or to delete it: of an encrypted volume it is not verified, and
/// cannot be changed. Its version is for [`replace`].
pub async fn load(store: &dyn ObjectStore, name: &str) -> Result<(Manifest, Version), ManifestError> {
    check_name(name)?;
    let (bytes, version) = store.get(&key(name)).await.map_err(|error| match error.kind {
        StoreErrorKind::NotFound => ManifestError::NotFound(name.to_owned()),
        _ => error.into(),
    })?;
    let damaged = |source| ManifestError::Damaged { name: name.to_owned(), source };
    let manifest = Manifest::decode(&bytes).map_err(damaged)?;
    if manifest.name != name {
        return Err(damaged(ManifestFormatError::Invalid("it is the manifest of another volume")));
    }
    Ok((manifest, version))
}

/// The names of all volumes, in order.
pub async fn list(store: &dyn ObjectStore) -> Result<Vec<String>, ManifestError> {
    let mut names = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let page = store.list(PREFIX, after.as_deref()).await?;
        let Some(last) = page.last() else {
            return Ok(names);
        };
        after = Some(last.key.clone());
        names.extend(page.iter().filter_map(|entry| {
            let name = entry.key.strip_prefix(PREFIX)?.strip_suffix(SUFFIX)?;
            check_name(name).ok().map(|()| name.to_owned())
        }));
    }
}

/// Deletes the manifest of the volume `name`, if it is still what it was as `version`: a volume that was made under that name
/// since is another one. Its other objects must be gone before, or nothing tells whose they are.
pub async fn remove(store: &dyn ObjectStore, name: &str, version: &Version) -> Result<(), ManifestError> {
    check_name(name)?;
    delete(store, &key(name), version).await
}
