//! Which blocks are allocated: for block status and sparse copies, not for reads.

use super::TableError;
use super::apply::decode_leaf;
use super::key;
use super::leaf::{LEAF_BLOCKS, Target, place};
use super::table::Table;
use crate::types::Lba;
use crate::volume::Allocation;

/// Leaves looked at in one call (4 GiB of mapped blocks), so that a call on a full volume stays short.
const LEAVES_PER_CALL: usize = 16_384;

/// Runs under construction.
struct Runs {
    found: Vec<(u64, Allocation)>,
    max: usize,
    /// The first block not yet reported.
    at: Lba,
    end: Lba,
}

impl Runs {
    /// Reports everything up to `lba` as `allocation`. False when there is room for no more.
    fn extend_to(&mut self, lba: Lba, allocation: Allocation) -> bool {
        let stop = lba.min(self.end);
        if stop <= self.at {
            return self.at < self.end;
        }
        let blocks = stop - self.at;
        let full = self.found.len() == self.max;
        match self.found.last_mut() {
            Some((last, kind)) if *kind == allocation => *last += blocks,
            _ if full => return false,
            _ => self.found.push((blocks, allocation)),
        }
        self.at = stop;
        self.at < self.end
    }
}

impl Table {
    /// How `blocks` blocks from `lba` on are allocated: runs of (blocks, allocation), in order, without gaps,
    /// neighbours joined. At least one and at most `max_runs` (at least 1); may end early. Cheap on unmapped space
    /// however long.
    pub fn allocations(&self, lba: Lba, blocks: u64, max_runs: usize) -> Result<Vec<(u64, Allocation)>, TableError> {
        let mut runs = Runs { found: Vec::new(), max: max_runs.max(1), at: lba, end: lba + blocks };
        if blocks == 0 {
            return Ok(runs.found);
        }
        // Held over the scan, so that a chunk applied meanwhile does not show in one and not in the other.
        let spans = self.read_spans();
        // Space without leaves, up to `until`.
        let bare = |runs: &mut Runs, until: Lba| {
            while runs.at < until.min(runs.end) {
                let (zero, end) = spans.state_from(place(runs.at).0);
                let kind = if zero { Allocation::Zero } else { Allocation::Hole };
                let stop = end.saturating_mul(LEAF_BLOCKS).min(until);
                if !runs.extend_to(stop, kind) {
                    return false;
                }
            }
            runs.at < runs.end
        };
        let mut seen = 0;
        let mut problem = None;
        let mut complete = true;
        let (first, last) = (place(lba).0, place(runs.end - 1).0);
        self.kv
            .scan(&key::leaf(first), &key::leaf(last + 1), &mut |k, value| {
                let Some(leaf) = key::number(k) else {
                    problem = Some(TableError::Damaged("a leaf's key is malformed".into()));
                    return false;
                };
                let base = leaf * LEAF_BLOCKS;
                let go_on = bare(&mut runs, base.max(lba));
                let go_on = go_on
                    && match decode_leaf(leaf, value) {
                        Err(error) => {
                            problem = Some(error);
                            false
                        }
                        Ok(leaf) => leaf_runs(&mut runs, base, leaf.runs()),
                    };
                seen += 1;
                complete = go_on && seen < LEAVES_PER_CALL;
                complete
            })
            .map_err(|source| TableError::Engine { op: "scanning", source })?;
        if let Some(problem) = problem {
            return Err(problem);
        }
        if complete {
            let end = runs.end;
            bare(&mut runs, end);
        }
        Ok(runs.found)
    }
}

/// Reports the whole leaf that begins at `base`. False when there is no more to report or no room.
fn leaf_runs(runs: &mut Runs, base: Lba, leaf: &[super::leaf::Run]) -> bool {
    for run in leaf {
        let start = base + u64::from(run.start);
        let kind = match run.target {
            Target::Chunk { .. } => Allocation::Data,
            Target::Zero => Allocation::Zero,
            Target::Hole => Allocation::Hole,
        };
        if !runs.extend_to(start, Allocation::Hole) || !runs.extend_to(start + u64::from(run.blocks), kind) {
            return false;
        }
    }
    runs.extend_to(base + LEAF_BLOCKS, Allocation::Hole)
}
