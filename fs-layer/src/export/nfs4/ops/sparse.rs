//! What version 4.2 adds to contents (RFC 7862): holes, space, and copies within the server.

use super::data::{UNSTABLE, check_io, check_range};
use crate::export::nfs4::compound::Compound;
use crate::export::nfs4::state::open::{READ, WRITE};
use crate::export::nfs4::status::{Nfs4Error, Status};
use crate::export::nfs4::xdr::{Reader, Writer};
use crate::vfs::{FILE_SIZE_MAX, Fallocate, Ino, SHARE_BYTES_MIN, Seek, VfsError, WriteAt};

/// Bytes that one COPY moves where nothing can be shared; the client asks for the rest.
const COPY_MAX: u64 = 64 << 20;
/// Bytes of a copy in memory.
const COPY_CHUNK: u32 = 1 << 20;
/// Most segments of a READ_PLUS.
const SEGMENTS_MAX: u32 = 64;
/// Bytes of a segment beside its data.
const SEGMENT_BYTES: usize = 16;
/// Unit of sharing.
const BLOCK: u64 = 4096;

/// ALLOCATE, and DEALLOCATE with `take` false (RFC 7862 sections 15.1 and 15.4).
pub fn allocate(c: &mut Compound<'_>, r: &mut Reader<'_>, take: bool) -> Status<()> {
    let stateid = c.read_stateid(r)?;
    let (offset, length) = (r.u64()?, r.u64()?);
    let ino = c.current()?;
    check_io(c, stateid, ino, WRITE)?;
    if length == 0 {
        return Err(Nfs4Error::Inval);
    }
    check_range(offset, if take { length } else { 0 })?;
    let how = if take { Fallocate::Allocate } else { Fallocate::PunchHole };
    let length = length.min(FILE_SIZE_MAX - offset);
    c.shared.vfs.fallocate(&c.who, ino, how, offset, length)?;
    c.changed = true;
    Ok(())
}

/// SEEK (section 15.11).
pub fn seek(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let stateid = c.read_stateid(r)?;
    let (offset, what) = (r.u64()?, r.u32()?);
    let what = match what {
        0 => Seek::Data,
        1 => Seek::Hole,
        _ => return Err(Nfs4Error::UnionNotSupp),
    };
    let ino = c.current()?;
    check_io(c, stateid, ino, READ)?;
    let size = c.shared.vfs.getattr(ino)?.size;
    if offset >= size {
        return Err(Nfs4Error::Nxio);
    }
    let found = match c.shared.vfs.seek(ino, offset, what) {
        Err(VfsError::NoSuchAddress) => size,
        found => found?,
    };
    w.bool(found >= size);
    w.u64(found);
    Ok(())
}

/// The two files of CLONE and COPY, checked: source and destination.
fn read_files(c: &Compound<'_>, r: &mut Reader<'_>) -> Status<(Ino, Ino)> {
    let (source, target) = (c.read_saved_stateid(r)?, c.read_stateid(r)?);
    let (from, to) = (c.saved()?, c.current()?);
    check_io(c, source, from, READ)?;
    check_io(c, target, to, WRITE)?;
    Ok((from, to))
}

/// CLONE (section 15.13).
pub fn clone(c: &mut Compound<'_>, r: &mut Reader<'_>) -> Status<()> {
    let (from, to) = read_files(c, r)?;
    let (source, target, count) = (r.u64()?, r.u64()?, r.u64()?);
    check_range(source, count)?;
    check_range(target, count)?;
    c.shared.vfs.clone_range(&c.who, (from, source), (to, target), count)?;
    c.changed = true;
    Ok(())
}

/// COPY within the server, done when it is answered (section 15.2).
pub fn copy(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let (from, to) = read_files(c, r)?;
    let (source, target, count) = (r.u64()?, r.u64()?, r.u64()?);
    let (_consecutive, _synchronous) = (r.bool()?, r.bool()?);
    if r.u32()? != 0 {
        // From another server.
        return Err(Nfs4Error::NotSupp);
    }
    let size = c.shared.vfs.getattr(from)?.size;
    if source > size {
        return Err(Nfs4Error::Inval);
    }
    let count = if count == 0 { size - source } else { count.min(size - source) };
    check_range(target, count)?;
    if from == to && count > 0 && source < target.saturating_add(count) && target < source.saturating_add(count) {
        return Err(Nfs4Error::Inval);
    }
    let verifier = c.shared.vfs.write_verifier();
    let copied = match share(c, (from, source), (to, target), count, size)? {
        Some(shared) => shared,
        None => move_bytes(c, (from, source), (to, target), count)?,
    };
    // No callback will follow.
    w.u32(0);
    w.u64(copied);
    w.u32(UNSTABLE);
    w.fixed(&verifier);
    w.bool(true);
    w.bool(true);
    Ok(())
}

/// Shares whole blocks, if the range is made of such and long enough.
fn share(c: &Compound<'_>, from: (Ino, u64), to: (Ino, u64), count: u64, size: u64) -> Status<Option<u64>> {
    let whole = from.1.is_multiple_of(BLOCK)
        && to.1.is_multiple_of(BLOCK)
        && (count.is_multiple_of(BLOCK) || from.1 + count == size);
    // An end within a block would cut what the target has behind it.
    let behind = !count.is_multiple_of(BLOCK) && c.shared.vfs.getattr(to.0)?.size > to.1 + count;
    if count < SHARE_BYTES_MIN || !whole || behind {
        return Ok(None);
    }
    match c.shared.vfs.clone_range(&c.who, from, to, count) {
        Ok(shared) => Ok(Some(shared)),
        Err(VfsError::NotSupported | VfsError::Invalid | VfsError::CrossDevice) => Ok(None),
        Err(e) => Err(e.into()),
    }
}

fn move_bytes(c: &Compound<'_>, from: (Ino, u64), to: (Ino, u64), count: u64) -> Status<u64> {
    let count = count.min(COPY_MAX);
    let mut copied = 0;
    while copied < count {
        let chunk = (count - copied).min(u64::from(COPY_CHUNK)) as u32;
        let step = || {
            let got = c.shared.vfs.read(from.0, from.1 + copied, chunk)?;
            if !got.data.is_empty() {
                c.shared.vfs.write(&c.who, to.0, WriteAt::Offset(to.1 + copied), &got.data)?;
            }
            Ok::<_, VfsError>(got.data.len() as u64)
        };
        match step() {
            Ok(0) => break,
            Ok(moved) => copied += moved,
            // What was copied stays copied; the client asks for the rest and sees the error then.
            Err(_) if copied > 0 => break,
            Err(e) => return Err(e.into()),
        }
    }
    Ok(copied)
}

/// READ_PLUS (section 15.10): data, and holes as no more than their length.
pub fn read_plus(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let stateid = c.read_stateid(r)?;
    let (offset, count) = (r.u64()?, r.u32()?);
    let ino = c.current()?;
    check_io(c, stateid, ino, READ)?;
    let size = c.shared.vfs.getattr(ino)?.size;
    let count = u64::from(count.min(c.shared.options.transfer_max));
    let mut at = offset;
    let end = offset.saturating_add(count).min(size);
    let head = w.len();
    w.bool(false);
    w.u32(0);
    let mut segments = 0;
    while at < end && segments < SEGMENTS_MAX {
        let room = c.room(w).saturating_sub(2 * SEGMENT_BYTES) as u64 / 4 * 4;
        if room == 0 {
            break;
        }
        let data_at = match c.shared.vfs.seek(ino, at, Seek::Data) {
            Err(VfsError::NoSuchAddress) => end,
            found => found?.min(end),
        };
        if data_at > at {
            w.u32(1);
            w.u64(at);
            w.u64(data_at - at);
            at = data_at;
        } else {
            let hole_at = match c.shared.vfs.seek(ino, at, Seek::Hole) {
                Err(VfsError::NoSuchAddress) => end,
                found => found?.min(end),
            };
            let len = hole_at.saturating_sub(at).min(room) as u32;
            let got = c.shared.vfs.read(ino, at, len)?;
            if got.data.is_empty() {
                break;
            }
            w.u32(0);
            w.u64(at);
            w.opaque(&got.data);
            at += got.data.len() as u64;
        }
        segments += 1;
    }
    w.patch(head, u32::from(at >= size));
    w.patch(head + 4, segments);
    Ok(())
}
