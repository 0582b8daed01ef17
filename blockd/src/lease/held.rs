//! A lease that is held: the object as it stands, and how it is renewed.

use super::acquire::Acquired;
use super::format::{Lease, LeaseState};
use super::keeper::{Keeper, Terms};
use super::stored::{LeaseError, Renewal, put_over, renew};
use crate::manifest::{self, ManifestError, VolumeState};
use crate::store::{ObjectStore, Version};
use crate::types::Lsn;

/// What the owner has not sent to the bucket yet; each renewal says it anew.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unsent {
    /// Last LSN in the bucket.
    pub bucket_lsn: Lsn,
    /// Last LSN accepted.
    pub last_lsn: Lsn,
    /// Payload bytes accepted and not in the bucket.
    pub dirty_bytes: u64,
}

/// Why a volume is not this owner's any more.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lost {
    /// Somebody else's lease stands there.
    Taken(Box<Lease>),
    /// The manifest has a newer epoch.
    Epoch {
        /// This owner's.
        ours: u64,
        /// The newer one.
        theirs: u64,
        /// When that was claimed, Unix milliseconds.
        opened_ms: u64,
    },
    /// The volume is gone.
    Deleted,
}

/// See the module.
#[derive(Debug)]
pub struct Held {
    name: String,
    /// As it stands, as far as the owner knows.
    pub lease: Lease,
    version: Version,
    /// Of the last attempt to write it. One that was given up may stand there all the same, and whoever watches must see
    /// that another came after it: so no two have the same.
    counter: u64,
    /// When to renew, and until when to serve.
    pub keeper: Keeper,
}

impl Held {
    /// The lease of the volume `name`, taken just now.
    pub fn new(name: &str, acquired: Acquired) -> Self {
        let Acquired { lease, version, sent, .. } = acquired;
        let keeper = Keeper::new(Terms { duration_ms: lease.duration_ms }, sent);
        Self { name: name.to_owned(), counter: lease.counter, lease, version, keeper }
    }

    /// The lease as it is to stand after a renewal sent now.
    fn next(&mut self, unsent: Option<Unsent>, wall_ms: u64) -> Lease {
        self.counter += 1;
        let mut next = Lease { counter: self.counter, ..self.lease.clone() };
        next.renewed_ms = wall_ms;
        if let Some(unsent) = unsent {
            (next.bucket_lsn, next.last_lsn) = (unsent.bucket_lsn, unsent.last_lsn);
            next.dirty_bytes = unsent.dirty_bytes;
        }
        next
    }

    /// Renews once; the keeper is to be told what came of it. Says why the volume is lost, if it is.
    ///
    /// # Errors
    /// The store failed; whether the lease was renewed is not known.
    pub async fn renew(
        &mut self,
        store: &dyn ObjectStore,
        unsent: Option<Unsent>,
        wall_ms: u64,
    ) -> Result<Option<Lost>, LeaseError> {
        let next = self.next(unsent, wall_ms);
        let version = match renew(store, &self.name, &next, &self.version).await? {
            Renewal::Kept(version) => version,
            Renewal::Lost(found) => return Ok(Some(Lost::Taken(found))),
            Renewal::Gone => {
                if let Some(lost) = self.epoch_lost(store).await? {
                    return Ok(Some(lost));
                }
                // Somebody deleted it by mistake; the manifest says that nobody took its place.
                put_over(store, &self.name, &next, None).await?.ok_or(LeaseError::Raced)?
            }
        };
        (self.lease, self.version) = (next, version);
        // While it had run out others may have come and gone.
        if self.keeper.lapsed() { self.epoch_lost(store).await } else { Ok(None) }
    }

    /// Writes it once more before the owner goes. `false` when it is somebody else's by now.
    ///
    /// # Errors
    /// As [`Held::renew`].
    pub async fn write_last(
        &mut self,
        store: &dyn ObjectStore,
        state: LeaseState,
        unsent: Option<Unsent>,
        wall_ms: u64,
    ) -> Result<bool, LeaseError> {
        if self.keeper.is_lost() {
            return Ok(false);
        }
        let next = Lease { state, ..self.next(unsent, wall_ms) };
        match renew(store, &self.name, &next, &self.version).await? {
            Renewal::Kept(version) => {
                (self.lease, self.version) = (next, version);
                Ok(true)
            }
            Renewal::Lost(_) | Renewal::Gone => Ok(false),
        }
    }

    /// Why the manifest says that the volume is not ours any more, if it does.
    async fn epoch_lost(&self, store: &dyn ObjectStore) -> Result<Option<Lost>, LeaseError> {
        let ours = self.lease.epoch;
        match manifest::load(store, &self.name).await {
            Ok((found, _)) if found.id != self.lease.volume || found.state != VolumeState::Active => {
                Ok(Some(Lost::Deleted))
            }
            Ok((found, _)) => Ok(match found.epochs.last() {
                Some(last) if ours > 0 && last.epoch > ours => {
                    Some(Lost::Epoch { ours, theirs: last.epoch, opened_ms: last.opened_ms })
                }
                _ => None,
            }),
            Err(ManifestError::NotFound(_)) => Ok(Some(Lost::Deleted)),
            Err(ManifestError::Store(error)) => Err(error.into()),
            Err(error) => {
                tracing::warn!(volume = %self.name, "{error}");
                Ok(None)
            }
        }
    }
}
