//! Making and deleting snapshots with the blockd in this process, over its admin socket.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use blockd::cli::Client;
use blockd::program::explain;

use super::SnapshotError;
use super::volume::Maker;

/// How long the daemon may take to see that a connection was closed.
const CLOSING_MAX: Duration = Duration::from_secs(2);
/// Between two attempts.
const CLOSING_LOOK: Duration = Duration::from_millis(50);

/// See the module.
pub struct EngineMaker {
    data: PathBuf,
}

impl EngineMaker {
    /// Of the blockd with this data directory.
    pub fn new(data: &Path) -> EngineMaker {
        EngineMaker { data: data.to_owned() }
    }

    /// Asks the daemon, however long its answer takes: a snapshot waits for the bucket.
    fn ask<T>(&self, ask: impl AsyncFnOnce(Client) -> anyhow::Result<T>) -> Result<T, SnapshotError> {
        let refused = |error: anyhow::Error| SnapshotError::Refused(explain(&error));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.map_err(|error| refused(error.into()))?;
        let client = Client::new(self.data.join("admin.sock"), &self.data);
        runtime.block_on(ask(client)).map_err(refused)
    }
}

impl Maker for EngineMaker {
    fn create(&self, volume: &str, name: &str) -> Result<(), SnapshotError> {
        self.ask(async |client| client.create_snapshot(volume, name).await.map(drop))
    }

    fn delete(&self, volume: &str, name: &str) -> Result<(), SnapshotError> {
        let start = Instant::now();
        self.ask(async |client| {
            loop {
                match client.delete_snapshot(volume, name).await {
                    // It does not delete what somebody is connected to, and may not have seen yet that we are gone.
                    Err(_) if start.elapsed() < CLOSING_MAX => tokio::time::sleep(CLOSING_LOOK).await,
                    result => return result,
                }
            }
        })
    }
}
