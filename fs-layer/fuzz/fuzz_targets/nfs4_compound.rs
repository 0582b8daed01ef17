//! A client that sends any operations in a session of NFSv4.2: each 0xff in the input begins a further compound. Replies are no longer than the
//! session allows, and when the client is gone nothing is held.
#![no_main]

use std::sync::Arc;

use fs_layer::export::nfs4::connection::{self, Connection};
use fs_layer::export::nfs4::ops::op;
use fs_layer::export::nfs4::rpc::{self, Caller};
use fs_layer::export::nfs4::xdr::{Reader, Writer};
use fs_layer::export::nfs4::{MemoryRecords, NfsOptions, Shared};
use fs_layer::vfs::Vfs;
use fs_layer::vfs::memory::MemoryVfs;
use libfuzzer_sys::fuzz_target;

const MESSAGE_MAX: u32 = 64 << 10;

fn compound(shared: &Arc<Shared>, connection: &Arc<Connection>, count: u32, operations: &[u8]) -> Vec<u8> {
    let caller = Caller::Unix { uid: 0, gid: 0, groups: vec![] };
    let mut record = rpc::call(1, rpc::NFS_PROGRAM, 4, 1, &caller);
    record.opaque(b"");
    record.u32(2);
    record.u32(count);
    record.raw(operations);
    connection::answer(shared, connection, record.as_bytes()).expect("a call is answered").into_bytes()
}

fuzz_target!(|data: &[u8]| {
    let vfs = Arc::new(MemoryVfs::default());
    let mut options = NfsOptions::new(Arc::new(MemoryRecords::default()));
    options.export.root_squash = false;
    let shared = Arc::new(Shared::new(vfs.clone() as Arc<dyn Vfs>, options).expect("a server starts"));
    let (connection, _calls) = connection::detached([127, 0, 0, 1].into());

    let mut w = Writer::default();
    w.u32(op::EXCHANGE_ID);
    w.u64(1);
    w.opaque(b"fuzz");
    (0..3).for_each(|_| w.u32(0));
    let reply = compound(&shared, &connection, 1, w.as_bytes());
    // Reply header, status, tag, count, operation, status.
    let mut r = Reader::new(&reply[24 + 20..]);
    let (client, sequence) = (r.u64().expect("a client"), r.u32().expect("a number"));
    let mut w = Writer::default();
    w.u32(op::CREATE_SESSION);
    w.u64(client);
    w.u32(sequence);
    w.u32(2);
    for word in [0, MESSAGE_MAX, MESSAGE_MAX, 4096, 100, 8, 0].repeat(2) {
        w.u32(word);
    }
    [0x4000_0000, 1, 0].into_iter().for_each(|word| w.u32(word));
    let reply = compound(&shared, &connection, 1, w.as_bytes());
    let session: [u8; 16] = Reader::new(&reply[24 + 20..]).fixed().expect("a session");

    let mut number = 0;
    let mut run = |count: u32, operations: &[u8]| {
        number += 1;
        let mut w = Writer::default();
        w.u32(op::SEQUENCE);
        w.fixed(&session);
        [number, 0, 0, 0].into_iter().for_each(|word| w.u32(word));
        w.raw(operations);
        let reply = compound(&shared, &connection, count + 1, w.as_bytes());
        assert!(reply.len() <= MESSAGE_MAX as usize);
    };
    let mut w = Writer::default();
    w.u32(op::RECLAIM_COMPLETE);
    w.u32(0);
    run(1, w.as_bytes());
    for part in data.split(|byte| *byte == 0xff) {
        let [count, operations @ ..] = part else { continue };
        let mut w = Writer::default();
        w.u32(op::PUTROOTFH);
        w.raw(operations);
        run(u32::from(*count % 16) + 1, w.as_bytes());
    }
    let gone = shared.table().clear();
    gone.go(&*vfs);
    assert_eq!(vfs.holds(), 0);
});
