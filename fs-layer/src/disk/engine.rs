//! A volume in a bucket, with blockd's daemon in this process.
//!
//! The daemon is the whole of `blockd serve`, on a data directory of its own; we are its client through Unix sockets like any other, so
//! nothing here depends on how volumes work. Other blockd commands find it by `--data`, for snapshots for instance.
//!
//! At the end the tree goes first, then the connections, then the daemon, which closes its volumes.

use std::path::PathBuf;

#[cfg(not(feature = "engine"))]
use super::nbd::NbdDisk;

/// Bytes of a volume that is made for a filesystem: 1 EiB.
pub const VOLUME_BYTES: u64 = 1 << 60;

/// What volume of which bucket.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Directory of the daemon.
    pub data: PathBuf,
    /// The bucket, as `blockd serve --store` wants it.
    pub store: String,
    /// The volume.
    pub volume: String,
    /// Further settings of the daemon, each `KEY=VALUE` or `KEY`.
    pub settings: Vec<String>,
    /// Make the volume if it is not there.
    pub create: bool,
    /// Connections to it.
    pub connections: usize,
}

/// The running daemon.
pub struct Engine {
    #[cfg(feature = "engine")]
    running: running::Running,
}

#[cfg(not(feature = "engine"))]
impl Engine {
    /// Says that there is none.
    ///
    /// # Errors
    /// Always.
    pub fn start(options: &EngineOptions) -> anyhow::Result<(Engine, NbdDisk)> {
        anyhow::bail!(
            "this fsd was built without the block engine, so it cannot open the bucket {}; use --nbd with a blockd beside it, or build \
             with the feature engine",
            options.store
        )
    }

    /// Nothing to stop.
    ///
    /// # Errors
    /// Never.
    pub fn stop(self) -> anyhow::Result<()> {
        Ok(())
    }
}

#[cfg(feature = "engine")]
mod running;
#[cfg(feature = "engine")]
mod sharing;
