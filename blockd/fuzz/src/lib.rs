//! What the fuzz targets share.
//!
//! Every structure on disk is checksummed, so bytes changed at random say nothing but "the checksum does not match".
//! The targets therefore write a correct checksum into what they are given, by the words of `docs/format.md` rather
//! than by the code under test, and look for what lies behind it.

use xxhash_rust::xxh3::xxh3_64_with_seed;

/// Puts the XXH3-64 of `bytes` with `seed` at `at`, computed with zeroes there. Does nothing where it does not fit.
pub fn put_checksum(bytes: &mut [u8], at: usize, seed: u64) {
    if bytes.len() < at + 8 {
        return;
    }
    bytes[at..at + 8].fill(0);
    let sum = xxh3_64_with_seed(bytes, seed);
    bytes[at..at + 8].copy_from_slice(&sum.to_le_bytes());
}

/// The little-endian number at `at`, if it is there.
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}
