//! Creating big objects in parts.

use aws_sdk_s3::types::CompletedPart;
use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};

use anyhow::anyhow;

use super::super::{PutMode, Result, StoreError, StoreErrorKind, Version};
use super::S3Store;
use super::put::new_mark;

/// Parts of one object in flight at the same time.
const PARTS_IN_FLIGHT: usize = 4;

impl S3Store {
    /// Creates an object by multipart upload. The object appears, whole, when the upload is completed; the condition is
    /// checked then.
    pub(super) async fn create_in_parts(&self, key: &str, body: Bytes) -> Result<Version> {
        // Not needed for correctness: spares sending everything only to be refused at the end.
        match self.retry(0, || self.head_once(key)).await {
            Ok(_) => {
                let cause = anyhow!("the object exists");
                return Err(StoreError::new(StoreErrorKind::Precondition, "put", key, cause));
            }
            Err(e) if e.kind == StoreErrorKind::NotFound => {}
            Err(e) => return Err(e),
        }
        let mark = new_mark();
        let upload = self.retry(0, || self.begin_upload_once(key, &mark)).await?;
        let result = match self.upload_parts(key, &upload, &body).await {
            Ok(parts) => {
                let len = body.len() as u64;
                let complete = || self.complete_upload_once(key, &upload, parts.clone());
                self.conditionally(key, len, &PutMode::Create, &mark, complete).await
            }
            Err(e) => Err(e),
        };
        if result.is_err()
            && let Err(e) = self.abort_upload_once(key, &upload).await
        {
            tracing::warn!(key, upload, error = %e, "a multipart upload could not be aborted; its parts take space in the bucket");
        }
        result
    }

    async fn upload_parts(&self, key: &str, upload: &str, body: &Bytes) -> Result<Vec<CompletedPart>> {
        let size = self.options.part_size;
        stream::iter((0..body.len()).step_by(size).zip(1..))
            .map(|(start, number)| {
                let part = body.slice(start..body.len().min(start + size));
                let len = part.len() as u64;
                self.retry(len, move || self.upload_part_once(key, upload, number, part.clone()))
            })
            .buffered(PARTS_IN_FLIGHT)
            .try_collect()
            .await
    }
}
