//! The table's RocksDB: options that bound its memory, threads and files.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use rocksdb::checkpoint::Checkpoint;
use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DBCompressionType,
    FlushOptions, LogLevel, Options, ReadOptions, WriteBatch, WriteBufferManager, WriteOptions,
};

use super::key::NumberKey;
use super::kv::{Batch, Change, FrozenFile, FrozenFiles, Kv, Result};

const FAMILY: &str = "default";

/// A RocksDB without its write-ahead log: the chunks in the bucket are the log.
pub(super) struct Rocks {
    db: rocksdb::DB,
    cache: Cache,
    write: WriteOptions,
    /// Where frozen copies go, and how many there were.
    copies: PathBuf,
    copied: AtomicU64,
}

impl Rocks {
    /// Opens or creates the database. `memory_bytes` bounds blocks, indexes, filters and unflushed writes together.
    pub(super) fn open(path: &Path, memory_bytes: usize) -> Result<Self> {
        let cache = Cache::new_lru_cache(memory_bytes);
        let db = rocksdb::DB::open_cf_descriptors(
            &options(&cache, memory_bytes),
            path,
            [ColumnFamilyDescriptor::new(FAMILY, options(&cache, memory_bytes))],
        )?;
        let mut write = WriteOptions::default();
        write.disable_wal(true);
        Ok(Self { db, cache, write, copies: path.with_extension("checkpoint"), copied: AtomicU64::new(0) })
    }

    fn family(&self) -> &ColumnFamily {
        // Opened by this very name.
        self.db.cf_handle(FAMILY).expect("the family was opened")
    }
}

fn options(cache: &Cache, memory_bytes: usize) -> Options {
    let mut table = BlockBasedOptions::default();
    table.set_block_cache(cache);
    table.set_block_size(4 << 10);
    table.set_format_version(6);
    // Everything a lookup needs besides the data goes through the cache and counts; partitions keep one big index
    // from pushing out everything else.
    table.set_cache_index_and_filter_blocks(true);
    table.set_index_type(BlockBasedIndexType::TwoLevelIndexSearch);
    table.set_partition_filters(true);
    table.set_metadata_block_size(4 << 10);
    table.set_pin_top_level_index_and_filter(true);
    // Holes are common and end here without touching a data block.
    table.set_ribbon_filter(10.0);

    let mut options = Options::default();
    options.create_if_missing(true);
    options.set_block_based_table_factory(&table);
    options.set_compression_type(DBCompressionType::Lz4);

    // Writes come as batches of a few hundred KiB per chunk. Two buffers: one fills while one is flushed.
    let buffer = (memory_bytes / 8).clamp(1 << 20, 16 << 20);
    options.set_write_buffer_size(buffer);
    options.set_max_write_buffer_number(2);
    options.set_write_buffer_manager(&WriteBufferManager::new_write_buffer_manager_with_cache(
        2 * buffer,
        false,
        cache.clone(),
    ));
    options.set_target_file_size_base(32 << 20);
    options.set_max_bytes_for_level_base(128 << 20);
    options.set_level_compaction_dynamic_level_bytes(true);

    options.set_max_background_jobs(2);
    options.set_max_open_files(256);
    options.set_max_file_opening_threads(1);
    options.set_log_level(LogLevel::Warn);
    options.set_max_log_file_size(1 << 20);
    options.set_keep_log_file_num(2);
    // Part of every checkpoint.
    options.set_max_manifest_file_size(1 << 20);
    options.set_stats_dump_period_sec(0);
    options.set_stats_persist_period_sec(0);
    options
}

impl Kv for Rocks {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        self.db.get(key)
    }

    fn get_many(&self, keys: &[NumberKey]) -> Result<Vec<Option<Vec<u8>>>> {
        self.db
            .batched_multi_get_cf(self.family(), keys.iter().map(|key| &key[..]), true)
            .into_iter()
            .map(|value| Ok(value?.map(|value| value.to_vec())))
            .collect()
    }

    fn write(&self, batch: Batch) -> Result<()> {
        let mut raw = WriteBatch::default();
        for change in &batch.changes {
            match change {
                Change::Put(key, value) => raw.put(key, value),
                Change::Delete(key) => raw.delete(key),
                Change::DeleteRange(from, to) => raw.delete_range(from, to),
            }
        }
        self.db.write_opt(raw, &self.write)
    }

    fn persist(&self) -> Result<()> {
        let mut options = FlushOptions::default();
        options.set_wait(true);
        self.db.flush_opt(&options)
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<()> {
        if from >= to {
            return Ok(());
        }
        let mut options = ReadOptions::default();
        options.set_iterate_upper_bound(to);
        let mut rows = self.db.raw_iterator_opt(options);
        rows.seek(from);
        while let Some((key, value)) = rows.item() {
            if !visit(key, value) {
                return Ok(());
            }
            rows.next();
        }
        rows.status()
    }

    fn usage(&self) -> (u64, u64) {
        let files = self.db.property_int_value("rocksdb.total-sst-files-size").ok().flatten().unwrap_or(0);
        (self.cache.get_usage() as u64, files)
    }

    fn freeze(&self) -> io::Result<Box<dyn FrozenFiles>> {
        // A place of its own for each: somebody may still be reading the last one.
        std::fs::create_dir_all(&self.copies)?;
        let number = self.copied.fetch_add(1, Relaxed);
        let copy = Copy { dir: self.copies.join(number.to_string()) };
        remove_dir(&copy.dir)?;
        Checkpoint::new(&self.db).and_then(|c| c.create_checkpoint(&copy.dir)).map_err(io::Error::other)?;
        Ok(Box::new(copy))
    }

    fn unknown_bytes(&self, known: &dyn Fn(&str, u64) -> bool) -> u64 {
        let files = self.db.live_files().unwrap_or_default();
        let unknown = files.iter().filter(|file| !known(file.name.trim_start_matches('/'), file.size as u64));
        // What is not in files yet shrinks by about half when it gets there: keys repeat, and it is compressed.
        let unwritten = self.db.property_int_value("rocksdb.cur-size-all-mem-tables").ok().flatten().unwrap_or(0);
        unknown.map(|file| file.size as u64).sum::<u64>() + unwritten / 2
    }
}

/// The files of a RocksDB checkpoint, most of them links to the database's own. Removed when dropped.
struct Copy {
    dir: PathBuf,
}

impl FrozenFiles for Copy {
    fn files(&self) -> Vec<FrozenFile> {
        let mut files: Vec<FrozenFile> = std::fs::read_dir(&self.dir)
            .into_iter()
            .flatten()
            .filter_map(|entry| {
                let entry = entry.ok()?;
                let name = entry.file_name().into_string().ok()?;
                // Numbers of files only grow within a database, and a table file is never changed.
                Some(FrozenFile { size: entry.metadata().ok()?.len(), lasting: name.ends_with(".sst"), name })
            })
            .collect();
        files.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        files
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        std::fs::read(self.dir.join(name))
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        // What stays is removed at the next opening.
        let _ = remove_dir(&self.dir);
    }
}

/// Removes a directory that need not be there.
pub(super) fn remove_dir(dir: &Path) -> io::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}
