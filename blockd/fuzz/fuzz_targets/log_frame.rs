//! Any bytes are a segment header or a frame header, or neither; what they are is written back as it was read.
#![no_main]

use blockd::types::BLOCK;
use blockd::wal::format::{FrameHeader, SegmentHeader};
use blockd_fuzz::{put_checksum, u64_at};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let mut bytes = data.to_vec();
    bytes.resize(data.len().clamp(1, 16 * BLOCK).next_multiple_of(BLOCK), 0);
    segment_header(&bytes);
    put_checksum(&mut bytes[..BLOCK], 88, 0);
    segment_header(&bytes);

    // Of a frame the reader knows generation and place beforehand.
    let generation = u64_at(&bytes, 8).unwrap_or(0);
    let offset = u64_at(&bytes, 16).unwrap_or(0);
    frame_header(&bytes, generation, offset);
    if let Ok(blocks) = FrameHeader::claimed_blocks(&bytes, generation, offset)
        && let Some(header) = bytes.get_mut(..blocks * BLOCK)
    {
        put_checksum(header, 64, generation);
        frame_header(header, generation, offset);
        assert!(FrameHeader::decode(header, generation ^ 1, offset).is_err());
        assert!(FrameHeader::decode(header, generation, offset ^ BLOCK as u64).is_err());
    }
});

fn segment_header(bytes: &[u8]) {
    if let Ok(header) = SegmentHeader::decode(&bytes[..BLOCK]) {
        let mut again = vec![0xff; BLOCK];
        header.encode(&mut again);
        assert_eq!(SegmentHeader::decode(&again), Ok(header));
    }
}

fn frame_header(bytes: &[u8], generation: u64, offset: u64) {
    if let Ok(header) = FrameHeader::decode(bytes, generation, offset) {
        assert_eq!(header.header_blocks() * BLOCK, bytes.len());
        assert_eq!(header.last_lsn() + 1, header.first_lsn + header.records.len() as u64);
        let mut again = vec![0xff; bytes.len()];
        header.encode(&mut again);
        assert_eq!(FrameHeader::decode(&again, generation, offset), Ok(header));
    }
}
