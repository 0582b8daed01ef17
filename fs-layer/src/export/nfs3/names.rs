//! Procedures on directories (RFC 1813 section 3.3).

use super::{Body, Done, Fail, Request, attributes, garbage};
use crate::export::nfs4::status::{Nfs4Error, Status};
use crate::export::nfs4::xdr::{Reader, Writer};
use crate::vfs::{
    Attributes, DirChange, FileKind, Ino, Made, Make, NAME_MAX, NewAttributes, Rename, SYMLINK_MAX, VfsError,
};

/// Cookies of `.` and `..`; those of the filesystem are above.
const DOT: u64 = 1;
const DOT_DOT: u64 = 2;
const PAGE_ENTRIES: usize = 128;
const DEFAULT_MODE: u32 = 0o600;

/// Reads a name, and says what is wrong with it.
fn read_name<'a>(r: &mut Reader<'a>) -> Result<Status<&'a [u8]>, Fail> {
    let name = r.opaque(64 << 10).map_err(garbage)?;
    Ok(match name {
        _ if name.len() > NAME_MAX => Err(Nfs4Error::NameTooLong),
        b"" => Err(Nfs4Error::Inval),
        _ if name.contains(&b'/') || name.contains(&0) => Err(Nfs4Error::Inval),
        _ => Ok(name),
    })
}

/// A name that is to be made or taken away.
fn check_new(name: &[u8], dots: Nfs4Error) -> Status<&[u8]> {
    if name == b"." || name == b".." { Err(dots) } else { Ok(name) }
}

fn of_dir(dir: Ino) -> impl Fn(Nfs4Error) -> Fail {
    move |e| Fail::Status(e, Body::Changed(Some(dir)))
}

fn no_dir(e: Nfs4Error) -> Fail {
    Fail::Status(e, Body::Changed(None))
}

pub fn lookup(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let (handle, name) = (q.handle(r)?, read_name(r)?);
    let dir = handle.map_err(|e| Fail::Status(e, Body::File(None)))?;
    let found = name.and_then(|name| Ok(q.shared.vfs.lookup(&q.who, dir, name)?));
    let file = found.map_err(|e| {
        let e = if e == Nfs4Error::Symlink { Nfs4Error::NotDir } else { e };
        Fail::Status(e, Body::File(Some(dir)))
    })?;
    q.shared.handles.write(w, file.ino);
    attributes::write_optional(w, Some(&file), q.shared.handles.fs());
    q.write_file(w, Some(dir));
    Ok(())
}

/// The results of what made a file.
fn write_made(q: &Request<'_>, w: &mut Writer, dir: Ino, file: &Attributes) {
    w.bool(true);
    q.shared.handles.write(w, file.ino);
    attributes::write_optional(w, Some(file), q.shared.handles.fs());
    q.write_changed(w, Some(dir));
}

/// `exclusive` is the verifier of an exclusive create.
fn make(
    q: &Request<'_>,
    dir: Ino,
    name: Status<&[u8]>,
    what: &Make,
    with: &NewAttributes,
    exclusive: Option<[u8; 8]>,
) -> Status<Made> {
    q.writable()?;
    let name = check_new(name?, Nfs4Error::Exist)?;
    if q.again {
        // It may be gone by now.
        let attributes = q.shared.vfs.lookup(&q.who, dir, name).map_err(|_| Nfs4Error::Stale)?;
        let change = q.shared.vfs.getattr(dir)?.change;
        return Ok(Made { attributes, made: true, dir: DirChange { before: change, after: change } });
    }
    let vfs = &q.shared.vfs;
    let make = || vfs.make(&q.who, dir, name, what, with);
    let made = q.noting(|| match exclusive {
        Some(verifier) => q.shared.exclusives.make(&**vfs, dir, name, verifier, make),
        None => make(),
    })?;
    q.commit()?;
    Ok(made)
}

pub fn create(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let (handle, name) = (q.handle(r)?, read_name(r)?);
    let mode = r.u32().map_err(garbage)?;
    let exclusive = match mode {
        0 | 1 => None,
        2 => Some(r.fixed::<8>().map_err(garbage)?),
        _ => return Err(Fail::Garbage),
    };
    let mut set = Default::default();
    if exclusive.is_none() {
        set = attributes::read(r).map_err(garbage)?;
    }
    let dir = handle.map_err(no_dir)?;
    let with = attributes::new(&set, DEFAULT_MODE);
    let what = Make::File { exclusive: mode != 0 };
    let file = match (make(q, dir, name, &what, &with, exclusive), exclusive) {
        (Ok(made), _) if made.made || set.size != Some(0) => Ok(made.attributes),
        // What exists is emptied.
        (Ok(made), _) => {
            let size = crate::vfs::SetAttributes { size: Some(0), ..Default::default() };
            let emptied = q.shared.vfs.setattr(&q.who, made.attributes.ino, &size, false);
            emptied.map_err(Nfs4Error::from).and_then(|file| q.commit().map(|()| file))
        }
        (Err(Nfs4Error::Exist), Some(verifier)) => same_create(q, dir, name, verifier),
        (Err(e), _) => Err(e),
    };
    write_made(q, w, dir, &file.map_err(of_dir(dir))?);
    Ok(())
}

/// The file, if it was made by this very request, whose reply was lost.
fn same_create(q: &Request<'_>, dir: Ino, name: Status<&[u8]>, verifier: [u8; 8]) -> Status<Attributes> {
    let name = check_new(name?, Nfs4Error::Exist)?;
    let file = q.shared.vfs.lookup(&q.who, dir, name)?;
    let same = q.shared.exclusives.is_repeated(&q.shared.noted, dir, name, verifier, file.ino);
    if same && file.kind == FileKind::File { Ok(file) } else { Err(Nfs4Error::Exist) }
}

pub fn mkdir(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let (handle, name) = (q.handle(r)?, read_name(r)?);
    let set = attributes::read(r).map_err(garbage)?;
    let dir = handle.map_err(no_dir)?;
    let with = NewAttributes { size: None, ..attributes::new(&set, 0o700) };
    let made = make(q, dir, name, &Make::Directory, &with, None).map_err(of_dir(dir))?;
    write_made(q, w, dir, &made.attributes);
    Ok(())
}

pub fn symlink(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let (handle, name) = (q.handle(r)?, read_name(r)?);
    let set = attributes::read(r).map_err(garbage)?;
    let target = r.opaque(64 << 10).map_err(garbage)?;
    let dir = handle.map_err(no_dir)?;
    let with = NewAttributes { size: None, ..attributes::new(&set, 0o777) };
    let made = match target.len() {
        0 => Err(Nfs4Error::Inval),
        len if len > SYMLINK_MAX => Err(Nfs4Error::NameTooLong),
        _ => make(q, dir, name, &Make::Symlink(target.to_vec()), &with, None),
    };
    write_made(q, w, dir, &made.map_err(of_dir(dir))?.attributes);
    Ok(())
}

pub fn mknod(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let (handle, name) = (q.handle(r)?, read_name(r)?);
    let kind = match r.u32().map_err(garbage)? {
        3 => Some(FileKind::BlockDevice),
        4 => Some(FileKind::CharDevice),
        6 => Some(FileKind::Socket),
        7 => Some(FileKind::Fifo),
        _ => None,
    };
    let Some(kind) = kind else {
        let dir = handle.map_err(no_dir)?;
        return Err(of_dir(dir)(Nfs4Error::BadType));
    };
    let set = attributes::read(r).map_err(garbage)?;
    let device = match kind {
        FileKind::BlockDevice | FileKind::CharDevice => (r.u32().map_err(garbage)?, r.u32().map_err(garbage)?),
        _ => (0, 0),
    };
    let dir = handle.map_err(no_dir)?;
    let with = NewAttributes { size: None, ..attributes::new(&set, DEFAULT_MODE) };
    let made = make(q, dir, name, &Make::Special { kind, device }, &with, None).map_err(of_dir(dir))?;
    write_made(q, w, dir, &made.attributes);
    Ok(())
}

pub fn remove(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer, directory: bool) -> Done {
    let (handle, name) = (q.handle(r)?, read_name(r)?);
    let dir = handle.map_err(no_dir)?;
    let run = || -> Status<()> {
        q.writable()?;
        let name = match name? {
            b"." => return Err(Nfs4Error::Inval),
            b".." => return Err(if directory { Nfs4Error::Exist } else { Nfs4Error::Inval }),
            name => name,
        };
        if q.again {
            return Ok(());
        }
        q.noting(|| match directory {
            true => q.shared.vfs.rmdir(&q.who, dir, name),
            false => q.shared.vfs.unlink(&q.who, dir, name),
        })?;
        q.commit()
    };
    run().map_err(of_dir(dir))?;
    q.write_changed(w, Some(dir));
    Ok(())
}

pub fn rename(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let (from, old) = (q.handle(r)?, read_name(r)?);
    let (to, new) = (q.handle(r)?, read_name(r)?);
    let (from_dir, to_dir) = (from.ok(), to.ok());
    let run = || -> Status<()> {
        q.writable()?;
        let (old, new) = (check_new(old?, Nfs4Error::Inval)?, check_new(new?, Nfs4Error::Inval)?);
        if q.again {
            return Ok(());
        }
        let (from, to) = ((from?, old), (to?, new));
        q.noting(|| q.shared.vfs.rename(&q.who, from, to, Rename::Replace))?;
        q.commit()
    };
    run().map_err(|e| Fail::Status(e, Body::Renamed(from_dir, to_dir)))?;
    q.write_changed(w, from_dir);
    q.write_changed(w, to_dir);
    Ok(())
}

pub fn link(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Done {
    let file = q.handle(r)?;
    let (dir, name) = (q.handle(r)?, read_name(r)?);
    let (ino, in_dir) = (file.ok(), dir.ok());
    let run = || -> Status<()> {
        q.writable()?;
        let (file, dir, name) = (file?, dir?, check_new(name?, Nfs4Error::Exist)?);
        if q.again {
            return Ok(());
        }
        q.noting(|| q.shared.vfs.link(&q.who, file, dir, name))?;
        q.commit()
    };
    run().map_err(|e| Fail::Status(e, Body::Linked(ino, in_dir)))?;
    q.write_file(w, ino);
    q.write_changed(w, in_dir);
    Ok(())
}

/// READDIR and, with `plus`, READDIRPLUS. Cookies stay valid for ever, so the verifier is always the same.
pub fn readdir(q: &Request<'_>, r: &mut Reader<'_>, w: &mut Writer, plus: bool) -> Done {
    let handle = q.handle(r)?;
    let cookie = r.u64().map_err(garbage)?;
    let _verifier: [u8; 8] = r.fixed().map_err(garbage)?;
    if plus {
        r.u32().map_err(garbage)?;
    }
    let max = r.u32().map_err(garbage)?;
    let dir = handle.map_err(|e| Fail::Status(e, Body::File(None)))?;
    let max = max.min(q.shared.options.transfer_max) as usize;
    list(q, w, dir, cookie, max, plus).map_err(|e| Fail::Status(e, Body::File(Some(dir))))
}

/// The whole results, the status aside.
fn list(q: &Request<'_>, w: &mut Writer, dir: Ino, cookie: u64, max: usize, plus: bool) -> Status<()> {
    let vfs = &q.shared.vfs;
    q.write_file(w, Some(dir));
    w.u64(0);
    // With the end of the list and of the directory.
    let fits = |w: &Writer| w.len() + 8 <= max;
    let mut entries = 0;
    let mut after = cookie;
    for (number, name) in [(DOT, &b"."[..]), (DOT_DOT, b"..")] {
        if after < number {
            let ino = if number == DOT { dir } else { vfs.parent(dir)? };
            let at = w.len();
            write_entry(q, w, ino, name, number, plus)?;
            if !fits(w) {
                w.truncate(at);
                return if entries == 0 { Err(Nfs4Error::TooSmall) } else { end(w, false) };
            }
            (after, entries) = (number, entries + 1);
        }
    }
    loop {
        let page = vfs.readdir(&q.who, dir, after, (max / 64).clamp(1, PAGE_ENTRIES))?;
        for entry in &page.entries {
            let at = w.len();
            match write_entry(q, w, entry.ino, &entry.name, entry.cookie, plus) {
                // Removed a moment ago.
                Err(Nfs4Error::Stale) => w.truncate(at),
                Err(e) => return Err(e),
                Ok(()) if !fits(w) => {
                    w.truncate(at);
                    return if entries == 0 { Err(Nfs4Error::TooSmall) } else { end(w, false) };
                }
                Ok(()) => entries += 1,
            }
            after = entry.cookie;
        }
        if page.end || page.entries.is_empty() {
            return end(w, true);
        }
    }
}

fn end(w: &mut Writer, of_directory: bool) -> Status<()> {
    w.bool(false);
    w.bool(of_directory);
    Ok(())
}

fn write_entry(q: &Request<'_>, w: &mut Writer, ino: Ino, name: &[u8], cookie: u64, plus: bool) -> Status<()> {
    w.bool(true);
    w.u64(ino.0);
    w.opaque(name);
    w.u64(cookie);
    if plus {
        let file = match q.shared.vfs.getattr(ino) {
            Err(VfsError::Stale) => return Err(Nfs4Error::Stale),
            // It is listed all the same; who asks for it sees the error.
            other => other.ok(),
        };
        attributes::write_optional(w, file.as_ref(), q.shared.handles.fs());
        w.bool(true);
        q.shared.handles.write(w, ino);
    }
    Ok(())
}
