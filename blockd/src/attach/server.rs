//! Where the volume is served, and connections to it that the kernel can go on with.

use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use crate::export::nbd::client::{NbdClient, Options};

/// How long a server may take for each step of a negotiation.
const PATIENCE: Duration = Duration::from_secs(5);
/// An idle connection is probed after this many seconds, then as often, and is dead after [`PROBES`] in vain.
const PROBE_SECONDS: libc::c_int = 10;
const PROBES: libc::c_int = 3;
/// What the kernel may have sent again in vain, and for how long nothing may have been heard, before a connection counts as
/// dead. A server that only does not read answers the kernel's probes.
const RESENDS_MAX: u8 = 4;
const SILENCE_MS_MAX: u32 = 30_000;

/// The address of an NBD server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Server {
    /// `HOST:PORT`.
    Tcp(String),
    /// An absolute path.
    Unix(PathBuf),
}

/// Text that is no address of a server.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not an address of an NBD server; write HOST:PORT, or unix:/PATH")]
pub struct BadServer(String);

impl FromStr for Server {
    type Err = BadServer;

    fn from_str(text: &str) -> Result<Self, BadServer> {
        let path = text.strip_prefix("unix:").or_else(|| text.starts_with('/').then_some(text));
        if let Some(path) = path.filter(|path| !path.is_empty()) {
            return std::path::absolute(path).map(Self::Unix).map_err(|_| BadServer(text.into()));
        }
        let tcp = text.strip_prefix("tcp:").unwrap_or(text);
        match tcp.rsplit_once(':') {
            Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(Self::Tcp(tcp.into())),
            _ => Err(BadServer(text.into())),
        }
    }
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => f.write_str(address),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

/// What a server says of a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Size in bytes.
    pub size: u64,
    /// Transmission flags.
    pub flags: u16,
    /// The volume's identity, when the server is a blockd.
    pub id: Option<String>,
}

impl Server {
    /// Negotiates `volume` and returns the connection, past the negotiation.
    ///
    /// # Errors
    /// `NotFound`: there is no such volume. Others: the server is away, or refuses.
    pub fn connect(&self, volume: &str) -> io::Result<(OwnedFd, Found)> {
        let (client, found) = self.client(volume)?;
        let socket = client.into_socket()?;
        if matches!(self, Self::Tcp(_)) {
            watch_idle(&socket)?;
        }
        Ok((socket, found))
    }

    /// Asks what the volume is like.
    ///
    /// # Errors
    /// As for [`Self::connect`].
    pub fn look(&self, volume: &str) -> io::Result<Found> {
        let (client, found) = self.client(volume)?;
        client.disconnect()?;
        Ok(found)
    }

    /// [`Self::connect`], for a client of our own.
    ///
    /// # Errors
    /// As for [`Self::connect`].
    pub fn client(&self, volume: &str) -> io::Result<(NbdClient, Found)> {
        let client = self.negotiate(volume)?;
        let found = Found { size: client.size(), flags: client.flags(), id: identity(client.description()) };
        Ok((client, found))
    }

    fn negotiate(&self, volume: &str) -> io::Result<NbdClient> {
        // The kernel's client understands simple replies only; and with them an orderly stop of the server hangs up.
        let options = Options { structured: false, block_status: false, timeout: Some(PATIENCE) };
        match self {
            Self::Tcp(address) => NbdClient::connect_tcp_with(address.as_str(), volume, options),
            Self::Unix(path) => NbdClient::connect_unix_with(path, volume, options),
        }
    }
}

/// The identity in the text by which blockd describes an export.
fn identity(description: &str) -> Option<String> {
    let rest = description.strip_prefix("blockd volume ")?;
    rest.split([',', ' ']).next().filter(|id| !id.is_empty()).map(str::to_owned)
}

fn set(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: libc::c_int) -> io::Result<()> {
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` is an int, alive over the call.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Lets the kernel find out that a server's machine is gone while nothing is asked of it.
///
/// TCP_USER_TIMEOUT is left alone: it would also end connections to a server that only does not read for a while.
fn watch_idle(socket: &OwnedFd) -> io::Result<()> {
    set(socket, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPIDLE, PROBE_SECONDS)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPINTVL, PROBE_SECONDS)?;
    set(socket, libc::IPPROTO_TCP, libc::TCP_KEEPCNT, PROBES)
}

/// Whether the kernel has taken the socket for a device, whose requests have a timeout: it gives the socket that timeout.
pub fn is_taken(socket: &OwnedFd) -> io::Result<bool> {
    let mut timeout = libc::timeval { tv_sec: 0, tv_usec: 0 };
    let mut len = size_of::<libc::timeval>() as libc::socklen_t;
    // SAFETY: `timeout` has room for the timeval, and both are alive over the call.
    let result = unsafe {
        let value = (&raw mut timeout).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::SOL_SOCKET, libc::SO_SNDTIMEO, value, &raw mut len)
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(timeout.tv_sec != 0 || timeout.tv_usec != 0)
}

/// Whether what was sent to a TCP peer has got no answer for long, not even from its kernel.
pub fn is_unheard(socket: &OwnedFd) -> bool {
    // SAFETY: the structure consists of numbers, for which all zeroes is a value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: `info` has room for `len` bytes, and both are alive over the call.
    let result = unsafe {
        let value = (&raw mut info).cast();
        libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, value, &raw mut len)
    };
    // Not a TCP socket: its peer is on this machine and is heard of.
    result == 0
        && info.tcpi_last_ack_recv > SILENCE_MS_MAX
        && info.tcpi_retransmits.saturating_add(info.tcpi_probes) >= RESENDS_MAX
}

/// Ends a connection so that nothing that was sent and not received is sent any more: the kernel repeats the requests on
/// another connection, and a first copy that comes late could overwrite what was written since.
pub fn cut(socket: &impl AsRawFd) {
    // SAFETY: the structure consists of numbers, for which all zeroes is a value.
    let mut nowhere: libc::sockaddr = unsafe { std::mem::zeroed() };
    nowhere.sa_family = libc::AF_UNSPEC as libc::sa_family_t;
    let len = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: `nowhere` is an address, alive over the call. For TCP this throws away what is queued and resets the
    // connection; other sockets refuse it.
    unsafe { libc::connect(socket.as_raw_fd(), &raw const nowhere, len) };
    // SAFETY: plain system call on our own socket. If it is no longer connected there is nothing to do.
    unsafe { libc::shutdown(socket.as_raw_fd(), libc::SHUT_RDWR) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_read_and_written() {
        for (text, written) in [
            ("127.0.0.1:10809", "127.0.0.1:10809"),
            ("tcp:[::1]:9", "[::1]:9"),
            ("unix:/run/nbd.sock", "unix:/run/nbd.sock"),
            ("/run/nbd.sock", "unix:/run/nbd.sock"),
        ] {
            assert_eq!(text.parse::<Server>().unwrap().to_string(), written, "{text}");
        }
        for wrong in ["", "host", "host:", ":1", "host:99999", "unix:"] {
            assert!(wrong.parse::<Server>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn blockd_says_which_volume_it_is() {
        let id = identity("blockd volume 0f0e, durability local");
        assert_eq!(id.as_deref(), Some("0f0e"));
        assert_eq!(identity("somebody else's disk"), None);
    }

    #[test]
    fn a_socket_is_taken_once_it_has_a_timeout() {
        let (one, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let fd = OwnedFd::from(one.try_clone().unwrap());
        assert!(!is_taken(&fd).unwrap());
        one.set_write_timeout(Some(PATIENCE)).unwrap();
        assert!(is_taken(&fd).unwrap());
        assert!(!is_unheard(&fd));
        cut(&fd);
    }

    #[test]
    fn a_cut_connection_is_reset() {
        use std::io::Read;
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let ours = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (mut theirs, _) = listener.accept().unwrap();
        cut(&OwnedFd::from(ours));
        assert_eq!(theirs.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }
}
