//! The external data representation (RFC 4506): big-endian words, byte strings padded to whole words.

use super::status::{Nfs4Error, Status};

/// Reads what somebody else wrote. Every length is checked against a bound and against what is there.
#[derive(Clone, Debug)]
pub struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    /// Reads from the first of these bytes on.
    pub fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { rest: bytes }
    }

    /// What was not read yet.
    pub fn rest(&self) -> &'a [u8] {
        self.rest
    }

    fn take(&mut self, bytes: usize) -> Status<&'a [u8]> {
        let (taken, rest) = self.rest.split_at_checked(bytes).ok_or(Nfs4Error::BadXdr)?;
        self.rest = rest;
        Ok(taken)
    }

    /// Bytes of a fixed length, padded.
    pub fn fixed<const N: usize>(&mut self) -> Status<[u8; N]> {
        let taken = self.take(N.next_multiple_of(4))?;
        taken[..N].try_into().map_err(|_| Nfs4Error::BadXdr)
    }

    /// A word.
    pub fn u32(&mut self) -> Status<u32> {
        Ok(u32::from_be_bytes(self.fixed()?))
    }

    /// A double word.
    pub fn u64(&mut self) -> Status<u64> {
        Ok(u64::from_be_bytes(self.fixed()?))
    }

    /// A signed double word.
    pub fn i64(&mut self) -> Status<i64> {
        Ok(i64::from_be_bytes(self.fixed()?))
    }

    /// A truth value: 0 or 1.
    pub fn bool(&mut self) -> Status<bool> {
        match self.u32()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Nfs4Error::BadXdr),
        }
    }

    /// A byte string of at most `max` bytes.
    pub fn opaque(&mut self, max: usize) -> Status<&'a [u8]> {
        let len = self.u32()? as usize;
        if len > max {
            return Err(Nfs4Error::BadXdr);
        }
        Ok(&self.take(len.next_multiple_of(4))?[..len])
    }

    /// The number of elements of an array, at most `max`.
    pub fn count(&mut self, max: usize) -> Status<usize> {
        let count = self.u32()? as usize;
        if count > max { Err(Nfs4Error::BadXdr) } else { Ok(count) }
    }
}

/// Writes to a growing buffer.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Everything written.
    pub fn into_bytes(self) -> Vec<u8> {
        self.bytes
    }

    /// Everything written.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Takes back what was written after the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        self.bytes.truncate(len);
    }

    /// A word.
    pub fn u32(&mut self, value: u32) {
        self.bytes.extend_from_slice(&value.to_be_bytes());
    }

    /// A double word.
    pub fn u64(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_be_bytes());
    }

    /// A signed double word.
    pub fn i64(&mut self, value: i64) {
        self.bytes.extend_from_slice(&value.to_be_bytes());
    }

    /// A truth value.
    pub fn bool(&mut self, value: bool) {
        self.u32(u32::from(value));
    }

    /// Bytes of a fixed length, padded.
    pub fn fixed(&mut self, value: &[u8]) {
        self.bytes.extend_from_slice(value);
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    /// A byte string.
    pub fn opaque(&mut self, value: &[u8]) {
        self.u32(u32::try_from(value.len()).expect("byte strings are short"));
        self.fixed(value);
    }

    /// Words written before at `at` get a new value.
    pub fn patch(&mut self, at: usize, value: u32) {
        self.bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }

    /// Bytes that are XDR already.
    pub fn raw(&mut self, value: &[u8]) {
        self.bytes.extend_from_slice(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_is_read() {
        let mut w = Writer::default();
        w.u32(7);
        w.opaque(b"abcde");
        w.bool(true);
        w.i64(-3);
        assert_eq!(w.len(), 4 + 4 + 8 + 4 + 8);
        let mut r = Reader::new(w.as_bytes());
        assert_eq!(r.u32().unwrap(), 7);
        assert_eq!(r.opaque(5).unwrap(), b"abcde");
        assert!(r.bool().unwrap());
        assert_eq!(r.i64().unwrap(), -3);
        assert!(r.rest().is_empty());
    }

    #[test]
    fn lengths_are_bounded() {
        assert!(Reader::new(&[0xff; 16]).opaque(usize::MAX - 8).is_err());
        assert!(Reader::new(&[0, 0, 0, 5, 1, 2, 3, 4, 5]).opaque(5).is_err(), "padding is missing");
        assert!(Reader::new(&[0, 0, 0, 5, 1, 2, 3, 4, 5, 0, 0, 0]).opaque(4).is_err(), "too long");
        assert!(Reader::new(&[0, 0, 0, 2]).bool().is_err());
    }
}
