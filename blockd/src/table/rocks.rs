//! The table's RocksDB: options that bound its memory, threads and files.

use std::path::Path;

use rocksdb::{
    BlockBasedIndexType, BlockBasedOptions, Cache, ColumnFamily, ColumnFamilyDescriptor, DBCompressionType,
    FlushOptions, LogLevel, Options, ReadOptions, WriteBatch, WriteBufferManager, WriteOptions,
};

use super::key::NumberKey;
use super::kv::{Batch, Change, Kv, Result};

const FAMILY: &str = "default";

/// A RocksDB without its write-ahead log: the chunks in the bucket are the log.
pub(super) struct Rocks {
    db: rocksdb::DB,
    cache: Cache,
    write: WriteOptions,
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
        Ok(Self { db, cache, write })
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
    options.set_max_manifest_file_size(16 << 20);
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
}
