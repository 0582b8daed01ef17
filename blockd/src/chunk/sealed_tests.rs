//! Encrypted chunks against damage, forgery, and the wrong key.

use bytes::Bytes;
use proptest::prelude::*;

use super::testing::golden;
use super::tests::{GOLDEN_PLAN, World, blocks, draft, name, pieces, runtime};
use super::*;
use crate::buf::{AlignedBuf, Slice};
use crate::crypt::Keys;
use crate::types::BLOCK;

fn keys() -> Keys {
    Keys::new(&[42; 32])
}

/// Blocks that shrink to little, so that every bit can be tried.
fn small(count: usize, seed: u64) -> Slice {
    let mut data = blocks(count, seed).to_vec();
    for block in data.chunks_mut(BLOCK) {
        block[20..].fill(seed as u8);
    }
    AlignedBuf::copy_of(&data).into()
}

#[test]
fn the_golden_chunk_reads_and_is_written_the_same() {
    let pieces = pieces(&GOLDEN_PLAN);
    let chunk = draft(1, Codec::None, pieces.clone()).encode(Some(&keys())).unwrap();
    golden("chunk-v1-encrypted.bin", &chunk.bytes, true, |kept| {
        runtime().block_on(async {
            let world = World::with_keys(0, None, Some(keys()));
            world.store.tamper(&name(1).key(), Some(Bytes::copy_from_slice(kept)));
            let index = read_index(&*world.store, &name(1), Some(&keys())).await.unwrap();
            assert_eq!(index.object_len(), kept.len() as u64);
            world.table.apply(&index).unwrap();
            for piece in &pieces {
                let Piece::Data { lba, data } = piece else { continue };
                let mut out = vec![1; data.len()];
                world.reader.read(*lba, &mut out).await.unwrap();
                assert!(out == data[..], "block {lba}");
            }
        });
    });
    golden("seal-v1-encrypted.bin", &encode_seal(name(9), 5, Some(&keys())), true, |kept| {
        let seal = sealed::decode(kept, &name(9), Some(&keys())).unwrap();
        assert_eq!((seal.kind, seal.created_ms), (ChunkKind::Seal, 5));
    });
}

#[tokio::test]
async fn every_flipped_bit_and_every_cut_is_noticed() {
    for (codec, count) in [(Codec::None, 1), (Codec::Lz4, 20), (Codec::Zstd(1), 20)] {
        let mut world = World::with_keys(40, None, Some(keys()));
        let chunk = world.put(codec, vec![Piece::Data { lba: 2, data: small(count, 8) }]).await;
        world.check(0, 40).await;
        let key = name(1).key();
        let mut out = vec![0; count * BLOCK];
        let header = chunk.index.frames.payload_start() as usize * 8;
        let step = if codec == Codec::None { 13 } else { 1 };
        for bit in (0..header).chain((header..chunk.bytes.len() * 8).step_by(step)) {
            let mut bad = chunk.bytes.to_vec();
            bad[bit / 8] ^= 1 << (bit % 8);
            world.store.tamper(&key, Some(bad.into()));
            if bit < header {
                let error = read_index(&*world.store, &name(1), Some(&keys())).await.unwrap_err();
                assert!(matches!(error, ReadError::Header { .. }), "bit {bit}: {error}");
            } else {
                let error = world.reader.read(2, &mut out).await.unwrap_err();
                assert!(matches!(error, ReadError::Corrupt { .. }), "bit {bit}: {error}");
            }
        }
        for len in (0..chunk.bytes.len()).step_by(step) {
            world.store.tamper(&key, Some(chunk.bytes.slice(..len)));
            let index = read_index(&*world.store, &name(1), Some(&keys())).await;
            assert_eq!(index.is_ok(), len * 8 >= header, "{len} bytes");
            let error = world.reader.read(2, &mut out).await.unwrap_err();
            assert!(matches!(error, ReadError::Truncated { .. }), "{len} bytes: {error}");
        }
    }
}

/// Somebody who can compute checksums, as anybody can, still cannot make a frame.
#[tokio::test]
async fn a_forged_frame_with_a_right_checksum_is_noticed() {
    for codec in [Codec::None, Codec::Lz4] {
        let mut world = World::with_keys(40, None, Some(keys()));
        let chunk = world.put(codec, vec![Piece::Data { lba: 0, data: small(32, 3) }]).await;
        let (one, two) = (chunk.index.frames.frames()[0], chunk.index.frames.frames()[1]);
        let stored = |frame: &Frame| chunk.bytes[frame.range().start as usize..frame.range().end as usize].to_vec();
        let mut flipped = stored(&one);
        flipped[7] ^= 1;
        // A local table is not encrypted, so that its rows can say whatever the forger likes.
        let forge = |bytes: &[u8], change: fn(&mut FrameDirectory, u64)| {
            let mut frames = FrameDirectory::new(chunk.index.frames.payload_start() as u32);
            let sum = name(1).frame_sum(0, bytes);
            frames.push_sealed(bytes.len() as u32, one.blocks, one.encoding, one.cipher, sum);
            change(&mut frames, sum);
            frames
        };
        let mut out = vec![0; BLOCK];
        for bytes in [flipped, stored(&two)] {
            let world = World::with_keys(40, None, Some(keys()));
            let frames = forge(&bytes, |_, _| {});
            let extents = vec![ChunkExtent { lba: 0, blocks: 16, kind: ExtentKind::Data { index: 0 } }];
            world.table.apply(&ChunkIndex { extents, frames, ..chunk.index.clone() }).unwrap();
            let mut object = chunk.bytes[..one.range().start as usize].to_vec();
            object.extend_from_slice(&bytes);
            world.store.tamper(&name(1).key(), Some(object.into()));
            let error = world.reader.read(0, &mut out).await.unwrap_err();
            assert!(matches!(error, ReadError::Corrupt { frame: 0, .. }), "{error}");
        }
    }
}

#[tokio::test]
async fn swapped_frames_and_chunks_are_noticed() {
    let mut world = World::with_keys(100, None, Some(keys()));
    let data = |seed| vec![Piece::Data { lba: 0, data: blocks(32, seed) }];
    let first = world.put(Codec::None, data(1)).await;
    let second = world.put(Codec::None, data(2)).await;
    world.store.tamper(&name(2).key(), Some(first.bytes.clone()));
    let found = read_index(&*world.store, &name(2), Some(&keys())).await;
    assert!(matches!(found, Err(ReadError::Header { source: FormatError::Forged, .. })), "{found:?}");
    let mut out = vec![0; BLOCK];
    assert!(matches!(world.reader.read(0, &mut out).await, Err(ReadError::Corrupt { frame: 0, .. })));
    let (a, b) = (second.index.frames.frames()[0].range(), second.index.frames.frames()[1].range());
    let mut bytes = second.bytes[..a.start as usize].to_vec();
    bytes.extend_from_slice(&second.bytes[b.start as usize..b.end as usize]);
    bytes.extend_from_slice(&second.bytes[a.start as usize..a.end as usize]);
    world.store.tamper(&name(2).key(), Some(bytes.into()));
    assert!(matches!(world.reader.read(17, &mut out).await, Err(ReadError::Corrupt { frame: 1, .. })));
}

#[tokio::test]
async fn only_the_key_opens_it_and_nothing_clear_is_believed() {
    let mut world = World::with_keys(100, None, Some(keys()));
    let pattern = b"known plaintext, known plaintext";
    let mut data = AlignedBuf::zeroed(32 * BLOCK);
    data.chunks_mut(pattern.len()).for_each(|part| part.copy_from_slice(pattern));
    let pieces = vec![Piece::Data { lba: 0x1234_5678_9abc, data: data.into() }];
    let chunk = world.put(Codec::None, vec![Piece::Zero { lba: 0, blocks: 9, allocated: true }]).await;
    let secret = draft(1, Codec::None, pieces.clone()).encode(Some(&keys())).unwrap();
    let has = |what: &[u8]| secret.bytes.windows(what.len()).any(|part| part == what);
    assert!(!has(&pattern[..8]) && !has(&0x1234_5678_9abc_u64.to_le_bytes()[..6]));
    let other = Keys::new(&[43; 32]);
    let fails = |found: Result<ChunkIndex, FormatError>, expected: FormatError| assert_eq!(found, Err(expected));
    fails(sealed::decode(&chunk.bytes, &name(1), Some(&other)), FormatError::Forged);
    fails(sealed::decode(&chunk.bytes, &name(1), None), FormatError::Encrypted);
    fails(ChunkIndex::decode(&chunk.bytes, &name(1)), FormatError::Magic);
    let clear = draft(1, Codec::None, pieces).encode(None).unwrap();
    fails(sealed::decode(&clear.bytes, &name(1), Some(&keys())), FormatError::Clear);

    // Frames: with a wrong key, without one, and in the clear where there is one.
    let (mut sealed, mut open) = (World::with_keys(100, None, Some(keys())), World::with_keys(100, None, None));
    let data = || vec![Piece::Data { lba: 0, data: blocks(16, 1) }];
    let chunks = (sealed.put(Codec::Lz4, data()).await, open.put(Codec::Lz4, data()).await);
    for (chunk, keys) in [(&chunks.0, Some(other)), (&chunks.0, None), (&chunks.1, Some(keys()))] {
        let world = World::with_keys(100, None, keys);
        world.store.tamper(&name(1).key(), Some(chunk.bytes.clone()));
        world.table.apply(&chunk.index).unwrap();
        let mut out = vec![0; BLOCK];
        assert!(matches!(world.reader.read(0, &mut out).await, Err(ReadError::Corrupt { .. })));
    }
}

proptest! {
    #[test]
    fn decoding_headers_is_total(bytes in prop::collection::vec(any::<u8>(), 0..300), len in 0u32..400) {
        let seal = encode_seal(name(1), 0, Some(&keys()));
        for prefix in [0, 10, 12, 16, 32, 64] {
            let mut input = seal[..prefix].to_vec();
            input.extend_from_slice(&bytes);
            if input.len() >= 16 {
                input[12..16].copy_from_slice(&len.to_le_bytes());
            }
            prop_assert!(sealed::decode(&input, &name(1), Some(&keys())).is_err());
        }
    }
}

#[test]
fn headers_of_one_name_do_not_share_a_nonce() {
    let nonce = |bytes: &[u8]| bytes[16..28].to_vec();
    let (a, b) = (encode_seal(name(1), 1, Some(&keys())), encode_seal(name(1), 2, Some(&keys())));
    assert_ne!(nonce(&a), nonce(&b));
    assert_eq!(a, encode_seal(name(1), 1, Some(&keys())), "what is put again is the same");
}
