//! What a lease says and its bytes. Pure; total on foreign bytes.

use bytes::Bytes;
use xxhash_rust::xxh3::Xxh3;
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::types::{Lsn, VolumeId};

const MAGIC: [u8; 8] = *b"BLKDLEAS";
const VERSION: u16 = 1;
const HEADER: usize = 144;
const SUM_AT: usize = 16;
/// Keeps a lease's checksum from being mistaken for another structure's.
const SUM_SEED: u64 = u64::from_le_bytes(*b"leaseobj");

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    magic: [u8; 8],
    version: U16,
    state: u8,
    name_len: u8,
    reserved: U32,
    sum: U64,
    volume: [u8; 16],
    host: [u8; 16],
    claim: [u8; 16],
    epoch: U64,
    counter: U64,
    duration_ms: U64,
    since_ms: U64,
    renewed_ms: U64,
    bucket_lsn: U64,
    last_lsn: U64,
    dirty_bytes: U64,
    reserved_2: U64,
}

const _: () = assert!(size_of::<Header>() == HEADER);

/// Whether somebody holds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum LeaseState {
    /// The owner serves the volume, or did until it was last heard of.
    Held = 1,
    /// The owner has sent everything to the bucket and let go.
    Released = 2,
}

/// Who serves a volume. Times are Unix milliseconds by the owner's wall clock.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    /// The volume, lest a later one of the same name be mistaken for it.
    pub volume: VolumeId,
    /// Whether somebody holds it.
    pub state: LeaseState,
    /// Identity of the owner's data directory.
    pub host: [u8; 16],
    /// Unique to each taking, so that an owner recognizes its own.
    pub claim: [u8; 16],
    /// What the owner's machine calls itself; for people.
    pub host_name: String,
    /// The owner's epoch; 0 while it is still opening the volume.
    pub epoch: u64,
    /// Grows with every change of the object.
    pub counter: u64,
    /// How long it is good for after [`Lease::renewed_ms`], in milliseconds.
    pub duration_ms: u64,
    /// When it was taken.
    pub since_ms: u64,
    /// When it was renewed last.
    pub renewed_ms: u64,
    /// Last LSN in the bucket, as the owner knew then.
    pub bucket_lsn: Lsn,
    /// Last LSN accepted; none beyond it was acknowledged then.
    pub last_lsn: Lsn,
    /// Payload bytes accepted and not in the bucket then.
    pub dirty_bytes: u64,
}

/// Why bytes are not a lease.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LeaseFormatError {
    /// Not a lease at all.
    #[error("it does not begin like a lease")]
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
    /// A valid checksum over contradictions.
    #[error("{0}")]
    Invalid(&'static str),
}

impl Lease {
    /// The object's bytes. A host name too long for it is cut.
    pub fn encode(&self) -> Bytes {
        let name = &self.host_name[..self.host_name.floor_char_boundary(255)];
        let header = Header {
            magic: MAGIC,
            version: VERSION.into(),
            state: self.state as u8,
            name_len: name.len() as u8,
            reserved: 0.into(),
            sum: 0.into(),
            volume: self.volume.0,
            host: self.host,
            claim: self.claim,
            epoch: self.epoch.into(),
            counter: self.counter.into(),
            duration_ms: self.duration_ms.into(),
            since_ms: self.since_ms.into(),
            renewed_ms: self.renewed_ms.into(),
            bucket_lsn: self.bucket_lsn.into(),
            last_lsn: self.last_lsn.into(),
            dirty_bytes: self.dirty_bytes.into(),
            reserved_2: 0.into(),
        };
        let mut out = [header.as_bytes(), name.as_bytes()].concat();
        let sum = checksum(&out);
        out[SUM_AT..SUM_AT + 8].copy_from_slice(&sum.to_le_bytes());
        out.into()
    }

    /// Parses and verifies a lease; `bytes` is the whole object.
    pub fn decode(bytes: &[u8]) -> Result<Self, LeaseFormatError> {
        use LeaseFormatError::{Checksum, Invalid, Length, Magic, Version};
        let (header, name) = Header::ref_from_prefix(bytes).map_err(|_| Length)?;
        if header.magic != MAGIC {
            return Err(Magic);
        }
        if header.version.get() != VERSION {
            return Err(Version(header.version.get()));
        }
        if name.len() != usize::from(header.name_len) {
            return Err(Length);
        }
        if checksum(bytes) != header.sum.get() {
            return Err(Checksum);
        }
        if header.reserved.get() != 0 || header.reserved_2.get() != 0 {
            return Err(Invalid("a reserved field is not zero"));
        }
        Ok(Self {
            volume: VolumeId(header.volume),
            state: match header.state {
                1 => LeaseState::Held,
                2 => LeaseState::Released,
                _ => return Err(Invalid("its state is unknown to this program")),
            },
            host: header.host,
            claim: header.claim,
            host_name: String::from_utf8(name.to_vec()).map_err(|_| Invalid("its host name is not text"))?,
            epoch: header.epoch.get(),
            counter: header.counter.get(),
            duration_ms: header.duration_ms.get(),
            since_ms: header.since_ms.get(),
            renewed_ms: header.renewed_ms.get(),
            bucket_lsn: header.bucket_lsn.get(),
            last_lsn: header.last_lsn.get(),
            dirty_bytes: header.dirty_bytes.get(),
        })
    }
}

/// XXH3-64 over the whole lease, the checksum's own field taken as zeroes.
fn checksum(bytes: &[u8]) -> u64 {
    let mut hash = Xxh3::with_seed(SUM_SEED);
    hash.update(&bytes[..SUM_AT]);
    hash.update(&[0; 8]);
    hash.update(&bytes[SUM_AT + 8..]);
    hash.digest()
}
