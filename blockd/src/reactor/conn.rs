//! One client's socket: receive buffer, session, send buffers.

use std::os::fd::{AsRawFd, OwnedFd};

use super::device::Device;
use super::handle::DeviceKey;
use super::ring::Ring;
use super::session::{Client, DIRECT_PAYLOAD, Progress, Session, SessionError};
use crate::buf::AlignedBuf;
use crate::outgoing::Outgoing;

/// Receive buffer, in bytes. Must hold a write that is not received directly, with its header, twice over.
const RECV_BUFFER: usize = 256 << 10;
const _: () = assert!(RECV_BUFFER >= 2 * (DIRECT_PAYLOAD + 256));
/// Received at once while the client streams large writes: little of a payload then needs copying.
const RECV_HEADER: usize = 4 << 10;
/// Send buffers that grew beyond this, in bytes, are not kept.
const KEEP_SEND_BUFFER: usize = 4 << 20;

/// See the module.
pub(super) struct Conn {
    pub device: DeviceKey,
    /// Sets this client apart from earlier ones at the same index.
    pub generation: u32,
    /// Its address, and the export it asked for.
    pub peer: String,
    pub export: String,
    /// See [`Client::group`].
    pub group: u64,
    pub session: Box<dyn Session>,
    /// Replies for the next send.
    pub out: Outgoing,
    /// Waits in the reactor's list of connections to look at.
    pub queued: bool,
    /// The device goes away: close when idle.
    pub leaving: bool,
    fd: OwnedFd,
    /// Received bytes not yet used up are at `start..end`.
    inbuf: AlignedBuf,
    start: usize,
    end: usize,
    /// The send that runs, from `sent` on. Untouched while it runs.
    sending: Outgoing,
    sent: usize,
    send_runs: bool,
    /// What the send is told of the pieces of `sending`.
    message: Box<Message>,
    recv_runs: Option<Target>,
    progress: Progress,
    /// Whether the socket had more when it was last read.
    more_to_receive: bool,
    /// The client sends nothing more.
    input_ended: bool,
    /// What the client asked is not answered any more.
    hung_up: bool,
    /// What the device answers is not waited for any more.
    abandoned: bool,
    /// Nothing can be said or heard any more.
    dead: bool,
    shut: bool,
}

/// Pieces that one send takes at most; the rest follows.
const PIECES_MAX: usize = 64;

/// The arguments of sendmsg(2). They stay where they are while it runs.
struct Message {
    iovecs: [libc::iovec; PIECES_MAX],
    header: libc::msghdr,
}

// SAFETY: what it points to is used by the kernel only, while the connection that it belongs to keeps it.
unsafe impl Send for Message {}

impl Default for Message {
    fn default() -> Self {
        // SAFETY: zeroes are null pointers and lengths of 0 in these structs.
        unsafe { std::mem::zeroed() }
    }
}

impl Message {
    /// Points to the first pieces.
    fn of<'a>(&mut self, pieces: impl Iterator<Item = &'a [u8]>) -> &[libc::iovec] {
        let mut count = 0;
        for (iovec, piece) in self.iovecs.iter_mut().zip(pieces) {
            // The kernel only reads through it.
            *iovec = libc::iovec { iov_base: piece.as_ptr().cast_mut().cast(), iov_len: piece.len() };
            count += 1;
        }
        self.header.msg_iov = self.iovecs.as_mut_ptr();
        self.header.msg_iovlen = count as _;
        &self.iovecs[..count]
    }

    fn header(&self) -> *const libc::msghdr {
        &raw const self.header
    }
}

/// Where a receive goes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Target {
    Buffer,
    Payload,
}

impl Conn {
    pub fn new(fd: OwnedFd, client: Client, device: DeviceKey, index: u32, generation: u32) -> Self {
        let token_base = u64::from(index) << 48 | u64::from(generation) << 16;
        Self {
            device,
            generation,
            session: (client.session)(token_base),
            peer: client.peer,
            export: client.export,
            group: client.group,
            out: Outgoing::new(),
            queued: false,
            leaving: false,
            fd,
            inbuf: AlignedBuf::zeroed(RECV_BUFFER),
            start: 0,
            end: 0,
            sending: Outgoing::new(),
            sent: 0,
            send_runs: false,
            message: Box::default(),
            recv_runs: None,
            progress: Progress::NeedBytes,
            more_to_receive: false,
            input_ended: false,
            hung_up: false,
            abandoned: false,
            dead: false,
            shut: false,
        }
    }

    /// Index and generation of the connection a token belongs to.
    pub fn of_token(token: u64) -> (u32, u32) {
        ((token >> 48) as u32, (token >> 16) as u32)
    }

    /// Gives up on the client, and on what it asked.
    pub fn abandon(&mut self) {
        self.dead = true;
        self.abandoned = true;
    }

    /// Gives up on the client.
    pub fn kill(&mut self) {
        self.dead = true;
    }

    /// Hears nothing more, but sends what there is to say.
    pub fn hang_up(&mut self) {
        self.input_ended = true;
        self.hung_up = true;
    }

    /// A receive ended: takes in what came.
    pub fn received(&mut self, result: i32, more_to_receive: bool, device: Option<&mut dyn Device>) {
        let Some(target) = self.recv_runs.take() else {
            return;
        };
        self.more_to_receive = more_to_receive;
        match (result, target) {
            (0, _) => self.input_ended = true,
            (bytes @ 1.., Target::Buffer) => self.end += bytes as usize,
            (bytes @ 1.., Target::Payload) => {
                if let Some(device) = device {
                    self.session.payload_received(bytes as usize, device, &mut self.out);
                }
            }
            (errno, _) => {
                if !matches!(-errno, libc::EINTR | libc::EAGAIN) {
                    self.dead = true;
                }
            }
        }
    }

    /// A send ended.
    pub fn sent(&mut self, result: i32) {
        self.send_runs = false;
        match result {
            0.. => {
                self.sent += result as usize;
                if self.sent >= self.sending.len() {
                    self.sending.clear(KEEP_SEND_BUFFER);
                    self.sent = 0;
                }
            }
            errno if matches!(-errno, libc::EINTR | libc::EAGAIN) => {}
            _ => self.dead = true,
        }
    }

    /// Turns received bytes into requests.
    pub fn parse(&mut self, device: &mut dyn Device) -> Result<(), SessionError> {
        // While a receive runs, all that is there was looked at.
        if self.dead || self.hung_up || self.recv_runs.is_some() {
            return Ok(());
        }
        if self.progress == Progress::Busy && self.has_hung_up() {
            // Nobody waits for what it has sent and we have not looked at. A client that gave up on us may have sent it
            // again on another connection and have overwritten it since.
            self.dead = true;
            return Ok(());
        }
        let input = &self.inbuf[self.start..self.end];
        let (used, progress) = self.session.consume(input, device, &mut self.out)?;
        self.start += used;
        self.progress = progress;
        Ok(())
    }

    /// Whether the client has closed its side, even if there are bytes before that.
    fn has_hung_up(&self) -> bool {
        let mut poll = libc::pollfd { fd: self.fd.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
        // SAFETY: `poll` is one valid pollfd, alive over the call, which does not wait.
        unsafe { libc::poll(&raw mut poll, 1, 0) > 0 && poll.revents != 0 }
    }

    /// Starts the send and the receive that are due.
    pub fn start_io(&mut self, ring: &mut Ring, index: u32) {
        if self.dead {
            self.out.clear(KEEP_SEND_BUFFER);
            return;
        }
        self.start_send(ring, index);
        if self.recv_runs.is_none() && !self.input_ended {
            self.start_recv(ring, index);
        }
    }

    fn start_send(&mut self, ring: &mut Ring, index: u32) {
        if self.send_runs {
            return;
        }
        if self.sending.is_empty() {
            if self.out.is_empty() {
                return;
            }
            std::mem::swap(&mut self.out, &mut self.sending);
        }
        let fd = self.fd.as_raw_fd();
        // `sending` and `message` are not touched while `send_runs`, and a connection is not dropped before its
        // operations have completed.
        match *self.message.of(self.sending.pieces(self.sent)) {
            // SAFETY: as said above.
            [one] => unsafe { ring.send(index, fd, one.iov_base.cast(), one.iov_len) },
            // SAFETY: as said above.
            _ => unsafe { ring.send_message(index, fd, self.message.header()) },
        }
        self.send_runs = true;
    }

    fn start_recv(&mut self, ring: &mut Ring, index: u32) {
        let fd = self.fd.as_raw_fd();
        match self.progress {
            Progress::Busy => {}
            Progress::Disconnect => self.input_ended = true,
            Progress::NeedPayload => {
                let Some(rest) = self.session.payload_mut() else {
                    return;
                };
                let (ptr, len) = (rest.as_mut_ptr(), rest.len());
                // SAFETY: the session leaves the payload's buffer alone until `payload_received`, and a connection
                // is not dropped before its operations have completed.
                unsafe { ring.recv(index, fd, ptr, len, true, true) };
                self.recv_runs = Some(Target::Payload);
            }
            Progress::NeedBytes => {
                if self.start == self.end {
                    (self.start, self.end) = (0, 0);
                } else if self.start > 0 && self.inbuf.len() - self.end < RECV_BUFFER / 2 {
                    self.inbuf.copy_within(self.start..self.end, 0);
                    (self.start, self.end) = (0, self.end - self.start);
                }
                let free = &mut self.inbuf[self.end..];
                let len = if self.session.streams_large_writes() { free.len().min(RECV_HEADER) } else { free.len() };
                assert!(len > 0, "an incomplete request fits the receive buffer");
                let ptr = free.as_mut_ptr();
                // SAFETY: bytes from `end` on are not touched while `recv_runs`, and a connection is not dropped
                // before its operations have completed.
                unsafe { ring.recv(index, fd, ptr, len, false, self.more_to_receive) };
                self.recv_runs = Some(Target::Buffer);
            }
        }
    }

    /// Whether the connection is over and may be dropped; makes what still runs end soon if it is over otherwise.
    pub fn finished(&mut self) -> bool {
        let answered = self.session.in_flight() == 0;
        if self.session.broken().is_some() {
            self.dead = true;
        }
        let idle = (answered || self.hung_up) && self.out.is_empty() && !self.send_runs;
        if !self.dead && !(idle && (self.input_ended || self.leaving)) {
            return false;
        }
        if self.recv_runs.is_none() && !self.send_runs {
            // What comes for it meanwhile is dropped.
            self.dead = true;
            return answered || self.abandoned || !self.session.outlives_client();
        }
        if !self.shut {
            self.shut = true;
            // SAFETY: plain system call on our own socket; it ends the operations that run. If the peer is gone
            // already it fails, and they have ended.
            unsafe { libc::shutdown(self.fd.as_raw_fd(), libc::SHUT_RDWR) };
        }
        false
    }
}
