//! Accounts, compaction, deletion and rebuilding against a model that knows only what each block should hold.

use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::tests::{BLOCKS, VOLUME, chunk, extents};
use super::*;
use crate::chunk::{ChunkIndex, ChunkKind, ChunkName, ExtentKind, RELOCATED};

/// What a block holds: the fresh chunk that wrote it, and zeroes apart from holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Content {
    Hole,
    Zero,
    Written(u64),
}

/// The headers in the bucket, and what stands behind each payload block of each chunk.
#[derive(Default)]
struct Bucket {
    headers: BTreeMap<u64, ChunkIndex>,
    contents: BTreeMap<u64, Vec<Content>>,
}

struct World {
    table: Table,
    bucket: Bucket,
    model: Vec<Content>,
    held: Vec<u64>,
    /// What such a table takes for alive as long as nothing new is applied is not deleted at once.
    is_rebuilt: bool,
    snapshots: Vec<(Arc<MemKv>, Vec<Content>)>,
    kv: Arc<MemKv>,
}

fn content(bucket: &Bucket, target: Target) -> Content {
    match target {
        Target::Hole => Content::Hole,
        Target::Zero => Content::Zero,
        Target::Chunk { seq, index } => bucket.contents[&seq][usize::from(index)],
    }
}

impl World {
    fn new() -> Self {
        let kv = MemKv::new();
        let table = Table::in_memory(kv.clone(), VOLUME).unwrap();
        let model = vec![Content::Hole; BLOCKS as usize];
        World {
            table,
            bucket: Bucket::default(),
            model,
            held: Vec::new(),
            is_rebuilt: false,
            snapshots: Vec::new(),
            kv,
        }
    }

    fn write(&mut self, extents: &[(u64, u64, ExtentKind)]) {
        let seq = self.table.applied().seq + 1;
        let index = chunk(seq, extents);
        self.table.apply(&index).unwrap();
        for &(lba, blocks, kind) in extents {
            let content = match kind {
                ExtentKind::Data { .. } => Content::Written(seq),
                ExtentKind::Zero => Content::Zero,
                ExtentKind::Hole => Content::Hole,
                ExtentKind::Refer { .. } => unreachable!("see `copy`"),
            };
            self.model[lba as usize..(lba + blocks) as usize].fill(content);
        }
        self.bucket.contents.insert(seq, vec![Content::Written(seq); index.frames.raw_blocks() as usize]);
        self.bucket.headers.insert(seq, index);
    }

    /// Copies what lives in every `step`th chunk, with `meanwhile` applied between the look and the move. The copy is lost
    /// before the table hears of it when `lost`.
    fn compact(&mut self, step: usize, meanwhile: Option<&[(u64, u64, ExtentKind)]>, lost: bool) {
        let newest = self.held.iter().max().copied().unwrap_or(0);
        let ids: Vec<u64> = self.table.with_usage(|used| {
            used.iter().filter(|(_, usage)| usage.birth > newest).map(|(id, _)| *id).step_by(step).collect()
        });
        let victims: Vec<_> = ids.iter().map(|id| self.bucket.headers[id].clone()).collect();
        let Gathered { basis, sources, told } = self.table.gather(&victims).unwrap();
        if let Some(extents) = meanwhile {
            self.write(extents);
        }
        let mut parts: Vec<(u64, u64, ExtentKind)> = told.iter().map(|e| (e.lba, e.blocks, e.kind)).collect();
        parts.extend(sources.iter().map(|run| (run.lba, run.blocks, ExtentKind::Data { index: 0 })));
        parts.sort_unstable_by_key(|part| part.0);
        let seq = self.table.newest_relocated().max(RELOCATED) + 1;
        let name = ChunkName { volume: VOLUME, epoch: 1, seq };
        let made = chunk(seq, &parts);
        let index = ChunkIndex { name, kind: ChunkKind::Relocated, first_lsn: basis.seq, last_lsn: basis.lsn, ..made };
        let copied = sources.iter().flat_map(|run| (0..run.blocks).map(|i| run.target.advanced(i as u16)));
        let copied = copied.map(|target| content(&self.bucket, target)).collect();
        if lost {
            // Another epoch than any that follows; its number is not used again either.
            let orphan = RELOCATED | 1 << 40 | seq;
            let index = ChunkIndex { name: ChunkName { epoch: 0, seq: orphan, volume: VOLUME }, ..index };
            self.bucket.contents.insert(orphan, copied);
            self.bucket.headers.insert(orphan, index);
            return;
        }
        self.bucket.contents.insert(seq, copied);
        self.bucket.headers.insert(seq, index.clone());
        let moved = self.table.relocate(&index, &sources, &ids).unwrap();
        assert_eq!(moved.blocks + moved.missed, index.frames.raw_blocks());
        assert!(meanwhile.is_some() || moved.missed == moved.pinned);
    }

    /// Copies blocks by reference, as far as that may be; what is to happen between the look and the chunk that tells it
    /// happens then.
    fn copy(&mut self, from: u64, to: u64, blocks: u64, between: Between) {
        let found = self.table.lookup_pinned(from, blocks).unwrap();
        let mut pins = Vec::new();
        let mut extents: Vec<(u64, u64, ExtentKind)> = Vec::new();
        let mut copied = Vec::new();
        for (run, pin) in found {
            for i in 0..run.blocks {
                let lba = run.lba + i;
                let cell = self.model[lba as usize];
                let kind = match (run.target.advanced(i as u16), cell) {
                    (Target::Chunk { seq, index }, _) if pin.is_some() => ExtentKind::Refer { seq, index },
                    (Target::Chunk { .. }, _) => {
                        copied.push(cell);
                        ExtentKind::Data { index: 0 }
                    }
                    (_, Content::Zero) => ExtentKind::Zero,
                    _ => ExtentKind::Hole,
                };
                match extents.last_mut() {
                    Some(last) if last.2.continues(last.1, kind) => last.1 += 1,
                    _ => extents.push((to + (lba - from), 1, kind)),
                }
            }
            pins.extend(pin);
        }
        let cells = self.model[from as usize..(from + blocks) as usize].to_vec();
        match between {
            Between::Nothing => {}
            Between::Compact(_) if self.table.applied().seq == 0 => {}
            Between::Compact(step) => {
                self.compact(step, None, false);
                self.delete();
            }
            Between::Rebuild => {
                self.rebuild();
                // As whoever opens the volume does by the log.
                pins = pins.iter().map(|pin| self.table.pin(pin.chunk())).collect();
                self.delete();
            }
        }
        let seq = self.table.applied().seq + 1;
        let index = chunk(seq, &extents);
        self.table.apply(&index).unwrap();
        drop(pins);
        self.model[to as usize..(to + blocks) as usize].copy_from_slice(&cells);
        self.bucket.contents.insert(seq, copied);
        self.bucket.headers.insert(seq, index);
    }

    /// Goes on with a table made of headers, as long as nothing in the bucket is nobody's and no snapshot needs what died.
    fn rebuild(&mut self) {
        if !self.held.is_empty() || self.bucket.headers.keys().any(|id| id & 1 << 40 != 0) {
            return;
        }
        let kv = MemKv::new();
        self.table = self.rebuilt_over(kv.clone());
        self.kv = kv;
        self.is_rebuilt = true;
        // Zeroes over nothing may have become holes.
        for (cell, found) in self.model.iter_mut().zip(Self::contents(&self.table, &self.bucket)) {
            if *cell == Content::Zero {
                *cell = found;
            }
        }
    }

    /// A checkpoint stands here: deletes what may be deleted.
    fn delete(&mut self) {
        // A copy that no table knows may hold what zeroes and holes hide.
        if self.bucket.headers.keys().all(|id| id & 1 << 40 == 0) {
            let number = self.table.newest_relocated().max(RELOCATED) + 1;
            self.table.drop_pointless(&self.held, number).unwrap();
        }
        let upto = self.table.position();
        loop {
            let doomed = self.table.doomed(upto, &self.held, 3).unwrap();
            if doomed.is_empty() {
                return;
            }
            for chunk in &doomed {
                assert_eq!(chunk.name.unwrap().seq, chunk.id);
                assert_eq!(chunk.stored, self.bucket.headers.remove(&chunk.id).unwrap().object_len());
            }
            self.table.forget(&doomed.iter().map(|chunk| chunk.id).collect::<Vec<_>>()).unwrap();
        }
    }

    fn snapshot(&mut self) {
        self.held.push(self.table.applied().seq);
        self.snapshots.push((self.kv.copy(), self.model.clone()));
    }

    fn contents(table: &Table, bucket: &Bucket) -> Vec<Content> {
        let mut found = Vec::with_capacity(BLOCKS as usize);
        for run in table.lookup(0, BLOCKS).unwrap() {
            for i in 0..run.blocks {
                let target = run.target.advanced(i as u16);
                if let Target::Chunk { seq, .. } = target {
                    assert!(bucket.headers.contains_key(&seq), "chunk {seq:x} is needed and was deleted");
                }
                found.push(content(bucket, target));
            }
        }
        // Lookups do not tell zeroes from holes where a long range of them is.
        let mut at = 0;
        while at < BLOCKS {
            for (blocks, kind) in table.allocations(at, BLOCKS - at, 1000).unwrap() {
                let range = at as usize..(at + blocks) as usize;
                match kind {
                    crate::volume::Allocation::Zero => found[range].fill(Content::Zero),
                    crate::volume::Allocation::Hole => found[range].fill(Content::Hole),
                    crate::volume::Allocation::Data => {}
                }
                at += blocks;
            }
        }
        found
    }

    fn rebuilt(&self) -> Table {
        self.rebuilt_over(MemKv::new())
    }

    fn rebuilt_over(&self, kv: Arc<MemKv>) -> Table {
        let table = Table::in_memory(kv, VOLUME).unwrap();
        let mut headers: Vec<_> = self.bucket.headers.values().cloned().collect();
        headers.sort_by_key(|index| RebuildKey::new(&index.name, index.basis()));
        table.rebuild(headers.into_iter().map(Ok::<_, TableError>), self.table.applied()).unwrap();
        table
    }

    fn check(&self) {
        self.table.recount().unwrap();
        assert!(Self::contents(&self.table, &self.bucket) == self.model, "the table is wrong");
        let rebuilt = self.rebuilt();
        rebuilt.recount().unwrap();
        // Allocated zeroes over nothing may have become holes.
        let reads = |contents: &[Content]| -> Vec<Content> {
            let zero = |content: &Content| if *content == Content::Zero { Content::Hole } else { *content };
            contents.iter().map(zero).collect()
        };
        let found = Self::contents(&rebuilt, &self.bucket);
        assert!(reads(&found) == reads(&self.model), "the rebuilt table is wrong");
        let space = self.table.space();
        let objects = |id: &&u64| **id & 1 << 40 == 0;
        let bytes: u64 =
            self.bucket.headers.iter().filter(|(id, _)| objects(id)).map(|(_, index)| index.object_len()).sum();
        assert_eq!(space.stored_bytes, bytes);
        assert_eq!(space.chunks, self.bucket.headers.keys().filter(objects).count() as u64);
        assert!(space.live_bytes + space.dead_bytes <= space.stored_bytes);
    }
}

/// What happens while a copy by reference is only in the log.
#[derive(Clone, Copy, Debug)]
enum Between {
    Nothing,
    Compact(usize),
    Rebuild,
}

#[derive(Clone, Debug)]
enum Op {
    Write(Vec<(u64, u64, ExtentKind)>),
    Copy(u64, u64, u64, Between),
    Rebuild,
    Compact(usize, Option<Vec<(u64, u64, ExtentKind)>>, bool),
    Delete,
    Snapshot,
    DropSnapshot,
}

fn op(snapshots: bool) -> impl Strategy<Value = Op> {
    let rare = u32::from(snapshots);
    prop_oneof![
        8 => extents().prop_map(Op::Write),
        8 => copy(),
        1 => Just(Op::Rebuild),
        4 => (1usize..4, prop::option::of(extents()), prop::bool::weighted(0.2)).prop_map(|(s, m, l)| Op::Compact(s, m, l)),
        2 => Just(Op::Delete),
        rare => Just(Op::Snapshot),
        rare => Just(Op::DropSnapshot),
    ]
}

/// Of an early part of the volume to a later one, or the other way round.
fn copy() -> impl Strategy<Value = Op> {
    let between = prop_oneof![
        3 => Just(Between::Nothing),
        3 => (1usize..4).prop_map(Between::Compact),
        1 => Just(Between::Rebuild),
    ];
    (0u64..6000, 6300u64..9000, 1u64..300, any::<bool>(), between).prop_map(|(a, b, blocks, back, between)| {
        let (from, to) = if back { (b, a) } else { (a, b) };
        Op::Copy(from, to, blocks, between)
    })
}

fn run(ops: Vec<Op>) -> World {
    let mut world = World::new();
    for op in ops {
        match op {
            Op::Write(extents) => world.write(&extents),
            Op::Copy(from, to, blocks, between) => world.copy(from, to, blocks, between),
            Op::Rebuild => world.rebuild(),
            Op::Compact(..) if world.table.applied().seq == 0 => {}
            Op::Compact(step, meanwhile, lost) => world.compact(step, meanwhile.as_deref(), lost),
            Op::Delete => world.delete(),
            Op::Snapshot => world.snapshot(),
            Op::DropSnapshot => {
                if !world.held.is_empty() {
                    world.held.remove(0);
                    world.snapshots.remove(0);
                }
            }
        }
    }
    world
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]

    #[test]
    fn accounts_are_exact_and_headers_are_enough(ops in prop::collection::vec(op(false), 1..24)) {
        let mut world = run(ops);
        world.check();
        world.delete();
        world.check();
        // With nothing else going on, compaction leaves no dead block behind.
        if world.table.applied().seq > 0 {
            world.bucket.headers.retain(|id, _| id & 1 << 40 == 0);
            world.compact(1, None, false);
            world.delete();
            world.check();
            let space = world.table.space();
            // But for the newest chunk of the history.
            prop_assert!(world.is_rebuilt || space.dead_chunks <= 1);
            prop_assert!(world.is_rebuilt || space.chunks - space.dead_chunks <= 1);
        }
    }

    #[test]
    fn snapshots_keep_what_they_refer_to(ops in prop::collection::vec(op(true), 1..24)) {
        let world = run(ops);
        world.check();
        for (kv, model) in &world.snapshots {
            let table = Table::in_memory(kv.clone(), VOLUME).unwrap();
            prop_assert!(&World::contents(&table, &world.bucket) == model);
        }
    }
}

#[test]
fn what_is_dead_goes_only_behind_a_checkpoint_and_before_no_snapshot() {
    let data = |lba, blocks| (lba, blocks, ExtentKind::Data { index: 0 });
    let mut world = World::new();
    world.write(&[data(0, 10)]);
    world.write(&[data(0, 4)]);
    world.write(&[data(4, 6)]);
    let at = |seq| Position { seq, relocated: 0 };
    let ids = |seq, held: &[u64]| -> Vec<u64> {
        let upto = at(seq);
        world.table.doomed(upto, held, 10).unwrap().iter().map(|chunk| chunk.id).collect()
    };
    assert!(ids(2, &[]).is_empty());
    assert_eq!(ids(3, &[]), [1]);
    assert_eq!(ids(9, &[3]), [1], "a snapshot at its death does not need it");
    for held in [1, 2] {
        assert!(ids(9, &[held]).is_empty());
    }
    assert_eq!(world.table.waiting_bytes(at(2), &[]), world.bucket.headers[&1].object_len());
    assert_eq!(world.table.waiting_bytes(at(2), &[1]), 0);
    // What compaction moved may still be referred to by a checkpoint at the same seq.
    world.compact(1, None, false);
    let ids = |seq, relocated, held: &[u64]| -> Vec<u64> {
        world.table.doomed(Position { seq, relocated }, held, 10).unwrap().iter().map(|chunk| chunk.id).collect()
    };
    assert_eq!(ids(3, 0, &[]), [1]);
    assert_eq!(ids(4, 0, &[]), [1, 2, 3]);
    let newest = world.table.newest_relocated();
    assert_eq!(ids(3, newest, &[]), [1, 2], "this checkpoint knows the copies, but 3 is the newest");
    assert!(ids(2, newest, &[]).is_empty());
    assert_eq!(ids(4, 0, &[3]), [1], "a snapshot may be older than the copies");
}

#[test]
fn a_clone_owns_nothing_of_its_origin() {
    let data = |lba, blocks| (lba, blocks, ExtentKind::Data { index: 0 });
    let mut world = World::new();
    world.write(&[data(0, 10)]);
    world.write(&[data(0, 10)]);
    world.compact(1, None, false);
    let stored = world.table.space().stored_bytes;
    let clone = VolumeId([9; 16]);
    world.table.become_clone(clone).unwrap();
    assert_eq!(world.table.space().stored_bytes, 0);
    assert!(world.table.space().foreign_bytes < stored);
    let mut index = chunk(3, &[data(0, 10)]);
    index.name.volume = clone;
    world.table.apply(&index).unwrap();
    assert_eq!(world.table.space().chunks, 1);
    assert_eq!(world.table.space().foreign_bytes, 0);
    let doomed = world.table.doomed(Position { seq: 10, relocated: 0 }, &[], 10).unwrap();
    assert_eq!(doomed.len(), 3);
    assert!(doomed.iter().all(|chunk| chunk.name.is_none()), "chunks of the origin are only forgotten");
    assert!(world.table.is_own(3) && !world.table.is_own(2) && !world.table.is_own(RELOCATED | 1));
}

#[test]
fn a_restored_table_knows_what_the_present_one_does_not() {
    let data = |lba, blocks| (lba, blocks, ExtentKind::Data { index: 0 });
    let mut world = World::new();
    world.write(&[data(0, 10)]);
    world.table.set_first_unknown(vec![(1, RELOCATED | 1 << 32 | 3)]).unwrap();
    world.table.persist().unwrap();
    let (old, model) = (world.kv.copy(), world.model.clone());
    world.write(&[data(0, 4)]);
    let unknown = vec![(2, RELOCATED | 2 << 32 | 9), (4, RELOCATED | 4 << 32 | 1)];
    world.table.set_first_unknown(unknown.clone()).unwrap();
    let restored = Table::in_memory(old.clone(), VOLUME).unwrap();
    let number = RELOCATED | 5 << 32 | 1;
    restored.go_on_from(&world.table, number).unwrap();
    for table in [restored, Table::in_memory(old, VOLUME).unwrap()] {
        assert_eq!(table.first_unknown(), unknown, "not what it was at the snapshot");
        assert_eq!(table.position(), Position { seq: 2, relocated: number });
        table.recount().unwrap();
        assert!(World::contents(&table, &world.bucket) == model);
    }
}

#[test]
fn a_reference_to_what_is_gone_is_an_error_unless_it_is_told_again() {
    let data = |lba, blocks| (lba, blocks, ExtentKind::Data { index: 0 });
    let refer = |lba, blocks, seq, index| (lba, blocks, ExtentKind::Refer { seq, index });
    let chunks =
        [chunk(1, &[data(0, 10)]), chunk(2, &[refer(100, 5, 1, 3), refer(200, 5, 1, 0)]), chunk(3, &[data(98, 7)])];
    let rebuilt = |chunks: &[ChunkIndex]| {
        let table = Table::in_memory(MemKv::new(), VOLUME).unwrap();
        let upto = Applied { seq: 3, lsn: 39 };
        table.rebuild(chunks.iter().cloned().map(Ok::<_, TableError>), upto).map(|()| table)
    };
    let whole = rebuilt(&chunks).unwrap();
    whole.recount().unwrap();
    let found = whole.lookup(200, 5).unwrap();
    assert_eq!(found[0].target, Target::Chunk { seq: 1, index: 0 });
    assert_eq!(whole.with_usage(|used| used[&1].live), 15);
    let lost = rebuilt(&chunks[1..]).unwrap_err();
    assert!(matches!(lost, TableError::ReferenceLost { volume: VOLUME, lba: 200, id: 1 }), "{lost}");
    let again = [chunks[1].clone(), chunk(3, &[data(98, 7), data(200, 5)])];
    let table = rebuilt(&again).unwrap();
    table.recount().unwrap();
    assert!(!table.knows(1));
    // Applied one after the other there must be none.
    let table = Table::in_memory(MemKv::new(), VOLUME).unwrap();
    table.apply(&chunk(1, &[refer(100, 5, 7, 3)])).unwrap_err();
}

#[test]
fn a_chunk_lives_as_long_as_anything_refers_to_it() {
    let data = |lba, blocks| (lba, blocks, ExtentKind::Data { index: 0 });
    let mut world = World::new();
    world.write(&[data(0, 100)]);
    world.copy(0, 1000, 100, Between::Nothing);
    world.copy(1000, 2000, 100, Between::Nothing);
    assert_eq!(world.table.with_usage(|used| used[&1].live), 300);
    let space = world.table.space();
    assert!(space.live_bytes <= space.stored_bytes);
    world.write(&[data(0, 100)]);
    world.write(&[(1000, 100, ExtentKind::Hole)]);
    world.delete();
    world.check();
    assert_eq!(world.table.with_usage(|used| used[&1].live), 100);
    // Its last address is one that its header does not know.
    let gathered = world.table.gather(&[world.bucket.headers[&1].clone()]).unwrap();
    assert_eq!(gathered.sources.iter().map(|run| (run.lba, run.blocks)).collect::<Vec<_>>(), [(2000, 100)]);
    world.compact(1, None, false);
    world.delete();
    world.check();
    assert!(!world.table.knows(1) && !world.table.knows(3));
}

#[test]
fn the_format_says_that_there_are_references() {
    let kv = MemKv::new();
    let version = |kv: &Arc<MemKv>| {
        use super::kv::Kv;
        key::decode_format(&kv.get(&key::FORMAT).unwrap().unwrap()).unwrap().0
    };
    let mut table = Table::in_memory(kv.clone(), VOLUME).unwrap();
    table.apply(&chunk(1, &[(0, 5, ExtentKind::Data { index: 0 })])).unwrap();
    assert_eq!(version(&kv), 2);
    table.apply(&chunk(2, &[(10, 5, ExtentKind::Refer { seq: 1, index: 0 })])).unwrap();
    assert_eq!(version(&kv), 3);
    table.become_clone(VolumeId([9; 16])).unwrap();
    assert_eq!(version(&kv), 3);
    Table::in_memory(kv, VolumeId([9; 16])).unwrap().recount().unwrap();
}
