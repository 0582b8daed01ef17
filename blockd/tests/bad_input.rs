//! The real daemon among strangers, in wrong directories, on damaged files and on full disks.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use blockd::export::nbd::client::{NbdClient, Request};
use common::daemon::{Daemon, Disk, wait, wait_still};
use common::shadow::Shadow;
use serde_json::Value;

const MIB: usize = 1 << 20;
const BLOCK: usize = 4096;

/// The number of the error a request must have failed with.
fn errno<T: std::fmt::Debug>(result: std::io::Result<T>) -> i32 {
    let error = result.expect_err("this request must fail");
    error.raw_os_error().unwrap_or_else(|| panic!("the connection broke: {error}"))
}

fn request(client: &mut NbdClient, request: Request<'_>) -> std::io::Result<()> {
    client.submit(request)?;
    client.next_reply()?.1.map(drop).map_err(Into::into)
}

#[test]
fn requests_that_make_no_sense_are_refused_and_the_connection_goes_on() {
    let tmp = tempfile::tempdir().unwrap();
    let daemon = Daemon::start(tmp.path(), &[]);
    daemon.json(&["volume", "create", "disk", "--size", "1MiB"]);
    let mut client = daemon.attach("disk");
    let mut shadow = Shadow::new(MIB, 1);
    let size = MIB as u64;
    let block = [1; BLOCK];
    for (offset, len) in [(size, 4096), (size - 4095, 4096), (size + 1, 1), (u64::MAX - 100, 4096), (1 << 63, 4096)] {
        shadow.scribble(&mut client, 3);
        let outside = Request::Read { offset, len };
        assert_eq!(errno(request(&mut client, outside)), libc::EINVAL, "read at {offset}");
        let outside = Request::Trim { offset, len, fua: false };
        assert_eq!(errno(request(&mut client, outside)), libc::EINVAL, "trim at {offset}");
        let outside = Request::Cache { offset, len };
        assert_eq!(errno(request(&mut client, outside)), libc::EINVAL, "cache at {offset}");
        let outside = Request::BlockStatus { offset, len };
        assert_eq!(errno(request(&mut client, outside)), libc::EINVAL, "block status at {offset}");
        let outside = Request::Write { offset, data: &block[..len as usize], fua: true };
        assert_eq!(errno(request(&mut client, outside)), libc::ENOSPC, "write at {offset}");
        let outside = Request::WriteZeroes { offset, len, fua: false, no_hole: true };
        assert_eq!(errno(request(&mut client, outside)), libc::ENOSPC, "zero at {offset}");
        shadow.check_all(&mut client);
    }
    // Longer than any request may be, in range or not.
    let long = vec![1; 33 * MIB];
    assert_eq!(errno(request(&mut client, Request::Read { offset: 0, len: 33 << 20 })), libc::EINVAL);
    assert_eq!(errno(client.write(0, &long)), libc::EINVAL);
    // Odd offsets and lengths are no error.
    for (offset, len) in [(1, 1), (4095, 2), (511, 10_000), (MIB - 1, 1), (12_345, 70_001)] {
        shadow.write(&mut client, offset, len);
        shadow.check(&mut client, offset, len);
    }
    request(&mut client, Request::Read { offset: size, len: 0 }).unwrap();
    shadow.check_all(&mut client);
}

/// A client of the second kind: by hand, up to the requests.
fn shake_hands(mut stream: impl Read + Write, export: &str) -> impl Read + Write {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    assert_eq!(&greeting[..16], b"NBDMAGICIHAVEOPT");
    let mut option = 3_u32.to_be_bytes().to_vec();
    option.extend(b"IHAVEOPT");
    option.extend(1_u32.to_be_bytes());
    option.extend((export.len() as u32).to_be_bytes());
    option.extend(export.as_bytes());
    stream.write_all(&option).unwrap();
    let mut settled = [0; 10];
    stream.read_exact(&mut settled).unwrap();
    stream
}

fn request_header(command: u16, offset: u64, len: u32) -> Vec<u8> {
    let mut header = 0x2560_9513_u32.to_be_bytes().to_vec();
    header.extend(0_u16.to_be_bytes());
    header.extend(command.to_be_bytes());
    header.extend(7_u64.to_be_bytes());
    header.extend(offset.to_be_bytes());
    header.extend(len.to_be_bytes());
    header
}

/// Sets how many files this process, and what it starts from now on, may open, up to the hard limit.
fn limit_files(soft: Option<u64>) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a valid struct.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &mut limit), 0);
        limit.rlim_cur = soft.unwrap_or(limit.rlim_max);
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &limit), 0);
    }
}

#[test]
fn strangers_at_the_sockets_disturb_no_client() {
    let tmp = tempfile::tempdir().unwrap();
    // What a login shell gives a process on most systems.
    limit_files(Some(1024));
    let daemon = Daemon::start(tmp.path(), &["--nbd-tcp", "127.0.0.1:0", "--log-segment", "1MiB"]);
    limit_files(None);
    daemon.json(&["volume", "create", "disk", "--size", "32MiB"]);
    let tcp: SocketAddr = daemon.json(&["status"])["daemon"]["nbd_tcp"][0].as_str().unwrap().parse().unwrap();
    let [nbd, admin] = ["nbd.sock", "admin.sock"].map(|name| tmp.path().join(name));

    // A client that works all the while.
    let (stop, rounds) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
    let mut client = daemon.attach("disk");
    let honest = std::thread::spawn({
        let (stop, rounds) = (stop.clone(), rounds.clone());
        move || {
            let mut shadow = Shadow::new(32 * MIB, 2);
            while !stop.load(Ordering::Relaxed) {
                shadow.scribble(&mut client, 10);
                shadow.flush(&mut client);
                shadow.probe(&mut client, 2);
                rounds.fetch_add(1, Ordering::Relaxed);
            }
            shadow.check_all(&mut client);
            shadow.slowest
        }
    });

    let noise = |seed| common::pattern(seed, 100_000);
    for n in 0..50 {
        let mut blob = noise(n).to_vec();
        match n % 4 {
            0 => {}
            1 => blob.splice(0..4, 3_u32.to_be_bytes()).for_each(drop),
            // An option longer than any, announced as if it were to come.
            2 => blob = [&3_u32.to_be_bytes()[..], b"IHAVEOPT", &[0, 0, 0, 7, 0xff, 0xff, 0xff, 0xff], &blob].concat(),
            _ => blob = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        }
        // The server may hang up at any byte.
        let _ = TcpStream::connect(tcp).unwrap().write_all(&blob);
        let _ = UnixStream::connect(&nbd).unwrap().write_all(&blob);
        let _ = UnixStream::connect(&admin).unwrap().write_all(&blob);
    }
    // Strangers who ask too much of the admin socket, in its own language.
    let endless = format!("GET /v1/status HTTP/1.1\r\nhost: x\r\nx: {}\r\n\r\n", "y".repeat(10 * MIB));
    let body = "DELETE /v1/volumes/disk?force=maybe HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\nhello".to_owned();
    let create = "POST /v1/volumes HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\n{\"name\":7".to_owned();
    let odd = "GET /v1/volumes/..%2f..%2fetc HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".to_owned();
    for text in [endless, body, create, odd] {
        let mut stream = UnixStream::connect(&admin).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut answer = [0; 12];
        let _ = stream.write_all(text.as_bytes());
        if stream.read_exact(&mut answer).is_ok() {
            assert!(answer.starts_with(b"HTTP/1.1 4"), "{}: {:?}", &text[..40], String::from_utf8_lossy(&answer));
        }
    }
    // Clients that die in the middle of what they say, or go on with nonsense.
    for (len, sent) in [(4096, 100), (65_000, 60_000), (1 << 20, 300_000), (32 << 20, 5_000_000)] {
        let mut dying = shake_hands(TcpStream::connect(tcp).unwrap(), "disk");
        dying.write_all(&request_header(1, 0, len)).unwrap();
        dying.write_all(&vec![0xee; sent]).unwrap();
    }
    let mut raving = shake_hands(UnixStream::connect(&nbd).unwrap(), "disk");
    raving.write_all(&request_header(999, 0, 4096)).unwrap();
    let mut refusal = [0; 16];
    raving.read_exact(&mut refusal).unwrap();
    assert_eq!(refusal[4..8], 22_u32.to_be_bytes());
    let _ = raving.write_all(&noise(99));
    assert_eq!(raving.read(&mut refusal).unwrap_or(0), 0, "nonsense is no request");
    // More connections that never say a word than the daemon was given files for.
    let silent: Vec<TcpStream> = (0..900).map(|_| TcpStream::connect(tcp).unwrap()).collect();
    let silent_too: Vec<UnixStream> = (0..900).map(|_| UnixStream::connect(&nbd).unwrap()).collect();
    let silent_three: Vec<UnixStream> = (0..100).map(|_| UnixStream::connect(&admin).unwrap()).collect();

    // Newcomers are served all the same, and the log grows.
    let begun = Instant::now();
    let mut found = [0; BLOCK];
    NbdClient::connect_tcp(tcp, "disk").unwrap().read(0, &mut found).unwrap();
    daemon.attach("disk").read(0, &mut found).unwrap();
    assert_eq!(daemon.volume("disk")["state"], "open");
    // The silent ones are dropped after 10 s; nobody waited for that.
    assert!(begun.elapsed() < Duration::from_secs(8), "newcomers waited {:?}", begun.elapsed());
    let before = rounds.load(Ordering::Relaxed);
    assert!(wait(Duration::from_secs(10), || rounds.load(Ordering::Relaxed) > before + 20), "the client is stuck");
    drop((silent, silent_too, silent_three));

    stop.store(true, Ordering::Relaxed);
    let slowest = honest.join().unwrap();
    assert!(slowest < Duration::from_secs(8), "a request of the client took {slowest:?}");
    assert!(wait(Duration::from_secs(5), || daemon.volume("disk")["clients"] == 0), "{}", daemon.volume("disk"));
    assert!(!daemon.log().contains("cannot extend the log"), "{}", daemon.log());
    daemon.wait_drained("disk");
    assert_eq!(daemon.stop(), Some(0));
}

/// Every file below a directory, with its contents.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let mut files = BTreeMap::new();
    for entry in fs::read_dir(dir).unwrap() {
        let path = entry.unwrap().path();
        match path.is_dir() {
            true => files.extend(contents(&path)),
            false => drop(files.insert(path.clone(), fs::read(&path).unwrap())),
        }
    }
    files
}

#[test]
fn a_directory_that_is_not_its_own_is_refused_and_left_alone() {
    let tmp = tempfile::tempdir().unwrap();
    let foreign = tmp.path().join("home");
    fs::create_dir_all(foreign.join("thesis")).unwrap();
    fs::write(foreign.join("thesis/chapter1"), "It was a dark").unwrap();
    let before = contents(&foreign);
    let said = Daemon::refused_start(&foreign, &[]);
    assert!(said.contains("it holds other files (thesis)") && said.contains("--data"), "{said}");
    let store = format!("dir:{}", foreign.display());
    let said = Daemon::refused_start(&tmp.path().join("new"), &["--store", &store]);
    assert!(said.contains("not empty and not a blockd bucket") && said.contains(foreign.to_str().unwrap()), "{said}");
    assert_eq!(contents(&foreign), before);

    let below = foreign.join("thesis/chapter1/data");
    let said = Daemon::refused_start(&below, &[]);
    assert!(said.contains(below.to_str().unwrap()) && said.contains("Not a directory"), "{said}");
    let said = Daemon::refused_start(&tmp.path().join("new"), &["--store", &format!("dir:{}", below.display())]);
    assert!(said.contains(below.to_str().unwrap()) && said.contains("Not a directory"), "{said}");

    // A data directory and the bucket of somebody else.
    let own = tmp.path().join("own");
    let daemon = Daemon::start(&own, &[]);
    daemon.json(&["volume", "create", "disk", "--size", "1MiB"]);
    assert_eq!(daemon.stop(), Some(0));
    let before = contents(&own);
    let other = format!("dir:{}", tmp.path().join("other").display());
    let said = Daemon::refused_start(&own, &["--store", &other]);
    assert!(said.contains(&format!("belongs to the store dir:<data>/bucket, not to {other}")), "{said}");
    assert!(said.contains("--accept-store"), "{said}");
    let mut after = contents(&own);
    // The one trace: the lock says who tried last.
    after.insert(own.join("lock"), before[&own.join("lock")].clone());
    assert_eq!(after, before);
    let daemon = Daemon::start(&own, &["--store", &other, "--accept-store"]);
    assert!(daemon.ready.contains("0 of 0"), "{}", daemon.ready);
}

#[test]
fn a_disk_that_cannot_be_written_is_said_so() {
    let Some(disk) = Disk::new(64 << 20) else { return };
    let tmp = tempfile::tempdir().unwrap();
    let (data, bucket) = (disk.path().join("data"), format!("dir:{}", disk.path().join("bucket").display()));
    for (data, more) in [(&data, vec![]), (&tmp.path().join("data"), vec!["--store", &bucket])] {
        let daemon = Daemon::start(data, &more);
        daemon.json(&["volume", "create", "disk", "--size", "1MiB"]);
        assert_eq!(daemon.stop(), Some(0));
    }
    disk.freeze_contents();
    let said = Daemon::refused_start(&data, &[]);
    assert!(said.contains("Read-only file system") && said.contains("must be on a writable disk"), "{said}");
    let said = Daemon::refused_start(&disk.path().join("new"), &[]);
    assert!(said.contains("Read-only file system") && said.contains("/new"), "{said}");
    let said = Daemon::refused_start(&tmp.path().join("data"), &["--store", &bucket]);
    assert!(said.contains("Read-only file system") && said.contains("/bucket"), "{said}");
}

/// Where a volume's log is.
fn log_segments(daemon: &Daemon, volume: &str) -> Vec<PathBuf> {
    let id = daemon.volume(volume)["id"].as_str().unwrap().to_owned();
    let dir = daemon.data().join("volumes").join(id).join("wal");
    let mut files: Vec<PathBuf> = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    files
}

/// Where `what` stands in one of the files.
fn find(files: &[PathBuf], what: &[u8]) -> Option<(PathBuf, usize)> {
    files.iter().find_map(|path| {
        let bytes = fs::read(path).unwrap_or_default();
        // Payload begins at block boundaries in the log, anywhere in a chunk.
        let first = what[0];
        (0..bytes.len().saturating_sub(what.len()))
            .find(|&at| bytes[at] == first && bytes[at..at + what.len()] == *what)
            .map(|at| (path.clone(), at))
    })
}

/// Turns one bit of a file over; a second time turns it back.
fn flip(path: &Path, at: usize) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at as u64).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], at as u64).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_rotten_log_keeps_its_volume_closed_and_no_other() {
    let tmp = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(tmp.path(), &["--destage-age", "1h", "--log-segment", "1MiB"]);
    let mut shadows = Vec::new();
    for (seed, name) in [(3, "good"), (4, "bad")] {
        daemon.json(&["volume", "create", name, "--size", "8MiB"]);
        let mut client = daemon.attach(name);
        let mut shadow = Shadow::new(8 * MIB, seed);
        // Over several segments, and flushed again and again.
        for n in 0..30 {
            shadow.write(&mut client, n * 25 * BLOCK, 25 * BLOCK);
            shadow.flush(&mut client);
        }
        shadows.push(shadow);
    }
    let segments = log_segments(&daemon, "bad");
    assert!(segments.len() > 2, "{segments:?}");
    daemon.kill();
    for n in [3, 14, 22] {
        let (path, at) = find(&segments, &shadows[1].bytes()[(n * 25 + 7) * BLOCK..][..64]).unwrap();
        flip(&path, at + 1000);
        let before: Vec<Vec<u8>> = segments.iter().map(|path| fs::read(path).unwrap()).collect();
        daemon.restart();
        assert!(daemon.ready.contains("1 of 2 volumes open"), "{}", daemon.ready);
        let volume = daemon.volume("bad");
        let why = volume["error"].as_str().unwrap();
        // The frame begins with its header, one block before its payload.
        let frame = at - 8 * BLOCK;
        assert!(
            why.contains(&format!("log segment {} is damaged at byte {frame}: ", path.display())),
            "{frame}: {why}"
        );
        assert!(daemon.log().contains(why) && daemon.status_page().contains(why), "{why}");
        assert_eq!(volume["state"], "failed");
        assert!(daemon.refused(&["volume", "open", "bad"]).contains("is damaged at byte"));
        assert!(NbdClient::connect_unix(tmp.path().join("nbd.sock"), "bad").is_err());
        shadows[0].check_all(&mut daemon.attach("good"));
        let after: Vec<Vec<u8>> = segments.iter().map(|path| fs::read(path).unwrap()).collect();
        assert!(before == after, "a log that is not understood was changed");

        // Once repaired, everything is there.
        flip(&path, at + 1000);
        assert_eq!(daemon.json(&["volume", "open", "bad"])["state"], "open");
        shadows[1].check_all(&mut daemon.attach("bad"));
        daemon.kill();
    }
}

#[test]
fn a_torn_tail_is_no_error() {
    for (round, garbage) in [false, true].into_iter().enumerate() {
        let tmp = tempfile::tempdir().unwrap();
        let mut daemon = Daemon::start(tmp.path(), &["--destage-age", "1h"]);
        daemon.json(&["volume", "create", "disk", "--size", "8MiB"]);
        let mut client = daemon.attach("disk");
        let mut shadow = Shadow::new(8 * MIB, 5);
        for n in 0..5 {
            shadow.write(&mut client, n * 64 * BLOCK, 64 * BLOCK);
        }
        shadow.flush(&mut client);
        // Answered, and never flushed.
        let late = common::pattern(6, 64 * BLOCK);
        client.write((4 * MIB) as u64, &late).unwrap();
        let segments = log_segments(&daemon, "disk");
        daemon.kill();
        let (path, at) = find(&segments, &late[32 * BLOCK..][..64]).unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        let tail = if garbage { common::pattern(7, 32 * BLOCK).to_vec() } else { vec![0; 32 * BLOCK] };
        file.write_all_at(&tail, at as u64).unwrap();
        daemon.restart();
        assert!(daemon.ready.contains("1 of 1 volumes open"), "{}", daemon.log());
        assert!(daemon.log().contains("torn_tail=true"), "{}", daemon.log());
        let mut client = daemon.attach("disk");
        shadow.check_all(&mut client);
        // And it goes on from there, over the torn tail.
        shadow.scribble(&mut client, 50);
        shadow.flush(&mut client);
        if round == 0 {
            daemon.restart();
            shadow.check_all(&mut daemon.attach("disk"));
        }
        drop(client);
        assert_eq!(daemon.stop(), Some(0));
    }
}

/// The chunks of a directory store, by number.
fn chunks(bucket: &Path) -> Vec<PathBuf> {
    let all = contents(&bucket.join("chunks"));
    let mut chunks: Vec<PathBuf> = all.into_keys().collect();
    chunks.sort_by_key(|path| path.file_name().unwrap().to_owned());
    chunks
}

/// How a damaged chunk is called in messages.
fn name_of(chunk: &Path) -> &str {
    chunk.file_name().unwrap().to_str().unwrap()
}

#[test]
fn damaged_chunks_are_errors_and_never_data() {
    let tmp = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(tmp.path(), &["--destage-age", "200ms"]);
    daemon.json(&["volume", "create", "disk", "--size", "16MiB", "--chunk-size", "1MiB", "--codec", "none"]);
    let mut shadow = Shadow::new(16 * MIB, 8);
    let mut client = daemon.attach("disk");
    // One log frame and one chunk for each.
    for n in 0..12 {
        shadow.write(&mut client, n * MIB, MIB);
    }
    daemon.wait_drained("disk");
    drop(client);
    assert_eq!(daemon.stop_in_place(), Some(0));
    let chunks = chunks(&tmp.path().join("bucket"));
    assert!(chunks.len() >= 12, "{chunks:?}");
    let holder = |block: usize| find(&chunks, &shadow.bytes()[block * BLOCK..][..64]).unwrap();

    // One bit, a missing end, a missing object, and an object in the place of another.
    let (flipped, at) = holder(2 * 256 + 100);
    flip(&flipped, at + 5);
    let (cut, at) = holder(4 * 256 + 128);
    fs::File::options().write(true).open(&cut).unwrap().set_len(at as u64 + 100).unwrap();
    let (gone, _) = holder(6 * 256 + 10);
    fs::remove_file(&gone).unwrap();
    let (swapped, _) = holder(8 * 256 + 10);
    fs::copy(holder(9 * 256 + 10).0, &swapped).unwrap();
    let (emptied, _) = holder(10 * 256 + 10);
    fs::write(&emptied, b"").unwrap();

    daemon.restart();
    let mut client = daemon.attach("disk");
    let mut failed = BTreeMap::new();
    let mut found = [0; BLOCK];
    for block in 0..16 * 256 {
        match client.read((block * BLOCK) as u64, &mut found) {
            Ok(()) => assert!(found == shadow.bytes()[block * BLOCK..][..BLOCK], "block {block} reads back wrong"),
            Err(error) => {
                assert_eq!(error.raw_os_error(), Some(libc::EIO), "block {block}: {error}");
                failed.entry(block / 256).or_insert_with(Vec::new).push(block);
            }
        }
    }
    // What a frame holds goes with it, 16 blocks; the rest of the chunk stays.
    assert!(failed[&2].contains(&(2 * 256 + 100)) && failed[&2].len() <= 16, "{:?}", failed[&2]);
    assert!(failed[&4].contains(&(4 * 256 + 128)) && failed[&4].len() < 160, "{:?}", failed[&4]);
    for lost in [6, 8, 10] {
        assert_eq!(failed[&lost].len(), 256, "MiB {lost}");
    }
    assert_eq!(failed.keys().copied().collect::<Vec<_>>(), [2, 4, 6, 8, 10]);
    let log = daemon.log();
    for chunk in [&flipped, &cut, &gone, &swapped, &emptied] {
        assert!(log.contains(name_of(chunk)), "{} is not in\n{log}", name_of(chunk));
    }

    // A long read over it fails as a whole, reads beside it do not, and no sub-block write invents the rest of a block.
    let mut long = vec![0; 2 * MIB];
    assert_eq!(errno(client.read(5 << 20, &mut long)), libc::EIO);
    assert_eq!(errno(client.write((6 * MIB + 100) as u64, b"small")), libc::EIO);
    assert_eq!(errno(client.read((6 * MIB) as u64, &mut found)), libc::EIO);
    shadow.check(&mut client, 5 * MIB, MIB);
    // Whole blocks may be written anew, and are then good again.
    for mib in [2, 4, 6, 8, 10] {
        shadow.write(&mut client, mib * MIB, MIB);
    }
    shadow.check_all(&mut client);
    daemon.wait_drained("disk");
    drop(client);
    assert_eq!(daemon.stop_in_place(), Some(0));
    daemon.restart();
    shadow.check_all(&mut daemon.attach("disk"));
}

#[test]
fn a_new_host_opens_no_volume_whose_history_has_a_hole() {
    let tmp = tempfile::tempdir().unwrap();
    let (bucket, data) = (tmp.path().join("bucket"), tmp.path().join("data"));
    let store = format!("dir:{}", bucket.display());
    let mut daemon = Daemon::start(&data, &["--store", &store]);
    let mut shadow = Shadow::new(32 * MIB, 9);
    daemon.json(&["volume", "create", "disk", "--size", "32MiB", "--chunk-size", "1MiB"]);
    daemon.json(&["volume", "create", "other", "--size", "1MiB"]);
    let mut client = daemon.attach("disk");
    for n in 0..32 {
        shadow.write(&mut client, n * MIB, MIB);
    }
    shadow.flush(&mut client);
    daemon.wait_drained("disk");
    let id = daemon.volume("disk")["id"].as_str().unwrap().to_owned();
    daemon.kill();
    let chunks: Vec<PathBuf> =
        chunks(&bucket).into_iter().filter(|path| path.to_str().unwrap().contains(&id)).collect();
    assert!(chunks.len() >= 24, "{chunks:?}");
    let aside = tmp.path().join("aside");
    for damage in ["gone", "flip", "cut"] {
        let chunk = &chunks[5];
        fs::copy(chunk, &aside).unwrap();
        match damage {
            "flip" => flip(chunk, 50),
            "cut" => fs::File::options().write(true).open(chunk).unwrap().set_len(90).unwrap(),
            _ => fs::remove_file(chunk).unwrap(),
        }
        let before = contents(&bucket);
        fs::remove_dir_all(&data).unwrap();
        daemon.restart();
        for name in ["disk", "other"] {
            daemon.run(&["volume", "open", name, "--force"]);
        }
        let volume = daemon.volume("disk");
        assert_eq!(volume["state"], "failed", "{damage}: {volume}");
        let why = volume["error"].as_str().unwrap();
        assert!(why.contains(name_of(chunk)), "{damage}: {why}");
        assert!(daemon.log().contains(why), "{damage}: {why}");
        assert_eq!(daemon.volume("other")["state"], "open");
        let after = contents(&bucket);
        let same = |name: &Path| before.get(name) == after.get(name);
        assert!(chunks.iter().all(|chunk| same(chunk)), "{damage}: a chunk was changed");
        fs::copy(&aside, chunk).unwrap();
        assert_eq!(daemon.json(&["volume", "open", "disk"])["state"], "open");
        shadow.check_all(&mut daemon.attach("disk"));
        daemon.kill();
    }
}

#[test]
fn a_damaged_manifest_keeps_its_volume_closed_and_no_other() {
    let tmp = tempfile::tempdir().unwrap();
    let mut daemon = Daemon::start(tmp.path(), &[]);
    let mut shadow = Shadow::new(MIB, 10);
    for name in ["a", "b"] {
        daemon.json(&["volume", "create", name, "--size", "1MiB"]);
    }
    shadow.scribble(&mut daemon.attach("a"), 10);
    assert_eq!(daemon.stop_in_place(), Some(0));
    let manifest = tmp.path().join("bucket/volumes/b/manifest");
    let whole = fs::read(&manifest).unwrap();
    for damage in 0..4 {
        match damage {
            0 => flip(&manifest, 41),
            1 => fs::write(&manifest, &whole[..whole.len() - 1]).unwrap(),
            2 => fs::write(&manifest, b"").unwrap(),
            _ => drop(fs::copy(tmp.path().join("bucket/volumes/a/manifest"), &manifest).unwrap()),
        }
        let damaged = fs::read(&manifest).unwrap();
        daemon.restart();
        assert!(daemon.ready.contains("1 of 2 volumes open"), "{}", daemon.ready);
        let why = daemon.volume("b")["error"].as_str().unwrap_or_default().to_owned();
        assert!(why.contains("the manifest of volume \"b\" is damaged"), "{damage}: {why}");
        assert!(daemon.log().contains(&why) && daemon.status_page().contains(&why), "{why}");
        assert!(daemon.refused(&["volume", "create", "b", "--size", "1MiB"]).contains("exists already"));
        assert!(daemon.refused(&["volume", "open", "b"]).contains("is damaged"));
        let said = daemon.refused(&["volume", "delete", "b", "--yes"]);
        assert!(said.contains("is damaged"), "{said}");
        shadow.check_all(&mut daemon.attach("a"));
        assert_eq!(fs::read(&manifest).unwrap(), damaged, "a manifest that is not understood was changed");
        assert_eq!(daemon.stop_in_place(), Some(0));
    }
    fs::write(&manifest, &whole).unwrap();
    daemon.restart();
    assert!(daemon.ready.contains("2 of 2 volumes open"), "{}", daemon.ready);
}

const STEP: usize = 64 << 10;

/// Writes 64 KiB pieces over a volume in a thread of its own until told to stop, or refused.
struct Writer {
    answered: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: std::thread::JoinHandle<Option<std::io::Error>>,
    size: usize,
}

impl Writer {
    fn start(mut client: NbdClient, from: usize, size: usize) -> Self {
        client.set_timeout(None);
        let (answered, stop) = (Arc::new(AtomicUsize::new(from)), Arc::new(AtomicBool::new(false)));
        let thread = std::thread::spawn({
            let (answered, stop) = (answered.clone(), stop.clone());
            move || {
                let mut n = from;
                while !stop.load(Ordering::Relaxed) {
                    if let Err(error) = client.write((n * STEP % size) as u64, &Self::piece(n)) {
                        return Some(error);
                    }
                    n += 1;
                    answered.store(n, Ordering::Release);
                }
                None
            }
        });
        Self { answered, stop, thread, size }
    }

    /// What the `n`th write writes.
    fn piece(n: usize) -> Vec<u8> {
        common::pattern(n as u64, STEP).to_vec()
    }

    /// Writes answered, counted from the first writer's first.
    fn answered(&self) -> usize {
        self.answered.load(Ordering::Acquire)
    }

    /// Waits until nothing was answered for two seconds. The writer must be waiting then, not refused.
    fn wait_stuck(&self) -> usize {
        let ended = || self.thread.is_finished();
        let (stuck, last) = wait_still(Duration::from_secs(60), Duration::from_secs(2), || self.answered(), ended);
        assert!(
            stuck && !self.thread.is_finished(),
            "{} writes were answered; finished: {}",
            last,
            self.thread.is_finished()
        );
        last
    }

    /// Waits until `more` writes are answered.
    fn wait_going(&self, more: usize, daemon: &Daemon) {
        let goal = self.answered() + more;
        let going = wait(Duration::from_secs(60), || self.answered() >= goal);
        assert!(
            going,
            "the writer does not go on: {} of {goal}; {}\n{}",
            self.answered(),
            daemon.stats("disk"),
            daemon.log()
        );
    }

    /// Checks everything answered, by another client.
    fn check(&self, client: &mut NbdClient) {
        Self::check_written(client, self.answered(), self.size);
    }

    fn check_written(client: &mut NbdClient, answered: usize, size: usize) {
        let mut found = vec![0; STEP];
        // The oldest pieces are overwritten when it goes round, the very oldest perhaps just now.
        for n in (answered + 1).saturating_sub(size / STEP)..answered {
            client.read((n * STEP % size) as u64, &mut found).unwrap_or_else(|e| panic!("write {n}: {e}"));
            assert!(found == Self::piece(n), "write {n} of {answered} is gone");
        }
    }

    fn stop(self) -> usize {
        self.stop.store(true, Ordering::Relaxed);
        let (answered, refused) = (self.answered.clone(), self.thread.join().unwrap());
        assert!(refused.is_none(), "{refused:?}");
        answered.load(Ordering::Acquire)
    }
}

const SMALL: [&str; 8] =
    ["--log-size", "16MiB", "--log-segment", "1MiB", "--destage-age", "200ms", "--dirty-memory", "1MiB"];

#[test]
fn a_full_disk_makes_writers_wait_and_loses_nothing() {
    let Some(disk) = Disk::new(96 << 20) else { return };
    let ballast = disk.fill_up(40 << 20);
    // Log, table and bucket on the same disk.
    let data = disk.path().join("data");
    let mut daemon = Daemon::start(&data, &SMALL);
    daemon.json(&["volume", "create", "disk", "--size", "24MiB", "--chunk-size", "1MiB"]);
    let writer = Writer::start(daemon.attach("disk"), 0, 24 * MIB);
    let stuck_at = writer.wait_stuck();
    assert!(stuck_at * STEP > 20 * MIB, "only {stuck_at} writes were answered");
    assert!(disk.free() < 4 << 20, "{} bytes are free", disk.free());
    writer.check(&mut daemon.attach("disk"));
    let page = daemon.status_page();
    assert!(page.contains("! disk: ") && page.contains("No space left"), "{page}");
    let said = daemon.refused(&["volume", "create", "second", "--size", "1MiB"]);
    assert!(said.contains("No space left"), "{said}");

    // With some room it goes on by itself.
    fs::remove_file(&ballast).unwrap();
    writer.wait_going(100, &daemon);
    let written = writer.stop();
    daemon.wait_drained("disk");
    Writer::check_written(&mut daemon.attach("disk"), written, 24 * MIB);
    assert_eq!(daemon.json(&["volume", "open", "second"])["state"], "open");
    assert!(wait(Duration::from_secs(10), || daemon.stats("disk")["log_trouble"].is_null()));
    assert!(!daemon.status_page().contains("! "), "{}", daemon.status_page());

    // Full again, and then the crash.
    disk.fill_up(3 << 20);
    let writer = Writer::start(daemon.attach("disk"), written, 24 * MIB);
    let stuck_at = writer.wait_stuck();
    assert!(stuck_at > written);
    daemon.kill();
    assert!(writer.thread.join().unwrap().is_some());
    disk.fill_up(0);
    // Whether it opens without room or not, it says what is missing.
    daemon.restart();
    if let Some(why) = daemon.volume("disk")["error"].as_str() {
        assert!(why.contains("No space left"), "{why}");
    }
    fs::remove_file(&ballast).unwrap();
    // By itself if it was the bucket that had no room, by hand if it was the log.
    let opened = wait(Duration::from_secs(40), || {
        let volume = daemon.volume("disk");
        if volume["state"] == "failed" {
            daemon.run(&["volume", "open", "disk"]);
        }
        volume["state"] == "open"
    });
    assert!(opened, "{}\n{}", daemon.volume("disk"), daemon.log());
    Writer::check_written(&mut daemon.attach("disk"), stuck_at, 24 * MIB);
    daemon.wait_drained("disk");
    assert_eq!(daemon.stop(), Some(0));
}

#[test]
fn a_full_bucket_makes_writers_wait_when_the_log_is_full_too() {
    let Some(disk) = Disk::new(64 << 20) else { return };
    let ballast = disk.fill_up(8 << 20);
    let tmp = tempfile::tempdir().unwrap();
    let store = format!("dir:{}", disk.path().join("bucket").display());
    let mut daemon = Daemon::start(tmp.path(), &[&SMALL[..], &["--store", &store]].concat());
    daemon.json(&["volume", "create", "disk", "--size", "16MiB", "--chunk-size", "1MiB"]);
    let writer = Writer::start(daemon.attach("disk"), 0, 16 * MIB);
    let stuck_at = writer.wait_stuck();
    assert!(stuck_at * STEP > 14 * MIB, "only {stuck_at} writes were answered");
    writer.check(&mut daemon.attach("disk"));
    let page = daemon.status_page();
    assert!(page.contains("! disk: destaging does not get on: ") && page.contains("No space left"), "{page}");
    daemon.attach("disk").flush().unwrap();
    daemon.kill();
    let mut answered = stuck_at;
    assert!(writer.thread.join().unwrap().is_some());

    fs::remove_file(&ballast).unwrap();
    daemon.restart();
    let client = daemon.attach("disk");
    Writer::check_written(&mut daemon.attach("disk"), answered, 16 * MIB);
    let writer = Writer::start(client, answered, 16 * MIB);
    writer.wait_going(50, &daemon);
    answered = writer.stop();
    daemon.wait_drained("disk");
    Writer::check_written(&mut daemon.attach("disk"), answered, 16 * MIB);
}

#[test]
fn a_log_without_room_to_grow_grows_when_there_is_some() {
    let Some(disk) = Disk::new(64 << 20) else { return };
    let tmp = tempfile::tempdir().unwrap();
    let store = format!("dir:{}", tmp.path().join("bucket").display());
    let daemon = Daemon::start(&disk.path().join("data"), &[&SMALL[..], &["--store", &store]].concat());
    // Room for the first segment and the table, not for a second segment: the one that is being filled is never free
    // for reuse.
    let ballast = disk.fill_up(3 << 19);
    daemon.json(&["volume", "create", "disk", "--size", "16MiB", "--chunk-size", "1MiB"]);
    let writer = Writer::start(daemon.attach("disk"), 0, 16 * MIB);
    let stuck_at = writer.wait_stuck();
    assert!(stuck_at * STEP < MIB, "{stuck_at} writes were answered");
    // All but the write that waits.
    let drained = || daemon.stats("disk")["dirty_bytes"].as_u64().unwrap() as usize <= STEP;
    assert!(wait(Duration::from_secs(10), drained), "{}", daemon.stats("disk"));
    writer.check(&mut daemon.attach("disk"));
    let page = daemon.status_page();
    assert!(page.contains("! disk: the log cannot grow: ") && page.contains("No space left"), "{page}");
    fs::remove_file(&ballast).unwrap();
    writer.wait_going(300, &daemon);
    let answered = writer.stop();
    daemon.wait_drained("disk");
    Writer::check_written(&mut daemon.attach("disk"), answered, 16 * MIB);
    let stats = daemon.stats("disk");
    assert_eq!(stats["log_capacity_bytes"], 16 << 20, "{stats}");
    assert_eq!(stats["log_trouble"], Value::Null);
    assert_eq!(daemon.stop(), Some(0));
}
