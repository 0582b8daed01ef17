//! Frames being fetched, so that readers who need one at the same time share one request.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use bytes::Bytes;
use tokio::sync::Semaphore;

use crate::cache::FrameKey;

/// Where a frame being fetched will be.
struct Landing {
    stored: OnceLock<Bytes>,
    /// Closed when the flight is over. Those who wait leave in the order they came.
    over: Semaphore,
}

/// All frames being fetched for one volume.
#[derive(Default)]
pub(super) struct Flights {
    open: Mutex<HashMap<FrameKey, Arc<Landing>>>,
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
    landing: Arc<Landing>,
}

/// Waits for somebody else's flight.
pub(super) struct Waiter(Arc<Landing>);

impl Flights {
    /// Takes the duty to fetch `key`, or finds who has it.
    pub(super) fn claim(&self, key: FrameKey) -> Claim<'_> {
        match self.lock().entry(key) {
            Entry::Occupied(theirs) => Claim::Theirs(Waiter(theirs.get().clone())),
            Entry::Vacant(free) => {
                let landing = Arc::new(Landing { stored: OnceLock::new(), over: Semaphore::new(0) });
                free.insert(landing.clone());
                Claim::Mine(Flight { flights: self, key, landing })
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<FrameKey, Arc<Landing>>> {
        // Single map operations; none leaves it half changed.
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flight<'_> {
    /// Hands the verified frame to all who wait. It should be in the cache by now, for those who come later.
    pub(super) fn land(self, stored: Bytes) {
        // Nobody else sets it: the duty is not shared.
        let _ = self.landing.stored.set(stored);
    }
}

impl Drop for Flight<'_> {
    fn drop(&mut self) {
        self.flights.lock().remove(&self.key);
        self.landing.over.close();
    }
}

impl Waiter {
    /// The frame, or nothing when whoever fetched it failed.
    pub(super) async fn wait(self) -> Option<Bytes> {
        // There are no permits; this ends when the semaphore is closed.
        let _ = self.0.over.acquire().await;
        self.0.stored.get().cloned()
    }
}
