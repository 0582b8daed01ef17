//! Copies of tables on their way to a bucket and back.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use proptest::prelude::*;

use super::format::Content;
use super::make::Ask;
use super::*;
use crate::chunk::testing::golden;
use crate::chunk::{ChunkExtent, ChunkIndex, ChunkKind, ChunkName, Codec, ExtentKind, FrameDirectory, FrameEncoding};
use crate::manifest::{self, EpochStart, Manifest};
use crate::store::{MemoryStore, ObjectStore};
use crate::table::{Applied, MemKv, Table, TableHome, Target};
use crate::types::VolumeId;
use crate::volume::Blocking;

const VOLUME: VolumeId = VolumeId([5; 16]);
const NAME: &str = "disk";

fn name(number: u64) -> CheckpointName {
    CheckpointName { volume: VOLUME, epoch: 3, number }
}

fn checkpoint() -> Checkpoint {
    let object = |n, size| TableFile {
        name: format!("{n:06}.sst"),
        size,
        sum: n * 77,
        content: Content::Object { name: name(n), stored: size + 16 },
    };
    Checkpoint {
        name: name(9),
        seq: 256,
        lsn: 10_000,
        relocated: 4,
        made_ms: 1_700_000_000_000,
        files: vec![
            object(12, 1 << 25),
            object(15, 4096),
            TableFile {
                name: "CURRENT".into(),
                size: 16,
                sum: 1,
                content: Content::Inline(b"MANIFEST-000004\n".to_vec()),
            },
        ],
    }
}

#[test]
fn the_golden_checkpoint_reads_and_is_written_the_same() {
    golden("checkpoint-v1.bin", &checkpoint().encode(), true, |bytes| {
        assert_eq!(Checkpoint::decode(bytes, &name(9)), Ok(checkpoint()));
    });
}

#[test]
fn every_flipped_bit_and_every_cut_of_a_checkpoint_is_noticed() {
    let bytes = checkpoint().encode();
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(Checkpoint::decode(&bad, &name(9)).is_err(), "bit {bit}");
    }
    for len in 0..bytes.len() {
        assert!(Checkpoint::decode(&bytes[..len], &name(9)).is_err(), "{len} bytes");
    }
    assert!(Checkpoint::decode(&bytes, &name(8)).is_err(), "another checkpoint's place");
}

#[test]
fn names_that_leave_the_directory_are_refused() {
    for bad in ["../x", "/x", ".hidden", "", "a/b", "x.part", "a\0"] {
        let mut checkpoint = checkpoint();
        checkpoint.files[0].name = bad.into();
        assert!(Checkpoint::decode(&checkpoint.encode(), &name(9)).is_err(), "{bad:?}");
    }
    let mut twice = checkpoint();
    twice.files[1].name = twice.files[0].name.clone();
    assert!(Checkpoint::decode(&twice.encode(), &name(9)).is_err());
}

proptest! {
    #[test]
    fn decoding_is_total(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let _ = Checkpoint::decode(&bytes, &name(9));
        let mut with_start = checkpoint().encode()[..24].to_vec();
        with_start.extend_from_slice(&bytes);
        let _ = Checkpoint::decode(&with_start, &name(9));
    }
}

/// A chunk of single blocks at these addresses.
fn chunk(seq: u64, lbas: impl IntoIterator<Item = u64>) -> ChunkIndex {
    let mut frames = FrameDirectory::new(1000);
    let lbas: BTreeSet<u64> = lbas.into_iter().collect();
    let extents = lbas.into_iter().zip(0..).map(|(lba, index)| {
        frames.push(4096, 1, FrameEncoding::Raw, seq);
        ChunkExtent { lba, blocks: 1, kind: ExtentKind::Data { index } }
    });
    let extents = extents.collect();
    ChunkIndex {
        name: ChunkName { volume: VOLUME, epoch: 1, seq },
        kind: ChunkKind::Data,
        first_lsn: seq * 10,
        last_lsn: seq * 10 + 9,
        created_ms: 0,
        extents,
        frames,
    }
}

fn content(table: &Table) -> Vec<(u64, u64, Target)> {
    let mut runs = Vec::new();
    table
        .each_run(|run| {
            runs.push((run.lba, run.blocks, run.target));
            true
        })
        .unwrap();
    runs
}

async fn volume(store: &dyn ObjectStore) {
    let manifest = Manifest {
        codec: Codec::None,
        chunk_bytes: 1 << 20,
        epochs: vec![EpochStart { epoch: 1, first_seq: 1, first_lsn: 1, owner: [1; 16], opened_ms: 0 }],
        ..Manifest::new(VOLUME, NAME, 1 << 30)
    };
    manifest::create(store, &manifest).await.unwrap();
}

fn dir(path: &Path) -> TableHome {
    TableHome::Dir { dir: path.to_owned(), memory_bytes: 16 << 20 }
}

fn keeper(current: Option<CheckpointPointer>) -> Keeper {
    Keeper::new(NAME, VOLUME, 1, current, None, None)
}

async fn make(
    keeper: &mut Keeper,
    store: &dyn ObjectStore,
    table: &Arc<Table>,
) -> (CheckpointPointer, u64, Vec<String>) {
    let ask = Ask { store, table, blocking: Blocking::Inline, budget_bytes: None, now_ms: 7, stop: &|| false };
    match keeper.make(ask).await.unwrap() {
        Made::Durable { pointer, sent_bytes, garbage, .. } => (pointer, sent_bytes, garbage),
        other => panic!("{other:?}"),
    }
}

async fn current(store: &dyn ObjectStore) -> Option<CheckpointPointer> {
    manifest::load(store, NAME).await.unwrap().0.checkpoint
}

#[tokio::test]
async fn a_table_comes_back_as_it_was_and_unchanged_files_are_sent_once() {
    let store = MemoryStore::new();
    volume(&store).await;
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let table = Arc::new(dir(here.path()).open(VOLUME).unwrap());
    // Spread over so many leaves that the first file is worth something.
    table.apply(&chunk(1, (0..60_000).map(|n| n * 67))).unwrap();
    let mut keeper = keeper(None);
    let (first, sent_first, garbage) = make(&mut keeper, &store, &table).await;
    assert_eq!((first.seq, first.lsn, garbage.len()), (1, 19, 0));
    assert_eq!(current(&store).await, Some(first));
    table.apply(&chunk(2, [1, 2, 3])).unwrap();
    let (second, sent_second, garbage) = make(&mut keeper, &store, &table).await;
    assert!(sent_second < sent_first / 10, "{sent_second} bytes after {sent_first}");
    assert!(second.bytes > sent_first / 2, "files of the first count as well");
    // Only the object of the first one is superfluous.
    assert_eq!(garbage, [first.object.key()]);

    let restored = restore::restore(&store, &dir(there.path()), VOLUME, &second, Blocking::Inline, None).await.unwrap();
    assert_eq!(restored.table.applied(), Applied { seq: 2, lsn: 29 });
    assert_eq!(content(&restored.table), content(&table));
    drop(restored);
    // What is there already is not fetched again.
    let again = restore::restore(&store, &dir(there.path()), VOLUME, &second, Blocking::Inline, None).await.unwrap();
    assert_eq!((again.fetched_bytes, content(&again.table)), (0, content(&table)));

    assert_eq!(collect::collect(&store, NAME, 1, None, &garbage).await.unwrap(), 1);
    restore::verify(&store, &second, None, |_| {}).await.unwrap();
    // Even who asks for it does not get what is in use deleted.
    let all: Vec<String> = store.keys().into_iter().filter(|key| key.starts_with("checkpoints/")).collect();
    assert_eq!(collect::collect(&store, NAME, 1, None, &all).await.unwrap(), 0);
    assert!(collect::collect(&store, NAME, 2, None, &all).await.is_err(), "only its owner collects");
}

#[tokio::test]
async fn files_of_one_name_from_two_hosts_are_told_apart() {
    let store = MemoryStore::new();
    volume(&store).await;
    let dirs = [(); 3].map(|()| tempfile::tempdir().unwrap());
    let a = Arc::new(dir(dirs[0].path()).open(VOLUME).unwrap());
    a.apply(&chunk(1, 0..500)).unwrap();
    let (pointer, ..) = make(&mut keeper(None), &store, &a).await;
    // Two hosts go on from one table, and RocksDB gives their next files one number.
    let b = restore::restore(&store, &dir(dirs[1].path()), VOLUME, &pointer, Blocking::Inline, None).await.unwrap();
    let b = Arc::new(b.table);
    a.apply(&chunk(2, 1000..1500)).unwrap();
    a.persist().unwrap();
    b.apply(&chunk(2, 3000..3500)).unwrap();
    let mut theirs = Keeper::new(NAME, VOLUME, 1, Some(pointer), None, None);
    theirs.make_room(100);
    let (pointer, ..) = make(&mut theirs, &store, &b).await;
    // The first comes back with its own table.
    let mut mine = Keeper::new(NAME, VOLUME, 1, Some(pointer), None, None);
    mine.make_room(200);
    let (pointer, ..) = make(&mut mine, &store, &a).await;
    let back = restore::restore(&store, &dir(dirs[2].path()), VOLUME, &pointer, Blocking::Inline, None).await.unwrap();
    assert_eq!(content(&back.table), content(&a));
}

#[tokio::test]
async fn damage_is_found_and_the_table_that_is_there_stays() {
    let store = MemoryStore::new();
    volume(&store).await;
    let (here, there) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let table = Arc::new(dir(here.path()).open(VOLUME).unwrap());
    table.apply(&chunk(1, 0..5000)).unwrap();
    let (pointer, ..) = make(&mut keeper(None), &store, &table).await;
    let old = dir(there.path()).open(VOLUME).unwrap();
    old.apply(&chunk(1, 0..5000)).unwrap();
    old.persist().unwrap();
    let before = content(&old);
    drop(old);
    for key in restore::fetch_checkpoint(&store, &pointer, None).await.unwrap().keys() {
        let (object, _) = store.get(&key).await.unwrap();
        let mut bad = object.to_vec();
        let middle = bad.len() / 2;
        bad[middle] ^= 1;
        for spoilt in [Bytes::from(bad), object.slice(..object.len() - 1)] {
            store.tamper(&key, spoilt);
            let error = restore::restore(&store, &dir(there.path()), VOLUME, &pointer, Blocking::Inline, None)
                .await
                .unwrap_err();
            assert!(error.is_damage() && error.to_string().contains(&key), "{error}");
            assert!(restore::verify(&store, &pointer, None, |_| {}).await.unwrap_err().is_damage());
        }
        store.tamper(&key, object);
        assert_eq!(content(&dir(there.path()).open(VOLUME).unwrap()), before);
    }
    // A pointer that says another position than its object.
    let wrong = CheckpointPointer { lsn: 20, ..pointer };
    let error = restore::restore(&store, &dir(there.path()), VOLUME, &wrong, Blocking::Inline, None).await.unwrap_err();
    assert!(error.is_damage(), "{error}");
    restore::restore(&store, &dir(there.path()), VOLUME, &pointer, Blocking::Inline, None).await.unwrap();
}

#[tokio::test]
async fn who_lost_the_volume_points_to_nothing_any_more() {
    let store = MemoryStore::new();
    volume(&store).await;
    let table = Arc::new(TableHome::Memory(MemKv::new()).open(VOLUME).unwrap());
    table.apply(&chunk(1, 0..50)).unwrap();
    let mut old = keeper(None);
    let (pointer, ..) = make(&mut old, &store, &table).await;
    manifest::change(&store, NAME, None, |manifest| {
        manifest.epochs.push(EpochStart { epoch: 2, first_seq: 2, first_lsn: 20, owner: [2; 16], opened_ms: 0 });
        manifest.epochs.dedup();
        Ok(())
    })
    .await
    .unwrap();
    table.apply(&chunk(2, 50..60)).unwrap();
    let ask = Ask {
        store: &store,
        table: &table,
        blocking: Blocking::Inline,
        budget_bytes: None,
        now_ms: 8,
        stop: &|| false,
    };
    let refused = old.make(ask).await.unwrap_err();
    assert!(matches!(refused, CheckpointError::Manifest(manifest::ManifestError::NotOwner(_))), "{refused}");
    assert_eq!(current(&store).await, Some(pointer));
    // Its successor finds what it left.
    let left = collect::left_behind(&store, VOLUME, 2).await.unwrap();
    let deleted = collect::collect(&store, NAME, 2, None, &left).await.unwrap();
    assert!(deleted > 0 && deleted < left.len());
    restore::verify(&store, &pointer, None, |_| {}).await.unwrap();
}

#[tokio::test]
async fn one_that_costs_too_much_is_not_made() {
    let store = MemoryStore::new();
    volume(&store).await;
    let here = tempfile::tempdir().unwrap();
    let table = Arc::new(dir(here.path()).open(VOLUME).unwrap());
    table.apply(&chunk(1, (0..60_000).map(|n| n * 67))).unwrap();
    let mut keeper = keeper(None);
    let requests = store.keys().len();
    let ask = |budget| Ask {
        store: &store,
        table: &table,
        blocking: Blocking::Inline,
        budget_bytes: Some(budget),
        now_ms: 8,
        stop: &|| false,
    };
    let made = keeper.make(ask(1000)).await.unwrap();
    assert!(matches!(made, Made::TooDear { bytes } if bytes > 1000), "{made:?}");
    assert_eq!(store.keys().len(), requests);
    assert!(matches!(keeper.make(ask(1 << 30)).await.unwrap(), Made::Durable { .. }));
}
