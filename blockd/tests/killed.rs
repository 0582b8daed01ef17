//! `kill -9` in the middle of commands on snapshots, clones, restores and deletions: what the daemon finds afterwards is the
//! state before or after, `volume check` finds nothing but what the next sweep removes, and the same command again
//! finishes, or says that there is nothing left to do.
//!
//! `KILLED_ROUNDS=200 cargo test --release -p blockd --test killed` torments longer, `KILLED_SEED=n` differently.

mod common;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::Stdio;
use std::time::{Duration, Instant};

use common::daemon::{Daemon, program, wait};
use common::shared::Shared;
use rand::rngs::SmallRng;
use rand::{Rng, RngCore, SeedableRng};

const MIB: usize = 1 << 20;
const SIZE: usize = 2 * MIB;
const BLOCK: usize = 4096;

fn number(name: &str, usual: u64) -> u64 {
    std::env::var(name).map_or(usual, |value| value.parse().expect("a number"))
}

/// A daemon that is killed again and again, and what its volumes must hold.
struct World {
    shared: Shared,
    daemon: Daemon,
    rng: SmallRng,
    /// By name; snapshots as `VOLUME@SNAPSHOT`.
    contents: BTreeMap<String, Vec<u8>>,
    made: usize,
    /// How long a command takes, at most.
    longest: Duration,
}

impl World {
    fn new(seed: u64) -> Self {
        let shared = Shared::new(&["--destage-age", "100ms"]);
        let daemon = shared.serve("north", &[]);
        let rng = SmallRng::seed_from_u64(number("KILLED_SEED", seed));
        let longest = Duration::from_millis(40);
        Self { shared, daemon, rng, contents: BTreeMap::new(), made: 0, longest }
    }

    fn name(&mut self, kind: &str) -> String {
        self.made += 1;
        format!("{kind}{}", self.made)
    }

    fn create(&mut self, name: &str) {
        self.daemon.json(&["volume", "create", name, "--size", "2MiB", "--chunk-size", "1MiB"]);
        self.contents.insert(name.to_owned(), vec![0; SIZE]);
        self.write(name);
    }

    /// Writes some blocks of a volume.
    fn write(&mut self, name: &str) {
        let mut client = self.daemon.attach(name);
        let content = self.contents.get_mut(name).unwrap();
        for _ in 0..self.rng.random_range(1..40) {
            let at = self.rng.random_range(0..SIZE / BLOCK) * BLOCK;
            self.rng.fill_bytes(&mut content[at..at + BLOCK]);
            client.write(at as u64, &content[at..at + BLOCK]).unwrap();
        }
        client.flush().unwrap();
        drop(client);
        assert!(wait(Duration::from_secs(10), || self.daemon.volume(name)["clients"] == 0));
    }

    fn read(&self, export: &str) -> Vec<u8> {
        let mut found = vec![0; SIZE];
        self.daemon.attach(export).read(0, &mut found).unwrap();
        found
    }

    /// Runs a command, kills the daemon while it is at work, and starts it again.
    fn killed(&mut self, args: &[&str]) {
        let mut command = program();
        command.args(args).arg("--data").arg(self.daemon.data());
        let mut command = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(self.longest.mul_f64(self.rng.random()));
        self.daemon.kill();
        command.wait().unwrap();
        self.daemon.restart();
    }

    /// Runs it again, to its end. It may say that it was done before.
    fn again(&mut self, args: &[&str], done: &[&str]) {
        let mut begun = Instant::now();
        let mut output = self.daemon.run(args);
        // Clients that were here a moment ago may not be gone yet.
        wait(Duration::from_secs(10), || {
            let busy = String::from_utf8_lossy(&output.stderr).contains("client connection");
            if busy {
                begun = Instant::now();
                output = self.daemon.run(args);
            }
            !busy
        });
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(
            output.status.success() || done.iter().any(|done| said.contains(done)),
            "{args:?}: {said}\n{}",
            self.daemon.log()
        );
        if output.status.success() {
            self.longest = (begun.elapsed() + self.longest * 3) / 4;
        }
    }

    fn volumes(&self) -> Vec<String> {
        let status = self.daemon.json(&["status"]);
        let name = |volume: &serde_json::Value| volume["name"].as_str().unwrap().to_owned();
        status["volumes"].as_array().unwrap().iter().map(name).collect()
    }

    fn snapshots(&self, volume: &str) -> Vec<String> {
        let listed = self.daemon.json(&["snapshot", "list", volume]);
        let shown = listed.as_array().unwrap().iter().filter(|snapshot| snapshot["hidden"] == false);
        shown.map(|snapshot| format!("{volume}@{}", snapshot["name"].as_str().unwrap())).collect()
    }

    /// Everything reads as it should.
    fn check(&self) {
        for (name, content) in &self.contents {
            assert!(self.read(name) == *content, "{name} is not what it was");
        }
        for name in self.contents.keys().filter(|name| !name.contains('@')) {
            let none = self.shared.dir.path().join("none");
            let args = ["volume", "check", name, "--json", "--data", "--grace", "0s", "--store", &self.shared.url];
            let output = program().args(args).arg("--data-dir").arg(none).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr);
            let report: serde_json::Value =
                serde_json::from_slice(&output.stdout).unwrap_or_else(|e| panic!("{name}: {e}: {said}"));
            // Files of checkpoints are swept by the next owner, some time after its first checkpoint.
            let waits = |found: &&serde_json::Value| {
                found["kind"] == "orphan" && found["object"].as_str().is_some_and(|key| key.starts_with("checkpoints/"))
            };
            let wrong: Vec<_> = report["findings"].as_array().unwrap().iter().filter(|found| !waits(found)).collect();
            assert!(wrong.is_empty(), "{name}: {wrong:?}");
        }
    }

    /// Deletes everything; nothing stays.
    fn end(mut self) {
        for name in self.volumes() {
            self.daemon.json(&["volume", "delete", &name, "--yes"]);
        }
        self.contents.clear();
        for prefix in ["chunks", "checkpoints", "volumes", "held"] {
            assert_eq!(self.shared.objects(prefix), Vec::<PathBuf>::new(), "{}", self.daemon.log());
        }
    }

    /// One of the volumes, or of the snapshots.
    fn some(&mut self, snapshot: bool) -> Option<String> {
        let names: Vec<&String> = self.contents.keys().filter(|name| name.contains('@') == snapshot).collect();
        (!names.is_empty()).then(|| names[self.rng.random_range(0..names.len())].clone())
    }

    fn make_snapshot(&mut self) {
        let volume = self.some(false).unwrap();
        let full = format!("{volume}@{}", self.name("s"));
        let content = self.contents[&volume].clone();
        self.killed(&["snapshot", "create", &full]);
        if self.snapshots(&volume).contains(&full) {
            self.contents.insert(full.clone(), content.clone());
        }
        self.check();
        self.again(&["snapshot", "create", &full], &["already"]);
        self.contents.insert(full, content);
    }

    fn delete_snapshot(&mut self) {
        let Some(full) = self.some(true) else { return };
        let content = self.contents.remove(&full).unwrap();
        self.killed(&["snapshot", "delete", &full]);
        let (volume, _) = full.split_once('@').unwrap();
        if self.snapshots(volume).contains(&full) {
            self.contents.insert(full.clone(), content);
        }
        self.check();
        self.again(&["snapshot", "delete", &full], &["no snapshot"]);
        self.contents.remove(&full);
    }

    fn clone_snapshot(&mut self) {
        let Some(full) = self.some(!self.made.is_multiple_of(3)) else { return };
        let name = self.name("c");
        self.killed(&["volume", "clone", &full, &name]);
        let content = self.contents[&full].clone();
        if self.volumes().contains(&name) {
            self.contents.insert(name.clone(), content.clone());
        }
        self.check();
        self.again(&["volume", "clone", &full, &name], &["exists already"]);
        self.contents.insert(name.clone(), content);
        self.check();
        self.write(&name);
    }

    fn restore(&mut self) {
        let Some(full) = self.some(true) else { return };
        let (volume, _) = full.split_once('@').unwrap();
        let wanted = self.contents[&full].clone();
        self.killed(&["volume", "restore", &full, "--yes"]);
        let found = self.read(volume);
        assert!(found == wanted || found == self.contents[volume], "{volume} is neither restored nor as before");
        assert!(wait(Duration::from_secs(10), || self.daemon.volume(volume)["clients"] == 0));
        self.contents.insert(volume.to_owned(), found);
        self.check();
        assert!(wait(Duration::from_secs(10), || self.daemon.volume(volume)["clients"] == 0));
        self.again(&["volume", "restore", &full, "--yes"], &[]);
        self.contents.insert(volume.to_owned(), wanted);
    }

    fn delete_volume(&mut self) {
        let volume = self.some(false).unwrap();
        let whose = format!("{volume}@");
        self.contents.retain(|name, _| *name != volume && !name.starts_with(&whose));
        self.killed(&["volume", "delete", &volume, "--yes"]);
        self.check();
        self.again(&["volume", "delete", &volume, "--yes"], &["there is no volume"]);
        if self.some(false).is_none() {
            let name = self.name("disk");
            self.create(&name);
        }
    }
}

#[test]
fn killed_at_any_moment_all_goes_on() {
    let mut world = World::new(1);
    world.create("disk");
    for _ in 0..number("KILLED_ROUNDS", 12) {
        match world.rng.random_range(0..10) {
            0..=2 => world.make_snapshot(),
            3 => world.delete_snapshot(),
            4..=5 => world.clone_snapshot(),
            6..=7 => world.restore(),
            _ => world.delete_volume(),
        }
        world.check();
        let name = world.some(false).unwrap();
        assert!(wait(Duration::from_secs(10), || world.daemon.volume(&name)["clients"] == 0));
        world.write(&name);
    }
    world.end();
}

#[test]
fn killed_while_a_volume_goes_that_clones_need() {
    let mut world = World::new(2);
    for _ in 0..number("KILLED_ROUNDS", 12) / 4 {
        world.create("origin");
        world.daemon.json(&["snapshot", "create", "origin@gold"]);
        let gold = world.contents["origin"].clone();
        world.write("origin");
        for name in ["one", "two"] {
            world.daemon.json(&["volume", "clone", "origin@gold", name]);
            world.contents.insert(name.to_owned(), gold.clone());
            world.write(name);
        }
        for name in ["origin", "two", "one"] {
            world.contents.remove(name);
            world.killed(&["volume", "delete", name, "--yes"]);
            world.check();
            world.again(&["volume", "delete", name, "--yes"], &["there is no volume"]);
            world.check();
        }
        for prefix in ["chunks", "checkpoints", "volumes", "held"] {
            assert_eq!(world.shared.objects(prefix), Vec::<PathBuf>::new(), "{}", world.daemon.log());
        }
    }
}
