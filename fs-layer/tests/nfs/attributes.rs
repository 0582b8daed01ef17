//! Attributes: RFC 8881 section 5.

use fs_layer::export::nfs4::attributes::number::*;
use fs_layer::export::nfs4::bitmap::Bitmap;
use fs_layer::export::nfs4::ops::op;
use fs_layer::export::nfs4::state::stateid::ANONYMOUS;
use fs_layer::export::nfs4::status::Nfs4Error;
use fs_layer::export::nfs4::xdr::{Reader, Writer};

use crate::client::{Client, Ops, World};

#[test]
fn what_a_linux_client_asks_is_there_in_order() {
    let mut client = Client::new(&World::new().serve(), b"one");
    let asked = [
        SUPPORTED_ATTRS,
        TYPE,
        FH_EXPIRE_TYPE,
        CHANGE,
        SIZE,
        LINK_SUPPORT,
        SYMLINK_SUPPORT,
        FSID,
        UNIQUE_HANDLES,
        LEASE_TIME,
        RDATTR_ERROR,
        FILEID,
        FILES_AVAIL,
        MAXFILESIZE,
        MAXREAD,
        MAXWRITE,
        MODE,
        NUMLINKS,
        OWNER,
        OWNER_GROUP,
        RAWDEV,
        SPACE_TOTAL,
        SPACE_USED,
        TIME_ACCESS,
        TIME_DELTA,
        TIME_METADATA,
        TIME_MODIFY,
        MOUNTED_ON_FILEID,
        FS_LAYOUT_TYPES,
        SUPPATTR_EXCLCREAT,
        CLONE_BLKSIZE,
        CHANGE_ATTR_TYPE,
        XATTR_SUPPORT,
    ];
    // And some that nobody has.
    let with_unknown = [&asked[..], &[12, 40, 80, 95]].concat();
    let mut reply = client.go(Ops::root().getattr(&with_unknown));
    let (answered, values) = reply.ok(op::PUTROOTFH).ok(op::GETATTR).attributes();
    assert_eq!(answered, Bitmap::of(&asked));
    let mut r = Reader::new(&values);
    let supported = Bitmap::read(&mut r).unwrap();
    assert!(asked.iter().all(|number| supported.has(*number)));
    assert_eq!(r.u32().unwrap(), 2, "a directory");
    assert_eq!(r.u32().unwrap(), 0, "persistent handles");
    // The last ones, of word 2: layouts none, settable at exclusive create, and three of version 4.2.
    let exclusive = Bitmap::of(&[SIZE, MODE, OWNER, OWNER_GROUP]);
    let mut tail = Writer::default();
    tail.u32(0);
    exclusive.write(&mut tail);
    tail.u32(4096);
    tail.u32(0);
    tail.bool(true);
    assert!(values.ends_with(tail.as_bytes()));
    client.minor = 1;
    let mut reply = client.go(Ops::root().getattr(&with_unknown));
    assert!(!reply.ok(op::PUTROOTFH).ok(op::GETATTR).attributes().0.has(XATTR_SUPPORT));
}

#[test]
fn the_change_attribute_counts() {
    let mut client = Client::new(&World::new().serve(), b"one");
    let (stateid, handle) = client.create(b"owner", b"file");
    let mut last = 0;
    for n in 0..50 {
        // Faster than any clock ticks.
        let mut reply = client.go(Ops::at(&handle).write(stateid, n, 0, b"x").getattr(&[CHANGE]));
        reply.ok(op::PUTFH).ok(op::WRITE).take(|r| r.fixed::<16>());
        let change = reply.ok(op::GETATTR).attribute_u64();
        assert!(change > last);
        last = change;
    }
}

fn setattr(named: &[u32], body: &[u8]) -> Ops {
    Ops::root().lookup(b"file").add(op::SETATTR, |w| {
        ANONYMOUS.write(w);
        Bitmap::of(named).write(w);
        w.opaque(body);
    })
}

#[test]
fn owners_are_decimal() {
    let mut client = Client::new(&World::new().serve(), b"one");
    client.create(b"owner", b"file");
    let mut owner = Writer::default();
    owner.opaque(b"1234");
    client.status(setattr(&[OWNER], owner.as_bytes())).unwrap();
    let mut reply = client.go(Ops::root().lookup(b"file").getattr(&[OWNER]));
    let (_, value) = reply.ok(op::PUTROOTFH).ok(op::LOOKUP).ok(op::GETATTR).attributes();
    assert_eq!(value, owner.as_bytes());
    let mut name = Writer::default();
    name.opaque(b"root@localdomain");
    let mut reply = client.go(setattr(&[OWNER], name.as_bytes()));
    reply.ok(op::PUTROOTFH).ok(op::LOOKUP).fails(op::SETATTR, Nfs4Error::BadOwner);
    assert_eq!(reply.take(Bitmap::read), Bitmap::default(), "an error says too what was set");
}

#[test]
fn what_cannot_be_set_or_read_is_refused() {
    let mut client = Client::new(&World::new().serve(), b"one");
    client.create(b"owner", b"file");
    assert_eq!(client.status(setattr(&[TYPE], &[0; 4])), Err(Nfs4Error::Inval));
    assert_eq!(client.status(setattr(&[12], &[0; 4])), Err(Nfs4Error::AttrNotSupp));
    assert_eq!(client.status(setattr(&[MODE], &[0; 8])), Err(Nfs4Error::BadXdr));
    assert_eq!(client.status(Ops::root().getattr(&[TIME_ACCESS_SET])), Err(Nfs4Error::Inval));
}

#[test]
fn attributes_are_verified() {
    let mut client = Client::new(&World::new().serve(), b"one");
    client.create(b"owner", b"file");
    let verify = |operation: u32, size: u64| {
        Ops::root().lookup(b"file").add(operation, |w| {
            Bitmap::of(&[SIZE]).write(w);
            w.opaque(&size.to_be_bytes());
        })
    };
    assert_eq!(client.status(verify(op::VERIFY, 0)), Ok(()));
    assert_eq!(client.status(verify(op::VERIFY, 1)), Err(Nfs4Error::NotSame));
    assert_eq!(client.status(verify(op::NVERIFY, 0)), Err(Nfs4Error::Same));
    assert_eq!(client.status(verify(op::NVERIFY, 1)), Ok(()));
}

#[test]
fn handles_of_others_are_refused() {
    let world = World::new();
    let shared = world.serve();
    let mut client = Client::new(&shared, b"one");
    let (_, handle) = client.create(b"owner", b"file");
    let mut forged = handle.clone();
    forged[19] ^= 1;
    assert_eq!(client.status(Ops::at(&forged).getattr(&[SIZE])), Err(Nfs4Error::BadHandle));
    assert_eq!(client.status(Ops::at(b"").getattr(&[SIZE])), Err(Nfs4Error::BadHandle));
    let foreign = Client::new(&World::new().serve(), b"one").create(b"owner", b"file").1;
    assert_eq!(client.status(Ops::at(&foreign).getattr(&[SIZE])), Err(Nfs4Error::BadHandle));
    // They outlive the server, not the file.
    let shared = world.restart(shared);
    let mut client = Client::new(&shared, b"one");
    client.status(Ops::at(&handle).getattr(&[SIZE])).unwrap();
    client.status(Ops::root().remove(b"file")).unwrap();
    assert_eq!(client.status(Ops::at(&handle).getattr(&[SIZE])), Err(Nfs4Error::Stale));
}
