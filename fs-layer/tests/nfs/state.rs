//! Opens, locks and grace: RFC 8881 sections 8, 9, 18.2, 18.10 to 18.12, 18.16 to 18.18, 18.38, 18.48 and 18.51.

use std::time::Duration;

use fs_layer::export::nfs4::bitmap::Bitmap;
use fs_layer::export::nfs4::ops::op;
use fs_layer::export::nfs4::rpc::Message;
use fs_layer::export::nfs4::state::stateid::{ANONYMOUS, BYPASS, CURRENT, INVALID, Other, Stateid};
use fs_layer::export::nfs4::status::Nfs4Error;
use fs_layer::vfs::{Credentials, ROOT, SetAttributes, SetTime, Time, Vfs};

use crate::client::{Client, Ops, World};

fn test_stateids(client: &mut Client, stateids: &[Stateid]) -> Vec<u32> {
    let ops = Ops::default().add(op::TEST_STATEID, |w| {
        w.u32(stateids.len() as u32);
        stateids.iter().for_each(|stateid| stateid.write(w));
    });
    client.go(ops).ok(op::TEST_STATEID).take(|r| (0..r.count(100)?).map(|_| r.u32()).collect())
}

fn free(stateid: Stateid) -> Ops {
    Ops::default().add(op::FREE_STATEID, |w| stateid.write(w))
}

fn downgrade(handle: &[u8], stateid: Stateid, access: u32, deny: u32) -> Ops {
    Ops::at(handle).add(op::OPEN_DOWNGRADE, |w| {
        stateid.write(w);
        w.u32(0);
        w.u32(access);
        w.u32(deny);
    })
}

fn newer(stateid: Stateid, by: u32) -> Stateid {
    Stateid { seqid: stateid.seqid + by, ..stateid }
}

#[test]
fn state_identifiers_are_tested_never_stale() {
    let world = World::new();
    let shared = world.serve();
    let mut client = Client::new(&shared, b"one");
    let (first, _) = client.create(b"owner", b"file");
    let second = client.open(b"owner", b"file", 1, 0).unwrap();
    assert_eq!((second.other, second.seqid), (first.other, 2));
    let of_another_boot = Stateid { seqid: 1, other: Other::new(7, 1) };
    let bad = Nfs4Error::BadStateId.code();
    assert_eq!(
        test_stateids(&mut client, &[second, first, newer(second, 1), of_another_boot, ANONYMOUS, BYPASS, INVALID]),
        [0, Nfs4Error::OldStateId.code(), bad, bad, bad, bad, bad]
    );
    let mut other = Client::new(&shared, b"two");
    assert_eq!(test_stateids(&mut other, &[second]), [bad], "another client's");
    let shared = world.restart(shared);
    let mut client = Client::new(&shared, b"one");
    assert_eq!(test_stateids(&mut client, &[second]), [bad], "of before the restart");
}

#[test]
fn opens_grow_and_shrink() {
    let world = World::new();
    let mut client = Client::new(&world.serve(), b"one");
    let (stateid, handle) = client.create(b"owner", b"file");
    client.status(Ops::at(&handle).close(stateid)).unwrap();
    let read = client.open(b"owner", b"file", 1, 0).unwrap();
    let write = |stateid| Ops::at(&handle).write(stateid, 0, 0, b"x");
    assert_eq!(client.status(write(read)), Err(Nfs4Error::OpenMode));
    let both = client.open(b"owner", b"file", 2, 0).unwrap();
    assert_eq!(both.other, read.other);
    client.status(write(both)).unwrap();
    assert_eq!(client.status(write(read)), Err(Nfs4Error::OldStateId));
    client.status(write(Stateid { seqid: 0, ..both })).unwrap();
    assert_eq!(client.status(downgrade(&handle, both, 1, 1)), Err(Nfs4Error::Inval));
    assert_eq!(client.status(downgrade(&handle, both, 0, 0)), Err(Nfs4Error::Inval));
    client.status(downgrade(&handle, both, 1, 0)).unwrap();
    assert_eq!(client.status(write(newer(both, 1))), Err(Nfs4Error::OpenMode));
    assert_eq!(world.vfs.holds(), 1, "an open is one hold, however often it is opened");
    client.status(Ops::at(&handle).close(newer(both, 1))).unwrap();
    assert_eq!(world.vfs.holds(), 0);
    assert_eq!(client.status(Ops::at(&handle).close(newer(both, 1))), Err(Nfs4Error::BadStateId));
}

#[test]
fn what_is_denied_is_denied_to_all_ways() {
    let world = World::new();
    let shared = world.serve();
    let mut one = Client::new(&shared, b"one");
    let (stateid, handle) = one.create(b"owner", b"file");
    one.write_all(&handle, b"contents");
    one.status(Ops::at(&handle).close(stateid)).unwrap();
    let mut two = Client::new(&shared, b"two");
    let allocate = |operation: u32| {
        Ops::at(&handle).add(operation, |w| {
            ANONYMOUS.write(w);
            w.u64(0);
            w.u64(10);
        })
    };
    let deny_write = one.open(b"owner", b"file", 1, 2).unwrap();
    assert_eq!(two.open(b"owner", b"file", 2, 0), Err(Nfs4Error::ShareDenied));
    assert_eq!(two.status(Ops::at(&handle).write(ANONYMOUS, 0, 0, b"x")), Err(Nfs4Error::Locked));
    assert_eq!(two.status(Ops::at(&handle).setattr_size(ANONYMOUS, 1)), Err(Nfs4Error::Locked));
    assert_eq!(two.status(allocate(op::ALLOCATE)), Err(Nfs4Error::Locked));
    assert_eq!(two.status(allocate(op::DEALLOCATE)), Err(Nfs4Error::Locked));
    two.status(Ops::at(&handle).read(ANONYMOUS, 0, 10)).unwrap();
    two.status(Ops::at(&handle).seek(ANONYMOUS, 0, 0)).unwrap();
    one.status(Ops::at(&handle).close(deny_write)).unwrap();
    one.open(b"owner", b"file", 2, 1).unwrap();
    assert_eq!(two.open(b"owner", b"file", 1, 0), Err(Nfs4Error::ShareDenied));
    assert_eq!(two.open(b"owner", b"file", 2, 2), Err(Nfs4Error::ShareDenied), "what it denies is in use");
    assert_eq!(two.status(Ops::at(&handle).read(ANONYMOUS, 0, 10)), Err(Nfs4Error::Locked));
    assert_eq!(two.status(Ops::at(&handle).seek(ANONYMOUS, 0, 0)), Err(Nfs4Error::Locked));
    two.status(Ops::at(&handle).read(BYPASS, 0, 10)).unwrap();
}

#[test]
fn the_current_state_is_the_last_one() {
    let mut client = Client::new(&World::new().serve(), b"one");
    let write = Ops::root().create(b"owner", b"file").write(CURRENT, 0, 0, b"abc").read(CURRENT, 0, 10).close(CURRENT);
    client.status(write).unwrap();
    assert_eq!(client.status(Ops::root().read(CURRENT, 0, 1)), Err(Nfs4Error::BadStateId));
}

#[test]
fn a_removed_file_lives_while_it_is_open() {
    let world = World::new();
    let mut client = Client::new(&world.serve(), b"one");
    let mut reply = client.go(Ops::root().create(b"owner", b"file").getfh());
    let (stateid, flags) = reply.ok(op::PUTROOTFH).ok(op::OPEN).opened();
    assert_eq!(flags & 0x8, 0x8, "OPEN4_RESULT_PRESERVE_UNLINKED");
    let handle = reply.ok(op::GETFH).handle();
    client.status(Ops::at(&handle).write(stateid, 0, 0, b"kept")).unwrap();
    client.status(Ops::root().remove(b"file")).unwrap();
    let mut reply = client.go(Ops::at(&handle).read(stateid, 0, 10).getattr(&[35]));
    let (end, data) = reply.ok(op::PUTFH).ok(op::READ).take(|r| Ok((r.bool()?, r.opaque(100)?.to_vec())));
    assert_eq!((end, data.as_slice()), (true, &b"kept"[..]));
    assert_eq!(reply.ok(op::GETATTR).attributes().1, [0; 4], "no names");
    client.status(Ops::at(&handle).close(stateid)).unwrap();
    assert_eq!(client.status(Ops::at(&handle).getattr(&[4])), Err(Nfs4Error::Stale));
}

#[test]
fn an_exclusive_create_is_repeated_not_refused() {
    let mut client = Client::new(&World::new().serve(), b"one");
    for mode in [2u32, 3] {
        let exclusive = |verifier: u64| {
            Ops::root().open_with(b"owner", 3, 0, |w| {
                w.u32(1);
                w.u32(mode);
                w.u64(verifier);
                if mode == 3 {
                    Bitmap::of(&[33]).write(w);
                    w.opaque(&0o640u32.to_be_bytes());
                }
                w.u32(0);
                w.opaque(format!("file-{mode}").as_bytes());
            })
        };
        let mut made = client.go(exclusive(0x1234_5678_9abc_def0));
        let set = made.ok(op::PUTROOTFH).ok(op::OPEN).take(|r| {
            r.fixed::<40>()?;
            Bitmap::read(r)
        });
        assert_eq!(
            set,
            if mode == 3 { Bitmap::of(&[33]) } else { Bitmap::default() },
            "or clients set what is missing"
        );
        client.status(exclusive(0x1234_5678_9abc_def0)).unwrap();
        assert_eq!(client.status(exclusive(0x1234_5678_9abc_def1)), Err(Nfs4Error::Exist));
    }
}

#[test]
fn a_file_made_unreadable_is_open_to_its_maker() {
    let world = World::new();
    let shared = world.serve();
    let sticky = SetAttributes { mode: Some(0o777), ..SetAttributes::default() };
    world.vfs.setattr(&Credentials::system(), ROOT, &sticky, false).unwrap();
    let mut client = Client::new(&shared, b"one");
    client.caller = fs_layer::export::nfs4::rpc::Caller::Unix { uid: 7, gid: 7, groups: vec![] };
    let create = Ops::root().open_with(b"owner", 3, 0, |w| {
        w.u32(1);
        w.u32(1);
        Bitmap::of(&[33]).write(w);
        w.opaque(&0u32.to_be_bytes());
        w.u32(0);
        w.opaque(b"file");
    });
    let mut reply = client.go(create.getfh());
    let (stateid, _) = reply.ok(op::PUTROOTFH).ok(op::OPEN).opened();
    let handle = reply.ok(op::GETFH).handle();
    client.status(Ops::at(&handle).write(stateid, 0, 2, b"x").read(stateid, 0, 1)).unwrap();
    assert_eq!(client.open(b"another", b"file", 1, 0), Err(Nfs4Error::Access));
}

#[test]
fn unstable_writes_are_known_to_be_lost() {
    let world = World::new();
    let mut client = Client::new(&world.serve(), b"one");
    let (stateid, handle) = client.create(b"owner", b"file");
    let verifier = |client: &mut Client, stable: u32| {
        let mut reply = client.go(Ops::at(&handle).write(stateid, 0, stable, b"data").commit());
        let written = reply.ok(op::PUTFH).ok(op::WRITE).take(|r| {
            assert_eq!((r.u32()?, r.u32()?), (4, stable), "as stable as was asked, no more and no less");
            r.fixed::<8>()
        });
        assert_eq!(reply.ok(op::COMMIT).take(|r| r.fixed::<8>()), written);
        written
    };
    let before = verifier(&mut client, 0);
    assert_eq!(verifier(&mut client, 2), before);
    world.vfs.lose_unsynced();
    assert_ne!(verifier(&mut client, 0), before);
}

#[test]
fn locks_conflict_and_are_given_up() {
    let world = World::new();
    let shared = world.serve();
    let (mut one, mut two) = (Client::new(&shared, b"one"), Client::new(&shared, b"two"));
    let (open_one, handle) = one.create(b"owner", b"file");
    let open_two = two.open(b"owner", b"file", 3, 0).unwrap();
    let lock = |open, kind, offset, length| Ops::at(&handle).lock_new(open, b"locker", kind, offset, length, false);
    let mut reply = one.go(lock(open_one, 2, 10, 10));
    let held = reply.ok(op::PUTFH).ok(op::LOCK).stateid();
    let mut reply = two.go(lock(open_two, 1, 0, u64::MAX));
    reply.ok(op::PUTFH).fails(op::LOCK, Nfs4Error::Denied);
    let conflict = reply.take(|r| Ok((r.u64()?, r.u64()?, r.u32()?, r.u64()?, r.opaque(100)?.to_vec())));
    assert_eq!(conflict, (10, 10, 2, one.id, b"locker".to_vec()));
    two.status(lock(open_two, 2, 0, 10)).unwrap();
    two.status(lock(open_two, 2, 20, u64::MAX)).unwrap();
    assert_eq!(two.status(lock(open_two, 1, 0, 0)), Err(Nfs4Error::Inval));
    assert_eq!(two.status(lock(open_two, 1, 2, u64::MAX - 1)), Err(Nfs4Error::Inval));
    let test = |kind: u32, owner: &'static [u8]| {
        Ops::at(&handle).add(op::LOCKT, move |w| {
            w.u32(kind);
            w.u64(15);
            w.u64(1);
            w.u64(0);
            w.opaque(owner);
        })
    };
    assert_eq!(two.status(test(1, b"locker")), Err(Nfs4Error::Denied));
    one.status(test(2, b"locker")).unwrap();
    assert_eq!(one.status(test(2, b"other")), Err(Nfs4Error::Denied));
    assert_eq!(one.status(free(held)), Err(Nfs4Error::LocksHeld));
    assert_eq!(one.status(free(open_one)), Err(Nfs4Error::LocksHeld));
    let mut reply = one.go(Ops::at(&handle).unlock(held, 0, u64::MAX));
    let empty = reply.ok(op::PUTFH).ok(op::LOCKU).stateid();
    assert_eq!(empty, newer(held, 1));
    assert_eq!(two.status(test(1, b"locker")), Ok(()));
    one.status(free(empty)).unwrap();
    assert_eq!(one.status(Ops::at(&handle).unlock(empty, 0, 1)), Err(Nfs4Error::BadStateId));
    // Closing gives up what was locked.
    one.status(test(2, b"locker")).unwrap();
    two.status(Ops::at(&handle).close(open_two)).unwrap();
    one.status(lock(open_one, 2, 0, u64::MAX)).unwrap();
    let read = one.open(b"reader", b"file", 1, 0).unwrap();
    assert_eq!(one.status(lock(read, 2, 0, 1)), Err(Nfs4Error::OpenMode));
}

#[test]
fn whoever_waits_for_a_lock_is_told() {
    let world = World::new();
    let shared = world.serve();
    let (mut one, mut two) = (Client::new(&shared, b"one"), Client::new(&shared, b"two"));
    let (open_one, handle) = one.create(b"owner", b"file");
    let open_two = two.open(b"owner", b"file", 3, 0).unwrap();
    let lock = |open, kind| Ops::at(&handle).lock_new(open, b"locker", kind, 0, 1, false);
    let held = one.go(lock(open_one, 2)).ok(op::PUTFH).ok(op::LOCK).stateid();
    assert_eq!(two.status(lock(open_two, 4)), Err(Nfs4Error::Denied));
    assert_eq!(two.status(lock(open_two, 4)), Err(Nfs4Error::Denied));
    assert!(two.calls.try_recv().is_err());
    one.status(Ops::at(&handle).unlock(held, 0, 1)).unwrap();
    let call = two.calls.try_recv().expect("CB_NOTIFY_LOCK");
    let Ok(Message::Call(call)) = Message::parse(&call) else { panic!("no call") };
    assert_eq!((call.program, call.version, call.procedure), (0x4000_0000, 1, 1));
    let mut r = fs_layer::export::nfs4::xdr::Reader::new(call.arguments);
    r.opaque(100).unwrap();
    assert_eq!([r.u32(), r.u32(), r.u32(), r.u32()].map(Result::unwrap), [2, 0, 2, 11]);
    assert_eq!(r.fixed::<16>().unwrap(), two.session);
    assert_eq!((0..5).map(|_| r.u32().unwrap()).collect::<Vec<_>>(), [1, 0, 0, 0, 0]);
    assert_eq!(r.u32().unwrap(), 13);
    assert_eq!(r.opaque(128).unwrap(), handle);
    assert_eq!((r.u64().unwrap(), r.opaque(100).unwrap()), (two.id, &b"locker"[..]));
    assert!(two.calls.try_recv().is_err(), "once");
}

#[test]
fn a_lock_of_an_expired_client_is_taken() {
    let mut world = World::new();
    world.lease = Duration::from_millis(100);
    let shared = world.serve();
    let (mut one, mut two) = (Client::new(&shared, b"one"), Client::new(&shared, b"two"));
    let (open_one, handle) = one.create(b"owner", b"file");
    let lock = |open, reclaim| Ops::at(&handle).lock_new(open, b"locker", 2, 0, 1, reclaim);
    one.status(lock(open_one, false)).unwrap();
    let open_two = two.open(b"owner", b"file", 3, 0).unwrap();
    assert_eq!(two.status(lock(open_two, false)), Err(Nfs4Error::Denied));
    std::thread::sleep(Duration::from_millis(200));
    two.status(lock(open_two, false)).unwrap();
    // It was struck out first, so it cannot reclaim what another has.
    let shared = world.restart(shared);
    let mut one = Client::with_session(&shared, b"one");
    assert_eq!(one.status(Ops::at(&handle).reclaim(b"owner", 3)), Err(Nfs4Error::NoGrace));
}

#[test]
fn after_a_restart_what_was_held_comes_first() {
    let world = World::new();
    let shared = world.serve();
    let (mut one, mut two) = (Client::new(&shared, b"one"), Client::new(&shared, b"two"));
    let (open, handle) = one.create(b"owner", b"file");
    let lock = |open, reclaim| Ops::at(&handle).lock_new(open, b"locker", 2, 0, 1, reclaim);
    one.status(lock(open, false)).unwrap();
    assert_eq!(one.status(Ops::at(&handle).reclaim(b"owner", 3)), Err(Nfs4Error::NoGrace), "without a restart");
    two.create(b"owner", b"other");

    let shared = world.restart(shared);
    assert_eq!(one.bare(&Ops::default()).error(), None);
    one.shared = shared.clone();
    assert_eq!(one.run(Ops::root()).error(), Some(Nfs4Error::BadSession));
    assert_eq!(one.create_session(2).err(), Some(Nfs4Error::StaleClientId));
    let mut stranger = Client::with_session(&shared, b"stranger");
    assert_eq!(stranger.open(b"owner", b"file", 1, 0), Err(Nfs4Error::Grace));
    assert_eq!(stranger.status(Ops::at(&handle).reclaim(b"owner", 3)), Err(Nfs4Error::NoGrace));
    stranger.status(Ops::default().reclaim_complete(false)).unwrap();
    assert_eq!(stranger.open(b"owner", b"file", 1, 0), Err(Nfs4Error::Grace), "others may still come");

    let mut one = Client::with_session(&shared, b"one");
    let mut two = Client::with_session(&shared, b"two");
    two.status(Ops::default().reclaim_complete(false)).unwrap();
    let mut reply = one.go(Ops::at(&handle).reclaim(b"owner", 3));
    let (open, _) = reply.ok(op::PUTFH).ok(op::OPEN).opened();
    assert_eq!(one.status(lock(open, false)), Err(Nfs4Error::Grace));
    one.status(lock(open, true)).unwrap();
    assert_eq!(one.open(b"owner", b"new", 1, 0), Err(Nfs4Error::Grace));
    one.status(Ops::root().reclaim_complete(true)).unwrap();
    assert_eq!(stranger.open(b"owner", b"file", 1, 0), Err(Nfs4Error::Grace), "one filesystem is not all");
    one.status(Ops::default().reclaim_complete(false)).unwrap();
    assert_eq!(one.status(Ops::default().reclaim_complete(false)), Err(Nfs4Error::CompleteAlready));
    let theirs = stranger.open(b"owner", b"file", 3, 0).expect("all have come");
    assert_eq!(stranger.status(lock(theirs, false)), Err(Nfs4Error::Denied));
    assert_eq!(one.status(lock(open, true)), Err(Nfs4Error::NoGrace));
}

#[test]
fn grace_ends_by_time_and_strikes_out_who_did_not_come() {
    let mut world = World::new();
    world.grace = Duration::from_millis(150);
    let shared = world.serve();
    let mut one = Client::new(&shared, b"one");
    let (_, handle) = one.create(b"owner", b"file");
    let shared = world.restart(shared);
    let mut two = Client::new(&shared, b"two");
    assert_eq!(two.open(b"owner", b"file", 3, 2), Err(Nfs4Error::Grace));
    std::thread::sleep(Duration::from_millis(250));
    two.open(b"owner", b"file", 3, 2).unwrap();
    let shared = world.restart(shared);
    let mut one = Client::with_session(&shared, b"one");
    assert_eq!(one.status(Ops::at(&handle).reclaim(b"owner", 3)), Err(Nfs4Error::NoGrace));
    let mut two = Client::with_session(&shared, b"two");
    two.status(Ops::at(&handle).reclaim(b"owner", 3)).unwrap();
}

#[test]
fn before_it_is_done_reclaiming_a_client_opens_nothing_new() {
    let mut client = Client::with_session(&World::new().serve(), b"one");
    assert_eq!(client.open(b"owner", b"file", 1, 0), Err(Nfs4Error::Grace));
}

#[test]
fn holes_are_found_and_made() {
    let mut client = Client::new(&World::new().serve(), b"one");
    let (stateid, handle) = client.create(b"owner", b"file");
    client.status(Ops::at(&handle).write(stateid, 8192, 0, &[7; 4096])).unwrap();
    let seek = |client: &mut Client, offset, what| {
        let mut reply = client.go(Ops::at(&handle).seek(stateid, offset, what));
        match reply.error() {
            Some(e) => Err(e),
            None => Ok(reply.ok(op::PUTFH).ok(op::SEEK).take(|r| Ok((r.bool()?, r.u64()?)))),
        }
    };
    assert_eq!(seek(&mut client, 0, 0), Ok((false, 8192)));
    assert_eq!(seek(&mut client, 0, 1), Ok((false, 0)));
    assert_eq!(seek(&mut client, 8192, 1), Ok((true, 12288)));
    assert_eq!(seek(&mut client, 12288, 0), Err(Nfs4Error::Nxio));
    let read_plus = Ops::at(&handle).add(op::READ_PLUS, |w| {
        stateid.write(w);
        w.u64(0);
        w.u32(1 << 20);
    });
    client.go(read_plus).ok(op::PUTFH).ok(op::READ_PLUS).take(|r| {
        assert_eq!((r.bool()?, r.u32()?), (true, 2));
        assert_eq!((r.u32()?, r.u64()?, r.u64()?), (1, 0, 8192));
        assert_eq!((r.u32()?, r.u64()?, r.opaque(5000)?), (0, 8192, &[7; 4096][..]));
        Ok(())
    });
    let copy = |operation: u32, count: u64, tail: bool| {
        Ops::at(&handle).add(op::SAVEFH, |_| ()).add(operation, move |w| {
            ANONYMOUS.write(w);
            ANONYMOUS.write(w);
            w.u64(8192);
            w.u64(16384);
            w.u64(count);
            if tail {
                w.bool(true);
                w.bool(true);
                w.u32(0);
            }
        })
    };
    client.status(copy(op::CLONE, 4096, false)).unwrap();
    let mut reply = client.go(copy(op::COPY, 100, true));
    reply.ok(op::PUTFH).ok(op::SAVEFH).ok(op::COPY).take(|r| {
        assert_eq!((r.u32()?, r.u64()?, r.u32()?), (0, 100, 0));
        Ok(())
    });
    assert_eq!(client.status(copy(op::CLONE, 100, false)), Err(Nfs4Error::Inval));
    assert_eq!(seek(&mut client, 12288, 0), Ok((false, 16384)));
}

#[test]
fn extended_attributes_are_kept() {
    let mut client = Client::new(&World::new().serve(), b"one");
    let (_, handle) = client.create(b"owner", b"file");
    let set = |name: &'static [u8], how: u32| {
        Ops::at(&handle).add(op::SETXATTR, move |w| {
            w.u32(how);
            w.opaque(name);
            w.opaque(b"value");
        })
    };
    let named = |operation: u32, name: &'static [u8]| Ops::at(&handle).add(operation, move |w| w.opaque(name));
    let list = |cookie: u64, max: u32| {
        Ops::at(&handle).add(op::LISTXATTRS, move |w| {
            w.u64(cookie);
            w.u32(max);
        })
    };
    client.status(set(b"a", 1)).unwrap();
    assert_eq!(client.status(set(b"a", 1)), Err(Nfs4Error::Exist));
    assert_eq!(client.status(set(b"b", 2)), Err(Nfs4Error::NoXattr));
    client.status(set(b"b", 0)).unwrap();
    assert_eq!(client.go(named(op::GETXATTR, b"b")).ok(op::PUTFH).ok(op::GETXATTR).handle(), b"value");
    assert_eq!(client.status(list(0, 16)), Err(Nfs4Error::TooSmall));
    let page = client
        .go(list(0, 24))
        .ok(op::PUTFH)
        .ok(op::LISTXATTRS)
        .take(|r| Ok((r.u64()?, r.u32()?, r.opaque(100)?.to_vec(), r.bool()?)));
    assert_eq!(page, (1, 1, b"a".to_vec(), false));
    let page = client
        .go(list(1, 100))
        .ok(op::PUTFH)
        .ok(op::LISTXATTRS)
        .take(|r| Ok((r.u64()?, r.u32()?, r.opaque(100)?.to_vec(), r.bool()?)));
    assert_eq!(page, (2, 1, b"b".to_vec(), true));
    client.status(named(op::REMOVEXATTR, b"a")).unwrap();
    assert_eq!(client.status(named(op::GETXATTR, b"a")), Err(Nfs4Error::NoXattr));
}

#[test]
fn times_are_set() {
    let world = World::new();
    let mut client = Client::new(&world.serve(), b"one");
    client.create(b"owner", b"file");
    let set = Ops::root().lookup(b"file").add(op::SETATTR, |w| {
        ANONYMOUS.write(w);
        Bitmap::of(&[54]).write(w);
        w.u32(16);
        w.u32(1);
        w.i64(-5);
        w.u32(7);
    });
    client.status(set).unwrap();
    let file = world.vfs.lookup(&Credentials::system(), ROOT, b"file").unwrap();
    assert_eq!(file.modified, Time::from_parts(-5, 7));
    let _ = SetTime::Now;
}
