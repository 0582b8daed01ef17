//! What earlier owners put and no table heard of: relocated chunks, and chunks behind the end of their history.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::chunk::ChunkName;
use crate::store::StoreErrorKind;
use crate::table::{Table, TableError};
use crate::types::VolumeId;

use super::super::destage::OBJECT_PUTS_MAX;
use super::super::job::Backend;
use super::Deleted;
use super::job::DELETE_BATCH;

/// So many missing numbers in a row are the end: an owner puts one after the other, but uses up a number without a chunk now
/// and then.
const MISSING_MAX: u32 = 8;

pub(super) use crate::chunk::relocated_base as base;

/// The number of the next relocated chunk of `epoch`.
pub(in super::super) fn next_number(table: &Table, epoch: u64) -> u64 {
    table.newest_relocated().max(base(epoch)) + 1
}

/// Of so many owners before, what arrived late is deleted again at each opening: by one that was cut off and did not know
/// it when its successors looked.
const OWNERS_AGAIN: usize = 8;

/// An epoch of an earlier owner.
#[derive(Clone, Copy, Debug)]
struct Ended {
    epoch: u64,
    /// First relocated chunk that the table does not know.
    unknown: u64,
    /// Where its history begins.
    first: u64,
    /// Where its seal stands, right behind its history.
    seal: u64,
}

impl Ended {
    /// What its owner may have put on top of the recorded history, all at once at most; the seal has to stay.
    fn beyond(&self) -> impl Iterator<Item = u64> {
        self.seal + 1..=self.seal + OBJECT_PUTS_MAX as u64
    }

    /// Chunks of the history that its owner may still have been putting when others could read them already: if they were
    /// deleted since, a last attempt brings them back.
    fn newest(&self) -> impl Iterator<Item = u64> {
        self.first.max(self.seal.saturating_sub(OBJECT_PUTS_MAX as u64))..self.seal
    }
}

/// Epochs whose late and relocated chunks may be in the bucket without the table knowing of them.
#[derive(Clone, Debug, Default)]
pub struct Unswept {
    /// Those that no owner has looked at yet.
    epochs: Vec<Ended>,
    /// Those that are looked at once more.
    again: Vec<Ended>,
}

impl Unswept {
    /// What is to be looked for of `ended`, the epochs before the present one with the places of their first chunks and
    /// seals, by a table that was just opened. The table is told what it will not be able to tell any more once it knows a relocated chunk of
    /// the present epoch: where those that it does not know begin.
    pub fn new(table: &Table, ended: impl Iterator<Item = (u64, Range<u64>)>) -> Result<Self, TableError> {
        let (swept, newest) = (table.swept_epoch(), table.newest_relocated());
        let mut unknown: BTreeMap<u64, u64> = table.first_unknown().into_iter().collect();
        let mut unswept = Self::default();
        for (epoch, history) in ended {
            if (base(epoch)..base(epoch + 1)).contains(&newest) {
                unknown.insert(epoch, newest + 1);
            }
            let ended = Ended {
                epoch,
                unknown: unknown.get(&epoch).copied().unwrap_or(base(epoch) + 1),
                first: history.start,
                seal: history.end,
            };
            if epoch > swept { unswept.epochs.push(ended) } else { unswept.again.push(ended) }
        }
        let old = unswept.again.len().saturating_sub(OWNERS_AGAIN);
        unswept.again.drain(..old);
        let matters = |epoch: u64| unswept.again.iter().chain(&unswept.epochs).any(|ended| ended.epoch == epoch);
        unknown.retain(|epoch, _| matters(*epoch));
        table.set_first_unknown(unknown.into_iter().collect())?;
        Ok(unswept)
    }

    /// Whether no relocated chunk is left that the table might not know.
    pub fn is_empty(&self) -> bool {
        self.epochs.is_empty()
    }

    /// Whether there is anything to be done.
    pub fn is_due(&self) -> bool {
        !(self.epochs.is_empty() && self.again.is_empty())
    }
}

impl Backend {
    /// Deletes what the `unswept` epochs left and the table does not know, for the owner of `epoch`.
    pub(super) async fn sweep(self, volume: VolumeId, epoch: u64, unswept: Unswept) -> Result<Deleted, String> {
        let mut done = Deleted { swept: true, ..Deleted::default() };
        // Numbers behind the seal are the next owner's as well, under another epoch.
        let late = unswept.epochs.iter().chain(&unswept.again);
        let late = late.flat_map(|ended| ended.beyond().map(|seq| (ended.epoch, seq)));
        let again = unswept.again.iter().flat_map(|ended| {
            let relocated = ended.unknown..ended.unknown + u64::from(MISSING_MAX);
            relocated.chain(ended.newest()).filter(|seq| !self.table.knows(*seq)).map(|seq| (ended.epoch, seq))
        });
        let keys: Vec<String> = late.chain(again).map(|(epoch, seq)| ChunkName { volume, epoch, seq }.key()).collect();
        for keys in keys.chunks(DELETE_BATCH) {
            self.store.delete(keys).await.map_err(|e| e.to_string())?;
        }
        for &Ended { epoch, unknown, .. } in &unswept.epochs {
            let (mut seq, mut missing) = (unknown, 0);
            while missing < MISSING_MAX {
                let name = ChunkName { volume, epoch, seq };
                seq += 1;
                if self.table.knows(name.seq) {
                    missing = 0;
                    continue;
                }
                match self.store.head(&name.key()).await {
                    Ok(meta) => {
                        self.store.delete(&[name.key()]).await.map_err(|e| e.to_string())?;
                        tracing::info!(chunk = %name, "deleted a relocated chunk that an earlier owner did not come to use");
                        done.chunks += 1;
                        done.bytes += meta.size;
                        missing = 0;
                    }
                    Err(e) if e.kind == StoreErrorKind::NotFound => missing += 1,
                    Err(e) => return Err(e.to_string()),
                }
            }
        }
        let table = self.table.clone();
        let swept = move || table.set_swept(epoch - 1).map_err(|e| e.to_string());
        self.blocking.run_behind(swept).await?;
        done.space = self.table.space();
        Ok(done)
    }
}
