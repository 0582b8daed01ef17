//! The cache itself, on top of foyer.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

use anyhow::Context;
use bytes::Bytes;
use foyer::{
    BlockEngineConfig, DeviceBuilder, FsDeviceBuilder, HybridCache, HybridCacheBuilder, PsyncIoEngineConfig,
    RecoverMode, Source,
};

use super::frame::{FrameKey, StoredFrame};

/// Memory for frames on their way to the cache's disk, besides the budget for frames.
const WRITE_BUFFER_BYTES: usize = 8 << 20;
/// Bookkeeping of one frame in memory, roughly.
const ENTRY_OVERHEAD: usize = 160;

/// A cache of frames; clones share it.
#[derive(Clone)]
pub struct FrameCache {
    shared: Arc<Shared>,
}

struct Shared {
    cache: HybridCache<FrameKey, StoredFrame>,
    counts: Counts,
}

#[derive(Default)]
struct Counts {
    memory_hits: AtomicU64,
    disk_hits: AtomicU64,
    misses: AtomicU64,
    rotten: AtomicU64,
}

/// Counters since start, and sizes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheStats {
    /// Lookups answered from memory.
    pub memory_hits: u64,
    /// Lookups answered from the cache's disk.
    pub disk_hits: u64,
    /// Lookups that found nothing.
    pub misses: u64,
    /// Frames found that did not match their checksum, and were dropped.
    pub rotten: u64,
    /// Frames held in memory, in bytes.
    pub memory_bytes: u64,
    /// Read from the cache's disk, in bytes.
    pub disk_read_bytes: u64,
    /// Written to the cache's disk, in bytes.
    pub disk_write_bytes: u64,
}

impl FrameCache {
    /// A cache of `memory_bytes` in memory and, with a directory, `disk_bytes` in it. What the directory holds from
    /// earlier is used again; files that are none of the cache's are left alone.
    pub async fn open(dir: Option<&Path>, memory_bytes: usize, disk_bytes: u64) -> anyhow::Result<FrameCache> {
        let builder = HybridCacheBuilder::new()
            .with_name("frames")
            .memory(memory_bytes)
            .with_weighter(|_: &FrameKey, frame: &StoredFrame| frame.0.len() + ENTRY_OVERHEAD)
            .storage();
        let cache = match dir {
            None => builder.build().await.context("open the frame cache")?,
            Some(dir) => {
                // Before foyer does: it panics where a directory cannot be made.
                std::fs::create_dir_all(dir)
                    .with_context(|| format!("create the cache directory {}", dir.display()))?;
                let device = FsDeviceBuilder::new(dir)
                    .with_capacity(disk_bytes.try_into().unwrap_or(usize::MAX))
                    // The page cache would keep everything twice, and its writeback would stall the log's flushes.
                    .with_direct(supports_direct(dir))
                    .build()
                    .with_context(|| format!("open the cache directory {}", dir.display()))?;
                builder
                    .with_engine_config(
                        BlockEngineConfig::new(device)
                            .with_buffer_pool_size(WRITE_BUFFER_BYTES)
                            .with_submit_queue_size_threshold(WRITE_BUFFER_BYTES),
                    )
                    .with_io_engine_config(PsyncIoEngineConfig::new())
                    .with_recover_mode(RecoverMode::Quiet)
                    .build()
                    .await
                    .with_context(|| format!("open the frame cache in {}", dir.display()))?
            }
        };
        Ok(FrameCache { shared: Arc::new(Shared { cache, counts: Counts::default() }) })
    }

    /// The stored bytes of a frame, if the cache has them. The caller must check them. A failing cache disk is a miss.
    pub async fn get(&self, key: &FrameKey) -> Option<Bytes> {
        let counts = &self.shared.counts;
        // Looking on the disk takes a task of its own, which most of what was never fetched can do without.
        if !self.shared.cache.contains(key) {
            counts.misses.fetch_add(1, Relaxed);
            return None;
        }
        match self.shared.cache.get(key).await {
            Ok(Some(entry)) => {
                match entry.source() {
                    Source::Memory => &counts.memory_hits,
                    _ => &counts.disk_hits,
                }
                .fetch_add(1, Relaxed);
                Some(entry.value().0.clone())
            }
            found => {
                if let Err(error) = found {
                    tracing::warn!(%error, "the frame cache's disk failed a read; asking the bucket instead");
                }
                counts.misses.fetch_add(1, Relaxed);
                None
            }
        }
    }

    /// Keeps a frame. `stored` should own no more memory than it shows.
    pub fn insert(&self, key: FrameKey, stored: Bytes) {
        self.shared.cache.insert(key, StoredFrame(stored));
    }

    /// Keeps a frame of many that came at once, for readers who have most of it by now: on the cache's disk, without
    /// displacing anything in memory. `stored` may be part of something larger, which is let go when it is written; with more on its
    /// way to the disk than that can take, it is not kept.
    pub fn insert_behind(&self, key: FrameKey, stored: Bytes) {
        if self.shared.cache.is_hybrid() {
            self.shared.cache.storage_writer(key).insert(StoredFrame(stored));
        } else {
            // A slice of a longer answer would keep all of that in memory.
            self.insert(key, Bytes::copy_from_slice(&stored));
        }
    }

    /// Drops a frame that turned out not to match its checksum.
    pub fn remove_rotten(&self, key: &FrameKey) {
        self.shared.counts.rotten.fetch_add(1, Relaxed);
        self.shared.cache.remove(key);
    }

    /// Counters and sizes.
    pub fn stats(&self) -> CacheStats {
        let (cache, counts) = (&self.shared.cache, &self.shared.counts);
        CacheStats {
            memory_hits: counts.memory_hits.load(Relaxed),
            disk_hits: counts.disk_hits.load(Relaxed),
            misses: counts.misses.load(Relaxed),
            rotten: counts.rotten.load(Relaxed),
            memory_bytes: cache.memory().usage() as u64,
            disk_read_bytes: cache.statistics().disk_read_bytes() as u64,
            disk_write_bytes: cache.statistics().disk_write_bytes() as u64,
        }
    }

    /// Writes what is in memory to the cache's disk, for the next start. Frames are safe without it.
    pub async fn close(&self) -> anyhow::Result<()> {
        self.shared.cache.close().await.context("close the frame cache")
    }
}

impl std::fmt::Debug for FrameCache {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "FrameCache({:?})", self.stats())
    }
}

/// Whether files in `dir` open with O_DIRECT (on tmpfs of older kernels they do not).
fn supports_direct(dir: &Path) -> bool {
    use std::os::unix::fs::OpenOptionsExt;
    let probe = dir.join(".direct-probe");
    let opened = std::fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .custom_flags(libc::O_DIRECT)
        .open(&probe)
        .is_ok();
    // Left behind it does no harm.
    let _ = std::fs::remove_file(&probe);
    opened
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::chunk::ChunkName;
    use crate::types::VolumeId;

    fn key(frame: u32) -> FrameKey {
        FrameKey { chunk: ChunkName { volume: VolumeId([1; 16]), epoch: 1, seq: 1 }, frame }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn frames_survive_a_restart_on_disk() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("cache");
        let cache = FrameCache::open(Some(&path), 1 << 20, 128 << 20).await.unwrap();
        for i in 0..100 {
            cache.insert(key(i), vec![i as u8; 32 << 10].into());
        }
        cache.close().await.unwrap();
        drop(cache);
        let cache = FrameCache::open(Some(&path), 1 << 20, 128 << 20).await.unwrap();
        let mut found = 0;
        for i in 0..100 {
            if let Some(bytes) = cache.get(&key(i)).await {
                assert_eq!(bytes, vec![i as u8; 32 << 10]);
                found += 1;
            }
        }
        assert!(found >= 50, "only {found} of 100 frames came back");
        assert_eq!(cache.stats().disk_hits, found);
        assert!(cache.stats().memory_bytes <= 1 << 20);
    }

    #[tokio::test]
    async fn works_in_memory_alone_and_within_its_budget() {
        let cache = FrameCache::open(None, 1 << 20, 0).await.unwrap();
        for i in 0..100 {
            cache.insert(key(i), vec![i as u8; 32 << 10].into());
        }
        assert!(cache.stats().memory_bytes <= 1 << 20);
        assert_eq!(cache.get(&key(99)).await.unwrap()[0], 99);
        cache.remove_rotten(&key(99));
        assert_eq!(cache.get(&key(99)).await, None);
        assert_eq!(cache.stats().rotten, 1);
    }

    #[tokio::test]
    async fn an_impossible_directory_is_an_error() {
        let error = FrameCache::open(Some(Path::new("/proc/nowhere")), 1 << 20, 1 << 26).await.unwrap_err();
        assert!(format!("{error:#}").contains("/proc/nowhere"), "{error:#}");
    }
}
