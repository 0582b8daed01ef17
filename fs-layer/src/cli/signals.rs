//! How a running fsd is asked to stop.

use std::io;

/// SIGTERM and SIGINT, blocked for all threads from here on and taken by whoever waits.
pub(super) struct Signals {
    set: libc::sigset_t,
}

impl Signals {
    /// Before the first thread is started, so that all of them inherit it.
    pub(super) fn catch() -> Signals {
        // SAFETY: a zeroed set is what sigemptyset makes anyway; all calls get valid pointers.
        let set = unsafe {
            let mut set: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            libc::sigaddset(&raw mut set, libc::SIGTERM);
            libc::sigaddset(&raw mut set, libc::SIGINT);
            libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            set
        };
        Signals { set }
    }

    /// Waits for the next one and names it.
    pub(super) fn wait(&self) -> io::Result<&'static str> {
        let mut signal = 0;
        // SAFETY: both pointers are valid.
        match unsafe { libc::sigwait(&raw const self.set, &raw mut signal) } {
            0 if signal == libc::SIGTERM => Ok("SIGTERM"),
            0 => Ok("SIGINT"),
            error => Err(io::Error::from_raw_os_error(error)),
        }
    }
}
