//! `blockd snapshot ...`.

use std::fmt;
use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::volume::{details, parse_name, said};
use super::{ClientArgs, confirm, secret};
use crate::admin::api::{CloneVolume, SecretText, SnapshotStatus};
use crate::manifest;
use crate::program::text::{Align, Table, bytes, date};

#[derive(Subcommand, Debug)]
pub(super) enum SnapshotCommand {
    /// Make a snapshot of all that was written so far; clients go on meanwhile
    Create(OneArgs),
    /// List the snapshots of a volume, or of all
    #[command(alias = "ls")]
    List(ListArgs),
    /// Delete a snapshot; what clones made of it need stays until they are gone
    #[command(alias = "rm")]
    Delete(OneArgs),
}

/// A volume and one of its snapshots.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct SnapshotName {
    pub volume: String,
    pub snapshot: String,
}

/// For clap: `VOLUME@SNAPSHOT`.
pub(super) fn parse_snapshot(text: &str) -> Result<SnapshotName, String> {
    let (volume, snapshot) = text.split_once('@').ok_or("write VOLUME@SNAPSHOT")?;
    for name in [volume, snapshot] {
        manifest::check_name(name).map_err(|e| e.to_string())?;
    }
    Ok(SnapshotName { volume: volume.to_owned(), snapshot: snapshot.to_owned() })
}

#[derive(Args, Debug)]
#[command(after_help = "VOLUME@SNAPSHOT is also the name of a read-only export.")]
pub(super) struct OneArgs {
    /// The volume, an @, and the snapshot's name
    #[arg(value_parser = parse_snapshot, value_name = "VOLUME@SNAPSHOT")]
    snapshot: SnapshotName,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
pub(super) struct ListArgs {
    /// Only those of this volume
    #[arg(value_parser = parse_name)]
    volume: Option<String>,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
#[command(
    after_help = "The clone of an encrypted volume is encrypted with the same key, unlocked by what is said here: a file,\nBLOCKD_PASSPHRASE, or else what the daemon's settings have for either volume."
)]
pub(super) struct CloneArgs {
    /// The volume, or one of its snapshots: VOLUME or VOLUME@SNAPSHOT
    #[arg(value_parser = parse_source, value_name = "SOURCE")]
    source: Source,

    /// Name of the new volume
    #[arg(value_parser = parse_name)]
    name: String,

    /// A file with the passphrase that is to unlock it
    #[arg(long, value_name = "FILE", conflicts_with = "key_file")]
    passphrase_file: Option<PathBuf>,

    /// The key file that is to unlock it
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,

    #[command(flatten)]
    client: ClientArgs,
}

/// A volume as it is now, or a snapshot of it.
#[derive(Clone, Debug)]
pub(super) struct Source {
    pub volume: String,
    pub snapshot: Option<String>,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.volume)?;
        self.snapshot.iter().try_for_each(|snapshot| write!(f, "@{snapshot}"))
    }
}

/// For clap: `VOLUME` or `VOLUME@SNAPSHOT`.
pub(super) fn parse_source(text: &str) -> Result<Source, String> {
    if text.contains('@') {
        let SnapshotName { volume, snapshot } = parse_snapshot(text)?;
        return Ok(Source { volume, snapshot: Some(snapshot) });
    }
    let volume = parse_name(text).map_err(|e| e.to_string())?;
    Ok(Source { volume, snapshot: None })
}

pub(super) async fn clone(args: CloneArgs) -> anyhow::Result<()> {
    let given = secret::given(args.passphrase_file.as_deref(), args.key_file.as_deref(), secret::CURRENT)?;
    let secret = given.as_ref().map(SecretText::from);
    let request = CloneVolume { name: args.name.clone(), snapshot: args.source.snapshot.clone(), secret };
    let made = args.client.client().clone_volume(&args.source.volume, &request).await?;
    said(&args.client, &made, &format!("made clone {}\n\n{}", args.name, details(&made)))
}

#[derive(Args, Debug)]
#[command(
    after_help = "No client may be attached. What was written since the snapshot is gone, unless another snapshot has it: make one\nfirst if in doubt."
)]
pub(super) struct RestoreArgs {
    /// The volume, an @, and the snapshot's name
    #[arg(value_parser = parse_snapshot, value_name = "VOLUME@SNAPSHOT")]
    snapshot: SnapshotName,

    /// Do not ask
    #[arg(long, short)]
    yes: bool,

    #[command(flatten)]
    client: ClientArgs,
}

pub(super) async fn restore(args: RestoreArgs) -> anyhow::Result<()> {
    let SnapshotName { volume, snapshot } = &args.snapshot;
    if !args.yes {
        let question = format!("What was written to volume {volume} since its snapshot {snapshot} will be gone.");
        confirm::confirm(&question, volume)?;
    }
    let restored = args.client.client().restore(volume, snapshot).await?;
    said(&args.client, &restored, &format!("volume {volume} is as it was at {volume}@{snapshot}\n"))
}

pub(super) async fn run(command: SnapshotCommand) -> anyhow::Result<()> {
    match command {
        SnapshotCommand::Create(args) => {
            let SnapshotName { volume, snapshot } = &args.snapshot;
            let made = args.client.client().create_snapshot(volume, snapshot).await?;
            said(&args.client, &made, &format!("made snapshot {volume}@{snapshot}\n"))
        }
        SnapshotCommand::List(args) => {
            let found = args.client.client().snapshots(args.volume.as_deref()).await?;
            said(&args.client, &found, &list(&found))
        }
        SnapshotCommand::Delete(args) => {
            let SnapshotName { volume, snapshot } = &args.snapshot;
            args.client.client().delete_snapshot(volume, snapshot).await?;
            let gone = format!("{volume}@{snapshot}");
            said(&args.client, &serde_json::json!({ "deleted": gone }), &format!("deleted snapshot {gone}\n"))
        }
    }
}

/// One snapshot, where those of one volume are told.
pub(super) fn line(snapshot: &SnapshotStatus) -> String {
    let clones = match snapshot.clones.len() {
        0 => String::new(),
        _ => format!(", cloned as {}", snapshot.clones.join(" ")),
    };
    format!("{}, {}, made {}{clones}", snapshot.name, bytes(snapshot.size), date(snapshot.made_ms))
}

fn list(found: &[SnapshotStatus]) -> String {
    if found.is_empty() {
        return "no snapshots; make one with `blockd snapshot create VOLUME@NAME`\n".into();
    }
    let mut table = Table::new(&[
        ("SNAPSHOT", Align::Left),
        ("SIZE", Align::Right),
        ("LSN", Align::Right),
        ("MADE", Align::Left),
        ("CLONES", Align::Left),
    ]);
    for snapshot in found {
        let name = format!("{}@{}", snapshot.volume, snapshot.name);
        table.row([
            if snapshot.hidden { format!("({name}, deleted)") } else { name },
            bytes(snapshot.size),
            snapshot.lsn.to_string(),
            date(snapshot.made_ms),
            if snapshot.clones.is_empty() { "-".to_owned() } else { snapshot.clones.join(" ") },
        ]);
    }
    table.to_string()
}
