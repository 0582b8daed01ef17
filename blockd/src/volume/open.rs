//! Opening a volume: ownership, the translation table, and the replay of the log over it.

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use super::block_cache::BlockCache;
use super::compact::Compact;
use super::destage::Destage;
use super::dirty::{DirtyMap, Source};
use super::engine::{State, Tuning, Volume, WallClock};
use super::job::{Backend, Blocking, Closing, Jitter};
use super::own::{self, Claim};
use super::stats::VolumeStats;
use crate::cache::FrameCache;
use crate::chunk::{BlockReader, ChunkName, ReadError};
use crate::manifest::{Manifest, ManifestError};
use crate::store::{ObjectStore, StoreError};
use crate::table::{Table, TableError};
use crate::types::{Lsn, VolumeId};
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
    /// Another host wrote to the volume after this one, which still holds writes of its own.
    #[error(
        "another host took volume {name} over (epoch {theirs}), while this host's log still holds writes {first} to \
         {last} of epoch {ours} that never reached the bucket. They are kept in {log}; move that directory away to give \
         them up and open the volume at the bucket's state"
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
            Self::Store(error) | Self::Chunk(ReadError::Store(error)) => error.is_transient(),
            _ => false,
        }
    }

    pub(super) fn manifest(name: &str, source: ManifestError) -> Self {
        Self::Manifest { name: name.to_owned(), source }
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
}

/// What opening found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenReport {
    /// The manifest.
    pub manifest: Manifest,
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
    /// The translation table.
    pub table: Arc<Table>,
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
}

impl Volume {
    /// Opens a volume for writing in this process: claims the next epoch, brings the table up to the bucket's state
    /// and replays the log over it.
    pub async fn open(options: OpenOptions) -> Result<(Volume, OpenReport), OpenError> {
        let (manifest, _) = crate::manifest::load(options.store.as_ref(), &options.name)
            .await
            .map_err(|e| OpenError::manifest(&options.name, e))?;
        let id = manifest.id;
        let (dir, segment_bytes, memory) = (options.dir.clone(), options.segment_bytes, options.table_memory_bytes);
        let (device, table) = tokio::task::spawn_blocking(move || -> Result<_, OpenError> {
            let device = FileLog::open(&dir.join("wal"), segment_bytes)?;
            let table = open_table(&dir, memory, id)?;
            Ok((Arc::new(device), Arc::new(table)))
        })
        .await
        .map_err(io::Error::other)??;
        let parts = Parts {
            store: options.store,
            device,
            table,
            frame_cache: options.frame_cache,
            blocking: Blocking::Threads,
            wall: Arc::new(own::wall_ms),
            jitter: Arc::new(rand::random),
            segments_max: (options.log_bytes / options.segment_bytes).clamp(4, 200) as u32,
            tuning: options.tuning,
        };
        Self::open_parts(parts, &options.name, options.owner).await
    }

    /// As [`Volume::open`], with every dependency given.
    pub async fn open_parts(parts: Parts, name: &str, owner: [u8; 16]) -> Result<(Volume, OpenReport), OpenError> {
        let applied = parts.table.applied();
        let Claim { manifest, state, previous } =
            own::claim(parts.store.as_ref(), name, owner, applied.seq, (parts.wall)()).await?;
        let id = manifest.id;
        for seq in applied.seq + 1..=state.seq {
            let epoch = epoch_of(&manifest, seq);
            let chunk = ChunkName { volume: id, epoch, seq };
            let index =
                own::data_chunk(parts.store.as_ref(), chunk).await?.ok_or_else(|| OpenError::Missing(chunk.key()))?;
            parts.table.apply(&index)?;
        }
        let device = parts.device.clone();
        let destaged = state.lsn;
        let mut recovered = match parts.blocking {
            Blocking::Inline => scan(device.as_ref(), id, destaged),
            Blocking::Threads => tokio::task::spawn_blocking(move || scan(device.as_ref(), id, destaged))
                .await
                .map_err(io::Error::other)?,
        }?;
        check_lineage(&manifest, previous.as_ref().map_or(0, |e| e.epoch), &recovered, owner, &*parts.device)?;
        let epoch = manifest.epochs.last().map_or(1, |e| e.epoch);
        let mut segments = parts.device.segments().last().map_or(0, |n| n + 1);
        if recovered.free.is_empty() {
            parts.device.create(segments)?;
            recovered.free.push(segments);
            segments += 1;
        }
        let report = OpenReport {
            chunks_applied: state.seq.saturating_sub(applied.seq),
            bucket_lsn: state.lsn,
            last_lsn: recovered.last_lsn,
            replayed: recovered.frames.iter().map(|f| f.header.records.len() as u64).sum(),
            torn_tail: recovered.torn.is_some(),
            manifest: manifest.clone(),
        };
        let volume = Self::assemble(parts, manifest, state, epoch, recovered, segments)?;
        Ok((volume, report))
    }

    fn assemble(
        parts: Parts,
        manifest: Manifest,
        state: own::BucketState,
        epoch: u64,
        recovered: Recovered,
        segments: u32,
    ) -> Result<Volume, OpenError> {
        let mut dirty = DirtyMap::default();
        for (number, frame) in (1..).zip(&recovered.frames) {
            for (lsn, record) in (frame.header.first_lsn..).zip(&frame.header.records) {
                let source = match record.kind {
                    RecordKind::Data { at } => Source::Log { frame: number, block: at },
                    RecordKind::Zero { allocated } => Source::Zero { allocated },
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
        let copier = BlockReader::new(manifest.id, parts.table.clone(), parts.store.clone(), None);
        let earlier = manifest.epochs.iter().map(|e| e.epoch).filter(|e| *e < epoch);
        let compact = Compact::new(&parts.table, earlier);
        let reader = BlockReader::new(manifest.id, parts.table.clone(), parts.store.clone(), parts.frame_cache);
        let mut volume = Volume {
            id: manifest.id,
            size: manifest.size,
            durability: manifest.durability,
            codec: manifest.codec,
            chunk_bytes: u64::from(manifest.chunk_bytes),
            name: manifest.name,
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
                store: parts.store,
                table: parts.table,
                reader: Arc::new(reader),
                copier: Arc::new(copier),
                device: parts.device,
                blocking: parts.blocking,
                closing: Arc::new(Closing::default()),
                trouble: Arc::new(Mutex::new(None)),
                jitter: parts.jitter,
            },
            effects: Default::default(),
            log_ios: Vec::new(),
            acks: Default::default(),
            flushes: Default::default(),
            tickets: HashMap::new(),
            waiting: Default::default(),
            reads: HashMap::new(),
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
            eager: Default::default(),
            stats: VolumeStats::default(),
            rate: Default::default(),
        };
        volume.frames_written();
        Ok(volume)
    }
}

/// Opens the table; one that cannot be used is set aside, because the chunks say everything it said.
fn open_table(dir: &std::path::Path, memory: usize, id: VolumeId) -> Result<Table, OpenError> {
    let path = dir.join("table");
    match Table::open(&path, memory, id) {
        Ok(table) => Ok(table),
        Err(e @ TableError::Newer { .. }) => Err(e.into()),
        Err(e) => {
            tracing::warn!("translation table {} is unusable and will be rebuilt from the bucket: {e}", path.display());
            let aside = dir.join("table.unusable");
            let _ = std::fs::remove_dir_all(&aside);
            std::fs::rename(&path, &aside)?;
            Ok(Table::open(&path, memory, id)?)
        }
    }
}

fn epoch_of(manifest: &Manifest, seq: u64) -> u64 {
    manifest.epochs.iter().rev().find(|e| e.first_seq > 0 && e.first_seq <= seq).map_or(0, |e| e.epoch)
}

/// Refuses to replay writes of an epoch that another host has ended since.
fn check_lineage(
    manifest: &Manifest,
    last_epoch: u64,
    recovered: &Recovered,
    owner: [u8; 16],
    device: &dyn LogDevice,
) -> Result<(), OpenError> {
    let stranger =
        manifest.epochs.iter().find(|e| e.epoch > recovered.epoch && e.epoch <= last_epoch && e.owner != owner);
    let (Some(stranger), Some(first), Some(last)) = (stranger, recovered.frames.first(), recovered.frames.last())
    else {
        return Ok(());
    };
    Err(OpenError::Diverged {
        name: manifest.name.clone(),
        theirs: stranger.epoch,
        ours: recovered.epoch,
        first: first.header.first_lsn,
        last: last.header.last_lsn(),
        log: device.describe(first.segment),
    })
}
