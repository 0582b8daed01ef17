//! Clones: a new volume that begins as a snapshot of another and stores only what becomes different.
//!
//! Order: the hold in the origin's manifest, then the clone's manifest, then a look whether the hold is still there. Its own
//! epochs, chunks and relocated chunks are numbered from where the origin's were on, so that no two chunks in its table
//! have one number.

use super::holds;
use super::open::OpenError;
use crate::crypt::Keys;
use crate::manifest::{self, Encryption, EpochStart, Hold, Manifest, ManifestError, Snapshot, VolumeState};
use crate::store::ObjectStore;
use crate::types::VolumeId;

/// A clone to be made.
pub struct CloneOrder<'a> {
    /// The volume it is made of.
    pub source: &'a str,
    /// The snapshot of it. Without a name the hidden one that holds for the clone already.
    pub snapshot: Option<&'a str>,
    /// Its name.
    pub name: &'a str,
    /// Its identity, unless an earlier attempt has settled that.
    pub id: VolumeId,
    /// The wall clock, in milliseconds.
    pub now_ms: u64,
    /// Keys of the source, if it is encrypted.
    pub keys: Option<&'a Keys>,
}

/// A clone whose origin holds for it already, and whose manifest is not there yet.
#[derive(Debug)]
pub struct CloneBegun {
    source: Manifest,
    snapshot: Snapshot,
    /// Its identity.
    pub id: VolumeId,
}

/// Enters the hold for a clone in the manifest of its origin.
///
/// # Errors
/// There is no hold, or it is found to be of nobody when the snapshot is deleted.
pub async fn begin_clone(store: &dyn ObjectStore, order: &CloneOrder<'_>) -> Result<CloneBegun, OpenError> {
    match manifest::load(store, order.name).await {
        Err(ManifestError::NotFound(_)) => {}
        Ok(_) => return Err(OpenError::manifest(order.name, ManifestError::Exists(order.name.to_owned()))),
        Err(e) => return Err(OpenError::manifest(order.name, e)),
    }
    let mut found: Option<(Snapshot, VolumeId)> = None;
    let source = manifest::change(store, order.source, order.keys, |manifest| {
        if manifest.state != VolumeState::Active {
            return Err(ManifestError::Deleting(order.source.to_owned()));
        }
        let wanted = |snapshot: &&mut Snapshot| match order.snapshot {
            Some(name) => !snapshot.hidden && snapshot.name == name,
            None => snapshot.holds.iter().any(|hold| hold.volume == order.id),
        };
        let snapshot = manifest.snapshots.iter_mut().find(wanted).ok_or_else(|| ManifestError::NoSnapshot {
            volume: order.source.to_owned(),
            snapshot: order.snapshot.unwrap_or(order.name).to_owned(),
        })?;
        // An earlier attempt that was interrupted is gone on with.
        let id = match snapshot.holds.iter().find(|hold| hold.name == order.name) {
            Some(hold) => hold.volume,
            None => {
                snapshot.holds.push(Hold { volume: order.id, name: order.name.to_owned() });
                order.id
            }
        };
        found = Some((snapshot.clone(), id));
        Ok(())
    });
    let source = source.await.map_err(|e| OpenError::manifest(order.source, e))?;
    let (snapshot, id) = found.expect("a change that succeeded was applied");
    Ok(CloneBegun { source, snapshot, id })
}

/// Makes the manifest of a clone; `encryption` is the data key of its origin, wrapped for it.
///
/// # Errors
/// There is no clone; done again from the beginning, the same finishes what was begun.
pub async fn finish_clone(
    store: &dyn ObjectStore,
    order: &CloneOrder<'_>,
    begun: &CloneBegun,
    encryption: Option<Encryption>,
) -> Result<Manifest, OpenError> {
    let CloneBegun { source, snapshot, id } = begun;
    let made = make(store, order, source, snapshot, (*id, encryption)).await;
    if made.is_err() {
        give_up_clone(store, order, begun).await;
    }
    made
}

/// Lets go of what [`begin_clone`] took. If that fails, deleting the snapshot finds that it is nobody's.
pub async fn give_up_clone(store: &dyn ObjectStore, order: &CloneOrder<'_>, begun: &CloneBegun) {
    let CloneBegun { source, snapshot, id } = begun;
    if let Err(error) = holds::release_stale(store, source, &only(snapshot, *id, order.name), order.keys).await {
        tracing::debug!("what a clone that failed held is not let go yet: {error}");
    }
}

async fn make(
    store: &dyn ObjectStore,
    order: &CloneOrder<'_>,
    source: &Manifest,
    snapshot: &Snapshot,
    (id, encryption): (VolumeId, Option<Encryption>),
) -> Result<Manifest, OpenError> {
    let error = |e| OpenError::manifest(order.name, e);
    let origin = holds::origin_of(source, snapshot);
    // Nobody's epoch, which wrote nothing: it says where the clone's own history begins.
    let before = EpochStart {
        epoch: origin.epoch.max(1),
        first_seq: snapshot.seq + 1,
        first_lsn: snapshot.lsn + 1,
        owner: [0; 16],
        opened_ms: order.now_ms,
    };
    let mut clone = Manifest {
        durability: source.durability,
        codec: source.codec,
        chunk_bytes: source.chunk_bytes,
        created_ms: order.now_ms,
        epochs: vec![before],
        checkpoint: snapshot.checkpoint,
        origin: Some(origin.clone()),
        ..Manifest::new(id, order.name, snapshot.size)
    };
    if let (Some(encryption), Some(keys)) = (encryption, order.keys) {
        clone.encrypt(keys, encryption);
    }
    manifest::create(store, &clone).await.map_err(error)?;
    // Somebody may have taken the hold for stale in the meantime.
    if holds::is_held(store, &origin, id).await? {
        return Ok(clone);
    }
    match super::delete(store, order.name, before.epoch, order.keys, |_, _| {}).await {
        // Whoever took it for stale may have deleted this as well.
        Ok(_) | Err(OpenError::Manifest { source: ManifestError::NotFound(_), .. }) => {}
        Err(e) => return Err(e),
    }
    Err(error(ManifestError::NoSnapshot { volume: order.source.to_owned(), snapshot: snapshot.name.clone() }))
}

/// The snapshot with no hold but one.
fn only(snapshot: &Snapshot, volume: VolumeId, name: &str) -> Snapshot {
    Snapshot { holds: vec![Hold { volume, name: name.to_owned() }], ..snapshot.clone() }
}
