//! `bench fsync`: writes that are answered only when the bucket has them.
//!
//! A volume with durability `object`, each 4 KiB write followed by a flush, at growing depths, with the bucket near and
//! far. The time of one PUT of the same size by itself stands beside it: a flush at depth 1 is to take at most two.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::Result;
use blockd::store::{ObjectStore, PutMode};
use bytes::Bytes;

use crate::bucket::{Bucket, BucketArgs};
use crate::load::{Outcome, Pattern, Pool, Until, Workload};
use crate::report::{self, Better, Case};
use crate::server::{BlockdOptions, Kind, Server};

const VOLUME_BYTES: u64 = 1 << 30;

/// Options of `bench fsync`.
#[derive(Debug, clap::Args)]
pub struct Args {
    #[command(flatten)]
    bucket: BucketArgs,
    /// Added to each answer of an S3 server, in milliseconds; may be repeated.
    #[arg(long, default_values_t = [0, 30])]
    delay_ms: Vec<u64>,
    /// Requests in flight; may be repeated.
    #[arg(long, default_values_t = [1, 8, 64])]
    depth: Vec<usize>,
    /// How long each case is measured, in seconds.
    #[arg(long, default_value_t = 10.0)]
    seconds: f64,
    /// At most 1.0: the longest stall must be below 5 times the median. Only meaningful for long runs.
    #[arg(long)]
    stalls: bool,
    /// Work in a new directory inside this one.
    #[arg(long, value_name = "DIR", default_value = "target")]
    dir: PathBuf,
    /// Write the cases to this file as a JSON list.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Measures and prints.
pub fn run(args: &Args) -> Result<()> {
    std::fs::create_dir_all(&args.dir)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut cases = Vec::new();
    let mut rows =
        vec![["delay", "depth", "fsync/s", "median ms", "90%", "99%", "99.9%", "longest"].map(String::from).to_vec()];
    for &delay_ms in &args.delay_ms {
        let dir = tempfile::Builder::new().prefix("fsync-").rand_bytes(12).tempdir_in(&args.dir)?;
        let bucket = args.bucket.open(dir.path(), Duration::from_millis(delay_ms))?;
        let put_ms = runtime.block_on(one_put(&bucket))?;
        let mut options = BlockdOptions::beside_us()?;
        bucket.serve(&mut options);
        options.durability = Some("object".into());
        let server = Server::create(Kind::Blockd(options), &dir.path().join("server"), VOLUME_BYTES, false)?;
        for &depth in &args.depth {
            let outcome = load(&server, depth, args.seconds)?;
            let ms = |share| outcome.latency.quantile_us(share) / 1e3;
            let mut row = vec![format!("{delay_ms} ms"), depth.to_string(), report::number(outcome.per_second())];
            row.extend([0.5, 0.9, 0.99, 0.999, 1.0].map(|share| report::number(ms(share))));
            rows.push(row);
            let name = format!("durability object, write and flush, depth {depth}, answers {delay_ms} ms later");
            if depth == 1 {
                let peer = ("one PUT", put_ms);
                cases.push(Case::new(format!("{name}, median"), "ms", Some(ms(0.5)), peer, Some(0.5), Better::Less));
            }
            if args.stalls {
                let peer = ("5 times the median", 5.0 * ms(0.5));
                let name = format!("{name}, longest stall in {} s", args.seconds);
                cases.push(Case::new(name, "ms", Some(ms(1.0)), peer, Some(1.0), Better::Less));
            }
        }
    }
    print!("{}\n{}", report::table(&rows), report::case_table(&cases));
    args.json.as_ref().map_or(Ok(()), |json| report::write_json(json, &cases))
}

fn load(server: &Server, depth: usize, seconds: f64) -> Result<Outcome> {
    let workload = Workload {
        pattern: Pattern::RandomWriteFlush,
        block_bytes: 4096,
        depth,
        connections: 1,
        span_bytes: VOLUME_BYTES,
    };
    let until = Until::Time { warm_up: Duration::from_millis(500), measured: Duration::try_from_secs_f64(seconds)? };
    server.drive(&workload, until, &Pool::new(4096, 1), depth as u64)
}

/// Median time of a PUT of a chunk with one block, in milliseconds.
async fn one_put(bucket: &Bucket) -> Result<f64> {
    let store = bucket.store().await?;
    let mut times = Vec::new();
    for i in 0..50 {
        let start = Instant::now();
        store.put(&format!("plain/{i}"), Bytes::from(vec![i; 8192]), PutMode::Create).await?;
        times.push(start.elapsed().as_secs_f64() * 1e3);
    }
    Ok(report::median(times))
}
