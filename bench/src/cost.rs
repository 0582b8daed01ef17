//! `bench cost`: what a volume asks of the bucket, counted where the requests leave blockd.
//!
//! Four questions: PUTs for each GiB of random 4 KiB writes, requests of a volume at rest, requests and bytes of a cold
//! random read, and how fast a cold sequential read is beside a loop of parallel GETs.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blockd::chunk::ChunkName;
use blockd::lease;
use blockd::store::{CountedStore, ObjectStore, StoreCounters};

use crate::bucket::{Bucket, BucketArgs};
use crate::load::{Pattern, Pool, Until, Workload};
use crate::report::{self, Better, Case};
use crate::server::{BlockdOptions, Kind, Server, VOLUME};

/// How long everything may take to reach the bucket.
const TIMEOUT: Duration = Duration::from_secs(3600);
/// Bytes of a GET of the plain loop.
const GET_BYTES: u64 = 4 << 20;
/// GETs in flight, and requests of the sequential reader.
const PARALLEL: usize = 8;
/// Bytes of a request of the sequential reader.
const READ_BYTES: u32 = 1 << 20;

/// Options of `bench cost`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    bucket: BucketArgs,
    /// Size of the volume that is written in order and then at random, in GiB.
    #[arg(long, default_value_t = 2)]
    volume_gib: u64,
    /// Bytes written at random in blocks of 4 KiB, in GiB.
    #[arg(long, default_value_t = 4)]
    written_gib: u64,
    /// Bytes written and read in order, in GiB.
    #[arg(long, default_value_t = 2)]
    sequential_gib: u64,
    /// How long the volume is watched at rest, in seconds.
    #[arg(long, default_value_t = 120)]
    idle_seconds: u64,
    /// Cold reads of one block each.
    #[arg(long, default_value_t = 500)]
    cold_reads: u64,
    /// Answer these questions only; may be repeated.
    #[arg(long, value_enum, default_values_t = [Question::Random, Question::Sequential])]
    question: Vec<Question>,
    /// Work in a new directory inside this one.
    #[arg(long, value_name = "DIR", default_value = "target")]
    dir: PathBuf,
    /// Write the cases to this file as a JSON list.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Another argument for `blockd serve`; may be repeated.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    serve_arg: Vec<String>,
}

/// What can be asked.
#[derive(Clone, Copy, Debug, clap::ValueEnum)]
enum Question {
    /// PUTs of random writes, requests at rest, cold random reads.
    Random,
    /// A cold sequential read.
    Sequential,
}

/// Asks the chosen questions and prints the answers.
pub fn run(args: &Args) -> Result<()> {
    std::fs::create_dir_all(&args.dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut cases = Vec::new();
    for question in &args.question {
        let dir = tempfile::Builder::new().prefix("cost-").rand_bytes(12).tempdir_in(&args.dir)?;
        let bucket = args.bucket.open(dir.path(), Duration::ZERO)?;
        let ask = match question {
            Question::Random => random,
            Question::Sequential => sequential,
        };
        cases.extend(ask(args, &bucket, dir.path(), &runtime)?);
        runtime.block_on(async { empty(bucket.store().await?.as_ref()).await })?;
    }
    print!("{}", report::case_table(&cases));
    args.json.as_ref().map_or(Ok(()), |json| report::write_json(json, &cases))
}

/// Removes what a measurement left in its part of the bucket.
async fn empty(store: &dyn ObjectStore) -> Result<()> {
    loop {
        let page = store.list("", None).await?;
        if page.is_empty() {
            return Ok(());
        }
        let keys: Vec<String> = page.into_iter().map(|entry| entry.key).collect();
        store.delete(&keys).await?;
    }
}

fn options(args: &Args, bucket: &Bucket) -> Result<BlockdOptions> {
    let mut options = BlockdOptions::beside_us()?;
    bucket.serve(&mut options);
    options.serve_args.extend(args.serve_arg.iter().cloned());
    Ok(options)
}

/// The host and its disk are lost; another opens the volume.
fn lose_host(server: &mut Server, options: &BlockdOptions) -> Result<()> {
    server.kill()?;
    server.lose_data()?;
    server.spawn()?;
    server.open_by_force(options)
}

/// PUTs of random writes, requests at rest, and cold random reads of what was written.
fn random(args: &Args, bucket: &Bucket, dir: &Path, runtime: &tokio::runtime::Runtime) -> Result<Vec<Case>> {
    let options = options(args, bucket)?;
    let mut server = Server::create(Kind::Blockd(options.clone()), &dir.join("random"), args.volume_gib << 30, false)?;
    // Every block is there before, so that each cold read has something to fetch.
    fill(&server, &options, args.volume_gib << 30)?;
    let pool = Pool::new(4096, 1);
    let before = settle(&server, &options)?;
    let workload = Workload {
        pattern: Pattern::RandomWrite,
        block_bytes: 4096,
        depth: 32,
        connections: 1,
        span_bytes: args.volume_gib << 30,
    };
    let written = args.written_gib << 30;
    server.drive(&workload, Until::Operations(written / 4096), &pool, 1)?;
    server.connect()?.flush()?;
    server.wait_destaged(&options, TIMEOUT)?;
    let after = settle(&server, &options)?;
    let gib = written as f64 / f64::from(1 << 30);
    let puts = (after.put_class_requests - before.put_class_requests) as f64 / gib;
    let mut cases = vec![Case::new(
        "PUT requests per GiB of random 4 KiB writes, checkpoints, compaction and lease included",
        "requests",
        Some(puts),
        ("the limit", 140.0),
        Some(1.0),
        Better::Less,
    )];
    cases.push(idle(args, bucket, &server, &options, runtime)?);
    // No read-ahead, no neighbour: each read is alone and far from the others.
    lose_host(&mut server, &options)?;
    let before = settle(&server, &options)?;
    let workload = Workload { pattern: Pattern::RandomRead, depth: 1, ..workload };
    server.drive(&workload, Until::Operations(args.cold_reads), &pool, 2)?;
    let after = server.store_counters(&options)?;
    let each =
        |counter: fn(&StoreCounters) -> u64| (counter(&after) - counter(&before)) as f64 / args.cold_reads as f64;
    let case = |what: &str, unit, value, limit| {
        Case::new(
            format!("cold 4 KiB random read, {what}"),
            unit,
            Some(value),
            ("the limit", limit),
            Some(1.0),
            Better::Less,
        )
    };
    cases.push(case("GETs each", "requests", each(|c| c.get_class_requests), 1.0));
    cases.push(case("bytes fetched each", "KiB", each(|c| c.bytes_read) / 1024.0, 64.0));
    server.stop()?;
    Ok(cases)
}

/// Writes the volume once, in order, and waits until the bucket has it.
fn fill(server: &Server, options: &BlockdOptions, bytes: u64) -> Result<()> {
    let workload = Workload {
        pattern: Pattern::SequentialWrite,
        block_bytes: 1 << 20,
        depth: 4,
        connections: 1,
        span_bytes: bytes,
    };
    server.drive(&workload, Until::Operations(bytes >> 20), &Pool::new(1 << 20, 3), 3)?;
    server.connect()?.flush()?;
    server.wait_destaged(options, TIMEOUT)
}

/// Waits until nothing but the lease asks anything of the bucket for a while.
fn settle(server: &Server, options: &BlockdOptions) -> Result<StoreCounters> {
    let deadline = Instant::now() + TIMEOUT;
    let mut last = server.store_counters(options)?;
    loop {
        std::thread::sleep(Duration::from_secs(15));
        let now = server.store_counters(options)?;
        let moved = now.bytes_written - last.bytes_written + now.bytes_read - last.bytes_read;
        if moved < 4096 || Instant::now() > deadline {
            return Ok(now);
        }
        last = now;
    }
}

/// Requests per hour of a volume that nobody uses, without the renewals of its lease.
fn idle(
    args: &Args,
    bucket: &Bucket,
    server: &Server,
    options: &BlockdOptions,
    runtime: &tokio::runtime::Runtime,
) -> Result<Case> {
    let renewals = || {
        runtime.block_on(async {
            let store = bucket.store().await?;
            let found = lease::load(store.as_ref(), VOLUME).await?;
            Ok::<_, anyhow::Error>(found.context("the volume has no lease")?.0.counter)
        })
    };
    let requests = |c: &StoreCounters| c.put_class_requests + c.get_class_requests + c.free_requests;
    let (before, renewed) = (requests(&server.store_counters(options)?), renewals()?);
    std::thread::sleep(Duration::from_secs(args.idle_seconds));
    let (after, renewed_since) = (requests(&server.store_counters(options)?), renewals()? - renewed);
    let per_hour = (after - before).saturating_sub(renewed_since) as f64 * 3600.0 / args.idle_seconds as f64;
    Ok(Case::new(
        format!("requests per hour of an idle volume beside its lease, watched for {} s", args.idle_seconds),
        "requests",
        Some(per_hour),
        ("the limit", 30.0),
        Some(1.0),
        Better::Less,
    ))
}

/// A cold sequential read beside a loop of parallel GETs of the same bytes, in turn.
fn sequential(args: &Args, bucket: &Bucket, dir: &Path, runtime: &tokio::runtime::Runtime) -> Result<Vec<Case>> {
    let options = options(args, bucket)?;
    let bytes = args.sequential_gib << 30;
    let mut server = Server::create(Kind::Blockd(options.clone()), &dir.join("sequential"), bytes, false)?;
    fill(&server, &options, bytes)?;
    settle(&server, &options)?;
    let pool = Pool::new(1 << 20, 3);
    let reading = Workload {
        pattern: Pattern::SequentialRead,
        block_bytes: READ_BYTES,
        depth: PARALLEL,
        connections: 1,
        span_bytes: bytes,
    };
    let (mut ours, mut plain) = (Vec::new(), Vec::new());
    for round in 0..3 {
        plain.push(runtime.block_on(async { get_loop(bucket.store().await?).await })?);
        lose_host(&mut server, &options)?;
        let start = Instant::now();
        let count = Until::Operations(bytes / u64::from(READ_BYTES));
        server.drive(&reading, count, &pool, round)?;
        ours.push(bytes as f64 / f64::from(1 << 20) / start.elapsed().as_secs_f64());
    }
    server.stop()?;
    let (ours, plain) = (report::median(ours), report::median(plain));
    let peer = format!("{PARALLEL} parallel GETs of 4 MiB");
    Ok(vec![Case::new("cold sequential read", "MiB/s", Some(ours), (&peer, plain), Some(0.8), Better::More)])
}

/// Fetches all chunks in parts; MiB per second.
async fn get_loop(store: Arc<CountedStore>) -> Result<f64> {
    let mut parts = Vec::new();
    let mut after: Option<String> = None;
    loop {
        let page = store.list("chunks/", after.as_deref()).await?;
        let Some(last) = page.last() else { break };
        after = Some(last.key.clone());
        for entry in page.iter().filter(|entry| ChunkName::parse(&entry.key).is_some()) {
            let size = entry.size;
            parts.extend((0..size.div_ceil(GET_BYTES)).map(|i| {
                let at = i * GET_BYTES;
                (entry.key.clone(), at..(at + GET_BYTES).min(size))
            }));
        }
    }
    let total: u64 = parts.iter().map(|(_, range)| range.end - range.start).sum();
    let (parts, next) = (Arc::new(parts), Arc::new(AtomicU64::new(0)));
    let start = Instant::now();
    let workers: Vec<_> = (0..PARALLEL)
        .map(|_| {
            let (store, parts, next) = (store.clone(), parts.clone(), next.clone());
            tokio::spawn(async move {
                while let Some((key, range)) = parts.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
                    store.get_range(key, range.clone()).await?;
                }
                Ok::<(), blockd::store::StoreError>(())
            })
        })
        .collect();
    for worker in workers {
        worker.await.context("a GET task panicked")??;
    }
    Ok(total as f64 / f64::from(1 << 20) / start.elapsed().as_secs_f64())
}
