//! Ownership: who may add chunks to a volume, settled in its manifest.
//!
//! Opening claims the next epoch by compare-and-swap, ends the previous epoch by a *seal* object in place of its first
//! missing chunk, and settles the claim with the place where the new epoch begins. A seal is put with "create only", so
//! either the chunk was there first and counts, or the seal was and a late chunk of an old owner can no longer appear.
//! Chunks outside the recorded prefix are never looked at.

use crate::chunk::{ChunkIndex, ChunkKind, ChunkName, ReadError, encode_seal, read_index};
use crate::crypt::Keys;
use crate::manifest::{self, EpochStart, Manifest, ManifestError, VolumeState};
use crate::store::{ObjectStore, PutMode, StoreErrorKind};
use crate::types::Lsn;

use super::destage::OBJECT_PUTS_MAX;
use super::open::OpenError;

/// The contiguous state of a volume in the bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BucketState {
    /// Last chunk.
    pub seq: u64,
    /// Last LSN.
    pub lsn: Lsn,
}

/// A claim on a volume.
#[derive(Debug)]
pub struct Claim {
    /// The manifest as it stands now, its last epoch being ours.
    pub manifest: Manifest,
    /// What the bucket holds.
    pub state: BucketState,
}

/// Milliseconds since 1970.
pub fn wall_ms() -> u64 {
    crate::reactor::wall_ms()
}

/// Claims the volume for `owner`. `applied` is the chunk up to which the local translation table is known to be
/// right; probing starts after it. `expected` is the last epoch as the caller knows it: if another host has claimed one
/// since, the volume is that one's.
pub async fn claim(
    store: &dyn ObjectStore,
    name: &str,
    owner: [u8; 16],
    applied: u64,
    expected: Option<u64>,
    now_ms: u64,
    keys: Option<&Keys>,
) -> Result<Claim, OpenError> {
    let (mut manifest, version) = manifest::open(store, name, keys).await.map_err(|e| OpenError::manifest(name, e))?;
    if manifest.state != VolumeState::Active {
        return Err(OpenError::Deleting(name.to_owned()));
    }
    let last = manifest.epochs.last().map_or(0, |e| e.epoch);
    if expected.is_some_and(|expected| expected != last) {
        return Err(OpenError::manifest(name, ManifestError::NotOwner(name.to_owned())));
    }
    let previous = manifest.epochs.iter().rev().find(|e| e.first_seq > 0).cloned();
    let epoch = manifest.epochs.last().map_or(1, |e| e.epoch + 1);
    let claimed = |first_seq, first_lsn| EpochStart { epoch, first_seq, first_lsn, owner, opened_ms: now_ms };
    let Some(last) = previous else {
        // Nobody ever wrote: nothing to end.
        manifest.epochs = vec![claimed(1, 1)];
        manifest::replace(store, &manifest, version).await.map_err(|e| OpenError::manifest(name, e))?;
        return Ok(Claim { manifest, state: BucketState { seq: 0, lsn: 0 } });
    };
    // Claims that were never settled wrote nothing: an owner adds chunks only after settling.
    manifest.epochs.retain(|e| e.first_seq > 0);
    manifest.epochs.push(claimed(0, 0));
    let version = manifest::replace(store, &manifest, version).await.map_err(|e| OpenError::manifest(name, e))?;
    let state = end_epoch(store, &manifest, &last, applied, now_ms, keys).await?;
    if let Some(own) = manifest.epochs.last_mut() {
        (own.first_seq, own.first_lsn) = (state.seq + 1, state.lsn + 1);
    }
    manifest::replace(store, &manifest, version).await.map_err(|e| OpenError::manifest(name, e))?;
    Ok(Claim { manifest, state })
}

/// Finds the last chunk of `epoch` and seals the place after it.
async fn end_epoch(
    store: &dyn ObjectStore,
    manifest: &Manifest,
    epoch: &EpochStart,
    applied: u64,
    now_ms: u64,
    keys: Option<&Keys>,
) -> Result<BucketState, OpenError> {
    let chunk = |seq| ChunkName { volume: manifest.id, epoch: epoch.epoch, seq };
    let mut state = BucketState { seq: epoch.first_seq - 1, lsn: epoch.first_lsn - 1 };
    if applied > state.seq {
        let index =
            data_chunk(store, chunk(applied), keys).await?.ok_or_else(|| OpenError::Missing(chunk(applied).key()))?;
        state = BucketState { seq: applied, lsn: index.last_lsn };
    }
    loop {
        let next = chunk(state.seq + 1);
        if let Some(index) = data_chunk(store, next, keys).await? {
            state = BucketState { seq: next.seq, lsn: index.last_lsn };
            continue;
        }
        let later = chunk(next.seq + OBJECT_PUTS_MAX as u64);
        // Chunks on their way are never this far apart, so one that was stored is gone; unless its owner still lives
        // and has stored both since, hence the order.
        if stands(store, later).await? && !stands(store, next).await? {
            return Err(OpenError::Hole { missing: next.key(), later: later.key() });
        }
        match store.put(&next.key(), encode_seal(next, now_ms, keys), PutMode::Create).await {
            Ok(_) => return Ok(state),
            // A chunk or a seal came first; look again.
            Err(e) if e.kind == StoreErrorKind::Precondition => {
                if is_sealed(store, next, keys).await? {
                    return Ok(state);
                }
            }
            Err(e) => return Err(OpenError::Store(e)),
        }
    }
}

/// Whether the object is there, whatever it holds.
pub(super) async fn stands(store: &dyn ObjectStore, name: ChunkName) -> Result<bool, OpenError> {
    match store.head(&name.key()).await {
        Ok(_) => Ok(true),
        Err(e) if e.kind == StoreErrorKind::NotFound => Ok(false),
        Err(e) => Err(OpenError::Store(e)),
    }
}

async fn is_sealed(store: &dyn ObjectStore, name: ChunkName, keys: Option<&Keys>) -> Result<bool, OpenError> {
    Ok(read_index(store, &name, keys).await?.kind == ChunkKind::Seal)
}

/// Header of a chunk; none when there is no such chunk, or a seal in its place.
pub(super) async fn data_chunk(
    store: &dyn ObjectStore,
    name: ChunkName,
    keys: Option<&Keys>,
) -> Result<Option<ChunkIndex>, OpenError> {
    match read_index(store, &name, keys).await {
        Ok(index) if index.kind == ChunkKind::Data => Ok(Some(index)),
        Ok(_) => Ok(None),
        Err(ReadError::Missing { .. }) => Ok(None),
        Err(e) => Err(e.into()),
    }
}
