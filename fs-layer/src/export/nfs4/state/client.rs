//! Clients: who they are, and what they hold.

use std::collections::HashMap;
use std::time::Instant;

use super::session::SessionId;
use super::stateid::Other;
use crate::export::nfs4::rpc::Caller;
use crate::vfs::Ino;

/// A client record (RFC 8881 section 18.35.4).
pub struct Client {
    /// Its short name for this start of the server: boot number, then a counter.
    pub id: u64,
    /// Its long name, co_ownerid.
    pub owner: Vec<u8>,
    /// Changes when it restarts.
    pub verifier: [u8; 8],
    /// Who made the record.
    pub principal: Caller,
    /// Whether a session was made.
    pub confirmed: bool,
    /// When it last was heard of.
    pub renewed: Instant,
    /// The number of its last CREATE_SESSION.
    pub create_sequence: u32,
    /// What was answered to that.
    pub create_reply: Option<Vec<u8>>,
    /// Its sessions.
    pub sessions: Vec<SessionId>,
    /// Whether it said that it takes back nothing more.
    pub reclaim_complete: bool,
    /// Whether it was written down at the start of the server.
    pub may_reclaim: bool,
    /// Its opens, by owner and file.
    pub opens: HashMap<(Vec<u8>, Ino), Other>,
    /// Its locks, by owner and file.
    pub locks: HashMap<(u64, Ino), Other>,
    lock_owners: HashMap<Vec<u8>, u64>,
    lock_owner_names: HashMap<u64, Vec<u8>>,
    /// On how many files an owner has locks.
    lock_files: HashMap<u64, usize>,
    next_lock_owner: u64,
}

impl Client {
    /// A client that nothing is known of but this.
    pub fn new(id: u64, owner: Vec<u8>, verifier: [u8; 8], principal: Caller, now: Instant) -> Client {
        Client {
            id,
            owner,
            verifier,
            principal,
            confirmed: false,
            renewed: now,
            create_sequence: 0,
            create_reply: None,
            sessions: Vec::new(),
            reclaim_complete: false,
            may_reclaim: false,
            opens: HashMap::new(),
            locks: HashMap::new(),
            lock_owners: HashMap::new(),
            lock_owner_names: HashMap::new(),
            lock_files: HashMap::new(),
            next_lock_owner: 1,
        }
    }

    /// Whether it holds anything.
    pub fn has_state(&self) -> bool {
        !self.opens.is_empty() || !self.locks.is_empty()
    }

    /// The number of a lock owner, if it has one.
    pub fn known_lock_owner(&self, name: &[u8]) -> Option<u64> {
        self.lock_owners.get(name).copied()
    }

    /// The number of a lock owner.
    pub fn lock_owner(&mut self, name: &[u8]) -> u64 {
        if let Some(number) = self.known_lock_owner(name) {
            return number;
        }
        let number = self.next_lock_owner;
        self.next_lock_owner += 1;
        self.lock_owners.insert(name.to_vec(), number);
        self.lock_owner_names.insert(number, name.to_vec());
        number
    }

    /// What the client calls a lock owner.
    pub fn lock_owner_name(&self, number: u64) -> Option<&[u8]> {
        self.lock_owner_names.get(&number).map(Vec::as_slice)
    }

    /// Notes an owner's locks on a file.
    pub fn add_lock(&mut self, owner: u64, ino: Ino, other: Other) {
        if self.locks.insert((owner, ino), other).is_none() {
            *self.lock_files.entry(owner).or_default() += 1;
        }
    }

    /// Forgets an owner's locks on a file, and the owner if there are none on others.
    pub fn remove_lock(&mut self, owner: u64, ino: Ino) {
        if self.locks.remove(&(owner, ino)).is_some() {
            *self.lock_files.entry(owner).or_default() -= 1;
        }
        self.forget_idle_owner(owner);
    }

    /// Forgets a lock owner that has no locks on any file.
    pub fn forget_idle_owner(&mut self, owner: u64) {
        if self.lock_files.get(&owner).is_none_or(|files| *files == 0) {
            self.lock_files.remove(&owner);
            if let Some(name) = self.lock_owner_names.remove(&owner) {
                self.lock_owners.remove(&name);
            }
        }
    }
}
