//! The volumes of this daemon, and all that can happen to them.
//!
//! Each volume is in one phase. Whoever wants to change a volume first moves it, under the lock, into a phase that
//! keeps others away (`Opening`, `Deleting`), works without the lock, and then moves it on. So operations on one
//! volume exclude each other, and operations on different volumes do not wait for each other.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use backon::{BackoffBuilder, ExponentialBuilder};

use tokio::task::JoinSet;

use super::DataDir;
use crate::admin::api::{CreateVolume, ResizeVolume, VolumeState, VolumeStatus};
use crate::cache::FrameCache;
use crate::chunk::Codec;
use crate::config::{ByteSize, Config, check_chunk_size};
use crate::explain::explain;
use crate::export::nbd::server::Listen;
use crate::manifest::{self, Durability, Manifest, ManifestError};
use crate::reactor::{Device, DeviceKey, ReactorHandle};
use crate::store::{CountedStore, ObjectStore};
use crate::types::{BLOCK_SIZE, VolumeId};
use crate::volume::{self, CompactionTuning, OpenError, OpenOptions, OpenReport, Tuning, Volume};

/// The largest volume: offsets on it fit a signed 64-bit number everywhere.
const MAX_SIZE: u64 = 1 << 62;
/// Between two attempts to reach a bucket that is away.
const AWAY_PAUSE_MIN: Duration = Duration::from_secs(1);
const AWAY_PAUSE_MAX: Duration = Duration::from_secs(15);
/// No volume gets less memory than this for its writes, however many share the budget.
const MIN_DIRTY_SHARE: usize = 1 << 20;

/// Why something could not be done to a volume. The text is for the user.
#[derive(Debug, thiserror::Error)]
pub enum VolumeError {
    /// There is no such volume.
    #[error("there is no volume {0:?}; `blockd volume list` shows those there are")]
    Unknown(String),
    /// The request makes no sense.
    #[error("{0}")]
    Invalid(String),
    /// Not in the state the volume is in.
    #[error("{0}")]
    Conflict(String),
    /// It was tried and failed.
    #[error("{0}")]
    Failed(String),
    /// It failed because the bucket cannot be reached.
    #[error("{0}")]
    Away(String),
}

/// Where an open volume lives.
#[derive(Clone)]
pub(super) struct Place {
    pub reactor: ReactorHandle,
    pub key: DeviceKey,
}

/// See the module.
#[derive(Clone)]
pub(super) enum Phase {
    Closed,
    Opening,
    Open(Place),
    Deleting,
    Failed(String),
}

impl Phase {
    pub fn state(&self) -> VolumeState {
        match self {
            Self::Closed => VolumeState::Closed,
            Self::Opening => VolumeState::Opening,
            Self::Open(_) => VolumeState::Open,
            Self::Deleting => VolumeState::Deleting,
            Self::Failed(_) => VolumeState::Failed,
        }
    }
}

/// A volume the daemon knows of.
#[derive(Clone)]
pub(super) struct Entry {
    /// Absent while it could not be read.
    pub manifest: Option<Manifest>,
    pub phase: Phase,
}

/// Everything that lives as long as the process.
pub struct Daemon {
    pub(super) config: Config,
    pub(super) data: DataDir,
    pub(super) store: Arc<CountedStore>,
    pub(super) started: Instant,
    pub(super) listens: OnceLock<Vec<Listen>>,
    reactors: Vec<ReactorHandle>,
    next_reactor: AtomicUsize,
    frame_cache: Option<FrameCache>,
    volumes: RwLock<BTreeMap<String, Entry>>,
    resizing: tokio::sync::Mutex<()>,
    closing: AtomicBool,
}

impl Daemon {
    pub(super) fn new(
        config: Config,
        data: DataDir,
        store: Arc<CountedStore>,
        reactors: Vec<ReactorHandle>,
        frame_cache: Option<FrameCache>,
    ) -> Self {
        assert!(!reactors.is_empty(), "volumes need a reactor");
        Self {
            config,
            data,
            store,
            started: Instant::now(),
            listens: OnceLock::new(),
            reactors,
            next_reactor: AtomicUsize::new(0),
            frame_cache,
            volumes: RwLock::default(),
            resizing: tokio::sync::Mutex::default(),
            closing: AtomicBool::new(false),
        }
    }

    pub(super) fn entries(&self) -> RwLockReadGuard<'_, BTreeMap<String, Entry>> {
        self.volumes.read().expect("no code panics while it holds this lock")
    }

    fn entries_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<String, Entry>> {
        self.volumes.write().expect("no code panics while it holds this lock")
    }

    fn set_phase(&self, name: &str, phase: Phase) {
        if let Some(entry) = self.entries_mut().get_mut(name) {
            entry.phase = phase;
        }
    }

    fn refuse_while_closing(&self) -> Result<(), VolumeError> {
        match self.closing.load(Ordering::Acquire) {
            true => Err(VolumeError::Conflict("blockd is shutting down; try again when it is back".into())),
            false => Ok(()),
        }
    }

    /// Learns which volumes the store has and opens those the configuration wants. One that fails is left `Failed`; while
    /// the reason is that the bucket is away, it is tried again in the background until it opens.
    ///
    /// # Errors
    /// The store cannot be listed.
    pub(super) async fn open_all(self: &Arc<Self>) -> Result<(), ManifestError> {
        let names = manifest::list(self.store.as_ref()).await?;
        let wanted = |name: &String| self.config.volumes.as_ref().is_none_or(|only| only.contains(name));
        for name in self.config.volumes.iter().flatten().filter(|name| !names.contains(name)) {
            tracing::warn!(volume = %name, "this volume is to be served, but the store does not have it");
        }
        self.entries_mut()
            .extend(names.iter().map(|name| (name.clone(), Entry { manifest: None, phase: Phase::Closed })));
        let mut openings = JoinSet::new();
        for name in names {
            let (daemon, open) = (self.clone(), wanted(&name));
            openings.spawn(async move {
                let result = match open {
                    true => daemon.open(&name).await.map(drop),
                    false => daemon.look_at(&name).await,
                };
                match result {
                    Ok(()) => {}
                    Err(VolumeError::Away(error)) if open => {
                        tracing::warn!(volume = %name, "{error}; trying again until it opens");
                        tokio::spawn(daemon.open_when_it_is_back(name));
                    }
                    Err(error) => tracing::error!(volume = %name, "{error}"),
                }
            });
        }
        while openings.join_next().await.is_some() {}
        Ok(())
    }

    /// Tries again to open a volume that failed because the bucket is away, until it opens, fails for another reason,
    /// or somebody else does something about it.
    async fn open_when_it_is_back(self: Arc<Self>, name: String) {
        let mut pauses = away_pauses().build();
        loop {
            tokio::time::sleep(pauses.next().unwrap_or(AWAY_PAUSE_MAX)).await;
            if self.closing.load(Ordering::Acquire)
                || !matches!(self.entry(&name), Ok(Entry { phase: Phase::Failed(_), .. }))
            {
                return;
            }
            match self.open(&name).await {
                Err(VolumeError::Away(error)) => tracing::debug!(volume = %name, "{error}"),
                Err(error) => return tracing::error!(volume = %name, "{error}"),
                Ok(_) => return,
            }
        }
    }

    /// Reads the manifest of a volume that is not to be served, so that lists can describe it.
    async fn look_at(&self, name: &str) -> Result<(), VolumeError> {
        let (manifest, _) = self.load(name).await?;
        if let Some(entry) = self.entries_mut().get_mut(name) {
            entry.manifest = Some(manifest);
        }
        Ok(())
    }

    async fn load(&self, name: &str) -> Result<(Manifest, crate::store::Version), VolumeError> {
        manifest::load(self.store.as_ref(), name).await.map_err(|error| match error {
            ManifestError::NotFound(name) => VolumeError::Unknown(name),
            ManifestError::Name(_) => VolumeError::Invalid(error.to_string()),
            error => {
                let why = format!("cannot read volume {name:?}: {error}");
                if error.is_transient() { VolumeError::Away(why) } else { VolumeError::Failed(why) }
            }
        })
    }

    /// Makes a volume and serves it.
    pub async fn create(&self, request: CreateVolume) -> Result<VolumeStatus, VolumeError> {
        self.refuse_while_closing()?;
        let manifest = self.new_manifest(&request)?;
        let name = manifest.name.clone();
        {
            let mut entries = self.entries_mut();
            if entries.contains_key(&name) {
                return Err(VolumeError::Conflict(format!(
                    "a volume named {name:?} exists already; choose another name"
                )));
            }
            let entry = Entry { manifest: Some(manifest.clone()), phase: Phase::Opening };
            entries.insert(name.clone(), entry);
        }
        if let Err(error) = manifest::create(self.store.as_ref(), &manifest).await {
            self.entries_mut().remove(&name);
            return Err(match error {
                ManifestError::Exists(_) => VolumeError::Conflict(format!(
                    "the store has a volume named {name:?} already; choose another name, or serve it with `blockd volume open {name}`"
                )),
                error => VolumeError::Failed(format!("cannot create volume {name:?}: {error}")),
            });
        }
        self.open_device(manifest).await?;
        self.show(&name).await
    }

    fn new_manifest(&self, request: &CreateVolume) -> Result<Manifest, VolumeError> {
        let invalid = |error: &dyn std::fmt::Display| VolumeError::Invalid(error.to_string());
        manifest::check_name(&request.name).map_err(|e| invalid(&e))?;
        check_size(request.size)?;
        let durability = request.durability.as_deref().map_or(Ok(Durability::Local), str::parse);
        let codec = request.codec.as_deref().map_or(Ok(Codec::Lz4), str::parse);
        let chunk_size = request.chunk_bytes.map_or(self.config.chunk_size, ByteSize);
        Ok(Manifest {
            id: VolumeId::random(),
            name: request.name.clone(),
            size: request.size,
            durability: durability.map_err(|e| invalid(&e))?,
            codec: codec.map_err(|e| invalid(&e))?,
            chunk_bytes: check_chunk_size(chunk_size).map_err(VolumeError::Invalid)?,
            state: manifest::VolumeState::Active,
            created_ms: unix_ms(),
            epochs: Vec::new(),
        })
    }

    /// Serves a volume that is not served: one that failed to open, or that another daemon made.
    pub async fn open(&self, name: &str) -> Result<VolumeStatus, VolumeError> {
        self.refuse_while_closing()?;
        manifest::check_name(name).map_err(|e| VolumeError::Invalid(e.to_string()))?;
        let known = {
            let mut entries = self.entries_mut();
            let known = entries.contains_key(name);
            let entry = entries.entry(name.to_owned()).or_insert(Entry { manifest: None, phase: Phase::Closed });
            match entry.phase {
                Phase::Opening | Phase::Deleting => return Err(busy(name, &entry.phase)),
                Phase::Open(_) => None,
                Phase::Closed | Phase::Failed(_) => {
                    entry.phase = Phase::Opening;
                    Some(known)
                }
            }
        };
        let Some(known) = known else { return self.show(name).await };
        let manifest = match self.load(name).await {
            Ok((manifest, _)) => manifest,
            Err(error) => {
                if known && !matches!(error, VolumeError::Unknown(_)) {
                    self.set_phase(name, Phase::Failed(error.to_string()));
                } else {
                    self.entries_mut().remove(name);
                }
                return Err(error);
            }
        };
        if let Some(entry) = self.entries_mut().get_mut(name) {
            entry.manifest = Some(manifest.clone());
        }
        if manifest.state == manifest::VolumeState::Deleting {
            let why = format!("deleting volume {name:?} was interrupted; finish it with `blockd volume delete {name}`");
            self.set_phase(name, Phase::Failed(why.clone()));
            return Err(VolumeError::Conflict(why));
        }
        self.open_device(manifest).await?;
        self.show(name).await
    }

    /// From `Opening` to `Open` or `Failed`.
    async fn open_device(&self, manifest: Manifest) -> Result<(), VolumeError> {
        let name = manifest.name.clone();
        let begun = Instant::now();
        match self.try_open_device(&manifest).await {
            Ok((place, report)) => {
                self.set_phase(&name, Phase::Open(place));
                tracing::info!(
                    volume = %name,
                    took = ?begun.elapsed(),
                    bucket_lsn = report.bucket_lsn,
                    last_lsn = report.last_lsn,
                    chunks_applied = report.chunks_applied,
                    replayed = report.replayed,
                    torn_tail = report.torn_tail,
                    "volume open"
                );
                self.share_memory().await;
                Ok(())
            }
            Err(error) => {
                let why = format!("cannot open volume {name:?}: {}", explain(&error));
                self.set_phase(&name, Phase::Failed(why.clone()));
                let away = error.downcast_ref::<OpenError>().is_some_and(OpenError::is_transient);
                let why = format!("{why}; `blockd volume open {name}` tries again");
                Err(if away { VolumeError::Away(why) } else { VolumeError::Failed(why) })
            }
        }
    }

    async fn try_open_device(&self, manifest: &Manifest) -> anyhow::Result<(Place, OpenReport)> {
        let (dirty, cache, table) = self.shares(self.open_places().len() + 1);
        let options = OpenOptions {
            store: self.store.clone() as Arc<dyn ObjectStore>,
            name: manifest.name.clone(),
            dir: self.data.volume(manifest.id),
            owner: self.data.host(),
            log_bytes: self.config.log_size.0,
            segment_bytes: self.config.log_segment.0,
            table_memory_bytes: table,
            frame_cache: self.frame_cache.clone(),
            tuning: Tuning {
                dirty_memory_bytes: dirty,
                block_cache_bytes: cache,
                puts_max: self.config.puts_max(),
                destage_age_us: u64::try_from(self.config.destage_age.0.as_micros()).unwrap_or(u64::MAX),
                compaction: CompactionTuning {
                    rate: self.config.compaction_rate.0,
                    ratio: self.config.compaction_ratio,
                    ..CompactionTuning::default()
                },
                delete_grace_us: u64::try_from(self.config.delete_grace.0.as_micros()).unwrap_or(u64::MAX),
                ..Tuning::default()
            },
        };
        let (volume, report) = Volume::open(options).await?;
        let next = self.next_reactor.fetch_add(1, Ordering::Relaxed) % self.reactors.len();
        let reactor = self.reactors[next].clone();
        let key = reactor.add_device(Box::new(volume)).await?;
        Ok((Place { reactor, key }, report))
    }

    /// Changes the size of an open volume. Clients see it when they connect again.
    pub async fn resize(&self, name: &str, request: ResizeVolume) -> Result<VolumeStatus, VolumeError> {
        self.refuse_while_closing()?;
        check_size(request.size)?;
        // Manifest and volume change one after the other; two resizes must not cross between them.
        let _one_at_a_time = self.resizing.lock().await;
        let entry = self.entry(name)?;
        let (Phase::Open(place), Some(manifest)) = (&entry.phase, &entry.manifest) else {
            return Err(VolumeError::Conflict(format!(
                "volume {name:?} is {}; only an open volume can be resized (`blockd volume open {name}`)",
                entry.phase.state().as_str()
            )));
        };
        if request.size < manifest.size && !request.shrink {
            return Err(VolumeError::Conflict(format!(
                "volume {name:?} has {} and {} is smaller: everything behind it would be lost; shrink the file \
                 system on it first, then say --shrink",
                ByteSize(manifest.size),
                ByteSize(request.size)
            )));
        }
        let size = request.size;
        // The manifest first: a volume must not take writes at addresses that a crash would put out of its range.
        self.write_size(name, size)
            .await
            .map_err(|error| VolumeError::Failed(format!("cannot resize volume {name:?}: {error}")))?;
        if with_volume(place, move |volume| volume.set_size(size)).await.is_none() {
            return Err(VolumeError::Conflict(format!(
                "volume {name:?} was closed meanwhile; it has its new size when it is opened"
            )));
        }
        if let Some(manifest) = self.entries_mut().get_mut(name).and_then(|entry| entry.manifest.as_mut()) {
            manifest.size = size;
        }
        tracing::info!(volume = %name, size = %ByteSize(size), "volume resized");
        self.show(name).await
    }

    async fn write_size(&self, name: &str, size: u64) -> Result<(), ManifestError> {
        loop {
            match volume::resize(self.store.as_ref(), name, size).await {
                // A change of owner came between; the new manifest needs the new size all the same.
                Err(ManifestError::LostRace(_)) => {}
                other => return other,
            }
        }
    }

    /// Removes a volume from the store and all that is kept of it here.
    pub async fn delete(&self, name: &str, force: bool) -> Result<(), VolumeError> {
        self.refuse_while_closing()?;
        if !self.entries().contains_key(name) {
            self.load(name).await?;
            let entry = Entry { manifest: None, phase: Phase::Closed };
            self.entries_mut().entry(name.to_owned()).or_insert(entry);
        }
        // From here on nobody finds it any more, so the number of clients can only fall.
        let before = {
            let mut entries = self.entries_mut();
            let entry = entries.get_mut(name).ok_or_else(|| VolumeError::Unknown(name.to_owned()))?;
            if let Phase::Opening | Phase::Deleting = entry.phase {
                return Err(busy(name, &entry.phase));
            }
            std::mem::replace(&mut entry.phase, Phase::Deleting)
        };
        if let Phase::Open(place) = before {
            let clients = place.reactor.connections(place.key).await.len();
            if clients > 0 && !force {
                self.set_phase(name, Phase::Open(place));
                return Err(VolumeError::Conflict(format!(
                    "volume {name:?} has {clients} client connection{}; detach {} first, or say --force",
                    if clients == 1 { "" } else { "s" },
                    if clients == 1 { "it" } else { "them" }
                )));
            }
            place.reactor.close_device(place.key).await;
        }
        if let Err(error) = self.delete_closed(name).await {
            let why = format!(
                "deleting volume {name:?} failed half way: {}; `blockd volume delete {name}` goes on",
                explain(&error)
            );
            self.set_phase(name, Phase::Failed(why.clone()));
            return Err(VolumeError::Failed(why));
        }
        self.entries_mut().remove(name);
        tracing::info!(volume = %name, "volume deleted");
        self.share_memory().await;
        Ok(())
    }

    /// The bucket first: should this be interrupted, what is left here is garbage, not a log without its volume.
    async fn delete_closed(&self, name: &str) -> anyhow::Result<()> {
        let known = self.entries().get(name).and_then(|entry| entry.manifest.as_ref().map(|m| m.id));
        let id = match known {
            Some(id) => id,
            None => manifest::load(self.store.as_ref(), name).await?.0.id,
        };
        volume::delete(self.store.as_ref(), name, |_, _| {}).await?;
        let dir = self.data.volume(id);
        match tokio::fs::remove_dir_all(&dir).await {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(anyhow::Error::from(e).context(format!("remove {}", dir.display())))
            }
            _ => Ok(()),
        }
    }

    /// Closes every volume in order: each answers what it took on, flushes its log and ends it.
    pub(super) async fn close_all(&self) {
        self.closing.store(true, Ordering::Release);
        let mut closings = JoinSet::new();
        for (name, place) in self.open_places() {
            closings.spawn(async move {
                place.reactor.close_device(place.key).await;
                tracing::info!(volume = %name, "volume closed");
            });
        }
        while closings.join_next().await.is_some() {}
        for reactor in &self.reactors {
            reactor.stop().await;
        }
    }

    pub(super) fn entry(&self, name: &str) -> Result<Entry, VolumeError> {
        self.entries().get(name).cloned().ok_or_else(|| VolumeError::Unknown(name.to_owned()))
    }

    pub(super) fn open_places(&self) -> Vec<(String, Place)> {
        let place = |(name, entry): (&String, &Entry)| match &entry.phase {
            Phase::Open(place) => Some((name.clone(), place.clone())),
            _ => None,
        };
        self.entries().iter().filter_map(place).collect()
    }

    /// What each of `count` volumes gets: memory for dirty payload, for blocks, for its table.
    fn shares(&self, count: usize) -> (usize, usize, usize) {
        let count = count.max(1);
        (
            (self.config.dirty_memory_size().as_usize() / count).max(MIN_DIRTY_SHARE),
            self.config.block_cache_size().as_usize() / count,
            self.config.table_memory.as_usize() / count,
        )
    }

    /// Divides the budgets anew after a volume came or went.
    async fn share_memory(&self) {
        let places = self.open_places();
        let (dirty, cache, _) = self.shares(places.len());
        for (_, place) in places {
            with_volume(&place, move |volume| {
                volume.set_dirty_memory_bytes(dirty);
                volume.set_block_cache_bytes(cache);
            })
            .await;
        }
    }
}

/// How long to wait before each attempt to reach a bucket that is away; endless.
pub(super) fn away_pauses() -> ExponentialBuilder {
    let pauses = ExponentialBuilder::new().with_min_delay(AWAY_PAUSE_MIN).with_max_delay(AWAY_PAUSE_MAX);
    pauses.without_max_times().with_jitter()
}

/// Runs `visit` on the volume at `place`; nothing when it is gone.
pub(super) async fn with_volume<R: Send + 'static>(
    place: &Place,
    visit: impl FnOnce(&mut Volume) -> R + Send + 'static,
) -> Option<R> {
    let visit = |device: &mut dyn Device| device.as_any_mut().downcast_mut().map(visit);
    place.reactor.with_device(place.key, visit).await.flatten()
}

fn busy(name: &str, phase: &Phase) -> VolumeError {
    let doing = phase.state().as_str();
    VolumeError::Conflict(format!("volume {name:?} is {doing} at the moment; try again when that is done"))
}

fn check_size(size: u64) -> Result<(), VolumeError> {
    if size == 0 || !size.is_multiple_of(BLOCK_SIZE) {
        let better = ByteSize(size.max(1).checked_next_multiple_of(BLOCK_SIZE).unwrap_or(MAX_SIZE));
        return Err(VolumeError::Invalid(format!(
            "a volume of {size} bytes is not possible: sizes are multiples of {BLOCK_SIZE}; the next is {better}"
        )));
    }
    if size > MAX_SIZE {
        return Err(VolumeError::Invalid(format!("a volume can have at most {}", ByteSize(MAX_SIZE))));
    }
    Ok(())
}

fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
