//! What a volume says of itself.

use serde::{Deserialize, Serialize};

/// A snapshot of a volume's counters and gauges. Counters start at zero when the volume is opened.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct VolumeStats {
    /// Newest accepted LSN.
    pub accepted_lsn: u64,
    /// Newest LSN on the log device's medium.
    pub durable_lsn: u64,
    /// Newest LSN in the bucket, as part of a contiguous prefix.
    pub destaged_lsn: u64,
    /// Written bytes (payload) accepted and not yet in the bucket.
    pub dirty_bytes: u64,
    /// Age in seconds of the oldest accepted write that is not yet in the bucket; 0 when all is.
    pub behind_seconds: f64,
    /// Bytes of log segments in use.
    pub log_used_bytes: u64,
    /// Most bytes of log the volume may use.
    pub log_capacity_bytes: u64,
    /// Seconds until the log is full at the present rates; none while it is not filling.
    pub log_full_in_seconds: Option<f64>,
    /// Read requests.
    pub reads: u64,
    /// Write requests.
    pub writes: u64,
    /// Flush requests.
    pub flushes: u64,
    /// Trim and zero requests.
    pub trims: u64,
    /// Copy requests.
    #[serde(default)]
    pub copies: u64,
    /// Bytes of them.
    #[serde(default)]
    pub copied_bytes: u64,
    /// Blocks of copies that refer to what was there, instead of being written.
    #[serde(default)]
    pub referred_blocks: u64,
    /// Bytes read by clients.
    pub read_bytes: u64,
    /// Bytes written by clients.
    pub write_bytes: u64,
    /// Blocks read that were answered from memory (dirty map or block cache).
    pub memory_hits: u64,
    /// Blocks read that had to be looked up in the log, the read cache or the bucket.
    pub memory_misses: u64,
    /// Writes that had to wait because the log was filling or full.
    pub paced_writes: u64,
    /// Log frames written.
    pub log_frames: u64,
    /// Log device flushes.
    pub log_syncs: u64,
    /// Chunks stored.
    pub chunks: u64,
    /// Payload bytes in stored chunks before compression.
    pub chunk_raw_bytes: u64,
    /// Bytes of stored chunks.
    pub chunk_stored_bytes: u64,
    /// Snapshots, those included that only clones still need.
    #[serde(default)]
    pub snapshots: u64,
    /// Newest chunk in the bucket's checkpoint of the translation table; 0 without one.
    pub checkpoint_seq: u64,
    /// Newest LSN in it.
    pub checkpoint_lsn: u64,
    /// When the last one of this process was made, in milliseconds since 1970; 0 before.
    pub checkpoint_made_ms: u64,
    /// Checkpoints made.
    pub checkpoints: u64,
    /// Bytes sent for them.
    pub checkpoint_sent_bytes: u64,
    /// Newest LSN of the state that opening found.
    pub opened_lsn: u64,
    /// When the newest write in it was made, in milliseconds since 1970; 0 where nothing says.
    pub opened_written_ms: u64,
    /// When it was opened, in milliseconds since 1970.
    pub opened_ms: u64,
    /// Chunks that compaction wrote.
    pub relocated_chunks: u64,
    /// Bytes of chunks that compaction wrote.
    pub relocated_bytes: u64,
    /// Bytes that compaction read from the bucket, roughly.
    pub relocated_read_bytes: u64,
    /// Blocks that compaction moved.
    pub relocated_blocks: u64,
    /// Rounds of compaction that failed and are tried again.
    pub compaction_failures: u64,
    /// Dead chunks deleted.
    pub deleted_chunks: u64,
    /// Bytes of dead chunks deleted.
    pub deleted_bytes: u64,
    /// Deletions that failed and are tried again.
    pub delete_failures: u64,
    /// Bytes in the bucket that blocks of the volume are mapped to.
    pub live_bytes: u64,
    /// Bytes in the bucket that are not needed any more: overwritten, trimmed, or moved by compaction.
    pub dead_bytes: u64,
    /// Bytes of the volume's chunks in the bucket, live and dead.
    pub stored_bytes: u64,
    /// The part of the dead bytes in chunks that are wholly dead: they wait for a checkpoint, for the grace time, or for
    /// a snapshot to go.
    pub deletable_bytes: u64,
    /// Bytes of chunks of other volumes, of which this one is a clone.
    pub foreign_bytes: u64,
    /// The volume's chunks in the bucket.
    pub bucket_chunks: u64,
    /// Whether a round of compaction is under way.
    pub compacting: bool,
    /// Why compaction does not get on at the moment, if it does not.
    pub compaction_trouble: Option<String>,
    /// Memory held by dirty payload, in bytes.
    pub dirty_memory_bytes: u64,
    /// Memory held by the block cache, in bytes.
    pub cache_memory_bytes: u64,
    /// Why destaging does not get on at the moment, if it does not.
    pub store_trouble: Option<String>,
    /// Why the log does not grow to the size it may have, if it should.
    pub log_trouble: Option<String>,
    /// Why the log is dead, if it is.
    pub log_dead: Option<String>,
    /// Why the volume is not this host's any more, if so.
    pub fenced: Option<String>,
    /// Requests wait, because the lease could not be renewed in time.
    pub suspended: bool,
}

impl VolumeStats {
    /// Bytes stored, by destaging and by compaction, for each byte written by clients. None before there is anything to
    /// compare.
    pub fn write_amplification(&self) -> Option<f64> {
        let stored = self.chunk_stored_bytes + self.relocated_bytes;
        (self.write_bytes > 0 && stored > 0).then(|| stored as f64 / self.write_bytes as f64)
    }
}
