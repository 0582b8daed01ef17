//! A state of a volume, to be read.

use std::sync::Arc;

use crate::cache::FrameCache;
use crate::checkpoint::{CheckpointPointer, restore};
use crate::chunk::{BlockReader, ReadError};
use crate::crypt::Keys;
use crate::store::ObjectStore;
use crate::table::{Table, TableHome};
use crate::types::VolumeId;
use crate::volume::{Allocation, Blocking, ExtentStatus, OpenError, blocks_of, within_block};

/// What a state is made of.
pub struct SightOptions {
    /// The bucket.
    pub store: Arc<dyn ObjectStore>,
    /// The volume.
    pub volume: VolumeId,
    /// Its translation table in the bucket; without one nothing was ever written.
    pub checkpoint: Option<CheckpointPointer>,
    /// Where the table goes; nobody else may use it.
    pub home: TableHome,
    /// Another home on the same disk, whose files need not be fetched.
    pub donor: Option<TableHome>,
    /// The frame cache, if any.
    pub frame_cache: Option<FrameCache>,
    /// Where heavy work runs.
    pub blocking: Blocking,
    /// The volume's keys, if it is encrypted.
    pub keys: Option<Keys>,
}

/// See the [module](super).
#[derive(Clone)]
pub struct Sight {
    table: Arc<Table>,
    reader: Arc<BlockReader>,
    pub(super) blocking: Blocking,
}

impl Sight {
    /// Fetches the table.
    ///
    /// # Errors
    /// It cannot be had.
    pub async fn open(options: SightOptions) -> Result<Self, OpenError> {
        let SightOptions { store, volume, checkpoint, home, donor, frame_cache, blocking, keys } = options;
        if let Some(donor) = donor {
            let home = home.clone();
            // Only a saving: what cannot be linked is fetched.
            if let Err(error) = blocking.run(move || home.borrow_files(&donor)).await {
                tracing::debug!("cannot link table files of another table: {error}");
            }
        }
        let table = match checkpoint {
            Some(pointer) => {
                let restored =
                    restore::restore(store.as_ref(), &home, volume, &pointer, blocking, keys.as_ref()).await?;
                tracing::debug!(%volume, fetched_bytes = restored.fetched_bytes, "table of a view is here");
                restored.table
            }
            None => blocking.run(move || home.open(volume)).await?,
        };
        let table = Arc::new(table);
        let reader = Arc::new(BlockReader::new(volume, table.clone(), store, frame_cache).with_keys(keys));
        Ok(Self { table, reader, blocking })
    }

    /// The translation table: how far it is, and where newer chunks are applied.
    pub fn table(&self) -> &Arc<Table> {
        &self.table
    }

    /// Whether anybody else still goes by it.
    pub fn is_shared(&self) -> bool {
        Arc::strong_count(&self.reader) > 1
    }

    /// `len` bytes from `offset` on, and the ranges of them (offset within, length) that are holes.
    ///
    /// # Errors
    /// As [`BlockReader::read`].
    pub async fn read(&self, offset: u64, len: u32) -> Result<(Vec<u8>, Vec<(usize, usize)>), ReadError> {
        let (lba, blocks) = blocks_of(offset, len.into());
        let mut bytes = vec![0; blocks as usize * crate::types::BLOCK];
        let holes = self.reader.read(lba, &mut bytes).await?;
        let (skip, len) = (within_block(offset), len as usize);
        bytes.truncate(skip + len);
        bytes.drain(..skip);
        let block = crate::types::BLOCK;
        let cut = |(first, count): (u64, u64)| {
            let from = (first as usize * block).max(skip) - skip;
            let to = ((first + count) as usize * block).min(skip + len).saturating_sub(skip);
            (from, to.saturating_sub(from))
        };
        Ok((bytes, holes.into_iter().map(cut).filter(|(_, len)| *len > 0).collect()))
    }

    /// Describes a range that is not empty in at most `max` runs.
    ///
    /// # Errors
    /// A sentence.
    pub fn extents(&self, offset: u64, len: u64, max: usize) -> Result<Vec<ExtentStatus>, String> {
        let (lba, blocks) = blocks_of(offset, len);
        let mut runs: Vec<(u64, Allocation)> = Vec::new();
        let mut done = 0;
        while done < blocks && runs.len() <= max {
            let found = self.table.allocations(lba + done, blocks - done, max + 1 - runs.len());
            for (count, allocation) in found.map_err(|e| e.to_string())? {
                match runs.last_mut() {
                    Some((last, same)) if *same == allocation => *last += count,
                    _ => runs.push((count, allocation)),
                }
                done += count;
            }
        }
        runs.truncate(max);
        let (mut skip, mut left) = (within_block(offset) as u64, len);
        let cut = |(blocks, allocation): (u64, Allocation)| {
            let len = (blocks * crate::types::BLOCK_SIZE - std::mem::take(&mut skip)).min(left);
            left -= len;
            ExtentStatus { len, allocation }
        };
        Ok(runs.into_iter().map(cut).collect())
    }
}
