//! The back channel: calls of the server to the client over the connections that the client made (RFC 8881 sections 2.10.3.1 and 20).
//!
//! One slot, one call at a time, kept short: all that is sent is CB_NOTIFY_LOCK, "ask again for the lock that was denied", which may be lost without harm
//! because clients also ask by themselves.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, Weak};

use super::connection::Connection;
use super::rpc::{self, Caller};
use super::state::session::{Channel, SessionId};
use super::xdr::{Reader, Writer};

/// Most calls that wait for their turn.
const WAITING_MAX: usize = 1024;

const CB_COMPOUND: u32 = 1;
const CB_VERSION: u32 = 1;
const OP_CB_SEQUENCE: u32 = 11;
const OP_CB_NOTIFY_LOCK: u32 = 13;

/// The way to a client within one session.
pub struct BackChannel {
    /// What the client said it can take.
    pub attributes: Channel,
    inner: Mutex<Inner>,
}

struct Inner {
    program: u32,
    caller: Caller,
    minor: u32,
    connections: Vec<Weak<Connection>>,
    /// Number of the last call that was answered.
    sequence: u32,
    busy: bool,
    /// Operations of the calls to come.
    waiting: VecDeque<Vec<u8>>,
}

impl BackChannel {
    /// One without connections, to the client's program.
    pub fn new(attributes: Channel, program: u32, caller: Caller, minor: u32) -> BackChannel {
        let inner = Inner {
            program,
            caller,
            minor,
            connections: Vec::new(),
            sequence: 0,
            busy: false,
            waiting: VecDeque::new(),
        };
        BackChannel { attributes, inner: Mutex::new(inner) }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().expect("no panic under the lock")
    }

    /// Lets calls go over a connection.
    pub fn bind(&self, connection: &Arc<Connection>) {
        let mut inner = self.inner();
        inner.connections.retain(|other| other.upgrade().is_some_and(|other| !Arc::ptr_eq(&other, connection)));
        inner.connections.push(Arc::downgrade(connection));
        // What was under way on a connection that is gone will not be answered.
        inner.busy = false;
    }

    /// Whether some connection is there.
    pub fn is_bound(&self) -> bool {
        self.inner().connections.iter().any(|connection| connection.upgrade().is_some_and(|c| c.is_open()))
    }

    /// Whether the client had a connection for calls, and it is gone: it should give another.
    pub fn lost(&self) -> bool {
        let inner = self.inner();
        !inner.connections.is_empty() && !inner.connections.iter().any(|c| c.upgrade().is_some_and(|c| c.is_open()))
    }

    /// Another program and other credentials (BACKCHANNEL_CTL).
    pub fn set(&self, program: u32, caller: Caller) {
        let mut inner = self.inner();
        inner.program = program;
        inner.caller = caller;
    }
}

/// Tells the client that a lock may be free: its owner's name, and the handle of the file.
pub fn notify_lock(session: &Arc<super::state::session::Session>, handle: &[u8], client: u64, owner: &[u8]) {
    let mut operation = Writer::default();
    operation.u32(OP_CB_NOTIFY_LOCK);
    operation.opaque(handle);
    operation.u64(client);
    operation.opaque(owner);
    {
        let mut inner = session.back.inner();
        if inner.waiting.len() >= WAITING_MAX {
            return;
        }
        inner.waiting.push_back(operation.into_bytes());
    }
    send_next(session);
}

/// Sends the next call, if none is under way.
fn send_next(session: &Arc<super::state::session::Session>) {
    let mut inner = session.back.inner();
    if inner.busy {
        return;
    }
    let Some(connection) = inner.connections.iter().filter_map(Weak::upgrade).find(|c| c.is_open()) else {
        // The client asks again by itself.
        inner.waiting.clear();
        return;
    };
    let Some(operation) = inner.waiting.pop_front() else { return };
    let xid = connection.next_xid();
    let mut w = rpc::call(xid, inner.program, CB_VERSION, CB_COMPOUND, &inner.caller);
    write_compound(&mut w, session.id, inner.minor, inner.sequence.wrapping_add(1), &operation);
    inner.busy = true;
    drop(inner);
    let answered = session.clone();
    let then = Box::new(move |reply: Option<&[u8]>| {
        {
            let mut inner = answered.back.inner();
            inner.busy = false;
            if reply.is_some_and(was_run) {
                inner.sequence = inner.sequence.wrapping_add(1);
            }
        }
        send_next(&answered);
    });
    connection.call(xid, w.into_bytes(), then);
}

fn write_compound(w: &mut Writer, session: SessionId, minor: u32, sequence: u32, operation: &[u8]) {
    w.opaque(b"");
    w.u32(minor);
    w.u32(0);
    w.u32(2);
    w.u32(OP_CB_SEQUENCE);
    w.fixed(&session);
    w.u32(sequence);
    w.u32(0);
    w.u32(0);
    w.bool(false);
    w.u32(0);
    w.raw(operation);
}

/// Whether the number of a call is used up, by the reply to it: CB_SEQUENCE succeeded, or its number was the last one's.
fn was_run(body: &[u8]) -> bool {
    let parse = || {
        let mut r = Reader::new(body);
        let accepted = r.u32()? == 0;
        r.u32()?;
        r.opaque(400)?;
        let success = r.u32()? == 0;
        r.u32()?;
        r.opaque(1024)?;
        let results = r.u32()?;
        let (operation, status) = (r.u32()?, r.u32()?);
        Ok::<_, super::status::Nfs4Error>(
            accepted && success && results > 0 && operation == OP_CB_SEQUENCE && [0, 10068, 10063].contains(&status),
        )
    };
    parse().unwrap_or(false)
}
