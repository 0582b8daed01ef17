//! A stream socket with buffers on both sides that never waits to send without also receiving.

use std::io::{self, IoSlice, Read, Write};
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// Queued bytes are sent when there are this many.
const QUEUE_BYTES_MAX: usize = 256 << 10;
/// Payloads of at least this many bytes are sent from where they lie instead of being queued.
const COPY_BYTES_MAX: usize = 32 << 10;
/// Bytes asked of the kernel at a time.
const FILL_BYTES: usize = 256 << 10;

enum Stream {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    fn fd(&self) -> RawFd {
        match self {
            Stream::Unix(stream) => stream.as_raw_fd(),
            Stream::Tcp(stream) => stream.as_raw_fd(),
        }
    }

    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.read(buf),
            Stream::Tcp(stream) => stream.read(buf),
        }
    }

    fn write_vectored(&mut self, bufs: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Stream::Unix(stream) => stream.write_vectored(bufs),
            Stream::Tcp(stream) => stream.write_vectored(bufs),
        }
    }
}

/// See the module.
pub struct Socket {
    stream: Stream,
    /// Queued, not yet sent.
    outbox: Vec<u8>,
    /// `inbox[taken..filled]` is received and not yet consumed; what lies behind is room.
    inbox: Vec<u8>,
    taken: usize,
    filled: usize,
    /// How long a wait may take; `None` is for ever.
    pub timeout: Option<Duration>,
}

impl Socket {
    pub fn connect_unix(path: &Path, timeout: Option<Duration>) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_nonblocking(true)?;
        Ok(Self::new(Stream::Unix(stream), timeout))
    }

    pub fn connect_tcp(addr: impl ToSocketAddrs, timeout: Option<Duration>) -> io::Result<Self> {
        let stream = match timeout {
            None => TcpStream::connect(addr)?,
            Some(timeout) => connect_in_time(addr, timeout)?,
        };
        stream.set_nodelay(true)?;
        stream.set_nonblocking(true)?;
        Ok(Self::new(Stream::Tcp(stream), timeout))
    }

    fn new(stream: Stream, timeout: Option<Duration>) -> Self {
        Self { stream, outbox: Vec::with_capacity(QUEUE_BYTES_MAX), inbox: Vec::new(), taken: 0, filled: 0, timeout }
    }

    /// The socket, to wait for it or to end it.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.stream {
            Stream::Unix(stream) => stream.as_fd(),
            Stream::Tcp(stream) => stream.as_fd(),
        }
    }

    /// The socket itself, in blocking mode. Nothing may be queued or buffered.
    pub fn into_fd(self) -> io::Result<OwnedFd> {
        assert!(self.outbox.is_empty() && self.buffered().is_empty(), "bytes would be lost");
        match self.stream {
            Stream::Unix(stream) => stream.set_nonblocking(false).map(|()| stream.into()),
            Stream::Tcp(stream) => stream.set_nonblocking(false).map(|()| stream.into()),
        }
    }

    /// Queues `header` and `payload`, sending if there is enough to send.
    pub fn queue(&mut self, header: &[u8], payload: &[u8]) -> io::Result<()> {
        self.outbox.extend_from_slice(header);
        if payload.len() >= COPY_BYTES_MAX {
            return self.send(payload);
        }
        self.outbox.extend_from_slice(payload);
        if self.outbox.len() >= QUEUE_BYTES_MAX {
            self.flush()?;
        }
        Ok(())
    }

    /// Sends everything queued.
    pub fn flush(&mut self) -> io::Result<()> {
        if self.outbox.is_empty() { Ok(()) } else { self.send(&[]) }
    }

    /// Sends everything queued, then `payload`.
    fn send(&mut self, payload: &[u8]) -> io::Result<()> {
        let mut sent = 0;
        let total = self.outbox.len() + payload.len();
        while sent < total {
            let queued = self.outbox.get(sent..).unwrap_or_default();
            let rest = &payload[sent.saturating_sub(self.outbox.len())..];
            match self.stream.write_vectored(&[IoSlice::new(queued), IoSlice::new(rest)]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => sent += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.wait(libc::POLLIN | libc::POLLOUT)? & libc::POLLIN != 0 {
                        self.take_in()?;
                    }
                }
                Err(error) => return Err(error),
            }
        }
        self.outbox.clear();
        Ok(())
    }

    /// Received bytes not yet consumed.
    pub fn buffered(&self) -> &[u8] {
        &self.inbox[self.taken..self.filled]
    }

    /// Drops `count` bytes off the front of [`Self::buffered`].
    pub fn consume(&mut self, count: usize) {
        self.taken += count;
        assert!(self.taken <= self.filled, "consumed more than was buffered");
        if self.taken == self.filled {
            self.taken = 0;
            self.filled = 0;
        }
    }

    /// Waits until more bytes are buffered. The peer's end of the stream is `UnexpectedEof`.
    pub fn fill(&mut self) -> io::Result<()> {
        while !self.take_in()? {
            self.wait(libc::POLLIN)?;
        }
        Ok(())
    }

    /// Fills `buf`, from the buffered bytes first.
    pub fn read_exact(&mut self, buf: &mut [u8]) -> io::Result<()> {
        let have = self.buffered().len().min(buf.len());
        buf[..have].copy_from_slice(&self.buffered()[..have]);
        self.consume(have);
        let mut rest = &mut buf[have..];
        while !rest.is_empty() {
            match self.stream.read(rest) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => rest = &mut rest[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    self.wait(libc::POLLIN)?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Receives once if anything is there; whether it was.
    pub fn take_in(&mut self) -> io::Result<bool> {
        if self.inbox.len() - self.filled < FILL_BYTES / 2 {
            self.inbox.copy_within(self.taken..self.filled, 0);
            self.filled -= self.taken;
            self.taken = 0;
            if self.inbox.len() - self.filled < FILL_BYTES / 2 {
                self.inbox.resize(self.inbox.len() + FILL_BYTES, 0);
            }
        }
        loop {
            return match self.stream.read(&mut self.inbox[self.filled..]) {
                Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.filled += count;
                    Ok(true)
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
                Err(error) => Err(error),
            };
        }
    }

    /// Waits for one of `events`; returns those that came (errors and hang-ups count as readable).
    fn wait(&self, events: i16) -> io::Result<i16> {
        let timeout_ms = match self.timeout {
            Some(timeout) => i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX),
            None => -1,
        };
        let mut poll = libc::pollfd { fd: self.stream.fd(), events, revents: 0 };
        loop {
            // SAFETY: `poll` is one valid pollfd, alive over the call.
            let ready = unsafe { libc::poll(&mut poll, 1, timeout_ms) };
            match ready {
                0 => {
                    return Err(io::Error::new(io::ErrorKind::TimedOut, "the server did not answer in time"));
                }
                1.. if poll.revents & (libc::POLLERR | libc::POLLHUP) != 0 => return Ok(events),
                1.. => return Ok(poll.revents),
                _ => {
                    let error = io::Error::last_os_error();
                    if error.kind() != io::ErrorKind::Interrupted {
                        return Err(error);
                    }
                }
            }
        }
    }
}

/// Connects to the first of the addresses that answers, each within `timeout`.
fn connect_in_time(addr: impl ToSocketAddrs, timeout: Duration) -> io::Result<TcpStream> {
    let mut failed = io::Error::new(io::ErrorKind::InvalidInput, "the name has no address");
    for addr in addr.to_socket_addrs()? {
        match TcpStream::connect_timeout(&addr, timeout) {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}
