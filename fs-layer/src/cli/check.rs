//! `fsd check`.

use std::fmt::Write as _;
use std::io::IsTerminal;

use anyhow::{Context, bail};
use blockd::config::ByteSize;
use blockd::program::{print, print_json};
use clap::Args;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

use super::open::{self, Access};
use crate::check::{CheckOptions, Progress, Report, check};
use crate::config::Place;
use crate::disk::BLOCK_BYTES;

/// Problems printed as text; JSON has all of them.
const SHOWN_MAX: usize = 100;

#[derive(Args, Debug)]
#[command(after_help = "\
The filesystem must not be mounted or exported meanwhile. Without --repair nothing is changed: the journal is replayed in memory only.
A check is not needed after a crash, as every start replays the journal; it is for disks that may have lost or changed something.

Exit codes: 0 everything is sound, or was repaired; 1 damage is left, or the check could not be done.")]
pub(super) struct CheckArgs {
    #[command(flatten)]
    place: Place,

    /// Mend what follows from the rest without a doubt: counts of links, blocks and files, parents of directories. Removes nothing
    #[arg(long)]
    repair: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// What `--json` prints.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Found<'a> {
    clean: bool,
    files: u64,
    directories: u64,
    orphans: u64,
    stored_bytes: u64,
    problems: Vec<FoundProblem<'a>>,
}

#[derive(Serialize)]
struct FoundProblem<'a> {
    ino: Option<u64>,
    what: &'a str,
    repaired: bool,
}

pub(super) fn run(args: &CheckArgs) -> anyhow::Result<()> {
    super::LogLevel::Warn.start();
    let opened = open::disk(&args.place, if args.repair { Access::Write } else { Access::Read })?;
    let description = opened.description.clone();
    let bar = progress_bar(args.json);
    let options = CheckOptions { repair: args.repair };
    let report = check(&*opened.disk, options, &mut |Progress { done, total }| {
        bar.set_length(total);
        bar.set_position(done);
    });
    bar.finish_and_clear();
    let report = report.with_context(|| format!("cannot check {description}"));
    let report = match report {
        Ok(report) => report,
        Err(error) => {
            // The first error is the one that counts.
            let _ = opened.close();
            return Err(error);
        }
    };
    opened.close()?;
    if args.json {
        print_json(&found(&report))?;
    } else {
        print(&text(&report))?;
    }
    let left = report.problems.iter().filter(|problem| !problem.repaired).count();
    if left > 0 {
        let hint = if args.repair {
            "what it says of files can't be known; restore them from a snapshot"
        } else {
            "--repair mends what can be mended"
        };
        bail!("{description}: {left} problems are left; {hint}");
    }
    Ok(())
}

fn progress_bar(quiet: bool) -> ProgressBar {
    let bar = ProgressBar::new(0);
    if quiet || !std::io::stderr().is_terminal() {
        bar.set_draw_target(ProgressDrawTarget::hidden());
    }
    let style = ProgressStyle::with_template("{bar:40} {percent}% of the inodes, {eta} to go");
    bar.with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

fn found(report: &Report) -> Found<'_> {
    let problems = report.problems.iter();
    Found {
        clean: report.is_clean(),
        files: report.files,
        directories: report.directories,
        orphans: report.orphans,
        stored_bytes: report.blocks * BLOCK_BYTES as u64,
        problems: problems
            .map(|problem| FoundProblem {
                ino: problem.ino.map(|ino| ino.0),
                what: &problem.what,
                repaired: problem.repaired,
            })
            .collect(),
    }
}

fn text(report: &Report) -> String {
    let mut text = String::new();
    for problem in report.problems.iter().take(SHOWN_MAX) {
        let about = problem.ino.map_or_else(String::new, |ino| format!("inode {}: ", ino.0));
        let _ = writeln!(text, "{about}{}{}", problem.what, if problem.repaired { " (repaired)" } else { "" });
    }
    if report.problems.len() > SHOWN_MAX {
        let _ = writeln!(text, "and {} more; --json has all", report.problems.len() - SHOWN_MAX);
    }
    let stored = ByteSize(report.blocks * BLOCK_BYTES as u64);
    let orphans = if report.orphans > 0 {
        format!(", {} without names that the next start frees", report.orphans)
    } else {
        String::new()
    };
    let sound = if report.is_clean() { "all sound" } else { "damaged" };
    let _ = writeln!(
        text,
        "{sound}: {} files, {} of them directories{orphans}; {stored} stored",
        report.files, report.directories
    );
    text
}
