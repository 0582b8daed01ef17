//! What compaction asks of the table: what of a chunk is still needed, and to refer to the copies instead. And how a table
//! comes back from headers alone, relocated ones among them.

use super::apply::{LeafEdit, decode_leaf, new_usage, wrong_count};
use super::key::{self, NumberKey};
use super::kv::Batch;
use super::leaf::{LEAF_BLOCKS, Leaf, Target, place};
use super::lookup::Mapped;
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
    /// Blocks that were overwritten while they were copied.
    pub missed: u64,
}

/// What of some chunks has to be copied before they can go.
#[derive(Clone, Debug, Default)]
pub struct Gathered {
    /// A position at which all of it was so.
    pub basis: Applied,
    /// The blocks that are still mapped to them, in address order.
    pub sources: Vec<Mapped>,
    /// Of the zeroes and holes they tell, those that are still true, in address order and apart from `sources`.
    pub zeroes: Vec<ChunkExtent>,
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
        Ok(Self { table, upto, previous: None })
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
        table.set_all(index, (self.upto.seq + 1, 0), batch)
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
    pub fn finish(self, least: u64) -> Result<(), TableError> {
        let mut applied = self.table.lock_applied();
        let mut batch = Batch::default();
        let newest = self.table.newest_relocated().max(least);
        if newest > 0 {
            batch.put(&key::RELOCATED, key::encode_pair(newest, self.table.swept_epoch()));
            self.table.lock_chunks().newest = newest;
        }
        batch.put(&key::APPLIED, key::encode_applied(self.upto));
        self.table.kv.write(batch).map_err(|source| TableError::Engine { op: "writing", source })?;
        *applied = self.upto;
        self.table.lock_chunks().applied = self.upto.seq;
        Ok(())
    }
}

impl Table {
    /// What has to be copied of the chunks `victims`, all of them applied. Of zeroes and holes it may see what a chunk
    /// applied meanwhile says: that does no harm, because that chunk comes after the basis and says it again.
    pub fn gather(&self, victims: &[ChunkIndex]) -> Result<Gathered, TableError> {
        let basis = self.applied();
        let mut sources = Vec::new();
        let mut ranges: Vec<(Lba, Lba)> = Vec::new();
        for victim in victims {
            let tells = self.with_usage(|used| used.get(&victim.name.seq).is_some_and(|usage| usage.tombs > 0));
            sources.extend(self.live_in(victim)?);
            let zeroes = victim.extents.iter().filter(|extent| !matches!(extent.kind, ExtentKind::Data { .. }));
            ranges.extend(zeroes.filter(|_| tells).map(|extent| (extent.lba, extent.lba + extent.blocks)));
        }
        sources.sort_unstable_by_key(|run| run.lba);
        ranges.sort_unstable();
        ranges.dedup_by(|next, last| {
            let joins = next.0 <= last.1;
            if joins {
                last.1 = last.1.max(next.1);
            }
            joins
        });
        let zeroes = without(self.zeroes_in(&ranges)?, &sources);
        Ok(Gathered { basis, sources, zeroes })
    }

    /// Which blocks are still mapped to the chunk of `index`, in address order. Blocks are not forgotten while somebody
    /// else changes the table, but some of those returned may be gone by then.
    pub fn live_in(&self, index: &ChunkIndex) -> Result<Vec<Mapped>, TableError> {
        let id = index.name.seq;
        let mut live: Vec<Mapped> = Vec::new();
        let wanted: Vec<(u64, Lba, Lba)> = index.extents.iter().flat_map(data_leaves).collect();
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
    /// still mapped to the source. The zeroes and holes of the chunks `carried` are all told by it. One atomic batch.
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
        let pieces = split_sources(index.name.seq, sources);
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
            self.edit_leaves(edits, &mut change, &mut batch)?;
        }
        moved.missed = total - moved.blocks;
        change.add(index.name.seq, new_usage(index, moved.blocks as u32));
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

    /// Compares the account of every chunk with the leaves. Reads the whole table.
    pub fn recount(&self) -> Result<(), TableError> {
        let _applied = self.lock_applied();
        let mut live = std::collections::BTreeMap::<u64, u32>::new();
        let mut problem = None;
        self.kv
            .scan(&key::leaf(0), &key::leaf(u64::MAX), &mut |k, value| {
                match decode_leaf(key::number(k).unwrap_or(0), value) {
                    Ok(leaf) => leaf.runs().iter().for_each(|run| {
                        if let Target::Chunk { seq, .. } = run.target {
                            *live.entry(seq).or_default() += u32::from(run.blocks);
                        }
                    }),
                    Err(error) => problem = Some(error),
                }
                problem.is_none()
            })
            .map_err(|source| TableError::Engine { op: "scanning", source })?;
        if let Some(problem) = problem {
            return Err(problem);
        }
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

/// `zeroes` but for the blocks of `sources`; both are in address order.
fn without(zeroes: Vec<ChunkExtent>, sources: &[Mapped]) -> Vec<ChunkExtent> {
    let mut left = Vec::with_capacity(zeroes.len());
    let mut at = 0;
    for ChunkExtent { mut lba, blocks, kind } in zeroes {
        let end = lba + blocks;
        while sources.get(at).is_some_and(|run| run.lba + run.blocks <= lba) {
            at += 1;
        }
        let mut next = at;
        while let Some(run) = sources.get(next).filter(|run| run.lba < end) {
            if lba < run.lba {
                left.push(ChunkExtent { lba, blocks: run.lba - lba, kind });
            }
            lba = run.lba + run.blocks;
            next += 1;
        }
        if lba < end {
            left.push(ChunkExtent { lba, blocks: end - lba, kind });
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
