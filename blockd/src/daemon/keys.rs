//! The keys of encrypted volumes: where they come from, and what is done with them while the daemon runs.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::volumes::{Daemon, Phase, VolumeError, with_volume};
use crate::admin::api::{ChangeKey, SecretText, SetVolume, VolumeStatus};
use crate::config::Config;
use crate::crypt::{Keys, NoRandomness, Secret, SecretError};
use crate::manifest::{self, Encryption, LockError, Manifest, ManifestError};
use crate::types::VolumeId;

/// Why there are no keys for a volume. It is then locked.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file that the configuration names.
    #[error("volume {name:?} is locked: {source}")]
    Secret {
        /// The volume.
        name: String,
        /// What is wrong with it.
        source: SecretError,
    },
    /// It does not open the volume.
    #[error(transparent)]
    Lock(#[from] LockError),
    /// No key can be made.
    #[error(transparent)]
    Random(#[from] NoRandomness),
}

/// Keys that were unlocked, in memory only, and the files that can unlock more.
pub struct KeyRing {
    sources: BTreeMap<String, Source>,
    held: Mutex<BTreeMap<VolumeId, Keys>>,
}

#[derive(Clone)]
enum Source {
    KeyFile(PathBuf),
    PassphraseFile(PathBuf),
}

impl Source {
    fn read(&self) -> Result<Secret, SecretError> {
        match self {
            Self::KeyFile(path) => Secret::key_file(path),
            Self::PassphraseFile(path) => Secret::passphrase_file(path),
        }
    }
}

impl KeyRing {
    /// With the files that `config` names.
    pub fn new(config: &Config) -> Self {
        let keys = config.key_file.iter().map(|f| (f.volume.clone(), Source::KeyFile(f.path.clone())));
        let texts = config.passphrase_file.iter().map(|f| (f.volume.clone(), Source::PassphraseFile(f.path.clone())));
        Self { sources: keys.chain(texts).collect(), held: Mutex::default() }
    }

    /// Whether the configuration has a key for a volume of this name.
    pub fn expects(&self, name: &str) -> bool {
        self.sources.contains_key(name)
    }

    /// What the configuration has to unlock a volume of this name.
    pub fn configured(&self, name: &str) -> Option<Result<Secret, SecretError>> {
        self.sources.get(name).map(Source::read)
    }

    /// The keys of a volume that were unlocked before.
    pub fn held(&self, id: VolumeId) -> Option<Keys> {
        self.held.lock().expect("no code panics while it holds this lock").get(&id).cloned()
    }

    /// Keeps keys that were unlocked.
    pub fn hold(&self, id: VolumeId, keys: Keys) {
        self.held.lock().expect("no code panics while it holds this lock").insert(id, keys);
    }

    /// Forgets the keys of a volume that is gone.
    pub fn forget(&self, id: VolumeId) {
        self.held.lock().expect("no code panics while it holds this lock").remove(&id);
    }

    /// What a volume is to be opened with: keys from memory or from the configured file, or none if it needs none.
    pub async fn keys_of(&self, manifest: &Manifest) -> Result<Option<Keys>, KeyError> {
        if let Some(keys) = self.held(manifest.id) {
            return Ok(Some(keys));
        }
        let name = || manifest.name.clone();
        let source = match (self.sources.get(&manifest.name).cloned(), &manifest.encryption) {
            (None, None) => return Ok(None),
            (None, Some(_)) => return Err(LockError::Locked(name()).into()),
            // Somebody may have replaced the manifest by one that makes us store in the clear.
            (Some(_), None) => return Err(LockError::NotEncrypted(name()).into()),
            (Some(source), Some(_)) => source,
        };
        let secret = source.read().map_err(|source| KeyError::Secret { name: name(), source })?;
        let keys = unwrap(manifest, secret).await?;
        self.hold(manifest.id, keys.clone());
        Ok(Some(keys))
    }
}

/// Unwraps the data key where that may take its time, and checks that the manifest is genuine.
async fn unwrap(manifest: &Manifest, secret: Secret) -> Result<Keys, LockError> {
    let mut manifest = manifest.clone();
    let work = move || {
        let encryption = manifest.encryption.clone().ok_or_else(|| LockError::NotEncrypted(manifest.name.clone()))?;
        let keys = encryption.unwrap(&secret, manifest.id, &manifest.name)?;
        manifest.verify(Some(&keys))?;
        Ok(keys)
    };
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

/// Wraps a data key where that may take its time.
pub(super) async fn wrap(keys: Keys, secret: Secret, volume: VolumeId) -> Result<Encryption, NoRandomness> {
    match tokio::task::spawn_blocking(move || Encryption::wrap(&keys, &secret, volume)).await {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}

fn secret(text: &SecretText) -> Result<Secret, VolumeError> {
    text.secret().map_err(VolumeError::Invalid)
}

fn refused(error: LockError) -> VolumeError {
    match error {
        LockError::Locked(_) | LockError::NotEncrypted(_) => VolumeError::Conflict(error.to_string()),
        error => VolumeError::Invalid(error.to_string()),
    }
}

impl Daemon {
    /// Encrypts a volume that is about to be made, if that is asked for.
    pub(super) async fn encrypt_new(
        &self,
        manifest: &mut Manifest,
        text: Option<&SecretText>,
    ) -> Result<(), VolumeError> {
        let name = &manifest.name;
        let Some(text) = text else {
            return match self.keys.expects(name) {
                true => Err(VolumeError::Conflict(format!(
                    "the daemon's configuration has a key for volume {name:?}, but it is to be made without encryption; \
                     say --encrypt, or choose another name"
                ))),
                false => Ok(()),
            };
        };
        let failed = |error: NoRandomness| VolumeError::Failed(format!("cannot encrypt volume {name:?}: {error}"));
        let keys = Keys::random().map_err(failed)?;
        let encryption = wrap(keys.clone(), secret(text)?, manifest.id).await.map_err(failed)?;
        manifest.encrypt(&keys, encryption);
        self.keys.hold(manifest.id, keys);
        Ok(())
    }

    /// Unlocks an encrypted volume and serves it.
    pub async fn unlock(self: &Arc<Self>, name: &str, text: &SecretText) -> Result<VolumeStatus, VolumeError> {
        self.refuse_while_closing()?;
        let (manifest, _) = self.load(name).await?;
        let keys = unwrap(&manifest, secret(text)?).await.map_err(refused)?;
        self.keys.hold(manifest.id, keys);
        self.open(name, false).await
    }

    /// Changes what unlocks a volume, served or not. Only its manifest changes: the data key stays the same.
    pub async fn change_key(&self, name: &str, request: &ChangeKey) -> Result<VolumeStatus, VolumeError> {
        self.refuse_while_closing()?;
        let (manifest, _) = self.load(name).await?;
        let keys = match &request.old {
            Some(old) => unwrap(&manifest, secret(old)?).await.map_err(refused)?,
            None => match self.keys.keys_of(&manifest).await {
                Ok(Some(keys)) => keys,
                Ok(None) => return Err(refused(LockError::NotEncrypted(name.to_owned()))),
                Err(error) => return Err(VolumeError::Conflict(error.to_string())),
            },
        };
        let encryption = wrap(keys.clone(), secret(&request.new)?, manifest.id)
            .await
            .map_err(|error| VolumeError::Failed(format!("cannot change the key of volume {name:?}: {error}")))?;
        self.change_manifest(name, Some(keys), "change the key of", |manifest| {
            manifest.encryption = Some(encryption.clone());
        })
        .await?;
        tracing::info!(volume = %name, "the key of the volume was changed");
        self.show(name).await
    }

    /// Changes settings of a volume; an open one obeys them at once.
    pub async fn set(&self, name: &str, request: &SetVolume) -> Result<VolumeStatus, VolumeError> {
        self.refuse_while_closing()?;
        let invalid = |error: &dyn std::fmt::Display| VolumeError::Invalid(error.to_string());
        let codec = request.codec.as_deref().map(str::parse).transpose();
        let codec: Option<crate::chunk::Codec> = codec.map_err(|e| invalid(&e))?;
        let durability = request.durability.as_deref().map(str::parse).transpose();
        let durability: Option<manifest::Durability> = durability.map_err(|e| invalid(&e))?;
        if let Phase::Elsewhere(_) = self.entry(name)?.phase {
            return Err(VolumeError::Conflict(format!(
                "volume {name:?} is another host's, which would not notice; change its settings there"
            )));
        }
        // Manifest and volume change one after the other; two changes must not cross between them.
        let _one_at_a_time = self.resizing.lock().await;
        let (manifest, _) = self.load(name).await?;
        let keys = self.keys.keys_of(&manifest).await.map_err(|e| VolumeError::Conflict(e.to_string()))?;
        self.change_manifest(name, keys, "change the settings of", |manifest| {
            manifest.codec = codec.unwrap_or(manifest.codec);
            manifest.durability = durability.unwrap_or(manifest.durability);
        })
        .await?;
        if let Ok(Phase::Open(place)) = self.entry(name).map(|entry| entry.phase) {
            // One that is closed meanwhile finds the settings in its manifest.
            with_volume(&place, move |volume| {
                codec.into_iter().for_each(|codec| volume.set_codec(codec));
                durability.into_iter().for_each(|durability| volume.set_durability(durability));
            })
            .await;
        }
        tracing::info!(volume = %name, ?codec, ?durability, "settings changed");
        self.show(name).await
    }

    /// Changes a manifest in the store, and what is remembered of it here.
    async fn change_manifest(
        &self,
        name: &str,
        keys: Option<Keys>,
        doing: &str,
        change: impl Fn(&mut Manifest),
    ) -> Result<(), VolumeError> {
        let changed = manifest::change(self.store.as_ref(), name, keys.as_ref(), |manifest| {
            change(manifest);
            Ok(())
        })
        .await;
        changed.map_err(|error| {
            let why = format!("cannot {doing} volume {name:?}: {error}");
            match error {
                ManifestError::NotFound(name) => VolumeError::Unknown(name),
                error if error.is_transient() => VolumeError::Away(why),
                _ => VolumeError::Failed(why),
            }
        })?;
        if let Some(manifest) = self.entries_mut().get_mut(name).and_then(|entry| entry.manifest.as_mut()) {
            change(manifest);
        }
        Ok(())
    }

    /// Why a volume that is there is not exported.
    pub(super) fn locked(&self, name: &str) -> Option<String> {
        match &self.entries().get(name)?.phase {
            Phase::Locked(why) => Some(why.clone()),
            _ => None,
        }
    }
}
