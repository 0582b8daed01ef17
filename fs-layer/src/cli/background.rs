//! Going on in the background once everything is ready.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::path::Path;

/// The end of a background process that tells the one in the foreground how it went.
pub(super) struct Background {
    tell: File,
}

impl Background {
    /// Splits the process. The one in the foreground waits here until the other is ready, and ends; what it was not ready
    /// for was said on stderr, and is its exit code. Only the other returns.
    ///
    /// Before the first thread is started: only the thread that calls survives in the other process.
    pub(super) fn split() -> io::Result<Background> {
        let mut ends = [0; 2];
        // SAFETY: room for two descriptors.
        if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the two are open and nobody else's.
        let (mut hear, tell) = unsafe { (File::from_raw_fd(ends[0]), File::from_raw_fd(ends[1])) };
        // SAFETY: there is one thread.
        match unsafe { libc::fork() } {
            -1 => Err(io::Error::last_os_error()),
            0 => {
                drop(hear);
                // SAFETY: no arguments. It fails only for the leader of a group, which a new process is not.
                unsafe { libc::setsid() };
                Ok(Background { tell })
            }
            _ => {
                drop(tell);
                let mut ready = [0];
                let code = if hear.read_exact(&mut ready).is_ok() { 0 } else { 1 };
                // The other goes on with everything, so nothing is cleaned up here.
                // SAFETY: ends the process.
                unsafe { libc::_exit(code) }
            }
        }
    }

    /// Lets the process in the foreground end well, and the terminal go. Messages go to the file from now on.
    pub(super) fn ready(mut self, log: &Path) -> io::Result<()> {
        let nothing = OpenOptions::new().read(true).open("/dev/null")?;
        let log = OpenOptions::new().create(true).append(true).open(log)?;
        for (from, to) in [(nothing.as_raw_fd(), 0), (log.as_raw_fd(), 1), (log.as_raw_fd(), 2)] {
            // SAFETY: both are open descriptors of this process.
            if unsafe { libc::dup2(from, to) } < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        self.tell.write_all(&[1])
    }
}
