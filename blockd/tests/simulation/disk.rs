//! A log device that keeps what was flushed and may lose, tear and reorder everything else.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard};

use blockd::buf::{AlignedBuf, Slice};
use blockd::volume::LogOp;
use blockd::wal::device::LogDevice;
use rand::Rng;
use rand::rngs::SmallRng;

use super::model::SECTOR;

/// What a write consists of.
pub fn bytes_of(bufs: &[Slice]) -> Vec<u8> {
    bufs.iter().map(|buf| &buf[..]).collect::<Vec<_>>().concat()
}

#[derive(Debug)]
struct Write {
    id: u64,
    segment: u32,
    offset: usize,
    bytes: Vec<u8>,
    /// The kernel is at work on it; a crash of the process alone does not lose it.
    handed: bool,
    /// Reported as done; a crash of the process alone does not lose it.
    done: bool,
}

impl Write {
    fn place(&self) -> (u32, std::ops::Range<usize>) {
        (self.segment, self.offset..self.offset + self.bytes.len())
    }
}

#[derive(Debug, Default)]
struct State {
    durable: BTreeMap<u32, Vec<u8>>,
    /// Not flushed yet, in order of submission.
    volatile: Vec<Write>,
    ios: u64,
    crash_at: Option<u64>,
}

/// See the module.
#[derive(Debug)]
pub struct SimDisk {
    segment_bytes: u64,
    state: Mutex<State>,
}

fn apply(segment: &mut [u8], write: &Write) {
    segment[write.offset..write.offset + write.bytes.len()].copy_from_slice(&write.bytes);
}

impl SimDisk {
    pub fn new(segment_bytes: u64) -> Self {
        Self { segment_bytes, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Lets the `n`th I/O from now, and all after it, fail.
    pub fn crash_after(&self, n: Option<u64>) {
        let mut state = self.lock();
        state.crash_at = n.map(|n| state.ios + n);
    }

    /// Whether the crash has happened.
    pub fn crashed(&self) -> bool {
        let state = self.lock();
        state.crash_at.is_some_and(|at| state.ios >= at)
    }

    /// Counts an I/O of any kind; fails once the crash has happened.
    pub fn io(&self) -> io::Result<()> {
        let mut state = self.lock();
        state.ios += 1;
        if state.crash_at.is_some_and(|at| state.ios >= at) {
            return Err(io::Error::other("the machine is off"));
        }
        Ok(())
    }

    /// An operation is on its way.
    pub fn submit(&self, id: u64, op: &LogOp) {
        if let LogOp::Write { segment, offset, bufs, .. } = op {
            let bytes = bytes_of(bufs);
            let write = Write { id, segment: *segment, offset: *offset as usize, bytes, handed: false, done: false };
            self.lock().volatile.push(write);
        }
    }

    /// The kernel takes on a write that was submitted; false once the crash has happened.
    pub fn hand(&self, id: u64) -> bool {
        let mut state = self.lock();
        if state.crash_at.is_some_and(|at| state.ios >= at) {
            return false;
        }
        state.volatile.iter_mut().filter(|w| w.id == id).for_each(|w| w.handed = true);
        true
    }

    /// Ids of writes to `segment` that are done now; an fdatasync that starts now will cover them.
    pub fn done_writes(&self, segment: u32) -> Vec<u64> {
        self.lock().volatile.iter().filter(|w| w.segment == segment && w.done).map(|w| w.id).collect()
    }

    /// An operation ends; `covers` is what was done when it started.
    pub fn finish(&self, id: u64, op: &LogOp, covers: &[u64]) -> io::Result<()> {
        self.io()?;
        let mut state = self.lock();
        match op {
            LogOp::Write { dsync, .. } => {
                if let Some(write) = state.volatile.iter_mut().find(|w| w.id == id) {
                    write.done = true;
                }
                if *dsync {
                    state.flush(|w| w.id == id);
                }
            }
            LogOp::Sync { .. } => state.flush(|w| covers.contains(&w.id)),
        }
        Ok(())
    }

    /// The process ended by itself; ids start anew in its next life.
    pub fn retire(&self) {
        self.lock().volatile.iter_mut().for_each(|w| w.id = u64::MAX);
    }

    /// The process dies: what was done or handed over stays, what else was on its way happens in part.
    pub fn kill(&self, rng: &mut SmallRng) {
        let mut state = self.lock();
        state.crash_at = None;
        let volatile = std::mem::take(&mut state.volatile);
        for write in volatile {
            if write.done || write.handed || rng.random_bool(0.5) {
                // Ids are the volume's and start anew in its next life.
                state.volatile.push(Write { id: u64::MAX, done: true, ..write });
            } else if rng.random_bool(0.5) {
                state.tear(&write, rng);
            }
        }
    }

    /// The power fails: of everything not flushed, any part may be there, in any order.
    pub fn power_cut(&self, rng: &mut SmallRng) {
        let mut state = self.lock();
        state.crash_at = None;
        let volatile = std::mem::take(&mut state.volatile);
        for write in volatile {
            match rng.random_range(0..3) {
                0 => {}
                1 => state.flush_one(&write),
                _ => state.tear(&write, rng),
            }
        }
    }

    /// The disk is lost.
    pub fn wipe(&self) {
        *self.lock() = State::default();
    }
}

impl State {
    fn flush_one(&mut self, write: &Write) {
        apply(self.durable.get_mut(&write.segment).unwrap(), write);
    }

    fn flush(&mut self, covered: impl Fn(&Write) -> bool) {
        // What becomes durable supersedes everything that was written to the same place before it.
        let mut places: Vec<(u32, std::ops::Range<usize>)> = Vec::new();
        let mut flushed = vec![false; self.volatile.len()];
        for (i, write) in self.volatile.iter().enumerate().rev() {
            let (segment, range) = write.place();
            let superseded =
                write.done && places.iter().any(|(s, r)| *s == segment && r.start < range.end && range.start < r.end);
            if covered(write) || superseded {
                flushed[i] = true;
                places.push((segment, range));
            }
        }
        let volatile = std::mem::take(&mut self.volatile);
        for (write, flushed) in volatile.into_iter().zip(flushed) {
            if flushed {
                self.flush_one(&write);
            } else {
                self.volatile.push(write);
            }
        }
    }

    fn tear(&mut self, write: &Write, rng: &mut SmallRng) {
        let segment = self.durable.get_mut(&write.segment).unwrap();
        let keep = rng.random_range(0.0..1.0);
        for (i, sector) in write.bytes.chunks(SECTOR).enumerate() {
            if rng.random_bool(keep) {
                let at = write.offset + i * SECTOR;
                segment[at..at + sector.len()].copy_from_slice(sector);
            }
        }
    }
}

impl LogDevice for SimDisk {
    fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    fn segments(&self) -> Vec<u32> {
        self.lock().durable.keys().copied().collect()
    }

    fn create(&self, segment: u32) -> io::Result<()> {
        self.io()?;
        let zeroes = vec![0; self.segment_bytes as usize];
        self.lock().durable.insert(segment, zeroes);
        Ok(())
    }

    fn read(&self, segment: u32, offset: u64, buf: &mut AlignedBuf) -> io::Result<()> {
        self.io()?;
        let state = self.lock();
        let mut content = state.durable.get(&segment).ok_or(io::ErrorKind::NotFound)?.clone();
        state.volatile.iter().filter(|w| w.segment == segment && w.done).for_each(|w| apply(&mut content, w));
        let from = offset as usize;
        let to = from + buf.len();
        buf.copy_from_slice(&content[from..to]);
        Ok(())
    }

    fn write(&self, segment: u32, offset: u64, buf: &AlignedBuf) -> io::Result<()> {
        let write =
            Write { id: u64::MAX, segment, offset: offset as usize, bytes: buf.to_vec(), handed: false, done: false };
        self.lock().volatile.push(write);
        self.io()?;
        self.lock().volatile.last_mut().unwrap().done = true;
        Ok(())
    }

    fn sync(&self, segment: u32) -> io::Result<()> {
        self.io()?;
        self.lock().flush(|w| w.segment == segment && w.done);
        Ok(())
    }

    fn fd(&self, _: u32) -> Option<RawFd> {
        None
    }

    fn describe(&self, segment: u32) -> String {
        format!("simulated segment {segment}")
    }
}
