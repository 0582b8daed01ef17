//! Counting what is asked of a store, and what that costs.

use std::future::Future;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use async_trait::async_trait;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::{ListEntry, ObjectMeta, ObjectStore, PutMode, Result, Version};

/// Prices of requests, in US dollars per 1,000.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prices {
    /// PUT, POST, COPY and LIST.
    pub put_class_usd_per_1000: f64,
    /// GET, HEAD and everything else but deletions, which are free.
    pub get_class_usd_per_1000: f64,
}

impl Prices {
    /// List prices of S3 Standard in us-east-1, requests only (storage is $0.023 per GiB and month beside it).
    pub const S3_STANDARD: Self = Self { put_class_usd_per_1000: 0.005, get_class_usd_per_1000: 0.0004 };
    /// A store of one's own.
    pub const FREE: Self = Self { put_class_usd_per_1000: 0.0, get_class_usd_per_1000: 0.0 };
}

/// Requests as a provider bills them: each attempt, each part of a multipart upload, each page.
#[derive(Debug, Default)]
pub struct RequestMeter {
    put_class: AtomicU64,
    get_class: AtomicU64,
    free: AtomicU64,
}

impl RequestMeter {
    /// One PUT, POST, COPY or LIST request.
    pub fn put_class(&self) {
        self.put_class.fetch_add(1, Relaxed);
    }

    /// One GET or HEAD request.
    pub fn get_class(&self) {
        self.get_class.fetch_add(1, Relaxed);
    }

    /// One request that costs nothing, as deletions do.
    pub fn free(&self) {
        self.free.fetch_add(1, Relaxed);
    }
}

/// Everything counted so far, since the store was opened.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct StoreCounters {
    /// Calls of `put`.
    pub puts: u64,
    /// Calls of `get` and `get_range`.
    pub gets: u64,
    /// Calls of `head`.
    pub heads: u64,
    /// Calls of `list`.
    pub lists: u64,
    /// Keys given to `delete`.
    pub deleted_keys: u64,
    /// Calls that ended in an error of any kind, a refused condition and a missing key included.
    pub errors: u64,
    /// Of these, the transient ones: the store was away, slow or throttling.
    pub transient_errors: u64,
    /// Bytes of objects written by successful calls.
    pub bytes_written: u64,
    /// Bytes of objects read by successful calls.
    pub bytes_read: u64,
    /// Time spent in calls of `put`, microseconds, summed over concurrent calls.
    pub put_micros: u64,
    /// Time spent in calls of `get` and `get_range`, microseconds, summed over concurrent calls.
    pub get_micros: u64,
    /// Billed requests in the class of PUT and LIST, retries included.
    pub put_class_requests: u64,
    /// Billed requests in the class of GET and HEAD, retries included.
    pub get_class_requests: u64,
    /// Requests that cost nothing.
    pub free_requests: u64,
    /// What the requests cost, in US dollars.
    pub cost_usd: f64,
}

#[derive(Debug, Default)]
struct Counts {
    puts: AtomicU64,
    gets: AtomicU64,
    heads: AtomicU64,
    lists: AtomicU64,
    deleted_keys: AtomicU64,
    errors: AtomicU64,
    transient_errors: AtomicU64,
    bytes_written: AtomicU64,
    bytes_read: AtomicU64,
    put_micros: AtomicU64,
    get_micros: AtomicU64,
}

/// A store whose use is counted.
#[derive(Debug)]
pub struct CountedStore {
    inner: Arc<dyn ObjectStore>,
    prices: Prices,
    counts: Counts,
    meter: Arc<RequestMeter>,
    /// The store below meters its own requests; otherwise one call is one request.
    metered_below: bool,
}

impl CountedStore {
    /// Counts the use of `inner`, one request per call.
    pub fn new(inner: Arc<dyn ObjectStore>, prices: Prices) -> Self {
        Self { inner, prices, counts: Counts::default(), meter: Arc::default(), metered_below: false }
    }

    /// Counts the use of `inner`, which notes its requests in `meter` itself.
    pub fn with_meter(inner: Arc<dyn ObjectStore>, prices: Prices, meter: Arc<RequestMeter>) -> Self {
        Self { meter, metered_below: true, ..Self::new(inner, prices) }
    }

    /// What was counted so far.
    pub fn counters(&self) -> StoreCounters {
        let c = &self.counts;
        let put_class_requests = self.meter.put_class.load(Relaxed);
        let get_class_requests = self.meter.get_class.load(Relaxed);
        let cost_usd = put_class_requests as f64 * self.prices.put_class_usd_per_1000 / 1000.0
            + get_class_requests as f64 * self.prices.get_class_usd_per_1000 / 1000.0;
        StoreCounters {
            puts: c.puts.load(Relaxed),
            gets: c.gets.load(Relaxed),
            heads: c.heads.load(Relaxed),
            lists: c.lists.load(Relaxed),
            deleted_keys: c.deleted_keys.load(Relaxed),
            errors: c.errors.load(Relaxed),
            transient_errors: c.transient_errors.load(Relaxed),
            bytes_written: c.bytes_written.load(Relaxed),
            bytes_read: c.bytes_read.load(Relaxed),
            put_micros: c.put_micros.load(Relaxed),
            get_micros: c.get_micros.load(Relaxed),
            put_class_requests,
            get_class_requests,
            free_requests: self.meter.free.load(Relaxed),
            cost_usd,
        }
    }

    /// Awaits a call, adds up its time in `micros` and notes an error.
    async fn watch<T>(&self, micros: Option<&AtomicU64>, call: impl Future<Output = Result<T>>) -> Result<T> {
        let begun = Instant::now();
        let result = call.await;
        if let Some(micros) = micros {
            let spent = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
            micros.fetch_add(spent, Relaxed);
        }
        if let Err(e) = &result {
            self.counts.errors.fetch_add(1, Relaxed);
            self.counts.transient_errors.fetch_add(u64::from(e.is_transient()), Relaxed);
        }
        result
    }

    fn bill(&self, request: impl FnOnce(&RequestMeter)) {
        if !self.metered_below {
            request(&self.meter);
        }
    }
}

#[async_trait]
impl ObjectStore for CountedStore {
    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<Version> {
        let c = &self.counts;
        c.puts.fetch_add(1, Relaxed);
        self.bill(RequestMeter::put_class);
        let len = body.len() as u64;
        let version = self.watch(Some(&c.put_micros), self.inner.put(key, body, mode)).await?;
        c.bytes_written.fetch_add(len, Relaxed);
        Ok(version)
    }

    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        let c = &self.counts;
        c.gets.fetch_add(1, Relaxed);
        self.bill(RequestMeter::get_class);
        let (body, version) = self.watch(Some(&c.get_micros), self.inner.get(key)).await?;
        c.bytes_read.fetch_add(body.len() as u64, Relaxed);
        Ok((body, version))
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let c = &self.counts;
        c.gets.fetch_add(1, Relaxed);
        self.bill(RequestMeter::get_class);
        let body = self.watch(Some(&c.get_micros), self.inner.get_range(key, range)).await?;
        c.bytes_read.fetch_add(body.len() as u64, Relaxed);
        Ok(body)
    }

    async fn get_pieces(&self, key: &str, range: Range<u64>) -> Result<Vec<Bytes>> {
        let c = &self.counts;
        c.gets.fetch_add(1, Relaxed);
        self.bill(RequestMeter::get_class);
        let pieces = self.watch(Some(&c.get_micros), self.inner.get_pieces(key, range)).await?;
        c.bytes_read.fetch_add(pieces.iter().map(|piece| piece.len() as u64).sum(), Relaxed);
        Ok(pieces)
    }

    async fn head(&self, key: &str) -> Result<ObjectMeta> {
        self.counts.heads.fetch_add(1, Relaxed);
        self.bill(RequestMeter::get_class);
        self.watch(None, self.inner.head(key)).await
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ListEntry>> {
        self.counts.lists.fetch_add(1, Relaxed);
        self.bill(RequestMeter::put_class);
        self.watch(None, self.inner.list(prefix, start_after)).await
    }

    async fn delete(&self, keys: &[String]) -> Result<()> {
        self.counts.deleted_keys.fetch_add(keys.len() as u64, Relaxed);
        self.bill(RequestMeter::free);
        self.watch(None, self.inner.delete(keys)).await
    }

    async fn delete_version(&self, key: &str, version: &Version) -> Result<()> {
        self.counts.deleted_keys.fetch_add(1, Relaxed);
        self.bill(RequestMeter::free);
        self.watch(None, self.inner.delete_version(key, version)).await
    }

    fn describe(&self) -> String {
        self.inner.describe()
    }
}

#[cfg(test)]
mod tests {
    use super::super::MemoryStore;
    use super::*;

    #[tokio::test]
    async fn calls_bytes_and_dollars_add_up() {
        let store = CountedStore::new(Arc::new(MemoryStore::new()), Prices::S3_STANDARD);
        for n in 0..10 {
            store.put(&format!("k{n}"), Bytes::from(vec![0; 100]), PutMode::Create).await.unwrap();
        }
        assert!(store.put("k0", Bytes::new(), PutMode::Create).await.is_err());
        store.get("k1").await.unwrap();
        store.get_range("k1", 10..20).await.unwrap();
        store.get_pieces("k1", 10..20).await.unwrap();
        store.head("k1").await.unwrap();
        store.list("", None).await.unwrap();
        store.delete(&["k1".to_owned(), "k2".to_owned()]).await.unwrap();
        let c = store.counters();
        assert_eq!((c.puts, c.gets, c.heads, c.lists, c.deleted_keys), (11, 3, 1, 1, 2));
        assert_eq!((c.bytes_written, c.bytes_read), (1000, 120));
        assert_eq!((c.errors, c.transient_errors), (1, 0));
        assert_eq!((c.put_class_requests, c.get_class_requests, c.free_requests), (12, 4, 1));
        assert!((c.cost_usd - (12.0 * 0.005 + 4.0 * 0.0004) / 1000.0).abs() < 1e-12);
    }
}
