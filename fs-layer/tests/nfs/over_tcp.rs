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
        // MKDIR of version 3.
        let mut record = rpc::call(9, rpc::NFS_PROGRAM, 3, 9, &ROOT_USER);
        record.opaque(&handle);
        record.opaque(b"dir");
        (0..6).for_each(|_| record.u32(0));
        send(&mut stream, record.as_bytes(), 1000);
        assert_eq!(words(&receive(&mut stream)), [9, 1, 0, 0, 0, 5], "SYSTEM_ERR");
        send(&mut stream, &rpc::call(10, rpc::NFS_PROGRAM, 3, 0, &ROOT_USER).into_bytes(), 1000);
        assert_eq!(words(&receive(&mut stream)), [10, 1, 0, 0, 0, 0]);
    };
    fault();
    drop(server);
}
