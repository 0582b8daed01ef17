//! Log operations on their way to the device.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use super::handle::DeviceKey;
use super::ring::{Event, Op, Ring, WriteMode};
use super::slab::Slab;
use crate::buf::Slice;
use crate::volume::{LogIo, LogOp};

/// `IOV_MAX`: a longer write goes out in parts.
const MAX_IOVECS: usize = 1024;

/// What is left of a write.
pub(super) struct WriteCursor {
    bufs: Vec<Slice>,
    offset: u64,
    /// Bytes written so far.
    written: usize,
    total: usize,
    iovecs: Vec<libc::iovec>,
}

// SAFETY: the iovecs point into `bufs`, which are `Send` and travel along.
unsafe impl Send for WriteCursor {}

impl WriteCursor {
    pub fn new(bufs: Vec<Slice>, offset: u64) -> Self {
        let total = bufs.iter().map(|buf| buf.len()).sum();
        Self { bufs, offset, written: 0, total, iovecs: Vec::new() }
    }

    /// Where the rest goes, and the rest. The memory behind it lives as long as the cursor.
    pub fn rest(&mut self) -> (u64, &[libc::iovec]) {
        self.iovecs.clear();
        let mut skip = self.written;
        for buf in &self.bufs {
            if skip >= buf.len() {
                skip -= buf.len();
                continue;
            }
            if self.iovecs.len() == MAX_IOVECS {
                break;
            }
            let part = &buf[skip..];
            skip = 0;
            self.iovecs.push(libc::iovec {
                // The kernel only reads through it.
                iov_base: part.as_ptr().cast_mut().cast(),
                iov_len: part.len(),
            });
        }
        (self.offset + self.written as u64, &self.iovecs)
    }

    /// Bytes that are left.
    fn left(&self) -> usize {
        self.total - self.written
    }

    /// Takes in the result of writing [`WriteCursor::rest`]; `None` means that some is left.
    pub fn advance(&mut self, result: io::Result<usize>) -> Option<io::Result<()>> {
        match result {
            Ok(0) if self.written < self.total => Some(Err(io::ErrorKind::WriteZero.into())),
            Ok(bytes) => {
                self.written += bytes;
                (self.written >= self.total).then_some(Ok(()))
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => None,
            Err(error) => Some(Err(error)),
        }
    }
}

/// Whether the device under an open file makes a write durable by itself (FUA, or no volatile cache). Elsewhere a
/// durable write is a write and a cache flush that the kernel hands to a worker thread of ordinary priority, behind
/// everything that wants the processor; a plain write and a sync after it are then several times faster under load.
pub fn writes_durably(fd: BorrowedFd<'_>) -> bool {
    let mut stat = std::mem::MaybeUninit::<libc::stat>::uninit();
    // SAFETY: `stat` is large enough, and only read if the call filled it.
    let stat = unsafe {
        if libc::fstat(fd.as_raw_fd(), stat.as_mut_ptr()) != 0 {
            return false;
        }
        stat.assume_init()
    };
    let device = match stat.st_mode & libc::S_IFMT {
        libc::S_IFBLK => stat.st_rdev,
        _ => stat.st_dev,
    };
    let sys = format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device));
    // A partition has its queue at its parent.
    ["queue", "../queue"].iter().any(|queue| {
        let attribute = |name| std::fs::read_to_string(format!("{sys}/{queue}/{name}")).unwrap_or_default();
        attribute("fua").trim() == "1" || attribute("write_cache").trim() == "write through"
    })
}

struct Running {
    device: DeviceKey,
    id: u64,
    fd: RawFd,
    /// `None` for a sync.
    write: Option<(WriteCursor, WriteMode)>,
}

/// Log operations in the ring.
///
/// A write is first tried with `at_once`: either the kernel is at work on it when the submission returns, and the end
/// of this process does not stop it any more, or it fails with EAGAIN and is submitted again without.
pub(super) struct RingLog {
    running: Slab<Running>,
    /// Writes queued since the last [`RingLog::handed`].
    fresh: Vec<u32>,
}

impl RingLog {
    pub fn new() -> Self {
        Self { running: Slab::new(), fresh: Vec::new() }
    }

    /// Starts an operation on the open file `fd`.
    pub fn start(&mut self, ring: &mut Ring, device: DeviceKey, fd: RawFd, io: LogIo) {
        let write = match io.op {
            LogOp::Write { offset, bufs, dsync, .. } => {
                Some((WriteCursor::new(bufs, offset), WriteMode { dsync, at_once: true }))
            }
            LogOp::Sync { .. } => None,
        };
        let is_write = write.is_some();
        let slot = self.running.insert(Running { device, id: io.id, fd, write });
        if is_write {
            self.fresh.push(slot);
        }
        self.submit(ring, slot);
    }

    fn submit(&mut self, ring: &mut Ring, slot: u32) {
        let Some(running) = self.running.get_mut(slot) else {
            return;
        };
        match &mut running.write {
            Some((cursor, mode)) => {
                let (offset, iovecs) = cursor.rest();
                // SAFETY: the iovecs' array and the slices they point into are owned by the cursor, whose heap
                // memory stays where it is in `running` until `completed` removes it.
                unsafe { ring.writev(slot, running.fd, iovecs, offset, *mode) }
            }
            None => ring.fdatasync(slot, running.fd),
        }
    }

    /// Whether writes were queued that the kernel may be at work on after the next submission.
    pub fn has_fresh(&self) -> bool {
        !self.fresh.is_empty()
    }

    /// The writes queued since the last call on which the kernel is at work: call it right after a submission.
    /// `events` is what has completed since then, among it what the kernel would not take on.
    pub fn handed(&mut self, events: &[Event]) -> Vec<(DeviceKey, u64)> {
        let running = &self.running;
        let whole = |slot: u32| {
            let left = running.get(slot).and_then(|r| r.write.as_ref()).map_or(0, |(cursor, _)| cursor.left());
            let mut ended = events.iter().filter(|event| event.op == Op::Log(slot));
            ended.all(|event| event.result as usize == left && event.result >= 0)
        };
        let handed = self.fresh.iter().filter(|&&slot| whole(slot));
        let handed = handed.filter_map(|&slot| running.get(slot)).map(|r| (r.device, r.id)).collect();
        self.fresh.clear();
        handed
    }

    /// Takes in a completion. Returns the operation if it is over.
    pub fn completed(&mut self, ring: &mut Ring, slot: u32, errno: i32) -> Option<(DeviceKey, u64, io::Result<()>)> {
        let running = self.running.get_mut(slot)?;
        let result = match errno {
            0.. => Ok(errno as usize),
            _ => Err(io::Error::from_raw_os_error(-errno)),
        };
        let over = match &mut running.write {
            Some((_, mode)) if mode.at_once && errno == -libc::EAGAIN => {
                mode.at_once = false;
                None
            }
            Some((cursor, _)) => cursor.advance(result),
            // A failed sync may have dropped what it could not write; it is never tried again.
            None => Some(result.map(drop)),
        };
        let Some(result) = over else {
            self.submit(ring, slot);
            return None;
        };
        let running = self.running.remove(slot)?;
        Some((running.device, running.id, result))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::buf::AlignedBuf;

    #[test]
    fn a_short_write_goes_on_where_it_stopped() {
        let bufs = (0..3).map(|_| AlignedBuf::zeroed(4096).into()).collect();
        let mut cursor = WriteCursor::new(bufs, 8192);
        assert_eq!(cursor.rest().1.len(), 3);
        assert!(cursor.advance(Ok(4096 + 100)).is_none());
        let (offset, iovecs) = cursor.rest();
        assert_eq!(offset, 8192 + 4096 + 100);
        assert_eq!(iovecs.iter().map(|v| v.iov_len).collect::<Vec<_>>(), [3996, 4096]);
        assert!(cursor.advance(Err(io::ErrorKind::Interrupted.into())).is_none());
        assert!(cursor.advance(Ok(3996 + 4096)).unwrap().is_ok());
    }

    #[test]
    fn a_file_without_a_disk_is_not_durable() {
        let file = std::fs::File::open("/proc/self/stat").unwrap();
        assert!(!writes_durably(std::os::fd::AsFd::as_fd(&file)));
    }

    #[test]
    fn a_write_that_does_not_move_is_an_error() {
        let mut cursor = WriteCursor::new(vec![AlignedBuf::zeroed(4096).into()], 0);
        cursor.rest();
        assert!(cursor.advance(Ok(0)).unwrap().is_err());
    }
}
