//! The read cache: stored frames of chunks, in memory and on local NVMe, shared by all volumes.
//!
//! What must hold: the cache is a convenience, never a witness. It holds frames as the bucket does, and whoever takes
//! one out checks it like one from the bucket; a rotten cache costs a request, not data.

mod frame;
mod frame_cache;

pub use frame::FrameKey;
pub use frame_cache::{CacheStats, FrameCache};
