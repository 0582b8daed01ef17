//! Numbers of files outside of the live tree.
//!
//! The live tree has numbers below 2^48: its inodes stand in a 16th of a disk of at most 2^52 blocks. A file in a snapshot has the snapshot's number
//! above those 48 bits and its own below; `.snapshots` has a number of its own above both. All are below 2^63, so that nobody takes one for negative.
//!
//! A snapshot's number is made from its name and identity, so that handles stay good over restarts. There are 2^14 - 1, so two may be made the same:
//! then the one that was made later takes the next free one. It keeps that as long as this process runs, and over restarts as long as the
//! other one exists. Within a process the number of one that is gone is not given to another.

use std::collections::{HashMap, HashSet};

use xxhash_rust::xxh3::xxh3_64;

use super::SnapshotInfo;
use crate::vfs::{Attributes, Ino};

const SHIFT: u32 = 48;
const LAST: u64 = (1 << 14) - 1;

/// The number of the directory of the snapshots.
pub const LIST: Ino = Ino((LAST + 1) << SHIFT);

/// The number of a snapshot, 1 to 2^14 - 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Number(u16);

/// Where a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// In the live tree.
    Live,
    /// It is the directory of the snapshots.
    List,
    /// In a snapshot, with this number there.
    In(Number, Ino),
    /// Nowhere: nothing ever had this number.
    Nowhere,
}

/// Where the file of this number is.
#[inline]
pub fn place(ino: Ino) -> Place {
    if ino.0 >> SHIFT == 0 { Place::Live } else { outside(ino) }
}

#[cold]
fn outside(ino: Ino) -> Place {
    match ino.0 >> SHIFT {
        number @ 1..=LAST => Place::In(Number(number as u16), Ino(ino.0 & ((1 << SHIFT) - 1))),
        _ if ino == LIST => Place::List,
        _ => Place::Nowhere,
    }
}

impl Number {
    /// The number that a file of the snapshot has outside.
    pub fn ino(self, inside: Ino) -> Ino {
        debug_assert!(inside.0 >> SHIFT == 0, "a disk has less than 2^48 inodes");
        Ino(u64::from(self.0) << SHIFT | inside.0)
    }

    /// Whether the file is in this snapshot.
    pub fn has(self, outside: Ino) -> bool {
        matches!(place(outside), Place::In(number, _) if number == self)
    }

    /// Attributes as they are outside.
    pub fn attributes(self, inside: Attributes) -> Attributes {
        Attributes { ino: self.ino(inside.ino), ..inside }
    }

    /// The cookie of the snapshot's entry in the directory: above 2, in the order of the numbers.
    pub fn cookie(self) -> u64 {
        u64::from(self.0) + 2
    }
}

/// Gives numbers.
#[derive(Default)]
pub struct Numbers {
    given: HashMap<SnapshotInfo, Number>,
    used: HashSet<Number>,
}

impl Numbers {
    /// The numbers of snapshots in the order in which they were made. `None` for those beyond 2^14 - 1 at a time.
    pub fn of(&mut self, snapshots: &[SnapshotInfo]) -> Vec<Option<Number>> {
        let new = snapshots.iter().filter(|snapshot| !self.given.contains_key(snapshot)).count();
        if self.used.len() + new > LAST as usize {
            // After so many, those of snapshots that are gone are used again.
            let there: HashSet<&SnapshotInfo> = snapshots.iter().collect();
            self.given.retain(|snapshot, _| there.contains(snapshot));
            self.used = self.given.values().copied().collect();
        }
        snapshots.iter().map(|snapshot| self.one(snapshot)).collect()
    }

    fn one(&mut self, snapshot: &SnapshotInfo) -> Option<Number> {
        if let Some(number) = self.given.get(snapshot) {
            return Some(*number);
        }
        if self.used.len() >= LAST as usize {
            return None;
        }
        let mut number = xxh3_64(format!("{}\0{}", snapshot.name, snapshot.description).as_bytes()) % LAST + 1;
        while !self.used.insert(Number(number as u16)) {
            number = number % LAST + 1;
        }
        let number = Number(number as u16);
        self.given.insert(snapshot.clone(), number);
        Some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfs::ROOT;

    fn info(name: &str, description: &str) -> SnapshotInfo {
        SnapshotInfo { name: name.into(), description: description.into() }
    }

    #[test]
    fn each_file_has_one_place() {
        for ino in [0, 1, 128, (1 << 44) - 1, (1 << 48) - 1] {
            assert_eq!(place(Ino(ino)), Place::Live);
            for number in [1, 77, LAST as u16] {
                let number = Number(number);
                assert_eq!(place(number.ino(Ino(ino))), Place::In(number, Ino(ino)));
            }
        }
        assert_eq!(place(LIST), Place::List);
        for ino in [LIST.0 + 1, LIST.0 + (1 << SHIFT), u64::MAX] {
            assert_eq!(place(Ino(ino)), Place::Nowhere);
        }
        assert!(Number(LAST as u16).ino(ROOT).0 < LIST.0 && LIST.0 < 1 << 63);
    }

    #[test]
    fn numbers_are_the_same_in_each_run_and_for_each_one() {
        let all: Vec<_> = (0..2000).map(|n| info(&format!("s{n}"), "x")).collect();
        let numbers = Numbers::default().of(&all);
        assert_eq!(numbers.iter().collect::<HashSet<_>>().len(), all.len());
        assert_eq!(Numbers::default().of(&all), numbers);
        // New ones change nothing of those before, nor do those that go.
        let mut given = Numbers::default();
        given.of(&all[..1000]);
        assert_eq!(given.of(&all), numbers);
        assert_eq!(given.of(&all[500..]), numbers[500..]);
        // The same name for another one is another number.
        assert_ne!(given.of(&[info("s0", "y")])[0], numbers[0]);
        // The hash is part of every handle.
        assert_eq!(
            Numbers::default().of(&[info("monday", "blockd snapshot 00, made today")]),
            [Some(Number(NUMBER_OF_MONDAY))]
        );
    }

    const NUMBER_OF_MONDAY: u16 = 9266;

    #[test]
    fn there_are_no_more_than_fit_and_the_gone_make_room() {
        let all: Vec<_> = (0..LAST + 1).map(|n| info(&format!("s{n}"), "")).collect();
        let mut given = Numbers::default();
        let numbers = given.of(&all);
        assert_eq!(numbers.iter().filter(|number| number.is_none()).count(), 1);
        assert!(numbers.last().is_some_and(Option::is_none));
        assert!(given.of(&all[1..]).iter().all(Option::is_some));
    }
}
