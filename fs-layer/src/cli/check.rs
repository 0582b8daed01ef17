//! `fsd check`.

use anyhow::bail;
use clap::Args;

use super::open::{self, Access};
use crate::config::Place;

#[derive(Args, Debug)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    place: Place,

    /// Repair what can be repaired
    #[arg(long)]
    repair: bool,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &CheckArgs) -> anyhow::Result<()> {
    super::LogLevel::Warn.start();
    let opened = open::disk(&args.place, if args.repair { Access::Write } else { Access::Read })?;
    let _ = args.json;
    opened.close()?;
    bail!("not there yet")
}
