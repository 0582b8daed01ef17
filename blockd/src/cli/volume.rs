//! `blockd volume ...`.

use clap::{Args, Subcommand};

use super::text::{Align, Table, bytes, date};
use super::{ClientArgs, confirm, print, print_json, transfer};
use crate::admin::api::{CreateVolume, ResizeVolume, VolumeStatus};
use crate::chunk::Codec;
use crate::config::ByteSize;
use crate::manifest::{self, Durability};
use crate::volume::VolumeStats;

#[derive(Subcommand, Debug)]
pub(super) enum VolumeCommand {
    /// Make a volume
    Create(CreateArgs),
    /// List all volumes
    #[command(alias = "ls")]
    List(ListArgs),
    /// Show one volume and how to attach it
    Show(NameArgs),
    /// Serve a volume that failed to open, or that another daemon made
    Open(NameArgs),
    /// Change the size of a volume
    Resize(ResizeArgs),
    /// Remove a volume and all its data
    #[command(alias = "rm")]
    Delete(DeleteArgs),
    /// Fill a volume from a disk image (raw, or qcow2 through qemu-img)
    Import(transfer::ImportArgs),
    /// Write a volume to a disk image (raw, or qcow2 through qemu-img)
    Export(transfer::ExportArgs),
}

/// For clap: a name the daemon will accept.
pub(super) fn parse_name(text: &str) -> Result<String, manifest::InvalidName> {
    manifest::check_name(text).map(|()| text.to_owned())
}

/// What a new volume is like.
#[derive(Args, Clone, Debug)]
pub(super) struct NewVolumeArgs {
    /// When a flush is answered: local (on this host's log device) or object (in the bucket) [default: local]
    #[arg(long, value_name = "WHERE")]
    pub durability: Option<Durability>,

    /// Compression of its chunks: none, lz4, zstd or zstd:LEVEL [default: lz4]
    #[arg(long, value_name = "CODEC")]
    pub codec: Option<Codec>,

    /// Payload of a chunk [default: the daemon's setting, 16MiB]
    #[arg(long, value_name = "SIZE")]
    pub chunk_size: Option<ByteSize>,
}

impl NewVolumeArgs {
    pub fn request(&self, name: &str, size: u64) -> CreateVolume {
        CreateVolume {
            name: name.to_owned(),
            size,
            durability: self.durability.map(|durability| durability.to_string()),
            codec: self.codec.map(|codec| codec.to_string()),
            chunk_bytes: self.chunk_size.map(|size| size.0),
        }
    }
}

#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  blockd volume create disk --size 100GiB\n  blockd volume create archive --size 4TiB --codec zstd --durability object"
)]
pub(super) struct CreateArgs {
    /// Its name: letters, digits, and . _ - inside
    #[arg(value_parser = parse_name)]
    name: String,

    /// Its size; only what is written takes space
    #[arg(long, value_name = "SIZE")]
    size: ByteSize,

    #[command(flatten)]
    new: NewVolumeArgs,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
pub(super) struct ListArgs {
    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
pub(super) struct NameArgs {
    /// The volume
    #[arg(value_parser = parse_name)]
    name: String,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
#[command(after_help = "Attached clients keep the old size until they connect again.")]
pub(super) struct ResizeArgs {
    /// The volume
    #[arg(value_parser = parse_name)]
    name: String,

    /// Its new size
    size: ByteSize,

    /// Allow a smaller size; everything behind it is lost
    #[arg(long)]
    shrink: bool,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
pub(super) struct DeleteArgs {
    /// The volume
    #[arg(value_parser = parse_name)]
    name: String,

    /// Do not ask
    #[arg(long, short)]
    yes: bool,

    /// Delete it even though clients are attached
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    client: ClientArgs,
}

pub(super) async fn run(command: VolumeCommand) -> anyhow::Result<()> {
    match command {
        VolumeCommand::Create(args) => {
            let made = args.client.client().create(&args.new.request(&args.name, args.size.0)).await?;
            said(&args.client, &made, &format!("created volume {}\n\n{}", made.info.name, details(&made)))
        }
        VolumeCommand::List(args) => {
            let volumes = args.client.client().volumes().await?;
            said(&args.client, &volumes, &list(&volumes))
        }
        VolumeCommand::Show(args) => {
            let volume = args.client.client().volume(&args.name).await?;
            said(&args.client, &volume, &details(&volume))
        }
        VolumeCommand::Open(args) => {
            let volume = args.client.client().open(&args.name).await?;
            said(&args.client, &volume, &format!("volume {} is open\n", args.name))
        }
        VolumeCommand::Resize(args) => {
            let request = ResizeVolume { size: args.size.0, shrink: args.shrink };
            let volume = args.client.client().resize(&args.name, &request).await?;
            let text = format!(
                "volume {} has {} now; attached clients see it when they connect again\n",
                args.name, args.size
            );
            said(&args.client, &volume, &text)
        }
        VolumeCommand::Delete(args) => delete(args).await,
        VolumeCommand::Import(args) => transfer::import(args).await,
        VolumeCommand::Export(args) => transfer::export(args).await,
    }
}

fn said(args: &ClientArgs, value: &impl serde::Serialize, text: &str) -> anyhow::Result<()> {
    if args.json { print_json(value) } else { print(text) }
}

async fn delete(args: DeleteArgs) -> anyhow::Result<()> {
    let client = args.client.client();
    if !args.yes {
        let size = client.volume(&args.name).await?.info.size;
        confirm::confirm(
            &format!("Volume {} ({}) and all its data will be gone for good.", args.name, bytes(size)),
            &args.name,
        )?;
    }
    client.delete(&args.name, args.force).await?;
    said(&args.client, &serde_json::json!({ "deleted": args.name }), &format!("deleted volume {}\n", args.name))
}

fn list(volumes: &[VolumeStatus]) -> String {
    if volumes.is_empty() {
        return "no volumes yet; make one with `blockd volume create NAME --size SIZE`\n".into();
    }
    let mut table = Table::new(&[
        ("NAME", Align::Left),
        ("SIZE", Align::Right),
        ("DURABILITY", Align::Left),
        ("CODEC", Align::Left),
        ("STATE", Align::Left),
        ("CLIENTS", Align::Right),
    ]);
    for volume in volumes {
        let info = &volume.info;
        table.row([
            info.name.clone(),
            bytes(info.size),
            info.durability.clone(),
            info.codec.clone(),
            info.state.as_str().to_owned(),
            info.clients.to_string(),
        ]);
    }
    let errors = volumes.iter().filter_map(|volume| volume.info.error.as_ref());
    errors.fold(table.to_string(), |text, error| text + "! " + error + "\n")
}

fn details(volume: &VolumeStatus) -> String {
    let info = &volume.info;
    let mut lines = vec![
        ("name", info.name.clone()),
        ("id", info.id.clone()),
        ("size", format!("{} ({} bytes)", bytes(info.size), info.size)),
        ("durability", info.durability.clone()),
        ("codec", info.codec.clone()),
        ("chunk size", bytes(info.chunk_bytes)),
        ("created", date(info.created_ms)),
        ("state", info.state.as_str().to_owned()),
        ("clients", info.clients.to_string()),
    ];
    lines.extend(volume.stats.iter().flat_map(space));
    lines.extend(info.error.iter().map(|error| ("error", error.clone())));
    lines.extend(volume.uris.iter().map(|uri| ("attach", uri.clone())));
    lines.iter().map(|(label, value)| format!("{label:<11} {value}\n")).collect()
}

/// What the volume takes in the bucket.
fn space(stats: &VolumeStats) -> Vec<(&'static str, String)> {
    let ratio = match stats.live_bytes {
        0 => String::new(),
        live => format!(", {:.2} x live", stats.stored_bytes as f64 / live as f64),
    };
    let mut lines = vec![
        ("live", bytes(stats.live_bytes)),
        ("dead", format!("{} ({} in chunks to be deleted)", bytes(stats.dead_bytes), bytes(stats.deletable_bytes))),
        ("stored", format!("{} in {} chunks{ratio}", bytes(stats.stored_bytes), stats.bucket_chunks)),
    ];
    if stats.foreign_bytes > 0 {
        lines.push(("shared", format!("{} in chunks of the volume it is a clone of", bytes(stats.foreign_bytes))));
    }
    let write_amp = stats.write_amplification().map_or("-".into(), |ratio| format!("{ratio:.2}"));
    lines.push(("relocated", format!("{} since it was opened", bytes(stats.relocated_bytes))));
    lines.push(("write amp", format!("{write_amp} bytes stored for each written, since it was opened")));
    let compaction = match (&stats.compaction_trouble, stats.compacting) {
        (Some(why), _) => format!("does not get on: {why}"),
        (None, true) => "working".to_owned(),
        (None, false) => "at rest".to_owned(),
    };
    lines.push(("compaction", compaction));
    lines
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::api::{VolumeInfo, VolumeState};

    fn volume() -> VolumeStatus {
        VolumeStatus {
            info: VolumeInfo {
                name: "disk".into(),
                id: "0123".into(),
                size: 10 << 30,
                durability: "local".into(),
                codec: "lz4".into(),
                chunk_bytes: 16 << 20,
                created_ms: 1_700_000_000_000,
                state: VolumeState::Open,
                error: None,
                clients: 2,
            },
            uris: vec!["nbd://127.0.0.1:10809/disk".into()],
            stats: None,
        }
    }

    #[test]
    fn a_list_shows_what_went_wrong_below() {
        let failed = VolumeStatus {
            info: VolumeInfo {
                name: "b".into(),
                state: VolumeState::Failed,
                error: Some("why".into()),
                ..Default::default()
            },
            ..Default::default()
        };
        assert_eq!(
            list(&[volume(), failed]),
            "NAME    SIZE  DURABILITY  CODEC  STATE   CLIENTS\n\
             disk  10 GiB  local       lz4    open          2\n\
             b        0 B                     failed        0\n\
             ! why\n"
        );
        assert!(list(&[]).contains("volume create"));
    }

    #[test]
    fn details_tell_what_is_stored() {
        let stats = VolumeStats {
            live_bytes: 10 << 20,
            dead_bytes: 5 << 20,
            deletable_bytes: 1 << 20,
            stored_bytes: 15 << 20,
            bucket_chunks: 3,
            write_bytes: 100,
            chunk_stored_bytes: 60,
            relocated_bytes: 90,
            ..Default::default()
        };
        let text = details(&VolumeStatus { stats: Some(stats), ..volume() });
        for line in [
            "live        10 MiB",
            "dead        5 MiB (1 MiB in chunks to be deleted)",
            "stored      15 MiB in 3 chunks, 1.50 x live",
            "relocated   90 B since it was opened",
            "write amp   1.50 bytes stored for each written, since it was opened",
            "compaction  at rest",
        ] {
            assert!(text.lines().any(|l| l == line), "{line}\nin\n{text}");
        }
    }

    #[test]
    fn details_tell_how_to_attach() {
        let text = details(&volume());
        assert!(text.contains("size        10 GiB (10737418240 bytes)\n"), "{text}");
        assert!(text.contains("created     2023-11-14 22:13:20 UTC\n"), "{text}");
        assert!(text.ends_with("attach      nbd://127.0.0.1:10809/disk\n"), "{text}");
    }
}
