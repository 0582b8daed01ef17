//! `nbd-record`: records what a client writes over NBD, and makes images as of each flush of it.

use std::path::PathBuf;
use std::process::ExitCode;

use bench::record::{proxy, replay};
use clap::{Parser, Subcommand};

/// Records what a kernel writes over NBD, and looks at what a power cut would have left.
#[derive(Parser)]
#[command(version)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Stand between clients and a server, until killed.
    Proxy {
        /// HOST:PORT of the server.
        upstream: String,
        /// Where the recording goes.
        recording: PathBuf,
        /// A file for the addresses, for NBD and for marks, once there.
        addresses: PathBuf,
    },
    /// Make images as of the recording's flushes and have each checked.
    Replay {
        /// The recording.
        recording: PathBuf,
        /// A directory for images.
        dir: PathBuf,
        /// Size of the device in bytes.
        #[arg(long)]
        size: u64,
        /// Only flushes after this mark count.
        #[arg(long)]
        after: String,
        /// Look at so many of the flushes; 0 for all.
        #[arg(long, default_value_t = 0)]
        points: usize,
        /// A program that gets the paths of an image and of the marks before it.
        #[arg(long)]
        check: PathBuf,
    },
}

fn main() -> ExitCode {
    let result = match Args::parse().command {
        Command::Proxy { upstream, recording, addresses } => proxy::run(&upstream, &recording, &addresses),
        Command::Replay { recording, dir, size, after, points, check } => {
            replay::run(&replay::Plan { recording, dir, size, after, points, check }).map(|outcome| {
                println!("{} of {} flushes leave what they must", outcome.checked, outcome.flushes);
            })
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("nbd-record: {error:#}");
            ExitCode::FAILURE
        }
    }
}
