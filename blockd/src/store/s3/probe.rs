//! Proving at the start that the bucket is there and the store keeps its promises.

use std::sync::atomic::Ordering::Relaxed;

use anyhow::{Context, bail};
use bytes::Bytes;

use super::super::{ObjectStore, PutMode, Result, StoreError, StoreErrorKind};
use super::S3Store;
use super::put::new_mark;

impl S3Store {
    /// Writes, replaces, reads and deletes a small object of a random name, and checks that what must be refused is.
    ///
    /// A store that ignores `If-None-Match` or `If-Match` would let two owners of a volume destroy each other's data;
    /// such a store is an error here. So are a missing bucket, wrong credentials and an endpoint that does not answer.
    pub async fn verify_conditional_writes(&self) -> anyhow::Result<()> {
        let key = format!("blockd-probe-{}", new_mark());
        let result = self.probe(&key).await;
        if let Err(error) = &result
            && error.downcast_ref::<StoreError>().is_some_and(StoreError::is_transient)
        {
            // Patience has run out already. Should the probe stand there all the same, one request may remove it.
            let _ = self.delete_once(&key, None).await;
            return result.with_context(|| {
                format!("the store {} does not answer; see that it runs and that its address is right", self.describe())
            });
        }
        let removed = self.delete_batch(std::slice::from_ref(&key)).await;
        result.with_context(|| format!("cannot use the store {}", self.describe()))?;
        removed.with_context(|| {
            format!("cannot delete from the store {}; give the credentials that right", self.describe())
        })
    }

    async fn probe(&self, key: &str) -> anyhow::Result<()> {
        let content = |text: &'static str| Bytes::from_static(text.as_bytes());
        let first = self.put_whole(key, content("first"), PutMode::Create).await?;

        let again = self.attempt(key, content("again"), &PutMode::Create).await?;
        if again.is_some() {
            bail!(
                "it ignores If-None-Match: an existing object was overwritten, so two hosts could damage one volume; \
                 use a store with conditional writes"
            );
        }
        // Finds out on the way how the store wants its ETags spelt.
        let second = self
            .put_whole(key, content("second"), PutMode::Replace(first.clone()))
            .await
            .context("it does not replace an object on If-Match with its present ETag")?;
        let stale = self.attempt(key, content("stale"), &PutMode::Replace(first)).await?;
        if stale.is_some() {
            bail!(
                "it ignores If-Match: an object was replaced by a writer that knew only an older version, so two hosts \
                 could damage one volume; use a store with conditional writes"
            );
        }
        let (read, version) = self.get(key).await?;
        let range = self.get_range(key, 2..5).await?;
        if (&read[..], &range[..]) != (b"second", b"con") || version.0.trim_matches('"') != second.0.trim_matches('"') {
            bail!(
                "it does not give back what was written last: got {read:?}, {range:?} as bytes 2 to 4, and {version:?}"
            );
        }
        if self.head_once(key).await?.mark.is_none() {
            bail!("it does not keep the metadata of objects, so a lost answer could not be told from a conflict");
        }
        let conditional = self.completes_conditionally(key).await;
        self.quirks.unconditional_complete.store(!conditional, Relaxed);
        Ok(())
    }

    /// Writes without the protection against lost answers. `None` if the store refused.
    async fn attempt(&self, key: &str, body: Bytes, mode: &PutMode) -> Result<Option<()>> {
        self.retry(0, || async {
            match self.put_once(key, body.clone(), mode, &new_mark()).await {
                Ok(_) => Ok(Some(())),
                Err(e) if matches!(e.kind, StoreErrorKind::Precondition | StoreErrorKind::NotFound) => Ok(None),
                Err(e) => Err(e),
            }
        })
        .await
    }

    /// Whether a multipart upload over the existing object is refused. If not, big objects are written whole.
    async fn completes_conditionally(&self, key: &str) -> bool {
        let refused = async {
            let upload = self.retry(0, || self.begin_upload_once(key, "probe")).await?;
            let body = Bytes::from_static(b"part");
            let part = self.retry(0, || self.upload_part_once(key, &upload, 1, body.clone())).await?;
            let answer = self.complete_upload_once(key, &upload, vec![part]).await;
            if answer.is_err() {
                self.abort_upload_once(key, &upload).await?;
            }
            Result::Ok(matches!(answer, Err(e) if e.kind == StoreErrorKind::Precondition))
        };
        match refused.await {
            Ok(refused) => refused,
            Err(e) => {
                tracing::info!(store = self.describe(), error = %e, "multipart uploads do not work here; writing big objects whole");
                false
            }
        }
    }
}
