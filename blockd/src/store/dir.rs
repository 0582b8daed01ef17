//! A directory as an object store: the embedded default.
//!
//! An object is a file below the root whose path is its key. A writer fills a file of its own under `.tmp`, makes the
//! content durable, gives it its name with link(2) (which fails if the name is taken: of many creators one wins) or
//! rename(2) (under the lock file, after comparing versions), makes the name durable, and only then answers.
//!
//! Names with a leading dot are the store's own: `.blockd-bucket` says that the directory is a bucket and of which
//! format, `.lock` serialises replacements among processes, `.tmp` holds files being written.

use std::collections::HashSet;
use std::fs;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, anyhow, bail};
use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::Mutex;
use xxhash_rust::xxh3::xxh3_64;

use super::dir_list::list_page;
use super::uring_files::{self, UringFiles};
use super::{ListEntry, ObjectMeta, ObjectStore, PutMode, Result, StoreError, StoreErrorKind, Version};

/// Says that a directory is a bucket; its content is [`MARKER_LINE`] followed by the format version.
const MARKER: &str = ".blockd-bucket";
const MARKER_LINE: &str = "blockd directory store, format ";
/// The format written, and the newest one understood.
const FORMAT: u32 = 1;
const LOCK: &str = ".lock";
const TMP: &str = ".tmp";
/// A temporary file this old belongs to no living writer.
const TMP_AGE_MAX: Duration = Duration::from_secs(3600);

/// Objects as files below one directory. Several processes may use the same directory.
///
/// A [`Version`] is the xxh3 hash of the content with its length: it survives copying the directory, and [`head`]
/// reads the whole file to tell it.
///
/// [`head`]: ObjectStore::head
#[derive(Debug)]
pub struct DirStore {
    root: PathBuf,
    files: UringFiles,
    /// Directories that exist and whose own name is durable.
    durable_dirs: Arc<Mutex<HashSet<PathBuf>>>,
}

impl DirStore {
    /// Opens the bucket at `root`, making it first where the directory is missing or empty.
    ///
    /// Refuses a directory with foreign content, a format newer than it knows, and one it may not write.
    /// Blocks for a few file operations.
    pub fn open(root: &Path) -> anyhow::Result<Self> {
        let root = create_root(root).with_context(|| format!("cannot make the store directory {}", root.display()))?;
        claim(&root)?;
        let tmp = root.join(TMP);
        fs::create_dir_all(&tmp).and_then(|()| fs::File::create(root.join(LOCK)).map(drop)).with_context(|| {
            format!("cannot write into the store directory {}; check its owner and mode", root.display())
        })?;
        remove_old_files(&tmp);
        let files = UringFiles::start().context(
            "cannot start io_uring for the directory store; the kernel must be 5.11 or newer and must not forbid \
             io_uring (sysctl kernel.io_uring_disabled, container seccomp profile)",
        )?;
        Ok(Self { root, files, durable_dirs: Arc::default() })
    }

    fn path_of(&self, op: &'static str, key: &str) -> Result<PathBuf> {
        check_key(key).map_err(|e| StoreError::new(StoreErrorKind::Invalid, op, key, e))?;
        Ok(self.root.join(key))
    }

    async fn read(&self, op: &'static str, key: &str, range: Option<Range<u64>>) -> Result<Bytes> {
        let path = self.path_of(op, key)?;
        let asked = range.clone();
        let content = self
            .files
            .run(move || async move { uring_files::read(&path, range).await })
            .await
            .map_err(|e| io_error(op, key, e))?;
        content.ok_or_else(|| {
            let cause = anyhow!("range {asked:?} reaches past the end of the object");
            StoreError::new(StoreErrorKind::Invalid, op, key, cause)
        })
    }
}

#[async_trait]
impl ObjectStore for DirStore {
    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> Result<Version> {
        let path = self.path_of("put", key)?;
        let version = version_of(&body);
        let put = Put {
            root: self.root.clone(),
            tmp: self.root.join(TMP).join(uuid::Uuid::new_v4().simple().to_string()),
            path,
            durable_dirs: self.durable_dirs.clone(),
        };
        let done = self
            .files
            .run(move || async move { put.run(body, mode).await })
            .await
            .map_err(|e| io_error("put", key, e))?;
        match done {
            Done::Written => Ok(version),
            Done::Refused(why) => Err(StoreError::new(StoreErrorKind::Precondition, "put", key, anyhow!(why))),
        }
    }

    async fn get(&self, key: &str) -> Result<(Bytes, Version)> {
        let content = self.read("get", key, None).await?;
        let version = version_of(&content);
        Ok((content, version))
    }

    async fn get_range(&self, key: &str, range: Range<u64>) -> Result<Bytes> {
        self.read("get_range", key, Some(range)).await
    }

    async fn head(&self, key: &str) -> Result<ObjectMeta> {
        let content = self.read("head", key, None).await?;
        Ok(ObjectMeta { size: content.len() as u64, version: version_of(&content) })
    }

    async fn list(&self, prefix: &str, start_after: Option<&str>) -> Result<Vec<ListEntry>> {
        let (root, wanted) = (self.root.clone(), prefix.to_owned());
        let start_after = start_after.map(str::to_owned);
        blocking(move || list_page(&root, &wanted, start_after.as_deref()))
            .await
            .map_err(|e| io_error("list", prefix, e))
    }

    async fn delete(&self, keys: &[String]) -> Result<()> {
        let mut paths = Vec::with_capacity(keys.len());
        for key in keys {
            paths.push(self.path_of("delete", key)?);
        }
        blocking(move || remove_durably(&paths))
            .await
            .map_err(|e| io_error("delete", keys.first().map_or("", String::as_str), e))
    }

    async fn delete_version(&self, key: &str, version: &Version) -> Result<()> {
        let path = self.path_of("delete", key)?;
        let (lock, version) = (self.root.join(LOCK), version.clone());
        match blocking(move || remove_if(&lock, &path, &version)).await.map_err(|e| io_error("delete", key, e))? {
            Done::Written => Ok(()),
            Done::Refused(why) => Err(StoreError::new(StoreErrorKind::Precondition, "delete", key, anyhow!(why))),
        }
    }

    fn describe(&self) -> String {
        format!("dir:{}", self.root.display())
    }
}

/// What became of a conditional write or deletion.
enum Done {
    Written,
    Refused(&'static str),
}

/// One write on its way; runs on the file thread.
struct Put {
    root: PathBuf,
    tmp: PathBuf,
    path: PathBuf,
    durable_dirs: Arc<Mutex<HashSet<PathBuf>>>,
}

impl Put {
    async fn run(self, body: Bytes, mode: PutMode) -> io::Result<Done> {
        let result = self.write_and_name(body, mode).await;
        // After a rename there is nothing left to remove, and what stays behind is removed at a later open.
        let _ = tokio_uring::fs::remove_file(&self.tmp).await;
        result
    }

    async fn write_and_name(&self, body: Bytes, mode: PutMode) -> io::Result<Done> {
        // Content first: a name must never lead to bytes that a power cut can take away.
        uring_files::write_new(&self.tmp, &body).await?;
        let parent = self.path.parent().unwrap_or(&self.path).to_owned();
        match mode {
            PutMode::Create => {
                let mut linked = self.link(&parent).await;
                if matches!(&linked, Err(e) if e.kind() == ErrorKind::NotFound) {
                    // Somebody removed the directory since it was made; make it again.
                    self.durable_dirs.lock().await.clear();
                    linked = self.link(&parent).await;
                }
                if !linked? {
                    return Ok(Done::Refused("the object exists"));
                }
            }
            PutMode::Replace(expected) => {
                let (tmp, path) = (self.tmp.clone(), self.path.clone());
                let lock = self.root.join(LOCK);
                let done = blocking(move || replace_if(&lock, &tmp, &path, &expected)).await?;
                if let Done::Refused(_) = done {
                    return Ok(done);
                }
            }
        }
        uring_files::sync_dir(&parent).await?;
        Ok(Done::Written)
    }

    /// Gives the written file its name. `false` if the name is taken.
    async fn link(&self, parent: &Path) -> io::Result<bool> {
        self.make_parent(parent).await?;
        let (tmp, path) = (self.tmp.clone(), self.path.clone());
        match blocking(move || fs::hard_link(&tmp, &path)).await {
            Err(e) if e.kind() == ErrorKind::AlreadyExists => Ok(false),
            other => other.map(|()| true),
        }
    }

    /// Makes the directory and its parents, and their names durable, before a file in it can be called durable.
    async fn make_parent(&self, parent: &Path) -> io::Result<()> {
        // Held while directories are made: who finds one in the set may rely on its name being durable.
        let mut durable = self.durable_dirs.lock().await;
        if !durable.contains(parent) {
            let (root, dir) = (self.root.clone(), parent.to_owned());
            blocking(move || create_dir_durably(&root, &dir)).await?;
            durable.insert(parent.to_owned());
        }
        Ok(())
    }
}

/// Renames `tmp` over `path` if that still has version `expected`; one process and thread at a time.
fn replace_if(lock: &Path, tmp: &Path, path: &Path, expected: &Version) -> io::Result<Done> {
    if_version(lock, path, expected, Done::Refused("the object is gone"), || fs::rename(tmp, path))
}

/// Removes `path` durably if it still has version `expected`, as [`replace_if`].
fn remove_if(lock: &Path, path: &Path, expected: &Version) -> io::Result<Done> {
    if_version(lock, path, expected, Done::Written, || remove_durably(&[path.to_owned()]))
}

/// Acts if `path` has version `expected`; `absent` is the answer where there is none.
fn if_version(
    lock: &Path,
    path: &Path,
    expected: &Version,
    absent: Done,
    act: impl FnOnce() -> io::Result<()>,
) -> io::Result<Done> {
    let lock = fs::File::open(lock)?;
    lock.lock()?;
    // The lock goes when the file is closed, at the end of this function or of this process.
    match fs::read(path) {
        Err(e) if is_absent(&e) => Ok(absent),
        Err(e) => Err(e),
        Ok(content) if version_of(&content) != *expected => Ok(Done::Refused("the object has another version")),
        Ok(_) => act().map(|()| Done::Written),
    }
}

/// Makes a directory below `top`, with its parents, and makes their names durable, also where they existed already:
/// whoever made them may not have come that far.
fn create_dir_durably(top: &Path, dir: &Path) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    for named in dir.ancestors().take_while(|named| *named != top) {
        if let Some(parent) = named.parent() {
            fs::File::open(parent)?.sync_all()?;
        }
    }
    Ok(())
}

/// Makes the root of a bucket and the directories above it that are missing.
fn create_root(root: &Path) -> io::Result<PathBuf> {
    let root = std::path::absolute(root)?;
    let existing = root.ancestors().find(|dir| dir.exists()).unwrap_or(&root);
    create_dir_durably(existing, &root)?;
    root.canonicalize()
}

/// Finds or writes the marker file of a bucket.
fn claim(root: &Path) -> anyhow::Result<()> {
    let marker = root.join(MARKER);
    match fs::read_to_string(&marker) {
        Ok(text) => return check_marker(&marker, &text),
        Err(e) if e.kind() == ErrorKind::NotFound => {}
        Err(e) => return Err(e).with_context(|| format!("cannot read {}", marker.display())),
    }
    let entries = fs::read_dir(root).with_context(|| format!("cannot read the directory {}", root.display()))?;
    for entry in entries {
        let name = entry.with_context(|| format!("cannot read the directory {}", root.display()))?.file_name();
        let name = name.to_string_lossy();
        // A fresh ext4 has the first; the second is left by an earlier start that did not get to its end.
        if name != "lost+found" && !name.starts_with(MARKER) {
            bail!(
                "{} is not empty and not a blockd bucket (it has {name:?} but no {MARKER}); name an empty or a new \
                 directory",
                root.display()
            );
        }
    }
    let tmp = root.join(format!("{MARKER}.{}", uuid::Uuid::new_v4().simple()));
    let write = || -> io::Result<()> {
        fs::write(&tmp, format!("{MARKER_LINE}{FORMAT}\n"))?;
        fs::File::open(&tmp)?.sync_all()?;
        // Another process may have been quicker; its marker says the same.
        fs::rename(&tmp, &marker)?;
        fs::File::open(root)?.sync_all()
    };
    write().with_context(|| format!("cannot write into {}; check its owner, mode and free space", root.display()))
}

fn check_marker(marker: &Path, text: &str) -> anyhow::Result<()> {
    let format = text
        .strip_prefix(MARKER_LINE)
        .and_then(|rest| rest.trim_end().parse::<u32>().ok())
        .with_context(|| format!("{} is not the marker of a blockd bucket", marker.display()))?;
    if format > FORMAT {
        bail!(
            "{} says format {format}, this blockd knows up to {FORMAT}; use the newer blockd that wrote it",
            marker.display()
        );
    }
    Ok(())
}

/// Removes what writers that died left behind. Best effort: what stays only takes space.
fn remove_old_files(tmp: &Path) {
    let Ok(entries) = fs::read_dir(tmp) else {
        return;
    };
    for entry in entries.flatten() {
        let modified = entry.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::now());
        if modified.elapsed().is_ok_and(|age| age > TMP_AGE_MAX) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

fn remove_durably(paths: &[PathBuf]) -> io::Result<()> {
    let mut parents = HashSet::new();
    for path in paths {
        match fs::remove_file(path) {
            Ok(()) => {
                parents.extend(path.parent());
            }
            Err(e) if is_absent(&e) => {}
            Err(e) => return Err(e),
        }
    }
    parents.into_iter().try_for_each(|dir| fs::File::open(dir)?.sync_all())
}

fn check_key(key: &str) -> anyhow::Result<()> {
    for part in key.split('/') {
        if part.is_empty() || part.starts_with('.') || part.len() > 255 || part.contains('\0') {
            bail!(
                "a key is made of parts joined by '/', each of 1 to 255 bytes, not starting with a dot; {part:?} is none"
            );
        }
    }
    Ok(())
}

fn version_of(content: &[u8]) -> Version {
    Version(format!("{:016x}-{:x}", xxh3_64(content), content.len()))
}

/// Runs blocking calls beside the async threads.
async fn blocking<T: Send + 'static>(f: impl FnOnce() -> io::Result<T> + Send + 'static) -> io::Result<T> {
    tokio::task::spawn_blocking(f).await.map_err(io::Error::other)?
}

fn is_absent(error: &io::Error) -> bool {
    // A directory is no object, and neither is anything below a file.
    matches!(error.kind(), ErrorKind::NotFound | ErrorKind::IsADirectory | ErrorKind::NotADirectory)
}

fn io_error(op: &'static str, key: &str, error: io::Error) -> StoreError {
    let kind = match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => StoreErrorKind::NoSpace,
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => StoreErrorKind::Denied,
        ErrorKind::InvalidFilename => StoreErrorKind::Invalid,
        // A part of the key is an object, or the key is a directory of objects.
        ErrorKind::NotADirectory | ErrorKind::IsADirectory | ErrorKind::AlreadyExists if op == "put" => {
            StoreErrorKind::Invalid
        }
        ErrorKind::NotFound if op == "put" => StoreErrorKind::Unavailable,
        _ if is_absent(&error) => StoreErrorKind::NotFound,
        _ => StoreErrorKind::Unavailable,
    };
    StoreError::new(kind, op, key, error)
}
