//! Which dead chunks may be deleted, and forgetting them once they are.

use super::TableError;
use super::key;
use super::kv::Batch;
use super::space::{Change, Dead, Origin, Position, Usage};
use super::table::Table;
use crate::chunk::{ChunkName, RELOCATED};
use crate::types::VolumeId;

/// A dead chunk that nothing can need any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Doomed {
    /// Its id in the table.
    pub id: u64,
    /// Its name; none for a chunk of another volume, which must only be forgotten.
    pub name: Option<ChunkName>,
    /// Length of the object.
    pub stored: u64,
}

impl Table {
    /// Shows all chunks in use, in order of id. Short: the table's account is locked meanwhile.
    pub fn with_usage<R>(&self, look: impl FnOnce(&std::collections::BTreeMap<u64, Usage>) -> R) -> R {
        look(&self.lock_chunks().used)
    }

    /// Whether the chunk `id` is this volume's own, not that of a volume it is a clone of.
    pub fn is_own(&self, id: u64) -> bool {
        self.lock_chunks().origin.is_own(id)
    }

    /// Whether there is an entry for the chunk `id`, alive or dead.
    pub fn knows(&self, id: u64) -> bool {
        let chunks = self.lock_chunks();
        chunks.used.contains_key(&id) || chunks.dead.contains_key(&id)
    }

    /// Up to `max` dead chunks that may be deleted, the oldest deaths first. `upto` is the position of the newest checkpoint
    /// that is sure to be found by whoever opens the volume, and was so for the grace time; `held` are the positions of
    /// the volume's snapshots.
    pub fn doomed(&self, upto: Position, held: &[u64], max: usize) -> Result<Vec<Doomed>, TableError> {
        let (mut found, origin): (Vec<_>, Origin) = {
            let chunks = self.lock_chunks();
            let free = chunks.dead.iter().filter(|(_, dead)| dead.is_gone_at(upto) && !dead.is_held(held));
            let free = free.filter(|(id, _)| !self.is_pinned(**id));
            (free.map(|(id, dead)| (dead.death, dead.birth, *id, dead.stored)).collect(), chunks.origin)
        };
        found.sort_unstable();
        found.truncate(max);
        found
            .into_iter()
            .map(|(_, _, id, stored)| {
                let own = origin.is_own(id);
                let name = if own { Some(self.stored_name(id)?) } else { None };
                // The name says once more whose it is.
                Ok(Doomed { id, name: name.filter(|name| name.volume == self.volume), stored })
            })
            .collect()
    }

    /// Whether there are more, which have to wait because they are pinned.
    pub fn doomed_are_pinned(&self, upto: Position, held: &[u64]) -> bool {
        let chunks = self.lock_chunks();
        let free = chunks.dead.iter().filter(|(_, dead)| dead.is_gone_at(upto) && !dead.is_held(held));
        free.into_iter().any(|(id, _)| self.is_pinned(*id))
    }

    /// Bytes of dead chunks that a checkpoint made now would free and one at `upto` does not.
    pub fn waiting_bytes(&self, upto: Position, held: &[u64]) -> u64 {
        let chunks = self.lock_chunks();
        let now = Position { seq: chunks.applied, relocated: chunks.newest };
        let waits = |dead: &&Dead| dead.is_gone_at(now) && !dead.is_gone_at(upto) && !dead.is_held(held);
        let waits = chunks.dead.values().filter(waits);
        waits.map(|dead| dead.stored).sum()
    }

    fn stored_name(&self, id: u64) -> Result<ChunkName, TableError> {
        let value = self.kv.get(&key::chunk(id)).map_err(|source| TableError::Engine { op: "reading", source })?;
        let (name, _) = key::decode_chunk(id, &value.ok_or(TableError::Unlisted { id })?)
            .map_err(|error| TableError::Damaged(format!("chunk {id:x}: {error}")))?;
        Ok(name)
    }

    /// Forgets dead chunks; their objects are gone.
    pub fn forget(&self, ids: &[u64]) -> Result<(), TableError> {
        let _applied = self.lock_applied();
        let mut batch = Batch::default();
        for id in ids {
            batch.delete(&key::dead(*id));
            batch.delete(&key::chunk(*id));
        }
        self.kv.write(batch).map_err(|source| TableError::Engine { op: "writing", source })?;
        let mut chunks = self.lock_chunks();
        for id in ids {
            chunks.set_dead(*id, None);
            self.directories.remove(id);
        }
        Ok(())
    }

    /// Lets chunks die that only tell zeroes and holes which hide nothing any more. Returns how many. Not to be called while
    /// there may be relocated chunks that this table does not know: those may hold what is hidden. `number` as in
    /// [`Table::carry`].
    pub fn drop_pointless(&self, held: &[u64], number: u64) -> Result<usize, TableError> {
        let pointless: Vec<u64> = self.lock_chunks().pointless(held, |id| self.is_pinned(id)).into_iter().collect();
        self.carry(&pointless, number)?;
        Ok(pointless.len())
    }

    /// Records that nobody needs the zeroes and holes of the chunks `ids` to be told any more. Uses up `number`, the next one
    /// of a relocated chunk, so that the table's position grows.
    pub fn carry(&self, ids: &[u64], number: u64) -> Result<(), TableError> {
        if ids.is_empty() {
            return Ok(());
        }
        let applied = self.lock_applied();
        let mut change = Change::default();
        let mut batch = Batch::default();
        ids.iter().for_each(|id| change.carry(*id));
        let settled = change
            .settle(&self.lock_chunks(), (applied.seq + 1, number), &mut batch)
            .map_err(super::apply::wrong_count)?;
        batch.put(&key::RELOCATED, key::encode_pair(number, self.swept_epoch()));
        self.kv.write(batch).map_err(|source| TableError::Engine { op: "writing", source })?;
        let mut chunks = self.lock_chunks();
        settled.done(&mut chunks);
        chunks.newest = number;
        Ok(())
    }

    /// How far the table is.
    pub fn position(&self) -> Position {
        let applied = self.lock_applied();
        Position { seq: applied.seq, relocated: self.newest_relocated() }
    }

    /// The newest number given to a relocated chunk; 0 if there was none.
    pub fn newest_relocated(&self) -> u64 {
        self.lock_chunks().newest
    }

    /// Up to which epoch relocated chunks that no table knows were deleted.
    pub fn swept_epoch(&self) -> u64 {
        self.lock_chunks().swept_epoch
    }

    /// Earlier epochs, each with its first relocated chunk that this table does not know, as far as recorded.
    pub fn first_unknown(&self) -> Vec<(u64, u64)> {
        self.lock_chunks().first_unknown.clone()
    }

    /// Records the same.
    pub fn set_first_unknown(&self, epochs: Vec<(u64, u64)>) -> Result<(), TableError> {
        let _applied = self.lock_applied();
        if self.first_unknown() == epochs {
            return Ok(());
        }
        let mut batch = Batch::default();
        batch.put(&key::UNKNOWN, key::encode_pairs(&epochs));
        self.kv.write(batch).map_err(|source| TableError::Engine { op: "writing", source })?;
        self.lock_chunks().first_unknown = epochs;
        Ok(())
    }

    /// Records that relocated chunks of epochs up to `epoch` which this table does not know are gone.
    pub fn set_swept(&self, epoch: u64) -> Result<(), TableError> {
        let _applied = self.lock_applied();
        let mut batch = Batch::default();
        batch.put(&key::RELOCATED, key::encode_pair(self.newest_relocated(), epoch));
        self.kv.write(batch).map_err(|source| TableError::Engine { op: "writing", source })?;
        self.lock_chunks().swept_epoch = epoch;
        Ok(())
    }

    /// Makes the table of a volume that of its clone `clone`: what it refers to so far belongs to others and is never
    /// deleted by the clone. Durable when this returns.
    pub fn become_clone(&mut self, clone: VolumeId) -> Result<(), TableError> {
        let applied = self.applied();
        let newest = self.newest_relocated().max(RELOCATED);
        let mut batch = Batch::default();
        batch.put(&key::FORMAT, key::encode_format(clone, self.version()));
        batch.put(&key::ORIGIN, key::encode_pair(applied.seq, newest));
        batch.put(&key::RELOCATED, key::encode_pair(newest, 0));
        batch.put(&key::UNKNOWN, key::encode_pairs(&[]));
        self.kv.write(batch).map_err(|source| TableError::Engine { op: "writing", source })?;
        self.persist()?;
        self.volume = clone;
        let mut chunks = Self::load_chunks(&*self.kv)?;
        chunks.applied = applied.seq;
        *self.lock_chunks() = chunks;
        Ok(())
    }

    /// Whether it is the table of a clone that nothing was written to.
    pub fn is_at_origin(&self) -> bool {
        let applied = self.applied();
        let chunks = self.lock_chunks();
        let own = chunks.used.keys().chain(chunks.dead.keys()).any(|id| chunks.origin.is_own(*id));
        chunks.origin.seq > 0 && chunks.origin.seq == applied.seq && !own
    }

    /// Makes this table, a copy of an earlier state of the volume, the one that comes after `present`: what was born since
    /// is dead, kept only by snapshots that stand in between; relocated chunks unknown to `present`, which knows where those
    /// of earlier epochs begin, are unknown to this one. Uses up `number`, the next one of a relocated chunk, so that
    /// its position is greater than that of `present`. Durable when this returns.
    pub fn go_on_from(&self, present: &Table, number: u64) -> Result<(), TableError> {
        let writing = |source| TableError::Engine { op: "writing", source };
        let reading = |source| TableError::Engine { op: "reading", source };
        let (upto, theirs) = (present.applied(), present.lock_chunks().clone());
        let mut applied = self.lock_applied();
        let ours = self.lock_chunks().clone();
        let mut batch = Batch::default();
        for id in ours.dead.keys().filter(|id| !theirs.dead.contains_key(*id) && !theirs.used.contains_key(*id)) {
            // Deleted since.
            batch.delete(&key::dead(*id));
            batch.delete(&key::chunk(*id));
        }
        let leave = |(id, usage): (&u64, &Usage)| {
            // As ever, the newest chunk of the history stays until there is a newer one.
            let relocated = if *id == upto.seq { 0 } else { number };
            (*id, Dead { birth: usage.birth, death: upto.seq + 1, relocated, stored: usage.stored })
        };
        let left = theirs.used.iter().map(leave).chain(theirs.dead.iter().map(|(id, dead)| (*id, *dead)));
        for (id, dead) in left.filter(|(id, _)| !ours.used.contains_key(id)) {
            batch.put(&key::dead(id), key::encode_dead(&dead));
            let row = present.kv.get(&key::chunk(id)).map_err(reading)?.ok_or(TableError::Unlisted { id })?;
            batch.put(&key::chunk(id), row);
        }
        batch.put(&key::APPLIED, key::encode_applied(upto));
        batch.put(&key::RELOCATED, key::encode_pair(number, theirs.swept_epoch));
        batch.put(&key::UNKNOWN, key::encode_pairs(&theirs.first_unknown));
        self.kv.write(batch).map_err(writing)?;
        self.persist()?;
        let mut chunks = Self::load_chunks(&*self.kv)?;
        chunks.applied = upto.seq;
        *self.lock_chunks() = chunks;
        *applied = upto;
        Ok(())
    }
}
