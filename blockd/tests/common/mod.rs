//! Helpers shared by the tests: a conformance suite for any store, a proxy that makes trouble, the real daemon, and several
//! of them on one bucket.

// Each test binary uses a part of this.
#![allow(dead_code)]

pub mod conformance;
pub mod daemon;
pub mod proxy;
pub mod shadow;
pub mod shared;

use bytes::Bytes;

/// `len` bytes that repeat nowhere within reach and differ by `seed`.
pub fn pattern(seed: u64, len: usize) -> Bytes {
    use rand::{RngCore, SeedableRng};
    let mut bytes = vec![0; len];
    rand::rngs::SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
    bytes.into()
}
