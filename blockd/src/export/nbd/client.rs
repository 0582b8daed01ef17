//! A client: many requests in flight on one connection, driven by one thread.
//!
//! [`NbdClient::submit`] only queues; small requests leave together in one send when the queue is full or when a
//! reply is waited for. While a send does not progress, replies that arrive are taken in, so a server that answers
//! before it reads on cannot deadlock with us.

pub(in crate::export) mod socket;

use std::collections::HashMap;
use std::io;
use std::net::ToSocketAddrs;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::proto::{self, ReplyHeader, chunk, command, command_flag, handshake, info, option, option_reply};
use socket::Socket;

/// Option replies longer than this many bytes are a broken server's.
const OPTION_REPLY_MAX: u32 = 1 << 16;
/// Structured chunks may exceed the data they carry by this many bytes (offsets, messages).
const CHUNK_OVERHEAD_MAX: u32 = 1 << 16;

/// An error number a server answered with ([`proto::errno`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Errno(pub u32);

impl std::fmt::Display for Errno {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The protocol's numbers are Linux's.
        io::Error::from_raw_os_error(self.0 as i32).fmt(f)
    }
}

impl std::error::Error for Errno {}

impl From<Errno> for io::Error {
    fn from(errno: Errno) -> Self {
        io::Error::from_raw_os_error(errno.0 as i32)
    }
}

/// A request. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// Read `len` bytes.
    Read { offset: u64, len: u32 },
    /// Write `data`; with `fua`, answered when durable.
    Write { offset: u64, data: &'a [u8], fua: bool },
    /// Make everything answered so far durable.
    Flush,
    /// Discard a range.
    Trim { offset: u64, len: u32, fua: bool },
    /// Zero a range; with `no_hole` it stays allocated.
    WriteZeroes { offset: u64, len: u32, fua: bool, no_hole: bool },
    /// Prefetch a range.
    Cache { offset: u64, len: u32 },
    /// Ask for the `base:allocation` of a range; needs [`NbdClient::has_block_status`].
    BlockStatus { offset: u64, len: u32 },
}

/// A run of equal allocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes.
    pub len: u32,
    /// [`proto::allocation`] flags; 0 is data.
    pub flags: u32,
}

/// What a successful request brought back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplyData {
    /// Nothing but success.
    Done,
    /// The bytes of a read.
    Data(Vec<u8>),
    /// The runs of a block status, in order from the asked offset; at least one.
    Extents(Vec<Extent>),
}

/// Which extensions to ask the server for. What it does not have is left out without an error.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Structured replies, needed for block status.
    pub structured: bool,
    /// The `base:allocation` context.
    pub block_status: bool,
    /// How long any wait for the server may take before it fails with `TimedOut`; `None` waits for ever.
    pub timeout: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self { structured: true, block_status: true, timeout: None }
    }
}

/// An export in a server's list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name.
    pub name: String,
    /// What the server says of it; may be empty.
    pub description: String,
}

/// A request that is not yet answered.
enum Pending {
    /// Collects the bytes of a read; `missing` of them are still to come.
    Read { offset: u64, data: Vec<u8>, missing: usize, error: Option<Errno> },
    /// Collects the runs of a block status.
    Status { extents: Vec<Extent>, error: Option<Errno> },
    /// Anything else.
    Plain { error: Option<Errno> },
}

/// One connection in the transmission phase.
pub struct NbdClient {
    socket: Socket,
    pending: HashMap<u64, Pending>,
    next_cookie: u64,
    size: u64,
    flags: u16,
    block_sizes: (u32, u32, u32),
    description: String,
    /// Id of the `base:allocation` context.
    allocation_context: Option<u32>,
}

impl NbdClient {
    /// Connects to a Unix socket and opens `export`; the empty name means the server's default.
    pub fn connect_unix(path: impl AsRef<Path>, export: &str) -> io::Result<Self> {
        Self::connect_unix_with(path, export, Options::default())
    }

    /// [`Self::connect_unix`] with other extensions.
    pub fn connect_unix_with(path: impl AsRef<Path>, export: &str, options: Options) -> io::Result<Self> {
        Self::negotiate(Socket::connect_unix(path.as_ref(), options.timeout)?, export, options)
    }

    /// Connects to a TCP address, for instance `"127.0.0.1:10809"`, and opens `export`.
    pub fn connect_tcp(addr: impl ToSocketAddrs, export: &str) -> io::Result<Self> {
        Self::connect_tcp_with(addr, export, Options::default())
    }

    /// [`Self::connect_tcp`] with other extensions.
    pub fn connect_tcp_with(addr: impl ToSocketAddrs, export: &str, options: Options) -> io::Result<Self> {
        Self::negotiate(Socket::connect_tcp(addr, options.timeout)?, export, options)
    }

    /// The exports of the server on a Unix socket.
    pub fn list_unix(path: impl AsRef<Path>, timeout: Option<Duration>) -> io::Result<Vec<Listed>> {
        Self::list(Socket::connect_unix(path.as_ref(), timeout)?)
    }

    /// The exports of the server on a TCP address.
    pub fn list_tcp(addr: impl ToSocketAddrs, timeout: Option<Duration>) -> io::Result<Vec<Listed>> {
        Self::list(Socket::connect_tcp(addr, timeout)?)
    }

    /// Size of the export in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// [`proto::transmission`] flags.
    pub fn flags(&self) -> u16 {
        self.flags
    }

    /// Minimum, preferred and maximum request size in bytes, as the server said or the protocol assumes.
    pub fn block_sizes(&self) -> (u32, u32, u32) {
        self.block_sizes
    }

    /// What the server says of the export for people; may be empty.
    pub fn description(&self) -> &str {
        &self.description
    }

    /// The socket, to wait for replies ([`Self::ready_reply`]) or to end the connection.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The socket, for somebody else to go on with. Only before the first request.
    pub fn into_socket(self) -> io::Result<OwnedFd> {
        assert!(self.next_cookie == 1, "the socket of a connection in use");
        self.socket.into_fd()
    }

    /// Whether [`Request::BlockStatus`] may be sent.
    pub fn has_block_status(&self) -> bool {
        self.allocation_context.is_some()
    }

    /// Requests not yet answered.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Changes how long a wait for the server may take.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.socket.timeout = timeout;
    }

    /// Queues a request and returns the cookie its reply will carry. Data of a write is copied or sent before this
    /// returns. Errors are of the connection, which is then useless.
    pub fn submit(&mut self, request: Request<'_>) -> io::Result<u64> {
        let fua = |on: bool| if on { command_flag::FUA } else { 0 };
        let plain = Pending::Plain { error: None };
        let mut payload: &[u8] = &[];
        let (kind, flags, offset, len, pending) = match request {
            Request::Read { offset, len } => {
                let pending = Pending::Read { offset, data: vec![0; len as usize], missing: len as usize, error: None };
                (command::READ, 0, offset, len, pending)
            }
            Request::Write { offset, data, fua: on } => {
                payload = data;
                let len = u32::try_from(data.len())
                    .map_err(|_| io::Error::new(io::ErrorKind::InvalidInput, "write longer than 4 GiB"))?;
                (command::WRITE, fua(on), offset, len, plain)
            }
            Request::Flush => (command::FLUSH, 0, 0, 0, plain),
            Request::Trim { offset, len, fua: on } => (command::TRIM, fua(on), offset, len, plain),
            Request::WriteZeroes { offset, len, fua: on, no_hole } => {
                let no_hole = if no_hole { command_flag::NO_HOLE } else { 0 };
                (command::WRITE_ZEROES, fua(on) | no_hole, offset, len, plain)
            }
            Request::Cache { offset, len } => (command::CACHE, 0, offset, len, plain),
            Request::BlockStatus { offset, len } => {
                let pending = Pending::Status { extents: Vec::new(), error: None };
                (command::BLOCK_STATUS, 0, offset, len, pending)
            }
        };
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let header = proto::Request::new(kind, flags, cookie, offset, len);
        self.pending.insert(cookie, pending);
        self.socket.queue(header.as_bytes(), payload)?;
        Ok(cookie)
    }

    /// Sends what is queued without waiting for a reply.
    pub fn send_queued(&mut self) -> io::Result<()> {
        self.socket.flush()
    }

    /// Sends what is queued and waits for the next reply, whichever request it answers. Fails with `InvalidInput`
    /// when nothing is in flight.
    pub fn next_reply(&mut self) -> io::Result<(u64, Result<ReplyData, Errno>)> {
        if self.pending.is_empty() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "no request is in flight"));
        }
        self.socket.flush()?;
        loop {
            let header = self.reply_header()?;
            if let Some(cookie) = self.take_reply(header)? {
                return Ok((cookie, self.finish(cookie)?));
            }
        }
    }

    /// Sends what is queued and returns a reply that is there already, if any. Of a reply that has begun to come, it waits
    /// for the rest.
    pub fn ready_reply(&mut self) -> io::Result<Option<(u64, Result<ReplyData, Errno>)>> {
        self.socket.flush()?;
        loop {
            let Some(header) = self.buffered_header()? else {
                if self.socket.take_in()? {
                    continue;
                }
                return Ok(None);
            };
            if let Some(cookie) = self.take_reply(header)? {
                return Ok(Some((cookie, self.finish(cookie)?)));
            }
        }
    }

    /// Reads `buf.len()` bytes at `offset`. Like all the helpers below, only when nothing else is in flight.
    pub fn read(&mut self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let len = buf.len() as u32;
        match self.call(Request::Read { offset, len })? {
            ReplyData::Data(data) => buf.copy_from_slice(&data),
            _ => return Err(broken("no data in answer to a read")),
        }
        Ok(())
    }

    /// Writes `data` at `offset`.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        let request = Request::Write { offset, data, fua: false };
        self.call(request).map(drop)
    }

    /// Makes everything written so far durable.
    pub fn flush(&mut self) -> io::Result<()> {
        self.call(Request::Flush).map(drop)
    }

    /// Discards a range.
    pub fn trim(&mut self, offset: u64, len: u32) -> io::Result<()> {
        let request = Request::Trim { offset, len, fua: false };
        self.call(request).map(drop)
    }

    /// Zeroes a range.
    pub fn zero(&mut self, offset: u64, len: u32) -> io::Result<()> {
        let request = Request::WriteZeroes { offset, len, fua: false, no_hole: false };
        self.call(request).map(drop)
    }

    /// The allocation of a range; the server may describe less of it, or more, than asked.
    pub fn block_status(&mut self, offset: u64, len: u32) -> io::Result<Vec<Extent>> {
        match self.call(Request::BlockStatus { offset, len })? {
            ReplyData::Extents(extents) => Ok(extents),
            _ => Err(broken("no extents in answer to a block status")),
        }
    }

    /// Says goodbye. Dropping the client without it is a disconnect the server must survive as well.
    pub fn disconnect(mut self) -> io::Result<()> {
        let request = proto::Request::new(command::DISC, 0, 0, 0, 0);
        self.socket.queue(request.as_bytes(), &[])?;
        self.socket.flush()
    }

    fn call(&mut self, request: Request<'_>) -> io::Result<ReplyData> {
        assert!(self.pending.is_empty(), "a depth-1 call while other requests are in flight");
        self.submit(request)?;
        let (_, result) = self.next_reply()?;
        Ok(result?)
    }

    fn reply_header(&mut self) -> io::Result<ReplyHeader> {
        loop {
            if let Some(header) = self.buffered_header()? {
                return Ok(header);
            }
            self.socket.fill()?;
        }
    }

    fn buffered_header(&mut self) -> io::Result<Option<ReplyHeader>> {
        let buffered = self.socket.buffered();
        let Some((header, rest)) = ReplyHeader::take(buffered).map_err(broken)? else { return Ok(None) };
        let used = buffered.len() - rest.len();
        self.socket.consume(used);
        Ok(Some(header))
    }

    /// Takes in what belongs to a header; the cookie of the request that is answered in full by it.
    fn take_reply(&mut self, header: ReplyHeader) -> io::Result<Option<u64>> {
        match header {
            ReplyHeader::Simple(reply) => {
                let cookie = reply.cookie.get();
                self.simple_reply(cookie, reply.error.get())?;
                Ok(Some(cookie))
            }
            ReplyHeader::Chunk(head) => {
                self.reply_chunk(&head)?;
                Ok(head.done().then(|| head.cookie.get()))
            }
        }
    }

    fn simple_reply(&mut self, cookie: u64, error: u32) -> io::Result<()> {
        let errno = (error != 0).then_some(Errno(error));
        match self.pending.get_mut(&cookie).ok_or_else(unknown_cookie)? {
            Pending::Read { data, missing, error, .. } => {
                if errno.is_none() {
                    self.socket.read_exact(data)?;
                }
                *missing = 0;
                *error = errno;
            }
            Pending::Status { error, .. } | Pending::Plain { error } => *error = errno,
        }
        Ok(())
    }

    fn reply_chunk(&mut self, head: &proto::ChunkHeader) -> io::Result<()> {
        let pending = self.pending.get_mut(&head.cookie.get()).ok_or_else(unknown_cookie)?;
        let len = head.len.get();
        if head.is_error() {
            if len > CHUNK_OVERHEAD_MAX {
                return Err(broken("error chunk too long"));
            }
            let mut payload = vec![0; len as usize];
            self.socket.read_exact(&mut payload)?;
            let (number, _) = proto::decode_chunk_error(&payload).map_err(broken)?;
            match pending {
                Pending::Read { error, .. } | Pending::Status { error, .. } | Pending::Plain { error } => {
                    error.get_or_insert(Errno(number));
                }
            }
            return Ok(());
        }
        match (head.kind.get(), pending) {
            (chunk::NONE, _) if len == 0 => {}
            (chunk::OFFSET_DATA, Pending::Read { offset, data, missing, .. }) => {
                let at: proto::ChunkOffset = self.socket.read_struct()?;
                let bytes = len.checked_sub(8).ok_or_else(|| broken("short data chunk"))? as usize;
                let range = place(*offset, data.len(), at.offset.get(), bytes)?;
                self.socket.read_exact(&mut data[range])?;
                *missing = missing.checked_sub(bytes).ok_or_else(|| broken("data sent twice"))?;
            }
            (chunk::OFFSET_HOLE, Pending::Read { offset, data, missing, .. }) if len == 12 => {
                let hole: proto::ChunkHole = self.socket.read_struct()?;
                let bytes = hole.len.get() as usize;
                // The buffer starts out zeroed.
                place(*offset, data.len(), hole.offset.get(), bytes)?;
                *missing = missing.checked_sub(bytes).ok_or_else(|| broken("data sent twice"))?;
            }
            (chunk::BLOCK_STATUS, Pending::Status { extents, .. }) => {
                if len > proto::MAX_PAYLOAD {
                    return Err(broken("block status chunk too long"));
                }
                let mut payload = vec![0; len as usize];
                self.socket.read_exact(&mut payload)?;
                let (id, runs) = proto::decode_block_status(&payload).map_err(broken)?;
                if Some(id) == self.allocation_context {
                    extents.extend(runs.into_iter().map(|(len, flags)| Extent { len, flags }));
                }
            }
            _ => return Err(broken("chunk that does not fit its request")),
        }
        Ok(())
    }

    fn finish(&mut self, cookie: u64) -> io::Result<Result<ReplyData, Errno>> {
        let pending = self.pending.remove(&cookie).ok_or_else(unknown_cookie)?;
        Ok(match pending {
            Pending::Read { error: Some(errno), .. }
            | Pending::Status { error: Some(errno), .. }
            | Pending::Plain { error: Some(errno) } => Err(errno),
            Pending::Read { missing: 1.., .. } => return Err(broken("read answered in part")),
            Pending::Read { data, .. } => Ok(ReplyData::Data(data)),
            Pending::Status { extents, .. } if extents.is_empty() => {
                return Err(broken("empty block status"));
            }
            Pending::Status { extents, .. } => Ok(ReplyData::Extents(extents)),
            Pending::Plain { .. } => Ok(ReplyData::Done),
        })
    }

    fn list(socket: Socket) -> io::Result<Vec<Listed>> {
        let mut client = Self::greet(socket)?;
        let mut listed = Vec::new();
        let agreed = client.option(option::LIST, &[], |kind, data| {
            if kind == option_reply::SERVER {
                let (name, details) = proto::take_string(data).ok_or_else(|| broken("name of an export"))?;
                listed.push(Listed { name, description: String::from_utf8_lossy(details).into_owned() });
            }
            Ok(())
        })?;
        match agreed {
            Ok(()) => Ok(listed),
            Err((kind, _)) => {
                Err(io::Error::new(io::ErrorKind::Unsupported, format!("the server does not list exports ({kind:#x})")))
            }
        }
    }

    fn negotiate(socket: Socket, export: &str, options: Options) -> io::Result<Self> {
        let mut client = Self::greet(socket)?;
        if options.structured {
            let agreed = client.option(option::STRUCTURED_REPLY, &[], |_, _| Ok(()))?;
            if agreed.is_ok() && options.block_status {
                client.set_meta_context(export)?;
            }
        }
        client.go(export)?;
        Ok(client)
    }

    fn greet(mut socket: Socket) -> io::Result<Self> {
        let greeting: proto::Greeting = socket.read_struct()?;
        greeting.check().map_err(broken)?;
        let common = greeting.flags.get() & (handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES);
        if common & handshake::FIXED_NEWSTYLE == 0 {
            return Err(broken("the server does not speak fixed newstyle"));
        }
        socket.queue(&u32::from(common).to_be_bytes(), &[])?;
        Ok(Self {
            socket,
            pending: HashMap::new(),
            next_cookie: 1,
            size: 0,
            flags: 0,
            block_sizes: (1, 4096, proto::MAX_PAYLOAD),
            description: String::new(),
            allocation_context: None,
        })
    }

    fn set_meta_context(&mut self, export: &str) -> io::Result<()> {
        let query = proto::MetaQuery { export: export.to_owned(), queries: vec![proto::BASE_ALLOCATION.to_owned()] };
        let mut context = None;
        let agreed = self.option(option::SET_META_CONTEXT, &query.encode(), |kind, data| {
            if kind == option_reply::META_CONTEXT {
                let (id, name) = proto::decode_meta_context(data).map_err(broken)?;
                if name == proto::BASE_ALLOCATION {
                    context = Some(id);
                }
            }
            Ok(())
        })?;
        self.allocation_context = context.filter(|_| agreed.is_ok());
        Ok(())
    }

    fn go(&mut self, export: &str) -> io::Result<()> {
        let query = proto::InfoQuery { name: export.to_owned(), wanted: vec![info::BLOCK_SIZE, info::DESCRIPTION] };
        let mut found = None;
        let mut description = String::new();
        let mut sizes = self.block_sizes;
        let agreed = self.option(option::GO, &query.encode(), |_, data| {
            if let Some((export, [])) = proto::take::<proto::InfoExport>(data)
                && export.kind.get() == info::EXPORT
            {
                found = Some((export.size.get(), export.flags.get()));
            } else if let Some((block, [])) = proto::take::<proto::InfoBlockSize>(data)
                && block.kind.get() == info::BLOCK_SIZE
            {
                sizes = (block.minimum.get(), block.preferred.get(), block.maximum.get());
            } else if let Some(text) = data.strip_prefix(&info::DESCRIPTION.to_be_bytes()) {
                description = String::from_utf8_lossy(text).into_owned();
            }
            Ok(())
        })?;
        if let Err((kind, message)) = agreed {
            let (error, why) = match kind {
                option_reply::ERR_UNKNOWN => (io::ErrorKind::NotFound, "no such export"),
                option_reply::ERR_POLICY => (io::ErrorKind::PermissionDenied, "refused by policy"),
                option_reply::ERR_SHUTDOWN => (io::ErrorKind::ConnectionRefused, "the server is shutting down"),
                option_reply::ERR_TLS_REQD => (io::ErrorKind::PermissionDenied, "the server wants TLS"),
                _ => (io::ErrorKind::Unsupported, "refused"),
            };
            let message = String::from_utf8_lossy(&message).into_owned();
            return Err(io::Error::new(error, format!("export \"{export}\": {why} ({kind:#x}) {message}")));
        }
        (self.size, self.flags) = found.ok_or_else(|| broken("the server did not say the export's size"))?;
        self.block_sizes = sizes;
        self.description = description;
        Ok(())
    }

    /// Sends an option and feeds its replies to `each` until the final one: `Ok` for ACK, `Err` with the reply's
    /// type and message for an error.
    fn option(
        &mut self,
        option: u32,
        data: &[u8],
        mut each: impl FnMut(u32, &[u8]) -> io::Result<()>,
    ) -> io::Result<Result<(), (u32, Vec<u8>)>> {
        let header = proto::OptionHeader::new(option, data.len() as u32);
        self.socket.queue(header.as_bytes(), data)?;
        self.socket.flush()?;
        loop {
            let reply: proto::OptionReply = self.socket.read_struct()?;
            reply.check().map_err(broken)?;
            if reply.option.get() != option || reply.len.get() > OPTION_REPLY_MAX {
                return Err(broken("option reply out of place or too long"));
            }
            let mut data = vec![0; reply.len.get() as usize];
            self.socket.read_exact(&mut data)?;
            match reply.kind.get() {
                option_reply::ACK => return Ok(Ok(())),
                kind if reply.is_error() => return Ok(Err((kind, data))),
                kind => each(kind, &data)?,
            }
        }
    }
}

/// Where `len` bytes at `at` lie in a buffer of `size` bytes that starts at `start`.
fn place(start: u64, size: usize, at: u64, len: usize) -> io::Result<std::ops::Range<usize>> {
    at.checked_sub(start)
        .and_then(|from| usize::try_from(from).ok())
        .and_then(|from| Some(from..from.checked_add(len)?))
        .filter(|range| range.end <= size && len > 0)
        .ok_or_else(|| broken("chunk outside its request"))
}

fn broken(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

fn unknown_cookie() -> io::Error {
    broken("reply to a request that was not made")
}

impl Socket {
    fn read_struct<T: FromBytes + KnownLayout + Immutable + Unaligned>(&mut self) -> io::Result<T> {
        loop {
            let buffered = self.buffered();
            if let Some((value, rest)) = proto::take::<T>(buffered) {
                let used = buffered.len() - rest.len();
                self.consume(used);
                return Ok(value);
            }
            self.fill()?;
        }
    }
}

#[cfg(test)]
mod tests;
