//! Whether chunks are sound and say what a table says of them.

use std::collections::BTreeMap;

use futures::{FutureExt, StreamExt, stream};

use super::CheckOptions;
use super::report::{Kind, Report};
use crate::chunk::{ChunkIndex, ChunkName, ExtentKind, ReadError, read_index};
use crate::crypt::Keys;
use crate::store::{ObjectStore, StoreErrorKind};
use crate::table::{Mapped, Table, TableError, Target};
use crate::types::Lba;

/// Chunks whose headers are in memory at the same time; 110 KiB each after random writes. The table is read through once
/// for so many.
const BATCH: usize = 1024;
/// Headers fetched at the same time.
const HEADERS: usize = 32;
/// Whole chunks fetched at the same time.
const WHOLE: usize = 4;

/// A chunk that is there.
#[derive(Clone, Copy, Debug)]
pub(super) struct Chunk {
    pub name: ChunkName,
    pub size: u64,
}

/// What a table needs of a chunk.
#[derive(Clone, Debug)]
pub(super) struct Use {
    pub name: ChunkName,
    pub first_lba: Lba,
    pub blocks: u64,
}

/// Every chunk the table maps blocks to, by the number it has there.
pub(super) fn uses(table: &Table) -> Result<BTreeMap<u64, Use>, TableError> {
    let mut counts: BTreeMap<u64, (Lba, u64)> = BTreeMap::new();
    table.each_run(|Mapped { lba, blocks, target }| {
        if let Target::Chunk { seq, .. } = target {
            counts.entry(seq).or_insert((lba, 0)).1 += blocks;
        }
        true
    })?;
    let named = counts
        .into_iter()
        .map(|(seq, (first_lba, blocks))| Ok((seq, Use { name: table.directory(seq)?.name, first_lba, blocks })));
    named.collect()
}

/// Whether both map the same blocks to the same places.
pub(super) fn same(a: &Table, b: &Table) -> Result<bool, TableError> {
    // Run by run in two passes, hashed, since both at once would need a second thread.
    let digest = |table: &Table| {
        let mut hash = xxhash_rust::xxh3::Xxh3Default::new();
        table.each_run(|Mapped { lba, blocks, target }| {
            let (seq, index) = match target {
                Target::Chunk { seq, index } => (seq, u64::from(index)),
                Target::Zero => (u64::MAX, 0),
                Target::Hole => (0, 0),
            };
            for number in [lba, blocks, seq, index] {
                hash.update(&number.to_le_bytes());
            }
            true
        })?;
        Ok(hash.digest())
    };
    Ok(digest(a)? == digest(b)?)
}

/// Compares chunks with the table: that all it needs are there, that headers are sound and agree with it, and where that
/// is asked for, every byte.
pub(super) async fn verify(
    options: &CheckOptions<'_>,
    table: &Table,
    uses: &BTreeMap<u64, Use>,
    chunks: &[Chunk],
    report: &mut Report,
) -> anyhow::Result<()> {
    let store = options.store.as_ref();
    let there: BTreeMap<ChunkName, u64> = chunks.iter().map(|chunk| (chunk.name, chunk.size)).collect();
    // A clone maps to chunks of the volume it was made of, which were not listed.
    let mut all = chunks.to_vec();
    for used in uses.values().filter(|used| !there.contains_key(&used.name)) {
        let lost = format!(
            "holds {} blocks of the volume, the first of them block {}; restore it",
            used.blocks, used.first_lba
        );
        match store.head(&used.name.key()).await {
            Ok(meta) => all.push(Chunk { name: used.name, size: meta.size }),
            Err(e) if e.kind == StoreErrorKind::NotFound => {
                report.add(Kind::ChunkMissing, used.name.key(), lost, false)
            }
            Err(e) => return Err(e.into()),
        }
    }
    // Of those it was made of it may need no block, and yet what they tell.
    let tellers: Vec<u64> = table.with_usage(|used| {
        let tells = used.iter().filter(|(id, usage)| usage.tombs > 0 && !uses.contains_key(*id));
        tells.map(|(id, _)| *id).collect()
    });
    for id in tellers {
        let name = table.directory(id)?.name;
        match store.head(&name.key()).await {
            _ if there.contains_key(&name) => {}
            Ok(meta) => all.push(Chunk { name, size: meta.size }),
            Err(e) if e.kind == StoreErrorKind::NotFound => {
                let lost = "tells what some blocks of the volume are; restore it";
                report.add(Kind::ChunkMissing, name.key(), lost, false);
            }
            Err(e) => return Err(e.into()),
        }
    }
    let (mut told, mut unexplained) = (References::default(), References::default());
    let by_name: BTreeMap<ChunkName, u64> = uses.iter().map(|(seq, used)| (used.name, *seq)).collect();
    let mut done = 0;
    for batch in all.chunks(BATCH) {
        let reads = batch.iter().map(|chunk| header(store, *chunk, options.keys.as_ref()).boxed()).collect::<Vec<_>>();
        let mut reads = stream::iter(reads).buffered(HEADERS);
        let mut headers: BTreeMap<u64, ChunkIndex> = BTreeMap::new();
        while let Some((chunk, result)) = reads.next().await {
            done += 1;
            (options.progress)("chunk headers", done, all.len() as u64);
            match result {
                Ok(index) if index.object_len() != chunk.size => {
                    let detail = format!("is {} bytes long, not {}; restore it", chunk.size, index.object_len());
                    report.add(Kind::ChunkDamaged, chunk.name.key(), detail, false);
                }
                Ok(index) => {
                    for (extent, seq, first) in index.references() {
                        told.add(seq, extent.lba, extent.blocks, first.into());
                    }
                    if let Some(seq) = by_name.get(&chunk.name) {
                        headers.insert(*seq, index);
                    }
                }
                Err(ReadError::Missing { .. }) => {
                    report.add(Kind::ChunkMissing, chunk.name.key(), "has just gone; restore it", false);
                }
                Err(error @ (ReadError::Header { .. } | ReadError::Truncated { .. })) => {
                    report.add(Kind::ChunkDamaged, chunk.name.key(), format!("{error}; restore it"), false);
                }
                Err(error) => return Err(error.into()),
            }
        }
        drop(reads);
        agree(table, &headers, &mut unexplained, report)?;
        if options.data {
            bytes(options, headers.values(), report).await?;
        }
    }
    told.join();
    let mut wrong: BTreeMap<u64, Lba> = BTreeMap::new();
    for (seq, lba) in unexplained.not_in(&told) {
        wrong.entry(seq).or_insert(lba);
    }
    for (seq, lba) in wrong {
        let detail = format!(
            "the table maps block {lba} to a place where it holds something else, and no chunk refers to that; if the other \
             chunks agree, restore this one, else `blockd volume rebuild`"
        );
        report.add(Kind::ChunkDisagrees, table.directory(seq)?.name.key(), detail, false);
    }
    Ok(())
}

/// Blocks that stand in chunks under other addresses than those chunks' headers say.
#[derive(Default)]
struct References {
    /// Chunk, how far an index lies behind its address, and the first block; to one past the last.
    runs: BTreeMap<(u64, u64, Lba), Lba>,
}

impl References {
    fn add(&mut self, seq: u64, lba: Lba, blocks: u64, index: u64) {
        let end = self.runs.entry((seq, index.wrapping_sub(lba), lba)).or_default();
        *end = (*end).max(lba + blocks);
    }

    /// Joins what overlaps.
    fn join(&mut self) {
        let mut last: Option<((u64, u64, Lba), Lba)> = None;
        let mut joined = BTreeMap::new();
        for (key, end) in std::mem::take(&mut self.runs) {
            match &mut last {
                Some(((seq, behind, _), upto)) if (*seq, *behind) == (key.0, key.1) && *upto >= key.2 => {
                    *upto = end.max(*upto);
                }
                _ => joined.extend(last.replace((key, end))),
            }
        }
        joined.extend(last);
        self.runs = joined;
    }

    /// Chunk and first block of those that are not in `told`, which is joined.
    fn not_in<'a>(&'a self, told: &'a References) -> impl Iterator<Item = (u64, Lba)> {
        self.runs.iter().filter_map(|(&(seq, behind, lba), &end)| {
            let found = told.runs.range(..=(seq, behind, lba)).next_back();
            let upto = found.filter(|((s, b, _), _)| (*s, *b) == (seq, behind)).map_or(0, |(_, upto)| *upto);
            (upto < end).then_some((seq, lba.max(upto)))
        })
    }
}

async fn header(store: &dyn ObjectStore, chunk: Chunk, keys: Option<&Keys>) -> (Chunk, Result<ChunkIndex, ReadError>) {
    (chunk, read_index(store, &chunk.name, keys).await)
}

/// Compares the table's mappings into these chunks with what their headers say. Blocks that they do not know under that address
/// go into `unexplained`.
fn agree(
    table: &Table,
    headers: &BTreeMap<u64, ChunkIndex>,
    unexplained: &mut References,
    report: &mut Report,
) -> anyhow::Result<()> {
    let mut wrong: BTreeMap<u64, String> = BTreeMap::new();
    for (seq, index) in headers {
        if table.directory(*seq)?.frames != index.frames {
            wrong.insert(*seq, "the table knows other frames of it than its header lists".to_owned());
        }
    }
    table.each_run(|Mapped { lba, blocks, target }| {
        if let Target::Chunk { seq, index } = target
            && let Some(header) = headers.get(&seq)
            && !wrong.contains_key(&seq)
        {
            if u64::from(index) + blocks > header.frames.raw_blocks() {
                wrong.insert(seq, format!("the table maps block {lba} to a place behind its end"));
            } else {
                disagreements(header, lba, blocks, index.into(), unexplained);
            }
        }
        true
    })?;
    for (seq, why) in wrong {
        let detail = format!("{why}; if the other chunks agree, restore this one, else `blockd volume rebuild`");
        report.add(Kind::ChunkDisagrees, headers[&seq].name.key(), detail, false);
    }
    Ok(())
}

/// Finds those of the blocks that do not stand in the chunk where the table says, by its own header.
fn disagreements(header: &ChunkIndex, lba: Lba, blocks: u64, index: u64, unexplained: &mut References) {
    let (mut at, end) = (lba, lba + blocks);
    while at < end {
        let after = header.extents.partition_point(|extent| extent.lba <= at);
        let extent = after.checked_sub(1).map(|n| &header.extents[n]).filter(|extent| at < extent.lba + extent.blocks);
        let upto = match extent {
            Some(extent) => extent.lba + extent.blocks,
            None => header.extents.get(after).map_or(end, |extent| extent.lba),
        };
        let upto = upto.min(end);
        let right = extent.is_some_and(|extent| {
            matches!(extent.kind, ExtentKind::Data { index: first }
                if u64::from(first) + (at - extent.lba) == index + (at - lba))
        });
        if !right {
            unexplained.add(header.name.seq, at, upto - at, index + (at - lba));
        }
        at = upto;
    }
}

/// Reads whole chunks and compares every frame with its checksum.
async fn bytes(
    options: &CheckOptions<'_>,
    headers: impl Iterator<Item = &ChunkIndex>,
    report: &mut Report,
) -> anyhow::Result<()> {
    let store = options.store.as_ref();
    let reads: Vec<_> = headers.map(|index| whole(store, index).boxed()).collect();
    let total = reads.len() as u64;
    let mut reads = stream::iter(reads).buffered(WHOLE);
    let mut done = 0;
    while let Some((index, result)) = reads.next().await {
        done += 1;
        (options.progress)("bytes of chunks", done, total);
        let object = match result {
            Ok(object) => object,
            Err(e) if e.kind == StoreErrorKind::NotFound => {
                report.add(Kind::ChunkMissing, index.name.key(), "has just gone; restore it", false);
                continue;
            }
            Err(e) => return Err(e.into()),
        };
        let mut bad = Vec::new();
        for (number, frame) in index.frames.frames().iter().enumerate() {
            let range = frame.range();
            let stored = object.get(range.start as usize..range.end as usize);
            match stored.is_some_and(|stored| index.name.frame_sum(number as u32, stored) == frame.sum) {
                true => report.frames_verified += 1,
                false => bad.push(number),
            }
        }
        if let Some(first) = bad.first() {
            let lba = first_lba(index, *first);
            let detail = format!(
                "{} of its {} frames are damaged, the first of them {first}, with block {lba} of the volume; restore it",
                bad.len(),
                index.frames.frames().len()
            );
            report.add(Kind::FrameDamaged, index.name.key(), detail, false);
        }
    }
    Ok(())
}

async fn whole<'a>(
    store: &dyn ObjectStore,
    index: &'a ChunkIndex,
) -> (&'a ChunkIndex, crate::store::Result<bytes::Bytes>) {
    (index, store.get(&index.name.key()).await.map(|(object, _)| object))
}

/// The first block of a frame.
fn first_lba(index: &ChunkIndex, frame: usize) -> Lba {
    let block = index.frames.frames()[frame].first_block;
    let extents = index.extents.iter().filter_map(|extent| match extent.kind {
        ExtentKind::Data { index } => Some((extent, index)),
        _ => None,
    });
    let found = extents.take_while(|(_, first)| *first <= block).last();
    found.map_or(0, |(extent, first)| extent.lba + u64::from(block - first))
}
