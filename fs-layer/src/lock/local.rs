//! Locks within one process.

use std::collections::hash_map::Entry;
use std::sync::{Condvar, Mutex, PoisonError};

use super::{LockManager, LockMode};
use crate::int_map::IntMap;
use crate::vfs::{Ino, Result};

const SHARDS: usize = 64;

#[derive(Default)]
struct Lock {
    readers: u32,
    writer: bool,
    /// So that readers do not starve writers.
    writers_waiting: u32,
    waiting: u32,
}

#[derive(Default)]
struct Shard {
    locks: Mutex<IntMap<u64, Lock>>,
    released: Condvar,
}

/// See the module.
pub struct LocalLocks {
    shards: Vec<Shard>,
}

impl Default for LocalLocks {
    fn default() -> LocalLocks {
        LocalLocks { shards: (0..SHARDS).map(|_| Shard::default()).collect() }
    }
}

impl LocalLocks {
    fn shard(&self, ino: Ino) -> &Shard {
        &self.shards[(ino.0 % SHARDS as u64) as usize]
    }
}

impl LockManager for LocalLocks {
    fn acquire(&self, ino: Ino, mode: LockMode) -> Result<()> {
        let shard = self.shard(ino);
        let mut locks = shard.locks.lock().unwrap_or_else(PoisonError::into_inner);
        let exclusive = mode == LockMode::Exclusive;
        let mut waited = false;
        loop {
            let lock = locks.entry(ino.0).or_default();
            let free =
                if exclusive { !lock.writer && lock.readers == 0 } else { !lock.writer && lock.writers_waiting == 0 };
            if waited {
                lock.waiting -= 1;
                lock.writers_waiting -= u32::from(exclusive);
            }
            if free {
                if exclusive {
                    lock.writer = true;
                } else {
                    lock.readers += 1;
                }
                return Ok(());
            }
            waited = true;
            crate::waiting::about_to_wait();
            lock.waiting += 1;
            lock.writers_waiting += u32::from(exclusive);
            locks = shard.released.wait(locks).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn release(&self, ino: Ino, mode: LockMode) {
        let shard = self.shard(ino);
        let mut locks = shard.locks.lock().unwrap_or_else(PoisonError::into_inner);
        let Entry::Occupied(mut entry) = locks.entry(ino.0) else { return };
        let lock = entry.get_mut();
        match mode {
            LockMode::Exclusive => lock.writer = false,
            LockMode::Shared => lock.readers -= 1,
        }
        if lock.waiting > 0 {
            shard.released.notify_all();
        } else if lock.readers == 0 && !lock.writer {
            entry.remove();
        }
    }
}
