//! Threads that own volumes: each runs one io_uring for its sockets and its volumes' logs.
//!
//! A turn of a reactor waits once, handles everything that completed, lets each touched [`Device`] advance, carries
//! out its effects, and submits all that follows with the next wait: one system call per batch. A device lives on
//! one reactor for its whole life, and so do its connections, so nothing on the hot path takes a lock.
//!
//! What must hold: memory given to the kernel stays alive until the operation's completion was seen, whatever
//! becomes of connection or device meanwhile; a device's answer to a client that has left is dropped by the
//! generation in its token; per connection, memory is bounded by ceasing to receive.

mod conn;
mod device;
mod handle;
mod inbox;
mod log_io;
mod log_thread;
mod ram;
mod ring;
mod run;
mod session;
mod slab;

use std::sync::OnceLock;

pub use device::Device;
pub use handle::{ConnectionInfo, DeviceKey, LogShape, ReactorHandle, ReactorOptions};
pub use log_io::writes_durably;
pub use ram::RamDevice;
pub use session::{Client, DIRECT_PAYLOAD, NewSession, Progress, Session, SessionError, SessionStats, Task};

/// Microseconds on a monotonic clock that also counts while the machine is suspended, and starts at 1 when the process
/// first asks.
pub fn now_us() -> u64 {
    static START: OnceLock<u64> = OnceLock::new();
    let now = boot_us();
    now.saturating_sub(*START.get_or_init(|| now)) + 1
}

fn boot_us() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call gets a valid struct; this clock exists on every Linux we run on.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    assert!(result == 0, "the boot clock can be read");
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1000
}

/// Unix time in milliseconds.
pub fn wall_ms() -> u64 {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    since.map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}
