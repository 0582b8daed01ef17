//! Applying a chunk: one atomic batch.

use std::ops::Range;
use std::sync::{Arc, PoisonError};

use super::key::{self, NumberKey};
use super::kv::Batch;
use super::leaf::{LEAF_BLOCKS, Leaf, Target, place};
use super::lookup::ChunkDirectory;
use super::spans::ZeroSpans;
use super::table::Table;
use super::{Applied, TableError};
use crate::chunk::{ChunkExtent, ChunkIndex, ChunkKind, ExtentKind};

/// Zeroes over more whole leaves than this (16 MiB) become one range instead of leaf after leaf.
const LONG_SPAN: u64 = 256;

/// Changes of one leaf, in address order.
struct LeafEdit {
    leaf: u64,
    sets: Vec<(u8, u8, Target)>,
}

/// Whole leaves that become zeroes or a hole.
struct LongSpan {
    leaves: Range<u64>,
    zero: bool,
}

impl Table {
    /// Applies the chunk that follows what is applied. All of it is visible afterwards; all or nothing of it survives
    /// a crash. A seal is not part of the history and is refused.
    pub fn apply(&self, index: &ChunkIndex) -> Result<(), TableError> {
        let mut applied = self.lock_applied();
        let wrong = if index.name.volume != self.volume {
            Some("it belongs to another volume")
        } else if index.kind != ChunkKind::Data {
            Some("it is a seal")
        } else if index.name.seq != applied.seq + 1 {
            Some("it is not the next in sequence")
        } else if index.first_lsn < applied.lsn {
            Some("its LSNs are applied already")
        } else {
            None
        };
        if let Some(why) = wrong {
            return Err(TableError::OutOfOrder { applied: *applied, got: index.name, why });
        }
        let position = Applied { seq: index.name.seq, lsn: index.last_lsn };
        let (edits, long) = split(index.name.seq, &index.extents);
        let mut batch = Batch::default();
        self.edit_leaves(edits, &mut batch)?;
        let spans = self.clear_spans(&long, &mut batch)?;
        batch.put(&key::chunk(index.name.seq), key::encode_chunk(index.name.epoch, &index.frames));
        batch.put(&key::APPLIED, key::encode_applied(position));
        let write = |batch| self.kv.write(batch).map_err(|source| TableError::Engine { op: "writing", source });
        match spans {
            None => write(batch)?,
            Some(spans) => {
                let mut current = self.spans.write().unwrap_or_else(PoisonError::into_inner);
                write(batch)?;
                *current = spans;
            }
        }
        // What was just written is often read next.
        self.directories
            .insert(index.name.seq, Arc::new(ChunkDirectory { name: index.name, frames: index.frames.clone() }));
        *applied = position;
        Ok(())
    }

    /// Puts the new values of edited leaves into `batch`, but for leaves that stay as they are.
    fn edit_leaves(&self, edits: Vec<LeafEdit>, batch: &mut Batch) -> Result<(), TableError> {
        let whole = |edit: &LeafEdit| matches!(edit.sets[..], [(0, blocks, Target::Chunk { .. })] if u64::from(blocks) == LEAF_BLOCKS);
        let keys: Vec<NumberKey> = edits.iter().filter(|edit| !whole(edit)).map(|edit| key::leaf(edit.leaf)).collect();
        let mut stored =
            self.kv.get_many(&keys).map_err(|source| TableError::Engine { op: "reading", source })?.into_iter();
        let spans = self.read_spans();
        for edit in edits {
            let old = if whole(&edit) { None } else { stored.next().flatten() };
            let base = match &old {
                Some(value) => decode_leaf(edit.leaf, value)?,
                None if spans.contains(edit.leaf) => Leaf::zeroes(),
                None => Leaf::default(),
            };
            let mut leaf = base.clone();
            for (start, blocks, target) in edit.sets {
                leaf.set(start, blocks, target);
            }
            if leaf != base {
                batch.put(&key::leaf(edit.leaf), leaf.encode());
            }
        }
        Ok(())
    }

    /// Puts the removal of whole leaves into `batch`. Returns the zero spans as they will be, if there is any change.
    fn clear_spans(&self, long: &[LongSpan], batch: &mut Batch) -> Result<Option<ZeroSpans>, TableError> {
        if long.is_empty() {
            return Ok(None);
        }
        let mut spans = self.read_spans().clone();
        for LongSpan { leaves, zero } in long {
            let (from, to) = (key::leaf(leaves.start), key::leaf(leaves.end));
            // A range tombstone slows later reads until it is compacted away: none where there is nothing to remove,
            // as in a new volume, or when a filesystem trims the same free space again.
            let mut any = false;
            self.kv
                .scan(&from, &to, &mut |_, _| {
                    any = true;
                    false
                })
                .map_err(|source| TableError::Engine { op: "scanning", source })?;
            if any {
                batch.delete_range(&from, &to);
            }
            spans.set(leaves.clone(), *zero, batch);
        }
        Ok(Some(spans))
    }
}

/// Parses the stored leaf number `leaf`.
pub(super) fn decode_leaf(leaf: u64, value: &[u8]) -> Result<Leaf, TableError> {
    Leaf::decode(value).ok_or_else(|| TableError::Damaged(format!("the leaf of block {}", leaf * LEAF_BLOCKS)))
}

/// What `extents` do to which leaves, in address order.
fn split(seq: u64, extents: &[ChunkExtent]) -> (Vec<LeafEdit>, Vec<LongSpan>) {
    let mut edits: Vec<LeafEdit> = Vec::new();
    let mut long = Vec::new();
    for extent in extents {
        let target = match extent.kind {
            ExtentKind::Data { index } => Target::Chunk { seq, index },
            ExtentKind::Zero => Target::Zero,
            ExtentKind::Hole => Target::Hole,
        };
        let end = extent.lba + extent.blocks;
        let mut lba = extent.lba;
        while lba < end {
            let (leaf, start) = place(lba);
            let whole = leaf..end / LEAF_BLOCKS;
            if start == 0
                && !matches!(target, Target::Chunk { .. })
                && whole.end.saturating_sub(whole.start) > LONG_SPAN
            {
                lba = whole.end * LEAF_BLOCKS;
                long.push(LongSpan { leaves: whole, zero: target == Target::Zero });
                continue;
            }
            let blocks = (end - lba).min(LEAF_BLOCKS - u64::from(start)) as u8;
            // Less than 2^16 for data: an extent's payload is bounded by the chunk's.
            let set = (start, blocks, target.advanced((lba - extent.lba) as u16));
            match edits.last_mut() {
                Some(last) if last.leaf == leaf => last.sets.push(set),
                _ => edits.push(LeafEdit { leaf, sets: vec![set] }),
            }
            lba += u64::from(blocks);
        }
    }
    (edits, long)
}
