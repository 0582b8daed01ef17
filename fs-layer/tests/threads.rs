//! Many threads at once, and what is left afterwards.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use fs_layer::check::{CheckOptions, check};
use fs_layer::disk::{BLOCK_BYTES, Disk, FileDisk, MemoryDisk};
use fs_layer::vfs::*;
use fs_layer::{Filesystem, MkfsOptions, OpenOptions, mkfs};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

fn who() -> Credentials {
    Credentials::system()
}

fn open(disk: &Arc<dyn Disk>) -> Arc<Filesystem> {
    let options =
        OpenOptions { metadata_bytes: 1 << 20, page_bytes: 4 << 20, commit_every: None, ..OpenOptions::default() };
    Filesystem::open(disk.clone(), &options).expect("open")
}

fn one_operation(fs: &Filesystem, random: &mut SmallRng, dirs: &[Ino]) -> Result<()> {
    let dir = dirs[random.random_range(0..dirs.len())];
    let to = dirs[random.random_range(0..dirs.len())];
    let name = [b'a' + random.random_range(0..20u8)];
    let other = [b'a' + random.random_range(0..20u8)];
    let with = NewAttributes { mode: 0o755, ..NewAttributes::default() };
    match random.random_range(0..14) {
        0 | 1 => fs.make(&who(), dir, &name, &Make::File { exclusive: false }, &with).map(drop),
        2 => fs.make(&who(), dir, &name, &Make::Directory, &with).map(drop),
        3 => fs.unlink(&who(), dir, &name).map(drop),
        4 => fs.rmdir(&who(), dir, &name).map(drop),
        5 | 6 => {
            let how = [Rename::Replace, Rename::NoReplace, Rename::Exchange][random.random_range(0..3)];
            fs.rename(&who(), (dir, &name), (to, &other), how).map(drop)
        }
        7 => fs.readdir(&who(), dir, 0, 100).map(drop),
        8 => fs.commit(),
        9 => {
            let ino = fs.lookup(&who(), dir, &name)?.ino;
            fs.hold(ino)?;
            let _ = fs.unlink(&who(), dir, &name);
            let _ = fs.read(ino, 0, 100);
            fs.release(ino);
            Ok(())
        }
        10 => {
            let found = fs.lookup(&who(), dir, &name)?;
            fs.link(&who(), found.ino, to, &other).map(drop)
        }
        _ => {
            let found = fs.lookup(&who(), dir, &name)?;
            if found.kind != FileKind::File {
                return Ok(());
            }
            let len = random.random_range(1..40_000);
            let byte = random.random_range(1..=255u8);
            fs.write(&who(), found.ino, WriteAt::Offset(random.random_range(0..100_000)), &vec![byte; len])?;
            match random.random_range(0..4) {
                0 => fs.fsync(found.ino, false),
                1 => {
                    let set = SetAttributes { size: Some(random.random_range(0..50_000)), ..SetAttributes::default() };
                    fs.setattr(&who(), found.ino, &set, false).map(drop)
                }
                _ => fs.read(found.ino, 0, 200_000).map(drop),
            }
        }
    }
}

#[test]
fn threads_leave_a_sound_filesystem() {
    let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new(1 << 40));
    mkfs(&*disk, &MkfsOptions { journal_blocks: 1024, ..MkfsOptions::default() }).expect("mkfs");
    let fs = open(&disk);
    let mut dirs = vec![ROOT];
    for index in 0..6u8 {
        let parent = dirs[usize::from(index) / 2];
        let with = NewAttributes { mode: 0o755, ..NewAttributes::default() };
        let name = [b'A' + index];
        dirs.push(fs.make(&who(), parent, &name, &Make::Directory, &with).expect("make").attributes.ino);
    }
    let done = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for thread in 0..6 {
            let (fs, dirs, done) = (&fs, &dirs, &done);
            scope.spawn(move || {
                let mut random = SmallRng::seed_from_u64(thread);
                for _ in 0..4000 {
                    match one_operation(fs, &mut random, dirs) {
                        Ok(()) => {
                            done.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(e @ VfsError::Io(_)) => panic!("{e}"),
                        Err(_) => {}
                    }
                }
            });
        }
        scope.spawn(|| {
            for _ in 0..20 {
                std::thread::sleep(std::time::Duration::from_millis(20));
                fs.tick().expect("tick");
            }
        });
    });
    assert!(done.load(Ordering::Relaxed) > 4000);
    fs.close().expect("close");
    let report = check(&*disk, CheckOptions::default(), &mut |_| ()).expect("check");
    assert!(report.is_clean(), "{:#?}", report.problems);
    assert_eq!(report.replayed.map(|_| report.orphans), Some(0));
}

#[test]
fn a_damaged_inode_is_an_error_and_the_rest_goes_on() {
    let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new(1 << 40));
    mkfs(&*disk, &MkfsOptions { journal_blocks: 128, ..MkfsOptions::default() }).expect("mkfs");
    let fs = open(&disk);
    let make = |name: &[u8]| {
        let made = fs.make(&who(), ROOT, name, &Make::File { exclusive: true }, &NewAttributes::default());
        made.expect("make").attributes.ino
    };
    let (sick, well) = (make(b"sick"), make(b"well"));
    fs.write(&who(), well, WriteAt::End, b"fine").expect("write");
    fs.close().expect("close");
    // Inodes begin behind the superblock, the allocator, the host slots and their journals.
    let at = 4 + 64 + 64 * 128 + sick.0;
    let mut block = [0; BLOCK_BYTES];
    disk.read(at, &mut block).expect("read");
    block[200] ^= 1;
    disk.write(at, &block).expect("write");
    let fs = open(&disk);
    let error = fs.getattr(sick).expect_err("it is damaged");
    assert!(error.to_string().contains(&at.to_string()), "{error}");
    assert_eq!(error.errno(), libc::EIO);
    assert_eq!(&fs.read(well, 0, 10).expect("read").data[..], b"fine");
    assert_eq!(fs.readdir(&who(), ROOT, 0, 10).expect("readdir").entries.len(), 2);
    fs.close().expect("close");
    let report = check(&*disk, CheckOptions::default(), &mut |_| ()).expect("check");
    assert!(report.problems.iter().any(|problem| problem.ino == Some(sick)), "{:?}", report.problems);
}

#[test]
fn no_filesystem_and_a_second_one_are_refused() {
    let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new(1 << 40));
    let error = Filesystem::open(disk.clone(), &OpenOptions::default()).err().expect("there is none");
    assert!(error.to_string().contains("fsd mkfs"), "{error}");
    let options = MkfsOptions { journal_blocks: 128, ..MkfsOptions::default() };
    mkfs(&*disk, &options).expect("mkfs");
    assert!(mkfs(&*disk, &options).is_err());
    mkfs(&*disk, &MkfsOptions { force: true, ..options }).expect("mkfs by force");
    assert!(mkfs(&MemoryDisk::new(1000), &MkfsOptions::default()).is_err());
}

#[test]
fn a_file_is_a_disk_for_one_and_is_only_read_while_its_journal_is_full() {
    let dir = tempfile::tempdir().expect("tempdir");
    let path = dir.path().join("disk");
    {
        let disk: Arc<dyn Disk> = Arc::new(FileDisk::create(&path, 1 << 40).expect("create"));
        assert!(FileDisk::open(&path, false).is_err(), "it is in use");
        mkfs(&*disk, &MkfsOptions::default()).expect("mkfs");
        let fs = open(&disk);
        let made = fs.make(&who(), ROOT, b"f", &Make::File { exclusive: true }, &NewAttributes::default());
        let ino = made.expect("make").attributes.ino;
        fs.write(&who(), ino, WriteAt::Offset(0), &[9; 10_000]).expect("write");
        fs.fsync(ino, false).expect("fsync");
    }
    let read = OpenOptions { read_only: true, ..OpenOptions::default() };
    let look = |fs: Arc<Filesystem>| {
        let ino = fs.lookup(&who(), ROOT, b"f").expect("lookup").ino;
        assert_eq!(fs.read(ino, 0, 20_000).expect("read").data, vec![9; 10_000]);
        assert_eq!(fs.write(&who(), ino, WriteAt::End, b"x").expect_err("read-only").errno(), libc::EROFS);
    };
    let changed = || path.metadata().and_then(|found| found.modified()).expect("times of a file");
    let before = changed();
    let disk: Arc<dyn Disk> = Arc::new(FileDisk::open(&path, true).expect("open"));
    look(Filesystem::open(disk, &read).expect("what is in the journal only is seen"));
    assert_eq!(before, changed(), "nothing was written");
    let disk: Arc<dyn Disk> = Arc::new(FileDisk::open(&path, false).expect("open"));
    assert!(check(&*disk, CheckOptions::default(), &mut |_| ()).expect("check").is_clean());
    open(&disk).close().expect("close");
    look(Filesystem::open(disk, &read).expect("the journal is empty"));
}

#[test]
fn a_sync_waits_for_writes_that_were_accepted() {
    let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new(1 << 20));
    mkfs(&*disk, &MkfsOptions { journal_blocks: 1024, ..MkfsOptions::default() }).expect("mkfs");
    let fs = open(&disk);
    let with = NewAttributes { mode: 0o600, ..NewAttributes::default() };
    let ino = fs.make(&who(), ROOT, b"file", &Make::File { exclusive: true }, &with).expect("make").attributes.ino;
    let data = vec![7; 256 << 10];
    for round in 0..6 {
        let (accepted, syncs) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let (fs, data) = (&fs, &data);
            scope.spawn(move || {
                let at = WriteAt::Offset(round * data.len() as u64);
                let mut word = || {
                    accepted.send(()).expect("somebody syncs");
                    std::thread::sleep(std::time::Duration::from_millis(20));
                };
                fs.write_accepting(&who(), ino, at, data, &mut word).expect("write");
            });
            syncs.recv().expect("whole blocks are accepted before they are copied");
            if round % 2 == 0 { fs.fsync(ino, false) } else { fs.sync() }.expect("sync");
            assert_eq!(fs.status().dirty_pages, 0);
            assert_eq!(fs.getattr(ino).expect("getattr").size, (round + 1) * data.len() as u64);
        });
    }
    // Nothing of it is only in memory.
    drop(fs);
    let fs = open(&disk);
    let size = 6 * data.len() as u64;
    assert_eq!(fs.getattr(ino).expect("getattr").size, size);
    let read = fs.read(ino, 0, size as u32).expect("read").data;
    assert!(read.len() as u64 == size && read.iter().all(|byte| *byte == 7));
}
