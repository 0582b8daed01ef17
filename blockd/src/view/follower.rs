//! Following a volume's owner: a state in the bucket that moves on as chunks and checkpoints appear there.
//!
//! A follower owns nothing and changes nothing. It applies the headers of new chunks to its table, one after the other, and
//! begins anew with each checkpoint that the manifest names: that one knows what compaction moved, and what the old table
//! refers to is deleted some time after (`delete-grace`, which must be longer than a follower takes to come by).
//!
//! What it shows is always a prefix of the history. It never goes back, except to a snapshot the volume was restored to.

use std::sync::Arc;

use super::sight::{Sight, SightOptions};
use crate::cache::FrameCache;
use crate::checkpoint::CheckpointName;
use crate::chunk::{ChunkKind, ChunkName, ReadError, read_index};
use crate::crypt::Keys;
use crate::manifest::{self, Manifest, Restored, VolumeState};
use crate::store::ObjectStore;
use crate::table::{Applied, TableHome};
use crate::types::VolumeId;
use crate::volume::{Blocking, OpenError};

/// Headers applied before the manifest is looked at again.
const HEADERS_MAX: usize = 1000;

/// What a volume is followed with.
pub struct FollowOptions {
    /// The bucket.
    pub store: Arc<dyn ObjectStore>,
    /// The volume's name.
    pub name: String,
    /// Where the `n`th table goes; nobody else may use it.
    pub home: Box<dyn Fn(u64) -> TableHome + Send + Sync>,
    /// Another home on the same disk, whose files need not be fetched.
    pub donor: Option<TableHome>,
    /// The frame cache, if any.
    pub frame_cache: Option<FrameCache>,
    /// Where heavy work runs.
    pub blocking: Blocking,
    /// The volume's keys, if it is encrypted.
    pub keys: Option<Keys>,
}

/// How far a follower is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reached {
    /// Newest chunk.
    pub seq: u64,
    /// Newest LSN.
    pub lsn: u64,
    /// When its newest chunk was cut, Unix milliseconds by the owner's clock; 0 where nothing says.
    pub written_ms: u64,
}

/// What a look at the bucket came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refreshed {
    /// Nothing new.
    Same,
    /// The table that is shown has moved on.
    Moved,
    /// There is a new table to show ([`Follower::sight`]).
    Replaced,
}

/// See the [module](self).
pub struct Follower {
    options: FollowOptions,
    volume: VolumeId,
    /// What the table was made of.
    base: Option<CheckpointName>,
    restores: Vec<Restored>,
    tables: u64,
    sight: Sight,
    size: u64,
    /// When the newest chunk was cut.
    written_ms: u64,
}

impl Follower {
    /// Begins with the newest checkpoint and what follows it.
    ///
    /// # Errors
    /// There is no such volume, or it cannot be read.
    pub async fn open(options: FollowOptions) -> Result<Self, OpenError> {
        let manifest = load(&options).await?;
        let sight = Self::fetch(&options, &manifest, 0, options.donor.clone()).await?;
        let mut follower = Self {
            volume: manifest.id,
            base: manifest.checkpoint.map(|pointer| pointer.object),
            restores: manifest.restores.clone(),
            tables: 1,
            size: manifest.size,
            written_ms: made_ms(&manifest),
            sight,
            options,
        };
        follower.catch_up(&manifest).await?;
        Ok(follower)
    }

    /// What is shown.
    pub fn sight(&self) -> &Sight {
        &self.sight
    }

    /// The volume's size in bytes, as of the last look.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Tables begun so far; the newest is number [`Follower::tables`] - 1, which need not be the one shown.
    pub fn tables(&self) -> u64 {
        self.tables
    }

    /// How far it is.
    pub fn reached(&self) -> Reached {
        let Applied { seq, lsn } = self.sight.table().applied();
        Reached { seq, lsn, written_ms: self.written_ms }
    }

    /// Looks what is new in the bucket.
    ///
    /// # Errors
    /// What was shown before can still be shown, as long as its chunks are there. [`OpenError::is_transient`] tells
    /// whether another look may do better.
    pub async fn refresh(&mut self) -> Result<Refreshed, OpenError> {
        let manifest = load(&self.options).await?;
        if manifest.id != self.volume {
            return Err(OpenError::manifest(&self.options.name, manifest::ManifestError::NotFound(manifest.name)));
        }
        self.size = manifest.size;
        let base = manifest.checkpoint.map(|pointer| pointer.object);
        if (base, &manifest.restores) == (self.base, &self.restores) {
            let moved = self.catch_up(&manifest).await?;
            return Ok(if moved > 0 { Refreshed::Moved } else { Refreshed::Same });
        }
        let before = (self.sight.clone(), self.written_ms);
        let shown = self.reached();
        self.sight = Self::fetch(&self.options, &manifest, self.tables, None).await?;
        self.tables += 1;
        self.written_ms = made_ms(&manifest);
        let caught_up = self.catch_up(&manifest).await;
        // A table that is not as far as the one shown would show old content once more, unless that is what was asked for.
        let goes_back = manifest.restores == self.restores && self.reached().seq < shown.seq;
        if caught_up.is_err() || goes_back {
            (self.sight, self.written_ms) = before;
            return caught_up.map(|_| Refreshed::Same);
        }
        (self.base, self.restores) = (base, manifest.restores);
        Ok(Refreshed::Replaced)
    }

    async fn fetch(
        options: &FollowOptions,
        manifest: &Manifest,
        number: u64,
        donor: Option<TableHome>,
    ) -> Result<Sight, OpenError> {
        // The table before has most of the files.
        let donor = donor.or_else(|| number.checked_sub(1).map(|before| (options.home)(before)));
        Sight::open(SightOptions {
            store: options.store.clone(),
            volume: manifest.id,
            checkpoint: manifest.checkpoint,
            home: (options.home)(number),
            donor,
            frame_cache: options.frame_cache.clone(),
            blocking: options.blocking,
            keys: options.keys.clone(),
        })
        .await
    }

    /// Applies the chunks that are there; how many.
    async fn catch_up(&mut self, manifest: &Manifest) -> Result<usize, OpenError> {
        for done in 0..HEADERS_MAX {
            let seq = self.sight.table().applied().seq + 1;
            let epoch = manifest.epoch_of(seq);
            if epoch == 0 {
                return Ok(done);
            }
            let name = ChunkName { volume: manifest.id, epoch, seq };
            let index = match read_index(self.options.store.as_ref(), &name, self.options.keys.as_ref()).await {
                Ok(index) if index.kind == ChunkKind::Data => index,
                // Its owner was replaced: the next look finds the epoch that goes on here.
                Ok(_) | Err(ReadError::Missing { .. }) => return Ok(done),
                Err(error) => return Err(error.into()),
            };
            let written_ms = index.created_ms;
            let table = self.sight.table().clone();
            self.options.blocking.run(move || table.apply(&index)).await?;
            self.written_ms = written_ms;
        }
        Ok(HEADERS_MAX)
    }
}

/// When the checkpoint a table begins with was made.
fn made_ms(manifest: &Manifest) -> u64 {
    manifest.checkpoint.map_or(0, |pointer| pointer.made_ms)
}

async fn load(options: &FollowOptions) -> Result<Manifest, OpenError> {
    let found = manifest::open(options.store.as_ref(), &options.name, options.keys.as_ref()).await;
    let (manifest, _) = found.map_err(|e| OpenError::manifest(&options.name, e))?;
    if manifest.state != VolumeState::Active {
        return Err(OpenError::Deleting(options.name.clone()));
    }
    Ok(manifest)
}
