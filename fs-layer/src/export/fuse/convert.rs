//! Between the words of FUSE and those of the tree.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use fuser::{Errno, FileAttr, FileType, INodeNo, TimeOrNow};

use crate::disk::BLOCK_BYTES;
use crate::vfs::{Attributes, FileKind, SetTime, Time, VfsError};

/// The error number a request is answered with.
pub(super) fn errno(error: &VfsError) -> Errno {
    Errno::from_i32(error.errno())
}

pub(super) fn file_type(kind: FileKind) -> FileType {
    match kind {
        FileKind::File => FileType::RegularFile,
        FileKind::Directory => FileType::Directory,
        FileKind::Symlink => FileType::Symlink,
        FileKind::Fifo => FileType::NamedPipe,
        FileKind::Socket => FileType::Socket,
        FileKind::CharDevice => FileType::CharDevice,
        FileKind::BlockDevice => FileType::BlockDevice,
    }
}

/// The kind that the format bits of a mode name, of those mknod can make.
pub(super) fn kind_of_mode(mode: u32) -> Option<FileKind> {
    match mode & libc::S_IFMT {
        libc::S_IFREG | 0 => Some(FileKind::File),
        libc::S_IFIFO => Some(FileKind::Fifo),
        libc::S_IFSOCK => Some(FileKind::Socket),
        libc::S_IFCHR => Some(FileKind::CharDevice),
        libc::S_IFBLK => Some(FileKind::BlockDevice),
        _ => None,
    }
}

/// Major and minor as the kernel packs them: 12 bits of major between the 8 low and the 12 high of minor.
pub(super) fn pack_device((major, minor): (u32, u32)) -> u32 {
    (minor & 0xff) | (major & 0xfff) << 8 | (minor & 0xf_ff00) << 12
}

pub(super) fn unpack_device(packed: u32) -> (u32, u32) {
    ((packed >> 8) & 0xfff, (packed & 0xff) | (packed >> 12) & 0xf_ff00)
}

pub(super) fn attributes(of: &Attributes) -> FileAttr {
    FileAttr {
        ino: INodeNo(of.ino.0),
        size: of.size,
        blocks: of.stored_bytes.div_ceil(512),
        atime: system_time(of.accessed),
        mtime: system_time(of.modified),
        ctime: system_time(of.changed),
        crtime: system_time(of.made),
        kind: file_type(of.kind),
        perm: (of.mode & 0o7777) as u16,
        nlink: of.links,
        uid: of.uid,
        gid: of.gid,
        rdev: pack_device(of.device),
        blksize: BLOCK_BYTES as u32,
        flags: 0,
    }
}

/// What a name is answered with that is not there.
pub(super) fn nothing() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

fn system_time(time: Time) -> SystemTime {
    let (seconds, nanoseconds) = time.parts();
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let at = if seconds < 0 { UNIX_EPOCH.checked_sub(whole) } else { UNIX_EPOCH.checked_add(whole) };
    at.and_then(|at| at.checked_add(Duration::from_nanos(nanoseconds.into()))).unwrap_or(UNIX_EPOCH)
}

/// A time to set. Before 1970 `fuser` takes the nanoseconds off where the kernel means them to be added; this puts it right.
pub(super) fn set_time(time: TimeOrNow) -> SetTime {
    let at = match time {
        TimeOrNow::Now => return SetTime::Now,
        TimeOrNow::SpecificTime(at) => at,
    };
    SetTime::At(match at.duration_since(UNIX_EPOCH) {
        Ok(since) => Time::from_parts(since.as_secs() as i64, since.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            Time::from_parts(-(before.as_secs() as i64), before.subsec_nanos())
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_numbers_come_back() {
        for device in [(0, 0), (8, 1), (259, 3), (0xfff, 0xf_ffff), (1, 0x12345)] {
            assert_eq!(unpack_device(pack_device(device)), device);
        }
        // What `mknod c 259 300` gives the kernel.
        assert_eq!(pack_device((259, 300)), 0x0011_032c);
    }

    #[test]
    fn times_before_1970_keep_their_fraction() {
        let time = Time::from_parts(-2, 250_000_000);
        assert_eq!(UNIX_EPOCH.duration_since(system_time(time)).unwrap(), Duration::from_millis(1750));
        let as_fuser_reads_it = UNIX_EPOCH - Duration::new(2, 250_000_000);
        assert_eq!(set_time(TimeOrNow::SpecificTime(as_fuser_reads_it)), SetTime::At(time));
    }
}
