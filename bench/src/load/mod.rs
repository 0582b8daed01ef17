//! The load generator: one thread, no allocation per request; NBD with simple replies, or NVMe/TCP without digests.
//!
//! It shares the machine with the server it measures, so it must cost as little as possible and the same for every
//! server: payloads are sent from one pool without copying, data of reads is received and dropped.

mod connection;
mod histogram;
mod poll;
mod wire;

use std::io;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{RngCore, SeedableRng};

use connection::Connection;
pub use histogram::Histogram;

/// Where a server listens.
#[derive(Clone, Debug)]
pub enum Endpoint {
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP address.
    Tcp(std::net::SocketAddr),
    /// A TCP address where NVMe is spoken; the export is then the name of a subsystem.
    Nvme(std::net::SocketAddr),
}

/// What one slot does, again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pattern {
    /// Write at random block addresses.
    RandomWrite,
    /// The same, each write followed by a flush; the pair counts as one operation.
    RandomWriteFlush,
    /// Read at random block addresses.
    RandomRead,
    /// Write one block after the other; each connection has its own part of the span.
    SequentialWrite,
    /// Read one block after the other.
    SequentialRead,
}

impl Pattern {
    /// Whether it changes the volume.
    pub fn writes(self) -> bool {
        !matches!(self, Pattern::RandomRead | Pattern::SequentialRead)
    }

    fn sequential(self) -> bool {
        matches!(self, Pattern::SequentialWrite | Pattern::SequentialRead)
    }
}

/// A load to put on a server.
#[derive(Clone, Copy, Debug)]
pub struct Workload {
    /// What to do.
    pub pattern: Pattern,
    /// Bytes per request.
    pub block_bytes: u32,
    /// Requests in flight on each connection.
    pub depth: usize,
    /// Connections.
    pub connections: usize,
    /// The load stays below this byte offset.
    pub span_bytes: u64,
}

/// What a run came to.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Operations finished within `elapsed`.
    pub operations: u64,
    /// Time measured.
    pub elapsed: Duration,
    /// Latencies of the operations.
    pub latency: Histogram,
}

impl Outcome {
    /// Operations per second.
    pub fn per_second(&self) -> f64 {
        self.operations as f64 / self.elapsed.as_secs_f64()
    }
}

/// When a run ends.
#[derive(Clone, Copy, Debug)]
pub enum Until {
    /// After a time to get going, which is not counted, and a time that is.
    Time {
        /// Not counted.
        warm_up: Duration,
        /// Counted.
        measured: Duration,
    },
    /// After this many operations, all counted.
    Operations(u64),
}

/// Incompressible bytes from which all writes take their payload.
pub struct Pool(Vec<u8>);

impl Pool {
    /// Payloads of up to `block_bytes_max` bytes.
    pub fn new(block_bytes_max: usize, seed: u64) -> Self {
        let mut bytes = vec![0; block_bytes_max + (4 << 20)];
        SmallRng::seed_from_u64(seed).fill_bytes(&mut bytes);
        Self(bytes)
    }

    /// `len` bytes that depend on `pick`.
    pub fn payload(&self, pick: u64, len: usize) -> &[u8] {
        let start = (pick as usize % (self.0.len() - len + 1)) & !63;
        &self.0[start..start + len]
    }
}

/// Runs `workload` against the export and waits until everything sent is answered.
pub fn run(
    endpoint: &Endpoint,
    export: &str,
    workload: &Workload,
    until: Until,
    pool: &Pool,
    seed: u64,
) -> io::Result<Outcome> {
    let blocking = workload.connections == 1;
    let part = workload.span_bytes / workload.connections as u64;
    let mut connections = Vec::new();
    for index in 0..workload.connections {
        let range = if workload.pattern.sequential() {
            index as u64 * part..(index as u64 + 1) * part
        } else {
            0..workload.span_bytes
        };
        let rng = SmallRng::seed_from_u64(seed.wrapping_add(index as u64));
        connections.push(Connection::open(endpoint, export, workload, range, pool, rng, blocking)?);
    }
    let start = Instant::now();
    let (count_from, count_to, mut budget) = match until {
        Until::Time { warm_up, measured } => (start + warm_up, Some(start + warm_up + measured), u64::MAX),
        Until::Operations(count) => (start, None, count),
    };
    let mut outcome = Outcome { operations: 0, elapsed: Duration::ZERO, latency: Histogram::default() };
    for connection in &mut connections {
        connection.start(&mut budget);
        connection.send()?;
    }
    let mut now = start;
    while connections.iter().any(Connection::busy) {
        if !blocking {
            poll::wait(&mut connections)?;
        }
        for connection in &mut connections {
            if !blocking && !connection.ready() {
                continue;
            }
            connection.receive()?;
            now = Instant::now();
            if count_to.is_some_and(|end| now >= end) {
                budget = 0;
            }
            let counted = now >= count_from && count_to.is_none_or(|end| now < end);
            connection.advance(now, &mut budget, |latency| {
                if counted {
                    outcome.operations += 1;
                    outcome.latency.record(latency);
                }
            })?;
            connection.send()?;
        }
    }
    outcome.elapsed = count_to.unwrap_or(now).duration_since(count_from);
    Ok(outcome)
}
