//! The reservations of a volume on disk: the file `reservations` in its directory (docs/format.md).
//!
//! It is replaced as a whole, by writing a new one, syncing it, renaming it and syncing the directory, and is answered for
//! only then.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::xxh3_64_with_seed;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Kind, REGISTRANTS_MAX, Registrant, Reservations};
use crate::types::VolumeId;

/// Name of the file.
pub const FILE: &str = "reservations";
const MAGIC: [u8; 8] = *b"BLKDRESV";
/// Seed of the checksum, so that no other structure passes for this one.
const SUM_SEED: u64 = u64::from_le_bytes(*b"reservat");
const VERSION: u32 = 1;

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Head {
    magic: [u8; 8],
    version: U32,
    count: U32,
    volume: [u8; 16],
    /// Start of the machine at which it was written: a loss of power lies between two of them.
    boot: [u8; 16],
    holder: [u8; 16],
    generation: U32,
    /// 0 for no reservation.
    kind: u8,
    persists: u8,
    reserved: [u8; 2],
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct Entry {
    host: [u8; 16],
    key: U64,
}

const _: () = {
    assert!(size_of::<Head>() == 72);
    assert!(size_of::<Entry>() == 24);
};

/// Why the file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// Which.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// It is damaged, another volume's, or of a later version.
    #[error(
        "{}: {what}. It says which hosts may write; make sure that none does that must not, then move the file away",
        path.display()
    )]
    Invalid {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
}

/// Bytes of the file for a state.
pub fn encode(state: &Reservations, volume: VolumeId, boot: [u8; 16]) -> Vec<u8> {
    let (kind, holder) = state.held.map_or((0, [0; 16]), |(kind, holder)| (kind as u8, holder));
    let head = Head {
        magic: MAGIC,
        version: VERSION.into(),
        count: (state.registrants.len() as u32).into(),
        volume: volume.0,
        boot,
        holder,
        generation: state.generation.into(),
        kind,
        persists: state.persists.into(),
        reserved: [0; 2],
    };
    let mut bytes = head.as_bytes().to_vec();
    for Registrant { host, key } in &state.registrants {
        bytes.extend_from_slice(Entry { host: *host, key: (*key).into() }.as_bytes());
    }
    let checksum = xxh3_64_with_seed(&bytes, SUM_SEED);
    bytes.extend_from_slice(&checksum.to_le_bytes());
    bytes
}

/// The state in a file's bytes, and the start of the machine at which it was written.
///
/// # Errors
/// What is wrong with it.
pub fn decode(bytes: &[u8], volume: VolumeId) -> Result<(Reservations, [u8; 16]), &'static str> {
    let Some((body, checksum)) = bytes.split_last_chunk::<8>() else { return Err("it is too short") };
    let Ok((head, entries)) = Head::read_from_prefix(body) else { return Err("it is too short") };
    if head.magic != MAGIC {
        return Err("it is no file of reservations");
    }
    if head.version.get() != VERSION {
        return Err("it was written by a later version of blockd");
    }
    if xxh3_64_with_seed(body, SUM_SEED) != u64::from_le_bytes(*checksum) {
        return Err("its checksum does not match");
    }
    if head.volume != volume.0 {
        return Err("it belongs to another volume");
    }
    let entries = <[Entry]>::ref_from_bytes(entries).map_err(|_| "its length is wrong")?;
    if entries.len() != head.count.get() as usize || entries.len() > REGISTRANTS_MAX {
        return Err("its number of registrants is wrong");
    }
    let registrants: Vec<Registrant> =
        entries.iter().map(|entry| Registrant { host: entry.host, key: entry.key.get() }).collect();
    let held = match (head.kind, Kind::of(head.kind)) {
        (0, _) if head.holder == [0; 16] => None,
        (_, Some(kind)) => Some((kind, head.holder)),
        _ => return Err("it has an unknown kind of reservation"),
    };
    if head.reserved != [0; 2] || head.persists > 1 {
        return Err("a field of it has an unknown value");
    }
    let state = Reservations { registrants, held, generation: head.generation.get(), persists: head.persists == 1 };
    Ok((state, head.boot))
}

/// Reads the reservations of a volume. Those that were not to outlive a loss of power are gone if the machine was
/// started since.
///
/// # Errors
/// The file is there and cannot be used.
pub fn load(dir: &Path, volume: VolumeId) -> Result<Reservations, FileError> {
    let path = dir.join(FILE);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Reservations::default()),
        Err(source) => return Err(FileError::Io { path, source }),
    };
    let (state, boot) = decode(&bytes, volume).map_err(|what| FileError::Invalid { path, what })?;
    if !state.persists && boot != boot_id() {
        return Ok(Reservations { generation: state.generation, ..Reservations::default() });
    }
    Ok(state)
}

/// Replaces the file; durable when this returns.
///
/// # Errors
/// The old one may stand, or the new one; both are whole.
pub fn store(dir: &Path, volume: VolumeId, state: &Reservations) -> io::Result<()> {
    let (path, new) = (dir.join(FILE), dir.join("reservations.tmp"));
    let mut file = File::create(&new)?;
    file.write_all(&encode(state, volume, boot_id()))?;
    file.sync_all()?;
    fs::rename(&new, &path)?;
    File::open(dir)?.sync_all()
}

/// Names this start of the machine; zero where the system does not tell.
fn boot_id() -> [u8; 16] {
    let text = fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    uuid::Uuid::parse_str(text.trim()).map_or([0; 16], |id| *id.as_bytes())
}
