//! `blockd volume import` and `export`: disk images in and out through NBD, as any client would do it.
//!
//! [`raw`] moves raw images with many requests in flight and leaves holes alone, [`qemu`] leaves qcow2 to qemu-img,
//! [`increment`] moves what changed between two snapshots, [`sparse`] finds holes and zeroes, [`format`] tells formats apart, [`progress`] shows how far it is.

mod export;
mod format;
mod import;
mod increment;
mod progress;
mod qemu;
mod raw;
mod sparse;

use std::io;

use anyhow::{anyhow, bail};
use serde::Serialize;

use crate::admin::api::DaemonInfo;
use crate::export::nbd::client::NbdClient;
use crate::program::text;

pub(super) use export::{ExportArgs, run as export};
pub(super) use import::{ImportArgs, run as import};
pub(super) use progress::count_bar;

/// What a transfer did.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Summary {
    volume: String,
    file: std::path::PathBuf,
    format: format::Format,
    /// Bytes of the image, holes included.
    size: u64,
    /// Bytes moved; unknown when qemu-img moved them.
    data: Option<u64>,
    seconds: f64,
}

impl Summary {
    fn text(&self, verb: &str) -> String {
        let data = self.data.map_or_else(String::new, |data| format!(", {} of it data", text::bytes(data)));
        format!(
            "{verb} {} ({}{data}) in {}, {}/s\n",
            self.volume,
            text::bytes(self.size),
            text::seconds(self.seconds),
            text::bytes(self.data.unwrap_or(self.size) as f64 / self.seconds.max(1e-3))
        )
    }
}

/// Attaches a volume as the daemon offers it, over its Unix socket if it has one.
fn attach(daemon: &DaemonInfo, volume: &str) -> anyhow::Result<NbdClient> {
    let attached = match (&daemon.nbd_unix, daemon.nbd_tcp.first()) {
        (Some(path), _) => NbdClient::connect_unix(path, volume),
        (None, Some(addr)) => NbdClient::connect_tcp(addr, volume),
        (None, None) => bail!("the daemon does not accept NBD clients yet; try again when it is ready"),
    };
    attached.map_err(|error| anyhow!("cannot attach volume {volume:?}: {error}"))
}

/// The URI qemu-img finds a volume by.
fn uri(daemon: &DaemonInfo, volume: &str) -> anyhow::Result<String> {
    let uri = daemon.nbd_uris(volume).into_iter().next();
    uri.ok_or_else(|| anyhow!("the daemon does not accept NBD clients yet; try again when it is ready"))
}

/// A failed transfer of `volume`, in the words of its user.
fn failed(volume: &str, doing: &str, error: io::Error) -> anyhow::Error {
    anyhow!("{doing} volume {volume:?} failed: {error}")
}
