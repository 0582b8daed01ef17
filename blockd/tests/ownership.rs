//! Two daemons on one bucket: who may have a volume, what becomes of it when both want it, and what an old owner may do.

mod common;

use std::path::Path;
use std::time::{Duration, Instant};

use blockd::export::nbd::client::{NbdClient, Request};
use common::daemon::{Daemon, wait};
use common::shadow::Shadow;
use common::shared::Shared;
use serde_json::Value;

const MIB: usize = 1 << 20;
/// Long enough not to run out on a busy machine.
const LONG: &str = "1h";
const SHORT: &str = "2s";

fn serve(shared: &Shared, host: &str, lease: &str, more: &[&str]) -> Daemon {
    shared.serve(host, &[&["--lease", lease], more].concat())
}

fn state(daemon: &Daemon, name: &str) -> Value {
    daemon.json(&["volume", "show", name])["state"].clone()
}

#[test]
fn a_held_volume_is_refused_until_it_is_released() {
    let shared = Shared::new(&[]);
    let mut north = serve(&shared, "north", LONG, &["--destage-age", "1h"]);
    north.json(&["volume", "create", "disk", "--size", "16MiB", "--chunk-size", "1MiB"]);
    let mut shadow = Shadow::new(16 * MIB, 1);
    let mut client = north.attach("disk");
    shadow.scribble(&mut client, 50);
    shadow.flush(&mut client);

    let mut south = serve(&shared, "south", LONG, &[]);
    assert!(south.ready.contains("0 of 1 volumes open"), "{}", south.ready);
    assert_eq!(state(&south, "disk"), "held");
    let listed = String::from_utf8(south.run(&["volume", "list"]).stdout).unwrap();
    assert!(listed.contains("held by "), "{listed}");
    for command in [&["volume", "open", "disk"][..], &["volume", "delete", "disk", "--yes"]] {
        let said = south.refused(command);
        assert!(said.contains("is held by ") && said.contains("`blockd volume release disk`"), "{said}");
        assert!(said.contains("--force"), "{said}");
    }
    assert!(south.refused(&["volume", "resize", "disk", "32MiB"]).contains("is held"));
    assert!(NbdClient::connect_unix(south.data().join("nbd.sock"), "disk").is_err());
    assert!(south.refused(&["volume", "release", "disk"]).contains("not this host's"));

    assert!(north.refused(&["volume", "release", "disk"]).contains("1 client connection"));
    assert_eq!(state(&north, "disk"), "open");
    shadow.scribble(&mut client, 5);
    drop(client);
    assert!(wait(Duration::from_secs(10), || north.volume("disk")["clients"] == 0));
    // Nothing but the release sends anything.
    assert!(north.stats("disk")["dirty_bytes"].as_u64().unwrap() > 0);
    assert_eq!(north.json(&["volume", "release", "disk"])["state"], "released");
    assert!(NbdClient::connect_unix(north.data().join("nbd.sock"), "disk").is_err());

    // A restart does not take it back.
    north.restart();
    assert_eq!(state(&north, "disk"), "released");
    let opened = south.json(&["volume", "open", "disk"]);
    assert_eq!((&opened["state"], &opened["notice"]), (&"open".into(), &Value::Null));
    let mut client = south.attach("disk");
    shadow.check_all(&mut client);
    shadow.scribble(&mut client, 20);
    shadow.flush(&mut client);
    drop(client);
    assert!(north.refused(&["volume", "open", "disk"]).contains("is held by "));

    // A crash and a restart keep it; so does an orderly stop, which says what only this host has.
    south.restart();
    assert!(south.ready.contains("1 of 1 volumes open"), "{}", south.ready);
    shadow.check_all(&mut south.attach("disk"));
    assert_eq!(south.stop_in_place(), Some(0));
    assert!(north.refused(&["volume", "open", "disk"]).contains("is held by "));
    south.restart_with(|args| args.push("--release-on-stop".into()));
    assert_eq!(south.stop_in_place(), Some(0));
    assert_eq!(north.json(&["volume", "open", "disk"])["state"], "open");
    shadow.check_all(&mut north.attach("disk"));
    north.json(&["volume", "delete", "disk", "--yes"]);
    assert!(!shared.dir.path().join("bucket/volumes/disk/lease").exists());
}

#[test]
fn a_stop_says_what_the_bucket_does_not_have() {
    let shared = Shared::new(&[]);
    let mut north = serve(&shared, "north", LONG, &["--destage-age", "1h"]);
    north.json(&["volume", "create", "disk", "--size", "4MiB"]);
    let mut client = north.attach("disk");
    client.write(0, &[1; 8192]).unwrap();
    drop(client);
    assert_eq!(north.stop_in_place(), Some(0));
    let log = north.log();
    assert!(log.contains("8KiB in writes 1 to 1 are only in this host's log"), "{log}");
    let south = serve(&shared, "south", LONG, &[]);
    let said = south.refused(&["volume", "open", "disk"]);
    assert!(said.contains("may hold, in its log only: up to 8KiB in writes 1 to 1"), "{said}");
}

/// Writes numbered blocks one after the other until one fails; returns how many were answered.
fn write_until_refused(client: &mut NbdClient, from: u32) -> u32 {
    for n in from.. {
        let mut block = [0; 4096];
        block[..4].copy_from_slice(&n.to_le_bytes());
        if client.write(u64::from(n % 256) * 4096, &block).is_err() {
            return n;
        }
    }
    unreachable!()
}

/// The numbered writes whose effect is seen on `client`: all up to the number returned, and none after it.
fn prefix_seen(client: &mut NbdClient) -> u32 {
    let mut found = vec![0; 256 * 4096];
    client.read(0, &mut found).unwrap();
    let numbers: Vec<u32> =
        found.chunks(4096).map(|block| u32::from_le_bytes(block[..4].try_into().unwrap())).collect();
    let last = *numbers.iter().max().unwrap();
    for n in last.saturating_sub(255).max(1)..=last {
        assert_eq!(numbers[n as usize % 256], n, "write {n} of {last} is missing: {numbers:?}");
    }
    last
}

fn forced_takeover(store: &dyn Fn(&str, &[&str]) -> Daemon, dir: &Path) {
    let mut north = store("north", &["--destage-age", "300ms"]);
    north.json(&["volume", "create", "disk", "--size", "1MiB", "--chunk-size", "1MiB"]);
    let mut client = north.attach("disk");
    let writer = std::thread::spawn(move || {
        let answered = write_until_refused(&mut client, 1);
        let read = client.read(0, &mut [0; 4096]);
        let flush = client.flush();
        (answered, read, flush)
    });
    assert!(wait(Duration::from_secs(20), || north.stats("disk")["chunks"].as_u64().unwrap_or(0) > 3));
    let south = store("south", &[]);
    let before = north.stats("disk");
    let opened = south.json(&["volume", "open", "disk", "--force"]);
    let notice = opened["notice"].as_str().unwrap();
    assert!(notice.contains("was taken over from ") && notice.contains("by force"), "{notice}");
    assert!(notice.contains("may hold, in its log only: "), "{notice}");

    let (refused_at, read, flush) = writer.join().unwrap();
    assert!(read.is_err() && flush.is_err(), "a fenced owner answered");
    let fenced = wait(Duration::from_secs(20), || state(&north, "disk") == "fenced");
    assert!(fenced, "{}\n{}", north.volume("disk"), north.log());
    let error = north.volume("disk")["error"].as_str().unwrap().to_owned();
    assert!(error.contains("took volume \"disk\" over at "), "{error}");
    assert!(NbdClient::connect_unix(north.data().join("nbd.sock"), "disk").is_err());

    // A prefix of history, no older than what status said before.
    let mut client = south.attach("disk");
    let seen = prefix_seen(&mut client);
    let lag = before["accepted_lsn"].as_u64().unwrap() - before["destaged_lsn"].as_u64().unwrap();
    assert!(u64::from(seen) + lag >= before["accepted_lsn"].as_u64().unwrap(), "{seen} {before}");
    assert!(seen < refused_at);
    client.write(0, &[0xEE; 4096]).unwrap();
    client.flush().unwrap();
    south.wait_drained("disk");

    // The old owner comes back: nothing of its own is lost silently.
    north.restart();
    assert!(north.ready.contains("0 of 1 volumes open"), "{}", north.ready);
    assert_eq!(state(&north, "disk"), "fenced");
    let stranded = north.json(&["volume", "stranded", "list"])[0].clone();
    assert_eq!(stranded["first_lsn"], seen + 1, "{stranded}");
    let last = stranded["last_lsn"].as_u64().unwrap() as u32;
    assert!(last + 1 >= refused_at, "{stranded}: writes up to {} were answered", refused_at - 1);
    assert_eq!(stranded["bytes"], u64::from(last - seen) * 4096);
    let page = north.status_page();
    assert!(page.contains("that never reached the bucket"), "{page}");
    for force in [&[][..], &["--force"]] {
        let said = north.refused(&[&["volume", "open", "disk"], force].concat());
        assert!(said.contains("volume stranded export disk"), "{said}");
    }
    let image = dir.join("lost.raw");
    let image_arg = image.to_str().unwrap();
    north.json(&["volume", "stranded", "export", "disk", image_arg]);
    let bytes = std::fs::read(&image).unwrap();
    assert_eq!(bytes.len(), MIB);
    for n in (last.saturating_sub(255).max(seen + 1))..=last {
        assert_eq!(bytes[n as usize % 256 * 4096..][..4], n.to_le_bytes(), "write {n}");
    }
    let list = std::fs::read_to_string(dir.join("lost.raw.list")).unwrap();
    assert_eq!(list.lines().count() as u32, last - seen + 2, "{list}");
    assert!(north.refused(&["volume", "stranded", "export", "disk", image_arg]).contains("File exists"));

    assert!(north.refused(&["volume", "stranded", "discard", "disk"]).contains("--yes"));
    let aside = north.json(&["volume", "stranded", "discard", "disk", "--yes"]);
    assert_eq!((&aside["set_aside"], &aside["last_lsn"]), (&Value::Bool(true), &stranded["last_lsn"]));
    // Still to be had, and applied to a copy.
    let copy = dir.join("copy.raw");
    std::fs::write(&copy, vec![9; MIB]).unwrap();
    north.json(&["volume", "stranded", "export", "disk", copy.to_str().unwrap(), "--apply"]);
    assert_eq!(std::fs::read(&copy).unwrap()[last as usize % 256 * 4096..][..4], last.to_le_bytes());

    drop(client);
    assert_eq!(south.json(&["volume", "release", "disk", "--force"])["state"], "released");
    assert_eq!(north.json(&["volume", "open", "disk"])["state"], "open");
    let mut client = north.attach("disk");
    let mut block = [0; 4096];
    client.read(0, &mut block).unwrap();
    assert_eq!(block, [0xEE; 4096]);
}

#[test]
fn a_forced_takeover_fences_an_owner_that_is_writing() {
    let shared = Shared::new(&[]);
    // The directory store has room for a lease that is renewed often.
    forced_takeover(&|host, more| serve(&shared, host, SHORT, more), shared.dir.path());
}

#[test]
fn a_forced_takeover_on_s3_fences_an_owner_that_is_writing() {
    let (Ok(endpoint), Ok(bucket)) = (std::env::var("BLOCKD_TEST_S3_ENDPOINT"), std::env::var("BLOCKD_TEST_S3_BUCKET"))
    else {
        return eprintln!("skipped: no S3 server; run  eval \"$(scripts/dev-s3 start)\"  first");
    };
    let url = format!("s3://{bucket}/ownership-{}", uuid::Uuid::new_v4().simple());
    let tmp = tempfile::tempdir().unwrap();
    let serve = |host: &str, more: &[&str]| {
        let args = ["--store", &url, "--s3-endpoint", &endpoint, "--lease", "5s", "--read-cache", "0"];
        Daemon::start(&tmp.path().join(host), &[&args, more].concat())
    };
    forced_takeover(&serve, tmp.path());
}

/// With a long lease nothing tells an owner that it was cut off, until it does something.
#[test]
fn an_owner_that_does_not_know_that_it_was_cut_off_changes_nothing() {
    let shared = Shared::new(&[]);
    let north = serve(&shared, "north", LONG, &["--destage-age", "1h"]);
    let busy = serve(&shared, "busy", LONG, &["--destage-age", "100ms"]);
    for (daemon, name) in [(&north, "idle"), (&north, "gone"), (&busy, "disk")] {
        daemon.json(&["volume", "create", name, "--size", "1MiB"]);
        let mut client = daemon.attach(name);
        client.write(0, &[1; 4096]).unwrap();
        client.flush().unwrap();
    }
    busy.wait_drained("disk");
    let south = serve(&shared, "south", LONG, &[]);
    for name in ["idle", "gone", "disk"] {
        south.json(&["volume", "open", name, "--force"]);
        south.attach(name).write(8192, &[2; 4096]).unwrap();
    }
    let said = north.refused(&["volume", "resize", "idle", "2MiB"]);
    assert!(said.contains("another host has volume \"idle\" now"), "{said}");
    let said = north.refused(&["volume", "delete", "gone", "--yes", "--force"]);
    assert!(said.contains("was not deleted") && said.contains("another host has volume"), "{said}");
    // A chunk meets the seal.
    let mut client = busy.attach("disk");
    let answered = write_until_refused(&mut client, 1);
    assert!(answered > 1);
    assert!(wait(Duration::from_secs(20), || state(&busy, "disk") == "fenced"), "{}", busy.log());
    let why = busy.volume("disk")["error"].as_str().unwrap().to_owned();
    assert!(why.contains("took volume \"disk\" over at "), "{why}");
    let mut stranded = Value::Null;
    let found = wait(Duration::from_secs(20), || {
        stranded = busy.volume("disk")["stranded"].clone();
        !stranded.is_null()
    });
    assert!(found && stranded["writes"].as_u64().unwrap() + 1 >= u64::from(answered), "{stranded}");
    for name in ["idle", "gone", "disk"] {
        south.wait_drained(name);
        let volume = south.volume(name);
        assert_eq!((&volume["state"], &volume["size"]), (&"open".into(), &MIB.into()), "{volume}");
        let mut block = [0; 4096];
        south.attach(name).read(8192, &mut block).unwrap();
        assert_eq!(block, [2; 4096]);
    }
}

#[test]
fn an_owner_stopped_beyond_its_lease_answers_nothing_wrong() {
    let shared = Shared::new(&[]);
    let north = serve(&shared, "north", SHORT, &["--destage-age", "100ms"]);
    north.json(&["volume", "create", "disk", "--size", "1MiB"]);
    let mut client = north.attach("disk");
    client.write(0, &[1; 4096]).unwrap();
    client.flush().unwrap();
    north.wait_drained("disk");
    let south = serve(&shared, "south", SHORT, &[]);
    north.signal(libc::SIGSTOP);
    // It takes a moment until every thread stands still.
    std::thread::sleep(Duration::from_millis(200));
    // Asked while it stands still: answered, if at all, after another host has written.
    client.submit(Request::Read { offset: 0, len: 4096 }).unwrap();
    client.submit(Request::Write { offset: 4096, data: &[5; 4096], fua: true }).unwrap();
    client.send_queued().unwrap();
    let mut opened = false;
    assert!(
        wait(Duration::from_secs(60), || {
            opened = opened || south.run(&["volume", "open", "disk"]).status.success();
            opened
        }),
        "{}",
        south.log()
    );
    assert!(south.volume("disk")["notice"].as_str().unwrap().contains("its lease had run out"));
    let mut other = south.attach("disk");
    other.write(0, &[2; 4096]).unwrap();
    other.flush().unwrap();
    north.signal(libc::SIGCONT);
    for _ in 0..2 {
        let (_, result) = client.next_reply().unwrap();
        assert!(result.is_err(), "a fenced owner answered");
    }
    assert!(client.read(0, &mut [0; 4096]).is_err());
    assert!(wait(Duration::from_secs(20), || state(&north, "disk") == "fenced"), "{}", north.log());
    // Nothing was stranded: the write that came late was never accepted.
    assert_eq!(north.json(&["volume", "stranded", "list"]), Value::Array(Vec::new()));
    let mut block = [0; 4096];
    other.read(4096, &mut block).unwrap();
    assert_eq!(block, [0; 4096]);
}

#[test]
fn requests_wait_while_the_lease_cannot_be_renewed() {
    let shared = Shared::new(&[]);
    let north = serve(&shared, "north", SHORT, &["--destage-age", "100ms"]);
    north.json(&["volume", "create", "disk", "--size", "1MiB"]);
    let mut client = north.attach("disk");
    client.write(0, &[1; 4096]).unwrap();
    client.flush().unwrap();
    north.wait_drained("disk");
    let (bucket, away) = (shared.dir.path().join("bucket"), shared.dir.path().join("away"));
    std::fs::rename(&bucket, &away).unwrap();
    let suspended = || north.stats("disk")["suspended"] == true;
    assert!(wait(Duration::from_secs(20), suspended), "{}", north.log());
    let page = north.status_page();
    assert!(page.contains("disk: suspended: its lease could not be renewed"), "{page}");
    let begun = Instant::now();
    client.submit(Request::Write { offset: 4096, data: &[2; 4096], fua: true }).unwrap();
    client.submit(Request::Read { offset: 0, len: 4096 }).unwrap();
    client.submit(Request::Flush).unwrap();
    client.set_timeout(Some(Duration::from_secs(3)));
    assert_eq!(client.next_reply().unwrap_err().kind(), std::io::ErrorKind::TimedOut);
    std::fs::rename(&away, &bucket).unwrap();
    client.set_timeout(Some(Duration::from_secs(60)));
    for _ in 0..3 {
        client.next_reply().unwrap().1.unwrap();
    }
    assert!(begun.elapsed() > Duration::from_secs(3));
    assert!(wait(Duration::from_secs(20), || !suspended()));
    let mut found = [0; 8192];
    client.read(0, &mut found).unwrap();
    assert!(found[..4096] == [1; 4096] && found[4096..] == [2; 4096]);
}
