//! Finding blocks: the read path. One point lookup per leaf, no iterator.

use std::sync::Arc;

use super::TableError;
use super::apply::decode_leaf;
use super::key::{self, NumberKey};
use super::leaf::{LEAF_BLOCKS, Target, place};
use super::table::Table;
use crate::chunk::{ChunkName, FrameDirectory};
use crate::types::Lba;

/// Consecutive blocks with consecutive targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mapped {
    /// First block.
    pub lba: Lba,
    /// Number of blocks.
    pub blocks: u64,
    /// What stands behind the first one.
    pub target: Target,
}

/// What a reader needs to know of a chunk.
#[derive(Clone, Debug)]
pub struct ChunkDirectory {
    /// Its identity.
    pub name: ChunkName,
    /// Where its frames are.
    pub frames: FrameDirectory,
}

impl ChunkDirectory {
    /// Memory in use, in bytes.
    pub(super) fn memory(&self) -> usize {
        size_of::<Self>() + self.frames.memory()
    }
}

impl Table {
    /// What stands behind `blocks` blocks from `lba` on: in order, without gaps, neighbours joined. Allocated zeroes
    /// may be reported as a hole; [`Table::allocations`] tells them apart.
    pub fn lookup(&self, lba: Lba, blocks: u64) -> Result<Vec<Mapped>, TableError> {
        let mut found: Vec<Mapped> = Vec::new();
        if blocks == 0 {
            return Ok(found);
        }
        let end = lba + blocks;
        let leaves = place(lba).0..=place(end - 1).0;
        let failed = |source| TableError::Engine { op: "reading", source };
        if leaves.start() == leaves.end() {
            let value = self.kv.get(&key::leaf(*leaves.start())).map_err(failed)?;
            add_leaf(&mut found, *leaves.start(), value, lba, end)?;
        } else {
            let keys: Vec<NumberKey> = leaves.clone().map(key::leaf).collect();
            let values = self.kv.get_many(&keys).map_err(failed)?;
            for (leaf, value) in leaves.zip(values) {
                add_leaf(&mut found, leaf, value, lba, end)?;
            }
        }
        Ok(found)
    }

    /// The frame directory of the chunk with the id `seq`, which some block is mapped to.
    pub fn directory(&self, seq: u64) -> Result<Arc<ChunkDirectory>, TableError> {
        if let Some(directory) = self.directories.get(&seq) {
            return Ok(directory);
        }
        let value = self
            .kv
            .get(&key::chunk(seq))
            .map_err(|source| TableError::Engine { op: "reading", source })?
            .ok_or(TableError::Unlisted { id: seq })?;
        let (name, frames) =
            key::decode_chunk(seq, &value).map_err(|error| TableError::Damaged(format!("chunk {seq:x}: {error}")))?;
        let directory = Arc::new(ChunkDirectory { name, frames });
        self.directories.insert(seq, directory.clone());
        Ok(directory)
    }
}

impl Table {
    /// Shows every run of mapped blocks, in address order, until `visit` says false. Spans of allocated zeroes kept as
    /// such are not among them.
    pub fn each_run(&self, mut visit: impl FnMut(Mapped) -> bool) -> Result<(), TableError> {
        let mut damaged = None;
        self.kv
            .scan(&key::leaf(0), &key::leaf(u64::MAX), &mut |k, value| {
                let leaf = key::number(k).unwrap_or(0);
                match decode_leaf(leaf, value) {
                    Ok(found) => found.runs().iter().all(|run| {
                        let lba = leaf * LEAF_BLOCKS + u64::from(run.start);
                        visit(Mapped { lba, blocks: run.blocks.into(), target: run.target })
                    }),
                    Err(error) => {
                        damaged = Some(error);
                        false
                    }
                }
            })
            .map_err(|source| TableError::Engine { op: "scanning", source })?;
        damaged.map_or(Ok(()), Err)
    }
}

/// Appends what `value`, the stored form of `leaf`, says of the blocks from `lba` to `end`.
fn add_leaf(found: &mut Vec<Mapped>, leaf: u64, value: Option<Vec<u8>>, lba: Lba, end: Lba) -> Result<(), TableError> {
    let base = leaf * LEAF_BLOCKS;
    let end = end.min(base + LEAF_BLOCKS);
    let mut at = lba.max(base);
    if let Some(value) = value {
        for run in decode_leaf(leaf, &value)?.runs() {
            let start = (base + u64::from(run.start)).max(at);
            let stop = (base + u64::from(run.start) + u64::from(run.blocks)).min(end);
            if start >= stop {
                continue;
            }
            push(found, at, start - at, Target::Hole);
            let skipped = (start - base) as u16 - u16::from(run.start);
            push(found, start, stop - start, run.target.advanced(skipped));
            at = stop;
        }
    }
    push(found, at, end - at, Target::Hole);
    Ok(())
}

fn push(found: &mut Vec<Mapped>, lba: Lba, blocks: u64, target: Target) {
    if blocks == 0 {
        return;
    }
    match found.last_mut() {
        Some(last) if last.target.continues(last.blocks, target) => last.blocks += blocks,
        _ => found.push(Mapped { lba, blocks, target }),
    }
}
