//! The volumes of this daemon, and all that can happen to them.
//!
//! Each volume is in one phase. Whoever wants to change a volume first moves it, under the lock, into a phase that
//! keeps others away (`Opening`, `Deleting`), works without the lock, and then moves it on. So operations on one
//! volume exclude each other, and operations on different volumes do not wait for each other.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock, RwLock, RwLockReadGuard, RwLockWriteGuard, Weak};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use backon::{BackoffBuilder, ExponentialBuilder};

use tokio::task::JoinSet;

use super::DataDir;
use super::hold::{Hold, holder, instants, may_hold};
use super::keys::{KeyError, KeyRing};
use super::release;
use super::stranded::why_not;
use crate::admin::api::{CopyRange, CreateVolume, ResizeVolume, StrandedStatus, VolumeState, VolumeStatus};
use crate::cache::FrameCache;
use crate::chunk::Codec;
use crate::config::{ByteSize, Config, check_chunk_size};
use crate::crypt::Keys;
use crate::export::nbd::server::Listen;
use crate::export::nvme::namespace::Namespace;
use crate::export::nvme::server::{Changes, Server as NvmeServer};
use crate::lease::{self, AcquireError, Judge, Lease, LeaseState, Sighting, Verdict};
use crate::manifest::{self, Durability, Manifest, ManifestError};
use crate::program::explain;
use crate::program::text::date;
use crate::reactor::{Device, DeviceKey, ReactorHandle};
use crate::store::{CountedStore, ObjectStore};
use crate::types::{BLOCK_SIZE, VolumeId};
use crate::volume::{self, CompactionTuning, IoError, OpenError, OpenOptions, OpenReport, Tuning, Volume};

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
    /// What its NVMe/TCP hosts share.
    pub namespace: Arc<Namespace>,
}

/// See the module.
#[derive(Clone)]
pub(super) enum Phase {
    Closed,
    Opening,
    Open(Place),
    /// See `super::release`.
    Releasing(Place),
    Released,
    /// Another host's.
    Elsewhere(Box<Elsewhere>),
    /// Lost to another host.
    Fenced(Fenced),
    Deleting,
    /// Encrypted, and there is no key for it.
    Locked(String),
    Failed(String),
}

/// What is known of another host's lease.
#[derive(Clone)]
pub(super) struct Elsewhere {
    pub lease: Lease,
    pub seen: Sighting,
}

/// A volume that was lost.
#[derive(Clone)]
pub(super) struct Fenced {
    /// Still there to refuse what clients ask.
    pub place: Option<Place>,
    pub why: String,
}

impl Phase {
    pub fn state(&self) -> VolumeState {
        match self {
            Self::Closed => VolumeState::Closed,
            Self::Opening => VolumeState::Opening,
            Self::Open(_) => VolumeState::Open,
            Self::Releasing(_) => VolumeState::Releasing,
            Self::Released => VolumeState::Released,
            Self::Elsewhere(_) => VolumeState::Held,
            Self::Fenced(_) => VolumeState::Fenced,
            Self::Deleting => VolumeState::Deleting,
            Self::Locked(_) => VolumeState::Locked,
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
    /// Its lease, while this host holds it.
    pub hold: Option<Arc<Hold>>,
    /// What is known to be stranded in its log.
    pub stranded: Option<StrandedStatus>,
    /// What was found when it was opened.
    pub notice: Option<String>,
}

impl Entry {
    pub fn new(manifest: Option<Manifest>, phase: Phase) -> Self {
        Self { manifest, phase, hold: None, stranded: None, notice: None }
    }
}

/// Why a volume is opened; decides what happens when another host had it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Why {
    /// The daemon starts: only what is its own, or nobody's.
    Start,
    /// Somebody asked for it: also what another host's lease does not cover any more.
    Asked,
    /// Somebody wants it whatever another host holds.
    Forced,
}

/// Everything that lives as long as the process.
pub struct Daemon {
    pub(super) config: Config,
    pub(super) data: DataDir,
    pub(super) store: Arc<CountedStore>,
    pub(super) started: Instant,
    pub(super) listens: OnceLock<Vec<Listen>>,
    /// Gone while the daemon stops.
    pub(super) nvme: OnceLock<Weak<NvmeServer>>,
    /// Tells NVMe/TCP hosts.
    pub(super) changes: Changes,
    reactors: Vec<ReactorHandle>,
    next_reactor: AtomicUsize,
    frame_cache: Option<FrameCache>,
    pub(super) keys: KeyRing,
    volumes: RwLock<BTreeMap<String, Entry>>,
    pub(super) resizing: tokio::sync::Mutex<()>,
    closing: AtomicBool,
    pub(super) rebuilds: super::rebuild::Rebuilds,
    pub(super) views: super::views::Views,
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
        // What an earlier process left.
        let _ = std::fs::remove_dir_all(data.views());
        Self {
            keys: KeyRing::new(&config),
            config,
            data,
            store,
            started: Instant::now(),
            listens: OnceLock::new(),
            nvme: OnceLock::new(),
            changes: Changes::default(),
            reactors,
            next_reactor: AtomicUsize::new(0),
            frame_cache,
            volumes: RwLock::default(),
            resizing: tokio::sync::Mutex::default(),
            closing: AtomicBool::new(false),
            rebuilds: Default::default(),
            views: Default::default(),
        }
    }

    pub(super) fn entries(&self) -> RwLockReadGuard<'_, BTreeMap<String, Entry>> {
        self.volumes.read().expect("no code panics while it holds this lock")
    }

    pub(super) fn entries_mut(&self) -> RwLockWriteGuard<'_, BTreeMap<String, Entry>> {
        self.volumes.write().expect("no code panics while it holds this lock")
    }

    pub(super) fn set_phase(&self, name: &str, phase: Phase) {
        if let Some(entry) = self.entries_mut().get_mut(name) {
            entry.phase = phase;
        }
        self.changes.tell();
    }

    pub(super) fn refuse_while_closing(&self) -> Result<(), VolumeError> {
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
        // Somebody may have made or opened one, or begun to delete it, while they were being listed: that stands.
        let names: Vec<String> = {
            let mut entries = self.entries_mut();
            let new: Vec<String> = names.into_iter().filter(|name| !entries.contains_key(name)).collect();
            entries.extend(new.iter().map(|name| (name.clone(), Entry::new(None, Phase::Closed))));
            new
        };
        let mut openings = JoinSet::new();
        for name in names {
            let (daemon, open) = (self.clone(), wanted(&name));
            openings.spawn(async move {
                let result = match open {
                    true => daemon.open_at_start(&name).await,
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
            match self.open_at_start(&name).await {
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

    pub(super) async fn load(&self, name: &str) -> Result<(Manifest, crate::store::Version), VolumeError> {
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
    pub async fn create(self: &Arc<Self>, request: CreateVolume) -> Result<VolumeStatus, VolumeError> {
        self.refuse_while_closing()?;
        let mut manifest = self.new_manifest(&request)?;
        self.encrypt_new(&mut manifest, request.secret.as_ref()).await?;
        let name = manifest.name.clone();
        {
            let mut entries = self.entries_mut();
            if entries.contains_key(&name) {
                return Err(VolumeError::Conflict(format!(
                    "a volume named {name:?} exists already; choose another name"
                )));
            }
            entries.insert(name.clone(), Entry::new(Some(manifest.clone()), Phase::Opening));
        }
        if let Err(error) = manifest::create(self.store.as_ref(), &manifest).await {
            self.entries_mut().remove(&name);
            self.keys.forget(manifest.id);
            return Err(match error {
                ManifestError::Exists(_) => VolumeError::Conflict(format!(
                    "the store has a volume named {name:?} already; choose another name, or serve it with `blockd volume open {name}`"
                )),
                error => VolumeError::Failed(format!("cannot create volume {name:?}: {error}")),
            });
        }
        self.open_device(manifest, Why::Asked, None).await?;
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
            durability: durability.map_err(|e| invalid(&e))?,
            codec: codec.map_err(|e| invalid(&e))?,
            chunk_bytes: check_chunk_size(chunk_size).map_err(VolumeError::Invalid)?,
            created_ms: unix_ms(),
            ..Manifest::new(VolumeId::random(), &request.name, request.size)
        })
    }

    /// Serves a volume that is not served: one that failed to open, was released, or was another host's. What another
    /// host holds is taken from it only with `force`.
    pub async fn open(self: &Arc<Self>, name: &str, force: bool) -> Result<VolumeStatus, VolumeError> {
        let why = if force { Why::Forced } else { Why::Asked };
        self.open_for(name, why).await?;
        self.show(name).await
    }

    /// As [`Daemon::open`], for a daemon that starts: a volume that is another host's, or was released here, stays
    /// closed, which is no error.
    async fn open_at_start(self: &Arc<Self>, name: &str) -> Result<(), VolumeError> {
        self.open_for(name, Why::Start).await
    }

    async fn open_for(self: &Arc<Self>, name: &str, why: Why) -> Result<(), VolumeError> {
        self.refuse_while_closing()?;
        manifest::check_name(name).map_err(|e| VolumeError::Invalid(e.to_string()))?;
        let before = {
            let mut entries = self.entries_mut();
            let known = entries.contains_key(name);
            let entry = entries.entry(name.to_owned()).or_insert(Entry::new(None, Phase::Closed));
            match entry.phase.clone() {
                // Somebody was quicker than the daemon that starts, and will say what came of it.
                Phase::Opening | Phase::Deleting if why == Why::Start => return Ok(()),
                Phase::Opening | Phase::Deleting => return Err(busy(name, &entry.phase)),
                Phase::Open(_) => return Ok(()),
                // Whoever waits for it to be drained notices, and lets clients in again.
                Phase::Releasing(place) => {
                    entry.phase = Phase::Open(place);
                    return Ok(());
                }
                before => {
                    entry.phase = Phase::Opening;
                    known.then_some(before)
                }
            }
        };
        if let Some(Phase::Fenced(Fenced { place: Some(place), .. })) = &before {
            place.reactor.close_device(place.key).await;
        }
        let seen = match &before {
            Some(Phase::Elsewhere(elsewhere)) => Some(elsewhere.seen),
            _ => None,
        };
        let manifest = match self.load(name).await {
            Ok((manifest, _)) => manifest,
            Err(error) => {
                if before.is_some() && !matches!(error, VolumeError::Unknown(_)) {
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
        self.open_device(manifest, why, seen).await
    }

    /// From `Opening` to `Open`, or to what keeps it from being opened.
    pub(super) async fn open_device(
        self: &Arc<Self>,
        manifest: Manifest,
        why: Why,
        seen: Option<Sighting>,
    ) -> Result<(), VolumeError> {
        let name = manifest.name.clone();
        let begun = Instant::now();
        match self.try_open_device(&manifest, why, seen).await {
            Ok(Opened::Here { place, report, notice }) => {
                if let Some(notice) = &notice {
                    tracing::warn!(volume = %name, "{notice}");
                }
                if let Some(entry) = self.entries_mut().get_mut(&name) {
                    // It may have been lost in the moment since it was opened.
                    match &entry.phase {
                        Phase::Opening => entry.phase = Phase::Open(place),
                        Phase::Fenced(fenced) => return Err(VolumeError::Conflict(fenced.why.clone())),
                        _ => {}
                    }
                    (entry.notice, entry.stranded) = (notice, None);
                    // Its last owner may have changed it since it was read.
                    entry.manifest = Some(report.manifest.clone());
                }
                tracing::info!(
                    volume = %name,
                    took = ?begun.elapsed(),
                    table = ?report.table,
                    bucket_lsn = report.bucket_lsn,
                    last_lsn = report.last_lsn,
                    chunks_applied = report.chunks_applied,
                    replayed = report.replayed,
                    torn_tail = report.torn_tail,
                    "volume open: {}",
                    super::rebuild::state_reached(&report, unix_ms())
                );
                self.changes.tell();
                self.share_memory().await;
                Ok(())
            }
            Ok(Opened::Not { phase, error }) => {
                self.set_phase(&name, phase);
                match error {
                    Some(error) if why != Why::Start => Err(VolumeError::Conflict(error)),
                    Some(error) => {
                        tracing::warn!(volume = %name, "not opened: {error}");
                        Ok(())
                    }
                    None => Ok(()),
                }
            }
            Err(error) if error.is::<KeyError>() => {
                self.set_phase(&name, Phase::Locked(error.to_string()));
                Err(VolumeError::Conflict(error.to_string()))
            }
            Err(error) => {
                let asked = why != Why::Start;
                let why = format!("cannot open volume {name:?}: {}", explain(&error));
                if asked {
                    tracing::error!(volume = %name, "{why}");
                }
                self.set_phase(&name, Phase::Failed(why.clone()));
                let away = error.downcast_ref::<OpenError>().is_some_and(OpenError::is_transient);
                let why = format!("{why}; `blockd volume open {name}` tries again");
                Err(if away { VolumeError::Away(why) } else { VolumeError::Failed(why) })
            }
        }
    }

    async fn try_open_device(
        self: &Arc<Self>,
        manifest: &Manifest,
        why: Why,
        seen: Option<Sighting>,
    ) -> anyhow::Result<Opened> {
        // Without its key nothing is to be done with it, and least of all its lease to be taken.
        let keys = self.keys.keys_of(manifest).await?;
        let (name, store) = (&manifest.name, self.store.as_ref() as &dyn ObjectStore);
        // Stranded writes are looked for first: they are to be shown whoever has the volume now.
        let stranded = self.stranded_in_place(manifest).await?;
        self.note_stranded(name, stranded.clone());
        if why == Why::Start
            && let Some(not) = self.stays_closed(manifest).await?
        {
            return Ok(not);
        }
        if let Some(stranded) = stranded {
            let why = why_not(&stranded);
            let phase = Phase::Fenced(Fenced { place: None, why: why.clone() });
            return Ok(Opened::Not { phase, error: Some(why) });
        }
        let wanted = self.wanted_lease(manifest);
        let acquired = match lease::acquire(store, name, wanted, seen, why == Why::Forced, &instants).await {
            Ok(acquired) => acquired,
            Err(AcquireError::Held { lease, seen, left_ms }) => {
                let error = refusal(name, &lease, left_ms);
                let phase = Phase::Elsewhere(Box::new(Elsewhere { lease: *lease, seen }));
                return Ok(Opened::Not { phase, error: Some(error) });
            }
            Err(AcquireError::Lease(error)) => return Err(OpenError::Lease(error).into()),
        };
        // By what happens next this host may add to the volume: a restart is to open it again.
        release::unmark(&self.data.volume(manifest.id))?;
        let before = acquired.before.clone().filter(|before| before.host != self.data.host());
        let (verdict, taken) = (acquired.verdict, acquired.before.is_some());
        let hold = Hold::new(name, acquired);
        // Opening may take longer than the lease.
        tokio::spawn(self.clone().keep(hold.clone()));
        let opened = self.open_volume(manifest, keys, &hold).await;
        let (place, report) = match opened {
            Ok(opened) => opened,
            Err(error) => {
                hold.stop();
                // Nothing was served. Whoever had it before keeps what the lease said of it.
                if !taken || verdict == Verdict::Free {
                    let _ = hold.release(store, None).await;
                }
                return Err(error);
            }
        };
        if let Some(entry) = self.entries_mut().get_mut(name) {
            entry.hold = Some(hold.clone());
        }
        let epoch = report.manifest.epochs.last().map_or(0, |epoch| epoch.epoch);
        if !hold.attach(place.clone(), epoch).await {
            // Nothing was served yet.
            place.reactor.close_device(place.key).await;
            anyhow::bail!("another host took it over while it was being opened");
        }
        let notice = before.filter(|before| before.state == LeaseState::Held).map(|before| {
            let how = if verdict == Verdict::Expired { "its lease had run out" } else { "by force" };
            format!(
                "volume {name:?} was taken over from {}, {how}, at write {}. {}",
                holder(&before),
                report.bucket_lsn,
                may_hold(&before, Some(report.bucket_lsn), instants())
            )
        });
        Ok(Opened::Here { place, report: Box::new(report), notice })
    }

    /// Whether a daemon that starts leaves the volume alone.
    async fn stays_closed(&self, manifest: &Manifest) -> anyhow::Result<Option<Opened>> {
        if release::is_marked(&self.data.volume(manifest.id)) {
            // Should the last step of the release be missing, it is made up for.
            self.release_closed(manifest).await?;
            return Ok(Some(Opened::Not { phase: Phase::Released, error: None }));
        }
        let found = lease::load(self.store.as_ref(), &manifest.name).await.map_err(OpenError::Lease)?;
        let Some((lease, _)) = found else { return Ok(None) };
        let now = instants();
        let seen = Sighting::update(None, &lease, now);
        let judge = Judge { host: self.data.host(), volume: manifest.id };
        Ok(match judge.judge(&lease, seen, now) {
            Verdict::Free | Verdict::Own => None,
            Verdict::Held(left_ms) => {
                let error = refusal(&manifest.name, &lease, left_ms);
                Some(Opened::Not { phase: Phase::Elsewhere(Box::new(Elsewhere { lease, seen })), error: Some(error) })
            }
            Verdict::Expired | Verdict::Watch(_) => {
                let error = expired(&manifest.name, &lease);
                Some(Opened::Not { phase: Phase::Elsewhere(Box::new(Elsewhere { lease, seen })), error: Some(error) })
            }
        })
    }

    /// The lease as this host would hold it.
    fn wanted_lease(&self, manifest: &Manifest) -> Lease {
        Lease {
            volume: manifest.id,
            state: LeaseState::Held,
            host: self.data.host(),
            claim: rand::random(),
            host_name: host_name(),
            epoch: 0,
            counter: 0,
            duration_ms: u64::try_from(self.config.lease.0.as_millis()).unwrap_or(u64::MAX),
            since_ms: 0,
            renewed_ms: 0,
            bucket_lsn: 0,
            last_lsn: 0,
            dirty_bytes: 0,
        }
    }

    async fn open_volume(
        &self,
        manifest: &Manifest,
        keys: Option<Keys>,
        hold: &Hold,
    ) -> anyhow::Result<(Place, OpenReport)> {
        let dir = self.data.volume(manifest.id);
        let (dirty, cache, table) = self.shares(self.open_places().len() + 1);
        let options = OpenOptions {
            store: self.store.clone() as Arc<dyn ObjectStore>,
            name: manifest.name.clone(),
            dir: self.data.volume(manifest.id),
            owner: self.data.host(),
            last_epoch: last_epoch(manifest),
            log_bytes: self.config.log_size.0,
            segment_bytes: self.config.log_segment.0,
            table_memory_bytes: table,
            frame_cache: self.frame_cache.clone(),
            tuning: Tuning {
                dirty_memory_bytes: dirty,
                block_cache_bytes: cache,
                keep_sequential_bytes: self.config.keep_sequential_size().0,
                puts_max: self.config.puts_max(),
                destage_age_us: u64::try_from(self.config.destage_age.0.as_micros()).unwrap_or(u64::MAX),
                checkpoint_chunks: self.config.checkpoint_chunks.into(),
                checkpoint_age_us: u64::try_from(self.config.checkpoint_age.0.as_micros()).unwrap_or(u64::MAX),
                compaction: CompactionTuning {
                    rate: self.config.compaction_rate.0,
                    ratio: self.config.compaction_ratio,
                    ..CompactionTuning::default()
                },
                read_patience: self.config.read_patience.0,
                delete_grace_us: u64::try_from(self.config.delete_grace.0.as_micros()).unwrap_or(u64::MAX),
                checkpoint_grace_us: u64::try_from(self.config.checkpoint_grace.0.as_micros()).unwrap_or(u64::MAX),
                ..Tuning::default()
            },
            keys,
            rebuild: self.rebuilds.wanted(&manifest.name),
            progress: self.rebuilds.progress(&manifest.name),
        };
        let (mut volume, report) = Volume::open(options).await?;
        // Who must not write must not be let in by accident.
        let namespace = Namespace::open(manifest.id, dir)?;
        match hold.grant().await {
            Some(grant) => volume.grant(grant, instants()),
            None => anyhow::bail!("another host took it over while it was being opened"),
        }
        let reactor = self.next_reactor();
        let key = reactor.add_device(Box::new(volume)).await?;
        Ok((Place { reactor, key, namespace }, report))
    }

    /// The reactor on which the next device is to live.
    pub(super) fn next_reactor(&self) -> ReactorHandle {
        let next = self.next_reactor.fetch_add(1, Ordering::Relaxed) % self.reactors.len();
        self.reactors[next].clone()
    }

    pub(super) fn frame_cache(&self) -> Option<FrameCache> {
        self.frame_cache.clone()
    }

    /// The volume was lost to another host.
    pub(super) fn set_fenced(&self, name: &str, place: Place, why: String) {
        if let Some(entry) = self.entries_mut().get_mut(name)
            && !matches!(entry.phase, Phase::Deleting)
        {
            entry.phase = Phase::Fenced(Fenced { place: Some(place), why });
        }
    }

    pub(super) fn note_stranded(&self, name: &str, stranded: Option<StrandedStatus>) {
        if let Some(entry) = self.entries_mut().get_mut(name) {
            entry.stranded = stranded;
        }
    }

    /// Closes a volume that only refuses what clients ask.
    pub(super) async fn close_fenced(&self, name: &str) -> Result<(), VolumeError> {
        let entry = self.entry(name)?;
        match entry.phase {
            Phase::Fenced(Fenced { place: Some(place), why }) => {
                self.set_phase(name, Phase::Fenced(Fenced { place: None, why }));
                place.reactor.close_device(place.key).await;
                Ok(())
            }
            Phase::Fenced(_) | Phase::Elsewhere(_) | Phase::Closed | Phase::Failed(_) | Phase::Released => Ok(()),
            phase => Err(busy(name, &phase)),
        }
    }

    /// From `Open` to `Releasing`: new clients do not find it any more.
    pub(super) fn begin_release(&self, name: &str) -> Result<Place, VolumeError> {
        let mut entries = self.entries_mut();
        let entry = entries.get_mut(name).ok_or_else(|| VolumeError::Unknown(name.to_owned()))?;
        match entry.phase.clone() {
            Phase::Open(place) => {
                entry.phase = Phase::Releasing(place.clone());
                Ok(place)
            }
            phase => Err(busy(name, &phase)),
        }
    }

    /// Reads another host's lease anew.
    pub(super) async fn look_at_lease(&self, name: &str) {
        let Ok(Entry { phase: Phase::Elsewhere(before), .. }) = self.entry(name) else { return };
        let Ok(Some((lease, _))) = lease::load(self.store.as_ref(), name).await else { return };
        let seen = Sighting::update(Some(before.seen), &lease, instants());
        if let Some(entry) = self.entries_mut().get_mut(name)
            && matches!(entry.phase, Phase::Elsewhere(_))
        {
            entry.phase = Phase::Elsewhere(Box::new(Elsewhere { lease, seen }));
        }
    }

    /// What this host thinks of another's lease.
    pub(super) fn verdict(&self, elsewhere: &Elsewhere) -> Verdict {
        let judge = Judge { host: self.data.host(), volume: elsewhere.lease.volume };
        judge.judge(&elsewhere.lease, elsewhere.seen, instants())
    }

    /// Copies within an open volume. Reservations of NVMe/TCP hosts do not bind it.
    pub async fn copy(&self, name: &str, request: CopyRange) -> Result<(), VolumeError> {
        let entry = self.entry(name)?;
        let Phase::Open(place) = &entry.phase else {
            return Err(VolumeError::Conflict(format!(
                "volume {name:?} is {}; only within an open volume can be copied (`blockd volume open {name}`)",
                entry.phase.state().as_str()
            )));
        };
        let (reply, answer) = tokio::sync::oneshot::channel();
        let CopyRange { from, to, len, durable } = request;
        with_volume(place, move |volume| volume.copy_for(from, to, len, durable, reply)).await;
        match answer.await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(error @ (IoError::OutOfRange | IoError::Invalid(_)))) => {
                Err(VolumeError::Invalid(format!("cannot copy within volume {name:?}: {error}")))
            }
            Ok(Err(error)) => Err(VolumeError::Failed(format!("cannot copy within volume {name:?}: {error}"))),
            Err(_) => Err(VolumeError::Conflict(format!("volume {name:?} was closed before the copy was made"))),
        }
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
        let epoch = with_volume(place, |volume| volume.epoch()).await.unwrap_or(0);
        let keys = self.keys.held(manifest.id);
        volume::resize(self.store.as_ref(), name, epoch, size, keys.as_ref())
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
        self.changes.tell();
        tracing::info!(volume = %name, size = %ByteSize(size), "volume resized");
        self.show(name).await
    }

    /// Removes a volume from the store and all that is kept of it here.
    pub async fn delete(&self, name: &str, force: bool) -> Result<(), VolumeError> {
        self.refuse_while_closing()?;
        if !self.entries().contains_key(name) {
            self.load(name).await?;
            self.entries_mut().entry(name.to_owned()).or_insert(Entry::new(None, Phase::Closed));
        }
        self.close_views(name, None).await?;
        // From here on nobody finds it any more, so the number of clients can only fall.
        let before = {
            let mut entries = self.entries_mut();
            let entry = entries.get_mut(name).ok_or_else(|| VolumeError::Unknown(name.to_owned()))?;
            if let Phase::Opening | Phase::Deleting | Phase::Releasing(_) = entry.phase {
                return Err(busy(name, &entry.phase));
            }
            std::mem::replace(&mut entry.phase, Phase::Deleting)
        };
        let epoch = match self.may_delete(name, &before).await {
            Ok(epoch) => epoch,
            Err(error) => {
                self.set_phase(name, before);
                return Err(error);
            }
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
        } else if let Phase::Fenced(Fenced { place: Some(place), .. }) = before {
            place.reactor.close_device(place.key).await;
        }
        if let Some(hold) = self.entry(name)?.hold {
            hold.stop();
        }
        if let Err(error) = self.delete_closed(name, epoch).await {
            let lost = error.downcast_ref::<OpenError>().is_some_and(OpenError::is_not_ours);
            let why = if lost {
                format!("volume {name:?} was not deleted: {}", explain(&error))
            } else {
                let error = explain(&error);
                format!("deleting volume {name:?} failed half way: {error}; `blockd volume delete {name}` goes on")
            };
            self.set_phase(name, Phase::Failed(why.clone()));
            if lost {
                return Err(VolumeError::Conflict(why));
            }
            return Err(VolumeError::Failed(why));
        }
        self.entries_mut().remove(name);
        self.changes.tell();
        tracing::info!(volume = %name, "volume deleted");
        self.share_memory().await;
        Ok(())
    }

    /// Refuses what is another host's, and what would take stranded writes along. Takes the lease where it is nobody's.
    /// Returns the epoch under which the volume may be deleted: an owner that was cut off and does not know it yet has an
    /// old one.
    async fn may_delete(&self, name: &str, before: &Phase) -> Result<u64, VolumeError> {
        if let Phase::Open(place) = before {
            return Ok(with_volume(place, |volume| volume.epoch()).await.unwrap_or(0));
        }
        let (manifest, _) = self.load(name).await?;
        if let Some(stranded) = self.stranded_in_place(&manifest).await? {
            return Err(VolumeError::Conflict(format!("volume {name:?} is not deleted: {}", why_not(&stranded))));
        }
        let store = self.store.as_ref();
        let wanted = self.wanted_lease(&manifest);
        match lease::acquire(store, name, wanted, None, false, &instants).await {
            Ok(_) => Ok(last_epoch(&manifest)),
            Err(AcquireError::Held { lease, left_ms, .. }) => {
                let why = refusal(name, &lease, left_ms);
                Err(VolumeError::Conflict(format!("volume {name:?} is not deleted: {why}")))
            }
            Err(AcquireError::Lease(error)) => {
                Err(VolumeError::Failed(format!("cannot take volume {name:?} to delete it: {error}")))
            }
        }
    }

    /// The bucket first: should this be interrupted, what is left here is garbage, not a log without its volume.
    async fn delete_closed(&self, name: &str, epoch: u64) -> anyhow::Result<()> {
        let known = self.entries().get(name).and_then(|entry| entry.manifest.as_ref().map(|m| m.id));
        let id = match known {
            Some(id) => id,
            None => manifest::load(self.store.as_ref(), name).await?.0.id,
        };
        let (manifest, _) = manifest::load(self.store.as_ref(), name).await?;
        // Holds that nobody needs would keep all of it.
        let keys = self.keys.held(id);
        for snapshot in &manifest.snapshots {
            volume::release_stale(self.store.as_ref(), &manifest, snapshot, keys.as_ref()).await?;
        }
        match volume::delete(self.store.as_ref(), name, epoch, keys.as_ref(), |_, _| {}).await? {
            volume::Deleted::All => {}
            volume::Deleted::Held => {
                tracing::info!(volume = %name, "what its clones need stays in the bucket until the last of them is deleted");
            }
            volume::Deleted::OriginLocked => tracing::warn!(
                volume = %name,
                "the volume it is a clone of is locked and does not know that this one is gone; deleting its snapshot finds out"
            ),
        }
        if let Some(origin) = &manifest.origin {
            self.tell_snapshots(&origin.name).await;
        }
        self.keys.forget(id);
        let dir = self.data.volume(id);
        match tokio::fs::remove_dir_all(&dir).await {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(anyhow::Error::from(e).context(format!("remove {}", dir.display())))
            }
            _ => Ok(()),
        }
    }

    /// Closes every volume in order: each answers what it took on, flushes its log and ends it. What is only in the log
    /// stays with this host, and so does the lease, unless all is to be released.
    pub(super) async fn close_all(self: &Arc<Self>) {
        self.closing.store(true, Ordering::Release);
        let mut closings = JoinSet::new();
        let entries = self.entries().clone();
        for (name, entry) in entries {
            let (daemon, hold) = (self.clone(), entry.hold.clone());
            let place = match entry.phase {
                Phase::Open(place) | Phase::Releasing(place) => place,
                Phase::Fenced(Fenced { place: Some(place), .. }) => place,
                _ => continue,
            };
            closings.spawn(async move {
                if self_release(&daemon, &name, &place).await {
                    return;
                }
                let stats = with_volume(&place, |volume| volume.stats()).await;
                place.reactor.close_device(place.key).await;
                tracing::info!(volume = %name, "volume closed");
                if let Some(stats) = stats.as_ref().filter(|stats| stats.accepted_lsn > stats.destaged_lsn) {
                    tracing::warn!(
                        volume = %name,
                        "{} in writes {} to {} are only in this host's log, not in the bucket; this host keeps the \
                         volume. Start blockd here again before the volume is used elsewhere",
                        ByteSize(stats.dirty_bytes), stats.destaged_lsn + 1, stats.accepted_lsn
                    );
                }
                if let Some(hold) = hold {
                    hold.say_last(daemon.store.as_ref(), stats.as_ref()).await;
                }
            });
        }
        while closings.join_next().await.is_some() {}
        self.close_all_views().await;
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

fn last_epoch(manifest: &Manifest) -> u64 {
    manifest.epochs.last().map_or(0, |last| last.epoch)
}

/// What became of an attempt to open a volume.
enum Opened {
    Here {
        place: Place,
        report: Box<OpenReport>,
        notice: Option<String>,
    },
    /// It is not to be opened here; with a sentence for who asked for it.
    Not {
        phase: Phase,
        error: Option<String>,
    },
}

/// Releases a volume of a daemon that stops, if it is to.
async fn self_release(daemon: &Arc<Daemon>, name: &str, place: &Place) -> bool {
    if !daemon.config.release_on_stop || daemon.begin_release(name).is_err() {
        return false;
    }
    match daemon.drain_and_release(name, place.clone()).await {
        Ok(()) => true,
        Err(error) => {
            tracing::error!(volume = %name, "{error}");
            false
        }
    }
}

/// Why another host's volume is not opened.
fn refusal(name: &str, lease: &Lease, left_ms: u64) -> String {
    let until = lease.renewed_ms.saturating_add(lease.duration_ms);
    format!(
        "volume {name:?} is held by {} since {}; its lease runs until {} ({:.0?} from now) unless it is renewed. Release it \
         there (`blockd volume release {name}`), wait until the lease has run out, or take the volume with `blockd volume \
         open {name} --force`, which cuts that host off: {}",
        holder(lease),
        date(lease.since_ms),
        date(until),
        Duration::from_secs(left_ms.div_ceil(1000)),
        may_hold(lease, None, instants())
    )
}

/// Why a daemon that starts does not open it.
pub(super) fn expired(name: &str, lease: &Lease) -> String {
    format!(
        "volume {name:?} was held by {}, whose lease has run out at {}; take it with `blockd volume open {name}`. {}",
        holder(lease),
        date(lease.renewed_ms.saturating_add(lease.duration_ms)),
        may_hold(lease, None, instants())
    )
}

/// What this machine calls itself.
fn host_name() -> String {
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "unknown".to_owned() } else { name.to_owned() }
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

pub(super) fn busy(name: &str, phase: &Phase) -> VolumeError {
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

pub(super) fn unix_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
