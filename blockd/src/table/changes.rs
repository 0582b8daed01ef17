//! What is different between two tables of one volume: for incremental exports.

use super::TableError;
use super::apply::decode_leaf;
use super::key;
use super::leaf::{LEAF_BLOCKS, Run, Target};
use super::table::Table;
use crate::types::Lba;

/// Leaves compared at a time.
const PAGE: usize = 4096;

/// Consecutive blocks that are not what they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Change {
    /// First block.
    pub lba: Lba,
    /// Number of blocks.
    pub blocks: u64,
    /// They read as zeroes now.
    pub zero: bool,
}

/// Leaves in order, as far as they were looked at.
struct Leaves {
    found: std::collections::VecDeque<(u64, Vec<Run>)>,
    next: Option<u64>,
}

impl Leaves {
    fn new(from: u64) -> Self {
        Self { found: Default::default(), next: Some(from) }
    }

    /// The first one that is left.
    fn first(&mut self, table: &Table) -> Result<Option<u64>, TableError> {
        if self.found.is_empty()
            && let Some(from) = self.next
        {
            self.found = table.leaves(from, PAGE)?.into();
            self.next = match self.found.back() {
                Some((last, _)) if self.found.len() == PAGE => Some(last + 1),
                _ => None,
            };
        }
        Ok(self.found.front().map(|(leaf, _)| *leaf))
    }

    /// Takes `leaf` out, which is the first one or is not there.
    fn take(&mut self, leaf: u64) -> Vec<Run> {
        match self.found.front() {
            Some((first, _)) if *first == leaf => self.found.pop_front().expect("it was looked at").1,
            _ => Vec::new(),
        }
    }
}

impl Table {
    /// What stands in at most `max` stored leaves, from number `from` on.
    fn leaves(&self, from: u64, max: usize) -> Result<Vec<(u64, Vec<Run>)>, TableError> {
        let mut found = Vec::new();
        let mut problem = None;
        let mut look = |k: &[u8], value: &[u8]| {
            let leaf = key::number(k).ok_or_else(|| TableError::Damaged("a leaf's key is malformed".into()));
            match leaf.and_then(|leaf| Ok((leaf, decode_leaf(leaf, value)?.runs().to_vec()))) {
                Ok(leaf) => found.push(leaf),
                Err(error) => problem = Some(error),
            }
            problem.is_none() && found.len() < max
        };
        self.kv
            .scan(&key::leaf(from), &key::leaf(u64::MAX), &mut look)
            .map_err(|source| TableError::Engine { op: "scanning", source })?;
        problem.map_or(Ok(found), Err)
    }

    /// Blocks from `lba` on, the first of a leaf, that do not stand where they stood in `old`, an earlier table of the same
    /// volume: at least one change, unless there is none, and hardly more than `max`; and where to go on, if there may be
    /// more. What compaction moved counts as changed; where nothing is mapped and where zeroes are, is the same.
    pub fn changes_since(&self, old: &Table, lba: Lba, max: usize) -> Result<(Vec<Change>, Option<Lba>), TableError> {
        let (mut before, mut after) = (Leaves::new(lba / LEAF_BLOCKS), Leaves::new(lba / LEAF_BLOCKS));
        let mut changes: Vec<Change> = Vec::new();
        loop {
            let leaf = match (before.first(old)?, after.first(self)?) {
                (None, None) => return Ok((changes, None)),
                (Some(leaf), None) | (None, Some(leaf)) => leaf,
                (Some(a), Some(b)) => a.min(b),
            };
            if changes.len() >= max {
                return Ok((changes, Some(leaf * LEAF_BLOCKS)));
            }
            let (before, after) = (before.take(leaf), after.take(leaf));
            if before != after {
                compare(leaf * LEAF_BLOCKS, &spread(&before), &spread(&after), &mut changes);
            }
        }
    }
}

/// What stands behind each block of a leaf. Zeroes are holes, for whoever reads them.
fn spread(runs: &[Run]) -> [Target; LEAF_BLOCKS as usize] {
    let mut targets = [Target::Hole; LEAF_BLOCKS as usize];
    for run in runs.iter().filter(|run| run.target != Target::Zero) {
        for i in 0..run.blocks {
            targets[usize::from(run.start + i)] = run.target.advanced(i.into());
        }
    }
    targets
}

fn compare(base: Lba, before: &[Target], after: &[Target], changes: &mut Vec<Change>) {
    for (lba, (before, after)) in (base..).zip(before.iter().zip(after)) {
        if before == after {
            continue;
        }
        let zero = *after == Target::Hole;
        match changes.last_mut() {
            Some(last) if last.lba + last.blocks == lba && last.zero == zero => last.blocks += 1,
            _ => changes.push(Change { lba, blocks: 1, zero }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn run(start: u8, blocks: u8, target: Target) -> Run {
        Run { start, blocks, target }
    }

    #[test]
    fn blocks_that_stand_elsewhere_have_changed_and_zeroes_are_holes() {
        let before = [run(0, 8, Target::Chunk { seq: 1, index: 0 }), run(8, 4, Target::Zero)];
        let after = [
            run(0, 2, Target::Chunk { seq: 1, index: 0 }),
            run(2, 2, Target::Chunk { seq: 9, index: 5 }),
            run(6, 2, Target::Chunk { seq: 1, index: 6 }),
            run(20, 1, Target::Chunk { seq: 9, index: 7 }),
            run(30, 2, Target::Zero),
        ];
        let mut changes = Vec::new();
        compare(640, &spread(&before), &spread(&after), &mut changes);
        let change = |lba, blocks, zero| Change { lba, blocks, zero };
        assert_eq!(changes, [change(642, 2, false), change(644, 2, true), change(660, 1, false)]);
    }
}
