//! A log whose segments hold anything at all is recovered or refused, and what is recovered is an unbroken history.
//!
//! The input is a list of commands that write headers, frames and rubbish, with true checksums where they should have
//! some, into segments of a small log in memory.
#![no_main]

use std::io;
use std::os::fd::RawFd;

use blockd::buf::AlignedBuf;
use blockd::types::{BLOCK, BLOCK_SIZE, VolumeId};
use blockd::wal::device::LogDevice;
use blockd::wal::format::{ChainLink, FrameHeader, Record, RecordKind, SegmentHeader, block_sum};
use blockd::wal::scan::scan;
use libfuzzer_sys::fuzz_target;

const SEGMENTS: usize = 4;
const BLOCKS: usize = 16;
const VOLUME: VolumeId = VolumeId([7; 16]);

#[derive(Debug)]
struct Memory(Vec<Vec<u8>>);

impl LogDevice for Memory {
    fn segment_bytes(&self) -> u64 {
        (BLOCKS * BLOCK) as u64
    }
    fn segments(&self) -> Vec<u32> {
        (0..SEGMENTS as u32).collect()
    }
    fn create(&self, _: u32) -> io::Result<()> {
        unreachable!("a scan changes nothing")
    }
    fn read(&self, segment: u32, offset: u64, buf: &mut AlignedBuf) -> io::Result<()> {
        let len = buf.len();
        buf.copy_from_slice(&self.0[segment as usize][offset as usize..][..len]);
        Ok(())
    }
    fn write(&self, _: u32, _: u64, _: &AlignedBuf) -> io::Result<()> {
        unreachable!("a scan changes nothing")
    }
    fn sync(&self, _: u32) -> io::Result<()> {
        unreachable!("a scan changes nothing")
    }
    fn fd(&self, _: u32) -> Option<RawFd> {
        None
    }
    fn describe(&self, segment: u32) -> String {
        segment.to_string()
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&destaged, commands)) = data.split_first() else { return };
    let mut log = Memory(vec![vec![0; BLOCKS * BLOCK]; SEGMENTS]);
    for command in commands.chunks_exact(8) {
        carry_out(&mut log, command.try_into().expect("chunks of eight"));
    }
    let destaged = u64::from(destaged % 32);
    let Ok(found) = scan(&log, VOLUME, destaged) else { return };

    let mut next = None;
    for frame in &found.frames {
        assert!(next.is_none_or(|lsn| lsn == frame.header.first_lsn), "frames follow each other");
        assert!(frame.header.last_lsn() > destaged);
        next = Some(frame.header.last_lsn() + 1);
        assert!(found.needed.iter().any(|n| n.segment == frame.segment));
        let payload = &log.0[frame.segment as usize][frame.payload_offset as usize..];
        for (block, sum) in payload.chunks_exact(BLOCK).zip(&frame.header.sums) {
            assert_eq!(block_sum(block), *sum);
        }
    }
    if let Some(first) = found.frames.first() {
        assert!(first.header.first_lsn <= destaged + 1, "nothing is missing between bucket and log");
    }
    assert!(found.last_lsn >= destaged && next.is_none_or(|lsn| found.last_lsn + 1 == lsn));
    let mut all: Vec<u32> = found.needed.iter().map(|n| n.segment).chain(found.free.iter().copied()).collect();
    all.sort_unstable();
    assert_eq!(all, log.segments(), "each segment is needed or free");
});

/// `[what and segment, block, generation, epoch, first LSN, durable LSN, a, b]`
fn carry_out(log: &mut Memory, command: [u8; 8]) {
    let [what, block, generation, epoch, first_lsn, durable_lsn, a, b] = command;
    let number = usize::from(what >> 2) % SEGMENTS;
    let segment = &mut log.0[number];
    let at = usize::from(block) % BLOCKS * BLOCK;
    let generation = u64::from(generation % 16);
    match what % 4 {
        0 => {
            let header = SegmentHeader {
                segment: number as u32,
                volume: VOLUME,
                generation,
                anchor: u64::from(a % 16),
                epoch: epoch.into(),
                first_lsn: first_lsn.into(),
                durable_lsn: durable_lsn.into(),
                prev_end: u64::from(b % 18) * BLOCK_SIZE,
                segment_bytes: (BLOCKS * BLOCK) as u64,
                chain: (0..usize::from(block % 4))
                    .map(|i| ChainLink {
                        generation: (generation.saturating_sub(i as u64 + 1)).into(),
                        end: (u64::from(b.rotate_left(i as u32) % 18) * BLOCK_SIZE).into(),
                    })
                    .collect(),
            };
            header.encode(&mut segment[..BLOCK]);
        }
        1 | 2 => {
            let payload = usize::from(a % 4);
            let trims = usize::from(b % 4);
            let data = Record { lba: 5, blocks: payload as u64, kind: RecordKind::Data { at: 0 } };
            let trim = Record { lba: 9, blocks: 3, kind: RecordKind::Zero { allocated: b & 4 != 0 } };
            let mut records = vec![trim; trims];
            records.extend((payload > 0).then_some(data));
            let Some(blocks) = segment.get_mut(at + BLOCK..at + (1 + payload) * BLOCK) else { return };
            blocks.fill(b);
            let header = FrameHeader {
                generation,
                offset: at as u64,
                epoch: epoch.into(),
                first_lsn: u64::from(first_lsn).max(1),
                durable_lsn: durable_lsn.into(),
                time_ms: 0,
                records,
                sums: blocks.chunks_exact(BLOCK).map(block_sum).collect(),
            };
            header.encode(&mut segment[at..at + BLOCK]);
        }
        _ => segment[at + usize::from(a) * 16] ^= b,
    }
}
