//! One TCP connection: records in, records out.
//!
//! Calls of a connection run side by side on threads, as many as its clients may have under way; their replies go out in the
//! order in which they are done. A record longer than any session allows ends the connection. Memory is bounded by how many requests are
//! under way, on one connection and on all.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, watch};

use super::compound;
use super::rpc::{self, Answer, Caller, LAST_FRAGMENT, Message};
use super::server::Shared;
use crate::export::nfs3::{self, Outcome, mount};

/// Requests of a connection under way at a time, from the first byte read to the last byte of the reply sent.
const RUNNING_MAX: usize = 64;
/// The same over all connections: each takes the memory of a request and a reply.
pub const RUNNING_ALL_MAX: usize = 512;
/// Replies that wait to be sent.
const OUTGOING_MAX: usize = 64;
/// A peer that is in the middle of a record, or does not take a reply, has this long: it holds memory that others want.
const PATIENCE: Duration = Duration::from_secs(60);
/// Bytes that a record has beside the data of a WRITE.
const HEADERS_MAX: usize = 16 << 10;
/// Most fragments of a record.
const FRAGMENTS_MAX: usize = 64;
/// Calls to the client that are not answered yet.
const CALLS_MAX: usize = 64;

/// What is done with the reply to a call of the server's; `None` if there will be none.
pub type Then = Box<dyn FnOnce(Option<&[u8]>) + Send>;

/// What goes out, with the permits that end when it is sent.
#[derive(Debug)]
pub struct Outgoing {
    /// The record.
    pub record: Vec<u8>,
    _permits: Option<(OwnedSemaphorePermit, OwnedSemaphorePermit)>,
}

/// What the rest of the server knows of a connection.
pub struct Connection {
    /// The host at the other end.
    pub peer: IpAddr,
    outgoing: mpsc::Sender<Outgoing>,
    open: AtomicBool,
    next_xid: AtomicU32,
    calls: Mutex<HashMap<u32, Then>>,
}

impl Connection {
    /// Whether it is still there.
    pub fn is_open(&self) -> bool {
        self.open.load(Ordering::Relaxed)
    }

    /// A number for a call of the server's.
    pub fn next_xid(&self) -> u32 {
        self.next_xid.fetch_add(1, Ordering::Relaxed)
    }

    /// Calls the client. `then` runs once.
    pub fn call(&self, xid: u32, record: Vec<u8>, then: Then) {
        {
            let mut calls = self.calls.lock().expect("no panic under the lock");
            if calls.len() < CALLS_MAX && self.outgoing.try_send(Outgoing { record, _permits: None }).is_ok() {
                calls.insert(xid, then);
                return;
            }
        }
        then(None);
    }

    fn answered(&self, xid: u32, body: &[u8]) {
        let then = self.calls.lock().expect("no panic under the lock").remove(&xid);
        if let Some(then) = then {
            then(Some(body));
        }
    }

    fn close(&self) {
        self.open.store(false, Ordering::Relaxed);
        let calls = std::mem::take(&mut *self.calls.lock().expect("no panic under the lock"));
        for then in calls.into_values() {
            then(None);
        }
    }
}

/// Serves a connection until either side ends it.
pub async fn serve(shared: Arc<Shared>, stream: TcpStream, peer: IpAddr, mut stop: watch::Receiver<bool>) {
    // Nothing is lost without it but time.
    let _ = stream.set_nodelay(true);
    let (read, write) = stream.into_split();
    let (outgoing, replies) = mpsc::channel(OUTGOING_MAX);
    let connection = Arc::new(Connection {
        peer,
        outgoing,
        open: AtomicBool::new(true),
        next_xid: AtomicU32::new(1),
        calls: Mutex::new(HashMap::new()),
    });
    let writer = tokio::spawn(send_all(write, replies));
    tokio::select! {
        () = receive_all(&shared, &connection, BufReader::with_capacity(16 << 10, read)) => {}
        () = stopped(&mut stop) => {}
    }
    connection.close();
    // Requests that run hold the sender until they are done; what they answer may still arrive.
    drop(connection);
    if *stop.borrow() {
        writer.abort();
    }
}

/// Waits until the server stops, or is dropped.
pub async fn stopped(stop: &mut watch::Receiver<bool>) {
    // An error says that nobody is left who could stop it.
    let _ = stop.wait_for(|stop| *stop).await;
}

/// Sends replies, several with one call where several are there.
async fn send_all(mut write: OwnedWriteHalf, mut replies: mpsc::Receiver<Outgoing>) {
    let mut batch = Vec::new();
    while replies.recv_many(&mut batch, 16).await > 0 {
        let mut bytes = Vec::with_capacity(batch.iter().map(|reply: &Outgoing| reply.record.len() + 4).sum());
        for reply in &batch {
            bytes.extend_from_slice(&(reply.record.len() as u32 | LAST_FRAGMENT).to_be_bytes());
            bytes.extend_from_slice(&reply.record);
        }
        if !matches!(tokio::time::timeout(PATIENCE, write.write_all(&bytes)).await, Ok(Ok(()))) {
            return;
        }
        batch.clear();
    }
}

async fn receive_all(shared: &Arc<Shared>, connection: &Arc<Connection>, mut read: BufReader<OwnedReadHalf>) {
    let running = Arc::new(Semaphore::new(RUNNING_MAX));
    let record_max = shared.options.transfer_max as usize + HEADERS_MAX;
    loop {
        // Between records a peer may be silent for ever.
        match read.fill_buf().await {
            Ok(bytes) if !bytes.is_empty() => {}
            _ => return,
        }
        let Ok(mine) = running.clone().acquire_owned().await else { return };
        let Ok(of_all) = shared.running.clone().acquire_owned().await else { return };
        let record = match tokio::time::timeout(PATIENCE, read_record(&mut read, record_max)).await {
            Ok(Ok(record)) => record,
            Ok(Err(e)) => {
                tracing::debug!(peer = %connection.peer, "an NFS connection ends: {e}");
                return;
            }
            Err(_) => {
                tracing::debug!(peer = %connection.peer, "an NFS connection ends: a request stopped in its middle");
                return;
            }
        };
        let (shared, connection) = (shared.clone(), connection.clone());
        tokio::task::spawn_blocking(move || {
            if let Some(record) = answer(&shared, &connection, &record) {
                // An error means that the connection is gone.
                let _ = connection.outgoing.blocking_send(Outgoing { record, _permits: Some((mine, of_all)) });
            }
        });
    }
}

/// The next record.
async fn read_record(read: &mut BufReader<OwnedReadHalf>, max: usize) -> std::io::Result<Vec<u8>> {
    let mut record = Vec::new();
    for _ in 0..FRAGMENTS_MAX {
        let mark = read.read_u32().await?;
        let len = (mark & !LAST_FRAGMENT) as usize;
        if record.len() + len > max {
            return Err(std::io::Error::other(format!("a record of more than {max} bytes")));
        }
        // Memory grows with what arrives, not with what is announced.
        let got = (&mut *read).take(len as u64).read_to_end(&mut record).await?;
        if got < len {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        if mark & LAST_FRAGMENT != 0 {
            return Ok(record);
        }
    }
    Err(std::io::Error::other(format!("a record of more than {FRAGMENTS_MAX} fragments")))
}

/// What is sent back for a record, if anything.
pub fn answer(shared: &Arc<Shared>, connection: &Arc<Connection>, record: &[u8]) -> Option<Vec<u8>> {
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
                    Some(results) => return Some(success(call.xid, &results)),
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
    Some(rpc::reply(call.xid, answer).into_bytes())
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

fn success(xid: u32, results: &[u8]) -> Vec<u8> {
    let mut w = rpc::reply(xid, Answer::Success);
    w.raw(results);
    w.into_bytes()
}

fn outcome(xid: u32, outcome: Outcome) -> Option<Vec<u8>> {
    let answer = match outcome {
        Outcome::Results(results) => return Some(success(xid, &results)),
        Outcome::NoProcedure => Answer::NoProcedure,
        Outcome::Garbage => Answer::Garbage,
        Outcome::Silence => return None,
    };
    Some(rpc::reply(xid, answer).into_bytes())
}

/// A connection that leads nowhere, for tests.
pub fn detached(peer: IpAddr) -> (Arc<Connection>, mpsc::Receiver<Outgoing>) {
    let (outgoing, replies) = mpsc::channel(OUTGOING_MAX);
    let connection = Connection {
        peer,
        outgoing,
        open: AtomicBool::new(true),
        next_xid: AtomicU32::new(1),
        calls: Mutex::new(HashMap::new()),
    };
    (Arc::new(connection), replies)
}
