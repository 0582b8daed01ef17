//! The words that [`Vfs`](super::Vfs) is spoken in.

use bytes::Bytes;

/// The longest name, in bytes.
pub const NAME_MAX: usize = 255;
/// The longest target of a symbolic link, in bytes.
pub const SYMLINK_MAX: usize = 4095;
/// The greatest size of a file, in bytes: 16 TiB.
pub const FILE_SIZE_MAX: u64 = 16 << 40;

/// Whoever is asked to copy, and may choose, shares from so many bytes on ([`Vfs::clone_range`](super::Vfs::clone_range)): of less, moving the
/// data costs less than asking the disk.
pub const SHARE_BYTES_MIN: u64 = 128 << 10;
/// The greatest number of names a file can have.
pub const LINK_MAX: u32 = 65_000;
/// The largest value of an extended attribute, in bytes.
pub const XATTR_MAX: usize = 64 << 10;

/// The number of a file. Never used again for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Ino(pub u64);

/// The root directory.
pub const ROOT: Ino = Ino(1);

/// Which part of what an export shows a file belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// The tree itself.
    Live,
    /// The directory of the snapshots: entries come and go without calls of this tree, so nobody may keep what they are.
    SnapshotList,
    /// A snapshot, which never changes: what would change it is [`VfsError::ReadOnly`](super::VfsError::ReadOnly).
    Snapshot,
}

/// Whom a call is checked against.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// The user; 0 may do everything.
    pub uid: u32,
    /// The group of what is made.
    pub gid: u32,
    /// Further groups.
    pub groups: Vec<u32>,
}

impl Credentials {
    /// The filesystem itself: may do everything.
    pub fn system() -> Credentials {
        Credentials { uid: 0, gid: 0, groups: Vec::new() }
    }

    /// Whether the caller is in the group.
    pub fn in_group(&self, gid: u32) -> bool {
        self.gid == gid || self.groups.contains(&gid)
    }
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    /// A regular file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
    /// A character device.
    CharDevice,
    /// A block device.
    BlockDevice,
}

/// Nanoseconds since 1970, negative before.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time(pub i128);

impl Time {
    /// Now, by the system's clock.
    pub fn now() -> Time {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Time(since.map_or_else(|e| -(e.duration().as_nanos() as i128), |d| d.as_nanos() as i128))
    }

    /// Whole seconds, rounded down, and the nanoseconds above them.
    pub fn parts(self) -> (i64, u32) {
        (self.0.div_euclid(1_000_000_000) as i64, self.0.rem_euclid(1_000_000_000) as u32)
    }

    /// From seconds and nanoseconds above them.
    pub fn from_parts(seconds: i64, nanoseconds: u32) -> Time {
        Time(i128::from(seconds) * 1_000_000_000 + i128::from(nanoseconds))
    }
}

/// What is known of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attributes {
    /// Its number.
    pub ino: Ino,
    /// What it is.
    pub kind: FileKind,
    /// Permission, set-id and sticky bits: 0o7777.
    pub mode: u32,
    /// Number of names; for a directory 2 and one for each directory in it.
    pub links: u32,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Bytes of disk space taken.
    pub stored_bytes: u64,
    /// Major and minor number of a device.
    pub device: (u32, u32),
    /// Last read, as relatime has it.
    pub accessed: Time,
    /// Last change of the contents.
    pub modified: Time,
    /// Last change of anything.
    pub changed: Time,
    /// When it was made.
    pub made: Time,
    /// Grows with each change of contents or attributes; a counter, not a time.
    pub change: u64,
}

/// What is to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Make {
    /// An empty regular file; `exclusive`: an existing one is [`VfsError::Exists`](super::VfsError::Exists).
    File {
        /// Whether it must not exist.
        exclusive: bool,
    },
    /// A directory.
    Directory,
    /// A symbolic link to these bytes.
    Symlink(Vec<u8>),
    /// A pipe, socket or device.
    Special {
        /// Which of them.
        kind: FileKind,
        /// Major and minor number of a device.
        device: (u32, u32),
    },
}

/// What a new file starts with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NewAttributes {
    /// Permission, set-id and sticky bits, the umask taken off already.
    pub mode: u32,
    /// Not `who`'s: only who may chown to it.
    pub uid: Option<u32>,
    /// Not `who`'s.
    pub gid: Option<u32>,
    /// The size, if not 0.
    pub size: Option<u64>,
    /// The time of the last access, if not now.
    pub accessed: Option<Time>,
    /// The time of the last change of the contents, if not now.
    pub modified: Option<Time>,
}

/// A changed directory: its change counter before and after.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirChange {
    /// Before.
    pub before: u64,
    /// After.
    pub after: u64,
}

/// What [`Vfs::make`](super::Vfs::make) did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    /// The file.
    pub attributes: Attributes,
    /// Whether it was made now.
    pub made: bool,
    /// The directory.
    pub dir: DirChange,
}

/// What [`Vfs::link`](super::Vfs::link) did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Linked {
    /// The file.
    pub attributes: Attributes,
    /// The directory.
    pub dir: DirChange,
}

/// What happens to an existing target of a rename.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rename {
    /// It is replaced.
    Replace,
    /// It is an error.
    NoReplace,
    /// It gets the old name.
    Exchange,
}

/// An entry of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    /// The name.
    pub name: Vec<u8>,
    /// The file.
    pub ino: Ino,
    /// What it is.
    pub kind: FileKind,
    /// Where reading goes on after this entry; above 2, below 2^63.
    pub cookie: u64,
}

/// Some entries of a directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirPage {
    /// In the order of their cookies.
    pub entries: Vec<DirEntry>,
    /// Whether there are no more.
    pub end: bool,
}

/// A time to set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetTime {
    /// The server's time: who may write may do that.
    Now,
    /// A given time: only the owner.
    At(Time),
}

/// What is to be changed; `None` stays.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SetAttributes {
    /// Permission, set-id and sticky bits.
    pub mode: Option<u32>,
    /// The owner.
    pub uid: Option<u32>,
    /// The group.
    pub gid: Option<u32>,
    /// The size: what is behind it goes, what is new is a hole.
    pub size: Option<u64>,
    /// Last read.
    pub accessed: Option<SetTime>,
    /// Last change of the contents.
    pub modified: Option<SetTime>,
}

/// A set of permissions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Access {
    /// To read the file, or list the directory.
    pub read: bool,
    /// To write the file, or change the directory's entries.
    pub write: bool,
    /// To run the file, or look up names in the directory.
    pub execute: bool,
}

/// What a read brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadData {
    /// The bytes.
    pub data: Bytes,
    /// Whether the end of the file was reached.
    pub end: bool,
}

/// Where a write goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriteAt {
    /// To this offset, in bytes.
    Offset(u64),
    /// To the end as it is then.
    End,
}

/// What a write did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Where it began, in bytes.
    pub offset: u64,
    /// The file after it.
    pub attributes: Attributes,
}

/// Modes of fallocate(2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fallocate {
    /// Space is kept; the size grows if needed.
    Allocate,
    /// Space is kept, also behind the end; the size stays.
    KeepSize,
    /// The range becomes a hole; the size stays.
    PunchHole,
    /// The range reads as zeros and space is kept; the size grows if needed.
    ZeroRange,
    /// As `ZeroRange`; the size stays.
    ZeroRangeKeepSize,
}

/// What to look for in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Seek {
    /// Data.
    Data,
    /// A hole; there is one at the end.
    Hole,
}

/// What [`Vfs::setxattr`](super::Vfs::setxattr) expects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SetXattr {
    /// Either.
    Any,
    /// It is not there.
    Create,
    /// It is there.
    Replace,
}

/// Which locks can be in each other's way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum LockSpace {
    /// Ranges: fcntl and NFS.
    Range,
    /// Whole files: flock.
    Whole,
}

/// Who has a lock: the export's number for a client (or mount) and what it calls the owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LockOwner {
    /// The client.
    pub client: u64,
    /// Its owner.
    pub owner: u64,
}

/// A lock, taken or asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileLock {
    /// Who.
    pub owner: LockOwner,
    /// The process at the client, for F_GETLK; 0 if unknown.
    pub pid: u32,
    /// Which locks are in its way.
    pub space: LockSpace,
    /// Whether no other lock may overlap, or only no exclusive one.
    pub exclusive: bool,
    /// The first byte.
    pub start: u64,
    /// The last byte, `u64::MAX` for all to come.
    pub last: u64,
}

/// What [`Vfs::statfs`](super::Vfs::statfs) says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FsStat {
    /// Names this filesystem for ever.
    pub id: [u8; 16],
    /// Bytes that fit, by quota or by the disk.
    pub bytes_total: u64,
    /// Bytes still free.
    pub bytes_free: u64,
    /// Files that fit.
    pub files_total: u64,
    /// Files that can still be made.
    pub files_free: u64,
    /// Whether nothing can be changed.
    pub read_only: bool,
}
