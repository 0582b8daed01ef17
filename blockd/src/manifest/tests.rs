//! The manifest's bytes and its conditional requests.

use proptest::prelude::*;

use super::*;
use crate::chunk::Codec;
use crate::chunk::testing::TestStore;
use crate::crypt::{Keys, Secret};
use crate::store::ObjectStore;
use crate::types::VolumeId;

fn manifest() -> Manifest {
    Manifest {
        id: VolumeId(*b"0123456789abcdef"),
        name: "disk-1".into(),
        size: 1 << 40,
        durability: Durability::Local,
        codec: Codec::Zstd(-3),
        chunk_bytes: 16 << 20,
        state: VolumeState::Active,
        created_ms: 1_700_000_000_000,
        epochs: vec![
            EpochStart { epoch: 1, first_seq: 1, first_lsn: 1, owner: [0xaa; 16], opened_ms: 1_700_000_000_001 },
            EpochStart { epoch: 3, first_seq: 0, first_lsn: 0, owner: [0xbb; 16], opened_ms: 1_700_000_000_002 },
        ],
        encryption: None,
        checkpoint: None,
        snapshots: Vec::new(),
        origin: None,
        restores: Vec::new(),
        seal: Seal::None,
    }
}

#[test]
fn the_golden_manifest_reads_and_is_written_the_same() {
    crate::chunk::testing::golden("manifest-v2.bin", &manifest().encode(), true, |bytes| {
        assert_eq!(Manifest::decode(bytes), Ok(manifest()));
    });
}

fn pointer() -> CheckpointPointer {
    let object = CheckpointName { volume: VolumeId(*b"0123456789abcdef"), epoch: 1, number: 7 };
    CheckpointPointer { object, seq: 256, lsn: 9_000, relocated: 3, bytes: 5 << 20, made_ms: 1_700_000_000_003 }
}

#[test]
fn the_golden_manifest_with_a_checkpoint_reads_and_is_written_the_same() {
    let manifest = Manifest { checkpoint: Some(pointer()), ..manifest() };
    crate::chunk::testing::golden("manifest-v2-checkpoint.bin", &manifest.encode(), true, |bytes| {
        assert_eq!(Manifest::decode(bytes), Ok(manifest.clone()));
    });
}

fn snapshots() -> Vec<Snapshot> {
    let hold = |n: u8| Hold { volume: VolumeId([n; 16]), name: format!("clone-{n}") };
    let empty = Snapshot {
        id: [1; 16],
        name: "empty".into(),
        seq: 0,
        lsn: 0,
        size: 1 << 39,
        made_ms: 1_700_000_000_004,
        epoch: 1,
        checkpoint: None,
        hidden: false,
        holds: Vec::new(),
    };
    let hidden = Snapshot {
        id: [2; 16],
        name: "gone".into(),
        seq: 256,
        lsn: 9_000,
        checkpoint: Some(pointer()),
        hidden: true,
        holds: vec![hold(1), hold(2)],
        ..empty.clone()
    };
    vec![empty, hidden]
}

#[test]
fn the_golden_manifest_of_a_clone_with_snapshots_reads_and_is_written_the_same() {
    let origin = Origin {
        volume: VolumeId([9; 16]),
        name: "gold".into(),
        snapshot: [3; 16],
        epoch: 4,
        seq: 256,
        lsn: 9_000,
        checkpoint: Some(pointer()),
    };
    let restores = vec![Restored { to_seq: 256, to_epoch: 1, from_seq: 300, epoch: 3 }];
    let manifest =
        Manifest { checkpoint: Some(pointer()), snapshots: snapshots(), origin: Some(origin), restores, ..manifest() };
    crate::chunk::testing::golden("manifest-v2-snapshots.bin", &manifest.encode(), true, |bytes| {
        assert_eq!(Manifest::decode(bytes), Ok(manifest.clone()));
    });
    assert!(manifest.is_held() && manifest.snapshot("gone").is_none() && manifest.snapshot("empty").is_some());
    assert_eq!(manifest.held_positions(), [0, 256]);
    assert_eq!(manifest.held_checkpoints(), [pointer().object]);
}

#[test]
fn snapshots_that_contradict_each_other_are_not_stored() {
    let twice = vec![snapshots()[0].clone(), Snapshot { id: [7; 16], ..snapshots()[0].clone() }];
    assert!(Manifest { snapshots: twice, ..manifest() }.problem().is_some());
    let without = vec![Snapshot { checkpoint: None, ..snapshots()[1].clone() }];
    assert!(Manifest { snapshots: without, ..manifest() }.problem().is_some());
    let back = |epoch, from_seq| Restored { to_seq: 1, to_epoch: 1, from_seq, epoch };
    assert!(Manifest { restores: vec![back(2, 9), back(2, 10)], ..manifest() }.problem().is_some());
    assert!(Manifest { restores: vec![back(2, 9), back(3, 8)], ..manifest() }.problem().is_some());
    assert!(Manifest { restores: vec![back(2, 9), back(3, 9)], ..manifest() }.problem().is_none());
}

#[test]
fn what_restores_went_back_behind_does_not_count() {
    let stretch = |first, last, epochs| Stretch { first, last, epochs };
    let of = |restores: &[Restored], end| Manifest { restores: restores.to_vec(), ..manifest() }.lineage(end);
    assert_eq!(of(&[], 9), [stretch(1, 9, (0, u64::MAX))]);
    // Back to 5 at 10, in epoch 3; then back to 10 as it was before that, at 15, in epoch 6.
    let first = Restored { to_seq: 5, to_epoch: 1, from_seq: 10, epoch: 3 };
    let second = Restored { to_seq: 10, to_epoch: 2, from_seq: 15, epoch: 6 };
    assert_eq!(of(&[first], 12), [stretch(1, 5, (0, 1)), stretch(11, 12, (3, u64::MAX))]);
    assert_eq!(of(&[first, second], 15), [stretch(1, 10, (0, 2)), stretch(16, 15, (6, u64::MAX))]);
    // Back to 10 as it was after the first.
    let after = Restored { to_epoch: 4, ..second };
    let whole = [stretch(1, 5, (0, 1)), stretch(11, 10, (3, 4)), stretch(16, 17, (6, u64::MAX))];
    assert_eq!(of(&[first, after], 17), whole);
    assert!(whole[1].has_relocated(10, 4) && !whole[1].has_relocated(10, 2) && !whole[0].has_relocated(6, 1));
}

#[test]
fn names_of_checkpoint_objects_parse_back() {
    let name = pointer().object;
    assert_eq!(name.key(), "checkpoints/30313233343536373839616263646566/0000000000000001-0000000000000007.ckpt");
    for key in [name.key(), name.file_key()] {
        assert_eq!(CheckpointName::parse(&key), Some(name));
        assert!(key.starts_with(&CheckpointName::prefix(name.volume)));
        assert_eq!(CheckpointName::parse(&key.to_uppercase()), None);
        assert_eq!(CheckpointName::parse(&key[..key.len() - 1]), None);
    }
}

#[tokio::test]
async fn owners_change_it_and_only_they() {
    let store = TestStore::default();
    create(&store, &manifest()).await.unwrap();
    let grown = update(&store, "disk-1", 1, None, |m| m.size = 2 << 40).await.unwrap();
    assert_eq!((grown.size, load(&store, "disk-1").await.unwrap().0), (2 << 40, grown.clone()));
    // The same again changes nothing, so nothing is written.
    let version = load(&store, "disk-1").await.unwrap().1;
    assert_eq!(update(&store, "disk-1", 1, None, |m| m.size = 2 << 40).await.unwrap(), grown);
    assert_eq!(load(&store, "disk-1").await.unwrap().1, version);
    // A claim that is not settled takes nothing away; one that is does.
    change(&store, "disk-1", None, |m| {
        (m.epochs[1].first_seq, m.epochs[1].first_lsn) = (9, 9);
        Ok(())
    })
    .await
    .unwrap();
    let refused = update(&store, "disk-1", 1, None, |m| m.size = 1 << 40).await;
    assert!(matches!(refused, Err(ManifestError::NotOwner(_))), "{refused:?}");
    assert_eq!(load(&store, "disk-1").await.unwrap().0.size, 2 << 40);
}

#[test]
fn every_flipped_bit_and_every_cut_is_noticed() {
    let bytes = manifest().encode();
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.to_vec();
        bad[bit / 8] ^= 1 << (bit % 8);
        assert!(Manifest::decode(&bad).is_err(), "bit {bit}");
    }
    for len in 0..bytes.len() {
        assert!(Manifest::decode(&bytes[..len]).is_err(), "{len} bytes");
    }
    let mut longer = bytes.to_vec();
    longer.push(0);
    assert!(Manifest::decode(&longer).is_err());
}

#[test]
fn settings_that_are_not_built_say_so() {
    assert_eq!("replica".parse::<Durability>(), Err(UnknownDurability::NotBuilt));
    for durability in [Durability::Local, Durability::Object] {
        assert_eq!(durability.to_string().parse(), Ok(durability));
    }
    let mut bytes = manifest().encode().to_vec();
    bytes[8] = 3;
    assert_eq!(Manifest::decode(&bytes), Err(ManifestFormatError::Version(3)));
}

#[test]
fn names() {
    for good in ["a", "0", "A.b_c-d", &"x".repeat(128)] {
        assert!(check_name(good).is_ok(), "{good}");
    }
    for bad in ["", ".a", "-a", "_a", "a/b", "a@b", "a b", "ä", "a\0", &"x".repeat(129)] {
        assert!(check_name(bad).is_err(), "{bad}");
    }
}

proptest! {
    #[test]
    fn reads_back_what_was_written(
        id: [u8; 16],
        name in "[A-Za-z0-9][A-Za-z0-9._-]{0,127}",
        blocks in 1u64..1 << 52,
        object: bool,
        codec in prop_oneof![Just(Codec::None), Just(Codec::Lz4), (1i8..=19).prop_map(Codec::Zstd)],
        chunk_bytes: u32,
        deleting: bool,
        created_ms: u64,
        checkpoint: bool,
        epochs in prop::collection::vec((1u64..100, any::<bool>(), 0u64..50, any::<[u8; 16]>()), 0..20),
    ) {
        let (mut epoch, mut seq) = (0, 1);
        let manifest = Manifest {
            id: VolumeId(id),
            name,
            size: blocks << 12,
            durability: if object { Durability::Object } else { Durability::Local },
            codec,
            chunk_bytes,
            state: if deleting { VolumeState::Deleting } else { VolumeState::Active },
            created_ms,
            epochs: epochs.into_iter().map(|(step, settled, chunks, owner)| {
                epoch += step;
                seq += chunks;
                EpochStart {
                    epoch,
                    first_seq: if settled { seq } else { 0 },
                    first_lsn: seq * 7,
                    owner,
                    opened_ms: created_ms,
                }
            }).collect(),
            encryption: None,
            checkpoint: checkpoint.then(|| CheckpointPointer { lsn: created_ms, ..pointer() }),
            snapshots: Vec::new(),
            origin: None,
            restores: Vec::new(),
            seal: Seal::None,
        };
        prop_assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest));
    }

    #[test]
    fn decoding_is_total(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        let mut with_magic = manifest().encode()[..16].to_vec();
        with_magic.extend_from_slice(&bytes);
        prop_assert!(Manifest::decode(&bytes).is_err());
        prop_assert!(Manifest::decode(&with_magic).is_err());
    }
}

#[tokio::test]
async fn only_one_of_two_writers_wins() {
    let store = TestStore::default();
    let first = manifest();
    let version = create(&store, &first).await.unwrap();
    // The same write again, its answer lost: recognized. A different one: not.
    assert_eq!(create(&store, &first).await.unwrap(), version);
    let other = Manifest { id: VolumeId([1; 16]), ..manifest() };
    assert!(matches!(create(&store, &other).await, Err(ManifestError::Exists(_))));

    let unfit = Manifest { size: 4097, ..manifest() };
    assert!(matches!(replace(&store, &unfit, version.clone()).await, Err(ManifestError::Unfit { .. })));

    let (mut mine, mut theirs) = (first.clone(), first.clone());
    mine.size *= 2;
    theirs.size *= 3;
    let newer = replace(&store, &mine, version.clone()).await.unwrap();
    assert!(matches!(replace(&store, &theirs, version.clone()).await, Err(ManifestError::LostRace(_))));
    assert_eq!(replace(&store, &mine, version).await.unwrap(), newer);
    assert_eq!(load(&store, "disk-1").await.unwrap(), (mine, newer));
}

#[tokio::test]
async fn volumes_are_listed_and_removed() {
    let store = TestStore::default();
    for name in ["b", "a", "c"] {
        let manifest = Manifest { name: name.into(), ..manifest() };
        create(&store, &manifest).await.unwrap();
    }
    let junk = bytes::Bytes::from_static(b"x");
    store.put("volumes/x/other", junk.clone(), crate::store::PutMode::Create).await.unwrap();
    assert_eq!(list(&store).await.unwrap(), ["a", "b", "c"]);
    let (_, version) = load(&store, "b").await.unwrap();
    remove(&store, "b", &version).await.unwrap();
    remove(&store, "b", &version).await.unwrap();
    assert_eq!(list(&store).await.unwrap(), ["a", "c"]);
    assert!(matches!(load(&store, "b").await, Err(ManifestError::NotFound(_))));
    // The same request once more, after the name was given to another volume.
    let another = Manifest { name: "b".into(), id: VolumeId([7; 16]), ..manifest() };
    create(&store, &another).await.unwrap();
    remove(&store, "b", &version).await.unwrap();
    assert_eq!(load(&store, "b").await.unwrap().0, another);
    let (_, version) = load(&store, "b").await.unwrap();
    remove(&store, "b", &version).await.unwrap();
    assert!(matches!(load(&store, "a@b").await, Err(ManifestError::Name(_))));
    // A manifest under another volume's name, and one that is none.
    let stray = manifest().encode();
    store.put(&key("stray"), stray, crate::store::PutMode::Create).await.unwrap();
    store.put(&key("junk"), junk, crate::store::PutMode::Create).await.unwrap();
    for name in ["stray", "junk"] {
        assert!(matches!(load(&store, name).await, Err(ManifestError::Damaged { .. })));
    }
}

fn keys() -> Keys {
    Keys::new(&[42; 32])
}

fn passphrase(text: &str) -> Secret {
    Secret::passphrase(zeroize::Zeroizing::new(text.to_owned())).unwrap()
}

fn key_file(byte: u8) -> Secret {
    Secret::KeyFile(zeroize::Zeroizing::new([byte; 32]))
}

/// Cheap enough to be derived in every test.
const CHEAP: Kdf = Kdf::Argon2id { memory_kib: 64, passes: 1, lanes: 1 };

fn encrypted(secret: &Secret) -> Manifest {
    let kdf = if matches!(secret, Secret::KeyFile(_)) { Kdf::KeyFile } else { CHEAP };
    let mut manifest = manifest();
    manifest.encrypt(&keys(), Encryption::wrap_with(&keys(), secret, manifest.id, kdf, [5; 32]));
    manifest
}

#[test]
fn golden_encrypted_manifests_open_and_are_written_the_same() {
    for (file, secret) in
        [("manifest-v2-passphrase.bin", passphrase("open sesame")), ("manifest-v2-key-file.bin", key_file(3))]
    {
        crate::chunk::testing::golden(file, &encrypted(&secret).encode(), true, |bytes| {
            let mut kept = Manifest::decode(bytes).unwrap();
            let section = kept.encryption.clone().unwrap();
            let found = section.unwrap(&secret, kept.id, &kept.name).unwrap();
            kept.verify(Some(&found)).unwrap();
            assert_eq!(kept, encrypted(&secret));
        });
    }
}

#[test]
fn only_the_right_secret_unwraps_and_only_as_it_was_wrapped() {
    let manifest = encrypted(&passphrase("right"));
    let section = manifest.encryption.clone().unwrap();
    let open = |section: &Encryption, secret: &Secret, id| section.unwrap(secret, id, "disk-1");
    assert_eq!(open(&section, &passphrase("right"), manifest.id).unwrap(), keys());
    let wrong = open(&section, &passphrase("Right"), manifest.id).unwrap_err();
    assert!(wrong.to_string().contains("wrong passphrase"), "{wrong}");
    assert!(matches!(open(&section, &key_file(1), manifest.id), Err(LockError::Kind { .. })));
    assert!(matches!(open(&section, &passphrase("right"), VolumeId([0; 16])), Err(LockError::Wrong { .. })));
    // Nobody can make it cheaper to guess, nor change anything else.
    let bytes = section.encode();
    for bit in 0..bytes.len() * 8 {
        let mut bad = bytes.clone();
        bad[bit / 8] ^= 1 << (bit % 8);
        let Ok(bad) = Encryption::decode(&bad) else { continue };
        if let Kdf::Argon2id { memory_kib, passes, .. } = bad.kdf
            && u64::from(memory_kib) * u64::from(passes) < 1 << 15
        {
            assert!(open(&bad, &passphrase("right"), manifest.id).is_err(), "bit {bit}");
        }
    }
    let file = encrypted(&key_file(1)).encryption.unwrap();
    assert_eq!(open(&file, &key_file(1), manifest.id).unwrap(), keys());
    assert!(open(&file, &key_file(2), manifest.id).unwrap_err().to_string().contains("wrong key file"));
    assert!(open(&file, &passphrase("x"), manifest.id).unwrap_err().to_string().contains("locked by a key file"));
}

#[test]
fn the_default_derivation_works() {
    let section = Encryption::wrap(&keys(), &passphrase("a"), VolumeId([1; 16])).unwrap();
    assert_eq!(section.kdf, Kdf::Argon2id { memory_kib: 65536, passes: 3, lanes: 1 });
    let again = Encryption::wrap(&keys(), &passphrase("a"), VolumeId([1; 16])).unwrap();
    assert_ne!(section.salt, again.salt);
    assert_eq!(section.unwrap(&passphrase("a"), VolumeId([1; 16]), "x").unwrap(), keys());
}

#[tokio::test]
async fn an_encrypted_manifest_changes_only_with_its_key() {
    let store = TestStore::default();
    let made = encrypted(&key_file(1));
    create(&store, &made).await.unwrap();
    let unsigned = Manifest { seal: Seal::None, name: "other".into(), ..made.clone() };
    assert!(matches!(create(&store, &unsigned).await, Err(ManifestError::Unfit { .. })));

    for wrong in [None, Some(Keys::new(&[1; 32]))] {
        let error = open(&store, "disk-1", wrong.as_ref()).await.unwrap_err();
        assert!(matches!(error, ManifestError::Lock(LockError::Locked(_) | LockError::Forged(_))), "{error}");
    }
    assert_eq!(open(&store, "disk-1", Some(&keys())).await.unwrap().0, made);
    let grown = update(&store, "disk-1", 1, Some(&keys()), |manifest| manifest.size *= 2).await.unwrap();
    assert_eq!(open(&store, "disk-1", Some(&keys())).await.unwrap().0, grown);

    // Looked at without a key it can be copied, but not changed: neither by mistake nor by somebody else's program.
    let (mut looked, version) = load(&store, "disk-1").await.unwrap();
    assert_eq!(looked.encode(), grown.encode());
    looked.size /= 2;
    assert!(matches!(replace(&store, &looked, version.clone()).await, Err(ManifestError::Unfit { .. })));
    store.tamper(&key("disk-1"), Some(looked.encode()));
    assert!(matches!(open(&store, "disk-1", Some(&keys())).await, Err(ManifestError::Lock(LockError::Forged(_)))));
    // Nor replaced by one of a volume that is not encrypted.
    store.tamper(&key("disk-1"), Some(manifest().encode()));
    assert!(matches!(
        open(&store, "disk-1", Some(&keys())).await,
        Err(ManifestError::Lock(LockError::NotEncrypted(_)))
    ));
    // But whoever lost the key can delete it.
    store.tamper(&key("disk-1"), Some(grown.encode()));
    let (mut looked, version) = load(&store, "disk-1").await.unwrap();
    looked.state = VolumeState::Deleting;
    replace(&store, &looked, version).await.unwrap();
    assert_eq!(load(&store, "disk-1").await.unwrap().0.state, VolumeState::Deleting);
}
