//! Letting go of a volume, so that another host can have it with nothing missing.
//!
//! Order: clients are refused; everything accepted goes to the bucket and into the table; the volume closes; the
//! marker `released` is written here, so that a restart does not take the volume back; the lease says released.

use std::fs::{self, File};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use super::volumes::{Daemon, Phase, Place, VolumeError, busy, with_volume};
use crate::admin::api::VolumeStatus;
use crate::lease::{self, Judge, Lease, LeaseState, Sighting, Verdict};
use crate::manifest::Manifest;
use crate::program::text::bytes;
use crate::volume::VolumeStats;

const MARKER: &str = "released";
/// Between two looks at how far it is.
const STEP: Duration = Duration::from_millis(50);

/// Whether the volume in `dir` was let go here.
pub(super) fn is_marked(dir: &Path) -> bool {
    dir.join(MARKER).exists()
}

/// Durably says that it was.
fn mark(dir: &Path) -> std::io::Result<()> {
    fs::create_dir_all(dir)?;
    File::create(dir.join(MARKER))?.sync_all()?;
    File::open(dir)?.sync_all()
}

/// It is taken back. Durably: should the marker reappear after a power cut, a restart would take what the log holds by
/// then for sent.
pub(super) fn unmark(dir: &Path) -> std::io::Result<()> {
    match fs::remove_file(dir.join(MARKER)) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(()),
        Err(e) => Err(e),
        Ok(()) => File::open(dir)?.sync_all(),
    }
}

impl Daemon {
    /// Sends everything to the bucket, closes the volume and gives its lease away. Interrupted, it can be called again.
    pub async fn release(self: &Arc<Self>, name: &str, force: bool) -> Result<VolumeStatus, VolumeError> {
        self.refuse_while_closing()?;
        let entry = self.entry(name)?;
        match &entry.phase {
            Phase::Open(_) => self.release_open(name, force).await?,
            Phase::Opening | Phase::Deleting | Phase::Releasing(_) => return Err(busy(name, &entry.phase)),
            Phase::Fenced(_) | Phase::Elsewhere(_) => {
                return Err(VolumeError::Conflict(format!(
                    "volume {name:?} is not this host's to release: {}",
                    self.show(name).await?.info.error.unwrap_or_default()
                )));
            }
            // What its log holds cannot be sent without the key.
            Phase::Locked(why) => return Err(VolumeError::Conflict(why.clone())),
            Phase::Closed | Phase::Failed(_) | Phase::Released => {
                let (manifest, _) = self.load(name).await?;
                self.release_closed(&manifest).await?;
            }
        }
        self.show(name).await
    }

    async fn release_open(self: &Arc<Self>, name: &str, force: bool) -> Result<(), VolumeError> {
        let place = self.begin_release(name)?;
        let clients = place.reactor.connections(place.key).await.len();
        if clients > 0 && !force {
            self.set_phase(name, Phase::Open(place));
            return Err(VolumeError::Conflict(format!(
                "volume {name:?} has {clients} client connection{}; detach first, or say --force",
                if clients == 1 { "" } else { "s" }
            )));
        }
        self.drain_and_release(name, place).await
    }

    /// Sends everything of a volume that is `Releasing`; it goes back to `Open` when that is called off.
    pub(super) async fn drain(&self, name: &str, place: &Place) -> Result<VolumeStats, VolumeError> {
        with_volume(place, |volume| volume.begin_release()).await;
        loop {
            let state =
                with_volume(place, |volume| (volume.is_drained(), volume.fenced().map(str::to_owned), volume.stats()));
            let Some((drained, fenced, stats)) = state.await else {
                return Err(VolumeError::Conflict(format!("volume {name:?} was closed meanwhile")));
            };
            if let Some(why) = fenced.or_else(|| stats.log_dead.clone()) {
                with_volume(place, |volume| volume.cancel_release()).await;
                if matches!(self.entry(name)?.phase, Phase::Releasing(_)) {
                    self.set_phase(name, Phase::Open(place.clone()));
                }
                return Err(VolumeError::Conflict(format!("volume {name:?} cannot be released: {why}")));
            }
            if drained {
                return Ok(stats);
            }
            if !matches!(self.entry(name)?.phase, Phase::Releasing(_)) {
                with_volume(place, |volume| volume.cancel_release()).await;
                return Err(VolumeError::Conflict(format!(
                    "releasing volume {name:?} was called off with {} left to send",
                    bytes(stats.dirty_bytes)
                )));
            }
            tokio::time::sleep(STEP).await;
        }
    }

    /// From `Releasing` to `Released`; back to `Open` when it is called off.
    pub(super) async fn drain_and_release(self: &Arc<Self>, name: &str, place: Place) -> Result<(), VolumeError> {
        let stats = self.drain(name, &place).await?;
        let failed = |why: String| {
            VolumeError::Failed(format!(
                "volume {name:?} is closed and all of it is in the bucket, but it could not be let go: {why}; `blockd \
                 volume release {name}` tries again"
            ))
        };
        place.reactor.close_device(place.key).await;
        let entry = self.entry(name)?;
        if let Some(manifest) = &entry.manifest
            && let Err(error) = mark(&self.data.volume(manifest.id))
        {
            self.set_phase(name, Phase::Failed(failed(error.to_string()).to_string()));
            return Err(failed(error.to_string()));
        }
        let released = match &entry.hold {
            Some(hold) => hold.release(self.store.as_ref(), Some(&stats)).await,
            None => Ok(true),
        };
        self.set_phase(name, Phase::Released);
        match released {
            Ok(true) => tracing::info!(volume = %name, "volume released"),
            Ok(false) => tracing::warn!(volume = %name, "volume closed; another host has taken it already"),
            Err(error) => return Err(failed(error.to_string())),
        }
        Ok(())
    }

    /// Gives away the lease of a volume that is not open here and has nothing left here.
    pub(super) async fn release_closed(&self, manifest: &Manifest) -> Result<(), VolumeError> {
        let name = &manifest.name;
        let dir = self.data.volume(manifest.id);
        let failed =
            |error: &dyn std::fmt::Display| VolumeError::Failed(format!("cannot release volume {name:?}: {error}"));
        if !is_marked(&dir) {
            return Err(VolumeError::Conflict(format!(
                "volume {name:?} is not open, so what its log holds cannot be sent to the bucket; open it first \
                 (`blockd volume open {name}`)"
            )));
        }
        let found = lease::load(self.store.as_ref(), name).await.map_err(|e| failed(&e))?;
        if let Some((lease, version)) = found {
            let judge = Judge { host: self.data.host(), volume: manifest.id };
            let now = super::hold::instants();
            if judge.judge(&lease, Sighting::update(None, &lease, now), now) == Verdict::Own {
                let next = Lease { state: LeaseState::Released, counter: lease.counter + 1, ..lease };
                lease::renew(self.store.as_ref(), name, &next, &version).await.map_err(|e| failed(&e))?;
            }
        }
        self.set_phase(name, Phase::Released);
        Ok(())
    }
}
