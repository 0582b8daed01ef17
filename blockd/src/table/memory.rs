//! A key-value store in memory that can crash, for the seeded simulation.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::Rng;

use super::key::NumberKey;
use super::kv::{Batch, Change, Kv, Result};

type Map = BTreeMap<Vec<u8>, Vec<u8>>;

/// Keeps a table's entries over the simulated crashes of its owner. Make a new [`super::Table`] over it afterwards.
#[derive(Default)]
pub struct MemKv {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    current: Map,
    /// What the last `persist` made durable.
    durable: Map,
    /// Batches since then.
    volatile: Vec<Batch>,
}

fn carry_out(map: &mut Map, batch: &Batch) {
    for change in &batch.changes {
        match change {
            Change::Put(key, value) => {
                map.insert(key.clone(), value.clone());
            }
            Change::Delete(key) => {
                map.remove(key);
            }
            Change::DeleteRange(from, to) => {
                let dead: Vec<_> = map
                    .range::<[u8], _>((Bound::Included(&from[..]), Bound::Excluded(&to[..])))
                    .map(|(key, _)| key.clone())
                    .collect();
                for key in dead {
                    map.remove(&key);
                }
            }
        }
    }
}

impl MemKv {
    /// An empty store.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// All that was written so far, as a checkpoint keeps it.
    pub fn copy(&self) -> Arc<Self> {
        let map = self.lock().current.clone();
        let state = State { current: map.clone(), durable: map, volatile: Vec::new() };
        Arc::new(Self { state: Mutex::new(state) })
    }

    /// Loses what a crash may lose: some of the newest batches, whole ones, but none from before the last persist.
    pub fn crash(&self, rng: &mut (impl Rng + ?Sized)) {
        let mut state = self.lock();
        let keep = rng.random_range(0..=state.volatile.len());
        let mut map = state.durable.clone();
        for batch in &state.volatile[..keep] {
            carry_out(&mut map, batch);
        }
        state.current = map.clone();
        state.durable = map;
        state.volatile.clear();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere cannot leave the maps half changed in a way that matters: the test has failed already.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kv for MemKv {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>> {
        Ok(self.lock().current.get(key).cloned())
    }

    fn get_many(&self, keys: &[NumberKey]) -> Result<Vec<Option<Vec<u8>>>> {
        let state = self.lock();
        Ok(keys.iter().map(|key| state.current.get(&key[..]).cloned()).collect())
    }

    fn write(&self, batch: Batch) -> Result<()> {
        let mut state = self.lock();
        carry_out(&mut state.current, &batch);
        state.volatile.push(batch);
        Ok(())
    }

    fn persist(&self) -> Result<()> {
        let state = &mut *self.lock();
        for batch in state.volatile.drain(..) {
            carry_out(&mut state.durable, &batch);
        }
        Ok(())
    }

    fn scan(&self, from: &[u8], to: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<()> {
        if from >= to {
            return Ok(());
        }
        let state = self.lock();
        let range = (Bound::Included(from), Bound::Excluded(to));
        for (key, value) in state.current.range::<[u8], _>(range) {
            if !visit(key, value) {
                break;
            }
        }
        Ok(())
    }

    fn usage(&self) -> (u64, u64) {
        (0, 0)
    }
}
