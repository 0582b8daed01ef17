//! How much of each chunk lives, and which chunks are dead: what compaction and deletion go by.
//!
//! Kept exactly: every batch that changes mappings changes these rows too. All of it is in memory as well, one entry per
//! chunk.
//!
//! A chunk lives in `[birth, death)`, counted in seqs of the history: no table that stands at `death` or later can refer to
//! it, one that stands before may. What compaction takes out of a chunk is gone one seq after the present one, because
//! a table at the present seq may have been copied before; or, at the present seq, in tables that know the relocated chunk
//! that did it: see [`Position`].

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::key;
use super::kv::Batch;
use crate::chunk::RELOCATED;
use crate::manifest::CheckpointPointer;

/// What a chunk consists of and how much of that is still needed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Blocks of the volume that are mapped to its payload. One that several are mapped to lives several times.
    pub live: u32,
    /// Payload blocks.
    pub total: u32,
    /// Length of the object.
    pub stored: u64,
    /// The seq after which it is true: its own, or the basis of a relocated chunk.
    pub birth: u64,
    /// Rows of its header for zeroes, holes, and references to other chunks. They tell where blocks stand, and make older chunks' blocks be forgotten when the
    /// table is rebuilt from headers, so the chunk cannot go before they were told again by a newer one.
    pub tombs: u32,
    /// Blocks are or were mapped to it by headers of other chunks: back rows lead to them.
    pub referred: bool,
}

/// A chunk's preamble and what encryption adds to a header: envelope and tag.
const TOMB_HEADER: u64 = 104 + 32 + 16;

impl Usage {
    /// Bytes that telling its zeroes, holes and references again costs, as a chunk of their own and encrypted: if that were thought to
    /// cost less than it does, such a chunk would seem to be worth writing again for ever.
    pub fn tomb_bytes(&self) -> u64 {
        if self.tombs == 0 { 0 } else { TOMB_HEADER + 16 * u64::from(self.tombs) }
    }

    /// The part of its bytes that is alive.
    pub fn live_bytes(&self) -> u64 {
        self.copy_bytes().min(self.stored)
    }

    /// About the bytes that what lives in it takes after compaction, which gives each address a block of its own.
    pub fn copy_bytes(&self) -> u64 {
        match self.total {
            0 => 0,
            total => (u128::from(self.stored) * u128::from(self.live) / u128::from(total)) as u64,
        }
    }

    /// Bytes that compacting it frees.
    pub fn gain(&self) -> u64 {
        self.stored.saturating_sub(self.copy_bytes() + self.tomb_bytes())
    }

    fn is_dead(&self) -> bool {
        self.live == 0 && self.tombs == 0
    }
}

/// How far a table is: the history applied, and the newest number of a relocated chunk. Of two tables of one volume the one
/// with the greater position is to be used: what the greater one refers to is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Position {
    /// The newest seq applied.
    pub seq: u64,
    /// The newest number of a relocated chunk. They grow from epoch to epoch.
    pub relocated: u64,
}

impl From<&CheckpointPointer> for Position {
    fn from(pointer: &CheckpointPointer) -> Self {
        Self { seq: pointer.seq, relocated: pointer.relocated }
    }
}

/// A chunk that no block is mapped to any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Dead {
    /// As in [`Usage`].
    pub birth: u64,
    /// No table at this seq or later refers to it.
    pub death: u64,
    /// When compaction killed it: tables that stand one seq before `death` and know this relocated chunk do not refer to
    /// it either. Else 0.
    pub relocated: u64,
    /// Length of the object.
    pub stored: u64,
}

impl Dead {
    /// Whether tables at `position` and later ones do not refer to it.
    pub fn is_gone_at(&self, position: Position) -> bool {
        let just_moved = self.relocated > 0 && position.relocated >= self.relocated;
        position.seq >= self.death || (just_moved && position.seq + 1 == self.death)
    }

    /// Whether one of the snapshots at `held` may refer to it.
    pub fn is_held(&self, held: &[u64]) -> bool {
        held.iter().any(|s| (self.birth..self.death).contains(s))
    }
}

/// Sums over all chunks of a volume.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Space {
    /// Bytes of its own chunks that some block is mapped to.
    pub live_bytes: u64,
    /// Bytes of its own chunks, dead ones that are not deleted yet included.
    pub stored_bytes: u64,
    /// Bytes of dead chunks that are not deleted yet.
    pub dead_bytes: u64,
    /// Its own chunks.
    pub chunks: u64,
    /// Those of them that are dead and not deleted yet.
    pub dead_chunks: u64,
    /// Those of them that compaction wrote, the dead ones left out.
    pub relocated_chunks: u64,
    /// Bytes of chunks of other volumes, of which it is a clone.
    pub foreign_bytes: u64,
}

/// Where a clone's own history begins: chunks up to here belong to others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Origin {
    pub seq: u64,
    pub relocated: u64,
}

impl Origin {
    pub fn is_own(&self, id: u64) -> bool {
        id > if id & RELOCATED != 0 { self.relocated } else { self.seq }
    }
}

/// All chunks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Chunks {
    pub used: BTreeMap<u64, Usage>,
    pub dead: BTreeMap<u64, Dead>,
    /// Those of `used` that back rows may lead from. Shared with those who look at many leaves.
    pub referred: Arc<BTreeSet<u64>>,
    pub origin: Origin,
    /// The newest seq applied, for those who cannot wait for a chunk that is being applied.
    pub applied: u64,
    /// The newest number of a relocated chunk, and the epoch up to which unknown ones were deleted.
    pub newest: u64,
    pub swept_epoch: u64,
    /// Earlier epochs, each with the first number that is unknown.
    pub first_unknown: Vec<(u64, u64)>,
    space: Space,
}

impl Chunks {
    fn count_used(&mut self, id: u64, usage: &Usage, sign: fn(u64, u64) -> u64) {
        let space = &mut self.space;
        if !self.origin.is_own(id) {
            space.foreign_bytes = sign(space.foreign_bytes, usage.stored);
            return;
        }
        space.live_bytes = sign(space.live_bytes, usage.live_bytes());
        space.stored_bytes = sign(space.stored_bytes, usage.stored);
        space.chunks = sign(space.chunks, 1);
        if id & RELOCATED != 0 {
            space.relocated_chunks = sign(space.relocated_chunks, 1);
        }
    }

    fn count_dead(&mut self, id: u64, dead: &Dead, sign: fn(u64, u64) -> u64) {
        let space = &mut self.space;
        if self.origin.is_own(id) {
            space.stored_bytes = sign(space.stored_bytes, dead.stored);
            space.dead_bytes = sign(space.dead_bytes, dead.stored);
            space.chunks = sign(space.chunks, 1);
            space.dead_chunks = sign(space.dead_chunks, 1);
        }
    }

    /// Sets or removes a chunk that is in use.
    pub fn set_used(&mut self, id: u64, usage: Option<Usage>) {
        if let Some(old) = self.used.remove(&id) {
            self.count_used(id, &old, |a, b| a - b);
        }
        let referred = usage.is_some_and(|usage| usage.referred);
        if referred != self.referred.contains(&id) {
            let all = Arc::make_mut(&mut self.referred);
            if referred {
                all.insert(id)
            } else {
                all.remove(&id)
            };
        }
        if let Some(usage) = usage {
            self.count_used(id, &usage, |a, b| a + b);
            self.used.insert(id, usage);
        }
    }

    /// Sets or removes a dead chunk.
    pub fn set_dead(&mut self, id: u64, dead: Option<Dead>) {
        if let Some(old) = self.dead.remove(&id) {
            self.count_dead(id, &old, |a, b| a - b);
        }
        if let Some(dead) = dead {
            self.count_dead(id, &dead, |a, b| a + b);
            self.dead.insert(id, dead);
        }
    }

    pub fn space(&self) -> Space {
        self.space
    }

    /// Chunks whose only use are zeroes and holes that hide nothing any more, because no older chunk is left: the oldest
    /// ones without data. A reference that is true names a chunk that is older and lives. Dead chunks count while a snapshot at one
    /// of `held` keeps them, while they are `pinned`, since they may come back to life, and while a table at the present
    /// position may refer to them: the others are deleted first, being older.
    pub fn pointless(&self, held: &[u64], pinned: impl Fn(u64) -> bool) -> BTreeSet<u64> {
        let order = |id: u64, birth: u64| (birth, id & RELOCATED != 0, id);
        let snapshot = held.iter().max().copied().unwrap_or(0);
        let stays = |usage: &Usage| usage.live > 0 || usage.birth <= snapshot;
        let now = Position { seq: self.applied, relocated: self.newest };
        let goes = |id: u64, dead: &Dead| dead.is_gone_at(now) && !dead.is_held(held) && !pinned(id);
        let kept = self.dead.iter().filter(|(id, dead)| !goes(**id, dead)).map(|(id, dead)| order(*id, dead.birth));
        let living = self.used.iter().filter(|(_, usage)| stays(usage)).map(|(id, usage)| order(*id, usage.birth));
        let oldest = kept.chain(living).min();
        let empty = self.used.iter().filter(|(_, usage)| usage.live == 0);
        empty
            .filter(|(id, usage)| oldest.is_none_or(|oldest| order(**id, usage.birth) < oldest))
            .map(|(id, _)| *id)
            .collect()
    }
}

/// What a batch changes, before it is written.
#[derive(Debug, Default)]
pub(super) struct Change {
    /// Blocks that are no longer mapped to a chunk.
    gone: BTreeMap<u64, u32>,
    /// New chunks.
    added: BTreeMap<u64, Usage>,
    /// Chunks whose zeroes, holes and references are told elsewhere now.
    carried: BTreeSet<u64>,
    /// Blocks that are mapped to a chunk by the header of another one.
    referring: BTreeMap<u64, u32>,
    /// Accounts, without those blocks, of chunks that were not in use.
    revived: BTreeMap<u64, Usage>,
}

impl Change {
    /// `blocks` blocks are no longer mapped to the chunk `id`.
    pub fn unmap(&mut self, id: u64, blocks: u32) {
        *self.gone.entry(id).or_default() += blocks;
    }

    /// `blocks` blocks are mapped to the chunk `id` by the header of another one.
    pub fn refer(&mut self, id: u64, blocks: u32) {
        *self.referring.entry(id).or_default() += blocks;
    }

    /// The chunks of which [`Change::refer`] was told.
    pub fn referred(&self) -> impl Iterator<Item = u64> {
        self.referring.keys().copied()
    }

    /// Accounts of those of them that are not in use.
    pub fn revive(&mut self, revived: BTreeMap<u64, Usage>) {
        self.revived = revived;
    }

    /// A new chunk; `usage.live` of its blocks are mapped.
    pub fn add(&mut self, id: u64, usage: Usage) {
        self.added.insert(id, usage);
    }

    /// The zeroes, holes and references of the chunk `id` need not be told by it any more.
    pub fn carry(&mut self, id: u64) {
        self.carried.insert(id);
    }

    /// Puts the new rows into `batch`, chunks without use dying at `death`, by
    /// the relocated chunk `relocated` if that is not 0. Returns what must be done to `chunks` once the
    /// batch is written, or the chunk whose count is wrong.
    pub fn settle(self, chunks: &Chunks, (death, relocated): (u64, u64), batch: &mut Batch) -> Result<Settled, u64> {
        let mut settled = Settled::default();
        let touched = self.gone.keys().chain(self.added.keys()).chain(&self.carried).chain(self.referring.keys());
        let touched: BTreeSet<u64> = touched.copied().collect();
        for id in touched {
            let known = chunks.used.get(&id);
            let revived = self.revived.get(&id);
            let Some(mut usage) = self.added.get(&id).or(known).or(revived).copied() else {
                // Carrying is a favour; a count that is wrong is not.
                if self.gone.contains_key(&id) || self.referring.contains_key(&id) {
                    return Err(id);
                }
                continue;
            };
            if let Some(blocks) = self.referring.get(&id) {
                usage.live = usage.live.checked_add(*blocks).ok_or(id)?;
                usage.referred = true;
            }
            usage.live = usage.live.checked_sub(self.gone.get(&id).copied().unwrap_or(0)).ok_or(id)?;
            if self.carried.contains(&id) {
                usage.tombs = 0;
            }
            if usage.is_dead() {
                // A chunk that never was of use dies right after its birth.
                let death = death.max(usage.birth + 1);
                // The newest chunk of the history stays until there is a newer one: whoever opens the volume looks at it.
                let relocated = if id + 1 == death { 0 } else { relocated };
                let dead = Dead { birth: usage.birth, death, relocated, stored: usage.stored };
                if known.is_some() {
                    batch.delete(&key::usage(id));
                }
                if usage.referred {
                    batch.delete_range(&key::back(id, 0), &key::back(id + 1, 0));
                }
                batch.put(&key::dead(id), key::encode_dead(&dead));
                settled.dead.push((id, dead));
            } else {
                batch.put(&key::usage(id), key::encode_usage(&usage));
                if revived.is_some() {
                    batch.delete(&key::dead(id));
                }
                settled.used.push((id, usage));
            }
        }
        Ok(settled)
    }
}

/// The new state of the chunks that a batch touched.
#[derive(Debug, Default)]
pub(super) struct Settled {
    used: Vec<(u64, Usage)>,
    dead: Vec<(u64, Dead)>,
}

impl Settled {
    /// Carries it over into memory; the batch was written.
    pub fn done(self, chunks: &mut Chunks) {
        for (id, usage) in self.used {
            chunks.set_dead(id, None);
            chunks.set_used(id, Some(usage));
        }
        for (id, dead) in self.dead {
            chunks.set_used(id, None);
            chunks.set_dead(id, Some(dead));
        }
    }
}
