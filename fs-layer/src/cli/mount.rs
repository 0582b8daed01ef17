//! `fsd mount`.

use std::path::PathBuf;

use anyhow::Context;
use clap::{ArgMatches, Args};
use serde::{Deserialize, Serialize};

use super::background::Background;
use super::open::{self, Access};
use super::running::{self, Running};
use super::signals::Signals;
use super::{LogLevel, print};
use crate::config::{ByteSize, Place, merge_file};
use crate::export::fuse::{self, FuseOptions, Sharing};

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  fsd mount /mnt/fs                                      until Ctrl-C or umount
  fsd mount /mnt/fs --daemon --data /srv/fs              in the background; umount /mnt/fs ends it
  fsd mount /mnt/fs --nbd nbd://10.0.0.5:10809/disk

Only one fsd at a time may have a filesystem. Every flag under a heading is also a key of the configuration file, without the
dashes before it. SIGTERM and SIGINT unmount and shut down in order, a second one ends at once; nothing that was synced is lost in either
case.")]
pub(super) struct MountArgs {
    /// Directory to mount on
    #[arg(value_name = "DIR")]
    directory: PathBuf,

    /// Go to the background once it is mounted
    #[arg(long)]
    daemon: bool,

    /// TOML file with any of the settings below
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Print the settings as they come out of file, environment and flags, and do nothing else
    #[arg(long)]
    print_config: bool,

    #[command(flatten)]
    settings: MountSettings,
}

/// Settings of `fsd mount`.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct MountSettings {
    #[command(flatten)]
    #[serde(flatten)]
    place: Place,

    /// Refuse changes
    #[arg(long, help_heading = "The mount")]
    read_only: bool,

    /// Let only the user who mounts see the directory
    #[arg(long, help_heading = "The mount")]
    private: bool,

    /// Ignore set-id bits of programs
    #[arg(long, help_heading = "The mount")]
    no_suid: bool,

    /// Do not open devices through device files
    #[arg(long, help_heading = "The mount")]
    no_dev: bool,

    /// Requests worked on at once
    #[arg(long, value_name = "N", default_value = "16", value_parser = clap::value_parser!(u16).range(1..=256), help_heading = "The mount")]
    threads: u16,

    /// How far the kernel reads ahead
    #[arg(long, value_name = "SIZE", default_value = "4MiB", help_heading = "The mount")]
    read_ahead: ByteSize,

    #[command(flatten)]
    #[serde(flatten)]
    memory: open::TreeSettings,

    /// What is logged to stderr
    #[arg(long, value_name = "LEVEL", default_value = "info", help_heading = "Messages")]
    log_level: LogLevel,

    /// Where messages go with --daemon [default: <data>/fsd.log]
    #[arg(long, value_name = "FILE", help_heading = "Messages")]
    #[serde(skip_serializing_if = "Option::is_none")]
    log_file: Option<PathBuf>,
}

pub(super) fn run(args: MountArgs, matches: &ArgMatches) -> anyhow::Result<()> {
    let mut settings = match &args.config {
        Some(path) => merge_file(&args.settings, matches, path)?,
        None => args.settings,
    };
    if args.print_config {
        return print(&toml::to_string(&settings)?);
    }
    // In the background, and in messages, other working directories do not matter.
    settings.place.make_absolute().context("cannot tell the working directory; give whole paths")?;
    let directory =
        std::path::absolute(&args.directory).context("cannot tell the working directory; give DIR as a whole path")?;
    let signals = Signals::catch();
    let background = if args.daemon { Some(Background::split().context("cannot go to the background")?) } else { None };
    settings.log_level.start();
    running::abort_on_panic();
    if fuse::clear_dead(&directory)
        .with_context(|| format!("cannot unmount what is left on {}", directory.display()))?
    {
        tracing::info!("took away what an fsd that was killed had left mounted on {}", directory.display());
    }

    let access = if settings.read_only { Access::Read } else { Access::Write };
    // The kernel keeps what it reads.
    let opened = open::tree(&settings.place, access, &settings.memory, false)?;
    let options = FuseOptions {
        source: opened.description().to_owned(),
        sharing: Sharing::Alone,
        read_only: settings.read_only,
        allow_other: !settings.private,
        suid: !settings.no_suid,
        dev: !settings.no_dev,
        threads: settings.threads.into(),
        read_ahead: settings.read_ahead.0,
    };
    let mounted = fuse::mount(opened.tree(), &directory, &options)?;
    let stopper = mounted.stopper();
    let exports = vec![format!("mounted on {}", directory.display())];
    let running = Running::start(&settings.place, &opened, exports)?;
    running.announce()?;
    if let Some(background) = background {
        let log = settings.log_file.unwrap_or_else(|| settings.place.data.join("fsd.log"));
        background.ready(&log).with_context(|| format!("cannot log to {}", log.display()))?;
    }
    running::on_signal(signals, move || match stopper.unmount() {
        Ok(true) => {}
        Ok(false) => tracing::warn!("files in the mount are still open; ending when the last is closed"),
        Err(error) => tracing::error!("cannot unmount {}: {error}", directory.display()),
    })?;
    mounted.wait().context("serving FUSE failed")?;
    running.stop();
    opened.close()
}
