//! The file that a recording is kept in; read by the program that wrote it.

use std::io::{self, Read, Write};

use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// Something that was answered, in the order of the answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes were written.
    Write { offset: u64, data: Vec<u8> },
    /// A range reads as zeroes from now on.
    Zero { offset: u64, len: u64 },
    /// All before is durable.
    Flush,
    /// A line of text that was sent between the others.
    Mark(String),
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Header {
    kind: U32,
    /// Bytes that follow the header.
    payload: U32,
    offset: U64,
    len: U64,
}
const _: () = assert!(size_of::<Header>() == 24);

const WRITE: u32 = 1;
const ZERO: u32 = 2;
const FLUSH: u32 = 3;
const MARK: u32 = 4;

/// Appends an event.
///
/// # Errors
/// Writing failed.
pub fn put(out: &mut impl Write, event: &Event) -> io::Result<()> {
    let (kind, offset, len, payload): (_, _, _, &[u8]) = match event {
        Event::Write { offset, data } => (WRITE, *offset, data.len() as u64, data),
        Event::Zero { offset, len } => (ZERO, *offset, *len, &[]),
        Event::Flush => (FLUSH, 0, 0, &[]),
        Event::Mark(text) => (MARK, 0, 0, text.as_bytes()),
    };
    let payload_len = u32::try_from(payload.len()).map_err(io::Error::other)?;
    let header = Header { kind: kind.into(), payload: payload_len.into(), offset: offset.into(), len: len.into() };
    out.write_all(header.as_bytes())?;
    out.write_all(payload)
}

/// The next event; `None` at the end.
///
/// # Errors
/// Reading failed, or the file is no recording.
pub fn take(input: &mut impl Read) -> io::Result<Option<Event>> {
    let mut bytes = [0; size_of::<Header>()];
    match input.read_exact(&mut bytes) {
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    let header = Header::read_from_bytes(&bytes).expect("it is as long as that");
    let mut payload = vec![0; header.payload.get() as usize];
    input.read_exact(&mut payload)?;
    let (offset, len) = (header.offset.get(), header.len.get());
    Ok(Some(match header.kind.get() {
        WRITE => Event::Write { offset, data: payload },
        ZERO => Event::Zero { offset, len },
        FLUSH => Event::Flush,
        MARK => Event::Mark(String::from_utf8(payload).map_err(io::Error::other)?),
        kind => return Err(io::Error::other(format!("no recording: an event of kind {kind}"))),
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recording_reads_as_it_was_written() {
        let events = [
            Event::Write { offset: 4096, data: vec![7; 512] },
            Event::Zero { offset: 0, len: 1 << 40 },
            Event::Flush,
            Event::Mark("a b".into()),
        ];
        let mut file = Vec::new();
        events.iter().for_each(|event| put(&mut file, event).unwrap());
        let mut input = file.as_slice();
        for event in events {
            assert_eq!(take(&mut input).unwrap(), Some(event));
        }
        assert_eq!(take(&mut input).unwrap(), None);
    }
}
