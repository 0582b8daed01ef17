//! Taking a lease.

use std::time::Duration;

use super::format::{Lease, LeaseState};
use super::judge::{Judge, Sighting, Verdict};
use super::keeper::Instants;
use super::stored::{LeaseError, load, put_over};
use crate::store::{ObjectStore, Version};

/// Why a lease was not taken.
#[derive(Debug, thiserror::Error)]
pub enum AcquireError {
    /// Another host holds it.
    #[error("another host holds the lease")]
    Held {
        /// What it says.
        lease: Box<Lease>,
        /// Since when it has not changed.
        seen: Sighting,
        /// When it would expire, in milliseconds from now, unless it is renewed.
        left_ms: u64,
    },
    /// It could not be read or written.
    #[error(transparent)]
    Lease(#[from] LeaseError),
}

/// A lease taken.
#[derive(Debug)]
pub struct Acquired {
    /// As it stands.
    pub lease: Lease,
    /// Its version.
    pub version: Version,
    /// When the request was sent.
    pub sent: Instants,
    /// The lease before, if there was one.
    pub before: Option<Lease>,
    /// What was thought of it.
    pub verdict: Verdict,
}

/// Takes the lease of the volume `name` as `wanted` says (epoch, counter and times are filled in). One that looks
/// expired is watched first, unless `seen` shows that it was; a held one is refused, unless `force`.
pub async fn acquire(
    store: &dyn ObjectStore,
    name: &str,
    wanted: Lease,
    seen: Option<Sighting>,
    force: bool,
    clock: &(dyn Fn() -> Instants + Sync),
) -> Result<Acquired, AcquireError> {
    let judge = Judge { host: wanted.host, volume: wanted.volume };
    let mut seen = seen;
    loop {
        let found = load(store, name).await?;
        let now = clock();
        let verdict = match &found {
            None => Verdict::Free,
            Some((lease, _)) => {
                let sighting = Sighting::update(seen, lease, now);
                seen = Some(sighting);
                match judge.judge(lease, sighting, now) {
                    Verdict::Watch(ms) if !force => {
                        tracing::info!(
                            volume = %name, holder = %lease.host_name,
                            "its lease looks expired; watching it for {ms} ms before it is taken"
                        );
                        tokio::time::sleep(Duration::from_millis(ms)).await;
                        continue;
                    }
                    Verdict::Held(left_ms) if !force => {
                        return Err(AcquireError::Held { lease: Box::new(lease.clone()), seen: sighting, left_ms });
                    }
                    verdict => verdict,
                }
            }
        };
        let (before, version) = found.unzip();
        let sent = clock();
        let lease = Lease {
            state: LeaseState::Held,
            epoch: 0,
            counter: before.as_ref().map_or(0, |lease| lease.counter) + 1,
            since_ms: sent.wall_ms,
            renewed_ms: sent.wall_ms,
            ..wanted.clone()
        };
        // Somebody came between: judge anew.
        if let Some(version) = put_over(store, name, &lease, version).await? {
            let before = before.filter(|before| before.volume == wanted.volume);
            return Ok(Acquired { lease, version, sent, before, verdict });
        }
    }
}
