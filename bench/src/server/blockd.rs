//! blockd's command lines, and what it says of itself.

use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use ::blockd::store::StoreCounters;
use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::Server;
use super::process::{self, START_TIMEOUT};
use crate::load::Endpoint;

/// The volume everything happens on.
pub const VOLUME: &str = "bench";
/// Its name among NVMe/TCP hosts.
pub const NQN: &str = "nqn.2026-01.io.blockd:bench";

/// How to run blockd.
#[derive(Clone, Debug)]
pub struct BlockdOptions {
    /// The program.
    pub program: PathBuf,
    /// `--store` of `serve`; without it a directory store inside the data directory.
    pub store_url: Option<String>,
    /// `--durability` of the volume.
    pub durability: Option<String>,
    /// More arguments for `serve`.
    pub serve_args: Vec<String>,
}

impl BlockdOptions {
    /// The program built beside this one, with its defaults.
    pub fn beside_us() -> Result<Self> {
        Ok(Self::at(process::beside_us("blockd")?))
    }

    /// This program, with its defaults.
    pub fn at(program: PathBuf) -> Self {
        Self { program, store_url: None, durability: None, serve_args: Vec::new() }
    }
}

/// What `blockd status --json` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VolumeStatus {
    /// The volume's permanent identity, in hexadecimal.
    pub id: String,
    /// Bytes written and not yet in the bucket.
    pub dirty_bytes: u64,
}

impl Server {
    fn data_dir(&self) -> PathBuf {
        self.dir.join("data")
    }

    pub(super) fn blockd_command(&self, options: &BlockdOptions) -> Command {
        let mut command = Command::new(&options.program);
        command.arg("serve").arg("--data").arg(self.data_dir());
        match &self.endpoint {
            Endpoint::Unix(path) => command.arg("--nbd-tcp=none").arg("--nbd-unix").arg(path),
            Endpoint::Tcp(addr) => command.arg("--nbd-unix=none").arg("--nbd-tcp").arg(addr.to_string()),
            Endpoint::Nvme(addr) => {
                command.args(["--nbd-unix=none", "--nbd-tcp=none", "--nvme"]).arg(addr.to_string());
                command.arg("--nvme-nqn").arg(format!("{VOLUME}={NQN}"))
            }
        };
        if let Some(url) = &options.store_url {
            command.arg("--store").arg(url);
        }
        command.args(&options.serve_args);
        command
    }

    /// Creates the volume if this is the first start. Retries while the daemon is not there yet.
    pub(super) fn ensure_volume(&mut self, options: &BlockdOptions) -> Result<()> {
        let made = self.dir.join("volume-made");
        if made.exists() {
            return Ok(());
        }
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let mut command = Command::new(&options.program);
            command.args(["volume", "create", VOLUME, "--size"]).arg(self.size_bytes.to_string());
            command.arg("--data").arg(self.data_dir());
            if let Some(durability) = &options.durability {
                command.arg("--durability").arg(durability);
            }
            let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
            if output.status.success() {
                std::fs::write(made, "")?;
                return Ok(());
            }
            let ended = self.child.as_mut().and_then(|child| child.try_wait().transpose());
            if ended.is_some() || Instant::now() > deadline {
                bail!(
                    "{command:?} failed: {}\nthe daemon said:\n{}",
                    String::from_utf8_lossy(&output.stderr),
                    self.log_tail()
                );
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// The disk of a server that does not run is lost.
    pub fn lose_data(&self) -> Result<()> {
        std::fs::remove_dir_all(self.data_dir()).context("cannot remove the data directory")
    }

    /// Opens the volume whoever holds it, and waits until it is served. Retries while the daemon is not there yet.
    pub fn open_by_force(&mut self, options: &BlockdOptions) -> Result<()> {
        let deadline = Instant::now() + START_TIMEOUT;
        loop {
            let mut command = Command::new(&options.program);
            command.args(["volume", "open", VOLUME, "--force", "--data"]).arg(self.data_dir());
            let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
            if output.status.success() {
                // It may be open before the daemon has begun to listen.
                return self.wait_until_ready(&command);
            }
            if Instant::now() > deadline {
                bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn status(&self, options: &BlockdOptions) -> Result<Value> {
        let mut command = Command::new(&options.program);
        command.args(["status", "--json", "--data"]).arg(self.data_dir());
        let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
        if !output.status.success() {
            bail!("{command:?} failed: {}", String::from_utf8_lossy(&output.stderr));
        }
        serde_json::from_slice(&output.stdout).with_context(|| format!("{command:?} did not print JSON"))
    }

    /// What the daemon asked of the bucket since it started.
    pub fn store_counters(&self, options: &BlockdOptions) -> Result<StoreCounters> {
        let mut status = self.status(options)?;
        serde_json::from_value(status["store"].take()).context("no counters of the store in the status")
    }

    /// What `blockd status --json` says of the volume.
    pub fn volume_status(&self, options: &BlockdOptions) -> Result<VolumeStatus> {
        let status = self.status(options)?;
        let volume = status["volumes"]
            .as_array()
            .and_then(|volumes| volumes.iter().find(|volume| volume["name"] == VOLUME))
            .with_context(|| format!("no volume {VOLUME} in {status}"))?;
        let dirty_bytes =
            volume["stats"]["dirty_bytes"].as_u64().with_context(|| format!("no stats.dirty_bytes in {volume}"))?;
        Ok(VolumeStatus { id: volume["id"].as_str().unwrap_or_default().to_owned(), dirty_bytes })
    }

    /// Waits until everything written is in the bucket.
    pub fn wait_destaged(&self, options: &BlockdOptions, timeout: Duration) -> Result<()> {
        let deadline = Instant::now() + timeout;
        loop {
            let status = self.volume_status(options)?;
            if status.dirty_bytes == 0 {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("{} bytes are not in the bucket after {timeout:?}", status.dirty_bytes);
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}
