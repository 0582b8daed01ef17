//! State identifiers: the name of an open or of the locks of one owner on one file (RFC 8881 section 8.2).

use super::super::status::Status;
use super::super::xdr::{Reader, Writer};

/// What names a state as long as it exists: boot number, then a counter. Never used again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Other(pub [u8; 12]);

impl Other {
    /// The `number`th state since the start `boot`.
    pub fn new(boot: u32, number: u64) -> Other {
        let mut other = [0; 12];
        other[..4].copy_from_slice(&boot.to_be_bytes());
        other[4..].copy_from_slice(&number.to_be_bytes());
        Other(other)
    }
}

/// A state and how often it was changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stateid {
    /// Counts changes from 1; from a client, 0 is "as it is now".
    pub seqid: u32,
    /// Which state.
    pub other: Other,
}

/// All bits clear: no state, share reservations count.
pub const ANONYMOUS: Stateid = Stateid { seqid: 0, other: Other([0; 12]) };
/// All bits set: no state, reads pass share reservations.
pub const BYPASS: Stateid = Stateid { seqid: u32::MAX, other: Other([0xff; 12]) };
/// "The state that an earlier operation of the compound returned" (section 16.2.3.1.2).
pub const CURRENT: Stateid = Stateid { seqid: 1, other: Other([0; 12]) };
/// Never valid.
pub const INVALID: Stateid = Stateid { seqid: u32::MAX, other: Other([0; 12]) };

impl Stateid {
    /// Reads one.
    pub fn read(r: &mut Reader<'_>) -> Status<Stateid> {
        Ok(Stateid { seqid: r.u32()?, other: Other(r.fixed()?) })
    }

    /// Writes it.
    pub fn write(&self, w: &mut Writer) {
        w.u32(self.seqid);
        w.fixed(&self.other.0);
    }

    /// Whether it has a special meaning.
    pub fn is_special(&self) -> bool {
        self.other == ANONYMOUS.other || self.other == BYPASS.other
    }
}
