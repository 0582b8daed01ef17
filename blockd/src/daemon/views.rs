//! States of volumes as read-only exports, whichever host has the volume: `VOLUME@SNAPSHOT`, which stands still, and
//! `VOLUME@latest`, which follows the owner. Opened when the first client comes, closed some time after the last one left.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use super::volumes::{Daemon, VolumeError};
use crate::admin::api::{ChangedRange, ChangesPage, FollowStatus};
use crate::export::nbd::server::Export;
use crate::manifest::{self, Manifest, Snapshot, SnapshotId};
use crate::program::explain;
use crate::reactor::{DeviceKey, ReactorHandle, wall_ms};
use crate::store::ObjectStore;
use crate::table::{Change, TableHome};
use crate::types::BLOCK_SIZE;
use crate::view::{FollowOptions, Follower, Refreshed, Sight, SightOptions, View};
use crate::volume::Blocking;

/// Kept open this long without clients.
const IDLE: Duration = Duration::from_secs(60);
/// Between two looks whether there are any.
const LOOK: Duration = Duration::from_secs(10);
/// Memory for the table of one view, in bytes, at least and at most.
const TABLE_MEMORY: (usize, usize) = (4 << 20, 32 << 20);

/// Changes told at a time.
const CHANGES_MAX: usize = 20_000;

/// The views that are open.
#[derive(Default)]
pub(super) struct Views {
    open: RwLock<BTreeMap<String, Shown>>,
    /// Why the last attempt came to nothing.
    refused: RwLock<BTreeMap<String, String>>,
    /// Held while one is opened or closed.
    changing: tokio::sync::Mutex<()>,
}

/// Where a view lives.
#[derive(Clone)]
struct Place {
    reactor: ReactorHandle,
    key: DeviceKey,
}

impl Views {
    fn open(&self) -> RwLockReadGuard<'_, BTreeMap<String, Shown>> {
        self.open.read().expect("no code panics while it holds this lock")
    }

    fn open_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<String, Shown>> {
        self.open.write().expect("no code panics while it holds this lock")
    }
}

#[derive(Clone)]
struct Shown {
    place: Place,
    what: What,
    size: u64,
    used: Instant,
}

/// What a view shows.
#[derive(Clone)]
enum What {
    Snapshot { id: SnapshotId, made_ms: u64, sight: Sight },
    Latest(Arc<Following>),
}

/// An owner that is followed.
struct Following {
    dir: PathBuf,
    status: Mutex<FollowStatus>,
    task: Mutex<Option<tokio::task::JoinHandle<()>>>,
}

/// The name of what follows the owner, in place of a snapshot's.
pub(super) const LATEST: &str = "latest";

/// What clients are told of it.
const FOLLOWING: &str = "blockd volume, following its owner";

fn describe_snapshot(id: SnapshotId, made_ms: u64) -> String {
    format!("blockd snapshot {}, made {}", uuid::Uuid::from_bytes(id).simple(), crate::program::text::date(made_ms))
}

/// Volume and snapshot in the name of an export.
pub(super) fn split(name: &str) -> Option<(&str, &str)> {
    name.split_once('@')
}

impl Daemon {
    /// The names of all states that may be read, as far as this daemon knows.
    pub(super) fn view_names(&self) -> Vec<String> {
        let entries = self.entries();
        let names = entries.iter().filter_map(|(name, entry)| Some((name, entry.manifest.as_ref()?)));
        names
            .flat_map(|(name, manifest)| {
                let seen = manifest.snapshots.iter().filter(|snapshot| !snapshot.hidden);
                let names = seen.map(|snapshot| snapshot.name.as_str());
                names.chain([LATEST]).map(move |snapshot| format!("{name}@{snapshot}"))
            })
            .collect()
    }

    /// What clients are told of a view, open or not. It names a snapshot by its identity, so that they can tell one from another that was given its
    /// name.
    pub(super) fn describe_view(&self, volume: &str, snapshot: &str) -> String {
        if snapshot == LATEST {
            return FOLLOWING.to_owned();
        }
        let entries = self.entries();
        let manifest = entries.get(volume).and_then(|entry| entry.manifest.as_ref());
        let found = manifest.and_then(|manifest| manifest.snapshot(snapshot));
        found.map_or_else(String::new, |found| describe_snapshot(found.id, found.made_ms))
    }

    /// The export of a view that is open.
    pub(super) fn find_view(&self, name: &str) -> Option<Export> {
        let mut open = self.views.open_mut();
        let shown = open.get_mut(name)?;
        shown.used = Instant::now();
        Some(Export {
            name: name.to_owned(),
            description: match &shown.what {
                What::Snapshot { id, made_ms, .. } => describe_snapshot(*id, *made_ms),
                What::Latest(_) => FOLLOWING.to_owned(),
            },
            size: match &shown.what {
                What::Snapshot { .. } => shown.size,
                What::Latest(following) => following.status().size,
            },
            read_only: true,
            reactor: shown.place.reactor.clone(),
            key: shown.place.key,
        })
    }

    /// Whether the view of this name, if it is open, is of this snapshot.
    pub(super) fn view_shows(&self, name: &str, snapshot: SnapshotId) -> bool {
        let open = self.views.open();
        matches!(open.get(name), Some(Shown { what: What::Snapshot { id, .. }, .. }) if *id == snapshot)
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
        if snapshot == LATEST {
            return self.follow(name, volume).await;
        }
        // By the bucket: whichever host has the volume, and whatever became of the snapshot since it was opened last.
        let (manifest, snapshot) = match self.snapshot_of(volume, snapshot).await {
            Ok(found) => found,
            // A bucket that is away says nothing about a snapshot, and those who read it go on.
            Err(error) if is_passing(&error) && self.views.open().contains_key(name) => {
                tracing::warn!(export = name, "exported as it was found before: {error:#}");
                return Ok(());
            }
            Err(error) => {
                self.shut_view(name).await;
                return Err(error);
            }
        };
        let before = self.views.open().get(name).cloned();
        match before {
            Some(Shown { what: What::Snapshot { id, .. }, .. }) if id == snapshot.id => return Ok(()),
            Some(_) => self.shut_view(name).await,
            None => {}
        }
        let keys = self.keys.keys_of(&manifest).await?;
        let memory_bytes = self.view_memory();
        let dir = self.data.view(snapshot.id);
        let sight = Sight::open(SightOptions {
            store: self.store.clone() as Arc<dyn ObjectStore>,
            volume: manifest.id,
            checkpoint: snapshot.checkpoint,
            home: TableHome::Dir { dir, memory_bytes },
            donor: self.own_table(&manifest),
            frame_cache: self.frame_cache(),
            blocking: Blocking::Threads,
            keys,
        })
        .await?;
        let reactor = self.next_reactor();
        let key = reactor.add_device(Box::new(View::new(sight.clone(), snapshot.size, false))).await?;
        let shown = Shown {
            place: Place { reactor, key },
            what: What::Snapshot { id: snapshot.id, made_ms: snapshot.made_ms, sight },
            size: snapshot.size,
            used: Instant::now(),
        };
        self.views.open_mut().insert(name.to_owned(), shown);
        tracing::info!(export = name, "snapshot opened");
        Ok(())
    }

    /// Memory for the table of one view, in bytes.
    fn view_memory(&self) -> usize {
        (self.config.table_memory.as_usize() / 8).clamp(TABLE_MEMORY.0, TABLE_MEMORY.1)
    }

    /// The table of a volume that is or was open here: many of its files are those of its checkpoints.
    fn own_table(&self, manifest: &Manifest) -> Option<TableHome> {
        let dir = self.data.volume(manifest.id);
        dir.exists().then(|| TableHome::Dir { dir, memory_bytes: self.view_memory() })
    }

    /// Opens the view that follows the owner of a volume, unless it is open.
    async fn follow(&self, name: &str, volume: &str) -> anyhow::Result<()> {
        if self.views.open().contains_key(name) {
            return Ok(());
        }
        let (manifest, _) = self.load(volume).await?;
        let keys = self.keys.keys_of(&manifest).await?;
        let (dir, memory_bytes) = (self.data.following(manifest.id), self.view_memory());
        let _ = tokio::fs::remove_dir_all(&dir).await;
        let tables = dir.clone();
        let follower = Follower::open(FollowOptions {
            store: self.store.clone() as Arc<dyn ObjectStore>,
            name: volume.to_owned(),
            home: Box::new(move |number| TableHome::Dir { dir: tables.join(number.to_string()), memory_bytes }),
            donor: self.own_table(&manifest),
            frame_cache: self.frame_cache(),
            blocking: Blocking::Threads,
            keys,
        })
        .await?;
        let reactor = self.next_reactor();
        let view = View::new(follower.sight().clone(), follower.size(), true);
        let place = Place { key: reactor.add_device(Box::new(view)).await?, reactor };
        let following = Arc::new(Following {
            dir,
            status: Mutex::new(FollowStatus { export: name.to_owned(), ..FollowStatus::default() }),
            task: Mutex::default(),
        });
        following.note(&follower, None);
        let size = follower.size();
        let task = tokio::spawn(move_on(follower, place.clone(), following.clone(), self.config.follow_interval.0));
        *following.task.lock().expect("no code panics while it holds this lock") = Some(task);
        let shown = Shown { place, what: What::Latest(following), size, used: Instant::now() };
        self.views.open_mut().insert(name.to_owned(), shown);
        tracing::info!(export = name, "following the owner");
        Ok(())
    }

    /// Owners that are followed, and how far the views of them are.
    pub(super) fn followed(&self) -> Vec<FollowStatus> {
        let open = self.views.open();
        let following = open.values().filter_map(|shown| match &shown.what {
            What::Latest(following) => Some(following.status()),
            What::Snapshot { .. } => None,
        });
        following.collect()
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

    /// What changed from one snapshot of a volume to another, from the byte `start` on, and where to go on.
    ///
    /// # Errors
    /// One of them cannot be opened.
    pub async fn changes(&self, volume: &str, from: &str, to: &str, start: u64) -> Result<ChangesPage, VolumeError> {
        let (old, _) = self.sight_of(volume, from).await?;
        let (new, size) = self.sight_of(volume, to).await?;
        let compare = move || {
            let (old, new) = (old.table().clone(), new.table().clone());
            new.changes_since(&old, start / BLOCK_SIZE, CHANGES_MAX).map_err(|e| e.to_string())
        };
        let (changes, next) = Blocking::Threads.run(compare).await.map_err(VolumeError::Failed)?;
        let inside = |change: &Change| change.lba * BLOCK_SIZE < size;
        let runs = changes.into_iter().filter(inside).map(|change| {
            let offset = change.lba * BLOCK_SIZE;
            ChangedRange { offset, len: (change.blocks * BLOCK_SIZE).min(size - offset), zero: change.zero }
        });
        Ok(ChangesPage { size, ranges: runs.collect(), next: next.map(|lba| lba * BLOCK_SIZE) })
    }

    async fn sight_of(&self, volume: &str, snapshot: &str) -> Result<(Sight, u64), VolumeError> {
        let name = format!("{volume}@{snapshot}");
        self.prepare_view(&name).await;
        let mut open = self.views.open_mut();
        match open.get_mut(&name) {
            Some(shown) => {
                shown.used = Instant::now();
                match &shown.what {
                    What::Snapshot { sight, .. } => Ok((sight.clone(), shown.size)),
                    What::Latest(_) => Err(VolumeError::Invalid(format!("{name} moves on; make a snapshot"))),
                }
            }
            None => {
                let why = self.view_refusal(&name).unwrap_or_else(|| "it cannot be opened".into());
                Err(VolumeError::Conflict(format!("{name}: {why}")))
            }
        }
    }

    /// Closes a view, with whatever clients it has.
    async fn shut_view(&self, name: &str) {
        let shown = self.views.open_mut().remove(name);
        let Some(shown) = shown else { return };
        let dir = match &shown.what {
            What::Snapshot { id, .. } => self.data.view(*id),
            What::Latest(following) => {
                following.stop().await;
                following.dir.clone()
            }
        };
        shown.place.reactor.close_device(shown.place.key).await;
        if let Err(error) = tokio::fs::remove_dir_all(&dir).await {
            tracing::debug!("cannot remove {}: {error}", dir.display());
        }
        tracing::debug!(export = name, "view closed");
    }

    /// Closes views that are about to lose what they show: of one snapshot, or of all of a volume.
    ///
    /// # Errors
    /// Clients read it.
    pub(super) async fn close_views(&self, volume: &str, snapshot: Option<&str>) -> Result<(), VolumeError> {
        let _one_at_a_time = self.views.changing.lock().await;
        let open = self.views.open().clone();
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
            let open = self.views.open().clone();
            for (name, shown) in open {
                let busy = !shown.place.reactor.connections(shown.place.key).await.is_empty();
                let mut idle = false;
                if let Some(shown) = self.views.open_mut().get_mut(&name) {
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
        let names: Vec<String> = self.views.open().keys().cloned().collect();
        for name in names {
            self.shut_view(&name).await;
        }
    }
}

impl Following {
    /// Records what a look at the bucket came to.
    fn note(&self, follower: &Follower, error: Option<String>) {
        let mut status = self.status.lock().expect("no code panics while it holds this lock");
        let reached = follower.reached();
        (status.seq, status.lsn, status.written_ms) = (reached.seq, reached.lsn, reached.written_ms);
        status.size = follower.size();
        if error.is_none() {
            status.looked_ms = wall_ms();
        }
        status.error = error;
    }

    fn status(&self) -> FollowStatus {
        let mut status = self.status.lock().expect("no code panics while it holds this lock").clone();
        status.lag_seconds = wall_ms().saturating_sub(status.looked_ms) as f64 / 1e3;
        status
    }

    async fn stop(&self) {
        let task = self.task.lock().expect("no code panics while it holds this lock").take();
        if let Some(task) = task {
            task.abort();
            // Ended, or cut off at a point where it waited.
            let _ = task.await;
        }
    }
}

/// Whether an attempt failed only because the bucket cannot be reached.
fn is_passing(error: &anyhow::Error) -> bool {
    let volume = error.downcast_ref::<VolumeError>();
    let manifest = error.downcast_ref::<manifest::ManifestError>();
    matches!(volume, Some(VolumeError::Away(_))) || manifest.is_some_and(manifest::ManifestError::is_transient)
}

/// Looks at the bucket again and again, and shows what it finds.
async fn move_on(mut follower: Follower, place: Place, following: Arc<Following>, interval: Duration) {
    // Tables that reads may still go by, and where they live.
    let mut old: Vec<(u64, Sight)> = Vec::new();
    let (mut number, mut failures) = (0u64, 0u32);
    loop {
        tokio::time::sleep(interval).await;
        let (before, size) = (follower.sight().clone(), follower.size());
        let refreshed = follower.refresh().await;
        let replaced = matches!(refreshed, Ok(Refreshed::Replaced));
        if replaced {
            old.push((number, before));
            number = follower.tables() - 1;
        }
        if replaced || follower.size() != size {
            let (sight, size) = (follower.sight().clone(), follower.size());
            let show = move |device: &mut dyn crate::reactor::Device| {
                if let Some(view) = device.as_any_mut().downcast_mut::<View>() {
                    view.show(sight, size);
                }
            };
            place.reactor.with_device(place.key, show).await;
        }
        match refreshed {
            Ok(_) => {
                if failures > 0 {
                    tracing::info!(view = %following.dir.display(), "following the owner again");
                }
                failures = 0;
                following.note(&follower, None);
            }
            Err(error) => {
                failures += 1;
                if failures.is_power_of_two() {
                    tracing::warn!(view = %following.dir.display(), "cannot follow the owner, will retry: {error}");
                }
                following.note(&follower, Some(error.to_string()));
            }
        }
        let mut kept = Vec::new();
        for (number, sight) in old {
            if sight.is_shared() {
                kept.push((number, sight));
                continue;
            }
            drop(sight);
            // What stays goes with the view.
            let _ = tokio::fs::remove_dir_all(following.dir.join(number.to_string())).await;
        }
        old = kept;
    }
}
