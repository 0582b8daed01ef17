//! Encryption at rest: the keys of a volume, and what is done with them.
//!
//! An encrypted volume has one random data key ([`Keys`]), kept in its manifest wrapped by what its owner knows or has
//! ([`Secret`]; `manifest/lock.rs`). Everything else is derived from the data key and a name that is used once, so that
//! whoever has the key can read any of the volume's objects knowing nothing but its name. Chunks are encrypted in
//! `chunk/sealed.rs`, other objects by [`Keys::seal_object`], and the manifest is signed (`manifest/seal.rs`).
//!
//! What must hold: keys are passed, never global; nothing is decrypted into a reader's hands before its tag was checked;
//! no key ever meets one nonce with two plaintexts. Byte tables and what leaks: `docs/format.md`.

mod keys;
mod object;
mod secret;

pub use keys::{Keys, NoRandomness};
pub(crate) use keys::{TAG, random};
pub use object::ObjectError;
pub use secret::{Secret, SecretError};
