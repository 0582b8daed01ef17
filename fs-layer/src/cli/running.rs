//! What each long-running command does: announce itself, answer `fsd status` and `fsd snapshot`, and end in order.

use std::sync::{Arc, Weak};
use std::time::Instant;

use anyhow::{Context, anyhow, bail};
use blockd::program::{explain, notify, print};

use super::open::OpenedTree;
use super::signals::Signals;
use crate::admin::{Admin, Answer, Answers, CountedTree, Request, Snapshots, Status};
use crate::config::Place;
use crate::disk::CountedDisk;
use crate::snapshots::SnapshotTree;
use crate::vfs::{Filesystem, Vfs};

/// A running fsd.
pub(super) struct Running {
    admin: Admin,
    ready: String,
}

impl Running {
    /// Answers `fsd status` and `fsd snapshot` from now on.
    pub(super) fn start(place: &Place, opened: &OpenedTree, exports: Vec<String>) -> anyhow::Result<Running> {
        let path = place.admin_path();
        let ready =
            format!("fsd ready: {}, {}, admin on {}\n", opened.description(), exports.join(", "), path.display());
        let about = About {
            start: Instant::now(),
            disk_name: opened.description().to_owned(),
            exports,
            tree: opened.weak_tree(),
            snapshots: opened.weak_snapshots(),
            disk: opened.weak_disk(),
        };
        Ok(Running { admin: Admin::listen(&path, Arc::new(about))?, ready })
    }

    /// Says on stdout, and to the service manager, that all is ready.
    pub(super) fn announce(&self) -> anyhow::Result<()> {
        notify("READY=1");
        print(&self.ready)
    }

    /// Answers nobody any more.
    pub(super) fn stop(self) {
        notify("STOPPING=1");
        drop(self.admin);
    }
}

/// What is told of a running fsd. Nothing here keeps it from ending.
struct About {
    start: Instant,
    disk_name: String,
    exports: Vec<String>,
    tree: Weak<CountedTree>,
    /// `None`: the disk has no snapshots.
    snapshots: Option<Weak<SnapshotTree<Filesystem>>>,
    disk: Weak<CountedDisk>,
}

impl Answers for About {
    fn answer(&self, request: Request) -> Answer {
        let answer = match request {
            Request::Status => self.status().map(|status| Answer::Status(Box::new(status))).ok_or_else(ending),
            Request::SnapshotList => self.list(),
            Request::SnapshotCreate { name } => self.create(&name),
            Request::SnapshotDelete { name } => self.delete(&name),
        };
        answer.unwrap_or_else(|error| Answer::Error(explain(&error)))
    }
}

fn ending() -> anyhow::Error {
    anyhow!("this fsd is ending")
}

impl About {
    fn status(&self) -> Option<Status> {
        let (tree, disk) = (self.tree.upgrade()?, self.disk.upgrade()?);
        let stat = tree.statfs().ok()?;
        let snapshots = self.snapshots.as_ref().and_then(Weak::upgrade);
        Some(Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            uptime_s: self.start.elapsed().as_secs(),
            disk: self.disk_name.clone(),
            exports: self.exports.clone(),
            id: stat.id.iter().map(|byte| format!("{byte:02x}")).collect(),
            bytes_total: stat.bytes_total,
            bytes_free: stat.bytes_free,
            files_total: stat.files_total,
            files_free: stat.files_free,
            read_only: stat.read_only,
            snapshots_open: snapshots.map(|snapshots| snapshots.shelf().open_count() as u64),
            tree: tree.counts(),
            on_disk: disk.counts(),
        })
    }

    fn snapshots(&self) -> anyhow::Result<Arc<SnapshotTree<Filesystem>>> {
        match &self.snapshots {
            Some(snapshots) => snapshots.upgrade().ok_or_else(ending),
            None => bail!(
                "{} cannot have snapshots: they are those of a volume of blockd, which --store and --nbd are for",
                self.disk_name
            ),
        }
    }

    fn list(&self) -> anyhow::Result<Answer> {
        let tree = self.snapshots()?;
        let snapshots = tree.shelf().infos()?;
        Ok(Answer::Snapshots(Snapshots { snapshots, shown: tree.is_shown() }))
    }

    fn create(&self, name: &str) -> anyhow::Result<Answer> {
        let tree = self.snapshots()?;
        let made = tree.create(name)?;
        Ok(Answer::Snapshots(Snapshots { snapshots: vec![made], shown: tree.is_shown() }))
    }

    fn delete(&self, name: &str) -> anyhow::Result<Answer> {
        self.snapshots()?.delete(name)?;
        Ok(Answer::Done)
    }
}

/// Runs `stop` at the first SIGTERM or SIGINT, and ends the process at the second.
pub(super) fn on_signal(signals: Signals, stop: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    let wait = move || {
        if let Ok(signal) = signals.wait() {
            tracing::info!("{signal}: shutting down; once more ends it at once");
            stop();
        }
        if let Ok(signal) = signals.wait() {
            tracing::warn!("{signal} again: ending at once; the next start recovers from the journal");
            std::process::exit(1);
        }
    };
    std::thread::Builder::new().name("signals".to_owned()).spawn(wait).context("cannot start a thread for signals")?;
    Ok(())
}

/// Ends the process when any thread panics: what it was about is unknown, while a restart recovers from the journal.
pub(super) fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        eprintln!("fsd: this must not happen; ending, so that a restart recovers from the journal");
        std::process::abort();
    }));
}
