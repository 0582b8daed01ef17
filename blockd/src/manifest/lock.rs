//! Wrapping a volume's data key, unwrapping it, and telling whether a manifest is what the key's owner wrote.

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey};
use aws_lc_rs::{hkdf, hmac};
use zeroize::Zeroizing;

use super::encryption::{Encryption, Kdf};
use super::format::{Manifest, VolumeState};
use super::seal::Seal;
use crate::crypt::{Keys, NoRandomness, Secret};
use crate::types::VolumeId;

/// What a wrapped key is said to be, so that it cannot be taken for anything else.
const LABEL: &[u8] = b"blockd data key v1";

/// Why a volume stays locked.
#[derive(Debug, thiserror::Error)]
pub enum LockError {
    /// It wants a passphrase and got a key file, or the other way round.
    #[error("volume {name:?} is locked by a {wanted}, not by a {given}")]
    Kind {
        /// The volume.
        name: String,
        /// What opens it.
        wanted: Kdf,
        /// What was tried.
        given: &'static str,
    },
    /// Not the right one.
    #[error("wrong {what} for volume {name:?} (or somebody tampered with its manifest)")]
    Wrong {
        /// The volume.
        name: String,
        /// What was tried.
        what: &'static str,
    },
    /// There is nothing to open.
    #[error(
        "volume {0:?} is not encrypted, although a key is given for it; if it never was, do not give one, otherwise \
         somebody replaced its manifest"
    )]
    NotEncrypted(String),
    /// No key for it.
    #[error("volume {0:?} is encrypted and locked; unlock it with `blockd volume unlock {0}`")]
    Locked(String),
    /// The right key, the wrong manifest.
    #[error("the manifest of volume {0:?} is damaged: it was changed without the volume's key")]
    Forged(String),
    /// No memory for Argon2id, mostly.
    #[error("cannot derive the key of volume {name:?}: {why}")]
    Derive {
        /// The volume.
        name: String,
        /// The cause.
        why: String,
    },
}

impl Encryption {
    /// Wraps the data key of `volume` anew. Takes about a tenth of a second for a passphrase.
    pub fn wrap(keys: &Keys, secret: &Secret, volume: VolumeId) -> Result<Self, NoRandomness> {
        let kdf = match secret {
            Secret::Passphrase(_) => Kdf::PASSPHRASE,
            Secret::KeyFile(_) => Kdf::KeyFile,
        };
        Ok(Self::wrap_with(keys, secret, volume, kdf, crate::crypt::random()?))
    }

    /// As [`Encryption::wrap`], with everything given. `salt` must never have been used.
    ///
    /// # Panics
    /// `kdf` is not for such a secret or cannot be had.
    pub fn wrap_with(keys: &Keys, secret: &Secret, volume: VolumeId, kdf: Kdf, salt: [u8; 32]) -> Self {
        let mut wrapping = Self { kdf, salt, wrapped: [0; 48] };
        let key = wrapping.key(secret).expect("memory for Argon2id");
        let aad = Aad::from(wrapping.aad(volume));
        let (text, tag) = wrapping.wrapped.split_at_mut(32);
        key.seal_out_of_place_scatter(nonce(), aad, keys.data(), text, &[], tag)
            .expect("32 bytes are below the cipher's limit");
        wrapping
    }

    /// The data key of `volume`, called `name` in messages. Takes about a tenth of a second for a passphrase.
    pub fn unwrap(&self, secret: &Secret, volume: VolumeId, name: &str) -> Result<Keys, LockError> {
        let name = || name.to_owned();
        match (self.kdf, secret) {
            (Kdf::Argon2id { .. }, Secret::Passphrase(_)) | (Kdf::KeyFile, Secret::KeyFile(_)) => {}
            _ => return Err(LockError::Kind { name: name(), wanted: self.kdf, given: secret.what() }),
        }
        let key = self.key(secret).map_err(|why| LockError::Derive { name: name(), why })?;
        let (text, tag) = self.wrapped.split_at(32);
        let mut data = Zeroizing::new([0; 32]);
        key.open_separate_gather(nonce(), Aad::from(self.aad(volume)), text, tag, &mut data[..])
            .map_err(|_| LockError::Wrong { name: name(), what: secret.what() })?;
        Ok(Keys::new(&data))
    }

    fn aad(&self, volume: VolumeId) -> Vec<u8> {
        [LABEL, &volume.0, &self.bound()].concat()
    }

    /// The key that wraps.
    fn key(&self, secret: &Secret) -> Result<LessSafeKey, String> {
        let mut key = Zeroizing::new([0; 32]);
        match (self.kdf, secret) {
            (Kdf::Argon2id { memory_kib, passes, lanes }, Secret::Passphrase(text)) => {
                let params =
                    argon2::Params::new(memory_kib, passes, lanes, Some(key.len())).map_err(|e| e.to_string())?;
                argon2::Argon2::new(argon2::Algorithm::Argon2id, argon2::Version::V0x13, params)
                    .hash_password_into(text.as_bytes(), &self.salt, &mut key[..])
                    .map_err(|e| e.to_string())?;
            }
            (Kdf::KeyFile, Secret::KeyFile(material)) => {
                let prk = hkdf::Salt::new(hkdf::HKDF_SHA256, &self.salt).extract(&material[..]);
                prk.expand(&[LABEL], hkdf::HKDF_SHA256)
                    .and_then(|okm| okm.fill(&mut key[..]))
                    .expect("32 bytes are no more than HKDF gives");
            }
            _ => panic!("a key is derived from the secret it is made for"),
        }
        Ok(LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &key[..]).expect("the key has 32 bytes")))
    }
}

/// A wrapping key comes from a fresh salt and encrypts once.
fn nonce() -> Nonce {
    Nonce::assume_unique_for_key([0; 12])
}

impl Manifest {
    /// Checks the manifest, just read, against the keys one has: that it wants them, and that their owner wrote it. From
    /// then on it is signed with them whenever it is written.
    pub fn verify(&mut self, keys: Option<&Keys>) -> Result<(), LockError> {
        let (Some(keys), Some(_)) = (keys, &self.encryption) else {
            return match (keys, &self.encryption) {
                (None, Some(_)) => Err(LockError::Locked(self.name.clone())),
                (Some(_), _) => Err(LockError::NotEncrypted(self.name.clone())),
                (None, None) => Ok(()),
            };
        };
        let genuine = match &self.seal {
            Seal::Read { tag, .. } => hmac::verify(&keys.signer("manifest v1", &[]), &self.covered(), tag).is_ok(),
            Seal::Keyed(own) => own == keys,
            // Nothing is left to protect.
            Seal::None => self.state == VolumeState::Deleting,
        };
        if !genuine {
            return Err(LockError::Forged(self.name.clone()));
        }
        self.seal = Seal::Keyed(keys.clone());
        Ok(())
    }

    /// Encrypts a volume that is being made.
    pub fn encrypt(&mut self, keys: &Keys, encryption: Encryption) {
        self.encryption = Some(encryption);
        self.seal = Seal::Keyed(keys.clone());
    }
}
