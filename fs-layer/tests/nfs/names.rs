//! Directories: RFC 8881 sections 14.5, 18.13, 18.23, 18.25 and 18.26.

use std::collections::BTreeSet;

use fs_layer::export::nfs4::attributes::number::{FILEID, MODE, RDATTR_ERROR, TYPE};
use fs_layer::export::nfs4::bitmap::Bitmap;
use fs_layer::export::nfs4::ops::op;
use fs_layer::export::nfs4::status::Nfs4Error;

use crate::client::{Client, Ops, Reply, World};

/// Names, the last cookie, and whether that was all.
fn entries(reply: &mut Reply) -> (Vec<Vec<u8>>, u64, bool) {
    reply.ok(op::PUTROOTFH).ok(op::READDIR).take(|r| {
        r.u64()?;
        let (mut names, mut last) = (Vec::new(), 0);
        while r.bool()? {
            last = r.u64()?;
            assert!(last > 2);
            names.push(r.opaque(255)?.to_vec());
            Bitmap::read(r)?;
            r.opaque(1 << 20)?;
        }
        Ok((names, last, r.bool()?))
    })
}

#[test]
fn directories_are_read_in_pages() {
    let world = World::new();
    let mut client = Client::new(&world.serve(), b"one");
    let all: BTreeSet<Vec<u8>> = (0..500).map(|n| format!("entry-{n}").into_bytes()).collect();
    for name in &all {
        client.status(Ops::root().mkdir(name)).unwrap();
    }
    for max in [200, 1000, 4096, 1 << 20] {
        let (mut found, mut cookie, mut pages) = (Vec::new(), 0, 0);
        loop {
            let mut reply = client.go(Ops::root().readdir(cookie, max, &[TYPE, FILEID, MODE, RDATTR_ERROR]));
            assert!(reply.body.len() < max as usize + 100, "{} bytes", reply.body.len());
            let (names, last, end) = entries(&mut reply);
            found.extend(names);
            (cookie, pages) = (last, pages + 1);
            if end {
                break;
            }
            if pages == 3 {
                // What comes and goes meanwhile moves nothing else.
                client.status(Ops::root().mkdir(b"aaa")).unwrap();
                client.status(Ops::root().remove(b"aaa")).unwrap();
            }
        }
        assert_eq!(found.len(), all.len());
        assert_eq!(found.into_iter().collect::<BTreeSet<_>>(), all);
    }
    for cookie in [1, 2, 1 << 63, u64::MAX] {
        assert_eq!(client.status(Ops::root().readdir(cookie, 4096, &[])), Err(Nfs4Error::BadCookie));
    }
    assert_eq!(client.status(Ops::root().readdir(0, 20, &[TYPE])), Err(Nfs4Error::TooSmall));
}

#[test]
fn names_are_checked() {
    let mut client = Client::new(&World::new().serve(), b"one");
    let long = [b'x'; 256];
    for (name, error) in [
        (&b""[..], Nfs4Error::Inval),
        (b".", Nfs4Error::BadName),
        (b"..", Nfs4Error::BadName),
        (b"a/b", Nfs4Error::BadChar),
        (b"a\0b", Nfs4Error::BadChar),
        (&long, Nfs4Error::NameTooLong),
    ] {
        assert_eq!(client.status(Ops::root().lookup(name)), Err(error));
        assert_eq!(client.status(Ops::root().mkdir(name)), Err(error));
        assert_eq!(client.status(Ops::root().remove(name)), Err(error));
        assert_eq!(client.open(b"owner", name, 1, 0), Err(error));
    }
    client.status(Ops::root().mkdir(&long[1..])).unwrap();
    client.status(Ops::root().mkdir(b"\xff\xfe")).unwrap();
    assert_eq!(client.status(Ops::root().lookup(b"missing")), Err(Nfs4Error::NoEnt));
    assert_eq!(client.status(Ops::root().add(op::LOOKUPP, |_| ())), Err(Nfs4Error::NoEnt));
    client.status(Ops::root().lookup(b"\xff\xfe").add(op::LOOKUPP, |_| ()).lookup(b"\xff\xfe")).unwrap();
}

#[test]
fn what_is_no_directory_is_named() {
    let mut client = Client::new(&World::new().serve(), b"one");
    client.create(b"owner", b"file");
    let link = Ops::root().add(op::CREATE, |w| {
        w.u32(5);
        w.opaque(b"target");
        w.opaque(b"link");
        Bitmap::default().write(w);
        w.opaque(&[]);
    });
    client.status(link).unwrap();
    assert_eq!(client.status(Ops::root().lookup(b"file").lookup(b"x")), Err(Nfs4Error::NotDir));
    assert_eq!(client.status(Ops::root().lookup(b"link").lookup(b"x")), Err(Nfs4Error::Symlink));
    assert_eq!(client.open(b"owner", b"link", 1, 0), Err(Nfs4Error::Symlink));
    client.status(Ops::root().mkdir(b"dir")).unwrap();
    assert_eq!(client.open(b"owner", b"dir", 1, 0), Err(Nfs4Error::IsDir));
    let mut reply = client.go(Ops::root().lookup(b"link").add(op::READLINK, |_| ()));
    assert_eq!(reply.ok(op::PUTROOTFH).ok(op::LOOKUP).ok(op::READLINK).handle(), b"target");
}

#[test]
fn a_changed_directory_says_so_once() {
    let world = World::new();
    let mut client = Client::new(&world.serve(), b"one");
    let commits = world.vfs.commits();
    let mut reply = client.go(Ops::root().mkdir(b"a").add(op::PUTROOTFH, |_| ()).mkdir(b"b"));
    assert_eq!(world.vfs.commits(), commits + 1, "one commit for the compound");
    let (atomic, before, after) = reply.ok(op::PUTROOTFH).ok(op::CREATE).take(|r| Ok((r.bool()?, r.u64()?, r.u64()?)));
    assert!(atomic && before < after);
    reply.take(Bitmap::read);
    assert_eq!(reply.ok(op::PUTROOTFH).ok(op::CREATE).take(|r| Ok((r.bool()?, r.u64()?))), (true, after));
    client.status(Ops::root().lookup(b"a")).unwrap();
    assert_eq!(world.vfs.commits(), commits + 1, "nothing was changed");
    let rename = Ops::root().add(op::SAVEFH, |_| ()).add(op::RENAME, |w| {
        w.opaque(b"a");
        w.opaque(b"b");
    });
    client.status(rename).unwrap();
    assert_eq!(client.status(Ops::root().lookup(b"a")), Err(Nfs4Error::NoEnt));
}

#[test]
fn a_read_only_export_changes_nothing() {
    let mut world = World::new();
    let mut client = Client::new(&world.serve(), b"one");
    client.create(b"owner", b"file");
    world.read_only = true;
    let mut client = Client::new(&world.serve(), b"two");
    assert_eq!(client.status(Ops::root().mkdir(b"x")), Err(Nfs4Error::Rofs));
    assert_eq!(client.status(Ops::root().remove(b"file")), Err(Nfs4Error::Rofs));
}
