//! A connection for checking and for torment, over either protocol, in the words of NBD.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use blockd::export::nbd::client::{Errno, NbdClient, ReplyData, Request};
use blockd::export::nbd::proto::errno;
use blockd::export::nvme::NSID;
use blockd::export::nvme::client::{
    Data, NvmeClient, Options, deallocate_command, read_command, write_command, zero_command,
};
use blockd::export::nvme::command::{Command, Status, io as op};

/// See the module.
pub trait Client: Send {
    /// Size of the export in bytes.
    fn size(&self) -> u64;
    /// Changes how long a wait for the server may take.
    fn set_timeout(&mut self, timeout: Option<Duration>);
    /// Queues a request and returns the cookie its reply will carry.
    fn submit(&mut self, request: Request<'_>) -> io::Result<u64>;
    /// Sends what is queued and waits for the next reply.
    fn next_reply(&mut self) -> io::Result<(u64, Result<ReplyData, Errno>)>;
    /// Makes everything written so far durable.
    fn flush(&mut self) -> io::Result<()> {
        self.submit(Request::Flush)?;
        self.next_reply()?.1?;
        Ok(())
    }
}

impl Client for NbdClient {
    fn size(&self) -> u64 {
        self.size()
    }
    fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.set_timeout(timeout);
    }
    fn submit(&mut self, request: Request<'_>) -> io::Result<u64> {
        self.submit(request)
    }
    fn next_reply(&mut self) -> io::Result<(u64, Result<ReplyData, Errno>)> {
        self.next_reply()
    }
}

/// A controller of one volume with one I/O queue.
pub struct NvmeVolume(NvmeClient);

impl NvmeVolume {
    /// Connects; with digests, so that they are exercised as well.
    pub fn connect(addr: SocketAddr, subsystem: &str) -> io::Result<Self> {
        let timeout = Some(Duration::from_secs(30));
        let options = Options { digests: (true, true), timeout, ..Options::default() };
        Ok(Self(NvmeClient::connect(addr, subsystem, 1, &options)?))
    }
}

impl Client for NvmeVolume {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn set_timeout(&mut self, timeout: Option<Duration>) {
        self.0.io[0].set_timeout(timeout);
    }

    fn submit(&mut self, request: Request<'_>) -> io::Result<u64> {
        let (command, data) = match request {
            Request::Read { offset, len } => (read_command(offset, len), Data::In(len)),
            Request::Write { offset, data, fua } => {
                (write_command(offset, data.len() as u32, fua), Data::Out(data.to_vec()))
            }
            Request::Flush => (Command::new(op::FLUSH, 0, NSID), Data::None),
            Request::Trim { offset, len, .. } => deallocate_command(&[(offset, len.into())]),
            Request::WriteZeroes { offset, len, fua, no_hole } => {
                (zero_command(offset, len, fua, !no_hole), Data::None)
            }
            Request::Cache { .. } | Request::BlockStatus { .. } => {
                return Err(io::Error::new(io::ErrorKind::Unsupported, "NVMe has no such command"));
            }
        };
        self.0.io[0].submit(command, data).map(u64::from)
    }

    fn next_reply(&mut self) -> io::Result<(u64, Result<ReplyData, Errno>)> {
        let done = self.0.io[0].next_done()?;
        let result = match done.status {
            Status::SUCCESS if done.data.is_empty() => Ok(ReplyData::Done),
            Status::SUCCESS => Ok(ReplyData::Data(done.data)),
            status => {
                eprintln!("{status}");
                Err(Errno(errno::EIO))
            }
        };
        Ok((done.cid.into(), result))
    }
}
