//! The data directory: whose it is, and that nobody else uses it.
//!
//! ```text
//! DIR/blockd             identity: what this directory is, host id, store (text, written once)
//! DIR/lock               locked by the running daemon, holds its process id
//! DIR/volumes/ID/wal/    log segments of a volume
//! DIR/volumes/ID/table/  its translation table
//! DIR/cache/             read cache
//! DIR/bucket/            the embedded store, unless another is configured
//! ```
//!
//! Nothing below DIR may be touched before the lock is held, and nothing is locked in a directory that is not ours.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use crate::types::VolumeId;

const IDENTITY: &str = "blockd";
const IDENTITY_TMP: &str = "blockd.tmp";
const LOCK: &str = "lock";
const MAGIC: &str = "blockd data directory";
const FORMAT: u32 = 1;
/// May stand in a directory that is new to us: our own first traces, and what mkfs leaves in a fresh file system.
const HARMLESS: [&str; 3] = [LOCK, IDENTITY_TMP, "lost+found"];

/// A data directory this process holds. Dropping it lets another daemon have it.
#[derive(Debug)]
pub struct DataDir {
    path: PathBuf,
    host: [u8; 16],
    store: String,
    settled: bool,
    _lock: File,
}

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum DataDirError {
    /// An operation failed.
    #[error("cannot {what} {path}: {source}{}", advice(.source))]
    Io {
        /// Verb.
        what: &'static str,
        /// Of which file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The path is something else.
    #[error("cannot open data directory {0}: it is not a directory; choose another with --data")]
    NotADirectory(PathBuf),
    /// Something else lives there.
    #[error(
        "cannot open data directory {path}: it holds other files ({example}) and was not made by blockd; choose an \
         empty or new directory with --data"
    )]
    Foreign {
        /// The directory.
        path: PathBuf,
        /// One thing found in it.
        example: String,
    },
    /// The identity file makes no sense.
    #[error(
        "cannot open data directory {path}: its identity file {path}/blockd is damaged ({why}); restore it from a \
         backup, or move the directory away and start with an empty one: all that reached the bucket is safe there, \
         what was only in the log is not"
    )]
    Damaged {
        /// The directory.
        path: PathBuf,
        /// What is wrong.
        why: &'static str,
    },
    /// Written by a later program.
    #[error(
        "cannot open data directory {path}: it has format {found}, this blockd knows formats up to {FORMAT}; use the \
         newer blockd that made it"
    )]
    Newer {
        /// The directory.
        path: PathBuf,
        /// Its format.
        found: u32,
    },
    /// It belongs to another bucket.
    #[error(
        "cannot open data directory {path}: it belongs to the store {recorded}, not to {wanted}; use the store it was \
         made with or another --data, or, if the same bucket has only moved, start once with --accept-store"
    )]
    OtherStore {
        /// The directory.
        path: PathBuf,
        /// Its store.
        recorded: String,
        /// The configured store.
        wanted: String,
    },
    /// A daemon runs on it.
    #[error(
        "cannot open data directory {path}: blockd with process id {pid} uses it; stop that one or choose another --data"
    )]
    InUse {
        /// The directory.
        path: PathBuf,
        /// Who holds it, as far as it can be told.
        pid: String,
    },
}

fn advice(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => "; run blockd as the user that owns it, or choose another --data",
        io::ErrorKind::ReadOnlyFilesystem => "; the data directory must be on a writable disk",
        io::ErrorKind::StorageFull => "; free some space there",
        _ => "",
    }
}

impl DataDir {
    /// Opens `path`, or makes it. `store` names the bucket; with `accept_store` one different from before is not
    /// refused. What is new is recorded by [`DataDir::settle`].
    ///
    /// # Errors
    /// When it is not ours, not for this store, in use, or cannot be written.
    pub fn open(path: &Path, store: &str, accept_store: bool) -> Result<Self, DataDirError> {
        make_dir(path)?;
        let found = read_identity(path)?;
        if found.is_none() {
            refuse_foreign(path)?;
        }
        let lock = take_lock(path)?;
        // Read again: the daemon that held the lock until now may have written it.
        let (host, settled) = match read_identity(path)? {
            Some(identity) if identity.store == store => (identity.host, true),
            Some(identity) if accept_store => (identity.host, false),
            Some(identity) => {
                return Err(DataDirError::OtherStore {
                    path: path.to_owned(),
                    recorded: identity.store,
                    wanted: store.to_owned(),
                });
            }
            None => (*uuid::Uuid::new_v4().as_bytes(), false),
        };
        Ok(Self { path: path.to_owned(), host, store: store.to_owned(), settled, _lock: lock })
    }

    /// Records whose directory this is and its store, and makes what stands in it. Until then nothing but the lock is
    /// written, so that the next start may come with another store.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn settle(&mut self) -> Result<(), DataDirError> {
        if !self.settled {
            write_identity(&self.path, &self.host, &self.store)?;
            self.settled = true;
        }
        make_dir(&self.path.join("volumes"))?;
        make_dir(&self.path.join("cache"))
    }

    /// Identity of this directory, and so of this host as an owner of volumes.
    pub fn host(&self) -> [u8; 16] {
        self.host
    }

    /// [`DataDir::host`] in hexadecimal.
    pub fn host_hex(&self) -> String {
        uuid::Uuid::from_bytes(self.host).simple().to_string()
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Where a volume's log and table live.
    pub fn volume(&self, id: VolumeId) -> PathBuf {
        self.path.join("volumes").join(id.to_string())
    }

    /// Where tables of snapshots that are read live; nothing there is needed after the end of the process.
    pub fn views(&self) -> PathBuf {
        self.path.join("views")
    }

    /// Where that of one snapshot does.
    pub fn view(&self, snapshot: crate::manifest::SnapshotId) -> PathBuf {
        self.views().join(uuid::Uuid::from_bytes(snapshot).simple().to_string())
    }

    /// Where those of a volume whose owner is followed do.
    pub fn following(&self, volume: VolumeId) -> PathBuf {
        self.views().join(format!("latest-{volume}"))
    }

    /// Where the read cache lives.
    pub fn cache(&self) -> PathBuf {
        self.path.join("cache")
    }
}

struct Identity {
    host: [u8; 16],
    store: String,
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> DataDirError {
    let path = path.to_owned();
    move |source| DataDirError::Io { what, path, source }
}

fn make_dir(path: &Path) -> Result<(), DataDirError> {
    // Only the owner may look inside: volumes hold whatever their users put there.
    match fs::DirBuilder::new().recursive(true).mode(0o700).create(path) {
        Err(_) if path.exists() && !path.is_dir() => Err(DataDirError::NotADirectory(path.to_owned())),
        other => other.map_err(io_error("make the data directory", path)),
    }
}

fn refuse_foreign(path: &Path) -> Result<(), DataDirError> {
    let failed = || io_error("look into the data directory", path);
    for entry in fs::read_dir(path).map_err(failed())? {
        let name = entry.map_err(failed())?.file_name();
        if !HARMLESS.iter().any(|harmless| name == *harmless) {
            return Err(DataDirError::Foreign { path: path.to_owned(), example: name.to_string_lossy().into_owned() });
        }
    }
    Ok(())
}

fn take_lock(path: &Path) -> Result<File, DataDirError> {
    let lock_path = path.join(LOCK);
    let mut lock = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .open(&lock_path)
        .map_err(io_error("write", &lock_path))?;
    // SAFETY: flock takes no pointers, and the descriptor is open.
    if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
        let source = io::Error::last_os_error();
        if source.kind() != io::ErrorKind::WouldBlock {
            return Err(io_error("lock", &lock_path)(source));
        }
        let mut pid = String::new();
        // Only for the message; an unreadable one changes nothing.
        let _ = lock.read_to_string(&mut pid);
        let pid = pid.trim();
        let pid = if pid.is_empty() { "unknown" } else { pid };
        return Err(DataDirError::InUse { path: path.to_owned(), pid: pid.to_owned() });
    }
    lock.set_len(0).and_then(|()| writeln!(lock, "{}", std::process::id())).map_err(io_error("write", &lock_path))?;
    Ok(lock)
}

fn read_identity(path: &Path) -> Result<Option<Identity>, DataDirError> {
    let file = path.join(IDENTITY);
    match fs::read_to_string(&file) {
        Ok(text) => parse_identity(path, &text).map(Some),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) if e.kind() == io::ErrorKind::InvalidData => {
            Err(DataDirError::Damaged { path: path.to_owned(), why: "it is not text" })
        }
        Err(e) => Err(io_error("read", &file)(e)),
    }
}

fn parse_identity(path: &Path, text: &str) -> Result<Identity, DataDirError> {
    let damaged = |why| DataDirError::Damaged { path: path.to_owned(), why };
    let mut lines = text.lines();
    if lines.next() != Some(MAGIC) {
        return Err(damaged("it does not begin as it should"));
    }
    let mut field = |name: &str| lines.next()?.strip_prefix(name)?.strip_prefix(' ');
    let format: u32 =
        field("format").and_then(|number| number.parse().ok()).ok_or_else(|| damaged("no format version"))?;
    // Nothing may be concluded from the rest of a newer file.
    if format > FORMAT {
        return Err(DataDirError::Newer { path: path.to_owned(), found: format });
    }
    let host = field("host").and_then(|hex| uuid::Uuid::try_parse(hex).ok()).ok_or_else(|| damaged("no host id"))?;
    let store = field("store").ok_or_else(|| damaged("no store"))?;
    Ok(Identity { host: *host.as_bytes(), store: store.to_owned() })
}

/// Written beside, made durable, then renamed into place: there is a whole identity or none.
fn write_identity(path: &Path, host: &[u8; 16], store: &str) -> Result<(), DataDirError> {
    let host = uuid::Uuid::from_bytes(*host).simple();
    let text = format!("{MAGIC}\nformat {FORMAT}\nhost {host}\nstore {store}\n");
    let (tmp, file) = (path.join(IDENTITY_TMP), path.join(IDENTITY));
    let write = || -> io::Result<()> {
        let mut out = File::create(&tmp)?;
        out.write_all(text.as_bytes())?;
        out.sync_all()?;
        fs::rename(&tmp, &file)?;
        File::open(path)?.sync_all()
    };
    write().map_err(io_error("write", &file))
}

#[cfg(test)]
mod tests {
    use super::*;

    const STORE: &str = "dir:bucket";

    fn open(path: &Path) -> Result<DataDir, DataDirError> {
        open_for(path, STORE, false)
    }

    fn open_for(path: &Path, store: &str, accept_store: bool) -> Result<DataDir, DataDirError> {
        let mut data = DataDir::open(path, store, accept_store)?;
        data.settle()?;
        Ok(data)
    }

    #[test]
    fn a_new_directory_is_made_and_keeps_its_identity() {
        let tmp = tempfile::tempdir().unwrap();
        let path = tmp.path().join("a/b");
        let host = open(&path).unwrap().host();
        assert_ne!(host, [0; 16]);
        assert_eq!(open(&path).unwrap().host(), host);
        assert!(path.join("volumes").is_dir() && path.join("cache").is_dir());
        let identity = fs::read_to_string(path.join("blockd")).unwrap();
        assert!(identity.starts_with("blockd data directory\nformat 1\nhost "), "{identity}");
    }

    #[test]
    fn a_fresh_file_system_and_an_interrupted_start_are_empty() {
        let tmp = tempfile::tempdir().unwrap();
        fs::create_dir(tmp.path().join("lost+found")).unwrap();
        fs::write(tmp.path().join("lock"), "1\n").unwrap();
        fs::write(tmp.path().join("blockd.tmp"), "blockd da").unwrap();
        open(tmp.path()).unwrap();
    }

    #[test]
    fn a_foreign_directory_is_refused_and_left_alone() {
        let tmp = tempfile::tempdir().unwrap();
        fs::write(tmp.path().join("thesis.tex"), "").unwrap();
        let error = open(tmp.path()).unwrap_err();
        assert!(matches!(error, DataDirError::Foreign { .. }));
        assert!(error.to_string().contains("thesis.tex"), "{error}");
        assert_eq!(fs::read_dir(tmp.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_file_is_not_a_directory() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(matches!(open(file.path()).unwrap_err(), DataDirError::NotADirectory(_)));
        let below = open(&file.path().join("below")).unwrap_err();
        assert!(matches!(below, DataDirError::Io { .. }), "{below}");
    }

    #[test]
    fn a_second_daemon_is_told_who_holds_it() {
        let tmp = tempfile::tempdir().unwrap();
        let first = open(tmp.path()).unwrap();
        let error = open(tmp.path()).unwrap_err();
        assert!(matches!(error, DataDirError::InUse { .. }));
        assert!(error.to_string().contains(&std::process::id().to_string()), "{error}");
        drop(first);
        open(tmp.path()).unwrap();
    }

    #[test]
    fn another_store_is_refused_until_accepted() {
        let tmp = tempfile::tempdir().unwrap();
        let host = open(tmp.path()).unwrap().host();
        let error = open_for(tmp.path(), "s3://other", false).unwrap_err().to_string();
        assert!(error.contains(STORE) && error.contains("s3://other"), "{error}");
        assert_eq!(open_for(tmp.path(), "s3://other", true).unwrap().host(), host);
        assert_eq!(open_for(tmp.path(), "s3://other", false).unwrap().host(), host);
        assert!(matches!(open(tmp.path()).unwrap_err(), DataDirError::OtherStore { .. }));
    }

    #[test]
    fn a_store_that_was_never_opened_is_not_remembered() {
        let tmp = tempfile::tempdir().unwrap();
        drop(DataDir::open(tmp.path(), "s3://misspelt", false).unwrap());
        let host = open(tmp.path()).unwrap().host();
        drop(DataDir::open(tmp.path(), "s3://misspelt", true).unwrap());
        assert_eq!(open(tmp.path()).unwrap().host(), host);
    }

    #[test]
    fn newer_and_damaged_identities_are_refused() {
        let tmp = tempfile::tempdir().unwrap();
        drop(open(tmp.path()).unwrap());
        let file = tmp.path().join("blockd");
        let good = fs::read_to_string(&file).unwrap();
        fs::write(&file, good.replace("format 1", "format 2\nwho knows")).unwrap();
        assert!(matches!(open(tmp.path()).unwrap_err(), DataDirError::Newer { found: 2, .. }));
        for bad in [
            "",
            "something else\n",
            "blockd data directory\n",
            &good.replace("host ", "host x"),
            &good.replace("store ", ""),
        ] {
            fs::write(&file, bad).unwrap();
            let error = open(tmp.path()).unwrap_err();
            assert!(matches!(error, DataDirError::Damaged { .. }), "{bad:?}: {error}");
        }
        fs::write(&file, [0xff, 0xfe]).unwrap();
        assert!(matches!(open(tmp.path()).unwrap_err(), DataDirError::Damaged { .. }));
    }

    #[test]
    fn a_directory_that_cannot_be_written_is_said_so() {
        // Not even root may make a directory here.
        let error = open(Path::new("/proc/blockd-data")).unwrap_err();
        assert!(matches!(error, DataDirError::Io { .. }), "{error}");
        assert!(error.to_string().contains("/proc/blockd-data"), "{error}");
    }
}
