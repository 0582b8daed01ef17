//! `crash-test`: SIGKILLs a server under load at random moments and checks that nothing acknowledged is lost.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use bench::crash::rounds::{self, Plan};
use bench::server::{BlockdOptions, Kind, Server, Transport};
use clap::{Parser, ValueEnum};

/// Longest rest amid a round: long enough for what is done once a second, and for destaging by age after it.
const IDLE_MAX: Duration = Duration::from_secs(4);
/// Arguments for `blockd serve` that make the rare frequent.
const SMALL: &[&str] = &[
    "--log-size=64MiB",
    "--log-segment=8MiB",
    "--chunk-size=2MiB",
    "--destage-age=1500ms",
    "--dirty-memory=16MiB",
    "--block-cache=16MiB",
];

/// Kills a server under load, restarts it and verifies everything, again and again.
///
/// Every acknowledged write must be there; a write in flight is there or not, but never half of it inside an aligned 4 KiB
/// block; and what was seen once after a restart stays.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Kills.
    #[arg(long, default_value_t = 200)]
    rounds: u32,
    /// Decides sizes, places and moments [default: random].
    #[arg(long)]
    seed: Option<u64>,
    /// Least load before a kill, in seconds.
    #[arg(long, default_value_t = 0.2)]
    seconds_min: f64,
    /// Most load before a kill, in seconds.
    #[arg(long, default_value_t = 2.0)]
    seconds_max: f64,
    /// Size of the volume in MiB; small, so that writes overlap.
    #[arg(long, default_value_t = 64)]
    volume_mib: u64,
    /// Connections at once.
    #[arg(long, default_value_t = 4)]
    connections: usize,
    /// Requests in flight on each connection.
    #[arg(long, default_value_t = 16)]
    depth: usize,
    /// Whom to kill.
    #[arg(long, value_enum, default_value_t = Victim::Blockd)]
    server: Victim,
    /// How to reach it.
    #[arg(long, value_enum, default_value_t = Export::Nbd)]
    export: Export,
    /// Work in a new directory inside this one.
    #[arg(long, value_name = "DIR", default_value = "target")]
    dir: PathBuf,
    /// The blockd program [default: the one built beside this one].
    #[arg(long, value_name = "PROGRAM")]
    blockd: Option<PathBuf>,
    /// blockd's --store [default: a directory inside its data directory].
    #[arg(long, value_name = "URL")]
    store_url: Option<String>,
    /// Durability of the volume.
    #[arg(long)]
    durability: Option<String>,
    /// Another argument for `blockd serve`, as --serve-arg=--flag=value; may be repeated. Without one for the same flag, the
    /// log, its segments and the chunks are made so small that recycling, pacing and destaging happen all the time.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    serve_arg: Vec<String>,
    /// Rounds between lines of progress.
    #[arg(long, default_value_t = 10)]
    progress_every: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Victim {
    Blockd,
    /// Keeps acknowledged data in the page cache; for checking the tester.
    NbdkitFile,
    /// As above; its trims promise nothing.
    QemuNbd,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Export {
    Nbd,
    /// NVMe/TCP with digests; only blockd.
    Nvme,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("crash-test: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    let seed = args.seed.unwrap_or_else(rand::random);
    let plan = Plan {
        rounds: args.rounds,
        seed,
        load_min: Duration::try_from_secs_f64(args.seconds_min).context("--seconds-min")?,
        load_max: Duration::try_from_secs_f64(args.seconds_max.max(args.seconds_min)).context("--seconds-max")?,
        idle_max: IDLE_MAX,
        volume_bytes: args.volume_mib << 20,
        connections: args.connections,
        depth: args.depth,
        trim_is_advisory: args.server != Victim::Blockd,
        progress_every: args.progress_every,
    };
    let kind = match args.server {
        Victim::NbdkitFile => Kind::NbdkitFile,
        Victim::QemuNbd => Kind::QemuNbd { cache: "writeback", aio: "threads" },
        Victim::Blockd => {
            let mut options = match &args.blockd {
                Some(program) => BlockdOptions::at(program.clone()),
                None => BlockdOptions::beside_us()?,
            };
            options.store_url = args.store_url.clone();
            options.durability = args.durability.clone();
            options.serve_args = args.serve_arg.clone();
            for small in SMALL {
                let flag = small.split('=').next().unwrap_or(small);
                if !args.serve_arg.iter().any(|arg| arg.split('=').next() == Some(flag)) {
                    options.serve_args.push((*small).to_owned());
                }
            }
            Kind::Blockd(options)
        }
    };
    let transport = match args.export {
        Export::Nbd => Transport::Unix,
        Export::Nvme if args.server == Victim::Blockd => Transport::Nvme,
        Export::Nvme => anyhow::bail!("only blockd speaks NVMe/TCP"),
    };
    std::fs::create_dir_all(&args.dir)?;
    let dir = tempfile::Builder::new().prefix("crash-test-").tempdir_in(&args.dir)?;
    println!("seed {seed}, {} rounds on {}, data in {}", plan.rounds, kind.name(), dir.path().display());
    let mut server = Server::create(kind, dir.path(), plan.volume_bytes, transport)?;
    match rounds::run(&mut server, &plan) {
        Ok(statistics) => {
            println!("passed: {statistics}");
            Ok(())
        }
        Err(error) => {
            // The evidence: no orderly stop that might tidy it, and no removal.
            server.kill()?;
            let kept = dir.keep();
            let mut again: Vec<String> = std::env::args().collect();
            if args.seed.is_none() {
                again.push(format!("--seed={seed}"));
            }
            eprintln!("FAILED with seed {seed}; everything is kept in {}.\nAgain: {}", kept.display(), again.join(" "));
            Err(error)
        }
    }
}
