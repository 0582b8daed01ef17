//! The other shape of the hot path: a thread beside the reactor performs its log operations, one after the other.

use std::io;
use std::os::fd::RawFd;
use std::sync::mpsc;

use super::handle::{DeviceKey, Message};
use super::inbox::Sender;
use super::log_io::WriteCursor;
use crate::volume::{LogIo, LogOp};

/// Ends its thread when dropped, after what was started.
pub(super) struct LogThread {
    queue: mpsc::Sender<(DeviceKey, RawFd, LogIo)>,
}

impl LogThread {
    pub fn spawn(done: Sender) -> io::Result<Self> {
        let (queue, jobs) = mpsc::channel::<(DeviceKey, RawFd, LogIo)>();
        std::thread::Builder::new().name("log".into()).spawn(move || {
            for (device, fd, io) in jobs {
                let result = perform(fd, io.op);
                done.send(Message::LogDone(device, io.id, result));
            }
        })?;
        Ok(Self { queue })
    }

    /// Starts an operation on the open file `fd`; its end comes through the inbox.
    pub fn start(&self, device: DeviceKey, fd: RawFd, io: LogIo) {
        // The thread ends only when `queue` is dropped.
        let _ = self.queue.send((device, fd, io));
    }
}

fn perform(fd: RawFd, op: LogOp) -> io::Result<()> {
    match op {
        LogOp::Sync { .. } => {
            // SAFETY: plain system call on a descriptor the device keeps open.
            check(unsafe { libc::fdatasync(fd) } as isize).map(drop)
        }
        LogOp::Write { offset, bufs, dsync, .. } => {
            let mut cursor = WriteCursor::new(bufs, offset);
            let flags = if dsync { libc::RWF_DSYNC } else { 0 };
            loop {
                let (offset, iovecs) = cursor.rest();
                // SAFETY: the iovecs and what they point to are owned by the cursor, which outlives the call.
                let result = unsafe { libc::pwritev2(fd, iovecs.as_ptr(), iovecs.len() as i32, offset as i64, flags) };
                if let Some(result) = cursor.advance(check(result)) {
                    return result;
                }
            }
        }
    }
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}
