//! Holding a volume's lease: the task that renews it, extends the volume's grant, and fences it when it is lost.
//!
//! Whether to renew and until when to serve is decided by [`Keeper`]. That a volume stops in time does not depend on
//! this task: it was told the end of its grant, and its reactor looks at the clocks before it answers anything.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex as StdMutex};
use std::time::Duration;

use tokio::sync::{Mutex, Notify};

use super::volumes::{Daemon, Place, with_volume};
use crate::lease::{self, Acquired, Grant, Held, Instants, Lease, LeaseError, LeaseState, Lost, Order, Unsent};
use crate::program::text::date;
use crate::reactor::{now_us, wall_ms};
use crate::store::ObjectStore;
use crate::volume::VolumeStats;

/// How often the clocks and the volume are looked at, at most and at least.
const STEP: (Duration, Duration) = (Duration::from_millis(20), Duration::from_secs(1));
/// What a renewal at the end of the process may take.
const LAST_RENEWAL: Duration = Duration::from_secs(3);

/// Both clocks now.
pub(super) fn instants() -> Instants {
    Instants { steady_ms: now_us() / 1000, wall_ms: wall_ms() }
}

/// A lease this process holds.
pub(super) struct Hold {
    name: String,
    lease: Mutex<Held>,
    /// The open volume, once there is one.
    place: StdMutex<Option<Place>>,
    stopped: AtomicBool,
    wake: Notify,
}

impl Hold {
    pub fn new(name: &str, acquired: Acquired) -> Arc<Self> {
        Arc::new(Self {
            name: name.to_owned(),
            lease: Mutex::new(Held::new(name, acquired)),
            place: StdMutex::new(None),
            stopped: AtomicBool::new(false),
            wake: Notify::new(),
        })
    }

    /// Until when the volume may be served; none when the lease is lost.
    pub async fn grant(&self) -> Option<Grant> {
        self.lease.lock().await.keeper.grant()
    }

    fn place(&self) -> Option<Place> {
        self.place.lock().expect("no code panics while it holds this lock").clone()
    }

    /// The volume is open, under `epoch`. `false` when it was lost on the way.
    pub async fn attach(&self, place: Place, epoch: u64) -> bool {
        let mut held = self.lease.lock().await;
        held.lease.epoch = epoch;
        *self.place.lock().expect("no code panics while it holds this lock") = Some(place.clone());
        // What was renewed while the volume was on its way to its reactor.
        let Some(grant) = held.keeper.grant() else { return false };
        with_volume(&place, move |volume| volume.grant(grant, instants())).await;
        true
    }

    /// Ends the renewing.
    pub fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.wake.notify_waiters();
    }

    fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }

    /// Marks the lease as released; nothing may be left to send. `false` when it is somebody else's by now.
    pub async fn release(&self, store: &dyn ObjectStore, stats: Option<&VolumeStats>) -> Result<bool, LeaseError> {
        self.write_last(store, LeaseState::Released, stats).await
    }

    /// Says for the last time what is only in this host's log.
    pub async fn say_last(&self, store: &dyn ObjectStore, stats: Option<&VolumeStats>) {
        let said = tokio::time::timeout(LAST_RENEWAL, self.write_last(store, LeaseState::Held, stats)).await;
        match said {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => tracing::warn!(volume = %self.name, "cannot renew its lease for the last time: {error}"),
            Err(_) => {
                tracing::warn!(volume = %self.name, "cannot renew its lease for the last time: the store is slow")
            }
        }
    }

    async fn write_last(
        &self,
        store: &dyn ObjectStore,
        state: LeaseState,
        stats: Option<&VolumeStats>,
    ) -> Result<bool, LeaseError> {
        self.stop();
        let mut held = self.lease.lock().await;
        held.write_last(store, state, stats.map(unsent), wall_ms()).await
    }
}

/// Who holds a lease, for people.
pub(super) fn holder(lease: &Lease) -> String {
    let host = uuid::Uuid::from_bytes(lease.host).simple().to_string();
    format!("{} (host {})", lease.host_name, &host[..8])
}

impl Daemon {
    /// Renews the lease until it is let go, stopped or lost.
    pub(super) async fn keep(self: Arc<Self>, hold: Arc<Hold>) {
        let duration = Duration::from_millis(hold.lease.lock().await.lease.duration_ms);
        let step = (duration / 50).clamp(STEP.0, STEP.1);
        let mut failures = 0u32;
        loop {
            tokio::select! {
                () = tokio::time::sleep(step) => {}
                () = hold.wake.notified() => {}
            }
            if hold.is_stopped() {
                return;
            }
            if let Some(place) = hold.place() {
                // A chunk met somebody else's seal.
                let fenced = with_volume(&place, |volume| volume.fenced().map(str::to_owned)).await.flatten();
                if let Some(why) = fenced {
                    let why = self.who_took(&hold).await.unwrap_or(why);
                    return self.lost(&hold, why).await;
                }
            }
            let mut held = hold.lease.lock().await;
            if hold.is_stopped() {
                return;
            }
            let Order::Renew(number) = held.keeper.tick(instants()) else { continue };
            let limit = (duration / 5).max(Duration::from_secs(1));
            let renewed = tokio::time::timeout(limit, self.renew(&hold, &mut held)).await;
            let error = match renewed {
                Ok(Ok(Ok(()))) => {
                    held.keeper.renewed(number, instants());
                    if failures > 0 {
                        tracing::info!(volume = %hold.name, "its lease is renewed again");
                    }
                    failures = 0;
                    let grant = held.keeper.grant();
                    drop(held);
                    if let (Some(grant), Some(place)) = (grant, hold.place()) {
                        with_volume(&place, move |volume| volume.grant(grant, instants())).await;
                    }
                    continue;
                }
                Ok(Ok(Err(why))) => {
                    held.keeper.lose();
                    drop(held);
                    return self.lost(&hold, why).await;
                }
                Ok(Err(error)) => error.to_string(),
                Err(_) => format!("the store did not answer within {limit:?}"),
            };
            held.keeper.failed(number, instants());
            failures += 1;
            if failures.is_power_of_two() {
                tracing::warn!(volume = %hold.name, "cannot renew its lease, will retry: {error}");
            }
        }
    }

    /// Renews once. An inner error is the reason why the volume is not ours any more.
    async fn renew(&self, hold: &Hold, held: &mut Held) -> Result<Result<(), String>, LeaseError> {
        let stats = match hold.place() {
            Some(place) => with_volume(&place, |volume| volume.stats()).await,
            None => None,
        };
        let lost = held.renew(self.store.as_ref(), stats.as_ref().map(unsent), wall_ms()).await?;
        Ok(lost.map_or(Ok(()), |lost| Err(why_lost(&hold.name, lost))))
    }

    /// Whose lease stands there now, if it is not ours.
    async fn who_took(&self, hold: &Hold) -> Option<String> {
        let found = lease::load(self.store.as_ref(), &hold.name).await.ok()??.0;
        let ours = hold.lease.lock().await.lease.claim;
        (found.claim != ours).then(|| taken_by(&hold.name, &found))
    }

    async fn lost(self: &Arc<Self>, hold: &Arc<Hold>, why: String) {
        hold.lease.lock().await.keeper.lose();
        hold.stop();
        let why = format!("{why}; this host refuses all I/O on it, and keeps what the bucket does not have");
        if let Some(place) = hold.place() {
            let reason = why.clone();
            with_volume(&place, move |volume| volume.fence(&reason)).await;
            self.set_fenced(&hold.name, place, why);
        }
        self.clone().look_for_stranded(&hold.name).await;
    }
}

/// What a lease says of a volume.
fn unsent(stats: &VolumeStats) -> Unsent {
    Unsent { bucket_lsn: stats.destaged_lsn, last_lsn: stats.accepted_lsn, dirty_bytes: stats.dirty_bytes }
}

fn why_lost(name: &str, lost: Lost) -> String {
    match lost {
        Lost::Taken(lease) => taken_by(name, &lease),
        Lost::Deleted => format!("volume {name:?} was deleted"),
        Lost::Epoch { ours, theirs, opened_ms } => {
            format!("another host took volume {name:?} over at {} (epoch {theirs}, ours is {ours})", date(opened_ms))
        }
    }
}

fn taken_by(name: &str, lease: &Lease) -> String {
    format!("{} took volume {name:?} over at {}", holder(lease), date(lease.since_ms))
}

/// What the host of `lease` may hold that the bucket does not have, which ends at `bucket_lsn`.
pub(super) fn may_hold(lease: &Lease, bucket_lsn: Option<u64>, now: Instants) -> String {
    let ago = Duration::from_millis(now.wall_ms.saturating_sub(lease.renewed_ms));
    let known = bucket_lsn.unwrap_or(0).max(lease.bucket_lsn);
    let what = if lease.last_lsn > known {
        format!("up to {} in writes {} to {}", crate::config::ByteSize(lease.dirty_bytes), known + 1, lease.last_lsn)
    } else {
        "nothing it knew of".to_owned()
    };
    format!(
        "{} may hold, in its log only: {what}, as of {:.0?} ago, and whatever it acknowledged after that",
        holder(lease),
        Duration::from_secs(ago.as_secs())
    )
}
