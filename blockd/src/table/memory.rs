//! A key-value store in memory that can crash, for the seeded simulation.

use std::collections::BTreeMap;
use std::io;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rand::Rng;

use super::key::NumberKey;
use super::kv::{Batch, Change, FrozenFile, FrozenFiles, Kv, Result};

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

    /// Takes the entries of a frozen copy in place of its own, all at once and durably.
    pub(super) fn replace(&self, files: &BTreeMap<String, Vec<u8>>) -> io::Result<()> {
        let mut map = Map::new();
        for bytes in files.values() {
            map.append(&mut parse(bytes).ok_or(io::ErrorKind::InvalidData)?);
        }
        *self.lock() = State { current: map.clone(), durable: map, volatile: Vec::new() };
        Ok(())
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

    fn freeze(&self) -> io::Result<Box<dyn FrozenFiles>> {
        self.persist().map_err(io::Error::other)?;
        Ok(Box::new(Copy(self.files())))
    }

    fn unknown_bytes(&self, known: &dyn Fn(&str, u64) -> bool) -> u64 {
        let files = self.files();
        files
            .iter()
            .map(|(name, bytes)| (name, bytes.len() as u64))
            .filter(|(name, len)| !known(name, *len))
            .map(|f| f.1)
            .sum()
    }
}

/// Files the entries are divided into by their keys, so that some stay as they are from copy to copy.
const FILES: usize = 4;

impl MemKv {
    /// The entries as files whose names follow from their content, and a small one that changes.
    fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let state = self.lock();
        let mut parts = vec![Vec::new(); FILES];
        for (key, value) in &state.current {
            let part = &mut parts[xxhash_rust::xxh3::xxh3_64(key) as usize % FILES];
            for bytes in [key, value] {
                part.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
                part.extend_from_slice(bytes);
            }
        }
        let mut files = BTreeMap::new();
        for part in parts.into_iter().filter(|part| !part.is_empty()) {
            files.insert(format!("{:016x}.sst", xxhash_rust::xxh3::xxh3_64(&part)), part);
        }
        files.insert("CURRENT".to_owned(), Vec::new());
        files
    }
}

/// The entries of a file made by [`MemKv::files`].
fn parse(mut bytes: &[u8]) -> Option<Map> {
    let mut field = || -> Option<Vec<u8>> {
        let (len, rest) = bytes.split_first_chunk()?;
        let (field, rest) = rest.split_at_checked(u32::from_le_bytes(*len) as usize)?;
        bytes = rest;
        Some(field.to_vec())
    };
    let mut map = Map::new();
    while let Some(key) = field() {
        map.insert(key, field()?);
    }
    bytes.is_empty().then_some(map)
}

struct Copy(BTreeMap<String, Vec<u8>>);

impl FrozenFiles for Copy {
    fn files(&self) -> Vec<FrozenFile> {
        let file = |(name, bytes): (&String, &Vec<u8>)| FrozenFile {
            name: name.clone(),
            size: bytes.len() as u64,
            lasting: name.ends_with(".sst"),
        };
        self.0.iter().map(file).collect()
    }

    fn read(&self, name: &str) -> io::Result<Vec<u8>> {
        self.0.get(name).cloned().ok_or_else(|| io::ErrorKind::NotFound.into())
    }
}
