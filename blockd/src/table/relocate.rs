//! What compaction asks of the table: what of a chunk is still needed, and to refer to the copies instead. And how a table
//! comes back from headers alone, relocated ones among them.

use std::collections::{BTreeMap, BTreeSet};

use super::apply::{LeafEdit, decode_leaf, new_usage, wrong_count};
use super::key::{self, NumberKey};
use super::kv::Batch;
use super::leaf::{LEAF_BLOCKS, Leaf, Target, place};
use super::lookup::Mapped;
use super::refer::chunks_of;
use super::space::{Change, Dead};
use super::table::Table;
use super::{Applied, TableError};
use crate::chunk::{ChunkExtent, ChunkIndex, ChunkKind, ChunkName, ExtentKind};
use crate::types::Lba;
use crate::volume::Allocation;

/// Leaves read at once.
const LEAVES_AT_ONCE: usize = 1024;

/// What came of a relocated chunk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Moved {
    /// Blocks that are mapped to the copy now.
    pub blocks: u64,
    /// Blocks that were overwritten while they were copied, and those of `pinned`.
    pub missed: u64,
    /// Blocks that stay where they are, because their chunk is pinned.
    pub pinned: u64,
}

/// What of some chunks has to be copied before they can go.
#[derive(Clone, Debug, Default)]
pub struct Gathered {
    /// A position at which all of it was so.
    pub basis: Applied,
    /// The blocks that are still mapped to them, in address order.
    pub sources: Vec<Mapped>,
    /// Of the zeroes, holes and references they tell, those that are still true, in address order and apart from `sources`.
    pub told: Vec<ChunkExtent>,
}

/// The order in which headers rebuild a table: the history by seq, a relocated chunk after its basis, later ones later.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct RebuildKey {
    basis: u64,
    relocated: bool,
    epoch: u64,
    seq: u64,
}

impl RebuildKey {
    /// The place of the chunk `name`, which is true after the seq `basis`.
    pub fn new(name: &ChunkName, basis: u64) -> Self {
        Self { basis, relocated: name.is_relocated(), epoch: name.epoch, seq: name.seq }
    }
}

/// Makes a table that is empty, or as a clone's begins, what the chunks of a volume say, from nothing but their headers,
/// which come in the order of [`RebuildKey`]. Zeroes that count as allocated and hide nothing may come back as holes. Chunks that turn out to be
/// without use are taken for alive until the end, so that nothing is deleted that a snapshot needs. A failure leaves a
/// table that must be thrown away.
pub struct Rebuild<'a> {
    table: &'a Table,
    upto: Applied,
    previous: Option<RebuildKey>,
    /// Chunks that were referred to and are not there. No damage, if later chunks tell those blocks again.
    missing: BTreeSet<u64>,
}

impl<'a> Rebuild<'a> {
    /// `upto` is the end of the history.
    pub fn begin(table: &'a Table, upto: Applied) -> Result<Self, TableError> {
        if !table.is_blank() {
            if !table.is_at_origin() {
                return Err(TableError::Damaged("only an empty table can be rebuilt".into()));
            }
            // Should this not come to its end, that is seen by a table that says something and has no position.
            let mut applied = table.lock_applied();
            let mut batch = Batch::default();
            batch.put(&key::APPLIED, key::encode_applied(Applied::default()));
            table.kv.write(batch).map_err(|source| TableError::Engine { op: "writing", source })?;
            *applied = Applied::default();
        }
        Ok(Self { table, upto, previous: None, missing: BTreeSet::new() })
    }

    /// Takes in the next chunk.
    pub fn add(&mut self, index: &ChunkIndex) -> Result<(), TableError> {
        let table = self.table;
        let applied = table.lock_applied();
        let place = RebuildKey::new(&index.name, index.basis());
        let wrong = match index.kind {
            _ if index.name.volume != table.volume => Some("it belongs to another volume"),
            ChunkKind::Seal => Some("it is a seal"),
            _ if index.basis() > self.upto.seq => Some("it lies beyond the end of the history"),
            _ if self.previous.is_some_and(|previous| previous >= place) => Some("it comes too late"),
            _ => None,
        };
        if let Some(why) = wrong {
            return Err(TableError::OutOfOrder { applied: *applied, got: index.name, why });
        }
        self.previous = Some(place);
        let mut batch = Batch::default();
        if index.kind == ChunkKind::Relocated {
            let newest = table.newest_relocated().max(index.name.seq);
            batch.put(&key::RELOCATED, key::encode_pair(newest, 0));
            table.lock_chunks().newest = newest;
        }
        table.set_all(index, (self.upto.seq + 1, 0), batch, Some(&mut self.missing))
    }

    /// Takes in a chunk of which nothing counts: dead at the end of the history, kept by snapshots that stand before that.
    pub fn add_dead(&mut self, index: &ChunkIndex) -> Result<(), TableError> {
        let table = self.table;
        let _applied = table.lock_applied();
        let (id, stored) = (index.name.seq, index.object_len());
        let dead = Dead { birth: index.basis(), death: self.upto.seq + 1, relocated: 0, stored };
        let mut batch = Batch::default();
        batch.put(&key::dead(id), key::encode_dead(&dead));
        batch.put(&key::chunk(id), key::encode_chunk(&index.name, &index.frames));
        if index.kind == ChunkKind::Relocated {
            let newest = table.newest_relocated().max(id);
            batch.put(&key::RELOCATED, key::encode_pair(newest, 0));
            table.lock_chunks().newest = newest;
        }
        table.kv.write(batch).map_err(|source| TableError::Engine { op: "writing", source })?;
        table.lock_chunks().set_dead(id, Some(dead));
        Ok(())
    }

    /// Says how far the table is now. Numbers of relocated chunks up to `least` are taken for given.
    ///
    /// # Errors
    /// [`TableError::ReferenceLost`], or the table fails.
    pub fn finish(self, least: u64) -> Result<(), TableError> {
        let mut applied = self.table.lock_applied();
        let mut batch = Batch::default();
        for id in &self.missing {
            if self.table.lock_chunks().used.contains_key(id) {
                return Err(self.lost(*id)?);
            }
            batch.delete(&key::dead(*id));
        }
        let newest = self.table.newest_relocated().max(least);
        if newest > 0 {
            batch.put(&key::RELOCATED, key::encode_pair(newest, self.table.swept_epoch()));
            self.table.lock_chunks().newest = newest;
        }
        batch.put(&key::APPLIED, key::encode_applied(self.upto));
        self.table.kv.write(batch).map_err(|source| TableError::Engine { op: "writing", source })?;
        *applied = self.upto;
        let mut chunks = self.table.lock_chunks();
        chunks.applied = self.upto.seq;
        for id in &self.missing {
            chunks.set_dead(*id, None);
        }
        Ok(())
    }

    /// The error that blocks are mapped to the chunk `id`, which is not there.
    fn lost(&self, id: u64) -> Result<TableError, TableError> {
        let mut first = 0;
        self.table.each_run(|run| {
            let found = matches!(run.target, Target::Chunk { seq, .. } if seq == id);
            if found {
                first = run.lba;
            }
            !found
        })?;
        Ok(TableError::ReferenceLost { volume: self.table.volume, lba: first, id })
    }
}

impl Table {
    /// What has to be copied of the chunks `victims`, all of them applied. It may see what a chunk applied meanwhile says: that
    /// does no harm, because that chunk comes after the basis and says it again.
    pub fn gather(&self, victims: &[ChunkIndex]) -> Result<Gathered, TableError> {
        let basis = self.applied();
        let mut sources = Vec::new();
        let mut references: Vec<ChunkExtent> = Vec::new();
        let mut ranges: Vec<(Lba, Lba)> = Vec::new();
        for victim in victims {
            let tells = self.with_usage(|used| used.get(&victim.name.seq).is_some_and(|usage| usage.tombs > 0));
            sources.extend(self.live_in(victim)?);
            if tells {
                references.extend(self.true_references(victim)?);
            }
            let zeroes = victim.extents.iter().filter(|e| matches!(e.kind, ExtentKind::Zero | ExtentKind::Hole));
            ranges.extend(zeroes.filter(|_| tells).map(|extent| (extent.lba, extent.lba + extent.blocks)));
        }
        let mut sources = disjoint(sources);
        references.sort_unstable_by_key(|extent| extent.lba);
        let references = disjoint(references.iter().map(mapped).collect());
        let references = without(references.iter().filter_map(reference).collect(), &sources);
        ranges.sort_unstable();
        ranges.dedup_by(|next, last| {
            let joins = next.0 <= last.1;
            if joins {
                last.1 = last.1.max(next.1);
            }
            joins
        });
        let zeroes = without(self.zeroes_in(&ranges)?, &sources);
        let mut told = without(zeroes, &references.iter().map(mapped).collect::<Vec<_>>());
        told.extend(references);
        told.sort_unstable_by_key(|extent| extent.lba);
        sources.shrink_to_fit();
        Ok(Gathered { basis, sources, told })
    }

    /// Which blocks are still mapped to the chunk of `index`, in address order. Blocks are not forgotten while somebody
    /// else changes the table, but some of those returned may be gone by then.
    pub fn live_in(&self, index: &ChunkIndex) -> Result<Vec<Mapped>, TableError> {
        let id = index.name.seq;
        let mut live: Vec<Mapped> = Vec::new();
        let mut wanted: Vec<(u64, Lba, Lba)> = index.extents.iter().flat_map(data_leaves).collect();
        if self.with_usage(|used| used.get(&id).is_some_and(|usage| usage.referred)) {
            // These have blocks of it that its own header does not know.
            let leaves = self.leaves_that_refer(id)?;
            wanted.retain(|(leaf, ..)| leaves.binary_search(leaf).is_err());
            wanted.extend(leaves.iter().map(|leaf| (*leaf, leaf * LEAF_BLOCKS, (leaf + 1) * LEAF_BLOCKS)));
            wanted.sort_unstable();
        }
        for part in wanted.chunks(LEAVES_AT_ONCE) {
            let keys: Vec<NumberKey> = part.iter().map(|(leaf, ..)| key::leaf(*leaf)).collect();
            let values = self.kv.get_many(&keys).map_err(|source| TableError::Engine { op: "reading", source })?;
            for ((leaf, from, to), value) in part.iter().zip(values) {
                let Some(value) = value else { continue };
                for run in decode_leaf(*leaf, &value)?.runs() {
                    if !matches!(run.target, Target::Chunk { seq, .. } if seq == id) {
                        continue;
                    }
                    let base = leaf * LEAF_BLOCKS + u64::from(run.start);
                    let (start, end) = (base.max(*from), (base + u64::from(run.blocks)).min(*to));
                    if start < end {
                        push(&mut live, start, end - start, run.target.advanced((start - base) as u16));
                    }
                }
            }
        }
        Ok(live)
    }

    /// The parts of `ranges` (first block, one past the last; in order, disjoint) without data, as extents in address order.
    pub fn zeroes_in(&self, ranges: &[(Lba, Lba)]) -> Result<Vec<ChunkExtent>, TableError> {
        let mut zeroes: Vec<ChunkExtent> = Vec::new();
        for &(mut lba, end) in ranges {
            while lba < end {
                for (blocks, allocation) in self.allocations(lba, end - lba, 1024)? {
                    let kind = match allocation {
                        Allocation::Data => None,
                        Allocation::Zero => Some(ExtentKind::Zero),
                        Allocation::Hole => Some(ExtentKind::Hole),
                    };
                    match (kind, zeroes.last_mut()) {
                        (None, _) => {}
                        (Some(kind), Some(last)) if last.kind == kind && last.lba + last.blocks == lba => {
                            last.blocks += blocks;
                        }
                        (Some(kind), _) => zeroes.push(ChunkExtent { lba, blocks, kind }),
                    }
                    lba += blocks;
                }
            }
        }
        Ok(zeroes)
    }

    /// Brings in a relocated chunk: its blocks, in order, are copies of `sources`, and each is mapped to the copy if it is
    /// still mapped to the source and that is not pinned. What the chunks `carried` tell beside their blocks is all told by it,
    /// which counts only if no block was pinned: it may be told as a copy. One atomic batch.
    pub fn relocate(&self, index: &ChunkIndex, sources: &[Mapped], carried: &[u64]) -> Result<Moved, TableError> {
        let applied = self.lock_applied();
        let refused = |why| Err(TableError::OutOfOrder { applied: *applied, got: index.name, why });
        if index.name.volume != self.volume {
            return refused("it belongs to another volume");
        }
        if index.kind != ChunkKind::Relocated {
            return refused("it is not a relocated one");
        }
        if index.basis() > applied.seq {
            return refused("its basis is not applied yet");
        }
        let (newest, swept_epoch) = {
            let chunks = self.lock_chunks();
            (chunks.newest, chunks.swept_epoch)
        };
        if index.name.seq <= newest {
            return refused("its number was given before");
        }
        let total: u64 = sources.iter().map(|run| run.blocks).sum();
        let mut moved = Moved::default();
        let mut change = Change::default();
        let mut batch = Batch::default();
        let mut pieces = split_sources(index.name.seq, sources);
        pieces.retain(|piece| {
            let stays = matches!(piece.source, Target::Chunk { seq, .. } if self.is_pinned(seq));
            moved.pinned += if stays { u64::from(piece.blocks) } else { 0 };
            !stays
        });
        for part in pieces.chunk_by(|a, b| a.leaf == b.leaf).collect::<Vec<_>>().chunks(LEAVES_AT_ONCE) {
            let keys: Vec<NumberKey> = part.iter().map(|pieces| key::leaf(pieces[0].leaf)).collect();
            let values = self.kv.get_many(&keys).map_err(|source| TableError::Engine { op: "reading", source })?;
            let mut edits = Vec::with_capacity(part.len());
            for (pieces, value) in part.iter().zip(values) {
                let Some(value) = value else { continue };
                let number = pieces[0].leaf;
                let leaf = decode_leaf(number, &value)?;
                let sets: Vec<_> = pieces.iter().flat_map(|piece| piece.still_there(&leaf)).collect();
                moved.blocks += sets.iter().map(|(_, blocks, _)| u64::from(*blocks)).sum::<u64>();
                edits.push(LeafEdit { leaf: number, sets });
            }
            self.edit_leaves(index.name.seq, edits, &mut change, &mut batch)?;
        }
        moved.missed = total - moved.blocks;
        change.add(index.name.seq, new_usage(index, moved.blocks as u32));
        let carried = if moved.pinned == 0 { carried } else { &[] };
        carried.iter().for_each(|id| change.carry(*id));
        batch.put(&key::RELOCATED, key::encode_pair(index.name.seq, swept_epoch));
        self.commit(index, change, (applied.seq + 1, index.name.seq), None, batch)?;
        self.lock_chunks().newest = index.name.seq;
        Ok(moved)
    }

    /// Makes an empty table what the chunks of a volume say, from nothing but their `headers`, as [`Rebuild`] does.
    pub fn rebuild<E: From<TableError>>(
        &self,
        headers: impl IntoIterator<Item = Result<ChunkIndex, E>>,
        upto: Applied,
    ) -> Result<(), E> {
        let mut rebuild = Rebuild::begin(self, upto)?;
        for index in headers {
            rebuild.add(&index?)?;
        }
        Ok(rebuild.finish(0)?)
    }

    /// Compares the account of every chunk and the back rows with the leaves. Reads the whole table.
    pub fn recount(&self) -> Result<(), TableError> {
        let _applied = self.lock_applied();
        let mut live = BTreeMap::<u64, u32>::new();
        let mut leaves = BTreeMap::<u64, BTreeSet<u64>>::new();
        let mut problem = None;
        self.kv
            .scan(&key::leaf(0), &key::leaf(u64::MAX), &mut |k, value| {
                let number = key::number(k).unwrap_or(0);
                match decode_leaf(number, value) {
                    Ok(leaf) => {
                        for run in leaf.runs() {
                            if let Target::Chunk { seq, .. } = run.target {
                                *live.entry(seq).or_default() += u32::from(run.blocks);
                            }
                        }
                        leaves.insert(number, chunks_of(&leaf).collect());
                    }
                    Err(error) => problem = Some(error),
                }
                problem.is_none()
            })
            .map_err(|source| TableError::Engine { op: "scanning", source })?;
        if let Some(problem) = problem {
            return Err(problem);
        }
        self.check_back_rows(&leaves)?;
        let chunks = self.lock_chunks().clone();
        let mut stored = Self::load_chunks(&*self.kv)?;
        stored.applied = chunks.applied;
        if stored != chunks {
            return Err(TableError::Damaged("the accounts in memory and in the table differ".into()));
        }
        for (id, usage) in &chunks.used {
            if live.remove(id).unwrap_or(0) != usage.live {
                return Err(wrong_count(*id));
            }
        }
        match live.keys().next() {
            Some(id) => Err(wrong_count(*id)),
            None => Ok(()),
        }
    }
}

/// The leaves that a data extent touches, each with the extent's first block in it and one past the last.
fn data_leaves(extent: &ChunkExtent) -> impl Iterator<Item = (u64, Lba, Lba)> {
    let blocks = if matches!(extent.kind, ExtentKind::Data { .. }) { extent.blocks } else { 0 };
    let (first, end) = (extent.lba, extent.lba + blocks);
    (place(first).0..end.div_ceil(LEAF_BLOCKS)).map(move |leaf| {
        let base = leaf * LEAF_BLOCKS;
        (leaf, first.max(base), end.min(base + LEAF_BLOCKS))
    })
}

/// Where the blocks of a reference stand.
fn mapped(extent: &ChunkExtent) -> Mapped {
    let target = match extent.kind {
        ExtentKind::Refer { seq, index } => Target::Chunk { seq, index },
        _ => Target::Hole,
    };
    Mapped { lba: extent.lba, blocks: extent.blocks, target }
}

/// The reference that says so.
fn reference(run: &Mapped) -> Option<ChunkExtent> {
    let Target::Chunk { seq, index } = run.target else { return None };
    Some(ChunkExtent { lba: run.lba, blocks: run.blocks, kind: ExtentKind::Refer { seq, index } })
}

/// `runs` in address order. Of blocks that were seen twice, because a chunk that refers to another one was applied between
/// two looks, one is enough.
fn disjoint(mut runs: Vec<Mapped>) -> Vec<Mapped> {
    runs.sort_by_key(|run| run.lba);
    let mut end = 0;
    runs.retain_mut(|run| {
        let known = end.max(run.lba) - run.lba;
        if known >= run.blocks {
            return false;
        }
        *run = Mapped { lba: run.lba + known, blocks: run.blocks - known, target: run.target.advanced(known as u16) };
        end = run.lba + run.blocks;
        true
    });
    runs
}

/// `told` but for the blocks of `sources`; both are in address order.
fn without(told: Vec<ChunkExtent>, sources: &[Mapped]) -> Vec<ChunkExtent> {
    let mut left = Vec::with_capacity(told.len());
    let mut at = 0;
    for ChunkExtent { lba: first, blocks, kind } in told {
        let (mut lba, end) = (first, first + blocks);
        let part = |lba: Lba, blocks: u64| {
            let kind = match kind {
                ExtentKind::Refer { seq, index } => ExtentKind::Refer { seq, index: index + (lba - first) as u16 },
                kind => kind,
            };
            ChunkExtent { lba, blocks, kind }
        };
        while sources.get(at).is_some_and(|run| run.lba + run.blocks <= lba) {
            at += 1;
        }
        let mut next = at;
        while let Some(run) = sources.get(next).filter(|run| run.lba < end) {
            if lba < run.lba {
                left.push(part(lba, run.lba - lba));
            }
            lba = run.lba + run.blocks;
            next += 1;
        }
        if lba < end {
            left.push(part(lba, end - lba));
        }
    }
    left
}

fn push(found: &mut Vec<Mapped>, lba: Lba, blocks: u64, target: Target) {
    match found.last_mut() {
        Some(last) if last.lba + last.blocks == lba && last.target.continues(last.blocks, target) => {
            last.blocks += blocks;
        }
        _ => found.push(Mapped { lba, blocks, target }),
    }
}

/// Copied blocks within one leaf.
struct Piece {
    leaf: u64,
    start: u8,
    blocks: u8,
    source: Target,
    copy: Target,
}

impl Piece {
    /// The parts that are still mapped to the source, as they shall be set.
    fn still_there(&self, leaf: &Leaf) -> Vec<(u8, u8, Target)> {
        let mut sets = Vec::new();
        for run in leaf.runs() {
            let (from, to) = (run.start.max(self.start), (run.start + run.blocks).min(self.start + self.blocks));
            if from < to
                && run.target.advanced((from - run.start).into()) == self.source.advanced((from - self.start).into())
            {
                sets.push((from, to - from, self.copy.advanced((from - self.start).into())));
            }
        }
        sets
    }
}

/// `sources`, which were copied to the payload of the chunk `id` in order, leaf by leaf.
fn split_sources(id: u64, sources: &[Mapped]) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut index = 0;
    for run in sources {
        let mut done = 0;
        while done < run.blocks {
            let (leaf, start) = place(run.lba + done);
            let blocks = (run.blocks - done).min(LEAF_BLOCKS - u64::from(start));
            pieces.push(Piece {
                leaf,
                start,
                blocks: blocks as u8,
                source: run.target.advanced(done as u16),
                copy: Target::Chunk { seq: id, index },
            });
            // Bounded by the chunk's payload.
            index += blocks as u16;
            done += blocks;
        }
    }
    pieces
}
