//! The table that a clone begins with: that of the snapshot it was made of.
//!
//! It is a checkpoint of the origin's, or one that the origin itself began with. Where that is lost it is made of the
//! headers of the origin's chunks up to the snapshot, which are all there as long as the origin holds for the clone; and
//! where the origin is a clone that wrote little, of what that began with, and so on.

use futures::FutureExt;
use futures::future::BoxFuture;

use super::catch_up::{Holes, checkpoint_error};
use super::job::Blocking;
use super::open::OpenError;
use crate::checkpoint::{CheckpointError, rebuild, restore};
use crate::chunk::relocated_base;
use crate::crypt::Keys;
use crate::manifest::{self, Manifest, ManifestError, Origin, Restored, VolumeState};
use crate::store::ObjectStore;
use crate::table::{Applied, Position, Table, TableError, TableHome};
use crate::types::VolumeId;

/// What it takes.
pub(crate) struct Beginning<'a> {
    /// The bucket.
    pub store: &'a dyn ObjectStore,
    /// Where the table goes; it must not be open.
    pub home: &'a TableHome,
    /// Where heavy work runs.
    pub blocking: Blocking,
    /// Keys of the clone, which are its origin's as well.
    pub keys: Option<&'a Keys>,
    /// Hears of checkpoints that are lost.
    pub lost: &'a (dyn Fn(&CheckpointError) + Send + Sync),
}

impl Beginning<'_> {
    /// The table of `clone` before any chunk of its own.
    pub fn table<'a>(&'a self, origin: &'a Origin, clone: VolumeId) -> BoxFuture<'a, Result<Table, OpenError>> {
        async move {
            let Some(pointer) = &origin.checkpoint else { return self.blank(clone).await };
            let lost = match restore::restore(self.store, self.home, clone, pointer, self.blocking, self.keys).await {
                Ok(restored) => return Ok(restored.table),
                Err(error) if error.is_damage() => error,
                Err(error) => return Err(checkpoint_error(error)),
            };
            (self.lost)(&lost);
            let Some(mut source) = self.manifest_of(origin).await? else { return Err(checkpoint_error(lost)) };
            let table = match &source.origin {
                Some(older) => self.table(older, source.id).await?,
                None => self.blank(source.id).await?,
            };
            // As it was then: without what the origin went back to since, and without what compaction moved since, whose
            // numbers may be the clone's own.
            let then = Position::from(pointer);
            let before = |r: &Restored| Position { seq: r.from_seq, relocated: relocated_base(r.epoch) };
            source.restores.retain(|restored| before(restored) < then);
            let mut listed = rebuild::list_chunks(self.store, source.id, |_, _| {}).await?;
            listed.retain(|chunk| !chunk.name.is_relocated() || chunk.name.seq <= then.relocated);
            let history = rebuild::history(&source, &listed, origin.seq);
            let history = rebuild::History { least: then.relocated, ..history };
            if !history.holes.is_empty() {
                tracing::warn!(
                    volume = %source.name,
                    "chunks {} are not there; each was deleted when nothing referred to it any more, or is lost: from \
                     headers alone that cannot be told",
                    Holes(history.holes.clone())
                );
            }
            let upto = Applied { seq: origin.seq, lsn: origin.lsn };
            let fill =
                rebuild::fill::<OpenError>(self.store, self.keys, &history, &table, upto, |_| true, || ()).boxed();
            fill.await?;
            let mut table = table;
            Ok(self.blocking.run(move || table.become_clone(clone).map(|()| table)).await?)
        }
        .boxed()
    }

    async fn blank(&self, volume: VolumeId) -> Result<Table, OpenError> {
        let home = self.home.clone();
        let made = self.blocking.run(move || {
            home.discard().map_err(TableError::Files)?;
            home.open(volume)
        });
        Ok(made.await?)
    }

    /// The manifest of what a clone was made of, under its name or where it is kept for its clones.
    async fn manifest_of(&self, origin: &Origin) -> Result<Option<Manifest>, OpenError> {
        let error = |e| OpenError::manifest(&origin.name, e);
        match manifest::load(self.store, &origin.name).await {
            Ok((found, _)) if found.id == origin.volume && found.state == VolumeState::Active => {
                return Ok(Some(manifest::open(self.store, &origin.name, self.keys).await.map_err(error)?.0));
            }
            // Nothing of that is signed any more; what counts, the headers, is.
            Ok((found, _)) if found.id == origin.volume => return Ok(Some(found)),
            Ok(_) | Err(ManifestError::NotFound(_)) => {}
            Err(e) => return Err(error(e)),
        }
        let held = manifest::load_held(self.store, origin.volume).await.map_err(error)?;
        Ok(held.map(|(found, _)| found))
    }
}
