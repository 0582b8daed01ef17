//! From configuration to a store.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};

use super::{CountedStore, DirStore, Prices, S3Options, S3Store};

/// Which store, and how to reach it. Unknown fields are an error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreConfig {
    /// `dir:/path`, `file:///path` or an absolute path for a directory; `s3://bucket` or `s3://bucket/prefix` for S3.
    pub url: String,
    /// S3: address of a compatible store, for instance `http://127.0.0.1:7480`. Default: Amazon's.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// S3: the region. Default: as the AWS tools find it (environment, profile, instance), with an endpoint `us-east-1`
    /// when they find none.
    #[serde(default)]
    pub region: Option<String>,
    /// S3: put the bucket into the path instead of the host name. Default: yes with an endpoint, no without.
    #[serde(default)]
    pub path_style: Option<bool>,
    /// S3: the profile of the AWS configuration files to take credentials and region from.
    #[serde(default)]
    pub profile: Option<String>,
    /// S3: seconds one request may take, beside what its size needs at 1 MiB/s. Default 10, at least 1.
    #[serde(default)]
    pub request_timeout_s: Option<u64>,
    /// US dollars per 1,000 PUT and LIST requests, for the cost shown. Default: the list price for S3, 0 for a directory.
    #[serde(default)]
    pub put_usd_per_1000: Option<f64>,
    /// US dollars per 1,000 GET and HEAD requests, for the cost shown. Default: the list price for S3, 0 for a directory.
    #[serde(default)]
    pub get_usd_per_1000: Option<f64>,
}

impl StoreConfig {
    /// The store at `url`, with defaults for everything else.
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            endpoint: None,
            region: None,
            path_style: None,
            profile: None,
            request_timeout_s: None,
            put_usd_per_1000: None,
            get_usd_per_1000: None,
        }
    }

    /// Checks the configuration without touching the store.
    pub fn check(&self) -> anyhow::Result<()> {
        self.target().map(drop)
    }

    fn target(&self) -> anyhow::Result<Target> {
        if self.request_timeout_s == Some(0) {
            bail!("store option request_timeout_s must be at least 1");
        }
        if let Some(rest) = self.url.strip_prefix("s3://") {
            let (bucket, prefix) = rest.split_once('/').unwrap_or((rest, ""));
            if bucket.is_empty() {
                bail!("store url {:?} names no bucket; write s3://bucket or s3://bucket/prefix", self.url);
            }
            if prefix.trim_end_matches('/').split('/').any(str::is_empty) && !prefix.is_empty() {
                bail!("store url {:?} has an empty part in its prefix", self.url);
            }
            return Ok(Target::S3 { bucket: bucket.to_owned(), prefix: prefix.trim_end_matches('/').to_owned() });
        }
        let path = self.url.strip_prefix("dir:").or_else(|| self.url.strip_prefix("file://")).unwrap_or(&self.url);
        if !path.starts_with('/') {
            bail!("store url {:?} is none of dir:/path, file:///path, /path and s3://bucket/prefix", self.url);
        }
        let s3_only = [
            ("endpoint", self.endpoint.is_some()),
            ("region", self.region.is_some()),
            ("path_style", self.path_style.is_some()),
            ("profile", self.profile.is_some()),
            ("request_timeout_s", self.request_timeout_s.is_some()),
        ];
        if let Some((name, _)) = s3_only.iter().find(|(_, given)| *given) {
            bail!("store option {name} is for S3, but the store is the directory {path}");
        }
        Ok(Target::Dir(path.into()))
    }
}

#[derive(Debug, PartialEq)]
enum Target {
    Dir(PathBuf),
    S3 { bucket: String, prefix: String },
}

/// Opens the store and, for S3, proves that it can be relied on (see [`S3Store::verify_conditional_writes`]).
pub async fn open(config: &StoreConfig) -> anyhow::Result<Arc<CountedStore>> {
    let prices = |default: Prices| Prices {
        put_class_usd_per_1000: config.put_usd_per_1000.unwrap_or(default.put_class_usd_per_1000),
        get_class_usd_per_1000: config.get_usd_per_1000.unwrap_or(default.get_class_usd_per_1000),
    };
    let store = match config.target()? {
        Target::Dir(path) => {
            let dir = tokio::task::spawn_blocking(move || DirStore::open(&path))
                .await
                .context("opening the directory store failed")??;
            CountedStore::new(Arc::new(dir), prices(Prices::FREE))
        }
        Target::S3 { bucket, prefix } => {
            let mut options = S3Options::new(bucket, prefix);
            options.endpoint = config.endpoint.clone();
            options.region = config.region.clone();
            options.path_style = config.path_style.unwrap_or(config.endpoint.is_some());
            options.profile = config.profile.clone();
            if let Some(seconds) = config.request_timeout_s {
                options.request_timeout = Duration::from_secs(seconds);
            }
            let s3 = S3Store::connect(options).await;
            s3.verify_conditional_writes().await?;
            let meter = s3.meter();
            CountedStore::with_meter(Arc::new(s3), prices(Prices::S3_STANDARD), meter)
        }
    };
    Ok(Arc::new(store))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let target = |url: &str| StoreConfig::new(url).target();
        let dir = |path: &str| Target::Dir(path.into());
        let s3 = |bucket: &str, prefix: &str| Target::S3 { bucket: bucket.to_owned(), prefix: prefix.to_owned() };
        assert_eq!(target("dir:/a/b").unwrap(), dir("/a/b"));
        assert_eq!(target("file:///a/b").unwrap(), dir("/a/b"));
        assert_eq!(target("/a/b").unwrap(), dir("/a/b"));
        assert_eq!(target("s3://b").unwrap(), s3("b", ""));
        assert_eq!(target("s3://b/p/q/").unwrap(), s3("b", "p/q"));
        for wrong in ["", "a/b", "dir:a", "file://a", "s3://", "s3:///p", "s3://b//p", "http://x"] {
            assert!(target(wrong).is_err(), "{wrong:?} was taken");
        }
    }

    #[test]
    fn options_that_do_not_fit_are_refused() {
        let config = |text: &str| toml::from_str::<StoreConfig>(text);
        let dir = config("url = '/a'\nregion = 'x'").unwrap();
        assert!(dir.check().unwrap_err().to_string().contains("region"));
        assert!(config("url = '/a'\nregoin = 'x'").is_err());
        assert!(config("url = 's3://b'\nregion = 'x'").unwrap().check().is_ok());
        assert!(config("url = 's3://b'\nrequest_timeout_s = 0").unwrap().check().is_err());
    }
}
