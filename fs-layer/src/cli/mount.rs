//! `fsd mount`.

use std::path::PathBuf;

use anyhow::Context;
use blockd::config::ByteSize;
use clap::{ArgMatches, Args};
use serde::{Deserialize, Serialize};

use super::open::{self, Access};
use super::service::{CommonSettings, ServiceArgs};
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

    #[command(flatten)]
    service: ServiceArgs,

    #[command(flatten)]
    settings: MountSettings,
}

/// Settings of `fsd mount`.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct MountSettings {
    #[command(flatten)]
    #[serde(flatten)]
    common: CommonSettings,

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

    /// Let idle processors sleep between requests, also in small virtual machines, where waking them is slow
    #[arg(long, help_heading = "The mount")]
    let_sleep: bool,
}

pub(super) fn run(args: MountArgs, matches: &ArgMatches) -> anyhow::Result<()> {
    let Some(mut settings) = args.service.settle(args.settings, matches)? else { return Ok(()) };
    let directory =
        std::path::absolute(&args.directory).context("cannot tell the working directory; give DIR as a whole path")?;
    let beginning = args.service.begin(&mut settings.common)?;
    if fuse::clear_dead(&directory)
        .with_context(|| format!("cannot unmount what is left on {}", directory.display()))?
    {
        tracing::info!("took away what an fsd that was killed had left mounted on {}", directory.display());
    }

    let access = if settings.read_only { Access::Read } else { Access::Write };
    // The kernel keeps what it reads.
    let opened = open::tree(&settings.common.place, access, &settings.common.tree, false)?;
    let options = FuseOptions {
        source: opened.description().to_owned(),
        sharing: Sharing::Alone,
        read_only: settings.read_only,
        allow_other: !settings.private,
        suid: !settings.no_suid,
        dev: !settings.no_dev,
        threads: settings.threads.into(),
        read_ahead: settings.read_ahead.0,
        keep_awake: !settings.let_sleep,
    };
    let mounted = fuse::mount(opened.tree(), &directory, &options)?;
    let stopper = mounted.stopper();
    let exports = vec![format!("mounted on {}", directory.display())];
    let running = beginning.ready(&settings.common, &opened, exports, move || match stopper.unmount() {
        Ok(true) => {}
        Ok(false) => tracing::warn!("files in the mount are still open; ending when the last is closed"),
        Err(error) => tracing::error!("cannot unmount {}: {error}", directory.display()),
    })?;
    mounted.wait().context("serving FUSE failed")?;
    running.stop();
    opened.close()
}
