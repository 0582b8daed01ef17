//! The steps in which changes become durable. See the module above for their order.

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};

use super::contents::HomeContents;
use super::header::{HEADER_BLOCKS, JournalHeader};
use super::record::Writer;
use super::{Image, Journal, Log, Logged, Record, Running, Tail, dead};
use crate::blocks::BlockKind;
use crate::disk::{BLOCK_BYTES, BlockAddress};
use crate::layout::{RawBlock, seal};
use crate::vfs::{Result, VfsError};

/// The most blocks whose newest image is in the journal only; they stay in memory.
const LOGGED_MAX: usize = 32768;

/// A record, and which blocks stand in it whole.
#[derive(Default)]
struct Encoded {
    bytes: Vec<u8>,
    full: BTreeSet<BlockAddress>,
}

impl Journal {
    /// Waits until transaction `sequence` and what was written before `ticket` was taken are durable. Several callers share a flush.
    ///
    /// # Errors
    /// [`Io`](crate::vfs::VfsError::Io) if the disk failed: nothing can be changed any more.
    pub fn commit(&self, sequence: u64, ticket: u64) -> Result<()> {
        let mut state = self.lock();
        loop {
            if let Some(why) = &state.dead {
                return Err(dead(why));
            }
            if state.durable >= sequence && state.flushes_done >= ticket {
                return Ok(());
            }
            crate::waiting::about_to_wait();
            if state.leader {
                state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            state.leader = true;
            drop(state);
            let done = self.step(false);
            state = self.lock();
            state.leader = false;
            self.wake.notify_all();
            done?;
        }
    }

    /// Makes everything published durable.
    pub fn commit_all(&self) -> Result<()> {
        self.commit(self.newest(), 0)
    }

    /// Brings everything home and empties the journal.
    pub fn settle(&self) -> Result<()> {
        loop {
            {
                let mut state = self.lock();
                while state.leader {
                    state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                if let Some(why) = &state.dead {
                    return Err(dead(why));
                }
                let log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
                let home = log.logged.is_empty() && log.away.is_empty();
                let empty = home && log.discarded.is_empty() && log.tail.position == log.head;
                if empty && state.running.is_empty() {
                    return Ok(());
                }
                state.leader = true;
            }
            let discarded = self.discard_all().map_err(|e| self.killed(&e));
            let done = discarded.and_then(|()| self.step(true));
            self.lock().leader = false;
            self.wake.notify_all();
            done?;
        }
    }

    /// Commits first if the running transaction has become so large that it might not fit into the journal.
    pub fn make_room(&self) -> Result<()> {
        let newest = {
            let state = self.lock();
            if let Some(why) = &state.dead {
                return Err(dead(why));
            }
            let running = &state.running;
            let blocks = (running.blocks.len() + running.contents.len() + running.freed.len() / 128) as u64;
            if blocks < self.geometry.journal_blocks / 4 {
                return Ok(());
            }
            state.sequence
        };
        self.commit(newest, 0)
    }

    /// One step, by the leader. With `all`, whatever can be brought home is.
    fn step(&self, all: bool) -> Result<()> {
        let mut log = self.log.lock().unwrap_or_else(PoisonError::into_inner);
        let log = &mut *log;
        let (running, sequence) = {
            let mut state = self.lock();
            if state.running.is_empty() {
                (Running::default(), 0)
            } else {
                let body = state.host.with_counts(state.counts.blocks, state.counts.files);
                let host =
                    Image { kind: BlockKind::Host, version: state.host_version + 1, body: Arc::new(*body.as_body()) };
                let sequence = state.sequence;
                state.sequence += 1;
                state.host_version += 1;
                let mut running = std::mem::take(&mut state.running);
                self.cache.put(self.geometry.host(self.slot), Some(host.clone()), sequence);
                running.blocks.insert(self.geometry.host(self.slot), Some(host));
                (running, sequence)
            }
        };
        match self.step_with(log, &running, sequence, all) {
            Ok(()) => Ok(()),
            Err(e) => Err(self.killed(&e)),
        }
    }

    fn killed(&self, error: &std::io::Error) -> VfsError {
        let why = format!("the journal could not be written: {error}");
        self.kill(why.clone());
        dead(&why)
    }

    fn step_with(&self, log: &mut Log, running: &Running, sequence: u64, all: bool) -> std::io::Result<()> {
        let mut record = Encoded::default();
        if sequence != 0 {
            record = self.encode(log, running, sequence);
            let blocks = (record.bytes.len() / BLOCK_BYTES) as u64;
            let mut tries = 0;
            while log.used() + blocks > self.records_len() {
                tries += 1;
                if tries > 8 {
                    return Err(std::io::Error::other(format!(
                        "a transaction of {blocks} blocks does not fit into it"
                    )));
                }
                self.discard_all()?;
                self.flush_step(log, Encoded::default(), None, true)?;
                // What differences start from may be home now.
                record = self.encode(log, running, sequence);
            }
        }
        if !running.contents.is_empty() && !log.announced {
            self.announce(log)?;
        }
        let transaction = (sequence != 0).then_some((running, sequence));
        self.flush_step(log, record, transaction, all)
    }

    /// Says in both copies of the header that records may hold contents, before the first of them is written: a program that does not know them would take it
    /// for a torn one, and lose it and what follows.
    fn announce(&self, log: &mut Log) -> std::io::Result<()> {
        for _ in 0..HEADER_BLOCKS {
            let (at, block) = self.seal_header(log, log.tail, true);
            self.disk.write(at, &block[..])?;
            self.disk.flush()?;
            log.header_version += 1;
        }
        log.announced = true;
        Ok(())
    }

    fn seal_header(&self, log: &Log, tail: Tail, contents: bool) -> (BlockAddress, Box<RawBlock>) {
        let header = JournalHeader::new(log.generation, log.salt, tail.position, tail.sequence);
        header.seal(self.geometry.fragment(), self.geometry.journal(self.slot), log.header_version + 1, contents)
    }

    /// Writes the record, a batch of blocks home and a new tail, flushes, and notes what that made true.
    fn flush_step(
        &self,
        log: &mut Log,
        record: Encoded,
        transaction: Option<(&Running, u64)>,
        all: bool,
    ) -> std::io::Result<()> {
        let batch = self.choose_home(log, transaction.map(|(running, _)| running), all);
        let new_contents = transaction.map(|(running, _)| &running.contents);
        let contents = log.choose_contents(new_contents, self.records_len(), all);
        let home = self.seal_runs(&batch, &contents);
        let tail = self.choose_tail(log, all);
        let header = tail.map(|tail| {
            let stay = log.records.iter().filter(|record| record.begin.sequence >= tail.sequence);
            let has_contents = new_contents.is_some_and(|new| !new.is_empty())
                || stay.into_iter().any(|record| !record.contents.is_empty());
            (tail, has_contents, self.seal_header(log, tail, has_contents))
        });
        let mut runs: Vec<(BlockAddress, &[u8])> = self.place(log.head, &record.bytes);
        runs.extend(home.iter().map(|(at, bytes)| (*at, &bytes[..])));
        if let Some((_, _, (at, block))) = &header {
            runs.push((*at, &block[..]));
        }
        let discarded = self.discards.take_done();
        self.disk.write_all(&runs)?;
        let flush = {
            let mut state = self.lock();
            state.flushes_started += 1;
            state.flushes_started
        };
        self.disk.flush()?;

        // The batch is home: a record that changes one of these blocks from now on holds its full image.
        for (at, version) in batch.iter().map(|(at, image)| (*at, image.version)) {
            let logged = log.logged.remove(&at).expect("the batch was chosen among them");
            log.by_age.remove(&(logged.first, at));
            self.cache.unpin(at, version);
        }
        self.are_home(log, &contents);
        for sequence in discarded {
            log.discarded.remove(&sequence);
        }
        if let Some((tail, has_contents, _)) = header {
            log.header_version += 1;
            log.tail = tail;
            log.announced &= has_contents;
            while let Some(left) = log.records.pop_front_if(|record| record.begin.sequence < tail.sequence) {
                self.left(left.begin.sequence, &left.contents);
            }
        }
        if let Some((running, sequence)) = transaction {
            self.note(log, running, sequence, &record);
            if self.discards.add(running, sequence, merged(&running.freed)) {
                log.discarded.insert(sequence);
                if !self.discards.are_apart() {
                    self.discard_all()?;
                }
            }
        }
        let mut state = self.lock();
        state.flushes_done = flush;
        if let Some((_, sequence)) = transaction {
            state.durable = sequence;
        }
        Ok(())
    }

    /// Enters the blocks of a transaction that is durable now.
    fn note(&self, log: &mut Log, running: &Running, sequence: u64, record: &Encoded) {
        let begin = Tail { position: log.head, sequence };
        log.records.push_back(Record { begin, contents: running.contents.keys().copied().collect() });
        log.head += (record.bytes.len() / BLOCK_BYTES) as u64;
        for (at, image) in &running.blocks {
            let before = log.logged.remove(at);
            let Some(image) = image else {
                if let Some(before) = before {
                    log.by_age.remove(&(before.first, *at));
                }
                continue;
            };
            let first = match &before {
                Some(before) if !record.full.contains(at) => before.first,
                _ => sequence,
            };
            if let Some(before) = &before {
                log.by_age.remove(&(before.first, *at));
            }
            log.by_age.insert((first, *at));
            log.logged.insert(*at, Logged { image: image.clone(), first });
        }
        for (at, page) in &running.contents {
            log.away.note(*at, page.clone(), sequence);
        }
        for (at, count) in &running.freed {
            log.away.free(*at, *count);
        }
    }

    fn encode(&self, log: &Log, running: &Running, sequence: u64) -> Encoded {
        let mut writer = Writer::new();
        let mut full = BTreeSet::new();
        for (at, image) in &running.blocks {
            match (image, log.logged.get(at)) {
                (None, _) => {}
                (Some(image), Some(base)) if !log.renews(base, self.records_len()) => {
                    if writer.changed(*at, image, &base.image) {
                        full.insert(*at);
                    }
                }
                (Some(image), _) => {
                    writer.full(*at, image);
                    full.insert(*at);
                }
            }
        }
        for (at, page) in &running.contents {
            writer.contents(*at, page);
        }
        for (at, count) in merged(&running.freed) {
            writer.freed(at, count);
        }
        Encoded { bytes: writer.finish(log.salt, log.generation, sequence, log.head), full }
    }

    /// The blocks to bring home in this step: the more the fuller the journal is, those that keep the tail first. None that the
    /// transaction of this step changes: it may hold only differences.
    fn choose_home(&self, log: &Log, running: Option<&Running>, all: bool) -> Vec<(BlockAddress, Image)> {
        let full = log.used() as f64 / self.records_len() as f64;
        let full = full.max(log.logged.len() as f64 / LOGGED_MAX as f64);
        let count = match full {
            _ if all => usize::MAX,
            full if full < 0.25 => 0,
            full if full < 0.5 => (log.logged.len() / 32).max(16),
            full if full < 0.75 => (log.logged.len() / 8).max(64),
            _ => usize::MAX,
        };
        let mut batch: Vec<_> = log
            .by_age
            .iter()
            .map(|(_, at)| *at)
            .filter(|at| running.is_none_or(|running| !running.blocks.contains_key(at)))
            .take(count)
            .map(|at| (at, log.logged[&at].image.clone()))
            .collect();
        batch.sort_by_key(|(at, _)| *at);
        batch
    }

    /// The blocks as they go to the disk, neighbours in one piece.
    fn seal_runs(&self, batch: &[(BlockAddress, Image)], contents: &[HomeContents]) -> Vec<(BlockAddress, Vec<u8>)> {
        let mut runs = Vec::new();
        for (at, image) in batch {
            let block = block_of(&mut runs, *at);
            seal(self.geometry.fragment(), *at, image.kind, image.version, &image.body, block);
        }
        for (at, _, page) in contents {
            block_of(&mut runs, *at).copy_from_slice(&page[..]);
        }
        runs
    }

    /// Where the tail may be now, if it is worth saying.
    fn choose_tail(&self, log: &Log, all: bool) -> Option<Tail> {
        let needed = [log.by_age.first().map(|(first, _)| *first), log.away.first(), log.discarded.first().copied()];
        let needed = needed.into_iter().flatten().min();
        let tail = match needed {
            // All of a record's blocks are home: go on behind it.
            Some(needed) => log.records.iter().find(|record| record.begin.sequence >= needed)?.begin,
            None => Tail { position: log.head, sequence: log.records.back()?.begin.sequence + 1 },
        };
        let gain = tail.position - log.tail.position;
        (gain > 0 && (all || gain >= self.records_len() / 16)).then_some(tail)
    }

    /// Blocks of the journal for records.
    fn records_len(&self) -> u64 {
        self.geometry.journal_blocks - HEADER_BLOCKS
    }

    /// Where a record at `position` goes: in two pieces where the journal ends.
    fn place<'a>(&self, position: u64, record: &'a [u8]) -> Vec<(BlockAddress, &'a [u8])> {
        if record.is_empty() {
            return Vec::new();
        }
        let start = self.geometry.journal(self.slot) + HEADER_BLOCKS;
        let at = position % self.records_len();
        let first = ((self.records_len() - at) as usize * BLOCK_BYTES).min(record.len());
        let mut runs = vec![(start + at, &record[..first])];
        if first < record.len() {
            runs.push((start, &record[first..]));
        }
        runs
    }
}

impl Log {
    /// Blocks that can't be used for records now.
    fn used(&self) -> u64 {
        self.head - self.tail.position
    }

    /// Whether the next image of a block is full although differences would do: its first one is so old that it would keep the tail.
    fn renews(&self, logged: &Logged, records_len: u64) -> bool {
        self.age(logged.first) > records_len / 4
    }

    /// How many blocks were written to the journal since record `sequence` was begun.
    pub(super) fn age(&self, sequence: u64) -> u64 {
        let at = self.records.partition_point(|record| record.begin.sequence < sequence);
        self.records.get(at).map_or(0, |record| self.head - record.begin.position)
    }
}

/// Adds a block to the runs, and returns it to be filled; one that continues the last run becomes part of it.
fn block_of(runs: &mut Vec<(BlockAddress, Vec<u8>)>, at: BlockAddress) -> &mut [u8] {
    if runs.last().is_none_or(|(start, bytes)| start + (bytes.len() / BLOCK_BYTES) as u64 != at) {
        runs.push((at, Vec::new()));
    }
    let (_, bytes) = runs.last_mut().expect("pushed if there was none");
    let begin = bytes.len();
    bytes.resize(begin + BLOCK_BYTES, 0);
    &mut bytes[begin..]
}

/// Ranges that adjoin as one.
fn merged(freed: &[(BlockAddress, u64)]) -> Vec<(BlockAddress, u64)> {
    let mut sorted = freed.to_vec();
    sorted.sort_unstable();
    let mut merged: Vec<(BlockAddress, u64)> = Vec::new();
    for (at, count) in sorted {
        match merged.last_mut() {
            Some((start, length)) if *start + *length >= at => *length = (*length).max(at + count - *start),
            _ => merged.push((at, count)),
        }
    }
    merged
}
