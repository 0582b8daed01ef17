//! Any bytes are a manifest or an error; a manifest is written back as it was read.
#![no_main]

use blockd::manifest::Manifest;
use blockd_fuzz::put_checksum;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = Manifest::decode(data);
    let mut bytes = data.to_vec();
    put_checksum(&mut bytes, 16, u64::from_le_bytes(*b"manifest"));
    if let Ok(manifest) = Manifest::decode(&bytes) {
        assert_eq!(Manifest::decode(&manifest.encode()), Ok(manifest));
    }
});
