//! One TCP connection: records in, records out.
//!
//! Which thread reads it, and when, is the business of [`super::threads`]: one at a time. Any thread sends. A record longer than any session allows ends the
//! connection. Memory is bounded by how many requests are under way, on one connection and on all.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSlice};
use std::net::{IpAddr, Shutdown, TcpStream};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{self, MsgFlags};

use super::compound;
use super::receiving::{Progress, Receiving};
use super::rpc::{self, Answer, Caller, LAST_FRAGMENT, Message};
use super::server::Shared;
use super::xdr::Writer;
use crate::export::nfs3::{self, Outcome, mount};
use crate::mutex::lock;

/// Requests of a connection under way at a time, from the last byte read to the last byte of the reply sent.
const RUNNING_MAX: usize = 64;
/// A peer that is in the middle of a record, or does not take a reply, has this long: it holds memory that others want.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes that a record has beside the data of a WRITE.
const HEADERS_MAX: usize = 16 << 10;
/// Calls to the client that are not answered yet.
const CALLS_MAX: usize = 64;

/// What is done with the reply to a call of the server's; `None` if there will be none.
pub type Then = Box<dyn FnOnce(Option<&[u8]>) + Send>;

/// Where a connection leads.
enum Way {
    Socket(TcpStream),
    /// To a test.
    Channel(Sender<Vec<u8>>),
}

/// How many requests are under way.
#[derive(Default)]
struct Running {
    count: usize,
    /// The connection is not read until there are fewer.
    full: bool,
}

/// What the server knows of a connection.
pub struct Connection {
    /// The host at the other end.
    pub peer: IpAddr,
    way: Way,
    receiving: Mutex<Receiving>,
    running: Mutex<Running>,
    /// Whose turn it is to send.
    sending: Mutex<()>,
    /// Calls of the server's that nobody has sent yet.
    unsent: Mutex<VecDeque<Vec<u8>>>,
    open: AtomicBool,
    next_xid: AtomicU32,
    calls: Mutex<HashMap<u32, Then>>,
}

impl Connection {
    /// A connection that was accepted.
    pub(super) fn new(stream: TcpStream, peer: IpAddr, transfer_max: u32) -> Connection {
        // Nothing is lost without it but time.
        let _ = stream.set_nodelay(true);
        Self::on(Way::Socket(stream), peer, transfer_max)
    }

    fn on(way: Way, peer: IpAddr, transfer_max: u32) -> Connection {
        Connection {
            peer,
            way,
            receiving: Mutex::new(Receiving::new(transfer_max as usize + HEADERS_MAX)),
            running: Mutex::default(),
            sending: Mutex::default(),
            unsent: Mutex::default(),
            open: AtomicBool::new(true),
            next_xid: AtomicU32::new(1),
            calls: Mutex::default(),
        }
    }

    /// Whether it is still there.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// A number for a call of the server's.
    pub fn next_xid(&self) -> u32 {
        self.next_xid.fetch_add(1, Ordering::Relaxed)
    }

    /// Calls the client. `then` runs once. Does not wait.
    pub fn call(&self, xid: u32, record: Vec<u8>, then: Then) {
        let mut calls = lock(&self.calls);
        if calls.len() >= CALLS_MAX || !self.is_open() {
            drop(calls);
            return then(None);
        }
        calls.insert(xid, then);
        drop(calls);
        lock(&self.unsent).push_back(record);
        self.send_calls();
    }

    /// Sends calls that wait, unless somebody is sending, who does it then.
    fn send_calls(&self) {
        while !lock(&self.unsent).is_empty() {
            let turn = match self.sending.try_lock() {
                Ok(turn) => turn,
                Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
                Err(TryLockError::WouldBlock) => return,
            };
            // A full socket is one that nobody reads: the calls go out with the next reply, if that ever does. There is room for
            // something as short as a call in one that is not full.
            while self.has_room()
                && let Some(record) = { lock(&self.unsent).pop_front() }
            {
                self.send_now([&record, &[], &[]], &|| ());
            }
            drop(turn);
            if !self.has_room() {
                return;
            }
        }
    }

    fn has_room(&self) -> bool {
        match &self.way {
            Way::Socket(stream) => is_ready(stream.as_fd(), PollFlags::POLLOUT, Duration::ZERO),
            Way::Channel(_) => true,
        }
    }

    fn answered(&self, xid: u32, body: &[u8]) {
        let then = lock(&self.calls).remove(&xid);
        if let Some(then) = then {
            then(Some(body));
        }
    }

    /// Nothing more will come or go.
    pub(super) fn close(&self) {
        self.open.store(false, Ordering::Relaxed);
        self.shut_down();
        let calls = std::mem::take(&mut *lock(&self.calls));
        for then in calls.into_values() {
            then(None);
        }
    }

    /// Makes whoever reads or sends find the connection ended.
    pub(super) fn shut_down(&self) {
        if let Way::Socket(stream) = &self.way {
            // It may have ended by itself.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }

    /// Shuts it down if a record has been begun and not ended for too long.
    pub(super) fn check_patience(&self) {
        // Whoever holds it is receiving.
        let Ok(receiving) = self.receiving.try_lock() else { return };
        if receiving.begun().is_some_and(|begun| begun.elapsed() > PATIENCE) {
            tracing::debug!(peer = %self.peer, "an NFS connection ends: a request stopped in its middle");
            drop(receiving);
            self.shut_down();
        }
    }

    /// To wait for what comes.
    ///
    /// # Panics
    /// For a connection that leads nowhere.
    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        match &self.way {
            Way::Socket(stream) => stream.as_fd(),
            Way::Channel(_) => panic!("nothing comes from a channel"),
        }
    }

    /// The next record, if it is there. Only for who has the turn to read.
    pub(super) fn receive(&self) -> io::Result<Progress> {
        lock(&self.receiving).next(self.socket())
    }

    /// Whether bytes were received already that belong to the next record: the socket does not tell of them.
    pub(super) fn has_more(&self) -> bool {
        lock(&self.receiving).has_whole_record()
    }

    /// A request begins to run.
    pub(super) fn begin(&self) {
        lock(&self.running).count += 1;
    }

    /// Whether another may be read. If not, [`Self::end`] says when.
    pub(super) fn may_go_on(&self) -> bool {
        let mut running = lock(&self.running);
        running.full = running.count >= RUNNING_MAX;
        !running.full
    }

    /// A request was answered. Returns whether the connection can be read again, having been full.
    pub(super) fn end(&self) -> bool {
        let mut running = lock(&self.running);
        running.count -= 1;
        std::mem::take(&mut running.full)
    }

    /// Sends a reply. `waits` is called once before this waits, for others who send or for the peer. A peer that takes nothing for too
    /// long loses its connection.
    pub(super) fn send(&self, record: &Writer, waits: &dyn Fn()) {
        let turn = match self.sending.try_lock() {
            Ok(turn) => turn,
            Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
            Err(TryLockError::WouldBlock) => {
                waits();
                lock(&self.sending)
            }
        };
        self.send_now(record.parts(), waits);
        drop(turn);
        self.send_calls();
    }

    fn send_now(&self, record: [&[u8]; 3], waits: &dyn Fn()) {
        let stream = match &self.way {
            Way::Socket(stream) => stream,
            Way::Channel(channel) => {
                // A test that does not care has dropped the other end.
                let _ = channel.send(record.concat());
                return;
            }
        };
        let mark = (record.iter().map(|part| part.len()).sum::<usize>() as u32 | LAST_FRAGMENT).to_be_bytes();
        let mut parts = [&mark[..], record[0], record[1], record[2]].map(IoSlice::new);
        let mut parts = &mut parts[..];
        while !parts.is_empty() {
            let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
            match socket::sendmsg::<()>(stream.as_raw_fd(), parts, &[], flags, None) {
                Ok(sent) => IoSlice::advance_slices(&mut parts, sent),
                Err(Errno::EINTR) => {}
                Err(Errno::EAGAIN) => {
                    waits();
                    if !is_ready(stream.as_fd(), PollFlags::POLLOUT, PATIENCE) {
                        tracing::debug!(peer = %self.peer, "an NFS connection ends: a reply is not taken");
                        return self.shut_down();
                    }
                }
                Err(_) => return self.shut_down(),
            }
        }
    }
}

/// Whether a socket is ready in time. What failed is ready: the next call says how.
fn is_ready(socket: BorrowedFd<'_>, what: PollFlags, patience: Duration) -> bool {
    let end = Instant::now() + patience;
    loop {
        let left = PollTimeout::try_from(end.saturating_duration_since(Instant::now())).unwrap_or(PollTimeout::MAX);
        match nix::poll::poll(&mut [PollFd::new(socket, what)], left) {
            Err(Errno::EINTR) => {}
            found => return found != Ok(0),
        }
    }
}

/// What is sent back for a record, if anything.
pub fn answer(shared: &Arc<Shared>, connection: &Arc<Connection>, record: &[u8]) -> Option<Writer> {
    let call = match Message::parse(record) {
        Ok(Message::Call(call)) => call,
        Ok(Message::Reply { xid, body }) => {
            connection.answered(xid, body);
            return None;
        }
        Err(_) => return None,
    };
    let answer = match (call.program, call.version) {
        _ if !call.is_rpc_2() => Answer::OtherRpc,
        (rpc::NFS_PROGRAM, 4) => match call.procedure {
            0 => Answer::Success,
            1 => match admit(shared, connection, &call) {
                Some(refused) => refused,
                None => match compound::run(shared, connection, &call) {
                    Some(reply) => return Some(reply),
                    None => Answer::Garbage,
                },
            },
            _ => Answer::NoProcedure,
        },
        (rpc::NFS_PROGRAM, 3) if shared.options.version_3 => match admit(shared, connection, &call) {
            Some(refused) if call.procedure != 0 => refused,
            _ => return outcome(call.xid, nfs3::run(shared, connection.peer, &call)),
        },
        (mount::PROGRAM, 3) if shared.options.version_3 => {
            let allowed = shared.options.export.allows(connection.peer);
            return outcome(call.xid, mount::run(shared, allowed, &call));
        }
        (rpc::NFS_PROGRAM, _) => Answer::OtherVersions(if shared.options.version_3 { 3 } else { 4 }, 4),
        (mount::PROGRAM, _) if shared.options.version_3 => Answer::OtherVersions(3, 3),
        _ => Answer::NoProgram,
    };
    Some(rpc::reply(call.xid, answer))
}

/// Why a call is refused before it is looked at.
fn admit(shared: &Shared, connection: &Connection, call: &rpc::Call<'_>) -> Option<Answer> {
    if call.caller == Caller::Unknown {
        Some(Answer::BadCredentials)
    } else if !shared.options.export.allows(connection.peer) {
        Some(Answer::TooWeak)
    } else {
        None
    }
}

fn outcome(xid: u32, outcome: Outcome) -> Option<Writer> {
    let answer = match outcome {
        Outcome::Results(results) => {
            let mut w = rpc::reply(xid, Answer::Success);
            w.append(results);
            return Some(w);
        }
        Outcome::NoProcedure => Answer::NoProcedure,
        Outcome::Garbage => Answer::Garbage,
        Outcome::Silence => return None,
    };
    Some(rpc::reply(xid, answer))
}

/// A connection that leads nowhere, for tests, and what is sent to the client.
pub fn detached(peer: IpAddr) -> (Arc<Connection>, Receiver<Vec<u8>>) {
    let (channel, sent) = mpsc::channel();
    (Arc::new(Connection::on(Way::Channel(channel), peer, 1 << 20)), sent)
}
