//! `bench nfs`: fsd beside Ganesha, both on this machine and on one disk, driven by a client of NFSv4.1 of our own.
//!
//! The kernel's client is not needed, and says nothing that this one does not say; what it keeps for itself is not measured.
//! scripts/bench-nfs measures with the kernel's client, in an emulated machine, and knfsd as well.

mod client;
mod server;
mod work;

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};

use crate::report::{self, Better, Case};
use crate::server::process;
use server::{Kind, Server};
use work::{Filled, Scale, Work};

/// Options of `bench nfs`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// How often everything is done; the median counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// All counts and sizes by this, in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 100)]
    scale: u64,
    /// The same as --rounds 3 --scale 20.
    #[arg(long, conflicts_with_all = ["rounds", "scale"])]
    quick: bool,
    /// Only cases whose name holds this; may be repeated.
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Let fsd keep its tree in a bucket, a directory of the same disk, with the block engine in its process, and not in a file.
    #[arg(long)]
    bucket: bool,
    /// Without Ganesha.
    #[arg(long)]
    alone: bool,
    /// Work in a new directory inside this one, on the disk to be measured; must not be a tmpfs.
    #[arg(long, value_name = "DIR", default_value = "target")]
    dir: PathBuf,
    /// The fsd program; by default the one built beside this one.
    #[arg(long, value_name = "PROGRAM")]
    fsd: Option<PathBuf>,
    /// Write the cases to this file as a JSON list.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// Measures and prints.
pub fn run(args: &Args) -> Result<()> {
    let (rounds, percent) = if args.quick { (3, 20) } else { (args.rounds, args.scale) };
    ensure!(rounds > 0, "at least one round");
    let scale = Scale::new(percent);
    let fsd = match &args.fsd {
        Some(fsd) => fsd.clone(),
        None => process::beside_us("fsd")?,
    };
    std::fs::create_dir_all(&args.dir)?;
    let dir = tempfile::Builder::new().prefix("bench-nfs-").tempdir_in(&args.dir)?;
    let kinds = if args.alone { &[Kind::Fsd][..] } else { &[Kind::Fsd, Kind::Ganesha] };
    let mut servers: Vec<(Server, Filled)> = Vec::new();
    for kind in kinds {
        let server = Server::create(*kind, &fsd, args.bucket, &dir.path().join(kind.name()))?;
        let filled = work::fill(&server, &scale).with_context(|| format!("cannot fill {}", kind.name()))?;
        servers.push((server, filled));
    }
    let mut cases = Vec::new();
    for work in Work::ALL {
        let name = work.name(&scale);
        if !args.only.is_empty() && !args.only.iter().any(|wanted| name.contains(wanted.as_str())) {
            continue;
        }
        let mut values = vec![Vec::new(); servers.len()];
        for round in 0..rounds {
            for at in 0..servers.len() {
                // Neither is always the first.
                let at = (at + round) % servers.len();
                let (server, filled) = &mut servers[at];
                let kind = server.kind();
                let value = work.run(&scale, server, filled, round);
                values[at].push(value.with_context(|| format!("{name}, {}", kind.name()))?);
            }
        }
        let ours = report::median(values[0].clone());
        let Some(theirs) = values.get(1) else {
            println!("{name}: {} {}", report::number(ours), work.unit());
            continue;
        };
        // Of rounds that followed each other, so that what else the machine did weighs on both alike.
        let ratio = report::median(values[0].iter().zip(theirs).map(|(ours, theirs)| ours / theirs).collect());
        let peer = report::median(theirs.clone());
        eprintln!(
            "{name} ({}): fsd {}, Ganesha {}, ratio {ratio:.2}",
            work.unit(),
            report::number(ours),
            report::number(peer)
        );
        let peer = (Kind::Ganesha.name(), peer);
        let mut case = Case::new(&name, work.unit(), Some(ours), peer, work.target(), Better::More);
        (case.ratio, case.met) = (Some(ratio), work.target().map(|target| ratio >= target));
        case.values = BTreeMap::from([(Kind::Fsd.name().into(), ours), (Kind::Ganesha.name().into(), peer.1)]);
        cases.push(case);
    }
    print!("{}", report::case_table(&cases));
    args.json.as_ref().map_or(Ok(()), |json| report::write_json(json, &cases))
}
