//! Going back to a snapshot, by a host that has the lease and has not opened the volume yet.
//!
//! Nobody knows whether a restore happened but by the manifest: the answer may be lost, and the host as well. So what it was
//! to lead to is noted before, and counts from when a manifest tells of it.

use blockd::chunk::relocated_base;
use blockd::manifest::Snapshot;
use blockd::table::Position;
use blockd::volume::{Claimant, GoBack, go_back};

use super::*;

/// From here on the history goes on from another state than its last.
pub(super) struct Reset {
    /// Its last LSN before.
    pub lsn: Lsn,
    /// Its last chunk before.
    pub seq: u64,
    /// The epoch that did it.
    pub epoch: u64,
    /// The state from then on.
    pub state: super::State,
}

impl Reset {
    /// Whether a table at this position knows of it.
    pub fn is_before(&self, at: Position) -> bool {
        at > Position { seq: self.seq, relocated: relocated_base(self.epoch) }
    }
}

impl Shared {
    /// The state at `lsn` of the history, as seen by who knows of the restores that `knows` says.
    pub fn state(&self, history: &History, lsn: Lsn, knows: impl Fn(&Reset) -> bool) -> Vec<Value> {
        match self.resets.borrow().iter().rev().find(|reset| reset.lsn <= lsn && knows(reset)) {
            Some(reset) => history.state_from(reset.state.to_vec(), reset.lsn, lsn),
            None => history.state(lsn, SECTORS),
        }
    }

    /// Takes note of restores that a manifest tells of.
    pub fn learn(&self, manifest: &Manifest) {
        let mut resets = self.resets.borrow_mut();
        for restored in &manifest.restores {
            if resets.iter().any(|reset| reset.epoch == restored.epoch) {
                continue;
            }
            let began = manifest.epochs.iter().find(|e| e.epoch == restored.epoch).expect("it is settled");
            assert_eq!(began.first_seq, restored.from_seq + 1, "a restore stands where its epoch begins");
            let state = self.wanted.borrow()[&(restored.to_seq, restored.to_epoch)].clone();
            let (lsn, seq) = (began.first_lsn - 1, restored.from_seq);
            resets.push(Reset { lsn, seq, epoch: restored.epoch, state });
            self.count("restored");
        }
    }

    /// What a snapshot must read as.
    pub fn snapshot_state(&self, manifest: &Manifest, snapshot: &Snapshot) -> Vec<Value> {
        let Some(pointer) = &snapshot.checkpoint else { return vec![0; SECTORS] };
        self.learn(manifest);
        let history = self.histories.borrow()[&manifest.epoch_of(snapshot.seq)].clone();
        self.state(&history.borrow(), snapshot.lsn, |reset| reset.is_before(Position::from(pointer)))
    }
}

impl Host {
    /// Goes back to one of the snapshots there are.
    pub(super) async fn go_back(&mut self, store: &Arc<HostStore>, manifest: &Manifest) {
        let shown: Vec<&Snapshot> = manifest.snapshots.iter().filter(|snapshot| !snapshot.hidden).collect();
        let snapshot = shown[self.rng.random_range(0..shown.len())];
        let state = Rc::new(self.shared.snapshot_state(manifest, snapshot));
        self.shared.wanted.borrow_mut().insert((snapshot.seq, snapshot.epoch), state);
        let expected = manifest.epochs.last().map(|last| last.epoch);
        let order = GoBack {
            store: store.as_ref(),
            name: &manifest.name,
            snapshot: &snapshot.name,
            claimant: Claimant { owner: self.id, expected, now_ms: self.clocks.now().wall_ms },
            home: &TableHome::Memory(self.kv.clone()),
            scratch: &TableHome::Memory(MemKv::new()),
            device: self.disk.clone(),
            blocking: Blocking::Inline,
            keys: self.shared.keys.as_ref(),
        };
        self.shared.count("going back");
        // Now and then the host stands still on the way, for longer than its lease.
        let pause = self.rng.random_bool(0.2).then(|| {
            let ms = |range| Duration::from_millis(range);
            (ms(self.rng.random_range(0..30)), ms(self.rng.random_range(10..4 * LEASE_MS)))
        });
        let stopped = self.stopped.clone();
        let trouble = async move {
            if let Some((after, pause)) = pause {
                tokio::time::sleep(after).await;
                stopped.store(true, Ordering::Relaxed);
                tokio::time::sleep(pause).await;
                stopped.store(false, Ordering::Relaxed);
            }
            std::future::pending::<()>().await
        };
        let went = tokio::select! {
            biased;
            went = go_back(order) => went,
            () = trouble => return,
        };
        self.stopped.store(false, Ordering::Relaxed);
        match went {
            Ok(manifest) => {
                // Another host may have claimed the next epoch before the restore was recorded. It has not settled it: that
                // host goes on behind the restore.
                let began = manifest.settled().expect("it was claimed");
                if let Some(debt) = self.owes {
                    assert!(began.first_lsn > debt.acked, "{debt:?} was left behind by a restore: {began:?}");
                }
                assert!(began.first_seq == 1 || manifest.restores.last().is_some_and(|r| r.epoch == began.epoch));
                self.shared.learn(&manifest);
            }
            Err(OpenError::Undestaged(_)) => self.shared.count("not gone back"),
            Err(OpenError::Manifest { source: manifest::ManifestError::NoSnapshot { .. }, .. }) => {}
            Err(error) => self.judge_refusal(&error),
        }
    }
}
