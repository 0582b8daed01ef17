//! `blockd status`: two samples of what the daemon counts, and what lies between them.
//!
//! [`rates`] computes, [`render`] shows; both are pure.

mod rates;
mod render;

use std::io::IsTerminal;
use std::time::Duration;

use clap::Args;
use serde::Serialize;

use super::ClientArgs;
use crate::admin::api::Status;
use crate::program::{print, print_json};
use rates::{Rates, rates};

/// Time between the two samples of a single look.
const GLANCE: Duration = Duration::from_millis(500);

#[derive(Args, Debug)]
#[command(after_help = "\
DIRTY is what is not in the bucket yet, BEHIND how old the oldest of it is: what the loss of this host would cost.
LOG is how full the write-ahead log is; FULL IN says when writers will have to wait if nothing changes.
HITS are blocks read from memory. Prices are list prices of requests; storage and traffic come on top.")]
pub(super) struct StatusArgs {
    /// Go on, with a new look every so many seconds [default: 2]
    #[arg(long, short, value_name = "SECS", num_args = 0..=1, default_missing_value = "2", value_parser = clap::value_parser!(u64).range(1..=3600))]
    watch: Option<u64>,

    #[command(flatten)]
    client: ClientArgs,
}

/// What `--json` prints.
#[derive(Serialize)]
struct Report<'a> {
    #[serde(flatten)]
    status: &'a Status,
    rates: &'a Rates,
}

pub(super) async fn run(args: StatusArgs) -> anyhow::Result<()> {
    let client = args.client.client();
    let mut before = client.status().await?;
    let mut pause = GLANCE;
    loop {
        tokio::time::sleep(pause).await;
        let now = client.status().await?;
        let rates = rates(&before, &now);
        show(&args, &now, &rates)?;
        let Some(seconds) = args.watch else { return Ok(()) };
        pause = Duration::from_secs(seconds);
        before = now;
    }
}

fn show(args: &StatusArgs, status: &Status, rates: &Rates) -> anyhow::Result<()> {
    let report = Report { status, rates };
    match (args.client.json, args.watch) {
        (true, None) => print_json(&report),
        // One line per look, for programs that read along.
        (true, Some(_)) => print(&format!("{}\n", serde_json::to_string(&report)?)),
        (false, Some(_)) if std::io::stdout().is_terminal() => {
            // Home, then clear what is left below: no flicker.
            let text = render::render(status, rates).replace('\n', "\x1b[K\n");
            print(&format!("\x1b[H{text}\x1b[J"))
        }
        (false, _) => print(&render::render(status, rates)),
    }
}
