//! The table as its users see it.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};

use quick_cache::Weighter;
use quick_cache::sync::Cache;

use super::kv::{Batch, FrozenFiles, Kv};
use super::lookup::ChunkDirectory;
use super::memory::MemKv;
use super::pins::Pins;
use super::rocks::Rocks;
use super::space::{Chunks, Origin, Position, Space};
use super::spans::ZeroSpans;
use super::{Applied, TableError, key};
use crate::types::VolumeId;

/// The translation table of one volume. Reads may run while one chunk is applied; they see a leaf either before or
/// after it, so the dirty map must keep a chunk's blocks until `apply` has returned.
pub struct Table {
    pub(super) volume: VolumeId,
    pub(super) kv: Arc<dyn Kv>,
    /// Held while a batch is made and written: one chunk after the other.
    pub(super) applied: Mutex<Applied>,
    /// Changed together with the entries, so that [`Table::allocations`] sees both before or both after.
    pub(super) spans: RwLock<ZeroSpans>,
    /// Changed after the batch that says the same was written, while `applied` is held.
    pub(super) chunks: Mutex<Chunks>,
    pub(super) directories: Cache<u64, Arc<ChunkDirectory>, DirectoryWeight>,
    /// Looked at with `applied` held by who moves blocks.
    pub(super) pins: Arc<Pins>,
    /// Whether its format says that there are or were references.
    pub(super) refers: AtomicBool,
}

/// Sizes for status and metrics.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TableStats {
    /// Blocks, indexes, filters and unflushed writes in memory, in bytes.
    pub cache_bytes: u64,
    /// Frame directories in memory, in bytes.
    pub directory_bytes: u64,
    /// Files, in bytes.
    pub file_bytes: u64,
}

/// See [`Table::freeze`].
pub struct FrozenTable {
    /// The position it is a copy of.
    pub applied: Applied,
    /// The same as a position.
    pub position: Position,
    /// Its files.
    pub files: Box<dyn FrozenFiles>,
}

impl std::fmt::Debug for FrozenTable {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FrozenTable({:?})", self.position)
    }
}

#[derive(Clone)]
pub(super) struct DirectoryWeight;

impl Weighter<u64, Arc<ChunkDirectory>> for DirectoryWeight {
    fn weight(&self, _: &u64, directory: &Arc<ChunkDirectory>) -> u64 {
        directory.memory() as u64
    }
}

impl Table {
    /// Opens the table in the directory `path`, or makes a new one there. `memory_bytes` bounds everything it keeps
    /// in memory, a quarter of it for frame directories. The table of another volume or of a newer version is refused.
    pub fn open(path: &Path, memory_bytes: usize, volume: VolumeId) -> Result<Table, TableError> {
        let directory_bytes = memory_bytes / 4;
        let rocks = Rocks::open(path, memory_bytes - directory_bytes)
            .map_err(|source| TableError::Open { path: path.to_owned(), source })?;
        Self::over(Arc::new(rocks), directory_bytes, volume)
    }

    /// A table over simulated storage.
    pub fn in_memory(kv: Arc<MemKv>, volume: VolumeId) -> Result<Table, TableError> {
        Self::over(kv, 1 << 20, volume)
    }

    fn over(kv: Arc<dyn Kv>, directory_bytes: usize, volume: VolumeId) -> Result<Table, TableError> {
        let version = Self::claim(&*kv, volume)?;
        let failed = |source| TableError::Engine { op: "reading", source };
        let applied = match kv.get(&key::APPLIED).map_err(failed)? {
            None => Applied::default(),
            Some(value) => key::decode_applied(&value)
                .ok_or_else(|| TableError::Damaged("the applied position is malformed".into()))?,
        };
        let mut spans = ZeroSpans::default();
        let mut sound = true;
        kv.scan(&key::zeroes(0), &key::zeroes(u64::MAX), &mut |k, v| {
            sound = match (key::number(k), key::decode_zeroes(v)) {
                (Some(start), Some(end)) => spans.load(start..end),
                _ => false,
            };
            sound
        })
        .map_err(failed)?;
        if !sound {
            return Err(TableError::Damaged("a span of zeroes is malformed".into()));
        }
        let mut chunks = Self::load_chunks(&*kv)?;
        chunks.applied = applied.seq;
        // The item estimate only sizes the cache's own bookkeeping: directories of 16 MiB chunks are 6 to 12 KiB.
        let items = (directory_bytes / (8 << 10)).max(64);
        Ok(Table {
            volume,
            kv,
            applied: Mutex::new(applied),
            spans: RwLock::new(spans),
            chunks: Mutex::new(chunks),
            directories: Cache::with_weighter(items, directory_bytes as u64, DirectoryWeight),
            pins: Arc::default(),
            refers: AtomicBool::new(version >= key::REFER_VERSION),
        })
    }

    pub(super) fn load_chunks(kv: &dyn Kv) -> Result<Chunks, TableError> {
        let failed = |source| TableError::Engine { op: "reading", source };
        let damaged = |what: &str| TableError::Damaged(format!("{what} is malformed"));
        let pair = |key: &[u8], what: &str| match kv.get(key).map_err(failed)? {
            None => Ok((0, 0)),
            Some(value) => key::decode_pair(&value).ok_or_else(|| damaged(what)),
        };
        let (seq, relocated) = pair(&key::ORIGIN, "the origin")?;
        let (newest, swept_epoch) = pair(&key::RELOCATED, "the newest relocated chunk")?;
        let mut chunks = Chunks::default();
        (chunks.origin, chunks.newest, chunks.swept_epoch) = (Origin { seq, relocated }, newest, swept_epoch);
        if let Some(unknown) = kv.get(&key::UNKNOWN).map_err(failed)? {
            chunks.first_unknown =
                key::decode_pairs(&unknown).ok_or_else(|| damaged("the list of unknown relocated chunks"))?;
        }
        let mut sound = true;
        kv.scan(&key::usage(0), &key::usage(u64::MAX), &mut |k, v| {
            sound = match (key::number(k), key::decode_usage(v)) {
                (Some(id), Some(usage)) => {
                    chunks.set_used(id, Some(usage));
                    true
                }
                _ => false,
            };
            sound
        })
        .map_err(failed)?;
        if sound {
            kv.scan(&key::dead(0), &key::dead(u64::MAX), &mut |k, v| {
                sound = match (key::number(k), key::decode_dead(v)) {
                    (Some(id), Some(dead)) => {
                        chunks.set_dead(id, Some(dead));
                        true
                    }
                    _ => false,
                };
                sound
            })
            .map_err(failed)?;
        }
        if sound { Ok(chunks) } else { Err(damaged("the account of a chunk")) }
    }

    /// Checks that the entries are this volume's, or marks an empty store as such. Returns their version.
    fn claim(kv: &dyn Kv, volume: VolumeId) -> Result<u32, TableError> {
        let reading = |source| TableError::Engine { op: "reading its format", source };
        if let Some(value) = kv.get(&key::FORMAT).map_err(reading)? {
            let (version, found) = key::decode_format(&value).ok_or(TableError::NotATable)?;
            if version < key::VERSION {
                return Err(TableError::Older { found: version });
            }
            if version > key::REFER_VERSION {
                return Err(TableError::Newer { found: version });
            }
            if found != volume {
                return Err(TableError::Foreign { found, expected: volume });
            }
            return Ok(version);
        }
        let mut empty = true;
        kv.scan(&[], &[0xff; 16], &mut |_, _| {
            empty = false;
            false
        })
        .map_err(reading)?;
        if !empty {
            return Err(TableError::NotATable);
        }
        let mut batch = Batch::default();
        batch.put(&key::FORMAT, key::encode_format(volume, key::VERSION));
        kv.write(batch)
            .and_then(|()| kv.persist())
            .map_err(|source| TableError::Engine { op: "writing its format", source })?;
        Ok(key::VERSION)
    }

    /// The version that its format says.
    pub(super) fn version(&self) -> u32 {
        if self.refers.load(Ordering::Relaxed) { key::REFER_VERSION } else { key::VERSION }
    }

    /// How far the chunk sequence has been applied.
    pub fn applied(&self) -> Applied {
        *self.lock_applied()
    }

    /// Whether it says nothing yet. One that was never at any position and is not blank is what a rebuild that failed
    /// left.
    pub fn is_blank(&self) -> bool {
        let blank = *self.lock_applied() == Applied::default();
        let chunks = self.lock_chunks();
        blank && chunks.used.is_empty() && chunks.dead.is_empty()
    }

    /// Sums over the chunks it knows.
    pub fn space(&self) -> Space {
        self.lock_chunks().space()
    }

    /// Makes everything applied so far survive a crash. Blocks for a flush of up to a few MiB.
    pub fn persist(&self) -> Result<(), TableError> {
        self.kv.persist().map_err(|source| TableError::Engine { op: "flushing", source })
    }

    /// A copy of the table at the position it returns, as files that stay as they are until it is dropped. Applying waits
    /// for a moment: most of what must be written for it is written before.
    pub fn freeze(&self) -> Result<FrozenTable, TableError> {
        self.persist()?;
        let applied = self.lock_applied();
        // Nothing is brought in while the lock is held, chunks of the history or relocated ones.
        let position = Position { seq: applied.seq, relocated: self.newest_relocated() };
        let files = self.kv.freeze().map_err(TableError::Files)?;
        Ok(FrozenTable { applied: *applied, position, files })
    }

    /// About the bytes of lasting files in a copy made now that `known` (name, length) does not know.
    pub fn unknown_bytes(&self, known: &dyn Fn(&str, u64) -> bool) -> u64 {
        self.kv.unknown_bytes(known)
    }

    /// Sizes for status and metrics.
    pub fn stats(&self) -> TableStats {
        let (cache_bytes, file_bytes) = self.kv.usage();
        TableStats { cache_bytes, directory_bytes: self.directories.weight(), file_bytes }
    }

    pub(super) fn lock_applied(&self) -> MutexGuard<'_, Applied> {
        // The position is only stored after its batch was written, so a panic in between leaves it true.
        self.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lock_chunks(&self) -> MutexGuard<'_, Chunks> {
        // Changed entry by entry by code that does not panic.
        self.chunks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn read_spans(&self) -> RwLockReadGuard<'_, ZeroSpans> {
        // Replaced whole, never changed in place.
        self.spans.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for Table {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Table({}, {:?})", self.volume, self.applied())
    }
}
