//! Snapshots of a volume of a blockd: each is the read-only export `VOLUME@SNAPSHOT` of the same server.

use std::sync::Arc;
use std::time::Duration;

use super::{SnapshotError, SnapshotInfo, SnapshotSource};
use crate::disk::nbd::{self, NbdDisk, NbdOptions, NbdUrl};
use crate::disk::{CountedDisk, Disk};
use crate::vfs::NAME_MAX;

/// Connections to each snapshot.
const CONNECTIONS: usize = 4;
/// How long reads of a snapshot wait for a server that is away: it may not be coming back with this one.
const PATIENCE: Duration = Duration::from_secs(30);
/// What blockd calls the export that follows the volume's owner: it is no snapshot.
const LATEST: &str = "latest";

/// Makes and deletes them.
pub(super) trait Maker: Send + Sync {
    fn create(&self, volume: &str, name: &str) -> Result<(), SnapshotError>;
    fn delete(&self, volume: &str, name: &str) -> Result<(), SnapshotError>;
}

/// See the module.
pub struct VolumeSnapshots {
    /// The volume's export.
    volume: NbdUrl,
    /// `None`: its blockd is elsewhere.
    maker: Option<Box<dyn Maker>>,
}

impl VolumeSnapshots {
    /// Of a volume of a blockd elsewhere, which alone can make and delete them. `None` if the export is not a whole volume with a name.
    pub fn elsewhere(volume: &NbdUrl) -> Option<VolumeSnapshots> {
        let name = volume.export();
        (!name.is_empty() && !name.contains('@')).then(|| VolumeSnapshots { volume: volume.clone(), maker: None })
    }

    /// Of a volume of the blockd in this process, with this data directory.
    #[cfg(feature = "engine")]
    pub fn of_engine(data: &std::path::Path, volume: &str) -> VolumeSnapshots {
        VolumeSnapshots {
            volume: NbdUrl::Unix { socket: data.join("nbd.sock"), export: volume.to_owned() },
            maker: Some(Box::new(super::engine::EngineMaker::new(data))),
        }
    }

    fn export(&self, name: &str) -> NbdUrl {
        self.volume.with_export(&format!("{}@{name}", self.volume.export()))
    }

    fn maker(&self, what: &str, name: &str, done: &'static str) -> Result<&dyn Maker, SnapshotError> {
        self.maker.as_deref().ok_or_else(|| SnapshotError::Elsewhere {
            done,
            command: format!("blockd snapshot {what} {}@{name}", self.volume.export()),
        })
    }
}

impl SnapshotSource for VolumeSnapshots {
    fn list(&self) -> Result<Vec<SnapshotInfo>, SnapshotError> {
        let snapshots = nbd::exports(&self.volume)?.into_iter().filter_map(|export| {
            let (volume, name) = export.name.split_once('@')?;
            let shown = volume == self.volume.export() && name != LATEST && is_file_name(name);
            shown.then(|| SnapshotInfo { name: name.to_owned(), description: export.description })
        });
        Ok(snapshots.collect())
    }

    fn open(&self, snapshot: &SnapshotInfo) -> Result<Arc<dyn Disk>, SnapshotError> {
        let options =
            NbdOptions { connections: CONNECTIONS, patience: Some(PATIENCE), read_only: true, ..NbdOptions::default() };
        let disk = NbdDisk::connect(&self.export(&snapshot.name), options)?;
        if disk.description() != snapshot.description && !snapshot.description.is_empty() {
            return Err(SnapshotError::Replaced(snapshot.name.clone()));
        }
        // Who waits for it says so.
        Ok(Arc::new(CountedDisk::new(Arc::new(disk))))
    }

    fn create(&self, name: &str) -> Result<(), SnapshotError> {
        let done = "; all that was written until now is durable, type there";
        self.maker("create", name, done)?.create(self.volume.export(), name)
    }

    fn delete(&self, name: &str) -> Result<(), SnapshotError> {
        self.maker("delete", name, "; it is closed here until somebody looks into it again, type there")?
            .delete(self.volume.export(), name)
    }
}

/// Whether something can be called so in a directory.
fn is_file_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && name.len() <= NAME_MAX && !name.contains(['/', '\0'])
}
