//! The data key of a volume and the keys derived from it.

use std::fmt;
use std::sync::Arc;

use aws_lc_rs::aead::{AES_256_GCM, LessSafeKey, UnboundKey};
use aws_lc_rs::{constant_time, hkdf, hmac};
use zeroize::Zeroizing;

/// Bytes of a data key.
pub(crate) const KEY: usize = 32;
/// What encrypting adds to a text, in bytes: the tag of AES-256-GCM.
pub(crate) const TAG: usize = 16;

/// The system gives out no random bytes.
#[derive(Debug, thiserror::Error)]
#[error("the system gives out no random bytes, without which no key can be made")]
pub struct NoRandomness;

/// The keys of one encrypted volume. Clones share them; they are wiped with the last.
#[derive(Clone)]
pub struct Keys(Arc<Inner>);

struct Inner {
    data: Zeroizing<[u8; KEY]>,
    prk: hkdf::Prk,
}

impl Keys {
    /// A new data key.
    pub fn random() -> Result<Self, NoRandomness> {
        Ok(Self::new(&Zeroizing::new(random()?)))
    }

    /// The keys of this data key.
    pub fn new(data: &[u8; KEY]) -> Self {
        // The data key is uniformly random, so that HKDF's first step, which makes such a key, is not needed.
        let prk = hkdf::Prk::new_less_safe(hkdf::HKDF_SHA256, data);
        Self(Arc::new(Inner { data: Zeroizing::new(*data), prk }))
    }

    /// The data key itself, to be wrapped.
    pub(crate) fn data(&self) -> &[u8; KEY] {
        &self.0.data
    }

    /// The encryption key for `purpose` and `context`. No two purposes may give the same bytes: a purpose has no zero
    /// byte, and of a context only the last part may vary in length.
    pub(crate) fn cipher(&self, purpose: &str, context: &[u8]) -> LessSafeKey {
        let info = [b"blockd ", purpose.as_bytes(), &[0], context];
        let key = self.0.prk.expand(&info, &AES_256_GCM).expect("32 bytes are no more than HKDF gives");
        LessSafeKey::new(UnboundKey::from(key))
    }

    /// The signing key for `purpose` and `context`, see [`Keys::cipher`].
    pub(crate) fn signer(&self, purpose: &str, context: &[u8]) -> hmac::Key {
        let info = [b"blockd ", purpose.as_bytes(), &[0], context];
        hmac::Key::from(self.0.prk.expand(&info, hmac::HMAC_SHA256).expect("32 bytes are no more than HKDF gives"))
    }
}

impl PartialEq for Keys {
    fn eq(&self, other: &Self) -> bool {
        constant_time::verify_slices_are_equal(self.data(), other.data()).is_ok()
    }
}

impl Eq for Keys {}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Keys(..)")
    }
}

/// Fresh random bytes.
pub(crate) fn random<const N: usize>() -> Result<[u8; N], NoRandomness> {
    let mut bytes = [0; N];
    aws_lc_rs::rand::fill(&mut bytes).map_err(|_| NoRandomness)?;
    Ok(bytes)
}
