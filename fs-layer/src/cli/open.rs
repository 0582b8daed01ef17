//! From flags to a disk, and from a disk to a tree.

use std::fs::{File, OpenOptions as FileOptions, TryLockError};
use std::io;
use std::path::Path;
use std::sync::{Arc, Weak};

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use blockd::config::ByteSize;
use clap::Args;
use serde::{Deserialize, Serialize};

use crate::admin::CountedTree;
use crate::config::{Place, Where};
use crate::disk::nbd::{NbdDisk, NbdOptions};
use crate::disk::{CountedDisk, Disk, FileDisk};
use crate::snapshots::{ShelfOptions, SnapshotSource, SnapshotTree, VolumeSnapshots};
use crate::vfs::{Filesystem, OpenOptions, Vfs};

/// What the disk is wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Access {
    /// To make a filesystem on it; a file that is not there is made with this size.
    Make(Option<ByteSize>),
    /// To read and write.
    Write,
    /// To read only.
    Read,
}

/// A disk, and what keeps it going.
pub(super) struct OpenedDisk {
    pub disk: Arc<CountedDisk>,
    /// For people.
    pub description: String,
    engine: Option<crate::disk::engine::Engine>,
    /// Where its snapshots come from, if it can have some.
    snapshots: Option<Arc<dyn SnapshotSource>>,
    /// Held to the end, so that the next fsd waits for us.
    lock: File,
}

impl OpenedDisk {
    /// Ends what keeps it going. Nobody may use the disk any more.
    pub(super) fn close(self) -> anyhow::Result<()> {
        drop(self.disk);
        let stopped = self.engine.map_or(Ok(()), crate::disk::engine::Engine::stop);
        drop(self.lock);
        stopped
    }
}

/// A tree, the disk under it, and what keeps that going.
pub(super) struct OpenedTree {
    disk: OpenedDisk,
    filesystem: Arc<Filesystem>,
    snapshots: Option<Arc<SnapshotTree<Filesystem>>>,
    tree: Arc<CountedTree>,
}

impl OpenedTree {
    /// Where the disk is.
    pub(super) fn description(&self) -> &str {
        &self.disk.description
    }

    /// The tree, counted.
    pub(super) fn tree(&self) -> Arc<dyn Vfs> {
        self.tree.clone()
    }

    pub(super) fn weak_tree(&self) -> Weak<CountedTree> {
        Arc::downgrade(&self.tree)
    }

    /// The tree's snapshots, if the disk can have some.
    pub(super) fn weak_snapshots(&self) -> Option<Weak<SnapshotTree<Filesystem>>> {
        self.snapshots.as_ref().map(Arc::downgrade)
    }

    pub(super) fn weak_disk(&self) -> Weak<CountedDisk> {
        Arc::downgrade(&self.disk.disk)
    }

    /// Writes everything home and ends. Nobody may use the tree any more.
    pub(super) fn close(self) -> anyhow::Result<()> {
        let OpenedTree { disk, filesystem, snapshots, tree } = self;
        drop(tree);
        if let Some(snapshots) = snapshots {
            snapshots.shelf().close();
        }
        let closed = filesystem.close().with_context(|| format!("cannot close the filesystem on {}", disk.description));
        drop(filesystem);
        disk.close()?;
        closed
    }
}

/// Settings of the tree itself.
#[derive(Args, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct TreeSettings {
    /// Memory for contents of files, read and not yet written
    #[arg(long, value_name = "SIZE", default_value = "512MiB", help_heading = "Memory")]
    page_cache: ByteSize,

    /// Memory for inodes, directories and maps of files
    #[arg(long, value_name = "SIZE", default_value = "256MiB", help_heading = "Memory")]
    block_cache: ByteSize,

    /// Do not note when files were read
    #[arg(long, help_heading = "The filesystem")]
    no_access_times: bool,
}

/// Opens the disk and the filesystem on it, after replaying its journal. `keeps_read`: what large reads bring is kept in memory here.
pub(super) fn tree(
    place: &Place,
    access: Access,
    settings: &TreeSettings,
    keeps_read: bool,
) -> anyhow::Result<OpenedTree> {
    let disk = disk(place, access)?;
    let options = OpenOptions {
        read_only: access == Access::Read,
        metadata_bytes: settings.block_cache.as_usize(),
        page_bytes: settings.page_cache.as_usize(),
        access_times: !settings.no_access_times,
        keeps_read,
        // Clients of NFS that ask for their open files after a restart; FUSE ends this at once.
        recovers_holds: true,
        ..OpenOptions::default()
    };
    let filesystem = Filesystem::open(disk.disk.clone(), &options)
        .with_context(|| format!("cannot open the filesystem on {}", disk.description))?;
    let shown = |source: &Arc<dyn SnapshotSource>| {
        let options = ShelfOptions { keeps_read, ..ShelfOptions::default() };
        SnapshotTree::new(filesystem.clone(), source.clone(), options).map(Arc::new)
    };
    let snapshots = disk.snapshots.as_ref().map(shown).transpose();
    let snapshots = snapshots.with_context(|| format!("cannot read the root of {}", disk.description))?;
    let tree: Arc<dyn Vfs> = match &snapshots {
        Some(snapshots) => snapshots.clone(),
        None => filesystem.clone(),
    };
    let tree = Arc::new(CountedTree::new(tree));
    Ok(OpenedTree { disk, filesystem, snapshots, tree })
}

/// Opens the disk.
pub(super) fn disk(place: &Place, access: Access) -> anyhow::Result<OpenedDisk> {
    let place_found = place.find()?;
    std::fs::create_dir_all(&place.data)
        .with_context(|| format!("cannot make the data directory {}", place.data.display()))?;
    // Two at once on one disk would destroy it. This cannot see another machine, which the server of the disk has to keep out.
    let lock_path = place.data.join("fsd.lock");
    let lock = wait_for(&lock_path, || exclusive(&lock_path))?;
    type Source = Option<Arc<dyn SnapshotSource>>;
    let (disk, description, engine, snapshots): (Arc<dyn Disk>, String, _, Source) = match place_found {
        Where::File(path) => (Arc::new(file(&path, access)?), path.display().to_string(), None, None),
        Where::Nbd(url) => {
            let options = NbdOptions {
                connections: place.nbd_connections.into(),
                read_only: access == Access::Read,
                ..NbdOptions::default()
            };
            let source = VolumeSnapshots::elsewhere(&url).map(|source| Arc::new(source) as _);
            (Arc::new(NbdDisk::connect(&url, options)?), url.to_string(), None, source)
        }
        Where::Store(store) => {
            let (engine, disk) = crate::disk::engine::Engine::start(&crate::disk::engine::EngineOptions {
                data: place.data.join("engine"),
                store: store.clone(),
                volume: place.volume.clone(),
                settings: place.engine.clone(),
                create: matches!(access, Access::Make(_)),
                connections: place.nbd_connections.into(),
            })?;
            let source = of_engine(place)?;
            (Arc::new(disk), format!("volume {} in {store}", place.volume), Some(engine), source)
        }
    };
    Ok(OpenedDisk { disk: Arc::new(CountedDisk::new(disk)), description, engine, snapshots, lock })
}

/// The snapshots of the volume that the engine in this process serves.
#[cfg(feature = "engine")]
fn of_engine(place: &Place) -> anyhow::Result<Option<Arc<dyn SnapshotSource>>> {
    let data = std::path::absolute(place.data.join("engine")).context("cannot tell the working directory")?;
    Ok(Some(Arc::new(VolumeSnapshots::of_engine(&data, &place.volume))))
}

#[cfg(not(feature = "engine"))]
fn of_engine(_: &Place) -> anyhow::Result<Option<Arc<dyn SnapshotSource>>> {
    Ok(None)
}

fn file(path: &Path, access: Access) -> anyhow::Result<FileDisk> {
    match access {
        Access::Make(Some(size)) => {
            FileDisk::create(path, size.0).with_context(|| format!("cannot make {}", path.display()))
        }
        _ if !path.exists() => {
            bail!("{} is not there; fsd mkfs --disk {} makes it", path.display(), path.display())
        }
        access => wait_for(path, || FileDisk::open(path, access == Access::Read)),
    }
}

/// How long an fsd that is ending may take to let go.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often that is looked for.
const LOOK_PERIOD: Duration = Duration::from_millis(50);

/// Tries again while another fsd has `what`, which may be about to end.
fn wait_for<T>(what: &Path, mut attempt: impl FnMut() -> io::Result<T>) -> anyhow::Result<T> {
    let start = Instant::now();
    let mut said = false;
    loop {
        match attempt() {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && start.elapsed() < PATIENCE => {
                if !said {
                    tracing::warn!("another fsd has {}; waiting for it to end", what.display());
                    said = true;
                }
                std::thread::sleep(LOOK_PERIOD);
            }
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => {
                bail!("another fsd has {}; stop it first, or choose another with --data", what.display())
            }
            result => return result.with_context(|| format!("cannot open {}", what.display())),
        }
    }
}

/// A file that nobody else has as long as this exists.
fn exclusive(path: &Path) -> io::Result<File> {
    let file = FileOptions::new().write(true).create(true).truncate(false).open(path)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => Err(io::ErrorKind::ResourceBusy.into()),
        Err(TryLockError::Error(error)) => Err(error),
    }
}
