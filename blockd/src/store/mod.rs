//! Object stores behind one small trait.
//!
//! Everything the engine needs of a bucket: conditional whole-object writes, ranged reads, listing in key
//! order, deletion. No object but the manifest is ever replaced.
//!
//! The stores: [`DirStore`] (a directory, the embedded default), [`S3Store`], [`MemoryStore`] (simulation). Two
//! wrappers: [`CountedStore`] counts requests and what they cost, [`FaultyStore`] makes things go wrong on purpose.
//! [`open`] makes one from configuration.
//!
//! What must hold of every store: a PUT that was answered is durable; of many writers that create a key, or replace
//! the same version of it, exactly one wins; a GET returns all the bytes asked for or an error; a listing shows every
//! object whose PUT was answered before it began.

mod counted;
mod dir;
mod dir_list;
mod faulty;
mod memory;
mod open;
mod s3;
mod uring_files;

pub use counted::{CountedStore, Prices, RequestMeter, StoreCounters};
pub use dir::DirStore;
pub use faulty::{Fault, FaultPlan, FaultRates, FaultyStore, Op, Outage};
pub use memory::MemoryStore;
pub use open::{StoreConfig, open};
pub use s3::{S3Options, S3Store};

use std::fmt;
use std::ops::Range;

use async_trait::async_trait;
use bytes::Bytes;

/// Entries in one page of a listing, at most.
pub const LIST_MAX: usize = 1000;
/// Keys in one deletion, at most.
pub const DELETE_MAX: usize = 1000;

/// What a store calls one state of an object: an ETag, or an equivalent. Opaque; send it back as it came.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Version(pub String);

/// The condition under which a PUT takes effect.
#[derive(Clone, Debug)]
pub enum PutMode {
    /// Only if no object has this key (`If-None-Match: *`).
    Create,
    /// Only if the object is still this version (`If-Match`).
    Replace(Version),
}

/// Size and version of an object.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectMeta {
    /// Length in bytes.
    pub size: u64,
    /// Its present version.
    pub version: Version,
}

/// One row of a listing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ListEntry {
    /// The whole key.
    pub key: String,
    /// Length in bytes.
    pub size: u64,
}

/// What kind of failure it was; decides what the caller may do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoreErrorKind {
    /// No object has this key.
    NotFound,
    /// The condition of a request did not hold (412), or the object exists already.
    Precondition,
    /// The store asks for less (503 SlowDown, 429). Retry later.
    Throttled,
    /// No answer in time; the request may or may not have taken effect.
    Timeout,
    /// The store is away or failed (5xx, connection errors); the request may or may not have taken effect.
    Unavailable,
    /// Credentials or permissions are wrong. Retrying does not help until somebody acts.
    Denied,
    /// The request or the store's configuration is wrong (no such bucket, a range past the end). Retrying does not help.
    Invalid,
    /// The local disk under a directory store is full.
    NoSpace,
}

/// A failed store request: what was asked, of which key, why it failed.
#[derive(Debug)]
pub struct StoreError {
    /// Decides what the caller may do next.
    pub kind: StoreErrorKind,
    /// The operation: "put", "get", "get_range", "head", "list", "delete".
    pub op: &'static str,
    /// The key or prefix.
    pub key: String,
    /// The cause.
    pub source: anyhow::Error,
}

impl StoreError {
    /// An error of `kind` for `op` on `key`.
    pub fn new(kind: StoreErrorKind, op: &'static str, key: &str, source: impl Into<anyhow::Error>) -> Self {
        Self { kind, op, key: key.to_owned(), source: source.into() }
    }

    /// Whether the same request may succeed later without anybody acting on the configuration.
    pub fn is_transient(&self) -> bool {
        use StoreErrorKind::*;
        matches!(self.kind, Throttled | Timeout | Unavailable | NoSpace)
    }
}

impl fmt::Display for StoreError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "store {} {}: {:?}: {:#}", self.op, self.key, self.kind, self.source)
    }
}

impl std::error::Error for StoreError {
    fn source(&self) -> Option<&(dyn std::error::Error + 'static)> {
        Some(self.source.as_ref())
    }
}

/// Shorthand for store results.
pub type Result<T> = std::result::Result<T, StoreError>;

/// A bucket, or something that behaves like one.
///
/// A single call makes its own bounded retries where that is safe; an error that comes out is the caller's to
/// handle. After `Timeout` or `Unavailable` a PUT may still have landed: a later `Create` of the same key that
/// fails with `Precondition` must be compared with what stands there before it is called a conflict.
#[async_trait]
pub trait ObjectStore: fmt::Debug + Send + Sync {
    /// Writes a whole object durably, under `mode`. Returns its version.
    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<Version>;
    /// Reads a whole object.
    async fn get(&self, key: &str) -> Result<(Bytes, Version)>;
    /// Reads `range` of an object. A range that reaches past the end is `Invalid`; a short answer is never returned.
    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes>;
    /// As [`ObjectStore::get_range`], in the pieces in which it came, for who would only take one long answer apart again.
    async fn get_pieces(&self, key: &str, range: Range<u64>) -> Result<Vec<Bytes>> {
        Ok(vec![self.get_range(key, range).await?])
    }
    /// Size and version.
    async fn head(&self, key: &str) -> Result<ObjectMeta>;
    /// Up to 1,000 entries whose keys start with `prefix`, in key order, after `start_after`. Empty means the end.
    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ListEntry>>;
    /// Deletes objects; keys that do not exist are no error.
    async fn delete(&self, keys: &[String]) -> Result<()>;
    /// Deletes an object if it is still this version (`If-Match`), for keys that are used again: a deletion that takes effect
    /// late must not hit the next object of that name. `Precondition` if another stands there; none is no error. Some
    /// S3-compatible stores ignore the condition, and delete whatever there is.
    async fn delete_version(&self, key: &str, version: &Version) -> Result<()>;
    /// One line for logs and status, for instance `dir:/srv/bucket` or `s3://bucket/prefix`.
    fn describe(&self) -> String;
}

/// Deletes any number of objects.
pub async fn delete_all(store: &dyn ObjectStore, keys: &[String]) -> Result<()> {
    for batch in keys.chunks(DELETE_MAX) {
        store.delete(batch).await?;
    }
    Ok(())
}

/// Every object whose key starts with `prefix`, in key order.
pub async fn list_all(store: &dyn ObjectStore, prefix: &str) -> Result<Vec<ListEntry>> {
    let mut found: Vec<ListEntry> = Vec::new();
    loop {
        let page = store.list(prefix, found.last().map(|entry| entry.key.as_str())).await?;
        if page.is_empty() {
            return Ok(found);
        }
        found.extend(page);
    }
}
