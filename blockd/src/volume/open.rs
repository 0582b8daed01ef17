//! Opening a volume: ownership, the translation table, and the replay of the log over it.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::block_cache::BlockCache;
use super::catch_up::{CatchUp, Holes, Progress, TableFrom};
use super::compact::Compact;
use super::destage::Destage;
use super::dirty::{DirtyMap, Source};
use super::engine::{State, Tuning, Volume, WallClock};
use super::job::{Backend, Blocking, Closing, Jitter};
use super::own::{self, Claim};
use super::stats::VolumeStats;
use super::stranded::{Parting, Stranded};
use crate::cache::FrameCache;
use crate::checkpoint::{CheckpointError, Keeper};
use crate::chunk::{BlockReader, ReadError};
use crate::crypt::Keys;
use crate::lease::LeaseError;
use crate::manifest::{self, Manifest, ManifestError};
use crate::store::{ObjectStore, StoreError};
use crate::table::{MemKv, Table, TableError, TableHome};
use crate::types::Lsn;
use crate::wal::device::{FileLog, LogDevice};
use crate::wal::format::RecordKind;
use crate::wal::scan::{Recovered, ScanError, scan};
use crate::wal::writer::{LogOptions, LogWriter};

/// Why a volume cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// No such volume, or its manifest cannot be read or changed.
    #[error("volume {name}: {source}")]
    Manifest {
        /// Which volume.
        name: String,
        /// The cause.
        source: ManifestError,
    },
    /// Half deleted.
    #[error("volume {0} is being deleted; finish with `blockd volume delete {0}`")]
    Deleting(String),
    /// A clone whose making was given up, and landed all the same.
    #[error(
        "volume {name} is a clone that was not made to its end, and {origin} keeps nothing for it; delete it with `blockd \
         volume delete {name}`, and make it again"
    )]
    NotHeld {
        /// The clone.
        name: String,
        /// What it was made of.
        origin: String,
    },
    /// The lease cannot be read or changed.
    #[error(transparent)]
    Lease(#[from] LeaseError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// A chunk cannot be read.
    #[error(transparent)]
    Chunk(#[from] ReadError),
    /// A chunk the local table knows is not in the bucket.
    #[error(
        "{0} is missing from the bucket although this host stored it; restore the bucket before opening the volume"
    )]
    Missing(String),
    /// Neither the checkpoint nor the headers it stands for are to be had.
    #[error(
        "volume {name} cannot be opened: {checkpoint}, and {missing}, which could make up for it, is missing from the \
         bucket as well; restore one of them, or try `blockd volume rebuild {name}`, which goes by the chunks there are"
    )]
    CheckpointLost {
        /// Which volume.
        name: String,
        /// What is wrong with the checkpoint.
        checkpoint: String,
        /// The first chunk that is missing.
        missing: String,
    },
    /// A rebuild has not all it needs.
    #[error(
        "volume {name} cannot be rebuilt from its chunks: of its history, chunks {holes} are missing from the bucket; \
         restore them, or the checkpoint"
    )]
    Holes {
        /// Which volume.
        name: String,
        /// What is missing.
        holes: Holes,
    },
    /// The checkpoint.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The bucket lost a chunk.
    #[error(
        "{missing} is missing from the bucket, although {later}, stored after it, is there; restore it before opening the \
         volume"
    )]
    Hole {
        /// What is gone.
        missing: String,
        /// What proves that it was there.
        later: String,
    },
    /// The translation table.
    #[error(transparent)]
    Table(#[from] TableError),
    /// The log.
    #[error(transparent)]
    Log(#[from] ScanError),
    /// The log device.
    #[error("log device: {0}")]
    Device(#[from] io::Error),
    /// A restore that would leave writes behind.
    #[error("the log of volume {0} holds writes that are not in the bucket yet; open it, and try again when they are")]
    Undestaged(String),
    /// Another host wrote to the volume after this one, which still holds writes of its own.
    #[error(
        "another host took volume {name} over (epoch {theirs}), while this host's log still holds writes {first} to \
         {last} of epoch {ours} that never reached the bucket. They are kept in {log}: `blockd volume stranded export \
         {name} FILE` saves them, `blockd volume stranded discard {name}` sets them aside, so that the volume can be \
         opened at the bucket's state"
    )]
    Diverged {
        /// Which volume.
        name: String,
        /// The newer epoch.
        theirs: u64,
        /// The log's epoch.
        ours: u64,
        /// First LSN held.
        first: Lsn,
        /// Last LSN held.
        last: Lsn,
        /// Where.
        log: String,
    },
}

impl OpenError {
    /// Whether the same may succeed later without anybody doing anything: the bucket is away.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Manifest { source, .. } => source.is_transient(),
            Self::Lease(source) => source.is_transient(),
            Self::Store(error)
            | Self::Chunk(ReadError::Store(error))
            | Self::Checkpoint(CheckpointError::Store(error)) => error.is_transient(),
            _ => false,
        }
    }

    /// Whether another host has the volume.
    pub fn is_not_ours(&self) -> bool {
        matches!(self, Self::Manifest { source: ManifestError::NotOwner(_), .. })
    }

    pub(crate) fn manifest(name: &str, source: ManifestError) -> Self {
        match source {
            ManifestError::Deleting(name) => Self::Deleting(name),
            source => Self::Manifest { name: name.to_owned(), source },
        }
    }
}

/// What a volume is opened with.
pub struct OpenOptions {
    /// The bucket.
    pub store: Arc<dyn ObjectStore>,
    /// The volume's name.
    pub name: String,
    /// Directory for its log and table; made when absent.
    pub dir: PathBuf,
    /// Identity of this host.
    pub owner: [u8; 16],
    /// Last epoch of the volume before its lease was taken. Another one means that somebody else took the volume since.
    pub last_epoch: u64,
    /// Most bytes of log.
    pub log_bytes: u64,
    /// Bytes per log segment.
    pub segment_bytes: u64,
    /// Memory for the translation table, in bytes.
    pub table_memory_bytes: usize,
    /// The frame cache shared by all volumes.
    pub frame_cache: Option<FrameCache>,
    /// Limits.
    pub tuning: Tuning,
    /// Its keys, if it is encrypted.
    pub keys: Option<Keys>,
    /// Make the translation table of the chunk headers alone, whatever table and checkpoint there are.
    pub rebuild: bool,
    /// Hears how far it is.
    pub progress: Arc<Progress>,
}

/// What opening found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenReport {
    /// The manifest.
    pub manifest: Manifest,
    /// Where the translation table came from.
    pub table: TableFrom,
    /// When the newest write of the state served was logged or destaged, Unix time in milliseconds; 0 where nothing says.
    pub written_ms: u64,
    /// Chunk headers read to bring the table up to date.
    pub chunks_applied: u64,
    /// Last LSN in the bucket.
    pub bucket_lsn: Lsn,
    /// Last LSN of the state served.
    pub last_lsn: Lsn,
    /// Records replayed from the log.
    pub replayed: u64,
    /// Whether the log ended in frames that were never durable and were dropped.
    pub torn_tail: bool,
}

/// The parts of a volume that differ between a daemon and a simulation.
pub struct Parts {
    /// The bucket.
    pub store: Arc<dyn ObjectStore>,
    /// The log.
    pub device: Arc<dyn LogDevice>,
    /// Where the translation table lives.
    pub home: TableHome,
    /// Last epoch of the volume before its lease was taken. Another one means that somebody else took the volume since.
    /// Without one, whoever has it is replaced.
    pub last_epoch: Option<u64>,
    /// Make it of the chunk headers alone, whatever table and checkpoint there are.
    pub rebuild: bool,
    /// Hears how far opening is.
    pub progress: Arc<Progress>,
    /// The frame cache, if any.
    pub frame_cache: Option<FrameCache>,
    /// Where heavy work runs.
    pub blocking: Blocking,
    /// Stamps frames and chunks.
    pub wall: WallClock,
    /// Spreads retries.
    pub jitter: Jitter,
    /// Segments the log may have.
    pub segments_max: u32,
    /// Limits.
    pub tuning: Tuning,
    /// Its keys, if it is encrypted.
    pub keys: Option<Keys>,
}

impl Parts {
    /// For a volume that does the same whenever it is opened so, as simulations need: a table in memory, heavy work done where it
    /// is asked for, a clock that stands, and nothing drawn at random. Not encrypted, without a frame cache, and whoever has it is replaced.
    pub fn repeatable(store: Arc<dyn ObjectStore>, device: Arc<dyn LogDevice>, tuning: Tuning) -> Self {
        Self {
            store,
            device,
            home: TableHome::Memory(MemKv::new()),
            last_epoch: None,
            rebuild: false,
            progress: Arc::default(),
            frame_cache: None,
            blocking: Blocking::Inline,
            wall: Arc::new(|| 0),
            jitter: Arc::new(|| 0.5),
            segments_max: 8,
            tuning,
            keys: None,
        }
    }
}

impl Volume {
    /// Opens a volume for writing in this process: claims the next epoch, brings the table up to the bucket's state
    /// and replays the log over it.
    pub async fn open(options: OpenOptions) -> Result<(Volume, OpenReport), OpenError> {
        let (dir, segment_bytes) = (options.dir.clone(), options.segment_bytes);
        let (manifest, _) = manifest::open(options.store.as_ref(), &options.name, options.keys.as_ref())
            .await
            .map_err(|e| OpenError::manifest(&options.name, e))?;
        let device = tokio::task::spawn_blocking(move || FileLog::open(&dir.join("wal"), segment_bytes));
        let device = Arc::new(device.await.map_err(io::Error::other)??);
        let parts = Parts {
            store: options.store,
            device,
            home: TableHome::Dir { dir: options.dir, memory_bytes: options.table_memory_bytes },
            last_epoch: Some(options.last_epoch),
            rebuild: options.rebuild,
            progress: options.progress,
            frame_cache: options.frame_cache,
            blocking: Blocking::Threads,
            wall: Arc::new(own::wall_ms),
            jitter: Arc::new(rand::random),
            segments_max: (options.log_bytes / options.segment_bytes).clamp(4, 200) as u32,
            tuning: options.tuning,
            keys: options.keys,
        };
        Self::open_parts(parts, manifest, options.owner).await
    }

    /// As [`Volume::open`], with every dependency given. `manifest` was read just now.
    pub async fn open_parts(
        parts: Parts,
        manifest: Manifest,
        owner: [u8; 16],
    ) -> Result<(Volume, OpenReport), OpenError> {
        let (store, home, progress) = (parts.store.clone(), parts.home.clone(), parts.progress.clone());
        let keys = parts.keys.clone();
        let catch_up = CatchUp {
            store: store.as_ref(),
            home: &home,
            blocking: parts.blocking,
            owner,
            rebuild: parts.rebuild,
            progress: &progress,
            keys: keys.as_ref(),
        };
        refuse_unheld(store.as_ref(), &manifest).await?;
        let (local, known) = catch_up.begin(&manifest).await?;
        let claimant = own::Claimant { owner, expected: parts.last_epoch, now_ms: (parts.wall)() };
        let mut claim = own::claim(store.as_ref(), &manifest.name, claimant, known, keys.as_ref()).await?;
        let caught_up = catch_up.finish(local, &mut claim).await?;
        let Claim { manifest, state, .. } = claim;
        let id = manifest.id;
        let (device, lineage) = (parts.device.clone(), manifest.clone());
        let destaged = state.lsn;
        let recover = move || read_log(device.as_ref(), &lineage, owner, destaged);
        let mut recovered = match parts.blocking {
            Blocking::Inline => recover(),
            Blocking::Threads => tokio::task::spawn_blocking(recover).await.map_err(io::Error::other)?,
        }?;
        let epoch = manifest.epochs.last().map_or(1, |e| e.epoch);
        let mut segments = parts.device.segments().last().map_or(0, |n| n + 1);
        if recovered.free.is_empty() {
            parts.device.create(segments)?;
            recovered.free.push(segments);
            segments += 1;
        }
        let replayed_ms = recovered.frames.iter().rev().find(|f| !f.header.records.is_empty());
        let report = OpenReport {
            table: caught_up.from,
            written_ms: replayed_ms.map_or(state.written_ms, |f| f.header.time_ms),
            chunks_applied: caught_up.headers_read,
            bucket_lsn: state.lsn,
            last_lsn: recovered.last_lsn,
            replayed: recovered.frames.iter().map(|f| f.header.records.len() as u64).sum(),
            torn_tail: recovered.torn.is_some(),
            manifest: manifest.clone(),
        };
        // One that proved useless is made anew soon, of no file of the old one; nothing is deleted on the strength of it.
        let pointer = manifest.checkpoint.filter(|_| caught_up.checkpoint_sound);
        let keeper = Keeper::new(&manifest.name, id, epoch, pointer, caught_up.restored, parts.keys.clone());
        let mut volume = Self::assemble(parts, caught_up.table, keeper, manifest, state, epoch, recovered, segments)?;
        let position = volume.backend.table.position();
        volume.checkpoints.begin(pointer, state, position, volume.chunk_bytes);
        if let Some(pointer) = &pointer {
            volume.checkpoint_durable(pointer.into());
        }
        volume.stats.opened_lsn = report.last_lsn;
        volume.stats.opened_written_ms = report.written_ms;
        volume.stats.opened_ms = (volume.wall)();
        Ok((volume, report))
    }

    #[allow(clippy::too_many_arguments)] // everything a volume is made of
    fn assemble(
        parts: Parts,
        table: Table,
        keeper: Keeper,
        manifest: Manifest,
        state: own::BucketState,
        epoch: u64,
        recovered: Recovered,
        segments: u32,
    ) -> Result<Volume, OpenError> {
        let mut dirty = DirtyMap::default();
        let mut pins = VecDeque::new();
        for (number, frame) in (1..).zip(&recovered.frames) {
            for (lsn, record) in (frame.header.first_lsn..).zip(&frame.header.records) {
                let source = match record.kind {
                    RecordKind::Data { at } => Source::Log { frame: number, block: at },
                    RecordKind::Zero { allocated } => Source::Zero { allocated },
                    // The table knows it.
                    RecordKind::Refer { .. } if lsn <= state.lsn => continue,
                    RecordKind::Refer { seq, index } => {
                        // Nothing is moved or deleted yet, and nothing will be before the table knows of this.
                        if !table.knows(seq) {
                            return Err(TableError::Unlisted { id: seq }.into());
                        }
                        pins.push_back((lsn, table.pin(seq)));
                        Source::Refer { seq, index }
                    }
                };
                dirty.insert(record.lba, record.blocks, lsn, source);
            }
        }
        // What was read back counts as durable from here on, so it is made so first; then the anchor that says where
        // the old segments end, before anything new is written.
        for needed in &recovered.needed {
            parts.device.sync(needed.segment)?;
        }
        let options = LogOptions {
            volume: manifest.id,
            epoch,
            segment_bytes: parts.device.segment_bytes(),
            segments_max: parts.segments_max.max(segments),
        };
        let (log, anchor) = LogWriter::open(options, recovered, segments);
        parts.device.write(log.current_segment(), 0, &anchor)?;
        parts.device.sync(log.current_segment())?;
        let table = Arc::new(table);
        let copier =
            BlockReader::new(manifest.id, table.clone(), parts.store.clone(), None).with_keys(parts.keys.clone());
        let compact = Compact::new(&table, manifest.ended())?;
        let reader = BlockReader::new(manifest.id, table.clone(), parts.store.clone(), parts.frame_cache)
            .with_keys(parts.keys.clone())
            .with_deadline(parts.tuning.read_patience);
        let mut volume = Volume {
            id: manifest.id,
            size: manifest.size,
            durability: manifest.durability,
            codec: manifest.codec,
            chunk_bytes: u64::from(manifest.chunk_bytes),
            epoch,
            first_seq: state.seq + 1,
            compact,
            tuning: parts.tuning,
            wall: parts.wall,
            now_us: 0,
            log,
            dirty,
            cache: BlockCache::new(parts.tuning.block_cache_bytes),
            backend: Backend {
                name: manifest.name.as_str().into(),
                epoch,
                store: parts.store,
                table,
                keeper: Arc::new(tokio::sync::Mutex::new(keeper)),
                reader: Arc::new(reader),
                copier: Arc::new(copier),
                device: parts.device,
                blocking: parts.blocking,
                closing: Arc::new(Closing::default()),
                trouble: Arc::new(Mutex::new(None)),
                jitter: parts.jitter,
                keys: parts.keys,
            },
            name: manifest.name,
            effects: Default::default(),
            log_ios: Vec::new(),
            acks: Default::default(),
            flushes: Default::default(),
            tickets: HashMap::new(),
            waiting: Default::default(),
            reads: HashMap::new(),
            copies: HashMap::new(),
            replies: HashMap::new(),
            pins,
            readahead: Default::default(),
            next_id: 0,
            destage: Destage::new(state.seq, state.lsn),
            pacer: Default::default(),
            paced_until: None,
            purged_lsn: state.lsn,
            creating_segment: false,
            no_segment: None,
            last_append_us: 0,
            jobs: 0,
            failed: None,
            state: State::Open,
            gate: Default::default(),
            eager: Default::default(),
            stats: VolumeStats::default(),
            rate: Default::default(),
            checkpoints: Default::default(),
            snapshots: super::snapshot::Snapshots::new(manifest.snapshots),
        };
        volume.compact.hold(volume.snapshots.positions());
        volume.frames_written();
        Ok(volume)
    }
}

/// Refuses a clone that nobody opened yet and that its origin does not hold for: what it refers to may be gone. A hold that was
/// there when a clone was first opened stays until that is deleted.
async fn refuse_unheld(store: &dyn ObjectStore, manifest: &Manifest) -> Result<(), OpenError> {
    let opened = |manifest: &Manifest| manifest.settled().is_some_and(|last| last.owner != [0; 16]);
    match &manifest.origin {
        Some(origin) if !opened(manifest) && !super::is_held(store, origin, manifest.id).await? => {
            Err(OpenError::NotHeld { name: manifest.name.clone(), origin: origin.name.clone() })
        }
        _ => Ok(()),
    }
}

/// Reads the log as what goes on from write `destaged`, where the bucket's state ends, if it is that.
///
/// # Errors
/// [`OpenError::Diverged`]: it holds writes that the history went on without.
pub(super) fn read_log(
    device: &dyn LogDevice,
    manifest: &Manifest,
    owner: [u8; 16],
    destaged: Lsn,
) -> Result<Recovered, OpenError> {
    refuse_stranded(device, manifest, owner)?;
    Ok(match Parting::find(device, manifest, owner)? {
        None => scan(device, manifest.id, destaged)?,
        // What a power cut left of the log may begin behind where the history went on, at a number that the bucket has come to
        // since. It holds other writes, and never counts.
        Some(parting) => scan(device, manifest.id, parting.bucket_lsn)?.emptied(destaged),
    })
}

/// Refuses to replay writes that the history went on without.
fn refuse_stranded(device: &dyn LogDevice, manifest: &Manifest, owner: [u8; 16]) -> Result<(), OpenError> {
    let Some(stranded) = Stranded::find(device, manifest, owner)? else { return Ok(()) };
    let (first, last) = stranded.lsns();
    Err(OpenError::Diverged {
        name: manifest.name.clone(),
        theirs: stranded.taken_epoch,
        ours: stranded.epoch,
        first,
        last,
        log: device.segments().first().map_or_else(String::new, |segment| device.describe(*segment)),
    })
}
