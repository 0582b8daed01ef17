//! File handles: which file of which filesystem, and a proof that this server made them.
//!
//! Numbers of files are never used again, so a handle needs no generation. Anybody on the network can send a handle, and
//! with it pass by the permissions of the directories above the file; so a handle ends with a keyed hash, and what was not made here is
//! refused. The key outlives restarts and is the same on all hosts of a filesystem.

use std::hash::Hasher;

use super::status::{Nfs4Error, Status};
use super::xdr::{Reader, Writer};
use crate::vfs::Ino;

/// Bytes of a handle: version, filesystem, number, hash.
pub const HANDLE_BYTES: usize = 28;
/// Most bytes a handle of any server has (RFC 8881 section 3.1).
pub const HANDLE_BYTES_MAX: usize = 128;

const VERSION: u32 = 1;

/// Makes and checks handles.
#[derive(Clone)]
pub struct Handles {
    key: [u8; 16],
    fs: u64,
}

impl Handles {
    /// For the filesystem with this identity, with a secret key.
    pub fn new(key: [u8; 16], fs_id: [u8; 16]) -> Handles {
        Handles { key, fs: xxhash_rust::xxh3::xxh3_64(&fs_id) }
    }

    /// The filesystem, as clients see it.
    pub fn fs(&self) -> u64 {
        self.fs
    }

    /// The handle of a file.
    pub fn make(&self, ino: Ino) -> [u8; HANDLE_BYTES] {
        let mut handle = [0; HANDLE_BYTES];
        handle[..4].copy_from_slice(&VERSION.to_be_bytes());
        handle[4..12].copy_from_slice(&self.fs.to_be_bytes());
        handle[12..20].copy_from_slice(&ino.0.to_be_bytes());
        let hash = siphash(&self.key, &handle[..20]);
        handle[20..].copy_from_slice(&hash.to_be_bytes());
        handle
    }

    /// The file of a handle.
    ///
    /// # Errors
    /// `BadHandle` if it was not made here, `Stale` if it is one of another filesystem.
    pub fn open(&self, handle: &[u8]) -> Status<Ino> {
        let handle: &[u8; HANDLE_BYTES] = handle.try_into().map_err(|_| Nfs4Error::BadHandle)?;
        let mut r = Reader::new(handle);
        let (version, fs, ino, hash) = (r.u32()?, r.u64()?, r.u64()?, r.u64()?);
        if version != VERSION || siphash(&self.key, &handle[..20]) != hash {
            return Err(Nfs4Error::BadHandle);
        }
        if fs != self.fs {
            return Err(Nfs4Error::Stale);
        }
        Ok(Ino(ino))
    }

    /// Writes the handle of a file.
    pub fn write(&self, w: &mut Writer, ino: Ino) {
        w.opaque(&self.make(ino));
    }
}

/// SipHash-2-4 of the bytes.
fn siphash(key: &[u8; 16], bytes: &[u8]) -> u64 {
    #[allow(deprecated)]
    let mut hasher = {
        let half = |at: usize| u64::from_le_bytes(key[at..at + 8].try_into().expect("eight bytes"));
        std::hash::SipHasher::new_with_keys(half(0), half(8))
    };
    hasher.write(bytes);
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forged_and_foreign_handles_are_refused() {
        let handles = Handles::new([1; 16], [2; 16]);
        let good = handles.make(Ino(77));
        assert_eq!(handles.open(&good), Ok(Ino(77)));
        for at in 0..good.len() {
            let mut bad = good;
            bad[at] ^= 1;
            assert_eq!(handles.open(&bad), Err(Nfs4Error::BadHandle), "byte {at}");
        }
        assert_eq!(handles.open(&good[..27]), Err(Nfs4Error::BadHandle));
        assert_eq!(handles.open(&[]), Err(Nfs4Error::BadHandle));
        assert_eq!(Handles::new([1; 16], [3; 16]).open(&good), Err(Nfs4Error::Stale));
        assert_eq!(Handles::new([9; 16], [2; 16]).open(&good), Err(Nfs4Error::BadHandle));
    }

    #[test]
    fn the_hash_is_siphash_2_4() {
        // The test vector of the paper: key 00..0f, message 00..0e.
        let key = std::array::from_fn(|at| at as u8);
        let message: Vec<u8> = (0..15).collect();
        assert_eq!(siphash(&key, &message), 0xa129_ca61_49be_45e5);
    }
}
