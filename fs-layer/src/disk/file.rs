//! A regular file or a block device as the disk.
//!
//! What is small goes through the page cache of the host; large reads and writes from aligned memory go past it (O_DIRECT), where the file can
//! do that: files' contents are cached above already. All of it becomes durable with fdatasync(2). A regular file is sparse: its length is the
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

/// From so many bytes on, going past the page cache of the host is worth waiting for the disk.
const DIRECT_BYTES_MIN: usize = 128 << 10;
/// The most pieces that one pwritev(2) takes.
const PARTS_MAX: usize = 1024;

/// See the module.
pub struct FileDisk {
    file: File,
    /// The same past the page cache, if the file can do that.
    direct: Option<File>,
    blocks: u64,
}

impl FileDisk {
    /// Opens a file or device that exists.
    pub fn open(path: &Path, read_only: bool) -> io::Result<FileDisk> {
        let mut file = OpenOptions::new().read(true).write(!read_only).custom_flags(libc::O_CLOEXEC).open(path)?;
        lock(&file, path, read_only)?;
        let bytes = file.seek(SeekFrom::End(0))?;
        let direct = open_direct(path, read_only);
        Ok(FileDisk { file, direct, blocks: bytes / BLOCK_BYTES as u64 })
    }

    /// Makes a sparse file of so many bytes, which must not exist.
    pub fn create(path: &Path, bytes: u64) -> io::Result<FileDisk> {
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
        lock(&file, path, false)?;
        file.set_len(bytes)?;
        Ok(FileDisk { file, direct: open_direct(path, false), blocks: bytes / BLOCK_BYTES as u64 })
    }

    /// The file past the page cache, for so many bytes at once.
    fn direct(&self, bytes: usize) -> Option<&File> {
        self.direct.as_ref().filter(|_| bytes >= DIRECT_BYTES_MIN)
    }

    /// Writes parts that follow each other.
    fn write_run(&self, at: BlockAddress, parts: &[&[u8]]) -> io::Result<()> {
        let mut offset = byte(at)?;
        let mut rest = parts;
        while !rest.is_empty() {
            let (count, pieces) = pieces(rest);
            let (now, later) = rest.split_at(count);
            let bytes: usize = now.iter().map(|part| part.len()).sum();
            let aligned = now.iter().all(|part| is_aligned(part.as_ptr()));
            let direct = self.direct(bytes).filter(|_| aligned);
            // What is left, or all of it where the file takes no such request, goes the other way.
            let done = match direct.map(|file| write_vectored_at(file, &pieces, offset)) {
                Some(Err(error)) if !is_refusal(&error) => return Err(error),
                Some(Ok(done)) => done,
                _ => 0,
            };
            self.write_rest(now, offset, done)?;
            offset += bytes as u64;
            rest = later;
        }
        Ok(())
    }

    /// Writes what follows the first `done` bytes of parts that begin at `offset`.
    fn write_rest(&self, parts: &[&[u8]], offset: u64, mut done: usize) -> io::Result<()> {
        let mut offset = offset;
        for part in parts {
            let skip = done.min(part.len());
            done -= skip;
            if skip < part.len() {
                self.file.write_all_at(&part[skip..], offset + skip as u64)?;
            }
            offset += part.len() as u64;
        }
        Ok(())
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

fn open_direct(path: &Path, read_only: bool) -> Option<File> {
    let flags = libc::O_CLOEXEC | libc::O_DIRECT;
    OpenOptions::new().read(true).write(!read_only).custom_flags(flags).open(path).ok()
}

fn is_aligned(memory: *const u8) -> bool {
    memory.addr().is_multiple_of(BLOCK_BYTES)
}

/// Whether a file can't be read or written this way at all.
fn is_refusal(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP))
}

/// How many of these parts one pwritev(2) takes, and what it is given: parts that follow each other in memory are one piece.
fn pieces(parts: &[&[u8]]) -> (usize, Vec<libc::iovec>) {
    let mut pieces: Vec<libc::iovec> = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        let count = pieces.len();
        match pieces.last_mut() {
            Some(last) if last.iov_base.addr() + last.iov_len == part.as_ptr().addr() => last.iov_len += part.len(),
            _ if count == PARTS_MAX => return (index, pieces),
            _ => pieces.push(libc::iovec { iov_base: part.as_ptr().cast_mut().cast(), iov_len: part.len() }),
        }
    }
    (parts.len(), pieces)
}

/// Returns how many bytes were written. The pieces are of slices that the caller holds.
fn write_vectored_at(file: &File, parts: &[libc::iovec], offset: u64) -> io::Result<usize> {
    loop {
        // SAFETY: the vectors point to slices that outlive the call, which only reads them; the kernel reads a piece of several as one.
        let done = unsafe { libc::pwritev(file.as_raw_fd(), parts.as_ptr(), parts.len() as i32, offset as i64) };
        if let Ok(done) = usize::try_from(done) {
            return Ok(done);
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
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
        let offset = byte(at)?;
        let direct = self.direct(buffer.len()).filter(|_| is_aligned(buffer.as_ptr()));
        match direct.map(|file| file.read_exact_at(buffer, offset)) {
            Some(Ok(())) => Ok(()),
            Some(Err(error)) if !is_refusal(&error) => Err(error),
            _ => self.file.read_exact_at(buffer, offset),
        }
    }

    fn write(&self, at: BlockAddress, data: &[u8]) -> io::Result<()> {
        self.file.write_all_at(data, byte(at)?)
    }

    fn write_parts(&self, runs: &[(BlockAddress, Vec<&[u8]>)]) -> io::Result<()> {
        runs.iter().try_for_each(|(at, parts)| self.write_run(*at, parts))
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

    /// Where a sparse file has no block, the filesystem that it is on has to find one, and to make that durable with the data.
    fn lay_out(&self, at: BlockAddress, count: u64) -> io::Result<()> {
        if self.file.metadata()?.is_file() { self.write_zeros(at, count) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::file::Page;

    #[test]
    fn what_is_laid_out_takes_space_and_is_zeros() {
        use std::os::unix::fs::MetadataExt;
        let dir = tempfile::tempdir().unwrap();
        let disk = FileDisk::create(&dir.path().join("disk"), 64 << 20).unwrap();
        disk.lay_out(300, 1000).unwrap();
        disk.flush().unwrap();
        let taken = disk.file.metadata().unwrap().blocks() * 512;
        assert!((1000 * BLOCK_BYTES as u64..1100 * BLOCK_BYTES as u64).contains(&taken), "{taken} bytes");
        let mut buffer = vec![1; BLOCK_BYTES * 1000];
        disk.read(300, &mut buffer).unwrap();
        assert!(buffer.iter().all(|byte| *byte == 0));
    }

    #[test]
    fn parts_are_written_where_they_belong_whatever_their_number() {
        let dir = tempfile::tempdir().unwrap();
        let disk = FileDisk::create(&dir.path().join("disk"), 64 << 20).unwrap();
        // With every second page, hardly any follow each other in memory.
        for (count, step) in [(1, 1), (3, 1), (32, 1), (PARTS_MAX as u64 + 5, 1), (PARTS_MAX as u64 + 5, 2)] {
            let step_by = step as usize;
            let pages: Vec<Page> =
                (0..count * step).map(|n| Page::of(&[(n / step % 251) as u8 + 1; BLOCK_BYTES])).collect();
            let parts: Vec<&[u8]> = pages.iter().step_by(step_by).map(|page| &page[..]).collect();
            disk.write_parts(&[(7, parts), (5000, vec![&pages[0][..]])]).unwrap();
            let mut buffer = vec![0; BLOCK_BYTES * count as usize];
            disk.read(7, &mut buffer).unwrap();
            for (n, block) in buffer.chunks(BLOCK_BYTES).enumerate() {
                assert!(block.iter().all(|byte| *byte == (n % 251) as u8 + 1), "block {n} of {count}");
            }
        }
        // Large and aligned, past the page cache, sees what went through it.
        disk.write(7, &[99; BLOCK_BYTES]).unwrap();
        let mut buffer = blockd::buf::AlignedBuf::for_overwrite(1 << 20);
        disk.read(7, &mut buffer).unwrap();
        assert!(buffer[..BLOCK_BYTES].iter().all(|byte| *byte == 99) && buffer[BLOCK_BYTES] == 2);
        disk.flush().unwrap();
    }
}
