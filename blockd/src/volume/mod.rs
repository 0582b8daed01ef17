//! The volume engine: a single-threaded state machine that performs no I/O itself.
//!
//! A driver (the [`crate::reactor`], or a simulation) feeds it requests, finished I/O and the time, and carries
//! out the [`Effect`]s it emits. What must hold:
//! - a write is acknowledged after its log frame and all earlier ones are written; a flush after they are durable;
//! - a higher LSN wins, whatever completes first; reads see dirty data, then the translation table, then zeroes;
//! - the bucket only ever holds a prefix of the history; nothing leaves the log before the bucket has it;
//! - trouble with the bucket delays, and never fails, a write.

#[cfg(feature = "engine")]
mod admin;
mod api;
#[cfg(feature = "engine")]
mod beginning;
#[cfg(feature = "engine")]
mod block_cache;
#[cfg(feature = "engine")]
mod catch_up;
#[cfg(feature = "engine")]
mod checkpoint;
#[cfg(feature = "engine")]
mod clone;
#[cfg(feature = "engine")]
mod compact;
#[cfg(feature = "engine")]
mod copy;
#[cfg(feature = "engine")]
mod destage;
#[cfg(feature = "engine")]
mod device;
#[cfg(feature = "engine")]
mod dirty;
#[cfg(feature = "engine")]
mod engine;
#[cfg(feature = "engine")]
mod flush;
#[cfg(feature = "engine")]
mod gate;
#[cfg(feature = "engine")]
mod go_back;
#[cfg(feature = "engine")]
mod holds;
#[cfg(feature = "engine")]
mod job;
#[cfg(feature = "engine")]
mod open;
#[cfg(feature = "engine")]
mod own;
#[cfg(feature = "engine")]
mod pace;
#[cfg(feature = "engine")]
mod read;
#[cfg(feature = "engine")]
mod snapshot;
#[cfg(feature = "engine")]
mod stats;
#[cfg(feature = "engine")]
mod stranded;
#[cfg(feature = "engine")]
mod write;

#[cfg(feature = "engine")]
pub use admin::{Deleted, delete, resize};
pub use api::*;
#[cfg(feature = "engine")]
pub(crate) use beginning::Beginning;
#[cfg(feature = "engine")]
pub(crate) use catch_up::missed_restore;
#[cfg(feature = "engine")]
pub use catch_up::{Holes, Progress, TableFrom};
#[cfg(feature = "engine")]
pub use checkpoint::{CheckpointRule, DurableCheckpoint};
#[cfg(feature = "engine")]
pub use clone::{CloneBegun, CloneOrder, begin_clone, finish_clone, give_up_clone};
#[cfg(feature = "engine")]
pub use compact::CompactionTuning;
#[cfg(feature = "engine")]
pub use copy::CopyReply;
#[cfg(feature = "engine")]
pub(crate) use destage::OBJECT_PUTS_MAX;
#[cfg(feature = "engine")]
pub use engine::{Tuning, Volume, WallClock};
#[cfg(feature = "engine")]
pub(crate) use engine::{blocks_of, within_block};
#[cfg(feature = "engine")]
pub use go_back::{GoBack, go_back};
#[cfg(feature = "engine")]
pub use holds::{Released, release, release_stale, settle_held};
#[cfg(feature = "engine")]
pub(crate) use holds::{is_held, is_left_alone};
#[cfg(feature = "engine")]
pub use job::{Blocking, Jitter, JobDone};
#[cfg(feature = "engine")]
pub use open::{OpenError, OpenOptions, OpenReport, Parts};
#[cfg(feature = "engine")]
pub use own::Claimant;
#[cfg(feature = "engine")]
pub(crate) use own::claim;
#[cfg(feature = "engine")]
pub use own::{BucketState, wall_ms};
#[cfg(feature = "engine")]
pub use snapshot::{SnapshotError, SnapshotOrder, SnapshotReply};
#[cfg(feature = "engine")]
pub use stats::VolumeStats;
#[cfg(feature = "engine")]
pub use stranded::{Stranded, StrandedKind, StrandedWrite};

/// Without the engine nobody hands out jobs.
#[cfg(not(feature = "engine"))]
#[derive(Debug)]
pub enum JobDone {}
