//! `fsd serve`.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::mpsc;

use anyhow::Context;
use clap::{ArgMatches, Args};
use serde::{Deserialize, Serialize};

use super::nfs::{Nfs, NfsSettings};
use super::open::{self, Access};
use super::service::{CommonSettings, ServiceArgs};
use crate::export::fuse::{self, FuseOptions, Mounted, Sharing};

#[derive(Args, Debug)]
#[command(after_help = "\
Examples:
  fsd serve                                                  NFS on 127.0.0.1:2049, of a bucket in ./fsd-data
  fsd serve --nfs 0.0.0.0:2049 --client 10.0.0.0/8           for a network
  fsd serve --store s3://bucket/prefix --data /srv/fs --mount /mnt/fs

On a client: mount -t nfs4 -o vers=4.2 HOST:/ /mnt. Whoever can connect acts as any user but root (see --no-root-squash): NFS
trusts the numbers that clients say, so let only hosts connect that you trust, with --client.

Only one fsd at a time may have a filesystem. Every flag under a heading is also a key of the configuration file, without the dashes
before it. SIGTERM and SIGINT shut down in order, a second one ends at once; clients wait, and go on after the next start.")]
pub(super) struct ServeArgs {
    #[command(flatten)]
    service: ServiceArgs,

    #[command(flatten)]
    settings: ServeSettings,
}

/// Settings of `fsd serve`.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct ServeSettings {
    #[command(flatten)]
    #[serde(flatten)]
    common: CommonSettings,

    #[command(flatten)]
    #[serde(flatten)]
    nfs: NfsSettings,

    /// Mount it on a directory of this machine as well, over FUSE
    #[arg(long, value_name = "DIR", help_heading = "Exports")]
    #[serde(skip_serializing_if = "Option::is_none")]
    mount: Option<PathBuf>,
}

pub(super) fn run(args: ServeArgs, matches: &ArgMatches) -> anyhow::Result<()> {
    let Some(mut settings) = args.service.settle(args.settings, matches)? else { return Ok(()) };
    if let Some(directory) = &mut settings.mount {
        *directory = std::path::absolute(&*directory).context("cannot tell the working directory; give whole paths")?;
    }
    let beginning = args.service.begin(&mut settings.common)?;

    let read_only = settings.nfs.read_only && settings.mount.is_none();
    let access = if read_only { Access::Read } else { Access::Write };
    let opened = open::tree(&settings.common.place, access, &settings.common.tree, true)?;
    let mounted = settings.mount.as_ref().map(|directory| mount(directory, &opened)).transpose()?;
    let nfs = Nfs::start(opened.tree(), &settings.nfs, &settings.common.place.data)?;
    let mut exports: Vec<String> =
        nfs.addresses().iter().map(|(name, at): &(&str, SocketAddr)| format!("{name} on {at}")).collect();
    exports.extend(settings.mount.iter().map(|directory| format!("mounted on {}", directory.display())));
    let (stop, stopped) = mpsc::channel();
    let running = beginning.ready(&settings.common, &opened, exports, move || {
        let _ = stop.send(());
    })?;
    // A sender that is gone means the same.
    let _ = stopped.recv();
    nfs.stop();
    if let Some(mounted) = mounted {
        if !mounted.stopper().unmount().context("cannot unmount")? {
            tracing::warn!("files in the mount are still open; ending when the last is closed");
        }
        mounted.wait().context("serving FUSE failed")?;
    }
    running.stop();
    opened.close()
}

fn mount(directory: &std::path::Path, opened: &open::OpenedTree) -> anyhow::Result<Mounted> {
    fuse::clear_dead(directory).with_context(|| format!("cannot unmount what is left on {}", directory.display()))?;
    let source = opened.description().to_owned();
    let options = FuseOptions { source, sharing: Sharing::Shared, ..FuseOptions::default() };
    Ok(fuse::mount(opened.tree(), directory, &options)?)
}
