//! Reading a volume beside its owner: followers, and what changed between snapshots.

mod common;

use std::time::{Duration, Instant};

use common::daemon::Daemon;
use common::shadow::Shadow;
use common::shared::Shared;

const MIB: usize = 1 << 20;
const SIZE: usize = 8 * MIB;

const ARGS: [&str; 2] = ["--destage-age", "200ms"];

fn create(daemon: &Daemon, name: &str, more: &[&str]) {
    let args = ["volume", "create", name, "--size", "8MiB", "--chunk-size", "1MiB"];
    daemon.json(&[&args, more].concat());
}

fn contents(daemon: &Daemon, export: &str) -> Vec<u8> {
    let mut client = daemon.attach(export);
    let mut found = vec![0; SIZE];
    for (at, part) in (0..).step_by(MIB).zip(found.chunks_mut(MIB)) {
        client.read(at, part).unwrap();
    }
    found
}

fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(60);
    while !holds() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn any_host_follows_the_owner() {
    let shared = Shared::new(&ARGS);
    // Many small chunks and many checkpoints, so that compaction and deletion have something to do.
    let owner = shared.serve("owner", &["--checkpoint-chunks", "4", "--checkpoint-age", "1s", "--delete-grace", "30s"]);
    create(&owner, "disk", &[]);
    let mut client = owner.attach("disk");
    let mut shadow = Shadow::new(SIZE, 1);
    shadow.scribble(&mut client, 50);
    owner.wait_drained("disk");
    let followers = ["east", "west"].map(|host| shared.serve(host, &["--follow-interval", "200ms"]));
    let mut views = followers.each_ref().map(|host| host.attach("disk@latest"));
    assert!(views[0].write(0, &[1; 4096]).is_err(), "it is read-only");
    for round in 0..8 {
        shadow.scribble(&mut client, 60);
        owner.wait_drained("disk");
        let lsn = owner.stats("disk")["accepted_lsn"].as_u64().unwrap();
        for host in &followers {
            until("the follower is there", || {
                let status = host.json(&["status"]);
                let view =
                    status["followed"].as_array().unwrap().iter().find(|v| v["export"] == "disk@latest").cloned();
                view.is_some_and(|view| {
                    assert!(view["error"].is_null(), "{view}");
                    view["lsn"].as_u64().unwrap() >= lsn && view["lag_seconds"].as_f64().unwrap() < 30.0
                })
            });
        }
        for view in &mut views {
            let mut found = vec![0; SIZE];
            view.read(0, &mut found).unwrap();
            assert!(found == shadow.bytes(), "round {round}: a follower shows something else");
        }
    }
    // Larger: whoever attaches from now on sees it.
    owner.json(&["volume", "resize", "disk", "12MiB"]);
    until("the new size is seen", || followers[0].attach("disk@latest").size() == 12 << 20);
    // Everybody may go in any order.
    drop(owner);
    let mut found = vec![0; SIZE];
    views[1].read(0, &mut found).unwrap();
    assert!(found == shadow.bytes());
}

#[test]
fn followers_see_a_takeover_as_one_history() {
    let shared = Shared::new(&ARGS);
    let one = shared.serve("one", &["--lease", "5s"]);
    create(&one, "disk", &[]);
    let follower = shared.serve("follower", &["--follow-interval", "100ms"]);
    let mut shadow = Shadow::new(SIZE, 2);
    let mut client = one.attach("disk");
    shadow.scribble(&mut client, 40);
    one.wait_drained("disk");
    let mut view = follower.attach("disk@latest");
    drop(client);
    one.json(&["volume", "release", "disk"]);
    let two = shared.serve("two", &[]);
    two.json(&["volume", "open", "disk"]);
    let mut client = two.attach("disk");
    shadow.scribble(&mut client, 40);
    two.wait_drained("disk");
    until("the follower has what the second owner wrote", || {
        let mut found = vec![0; SIZE];
        view.read(0, &mut found).unwrap();
        found == shadow.bytes()
    });
}

#[test]
fn an_encrypted_volume_is_followed_with_its_key_only() {
    let shared = Shared::new(&ARGS);
    let key = shared.dir.path().join("key");
    std::fs::write(&key, [5; 32]).unwrap();
    let named = format!("disk={}", key.display());
    let owner = shared.serve("owner", &["--key-file", &named]);
    create(&owner, "disk", &["--encrypt", "--key-file", key.to_str().unwrap()]);
    let mut shadow = Shadow::new(SIZE, 3);
    shadow.scribble(&mut owner.attach("disk"), 40);
    owner.wait_drained("disk");
    let friend = shared.serve("friend", &["--key-file", &named]);
    assert!(contents(&friend, "disk@latest") == shadow.bytes());
    let stranger = shared.serve("stranger", &[]);
    assert!(stranger.cannot_attach("disk@latest").contains("encrypted"));
}

#[test]
fn increments_bring_a_copy_from_snapshot_to_snapshot() {
    let shared = Shared::new(&ARGS);
    let daemon = shared.serve("host", &[]);
    create(&daemon, "disk", &[]);
    let mut shadow = Shadow::new(SIZE, 4);
    let mut client = daemon.attach("disk");
    let file = |name: &str| shared.dir.path().join(name).to_str().unwrap().to_owned();
    let mut states = Vec::new();
    for n in 0..3 {
        shadow.scribble(&mut client, 25);
        daemon.json(&["snapshot", "create", &format!("disk@s{n}")]);
        states.push(shadow.bytes().to_vec());
    }
    daemon.json(&["volume", "export", "disk@s0", &file("full.raw")]);
    daemon.json(&["volume", "import", "copy", &file("full.raw"), "--create"]);
    for n in 1..3 {
        let (from, to, increment) = (format!("s{}", n - 1), format!("disk@s{n}"), file(&format!("increment{n}")));
        let summary = daemon.json(&["volume", "export", &to, &increment, "--since", &from]);
        let data = summary["data"].as_u64().unwrap();
        assert!(data > 0 && data < SIZE as u64, "{summary}");
    }
    // Not on top of another state, not damaged, not backwards.
    let refused = daemon.refused(&["volume", "import", "copy", &file("increment2")]);
    assert!(refused.contains("Nothing was changed"), "{refused}");
    assert!(daemon.refused(&["volume", "export", "disk@s0", &file("x"), "--since", "s1"]).contains("newer"));
    assert!(daemon.refused(&["volume", "export", "disk@s1", &file("x"), "--since", "s9"]).contains("no snapshot"));
    let mut spoilt = std::fs::read(file("increment1")).unwrap();
    let middle = spoilt.len() / 2;
    spoilt[middle] ^= 1;
    std::fs::write(file("spoilt"), &spoilt).unwrap();
    assert!(daemon.refused(&["volume", "import", "copy", &file("spoilt")]).contains("nothing was changed"));
    spoilt.truncate(middle);
    std::fs::write(file("short"), &spoilt).unwrap();
    assert!(daemon.refused(&["volume", "import", "copy", &file("short")]).contains("cut short"));
    assert!(contents(&daemon, "copy") == states[0]);
    for (n, state) in states.iter().enumerate().skip(1) {
        // A second time changes nothing more.
        for _ in 0..2 {
            daemon.json(&["volume", "import", "copy", &file(&format!("increment{n}"))]);
            assert!(contents(&daemon, "copy") == *state, "increment {n}");
        }
    }
    // Up to now, by a snapshot that is gone afterwards.
    shadow.scribble(&mut client, 10);
    daemon.json(&["volume", "export", "disk", &file("now"), "--since", "s2"]);
    daemon.json(&["volume", "import", "copy", &file("now")]);
    assert!(contents(&daemon, "copy") == shadow.bytes());
    assert_eq!(daemon.json(&["snapshot", "list", "disk"]).as_array().unwrap().len(), 3);
}
