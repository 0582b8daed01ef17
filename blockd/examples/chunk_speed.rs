//! Measures chunk encoding, the translation table and the read path: `cargo run --release --example chunk_speed`.
//! With `--table DIR` it fills a table of 1 TiB with 100 GiB of random 4 KiB mappings in DIR and reports memory.

use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use blockd::buf::AlignedBuf;
use blockd::cache::FrameCache;
use blockd::chunk::{BlockReader, Chunk, ChunkDraft, ChunkName, Codec, Piece};
use blockd::crypt::Keys;
use blockd::store::{ListEntry, ObjectMeta, ObjectStore, PutMode, Result, Version};
use blockd::table::{MemKv, Table, simulate};
use blockd::types::{BLOCK, VolumeId};
use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const VOLUME: VolumeId = VolumeId([1; 16]);

/// One chunk in memory.
#[derive(Debug)]
struct OneChunk(Bytes);

#[async_trait]
impl ObjectStore for OneChunk {
    async fn put(&self, _: &str, _: Bytes, _: PutMode) -> Result<Version> {
        unimplemented!()
    }
    async fn get(&self, _: &str) -> Result<(Bytes, Version)> {
        unimplemented!()
    }
    async fn get_range(&self, _: &str, range: std::ops::Range<u64>) -> Result<Bytes> {
        Ok(self.0.slice(range.start as usize..range.end as usize))
    }
    async fn head(&self, _: &str) -> Result<ObjectMeta> {
        unimplemented!()
    }
    async fn list(&self, _: &str, _: Option<&str>) -> Result<Vec<ListEntry>> {
        unimplemented!()
    }
    async fn delete(&self, _: &[String]) -> Result<()> {
        unimplemented!()
    }
    async fn delete_version(&self, _: &str, _: &Version) -> Result<()> {
        unimplemented!()
    }
    fn describe(&self) -> String {
        "one chunk".into()
    }
}

fn data(blocks: usize, compressible: bool, rng: &mut SmallRng) -> AlignedBuf {
    let mut buf = AlignedBuf::zeroed(blocks * BLOCK);
    rng.fill(&mut buf[..]);
    if compressible {
        // Text-like: words of a small vocabulary.
        let words: Vec<[u8; 8]> = (0..256).map(|_| rng.random()).collect();
        for word in buf.chunks_mut(8) {
            word.copy_from_slice(&words[rng.random_range(0..256)][..word.len()]);
        }
    }
    buf
}

fn draft(seq: u64, codec: Codec, pieces: Vec<Piece>) -> ChunkDraft {
    ChunkDraft {
        name: ChunkName { volume: VOLUME, epoch: 1, seq },
        first_lsn: seq,
        last_lsn: seq,
        codec,
        created_ms: 0,
        pieces,
    }
}

/// 16 MiB as one run, or as 4096 scattered blocks.
fn chunk(
    seq: u64,
    codec: Codec,
    compressible: bool,
    spread: Option<u64>,
    rng: &mut SmallRng,
    keys: Option<&Keys>,
) -> Chunk {
    let whole: blockd::buf::Slice = data(4096, compressible, rng).into();
    let pieces = match spread {
        None => vec![Piece::Data { lba: 0, data: whole }],
        Some(volume) => {
            let mut lbas: Vec<u64> = (0..4096).map(|_| rng.random_range(0..volume)).collect();
            lbas.sort();
            lbas.dedup();
            lbas.iter()
                .enumerate()
                .map(|(i, lba)| Piece::Data { lba: *lba, data: whole.slice(i * BLOCK..(i + 1) * BLOCK) })
                .collect()
        }
    };
    draft(seq, codec, pieces).encode(keys).unwrap()
}

fn rss() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let field = |name: &str| {
        let line = status.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() / 1024
    };
    (field("VmRSS:"), field("RssAnon:"))
}

fn time<T>(n: usize, mut f: impl FnMut(usize) -> T) -> Duration {
    let mut times: Vec<Duration> = (0..n)
        .map(|i| {
            let start = Instant::now();
            std::hint::black_box(f(i));
            start.elapsed()
        })
        .collect();
    times.sort();
    times[n / 2]
}

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let mut rng = SmallRng::seed_from_u64(1);
    if args.get(1).map(String::as_str) == Some("--table") {
        return table(args[2].as_ref(), &mut rng);
    }
    for codec in [Codec::None, Codec::Lz4, Codec::Zstd(1)] {
        for compressible in [false, true] {
            let whole: blockd::buf::Slice = data(4096, compressible, &mut rng).into();
            let draft = draft(1, codec, vec![Piece::Data { lba: 0, data: whole }]);
            for keys in [None, Some(Keys::new(&[1; 32]))] {
                let stored = draft.encode(keys.as_ref()).unwrap().bytes.len();
                let t = time(9, |_| draft.encode(keys.as_ref()).unwrap());
                println!(
                    "encode 16 MiB {codec:8} compressible={compressible:5} encrypted={:5}: {:6.0} MiB/s, ratio {:.2}",
                    keys.is_some(),
                    16.0 / t.as_secs_f64(),
                    16_777_216.0 / stored as f64
                );
            }
        }
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    for (codec, compressible, spread) in [
        (Codec::None, false, None),
        (Codec::Lz4, false, None),
        (Codec::Lz4, true, None),
        (Codec::Zstd(1), true, None),
        (Codec::Lz4, true, Some(1 << 22)),
    ] {
        for keys in [None, Some(Keys::new(&[1; 32]))] {
            let chunk = chunk(1, codec, compressible, spread, &mut rng, keys.as_ref());
            let table = Arc::new(Table::in_memory(MemKv::new(), VOLUME).unwrap());
            table.apply(&chunk.index).unwrap();
            let store = Arc::new(OneChunk(chunk.bytes.clone()));
            let cache = runtime.block_on(FrameCache::open(None, 64 << 20, 0)).unwrap();
            let reader = BlockReader::new(VOLUME, table, store, Some(cache)).with_keys(keys.clone());
            let lbas: Vec<u64> = chunk.index.extents.iter().flat_map(|e| e.lba..e.lba + e.blocks).collect();
            let mut out = vec![0; BLOCK];
            for &lba in &lbas {
                // Now the cache has it.
                runtime.block_on(reader.read(lba, &mut out)).unwrap();
            }
            let one = time(20_000, |_| {
                let lba = lbas[rng.random_range(0..lbas.len())];
                runtime.block_on(reader.read(lba, &mut out)).unwrap()
            });
            let mut out = vec![0; 1 << 20];
            let mib = time(200, |i| runtime.block_on(reader.read((i as u64 % 15) * 256, &mut out)).unwrap());
            println!(
                "cached read {codec:8} compressible={compressible:5} scattered={:5} encrypted={:5}: 4 KiB {one:?}, \
                 1 MiB {mib:?}, {:.0} MiB/s",
                spread.is_some(),
                keys.is_some(),
                1.0 / mib.as_secs_f64()
            );
        }
    }
}

fn table(dir: &std::path::Path, rng: &mut SmallRng) {
    const BLOCKS: u64 = (1 << 40) / 4096;
    println!("start: RSS/anon MiB {:?}", rss());
    {
        let table = Table::open(dir, 64 << 20, VOLUME).unwrap();
        let start = Instant::now();
        let applied = simulate(&table, BLOCKS, (100 << 30) / 4096, 1).unwrap();
        table.persist().unwrap();
        println!("filled to {applied:?} in {:?}, {:?}, RSS/anon MiB {:?}", start.elapsed(), table.stats(), rss());
    }
    let start = Instant::now();
    let table = Table::open(dir, 64 << 20, VOLUME).unwrap();
    println!("reopened in {:?}, RSS/anon MiB {:?}", start.elapsed(), rss());
    let lookup = |lba: u64| table.lookup(lba, 1).unwrap();
    println!("lookup, block cache cold: {:?}", time(2000, |_| lookup(rng.random_range(0..BLOCKS))));
    println!("lookup, random:           {:?}", time(200_000, |_| lookup(rng.random_range(0..BLOCKS))));
    println!("lookup, hot 1 GiB warmup: {:?}", time(100_000, |_| lookup(rng.random_range(0..BLOCKS / 1024))));
    println!("lookup, hot 1 GiB:        {:?}", time(100_000, |_| lookup(rng.random_range(0..BLOCKS / 1024))));
    println!("directory, random:        {:?}", time(20_000, |_| table.directory(rng.random_range(1..6000)).unwrap()));
    println!(
        "lookup 1 MiB, random:     {:?}",
        time(20_000, |_| table.lookup(rng.random_range(0..BLOCKS - 256), 256).unwrap())
    );
    println!("after reads: {:?}, RSS/anon MiB {:?}", table.stats(), rss());
    let mut seq = table.applied().seq;
    let mut lsn = table.applied().lsn;
    let mut apply = |spread, rng: &mut SmallRng| {
        seq += 1;
        lsn += 1;
        let mut index = chunk(seq, Codec::None, false, spread, rng, None).index;
        (index.first_lsn, index.last_lsn) = (lsn, lsn);
        let start = Instant::now();
        table.apply(&index).unwrap();
        start.elapsed()
    };
    let mut times: Vec<_> = (0..100).map(|_| apply(Some(BLOCKS), rng)).collect();
    times.sort();
    println!("apply 4096 scattered extents: median {:?}, worst {:?}", times[50], times[99]);
    let mut times: Vec<_> = (0..20).map(|_| apply(None, rng)).collect();
    times.sort();
    println!("apply one 16 MiB extent: median {:?}, worst {:?}", times[10], times[19]);
    let start = Instant::now();
    table.persist().unwrap();
    println!("persist: {:?}; RSS/anon MiB {:?}", start.elapsed(), rss());
    for allocated in [false, true, false] {
        seq += 1;
        let pieces = vec![Piece::Zero { lba: 1, blocks: BLOCKS - 2, allocated }];
        let mut index = draft(seq, Codec::None, pieces).encode(None).unwrap().index;
        (index.first_lsn, index.last_lsn) = (u64::MAX / 2, u64::MAX / 2);
        let start = Instant::now();
        table.apply(&index).unwrap();
        let applied = start.elapsed();
        let start = Instant::now();
        let runs = table.allocations(0, BLOCKS, 100).unwrap().len();
        println!(
            "zero 1 TiB allocated={allocated}: {applied:?}; allocations of all: {runs} runs in {:?}",
            start.elapsed()
        );
        println!("lookup after it: {:?}", time(10_000, |_| lookup(rng.random_range(0..BLOCKS))));
    }
    println!("end: {:?}, RSS/anon MiB {:?}", table.stats(), rss());
}
