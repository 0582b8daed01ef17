//! What the reactor drives: a volume, or something that answers like one.

use std::any::Any;
use std::io;
use std::os::fd::RawFd;

use crate::outgoing::Outgoing;
use crate::volume::{Effect, JobDone, ReadNow, Token, WriteData};

/// A block device that performs no I/O of its own.
///
/// Offsets and lengths are bytes and may be anything: the device checks ranges, and reads, modifies and writes
/// partial blocks itself. Every request but a [`Device::read`] answered at once is answered by exactly one
/// [`Effect::Complete`] with its token, never from inside the call.
pub trait Device: Send + 'static {
    /// Size in bytes.
    fn size(&self) -> u64;
    /// Whether writes are refused.
    fn read_only(&self) -> bool;
    /// Appends `len` bytes to `out` at once, or answers later.
    fn read(&mut self, token: Token, offset: u64, len: u32, out: &mut Outgoing) -> ReadNow;
    /// Writes; with `fua` it is answered once durable.
    fn write(&mut self, token: Token, offset: u64, data: WriteData<'_>, fua: bool);
    /// Writes `data` if `expected`, of the same length, stands there, with nothing in between; otherwise the outcome is
    /// a mismatch and nothing is written.
    fn compare_write(&mut self, token: Token, offset: u64, expected: Vec<u8>, data: Vec<u8>, fua: bool);
    /// Makes a range read as zeroes; with `no_hole` it stays allocated.
    fn zero(&mut self, token: Token, offset: u64, len: u64, fua: bool, no_hole: bool);
    /// Makes a range what another one is, without moving the data where that is possible. Only whole blocks of 4 KiB, and ranges
    /// that do not overlap; others are refused as invalid.
    fn copy(&mut self, token: Token, from: u64, to: u64, len: u64, fua: bool);
    /// Discards a range.
    fn trim(&mut self, token: Token, offset: u64, len: u64, fua: bool);
    /// Answered once everything answered before is durable.
    fn flush(&mut self, token: Token);
    /// Describes a range in at most `max` runs.
    fn extents(&mut self, token: Token, offset: u64, len: u64, max: usize);
    /// Warms the caches for a range.
    fn prefetch(&mut self, token: Token, offset: u64, len: u64);
    /// Called before each batch of events with the times of [`super::now_us`] and [`super::wall_ms`], so that a device
    /// that may only serve until some time does not do so later, however long this thread was kept from running.
    fn tick(&mut self, _now_us: u64, _wall_ms: u64) {}
    /// Called after each batch of events with the time of [`super::now_us`].
    fn advance(&mut self, now_us: u64);
    /// The next thing to carry out.
    fn next_effect(&mut self) -> Option<Effect>;
    /// The kernel is at work on a log write; the end of this process would not stop it.
    fn log_handed(&mut self, id: u64);
    /// A log operation ended.
    fn log_done(&mut self, id: u64, result: io::Result<()>);
    /// A job ended.
    fn job_done(&mut self, done: JobDone);
    /// When [`Device::advance`] wants to be called next at the latest.
    fn deadline_us(&self) -> Option<u64>;
    /// Begins an orderly shutdown; effects continue until [`Device::closed`].
    fn close(&mut self);
    /// Whether nothing is left to do.
    fn closed(&self) -> bool;
    /// The open file of a log segment; stays open while an operation on it runs.
    fn log_fd(&self, segment: u32) -> RawFd;
    /// For callers of [`super::ReactorHandle::with_device`] that know the concrete type.
    fn as_any_mut(&mut self) -> &mut dyn Any;
}
