//! The external data representation (RFC 4506): big-endian words, byte strings padded to whole words.

use bytes::Bytes;

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

/// Byte strings from this length on are attached, not copied.
const ATTACHED_MIN: usize = 4 << 10;

/// Writes to a growing buffer. One long byte string can be attached, which is not copied there.
#[derive(Clone, Debug, Default)]
pub struct Writer {
    bytes: Vec<u8>,
    /// Data that belongs before the byte at this place of the buffer.
    attached: Option<(usize, Bytes)>,
}

impl Writer {
    /// Bytes written so far.
    pub fn len(&self) -> usize {
        self.bytes.len() + self.attached.as_ref().map_or(0, |(_, data)| data.len())
    }

    /// Whether nothing was written.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Everything written.
    pub fn into_bytes(mut self) -> Vec<u8> {
        self.join();
        self.bytes
    }

    /// Everything written.
    ///
    /// # Panics
    /// If something is attached; see [`Self::join`].
    pub fn as_bytes(&self) -> &[u8] {
        assert!(self.attached.is_none(), "in several parts");
        &self.bytes
    }

    /// Everything written, part after part.
    pub fn parts(&self) -> [&[u8]; 3] {
        match &self.attached {
            None => [&self.bytes, &[], &[]],
            Some((at, data)) => [&self.bytes[..*at], data, &self.bytes[*at..]],
        }
    }

    /// Copies what is attached to its place.
    pub fn join(&mut self) {
        if let Some((at, data)) = self.attached.take() {
            self.bytes.splice(at..at, data.iter().copied());
        }
    }

    /// Takes back what was written after the first `len` bytes.
    pub fn truncate(&mut self, len: usize) {
        match &self.attached {
            Some((at, data)) if len >= at + data.len() => self.bytes.truncate(len - data.len()),
            _ => {
                // What is cut in two has no place of its own.
                if self.attached.as_ref().is_some_and(|(at, _)| len > *at) {
                    self.join();
                }
                self.attached = None;
                self.bytes.truncate(len);
            }
        }
    }

    /// A byte string that need not be copied.
    pub fn data(&mut self, value: Bytes) {
        if value.len() < ATTACHED_MIN || self.attached.is_some() {
            return self.opaque(&value);
        }
        self.u32(u32::try_from(value.len()).expect("byte strings are short"));
        let padding = value.len().next_multiple_of(4) - value.len();
        self.attached = Some((self.bytes.len(), value));
        self.bytes.resize(self.bytes.len() + padding, 0);
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
        let padding = value.len().next_multiple_of(4) - value.len();
        self.bytes.resize(self.bytes.len() + padding, 0);
    }

    /// A byte string.
    pub fn opaque(&mut self, value: &[u8]) {
        self.u32(u32::try_from(value.len()).expect("byte strings are short"));
        self.fixed(value);
    }

    /// A word written before at `at` gets a new value.
    pub fn patch(&mut self, at: usize, value: u32) {
        let at = match &self.attached {
            Some((place, data)) if at >= *place => at - data.len(),
            _ => at,
        };
        self.bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
    }

    /// What another has written.
    pub fn append(&mut self, mut other: Writer) {
        if self.attached.is_some() {
            other.join();
        }
        if let Some((at, data)) = other.attached {
            self.attached = Some((self.bytes.len() + at, data));
        }
        self.bytes.extend_from_slice(&other.bytes);
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
    fn what_is_attached_reads_as_if_it_were_copied() {
        for len in [ATTACHED_MIN - 1, ATTACHED_MIN, ATTACHED_MIN + 1, 3 * ATTACHED_MIN + 3] {
            let data = Bytes::from((0..len).map(|i| i as u8).collect::<Vec<_>>());
            let (mut copied, mut attached) = (Writer::default(), Writer::default());
            for w in [&mut copied, &mut attached] {
                w.u32(0);
                w.opaque(b"head");
            }
            copied.opaque(&data);
            attached.data(data.clone());
            for w in [&mut copied, &mut attached] {
                w.fixed(&[1, 2, 3]);
                let at = w.len();
                w.u32(5);
                w.opaque(&data);
                w.patch(0, 7);
                w.patch(at, 8);
            }
            assert_eq!(attached.len(), copied.len());
            assert_eq!(attached.parts().concat(), copied.as_bytes());
            for cut in [0, 2, 12, 15, 16, 17, 16 + len, 16 + len + 8, copied.len() - 1, copied.len()] {
                let (mut attached, mut copied) = (attached.clone(), copied.clone());
                attached.truncate(cut);
                copied.truncate(cut);
                assert_eq!(attached.len(), cut);
                assert_eq!(attached.into_bytes(), copied.into_bytes());
            }
            let mut appended = Writer::default();
            appended.u32(9);
            appended.append(attached.clone());
            appended.append(attached.clone());
            assert_eq!(appended.into_bytes(), [&9u32.to_be_bytes(), copied.as_bytes(), copied.as_bytes()].concat());
            attached.join();
            assert_eq!(attached.as_bytes(), copied.as_bytes());
        }
    }

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
