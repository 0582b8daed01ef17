//! `blockd volume export`.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;

use super::super::ClientArgs;
use super::super::snapshot::{Source, parse_source};
use super::super::volume::parse_name;
use super::format::{self, Format};
use super::increment::{self, Identity};
use super::{Summary, attach, failed, progress, qemu, raw, uri};
use crate::program::{print, print_json};

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  blockd volume export vm vm.qcow2
  blockd volume export vm vm.raw --force             replace vm.raw
  blockd volume export vm@monday vm.raw              as it was when the snapshot was made
  blockd volume export vm@tuesday tue --since monday what changed between two snapshots

An increment (--since) is applied to a copy of the older snapshot by `blockd volume import COPY FILE`. Without a newer
snapshot one is made for the time of the export.

Holes and zeroes of the volume take no space in the image. The image appears under its name when it is complete and
on disk. A volume that is written to meanwhile gives a mixture of old and new: export a snapshot of it.")]
pub(in super::super) struct ExportArgs {
    /// The volume, or a snapshot of it
    #[arg(value_parser = parse_source, value_name = "VOLUME[@SNAPSHOT]")]
    source: Source,

    /// The disk image to write
    file: PathBuf,

    /// Format of the image [default: qcow2 for names that end so, else raw]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,

    /// Only what changed since this snapshot of the volume
    #[arg(long, value_name = "SNAPSHOT", value_parser = parse_name, conflicts_with = "format")]
    since: Option<String>,

    /// Replace the image if it exists
    #[arg(long)]
    force: bool,

    #[command(flatten)]
    client: ClientArgs,
}

pub(in super::super) async fn run(args: ExportArgs) -> anyhow::Result<()> {
    if let Some(since) = args.since.clone() {
        return run_since(args, &since).await;
    }
    let name = args.source.to_string();
    let daemon = args.client.client().info().await?;
    let format = format::of_name(&args.file, args.format);
    check_target(&args.file, args.force)?;
    let begun = Instant::now();
    let mut nbd = attach(&daemon, &name)?;
    let size = nbd.size();
    let part = Part::beside(&args.file);
    let data = match format {
        Format::Raw => {
            let file = File::create(&part.0).with_context(|| format!("cannot write {}", part.0.display()))?;
            let bar = progress::bar(size, args.client.json);
            let written = raw::export(&mut nbd, &file, &bar);
            bar.finish_and_clear();
            Some(written.map_err(|error| failed(&name, &format!("copying to {} of", args.file.display()), error))?)
        }
        // No name ends so, and nobody can ask for it.
        Format::Increment => bail!("increments are written with --since"),
        Format::Qcow2 => {
            qemu::export(&uri(&daemon, &name)?, &part.0, args.client.json)?;
            None
        }
    };
    // Reads need no goodbye.
    let _ = nbd.disconnect();
    part.keep_as(&args.file)?;
    let seconds = begun.elapsed().as_secs_f64();
    let summary = Summary { volume: name, file: args.file, format, size, data, seconds };
    if args.client.json { print_json(&summary) } else { print(&summary.text("exported")) }
}

/// A snapshot made for the time of an export.
const TEMPORARY: &str = "export";

async fn run_since(args: ExportArgs, since: &str) -> anyhow::Result<()> {
    check_target(&args.file, args.force)?;
    let client = args.client.client();
    let volume = &args.source.volume;
    if let Some(snapshot) = &args.source.snapshot {
        return write_since(&args, volume, since, snapshot).await;
    }
    let temporary = format!("{TEMPORARY}-{}-{}", std::process::id(), crate::reactor::wall_ms());
    client.create_snapshot(volume, &temporary).await?;
    let written = write_since(&args, volume, since, &temporary).await;
    let deleted = client.delete_snapshot(volume, &temporary).await;
    written.and(deleted.with_context(|| {
        format!("delete the snapshot that was made for the export: `blockd snapshot delete {volume}@{temporary}`")
    }))
}

async fn write_since(args: &ExportArgs, volume: &str, since: &str, to: &str) -> anyhow::Result<()> {
    let begun = Instant::now();
    let client = args.client.client();
    let snapshots = client.snapshots(Some(volume)).await?;
    let find = |name: &str| {
        let found = snapshots.iter().find(|snapshot| snapshot.name == name && !snapshot.hidden);
        found.with_context(|| {
            format!("volume {volume:?} has no snapshot {name:?}; `blockd snapshot list {volume}` shows them")
        })
    };
    let (older, newer) = (find(since)?, find(to)?);
    if (older.seq, older.made_ms) > (newer.seq, newer.made_ms) {
        bail!("snapshot {since:?} is newer than {to:?}; name the older one with --since");
    }
    let mut ranges = Vec::new();
    let mut start = Some(0);
    while let Some(from) = start {
        let page = client.changes(volume, since, to, from).await?;
        ranges.extend(page.ranges);
        start = page.next;
    }
    let id = |text: &str| uuid::Uuid::parse_str(text).map_or([0; 16], |id| id.into_bytes());
    let status = client.volume(volume).await?;
    let identity = Identity { size: newer.size, volume: id(&status.info.id), from: id(&older.id), to: id(&newer.id) };
    let daemon = client.info().await?;
    let mut old = attach(&daemon, &format!("{volume}@{since}"))?;
    let mut new = attach(&daemon, &format!("{volume}@{to}"))?;
    let part = Part::beside(&args.file);
    let file = File::create(&part.0).with_context(|| format!("cannot write {}", part.0.display()))?;
    let bar = progress::bar(ranges.iter().map(|range| range.len).sum(), args.client.json);
    let written = increment::write(file, &identity, &ranges, &mut old, &mut new, &bar);
    bar.finish_and_clear();
    let written = written.map_err(|error| failed(volume, &format!("copying to {} of", args.file.display()), error))?;
    part.keep_as(&args.file)?;
    let summary = Summary {
        volume: format!("{volume}@{to} since {since}"),
        file: args.file.clone(),
        format: Format::Increment,
        size: identity.size,
        data: Some(written.data),
        seconds: begun.elapsed().as_secs_f64(),
    };
    if args.client.json { print_json(&summary) } else { print(&summary.text("exported")) }
}

fn check_target(path: &Path, force: bool) -> anyhow::Result<()> {
    match fs::metadata(path) {
        Ok(found) if !found.is_file() => {
            bail!("{} is not a regular file; export to a file, or attach the volume and copy with dd", path.display())
        }
        Ok(_) if !force => bail!("{} exists already; say --force to replace it", path.display()),
        _ => Ok(()),
    }
}

/// An image that is not complete; removed unless it is kept.
struct Part(PathBuf);

impl Part {
    fn beside(path: &Path) -> Self {
        let mut name = OsString::from(path);
        name.push(".part");
        Self(PathBuf::from(name))
    }

    /// Durable first, then under its name, then the name durable.
    fn keep_as(self, path: &Path) -> anyhow::Result<()> {
        let keep = || {
            File::open(&self.0)?.sync_all()?;
            fs::rename(&self.0, path)?;
            let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
            File::open(dir)?.sync_all()
        };
        keep().with_context(|| format!("cannot complete {}", path.display()))
    }
}

impl Drop for Part {
    fn drop(&mut self) {
        // Gone already when it was kept.
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_not_overwritten_unasked() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("a.raw");
        assert!(check_target(&path, false).is_ok());
        fs::write(&path, "x").unwrap();
        assert!(check_target(&path, false).unwrap_err().to_string().contains("--force"));
        assert!(check_target(&path, true).is_ok());
        assert!(check_target(tmp.path(), true).is_err());
    }

    #[test]
    fn an_image_appears_when_it_is_complete() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("a.raw");
        let part = Part::beside(&path);
        fs::write(&part.0, "half").unwrap();
        drop(part);
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 0);
        let part = Part::beside(&path);
        fs::write(&part.0, "whole").unwrap();
        part.keep_as(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"whole");
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
    }
}
