//! The write-ahead log of one volume: fixed-size, pre-zeroed, recycled segments of checksummed frames.
//!
//! What must hold:
//! - A frame counts as written only when every earlier frame does; acknowledgements follow that order, so what a
//!   crash of the process leaves is a prefix.
//! - Recycled bytes never parse: header checksums are salted with the segment's generation.
//! - [`scan`] tells a torn tail (never durable; dropped) from rot (was durable; refused) by the durable horizon that
//!   every later frame repeats.
//!
//! [`format`] is pure encoding, [`device`] the files, [`writer`] the appending state machine, [`scan`] recovery.

pub mod device;
pub mod format;
pub mod scan;
pub mod writer;
