//! Chunks that must stay where they are for a while: copies by reference name them, and no table says so yet.
//!
//! In memory only. Whoever opens a volume pins again what its log refers to, before anything may be moved or deleted.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// How often each chunk is pinned.
#[derive(Debug, Default)]
pub(super) struct Pins {
    counts: Mutex<BTreeMap<u64, u64>>,
}

impl Pins {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, u64>> {
        // Changed entry by entry by code that does not panic.
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pins the chunk `id`.
    pub fn pin(self: &Arc<Self>, id: u64) -> Pin {
        *self.lock().entry(id).or_default() += 1;
        Pin { pins: self.clone(), id }
    }

    pub fn contains(&self, id: u64) -> bool {
        self.lock().contains_key(&id)
    }
}

/// Keeps a chunk from being moved and deleted until it is dropped. See [`super::Table::pin`].
#[derive(Debug)]
pub struct Pin {
    pins: Arc<Pins>,
    id: u64,
}

impl Pin {
    /// The chunk.
    pub fn chunk(&self) -> u64 {
        self.id
    }
}

impl Clone for Pin {
    fn clone(&self) -> Self {
        self.pins.pin(self.id)
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut counts = self.pins.lock();
        if let Some(count) = counts.get_mut(&self.id) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.id);
            }
        }
    }
}
