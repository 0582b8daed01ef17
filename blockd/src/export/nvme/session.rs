//! An I/O queue: a state machine from PDUs to device calls, and from completions to PDUs.
//!
//! It performs no I/O; see [`crate::reactor::Session`]. Commands run concurrently and are answered in the order they
//! finish. Write data comes in the capsule, or is asked for by one R2T per command as soon as there is room for it. A
//! command that meets the end of the volume here (the daemon stops) is not answered at all: the connection ends, and the
//! host asks again where the volume is then.

use std::collections::VecDeque;
use std::sync::Arc;

use zerocopy::FromBytes;

use super::command::{Command, Completion, DataIn, Status, fuse, io, rw};
use super::controller::QueueNumber;
use super::data::{CopyRange, DsmRange, HostId, ReservationKeys};
use super::namespace::{Change, Entered, Namespace};
use super::pdu::{self, CommandCapsule, DIGEST, Framing, Header, PduError, Transfer, fatal, fes, flag, kind};
use super::reservation::{Access, Kind, Request};
use super::{COMPARE_WRITE_MAX, IN_CAPSULE_MAX, LBA_BYTES, NSID, NSID_ALL, TRANSFER_MAX, log_page};
use crate::buf::AlignedBuf;
use crate::outgoing::Outgoing;
use crate::reactor::{self, Client, DIRECT_PAYLOAD, Device, Progress, SessionError, SessionStats, Task};
use crate::types::BLOCK_SIZE;
use crate::volume::{IoError, Outcome, ReadNow, Token, WriteData};

/// Bytes that may be with the device before a connection is no longer read from.
const MAX_RUNNING_BYTES: u64 = 64 << 20;
/// Bytes that may be asked for by R2T at once.
const MAX_GRANTED_BYTES: u64 = 32 << 20;
/// Unsent bytes at which a connection is no longer read from. One more read may go past it.
const MAX_UNSENT: usize = 1 << 20;
/// Ranges of a Copy command, and blocks of all of them together.
pub const COPY_RANGES_MAX: u32 = 128;
/// See [`COPY_RANGES_MAX`].
pub const COPY_BLOCKS_MAX: u32 = TRANSFER_MAX / LBA_BYTES as u32;

/// A capsule with more data than this does not have to fit the receive buffer: its data is received where it belongs.
const IN_BUFFER_MAX: usize = DIRECT_PAYLOAD;

/// What the Connect command settled.
pub struct SessionParams {
    /// The host's address and its subsystem, for messages.
    pub peer: String,
    /// See there.
    pub export: String,
    /// Digests and alignment.
    pub framing: Framing,
    /// Entries of the submission queue.
    pub entries: u16,
    /// Whether the host wants to know how far the queue was read; else reads end with their data.
    pub flow_control: bool,
    /// Who asks.
    pub host: HostId,
    /// What it asks of.
    pub namespace: Arc<Namespace>,
    /// Refuse writes, whatever the device says, and reservations.
    pub read_only: bool,
    /// The group of its controller's connections.
    pub group: u64,
    /// Its place in its controller.
    pub number: Option<QueueNumber>,
}

impl From<SessionParams> for Client {
    fn from(params: SessionParams) -> Self {
        Self {
            peer: params.peer.clone(),
            export: params.export.clone(),
            group: params.group,
            session: Box::new(move |base| Box::new(Session::new(params, base))),
        }
    }
}

/// Data of a command.
enum Data<'a> {
    Borrowed(&'a [u8]),
    Owned(AlignedBuf, usize),
}

impl Data<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Data::Borrowed(bytes) => bytes,
            Data::Owned(buf, len) => &buf[..*len],
        }
    }
}

/// What a command that was accepted waits for.
enum Stage {
    /// An R2T, for so many bytes.
    Grant(u32),
    /// Its data: buffer, how much there must be, how much is there.
    Receiving { buf: AlignedBuf, len: usize, filled: usize },
    /// The device, and nothing else.
    Device,
    /// The data of a read.
    Read,
    /// The data of a read that is not sent.
    Verify,
    /// The data of a read to compare with this.
    Compare(Vec<u8>),
    /// So many answers of the device; the first failure.
    Several { left: usize, failed: Option<Status> },
    /// The ranges of a copy, one after the other, and what was read so far.
    Copy { ranges: VecDeque<(u64, u32)>, data: Vec<u8> },
    /// The first of a fused pair: what to compare with, and the second once that is known.
    FusedFirst { expected: Option<Vec<u8>>, second: Option<u16> },
    /// The second of a fused pair: the first, and what to write.
    FusedSecond { first: u16, data: Option<Vec<u8>> },
    /// A task.
    Task,
}

struct Running {
    command: Command,
    stage: Stage,
    /// Counted against [`MAX_RUNNING_BYTES`].
    weight: u64,
    entered: Option<Entered>,
}

enum State {
    /// A PDU comes next.
    Header,
    /// So many bytes for a command, then a digest, if one was settled; `len` in all.
    Payload { slot: u16, left: usize, len: usize },
    /// The digest of the last `len` bytes received for a command.
    Digest { slot: u16, len: usize },
    /// So many bytes that nobody wants, then the refusal of the command that they came with.
    Discard { cid: u16, left: usize, status: Status },
}

/// See the module.
pub struct Session {
    framing: Framing,
    entries: u16,
    sq_head: u16,
    flow_control: bool,
    host: HostId,
    namespace: Arc<Namespace>,
    read_only: bool,
    /// Upper bits of every token.
    token_base: u64,
    running: Vec<Option<Running>>,
    free: Vec<u16>,
    /// With the device, or with a task.
    busy: usize,
    running_bytes: u64,
    granted_bytes: u64,
    grants: VecDeque<u16>,
    /// The first of a fused pair whose second has not come.
    fused: Option<u16>,
    tasks: Vec<(u16, Task)>,
    state: State,
    shutdown: bool,
    large_writes: bool,
    broken: Option<&'static str>,
    stats: SessionStats,
    _number: Option<QueueNumber>,
}

impl Session {
    /// A session whose tokens are `token_base` plus a number below 2^16; the low 16 bits of `token_base` must be 0.
    pub fn new(params: SessionParams, token_base: u64) -> Self {
        assert_eq!(token_base & 0xffff, 0, "tokens need their low 16 bits");
        assert!(params.entries > 1, "a queue of one entry is always full");
        Self {
            framing: params.framing,
            entries: params.entries,
            // The Connect command was its first.
            sq_head: 1 % params.entries,
            flow_control: params.flow_control,
            host: params.host,
            namespace: params.namespace,
            read_only: params.read_only,
            token_base,
            running: Vec::new(),
            free: Vec::new(),
            busy: 0,
            running_bytes: 0,
            granted_bytes: 0,
            grants: VecDeque::new(),
            fused: None,
            tasks: Vec::new(),
            state: State::Header,
            shutdown: false,
            large_writes: false,
            broken: None,
            stats: SessionStats::default(),
            _number: params.number,
        }
    }

    fn consume_pdus(
        &mut self,
        input: &[u8],
        device: &mut dyn Device,
        out: &mut Outgoing,
    ) -> Result<(usize, Progress), PduError> {
        let mut rest = input;
        let progress = loop {
            if self.broken.is_some() || self.shutdown {
                break Progress::Disconnect;
            }
            match self.state {
                State::Payload { slot, left, len } => {
                    let part = rest.len().min(left);
                    if let Some(Stage::Receiving { buf, filled, .. }) = self.stage(slot) {
                        buf[*filled..][..part].copy_from_slice(&rest[..part]);
                    }
                    rest = &rest[part..];
                    self.payload_filled(slot, part, left, len, device, out);
                    if matches!(self.state, State::Payload { .. }) {
                        break Progress::NeedPayload;
                    }
                }
                State::Digest { slot, len } => {
                    let Some((digest, tail)) = rest.split_first_chunk::<DIGEST>() else {
                        break Progress::NeedBytes;
                    };
                    rest = tail;
                    self.state = State::Header;
                    let intact = match self.stage(slot) {
                        Some(Stage::Receiving { buf, filled, .. }) => {
                            Framing::data_digest_matches(&buf[*filled - len..*filled], *digest)
                        }
                        _ => true,
                    };
                    if intact {
                        self.data_arrived(slot, device, out);
                    } else {
                        self.fail_receiving(slot, out);
                    }
                }
                State::Discard { cid, left, status } => {
                    let skipped = rest.len().min(left);
                    rest = &rest[skipped..];
                    if skipped < left {
                        self.state = State::Discard { cid, left: left - skipped, status };
                        break Progress::NeedBytes;
                    }
                    self.state = State::Header;
                    self.answer(cid, status, 0, out);
                }
                State::Header => {
                    if self.running_bytes >= MAX_RUNNING_BYTES || out.len() >= MAX_UNSENT {
                        break Progress::Busy;
                    }
                    match self.pdu(rest, device, out) {
                        Ok(0) => break Progress::NeedBytes,
                        Ok(used) => rest = &rest[used..],
                        Err(error) => {
                            Framing::put_terminate(out, &error, rest);
                            return Err(error);
                        }
                    }
                }
            }
        };
        self.grant(out);
        Ok((input.len() - rest.len(), progress))
    }

    /// Takes a PDU, or the head of one whose data goes elsewhere. Returns how many bytes it used, 0 if there are too few.
    fn pdu(&mut self, input: &[u8], device: &mut dyn Device, out: &mut Outgoing) -> Result<usize, PduError> {
        let Some((header, _)) = pdu::take::<Header>(input) else { return Ok(0) };
        let pdo = self.framing.check(&header)?;
        let len = self.framing.data_len(&header, pdo);
        let plen = header.plen.get() as usize;
        match header.kind {
            kind::CAPSULE_CMD => {
                if len > IN_CAPSULE_MAX as usize {
                    return Err(fatal(fes::INVALID_HEADER, 4, "a capsule with more data than it may carry"));
                }
                if input.len() < if len > IN_BUFFER_MAX { pdo } else { plen } {
                    return Ok(0);
                }
                self.framing.check_header_digest(input, size_of::<CommandCapsule>())?;
                let (capsule, _) = pdu::take::<CommandCapsule>(input).expect("its length was checked");
                if len > IN_BUFFER_MAX {
                    self.long_capsule(&capsule.command, len, out)?;
                    return Ok(pdo);
                }
                let data = if len > 0 { &input[pdo..pdo + len] } else { &[] };
                let digest = input[..plen].get(pdo + len..).and_then(|tail| tail.first_chunk().copied());
                let intact = len == 0
                    || !self.framing.data_digest
                    || digest.is_some_and(|digest| Framing::data_digest_matches(data, digest));
                self.command(&capsule.command, data, intact, device, out)?;
                Ok(plen)
            }
            kind::H2C_DATA => {
                if input.len() < pdo {
                    return Ok(0);
                }
                self.framing.check_header_digest(input, size_of::<Transfer>())?;
                let (head, _) = pdu::take::<Transfer>(input).expect("its length was checked");
                self.data_begins(&head, len)?;
                Ok(pdo)
            }
            kind::H2C_TERM_REQ => {
                if input.len() < plen {
                    return Ok(0);
                }
                let status = pdu::take::<pdu::Terminate>(input).map_or(0, |(head, _)| head.status.get());
                Err(PduError::Terminated(status))
            }
            _ => unreachable!("the check lets only known types through"),
        }
    }

    fn data_begins(&mut self, head: &Transfer, len: usize) -> Result<(), PduError> {
        let (slot, cid) = (head.tag.get(), head.cid.get());
        let running = self.running.get_mut(usize::from(slot)).and_then(Option::as_mut);
        let Some(Running { command, stage: Stage::Receiving { len: total, filled, .. }, .. }) = running else {
            return Err(fatal(fes::INVALID_HEADER, 10, "data with a transfer tag that was not given"));
        };
        if command.cid.get() != cid {
            return Err(fatal(fes::INVALID_HEADER, 8, "data for another command than its transfer tag"));
        }
        if head.len.get() as usize != len || len == 0 {
            return Err(fatal(fes::INVALID_HEADER, 16, "data of another length than its header says"));
        }
        if head.offset.get() as usize != *filled {
            return Err(fatal(fes::OUT_OF_RANGE, 12, "data at another offset than where the last ended"));
        }
        if len > *total - *filled {
            return Err(fatal(fes::OUT_OF_RANGE, 16, "more data than was asked for"));
        }
        if (head.header.flags & flag::LAST != 0) != (*filled + len == *total) {
            return Err(fatal(fes::INVALID_HEADER, 1, "the last data is not marked as such, or other data is"));
        }
        self.large_writes = len >= DIRECT_PAYLOAD;
        self.state = State::Payload { slot, left: len, len };
        Ok(())
    }

    fn stage(&mut self, slot: u16) -> Option<&mut Stage> {
        self.running.get_mut(usize::from(slot))?.as_mut().map(|running| &mut running.stage)
    }

    /// `part` of the `left` bytes came.
    fn payload_filled(
        &mut self,
        slot: u16,
        part: usize,
        left: usize,
        len: usize,
        device: &mut dyn Device,
        out: &mut Outgoing,
    ) {
        if let Some(Stage::Receiving { filled, .. }) = self.stage(slot) {
            *filled += part;
        }
        if part < left {
            self.state = State::Payload { slot, left: left - part, len };
        } else if self.framing.data_digest {
            self.state = State::Digest { slot, len };
        } else {
            self.state = State::Header;
            self.data_arrived(slot, device, out);
        }
    }

    /// A data PDU is complete; perhaps all of the command's data is.
    fn data_arrived(&mut self, slot: u16, device: &mut dyn Device, out: &mut Outgoing) {
        let Some(stage) = self.stage(slot) else { return };
        let Stage::Receiving { len, filled, .. } = stage else { return };
        if filled < len {
            return;
        }
        let Stage::Receiving { buf, len, .. } = std::mem::replace(stage, Stage::Device) else { return };
        self.granted_bytes -= len as u64;
        self.execute(slot, Data::Owned(buf, len), device, out);
        self.grant(out);
    }

    fn fail_receiving(&mut self, slot: u16, out: &mut Outgoing) {
        if let Some(Stage::Receiving { len, .. }) = self.stage(slot) {
            self.granted_bytes -= *len as u64;
        }
        self.fail(slot, Status::TRANSPORT, out);
        self.grant(out);
    }

    /// Asks for data as far as there is room for it.
    fn grant(&mut self, out: &mut Outgoing) {
        while let Some(&slot) = self.grants.front() {
            let Some(Running { command, stage, .. }) = self.running[usize::from(slot)].as_mut() else {
                self.grants.pop_front();
                continue;
            };
            let Stage::Grant(len) = *stage else {
                self.grants.pop_front();
                continue;
            };
            if self.granted_bytes > 0 && self.granted_bytes + u64::from(len) > MAX_GRANTED_BYTES {
                break;
            }
            self.grants.pop_front();
            self.granted_bytes += u64::from(len);
            let buf = AlignedBuf::for_overwrite(len as usize);
            *stage = Stage::Receiving { buf, len: len as usize, filled: 0 };
            self.framing.put_r2t(out, command.cid.get(), slot, 0, len);
        }
    }

    /// Begins a command.
    fn command(
        &mut self,
        command: &Command,
        data: &[u8],
        intact: bool,
        device: &mut dyn Device,
        out: &mut Outgoing,
    ) -> Result<(), PduError> {
        let first = self.count()?;
        if command.fused() != fuse::SECOND
            && let Some(first) = first
        {
            self.fail(first, Status::FUSED_MISSING, out);
        }
        if command.opcode == io::READ && command.fused() == 0 && intact {
            self.read_at_once(command, device, out);
            return Ok(());
        }
        let slot = self.new_slot(command);
        if !intact {
            if command.fused() == fuse::SECOND
                && let Some(first) = first
            {
                self.fail(first, Status::FUSED_MISSING, out);
            }
            self.fail(slot, Status::TRANSPORT, out);
            return Ok(());
        }
        let begun = match command.fused() {
            0 => self.begin(slot, command),
            fuse::FIRST => self.begin_first(slot, command),
            fuse::SECOND => match first {
                Some(first) => {
                    let begun = self.begin_second(slot, first, command);
                    if begun.is_err() {
                        self.fail(first, Status::FUSED_MISSING, out);
                    }
                    begun
                }
                None => Err(Status::FUSED_MISSING),
            },
            _ => Err(Status::INVALID_FIELD),
        };
        match begun.and_then(|takes| self.find_data(command, takes, data.len())) {
            Ok(Found::Here(range)) => self.execute(slot, Data::Borrowed(&data[range]), device, out),
            Ok(Found::AskFor(len)) => {
                self.large_writes = len as usize >= DIRECT_PAYLOAD;
                self.ask_for_data(slot, len);
            }
            Err(status) => self.fail_with_partner(slot, status, out),
        }
        Ok(())
    }

    /// Begins a command whose data comes behind it and is received into memory of its own.
    fn long_capsule(&mut self, command: &Command, len: usize, out: &mut Outgoing) -> Result<(), PduError> {
        if let Some(first) = self.count()? {
            // What comes in pairs is short.
            self.fail(first, Status::FUSED_MISSING, out);
        }
        let slot = self.new_slot(command);
        let begun = match command.fused() {
            0 => self.begin(slot, command),
            _ => Err(Status::INVALID_FIELD),
        };
        match begun.and_then(|takes| self.find_data(command, takes, len)) {
            Ok(Found::Here(range)) if range == (0..len) => {
                self.leave(slot);
                self.busy -= 1;
                self.granted_bytes += len as u64;
                let buf = AlignedBuf::for_overwrite(len);
                *self.stage(slot).expect("just begun") = Stage::Receiving { buf, len, filled: 0 };
                self.state = State::Payload { slot, left: len, len };
                self.large_writes = true;
            }
            found => {
                let status = found.err().unwrap_or(Status::SGL_LENGTH);
                // A host that hears of it while it still sends may let go of what it sends. The command itself is over: nobody
                // waits for the rest, neither who closes the connection nor who preempts the host's reservation.
                self.release(slot);
                let left = len + self.framing.data_digest_len();
                self.state = State::Discard { cid: command.cid.get(), left, status };
            }
        }
        Ok(())
    }

    /// Counts a command that came. Returns the first of a pair that this should be the second of.
    fn count(&mut self) -> Result<Option<u16>, PduError> {
        if self.running.len() - self.free.len() >= usize::from(self.entries) {
            return Err(fatal(fes::SEQUENCE, 0, "more commands than the queue has entries"));
        }
        self.sq_head = (self.sq_head + 1) % self.entries;
        self.stats.requests += 1;
        self.large_writes = false;
        Ok(self.fused.take())
    }

    /// What [`Self::new_slot`] would return.
    fn next_slot(&self) -> u16 {
        // The queue has fewer than 2^16 entries.
        self.free.last().copied().unwrap_or(self.running.len() as u16)
    }

    fn new_slot(&mut self, command: &Command) -> u16 {
        let running = Some(Running { command: *command, stage: Stage::Device, weight: 0, entered: None });
        self.busy += 1;
        match self.free.pop() {
            Some(slot) => {
                self.running[usize::from(slot)] = running;
                slot
            }
            None => {
                self.running.push(running);
                // The queue has fewer than 2^16 entries.
                (self.running.len() - 1) as u16
            }
        }
    }

    /// A read, which most often is answered in place, before anything has to be remembered of it: the header goes out first
    /// and the device appends the data behind it.
    fn read_at_once(&mut self, command: &Command, device: &mut dyn Device, out: &mut Outgoing) {
        let checked = self.check(command).and_then(|_| {
            let len = command.blocks() * LBA_BYTES;
            if u64::from(command.data_out()?) != len {
                return Err(Status::SGL_LENGTH);
            }
            // A length that was checked against TRANSFER_MAX.
            Ok((byte_offset(command.lba())?, len as u32, self.namespace.enter(&self.host, Access::Read)?))
        });
        let (offset, len, entered) = match checked {
            Ok(checked) => checked,
            Err(status) => return self.answer(command.cid.get(), status, 0, out),
        };
        self.stats.read_bytes += u64::from(len);
        let start = out.len();
        self.framing.put_data_header(out, command.cid.get(), len, !self.flow_control);
        let body = out.len();
        let token = Token(self.token_base | u64::from(self.next_slot()));
        match device.read(token, offset, len, out) {
            ReadNow::Ready { .. } => {
                assert_eq!(out.len() - body, len as usize, "short read");
                self.framing.put_data_digest(out, body);
                self.namespace.leave(entered);
                if self.flow_control {
                    self.answer(command.cid.get(), Status::SUCCESS, 0, out);
                }
            }
            ReadNow::Pending => {
                out.truncate(start);
                let slot = self.new_slot(command);
                self.weigh(slot, len.into());
                let running = self.running[usize::from(slot)].as_mut().expect("just made");
                running.stage = Stage::Read;
                running.entered = Some(entered);
            }
            ReadNow::Failed(error) => {
                out.truncate(start);
                self.namespace.leave(entered);
                let slot = self.new_slot(command);
                self.io_failed(slot, &error, out);
            }
        }
    }

    /// Whether a command makes sense, and how much data it takes: at least so many bytes.
    fn begin(&mut self, slot: u16, command: &Command) -> Result<Takes, Status> {
        let takes = self.check(command)?;
        self.enter(slot, command)?;
        Ok(takes)
    }

    /// The part of [`Self::begin`] that leaves no trace.
    fn check(&self, command: &Command) -> Result<Takes, Status> {
        let takes = match command.opcode {
            io::RESERVATION_REPORT if !self.read_only => Takes::Nothing,
            io::READ | io::WRITE_ZEROES | io::VERIFY | io::FLUSH => Takes::Nothing,
            io::WRITE | io::COMPARE => Takes::Exactly(command.blocks() * LBA_BYTES),
            io::DATASET_MANAGEMENT => {
                Takes::AtLeast(u64::from((command.dword(10) & 0xff) + 1) * size_of::<DsmRange>() as u64)
            }
            io::COPY => {
                let ranges = (command.dword(12) & 0xff) + 1;
                if ranges > COPY_RANGES_MAX {
                    return Err(Status::SIZE_LIMIT);
                }
                Takes::AtLeast(u64::from(ranges) * size_of::<CopyRange>() as u64)
            }
            opcode if self.read_only && is_reservation(opcode) => return Err(Status::INVALID_OPCODE),
            io::RESERVATION_REGISTER | io::RESERVATION_ACQUIRE => Takes::AtLeast(16),
            io::RESERVATION_RELEASE => Takes::AtLeast(8),
            _ => return Err(Status::INVALID_OPCODE),
        };
        let nsid = command.nsid.get();
        if nsid != NSID && !(nsid == NSID_ALL && command.opcode == io::FLUSH) {
            return Err(Status::INVALID_NAMESPACE);
        }
        let moves = match command.opcode {
            io::READ | io::VERIFY | io::WRITE | io::COMPARE => command.blocks() * LBA_BYTES,
            _ => 0,
        };
        if moves > u64::from(TRANSFER_MAX) {
            return Err(Status::INVALID_FIELD);
        }
        let reads_or_writes =
            matches!(command.opcode, io::READ | io::WRITE | io::COMPARE | io::VERIFY | io::WRITE_ZEROES);
        if reads_or_writes && command.dword(12) & rw::PROTECTION != 0 {
            return Err(Status::INVALID_FIELD);
        }
        if self.read_only && access_of(command) == Some(Access::Write) && command.opcode != io::FLUSH {
            return Err(Status::WRITE_PROTECTED);
        }
        Ok(takes)
    }

    fn enter(&mut self, slot: u16, command: &Command) -> Result<(), Status> {
        if let Some(access) = access_of(command) {
            let entered = self.namespace.enter(&self.host, access)?;
            self.running[usize::from(slot)].as_mut().expect("it runs").entered = Some(entered);
        }
        Ok(())
    }

    /// A command that waits for its host must not be waited for: who preempts a host's reservation does so because
    /// that host is dead.
    fn leave(&mut self, slot: u16) {
        let entered = self.running[usize::from(slot)].as_mut().and_then(|running| running.entered.take());
        if let Some(entered) = entered {
            self.namespace.leave(entered);
        }
    }

    fn begin_first(&mut self, slot: u16, command: &Command) -> Result<Takes, Status> {
        if command.opcode != io::COMPARE {
            return Err(Status::INVALID_FIELD);
        }
        let takes = self.begin(slot, command)?;
        if command.blocks() * LBA_BYTES > u64::from(COMPARE_WRITE_MAX) {
            return Err(Status::INVALID_FIELD);
        }
        self.leave(slot);
        self.fused = Some(slot);
        *self.stage(slot).expect("just begun") = Stage::FusedFirst { expected: None, second: None };
        Ok(takes)
    }

    fn begin_second(&mut self, slot: u16, first: u16, command: &Command) -> Result<Takes, Status> {
        let Some(Running { command: compare, .. }) = &self.running[usize::from(first)] else {
            return Err(Status::FUSED_FAILED);
        };
        let same = compare.lba() == command.lba() && compare.blocks() == command.blocks();
        if command.opcode != io::WRITE || !same {
            return Err(Status::INVALID_FIELD);
        }
        let takes = self.begin(slot, command)?;
        *self.stage(slot).expect("just begun") = Stage::FusedSecond { first, data: None };
        if let Some(Stage::FusedFirst { second, .. }) = self.stage(first) {
            *second = Some(slot);
        }
        Ok(takes)
    }

    fn find_data(&self, command: &Command, takes: Takes, carried: usize) -> Result<Found, Status> {
        let (least, most) = match takes {
            Takes::Nothing => return Ok(Found::Here(0..0)),
            Takes::Exactly(len) => (len, len),
            Takes::AtLeast(len) => (len, u64::from(TRANSFER_MAX)),
        };
        match command.data_in(carried)? {
            DataIn::Capsule(at, len) if (least..=most).contains(&(len as u64)) => Ok(Found::Here(at..at + len)),
            // In pairs both must be there at the same time, and they are short.
            DataIn::Transport(_) if command.fused() != 0 => Err(Status::SGL_TYPE),
            DataIn::Transport(len) if (least..=most).contains(&u64::from(len)) => Ok(Found::AskFor(len)),
            _ => Err(Status::SGL_LENGTH),
        }
    }

    fn ask_for_data(&mut self, slot: u16, len: u32) {
        self.leave(slot);
        *self.stage(slot).expect("just begun") = Stage::Grant(len);
        self.busy -= 1;
        self.grants.push_back(slot);
    }

    /// Gives a command whose data is complete to the device.
    fn execute(&mut self, slot: u16, data: Data<'_>, device: &mut dyn Device, out: &mut Outgoing) {
        let Some(running) = &self.running[usize::from(slot)] else { return };
        let command = running.command;
        if let Data::Owned(..) = data {
            // It waited for its data outside of that count, and without a right to anything.
            self.busy += 1;
            if let Err(status) = self.enter(slot, &command) {
                return self.fail(slot, status, out);
            }
        }
        let Some(running) = self.running[usize::from(slot)].as_mut() else { return };
        match &mut running.stage {
            Stage::FusedFirst { expected, .. } => {
                *expected = Some(data.bytes().to_vec());
                return;
            }
            Stage::FusedSecond { first, data: written } => {
                *written = Some(data.bytes().to_vec());
                let first = *first;
                return self.execute_pair(first, slot, device);
            }
            _ => {}
        }
        let token = Token(self.token_base | u64::from(slot));
        match self.start(slot, token, &command, data, device, out) {
            Ok(()) => {}
            Err(status) => self.fail(slot, status, out),
        }
    }

    fn start(
        &mut self,
        slot: u16,
        token: Token,
        command: &Command,
        data: Data<'_>,
        device: &mut dyn Device,
        out: &mut Outgoing,
    ) -> Result<(), Status> {
        let fua = command.dword(12) & rw::FUA != 0;
        let len = command.blocks() * LBA_BYTES;
        match command.opcode {
            io::FLUSH => device.flush(token),
            io::WRITE => {
                let offset = byte_offset(command.lba())?;
                self.weigh(slot, len);
                self.stats.written_bytes += len;
                let aligned = offset.is_multiple_of(BLOCK_SIZE) && len.is_multiple_of(BLOCK_SIZE);
                match data {
                    Data::Owned(buf, len) if aligned => device.write(token, offset, WriteData::Owned(buf, len), fua),
                    data => device.write(token, offset, WriteData::Copy(data.bytes()), fua),
                }
            }
            io::VERIFY | io::COMPARE => {
                let stage = match command.opcode {
                    io::VERIFY => Stage::Verify,
                    _ => Stage::Compare(data.bytes().to_vec()),
                };
                *self.stage(slot).expect("it runs") = stage;
                self.read_aside(slot, token, byte_offset(command.lba())?, len as u32, device, out);
            }
            io::WRITE_ZEROES => {
                let offset = byte_offset(command.lba())?;
                let no_hole = command.dword(12) & rw::DEALLOCATE == 0;
                device.zero(token, offset, len, fua, no_hole);
            }
            io::DATASET_MANAGEMENT => self.deallocate(slot, token, command, data.bytes(), device, out)?,
            io::COPY => self.copy(slot, token, command, data.bytes(), device, out)?,
            io::RESERVATION_REPORT => {
                // 0's based dwords; hosts here have identifiers of 128 bits, which only the extended form can say.
                if command.dword(11) & 1 == 0 {
                    return Err(Status::HOST_ID_FORMAT);
                }
                let asked = (u64::from(command.dword(10)) + 1) * 4;
                let room = command.data_out()?;
                if asked.min(room.into()) > u64::from(TRANSFER_MAX) {
                    return Err(Status::INVALID_FIELD);
                }
                let mut page = log_page::reservation_report(&self.namespace.reservations());
                page.resize(asked.min(u64::from(room)) as usize, 0);
                self.framing.put_data(out, command.cid.get(), page.into(), false);
                self.finish(slot, Status::SUCCESS, 0, out);
            }
            _ => {
                let change = reservation_change(command, data.bytes(), self.host)?;
                *self.stage(slot).expect("it runs") = Stage::Task;
                let namespace = self.namespace.clone();
                self.tasks.push((slot, Box::pin(async move { u32::from(namespace.change(change).await.0) })));
            }
        }
        Ok(())
    }

    fn execute_pair(&mut self, first: u16, second: u16, device: &mut dyn Device) {
        let Some(Stage::FusedSecond { data, .. }) = self.stage(second) else { return };
        let data = data.take().unwrap_or_default();
        let Some(Stage::FusedFirst { expected, .. }) = self.stage(first) else { return };
        let expected = expected.take().unwrap_or_default();
        let command = self.running[usize::from(second)].as_ref().expect("it runs").command;
        let fua = command.dword(12) & rw::FUA != 0;
        self.weigh(second, data.len() as u64);
        self.stats.written_bytes += data.len() as u64;
        let token = Token(self.token_base | u64::from(second));
        // Beyond any volume when it does not fit; the device refuses it.
        let offset = byte_offset(command.lba()).unwrap_or(u64::MAX - u64::from(COMPARE_WRITE_MAX));
        device.compare_write(token, offset, expected, data, fua);
    }

    fn weigh(&mut self, slot: u16, bytes: u64) {
        if let Some(running) = self.running[usize::from(slot)].as_mut() {
            running.weight += bytes;
            self.running_bytes += bytes;
        }
    }

    /// After the data of a read: without flow control that was its completion, too.
    fn finish_read(&mut self, slot: u16, out: &mut Outgoing) {
        if self.flow_control {
            self.finish(slot, Status::SUCCESS, 0, out);
        } else {
            self.release(slot);
        }
    }

    /// Reads for other purposes than to send.
    fn read_aside(
        &mut self,
        slot: u16,
        token: Token,
        offset: u64,
        len: u32,
        device: &mut dyn Device,
        out: &mut Outgoing,
    ) {
        self.stats.read_bytes += u64::from(len);
        self.weigh(slot, u64::from(len));
        let mut bytes = Outgoing::new();
        match device.read(token, offset, len, &mut bytes) {
            ReadNow::Pending => {}
            ReadNow::Ready { .. } => self.read_is_there(slot, bytes, device, out),
            ReadNow::Failed(error) => self.io_failed(slot, &error, out),
        }
    }

    /// The data of a read, wherever it goes.
    fn read_is_there(&mut self, slot: u16, bytes: Outgoing, device: &mut dyn Device, out: &mut Outgoing) {
        let Some(running) = self.running[usize::from(slot)].as_mut() else { return };
        let cid = running.command.cid.get();
        match &mut running.stage {
            Stage::Read => {
                self.framing.put_data(out, cid, bytes, !self.flow_control);
                self.finish_read(slot, out);
            }
            Stage::Verify => self.finish(slot, Status::SUCCESS, 0, out),
            Stage::Compare(expected) => {
                let status = if bytes == expected[..] { Status::SUCCESS } else { Status::COMPARE_FAILURE };
                self.finish(slot, status, 0, out);
            }
            Stage::Copy { data, .. } => {
                bytes.pieces(0).for_each(|piece| data.extend_from_slice(piece));
                self.copy_on(slot, device, out);
            }
            _ => debug_assert!(false, "data for a command that reads nothing"),
        }
    }

    fn deallocate(
        &mut self,
        slot: u16,
        token: Token,
        command: &Command,
        data: &[u8],
        device: &mut dyn Device,
        out: &mut Outgoing,
    ) -> Result<(), Status> {
        const DEALLOCATE: u32 = 1 << 2;
        let count = (command.dword(10) & 0xff) as usize + 1;
        let ranges =
            <[DsmRange]>::ref_from_bytes(&data[..count * size_of::<DsmRange>()]).map_err(|_| Status::INVALID_FIELD)?;
        let mut parts = Vec::with_capacity(count);
        for range in ranges {
            let offset = byte_offset(range.lba.get())?;
            let len = u64::from(range.blocks.get()) * LBA_BYTES;
            if offset.checked_add(len).is_none_or(|end| end > device.size()) {
                return Err(Status::LBA_OUT_OF_RANGE);
            }
            if len > 0 {
                parts.push((offset, len));
            }
        }
        // The other attributes are advice.
        if command.dword(11) & DEALLOCATE == 0 || parts.is_empty() {
            self.finish(slot, Status::SUCCESS, 0, out);
            return Ok(());
        }
        *self.stage(slot).expect("it runs") = Stage::Several { left: parts.len(), failed: None };
        for (offset, len) in parts {
            device.trim(token, offset, len, false);
        }
        Ok(())
    }

    /// Copies by reference where the ranges are whole blocks of the device and no source overlaps the target. Else by reading
    /// and writing: what was read is from one moment for each range; the write is one write.
    fn copy(
        &mut self,
        slot: u16,
        token: Token,
        command: &Command,
        data: &[u8],
        device: &mut dyn Device,
        out: &mut Outgoing,
    ) -> Result<(), Status> {
        let count = (command.dword(12) & 0xff) as usize + 1;
        if (command.dword(12) >> 8) & 0xf != 0 || command.dword(12) & rw::PROTECTION != 0 {
            return Err(Status::INVALID_FIELD);
        }
        let sources = <[CopyRange]>::ref_from_bytes(&data[..count * size_of::<CopyRange>()])
            .map_err(|_| Status::INVALID_FIELD)?;
        let mut ranges = VecDeque::with_capacity(count);
        let mut total = 0;
        for source in sources {
            let blocks = u32::from(source.blocks.get()) + 1;
            total += blocks;
            ranges.push_back((byte_offset(source.lba.get())?, blocks * LBA_BYTES as u32));
        }
        if total > COPY_BLOCKS_MAX {
            return Err(Status::SIZE_LIMIT);
        }
        let target = byte_offset(command.lba())?;
        let target_end = target.checked_add(u64::from(total) * LBA_BYTES);
        let ends = ranges.iter().map(|(offset, len)| offset.checked_add(u64::from(*len))).chain([target_end]);
        if ends.into_iter().any(|end| end.is_none_or(|end| end > device.size())) {
            return Err(Status::LBA_OUT_OF_RANGE);
        }
        let target_end = target + u64::from(total) * LBA_BYTES;
        let whole = |bytes: u64| bytes.is_multiple_of(BLOCK_SIZE);
        let apart = |(offset, len): &(u64, u32)| {
            let (offset, len) = (*offset, u64::from(*len));
            whole(offset) && whole(len) && (offset + len <= target || offset >= target_end)
        };
        if !whole(target) || !ranges.iter().all(apart) {
            *self.stage(slot).expect("it runs") = Stage::Copy { ranges, data: Vec::new() };
            self.copy_on(slot, device, out);
            return Ok(());
        }
        *self.stage(slot).expect("it runs") = Stage::Several { left: ranges.len(), failed: None };
        self.stats.written_bytes += u64::from(total) * LBA_BYTES;
        let fua = command.dword(12) & rw::FUA != 0;
        let mut to = target;
        for (offset, len) in ranges {
            device.copy(token, offset, to, len.into(), fua);
            to += u64::from(len);
        }
        Ok(())
    }

    /// Reads the next range of a copy, or writes when all were read.
    fn copy_on(&mut self, slot: u16, device: &mut dyn Device, out: &mut Outgoing) {
        let token = Token(self.token_base | u64::from(slot));
        let Some(Running { command, stage: Stage::Copy { ranges, data }, .. }) =
            self.running[usize::from(slot)].as_mut()
        else {
            return;
        };
        let command = *command;
        if let Some((offset, len)) = ranges.pop_front() {
            return self.read_aside(slot, token, offset, len, device, out);
        }
        let data = std::mem::take(data);
        *self.stage(slot).expect("it runs") = Stage::Device;
        self.stats.written_bytes += data.len() as u64;
        let fua = command.dword(12) & rw::FUA != 0;
        match byte_offset(command.lba()) {
            Ok(offset) => device.write(token, offset, WriteData::Copy(&data), fua),
            Err(status) => self.fail(slot, status, out),
        }
    }

    fn completed(&mut self, slot: u16, result: Result<Outcome, IoError>, device: &mut dyn Device, out: &mut Outgoing) {
        let Some(running) = self.running.get_mut(usize::from(slot)).and_then(Option::as_mut) else {
            debug_assert!(false, "completion of a request that does not run");
            return;
        };
        if let Stage::Several { left, failed } = &mut running.stage {
            *left -= 1;
            if let Err(error) = result {
                if let IoError::Shutdown = error {
                    self.broken = Some("the volume is closing");
                }
                *failed = failed.or(Some(status_of(&error)));
            }
            if *left == 0 {
                let status = failed.unwrap_or(Status::SUCCESS);
                self.finish(slot, status, 0, out);
            }
            return;
        }
        match result {
            Ok(Outcome::Data(data)) => self.read_is_there(slot, data.bytes, device, out),
            Ok(Outcome::Done | Outcome::Extents(_)) => {
                if let Stage::FusedSecond { first, .. } = running.stage {
                    self.finish(first, Status::SUCCESS, 0, out);
                }
                self.finish(slot, Status::SUCCESS, 0, out);
            }
            Ok(Outcome::Mismatch) => {
                if let Stage::FusedSecond { first, .. } = running.stage {
                    self.finish(first, Status::COMPARE_FAILURE, 0, out);
                }
                self.finish(slot, Status::FUSED_FAILED, 0, out);
            }
            Err(error) => self.io_failed(slot, &error, out),
        }
        self.grant(out);
    }

    fn io_failed(&mut self, slot: u16, error: &IoError, out: &mut Outgoing) {
        if let IoError::Shutdown = error {
            // To the host this is a pause: its connection ends, and it asks again.
            self.broken = Some("the volume is closing");
        }
        self.fail_with_partner(slot, status_of(error), out);
    }

    /// Fails a command, and the first of its pair if it is the second.
    fn fail_with_partner(&mut self, slot: u16, status: Status, out: &mut Outgoing) {
        if self.fused == Some(slot) {
            self.fused = None;
        }
        if let Some(Stage::FusedSecond { first, .. }) = self.stage(slot) {
            let first = *first;
            self.finish(first, Status::FUSED_FAILED, 0, out);
        }
        self.finish(slot, status, 0, out);
    }

    fn fail(&mut self, slot: u16, status: Status, out: &mut Outgoing) {
        self.finish(slot, status, 0, out);
    }

    /// Answers a command and forgets it.
    fn finish(&mut self, slot: u16, status: Status, result: u64, out: &mut Outgoing) {
        let Some(running) = &self.running[usize::from(slot)] else { return };
        self.answer(running.command.cid.get(), status, result, out);
        self.release(slot);
    }

    fn answer(&self, cid: u16, status: Status, result: u64, out: &mut Outgoing) {
        if self.broken.is_none() {
            let head = if self.flow_control { self.sq_head } else { 0 };
            self.framing.put_completion(out, Completion::new(cid, head, status, result));
        }
    }

    fn release(&mut self, slot: u16) {
        if let Some(running) = self.running[usize::from(slot)].take() {
            if !matches!(running.stage, Stage::Grant(_) | Stage::Receiving { .. }) {
                self.busy -= 1;
            }
            self.running_bytes -= running.weight;
            if let Some(entered) = running.entered {
                self.namespace.leave(entered);
            }
            self.free.push(slot);
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        for running in self.running.iter_mut().filter_map(Option::take) {
            if let Some(entered) = running.entered {
                self.namespace.leave(entered);
            }
        }
    }
}

enum Takes {
    Nothing,
    Exactly(u64),
    AtLeast(u64),
}

enum Found {
    Here(std::ops::Range<usize>),
    AskFor(u32),
}

fn byte_offset(lba: u64) -> Result<u64, Status> {
    lba.checked_mul(LBA_BYTES).ok_or(Status::LBA_OUT_OF_RANGE)
}

fn is_reservation(opcode: u8) -> bool {
    matches!(
        opcode,
        io::RESERVATION_REGISTER | io::RESERVATION_REPORT | io::RESERVATION_ACQUIRE | io::RESERVATION_RELEASE
    )
}

/// What a command does to data, if it does anything.
fn access_of(command: &Command) -> Option<Access> {
    match command.opcode {
        io::READ | io::COMPARE | io::VERIFY => Some(Access::Read),
        io::WRITE | io::WRITE_ZEROES | io::DATASET_MANAGEMENT | io::COPY | io::FLUSH => Some(Access::Write),
        _ => None,
    }
}

/// What a host is told of a failure of the device. Where another path or a later attempt may do better it may retry.
fn status_of(error: &IoError) -> Status {
    match error {
        IoError::OutOfRange => Status::LBA_OUT_OF_RANGE,
        IoError::Invalid(_) => Status::INVALID_FIELD,
        IoError::ReadOnly => Status::WRITE_PROTECTED,
        IoError::Shutdown => Status::NOT_READY,
        IoError::LogDead(_) => Status(Status::INTERNAL.0 | Status::DNR),
        IoError::Stopped(_) => Status::INTERNAL_PATH,
        IoError::Read(_) => Status::UNRECOVERED_READ,
    }
}

/// What a reservation command asks for.
fn reservation_change(command: &Command, data: &[u8], host: HostId) -> Result<Change, Status> {
    const IGNORE_KEY: u32 = 1 << 3;
    let dword = command.dword(10);
    let (action, ignore_current) = (dword & 7, dword & IGNORE_KEY != 0);
    let kind = || Kind::of((dword >> 8) as u8).ok_or(Status::INVALID_FIELD);
    let keys = || ReservationKeys::read_from_prefix(data).map_err(|_| Status::SGL_LENGTH);
    let current = || {
        let (bytes, _) = data.split_first_chunk().ok_or(Status::SGL_LENGTH)?;
        Ok(u64::from_le_bytes(*bytes))
    };
    let mut persists = None;
    let request = match command.opcode {
        io::RESERVATION_REGISTER => {
            let (keys, _) = keys()?;
            persists = match dword >> 30 {
                0 => None,
                2 => Some(false),
                3 => Some(true),
                _ => return Err(Status::INVALID_FIELD),
            };
            let (current, key) = (keys.current.get(), keys.other.get());
            match action {
                0 => Request::Register { key },
                1 => Request::Unregister { current, ignore_current },
                2 => Request::Replace { current, key, ignore_current },
                _ => return Err(Status::INVALID_FIELD),
            }
        }
        _ if ignore_current => return Err(Status::INVALID_FIELD),
        io::RESERVATION_ACQUIRE => {
            let (keys, _) = keys()?;
            let (current, victim) = (keys.current.get(), keys.other.get());
            match action {
                0 => Request::Acquire { current, kind: kind()? },
                // Every preemption waits for what its victims have under way, so both are the same.
                1 | 2 => Request::Preempt { current, victim, kind: kind()? },
                _ => return Err(Status::INVALID_FIELD),
            }
        }
        io::RESERVATION_RELEASE => match action {
            0 => Request::Release { current: current()?, kind: kind()? },
            1 => Request::Clear { current: current()? },
            _ => return Err(Status::INVALID_FIELD),
        },
        _ => return Err(Status::INVALID_OPCODE),
    };
    Ok(Change { host, request, persists })
}

impl reactor::Session for Session {
    fn consume(
        &mut self,
        input: &[u8],
        device: &mut dyn Device,
        out: &mut Outgoing,
    ) -> Result<(usize, Progress), SessionError> {
        Ok(self.consume_pdus(input, device, out)?)
    }

    fn payload_mut(&mut self) -> Option<&mut [u8]> {
        let State::Payload { slot, left, .. } = self.state else { return None };
        match self.stage(slot) {
            Some(Stage::Receiving { buf, filled, .. }) => Some(&mut buf[*filled..][..left]),
            _ => None,
        }
    }

    fn payload_received(&mut self, received: usize, device: &mut dyn Device, out: &mut Outgoing) {
        let State::Payload { slot, left, len } = self.state else { return };
        assert!(received <= left, "payload overrun");
        self.payload_filled(slot, received, left, len, device, out);
    }

    fn streams_large_writes(&self) -> bool {
        self.large_writes
    }

    fn complete(&mut self, slot: u16, result: Result<Outcome, IoError>, device: &mut dyn Device, out: &mut Outgoing) {
        self.completed(slot, result, device, out);
    }

    fn in_flight(&self) -> usize {
        // The first of a pair waits for its second, or for nothing if the host has gone.
        self.busy - usize::from(self.fused.is_some())
    }

    fn stats(&self) -> SessionStats {
        self.stats
    }

    fn shut_down(&mut self) {
        self.shutdown = true;
    }

    fn take_tasks(&mut self) -> Vec<(u16, Task)> {
        std::mem::take(&mut self.tasks)
    }

    fn task_done(&mut self, slot: u16, result: u32, _: &mut dyn Device, out: &mut Outgoing) {
        // A status has 15 bits.
        self.finish(slot, Status(result as u16), 0, out);
    }

    fn hangs_up_for(&self, error: &IoError) -> bool {
        matches!(error, IoError::Shutdown)
    }

    fn broken(&self) -> Option<&str> {
        self.broken
    }

    fn outlives_client(&self) -> bool {
        true
    }
}
