//! The kernel's NBD client: the commands of its netlink family.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use zerocopy::FromBytes;

use super::netlink::{Attrs, Netlink, attributes};

const FAMILY: &str = "nbd";

const CONNECT: u8 = 1;
const DISCONNECT: u8 = 2;
const RECONFIGURE: u8 = 3;

const INDEX: u16 = 1;
const SIZE_BYTES: u16 = 2;
const BLOCK_SIZE_BYTES: u16 = 3;
const TIMEOUT_SECONDS: u16 = 4;
const SERVER_FLAGS: u16 = 5;
const SOCKETS: u16 = 7;
const DEAD_CONN_TIMEOUT_SECONDS: u16 = 8;
const BACKEND: u16 = 10;
/// One socket in [`SOCKETS`], and its descriptor within.
const SOCKET_ITEM: u16 = 1;
const SOCKET_FD: u16 = 1;

/// What a device is set up with.
pub struct Setup<'a> {
    /// Which; without, one that is free.
    pub index: Option<u32>,
    /// Size in bytes.
    pub size: u64,
    /// Logical and physical block size in bytes.
    pub block_size: u32,
    /// The server's transmission flags.
    pub flags: u16,
    /// Seconds after which a request is taken off its connection, which then counts as dead.
    pub timeout_seconds: u64,
    /// Seconds that requests wait while no connection is alive, before they fail.
    pub dead_seconds: u64,
    /// A text that later commands must repeat.
    pub backend: &'a str,
    /// Connections past their negotiation.
    pub sockets: &'a [BorrowedFd<'a>],
}

/// See the module.
pub struct Kernel {
    netlink: Netlink,
    family: u16,
}

impl Kernel {
    /// `None` when the kernel has no NBD client, or its module is not loaded.
    ///
    /// # Errors
    /// Netlink does not work.
    pub fn open() -> io::Result<Option<Self>> {
        let mut netlink = Netlink::open()?;
        let family = netlink.family(FAMILY)?;
        Ok(family.map(|family| Self { netlink, family }))
    }

    /// Makes a device and returns its number.
    ///
    /// # Errors
    /// EBUSY: the device that was asked for is in use.
    pub fn connect(&mut self, setup: &Setup<'_>) -> io::Result<u32> {
        let mut attrs = Attrs::new();
        if let Some(index) = setup.index {
            attrs = attrs.u32(INDEX, index);
        }
        let attrs = attrs
            .u64(SIZE_BYTES, setup.size)
            .u64(BLOCK_SIZE_BYTES, setup.block_size.into())
            .u64(TIMEOUT_SECONDS, setup.timeout_seconds)
            .u64(SERVER_FLAGS, setup.flags.into())
            .u64(DEAD_CONN_TIMEOUT_SECONDS, setup.dead_seconds)
            .text(BACKEND, setup.backend)
            .nested(SOCKETS, &sockets(setup.sockets));
        let answer = self.netlink.ask(self.family, CONNECT, &attrs)?;
        let index = attributes(&answer).into_iter().find(|(kind, _)| *kind == INDEX);
        let index = index.and_then(|(_, value)| u32::read_from_bytes(value).ok());
        index.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the kernel did not say which device it made"))
    }

    /// Offers a connection in the place of a dead one. Succeeds as well when none is dead and nothing happens.
    ///
    /// # Errors
    /// EINVAL: the device is gone, or is not what `backend` says.
    pub fn offer(&mut self, index: u32, backend: &str, socket: BorrowedFd<'_>) -> io::Result<()> {
        let attrs = Attrs::new().u32(INDEX, index).text(BACKEND, backend).nested(SOCKETS, &sockets(&[socket]));
        self.netlink.ask(self.family, RECONFIGURE, &attrs).map(drop)
    }

    /// Changes the size of a device, in bytes.
    ///
    /// # Errors
    /// As for [`Self::offer`].
    pub fn resize(&mut self, index: u32, backend: &str, size: u64) -> io::Result<()> {
        let attrs = Attrs::new().u32(INDEX, index).text(BACKEND, backend).u64(SIZE_BYTES, size);
        self.netlink.ask(self.family, RECONFIGURE, &attrs).map(drop)
    }

    /// Changes the timeouts of a device, see [`Setup`].
    ///
    /// # Errors
    /// As for [`Self::offer`].
    pub fn set_timeouts(&mut self, index: u32, backend: &str, timeout: u64, dead: u64) -> io::Result<()> {
        let attrs = Attrs::new()
            .u32(INDEX, index)
            .text(BACKEND, backend)
            .u64(TIMEOUT_SECONDS, timeout)
            .u64(DEAD_CONN_TIMEOUT_SECONDS, dead);
        self.netlink.ask(self.family, RECONFIGURE, &attrs).map(drop)
    }

    /// Ends a device. What was not answered fails.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn disconnect(&mut self, index: u32) -> io::Result<()> {
        self.netlink.ask(self.family, DISCONNECT, &Attrs::new().u32(INDEX, index)).map(drop)
    }
}

fn sockets(sockets: &[BorrowedFd<'_>]) -> Attrs {
    sockets.iter().fold(Attrs::new(), |list, socket| {
        let fd = u32::try_from(socket.as_raw_fd()).expect("descriptors are not negative");
        list.nested(SOCKET_ITEM, &Attrs::new().u32(SOCKET_FD, fd))
    })
}
