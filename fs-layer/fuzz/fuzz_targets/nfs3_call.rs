//! A client that sends any calls of NFSv3 and its mount protocol: each 0xff in the input begins a further call, with the root's handle put in front
//! of its arguments if the first byte says so.
#![no_main]

use std::sync::Arc;

use fs_layer::export::nfs3::mount;
use fs_layer::export::nfs4::connection;
use fs_layer::export::nfs4::rpc::{self, Caller};
use fs_layer::export::nfs4::{MemoryRecords, NfsOptions, Shared};
use fs_layer::vfs::memory::MemoryVfs;
use fs_layer::vfs::{ROOT, Vfs};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let vfs: Arc<dyn Vfs> = Arc::new(MemoryVfs::default());
    let mut options = NfsOptions::new(Arc::new(MemoryRecords::default()));
    options.export.root_squash = false;
    let shared = Arc::new(Shared::new(vfs, options).expect("a server starts"));
    let (connection, _calls) = connection::detached([127, 0, 0, 1].into());
    let caller = Caller::Unix { uid: 0, gid: 0, groups: vec![] };
    for (xid, part) in data.split(|byte| *byte == 0xff).enumerate() {
        let [procedure, how, arguments @ ..] = part else { continue };
        let program = if how & 2 == 0 { rpc::NFS_PROGRAM } else { mount::PROGRAM };
        let mut record = rpc::call(xid as u32, program, 3, u32::from(*procedure % 24), &caller);
        if how & 1 == 0 {
            record.opaque(&shared.handles.make(ROOT));
        }
        record.raw(arguments);
        connection::answer(&shared, &connection, record.as_bytes()).expect("a call is answered");
    }
});
