//! Volumes as `/dev/ublkbN`: this process is the kernel's block driver, and passes the requests on to the daemon.
//!
//! Each hardware queue of the device has a thread and a connection of its own ([`queue`]) to the daemon's Unix socket, so
//! the engine and what it promises are those of any NBD client. While the daemon is away requests wait here; when it is
//! back, those that were not answered are sent again in the order in which they came.
//!
//! What must hold: a request that is sent again never comes to the engine before what is left of it on the old connection.
//! That is so because the old one is closed first, and of a closed connection the daemon parses nothing any more.
//!
//! The device lives as long as this process: if it is killed, the kernel fails what is under way and takes the device away.

pub mod device;
pub mod queue;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

use libublk::ctrl::{UblkCtrl, UblkCtrlBuilder};
use libublk::io::UblkDev;
use libublk::{UblkError, UblkFlags, sys};

use self::device::Device;
use self::queue::{Stop, Target};
use crate::export::nbd::client::NbdClient;

/// There while the kernel's driver is.
pub const CONTROL: &str = "/dev/ublk-control";
/// Requests the kernel may have under way on each queue.
const DEPTH: u16 = 64;
/// Bytes of the longest read or write. Each queue has [`DEPTH`] buffers of this size.
const IO_BYTES_MAX: u32 = 256 << 10;
/// Sectors of the longest discard or write of zeroes: 2 GiB, the longest power of two whose bytes NBD can say.
const RANGE_SECTORS_MAX: u32 = 1 << 22;

/// What a device is made with.
pub struct Setup {
    /// Which; without, one that is free.
    pub device: Option<Device>,
    /// Hardware queues; the kernel makes at most one for each processor.
    pub queues: u16,
}

/// A device, served by this process.
pub struct Served {
    threads: Vec<JoinHandle<()>>,
    stop: Arc<Stop>,
    control: UblkCtrl,
}

/// Whether the kernel's driver is loaded.
pub fn is_loaded() -> bool {
    Path::new(CONTROL).exists()
}

/// A device that does nothing yet.
pub struct Added(UblkCtrl);

/// Asks the kernel for a device.
///
/// # Errors
/// EEXIST: the device that was asked for is in use.
pub fn add(setup: &Setup) -> io::Result<Added> {
    if setup.device.is_some_and(Device::exists) {
        return Err(io::Error::from_raw_os_error(libc::EEXIST));
    }
    let control = UblkCtrlBuilder::default()
        .name("blockd")
        .id(setup.device.map_or(-1, |device| device.0 as i32))
        .nr_queues(setup.queues)
        .depth(DEPTH)
        .io_buf_bytes(IO_BYTES_MAX)
        .dev_flags(UblkFlags::UBLK_DEV_F_ADD_DEV)
        .build()
        .map_err(failed)?;
    Ok(Added(control))
}

impl Added {
    /// Which it is.
    pub fn device(&self) -> Device {
        Device(self.0.dev_info().dev_id)
    }

    /// How many queues it has, and so how many connections it needs.
    pub fn queues(&self) -> usize {
        self.0.dev_info().nr_hw_queues.into()
    }

    /// Serves it with logical blocks of `block_size` bytes, a power of two, over one connection for each queue. When this returns, the device has a node and can be read.
    ///
    /// # Errors
    /// The kernel refuses it.
    pub fn serve(self, target: &Arc<Target>, block_size: u32, clients: Vec<NbdClient>) -> io::Result<Served> {
        let control = self.0;
        assert_eq!(clients.len(), usize::from(control.dev_info().nr_hw_queues), "a connection for each queue");
        let stop = Arc::new(Stop::new(clients.len()));
        let set_up = |device: &mut UblkDev| {
            device.tgt.dev_size = target.size;
            device.tgt.params = params(target.size, block_size);
            // Beside the requests: the wait for the connection.
            device.tgt.sq_depth = 2 * DEPTH;
            device.tgt.cq_depth = 4 * DEPTH;
            Ok(())
        };
        let device = Arc::new(UblkDev::new("blockd".into(), set_up, &control).map_err(failed)?);
        let mut threads = Vec::new();
        for (number, client) in (0..).zip(clients) {
            let (device, target, stop) = (device.clone(), target.clone(), stop.clone());
            threads.push(Builder::new().name(format!("ublk-queue-{number}")).spawn(move || {
                UblkCtrl::init_queue_thread();
                if let Err(error) = queue::serve(number, &device, client, &target, &stop) {
                    target.say(&format!("queue {number} ends: {}", failed(error)));
                    // If it did not come so far as to wait for requests, whoever starts the device waits for that.
                    device.notify_buffer_registration_complete(true);
                }
            })?);
        }
        let started = control.start_dev(&device).map_err(failed);
        drop(device);
        let served = Served { threads, stop, control };
        match started {
            Ok(_) => Ok(served),
            Err(error) => {
                // Its queues would wait for ever; the first error is what matters.
                let _ = served.end();
                Err(error)
            }
        }
    }
}

impl Served {
    /// Whether the kernel has taken the device away, at somebody else's request.
    pub fn is_over(&self) -> bool {
        self.threads.iter().all(JoinHandle::is_finished)
    }

    /// Takes the device away. What the kernel still has to write is written, unless the daemon is away.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn end(self) -> io::Result<()> {
        self.stop.when_away();
        self.finish()
    }

    /// Takes the device away at once; what was not answered fails.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn end_by_force(self) -> io::Result<()> {
        self.stop.now();
        self.finish()
    }

    fn finish(self) -> io::Result<()> {
        let Self { threads, control, .. } = self;
        if !threads.iter().all(JoinHandle::is_finished) {
            control.kill_dev().map_err(failed)?;
        }
        for thread in threads {
            thread.join().map_err(|_| io::Error::other("a queue has panicked"))?;
        }
        // Somebody may still have the node open. Before Linux 6.10 that has to be waited for, which dropping does.
        let _ = control.del_dev_async();
        Ok(())
    }
}

/// What the kernel is told of the volume.
fn params(size: u64, block_size: u32) -> sys::ublk_params {
    let shift = block_size.trailing_zeros() as u8;
    sys::ublk_params {
        types: sys::UBLK_PARAM_TYPE_BASIC | sys::UBLK_PARAM_TYPE_DISCARD,
        basic: sys::ublk_param_basic {
            attrs: sys::UBLK_ATTR_VOLATILE_CACHE | sys::UBLK_ATTR_FUA,
            logical_bs_shift: shift,
            physical_bs_shift: shift.max(12),
            io_opt_shift: 16,
            io_min_shift: shift.max(12),
            max_sectors: IO_BYTES_MAX >> 9,
            dev_sectors: size >> 9,
            ..Default::default()
        },
        discard: sys::ublk_param_discard {
            discard_granularity: block_size.max(4096),
            max_discard_sectors: RANGE_SECTORS_MAX,
            max_write_zeroes_sectors: RANGE_SECTORS_MAX,
            max_discard_segments: 1,
            ..Default::default()
        },
        ..Default::default()
    }
}

/// The system's error in one of the library.
fn failed(error: UblkError) -> io::Error {
    match error {
        UblkError::UringIOError(number) | UblkError::OtherError(number) if number < 0 => {
            io::Error::from_raw_os_error(-number)
        }
        UblkError::IOError(error) => error,
        other => io::Error::other(other),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_told_sizes_in_sectors() {
        let params = params(8 << 40, 4096);
        assert_eq!(params.basic.dev_sectors, 1 << 34);
        assert_eq!((params.basic.logical_bs_shift, params.basic.physical_bs_shift), (12, 12));
        assert_eq!(self::params(1 << 20, 512).basic.logical_bs_shift, 9);
        assert_eq!(self::params(1 << 20, 512).discard.discard_granularity, 4096);
    }

    #[test]
    fn errors_keep_their_number() {
        assert_eq!(failed(UblkError::UringIOError(-libc::EEXIST)).raw_os_error(), Some(libc::EEXIST));
        assert!(failed(UblkError::QueueIsDown).raw_os_error().is_none());
    }
}
