//! Checkpoints: durable copies of the translation table in the bucket, so that opening a volume on another host reads
//! the copy and the chunk headers after it instead of every header there is.
//!
//! [`format`] knows the bytes of a checkpoint object (pure, total on foreign input), [`make`] sends a copy, [`restore`]
//! brings one back, [`collect`] says which objects nothing needs any more, [`rebuild`] does without any of it, and
//! through [`seal`] passes every byte that goes to the bucket or comes from it.
//!
//! What must hold: table files are durable before the checkpoint object that lists them, that before the manifest that
//! points to it; a file is sent once, under a name never used again; what is restored is byte for byte what was copied,
//! at exactly the position the manifest names; nothing is deleted that the durable manifest reaches. Byte table:
//! `docs/format.md`.

#[cfg(feature = "engine")]
pub mod collect;
#[cfg(feature = "engine")]
mod error;
pub mod format;
#[cfg(feature = "engine")]
pub mod make;
#[cfg(feature = "engine")]
pub mod rebuild;
#[cfg(feature = "engine")]
pub mod restore;
#[cfg(feature = "engine")]
mod seal;

pub use crate::manifest::{CheckpointName, CheckpointPointer};
#[cfg(feature = "engine")]
pub use error::{CheckpointError, Flaw};
pub use format::{Checkpoint, TableFile};
#[cfg(feature = "engine")]
pub use make::{Keeper, Made};

#[cfg(all(test, feature = "engine"))]
mod tests;
