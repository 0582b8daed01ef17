//! Where a volume's table lives on this host: opening it, throwing it away, replacing it by a copy.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use super::TableError;
use super::memory::MemKv;
use super::rocks::remove_dir;
use super::table::Table;
use crate::types::VolumeId;

const TABLE: &str = "table";
/// A table that was set aside.
const UNUSABLE: &str = "table.unusable";
/// The copy that is to take the table's place, as long as it is not complete.
const STAGE: &str = "table.restore";
/// The table that is being replaced.
const OLD: &str = "table.old";

/// Where a volume's table lives.
#[derive(Clone)]
pub enum TableHome {
    /// A RocksDB in the directory `table` of a volume's directory.
    Dir {
        /// The volume's directory.
        dir: PathBuf,
        /// What the table may use of memory, in bytes.
        memory_bytes: usize,
    },
    /// Simulated storage.
    Memory(Arc<MemKv>),
}

impl TableHome {
    /// Opens the table, or makes an empty one. One that cannot be used is set aside, because checkpoint and chunks say
    /// everything it said; one of a newer version is refused.
    pub fn open(&self, volume: VolumeId) -> Result<Table, TableError> {
        let (dir, memory_bytes) = match self {
            TableHome::Memory(kv) => return Table::in_memory(kv.clone(), volume),
            TableHome::Dir { dir, memory_bytes } => (dir, *memory_bytes),
        };
        fs::create_dir_all(dir).map_err(TableError::Files)?;
        // Left behind by a crash in the middle of a replacement or a copy.
        for rest in [OLD, "table.checkpoint"] {
            remove_dir(&dir.join(rest)).map_err(TableError::Files)?;
        }
        let path = dir.join(TABLE);
        match Table::open(&path, memory_bytes, volume) {
            Err(e) if !matches!(e, TableError::Newer { .. }) => {
                tracing::warn!("translation table {} is unusable and will be made anew: {e}", path.display());
                self.discard().map_err(TableError::Files)?;
                Table::open(&path, memory_bytes, volume)
            }
            other => other,
        }
    }

    /// Opens the table that is there; none where there is none. One that cannot be used is left where it is.
    pub fn look(&self, volume: VolumeId) -> Result<Option<Table>, TableError> {
        match self {
            TableHome::Dir { dir, .. } if !dir.join(TABLE).exists() => Ok(None),
            TableHome::Dir { dir, memory_bytes } => Table::open(&dir.join(TABLE), *memory_bytes, volume).map(Some),
            TableHome::Memory(kv) => Table::in_memory(kv.clone(), volume).map(Some),
        }
    }

    /// Sets the table aside, which must not be open.
    pub fn discard(&self) -> io::Result<()> {
        match self {
            TableHome::Memory(kv) => kv.replace(&BTreeMap::new()),
            TableHome::Dir { dir, .. } => {
                remove_dir(&dir.join(UNUSABLE))?;
                match fs::rename(dir.join(TABLE), dir.join(UNUSABLE)) {
                    Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
                    _ => File::open(dir)?.sync_all(),
                }
            }
        }
    }

    /// Links the lasting files of the table in `donor` to where files of a copy are gathered: those of them that belong to
    /// it need not be fetched.
    pub fn borrow_files(&self, donor: &TableHome) -> io::Result<()> {
        let (TableHome::Dir { dir, .. }, TableHome::Dir { dir: donor, .. }) = (self, donor) else { return Ok(()) };
        let stage = dir.join(STAGE);
        fs::create_dir_all(&stage)?;
        for entry in fs::read_dir(donor.join(TABLE))? {
            let name = entry?.file_name();
            if !name.to_str().is_some_and(|name| name.ends_with(".sst")) {
                continue;
            }
            match fs::hard_link(donor.join(TABLE).join(&name), stage.join(&name)) {
                // It was there, or has just been compacted away.
                Err(e) if !matches!(e.kind(), io::ErrorKind::AlreadyExists | io::ErrorKind::NotFound) => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// Begins to gather the files of a copy. What an earlier attempt gathered is still there.
    pub fn stage(&self) -> io::Result<Stage> {
        match self {
            TableHome::Memory(kv) => Ok(Stage::Memory { kv: kv.clone(), files: Mutex::default() }),
            TableHome::Dir { dir, .. } => {
                fs::create_dir_all(dir.join(STAGE))?;
                Ok(Stage::Dir(dir.clone()))
            }
        }
    }
}

/// Files that are to become a volume's table.
pub enum Stage {
    #[doc(hidden)]
    Dir(PathBuf),
    #[doc(hidden)]
    Memory { kv: Arc<MemKv>, files: Mutex<BTreeMap<String, Vec<u8>>> },
}

impl Stage {
    /// Whether the file is there already, be it from an earlier attempt or in the present table: one of this length
    /// whose content `is_it` accepts.
    pub fn has(&self, name: &str, size: u64, is_it: impl Fn(&[u8]) -> bool) -> io::Result<bool> {
        let Stage::Dir(dir) = self else { return Ok(false) };
        let same = |path: &Path| -> io::Result<bool> {
            match fs::metadata(path) {
                Ok(meta) if meta.len() == size => Ok(is_it(&fs::read(path)?)),
                _ => Ok(false),
            }
        };
        let staged = dir.join(STAGE).join(name);
        if same(&staged)? {
            return Ok(true);
        }
        let present = dir.join(TABLE).join(name);
        if !same(&present)? {
            return Ok(false);
        }
        match fs::remove_file(&staged) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        fs::hard_link(&present, &staged)?;
        // It may have been written by a process that crashed before the disk had it.
        File::open(&staged)?.sync_all()?;
        Ok(true)
    }

    /// Adds a file, durably.
    pub fn write(&self, name: &str, bytes: &[u8]) -> io::Result<()> {
        match self {
            Stage::Memory { files, .. } => {
                files.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), bytes.to_vec());
                Ok(())
            }
            Stage::Dir(dir) => {
                let part = dir.join(STAGE).join(format!("{name}.part"));
                let mut file = File::create(&part)?;
                file.write_all(bytes)?;
                file.sync_all()?;
                fs::rename(&part, dir.join(STAGE).join(name))
            }
        }
    }

    /// Puts the files `names`, which must all be there, in the table's place. The table must not be open.
    pub fn commit(self, names: &BTreeSet<&str>) -> io::Result<()> {
        let dir = match self {
            Stage::Memory { kv, files } => {
                return kv.replace(&files.into_inner().unwrap_or_else(PoisonError::into_inner));
            }
            Stage::Dir(dir) => dir,
        };
        let stage = dir.join(STAGE);
        for entry in fs::read_dir(&stage)? {
            let entry = entry?;
            if !entry.file_name().to_str().is_some_and(|name| names.contains(name)) {
                fs::remove_file(entry.path())?;
            }
        }
        File::open(&stage)?.sync_all()?;
        // Between the two renames there is no table; a crash there leaves all files in the stage, where they are found.
        remove_dir(&dir.join(OLD))?;
        match fs::rename(dir.join(TABLE), dir.join(OLD)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        fs::rename(&stage, dir.join(TABLE))?;
        File::open(&dir)?.sync_all()?;
        remove_dir(&dir.join(OLD))
    }
}
