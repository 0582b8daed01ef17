//! The status as text.

use super::super::volume::state;
use super::rates::{Rates, VolumeRates};
use crate::admin::api::{FollowStatus, Status, VolumeStatus};
use crate::program::text::{Align, Table, bytes, count, date, seconds};
use crate::volume::VolumeStats;

/// The whole page.
pub(super) fn render(status: &Status, rates: &Rates) -> String {
    let daemon = &status.daemon;
    let mut page = format!(
        "blockd {}, pid {}, up {}, data {}\n\n",
        daemon.version,
        daemon.pid,
        seconds(daemon.uptime_seconds),
        daemon.data.display()
    );
    if status.volumes.is_empty() {
        page += "no volumes yet; make one with `blockd volume create NAME --size SIZE`\n";
    } else {
        page += &volumes(&status.volumes, rates).to_string();
    }
    if status.volumes.iter().any(|volume| volume.stats.as_ref().is_some_and(|stats| stats.stored_bytes > 0)) {
        page = page + "\n" + &space(&status.volumes).to_string();
    }
    for view in &status.followed {
        page += &format!("\n{}\n", followed(view));
    }
    for trouble in status.volumes.iter().flat_map(troubles) {
        page = page + "! " + &trouble + "\n";
    }
    page + "\n" + &store(status, rates) + &memory(status)
}

fn volumes(volumes: &[VolumeStatus], rates: &Rates) -> Table {
    let mut table = Table::new(&[
        ("VOLUME", Align::Left),
        ("SIZE", Align::Right),
        ("STATE", Align::Left),
        ("CLIENTS", Align::Right),
        ("DIRTY", Align::Right),
        ("BEHIND", Align::Right),
        ("LOG", Align::Right),
        ("FULL IN", Align::Right),
        ("HITS", Align::Right),
        ("READ/s", Align::Right),
        ("WRITE/s", Align::Right),
        ("READS/s", Align::Right),
        ("WRITES/s", Align::Right),
        ("FLUSHES/s", Align::Right),
    ]);
    let none = VolumeRates::default();
    for volume in volumes {
        let info = &volume.info;
        let shown = match info.durability.as_str() {
            "" => state(info),
            durability => format!("{} {durability}", state(info)),
        };
        let head = [info.name.clone(), bytes(info.size), shown, info.clients.to_string()];
        let rest = match &volume.stats {
            None => std::array::from_fn(|_| "-".to_owned()),
            Some(stats) => figures(stats, rates.volumes.get(&info.name).unwrap_or(&none)),
        };
        table.row(head.into_iter().chain(rest));
    }
    table
}

fn space(volumes: &[VolumeStatus]) -> Table {
    let mut table = Table::new(&[
        ("VOLUME", Align::Left),
        ("LIVE", Align::Right),
        ("DEAD", Align::Right),
        ("STORED", Align::Right),
        ("CHUNKS", Align::Right),
        ("RELOCATED", Align::Right),
        ("DELETED", Align::Right),
        ("WRITE AMP", Align::Right),
        ("COMPACTION", Align::Left),
    ]);
    for volume in volumes {
        let Some(stats) = &volume.stats else { continue };
        let compaction = match (&stats.compaction_trouble, stats.compacting) {
            (Some(_), _) => "trouble",
            (None, true) => "working",
            (None, false) => "at rest",
        };
        table.row([
            volume.info.name.clone(),
            bytes(stats.live_bytes),
            bytes(stats.dead_bytes),
            bytes(stats.stored_bytes),
            count(stats.bucket_chunks),
            bytes(stats.relocated_bytes),
            bytes(stats.deleted_bytes),
            stats.write_amplification().map_or("-".into(), |ratio| format!("{ratio:.2}")),
            compaction.to_owned(),
        ]);
    }
    table
}

fn followed(view: &FollowStatus) -> String {
    let made = if view.written_ms == 0 { String::new() } else { format!(" of {}", date(view.written_ms)) };
    let mut line = format!(
        "{}: read-only, up to write {}{made}; shows what the bucket had {} ago",
        view.export,
        view.lsn,
        seconds(view.lag_seconds)
    );
    if let Some(error) = &view.error {
        line = line + "\n! " + &view.export + ": cannot follow the owner: " + error;
    }
    line
}

fn figures(stats: &VolumeStats, rates: &VolumeRates) -> [String; 10] {
    let percent = |ratio: f64| format!("{:.0}%", ratio * 100.0);
    // Without reads between the samples the figure since the start says more than none.
    let blocks = stats.memory_hits + stats.memory_misses;
    let ever = (blocks > 0).then(|| stats.memory_hits as f64 / blocks as f64);
    [
        bytes(stats.dirty_bytes),
        seconds(stats.behind_seconds),
        percent(stats.log_used_bytes as f64 / stats.log_capacity_bytes.max(1) as f64),
        stats.log_full_in_seconds.map_or("-".into(), seconds),
        rates.hit_ratio.or(ever).map_or("-".into(), percent),
        bytes(rates.read_bytes),
        bytes(rates.write_bytes),
        count(rates.reads),
        count(rates.writes),
        count(rates.flushes),
    ]
}

fn troubles(volume: &VolumeStatus) -> Vec<String> {
    let name = &volume.info.name;
    let mut troubles: Vec<String> = volume.info.error.iter().cloned().collect();
    troubles.extend(volume.info.notice.iter().cloned());
    if let Some(stats) = &volume.stats {
        if stats.suspended {
            troubles.push(format!(
                "{name}: suspended: its lease could not be renewed in time, so another host may take it; requests wait until it is"
            ));
        }
        if volume.info.error.is_none() {
            troubles.extend(stats.fenced.iter().map(|why| format!("{name}: fenced: {why}")));
        }
        troubles.extend(stats.log_dead.iter().map(|why| {
            format!(
                "{name}: the log device failed, nothing is acknowledged any more: {why}; restart blockd on a good disk"
            )
        }));
        troubles.extend(stats.log_trouble.iter().map(|why| {
            format!("{name}: the log cannot grow: {why}; it goes on with what it has, and writers may have to wait")
        }));
        troubles
            .extend(stats.compaction_trouble.iter().map(|why| format!("{name}: compaction does not get on: {why}")));
        troubles.extend(stats.store_trouble.iter().map(|why| format!("{name}: destaging does not get on: {why}")));
    }
    troubles
}

fn store(status: &Status, rates: &Rates) -> String {
    let store = &status.store;
    let mut lines = format!("store   {}\n", status.daemon.store);
    lines += &format!(
        "        {} puts, {} gets, {} heads, {} lists, {} deleted, {} errors ({} transient)\n",
        count(store.puts),
        count(store.gets),
        count(store.heads),
        count(store.lists),
        count(store.deleted_keys),
        count(store.errors),
        count(store.transient_errors)
    );
    lines += &format!(
        "        {} written, {} read; now {}/s written, {}/s read, {} requests/s\n",
        bytes(store.bytes_written),
        bytes(store.bytes_read),
        bytes(rates.store_write_bytes),
        bytes(rates.store_read_bytes),
        count(rates.store_requests)
    );
    lines
        + &format!(
            "        requests cost ${:.4} so far, ${:.2} a month at the present rate\n",
            store.cost_usd, rates.store_cost_usd_per_month
        )
}

fn memory(status: &Status) -> String {
    let memory = &status.memory;
    format!(
        "memory  {} resident; dirty {} of {}, block cache {} of {}\n",
        bytes(memory.resident_bytes),
        bytes(memory.dirty_bytes),
        bytes(memory.dirty_limit_bytes),
        bytes(memory.cache_bytes),
        bytes(memory.cache_limit_bytes)
    )
}

#[cfg(test)]
mod tests {
    use super::super::Report;
    use super::*;
    use crate::admin::api::{DaemonInfo, MemoryStatus, VolumeInfo, VolumeState};
    use crate::store::StoreCounters;

    fn sample() -> (Status, Rates) {
        let stats = VolumeStats {
            dirty_bytes: 96 << 20,
            behind_seconds: 4.2,
            log_used_bytes: 1 << 30,
            log_capacity_bytes: 4 << 30,
            log_full_in_seconds: Some(95.0),
            memory_hits: 3,
            memory_misses: 1,
            live_bytes: 10 << 30,
            dead_bytes: 4 << 30,
            stored_bytes: 14 << 30,
            bucket_chunks: 900,
            store_trouble: Some("store put c/1: Throttled".into()),
            ..Default::default()
        };
        let open = VolumeStatus {
            info: VolumeInfo {
                name: "disk".into(),
                size: 100 << 30,
                durability: "local".into(),
                state: VolumeState::Open,
                clients: 4,
                ..Default::default()
            },
            stats: Some(stats),
            ..Default::default()
        };
        let failed = VolumeStatus {
            info: VolumeInfo {
                name: "old".into(),
                state: VolumeState::Failed,
                error: Some("cannot open volume \"old\": no".into()),
                ..Default::default()
            },
            ..Default::default()
        };
        let status = Status {
            daemon: DaemonInfo {
                version: "0.1.0".into(),
                pid: 42,
                data: "/srv/b".into(),
                store: "s3://b".into(),
                uptime_seconds: 7500.0,
                ..Default::default()
            },
            volumes: vec![open, failed],
            store: StoreCounters { puts: 1500, bytes_written: 3 << 30, cost_usd: 0.0075, ..Default::default() },
            followed: vec![FollowStatus {
                export: "other@latest".into(),
                lsn: 77,
                lag_seconds: 1.5,
                ..Default::default()
            }],
            memory: MemoryStatus { resident_bytes: 200 << 20, dirty_limit_bytes: 256 << 20, ..Default::default() },
        };
        let disk = VolumeRates { write_bytes: 5e6, writes: 1234.0, flushes: 10.0, ..Default::default() };
        let rates = Rates {
            seconds: 2.0,
            volumes: [("disk".to_owned(), disk)].into(),
            store_cost_usd_per_month: 6.48,
            ..Default::default()
        };
        (status, rates)
    }

    #[test]
    fn the_page_shows_figures_troubles_and_cost() {
        let (status, rates) = sample();
        let page = render(&status, &rates);
        let expected = "\
blockd 0.1.0, pid 42, up 2 h 5 m, data /srv/b

VOLUME     SIZE  STATE       CLIENTS   DIRTY  BEHIND  LOG   FULL IN  HITS  READ/s  WRITE/s  READS/s  WRITES/s  FLUSHES/s
disk    100 GiB  open local        4  96 MiB   4.2 s  25%  1 m 35 s   75%     0 B  4.8 MiB        0      1.2k         10
old         0 B  failed            0       -       -    -         -     -       -        -        -         -          -

VOLUME    LIVE   DEAD  STORED  CHUNKS  RELOCATED  DELETED  WRITE AMP  COMPACTION
disk    10 GiB  4 GiB  14 GiB     900        0 B      0 B          -  at rest

other@latest: read-only, up to write 77; shows what the bucket had 1.5 s ago
! disk: destaging does not get on: store put c/1: Throttled
! cannot open volume \"old\": no

store   s3://b
        1.5k puts, 0 gets, 0 heads, 0 lists, 0 deleted, 0 errors (0 transient)
        3 GiB written, 0 B read; now 0 B/s written, 0 B/s read, 0 requests/s
        requests cost $0.0075 so far, $6.48 a month at the present rate
memory  200 MiB resident; dirty 0 B of 256 MiB, block cache 0 B of 0 B
";
        assert_eq!(page, expected, "\n{page}");
    }

    #[test]
    fn the_json_has_samples_and_rates() {
        let (status, rates) = sample();
        let json = serde_json::to_value(Report { status: &status, rates: &rates }).unwrap();
        assert_eq!(json["volumes"][0]["name"], "disk");
        assert_eq!(json["volumes"][0]["stats"]["dirty_bytes"], 96 << 20);
        assert_eq!(json["volumes"][1]["state"], "failed");
        assert_eq!(json["volumes"][1]["stats"], serde_json::Value::Null);
        assert_eq!(json["rates"]["volumes"]["disk"]["writes"], 1234.0);
        assert_eq!(json["store"]["puts"], 1500);
        assert_eq!(json["daemon"]["pid"], 42);
    }
}
