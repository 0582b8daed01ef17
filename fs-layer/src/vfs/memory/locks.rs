//! Locks on files: who has which bytes.

use std::collections::HashMap;

use crate::vfs::{FileLock, Ino, LockOwner};

type Then = Box<dyn FnOnce() + Send>;

#[derive(Default)]
pub struct Locks {
    held: HashMap<Ino, Vec<FileLock>>,
    waiting: HashMap<Ino, Vec<Then>>,
}

impl Locks {
    /// Who is in the way of a lock.
    pub fn conflict(&self, ino: Ino, lock: &FileLock) -> Option<FileLock> {
        let held = self.held.get(&ino)?;
        held.iter().copied().find(|other| {
            let overlaps = other.start <= lock.last && lock.start <= other.last;
            other.owner != lock.owner && other.space == lock.space && overlaps && (other.exclusive || lock.exclusive)
        })
    }

    /// Takes a lock in place of what the owner had there.
    pub fn lock(&mut self, ino: Ino, lock: &FileLock) -> Option<FileLock> {
        if let Some(conflict) = self.conflict(ino, lock) {
            return Some(conflict);
        }
        self.cut(ino, lock);
        self.held.entry(ino).or_default().push(*lock);
        None
    }

    /// Takes a range out of the owner's locks.
    fn cut(&mut self, ino: Ino, lock: &FileLock) {
        let Some(held) = self.held.get_mut(&ino) else { return };
        let mut left = Vec::with_capacity(held.len() + 1);
        for other in held.drain(..) {
            if other.owner != lock.owner
                || other.space != lock.space
                || other.last < lock.start
                || lock.last < other.start
            {
                left.push(other);
                continue;
            }
            if other.start < lock.start {
                left.push(FileLock { last: lock.start - 1, ..other });
            }
            if lock.last < other.last {
                left.push(FileLock { start: lock.last + 1, ..other });
            }
        }
        *held = left;
        if held.is_empty() {
            self.held.remove(&ino);
        }
    }

    /// Gives up a range; who waits is to be told.
    #[must_use]
    pub fn unlock(&mut self, ino: Ino, lock: &FileLock) -> Vec<Then> {
        self.cut(ino, lock);
        self.waiting.remove(&ino).unwrap_or_default()
    }

    /// Gives up all of an owner's.
    #[must_use]
    pub fn unlock_all(&mut self, ino: Ino, owner: LockOwner) -> Vec<Then> {
        if let Some(held) = self.held.get_mut(&ino) {
            held.retain(|lock| lock.owner != owner);
            if held.is_empty() {
                self.held.remove(&ino);
            }
        }
        self.waiting.remove(&ino).unwrap_or_default()
    }

    pub fn wait(&mut self, ino: Ino, then: Then) {
        self.waiting.entry(ino).or_default().push(then);
    }
}
