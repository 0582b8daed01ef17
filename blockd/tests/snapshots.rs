//! Snapshots of real daemons on a bucket they share: views, clones, restores, and deletion in any order.

mod common;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use common::daemon::{Daemon, program, wait};
use common::shadow::Shadow;
use common::shared::Shared;

const MIB: usize = 1 << 20;

const ARGS: [&str; 2] = ["--destage-age", "200ms"];

fn create(daemon: &Daemon, more: &[&str]) {
    let args = ["volume", "create", "disk", "--size", "8MiB", "--chunk-size", "1MiB"];
    daemon.json(&[&args, more].concat());
}

/// What is wrong with a volume in the bucket, or is nobody's.
fn findings(shared: &Shared, name: &str) -> Vec<serde_json::Value> {
    let none = shared.dir.path().join("none");
    let args = ["volume", "check", name, "--json", "--data", "--grace", "0s", "--store", &shared.url, "--data-dir"];
    let output = program().args(args).arg(none).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{e}: {said}"));
    report["findings"].as_array().unwrap().clone()
}

/// Nothing is wrong with a volume, and nothing is nobody's but what the owner's next sweep removes.
fn check(shared: &Shared, name: &str) {
    // A checkpoint that an earlier epoch made and a later one replaced goes minutes after the owner's next one.
    let waits = |found: &&serde_json::Value| {
        found["kind"] == "orphan" && found["object"].as_str().is_some_and(|key| key.starts_with("checkpoints/"))
    };
    let mut wrong = findings(shared, name);
    wrong.retain(|found| !waits(&found));
    assert!(wrong.is_empty(), "{name}: {wrong:?}");
}

/// The same, after a sweep.
fn check_swept(shared: &Shared, name: &str) {
    let mut wrong = Vec::new();
    let swept = wait(Duration::from_secs(60), || {
        wrong = findings(shared, name);
        wrong.is_empty()
    });
    assert!(swept, "{name}: {wrong:?}");
}

#[test]
fn snapshots_are_made_listed_and_deleted() {
    let shared = Shared::new(&ARGS);
    let mut daemon = shared.serve("north", &[]);
    create(&daemon, &[]);
    let made = daemon.json(&["snapshot", "create", "disk@empty"]);
    assert_eq!((&made["seq"], &made["lsn"]), (&0.into(), &0.into()));
    let mut shadow = Shadow::new(8 * MIB, 1);
    let mut client = daemon.attach("disk");
    shadow.scribble(&mut client, 40);
    let made = daemon.json(&["snapshot", "create", "disk@one"]);
    assert_eq!(made["lsn"], daemon.stats("disk")["accepted_lsn"], "all that was accepted is in it");
    assert!(daemon.refused(&["snapshot", "create", "disk@one"]).contains("already"));
    assert!(daemon.refused(&["snapshot", "delete", "disk@two"]).contains("no snapshot"));
    let listed = daemon.json(&["snapshot", "list", "disk"]);
    assert_eq!(listed.as_array().unwrap().len(), 2, "{listed}");
    let page = String::from_utf8(daemon.run(&["volume", "show", "disk"]).stdout).unwrap();
    assert!(page.contains("snapshot    one, 8 MiB, made "), "{page}");
    drop(client);
    daemon.restart();
    assert_eq!(daemon.json(&["snapshot", "list"]).as_array().unwrap().len(), 2);
    for name in ["disk@one", "disk@empty"] {
        daemon.json(&["snapshot", "delete", name]);
    }
    assert_eq!(daemon.json(&["snapshot", "list"]).as_array().unwrap().len(), 0);
    shadow.check_all(&mut daemon.attach("disk"));
    daemon.json(&["volume", "delete", "disk", "--yes"]);
    for prefix in ["chunks", "checkpoints", "volumes"] {
        assert_eq!(shared.objects(prefix), Vec::<PathBuf>::new());
    }
}

/// All of an export.
fn contents(daemon: &Daemon, export: &str) -> Vec<u8> {
    let mut client = daemon.attach(export);
    let mut found = vec![0; 8 * MIB];
    for (at, part) in (0..).step_by(MIB).zip(found.chunks_mut(MIB)) {
        client.read(at, part).unwrap();
    }
    found
}

fn wait_detached(daemon: &Daemon) {
    assert!(wait(Duration::from_secs(10), || daemon.volume("disk")["clients"] == 0));
}

#[test]
fn a_snapshot_is_read_on_any_host_and_never_changes() {
    let shared = Shared::new(&ARGS);
    let daemon = shared.serve("north", &[]);
    create(&daemon, &[]);
    let mut shadow = Shadow::new(8 * MIB, 2);
    let mut client = daemon.attach("disk");
    let mut kept = Vec::new();
    for n in 0..3 {
        shadow.scribble(&mut client, 30);
        daemon.json(&["snapshot", "create", &format!("disk@s{n}")]);
        kept.push(shadow.bytes().to_vec());
    }
    shadow.scribble(&mut client, 100);
    daemon.wait_drained("disk");
    let south = shared.serve("south", &[]);
    for (n, kept) in kept.iter().enumerate() {
        for host in [&daemon, &south] {
            assert!(contents(host, &format!("disk@s{n}")) == *kept, "snapshot {n} differs");
        }
    }
    let mut view = south.attach("disk@s1");
    assert!(view.write(0, &[1; 4096]).is_err() && view.trim(0, 4096).is_err(), "it is read-only");
    let mut block = vec![0; 4096];
    view.read(0, &mut block).unwrap();
    assert_eq!(block, kept[1][..4096]);
    let mut odd = vec![0; 5000];
    view.read(4000, &mut odd).unwrap();
    assert_eq!(odd, kept[1][4000..9000]);

    let mut own = daemon.attach("disk@s2");
    own.read(0, &mut block).unwrap();
    assert!(daemon.refused(&["snapshot", "delete", "disk@s2"]).contains("1 client connection"));
    drop(own);
    shadow.check_all(&mut client);
}

/// Numbers blocks one after the other until it is told to stop; whatever is seen must be a prefix of that.
#[test]
fn a_snapshot_under_a_writer_is_one_prefix() {
    const BLOCKS: u64 = 256;
    let shared = Shared::new(&ARGS);
    let daemon = shared.serve("north", &[]);
    create(&daemon, &[]);
    let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let writer = {
        let (stop, written, mut client) = (stop.clone(), written.clone(), daemon.attach("disk"));
        std::thread::spawn(move || {
            for n in 1.. {
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                let block: Vec<u8> = u64::to_le_bytes(n).into_iter().cycle().take(4096).collect();
                client.write(n % BLOCKS * 4096, &block).unwrap();
                written.store(n, Ordering::SeqCst);
            }
        })
    };
    let mut least = Vec::new();
    for n in 0..5 {
        std::thread::sleep(Duration::from_millis(150));
        let before = written.load(Ordering::SeqCst);
        daemon.json(&["snapshot", "create", &format!("disk@s{n}")]);
        least.push((before, written.load(Ordering::SeqCst)));
    }
    stop.store(true, Ordering::Relaxed);
    writer.join().unwrap();
    for (n, (before, after)) in least.into_iter().enumerate() {
        let found = contents(&daemon, &format!("disk@s{n}"));
        let number = |block: &[u8]| u64::from_le_bytes(block[..8].try_into().unwrap());
        let numbers: Vec<u64> = found.chunks(4096).take(BLOCKS as usize).map(number).collect();
        let last = *numbers.iter().max().unwrap();
        assert!((before..=after + 1).contains(&last), "snapshot {n} ends at {last}, not in {before}..={after}");
        for (block, &number) in (0..).zip(&numbers) {
            let expected = (0..=last).rev().take(BLOCKS as usize).find(|n| n % BLOCKS == block).unwrap_or(0);
            assert_eq!(number, expected, "block {block} of snapshot {n}, which ends at {last}");
        }
    }
}

#[test]
fn clones_share_and_go_in_any_order() {
    for order in [["disk", "one", "two"], ["two", "one", "disk"], ["one", "disk", "two"], ["disk", "two", "one"]] {
        let shared = Shared::new(&ARGS);
        let (north, south) = (shared.serve("north", &[]), shared.serve("south", &[]));
        create(&north, &[]);
        let mut shadow = Shadow::new(8 * MIB, 3);
        let mut client = north.attach("disk");
        shadow.scribble(&mut client, 40);
        north.json(&["snapshot", "create", "disk@gold"]);
        let gold = shadow.bytes().to_vec();
        shadow.scribble(&mut client, 40);
        drop(client);

        // On another host, which does not own the origin.
        let made = south.json(&["volume", "clone", "disk@gold", "one"]);
        assert_eq!(made["state"], "open");
        assert!(contents(&south, "one") == gold);
        assert!(south.refused(&["volume", "clone", "disk@gold", "one"]).contains("exists already"));
        assert!(south.refused(&["volume", "clone", "disk@none", "three"]).contains("no snapshot"));
        let mut client = south.attach("one");
        let mut changed = gold.clone();
        for (n, at) in [0, 5 * MIB, 7 * MIB].into_iter().enumerate() {
            client.write(at as u64, &[n as u8 + 1; 4096]).unwrap();
            changed[at..at + 4096].fill(n as u8 + 1);
        }
        drop(client);
        south.wait_drained("one");
        let stats = south.stats("one");
        let bytes = |what: &str| stats[what].as_u64().unwrap();
        assert!(bytes("stored_bytes") > 0 && bytes("foreign_bytes") > 100 * bytes("stored_bytes"), "{stats}");
        // A clone of the clone as it is now, by a hidden snapshot.
        south.json(&["volume", "clone", "one", "two"]);
        assert!(contents(&south, "two") == changed);
        assert_eq!(south.json(&["snapshot", "list", "one"])[0]["hidden"], true);
        shadow.check_all(&mut north.attach("disk"));

        let host = |name: &str| if name == "disk" { &north } else { &south };
        for (n, gone) in order.iter().enumerate() {
            if *gone == "disk" && n < 2 {
                north.json(&["snapshot", "delete", "disk@gold"]);
            }
            host(gone).json(&["volume", "delete", gone, "--yes"]);
            for left in &order[n + 1..] {
                check(&shared, left);
                let expected = match *left {
                    "disk" => shadow.bytes(),
                    _ => &changed,
                };
                assert!(contents(host(left), left) == expected, "{left} after {gone} is gone");
            }
        }
        for prefix in ["chunks", "checkpoints", "volumes", "held"] {
            assert_eq!(shared.objects(prefix), Vec::<PathBuf>::new(), "after {order:?}");
        }
    }
}

#[test]
fn a_restore_goes_back_and_keeps_every_snapshot() {
    let soon = ["--checkpoint-age", "1s", "--checkpoint-grace", "10s"];
    let shared = Shared::new(&[ARGS.as_slice(), &soon].concat());
    let mut daemon = shared.serve("north", &[]);
    create(&daemon, &[]);
    let mut shadow = Shadow::new(8 * MIB, 4);
    let mut kept = Vec::new();
    let mut client = daemon.attach("disk");
    for n in 0..3 {
        shadow.scribble(&mut client, 30);
        daemon.json(&["snapshot", "create", &format!("disk@s{n}")]);
        kept.push(shadow.bytes().to_vec());
    }
    shadow.scribble(&mut client, 30);
    let said = daemon.refused(&["volume", "restore", "disk@s0", "--yes"]);
    assert!(said.contains("1 client connection") && said.contains("detach"), "{said}");
    drop(client);
    assert!(daemon.refused(&["volume", "restore", "disk@s9", "--yes"]).contains("no snapshot"));
    wait_detached(&daemon);
    // Back, forth to what had been left behind, and back again, each time with writes after it.
    for n in [0, 2, 1, 1] {
        daemon.json(&["volume", "restore", &format!("disk@s{n}"), "--yes"]);
        assert!(contents(&daemon, "disk") == kept[n], "restored to {n}");
        let mut client = daemon.attach("disk");
        let mut expected = kept[n].clone();
        for block in 0..8 {
            let at = block * MIB / 2;
            client.write(at as u64, &[n as u8 + 100; 4096]).unwrap();
            expected[at..at + 4096].fill(n as u8 + 100);
        }
        drop(client);
        daemon.wait_drained("disk");
        wait_detached(&daemon);
        for (m, kept) in kept.iter().enumerate() {
            assert!(contents(&daemon, &format!("disk@s{m}")) == *kept, "snapshot {m} after the restore to {n}");
        }
        daemon.restart();
        assert!(contents(&daemon, "disk") == expected, "after a restart");
        daemon.restart_as_new_host("disk");
        assert!(contents(&daemon, "disk") == expected, "on another host");
        check(&shared, "disk");
    }
    let expected = contents(&daemon, "disk");
    wait_detached(&daemon);
    // Headers alone tell the same, restores and all.
    daemon.json(&["volume", "release", "disk"]);
    daemon.json(&["volume", "rebuild", "disk"]);
    assert!(contents(&daemon, "disk") == expected, "rebuilt");
    for (n, kept) in kept.iter().enumerate() {
        assert!(contents(&daemon, &format!("disk@s{n}")) == *kept, "snapshot {n} after the rebuild");
    }
    check(&shared, "disk");
    // Checkpoints that restores made and nobody needs any more are removed by whoever has the volume next.
    daemon.attach("disk").write(0, &[1; 4096]).unwrap();
    daemon.wait_drained("disk");
    check_swept(&shared, "disk");
}

/// The snapshot of this name as the manifest has it.
fn snapshot_row(shared: &Shared, volume: &str, snapshot: &str) -> blockd::manifest::Snapshot {
    let path = shared.dir.path().join("bucket").join(blockd::manifest::key(volume));
    let manifest = blockd::manifest::Manifest::decode(&std::fs::read(path).unwrap()).unwrap();
    manifest.snapshot(snapshot).unwrap().clone()
}

#[test]
fn a_clone_is_rebuilt_without_the_checkpoint_it_began_with() {
    for deleted in [false, true] {
        let shared = Shared::new(&[ARGS.as_slice(), &["--checkpoint-age", "1s"]].concat());
        let north = shared.serve("north", &[]);
        create(&north, &[]);
        let mut shadow = Shadow::new(8 * MIB, 6);
        let mut client = north.attach("disk");
        // With a restore in its past, and another after the snapshot.
        shadow.scribble(&mut client, 30);
        north.json(&["snapshot", "create", "disk@old"]);
        Shadow::new(8 * MIB, 7).scribble(&mut client, 30);
        drop(client);
        wait_detached(&north);
        north.json(&["volume", "restore", "disk@old", "--yes"]);
        let mut client = north.attach("disk");
        shadow.scribble(&mut client, 30);
        north.json(&["snapshot", "create", "disk@gold"]);
        let gold = shadow.bytes().to_vec();
        drop(client);
        wait_detached(&north);
        north.json(&["volume", "restore", "disk@old", "--yes"]);
        Shadow::new(8 * MIB, 8).scribble(&mut north.attach("disk"), 30);
        north.wait_drained("disk");

        let mut south = shared.serve("south", &[]);
        south.json(&["volume", "clone", "disk@gold", "one"]);
        let mut changed = gold.clone();
        let mut client = south.attach("one");
        client.write(MIB as u64, &[9; 4096]).unwrap();
        changed[MIB..MIB + 4096].fill(9);
        drop(client);
        south.json(&["snapshot", "create", "one@again"]);
        // One that was written to, one that was not, and one of one that was not.
        for (source, name) in [("one@again", "two"), ("disk@gold", "three"), ("three", "four")] {
            south.json(&["volume", "clone", source, name]);
        }
        south.wait_drained("one");
        let expected = [("one", &changed), ("two", &changed), ("three", &gold), ("four", &gold)];
        let lost = [("disk", "gold"), ("one", "again")].map(|(volume, name)| snapshot_row(&shared, volume, name));
        if deleted {
            // What is left of it stands elsewhere.
            north.json(&["volume", "delete", "disk", "--yes"]);
        }
        assert_eq!(south.stop_in_place(), Some(0));
        for row in lost {
            let key = row.checkpoint.unwrap().object.key();
            std::fs::remove_file(shared.dir.path().join("bucket").join(key)).unwrap();
        }
        let found = findings(&shared, "three");
        let flaws: Vec<_> = found.iter().map(|found| found["kind"].as_str().unwrap()).collect();
        assert_eq!(flaws, ["checkpoint"], "{found:?}");
        // By a host that was not there before, and once more when it is asked for.
        for host in ["west", "east"] {
            let daemon = shared.serve(host, &[]);
            for (name, expected) in expected {
                if host == "west" {
                    daemon.json(&["volume", "open", name, "--force"]);
                } else {
                    daemon.json(&["volume", "release", name]);
                    daemon.json(&["volume", "rebuild", name]);
                }
                assert!(contents(&daemon, name) == *expected, "{name} on {host}");
                assert!(wait(Duration::from_secs(10), || daemon.volume(name)["clients"] == 0));
                daemon.json(&["volume", "release", name]);
            }
            assert_eq!(daemon.stop(), Some(0));
        }
    }
}

#[test]
fn what_is_kept_for_clones_that_are_gone_is_found_by_any_check() {
    let shared = Shared::new(&ARGS);
    let north = shared.serve("north", &[]);
    create(&north, &[]);
    let mut client = north.attach("disk");
    Shadow::new(8 * MIB, 9).scribble(&mut client, 10);
    drop(client);
    wait_detached(&north);
    north.json(&["snapshot", "create", "disk@gold"]);
    north.json(&["volume", "clone", "disk@gold", "one"]);
    north.json(&["volume", "delete", "disk", "--yes"]);
    let [held] = shared.objects("held").try_into().unwrap();
    let kept = std::fs::read(&held).unwrap();
    create(&north, &[]);
    check(&shared, "disk");
    north.json(&["volume", "delete", "one", "--yes"]);
    assert!(!held.exists());
    // As left by whoever wrote it again after others had let go of it, and then did not go on.
    std::fs::write(&held, kept).unwrap();
    let found = findings(&shared, "disk");
    assert_eq!((found.len(), &found[0]["kind"], &found[0]["repairable"]), (1, &"orphan".into(), &true.into()));
    let idle = shared.serve("idle", &[]);
    let data = idle.data().to_owned();
    assert_eq!(idle.stop(), Some(0));
    let args = ["volume", "check", "disk", "--json", "--repair", "--grace", "0s", "--store", &shared.url];
    let output = program().args(args).arg("--data-dir").arg(data).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!held.exists(), "the check removes it although another host has the volume");
    check(&shared, "disk");
}

#[test]
fn an_encrypted_volume_has_snapshots_clones_and_restores() {
    let shared = Shared::new(&ARGS);
    let key = shared.dir.path().join("key");
    std::fs::write(&key, [7; 64]).unwrap();
    let key = key.to_str().unwrap();
    let north = shared.serve("north", &[]);
    create(&north, &["--encrypt", "--key-file", key]);
    let mut shadow = Shadow::new(8 * MIB, 5);
    let mut client = north.attach("disk");
    shadow.scribble(&mut client, 40);
    north.json(&["snapshot", "create", "disk@gold"]);
    let gold = shadow.bytes().to_vec();
    shadow.scribble(&mut client, 10);
    drop(client);
    assert!(contents(&north, "disk@gold") == gold);
    assert!(north.refused(&["volume", "clone", "disk@gold", "copy"]).contains("what is to unlock its clone"));
    let south = shared.serve("south", &[]);
    assert!(south.refused(&["volume", "clone", "disk@gold", "copy", "--key-file", key]).contains("locked"));
    north.json(&["volume", "clone", "disk@gold", "copy", "--key-file", key]);
    assert!(contents(&north, "copy") == gold);
    wait_detached(&north);
    north.json(&["volume", "restore", "disk@gold", "--yes"]);
    assert!(contents(&north, "disk") == gold);
    north.json(&["volume", "delete", "disk", "--yes"]);
    assert!(contents(&north, "copy") == gold);
    north.json(&["volume", "delete", "copy", "--yes"]);
    for prefix in ["chunks", "checkpoints", "volumes", "held"] {
        assert_eq!(shared.objects(prefix), Vec::<PathBuf>::new());
    }
}
