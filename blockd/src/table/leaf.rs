//! A leaf: the mappings of 64 consecutive blocks, as packed runs. Pure; total on foreign bytes.

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::types::Lba;

/// Blocks in a leaf.
pub const LEAF_BLOCKS: u64 = 64;

/// The `seq` of a run of zeroes that count as allocated.
const ZERO_SEQ: u64 = u64::MAX;

/// What stands behind a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Nothing: it reads as zeroes.
    Hole,
    /// Zeroes that count as allocated.
    Zero,
    /// A block of a chunk's payload.
    Chunk {
        /// The chunk's sequence number.
        seq: u64,
        /// The block's index in the payload; the blocks after it in a run have the next ones.
        index: u16,
    },
}

impl Target {
    /// The target of the block `by` further in the same run.
    pub fn advanced(self, by: u16) -> Self {
        match self {
            Target::Chunk { seq, index } => Target::Chunk {
                seq,
                // Checked where runs are made and decoded.
                index: index + by,
            },
            other => other,
        }
    }

    /// Whether a run that begins at `self` and is `blocks` long goes on with `next`.
    pub fn continues(self, blocks: u64, next: Target) -> bool {
        match (self, next) {
            (Target::Hole, Target::Hole) | (Target::Zero, Target::Zero) => true,
            (Target::Chunk { seq, index }, Target::Chunk { seq: next_seq, index: next_index }) => {
                seq == next_seq && u64::from(index) + blocks == u64::from(next_index)
            }
            _ => false,
        }
    }
}

/// Consecutive blocks of a leaf with consecutive targets. Never a hole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Run {
    /// First block, counted from the leaf's first.
    pub start: u8,
    /// Number of blocks.
    pub blocks: u8,
    /// What stands behind the first one.
    pub target: Target,
}

impl Run {
    fn end(&self) -> u8 {
        self.start + self.blocks
    }
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawRun {
    start: u8,
    blocks: u8,
    index: U16,
    seq: U64,
}

const _: () = assert!(size_of::<RawRun>() == 12);

/// Number of the leaf that holds `lba`, and the block's position in it.
pub fn place(lba: Lba) -> (u64, u8) {
    (lba / LEAF_BLOCKS, (lba % LEAF_BLOCKS) as u8)
}

/// The mappings of a leaf, in address order. Blocks in no run are holes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Leaf {
    runs: Vec<Run>,
}

impl Leaf {
    /// A leaf of nothing but allocated zeroes.
    pub fn zeroes() -> Self {
        Self { runs: vec![Run { start: 0, blocks: LEAF_BLOCKS as u8, target: Target::Zero }] }
    }

    /// The runs in order.
    pub fn runs(&self) -> &[Run] {
        &self.runs
    }

    /// Appends a run behind the others, joining it with the last where it continues that.
    pub(super) fn push(&mut self, run: Run) {
        if run.target == Target::Hole || run.blocks == 0 {
            return;
        }
        match self.runs.last_mut() {
            Some(last) if last.end() == run.start && last.target.continues(last.blocks.into(), run.target) => {
                last.blocks += run.blocks;
            }
            _ => self.runs.push(run),
        }
    }

    /// Maps `blocks` blocks from `start` on to `target`, whatever they were before.
    pub fn set(&mut self, start: u8, blocks: u8, target: Target) {
        let end = start + blocks;
        let new = Run { start, blocks, target };
        let mut result = Leaf { runs: Vec::with_capacity(self.runs.len() + 2) };
        let mut placed = false;
        for run in &self.runs {
            if run.start >= end && !placed {
                result.push(new);
                placed = true;
            }
            if run.end() <= start || run.start >= end {
                result.push(*run);
                continue;
            }
            if run.start < start {
                result.push(Run { blocks: start - run.start, ..*run });
            }
            if run.end() > end {
                if !placed {
                    result.push(new);
                    placed = true;
                }
                result.push(Run {
                    start: end,
                    blocks: run.end() - end,
                    target: run.target.advanced(u16::from(end - run.start)),
                });
            }
        }
        if !placed {
            result.push(new);
        }
        *self = result;
    }

    /// The stored form.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.runs.len() * size_of::<RawRun>());
        for run in &self.runs {
            let (seq, index) = match run.target {
                Target::Chunk { seq, index } => (seq, index),
                // Holes are never stored.
                Target::Zero | Target::Hole => (ZERO_SEQ, 0),
            };
            let raw = RawRun { start: run.start, blocks: run.blocks, index: index.into(), seq: seq.into() };
            out.extend_from_slice(raw.as_bytes());
        }
        out
    }

    /// Parses a stored leaf; nothing when it contradicts itself.
    pub fn decode(value: &[u8]) -> Option<Self> {
        let rows = <[RawRun]>::ref_from_bytes(value).ok()?;
        let mut runs = Vec::with_capacity(rows.len());
        let mut end = 0u64;
        for row in rows {
            let (start, blocks) = (u64::from(row.start), u64::from(row.blocks));
            if start < end || blocks == 0 || start + blocks > LEAF_BLOCKS {
                return None;
            }
            end = start + blocks;
            let target = match (row.seq.get(), row.index.get()) {
                (ZERO_SEQ, 0) => Target::Zero,
                (ZERO_SEQ | 0, _) => return None,
                (seq, index) if u64::from(index) + blocks <= u64::from(u16::MAX) => Target::Chunk { seq, index },
                _ => return None,
            };
            runs.push(Run { start: row.start, blocks: row.blocks, target });
        }
        Some(Self { runs })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn target() -> impl Strategy<Value = Target> {
        prop_oneof![
            Just(Target::Hole),
            Just(Target::Zero),
            (1u64..4, 0u16..200).prop_map(|(seq, index)| Target::Chunk { seq, index }),
        ]
    }

    proptest! {
        #[test]
        fn behaves_like_64_cells(edits in prop::collection::vec((0u8..64, 1u8..=64, target()), 0..20)) {
            let mut leaf = Leaf::default();
            let mut cells = [Target::Hole; 64];
            for (start, blocks, target) in edits {
                let blocks = blocks.min(64 - start);
                leaf.set(start, blocks, target);
                for i in 0..blocks {
                    cells[usize::from(start + i)] = target.advanced(i.into());
                }
                let mut seen = [Target::Hole; 64];
                for run in leaf.runs() {
                    for i in 0..run.blocks {
                        seen[usize::from(run.start + i)] = run.target.advanced(i.into());
                    }
                }
                prop_assert_eq!(seen, cells);
                prop_assert_eq!(Leaf::decode(&leaf.encode()), Some(leaf.clone()));
            }
        }

        #[test]
        fn decoding_is_total(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            if let Some(leaf) = Leaf::decode(&bytes) {
                prop_assert_eq!(leaf.encode(), bytes);
            }
        }
    }

    #[test]
    fn neighbours_join() {
        let mut leaf = Leaf::default();
        for i in 0..64 {
            leaf.set(i, 1, Target::Chunk { seq: 9, index: 100 + u16::from(i) });
        }
        assert_eq!(leaf.runs().len(), 1);
        assert_eq!(leaf.encode(), [0, 64, 100, 0, 9, 0, 0, 0, 0, 0, 0, 0]);
    }
}
