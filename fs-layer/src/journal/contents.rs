//! Contents of data blocks in the journal.
//!
//! Who waits for a small write to become durable waits for one write, that of the record, and its flush: the record holds the contents of the
//! blocks, and they are written home later, many at once.
//!
//! Data blocks have no version, so replay writes what the live journal (from the oldest record that counts on) holds of a block, whatever is at home.
//! What makes that right: as long as the live journal holds contents of an address, or the running transaction does, the address is *held*, and
//! nothing is written to it but, by a step, the newest contents in a durable record. Whoever has other contents for it puts them into a transaction too
//! ([`Journal::held`] tells him). An address is let go of when its contents are home, and a header is durable with a tail behind the
//! last record that has them; or when it is freed, since it is never used again.
//!
//! Until they are home, readers get them from here ([`Journal::read_data`]).

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Journal, Log};
use crate::disk::{BLOCK_BYTES, BlockAddress};
use crate::file::Page;
use crate::mutex::lock;

/// The most blocks whose contents are only here before no more are taken than must be.
const AWAY_MAX: usize = 2048;
/// So many are written home at once.
const HOME_AT: usize = 1024;

/// Contents of the newest transaction that has some for a block.
struct Block {
    sequence: u64,
    /// `None`: they are home.
    page: Option<Page>,
}

/// The held addresses. Who changes those of a file, or reads them, holds its lock.
#[derive(Default)]
pub(super) struct Held {
    blocks: Mutex<BTreeMap<BlockAddress, Block>>,
    /// How many are not home.
    away: AtomicUsize,
}

impl Held {
    /// Enters contents that were published in transaction `sequence`.
    pub(super) fn put(&self, at: BlockAddress, page: Page, sequence: u64) {
        let before = lock(&self.blocks).insert(at, Block { sequence, page: Some(page) });
        if before.is_none_or(|before| before.page.is_none()) {
            self.away.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Notes that the contents of transaction `sequence` are home, if there are no newer ones.
    fn is_home(&self, at: BlockAddress, sequence: u64) {
        if let Some(block) = lock(&self.blocks).get_mut(&at)
            && block.sequence == sequence
            && block.page.take().is_some()
        {
            self.away.fetch_sub(1, Ordering::Relaxed);
        }
    }

    /// Lets go of an address if no record behind that of transaction `sequence` has contents of it.
    fn let_go(&self, at: BlockAddress, sequence: u64) {
        let mut blocks = lock(&self.blocks);
        if blocks.get(&at).is_some_and(|block| block.sequence == sequence) {
            blocks.remove(&at);
        }
    }

    /// Lets go of addresses that are freed.
    pub(super) fn free(&self, at: BlockAddress, count: u64) {
        let mut blocks = lock(&self.blocks);
        let gone = blocks.extract_if(at..at.saturating_add(count), |_, _| true);
        self.away.fetch_sub(gone.filter(|(_, block)| block.page.is_some()).count(), Ordering::Relaxed);
    }
}

/// Contents that are durable and not home; the leader's.
#[derive(Default)]
pub(super) struct Away {
    /// With the number of the last record that has some for the block.
    blocks: BTreeMap<BlockAddress, (u64, Page)>,
    by_age: BTreeSet<(u64, BlockAddress)>,
}

impl Away {
    pub(super) fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// The oldest record that must not be lost.
    pub(super) fn first(&self) -> Option<u64> {
        self.by_age.first().map(|(sequence, _)| *sequence)
    }

    /// Enters what the durable record `sequence` holds.
    pub(super) fn note(&mut self, at: BlockAddress, page: Page, sequence: u64) {
        if let Some((before, _)) = self.blocks.insert(at, (sequence, page)) {
            self.by_age.remove(&(before, at));
        }
        self.by_age.insert((sequence, at));
    }

    /// Forgets what a durable record freed.
    pub(super) fn free(&mut self, at: BlockAddress, count: u64) {
        for (at, (sequence, _)) in self.blocks.extract_if(at..at.saturating_add(count), |_, _| true) {
            self.by_age.remove(&(sequence, at));
        }
    }

    fn remove(&mut self, at: BlockAddress) {
        if let Some((sequence, _)) = self.blocks.remove(&at) {
            self.by_age.remove(&(sequence, at));
        }
    }
}

/// Contents that a step writes home: where, of which record, and what.
pub(super) type HomeContents = (BlockAddress, u64, Page);

impl Log {
    /// The contents to bring home in this step, none that its transaction has `new` ones for. All at once, because a disk on which a block that is
    /// written the first time makes the flush slow is slow once then.
    pub(super) fn choose_contents(
        &self,
        new: Option<&BTreeMap<BlockAddress, Page>>,
        records_len: u64,
        all: bool,
    ) -> Vec<HomeContents> {
        let is_old = |sequence| self.age(sequence) > records_len / 8;
        if !all && self.away.blocks.len() < HOME_AT && !self.away.first().is_some_and(is_old) {
            return Vec::new();
        }
        self.away
            .blocks
            .iter()
            .filter(|(at, _)| new.is_none_or(|new| !new.contains_key(at)))
            .map(|(at, (sequence, page))| (*at, *sequence, page.clone()))
            .collect()
    }
}

impl Journal {
    /// Whether contents of more blocks may be put into transactions.
    pub fn takes_contents(&self) -> bool {
        self.held.away.load(Ordering::Relaxed) < AWAY_MAX
    }

    /// How many blocks have their newest contents in the journal only.
    pub fn contents_away(&self) -> usize {
        self.held.away.load(Ordering::Relaxed)
    }

    /// Those of `count` addresses, ascending, that must not be written to: new contents go through [`Tx::put_contents`](super::Tx::put_contents).
    /// The lock of the file that they belong to is held.
    pub fn held(&self, at: BlockAddress, count: u64) -> Vec<BlockAddress> {
        lock(&self.held.blocks).range(at..at.saturating_add(count)).map(|(at, _)| *at).collect()
    }

    /// The contents of those of `count` addresses, ascending, that are not home.
    pub fn away(&self, at: BlockAddress, count: u64) -> Vec<(BlockAddress, Page)> {
        let blocks = lock(&self.held.blocks);
        let range = blocks.range(at..at.saturating_add(count));
        range.filter_map(|(at, block)| Some((*at, block.page.clone()?))).collect()
    }

    /// Reads data blocks as they are now. The lock of the file that they belong to is held.
    pub fn read_data(&self, at: BlockAddress, buffer: &mut [u8]) -> io::Result<()> {
        // Before the disk is read: what is not here any more is there by then.
        let away = self.away(at, (buffer.len() / BLOCK_BYTES) as u64);
        self.disk.read(at, buffer)?;
        for (block, page) in away {
            let start = (block - at) as usize * BLOCK_BYTES;
            buffer[start..start + BLOCK_BYTES].copy_from_slice(&page[..]);
        }
        Ok(())
    }

    /// Notes that contents are home, durably.
    pub(super) fn are_home(&self, log: &mut Log, contents: &[HomeContents]) {
        for (at, sequence, _) in contents {
            log.away.remove(*at);
            self.held.is_home(*at, *sequence);
        }
    }

    /// The tail is behind record `sequence`, durably, which had contents for these.
    pub(super) fn left(&self, sequence: u64, contents: &[BlockAddress]) {
        contents.iter().for_each(|at| self.held.let_go(*at, sequence));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_is_held_until_the_last_record_with_it_has_left() {
        let held = Held::default();
        let page = || Page::of(&[1; BLOCK_BYTES]);
        let is_held = |at| lock(&held.blocks).contains_key(&at);
        held.put(10, page(), 1);
        held.put(10, page(), 2);
        assert_eq!(held.away.load(Ordering::Relaxed), 1);
        // What is home is older than what was published since.
        held.is_home(10, 1);
        assert_eq!(held.away.load(Ordering::Relaxed), 1);
        held.is_home(10, 2);
        assert_eq!(held.away.load(Ordering::Relaxed), 0);
        held.let_go(10, 1);
        assert!(is_held(10));
        held.let_go(10, 2);
        assert!(!is_held(10));
        held.put(20, page(), 3);
        held.put(25, page(), 3);
        held.free(18, 5);
        assert!(!is_held(20) && is_held(25));
        assert_eq!(held.away.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn the_oldest_record_that_is_needed_is_that_of_the_newest_contents() {
        let mut away = Away::default();
        let page = || Page::of(&[1; BLOCK_BYTES]);
        away.note(10, page(), 1);
        away.note(11, page(), 2);
        assert_eq!(away.first(), Some(1));
        away.note(10, page(), 5);
        assert_eq!(away.first(), Some(2));
        away.free(11, 1);
        assert_eq!(away.first(), Some(5));
        away.remove(10);
        assert!(away.is_empty() && away.first().is_none());
    }
}
