//! Clients and sessions: RFC 8881 sections 2.10.6, 18.35 to 18.37 and 18.46.

use std::time::Duration;

use fs_layer::export::nfs4::ops::op;
use fs_layer::export::nfs4::rpc::Caller;
use fs_layer::export::nfs4::state::stateid::ANONYMOUS;
use fs_layer::export::nfs4::status::Nfs4Error;
use fs_layer::vfs::{Credentials, ROOT, Vfs};

use crate::client::{Client, Ops, World};

const CONFIRMED: u32 = 0x8000_0000;
const UPDATE: u32 = 0x4000_0000;

fn other_user() -> Caller {
    Caller::Unix { uid: 1000, gid: 1000, groups: vec![] }
}

#[test]
fn exchange_id_knows_its_cases() {
    let shared = World::new().serve();
    let mut client = Client::strange(&shared, b"one");
    assert_eq!(client.exchange(UPDATE), Err(Nfs4Error::NoEnt), "case 7");
    let (first, sequence, flags) = client.exchange(0).unwrap();
    assert_eq!(flags & CONFIRMED, 0, "case 1");
    let (second, _, _) = client.exchange(0).unwrap();
    assert_ne!(first, second, "case 4: an unconfirmed record is replaced");
    client.id = first;
    assert_eq!(client.create_session(sequence).err(), Some(Nfs4Error::StaleClientId));
    client.id = second;
    client.create_session(sequence).unwrap();
    let (third, next, flags) = client.exchange(0).unwrap();
    assert_eq!((third, next, flags & CONFIRMED), (second, sequence + 1, CONFIRMED), "case 2");
    assert_eq!(client.exchange(UPDATE).unwrap().0, second, "case 6");

    let mut stranger = Client::strange(&shared, b"one");
    stranger.caller = other_user();
    assert_eq!(stranger.exchange(UPDATE), Err(Nfs4Error::Perm), "case 9");
    client.run(Ops::default().reclaim_complete(false));
    client.create(b"owner", b"file");
    assert_eq!(stranger.exchange(0), Err(Nfs4Error::ClidInUse), "case 3");

    let mut again = Client::strange(&shared, b"one");
    again.verifier = 2;
    assert_eq!(again.exchange(UPDATE), Err(Nfs4Error::NotSame), "case 8");
    let (fifth, sequence, flags) = again.exchange(0).unwrap();
    assert_ne!(fifth, second, "case 5");
    assert_eq!(flags & CONFIRMED, 0);
    client.go(Ops::root()).ok(op::PUTROOTFH);
    again.id = fifth;
    again.create_session(sequence).unwrap();
    assert_eq!(client.run(Ops::root()).error(), Some(Nfs4Error::BadSession), "the old one is gone");
    assert_eq!(shared.table().counts(), (1, 1, 0, 0));
}

#[test]
fn a_user_who_holds_nothing_loses_the_name() {
    let shared = World::new().serve();
    let client = Client::new(&shared, b"one");
    let mut stranger = Client::strange(&shared, b"one");
    stranger.caller = other_user();
    assert_ne!(stranger.exchange(0).unwrap().0, client.id);
}

#[test]
fn creating_a_session_is_repeated_not_done_twice() {
    let shared = World::new().serve();
    let mut client = Client::strange(&shared, b"one");
    let (id, sequence, _) = client.exchange(0).unwrap();
    client.id = id;
    assert_eq!(client.create_session(sequence + 1).err(), Some(Nfs4Error::SeqMisordered));
    let first = client.create_session(sequence).unwrap();
    assert_eq!(client.create_session(sequence).unwrap(), first);
    assert_eq!(shared.table().counts().1, 1);
    client.create_session(sequence + 1).unwrap();
    assert_eq!(shared.table().counts().1, 2);
}

#[test]
fn a_session_gives_what_it_can() {
    let shared = World::new().serve();
    let mut client = Client::strange(&shared, b"one");
    let (id, sequence, _) = client.exchange(0).unwrap();
    client.id = id;
    let mut reply = client.create_session(sequence).unwrap();
    reply.ok(op::CREATE_SESSION).take(|r| {
        r.fixed::<16>()?;
        assert_eq!((r.u32()?, r.u32()?), (sequence, 2));
        let fore: Vec<u32> = (0..7).map(|_| r.u32()).collect::<Result<_, _>>()?;
        // Never more than was asked for, and all operations that were asked for.
        assert_eq!(fore, [0, 1 << 20, 1 << 20, 4096, 16, 8, 0]);
        Ok(())
    });
}

#[test]
fn a_request_runs_once() {
    let world = World::new();
    let shared = world.serve();
    let mut client = Client::new(&shared, b"one");
    client.keep = true;
    let make = client.sequenced(0, 2, &Ops::root().mkdir(b"dir"));
    let first = client.bare(&make);
    assert_eq!(first.status, 0);
    assert_eq!(client.bare(&make), first, "answered from the slot");
    let other = client.sequenced(0, 2, &Ops::root().mkdir(b"dir").getfh());
    assert_eq!(client.bare(&other).error(), Some(Nfs4Error::SeqFalseRetry));
    for wrong in [0, 1, 4, u32::MAX] {
        let ops = client.sequenced(0, wrong, &Ops::root());
        assert_eq!(client.bare(&ops).error(), Some(Nfs4Error::SeqMisordered), "{wrong}");
    }
    let ops = client.sequenced(8, 1, &Ops::root());
    assert_eq!(client.bare(&ops).error(), Some(Nfs4Error::BadSlot));
    let ops = client.sequenced(1, 1, &Ops::root().mkdir(b"dir"));
    assert_eq!(client.bare(&ops).error(), Some(Nfs4Error::Exist), "another slot is another request");
}

#[test]
fn a_reply_that_was_not_kept_is_not_made_up() {
    let shared = World::new().serve();
    let mut client = Client::new(&shared, b"one");
    let (_, handle) = client.create(b"owner", b"file");
    client.write_all(&handle, &[7; 4000]);
    let read = Ops::at(&handle).read(ANONYMOUS, 0, 4000);
    client.status(read.clone()).unwrap();
    let again = client.sequenced(0, client.sequences[0], &read);
    let mut reply = client.bare(&again);
    assert_eq!((reply.error(), reply.count), (Some(Nfs4Error::RetryUncachedRep), 2));
    reply.ok(op::SEQUENCE).take(|r| r.fixed::<36>());
    reply.fails(op::PUTFH, Nfs4Error::RetryUncachedRep);
}

#[test]
fn operations_stand_where_they_may() {
    let shared = World::new().serve();
    let mut client = Client::new(&shared, b"one");
    assert_eq!(client.bare(&Ops::root()).error(), Some(Nfs4Error::OpNotInSession));
    let two = client.create_session_ops(2).add(op::PUTROOTFH, |_| ());
    assert_eq!(client.bare(&two).error(), Some(Nfs4Error::NotOnlyOp));
    let inner = client.sequenced(1, 1, &Ops::root());
    let mut reply = client.go(Ops { count: inner.count, w: inner.w });
    reply.fails(op::SEQUENCE, Nfs4Error::SequencePos);
    let mut many = Ops::root();
    for _ in 0..20 {
        many = many.getfh();
    }
    assert_eq!(client.run(many).error(), Some(Nfs4Error::TooManyOps));
    client.go(Ops::root().add(76, |_| ())).ok(op::PUTROOTFH).fails(op::ILLEGAL, Nfs4Error::OpIllegal);
    client.go(Ops::root().add(2, |_| ())).ok(op::PUTROOTFH).fails(op::ILLEGAL, Nfs4Error::OpIllegal);
    client.go(Ops::root().add(50, |_| ())).ok(op::PUTROOTFH).fails(50, Nfs4Error::NotSupp);
    client.go(Ops::default().getfh()).fails(op::GETFH, Nfs4Error::NoFileHandle);
    client.minor = 1;
    client.go(Ops::root().seek(ANONYMOUS, 0, 0)).ok(op::PUTROOTFH).fails(op::ILLEGAL, Nfs4Error::OpIllegal);
    for wrong in [0, 3] {
        client.minor = wrong;
        let reply = client.bare(&Ops::root());
        assert_eq!((reply.error(), reply.count), (Some(Nfs4Error::MinorVersMismatch), 0));
    }
}

#[test]
fn replies_stay_within_the_session() {
    let world = World::new();
    let shared = world.serve();
    let mut client = Client::new(&shared, b"one");
    let (stateid, handle) = client.create(b"owner", b"file");
    client.write_all(&handle, &[7; 64 << 10]);
    client.keep = true;
    // 4,096 bytes can be kept: the read is cut to fit.
    let mut reply = client.go(Ops::at(&handle).read(stateid, 0, 64 << 10));
    let (end, data) = reply.ok(op::PUTFH).ok(op::READ).take(|r| Ok((r.bool()?, r.opaque(1 << 20)?.len())));
    assert!(!end && data > 3000 && data < 4096, "{data}");
    let reply = client.go(Ops::at(&handle).read(stateid, 0, 64 << 10).mkdir(b"dir"));
    assert_eq!(reply.error(), Some(Nfs4Error::RepTooBigToCache), "before anything is changed");
    assert!(world.vfs.lookup(&Credentials::system(), ROOT, b"dir").is_err());
}

#[test]
fn only_a_sequence_that_succeeds_renews_the_lease() {
    let mut world = World::new();
    world.lease = Duration::from_millis(300);
    let shared = world.serve();
    let mut one = Client::new(&shared, b"one");
    one.create(b"owner", b"file");
    let denies = one.open(b"denier", b"file", 1, 2).err();
    assert_eq!(denies, Some(Nfs4Error::ShareDenied), "the first open writes");
    let (stateid, _) = one.create(b"denier", b"second");
    let ops = Ops::root().lookup(b"second").add(op::OPEN_DOWNGRADE, |w| {
        stateid.write(w);
        w.u32(0);
        w.u32(1);
        w.u32(0);
    });
    one.status(ops).unwrap();
    one.open(b"denier", b"second", 1, 2).unwrap();
    let mut two = Client::new(&shared, b"two");
    for _ in 0..8 {
        std::thread::sleep(Duration::from_millis(50));
        let misordered = one.sequenced(0, 77, &Ops::root());
        assert_eq!(one.bare(&misordered).error(), Some(Nfs4Error::SeqMisordered));
        two.status(Ops::root()).unwrap();
    }
    two.open(b"owner", b"second", 2, 0).expect("the lease of the other is over");
    assert_eq!(one.run(Ops::root()).error(), Some(Nfs4Error::BadSession));
}

#[test]
fn a_silent_client_keeps_what_is_in_nobodys_way() {
    let mut world = World::new();
    world.lease = Duration::from_millis(50);
    let shared = world.serve();
    let mut one = Client::new(&shared, b"one");
    let (stateid, handle) = one.create(b"owner", b"file");
    std::thread::sleep(Duration::from_millis(150));
    shared.table().expire_silent(960).go(&*world.vfs);
    one.status(Ops::at(&handle).write(stateid, 0, 0, b"still here")).unwrap();
}

#[test]
fn sessions_and_clients_end() {
    let world = World::new();
    let shared = world.serve();
    let mut client = Client::new(&shared, b"one");
    let destroy_client = |id: u64| Ops::default().add(op::DESTROY_CLIENTID, |w| w.u64(id));
    let id = client.id;
    assert_eq!(client.bare(&destroy_client(id)).error(), Some(Nfs4Error::ClientIdBusy));
    client.create(b"owner", b"file");
    let session = client.session;
    let destroy = Ops::default().add(op::DESTROY_SESSION, |w| w.fixed(&session));
    let early = Ops {
        count: 2,
        w: {
            let mut w = destroy.w.clone();
            w.u32(op::PUTROOTFH);
            w
        },
    };
    assert_eq!(client.run(early).error(), Some(Nfs4Error::NotOnlyOp));
    assert_eq!(client.bare(&destroy).error(), None);
    assert_eq!(client.bare(&destroy).error(), Some(Nfs4Error::BadSession));
    assert_eq!(client.bare(&destroy_client(id)).error(), Some(Nfs4Error::ClientIdBusy), "it has a file open");
    assert_eq!(world.vfs.holds(), 1);
    let mut again = Client::strange(&shared, b"one");
    again.verifier = 9;
    again.establish();
    assert_eq!(world.vfs.holds(), 0);
    let (id, session) = (again.id, again.session);
    again.bare(&Ops::default().add(op::DESTROY_SESSION, |w| w.fixed(&session))).ok(op::DESTROY_SESSION);
    assert_eq!(again.bare(&destroy_client(id)).error(), None);
    assert_eq!(again.bare(&destroy_client(id)).error(), Some(Nfs4Error::StaleClientId));
    assert_eq!(shared.table().counts(), (0, 0, 0, 0));
}

#[test]
fn two_servers_are_two() {
    let major = |client: &mut Client| {
        let ops = Ops::default().add(op::EXCHANGE_ID, |w| {
            w.u64(1);
            w.opaque(b"probe");
            w.u32(0);
            w.u32(0);
            w.u32(0);
        });
        let mut reply = client.bare(&ops);
        reply.ok(op::EXCHANGE_ID).take(|r| {
            r.fixed::<20>()?;
            r.u64()?;
            Ok(r.opaque(1024)?.to_vec())
        })
    };
    let (one, two) = (World::new(), World::new());
    let first = one.serve();
    let mine = major(&mut Client::strange(&first, b"c"));
    assert_ne!(mine, major(&mut Client::strange(&two.serve(), b"c")));
    let restarted = one.restart(first);
    assert_eq!(mine, major(&mut Client::strange(&restarted, b"c")));
}
