//! Small writes that somebody waits for: in the journal first, and home later.

use std::sync::Arc;

use fs_layer::check::{CheckOptions, check};
use fs_layer::disk::{BLOCK_BYTES, CountedDisk, Disk, MemoryDisk};
use fs_layer::layout::load_superblock;
use fs_layer::vfs::*;
use fs_layer::{Filesystem, MkfsOptions, OpenOptions, mkfs};

fn who() -> Credentials {
    Credentials::system()
}

fn open(disk: Arc<dyn Disk>) -> Arc<Filesystem> {
    let options =
        OpenOptions { metadata_bytes: 1 << 20, page_bytes: 1 << 18, commit_every: None, ..OpenOptions::default() };
    Filesystem::open(disk, &options).expect("open")
}

fn made(journal_blocks: u64) -> (Arc<MemoryDisk>, Arc<CountedDisk>, Arc<Filesystem>) {
    let disk = Arc::new(MemoryDisk::new(1 << 40));
    mkfs(&*disk, &MkfsOptions { journal_blocks, ..MkfsOptions::default() }).expect("mkfs");
    let counted = Arc::new(CountedDisk::new(disk.clone()));
    let fs = open(counted.clone());
    (disk, counted, fs)
}

fn file(fs: &Filesystem, name: &str) -> Ino {
    let with = NewAttributes { mode: 0o644, ..NewAttributes::default() };
    fs.make(&who(), ROOT, name.as_bytes(), &Make::File { exclusive: true }, &with).expect("make").attributes.ino
}

fn put(fs: &Filesystem, ino: Ino, block: u64, byte: u8) {
    let at = WriteAt::Offset(block * BLOCK_BYTES as u64);
    fs.write(&who(), ino, at, &[byte; BLOCK_BYTES]).expect("write");
}

fn block(fs: &Filesystem, ino: Ino, block: u64) -> Vec<u8> {
    fs.read(ino, block * BLOCK_BYTES as u64, BLOCK_BYTES as u32).expect("read").data.to_vec()
}

/// What a crash now would leave, opened.
fn after_crash(disk: &MemoryDisk) -> Arc<Filesystem> {
    let copy = disk.copy();
    let found = check(&copy, CheckOptions::default(), &mut |_| ()).expect("it can be checked");
    assert!(found.is_clean(), "{:#?}", found.problems);
    open(Arc::new(copy))
}

#[test]
fn one_is_one_write_and_one_flush_and_survives() {
    let (disk, counted, fs) = made(16384);
    let ino = file(&fs, "a");
    put(&fs, ino, 0, 1);
    fs.fsync(ino, false).expect("fsync");
    for byte in 2..9 {
        let before = counted.counts();
        put(&fs, ino, 0, byte);
        fs.fsync(ino, false).expect("fsync");
        let after = counted.counts();
        assert_eq!((after.writes - before.writes, after.flushes - before.flushes), (1, 1));
        assert_eq!(fs.status().journaled_blocks, 1);
        assert_eq!(block(&after_crash(&disk), ino, 0), [byte; BLOCK_BYTES]);
    }
    // Many pages go to their addresses, but for that one; all of it is there.
    for at in 0..40 {
        put(&fs, ino, at, 100 + at as u8);
    }
    fs.fsync(ino, false).expect("fsync");
    assert_eq!(fs.status().journaled_blocks, 1);
    let crashed = after_crash(&disk);
    for at in 0..40 {
        assert_eq!(block(&crashed, ino, at), [100 + at as u8; BLOCK_BYTES], "{at}");
    }
    fs.close().expect("close");
    assert_eq!(fs.status().journaled_blocks, 0);
    assert_eq!(block(&after_crash(&disk), ino, 0), [100; BLOCK_BYTES]);
}

#[test]
fn what_is_not_home_is_read_and_shared() {
    let (disk, _, fs) = made(16384);
    let (a, b) = (file(&fs, "a"), file(&fs, "b"));
    for at in 0..3 {
        put(&fs, a, at, 7 + at as u8);
        fs.fsync(a, false).expect("fsync");
    }
    // So much else that the pages are gone.
    let other = file(&fs, "other");
    for at in 0..400 {
        put(&fs, other, at, 1);
    }
    assert_eq!(fs.status().journaled_blocks, 3);
    assert_eq!(block(&fs, a, 1), [8; BLOCK_BYTES]);
    fs.clone_range(&who(), (a, 0), (b, 0), 3 * BLOCK_BYTES as u64).expect("clone");
    fs.fsync(b, false).expect("fsync");
    for fs in [fs.clone(), after_crash(&disk)] {
        for (ino, at) in [(a, 0), (a, 1), (a, 2), (b, 0), (b, 1), (b, 2)] {
            assert_eq!(block(&fs, ino, at), [7 + at as u8; BLOCK_BYTES]);
        }
    }
}

#[test]
fn what_is_freed_is_not_brought_home() {
    let (disk, _, fs) = made(128);
    let (a, b) = (file(&fs, "a"), file(&fs, "b"));
    for ino in [a, b] {
        put(&fs, ino, 0, 0xab);
        fs.fsync(ino, false).expect("fsync");
    }
    let cut = SetAttributes { size: Some(0), ..SetAttributes::default() };
    fs.setattr(&who(), a, &cut, false).expect("cut");
    assert_eq!(fs.status().journaled_blocks, 1);
    fs.commit().expect("commit");
    fs.close().expect("close");
    let start = load_superblock(&*disk).expect("superblock").data_start;
    let mut data = vec![0; 4096 * BLOCK_BYTES];
    disk.read(start, &mut data).expect("read");
    let home = data.chunks(BLOCK_BYTES).filter(|block| block.iter().all(|byte| *byte == 0xab)).count();
    assert_eq!(home, 1);
}

#[test]
fn they_come_home_before_the_journal_is_full() {
    let (disk, _, fs) = made(128);
    let names: Vec<String> = (0..300).map(|n| format!("file {n}")).collect();
    let files: Vec<Ino> = names.iter().map(|name| file(&fs, name)).collect();
    let mut most = 0;
    for (ino, n) in files.iter().zip(0..) {
        put(&fs, *ino, 0, n as u8);
        fs.fsync(*ino, false).expect("fsync");
        most = most.max(fs.status().journaled_blocks);
    }
    assert!((4..40).contains(&most), "{most}");
    let crashed = after_crash(&disk);
    for (ino, n) in files.iter().zip(0..) {
        assert_eq!(block(&crashed, *ino, 0), [n as u8; BLOCK_BYTES]);
    }
}

/// What a program reads of the journal's two headers that knows no records with contents: their formats.
fn formats(disk: &MemoryDisk) -> [u8; 2] {
    let start = load_superblock(disk).expect("superblock").journal(0);
    [0, 1].map(|copy| {
        let mut block = [0; BLOCK_BYTES];
        disk.read(start + copy, &mut block).expect("read");
        block[5]
    })
}

#[test]
fn both_headers_say_so_as_long_as_the_journal_holds_contents() {
    let (disk, _, fs) = made(128);
    let (a, b) = (file(&fs, "a"), file(&fs, "b"));
    fs.commit().expect("commit");
    assert!(formats(&disk).iter().all(|format| *format < 2));
    put(&fs, a, 0, 1);
    fs.fsync(a, false).expect("fsync");
    assert_eq!(formats(&disk), [2, 2]);
    // Until the tail is behind it.
    for n in 0..200 {
        let set = SetAttributes { mode: Some(n), ..SetAttributes::default() };
        fs.setattr(&who(), b, &set, false).expect("setattr");
        fs.commit().expect("commit");
    }
    assert!(formats(&disk).contains(&1));
    put(&fs, a, 0, 2);
    fs.fsync(a, false).expect("fsync");
    assert_eq!(formats(&disk), [2, 2]);
    fs.close().expect("close");
    assert!(formats(&disk).contains(&1));
    let fs = open(disk.clone());
    assert_eq!(block(&fs, a, 0), [2; BLOCK_BYTES]);
}
