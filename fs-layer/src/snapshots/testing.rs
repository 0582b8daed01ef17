//! Snapshots for tests: copies of a disk in memory, which must never be written.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};

use super::{SnapshotError, SnapshotInfo, SnapshotSource};
use crate::disk::{BlockAddress, Disk, MemoryDisk};

/// A copy that nobody may change.
pub(crate) struct Frozen(MemoryDisk);

impl Disk for Frozen {
    fn blocks(&self) -> u64 {
        self.0.blocks()
    }

    fn read(&self, at: BlockAddress, buffer: &mut [u8]) -> io::Result<()> {
        self.0.read(at, buffer)
    }

    fn write(&self, at: BlockAddress, _: &[u8]) -> io::Result<()> {
        panic!("block {at} of a snapshot is written");
    }

    fn flush(&self) -> io::Result<()> {
        panic!("a snapshot is flushed");
    }

    fn discard(&self, at: BlockAddress, _: u64) -> io::Result<()> {
        panic!("block {at} of a snapshot is discarded");
    }
}

/// Makes them by copying the disk.
pub(crate) struct Copies {
    disk: Arc<MemoryDisk>,
    pub(crate) made: Mutex<Vec<(SnapshotInfo, Arc<Frozen>)>>,
    pub(crate) calls: AtomicU64,
    next: AtomicU64,
    pub(crate) away: AtomicBool,
}

impl Copies {
    /// None yet.
    pub(crate) fn of(disk: Arc<MemoryDisk>) -> Arc<Copies> {
        let (calls, next, away) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        Arc::new(Copies { disk, made: Mutex::default(), calls, next, away })
    }

    fn call(&self) -> Result<(), SnapshotError> {
        self.calls.fetch_add(1, SeqCst);
        if self.away.load(SeqCst) { Err(SnapshotError::Refused("a test lets it be away".into())) } else { Ok(()) }
    }
}

impl SnapshotSource for Copies {
    fn list(&self) -> Result<Vec<SnapshotInfo>, SnapshotError> {
        self.call()?;
        Ok(self.made.lock().unwrap().iter().map(|(info, _)| info.clone()).collect())
    }

    fn open(&self, snapshot: &SnapshotInfo) -> Result<Arc<dyn Disk>, SnapshotError> {
        self.call()?;
        let made = self.made.lock().unwrap();
        let found = made.iter().find(|(info, _)| info == snapshot);
        found.map(|(_, disk)| disk.clone() as _).ok_or_else(|| SnapshotError::Replaced(snapshot.name.clone()))
    }

    fn create(&self, name: &str) -> Result<(), SnapshotError> {
        self.call()?;
        let description = format!("copy {}", self.next.fetch_add(1, SeqCst));
        let info = SnapshotInfo { name: name.to_owned(), description };
        self.made.lock().unwrap().push((info, Arc::new(Frozen(self.disk.copy()))));
        Ok(())
    }

    fn delete(&self, name: &str) -> Result<(), SnapshotError> {
        self.call()?;
        self.made.lock().unwrap().retain(|(info, _)| info.name != name);
        Ok(())
    }
}
