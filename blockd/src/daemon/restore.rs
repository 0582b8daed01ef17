//! `blockd volume restore`: going back to a snapshot.

use std::sync::Arc;

use super::volumes::{Daemon, Phase, VolumeError, Why, unix_ms, with_volume};
use crate::admin::api::{RestoreVolume, VolumeStatus};
use crate::manifest::Manifest;
use crate::program::explain;
use crate::store::ObjectStore;
use crate::table::TableHome;
use crate::volume::{Blocking, Claimant, GoBack, go_back};
use crate::wal::device::FileLog;

impl Daemon {
    /// Makes the state of a volume that of one of its snapshots. It must be open here, or nobody's, and without clients.
    pub async fn restore(self: &Arc<Self>, name: &str, request: RestoreVolume) -> Result<VolumeStatus, VolumeError> {
        self.refuse_while_closing()?;
        let full = format!("{name}@{}", request.snapshot);
        if !matches!(self.entry(name).map(|entry| entry.phase), Ok(Phase::Open(_))) {
            self.open(name, false).await?;
        }
        let wanted = self.snapshot_of(name, &request.snapshot).await;
        wanted.map_err(|error| VolumeError::Conflict(explain(&error)))?;
        let place = self.begin_release(name)?;
        let clients = place.reactor.connections(place.key).await.len();
        if clients > 0 {
            self.set_phase(name, Phase::Open(place));
            return Err(VolumeError::Conflict(format!(
                "volume {name:?} has {clients} client connection{}; detach first: what they have in memory is of another state",
                if clients == 1 { "" } else { "s" }
            )));
        }
        // What was written since stays part of the history, so it has to be in the bucket.
        self.drain(name, &place).await?;
        let epoch = with_volume(&place, |volume| volume.epoch()).await.unwrap_or(0);
        self.set_phase(name, Phase::Opening);
        place.reactor.close_device(place.key).await;
        let restored = self.restore_closed(name, &request.snapshot, epoch).await;
        // Whatever came of it, the volume is served again, as the bucket says.
        if let Some(hold) = self.entry(name)?.hold {
            hold.stop();
            // No renewal is on its way any more.
            hold.grant().await;
        }
        let reopened = match self.load(name).await {
            Ok((manifest, _)) => self.open_device(manifest, Why::Asked, None).await,
            Err(error) => {
                self.set_phase(name, Phase::Failed(error.to_string()));
                Err(error)
            }
        };
        restored.map_err(|error| VolumeError::Failed(format!("cannot restore {full}: {}", explain(&error))))?;
        reopened?;
        tracing::info!(volume = %name, snapshot = request.snapshot, "volume restored");
        self.show(name).await
    }

    async fn restore_closed(&self, name: &str, snapshot: &str, epoch: u64) -> anyhow::Result<Manifest> {
        let (manifest, _) = self.load(name).await?;
        let keys = self.keys.keys_of(&manifest).await?;
        let dir = self.data.volume(manifest.id);
        let scratch = dir.join("table.snapshot");
        let memory_bytes = self.config.table_memory.as_usize() / 8;
        let (wal, segment_bytes) = (dir.join("wal"), self.config.log_segment.0);
        let device = tokio::task::spawn_blocking(move || FileLog::open(&wal, segment_bytes)).await??;
        let claimant = Claimant { owner: self.data.host(), expected: Some(epoch), now_ms: unix_ms() };
        let order = GoBack {
            store: self.store.as_ref() as &dyn ObjectStore,
            name,
            snapshot,
            claimant,
            home: &TableHome::Dir { dir, memory_bytes },
            scratch: &TableHome::Dir { dir: scratch.clone(), memory_bytes },
            device: Arc::new(device),
            blocking: Blocking::Threads,
            keys: keys.as_ref(),
        };
        let restored = go_back(order).await;
        if let Err(error) = tokio::fs::remove_dir_all(&scratch).await {
            tracing::debug!("cannot remove {}: {error}", scratch.display());
        }
        Ok(restored?)
    }
}
