//! Leases in the bucket.

use super::format::{Lease, LeaseFormatError};
use crate::manifest::check_name;
use crate::store::{ObjectStore, PutMode, StoreError, StoreErrorKind, Version};

/// A failure with a volume's lease.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The name cannot be one.
    #[error(transparent)]
    Name(#[from] crate::manifest::InvalidName),
    /// The object is not a lease.
    #[error("the lease of volume {name:?} is damaged: {source}")]
    Damaged {
        /// The volume.
        name: String,
        /// What is wrong with it.
        source: LeaseFormatError,
    },
    /// Somebody changed it at the same moment; look again.
    #[error("the lease was changed by somebody else meanwhile")]
    Raced,
    /// The store failed. After a failed write its outcome is unknown.
    #[error("cannot reach the lease of the volume: {0}")]
    Store(#[from] StoreError),
}

impl LeaseError {
    /// Whether the same may succeed later without anybody doing anything.
    pub fn is_transient(&self) -> bool {
        matches!(self, Self::Store(error) if error.is_transient())
    }
}

/// The object key of a volume's lease.
pub fn key(name: &str) -> String {
    format!("volumes/{name}/lease")
}

/// Reads the lease of the volume `name`; none when it was never held.
pub async fn load(store: &dyn ObjectStore, name: &str) -> Result<Option<(Lease, Version)>, LeaseError> {
    check_name(name)?;
    match store.get(&key(name)).await {
        Ok((bytes, version)) => match Lease::decode(&bytes) {
            Ok(lease) => Ok(Some((lease, version))),
            Err(source) => Err(LeaseError::Damaged { name: name.to_owned(), source }),
        },
        Err(error) if error.kind == StoreErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Writes a lease over the one read as `over`, or where there was none. `None` when it is no longer what it was.
pub async fn put_over(
    store: &dyn ObjectStore,
    name: &str,
    lease: &Lease,
    over: Option<Version>,
) -> Result<Option<Version>, LeaseError> {
    check_name(name)?;
    let (key, bytes) = (key(name), lease.encode());
    match store.put(&key, bytes.clone(), over.map_or(PutMode::Create, PutMode::Replace)).await {
        Ok(version) => return Ok(Some(version)),
        Err(error) if matches!(error.kind, StoreErrorKind::Precondition | StoreErrorKind::NotFound) => {}
        Err(error) => return Err(error.into()),
    }
    // An earlier attempt of this very write, whose answer was lost, may be what stands there now.
    match store.get(&key).await {
        Ok((found, version)) => Ok((found == bytes).then_some(version)),
        Err(error) if error.kind == StoreErrorKind::NotFound => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// What became of a renewal.
#[derive(Debug)]
pub enum Renewal {
    /// It stands.
    Kept(Version),
    /// Somebody else's lease stands there.
    Lost(Box<Lease>),
    /// There is none any more.
    Gone,
}

/// Renews one's own lease, last known as `version`, with `next`. An own renewal that landed late is written over.
pub async fn renew(
    store: &dyn ObjectStore,
    name: &str,
    next: &Lease,
    version: &Version,
) -> Result<Renewal, LeaseError> {
    let mut version = version.clone();
    loop {
        if let Some(version) = put_over(store, name, next, Some(version)).await? {
            return Ok(Renewal::Kept(version));
        }
        match load(store, name).await? {
            // An earlier renewal of ours, given up as failed. Each can come between only once.
            Some((found, theirs)) if found.claim == next.claim && found.volume == next.volume => version = theirs,
            Some((found, _)) => return Ok(Renewal::Lost(Box::new(found))),
            None => return Ok(Renewal::Gone),
        }
    }
}

/// Deletes the lease of a volume that is being deleted.
pub async fn remove(store: &dyn ObjectStore, name: &str) -> Result<(), LeaseError> {
    check_name(name)?;
    Ok(store.delete(&[key(name)]).await?)
}
