//! `blockd volume import`.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::Args;

use super::super::ClientArgs;
use super::super::volume::{NewVolumeArgs, parse_name};
use super::format::{self, Format};
use super::increment::{self, Increment};
use super::{Summary, attach, failed, progress, qemu, raw, uri};
use crate::admin::api::DaemonInfo;
use crate::config::ByteSize;
use crate::program::{print, print_json};
use crate::types::BLOCK_SIZE;

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  blockd volume import vm debian-12.qcow2 --create --size 40GiB
  blockd volume import backup disk.raw --create --codec zstd
  blockd volume import scratch disk.raw --force      replace what the volume holds
  blockd volume import copy tuesday                  apply an increment (`blockd volume export --since`)

Zeroes and holes of the image are not written. The volume is durable when the command ends.")]
pub(in super::super) struct ImportArgs {
    /// The volume
    #[arg(value_parser = parse_name)]
    name: String,

    /// The disk image
    file: PathBuf,

    /// Make the volume first
    #[arg(long)]
    create: bool,

    /// Size of the volume to make [default: the size of the image]
    #[arg(long, value_name = "SIZE", requires = "create")]
    size: Option<ByteSize>,

    /// Format of the image [default: as its first bytes say]
    #[arg(long, value_name = "FORMAT")]
    format: Option<Format>,

    /// Replace all that the volume holds
    #[arg(long, conflicts_with = "create")]
    force: bool,

    #[command(flatten)]
    new: NewVolumeArgs,

    #[command(flatten)]
    client: ClientArgs,
}

pub(in super::super) async fn run(args: ImportArgs) -> anyhow::Result<()> {
    let client = args.client.client();
    let daemon = client.info().await?;
    let format = format::of_image(&args.file, args.format)?;
    let size = match format {
        Format::Increment => return apply_increment(&args, &daemon),
        Format::Raw => file_size(&args.file)?,
        Format::Qcow2 => qemu::virtual_size(&args.file)?.0,
    };
    if args.create {
        let wanted = args.size.map_or(size.next_multiple_of(BLOCK_SIZE).max(BLOCK_SIZE), |size| size.0);
        check_fits(&args.name, size, wanted)?;
        client.create(&args.new.request(&args.name, wanted)?).await?;
    }
    match copy(&args, &daemon, format, size).await {
        Ok(summary) if args.client.json => print_json(&summary),
        Ok(summary) => print(&summary.text("imported")),
        Err(error) if args.create => Err(error.context(format!(
            "volume {0:?} was created but its contents are not complete; import again with --force instead of --create, \
             or delete it",
            args.name
        ))),
        Err(error) => Err(error),
    }
}

async fn copy(args: &ImportArgs, daemon: &DaemonInfo, format: Format, size: u64) -> anyhow::Result<Summary> {
    let begun = Instant::now();
    let mut nbd = attach(daemon, &args.name)?;
    check_fits(&args.name, size, nbd.size())?;
    let fail = |error| failed(&args.name, "writing", error);
    if args.force {
        raw::clear(&mut nbd).map_err(fail)?;
    } else if !raw::is_empty(&mut nbd).map_err(fail)? {
        bail!("volume {:?} is not empty; say --force to replace all it holds", args.name);
    }
    let data = match format {
        Format::Raw => {
            let file = open(&args.file)?;
            let bar = progress::bar(size, args.client.json);
            let written = raw::import(&mut nbd, &file, size, &bar);
            bar.finish_and_clear();
            Some(written.map_err(|error| failed(&args.name, &format!("copying {} to", args.file.display()), error))?)
        }
        Format::Increment => bail!("an increment is applied to what is there"),
        Format::Qcow2 => {
            qemu::import(&args.file, &uri(daemon, &args.name)?, args.client.json)?;
            nbd.flush().map_err(fail)?;
            None
        }
    };
    // All is durable already; a goodbye that does not arrive changes nothing.
    let _ = nbd.disconnect();
    let seconds = begun.elapsed().as_secs_f64();
    Ok(Summary { volume: args.name.clone(), file: args.file.clone(), format, size, data, seconds })
}

/// Brings a copy of an older snapshot to a newer one.
fn apply_increment(args: &ImportArgs, daemon: &DaemonInfo) -> anyhow::Result<()> {
    if args.create {
        bail!("{} is an increment: it is applied to a volume that holds the older snapshot", args.file.display());
    }
    let begun = Instant::now();
    let bar = progress::bar(0, args.client.json);
    let mut increment = Increment::open(&args.file, &bar)?;
    let mut nbd = attach(daemon, &args.name)?;
    increment::check_size(&args.name, &increment.identity, nbd.size())?;
    let fits = increment.fits(&mut nbd).map_err(|error| failed(&args.name, "reading", error))?;
    if !fits && !args.force {
        bail!(
            "volume {:?} does not hold what the older snapshot of the increment held: it is a copy of another state, or was \
             written to since. Nothing was changed; --force applies it all the same",
            args.name
        );
    }
    let applied = increment.apply(&mut nbd, &bar);
    bar.finish_and_clear();
    applied.with_context(|| {
        format!("volume {:?} has part of the increment now; import it again to complete it", args.name)
    })?;
    // All is durable already.
    let _ = nbd.disconnect();
    let summary = Summary {
        volume: args.name.clone(),
        file: args.file.clone(),
        format: Format::Increment,
        size: increment.identity.size,
        data: Some(increment.changes.data),
        seconds: begun.elapsed().as_secs_f64(),
    };
    if args.client.json { print_json(&summary) } else { print(&summary.text("imported")) }
}

fn check_fits(name: &str, image: u64, volume: u64) -> anyhow::Result<()> {
    if image > volume {
        bail!(
            "the image has {} and does not fit volume {name:?} of {}; use a volume of at least {}",
            ByteSize(image),
            ByteSize(volume),
            ByteSize(image.next_multiple_of(BLOCK_SIZE))
        );
    }
    Ok(())
}

fn open(path: &Path) -> anyhow::Result<File> {
    File::open(path).with_context(|| format!("cannot open {}", path.display()))
}

/// Length of a file or a block device.
fn file_size(path: &Path) -> anyhow::Result<u64> {
    let what = || format!("cannot tell the size of {}", path.display());
    let mut file = open(path)?;
    if file.metadata().with_context(what)?.is_dir() {
        bail!("{} is a directory, not a disk image", path.display());
    }
    file.seek(SeekFrom::End(0)).with_context(what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_larger_than_the_volume_is_refused_with_the_size_it_needs() {
        assert!(check_fits("a", 4096, 4096).is_ok());
        let error = check_fits("a", (1 << 20) + 1, 1 << 20).unwrap_err().to_string();
        assert!(error.contains("at least 1028KiB"), "{error}");
    }

    #[test]
    fn sizes_of_what_is_not_an_image() {
        let tmp = tempfile::tempdir().unwrap();
        assert!(file_size(tmp.path()).unwrap_err().to_string().contains("directory"));
        assert!(file_size(&tmp.path().join("x")).unwrap_err().to_string().contains("cannot open"));
        std::fs::write(tmp.path().join("y"), [1; 777]).unwrap();
        assert_eq!(file_size(&tmp.path().join("y")).unwrap(), 777);
    }
}
