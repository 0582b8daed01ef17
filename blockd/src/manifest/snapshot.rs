//! Section 3: the volume's snapshots, and which clones hold them. Pure; total on foreign bytes.

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checkpoint::{self, CheckpointPointer};
use super::format::{MAX_NAME, ManifestFormatError};
use crate::types::{Lsn, VolumeId};

/// The section's kind.
pub(super) const KIND: u16 = 3;
/// The most snapshots a volume has, hidden ones included.
pub const MAX_SNAPSHOTS: usize = 4096;

const HIDDEN: u8 = 1;

/// A snapshot's permanent identity.
pub type SnapshotId = [u8; 16];

/// A clone that needs a snapshot of another volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hold {
    /// The clone.
    pub volume: VolumeId,
    /// The name it was made under, by which its manifest is found.
    pub name: String,
}

/// A position in a volume's history that is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    /// Its identity: a name may be given again.
    pub id: SnapshotId,
    /// Its name; of a hidden one what it was called, or the clone it was made for.
    pub name: String,
    /// The last fresh chunk in it; 0 for a volume that was never written to.
    pub seq: u64,
    /// The last LSN in it.
    pub lsn: Lsn,
    /// Size of the volume then, in bytes.
    pub size: u64,
    /// When it was made, Unix time in milliseconds.
    pub made_ms: u64,
    /// The epoch in which it was made.
    pub epoch: u64,
    /// The translation table at exactly this position; none only at 0.
    pub checkpoint: Option<CheckpointPointer>,
    /// Deleted as far as people are concerned, but clones hold it.
    pub hidden: bool,
    /// The clones made of it.
    pub holds: Vec<Hold>,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Row {
    id: SnapshotId,
    seq: U64,
    lsn: U64,
    size: U64,
    made_ms: U64,
    epoch: U64,
    checkpoint: [u8; checkpoint::LEN],
    flags: u8,
    name_len: u8,
    holds: U16,
    reserved: [u8; 4],
}

const _: () = assert!(size_of::<Row>() == 136);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct HoldRow {
    volume: [u8; 16],
    name_len: u8,
    reserved: [u8; 7],
}

const _: () = assert!(size_of::<HoldRow>() == 24);

/// The section of these snapshots.
pub(super) fn encode(snapshots: &[Snapshot]) -> Vec<u8> {
    let mut out = Vec::new();
    for snapshot in snapshots {
        let row = Row {
            id: snapshot.id,
            seq: snapshot.seq.into(),
            lsn: snapshot.lsn.into(),
            size: snapshot.size.into(),
            made_ms: snapshot.made_ms.into(),
            epoch: snapshot.epoch.into(),
            checkpoint: CheckpointPointer::encode_optional(snapshot.checkpoint.as_ref()),
            flags: if snapshot.hidden { HIDDEN } else { 0 },
            name_len: snapshot.name.len() as u8,
            holds: (snapshot.holds.len() as u16).into(),
            reserved: [0; 4],
        };
        out.extend_from_slice(row.as_bytes());
        out.extend_from_slice(snapshot.name.as_bytes());
        for hold in &snapshot.holds {
            let row = HoldRow { volume: hold.volume.0, name_len: hold.name.len() as u8, reserved: [0; 7] };
            out.extend_from_slice(row.as_bytes());
            out.extend_from_slice(hold.name.as_bytes());
        }
    }
    out
}

/// The reverse of [`encode`].
pub(super) fn decode(mut body: &[u8]) -> Result<Vec<Snapshot>, ManifestFormatError> {
    use ManifestFormatError::Invalid;
    let cut = || Invalid("its snapshots are cut off");
    let mut snapshots = Vec::new();
    while !body.is_empty() {
        let (row, rest) = Row::ref_from_prefix(body).map_err(|_| cut())?;
        let (name, mut rest) = super::name::take(rest, row.name_len).ok_or_else(cut)?;
        if row.flags & !HIDDEN != 0 || row.reserved != [0; 4] {
            return Err(Invalid("a snapshot of it is more than this program knows of; use a newer one"));
        }
        let mut holds = Vec::new();
        for _ in 0..row.holds.get() {
            let (hold, after) = HoldRow::ref_from_prefix(rest).map_err(|_| cut())?;
            let (name, after) = super::name::take(after, hold.name_len).ok_or_else(cut)?;
            if hold.reserved != [0; 7] {
                return Err(Invalid("a reserved field is not zero"));
            }
            holds.push(Hold { volume: VolumeId(hold.volume), name });
            rest = after;
        }
        snapshots.push(Snapshot {
            id: row.id,
            name,
            seq: row.seq.get(),
            lsn: row.lsn.get(),
            size: row.size.get(),
            made_ms: row.made_ms.get(),
            epoch: row.epoch.get(),
            checkpoint: CheckpointPointer::decode_optional(&row.checkpoint)?,
            hidden: row.flags & HIDDEN != 0,
            holds,
        });
        body = rest;
    }
    Ok(snapshots)
}

/// Why these must not be stored, if so.
pub(super) fn problem(snapshots: &[Snapshot]) -> Option<&'static str> {
    if snapshots.len() > MAX_SNAPSHOTS {
        return Some("it has too many snapshots");
    }
    let mut names = std::collections::BTreeSet::new();
    let mut ids = std::collections::BTreeSet::new();
    for snapshot in snapshots {
        let fits = |name: &str| super::check_name(name).is_ok() && name.len() <= MAX_NAME;
        if !fits(&snapshot.name) || !snapshot.holds.iter().all(|hold| fits(&hold.name)) {
            return Some("the name of a snapshot or of its clone is not allowed");
        }
        if !ids.insert(snapshot.id) || !(snapshot.hidden || names.insert(&snapshot.name)) {
            return Some("two of its snapshots are called the same");
        }
        if snapshot.checkpoint.map_or(0, |pointer| pointer.seq) != snapshot.seq {
            return Some("a snapshot has no checkpoint of its position");
        }
        if let Some(problem) = snapshot.checkpoint.and_then(|pointer| pointer.problem()) {
            return Some(problem);
        }
        if snapshot.holds.len() > usize::from(u16::MAX) {
            return Some("a snapshot has too many clones");
        }
    }
    None
}
