//! Ownership: who may add chunks to a volume, settled in its manifest.
//!
//! Opening claims the next epoch by compare-and-swap, ends the previous epoch by a *seal* object in place of its first
//! missing chunk, and settles the claim with the place where the new epoch begins. A seal is put with "create only", so
//! either the chunk was there first and counts, or the seal was and a late chunk of an old owner can no longer appear.
//! Chunks outside the recorded prefix are never looked at.

use std::collections::BTreeMap;

use futures::{FutureExt, StreamExt, TryStreamExt, stream};

use crate::checkpoint::rebuild::READ_AHEAD;
use crate::chunk::{ChunkIndex, ChunkKind, ChunkName, ReadError, encode_seal, read_index};
use crate::crypt::Keys;
use crate::manifest::{self, EpochStart, Manifest, ManifestError, VolumeState};
use crate::store::{ObjectStore, PutMode, StoreErrorKind};
use crate::table::Applied;
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
    /// When its last chunk was cut, Unix time in milliseconds; 0 where that is not known.
    pub written_ms: u64,
}

/// A claim on a volume.
#[derive(Debug)]
pub struct Claim {
    /// The manifest as it stands now, its last epoch being ours.
    pub manifest: Manifest,
    /// What the bucket holds.
    pub state: BucketState,
    /// Last epoch before ours, if there was one.
    pub previous: Option<EpochStart>,
    /// Headers of the newest chunks, by seq, as far as they were read on the way.
    pub headers: BTreeMap<u64, ChunkIndex>,
}

/// Headers kept for later; 110 KiB each after random writes.
const HEADERS_MAX: usize = 256;

/// Milliseconds since 1970.
pub fn wall_ms() -> u64 {
    crate::reactor::wall_ms()
}

/// Who claims, and when.
#[derive(Clone, Copy, Debug)]
pub struct Claimant {
    /// Identity of its host.
    pub owner: [u8; 16],
    /// The last epoch as the claimant knows it: if another host has claimed one since, the volume is that one's.
    pub expected: Option<u64>,
    /// The wall clock, in milliseconds.
    pub now_ms: u64,
}

/// Claims the volume. `applied` is how far the local translation table or the checkpoint that the manifest
/// names is known to be right; probing starts after it.
pub async fn claim(
    store: &dyn ObjectStore,
    name: &str,
    claimant: Claimant,
    applied: Applied,
    keys: Option<&Keys>,
) -> Result<Claim, OpenError> {
    let Claimant { owner, expected, now_ms } = claimant;
    let manifest_error = |e| OpenError::manifest(name, e);
    let (seen, _) = manifest::open(store, name, keys).await.map_err(manifest_error)?;
    let last = seen.epochs.last().map_or(0, |e| e.epoch);
    if expected.is_some_and(|expected| expected != last) {
        return Err(manifest_error(ManifestError::NotOwner(name.to_owned())));
    }
    let previous = seen.settled().copied();
    let epoch = seen.epochs.last().map_or(1, |e| e.epoch + 1);
    let settled_at_once = if previous.is_none() { 1 } else { 0 };
    let claimed =
        EpochStart { epoch, first_seq: settled_at_once, first_lsn: settled_at_once, owner, opened_ms: now_ms };
    let claiming = manifest::change(store, name, keys, |manifest| {
        if manifest.state != VolumeState::Active {
            return Err(ManifestError::Deleting(name.to_owned()));
        }
        // The owner may change what it likes meanwhile, but who claims it must not do so at the same time as another.
        if manifest.epochs != seen.epochs && manifest.epochs.last() != Some(&claimed) {
            return Err(ManifestError::LostRace(name.to_owned()));
        }
        // Claims that were never settled wrote nothing: an owner adds chunks only after settling.
        manifest.epochs.retain(|e| e.first_seq > 0 && *e != claimed);
        manifest.epochs.push(claimed);
        Ok(())
    });
    let mut manifest = claiming.await.map_err(manifest_error)?;
    let Some(last) = previous else {
        // Nobody ever wrote: nothing to end.
        let state = BucketState { seq: 0, lsn: 0, written_ms: 0 };
        return Ok(Claim { manifest, state, previous: None, headers: BTreeMap::new() });
    };
    let mut headers = BTreeMap::new();
    let mut applied = applied;
    loop {
        let state = match end_epoch(store, &manifest, &last, (applied, now_ms), keys, &mut headers).await {
            Ok(state) => state,
            Err(error @ (OpenError::Hole { .. } | OpenError::Missing(_))) => {
                // Damage, unless the last owner, who does not know yet that it is replaced, has made a checkpoint since that covers
                // these chunks, and deleted them.
                let (now, _) = manifest::open(store, name, keys).await.map_err(manifest_error)?;
                let Some(pointer) = now.checkpoint.filter(|pointer| pointer.seq > applied.seq) else {
                    return Err(error);
                };
                applied = Applied { seq: pointer.seq, lsn: pointer.lsn };
                manifest.checkpoint = Some(pointer);
                continue;
            }
            Err(error) => return Err(error),
        };
        let mut overtaken = None;
        // Until this is settled the last owner goes on changing the manifest, and what it says there must not be lost.
        let settled = manifest::change(store, name, keys, |manifest| {
            if manifest.state != VolumeState::Active {
                return Err(ManifestError::Deleting(name.to_owned()));
            }
            // Chunks that a checkpoint covers may be deleted, and then look as if they had never come.
            overtaken = manifest.checkpoint.filter(|pointer| pointer.seq > state.seq);
            match manifest.epochs.last_mut() {
                Some(own) if (own.epoch, own.owner) == (epoch, owner) && overtaken.is_none() => {
                    (own.first_seq, own.first_lsn) = (state.seq + 1, state.lsn + 1);
                    Ok(())
                }
                _ => Err(ManifestError::LostRace(name.to_owned())),
            }
        });
        match (settled.await, overtaken) {
            (Err(ManifestError::LostRace(_)), Some(pointer)) => {
                applied = Applied { seq: pointer.seq, lsn: pointer.lsn };
                manifest.checkpoint = Some(pointer);
            }
            (settled, _) => {
                let manifest = settled.map_err(manifest_error)?;
                return Ok(Claim { manifest, state, previous: Some(last), headers });
            }
        }
    }
}

/// Finds the last chunk of `epoch` and seals the place after it.
async fn end_epoch(
    store: &dyn ObjectStore,
    manifest: &Manifest,
    epoch: &EpochStart,
    (applied, now_ms): (Applied, u64),
    keys: Option<&Keys>,
    headers: &mut BTreeMap<u64, ChunkIndex>,
) -> Result<BucketState, OpenError> {
    let chunk = |seq| ChunkName { volume: manifest.id, epoch: epoch.epoch, seq };
    let mut state = BucketState { seq: epoch.first_seq - 1, lsn: epoch.first_lsn - 1, written_ms: 0 };
    if applied.seq > state.seq {
        let found = data_chunk(store, chunk(applied.seq), keys).await?;
        // A chunk that a checkpoint covers may have been deleted since; none after it.
        if found.is_none() && manifest.checkpoint.is_none_or(|pointer| pointer.seq < applied.seq) {
            return Err(OpenError::Missing(chunk(applied.seq).key()));
        }
        let lsn = found.as_ref().map_or(applied.lsn, |index| index.last_lsn);
        state = BucketState { seq: applied.seq, lsn, written_ms: found.map_or(0, |index| index.created_ms) };
    }
    // Chunks looked for at once: more and more, as long as they are there.
    let mut ahead = 1;
    loop {
        let next = chunk(state.seq + 1);
        let probes = (next.seq..next.seq + ahead as u64).map(|seq| data_chunk(store, chunk(seq), keys).boxed());
        let mut probes = stream::iter(probes).buffered(ahead);
        let mut found = 0;
        while let Some(Some(index)) = probes.try_next().await? {
            let (seq, lsn, written_ms) = (index.name.seq, index.last_lsn, index.created_ms);
            state = BucketState { seq, lsn, written_ms };
            headers.insert(seq, index);
            if headers.len() > HEADERS_MAX {
                headers.pop_first();
            }
            found += 1;
        }
        if found == ahead {
            ahead = (2 * ahead).min(READ_AHEAD);
            continue;
        }
        drop(probes);
        if found > 0 {
            // What follows was looked at too early to tell.
            ahead = 1;
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
