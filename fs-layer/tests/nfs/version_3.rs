//! NFS version 3 and its mount protocol: RFC 1813.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use fs_layer::export::nfs4::Shared;
use fs_layer::export::nfs4::connection::{self, Connection};
use fs_layer::export::nfs4::rpc::{self, Caller};
use fs_layer::export::nfs4::xdr::{Reader, Writer};
use fs_layer::vfs::{Credentials, ROOT, Vfs};
use proptest::prelude::*;

use crate::client::{ROOT_USER, World};
use crate::killed::Host;

/// A client without state.
struct Client {
    shared: Arc<Shared>,
    connection: Arc<Connection>,
    _calls: Receiver<Vec<u8>>,
    caller: Caller,
    xid: u32,
}

impl Client {
    fn new(world: &World) -> Client {
        Client::of(world.serve())
    }

    fn of(shared: Arc<Shared>) -> Client {
        let (connection, calls) = connection::detached("127.0.0.1".parse().unwrap());
        Client { shared, connection, _calls: calls, caller: ROOT_USER, xid: 0 }
    }

    /// The results of a call, if it was accepted.
    fn send(&mut self, xid: u32, program: u32, procedure: u32, arguments: &[u8]) -> Option<Vec<u8>> {
        let mut record = rpc::call(xid, program, 3, procedure, &self.caller);
        record.raw(arguments);
        let reply = connection::answer(&self.shared, &self.connection, record.as_bytes())?.into_bytes();
        (reply[4..24] == [0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]).then(|| reply[24..].to_vec())
    }

    fn call(&mut self, procedure: u32, arguments: impl FnOnce(&mut Writer)) -> (u32, Vec<u8>) {
        self.xid += 1;
        let mut w = Writer::default();
        arguments(&mut w);
        let results = self.send(self.xid, rpc::NFS_PROGRAM, procedure, w.as_bytes()).unwrap();
        (u32::from_be_bytes(results[..4].try_into().unwrap()), results[4..].to_vec())
    }

    fn root(&mut self) -> Vec<u8> {
        let mut w = Writer::default();
        w.opaque(b"/");
        let results = self.send(0, 100_005, 1, w.as_bytes()).unwrap();
        let mut r = Reader::new(&results);
        assert_eq!(r.u32().unwrap(), 0);
        r.opaque(64).unwrap().to_vec()
    }

    fn create(&mut self, dir: &[u8], name: &[u8], mode: u32) -> Result<Vec<u8>, u32> {
        let (status, body) = self.call(8, |w| {
            w.opaque(dir);
            w.opaque(name);
            w.u32(mode);
            if mode == 2 {
                w.u64(0x0102_0304_0506_0708);
            } else {
                no_settings(w);
            }
        });
        if status != 0 {
            return Err(status);
        }
        let mut r = Reader::new(&body);
        assert!(r.bool().unwrap());
        Ok(r.opaque(64).unwrap().to_vec())
    }
}

fn no_settings(w: &mut Writer) {
    (0..6).for_each(|_| w.u32(0));
}

fn skip_file(r: &mut Reader<'_>) {
    if r.bool().unwrap() {
        r.fixed::<84>().unwrap();
    }
}

#[test]
fn files_are_made_written_and_read() {
    let world = World::new();
    let mut client = Client::new(&world);
    let root = client.root();
    let file = client.create(&root, b"file", 1).unwrap();
    assert_eq!(client.create(&root, b"file", 1), Err(17));
    assert_eq!(client.create(&root, b"file", 0).unwrap(), file);
    let first = client.create(&root, b"exclusive", 2).unwrap();
    assert_eq!(client.create(&root, b"exclusive", 2).unwrap(), first, "the same request");
    assert_eq!(client.create(&root, b"file", 2), Err(17));
    let write = |w: &mut Writer| {
        w.opaque(&file);
        w.u64(3);
        w.u32(4);
        w.u32(0);
        w.opaque(b"data");
    };
    let (status, written) = client.call(7, write);
    assert_eq!(status, 0);
    let verifier = written[written.len() - 8..].to_vec();
    let commit = |w: &mut Writer| {
        w.opaque(&file);
        w.u64(0);
        w.u32(0);
    };
    let (status, committed) = client.call(21, commit);
    assert_eq!((status, &committed[committed.len() - 8..]), (0, &verifier[..]));
    world.vfs.lose_unsynced();
    assert_ne!(client.call(21, commit).1[committed.len() - 8..], verifier[..]);
    let (status, body) = client.call(6, |w| {
        w.opaque(&file);
        w.u64(0);
        w.u32(100);
    });
    let mut r = Reader::new(&body);
    skip_file(&mut r);
    assert_eq!((status, r.u32(), r.bool(), r.opaque(100)), (0, Ok(7), Ok(true), Ok(&b"\0\0\0data"[..])));
    let mut forged = file.clone();
    forged[18] ^= 1;
    assert_eq!(client.call(1, |w| w.opaque(&forged)).0, 10_001);
}

#[test]
fn a_request_that_comes_twice_runs_once() {
    let world = World::new();
    let mut client = Client::new(&world);
    let root = client.root();
    client.create(&root, b"file", 1).unwrap();
    let mut w = Writer::default();
    w.opaque(&root);
    w.opaque(b"file");
    let first = client.send(99, rpc::NFS_PROGRAM, 12, w.as_bytes()).unwrap();
    assert_eq!(first[..4], [0; 4]);
    assert_eq!(client.send(99, rpc::NFS_PROGRAM, 12, w.as_bytes()).unwrap(), first);
    assert_eq!(client.send(100, rpc::NFS_PROGRAM, 12, w.as_bytes()).unwrap()[..4], [0, 0, 0, 2]);
}

#[test]
fn directories_are_read_in_pages() {
    let world = World::new();
    let mut client = Client::new(&world);
    let root = client.root();
    for n in 0..200 {
        client.create(&root, format!("file-{n}").as_bytes(), 1).unwrap();
    }
    for plus in [false, true] {
        for max in [600, 4096, 65_536] {
            let (mut cookie, mut names) = (0, Vec::new());
            loop {
                let (status, body) = client.call(if plus { 17 } else { 16 }, |w| {
                    w.opaque(&root);
                    w.u64(cookie);
                    w.u64(0);
                    if plus {
                        w.u32(max);
                    }
                    w.u32(max);
                });
                assert_eq!(status, 0);
                assert!(body.len() <= max as usize);
                let mut r = Reader::new(&body);
                skip_file(&mut r);
                r.u64().unwrap();
                while r.bool().unwrap() {
                    r.u64().unwrap();
                    names.push(String::from_utf8(r.opaque(255).unwrap().to_vec()).unwrap());
                    cookie = r.u64().unwrap();
                    if plus {
                        skip_file(&mut r);
                        assert!(r.bool().unwrap());
                        r.opaque(64).unwrap();
                    }
                }
                if r.bool().unwrap() {
                    break;
                }
            }
            assert_eq!(names[..2], [".", ".."]);
            names.sort();
            names.dedup();
            assert_eq!(names.len(), 202);
        }
    }
}

#[test]
fn names_and_permissions_are_checked() {
    let world = World::new();
    let mut client = Client::new(&world);
    let root = client.root();
    for (name, status) in [(&b"."[..], 17), (b"..", 17), (b"", 22), (b"a/b", 22), (&[b'x'; 256], 63)] {
        assert_eq!(client.create(&root, name, 0), Err(status), "{name:?}");
    }
    client.caller = Caller::Unix { uid: 7, gid: 7, groups: vec![] };
    assert_eq!(client.create(&root, b"file", 0), Err(13));
    client.caller = Caller::Nobody;
    assert_eq!(client.create(&root, b"file", 0), Err(13));
    assert!(world.vfs.lookup(&Credentials::system(), ROOT, b"file").is_err());
    assert_eq!(client.send(5, rpc::NFS_PROGRAM, 22, &[]), None, "no such procedure");
    assert_eq!(client.send(6, rpc::NFS_PROGRAM, 1, &[0, 0, 0, 9]), None, "no such arguments");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn random_calls_do_no_harm(procedure in 0u32..24, good in any::<bool>(), rest in prop::collection::vec(any::<u8>(), 0..120)) {
        let world = World::new();
        let mut client = Client::new(&world);
        let root = client.root();
        let mut w = Writer::default();
        if good {
            w.opaque(&root);
            w.opaque(b"name");
        }
        w.raw(&rest);
        client.send(1, rpc::NFS_PROGRAM, procedure, w.as_bytes());
        client.send(2, 100_005, procedure, w.as_bytes());
    }
}

#[test]
fn what_was_done_and_not_answered_is_answered_after_a_kill() {
    let host = Host::new();
    let mut client = Client::of(host.serve());
    let root = client.root();
    let file = client.create(&root, b"file", 1).unwrap();
    client.create(&root, b"gone", 1).unwrap();
    client.create(&root, b"old", 1).unwrap();
    let named = |rest: &dyn Fn(&mut Writer)| {
        let mut w = Writer::default();
        w.opaque(&root);
        rest(&mut w);
        w.into_bytes()
    };
    let made = named(&|w| {
        w.opaque(b"dir");
        no_settings(w);
    });
    let guarded = named(&|w| {
        w.opaque(b"new");
        w.u32(1);
        no_settings(w);
    });
    let removed = named(&|w| w.opaque(b"gone"));
    let renamed = named(&|w| {
        w.opaque(b"old");
        w.opaque(&root);
        w.opaque(b"moved");
    });
    let mut linked = Writer::default();
    linked.opaque(&file);
    linked.opaque(&root);
    linked.opaque(b"link");
    // With what the next server would say if it ran them again.
    let all = [(9, made, 17), (8, guarded, 17), (12, removed, 2), (14, renamed, 2), (15, linked.into_bytes(), 17)];
    let status = |results: Option<Vec<u8>>| u32::from_be_bytes(results.unwrap()[..4].try_into().unwrap());
    for (xid, (procedure, arguments, _)) in (1000..).zip(&all) {
        assert_eq!(status(client.send(xid, rpc::NFS_PROGRAM, *procedure, arguments)), 0);
    }
    drop(client);
    for _ in 0..2 {
        let mut client = Client::of(host.serve());
        for (xid, (procedure, arguments, error)) in (1000..).zip(&all) {
            assert_eq!(status(client.send(xid, rpc::NFS_PROGRAM, *procedure, arguments)), 0, "{procedure}");
            assert_eq!(status(client.send(xid + 100, rpc::NFS_PROGRAM, *procedure, arguments)), *error, "{procedure}");
        }
    }
}
