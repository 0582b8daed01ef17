//! A daemon on an embedded store, driven by the program's own commands.

mod common;

use std::os::unix::fs::{FileExt, PermissionsExt};
use std::process::Command;

use blockd::export::nbd::client::NbdClient;
use common::daemon::{Daemon, program};
use serde_json::Value;

#[test]
fn volumes_live_and_die_while_it_runs() {
    let tmp = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&tmp.path().join("d"), &[]);
    assert!(daemon.ready.contains("0 of 0 volumes open"), "{}", daemon.ready);
    assert_eq!(daemon.json(&["volume", "list"]), Value::Array(vec![]));

    let made = daemon.json(&["volume", "create", "disk", "--size", "64MiB", "--codec", "zstd:5"]);
    assert_eq!((&made["state"], &made["size"], &made["codec"]), (&"open".into(), &(64 << 20).into(), &"zstd:5".into()));
    assert!(made["uris"][0].as_str().unwrap().starts_with("nbd+unix:///disk?socket=/"));
    assert!(daemon.refused(&["volume", "create", "disk", "--size", "1GiB"]).contains("exists already"));
    assert!(daemon.refused(&["volume", "create", "odd", "--size", "1000"]).contains("multiples of 4096"));
    assert!(
        daemon
            .refused(&["volume", "create", "odd", "--size", "1GiB", "--chunk-size", "1KiB"])
            .contains("1MiB to 64MiB")
    );
    assert!(daemon.refused(&["volume", "show", "nothing"]).contains("no volume \"nothing\""));
    assert!(daemon.refused(&["volume", "open", "nothing"]).contains("no volume \"nothing\""));

    let mut client = daemon.attach("disk");
    client.write(4096, &[7; 4096]).unwrap();
    client.flush().unwrap();
    assert_eq!(daemon.json(&["volume", "show", "disk"])["clients"], 1);
    assert!(daemon.refused(&["volume", "delete", "disk"]).contains("--yes"));
    assert!(daemon.refused(&["volume", "delete", "disk", "--yes"]).contains("1 client connection"));

    assert!(daemon.refused(&["volume", "resize", "disk", "32MiB"]).contains("--shrink"));
    daemon.json(&["volume", "resize", "disk", "128MiB"]);
    assert_eq!(daemon.attach("disk").size(), 128 << 20);

    let status = daemon.json(&["status"]);
    assert_eq!(status["volumes"][0]["stats"]["writes"], 1);
    assert!(status["store"]["puts"].as_u64().unwrap() >= 1);
    assert!(status["memory"]["resident_bytes"].as_u64().unwrap() > 1 << 20);
    let page = String::from_utf8(daemon.run(&["status"]).stdout).unwrap();
    assert!(page.contains("disk    128 MiB  open local"), "{page}");

    drop(client);
    daemon.json(&["volume", "delete", "disk", "--yes", "--force"]);
    assert_eq!(daemon.json(&["volume", "list"]), Value::Array(vec![]));
    assert!(NbdClient::connect_unix(tmp.path().join("d/nbd.sock"), "disk").is_err());
    assert_eq!(std::fs::read_dir(tmp.path().join("d/volumes")).unwrap().count(), 0);
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn it_stops_in_order_and_comes_back() {
    let tmp = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(tmp.path(), &[]);
    daemon.json(&["volume", "create", "a", "--size", "1MiB"]);
    daemon.json(&["volume", "create", "b", "--size", "1MiB"]);
    let admin = tmp.path().join("admin.sock");
    assert_eq!(std::fs::metadata(&admin).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(daemon.stop(), Some(0));
    assert!(!admin.exists() && !tmp.path().join("nbd.sock").exists());

    // One of them only; the other is still known.
    let daemon = Daemon::start(tmp.path(), &["--volumes", "a"]);
    assert!(daemon.ready.contains("1 of 2 volumes open"), "{}", daemon.ready);
    assert_eq!(daemon.json(&["volume", "show", "b"])["state"], "closed");
    assert_eq!(daemon.json(&["volume", "open", "b"])["state"], "open");
    // Sockets of a killed daemon are in nobody's way.
    daemon.signal(libc::SIGKILL);
    drop(daemon);
    assert!(admin.exists());
    let daemon = Daemon::start(tmp.path(), &[]);
    assert!(daemon.ready.contains("2 of 2 volumes open"), "{}", daemon.ready);
}

#[test]
fn a_second_daemon_is_refused() {
    let tmp = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(tmp.path(), &[]);
    let second = program().args(["serve", "--nbd-tcp", "none", "--data"]).arg(daemon.data()).output().unwrap();
    let said = String::from_utf8(second.stderr).unwrap();
    assert_eq!(second.status.code(), Some(1));
    assert!(said.contains(&format!("process id {}", daemon.id())), "{said}");
    let other = tmp.path().join("other");
    let port = program()
        .args(["serve", "--nbd-unix"])
        .arg(tmp.path().join("nbd.sock"))
        .args(["--nbd-tcp", "none", "--data"])
        .arg(&other)
        .output()
        .unwrap();
    assert!(String::from_utf8(port.stderr).unwrap().contains("another server answers there"));
    daemon.json(&["status"]);
}

#[test]
fn images_go_in_and_out_unchanged() {
    let tmp = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&tmp.path().join("d"), &[]);
    let image = tmp.path().join("image.raw");
    let file = std::fs::File::create(&image).unwrap();
    // An odd length, holes, data across piece boundaries, and written zeroes.
    file.set_len((20 << 20) + 777).unwrap();
    let noise: Vec<u8> = (0..3_000_001_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8 | 1).collect();
    file.write_all_at(&noise, 1_000_003).unwrap();
    file.write_all_at(&vec![0; 1 << 20], 8 << 20).unwrap();
    file.write_all_at(&[9; 777], 20 << 20).unwrap();
    let (image, out) = (image.to_str().unwrap(), tmp.path().join("out.raw"));
    let out = out.to_str().unwrap();

    let done = daemon.json(&["volume", "import", "disk", image, "--create"]);
    assert_eq!(done["size"], (20 << 20) + 777);
    let moved = done["data"].as_u64().unwrap();
    assert!((3_000_000..3_500_000).contains(&moved), "{moved} bytes moved");
    assert!(daemon.refused(&["volume", "import", "disk", image]).contains("--force"));
    daemon.json(&["volume", "export", "disk", out]);
    assert!(daemon.refused(&["volume", "export", "disk", out]).contains("--force"));
    let mut expected = std::fs::read(image).unwrap();
    expected.resize(expected.len().next_multiple_of(4096), 0);
    assert!(std::fs::read(out).unwrap() == expected, "the image changed on its way");
    let blocks = std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(out).unwrap());
    assert!(blocks * 512 < 5 << 20, "{blocks} blocks for 3 MB of data");

    // Replacing leaves nothing of the old contents.
    std::fs::write(image, [5; 4096]).unwrap();
    daemon.json(&["volume", "import", "disk", image, "--force"]);
    daemon.json(&["volume", "export", "disk", out, "--force"]);
    let replaced = std::fs::read(out).unwrap();
    assert!(replaced[..4096] == [5; 4096] && replaced[4096..].iter().all(|byte| *byte == 0));

    std::fs::write(image, vec![1; 22 << 20]).unwrap();
    assert!(daemon.refused(&["volume", "import", "disk", image, "--force"]).contains("does not fit"));
}

#[test]
fn qcow2_images_go_through_qemu_img() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        eprintln!("skipped: qemu-img is not installed");
        return;
    }
    let tmp = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(&tmp.path().join("a dir"), &[]);
    let at = |name: &str| tmp.path().join(name).to_str().unwrap().to_owned();
    let noise: Vec<u8> = (0..2_000_000_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect();
    std::fs::write(at("in.raw"), &noise).unwrap();
    let qemu_img = |args: &[&str]| assert!(Command::new("qemu-img").args(args).status().unwrap().success(), "{args:?}");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", &at("in.raw"), &at("in.qcow2")]);

    daemon.json(&["volume", "import", "vm", &at("in.qcow2"), "--create", "--size", "8MiB"]);
    daemon.json(&["volume", "export", "vm", &at("out.qcow2")]);
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &at("out.qcow2"), &at("out.raw")]);
    let out = std::fs::read(at("out.raw")).unwrap();
    assert_eq!(out.len(), 8 << 20);
    assert!(out[..noise.len()] == noise && out[noise.len()..].iter().all(|byte| *byte == 0));
}

#[test]
fn prometheus_is_answered() {
    use std::io::{Read, Write};
    let tmp = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(tmp.path(), &[]);
    daemon.json(&["volume", "create", "disk", "--size", "1MiB"]);
    let mut socket = std::os::unix::net::UnixStream::connect(tmp.path().join("admin.sock")).unwrap();
    socket.write_all(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").unwrap();
    let mut answer = String::new();
    socket.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert!(answer.contains("blockd_volume_open{volume=\"disk\"} 1"), "{answer}");
}

#[test]
fn a_volume_at_rest_wakes_up() {
    let tmp = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(tmp.path(), &["--destage-age", "100ms"]);
    daemon.json(&["volume", "create", "disk", "--size", "8MiB"]);
    let mut client = daemon.attach("disk");
    for flush in [true, false, true] {
        client.write(0, &[1; 8192]).unwrap();
        if flush {
            client.flush().unwrap();
        }
        // Long enough to be in the bucket, let go of in the log, and for the log to note that nothing follows.
        daemon.wait_drained("disk");
        std::thread::sleep(std::time::Duration::from_millis(1500));
    }
    client.write(4096, &[2; 4096]).unwrap();
    assert_eq!(daemon.stop(), Some(0));
}
