//! Copies by reference: blocks of several addresses that are one block of a chunk.
//!
//! A chunk's header says where its own blocks belong. Which other addresses refer to them is told by the headers of other
//! chunks, so that compaction could not find them by the chunk's own; for each leaf that refers to a chunk by such a header
//! the table therefore has a *back row*, (chunk, leaf). It goes when the leaf has nothing of the chunk any more, and with
//! the chunk.

use std::collections::{BTreeMap, BTreeSet};

use super::TableError;
use super::key;
use super::kv::Batch;
use super::leaf::{Leaf, Target};
use super::lookup::Mapped;
use super::pins::Pin;
use super::space::Usage;
use super::table::Table;
use crate::chunk::{ChunkExtent, ChunkIndex, ExtentKind, RELOCATED};
use crate::types::Lba;

/// A chunk that so many blocks are mapped to is not referred to once more: the accounts would overflow some day.
const LIVE_MAX: u32 = 1 << 30;

impl Table {
    /// Keeps the chunk `id` from being moved and deleted until the pin is dropped. Only for a chunk that is pinned already, or
    /// while nothing is moved or deleted: otherwise it may be too late.
    pub fn pin(&self, id: u64) -> Pin {
        self.pins.pin(id)
    }

    /// As [`Table::lookup`]; with each run a pin if it may be referred to, taken before anything can move it. Only chunks of
    /// the history may: a relocated one may be unknown to a table that somebody else goes on from.
    pub fn lookup_pinned(&self, lba: Lba, blocks: u64) -> Result<Vec<(Mapped, Option<Pin>)>, TableError> {
        let _applied = self.lock_applied();
        let found = self.lookup(lba, blocks)?;
        let chunks = self.lock_chunks();
        let pinned = found.into_iter().map(|run| {
            let may =
                |seq: &u64| seq & RELOCATED == 0 && chunks.used.get(seq).is_some_and(|usage| usage.live < LIVE_MAX);
            let pin = match run.target {
                Target::Chunk { seq, .. } => Some(seq).filter(may).map(|seq| self.pins.pin(seq)),
                Target::Zero | Target::Hole => None,
            };
            (run, pin)
        });
        Ok(pinned.collect())
    }

    /// Whether the chunk `id` is pinned.
    pub fn is_pinned(&self, id: u64) -> bool {
        self.pins.contains(id)
    }

    /// The leaves that refer to the chunk `id` by headers of other chunks, in order.
    pub(super) fn leaves_that_refer(&self, id: u64) -> Result<Vec<u64>, TableError> {
        let mut leaves = Vec::new();
        let mut sound = true;
        let mut look = |k: &[u8], _: &[u8]| {
            match key::back_place(k) {
                Some((_, leaf)) => leaves.push(leaf),
                None => sound = false,
            }
            sound
        };
        self.kv
            .scan(&key::back(id, 0), &key::back(id + 1, 0), &mut look)
            .map_err(|source| TableError::Engine { op: "scanning", source })?;
        if sound { Ok(leaves) } else { Err(TableError::Damaged("the key of a back row is malformed".into())) }
    }

    /// Which of the references that `index` tells are still true, in address order.
    pub(super) fn true_references(&self, index: &ChunkIndex) -> Result<Vec<ChunkExtent>, TableError> {
        let mut found: Vec<ChunkExtent> = Vec::new();
        for (extent, seq, index) in index.references() {
            for run in self.lookup(extent.lba, extent.blocks)? {
                let told = Target::Chunk { seq, index }.advanced((run.lba - extent.lba) as u16);
                if let (Target::Chunk { seq, index }, true) = (run.target, run.target == told) {
                    let kind = ExtentKind::Refer { seq, index };
                    found.push(ChunkExtent { lba: run.lba, blocks: run.blocks, kind });
                }
            }
        }
        Ok(found)
    }

    /// Accounts of the chunks `ids`, which blocks are mapped to from now on, as far as they are not in use: dead ones come
    /// back to life, which happens in tables made of headers alone. Those that are not there at all go into
    /// `missing`, if somebody looks after them.
    pub(super) fn revive(
        &self,
        ids: impl Iterator<Item = u64>,
        mut missing: Option<&mut BTreeSet<u64>>,
    ) -> Result<BTreeMap<u64, Usage>, TableError> {
        let mut revived = BTreeMap::new();
        for id in ids {
            let dead = {
                let chunks = self.lock_chunks();
                if chunks.used.contains_key(&id) {
                    continue;
                }
                chunks.dead.get(&id).copied()
            };
            let usage = match (dead, &mut missing) {
                (None, Some(missing)) => {
                    missing.insert(id);
                    Usage::default()
                }
                (Some(_), Some(missing)) if missing.contains(&id) => Usage::default(),
                (None, None) => return Err(TableError::Unlisted { id }),
                (Some(dead), _) => {
                    let total = self.directory(id)?.frames.raw_blocks() as u32;
                    Usage { total, stored: dead.stored, birth: dead.birth, ..Usage::default() }
                }
            };
            revived.insert(id, usage);
        }
        Ok(revived)
    }

    /// Compares back rows with leaves and accounts. `leaves` are the chunks behind each leaf.
    pub(super) fn check_back_rows(&self, leaves: &BTreeMap<u64, BTreeSet<u64>>) -> Result<(), TableError> {
        let referred = self.lock_chunks().referred.clone();
        let mut stray = None;
        let mut look = |k: &[u8], _: &[u8]| {
            let sound = key::back_place(k).is_some_and(|(chunk, leaf)| {
                referred.contains(&chunk) && leaves.get(&leaf).is_some_and(|chunks| chunks.contains(&chunk))
            });
            if !sound {
                stray = Some(k.to_vec());
            }
            sound
        };
        self.kv
            .scan(&key::back(0, 0), &key::back(u64::MAX, u64::MAX), &mut look)
            .map_err(|source| TableError::Engine { op: "scanning", source })?;
        match stray {
            Some(key) => Err(TableError::Damaged(format!("the back row {key:02x?} leads nowhere"))),
            None => Ok(()),
        }
    }
}

/// Puts the back rows into `batch` of a leaf that becomes `leaf` from `base`: those of the chunks that it begins to refer to,
/// and not those of `referred` chunks of which it has nothing any more.
pub(super) fn keep_back_rows(
    number: u64,
    (base, leaf): (&Leaf, &Leaf),
    begins: impl Iterator<Item = u64>,
    referred: &BTreeSet<u64>,
    batch: &mut Batch,
) {
    for seq in begins {
        batch.put(&key::back(seq, number), Vec::new());
    }
    if referred.is_empty() {
        return;
    }
    let stays: BTreeSet<u64> = chunks_of(leaf).collect();
    let gone: BTreeSet<u64> = chunks_of(base).filter(|seq| referred.contains(seq) && !stays.contains(seq)).collect();
    for seq in gone {
        batch.delete(&key::back(seq, number));
    }
}

/// The chunks that a leaf's blocks stand in.
pub(super) fn chunks_of(leaf: &Leaf) -> impl Iterator<Item = u64> {
    leaf.runs().iter().filter_map(|run| match run.target {
        Target::Chunk { seq, .. } => Some(seq),
        Target::Zero | Target::Hole => None,
    })
}
