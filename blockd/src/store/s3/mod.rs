//! S3, and stores that speak its protocol.
//!
//! `request` sends single requests and names their errors; `retry` says when to send them again; `put` decides who
//! won a conditional write whose answers were lost; `multipart` writes big objects; `probe` refuses stores that do not
//! keep the promises everything here rests on.
//!
//! What must hold: a conditional write is never answered with `Precondition` because of its own earlier attempt. Each
//! logical write carries a random mark in the object's metadata, and before a conflict is reported the mark of what
//! stands there is compared. Retries happen in `retry` only; the SDK's own are switched off.

mod error;
mod multipart;
mod probe;
mod put;
mod request;
mod retry;

use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

use async_trait::async_trait;
use aws_config::environment::EnvironmentVariableRegionProvider;
use aws_config::meta::region::RegionProviderChain;
use aws_config::profile::ProfileFileRegionProvider;
use aws_config::{BehaviorVersion, Region};
use aws_sdk_s3::Client;
use aws_sdk_s3::config::retry::RetryConfig;
use aws_sdk_s3::config::timeout::TimeoutConfig;
use aws_sdk_s3::config::{RequestChecksumCalculation, ResponseChecksumValidation, StalledStreamProtectionConfig};
use bytes::Bytes;
use futures::stream::{self, StreamExt, TryStreamExt};

use super::{
    LIST_MAX, ListEntry, ObjectMeta, ObjectStore, PutMode, RequestMeter, Result, StoreError, StoreErrorKind, Version,
};

/// Keys in one request to delete many, at most; the protocol's limit.
const DELETE_MAX: usize = 1000;
/// Single deletions in flight, for stores that cannot delete many at once.
const DELETES_IN_FLIGHT: usize = 16;

/// Which bucket, and how to reach it.
#[derive(Clone, Debug)]
pub struct S3Options {
    /// Name of the bucket.
    pub bucket: String,
    /// Put before every key, with a slash between. Empty: none.
    pub prefix: String,
    /// Address of a compatible store; `None` is Amazon's.
    pub endpoint: Option<String>,
    /// `None`: as the AWS tools find it.
    pub region: Option<String>,
    /// Bucket in the path instead of the host name.
    pub path_style: bool,
    /// Profile of the AWS configuration files; `None`: as the AWS tools choose it.
    pub profile: Option<String>,
    /// What one attempt may take, beside 1 s for each MiB it carries. An operation ends with its first attempt that
    /// fails after twice this time (beside the same again for its size).
    pub request_timeout: Duration,
    /// Objects to create that are bigger are uploaded in parts, bytes.
    pub multipart_above: u64,
    /// Size of a part, bytes; at least 5 MiB, the protocol's limit.
    pub part_size: usize,
}

impl S3Options {
    /// The bucket at Amazon's, with defaults for everything else.
    pub fn new(bucket: impl Into<String>, prefix: impl Into<String>) -> Self {
        Self {
            bucket: bucket.into(),
            prefix: prefix.into(),
            endpoint: None,
            region: None,
            path_style: false,
            profile: None,
            request_timeout: Duration::from_secs(10),
            multipart_above: 64 << 20,
            part_size: 16 << 20,
        }
    }
}

/// A bucket, or the part of it below a prefix.
///
/// A [`Version`] is an ETag. Objects above [`S3Options::multipart_above`] are created by multipart upload; an upload
/// whose caller goes away half way stays in the bucket, so give the bucket a lifecycle rule that aborts old ones.
#[derive(Debug)]
pub struct S3Store {
    client: Client,
    options: S3Options,
    meter: Arc<RequestMeter>,
    /// Hash bodies into the signature (SHA-256, seconds of processor time per GB where the processor has no instructions
    /// for it): done where nothing else guards them on their way.
    sign_payload: bool,
    quirks: Quirks,
}

/// Where stores differ; found out on the way.
#[derive(Debug, Default)]
struct Quirks {
    /// `If-Match` matches only without the quotes.
    unquoted_etags: AtomicBool,
    /// Many keys cannot be deleted by one request.
    single_deletes: AtomicBool,
    /// The end of a multipart upload ignores `If-None-Match`, so no upload may be used to create an object.
    unconditional_complete: AtomicBool,
}

impl S3Store {
    /// Makes a client. Sends nothing to the store; [`S3Store::verify_conditional_writes`] does.
    pub async fn connect(options: S3Options) -> Self {
        let timeouts =
            TimeoutConfig::builder().connect_timeout(options.request_timeout.min(Duration::from_secs(3))).build();
        let mut loader = aws_config::defaults(BehaviorVersion::latest())
            .retry_config(RetryConfig::disabled())
            .timeout_config(timeouts)
            .stalled_stream_protection(StalledStreamProtectionConfig::disabled())
            // Compatible stores know only the checksums that the protocol demands.
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .response_checksum_validation(ResponseChecksumValidation::WhenRequired);
        if let Some(profile) = &options.profile {
            loader = loader.profile_name(profile);
        }
        if let Some(endpoint) = &options.endpoint {
            loader = loader.endpoint_url(endpoint);
        }
        loader = match (&options.region, &options.endpoint) {
            (Some(region), _) => loader.region(Region::new(region.clone())),
            // Another store's region is just a word; do not ask an instance metadata service for it.
            (None, Some(_)) => {
                let mut profile = ProfileFileRegionProvider::builder();
                if let Some(name) = &options.profile {
                    profile = profile.profile_name(name);
                }
                let chain = RegionProviderChain::first_try(EnvironmentVariableRegionProvider::new())
                    .or_else(profile.build())
                    .or_else(Region::new("us-east-1"));
                loader.region(chain)
            }
            (None, None) => loader,
        };
        let config =
            aws_sdk_s3::config::Builder::from(&loader.load().await).force_path_style(options.path_style).build();
        let sign_payload = options.endpoint.as_deref().is_some_and(crosses_a_wire_in_clear);
        Self {
            client: Client::from_conf(config),
            options,
            meter: Arc::default(),
            sign_payload,
            quirks: Quirks::default(),
        }
    }

    /// Where every request that is sent is counted.
    pub fn meter(&self) -> Arc<RequestMeter> {
        self.meter.clone()
    }

    /// The key in the bucket.
    fn full_key(&self, key: &str) -> String {
        match self.options.prefix.as_str() {
            "" => key.to_owned(),
            prefix => format!("{prefix}/{key}"),
        }
    }

    /// The key below the prefix.
    fn short_key<'a>(&self, full: &'a str) -> &'a str {
        match self.options.prefix.as_str() {
            "" => full,
            prefix => full.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('/')).unwrap_or(full),
        }
    }

    async fn delete_batch(&self, keys: &[String]) -> Result<()> {
        if !self.quirks.single_deletes.load(Relaxed) {
            match self.retry(0, || self.delete_many_once(keys)).await {
                // The store may not know this request; what is really wrong shows in the single ones.
                Err(e) if e.kind == StoreErrorKind::Invalid => {}
                other => return other,
            }
        }
        stream::iter(keys.to_vec())
            .map(|key| async move { self.retry(0, || self.delete_once(&key, None)).await })
            .buffer_unordered(DELETES_IN_FLIGHT)
            .try_collect::<()>()
            .await?;
        if !self.quirks.single_deletes.swap(true, Relaxed) {
            tracing::info!(
                store = self.describe(),
                "the store cannot delete many objects at once; deleting one by one"
            );
        }
        Ok(())
    }
}

/// Whether requests to this endpoint travel over a network without TLS.
fn crosses_a_wire_in_clear(endpoint: &str) -> bool {
    let Some(rest) = endpoint.strip_prefix("http://") else {
        return false;
    };
    let authority = rest.split('/').next().unwrap_or_default();
    let address = authority
        .parse::<SocketAddr>()
        .map(|a| a.ip())
        .or_else(|_| authority.trim_matches(['[', ']']).parse::<IpAddr>());
    match address {
        Ok(ip) => !ip.is_loopback(),
        Err(_) => authority.split(':').next() != Some("localhost"),
    }
}

#[async_trait]
impl ObjectStore for S3Store {
    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<Version> {
        let big = body.len() as u64 > self.options.multipart_above && !self.quirks.unconditional_complete.load(Relaxed);
        match mode {
            PutMode::Create if big => self.create_in_parts(key, body).await,
            mode => self.put_whole(key, body, mode).await,
        }
    }

    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        self.retry(0, || self.get_once("get", key, None)).await
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        let past_end = |why: String| StoreError::new(StoreErrorKind::Invalid, "get_range", key, anyhow::anyhow!(why));
        if range.is_empty() {
            // The protocol cannot ask for nothing.
            let meta = self.head(key).await?;
            return if range.start == range.end && range.end <= meta.size {
                Ok(Bytes::new())
            } else {
                Err(past_end(format!("range {range:?} of an object of {} bytes", meta.size)))
            };
        }
        let len = range.end - range.start;
        let (body, _) = self.retry(len, || self.get_once("get_range", key, Some(range.clone()))).await?;
        Ok(body)
    }

    async fn get_pieces(&self, key: &str, range: Range<u64>) -> Result<Vec<Bytes>> {
        if range.is_empty() {
            return Ok(vec![self.get_range(key, range).await?]);
        }
        self.retry(range.end - range.start, || self.get_pieces_once(key, range.clone())).await
    }

    async fn head(&self, key: &str) -> Result<ObjectMeta> {
        Ok(self.retry(0, || self.head_once(key)).await?.meta)
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ListEntry>> {
        let mut entries: Vec<ListEntry> = Vec::new();
        let mut after = start_after.map(str::to_owned);
        loop {
            let page = self.retry(0, || self.list_once(prefix, after.as_deref())).await?;
            let last = page.entries.last().map(|e| e.key.clone());
            entries.extend(page.entries);
            // A store may answer with less than asked for; only an empty answer of ours may mean the end.
            match last {
                Some(last) if page.more && entries.len() < LIST_MAX => after = Some(last),
                _ => break,
            }
        }
        entries.truncate(LIST_MAX);
        Ok(entries)
    }

    async fn delete(&self, keys: &[String]) -> Result<()> {
        for batch in keys.chunks(DELETE_MAX) {
            self.delete_batch(batch).await?;
        }
        Ok(())
    }

    async fn delete_version(&self, key: &str, version: &Version) -> Result<()> {
        match self.retry(0, || self.delete_once(key, Some(version))).await {
            // The store may not know the condition.
            Err(e) if e.kind == StoreErrorKind::Invalid => self.retry(0, || self.delete_once(key, None)).await,
            other => other,
        }
    }

    fn describe(&self) -> String {
        let S3Options { bucket, prefix, endpoint, .. } = &self.options;
        let slash = if prefix.is_empty() { "" } else { "/" };
        match endpoint {
            Some(endpoint) => format!("s3://{bucket}{slash}{prefix} at {endpoint}"),
            None => format!("s3://{bucket}{slash}{prefix}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::crosses_a_wire_in_clear;

    #[test]
    fn bodies_are_hashed_only_where_nothing_else_guards_them() {
        for guarded in [
            "https://s3.example.com",
            "http://127.0.0.1:7480",
            "http://127.0.0.1",
            "http://[::1]:80/",
            "http://localhost:9000",
        ] {
            assert!(!crosses_a_wire_in_clear(guarded), "{guarded}");
        }
        for open in ["http://10.0.0.1:80", "http://localhost.example.com", "http://[fd00::1]"] {
            assert!(crosses_a_wire_in_clear(open), "{open}");
        }
    }
}
