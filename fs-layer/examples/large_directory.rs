//! What an operation costs in a directory of a million entries, beside one of a thousand, without the request that brings it.
//!
//! A lookup in a small directory finds everything in the processor's cache and takes less than half a microsecond; one in 60 MB of nodes waits for
//! memory. What a client sees of that is measured over FUSE (docs/performance.md).
//!
//! `cargo run --release -p fs-layer --example large_directory`. `FS_ENTRIES=n` sets how many the large one has.

use std::sync::Arc;
use std::time::Instant;

use fs_layer::disk::MemoryDisk;
use fs_layer::vfs::*;
use fs_layer::{Filesystem, MkfsOptions, OpenOptions, mkfs};

const SMALL: u64 = 1000;
/// Operations of each kind between looks at the clock, so few that the small directory stays small.
const BATCH: u64 = 100;
const ROUNDS: usize = 200;
/// Names that one file gets; a directory of a million files needs gigabytes for their inodes, of which nothing here depends.
const NAMES_OF_A_FILE: u64 = 60_000;

struct Directory {
    ino: Ino,
    entries: u64,
}

fn who() -> Credentials {
    Credentials::system()
}

fn name(n: u64) -> Vec<u8> {
    format!("entry-{n}").into_bytes()
}

fn file(fs: &Filesystem, dir: Ino, name: &[u8]) -> Ino {
    let what = Make::File { exclusive: true };
    fs.make(&who(), dir, name, &what, &NewAttributes { mode: 0o644, ..NewAttributes::default() })
        .unwrap()
        .attributes
        .ino
}

fn filled(fs: &Filesystem, called: &str, entries: u64) -> Directory {
    let with = NewAttributes { mode: 0o755, ..NewAttributes::default() };
    let ino = fs.make(&who(), ROOT, called.as_bytes(), &Make::Directory, &with).unwrap().attributes.ino;
    let mut linked = Ino(0);
    for n in 0..entries {
        if n % NAMES_OF_A_FILE == 0 {
            linked = file(fs, ino, &name(n));
        } else {
            fs.link(&who(), linked, ino, &name(n)).unwrap();
        }
    }
    Directory { ino, entries }
}

type Operation = fn(&Filesystem, &Directory, u64);

/// Each for itself leaves the directory as it was, together with the one after it.
const OPERATIONS: [(&str, Operation); 6] = [
    ("look up a name", |fs, dir, n| {
        fs.lookup(&who(), dir.ino, &name(spread(n) % dir.entries)).unwrap();
    }),
    ("look up a name that is not there", |fs, dir, n| {
        assert!(matches!(fs.lookup(&who(), dir.ino, &name(dir.entries + n)), Err(VfsError::NotFound)));
    }),
    ("make a file", |fs, dir, n| {
        file(fs, dir.ino, format!("new-{n}").as_bytes());
    }),
    ("rename it", |fs, dir, n| {
        let (from, to) = (format!("new-{n}"), format!("old-{n}"));
        fs.rename(&who(), (dir.ino, from.as_bytes()), (dir.ino, to.as_bytes()), Rename::Replace).unwrap();
    }),
    ("remove it", |fs, dir, n| {
        fs.unlink(&who(), dir.ino, format!("old-{n}").as_bytes()).unwrap();
    }),
    ("list 10 entries", |fs, dir, n| {
        let page = fs.readdir(&who(), dir.ino, spread(n) >> 2, 10).unwrap();
        assert!(page.end || page.entries.len() == 10);
    }),
];

/// Numbers in no order.
fn spread(n: u64) -> u64 {
    n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let large = std::env::var("FS_ENTRIES").map_or(1_000_000, |n| n.parse().expect("a number of entries"));
    let disk = Arc::new(MemoryDisk::new(1 << 24));
    mkfs(&*disk, &MkfsOptions::default()).unwrap();
    let fs = Filesystem::open(disk, &OpenOptions { commit_every: None, ..OpenOptions::default() }).unwrap();
    let directories = [filled(&fs, "small", SMALL), filled(&fs, "large", large)];
    let mut nanoseconds = vec![[const { Vec::new() }; 2]; OPERATIONS.len()];
    for round in 0..ROUNDS {
        // Changes of another operation are not this one's.
        fs.sync().unwrap();
        for (of, (_, operation)) in OPERATIONS.iter().enumerate() {
            for at in [round % 2, 1 - round % 2] {
                let start = Instant::now();
                for n in 0..BATCH {
                    operation(&fs, &directories[at], round as u64 * BATCH + n);
                }
                nanoseconds[of][at].push(start.elapsed().as_nanos() as f64 / BATCH as f64);
            }
        }
    }
    println!("{:34} {:>12} {:>12} {:>6}", "nanoseconds, entries:", SMALL, large, "");
    for ((what, _), [small, large]) in OPERATIONS.iter().zip(nanoseconds) {
        let (small, large) = (median(small), median(large));
        println!("{what:34} {small:12.0} {large:12.0} {:6.2}", large / small);
    }
    fs.close().unwrap();
}
