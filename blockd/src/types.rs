//! The vocabulary every layer shares.

use std::fmt;

/// The unit of mapping, in bytes. Sub-block writes are read-modify-write inside the engine.
pub const BLOCK_SIZE: u64 = 4096;
/// [`BLOCK_SIZE`] for indexing memory.
pub const BLOCK: usize = 4096;

/// Log sequence number: one per accepted write, trim or zero, in order, never reused. 0 means "none".
pub type Lsn = u64;
/// A block address: byte offset divided by [`BLOCK_SIZE`].
pub type Lba = u64;

/// A volume's permanent identity; names may change, this does not.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct VolumeId(pub [u8; 16]);

impl VolumeId {
    /// A fresh random identity.
    pub fn random() -> Self {
        Self(*uuid::Uuid::new_v4().as_bytes())
    }
}

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        uuid::Uuid::from_bytes(self.0).simple().fmt(f)
    }
}

impl fmt::Debug for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
