//! The NBD server and its reactor with real sockets and real clients, over a device in memory.
//!
//! Needs nbdinfo, nbdcopy (Debian: libnbd-bin), qemu-img and qemu-io (qemu-utils).

use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use blockd::export::nbd::proto::{
    self, Greeting, InfoQuery, OptionHeader, OptionReply, Request, SimpleReply, command, command_flag, errno, option,
    option_reply,
};
use blockd::export::nbd::server::{Export, Exports, Listen, ListenError, Server};
use blockd::reactor::{DeviceKey, LogShape, RamDevice, ReactorHandle, ReactorOptions};
use zerocopy::{FromBytes, FromZeros, IntoBytes};

struct One(Export);

impl Exports for One {
    fn list(&self) -> Vec<String> {
        vec![self.0.name.clone()]
    }

    fn find(&self, name: &str) -> Option<Export> {
        (name == self.0.name).then(|| self.0.clone())
    }
}

/// A server of one device on a Unix socket.
struct Rig {
    runtime: tokio::runtime::Runtime,
    reactor: ReactorHandle,
    key: DeviceKey,
    _server: Server,
    dir: tempfile::TempDir,
}

impl Rig {
    fn new(device: RamDevice, size: u64) -> Self {
        Self::with_shape(device, size, LogShape::Ring)
    }

    fn with_shape(device: RamDevice, size: u64, log_shape: LogShape) -> Self {
        let runtime = tokio::runtime::Runtime::new().unwrap();
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let (reactor, key, server) = runtime.block_on(async {
            let handle = tokio::runtime::Handle::current();
            let reactor = ReactorHandle::spawn(ReactorOptions { log_shape }, handle).unwrap();
            let key = reactor.add_device(Box::new(device)).await.unwrap();
            let export = Export {
                name: "ram".into(),
                description: String::new(),
                size,
                read_only: false,
                reactor: reactor.clone(),
                key,
            };
            let server = Server::start(&[Listen::Unix(socket)], Arc::new(One(export))).await.unwrap();
            (reactor, key, server)
        });
        Self { runtime, reactor, key, _server: server, dir }
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///ram?socket={}", self.socket().display())
    }

    fn socket(&self) -> std::path::PathBuf {
        self.dir.path().join("socket")
    }

    fn client(&self) -> Client {
        Client::connect(&self.socket())
    }

    fn contents(&self) -> Vec<u8> {
        let visit = self.reactor.with_device(self.key, |device| {
            let ram = device.as_any_mut().downcast_mut::<RamDevice>().unwrap();
            ram.contents().to_vec()
        });
        self.runtime.block_on(visit).unwrap()
    }

    fn clients(&self) -> usize {
        self.runtime.block_on(self.reactor.connections(self.key)).len()
    }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.runtime.block_on(self.reactor.stop());
    }
}

/// A client with simple replies that waits for each.
struct Client(UnixStream);

impl Client {
    fn connect(socket: &Path) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        receive::<Greeting>(&mut stream).check().unwrap();
        stream.write_all(&3u32.to_be_bytes()).unwrap();
        let query = InfoQuery { name: "ram".into(), wanted: vec![] };
        let data = query.encode();
        let header = OptionHeader::new(option::GO, data.len() as u32);
        stream.write_all(&[header.as_bytes(), &data].concat()).unwrap();
        loop {
            let reply: OptionReply = receive(&mut stream);
            let mut data = vec![0; reply.len.get() as usize];
            stream.read_exact(&mut data).unwrap();
            assert!(!reply.is_error());
            if reply.kind.get() == option_reply::ACK {
                return Self(stream);
            }
        }
    }

    fn send(&mut self, request: Request, payload: &[u8]) {
        self.0.write_all(&[request.as_bytes(), payload].concat()).unwrap();
    }

    fn reply(&mut self) -> SimpleReply {
        let reply: SimpleReply = receive(&mut self.0);
        assert_eq!(reply.magic.get(), proto::SIMPLE_REPLY_MAGIC);
        reply
    }

    fn write(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        self.send(Request::new(command::WRITE, flags, 1, offset, data.len() as u32), data);
        self.reply().error.get()
    }

    fn flush(&mut self) -> u32 {
        self.send(Request::new(command::FLUSH, 0, 2, 0, 0), &[]);
        self.reply().error.get()
    }

    fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.send(Request::new(command::READ, 0, 3, offset, len), &[]);
        assert_eq!(self.reply().error.get(), 0);
        let mut data = vec![0; len as usize];
        self.0.read_exact(&mut data).unwrap();
        data
    }

    /// Whether the server hangs up without another word.
    fn is_dropped(&mut self) -> bool {
        matches!(self.0.read(&mut [0; 16]), Ok(0) | Err(_))
    }
}

fn receive<T: FromZeros + FromBytes + IntoBytes>(stream: &mut UnixStream) -> T {
    let mut value = T::new_zeroed();
    stream.read_exact(value.as_mut_bytes()).unwrap();
    value
}

fn eventually(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < end, "{what} did not come about");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new("timeout")
        .args(["60", program])
        .args(args)
        .output()
        .unwrap_or_else(|error| panic!("{program}: {error}"));
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {args:?}: {}\n{said}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    said
}

fn pattern(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    std::iter::repeat_with(|| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) as u8
    })
    .take(len)
    .collect()
}

#[test]
fn nbdcopy_with_four_connections_there_and_back() {
    const SIZE: usize = 48 << 20;
    let rig = Rig::new(RamDevice::new(SIZE), SIZE as u64);
    let (image, back) = (rig.dir.path().join("image"), rig.dir.path().join("back"));
    let data = pattern(SIZE);
    std::fs::write(&image, &data).unwrap();
    let (image, back) = (image.to_str().unwrap(), back.to_str().unwrap());
    run("nbdcopy", &["--connections=4", "--flush", image, &rig.uri()]);
    assert!(rig.contents() == data);
    run("nbdcopy", &["--connections=4", &rig.uri(), back]);
    assert!(std::fs::read(back).unwrap() == data);
}

#[test]
fn nbdinfo_sees_what_is_offered() {
    let rig = Rig::new(RamDevice::new(1 << 20), 1 << 20);
    let said = run("nbdinfo", &[&rig.uri()]);
    for wanted in [
        "export-size: 1048576",
        "base:allocation",
        "can_multi_conn: true",
        "can_fast_zero: true",
        "can_df: true",
        "block_size_maximum: 33554432",
    ] {
        assert!(said.contains(wanted), "{wanted} is missing in {said}");
    }
    let listed = run("nbdinfo", &["--list", &rig.uri()]);
    assert!(listed.contains("export=\"ram\""));
}

#[test]
fn qemu_writes_zeroes_discards_and_maps() {
    let rig = Rig::new(RamDevice::new(8 << 20), 8 << 20);
    let script = [
        "write -P 7 1000 5000",
        "read -P 7 1000 5000",
        "write -P 9 1M 4M",
        "write -z 2M 1M",
        "read -P 0 2M 1M",
        "write -f -P 8 3M 100k",
        "discard 4M 64k",
        "read -P 0 4M 64k",
        "flush",
    ];
    let uri = rig.uri();
    let mut args = vec!["-f", "raw"];
    for line in &script {
        args.extend(["-c", line]);
    }
    args.push(&uri);
    let said = run("qemu-io", &args);
    assert!(!said.contains("failed"), "{said}");
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    assert!(map.contains("\"start\": 4194304, \"length\": 65536"), "{map}");
    let copy = rig.dir.path().join("copy.qcow2");
    let copy = copy.to_str().unwrap();
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, copy]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, copy]);
}

#[test]
fn garbage_and_silence_do_not_disturb_others() {
    let rig = Rig::new(RamDevice::new(1 << 20), 1 << 20);
    let silent: Vec<UnixStream> = (0..20).map(|_| UnixStream::connect(rig.socket()).unwrap()).collect();
    let mut steady = rig.client();
    for round in 0..20u64 {
        let mut stranger = UnixStream::connect(rig.socket()).unwrap();
        // The server may hang up in the middle of it.
        let _ = stranger.write_all(&pattern(1000 + round as usize));
        let mut liar = rig.client();
        let _ = liar.0.write_all(&pattern(28 + round as usize));
        assert!(liar.is_dropped());
        assert_eq!(steady.write(0, round, &[round as u8]), 0);
        assert_eq!(steady.read(round, 1), [round as u8]);
    }
    drop(silent);
    eventually("one client", || rig.clients() == 1);
}

#[test]
fn a_client_that_leaves_in_the_middle_is_forgotten() {
    for device in [RamDevice::new(1 << 20), RamDevice::new(1 << 20).with_late_reads()] {
        let rig = Rig::new(device, 1 << 20);
        for round in 0..50 {
            let mut client = rig.client();
            let read = Request::new(command::READ, 0, 1, 0, 1 << 20);
            client.send(read, &read.as_bytes().repeat(30));
            let write = Request::new(command::WRITE, 0, 2, 0, 1 << 20);
            // The server may be busy sending to us, so this must not wait for it.
            client.0.set_nonblocking(true).unwrap();
            let _ = client.0.write_all(&[write.as_bytes(), &vec![9; round * 2000]].concat());
        }
        let mut client = rig.client();
        assert_eq!(client.write(0, 5, b"still here"), 0);
        assert_eq!(client.read(5, 10), b"still here");
        eventually("one client", || rig.clients() == 1);
    }
}

#[test]
fn a_goodbye_behind_requests_gets_their_answers_first() {
    let rig = Rig::new(RamDevice::new(1 << 20).with_late_reads(), 1 << 20);
    let mut client = rig.client();
    let read = Request::new(command::READ, 0, 1, 0, 1 << 20);
    let bye = Request::new(command::DISC, 0, 2, 0, 0);
    client.send(read, &[read.as_bytes(), bye.as_bytes()].concat());
    let mut all = Vec::new();
    client.0.read_to_end(&mut all).unwrap();
    assert_eq!(all.len(), 2 * (SimpleReply::SIZE + (1 << 20)));
}

#[test]
fn a_slow_reader_stops_being_read_from_and_loses_nothing() {
    let rig = Rig::new(RamDevice::new(1 << 20), 1 << 20);
    let mut client = rig.client();
    let mut sender = Client(client.0.try_clone().unwrap());
    let writer = std::thread::spawn(move || {
        for cookie in 0..300 {
            sender.send(Request::new(command::READ, 0, cookie, 0, 1 << 20), &[]);
        }
    });
    std::thread::sleep(Duration::from_millis(200));
    for cookie in 0..300 {
        assert_eq!(client.reply().cookie.get(), cookie);
        client.0.read_exact(&mut vec![0; 1 << 20]).unwrap();
    }
    writer.join().unwrap();
}

#[test]
fn what_a_client_left_unread_when_it_hung_up_is_not_carried_out() {
    let rig = Rig::new(RamDevice::new(1 << 20), 1 << 20);
    let mut client = rig.client();
    let read = Request::new(command::READ, 0, 1, 0, 1 << 20);
    let write = Request::new(command::WRITE, 0, 2, 0, 5);
    // The server gets stuck with the answers to the reads, and does not come to the write.
    client.send(read, &[&read.as_bytes().repeat(30), write.as_bytes(), b"stale"].concat());
    client.0.shutdown(std::net::Shutdown::Write).unwrap();
    let mut second = rig.client();
    assert_eq!(second.write(0, 0, b"fresh"), 0);
    let mut rest = Vec::new();
    // However much of the answers still comes.
    let _ = client.0.read_to_end(&mut rest);
    eventually("one client", || rig.clients() == 1);
    assert_eq!(second.read(0, 5), b"fresh");
}

#[test]
fn closing_a_device_says_goodbye_to_its_clients() {
    let rig = Rig::new(RamDevice::new(1 << 20), 1 << 20);
    let mut client = rig.client();
    assert_eq!(client.write(0, 0, b"x"), 0);
    rig.runtime.block_on(rig.reactor.close_device(rig.key));
    assert!(client.is_dropped());
    let gone = rig.runtime.block_on(rig.reactor.with_device(rig.key, |device| device.size()));
    assert_eq!(gone, None);
    // A second close has nothing to wait for.
    rig.runtime.block_on(rig.reactor.close_device(rig.key));
    assert!(rig.client().is_dropped());
}

#[test]
fn both_log_shapes_make_writes_durable() {
    const SIZE: u64 = 8 << 20;
    for shape in [LogShape::Ring, LogShape::Thread] {
        let file = tempfile::NamedTempFile::new_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let log = std::fs::OpenOptions::new().write(true).custom_flags(libc::O_DIRECT).open(file.path()).unwrap();
        let device = RamDevice::new(SIZE as usize).with_log(log.into());
        let rig = Rig::with_shape(device, SIZE, shape);
        std::thread::scope(|scope| {
            for number in 0..4u64 {
                let mut client = rig.client();
                scope.spawn(move || {
                    for round in 0..30 {
                        let data = vec![number as u8 + 1; 1 + (round as usize * 3391) % 100_000];
                        let flags = if round % 3 == 0 { command_flag::FUA } else { 0 };
                        assert_eq!(client.write(flags, number << 20, &data), 0);
                        if round % 5 == 0 {
                            assert_eq!(client.flush(), 0);
                        }
                        assert_eq!(client.read(number << 20, data.len() as u32), data);
                    }
                });
            }
        });
        assert!(file.as_file().metadata().unwrap().len() > 0);
        rig.runtime.block_on(rig.reactor.close_device(rig.key));
    }
}

#[test]
fn a_log_that_fails_is_an_io_error() {
    for shape in [LogShape::Ring, LogShape::Thread] {
        // Opened for reading: every write to it fails.
        let log = std::fs::File::open(file!().trim_start_matches("blockd/"))
            .or_else(|_| std::fs::File::open(file!()))
            .unwrap();
        let device = RamDevice::new(1 << 20).with_log(log.into());
        let rig = Rig::with_shape(device, 1 << 20, shape);
        let mut client = rig.client();
        assert_eq!(client.write(0, 0, b"x"), errno::EIO);
        assert_eq!(client.read(0, 1).len(), 1);
    }
}

#[test]
fn only_a_dead_servers_socket_is_taken_over() {
    let rig = Rig::new(RamDevice::new(4096), 4096);
    let export = One(Export {
        name: "ram".into(),
        description: String::new(),
        size: 4096,
        read_only: false,
        reactor: rig.reactor.clone(),
        key: rig.key,
    });
    let exports: Arc<dyn Exports> = Arc::new(export);
    let start = |path: &Path| {
        let listens = [Listen::Unix(path.to_owned())];
        let exports = exports.clone();
        rig.runtime.block_on(async move { Server::start(&listens, exports).await })
    };
    assert!(matches!(start(&rig.socket()), Err(ListenError::InUse(_))));
    let stale = rig.dir.path().join("stale");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let server = start(&stale).unwrap();
    assert_eq!(Client::connect(&stale).read(0, 1), [0]);
    drop(server);
    assert!(!stale.exists());
    let file = rig.dir.path().join("file");
    std::fs::write(&file, "precious").unwrap();
    assert!(matches!(start(&file), Err(ListenError::NotASocket(_))));
    assert!(file.exists());
}
