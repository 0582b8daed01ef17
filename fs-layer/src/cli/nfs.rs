//! NFS as `fsd serve` has it.

use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::export::nfs4::{DirectoryRecords, ExportOptions, Groups, Network, NfsOptions, Server};
use crate::vfs::Vfs;

/// Settings of the NFS server.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct NfsSettings {
    /// Address for NFS 3, 4.1 and 4.2
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:2049", help_heading = "Exports")]
    pub nfs: SocketAddr,

    /// Networks whose hosts may connect, for instance 10.0.0.0/8; may be given several times [default: all]
    #[arg(long, value_name = "NETWORK", value_parser = network, help_heading = "Exports")]
    pub client: Vec<String>,

    /// Refuse changes over NFS
    #[arg(long, help_heading = "Exports")]
    pub read_only: bool,

    /// Let root of a client be root here
    #[arg(long, help_heading = "Exports")]
    pub no_root_squash: bool,

    /// Let all users of all clients be the same one, without rights of its own
    #[arg(long, help_heading = "Exports")]
    pub all_squash: bool,

    /// The user that root, or everybody, becomes
    #[arg(long, value_name = "UID", default_value = "65534", help_heading = "Exports")]
    pub anonymous_uid: u32,

    /// Its group
    #[arg(long, value_name = "GID", default_value = "65534", help_heading = "Exports")]
    pub anonymous_gid: u32,

    /// Look the groups of users up on this host: the protocol carries no more than 16. Of what clients say, only the first group counts then
    #[arg(long, help_heading = "Exports")]
    pub manage_gids: bool,

    /// Seconds that a silent client keeps its open files and locks for sure, and that others wait after a start
    #[arg(long, value_name = "SECS", default_value = "90", value_parser = clap::value_parser!(u64).range(5..=3600), help_heading = "Exports")]
    pub lease: u64,
}

fn network(text: &str) -> Result<String, String> {
    text.parse::<Network>().map(|_| text.to_owned())
}

/// The running server.
pub(super) struct Nfs {
    server: Server,
}

impl Nfs {
    pub(super) fn start(tree: Arc<dyn Vfs>, settings: &NfsSettings, data: &Path) -> anyhow::Result<Nfs> {
        let records = data.join("nfs-clients");
        let records = DirectoryRecords::open(&records)
            .with_context(|| format!("cannot keep NFS clients in {}", records.display()))?;
        let clients = settings.client.iter().map(|text| text.parse::<Network>().map_err(anyhow::Error::msg));
        let options = NfsOptions {
            export: ExportOptions {
                clients: clients.collect::<anyhow::Result<_>>()?,
                root_squash: !settings.no_root_squash,
                all_squash: settings.all_squash,
                read_only: settings.read_only,
                anonymous_uid: settings.anonymous_uid,
                anonymous_gid: settings.anonymous_gid,
                groups: settings.manage_gids.then(|| Arc::new(Groups::of_host())),
            },
            lease: Duration::from_secs(settings.lease),
            grace: Duration::from_secs(settings.lease),
            ..NfsOptions::new(Arc::new(records))
        };
        let listener = TcpListener::bind(settings.nfs).with_context(|| {
            format!("cannot listen on {}; another NFS server may have the port: choose with --nfs", settings.nfs)
        })?;
        let server = Server::start(listener, tree, options).context("cannot start NFS")?;
        Ok(Nfs { server })
    }

    /// Protocols and where they listen.
    pub(super) fn addresses(&self) -> Vec<(&'static str, SocketAddr)> {
        vec![("NFS 3, 4.1 and 4.2", self.server.address())]
    }

    /// Ends all connections.
    pub(super) fn stop(self) {
        // The process ends: what open files without names held waits on the disk for the clients.
        let _held = self.server.stop();
    }
}
