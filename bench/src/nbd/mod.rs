//! `bench nbd`: blockd and its peers on one disk, driven by one client, in turn.
//!
//! All servers run from the start; only one is driven at a time. Each round of a case visits every server, so that a
//! slow minute of the machine hits them all, and a case's value is the median over its rounds. After a round that
//! wrote, the server is given time to bring everything to rest.

mod cases;
mod memory;
mod sustained;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};

use self::cases::{Against, Question};
use crate::fio::Fio;
use crate::load::{self, Histogram, Pattern, Pool, Until, Workload};
use crate::report::{self, Better, Case, median};
use crate::server::{BlockdOptions, Kind, Server};

/// Options of `bench nbd`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Fewer and shorter rounds.
    #[arg(long)]
    quick: bool,
    /// Write the cases to this file as a JSON list.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Work in a new directory inside this one, on the disk to be measured; must not be a tmpfs.
    #[arg(long, value_name = "DIR", default_value = "target")]
    dir: PathBuf,
    /// Only cases whose name contains this.
    #[arg(long, value_name = "CASE")]
    only: Vec<String>,
    /// Only servers whose name contains this, and no fio, for work on one of them.
    #[arg(long, value_name = "NAME")]
    server: Vec<String>,
    /// Loopback TCP instead of Unix sockets.
    #[arg(long)]
    tcp: bool,
    /// Leave blockd out.
    #[arg(long)]
    peers_only: bool,
    /// Rounds per case and server.
    #[arg(long)]
    rounds: Option<usize>,
    /// Length of a round in seconds.
    #[arg(long)]
    seconds: Option<f64>,
    /// The blockd program; by default the one built beside this one.
    #[arg(long, value_name = "PROGRAM")]
    blockd: Option<PathBuf>,
    /// Another argument for `blockd serve`; may be repeated.
    #[arg(long, value_name = "ARG", allow_hyphen_values = true)]
    serve_arg: Vec<String>,
}

/// Size of the export, in bytes.
const VOLUME_BYTES: u64 = 1 << 30;
/// Hot reads stay within this many bytes.
const HOT_BYTES: u64 = 128 << 20;
/// Not counted at the start of each round.
const WARM_UP: Duration = Duration::from_millis(200);
/// How long a server may take to come to rest.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(120);

/// Runs the benchmark.
pub fn run(args: &Args) -> Result<()> {
    let wanted = |name: &str| args.only.is_empty() || args.only.iter().any(|only| name.contains(only));
    let questions: Vec<Question> = cases::all().into_iter().filter(|question| wanted(&question.name)).collect();
    let blockd = args.blockd_options()?;
    let sustained = blockd.as_ref().filter(|_| wanted(sustained::NAME));
    let memory = blockd.as_ref().filter(|_| wanted(memory::NAME));
    anyhow::ensure!(
        !questions.is_empty() || sustained.is_some() || memory.is_some(),
        "no case is called {:?}",
        args.only
    );
    std::fs::create_dir_all(&args.dir)?;
    let dir = tempfile::Builder::new().prefix("bench-nbd-").tempdir_in(&args.dir)?;
    let mut cases = Vec::new();
    // What was measured is worth showing even if something else failed.
    let mut problems = Vec::new();
    if !questions.is_empty() {
        let mut bench = Bench::prepare(args, blockd.as_ref(), dir.path())?;
        for question in &questions {
            match bench.ask(question) {
                Ok(answers) => cases.extend(answers),
                Err(error) => {
                    problems.push(error.context(question.name.clone()));
                    break;
                }
            }
        }
    }
    if let Some(options) = sustained {
        let (gib, rounds) = if args.quick { (2, 2) } else { (8, 3) };
        let case = sustained::run(options, dir.path(), gib << 30, rounds, args.tcp);
        problems.extend(case.map(|case| cases.push(case)).err());
    }
    if let Some(options) = memory {
        let found = memory::run(options, dir.path());
        problems.extend(found.map(|found| cases.extend(found)).err());
    }
    println!("{}", report::case_table(&cases));
    if let Some(path) = &args.json {
        report::write_json(path, &cases)?;
    }
    problems.into_iter().next().map_or(Ok(()), Err)
}

impl Args {
    /// How to run blockd, if it is to run.
    fn blockd_options(&self) -> Result<Option<BlockdOptions>> {
        if self.peers_only {
            return Ok(None);
        }
        let mut options = match &self.blockd {
            Some(program) => BlockdOptions::at(program.clone()),
            None => BlockdOptions::beside_us()?,
        };
        options.serve_args = self.serve_arg.clone();
        Ok(Some(options))
    }
}

struct Bench {
    servers: Vec<Server>,
    fio: Fio,
    pool: Pool,
    rounds: usize,
    measured: Duration,
    tcp: bool,
    seed: u64,
    some_servers_only: bool,
}

impl Bench {
    fn prepare(args: &Args, blockd: Option<&BlockdOptions>, dir: &Path) -> Result<Self> {
        let mut kinds = vec![
            Kind::NbdkitMemory,
            Kind::NbdkitFile,
            Kind::QemuNbd { cache: "writeback", aio: "threads" },
            Kind::QemuNbd { cache: "none", aio: "io_uring" },
        ];
        if let Some(options) = blockd {
            kinds.insert(0, Kind::Blockd(options.clone()));
        }
        let mut bench = Self {
            servers: Vec::new(),
            fio: Fio::prepare(dir, VOLUME_BYTES)?,
            pool: Pool::new(1 << 20, 1),
            rounds: args.rounds.unwrap_or(if args.quick { 3 } else { 5 }),
            measured: Duration::from_secs_f64(args.seconds.unwrap_or(if args.quick { 0.7 } else { 3.0 })),
            tcp: args.tcp,
            seed: 0,
            some_servers_only: !args.server.is_empty(),
        };
        kinds.retain(|kind| args.server.is_empty() || args.server.iter().any(|name| kind.name().contains(name)));
        for kind in kinds {
            let server =
                Server::create(kind.clone(), &dir.join(kind.name().replace([' ', '/'], "-")), VOLUME_BYTES, args.tcp)?;
            bench.servers.push(server);
            let index = bench.servers.len() - 1;
            bench.fill(index).with_context(|| format!("filling the volume of {}", kind.name()))?;
        }
        Ok(bench)
    }

    /// Writes the whole volume once, so that no server answers from holes.
    fn fill(&mut self, index: usize) -> Result<()> {
        let workload = Workload {
            pattern: Pattern::SequentialWrite,
            block_bytes: 1 << 20,
            depth: 4,
            connections: 1,
            span_bytes: VOLUME_BYTES,
        };
        self.load(index, &workload, Until::Operations(VOLUME_BYTES >> 20))?;
        self.settle(index)
    }

    fn load(&mut self, index: usize, workload: &Workload, until: Until) -> Result<load::Outcome> {
        self.seed += 1;
        let server = &self.servers[index];
        load::run(server.endpoint(), server.export(), workload, until, &self.pool, self.seed)
            .with_context(|| format!("driving {}, which said:\n{}", server.name(), server.log_tail()))
    }

    /// Lets the server bring what it was given to its final place.
    fn settle(&self, index: usize) -> Result<()> {
        let server = &self.servers[index];
        server.connect()?.flush()?;
        if let Kind::Blockd(options) = server.kind() {
            server.wait_destaged(options, SETTLE_TIMEOUT)?;
        }
        Ok(())
    }

    fn ask(&mut self, question: &Question) -> Result<Vec<Case>> {
        let mut samples: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
        let mut latencies: BTreeMap<&'static str, Histogram> = BTreeMap::new();
        for _ in 0..self.rounds {
            for index in 0..self.servers.len() {
                if question.workload.pattern == Pattern::RandomRead {
                    self.warm(index, &question.workload)?;
                }
                let until = Until::Time { warm_up: WARM_UP, measured: self.measured };
                let outcome = self.load(index, &question.workload, until)?;
                let name = self.servers[index].name();
                samples.entry(name).or_default().push(outcome.per_second());
                latencies.entry(name).or_default().merge(&outcome.latency);
                if question.workload.pattern.writes() {
                    self.settle(index)?;
                }
            }
            for job in question.fio.iter().filter(|_| !self.some_servers_only) {
                let value = self.fio.run(*job, self.measured)?;
                samples.entry(job.name()).or_default().push(value);
            }
        }
        let values: BTreeMap<&str, f64> = samples.into_iter().map(|(name, samples)| (name, median(samples))).collect();
        let name = format!("{}{}", question.name, if self.tcp { ", tcp" } else { "" });
        let ours = values.get("blockd").copied();
        let mut cases = Vec::new();
        for (against, target) in question.targets {
            let peer = values
                .iter()
                .filter(|(name, _)| against.includes(name))
                .max_by(|a, b| a.1.total_cmp(b.1))
                .map(|(name, value)| (*name, *value));
            let peer = match peer {
                Some(peer) => peer,
                None if self.some_servers_only => ("none", f64::NAN),
                None => anyhow::bail!("no peer ran for {against:?}"),
            };
            let title = match against {
                Against::Disk => format!("{name}, by the disk"),
                _ => name.clone(),
            };
            let mut case = Case::new(title, question.unit(), ours, peer, Some(*target), Better::More);
            if *against != Against::Disk {
                case.values = values.iter().map(|(name, value)| (name.to_string(), *value)).collect();
                case.latency_p99_us =
                    latencies.iter().map(|(name, latency)| (name.to_string(), latency.quantile_us(0.99))).collect();
            }
            let line: Vec<String> =
                values.iter().map(|(name, value)| format!("{name} {}", report::number(*value))).collect();
            if *against != Against::Disk {
                eprintln!("{name} ({}): {}", case.unit, line.join(", "));
            }
            cases.push(case);
        }
        Ok(cases)
    }

    /// Reads the hot range once, so that whoever caches has cached it.
    fn warm(&mut self, index: usize, workload: &Workload) -> Result<()> {
        let workload =
            Workload { pattern: Pattern::SequentialRead, block_bytes: 1 << 20, depth: 4, connections: 1, ..*workload };
        let count = Until::Operations(workload.span_bytes >> 20);
        self.load(index, &workload, count).map(drop)
    }
}
