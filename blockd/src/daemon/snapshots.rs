//! Making, listing and deleting snapshots.

use std::sync::Arc;

use tokio::sync::oneshot;

use super::exports::snapshot_nqn;
use super::volumes::{Daemon, Phase, Place, VolumeError, with_volume};
use crate::admin::api::SnapshotStatus;
use crate::manifest::{self, Hold, Manifest, ManifestError, Origin, Snapshot};
use crate::program::explain;
use crate::volume::{SnapshotError, SnapshotOrder, SnapshotReply, Volume};

/// A hidden snapshot whose clone is still not there after this long, in milliseconds, is nobody's.
const ABANDONED_MS: u64 = 3_600_000;

/// The snapshots of a volume, hidden ones included.
pub(super) fn list(manifest: &Manifest) -> impl Iterator<Item = SnapshotStatus> {
    manifest.snapshots.iter().map(|snapshot| status(&manifest.name, snapshot))
}

pub(super) fn status(volume: &str, snapshot: &Snapshot) -> SnapshotStatus {
    SnapshotStatus {
        volume: volume.to_owned(),
        name: snapshot.name.clone(),
        id: uuid::Uuid::from_bytes(snapshot.id).simple().to_string(),
        size: snapshot.size,
        lsn: snapshot.lsn,
        seq: snapshot.seq,
        made_ms: snapshot.made_ms,
        clones: snapshot.holds.iter().map(|hold| hold.name.clone()).collect(),
        hidden: snapshot.hidden,
        nqn: if snapshot.hidden { String::new() } else { snapshot_nqn(snapshot.id) },
    }
}

/// A clone's origin, for people.
pub(super) fn origin(origin: &Origin) -> String {
    let snapshot = uuid::Uuid::from_bytes(origin.snapshot).simple().to_string();
    format!("{} (snapshot {}, at write {})", origin.name, &snapshot[..8], origin.lsn)
}

impl Daemon {
    /// Snapshots of one volume, or of all, as the bucket has them now.
    ///
    /// # Errors
    /// The one volume is not there, or cannot be read.
    pub async fn snapshots(&self, name: Option<&str>) -> Result<Vec<SnapshotStatus>, VolumeError> {
        let names = match name {
            Some(name) => vec![name.to_owned()],
            None => self.entries().keys().cloned().collect(),
        };
        let mut found = Vec::new();
        for volume in names {
            match self.load(&volume).await {
                Ok((manifest, _)) => {
                    found.extend(list(&manifest));
                    self.note_snapshots(&manifest);
                }
                Err(error) if name.is_some() => return Err(error),
                // It has just gone, or is shown as failed elsewhere.
                Err(_) => {}
            }
        }
        Ok(found)
    }

    /// Makes a snapshot of a volume that is open here, or that nobody has.
    pub async fn create_snapshot(self: &Arc<Self>, name: &str, snapshot: &str) -> Result<SnapshotStatus, VolumeError> {
        manifest::check_name(snapshot).map_err(|e| VolumeError::Invalid(e.to_string()))?;
        if snapshot == super::views::LATEST {
            return Err(VolumeError::Invalid(format!(
                "{name}@{snapshot} is what follows the owner; choose another name"
            )));
        }
        self.snapshot_for(name, snapshot, None).await
    }

    /// As [`Daemon::create_snapshot`]; with `hold` one that only that clone knows of.
    pub(super) async fn snapshot_for(
        self: &Arc<Self>,
        name: &str,
        snapshot: &str,
        hold: Option<Hold>,
    ) -> Result<SnapshotStatus, VolumeError> {
        let order = SnapshotOrder { id: rand::random(), name: snapshot.to_owned(), hold };
        let id = order.id;
        let manifest = self
            .by_owner(name, &format!("make snapshot {name}@{snapshot}"), |volume, reply| {
                volume.create_snapshot(order, reply);
            })
            .await?;
        let made = manifest.snapshots.iter().find(|snapshot| snapshot.id == id);
        let made = made.map(|snapshot| status(name, snapshot));
        tracing::info!(volume = %name, snapshot, "snapshot made");
        made.ok_or_else(|| VolumeError::Conflict(format!("snapshot {name}@{snapshot} was deleted at once")))
    }

    /// Deletes a snapshot; it stays, hidden, while clones need it.
    pub async fn delete_snapshot(self: &Arc<Self>, name: &str, snapshot: &str) -> Result<(), VolumeError> {
        let doing = format!("delete snapshot {name}@{snapshot}");
        self.close_views(name, Some(snapshot)).await?;
        self.release_stale_holds(name, snapshot).await?;
        let gone = snapshot.to_owned();
        self.by_owner(name, &doing, move |volume, reply| volume.delete_snapshot(&gone, reply)).await?;
        tracing::info!(volume = %name, snapshot, "snapshot deleted");
        Ok(())
    }

    /// Lets go of what clones hold of a snapshot that never came to be, or are gone.
    async fn release_stale_holds(&self, name: &str, snapshot: &str) -> Result<(), VolumeError> {
        let (manifest, _) = self.load(name).await?;
        // Of those that nobody sees, what was left by somebody who did not come back.
        let old = |made_ms: u64| made_ms.saturating_add(ABANDONED_MS) < super::volumes::unix_ms();
        let concerned = manifest.snapshots.iter().filter(|found| !found.holds.is_empty());
        let concerned = concerned.filter(|found| match found.hidden {
            true => old(found.made_ms),
            false => found.name == snapshot,
        });
        let concerned: Vec<&Snapshot> = concerned.collect();
        if concerned.is_empty() {
            return Ok(());
        }
        let keys = self.keys.keys_of(&manifest).await.map_err(|e| VolumeError::Conflict(e.to_string()))?;
        for snapshot in concerned {
            let released = crate::volume::release_stale(self.store.as_ref(), &manifest, snapshot, keys.as_ref()).await;
            released.map_err(|error| {
                VolumeError::Failed(format!("cannot look after the clones of {name:?}: {}", explain(&error.into())))
            })?;
        }
        Ok(())
    }

    /// Has a volume that is open here do something to its snapshots. One that nobody has is opened for it.
    async fn by_owner(
        self: &Arc<Self>,
        name: &str,
        doing: &str,
        ask: impl FnOnce(&mut Volume, SnapshotReply) + Send + 'static,
    ) -> Result<Manifest, VolumeError> {
        self.refuse_while_closing()?;
        let before = self.entry(name).map(|entry| entry.phase).ok();
        let opened_for_it = matches!(before, None | Some(Phase::Closed | Phase::Released));
        if opened_for_it {
            self.open(name, false).await?;
        }
        let result = match self.entry(name)?.phase {
            Phase::Open(place) => ask_volume(&place, name, doing, ask).await,
            phase => Err(VolumeError::Conflict(format!(
                "cannot {doing}: volume {name:?} is {}; only the host that has it open can",
                phase.state().as_str()
            ))),
        };
        if let Ok(manifest) = &result {
            self.note_snapshots(manifest);
        }
        if opened_for_it && let Err(error) = self.release(name, false).await {
            tracing::warn!(volume = %name, "it was opened for its snapshots and stays open: {error}");
        }
        result
    }

    /// Remembers what a manifest says of snapshots.
    pub(super) fn note_snapshots(&self, found: &Manifest) {
        let mut changed = false;
        if let Some(manifest) = self.entries_mut().get_mut(&found.name).and_then(|entry| entry.manifest.as_mut())
            && manifest.id == found.id
        {
            changed = manifest.snapshots != found.snapshots;
            manifest.snapshots = found.snapshots.clone();
        }
        if changed {
            self.changes.tell();
        }
    }
}

async fn ask_volume(
    place: &Place,
    name: &str,
    doing: &str,
    ask: impl FnOnce(&mut Volume, SnapshotReply) + Send + 'static,
) -> Result<Manifest, VolumeError> {
    let closed = || VolumeError::Conflict(format!("cannot {doing}: volume {name:?} was closed meanwhile"));
    let (reply, answer) = oneshot::channel();
    with_volume(place, move |volume| ask(volume, reply)).await.ok_or_else(closed)?;
    let result = answer.await.map_err(|_| closed())?;
    result.map_err(|error| match error {
        SnapshotError::Manifest(error @ (ManifestError::SnapshotExists { .. } | ManifestError::NoSnapshot { .. })) => {
            VolumeError::Conflict(error.to_string())
        }
        SnapshotError::Refused(_) => VolumeError::Conflict(format!("cannot {doing}: {error}")),
        error => VolumeError::Failed(format!("cannot {doing}: {}", explain(&error.into()))),
    })
}
