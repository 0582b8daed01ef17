//! The grace period: after a restart only what was held before can be taken (RFC 8881 section 8.4.2).

use std::collections::BTreeSet;
use std::time::Instant;

use super::super::records::ClientRecords;

/// Whether others must still wait for those who held something before.
pub struct Grace {
    until: Option<Instant>,
    /// Who may reclaim, and has not said that it is done.
    waiting: BTreeSet<Vec<u8>>,
    /// Who may reclaim at all.
    known: BTreeSet<Vec<u8>>,
}

impl Grace {
    /// Begins, if anybody held something.
    pub fn new(known: BTreeSet<Vec<u8>>, until: Instant) -> Grace {
        Grace { until: (!known.is_empty()).then_some(until), waiting: known.clone(), known }
    }

    /// Whether it still lasts. When it is over, those who did not come are struck out first: what they held is given to others
    /// from now on.
    pub fn lasts(&mut self, now: Instant, records: &dyn ClientRecords) -> bool {
        let Some(until) = self.until else { return false };
        if now < until && !self.waiting.is_empty() {
            return true;
        }
        let missing = self.waiting.len();
        for owner in std::mem::take(&mut self.waiting) {
            if let Err(e) = records.remove(&owner) {
                tracing::error!("the record of an NFS client cannot be removed, the grace period goes on: {e}");
                self.waiting.insert(owner);
                return true;
            }
        }
        match missing {
            0 => tracing::info!("the grace period is over: all clients came back"),
            _ => tracing::warn!(
                missing,
                "the grace period is over, and clients did not come back: they lose what they held"
            ),
        }
        self.until = None;
        self.known.clear();
        false
    }

    /// Whether a client may take back what it held.
    pub fn may_reclaim(&self, owner: &[u8]) -> bool {
        self.until.is_some() && self.known.contains(owner)
    }

    /// A client has taken back everything, or is gone.
    pub fn done(&mut self, owner: &[u8]) {
        self.waiting.remove(owner);
    }
}
