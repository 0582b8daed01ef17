//! The transmission phase: a state machine from bytes to device calls, and from completions to bytes.
//!
//! It performs no I/O. The reactor feeds it what it received, hands it the device's completions, and sends what
//! collects in the output buffer. Requests run concurrently and are answered in the order they finish.

use zerocopy::byteorder::big_endian::U32;

use super::proto::{self, ProtoError, Request, command, command_flag, errno};
use super::reply::{self, Style};
use crate::buf::AlignedBuf;
use crate::outgoing::Outgoing;
use crate::reactor::{self, Client, Device};
use crate::types::BLOCK_SIZE;
use crate::volume::{IoError, Outcome, ReadNow, Token, WriteData};

pub use crate::reactor::{DIRECT_PAYLOAD, Progress, SessionStats};

/// Requests of one connection that may be unanswered before it is no longer read from.
pub const MAX_IN_FLIGHT: usize = 1024;
/// Payload bytes of one connection that may be unanswered before it is no longer read from.
pub const MAX_IN_FLIGHT_BYTES: u64 = 64 << 20;
/// Unsent reply bytes at which a connection is no longer read from. One more read may go past it.
pub const MAX_UNSENT: usize = 1 << 20;
/// A refused write's payload is skipped up to this many bytes; beyond it the connection is dropped.
const MAX_DISCARD: u32 = 256 << 20;
/// Runs in one answer to BLOCK_STATUS.
const MAX_EXTENTS: usize = 4096;

/// What the handshake settled.
#[derive(Clone, Debug, Default)]
pub struct SessionParams {
    /// The client's address, for messages.
    pub peer: String,
    /// The export's name.
    pub export: String,
    /// Refuse writes, whatever the device says.
    pub read_only: bool,
    /// Structured replies were negotiated.
    pub structured: bool,
    /// Id of the `base:allocation` context, if it was chosen.
    pub base_allocation: Option<u32>,
}

/// A request the device has not answered yet.
#[derive(Clone, Copy)]
struct Running {
    request: Request,
    /// Counted against [`MAX_IN_FLIGHT_BYTES`].
    weight: u32,
}

enum State {
    /// A request header comes next.
    Header,
    /// The payload of a large write comes next.
    Payload { request: Request, buf: AlignedBuf, filled: usize },
    /// The payload of a refused write is skipped, then the refusal is sent.
    Discard { request: Request, left: u32, refusal: Refusal },
    /// DISC was received.
    Disconnected,
}

/// An error and its explanation.
#[derive(Clone, Copy)]
struct Refusal(u32, &'static str);

/// See the module.
pub struct Session {
    read_only: bool,
    style: Style,
    base_allocation: Option<u32>,
    /// Upper bits of every token, see [`Session::new`].
    token_base: u64,
    running: Vec<Option<Running>>,
    free: Vec<u16>,
    in_flight_bytes: u64,
    state: State,
    shutdown: bool,
    large_writes: bool,
    stats: SessionStats,
}

impl Session {
    /// A session whose tokens are `token_base` plus a number below 2^16; the low 16 bits of `token_base` must be 0.
    pub fn new(params: &SessionParams, token_base: u64) -> Self {
        assert_eq!(token_base & 0xffff, 0, "tokens need their low 16 bits");
        Self {
            read_only: params.read_only,
            style: Style::of(params.structured),
            base_allocation: params.base_allocation,
            token_base,
            running: Vec::new(),
            free: Vec::new(),
            in_flight_bytes: 0,
            state: State::Header,
            shutdown: false,
            large_writes: false,
            stats: SessionStats::default(),
        }
    }

    /// Requests not answered yet.
    pub fn in_flight(&self) -> usize {
        self.running.len() - self.free.len()
    }

    /// Totals.
    pub fn stats(&self) -> SessionStats {
        self.stats
    }

    /// From now on new requests fail with ESHUTDOWN; or, on a connection with simple replies, are not answered at all. The
    /// Linux client, which speaks only those, takes every error for a broken disk, while it repeats elsewhere what a closed
    /// connection leaves unanswered.
    pub fn shut_down(&mut self) {
        self.shutdown = true;
    }

    /// Whether this error is told by hanging up, see [`Self::shut_down`].
    pub fn hangs_up_for(&self, error: &IoError) -> bool {
        self.style == Style::Simple && matches!(error, IoError::Shutdown)
    }

    /// Uses up a prefix of `input`, calling `device` and appending replies to `out`. Returns the prefix's length.
    ///
    /// # Errors
    /// The client broke the protocol; nothing after can be understood and the connection must be closed.
    pub fn consume(
        &mut self,
        input: &[u8],
        device: &mut dyn Device,
        out: &mut Outgoing,
    ) -> Result<(usize, Progress), ProtoError> {
        let mut rest = input;
        let progress = loop {
            match &mut self.state {
                State::Disconnected => break Progress::Disconnect,
                State::Discard { request, left, refusal } => {
                    let skipped = rest.len().min(*left as usize);
                    rest = &rest[skipped..];
                    *left -= skipped as u32;
                    if *left > 0 {
                        break Progress::NeedBytes;
                    }
                    let (request, Refusal(error, why)) = (*request, *refusal);
                    self.state = State::Header;
                    reply::error(out, self.style, &request, error, why);
                }
                State::Payload { buf, filled, request } => {
                    let missing = request.len.get() as usize - *filled;
                    let (part, tail) = rest.split_at(rest.len().min(missing));
                    buf[*filled..][..part.len()].copy_from_slice(part);
                    rest = tail;
                    self.payload_received(part.len(), device);
                    if matches!(self.state, State::Payload { .. }) {
                        break Progress::NeedPayload;
                    }
                }
                State::Header => {
                    if self.shutdown && self.style == Style::Simple {
                        break Progress::Disconnect;
                    }
                    if self.is_full(out) {
                        break Progress::Busy;
                    }
                    let Some((request, tail)) = proto::take::<Request>(rest) else {
                        // Garbage is noticed by its first bytes, not when it has grown to a header.
                        if let Some((magic, _)) = proto::take::<U32>(rest) {
                            Request::check_magic(magic.get())?;
                        }
                        break Progress::NeedBytes;
                    };
                    request.check()?;
                    let Some(used) = self.start(&request, tail, device, out)? else {
                        break Progress::NeedBytes;
                    };
                    rest = &tail[used..];
                }
            }
        };
        Ok((input.len() - rest.len(), progress))
    }

    /// Where the rest of a large write's payload goes, after [`Progress::NeedPayload`].
    pub fn payload_mut(&mut self) -> Option<&mut [u8]> {
        match &mut self.state {
            State::Payload { request, buf, filled } => Some(&mut buf[*filled..request.len.get() as usize]),
            _ => None,
        }
    }

    /// `len` bytes were put at the start of [`Session::payload_mut`].
    pub fn payload_received(&mut self, len: usize, device: &mut dyn Device) {
        let State::Payload { request, filled, .. } = &mut self.state else {
            return;
        };
        *filled += len;
        assert!(*filled <= request.len.get() as usize, "payload overrun");
        if *filled < request.len.get() as usize {
            return;
        }
        let State::Payload { request, buf, .. } = std::mem::replace(&mut self.state, State::Header) else {
            return;
        };
        let len = request.len.get() as usize;
        let aligned = request.offset.get().is_multiple_of(BLOCK_SIZE) && (len as u64).is_multiple_of(BLOCK_SIZE);
        let fua = request.has(command_flag::FUA);
        let token = self.token_for(&request);
        if aligned {
            device.write(token, request.offset.get(), WriteData::Owned(buf, len), fua);
        } else {
            device.write(token, request.offset.get(), WriteData::Copy(&buf[..len]), fua);
        }
    }

    /// Whether the last request was a write received in place, so that another is likely to follow.
    pub fn streams_large_writes(&self) -> bool {
        self.large_writes
    }

    /// The device finished the request named by the low 16 bits of its token.
    pub fn complete(&mut self, slot: u16, result: Result<Outcome, IoError>, out: &mut Outgoing) {
        let Some(Running { request, weight }) = self.running.get_mut(usize::from(slot)).and_then(Option::take) else {
            debug_assert!(false, "completion of a request that does not run");
            return;
        };
        self.free.push(slot);
        self.in_flight_bytes -= u64::from(weight);
        match result {
            // A mismatch answers what NBD does not ask.
            Ok(Outcome::Done | Outcome::Mismatch) => reply::done(out, &request),
            Ok(Outcome::Data(data)) => reply::data(out, self.style, &request, data.bytes, &data.holes),
            Ok(Outcome::Extents(extents)) => {
                let id = self.base_allocation.unwrap_or(0);
                reply::extents(out, &request, id, &extents);
            }
            Err(error) => reply::io_error(out, self.style, &request, &error),
        }
    }

    fn is_full(&self, out: &Outgoing) -> bool {
        self.in_flight() >= MAX_IN_FLIGHT || self.in_flight_bytes >= MAX_IN_FLIGHT_BYTES || out.len() >= MAX_UNSENT
    }

    fn token_for(&mut self, request: &Request) -> Token {
        let weight = match request.command.get() {
            command::READ | command::WRITE => request.len.get(),
            _ => 0,
        };
        self.in_flight_bytes += u64::from(weight);
        let running = Some(Running { request: *request, weight });
        let slot = match self.free.pop() {
            Some(slot) => {
                self.running[usize::from(slot)] = running;
                slot
            }
            None => {
                self.running.push(running);
                // `is_full` keeps the table below MAX_IN_FLIGHT entries.
                (self.running.len() - 1) as u16
            }
        };
        Token(self.token_base | u64::from(slot))
    }

    /// Why a request is refused before the device sees it.
    fn refusal(&self, request: &Request) -> Option<Refusal> {
        let allowed = match request.command.get() {
            command::READ if self.style == Style::Structured => command_flag::DF,
            command::READ | command::WRITE | command::FLUSH | command::TRIM | command::CACHE => 0,
            command::WRITE_ZEROES => command_flag::NO_HOLE | command_flag::FAST_ZERO,
            command::BLOCK_STATUS => command_flag::REQ_ONE,
            _ => return Some(Refusal(errno::EINVAL, "unknown command")),
        };
        let writes = matches!(request.command.get(), command::WRITE | command::TRIM | command::WRITE_ZEROES);
        let payload = matches!(request.command.get(), command::READ | command::WRITE);
        if self.shutdown {
            Some(Refusal(errno::ESHUTDOWN, "the export is shutting down"))
        } else if writes && self.read_only {
            Some(Refusal(errno::EPERM, "the export is read-only"))
        } else if request.flags.get() & !(allowed | command_flag::FUA) != 0 {
            Some(Refusal(errno::EINVAL, "unknown command flag"))
        } else if payload && request.len.get() > proto::MAX_PAYLOAD {
            Some(Refusal(errno::EINVAL, "longer than the maximum payload of 32 MiB"))
        } else if request.command.get() == command::BLOCK_STATUS && self.base_allocation.is_none() {
            Some(Refusal(errno::EINVAL, "no metadata context was negotiated"))
        } else if request.command.get() == command::BLOCK_STATUS && request.len.get() == 0 {
            Some(Refusal(errno::EINVAL, "block status of nothing"))
        } else {
            None
        }
    }

    /// Begins a request whose header was followed by `tail`. Returns how much of `tail` it used, or `None` if a small
    /// write's payload is not there yet.
    fn start(
        &mut self,
        request: &Request,
        tail: &[u8],
        device: &mut dyn Device,
        out: &mut Outgoing,
    ) -> Result<Option<usize>, ProtoError> {
        if request.command.get() == command::DISC {
            self.state = State::Disconnected;
            return Ok(Some(0));
        }
        let is_write = request.command.get() == command::WRITE;
        let len = request.len.get();
        self.large_writes = is_write && len as usize >= DIRECT_PAYLOAD;
        if let Some(refusal) = self.refusal(request) {
            if is_write && len > MAX_DISCARD {
                return Err(ProtoError::Malformed("WRITE far beyond the maximum payload"));
            }
            if is_write {
                self.state = State::Discard { request: *request, left: len, refusal };
            } else {
                reply::error(out, self.style, request, refusal.0, refusal.1);
            }
            return Ok(Some(0));
        }
        if is_write {
            return Ok(self.start_write(request, tail, device, out));
        }
        self.stats.requests += 1;
        let (offset, long) = (request.offset.get(), u64::from(len));
        let fua = request.has(command_flag::FUA);
        match request.command.get() {
            command::FLUSH => {
                let token = self.token_for(request);
                device.flush(token);
            }
            // The protocol leaves zero lengths open; they touch nothing and succeed.
            _ if len == 0 => match request.command.get() {
                command::READ => reply::data(out, self.style, request, Outgoing::new(), &[]),
                _ => reply::done(out, request),
            },
            command::READ => self.read(request, device, out),
            command::TRIM => {
                let token = self.token_for(request);
                device.trim(token, offset, long, fua);
            }
            command::WRITE_ZEROES => {
                // Zeroing is metadata of any length, so FAST_ZERO never has to be refused.
                let no_hole = request.has(command_flag::NO_HOLE);
                let token = self.token_for(request);
                device.zero(token, offset, long, fua, no_hole);
            }
            command::CACHE => {
                let token = self.token_for(request);
                device.prefetch(token, offset, long);
            }
            command::BLOCK_STATUS => {
                let max = if request.has(command_flag::REQ_ONE) { 1 } else { MAX_EXTENTS };
                let token = self.token_for(request);
                device.extents(token, offset, long, max);
            }
            _ => unreachable!("`refusal` lets only known commands through"),
        }
        Ok(Some(0))
    }

    fn start_write(
        &mut self,
        request: &Request,
        tail: &[u8],
        device: &mut dyn Device,
        out: &mut Outgoing,
    ) -> Option<usize> {
        let len = request.len.get() as usize;
        if len < DIRECT_PAYLOAD && tail.len() < len {
            return None;
        }
        self.stats.requests += 1;
        self.stats.written_bytes += len as u64;
        if len == 0 {
            reply::done(out, request);
            return Some(0);
        }
        if len >= DIRECT_PAYLOAD {
            self.state = State::Payload { request: *request, buf: AlignedBuf::for_overwrite(len), filled: 0 };
            return Some(0);
        }
        let token = self.token_for(request);
        let fua = request.has(command_flag::FUA);
        device.write(token, request.offset.get(), WriteData::Copy(&tail[..len]), fua);
        Some(len)
    }

    /// Answers a read in place: the header goes out first and the device appends the data behind it.
    fn read(&mut self, request: &Request, device: &mut dyn Device, out: &mut Outgoing) {
        self.stats.read_bytes += u64::from(request.len.get());
        let start = out.len();
        reply::data_header(out, self.style, request, request.len.get());
        let body = out.len();
        let token = self.token_for(request);
        let slot = (token.0 & 0xffff) as u16;
        match device.read(token, request.offset.get(), request.len.get(), out) {
            ReadNow::Pending => {
                debug_assert_eq!(out.len(), body, "a pending read appends nothing");
                out.truncate(start);
            }
            ReadNow::Ready { holes } => {
                assert_eq!(out.len() - body, request.len.get() as usize, "short read");
                self.release(slot);
                if !holes.is_empty() && reply::splits(self.style, request) {
                    let bytes = out.split_off(body);
                    out.truncate(start);
                    reply::data(out, self.style, request, bytes, &holes);
                }
            }
            ReadNow::Failed(error) => {
                out.truncate(start);
                self.release(slot);
                if self.hangs_up_for(&error) {
                    self.state = State::Disconnected;
                    return;
                }
                reply::io_error(out, self.style, request, &error);
            }
        }
    }

    fn release(&mut self, slot: u16) {
        if let Some(running) = self.running[usize::from(slot)].take() {
            self.in_flight_bytes -= u64::from(running.weight);
            self.free.push(slot);
        }
    }
}

const _: () = assert!(MAX_IN_FLIGHT <= 1 << 16);

impl reactor::Session for Session {
    fn consume(
        &mut self,
        input: &[u8],
        device: &mut dyn Device,
        out: &mut Outgoing,
    ) -> Result<(usize, Progress), reactor::SessionError> {
        Ok(self.consume(input, device, out)?)
    }
    fn payload_mut(&mut self) -> Option<&mut [u8]> {
        self.payload_mut()
    }
    fn payload_received(&mut self, len: usize, device: &mut dyn Device, _: &mut Outgoing) {
        self.payload_received(len, device);
    }
    fn streams_large_writes(&self) -> bool {
        self.streams_large_writes()
    }
    fn complete(&mut self, slot: u16, result: Result<Outcome, IoError>, _: &mut dyn Device, out: &mut Outgoing) {
        self.complete(slot, result, out);
    }
    fn in_flight(&self) -> usize {
        self.in_flight()
    }
    fn stats(&self) -> SessionStats {
        self.stats()
    }
    fn shut_down(&mut self) {
        self.shut_down();
    }
    fn hangs_up_for(&self, error: &IoError) -> bool {
        self.hangs_up_for(error)
    }
}

impl From<SessionParams> for Client {
    fn from(params: SessionParams) -> Self {
        let (peer, export) = (params.peer.clone(), params.export.clone());
        Self { peer, export, group: 0, session: Box::new(move |base| Box::new(Session::new(&params, base))) }
    }
}
