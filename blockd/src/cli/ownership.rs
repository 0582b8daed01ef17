//! `blockd volume open`, `release` and `stranded`: which host has a volume, and what it left behind.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use clap::{Args, Subcommand};
use indicatif::{ProgressBar, ProgressDrawTarget};

use super::volume::{parse_name, said};
use super::{Client, ClientArgs, confirm};
use crate::admin::api::{ExportStranded, StrandedStatus, VolumeStatus};
use crate::program::text::{Align, Table, bytes, date};

/// Between two looks at how far it is.
const LOOK: Duration = Duration::from_millis(500);

#[derive(Args, Debug)]
#[command(
    after_help = "Without --force a volume is taken only when nobody holds it: it was released, or its owner's lease ran out.\nA lease that looks expired is watched for a quarter of its duration first."
)]
pub(super) struct OpenArgs {
    /// The volume
    #[arg(value_parser = parse_name)]
    name: String,

    /// Take it from the host that holds it; what that host has not sent to the bucket stays there, cut off
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
#[command(
    after_help = "All of it is in the bucket then, and another host can open it. `blockd volume open` meanwhile calls it off."
)]
pub(super) struct ReleaseArgs {
    /// The volume
    #[arg(value_parser = parse_name)]
    name: String,

    /// Release it even though clients are attached; their requests fail from then on
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Subcommand, Debug)]
pub(super) enum StrandedCommand {
    /// List them, those that keep a volume from being opened here and those that were set aside
    List(ListArgs),
    /// Write them to a file: the blocks at their places in a sparse image, and FILE.list with every write
    Export(ExportArgs),
    /// Set them aside, so that the volume can be opened here again without them
    Discard(DiscardArgs),
}

#[derive(Args, Debug)]
pub(super) struct ListArgs {
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
pub(super) struct ExportArgs {
    /// The volume
    #[arg(value_parser = parse_name)]
    name: String,

    /// The file to make; the daemon writes it
    file: PathBuf,

    /// Write them into FILE, a raw copy of the volume that is there already, instead
    #[arg(long)]
    apply: bool,

    /// Those of this epoch, when there are several
    #[arg(long, value_name = "N")]
    epoch: Option<u64>,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
pub(super) struct DiscardArgs {
    /// The volume
    #[arg(value_parser = parse_name)]
    name: String,

    /// Do not ask
    #[arg(long, short)]
    yes: bool,

    #[command(flatten)]
    client: ClientArgs,
}

pub(super) async fn open(args: OpenArgs) -> anyhow::Result<()> {
    let client = args.client.client();
    let volume = watched(&client, &args.name, args.client.json, client.open(&args.name, args.force)).await?;
    let notice = volume.info.notice.iter().map(|notice| format!("! {notice}\n")).collect::<String>();
    said(&args.client, &volume, &format!("volume {} is open\n{notice}", args.name))
}

pub(super) async fn release(args: ReleaseArgs) -> anyhow::Result<()> {
    let client = args.client.client();
    let volume = watched(&client, &args.name, args.client.json, client.release(&args.name, args.force)).await?;
    let text =
        format!("volume {0} is released: all of it is in the bucket. Elsewhere: blockd volume open {0}\n", args.name);
    said(&args.client, &volume, &text)
}

/// Shows what becomes of a volume while `work` goes on.
async fn watched(
    client: &Client,
    name: &str,
    quiet: bool,
    work: impl Future<Output = anyhow::Result<VolumeStatus>>,
) -> anyhow::Result<VolumeStatus> {
    let target = if quiet { ProgressDrawTarget::hidden() } else { ProgressDrawTarget::stderr() };
    let line = ProgressBar::with_draw_target(None, target);
    let look = async {
        loop {
            tokio::time::sleep(LOOK).await;
            if let Ok(volume) = client.volume(name).await {
                line.set_message(progress(&volume));
                line.tick();
            }
        }
    };
    let done = tokio::select! {
        done = work => done,
        never = look => never,
    };
    line.finish_and_clear();
    done
}

fn progress(volume: &VolumeStatus) -> String {
    let state = volume.info.state.as_str();
    match &volume.stats {
        Some(stats) => format!("{state}: {} still to send", bytes(stats.dirty_bytes)),
        None => state.to_owned(),
    }
}

pub(super) async fn stranded(command: StrandedCommand) -> anyhow::Result<()> {
    match command {
        StrandedCommand::List(args) => {
            let all = args.client.client().stranded().await?;
            said(&args.client, &all, &list(&all))
        }
        StrandedCommand::Export(args) => {
            // The daemon runs in another directory.
            let file = std::path::absolute(&args.file).context("cannot tell the working directory")?;
            let request = ExportStranded { file, apply: args.apply, epoch: args.epoch };
            let done = args.client.client().export_stranded(&args.name, &request).await?;
            let mut text = format!(
                "{} writes, {}, are in {}; the list of them is {}\n",
                done.stranded.writes,
                bytes(done.stranded.bytes),
                request.file.display(),
                done.list.display()
            );
            if done.lost_bytes > 0 {
                text += &format!(
                    "{} of them were copies by reference, of blocks that the bucket does not hold any more: the list calls \
                     them lost\n",
                    bytes(done.lost_bytes)
                );
            }
            said(&args.client, &done, &text)
        }
        StrandedCommand::Discard(args) => {
            if !args.yes {
                let question = format!(
                    "What this host acknowledged of volume {} and never sent to the bucket will not be part of it.",
                    args.name
                );
                confirm::confirm(&question, &args.name)?;
            }
            let moved = args.client.client().discard_stranded(&args.name).await?;
            let text = format!(
                "set aside in {}, where `blockd volume stranded export` still finds them; remove that directory by hand \
                 when you need them no more\n",
                moved.log.display()
            );
            said(&args.client, &moved, &text)
        }
    }
}

fn list(all: &[StrandedStatus]) -> String {
    if all.is_empty() {
        return "no stranded writes\n".into();
    }
    let mut table = Table::new(&[
        ("VOLUME", Align::Left),
        ("EPOCH", Align::Right),
        ("WRITES", Align::Right),
        ("BYTES", Align::Right),
        ("LSN", Align::Left),
        ("LAST WRITTEN", Align::Left),
        ("WHERE", Align::Left),
    ]);
    for stranded in all {
        table.row([
            stranded.volume.clone(),
            stranded.epoch.to_string(),
            stranded.writes.to_string(),
            bytes(stranded.bytes),
            format!("{}-{}", stranded.first_lsn, stranded.last_lsn),
            date(stranded.last_ms),
            format!("{}{}", stranded.log.display(), if stranded.set_aside { " (set aside)" } else { "" }),
        ]);
    }
    table.to_string()
}
