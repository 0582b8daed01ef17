//! `blockd volume ...`.

use std::path::PathBuf;

use clap::{Args, Subcommand};

use super::{ClientArgs, check, confirm, ownership, secret, transfer};
use crate::admin::api::{
    ChangeKey, CreateVolume, ResizeVolume, SecretText, SetVolume, UnlockVolume, VolumeInfo, VolumeState, VolumeStatus,
};
use crate::chunk::Codec;
use crate::config::ByteSize;
use crate::manifest::{self, Durability};
use crate::program::text::{Align, Table, bytes, date, seconds};
use crate::program::{print, print_json};
use crate::volume::VolumeStats;

#[derive(Subcommand, Debug)]
pub(super) enum VolumeCommand {
    /// Make a volume
    Create(CreateArgs),
    /// Make a volume of a snapshot of another, or of another as it is now; it stores only what becomes different
    Clone(super::snapshot::CloneArgs),
    /// Make the state of a volume that of one of its snapshots; all snapshots stay
    Restore(super::snapshot::RestoreArgs),
    /// List all volumes
    #[command(alias = "ls")]
    List(ListArgs),
    /// Show one volume and how to attach it
    Show(NameArgs),
    /// Serve a volume that is not served here: it failed to open, was released, or is another host's
    Open(ownership::OpenArgs),
    /// Send everything to the bucket and let go of a volume, so that another host can open it
    Release(ownership::ReleaseArgs),
    /// Writes that were acknowledged here before another host took the volume over, and never reached the bucket
    #[command(subcommand)]
    Stranded(ownership::StrandedCommand),
    /// Change the size of a volume
    Resize(ResizeArgs),
    /// Change compression or durability of a volume; an open one obeys at once
    Set(SetArgs),
    /// Unlock an encrypted volume and serve it
    Unlock(UnlockArgs),
    /// Change the passphrase or key file of an encrypted volume, without rewriting its data
    Passwd(PasswdArgs),
    /// Make the translation table of a volume that does not open anew, from the headers of its chunks alone
    Rebuild(NameArgs),
    /// Verify a volume in the bucket: manifest, checkpoint, table, chunks; works without the daemon
    Check(check::CheckArgs),
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

    /// Encrypt it. Without --passphrase-file, --key-file or BLOCKD_PASSPHRASE, asks for a passphrase
    #[arg(long)]
    pub encrypt: bool,

    /// A file with the passphrase (a newline at its end does not count)
    #[arg(long, value_name = "FILE", requires = "encrypt", conflicts_with = "key_file")]
    pub passphrase_file: Option<PathBuf>,

    /// A file of at least 32 random bytes to unlock it with
    #[arg(long, value_name = "FILE", requires = "encrypt")]
    pub key_file: Option<PathBuf>,
}

impl NewVolumeArgs {
    pub fn request(&self, name: &str, size: u64) -> anyhow::Result<CreateVolume> {
        let secret = self.encrypt.then(|| {
            let secret = secret::given(self.passphrase_file.as_deref(), self.key_file.as_deref(), secret::CURRENT)?;
            secret.map_or_else(|| secret::choose(&format!("Passphrase for volume {name}"), secret::CURRENT), Ok)
        });
        Ok(CreateVolume {
            name: name.to_owned(),
            size,
            durability: self.durability.map(|durability| durability.to_string()),
            codec: self.codec.map(|codec| codec.to_string()),
            chunk_bytes: self.chunk_size.map(|size| size.0),
            secret: secret.transpose()?.as_ref().map(SecretText::from),
        })
    }
}

#[derive(Args, Debug)]
#[command(
    after_help = "Examples:\n  blockd volume create disk --size 100GiB\n  blockd volume create archive --size 4TiB --codec zstd --durability object\n  blockd volume create safe --size 1TiB --encrypt --key-file /etc/blockd/safe.key"
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
#[command(after_help = "What is in the bucket stays as it is; new chunks follow the new settings.")]
#[group(id = "setting", required = true, multiple = true, args = ["codec", "durability"])]
pub(super) struct SetArgs {
    /// The volume
    #[arg(value_parser = parse_name)]
    name: String,

    /// Compression of new chunks: none, lz4, zstd or zstd:LEVEL
    #[arg(long, value_name = "CODEC")]
    codec: Option<Codec>,

    /// When a flush is answered: local or object
    #[arg(long, value_name = "WHERE")]
    durability: Option<Durability>,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
#[command(
    after_help = "Without a file or BLOCKD_PASSPHRASE, asks for the passphrase. To unlock volumes at the start of the daemon, see\n--key-file and --passphrase-file of `blockd serve`."
)]
pub(super) struct UnlockArgs {
    /// The volume
    #[arg(value_parser = parse_name)]
    name: String,

    /// A file with the passphrase
    #[arg(long, value_name = "FILE", conflicts_with = "key_file")]
    passphrase_file: Option<PathBuf>,

    /// The key file
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,

    #[command(flatten)]
    client: ClientArgs,
}

#[derive(Args, Debug)]
#[command(
    after_help = "The data key stays the same, so this does not help when that has leaked: whoever has an old copy of the\nmanifest and the old passphrase or key file can still read the volume. If the daemon's settings name the old file,\nchange them, too."
)]
pub(super) struct PasswdArgs {
    /// The volume
    #[arg(value_parser = parse_name)]
    name: String,

    /// A file with the passphrase until now; not needed while the volume is open
    #[arg(long, value_name = "FILE", conflicts_with = "old_key_file")]
    old_passphrase_file: Option<PathBuf>,

    /// The key file until now; not needed while the volume is open
    #[arg(long, value_name = "FILE")]
    old_key_file: Option<PathBuf>,

    /// A file with the new passphrase [default: BLOCKD_NEW_PASSPHRASE, or asks for it]
    #[arg(long, value_name = "FILE", conflicts_with = "key_file")]
    passphrase_file: Option<PathBuf>,

    /// The new key file
    #[arg(long, value_name = "FILE")]
    key_file: Option<PathBuf>,

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
            let made = args.client.client().create(&args.new.request(&args.name, args.size.0)?).await?;
            said(&args.client, &made, &format!("created volume {}\n\n{}", made.info.name, details(&made)))
        }
        VolumeCommand::Clone(args) => super::snapshot::clone(args).await,
        VolumeCommand::Restore(args) => super::snapshot::restore(args).await,
        VolumeCommand::List(args) => {
            let volumes = args.client.client().volumes().await?;
            said(&args.client, &volumes, &list(&volumes))
        }
        VolumeCommand::Show(args) => {
            let volume = args.client.client().volume(&args.name).await?;
            said(&args.client, &volume, &details(&volume))
        }
        VolumeCommand::Open(args) => ownership::open(args).await,
        VolumeCommand::Release(args) => ownership::release(args).await,
        VolumeCommand::Stranded(command) => ownership::stranded(command).await,
        VolumeCommand::Rebuild(args) => rebuild(args).await,
        VolumeCommand::Check(args) => check::run(args).await,
        VolumeCommand::Resize(args) => {
            let request = ResizeVolume { size: args.size.0, shrink: args.shrink };
            let volume = args.client.client().resize(&args.name, &request).await?;
            let text = format!(
                "volume {} has {} now; attached clients see it when they connect again\n",
                args.name, args.size
            );
            said(&args.client, &volume, &text)
        }
        VolumeCommand::Set(args) => {
            let request = SetVolume {
                codec: args.codec.map(|codec| codec.to_string()),
                durability: args.durability.map(|durability| durability.to_string()),
            };
            let volume = args.client.client().set(&args.name, &request).await?;
            let info = &volume.info;
            let text = format!("volume {} has codec {} and durability {}\n", info.name, info.codec, info.durability);
            said(&args.client, &volume, &text)
        }
        VolumeCommand::Unlock(args) => {
            let given = secret::given(args.passphrase_file.as_deref(), args.key_file.as_deref(), secret::CURRENT)?;
            let secret = given.map_or_else(|| secret::ask(&format!("Passphrase of volume {}", args.name)), Ok)?;
            let request = UnlockVolume { secret: (&secret).into() };
            let volume = args.client.client().unlock(&args.name, &request).await?;
            said(&args.client, &volume, &format!("volume {} is open\n", args.name))
        }
        VolumeCommand::Passwd(args) => passwd(args).await,
        VolumeCommand::Delete(args) => delete(args).await,
        VolumeCommand::Import(args) => transfer::import(args).await,
        VolumeCommand::Export(args) => transfer::export(args).await,
    }
}

pub(super) fn said(args: &ClientArgs, value: &impl serde::Serialize, text: &str) -> anyhow::Result<()> {
    if args.json { print_json(value) } else { print(text) }
}

async fn passwd(args: PasswdArgs) -> anyhow::Result<()> {
    let (client, name) = (args.client.client(), &args.name);
    let (old_text, old_key) = (args.old_passphrase_file.as_deref(), args.old_key_file.as_deref());
    let old = if old_text.is_some() || old_key.is_some() {
        secret::given(old_text, old_key, secret::CURRENT)?
    } else if client.volume(name).await?.info.state == VolumeState::Open {
        None
    } else {
        let given = secret::given(None, None, secret::CURRENT)?;
        Some(given.map_or_else(|| secret::ask(&format!("Present passphrase of volume {name}")), Ok)?)
    };
    let new = secret::given(args.passphrase_file.as_deref(), args.key_file.as_deref(), secret::NEW)?;
    let new = new.map_or_else(|| secret::choose(&format!("New passphrase for volume {name}"), secret::NEW), Ok)?;
    let request = ChangeKey { old: old.as_ref().map(SecretText::from), new: (&new).into() };
    let volume = client.change_key(name, &request).await?;
    said(&args.client, &volume, &format!("volume {name} is unlocked by the new {} from now on\n", new.what()))
}

async fn rebuild(args: NameArgs) -> anyhow::Result<()> {
    let client = args.client.client();
    let bar = transfer::count_bar("headers", args.client.json);
    let watch = async {
        loop {
            tokio::time::sleep(std::time::Duration::from_millis(300)).await;
            if let Ok(progress) = client.rebuild_progress(&args.name).await {
                bar.set_length(progress.of);
                bar.set_position(progress.headers);
            }
        }
    };
    let volume = tokio::select! {
        volume = client.rebuild(&args.name) => volume,
        () = watch => unreachable!("it goes on for ever"),
    };
    bar.finish_and_clear();
    said(&args.client, &volume?, &format!("volume {} was rebuilt from its chunks and is open\n", args.name))
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
            state(info),
            info.clients.to_string(),
        ]);
    }
    let errors = volumes.iter().filter_map(|volume| volume.info.error.as_ref());
    errors.fold(table.to_string(), |text, error| text + "! " + error + "\n")
}

/// Its state, with the host that decides it.
pub(super) fn state(info: &VolumeInfo) -> String {
    match (&info.holder, info.state) {
        (Some(holder), VolumeState::Held) => format!("held by {}", holder.host_name),
        (Some(holder), VolumeState::Expired) => format!("expired ({})", holder.host_name),
        _ => info.state.as_str().to_owned(),
    }
}

pub(super) fn details(volume: &VolumeStatus) -> String {
    let info = &volume.info;
    let mut lines = vec![
        ("name", info.name.clone()),
        ("id", info.id.clone()),
        ("size", format!("{} ({} bytes)", bytes(info.size), info.size)),
        ("durability", info.durability.clone()),
        ("codec", info.codec.clone()),
        ("chunk size", bytes(info.chunk_bytes)),
        (
            "encryption",
            info.encryption.as_ref().map_or("none".into(), |what| format!("AES-256-GCM, unlocked by a {what}")),
        ),
        ("created", date(info.created_ms)),
        ("state", state(info)),
        ("clients", info.clients.to_string()),
    ];
    for host in &info.nvme_hosts {
        lines.push(("NVMe host", format!("{} at {}, {} I/O queues", host.nqn, host.peer, host.queues)));
    }
    if let Some(holder) = &info.holder {
        lines.push(("held since", date(holder.since_ms)));
        lines.push(("lease until", format!("{} (renewed {})", date(holder.until_ms), date(holder.renewed_ms))));
        let unsent = format!("{}, up to write {}", bytes(holder.dirty_bytes), holder.last_lsn);
        lines.push(("only there", format!("{unsent} as of then; in the bucket: up to {}", holder.bucket_lsn)));
    }
    lines.extend(info.origin.iter().map(|origin| ("clone of", origin.clone())));
    lines.extend(info.snapshots.iter().map(|snapshot| ("snapshot", super::snapshot::line(snapshot))));
    lines.extend(info.notice.iter().map(|notice| ("notice", notice.clone())));
    lines.extend(volume.stats.iter().flat_map(space));
    lines.extend(info.error.iter().map(|error| ("error", error.clone())));
    if let Some(stats) = &volume.stats {
        lines.push(("opened", opened(stats)));
        lines.push(("checkpoint", checkpoint(stats)));
    }
    lines.extend(volume.uris.iter().map(|uri| ("attach", uri.clone())));
    lines.iter().map(|(label, value)| format!("{label:<11} {value}\n")).collect()
}

/// The state that opening found.
fn opened(stats: &VolumeStats) -> String {
    let at = date(stats.opened_ms);
    match (stats.opened_lsn, stats.opened_written_ms) {
        (0, _) => format!("{at}, empty"),
        (lsn, 0) => format!("{at}, at LSN {lsn}"),
        (lsn, written) => {
            let ago = seconds(stats.opened_ms.saturating_sub(written) as f64 / 1000.0);
            format!("{at}, at LSN {lsn}, written at {} ({ago} before)", date(written))
        }
    }
}

fn checkpoint(stats: &VolumeStats) -> String {
    match (stats.checkpoint_seq, stats.checkpoint_made_ms) {
        (0, _) => "none yet".to_owned(),
        (seq, 0) => format!("at chunk {seq}, LSN {}", stats.checkpoint_lsn),
        (seq, made) => format!("at chunk {seq}, LSN {}, made {}", stats.checkpoint_lsn, date(made)),
    }
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
                encryption: None,
                state: VolumeState::Open,
                error: None,
                clients: 2,
                ..Default::default()
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
