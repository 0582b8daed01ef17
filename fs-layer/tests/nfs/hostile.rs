//! Bytes of anybody: no panic, no reply longer than the session allows, and the server serves on.

use fs_layer::export::nfs4::connection::{self, detached};
use fs_layer::export::nfs4::ops::op;
use fs_layer::export::nfs4::rpc;
use fs_layer::export::nfs4::state::stateid::CURRENT;
use proptest::prelude::*;

use crate::client::{Client, Ops, ROOT_USER, World};

/// Compounds that do something, to be damaged.
fn sound(handle: &[u8]) -> Vec<Ops> {
    vec![
        Ops::root()
            .create(b"owner", b"file")
            .write(CURRENT, 5, 2, b"some data")
            .read(CURRENT, 0, 100)
            .commit()
            .close(CURRENT),
        Ops::root().readdir(0, 4096, &[0, 1, 3, 4, 8, 19, 36, 47, 55, 75, 82]),
        Ops::root().mkdir(b"dir").getattr(&[1, 3, 33]).lookup(b"x"),
        Ops::at(handle).lock_new(CURRENT, b"locker", 2, 0, 10, false).seek(CURRENT, 0, 1),
        Ops::root().create(b"owner", b"file").lock_new(CURRENT, b"locker", 4, 0, 10, false).unlock(CURRENT, 0, 5),
        Ops::at(handle).setattr_size(CURRENT, 1 << 20).remove(b"x"),
        Ops::root().add(op::SAVEFH, |_| ()).add(op::RENAME, |w| {
            w.opaque(b"file");
            w.opaque(b"other");
        }),
        Ops::at(handle).add(op::LISTXATTRS, |w| {
            w.u64(0);
            w.u32(100);
        }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn damaged_compounds_do_no_harm(
        which in 0usize..8,
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in prop::option::of(any::<prop::sample::Index>()),
        words in prop::collection::vec((any::<prop::sample::Index>(), prop::sample::select(vec![0u32, 1, 2, 0xff, 1 << 20, 1 << 31, u32::MAX])), 0..3),
    ) {
        let world = World::new();
        let mut client = Client::new(&world.serve(), b"one");
        let (_, handle) = client.create(b"owner", b"file");
        let ops = sound(&handle).swap_remove(which);
        let sequence = client.sequences[0] + 1;
        let mut arguments = client.compound(&client.sequenced(0, sequence, &ops));
        // The session's header stays, so that what follows is looked at.
        let from = 4 + 4 + 4 + 4 + 4 + 16 + 16;
        for (at, word) in words {
            let at = (from + at.index(arguments.len() - from)) / 4 * 4;
            arguments[at..at + 4].copy_from_slice(&word.to_be_bytes());
        }
        for (at, byte) in damage {
            let at = at.index(arguments.len() - 12) + 12;
            arguments[at] = byte;
        }
        if let Some(cut) = cut {
            arguments.truncate(cut.index(arguments.len()));
        }
        if let Some(reply) = client.arguments(&arguments) {
            prop_assert!(reply.len() <= 1 << 20);
        }
        let mut other = Client::new(&client.shared.clone(), b"two");
        prop_assert_eq!(other.status(Ops::root().getattr(&[1])), Ok(()));
    }

    #[test]
    fn random_records_do_no_harm(record in prop::collection::vec(any::<u8>(), 0..300), call in any::<bool>()) {
        let world = World::new();
        let shared = world.serve();
        let (connection, _calls) = detached("127.0.0.1".parse().unwrap());
        let mut bytes = if call { rpc::call(1, rpc::NFS_PROGRAM, 4, 1, &ROOT_USER).into_bytes() } else { Vec::new() };
        bytes.extend_from_slice(&record);
        connection::answer(&shared, &connection, &bytes);
    }

    #[test]
    fn random_operations_do_no_harm(operations in prop::collection::vec((3u32..80, prop::collection::vec(any::<u8>(), 0..80)), 1..6)) {
        let world = World::new();
        let mut client = Client::new(&world.serve(), b"one");
        let mut ops = Ops::root();
        for (operation, arguments) in operations {
            ops = ops.add(operation, |w| w.raw(&arguments));
        }
        client.run(ops);
    }
}
