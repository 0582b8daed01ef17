//! A server that is killed after it did what it was asked, and before it could say so: the next one says it.

use std::sync::Arc;

use fs_layer::disk::{Disk, MemoryDisk};
use fs_layer::export::nfs4::bitmap::Bitmap;
use fs_layer::export::nfs4::ops::op;
use fs_layer::export::nfs4::state::stateid::ANONYMOUS;
use fs_layer::export::nfs4::status::Nfs4Error;
use fs_layer::export::nfs4::{MemoryRecords, NfsOptions, Shared};
use fs_layer::vfs::{Credentials, FileKind, Make, NewAttributes, ROOT, Vfs, VfsError, noting};
use fs_layer::{Filesystem, MkfsOptions, OpenOptions, mkfs};

use crate::client::{Client, Ops, Reply};

/// A disk, and what else outlives a server.
pub struct Host {
    disk: Arc<dyn Disk>,
    records: Arc<MemoryRecords>,
}

impl Host {
    pub fn new() -> Host {
        let disk = Arc::new(MemoryDisk::new(1 << 40));
        mkfs(&*disk, &MkfsOptions { journal_blocks: 512, ..MkfsOptions::default() }).unwrap();
        Host { disk, records: Arc::default() }
    }

    fn open(&self) -> Arc<Filesystem> {
        let options = OpenOptions { commit_every: None, recovers_holds: true, ..OpenOptions::default() };
        Filesystem::open(self.disk.clone(), &options).unwrap()
    }

    /// Starts a server on what the last one left. It is killed by dropping it.
    pub fn serve(&self) -> Arc<Shared> {
        let mut options = NfsOptions::new(self.records.clone());
        options.export.root_squash = false;
        Arc::new(Shared::new(self.open(), options).unwrap())
    }
}

const VERIFIER: u64 = 77;

fn exclusive(name: &[u8]) -> Ops {
    exclusive_with(name, VERIFIER)
}

fn exclusive_with(name: &[u8], verifier: u64) -> Ops {
    Ops::root().open_with(b"owner", 3, 0, |w| {
        w.u32(1);
        w.u32(3);
        w.u64(verifier);
        Bitmap::of(&[33]).write(w);
        w.opaque(&0o640u32.to_be_bytes());
        w.u32(0);
        w.opaque(name);
    })
}

fn rename(from: &[u8], to: &[u8]) -> Ops {
    Ops::root().add(op::SAVEFH, |_| ()).add(op::RENAME, |w| {
        w.opaque(from);
        w.opaque(to);
    })
}

fn names(vfs: &dyn Vfs) -> Vec<Vec<u8>> {
    let page = vfs.readdir(&Credentials::system(), ROOT, 0, 100).unwrap();
    let mut names: Vec<_> = page.entries.into_iter().map(|entry| entry.name).collect();
    names.sort();
    names
}

/// Behind the result of SEQUENCE.
fn behind_sequence(reply: &mut Reply) -> &mut Reply {
    reply.ok(op::SEQUENCE).take(|r| {
        r.fixed::<16>()?;
        (0..5).try_for_each(|_| r.u32().map(drop))
    });
    reply
}

#[test]
fn what_was_done_and_not_answered_is_answered_after_a_kill() {
    let host = Host::new();
    let server = host.serve();
    let mut client = Client::new(&server, b"one");
    for name in [&b"a"[..], b"b", b"c", b"d"] {
        client.create(b"owner", name);
    }
    let link = Ops::root().lookup(b"a").add(op::SAVEFH, |_| ()).add(op::PUTROOTFH, |_| ());
    let link = link.add(op::LINK, |w| w.opaque(b"link"));
    let all = [
        Ops::root().mkdir(b"made").getfh(),
        Ops::root().remove(b"b"),
        rename(b"c", b"moved"),
        rename(b"d", b"a"),
        link,
        exclusive(b"new").getfh(),
    ];
    let compounds: Vec<Vec<u8>> =
        (1..).zip(&all).map(|(number, ops)| client.compound(&client.sequenced(3, number, ops))).collect();
    let mut first: Vec<Vec<u8>> = compounds.iter().map(|compound| client.arguments(compound).unwrap()).collect();
    let failed = client.compound(&client.sequenced(3, 7, &Ops::root().remove(b"b")));
    assert_eq!(client.arguments(&failed).unwrap()[..4], Nfs4Error::NoEnt.code().to_be_bytes());
    let size = client.compound(&client.sequenced(3, 8, &Ops::root().lookup(b"a").setattr_size(ANONYMOUS, 5)));
    assert_eq!(client.arguments(&size).unwrap()[..4], [0; 4]);
    let left = names(&*server.vfs);
    let (session, id) = (client.session, client.id);
    drop((client, server));

    // More than one kill, as clients may be slow to come back.
    for _ in 0..2 {
        let server = host.serve();
        let mut client = Client::strange(&server, b"one");
        (client.session, client.id) = (session, id);
        for (number, compound) in (1..).zip(&compounds) {
            let results = client.arguments(compound).unwrap();
            let mut reply = client.bare(&client.sequenced(3, number, &all[number as usize - 1]));
            assert_eq!(reply.error(), None, "{number}");
            behind_sequence(&mut reply);
            // Handles and attributes are those of the first time; change counters and states need not be.
            assert_eq!(results.len(), first[number as usize - 1].len(), "{number}");
        }
        for (number, file) in [(1, b"made" as &[u8]), (6, b"new")] {
            let handle = |results: &[u8]| results[results.len() - 40..].to_vec();
            let again = client.arguments(&compounds[number - 1]).unwrap();
            assert_eq!(handle(&again), handle(&first[number - 1]), "{}", String::from_utf8_lossy(file));
        }
        // The client has fewer requests under way by now, and says so.
        let mut other = compounds[1].clone();
        other[44..48].copy_from_slice(&5u32.to_be_bytes());
        assert_eq!(client.arguments(&other).unwrap()[..4], [0; 4]);
        // What had failed, what can be done twice, what never came, and what another user sends is not answered.
        let never = client.compound(&client.sequenced(3, 9, &Ops::root().remove(b"a")));
        for compound in [&failed, &size, &never] {
            assert_eq!(client.arguments(compound).unwrap()[..4], Nfs4Error::BadSession.code().to_be_bytes());
        }
        client.caller = fs_layer::export::nfs4::rpc::Caller::Unix { uid: 7, gid: 7, groups: Vec::new() };
        assert_eq!(client.arguments(&compounds[1]).unwrap()[..4], Nfs4Error::BadSession.code().to_be_bytes());
        assert_eq!(names(&*server.vfs), left);
        drop((client, server));
    }

    // What was made and is gone again has no answer; what was removed and is there again stays.
    let server = host.serve();
    let vfs = &server.vfs;
    vfs.rmdir(&Credentials::system(), ROOT, b"made").unwrap();
    vfs.make(&Credentials::system(), ROOT, b"b", &Make::Directory, &NewAttributes::default()).unwrap();
    let mut client = Client::strange(&server, b"one");
    (client.session, client.id) = (session, id);
    first[0] = client.arguments(&compounds[0]).unwrap();
    assert_eq!(first[0][..4], Nfs4Error::Stale.code().to_be_bytes());
    assert_eq!(client.arguments(&compounds[1]).unwrap()[..4], [0; 4]);
    assert_eq!(vfs.lookup(&Credentials::system(), ROOT, b"b").unwrap().kind, FileKind::Directory);
}

#[test]
fn an_exclusive_create_is_known_by_its_verifier_after_a_kill() {
    let host = Host::new();
    let server = host.serve();
    let mut client = Client::new(&server, b"one");
    let mut made = client.go(exclusive(b"new").getfh());
    made.ok(op::PUTROOTFH).ok(op::OPEN).opened();
    let handle = made.ok(op::GETFH).handle();
    client.status(Ops::root().mkdir(b"dir")).unwrap();
    drop((client, server));
    for _ in 0..2 {
        let server = host.serve();
        // In another session, as after an answer that told it to make one.
        let mut client = Client::new(&server, b"one");
        let mut again = client.go(exclusive(b"new").getfh());
        again.ok(op::PUTROOTFH).ok(op::OPEN).opened();
        assert_eq!(again.ok(op::GETFH).handle(), handle);
        assert_eq!(client.status(exclusive_with(b"new", VERIFIER + 1)), Err(Nfs4Error::Exist));
        assert_eq!(client.status(exclusive(b"dir")), Err(Nfs4Error::Exist));
    }
}

#[test]
fn the_note_is_there_exactly_if_the_change_is() {
    let host = Host::new();
    let root = Credentials::system();
    let fs = host.open();
    let make = |fs: &Filesystem, name: &[u8], request| {
        noting(fs, request, || fs.make(&root, ROOT, name, &Make::Directory, &NewAttributes::default()))
    };
    make(&fs, b"a", 5).unwrap();
    assert!(matches!(make(&fs, b"a", 6), Err(VfsError::Exists)));
    fs.commit().unwrap();
    make(&fs, b"b", 7).unwrap();
    fs.make(&root, ROOT, b"c", &Make::Directory, &NewAttributes::default()).unwrap();
    assert!(fs.noted().is_empty());
    drop(fs);
    let fs = host.open();
    assert_eq!((fs.noted(), names(&*fs)), (vec![5], vec![b"a".to_vec()]));
    // One within another: both are noted.
    noting(&*fs, 8, || make(&fs, b"e", 9)).unwrap();
    fs.commit().unwrap();
    drop(fs);
    let fs = host.open();
    assert_eq!(fs.noted().into_iter().collect::<std::collections::BTreeSet<_>>(), [5, 8, 9].into());
    // Only the last few hundred are kept.
    for request in 1000..1600 {
        make(&fs, format!("d{request}").as_bytes(), request).unwrap();
    }
    fs.close().unwrap();
    let noted = host.open().noted();
    assert!(noted.contains(&1599) && noted.contains(&1200) && !noted.contains(&5) && noted.len() < 600);
}
