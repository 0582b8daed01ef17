//! `blockd volume check` finds damage of every kind that can be planted, and repairs what is safe.

mod common;

use std::path::{Path, PathBuf};

use blockd::buf::AlignedBuf;
use blockd::chunk::{ChunkDraft, ChunkName, Codec, Piece};
use common::daemon::{Daemon, program, wait};
use common::shadow::Shadow;
use serde_json::Value;

const MIB: usize = 1 << 20;

/// A volume in a directory store that was served and is not any more.
struct Case {
    tmp: tempfile::TempDir,
    shadow: Shadow,
}

impl Case {
    fn new() -> Self {
        let tmp = tempfile::tempdir().unwrap();
        let mut case = Self { tmp, shadow: Shadow::new(16 * MIB, 7) };
        let mut daemon = case.serve();
        daemon.json(&["volume", "create", "disk", "--size", "16MiB", "--chunk-size", "1MiB"]);
        let mut client = daemon.attach("disk");
        for round in 0..10 {
            case.shadow.write(&mut client, round * MIB, MIB);
            case.shadow.scribble(&mut client, 10);
            case.shadow.flush(&mut client);
            daemon.wait_drained("disk");
        }
        assert!(wait(std::time::Duration::from_secs(30), || daemon.stats("disk")["checkpoint_seq"].as_u64() > Some(3)));
        assert_eq!(daemon.stop_in_place(), Some(0));
        case
    }

    fn data(&self) -> PathBuf {
        self.tmp.path().join("data")
    }

    fn serve(&self) -> Daemon {
        Daemon::start(&self.data(), &["--checkpoint-chunks", "4", "--destage-age", "100ms"])
    }

    /// Exit code and report of a check.
    fn check(&self, more: &[&str]) -> (Option<i32>, Value) {
        let output = program()
            .args(["volume", "check", "disk", "--json", "--grace", "0s", "--data-dir"])
            .arg(self.data())
            .args(more)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!said.contains("panicked"), "{said}");
        let report = serde_json::from_slice(&output.stdout);
        (output.status.code(), report.unwrap_or_else(|e| panic!("{e}: {said}")))
    }

    /// What a check finds: kind and object.
    fn found(&self, more: &[&str]) -> Vec<(String, String)> {
        let (code, report) = self.check(more);
        let findings = report["findings"].as_array().unwrap();
        assert_eq!(code, Some(i32::from(!findings.is_empty())), "{report}");
        let text = |value: &Value| value.as_str().unwrap().to_owned();
        findings.iter().map(|f| (text(&f["kind"]), text(&f["object"]))).collect()
    }

    fn object(&self, key: &str) -> PathBuf {
        self.data().join("bucket").join(key)
    }

    /// Keys that begin so, in order.
    fn keys(&self, prefix: &str) -> Vec<String> {
        fn walk(root: &Path, dir: &Path, found: &mut Vec<String>) {
            for entry in std::fs::read_dir(dir).into_iter().flatten().map(Result::unwrap) {
                match entry.file_type().unwrap().is_dir() {
                    true => walk(root, &entry.path(), found),
                    false => found.push(entry.path().strip_prefix(root).unwrap().to_str().unwrap().to_owned()),
                }
            }
        }
        let root = self.data().join("bucket");
        let mut found = Vec::new();
        walk(&root, &root.join(prefix), &mut found);
        found.sort_by_key(|key| ChunkName::parse(key).map(|name| (name.epoch, name.seq)));
        found
    }

    /// Runs `test` with an object changed, or away, and puts it back.
    fn with(&self, key: &str, change: impl FnOnce(&mut Vec<u8>) -> bool, test: impl FnOnce()) {
        let path = self.object(key);
        let kept = std::fs::read(&path).unwrap();
        let mut bytes = kept.clone();
        match change(&mut bytes) {
            true => std::fs::write(&path, bytes).unwrap(),
            false => std::fs::remove_file(&path).unwrap(),
        }
        test();
        std::fs::write(&path, kept).unwrap();
    }

    fn table(&self) -> PathBuf {
        let volume = std::fs::read_dir(self.data().join("volumes")).unwrap().next().unwrap().unwrap().path();
        volume.join("table")
    }
}

fn gone(_: &mut Vec<u8>) -> bool {
    false
}

/// Flips a bit at this part of the object.
fn flip(part: f64) -> impl FnOnce(&mut Vec<u8>) -> bool {
    move |bytes| {
        let at = ((bytes.len() - 1) as f64 * part) as usize;
        bytes[at] ^= 1;
        true
    }
}

fn one(kind: &str, object: &str) -> Vec<(String, String)> {
    vec![(kind.to_owned(), object.to_owned())]
}

#[test]
fn damage_of_every_kind_is_found() {
    let case = Case::new();
    let (code, report) = case.check(&["--data"]);
    assert_eq!(code, Some(0), "{report}");
    assert!(report["frames_verified"].as_u64() > Some(100), "{report}");
    assert!(report["checkpoint_files"].as_u64() > Some(2), "{report}");

    let chunks = case.keys("chunks");
    // One that is mapped for certain, and covered by the checkpoint: the first megabyte, if it is whole.
    let live = &chunks[3];
    case.with(live, gone, || assert_eq!(case.found(&[]), one("chunk-missing", live)));
    case.with(live, flip(0.0), || assert_eq!(case.found(&[]), one("chunk-damaged", live)));
    case.with(
        live,
        |bytes| {
            bytes.pop();
            true
        },
        || assert_eq!(case.found(&[]), one("chunk-damaged", live)),
    );
    // A byte of its payload is found only by who reads it.
    case.with(live, flip(0.9), || {
        assert_eq!(case.found(&[]), []);
        assert_eq!(case.found(&["--data"]), one("frame-damaged", live));
    });
    // A chunk that is sound and yet another.
    let name = ChunkName::parse(live).unwrap();
    let draft = ChunkDraft {
        name,
        first_lsn: 1,
        last_lsn: 2,
        codec: Codec::None,
        created_ms: 0,
        pieces: vec![Piece::Data { lba: 4000, data: AlignedBuf::zeroed(4096).into() }],
    };
    let other = draft.encode(None).unwrap().bytes;
    case.with(
        live,
        |bytes| {
            *bytes = other.to_vec();
            true
        },
        || assert_eq!(case.found(&[]), one("chunk-disagrees", live)),
    );

    // Each object of the checkpoint; earlier ones' that nobody was there to delete do not matter.
    let mut needed = Vec::new();
    for key in case.keys("checkpoints") {
        case.with(&key, flip(0.5), || match &case.found(&[])[..] {
            [] => {}
            [found] => {
                assert_eq!(*found, one("checkpoint", &key)[0]);
                needed.push(key.clone());
            }
            more => panic!("{more:?}"),
        });
    }
    assert!(needed.iter().any(|key| key.ends_with(".ckpt")) && needed.iter().any(|key| key.ends_with(".sst")));
    for key in &needed {
        case.with(key, gone, || assert_eq!(case.found(&[]), one("checkpoint", key)));
    }
    case.with("volumes/disk/manifest", flip(0.5), || {
        assert_eq!(case.found(&[]), one("manifest", "volumes/disk/manifest"));
    });
    assert_eq!(case.found(&["--data"]), []);
}

#[test]
fn what_is_safe_is_repaired() {
    let case = Case::new();
    // Epochs 2 and 3, of which nobody wrote anything.
    for _ in 0..2 {
        assert_eq!(case.serve().stop(), Some(0));
    }
    let live = case.keys("chunks");
    let first = ChunkName::parse(&live[0]).unwrap();
    // A zombie's chunk, and what a killed checkpoint left.
    let stray = ChunkName { epoch: 1, seq: live.len() as u64 + 40, ..first }.key();
    let left = format!("checkpoints/{}/0000000000000001-00000000000000ff.sst", first.volume);
    for key in [&stray, &left] {
        std::fs::create_dir_all(case.object(key).parent().unwrap()).unwrap();
        std::fs::write(case.object(key), b"junk").unwrap();
    }
    let found = case.found(&[]);
    // Beside them there are older checkpoints, which nobody was there to delete.
    assert!(found.iter().all(|(kind, _)| kind == "orphan"), "{found:?}");
    assert!([&stray, &left].iter().all(|key| found.contains(&one("orphan", key)[0])), "{found:?}");
    let output = program().args(["volume", "check", "disk", "--data-dir"]).arg(case.data()).output().unwrap();
    assert!(output.status.success(), "they are too young to be called orphans: {output:?}");
    assert!(String::from_utf8_lossy(&output.stdout).contains("nothing is wrong"), "{output:?}");
    let (code, report) = case.check(&["--repair"]);
    assert_eq!(code, Some(0), "{report}");
    assert!(!case.object(&stray).exists() && !case.object(&left).exists());
    assert_eq!(case.found(&[]), []);

    // A checkpoint that is of no use, and this host's table as well: chunk headers make up for both.
    let file = case.keys("checkpoints").into_iter().find(|key| key.ends_with(".sst")).unwrap();
    let mut bytes = std::fs::read(case.object(&file)).unwrap();
    flip(0.5)(&mut bytes);
    std::fs::write(case.object(&file), &bytes).unwrap();
    for entry in std::fs::read_dir(case.table()).unwrap().map(Result::unwrap) {
        if entry.file_name().to_str().unwrap().starts_with("MANIFEST") {
            std::fs::write(entry.path(), b"rot").unwrap();
        }
    }
    let kinds = |found: &[(String, String)]| found.iter().map(|(kind, _)| kind.clone()).collect::<Vec<_>>();
    assert_eq!(kinds(&case.found(&[])), ["checkpoint", "local-table"]);
    // Not as long as a chunk is missing too.
    case.with(&live[1], gone, || {
        let (code, report) = case.check(&["--repair"]);
        assert_eq!(code, Some(1), "{report}");
        let of = |kind| report["findings"].as_array().unwrap().iter().find(|f| f["kind"] == kind).unwrap().clone();
        assert_eq!(of("local-table")["repaired"], true, "{report}");
        assert_eq!(of("checkpoint")["repaired"], false, "{report}");
        assert_eq!(of("chunk-missing")["repairable"], false, "{report}");
    });
    let (code, report) = case.check(&["--repair"]);
    assert_eq!(code, Some(0), "{report}");
    let daemon = case.serve();
    case.shadow.check_all(&mut daemon.attach("disk"));
    // While it is served a check reads, and repairs nothing.
    let output = program().args(["volume", "check", "disk", "--data-dir"]).arg(case.data()).output().unwrap();
    let page = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && page.contains("no translation table of this host was compared"), "{output:?}");
    let refused =
        program().args(["volume", "check", "disk", "--repair", "--data-dir"]).arg(case.data()).output().unwrap();
    assert!(String::from_utf8_lossy(&refused.stderr).contains("uses it"), "{refused:?}");
    assert_eq!(refused.status.code(), Some(1));
}

#[test]
fn copies_by_reference_are_told_and_not_taken_for_damage() {
    let case = Case::new();
    // Checkpoints that an owner left when it was stopped; the next one removes them in time.
    let harmless = |(kind, _): &(String, String)| kind == "orphan";
    let mut daemon = case.serve();
    let read = |daemon: &Daemon| {
        let mut bytes = vec![0; 16 * MIB];
        let mut client = daemon.attach("disk");
        for (i, part) in bytes.chunks_mut(MIB).enumerate() {
            client.read((i * MIB) as u64, part).unwrap();
        }
        bytes
    };
    let before = read(&daemon);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for (from, to, len) in [(0, 8, 4), (9, 13, 2), (8, 12, 1)] {
        let (from, to, len) = ((from * MIB) as u64, (to * MIB) as u64, (len * MIB) as u64);
        let request = blockd::admin::api::CopyRange { from, to, len, durable: true };
        let admin = blockd::cli::Client::new(daemon.data().join("admin.sock"), daemon.data());
        runtime.block_on(admin.copy("disk", &request)).unwrap();
    }
    let referred = daemon.stats("disk")["referred_blocks"].as_u64().unwrap();
    assert!(referred > 1000, "{referred}");
    // Some of the sources and targets go, the others stay.
    let mut client = daemon.attach("disk");
    client.write(MIB as u64, &vec![7; MIB / 2]).unwrap();
    client.write(9 * MIB as u64 + 4096, &[8; 8192]).unwrap();
    let mut expected = before.clone();
    expected.copy_within(0..4 * MIB, 8 * MIB);
    expected.copy_within(9 * MIB..11 * MIB, 13 * MIB);
    expected.copy_within(8 * MIB..9 * MIB, 12 * MIB);
    expected[MIB..MIB + MIB / 2].fill(7);
    expected[9 * MIB + 4096..9 * MIB + 12288].fill(8);
    assert!(read(&daemon) == expected);
    drop(client);
    daemon.wait_drained("disk");
    assert!(wait(std::time::Duration::from_secs(30), || {
        let stats = daemon.stats("disk");
        stats["checkpoint_lsn"] == stats["destaged_lsn"] || stats["checkpoint_seq"].as_u64() > Some(14)
    }));
    assert_eq!(daemon.stop_in_place(), Some(0));
    assert!(case.found(&["--data"]).iter().all(harmless));
    // A chunk that blocks refer to is missed, also where there is nothing but headers.
    let first = case.keys("chunks")[0].clone();
    let kind = |found: Vec<(String, String)>| found.into_iter().map(|(kind, _)| kind).collect::<Vec<_>>();
    case.with(&first, gone, || assert!(kind(case.found(&[])).contains(&"chunk-missing".to_owned())));

    let mut daemon = case.serve();
    assert!(read(&daemon) == expected);
    daemon.json(&["volume", "release", "disk"]);
    daemon.json(&["volume", "rebuild", "disk"]);
    assert!(read(&daemon) == expected);
    assert_eq!(daemon.stop_in_place(), Some(0));
    assert!(case.found(&["--data"]).iter().all(harmless));
}
