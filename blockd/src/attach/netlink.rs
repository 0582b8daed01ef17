//! Generic netlink: messages, attributes, and a socket that asks and waits for the answer.
//!
//! Numbers are in the machine's byte order; messages and attributes are padded to 4 bytes.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Before every message.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Header {
    len: u32,
    kind: u16,
    flags: u16,
    seq: u32,
    port: u32,
}
const _: () = assert!(size_of::<Header>() == 16);

/// Before the attributes of a generic netlink message.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct GenericHeader {
    command: u8,
    version: u8,
    reserved: u16,
}
const _: () = assert!(size_of::<GenericHeader>() == 4);

/// Before every attribute's value.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct AttrHeader {
    len: u16,
    kind: u16,
}
const _: () = assert!(size_of::<AttrHeader>() == 4);

/// The message is a request.
const REQUEST: u16 = 1;
/// Answer even if all went well.
const ACK: u16 = 4;
/// Type of a message that ends an exchange: an error number, 0 for success.
const ERROR: u16 = 2;
/// The attribute's value consists of attributes.
const NESTED: u16 = 1 << 15;
/// Bits of an attribute's type that are flags.
const ATTR_FLAGS: u16 = 3 << 14;
/// The family that knows the others.
const CONTROL: u16 = 16;
const CONTROL_GET_FAMILY: u8 = 3;
const CONTROL_FAMILY_ID: u16 = 1;
const CONTROL_FAMILY_NAME: u16 = 2;
/// Answers longer than this many bytes are not expected.
const ANSWER_BYTES_MAX: usize = 64 << 10;
/// Seconds after which a kernel that does not answer is given up.
const ANSWER_SECONDS_MAX: i64 = 30;

/// Attributes being put together.
#[derive(Clone, Debug, Default)]
pub struct Attrs(Vec<u8>);

impl Attrs {
    /// None.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds an attribute.
    pub fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        let len = size_of::<AttrHeader>() + value.len();
        let header = AttrHeader { len: u16::try_from(len).expect("attributes are short"), kind };
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// Adds a number.
    pub fn u32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// Adds a number.
    pub fn u64(self, kind: u16, value: u64) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// Adds text.
    pub fn text(self, kind: u16, value: &str) -> Self {
        self.bytes(kind, &[value.as_bytes(), b"\0"].concat())
    }

    /// Adds attributes as the value of one.
    pub fn nested(self, kind: u16, inner: &Attrs) -> Self {
        self.bytes(kind | NESTED, &inner.0)
    }
}

/// The attributes in `bytes`, by type; what is cut off at the end is left out.
pub fn attributes(mut bytes: &[u8]) -> Vec<(u16, &[u8])> {
    let mut found = Vec::new();
    while let Ok((header, _)) = AttrHeader::read_from_prefix(bytes) {
        let len = usize::from(header.len);
        if len < size_of::<AttrHeader>() || len > bytes.len() {
            break;
        }
        found.push((header.kind & !ATTR_FLAGS, &bytes[size_of::<AttrHeader>()..len]));
        bytes = &bytes[len.next_multiple_of(4).min(bytes.len())..];
    }
    found
}

/// A whole request.
fn request(family: u16, command: u8, seq: u32, attrs: &Attrs) -> Vec<u8> {
    let generic = GenericHeader { command, version: 1, reserved: 0 };
    let len = size_of::<Header>() + size_of::<GenericHeader>() + attrs.0.len();
    let len = u32::try_from(len).expect("requests are short");
    let header = Header { len, kind: family, flags: REQUEST | ACK, seq, port: 0 };
    [header.as_bytes(), generic.as_bytes(), &attrs.0].concat()
}

/// What one datagram told about the request `seq`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Answer {
    /// Attributes of the messages before the end.
    attrs: Vec<u8>,
    /// The end: an error number, 0 for success.
    end: Option<i32>,
}

fn answer(mut datagram: &[u8], seq: u32) -> Answer {
    let mut answer = Answer::default();
    while let Ok((header, rest)) = Header::read_from_prefix(datagram) {
        let len = header.len as usize;
        if len < size_of::<Header>() || len > datagram.len() {
            break;
        }
        let body = &rest[..len - size_of::<Header>()];
        if header.seq == seq {
            if header.kind == ERROR {
                answer.end = Some(i32::read_from_prefix(body).map_or(-libc::EPROTO, |(number, _)| number));
            } else if let Some(attrs) = body.get(size_of::<GenericHeader>()..) {
                answer.attrs.extend_from_slice(attrs);
            }
        }
        datagram = &datagram[len.next_multiple_of(4).min(datagram.len())..];
    }
    answer
}

/// A socket to the kernel's generic netlink families.
pub struct Netlink {
    fd: OwnedFd,
    seq: u32,
}

impl Netlink {
    /// Opens one.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn open() -> io::Result<Self> {
        // SAFETY: plain system call.
        let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW | libc::SOCK_CLOEXEC, libc::NETLINK_GENERIC) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new descriptor that nobody else has.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        let patience = libc::timeval { tv_sec: ANSWER_SECONDS_MAX, tv_usec: 0 };
        let len = size_of::<libc::timeval>() as libc::socklen_t;
        // SAFETY: `patience` is a timeval, alive over the call.
        let set = unsafe {
            libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_RCVTIMEO, (&raw const patience).cast(), len)
        };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(Self { fd, seq: 0 })
    }

    /// The number of a family; `None` when the kernel does not have it.
    ///
    /// # Errors
    /// The kernel does not answer as it should.
    pub fn family(&mut self, name: &str) -> io::Result<Option<u16>> {
        let found = match self.ask(CONTROL, CONTROL_GET_FAMILY, &Attrs::new().text(CONTROL_FAMILY_NAME, name)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let id = attributes(&found).into_iter().find(|(kind, _)| *kind == CONTROL_FAMILY_ID);
        let id = id.and_then(|(_, value)| u16::read_from_bytes(value).ok());
        id.map(Some).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "a netlink family without a number"))
    }

    /// Sends a command and waits for its end. Returns the attributes of what was answered.
    ///
    /// # Errors
    /// What the command failed with, or the socket.
    pub fn ask(&mut self, family: u16, command: u8, attrs: &Attrs) -> io::Result<Vec<u8>> {
        self.seq = self.seq.wrapping_add(1);
        let message = request(family, command, self.seq, attrs);
        // SAFETY: `message` is alive over the call. Without an address a netlink socket sends to the kernel.
        let sent = unsafe { libc::send(self.fd.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
        if sent < 0 {
            return Err(io::Error::last_os_error());
        }
        let mut attrs = Vec::new();
        loop {
            let mut datagram = vec![0; ANSWER_BYTES_MAX];
            // SAFETY: `datagram` is alive and may be written over the call.
            let len = unsafe { libc::recv(self.fd.as_raw_fd(), datagram.as_mut_ptr().cast(), datagram.len(), 0) };
            let Ok(len) = usize::try_from(len) else {
                let error = io::Error::last_os_error();
                if error.kind() == io::ErrorKind::Interrupted {
                    continue;
                }
                return Err(error);
            };
            let answer = answer(&datagram[..len], self.seq);
            attrs.extend_from_slice(&answer.attrs);
            match answer.end {
                Some(0) => return Ok(attrs),
                Some(number) => return Err(io::Error::from_raw_os_error(-number)),
                None => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_and_nest() {
        let inner = Attrs::new().u32(1, 7);
        let attrs = Attrs::new().text(10, "abcd").u64(3, 9).nested(7, &inner);
        assert_eq!(attrs.0.len(), 12 + 12 + 12);
        let found = attributes(&attrs.0);
        assert_eq!(found[0], (10, b"abcd\0".as_slice()));
        assert_eq!(found[1], (3, 9u64.to_ne_bytes().as_slice()));
        assert_eq!(found[2].0, 7);
        assert_eq!(attributes(found[2].1), [(1, 7u32.to_ne_bytes().as_slice())]);
    }

    #[test]
    fn cut_off_attributes_are_left_out() {
        let attrs = Attrs::new().u32(1, 7).u64(2, 8);
        for len in 0..attrs.0.len() {
            assert!(attributes(&attrs.0[..len]).len() < 2, "{len}");
        }
        assert_eq!(attributes(&[3, 0, 1, 0]), []);
    }

    #[test]
    fn an_answer_is_its_messages_up_to_the_end() {
        let mut datagram = request(0x1c, 1, 5, &Attrs::new().u32(1, 7));
        datagram.extend(request(0x1c, 1, 4, &Attrs::new().u32(1, 8)));
        assert_eq!(answer(&datagram, 5), Answer { attrs: Attrs::new().u32(1, 7).0, end: None });
        let end = Header { len: 20, kind: ERROR, flags: 0, seq: 5, port: 0 };
        datagram.extend(end.as_bytes());
        datagram.extend((-16i32).to_ne_bytes());
        assert_eq!(answer(&datagram, 5).end, Some(-16));
        assert_eq!(answer(&datagram, 6), Answer::default());
        for len in 0..datagram.len() {
            answer(&datagram[..len], 5);
        }
    }

    #[test]
    fn the_kernel_knows_its_own_family_and_no_other() {
        let mut netlink = Netlink::open().unwrap();
        assert_eq!(netlink.family("nlctrl").unwrap(), Some(CONTROL));
        assert_eq!(netlink.family("no-such-family").unwrap(), None);
    }
}
