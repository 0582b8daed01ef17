//! A host's clocks and its way to the bucket.

use super::*;

/// The clocks of a host: the true time, and how far they are off.
#[derive(Debug)]
pub struct Clocks {
    pub start: Instant,
    pub steady_off_ms: u64,
    pub wall_off_ms: AtomicI64,
}

impl Clocks {
    pub fn now(&self) -> Instants {
        let true_ms = self.start.elapsed().as_millis() as u64;
        let wall = 1_700_000_000_000 + true_ms as i64 + self.wall_off_ms.load(Ordering::Relaxed);
        Instants { steady_ms: self.steady_off_ms + true_ms, wall_ms: wall as u64 }
    }

    pub fn now_us(&self) -> u64 {
        self.steady_off_ms * 1_000 + self.start.elapsed().as_micros() as u64
    }
}

/// A host's way to the bucket: it dies with the host, and stands still while the host is stopped.
#[derive(Debug)]
pub struct HostStore {
    pub inner: FaultyStore<MemoryStore>,
    pub disk: Arc<SimDisk>,
    pub stopped: Arc<AtomicBool>,
    /// Each process has a number; requests of earlier ones are never answered.
    pub process: u64,
    pub processes: Arc<AtomicU64>,
}

impl HostStore {
    async fn alive(&self) {
        if self.disk.io().is_err() {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(Duration::from_micros(200)).await;
        self.goes_on().await;
    }

    async fn goes_on(&self) {
        while self.stopped.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        if self.disk.crashed() || self.processes.load(Ordering::Relaxed) != self.process {
            std::future::pending::<()>().await;
        }
    }
}

#[async_trait]
impl ObjectStore for HostStore {
    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> blockd::store::Result<Version> {
        self.alive().await;
        let answer = self.inner.put(key, body, mode).await;
        self.goes_on().await;
        answer
    }
    async fn get(&self, key: &str) -> blockd::store::Result<(Bytes, Version)> {
        self.alive().await;
        let answer = self.inner.get(key).await;
        self.goes_on().await;
        answer
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> blockd::store::Result<Bytes> {
        self.alive().await;
        let answer = self.inner.get_range(key, range).await;
        self.goes_on().await;
        answer
    }
    async fn head(&self, key: &str) -> blockd::store::Result<ObjectMeta> {
        self.alive().await;
        let answer = self.inner.head(key).await;
        self.goes_on().await;
        answer
    }
    async fn list(&self, prefix: &str, after: Option<&str>) -> blockd::store::Result<Vec<ListEntry>> {
        self.alive().await;
        let answer = self.inner.list(prefix, after).await;
        self.goes_on().await;
        answer
    }
    async fn delete(&self, keys: &[String]) -> blockd::store::Result<()> {
        self.alive().await;
        let answer = self.inner.delete(keys).await;
        self.goes_on().await;
        answer
    }
    async fn delete_version(&self, key: &str, version: &Version) -> blockd::store::Result<()> {
        self.alive().await;
        let answer = self.inner.delete_version(key, version).await;
        self.goes_on().await;
        answer
    }
    fn describe(&self) -> String {
        "simulated bucket".into()
    }
}
