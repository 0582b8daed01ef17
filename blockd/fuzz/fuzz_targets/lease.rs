//! Any bytes are a lease or an error; a lease is written back as it was read.
#![no_main]

use blockd::lease::Lease;
use blockd_fuzz::put_checksum;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let _ = Lease::decode(data);
    let mut bytes = data.to_vec();
    put_checksum(&mut bytes, 16, u64::from_le_bytes(*b"leaseobj"));
    if let Ok(lease) = Lease::decode(&bytes) {
        assert_eq!(Lease::decode(&lease.encode()), Ok(lease));
    }
});
