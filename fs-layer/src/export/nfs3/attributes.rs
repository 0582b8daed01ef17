//! How files are described (RFC 1813 section 2.5 and 2.6).

use crate::export::nfs4::status::Status;
use crate::export::nfs4::xdr::{Reader, Writer};
use crate::vfs::{Attributes, FileKind, NewAttributes, SetAttributes, SetTime, Time};

/// Writes a post_op_attr.
pub fn write_optional(w: &mut Writer, file: Option<&Attributes>, fs: u64) {
    w.bool(file.is_some());
    if let Some(file) = file {
        write(w, file, fs);
    }
}

/// Writes a fattr3.
pub fn write(w: &mut Writer, file: &Attributes, fs: u64) {
    w.u32(match file.kind {
        FileKind::File => 1,
        FileKind::Directory => 2,
        FileKind::BlockDevice => 3,
        FileKind::CharDevice => 4,
        FileKind::Symlink => 5,
        FileKind::Socket => 6,
        FileKind::Fifo => 7,
    });
    for word in [file.mode & 0o7777, file.links, file.uid, file.gid] {
        w.u32(word);
    }
    w.u64(file.size);
    w.u64(file.stored_bytes);
    w.u32(file.device.0);
    w.u32(file.device.1);
    w.u64(fs);
    w.u64(file.ino.0);
    for time in [file.accessed, file.modified, file.changed] {
        write_time(w, time);
    }
}

/// Writes an nfstime3: seconds from 1970 to 2106; what is outside becomes the nearest.
pub fn write_time(w: &mut Writer, time: Time) {
    let (seconds, nanoseconds) = time.parts();
    match u32::try_from(seconds) {
        Ok(seconds) => {
            w.u32(seconds);
            w.u32(nanoseconds);
        }
        Err(_) => {
            w.u32(if seconds < 0 { 0 } else { u32::MAX });
            w.u32(0);
        }
    }
}

/// Reads an nfstime3.
pub fn read_time(r: &mut Reader<'_>) -> Status<Time> {
    let (seconds, nanoseconds) = (r.u32()?, r.u32()?);
    Ok(Time::from_parts(i64::from(seconds), nanoseconds.min(999_999_999)))
}

fn read_set_time(r: &mut Reader<'_>) -> Status<Option<SetTime>> {
    match r.u32()? {
        0 => Ok(None),
        1 => Ok(Some(SetTime::Now)),
        2 => Ok(Some(SetTime::At(read_time(r)?))),
        _ => Err(crate::export::nfs4::status::Nfs4Error::BadXdr),
    }
}

/// Reads a sattr3.
pub fn read(r: &mut Reader<'_>) -> Status<SetAttributes> {
    let word = |r: &mut Reader<'_>| if r.bool()? { r.u32().map(Some) } else { Ok(None) };
    let (mode, uid, gid) = (word(r)?, word(r)?, word(r)?);
    let size = if r.bool()? { Some(r.u64()?) } else { None };
    let (accessed, modified) = (read_set_time(r)?, read_set_time(r)?);
    Ok(SetAttributes { mode: mode.map(|mode| mode & 0o7777), uid, gid, size, accessed, modified })
}

/// What a new file starts with.
pub fn new(set: &SetAttributes, default_mode: u32) -> NewAttributes {
    let at = |time| match time {
        Some(SetTime::At(time)) => Some(time),
        _ => None,
    };
    NewAttributes {
        mode: set.mode.unwrap_or(default_mode),
        uid: set.uid,
        gid: set.gid,
        size: set.size,
        accessed: at(set.accessed),
        modified: at(set.modified),
    }
}
