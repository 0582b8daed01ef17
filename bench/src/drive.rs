//! `bench load`: the load generator by itself, on a server that runs already. For profiling.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use clap::ValueEnum;

use crate::load::{self, Endpoint, Pattern, Pool, Until, Workload};
use crate::report;

/// Options of `bench load`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Unix socket or TCP address of an NBD server. Writing patterns overwrite what it serves.
    server: String,
    /// What to do.
    #[arg(value_enum)]
    pattern: Shape,
    /// The export.
    #[arg(long, default_value = "")]
    export: String,
    /// Bytes per request.
    #[arg(long, default_value_t = 4096)]
    block_bytes: u32,
    /// Requests in flight on each connection.
    #[arg(long, default_value_t = 32)]
    depth: usize,
    /// Connections.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    connections: u8,
    /// Stay below this offset, in MiB.
    #[arg(long, default_value_t = 128)]
    span_mib: u64,
    /// How long.
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Shape {
    RandomWrite,
    RandomWriteFlush,
    RandomRead,
    SequentialWrite,
    SequentialRead,
}

/// Runs the load and prints what it came to.
pub fn run(args: &Args) -> Result<()> {
    let endpoint = match args.server.parse() {
        Ok(addr) => Endpoint::Tcp(addr),
        Err(_) => Endpoint::Unix(PathBuf::from(&args.server)),
    };
    let workload = Workload {
        pattern: match args.pattern {
            Shape::RandomWrite => Pattern::RandomWrite,
            Shape::RandomWriteFlush => Pattern::RandomWriteFlush,
            Shape::RandomRead => Pattern::RandomRead,
            Shape::SequentialWrite => Pattern::SequentialWrite,
            Shape::SequentialRead => Pattern::SequentialRead,
        },
        block_bytes: args.block_bytes,
        depth: args.depth,
        connections: usize::from(args.connections),
        span_bytes: args.span_mib << 20,
    };
    let until =
        Until::Time { warm_up: Duration::from_millis(200), measured: Duration::try_from_secs_f64(args.seconds)? };
    let pool = Pool::new(args.block_bytes as usize, 1);
    let outcome = load::run(&endpoint, &args.export, &workload, until, &pool, rand::random())?;
    println!(
        "{} op/s, {} MiB/s; latency in microseconds: median {}, 99% {}, 99.9% {}",
        report::number(outcome.per_second()),
        report::number(outcome.per_second() * f64::from(args.block_bytes) / f64::from(1 << 20)),
        report::number(outcome.latency.quantile_us(0.5)),
        report::number(outcome.latency.quantile_us(0.99)),
        report::number(outcome.latency.quantile_us(0.999)),
    );
    Ok(())
}
