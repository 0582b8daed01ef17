//! `fsd status`: two samples of what a running fsd counts, and what lies between them.

use std::fmt::Write as _;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use blockd::program::text::{bytes, seconds};
use blockd::program::{print, print_json};
use clap::Args;

use crate::admin::{Status, ask};

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
    let elapsed = between.as_secs_f64().max(1e-3);
    let rate = |of: fn(&Status) -> u64| of(now).saturating_sub(of(before)) as f64 / elapsed;
    let mut text = String::new();
    let read_only = if now.read_only { ", read-only" } else { "" };
    let _ = writeln!(text, "fsd {} (process {}), up {}{read_only}", now.version, now.pid, seconds(now.uptime_s as f64));
    let _ = writeln!(text, "disk     {}", now.disk);
    for export in &now.exports {
        let _ = writeln!(text, "export   {export}");
    }
    let used = now.bytes_total.saturating_sub(now.bytes_free);
    let files = now.files_total.saturating_sub(now.files_free);
    let _ = writeln!(text, "stored   {} of {} in {files} files", bytes(used), bytes(now.bytes_total));
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
        bytes(rate(|s| s.tree.read_bytes)),
        rate(|s| s.tree.reads),
        bytes(rate(|s| s.tree.write_bytes)),
        rate(|s| s.tree.writes),
    );
    if let Some(open) = now.snapshots_open.filter(|open| *open > 0) {
        let _ = writeln!(text, "open     {open} snapshots");
    }
    let flushes = now.on_disk.flushes.saturating_sub(before.on_disk.flushes);
    let flush_us = now.on_disk.flush_us.saturating_sub(before.on_disk.flush_us);
    let _ = writeln!(
        text,
        "disk/s   read {}, written {}, shared {}, discarded {}, {:.0} flushes{}",
        bytes(rate(|s| s.on_disk.read_bytes)),
        bytes(rate(|s| s.on_disk.write_bytes)),
        bytes(rate(|s| s.on_disk.remap_bytes)),
        bytes(rate(|s| s.on_disk.discard_bytes)),
        flushes as f64 / elapsed,
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
