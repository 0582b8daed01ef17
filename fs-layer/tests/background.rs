//! Files that are written, cut and read while the background writes them back, on a disk whose writes take their time: what is read is what was
//! written last, before and after the filesystem is opened anew, and `check` finds nothing.
//!
//! `FS_SEEDS=n` sets how many seeds are tried, `FS_SEED=n` tries one.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use fs_layer::check::{CheckOptions, check};
use fs_layer::disk::{BlockAddress, Disk, MemoryDisk};
use fs_layer::vfs::*;
use fs_layer::{Filesystem, MkfsOptions, OpenOptions, mkfs};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const FILES: usize = 2;
const FILE_MAX: usize = 24 << 20;

/// Takes a while for each write of data.
struct SlowDisk {
    disk: MemoryDisk,
    writes: AtomicU64,
}

impl Disk for SlowDisk {
    fn blocks(&self) -> u64 {
        self.disk.blocks()
    }

    fn read(&self, at: BlockAddress, buffer: &mut [u8]) -> io::Result<()> {
        self.disk.read(at, buffer)
    }

    fn write(&self, at: BlockAddress, data: &[u8]) -> io::Result<()> {
        self.disk.write(at, data)
    }

    fn write_parts(&self, runs: &[(BlockAddress, Vec<&[u8]>)]) -> io::Result<()> {
        let pause = Duration::from_micros(self.writes.fetch_add(1, Ordering::Relaxed) * 7919 % 3000);
        for (at, parts) in runs {
            for (block, part) in (*at..).zip(parts) {
                self.disk.write(block, part)?;
            }
            std::thread::sleep(pause / runs.len() as u32);
        }
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }

    fn discard(&self, at: BlockAddress, count: u64) -> io::Result<()> {
        self.disk.discard(at, count)
    }
}

fn who() -> Credentials {
    Credentials::system()
}

fn verify(fs: &Filesystem, ino: Ino, model: &[u8], from: usize, len: usize) {
    let read = fs.read(ino, from as u64, len as u32).unwrap();
    let wanted = &model[from.min(model.len())..(from + len).min(model.len())];
    if read.data[..] != *wanted {
        let at = read.data.iter().zip(wanted).position(|(found, wanted)| found != wanted);
        panic!("file {} of {} bytes differs at {from} + {at:?}", ino.0, model.len());
    }
}

fn change(fs: &Filesystem, random: &mut SmallRng, ino: Ino, model: &mut Vec<u8>, next: &mut usize) {
    match random.random_range(0..20) {
        // On where the last write ended, mostly.
        0..12 => {
            let at =
                if random.random_ratio(1, 8) { random.random_range(0..=model.len()) } else { (*next).min(model.len()) };
            let at = if at + (2 << 20) > FILE_MAX { 0 } else { at };
            let len = if random.random_ratio(2, 3) { 1 << 20 } else { random.random_range(1..2 << 20) };
            let data = vec![random.random::<u8>(); len];
            fs.write(&who(), ino, WriteAt::Offset(at as u64), &data).unwrap();
            model.resize(model.len().max(at + len), 0);
            model[at..at + len].copy_from_slice(&data);
            *next = at + len;
        }
        12 | 13 => {
            let size = random.random_range(0..=model.len() + 5000).min(FILE_MAX);
            let set = SetAttributes { size: Some(size as u64), ..SetAttributes::default() };
            fs.setattr(&who(), ino, &set, true).unwrap();
            model.resize(size, 0);
        }
        14 if !model.is_empty() => {
            let from = random.random_range(0..model.len());
            let len = random.random_range(1..=model.len() - from);
            let how = if random.random() { Fallocate::PunchHole } else { Fallocate::ZeroRange };
            fs.fallocate(&who(), ino, how, from as u64, len as u64).unwrap();
            model[from..from + len].fill(0);
        }
        15 => fs.fsync(ino, false).unwrap(),
        16 => std::thread::sleep(Duration::from_millis(random.random_range(0..4))),
        _ => {
            let from = random.random_range(0..=model.len());
            verify(fs, ino, model, from, random.random_range(1..1 << 20));
        }
    }
}

fn run(seed: u64) {
    let mut random = SmallRng::seed_from_u64(seed);
    let disk = Arc::new(SlowDisk { disk: MemoryDisk::new(1 << 24), writes: AtomicU64::new(seed) });
    mkfs(&*disk, &MkfsOptions { journal_blocks: 4096, ..MkfsOptions::default() }).unwrap();
    let options = OpenOptions {
        commit_every: Some(Duration::from_millis(5)),
        keeps_read: random.random(),
        page_bytes: random.random_range(4..64) << 20,
        ..OpenOptions::default()
    };
    let mut fs = Filesystem::open(disk.clone(), &options).unwrap();
    let make = |fs: &Filesystem, n: usize| {
        let name = format!("file-{n}");
        let with = NewAttributes { mode: 0o644, ..NewAttributes::default() };
        let what = Make::File { exclusive: true };
        fs.make(&who(), ROOT, name.as_bytes(), &what, &with).unwrap().attributes.ino
    };
    let mut files: Vec<(Ino, Vec<u8>, usize)> = (0..FILES).map(|n| (make(&fs, n), Vec::new(), 0)).collect();
    for _ in 0..2 {
        for _ in 0..150 {
            let at = random.random_range(0..FILES);
            if random.random_ratio(1, 60) {
                // Gone while it may be under way to the disk.
                fs.unlink(&who(), ROOT, format!("file-{at}").as_bytes()).unwrap();
                files[at] = (make(&fs, at), Vec::new(), 0);
            }
            let (ino, model, next) = &mut files[at];
            change(&fs, &mut random, *ino, model, next);
        }
        for (ino, model, _) in &files {
            (0..model.len()).step_by(1 << 20).for_each(|from| verify(&fs, *ino, model, from, 1 << 20));
        }
        fs.close().unwrap();
        drop(fs);
        let report = check(&*disk, CheckOptions::default(), &mut |_| {}).unwrap();
        assert!(report.is_clean() && report.orphans == 0, "{report:?}");
        fs = Filesystem::open(disk.clone(), &options).unwrap();
        for (ino, model, _) in &files {
            assert_eq!(fs.getattr(*ino).unwrap().size, model.len() as u64);
            (0..model.len()).step_by(1 << 20).for_each(|from| verify(&fs, *ino, model, from, 1 << 20));
        }
    }
    fs.close().unwrap();
}

#[test]
fn files_are_what_was_written_while_the_background_writes() {
    if let Ok(seed) = std::env::var("FS_SEED") {
        return run(seed.parse().expect("a seed"));
    }
    let seeds = std::env::var("FS_SEEDS").map_or(8, |n| n.parse().expect("a number of seeds"));
    for seed in 0..seeds {
        eprintln!("seed {seed}");
        run(seed);
    }
}
