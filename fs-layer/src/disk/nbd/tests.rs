//! Against a server of our own that can go away, and lose what was not flushed.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread::{self, JoinHandle};

use super::*;

const SIZE: usize = 16 << 20;
const BLOCK: usize = BLOCK_BYTES;

#[derive(Default)]
struct Store {
    now: Vec<u8>,
    durable: Vec<u8>,
    description: String,
}

/// A server at an address of its own; ends when dropped.
struct TestServer {
    port: u16,
    store: Arc<Mutex<Store>>,
    requests: Arc<AtomicU64>,
    flags: u16,
    running: Option<Running>,
}

struct Running {
    stop: Arc<AtomicBool>,
    clients: Arc<Mutex<Vec<TcpStream>>>,
    accept: JoinHandle<()>,
}

impl TestServer {
    fn new(flags: u16) -> TestServer {
        let store = Store { now: vec![0; SIZE], durable: vec![0; SIZE], description: "a test's".into() };
        let mut server =
            TestServer { port: 0, store: Arc::new(Mutex::new(store)), requests: Arc::default(), flags, running: None };
        server.start();
        server
    }

    fn start(&mut self) {
        let listener = TcpListener::bind(("127.0.0.2", self.port)).unwrap();
        self.port = listener.local_addr().unwrap().port();
        let (stop, clients) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(Vec::new())));
        let (store, requests, flags) = (self.store.clone(), self.requests.clone(), self.flags);
        let (stop_too, clients_too) = (stop.clone(), clients.clone());
        let accept = thread::spawn(move || {
            for stream in listener.incoming() {
                let stream = stream.unwrap();
                if stop_too.load(SeqCst) {
                    return;
                }
                clients_too.lock().unwrap().push(stream.try_clone().unwrap());
                let (store, requests) = (store.clone(), requests.clone());
                thread::spawn(move || serve(stream, &store, &requests, flags));
            }
        });
        self.running = Some(Running { stop, clients, accept });
    }

    /// Goes away; with a power cut, what was not flushed is gone too.
    fn stop(&mut self, power_cut: bool) {
        let Some(Running { stop, clients, accept }) = self.running.take() else { return };
        stop.store(true, SeqCst);
        drop(TcpStream::connect(("127.0.0.2", self.port)));
        accept.join().unwrap();
        let mut store = self.store.lock().unwrap();
        for client in clients.lock().unwrap().iter() {
            let _ = client.shutdown(Shutdown::Both);
        }
        if power_cut {
            store.now = store.durable.clone();
        }
    }

    fn url(&self, host: &str) -> NbdUrl {
        NbdUrl::Tcp { host: host.into(), port: self.port, export: "e".into() }
    }

    fn disk(&self) -> NbdDisk {
        NbdDisk::connect(&self.url("127.0.0.2"), NbdOptions { unflushed_max: 1 << 20, ..NbdOptions::default() })
            .unwrap()
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.stop(false);
    }
}

fn take<const N: usize>(stream: &mut TcpStream) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    stream.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn serve(mut stream: TcpStream, store: &Mutex<Store>, requests: &AtomicU64, flags: u16) {
    // Errors are ends of connections.
    let _ = handshake(&mut stream, store, flags).and_then(|()| transmission(&mut stream, store, requests));
}

fn handshake(stream: &mut TcpStream, store: &Mutex<Store>, flags: u16) -> std::io::Result<()> {
    stream.write_all(b"NBDMAGICIHAVEOPT\0\x03")?;
    take::<4>(stream)?;
    loop {
        take::<8>(stream)?;
        let option = u32::from_be_bytes(take(stream)?);
        let mut data = vec![0; u32::from_be_bytes(take(stream)?) as usize];
        stream.read_exact(&mut data)?;
        let mut reply = |kind: u32, data: &[u8]| {
            let mut bytes = 0x0003_e889_0455_65a9_u64.to_be_bytes().to_vec();
            bytes.extend(option.to_be_bytes());
            bytes.extend(kind.to_be_bytes());
            bytes.extend((data.len() as u32).to_be_bytes());
            bytes.extend(data);
            stream.write_all(&bytes)
        };
        if option == 7 {
            let mut info = vec![0, 0];
            info.extend((SIZE as u64).to_be_bytes());
            info.extend(flags.to_be_bytes());
            reply(3, &info)?;
            reply(3, &[&[0, 2], store.lock().unwrap().description.as_bytes()].concat())?;
            return reply(1, &[]);
        }
        if option == 3 {
            reply(2, &[b"\0\0\0\x01e", store.lock().unwrap().description.as_bytes()].concat())?;
            reply(1, &[])?;
            continue;
        }
        reply(1 << 31 | 1, &[])?;
    }
}

fn transmission(stream: &mut TcpStream, store: &Mutex<Store>, requests: &AtomicU64) -> std::io::Result<()> {
    loop {
        take::<6>(stream)?;
        let kind = u16::from_be_bytes(take(stream)?);
        let cookie = take::<8>(stream)?;
        let at = u64::from_be_bytes(take(stream)?) as usize;
        let len = u32::from_be_bytes(take(stream)?) as usize;
        let mut data = vec![0; if kind == 1 { len } else { 0 }];
        stream.read_exact(&mut data)?;
        requests.fetch_add(1, SeqCst);
        let mut reply = 0x6744_6698_u32.to_be_bytes().to_vec();
        reply.extend([0; 4]);
        reply.extend(cookie);
        {
            let mut store = store.lock().unwrap();
            match kind {
                0 => reply.extend(&store.now[at..at + len]),
                1 => store.now[at..at + len].copy_from_slice(&data),
                2 => return Ok(()),
                3 => store.durable = store.now.clone(),
                _ => store.now[at..at + len].fill(0),
            }
        }
        stream.write_all(&reply)?;
    }
}

const ALL: u16 =
    transmission::HAS_FLAGS | transmission::SEND_FLUSH | transmission::SEND_TRIM | transmission::CAN_MULTI_CONN;
use blockd::export::nbd::proto::transmission;

#[test]
fn what_is_written_is_read() {
    let server = TestServer::new(ALL);
    let disk = server.disk();
    assert_eq!(disk.blocks() as usize, SIZE / BLOCK);
    // Longer than a request, and several at once.
    let long: Vec<u8> = (0..5 << 20).map(|n: u32| (n / 1000) as u8).collect();
    disk.write_all(&[(10, &long), (2000, &[7; BLOCK])]).unwrap();
    let mut back = vec![0; long.len()];
    disk.read(10, &mut back).unwrap();
    assert!(back == long);
    disk.discard(11, 2).unwrap();
    disk.read(10, &mut back[..4 * BLOCK]).unwrap();
    assert!(back[..BLOCK] == long[..BLOCK] && back[BLOCK..3 * BLOCK].iter().all(|byte| *byte == 0));
    disk.flush().unwrap();
    assert!(disk.write(disk.blocks(), &[0; BLOCK]).is_err());
    assert!(disk.discard(disk.blocks() - 1, 2).is_err());
}

#[test]
fn calls_wait_for_a_server_that_is_away() {
    let mut server = TestServer::new(ALL);
    let disk = Arc::new(server.disk());
    let writers: Vec<_> = (0..6_u64)
        .map(|worker| {
            let disk = disk.clone();
            thread::spawn(move || {
                for round in 0..200_u64 {
                    let at = worker * 300 + round;
                    disk.write(at, &[(worker + round) as u8; BLOCK]).unwrap();
                    if round % 10 == 0 {
                        disk.flush().unwrap();
                    }
                    let mut back = [0; BLOCK];
                    disk.read(at, &mut back).unwrap();
                    assert!(back == [(worker + round) as u8; BLOCK]);
                }
            })
        })
        .collect();
    for _ in 0..3 {
        let seen = server.requests.load(SeqCst);
        while server.requests.load(SeqCst) < seen + 200 && !writers.iter().all(JoinHandle::is_finished) {
            thread::yield_now();
        }
        server.stop(true);
        thread::sleep(Duration::from_millis(50));
        server.start();
    }
    writers.into_iter().for_each(|writer| writer.join().unwrap());
    for worker in 0..6_u64 {
        for round in 0..200 {
            let mut back = [0; BLOCK];
            disk.read(worker * 300 + round, &mut back).unwrap();
            assert!(back == [(worker + round) as u8; BLOCK], "{worker} {round}");
        }
    }
}

#[test]
fn a_power_cut_of_the_server_loses_nothing_that_was_answered() {
    let mut server = TestServer::new(ALL);
    let disk = server.disk();
    disk.write(1, &[1; BLOCK]).unwrap();
    disk.flush().unwrap();
    disk.write(1, &[2; BLOCK]).unwrap();
    disk.write(2, &[3; BLOCK]).unwrap();
    disk.discard(2, 1).unwrap();
    disk.write(3, &[4; 2 * BLOCK]).unwrap();
    server.stop(true);
    server.start();
    disk.flush().unwrap();
    server.stop(true);
    server.start();
    let mut back = [0; 4 * BLOCK];
    disk.read(1, &mut back).unwrap();
    let firsts: Vec<u8> = back.chunks(BLOCK).map(|block| block[0]).collect();
    assert_eq!(firsts, [2, 0, 4, 4]);
}

#[test]
fn what_is_kept_for_the_server_is_bounded() {
    let mut server = TestServer::new(ALL);
    let disk = server.disk();
    for n in 0..1000_u64 {
        disk.write(n, &[9; BLOCK]).unwrap();
        assert!(disk.unflushed().unwrap().has_room(0, 1 << 20));
    }
    server.stop(true);
    server.start();
    let mut back = vec![0; 1000 * BLOCK];
    disk.read(0, &mut back).unwrap();
    assert!(back.iter().all(|byte| *byte == 9));
}

#[test]
fn one_connection_where_flushes_are_not_shared() {
    let server = TestServer::new(transmission::HAS_FLAGS | transmission::SEND_FLUSH);
    let disk = server.disk();
    assert_eq!(disk.pool().count_max, 1);
    // Without a trim there are zeros.
    disk.write(0, &[5; 3 * BLOCK]).unwrap();
    disk.discard(1, 1).unwrap();
    let mut back = [0; 3 * BLOCK];
    disk.read(0, &mut back).unwrap();
    assert_eq!((back[0], back[BLOCK], back[2 * BLOCK]), (5, 0, 5));
}

#[test]
fn what_is_no_disk_is_refused() {
    let server = TestServer::new(transmission::HAS_FLAGS);
    let error = NbdDisk::connect(&server.url("127.0.0.2"), NbdOptions::default()).err().unwrap();
    assert!(error.to_string().contains("flush"), "{error}");
    let read_only = TestServer::new(ALL | transmission::READ_ONLY);
    assert!(NbdDisk::connect(&read_only.url("127.0.0.2"), NbdOptions::default()).is_err());
}

#[test]
fn patience_ends() {
    let mut server = TestServer::new(ALL);
    let options = NbdOptions { patience: Some(Duration::from_millis(200)), ..NbdOptions::default() };
    let disk = NbdDisk::connect(&server.url("127.0.0.2"), options).unwrap();
    server.stop(false);
    assert!(disk.flush().is_err());
}

#[test]
fn an_export_that_is_only_read_is_the_same_one_when_it_is_back() {
    let mut server = TestServer::new(ALL | transmission::READ_ONLY);
    let url = server.url("127.0.0.2");
    let options = NbdOptions { read_only: true, ..NbdOptions::default() };
    let disk = NbdDisk::connect(&url, options).unwrap();
    let listed = exports(&url).unwrap();
    assert_eq!(listed, [Listed { name: "e".into(), description: disk.description().to_owned() }]);
    let mut block = [0; BLOCK];
    disk.read(0, &mut block).unwrap();
    server.stop(false);
    server.start();
    disk.read(0, &mut block).unwrap();
    server.stop(false);
    server.store.lock().unwrap().description = "another".into();
    server.start();
    let error = disk.read(0, &mut block).unwrap_err().to_string();
    assert!(error.contains("it came back as \"another\""), "{error}");
}
