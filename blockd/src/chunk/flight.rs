//! Frames being fetched, so that readers who need one at the same time share one request.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use tokio::sync::watch;

use crate::cache::FrameKey;

type Landing = Option<Bytes>;

/// All frames being fetched for one volume.
#[derive(Default)]
pub(super) struct Flights {
    open: Mutex<HashMap<FrameKey, watch::Receiver<Landing>>>,
}

/// Who fetches a frame.
pub(super) enum Claim<'a> {
    /// The caller, who must [`Flight::land`] it or drop the flight.
    Mine(Flight<'a>),
    /// Somebody else.
    Theirs(Waiter),
}

/// The duty to fetch a frame. Dropped without landing (an error, a cancelled read), it sends those who wait to fetch
/// for themselves.
pub(super) struct Flight<'a> {
    flights: &'a Flights,
    key: FrameKey,
    sender: watch::Sender<Landing>,
}

/// Waits for somebody else's flight.
pub(super) struct Waiter(watch::Receiver<Landing>);

impl Flights {
    /// Takes the duty to fetch `key`, or finds who has it.
    pub(super) fn claim(&self, key: FrameKey) -> Claim<'_> {
        match self.lock().entry(key) {
            Entry::Occupied(theirs) => Claim::Theirs(Waiter(theirs.get().clone())),
            Entry::Vacant(free) => {
                let (sender, receiver) = watch::channel(None);
                free.insert(receiver);
                Claim::Mine(Flight { flights: self, key, sender })
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<FrameKey, watch::Receiver<Landing>>> {
        // Single map operations; none leaves it half changed.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flight<'_> {
    /// Hands the verified frame to all who wait. It should be in the cache by now, for those who come later.
    pub(super) fn land(self, stored: Bytes) {
        self.sender.send_replace(Some(stored));
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.flights.lock().remove(&self.key);
    }
}

impl Waiter {
    /// The frame, or nothing when whoever fetched it failed.
    pub(super) async fn wait(mut self) -> Option<Bytes> {
        let landed = self.0.wait_for(Option::is_some).await.ok()?;
        landed.clone()
    }
}
