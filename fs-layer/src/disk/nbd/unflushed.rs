//! What a server has answered and not yet made durable.

use std::collections::VecDeque;

/// A change of the disk. Offsets and lengths in bytes.
pub(super) enum Change {
    Write { offset: u64, data: Vec<u8> },
    Discard { offset: u64, len: u64 },
}

/// Changes in the order in which they were answered.
#[derive(Default)]
pub(super) struct Unflushed {
    changes: VecDeque<Change>,
    /// The number of the first of them, counted since the beginning.
    first: u64,
    bytes: usize,
}

/// Changes kept at once, however small they are.
const CHANGES_MAX: usize = 1 << 16;

impl Unflushed {
    pub(super) fn push(&mut self, change: Change) {
        self.bytes += change.bytes();
        self.changes.push_back(change);
    }

    /// Behind the last change: what a flush that begins now covers.
    pub(super) fn end(&self) -> u64 {
        self.first + self.changes.len() as u64
    }

    /// Forgets what a flush has covered.
    pub(super) fn drop_until(&mut self, end: u64) {
        while self.first < end
            && let Some(change) = self.changes.pop_front()
        {
            self.bytes -= change.bytes();
            self.first += 1;
        }
    }

    pub(super) fn has_room(&self, bytes: usize, bytes_max: usize) -> bool {
        self.changes.is_empty() || (self.bytes + bytes <= bytes_max && self.changes.len() < CHANGES_MAX)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &Change> {
        self.changes.iter()
    }
}

impl Change {
    fn bytes(&self) -> usize {
        match self {
            Change::Write { data, .. } => data.len(),
            Change::Discard { .. } => 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_what_was_there_when_it_began() {
        let mut unflushed = Unflushed::default();
        let write = |offset| Change::Write { offset, data: vec![1; 10] };
        unflushed.push(write(0));
        unflushed.push(Change::Discard { offset: 5, len: 5 });
        let covered = unflushed.end();
        unflushed.push(write(20));
        assert!(unflushed.has_room(4, 24) && !unflushed.has_room(5, 24));
        unflushed.drop_until(covered);
        assert_eq!(unflushed.iter().count(), 1);
        assert!(unflushed.has_room(4, 24));
        // An older flush that was answered late takes nothing more away.
        unflushed.drop_until(1);
        assert_eq!(unflushed.iter().count(), 1);
        unflushed.drop_until(unflushed.end());
        assert!(unflushed.has_room(1000, 24));
    }
}
