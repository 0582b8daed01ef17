//! The real daemon on a real S3 server that is away, slow to say so, or in trouble.
//!
//! Needs the environment that `scripts/dev-s3 env` prints; without it every test says that it was skipped.

mod common;

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blockd::export::nbd::client::{NbdClient, Request};
use common::daemon::{Daemon, wait, wait_still};
use common::proxy::{Outage, Proxy, Trouble};
use common::shadow::Shadow;
use serde_json::Value;

const MIB: usize = 1 << 20;

/// A part of the test bucket that nobody else uses, behind a proxy of its own.
struct Bucket {
    proxy: Proxy,
    url: String,
    _runtime: tokio::runtime::Runtime,
}

impl Bucket {
    /// `None` without a server.
    fn new() -> Option<Self> {
        let (Ok(endpoint), Ok(bucket)) =
            (std::env::var("BLOCKD_TEST_S3_ENDPOINT"), std::env::var("BLOCKD_TEST_S3_BUCKET"))
        else {
            eprintln!("skipped: no S3 server; run  eval \"$(scripts/dev-s3 start)\"  first");
            return None;
        };
        let upstream = endpoint.strip_prefix("http://").unwrap().parse();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let proxy = runtime.block_on(Proxy::start(upstream.expect("the test endpoint is http://ADDRESS:PORT")));
        let url = format!("s3://{bucket}/trouble-{}", uuid::Uuid::new_v4().simple());
        Some(Self { proxy, url, _runtime: runtime })
    }

    fn args<'a>(&'a self, endpoint: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        let mut args = vec!["--store", &self.url, "--s3-endpoint", endpoint];
        for (flag, value) in [("--s3-timeout", "1s"), ("--read-cache", "0"), ("--destage-age", "200ms")] {
            if !more.contains(&flag) {
                args.extend([flag, value]);
            }
        }
        args.extend(more);
        args
    }

    fn serve(&self, data: &Path, more: &[&str]) -> Daemon {
        Daemon::start(data, &self.args(&self.proxy.url(), more))
    }
}

/// What a daemon on a new host finds in the bucket is what the shadow says.
fn check_on_a_new_host(bucket: &Bucket, shadow: &Shadow) {
    let tmp = tempfile::tempdir().unwrap();
    let daemon = bucket.serve(tmp.path(), &[]);
    daemon.json(&["volume", "open", "disk", "--force"]);
    shadow.check_all(&mut daemon.attach("disk"));
}

#[test]
fn what_is_in_the_bucket_survives_the_end_of_process_and_host() {
    let Some(bucket) = Bucket::new() else { return };
    let tmp = tempfile::tempdir().unwrap();
    let mut daemon = bucket.serve(tmp.path(), &["--read-cache", "16MiB"]);
    daemon.json(&["volume", "create", "disk", "--size", "48MiB", "--chunk-size", "1MiB"]);
    let mut shadow = Shadow::new(48 * MIB, 1);
    let mut client = daemon.attach("disk");
    shadow.write(&mut client, 3 * MIB, 5 * MIB);
    shadow.scribble(&mut client, 100);
    shadow.flush(&mut client);
    daemon.wait_drained("disk");
    daemon.kill();

    daemon.restart();
    let mut client = daemon.attach("disk");
    shadow.check_all(&mut client);
    shadow.scribble(&mut client, 100);
    shadow.flush(&mut client);
    daemon.wait_drained("disk");
    daemon.restart_as_new_host("disk");
    assert!(daemon.ready.contains("0 of 1 volumes open"), "{}", daemon.ready);
    let mut client = daemon.attach("disk");
    shadow.check_all(&mut client);
    // Through the read cache, and then as the owner of the volume.
    shadow.check_all(&mut client);
    shadow.scribble(&mut client, 20);
    shadow.check_all(&mut client);
    assert_eq!(daemon.stop(), Some(0));
}

fn writers_and_readers_go_on(outage: Outage, seed: u64) {
    let Some(bucket) = Bucket::new() else { return };
    let tmp = tempfile::tempdir().unwrap();
    let daemon = bucket.serve(tmp.path(), &[]);
    daemon.json(&["volume", "create", "disk", "--size", "32MiB"]);
    let mut client = daemon.attach("disk");
    let mut shadow = Shadow::new(32 * MIB, seed);
    // Small writes stay in memory when they leave for the bucket.
    for n in 0..64 {
        shadow.write(&mut client, n * 16 * 4096, 4 * 4096);
    }
    shadow.flush(&mut client);
    daemon.wait_drained("disk");

    bucket.proxy.set_outage(outage);
    shadow.slowest = Duration::ZERO;
    let begun = Instant::now();
    let mut stats = Value::Null;
    let mut written = 0;
    while stats["store_trouble"].is_null() || begun.elapsed() < Duration::from_secs(3) {
        assert!(begun.elapsed() < Duration::from_secs(30), "no trouble in {stats}");
        // Half of what the log holds without slowing anybody down.
        if written < 16 * MIB {
            shadow.write(&mut client, 16 * MIB + written % (16 * MIB), MIB / 2);
            shadow.write(&mut client, 8 * MIB + written % (7 * MIB) + 100, 5000);
            shadow.flush(&mut client);
            written += MIB / 2;
        }
        for n in 0..64 {
            shadow.check(&mut client, n * 16 * 4096, 4 * 4096);
        }
        shadow.check(&mut client, 16 * MIB, MIB / 2);
        stats = daemon.stats("disk");
        std::thread::sleep(Duration::from_millis(20));
    }
    // Whoever waited for the bucket would have waited for the outage to end; a busy test machine needs much less.
    assert!(shadow.slowest < Duration::from_millis(2500), "a request took {:?}", shadow.slowest);
    assert!(stats["dirty_bytes"].as_u64().unwrap() as usize >= MIB, "{stats}");
    assert!(stats["behind_seconds"].as_f64().unwrap() > 1.0, "{stats}");
    let page = daemon.status_page();
    assert!(page.contains("! disk: destaging does not get on: "), "{page}");
    assert!(daemon.log().contains("cannot store chunk yet, will retry"), "{}", daemon.log());

    bucket.proxy.set_outage(Outage::None);
    daemon.wait_drained("disk");
    assert!(!daemon.status_page().contains("! "), "{}", daemon.status_page());
    shadow.check_all(&mut client);
    drop(daemon);
    check_on_a_new_host(&bucket, &shadow);
}

#[test]
fn writers_and_readers_go_on_while_the_bucket_hangs_up() {
    writers_and_readers_go_on(Outage::Closing, 2);
}

#[test]
fn writers_and_readers_go_on_while_the_bucket_does_not_answer() {
    writers_and_readers_go_on(Outage::Hanging, 3);
}

#[test]
fn no_client_notices_requests_that_fail_now_and_then() {
    let Some(bucket) = Bucket::new() else { return };
    let tmp = tempfile::tempdir().unwrap();
    // Next to no memory, so that reads go to the bucket as well.
    let small = ["--block-cache", "64KiB", "--read-cache-memory", "0", "--dirty-memory", "1MiB", "--s3-timeout", "3s"];
    let mut daemon = bucket.serve(tmp.path(), &small);
    daemon.json(&["volume", "create", "disk", "--size", "16MiB", "--chunk-size", "1MiB"]);
    let mut client = daemon.attach("disk");
    let mut shadow = Shadow::new(16 * MIB, 4);
    bucket.proxy.forget();
    bucket.proxy.sprinkle(5, 0.2);
    let troubled = || (bucket.proxy.troubled("PUT"), bucket.proxy.troubled("GET"));
    // How many PUTs that makes depends on how much comes together in a chunk.
    for round in 0..250 {
        shadow.scribble(&mut client, 20);
        shadow.flush(&mut client);
        shadow.probe(&mut client, 10);
        if round >= 25 && troubled().0 > 3 {
            break;
        }
    }
    daemon.wait_drained("disk");
    shadow.probe(&mut client, 50);
    let (puts, gets) = troubled();
    assert!(puts > 3 && gets > 10, "only {puts} PUTs and {gets} GETs met trouble");

    // A new host opens the volume through the same troubles.
    daemon.restart_as_new_host("disk");
    shadow.check_all(&mut daemon.attach("disk"));
    assert_eq!(daemon.stop(), Some(0));
}

/// A writer of its own thread: 64 KiB at a time, one after the other.
struct Writer {
    done: Arc<AtomicUsize>,
    thread: std::thread::JoinHandle<(NbdClient, Shadow)>,
}

const STEP: usize = 64 << 10;

impl Writer {
    fn start(mut client: NbdClient, mut shadow: Shadow, bytes: usize) -> Self {
        let done = Arc::new(AtomicUsize::new(0));
        let counter = done.clone();
        let thread = std::thread::spawn(move || {
            for n in 0..bytes / STEP {
                shadow.write(&mut client, n * STEP % shadow.bytes().len(), STEP);
                counter.store((n + 1) * STEP, Ordering::Release);
            }
            (client, shadow)
        });
        Self { done, thread }
    }

    fn done(&self) -> usize {
        self.done.load(Ordering::Acquire)
    }

    /// Waits until no write is answered for three seconds on end; returns how many bytes were.
    fn wait_stuck(&self) -> usize {
        let ended = || self.thread.is_finished();
        let (stuck, last) = wait_still(Duration::from_secs(30), Duration::from_secs(3), || self.done(), ended);
        assert!(stuck && !self.thread.is_finished(), "the writer went on to {} bytes", self.done());
        last
    }
}

const SMALL_LOG: [&str; 6] = ["--log-size", "8MiB", "--log-segment", "1MiB", "--dirty-memory", "1MiB"];

#[test]
fn writers_wait_while_the_log_is_full_and_then_go_on() {
    let Some(bucket) = Bucket::new() else { return };
    let tmp = tempfile::tempdir().unwrap();
    let daemon = bucket.serve(tmp.path(), &SMALL_LOG);
    daemon.json(&["volume", "create", "disk", "--size", "32MiB"]);
    bucket.proxy.set_outage(Outage::Closing);
    let writer = Writer::start(daemon.attach("disk"), Shadow::new(32 * MIB, 6), 32 * MIB);
    let stuck_at = writer.wait_stuck();
    assert!((4 * MIB..8 * MIB).contains(&stuck_at), "the log took {stuck_at} bytes");
    let stats = daemon.stats("disk");
    let fill = stats["log_used_bytes"].as_f64().unwrap() / stats["log_capacity_bytes"].as_f64().unwrap();
    assert!(fill > 0.9, "{stats}");

    // Another client reads what the log holds, most of it no longer in memory, and may flush it.
    let mut reader = daemon.attach("disk");
    let mut same = Shadow::new(32 * MIB, 6);
    let mut found = vec![0; stuck_at];
    found.chunks_mut(STEP).enumerate().for_each(|(n, piece)| reader.read((n * STEP) as u64, piece).unwrap());
    for n in 0..stuck_at / STEP {
        same.expect(n * STEP, STEP);
    }
    assert!(found == same.bytes()[..stuck_at], "a full log reads back wrong");
    reader.flush().unwrap();
    // A second writer waits as well.
    reader.submit(Request::Write { offset: 31 << 20, data: &[9; 4096], fua: true }).unwrap();
    reader.set_timeout(Some(Duration::from_secs(1)));
    assert_eq!(reader.next_reply().unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    assert_eq!(writer.done(), stuck_at);

    bucket.proxy.set_outage(Outage::None);
    let (_client, shadow) = writer.thread.join().unwrap();
    daemon.wait_drained("disk");
    drop(reader);
    drop(daemon);
    // The second writer's block was overwritten by the first's last megabyte, or stands: only that one is uncertain.
    let other = tempfile::tempdir().unwrap();
    let daemon = bucket.serve(other.path(), &[]);
    daemon.json(&["volume", "open", "disk", "--force"]);
    let mut client = daemon.attach("disk");
    shadow.check(&mut client, 0, 31 * MIB);
    shadow.check(&mut client, 31 * MIB + 4096, MIB - 4096);
}

#[test]
fn a_full_log_holds_up_neither_the_end_nor_the_next_start() {
    let Some(bucket) = Bucket::new() else { return };
    let tmp = tempfile::tempdir().unwrap();
    for orderly in [true, false] {
        let mut daemon = bucket.serve(tmp.path(), &SMALL_LOG);
        if orderly {
            daemon.json(&["volume", "create", "disk", "--size", "32MiB"]);
        }
        let begin = if orderly { 7 } else { 8 };
        bucket.proxy.set_outage(if orderly { Outage::Hanging } else { Outage::Closing });
        let mut client = daemon.attach("disk");
        client.set_timeout(None);
        let done = Arc::new(AtomicUsize::new(0));
        let counter = done.clone();
        let thread = std::thread::spawn(move || {
            for n in 0.. {
                if client.write((n * STEP) as u64, &[begin; STEP]).is_err() {
                    return;
                }
                counter.store(n + 1, Ordering::Release);
            }
        });
        let mut last = (0, Instant::now());
        assert!(wait(Duration::from_secs(30), || {
            let now = done.load(Ordering::Acquire);
            if now != last.0 {
                last = (now, Instant::now());
            }
            last.1.elapsed() > Duration::from_secs(1)
        }));
        let begun = Instant::now();
        if orderly {
            assert_eq!(daemon.stop_in_place(), Some(0));
            // Clients get five seconds to leave, and the request to the bucket that runs may take its time.
            assert!(begun.elapsed() < Duration::from_secs(15), "the end took {:?}", begun.elapsed());
        } else {
            daemon.kill();
        }
        thread.join().unwrap();
        bucket.proxy.set_outage(Outage::None);
        daemon.restart();
        assert!(daemon.ready.contains("1 of 1 volumes open"), "{}\n{}", daemon.ready, daemon.log());
        let mut client = daemon.attach("disk");
        let answered = done.load(Ordering::Acquire);
        assert!(answered * STEP > 3 * MIB, "only {answered} writes were answered");
        for n in 0..answered {
            let mut block = [0; STEP];
            client.read((n * STEP) as u64, &mut block).unwrap();
            assert!(block == [begin; STEP], "write {n} of {answered} is gone");
        }
        daemon.wait_drained("disk");
        client.write(0, &[1; 4096]).unwrap();
    }
}

#[test]
fn an_object_flush_waits_for_the_bucket_and_then_survives_the_loss_of_the_host() {
    let Some(bucket) = Bucket::new() else { return };
    let tmp = tempfile::tempdir().unwrap();
    // Nothing but a flush sends anything.
    let mut daemon = bucket.serve(tmp.path(), &["--destage-age", "1h"]);
    daemon.json(&["volume", "create", "disk", "--size", "16MiB", "--durability", "object"]);
    let mut shadow = Shadow::new(16 * MIB, 9);
    for (round, outage) in [Outage::Closing, Outage::Hanging, Outage::None].into_iter().enumerate() {
        let mut client = daemon.attach("disk");
        bucket.proxy.set_outage(outage);
        shadow.scribble(&mut client, 20);
        if outage != Outage::None {
            client.submit(Request::Flush).unwrap();
            client.set_timeout(Some(Duration::from_secs(3)));
            assert_eq!(client.next_reply().unwrap_err().kind(), std::io::ErrorKind::TimedOut, "round {round}");
            // Others read and write meanwhile.
            let mut other = daemon.attach("disk");
            shadow.probe(&mut other, 5);
            shadow.scribble(&mut other, 5);
            bucket.proxy.set_outage(Outage::None);
            client.set_timeout(Some(Duration::from_secs(30)));
            client.next_reply().unwrap().1.unwrap();
            shadow.flush(&mut other);
        } else {
            shadow.flush(&mut client);
        }
        daemon.restart_as_new_host("disk");
        shadow.check_all(&mut daemon.attach("disk"));
    }
    // A write with FUA needs no flush.
    let mut client = daemon.attach("disk");
    client.submit(Request::Write { offset: 5 << 20, data: &[3; 8192], fua: true }).unwrap();
    client.next_reply().unwrap().1.unwrap();
    daemon.restart_as_new_host("disk");
    let mut found = [0; 8192];
    daemon.attach("disk").read(5 << 20, &mut found).unwrap();
    assert!(found == [3; 8192]);
}

#[test]
fn a_start_without_the_bucket_waits_for_it_and_says_so() {
    let Some(bucket) = Bucket::new() else { return };
    let tmp = tempfile::tempdir().unwrap();
    let mut daemon = bucket.serve(tmp.path(), &["--destage-age", "1h"]);
    daemon.json(&["volume", "create", "disk", "--size", "16MiB"]);
    let mut shadow = Shadow::new(16 * MIB, 10);
    let mut client = daemon.attach("disk");
    shadow.scribble(&mut client, 20);
    shadow.flush(&mut client);
    for outage in [Outage::Closing, Outage::Hanging] {
        daemon.kill();
        bucket.proxy.set_outage(outage);
        let expected = format!("the store {} at {} does not answer; see that it runs", bucket.url, bucket.proxy.url());
        daemon.restart_while(|log| {
            let said = || std::fs::read_to_string(log).unwrap();
            let waits = || said().contains(&expected) && said().contains("; trying again in ");
            assert!(wait(Duration::from_secs(60), waits), "{}", said());
            bucket.proxy.set_outage(Outage::None);
        });
        let log = daemon.log();
        assert!(daemon.ready.contains("1 of 1 volumes open"), "{}\n{log}", daemon.ready);
        shadow.check_all(&mut daemon.attach("disk"));
    }
}

#[test]
fn a_start_with_a_bucket_that_is_not_there_fails_and_binds_nothing() {
    let Some(mut bucket) = Bucket::new() else { return };
    let tmp = tempfile::tempdir().unwrap();
    let right = std::mem::replace(&mut bucket.url, "s3://there-is-no-such-bucket/prefix".to_owned());
    let said = Daemon::refused_start(tmp.path(), &bucket.args(&bucket.proxy.url(), &[]));
    assert!(said.contains("cannot open the store s3://there-is-no-such-bucket/prefix: "), "{said}");
    assert!(said.contains("there is no such bucket; create it, or correct its name"), "{said}");
    // Once said, not once by each layer.
    assert_eq!(said.matches("NoSuchBucket").count(), 1, "{said}");
    // The same data directory with the right name.
    bucket.url = right;
    let daemon = bucket.serve(tmp.path(), &[]);
    assert!(daemon.ready.contains("0 of 0 volumes open"), "{}", daemon.ready);
}

#[test]
fn a_volume_out_of_reach_at_the_start_opens_by_itself() {
    let Some(bucket) = Bucket::new() else { return };
    let tmp = tempfile::tempdir().unwrap();
    let mut daemon = bucket.serve(tmp.path(), &[]);
    for name in ["disk", "near"] {
        daemon.json(&["volume", "create", name, "--size", "4MiB"]);
    }
    let mut shadow = Shadow::new(4 * MIB, 11);
    let mut client = daemon.attach("disk");
    shadow.scribble(&mut client, 20);
    shadow.flush(&mut client);
    daemon.kill();
    // More than one operation of the store tries, for one volume.
    for _ in 0..12 {
        bucket.proxy.next_of("GET", "/disk/manifest", Trouble::DropRequest);
    }
    daemon.restart();
    assert!(daemon.ready.contains("1 of 2 volumes open"), "{}\n{}", daemon.ready, daemon.log());
    assert_eq!(daemon.volume("near")["state"], "open");
    let opened = wait(Duration::from_secs(40), || daemon.volume("disk")["state"] == "open");
    assert!(opened, "{}\n{}", daemon.volume("disk"), daemon.log());
    shadow.check_all(&mut daemon.attach("disk"));
}
