//! Writing replies of the transmission phase into an output buffer.

use zerocopy::IntoBytes;
use zerocopy::byteorder::big_endian::U32;

use super::proto::{
    BlockDescriptor, ChunkError, ChunkHeader, ChunkHole, ChunkOffset, Request, SimpleReply, allocation, chunk, command,
    command_flag, errno,
};
use crate::outgoing::Outgoing;
use crate::types::BLOCK_SIZE;
use crate::volume::{Allocation, ExtentStatus, IoError};

/// The kind of replies negotiated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Style {
    /// Simple replies to everything.
    Simple,
    /// Structured replies to READ and BLOCK_STATUS and for errors, simple ones otherwise.
    Structured,
}

impl Style {
    pub fn of(structured: bool) -> Self {
        if structured { Self::Structured } else { Self::Simple }
    }
}

/// Success without data.
pub(super) fn done(out: &mut Outgoing, request: &Request) {
    out.extend_from_slice(SimpleReply::new(0, request.cookie.get()).as_bytes());
}

/// Everything of a successful READ before its data, when that goes out as one piece of `len` bytes.
pub(super) fn data_header(out: &mut Outgoing, style: Style, request: &Request, len: u32) {
    match style {
        Style::Simple => done(out, request),
        Style::Structured => put_data_chunk(out, request, true, request.offset.get(), len),
    }
}

/// Whether a READ may be answered in several chunks.
pub(super) fn splits(style: Style, request: &Request) -> bool {
    style == Style::Structured && !request.has(command_flag::DF)
}

/// A successful READ. `holes` are ranges (offset in `bytes`, length) that need not be sent.
pub(super) fn data(out: &mut Outgoing, style: Style, request: &Request, bytes: Outgoing, holes: &[(usize, usize)]) {
    if style == Style::Structured && bytes.is_empty() {
        let header = ChunkHeader::new(chunk::NONE, true, request.cookie.get(), 0);
        out.extend_from_slice(header.as_bytes());
        return;
    }
    if holes.is_empty() || !splits(style, request) {
        data_header(out, style, request, bytes.len() as u32);
        out.append(bytes);
        return;
    }
    let bytes = bytes.into_bytes();
    let mut at = 0;
    // A last, empty hole makes the loop send the data behind the real ones.
    for &(hole, len) in holes.iter().chain([&(bytes.len(), 0)]) {
        let end = hole + len;
        assert!(at <= hole && end <= bytes.len(), "holes in order within the data");
        if hole > at {
            let offset = request.offset.get() + at as u64;
            put_data_chunk(out, request, hole == bytes.len(), offset, (hole - at) as u32);
            out.push(bytes.slice(at..hole));
        }
        if len > 0 {
            let body = ChunkHole { offset: (request.offset.get() + hole as u64).into(), len: (len as u32).into() };
            put_chunk(out, request, chunk::OFFSET_HOLE, end == bytes.len(), body.as_bytes());
        }
        at = end;
    }
}

fn put_data_chunk(out: &mut Outgoing, request: &Request, done: bool, offset: u64, len: u32) {
    let len = ChunkOffset::SIZE as u32 + len;
    let header = ChunkHeader::new(chunk::OFFSET_DATA, done, request.cookie.get(), len);
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(&offset.to_be_bytes());
}

fn put_chunk(out: &mut Outgoing, request: &Request, kind: u16, done: bool, body: &[u8]) {
    let header = ChunkHeader::new(kind, done, request.cookie.get(), body.len() as u32);
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(body);
}

/// The answer to BLOCK_STATUS. Equal neighbours become one run; a run longer than 32 bits can say ends the answer.
pub(super) fn extents(out: &mut Outgoing, request: &Request, id: u32, extents: &[ExtentStatus]) {
    const LONGEST: u64 = u32::MAX as u64 / BLOCK_SIZE * BLOCK_SIZE;
    let mut runs: Vec<(u64, u32)> = Vec::with_capacity(extents.len());
    for extent in extents.iter().filter(|extent| extent.len > 0) {
        let flags = match extent.allocation {
            Allocation::Data => 0,
            Allocation::Zero => allocation::ZERO,
            Allocation::Hole => allocation::ZERO | allocation::HOLE,
        };
        match runs.last_mut() {
            Some((len, last)) if *last == flags => *len += extent.len,
            _ => runs.push((extent.len, flags)),
        }
    }
    if let Some(index) = runs.iter().position(|(len, _)| *len > LONGEST) {
        runs.truncate(index + 1);
    }
    if request.has(command_flag::REQ_ONE) {
        runs.truncate(1);
        for (len, _) in &mut runs {
            *len = (*len).min(u64::from(request.len.get()));
        }
    }
    let mut body = U32::new(id).as_bytes().to_vec();
    for (len, flags) in runs {
        let run = BlockDescriptor { len: (len.min(LONGEST) as u32).into(), flags: flags.into() };
        body.extend_from_slice(run.as_bytes());
    }
    put_chunk(out, request, chunk::BLOCK_STATUS, true, &body);
}

/// A failure reported by the device.
pub(super) fn io_error(out: &mut Outgoing, style: Style, request: &Request, failure: &IoError) {
    let number = match failure {
        // Writing past the end is a lack of space, anything else there a bad argument.
        IoError::OutOfRange => match request.command.get() {
            command::WRITE | command::WRITE_ZEROES => errno::ENOSPC,
            _ => errno::EINVAL,
        },
        IoError::Invalid(_) => errno::EINVAL,
        IoError::ReadOnly => errno::EPERM,
        IoError::Shutdown => errno::ESHUTDOWN,
        IoError::LogDead(_) | IoError::Stopped(_) | IoError::Read(_) => errno::EIO,
    };
    match style {
        Style::Simple => error(out, style, request, number, ""),
        Style::Structured => error(out, style, request, number, &failure.to_string()),
    }
}

/// A failure; `why` reaches clients with structured replies.
pub(super) fn error(out: &mut Outgoing, style: Style, request: &Request, number: u32, why: &str) {
    match style {
        Style::Simple => {
            out.extend_from_slice(SimpleReply::new(number, request.cookie.get()).as_bytes());
        }
        Style::Structured => {
            let why = &why.as_bytes()[..why.len().min(1024)];
            let head = ChunkError { error: number.into(), message_len: (why.len() as u16).into() };
            let body = [head.as_bytes(), why].concat();
            put_chunk(out, request, chunk::ERROR, true, &body);
        }
    }
}
