//! Byte-range locks (RFC 8881 section 9.1 to 9.6). Who is in whose way is the filesystem's to say; here stands what the protocol calls them.

use super::open::{self, next_seqid};
use super::ranges::Ranges;
use super::stateid::{Other, Stateid};
use super::table::{Kind, Let, STATES_MAX, Table};
use crate::export::nfs4::status::{Nfs4Error, Status};
use crate::vfs::{FileLock, Ino, LockOwner, LockSpace};

/// Most ranges an owner has locked in a file.
const RANGES_MAX: usize = 65_536;

/// The locks of an owner on a file.
pub struct Lock {
    /// Whose.
    pub client: u64,
    /// Which owner there.
    pub owner: u64,
    /// On which file.
    pub ino: Ino,
    /// Under which open.
    pub open: Other,
    /// Counts changes.
    pub seqid: u32,
    ranges: Ranges,
}

/// A range of bytes to lock.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Range {
    /// The first.
    pub start: u64,
    /// The last; `u64::MAX` for all to come.
    pub last: u64,
    /// Whether no other may have it.
    pub exclusive: bool,
}

impl Range {
    /// From offset and length of the wire; a length of all ones is "to the end" (RFC 8881 section 18.10.3).
    ///
    /// # Errors
    /// `Inval` for an empty range and one that passes the largest offset.
    pub fn new(offset: u64, length: u64, exclusive: bool) -> Status<Range> {
        let last = match length {
            0 => return Err(Nfs4Error::Inval),
            u64::MAX => u64::MAX,
            _ => offset.checked_add(length).ok_or(Nfs4Error::Inval)? - 1,
        };
        Ok(Range { start: offset, last, exclusive })
    }

    /// Its length on the wire.
    pub fn length(start: u64, last: u64) -> u64 {
        if last == u64::MAX { u64::MAX } else { last - start + 1 }
    }

    fn of(self, owner: LockOwner) -> FileLock {
        FileLock {
            owner,
            pid: 0,
            space: LockSpace::Range,
            exclusive: self.exclusive,
            start: self.start,
            last: self.last,
        }
    }
}

/// Who is in the way, in the words of the protocol.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conflict {
    /// What it has locked.
    pub range: Range,
    /// Its client; 0 if it is none of NFSv4.
    pub client: u64,
    /// What that calls it.
    pub owner: Vec<u8>,
}

/// Who asks for a lock.
#[derive(Clone, Copy, Debug)]
pub enum Locker<'a> {
    /// An owner without locks on this file, under an open.
    New(Stateid, &'a [u8]),
    /// One that has some.
    Known(Stateid),
}

/// What came of a request for a lock.
#[derive(Debug)]
pub enum Locked {
    /// It is taken.
    Yes(Stateid),
    /// Somebody is in the way.
    No(Conflict),
}

impl Table {
    /// LOCK. What clients held that had to go comes back to be released.
    ///
    /// # Errors
    /// `OpenMode` if the file is not open for such a lock, and the state's errors.
    pub fn lock(&mut self, client: u64, ino: Ino, locker: Locker<'_>, range: Range) -> Status<(Locked, Let)> {
        let (open, owner, name) = match locker {
            Locker::New(stateid, name) => {
                if self.find(stateid, client)? != Kind::Open {
                    return Err(Nfs4Error::BadStateId);
                }
                let record = self.client(client).ok_or(Nfs4Error::BadSession)?;
                (stateid.other, record.known_lock_owner(name), name)
            }
            Locker::Known(stateid) => {
                if self.find(stateid, client)? != Kind::Lock {
                    return Err(Nfs4Error::BadStateId);
                }
                let lock =
                    self.locks.get(&stateid.other).filter(|lock| lock.ino == ino).ok_or(Nfs4Error::BadStateId)?;
                (lock.open, Some(lock.owner), &[][..])
            }
        };
        let opened = self.opens.get(&open).filter(|open| open.ino == ino).ok_or(Nfs4Error::BadStateId)?;
        let needed = if range.exclusive { open::WRITE } else { open::READ };
        if opened.access & needed == 0 {
            return Err(Nfs4Error::OpenMode);
        }
        let count = self.locks.len();
        let record = self.client(client).ok_or(Nfs4Error::BadSession)?;
        let known = owner.and_then(|owner| record.locks.get(&(owner, ino)).copied());
        if known.is_none() && count >= STATES_MAX {
            return Err(Nfs4Error::Resource);
        }
        let owner = owner.unwrap_or_else(|| record.lock_owner(name));
        if known.and_then(|known| self.locks.get(&known)).is_some_and(|lock| lock.ranges.len() >= RANGES_MAX) {
            return Err(Nfs4Error::Resource);
        }
        let (conflict, gone) = match self.try_lock(ino, range.of(Table::vfs_owner(client, owner)), true) {
            Ok(tried) => tried,
            Err(e) => {
                self.forget_idle_owner(client, owner);
                return Err(e);
            }
        };
        if let Some(conflict) = conflict {
            let conflict = self.name(conflict);
            self.forget_idle_owner(client, owner);
            return Ok((Locked::No(conflict), gone));
        }
        let other = match known {
            Some(other) => other,
            None => {
                let other = self.new_other();
                let lock = Lock { client, owner, ino, open, seqid: 0, ranges: Ranges::default() };
                self.locks.insert(other, lock);
                if let Some(record) = self.client(client) {
                    record.add_lock(owner, ino, other);
                }
                other
            }
        };
        let lock = self.locks.get_mut(&other).expect("a lock of the client's is in the table");
        lock.seqid = next_seqid(lock.seqid);
        lock.ranges.insert(range.start, range.last);
        Ok((Locked::Yes(Stateid { seqid: lock.seqid, other }), gone))
    }

    /// Takes or tests a lock. Clients that are in the way and whose lease is over lose what they held.
    fn try_lock(&mut self, ino: Ino, lock: FileLock, take: bool) -> Status<(Option<FileLock>, Let)> {
        let mut gone = Let::default();
        loop {
            let tried = if take { self.vfs.lock(ino, &lock) } else { self.vfs.test_lock(ino, &lock) };
            let Some(conflict) = tried? else { return Ok((None, gone)) };
            let known = conflict.owner.client != lock.owner.client && self.client(conflict.owner.client).is_some();
            match known.then(|| self.expire(conflict.owner.client)).flatten() {
                Some(more) => gone.0.extend(more.0),
                None => return Ok((Some(conflict), gone)),
            }
        }
    }

    /// What the client calls the owner of a lock state.
    pub fn lock_owner_of(&mut self, stateid: Stateid, client: u64) -> Option<Vec<u8>> {
        let owner = self.locks.get(&stateid.other).filter(|lock| lock.client == client)?.owner;
        self.client(client)?.lock_owner_name(owner).map(<[u8]>::to_vec)
    }

    /// LOCKT.
    ///
    /// # Errors
    /// The filesystem's.
    pub fn test_lock(&mut self, client: u64, ino: Ino, owner: &[u8], range: Range) -> Status<(Option<Conflict>, Let)> {
        let record = self.client(client).ok_or(Nfs4Error::BadSession)?;
        // An owner that has no locks yet is in nobody's place: 0 is no owner's number.
        let owner = record.known_lock_owner(owner).unwrap_or(0);
        let (conflict, gone) = self.try_lock(ino, range.of(Table::vfs_owner(client, owner)), false)?;
        Ok((conflict.map(|conflict| self.name(conflict)), gone))
    }

    /// LOCKU.
    ///
    /// # Errors
    /// The state's.
    pub fn unlock(&mut self, client: u64, ino: Ino, stateid: Stateid, range: Range) -> Status<Stateid> {
        if self.find(stateid, client)? != Kind::Lock {
            return Err(Nfs4Error::BadStateId);
        }
        let vfs = self.vfs.clone();
        let lock = self.locks.get_mut(&stateid.other).filter(|lock| lock.ino == ino).ok_or(Nfs4Error::BadStateId)?;
        vfs.unlock(ino, &range.of(Table::vfs_owner(client, lock.owner)))?;
        lock.ranges.remove(range.start, range.last);
        lock.seqid = next_seqid(lock.seqid);
        Ok(Stateid { seqid: lock.seqid, other: stateid.other })
    }

    /// FREE_STATEID (RFC 8881 section 18.38.3).
    ///
    /// # Errors
    /// `LocksHeld` for an open and for locks that are held, and the state's errors.
    pub fn free(&mut self, stateid: Stateid, client: u64) -> Status<()> {
        let held = match self.find(stateid, client)? {
            Kind::Open => true,
            Kind::Lock => self.locks.get(&stateid.other).is_some_and(|lock| !lock.ranges.is_empty()),
        };
        if held {
            return Err(Nfs4Error::LocksHeld);
        }
        self.forget_lock(stateid.other);
        Ok(())
    }

    /// Gives up an owner's locks on a file, and their state.
    pub(super) fn forget_lock(&mut self, other: Other) {
        let Some(lock) = self.locks.remove(&other) else { return };
        if !lock.ranges.is_empty()
            && let Err(e) = self.vfs.unlock_all(lock.ino, Table::vfs_owner(lock.client, lock.owner))
        {
            tracing::warn!("locks of file {} are not given up: {e}", lock.ino.0);
        }
        if let Some(record) = self.client(lock.client) {
            record.remove_lock(lock.owner, lock.ino);
        }
    }

    fn forget_idle_owner(&mut self, client: u64, owner: u64) {
        if let Some(record) = self.client(client) {
            record.forget_idle_owner(owner);
        }
    }

    /// Says who has a lock.
    fn name(&mut self, lock: FileLock) -> Conflict {
        let range = Range { start: lock.start, last: lock.last, exclusive: lock.exclusive };
        let LockOwner { client, owner } = lock.owner;
        match self.client(client).and_then(|record| record.lock_owner_name(owner)) {
            Some(name) => Conflict { range, client, owner: name.to_vec() },
            None => Conflict { range, client: 0, owner: owner.to_be_bytes().to_vec() },
        }
    }
}
