//! Filling a table as months of random writes would, in seconds; for benchmarks.

use std::collections::BTreeSet;

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::kv::Batch;
use super::leaf::{LEAF_BLOCKS, Leaf, Run, Target};
use super::space::{Chunks, Usage};
use super::table::Table;
use super::{Applied, TableError, key};
use crate::chunk::{ChunkExtent, ChunkIndex, ChunkKind, ChunkName, ExtentKind, FrameDirectory, FrameEncoding};
use crate::types::VolumeId;

/// Blocks per simulated chunk: 16 MiB.
const CHUNK_BLOCKS: u16 = 4096;
/// Blocks per simulated frame, as scattered writes leave them.
const FRAME_BLOCKS: u8 = 8;
const BATCH_LEAVES: usize = 16_384;

/// Maps about `mappings` blocks, spread evenly over `volume_blocks`, to random places in chunks of 16 MiB, as if each
/// had been written alone. `table` must be empty. The entries are those that the same mappings through chunks would
/// leave behind; the way to them is shorter.
pub fn simulate(table: &Table, volume_blocks: u64, mappings: u64, seed: u64) -> Result<Applied, TableError> {
    let mut applied = table.lock_applied();
    if *applied != Applied::default() || mappings == 0 || mappings > volume_blocks {
        return Err(TableError::Damaged("only an empty table can be filled, with 1 to all of its blocks".into()));
    }
    let write = |batch| table.kv.write(batch).map_err(|source| TableError::Engine { op: "writing", source });
    let mut rng = SmallRng::seed_from_u64(seed);
    // A few more chunks than needed, because the number of mappings is random.
    let chunks = mappings / u64::from(CHUNK_BLOCKS) * 65 / 64 + 64;
    let mut filled = vec![0u16; chunks as usize];
    let density = mappings as f64 / volume_blocks as f64;
    let mut batch = Batch::default();
    for leaf in 0..volume_blocks.div_ceil(LEAF_BLOCKS) {
        let mut entry = Leaf::default();
        let blocks = LEAF_BLOCKS.min(volume_blocks - leaf * LEAF_BLOCKS) as u8;
        for start in 0..blocks {
            if !rng.random_bool(density) {
                continue;
            }
            let mut chunk = rng.random_range(0..filled.len());
            // Ends: there is more room than blocks but for odds beyond reason.
            while filled[chunk] == CHUNK_BLOCKS {
                chunk = (chunk + 1) % filled.len();
            }
            entry.push(Run { start, blocks: 1, target: Target::Chunk { seq: chunk as u64 + 1, index: filled[chunk] } });
            filled[chunk] += 1;
        }
        if !entry.runs().is_empty() {
            batch.put(&key::leaf(leaf), entry.encode());
        }
        if batch.changes.len() >= BATCH_LEAVES {
            write(std::mem::take(&mut batch))?;
        }
    }
    let mut accounts = Chunks::default();
    for seq in 1..=chunks {
        let mut frames = FrameDirectory::new(70_000);
        for _ in 0..CHUNK_BLOCKS / u16::from(FRAME_BLOCKS) {
            let stored = rng.random_range(20_000..30_000);
            frames.push(stored, FRAME_BLOCKS, FrameEncoding::Lz4, rng.random());
        }
        let name = ChunkName { volume: table.volume, epoch: 1, seq };
        let usage = Usage {
            live: filled[seq as usize - 1].into(),
            total: CHUNK_BLOCKS.into(),
            stored: frames.end(),
            birth: seq,
            tombs: 0,
            referred: false,
        };
        batch.put(&key::chunk(seq), key::encode_chunk(&name, &frames));
        batch.put(&key::usage(seq), key::encode_usage(&usage));
        accounts.set_used(seq, Some(usage));
        if batch.changes.len() >= 1024 {
            write(std::mem::take(&mut batch))?;
        }
    }
    let position = Applied { seq: chunks, lsn: mappings };
    batch.put(&key::APPLIED, key::encode_applied(position));
    write(batch)?;
    accounts.applied = position.seq;
    *table.lock_chunks() = accounts;
    *applied = position;
    Ok(position)
}

/// The header of a full chunk of 16 MiB that random 4 KiB writes over `volume_blocks` made, the `seq`th of the volume.
pub fn random_chunk(volume: VolumeId, epoch: u64, seq: u64, volume_blocks: u64, rng: &mut SmallRng) -> ChunkIndex {
    let mut lbas = BTreeSet::new();
    while lbas.len() < usize::from(CHUNK_BLOCKS) {
        lbas.insert(rng.random_range(0..volume_blocks));
    }
    let mut extents: Vec<ChunkExtent> = Vec::new();
    for (index, lba) in (0..).zip(lbas) {
        match extents.last_mut() {
            Some(last) if last.lba + last.blocks == lba => last.blocks += 1,
            _ => extents.push(ChunkExtent { lba, blocks: 1, kind: ExtentKind::Data { index } }),
        }
    }
    let mut frames = FrameDirectory::new(70_000);
    for _ in 0..CHUNK_BLOCKS / u16::from(FRAME_BLOCKS) {
        frames.push(u32::from(FRAME_BLOCKS) * 4096, FRAME_BLOCKS, FrameEncoding::Raw, rng.random());
    }
    let lsn = seq * u64::from(CHUNK_BLOCKS);
    ChunkIndex {
        name: ChunkName { volume, epoch, seq },
        kind: ChunkKind::Data,
        first_lsn: lsn,
        last_lsn: lsn + u64::from(CHUNK_BLOCKS) - 1,
        created_ms: 0,
        extents,
        frames,
    }
}
