//! What reads in order ask of the bucket, and what of them stays in memory.

mod common;

use std::time::Duration;

use blockd::export::nbd::client::NbdClient;
use common::daemon::{Daemon, wait_still};
use common::shadow::Shadow;
use common::shared::Shared;

const MIB: usize = 1 << 20;
const SIZE: usize = 64 * MIB;
/// What one reader may leave in memory, and what is read ahead of it or not exactly where its limit is.
const KEPT: u64 = 8;
const SLACK: u64 = 6;

/// MiB that the daemon has fetched from the bucket.
fn fetched(daemon: &Daemon) -> u64 {
    daemon.json(&["status"])["store"]["bytes_read"].as_u64().unwrap() / MIB as u64
}

/// Reads the whole volume in order, and returns how many MiB that fetched.
fn pass(daemon: &Daemon, client: &mut NbdClient, found: &mut [u8]) -> u64 {
    let before = fetched(daemon);
    for (at, part) in (0..).step_by(MIB).zip(found.chunks_mut(MIB)) {
        client.read(at, part).unwrap();
    }
    fetched(daemon) - before
}

#[test]
fn a_long_read_in_order_stays_in_memory_when_it_is_repeated() {
    let caches =
        ["--block-cache", "256MiB", "--keep-sequential", "8MiB", "--read-cache", "0", "--read-cache-memory", "0"];
    let shared = Shared::new(&[&caches[..], &["--destage-age", "200ms"]].concat());
    let mut daemon = shared.serve("host", &[]);
    daemon.json(&["volume", "create", "disk", "--size", "64MiB"]);
    let mut client = daemon.attach("disk");
    let mut shadow = Shadow::new(SIZE, 1);
    for at in (0..SIZE).step_by(MIB) {
        shadow.write(&mut client, at, MIB);
    }
    daemon.wait_drained("disk");
    drop(client);
    daemon.restart_as_new_host("disk");

    let mut client = daemon.attach("disk");
    let mut found = vec![0; SIZE];
    let all = (SIZE / MIB) as u64;
    let first = pass(&daemon, &mut client, &mut found);
    assert!((all..all + SLACK).contains(&first), "{first} MiB");
    // All but the end has made room.
    let second = pass(&daemon, &mut client, &mut found);
    assert!((all - KEPT - SLACK..all - KEPT + SLACK).contains(&second), "{second} MiB");
    // What was fetched twice stays.
    let third = pass(&daemon, &mut client, &mut found);
    assert!(third < SLACK, "{third} MiB");
    shadow.check_all(&mut client);

    // A short one stays at once.
    daemon.restart_as_new_host("disk");
    let mut client = daemon.attach("disk");
    let first = pass(&daemon, &mut client, &mut found[..KEPT as usize * MIB]);
    assert!(first >= KEPT, "{first} MiB");
    // What was read ahead of it is still coming.
    wait_still(Duration::from_secs(10), Duration::from_millis(500), || fetched(&daemon) as usize, || false);
    let second = pass(&daemon, &mut client, &mut found[..KEPT as usize * MIB]);
    assert!(second < 2, "{second} MiB");
}
