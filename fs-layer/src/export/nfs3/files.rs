//! Procedures on one file: attributes and contents (RFC 1813 section 3.3).

use super::{Body, Done, Fail, Request, attributes, garbage};
use crate::export::nfs4::status::{Nfs4Error, Status};
use crate::export::nfs4::xdr::{Reader, Writer};
use crate::vfs::{self, Access, FILE_SIZE_MAX, FileKind, Ino, WriteAt};

const UNSTABLE: u32 = 0;
const DATA_SYNC: u32 = 1;
const FILE_SYNC: u32 = 2;
/// Bits of ACCESS.
const READ: u32 = 0x1;
const LOOKUP: u32 = 0x2;
const MODIFY: u32 = 0x4;
const EXTEND: u32 = 0x8;
const DELETE: u32 = 0x10;
const EXECUTE: u32 = 0x20;

/// Errors with the attributes of the file.
fn of_file(ino: Ino) -> impl Fn(Nfs4Error) -> Fail {
    move |e| Fail::Status(e, Body::File(Some(ino)))
}

/// Errors with what may have changed of the file.
fn of_changed(ino: Ino) -> impl Fn(Nfs4Error) -> Fail {
    move |e| Fail::Status(e, Body::Changed(Some(ino)))
}

fn no_file(e: Nfs4Error) -> Fail {
    Fail::Status(e, Body::File(None))
}

pub fn getattr(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let nothing = |e: Nfs4Error| Fail::Status(e, Body::Nothing);
    let ino = q.handle(r)?.map_err(nothing)?;
    let file = q.shared.vfs.getattr(ino).map_err(|e| nothing(e.into()))?;
    attributes::write(w, &file, q.shared.handles.fs());
    Ok(())
}

pub fn setattr(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let handle = q.handle(r)?;
    let set = attributes::read(r).map_err(garbage)?;
    let guard =
        if r.bool().map_err(garbage)? { Some((r.u32().map_err(garbage)?, r.u32().map_err(garbage)?)) } else { None };
    let ino = handle.map_err(|e| Fail::Status(e, Body::Changed(None)))?;
    let run = || -> Status<()> {
        q.writable()?;
        let file = q.shared.vfs.getattr(ino)?;
        if let Some((seconds, nanoseconds)) = guard {
            let (s, ns) = file.changed.parts();
            if (s, ns) != (i64::from(seconds), nanoseconds) {
                return Err(Nfs4Error::NotSame);
            }
        }
        // Whoever has it open may truncate it, and that its owner has cannot be known.
        q.shared.vfs.setattr(&q.who, ino, &set, file.uid == q.who.uid)?;
        q.commit()
    };
    run().map_err(of_changed(ino))?;
    q.write_changed(w, Some(ino));
    Ok(())
}

pub fn access(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let handle = q.handle(r)?;
    let asked = r.u32().map_err(garbage)?;
    let ino = handle.map_err(no_file)?;
    let run = || -> Status<u32> {
        let file = q.shared.vfs.getattr(ino)?;
        let supported = match file.kind {
            FileKind::Directory => READ | LOOKUP | MODIFY | EXTEND | DELETE,
            _ => READ | MODIFY | EXTEND | EXECUTE,
        };
        let has = q.shared.vfs.access(&q.who, ino, Access { read: true, write: true, execute: true })?;
        let mut allowed = 0;
        if has.read {
            allowed |= READ;
        }
        if has.write && q.writable().is_ok() {
            allowed |= MODIFY | EXTEND | DELETE;
        }
        if has.execute {
            allowed |= LOOKUP | EXECUTE;
        }
        Ok(asked & supported & allowed)
    };
    let allowed = run().map_err(of_file(ino))?;
    q.write_file(w, Some(ino));
    w.u32(allowed);
    Ok(())
}

pub fn readlink(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let ino = q.handle(r)?.map_err(no_file)?;
    let target = q.shared.vfs.readlink(ino).map_err(|e| of_file(ino)(e.into()))?;
    q.write_file(w, Some(ino));
    w.opaque(&target);
    Ok(())
}

pub fn read(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let handle = q.handle(r)?;
    let (offset, count) = (r.u64().map_err(garbage)?, r.u32().map_err(garbage)?);
    let ino = handle.map_err(no_file)?;
    let run = || -> Status<_> {
        q.contents(ino, Access { read: true, ..Access::default() })?;
        Ok(q.shared.vfs.read(ino, offset.min(FILE_SIZE_MAX), count.min(q.shared.options.transfer_max))?)
    };
    let got = run().map_err(of_file(ino))?;
    q.write_file(w, Some(ino));
    w.u32(got.data.len() as u32);
    w.bool(got.end);
    w.data(got.data);
    Ok(())
}

pub fn write(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let handle = q.handle(r)?;
    let (offset, count, stable) = (r.u64().map_err(garbage)?, r.u32().map_err(garbage)?, r.u32().map_err(garbage)?);
    let data = r.opaque(q.shared.options.transfer_max as usize).map_err(garbage)?;
    if stable > FILE_SYNC || count as usize != data.len() {
        return Err(Fail::Garbage);
    }
    let ino = handle.map_err(|e| Fail::Status(e, Body::Changed(None)))?;
    // Asked for before: what is lost from now on changes the verifier that COMMIT will answer.
    let verifier = q.shared.vfs.write_verifier();
    let run = || -> Status<()> {
        q.writable()?;
        q.contents(ino, Access { write: true, ..Access::default() })?;
        if offset.checked_add(data.len() as u64).is_none_or(|end| end > FILE_SIZE_MAX) {
            return Err(Nfs4Error::Fbig);
        }
        if !data.is_empty() {
            q.shared.vfs.write(&q.who, ino, WriteAt::Offset(offset), data)?;
        }
        if stable != UNSTABLE {
            q.shared.vfs.fsync(ino, stable == DATA_SYNC)?;
        }
        Ok(())
    };
    run().map_err(of_changed(ino))?;
    q.write_changed(w, Some(ino));
    w.u32(count);
    w.u32(stable);
    w.fixed(&verifier);
    Ok(())
}

pub fn commit(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let handle = q.handle(r)?;
    let (_offset, _count) = (r.u64().map_err(garbage)?, r.u32().map_err(garbage)?);
    let ino = handle.map_err(|e| Fail::Status(e, Body::Changed(None)))?;
    q.shared.vfs.fsync(ino, false).map_err(|e| of_changed(ino)(e.into()))?;
    q.write_changed(w, Some(ino));
    // Asked for after: what was lost until now has changed it.
    w.fixed(&q.shared.vfs.write_verifier());
    Ok(())
}

pub fn fsstat(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let ino = q.handle(r)?.map_err(no_file)?;
    let stat = q.shared.vfs.statfs().map_err(|e| of_file(ino)(e.into()))?;
    q.write_file(w, Some(ino));
    for value in
        [stat.bytes_total, stat.bytes_free, stat.bytes_free, stat.files_total, stat.files_free, stat.files_free]
    {
        w.u64(value);
    }
    // It may change at any time.
    w.u32(0);
    Ok(())
}

pub fn fsinfo(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let ino = q.handle(r)?.map_err(no_file)?;
    q.write_file(w, Some(ino));
    let transfer = q.shared.options.transfer_max;
    for value in [transfer, transfer, 4096, transfer, transfer, 4096, 64 << 10] {
        w.u32(value);
    }
    w.u64(FILE_SIZE_MAX);
    w.u32(0);
    w.u32(1);
    // Hard links, symbolic links, the same everywhere, times can be set.
    w.u32(0x1 | 0x2 | 0x8 | 0x10);
    Ok(())
}

pub fn pathconf(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let ino = q.handle(r)?.map_err(no_file)?;
    q.write_file(w, Some(ino));
    w.u32(vfs::LINK_MAX);
    w.u32(vfs::NAME_MAX as u32);
    // Long names are errors, only root gives files away, case counts and is kept.
    for value in [true, true, false, true] {
        w.bool(value);
    }
    Ok(())
}
