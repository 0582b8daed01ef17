//! Snapshots as read-only exports `VOLUME@SNAPSHOT`: opened when the first client comes, closed some time after the last
//! one left.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};
use std::time::{Duration, Instant};

use super::volumes::{Daemon, Place, VolumeError};
use crate::explain::explain;
use crate::export::nbd::server::Export;
use crate::manifest::{self, Manifest, Snapshot, SnapshotId};
use crate::store::ObjectStore;
use crate::table::TableHome;
use crate::view::{Sight, SightOptions, View};
use crate::volume::Blocking;

/// Kept open this long without clients.
const IDLE: Duration = Duration::from_secs(60);
/// Between two looks whether there are any.
const LOOK: Duration = Duration::from_secs(10);
/// Memory for the table of one view, in bytes, at least and at most.
const TABLE_MEMORY: (usize, usize) = (4 << 20, 32 << 20);

/// The views that are open.
#[derive(Default)]
pub(super) struct Views {
    open: RwLock<BTreeMap<String, Shown>>,
    /// Why the last attempt came to nothing.
    refused: RwLock<BTreeMap<String, String>>,
    /// Held while one is opened or closed.
    changing: tokio::sync::Mutex<()>,
}

#[derive(Clone)]
struct Shown {
    place: Place,
    snapshot: SnapshotId,
    size: u64,
    made_ms: u64,
    used: Instant,
}

/// Volume and snapshot in the name of an export.
pub(super) fn split(name: &str) -> Option<(&str, &str)> {
    name.split_once('@')
}

impl Daemon {
    /// The names of all snapshots that may be read, as far as this daemon knows.
    pub(super) fn view_names(&self) -> Vec<String> {
        let entries = self.entries();
        let names = entries.iter().filter_map(|(name, entry)| Some((name, entry.manifest.as_ref()?)));
        names
            .flat_map(|(name, manifest)| {
                let seen = manifest.snapshots.iter().filter(|snapshot| !snapshot.hidden);
                seen.map(move |snapshot| format!("{name}@{}", snapshot.name))
            })
            .collect()
    }

    /// The export of a view that is open.
    pub(super) fn find_view(&self, name: &str) -> Option<Export> {
        let mut open = self.views.open.write().expect("no code panics while it holds this lock");
        let shown = open.get_mut(name)?;
        shown.used = Instant::now();
        Some(Export {
            name: name.to_owned(),
            description: format!("blockd snapshot, made {}", crate::text::date(shown.made_ms)),
            size: shown.size,
            read_only: true,
            reactor: shown.place.reactor.clone(),
            key: shown.place.key,
        })
    }

    /// Why there is no view of this name.
    pub(super) fn view_refusal(&self, name: &str) -> Option<String> {
        self.views.refused.read().expect("no code panics while it holds this lock").get(name).cloned()
    }

    /// Opens the view of a snapshot, unless it is open.
    pub(super) async fn prepare_view(&self, name: &str) {
        let Some((volume, snapshot)) = split(name) else { return };
        let _one_at_a_time = self.views.changing.lock().await;
        let opened = self.open_view(name, volume, snapshot).await;
        let mut refused = self.views.refused.write().expect("no code panics while it holds this lock");
        match opened {
            Ok(()) => {
                refused.remove(name);
            }
            Err(error) => {
                tracing::warn!(export = name, "not exported: {error:#}");
                // A client may ask for any name: what is said of one is not kept long.
                if refused.len() >= 1000 {
                    refused.clear();
                }
                refused.insert(name.to_owned(), explain(&error));
            }
        }
    }

    async fn open_view(&self, name: &str, volume: &str, snapshot: &str) -> anyhow::Result<()> {
        self.refuse_while_closing()?;
        // By the bucket: whichever host has the volume, and whatever became of the snapshot since it was opened last.
        let (manifest, snapshot) = match self.snapshot_of(volume, snapshot).await {
            Ok(found) => found,
            Err(error) => {
                self.shut_view(name).await;
                return Err(error);
            }
        };
        let before = self.views.open.read().expect("no code panics while it holds this lock").get(name).cloned();
        match before {
            Some(shown) if shown.snapshot == snapshot.id => return Ok(()),
            Some(_) => self.shut_view(name).await,
            None => {}
        }
        let keys = self.keys.keys_of(&manifest).await?;
        let memory_bytes = (self.config.table_memory.as_usize() / 8).clamp(TABLE_MEMORY.0, TABLE_MEMORY.1);
        let dir = self.data.view(snapshot.id);
        let own = self.data.volume(manifest.id);
        let sight = Sight::open(SightOptions {
            store: self.store.clone() as Arc<dyn ObjectStore>,
            volume: manifest.id,
            checkpoint: snapshot.checkpoint,
            home: TableHome::Dir { dir, memory_bytes },
            donor: own.exists().then_some(TableHome::Dir { dir: own, memory_bytes }),
            frame_cache: self.frame_cache(),
            blocking: Blocking::Threads,
            keys,
        })
        .await?;
        let reactor = self.next_reactor();
        let key = reactor.add_device(Box::new(View::new(sight, snapshot.size))).await?;
        let shown = Shown {
            place: Place { reactor, key },
            snapshot: snapshot.id,
            size: snapshot.size,
            made_ms: snapshot.made_ms,
            used: Instant::now(),
        };
        self.views.open.write().expect("no code panics while it holds this lock").insert(name.to_owned(), shown);
        tracing::info!(export = name, "snapshot opened");
        Ok(())
    }

    /// A snapshot by its name, as the bucket has it, in a manifest that was verified.
    pub(super) async fn snapshot_of(&self, volume: &str, snapshot: &str) -> anyhow::Result<(Manifest, Snapshot)> {
        let (seen, _) = self.load(volume).await?;
        let keys = self.keys.keys_of(&seen).await?;
        let (manifest, _) = manifest::open(self.store.as_ref(), volume, keys.as_ref()).await?;
        self.note_snapshots(&manifest);
        let found = manifest.snapshot(snapshot).cloned();
        let found = found.ok_or_else(|| manifest::ManifestError::NoSnapshot {
            volume: volume.to_owned(),
            snapshot: snapshot.to_owned(),
        })?;
        Ok((manifest, found))
    }

    /// Closes a view, with whatever clients it has.
    async fn shut_view(&self, name: &str) {
        let shown = self.views.open.write().expect("no code panics while it holds this lock").remove(name);
        let Some(shown) = shown else { return };
        shown.place.reactor.close_device(shown.place.key).await;
        let dir = self.data.view(shown.snapshot);
        if let Err(error) = tokio::fs::remove_dir_all(&dir).await {
            tracing::debug!("cannot remove {}: {error}", dir.display());
        }
        tracing::debug!(export = name, "snapshot closed");
    }

    /// Closes views that are about to lose what they show: of one snapshot, or of all of a volume.
    ///
    /// # Errors
    /// Clients read it.
    pub(super) async fn close_views(&self, volume: &str, snapshot: Option<&str>) -> Result<(), VolumeError> {
        let _one_at_a_time = self.views.changing.lock().await;
        let open = self.views.open.read().expect("no code panics while it holds this lock").clone();
        let concerned = open.into_iter().filter(|(name, _)| {
            split(name).is_some_and(|(v, s)| v == volume && snapshot.is_none_or(|snapshot| s == snapshot))
        });
        let concerned: Vec<_> = concerned.collect();
        for (name, shown) in &concerned {
            let clients = shown.place.reactor.connections(shown.place.key).await.len();
            if clients > 0 {
                return Err(VolumeError::Conflict(format!(
                    "snapshot {name} has {clients} client connection{}; detach first",
                    if clients == 1 { "" } else { "s" }
                )));
            }
        }
        for (name, _) in concerned {
            self.shut_view(&name).await;
        }
        Ok(())
    }

    /// Closes views that nobody reads, for as long as the daemon runs.
    pub(super) async fn watch_views(self: Arc<Self>) {
        loop {
            tokio::time::sleep(LOOK).await;
            let open = self.views.open.read().expect("no code panics while it holds this lock").clone();
            for (name, shown) in open {
                let busy = !shown.place.reactor.connections(shown.place.key).await.is_empty();
                let mut idle = false;
                if let Some(shown) =
                    self.views.open.write().expect("no code panics while it holds this lock").get_mut(&name)
                {
                    if busy {
                        shown.used = Instant::now();
                    }
                    idle = shown.used.elapsed() > IDLE;
                }
                if idle {
                    let _one_at_a_time = self.views.changing.lock().await;
                    self.shut_view(&name).await;
                }
            }
        }
    }

    /// Closes all of them, at the end.
    pub(super) async fn close_all_views(&self) {
        let _one_at_a_time = self.views.changing.lock().await;
        let names: Vec<String> =
            self.views.open.read().expect("no code panics while it holds this lock").keys().cloned().collect();
        for name in names {
            self.shut_view(&name).await;
        }
    }
}
