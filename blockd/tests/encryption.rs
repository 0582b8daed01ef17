//! Encrypted volumes of a real daemon: what the bucket shows, who gets in, and what becomes of the others.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use blockd::export::nbd::client::NbdClient;
use common::daemon::{Daemon, program};

const PATTERN: &[u8; 32] = b"nobody may find this in a bucket";
const MIB: usize = 1 << 20;

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// Every file below `dir` with its content.
fn files(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.append(&mut files(&path));
        } else {
            let content = fs::read(&path).unwrap();
            found.insert(path, content);
        }
    }
    found
}

fn finds(dir: &Path, what: &[u8]) -> bool {
    files(dir).values().any(|content| content.windows(what.len()).any(|part| part == what))
}

fn chunks(bucket: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let dir = bucket.join("chunks");
    if dir.exists() { files(&dir) } else { BTreeMap::new() }
}

/// What a volume of 8 MiB is filled with.
fn contents() -> Vec<u8> {
    PATTERN.iter().copied().cycle().take(8 * MIB).collect()
}

struct Scene {
    dir: tempfile::TempDir,
}

impl Scene {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn bucket(&self) -> PathBuf {
        self.path("bucket")
    }

    /// A file with a secret.
    fn secret(&self, name: &str, content: &[u8]) -> String {
        fs::write(self.path(name), content).unwrap();
        text(&self.path(name)).to_owned()
    }

    fn start(&self, data: &str, more: &[&str]) -> Daemon {
        let store = format!("dir:{}", self.bucket().display());
        let soon: &[&str] = if more.contains(&"--destage-age") { &[] } else { &["--destage-age", "200ms"] };
        Daemon::start(&self.path(data), &[&["--store", &store], soon, more].concat())
    }

    fn create(&self, daemon: &Daemon, name: &str, more: &[&str]) {
        daemon.json(&[&["volume", "create", name, "--size", "8MiB", "--codec", "none"], more].concat());
    }

    fn fill(&self, daemon: &Daemon, name: &str) {
        let mut client = daemon.attach(name);
        for (i, part) in contents().chunks(MIB).enumerate() {
            client.write((i * MIB) as u64, part).unwrap();
        }
        client.flush().unwrap();
        daemon.wait_drained(name);
    }

    fn check(&self, daemon: &Daemon, name: &str) {
        let out = self.path("out.raw");
        daemon.json(&["volume", "export", name, text(&out), "--force"]);
        assert!(fs::read(&out).unwrap() == contents(), "{name} changed");
    }
}

fn state(daemon: &Daemon, name: &str) -> String {
    daemon.volume(name)["state"].as_str().unwrap().to_owned()
}

#[test]
fn the_bucket_shows_nothing_and_only_the_key_opens() {
    let scene = Scene::new();
    let (right, wrong) = (scene.secret("right", b"open sesame\n"), scene.secret("wrong", b"open barley\n"));
    let daemon = scene.start("a", &[]);
    scene.create(&daemon, "open", &[]);
    scene.fill(&daemon, "open");
    assert!(finds(&scene.bucket(), PATTERN), "the search itself works");
    daemon.json(&["volume", "delete", "open", "--yes"]);
    assert!(!finds(&scene.bucket(), &PATTERN[..8]));

    scene.create(&daemon, "safe", &["--encrypt", "--passphrase-file", &right]);
    scene.create(&daemon, "other", &[]);
    assert_eq!(daemon.volume("safe")["encryption"], "passphrase");
    assert_eq!(daemon.volume("other")["encryption"], serde_json::Value::Null);
    scene.fill(&daemon, "safe");
    scene.check(&daemon, "safe");
    assert!(!finds(&scene.bucket(), &PATTERN[..8]), "plaintext in the bucket");
    assert!(!finds(&scene.bucket(), b"open sesame"));
    assert_eq!(daemon.stop(), Some(0));

    // Without a key, and with wrong ones: this volume is locked, the other goes on, and nothing hides why.
    let wrong_of = format!("safe={wrong}");
    let gone = format!("safe={}", text(&scene.path("gone")));
    for (args, why) in [
        (&[][..], "blockd volume unlock safe"),
        (&["--passphrase-file", &wrong_of], "wrong passphrase"),
        (&["--key-file", &wrong_of], "key file"),
        (&["--passphrase-file", &gone], "cannot read the passphrase file"),
    ] {
        let daemon = scene.start("a", args);
        assert!(daemon.ready.contains("1 of 2 volumes open"), "{}", daemon.ready);
        assert_eq!((state(&daemon, "safe").as_str(), state(&daemon, "other").as_str()), ("locked", "open"));
        let said = daemon.volume("safe")["error"].as_str().unwrap().to_owned();
        assert!(said.contains(why), "{said}");
        let refused = NbdClient::connect_unix(scene.path("a/nbd.sock"), "safe").err().unwrap().to_string();
        assert!(refused.contains("safe") && refused.contains(why), "{refused}");
        daemon.attach("other").write(0, &[1; 4096]).unwrap();
        assert!(
            daemon.refused(&["volume", "unlock", "safe", "--passphrase-file", &wrong]).contains("wrong passphrase")
        );
        assert!(daemon.refused(&["volume", "set", "safe", "--codec", "lz4"]).contains("safe"));
        assert!(daemon.refused(&["volume", "unlock", "other", "--passphrase-file", &right]).contains("not encrypted"));
        assert_eq!(state(&daemon, "safe"), "locked");
        // No terminal and no file.
        assert!(daemon.refused(&["volume", "unlock", "safe"]).contains("BLOCKD_PASSPHRASE"));
        daemon.json(&["volume", "unlock", "safe", "--passphrase-file", &right]);
        scene.check(&daemon, "safe");
        assert_eq!(daemon.stop(), Some(0));
    }

    // Another host has nothing but the bucket and the passphrase.
    let daemon = scene.start("b", &["--passphrase-file", &format!("safe={right}")]);
    daemon.json(&["volume", "open", "safe", "--force"]);
    scene.check(&daemon, "safe");
}

#[test]
fn writes_that_were_only_in_the_log_come_back_with_the_key() {
    let scene = Scene::new();
    let key = scene.secret("key", &[0xa5; 40]);
    let mut daemon = scene.start("a", &["--key-file", &format!("safe={key}"), "--destage-age", "1h"]);
    scene.create(&daemon, "safe", &["--encrypt", "--key-file", &key]);
    let mut client = daemon.attach("safe");
    client.write(4096, &[7; 8192]).unwrap();
    client.flush().unwrap();
    drop(client);
    daemon.kill();
    daemon.restart();
    let mut found = [0; 8192];
    daemon.attach("safe").read(4096, &mut found).unwrap();
    assert_eq!(found, [7; 8192]);
    assert_eq!(daemon.volume("safe")["encryption"], "key file");
}

#[test]
fn a_changed_passphrase_rewrites_no_data() {
    let scene = Scene::new();
    let (old, key) = (scene.secret("old", b"old\n"), scene.secret("key", &[1; 32]));
    let new = scene.secret("new", b"new");
    let mut daemon = scene.start("a", &[]);
    scene.create(&daemon, "safe", &["--encrypt", "--passphrase-file", &old]);
    scene.create(&daemon, "plain", &[]);
    scene.fill(&daemon, "safe");
    let before = chunks(&scene.bucket());
    assert!(daemon.refused(&["volume", "passwd", "plain", "--passphrase-file", &new]).contains("not encrypted"));
    let wrong = ["volume", "passwd", "safe", "--old-passphrase-file", &new, "--passphrase-file", &new];
    assert!(daemon.refused(&wrong).contains("wrong passphrase"));

    // Open, and with a client at work.
    let mut client = daemon.attach("safe");
    let said = daemon.json(&["volume", "passwd", "safe", "--key-file", &key]);
    assert_eq!(said["encryption"], "key file");
    client.write(0, &contents()[..4096]).unwrap();
    client.flush().unwrap();
    drop(client);
    daemon.wait_drained("safe");
    let after = chunks(&scene.bucket());
    assert!(before.iter().all(|(path, content)| after.get(path) == Some(content)), "a chunk was rewritten");
    daemon.restart();
    assert!(daemon.refused(&["volume", "unlock", "safe", "--passphrase-file", &old]).contains("locked by a key file"));

    // Locked: only with what opens it now.
    let locked = ["volume", "passwd", "safe", "--old-passphrase-file", &old, "--passphrase-file", &new];
    assert!(daemon.refused(&locked).contains("locked by a key file"));
    daemon.json(&["volume", "passwd", "safe", "--old-key-file", &key, "--passphrase-file", &new]);
    assert!(daemon.refused(&["volume", "unlock", "safe", "--key-file", &key]).contains("locked by a passphrase"));
    let unlocked = program()
        .args(["volume", "unlock", "safe", "--data", text(&scene.path("a"))])
        .env("BLOCKD_PASSPHRASE", "new")
        .output()
        .unwrap();
    assert!(unlocked.status.success(), "{}", String::from_utf8_lossy(&unlocked.stderr));
    scene.check(&daemon, "safe");

    // Settings of an encrypted volume change like those of any other.
    daemon.json(&["volume", "resize", "safe", "16MiB"]);
    assert_eq!(daemon.json(&["volume", "set", "safe", "--codec", "zstd:2"])["codec"], "zstd:2");
    daemon.restart_with(|args| args.extend(["--passphrase-file".to_owned(), format!("safe={new}")]));
    assert_eq!(daemon.volume("safe")["size"], 16 << 20);
}

#[test]
fn who_lost_the_key_can_still_delete() {
    let scene = Scene::new();
    let key = scene.secret("key", &[3; 64]);
    let mut daemon = scene.start("a", &[]);
    let short = scene.secret("short", &[3; 31]);
    let create = ["volume", "create", "x", "--size", "8MiB", "--encrypt", "--key-file"];
    assert!(daemon.refused(&[&create[..], &[&short]].concat()).contains("at least 32"));
    scene.create(&daemon, "safe", &["--encrypt", "--key-file", &key]);
    scene.fill(&daemon, "safe");
    daemon.restart();
    assert_eq!(state(&daemon, "safe"), "locked");
    daemon.json(&["volume", "delete", "safe", "--yes"]);
    assert!(chunks(&scene.bucket()).is_empty());
    // The name is free, and means another volume with another key.
    scene.create(&daemon, "safe", &[]);
    assert_eq!(daemon.stop(), Some(0));
    // A key for a volume that has none: somebody may have replaced its manifest.
    let mut daemon = scene.start("a", &["--key-file", &format!("safe={key}"), "--key-file", &format!("new={key}")]);
    assert_eq!(state(&daemon, "safe"), "locked");
    assert!(daemon.volume("safe")["error"].as_str().unwrap().contains("not encrypted"));
    assert!(daemon.refused(&["volume", "create", "new", "--size", "8MiB"]).contains("--encrypt"));
    daemon.kill();
}

#[test]
fn damage_to_an_encrypted_volume_is_an_error_and_never_data() {
    let scene = Scene::new();
    let key = scene.secret("key", &[3; 64]);
    let with_key = ["--key-file", &format!("safe={key}")];
    let mut daemon = scene.start("a", &with_key);
    scene.create(&daemon, "safe", &["--encrypt", "--key-file", &key]);
    scene.fill(&daemon, "safe");
    scene.fill(&daemon, "safe");
    daemon.wait_drained("safe");
    // An orderly end would leave a checkpoint, and no header to be read.
    daemon.kill();
    // The manifest: another size, with a right checksum.
    let manifest = scene.bucket().join("volumes/safe/manifest");
    let good = fs::read(&manifest).unwrap();
    let mut bad = good.clone();
    bad[43] ^= 0x10;
    bad[16..24].fill(0);
    let sum = xxhash_rust::xxh3::xxh3_64_with_seed(&bad, u64::from_le_bytes(*b"manifest"));
    bad[16..24].copy_from_slice(&sum.to_le_bytes());
    fs::write(&manifest, bad).unwrap();
    daemon.restart();
    assert!(daemon.volume("safe")["error"].as_str().unwrap().contains("changed without the volume's key"));
    daemon.kill();
    fs::write(&manifest, good).unwrap();
    // A chunk in the place of another, as a host sees it that must read its header.
    let chunks: Vec<PathBuf> = chunks(&scene.bucket()).into_keys().collect();
    assert!(chunks.len() > 1);
    fs::copy(&chunks[1], &chunks[0]).unwrap();
    let daemon = scene.start("b", &with_key);
    daemon.run(&["volume", "open", "safe", "--force"]);
    let why = daemon.volume("safe")["error"].as_str().unwrap().to_owned();
    assert!(why.contains("not authentic"), "{why}");
}

#[test]
fn settings_change_while_a_volume_is_open() {
    let scene = Scene::new();
    let mut daemon = scene.start("a", &[]);
    scene.create(&daemon, "disk", &[]);
    let written = |daemon: &Daemon| daemon.stats("disk")["chunk_stored_bytes"].as_u64().unwrap();
    scene.fill(&daemon, "disk");
    let raw = written(&daemon);
    assert!(raw >= 8 << 20, "{raw}");
    let said = daemon.json(&["volume", "set", "disk", "--codec", "zstd:1"]);
    assert_eq!((&said["codec"], &said["durability"]), (&"zstd:1".into(), &"local".into()));
    scene.fill(&daemon, "disk");
    let more = written(&daemon) - raw;
    assert!(more < 1 << 20, "{more} bytes for what shrinks to nothing");
    scene.check(&daemon, "disk");

    assert_eq!(daemon.json(&["volume", "set", "disk", "--durability", "object"])["durability"], "object");
    let mut client = daemon.attach("disk");
    client.write(0, &contents()[..4096]).unwrap();
    client.flush().unwrap();
    let stats = daemon.stats("disk");
    assert_eq!(stats["destaged_lsn"], stats["accepted_lsn"], "the flush waited for the bucket");
    drop(client);
    assert!(daemon.refused(&["volume", "set", "nothing", "--codec", "lz4"]).contains("no volume"));
    daemon.restart();
    let volume = daemon.volume("disk");
    assert_eq!((&volume["codec"], &volume["durability"]), (&"zstd:1".into(), &"object".into()));
    scene.check(&daemon, "disk");
}
