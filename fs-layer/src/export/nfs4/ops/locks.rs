//! Byte-range locks, and what clients ask of state identifiers.

use std::sync::Arc;

use crate::export::nfs4::compound::Compound;
use crate::export::nfs4::state::lock::{Conflict, Locked, Locker, Range};
use crate::export::nfs4::state::stateid::Stateid;
use crate::export::nfs4::status::{Nfs4Error, Status};
use crate::export::nfs4::waiting::Waiter;
use crate::export::nfs4::xdr::{Reader, Writer};

const OWNER_MAX: usize = 1024;
/// Most state identifiers that one TEST_STATEID asks for.
const TEST_MAX: usize = 1024;

/// Whether a lock type is exclusive, and whether the client would wait for it.
fn read_type(r: &mut Reader<'_>) -> Status<(bool, bool)> {
    match r.u32()? {
        1 => Ok((false, false)),
        2 => Ok((true, false)),
        3 => Ok((false, true)),
        4 => Ok((true, true)),
        _ => Err(Nfs4Error::BadXdr),
    }
}

fn write_conflict(w: &mut Writer, conflict: &Conflict) {
    let range = conflict.range;
    w.u64(range.start);
    w.u64(Range::length(range.start, range.last));
    w.u32(if range.exclusive { 2 } else { 1 });
    w.u64(conflict.client);
    w.opaque(&conflict.owner);
}

pub fn lock(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let (exclusive, waits) = read_type(r)?;
    let reclaim = r.bool()?;
    let (offset, length) = (r.u64()?, r.u64()?);
    let (locker, owner) = if r.bool()? {
        let _open_seqid = r.u32()?;
        let open = c.read_stateid(r)?;
        let _lock_seqid = r.u32()?;
        let _client = r.u64()?;
        let owner = r.opaque(OWNER_MAX)?;
        (Locker::New(open, owner), Some(owner))
    } else {
        let lock = c.read_stateid(r)?;
        let _lock_seqid = r.u32()?;
        (Locker::Known(lock), None)
    };
    let range = Range::new(offset, length, exclusive)?;
    let (client, ino) = (c.client()?, c.current()?);
    Compound::check_regular(&c.shared.vfs.getattr(ino)?)?;
    let (locked, gone, name) = {
        let mut table = c.shared.table();
        table.check_grace(client, reclaim)?;
        let name = match (owner, locker) {
            (Some(name), _) => name.to_vec(),
            (None, Locker::Known(stateid)) => table.lock_owner_of(stateid, client).unwrap_or_default(),
            (None, Locker::New(..)) => Vec::new(),
        };
        let (locked, gone) = table.lock(client, ino, locker, range)?;
        (locked, gone, name)
    };
    gone.go(&*c.shared.vfs);
    match locked {
        Locked::Yes(stateid) => {
            c.current_stateid = Some(stateid);
            stateid.write(w);
            Ok(())
        }
        Locked::No(_) if reclaim => Err(Nfs4Error::ReclaimConflict),
        Locked::No(conflict) => {
            if waits && let Some(place) = &c.place {
                let handle = c.shared.handles.make(ino);
                c.shared.waiting.add(
                    &*c.shared.vfs,
                    ino,
                    Waiter { session: Arc::downgrade(&place.session), handle, client, owner: name },
                );
            }
            write_conflict(w, &conflict);
            c.error_body = true;
            Err(Nfs4Error::Denied)
        }
    }
}

pub fn lockt(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let (exclusive, _) = read_type(r)?;
    let (offset, length) = (r.u64()?, r.u64()?);
    let _client = r.u64()?;
    let owner = r.opaque(OWNER_MAX)?;
    let range = Range::new(offset, length, exclusive)?;
    let (client, ino) = (c.client()?, c.current()?);
    Compound::check_regular(&c.shared.vfs.getattr(ino)?)?;
    let (conflict, gone) = {
        let mut table = c.shared.table();
        if table.in_grace() {
            return Err(Nfs4Error::Grace);
        }
        table.test_lock(client, ino, owner, range)?
    };
    gone.go(&*c.shared.vfs);
    match conflict {
        None => Ok(()),
        Some(conflict) => {
            write_conflict(w, &conflict);
            c.error_body = true;
            Err(Nfs4Error::Denied)
        }
    }
}

pub fn locku(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let (exclusive, _) = read_type(r)?;
    let _seqid = r.u32()?;
    let stateid = c.read_stateid(r)?;
    let (offset, length) = (r.u64()?, r.u64()?);
    let range = Range::new(offset, length, exclusive)?;
    let (client, ino) = (c.client()?, c.current()?);
    let stateid = c.shared.table().unlock(client, ino, stateid, range)?;
    c.current_stateid = Some(stateid);
    stateid.write(w);
    Ok(())
}

pub fn free_stateid(c: &mut Compound<'_>, r: &mut Reader<'_>) -> Status<()> {
    let stateid = c.read_stateid(r)?;
    if stateid.is_special() {
        return Err(Nfs4Error::BadStateId);
    }
    let client = c.client()?;
    c.shared.table().free(stateid, client)
}

pub fn test_stateid(c: &mut Compound<'_>, r: &mut Reader<'_>, w: &mut Writer) -> Status<()> {
    let client = c.client()?;
    let stateids = (0..r.count(TEST_MAX)?).map(|_| Stateid::read(r)).collect::<Status<Vec<_>>>()?;
    let table = c.shared.table();
    w.u32(stateids.len() as u32);
    for stateid in stateids {
        let found = if stateid.is_special() { Err(Nfs4Error::BadStateId) } else { table.find(stateid, client) };
        w.u32(found.map_or_else(Nfs4Error::code, |_| 0));
    }
    Ok(())
}
