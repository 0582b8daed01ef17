//! A regular file or a block device as the disk.
//!
//! Writes go through the page cache of the host and become durable with fdatasync(2). A regular file is sparse: its length is the
//! size of the disk, and what is discarded becomes a hole. A file that another process has open to write is refused: two filesystems on
//! one disk destroy each other.

use std::fs::{File, OpenOptions};
use std::io::{self, Seek, SeekFrom};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use super::{BLOCK_BYTES, BlockAddress, Disk};

/// The most that one fallocate(2) is asked to discard, in bytes.
const DISCARD_BYTES_MAX: u64 = 1 << 40;

/// See the module.
pub struct FileDisk {
    file: File,
    blocks: u64,
}

impl FileDisk {
    /// Opens a file or device that exists.
    pub fn open(path: &Path, read_only: bool) -> io::Result<FileDisk> {
        let mut file = OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_CLOEXEC).open(path)?;
        lock(&file, path, read_only)?;
        let bytes = file.seek(SeekFrom::End(0))?;
        Ok(FileDisk { file, blocks: bytes / BLOCK_BYTES as u64 })
    }

    /// Makes a sparse file of so many bytes, which must not exist.
    pub fn create(path: &Path, bytes: u64) -> io::Result<FileDisk> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        lock(&file, path, false)?;
        file.set_len(bytes)?;
        Ok(FileDisk { file, blocks: bytes / BLOCK_BYTES as u64 })
    }

    fn write_zeros(&self, at: BlockAddress, count: u64) -> io::Result<()> {
        let zeros = vec![0; BLOCK_BYTES * count.min(256) as usize];
        let mut done = 0;
        while done < count {
            let now = (count - done).min(256);
            self.write(at + done, &zeros[..now as usize * BLOCK_BYTES])?;
            done += now;
        }
        Ok(())
    }
}

fn lock(file: &File, path: &Path, shared: bool) -> io::Result<()> {
    let how = if shared { libc::LOCK_SH } else { libc::LOCK_EX };
    // SAFETY: the descriptor is open as long as `file` lives, and no memory is passed.
    if unsafe { libc::flock(file.as_raw_fd(), how | libc::LOCK_NB) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.kind() {
        io::ErrorKind::WouldBlock => Err(io::Error::new(
            io::ErrorKind::ResourceBusy,
            format!("{} is in use: another filesystem, or a check, has it open", path.display()),
        )),
        _ => Err(error),
    }
}

fn byte(at: BlockAddress) -> io::Result<u64> {
    at.checked_mul(BLOCK_BYTES as u64).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

impl Disk for FileDisk {
    fn blocks(&self) -> u64 {
        self.blocks
    }

    fn read(&self, at: BlockAddress, buffer: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(buffer, byte(at)?)
    }

    fn write(&self, at: BlockAddress, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, byte(at)?)
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn discard(&self, at: BlockAddress, count: u64) -> io::Result<()> {
        let (mut from, end) = (byte(at)?, byte(at + count)?);
        while from < end {
            let now = (end - from).min(DISCARD_BYTES_MAX);
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            // SAFETY: the descriptor is open as long as `self.file` lives, and no memory is passed.
            let failed = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, from as i64, now as i64) } != 0;
            if failed {
                let error = io::Error::last_os_error();
                if error.raw_os_error() != Some(libc::EOPNOTSUPP) {
                    return Err(error);
                }
                self.write_zeros(from / BLOCK_BYTES as u64, now / BLOCK_BYTES as u64)?;
            }
            from += now;
        }
        Ok(())
    }
}
