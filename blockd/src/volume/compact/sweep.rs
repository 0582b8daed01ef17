//! Relocated chunks of earlier owners that were put and that no table heard of.

use crate::chunk::ChunkName;
use crate::store::StoreErrorKind;
use crate::table::Table;
use crate::types::VolumeId;

use super::super::job::Backend;
use super::Deleted;

/// So many missing numbers in a row are the end: an owner puts one after the other, but uses up a number without a chunk now
/// and then.
const MISSING_MAX: u32 = 8;

pub(super) use crate::chunk::relocated_base as base;

/// The number of the next relocated chunk of `epoch`.
pub(in super::super) fn next_number(table: &Table, epoch: u64) -> u64 {
    table.newest_relocated().max(base(epoch)) + 1
}

/// Epochs whose relocated chunks may be unknown to the table, each with the first number to look for.
#[derive(Clone, Debug, Default)]
pub struct Unswept {
    epochs: Vec<(u64, u64)>,
}

impl Unswept {
    /// What is to be looked for of `epochs`, those before the present one, by a table that was just opened.
    pub fn new(table: &Table, epochs: impl Iterator<Item = u64>) -> Self {
        let swept = table.swept_epoch();
        let newest = table.newest_relocated();
        let from = |epoch| {
            let known = (base(epoch)..base(epoch + 1)).contains(&newest);
            (epoch, if known { newest } else { base(epoch) } + 1)
        };
        Self { epochs: epochs.filter(|epoch| *epoch > swept).map(from).collect() }
    }

    pub fn is_empty(&self) -> bool {
        self.epochs.is_empty()
    }
}

impl Backend {
    /// Deletes relocated chunks of `unswept` epochs that the table does not know, for the owner of `epoch`.
    pub(super) async fn sweep(self, volume: VolumeId, epoch: u64, unswept: Unswept) -> Result<Deleted, String> {
        let mut done = Deleted { swept: true, ..Deleted::default() };
        for (epoch, first) in unswept.epochs {
            let (mut seq, mut missing) = (first, 0);
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
