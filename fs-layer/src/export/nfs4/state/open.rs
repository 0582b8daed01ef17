//! Opens: share reservations (RFC 8881 sections 9.7 to 9.11).

use super::stateid::{BYPASS, Other, Stateid};
use super::table::{Kind, Let, STATES_MAX, Table};
use crate::export::nfs4::status::{Nfs4Error, Status};
use crate::vfs::{Ino, LockOwner};

/// OPEN4_SHARE_ACCESS_READ, and the same bit of what is denied.
pub const READ: u32 = 1;
/// OPEN4_SHARE_ACCESS_WRITE.
pub const WRITE: u32 = 2;
/// Both.
pub const BOTH: u32 = 3;

/// An owner's open of a file: all its OPENs since the last CLOSE.
pub struct Open {
    /// Whose.
    pub client: u64,
    /// Which owner there.
    pub owner: Vec<u8>,
    /// Of which file.
    pub ino: Ino,
    /// Counts changes.
    pub seqid: u32,
    /// What it may do.
    pub access: u32,
    /// What others may not.
    pub deny: u32,
}

/// What an operation on a file's contents may lean on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Grant {
    /// The file was opened for it; permission was checked then.
    Opened,
    /// Nothing: permission must be checked now.
    Anonymous,
}

/// The seqid after this one; 0 is never one.
pub(super) fn next_seqid(seqid: u32) -> u32 {
    seqid.checked_add(1).unwrap_or(1)
}

impl Table {
    /// Opens a file, or adds to the owner's open of it. The caller holds the file ([`crate::vfs::Vfs::hold`]) for the open; what is not needed of that
    /// comes back to be released.
    ///
    /// # Errors
    /// `ShareDenied`, `Resource`.
    pub fn open(&mut self, client: u64, owner: &[u8], ino: Ino, access: u32, deny: u32) -> Status<(Stateid, Let)> {
        let mine = self.client(client).ok_or(Nfs4Error::BadSession)?.opens.get(&(owner.to_vec(), ino)).copied();
        let mut released = Let::default();
        let all = self.files.get(&ino).cloned().unwrap_or_default();
        for other in all.into_iter().filter(|other| Some(*other) != mine) {
            let Some(open) = self.opens.get(&other) else { continue };
            if open.access & deny == 0 && open.deny & access == 0 {
                continue;
            }
            let holder = open.client;
            match self.expire(holder) {
                Some(gone) if holder != client => released.0.extend(gone.0),
                _ => {
                    // What expired clients held goes in any case.
                    released.go(&*self.vfs);
                    return Err(Nfs4Error::ShareDenied);
                }
            }
        }
        let other = match mine {
            Some(other) => {
                released.0.push(ino);
                other
            }
            None => {
                let other = self.new_other();
                if self.opens.len() >= STATES_MAX {
                    released.go(&*self.vfs);
                    return Err(Nfs4Error::Resource);
                }
                let record = self.client(client).ok_or(Nfs4Error::BadSession)?;
                record.opens.insert((owner.to_vec(), ino), other);
                self.opens.insert(other, Open { client, owner: owner.to_vec(), ino, seqid: 0, access: 0, deny: 0 });
                self.files.entry(ino).or_default().push(other);
                other
            }
        };
        let open = self.opens.get_mut(&other).expect("an open of the client's is in the table");
        open.seqid = next_seqid(open.seqid);
        open.access |= access;
        open.deny |= deny;
        Ok((Stateid { seqid: open.seqid, other }, released))
    }

    /// An open by its name.
    fn open_of(&mut self, stateid: Stateid, client: u64, ino: Ino) -> Status<&mut Open> {
        if self.find(stateid, client)? != Kind::Open {
            return Err(Nfs4Error::BadStateId);
        }
        self.opens.get_mut(&stateid.other).filter(|open| open.ino == ino).ok_or(Nfs4Error::BadStateId)
    }

    /// OPEN_DOWNGRADE.
    ///
    /// # Errors
    /// `Inval` if that would be more than there is, and the state's errors.
    pub fn downgrade(&mut self, stateid: Stateid, client: u64, ino: Ino, access: u32, deny: u32) -> Status<Stateid> {
        let open = self.open_of(stateid, client, ino)?;
        if access == 0 || access & !open.access != 0 || deny & !open.deny != 0 {
            return Err(Nfs4Error::Inval);
        }
        open.access = access;
        open.deny = deny;
        open.seqid = next_seqid(open.seqid);
        Ok(Stateid { seqid: open.seqid, other: stateid.other })
    }

    /// CLOSE. The locks that were taken under the open go with it.
    ///
    /// # Errors
    /// The state's.
    pub fn close(&mut self, stateid: Stateid, client: u64, ino: Ino) -> Status<Let> {
        self.open_of(stateid, client, ino)?;
        let open = self.opens.remove(&stateid.other).expect("it was found");
        self.forget_open_of_file(ino, stateid.other);
        let locks: Vec<Other> = match self.client(client) {
            Some(record) => {
                record.opens.remove(&(open.owner, ino));
                record.locks.iter().filter(|((_, file), _)| *file == ino).map(|(_, other)| *other).collect()
            }
            None => Vec::new(),
        };
        for other in locks {
            if self.locks.get(&other).is_some_and(|lock| lock.open == stateid.other) {
                self.forget_lock(other);
            }
        }
        Ok(Let(vec![ino]))
    }

    /// Whether an operation may read or write (`want`) a file's contents with this state (RFC 8881 section 9.1.2).
    ///
    /// # Errors
    /// `OpenMode` if it was opened for something else, `Locked` if somebody's open denies it, and the state's errors.
    pub fn check_io(&mut self, stateid: Stateid, client: u64, ino: Ino, want: u32) -> Status<Grant> {
        if stateid.is_special() {
            if stateid == BYPASS && want == READ {
                return Ok(Grant::Anonymous);
            }
            let opens = self.files.get(&ino).map(Vec::as_slice).unwrap_or_default();
            let denied = opens.iter().any(|other| self.opens.get(other).is_some_and(|open| open.deny & want != 0));
            return if denied { Err(Nfs4Error::Locked) } else { Ok(Grant::Anonymous) };
        }
        let other = match self.find(stateid, client)? {
            Kind::Open => stateid.other,
            Kind::Lock => self.locks.get(&stateid.other).ok_or(Nfs4Error::BadStateId)?.open,
        };
        let open = self.opens.get(&other).filter(|open| open.ino == ino).ok_or(Nfs4Error::BadStateId)?;
        match want & !open.access {
            0 => Ok(Grant::Opened),
            // Whoever writes parts of blocks must read the rest; permission decides (section 18.22.3).
            READ => Ok(Grant::Anonymous),
            _ => Err(Nfs4Error::OpenMode),
        }
    }

    /// Whether some open of another client or owner denies this to whoever has no open (RFC 8881 section 18.30.3).
    pub fn is_open(&self, ino: Ino) -> bool {
        self.files.contains_key(&ino)
    }

    /// The number of the lock owner, at its client.
    pub(super) fn vfs_owner(client: u64, owner: u64) -> LockOwner {
        LockOwner { client, owner }
    }
}
