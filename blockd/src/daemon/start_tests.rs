//! What is asked of a daemon that is still starting.

use std::sync::Arc;
use std::time::Duration;

use clap::{Args, Command, FromArgMatches};
use tempfile::TempDir;

use super::DataDir;
use super::volumes::{Daemon, Phase};
use crate::admin::api::CreateVolume;
use crate::config::Config;
use crate::export::nbd::server::Exports;
use crate::manifest::{self, Manifest};
use crate::reactor::{ReactorHandle, ReactorOptions};
use crate::store::{CountedStore, Fault, FaultPlan, FaultyStore, MemoryStore, Op, Prices};
use crate::types::VolumeId;

/// How long the bucket takes for its list of volumes: longer than any opening.
const LISTING: Duration = Duration::from_secs(3);

struct Starting {
    daemon: Arc<Daemon>,
    plan: Arc<FaultPlan>,
    bucket: Arc<MemoryStore>,
    _dir: TempDir,
}

impl Starting {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let data = dir.path().join("data");
        let args = ["serve", "--log-size", "64MiB", "--log-segment", "16MiB", "--data", data.to_str().unwrap()];
        let matches = Config::augment_args(Command::new("serve")).get_matches_from(args);
        let config = Config::from_arg_matches(&matches).unwrap();
        let mut data = DataDir::open(&config.data, "memory", false).unwrap();
        data.settle().unwrap();
        let (plan, bucket) = (FaultPlan::new(1), Arc::new(MemoryStore::new()));
        let store = FaultyStore::new(bucket.clone(), plan.clone());
        let store = Arc::new(CountedStore::new(Arc::new(store), Prices::FREE));
        let reactor = ReactorHandle::spawn(ReactorOptions::default(), tokio::runtime::Handle::current()).unwrap();
        let daemon = Arc::new(Daemon::new(config, data, store, vec![reactor], None));
        Self { daemon, plan, bucket, _dir: dir }
    }

    /// Asks for a volume with `ask` while the daemon waits for the bucket's list, which has that volume.
    async fn ask_meanwhile(&self, ask: impl AsyncFnOnce(&Arc<Daemon>)) {
        self.plan.inject(Op::List, Fault::Stall(LISTING));
        let daemon = self.daemon.clone();
        let start = tokio::spawn(async move { daemon.open_all().await });
        while self.plan.struck() == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        ask(&self.daemon).await;
        assert!(self.daemon.find("disk").is_some(), "it was said to be open");
        start.await.unwrap().unwrap();
        let phase = self.daemon.entry("disk").unwrap().phase;
        let why = if let Phase::Failed(why) = &phase { why } else { "" };
        assert!(matches!(phase, Phase::Open(_)), "{} {why}", phase.state().as_str());
        assert!(self.daemon.find("disk").is_some(), "its export is gone");
        let (manifest, _) = manifest::load(self.bucket.as_ref(), "disk").await.unwrap();
        assert_eq!(manifest.epochs.len(), 1, "it was opened twice");
        self.daemon.close_all().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_opened_while_the_volumes_are_listed_stays_open() {
    let starting = Starting::new();
    let manifest = Manifest::new(VolumeId::random(), "disk", 1 << 30);
    manifest::create(starting.bucket.as_ref(), &manifest).await.unwrap();
    starting.ask_meanwhile(async |daemon| drop(daemon.open("disk", true).await.unwrap())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_made_while_the_volumes_are_listed_stays_open() {
    let request = CreateVolume {
        name: "disk".into(),
        size: 1 << 30,
        durability: None,
        codec: None,
        chunk_bytes: None,
        secret: None,
    };
    Starting::new().ask_meanwhile(async |daemon| drop(daemon.create(request).await.unwrap())).await;
}
