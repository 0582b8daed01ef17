//! Objects in memory: for simulation and tests.

use std::collections::BTreeMap;
use std::ops::{Bound, Range};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::anyhow;
use async_trait::async_trait;
use bytes::Bytes;

use super::{LIST_MAX, ListEntry, ObjectMeta, ObjectStore, PutMode, Result, StoreError, StoreErrorKind, Version};

/// A bucket in memory. Answers at once, keeps no time of its own, and behaves the same in every run.
#[derive(Debug, Default)]
pub struct MemoryStore {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    objects: BTreeMap<String, Object>,
    /// The version given last; never reused.
    version: u64,
}

#[derive(Debug)]
struct Object {
    body: Bytes,
    version: u64,
}

impl MemoryStore {
    /// An empty bucket.
    pub fn new() -> Self {
        Self::default()
    }

    /// Every key, in order.
    pub fn keys(&self) -> Vec<String> {
        self.lock().objects.keys().cloned().collect()
    }

    /// Replaces an object behind everybody's back, as rot would; its version stays. `false` if there is no such object.
    pub fn tamper(&self, key: &str, body: Bytes) -> bool {
        match self.lock().objects.get_mut(key) {
            Some(object) => {
                object.body = body;
                true
            }
            None => false,
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing panics half way through a change of the state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn with<T>(&self, op: &'static str, key: &str, f: impl FnOnce(&Object) -> T) -> Result<T> {
        match self.lock().objects.get(key) {
            Some(object) => Ok(f(object)),
            None => Err(StoreError::new(StoreErrorKind::NotFound, op, key, anyhow!("no such object"))),
        }
    }
}

fn version(n: u64) -> Version {
    Version(format!("v{n}"))
}

#[async_trait]
impl ObjectStore for MemoryStore {
    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<Version> {
        let mut state = self.lock();
        let standing = state.objects.get(key).map(|o| version(o.version));
        let refused = match (&mode, &standing) {
            (PutMode::Create, Some(_)) => Some("the object exists"),
            (PutMode::Replace(_), None) => Some("the object is gone"),
            (PutMode::Replace(expected), Some(v)) if v != expected => Some("the object has another version"),
            _ => None,
        };
        if let Some(why) = refused {
            return Err(StoreError::new(StoreErrorKind::Precondition, "put", key, anyhow!(why)));
        }
        state.version += 1;
        let now = state.version;
        state.objects.insert(key.to_owned(), Object { body, version: now });
        Ok(version(now))
    }

    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        self.with("get", key, |o| (o.body.clone(), version(o.version)))
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let body = self.with("get_range", key, |o| o.body.clone())?;
        if range.start > range.end || range.end > body.len() as u64 {
            let cause = anyhow!("range {range:?} of an object of {} bytes", body.len());
            return Err(StoreError::new(StoreErrorKind::Invalid, "get_range", key, cause));
        }
        Ok(body.slice(range.start as usize..range.end as usize))
    }

    async fn head(&self, key: &str) -> Result<ObjectMeta> {
        self.with("head", key, |o| ObjectMeta { size: o.body.len() as u64, version: version(o.version) })
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ListEntry>> {
        let from = match start_after {
            Some(after) if after >= prefix => Bound::Excluded(after),
            _ => Bound::Included(prefix),
        };
        let state = self.lock();
        let rows = state.objects.range::<str, _>((from, Bound::Unbounded));
        Ok(rows
            .take_while(|(key, _)| key.starts_with(prefix))
            .take(LIST_MAX)
            .map(|(key, o)| ListEntry { key: key.clone(), size: o.body.len() as u64 })
            .collect())
    }

    async fn delete(&self, keys: &[String]) -> Result<()> {
        let mut state = self.lock();
        for key in keys {
            state.objects.remove(key);
        }
        Ok(())
    }

    async fn delete_version(&self, key: &str, expected: &Version) -> Result<()> {
        let mut state = self.lock();
        match state.objects.get(key).map(|object| version(object.version)) {
            None => {}
            Some(standing) if standing == *expected => drop(state.objects.remove(key)),
            Some(_) => {
                let why = anyhow!("the object has another version");
                return Err(StoreError::new(StoreErrorKind::Precondition, "delete", key, why));
            }
        }
        Ok(())
    }

    fn describe(&self) -> String {
        "memory".to_owned()
    }
}
