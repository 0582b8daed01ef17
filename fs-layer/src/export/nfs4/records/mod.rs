//! What of the clients must outlive the server: who may reclaim opens and locks after a restart (RFC 8881 section 8.4.2.1), and who
//! the server is.
//!
//! A client is written down before it may take anything, and struck out before anything it held is given to another. So whoever is found
//! at a start held what it held up to the end.

mod directory;
mod on_vfs;

use std::collections::BTreeSet;
use std::io;
use std::sync::Mutex;

pub use directory::DirectoryRecords;
pub use on_vfs::VfsRecords;

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

/// A record as it is kept.
fn seal(magic: &[u8; 8], content: &[u8]) -> Vec<u8> {
    let mut bytes = [magic.as_slice(), &VERSION.to_le_bytes(), content].concat();
    bytes.extend_from_slice(&crc32c::crc32c(&bytes).to_le_bytes());
    bytes
}

/// The content of a record.
fn unseal(name: &str, magic: &[u8; 8], bytes: &[u8]) -> io::Result<Vec<u8>> {
    let wrong = |what: &str| io::Error::new(io::ErrorKind::InvalidData, format!("{name}: {what}"));
    let body = bytes.len().checked_sub(4).filter(|body| *body >= 12).ok_or_else(|| wrong("too short"))?;
    if crc32c::crc32c(&bytes[..body]).to_le_bytes() != bytes[body..] || &bytes[..8] != magic {
        return Err(wrong("is damaged; remove it, clients will not get back what they held"));
    }
    if bytes[8..12] != VERSION.to_le_bytes() {
        return Err(wrong("is of a newer version"));
    }
    Ok(bytes[12..body].to_vec())
}

fn server_content(start: &Start) -> Vec<u8> {
    [&start.boot.to_le_bytes()[..], &start.identity, &start.handle_key].concat()
}

fn parse_server(name: &str, content: &[u8]) -> io::Result<Start> {
    let content: &[u8; 36] = content
        .try_into()
        .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, format!("{name}: has another length")))?;
    let sixteen = |at: usize| content[at..at + 16].try_into().expect("sixteen bytes");
    Ok(Start {
        boot: u32::from_le_bytes(content[..4].try_into().expect("four bytes")),
        identity: sixteen(4),
        handle_key: sixteen(20),
        clients: BTreeSet::new(),
    })
}

fn client_name(owner: &[u8]) -> String {
    format!("client-{:032x}", xxhash_rust::xxh3::xxh3_128(owner))
}
