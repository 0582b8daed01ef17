//! HTTP over the admin socket, from the side that asks.

use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail};
use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::admin::api::{
    ChangeKey, ChangesPage, CloneVolume, CopyRange, CreateSnapshot, CreateVolume, DaemonInfo, ErrorBody,
    ExportStranded, ExportedStranded, RebuildProgress, ResizeVolume, RestoreVolume, SetVolume, SnapshotStatus, Status,
    StrandedStatus, UnlockVolume, VolumeStatus,
};

/// Talks to the daemon on one admin socket. Every call connects anew, so a daemon that restarts does not matter.
pub struct Client {
    socket: PathBuf,
    data: PathBuf,
}

impl Client {
    /// The daemon that answers on `socket`; `data` only serves messages.
    pub fn new(socket: PathBuf, data: &Path) -> Self {
        Self { socket, data: data.to_owned() }
    }

    /// Who answers.
    pub async fn info(&self) -> anyhow::Result<DaemonInfo> {
        self.call(Method::GET, "/v1/info", None::<&()>).await
    }

    /// Everything.
    pub async fn status(&self) -> anyhow::Result<Status> {
        self.call(Method::GET, "/v1/status", None::<&()>).await
    }

    /// All volumes.
    pub async fn volumes(&self) -> anyhow::Result<Vec<VolumeStatus>> {
        self.call(Method::GET, "/v1/volumes", None::<&()>).await
    }

    /// One volume. Names are checked before they come here, so they need no escaping.
    pub async fn volume(&self, name: &str) -> anyhow::Result<VolumeStatus> {
        self.call(Method::GET, &format!("/v1/volumes/{name}"), None::<&()>).await
    }

    /// Makes a volume.
    pub async fn create(&self, request: &CreateVolume) -> anyhow::Result<VolumeStatus> {
        self.call(Method::POST, "/v1/volumes", Some(request)).await
    }

    /// Serves a volume that is not served.
    pub async fn open(&self, name: &str, force: bool) -> anyhow::Result<VolumeStatus> {
        self.call(Method::POST, &format!("/v1/volumes/{name}/open?force={force}"), None::<&()>).await
    }

    /// Sends all of a volume to the bucket and lets it go.
    pub async fn release(&self, name: &str, force: bool) -> anyhow::Result<VolumeStatus> {
        self.call(Method::POST, &format!("/v1/volumes/{name}/release?force={force}"), None::<&()>).await
    }

    /// All stranded writes of this host.
    pub async fn stranded(&self) -> anyhow::Result<Vec<StrandedStatus>> {
        self.call(Method::GET, "/v1/stranded", None::<&()>).await
    }

    /// Writes stranded writes to a file.
    pub async fn export_stranded(&self, name: &str, request: &ExportStranded) -> anyhow::Result<ExportedStranded> {
        self.call(Method::POST, &format!("/v1/volumes/{name}/stranded/export"), Some(request)).await
    }

    /// Sets stranded writes aside.
    pub async fn discard_stranded(&self, name: &str) -> anyhow::Result<StrandedStatus> {
        self.call(Method::POST, &format!("/v1/volumes/{name}/stranded/discard"), None::<&()>).await
    }

    /// Opens a volume with a translation table made of chunk headers alone.
    pub async fn rebuild(&self, name: &str) -> anyhow::Result<VolumeStatus> {
        self.call(Method::POST, &format!("/v1/volumes/{name}/rebuild"), None::<&()>).await
    }

    /// How far that is.
    pub async fn rebuild_progress(&self, name: &str) -> anyhow::Result<RebuildProgress> {
        self.call(Method::GET, &format!("/v1/volumes/{name}/rebuild"), None::<&()>).await
    }

    /// Makes a range of an open volume what another one is, without moving data where that is possible.
    pub async fn copy(&self, name: &str, request: &CopyRange) -> anyhow::Result<()> {
        self.call(Method::POST, &format!("/v1/volumes/{name}/copy"), Some(request)).await
    }

    /// Changes a volume's size.
    pub async fn resize(&self, name: &str, request: &ResizeVolume) -> anyhow::Result<VolumeStatus> {
        self.call(Method::POST, &format!("/v1/volumes/{name}/resize"), Some(request)).await
    }

    /// Unlocks an encrypted volume and serves it.
    pub async fn unlock(&self, name: &str, request: &UnlockVolume) -> anyhow::Result<VolumeStatus> {
        self.call(Method::POST, &format!("/v1/volumes/{name}/unlock"), Some(request)).await
    }

    /// Changes what unlocks a volume.
    pub async fn change_key(&self, name: &str, request: &ChangeKey) -> anyhow::Result<VolumeStatus> {
        self.call(Method::POST, &format!("/v1/volumes/{name}/key"), Some(request)).await
    }

    /// Changes a volume's settings.
    pub async fn set(&self, name: &str, request: &SetVolume) -> anyhow::Result<VolumeStatus> {
        self.call(Method::POST, &format!("/v1/volumes/{name}/set"), Some(request)).await
    }

    /// Removes a volume.
    pub async fn delete(&self, name: &str, force: bool) -> anyhow::Result<()> {
        let path = format!("/v1/volumes/{name}?force={force}");
        self.call::<serde_json::Value>(Method::DELETE, &path, None::<&()>).await.map(drop)
    }

    /// What changed from one snapshot to another, from the byte `start` on.
    pub async fn changes(&self, volume: &str, from: &str, to: &str, start: u64) -> anyhow::Result<ChangesPage> {
        let path = format!("/v1/volumes/{volume}/snapshots/{to}/changes?since={from}&start={start}");
        self.call(Method::GET, &path, None::<&()>).await
    }

    /// Snapshots of a volume, or of all.
    pub async fn snapshots(&self, volume: Option<&str>) -> anyhow::Result<Vec<SnapshotStatus>> {
        let path = volume.map_or("/v1/snapshots".to_owned(), |volume| format!("/v1/volumes/{volume}/snapshots"));
        self.call(Method::GET, &path, None::<&()>).await
    }

    /// Makes a snapshot.
    pub async fn create_snapshot(&self, volume: &str, name: &str) -> anyhow::Result<SnapshotStatus> {
        let request = CreateSnapshot { name: name.to_owned() };
        self.call(Method::POST, &format!("/v1/volumes/{volume}/snapshots"), Some(&request)).await
    }

    /// Makes a clone of a volume.
    pub async fn clone_volume(&self, source: &str, request: &CloneVolume) -> anyhow::Result<VolumeStatus> {
        self.call(Method::POST, &format!("/v1/volumes/{source}/clone"), Some(request)).await
    }

    /// Makes the state of a volume that of a snapshot.
    pub async fn restore(&self, volume: &str, snapshot: &str) -> anyhow::Result<VolumeStatus> {
        let request = RestoreVolume { snapshot: snapshot.to_owned() };
        self.call(Method::POST, &format!("/v1/volumes/{volume}/restore"), Some(&request)).await
    }

    /// Deletes a snapshot.
    pub async fn delete_snapshot(&self, volume: &str, name: &str) -> anyhow::Result<()> {
        let path = format!("/v1/volumes/{volume}/snapshots/{name}");
        self.call::<serde_json::Value>(Method::DELETE, &path, None::<&()>).await.map(drop)
    }

    async fn call<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: Option<&impl Serialize>,
    ) -> anyhow::Result<T> {
        let stream = UnixStream::connect(&self.socket).await.map_err(|error| self.no_answer(error))?;
        let hung_up = || format!("the daemon on {} hung up", self.socket.display());
        let (mut sender, connection) =
            hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.with_context(hung_up)?;
        tokio::spawn(connection);
        let body = match body {
            Some(body) => serde_json::to_vec(body)?,
            None => Vec::new(),
        };
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "blockd")
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))?;
        let answer = sender.send_request(request).await.with_context(hung_up)?;
        let status = answer.status();
        let body = answer.into_body().collect().await.with_context(hung_up)?.to_bytes();
        if !status.is_success() {
            match serde_json::from_slice::<ErrorBody>(&body) {
                Ok(refused) => bail!(refused.error),
                Err(_) => bail!("the daemon on {} answered {status}", self.socket.display()),
            }
        }
        serde_json::from_slice(&body).with_context(|| {
            format!("the daemon on {} is of another version; use its own blockd command", self.socket.display())
        })
    }

    fn no_answer(&self, error: io::Error) -> anyhow::Error {
        let (socket, data) = (self.socket.display(), self.data.display());
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => anyhow!(
                "no blockd answers on {socket}; start it with `blockd serve --data {data}`, or name its data directory \
                 with --data"
            ),
            io::ErrorKind::PermissionDenied => {
                anyhow!("may not talk to the daemon on {socket}; use the user it runs as")
            }
            _ => anyhow!("cannot connect to {socket}: {error}"),
        }
    }
}
