//! fcntl locks, and who waits for one.
//!
//! A request that waits would block one of few threads, so it moves to a thread for all waiters, which tries again
//! when [`Vfs::wait_for_unlock`] says so. It also looks whether the waiting process has got a signal: `fuser` does not hand on the kernel's
//! interrupts, and without an answer the process could not even be killed.

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use fuser::{Errno, ReplyEmpty};

use super::convert::errno;
use crate::vfs::{FileLock, Ino, LockOwner, Vfs};

/// How often waiters are asked for signals.
const LOOK_PERIOD: Duration = Duration::from_millis(100);

/// What locks say of this mount as a client; NFS clients count up from 1.
const CLIENT: u64 = u64::MAX;

/// See the module.
pub(super) struct Locks {
    tree: Arc<dyn Vfs>,
    to_waiters: Mutex<Sender<Message>>,
    /// Who may have locks, so that only they are asked to give them up when they close the file.
    owners: Mutex<HashSet<(Ino, u64)>>,
}

/// A request that waits.
pub(super) struct Waiter {
    pub ino: Ino,
    pub lock: FileLock,
    /// The thread that made the request; 0 if it can't be named from here.
    pub thread: u32,
    pub reply: ReplyEmpty,
}

enum Message {
    Wait(Waiter),
    /// Something was unlocked that this waiter may have waited for.
    Again(u64),
    /// Nobody is there any more who could wait.
    Stop,
}

impl Drop for Locks {
    fn drop(&mut self) {
        for (ino, owner) in std::mem::take(&mut *self.owners.lock().unwrap_or_else(PoisonError::into_inner)) {
            // A file that is gone has no locks.
            let _ = self.tree.unlock_all(ino, Locks::owner(owner));
        }
        let _ = self.to_waiters.lock().unwrap_or_else(PoisonError::into_inner).send(Message::Stop);
    }
}

impl Locks {
    pub(super) fn start(tree: Arc<dyn Vfs>) -> io::Result<Locks> {
        let (sender, receiver) = mpsc::channel();
        let mut waiters = Waiters { tree: tree.clone(), sender: sender.clone(), waiting: HashMap::new(), next: 0 };
        thread::Builder::new().name("fuse-locks".to_owned()).spawn(move || waiters.run(&receiver))?;
        Ok(Locks { tree, to_waiters: Mutex::new(sender), owners: Mutex::default() })
    }

    pub(super) fn owner(owner: u64) -> LockOwner {
        LockOwner { client: CLIENT, owner }
    }

    /// Notes that the owner may have locks now.
    pub(super) fn note(&self, ino: Ino, owner: u64) {
        self.owners.lock().unwrap_or_else(PoisonError::into_inner).insert((ino, owner));
    }

    /// The owner closed the file.
    pub(super) fn closed(&self, ino: Ino, owner: u64) -> crate::vfs::Result<()> {
        let had = self.owners.lock().unwrap_or_else(PoisonError::into_inner).remove(&(ino, owner));
        if had { self.tree.unlock_all(ino, Locks::owner(owner)) } else { Ok(()) }
    }

    pub(super) fn wait(&self, waiter: Waiter) {
        // The thread lives as long as this; if it were gone, the dropped reply would say EIO.
        let _ = self.to_waiters.lock().unwrap_or_else(PoisonError::into_inner).send(Message::Wait(waiter));
    }
}

struct Waiters {
    tree: Arc<dyn Vfs>,
    sender: Sender<Message>,
    waiting: HashMap<u64, Waiter>,
    next: u64,
}

impl Waiters {
    fn run(&mut self, receiver: &mpsc::Receiver<Message>) {
        loop {
            let message = if self.waiting.is_empty() {
                receiver.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                receiver.recv_timeout(LOOK_PERIOD)
            };
            match message {
                Ok(Message::Wait(waiter)) => {
                    self.next += 1;
                    self.waiting.insert(self.next, waiter);
                    self.attempt(self.next);
                }
                Ok(Message::Again(id)) => self.attempt(id),
                Err(RecvTimeoutError::Timeout) => self.look_for_signals(),
                Ok(Message::Stop) | Err(RecvTimeoutError::Disconnected) => return,
            }
        }
    }

    fn attempt(&mut self, id: u64) {
        let Some(waiter) = self.waiting.get(&id) else { return };
        // Asked to be told before trying, so that no unlock falls between.
        let sender = self.sender.clone();
        let again = Box::new(move || drop(sender.send(Message::Again(id))));
        self.tree.wait_for_unlock(waiter.ino, again);
        let result = self.tree.lock(waiter.ino, &waiter.lock);
        if matches!(result, Ok(Some(_))) {
            return;
        }
        let Some(waiter) = self.waiting.remove(&id) else { return };
        match result {
            Ok(_) => waiter.reply.ok(),
            Err(error) => waiter.reply.error(errno(&error)),
        }
    }

    fn look_for_signals(&mut self) {
        let signalled: Vec<u64> =
            self.waiting.iter().filter(|(_, waiter)| has_signal(waiter.thread)).map(|(id, _)| *id).collect();
        for id in signalled {
            if let Some(waiter) = self.waiting.remove(&id) {
                waiter.reply.error(Errno::EINTR);
            }
        }
    }
}

/// Whether a thread has a signal that it neither blocks nor ignores, or is gone.
fn has_signal(thread: u32) -> bool {
    if thread == 0 {
        return false;
    }
    match std::fs::read_to_string(format!("/proc/{thread}/status")) {
        Ok(status) => pending(&status),
        Err(error) => error.kind() == io::ErrorKind::NotFound,
    }
}

/// The same from the text of `/proc/N/status`.
fn pending(status: &str) -> bool {
    let mask = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|bits| u64::from_str_radix(bits.trim(), 16).ok()).unwrap_or(0)
    };
    (mask("SigPnd:") | mask("ShdPnd:")) & !mask("SigBlk:") & !mask("SigIgn:") != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_that_are_blocked_or_ignored_do_not_count() {
        let status = |pending_own, pending_all, blocked, ignored| {
            format!(
                "Name:\tx\nSigPnd:\t{pending_own:016x}\nShdPnd:\t{pending_all:016x}\nSigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\n"
            )
        };
        assert!(!pending(&status(0, 0, 0, 0)));
        assert!(pending(&status(1 << 8, 0, 0, 0)));
        assert!(pending(&status(0, 1 << 14, 0, 1)));
        assert!(!pending(&status(0, 1 << 14, 1 << 14, 0)));
        assert!(!pending(&status(0, 1 << 14, 0, 1 << 14)));
    }
}
