//! The other side: whether a host may take a lease.

use super::format::{Lease, LeaseState};
use super::keeper::{Instants, Terms};

/// What a host has seen of a lease that is not its own: since when it did not change.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sighting {
    claim: [u8; 16],
    counter: u64,
    /// First seen so, on the steady clock.
    since_ms: u64,
}

impl Sighting {
    /// After `lease` was read at `now`, having seen `before`.
    pub fn update(before: Option<Self>, lease: &Lease, now: Instants) -> Self {
        match before {
            Some(seen) if seen.claim == lease.claim && seen.counter == lease.counter => seen,
            _ => Self { claim: lease.claim, counter: lease.counter, since_ms: now.steady_ms },
        }
    }

    /// For how long it has not changed, as far as this host knows.
    pub fn unchanged_ms(&self, now: Instants) -> u64 {
        now.steady_ms.saturating_sub(self.since_ms)
    }
}

/// May it be taken?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nobody holds it: it was released, or is about a volume that is gone.
    Free,
    /// It is this host's own; the process that took it is gone, for the data directory is locked.
    Own,
    /// Its owner stopped serving: it looks expired and was not renewed while it was watched.
    Expired,
    /// It looks expired by the wall clock. Watch it for so many more milliseconds before believing that.
    Watch(u64),
    /// Its owner may be serving the volume, for so many more milliseconds unless it renews.
    Held(u64),
}

/// Who asks.
#[derive(Clone, Copy, Debug)]
pub struct Judge {
    /// Identity of this host.
    pub host: [u8; 16],
    /// The volume meant.
    pub volume: crate::types::VolumeId,
}

impl Judge {
    /// Judges `lease`, last read at `now` and first seen so at `seen`.
    ///
    /// No clock of another host is trusted: a stamp that looks old only shortens the wait, and counts only after the
    /// lease stood still for longer than a live owner lets it. A stamp from the future, by an owner whose clock was
    /// wrong, does not keep the volume for ever: a lease that stood still for its whole duration is expired.
    pub fn judge(&self, lease: &Lease, seen: Sighting, now: Instants) -> Verdict {
        if lease.state == LeaseState::Released || lease.volume != self.volume {
            return Verdict::Free;
        }
        if lease.host == self.host {
            return Verdict::Own;
        }
        let terms = Terms { duration_ms: lease.duration_ms };
        let full = lease.duration_ms.saturating_add(terms.skew_ms());
        let unchanged = seen.unchanged_ms(now);
        if unchanged >= full {
            return Verdict::Expired;
        }
        let end = lease.renewed_ms.saturating_add(full);
        if now.wall_ms < end {
            return Verdict::Held((end - now.wall_ms).min(full - unchanged));
        }
        match terms.watch_ms().saturating_sub(unchanged) {
            0 => Verdict::Expired,
            left => Verdict::Watch(left),
        }
    }
}
