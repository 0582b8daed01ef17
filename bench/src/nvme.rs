//! `bench nvme`: blockd over NVMe/TCP and over NBD, in turn, on one disk, driven by one load generator.
//!
//! Two daemons with volumes of their own, so that neither profits from the other's caches. Each round of a case visits
//! both, one right after the other; the values are medians over the rounds, and the ratio is the median of the rounds' ratios,
//! so that what else the machine does for a while weighs on both sides alike.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;

use crate::load::{Histogram, Pattern, Pool, Until, Workload};
use crate::report::{self, Better, Case};
use crate::server::{BlockdOptions, Kind, Server, Transport};

/// Options of `bench nvme`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Write the cases to this file as a JSON list.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Work in a new directory inside this one, on the disk to be measured; must not be a tmpfs.
    #[arg(long, value_name = "DIR", default_value = "target")]
    dir: PathBuf,
    /// Only cases whose name contains this.
    #[arg(long, value_name = "CASE")]
    only: Vec<String>,
    /// Rounds per case.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Length of a round in seconds.
    #[arg(long, default_value_t = 1.0)]
    seconds: f64,
    /// The blockd program; by default the one built beside this one.
    #[arg(long, value_name = "PROGRAM")]
    blockd: Option<PathBuf>,
}

const VOLUME_BYTES: u64 = 512 << 20;
/// Hot reads stay within this many bytes.
const HOT_BYTES: u64 = 64 << 20;
const WARM_UP: Duration = Duration::from_millis(200);
const SETTLE_TIMEOUT: Duration = Duration::from_secs(120);
/// Of NBD's speed, at every depth.
const TARGET: f64 = 0.9;
const NBD: &str = "blockd, NBD over TCP";
const NVME: &str = "blockd, NVMe/TCP";

/// Runs the benchmark.
pub fn run(args: &Args) -> Result<()> {
    let options = match &args.blockd {
        Some(program) => BlockdOptions::at(program.clone()),
        None => BlockdOptions::beside_us()?,
    };
    std::fs::create_dir_all(&args.dir)?;
    let dir = tempfile::Builder::new().prefix("bench-nvme-").tempdir_in(&args.dir)?;
    let pool = Pool::new(1 << 20, 1);
    let mut servers = Vec::new();
    for (name, transport) in [(NVME, Transport::Nvme), (NBD, Transport::Tcp)] {
        let place = dir.path().join(format!("{transport:?}"));
        let server = Server::create(Kind::Blockd(options.clone()), &place, VOLUME_BYTES, transport)?;
        let fill = workload(Pattern::SequentialWrite, 1 << 20, 4, VOLUME_BYTES);
        server.drive(&fill, Until::Operations(VOLUME_BYTES >> 20), &pool, 1)?;
        settle(&server, &options)?;
        servers.push((name, server));
    }
    let mut cases = Vec::new();
    let mut seed = 1;
    for (name, workload) in questions() {
        if !args.only.is_empty() && !args.only.iter().any(|only| name.contains(only)) {
            continue;
        }
        let mut samples: BTreeMap<&str, Vec<f64>> = BTreeMap::new();
        let mut latencies: BTreeMap<&str, Histogram> = BTreeMap::new();
        for round in 0..args.rounds {
            // Neither is always the first.
            for at in 0..2 {
                let (who, server) = &servers[(at + round) % 2];
                seed += 1;
                if workload.pattern == Pattern::RandomRead {
                    let warm =
                        Workload { pattern: Pattern::SequentialRead, block_bytes: 1 << 20, depth: 4, ..workload };
                    server.drive(&warm, Until::Operations(workload.span_bytes >> 20), &pool, seed)?;
                }
                let measured = Duration::from_secs_f64(args.seconds);
                let outcome = server.drive(&workload, Until::Time { warm_up: WARM_UP, measured }, &pool, seed)?;
                samples.entry(who).or_default().push(outcome.per_second());
                latencies.entry(who).or_default().merge(&outcome.latency);
                if workload.pattern.writes() {
                    settle(server, &options)?;
                }
            }
        }
        let pairs = samples[NVME].iter().zip(&samples[NBD]);
        let ratio = median(pairs.map(|(nvme, nbd)| nvme / nbd).collect());
        let values: BTreeMap<&str, f64> = samples.into_iter().map(|(who, samples)| (who, median(samples))).collect();
        let unit = if workload.block_bytes == 1 << 20 { "MiB/s" } else { "op/s" };
        eprintln!("{name} ({unit}): NVMe/TCP {:.0}, NBD {:.0}, ratio {ratio:.2}", values[NVME], values[NBD]);
        let mut case = Case::new(name, unit, Some(values[NVME]), (NBD, values[NBD]), Some(TARGET), Better::More);
        (case.ratio, case.met) = (Some(ratio), Some(ratio >= TARGET));
        case.values = values.iter().map(|(who, value)| (who.to_string(), *value)).collect();
        case.latency_p99_us =
            latencies.iter().map(|(who, latency)| (who.to_string(), latency.quantile_us(0.99))).collect();
        cases.push(case);
    }
    anyhow::ensure!(!cases.is_empty(), "no case is called {:?}", args.only);
    println!("{}", report::case_table(&cases));
    if let Some(path) = &args.json {
        report::write_json(path, &cases)?;
    }
    Ok(())
}

fn workload(pattern: Pattern, block_bytes: u32, depth: usize, span_bytes: u64) -> Workload {
    Workload { pattern, block_bytes, depth, connections: 1, span_bytes }
}

fn questions() -> Vec<(String, Workload)> {
    let mut questions = Vec::new();
    for depth in [1, 4, 16, 64] {
        for (what, pattern, span) in [
            ("4 KiB random read, hot", Pattern::RandomRead, HOT_BYTES),
            ("4 KiB random write", Pattern::RandomWrite, VOLUME_BYTES),
            ("4 KiB random write + flush", Pattern::RandomWriteFlush, VOLUME_BYTES),
        ] {
            questions.push((format!("{what}, depth {depth}"), workload(pattern, 4096, depth, span)));
        }
    }
    for depth in [1, 4] {
        for (what, pattern) in
            [("1 MiB sequential write", Pattern::SequentialWrite), ("1 MiB sequential read", Pattern::SequentialRead)]
        {
            questions.push((format!("{what}, depth {depth}"), workload(pattern, 1 << 20, depth, VOLUME_BYTES)));
        }
    }
    let many = Workload { connections: 4, ..workload(Pattern::RandomRead, 4096, 32, HOT_BYTES) };
    questions.push(("4 KiB random read, hot, depth 32, 4 connections".to_owned(), many));
    questions
}

fn settle(server: &Server, options: &BlockdOptions) -> Result<()> {
    server.connect()?.flush()?;
    server.wait_destaged(options, SETTLE_TIMEOUT)
}

fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}
