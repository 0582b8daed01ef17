//! Real mounts of a filesystem on a disk in memory, which is checked after each test. Without `/dev/fuse` or the right to mount they say so and pass.

mod snapshots;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::check::{CheckOptions, check};
use crate::disk::MemoryDisk;
use crate::layout::{MkfsOptions, mkfs};
use crate::vfs::{Filesystem, OpenOptions as TreeOptions};

struct Mount {
    dir: tempfile::TempDir,
    disk: Arc<MemoryDisk>,
    filesystem: Arc<Filesystem>,
    mounted: Option<Mounted>,
    stopper: Stopper,
}

impl Mount {
    fn new() -> Option<Mount> {
        Mount::with(&FuseOptions::default())
    }

    fn with(options: &FuseOptions) -> Option<Mount> {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(MemoryDisk::new(1 << 24));
        mkfs(&*disk, &MkfsOptions { journal_blocks: 4096, ..MkfsOptions::default() }).unwrap();
        let filesystem = Filesystem::open(disk.clone(), &TreeOptions::default()).unwrap();
        match mount(filesystem.clone(), dir.path(), options) {
            Ok(mounted) => {
                let stopper = mounted.stopper();
                Some(Mount { dir, disk, filesystem, mounted: Some(mounted), stopper })
            }
            Err(error) => {
                eprintln!("not tested: {error}");
                None
            }
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        self.stopper.unmount().unwrap();
        self.mounted.take().unwrap().wait().unwrap();
        if std::thread::panicking() {
            return;
        }
        assert_eq!(self.filesystem.status().held_files, 0);
        self.filesystem.close().unwrap();
        let report = check(&*self.disk, CheckOptions::default(), &mut |_| {}).unwrap();
        assert!(report.is_clean() && report.orphans == 0, "{report:?}");
    }
}

#[test]
fn names_and_contents_are_there() {
    let Some(mount) = Mount::new() else { return };
    let (a, b) = (mount.path("a"), mount.path("b"));
    fs::write(&a, b"hello").unwrap();
    fs::hard_link(&a, &b).unwrap();
    assert_eq!(fs::metadata(&b).unwrap().nlink(), 2);
    symlink("a", mount.path("l")).unwrap();
    assert_eq!(fs::read(mount.path("l")).unwrap(), b"hello");
    fs::create_dir(mount.path("d")).unwrap();
    fs::rename(&a, mount.path("d/c")).unwrap();
    assert_eq!(fs::metadata(&a).unwrap_err().kind(), io::ErrorKind::NotFound);
    assert_eq!(fs::read(mount.path("d/c")).unwrap(), b"hello");
    let mut names: Vec<_> = fs::read_dir(mount.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    assert_eq!(names, ["b", "d", "l"]);
    assert!(fs::remove_dir(mount.path("d")).is_err());
}

#[test]
fn a_thousand_entries_are_listed_once_each() {
    let Some(mount) = Mount::new() else { return };
    for n in 0..1000 {
        File::create(mount.path(&format!("file with a rather long name, number {n}"))).unwrap();
    }
    let names: std::collections::HashSet<_> =
        fs::read_dir(mount.dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(names.len(), 1000);
    assert_eq!(fs::read_dir(mount.dir.path()).unwrap().count(), 1000);
}

#[test]
fn open_files_outlive_their_names() {
    let Some(mount) = Mount::new() else { return };
    let mut file = OpenOptions::new().create(true).read(true).write(true).truncate(true).open(mount.path("x")).unwrap();
    fs::remove_file(mount.path("x")).unwrap();
    file.write_all(b"still here").unwrap();
    file.seek(SeekFrom::Start(0)).unwrap();
    let mut text = String::new();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "still here");
    assert_eq!(file.metadata().unwrap().nlink(), 0);
}

#[test]
fn appends_of_several_writers_do_not_overwrite() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.path("log");
    std::thread::scope(|scope| {
        for n in 0..4_u8 {
            let path = &path;
            scope.spawn(move || {
                let mut file = OpenOptions::new().create(true).append(true).open(path).unwrap();
                for _ in 0..100 {
                    file.write_all(&[n; 10]).unwrap();
                }
            });
        }
    });
    let data = fs::read(&path).unwrap();
    assert_eq!(data.len(), 4000);
    assert!(data.chunks(10).all(|record| record.iter().all(|byte| *byte == record[0])));
}

#[test]
fn writing_and_owning_take_set_id_bits_away() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.path("x");
    fs::write(&path, b"x").unwrap();
    let set = || fs::set_permissions(&path, fs::Permissions::from_mode(0o6777)).unwrap();
    set();
    std::os::unix::fs::chown(&path, Some(1000), Some(1000)).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o777);
    set();
    let by = |script: &str| {
        Command::new("setpriv")
            .args(["--reuid=1000", "--regid=1000", "--clear-groups", "sh", "-c", script])
            .env("F", &path)
            .stderr(Stdio::null())
            .status()
    };
    fs::set_permissions(mount.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    if !by("echo more >> \"$F\"").is_ok_and(|status| status.success()) {
        return;
    }
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o777);
    set();
    assert!(by(": > \"$F\"").unwrap().success());
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o777);
}

#[test]
fn others_need_permission_and_groups_count() {
    let Some(mount) = Mount::new() else { return };
    fs::set_permissions(mount.dir.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let path = mount.path("x");
    fs::write(&path, b"x").unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(&path, Some(0), Some(4242)).unwrap();
    let read = |groups: &str| {
        Command::new("setpriv")
            .args(["--reuid=1000", "--regid=1000", groups, "cat"])
            .arg(&path)
            .stderr(Stdio::null())
            .output()
    };
    let Ok(refused) = read("--clear-groups") else { return };
    assert!(!refused.status.success());
    assert_eq!(read("--groups=7,4242").unwrap().stdout, b"x");
}

#[test]
fn attributes_come_back_as_set() {
    let Some(mount) = Mount::new() else { return };
    let path = mount.path("x");
    let file = File::create(&path).unwrap();
    let before_1970 = std::time::UNIX_EPOCH - Duration::from_millis(1750);
    file.set_times(fs::FileTimes::new().set_modified(before_1970)).unwrap();
    assert_eq!((file.metadata().unwrap().mtime(), file.metadata().unwrap().mtime_nsec()), (-2, 250_000_000));
    let (path, name, value) = (c_path(&path), c"user.a", b"value");
    // SAFETY: all pointers are to strings that live on.
    unsafe {
        assert_eq!(libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), 5, libc::XATTR_CREATE), 0);
        assert_eq!(libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), 5, libc::XATTR_CREATE), -1);
        assert_eq!(io::Error::last_os_error().raw_os_error(), Some(libc::EEXIST));
        assert_eq!(libc::getxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0), 5);
        assert_eq!(libc::listxattr(path.as_ptr(), std::ptr::null_mut(), 0), 7);
        assert_eq!(libc::removexattr(path.as_ptr(), name.as_ptr()), 0);
        assert_eq!(libc::getxattr(path.as_ptr(), name.as_ptr(), std::ptr::null_mut(), 0), -1);
    }
    let pipe = c_path(&mount.path("p"));
    // SAFETY: a string that lives on.
    assert_eq!(unsafe { libc::mkfifo(pipe.as_ptr(), 0o600) }, 0);
    assert!(fs::metadata(mount.path("p")).unwrap().file_type().is_fifo());
}

#[test]
fn ranges_are_allocated_zeroed_and_copied() {
    let Some(mount) = Mount::new() else { return };
    let open = |name: &str| {
        OpenOptions::new().create(true).truncate(false).read(true).write(true).open(mount.path(name)).unwrap()
    };
    let (a, b) = (open("a"), open("b"));
    a.write_all_at(&[1; 10_000], 0).unwrap();
    // SAFETY: open descriptors.
    unsafe {
        let punch = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        assert_eq!(libc::fallocate(a.as_raw_fd(), punch, 4096, 4096), 0);
        assert_eq!(libc::fallocate(b.as_raw_fd(), 0, 0, 100), 0);
    }
    assert_eq!(b.metadata().unwrap().len(), 100);
    let (mut from, mut to) = (File::open(mount.path("a")).unwrap(), open("c"));
    assert_eq!(io::copy(&mut from, &mut to).unwrap(), 10_000);
    let copied = fs::read(mount.path("c")).unwrap();
    assert_eq!(copied[4095..4097], [1, 0]);
    assert_eq!(copied[8191..8193], [0, 1]);
}

#[test]
fn mapped_memory_is_the_file() {
    let Some(mount) = Mount::new() else { return };
    let file = OpenOptions::new().create(true).truncate(true).read(true).write(true).open(mount.path("m")).unwrap();
    file.write_all_at(b"one two", 0).unwrap();
    // SAFETY: a mapping of one page of an open file, taken away again below.
    unsafe {
        let at = libc::mmap(
            std::ptr::null_mut(),
            4096,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED,
            file.as_raw_fd(),
            0,
        );
        assert_ne!(at, libc::MAP_FAILED);
        let bytes = std::slice::from_raw_parts_mut(at.cast::<u8>(), 7);
        assert_eq!(bytes, b"one two");
        file.write_all_at(b"ONE", 0).unwrap();
        assert_eq!(&bytes[..3], b"ONE");
        bytes[4..].copy_from_slice(b"TWO");
        assert_eq!(libc::msync(at, 4096, libc::MS_SYNC), 0);
        libc::munmap(at, 4096);
    }
    let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(mount.path("m")).unwrap();
    let mut data = [0; 7];
    direct.read_exact_at(&mut data, 0).unwrap();
    assert_eq!(&data, b"ONE TWO");
}

const LOCKER: &str = "
import fcntl, sys, time
f = open(sys.argv[1], 'r+')
fcntl.lockf(f, fcntl.LOCK_EX, 10, int(sys.argv[2]))
print('locked', flush=True)
sys.stdin.readline()
";

fn locker(path: &Path, at: u32) -> std::process::Child {
    let mut python = Command::new("python3");
    python.args(["-c", LOCKER]).arg(path).arg(at.to_string());
    python.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap()
}

fn wait_for_word(child: &mut std::process::Child) {
    let mut word = [0; 7];
    child.stdout.as_mut().unwrap().read_exact(&mut word).unwrap();
}

#[test]
fn locks_wait_and_end_with_their_process() {
    for sharing in [Sharing::Alone, Sharing::Shared] {
        locks_wait_and_end(sharing);
    }
}

fn locks_wait_and_end(sharing: Sharing) {
    let Some(mount) = Mount::with(&FuseOptions { sharing, ..FuseOptions::default() }) else { return };
    let path = mount.path("x");
    fs::write(&path, b"x").unwrap();
    let (mut first, mut apart) = (locker(&path, 0), locker(&path, 100));
    wait_for_word(&mut first);
    wait_for_word(&mut apart);
    let mut second = locker(&path, 5);
    std::thread::sleep(Duration::from_millis(300));
    assert!(second.try_wait().unwrap().is_none());
    first.kill().unwrap();
    first.wait().unwrap();
    wait_for_word(&mut second);
    // One that waits can be killed, though the kernel's interrupts do not reach us.
    let mut third = locker(&path, 5);
    std::thread::sleep(Duration::from_millis(300));
    let start = Instant::now();
    third.kill().unwrap();
    third.wait().unwrap();
    assert!(start.elapsed() < Duration::from_secs(2));
    for mut child in [second, apart] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

fn c_path(path: &Path) -> std::ffi::CString {
    use std::os::unix::ffi::OsStrExt;
    std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap()
}
