//! Directories: what is in them, and what changes that.

use crate::export::nfs4::attributes::{self, Settings};
use crate::export::nfs4::bitmap::Bitmap;
use crate::export::nfs4::compound::{Compound, read_name, write_change};
use crate::export::nfs4::status::{Nfs4Error, Status};
use crate::export::nfs4::xdr::{Reader, Writer};
use crate::vfs::{Attributes, DirChange, FileKind, Ino, Make, NewAttributes, Rename, SYMLINK_MAX, SetTime, VfsError};

/// Entries that are asked of the filesystem at a time.
const PAGE_ENTRIES: usize = 128;
/// Bytes of a directory's page beside its entries: verifier, end of the list, end of the directory.
const PAGE_BYTES: usize = 16;

/// What a new file starts with.
pub fn new_attributes(settings: &Settings, default_mode: u32) -> NewAttributes {
    let time = |time| match time {
        Some(SetTime::At(time)) => Some(time),
        _ => None,
    };
    let values = &settings.values;
    NewAttributes {
        mode: values.mode.unwrap_or(default_mode),
        uid: values.uid,
        gid: values.gid,
        size: values.size,
        accessed: time(values.accessed),
        modified: time(values.modified),
    }
}

pub fn create(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let kind = r.u32()?;
    let what = match kind {
        5 => Make::Symlink(r.opaque(64 << 10)?.to_vec()),
        3 => Make::Special { kind: FileKind::BlockDevice, device: (r.u32()?, r.u32()?) },
        4 => Make::Special { kind: FileKind::CharDevice, device: (r.u32()?, r.u32()?) },
        6 => Make::Special { kind: FileKind::Socket, device: (0, 0) },
        7 => Make::Special { kind: FileKind::Fifo, device: (0, 0) },
        2 => Make::Directory,
        _ => return Err(Nfs4Error::BadType),
    };
    let name = read_name(r)?;
    let settings = Settings::read(r, c.minor)?;
    let dir = c.current()?;
    c.writable()?;
    if settings.values.size.is_some() {
        return Err(Nfs4Error::Inval);
    }
    let default_mode = match &what {
        Make::Symlink(target) if target.is_empty() => return Err(Nfs4Error::Inval),
        Make::Symlink(target) if target.len() > SYMLINK_MAX => return Err(Nfs4Error::NameTooLong),
        Make::Symlink(_) => 0o777,
        Make::Directory => 0o700,
        _ => 0o600,
    };
    let with = new_attributes(&settings, default_mode);
    let (ino, change) = if c.is_done()? {
        (made_before(c, dir, name)?.ino, unchanged(c, dir)?)
    } else {
        let made = c.noting(|| c.shared.vfs.make(&c.who, dir, name, &what, &with));
        let made = made.map_err(|e| c.dir_error(dir, e.into()))?;
        c.changed = true;
        (made.attributes.ino, made.dir)
    };
    c.set_current(Some(ino));
    write_change(w, change);
    settings.named.write(w);
    Ok(())
}

/// A directory that does not change now.
pub fn unchanged(c: &Compound<'_>, dir: Ino) -> Status<DirChange> {
    let change = c.shared.vfs.getattr(dir)?.change;
    Ok(DirChange { before: change, after: change })
}

/// What the server before this one made. It may be gone by now.
pub fn made_before(c: &Compound<'_>, dir: Ino, name: &[u8]) -> Status<Attributes> {
    c.shared.vfs.lookup(&c.who, dir, name).map_err(|_| Nfs4Error::Stale)
}

pub fn remove(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let name = read_name(r)?;
    let dir = c.current()?;
    c.writable()?;
    if c.is_done()? {
        write_change(w, unchanged(c, dir)?);
        return Ok(());
    }
    let vfs = &c.shared.vfs;
    let file = vfs.lookup(&c.who, dir, name).map_err(|e| c.dir_error(dir, e.into()))?;
    let unlink = || c.noting(|| vfs.unlink(&c.who, dir, name));
    let rmdir = || c.noting(|| vfs.rmdir(&c.who, dir, name));
    let removed = match file.kind {
        FileKind::Directory => rmdir(),
        _ => unlink(),
    };
    // Between looking and removing another may have put something else there.
    let removed = match removed {
        Err(VfsError::NotDirectory) => unlink(),
        Err(VfsError::IsDirectory) => rmdir(),
        other => other,
    };
    let change = removed?;
    c.changed = true;
    write_change(w, change);
    Ok(())
}

pub fn rename(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let (old, new) = (read_name(r)?, read_name(r)?);
    let (from, to) = (c.saved()?, c.current()?);
    c.writable()?;
    if c.is_done()? {
        write_change(w, unchanged(c, from)?);
        write_change(w, unchanged(c, to)?);
        return Ok(());
    }
    let renamed = c.noting(|| c.shared.vfs.rename(&c.who, (from, old), (to, new), Rename::Replace));
    let (source, target) = renamed.map_err(|e| match Nfs4Error::from(e) {
        // A file over a directory, or the reverse, and a directory that is not empty (section 18.26.3).
        Nfs4Error::NotDir if c.dir_error(from, Nfs4Error::NotDir) == Nfs4Error::Symlink => Nfs4Error::Symlink,
        e => c.dir_error(to, e),
    })?;
    c.changed = true;
    write_change(w, source);
    write_change(w, target);
    Ok(())
}

pub fn link(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let name = read_name(r)?;
    let (ino, dir) = (c.saved()?, c.current()?);
    c.writable()?;
    let file = c.shared.vfs.getattr(ino)?;
    if file.kind == FileKind::Directory {
        return Err(Nfs4Error::IsDir);
    }
    if c.is_done()? {
        write_change(w, unchanged(c, dir)?);
        return Ok(());
    }
    let linked = c.noting(|| c.shared.vfs.link(&c.who, ino, dir, name)).map_err(|e| c.dir_error(dir, e.into()))?;
    c.changed = true;
    write_change(w, linked.dir);
    Ok(())
}

/// READDIR (RFC 8881 section 18.23). Cookies stay valid for ever, so the verifier is always the same.
pub fn readdir(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let mut cookie = r.u64()?;
    let _verifier: [u8; 8] = r.fixed()?;
    let _names_bytes = r.u32()?;
    let max = r.u32()? as usize;
    let asked = Bitmap::read(r)?;
    let dir = c.current()?;
    attributes::check_readable(asked)?;
    // 1 and 2 would be `.` and `..`, which NFSv4 does not list.
    if cookie == 1 || cookie == 2 || cookie >= 1 << 63 {
        return Err(Nfs4Error::BadCookie);
    }
    let max = max.min(c.room(w)).min(c.shared.options.transfer_max as usize);
    let context = c.attribute_context(asked)?;
    let vfs = &c.shared.vfs;
    let begin = w.len();
    w.u64(0);
    let mut entries = 0;
    let end = 'pages: loop {
        // A first guess at how many fit, so that small pages do not cost what large ones do.
        let page_max = (max / 64).clamp(1, PAGE_ENTRIES);
        let page = vfs.readdir(&c.who, dir, cookie, page_max).map_err(|e| c.dir_error(dir, e.into()))?;
        for entry in &page.entries {
            let at = w.len();
            w.bool(true);
            w.u64(entry.cookie);
            w.opaque(&entry.name);
            match vfs.getattr(entry.ino) {
                Ok(file) => attributes::write(w, asked, &file, &context),
                // Removed a moment ago.
                Err(VfsError::Stale) => {
                    w.truncate(at);
                    cookie = entry.cookie;
                    continue;
                }
                Err(e) if asked.has(attributes::number::RDATTR_ERROR) => attributes::write_error(w, e.into()),
                Err(e) => return Err(e.into()),
            }
            if w.len() - begin + 8 > max {
                w.truncate(at);
                break 'pages false;
            }
            cookie = entry.cookie;
            entries += 1;
        }
        if page.end || page.entries.is_empty() {
            break true;
        }
    };
    if entries == 0 && !end || max < PAGE_BYTES {
        return Err(Nfs4Error::TooSmall);
    }
    w.bool(false);
    w.bool(end);
    Ok(())
}
