//! `fsd snapshot ...`: what a running fsd does with snapshots when it is told to.

use std::path::PathBuf;

use anyhow::bail;
use blockd::program::text::{Align, Table};
use blockd::program::{print, print_json};
use clap::{Args, Subcommand};

use crate::admin::{Answer, Request, Snapshots, request};
use crate::snapshots::DIRECTORY;

#[derive(Subcommand, Debug)]
pub(super) enum SnapshotCommand {
    /// Make a snapshot of the whole tree; clients go on meanwhile. All that was done before is in it
    Create(CreateArgs),
    /// List the snapshots
    #[command(alias = "ls")]
    List(RunningArgs),
    /// Delete a snapshot. Who has files of it open gets errors
    #[command(alias = "rm")]
    Delete(DeleteArgs),
}

/// Which fsd.
#[derive(Args, Debug)]
pub(super) struct RunningArgs {
    /// Data directory of the fsd, which must be running
    #[arg(long, value_name = "DIR", default_value = "fsd-data", env = "FSD_DATA")]
    data: PathBuf,

    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Args, Debug)]
#[command(after_help = "\
The snapshot is in the directory .snapshots/NAME of each mount and export, which is found by its name and left out of listings of the root.")]
pub(super) struct CreateArgs {
    /// What to call it
    #[arg(value_name = "NAME")]
    name: String,

    #[command(flatten)]
    running: RunningArgs,
}

#[derive(Args, Debug)]
pub(super) struct DeleteArgs {
    /// What it is called
    #[arg(value_name = "NAME")]
    name: String,

    #[command(flatten)]
    running: RunningArgs,
}

impl RunningArgs {
    /// Asks the running fsd, however long it takes.
    fn ask(&self, asked: &Request) -> anyhow::Result<Answer> {
        Ok(request(&self.data.join("fsd.sock"), asked, None)?)
    }

    fn ask_snapshots(&self, asked: &Request) -> anyhow::Result<Snapshots> {
        match self.ask(asked)? {
            Answer::Snapshots(snapshots) => Ok(snapshots),
            _ => bail!("fsd answered something else; is it of another version?"),
        }
    }
}

pub(super) fn run(command: &SnapshotCommand) -> anyhow::Result<()> {
    match command {
        SnapshotCommand::Create(args) => {
            let made = args.running.ask_snapshots(&Request::SnapshotCreate { name: args.name.clone() })?;
            if args.running.json {
                return print_json(&made);
            }
            let text = format!("made snapshot {}: it is in {DIRECTORY}/{}\n", args.name, args.name);
            print(&(text + hint(&made)))
        }
        SnapshotCommand::List(args) => {
            let list = args.ask_snapshots(&Request::SnapshotList)?;
            if args.json {
                return print_json(&list);
            }
            let mut table = Table::new(&[("NAME", Align::Left), ("WHAT IT IS", Align::Left)]);
            for snapshot in &list.snapshots {
                table.row([snapshot.name.clone(), snapshot.description.clone()]);
            }
            print(&(table.to_string() + hint(&list)))
        }
        SnapshotCommand::Delete(args) => {
            args.running.ask(&Request::SnapshotDelete { name: args.name.clone() })?;
            if args.running.json {
                return print_json(&serde_json::json!({ "deleted": args.name }));
            }
            print(&format!("deleted snapshot {}\n", args.name))
        }
    }
}

/// What is to be known of where they are.
fn hint(snapshots: &Snapshots) -> &'static str {
    if snapshots.shown {
        ""
    } else {
        "The root has a .snapshots of its own, so that snapshots are not visible: rename it.\n"
    }
}
