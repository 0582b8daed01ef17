//! The command line: what people type, and what they are told.
//!
//! `fsd serve` and `fsd mount` run until stopped; `fsd status` and `fsd snapshot` ask a running one over its admin socket; `fsd mkfs` and `fsd check`
//! want the disk for themselves. Results go to stdout, as text or with `--json` as JSON; errors go to stderr as one line that
//! says what failed, on what, and what to do. Exit codes: 0 done, 1 failed (and for `check`: damage is left), 2 wrong usage.

mod background;
mod check;
mod mkfs;
mod mount;
mod nfs;
mod open;
mod running;
mod serve;
mod service;
mod signals;
mod snapshot;
mod status;

use std::ffi::OsString;
use std::io::{self, Write};
use std::process::ExitCode;

use blockd::program::{StdoutClosed, explain};
use clap::{CommandFactory, FromArgMatches, Parser, Subcommand, ValueEnum};
use serde::{Deserialize, Serialize};

const EXAMPLES: &str = "\
Examples:
  fsd mkfs                                         make a filesystem in a bucket in ./fsd-data
  fsd mount /mnt/fs --daemon                       have it as a directory of this machine
  fsd serve --nfs 0.0.0.0:2049                     have others mount it: mount -t nfs4 HOST:/ /mnt
  fsd mkfs --store s3://bucket/prefix              the same on S3
  fsd mkfs --nbd nbd://10.0.0.5:10809/disk         on a volume of a blockd elsewhere
  fsd status --watch                               see what it does
  fsd snapshot create monday                       keep the tree as it is now, in .snapshots/monday
  fsd check                                        look whether everything on the disk is sound

Where the disk is, is said in the same way to each command: --store, --nbd, --disk, or nothing for a bucket in --data.";

/// A shared POSIX filesystem on a blockd volume, mounted over FUSE and exported over NFS.
#[derive(Parser, Debug)]
#[command(name = "fsd", version, after_help = EXAMPLES, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Make a filesystem
    Mkfs(mkfs::MkfsArgs),
    /// Have the filesystem as a directory of this machine, over FUSE
    Mount(Box<mount::MountArgs>),
    /// Export the filesystem over NFS
    Serve(Box<serve::ServeArgs>),
    /// Look whether everything on the disk is sound, and repair what can be
    Check(check::CheckArgs),
    /// Show what a running fsd does
    Status(status::StatusArgs),
    /// Make, list and delete snapshots, which are in .snapshots of the filesystem
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
}

/// What is logged to stderr.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum LogLevel {
    /// What went wrong.
    Error,
    /// And what may.
    Warn,
    /// And what happens.
    #[default]
    Info,
    /// And how.
    Debug,
    /// Everything.
    Trace,
}

impl LogLevel {
    fn start(self) {
        let level = match self {
            LogLevel::Error => tracing::Level::ERROR,
            LogLevel::Warn => tracing::Level::WARN,
            LogLevel::Info => tracing::Level::INFO,
            LogLevel::Debug => tracing::Level::DEBUG,
            LogLevel::Trace => tracing::Level::TRACE,
        };
        // A second start in one process keeps the first.
        let _ = tracing_subscriber::fmt()
            .with_writer(io::stderr)
            .with_max_level(level)
            .with_ansi(io::IsTerminal::is_terminal(&io::stderr()))
            .try_init();
    }
}

/// Runs the command `args` (the program's name first) and returns its exit code.
pub fn run(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let parsed =
        Cli::command().try_get_matches_from(args).and_then(|matches| Ok((Cli::from_arg_matches(&matches)?, matches)));
    let (cli, matches) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => {
            // Help and version are "errors" that go to stdout. A closed pipe is no reason to complain.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let (_, matches) = matches.subcommand().expect("a command that was parsed");
    let result = match cli.command {
        Command::Mkfs(args) => mkfs::run(&args),
        Command::Mount(args) => mount::run(*args, matches),
        Command::Serve(args) => serve::run(*args, matches),
        Command::Check(args) => check::run(&args),
        Command::Status(args) => status::run(&args),
        Command::Snapshot(command) => snapshot::run(&command),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<StdoutClosed>() => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "fsd: {}", explain(&error));
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests;
