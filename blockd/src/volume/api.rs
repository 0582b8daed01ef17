//! The words in which a driver and a [`super::Volume`] talk.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;

use crate::buf::{AlignedBuf, Slice};
use crate::outgoing::Outgoing;
use crate::types::Lsn;

/// Names a request to the driver; the volume only hands it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Token(pub u64);

/// Bytes of a write.
pub enum WriteData<'a> {
    /// Copied by the volume before the call returns.
    Copy(&'a [u8]),
    /// Taken over without a copy. `len` is the number of meaningful bytes at its start; the call's offset and
    /// `len` must be multiples of 4 KiB.
    Owned(AlignedBuf, usize),
}

/// Why a request failed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IoError {
    /// Offset or length outside the volume.
    #[error("request outside the volume")]
    OutOfRange,
    /// The request makes no sense.
    #[error("invalid request: {0}")]
    Invalid(&'static str),
    /// A write to a read-only export.
    #[error("the volume is read-only")]
    ReadOnly,
    /// The volume is closing; try again on a new connection.
    #[error("the volume is shutting down")]
    Shutdown,
    /// The log device failed; nothing more is acknowledged until the daemon is restarted on a good device.
    #[error("the log device failed: {0}")]
    LogDead(Arc<str>),
    /// The volume stopped accepting writes, for instance because another host took it over.
    #[error("the volume stopped: {0}")]
    Stopped(Arc<str>),
    /// The data could not be read or did not match its checksum.
    #[error("read failed: {0}")]
    Read(Arc<str>),
}

/// What a request came to.
#[derive(Debug)]
pub enum Outcome {
    /// Done; nothing to carry.
    Done,
    /// Data of a read that could not be answered at once.
    Data(ReadData),
    /// A compare-and-write found something else, and changed nothing.
    Mismatch,
    /// Answer of [`super::Volume::extents`], in order, contiguous from the asked offset, at least one.
    Extents(Vec<ExtentStatus>),
}

/// Bytes of a read.
#[derive(Debug)]
pub struct ReadData {
    /// Exactly the bytes asked for, zero-filled in holes.
    pub bytes: Outgoing,
    /// Ranges (offset within `bytes`, length) known to be unmapped, in order.
    pub holes: Vec<(usize, usize)>,
}

/// What stands behind a range of the volume.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Allocation {
    /// Written data.
    Data,
    /// Zeroes written with "no hole": reads as zeroes and counts as allocated.
    Zero,
    /// Never written, or trimmed; reads as zeroes.
    Hole,
}

/// A run of equal allocation, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentStatus {
    /// Length in bytes.
    pub len: u64,
    /// What stands there.
    pub allocation: Allocation,
}

/// A finished request.
#[derive(Debug)]
pub struct Completion {
    /// As given with the request.
    pub token: Token,
    /// Its outcome.
    pub result: Result<Outcome, IoError>,
}

/// Answer to [`super::Volume::read`].
#[derive(Debug, PartialEq, Eq)]
pub enum ReadNow {
    /// The bytes were appended to the caller's buffer, `holes` as in [`ReadData`] (relative to the appended bytes).
    Ready {
        /// Ranges known to be unmapped.
        holes: Vec<(usize, usize)>,
    },
    /// Nothing was appended; a [`Completion`] follows.
    Pending,
    /// Nothing was appended; the request is refused.
    Failed(IoError),
}

/// An operation on the log device. The driver must report it by [`super::Volume::log_done`].
#[derive(Debug)]
pub struct LogIo {
    /// Names this operation within its volume.
    pub id: u64,
    /// What to do.
    pub op: LogOp,
}

/// See [`LogIo`].
#[derive(Debug)]
pub enum LogOp {
    /// Write all of `bufs`, one after the other, at `offset` of a segment. Everything is 4 KiB aligned. The buffers
    /// must stay alive until the operation is done. With `dsync` it is done when it is durable (RWF_DSYNC).
    Write {
        /// Segment number, as known to the log device.
        segment: u32,
        /// Byte offset within the segment file.
        offset: u64,
        /// The data, in order.
        bufs: Vec<Slice>,
        /// Done only when durable.
        dsync: bool,
    },
    /// Make everything written to the segment so far durable (fdatasync).
    Sync {
        /// Segment number.
        segment: u32,
    },
}

/// Work for ordinary threads; its output goes to [`super::Volume::job_done`].
pub type Job = Pin<Box<dyn Future<Output = super::JobDone> + Send>>;

/// Something the driver must carry out.
pub enum Effect {
    /// Answer a request.
    Complete(Completion),
    /// Start a log operation.
    Log(LogIo),
    /// Run a job.
    Spawn(Job),
}

/// The newest LSN a stage has reached.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Horizons {
    /// Accepted.
    pub accepted: Lsn,
    /// On the log device's medium.
    pub durable: Lsn,
    /// In the bucket, as part of a contiguous prefix.
    pub destaged: Lsn,
}
