//! The server as a process sees it: a socket, records, a stop.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;

use fs_layer::export::nfs4::rpc::{self, LAST_FRAGMENT};
use fs_layer::export::nfs4::{MemoryRecords, NfsOptions, Server};
use fs_layer::vfs::memory::{Commit, MemoryVfs};

use crate::client::ROOT_USER;

fn send(stream: &mut TcpStream, record: &[u8], fragment: usize) {
    let parts: Vec<&[u8]> = record.chunks(fragment).collect();
    for (at, part) in parts.iter().enumerate() {
        let last = if at + 1 == parts.len() { LAST_FRAGMENT } else { 0 };
        stream.write_all(&(part.len() as u32 | last).to_be_bytes()).unwrap();
        stream.write_all(part).unwrap();
    }
}

fn receive(stream: &mut TcpStream) -> Vec<u8> {
    let mut mark = [0; 4];
    stream.read_exact(&mut mark).unwrap();
    let mut record = vec![0; (u32::from_be_bytes(mark) & !LAST_FRAGMENT) as usize];
    stream.read_exact(&mut record).unwrap();
    record
}

fn words(record: &[u8]) -> Vec<u32> {
    record.chunks(4).map(|word| u32::from_be_bytes(word.try_into().unwrap())).collect()
}

fn exercise(address: SocketAddr) {
    let mut stream = TcpStream::connect(address).unwrap();
    let null = |xid, program, version, procedure| rpc::call(xid, program, version, procedure, &ROOT_USER).into_bytes();
    send(&mut stream, &null(5, rpc::NFS_PROGRAM, 4, 0), 7);
    assert_eq!(words(&receive(&mut stream)), [5, 1, 0, 0, 0, 0]);
    send(&mut stream, &null(6, rpc::NFS_PROGRAM, 2, 0), 1000);
    assert_eq!(words(&receive(&mut stream)), [6, 1, 0, 0, 0, 2, 3, 4]);
    send(&mut stream, &null(7, 100_004, 3, 0), 1000);
    assert_eq!(words(&receive(&mut stream)), [7, 1, 0, 0, 0, 1]);
    send(&mut stream, &null(8, rpc::NFS_PROGRAM, 4, 2), 1000);
    assert_eq!(words(&receive(&mut stream)), [8, 1, 0, 0, 0, 3]);
    send(&mut stream, &null(9, rpc::NFS_PROGRAM, 4, 1), 1000);
    assert_eq!(words(&receive(&mut stream)), [9, 1, 0, 0, 0, 4], "no compound");
    // A record that is longer than any session allows.
    stream.write_all(&(512 << 20u32 | LAST_FRAGMENT).to_be_bytes()).unwrap();
    assert_eq!(stream.read(&mut [0; 4]).unwrap_or(0), 0, "the connection ends");
}

fn start(options: NfsOptions) -> Server {
    start_on(Arc::new(MemoryVfs::default()), options)
}

fn start_on(vfs: Arc<MemoryVfs>, options: NfsOptions) -> Server {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    Server::start(listener, vfs, options).unwrap()
}

#[test]
fn calls_are_answered_over_tcp() {
    let server = start(NfsOptions::new(Arc::new(MemoryRecords::default())));
    let address = server.address();
    exercise(address);
    let idle = TcpStream::connect(address).unwrap();
    let held = server.stop();
    assert!(held.0.is_empty());
    drop(idle);
    assert!(TcpStream::connect(address).is_err(), "nobody listens any more");
}

#[test]
fn hosts_outside_of_the_networks_are_refused() {
    let mut options = NfsOptions::new(Arc::new(MemoryRecords::default()));
    options.export.clients = vec!["10.0.0.0/8".parse().unwrap()];
    let server = start(options);
    let address = server.address();
    let denied = move || {
        let mut stream = TcpStream::connect(address).unwrap();
        send(&mut stream, &rpc::call(9, rpc::NFS_PROGRAM, 4, 1, &ROOT_USER).into_bytes(), 1000);
        assert_eq!(words(&receive(&mut stream)), [9, 1, 1, 1, 5], "AUTH_TOOWEAK");
    };
    denied();
    drop(server);
}

/// MKDIR of version 3, in the root.
fn mkdir(xid: u32, root: &[u8], name: &[u8]) -> Vec<u8> {
    let mut record = rpc::call(xid, rpc::NFS_PROGRAM, 3, 9, &ROOT_USER);
    record.opaque(root);
    record.opaque(name);
    (0..6).for_each(|_| record.u32(0));
    record.into_bytes()
}

fn null(xid: u32) -> Vec<u8> {
    rpc::call(xid, rpc::NFS_PROGRAM, 3, 0, &ROOT_USER).into_bytes()
}

#[test]
fn a_connection_is_read_while_its_requests_wait_for_the_disk() {
    const WAITING: u32 = 200;
    let vfs = Arc::new(MemoryVfs::default());
    let mut options = NfsOptions::new(Arc::new(MemoryRecords::default()));
    options.export.root_squash = false;
    let server = start_on(vfs.clone(), options);
    let root = server.root_handle();
    vfs.let_commit(Commit::Waits);
    let mut stream = TcpStream::connect(server.address()).unwrap();
    stream.set_read_timeout(Some(std::time::Duration::from_secs(20))).unwrap();
    for xid in 1..=30 {
        send(&mut stream, &mkdir(xid, &root, format!("dir-{xid}").as_bytes()), 1000);
        send(&mut stream, &null(1000 + xid), 1000);
        assert_eq!(words(&receive(&mut stream))[0], 1000 + xid);
    }
    // More than are run at once: what is too much is not read, and another connection is.
    for xid in 31..=WAITING {
        send(&mut stream, &mkdir(xid, &root, format!("dir-{xid}").as_bytes()), 1000);
    }
    let mut other = TcpStream::connect(server.address()).unwrap();
    send(&mut other, &null(5), 1000);
    assert_eq!(words(&receive(&mut other))[0], 5);
    assert!(vfs.commits() < u64::from(WAITING) / 2, "{} run at once", vfs.commits());
    vfs.let_commit(Commit::Works);
    let mut answered: Vec<u32> = (1..=WAITING)
        .map(|_| {
            let words = words(&receive(&mut stream));
            assert_eq!(words[1..7], [1, 0, 0, 0, 0, 0], "made");
            words[0]
        })
        .collect();
    answered.sort_unstable();
    assert_eq!(answered, (1..=WAITING).collect::<Vec<_>>());
    assert!(server.stop().0.is_empty());
}

#[test]
fn whoever_takes_no_replies_keeps_nobody_else_waiting() {
    let vfs = Arc::new(MemoryVfs::default());
    let server = start_on(vfs, NfsOptions::new(Arc::new(MemoryRecords::default())));
    let mut silent = Vec::new();
    for _ in 0..6 {
        let mut stream = TcpStream::connect(server.address()).unwrap();
        nix::sys::socket::setsockopt(&stream, nix::sys::socket::sockopt::RcvBuf, &4096).unwrap();
        stream.set_nonblocking(true).unwrap();
        let call: Vec<u8> = [&(null(1).len() as u32 | LAST_FRAGMENT).to_be_bytes()[..], &null(1)].concat().repeat(1000);
        // Until neither side takes more.
        let (mut refused, mut at) = (0, 0);
        while refused < 20 {
            match stream.write(&call[at..]) {
                Ok(sent) => (refused, at) = (0, (at + sent) % call.len()),
                Err(e) => {
                    assert_eq!(e.kind(), std::io::ErrorKind::WouldBlock);
                    refused += 1;
                    std::thread::sleep(std::time::Duration::from_millis(2));
                }
            }
        }
        silent.push(stream);
        let mut other = TcpStream::connect(server.address()).unwrap();
        send(&mut other, &null(5), 1000);
        assert_eq!(words(&receive(&mut other))[0], 5);
    }
    assert!(server.stop().0.is_empty());
}

#[test]
fn a_fault_is_answered_as_one() {
    let vfs = Arc::new(MemoryVfs::default());
    vfs.let_commit(Commit::Panics);
    let mut options = NfsOptions::new(Arc::new(MemoryRecords::default()));
    options.export.root_squash = false;
    let server = start_on(vfs, options);
    let address = server.address();
    let handle = server.root_handle();
    let fault = move || {
        let mut stream = TcpStream::connect(address).unwrap();
        send(&mut stream, &mkdir(9, &handle, b"dir"), 1000);
        assert_eq!(words(&receive(&mut stream)), [9, 1, 0, 0, 0, 5], "SYSTEM_ERR");
        send(&mut stream, &rpc::call(10, rpc::NFS_PROGRAM, 3, 0, &ROOT_USER).into_bytes(), 1000);
        assert_eq!(words(&receive(&mut stream)), [10, 1, 0, 0, 0, 0]);
    };
    fault();
    drop(server);
}
