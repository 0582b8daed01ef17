//! The io_uring of one reactor: which operations exist, and how their completions are told apart.

use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use io_uring::{IoUring, cqueue, opcode, squeue, types};

/// Submission entries; a fuller batch is submitted in parts.
const SUBMISSIONS: u32 = 512;
/// Completion entries; the kernel keeps an overflow for us, at a cost.
const COMPLETIONS: u32 = 8192;
/// How long to look for completions before sleeping: a round trip of a client that answers at once.
const SPIN: Duration = Duration::from_micros(50);
/// `IORING_ENTER_GETEVENTS`: lets the kernel finish what waits for this thread.
const ENTER_GETEVENTS: u32 = 1;
/// `IORING_RECVSEND_POLL_FIRST`: wait for readiness before the first attempt.
const POLL_FIRST: u16 = 1;

/// What completed, and for whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Op {
    /// Receive on a connection.
    Recv(u32),
    /// Send on a connection.
    Send(u32),
    /// A log operation.
    Log(u32),
    /// The inbox was signalled.
    Inbox,
}

impl Op {
    fn encode(self) -> u64 {
        let (kind, index) = match self {
            Op::Recv(index) => (0, index),
            Op::Send(index) => (1, index),
            Op::Log(index) => (2, index),
            Op::Inbox => (3, 0),
        };
        kind << 32 | u64::from(index)
    }

    fn decode(user_data: u64) -> Self {
        let index = user_data as u32;
        match user_data >> 32 {
            0 => Op::Recv(index),
            1 => Op::Send(index),
            2 => Op::Log(index),
            _ => Op::Inbox,
        }
    }
}

/// How a log write is made.
#[derive(Clone, Copy, Debug)]
pub(super) struct WriteMode {
    /// Complete when durable.
    pub dsync: bool,
    /// Fail with EAGAIN where the kernel would have to hand the write to a thread of this process, which dies with it.
    pub at_once: bool,
}

/// A finished operation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Event {
    pub op: Op,
    /// Bytes, or the negated errno.
    pub result: i32,
    /// After a receive: the socket has more.
    pub more_to_receive: bool,
}

/// See the module. Belongs to the thread that made it.
pub(super) struct Ring {
    uring: IoUring,
    outstanding: usize,
    /// Completions come so quickly that sleeping is not worth it.
    spinning: bool,
}

impl Ring {
    /// A ring with the cheapest completion delivery this kernel offers.
    pub fn new() -> io::Result<Self> {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(COMPLETIONS).setup_clamp();
        let mut fast = builder.clone();
        fast.setup_single_issuer().setup_defer_taskrun().setup_coop_taskrun();
        Ok(Self {
            uring: fast.build(SUBMISSIONS).or_else(|_| builder.build(SUBMISSIONS))?,
            outstanding: 0,
            spinning: false,
        })
    }

    /// Operations whose completion was not seen yet.
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }

    /// Submits what was queued and waits for a completion, at most `timeout`.
    ///
    /// While completions come quickly it looks for them for a moment before it sleeps: to be woken from sleep takes
    /// longer, above all on a virtual machine. One such moment in vain ends that, one short sleep begins it again.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if timeout == Some(Duration::ZERO) {
            return self.sleep(timeout);
        }
        if self.spinning {
            self.spinning = self.spin()?;
            if self.spinning {
                return Ok(());
            }
        }
        let begun = Instant::now();
        self.sleep(timeout)?;
        self.spinning = begun.elapsed() < SPIN;
        Ok(())
    }

    /// Whether a completion came within [`SPIN`].
    fn spin(&mut self) -> io::Result<bool> {
        let until = Instant::now() + SPIN;
        loop {
            self.submit()?;
            if !self.uring.completion().is_empty() {
                return Ok(true);
            }
            if Instant::now() >= until {
                return Ok(false);
            }
        }
    }

    fn sleep(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        let submitter = self.uring.submitter();
        let result = match timeout {
            None => submitter.submit_and_wait(1),
            Some(timeout) => {
                let timespec = types::Timespec::from(timeout);
                submitter.submit_with_args(1, &types::SubmitArgs::new().timespec(&timespec))
            }
        };
        match result {
            Ok(_) => Ok(()),
            // ETIME is the timeout.
            Err(error) if error.raw_os_error() == Some(libc::ETIME) || is_passing(&error) => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Moves what has completed to the end of `events`.
    pub fn collect(&mut self, events: &mut Vec<Event>) {
        let before = events.len();
        events.extend(self.uring.completion().map(|entry| Event {
            op: Op::decode(entry.user_data()),
            result: entry.result(),
            more_to_receive: cqueue::sock_nonempty(entry.flags()),
        }));
        self.outstanding -= events.len() - before;
    }

    /// Receives into `buf`; `all` waits until it is full. `likely` means that data is expected to be there already.
    ///
    /// # Safety
    /// `buf` must be valid for writes of `len` bytes, and untouched, until the completion was collected.
    pub unsafe fn recv(&mut self, conn: u32, fd: RawFd, buf: *mut u8, len: usize, all: bool, likely: bool) {
        let entry = opcode::Recv::new(types::Fd(fd), buf, clamp(len))
            .flags(if all { libc::MSG_WAITALL } else { 0 })
            .ioprio(if likely { 0 } else { POLL_FIRST })
            .build();
        // SAFETY: passed on to the caller.
        unsafe { self.push(entry, Op::Recv(conn)) }
    }

    /// Sends `buf`, normally all of it.
    ///
    /// # Safety
    /// `buf` must be valid for reads of `len` bytes, and unchanged, until the completion was collected.
    pub unsafe fn send(&mut self, conn: u32, fd: RawFd, buf: *const u8, len: usize) {
        let entry =
            opcode::Send::new(types::Fd(fd), buf, clamp(len)).flags(libc::MSG_NOSIGNAL | libc::MSG_WAITALL).build();
        // SAFETY: passed on to the caller.
        unsafe { self.push(entry, Op::Send(conn)) }
    }

    /// Sends what a message points to, normally all of it.
    ///
    /// # Safety
    /// `message` and all it points to must be valid and unchanged until the completion was collected.
    pub unsafe fn send_message(&mut self, conn: u32, fd: RawFd, message: *const libc::msghdr) {
        let flags = (libc::MSG_NOSIGNAL | libc::MSG_WAITALL) as u32;
        let entry = opcode::SendMsg::new(types::Fd(fd), message).flags(flags).build();
        // SAFETY: passed on to the caller.
        unsafe { self.push(entry, Op::Send(conn)) }
    }

    /// Submits what was queued, and lets the kernel report what it would not take on at once.
    pub fn submit(&mut self) -> io::Result<()> {
        self.enter().or_else(|error| if is_passing(&error) { Ok(()) } else { Err(error) })
    }

    fn enter(&mut self) -> io::Result<()> {
        let pending = self.uring.submission().len() as u32;
        // SAFETY: no argument is passed, and what the submissions point to their submitter keeps valid.
        unsafe { self.uring.submitter().enter::<libc::sigset_t>(pending, 0, ENTER_GETEVENTS, None) }.map(drop)
    }

    /// Operations that wait for submission.
    pub fn queued(&mut self) -> usize {
        self.uring.submission().len()
    }

    /// Writes `iovecs` at `offset` of a file; see [`WriteMode`].
    ///
    /// # Safety
    /// `iovecs` and all they point to must be valid and unchanged until the completion was collected.
    pub unsafe fn writev(&mut self, log: u32, fd: RawFd, iovecs: &[libc::iovec], offset: u64, mode: WriteMode) {
        let WriteMode { dsync, at_once } = mode;
        let flags = if dsync { libc::RWF_DSYNC } else { 0 } | if at_once { libc::RWF_NOWAIT } else { 0 };
        let fd = types::Fd(fd);
        let entry = match iovecs {
            [one] => {
                opcode::Write::new(fd, one.iov_base.cast(), clamp(one.iov_len)).offset(offset).rw_flags(flags).build()
            }
            many => opcode::Writev::new(fd, many.as_ptr(), many.len() as u32).offset(offset).rw_flags(flags).build(),
        };
        // SAFETY: passed on to the caller.
        unsafe { self.push(entry, Op::Log(log)) }
    }

    /// Makes a file's data durable.
    pub fn fdatasync(&mut self, log: u32, fd: RawFd) {
        let entry = opcode::Fsync::new(types::Fd(fd)).flags(types::FsyncFlags::DATASYNC).build();
        // SAFETY: no memory is involved.
        unsafe { self.push(entry, Op::Log(log)) }
    }

    /// Reads the counter of the inbox's eventfd.
    ///
    /// # Safety
    /// `counter` must be valid for a write of 8 bytes, and untouched, until the completion was collected.
    pub unsafe fn read_inbox(&mut self, fd: RawFd, counter: *mut u64) {
        let entry = opcode::Read::new(types::Fd(fd), counter.cast(), 8).build();
        // SAFETY: passed on to the caller.
        unsafe { self.push(entry, Op::Inbox) }
    }

    /// # Safety
    /// Memory the entry points to must be valid until its completion was collected.
    unsafe fn push(&mut self, entry: squeue::Entry, op: Op) {
        let entry = entry.user_data(op.encode());
        self.outstanding += 1;
        loop {
            // SAFETY: passed on to the caller.
            let pushed = unsafe { self.uring.submission().push(&entry) };
            if pushed.is_ok() {
                return;
            }
            // A full queue empties itself by submitting; errors that persist surface in `wait`.
            if let Err(error) = self.uring.submit()
                && !is_passing(&error)
            {
                panic!("io_uring refuses submissions: {error}");
            }
        }
    }
}

/// Whether an error of io_uring_enter is over with the next call; EBUSY and EAGAIN ask for completions to be collected
/// before it.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EBUSY | libc::EAGAIN))
}

/// The kernel moves at most this much per operation; the rest is a short transfer.
fn clamp(len: usize) -> u32 {
    len.min(1 << 30) as u32
}
