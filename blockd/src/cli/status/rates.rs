//! What happened between two samples.

use std::collections::BTreeMap;

use serde::Serialize;

use crate::admin::api::Status;
use crate::volume::VolumeStats;

/// Seconds of a month of 30 days, for the price of going on like this.
const MONTH_SECONDS: f64 = 30.0 * 86400.0;

/// Per second, unless the name says otherwise.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Rates {
    /// Time between the samples.
    pub seconds: f64,
    /// By name of the volume; only those open at both samples.
    pub volumes: BTreeMap<String, VolumeRates>,
    /// Bytes written to the bucket.
    pub store_write_bytes: f64,
    /// Bytes read from the bucket.
    pub store_read_bytes: f64,
    /// Billed requests to the bucket.
    pub store_requests: f64,
    /// US dollars for a month of requests like these.
    pub store_cost_usd_per_month: f64,
}

/// Of one volume.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct VolumeRates {
    pub read_bytes: f64,
    pub write_bytes: f64,
    pub reads: f64,
    pub writes: f64,
    pub flushes: f64,
    /// Share of blocks read from memory; absent when none was read.
    pub hit_ratio: Option<f64>,
}

/// The rates between `before` and `now`. All zero when the daemon was restarted in between.
pub(super) fn rates(before: &Status, now: &Status) -> Rates {
    let seconds = now.daemon.uptime_seconds - before.daemon.uptime_seconds;
    if now.daemon.pid != before.daemon.pid || seconds <= 0.0 {
        return Rates::default();
    }
    let per_second = |before: u64, now: u64| now.saturating_sub(before) as f64 / seconds;
    let open = |status: &Status| -> BTreeMap<String, VolumeStats> {
        let stats = status.volumes.iter();
        stats.filter_map(|volume| Some((volume.info.name.clone(), volume.stats.clone()?))).collect()
    };
    let old = open(before);
    let volume = |(name, now): (String, VolumeStats)| {
        let before = old.get(&name)?;
        let rate = |value: fn(&VolumeStats) -> u64| per_second(value(before), value(&now));
        let (hits, misses) = (rate(|s| s.memory_hits), rate(|s| s.memory_misses));
        let rates = VolumeRates {
            read_bytes: rate(|s| s.read_bytes),
            write_bytes: rate(|s| s.write_bytes),
            reads: rate(|s| s.reads),
            writes: rate(|s| s.writes),
            flushes: rate(|s| s.flushes),
            hit_ratio: (hits + misses > 0.0).then(|| hits / (hits + misses)),
        };
        Some((name, rates))
    };
    let requests = |status: &Status| status.store.put_class_requests + status.store.get_class_requests;
    Rates {
        seconds,
        volumes: open(now).into_iter().filter_map(volume).collect(),
        store_write_bytes: per_second(before.store.bytes_written, now.store.bytes_written),
        store_read_bytes: per_second(before.store.bytes_read, now.store.bytes_read),
        store_requests: per_second(requests(before), requests(now)),
        store_cost_usd_per_month: (now.store.cost_usd - before.store.cost_usd).max(0.0) / seconds * MONTH_SECONDS,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::api::{DaemonInfo, VolumeInfo, VolumeStatus};
    use crate::store::StoreCounters;

    fn sample(uptime_seconds: f64, writes: u64) -> Status {
        let stats = VolumeStats {
            writes,
            write_bytes: writes * 4096,
            memory_hits: writes,
            memory_misses: writes / 3,
            ..Default::default()
        };
        let info = VolumeInfo { name: "a".into(), ..Default::default() };
        Status {
            daemon: DaemonInfo { uptime_seconds, pid: 7, ..Default::default() },
            volumes: vec![VolumeStatus { info, stats: Some(stats), ..Default::default() }],
            store: StoreCounters { bytes_written: writes, cost_usd: writes as f64 / 1e6, ..Default::default() },
            ..Default::default()
        }
    }

    #[test]
    fn rates_are_differences_over_the_daemons_own_time() {
        let rates = rates(&sample(10.0, 300), &sample(12.0, 900));
        assert_eq!(rates.seconds, 2.0);
        let a = &rates.volumes["a"];
        assert_eq!((a.writes, a.write_bytes), (300.0, 300.0 * 4096.0));
        assert_eq!(a.hit_ratio, Some(0.75));
        assert_eq!(rates.store_write_bytes, 300.0);
        assert!((rates.store_cost_usd_per_month - 0.0003 * MONTH_SECONDS).abs() < 1e-6);
    }

    #[test]
    fn a_restart_between_the_samples_gives_no_nonsense() {
        let mut restarted = sample(11.0, 5);
        restarted.daemon.pid = 8;
        assert_eq!(rates(&sample(10.0, 300), &restarted), Rates::default());
        // A volume that was closed and opened begins to count again.
        let reopened = rates(&sample(10.0, 300), &sample(11.0, 5));
        assert_eq!(reopened.volumes["a"].writes, 0.0);
    }

    #[test]
    fn without_reads_there_is_no_hit_ratio() {
        assert_eq!(rates(&sample(1.0, 3), &sample(2.0, 3)).volumes["a"].hit_ratio, None);
    }
}
