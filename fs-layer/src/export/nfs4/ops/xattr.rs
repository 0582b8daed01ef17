//! Extended attributes (RFC 8276). On the wire a name has no prefix; all are `user.` ones here.

use crate::export::nfs4::compound::{Compound, write_change};
use crate::export::nfs4::status::{Nfs4Error, Status};
use crate::export::nfs4::xdr::{Reader, Writer};
use crate::vfs::{Access, DirChange, Ino, NAME_MAX, SetXattr, XATTR_MAX};

const PREFIX: &[u8] = b"user.";
/// Bytes of a list beside its names: cookie, count, end.
const LIST_BYTES: usize = 16;

fn read_name(r: &mut Reader<'_>) -> Status<Vec<u8>> {
    let name = r.opaque(64 << 10)?;
    if name.is_empty() || name.contains(&0) {
        return Err(Nfs4Error::Inval);
    }
    if name.len() + PREFIX.len() > NAME_MAX {
        return Err(Nfs4Error::NameTooLong);
    }
    Ok([PREFIX, name].concat())
}

fn change_of(c: &Compound<'_>, ino: Ino) -> Status<u64> {
    Ok(c.shared.vfs.getattr(ino)?.change)
}

pub fn get(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let name = read_name(r)?;
    let ino = c.current()?;
    let value = c.shared.vfs.getxattr(&c.who, ino, &name)?;
    if value.len() + 8 > c.room(w) {
        return Err(Nfs4Error::TooSmall);
    }
    w.opaque(&value);
    Ok(())
}

pub fn set(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let how = match r.u32()? {
        0 => SetXattr::Any,
        1 => SetXattr::Create,
        2 => SetXattr::Replace,
        _ => return Err(Nfs4Error::BadXdr),
    };
    let name = read_name(r)?;
    let value = r.opaque(c.shared.options.transfer_max as usize)?;
    let ino = c.current()?;
    c.writable()?;
    if value.len() > XATTR_MAX {
        return Err(Nfs4Error::Xattr2Big);
    }
    let before = change_of(c, ino)?;
    c.shared.vfs.setxattr(&c.who, ino, &name, value, how)?;
    c.changed = true;
    write_change(w, DirChange { before, after: change_of(c, ino)? });
    Ok(())
}

/// LISTXATTRS. A cookie is the number of the first name that was not answered yet.
pub fn list(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let cookie = r.u64()?;
    let max = (r.u32()? as usize).min(c.room(w));
    let ino = c.current()?;
    c.check_access(ino, Access { read: true, ..Access::default() })?;
    let mut names = c.shared.vfs.listxattr(&c.who, ino)?;
    names.retain(|name| name.starts_with(PREFIX));
    names.sort();
    let first = usize::try_from(cookie).ok().filter(|first| *first <= names.len()).ok_or(Nfs4Error::BadCookie)?;
    let mut bytes = LIST_BYTES;
    let mut last = first;
    for name in &names[first..] {
        bytes += 4 + (name.len() - PREFIX.len()).next_multiple_of(4);
        if bytes > max {
            break;
        }
        last += 1;
    }
    if last == first && first < names.len() {
        return Err(Nfs4Error::TooSmall);
    }
    w.u64(last as u64);
    w.u32((last - first) as u32);
    for name in &names[first..last] {
        w.opaque(&name[PREFIX.len()..]);
    }
    w.bool(last == names.len());
    Ok(())
}

pub fn remove(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let name = read_name(r)?;
    let ino = c.current()?;
    c.writable()?;
    let before = change_of(c, ino)?;
    c.shared.vfs.removexattr(&c.who, ino, &name)?;
    c.changed = true;
    write_change(w, DirChange { before, after: change_of(c, ino)? });
    Ok(())
}
