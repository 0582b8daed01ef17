//! Conditional writes that survive lost answers.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use anyhow::anyhow;
use bytes::Bytes;

use super::super::{PutMode, Result, StoreError, StoreErrorKind, Version};
use super::S3Store;

/// A mark no other write has.
pub(super) fn new_mark() -> String {
    uuid::Uuid::new_v4().simple().to_string()
}

impl S3Store {
    pub(super) async fn put_whole(&self, key: &str, body: Bytes, mode: PutMode) -> Result<Version> {
        let mark = new_mark();
        let len = body.len() as u64;
        self.conditionally(key, len, &mode, &mark, || self.put_once(key, body.clone(), &mode, &mark)).await
    }

    /// Makes attempts of one conditional write until it is known what became of it.
    ///
    /// An attempt without an answer, or answered by a server error, may have taken effect, now or later. The next one
    /// therefore looks first, which also saves sending the body again. Sending it again is safe in any case: the
    /// condition lets at most one attempt through. A refusal is believed only after looking who was let through.
    pub(super) async fn conditionally<F, Fut>(
        &self,
        key: &str,
        len: u64,
        mode: &PutMode,
        mark: &str,
        attempt: F,
    ) -> Result<Version>
    where
        F: Fn() -> Fut,
        Fut: Future<Output = Result<Version>>,
    {
        let uncertain = AtomicBool::new(false);
        self.retry(len, || async {
            if uncertain.load(Relaxed)
                && let Some(version) = self.landed(key, mode, mark).await?
            {
                return Ok(version);
            }
            let error = match attempt().await {
                Ok(version) => return Ok(version),
                Err(error) => error,
            };
            match error.kind {
                StoreErrorKind::Precondition | StoreErrorKind::NotFound => {
                    if let Some(version) = self.landed(key, mode, mark).await? {
                        return Ok(version);
                    }
                    if let PutMode::Replace(_) = mode {
                        // Refused although the version is the one expected: the store compares ETags in the other spelling.
                        self.quirks.unquoted_etags.fetch_xor(true, Relaxed);
                    }
                    let cause = anyhow!("refused, yet the condition holds: {error}");
                    Err(StoreError::new(StoreErrorKind::Unavailable, "put", key, cause))
                }
                StoreErrorKind::Timeout | StoreErrorKind::Unavailable => {
                    uncertain.store(true, Relaxed);
                    Err(error)
                }
                _ => Err(error),
            }
        })
        .await
    }

    /// Looks whether the write with this mark has taken effect. `None`: no, and its condition still holds.
    /// `Precondition`: no, and it never will, since somebody else's did.
    async fn landed(&self, key: &str, mode: &PutMode, mark: &str) -> Result<Option<Version>> {
        let refused = |why: &'static str| Err(StoreError::new(StoreErrorKind::Precondition, "put", key, anyhow!(why)));
        match (self.head_once(key).await, mode) {
            (Ok(standing), _) if standing.mark.as_deref() == Some(mark) => Ok(Some(standing.meta.version)),
            (Ok(_), PutMode::Create) => refused("the object exists"),
            (Ok(standing), PutMode::Replace(expected)) if same_etag(&standing.meta.version, expected) => Ok(None),
            (Ok(_), PutMode::Replace(_)) => refused("the object has another version"),
            (Err(e), PutMode::Create) if e.kind == StoreErrorKind::NotFound => Ok(None),
            (Err(e), PutMode::Replace(_)) if e.kind == StoreErrorKind::NotFound => refused("the object is gone"),
            (Err(e), _) => Err(e),
        }
    }
}

fn same_etag(a: &Version, b: &Version) -> bool {
    a.0.trim_matches('"') == b.0.trim_matches('"')
}
