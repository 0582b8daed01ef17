//! Servers to measure or to kill: blockd and what a user might run instead.
//!
//! Each is one child process with its own files in a directory, ended by its process id.

mod blockd;
mod delay;
mod peers;
pub(crate) mod process;

use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use ::blockd::export::nbd::client::NbdClient;
use anyhow::{Context, Result, bail};

pub use self::blockd::{BlockdOptions, VOLUME, VolumeStatus};
pub use self::delay::DelayedPath;
use crate::client::{Client, NvmeVolume};
use crate::load::{self, Endpoint, Outcome, Pool, Until, Workload};

/// Which server.
#[derive(Clone, Debug)]
pub enum Kind {
    /// nbdkit's memory plugin: the protocol's ceiling, keeps nothing.
    NbdkitMemory,
    /// nbdkit's file plugin on a raw file; a flush is fdatasync.
    NbdkitFile,
    /// qemu-nbd on a raw file; a flush is fdatasync.
    QemuNbd {
        /// The `--cache` mode.
        cache: &'static str,
        /// The `--aio` mode.
        aio: &'static str,
    },
    /// blockd.
    Blockd(BlockdOptions),
}

impl Kind {
    /// What tables call it.
    pub fn name(&self) -> &'static str {
        match self {
            Kind::NbdkitMemory => "nbdkit memory",
            Kind::NbdkitFile => "nbdkit file",
            Kind::QemuNbd { cache: "none", aio: "native" } => "qemu-nbd none/native",
            Kind::QemuNbd { cache: "none", aio: "io_uring" } => "qemu-nbd none/io_uring",
            Kind::QemuNbd { cache: "none", .. } => "qemu-nbd none/threads",
            Kind::QemuNbd { .. } => "qemu-nbd",
            Kind::Blockd(_) => "blockd",
        }
    }
}

/// How a server is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// NBD on a Unix socket.
    Unix,
    /// NBD on loopback TCP.
    Tcp,
    /// NVMe/TCP on loopback; only blockd.
    Nvme,
}

impl From<bool> for Transport {
    fn from(tcp: bool) -> Self {
        if tcp { Self::Tcp } else { Self::Unix }
    }
}

/// A server on its directory; it may run or not.
pub struct Server {
    kind: Kind,
    dir: PathBuf,
    size_bytes: u64,
    endpoint: Endpoint,
    child: Option<Child>,
}

impl Server {
    /// Makes the directory and whatever the server needs in it, an export of `size_bytes` that reads as zeroes among
    /// it, and starts it.
    pub fn create(kind: Kind, dir: &Path, size_bytes: u64, transport: impl Into<Transport>) -> Result<Self> {
        std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        let dir = dir.canonicalize()?;
        let endpoint = match transport.into() {
            Transport::Unix => Endpoint::Unix(dir.join("nbd.sock")),
            Transport::Tcp => Endpoint::Tcp(process::free_port()?),
            Transport::Nvme => Endpoint::Nvme(process::free_port()?),
        };
        let mut server = Self { kind, dir, size_bytes, endpoint, child: None };
        if matches!(server.kind, Kind::NbdkitFile | Kind::QemuNbd { .. }) {
            let file = std::fs::File::create(server.raw_file())?;
            file.set_len(size_bytes)?;
        }
        server.start()?;
        Ok(server)
    }

    /// Starts it again on what it left behind, and waits until it serves.
    pub fn start(&mut self) -> Result<()> {
        let command = self.spawn()?;
        if let Kind::Blockd(options) = &self.kind {
            self.ensure_volume(&options.clone())?;
        }
        self.wait_until_ready(&command)
    }

    /// Starts it without waiting for anything.
    pub fn spawn(&mut self) -> Result<Command> {
        assert!(self.child.is_none(), "started twice");
        if let Endpoint::Unix(path) = &self.endpoint {
            let _ = std::fs::remove_file(path);
        }
        let mut command = match &self.kind {
            Kind::Blockd(options) => self.blockd_command(options),
            _ => self.peer_command(),
        };
        let log = std::fs::File::options().create(true).append(true).open(self.log_file())?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command
            .spawn()
            .with_context(|| format!("cannot run {:?}; scripts/setup installs the peers", command.get_program()))?;
        self.child = Some(child);
        Ok(command)
    }

    /// Whether its process is there.
    pub fn alive(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    fn wait_until_ready(&mut self, command: &Command) -> Result<()> {
        let deadline = Instant::now() + process::START_TIMEOUT;
        loop {
            let error = match self.connect() {
                Ok(client) if client.size() == self.size_bytes => return Ok(()),
                Ok(client) => bail!("{} serves {} bytes instead of {}", self.name(), client.size(), self.size_bytes),
                Err(error) => error,
            };
            let ended = self.child.as_mut().and_then(|child| child.try_wait().transpose());
            if ended.is_some() || Instant::now() > deadline {
                bail!(
                    "{} does not serve: {error}; it was started by {command:?} and said, in {}:\n{}",
                    self.name(),
                    self.log_file().display(),
                    self.log_tail()
                );
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Which server it is.
    pub fn name(&self) -> &'static str {
        self.kind.name()
    }

    /// Where it listens.
    pub fn endpoint(&self) -> &Endpoint {
        &self.endpoint
    }

    /// What it is.
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// The export's name.
    pub fn export(&self) -> &'static str {
        match self.kind {
            Kind::Blockd(_) if matches!(self.endpoint, Endpoint::Nvme(_)) => blockd::NQN,
            Kind::Blockd(_) => blockd::VOLUME,
            _ => "",
        }
    }

    /// Its process id while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// A connection for checking, not for load.
    pub fn connect(&self) -> io::Result<Box<dyn Client>> {
        Ok(match &self.endpoint {
            Endpoint::Unix(path) => Box::new(NbdClient::connect_unix(path, self.export())?),
            Endpoint::Tcp(addr) => Box::new(NbdClient::connect_tcp(addr, self.export())?),
            Endpoint::Nvme(addr) => Box::new(NvmeVolume::connect(*addr, self.export())?),
        })
    }

    /// Puts a load on it. Errors bring what the server said last.
    pub fn drive(&self, workload: &Workload, until: Until, pool: &Pool, seed: u64) -> Result<Outcome> {
        load::run(self.endpoint(), self.export(), workload, until, pool, seed)
            .with_context(|| format!("driving {:?}, which said:\n{}", self.endpoint(), self.log_tail()))
    }

    /// Ends it with SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut child) = self.child.take() {
            child.kill().context("cannot kill the server")?;
            child.wait()?;
        }
        Ok(())
    }

    /// Ends it with SIGTERM and waits for it to finish in order.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        process::stop(self.child.take().context("the server does not run")?, self.name())
    }

    /// The last lines it printed.
    pub fn log_tail(&self) -> String {
        process::tail(&self.log_file())
    }

    fn log_file(&self) -> PathBuf {
        self.dir.join("server.log")
    }

    fn raw_file(&self) -> PathBuf {
        self.dir.join("disk.raw")
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if self.child.is_some()
            && let Err(error) = self.stop()
        {
            eprintln!("{error:#}");
        }
    }
}
