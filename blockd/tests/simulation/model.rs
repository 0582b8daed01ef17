//! What a client may see, and what the log may contain.
//!
//! Two models watch every run. [`ClientModel`] knows only requests and answers: a sector holds a value that was written
//! there, and never one that was surely overwritten. [`History`] knows the LSN order, read off the frames sent to the
//! log: after any crash the volume must equal a prefix of it, down to the sector.

use std::collections::{BTreeMap, HashMap};

use blockd::types::{BLOCK, Lsn};
use blockd::volume::{LogOp, Token};
use blockd::wal::format::{FrameHeader, RecordKind};

use super::disk::bytes_of;

pub const SECTOR: usize = 512;
pub const SECTORS_PER_BLOCK: usize = BLOCK / SECTOR;

/// The number a sector consists of, repeated. 0 is a sector of zeroes.
pub type Value = u64;

/// Reads a sector's value.
///
/// # Panics
/// When the sector is torn.
pub fn value_of(sector: &[u8]) -> Value {
    let first = Value::from_le_bytes(sector[..8].try_into().unwrap());
    assert!(sector[8..] == sector[..sector.len() - 8], "a torn sector");
    first
}

/// As many sectors of a value.
pub fn sectors_of(value: Value, count: usize) -> Vec<u8> {
    value.to_le_bytes().repeat(count * SECTOR / size_of::<Value>())
}

#[derive(Clone, Copy, Debug)]
struct Candidate {
    value: Value,
    submitted: u64,
    acked: Option<u64>,
    /// Survives a power cut although nothing was flushed.
    durable: bool,
}

/// A write, zero, trim or copy of sectors.
#[derive(Clone, Debug)]
struct Change {
    first: usize,
    count: usize,
    submitted: u64,
    fua: bool,
}

/// A copy that was not answered, or failed.
#[derive(Clone, Copy, Debug)]
struct Copying {
    from: usize,
    to: usize,
    count: usize,
    submitted: u64,
}

/// See the module.
#[derive(Debug)]
pub struct ClientModel {
    sectors: Vec<Vec<Candidate>>,
    in_flight: HashMap<Token, Change>,
    copies: BTreeMap<u64, Copying>,
    /// What compare-and-writes want to find.
    comparing: HashMap<Token, Vec<Value>>,
    flushing: HashMap<Token, u64>,
    clock: u64,
    /// Everything acknowledged up to this time must survive a power cut.
    pub flushed: u64,
}

impl ClientModel {
    pub fn new(sectors: usize) -> Self {
        let blank = vec![Candidate { value: 0, submitted: 0, acked: Some(0), durable: true }];
        Self {
            sectors: vec![blank; sectors],
            in_flight: HashMap::new(),
            copies: BTreeMap::new(),
            comparing: HashMap::new(),
            flushing: HashMap::new(),
            clock: 1,
            flushed: 0,
        }
    }

    pub fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    pub fn change(&mut self, token: Token, first: usize, count: usize, value: Value, fua: bool) {
        let submitted = self.tick();
        for sector in first..first + count {
            self.candidate(sector, value, submitted);
        }
        self.in_flight.insert(token, Change { first, count, submitted, fua });
    }

    /// A write of what has been there if `expected` stands there; see [`ClientModel::compared`].
    pub fn compare(&mut self, token: Token, first: usize, expected: Vec<Value>, value: Value, fua: bool) {
        self.change(token, first, expected.len(), value, fua);
        self.comparing.insert(token, expected);
    }

    /// What a sector most likely holds.
    pub fn likely(&self, sector: usize) -> Value {
        let candidates = &self.sectors[sector];
        candidates.iter().rfind(|c| c.acked.is_some()).or(candidates.last()).map_or(0, |c| c.value)
    }

    /// A compare-and-write was answered: it wrote if it found what it wanted. Whether this was one.
    pub fn compared(&mut self, token: Token, found: bool) -> bool {
        let Some(expected) = self.comparing.remove(&token) else { return false };
        let Change { first, submitted, .. } = self.in_flight[&token];
        for (sector, value) in (first..).zip(&expected) {
            let may = self.allows(sector, *value, submitted);
            assert!(may || !found, "a comparison found {value} in sector {sector}: {}", self.describe(sector));
        }
        if found {
            return true;
        }
        // It wrote nothing, so nobody may see it any more.
        for sector in &mut self.sectors[first..first + expected.len()] {
            sector.retain(|c| c.submitted != submitted);
        }
        self.in_flight.remove(&token);
        let differs = (first..).zip(&expected).any(|(sector, value)| {
            let other = |c: &Candidate| c.value != *value && self.allows(sector, c.value, submitted);
            self.sectors[sector].iter().any(other)
        });
        assert!(differs, "a comparison did not find what is there in {} sectors from {first} on", expected.len());
        true
    }

    /// A copy of sectors: whatever may stand at the source, now or before it is answered.
    pub fn copy(&mut self, token: Token, from: usize, to: usize, count: usize, fua: bool) {
        let submitted = self.tick();
        for i in 0..count {
            let mut values: Vec<Value> = self.sectors[from + i].iter().map(|c| c.value).collect();
            values.dedup();
            values.retain(|value| self.allows(from + i, *value, submitted));
            for value in values {
                self.candidate(to + i, value, submitted);
            }
        }
        self.in_flight.insert(token, Change { first: to, count, submitted, fua });
        self.copies.insert(token.0, Copying { from, to, count, submitted });
    }

    /// Whether a copy there could be taken for another one.
    pub fn is_copied_to(&self, first: usize, count: usize) -> bool {
        self.copies.values().any(|copy| copy.to < first + count && first < copy.to + copy.count)
    }

    /// Which sector the copy that is under way to this one reads.
    pub fn source_of(&self, sector: usize) -> Option<usize> {
        let copy = self.copies.values().find(|copy| (copy.to..copy.to + copy.count).contains(&sector))?;
        Some(copy.from + (sector - copy.to))
    }

    /// A sector may hold a value from now on, and so may the sectors that it is being copied to.
    fn candidate(&mut self, sector: usize, value: Value, submitted: u64) {
        let candidates = &mut self.sectors[sector];
        if candidates.iter().any(|c| (c.value, c.submitted) == (value, submitted)) {
            return;
        }
        candidates.push(Candidate { value, submitted, acked: None, durable: false });
        let copies: Vec<Copying> = self.copies.values().copied().collect();
        for copy in copies.iter().filter(|copy| (copy.from..copy.from + copy.count).contains(&sector)) {
            self.candidate(copy.to + (sector - copy.from), value, copy.submitted);
        }
    }

    pub fn flush(&mut self, token: Token) {
        let now = self.tick();
        self.flushing.insert(token, now);
    }

    /// A change or a flush was acknowledged. A change with FUA is durable by itself, but says nothing of others.
    pub fn acked(&mut self, token: Token) {
        let now = self.tick();
        if let Some(at) = self.flushing.remove(&token) {
            self.flushed = self.flushed.max(at);
        } else if let Some(change) = self.in_flight.remove(&token) {
            self.copies.remove(&token.0);
            for sector in &mut self.sectors[change.first..change.first + change.count] {
                for c in sector.iter_mut().filter(|c| c.submitted == change.submitted) {
                    c.acked = Some(now);
                    c.durable = change.fua;
                }
            }
        }
    }

    /// Whether a read that began at `since` may have seen `value` in a sector.
    pub fn allows(&self, sector: usize, value: Value, since: u64) -> bool {
        allowed(&self.sectors[sector], value, |c| c.acked.is_some_and(|at| at < since))
    }

    /// Checks a whole state found after a crash and takes it as the truth from now on. What was acknowledged before
    /// `horizon` must be there.
    pub fn settle(&mut self, found: &[Value], horizon: u64) {
        let now = self.tick();
        for (i, (sector, &value)) in self.sectors.iter_mut().zip(found).enumerate() {
            assert!(
                allowed(sector, value, |c| c.acked.is_some_and(|at| at < horizon || c.durable)),
                "sector {i} holds {value} after recovery (horizon {horizon}), which is none of {sector:?}"
            );
            *sector = vec![Candidate { value, submitted: now, acked: Some(now), durable: true }];
        }
        self.in_flight.clear();
        self.copies.clear();
        self.comparing.clear();
        self.flushing.clear();
        self.flushed = now;
    }

    pub fn describe(&self, sector: usize) -> String {
        format!("{:?}", self.sectors[sector])
    }

    pub fn now(&self) -> u64 {
        self.clock
    }
}

/// A value is possible unless some other value is sure to be there that was submitted after this one was acknowledged.
fn allowed(sector: &[Candidate], value: Value, sure: impl Fn(&Candidate) -> bool) -> bool {
    sector.iter().filter(|c| c.value == value).any(|c| {
        let overwritten_by = |later: &Candidate| sure(later) && c.acked.is_some_and(|acked| later.submitted > acked);
        !sector.iter().any(overwritten_by)
    })
}

#[derive(Clone, Debug)]
struct Entry {
    first: usize,
    values: Vec<Value>,
    /// For zeroes, which may be long.
    zero_sectors: usize,
}

/// The accepted history by LSN, as the log was told it.
#[derive(Clone, Debug, Default)]
pub struct History {
    entries: Vec<Entry>,
}

impl History {
    /// Learns from a log write. A reference must be part of a copy: `source` says from which sector the copy to a sector is, and
    /// `state` what the volume holds after an LSN. What a record refers to must be what its source holds right before it.
    pub fn observe(
        &mut self,
        op: &LogOp,
        source: impl Fn(usize) -> Option<usize>,
        state: impl Fn(&History, Lsn) -> Vec<Value>,
    ) {
        let LogOp::Write { offset, bufs, .. } = op else { return };
        let generation = u64::from_le_bytes(bufs[0][8..16].try_into().unwrap());
        let Ok(header) = FrameHeader::decode(&bufs[0], generation, *offset) else { return };
        let payload = bytes_of(&bufs[1..]);
        let sums = payload.chunks(BLOCK).map(blockd::wal::format::block_sum);
        assert!(sums.eq(header.sums.iter().copied()), "a frame goes to the device as it was summed");
        for (lsn, record) in (header.first_lsn..).zip(&header.records) {
            assert_eq!(lsn, self.entries.len() as Lsn + 1, "LSNs are given out without gaps");
            let first = record.lba as usize * SECTORS_PER_BLOCK;
            let entry = match record.kind {
                RecordKind::Data { at } => {
                    let from = at as usize * BLOCK;
                    let bytes = &payload[from..from + record.blocks as usize * BLOCK];
                    Entry { first, values: bytes.chunks(SECTOR).map(value_of).collect(), zero_sectors: 0 }
                }
                RecordKind::Zero { .. } => {
                    Entry { first, values: Vec::new(), zero_sectors: record.blocks as usize * SECTORS_PER_BLOCK }
                }
                RecordKind::Refer { .. } => {
                    let before = state(self, lsn - 1);
                    let sectors = first..first + record.blocks as usize * SECTORS_PER_BLOCK;
                    let value = |sector| before[source(sector).expect("a reference is part of a copy under way")];
                    Entry { first, values: sectors.map(value).collect(), zero_sectors: 0 }
                }
            };
            self.entries.push(entry);
        }
    }

    /// The state after `lsn`.
    pub fn state(&self, lsn: Lsn, sectors: usize) -> Vec<Value> {
        self.state_from(vec![0; sectors], 0, lsn)
    }

    /// The state after `lsn`, where that after `from` is `state`.
    pub fn state_from(&self, mut state: Vec<Value>, from: Lsn, lsn: Lsn) -> Vec<Value> {
        let sectors = state.len();
        for entry in &self.entries[from as usize..lsn as usize] {
            state[entry.first..entry.first + entry.values.len()].copy_from_slice(&entry.values);
            let end = (entry.first + entry.zero_sectors).min(sectors);
            state[entry.first.min(end)..end].fill(0);
        }
        state
    }

    /// Forgets what a crash lost.
    pub fn truncate(&mut self, lsn: Lsn) {
        assert!(lsn as usize <= self.entries.len(), "recovery found more than was ever accepted");
        self.entries.truncate(lsn as usize);
    }

    pub fn last(&self) -> Lsn {
        self.entries.len() as Lsn
    }
}
