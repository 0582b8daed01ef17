//! The current file, its handle and its attributes.

use crate::export::nfs4::attributes::{self, Settings};
use crate::export::nfs4::bitmap::Bitmap;
use crate::export::nfs4::compound::{Compound, read_name};
use crate::export::nfs4::rpc::{AUTH_NONE, AUTH_SYS};
use crate::export::nfs4::state::open;
use crate::export::nfs4::state::open::Grant;
use crate::export::nfs4::status::{Nfs4Error, Status};
use crate::export::nfs4::xdr::{Reader, Writer};
use crate::vfs::{self, Access, FileKind};

/// Bits of ACCESS (RFC 8881 section 18.1, RFC 8276 section 8.5).
const READ: u32 = 0x1;
const LOOKUP: u32 = 0x2;
const MODIFY: u32 = 0x4;
const EXTEND: u32 = 0x8;
const DELETE: u32 = 0x10;
const EXECUTE: u32 = 0x20;
const XATTR_READ: u32 = 0x40;
const XATTR_WRITE: u32 = 0x80;
const XATTR_LIST: u32 = 0x100;

pub fn putrootfh(c: &mut Compound<'_>) -> Status<()> {
    c.set_current(Some(vfs::ROOT));
    Ok(())
}

pub fn putfh(c: &mut Compound<'_>, r: &mut Reader<'_>) -> Status<()> {
    let ino = c.read_handle(r)?;
    c.set_current(Some(ino));
    Ok(())
}

pub fn getfh(c: &mut Compound<'_>, w: &mut Writer) -> Status<()> {
    c.shared.handles.write(w, c.current()?);
    Ok(())
}

pub fn savefh(c: &mut Compound<'_>) -> Status<()> {
    c.saved = Some(c.current()?);
    c.saved_stateid = c.current_stateid;
    Ok(())
}

pub fn restorefh(c: &mut Compound<'_>) -> Status<()> {
    c.current = Some(c.saved()?);
    c.current_stateid = c.saved_stateid;
    Ok(())
}

pub fn lookup(c: &mut Compound<'_>, r: &mut Reader<'_>) -> Status<()> {
    let name = read_name(r)?;
    let dir = c.current()?;
    let file = c.shared.vfs.lookup(&c.who, dir, name).map_err(|e| c.dir_error(dir, e.into()))?;
    c.set_current(Some(file.ino));
    Ok(())
}

pub fn lookupp(c: &mut Compound<'_>) -> Status<()> {
    let dir = c.current()?;
    if c.shared.vfs.getattr(dir)?.kind != FileKind::Directory {
        return Err(c.dir_error(dir, Nfs4Error::NotDir));
    }
    if dir == vfs::ROOT {
        return Err(Nfs4Error::NoEnt);
    }
    c.check_access(dir, Access { execute: true, ..Access::default() })?;
    let parent = c.shared.vfs.parent(dir)?;
    c.set_current(Some(parent));
    Ok(())
}

pub fn access(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let asked = r.u32()?;
    let ino = c.current()?;
    let file = c.shared.vfs.getattr(ino)?;
    let xattrs = if c.minor >= 2 { XATTR_READ | XATTR_WRITE | XATTR_LIST } else { 0 };
    let supported = xattrs
        | match file.kind {
            FileKind::Directory => READ | LOOKUP | MODIFY | EXTEND | DELETE,
            _ => READ | MODIFY | EXTEND | EXECUTE,
        };
    let wanted = Access { read: true, write: true, execute: true };
    let has = c.shared.vfs.access(&c.who, ino, wanted)?;
    let mut allowed = 0;
    if has.read {
        allowed |= READ | XATTR_READ | XATTR_LIST;
    }
    if has.write && c.writable().is_ok() {
        allowed |= MODIFY | EXTEND | DELETE | XATTR_WRITE;
    }
    if has.execute {
        allowed |= LOOKUP | EXECUTE;
    }
    w.u32(asked & supported);
    w.u32(asked & supported & allowed);
    Ok(())
}

pub fn getattr(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let asked = Bitmap::read(r)?;
    let ino = c.current()?;
    attributes::check_readable(asked)?;
    let file = c.shared.vfs.getattr(ino)?;
    c.write_attributes(w, asked, &file)
}

pub fn setattr(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let stateid = c.read_stateid(r)?;
    let settings = Settings::read(r, c.minor)?;
    let ino = c.current()?;
    c.writable()?;
    let mut opened = false;
    if settings.values.size.is_some() {
        Compound::check_regular(&c.shared.vfs.getattr(ino)?)?;
        let client = c.client()?;
        opened = c.shared.table().check_io(stateid, client, ino, open::WRITE)? == Grant::Opened;
    } else if !stateid.is_special() {
        c.shared.table().find(stateid, c.client()?)?;
    }
    c.shared.vfs.setattr(&c.who, ino, &settings.values, opened)?;
    c.changed = !settings.named.is_empty();
    settings.named.write(w);
    Ok(())
}

/// VERIFY, and NVERIFY with `same` false: the client's attributes against the file's, as they are encoded.
pub fn verify(c: &mut Compound<'_>, r: &mut Reader<'_>, same: bool) -> Status<()> {
    let named = Bitmap::read(r)?;
    let theirs = r.opaque(64 << 10)?;
    let ino = c.current()?;
    if !named.without(attributes::supported(c.minor)).is_empty() {
        return Err(Nfs4Error::AttrNotSupp);
    }
    attributes::check_readable(named)?;
    if named.has(attributes::number::RDATTR_ERROR) {
        return Err(Nfs4Error::Inval);
    }
    let file = c.shared.vfs.getattr(ino)?;
    let mut ours = Writer::default();
    c.write_attributes(&mut ours, named, &file)?;
    let mut ours = Reader::new(ours.as_bytes());
    Bitmap::read(&mut ours)?;
    let equal = ours.opaque(usize::MAX)? == theirs;
    match (same, equal) {
        (true, false) => Err(Nfs4Error::NotSame),
        (false, true) => Err(Nfs4Error::Same),
        _ => Ok(()),
    }
}

pub fn readlink(c: &mut Compound<'_>, w: &mut Writer) -> Status<()> {
    let ino = c.current()?;
    if c.shared.vfs.getattr(ino)?.kind != FileKind::Symlink {
        return Err(Nfs4Error::WrongType);
    }
    w.opaque(&c.shared.vfs.readlink(ino)?);
    Ok(())
}

pub fn secinfo(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let name = read_name(r)?;
    let dir = c.current()?;
    c.shared.vfs.lookup(&c.who, dir, name).map_err(|e| c.dir_error(dir, e.into()))?;
    write_flavours(c, w);
    Ok(())
}

pub fn secinfo_no_name(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let style = r.u32()?;
    let ino = c.current()?;
    match style {
        0 => {}
        1 if ino == vfs::ROOT => return Err(Nfs4Error::NoEnt),
        1 => {}
        _ => return Err(Nfs4Error::BadXdr),
    }
    write_flavours(c, w);
    Ok(())
}

/// The same credentials everywhere. The current file is used up (RFC 8881 section 2.6.3.1.1.8).
fn write_flavours(c: &mut Compound<'_>, w: &mut Writer) {
    w.u32(2);
    w.u32(AUTH_SYS);
    w.u32(AUTH_NONE);
    c.set_current(None);
}
