//! The one place where bytes of checkpoints pass on their way to the bucket and back.

use bytes::Bytes;

use crate::crypt::Keys;

/// What is stored under `key` for `plain`.
pub(super) fn seal_object(keys: Option<&Keys>, key: &str, plain: Vec<u8>) -> Bytes {
    match keys {
        Some(keys) => keys.seal_object(key, &plain).into(),
        None => plain.into(),
    }
}

/// The reverse of [`seal_object`]; nothing when the bytes were changed or belong under another key.
pub(super) fn open_object(keys: Option<&Keys>, key: &str, stored: Bytes) -> Option<Bytes> {
    match keys {
        Some(keys) => keys.open_object(key, &stored).ok().map(Bytes::from),
        None => Some(stored),
    }
}
