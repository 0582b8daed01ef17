//! Single requests, each with its time limit, counted, and with its errors named.

use std::ops::{Range, RangeInclusive};

use anyhow::anyhow;
use aws_sdk_s3::primitives::ByteStream;
use aws_sdk_s3::types::{CompletedMultipartUpload, CompletedPart, Delete, ObjectIdentifier};
use bytes::{Bytes, BytesMut};
use std::sync::atomic::Ordering::Relaxed;

use super::super::{LIST_MAX, ListEntry, ObjectMeta, PutMode, Result, StoreError, StoreErrorKind, Version};
use super::S3Store;
use super::error::from_sdk;
use crate::buf::AlignedBuf;

/// Name of the metadata entry that tells the writes of a key apart (`x-amz-meta-blockd-mark`).
const MARK: &str = "blockd-mark";

/// What stands at a key.
pub(super) struct Standing {
    pub(super) meta: ObjectMeta,
    /// The mark of the write that put it there.
    pub(super) mark: Option<String>,
}

/// A part of a listing.
pub(super) struct Page {
    pub(super) entries: Vec<ListEntry>,
    /// There is more after it.
    pub(super) more: bool,
}

/// Answers of these lengths are received into memory that is used again.
const RECEIVED_WHOLE: RangeInclusive<u64> = (64 << 10)..=(16 << 20);

/// The body of an answer that is to be `len` bytes long.
async fn receive(op: &'static str, key: &str, stream: ByteStream, len: usize) -> Result<Bytes> {
    let mut body = AlignedBuf::for_overwrite(len);
    let mut came = 0;
    each_piece(op, key, stream, len as u64, |piece| {
        body[came..came + piece.len()].copy_from_slice(&piece);
        came += piece.len();
    })
    .await?;
    Ok(body.into_bytes(len))
}

/// Hands over the body of an answer piece by piece. An error when it is not `len` bytes long; never more are handed over.
async fn each_piece(
    op: &'static str,
    key: &str,
    mut stream: ByteStream,
    len: u64,
    mut take: impl FnMut(Bytes),
) -> Result<()> {
    let mut came = 0;
    while let Some(piece) = stream.next().await {
        let piece = piece.map_err(|e| broken(op, key, format!("the answer broke off: {e}")))?;
        came += piece.len() as u64;
        if came > len {
            return Err(broken(op, key, format!("more than {len} bytes came")));
        }
        take(piece);
    }
    if came != len {
        return Err(broken(op, key, format!("{came} bytes came of {len}")));
    }
    Ok(())
}

fn broken(op: &'static str, key: &str, why: String) -> StoreError {
    StoreError::new(StoreErrorKind::Unavailable, op, key, anyhow!(why))
}

impl S3Store {
    /// The values of `If-None-Match` and `If-Match`.
    fn condition(&self, mode: &PutMode) -> (Option<String>, Option<String>) {
        match mode {
            PutMode::Create => (Some("*".to_owned()), None),
            PutMode::Replace(Version(etag)) if self.quirks.unquoted_etags.load(Relaxed) => {
                (None, Some(etag.trim_matches('"').to_owned()))
            }
            PutMode::Replace(Version(etag)) => (None, Some(etag.clone())),
        }
    }

    pub(super) async fn put_once(&self, key: &str, body: Bytes, mode: &PutMode, mark: &str) -> Result<Version> {
        self.meter.put_class();
        let len = body.len() as u64;
        let (if_none_match, if_match) = self.condition(mode);
        let request = self
            .client
            .put_object()
            .bucket(&self.options.bucket)
            .key(self.full_key(key))
            .metadata(MARK, mark)
            .set_if_none_match(if_none_match)
            .set_if_match(if_match)
            .body(ByteStream::from(body))
            .customize();
        let request = if self.sign_payload { request } else { request.disable_payload_signing() };
        self.limited("put", key, len, async {
            let answer = request.send().await.map_err(|e| from_sdk("put", key, e))?;
            let etag = answer.e_tag.ok_or_else(|| broken("put", key, "an answer without ETag".to_owned()))?;
            Ok(Version(etag))
        })
        .await
    }

    pub(super) async fn head_once(&self, key: &str) -> Result<Standing> {
        self.meter.get_class();
        let request = self.client.head_object().bucket(&self.options.bucket).key(self.full_key(key));
        self.limited("head", key, 0, async {
            let answer = request.send().await.map_err(|e| from_sdk("head", key, e))?;
            let etag = answer.e_tag.ok_or_else(|| broken("head", key, "an answer without ETag".to_owned()))?;
            let size = answer.content_length.and_then(|n| u64::try_from(n).ok());
            let size = size.ok_or_else(|| broken("head", key, "an answer without length".to_owned()))?;
            Ok(Standing {
                meta: ObjectMeta { size, version: Version(etag) },
                mark: answer.metadata.and_then(|mut m| m.remove(MARK)),
            })
        })
        .await
    }

    /// Reads an object or a range that is not empty. Never returns less than asked for.
    pub(super) async fn get_once(
        &self,
        op: &'static str,
        key: &str,
        range: Option<Range<u64>>,
    ) -> Result<(Bytes, Version)> {
        let (stream, expected, version) = self.begin_get(op, key, range).await?;
        let read = async {
            if RECEIVED_WHOLE.contains(&expected) {
                return receive(op, key, stream, expected as usize).await;
            }
            // A length that lies must not make us allocate: beyond this the buffer grows with what really comes.
            let mut body = BytesMut::with_capacity(expected.min(64 << 20) as usize);
            each_piece(op, key, stream, expected, |piece| body.extend_from_slice(&piece)).await?;
            Ok(body.freeze())
        };
        Ok((self.limited(op, key, expected, read).await?, version))
    }

    /// Reads a range that is not empty, in the pieces in which it comes.
    pub(super) async fn get_pieces_once(&self, key: &str, range: Range<u64>) -> Result<Vec<Bytes>> {
        let op = "get_range";
        let (stream, expected, _) = self.begin_get(op, key, Some(range)).await?;
        let mut pieces = Vec::new();
        self.limited(op, key, expected, each_piece(op, key, stream, expected, |piece| pieces.push(piece))).await?;
        Ok(pieces)
    }

    /// Asks for an object or a range that is not empty. Returns its body and how long that has to be.
    async fn begin_get(
        &self,
        op: &'static str,
        key: &str,
        range: Option<Range<u64>>,
    ) -> Result<(ByteStream, u64, Version)> {
        self.meter.get_class();
        let request = self
            .client
            .get_object()
            .bucket(&self.options.bucket)
            .key(self.full_key(key))
            .set_range(range.as_ref().map(|r| format!("bytes={}-{}", r.start, r.end - 1)));
        let send = async { request.send().await.map_err(|e| from_sdk(op, key, e)) };
        let answer = self.limited(op, key, 0, send).await?;
        let etag = answer.e_tag.ok_or_else(|| broken(op, key, "an answer without ETag".to_owned()))?;
        let len = answer.content_length.and_then(|n| u64::try_from(n).ok());
        let len = len.ok_or_else(|| broken(op, key, "an answer without length".to_owned()))?;
        if let Some(range) = &range {
            // Past the end the protocol shortens the answer; a store that ignores ranges sends the whole object.
            let expected = format!("bytes {}-{}/", range.start, range.end - 1);
            if !answer.content_range.as_deref().unwrap_or_default().starts_with(&expected) {
                let cause = anyhow!("asked for range {range:?}, got {:?}", answer.content_range);
                return Err(StoreError::new(StoreErrorKind::Invalid, op, key, cause));
            }
        }
        Ok((answer.body, range.map_or(len, |r| r.end - r.start), Version(etag)))
    }

    pub(super) async fn list_once(&self, prefix: &str, after: Option<&str>) -> Result<Page> {
        self.meter.put_class();
        let request = self
            .client
            .list_objects_v2()
            .bucket(&self.options.bucket)
            .prefix(self.full_key(prefix))
            .set_start_after(after.map(|key| self.full_key(key)))
            .max_keys(LIST_MAX as i32);
        self.limited("list", prefix, 0, async {
            let answer = request.send().await.map_err(|e| from_sdk("list", prefix, e))?;
            let mut entries = Vec::new();
            for object in answer.contents.unwrap_or_default() {
                let (Some(key), Some(size)) = (object.key, object.size) else {
                    return Err(broken("list", prefix, "an entry without key or size".to_owned()));
                };
                entries
                    .push(ListEntry { key: self.short_key(&key).to_owned(), size: u64::try_from(size).unwrap_or(0) });
            }
            Ok(Page { entries, more: answer.is_truncated.unwrap_or(false) })
        })
        .await
    }

    pub(super) async fn delete_many_once(&self, keys: &[String]) -> Result<()> {
        self.meter.free();
        let first = keys.first().map_or("", String::as_str);
        let invalid = |e: aws_sdk_s3::error::BuildError| StoreError::new(StoreErrorKind::Invalid, "delete", first, e);
        let objects = keys
            .iter()
            .map(|key| ObjectIdentifier::builder().key(self.full_key(key)).build().map_err(invalid))
            .collect::<Result<Vec<_>>>()?;
        let delete = Delete::builder().quiet(true).set_objects(Some(objects)).build().map_err(invalid)?;
        let request = self.client.delete_objects().bucket(&self.options.bucket).delete(delete);
        self.limited("delete", first, 0, async {
            let answer = request.send().await.map_err(|e| from_sdk("delete", first, e))?;
            for error in answer.errors.unwrap_or_default() {
                let code = error.code.unwrap_or_default();
                let kind = match code.as_str() {
                    "NoSuchKey" => continue,
                    "AccessDenied" => StoreErrorKind::Denied,
                    "SlowDown" => StoreErrorKind::Throttled,
                    _ => StoreErrorKind::Unavailable,
                };
                let key = error.key.unwrap_or_default();
                let cause = anyhow!("{code} {}", error.message.unwrap_or_default());
                return Err(StoreError::new(kind, "delete", self.short_key(&key), cause));
            }
            Ok(())
        })
        .await
    }

    pub(super) async fn delete_once(&self, key: &str, version: Option<&Version>) -> Result<()> {
        self.meter.free();
        let request = self
            .client
            .delete_object()
            .bucket(&self.options.bucket)
            .key(self.full_key(key))
            .set_if_match(version.map(|version| version.0.clone()));
        let send = async { request.send().await.map_err(|e| from_sdk("delete", key, e)) };
        match self.limited("delete", key, 0, send).await {
            Err(e) if e.kind != StoreErrorKind::NotFound => Err(e),
            _ => Ok(()),
        }
    }

    pub(super) async fn begin_upload_once(&self, key: &str, mark: &str) -> Result<String> {
        self.meter.put_class();
        let request = self
            .client
            .create_multipart_upload()
            .bucket(&self.options.bucket)
            .key(self.full_key(key))
            .metadata(MARK, mark);
        self.limited("put", key, 0, async {
            let answer = request.send().await.map_err(|e| from_sdk("put", key, e))?;
            answer.upload_id.ok_or_else(|| broken("put", key, "an upload without id".to_owned()))
        })
        .await
    }

    /// Sends part `number`, counted from 1.
    pub(super) async fn upload_part_once(
        &self,
        key: &str,
        upload: &str,
        number: i32,
        body: Bytes,
    ) -> Result<CompletedPart> {
        self.meter.put_class();
        let len = body.len() as u64;
        let request = self
            .client
            .upload_part()
            .bucket(&self.options.bucket)
            .key(self.full_key(key))
            .upload_id(upload)
            .part_number(number)
            .body(ByteStream::from(body))
            .customize();
        let request = if self.sign_payload { request } else { request.disable_payload_signing() };
        self.limited("put", key, len, async {
            let answer = request.send().await.map_err(|e| from_sdk("put", key, e))?;
            Ok(CompletedPart::builder().part_number(number).set_e_tag(answer.e_tag).build())
        })
        .await
    }

    /// Makes the object of its parts, if there is none yet.
    pub(super) async fn complete_upload_once(
        &self,
        key: &str,
        upload: &str,
        parts: Vec<CompletedPart>,
    ) -> Result<Version> {
        self.meter.put_class();
        // The store may take a while to put many parts together.
        let time_as_for = parts.len() as u64 * self.options.part_size as u64;
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts)).build();
        let request = self
            .client
            .complete_multipart_upload()
            .bucket(&self.options.bucket)
            .key(self.full_key(key))
            .upload_id(upload)
            .multipart_upload(parts)
            .if_none_match("*");
        self.limited("put", key, time_as_for, async {
            let answer = request.send().await.map_err(|e| from_sdk("put", key, e))?;
            let etag = answer.e_tag.ok_or_else(|| broken("put", key, "an answer without ETag".to_owned()))?;
            Ok(Version(etag))
        })
        .await
    }

    pub(super) async fn abort_upload_once(&self, key: &str, upload: &str) -> Result<()> {
        self.meter.free();
        let request =
            self.client.abort_multipart_upload().bucket(&self.options.bucket).key(self.full_key(key)).upload_id(upload);
        let send = async { request.send().await.map_err(|e| from_sdk("put", key, e)) };
        self.limited("put", key, 0, send).await.map(drop)
    }
}
