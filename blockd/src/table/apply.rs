//! Applying a chunk: one atomic batch.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use super::key::{self, NumberKey};
use super::kv::Batch;
use super::leaf::{LEAF_BLOCKS, Leaf, Target, place};
use super::lookup::ChunkDirectory;
use super::refer::{chunks_of, keep_back_rows};
use super::space::{Change, Usage};
use super::spans::ZeroSpans;
use super::table::Table;
use super::{Applied, TableError};
use crate::chunk::{ChunkExtent, ChunkIndex, ChunkKind, ExtentKind};

/// Zeroes over more whole leaves than this (16 MiB) become one range instead of leaf after leaf.
const LONG_SPAN: u64 = 256;

/// Changes of one leaf, in address order.
pub(super) struct LeafEdit {
    pub leaf: u64,
    pub sets: Vec<(u8, u8, Target)>,
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
            Some("it is not part of the history")
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
        let mut batch = Batch::default();
        batch.put(&key::APPLIED, key::encode_applied(position));
        self.set_all(index, (position.seq, 0), batch, None)?;
        *applied = position;
        self.lock_chunks().applied = position.seq;
        Ok(())
    }

    /// Maps everything `index` says, whatever was there before; what that leaves without use dies at `death`. Chunks that it
    /// refers to and that are not there go into `missing`; without that, there must be none.
    pub(super) fn set_all(
        &self,
        index: &ChunkIndex,
        death: (u64, u64),
        mut batch: Batch,
        missing: Option<&mut BTreeSet<u64>>,
    ) -> Result<(), TableError> {
        let id = index.name.seq;
        let (edits, long) = split(id, &index.extents);
        let mut change = Change::default();
        self.edit_leaves(id, edits, &mut change, &mut batch)?;
        let spans = self.clear_spans(&long, &mut change, &mut batch)?;
        let revived = self.revive(change.referred(), missing)?;
        change.revive(revived);
        change.add(id, new_usage(index, index.frames.raw_blocks() as u32));
        self.commit(index, change, death, spans, batch)
    }

    /// Writes a batch that adds the chunk `index`.
    pub(super) fn commit(
        &self,
        index: &ChunkIndex,
        change: Change,
        death: (u64, u64),
        spans: Option<ZeroSpans>,
        mut batch: Batch,
    ) -> Result<(), TableError> {
        let id = index.name.seq;
        let refers = change.referred().next().is_some() && !self.refers.load(Ordering::Relaxed);
        if refers {
            // A program that does not know back rows must not go on from this.
            batch.put(&key::FORMAT, key::encode_format(self.volume, key::REFER_VERSION));
        }
        let settled = change.settle(&self.lock_chunks(), death, &mut batch).map_err(wrong_count)?;
        batch.put(&key::chunk(id), key::encode_chunk(&index.name, &index.frames));
        let write = |batch| self.kv.write(batch).map_err(|source| TableError::Engine { op: "writing", source });
        match spans {
            None => write(batch)?,
            Some(spans) => {
                let mut current = self.spans.write().unwrap_or_else(PoisonError::into_inner);
                write(batch)?;
                *current = spans;
            }
        }
        if refers {
            self.refers.store(true, Ordering::Relaxed);
        }
        settled.done(&mut self.lock_chunks());
        // What was just written is often read next.
        self.directories.insert(id, Arc::new(ChunkDirectory { name: index.name, frames: index.frames.clone() }));
        Ok(())
    }

    /// Puts the new values of edited leaves into `batch`, but for leaves that stay as they are, and what they no longer
    /// refer to into `change`. What is set to stand in another chunk than `own` refers to it.
    pub(super) fn edit_leaves(
        &self,
        own: u64,
        edits: Vec<LeafEdit>,
        change: &mut Change,
        batch: &mut Batch,
    ) -> Result<(), TableError> {
        let keys: Vec<NumberKey> = edits.iter().map(|edit| key::leaf(edit.leaf)).collect();
        let stored = self.kv.get_many(&keys).map_err(|source| TableError::Engine { op: "reading", source })?;
        let spans = self.read_spans();
        let referred = self.lock_chunks().referred.clone();
        for (edit, old) in edits.into_iter().zip(stored) {
            let base = match &old {
                Some(value) => decode_leaf(edit.leaf, value)?,
                None if spans.contains(edit.leaf) => Leaf::zeroes(),
                None => Leaf::default(),
            };
            count_gone(&base, &edit.sets, change);
            let mut leaf = base.clone();
            let mut begins = BTreeSet::new();
            for (start, blocks, target) in edit.sets {
                leaf.set(start, blocks, target);
                if let Target::Chunk { seq, .. } = target
                    && seq != own
                {
                    change.refer(seq, blocks.into());
                    begins.insert(seq);
                }
            }
            keep_back_rows(edit.leaf, (&base, &leaf), begins.into_iter(), &referred, batch);
            if leaf != base {
                batch.put(&key::leaf(edit.leaf), leaf.encode());
            }
        }
        Ok(())
    }

    /// Puts the removal of whole leaves into `batch`. Returns the zero spans as they will be, if there is any change.
    fn clear_spans(
        &self,
        long: &[LongSpan],
        change: &mut Change,
        batch: &mut Batch,
    ) -> Result<Option<ZeroSpans>, TableError> {
        if long.is_empty() {
            return Ok(None);
        }
        let mut spans = self.read_spans().clone();
        let referred = self.lock_chunks().referred.clone();
        for LongSpan { leaves, zero } in long {
            let (from, to) = (key::leaf(leaves.start), key::leaf(leaves.end));
            // A range tombstone slows later reads until it is compacted away: none where there is nothing to remove,
            // as in a new volume, or when a filesystem trims the same free space again. What goes has to be looked at
            // anyway, to know which chunks lose blocks.
            let mut any = false;
            let mut problem = None;
            self.kv
                .scan(&from, &to, &mut |k, value| {
                    any = true;
                    let number = key::number(k).unwrap_or(0);
                    match decode_leaf(number, value) {
                        Ok(leaf) => {
                            for run in leaf.runs() {
                                if let Target::Chunk { seq, .. } = run.target {
                                    change.unmap(seq, run.blocks.into());
                                }
                            }
                            for seq in chunks_of(&leaf).filter(|seq| referred.contains(seq)) {
                                batch.delete(&key::back(seq, number));
                            }
                        }
                        Err(error) => problem = Some(error),
                    }
                    problem.is_none()
                })
                .map_err(|source| TableError::Engine { op: "scanning", source })?;
            if let Some(problem) = problem {
                return Err(problem);
            }
            if any {
                batch.delete_range(&from, &to);
            }
            spans.set(leaves.clone(), *zero, batch);
        }
        Ok(Some(spans))
    }
}

/// The account of a new chunk of which `live` blocks are mapped.
pub(super) fn new_usage(index: &ChunkIndex, live: u32) -> Usage {
    let data = index.extents.iter().filter(|extent| matches!(extent.kind, ExtentKind::Data { .. })).count();
    let rows = index.extent_rows() - data;
    Usage {
        live,
        total: index.frames.raw_blocks() as u32,
        stored: index.object_len(),
        birth: index.basis(),
        tombs: rows as u32,
        referred: false,
    }
}

pub(super) fn wrong_count(id: u64) -> TableError {
    TableError::Damaged(format!("the account of chunk {id:x} is wrong"))
}

/// Tells `change` which blocks of which chunks `sets`, in address order, replace in `base`.
fn count_gone(base: &Leaf, sets: &[(u8, u8, Target)], change: &mut Change) {
    let mut runs = base.runs();
    for &(start, blocks, _) in sets {
        let end = start + blocks;
        while let [run, rest @ ..] = runs {
            let (from, to) = (run.start.max(start), (run.start + run.blocks).min(end));
            if let Target::Chunk { seq, .. } = run.target
                && from < to
            {
                change.unmap(seq, u32::from(to - from));
            }
            if run.start + run.blocks > end {
                break;
            }
            runs = rest;
        }
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
            ExtentKind::Refer { seq, index } => Target::Chunk { seq, index },
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
            // Less than 2^16 for data and references: an extent's payload is bounded by the chunk's.
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
