//! The superblock, the allocator and the host slots.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::header::{Opened, open};
use crate::blocks::{BODY_BYTES, BlockKind, Body};
use crate::disk::{BLOCK_BYTES, BlockAddress, Disk};
use crate::vfs::{Ino, Result, VfsError};

/// How many hosts there can be.
pub const HOST_SLOTS: u64 = 64;
/// Where the two copies of the allocator are.
pub const ALLOCATOR_BLOCKS: [BlockAddress; 2] = [2, 3];
/// Where the host slots begin.
const HOST_START: BlockAddress = 4;
/// Where the first journal begins.
const JOURNAL_START: BlockAddress = HOST_START + HOST_SLOTS;
/// The orphan directory of the first host slot; those of the others follow. Not part of the tree.
pub const INO_ORPHANS: u64 = 2;
/// The first number of an ordinary file.
pub const FIRST_FREE_INO: u64 = 128;

/// The version of the whole format that this program reads and writes.
const FORMAT: u32 = 1;
const MAGIC: [u8; 8] = *b"fs-layer";

/// The body of the superblock.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct SuperBody {
    magic: [u8; 8],
    format: U32,
    /// Bits of what a program must know to read.
    incompatible: U32,
    /// Names the filesystem for ever.
    pub uuid: [u8; 16],
    /// Its name, for people; zeros behind.
    pub label: [u8; 64],
    /// When it was made, in seconds since 1970.
    pub made: U64,
    /// Blocks of the disk.
    pub disk_blocks: U64,
    /// Blocks of each journal.
    pub journal_blocks: U64,
    /// Where the inodes begin.
    pub inode_start: U64,
    /// How many there can be.
    pub inode_count: U64,
    /// Where the data begins.
    pub data_start: U64,
    /// Bytes that may be stored; 0: as many as the disk has.
    pub quota_bytes: U64,
    /// Files that may exist; 0: as many as there are inodes.
    pub quota_files: U64,
    reserved: [u8; BODY_BYTES - 160],
}

const _: () = assert!(size_of::<SuperBody>() == BODY_BYTES);

/// The body of the allocator. Two copies, the one of the higher version counts.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct AllocatorBody {
    /// The first inode number nobody has leased.
    pub next_ino: U64,
    /// The first block of data nobody has leased.
    pub next_address: U64,
    reserved: [u8; BODY_BYTES - 16],
}

const _: () = assert!(size_of::<AllocatorBody>() == BODY_BYTES);

impl AllocatorBody {
    /// With these.
    pub fn new(next_ino: u64, next_address: u64) -> AllocatorBody {
        AllocatorBody {
            next_ino: U64::new(next_ino),
            next_address: U64::new(next_address),
            reserved: [0; BODY_BYTES - 16],
        }
    }
}

/// How many requests a host remembers that it has done: more than exports run at a time of those that change names.
pub const NOTED_MAX: usize = 480;

/// The body of a host slot: what its journal has counted, and which requests it did last.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct HostBody {
    /// Blocks stored by this host less those freed; may be negative.
    pub stored_blocks: U64,
    /// Files made by this host less those removed; may be negative.
    pub files: U64,
    /// How many requests were noted ever.
    pub noted: U64,
    /// The last of them: the one that was noted as number n, from 0, stands at n modulo the length. 0 is none.
    pub requests: [U64; NOTED_MAX],
    reserved: [u8; BODY_BYTES - 24 - 8 * NOTED_MAX],
}

const _: () = assert!(size_of::<HostBody>() == BODY_BYTES);

impl HostBody {
    /// With these counts, and no requests.
    pub fn new(stored_blocks: i64, files: i64) -> HostBody {
        HostBody {
            stored_blocks: U64::new(stored_blocks as u64),
            files: U64::new(files as u64),
            noted: U64::ZERO,
            requests: [U64::ZERO; NOTED_MAX],
            reserved: [0; BODY_BYTES - 24 - 8 * NOTED_MAX],
        }
    }

    /// The same with other counts.
    #[must_use]
    pub fn with_counts(mut self, stored_blocks: i64, files: i64) -> HostBody {
        self.stored_blocks = U64::new(stored_blocks as u64);
        self.files = U64::new(files as u64);
        self
    }

    /// Notes a request, in place of the oldest one.
    pub fn note(&mut self, request: u64) {
        let number = self.noted.get();
        self.requests[(number % NOTED_MAX as u64) as usize] = U64::new(request);
        self.noted = U64::new(number.wrapping_add(1));
    }

    /// The requests that are still known.
    pub fn known(&self) -> impl Iterator<Item = u64> + '_ {
        self.requests.iter().map(|request| request.get()).filter(|request| *request != 0)
    }

    /// As a body.
    pub fn as_body(&self) -> &Body {
        self.as_bytes().try_into().expect("asserted above")
    }
}

/// Where everything is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Names the filesystem for ever.
    pub uuid: [u8; 16],
    /// Blocks of the disk.
    pub disk_blocks: u64,
    /// Blocks of each journal.
    pub journal_blocks: u64,
    /// Where the inodes begin.
    pub inode_start: u64,
    /// How many there can be.
    pub inode_count: u64,
    /// Where the data begins; it goes up to the end of the disk.
    pub data_start: u64,
    /// Bytes that may be stored; 0: as many as the disk has.
    pub quota_bytes: u64,
    /// Files that may exist; 0: as many as there are inodes.
    pub quota_files: u64,
}

impl Geometry {
    /// For a new filesystem; `None` if the disk is too small.
    pub fn plan(uuid: [u8; 16], disk_blocks: u64, journal_blocks: u64) -> Option<Geometry> {
        let fixed = JOURNAL_START + HOST_SLOTS * journal_blocks;
        let rest = disk_blocks.checked_sub(fixed)?;
        let inode_count = rest / 16;
        let data_start = fixed + inode_count;
        (inode_count >= 2 * FIRST_FREE_INO).then_some(Geometry {
            uuid,
            disk_blocks,
            journal_blocks,
            inode_start: fixed,
            inode_count,
            data_start,
            quota_bytes: 0,
            quota_files: 0,
        })
    }

    /// What each block of this filesystem carries.
    pub fn fragment(&self) -> [u8; 8] {
        self.uuid[..8].try_into().expect("8 of 16 bytes")
    }

    /// Where the block of a host slot is.
    pub fn host(&self, slot: u64) -> BlockAddress {
        HOST_START + slot
    }

    /// Where the journal of a host slot begins.
    pub fn journal(&self, slot: u64) -> BlockAddress {
        JOURNAL_START + slot * self.journal_blocks
    }

    /// Where an inode is; `None` for a number that can't be.
    pub fn inode(&self, ino: Ino) -> Option<BlockAddress> {
        (ino.0 > 0 && ino.0 < self.inode_count).then(|| self.inode_start + ino.0)
    }

    /// Whether this is a block of data.
    pub fn is_data(&self, at: BlockAddress) -> bool {
        (self.data_start..self.disk_blocks).contains(&at)
    }

    /// As the superblock has it.
    pub fn body(&self, label: &str, made: u64) -> SuperBody {
        let mut name = [0; 64];
        let len = label.len().min(name.len());
        name[..len].copy_from_slice(&label.as_bytes()[..len]);
        SuperBody {
            magic: MAGIC,
            format: U32::new(FORMAT),
            incompatible: U32::ZERO,
            uuid: self.uuid,
            label: name,
            made: U64::new(made),
            disk_blocks: U64::new(self.disk_blocks),
            journal_blocks: U64::new(self.journal_blocks),
            inode_start: U64::new(self.inode_start),
            inode_count: U64::new(self.inode_count),
            data_start: U64::new(self.data_start),
            quota_bytes: U64::new(self.quota_bytes),
            quota_files: U64::new(self.quota_files),
            reserved: [0; BODY_BYTES - 160],
        }
    }

    fn from_body(body: &SuperBody) -> std::result::Result<Geometry, String> {
        if body.magic != MAGIC {
            return Err("it is no superblock of fs-layer".into());
        }
        if body.format.get() != FORMAT || body.incompatible.get() != 0 {
            return Err(format!(
                "its format {} with features {:#x} is newer than this program: use a newer fsd",
                body.format, body.incompatible
            ));
        }
        let mut geometry = Geometry::plan(body.uuid, body.disk_blocks.get(), body.journal_blocks.get())
            .ok_or_else(|| "its regions do not fit onto its disk".to_string())?;
        let same = geometry.inode_start == body.inode_start.get()
            && geometry.inode_count == body.inode_count.get()
            && geometry.data_start == body.data_start.get();
        geometry.quota_bytes = body.quota_bytes.get();
        geometry.quota_files = body.quota_files.get();
        if same { Ok(geometry) } else { Err("its regions are not where they must be".into()) }
    }
}

/// Reads the superblock, or its copy if that is damaged.
///
/// # Errors
/// [`VfsError::Io`] if the disk fails or there is no filesystem that this program knows.
pub fn load_superblock(disk: &dyn Disk) -> Result<Geometry> {
    let mut why = String::new();
    for at in [0, 1] {
        let mut block = [0; BLOCK_BYTES];
        if let Err(e) = disk.read(at, &mut block) {
            why = format!("block {at}: {e}");
            continue;
        }
        let found = match open(None, at, BlockKind::Super, &block) {
            Opened::Empty => Err("there is no filesystem on this disk: make one with `fsd mkfs`".into()),
            Opened::Damaged(why) => Err(why),
            Opened::Sound { body, .. } => {
                Geometry::from_body(SuperBody::ref_from_bytes(body).expect("a superblock has the size of a body"))
            }
        };
        match found {
            Ok(geometry) if geometry.disk_blocks > disk.blocks() => {
                why = format!("the disk has {} blocks, the filesystem needs {}", disk.blocks(), geometry.disk_blocks);
            }
            Ok(geometry) => return Ok(geometry),
            Err(e) => why = e,
        }
    }
    Err(VfsError::Io(format!("superblock: {why}")))
}
