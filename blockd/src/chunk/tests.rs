//! Chunks from draft to read, against a model and against damage.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::testing::{TestStore, golden};
use super::*;
use crate::buf::{AlignedBuf, Slice};
use crate::cache::FrameCache;
use crate::crypt::Keys;
use crate::store::{ObjectStore, PutMode};
use crate::table::{MemKv, Table};
use crate::types::{BLOCK, VolumeId};

const VOLUME: VolumeId = VolumeId([3; 16]);
const CODECS: [Codec; 4] = [Codec::None, Codec::Lz4, Codec::Zstd(1), Codec::Zstd(-3)];

pub(super) fn name(seq: u64) -> ChunkName {
    ChunkName { volume: VOLUME, epoch: 1, seq }
}

/// Blocks of which some compress and some do not.
pub(super) fn blocks(count: usize, seed: u64) -> Slice {
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut data = AlignedBuf::zeroed(count * BLOCK);
    for block in data.chunks_mut(BLOCK) {
        let random = [0, 64, BLOCK][rng.random_range(0..3)];
        rng.fill(&mut block[..random]);
        block[random..].fill(rng.random());
    }
    data.into()
}

pub(super) fn draft(seq: u64, codec: Codec, pieces: Vec<Piece>) -> ChunkDraft {
    ChunkDraft { name: name(seq), first_lsn: seq, last_lsn: seq, codec, created_ms: 1_700_000_000_000, pieces }
}

/// A draft with pieces of every kind, from (gap, blocks, kind, seed).
pub(super) fn pieces(plan: &[(u64, u64, u8, u64)]) -> Vec<Piece> {
    let mut lba = 0;
    plan.iter()
        .map(|&(gap, count, kind, seed)| {
            lba += gap;
            let piece = match kind {
                0 => Piece::Zero { lba, blocks: count, allocated: true },
                1 => Piece::Zero { lba, blocks: count, allocated: false },
                _ => Piece::Data { lba, data: blocks(count as usize, seed) },
            };
            lba += count;
            piece
        })
        .collect()
}

/// A volume in a test store, beside a plain copy of its bytes.
pub(super) struct World {
    pub(super) store: Arc<TestStore>,
    pub(super) table: Arc<Table>,
    pub(super) reader: BlockReader,
    keys: Option<Keys>,
    model: Vec<u8>,
}

impl World {
    fn new(blocks: usize, cache: Option<FrameCache>) -> Self {
        Self::with_keys(blocks, cache, None)
    }

    pub(super) fn with_keys(blocks: usize, cache: Option<FrameCache>, keys: Option<Keys>) -> Self {
        let store = Arc::new(TestStore::default());
        let table = Arc::new(Table::in_memory(MemKv::new(), VOLUME).unwrap());
        let reader =
            BlockReader::new(VOLUME, table.clone(), store.clone(), cache).with_deadline(Duration::from_secs(1));
        let reader = reader.with_keys(keys.clone());
        World { store, table, reader, keys, model: vec![0; blocks * BLOCK] }
    }

    /// Puts a chunk as the engine does: object first, then the header read back, then the table.
    pub(super) async fn put(&mut self, codec: Codec, pieces: Vec<Piece>) -> Chunk {
        for piece in &pieces {
            match piece {
                Piece::Data { lba, data } => {
                    self.model[*lba as usize * BLOCK..][..data.len()].copy_from_slice(data);
                }
                Piece::Zero { lba, blocks, .. } => {
                    self.model[*lba as usize * BLOCK..][..*blocks as usize * BLOCK].fill(0);
                }
                Piece::Refer { .. } => unreachable!("the model knows no chunks"),
            }
        }
        let seq = self.table.applied().seq + 1;
        let chunk = draft(seq, codec, pieces).encode(self.keys.as_ref()).unwrap();
        self.store.put(&name(seq).key(), chunk.bytes.clone(), PutMode::Create).await.unwrap();
        let index = read_index(&*self.store, &name(seq), self.keys.as_ref()).await.unwrap();
        assert_eq!(index, chunk.index);
        self.table.apply(&index).unwrap();
        chunk
    }

    pub(super) async fn check(&self, lba: usize, count: usize) {
        let mut out = vec![0xee; count * BLOCK];
        let zeroes = self.reader.read(lba as u64, &mut out).await.unwrap();
        let expected = &self.model[lba * BLOCK..][..count * BLOCK];
        assert!(out == expected, "blocks {lba}+{count} differ");
        let mut end = 0;
        for (first, blocks) in zeroes {
            assert!(first >= end && blocks > 0);
            end = first + blocks;
            assert!(end <= count as u64);
            assert!(expected[first as usize * BLOCK..end as usize * BLOCK].iter().all(|b| *b == 0));
        }
    }
}

pub(super) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn volumes_read_back(
        chunks in prop::collection::vec(
            (0..4usize, prop::collection::vec((0u64..40, 1u64..40, 0u8..6, any::<u64>()), 1..8)), 1..6),
        reads in prop::collection::vec((0usize..640, 1usize..128), 10),
        cached: bool,
        encrypted: bool,
    ) {
        runtime().block_on(async {
            let cache = match cached {
                true => Some(FrameCache::open(None, 1 << 20, 0).await.unwrap()),
                false => None,
            };
            let keys = encrypted.then(|| Keys::new(&[9; 32]));
            let mut world = World::with_keys(640, cache, keys);
            for (codec, plan) in &chunks {
                world.put(CODECS[*codec], pieces(plan)).await;
            }
            for (lba, count) in reads {
                world.check(lba, count.min(640 - lba)).await;
            }
            world.check(0, 640).await;
        });
    }

    #[test]
    fn decoding_headers_is_total(bytes in prop::collection::vec(any::<u8>(), 0..600)) {
        let seal = encode_seal(name(1), 0, None);
        for prefix in [0, 10, 12, 24, 88] {
            let mut input = seal[..prefix].to_vec();
            input.extend_from_slice(&bytes);
            prop_assert!(ChunkIndex::decode(&input, &name(1)).is_err());
        }
    }

    /// What the checksum lets through must still be checked: foreign writers may be wrong.
    #[test]
    fn contradictions_are_refused_or_sound(at in 0usize..500, value: u8) {
        let plan = [(1, 20, 2, 1), (3, 2, 0, 2), (0, 1, 1, 3), (9, 3, 2, 4)];
        let chunk = draft(1, Codec::Lz4, pieces(&plan)).encode(None).unwrap();
        let mut bytes = chunk.bytes.to_vec();
        let len = chunk.index.frames.payload_start() as usize;
        let at = at % len;
        bytes[at] = value;
        bytes[16..24].fill(0);
        if let Ok(len) = ChunkIndex::peek_len(&bytes) && len <= bytes.len() {
            let mut hash = xxhash_rust::xxh3::Xxh3::with_seed(u64::from_le_bytes(*b"chunkhdr"));
            hash.update(&bytes[..len]);
            let sum = hash.digest();
            bytes[16..24].copy_from_slice(&sum.to_le_bytes());
        }
        if let Ok(index) = ChunkIndex::decode(&bytes, &name(1)) {
            prop_assert_eq!(&index.encode()[..], &bytes[..len]);
            let table = Table::in_memory(MemKv::new(), VOLUME).unwrap();
            if table.apply(&index).is_ok() {
                for extent in &index.extents {
                    table.lookup(extent.lba, extent.blocks.min(100)).unwrap();
                }
            }
        }
    }
}

pub(super) const GOLDEN_PLAN: [(u64, u64, u8, u64); 6] =
    [(5, 18, 2, 1), (0, 3, 2, 2), (100, 1, 2, 3), (0, 1 << 28, 0, 0), (7, 1 << 40, 1, 0), (1, 2, 2, 4)];

#[test]
fn golden_chunks_read_and_uncompressed_ones_are_written_the_same() {
    for (file, codec, exact) in [
        ("chunk-v1-none.bin", Codec::None, true),
        // What a compressor makes of its input may change with its version; what it made must stay readable.
        ("chunk-v1-lz4.bin", Codec::Lz4, false),
        ("chunk-v1-zstd.bin", Codec::Zstd(3), false),
    ] {
        let pieces = pieces(&GOLDEN_PLAN);
        let chunk = draft(1, codec, pieces.clone()).encode(None).unwrap();
        golden(file, &chunk.bytes, exact, |kept| {
            let index = ChunkIndex::decode(kept, &name(1)).unwrap();
            assert_eq!(index.object_len(), kept.len() as u64);
            runtime().block_on(async {
                let world = World::new(0, None);
                world.store.tamper(&name(1).key(), Some(Bytes::copy_from_slice(kept)));
                world.table.apply(&index).unwrap();
                for piece in &pieces {
                    let (lba, data) = match piece {
                        Piece::Data { lba, data } => (*lba, data.to_vec()),
                        Piece::Zero { lba, blocks, .. } => (*lba + blocks - 1, vec![0; BLOCK]),
                        Piece::Refer { .. } => continue,
                    };
                    let mut out = vec![1; data.len()];
                    world.reader.read(lba, &mut out).await.unwrap();
                    assert!(out == data, "{file}: block {lba}");
                }
            });
        });
    }
    let relocated = ChunkName { seq: RELOCATED | 1 << 32 | 1, ..name(1) };
    let draft =
        ChunkDraft { name: relocated, first_lsn: 9, last_lsn: 40, ..draft(1, Codec::None, pieces(&GOLDEN_PLAN)) };
    golden("relocated-v1.bin", &draft.encode(None).unwrap().bytes, true, |kept| {
        let index = ChunkIndex::decode(kept, &relocated).unwrap();
        assert_eq!((index.kind, index.basis(), index.last_lsn), (ChunkKind::Relocated, 9, 40));
        assert_eq!(index.extents.len(), GOLDEN_PLAN.len() - 1);
    });
    let refer = |lba, blocks, seq, index| Piece::Refer { lba, blocks, seq, index };
    let mut referring = vec![
        refer(5, 65_000, 0x0102_0304_0506, 535),
        refer(65_005, 1, 0x0102_0304_0506, 0),
        refer(65_006, 2, 0x0102_0304_0506, 1),
        Piece::Data { lba: 70_000, data: blocks(3, 1) },
        Piece::Zero { lba: 70_003, blocks: 9, allocated: false },
        refer(80_000, 1, RELOCATED | 1 << 32 | 4, 7),
    ];
    let draft = |pieces| ChunkDraft { name: name(1), first_lsn: 1, last_lsn: 1, pieces, ..draft.clone() };
    golden("chunk-v2-references.bin", &draft(referring.clone()).encode(None).unwrap().bytes, true, |kept| {
        let index = ChunkIndex::decode(kept, &name(1)).unwrap();
        let found: Vec<_> = index.references().map(|(e, seq, index)| (e.lba, e.blocks, seq, index)).collect();
        let seq = 0x0102_0304_0506;
        assert_eq!(found, [(5, 65_000, seq, 535), (65_005, 3, seq, 0), (80_000, 1, RELOCATED | 1 << 32 | 4, 7)]);
        assert_eq!((kept[8], index.extents.len(), index.frames.raw_blocks()), (2, 5, 3));
    });
    referring.remove(3);
    let none = draft(referring).encode(None).unwrap();
    assert_eq!(ChunkIndex::decode(&none.bytes, &name(1)).unwrap(), none.index);
    for bad in [refer(0, 1, 0, 0), refer(0, 1, 1, 0), refer(0, 1, u64::MAX, 0), refer(0, 65_535, 9, 1)] {
        assert!(matches!(draft(vec![bad]).encode(None), Err(ChunkError::BadPiece(..))));
    }
    golden("seal-v1.bin", &encode_seal(name(9), 5, None), true, |kept| {
        let seal = ChunkIndex::decode(kept, &name(9)).unwrap();
        assert_eq!(seal.kind, ChunkKind::Seal);
        assert_eq!(seal.created_ms, 5);
    });
}

#[tokio::test]
async fn every_flipped_bit_and_every_cut_is_noticed() {
    for codec in CODECS {
        let mut world = World::new(40, None);
        let mut small = blocks(20, 8).to_vec();
        // Small frames: the test flips every bit of them.
        for block in small.chunks_mut(BLOCK) {
            block[20..].fill(7);
        }
        let data: Slice = AlignedBuf::copy_of(&small[..if codec == Codec::None { BLOCK } else { 20 * BLOCK }]).into();
        let count = data.len() / BLOCK;
        let chunk = world.put(codec, vec![Piece::Data { lba: 2, data }]).await;
        let key = name(1).key();
        let mut out = vec![0; count * BLOCK];
        // All bits of the header; of a raw payload every 13th.
        let header = chunk.index.frames.payload_start() as usize * 8;
        let step = if codec == Codec::None { 13 } else { 1 };
        for bit in (0..header).chain((header..chunk.bytes.len() * 8).step_by(step)) {
            let mut bad = chunk.bytes.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            world.store.tamper(&key, Some(bad.into()));
            if bit < header {
                let error = read_index(&*world.store, &name(1), None).await.unwrap_err();
                assert!(matches!(error, ReadError::Header { .. }), "bit {bit}: {error}");
            } else {
                let error = world.reader.read(2, &mut out).await.unwrap_err();
                assert!(
                    matches!(error, ReadError::Corrupt { lba, .. } if (2..22).contains(&lba)),
                    "bit {bit}: {error}"
                );
            }
        }
        for len in (0..chunk.bytes.len()).step_by(step) {
            world.store.tamper(&key, Some(chunk.bytes.slice(..len)));
            let index = read_index(&*world.store, &name(1), None).await;
            assert_eq!(index.is_ok(), len * 8 >= header, "{len} bytes");
            let error = world.reader.read(2, &mut out).await.unwrap_err();
            assert!(matches!(error, ReadError::Truncated { .. }), "{len} bytes: {error}");
        }
        world.store.tamper(&key, None);
        for error in [
            world.reader.read(2, &mut out).await.unwrap_err(),
            read_index(&*world.store, &name(1), None).await.unwrap_err(),
        ] {
            assert!(matches!(error, ReadError::Missing { name: n } if n == name(1)));
            assert!(error.to_string().contains(&key), "{error}");
        }
    }
}

#[tokio::test]
async fn swapped_chunks_and_frames_are_noticed() {
    let mut world = World::new(100, None);
    let data = |seed| vec![Piece::Data { lba: 0, data: blocks(32, seed) }];
    let first = world.put(Codec::None, data(1)).await;
    let second = world.put(Codec::None, data(2)).await;
    // A whole chunk under another's name: its header says so, and its frames do not pass either.
    world.store.tamper(&name(2).key(), Some(first.bytes.clone()));
    assert!(matches!(
        read_index(&*world.store, &name(2), None).await,
        Err(ReadError::Header { source: FormatError::Identity { found }, .. }) if found == name(1)
    ));
    let mut out = vec![0; BLOCK];
    assert!(matches!(world.reader.read(0, &mut out).await, Err(ReadError::Corrupt { frame: 0, lba: 0, .. })));
    // Two frames of one chunk in each other's place.
    let (a, b) = (second.index.frames.frames()[0].range(), second.index.frames.frames()[1].range());
    let mut bytes = second.bytes[..a.start as usize].to_vec();
    bytes.extend_from_slice(&second.bytes[b.start as usize..b.end as usize]);
    bytes.extend_from_slice(&second.bytes[a.start as usize..a.end as usize]);
    world.store.tamper(&name(2).key(), Some(bytes.into()));
    assert!(matches!(world.reader.read(17, &mut out).await, Err(ReadError::Corrupt { frame: 1, lba: 17, .. })));
}

#[tokio::test]
async fn trouble_of_the_store_is_waited_out_until_the_deadline() {
    let mut world = World::new(100, None);
    world.put(Codec::Lz4, vec![Piece::Data { lba: 0, data: blocks(50, 1) }]).await;
    world.store.outages.store(3, Relaxed);
    world.check(0, 100).await;
    world.store.flips.store(1, Relaxed);
    world.check(0, 1).await;
    world.store.flips.store(2, Relaxed);
    let mut out = vec![0; BLOCK];
    assert!(matches!(world.reader.read(0, &mut out).await, Err(ReadError::Corrupt { .. })));
    world.check(0, 100).await;
    world.store.outages.store(1_000_000, Relaxed);
    let started = std::time::Instant::now();
    assert!(matches!(world.reader.read(0, &mut out).await, Err(ReadError::Store(_))));
    assert!((1..10).contains(&started.elapsed().as_secs()));
}

#[tokio::test]
async fn a_rotten_cache_costs_a_request_and_nothing_else() {
    let cache = FrameCache::open(None, 1 << 20, 0).await.unwrap();
    let mut world = World::new(100, Some(cache.clone()));
    let chunk = world.put(Codec::Lz4, vec![Piece::Data { lba: 0, data: blocks(50, 1) }]).await;
    world.check(0, 50).await;
    let before = world.store.reads.load(Relaxed);
    world.check(0, 50).await;
    assert_eq!(world.store.reads.load(Relaxed), before, "all of it is cached");
    for frame in 0..chunk.index.frames.frames().len() as u32 {
        let key = crate::cache::FrameKey { chunk: name(1), frame };
        let mut rotten = cache.get(&key).await.unwrap().to_vec();
        if frame % 2 == 0 {
            rotten[3] ^= 0x10;
        } else {
            rotten.pop();
        }
        cache.insert(key, rotten.into());
    }
    world.check(0, 50).await;
    assert_eq!(world.store.reads.load(Relaxed), before + 1);
    assert_eq!(cache.stats().rotten, chunk.index.frames.frames().len() as u64);
    world.check(0, 50).await;
    assert_eq!(world.store.reads.load(Relaxed), before + 1);
}

#[tokio::test]
async fn neighbours_share_a_request_and_so_do_readers() {
    let mut world = World::new(4000, None);
    world.put(Codec::None, vec![Piece::Data { lba: 0, data: blocks(2560, 1) }]).await;
    let before = world.store.reads.load(Relaxed);
    world.check(0, 1024).await;
    assert_eq!(world.store.reads.load(Relaxed), before + 1, "4 MiB are one request");
    world.check(0, 2560).await;
    assert_eq!(world.store.reads.load(Relaxed), before + 4, "10 MiB are three");
    let before = world.store.reads.load(Relaxed);
    let reads = (0..16).map(|block| world.check(block, 1));
    futures::future::join_all(reads).await;
    assert_eq!(world.store.reads.load(Relaxed), before + 1, "one frame is fetched once");
    // Two reads that each wait for frames the other fetches.
    futures::future::join_all([world.check(0, 2000), world.check(500, 2000), world.check(100, 900)]).await;
    // The fetching reader goes away: the others fetch for themselves.
    let mut out = vec![0; BLOCK];
    let mut doomed = Box::pin(world.reader.read(0, &mut out));
    assert!(futures::poll!(&mut doomed).is_pending());
    let survivor = world.check(1, 1);
    tokio::pin!(survivor);
    assert!(futures::poll!(&mut survivor).is_pending());
    drop(doomed);
    survivor.await;
}

#[tokio::test]
async fn long_headers_take_a_second_request() {
    let mut world = World::new(20_000, None);
    let scattered = (0..5000).map(|i| Piece::Data { lba: i * 3, data: blocks(1, i) }).collect();
    let chunk = world.put(Codec::Lz4, scattered).await;
    assert!(chunk.index.frames.payload_start() > 64 << 10);
    assert_eq!(chunk.index.frames.frames().len(), 5000 / 8);
    world.check(0, 15_000).await;
    let cut = chunk.bytes.slice(..70 << 10);
    world.store.tamper(&name(1).key(), Some(cut));
    assert!(matches!(
        read_index(&*world.store, &name(1), None).await,
        Err(ReadError::Header { source: FormatError::Truncated { .. }, .. })
    ));
}

#[test]
fn drafts_that_make_no_sense_are_refused() {
    let zero = |lba, blocks| Piece::Zero { lba, blocks, allocated: false };
    let data = |lba, count| Piece::Data { lba, data: blocks(count, 1) };
    for pieces in [
        vec![zero(0, 0)],
        vec![zero(5, 2), zero(6, 1)],
        vec![zero(5, 2), zero(1, 1)],
        vec![zero(1 << 52, 1)],
        vec![zero(1, 1 << 52)],
        vec![zero(u64::MAX, u64::MAX)],
        vec![Piece::Data { lba: 0, data: blocks(1, 1).slice(0..100) }],
    ] {
        let result = draft(1, Codec::None, pieces.clone()).encode(None);
        assert!(matches!(result, Err(ChunkError::BadPiece(..))), "{pieces:?}");
    }
    let reversed = ChunkDraft { first_lsn: 2, ..draft(1, Codec::None, vec![data(0, 1)]) };
    assert!(matches!(reversed.encode(None), Err(ChunkError::BadLsns(..))));
    let many = (0..MAX_EXTENTS as u64 + 1).map(|i| zero(i * 2, 1)).collect();
    assert!(matches!(draft(1, Codec::None, many).encode(None), Err(ChunkError::TooManyExtents(..))));
    let big = blocks(4096, 1);
    let many = (0..16).map(|i| Piece::Data { lba: i * 4096, data: big.clone() }).collect();
    assert!(matches!(draft(1, Codec::None, many).encode(None), Err(ChunkError::TooManyBlocks(..))));
    // As much as fits, and nothing at all.
    let mut most: Vec<_> = (0..15).map(|i| Piece::Data { lba: i * 4096, data: big.clone() }).collect();
    most.push(Piece::Data { lba: 15 * 4096, data: big.slice(0..4095 * BLOCK) });
    let chunk = draft(1, Codec::Lz4, most).encode(None).unwrap();
    assert_eq!(ChunkIndex::decode(&chunk.bytes, &name(1)).unwrap(), chunk.index);
    let empty = draft(1, Codec::Lz4, vec![]).encode(None).unwrap();
    assert_eq!(ChunkIndex::decode(&empty.bytes, &name(1)).unwrap(), empty.index);
}

#[test]
fn neighbours_of_one_kind_become_one_extent() {
    let plan = [(0, 3, 2, 1), (0, 4, 2, 2), (0, 2, 0, 0), (0, 3, 0, 0), (0, 1, 1, 0), (1, 1, 2, 3)];
    let chunk = draft(1, Codec::None, pieces(&plan)).encode(None).unwrap();
    let found: Vec<_> = chunk.index.extents.iter().map(|e| (e.lba, e.blocks, e.kind)).collect();
    assert_eq!(
        found,
        [
            (0, 7, ExtentKind::Data { index: 0 }),
            (7, 5, ExtentKind::Zero),
            (12, 1, ExtentKind::Hole),
            (14, 1, ExtentKind::Data { index: 7 }),
        ]
    );
}

/// Reads run as jobs of the runtime, which may move between threads.
#[test]
fn reads_may_move_between_threads() {
    let world = World::new(1, None);
    let reader = Arc::new(world.reader);
    let job: std::pin::Pin<Box<dyn Future<Output = bool> + Send>> = Box::pin(async move {
        let mut out = vec![1; BLOCK];
        reader.read(0, &mut out).await.unwrap();
        out == [0; BLOCK]
    });
    assert!(runtime().block_on(job));
}
