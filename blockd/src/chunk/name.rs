//! How a chunk is called.

use std::fmt;

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use crate::types::VolumeId;

/// Set in the `seq` of chunks that compaction wrote: they are no part of the volume's history, and count by themselves.
pub const RELOCATED: u64 = 1 << 63;

/// Numbers of relocated chunks begin anew with each epoch, so that those of different owners never meet: this many bits
/// are for the number within an epoch.
const NUMBER_BITS: u32 = 32;

/// The number before the first relocated chunk of `epoch`.
pub fn relocated_base(epoch: u64) -> u64 {
    RELOCATED | (epoch & 0x7fff_ffff) << NUMBER_BITS
}

/// The identity of a chunk: whose it is, who wrote it, and its place in the volume's history.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ChunkName {
    /// The volume whose blocks it holds.
    pub volume: VolumeId,
    /// The ownership epoch in which it was written.
    pub epoch: u64,
    /// Its place in the volume's contiguous sequence; the first chunk is 1. With [`RELOCATED`] the number of a chunk
    /// that compaction wrote.
    pub seq: u64,
}

impl ChunkName {
    /// Whether compaction wrote it.
    pub fn is_relocated(&self) -> bool {
        self.seq & RELOCATED != 0
    }

    /// The object key: `chunks/<spread>/<volume>/<epoch>-<seq>`, the two hex digits of `spread` distributing one
    /// volume over 256 prefixes.
    pub fn key(&self) -> String {
        format!("chunks/{:02x}/{}/{:016x}-{:016x}", self.digest() as u8, self.volume, self.epoch, self.seq)
    }

    /// What the keys of those of a volume's chunks begin with that stand under the prefix number `spread`.
    pub fn prefix(volume: VolumeId, spread: u8) -> String {
        format!("chunks/{spread:02x}/{volume}/")
    }

    /// The name behind `key`, or nothing when it is not one that [`Self::key`] makes.
    pub fn parse(key: &str) -> Option<Self> {
        let mut parts = key.strip_prefix("chunks/")?.splitn(3, '/');
        let (_spread, volume, rest) = (parts.next()?, parts.next()?, parts.next()?);
        let (epoch, seq) = rest.split_once('-')?;
        let name = Self {
            volume: VolumeId(*uuid::Uuid::try_parse(volume).ok()?.as_bytes()),
            epoch: u64::from_str_radix(epoch, 16).ok()?,
            seq: u64::from_str_radix(seq, 16).ok()?,
        };
        // Comparing with the canonical form also refuses upper case, missing digits and a wrong spread.
        (name.key() == key).then_some(name)
    }

    /// A hash of the identity; spreads keys and seeds checksums.
    pub(super) fn digest(&self) -> u64 {
        xxh3_64(&self.id())
    }

    /// The identity in bytes.
    pub(super) fn id(&self) -> [u8; 32] {
        let mut id = [0; 32];
        id[..16].copy_from_slice(&self.volume.0);
        id[16..24].copy_from_slice(&self.epoch.to_le_bytes());
        id[24..].copy_from_slice(&self.seq.to_le_bytes());
        id
    }

    /// The checksum of a frame's stored bytes. It depends on the chunk and on the frame's number, so that an intact
    /// frame in a wrong place does not pass.
    pub fn frame_sum(&self, frame: u32, stored: &[u8]) -> u64 {
        xxh3_64_with_seed(stored, xxh3_64_with_seed(&frame.to_le_bytes(), self.digest()))
    }
}

impl fmt::Display for ChunkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.key())
    }
}

impl fmt::Debug for ChunkName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}-{}", self.volume, self.epoch, self.seq)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_parse_back_and_spread() {
        let mut spreads = std::collections::HashSet::new();
        for seq in 1..5000 {
            let name = ChunkName { volume: VolumeId([7; 16]), epoch: 3, seq };
            let key = name.key();
            assert_eq!(ChunkName::parse(&key), Some(name));
            spreads.insert(key[7..9].to_owned());
        }
        assert_eq!(spreads.len(), 256);
        let name = ChunkName { volume: VolumeId([0xab; 16]), epoch: 1, seq: 2 };
        // Part of the format: a change would lose every chunk written so far.
        assert_eq!(
            name.key(),
            format!(
                "chunks/{:02x}/abababababababababababababababab/0000000000000001-0000000000000002",
                name.digest() as u8
            )
        );
        for bad in ["", "chunks/", "chunks/00/xx/1-2", &name.key().to_uppercase(), &format!("{}0", name.key())] {
            assert_eq!(ChunkName::parse(bad), None, "{bad}");
        }
    }
}
