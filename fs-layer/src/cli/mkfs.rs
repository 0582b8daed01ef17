//! `fsd mkfs`.

use std::io::{self, BufRead, IsTerminal, Write};

use anyhow::{Context, bail};
use blockd::config::ByteSize;
use blockd::program::print;
use clap::Args;

use super::open::{self, Access};
use crate::config::{Place, Where};
use crate::disk::{BLOCK_BYTES, Disk};
use crate::layout::{MkfsError, MkfsOptions, mkfs};

/// A disk as large as this is thin: what it holds is given up by deleting it, not by discarding all of its addresses.
const THIN_BYTES: u64 = 1 << 50;
/// How much of a thin disk is looked at for something that was there before.
const LOOK_BYTES: usize = 1 << 20;

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  fsd mkfs                                   on a bucket in ./fsd-data
  fsd mkfs --store s3://bucket/prefix --label home
  fsd mkfs --disk /srv/disk.img --size 100GiB
  fsd mkfs --nbd nbd+unix:///disk?socket=/srv/blockd/nbd.sock

The disk should be much larger than what it will hold: addresses are never used twice, and only what is written takes
space. A volume in a bucket is made with 1 EiB.")]
pub(super) struct MkfsArgs {
    #[command(flatten)]
    place: Place,

    /// Name of the filesystem, for people
    #[arg(long, value_name = "TEXT", default_value = "", help_heading = "The filesystem")]
    label: String,

    /// Size of each of the 64 journals. Larger ones let more changes collect before they are written in place
    #[arg(long, value_name = "SIZE", default_value = "64MiB", help_heading = "The filesystem")]
    journal_size: ByteSize,

    /// Most that may be stored; 0: as much as the disk holds
    #[arg(long, value_name = "SIZE", default_value = "0", help_heading = "The filesystem")]
    quota: ByteSize,

    /// Most files that may exist; 0: no limit
    #[arg(long, value_name = "N", default_value = "0", help_heading = "The filesystem")]
    quota_files: u64,

    /// Permissions of the root directory, in octal
    #[arg(long, value_name = "MODE", default_value = "755", value_parser = octal, help_heading = "The filesystem")]
    root_mode: u32,

    /// With --disk: make a sparse file of this size if there is none
    #[arg(long, value_name = "SIZE", default_value = "1TiB", help_heading = "The filesystem")]
    size: ByteSize,

    /// Give up the filesystem that is there
    #[arg(long)]
    force: bool,

    /// With --force: do not ask
    #[arg(long)]
    yes: bool,
}

fn octal(text: &str) -> Result<u32, String> {
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o7777);
    mode.ok_or_else(|| format!("{text:?} are not permissions; write for instance 755 or 1777"))
}

pub(super) fn run(args: &MkfsArgs) -> anyhow::Result<()> {
    super::LogLevel::Warn.start();
    let size = match args.place.find()? {
        Where::File(path) if !path.exists() => Some(args.size),
        _ => None,
    };
    let opened = open::disk(&args.place, Access::Make(size))?;
    let disk = &opened.disk;
    if args.force && !args.yes {
        confirm(&format!("Everything on {} will be lost.", opened.description))?;
    }
    let options = MkfsOptions {
        label: args.label.clone(),
        journal_blocks: args.journal_size.0 / BLOCK_BYTES as u64,
        force: args.force,
        root_mode: args.root_mode,
        quota_bytes: args.quota.0,
        quota_files: args.quota_files,
        ..MkfsOptions::default()
    };
    let thin = disk.blocks() >= THIN_BYTES / BLOCK_BYTES as u64;
    let made = if thin {
        let mut begin = vec![0; LOOK_BYTES];
        disk.read(0, &mut begin).with_context(|| format!("cannot read {}", opened.description))?;
        if begin.iter().any(|byte| *byte != 0) {
            bail!(
                "{} is not empty, and too large to be emptied address by address: delete the volume and make it anew, which \
                 takes no time, then mkfs",
                opened.description
            );
        }
        mkfs(&Empty(&**disk), &options)
    } else {
        mkfs(&**disk, &options)
    };
    match made {
        Ok(()) => {}
        Err(MkfsError::Exists) => bail!("{}: {}", opened.description, MkfsError::Exists),
        Err(error) => return Err(error).with_context(|| format!("cannot make a filesystem on {}", opened.description)),
    }
    let size = ByteSize(disk.blocks() * BLOCK_BYTES as u64);
    let description = opened.description.clone();
    opened.close()?;
    print(&format!("made a filesystem on {description}, {size}\n"))
}

/// A disk known to hold nothing: discarding all of it is done already.
struct Empty<'a>(&'a dyn Disk);

impl Disk for Empty<'_> {
    fn blocks(&self) -> u64 {
        self.0.blocks()
    }

    fn read(&self, at: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read(at, buffer)
    }

    fn write(&self, at: u64, data: &[u8]) -> io::Result<()> {
        self.0.write(at, data)
    }

    fn flush(&self) -> io::Result<()> {
        self.0.flush()
    }

    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
}

/// Asks before something is lost.
fn confirm(question: &str) -> anyhow::Result<()> {
    let stdin = io::stdin();
    if !stdin.is_terminal() {
        bail!("not confirmed: there is no terminal to ask at; say --yes");
    }
    eprint!("{question}\nType yes to go on: ");
    io::stderr().flush()?;
    let mut answer = String::new();
    stdin.lock().read_line(&mut answer)?;
    if answer.trim() != "yes" {
        bail!("not confirmed; nothing was done");
    }
    Ok(())
}
