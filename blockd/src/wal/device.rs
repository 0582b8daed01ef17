//! The log device: numbered segment files of one fixed size.
//!
//! Blocking calls, used to open and recover a log and to read old payload back. The hot path writes through
//! [`crate::reactor`], which asks only for the file descriptor.

use std::collections::HashMap;
use std::fmt::Debug;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, RwLock};

use crate::buf::AlignedBuf;
use crate::types::BLOCK_SIZE;

/// Where a volume's log lives.
pub trait LogDevice: Debug + Send + Sync {
    /// Size of every segment, in bytes.
    fn segment_bytes(&self) -> u64;
    /// Numbers of the segments that exist, ascending.
    fn segments(&self) -> Vec<u32>;
    /// Makes a segment that reads as zeroes, durably, so that later writes change no file metadata.
    fn create(&self, segment: u32) -> io::Result<()>;
    /// Fills `buf` from `offset`, both block aligned.
    fn read(&self, segment: u32, offset: u64, buf: &mut AlignedBuf) -> io::Result<()>;
    /// Writes whole blocks. Durable only after [`LogDevice::sync`].
    fn write(&self, segment: u32, offset: u64, buf: &AlignedBuf) -> io::Result<()>;
    /// Makes everything written to the segment durable.
    fn sync(&self, segment: u32) -> io::Result<()>;
    /// The file descriptor, for drivers that do their own I/O.
    fn fd(&self, segment: u32) -> Option<RawFd>;
    /// Where it is, for messages.
    fn describe(&self, segment: u32) -> String;
}

/// A directory of segment files, opened with O_DIRECT.
#[derive(Debug)]
pub struct FileLog {
    dir: PathBuf,
    segment_bytes: u64,
    files: RwLock<HashMap<u32, Arc<File>>>,
}

impl FileLog {
    /// Opens the log in `dir`, which is made when absent. Left-overs of an interrupted [`LogDevice::create`] are removed.
    ///
    /// # Errors
    /// `InvalidData` when a segment has another size, `Unsupported` when the file system refuses O_DIRECT.
    pub fn open(dir: &Path, segment_bytes: u64) -> io::Result<Self> {
        assert!(segment_bytes.is_multiple_of(BLOCK_SIZE), "segments are whole blocks");
        fs::create_dir_all(dir)?;
        let mut files = HashMap::new();
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if name.ends_with(".tmp") {
                fs::remove_file(&path)?;
            } else if let Some(number) = name.strip_suffix(".seg").and_then(|n| n.parse().ok()) {
                let file = Self::open_direct(&path)?;
                let size = file.metadata()?.len();
                if size != segment_bytes {
                    return Err(io::Error::new(
                        io::ErrorKind::InvalidData,
                        format!(
                            "log segment {} has {size} bytes instead of {segment_bytes}; it was truncated, or the \
                             segment size was changed in the configuration",
                            path.display()
                        ),
                    ));
                }
                // Changes nothing, for the space is taken, but waits for direct writes that are under way: a process that was
                // killed answered its clients once the kernel was at work on their writes, and is gone before they end.
                reserve(&file, size)?;
                files.insert(number, Arc::new(file));
            }
        }
        Ok(Self { dir: dir.to_owned(), segment_bytes, files: RwLock::new(files) })
    }

    /// Opens the log in `dir` to look at it, changing nothing; none when there is none. The segments' size is what they
    /// have.
    ///
    /// # Errors
    /// When it cannot be read, or the segments differ in size.
    pub fn look(dir: &Path) -> io::Result<Option<Self>> {
        let entries = match fs::read_dir(dir) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            other => other?,
        };
        let (mut files, mut sizes) = (HashMap::new(), Vec::new());
        for entry in entries {
            let path = entry?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if let Some(number) = name.strip_suffix(".seg").and_then(|n| n.parse().ok()) {
                let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(&path)?;
                sizes.push(file.metadata()?.len());
                files.insert(number, Arc::new(file));
            }
        }
        let Some(&segment_bytes) = sizes.first() else { return Ok(None) };
        if segment_bytes == 0 || !segment_bytes.is_multiple_of(BLOCK_SIZE) || sizes.iter().any(|s| *s != segment_bytes)
        {
            let why = format!("the log segments in {} are not all of one size", dir.display());
            return Err(io::Error::new(io::ErrorKind::InvalidData, why));
        }
        Ok(Some(Self { dir: dir.to_owned(), segment_bytes, files: RwLock::new(files) }))
    }

    fn path(&self, segment: u32) -> PathBuf {
        self.dir.join(format!("{segment:08}.seg"))
    }

    fn open_direct(path: &Path) -> io::Result<File> {
        OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).map_err(|e| {
            if e.raw_os_error() == Some(libc::EINVAL) {
                io::Error::new(
                    io::ErrorKind::Unsupported,
                    format!(
                        "{}: this file system refuses O_DIRECT, so durable writes cannot be promised; put the data \
                         directory on a local disk with ext4, xfs or btrfs",
                        path.display()
                    ),
                )
            } else {
                io::Error::new(e.kind(), format!("{}: {e}", path.display()))
            }
        })
    }

    fn file(&self, segment: u32) -> io::Result<Arc<File>> {
        let files = self.files.read().expect("no code panics while it holds this lock");
        files.get(&segment).cloned().ok_or_else(|| {
            io::Error::new(io::ErrorKind::NotFound, format!("{} is missing", self.path(segment).display()))
        })
    }
}

/// Takes the space for a file, where the file system can do that.
fn reserve(file: &File, bytes: u64) -> io::Result<()> {
    let length = bytes.try_into().map_err(io::Error::other)?;
    // SAFETY: fallocate takes no pointers, and the descriptor is open.
    if unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, length) } == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::EINTR)) => Ok(()),
        error => Err(error),
    }
}

impl LogDevice for FileLog {
    fn segment_bytes(&self) -> u64 {
        self.segment_bytes
    }

    fn segments(&self) -> Vec<u32> {
        let files = self.files.read().expect("no code panics while it holds this lock");
        let mut numbers: Vec<u32> = files.keys().copied().collect();
        numbers.sort_unstable();
        numbers
    }

    fn create(&self, segment: u32) -> io::Result<()> {
        let tmp = self.dir.join(format!("{segment:08}.seg.tmp"));
        let result = (|| {
            // Real zeroes, not just reserved space: writing into a reserved extent converts it, which would put a
            // file system journal commit behind every flush.
            let zeroes = AlignedBuf::zeroed(1 << 20);
            {
                // The probe open proves O_DIRECT before 64 MiB are written for nothing.
                File::create(&tmp)?;
                let mut file = Self::open_direct(&tmp)?;
                // Where there is no room for all of it, others should not find the disk full while that is found out.
                reserve(&file, self.segment_bytes)?;
                let mut left = self.segment_bytes;
                while left > 0 {
                    let n = left.min(zeroes.len() as u64);
                    file.write_all(&zeroes[..n as usize])?;
                    left -= n;
                }
                file.sync_all()?;
            }
            let path = self.path(segment);
            fs::rename(&tmp, &path)?;
            File::open(&self.dir)?.sync_all()?;
            Self::open_direct(&path)
        })();
        match result {
            Ok(file) => {
                self.files.write().expect("no code panics while it holds this lock").insert(segment, Arc::new(file));
                Ok(())
            }
            Err(e) => {
                let _ = fs::remove_file(&tmp);
                Err(e)
            }
        }
    }

    fn read(&self, segment: u32, offset: u64, buf: &mut AlignedBuf) -> io::Result<()> {
        self.file(segment)?.read_exact_at(buf, offset)
    }

    fn write(&self, segment: u32, offset: u64, buf: &AlignedBuf) -> io::Result<()> {
        self.file(segment)?.write_all_at(buf, offset)
    }

    fn sync(&self, segment: u32) -> io::Result<()> {
        self.file(segment)?.sync_data()
    }

    fn fd(&self, segment: u32) -> Option<RawFd> {
        self.file(segment).ok().map(|f| f.as_raw_fd())
    }

    fn describe(&self, segment: u32) -> String {
        self.path(segment).display().to_string()
    }
}
