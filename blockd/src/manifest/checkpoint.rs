//! Section 2: where the newest durable copy of the translation table is.

use std::fmt;

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::format::ManifestFormatError;
use crate::types::{Lsn, VolumeId};

/// The section's kind.
pub(super) const KIND: u16 = 2;
/// Its length in bytes.
pub(super) const LEN: usize = 72;

/// Names an object of a volume's checkpoints. An epoch belongs to one process, which counts them, so that no name is
/// used twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CheckpointName {
    /// The volume whose owner wrote it.
    pub volume: VolumeId,
    /// The epoch in which that was.
    pub epoch: u64,
    /// Counted by the owner, from 1.
    pub number: u64,
}

impl CheckpointName {
    /// Where all objects of a volume's checkpoints are.
    pub fn prefix(volume: VolumeId) -> String {
        format!("checkpoints/{volume}/")
    }

    /// The key of a checkpoint object of this name.
    pub fn key(&self) -> String {
        format!("{self}.ckpt")
    }

    /// The key of a table file of this name.
    pub fn file_key(&self) -> String {
        format!("{self}.sst")
    }

    /// The name behind a key that [`Self::key`] or [`Self::file_key`] makes.
    pub fn parse(key: &str) -> Option<Self> {
        let (volume, rest) = key.strip_prefix("checkpoints/")?.split_once('/')?;
        let (epoch, number) = rest.strip_suffix(".ckpt").or_else(|| rest.strip_suffix(".sst"))?.split_once('-')?;
        let name = Self {
            volume: VolumeId(*uuid::Uuid::try_parse(volume).ok()?.as_bytes()),
            epoch: u64::from_str_radix(epoch, 16).ok()?,
            number: u64::from_str_radix(number, 16).ok()?,
        };
        // Only the canonical form is one of ours.
        (name.key() == key || name.file_key() == key).then_some(name)
    }
}

impl fmt::Display for CheckpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "checkpoints/{}/{:016x}-{:016x}", self.volume, self.epoch, self.number)
    }
}

/// What a manifest says of the volume's newest checkpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CheckpointPointer {
    /// The checkpoint object.
    pub object: CheckpointName,
    /// The newest fresh chunk in it.
    pub seq: u64,
    /// The newest LSN in it.
    pub lsn: Lsn,
    /// The newest number of a relocated chunk in it; 0 if there was none.
    pub relocated: u64,
    /// Bytes of its objects, those shared with earlier checkpoints included.
    pub bytes: u64,
    /// When it was made, Unix time in milliseconds.
    pub made_ms: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Body {
    volume: [u8; 16],
    epoch: U64,
    number: U64,
    seq: U64,
    lsn: U64,
    relocated: U64,
    bytes: U64,
    made_ms: U64,
}

const _: () = assert!(size_of::<Body>() == LEN);

impl CheckpointPointer {
    pub(super) fn encode(&self) -> Vec<u8> {
        let body = Body {
            volume: self.object.volume.0,
            epoch: self.object.epoch.into(),
            number: self.object.number.into(),
            seq: self.seq.into(),
            lsn: self.lsn.into(),
            relocated: self.relocated.into(),
            bytes: self.bytes.into(),
            made_ms: self.made_ms.into(),
        };
        body.as_bytes().to_vec()
    }

    pub(super) fn decode(body: &[u8]) -> Result<Self, ManifestFormatError> {
        let body = Body::ref_from_bytes(body)
            .map_err(|_| ManifestFormatError::Invalid("its checkpoint section has the wrong length"))?;
        let pointer = Self {
            object: CheckpointName {
                volume: VolumeId(body.volume),
                epoch: body.epoch.get(),
                number: body.number.get(),
            },
            seq: body.seq.get(),
            lsn: body.lsn.get(),
            relocated: body.relocated.get(),
            bytes: body.bytes.get(),
            made_ms: body.made_ms.get(),
        };
        Ok(pointer)
    }

    /// Its bytes, or zeroes for none.
    pub(super) fn encode_optional(pointer: Option<&Self>) -> [u8; LEN] {
        let mut bytes = [0; LEN];
        if let Some(pointer) = pointer {
            bytes.copy_from_slice(&pointer.encode());
        }
        bytes
    }

    /// The reverse of [`Self::encode_optional`].
    pub(super) fn decode_optional(bytes: &[u8; LEN]) -> Result<Option<Self>, ManifestFormatError> {
        if *bytes == [0; LEN] { Ok(None) } else { Self::decode(bytes).map(Some) }
    }

    /// Why it must not be stored, if so.
    pub(super) fn problem(&self) -> Option<&'static str> {
        let none = self.object.epoch == 0 || self.object.number == 0 || self.seq == 0;
        none.then_some("its checkpoint is none")
    }
}
