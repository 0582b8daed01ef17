//! `bench`: one command per question, blockd beside its peers in the same run.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;

/// Measures blockd beside what one might use instead.
#[derive(Parser)]
#[command(version)]
enum Command {
    /// NBD servers on one disk: random and sequential, flushed and not.
    Nbd(bench::nbd::Args),
    /// blockd over NVMe/TCP beside blockd over NBD.
    Nvme(bench::nvme::Args),
    /// The load generator alone, on an NBD server that runs already.
    Load(bench::drive::Args),
    /// Opening a volume with a large table on a host that has nothing of it.
    Open(bench::open::OpenArgs),
    /// What checkpoints of the table cost under random 4 KiB writes.
    Checkpoint(bench::open::CostArgs),
    /// What a volume asks of the bucket: PUTs per GiB, requests at rest, cold reads.
    Cost(bench::cost::Args),
    /// Writes that are answered when the bucket has them, with the bucket near and far.
    Fsync(bench::fsync::Args),
    /// Files: durable creates, stats, listings, small and large files, on directories of several mounted filesystems.
    Fs(bench::fs::Args),
    /// fsd and Ganesha over NFSv4.1, on one disk, without a mount.
    Nfs(bench::nfs::Args),
    /// Turn JSON files of other commands into Markdown on standard output.
    Render {
        /// What was written with --json.
        #[arg(required = true)]
        files: Vec<PathBuf>,
    },
}

fn main() -> ExitCode {
    match run(Command::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(command: Command) -> Result<()> {
    match command {
        Command::Nbd(args) => bench::nbd::run(&args),
        Command::Nvme(args) => bench::nvme::run(&args),
        Command::Load(args) => bench::drive::run(&args),
        Command::Open(args) => bench::open::open(&args),
        Command::Checkpoint(args) => bench::open::cost(&args),
        Command::Cost(args) => bench::cost::run(&args),
        Command::Fsync(args) => bench::fsync::run(&args),
        Command::Fs(args) => bench::fs::run(&args),
        Command::Nfs(args) => bench::nfs::run(&args),
        Command::Render { files } => {
            let mut cases = Vec::new();
            for file in &files {
                cases.extend(bench::report::read_json(file)?);
            }
            print!("{}", bench::report::render(&cases));
            Ok(())
        }
    }
}
