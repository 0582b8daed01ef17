//! What the admin socket carries. Sizes are bytes, times seconds unless the name says otherwise.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::store::StoreCounters;
use crate::volume::VolumeStats;

/// `GET /v1/info`: who answers.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct DaemonInfo {
    /// Version of the program.
    pub version: String,
    /// Its process.
    pub pid: u32,
    /// Identity of the data directory, in hexadecimal.
    pub host: String,
    /// The data directory.
    pub data: PathBuf,
    /// The bucket.
    pub store: String,
    /// The Unix socket for NBD.
    pub nbd_unix: Option<PathBuf>,
    /// The TCP addresses for NBD.
    pub nbd_tcp: Vec<SocketAddr>,
    /// Since its start; also the clock for rates between two samples.
    pub uptime_seconds: f64,
}

impl DaemonInfo {
    /// Where a client finds a volume, best place first.
    pub fn nbd_uris(&self, volume: &str) -> Vec<String> {
        let unix = self.nbd_unix.iter().map(|path| format!("nbd+unix:///{volume}?socket={}", uri_path(path)));
        let tcp = self.nbd_tcp.iter().map(|addr| format!("nbd://{addr}/{volume}"));
        unix.chain(tcp).collect()
    }
}

/// A path as a URI's query may carry it.
fn uri_path(path: &std::path::Path) -> String {
    use std::fmt::Write;
    use std::os::unix::ffi::OsStrExt;
    path.as_os_str().as_bytes().iter().fold(String::new(), |mut uri, &byte| {
        if byte.is_ascii_alphanumeric() || b"/-._~".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            let _ = write!(uri, "%{byte:02X}");
        }
        uri
    })
}

/// Whether a volume is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeState {
    /// In the store, not served by this daemon.
    #[default]
    Closed,
    /// Being created, or recovered from its log.
    Opening,
    /// Served.
    Open,
    /// On its way out of the store.
    Deleting,
    /// It could not be opened, or not be deleted.
    Failed,
}

impl VolumeState {
    /// As it is written in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Opening => "opening",
            Self::Open => "open",
            Self::Deleting => "deleting",
            Self::Failed => "failed",
        }
    }
}

/// A volume, as the daemon knows it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VolumeInfo {
    /// Its name, which is also the name of the export.
    pub name: String,
    /// Its permanent identity.
    pub id: String,
    /// Size in bytes.
    pub size: u64,
    /// `local` or `object`.
    pub durability: String,
    /// Compression of new chunks.
    pub codec: String,
    /// Payload of a full chunk in bytes.
    pub chunk_bytes: u64,
    /// When it was made, in milliseconds since 1970.
    pub created_ms: u64,
    /// Whether it is served.
    pub state: VolumeState,
    /// Why not, when that is known.
    pub error: Option<String>,
    /// Connections to it.
    pub clients: u64,
}

/// `GET /v1/volumes/NAME`: a volume and its counters.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// What it is.
    #[serde(flatten)]
    pub info: VolumeInfo,
    /// Where NBD clients find it, best place first; empty while it is not open.
    pub uris: Vec<String>,
    /// What it does, while it is open.
    pub stats: Option<VolumeStats>,
}

/// `POST /v1/volumes`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// Its name.
    pub name: String,
    /// Size in bytes, a multiple of 4 KiB.
    pub size: u64,
    /// `local` (the default) or `object`.
    pub durability: Option<String>,
    /// `none`, `lz4` (the default), `zstd` or `zstd:LEVEL`.
    pub codec: Option<String>,
    /// Payload of a chunk in bytes; the daemon's setting when absent.
    pub chunk_bytes: Option<u64>,
}

/// `POST /v1/volumes/NAME/resize`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResizeVolume {
    /// New size in bytes, a multiple of 4 KiB.
    pub size: u64,
    /// Whether it may be smaller than before, which loses what lies behind it.
    #[serde(default)]
    pub shrink: bool,
}

/// `GET /v1/volumes/NAME/rebuild`: how far it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct RebuildProgress {
    /// Whether one is under way.
    pub running: bool,
    /// Chunk headers read.
    pub headers: u64,
    /// Of how many; 0 while that is not known.
    pub of: u64,
}

/// Query of `DELETE /v1/volumes/NAME`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteVolume {
    /// Delete it even though clients are connected.
    #[serde(default)]
    pub force: bool,
}

/// `GET /v1/status`: everything at one moment.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Who answers.
    pub daemon: DaemonInfo,
    /// Every volume the daemon knows, by name.
    pub volumes: Vec<VolumeStatus>,
    /// What was asked of the bucket since the daemon started.
    pub store: StoreCounters,
    /// Memory of the process.
    pub memory: MemoryStatus,
}

/// Where memory goes, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryStatus {
    /// Resident memory of the process.
    pub resident_bytes: u64,
    /// Held by writes that are not in the bucket.
    pub dirty_bytes: u64,
    /// Most of that.
    pub dirty_limit_bytes: u64,
    /// Held by recently read blocks.
    pub cache_bytes: u64,
    /// Most of that.
    pub cache_limit_bytes: u64,
}

/// Body of every answer that is not a success.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ErrorBody {
    /// What failed, on what, and what to do.
    pub error: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_name_the_socket_first_and_escape_it() {
        let daemon = DaemonInfo {
            nbd_unix: Some("/run/my data/nbd.sock".into()),
            nbd_tcp: vec!["[::1]:10809".parse().unwrap()],
            ..Default::default()
        };
        assert_eq!(
            daemon.nbd_uris("disk"),
            ["nbd+unix:///disk?socket=/run/my%20data/nbd.sock", "nbd://[::1]:10809/disk"]
        );
    }
}
