//! A host in user space, for tools and tests: queues of commands over one connection each, driven by one thread.
//!
//! [`Queue`] sends any command and collects what comes back. [`NvmeClient`] is a controller with an admin queue and I/O
//! queues, with the commands most callers want.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use zerocopy::{FromBytes, IntoBytes};

use super::command::{Command, Completion, Status, admin, fabrics, io as op, property, rw};
use super::data::{ConnectData, DsmRange, HostId, IdentifyController, IdentifyNamespace};
use super::pdu::{CommandCapsule, DIGEST, Framing, Header, Initialize, ResponseCapsule, Transfer, flag, kind, take};
use super::{ADMIN_IN_CAPSULE_MAX, LBA_BYTES, NSID};
use crate::export::nbd::client::socket::Socket;
use crate::outgoing::Outgoing;

/// Who connects, and how.
#[derive(Clone, Debug)]
pub struct Options {
    /// The host's name.
    pub host: String,
    /// Its identifier.
    pub host_id: HostId,
    /// Ask for digests of headers and of data.
    pub digests: (bool, bool),
    /// Entries of each queue.
    pub entries: u16,
    /// Let the controller count how far it has read; else reads end with their data.
    pub flow_control: bool,
    /// Keep-alive time in milliseconds, 0 for none.
    pub keep_alive_ms: u32,
    /// How long any wait may take.
    pub timeout: Option<Duration>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            host: "nqn.2014-08.org.nvmexpress:uuid:00000000-0000-0000-0000-0000000000b1".to_owned(),
            host_id: [0xb1; 16],
            digests: (false, false),
            entries: 128,
            flow_control: false,
            keep_alive_ms: 0,
            timeout: None,
        }
    }
}

/// A status other than success.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the controller answered with {0}")]
pub struct Refused(pub Status);

/// What can go wrong with a command.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The connection, which is then useless.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The command.
    #[error(transparent)]
    Refused(#[from] Refused),
}

impl Error {
    /// The status, if the controller answered with one.
    pub fn status(&self) -> Option<Status> {
        match self {
            Error::Refused(Refused(status)) => Some(*status),
            Error::Io(_) => None,
        }
    }
}

impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        match error {
            Error::Io(error) => error,
            refused => io::Error::other(refused),
        }
    }
}

/// Data of a command.
#[derive(Clone, Debug)]
pub enum Data {
    /// None.
    None,
    /// For the controller.
    Out(Vec<u8>),
    /// So many bytes from the controller.
    In(u32),
}

struct Pending {
    /// What is to be sent when asked for.
    out: Vec<u8>,
    /// What came, and how much of it.
    back: Vec<u8>,
    received: usize,
}

/// A finished command.
#[derive(Clone, Debug)]
pub struct Done {
    /// Which.
    pub cid: u16,
    /// How it ended.
    pub status: Status,
    /// What its completion carried.
    pub result: u64,
    /// How far the controller had read the queue; 0 without flow control.
    pub sq_head: u16,
    /// The data it brought back; shorter than asked if less came.
    pub data: Vec<u8>,
}

/// One queue on its connection.
pub struct Queue {
    socket: Socket,
    framing: Framing,
    /// Most data in an H2CData PDU.
    piece_max: usize,
    /// Most data in a capsule.
    in_capsule_max: usize,
    pending: HashMap<u16, Pending>,
    next_cid: u16,
}

fn broken(what: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Queue {
    /// Connects and makes a queue: the admin queue of a new controller with `qid` 0 and `cntlid` FFFFh. Returns the
    /// controller's identifier, too.
    ///
    /// # Errors
    /// The connection fails, or the Connect command is refused.
    pub fn connect(
        addr: SocketAddr,
        subsystem: &str,
        qid: u16,
        cntlid: u16,
        options: &Options,
    ) -> Result<(Self, u16), Error> {
        const NO_FLOW_CONTROL: u32 = 1 << 2;
        let mut queue = Self::initialize(addr, options)?;
        let attributes = if options.flow_control { 0 } else { NO_FLOW_CONTROL };
        let command = Command::fabrics(fabrics::CONNECT, 0)
            .with_dword(10, u32::from(qid) << 16)
            .with_dword(11, u32::from(options.entries - 1) | attributes << 16)
            .with_dword(12, options.keep_alive_ms);
        let data = ConnectData::new(options.host_id, &options.host, subsystem, cntlid);
        let done = queue.call(command, Data::Out(data.as_bytes().to_vec()))?;
        Ok((queue, done.result as u16))
    }

    /// Connects and exchanges the PDUs before the first command.
    ///
    /// # Errors
    /// The connection fails, or the controller answers what it must not.
    pub fn initialize(addr: SocketAddr, options: &Options) -> io::Result<Self> {
        let mut socket = Socket::connect_tcp(addr, options.timeout)?;
        let (header_digest, data_digest) = options.digests;
        let framing = Framing { header_digest, data_digest, alignment: 0 };
        socket.queue(Initialize::new(kind::IC_REQ, 0, framing.digests(), 0).as_bytes(), &[])?;
        socket.flush()?;
        let mut response = [0; Initialize::SIZE];
        socket.read_exact(&mut response)?;
        let response = Initialize::read_from_bytes(&response).map_err(|_| broken("no ICResp"))?;
        if response.header.kind != kind::IC_RESP || response.digests != framing.digests() {
            return Err(broken("another ICResp than was asked for"));
        }
        Ok(Self {
            socket,
            framing,
            piece_max: response.limit.get() as usize,
            in_capsule_max: ADMIN_IN_CAPSULE_MAX as usize,
            pending: HashMap::new(),
            next_cid: 0,
        })
    }

    /// Commands not answered yet.
    pub fn in_flight(&self) -> usize {
        self.pending.len()
    }

    /// Changes how long a wait may take.
    pub fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.socket.timeout = timeout;
    }

    /// Changes how much data goes into capsules; more goes by itself when asked for.
    pub fn set_in_capsule_max(&mut self, bytes: usize) {
        self.in_capsule_max = bytes;
    }

    /// Queues a command and returns its identifier. That and the data pointer are filled in.
    ///
    /// # Errors
    /// Of the connection.
    pub fn submit(&mut self, mut command: Command, data: Data) -> io::Result<u16> {
        let cid = self.next_cid;
        self.next_cid = (cid + 1) % 0xfff0;
        command.cid = cid.into();
        let header = Header { kind: kind::CAPSULE_CMD, flags: 0, hlen: 72, pdo: 0, plen: 72.into() };
        let mut capsule = Outgoing::new();
        let mut pending = Pending { out: Vec::new(), back: Vec::new(), received: 0 };
        match data {
            Data::None => self.framing.put(&mut capsule, CommandCapsule { header, command }.as_bytes()),
            Data::In(len) => {
                let command = command.with_data(len, false);
                pending.back = vec![0; len as usize];
                self.framing.put(&mut capsule, CommandCapsule { header, command }.as_bytes());
            }
            Data::Out(out) if out.len() <= self.in_capsule_max => {
                let command = command.with_data(out.len() as u32, true);
                let head = CommandCapsule { header, command };
                self.framing.put_header(&mut capsule, head.as_bytes(), out.len());
                let from = capsule.len();
                capsule.extend_from_slice(&out);
                self.framing.put_data_digest(&mut capsule, from);
            }
            Data::Out(out) => {
                let command = command.with_data(out.len() as u32, false);
                pending.out = out;
                self.framing.put(&mut capsule, CommandCapsule { header, command }.as_bytes());
            }
        }
        self.pending.insert(cid, pending);
        self.socket.queue(&capsule.into_bytes(), &[])?;
        Ok(cid)
    }

    /// Sends bytes as they are, for tests of what a host must not send.
    ///
    /// # Errors
    /// Of the connection.
    pub fn send_raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.socket.queue(bytes, &[])?;
        self.socket.flush()
    }

    /// Receives the next PDU as it is, header and all.
    ///
    /// # Errors
    /// Of the connection; its end is `UnexpectedEof`.
    pub fn receive_raw(&mut self) -> io::Result<Vec<u8>> {
        let mut pdu = vec![0; Header::SIZE];
        self.socket.read_exact(&mut pdu)?;
        let (header, _) = take::<Header>(&pdu).expect("as many bytes as it has");
        let plen = header.plen.get() as usize;
        if !(Header::SIZE..=1 << 26).contains(&plen) {
            return Err(broken("a PDU of an impossible length"));
        }
        pdu.resize(plen, 0);
        self.socket.read_exact(&mut pdu[Header::SIZE..])?;
        Ok(pdu)
    }

    /// What was settled.
    pub fn framing(&self) -> Framing {
        self.framing
    }

    /// The connection, for somebody else to go on with; nothing may be in flight.
    ///
    /// # Errors
    /// Something was received that nobody asked for.
    pub fn into_stream(self) -> io::Result<std::net::TcpStream> {
        if !self.socket.buffered().is_empty() || !self.pending.is_empty() {
            return Err(broken("the queue is still in use"));
        }
        self.socket.into_fd().map(Into::into)
    }

    /// Sends what is queued.
    ///
    /// # Errors
    /// Of the connection.
    pub fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }

    /// Sends what is queued and waits for the next command to end, whichever it is.
    ///
    /// # Errors
    /// Of the connection, or the controller broke the protocol.
    pub fn next_done(&mut self) -> io::Result<Done> {
        self.socket.flush()?;
        loop {
            let header = loop {
                if let Some((header, _)) = take::<Header>(self.socket.buffered()) {
                    break header;
                }
                self.socket.fill()?;
            };
            let done = match header.kind {
                kind::CAPSULE_RESP => {
                    let (capsule, _) = self.header::<ResponseCapsule>(&header)?;
                    Some(self.finish(&capsule.completion)?)
                }
                kind::C2H_DATA => self.data()?,
                kind::R2T => {
                    let (r2t, _) = self.header::<Transfer>(&header)?;
                    self.send_data(&r2t)?;
                    None
                }
                kind::C2H_TERM_REQ => {
                    let pdu = self.receive_raw()?;
                    let status = take::<super::pdu::Terminate>(&pdu).map_or(0, |(head, _)| head.status.get());
                    return Err(broken(format!(
                        "the controller ended the connection with fatal error status {status}"
                    )));
                }
                other => return Err(broken(format!("a PDU of type {other:#x}"))),
            };
            if let Some(done) = done {
                return Ok(done);
            }
        }
    }

    /// Takes a PDU's header with its digest; returns it and how many bytes lie between them and the data.
    fn header<T>(&mut self, header: &Header) -> io::Result<(T, usize)>
    where
        T: FromBytes + zerocopy::KnownLayout + zerocopy::Immutable + zerocopy::Unaligned,
    {
        let hlen = size_of::<T>();
        let carries = header.kind == kind::C2H_DATA;
        let start = self.framing.check_as(header, hlen, carries).map_err(broken)?;
        while self.socket.buffered().len() < start {
            self.socket.fill()?;
        }
        self.framing.check_header_digest(self.socket.buffered(), hlen).map_err(broken)?;
        let (head, _) = take::<T>(self.socket.buffered()).ok_or_else(|| broken("a short header"))?;
        self.socket.consume(start);
        Ok((head, start))
    }

    fn data(&mut self) -> io::Result<Option<Done>> {
        let (header, _) = take::<Header>(self.socket.buffered()).expect("seen before");
        let (head, start) = self.header::<Transfer>(&header)?;
        let len = self.framing.data_len(&header, start);
        let cid = head.cid.get();
        let pending = self.pending.get_mut(&cid).ok_or_else(|| broken("data for no command"))?;
        let offset = head.offset.get() as usize;
        if len != head.len.get() as usize || offset != pending.received || offset + len > pending.back.len() {
            return Err(broken("data other than was asked for"));
        }
        let part = &mut pending.back[offset..offset + len];
        self.socket.read_exact(part)?;
        if self.framing.data_digest {
            let mut digest = [0; DIGEST];
            self.socket.read_exact(&mut digest)?;
            if !Framing::data_digest_matches(part, digest) {
                return Err(broken("a data digest that does not match"));
            }
        }
        pending.received += len;
        if header.flags & flag::SUCCESS == 0 {
            return Ok(None);
        }
        if header.flags & flag::LAST == 0 || pending.received != pending.back.len() {
            return Err(broken("success before all data"));
        }
        Ok(Some(self.finish(&Completion::new(cid, 0, Status::SUCCESS, 0))?))
    }

    fn send_data(&mut self, r2t: &Transfer) -> io::Result<()> {
        let (cid, tag) = (r2t.cid.get(), r2t.tag.get());
        let pending = self.pending.get(&cid).ok_or_else(|| broken("an R2T for no command"))?;
        let (offset, len) = (r2t.offset.get() as usize, r2t.len.get() as usize);
        let bytes = pending.out.get(offset..offset + len).ok_or_else(|| broken("an R2T beyond the data"))?;
        let mut at = 0;
        while at < len {
            let end = len.min(at + self.piece_max);
            let piece = &bytes[at..end];
            let flags = if end == len { flag::LAST } else { 0 };
            let head = Transfer::new(kind::H2C_DATA, flags, cid, tag, (offset + at) as u32, piece.len() as u32);
            let mut pdu = Outgoing::new();
            self.framing.put_header(&mut pdu, head.as_bytes(), piece.len());
            self.socket.queue(&pdu.into_bytes(), piece)?;
            if self.framing.data_digest {
                self.socket.queue(&crc32c::crc32c(piece).to_le_bytes(), &[])?;
            }
            at = end;
        }
        self.socket.flush()
    }

    fn finish(&mut self, completion: &Completion) -> io::Result<Done> {
        let cid = completion.cid.get();
        let mut pending = self.pending.remove(&cid).ok_or_else(|| broken("a completion of no command"))?;
        pending.back.truncate(pending.received);
        Ok(Done {
            cid,
            status: completion.status(),
            result: completion.result.get(),
            sq_head: completion.sq_head.get(),
            data: pending.back,
        })
    }

    /// Sends a command and waits for its end. Only when nothing else is in flight.
    ///
    /// # Errors
    /// Of the connection, or the command failed.
    pub fn call(&mut self, command: Command, data: Data) -> Result<Done, Error> {
        assert!(self.pending.is_empty(), "a depth-1 call while other commands are in flight");
        let wanted = match data {
            Data::In(len) => len as usize,
            _ => 0,
        };
        self.submit(command, data)?;
        let done = self.next_done()?;
        if !done.status.is_success() {
            return Err(Refused(done.status).into());
        }
        if done.data.len() != wanted {
            return Err(broken("success with less data than was asked for").into());
        }
        Ok(done)
    }
}

/// A controller: its admin queue and its I/O queues.
pub struct NvmeClient {
    /// The admin queue.
    pub admin: Queue,
    /// The I/O queues, at least one unless it is a discovery controller.
    pub io: Vec<Queue>,
    /// Its identifier.
    pub cntlid: u16,
    identity: Box<IdentifyController>,
    size: u64,
}

impl NvmeClient {
    /// Connects to a volume's subsystem with `queues` I/O queues.
    ///
    /// # Errors
    /// A connection fails, or a command.
    pub fn connect(addr: SocketAddr, subsystem: &str, queues: u16, options: &Options) -> Result<Self, Error> {
        const EVENTS: u32 = 1 << 8 | 1 << 31;
        let (mut admin, cntlid) = Queue::connect(addr, subsystem, 0, 0xffff, options)?;
        let cap = get_property(&mut admin, property::CAP, true)?;
        if options.entries > (cap as u16).saturating_add(1) {
            return Err(broken("queues of fewer entries than wanted").into());
        }
        enable(&mut admin)?;
        let identity = identify(&mut admin, 0x01, 0)?;
        let identity = Box::new(IdentifyController::read_from_bytes(&identity).map_err(|_| broken("short identity"))?);
        if identity.cntlid.get() != cntlid {
            return Err(broken("another identifier than Connect said").into());
        }
        let set =
            |feature, value| Command::new(admin::SET_FEATURES, 0, 0).with_dword(10, feature).with_dword(11, value);
        admin.call(set(0x0b, EVENTS), Data::None)?;
        let mut client = Self { admin, io: Vec::new(), cntlid, identity, size: 0 };
        if queues > 0 {
            let wanted = u32::from(queues - 1);
            let granted = client.admin.call(set(0x07, wanted << 16 | wanted), Data::None)?.result;
            for qid in 1..=queues.min(granted as u16 + 1) {
                let (mut queue, _) = Queue::connect(addr, subsystem, qid, cntlid, options)?;
                queue.set_in_capsule_max(client.identity.ioccsz.get() as usize * 16 - 64);
                client.io.push(queue);
            }
            client.refresh()?;
        }
        Ok(client)
    }

    /// What the controller says of itself.
    pub fn identity(&self) -> &IdentifyController {
        &self.identity
    }

    /// Size of the namespace in bytes, as last asked for.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Asks for the namespace's size again.
    ///
    /// # Errors
    /// As of any command.
    pub fn refresh(&mut self) -> Result<IdentifyNamespace, Error> {
        let page = identify(&mut self.admin, 0x00, NSID)?;
        let namespace = IdentifyNamespace::read_from_bytes(&page).map_err(|_| broken("short identity"))?;
        self.size = namespace.nsze.get() * LBA_BYTES;
        Ok(namespace)
    }

    /// Reads a log page.
    ///
    /// # Errors
    /// As of any command.
    pub fn log_page(&mut self, page: u8, len: u32, offset: u64) -> Result<Vec<u8>, Error> {
        log_page(&mut self.admin, page, len, offset)
    }

    /// Reads. Offsets and lengths are bytes, and multiples of 512. Like all below on the first I/O queue, and only when
    /// nothing else is in flight there.
    ///
    /// # Errors
    /// As of any command.
    pub fn read(&mut self, offset: u64, len: u32) -> Result<Vec<u8>, Error> {
        Ok(self.io[0].call(read_command(offset, len), Data::In(len))?.data)
    }

    /// Writes.
    ///
    /// # Errors
    /// As of any command.
    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Result<(), Error> {
        let command = write_command(offset, data.len() as u32, fua);
        self.io[0].call(command, Data::Out(data.to_vec())).map(drop)
    }

    /// Makes everything answered so far durable.
    ///
    /// # Errors
    /// As of any command.
    pub fn flush(&mut self) -> Result<(), Error> {
        self.io[0].call(Command::new(op::FLUSH, 0, NSID), Data::None).map(drop)
    }

    /// Zeroes a range.
    ///
    /// # Errors
    /// As of any command.
    pub fn zero(&mut self, offset: u64, len: u32) -> Result<(), Error> {
        self.io[0].call(zero_command(offset, len, false, true), Data::None).map(drop)
    }

    /// Deallocates a range.
    ///
    /// # Errors
    /// As of any command.
    pub fn deallocate(&mut self, offset: u64, len: u64) -> Result<(), Error> {
        let (command, data) = deallocate_command(&[(offset, len)]);
        self.io[0].call(command, data).map(drop)
    }
}

fn blocks(opcode: u8, offset: u64, len: u32) -> Command {
    assert!(offset.is_multiple_of(LBA_BYTES) && u64::from(len).is_multiple_of(LBA_BYTES) && len > 0, "whole blocks");
    Command::new(opcode, 0, NSID).with_blocks(offset / LBA_BYTES, len / LBA_BYTES as u32)
}

fn with_flags(command: Command, flags: &[(bool, u32)]) -> Command {
    let flags = flags.iter().filter(|(on, _)| *on).fold(0, |all, (_, flag)| all | flag);
    command.with_dword(12, command.dword(12) | flags)
}

/// A Read.
pub fn read_command(offset: u64, len: u32) -> Command {
    blocks(op::READ, offset, len)
}

/// A Write.
pub fn write_command(offset: u64, len: u32, fua: bool) -> Command {
    with_flags(blocks(op::WRITE, offset, len), &[(fua, rw::FUA)])
}

/// A Write Zeroes.
pub fn zero_command(offset: u64, len: u32, fua: bool, deallocate: bool) -> Command {
    with_flags(blocks(op::WRITE_ZEROES, offset, len), &[(fua, rw::FUA), (deallocate, rw::DEALLOCATE)])
}

/// A Dataset Management that deallocates ranges (offset, length in bytes), with its data.
pub fn deallocate_command(ranges: &[(u64, u64)]) -> (Command, Data) {
    const DEALLOCATE: u32 = 1 << 2;
    let mut data = Vec::new();
    for (offset, len) in ranges {
        let range = DsmRange {
            attributes: 0.into(),
            blocks: ((len / LBA_BYTES) as u32).into(),
            lba: (offset / LBA_BYTES).into(),
        };
        data.extend_from_slice(range.as_bytes());
    }
    let command = Command::new(op::DATASET_MANAGEMENT, 0, NSID)
        .with_dword(10, ranges.len() as u32 - 1)
        .with_dword(11, DEALLOCATE);
    (command, Data::Out(data))
}

/// Reads a property of a controller.
///
/// # Errors
/// As of any command.
pub fn get_property(admin: &mut Queue, offset: u32, eight_bytes: bool) -> Result<u64, Error> {
    let command = Command::fabrics(fabrics::PROPERTY_GET, 0).with_dword(10, eight_bytes.into()).with_dword(11, offset);
    Ok(admin.call(command, Data::None)?.result)
}

/// Enables a controller and sees that it is ready.
///
/// # Errors
/// As of any command.
pub fn enable(admin: &mut Queue) -> Result<(), Error> {
    // Entries of 64 and 16 bytes, the NVM command set, enabled.
    const CC: u32 = 4 << 20 | 6 << 16 | 1;
    let command = Command::fabrics(fabrics::PROPERTY_SET, 0).with_dword(11, property::CC).with_dword(12, CC);
    admin.call(command, Data::None)?;
    match get_property(admin, property::CSTS, false)? & 1 {
        1 => Ok(()),
        _ => Err(broken("the controller does not become ready").into()),
    }
}

/// Reads an Identify page.
///
/// # Errors
/// As of any command.
pub fn identify(admin: &mut Queue, cns: u32, nsid: u32) -> Result<Vec<u8>, Error> {
    let command = Command::new(admin::IDENTIFY, 0, nsid).with_dword(10, cns);
    Ok(admin.call(command, Data::In(4096))?.data)
}

/// Reads a log page.
///
/// # Errors
/// As of any command.
pub fn log_page(admin: &mut Queue, page: u8, len: u32, offset: u64) -> Result<Vec<u8>, Error> {
    let dwords = len / 4 - 1;
    let command = Command::new(admin::GET_LOG_PAGE, 0, 0)
        .with_dword(10, u32::from(page) | dwords << 16)
        .with_dword(11, dwords >> 16)
        .with_dword(12, offset as u32)
        .with_dword(13, (offset >> 32) as u32);
    Ok(admin.call(command, Data::In(len))?.data)
}
