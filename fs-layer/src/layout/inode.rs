//! An inode: one block with everything about a file that is not in blocks of its own.

use zerocopy::little_endian::{I64, U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::blocks::{BODY_BYTES, Body};
use crate::vfs::{Attributes, FileKind, Ino, Time};

/// Bytes of an inode for a small file, a symlink's target, a small directory or the root of a tree.
pub const CONTENT_BYTES: usize = 3584;
/// Bytes of an inode for extended attributes.
pub const XATTR_BYTES: usize = 256;

const HEAD_BYTES: usize = BODY_BYTES - CONTENT_BYTES - XATTR_BYTES;

/// A time on the disk.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct TimeField {
    seconds: I64,
    nanoseconds: U32,
}

impl From<Time> for TimeField {
    fn from(time: Time) -> TimeField {
        let (seconds, nanoseconds) = time.parts();
        TimeField { seconds: I64::new(seconds), nanoseconds: U32::new(nanoseconds) }
    }
}

impl From<TimeField> for Time {
    fn from(field: TimeField) -> Time {
        Time::from_parts(field.seconds.get(), field.nanoseconds.get())
    }
}

/// What [`InodeBody::content`] holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Content {
    /// Nothing: a device, a pipe or a socket.
    None,
    /// `content_len` bytes of the file or of the link's target; what the size has beyond them is a hole.
    Inline,
    /// The root of an extent map.
    Extents,
    /// The root of a directory.
    Directory,
}

/// Bits of [`InodeBody::flags`].
pub mod flags {
    /// The file's last block may hold, behind the end of the file, what a truncation took away: before the file grows, zeros are written
    /// there and flushed.
    pub const TAIL: u16 = 1;
    /// The file is being cut to its size: extents behind that may be left. Its number is in an orphan directory.
    pub const CUTTING: u16 = 2;
    /// Its number is in an orphan directory: it has no names, or it is being cut.
    pub const ORPHAN: u16 = 4;
}

/// The body of an inode.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub struct InodeBody {
    /// Its own number.
    pub ino: U64,
    kind: u8,
    content_kind: u8,
    /// See [`flags`].
    pub flags: U16,
    /// Permission, set-id and sticky bits.
    pub mode: U32,
    /// Number of names.
    pub links: U32,
    /// The owner.
    pub uid: U32,
    /// The group.
    pub gid: U32,
    /// Of a device.
    pub major: U32,
    /// Of a device.
    pub minor: U32,
    /// Bytes of [`InodeBody::content`] in use, where it is [`Content::Inline`].
    pub content_len: U16,
    /// Bytes of [`InodeBody::xattrs`] in use.
    pub xattr_len: U16,
    /// Bytes.
    pub size: U64,
    /// Blocks taken, without the inode's.
    pub stored_blocks: U64,
    /// Of a directory: the one it is in.
    pub parent: U64,
    /// Grows with each change.
    pub change: U64,
    /// The first block of extended attributes, if they did not fit; else 0.
    pub xattr_block: U64,
    /// Of a symlink whose target is longer than the content: the block with the rest; else 0.
    pub more_block: U64,
    /// Last read.
    pub accessed: TimeField,
    /// Last change of the contents.
    pub modified: TimeField,
    /// Last change of anything.
    pub changed: TimeField,
    /// When it was made.
    pub made: TimeField,
    reserved: [u8; HEAD_BYTES - 136],
    /// See [`Content`].
    pub content: [u8; CONTENT_BYTES],
    /// Extended attributes, as `inode::xattrs` has them.
    pub xattrs: [u8; XATTR_BYTES],
}

const _: () = assert!(size_of::<InodeBody>() == BODY_BYTES);

impl InodeBody {
    /// The inode in a body.
    pub fn of(body: &Body) -> &InodeBody {
        InodeBody::ref_from_bytes(body).expect("an inode has the size of a body")
    }

    /// The inode in a body, to be changed.
    pub fn of_mut(body: &mut Body) -> &mut InodeBody {
        InodeBody::mut_from_bytes(body).expect("an inode has the size of a body")
    }

    /// Fills in what never changes.
    pub fn begin(&mut self, ino: Ino, kind: FileKind, now: Time) {
        self.ino = U64::new(ino.0);
        self.kind = match kind {
            FileKind::File => 1,
            FileKind::Directory => 2,
            FileKind::Symlink => 3,
            FileKind::Fifo => 4,
            FileKind::Socket => 5,
            FileKind::CharDevice => 6,
            FileKind::BlockDevice => 7,
        };
        self.set_content_kind(match kind {
            FileKind::File | FileKind::Symlink => Content::Inline,
            FileKind::Directory => Content::Directory,
            _ => Content::None,
        });
        self.change = U64::new(1);
        for field in [&mut self.accessed, &mut self.modified, &mut self.changed, &mut self.made] {
            *field = now.into();
        }
    }

    /// What it is; `None` if that is unknown.
    pub fn kind(&self) -> Option<FileKind> {
        Some(match self.kind {
            1 => FileKind::File,
            2 => FileKind::Directory,
            3 => FileKind::Symlink,
            4 => FileKind::Fifo,
            5 => FileKind::Socket,
            6 => FileKind::CharDevice,
            7 => FileKind::BlockDevice,
            _ => return None,
        })
    }

    /// What the content holds; `None` if that is unknown.
    pub fn content_kind(&self) -> Option<Content> {
        Some(match self.content_kind {
            0 => Content::None,
            1 => Content::Inline,
            2 => Content::Extents,
            3 => Content::Directory,
            _ => return None,
        })
    }

    /// Says what the content holds.
    pub fn set_content_kind(&mut self, content: Content) {
        self.content_kind = match content {
            Content::None => 0,
            Content::Inline => 1,
            Content::Extents => 2,
            Content::Directory => 3,
        };
    }

    /// Whether a flag is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags.get() & flag != 0
    }

    /// Sets or clears a flag.
    pub fn set_flag(&mut self, flag: u16, on: bool) {
        let without = self.flags.get() & !flag;
        self.flags = U16::new(if on { without | flag } else { without });
    }

    /// The bytes of an inline file or link.
    pub fn inline(&self) -> &[u8] {
        &self.content[..usize::from(self.content_len.get()).min(CONTENT_BYTES)]
    }

    /// Notes a change of anything: the counter grows, and it was changed now.
    pub fn touch(&mut self, now: Time) {
        self.change = U64::new(self.change.get() + 1);
        self.changed = now.into();
    }

    /// Notes a change of the contents.
    pub fn touch_contents(&mut self, now: Time) {
        self.touch(now);
        self.modified = now.into();
    }

    /// Why this can't be the inode `ino`, if so.
    pub fn problem(&self, ino: Ino) -> Option<String> {
        let Some(kind) = self.kind() else { return Some(format!("unknown kind {}", self.kind)) };
        if self.ino.get() != ino.0 {
            return Some(format!("it says it is inode {}", self.ino));
        }
        let fits = matches!(
            (kind, self.content_kind()),
            (FileKind::File, Some(Content::Inline | Content::Extents))
                | (FileKind::Symlink, Some(Content::Inline | Content::Extents))
                | (FileKind::Directory, Some(Content::Directory))
                | (
                    FileKind::Fifo | FileKind::Socket | FileKind::CharDevice | FileKind::BlockDevice,
                    Some(Content::None)
                )
        );
        if !fits {
            return Some(format!("its content {} does not fit its kind {kind:?}", self.content_kind));
        }
        if usize::from(self.content_len.get()) > CONTENT_BYTES || usize::from(self.xattr_len.get()) > XATTR_BYTES {
            return Some("lengths beyond the block".into());
        }
        None
    }

    /// Blocks that the contents take: the inode's own if they are in it, or may be once they are written back. None at all would make
    /// programs take a file with contents for one hole.
    fn content_blocks(&self) -> u64 {
        let in_inode = match self.content_kind() {
            Some(Content::Inline) => self.size.get() > 0,
            Some(Content::Directory) => self.stored_blocks.get() == 0,
            _ => false,
        };
        self.stored_blocks.get() + u64::from(in_inode)
    }

    /// As the exports see it. The kind was checked when the block was read.
    pub fn attributes(&self) -> Attributes {
        Attributes {
            ino: Ino(self.ino.get()),
            kind: self.kind().unwrap_or(FileKind::File),
            mode: self.mode.get(),
            links: self.links.get(),
            uid: self.uid.get(),
            gid: self.gid.get(),
            size: self.size.get(),
            stored_bytes: self.content_blocks() * crate::disk::BLOCK_BYTES as u64,
            device: (self.major.get(), self.minor.get()),
            accessed: self.accessed.into(),
            modified: self.modified.into(),
            changed: self.changed.into(),
            made: self.made.into(),
            change: self.change.get(),
        }
    }
}
