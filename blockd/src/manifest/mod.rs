//! The manifest: a volume's small root object, the only one ever replaced, always by compare-and-swap.
//!
//! [`format`] knows the bytes (pure, total on foreign input), `stored` the conditional requests; what only some volumes
//! have stands in sections with a file each, as `checkpoint`.
//!
//! What must hold: a manifest is never written but on the version it was read as; what a manifest says of epochs only
//! grows. Byte table: `docs/format.md`.

mod checkpoint;
pub mod format;
mod name;
#[cfg(feature = "engine")]
mod stored;

pub use checkpoint::{CheckpointName, CheckpointPointer};
pub use format::{Durability, EpochStart, Manifest, ManifestFormatError, UnknownDurability, VolumeState};
pub use name::{InvalidName, check_name};
#[cfg(feature = "engine")]
pub use stored::{ManifestError, change, create, key, list, load, remove, replace, update};

#[cfg(all(test, feature = "engine"))]
mod tests;
