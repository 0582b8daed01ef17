//! What the tests of chunks and manifests share: a small store that can misbehave, golden files, drafts.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use async_trait::async_trait;
use bytes::Bytes;

use crate::store::{ListEntry, ObjectMeta, ObjectStore, PutMode, Result, StoreError, StoreErrorKind, Version};

/// A store in memory.
#[derive(Debug, Default)]
pub(crate) struct TestStore {
    objects: Mutex<BTreeMap<String, Bytes>>,
    /// The next so many ranged reads fail as if the store were away.
    pub(crate) outages: AtomicUsize,
    /// The next so many ranged reads come back with a flipped bit.
    pub(crate) flips: AtomicUsize,
    /// Ranged reads served.
    pub(crate) reads: AtomicUsize,
}

fn take_one(counter: &AtomicUsize) -> bool {
    counter.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| n.checked_sub(1)).is_ok()
}

impl TestStore {
    fn failed<T>(kind: StoreErrorKind, op: &'static str, key: &str) -> Result<T> {
        Err(StoreError::new(kind, op, key, anyhow::anyhow!("as told")))
    }

    /// Whatever the rules: replaces an object, or removes it.
    pub(crate) fn tamper(&self, key: &str, object: Option<Bytes>) {
        let mut objects = self.objects.lock().unwrap();
        match object {
            Some(object) => objects.insert(key.to_owned(), object),
            None => objects.remove(key),
        };
    }

    fn version(object: &Bytes) -> Version {
        Version(format!("{:x}", xxhash_rust::xxh3::xxh3_64(object)))
    }
}

#[async_trait]
impl ObjectStore for TestStore {
    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<Version> {
        let mut objects = self.objects.lock().unwrap();
        let found = objects.get(key).map(Self::version);
        let holds = match (mode, found) {
            (PutMode::Create, None) => true,
            (PutMode::Replace(expected), Some(found)) => expected == found,
            _ => false,
        };
        if !holds {
            return Self::failed(StoreErrorKind::Precondition, "put", key);
        }
        let version = Self::version(&body);
        objects.insert(key.to_owned(), body);
        Ok(version)
    }

    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        match self.objects.lock().unwrap().get(key) {
            Some(object) => Ok((object.clone(), Self::version(object))),
            None => Self::failed(StoreErrorKind::NotFound, "get", key),
        }
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        tokio::task::yield_now().await;
        if take_one(&self.outages) {
            return Self::failed(StoreErrorKind::Unavailable, "get_range", key);
        }
        let (object, _) = self.get(key).await?;
        if range.end > object.len() as u64 {
            return Self::failed(StoreErrorKind::Invalid, "get_range", key);
        }
        self.reads.fetch_add(1, Ordering::Relaxed);
        let mut bytes = object[range.start as usize..range.end as usize].to_vec();
        if take_one(&self.flips) {
            bytes[0] ^= 1;
        }
        Ok(bytes.into())
    }

    async fn head(&self, key: &str) -> Result<ObjectMeta> {
        let (object, version) = self.get(key).await?;
        Ok(ObjectMeta { size: object.len() as u64, version })
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ListEntry>> {
        let objects = self.objects.lock().unwrap();
        // Short pages, so that paging is exercised.
        Ok(objects
            .iter()
            .filter(|(key, _)| key.starts_with(prefix))
            .filter(|(key, _)| start_after.is_none_or(|after| key.as_str() > after))
            .take(2)
            .map(|(key, object)| ListEntry { key: key.clone(), size: object.len() as u64 })
            .collect())
    }

    async fn delete(&self, keys: &[String]) -> Result<()> {
        let mut objects = self.objects.lock().unwrap();
        for key in keys {
            objects.remove(key);
        }
        Ok(())
    }

    async fn delete_version(&self, key: &str, version: &Version) -> Result<()> {
        match self.get(key).await {
            Ok((_, standing)) if standing != *version => Self::failed(StoreErrorKind::Precondition, "delete", key),
            _ => self.delete(&[key.to_owned()]).await,
        }
    }

    fn describe(&self) -> String {
        "test".into()
    }
}

/// Lets `check` read the golden file `name`, and with `exact` compares it with `bytes`, as written now. With `BLOCKD_BLESS=1` in the
/// environment a file that is missing is made; one that exists is never changed, because objects like it exist.
pub(crate) fn golden(name: &str, bytes: &[u8], exact: bool, check: impl FnOnce(&[u8])) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if !path.exists() && std::env::var_os("BLOCKD_BLESS").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, bytes).unwrap();
    }
    let kept = std::fs::read(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    check(&kept);
    assert!(!exact || kept == bytes, "{name}: the bytes written have changed");
}
