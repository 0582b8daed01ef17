//! Any bytes are a chunk's header or an error, and what a header says can be relied on.
#![no_main]

use blockd::chunk::{ChunkIndex, ChunkName, ExtentKind};
use blockd::types::VolumeId;
use blockd_fuzz::{put_checksum, u64_at};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    let name = ChunkName {
        volume: VolumeId(bytes.get(24..40).and_then(|b| b.try_into().ok()).unwrap_or_default()),
        epoch: u64_at(&bytes, 40).unwrap_or(0),
        seq: u64_at(&bytes, 48).unwrap_or(0),
    };
    let _ = ChunkIndex::decode(&bytes, &name);
    let Ok(len) = ChunkIndex::peek_len(&bytes) else { return };
    if let Some(header) = bytes.get_mut(..len) {
        put_checksum(header, 16, u64::from_le_bytes(*b"chunkhdr"));
    }
    let Ok(index) = ChunkIndex::decode(&bytes, &name) else { return };

    assert_eq!(index.name, name);
    let (mut end, mut payload) = (0, 0);
    for extent in &index.extents {
        assert!(extent.blocks > 0 && extent.lba >= end);
        end = extent.lba + extent.blocks;
        assert!(end <= 1 << 52);
        if let ExtentKind::Data { index } = extent.kind {
            assert_eq!(u64::from(index), payload);
            payload += extent.blocks;
        }
    }
    assert_eq!(payload, index.frames.raw_blocks());
    let (mut offset, mut block) = (len as u64, 0);
    for frame in index.frames.frames() {
        assert_eq!((frame.range().start, u64::from(frame.first_block)), (offset, block));
        offset = frame.range().end;
        block += u64::from(frame.blocks);
    }
    assert_eq!((offset, block), (index.object_len(), payload));
});
