//! The bytes of a checkpoint object: which files make up the table. Pure; total on foreign bytes.

use std::collections::BTreeSet;

use xxhash_rust::xxh3::{Xxh3, xxh3_64_with_seed};
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::manifest::CheckpointName;
use crate::types::{Lsn, VolumeId};

/// First bytes of every checkpoint object.
pub const MAGIC: [u8; 8] = *b"BLKDCKPT";
/// The version this code writes and reads.
pub const VERSION: u16 = 1;

const HEADER: usize = 96;
const ROW: usize = 64;
const LEN_AT: usize = 16;
const SUM_AT: usize = 24;
/// Keep the checksums from being mistaken for another structure's.
const SUM_SEED: u64 = u64::from_le_bytes(*b"chckpnt1");
const FILE_SEED: u64 = u64::from_le_bytes(*b"tablfile");
/// The most files of a table.
const FILES_MAX: usize = 1 << 20;
/// The longest file that stands in the object itself, in bytes.
pub const INLINE_MAX: u64 = 64 << 20;
/// The longest name of a file.
const NAME_MAX: usize = 64;

const OBJECT: u8 = 1;
const INLINE: u8 = 2;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U16,
    reserved: U16,
    files: U32,
    len: U64,
    sum: U64,
    volume: [u8; 16],
    epoch: U64,
    number: U64,
    seq: U64,
    lsn: U64,
    relocated: U64,
    made_ms: U64,
}

const _: () = assert!(size_of::<Header>() == HEADER);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Row {
    kind: u8,
    reserved: u8,
    name_len: U16,
    reserved2: U32,
    volume: [u8; 16],
    epoch: U64,
    number: U64,
    size: U64,
    stored: U64,
    sum: U64,
}

const _: () = assert!(size_of::<Row>() == ROW);

/// Where the content of a file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// In an object of its own, this many bytes long.
    Object {
        /// The object; see [`CheckpointName::file_key`].
        name: CheckpointName,
        /// Its length in the bucket.
        stored: u64,
    },
    /// In the checkpoint object, compressed.
    Inline(Vec<u8>),
}

/// A file of the table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableFile {
    /// Its name in the table's directory.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
    /// Its checksum, see [`file_sum`].
    pub sum: u64,
    /// Where its content is.
    pub content: Content,
}

/// A checkpoint object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checkpoint {
    /// Its name.
    pub name: CheckpointName,
    /// The newest fresh chunk in the table.
    pub seq: u64,
    /// The newest LSN in it.
    pub lsn: Lsn,
    /// How many relocated chunks the owner had numbered.
    pub relocated: u64,
    /// When it was made, Unix time in milliseconds.
    pub made_ms: u64,
    /// The table, in order of name.
    pub files: Vec<TableFile>,
}

/// Why bytes are not a checkpoint object.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CheckpointFormatError {
    /// Not one at all.
    #[error("it does not begin like a checkpoint")]
    Magic,
    /// Written by a newer program.
    #[error("format version {0} is unknown to this program, which knows version {VERSION}; use a newer one")]
    Version(u16),
    /// Not as long as it says.
    #[error("it has the wrong length")]
    Length,
    /// It was changed.
    #[error("its checksum does not match")]
    Checksum,
    /// A whole checkpoint in the wrong place.
    #[error("it is the checkpoint {0}")]
    Identity(CheckpointName),
    /// A valid checksum over contradictions.
    #[error("{0}")]
    Invalid(&'static str),
}

/// The checksum of a file's content.
pub fn file_sum(content: &[u8]) -> u64 {
    xxh3_64_with_seed(content, FILE_SEED)
}

impl TableFile {
    /// A small file to stand in the checkpoint object itself.
    pub(super) fn inline(name: String, content: &[u8]) -> Result<Self, std::io::Error> {
        let packed = zstd::bulk::compress(content, 3)?;
        Ok(Self { name, size: content.len() as u64, sum: file_sum(content), content: Content::Inline(packed) })
    }

    /// Whether this is its content.
    pub fn is(&self, content: &[u8]) -> bool {
        content.len() as u64 == self.size && file_sum(content) == self.sum
    }
}

impl Checkpoint {
    /// Keys of all its objects, its own among them.
    pub fn keys(&self) -> impl Iterator<Item = String> {
        let files = self.files.iter().filter_map(|file| match &file.content {
            Content::Object { name, .. } => Some(name.file_key()),
            Content::Inline(_) => None,
        });
        files.chain([self.name.key()])
    }

    /// Bytes of its objects but its own, those shared with other checkpoints included.
    pub fn file_bytes(&self) -> u64 {
        let stored = |file: &TableFile| match &file.content {
            Content::Object { stored, .. } => *stored,
            Content::Inline(_) => 0,
        };
        self.files.iter().map(stored).sum()
    }

    /// The object's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            reserved: 0.into(),
            files: (self.files.len() as u32).into(),
            len: 0.into(),
            sum: 0.into(),
            volume: self.name.volume.0,
            epoch: self.name.epoch.into(),
            number: self.name.number.into(),
            seq: self.seq.into(),
            lsn: self.lsn.into(),
            relocated: self.relocated.into(),
            made_ms: self.made_ms.into(),
        };
        let mut out = header.as_bytes().to_vec();
        for file in &self.files {
            let none = CheckpointName { volume: VolumeId([0; 16]), epoch: 0, number: 0 };
            let (kind, object, stored) = match &file.content {
                Content::Object { name, stored } => (OBJECT, *name, *stored),
                Content::Inline(bytes) => (INLINE, none, bytes.len() as u64),
            };
            let row = Row {
                kind,
                reserved: 0,
                name_len: (file.name.len() as u16).into(),
                reserved2: 0.into(),
                volume: object.volume.0,
                epoch: object.epoch.into(),
                number: object.number.into(),
                size: file.size.into(),
                stored: stored.into(),
                sum: file.sum.into(),
            };
            out.extend_from_slice(row.as_bytes());
        }
        for file in &self.files {
            out.extend_from_slice(file.name.as_bytes());
        }
        for file in &self.files {
            if let Content::Inline(bytes) = &file.content {
                out.extend_from_slice(bytes);
            }
        }
        let len = out.len() as u64;
        out[LEN_AT..LEN_AT + 8].copy_from_slice(&len.to_le_bytes());
        let sum = checksum(&out);
        out[SUM_AT..SUM_AT + 8].copy_from_slice(&sum.to_le_bytes());
        out
    }

    /// Parses and verifies the checkpoint object `name`; `bytes` is all of it.
    pub fn decode(bytes: &[u8], name: &CheckpointName) -> Result<Self, CheckpointFormatError> {
        use CheckpointFormatError::{Checksum, Identity, Invalid, Length, Magic, Version};
        let (header, rest) = Header::ref_from_prefix(bytes).map_err(|_| Length)?;
        if header.magic != MAGIC {
            return Err(Magic);
        }
        if header.version.get() != VERSION {
            return Err(Version(header.version.get()));
        }
        if header.len.get() != bytes.len() as u64 {
            return Err(Length);
        }
        if checksum(bytes) != header.sum.get() {
            return Err(Checksum);
        }
        let found =
            CheckpointName { volume: VolumeId(header.volume), epoch: header.epoch.get(), number: header.number.get() };
        if found != *name {
            return Err(Identity(found));
        }
        let count = header.files.get() as usize;
        if count > FILES_MAX || header.reserved.get() != 0 || rest.len() < count * ROW {
            return Err(Invalid("its length and its number of files disagree"));
        }
        let (rows, mut rest) = rest.split_at(count * ROW);
        let rows = <[Row]>::ref_from_bytes(rows).map_err(|_| Invalid("it has half a row"))?;
        let mut take = |len: u64| {
            let len = usize::try_from(len).ok().filter(|len| *len <= rest.len()).ok_or(Invalid("a row is too long"))?;
            let (part, left) = rest.split_at(len);
            rest = left;
            Ok(part)
        };
        let mut names = Vec::with_capacity(count);
        for row in rows {
            let name = take(row.name_len.get().into())?;
            names.push(file_name(name).ok_or(Invalid("a file has a name no file of a table has"))?);
        }
        if names.iter().collect::<BTreeSet<_>>().len() != count {
            return Err(Invalid("two files have one name"));
        }
        let mut files = Vec::with_capacity(count);
        for (row, name) in rows.iter().zip(names) {
            let object =
                CheckpointName { volume: VolumeId(row.volume), epoch: row.epoch.get(), number: row.number.get() };
            let content = match row.kind {
                OBJECT => Content::Object { name: object, stored: row.stored.get() },
                INLINE if row.size.get() <= INLINE_MAX => Content::Inline(take(row.stored.get())?.to_vec()),
                INLINE => return Err(Invalid("a file inside it is too long")),
                _ => return Err(Invalid("it has a kind of file unknown to this program")),
            };
            if row.reserved != 0 || row.reserved2.get() != 0 {
                return Err(Invalid("a reserved field is not zero"));
            }
            files.push(TableFile { name, size: row.size.get(), sum: row.sum.get(), content });
        }
        if !rest.is_empty() {
            return Err(Invalid("bytes follow its last file"));
        }
        Ok(Self {
            name: found,
            seq: header.seq.get(),
            lsn: header.lsn.get(),
            relocated: header.relocated.get(),
            made_ms: header.made_ms.get(),
            files,
        })
    }
}

/// Only names that stay inside the directory and that no other file of ours has.
fn file_name(bytes: &[u8]) -> Option<String> {
    let good = (1..=NAME_MAX).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_'))
        && !bytes.ends_with(b".part");
    good.then(|| String::from_utf8_lossy(bytes).into_owned())
}

/// XXH3-64 over the whole object, the checksum's own field taken as zeroes.
fn checksum(bytes: &[u8]) -> u64 {
    let mut hash = Xxh3::with_seed(SUM_SEED);
    hash.update(&bytes[..SUM_AT]);
    hash.update(&[0; 8]);
    hash.update(&bytes[SUM_AT + 8..]);
    hash.digest()
}
