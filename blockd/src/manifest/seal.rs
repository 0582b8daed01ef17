//! What keeps the manifest of an encrypted volume from being changed by who does not have its key.

#[cfg(feature = "engine")]
use crate::crypt::Keys;

/// The kind of the last section, which signs everything before it.
pub(super) const KIND: u16 = u16::MAX;
/// Its body: HMAC-SHA256.
pub(super) const TAG: usize = 32;

/// Whether and how a manifest is signed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Seal {
    /// It is not: the volume is not encrypted, or is being deleted.
    #[default]
    None,
    /// As it was read: not verified, and worth nothing once the manifest is changed.
    Read {
        /// The signature.
        tag: [u8; TAG],
        /// A hash of what it was read with.
        covered: u64,
    },
    /// Verified, or made here: signed with the volume's key whenever it is written.
    #[cfg(feature = "engine")]
    Keyed(Keys),
}

impl Seal {
    /// The signature of `covered`, unless there is none.
    pub(super) fn tag(&self, covered: &[u8]) -> Option<[u8; TAG]> {
        #[cfg(not(feature = "engine"))]
        let _ = covered;
        match self {
            Self::None => None,
            Self::Read { tag, .. } => Some(*tag),
            #[cfg(feature = "engine")]
            Self::Keyed(keys) => {
                let mut tag = [0; TAG];
                tag.copy_from_slice(aws_lc_rs::hmac::sign(&keys.signer("manifest v1", &[]), covered).as_ref());
                Some(tag)
            }
        }
    }
}
