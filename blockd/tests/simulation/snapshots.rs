//! Snapshots in the middle of everything else: made and deleted while requests, compaction and crashes go on.
//!
//! The oracle: a snapshot that the manifest has reads as the history up to its LSN, whatever happened since; it contains
//! what was accepted before it was asked for; one that was answered is there until its deletion was asked for.

use std::collections::BTreeMap;
use std::time::Duration;

use blockd::manifest::Manifest;
use blockd::volume::{SnapshotError, SnapshotOrder};
use tokio::sync::oneshot;

use super::*;

type Answer = oneshot::Receiver<Result<Manifest, SnapshotError>>;

/// What was asked for and answered.
#[derive(Default)]
pub(super) struct Snapshots {
    next: u64,
    /// Made as far as was answered, with the least LSN of each.
    sure: BTreeMap<String, u64>,
    making: Vec<(String, u64, Answer)>,
}

impl World {
    /// Makes or deletes one now and then.
    pub(super) fn random_snapshot(&mut self, life: &mut Life) {
        self.hear_of_snapshots();
        if !self.rng.random_bool(0.02) {
            return;
        }
        if self.rng.random_bool(0.7) {
            self.snapshots.next += 1;
            let name = format!("s{}", self.snapshots.next);
            let (reply, answer) = oneshot::channel();
            let least = life.volume.stats().accepted_lsn;
            life.volume.create_snapshot(SnapshotOrder { id: self.rng.random(), name: name.clone(), hold: None }, reply);
            self.snapshots.making.push((name, least, answer));
        } else if let Some(name) = self.snapshots.sure.keys().next().cloned() {
            // From here on it may be gone at any time.
            self.snapshots.sure.remove(&name);
            life.volume.delete_snapshot(&name, oneshot::channel().0);
        }
    }

    fn hear_of_snapshots(&mut self) {
        let Snapshots { making, sure, .. } = &mut self.snapshots;
        making.retain_mut(|(name, least, answer)| match answer.try_recv() {
            Err(oneshot::error::TryRecvError::Empty) => true,
            Err(oneshot::error::TryRecvError::Closed) => false,
            Ok(result) => {
                if result.is_ok() {
                    sure.insert(name.clone(), *least);
                }
                false
            }
        });
    }

    /// Reads every snapshot there is, as a host would that has nothing but the bucket.
    pub(super) async fn check_snapshots(&mut self) {
        self.hear_of_snapshots();
        let (manifest, _) = manifest::open(self.bucket.as_ref(), NAME, self.keys.as_ref()).await.unwrap();
        for (name, least) in &self.snapshots.sure {
            let found =
                manifest.snapshot(name).unwrap_or_else(|| panic!("snapshot {name} was answered and is not there"));
            assert!(found.lsn >= *least, "snapshot {name} lacks what was accepted before it");
        }
        for snapshot in &manifest.snapshots {
            let read = read_snapshot(&self.bucket, &manifest, snapshot, self.keys.clone(), SECTORS).await;
            let found = read.unwrap_or_else(|why| panic!("snapshot {}: {why}", snapshot.name));
            assert!(found == self.history.state(snapshot.lsn, SECTORS), "snapshot {} changed", snapshot.name);
        }
    }

    /// Deletes all of them, so that nothing of them may be left at the end.
    pub(super) async fn delete_snapshots(&mut self, life: &mut Life) {
        self.snapshots = Snapshots { next: self.snapshots.next, ..Snapshots::default() };
        for _ in 0..10_000 {
            let Some(snapshot) = self.manifest().await.snapshots.first().cloned() else { return };
            let (reply, mut answer) = oneshot::channel();
            life.volume.delete_snapshot(&snapshot.name, reply);
            while matches!(answer.try_recv(), Err(oneshot::error::TryRecvError::Empty)) {
                self.let_pass(life, Duration::from_millis(2), 20_000).await;
            }
        }
        panic!("snapshots stay");
    }
}
