//! Those who read beside the owners: followers, and snapshots on hosts that have nothing but the bucket.

use blockd::view::{FollowOptions, Follower};
use blockd::volume::{SnapshotError, SnapshotOrder};
use tokio::sync::oneshot;

use super::*;

/// Somebody who reads the volume without owning it: what he sees is a prefix of the history, and never goes back.
pub(super) async fn follow(shared: Rc<Shared>, mut rng: SmallRng, plan: Arc<FaultPlan>) {
    plan.set_rates(FaultRates {
        fail_before: 0.02,
        flip_bit: 0.01,
        stall: 0.02,
        stall_max: LATEST,
        ..Default::default()
    });
    let open = async |store: Arc<dyn ObjectStore>| {
        Follower::open(FollowOptions {
            store,
            name: NAME.into(),
            home: Box::new(|_| TableHome::Memory(MemKv::new())),
            donor: None,
            frame_cache: None,
            blocking: Blocking::Inline,
            keys: shared.keys.clone(),
        })
        .await
    };
    let store: Arc<dyn ObjectStore> = Arc::new(FaultyStore::new(shared.bucket.clone(), plan.clone()));
    let mut newest = 0;
    while !shared.over.get() {
        let Ok(mut follower) = open(store.clone()).await else {
            tokio::time::sleep(Duration::from_millis(20)).await;
            continue;
        };
        for _ in 0..rng.random_range(1..100) {
            let (manifest, _) = manifest::load(shared.bucket.as_ref(), NAME).await.unwrap();
            shared.learn(&manifest);
            let reached = follower.sight().table().applied();
            assert!(reached.seq >= newest, "a follower went back from chunk {newest} to {reached:?}");
            newest = reached.seq;
            match follower.sight().read(0, (SECTORS * SECTOR) as u32).await {
                Ok((bytes, _)) if reached.seq > 0 => {
                    let found: Vec<Value> = bytes.chunks(SECTOR).map(value_of).collect();
                    let history = shared.histories.borrow()[&manifest.epoch_of(reached.seq)].clone();
                    let at = follower.sight().table().position();
                    let expected = shared.state(&history.borrow(), reached.lsn, |reset| reset.is_before(at));
                    assert!(found == expected, "a follower sees something else than the state at {reached:?}");
                    shared.count("followed");
                }
                Ok((bytes, _)) => assert!(bytes.iter().all(|b| *b == 0), "nothing was written yet"),
                // It did not come by in time.
                Err(ReadError::Missing { .. }) => shared.count("too late"),
                Err(ReadError::Store(_) | ReadError::Header { .. } | ReadError::Corrupt { .. }) => {}
                Err(error) => panic!("a follower cannot read: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(rng.random_range(1..150))).await;
            if rng.random_bool(0.1) {
                shared.check_snapshots().await;
            }
            // What it shows stays as it is.
            let _ = follower.refresh().await;
            if shared.over.get() {
                break;
            }
        }
    }
}

type Answer = oneshot::Receiver<Result<Manifest, SnapshotError>>;

/// Snapshots that were asked for, by the host that asked.
#[derive(Default)]
pub(super) struct Asked {
    /// Each with what had been acknowledged then.
    making: Vec<(String, Lsn, Answer)>,
    /// For clones.
    ordering: Vec<(Hold, Answer)>,
}

impl Shared {
    /// Reads every snapshot there is: each is the history up to its LSN, whoever has owned the volume since.
    pub(super) async fn check_snapshots(&self) {
        let manifest = self.manifest().await;
        for (name, least) in self.snapshots.borrow().iter() {
            let found = manifest.snapshot(name);
            let found = found.unwrap_or_else(|| panic!("snapshot {name} was answered and is not there"));
            assert!(found.lsn >= *least, "snapshot {name} lacks what was accepted before it");
        }
        for snapshot in &manifest.snapshots {
            let keys = self.keys.clone();
            let Ok(found) = read_snapshot(&self.bucket, &manifest, snapshot, keys, SECTORS).await else {
                let there = self.manifest().await.snapshots.iter().any(|other| other.id == snapshot.id);
                assert!(!there, "snapshot {} cannot be read", snapshot.name);
                continue;
            };
            assert!(found == self.snapshot_state(&manifest, snapshot), "snapshot {} changed", snapshot.name);
            self.count("snapshots read");
        }
    }

    pub(super) async fn manifest(&self) -> Manifest {
        manifest::open(self.bucket.as_ref(), &self.name, self.keys.as_ref()).await.unwrap().0
    }
}

impl Host {
    /// Makes or deletes a snapshot now and then.
    pub(super) fn random_snapshot(&mut self, serving: &mut Serving) {
        self.hear_of_snapshots(serving);
        if !self.rng.random_bool(0.01) {
            return;
        }
        if self.rng.random_bool(0.15) {
            // For a clone of the volume as it is now.
            let name = format!("c{}", self.shared.value());
            let hold = Hold { volume: VolumeId(self.rng.random()), name: name.clone() };
            let (reply, answer) = oneshot::channel();
            let id = self.rng.random();
            serving.volume.create_snapshot(SnapshotOrder { id, name, hold: Some(hold.clone()) }, reply);
            serving.asked.ordering.push((hold, answer));
        } else if self.rng.random_bool(0.6) {
            let name = format!("s{}", self.shared.value());
            let (reply, answer) = oneshot::channel();
            let id = self.rng.random();
            let least = serving.acked;
            serving.volume.create_snapshot(SnapshotOrder { id, name: name.clone(), hold: None }, reply);
            serving.asked.making.push((name, least, answer));
        } else {
            let oldest = self.shared.snapshots.borrow().keys().next().cloned();
            let Some(name) = oldest else { return };
            let deleted = name.clone();
            // From here on it may be gone at any time.
            self.shared.snapshots.borrow_mut().remove(&name);
            // Holds of clones that are not there are let go of first, or at the same time by somebody else.
            let (store, shared) = (self.store(), self.shared.clone());
            let release = async move { shared.release_stale(store.as_ref(), |snapshot| snapshot.name == name).await };
            if self.rng.random_bool(0.5) {
                tokio::task::spawn_local(release);
            }
            serving.volume.delete_snapshot(&deleted, oneshot::channel().0);
        }
    }

    fn hear_of_snapshots(&mut self, serving: &mut Serving) {
        let shared = &self.shared;
        serving.asked.ordering.retain_mut(|(hold, answer)| match answer.try_recv() {
            Err(oneshot::error::TryRecvError::Empty) => true,
            Err(oneshot::error::TryRecvError::Closed) => false,
            Ok(result) => {
                if result.is_ok() {
                    shared.orders.borrow_mut().push(hold.clone());
                }
                false
            }
        });
        serving.asked.making.retain_mut(|(name, least, answer)| match answer.try_recv() {
            Err(oneshot::error::TryRecvError::Empty) => true,
            Err(oneshot::error::TryRecvError::Closed) => false,
            Ok(result) => {
                if result.is_ok() {
                    shared.snapshots.borrow_mut().insert(name.clone(), *least);
                    shared.count("snapshots");
                }
                false
            }
        });
    }

    /// Deletes all snapshots, so that nothing of them may be left at the end.
    pub(super) async fn delete_snapshots(&mut self, serving: &mut Serving) {
        self.shared.snapshots.borrow_mut().clear();
        for _ in 0..10_000 {
            let Some(snapshot) = self.shared.manifest().await.snapshots.first().cloned() else {
                serving.volume.look_at_snapshots();
                return;
            };
            self.shared.release_stale(self.shared.bucket.as_ref(), |other| other.id == snapshot.id).await;
            if snapshot.hidden {
                continue;
            }
            let (reply, mut answer) = oneshot::channel();
            serving.volume.delete_snapshot(&snapshot.name, reply);
            while matches!(answer.try_recv(), Err(oneshot::error::TryRecvError::Empty)) {
                self.step(serving).await;
            }
        }
        panic!("snapshots stay");
    }
}
