//! The loads: each prepares what it needs, and measures the rest.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

/// Clients of the parallel loads.
const THREADS: usize = 8;
/// Bytes of a small file and of a random access.
const SMALL: usize = 4096;
/// Bytes of a sequential access.
const LARGE: usize = 1 << 20;

/// How much is done.
#[derive(Debug)]
pub(super) struct Scale {
    /// Files made durable one by one.
    durable: usize,
    /// Files looked at.
    stats: usize,
    /// Entries of the directory that is listed.
    entries: usize,
    /// MiB of the file that is written and read in order.
    large_mib: usize,
    /// Accesses at random.
    random: usize,
    /// Directories of the tree that is unpacked; ten files each.
    tree: usize,
}

impl Scale {
    pub(super) fn new(percent: u64) -> Self {
        let of = |count: u64| usize::try_from((count * percent / 100).max(1)).expect("counts are small");
        Self {
            durable: of(1000),
            stats: of(10_000),
            entries: of(100_000),
            large_mib: of(512),
            random: of(20_000),
            tree: of(200),
        }
    }
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    Create,
    CreateParallel,
    WriteSmall,
    Stat,
    List,
    Untar,
    Remove,
    WriteLarge,
    ReadLarge,
    WriteRandom,
    ReadRandom,
}

impl Work {
    pub(super) const ALL: &[Work] = &[
        Work::Create,
        Work::CreateParallel,
        Work::WriteSmall,
        Work::Stat,
        Work::List,
        Work::Untar,
        Work::Remove,
        Work::WriteLarge,
        Work::ReadLarge,
        Work::WriteRandom,
        Work::ReadRandom,
    ];

    pub(super) fn name(self, scale: &Scale) -> String {
        match self {
            Work::Create => "durable creates: open, fsync, close".into(),
            Work::CreateParallel => format!("durable creates by {THREADS} threads, each in its directory"),
            Work::WriteSmall => "small files: create, write 4 KiB, fsync, close".into(),
            Work::Stat => format!("stat of {} files, cold", scale.stats),
            Work::List => format!("list a directory of {} entries, cold", scale.entries),
            Work::Untar => format!("untar {} files, then sync", scale.tree * 10),
            Work::Remove => format!("remove a tree of {} files", scale.tree * 10),
            Work::WriteLarge => format!("write {} MiB in order by 1 MiB, then fsync", scale.large_mib),
            Work::ReadLarge => format!("read {} MiB in order by 1 MiB, cold", scale.large_mib),
            Work::WriteRandom => format!("write {} blocks of 4 KiB at random, then fsync", scale.random),
            Work::ReadRandom => format!("read {} blocks of 4 KiB at random, cold", scale.random),
        }
    }

    pub(super) fn unit(self) -> &'static str {
        match self {
            Work::WriteLarge | Work::ReadLarge => "MiB/s",
            Work::List => "entries/s",
            _ => "1/s",
        }
    }

    /// The ratio wanted.
    pub(super) fn target(self) -> Option<f64> {
        match self {
            Work::Create | Work::CreateParallel | Work::WriteSmall | Work::Stat | Work::List => Some(1.0),
            Work::WriteLarge | Work::ReadLarge => Some(0.8),
            Work::Untar | Work::Remove | Work::WriteRandom | Work::ReadRandom => None,
        }
    }

    /// How much of it was done per second.
    pub(super) fn run(self, scale: &Scale, dir: &Path, cold: &Cold<'_>) -> Result<f64> {
        match self {
            Work::Create => create(dir, scale.durable, None),
            Work::WriteSmall => create(dir, scale.durable, Some(&[7; SMALL])),
            Work::CreateParallel => create_parallel(dir, scale.durable),
            Work::Stat => stat(dir, scale.stats, cold),
            Work::List => list(dir, scale.entries, cold),
            Work::Untar => untar(dir, scale.tree),
            Work::Remove => remove(dir, scale.tree, cold),
            Work::WriteLarge => write_large(dir, scale.large_mib),
            Work::ReadLarge => read_large(dir, scale.large_mib, cold),
            Work::WriteRandom => write_random(dir, scale),
            Work::ReadRandom => read_random(dir, scale, cold),
        }
    }
}

/// Makes the next look go to the disk.
pub(super) type Cold<'a> = dyn Fn() -> Result<()> + 'a;

fn per_second(count: usize, start: Instant) -> f64 {
    count as f64 / start.elapsed().as_secs_f64()
}

fn create(dir: &Path, files: usize, content: Option<&[u8]>) -> Result<f64> {
    let start = Instant::now();
    for i in 0..files {
        let mut file = File::create_new(dir.join(format!("file-{i}")))?;
        if let Some(content) = content {
            file.write_all(content)?;
        }
        file.sync_all()?;
    }
    Ok(per_second(files, start))
}

fn create_parallel(dir: &Path, files: usize) -> Result<f64> {
    let dirs: Vec<_> = (0..THREADS).map(|i| dir.join(format!("thread-{i}"))).collect();
    dirs.iter().try_for_each(std::fs::create_dir)?;
    let start = Instant::now();
    std::thread::scope(|scope| {
        let threads: Vec<_> = dirs.iter().map(|dir| scope.spawn(move || create(dir, files, None))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panics").map(drop))
    })?;
    Ok(per_second(files * THREADS, start))
}

/// Empty files, not durable.
fn fill(dir: &Path, files: usize, cold: &Cold<'_>) -> Result<()> {
    (0..files).try_for_each(|i| File::create_new(dir.join(format!("file-{i}"))).map(drop))?;
    cold()
}

fn stat(dir: &Path, files: usize, cold: &Cold<'_>) -> Result<f64> {
    fill(dir, files, cold)?;
    let start = Instant::now();
    for i in 0..files {
        std::fs::metadata(dir.join(format!("file-{i}")))?;
    }
    Ok(per_second(files, start))
}

fn list(dir: &Path, entries: usize, cold: &Cold<'_>) -> Result<f64> {
    fill(dir, entries, cold)?;
    let start = Instant::now();
    let found = std::fs::read_dir(dir)?.try_fold(0, |count, entry| entry.map(|_| count + 1))?;
    let value = per_second(entries, start);
    ensure!(found == entries, "{found} of {entries} entries were listed");
    Ok(value)
}

/// A tree of small files as an archive in memory's filesystem.
fn archive(dir: &Path, directories: usize) -> Result<tempfile::TempDir> {
    let scratch = if Path::new("/dev/shm").is_dir() { Path::new("/dev/shm") } else { dir };
    let scratch = tempfile::tempdir_in(scratch)?;
    let mut random = SmallRng::seed_from_u64(5);
    let content: Vec<u8> = (0..1 << 16).map(|_| random.random()).collect();
    for i in 0..directories {
        let dir = scratch.path().join(format!("tree/dir-{i}"));
        std::fs::create_dir_all(&dir)?;
        for j in 0..10 {
            // Sizes as in a tree of sources: most are a few KiB.
            let len = 1 << random.random_range(6..16);
            std::fs::write(dir.join(format!("file-{j}.c")), &content[..len])?;
        }
    }
    tar(&["-C", path(scratch.path())?, "-cf", path(&scratch.path().join("tree.tar"))?, "tree"])?;
    Ok(scratch)
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is not UTF-8")
}

fn tar(args: &[&str]) -> Result<()> {
    let status = std::process::Command::new("tar").args(args).status().context("cannot run tar")?;
    ensure!(status.success(), "tar {args:?} failed: {status}");
    Ok(())
}

fn untar(dir: &Path, directories: usize) -> Result<f64> {
    let archive = archive(dir, directories)?;
    let start = Instant::now();
    tar(&["-C", path(dir)?, "-xf", path(&archive.path().join("tree.tar"))?])?;
    // Of this filesystem alone.
    let root = File::open(dir)?;
    // SAFETY: the descriptor is open.
    ensure!(unsafe { libc::syncfs(std::os::fd::AsRawFd::as_raw_fd(&root)) } == 0, "syncfs failed");
    root.sync_all()?;
    Ok(per_second(directories * 10, start))
}

fn remove(dir: &Path, directories: usize, cold: &Cold<'_>) -> Result<f64> {
    let archive = archive(dir, directories)?;
    tar(&["-C", path(dir)?, "-xf", path(&archive.path().join("tree.tar"))?])?;
    cold()?;
    let start = Instant::now();
    std::fs::remove_dir_all(dir.join("tree"))?;
    File::open(dir)?.sync_all()?;
    Ok(per_second(directories * 10, start))
}

fn large(dir: &Path, mib: usize) -> Result<File> {
    let name = dir.join("large");
    let mut file = OpenOptions::new().read(true).write(true).create(true).truncate(true).open(name)?;
    let mut block = vec![0; LARGE];
    SmallRng::seed_from_u64(3).fill(&mut block[..]);
    for i in 0..mib {
        block[..8].copy_from_slice(&(i as u64).to_le_bytes());
        file.write_all(&block)?;
    }
    file.sync_all()?;
    Ok(file)
}

fn write_large(dir: &Path, mib: usize) -> Result<f64> {
    let start = Instant::now();
    large(dir, mib)?;
    Ok(per_second(mib, start))
}

fn read_large(dir: &Path, mib: usize, cold: &Cold<'_>) -> Result<f64> {
    drop(large(dir, mib)?);
    cold()?;
    let mut file = File::open(dir.join("large"))?;
    let mut block = vec![0; LARGE];
    let start = Instant::now();
    for i in 0..mib {
        file.read_exact(&mut block)?;
        ensure!(block[..8] == (i as u64).to_le_bytes(), "MiB {i} is not what was written");
    }
    Ok(per_second(mib, start))
}

fn write_random(dir: &Path, scale: &Scale) -> Result<f64> {
    let file = large(dir, scale.large_mib)?;
    let blocks = (scale.large_mib * LARGE / SMALL) as u64;
    let mut random = SmallRng::seed_from_u64(9);
    let block = [5; SMALL];
    let start = Instant::now();
    for _ in 0..scale.random {
        file.write_all_at(&block, random.random_range(0..blocks) * SMALL as u64)?;
    }
    file.sync_all()?;
    Ok(per_second(scale.random, start))
}

fn read_random(dir: &Path, scale: &Scale, cold: &Cold<'_>) -> Result<f64> {
    drop(large(dir, scale.large_mib)?);
    cold()?;
    let file = File::open(dir.join("large"))?;
    let blocks = (scale.large_mib * LARGE / SMALL) as u64;
    let mut random = SmallRng::seed_from_u64(11);
    let mut block = [0; SMALL];
    let start = Instant::now();
    for _ in 0..scale.random {
        file.read_exact_at(&mut block, random.random_range(0..blocks) * SMALL as u64)?;
    }
    Ok(per_second(scale.random, start))
}
