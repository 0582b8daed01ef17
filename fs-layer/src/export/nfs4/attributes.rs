//! File attributes (RFC 8881 section 5): which there are, how they stand on the wire, and what a client may set.
//!
//! Owners are numbers in decimal both ways (section 5.9): the client and the server agree on numbers as with AUTH_SYS, and
//! nobody needs a name service. The change attribute is the file's own counter, never a time.

use super::bitmap::Bitmap;
use super::handle::Handles;
use super::status::{Nfs4Error, Status};
use super::xdr::{Reader, Writer};
use crate::vfs::{self, Attributes, FileKind, FsStat, SetAttributes, SetTime, Time};

/// Numbers of attributes (RFC 8881 sections 5.8 and 5.10 to 5.13, RFC 7862 section 12.2, RFC 8276 section 8.2).
pub mod number {
    #![allow(missing_docs)]
    pub const SUPPORTED_ATTRS: u32 = 0;
    pub const TYPE: u32 = 1;
    pub const FH_EXPIRE_TYPE: u32 = 2;
    pub const CHANGE: u32 = 3;
    pub const SIZE: u32 = 4;
    pub const LINK_SUPPORT: u32 = 5;
    pub const SYMLINK_SUPPORT: u32 = 6;
    pub const NAMED_ATTR: u32 = 7;
    pub const FSID: u32 = 8;
    pub const UNIQUE_HANDLES: u32 = 9;
    pub const LEASE_TIME: u32 = 10;
    pub const RDATTR_ERROR: u32 = 11;
    pub const ACLSUPPORT: u32 = 13;
    pub const CANSETTIME: u32 = 15;
    pub const CASE_INSENSITIVE: u32 = 16;
    pub const CASE_PRESERVING: u32 = 17;
    pub const CHOWN_RESTRICTED: u32 = 18;
    pub const FILEHANDLE: u32 = 19;
    pub const FILEID: u32 = 20;
    pub const FILES_AVAIL: u32 = 21;
    pub const FILES_FREE: u32 = 22;
    pub const FILES_TOTAL: u32 = 23;
    pub const HOMOGENEOUS: u32 = 26;
    pub const MAXFILESIZE: u32 = 27;
    pub const MAXLINK: u32 = 28;
    pub const MAXNAME: u32 = 29;
    pub const MAXREAD: u32 = 30;
    pub const MAXWRITE: u32 = 31;
    pub const MODE: u32 = 33;
    pub const NO_TRUNC: u32 = 34;
    pub const NUMLINKS: u32 = 35;
    pub const OWNER: u32 = 36;
    pub const OWNER_GROUP: u32 = 37;
    pub const RAWDEV: u32 = 41;
    pub const SPACE_AVAIL: u32 = 42;
    pub const SPACE_FREE: u32 = 43;
    pub const SPACE_TOTAL: u32 = 44;
    pub const SPACE_USED: u32 = 45;
    pub const TIME_ACCESS: u32 = 47;
    pub const TIME_ACCESS_SET: u32 = 48;
    pub const TIME_CREATE: u32 = 50;
    pub const TIME_DELTA: u32 = 51;
    pub const TIME_METADATA: u32 = 52;
    pub const TIME_MODIFY: u32 = 53;
    pub const TIME_MODIFY_SET: u32 = 54;
    pub const MOUNTED_ON_FILEID: u32 = 55;
    pub const FS_LAYOUT_TYPES: u32 = 62;
    pub const SUPPATTR_EXCLCREAT: u32 = 75;
    pub const CLONE_BLKSIZE: u32 = 77;
    pub const CHANGE_ATTR_TYPE: u32 = 79;
    pub const XATTR_SUPPORT: u32 = 82;
}
use number::*;

/// What is supported in minor version 1.
const SUPPORTED_1: Bitmap = Bitmap::of(&[
    SUPPORTED_ATTRS,
    TYPE,
    FH_EXPIRE_TYPE,
    CHANGE,
    SIZE,
    LINK_SUPPORT,
    SYMLINK_SUPPORT,
    NAMED_ATTR,
    FSID,
    UNIQUE_HANDLES,
    LEASE_TIME,
    RDATTR_ERROR,
    ACLSUPPORT,
    CANSETTIME,
    CASE_INSENSITIVE,
    CASE_PRESERVING,
    CHOWN_RESTRICTED,
    FILEHANDLE,
    FILEID,
    FILES_AVAIL,
    FILES_FREE,
    FILES_TOTAL,
    HOMOGENEOUS,
    MAXFILESIZE,
    MAXLINK,
    MAXNAME,
    MAXREAD,
    MAXWRITE,
    MODE,
    NO_TRUNC,
    NUMLINKS,
    OWNER,
    OWNER_GROUP,
    RAWDEV,
    SPACE_AVAIL,
    SPACE_FREE,
    SPACE_TOTAL,
    SPACE_USED,
    TIME_ACCESS,
    TIME_ACCESS_SET,
    TIME_CREATE,
    TIME_DELTA,
    TIME_METADATA,
    TIME_MODIFY,
    TIME_MODIFY_SET,
    MOUNTED_ON_FILEID,
    FS_LAYOUT_TYPES,
    SUPPATTR_EXCLCREAT,
]);
/// What minor version 2 adds.
const SUPPORTED_2: Bitmap = Bitmap::of(&[CLONE_BLKSIZE, CHANGE_ATTR_TYPE, XATTR_SUPPORT]);
/// What can only be set.
const SET_ONLY: Bitmap = Bitmap::of(&[TIME_ACCESS_SET, TIME_MODIFY_SET]);
/// What can be set.
const SETTABLE: Bitmap = Bitmap::of(&[SIZE, MODE, OWNER, OWNER_GROUP, TIME_ACCESS_SET, TIME_MODIFY_SET]);
/// What can be set with an exclusive create: the times hold its verifier.
const EXCLUSIVE: Bitmap = Bitmap::of(&[SIZE, MODE, OWNER, OWNER_GROUP]);
/// What says something of the whole filesystem, and needs [`FsStat`].
const OF_FILESYSTEM: Bitmap = Bitmap::of(&[FILES_AVAIL, FILES_FREE, FILES_TOTAL, SPACE_AVAIL, SPACE_FREE, SPACE_TOTAL]);
/// Most bytes of an owner's name.
const OWNER_MAX: usize = 1024;
/// Most bytes of a set of attributes that a client sends.
const ATTRIBUTES_MAX: usize = 64 << 10;

/// What is supported in a minor version.
pub fn supported(minor: u32) -> Bitmap {
    if minor >= 2 { Bitmap(std::array::from_fn(|at| SUPPORTED_1.0[at] | SUPPORTED_2.0[at])) } else { SUPPORTED_1 }
}

/// What the answers need beside the file's own attributes.
pub struct Context<'a> {
    /// Of the compound.
    pub minor: u32,
    /// Makes file handles.
    pub handles: &'a Handles,
    /// Seconds.
    pub lease_s: u32,
    /// Most bytes of a READ or WRITE.
    pub transfer_max: u32,
    /// Bytes of what can be cloned.
    pub clone_block: u32,
    /// Fetched when something of [`needs_statfs`] is asked for.
    pub statfs: Option<FsStat>,
}

/// Whether the answer needs to know how full the filesystem is.
pub fn needs_statfs(asked: Bitmap) -> bool {
    !asked.and(OF_FILESYSTEM).is_empty()
}

/// Refuses to read what can only be set (RFC 8881 section 5.5).
pub fn check_readable(asked: Bitmap) -> Status<()> {
    if asked.and(SET_ONLY).is_empty() { Ok(()) } else { Err(Nfs4Error::Inval) }
}

/// Writes a fattr4: those of the asked attributes that are supported, ascending.
pub fn write(w: &mut Writer, asked: Bitmap, file: &Attributes, context: &Context<'_>) {
    let answered = asked.and(supported(context.minor)).without(SET_ONLY);
    answered.write(w);
    let at = w.len();
    w.u32(0);
    for number in answered.numbers() {
        write_one(w, number, file, context);
    }
    w.patch(at, (w.len() - at - 4) as u32);
}

/// Writes a fattr4 that says only that the rest could not be had (RFC 8881 section 5.8.1.12).
pub fn write_error(w: &mut Writer, error: Nfs4Error) {
    Bitmap::of(&[RDATTR_ERROR]).write(w);
    w.u32(4);
    w.u32(error.code());
}

fn write_one(w: &mut Writer, number: u32, file: &Attributes, context: &Context<'_>) {
    let statfs = context.statfs.as_ref();
    match number {
        SUPPORTED_ATTRS => supported(context.minor).write(w),
        TYPE => w.u32(kind_number(file.kind)),
        // FH4_PERSISTENT, no named attributes, no ACLs, no layouts: 0 each.
        FH_EXPIRE_TYPE | RDATTR_ERROR | ACLSUPPORT | NAMED_ATTR | CASE_INSENSITIVE | FS_LAYOUT_TYPES => w.u32(0),
        CHANGE => w.u64(file.change),
        SIZE => w.u64(file.size),
        LINK_SUPPORT | SYMLINK_SUPPORT | UNIQUE_HANDLES | CANSETTIME | CASE_PRESERVING | CHOWN_RESTRICTED
        | HOMOGENEOUS | NO_TRUNC | XATTR_SUPPORT => w.bool(true),
        FSID => {
            w.u64(context.handles.fs());
            w.u64(0);
        }
        LEASE_TIME => w.u32(context.lease_s),
        FILEHANDLE => context.handles.write(w, file.ino),
        FILEID | MOUNTED_ON_FILEID => w.u64(file.ino.0),
        FILES_AVAIL | FILES_FREE => w.u64(statfs.map_or(0, |s| s.files_free)),
        FILES_TOTAL => w.u64(statfs.map_or(0, |s| s.files_total)),
        SPACE_AVAIL | SPACE_FREE => w.u64(statfs.map_or(0, |s| s.bytes_free)),
        SPACE_TOTAL => w.u64(statfs.map_or(0, |s| s.bytes_total)),
        MAXFILESIZE => w.u64(vfs::FILE_SIZE_MAX),
        MAXLINK => w.u32(vfs::LINK_MAX),
        MAXNAME => w.u32(vfs::NAME_MAX as u32),
        MAXREAD | MAXWRITE => w.u64(u64::from(context.transfer_max)),
        MODE => w.u32(file.mode & 0o7777),
        NUMLINKS => w.u32(file.links),
        OWNER => w.opaque(file.uid.to_string().as_bytes()),
        OWNER_GROUP => w.opaque(file.gid.to_string().as_bytes()),
        RAWDEV => {
            w.u32(file.device.0);
            w.u32(file.device.1);
        }
        SPACE_USED => w.u64(file.stored_bytes),
        TIME_ACCESS => write_time(w, file.accessed),
        TIME_CREATE => write_time(w, file.made),
        TIME_DELTA => write_time(w, Time(1)),
        TIME_METADATA => write_time(w, file.changed),
        TIME_MODIFY => write_time(w, file.modified),
        SUPPATTR_EXCLCREAT => EXCLUSIVE.write(w),
        CLONE_BLKSIZE => w.u32(context.clone_block),
        // NFS4_CHANGE_TYPE_IS_MONOTONIC_INCR.
        CHANGE_ATTR_TYPE => w.u32(0),
        _ => unreachable!("attribute {number} is not supported"),
    }
}

/// Writes an nfstime4.
fn write_time(w: &mut Writer, time: Time) {
    let (seconds, nanoseconds) = time.parts();
    w.i64(seconds);
    w.u32(nanoseconds);
}

/// The nfs_ftype4 of a file.
fn kind_number(kind: FileKind) -> u32 {
    match kind {
        FileKind::File => 1,
        FileKind::Directory => 2,
        FileKind::BlockDevice => 3,
        FileKind::CharDevice => 4,
        FileKind::Symlink => 5,
        FileKind::Socket => 6,
        FileKind::Fifo => 7,
    }
}

/// What a client wants to set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Settings {
    /// The values.
    pub values: SetAttributes,
    /// Their numbers.
    pub named: Bitmap,
}

impl Settings {
    /// Reads a fattr4 to set.
    ///
    /// # Errors
    /// `AttrNotSupp` for what is not known, `Inval` for what cannot be set, `BadOwner` for an owner that is no number.
    pub fn read(r: &mut Reader<'_>, minor: u32) -> Status<Settings> {
        let named = Bitmap::read(r)?;
        let mut r = Reader::new(r.opaque(ATTRIBUTES_MAX)?);
        if !named.without(supported(minor)).is_empty() {
            return Err(Nfs4Error::AttrNotSupp);
        }
        if !named.without(SETTABLE).is_empty() {
            return Err(Nfs4Error::Inval);
        }
        let mut values = SetAttributes::default();
        for number in named.numbers() {
            match number {
                SIZE => values.size = Some(r.u64()?),
                MODE => {
                    let mode = r.u32()?;
                    if mode & !0o7777 != 0 {
                        return Err(Nfs4Error::Inval);
                    }
                    values.mode = Some(mode);
                }
                OWNER => values.uid = Some(owner(r.opaque(OWNER_MAX)?)?),
                OWNER_GROUP => values.gid = Some(owner(r.opaque(OWNER_MAX)?)?),
                TIME_ACCESS_SET => values.accessed = Some(read_set_time(&mut r)?),
                TIME_MODIFY_SET => values.modified = Some(read_set_time(&mut r)?),
                _ => unreachable!("attribute {number} is not settable"),
            }
        }
        if r.rest().is_empty() { Ok(Settings { values, named }) } else { Err(Nfs4Error::BadXdr) }
    }

    /// Refuses what an exclusive create cannot set (RFC 8881 section 5.8.1.14).
    pub fn check_exclusive(&self) -> Status<()> {
        if self.named.without(EXCLUSIVE).is_empty() { Ok(()) } else { Err(Nfs4Error::Inval) }
    }
}

/// Reads a settime4.
fn read_set_time(r: &mut Reader<'_>) -> Status<SetTime> {
    match r.u32()? {
        0 => Ok(SetTime::Now),
        1 => {
            let (seconds, nanoseconds) = (r.i64()?, r.u32()?);
            if nanoseconds >= 1_000_000_000 {
                return Err(Nfs4Error::Inval);
            }
            Ok(SetTime::At(Time::from_parts(seconds, nanoseconds)))
        }
        _ => Err(Nfs4Error::BadXdr),
    }
}

/// The number of an owner's name: decimal, without signs or leading zeros.
fn owner(name: &[u8]) -> Status<u32> {
    let text = std::str::from_utf8(name).map_err(|_| Nfs4Error::BadOwner)?;
    let plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
    text.parse().ok().filter(|id| plain && *id != u32::MAX).ok_or(Nfs4Error::BadOwner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn owners_are_numbers() {
        assert_eq!(owner(b"0"), Ok(0));
        assert_eq!(owner(b"1000"), Ok(1000));
        for bad in [&b"root"[..], b"", b"01", b"+1", b"-1", b"4294967295", b"4294967296", b"root@example.com", b"\xff"]
        {
            assert_eq!(owner(bad), Err(Nfs4Error::BadOwner), "{bad:?}");
        }
    }

    #[test]
    fn settings_are_checked() {
        let read = |named: Bitmap, body: &[u8]| {
            let mut w = Writer::default();
            named.write(&mut w);
            w.opaque(body);
            Settings::read(&mut Reader::new(w.as_bytes()), 2)
        };
        assert_eq!(read(Bitmap::of(&[SIZE]), &7u64.to_be_bytes()).unwrap().values.size, Some(7));
        assert_eq!(read(Bitmap::of(&[SIZE]), &[0; 7]), Err(Nfs4Error::BadXdr));
        assert_eq!(read(Bitmap::of(&[SIZE]), &[0; 12]), Err(Nfs4Error::BadXdr));
        assert_eq!(read(Bitmap::of(&[CHANGE]), &[0; 8]), Err(Nfs4Error::Inval));
        assert_eq!(read(Bitmap::of(&[12]), &[0; 8]), Err(Nfs4Error::AttrNotSupp));
        assert_eq!(read(Bitmap::of(&[MODE]), &0o10000u32.to_be_bytes()), Err(Nfs4Error::Inval));
    }
}
