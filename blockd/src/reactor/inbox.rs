//! How other threads talk to a reactor: a queue, and an eventfd that ends its wait.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};

use super::handle::Message;

/// The sending side.
#[derive(Clone)]
pub(super) struct Sender {
    queue: mpsc::Sender<Message>,
    bell: Arc<Bell>,
}

/// The receiving side.
pub(super) struct Inbox {
    queue: mpsc::Receiver<Message>,
    bell: Arc<Bell>,
}

struct Bell {
    eventfd: OwnedFd,
    /// Set from the first ring until the reactor saw it, so that a burst of messages costs one system call.
    rung: AtomicBool,
}

impl Bell {
    fn ring(&self) {
        if self.rung.swap(true, Ordering::AcqRel) {
            return;
        }
        let one = 1u64;
        // SAFETY: writes 8 bytes from a live local to an eventfd we own. It cannot fail: the counter never fills,
        // because `rung` allows one increment per read.
        unsafe { libc::write(self.eventfd.as_raw_fd(), (&raw const one).cast(), 8) };
    }
}

/// A connected pair.
pub(super) fn channel() -> io::Result<(Sender, Inbox)> {
    // SAFETY: plain system call; the result is checked.
    let fd = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    let bell = Arc::new(Bell {
        // SAFETY: a fresh descriptor nobody else owns.
        eventfd: unsafe { OwnedFd::from_raw_fd(fd) },
        rung: AtomicBool::new(false),
    });
    let (tx, rx) = mpsc::channel();
    let sender = Sender { queue: tx, bell: bell.clone() };
    Ok((sender, Inbox { queue: rx, bell }))
}

impl Sender {
    /// Gives a message to the reactor; `false` if it has stopped.
    pub fn send(&self, message: Message) -> bool {
        let sent = self.queue.send(message).is_ok();
        self.bell.ring();
        sent
    }

    /// Ends the reactor's wait.
    pub fn ring(&self) {
        self.bell.ring();
    }
}

impl Inbox {
    /// The next message, if there is one.
    pub fn next(&self) -> Option<Message> {
        self.queue.try_recv().ok()
    }

    /// The bell was heard: later messages ring again. Call it before emptying the queue.
    pub fn heard(&self) {
        // A swap, to see what a sender queued before it found the bell rung already.
        self.bell.rung.swap(false, Ordering::AcqRel);
    }

    /// What to read from to wait for the bell.
    pub fn fd(&self) -> RawFd {
        self.bell.eventfd.as_raw_fd()
    }
}
