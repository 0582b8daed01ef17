//! The table against a model: one cell per block.

use std::sync::Arc;

use proptest::prelude::*;
use rand::SeedableRng;
use rand::rngs::SmallRng;

use super::*;
use crate::chunk::{ChunkExtent, ChunkIndex, ChunkKind, ChunkName, ExtentKind, FrameDirectory, FrameEncoding};
use crate::volume::Allocation;

pub(super) const VOLUME: VolumeId = VolumeId([5; 16]);
/// Covers several spans of zeroes long enough to become ranges (256 leaves of 64 blocks).
pub(super) const BLOCKS: u64 = 70_000;

/// A chunk header with these extents; indexes are filled in.
pub(super) fn chunk(seq: u64, extents: &[(u64, u64, ExtentKind)]) -> ChunkIndex {
    let mut frames = FrameDirectory::new(1000);
    let mut index = 0;
    let extents = extents
        .iter()
        .map(|&(lba, blocks, kind)| {
            let kind = match kind {
                ExtentKind::Data { .. } => {
                    let kind = ExtentKind::Data { index };
                    index += blocks as u16;
                    for _ in 0..blocks {
                        frames.push(4096, 1, FrameEncoding::Raw, 0);
                    }
                    kind
                }
                other => other,
            };
            ChunkExtent { lba, blocks, kind }
        })
        .collect();
    ChunkIndex {
        name: ChunkName { volume: VOLUME, epoch: 1, seq },
        kind: ChunkKind::Data,
        first_lsn: (seq as u32 as u64) * 10,
        last_lsn: (seq as u32 as u64) * 10 + 9,
        created_ms: 0,
        extents,
        frames,
    }
}

fn model_apply(cells: &mut [Target], index: &ChunkIndex) {
    for extent in &index.extents {
        for i in 0..extent.blocks {
            cells[(extent.lba + i) as usize] = match extent.kind {
                ExtentKind::Data { index: first } => Target::Chunk { seq: index.name.seq, index: first + i as u16 },
                ExtentKind::Zero => Target::Zero,
                ExtentKind::Hole => Target::Hole,
                ExtentKind::Refer { seq, index } => Target::Chunk { seq, index: index + i as u16 },
            };
        }
    }
}

fn check(table: &Table, cells: &[Target], from: u64, blocks: u64) -> Result<(), TestCaseError> {
    let mut at = from;
    for mapped in table.lookup(from, blocks).unwrap() {
        prop_assert_eq!(mapped.lba, at);
        for i in 0..mapped.blocks {
            let expected = cells[(at + i) as usize];
            let found = mapped.target.advanced(i.min(60_000) as u16);
            match (found, expected) {
                // Spans of zeroes are not looked at on the read path.
                (Target::Hole, Target::Zero) => {}
                _ => prop_assert_eq!(found, expected, "block {}", at + i),
            }
        }
        at += mapped.blocks;
    }
    prop_assert_eq!(at, from + blocks);
    Ok(())
}

fn check_allocations(table: &Table, cells: &[Target], from: u64, blocks: u64, max: usize) -> Result<(), TestCaseError> {
    let runs = table.allocations(from, blocks, max).unwrap();
    prop_assert!(!runs.is_empty() && runs.len() <= max);
    let mut at = from;
    let mut previous = None;
    for (blocks, kind) in &runs {
        prop_assert!(*blocks > 0);
        prop_assert_ne!(previous, Some(*kind), "neighbours must be joined");
        previous = Some(*kind);
        for lba in at..at + blocks {
            let expected = match cells[lba as usize] {
                Target::Hole => Allocation::Hole,
                Target::Zero => Allocation::Zero,
                Target::Chunk { .. } => Allocation::Data,
            };
            prop_assert_eq!(*kind, expected, "block {}", lba);
        }
        at += blocks;
    }
    prop_assert!(at <= from + blocks);
    if runs.len() < max {
        prop_assert_eq!(at, from + blocks, "ended early with room left");
    }
    Ok(())
}

pub(super) fn extents() -> impl Strategy<Value = Vec<(u64, u64, ExtentKind)>> {
    let one = (
        0u64..4000,
        prop_oneof![4 => 1u64..200, 1 => 15_000u64..40_000],
        prop_oneof![
            3 => Just(ExtentKind::Data { index: 0 }),
            1 => Just(ExtentKind::Zero),
            1 => Just(ExtentKind::Hole),
        ],
    );
    prop::collection::vec(one, 1..8).prop_map(|pieces| {
        let mut at = 0;
        let mut extents = Vec::new();
        for (gap, blocks, kind) in pieces {
            at += gap;
            let blocks = match kind {
                ExtentKind::Data { .. } => blocks.min(200),
                _ => blocks,
            };
            let blocks = blocks.min(BLOCKS.saturating_sub(at));
            if blocks == 0 {
                break;
            }
            extents.push((at, blocks, kind));
            at += blocks;
        }
        extents
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn behaves_like_an_array(
        chunks in prop::collection::vec(extents(), 1..10),
        reads in prop::collection::vec((0u64..BLOCKS, 1u64..300, 1usize..6), 20),
        crash in any::<u64>(),
    ) {
        let kv = MemKv::new();
        let mut table = Table::in_memory(kv.clone(), VOLUME).unwrap();
        let mut rng = SmallRng::seed_from_u64(crash);
        let mut history = vec![vec![Target::Hole; BLOCKS as usize]];
        let mut persisted = 0;
        for (n, extents) in chunks.iter().enumerate() {
            let index = chunk(table.applied().seq + 1, extents);
            table.apply(&index).unwrap();
            let mut cells = history.last().unwrap().clone();
            model_apply(&mut cells, &index);
            history.push(cells);
            if n % 4 == 1 {
                table.persist().unwrap();
                persisted = history.len() - 1;
            }
            if n % 3 == 2 {
                kv.crash(&mut rng);
                table = Table::in_memory(kv.clone(), VOLUME).unwrap();
                let kept = table.applied().seq as usize;
                prop_assert!(kept >= persisted && kept < history.len());
                history.truncate(kept + 1);
                persisted = kept;
            }
        }
        let cells = history.last().unwrap();
        table.recount().unwrap();
        for (from, blocks, max) in reads {
            let blocks = blocks.min(BLOCKS - from);
            check(&table, cells, from, blocks)?;
            check_allocations(&table, cells, from, blocks, max)?;
        }
        check(&table, cells, 0, BLOCKS)?;
        check_allocations(&table, cells, 0, BLOCKS, 100_000)?;
        check_allocations(&table, cells, 7, BLOCKS - 7, 3)?;
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn rocksdb_behaves_the_same(chunks in prop::collection::vec(extents(), 1..12)) {
        let dir = tempfile::tempdir().unwrap();
        let mut table = Table::open(dir.path(), 8 << 20, VOLUME).unwrap();
        let mut cells = vec![Target::Hole; BLOCKS as usize];
        for (n, extents) in chunks.iter().enumerate() {
            let index = chunk(table.applied().seq + 1, extents);
            table.apply(&index).unwrap();
            model_apply(&mut cells, &index);
            if n % 5 == 4 {
                table.persist().unwrap();
                drop(table);
                table = Table::open(dir.path(), 8 << 20, VOLUME).unwrap();
                prop_assert_eq!(table.applied(), Applied { seq: index.name.seq, lsn: index.last_lsn });
            }
        }
        check(&table, &cells, 0, BLOCKS)?;
        check_allocations(&table, &cells, 0, BLOCKS, 100_000)?;
        table.recount().unwrap();
        let last = table.directory(table.applied().seq).unwrap();
        prop_assert_eq!(last.name.epoch, 1);
    }
}

#[test]
fn only_the_next_chunk_of_this_volume_applies() {
    let table = Table::in_memory(MemKv::new(), VOLUME).unwrap();
    let data = [(3, 1, ExtentKind::Data { index: 0 })];
    assert!(matches!(table.apply(&chunk(2, &data)), Err(TableError::OutOfOrder { .. })));
    table.apply(&chunk(1, &data)).unwrap();
    assert_eq!(table.applied(), Applied { seq: 1, lsn: 19 });
    for bad in [
        chunk(1, &data),
        ChunkIndex { kind: ChunkKind::Seal, ..chunk(2, &[]) },
        ChunkIndex { first_lsn: 18, ..chunk(2, &data) },
        ChunkIndex { name: ChunkName { volume: VolumeId([6; 16]), epoch: 1, seq: 2 }, ..chunk(2, &data) },
    ] {
        assert!(matches!(table.apply(&bad), Err(TableError::OutOfOrder { .. })));
    }
    table.apply(&chunk(2, &data)).unwrap();
}

#[test]
fn foreign_and_newer_tables_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    drop(Table::open(dir.path(), 4 << 20, VOLUME).unwrap());
    let error = Table::open(dir.path(), 4 << 20, VolumeId([6; 16])).unwrap_err();
    assert!(matches!(error, TableError::Foreign { found, .. } if found == VOLUME));

    let kv = MemKv::new();
    use super::kv::{Batch, Kv};
    let mut batch = Batch::default();
    batch.put(b"X", vec![1]);
    kv.write(batch).unwrap();
    assert!(matches!(Table::in_memory(kv.clone(), VOLUME), Err(TableError::NotATable)));
    let mut batch = Batch::default();
    let mut format = key::encode_format(VOLUME, key::VERSION);
    format[8] = 4;
    batch.put(&key::FORMAT, format);
    kv.write(batch).unwrap();
    assert!(matches!(Table::in_memory(kv.clone(), VOLUME), Err(TableError::Newer { found: 4 })));
}

#[test]
fn two_owners_of_one_directory_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let _first = Table::open(dir.path(), 4 << 20, VOLUME).unwrap();
    assert!(matches!(Table::open(dir.path(), 4 << 20, VOLUME), Err(TableError::Open { .. })));
}

#[test]
fn the_stored_bytes_are_as_documented() {
    assert_eq!(key::leaf(0x0102), *b"L\0\0\0\0\0\0\x01\x02");
    assert_eq!(key::chunk(7), *b"C\0\0\0\0\0\0\0\x07");
    assert_eq!(key::zeroes(7), *b"Z\0\0\0\0\0\0\0\x07");
    let applied = Applied { seq: 3, lsn: 0x0405 };
    assert_eq!(key::encode_applied(applied), *b"\x03\0\0\0\0\0\0\0\x05\x04\0\0\0\0\0\0");
    assert_eq!(
        key::encode_format(VOLUME, key::VERSION),
        *b"BLKDTABL\x02\0\0\0\0\0\0\0\x05\x05\x05\x05\x05\x05\x05\x05\x05\x05\x05\x05\x05\x05\x05\x05"
    );
    let mut frames = FrameDirectory::new(0x0203);
    frames.push(0x1234, 16, FrameEncoding::Lz4, 0x99);
    let name = ChunkName { volume: VOLUME, epoch: 2, seq: 7 };
    assert_eq!(
        key::encode_chunk(&name, &frames),
        *b"\x05\x05\x05\x05\x05\x05\x05\x05\x05\x05\x05\x05\x05\x05\x05\x05\x02\0\0\0\0\0\0\0\x03\x02\0\0\0\0\0\0\
        \x34\x12\0\0\x10\x01\0\0\x99\0\0\0\0\0\0\0"
    );
    assert_eq!(key::decode_chunk(7, &key::encode_chunk(&name, &frames)).unwrap(), (name, frames));
    assert_eq!(key::usage(7), *b"U\0\0\0\0\0\0\0\x07");
    let usage = Usage { live: 1, total: 2, stored: 3, birth: 4, tombs: 5, referred: false };
    assert_eq!(
        key::encode_usage(&usage),
        *b"\x01\0\0\0\x02\0\0\0\x03\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\x05\0\0\0\0\0\0\0"
    );
    assert_eq!(key::decode_usage(&key::encode_usage(&usage)), Some(usage));
    assert_eq!(key::dead(7), *b"D\0\0\0\0\0\0\0\x07");
    let dead = Dead { birth: 1, death: 2, relocated: 4, stored: 3 };
    assert_eq!(key::encode_dead(&dead), *b"\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0\x04\0\0\0\0\0\0\0\x03\0\0\0\0\0\0\0");
    assert_eq!(key::decode_dead(&key::encode_dead(&dead)), Some(dead));
    assert_eq!(key::decode_pair(&key::encode_pair(3, 4)), Some((3, 4)));
}

#[test]
fn a_tebibyte_is_trimmed_in_constant_time() {
    let dir = tempfile::tempdir().unwrap();
    let table = Table::open(dir.path(), 16 << 20, VOLUME).unwrap();
    let tebibyte = (1u64 << 40) / 4096;
    let data: Vec<_> = (0..1000).map(|i| (i * (tebibyte / 1000) + 5, 1, ExtentKind::Data { index: 0 })).collect();
    table.apply(&chunk(1, &data)).unwrap();
    let started = std::time::Instant::now();
    for (seq, kind) in [(2, ExtentKind::Zero), (3, ExtentKind::Hole), (4, ExtentKind::Zero)] {
        table.apply(&chunk(seq, &[(1, tebibyte - 1, kind)])).unwrap();
        let expected = match kind {
            ExtentKind::Zero => vec![(1, Allocation::Hole), (tebibyte - 1, Allocation::Zero)],
            _ => vec![(tebibyte, Allocation::Hole)],
        };
        assert_eq!(table.allocations(0, tebibyte, 10).unwrap(), expected);
        assert!(table.lookup(tebibyte / 2, 100).unwrap().iter().all(|m| !matches!(m.target, Target::Chunk { .. })));
    }
    // Generous: each takes well under a millisecond; leaf by leaf it would be minutes.
    assert!(started.elapsed() < std::time::Duration::from_secs(2));
}

#[test]
fn a_simulated_table_is_sound() {
    let kv = MemKv::new();
    let table = Table::in_memory(kv, VOLUME).unwrap();
    let applied = simulate(&table, 100_000, 20_000, 1).unwrap();
    assert_eq!(table.applied(), applied);
    let mut mapped = 0;
    for found in table.lookup(0, 100_000).unwrap() {
        if let Target::Chunk { seq, index } = found.target {
            let directory = table.directory(seq).unwrap();
            assert!(directory.frames.locate(index).is_some());
            mapped += found.blocks;
        }
    }
    assert!((19_000..21_000).contains(&mapped), "{mapped}");
    let runs: u64 = table
        .allocations(0, 100_000, usize::MAX)
        .unwrap()
        .iter()
        .filter(|(_, kind)| *kind == Allocation::Data)
        .map(|(blocks, _)| blocks)
        .sum();
    assert_eq!(runs, mapped);
    let _shared: Arc<Table> = Arc::new(table);
}
