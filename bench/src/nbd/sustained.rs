//! Sequential writing until everything is in the bucket, beside what the store takes by itself.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use blockd::store::{self, ObjectStore, PutMode, StoreConfig};
use bytes::Bytes;

use crate::load::{self, Pattern, Pool, Until, Workload};
use crate::report::{Better, Case, median};
use crate::server::{BlockdOptions, Kind, Server};

/// The case's name.
pub const NAME: &str = "sustained sequential write, bucket included";
/// Size of an object of the plain loop, in bytes: that of a chunk.
const OBJECT_BYTES: usize = 16 << 20;
/// PUTs in flight.
const PARALLEL: usize = 4;
/// How long everything may take to reach the bucket.
const TIMEOUT: Duration = Duration::from_secs(600);

/// Writes `total_bytes` both ways, `rounds` times in turn.
pub fn run(options: &BlockdOptions, dir: &Path, total_bytes: u64, rounds: usize, tcp: bool) -> Result<Case> {
    let pool = Arc::new(Pool::new(OBJECT_BYTES, 2));
    let (mut ours, mut plain) = (Vec::new(), Vec::new());
    for round in 0..rounds {
        let place = tempfile::Builder::new().prefix("put-").tempdir_in(dir)?;
        plain.push(put_loop(place.path(), total_bytes, &pool)?);
        drop(place);
        let place = tempfile::Builder::new().prefix("sustained-").tempdir_in(dir)?;
        ours.push(through_blockd(options, place.path(), total_bytes, &pool, round as u64, tcp)?);
    }
    let (ours, plain) = (median(ours), median(plain));
    let peer = format!("{PARALLEL} parallel PUTs of 16 MiB");
    let name = format!("{NAME}, {} GiB", total_bytes >> 30);
    Ok(Case::new(name, "MiB/s", Some(ours), (&peer, plain), Some(0.8), Better::More))
}

fn mib_per_second(bytes: u64, time: Duration) -> f64 {
    bytes as f64 / f64::from(1 << 20) / time.as_secs_f64()
}

fn put_loop(dir: &Path, total_bytes: u64, pool: &Arc<Pool>) -> Result<f64> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let url = format!("dir:{}", dir.canonicalize()?.display());
    runtime.block_on(async {
        let store = store::open(&StoreConfig::new(url)).await?;
        let count = total_bytes.div_ceil(OBJECT_BYTES as u64);
        let next = Arc::new(std::sync::atomic::AtomicU64::new(0));
        let start = Instant::now();
        let workers: Vec<_> = (0..PARALLEL)
            .map(|_| {
                let (store, next, pool) = (store.clone(), next.clone(), pool.clone());
                tokio::spawn(async move {
                    loop {
                        let index = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        if index >= count {
                            return Ok::<(), store::StoreError>(());
                        }
                        let body = Bytes::copy_from_slice(pool.payload(index << 6, OBJECT_BYTES));
                        let key = format!("plain/{:02x}/{index}", index % 256);
                        store.put(&key, body, PutMode::Create).await?;
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.await.context("a PUT task panicked")??;
        }
        Ok(mib_per_second(count * OBJECT_BYTES as u64, start.elapsed()))
    })
}

fn through_blockd(
    options: &BlockdOptions,
    dir: &Path,
    total_bytes: u64,
    pool: &Pool,
    seed: u64,
    tcp: bool,
) -> Result<f64> {
    // What is measured is how fast it goes, not how long the last half of a chunk waits for company.
    let mut options = options.clone();
    options.serve_args.push("--destage-age=200ms".to_owned());
    let options = &options;
    let server = Server::create(Kind::Blockd(options.clone()), dir, total_bytes, tcp)?;
    let workload = Workload {
        pattern: Pattern::SequentialWrite,
        block_bytes: 1 << 20,
        depth: 4,
        connections: 1,
        span_bytes: total_bytes,
    };
    let start = Instant::now();
    let until = Until::Operations(total_bytes >> 20);
    load::run(server.endpoint(), server.export(), &workload, until, pool, seed)
        .with_context(|| format!("blockd said:\n{}", server.log_tail()))?;
    server.connect()?.flush()?;
    server.wait_destaged(options, TIMEOUT)?;
    Ok(mib_per_second(total_bytes, start.elapsed()))
}
