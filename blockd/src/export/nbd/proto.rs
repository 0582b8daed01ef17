//! The wire format, for server and client: constants, big-endian structs, and codecs.
//!
//! Everything here is pure. Decoders are total: any bytes yield a value or `None`/[`ProtoError`], never a panic,
//! and never allocate more than a small multiple of their input.

use zerocopy::byteorder::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// TCP port assigned to NBD.
pub const DEFAULT_PORT: u16 = 10809;

/// "NBDMAGIC", the first eight bytes a server sends.
pub const INIT_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": follows [`INIT_MAGIC`] in newstyle negotiation and starts every option a client sends.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Starts every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
/// Starts every request of the transmission phase.
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// Starts a simple reply.
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// Starts a structured reply chunk.
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

/// Largest payload of a READ or WRITE, in bytes, as said in [`InfoBlockSize`].
pub const MAX_PAYLOAD: u32 = 32 << 20;
/// Longest name or other string the protocol allows, in bytes.
pub const MAX_STRING: usize = 4096;
/// Zeroes that follow the answer to EXPORT_NAME unless both sides said NO_ZEROES.
pub const EXPORT_NAME_PADDING: usize = 124;

/// Handshake flags: the server's (u16) and the client's (u32) use the same bits.
pub mod handshake {
    /// Fixed newstyle negotiation.
    pub const FIXED_NEWSTYLE: u16 = 1 << 0;
    /// Leave out [`super::EXPORT_NAME_PADDING`].
    pub const NO_ZEROES: u16 = 1 << 1;
}

/// Option numbers.
pub mod option {
    /// Choose an export and begin transmission; failure is a disconnect.
    pub const EXPORT_NAME: u32 = 1;
    /// Give up.
    pub const ABORT: u32 = 2;
    /// Name all exports.
    pub const LIST: u32 = 3;
    /// Begin TLS.
    pub const STARTTLS: u32 = 5;
    /// Describe an export.
    pub const INFO: u32 = 6;
    /// Describe an export and begin transmission.
    pub const GO: u32 = 7;
    /// Use structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Name the metadata contexts of an export.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Choose the metadata contexts for BLOCK_STATUS.
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Types of option replies. Errors have the top bit set.
pub mod option_reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export's name, in answer to LIST.
    pub const SERVER: u32 = 2;
    /// One piece of information, in answer to INFO and GO.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR_BIT: u32 = 1 << 31;
    /// Option unknown or unsupported.
    pub const ERR_UNSUP: u32 = ERROR_BIT | 1;
    /// Forbidden by policy.
    pub const ERR_POLICY: u32 = ERROR_BIT | 2;
    /// Malformed or out of place.
    pub const ERR_INVALID: u32 = ERROR_BIT | 3;
    /// Not supported on this platform.
    pub const ERR_PLATFORM: u32 = ERROR_BIT | 4;
    /// TLS is required first.
    pub const ERR_TLS_REQD: u32 = ERROR_BIT | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR_BIT | 6;
    /// The server is going away.
    pub const ERR_SHUTDOWN: u32 = ERROR_BIT | 7;
    /// The client must ask for block sizes first.
    pub const ERR_BLOCK_SIZE_REQD: u32 = ERROR_BIT | 8;
    /// The option's data is too long.
    pub const ERR_TOO_BIG: u32 = ERROR_BIT | 9;
}

/// Information types of INFO and GO.
pub mod info {
    /// [`super::InfoExport`]; always sent.
    pub const EXPORT: u16 = 0;
    /// The export's canonical name.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// [`super::InfoBlockSize`].
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
pub mod transmission {
    /// The field is meaningful.
    pub const HAS_FLAGS: u16 = 1 << 0;
    /// Writes fail with EPERM.
    pub const READ_ONLY: u16 = 1 << 1;
    /// FLUSH is supported.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// FUA is supported.
    pub const SEND_FUA: u16 = 1 << 3;
    /// Seeks are slow.
    pub const ROTATIONAL: u16 = 1 << 4;
    /// TRIM is supported.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// WRITE_ZEROES is supported.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// The DF command flag is supported.
    pub const SEND_DF: u16 = 1 << 7;
    /// FLUSH and FUA hold over all connections.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// CACHE is supported.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// The FAST_ZERO command flag is supported.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Command numbers.
pub mod command {
    /// Read data.
    pub const READ: u16 = 0;
    /// Write data.
    pub const WRITE: u16 = 1;
    /// Disconnect; has no reply.
    pub const DISC: u16 = 2;
    /// Make what was answered durable.
    pub const FLUSH: u16 = 3;
    /// Discard a range.
    pub const TRIM: u16 = 4;
    /// Prefetch a range.
    pub const CACHE: u16 = 5;
    /// Zero a range.
    pub const WRITE_ZEROES: u16 = 6;
    /// Describe a range.
    pub const BLOCK_STATUS: u16 = 7;
}

/// Command flags.
pub mod command_flag {
    /// Answer when durable.
    pub const FUA: u16 = 1 << 0;
    /// WRITE_ZEROES must leave the range allocated.
    pub const NO_HOLE: u16 = 1 << 1;
    /// Answer READ in one chunk.
    pub const DF: u16 = 1 << 2;
    /// BLOCK_STATUS wants one extent, cut to the request.
    pub const REQ_ONE: u16 = 1 << 3;
    /// Fail with ENOTSUP unless faster than writing.
    pub const FAST_ZERO: u16 = 1 << 4;
}

/// Chunk flags and types of structured replies.
pub mod chunk {
    /// The last chunk of its reply.
    pub const FLAG_DONE: u16 = 1 << 0;
    /// Nothing but the end.
    pub const NONE: u16 = 0;
    /// [`super::ChunkOffset`] and data.
    pub const OFFSET_DATA: u16 = 1;
    /// [`super::ChunkHole`].
    pub const OFFSET_HOLE: u16 = 2;
    /// Context id, then [`super::BlockDescriptor`]s.
    pub const BLOCK_STATUS: u16 = 5;
    /// [`super::ChunkError`] and a message.
    pub const ERROR: u16 = (1 << 15) | 1;
    /// [`super::ChunkError`], a message, and the offset (u64) of the failure.
    pub const ERROR_OFFSET: u16 = (1 << 15) | 2;
    /// Set in every error type.
    pub const ERROR_BIT: u16 = 1 << 15;
}

/// Error numbers on the wire; these are the protocol's, whatever the host's `errno.h` says.
pub mod errno {
    /// Not permitted (read-only).
    pub const EPERM: u32 = 1;
    /// Input or output failed.
    pub const EIO: u32 = 5;
    /// Out of memory.
    pub const ENOMEM: u32 = 12;
    /// Bad argument.
    pub const EINVAL: u32 = 22;
    /// Past the end, or no space.
    pub const ENOSPC: u32 = 28;
    /// Too long.
    pub const EOVERFLOW: u32 = 75;
    /// Not supported.
    pub const ENOTSUP: u32 = 95;
    /// The server is going away.
    pub const ESHUTDOWN: u32 = 108;
}

/// The one metadata context every server has.
pub const BASE_ALLOCATION: &str = "base:allocation";

/// Descriptor flags of [`BASE_ALLOCATION`].
pub mod allocation {
    /// Unallocated.
    pub const HOLE: u32 = 1 << 0;
    /// Reads as zeroes.
    pub const ZERO: u32 = 1 << 1;
}

/// Declares a big-endian wire struct and asserts its size.
macro_rules! wire {
    ($(#[$meta:meta])* $name:ident = $size:literal { $($(#[$fmeta:meta])* $field:ident: $ty:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
        #[repr(C)]
        pub struct $name { $($(#[$fmeta])* pub $field: $ty,)* }
        const _: () = assert!(size_of::<$name>() == $size);
        impl $name {
            /// Bytes on the wire.
            pub const SIZE: usize = $size;
        }
    };
}

wire! {
    /// The server's first message.
    Greeting = 18 {
        /// [`INIT_MAGIC`].
        magic: U64,
        /// [`OPTION_MAGIC`].
        option_magic: U64,
        /// [`handshake`] flags.
        flags: U16,
    }
}

wire! {
    /// Starts every option; `len` bytes of data follow.
    OptionHeader = 16 {
        /// [`OPTION_MAGIC`].
        magic: U64,
        /// [`option`].
        option: U32,
        /// Length of the data.
        len: U32,
    }
}

wire! {
    /// Starts every reply to an option; `len` bytes of data follow.
    OptionReply = 20 {
        /// [`OPTION_REPLY_MAGIC`].
        magic: U64,
        /// The option answered.
        option: U32,
        /// [`option_reply`].
        kind: U32,
        /// Length of the data.
        len: U32,
    }
}

wire! {
    /// The answer to EXPORT_NAME.
    ExportInfo = 10 {
        /// Size in bytes.
        size: U64,
        /// [`transmission`] flags.
        flags: U16,
    }
}

wire! {
    /// [`info::EXPORT`].
    InfoExport = 12 {
        /// [`info::EXPORT`].
        kind: U16,
        /// Size in bytes.
        size: U64,
        /// [`transmission`] flags.
        flags: U16,
    }
}

wire! {
    /// [`info::BLOCK_SIZE`].
    InfoBlockSize = 14 {
        /// [`info::BLOCK_SIZE`].
        kind: U16,
        /// Requests must be multiples of this many bytes.
        minimum: U32,
        /// Requests should be multiples of this many bytes.
        preferred: U32,
        /// READ and WRITE may not be longer, in bytes.
        maximum: U32,
    }
}

wire! {
    /// A request; WRITE is followed by `len` bytes.
    Request = 28 {
        /// [`REQUEST_MAGIC`].
        magic: U32,
        /// [`command_flag`].
        flags: U16,
        /// [`command`].
        command: U16,
        /// Chosen by the client, sent back in the reply.
        cookie: U64,
        /// Byte offset.
        offset: U64,
        /// Bytes.
        len: U32,
    }
}

wire! {
    /// A simple reply; to a READ that succeeded the data follows.
    SimpleReply = 16 {
        /// [`SIMPLE_REPLY_MAGIC`].
        magic: U32,
        /// [`errno`], 0 for success.
        error: U32,
        /// Of the request.
        cookie: U64,
    }
}

wire! {
    /// One chunk of a structured reply; `len` bytes follow.
    ChunkHeader = 20 {
        /// [`STRUCTURED_REPLY_MAGIC`].
        magic: U32,
        /// [`chunk::FLAG_DONE`].
        flags: U16,
        /// [`chunk`] type.
        kind: U16,
        /// Of the request.
        cookie: U64,
        /// Length of the chunk's payload.
        len: U32,
    }
}

wire! {
    /// Starts the payload of [`chunk::OFFSET_DATA`].
    ChunkOffset = 8 {
        /// Byte offset in the export.
        offset: U64,
    }
}

wire! {
    /// The payload of [`chunk::OFFSET_HOLE`].
    ChunkHole = 12 {
        /// Byte offset in the export.
        offset: U64,
        /// Bytes that read as zero.
        len: U32,
    }
}

wire! {
    /// Starts the payload of the error chunks.
    ChunkError = 6 {
        /// [`errno`].
        error: U32,
        /// Length of the message that follows.
        message_len: U16,
    }
}

wire! {
    /// One run in [`chunk::BLOCK_STATUS`].
    BlockDescriptor = 8 {
        /// Bytes.
        len: U32,
        /// [`allocation`] flags.
        flags: U32,
    }
}

/// Bytes that break the protocol.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtoError {
    /// A message does not start as it must.
    #[error("bad magic {found:#x} where {expected:#x} was due")]
    Magic {
        /// As found.
        found: u64,
        /// As due.
        expected: u64,
    },
    /// A message contradicts itself.
    #[error("malformed {0}")]
    Malformed(&'static str),
}

/// Splits `T` off the front of `bytes`; `None` if there are too few.
pub fn take<T: FromBytes + KnownLayout + Immutable + Unaligned>(bytes: &[u8]) -> Option<(T, &[u8])> {
    T::read_from_prefix(bytes).ok()
}

fn check(found: u64, expected: u64) -> Result<(), ProtoError> {
    if found == expected { Ok(()) } else { Err(ProtoError::Magic { found, expected }) }
}

impl Greeting {
    /// A fixed newstyle greeting.
    pub fn new(flags: u16) -> Self {
        Self { magic: INIT_MAGIC.into(), option_magic: OPTION_MAGIC.into(), flags: flags.into() }
    }

    /// Fails unless both magics are right.
    pub fn check(&self) -> Result<(), ProtoError> {
        check(self.magic.get(), INIT_MAGIC)?;
        check(self.option_magic.get(), OPTION_MAGIC)
    }
}

impl OptionHeader {
    /// The header of an option with `len` bytes of data.
    pub fn new(option: u32, len: u32) -> Self {
        Self { magic: OPTION_MAGIC.into(), option: option.into(), len: len.into() }
    }

    /// Fails unless the magic is right.
    pub fn check(&self) -> Result<(), ProtoError> {
        check(self.magic.get(), OPTION_MAGIC)
    }
}

impl OptionReply {
    /// The header of a reply with `len` bytes of data.
    pub fn new(option: u32, kind: u32, len: u32) -> Self {
        Self { magic: OPTION_REPLY_MAGIC.into(), option: option.into(), kind: kind.into(), len: len.into() }
    }

    /// Fails unless the magic is right.
    pub fn check(&self) -> Result<(), ProtoError> {
        check(self.magic.get(), OPTION_REPLY_MAGIC)
    }

    /// Whether the option was refused.
    pub fn is_error(&self) -> bool {
        self.kind.get() & option_reply::ERROR_BIT != 0
    }
}

impl Request {
    /// A request.
    pub fn new(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> Self {
        Self {
            magic: REQUEST_MAGIC.into(),
            flags: flags.into(),
            command: command.into(),
            cookie: cookie.into(),
            offset: offset.into(),
            len: len.into(),
        }
    }

    /// Fails unless the magic is right.
    pub fn check(&self) -> Result<(), ProtoError> {
        Self::check_magic(self.magic.get())
    }

    /// Fails unless `magic` starts a request.
    pub fn check_magic(magic: u32) -> Result<(), ProtoError> {
        check(magic.into(), REQUEST_MAGIC.into())
    }

    /// Whether a command flag is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags.get() & flag != 0
    }
}

impl SimpleReply {
    /// A simple reply.
    pub fn new(error: u32, cookie: u64) -> Self {
        Self { magic: SIMPLE_REPLY_MAGIC.into(), error: error.into(), cookie: cookie.into() }
    }
}

impl ChunkHeader {
    /// The header of a chunk with `len` bytes of payload.
    pub fn new(kind: u16, done: bool, cookie: u64, len: u32) -> Self {
        Self {
            magic: STRUCTURED_REPLY_MAGIC.into(),
            flags: if done { chunk::FLAG_DONE } else { 0 }.into(),
            kind: kind.into(),
            cookie: cookie.into(),
            len: len.into(),
        }
    }

    /// Whether this is the last chunk of its reply.
    pub fn done(&self) -> bool {
        self.flags.get() & chunk::FLAG_DONE != 0
    }

    /// Whether this chunk reports an error.
    pub fn is_error(&self) -> bool {
        self.kind.get() & chunk::ERROR_BIT != 0
    }
}

/// The start of a reply of the transmission phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReplyHeader {
    /// Data follows if this answers a READ and `error` is 0.
    Simple(SimpleReply),
    /// `len` bytes follow.
    Chunk(ChunkHeader),
}

impl ReplyHeader {
    /// Splits a reply header off the front of `bytes`; `Ok(None)` if more bytes are needed.
    pub fn take(bytes: &[u8]) -> Result<Option<(Self, &[u8])>, ProtoError> {
        let Some((magic, _)) = take::<U32>(bytes) else {
            return Ok(None);
        };
        match magic.get() {
            SIMPLE_REPLY_MAGIC => Ok(take(bytes).map(|(reply, rest)| (Self::Simple(reply), rest))),
            STRUCTURED_REPLY_MAGIC => Ok(take(bytes).map(|(head, rest)| (Self::Chunk(head), rest))),
            found => Err(ProtoError::Magic { found: found.into(), expected: SIMPLE_REPLY_MAGIC.into() }),
        }
    }
}

/// Data of INFO and GO.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InfoQuery {
    /// The export meant; empty means the default.
    pub name: String,
    /// [`info`] types the client would like.
    pub wanted: Vec<u16>,
}

impl InfoQuery {
    /// The option's data.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(6 + self.name.len() + 2 * self.wanted.len());
        put_string(&mut out, &self.name);
        out.extend_from_slice(&(self.wanted.len() as u16).to_be_bytes());
        for kind in &self.wanted {
            out.extend_from_slice(&kind.to_be_bytes());
        }
        out
    }

    /// Reads the option's data.
    pub fn decode(data: &[u8]) -> Result<Self, ProtoError> {
        const WHAT: ProtoError = ProtoError::Malformed("INFO or GO option");
        let (name, rest) = take_string(data).ok_or(WHAT)?;
        let (count, rest) = take::<U16>(rest).ok_or(WHAT)?;
        if rest.len() != 2 * usize::from(count.get()) {
            return Err(WHAT);
        }
        let wanted = rest.chunks_exact(2).map(|pair| u16::from_be_bytes([pair[0], pair[1]])).collect();
        Ok(Self { name, wanted })
    }
}

/// Data of LIST_META_CONTEXT and SET_META_CONTEXT.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MetaQuery {
    /// The export meant.
    pub export: String,
    /// Contexts, or wildcards ending in ':' when listing.
    pub queries: Vec<String>,
}

impl MetaQuery {
    /// The option's data.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        put_string(&mut out, &self.export);
        out.extend_from_slice(&(self.queries.len() as u32).to_be_bytes());
        for query in &self.queries {
            put_string(&mut out, query);
        }
        out
    }

    /// Reads the option's data.
    pub fn decode(data: &[u8]) -> Result<Self, ProtoError> {
        const WHAT: ProtoError = ProtoError::Malformed("META_CONTEXT option");
        let (export, rest) = take_string(data).ok_or(WHAT)?;
        let (count, mut rest) = take::<U32>(rest).ok_or(WHAT)?;
        let mut queries = Vec::new();
        for _ in 0..count.get() {
            let (query, tail) = take_string(rest).ok_or(WHAT)?;
            queries.push(query);
            rest = tail;
        }
        if !rest.is_empty() {
            return Err(WHAT);
        }
        Ok(Self { export, queries })
    }
}

/// Data of the META_CONTEXT reply: the context's id and its name.
pub fn encode_meta_context(id: u32, name: &str) -> Vec<u8> {
    [&id.to_be_bytes(), name.as_bytes()].concat()
}

/// Reads what [`encode_meta_context`] wrote.
pub fn decode_meta_context(data: &[u8]) -> Result<(u32, String), ProtoError> {
    const WHAT: ProtoError = ProtoError::Malformed("META_CONTEXT reply");
    let (id, name) = take::<U32>(data).ok_or(WHAT)?;
    let name = str::from_utf8(name).map_err(|_| WHAT)?;
    Ok((id.get(), name.to_owned()))
}

/// Reads the payload of an error chunk: [`errno`] and message (lossily, it is for people).
pub fn decode_chunk_error(payload: &[u8]) -> Result<(u32, String), ProtoError> {
    const WHAT: ProtoError = ProtoError::Malformed("error chunk");
    let (head, rest) = take::<ChunkError>(payload).ok_or(WHAT)?;
    let message = rest.get(..usize::from(head.message_len.get())).ok_or(WHAT)?;
    Ok((head.error.get(), String::from_utf8_lossy(message).into_owned()))
}

/// Reads the payload of a BLOCK_STATUS chunk: context id and runs of (bytes, [`allocation`] flags).
pub fn decode_block_status(payload: &[u8]) -> Result<(u32, Vec<(u32, u32)>), ProtoError> {
    const WHAT: ProtoError = ProtoError::Malformed("BLOCK_STATUS chunk");
    let (id, rest) = take::<U32>(payload).ok_or(WHAT)?;
    let runs = <[BlockDescriptor]>::ref_from_bytes(rest).map_err(|_| WHAT)?;
    if runs.is_empty() {
        return Err(WHAT);
    }
    let runs = runs.iter().map(|run| (run.len.get(), run.flags.get())).collect();
    Ok((id.get(), runs))
}

/// Appends a length-prefixed string.
pub fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&(text.len() as u32).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Splits a length-prefixed UTF-8 string of at most [`MAX_STRING`] bytes off the front.
pub fn take_string(data: &[u8]) -> Option<(String, &[u8])> {
    let (len, rest) = take::<U32>(data)?;
    let len = len.get() as usize;
    if len > MAX_STRING || len > rest.len() {
        return None;
    }
    let (text, rest) = rest.split_at(len);
    Some((str::from_utf8(text).ok()?.to_owned(), rest))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn request_bytes_are_as_the_protocol_says() {
        let request = Request::new(command::WRITE, command_flag::FUA, 0x0102, 4096, 512);
        assert_eq!(
            request.as_bytes(),
            [0x25, 0x60, 0x95, 0x13, 0, 1, 0, 1, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 0, 0, 16, 0, 0, 0, 2, 0]
        );
    }

    #[test]
    fn options_round_trip() {
        let info = InfoQuery { name: "vol".into(), wanted: vec![info::NAME, info::BLOCK_SIZE] };
        assert_eq!(InfoQuery::decode(&info.encode()), Ok(info));
        let meta = MetaQuery { export: "vol".into(), queries: vec!["base:".into(), BASE_ALLOCATION.into()] };
        assert_eq!(MetaQuery::decode(&meta.encode()), Ok(meta));
        let context = encode_meta_context(7, BASE_ALLOCATION);
        assert_eq!(decode_meta_context(&context), Ok((7, BASE_ALLOCATION.to_owned())));
    }

    #[test]
    fn a_long_count_does_not_allocate() {
        let mut data = Vec::new();
        put_string(&mut data, "vol");
        data.extend_from_slice(&u32::MAX.to_be_bytes());
        assert!(MetaQuery::decode(&data).is_err());
    }

    #[test]
    fn a_reply_header_waits_for_all_its_bytes() {
        let reply = SimpleReply::new(errno::EIO, 9);
        for cut in 0..SimpleReply::SIZE {
            assert_eq!(ReplyHeader::take(&reply.as_bytes()[..cut]), Ok(None));
        }
        let (header, rest) = ReplyHeader::take(reply.as_bytes()).unwrap().unwrap();
        assert_eq!(header, ReplyHeader::Simple(reply));
        assert!(rest.is_empty());
        assert!(ReplyHeader::take(b"garbage").is_err());
    }

    proptest! {
        #[test]
        fn decoders_are_total(data in proptest::collection::vec(any::<u8>(), 0..256)) {
            let _ = InfoQuery::decode(&data);
            let _ = MetaQuery::decode(&data);
            let _ = decode_meta_context(&data);
            let _ = decode_chunk_error(&data);
            let _ = decode_block_status(&data);
            let _ = ReplyHeader::take(&data);
            let _ = take::<Request>(&data);
        }
    }
}
