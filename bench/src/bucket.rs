//! Which bucket a benchmark uses: a directory, or a real S3 server, near or far.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use blockd::store::{self, CountedStore, StoreConfig};

use crate::server::{BlockdOptions, DelayedPath};

/// Options about the bucket.
#[derive(Clone, Debug, clap::Args)]
pub struct BucketArgs {
    /// The bucket: dir:PATH or s3://BUCKET[/PREFIX]. `scripts/dev-s3 start` gives one [default: a directory below --dir].
    #[arg(long)]
    store: Option<String>,
    /// Address of an S3-compatible store.
    #[arg(long)]
    endpoint: Option<String>,
}

/// A bucket of its own for one measurement.
pub struct Bucket {
    url: String,
    endpoint: Option<String>,
    _path: Option<DelayedPath>,
}

impl BucketArgs {
    /// A part of the bucket that nothing else uses, or a directory below `dir`; answers come `delay` later.
    pub fn open(&self, dir: &Path, delay: Duration) -> Result<Bucket> {
        let Some(url) = &self.store else {
            let bucket = dir.join("bucket");
            std::fs::create_dir_all(&bucket)?;
            return Ok(Bucket {
                url: format!("dir:{}", bucket.canonicalize()?.display()),
                endpoint: None,
                _path: None,
            });
        };
        let unique = dir.file_name().context("a directory without a name")?.to_string_lossy();
        let url = format!("{}/{unique}", url.trim_end_matches('/'));
        let Some(endpoint) = self.endpoint.as_ref().filter(|_| !delay.is_zero()) else {
            return Ok(Bucket { url, endpoint: self.endpoint.clone(), _path: None });
        };
        let addr = endpoint.strip_prefix("http://").context("only an http:// endpoint can be delayed")?;
        let addr: SocketAddr =
            addr.trim_end_matches('/').parse().context("only an IP address and port can be delayed")?;
        let path = DelayedPath::start(addr, delay)?;
        Ok(Bucket { url, endpoint: Some(format!("http://{}", path.addr())), _path: Some(path) })
    }

    /// Whether it is a real server.
    pub fn is_s3(&self) -> bool {
        self.store.as_ref().is_some_and(|url| url.starts_with("s3:"))
    }
}

impl Bucket {
    /// Lets a daemon use it.
    pub fn serve(&self, options: &mut BlockdOptions) {
        options.store_url = Some(self.url.clone());
        if let Some(endpoint) = &self.endpoint {
            options.serve_args.push(format!("--s3-endpoint={endpoint}"));
        }
    }

    /// A way to it beside the daemon's.
    pub async fn store(&self) -> Result<Arc<CountedStore>> {
        store::open(&StoreConfig { endpoint: self.endpoint.clone(), ..StoreConfig::new(self.url.clone()) }).await
    }
}
