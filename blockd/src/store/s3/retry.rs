//! When to send a request again, and how long to try.

use std::future::Future;
use std::time::Duration;

use anyhow::anyhow;
use backon::{Backoff, BackoffBuilder, ExponentialBuilder, Retryable};
use tokio::time::Instant;

use super::super::{Result, StoreError, StoreErrorKind};
use super::S3Store;

/// The first delay is below this, each later one below twice as much.
const DELAY_MIN: Duration = Duration::from_millis(50);
/// No delay is longer.
const DELAY_MAX: Duration = Duration::from_secs(5);
/// The slowest transfer that is not called a stall, bytes per second.
const RATE_MIN: u64 = 1 << 20;

/// Exponential backoff with full jitter: many clients that failed together do not come back together.
fn delays() -> impl Backoff {
    ExponentialBuilder::default()
        .with_min_delay(DELAY_MIN)
        .with_max_delay(DELAY_MAX)
        .without_max_times()
        .build()
        .map(|longest| longest.mul_f64(rand::random()))
}

impl S3Store {
    /// Makes attempts until one succeeds, fails for good, or fails when the time is up. `len`: bytes it carries, 0 if
    /// unknown.
    pub(super) async fn retry<T, F, Fut>(&self, len: u64, attempt: F) -> Result<T>
    where
        F: FnMut() -> Fut,
        Fut: Future<Output = Result<T>>,
    {
        let until = Instant::now() + self.options.request_timeout + self.attempt_limit(len);
        attempt
            .retry(delays())
            .when(|e: &StoreError| e.is_transient() && Instant::now() < until)
            .notify(|e, delay| tracing::debug!(error = %e, ?delay, "retrying a store request"))
            .await
    }

    /// How long one attempt may take that carries `len` bytes.
    pub(super) fn attempt_limit(&self, len: u64) -> Duration {
        self.options.request_timeout + Duration::from_millis(len.saturating_mul(1000) / RATE_MIN)
    }

    /// Ends an attempt that takes too long.
    pub(super) async fn limited<T>(
        &self,
        op: &'static str,
        key: &str,
        len: u64,
        request: impl Future<Output = Result<T>>,
    ) -> Result<T> {
        let limit = self.attempt_limit(len);
        match tokio::time::timeout(limit, request).await {
            Ok(result) => result,
            Err(_) => {
                let cause = anyhow!("no answer within {:.1} s", limit.as_secs_f64());
                Err(StoreError::new(StoreErrorKind::Timeout, op, key, cause))
            }
        }
    }
}
