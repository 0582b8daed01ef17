//! Any bytes are a checkpoint object or an error; one is written back as it was read.
#![no_main]

use blockd::checkpoint::{Checkpoint, CheckpointName};
use blockd::types::VolumeId;
use blockd_fuzz::{put_checksum, u64_at};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // The name it claims to have: another one ends the parsing early.
    let volume = data.get(32..48).and_then(|id| id.try_into().ok()).unwrap_or([0; 16]);
    let (epoch, number) = (u64_at(data, 48).unwrap_or(0), u64_at(data, 56).unwrap_or(0));
    let name = CheckpointName { volume: VolumeId(volume), epoch, number };
    let _ = Checkpoint::decode(data, &name);
    let mut bytes = data.to_vec();
    if bytes.len() >= 24 {
        let len = bytes.len() as u64;
        bytes[16..24].copy_from_slice(&len.to_le_bytes());
    }
    put_checksum(&mut bytes, 24, u64::from_le_bytes(*b"chckpnt1"));
    if let Ok(checkpoint) = Checkpoint::decode(&bytes, &name) {
        assert_eq!(Checkpoint::decode(&checkpoint.encode(), &name), Ok(checkpoint));
    }
});
