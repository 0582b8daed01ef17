//! Who was denied a lock and would wait for it (RFC 8881 section 20.11): told once when some lock of the file is given up.
//!
//! Clients also ask by themselves, more seldom, so forgetting a waiter costs time only.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, Weak};

use super::callback;
use super::handle::HANDLE_BYTES;
use super::state::session::Session;
use crate::vfs::{Ino, Vfs};

/// Most who wait for one file.
const PER_FILE_MAX: usize = 1024;
/// Most files that are waited for.
const FILES_MAX: usize = 65_536;

/// One who waits.
pub struct Waiter {
    /// How to tell it.
    pub session: Weak<Session>,
    /// The file.
    pub handle: [u8; HANDLE_BYTES],
    /// Its client.
    pub client: u64,
    /// What that calls it.
    pub owner: Vec<u8>,
}

/// All who wait.
#[derive(Default)]
pub struct Waiting(Mutex<HashMap<Ino, Vec<Waiter>>>);

impl Waiting {
    /// Adds one. The filesystem is asked to call once per file, however many wait.
    pub fn add(self: &Arc<Self>, vfs: &dyn Vfs, ino: Ino, waiter: Waiter) {
        {
            let mut files = self.0.lock().expect("no panic under the lock");
            if let Some(waiters) = files.get_mut(&ino) {
                let same = |other: &Waiter| other.client == waiter.client && other.owner == waiter.owner;
                waiters.retain(|other| !same(other));
                if waiters.len() < PER_FILE_MAX {
                    waiters.push(waiter);
                }
                return;
            }
            if files.len() >= FILES_MAX {
                return;
            }
            files.insert(ino, vec![waiter]);
        }
        let waiting = self.clone();
        vfs.wait_for_unlock(ino, Box::new(move || waiting.wake(ino)));
    }

    fn wake(&self, ino: Ino) {
        let waiters = self.0.lock().expect("no panic under the lock").remove(&ino);
        for waiter in waiters.into_iter().flatten() {
            if let Some(session) = waiter.session.upgrade() {
                callback::notify_lock(&session, &waiter.handle, waiter.client, &waiter.owner);
            }
        }
    }
}
