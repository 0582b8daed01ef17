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
mod slab;

use std::sync::OnceLock;
use std::time::Instant;

pub use device::Device;
pub use handle::{ConnectionInfo, DeviceKey, LogShape, ReactorHandle, ReactorOptions};
pub use log_io::writes_durably;
pub use ram::RamDevice;

/// Microseconds on a monotonic clock that starts at 1 when the process first asks.
pub fn now_us() -> u64 {
    static START: OnceLock<Instant> = OnceLock::new();
    START.get_or_init(Instant::now).elapsed().as_micros() as u64 + 1
}
