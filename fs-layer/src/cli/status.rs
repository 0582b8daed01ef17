//! `fsd status`: two samples of what a running fsd counts, and what lies between them.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Args;

use super::{print, print_json};
use crate::admin::{Status, ask};
use crate::config::ByteSize;

/// Time between the two samples of a single look.
const GLANCE: Duration = Duration::from_millis(500);

#[derive(Args, Debug)]
#[command(after_help = "\
Rates are per second, between two looks. A flush is what makes writes durable; its time is what an fsync waits for at least.")]
pub(super) struct StatusArgs {
    /// Data directory of the fsd
    #[arg(long, value_name = "DIR", default_value = "fsd-data", env = "FSD_DATA")]
    data: PathBuf,

    /// Go on, with a new look every so many seconds [default: 2]
    #[arg(long, short, value_name = "SECS", num_args = 0..=1, default_missing_value = "2", value_parser = clap::value_parser!(u64).range(1..=3600))]
    watch: Option<u64>,

    /// Print JSON: totals since the start, for programs that compute rates themselves
    #[arg(long)]
    json: bool,
}

pub(super) fn run(args: &StatusArgs) -> anyhow::Result<()> {
    let socket = args.data.join("fsd.sock");
    let look = || ask(&socket).map(|status| (Instant::now(), status));
    let mut before = look()?;
    if args.json && args.watch.is_none() {
        return print_json(&before.1);
    }
    let mut pause = GLANCE;
    loop {
        std::thread::sleep(pause);
        let now = look()?;
        if args.json {
            print(&format!("{}\n", serde_json::to_string(&now.1)?))?;
        } else {
            let text = render(&before.1, &now.1, now.0 - before.0);
            if args.watch.is_some() && std::io::stdout().is_terminal() {
                // Home, then clear what is left below: no flicker.
                print(&format!("\x1b[H{}\x1b[J", text.replace('\n', "\x1b[K\n")))?;
            } else {
                print(&text)?;
            }
        }
        let Some(seconds) = args.watch else { return Ok(()) };
        pause = Duration::from_secs(seconds);
        before = now;
    }
}

/// Two looks at one fsd, for people.
fn render(before: &Status, now: &Status, between: Duration) -> String {
    let seconds = between.as_secs_f64().max(1e-3);
    let rate = |of: fn(&Status) -> u64| of(now).saturating_sub(of(before)) as f64 / seconds;
    let mut text = String::new();
    let read_only = if now.read_only { ", read-only" } else { "" };
    let _ = writeln!(text, "fsd {} (process {}), up {}{read_only}", now.version, now.pid, uptime(now.uptime_s));
    let _ = writeln!(text, "disk     {}", now.disk);
    for export in &now.exports {
        let _ = writeln!(text, "export   {export}");
    }
    let used = now.bytes_total.saturating_sub(now.bytes_free);
    let files = now.files_total.saturating_sub(now.files_free);
    let _ = writeln!(text, "stored   {} of {} in {files} files", rounded(used), rounded(now.bytes_total));
    let _ = writeln!(
        text,
        "calls/s  lookups {:.0}, stats {:.0}, listings {:.0}, changes {:.0}, syncs {:.0}; {} files open",
        rate(|s| s.tree.lookups),
        rate(|s| s.tree.stats),
        rate(|s| s.tree.listings),
        rate(|s| s.tree.changes),
        rate(|s| s.tree.syncs),
        now.tree.held,
    );
    let _ = writeln!(
        text,
        "data/s   read {} in {:.0} calls, written {} in {:.0} calls",
        rounded(rate(|s| s.tree.read_bytes) as u64),
        rate(|s| s.tree.reads),
        rounded(rate(|s| s.tree.write_bytes) as u64),
        rate(|s| s.tree.writes),
    );
    let flushes = now.on_disk.flushes.saturating_sub(before.on_disk.flushes);
    let flush_us = now.on_disk.flush_us.saturating_sub(before.on_disk.flush_us);
    let _ = writeln!(
        text,
        "disk/s   read {}, written {}, discarded {}, {:.0} flushes{}",
        rounded(rate(|s| s.on_disk.read_bytes) as u64),
        rounded(rate(|s| s.on_disk.write_bytes) as u64),
        rounded(rate(|s| s.on_disk.discard_bytes) as u64),
        flushes as f64 / seconds,
        flush_us.checked_div(flushes).map_or_else(String::new, |each| format!(" of {each} µs")),
    );
    let errors = now.on_disk.errors + now.tree.io_errors;
    if errors > 0 {
        let _ = writeln!(
            text,
            "ERRORS   {} of the disk, {} of the tree; see the log",
            now.on_disk.errors, now.tree.io_errors
        );
    }
    text
}

fn uptime(seconds: u64) -> String {
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, _) => format!("{minutes} min"),
        (0, ..) => format!("{hours} h {minutes} min"),
        _ => format!("{days} d {hours} h"),
    }
}

/// A size to look at, not to compute with.
fn rounded(bytes: u64) -> String {
    let power = (64 - bytes.leading_zeros()).saturating_sub(1) / 10;
    let whole = 1_u64 << (10 * power);
    if power == 0 || bytes.is_multiple_of(whole) {
        return ByteSize(bytes).to_string();
    }
    let unit = ["", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"][power as usize];
    format!("{:.1}{unit}", bytes as f64 / whole as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_short() {
        for (bytes, text) in
            [(0, "0"), (1000, "1000"), (1024, "1KiB"), (1536, "1.5KiB"), (1 << 60, "1EiB"), (u64::MAX, "16.0EiB")]
        {
            assert_eq!(rounded(bytes), text);
        }
    }
}
