//! What a manifest says and its bytes. Pure; total on foreign bytes.

use std::fmt;
use std::ops::Range;
use std::str::FromStr;

use bytes::Bytes;
use xxhash_rust::xxh3::{Xxh3, xxh3_64};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::checkpoint::{self, CheckpointName, CheckpointPointer};
use super::encryption::{self, Encryption};
use super::origin::{self, Origin, Restored};
use super::seal::{self, Seal};
use super::snapshot::{self, Snapshot};
use crate::chunk::Codec;
use crate::types::{BLOCK_SIZE, Lsn, VolumeId};

/// First bytes of every manifest.
pub const MAGIC: [u8; 8] = *b"BLKDMNFT";
/// The version this code writes and reads.
pub const VERSION: u16 = 2;
/// The longest name of a volume, in bytes.
pub const MAX_NAME: usize = 128;
/// The most changes of owner a manifest records.
pub const MAX_EPOCHS: usize = 65_536;

const HEADER: usize = 80;
const EPOCH_ROW: usize = 48;
const SECTION_HEADER: usize = 8;
const LEN_AT: usize = 12;
const SUM_AT: usize = 16;
/// Keeps a manifest's checksum from being mistaken for another structure's.
const SUM_SEED: u64 = u64::from_le_bytes(*b"manifest");

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U16,
    state: u8,
    durability: u8,
    len: U32,
    sum: U64,
    volume: [u8; 16],
    size: U64,
    created_ms: U64,
    chunk_bytes: U32,
    codec: u8,
    codec_level: i8,
    name_len: U16,
    epochs: U32,
    reserved: [u8; 12],
}

const _: () = assert!(size_of::<Header>() == HEADER);

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct EpochRow {
    epoch: U64,
    first_seq: U64,
    first_lsn: U64,
    owner: [u8; 16],
    opened_ms: U64,
}

const _: () = assert!(size_of::<EpochRow>() == EPOCH_ROW);

/// Before each section: what only some volumes have. Sections follow the epochs, in order of kind, each kind once.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct SectionHeader {
    kind: U16,
    reserved: U16,
    len: U32,
}

const _: () = assert!(size_of::<SectionHeader>() == SECTION_HEADER);

/// When a flush of the volume is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Durability {
    /// Once it is on this host's log device.
    Local,
    /// Once it is in the bucket.
    Object,
}

/// Codes of [`Durability`]; 2 is kept for `replica`, a standby's log.
const LOCAL: u8 = 1;
const OBJECT: u8 = 3;

impl fmt::Display for Durability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Durability::Local => "local",
            Durability::Object => "object",
        })
    }
}

/// A durability setting that is not to be had.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum UnknownDurability {
    /// Not a word of this setting.
    #[error("unknown durability {0:?}: use local or object")]
    Unknown(String),
    /// Planned.
    #[error("durability \"replica\" is not built yet: use local or object")]
    NotBuilt,
}

impl FromStr for Durability {
    type Err = UnknownDurability;
    fn from_str(s: &str) -> Result<Self, UnknownDurability> {
        match s {
            "local" => Ok(Durability::Local),
            "object" => Ok(Durability::Object),
            "replica" => Err(UnknownDurability::NotBuilt),
            _ => Err(UnknownDurability::Unknown(s.to_owned())),
        }
    }
}

/// Whether a volume may be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum VolumeState {
    /// It may.
    Active = 1,
    /// Its objects are being deleted.
    Deleting = 2,
}

/// A change of owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EpochStart {
    /// The fencing number; grows with each change.
    pub epoch: u64,
    /// The sequence number of its first chunk; 0 while the epoch is claimed but its predecessor's end not yet settled.
    pub first_seq: u64,
    /// The first LSN it hands out; means nothing before it is settled.
    pub first_lsn: Lsn,
    /// Names the process that claimed it; unique to each claim, so that a writer recognizes its own.
    pub owner: [u8; 16],
    /// When it was claimed, Unix time in milliseconds.
    pub opened_ms: u64,
}

/// A volume's root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Manifest {
    /// Its permanent identity.
    pub id: VolumeId,
    /// Its name, see [`super::check_name`].
    pub name: String,
    /// Its size in bytes; whole blocks.
    pub size: u64,
    /// When flushes are answered.
    pub durability: Durability,
    /// How new chunks are compressed.
    pub codec: Codec,
    /// How much to destage at once, in bytes before compression.
    pub chunk_bytes: u32,
    /// Whether it may be opened.
    pub state: VolumeState,
    /// When it was made, Unix time in milliseconds.
    pub created_ms: u64,
    /// Its owners, oldest first.
    pub epochs: Vec<EpochStart>,
    /// How its data key is wrapped, if it is encrypted.
    pub encryption: Option<Encryption>,
    /// The newest durable copy of its translation table, if there is one.
    pub checkpoint: Option<CheckpointPointer>,
    /// Its snapshots, oldest first, those included that only clones still need.
    pub snapshots: Vec<Snapshot>,
    /// What it was made of, if it is a clone.
    pub origin: Option<Origin>,
    /// Where it went back to a snapshot, oldest first.
    pub restores: Vec<Restored>,
    /// What proves that the owner of that key wrote it.
    pub seal: Seal,
}

/// Why bytes are not a manifest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ManifestFormatError {
    /// Not a manifest at all.
    #[error("it does not begin like a manifest")]
    Magic,
    /// Written by a newer program.
    #[error("format version {0} is unknown to this program, which knows version {VERSION}; use a newer one")]
    Version(u16),
    /// Not as long as it says.
    #[error("it is {have} bytes long where {need} are needed")]
    Length {
        /// Bytes needed.
        need: usize,
        /// Bytes there.
        have: usize,
    },
    /// It was changed.
    #[error("its checksum does not match")]
    Checksum,
    /// A setting this program cannot honour.
    #[error("its durability mode (code {0}) is not built into this program; use a newer one")]
    Durability(u8),
    /// A part this program knows nothing of, so that it could not keep its promises.
    #[error("it has a section of kind {0}, which is unknown to this program; use a newer one")]
    Section(u16),
    /// A valid checksum over contradictions.
    #[error("{0}")]
    Invalid(&'static str),
}

impl Manifest {
    /// A volume that was just made and never opened: not encrypted, without snapshots, flushes answered by the local log,
    /// compressed by LZ4, 16 MiB destaged at once. Its size is in bytes.
    pub fn new(id: VolumeId, name: impl Into<String>, size: u64) -> Self {
        Self {
            id,
            name: name.into(),
            size,
            durability: Durability::Local,
            codec: Codec::Lz4,
            chunk_bytes: 16 << 20,
            state: VolumeState::Active,
            created_ms: 0,
            epochs: Vec::new(),
            encryption: None,
            checkpoint: None,
            snapshots: Vec::new(),
            origin: None,
            restores: Vec::new(),
            seal: Seal::None,
        }
    }

    /// The epoch whose owner may write: the last one that is settled.
    pub fn settled(&self) -> Option<&EpochStart> {
        self.epochs.iter().rev().find(|e| e.first_seq > 0)
    }

    /// The epoch in which the fresh chunk `seq` was written; 0 when nobody may have written it.
    pub fn epoch_of(&self, seq: u64) -> u64 {
        self.epochs.iter().rev().find(|e| e.first_seq > 0 && e.first_seq <= seq).map_or(0, |e| e.epoch)
    }

    /// The epochs before the last one, each with the fresh chunks of its history: its seal stands where the next one begins.
    pub fn ended(&self) -> impl Iterator<Item = (u64, Range<u64>)> + '_ {
        let next = self.epochs.iter().skip(1);
        self.epochs.iter().zip(next).map(|(e, next)| (e.epoch, e.first_seq..next.first_seq))
    }

    /// Checkpoints whose objects must stay: the newest one, and those of snapshots.
    pub fn held_checkpoints(&self) -> Vec<CheckpointName> {
        let snapshots = self.snapshots.iter().filter_map(|snapshot| snapshot.checkpoint.as_ref());
        let mut names: Vec<_> = self.checkpoint.iter().chain(snapshots).map(|pointer| pointer.object).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// Positions in the history whose chunks must stay: those of all snapshots.
    pub fn held_positions(&self) -> Vec<u64> {
        self.snapshots.iter().map(|snapshot| snapshot.seq).collect()
    }

    /// The snapshot that people know by this name.
    pub fn snapshot(&self, name: &str) -> Option<&Snapshot> {
        self.snapshots.iter().find(|snapshot| !snapshot.hidden && snapshot.name == name)
    }

    /// What of the history up to the fresh chunk `end` makes up the state there, oldest first.
    pub fn lineage(&self, end: u64) -> Vec<origin::Stretch> {
        origin::lineage(&self.restores, end)
    }

    /// Whether clones need what the volume has in the bucket.
    pub fn is_held(&self) -> bool {
        self.snapshots.iter().any(|snapshot| !snapshot.holds.is_empty())
    }

    /// Why the manifest must not be stored, if so.
    pub(super) fn problem(&self) -> Option<&'static str> {
        if super::check_name(&self.name).is_err() {
            return Some("its name is not allowed");
        }
        if self.size == 0 || !self.size.is_multiple_of(BLOCK_SIZE) {
            return Some("its size is not whole blocks");
        }
        if self.epochs.len() > MAX_EPOCHS {
            return Some("it has had too many owners");
        }
        if self.encryption.is_some() != self.is_sealed() && self.state != VolumeState::Deleting {
            return Some("it is encrypted without being signed, or signed without being encrypted");
        }
        let (mut epoch, mut seq) = (0, 0);
        for start in &self.epochs {
            if start.epoch <= epoch {
                return Some("its epochs do not grow");
            }
            epoch = start.epoch;
            if start.first_seq != 0 {
                if start.first_seq < seq {
                    return Some("its epochs begin out of order");
                }
                seq = start.first_seq;
            }
        }
        let origin = self.origin.as_ref().and_then(Origin::problem);
        let parts = origin.or(snapshot::problem(&self.snapshots)).or(origin::restores_problem(&self.restores));
        parts.or(self.checkpoint.and_then(|pointer| pointer.problem()))
    }

    /// The object's bytes.
    ///
    /// # Panics
    /// When the manifest could not be decoded again (a name that is not allowed, a size that is not whole blocks,
    /// epochs that do not grow): storing it would lose the volume.
    pub fn encode(&self) -> Bytes {
        let mut out = self.covered();
        if let Some(tag) = self.is_sealed().then(|| self.seal.tag(&out)).flatten() {
            let header = SectionHeader { kind: seal::KIND.into(), reserved: 0.into(), len: (seal::TAG as u32).into() };
            out.extend_from_slice(header.as_bytes());
            out.extend_from_slice(&tag);
        }
        let sum = checksum(&out);
        out[SUM_AT..SUM_AT + 8].copy_from_slice(&sum.to_le_bytes());
        out.into()
    }

    /// Whether a signature ends it. What is being deleted needs none, so that who lost a key can delete the volume.
    fn is_sealed(&self) -> bool {
        self.seal != Seal::None && self.state != VolumeState::Deleting
    }

    /// Whether it was changed without being signed anew.
    pub(super) fn is_stale(&self) -> bool {
        matches!(self.seal, Seal::Read { covered, .. } if self.is_sealed() && xxh3_64(&self.covered()) != covered)
    }

    /// What a signature covers: everything before it, the checksum as zeroes.
    pub(super) fn covered(&self) -> Vec<u8> {
        if let Some(problem) = self.problem() {
            panic!("the manifest of {:?} must not be stored: {problem}", self.name);
        }
        let (codec, codec_level) = self.codec.to_code();
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            state: self.state as u8,
            durability: match self.durability {
                Durability::Local => LOCAL,
                Durability::Object => OBJECT,
            },
            len: 0.into(),
            sum: 0.into(),
            volume: self.id.0,
            size: self.size.into(),
            created_ms: self.created_ms.into(),
            chunk_bytes: self.chunk_bytes.into(),
            codec,
            codec_level,
            name_len: (self.name.len() as u16).into(),
            epochs: (self.epochs.len() as u32).into(),
            reserved: [0; 12],
        };
        let mut out = Vec::with_capacity(HEADER + self.name.len() + self.epochs.len() * EPOCH_ROW);
        out.extend_from_slice(header.as_bytes());
        out.extend_from_slice(self.name.as_bytes());
        for start in &self.epochs {
            let row = EpochRow {
                epoch: start.epoch.into(),
                first_seq: start.first_seq.into(),
                first_lsn: start.first_lsn.into(),
                owner: start.owner,
                opened_ms: start.opened_ms.into(),
            };
            out.extend_from_slice(row.as_bytes());
        }
        for (kind, body) in self.sections() {
            let header = SectionHeader { kind: kind.into(), reserved: 0.into(), len: (body.len() as u32).into() };
            out.extend_from_slice(header.as_bytes());
            out.extend_from_slice(&body);
        }
        let seal = if self.is_sealed() { SECTION_HEADER + seal::TAG } else { 0 };
        let len = (out.len() + seal) as u32;
        out[LEN_AT..LEN_AT + 4].copy_from_slice(&len.to_le_bytes());
        out
    }

    /// The sections it has: (kind, body), by growing kind. Kinds are never reused for anything else.
    fn sections(&self) -> Vec<(u16, Vec<u8>)> {
        let mut sections = Vec::new();
        sections.extend(self.encryption.as_ref().map(|section| (encryption::KIND, section.encode())));
        sections.extend(self.checkpoint.map(|pointer| (checkpoint::KIND, pointer.encode())));
        sections.extend((!self.snapshots.is_empty()).then(|| (snapshot::KIND, snapshot::encode(&self.snapshots))));
        sections.extend(self.origin.as_ref().map(|section| (origin::KIND, section.encode())));
        let restores = (!self.restores.is_empty()).then(|| origin::encode_restores(&self.restores));
        sections.extend(restores.map(|body| (origin::RESTORES_KIND, body)));
        sections
    }

    /// Takes in what a section says; the reverse of [`Manifest::sections`].
    fn take_section(&mut self, kind: u16, body: &[u8]) -> Result<(), ManifestFormatError> {
        match kind {
            encryption::KIND => self.encryption = Some(Encryption::decode(body)?),
            checkpoint::KIND => self.checkpoint = Some(CheckpointPointer::decode(body)?),
            snapshot::KIND => self.snapshots = snapshot::decode(body)?,
            origin::KIND => self.origin = Some(Origin::decode(body)?),
            origin::RESTORES_KIND => self.restores = origin::decode_restores(body)?,
            seal::KIND => {
                let tag = body.try_into();
                let tag = tag.map_err(|_| ManifestFormatError::Invalid("its signature has a wrong length"))?;
                self.seal = Seal::Read { tag, covered: 0 };
            }
            kind => return Err(ManifestFormatError::Section(kind)),
        }
        Ok(())
    }

    /// Parses and verifies a manifest; `bytes` is the whole object.
    pub fn decode(bytes: &[u8]) -> Result<Self, ManifestFormatError> {
        use ManifestFormatError::Invalid;
        let short = ManifestFormatError::Length { need: HEADER, have: bytes.len() };
        let (header, rest) = Header::ref_from_prefix(bytes).map_err(|_| short)?;
        if header.magic != MAGIC {
            return Err(ManifestFormatError::Magic);
        }
        if header.version.get() != VERSION {
            return Err(ManifestFormatError::Version(header.version.get()));
        }
        if header.len.get() as usize != bytes.len() {
            return Err(ManifestFormatError::Length { need: header.len.get() as usize, have: bytes.len() });
        }
        if checksum(bytes) != header.sum.get() {
            return Err(ManifestFormatError::Checksum);
        }
        let name_len = usize::from(header.name_len.get());
        let epochs = header.epochs.get() as usize;
        if name_len > MAX_NAME || epochs > MAX_EPOCHS || rest.len() < name_len + epochs * EPOCH_ROW {
            return Err(Invalid("its length and its counts disagree"));
        }
        let (name, rest) = rest.split_at(name_len);
        let (rows, mut sections) = rest.split_at(epochs * EPOCH_ROW);
        let rows = <[EpochRow]>::ref_from_bytes(rows).map_err(|_| Invalid("its epochs have half a row"))?;
        if header.reserved != [0; 12] {
            return Err(Invalid("a reserved field is not zero"));
        }
        let name = String::from_utf8(name.to_vec()).map_err(|_| Invalid("its name is not text"))?;
        let mut manifest = Self {
            durability: match header.durability {
                LOCAL => Durability::Local,
                OBJECT => Durability::Object,
                code => return Err(ManifestFormatError::Durability(code)),
            },
            codec: Codec::from_code(header.codec, header.codec_level)
                .ok_or(Invalid("its codec is unknown to this program"))?,
            chunk_bytes: header.chunk_bytes.get(),
            state: match header.state {
                1 => VolumeState::Active,
                2 => VolumeState::Deleting,
                _ => return Err(Invalid("its state is unknown to this program")),
            },
            created_ms: header.created_ms.get(),
            epochs: rows
                .iter()
                .map(|row| EpochStart {
                    epoch: row.epoch.get(),
                    first_seq: row.first_seq.get(),
                    first_lsn: row.first_lsn.get(),
                    owner: row.owner,
                    opened_ms: row.opened_ms.get(),
                })
                .collect(),
            ..Self::new(VolumeId(header.volume), name, header.size.get())
        };
        let mut last = 0;
        while !sections.is_empty() {
            let (header, rest) =
                SectionHeader::ref_from_prefix(sections).map_err(|_| Invalid("a section's header is cut off"))?;
            let (kind, len) = (header.kind.get(), header.len.get() as usize);
            if kind <= last || header.reserved.get() != 0 {
                return Err(Invalid("its sections are out of order"));
            }
            if len > rest.len() {
                return Err(Invalid("a section is cut off"));
            }
            let (body, rest) = rest.split_at(len);
            manifest.take_section(kind, body)?;
            (last, sections) = (kind, rest);
        }
        if let Some(problem) = manifest.problem() {
            return Err(Invalid(problem));
        }
        if !manifest.is_sealed() {
            manifest.seal = Seal::None;
        }
        let read = xxh3_64(&manifest.covered());
        if let Seal::Read { covered, .. } = &mut manifest.seal {
            *covered = read;
        }
        Ok(manifest)
    }
}

/// XXH3-64 over the whole manifest, the checksum's own field taken as zeroes.
fn checksum(bytes: &[u8]) -> u64 {
    let mut hash = Xxh3::with_seed(SUM_SEED);
    hash.update(&bytes[..SUM_AT]);
    hash.update(&[0; 8]);
    hash.update(&bytes[SUM_AT + 8..]);
    hash.digest()
}
