//! The tree on the disk: [`Vfs`](super::Vfs) as the exports see it.
//!
//! Each operation takes the locks of its inodes in the order that [`crate::lock`] gives, checks everything that can be checked, collects its
//! changes in one [`Tx`] and publishes that: so it happened as a whole, or not at all, also for a crash. Where something takes
//! several transactions (cutting or freeing a long file), its number stands in the orphan directory from the first to the last of them, and
//! opening finishes what was left.

mod attributes;
mod clone;
mod contents;
pub(crate) mod file_locks;
mod implement;
mod names;
mod noting;
mod orphans;
mod permission;
mod rename;
mod truncate;
mod write_back;
mod xattrs;

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use file_locks::FileLocks;

use super::{FileKind, FsStat, Ino, Result, Time, VfsError};
use crate::alloc::Allocator;
use crate::disk::{BLOCK_BYTES, Disk, OverlayDisk};
use crate::file::PageCache;
use crate::inode::Inode;
use crate::journal::{Counts, Journal, Replayed, Tx, is_settled, replay};
use crate::layout::{FIRST_FREE_INO, Geometry, load_superblock};
use crate::lock::{LocalLocks, LockGuard, LockManager, LockMode};
use crate::mutex::lock;

/// The host slot of a filesystem with one host.
const SLOT: u64 = 0;

/// How a filesystem is opened.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Whether nothing may be changed, on the disk either: what the journal holds is replayed in memory.
    pub read_only: bool,
    /// Bytes for metadata blocks in memory.
    pub metadata_bytes: usize,
    /// Bytes for the contents of files in memory.
    pub page_bytes: usize,
    /// How often changes that nobody waits for are made durable; `None`: never by itself.
    pub commit_every: Option<Duration>,
    /// Whether reads update access times, as relatime does.
    pub access_times: bool,
    /// Whether what large reads bring, and long writes leave, is kept in memory. Not where the system of those who read and write keeps it.
    pub keeps_read: bool,
    /// Whether files without names that were held when the last run ended wait for [`Vfs::end_recovery`](crate::vfs::Vfs::end_recovery),
    /// and can be held again until then. Otherwise they are freed at once.
    pub recovers_holds: bool,
}

impl Default for OpenOptions {
    fn default() -> OpenOptions {
        OpenOptions {
            read_only: false,
            metadata_bytes: 256 << 20,
            page_bytes: 512 << 20,
            commit_every: Some(Duration::from_secs(5)),
            access_times: true,
            keeps_read: true,
            recovers_holds: false,
        }
    }
}

/// What goes on inside, for people.
#[derive(Clone, Debug)]
pub struct FilesystemStatus {
    /// Blocks and files stored.
    pub counts: Counts,
    /// Pages that were written and are not on the disk.
    pub dirty_pages: usize,
    /// Blocks of data that are durable in the journal only, until they are brought home.
    pub journaled_blocks: usize,
    /// What replay found when it was opened.
    pub replayed: Option<Replayed>,
    /// Files held open.
    pub held_files: usize,
}

/// See the module.
pub struct Filesystem {
    geometry: Geometry,
    journal: Arc<Journal>,
    allocator: Allocator,
    locks: Box<dyn LockManager>,
    pages: PageCache,
    /// Who writes a file back; taken before the file's lock.
    write_backs: LocalLocks,
    /// Taken shared by writes that were accepted and are not in the page cache yet, alone by who wants all of them there.
    accepting: RwLock<()>,
    held: Mutex<HashMap<Ino, u64>>,
    file_locks: FileLocks,
    verifier: Mutex<[u8; 8]>,
    options: OpenOptions,
    replayed: Option<Replayed>,
    background: Mutex<Vec<JoinHandle<()>>>,
    /// Files that the background is to write back now.
    soon: Soon,
    stop: Arc<(Mutex<bool>, Condvar)>,
    closed: AtomicBool,
    /// Files without names that nobody holds may still be asked for.
    recovering: AtomicBool,
}

impl Filesystem {
    /// Opens a filesystem: replays its journal, and frees what no name and nobody holds any more.
    ///
    /// # Errors
    /// [`VfsError::Io`] if the disk fails, there is no filesystem, or what must be sound is damaged.
    pub fn open(disk: Arc<dyn Disk>, options: &OpenOptions) -> Result<Arc<Filesystem>> {
        let geometry = load_superblock(&*disk)?;
        let (disk, replayed): (Arc<dyn Disk>, _) = match options.read_only {
            false => {
                let replayed = replay(&*disk, &geometry, SLOT)?;
                (disk, replayed)
            }
            true if is_settled(&*disk, &geometry, SLOT)? => (disk, Replayed::none()),
            true => {
                let overlay = Arc::new(OverlayDisk::new(disk));
                let replayed = replay(&*overlay, &geometry, SLOT)?;
                (overlay, replayed)
            }
        };
        let journal = Arc::new(Journal::open(disk.clone(), geometry, SLOT, &replayed, options.metadata_bytes)?);
        let filesystem = Arc::new(Filesystem {
            geometry,
            journal,
            allocator: Allocator::open(disk, geometry)?,
            locks: Box::new(LocalLocks::default()),
            pages: PageCache::new(options.page_bytes),
            write_backs: LocalLocks::default(),
            accepting: RwLock::default(),
            held: Mutex::default(),
            file_locks: FileLocks::default(),
            verifier: Mutex::new(rand::random()),
            options: options.clone(),
            replayed: (!options.read_only).then_some(replayed),
            background: Mutex::default(),
            soon: Soon::default(),
            stop: Arc::default(),
            closed: AtomicBool::new(false),
            recovering: AtomicBool::new(options.recovers_holds && !options.read_only),
        });
        if !options.read_only {
            filesystem.reap_orphans(!options.recovers_holds)?;
            if let Some(every) = options.commit_every {
                filesystem.clone().start_background(every);
            }
        }
        Ok(filesystem)
    }

    /// Makes everything durable, brings it home and empties the journal. Nothing may be called after it.
    ///
    /// # Errors
    /// [`VfsError::Io`] if the disk fails: what was not durable may be lost.
    pub fn close(&self) -> Result<()> {
        self.stop_background();
        if self.options.read_only || self.closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        self.write_back_all()?;
        self.journal.settle()
    }

    /// What goes on inside.
    pub fn status(&self) -> FilesystemStatus {
        FilesystemStatus {
            counts: self.journal.counts(),
            dirty_pages: self.pages.dirty_pages(),
            journaled_blocks: self.journal.contents_away(),
            replayed: self.replayed.clone(),
            held_files: lock(&self.held).len(),
        }
    }

    fn start_background(self: Arc<Self>, every: Duration) {
        let stop = self.stop.clone();
        let weak = Arc::downgrade(&self);
        self.spawn("fs-commit", move || run_background(&weak, &stop, every));
        let (weak, queue) = (Arc::downgrade(&self), self.soon.clone());
        if self.spawn("fs-write", move || run_writer(&weak, &queue)) {
            lock(&self.soon.0).runs = true;
        }
        let journal = self.journal.clone();
        self.spawn("fs-discard", move || journal.run_discards());
        let journal = self.journal.clone();
        self.spawn("fs-ahead", move || journal.run_ahead());
    }

    fn spawn(&self, name: &str, run: impl FnOnce() + Send + 'static) -> bool {
        let spawned = std::thread::Builder::new().name(name.into()).spawn(run);
        match spawned {
            Ok(thread) => lock(&self.background).push(thread),
            Err(e) => {
                tracing::warn!("no thread for the background: {e}; changes wait for fsync");
                return false;
            }
        }
        true
    }

    fn stop_background(&self) {
        *lock(&self.stop.0) = true;
        self.stop.1.notify_all();
        lock(&self.soon.0).ended = true;
        self.soon.1.notify_all();
        self.journal.end_discards();
        self.journal.end_ahead();
        for thread in std::mem::take(&mut *lock(&self.background)) {
            if thread.thread().id() != std::thread::current().id() {
                // It only ever ends by returning.
                let _ = thread.join();
            }
        }
    }

    /// Has the background write a file back, if there is one.
    fn write_soon(&self, ino: Ino) {
        let mut soon = lock(&self.soon.0);
        if soon.runs && !soon.files.contains(&ino) {
            soon.files.push_back(ino);
            drop(soon);
            self.soon.1.notify_one();
        }
    }

    /// What the background does: writes back and commits, so that little is lost that nobody waited for.
    ///
    /// # Errors
    /// [`VfsError::Io`] if the disk failed.
    pub fn tick(&self) -> Result<()> {
        self.write_back_all()?;
        self.journal.commit_all()
    }

    fn lock(&self, ino: Ino, mode: LockMode) -> Result<LockGuard<'_>> {
        LockGuard::new(&*self.locks, ino, mode)
    }

    fn shared(&self, ino: Ino) -> Result<LockGuard<'_>> {
        self.lock(ino, LockMode::Shared)
    }

    fn exclusive(&self, ino: Ino) -> Result<LockGuard<'_>> {
        self.lock(ino, LockMode::Exclusive)
    }

    /// A file of the tree; its lock is held.
    fn load(&self, ino: Ino) -> Result<Inode> {
        if ino != super::ROOT && ino.0 < FIRST_FREE_INO {
            return Err(VfsError::Stale);
        }
        Inode::load(&self.journal, ino)
    }

    fn load_directory(&self, ino: Ino) -> Result<Inode> {
        let inode = self.load(ino)?;
        if inode.kind() == Some(FileKind::Directory) { Ok(inode) } else { Err(VfsError::NotDirectory) }
    }

    /// Begins an operation that changes something, before it takes locks.
    fn begin(&self) -> Result<()> {
        if self.options.read_only {
            return Err(VfsError::ReadOnly);
        }
        self.journal.make_room()
    }

    fn tx(&self) -> Tx<'_> {
        Tx::new(&self.journal, &self.allocator)
    }

    fn is_held(&self, ino: Ino) -> bool {
        lock(&self.held).contains_key(&ino)
    }

    /// Fails if so much more does not fit: before data is taken into memory, so that writing it back does not fail later.
    fn check_space(&self, blocks: u64, files: u64) -> Result<()> {
        let counts = self.journal.counts();
        let used = counts.blocks.max(0) as u64 + self.pages.unplaced_pages() as u64;
        let quota = self.geometry.quota_bytes / BLOCK_BYTES as u64;
        if quota > 0 && used + blocks > quota {
            return Err(VfsError::Quota);
        }
        if self.geometry.quota_files > 0 && counts.files.max(0) as u64 + files > self.geometry.quota_files {
            return Err(VfsError::Quota);
        }
        // Doubling ranges and metadata need some more.
        if blocks > 0 && self.allocator.free_blocks() < 2 * (blocks + self.pages.unplaced_pages() as u64) {
            return Err(VfsError::NoSpace);
        }
        Ok(())
    }

    fn stat(&self) -> FsStat {
        let counts = self.journal.counts();
        let used = counts.blocks.max(0) as u64;
        let free = self.allocator.free_blocks();
        let (total, free) = match self.geometry.quota_bytes / BLOCK_BYTES as u64 {
            0 => (used + free, free),
            quota => (quota, quota.saturating_sub(used).min(free)),
        };
        let files = counts.files.max(0) as u64;
        let files_total = match self.geometry.quota_files {
            0 => self.geometry.inode_count,
            quota => quota,
        };
        FsStat {
            id: self.geometry.uuid,
            bytes_total: total.saturating_mul(BLOCK_BYTES as u64),
            bytes_free: free.saturating_mul(BLOCK_BYTES as u64),
            files_total,
            files_free: files_total.saturating_sub(files),
            read_only: self.options.read_only,
        }
    }
}

impl Drop for Filesystem {
    fn drop(&mut self) {
        self.stop_background();
    }
}

/// Files that are to be written back, and a word when there are some, or no more will be.
type Soon = Arc<(Mutex<Files>, Condvar)>;

#[derive(Default)]
struct Files {
    files: VecDeque<Ino>,
    /// Whether a thread takes them.
    runs: bool,
    ended: bool,
}

fn run_writer(weak: &Weak<Filesystem>, soon: &Soon) {
    loop {
        let ino = {
            let mut files = lock(&soon.0);
            loop {
                if files.ended {
                    return;
                }
                match files.files.pop_front() {
                    Some(ino) => break ino,
                    None => files = soon.1.wait(files).unwrap_or_else(PoisonError::into_inner),
                }
            }
        };
        let Some(filesystem) = weak.upgrade() else { return };
        if let Err(e) = filesystem.write_back_most(ino) {
            tracing::warn!(ino = ino.0, "data could not be written to the disk: {e}; it stays in memory");
        }
    }
}

fn run_background(weak: &Weak<Filesystem>, stop: &(Mutex<bool>, Condvar), every: Duration) {
    loop {
        let next = Instant::now() + every;
        let mut stopped = lock(&stop.0);
        while !*stopped && Instant::now() < next {
            let left = next.saturating_duration_since(Instant::now());
            (stopped, _) = stop.1.wait_timeout(stopped, left).unwrap_or_else(PoisonError::into_inner);
        }
        if *stopped {
            return;
        }
        drop(stopped);
        let Some(filesystem) = weak.upgrade() else { return };
        if let Err(e) = filesystem.tick() {
            tracing::warn!("what nobody waited for could not be made durable: {e}");
        }
    }
}

/// The kind in a directory's entry.
pub(crate) fn kind_code(kind: FileKind) -> u8 {
    match kind {
        FileKind::File => 1,
        FileKind::Directory => 2,
        FileKind::Symlink => 3,
        FileKind::Fifo => 4,
        FileKind::Socket => 5,
        FileKind::CharDevice => 6,
        FileKind::BlockDevice => 7,
    }
}

fn kind_of(code: u8) -> Result<FileKind> {
    Ok(match code {
        1 => FileKind::File,
        2 => FileKind::Directory,
        3 => FileKind::Symlink,
        4 => FileKind::Fifo,
        5 => FileKind::Socket,
        6 => FileKind::CharDevice,
        7 => FileKind::BlockDevice,
        _ => return Err(VfsError::Io(format!("a directory names a file of unknown kind {code}; run `fsd check`"))),
    })
}

fn now() -> Time {
    Time::now()
}
