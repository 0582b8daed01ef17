//! A table from chunk headers alone, for when everything else is lost.

use std::collections::BTreeMap;

use futures::{FutureExt, StreamExt, TryStreamExt, stream};

use crate::chunk::{ChunkIndex, ChunkKind, ChunkName, ReadError, read_index, relocated_base};
use crate::crypt::Keys;
use crate::manifest::{Manifest, Stretch};
use crate::store::{self, ListEntry, ObjectStore, StoreError};
use crate::table::{Applied, Rebuild, RebuildKey, Table, TableError};
use crate::types::VolumeId;

/// Prefixes over which a volume's chunks are spread.
const PREFIXES: u32 = 256;
/// Prefixes listed at the same time.
const LISTS: usize = 16;
/// Headers fetched at the same time, in order of use.
pub const READ_AHEAD: usize = 32;
/// How often one is fetched.
const ATTEMPTS: usize = 3;

/// A chunk's place in a listing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Which.
    pub name: ChunkName,
    /// Length of the object.
    pub size: u64,
}

/// Every chunk object of a volume, in order of epoch and seq. `progress` hears how many of how many prefixes were listed.
pub async fn list_chunks(
    store: &dyn ObjectStore,
    volume: VolumeId,
    progress: impl Fn(u64, u64),
) -> Result<Vec<Listed>, StoreError> {
    let prefixes = (0..=u8::MAX).map(|spread| list_prefix(store, ChunkName::prefix(volume, spread)).boxed());
    let mut lists = stream::iter(prefixes).buffered(LISTS);
    let (mut chunks, mut done) = (Vec::new(), 0);
    while let Some(found) = lists.next().await {
        chunks.extend(found?);
        done += 1;
        progress(done, PREFIXES.into());
    }
    chunks.sort_unstable_by_key(|chunk| (chunk.name.epoch, chunk.name.seq));
    Ok(chunks)
}

async fn list_prefix(store: &dyn ObjectStore, prefix: String) -> Result<Vec<Listed>, StoreError> {
    let chunk = |entry: ListEntry| ChunkName::parse(&entry.key).map(|name| Listed { name, size: entry.size });
    Ok(store::list_all(store, &prefix).await?.into_iter().filter_map(chunk).collect())
}

/// Which of the listed chunks make up the volume.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct History {
    /// The fresh chunks there are, in order.
    pub fresh: Vec<ChunkName>,
    /// Fresh chunks that should be there: seqs from the first to the last.
    pub holes: Vec<(u64, u64)>,
    /// Relocated chunks of epochs that were settled.
    pub relocated: Vec<ChunkName>,
    /// Fresh chunks that a restore went back behind: dead, but snapshots may need them.
    pub left: Vec<ChunkName>,
    /// Those that are none of it: seals, what zombies and the like wrote.
    pub others: Vec<ChunkName>,
    /// Which stretches of the history count.
    pub lineage: Vec<Stretch>,
    /// Tables that know all restores have at least this number of a relocated chunk.
    pub least: u64,
}

/// Sorts listed chunks by what the manifest says of epochs. The fresh chunks are those up to `end`.
pub fn history(manifest: &Manifest, chunks: &[Listed], end: u64) -> History {
    let least = manifest.restores.last().map_or(0, |last| relocated_base(last.epoch) + 1);
    let mut history = History { lineage: manifest.lineage(end), least, ..History::default() };
    let mut fresh: BTreeMap<u64, ChunkName> = BTreeMap::new();
    let counts = |seq| history.lineage.iter().any(|stretch| (stretch.first..=stretch.last).contains(&seq));
    for Listed { name, .. } in chunks {
        if name.is_relocated() {
            let settled = manifest.epochs.iter().any(|e| e.epoch == name.epoch && e.first_seq > 0);
            if settled { history.relocated.push(*name) } else { history.others.push(*name) }
        } else if counts(name.seq) && manifest.epoch_of(name.seq) == name.epoch {
            fresh.insert(name.seq, *name);
        } else if name.seq <= end && manifest.epoch_of(name.seq) == name.epoch {
            history.left.push(*name);
        } else {
            history.others.push(*name);
        }
    }
    // A clone's history up to its beginning is its origin's.
    let begin = manifest.origin.as_ref().map_or(1, |origin| origin.seq + 1);
    for stretch in &history.lineage {
        let mut next = stretch.first.max(begin);
        if next > stretch.last {
            continue;
        }
        for seq in fresh.range(next..=stretch.last).map(|(seq, _)| *seq).chain([stretch.last + 1]) {
            if seq > next {
                history.holes.push((next, seq - 1));
            }
            next = seq + 1;
        }
    }
    history.fresh = fresh.into_values().collect();
    history
}

/// Which holes of a history cannot come from deletion, because no checkpoint at `checkpointed` or later proves those chunks
/// dead: from the first to the last.
pub fn lost(holes: &[(u64, u64)], checkpointed: u64) -> Vec<(u64, u64)> {
    let beyond = holes.iter().map(|(first, last)| ((*first).max(checkpointed + 1), *last));
    beyond.filter(|(first, last)| first <= last).collect()
}

/// Makes `table`, which is empty or as a clone begins, what the chunks of `history` say up to `upto`. `step` hears of each header read: all of those
/// of relocated chunks twice, first for their places in the order. Relocated chunks are left out whose basis `keep` does
/// not want.
pub async fn fill<E: From<ReadError> + From<TableError>>(
    store: &dyn ObjectStore,
    keys: Option<&Keys>,
    history: &History,
    table: &Table,
    upto: Applied,
    keep: impl Fn(u64) -> bool,
    step: impl Fn(),
) -> Result<(), E> {
    let mut order: Vec<(RebuildKey, ChunkName)> =
        history.fresh.iter().map(|name| (RebuildKey::new(name, name.seq), *name)).collect();
    let mut left = history.left.clone();
    read_headers(store, keys, history.relocated.iter().copied(), |index| {
        step();
        let (basis, epoch) = (index.basis(), index.name.epoch);
        if !keep(basis) {
            return Ok(());
        }
        match history.lineage.iter().any(|stretch| stretch.has_relocated(basis, epoch)) {
            true => order.push((RebuildKey::new(&index.name, basis), index.name)),
            false => left.push(index.name),
        }
        Ok::<_, E>(())
    })
    .await?;
    order.sort_unstable_by_key(|(place, _)| *place);
    let mut rebuild = Rebuild::begin(table, upto)?;
    read_headers(store, keys, order.into_iter().map(|(_, name)| name), |index| {
        step();
        Ok::<_, E>(rebuild.add(&index)?)
    })
    .await?;
    // Whoever does not know them would take them for nobody's and delete them.
    read_headers(store, keys, left, |index| Ok::<_, E>(rebuild.add_dead(&index)?)).await?;
    Ok(rebuild.finish(history.least)?)
}

/// Reads the headers of `names`, many at once, and hands them to `take` in order.
pub async fn read_headers<E: From<ReadError>>(
    store: &dyn ObjectStore,
    keys: Option<&Keys>,
    names: impl IntoIterator<Item = ChunkName, IntoIter: Send>,
    mut take: impl FnMut(ChunkIndex) -> Result<(), E>,
) -> Result<(), E> {
    let headers = names.into_iter().map(|name| read_patiently(store, keys, name).boxed());
    let mut headers = stream::iter(headers).buffered(READ_AHEAD);
    while let Some(index) = headers.try_next().await? {
        take(index)?;
    }
    Ok(())
}

/// A header; fetched again when the store fails or the bytes came damaged, as each may be over the next time.
async fn read_patiently(
    store: &dyn ObjectStore,
    keys: Option<&Keys>,
    name: ChunkName,
) -> Result<ChunkIndex, ReadError> {
    let mut attempts = 0;
    loop {
        attempts += 1;
        match read_index(store, &name, keys).await {
            Err(ReadError::Store(e)) if e.is_transient() && attempts < ATTEMPTS => {}
            Err(ReadError::Header { .. }) if attempts < ATTEMPTS => {}
            // Where a chunk of the history should be, a seal is as good as nothing.
            Ok(index) if index.kind == ChunkKind::Seal => return Err(ReadError::Missing { name }),
            other => return other,
        }
    }
}
