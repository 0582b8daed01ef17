//! What the admin socket carries. Sizes are bytes, times seconds unless the name says otherwise.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use zeroize::{Zeroize, Zeroizing};

use crate::crypt::Secret;
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
    /// The addresses for NVMe/TCP.
    #[serde(default)]
    pub nvme: Vec<SocketAddr>,
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
    /// Encrypted, and the daemon has no key for it.
    Locked,
    /// It could not be opened, or not be deleted.
    Failed,
    /// Another host serves it.
    Held,
    /// Another host served it, and its lease has run out.
    Expired,
    /// On its way to be released: what was accepted is being sent to the bucket.
    Releasing,
    /// Let go by this host; everything is in the bucket.
    Released,
    /// Lost to another host while this one served it; writes may be stranded here.
    Fenced,
}

impl VolumeState {
    /// As it is written in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Opening => "opening",
            Self::Open => "open",
            Self::Deleting => "deleting",
            Self::Locked => "locked",
            Self::Failed => "failed",
            Self::Held => "held",
            Self::Expired => "expired",
            Self::Releasing => "releasing",
            Self::Released => "released",
            Self::Fenced => "fenced",
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
    /// What unlocks it, `passphrase` or `key file`, if it is encrypted.
    #[serde(default)]
    pub encryption: Option<String>,
    /// Whether it is served.
    pub state: VolumeState,
    /// Why not, when that is known.
    pub error: Option<String>,
    /// Connections to it.
    pub clients: u64,
    /// Its name among NVMe/TCP hosts.
    #[serde(default)]
    pub nqn: String,
    /// NVMe/TCP hosts that are connected to it.
    #[serde(default)]
    pub nvme_hosts: Vec<NvmeHost>,
    /// Who holds it, when that is another host.
    #[serde(default)]
    pub holder: Option<LeaseStatus>,
    /// What this host acknowledged and the volume's history went on without.
    #[serde(default)]
    pub stranded: Option<StrandedStatus>,
    /// What was found when it was opened that somebody should know.
    #[serde(default)]
    pub notice: Option<String>,
    /// Its snapshots, oldest first.
    #[serde(default)]
    pub snapshots: Vec<SnapshotStatus>,
    /// `VOLUME@SNAPSHOT` that it was made of, if it is a clone.
    #[serde(default)]
    pub origin: Option<String>,
}

/// A snapshot.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct SnapshotStatus {
    /// The volume.
    pub volume: String,
    /// Its name. With the volume's before it and an `@` between them it is also the name of a read-only export.
    pub name: String,
    /// Its permanent identity.
    pub id: String,
    /// Size of the volume then, in bytes.
    pub size: u64,
    /// The last LSN in it.
    pub lsn: u64,
    /// The last chunk of the history in it.
    pub seq: u64,
    /// When it was made, in milliseconds since 1970.
    pub made_ms: u64,
    /// The clones made of it.
    pub clones: Vec<String>,
    /// Whether it is deleted as far as people are concerned, and waits for its clones to go.
    pub hidden: bool,
    /// Its name among NVMe/TCP hosts; empty if it is hidden.
    #[serde(default)]
    pub nqn: String,
}

/// `POST /v1/volumes/NAME/snapshots`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateSnapshot {
    /// Its name.
    pub name: String,
}

/// A controller: an NVMe/TCP host's association with a volume.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct NvmeHost {
    /// The host's name.
    pub nqn: String,
    /// Its identifier, by which reservations know it.
    pub id: String,
    /// Its address.
    pub peer: String,
    /// Its I/O queues.
    pub queues: u64,
}

/// What a lease says. Times are Unix milliseconds by its owner's clock.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct LeaseStatus {
    /// Identity of the owner's data directory, in hexadecimal.
    pub host: String,
    /// What the owner's machine calls itself.
    pub host_name: String,
    /// The owner's epoch; 0 while it is opening the volume.
    pub epoch: u64,
    /// When it was taken.
    pub since_ms: u64,
    /// When it was renewed last.
    pub renewed_ms: u64,
    /// When it ends unless it is renewed.
    pub until_ms: u64,
    /// Last LSN in the bucket, as the owner knew then.
    pub bucket_lsn: u64,
    /// Last LSN accepted then.
    pub last_lsn: u64,
    /// Bytes accepted and not in the bucket then.
    pub dirty_bytes: u64,
}

/// Acknowledged writes that never reached the bucket before another host took the volume over.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StrandedStatus {
    /// The volume's name.
    pub volume: String,
    /// Its identity.
    pub id: String,
    /// Epoch they were written under.
    pub epoch: u64,
    /// Epoch of the owner that went on without them.
    pub taken_epoch: u64,
    /// How many.
    pub writes: u64,
    /// Their payload in bytes.
    pub bytes: u64,
    /// The first.
    pub first_lsn: u64,
    /// The last.
    pub last_lsn: u64,
    /// When the first was written, Unix milliseconds.
    pub first_ms: u64,
    /// When the last was written, Unix milliseconds.
    pub last_ms: u64,
    /// The log that holds them.
    pub log: PathBuf,
    /// Whether they were set aside, so that they are in nobody's way.
    pub set_aside: bool,
}

/// `POST /v1/volumes/NAME/stranded/export`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExportStranded {
    /// The file, a whole path.
    pub file: PathBuf,
    /// Write them into the file that is there, instead of making a new one of the blocks that were written.
    #[serde(default)]
    pub apply: bool,
    /// Which, when there are several.
    #[serde(default)]
    pub epoch: Option<u64>,
}

/// Its answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ExportedStranded {
    /// What was exported.
    pub stranded: StrandedStatus,
    /// The list of all writes, beside the file.
    pub list: PathBuf,
    /// Bytes of copies by reference that are not in the file, because what they refer to cannot be read. The list says which.
    #[serde(default)]
    pub lost_bytes: u64,
}

/// Query of `POST /v1/volumes/NAME/open` and `/release`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Forced {
    /// Open: take it from the host that holds it. Release: even though clients are connected.
    #[serde(default)]
    pub force: bool,
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
    /// What is to unlock it; without, it is not encrypted.
    #[serde(default)]
    pub secret: Option<SecretText>,
}

/// `POST /v1/volumes/NAME/clone`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CloneVolume {
    /// Name of the new volume.
    pub name: String,
    /// The snapshot it is made of; without, of all that was written so far.
    pub snapshot: Option<String>,
    /// What is to unlock it, if the volume it is made of is encrypted. When absent, what the daemon's configuration has for
    /// either of them.
    #[serde(default)]
    pub secret: Option<SecretText>,
}

/// `POST /v1/volumes/NAME/restore`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreVolume {
    /// The snapshot to go back to.
    pub snapshot: String,
}

/// A passphrase or a key, as it goes over the admin socket, which only its owner may open.
#[derive(Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub enum SecretText {
    /// As typed.
    Passphrase(String),
    /// SHA-256 of the key file, in 64 hex digits.
    KeyFile(String),
}

impl From<&Secret> for SecretText {
    fn from(secret: &Secret) -> Self {
        match secret {
            Secret::Passphrase(text) => Self::Passphrase(String::clone(text)),
            Secret::KeyFile(key) => Self::KeyFile(key.iter().map(|byte| format!("{byte:02x}")).collect()),
        }
    }
}

impl SecretText {
    /// What it says.
    ///
    /// # Errors
    /// A sentence for the user.
    pub fn secret(&self) -> Result<Secret, String> {
        match self {
            Self::Passphrase(text) => Secret::passphrase(Zeroizing::new(text.clone())).map_err(|e| e.to_string()),
            Self::KeyFile(hex) => {
                let mut key = Zeroizing::new([0; 32]);
                let digits = |at: usize| u8::from_str_radix(hex.get(at..at + 2)?, 16).ok();
                let good = hex.len() == 64
                    && key.iter_mut().enumerate().all(|(i, byte)| digits(2 * i).map(|read| *byte = read).is_some());
                if good { Ok(Secret::KeyFile(key)) } else { Err("a key must have 64 hex digits".into()) }
            }
        }
    }
}

impl Drop for SecretText {
    fn drop(&mut self) {
        let (Self::Passphrase(text) | Self::KeyFile(text)) = self;
        text.zeroize();
    }
}

impl std::fmt::Debug for SecretText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("SecretText(..)")
    }
}

/// `POST /v1/volumes/NAME/unlock`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnlockVolume {
    /// What unlocks it.
    pub secret: SecretText,
}

/// `POST /v1/volumes/NAME/key`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangeKey {
    /// What unlocks it until now; may be absent while the daemon has it unlocked.
    pub old: Option<SecretText>,
    /// What is to unlock it from now on.
    pub new: SecretText,
}

/// `POST /v1/volumes/NAME/set`. What is absent stays.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SetVolume {
    /// Compression of new chunks.
    pub codec: Option<String>,
    /// When flushes are answered.
    pub durability: Option<String>,
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

/// `POST /v1/volumes/NAME/copy`: makes a range of an open volume what another one is, without moving data where that is
/// possible. Whole blocks of 4 KiB; the ranges do not overlap. What was answered to any client before is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CopyRange {
    /// First byte of the source.
    pub from: u64,
    /// First byte of the target.
    pub to: u64,
    /// Bytes.
    pub len: u64,
    /// Answer when it is durable, as after a flush.
    #[serde(default)]
    pub durable: bool,
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
    /// Read-only views that follow the owners of their volumes.
    #[serde(default)]
    pub followed: Vec<FollowStatus>,
    /// What was asked of the bucket since the daemon started.
    pub store: StoreCounters,
    /// Memory of the process.
    pub memory: MemoryStatus,
}

/// `GET /v1/volumes/NAME/snapshots/SNAPSHOT/changes?since=SNAPSHOT&start=BYTE`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ChangesPage {
    /// Size of the volume in the newer snapshot, in bytes.
    pub size: u64,
    /// What changed, in order.
    pub ranges: Vec<ChangedRange>,
    /// Where to go on, if there may be more.
    pub next: Option<u64>,
}

/// Bytes that are not, or may not be, what they were.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedRange {
    /// First byte, a multiple of 4 KiB.
    pub offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// They read as zeroes now.
    pub zero: bool,
}

/// Which changes.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChangesQuery {
    /// The older snapshot.
    pub since: String,
    /// From this byte on.
    #[serde(default)]
    pub start: u64,
}

/// How far a view is that follows the owner of a volume.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct FollowStatus {
    /// Its name, `VOLUME@latest`.
    pub export: String,
    /// Size of the volume, in bytes.
    pub size: u64,
    /// Newest chunk of what it shows.
    pub seq: u64,
    /// Newest LSN of what it shows.
    pub lsn: u64,
    /// When the owner cut that chunk, Unix milliseconds by its clock; 0 where nothing says.
    pub written_ms: u64,
    /// When it last showed all that the bucket had, Unix milliseconds.
    pub looked_ms: u64,
    /// Seconds since then: what the bucket got later is not shown yet.
    pub lag_seconds: f64,
    /// Why it does not get on, if so.
    pub error: Option<String>,
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
