//! Snapshots over NFS: found, read, not changed, and with the same handles after a restart.

use std::sync::{Arc, Mutex};

use fs_layer::disk::{Disk, MemoryDisk};
use fs_layer::export::nfs4::ops::op;
use fs_layer::export::nfs4::state::stateid::ANONYMOUS;
use fs_layer::export::nfs4::status::Nfs4Error;
use fs_layer::export::nfs4::{MemoryRecords, NfsOptions, Shared};
use fs_layer::snapshots::{ShelfOptions, SnapshotError, SnapshotInfo, SnapshotSource, SnapshotTree};
use fs_layer::vfs::Vfs;
use fs_layer::{Filesystem, MkfsOptions, OpenOptions, mkfs};

use crate::client::{Client, Ops, Reply};

/// Copies of a disk.
struct Copies {
    disk: Arc<MemoryDisk>,
    made: Mutex<Vec<(SnapshotInfo, Arc<MemoryDisk>)>>,
}

impl SnapshotSource for Copies {
    fn list(&self) -> Result<Vec<SnapshotInfo>, SnapshotError> {
        Ok(self.made.lock().unwrap().iter().map(|(info, _)| info.clone()).collect())
    }

    fn open(&self, snapshot: &SnapshotInfo) -> Result<Arc<dyn Disk>, SnapshotError> {
        let made = self.made.lock().unwrap();
        Ok(made.iter().find(|(info, _)| info == snapshot).expect("it is asked for what was listed").1.clone())
    }

    fn create(&self, name: &str) -> Result<(), SnapshotError> {
        let info = SnapshotInfo { name: name.to_owned(), description: String::new() };
        self.made.lock().unwrap().push((info, Arc::new(self.disk.copy())));
        Ok(())
    }

    fn delete(&self, name: &str) -> Result<(), SnapshotError> {
        self.made.lock().unwrap().retain(|(info, _)| info.name != name);
        Ok(())
    }
}

struct Host {
    source: Arc<Copies>,
    records: Arc<MemoryRecords>,
}

impl Host {
    fn serve(&self) -> (Arc<SnapshotTree<Filesystem>>, Arc<Shared>) {
        let options = OpenOptions { commit_every: None, recovers_holds: true, ..OpenOptions::default() };
        let live = Filesystem::open(self.source.disk.clone(), &options).unwrap();
        let tree = Arc::new(SnapshotTree::new(live, self.source.clone(), ShelfOptions::default()).unwrap());
        let mut options = NfsOptions::new(self.records.clone());
        options.export.root_squash = false;
        let shared = Arc::new(Shared::new(tree.clone() as Arc<dyn Vfs>, options).unwrap());
        (tree, shared)
    }
}

fn in_one() -> Ops {
    Ops::root().lookup(b".snapshots").lookup(b"one")
}

fn behind_lookups(mut reply: Reply, lookups: usize) -> Reply {
    reply.ok(op::PUTROOTFH);
    for _ in 0..lookups {
        reply.ok(op::LOOKUP);
    }
    reply
}

/// The names of a page without attributes.
fn listed(mut reply: Reply) -> Vec<Vec<u8>> {
    reply.ok(op::READDIR).take(|r| {
        r.u64()?;
        let mut names = Vec::new();
        while r.bool()? {
            r.u64()?;
            names.push(r.opaque(255)?.to_vec());
            assert_eq!((r.u32()?, r.opaque(0)?.len()), (0, 0), "attributes");
        }
        assert!(r.bool()?, "there is more");
        Ok(names)
    })
}

#[test]
fn they_are_there_for_clients_too() {
    let disk = Arc::new(MemoryDisk::new(1 << 30));
    mkfs(&*disk, &MkfsOptions { journal_blocks: 512, ..MkfsOptions::default() }).unwrap();
    let host = Host { source: Arc::new(Copies { disk, made: Mutex::default() }), records: Arc::default() };
    let (tree, server) = host.serve();
    let mut client = Client::new(&server, b"one");
    let (_, file) = client.create(b"owner", b"f");
    client.write_all(&file, b"before");
    tree.create("one").unwrap();
    client.write_all(&file, b"after!");

    assert_eq!(listed(behind_lookups(client.go(Ops::root().readdir(0, 4096, &[])), 0)), [b"f".to_vec()]);
    let list = Ops::root().lookup(b".snapshots").readdir(0, 4096, &[]);
    assert_eq!(listed(behind_lookups(client.go(list), 1)), [b"one".to_vec()]);
    let mut reply = behind_lookups(client.go(in_one().lookup(b"f").getfh().read(ANONYMOUS, 0, 100)), 3);
    let old = reply.ok(op::GETFH).handle();
    let read = |reply: &mut Reply| reply.ok(op::READ).take(|r| Ok((r.bool()?, r.opaque(100)?.to_vec())));
    assert_eq!(read(&mut reply), (true, b"before".to_vec()));
    assert_ne!(old, file);
    let mut reply = client.go(Ops::at(&file).read(ANONYMOUS, 0, 100));
    assert_eq!(read(reply.ok(op::PUTFH)), (true, b"after!".to_vec()));
    // Up again, from within, to the root.
    let up = |ops: Ops| ops.add(op::LOOKUPP, |_| ());
    let mut reply = behind_lookups(client.go(up(up(in_one())).getfh()), 2);
    let root = reply.ok(op::LOOKUPP).ok(op::LOOKUPP).ok(op::GETFH).handle();
    assert_eq!(client.go(Ops::root().getfh()).ok(op::PUTROOTFH).ok(op::GETFH).handle(), root);

    // Nothing changes.
    assert_eq!(client.status(in_one().open(b"owner", b"f", 2, 0)), Err(Nfs4Error::Rofs));
    assert_eq!(client.status(in_one().open(b"owner", b"f", 1, 0)), Ok(()));
    assert_eq!(client.status(in_one().create(b"owner", b"new")), Err(Nfs4Error::Rofs));
    assert_eq!(client.status(in_one().mkdir(b"new")), Err(Nfs4Error::Rofs));
    assert_eq!(client.status(in_one().remove(b"f")), Err(Nfs4Error::Rofs));
    assert_eq!(client.status(Ops::root().lookup(b".snapshots").mkdir(b"new")), Err(Nfs4Error::Rofs));
    assert_eq!(client.status(Ops::root().mkdir(b".snapshots")), Err(Nfs4Error::Exist));
    assert_eq!(client.status(Ops::at(&old).write(ANONYMOUS, 0, 2, b"x")), Err(Nfs4Error::Rofs));
    let names =
        |ops: Ops, operation: u32, names: &[&[u8]]| ops.add(operation, |w| names.iter().for_each(|n| w.opaque(n)));
    let move_out = in_one().add(op::SAVEFH, |_| ()).add(op::PUTROOTFH, |_| ());
    assert_eq!(client.status(names(move_out, op::RENAME, &[b"f", b"g"])), Err(Nfs4Error::Xdev));
    let link_out = Ops::at(&old).add(op::SAVEFH, |_| ()).add(op::PUTROOTFH, |_| ());
    assert_eq!(client.status(names(link_out, op::LINK, &[b"g"])), Err(Nfs4Error::Xdev));

    // After a restart handles are as good, until the snapshot goes.
    drop((client, tree, server));
    let (tree, server) = host.serve();
    let mut client = Client::new(&server, b"one");
    let mut reply = client.go(Ops::at(&old).read(ANONYMOUS, 0, 100));
    assert_eq!(read(reply.ok(op::PUTFH)), (true, b"before".to_vec()));
    tree.delete("one").unwrap();
    assert_eq!(client.status(Ops::at(&old).read(ANONYMOUS, 0, 100)), Err(Nfs4Error::Stale));
    assert_eq!(client.status(in_one()), Err(Nfs4Error::NoEnt));
}
