//! READ, WRITE and COMMIT.

use crate::export::nfs4::compound::Compound;
use crate::export::nfs4::state::open::{Grant, READ, WRITE};
use crate::export::nfs4::state::stateid::Stateid;
use crate::export::nfs4::status::{Nfs4Error, Status};
use crate::export::nfs4::xdr::{Reader, Writer};
use crate::vfs::{Access, FILE_SIZE_MAX, Ino, WriteAt};

/// Bytes of READ's results beside the data.
const READ_BYTES: usize = 12;
/// stable_how4.
pub const UNSTABLE: u32 = 0;
const DATA_SYNC: u32 = 1;
const FILE_SYNC: u32 = 2;

/// Whether the caller may read or write the contents of the file, by its open or else by its permissions. The owner always may, as
/// whoever opened a file before its mode was changed.
pub fn check_io(c: &Compound<'_>, stateid: Stateid, ino: Ino, want: u32) -> Status<()> {
    if want == WRITE {
        c.writable()?;
    }
    let client = c.client()?;
    let grant = c.shared.table().check_io(stateid, client, ino, want)?;
    if grant == Grant::Opened {
        return Ok(());
    }
    let file = c.shared.vfs.getattr(ino)?;
    Compound::check_regular(&file)?;
    if file.uid == c.who.uid {
        return Ok(());
    }
    c.check_access(ino, Access { read: want == READ, write: want == WRITE, execute: false })
}

pub fn read(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let stateid = c.read_stateid(r)?;
    let (offset, count) = (r.u64()?, r.u32()?);
    let ino = c.current()?;
    check_io(c, stateid, ino, READ)?;
    let room = u32::try_from(c.room(w).saturating_sub(READ_BYTES) / 4 * 4).unwrap_or(u32::MAX);
    let count = count.min(c.shared.options.transfer_max).min(room);
    if offset >= FILE_SIZE_MAX {
        w.bool(true);
        w.opaque(&[]);
        return Ok(());
    }
    let got = c.shared.vfs.read(ino, offset, count)?;
    w.bool(got.end);
    w.data(got.data);
    Ok(())
}

pub fn write(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let stateid = c.read_stateid(r)?;
    let (offset, stable) = (r.u64()?, r.u32()?);
    let data = r.opaque(c.shared.options.transfer_max as usize)?;
    if stable > FILE_SYNC {
        return Err(Nfs4Error::BadXdr);
    }
    let ino = c.current()?;
    check_io(c, stateid, ino, WRITE)?;
    check_range(offset, data.len() as u64)?;
    // Asked for before: what is lost from now on changes the verifier that COMMIT will answer.
    let verifier = c.shared.vfs.write_verifier();
    if !data.is_empty() {
        c.shared.vfs.write(&c.who, ino, WriteAt::Offset(offset), data)?;
    }
    if stable != UNSTABLE {
        c.shared.vfs.fsync(ino, stable == DATA_SYNC)?;
    }
    w.u32(data.len() as u32);
    w.u32(stable);
    w.fixed(&verifier);
    Ok(())
}

/// Refuses what passes the end of the largest file.
pub fn check_range(offset: u64, length: u64) -> Status<()> {
    match offset.checked_add(length) {
        Some(end) if end <= FILE_SIZE_MAX => Ok(()),
        _ => Err(Nfs4Error::Fbig),
    }
}

pub fn commit(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let (_offset, _count) = (r.u64()?, r.u32()?);
    let ino = c.current()?;
    c.writable()?;
    Compound::check_regular(&c.shared.vfs.getattr(ino)?)?;
    c.shared.vfs.fsync(ino, false)?;
    // Asked for after: what was lost until now has changed it.
    w.fixed(&c.shared.vfs.write_verifier());
    Ok(())
}
