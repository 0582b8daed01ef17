//! Making clones.

use std::sync::Arc;

use super::keys::wrap;
use super::volumes::{Daemon, Entry, Phase, VolumeError, Why, unix_ms, with_volume};
use crate::admin::api::{CloneVolume, VolumeStatus};
use crate::crypt::{Keys, Secret};
use crate::manifest::{self, Hold, LockError, Manifest, ManifestError};
use crate::program::explain;
use crate::store::ObjectStore;
use crate::types::VolumeId;
use crate::volume::{self, CloneOrder, OpenError};

impl Daemon {
    /// Makes a volume of a snapshot of another and serves it. The other may be any host's; without a snapshot, one is made,
    /// for which it must be open here.
    pub async fn clone_volume(
        self: &Arc<Self>,
        source: &str,
        request: CloneVolume,
    ) -> Result<VolumeStatus, VolumeError> {
        self.refuse_while_closing()?;
        let name = request.name.clone();
        for name in [&name].into_iter().chain(&request.snapshot) {
            manifest::check_name(name).map_err(|e| VolumeError::Invalid(e.to_string()))?;
        }
        let (manifest, _) = self.load(source).await?;
        let locked = |error: &dyn std::fmt::Display| VolumeError::Conflict(error.to_string());
        let keys = self.keys.keys_of(&manifest).await.map_err(|e| locked(&e))?;
        let secret = self.secret_for_clone(&manifest, &request)?;
        {
            let mut entries = self.entries_mut();
            if entries.contains_key(&name) {
                return Err(VolumeError::Conflict(format!(
                    "a volume named {name:?} exists already; choose another name"
                )));
            }
            entries.insert(name.clone(), Entry::new(None, Phase::Opening));
        }
        let made = self.make_clone(&manifest, &request, keys.as_ref(), secret).await;
        let clone = match made {
            Ok(clone) => clone,
            Err(error) => {
                self.entries_mut().remove(&name);
                return Err(error);
            }
        };
        tracing::info!(volume = %name, of = source, "clone made");
        if let Some(keys) = keys {
            self.keys.hold(clone.id, keys);
        }
        if let Some(entry) = self.entries_mut().get_mut(&name) {
            entry.manifest = Some(clone.clone());
        }
        self.tell_snapshots(source).await;
        self.open_device(clone, Why::Asked, None).await?;
        self.show(&name).await
    }

    /// What is to unlock the clone.
    fn secret_for_clone(&self, source: &Manifest, request: &CloneVolume) -> Result<Option<Secret>, VolumeError> {
        let name = &request.name;
        if source.encryption.is_none() {
            return match request.secret.is_some() || self.keys.expects(name) {
                true => Err(VolumeError::Conflict(format!(
                    "volume {:?} is not encrypted, and so its clone {name:?} cannot be: they share data",
                    source.name
                ))),
                false => Ok(None),
            };
        }
        let invalid = |error: &dyn std::fmt::Display| VolumeError::Invalid(error.to_string());
        match &request.secret {
            Some(text) => text.secret().map(Some).map_err(VolumeError::Invalid),
            None => [name, &source.name]
                .into_iter()
                .find_map(|name| self.keys.configured(name))
                .ok_or_else(|| {
                    VolumeError::Invalid(format!(
                        "volume {:?} is encrypted: say what is to unlock its clone {name:?}, a passphrase or a key file",
                        source.name
                    ))
                })?
                .map(Some)
                .map_err(|e| invalid(&e)),
        }
    }

    async fn make_clone(
        self: &Arc<Self>,
        source: &Manifest,
        request: &CloneVolume,
        keys: Option<&Keys>,
        secret: Option<Secret>,
    ) -> Result<Manifest, VolumeError> {
        let store = self.store.as_ref() as &dyn ObjectStore;
        let id = VolumeId::random();
        if request.snapshot.is_none() {
            let hold = Hold { volume: id, name: request.name.clone() };
            self.snapshot_for(&source.name, &request.name, Some(hold)).await?;
        }
        let order = CloneOrder {
            source: &source.name,
            snapshot: request.snapshot.as_deref(),
            name: &request.name,
            id,
            now_ms: unix_ms(),
            keys,
        };
        let made = async {
            let begun = match volume::begin_clone(store, &order).await {
                Ok(begun) => begun,
                Err(error) => {
                    // A snapshot made for it would stay for nobody.
                    self.release_for(&source.name, id, keys).await;
                    return Err(error);
                }
            };
            let encryption = match (secret, keys) {
                (Some(secret), Some(keys)) => match wrap(keys.clone(), secret, begun.id).await {
                    Ok(encryption) => Some(encryption),
                    Err(error) => {
                        volume::give_up_clone(store, &order, &begun).await;
                        let why = LockError::Derive { name: request.name.clone(), why: error.to_string() };
                        return Err(OpenError::Manifest { name: request.name.clone(), source: why.into() });
                    }
                },
                _ => None,
            };
            volume::finish_clone(store, &order, &begun, encryption).await
        };
        made.await.map_err(|error| {
            let why = |error: OpenError| format!("cannot clone volume {:?}: {}", source.name, explain(&error.into()));
            match error {
                OpenError::Manifest { source: ManifestError::Exists(_) | ManifestError::NoSnapshot { .. }, .. } => {
                    VolumeError::Conflict(why(error))
                }
                error if error.is_transient() => VolumeError::Away(why(error)),
                error => VolumeError::Failed(why(error)),
            }
        })
    }

    /// Lets go of what a volume holds for a clone that will not be.
    async fn release_for(&self, source: &str, clone: VolumeId, keys: Option<&Keys>) {
        let Ok((manifest, _)) = self.load(source).await else { return };
        let is_for = |snapshot: &&manifest::Snapshot| snapshot.holds.iter().any(|hold| hold.volume == clone);
        if let Some(snapshot) = manifest.snapshots.iter().find(is_for)
            && let Err(error) = volume::release_stale(self.store.as_ref(), &manifest, snapshot, keys).await
        {
            tracing::warn!(volume = source, "a snapshot for a clone that was not made stays for now: {error}");
        }
        self.tell_snapshots(source).await;
    }

    /// Has a volume that is open here look which snapshots it has by now, and remembers that for lists.
    pub(super) async fn tell_snapshots(&self, name: &str) {
        if let Ok(Phase::Open(place)) = self.entry(name).map(|entry| entry.phase) {
            with_volume(&place, |volume| volume.look_at_snapshots()).await;
        }
        if let Ok((manifest, _)) = self.load(name).await {
            self.note_snapshots(&manifest);
        }
    }
}
