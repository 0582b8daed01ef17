//! The NFS servers that are compared: fsd on a file, Ganesha on a directory, both in one directory on one disk.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::client::Session;
use crate::fs::drop_caches;
use crate::server::process;

/// Which server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ours.
    Fsd,
    /// nfs-ganesha with its module for the kernel's filesystems.
    Ganesha,
}

impl Kind {
    /// What tables call it.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Fsd => "fsd",
            Kind::Ganesha => "Ganesha",
        }
    }
}

/// A server that runs, or will again.
pub struct Server {
    kind: Kind,
    dir: PathBuf,
    addr: SocketAddr,
    fsd: PathBuf,
    /// fsd keeps its tree in a bucket, not in a file.
    bucket: bool,
    child: Option<Child>,
}

impl Server {
    /// Makes what it needs in a new directory and starts it. fsd keeps its tree in a file there, or in a bucket.
    pub fn create(kind: Kind, fsd: &Path, bucket: bool, dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir.join("tree"))?;
        let dir = dir.canonicalize()?;
        let addr = process::free_port()?;
        let mut server = Self { kind, dir, addr, fsd: fsd.to_owned(), bucket, child: None };
        match kind {
            Kind::Fsd => {
                let made = server.fsd("mkfs").stdout(Stdio::null()).status();
                ensure!(made.context("cannot run fsd")?.success(), "fsd mkfs failed");
            }
            Kind::Ganesha => server.configure()?,
        }
        server.start()?;
        Ok(server)
    }

    /// Which one it is.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// A client with a session.
    pub fn connect(&self, name: &str) -> Result<Session> {
        Session::connect(self.addr, name).with_context(|| format!("{} said:\n{}", self.kind.name(), self.said()))
    }

    /// Ends it in order and starts it again, with nothing in the kernel's caches.
    pub fn make_cold(&mut self) -> Result<()> {
        self.stop()?;
        drop_caches()?;
        self.start()
    }

    fn fsd(&self, command: &str) -> Command {
        let mut fsd = Command::new(&self.fsd);
        fsd.arg(command).arg("--data").arg(self.dir.join("data"));
        if !self.bucket {
            fsd.arg("--disk").arg(self.dir.join("disk"));
        }
        fsd
    }

    fn configure(&self) -> Result<()> {
        let (tree, port) = (self.dir.join("tree"), self.addr.port());
        let text = format!(
            "NFS_CORE_PARAM {{ Protocols = 4; NFS_Port = {port}; Bind_addr = 127.0.0.1; Enable_NLM = false; Enable_RQUOTA = false; }}\n\
             NFSv4 {{ Graceless = true; RecoveryBackend = fs; }}\n\
             EXPORT {{ Export_Id = 1; Path = {}; Pseudo = /; Access_Type = RW; Squash = No_Root_Squash; SecType = sys; FSAL {{ Name = VFS; }} }}\n",
            tree.display()
        );
        for dir in ["/var/run/ganesha", "/var/lib/nfs/ganesha"] {
            std::fs::create_dir_all(dir).with_context(|| format!("cannot make {dir}; run as root"))?;
        }
        Ok(std::fs::write(self.dir.join("ganesha.conf"), text)?)
    }

    fn start(&mut self) -> Result<()> {
        let mut command = match self.kind {
            Kind::Fsd => {
                let mut fsd = self.fsd("serve");
                fsd.args(["--no-root-squash", "--nfs"]).arg(self.addr.to_string());
                fsd
            }
            Kind::Ganesha => {
                let mut ganesha = Command::new("ganesha.nfsd");
                ganesha.arg("-F").arg("-f").arg(self.dir.join("ganesha.conf"));
                ganesha.arg("-L").arg(self.dir.join("log")).arg("-p").arg(self.dir.join("pid"));
                ganesha
            }
        };
        let log = std::fs::File::options().create(true).append(true).open(self.dir.join("log"))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let child = command.spawn().with_context(|| {
            format!(
                "cannot run {:?}; Ganesha is in Debian's packages nfs-ganesha and nfs-ganesha-vfs",
                command.get_program()
            )
        })?;
        self.child = Some(child);
        let deadline = Instant::now() + process::START_TIMEOUT;
        loop {
            // Ganesha listens before it answers.
            let found = Session::connect(self.addr, "is it there").and_then(|mut session| session.root());
            let Err(error) = found else { return Ok(()) };
            let ended = self.child.as_mut().and_then(|child| child.try_wait().transpose()).is_some();
            if ended || Instant::now() > deadline {
                bail!("{} does not serve: {error:#}; it said:\n{}", self.kind.name(), self.said());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn stop(&mut self) -> Result<()> {
        self.child.take().map_or(Ok(()), |child| process::stop(child, self.kind.name()).map(drop))
    }

    fn said(&self) -> String {
        process::tail(&self.dir.join("log"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Err(error) = self.stop() {
            eprintln!("{error:#}");
        }
    }
}
