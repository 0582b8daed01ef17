//! The status in Prometheus' text format.
//!
//! Every scrape fills a fresh recorder, so that volumes which are gone leave nothing behind.

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::PrometheusBuilder;

use super::api::{Status, VolumeState};
use crate::store::StoreCounters;
use crate::volume::VolumeStats;

/// Name, unit, help, and where the value comes from.
type Metric<S, V> = (&'static str, Unit, &'static str, fn(&S) -> V);

const VOLUME_GAUGES: &[Metric<VolumeStats, f64>] = &[
    ("blockd_volume_dirty_bytes", Unit::Bytes, "Accepted bytes that are not in the bucket yet", |s| {
        s.dirty_bytes as f64
    }),
    ("blockd_volume_behind_seconds", Unit::Seconds, "Age of the oldest write that is not in the bucket yet", |s| {
        s.behind_seconds
    }),
    ("blockd_volume_log_used_bytes", Unit::Bytes, "Write-ahead log in use", |s| s.log_used_bytes as f64),
    ("blockd_volume_log_capacity_bytes", Unit::Bytes, "Write-ahead log the volume may use", |s| {
        s.log_capacity_bytes as f64
    }),
    (
        "blockd_volume_log_full_in_seconds",
        Unit::Seconds,
        "Time until the log is full at the present rates, +Inf while it is not filling",
        |s| s.log_full_in_seconds.unwrap_or(f64::INFINITY),
    ),
    ("blockd_volume_dirty_memory_bytes", Unit::Bytes, "Memory held by writes that are not in the bucket yet", |s| {
        s.dirty_memory_bytes as f64
    }),
    ("blockd_volume_cache_memory_bytes", Unit::Bytes, "Memory held by recently read blocks", |s| {
        s.cache_memory_bytes as f64
    }),
    ("blockd_volume_live_bytes", Unit::Bytes, "Bytes in the bucket that the volume's blocks are mapped to", |s| {
        s.live_bytes as f64
    }),
    ("blockd_volume_dead_bytes", Unit::Bytes, "Bytes in the bucket that are not needed any more", |s| {
        s.dead_bytes as f64
    }),
    ("blockd_volume_deletable_bytes", Unit::Bytes, "Bytes of dead chunks that wait to be deleted", |s| {
        s.deletable_bytes as f64
    }),
    ("blockd_volume_stored_bytes", Unit::Bytes, "Bytes of the volume's chunks in the bucket", |s| {
        s.stored_bytes as f64
    }),
    ("blockd_volume_bucket_chunks", Unit::Count, "The volume's chunks in the bucket", |s| s.bucket_chunks as f64),
    ("blockd_volume_compacting", Unit::Count, "1 while a round of compaction is under way", |s| flag(s.compacting)),
    ("blockd_volume_compaction_trouble", Unit::Count, "1 while compaction does not get on", |s| {
        flag(s.compaction_trouble.is_some())
    }),
    ("blockd_volume_log_trouble", Unit::Count, "1 while the log cannot grow to its size", |s| {
        flag(s.log_trouble.is_some())
    }),
    ("blockd_volume_store_trouble", Unit::Count, "1 while destaging does not get on", |s| {
        flag(s.store_trouble.is_some())
    }),
    ("blockd_volume_log_dead", Unit::Count, "1 when the log device failed and nothing is acknowledged any more", |s| {
        flag(s.log_dead.is_some())
    }),
    ("blockd_volume_suspended", Unit::Count, "1 while requests wait because the lease could not be renewed", |s| {
        flag(s.suspended)
    }),
    ("blockd_volume_fenced", Unit::Count, "1 when another host has taken the volume over", |s| {
        flag(s.fenced.is_some())
    }),
];

const VOLUME_COUNTERS: &[Metric<VolumeStats, u64>] = &[
    ("blockd_volume_reads_total", Unit::Count, "Read requests", |s| s.reads),
    ("blockd_volume_writes_total", Unit::Count, "Write requests", |s| s.writes),
    ("blockd_volume_flushes_total", Unit::Count, "Flush requests", |s| s.flushes),
    ("blockd_volume_trims_total", Unit::Count, "Trim and zero requests", |s| s.trims),
    ("blockd_volume_copies_total", Unit::Count, "Copy requests", |s| s.copies),
    ("blockd_volume_copied_bytes_total", Unit::Bytes, "Bytes of copy requests", |s| s.copied_bytes),
    (
        "blockd_volume_referred_blocks_total",
        Unit::Count,
        "Blocks of copies that refer to what was there, instead of being written",
        |s| s.referred_blocks,
    ),
    ("blockd_volume_read_bytes_total", Unit::Bytes, "Bytes read by clients", |s| s.read_bytes),
    ("blockd_volume_write_bytes_total", Unit::Bytes, "Bytes written by clients", |s| s.write_bytes),
    ("blockd_volume_memory_hits_total", Unit::Count, "Blocks read from memory", |s| s.memory_hits),
    ("blockd_volume_memory_misses_total", Unit::Count, "Blocks read from the log, the read cache or the bucket", |s| {
        s.memory_misses
    }),
    ("blockd_volume_paced_writes_total", Unit::Count, "Writes that waited for room in the log", |s| s.paced_writes),
    ("blockd_volume_log_frames_total", Unit::Count, "Frames written to the log", |s| s.log_frames),
    ("blockd_volume_log_syncs_total", Unit::Count, "Flushes of the log device", |s| s.log_syncs),
    ("blockd_volume_chunks_total", Unit::Count, "Chunks stored", |s| s.chunks),
    ("blockd_volume_chunk_raw_bytes_total", Unit::Bytes, "Payload of stored chunks before compression", |s| {
        s.chunk_raw_bytes
    }),
    ("blockd_volume_chunk_stored_bytes_total", Unit::Bytes, "Stored chunks", |s| s.chunk_stored_bytes),
    ("blockd_volume_relocated_chunks_total", Unit::Count, "Chunks stored by compaction", |s| s.relocated_chunks),
    ("blockd_volume_relocated_bytes_total", Unit::Bytes, "Chunks stored by compaction", |s| s.relocated_bytes),
    ("blockd_volume_relocated_read_bytes_total", Unit::Bytes, "Bytes read by compaction", |s| s.relocated_read_bytes),
    ("blockd_volume_compaction_failures_total", Unit::Count, "Failed rounds of compaction", |s| s.compaction_failures),
    ("blockd_volume_deleted_chunks_total", Unit::Count, "Dead chunks deleted", |s| s.deleted_chunks),
    ("blockd_volume_deleted_bytes_total", Unit::Bytes, "Dead chunks deleted", |s| s.deleted_bytes),
    ("blockd_volume_delete_failures_total", Unit::Count, "Failed deletions of dead chunks", |s| s.delete_failures),
    ("blockd_volume_checkpoints_total", Unit::Count, "Copies of the translation table sent", |s| s.checkpoints),
    ("blockd_volume_checkpoint_sent_bytes_total", Unit::Bytes, "Bytes sent for them", |s| s.checkpoint_sent_bytes),
];

const STORE_COUNTERS: &[Metric<StoreCounters, u64>] = &[
    ("blockd_store_puts_total", Unit::Count, "Objects written", |c| c.puts),
    ("blockd_store_gets_total", Unit::Count, "Objects and ranges read", |c| c.gets),
    ("blockd_store_heads_total", Unit::Count, "Objects looked at", |c| c.heads),
    ("blockd_store_lists_total", Unit::Count, "Pages listed", |c| c.lists),
    ("blockd_store_deleted_keys_total", Unit::Count, "Objects deleted", |c| c.deleted_keys),
    ("blockd_store_errors_total", Unit::Count, "Requests that ended in an error of any kind", |c| c.errors),
    (
        "blockd_store_transient_errors_total",
        Unit::Count,
        "Requests that failed because the store was away, slow or throttling",
        |c| c.transient_errors,
    ),
    ("blockd_store_written_bytes_total", Unit::Bytes, "Bytes of objects written", |c| c.bytes_written),
    ("blockd_store_read_bytes_total", Unit::Bytes, "Bytes of objects read", |c| c.bytes_read),
    (
        "blockd_store_put_class_requests_total",
        Unit::Count,
        "Billed requests in the class of PUT and LIST, retries included",
        |c| c.put_class_requests,
    ),
    (
        "blockd_store_get_class_requests_total",
        Unit::Count,
        "Billed requests in the class of GET and HEAD, retries included",
        |c| c.get_class_requests,
    ),
];

fn flag(on: bool) -> f64 {
    f64::from(u8::from(on))
}

/// `status` as text.
pub fn render(status: &Status) -> String {
    let recorder = PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, || record(status));
    recorder.handle().render()
}

fn record(status: &Status) {
    describe_gauge!("blockd_info", Unit::Count, "1; the version is a label");
    gauge!("blockd_info", "version" => status.daemon.version.clone()).set(1.0);
    describe_gauge!("blockd_uptime_seconds", Unit::Seconds, "Time since the daemon started");
    gauge!("blockd_uptime_seconds").set(status.daemon.uptime_seconds);
    describe_gauge!("blockd_resident_bytes", Unit::Bytes, "Resident memory of the daemon");
    gauge!("blockd_resident_bytes").set(status.memory.resident_bytes as f64);
    describe_gauge!("blockd_volume_open", Unit::Count, "1 while the volume is served");
    describe_gauge!("blockd_volume_size_bytes", Unit::Bytes, "Size of the volume");
    describe_gauge!("blockd_volume_clients", Unit::Count, "Connections to the volume");
    describe_gauge!("blockd_volume_nvme_hosts", Unit::Count, "NVMe/TCP controllers of the volume");
    for (name, unit, help, _) in VOLUME_GAUGES {
        describe_gauge!(*name, *unit, *help);
    }
    for (name, unit, help, _) in VOLUME_COUNTERS {
        describe_counter!(*name, *unit, *help);
    }
    for (name, unit, help, _) in STORE_COUNTERS {
        describe_counter!(*name, *unit, *help);
    }
    for volume in &status.volumes {
        let name = || volume.info.name.clone();
        gauge!("blockd_volume_open", "volume" => name()).set(flag(volume.info.state == VolumeState::Open));
        gauge!("blockd_volume_size_bytes", "volume" => name()).set(volume.info.size as f64);
        gauge!("blockd_volume_clients", "volume" => name()).set(volume.info.clients as f64);
        gauge!("blockd_volume_nvme_hosts", "volume" => name()).set(volume.info.nvme_hosts.len() as f64);
        let Some(stats) = &volume.stats else { continue };
        for (metric, _, _, value) in VOLUME_GAUGES {
            gauge!(*metric, "volume" => name()).set(value(stats));
        }
        for (metric, _, _, value) in VOLUME_COUNTERS {
            counter!(*metric, "volume" => name()).absolute(value(stats));
        }
    }
    describe_gauge!(
        "blockd_store_cost_usd",
        Unit::Count,
        "Estimated price of the requests since the daemon started, in US dollars"
    );
    gauge!("blockd_store_cost_usd").set(status.store.cost_usd);
    for (metric, _, _, value) in STORE_COUNTERS {
        counter!(*metric).absolute(value(&status.store));
    }
}

#[cfg(test)]
mod tests {
    use super::super::api::{VolumeInfo, VolumeStatus};
    use super::*;

    #[test]
    fn a_scrape_has_help_types_labels_and_values() {
        let open = VolumeStatus {
            info: VolumeInfo {
                name: "a".into(),
                state: VolumeState::Open,
                size: 4096,
                clients: 2,
                ..Default::default()
            },
            stats: Some(VolumeStats { dirty_bytes: 7, writes: 3, ..Default::default() }),
            ..Default::default()
        };
        let failed = VolumeStatus {
            info: VolumeInfo { name: "b".into(), state: VolumeState::Failed, ..Default::default() },
            ..Default::default()
        };
        let store = StoreCounters { puts: 5, ..Default::default() };
        let status = Status { volumes: vec![open, failed], store, ..Default::default() };
        let text = render(&status);
        for line in [
            "# TYPE blockd_volume_dirty_bytes gauge",
            "# HELP blockd_volume_writes_total Write requests",
            "blockd_volume_dirty_bytes{volume=\"a\"} 7",
            "blockd_volume_writes_total{volume=\"a\"} 3",
            "blockd_volume_log_full_in_seconds{volume=\"a\"} inf",
            "blockd_volume_clients{volume=\"a\"} 2",
            "blockd_volume_open{volume=\"b\"} 0",
            "blockd_store_puts_total 5",
        ] {
            assert!(text.to_lowercase().lines().any(|l| l == line.to_lowercase()), "{line}\nin\n{text}");
        }
        assert!(!text.contains("dirty_bytes{volume=\"b\"}"), "{text}");
    }

    #[test]
    fn what_is_gone_leaves_nothing_behind() {
        let volume =
            VolumeStatus { info: VolumeInfo { name: "gone".into(), ..Default::default() }, ..Default::default() };
        assert!(render(&Status { volumes: vec![volume], ..Default::default() }).contains("gone"));
        assert!(!render(&Status::default()).contains("gone"));
    }
}
