//! What each long-running command does: announce itself, answer `fsd status`, and end in order.

use std::sync::Weak;
use std::time::Instant;

use anyhow::Context;
use blockd::program::{notify, print};

use super::open::OpenedTree;
use super::signals::Signals;
use crate::admin::{Admin, CountedTree, Status};
use crate::config::Place;
use crate::disk::CountedDisk;
use crate::vfs::Vfs;

/// A running fsd.
pub(super) struct Running {
    admin: Admin,
    ready: String,
}

impl Running {
    /// Answers `fsd status` from now on.
    pub(super) fn start(place: &Place, opened: &OpenedTree, exports: Vec<String>) -> anyhow::Result<Running> {
        let path = place.admin_path();
        let ready =
            format!("fsd ready: {}, {}, admin on {}\n", opened.description(), exports.join(", "), path.display());
        let start = Instant::now();
        let disk_name = opened.description().to_owned();
        let (tree, disk): (Weak<CountedTree>, Weak<CountedDisk>) = (opened.weak_tree(), opened.weak_disk());
        let status = move || {
            let (tree, disk) = (tree.upgrade()?, disk.upgrade()?);
            let stat = tree.statfs().ok()?;
            Some(Status {
                version: env!("CARGO_PKG_VERSION").to_owned(),
                pid: std::process::id(),
                uptime_s: start.elapsed().as_secs(),
                disk: disk_name.clone(),
                exports: exports.clone(),
                id: stat.id.iter().map(|byte| format!("{byte:02x}")).collect(),
                bytes_total: stat.bytes_total,
                bytes_free: stat.bytes_free,
                files_total: stat.files_total,
                files_free: stat.files_free,
                read_only: stat.read_only,
                tree: tree.counts(),
                on_disk: disk.counts(),
            })
        };
        Ok(Running { admin: Admin::listen(&path, std::sync::Arc::new(status))?, ready })
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
