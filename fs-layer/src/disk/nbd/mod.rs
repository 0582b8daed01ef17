//! A disk behind an NBD server: blockd, or any other.
//!
//! A call takes one of several connections for itself and sends all its requests before it waits for replies, so
//! that requests of one call and of many are under way at once. Connections share what is written if the server says so
//! (CAN_MULTI_CONN); of one that does not, there is only one.
//!
//! **When the server goes away** the calls that have no answer wait, and are made again from their beginning once it is
//! back: each may be done twice without harm. What was answered and not yet flushed is another matter. A server on this
//! machine keeps it as long as the machine runs; one elsewhere may have lost it in a power cut that we survived. So over TCP all of it is kept in memory
//! until a flush has covered it, and is sent again, in order, before anything else. Beyond [`NbdOptions::unflushed_max`]
//! a flush of our own makes room.

mod connect;
mod unflushed;
mod url;

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use blockd::export::nbd::client::{NbdClient, ReplyData, Request};

use super::{BLOCK_BYTES, BlockAddress, Disk};
pub use blockd::export::nbd::client::Listed;
use connect::Server;
pub use connect::{NbdError, exports};
use unflushed::{Change, Unflushed};
pub use url::{BadUrl, NbdUrl};

/// Bytes of one request, unless the server wants fewer.
const REQUEST_BYTES_MAX: usize = 1 << 20;
/// Bytes of one discard: the most that is a number of blocks and fits into the protocol's 32 bits.
const DISCARD_BYTES_MAX: u64 = (u32::MAX as u64) & !(BLOCK_BYTES as u64 - 1);
/// Requests of one call that may be under way.
const IN_FLIGHT_MAX: usize = 64;
/// Pauses between attempts to reach a server that is away.
const PAUSES: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(2));

/// How a server is used.
#[derive(Clone, Debug)]
pub struct NbdOptions {
    /// The most connections.
    pub connections: usize,
    /// How long a server may be away before calls fail; `None` waits for ever.
    pub patience: Option<Duration>,
    /// Bytes that are kept for a server elsewhere until a flush covers them.
    pub unflushed_max: usize,
    /// Nothing will be written: an export that refuses writes, as that of a snapshot does, is as good as any.
    pub read_only: bool,
}

impl Default for NbdOptions {
    fn default() -> NbdOptions {
        NbdOptions { connections: 8, patience: None, unflushed_max: 64 << 20, read_only: false }
    }
}

/// See the module.
pub struct NbdDisk {
    server: Server,
    options: NbdOptions,
    blocks: u64,
    request_bytes_max: usize,
    trims: bool,
    /// Calls hold it shared; whoever reconnects holds it alone. Counts how often that was.
    gate: RwLock<u64>,
    pool: Mutex<Pool>,
    freed: Condvar,
    unflushed: Option<Mutex<Unflushed>>,
}

#[derive(Default)]
struct Pool {
    idle: Vec<NbdClient>,
    /// Connections that exist or are being made.
    count: usize,
    count_max: usize,
}

/// What a call asks for.
enum Work<'a> {
    Read(u64, &'a mut [u8]),
    Write(&'a [(BlockAddress, &'a [u8])]),
    Flush,
    Discard(u64, u64),
}

/// Why an attempt failed.
enum Failed {
    /// The connection; the server may be back soon.
    Connection(io::Error),
    /// The server said no.
    Answer(io::Error),
}

impl NbdDisk {
    /// Connects.
    ///
    /// # Errors
    /// If the server cannot be reached now, has no such export, or not one that a filesystem can be on.
    pub fn connect(url: &NbdUrl, options: NbdOptions) -> Result<NbdDisk, NbdError> {
        let mut server = Server::new(url.clone(), options.read_only);
        let client = server.connect()?;
        server.know(&client);
        let facts = server.check(&client)?;
        let unflushed = url.is_remote().then(|| Mutex::new(Unflushed::default()));
        let count_max = if facts.shares_flushes { options.connections.max(1) } else { 1 };
        Ok(NbdDisk {
            server,
            options,
            blocks: facts.size / BLOCK_BYTES as u64,
            request_bytes_max: (facts.request_bytes_max as usize).clamp(BLOCK_BYTES, REQUEST_BYTES_MAX),
            trims: facts.trims,
            gate: RwLock::new(0),
            pool: Mutex::new(Pool { idle: vec![client], count: 1, count_max }),
            freed: Condvar::new(),
            unflushed,
        })
    }

    /// Where it is, for people.
    pub fn url(&self) -> &NbdUrl {
        self.server.url()
    }

    /// What the server said of the export; may be empty.
    pub fn description(&self) -> &str {
        self.server.description()
    }

    /// Does the work, however often the server goes away meanwhile.
    fn run(&self, mut work: Work<'_>) -> io::Result<()> {
        self.check(&work)?;
        let mut deadline = None;
        loop {
            let gate = self.gate.read().unwrap_or_else(PoisonError::into_inner);
            let incarnation = *gate;
            let error = match self.attempt(&mut work) {
                Ok(()) => return Ok(()),
                Err(Failed::Answer(error)) => return Err(error),
                Err(Failed::Connection(error)) => error,
            };
            drop(gate);
            let patience = self.options.patience;
            let deadline = *deadline.get_or_insert_with(|| patience.map(|patience| Instant::now() + patience));
            self.reconnect(incarnation, error, deadline)?;
        }
    }

    fn attempt(&self, work: &mut Work<'_>) -> Result<(), Failed> {
        let covered = match work {
            Work::Flush => self.unflushed().map(|unflushed| unflushed.end()),
            _ => None,
        };
        let mut client = self.take().map_err(Failed::Connection)?;
        match transact(&mut client, work, self.request_bytes_max) {
            Err(Failed::Connection(error)) => {
                drop(client);
                self.pool().count -= 1;
                self.freed.notify_one();
                return Err(Failed::Connection(error));
            }
            result => {
                self.pool().idle.push(client);
                self.freed.notify_one();
                result?;
            }
        }
        if let Some(mut unflushed) = self.unflushed() {
            match work {
                Work::Read(..) => {}
                Work::Flush => unflushed.drop_until(covered.unwrap_or(0)),
                Work::Write(runs) => {
                    for (at, data) in runs.iter() {
                        unflushed.push(Change::Write { offset: at * BLOCK_BYTES as u64, data: data.to_vec() });
                    }
                }
                Work::Discard(offset, len) => unflushed.push(Change::Discard { offset: *offset, len: *len }),
            }
        }
        Ok(())
    }

    fn check(&self, work: &Work<'_>) -> io::Result<()> {
        let whole = |at: u64, bytes: usize| {
            assert!(bytes.is_multiple_of(BLOCK_BYTES), "a buffer that is not whole blocks");
            let end = at.checked_add((bytes / BLOCK_BYTES) as u64);
            if end.is_some_and(|end| end <= self.blocks) { Ok(()) } else { Err(self.outside(at)) }
        };
        match work {
            Work::Read(offset, buffer) => whole(offset / BLOCK_BYTES as u64, buffer.len()),
            Work::Write(runs) => runs.iter().try_for_each(|(at, data)| whole(*at, data.len())),
            Work::Flush => Ok(()),
            Work::Discard(offset, len) => {
                let end = offset.checked_add(*len).map(|end| end / BLOCK_BYTES as u64);
                if end.is_some_and(|end| end <= self.blocks) {
                    Ok(())
                } else {
                    Err(self.outside(offset / BLOCK_BYTES as u64))
                }
            }
        }
    }

    fn outside(&self, at: BlockAddress) -> io::Error {
        let what = format!("block {at} is outside {}, which has {} blocks", self.server.url(), self.blocks);
        io::Error::new(io::ErrorKind::InvalidInput, what)
    }

    /// A connection for one call alone.
    fn take(&self) -> io::Result<NbdClient> {
        let mut pool = self.pool();
        loop {
            if let Some(client) = pool.idle.pop() {
                return Ok(client);
            }
            if pool.count < pool.count_max {
                pool.count += 1;
                drop(pool);
                return self.server.connect().map_err(|error| {
                    self.pool().count -= 1;
                    self.freed.notify_one();
                    error.into_io()
                });
            }
            pool = self.freed.wait(pool).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Waits until the server is back, and gives it what it may have lost. Calls that lost their connection at the same time
    /// find it done.
    fn reconnect(&self, incarnation: u64, why: io::Error, deadline: Option<Instant>) -> io::Result<()> {
        let mut gate = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        if *gate != incarnation {
            return Ok(());
        }
        tracing::warn!("lost {}: {why}; waiting for it", self.server.url());
        let mut pause = PAUSES.0;
        let client = loop {
            // All calls wait at the gate, so nobody has a connection, and the idle ones are as dead.
            let result = self.server.connect().and_then(|client| {
                self.server.check_again(&client, self.blocks * BLOCK_BYTES as u64)?;
                Ok(client)
            });
            let result = result.map_err(|error| (error.is_final(), error.into_io()));
            match result.and_then(|client| self.replay(client).map_err(|error| (false, error))) {
                Ok(client) => break client,
                Err((true, error)) => return Err(error),
                Err((false, error)) if deadline.is_some_and(|deadline| Instant::now() >= deadline) => {
                    return Err(error);
                }
                Err((false, error)) => tracing::debug!(%error, "still away"),
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSES.1);
        };
        let mut pool = self.pool();
        pool.idle = vec![client];
        pool.count = 1;
        drop(pool);
        *gate += 1;
        tracing::info!("{} is back", self.server.url());
        Ok(())
    }

    fn replay(&self, mut client: NbdClient) -> io::Result<NbdClient> {
        let Some(unflushed) = self.unflushed() else { return Ok(client) };
        for change in unflushed.iter() {
            let result = match change {
                Change::Write { offset, data } => {
                    let runs = [(offset / BLOCK_BYTES as u64, &data[..])];
                    transact(&mut client, &mut Work::Write(&runs), self.request_bytes_max)
                }
                Change::Discard { offset, len } => {
                    transact(&mut client, &mut Work::Discard(*offset, *len), self.request_bytes_max)
                }
            };
            result.map_err(|failed| match failed {
                Failed::Connection(error) | Failed::Answer(error) => error,
            })?;
        }
        Ok(client)
    }

    /// Flushes when there would be more than may be kept.
    fn make_room(&self, bytes: usize) -> io::Result<()> {
        let full = self.unflushed().is_some_and(|unflushed| !unflushed.has_room(bytes, self.options.unflushed_max));
        if full { self.run(Work::Flush) } else { Ok(()) }
    }

    fn pool(&self) -> MutexGuard<'_, Pool> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn unflushed(&self) -> Option<MutexGuard<'_, Unflushed>> {
        self.unflushed.as_ref().map(|unflushed| unflushed.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Disk for NbdDisk {
    fn blocks(&self) -> u64 {
        self.blocks
    }

    fn read(&self, at: BlockAddress, buffer: &mut [u8]) -> io::Result<()> {
        self.run(Work::Read(at * BLOCK_BYTES as u64, buffer))
    }

    fn write(&self, at: BlockAddress, data: &[u8]) -> io::Result<()> {
        self.write_all(&[(at, data)])
    }

    fn write_all(&self, runs: &[(BlockAddress, &[u8])]) -> io::Result<()> {
        self.make_room(runs.iter().map(|(_, data)| data.len()).sum())?;
        self.run(Work::Write(runs))
    }

    fn flush(&self) -> io::Result<()> {
        self.run(Work::Flush)
    }

    fn discard(&self, at: BlockAddress, count: u64) -> io::Result<()> {
        if count == 0 {
            return Ok(());
        }
        if !self.trims {
            return self.zero(at, count);
        }
        self.make_room(0)?;
        self.run(Work::Discard(at * BLOCK_BYTES as u64, count * BLOCK_BYTES as u64))
    }
}

impl NbdDisk {
    /// Zeros in place of a discard, on a server that has none.
    fn zero(&self, at: BlockAddress, count: u64) -> io::Result<()> {
        let zeros = vec![0; REQUEST_BYTES_MAX];
        let step = (REQUEST_BYTES_MAX / BLOCK_BYTES) as u64;
        let mut done = 0;
        while done < count {
            let now = step.min(count - done);
            self.write(at + done, &zeros[..now as usize * BLOCK_BYTES])?;
            done += now;
        }
        Ok(())
    }
}

/// Sends all requests of a call and takes in their replies. On [`Failed::Answer`] all are answered and the connection
/// is as good as before.
fn transact(client: &mut NbdClient, work: &mut Work<'_>, bytes_max: usize) -> Result<(), Failed> {
    let mut refused = None;
    match work {
        Work::Read(offset, buffer) => {
            // Cookies count up by one, so that they say which part an answer is for.
            let mut parts = buffer.chunks_mut(bytes_max).enumerate();
            let mut waiting: Vec<(u64, &mut [u8])> = Vec::new();
            loop {
                while waiting.len() < IN_FLIGHT_MAX
                    && let Some((index, part)) = parts.next()
                {
                    let at = *offset + (index * bytes_max) as u64;
                    let cookie = client.submit(Request::Read { offset: at, len: part.len() as u32 });
                    waiting.push((cookie.map_err(Failed::Connection)?, part));
                }
                if waiting.is_empty() {
                    break;
                }
                let (cookie, reply) = client.next_reply().map_err(Failed::Connection)?;
                let index = waiting.iter().position(|(asked, _)| *asked == cookie);
                let (_, part) = waiting.swap_remove(index.ok_or_else(|| Failed::Connection(strange()))?);
                match reply {
                    Ok(ReplyData::Data(data)) if data.len() == part.len() => part.copy_from_slice(&data),
                    Ok(_) => return Err(Failed::Connection(strange())),
                    Err(errno) => refused = Some(errno),
                }
            }
        }
        Work::Write(runs) => {
            for (at, data) in runs.iter() {
                for (index, part) in data.chunks(bytes_max).enumerate() {
                    let offset = at * BLOCK_BYTES as u64 + (index * bytes_max) as u64;
                    send(client, Request::Write { offset, data: part, fua: false }, &mut refused)?;
                }
            }
        }
        Work::Flush => send(client, Request::Flush, &mut refused)?,
        Work::Discard(offset, len) => {
            let mut done = 0;
            while done < *len {
                let now = (*len - done).min(DISCARD_BYTES_MAX);
                send(client, Request::Trim { offset: *offset + done, len: now as u32, fua: false }, &mut refused)?;
                done += now;
            }
        }
    }
    while client.in_flight() > 0 {
        settle(client, &mut refused)?;
    }
    refused.map_or(Ok(()), |errno| Err(Failed::Answer(errno.into())))
}

type Refused = Option<blockd::export::nbd::client::Errno>;

fn send(client: &mut NbdClient, request: Request<'_>, refused: &mut Refused) -> Result<(), Failed> {
    if client.in_flight() >= IN_FLIGHT_MAX {
        settle(client, refused)?;
    }
    client.submit(request).map(drop).map_err(Failed::Connection)
}

fn settle(client: &mut NbdClient, refused: &mut Refused) -> Result<(), Failed> {
    let (_, reply) = client.next_reply().map_err(Failed::Connection)?;
    if let Err(errno) = reply {
        refused.get_or_insert(errno);
    }
    Ok(())
}

fn strange() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "an answer that does not fit its request")
}

#[cfg(test)]
mod tests;
