//! The manifest: a volume's small root object, the only one ever replaced, always by compare-and-swap.
//!
//! [`format`] knows the bytes (pure, total on foreign input), `stored` the conditional requests; what only some volumes
//! have stands in sections with a file each: `encryption`, `checkpoint`, `snapshot`, `origin`.
//!
//! What must hold: a manifest is never written but on the version it was read as; what a manifest says of epochs only
//! grows; the manifest of an encrypted volume is only believed, and only changed, by who has its key (`seal`, `lock`).
//! Byte table: `docs/format.md`.

mod checkpoint;
mod encryption;
pub mod format;
#[cfg(feature = "engine")]
mod lock;
mod name;
mod origin;
mod seal;
mod snapshot;
#[cfg(feature = "engine")]
mod stored;

pub use checkpoint::{CheckpointName, CheckpointPointer};
pub use encryption::{Encryption, Kdf};
pub use format::{Durability, EpochStart, Manifest, ManifestFormatError, UnknownDurability, VolumeState};
#[cfg(feature = "engine")]
pub use lock::LockError;
pub use name::{InvalidName, check_name};
pub use origin::{Origin, Restored, Stretch};
pub use seal::Seal;
pub use snapshot::{Hold, MAX_SNAPSHOTS, Snapshot, SnapshotId};
#[cfg(feature = "engine")]
pub use stored::{
    HELD, ManifestError, change, create, create_held, held_key, key, list, load, load_held, open, remove, remove_held,
    replace, replace_held, try_update, update,
};

#[cfg(all(test, feature = "engine"))]
mod tests;
