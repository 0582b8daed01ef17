//! `bench fs`: what programs do with files, in directories of several mounted filesystems, in turn.
//!
//! It knows nothing of what is mounted where: the first directory is ours, the others are the peers'. scripts/bench-fs mounts
//! fsd and its peers on one disk and calls it.

mod work;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use crate::report::{self, Better, Case};
use work::{Scale, Work};

/// Options of `bench fs`.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// NAME=DIR: a directory of a mounted filesystem; the first is ours, the others are compared with it.
    #[arg(long, value_name = "NAME=DIR", required = true, value_parser = place)]
    dir: Vec<Place>,
    /// How often everything is done; the median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// All counts and sizes by this, in percent.
    #[arg(long, value_name = "PERCENT", default_value_t = 100)]
    scale: u64,
    /// Run by sh, with the NAME as $1, before what is called cold; for filesystems whose caches are not the kernel's, which are
    /// dropped anyway (that needs root)
    #[arg(long, value_name = "COMMAND")]
    cold: Option<String>,
    /// Only cases whose name holds this; may be repeated.
    #[arg(long, value_name = "TEXT")]
    only: Vec<String>,
    /// Write the cases to this file as a JSON list.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A filesystem to measure.
#[derive(Clone, Debug)]
struct Place {
    name: String,
    dir: PathBuf,
}

fn place(text: &str) -> Result<Place, String> {
    let (name, dir) = text.split_once('=').ok_or("NAME=DIR is wanted")?;
    Ok(Place { name: name.to_owned(), dir: dir.into() })
}

/// Measures and prints.
pub fn run(args: &Args) -> Result<()> {
    ensure!(args.rounds > 0, "at least one round");
    let scale = Scale::new(args.scale);
    let mut cases = Vec::new();
    for work in Work::ALL {
        let name = work.name(&scale);
        if !args.only.is_empty() && !args.only.iter().any(|wanted| name.contains(wanted.as_str())) {
            continue;
        }
        let mut values: Vec<Vec<f64>> = vec![Vec::new(); args.dir.len()];
        for round in 0..args.rounds {
            // In turn, each round in another order, so that what the machine does meanwhile hits all alike.
            for at in 0..args.dir.len() {
                let at = (at + round) % args.dir.len();
                let place = &args.dir[at];
                let start = Instant::now();
                let value = measure(*work, &scale, place, round, args.cold.as_deref())
                    .with_context(|| format!("{name}, in {} ({})", place.dir.display(), place.name))?;
                values[at].push(value);
                let (value, unit) = (report::number(value), work.unit());
                eprintln!("{name}: {} {value} {unit} (round {}, {:.1?})", place.name, round + 1, start.elapsed());
            }
        }
        let medians: Vec<f64> = values.into_iter().map(report::median).collect();
        let all: BTreeMap<String, f64> =
            args.dir.iter().map(|place| place.name.clone()).zip(medians.iter().copied()).collect();
        for (place, peer) in args.dir.iter().zip(&medians).skip(1) {
            let peer = (place.name.as_str(), *peer);
            let mut case = Case::new(&name, work.unit(), Some(medians[0]), peer, work.target(), Better::More);
            case.values = all.clone();
            cases.push(case);
        }
        if args.dir.len() == 1 {
            println!("{name}: {} {}", report::number(medians[0]), work.unit());
        }
    }
    print!("{}", report::case_table(&cases));
    args.json.as_ref().map_or(Ok(()), |json| report::write_json(json, &cases))
}

fn measure(work: Work, scale: &Scale, place: &Place, round: usize, command: Option<&str>) -> Result<f64> {
    let dir = place.dir.join(format!("bench-{}-{round}", std::process::id()));
    std::fs::create_dir(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    let value = work.run(scale, &dir, &|| make_cold(place, command));
    let removed = std::fs::remove_dir_all(&dir).with_context(|| format!("cannot remove {}", dir.display()));
    let value = value?;
    removed?;
    Ok(value)
}

fn make_cold(place: &Place, command: Option<&str>) -> Result<()> {
    if let Some(command) = command {
        let status = Command::new("sh").args(["-c", command, "cold", &place.name]).status().context("cannot run sh")?;
        ensure!(status.success(), "{command} failed for {}: {status}", place.name);
    }
    drop_caches()
}

/// Has the kernel forget what it can read again.
///
/// # Errors
/// Without the right to.
pub(crate) fn drop_caches() -> Result<()> {
    // SAFETY: it takes nothing and cannot fail.
    unsafe { libc::sync() };
    std::fs::write("/proc/sys/vm/drop_caches", "3").context("cannot drop the kernel's caches; run as root")
}
