//! Locks that programs take on files: byte ranges (fcntl, NFS) and whole files (flock). They are gone with the process; an export that
//! promises more lets its clients reclaim them.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::vfs::{FileLock, Ino, LockOwner};

#[derive(Default)]
struct OfFile {
    held: Vec<FileLock>,
    waiting: Vec<Box<dyn FnOnce() + Send>>,
}

/// See the module.
#[derive(Default)]
pub struct FileLocks {
    files: Mutex<HashMap<Ino, OfFile>>,
}

fn overlap(a: &FileLock, b: &FileLock) -> bool {
    a.space == b.space && a.start <= b.last && b.start <= a.last
}

fn conflict(held: &FileLock, asked: &FileLock) -> bool {
    held.owner != asked.owner && overlap(held, asked) && (held.exclusive || asked.exclusive)
}

/// Takes a range from the owner's locks; returns whether there was anything.
fn cut(held: &mut Vec<FileLock>, gone: &FileLock) -> bool {
    let (mut left, mut any) = (Vec::with_capacity(held.len() + 1), false);
    for lock in held.drain(..) {
        if lock.owner != gone.owner || !overlap(&lock, gone) {
            left.push(lock);
            continue;
        }
        any = true;
        if lock.start < gone.start {
            left.push(FileLock { last: gone.start - 1, ..lock });
        }
        if lock.last > gone.last {
            left.push(FileLock { start: gone.last + 1, ..lock });
        }
    }
    *held = left;
    any
}

impl FileLocks {
    /// Takes a lock or says who is in the way.
    pub fn lock(&self, ino: Ino, lock: &FileLock) -> Option<FileLock> {
        let mut files = self.files();
        let file = files.entry(ino).or_default();
        if let Some(held) = file.held.iter().find(|held| conflict(held, lock)) {
            return Some(*held);
        }
        let was_exclusive =
            file.held.iter().any(|held| held.owner == lock.owner && overlap(held, lock) && held.exclusive);
        cut(&mut file.held, lock);
        // Neighbours of the same kind become one, so that a file locked byte by byte does not pile up.
        let mut new = *lock;
        file.held.retain(|held| {
            let joins = held.owner == new.owner
                && held.space == new.space
                && held.exclusive == new.exclusive
                && (held.last.checked_add(1) == Some(new.start) || new.last.checked_add(1) == Some(held.start));
            if joins {
                new.start = new.start.min(held.start);
                new.last = new.last.max(held.last);
            }
            !joins
        });
        file.held.push(new);
        let waiting = if was_exclusive && !lock.exclusive { std::mem::take(&mut file.waiting) } else { Vec::new() };
        drop(files);
        waiting.into_iter().for_each(|then| then());
        None
    }

    /// Who would be in the way.
    pub fn test(&self, ino: Ino, lock: &FileLock) -> Option<FileLock> {
        self.files().get(&ino)?.held.iter().find(|held| conflict(held, lock)).copied()
    }

    /// Gives up a range.
    pub fn unlock(&self, ino: Ino, lock: &FileLock) {
        self.give_up(ino, |held| cut(held, lock));
    }

    /// Gives up all that an owner has.
    pub fn unlock_all(&self, ino: Ino, owner: LockOwner) {
        self.give_up(ino, |held| {
            let before = held.len();
            held.retain(|lock| lock.owner != owner);
            held.len() < before
        });
    }

    /// Calls `then` once when some lock is given up.
    pub fn wait(&self, ino: Ino, then: Box<dyn FnOnce() + Send>) {
        self.files().entry(ino).or_default().waiting.push(then);
    }

    /// The file is gone.
    pub fn forget(&self, ino: Ino) {
        let gone = self.files().remove(&ino);
        gone.into_iter().flat_map(|file| file.waiting).for_each(|then| then());
    }

    /// All files are gone of which this is true.
    pub fn forget_where(&self, gone: impl Fn(Ino) -> bool) {
        let gone: Vec<OfFile> = self.files().extract_if(|ino, _| gone(*ino)).map(|(_, file)| file).collect();
        gone.into_iter().flat_map(|file| file.waiting).for_each(|then| then());
    }

    fn give_up(&self, ino: Ino, change: impl FnOnce(&mut Vec<FileLock>) -> bool) {
        let mut files = self.files();
        let Some(file) = files.get_mut(&ino) else { return };
        let waiting = if change(&mut file.held) { std::mem::take(&mut file.waiting) } else { Vec::new() };
        if file.held.is_empty() && file.waiting.is_empty() {
            files.remove(&ino);
        }
        drop(files);
        waiting.into_iter().for_each(|then| then());
    }

    fn files(&self) -> MutexGuard<'_, HashMap<Ino, OfFile>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vfs::LockSpace;

    fn range(owner: u64, exclusive: bool, start: u64, last: u64) -> FileLock {
        let owner = LockOwner { client: 1, owner };
        FileLock { owner, pid: 0, space: LockSpace::Range, exclusive, start, last }
    }

    #[test]
    fn ranges_split_join_and_conflict() {
        let (locks, ino) = (FileLocks::default(), Ino(200));
        assert!(locks.lock(ino, &range(1, true, 0, 99)).is_none());
        assert!(locks.lock(ino, &range(2, false, 50, 60)).is_some());
        locks.unlock(ino, &range(1, true, 50, 59));
        assert!(locks.lock(ino, &range(2, true, 50, 59)).is_none());
        assert_eq!(locks.test(ino, &range(3, false, 55, 200)).map(|lock| lock.owner.owner), Some(1));
        locks.unlock_all(ino, LockOwner { client: 1, owner: 1 });
        assert!(locks.lock(ino, &range(3, false, 60, u64::MAX)).is_none());
        assert!(locks.lock(ino, &range(3, false, 0, 49)).is_none());
        assert!(locks.test(ino, &range(2, true, 0, 59)).is_some());
        let (sender, receiver) = std::sync::mpsc::channel();
        locks.wait(ino, Box::new(move || sender.send(()).expect("the test waits")));
        assert!(receiver.try_recv().is_err());
        locks.unlock(ino, &range(3, false, 0, 10));
        assert!(receiver.try_recv().is_ok());
    }
}
