//! Losing a host and opening its volumes on another: the real daemon, killed, its data directory deleted.
//!
//! The tests on S3 need the environment that `scripts/dev-s3 env` prints; without it they say that they were skipped.

mod common;

use std::path::{Path, PathBuf};
use std::time::Duration;

use blockd::export::nbd::client::NbdClient;
use common::daemon::{Daemon, wait};
use common::shadow::Shadow;
use serde_json::Value;

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;
/// Blocks that the numbered writes go to.
const BLOCKS: u64 = 512;

/// A store that outlives data directories.
struct Store {
    args: Vec<String>,
    /// Where objects are, if they are files.
    dir: Option<tempfile::TempDir>,
}

impl Store {
    fn in_a_directory() -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self { args: vec!["--store".into(), format!("dir:{}", dir.path().display())], dir: Some(dir) }
    }

    fn on_s3() -> Option<Self> {
        let (Ok(endpoint), Ok(bucket)) =
            (std::env::var("BLOCKD_TEST_S3_ENDPOINT"), std::env::var("BLOCKD_TEST_S3_BUCKET"))
        else {
            eprintln!("skipped: no S3 server; run  eval \"$(scripts/dev-s3 start)\"  first");
            return None;
        };
        let url = format!("s3://{bucket}/checkpoint-{}", uuid::Uuid::new_v4().simple());
        let args = ["--store", &url, "--s3-endpoint", &endpoint, "--read-cache", "0"];
        Some(Self { args: args.map(str::to_owned).to_vec(), dir: None })
    }

    fn serve(&self, data: &Path, more: &[&str]) -> Daemon {
        let args: Vec<&str> = self.args.iter().map(String::as_str).chain(more.iter().copied()).collect();
        Daemon::start(data, &args)
    }

    /// As [`Store::serve`], on a host that takes the volume whoever has it.
    fn take(&self, data: &Path, more: &[&str]) -> Daemon {
        let daemon = self.serve(data, more);
        // Whether it opens is for the test to say.
        daemon.run(&["volume", "open", "disk", "--force"]);
        daemon
    }

    /// The manifest's file.
    fn manifest(&self) -> PathBuf {
        self.files("volumes").into_iter().find(|path| path.ends_with("manifest")).unwrap()
    }

    /// Files of objects whose keys begin so.
    fn files(&self, prefix: &str) -> Vec<PathBuf> {
        fn walk(dir: &Path, found: &mut Vec<PathBuf>) {
            for entry in std::fs::read_dir(dir).into_iter().flatten().map(Result::unwrap) {
                match entry.file_type().unwrap().is_dir() {
                    true => walk(&entry.path(), found),
                    false => found.push(entry.path()),
                }
            }
        }
        let mut found = Vec::new();
        walk(&self.dir.as_ref().unwrap().path().join(prefix), &mut found);
        found.sort();
        found
    }
}

const OFTEN: [&str; 4] = ["--checkpoint-chunks", "4", "--destage-age", "100ms"];

fn wait_for_checkpoint(daemon: &Daemon, least: u64) -> Value {
    let mut stats = Value::Null;
    let made = wait(Duration::from_secs(60), || {
        stats = daemon.stats("disk");
        stats["checkpoint_lsn"].as_u64() >= Some(least.max(1))
    });
    assert!(made, "no checkpoint at LSN {least}: {stats}\n{}", daemon.log());
    stats
}

/// Writes number `n`, which says so itself, to its block.
fn numbered(client: &mut NbdClient, n: u64) {
    let block: Vec<u8> = n.to_le_bytes().into_iter().cycle().take(BLOCK).collect();
    client.write(n % BLOCKS * BLOCK as u64, &block).unwrap();
}

/// Checks that the volume holds exactly the writes up to number `last`, and no torn block.
fn check_prefix(client: &mut NbdClient, last: u64) {
    let mut found = vec![0; BLOCK];
    for block in 0..BLOCKS {
        client.read(block * BLOCK as u64, &mut found).unwrap();
        let value = u64::from_le_bytes(found[..8].try_into().unwrap());
        assert!(found.chunks(8).all(|c| c == &found[..8]), "block {block} is torn");
        // The newest n <= last with n % BLOCKS == block.
        let expected = match last % BLOCKS >= block {
            true => last - (last % BLOCKS - block),
            false => (last - (last % BLOCKS) + block).saturating_sub(BLOCKS),
        };
        assert_eq!(value, expected, "block {block} of the state that ends with write {last}");
    }
}

/// Each write has one LSN, from 1 on.
fn opened_lsn(daemon: &Daemon) -> u64 {
    daemon.stats("disk")["opened_lsn"].as_u64().unwrap()
}

fn a_lost_host_costs_what_status_said(store: &Store) {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut daemon = store.serve(first.path(), &OFTEN);
    daemon.json(&["volume", "create", "disk", "--size", "16MiB", "--chunk-size", "1MiB"]);
    let mut client = daemon.attach("disk");
    let mut last = 0;
    let mut stats = Value::Null;
    // Until there are checkpoints, and headers after them.
    while stats["checkpoint_seq"].as_u64() < Some(8) {
        assert!(last < 200_000, "no checkpoints: {stats}");
        for _ in 0..500 {
            last += 1;
            numbered(&mut client, last);
        }
        stats = daemon.stats("disk");
    }
    for _ in 0..2000 {
        last += 1;
        numbered(&mut client, last);
    }
    let promised = daemon.stats("disk")["destaged_lsn"].as_u64().unwrap();
    daemon.kill();
    std::fs::remove_dir_all(first.path()).unwrap();

    let daemon = store.take(second.path(), &OFTEN);
    let reached = opened_lsn(&daemon);
    assert!((promised..=last).contains(&reached), "{reached} is not between {promised} and {last}");
    check_prefix(&mut daemon.attach("disk"), reached);
    let log = daemon.log();
    assert!(log.contains(&format!("state reaches LSN {reached}, written at 20")), "{log}");
    assert!(log.contains("before now)") && log.contains("table=Checkpoint"), "{log}");
    let show = String::from_utf8(daemon.run(&["volume", "show", "disk"]).stdout).unwrap();
    assert!(show.contains(&format!("at LSN {reached}, written at 20")), "{show}");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_lost_host_costs_what_status_said_on_a_directory() {
    a_lost_host_costs_what_status_said(&Store::in_a_directory());
}

#[test]
fn a_lost_host_costs_what_status_said_on_s3() {
    let Some(store) = Store::on_s3() else { return };
    a_lost_host_costs_what_status_said(&store);
}

fn no_flushed_write_is_missing(store: &Store) {
    let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut daemon = store.serve(first.path(), &["--checkpoint-chunks", "4"]);
    daemon.json(&["volume", "create", "disk", "--size", "16MiB", "--durability", "object"]);
    let mut client = daemon.attach("disk");
    let mut last = 0;
    for _ in 0..40 {
        for _ in 0..7 {
            last += 1;
            numbered(&mut client, last);
        }
        client.flush().unwrap();
    }
    let flushed = last;
    for _ in 0..20 {
        last += 1;
        numbered(&mut client, last);
    }
    daemon.kill();
    std::fs::remove_dir_all(first.path()).unwrap();
    let daemon = store.take(second.path(), &[]);
    let reached = opened_lsn(&daemon);
    assert!((flushed..=last).contains(&reached), "{reached} is not between {flushed} and {last}");
    check_prefix(&mut daemon.attach("disk"), reached);
}

#[test]
fn no_flushed_write_is_missing_on_a_directory() {
    no_flushed_write_is_missing(&Store::in_a_directory());
}

#[test]
fn no_flushed_write_is_missing_on_s3() {
    let Some(store) = Store::on_s3() else { return };
    no_flushed_write_is_missing(&store);
}

/// A volume with a checkpoint in a directory, not served any more, and what it holds.
fn with_a_checkpoint(store: &Store) -> Shadow {
    let data = tempfile::tempdir().unwrap();
    let mut daemon = store.serve(data.path(), &OFTEN);
    daemon.json(&["volume", "create", "disk", "--size", "32MiB", "--chunk-size", "1MiB"]);
    let mut shadow = Shadow::new(32 * MIB, 4);
    let mut client = daemon.attach("disk");
    for _ in 0..8 {
        shadow.scribble(&mut client, 30);
        shadow.flush(&mut client);
        daemon.wait_drained("disk");
    }
    let lsn = daemon.stats("disk")["checkpoint_lsn"].as_u64().unwrap();
    shadow.scribble(&mut client, 50);
    shadow.flush(&mut client);
    daemon.wait_drained("disk");
    wait_for_checkpoint(&daemon, lsn);
    daemon.kill();
    shadow
}

#[test]
fn a_damaged_checkpoint_is_made_up_for_by_headers_or_named() {
    let store = Store::in_a_directory();
    let shadow = with_a_checkpoint(&store);
    for file in store.files("checkpoints") {
        let mut bytes = std::fs::read(&file).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        std::fs::write(&file, bytes).unwrap();
    }
    let data = tempfile::tempdir().unwrap();
    // None of its own, lest there be a good one before the end of this.
    let daemon = store.take(data.path(), &["--checkpoint-chunks", "100000"]);
    assert!(daemon.log().contains("made of chunk headers instead"), "{}", daemon.log());
    shadow.check_all(&mut daemon.attach("disk"));
    drop(daemon);

    // Without a chunk that would have made up for it the volume does not open, and says what to do.
    let manifest = std::fs::read(store.manifest()).unwrap();
    let chunks = store.files("chunks");
    let missing =
        chunks.iter().find(|path| path.to_string_lossy().ends_with("0000000000000001-0000000000000002")).unwrap();
    let kept = std::fs::read(missing).unwrap();
    std::fs::remove_file(missing).unwrap();
    let data = tempfile::tempdir().unwrap();
    let mut daemon = store.take(data.path(), &["--checkpoint-chunks", "100000"]);
    let error = daemon.volume("disk")["error"].as_str().unwrap().to_owned();
    let name = missing.file_name().unwrap().to_str().unwrap();
    assert!(error.contains("blockd volume rebuild disk") && error.contains(name), "{error}");
    // A rebuild would take it for deleted, as the checkpoint may have known it to be.
    std::fs::write(missing, kept).unwrap();
    daemon.json(&["volume", "rebuild", "disk"]);
    shadow.check_all(&mut daemon.attach("disk"));
    assert!(daemon.refused(&["volume", "rebuild", "disk"]).contains("is open"));
    assert!(daemon.log().contains("names no checkpoint any more"), "{}", daemon.log());
    assert_ne!(std::fs::read(store.manifest()).unwrap(), manifest);
    daemon.restart();
    shadow.check_all(&mut daemon.attach("disk"));
}

#[test]
fn an_idle_volume_makes_no_request_and_old_objects_do_not_pile_up() {
    let store = Store::in_a_directory();
    drop(with_a_checkpoint(&store));
    let data = tempfile::tempdir().unwrap();
    let daemon = store.take(data.path(), &["--checkpoint-age", "1s"]);
    wait_for_checkpoint(&daemon, daemon.stats("disk")["opened_lsn"].as_u64().unwrap());
    std::thread::sleep(Duration::from_secs(1));
    let requests = |daemon: &Daemon| daemon.json(&["status"])["store"].clone();
    let before = requests(&daemon);
    std::thread::sleep(Duration::from_secs(4));
    assert_eq!(requests(&daemon), before);
    assert_eq!(daemon.stop(), Some(0));
    assert_eq!(daemon_less_check(&store).0, Some(0));
}

/// Exit code and report of a check without any data directory.
fn daemon_less_check(store: &Store) -> (Option<i32>, Value) {
    let nowhere = tempfile::tempdir().unwrap();
    let output = common::daemon::program()
        .args(["volume", "check", "disk", "--json", "--data-dir"])
        .arg(nowhere.path())
        .args(&store.args)
        .output()
        .unwrap();
    let report = serde_json::from_slice(&output.stdout);
    let said = String::from_utf8_lossy(&output.stderr);
    (output.status.code(), report.unwrap_or_else(|e| panic!("{e}: {said}")))
}
