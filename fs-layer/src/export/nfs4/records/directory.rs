//! Records on the host that serves.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use super::{
    CLIENT_MAGIC, ClientRecords, RECORD_MAX, SERVER_MAGIC, Start, client_name, fresh, parse_server, seal,
    server_content, unseal,
};

/// Records in a directory of the host: `server`, and `client-HASH` for each client. Both are magic, version (u32, little-endian), content and
/// CRC32C of all before. The content of `server` is boot (u32), identity and key, that of a client its co_ownerid.
pub struct DirectoryRecords {
    path: PathBuf,
}

impl DirectoryRecords {
    /// Makes the directory if it is not there.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(path: &Path) -> io::Result<DirectoryRecords> {
        fs::create_dir_all(path)?;
        Ok(DirectoryRecords { path: path.to_path_buf() })
    }

    fn client_path(&self, owner: &[u8]) -> PathBuf {
        self.path.join(client_name(owner))
    }

    /// Order: the new file's bytes, its name, the directory; a crash leaves the old one or the new one.
    fn write(&self, path: &Path, magic: &[u8; 8], content: &[u8]) -> io::Result<()> {
        let bytes = seal(magic, content);
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(&self.path)?.sync_all()
    }

    fn read(path: &Path, magic: &[u8; 8]) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::new();
        File::open(path)?.take(RECORD_MAX).read_to_end(&mut bytes)?;
        unseal(&path.display().to_string(), magic, &bytes)
    }

    fn read_server(&self) -> io::Result<Start> {
        let path = self.path.join("server");
        let content = match DirectoryRecords::read(&path, SERVER_MAGIC) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(fresh()),
            other => other?,
        };
        parse_server(&path.display().to_string(), &content)
    }
}

impl ClientRecords for DirectoryRecords {
    fn start(&self) -> io::Result<Start> {
        let mut start = self.read_server()?;
        start.boot = start.boot.wrapping_add(1).max(1);
        self.write(&self.path.join("server"), SERVER_MAGIC, &server_content(&start))?;
        for entry in fs::read_dir(&self.path)? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name.ends_with(".new") {
                fs::remove_file(&path)?;
            } else if name.starts_with("client-") {
                match DirectoryRecords::read(&path, CLIENT_MAGIC) {
                    Ok(owner) => drop(start.clients.insert(owner)),
                    Err(e) => tracing::warn!("a client cannot reclaim its locks: {e}"),
                }
            }
        }
        Ok(start)
    }

    fn add(&self, owner: &[u8]) -> io::Result<()> {
        self.write(&self.client_path(owner), CLIENT_MAGIC, owner)
    }

    fn remove(&self, owner: &[u8]) -> io::Result<()> {
        match fs::remove_file(self.client_path(owner)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        File::open(&self.path)?.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_directory_keeps_clients() {
        let dir = tempfile::tempdir().unwrap();
        let records = DirectoryRecords::open(dir.path()).unwrap();
        let first = records.start().unwrap();
        assert!(first.clients.is_empty());
        records.add(b"one").unwrap();
        records.add(b"two").unwrap();
        records.add(b"two").unwrap();
        records.remove(b"one").unwrap();
        records.remove(b"never").unwrap();
        let second = DirectoryRecords::open(dir.path()).unwrap().start().unwrap();
        assert_eq!(second.boot, first.boot + 1);
        assert_eq!((second.identity, second.handle_key), (first.identity, first.handle_key));
        assert_eq!(second.clients, BTreeSet::from([b"two".to_vec()]));
    }

    #[test]
    fn damage_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let records = DirectoryRecords::open(dir.path()).unwrap();
        records.start().unwrap();
        records.add(b"one").unwrap();
        fs::write(records.client_path(b"one"), b"nonsense nonsense").unwrap();
        assert!(records.start().unwrap().clients.is_empty());
        fs::write(dir.path().join("server"), b"nonsense nonsense").unwrap();
        assert!(records.start().unwrap_err().to_string().contains("server"));
    }
}
