//! Going back to a snapshot.
//!
//! The history only grows: a restore is a place in it after which the state is that of an earlier place again. Order: a new
//! epoch ends the last one, which settles where the history is; the table of the snapshot is made the one that comes
//! after the present one ([`Table::go_on_from`]) and is sent; then one change of the manifest records the restore and
//! makes that table the newest checkpoint. Before it nothing has happened but that an epoch was claimed; after it whoever
//! opens the volume finds a checkpoint that is newer than any table there is.
//!
//! [`Table::go_on_from`]: crate::table::Table::go_on_from

use std::sync::Arc;

use super::catch_up::{CatchUp, Progress, checkpoint_error};
use super::compact::{Unswept, next_number};
use super::job::Blocking;
use super::open::{OpenError, read_log};
use super::own::{self, Claimant};
use crate::checkpoint::make::Ask;
use crate::checkpoint::{Keeper, restore};
use crate::crypt::Keys;
use crate::manifest::{self, Manifest, ManifestError, Restored};
use crate::store::ObjectStore;
use crate::table::TableHome;
use crate::wal::device::LogDevice;

/// What going back takes. The volume must not be open, and its lease held.
pub struct GoBack<'a> {
    /// The bucket.
    pub store: &'a dyn ObjectStore,
    /// The volume.
    pub name: &'a str,
    /// Its snapshot.
    pub snapshot: &'a str,
    /// Who does it, and when.
    pub claimant: Claimant,
    /// Where the volume's table is.
    pub home: &'a TableHome,
    /// Where the snapshot's table may be made.
    pub scratch: &'a TableHome,
    /// The volume's log, which must hold nothing that is not in the bucket.
    pub device: Arc<dyn LogDevice>,
    /// Where heavy work runs.
    pub blocking: Blocking,
    /// The volume's keys, if it is encrypted.
    pub keys: Option<&'a Keys>,
}

/// Makes the state of the volume that of its snapshot.
///
/// # Errors
/// Nothing has changed; or, when the store failed at the last step, the next opening tells.
pub async fn go_back(order: GoBack<'_>) -> Result<Manifest, OpenError> {
    let GoBack { store, name, claimant, blocking, keys, .. } = order;
    let error = |e| OpenError::manifest(name, e);
    let (seen, _) = manifest::open(store, name, keys).await.map_err(error)?;
    let no_snapshot = || error(ManifestError::NoSnapshot { volume: name.into(), snapshot: order.snapshot.into() });
    let snapshot = seen.snapshot(order.snapshot).cloned().ok_or_else(no_snapshot)?;
    let progress = Progress::default();
    let owner = claimant.owner;
    let catch_up = CatchUp { store, home: order.home, blocking, owner, rebuild: false, progress: &progress, keys };
    let (local, known) = catch_up.begin(&seen).await?;
    let mut claim = own::claim(store, name, claimant, known, keys).await?;
    let present = catch_up.finish(local, &mut claim).await?.table;
    let (id, end) = (claim.manifest.id, claim.state);
    let (device, lineage) = (order.device.clone(), claim.manifest.clone());
    let log = blocking.run(move || read_log(device.as_ref(), &lineage, owner, end.lsn));
    if log.await?.last_lsn > end.lsn {
        return Err(OpenError::Undestaged(name.to_owned()));
    }
    if end.seq == 0 {
        // Nothing was ever written.
        return Ok(claim.manifest);
    }
    let epoch = claim.manifest.epochs.last().map_or(0, |last| last.epoch);
    let (home, scratch) = (order.home.clone(), order.scratch.clone());
    if let Err(error) = blocking.run(move || scratch.borrow_files(&home)).await {
        tracing::debug!("cannot link table files: {error}");
    }
    let (table, made_of) = match &snapshot.checkpoint {
        Some(pointer) => {
            let restored = restore::restore(store, order.scratch, id, pointer, blocking, keys).await;
            let restored = restored.map_err(checkpoint_error)?;
            (restored.table, Some(restored.checkpoint))
        }
        None => {
            let scratch = order.scratch.clone();
            (blocking.run(move || scratch.open(id)).await?, None)
        }
    };
    let table = Arc::new(table);
    let copy = table.clone();
    let number = next_number(&present, epoch);
    let lineage = claim.manifest.clone();
    let frozen = blocking.run(move || {
        // As at any opening: the number that is used up now hides where those begin that the present table does not know.
        Unswept::new(&present, lineage.ended())?;
        copy.go_on_from(&present, number)?;
        copy.freeze()
    });
    let frozen = Arc::new(frozen.await?);
    let mut keeper = Keeper::new(name, id, epoch, snapshot.checkpoint, made_of, keys.cloned());
    let ask = Ask { store, table: &table, blocking, budget_bytes: None, now_ms: claimant.now_ms, stop: &|| false };
    let row = Restored { to_seq: snapshot.seq, to_epoch: snapshot.epoch, from_seq: end.seq, epoch };
    let record = |manifest: &mut Manifest| {
        manifest.size = snapshot.size;
        if manifest.restores.last() != Some(&row) {
            manifest.restores.push(row);
        }
    };
    keeper.publish(&ask, &frozen, &record).await.map_err(checkpoint_error)
}
