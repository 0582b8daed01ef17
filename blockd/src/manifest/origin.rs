//! Section 4: what a clone was made of. Section 5: at which places a volume went back to a snapshot. Pure; total on
//! foreign bytes.

use zerocopy::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checkpoint::{self, CheckpointPointer};
use super::format::ManifestFormatError;
use super::snapshot::SnapshotId;
use crate::types::{Lsn, VolumeId};

/// The kind of the section about the origin.
pub(super) const KIND: u16 = 4;
/// The kind of the section about restores.
pub(super) const RESTORES_KIND: u16 = 5;

/// The volume and snapshot that a clone was made of. Up to `seq` and `lsn` its history is that of the origin.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The volume.
    pub volume: VolumeId,
    /// What it was called then: its manifest is found by that, or by its identity once that name is free.
    pub name: String,
    /// The snapshot.
    pub snapshot: SnapshotId,
    /// The epoch in which the snapshot was made.
    pub epoch: u64,
    /// The last fresh chunk of the origin that belongs to it.
    pub seq: u64,
    /// The last LSN.
    pub lsn: Lsn,
    /// The snapshot's translation table; none only at 0.
    pub checkpoint: Option<CheckpointPointer>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Body {
    volume: [u8; 16],
    snapshot: SnapshotId,
    epoch: U64,
    seq: U64,
    lsn: U64,
    checkpoint: [u8; checkpoint::LEN],
    name_len: u8,
    reserved: [u8; 7],
}

const _: () = assert!(size_of::<Body>() == 136);

impl Origin {
    pub(super) fn encode(&self) -> Vec<u8> {
        let body = Body {
            volume: self.volume.0,
            snapshot: self.snapshot,
            epoch: self.epoch.into(),
            seq: self.seq.into(),
            lsn: self.lsn.into(),
            checkpoint: CheckpointPointer::encode_optional(self.checkpoint.as_ref()),
            name_len: self.name.len() as u8,
            reserved: [0; 7],
        };
        [body.as_bytes(), self.name.as_bytes()].concat()
    }

    pub(super) fn decode(body: &[u8]) -> Result<Self, ManifestFormatError> {
        let wrong = || ManifestFormatError::Invalid("its section about its origin has a wrong length");
        let (body, rest) = Body::ref_from_prefix(body).map_err(|_| wrong())?;
        let (name, rest) = super::name::take(rest, body.name_len).ok_or_else(wrong)?;
        if !rest.is_empty() || body.reserved != [0; 7] {
            return Err(wrong());
        }
        Ok(Self {
            volume: VolumeId(body.volume),
            name,
            snapshot: body.snapshot,
            epoch: body.epoch.get(),
            seq: body.seq.get(),
            lsn: body.lsn.get(),
            checkpoint: CheckpointPointer::decode_optional(&body.checkpoint)?,
        })
    }

    pub(super) fn problem(&self) -> Option<&'static str> {
        if super::check_name(&self.name).is_err() {
            return Some("the name of its origin is not allowed");
        }
        if self.checkpoint.map_or(0, |pointer| pointer.seq) != self.seq {
            return Some("its origin has no checkpoint of its position");
        }
        self.checkpoint.and_then(|pointer| pointer.problem())
    }
}

/// A restore: after `from_seq` the state was that of an earlier position again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Restored {
    /// The position gone back to: its last fresh chunk.
    pub to_seq: u64,
    /// The epoch in which that state was made.
    pub to_epoch: u64,
    /// The last fresh chunk before the restore.
    pub from_seq: u64,
    /// The epoch that did it.
    pub epoch: u64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RestoredRow {
    to_seq: U64,
    to_epoch: U64,
    from_seq: U64,
    epoch: U64,
}

const _: () = assert!(size_of::<RestoredRow>() == 32);

/// The section of these restores.
pub(super) fn encode_restores(restores: &[Restored]) -> Vec<u8> {
    let row = |restored: &Restored| RestoredRow {
        to_seq: restored.to_seq.into(),
        to_epoch: restored.to_epoch.into(),
        from_seq: restored.from_seq.into(),
        epoch: restored.epoch.into(),
    };
    restores.iter().flat_map(|restored| row(restored).as_bytes().to_vec()).collect()
}

/// The reverse of [`encode_restores`].
pub(super) fn decode_restores(body: &[u8]) -> Result<Vec<Restored>, ManifestFormatError> {
    let rows = <[RestoredRow]>::ref_from_bytes(body)
        .map_err(|_| ManifestFormatError::Invalid("its section about restores has half a row"))?;
    let restored = |row: &RestoredRow| Restored {
        to_seq: row.to_seq.get(),
        to_epoch: row.to_epoch.get(),
        from_seq: row.from_seq.get(),
        epoch: row.epoch.get(),
    };
    Ok(rows.iter().map(restored).collect())
}

/// Why these must not be stored, if so.
pub(super) fn restores_problem(restores: &[Restored]) -> Option<&'static str> {
    let mut last = (0, 0);
    for restored in restores {
        let here = (restored.epoch, restored.from_seq);
        if restored.epoch <= last.0 || restored.from_seq < last.1 || restored.to_seq > restored.from_seq {
            return Some("its restores are out of order");
        }
        last = here;
    }
    None
}

/// A stretch of the history that the present state consists of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stretch {
    /// Its first fresh chunk.
    pub first: u64,
    /// Its last fresh chunk; less than the first if it has none.
    pub last: u64,
    /// The epochs in which it was the present state, from the first to the last.
    pub epochs: (u64, u64),
}

impl Stretch {
    /// Whether a relocated chunk of this basis and epoch tells of it.
    pub fn has_relocated(&self, basis: u64, epoch: u64) -> bool {
        (self.first - 1..=self.last).contains(&basis) && (self.epochs.0..=self.epochs.1).contains(&epoch)
    }
}

/// What of the history up to the chunk `end` counts, in order: all but what restores went back behind.
pub(super) fn lineage(restores: &[Restored], end: u64) -> Vec<Stretch> {
    let mut stretches = Vec::new();
    let (mut last, mut until) = (end, u64::MAX);
    loop {
        let back = restores.iter().rev().find(|r| r.epoch <= until && r.from_seq <= last);
        match back {
            None => {
                stretches.push(Stretch { first: 1, last, epochs: (0, until) });
                stretches.reverse();
                return stretches;
            }
            Some(r) => {
                stretches.push(Stretch { first: r.from_seq + 1, last, epochs: (r.epoch, until) });
                // A snapshot is older than the restore to it, so this comes to an end.
                (last, until) = (r.to_seq, r.to_epoch.min(r.epoch - 1));
            }
        }
    }
}
