//! What of the clients must outlive the server: who may reclaim opens and locks after a restart (RFC 8881 section 8.4.2.1), and who
//! the server is.
//!
//! A client is written down before it may take anything, and struck out before anything it held is given to another. So whoever is found
//! at a start held what it held up to the end.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

/// What a server learns when it starts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    /// Greater at each start; never 0.
    pub boot: u32,
    /// Who this server is, for ever, among all servers.
    pub identity: [u8; 16],
    /// The key of file handles, for ever.
    pub handle_key: [u8; 16],
    /// co_ownerid of the clients that may reclaim.
    pub clients: BTreeSet<Vec<u8>>,
}

/// Where the records are kept. What a call has done is durable when it returns.
pub trait ClientRecords: Send + Sync {
    /// Begins a new start of the server.
    fn start(&self) -> io::Result<Start>;
    /// Writes a client down.
    fn add(&self, owner: &[u8]) -> io::Result<()>;
    /// Strikes a client out; it may be missing.
    fn remove(&self, owner: &[u8]) -> io::Result<()>;
}

/// Records that end with the process; servers can follow each other within it.
pub struct MemoryRecords(Mutex<Start>);

impl Default for MemoryRecords {
    fn default() -> MemoryRecords {
        MemoryRecords(Mutex::new(fresh()))
    }
}

impl ClientRecords for MemoryRecords {
    fn start(&self) -> io::Result<Start> {
        let mut start = self.0.lock().expect("no panic under the lock");
        start.boot += 1;
        Ok(start.clone())
    }

    fn add(&self, owner: &[u8]) -> io::Result<()> {
        self.0.lock().expect("no panic under the lock").clients.insert(owner.to_vec());
        Ok(())
    }

    fn remove(&self, owner: &[u8]) -> io::Result<()> {
        self.0.lock().expect("no panic under the lock").clients.remove(owner);
        Ok(())
    }
}

/// A server that never started. Its first number is the time, so that one whose records were lost is not taken for the old one.
fn fresh() -> Start {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Start {
        boot: (since.as_secs() as u32).max(1),
        identity: rand::random(),
        handle_key: rand::random(),
        clients: BTreeSet::new(),
    }
}

const SERVER_MAGIC: &[u8; 8] = b"fsdnfs4s";
const CLIENT_MAGIC: &[u8; 8] = b"fsdnfs4c";
const VERSION: u32 = 1;
/// Longer than any record.
const RECORD_MAX: u64 = 4096;

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
        self.path.join(format!("client-{:032x}", xxhash_rust::xxh3::xxh3_128(owner)))
    }

    /// Order: the new file's bytes, its name, the directory; a crash leaves the old one or the new one.
    fn write(&self, path: &Path, magic: &[u8; 8], content: &[u8]) -> io::Result<()> {
        let mut bytes = [magic.as_slice(), &VERSION.to_le_bytes(), content].concat();
        bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&new, path)?;
        File::open(&self.path)?.sync_all()
    }

    fn read(path: &Path, magic: &[u8; 8]) -> io::Result<Vec<u8>> {
        let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{}: {what}", path.display()));
        let mut bytes = Vec::new();
        File::open(path)?.take(RECORD_MAX).read_to_end(&mut bytes)?;
        let body = bytes.len().checked_sub(4).filter(|body| *body >= 12).ok_or_else(|| wrong("too short"))?;
        if crc32c::crc32c(&bytes[..body]).to_le_bytes() != bytes[body..] || &bytes[..8] != magic {
            return Err(wrong("is damaged; remove it, clients will not get back what they held"));
        }
        if bytes[8..12] != VERSION.to_le_bytes() {
            return Err(wrong("is of a newer version"));
        }
        Ok(bytes[12..body].to_vec())
    }

    fn read_server(&self) -> io::Result<Start> {
        let path = self.path.join("server");
        let content = match DirectoryRecords::read(&path, SERVER_MAGIC) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(fresh()),
            other => other?,
        };
        let content: &[u8; 36] = content.as_slice().try_into().map_err(|_| {
            io::Error::new(io::ErrorKind::InvalidData, format!("{}: has another length", path.display()))
        })?;
        let sixteen = |at: usize| content[at..at + 16].try_into().expect("sixteen bytes");
        Ok(Start {
            boot: u32::from_le_bytes(content[..4].try_into().expect("four bytes")),
            identity: sixteen(4),
            handle_key: sixteen(20),
            clients: BTreeSet::new(),
        })
    }
}

impl ClientRecords for DirectoryRecords {
    fn start(&self) -> io::Result<Start> {
        let mut start = self.read_server()?;
        start.boot = start.boot.wrapping_add(1).max(1);
        let content = [&start.boot.to_le_bytes()[..], &start.identity, &start.handle_key].concat();
        self.write(&self.path.join("server"), SERVER_MAGIC, &content)?;
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
