//! `blockd volume rebuild`: opening a volume with a translation table made of chunk headers alone.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::volumes::{Daemon, Phase, VolumeError};
use crate::admin::api::{RebuildProgress, VolumeStatus};
use crate::program::text::{date, seconds};
use crate::volume::{OpenReport, Progress};

/// The rebuilds that are under way.
#[derive(Default)]
pub(super) struct Rebuilds {
    running: Mutex<BTreeMap<String, Arc<Progress>>>,
}

impl Rebuilds {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Progress>>> {
        // Single map operations; none leaves it half changed.
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the volume is to be opened from chunk headers alone.
    pub fn wanted(&self, name: &str) -> bool {
        self.lock().contains_key(name)
    }

    /// Where an opening of the volume tells how far it is.
    pub fn progress(&self, name: &str) -> Arc<Progress> {
        self.lock().get(name).cloned().unwrap_or_default()
    }
}

impl Daemon {
    /// Opens a volume that is not served, with a table made of chunk headers alone.
    ///
    /// # Errors
    /// It is served, or its chunks are not all there.
    pub async fn rebuild(self: &Arc<Self>, name: &str) -> Result<VolumeStatus, VolumeError> {
        if let Ok(entry) = self.entry(name)
            && let Phase::Open(_) = entry.phase
        {
            return Err(VolumeError::Conflict(format!(
                "volume {name:?} is open, so its translation table is in use; stop serving it first"
            )));
        }
        if self.rebuilds.lock().insert(name.to_owned(), Arc::default()).is_some() {
            return Err(VolumeError::Conflict(format!("volume {name:?} is being rebuilt already")));
        }
        let opened = self.open(name, false).await;
        self.rebuilds.lock().remove(name);
        opened
    }

    /// How far the rebuild of a volume is.
    pub fn rebuild_progress(&self, name: &str) -> RebuildProgress {
        let running = self.rebuilds.lock().get(name).cloned();
        let (headers, of) = running.as_ref().map_or((0, 0), |progress| progress.get());
        RebuildProgress { running: running.is_some(), headers, of }
    }
}

/// How far a volume that was just opened goes, and until when.
pub(super) fn state_reached(report: &OpenReport, now_ms: u64) -> String {
    let lsn = report.last_lsn;
    match report.written_ms {
        _ if lsn == 0 => "nothing was ever written to it".to_owned(),
        0 => format!("state reaches LSN {lsn}"),
        at => {
            let ago = seconds(now_ms.saturating_sub(at) as f64 / 1000.0);
            format!("state reaches LSN {lsn}, written at {} ({ago} before now)", date(at))
        }
    }
}
