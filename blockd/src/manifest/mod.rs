//! The manifest: a volume's small root object, the only one ever replaced, always by compare-and-swap.
//!
//! [`format`] knows the bytes (pure, total on foreign input), `stored` the conditional requests.
//!
//! What must hold: a manifest is never written but on the version it was read as; what a manifest says of epochs only
//! grows. Byte table: `docs/format.md`.

pub mod format;
mod name;
#[cfg(feature = "engine")]
mod stored;

pub use format::{Durability, EpochStart, Manifest, ManifestFormatError, UnknownDurability, VolumeState};
pub use name::{InvalidName, check_name};
#[cfg(feature = "engine")]
pub use stored::{ManifestError, create, key, list, load, remove, replace};

#[cfg(all(test, feature = "engine"))]
mod tests;
