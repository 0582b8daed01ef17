//! NVMe/TCP against the real program, with the initiator in user space.

mod common;

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use blockd::export::nvme::client::{
    self, Data, Error, NvmeClient, Options, Queue, deallocate_command, read_command, write_command, zero_command,
};
use blockd::export::nvme::command::{Command, Status, admin, fuse, io};
use blockd::export::nvme::data::{CopyRange, DiscoveryEntry};
use blockd::export::nvme::{DISCOVERY_NQN, NSID};
use common::daemon::Daemon;
use zerocopy::{FromBytes, IntoBytes};

const MIB: u64 = 1 << 20;

fn options() -> Options {
    Options { timeout: Some(Duration::from_secs(30)), entries: 64, ..Options::default() }
}

fn other_host() -> Options {
    Options {
        host: "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-0000-0000-0000000000b2".into(),
        host_id: [0xb2; 16],
        ..options()
    }
}

struct Served {
    daemon: Daemon,
    addr: SocketAddr,
    nqn: String,
    _dir: tempfile::TempDir,
}

fn serve(more: &[&str]) -> Served {
    let dir = tempfile::tempdir().unwrap();
    // Once chosen the port is kept over restarts.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let at = format!("127.0.0.1:{port}");
    let daemon = Daemon::start(dir.path(), &[&["--nvme", at.as_str()], more].concat());
    daemon.json(&["volume", "create", "disk", "--size", "64MiB"]);
    let nqn = daemon.volume("disk")["nqn"].as_str().unwrap().to_owned();
    Served { daemon, addr: at.parse().unwrap(), nqn, _dir: dir }
}

impl Served {
    fn connect(&self, queues: u16, options: &Options) -> NvmeClient {
        self.try_connect(queues, options).unwrap_or_else(|e| panic!("{e}\n{}", self.daemon.log()))
    }

    fn try_connect(&self, queues: u16, options: &Options) -> Result<NvmeClient, Error> {
        NvmeClient::connect(self.addr, &self.nqn, queues, options)
    }
}

fn pattern(seed: u64, len: usize) -> Vec<u8> {
    common::pattern(seed, len).to_vec()
}

fn refused<T>(result: Result<T, Error>) -> Status {
    match result {
        Ok(_) => panic!("it worked"),
        Err(error) => error.status().unwrap_or_else(|| panic!("no status: {error}")),
    }
}

#[test]
fn a_volume_is_found_identified_written_and_read() {
    let served = serve(&[]);
    let mut discovery = NvmeClient::connect(served.addr, DISCOVERY_NQN, 0, &options()).unwrap();
    assert_eq!(discovery.identity().cntrltype, 2);
    let page = discovery.log_page(0x70, 3072, 0).unwrap();
    assert_eq!(page[8], 2, "the discovery subsystem and a volume");
    let (entry, _) = DiscoveryEntry::read_from_prefix(&page[2048..]).unwrap();
    assert_eq!((entry.transport, entry.family, entry.kind), (3, 1, 2));
    assert!(entry.subsystem.starts_with(served.nqn.as_bytes()));
    assert!(entry.address.starts_with(b"127.0.0.1 "));

    let mut client = served.connect(2, &options());
    assert_eq!(client.io.len(), 2);
    assert_eq!(client.size(), 64 * MIB);
    let namespace = client.refresh().unwrap();
    assert_eq!((namespace.nsfeat & 0x10, namespace.npwg.get(), namespace.dlfeat), (0x10, 7, 9));
    let id = served.daemon.volume("disk")["id"].as_str().unwrap().to_owned();
    assert_eq!(namespace.nguid.iter().map(|b| format!("{b:02x}")).collect::<String>(), id);
    for (offset, len) in
        [(0, 512), (512, 4096), (MIB, 64 << 10), (2 * MIB, 68 << 10), (4 * MIB, 4 << 20), (99 * 512, 3 * 512)]
    {
        let data = pattern(offset, len);
        client.write(offset, &data, false).unwrap();
        assert!(client.read(offset, len as u32).unwrap() == data, "{offset} {len}");
    }
    client.flush().unwrap();
    client.write(MIB, &pattern(5, 4096), true).unwrap();
    client.zero(2 * MIB, 64 << 10).unwrap();
    client.deallocate(4 * MIB, 2 * MIB).unwrap();
    assert!(client.read(2 * MIB, 64 << 10).unwrap().iter().all(|b| *b == 0));
    assert!(client.read(4 * MIB, 2 << 20).unwrap().iter().all(|b| *b == 0));
    assert!(client.read(6 * MIB, 2 << 20).unwrap() == pattern(4 * MIB, 4 << 20)[2 << 20..]);
    // What NBD sees is the same.
    let mut nbd = served.daemon.attach("disk");
    let mut block = vec![0; 4096];
    nbd.read(MIB, &mut block).unwrap();
    assert!(block == pattern(5, 4096));
    let hosts = served.daemon.volume("disk")["nvme_hosts"].clone();
    assert_eq!((hosts[0]["nqn"].as_str(), hosts[0]["queues"].as_u64()), (Some(options().host.as_str()), Some(2)));
}

#[test]
fn digests_flow_control_and_depth_make_no_difference() {
    let served = serve(&[]);
    for (digests, flow_control) in
        [((true, false), false), ((false, true), true), ((true, true), false), ((false, false), true)]
    {
        let mut client = served.connect(1, &Options { digests, flow_control, ..options() });
        let queue = &mut client.io[0];
        // Large writes ask for their data, small ones carry it.
        let sizes = [512usize, 4096, 100 << 10, 1 << 20];
        let mut waiting = std::collections::HashMap::new();
        for i in 0..40u64 {
            let data = pattern(i, sizes[i as usize % 4]);
            let command = write_command(i * MIB, data.len() as u32, i % 7 == 0);
            waiting.insert(queue.submit(command, Data::Out(data)).unwrap(), i);
        }
        while !waiting.is_empty() {
            let done = queue.next_done().unwrap();
            assert_eq!(done.status, Status::SUCCESS);
            waiting.remove(&done.cid).unwrap();
        }
        for i in 0..40u64 {
            let len = sizes[i as usize % 4] as u32;
            waiting.insert(queue.submit(read_command(i * MIB, len), Data::In(len)).unwrap(), i);
        }
        let mut heads = 0;
        while !waiting.is_empty() {
            let done = queue.next_done().unwrap();
            let i = waiting.remove(&done.cid).unwrap();
            assert!(done.data == pattern(i, sizes[i as usize % 4]), "{i}");
            heads += u32::from(done.sq_head > 0);
        }
        assert_eq!(heads > 0, flow_control);
    }
}

#[test]
fn wrong_commands_get_the_status_that_says_why() {
    let served = serve(&[]);
    let mut client = served.connect(1, &options());
    let end = client.size();
    let queue = &mut client.io[0];
    let mut status = |command: Command, data: Data| refused(queue.call(command, data));
    assert_eq!(status(Command::new(0x77, 0, NSID), Data::None), Status::INVALID_OPCODE);
    assert_eq!(status(Command::new(io::FLUSH, 0, 2), Data::None), Status::INVALID_NAMESPACE);
    let mut elsewhere = read_command(0, 512);
    elsewhere.nsid = 7.into();
    assert_eq!(status(elsewhere, Data::In(512)), Status::INVALID_NAMESPACE);
    assert_eq!(status(read_command(end, 512), Data::In(512)), Status::LBA_OUT_OF_RANGE);
    assert_eq!(status(write_command(end - 512, 1024, false), Data::Out(vec![0; 1024])), Status::LBA_OUT_OF_RANGE);
    assert_eq!(status(write_command(0, 1024, false), Data::Out(vec![0; 512])), Status::SGL_LENGTH);
    assert_eq!(status(write_command(0, 8 << 20, false), Data::Out(vec![0; 8 << 20])), Status::INVALID_FIELD);
    assert_eq!(status(read_command(0, 512), Data::In(1024)), Status::SGL_LENGTH);
    let far = Command::new(io::READ, 0, NSID).with_blocks(u64::MAX, 1);
    assert_eq!(status(far, Data::In(512)), Status::LBA_OUT_OF_RANGE);
    let (command, data) = deallocate_command(&[(end, 512)]);
    assert_eq!(status(command, data), Status::LBA_OUT_OF_RANGE);
    assert_eq!(status(zero_command(end - 512, 1024, false, true), Data::None), Status::LBA_OUT_OF_RANGE);
    let identify = Command::new(admin::IDENTIFY, 0, 5000).with_dword(10, 0);
    assert_eq!(refused(client.admin.call(identify, Data::In(4096))), Status::INVALID_NAMESPACE);
    assert_eq!(refused(client.log_page(0x70, 1024, 0)), Status::INVALID_LOG_PAGE);
    assert_eq!(refused(client.admin.call(Command::new(0x99, 0, 0), Data::None)), Status::INVALID_OPCODE);
    // Abort is answered, and says that nothing was.
    assert_eq!(client.admin.call(Command::new(admin::ABORT, 0, 0), Data::None).unwrap().result, 1);
    client.read(0, 512).unwrap();
}

#[test]
fn data_is_compared_verified_and_copied() {
    let mut served = serve(&[]);
    let mut client = served.connect(1, &options());
    let data = pattern(1, 8192);
    client.write(MIB, &data, false).unwrap();
    let queue = &mut client.io[0];
    let compare = |len| Command { opcode: io::COMPARE, ..read_command(MIB, len) };
    queue.call(compare(8192), Data::Out(data.clone())).unwrap();
    assert_eq!(refused(queue.call(compare(8192), Data::Out(pattern(2, 8192)))), Status::COMPARE_FAILURE);
    queue.call(Command { opcode: io::VERIFY, ..read_command(MIB, 8192) }, Data::None).unwrap();

    // A pair: the write happens if and only if the comparison holds.
    let mut pair = |expected: Vec<u8>, new: Vec<u8>| {
        let (mut first, mut second) = (compare(4096), write_command(MIB, 4096, false));
        first.flags |= fuse::FIRST;
        second.flags |= fuse::SECOND;
        let first = queue.submit(first, Data::Out(expected)).unwrap();
        let second = queue.submit(second, Data::Out(new)).unwrap();
        let mut statuses = std::collections::HashMap::new();
        for _ in 0..2 {
            let done = queue.next_done().unwrap();
            statuses.insert(done.cid, done.status);
        }
        (statuses[&first], statuses[&second])
    };
    let new = pattern(3, 4096);
    assert_eq!(pair(pattern(9, 4096), new.clone()), (Status::COMPARE_FAILURE, Status::FUSED_FAILED));
    assert_eq!(pair(data[..4096].to_vec(), new.clone()), (Status::SUCCESS, Status::SUCCESS));
    assert_eq!(pair(data[..4096].to_vec(), new.clone()), (Status::COMPARE_FAILURE, Status::FUSED_FAILED));
    let mut lonely = write_command(MIB, 4096, false);
    lonely.flags |= fuse::SECOND;
    assert_eq!(refused(queue.call(lonely, Data::Out(new.clone()))), Status::FUSED_MISSING);
    let mut first = compare(4096);
    first.flags |= fuse::FIRST;
    queue.submit(first, Data::Out(new.clone())).unwrap();
    queue.submit(read_command(0, 512), Data::In(512)).unwrap();
    let done = [queue.next_done().unwrap(), queue.next_done().unwrap()];
    assert!(done.iter().any(|done| done.status == Status::FUSED_MISSING));

    // The same when what is compared has to be fetched first.
    served.daemon.wait_drained("disk");
    served.daemon.restart();
    let mut client = served.connect(1, &options());
    let queue = &mut client.io[0];
    let newest = pattern(4, 4096);
    for (expected, holds) in [(&data[..4096], false), (&new[..], true)] {
        let (mut first, mut second) = (compare(4096), write_command(MIB, 4096, true));
        first.flags |= fuse::FIRST;
        second.flags |= fuse::SECOND;
        queue.submit(first, Data::Out(expected.to_vec())).unwrap();
        queue.submit(second, Data::Out(newest.clone())).unwrap();
        let done = [queue.next_done().unwrap(), queue.next_done().unwrap()];
        assert_eq!(done.iter().all(|done| done.status.is_success()), holds);
    }
    assert!(client.read(MIB, 4096).unwrap() == newest);
    let queue = &mut client.io[0];

    // Two ranges, one after the other: of parts of blocks.
    let copy = |queue: &mut client::Queue, sources: &[(u64, u64)], to: u64| {
        let mut ranges = Vec::new();
        for (offset, len) in sources {
            let range = CopyRange {
                reserved: 0.into(),
                lba: (offset / 512).into(),
                blocks: ((len / 512 - 1) as u16).into(),
                rest: [0; 14],
            };
            ranges.extend_from_slice(range.as_bytes());
        }
        let copy = Command::new(io::COPY, 0, NSID).with_dword(10, (to / 512) as u32);
        queue.call(copy.with_dword(12, sources.len() as u32 - 1), Data::Out(ranges)).map(|_| ())
    };
    copy(queue, &[(MIB + 4096, 4096), (MIB, 512)], 8 * MIB).unwrap();
    let copied = client.read(8 * MIB, 4096 + 512).unwrap();
    assert!(copied[..4096] == data[4096..] && copied[4096..] == newest[..512]);

    // Of whole blocks, which moves no data: of what is in the bucket, of that and what was just written, of itself.
    let referred = || served.daemon.stats("disk")["referred_blocks"].as_u64().unwrap();
    let source = pattern(5, 64 << 10);
    client.write(16 * MIB, &source, true).unwrap();
    served.daemon.wait_drained("disk");
    // Until the table knows it, too.
    std::thread::sleep(Duration::from_millis(500));
    let before = referred();
    copy(&mut client.io[0], &[(16 * MIB + 8192, 16384), (16 * MIB, 8192)], 20 * MIB).unwrap();
    assert_eq!(referred() - before, 6);
    client.write(16 * MIB, &newest, false).unwrap();
    copy(&mut client.io[0], &[(16 * MIB, 8192), (20 * MIB, 4096)], 24 * MIB).unwrap();
    assert_eq!(referred() - before, 8);
    copy(&mut client.io[0], &[(24 * MIB, 8192)], 24 * MIB + 4096).unwrap();
    // The same over the admin socket.
    let by_admin = |from, to, len| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let request = blockd::admin::api::CopyRange { from, to, len, durable: true };
        let admin = blockd::cli::Client::new(served.daemon.data().join("admin.sock"), served.daemon.data());
        runtime.block_on(admin.copy("disk", &request))
    };
    by_admin(20 * MIB, 28 * MIB, 24576).unwrap();
    assert!(client.read(28 * MIB, 24576).unwrap() == client.read(20 * MIB, 24576).unwrap());
    assert!(by_admin(0, 4096, 8192).unwrap_err().to_string().contains("overlap"));
    assert!(by_admin(0, 512, 512).unwrap_err().to_string().contains("whole blocks"));
    assert!(by_admin(1 << 50, 0, 4096).unwrap_err().to_string().contains("outside"));
    let past_the_end = client.size() - 4096;
    assert_eq!(refused(copy(&mut client.io[0], &[(16 * MIB, 8192)], past_the_end)), Status::LBA_OUT_OF_RANGE);
    for served_anew in [false, true] {
        if served_anew {
            served.daemon.wait_drained("disk");
            served.daemon.restart();
            client = served.connect(1, &options());
        }
        let copied = client.read(20 * MIB, 24576).unwrap();
        assert!(copied[..16384] == source[8192..24576] && copied[16384..] == source[..8192]);
        let copied = client.read(24 * MIB, 12288).unwrap();
        assert!(copied[..4096] == newest && copied[4096..8192] == newest && copied[8192..] == source[4096..8192]);
    }
}

#[test]
fn hosts_hear_of_a_new_size_and_of_new_volumes() {
    let served = serve(&[]);
    let mut client = served.connect(1, &options());
    let mut discovery = NvmeClient::connect(served.addr, DISCOVERY_NQN, 0, &options()).unwrap();
    let event = Command::new(admin::ASYNC_EVENT, 0, 0);
    client.admin.submit(event, Data::None).unwrap();
    discovery.admin.submit(event, Data::None).unwrap();
    client.admin.flush().unwrap();
    discovery.admin.flush().unwrap();
    served.daemon.json(&["volume", "resize", "disk", "96MiB"]);
    let done = client.admin.next_done().unwrap();
    assert_eq!((done.status, done.result), (Status::SUCCESS, 0x04_0002));
    assert_eq!(client.log_page(0x04, 4096, 0).unwrap()[..4], 1u32.to_le_bytes());
    assert_eq!(client.log_page(0x04, 4096, 0).unwrap()[..4], [0; 4]);
    client.refresh().unwrap();
    assert_eq!(client.size(), 96 * MIB);
    client.write(90 * MIB, &pattern(1, 4096), true).unwrap();

    served.daemon.json(&["volume", "create", "second", "--size", "1MiB"]);
    let done = discovery.admin.next_done().unwrap();
    assert_eq!(done.result, 0x70_f002);
    let page = discovery.log_page(0x70, 1024, 0).unwrap();
    assert_eq!((page[0], page[8]), (2, 3));

    // A volume that is deleted is gone for good; only then is a host told to give up.
    client.admin.submit(event, Data::None).unwrap();
    client.admin.flush().unwrap();
    let deleted = served.daemon.run(&["volume", "delete", "disk", "--yes", "--force"]);
    assert!(deleted.status.success(), "{deleted:?}");
    assert_eq!(client.admin.next_done().unwrap().result, 0x04_0002);
    assert!(client::identify(&mut client.admin, 2, 0).unwrap().iter().all(|b| *b == 0));
    assert!(!refused(served.try_connect(1, &options())).may_retry());
}

#[test]
fn hosts_that_are_not_listed_are_kept_out() {
    let allowed = format!("disk={}", options().host);
    let served = serve(&["--nvme-host", &allowed, "--nvme-nqn", "disk=nqn.2026-01.com.example:disk"]);
    assert_eq!(served.nqn, "nqn.2026-01.com.example:disk");
    served.connect(1, &options());
    let status = refused(served.try_connect(1, &other_host()));
    assert_eq!(status, Status::CONNECT_HOST);
    let mut discovery = NvmeClient::connect(served.addr, DISCOVERY_NQN, 0, &other_host()).unwrap();
    assert_eq!(discovery.log_page(0x70, 1024, 0).unwrap()[8], 1, "it does not see the volume either");
}

#[test]
fn a_silent_host_is_given_up_and_a_talking_one_is_not() {
    let served = serve(&[]);
    let mut silent = served.connect(1, &Options { keep_alive_ms: 1000, ..options() });
    let mut talking = served.connect(1, &Options { keep_alive_ms: 1000, ..other_host() });
    let begun = Instant::now();
    while begun.elapsed() < Duration::from_secs(3) {
        talking.admin.call(Command::new(admin::KEEP_ALIVE, 0, 0), Data::None).unwrap();
        std::thread::sleep(Duration::from_millis(200));
    }
    talking.read(0, 512).unwrap();
    assert!(silent.admin.call(Command::new(admin::KEEP_ALIVE, 0, 0), Data::None).is_err());
    assert!(silent.read(0, 512).is_err(), "its I/O queues went along");
}

#[test]
fn snapshots_are_disks_that_nobody_can_write() {
    let mut served = serve(&[]);
    let data = pattern(1, 1 << 20);
    let mut client = served.connect(1, &options());
    client.write(MIB, &data, false).unwrap();
    let mut discovery = NvmeClient::connect(served.addr, DISCOVERY_NQN, 0, &options()).unwrap();
    discovery.admin.submit(Command::new(admin::ASYNC_EVENT, 0, 0), Data::None).unwrap();
    discovery.admin.flush().unwrap();
    let made = served.daemon.json(&["snapshot", "create", "disk@one"]);
    client.write(MIB, &pattern(2, 1 << 20), false).unwrap();
    assert_eq!(discovery.admin.next_done().unwrap().result, 0x70_f002);
    let page = discovery.log_page(0x70, 4096, 0).unwrap();
    assert_eq!(page[8], 3, "discovery, the volume, and its snapshot");
    let info = served.daemon.json(&["connect-info", "disk@one"]);
    let nqn = info["nqn"].as_str().unwrap().to_owned();
    assert_eq!(made["nqn"], info["nqn"]);
    assert!(page[3072..].windows(nqn.len()).any(|window| window == nqn.as_bytes()));
    assert!(info["fstab"].as_str().unwrap().contains(",ro,"), "{info}");
    for restarted in [false, true] {
        if restarted {
            served.daemon.restart();
        }
        let mut client = NvmeClient::connect(served.addr, &nqn, 2, &options()).unwrap();
        assert_eq!(client.size(), 64 * MIB);
        let namespace = client.refresh().unwrap();
        assert_eq!((namespace.nsattr, namespace.rescap), (1, 0));
        assert_eq!(
            namespace.nguid.iter().map(|b| format!("{b:02x}")).collect::<String>(),
            made["id"].as_str().unwrap()
        );
        assert!(client.read(MIB, 1 << 20).unwrap() == data);
        assert!(client.io[1].call(read_command(MIB, 4096), Data::In(4096)).unwrap().data == data[..4096]);
        client.flush().unwrap();
        let queue = &mut client.io[0];
        let (deallocate, ranges) = deallocate_command(&[(MIB, 4096)]);
        let refusals = [
            (write_command(MIB, 4096, false), Data::Out(vec![0; 4096])),
            (write_command(MIB, 1 << 20, false), Data::Out(vec![0; 1 << 20])),
            (zero_command(MIB, 4096, false, true), Data::None),
            (deallocate, ranges),
        ];
        for (command, data) in refusals {
            assert_eq!(refused(queue.call(command, data)), Status::WRITE_PROTECTED);
        }
        assert_eq!(reserve(queue, io::RESERVATION_REGISTER, 0, [0, 1]), Status::INVALID_OPCODE);
        assert!(client.read(MIB, 1 << 20).unwrap() == data);
        // While it is read the snapshot stays.
        let refused = served.daemon.run(&["snapshot", "delete", "disk@one"]);
        assert!(!refused.status.success());
    }
    until_deleted(&served.daemon, "disk@one");
    assert!(!refused(NvmeClient::connect(served.addr, &nqn, 1, &options())).may_retry());
}

/// Deletes a snapshot as soon as the daemon has seen its readers leave.
fn until_deleted(daemon: &Daemon, snapshot: &str) {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let deleted = daemon.run(&["snapshot", "delete", snapshot]);
        if deleted.status.success() {
            return;
        }
        assert!(Instant::now() < end, "{deleted:?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn hidden_snapshots_are_reached_by_their_names_only() {
    let allowed = format!("disk={}", options().host);
    let served = serve(&["--nvme-hide-snapshots", "--nvme-host", &allowed]);
    let made = served.daemon.json(&["snapshot", "create", "disk@one"]);
    let nqn = made["nqn"].as_str().unwrap();
    let mut discovery = NvmeClient::connect(served.addr, DISCOVERY_NQN, 0, &options()).unwrap();
    assert_eq!(discovery.log_page(0x70, 1024, 0).unwrap()[8], 2, "discovery and the volume");
    NvmeClient::connect(served.addr, nqn, 1, &options()).unwrap();
    // Who may not have the volume may not have its past.
    assert_eq!(refused(NvmeClient::connect(served.addr, nqn, 1, &other_host())), Status::CONNECT_HOST);
}

fn reserve(queue: &mut Queue, opcode: u8, dword: u32, keys: [u64; 2]) -> Status {
    let data = [keys[0].to_le_bytes(), keys[1].to_le_bytes()].concat();
    match queue.call(Command::new(opcode, 0, NSID).with_dword(10, dword), Data::Out(data)) {
        Ok(_) => Status::SUCCESS,
        Err(error) => error.status().unwrap(),
    }
}

#[test]
fn a_reservation_keeps_others_out_also_after_a_restart() {
    const WRITE_EXCLUSIVE: u32 = 1 << 8;
    const PERSIST: u32 = 3 << 30;
    let mut served = serve(&[]);
    {
        let (mut a, mut b) = (served.connect(1, &options()), served.connect(1, &other_host()));
        let data = pattern(1, 4096);
        b.write(0, &data, false).unwrap();
        assert_eq!(reserve(&mut a.io[0], io::RESERVATION_REGISTER, PERSIST, [0, 0xa]), Status::SUCCESS);
        assert_eq!(reserve(&mut a.io[0], io::RESERVATION_ACQUIRE, WRITE_EXCLUSIVE, [0xa, 0]), Status::SUCCESS);
        assert_eq!(refused(b.write(0, &data, false)), Status::RESERVATION_CONFLICT);
        assert_eq!(refused(b.deallocate(0, 4096)), Status::RESERVATION_CONFLICT);
        assert!(b.read(0, 4096).unwrap() == data);
        a.write(0, &pattern(2, 4096), false).unwrap();
    }
    served.daemon.restart();
    let (mut a, mut b) = (served.connect(1, &options()), served.connect(2, &other_host()));
    assert_eq!(refused(b.write(0, &pattern(1, 4096), false)), Status::RESERVATION_CONFLICT);
    a.write(0, &pattern(3, 4096), false).unwrap();
    let report = Command::new(io::RESERVATION_REPORT, 0, NSID).with_dword(10, 127).with_dword(11, 1);
    let page = b.io[0].call(report, Data::In(512)).unwrap().data;
    assert_eq!((page[4], page[5], page[9]), (1, 1, 1), "kind, registrants, persistence");
    assert_eq!((page[66], &page[72..80], &page[80..96]), (1, &0xau64.to_le_bytes()[..], &[0xb1; 16][..]));

    // The other takes it over, and the first hears of it.
    let event = Command::new(admin::ASYNC_EVENT, 0, 0);
    a.admin.submit(event, Data::None).unwrap();
    a.admin.flush().unwrap();
    assert_eq!(reserve(&mut b.io[1], io::RESERVATION_REGISTER, 0, [0, 0xb]), Status::SUCCESS);
    let preempt = 1 | WRITE_EXCLUSIVE;
    assert_eq!(reserve(&mut b.io[1], io::RESERVATION_ACQUIRE, preempt, [0xb, 0xa]), Status::SUCCESS);
    b.write(0, &pattern(4, 4096), false).unwrap();
    assert_eq!(refused(a.write(0, &pattern(5, 4096), false)), Status::RESERVATION_CONFLICT);
    assert_eq!(a.admin.next_done().unwrap().result, 0x80_0006);
    assert_eq!(a.log_page(0x80, 64, 0).unwrap()[8], 1, "registration preempted");
    assert_eq!(reserve(&mut b.io[0], io::RESERVATION_RELEASE, 1, [0xb, 0]), Status::SUCCESS);
    a.write(0, &pattern(5, 4096), false).unwrap();
}

#[test]
fn a_host_that_comes_back_is_never_told_to_give_up() {
    let mut served = serve(&[]);
    for round in 0..5 {
        let mut client = served.connect(1, &options());
        let data = pattern(round, 64 << 10);
        client.write(round * MIB, &data, true).unwrap();
        if round % 2 == 0 {
            served.daemon.kill();
        } else {
            served.daemon.stop_in_place();
        }
        assert!(client.read(0, 512).is_err());
        // While the daemon starts there is nobody, or somebody who says "later".
        let (addr, nqn) = (served.addr, served.nqn.clone());
        let coming_back = std::thread::spawn(move || {
            let end = Instant::now() + Duration::from_secs(30);
            loop {
                match NvmeClient::connect(addr, &nqn, 1, &options()) {
                    Ok(client) => return client,
                    Err(error) => {
                        assert!(error.status().is_none_or(Status::may_retry), "{error}");
                        assert!(Instant::now() < end, "{error}");
                    }
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        served.daemon.restart();
        let mut client = coming_back.join().unwrap();
        assert!(client.read(round * MIB, 64 << 10).unwrap() == data);
    }
    // One whose volume is let go of is asked to come back, too.
    let released = served.daemon.run(&["volume", "release", "disk", "--force"]);
    assert!(released.status.success(), "{released:?}");
    let status = refused(served.try_connect(1, &options()));
    assert!(status.may_retry(), "{status}");
}
