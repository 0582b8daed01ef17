//! The tables of everything that clients hold.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::client::Client;
use super::grace::Grace;
use super::lock::Lock;
use super::open::Open;
use super::session::{Session, SessionId};
use super::stateid::{Other, Stateid};
use crate::export::nfs4::records::ClientRecords;
use crate::export::nfs4::rpc::Caller;
use crate::export::nfs4::status::{Nfs4Error, Status};
use crate::vfs::{Ino, LockOwner, Vfs};

/// Most client records at a time.
const CLIENTS_MAX: usize = 16_384;
/// Most sessions of a client.
const CLIENT_SESSIONS_MAX: usize = 32;
/// Most sessions of all clients: each keeps up to half a MiB of replies.
const SESSIONS_MAX: usize = 4096;
/// Most opens, and most locks, of all clients.
pub(super) const STATES_MAX: usize = 4 << 20;

/// Files that are held no more, to be released when no lock on the tables is held.
#[derive(Debug, Default)]
#[must_use = "the files stay held"]
pub struct Let(pub Vec<Ino>);

impl Let {
    /// Releases them.
    pub fn go(self, vfs: &dyn Vfs) {
        for ino in self.0 {
            vfs.release(ino);
        }
    }
}

/// The records of one long name: at most one of each (RFC 8881 section 18.35.4).
#[derive(Clone, Copy, Debug, Default)]
pub struct Records {
    /// With a session made.
    pub confirmed: Option<u64>,
    /// Not yet.
    pub unconfirmed: Option<u64>,
}

/// A state by its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An open file.
    Open,
    /// An owner's locks on a file.
    Lock,
}

/// Everything that clients hold.
pub struct Table {
    /// The number of this start.
    pub boot: u32,
    pub(super) vfs: Arc<dyn Vfs>,
    records: Arc<dyn ClientRecords>,
    lease: Duration,
    clients: HashMap<u64, Client>,
    by_owner: HashMap<Vec<u8>, Records>,
    sessions: HashMap<SessionId, Arc<Session>>,
    pub(super) opens: HashMap<Other, Open>,
    pub(super) locks: HashMap<Other, Lock>,
    /// The opens of each file.
    pub(super) files: HashMap<Ino, Vec<Other>>,
    grace: Grace,
    next_client: u32,
    next_session: u64,
    next_state: u64,
}

impl Table {
    /// Nothing is held yet; `known` may take back what they held.
    pub fn new(
        boot: u32,
        known: BTreeSet<Vec<u8>>,
        vfs: Arc<dyn Vfs>,
        records: Arc<dyn ClientRecords>,
        lease: Duration,
        grace: Duration,
    ) -> Table {
        Table {
            boot,
            vfs,
            records,
            lease,
            clients: HashMap::new(),
            by_owner: HashMap::new(),
            sessions: HashMap::new(),
            opens: HashMap::new(),
            locks: HashMap::new(),
            files: HashMap::new(),
            grace: Grace::new(known, Instant::now() + grace),
            next_client: 1,
            next_session: 1,
            next_state: 1,
        }
    }

    // --- Clients ---

    /// A client.
    pub fn client(&mut self, id: u64) -> Option<&mut Client> {
        self.clients.get_mut(&id)
    }

    /// The records of a long name.
    pub fn records_of(&self, owner: &[u8]) -> Records {
        self.by_owner.get(owner).copied().unwrap_or_default()
    }

    /// A new record without a session, in place of another such one of the same name.
    ///
    /// # Errors
    /// `Resource` if there are too many.
    pub fn add_client(&mut self, owner: Vec<u8>, verifier: [u8; 8], principal: Caller) -> Status<u64> {
        if let Some(old) = self.records_of(&owner).unconfirmed {
            self.remove_client(old)?.go(&*self.vfs);
        }
        if self.clients.len() >= CLIENTS_MAX {
            return Err(Nfs4Error::Resource);
        }
        let id = u64::from(self.boot) << 32 | u64::from(self.next_client);
        self.next_client = self.next_client.checked_add(1).ok_or(Nfs4Error::Resource)?;
        let mut client = Client::new(id, owner.clone(), verifier, principal, Instant::now());
        client.may_reclaim = self.grace.may_reclaim(&owner);
        self.clients.insert(id, client);
        self.by_owner.entry(owner).or_default().unconfirmed = Some(id);
        Ok(id)
    }

    /// A record has its first session: the one before it of the same name goes, with everything it held.
    pub fn confirm_client(&mut self, id: u64) -> Status<Let> {
        let owner = self.clients.get(&id).ok_or(Nfs4Error::StaleClientId)?.owner.clone();
        let old = self.records_of(&owner).confirmed.filter(|old| *old != id);
        let gone = old.map_or_else(|| Ok(Let::default()), |old| self.remove_client(old))?;
        self.by_owner.insert(owner, Records { confirmed: Some(id), unconfirmed: None });
        if let Some(client) = self.clients.get_mut(&id) {
            client.confirmed = true;
        }
        Ok(gone)
    }

    /// Lets a client go, with everything it holds. It is struck out of the records first.
    ///
    /// # Errors
    /// `Io`: the records cannot be changed. It still holds everything.
    pub fn remove_client(&mut self, id: u64) -> Status<Let> {
        let Some(client) = self.clients.get(&id) else { return Ok(Let::default()) };
        if client.confirmed && (client.reclaim_complete || client.has_state()) {
            self.records.remove(&client.owner).map_err(|e| {
                tracing::error!("the record of an NFS client cannot be removed: {e}");
                Nfs4Error::Io
            })?;
        }
        let client = self.clients.remove(&id).expect("it was there");
        for session in &client.sessions {
            self.sessions.remove(session);
        }
        for ((owner, ino), other) in &client.locks {
            self.locks.remove(other);
            if let Err(e) = self.vfs.unlock_all(*ino, LockOwner { client: id, owner: *owner }) {
                tracing::warn!("locks of file {} are not given up: {e}", ino.0);
            }
        }
        let mut gone = Let::default();
        for ((_, ino), other) in &client.opens {
            self.opens.remove(other);
            self.forget_open_of_file(*ino, *other);
            gone.0.push(*ino);
        }
        if let Some(records) = self.by_owner.get_mut(&client.owner) {
            records.confirmed = records.confirmed.filter(|other| *other != id);
            records.unconfirmed = records.unconfirmed.filter(|other| *other != id);
            if records.confirmed.is_none() && records.unconfirmed.is_none() {
                self.by_owner.remove(&client.owner);
            }
        }
        Ok(gone)
    }

    /// A client was heard of.
    pub fn renew(&mut self, id: u64) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.renewed = Instant::now();
        }
    }

    /// Whether a client's lease is over. It keeps what it holds until that is in somebody's way.
    pub fn is_expired(&self, id: u64) -> bool {
        self.clients.get(&id).is_none_or(|client| client.renewed.elapsed() > self.lease)
    }

    /// Lets a client go that is in the way, if its lease is over.
    pub fn expire(&mut self, id: u64) -> Option<Let> {
        if !self.is_expired(id) {
            return None;
        }
        if self.clients.contains_key(&id) {
            tracing::info!(
                "an NFS client said nothing for its lease, and is in the way of another: it loses what it held"
            );
        }
        self.remove_client(id).ok()
    }

    /// Lets those go whose lease is over, if they hold nothing or were silent for `courtesy` leases.
    pub fn expire_silent(&mut self, courtesy: u32) -> Let {
        let silent = |client: &Client| {
            let limit = if client.has_state() { self.lease * courtesy } else { self.lease };
            client.renewed.elapsed() > limit
        };
        let ids: Vec<u64> = self.clients.values().filter(|client| silent(client)).map(|client| client.id).collect();
        let mut all = Let::default();
        for id in ids {
            if let Ok(gone) = self.remove_client(id) {
                all.0.extend(gone.0);
            }
        }
        all
    }

    /// Lets everything go without a word in the records: the server stops, and clients may reclaim at the next one.
    pub fn clear(&mut self) -> Let {
        for lock in self.locks.values() {
            // The next server's clients take them back.
            let _ = self.vfs.unlock_all(lock.ino, LockOwner { client: lock.client, owner: lock.owner });
        }
        let gone = Let(self.opens.values().map(|open| open.ino).collect());
        self.clients.clear();
        self.by_owner.clear();
        self.sessions.clear();
        self.opens.clear();
        self.locks.clear();
        self.files.clear();
        gone
    }

    // --- Grace ---

    /// Whether the grace period lasts.
    pub fn in_grace(&mut self) -> bool {
        self.grace.lasts(Instant::now(), &*self.records)
    }

    /// Whether a client may take something new, or take back what it held (RFC 8881 section 8.4.2.1 and 18.51.3).
    pub fn check_grace(&mut self, client: u64, reclaim: bool) -> Status<()> {
        let in_grace = self.in_grace();
        let client = self.clients.get(&client).ok_or(Nfs4Error::BadSession)?;
        match reclaim {
            true if client.reclaim_complete || !in_grace || !client.may_reclaim => Err(Nfs4Error::NoGrace),
            false if in_grace || !client.reclaim_complete => Err(Nfs4Error::Grace),
            _ => Ok(()),
        }
    }

    /// A client takes back nothing more. Its name is in the records already.
    pub fn reclaim_complete(&mut self, id: u64) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.reclaim_complete = true;
            self.grace.done(&client.owner);
        }
        self.in_grace();
    }

    // --- Sessions ---

    /// A session.
    pub fn session(&self, id: &SessionId) -> Option<Arc<Session>> {
        self.sessions.get(id).cloned()
    }

    /// Adds a session that `make` makes for a new name.
    ///
    /// # Errors
    /// `Resource` if the client has too many.
    pub fn add_session(&mut self, client: u64, make: impl FnOnce(SessionId) -> Session) -> Status<Arc<Session>> {
        let record = self.clients.get_mut(&client).ok_or(Nfs4Error::StaleClientId)?;
        if record.sessions.len() >= CLIENT_SESSIONS_MAX || self.sessions.len() >= SESSIONS_MAX {
            return Err(Nfs4Error::Resource);
        }
        let mut id = [0; 16];
        id[..8].copy_from_slice(&client.to_be_bytes());
        id[8..].copy_from_slice(&self.next_session.to_be_bytes());
        self.next_session += 1;
        record.sessions.push(id);
        let session = Arc::new(make(id));
        self.sessions.insert(id, session.clone());
        Ok(session)
    }

    /// Removes a session.
    pub fn remove_session(&mut self, id: &SessionId) -> Option<Arc<Session>> {
        let session = self.sessions.remove(id)?;
        if let Some(client) = self.clients.get_mut(&session.client) {
            client.sessions.retain(|other| other != id);
        }
        Some(session)
    }

    /// The sessions of a client.
    pub fn sessions_of(&self, client: u64) -> Vec<Arc<Session>> {
        let ids = self.clients.get(&client).map(|client| client.sessions.as_slice()).unwrap_or_default();
        ids.iter().filter_map(|id| self.session(id)).collect()
    }

    // --- States ---

    /// A name that no state ever had.
    pub(super) fn new_other(&mut self) -> Other {
        let other = Other::new(self.boot, self.next_state);
        self.next_state += 1;
        other
    }

    /// What a state is, if it is the client's and as new as the client says (RFC 8881 section 8.2.4).
    ///
    /// # Errors
    /// `BadStateId`, `OldStateId`; never `StaleStateId`, which version 4.1 clients wait on for ever.
    pub fn find(&self, stateid: Stateid, client: u64) -> Status<Kind> {
        let (kind, owner, seqid) = if let Some(open) = self.opens.get(&stateid.other) {
            (Kind::Open, open.client, open.seqid)
        } else if let Some(lock) = self.locks.get(&stateid.other) {
            (Kind::Lock, lock.client, lock.seqid)
        } else {
            return Err(Nfs4Error::BadStateId);
        };
        if owner != client {
            return Err(Nfs4Error::BadStateId);
        }
        match stateid.seqid {
            0 => Ok(kind),
            asked if asked == seqid => Ok(kind),
            asked if asked < seqid => Err(Nfs4Error::OldStateId),
            _ => Err(Nfs4Error::BadStateId),
        }
    }

    pub(super) fn forget_open_of_file(&mut self, ino: Ino, other: Other) {
        if let Some(opens) = self.files.get_mut(&ino) {
            opens.retain(|open| *open != other);
            if opens.is_empty() {
                self.files.remove(&ino);
            }
        }
    }

    /// How many clients, sessions, opens and locks there are.
    pub fn counts(&self) -> (usize, usize, usize, usize) {
        (self.clients.len(), self.sessions.len(), self.opens.len(), self.locks.len())
    }
}
