//! The command line: what people type, and what they are told.
//!
//! `blockd serve` is the daemon; every other command talks to a running one over its admin socket ([`client`]).
//! Results go to stdout, as text or with `--json` as JSON; errors go to stderr as one line that says what failed, on
//! what, and what to do. Exit codes: 0 done, 1 failed, 2 wrong usage.

mod attach;
mod check;
mod client;
mod confirm;
mod connect_info;
mod ownership;
mod secret;
mod serve;
mod snapshot;
mod status;
mod transfer;
mod volume;

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory, FromArgMatches, Parser, Subcommand};

pub use client::Client;

use crate::program::{StdoutClosed, explain};

const EXAMPLES: &str = "\
Examples:
  blockd serve --data /srv/blockd                  start with nothing but a directory
  blockd volume create disk --size 100GiB          make a volume
  blockd attach disk                               make it /dev/nbd0 of this machine
  blockd status --watch                            see what is not in the bucket yet
  blockd volume import vm debian.qcow2 --create    make a volume of an image

Commands find the daemon by its data directory: say --data, or set BLOCKD_DATA.";

/// Durable block volumes on object storage, exported over NBD and NVMe/TCP.
#[derive(Parser, Debug)]
#[command(name = "blockd", version, after_help = EXAMPLES, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand, Debug)]
enum Command {
    /// Run the daemon
    Serve(Box<serve::ServeArgs>),
    /// Create, list, show, resize, delete, import and export volumes
    #[command(subcommand)]
    Volume(volume::VolumeCommand),
    /// Make, list and delete snapshots: VOLUME@NAME
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Make a volume a block device of this machine, /dev/nbdN, which outlives restarts of the daemon
    Attach(attach::AttachArgs),
    /// Take a volume's block device away
    Detach(attach::DetachArgs),
    /// Print what to type on a host to attach a volume over NVMe/TCP
    ConnectInfo(connect_info::ConnectInfoArgs),
    /// Show what the daemon does: per volume what is not in the bucket yet, speed, hits, requests and their price
    Status(status::StatusArgs),
}

/// How a command finds the daemon and says what it has to say.
#[derive(Args, Clone, Debug)]
struct ClientArgs {
    /// Data directory of the daemon
    #[arg(
        long,
        value_name = "DIR",
        default_value = "blockd-data",
        env = "BLOCKD_DATA",
        help_heading = "Daemon and output"
    )]
    data: PathBuf,

    /// Admin socket of the daemon [default: <data>/admin.sock]
    #[arg(long, value_name = "PATH", env = "BLOCKD_ADMIN", help_heading = "Daemon and output")]
    admin: Option<PathBuf>,

    /// Print JSON
    #[arg(long, help_heading = "Daemon and output")]
    json: bool,
}

impl ClientArgs {
    fn client(&self) -> Client {
        Client::new(crate::config::admin_path(&self.data, self.admin.as_deref()), &self.data)
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
    let result = match cli.command {
        Command::Serve(args) => {
            let matches = matches.subcommand_matches("serve").expect("the command that was parsed");
            serve::run(*args, matches)
        }
        Command::Volume(command) => block_on(volume::run(command)),
        Command::Snapshot(command) => block_on(snapshot::run(command)),
        Command::Attach(args) => attach::attach(args),
        Command::Detach(args) => attach::detach(&args),
        Command::ConnectInfo(args) => block_on(connect_info::run(args)),
        Command::Status(args) => block_on(status::run(args)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) if error.is::<StdoutClosed>() => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "blockd: {}", explain(&error));
            ExitCode::FAILURE
        }
    }
}

fn block_on<T>(work: impl Future<Output = anyhow::Result<T>>) -> anyhow::Result<T> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(work)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_commands_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_setting_of_serve_stands_under_a_heading() {
        let command = Cli::command();
        let serve = command.find_subcommand("serve").unwrap();
        for arg in serve.get_arguments() {
            let id = arg.get_id().as_str();
            assert!(arg.get_help().is_some(), "{id}");
            let plain = ["config", "print_config", "accept_store", "help"].contains(&id);
            assert!(plain || arg.get_help_heading().is_some(), "{id}");
        }
    }

    #[test]
    fn commands_read_as_documented() {
        for line in [
            "blockd serve --data /d --store s3://b/p --s3-path-style --nbd-tcp none",
            "blockd volume create disk --size 10GiB --durability object --codec zstd:3",
            "blockd volume create disk --size 10GiB --encrypt --passphrase-file /p",
            "blockd volume create disk --size 10GiB --encrypt --key-file /k",
            "blockd volume import disk image.raw --create --encrypt",
            "blockd serve --key-file a=/k --key-file b=/l --passphrase-file c=/p",
            "blockd volume unlock disk --key-file /k",
            "blockd volume passwd disk --old-passphrase-file /p --key-file /k",
            "blockd volume set disk --codec zstd:7 --durability object",
            "blockd volume list --json --data /d",
            "blockd volume show disk",
            "blockd volume open disk",
            "blockd volume open disk --force",
            "blockd volume release disk",
            "blockd volume release disk --force --json",
            "blockd volume stranded list",
            "blockd volume stranded export disk lost.raw",
            "blockd volume stranded export disk copy.raw --apply --epoch 3",
            "blockd volume stranded discard disk --yes",
            "blockd serve --lease 30s --release-on-stop",
            "blockd volume rebuild disk",
            "blockd volume check disk --data --repair --data-dir /d --store s3://b --json",
            "blockd volume resize disk 20GiB",
            "blockd volume resize disk 1GiB --shrink",
            "blockd volume delete disk --yes --force",
            "blockd volume import disk image.raw --create --size 20GiB",
            "blockd volume export disk image.qcow2 --format qcow2 --force",
            "blockd snapshot create disk@monday",
            "blockd volume clone disk@monday copy --json",
            "blockd volume clone disk copy --key-file /k",
            "blockd volume restore disk@monday --yes",
            "blockd snapshot list --json",
            "blockd snapshot list disk",
            "blockd snapshot delete disk@monday",
            "blockd attach disk",
            "blockd attach disk /dev/nbd3 --server 10.0.0.5:10809 --connections 8 --timeout 30s --dead-timeout 10m",
            "blockd attach disk --server unix:/run/nbd.sock --block-size 512 --foreground --json",
            "blockd attach --ublk disk",
            "blockd attach --ublk disk /dev/ublkb2 --connections 2",
            "blockd detach disk",
            "blockd detach /dev/nbd3 --force",
            "blockd connect-info disk",
            "blockd connect-info disk --address 10.0.0.7 --json",
            "blockd serve --nvme 0.0.0.0:4420 --nvme-host disk=nqn.2026-01.com.example:h --nvme-nqn disk=nqn.2026-01.com.example:d",
            "blockd status",
            "blockd status --watch",
            "blockd status --watch 5 --json",
        ] {
            Cli::try_parse_from(line.split(' ')).unwrap_or_else(|e| panic!("{line}: {e}"));
        }
    }

    #[test]
    fn wrong_usage_is_exit_code_2() {
        for line in [
            "blockd",
            "blockd volume create disk",
            "blockd volume create disk --size many",
            "blockd volume create disk --size 1GiB --durability replica",
            "blockd volume create a@b --size 1GiB",
            "blockd snapshot create disk",
            "blockd snapshot create disk@a@b",
            "blockd volume create disk --size 1GiB --codec gzip",
            "blockd volume import disk f --size 1GiB",
            "blockd volume create disk --size 1GiB --key-file /k",
            "blockd volume create disk --size 1GiB --encrypt --key-file /k --passphrase-file /p",
            "blockd attach disk /dev/sda",
            "blockd attach --ublk disk --timeout 1s",
            "blockd attach disk --block-size 1000",
            "blockd attach disk --connections 0",
            "blockd attach disk --server nowhere",
            "blockd volume set disk",
            "blockd volume set disk --codec gzip",
            "blockd serve --key-file k",
            "blockd serve --nvme-host disk=me",
            "blockd serve --nvme 4420",
            "blockd status --watch never",
            "blockd serve --reactors 0",
            "blockd serve --log-size 5parsecs",
        ] {
            let error = Cli::try_parse_from(line.split(' ')).expect_err(line);
            assert_eq!(error.exit_code(), 2, "{line}");
        }
    }
}
