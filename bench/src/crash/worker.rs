//! The load: one thread per connection, many requests in flight on each.

use std::collections::HashMap;
use std::io;
use std::ops::AddAssign;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use blockd::export::nbd::client::{Errno, ReplyData, Request};
use blockd::export::nbd::proto::errno;
use rand::Rng;
use rand::rngs::SmallRng;

use crate::client::Client;

use super::content::{self, BLOCK_SECTORS, Found, SECTOR, WriteId};
use super::model::{Kind, Model, ReadWindow};

/// Longest write or read under load, in sectors: 1 MiB and 64 KiB.
const WRITE_SECTORS_MAX: u32 = 2048;
const READ_SECTORS_MAX: u32 = 128;
/// Longest trim or zeroing, in sectors: 16 MiB.
const ZERO_SECTORS_MAX: u32 = 32768;
/// Half of the requests go to this many sectors (2 MiB), so that they meet.
const HOT_SECTORS: u32 = 4096;

/// What the load came to.
#[derive(Clone, Copy, Debug, Default)]
pub struct Load {
    /// Writes, trims and zeroings acknowledged.
    pub acknowledged: u64,
    /// Their bytes.
    pub bytes: u64,
    /// Flushes answered.
    pub flushes: u64,
    /// Reads checked while others wrote.
    pub reads: u64,
}

impl AddAssign for Load {
    fn add_assign(&mut self, other: Self) {
        self.acknowledged += other.acknowledged;
        self.bytes += other.bytes;
        self.flushes += other.flushes;
        self.reads += other.reads;
    }
}

/// What the threads of a round share.
pub struct Shared {
    pub model: Mutex<Model>,
    pub seed: u64,
    /// The server is about to go: broken connections are no surprise.
    pub ending: AtomicBool,
    /// A thread has failed: the others need not go on.
    pub failed: AtomicBool,
    /// No new requests for now.
    pub resting: AtomicBool,
}

impl Shared {
    pub fn model(&self) -> MutexGuard<'_, Model> {
        // A thread that panics while it holds the model fails the whole run anyway.
        self.model.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

enum Operation {
    Write { id: WriteId, sectors: u32 },
    Flush,
    Read(ReadWindow),
}

/// Loads one connection until it breaks (when it may) or something is wrong.
pub fn work(client: Box<dyn Client>, shared: &Shared, rng: SmallRng, depth: usize) -> Result<Load> {
    let mut worker = Worker {
        client,
        shared,
        rng,
        cursor: 0,
        in_flight: HashMap::new(),
        buffer: vec![0; WRITE_SECTORS_MAX as usize * SECTOR],
        load: Load::default(),
    };
    let result = worker.go_on(depth);
    if result.is_err() {
        shared.failed.store(true, Ordering::SeqCst);
    }
    result.map(|()| worker.load)
}

struct Worker<'a> {
    client: Box<dyn Client>,
    shared: &'a Shared,
    rng: SmallRng,
    /// Where the sequential reader is.
    cursor: u32,
    in_flight: HashMap<u64, Operation>,
    buffer: Vec<u8>,
    load: Load,
}

impl Worker<'_> {
    fn go_on(&mut self, depth: usize) -> Result<()> {
        loop {
            match self.step(depth)? {
                Ok(()) => {}
                Err(error) if self.may_break(&error) => return Ok(()),
                Err(error) => {
                    return Err(error).context("the connection broke though nobody had ended the server");
                }
            }
        }
    }

    /// Whether this is how connections break when the server is ended, or another thread has failed already.
    fn may_break(&self, error: &io::Error) -> bool {
        use io::ErrorKind::*;
        let broken = matches!(error.kind(), UnexpectedEof | ConnectionReset | BrokenPipe | ConnectionAborted);
        broken && (self.shared.ending.load(Ordering::SeqCst) || self.shared.failed.load(Ordering::SeqCst))
    }

    /// The inner result is of the connection, the outer one of the data.
    fn step(&mut self, depth: usize) -> Result<io::Result<()>> {
        if self.shared.failed.load(Ordering::SeqCst) {
            return Ok(Err(io::ErrorKind::UnexpectedEof.into()));
        }
        let resting = self.shared.resting.load(Ordering::SeqCst);
        if resting && self.in_flight.is_empty() {
            std::thread::sleep(Duration::from_millis(5));
            return Ok(Ok(()));
        }
        while !resting && self.in_flight.len() < depth {
            if let Err(error) = self.submit() {
                return Ok(Err(error));
            }
        }
        let (cookie, result) = match self.client.next_reply() {
            Ok(reply) => reply,
            Err(error) => return Ok(Err(error)),
        };
        let operation = self.in_flight.remove(&cookie).context("a reply to no request")?;
        match result {
            Ok(data) => self.answered(operation, data)?,
            // Applied or not, like a request in flight at the end.
            Err(Errno(errno::ESHUTDOWN)) if self.shared.ending.load(Ordering::SeqCst) => {}
            Err(error) => bail!("a valid request was answered with: {error}"),
        }
        Ok(Ok(()))
    }

    fn answered(&mut self, operation: Operation, data: ReplyData) -> Result<()> {
        match (operation, data) {
            (Operation::Write { id, sectors }, ReplyData::Done) => {
                self.shared.model().acknowledge(id);
                self.load.acknowledged += 1;
                self.load.bytes += u64::from(sectors) * SECTOR as u64;
            }
            (Operation::Flush, ReplyData::Done) => self.load.flushes += 1,
            (Operation::Read(window), ReplyData::Data(bytes)) => {
                let found: Vec<Found> = bytes
                    .chunks_exact(SECTOR)
                    .zip(window.start()..)
                    .map(|(piece, sector)| content::identify(self.shared.seed, sector, piece))
                    .collect();
                if let Err(violation) = self.shared.model().check_read(&window, &found) {
                    bail!("sector {}: {}", violation.sector, violation.what);
                }
                self.load.reads += 1;
            }
            _ => bail!("a reply does not fit its request"),
        }
        Ok(())
    }

    fn submit(&mut self) -> io::Result<()> {
        let fua = self.rng.random_ratio(1, 10);
        let (cookie, operation) = match self.rng.random_range(0..100) {
            0..60 => {
                let (start, sectors) = self.place(WRITE_SECTORS_MAX);
                let id = self.shared.model().submit(Kind::Data, start, sectors);
                let data = &mut self.buffer[..sectors as usize * SECTOR];
                content::fill(self.shared.seed, id, start, data);
                let request = Request::Write { offset: offset(start), data, fua };
                (self.client.submit(request)?, Operation::Write { id, sectors })
            }
            60..68 => {
                let (start, sectors) = self.place(ZERO_SECTORS_MAX);
                let id = self.shared.model().submit(Kind::Zeroes, start, sectors);
                let request = Request::WriteZeroes {
                    offset: offset(start),
                    len: offset(sectors) as u32,
                    fua,
                    no_hole: self.rng.random(),
                };
                (self.client.submit(request)?, Operation::Write { id, sectors })
            }
            68..74 => {
                let (start, sectors) = self.place(ZERO_SECTORS_MAX);
                let id = self.shared.model().submit(Kind::Trim, start, sectors);
                let request = Request::Trim { offset: offset(start), len: offset(sectors) as u32, fua };
                (self.client.submit(request)?, Operation::Write { id, sectors })
            }
            74..80 => (self.client.submit(Request::Flush)?, Operation::Flush),
            _ => {
                let (start, sectors) = self.place_read();
                let window = self.shared.model().begin_read(start, sectors);
                let request = Request::Read { offset: offset(start), len: offset(sectors) as u32 };
                (self.client.submit(request)?, Operation::Read(window))
            }
        };
        self.in_flight.insert(cookie, operation);
        Ok(())
    }

    /// Half of the reads go through the volume from end to end, so that whoever reads ahead does; the others jump.
    fn place_read(&mut self) -> (u32, u32) {
        if self.rng.random() {
            return self.place(READ_SECTORS_MAX);
        }
        let start = self.cursor;
        let volume = self.shared.model().sector_count();
        let sectors = READ_SECTORS_MAX.min(volume - start);
        self.cursor = (start + sectors) % volume;
        (start, sectors)
    }

    /// A range of up to `sectors_max`: every size class as likely, half on whole blocks, half in the hot part.
    fn place(&mut self, sectors_max: u32) -> (u32, u32) {
        let volume = self.shared.model().sector_count();
        let class = self.rng.random_range(0..=sectors_max.ilog2());
        let mut sectors = self.rng.random_range(1..=1 << class).min(volume);
        let room = if self.rng.random() { HOT_SECTORS.min(volume) } else { volume };
        let mut start = self.rng.random_range(0..room).min(volume - sectors);
        if self.rng.random() {
            start -= start % BLOCK_SECTORS;
            sectors = sectors.next_multiple_of(BLOCK_SECTORS).min(volume - start);
        }
        (start, sectors)
    }
}

fn offset(sectors: u32) -> u64 {
    u64::from(sectors) * SECTOR as u64
}
