//! How fast the filesystem is on a file: `cargo run --release -p fs-layer --example speed -- FILE [FILES]`.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use fs_layer::disk::{Disk, FileDisk};
use fs_layer::vfs::*;
use fs_layer::{Filesystem, MkfsOptions, OpenOptions, mkfs};

fn rate(what: &str, count: u64, since: Instant) {
    let seconds = since.elapsed().as_secs_f64();
    println!("{what:<44} {:>12.0}/s", count as f64 / seconds);
}

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let path = arguments.next().ok_or_else(|| anyhow::anyhow!("give a file that does not exist"))?;
    let count: u64 = arguments.next().map_or(Ok(100_000), |count| count.parse())?;
    let disk: Arc<dyn Disk> = Arc::new(FileDisk::create(Path::new(&path), 8 << 40)?);
    mkfs(&*disk, &MkfsOptions::default())?;
    let fs = Filesystem::open(disk, &OpenOptions { commit_every: None, ..OpenOptions::default() })?;
    let who = Credentials::system();
    let with = NewAttributes { mode: 0o644, ..NewAttributes::default() };
    let dir = fs.make(&who, ROOT, b"d", &Make::Directory, &with)?.attributes.ino;

    let begun = Instant::now();
    for index in 0..count {
        fs.make(&who, dir, format!("file-{index}").as_bytes(), &Make::File { exclusive: true }, &with)?;
    }
    rate("creates, not durable", count, begun);
    let begun = Instant::now();
    fs.commit()?;
    println!("commit after them: {:.1} ms", begun.elapsed().as_secs_f64() * 1000.0);
    let begun = Instant::now();
    for index in 0..count {
        fs.lookup(&who, dir, format!("file-{}", index * 7919 % count).as_bytes())?;
    }
    rate("lookups with attributes", count, begun);
    let begun = Instant::now();
    let mut cookie = 0;
    loop {
        let page = fs.readdir(&who, dir, cookie, 1000)?;
        cookie = page.entries.last().map_or(cookie, |entry| entry.cookie);
        if page.end {
            break;
        }
    }
    rate("entries listed", count, begun);

    let durable = 2000;
    let begun = Instant::now();
    for index in 0..durable {
        fs.make(&who, dir, format!("durable-{index}").as_bytes(), &Make::File { exclusive: true }, &with)?;
        fs.commit()?;
    }
    rate("creates, each durable", durable, begun);
    let begun = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..8 {
            let (fs, who, with) = (&fs, &who, &with);
            scope.spawn(move || {
                for index in 0..durable / 4 {
                    let name = format!("durable-{thread}-{index}");
                    let made = fs.make(who, dir, name.as_bytes(), &Make::File { exclusive: true }, with);
                    made.and_then(|_| fs.commit()).expect("a durable create");
                }
            });
        }
    });
    rate("creates, each durable, 8 threads", durable * 2, begun);
    let begun = Instant::now();
    for index in 0..durable {
        let ino = fs.lookup(&who, dir, format!("durable-{index}").as_bytes())?.ino;
        fs.write(&who, ino, WriteAt::Offset(0), &[7; 1000])?;
        fs.fsync(ino, false)?;
    }
    rate("small writes with fsync", durable, begun);

    let big = fs.make(&who, ROOT, b"big", &Make::File { exclusive: true }, &with)?.attributes.ino;
    let chunk = vec![3; 1 << 20];
    let begun = Instant::now();
    for index in 0..1024 {
        fs.write(&who, big, WriteAt::Offset(index << 20), &chunk)?;
    }
    fs.fsync(big, false)?;
    rate("MiB written in order, with fsync", 1024, begun);
    let begun = Instant::now();
    for index in 0..1024 {
        fs.read(big, index << 20, 1 << 20)?;
    }
    rate("MiB read in order", 1024, begun);
    let begun = Instant::now();
    fs.close()?;
    println!("close: {:.1} ms", begun.elapsed().as_secs_f64() * 1000.0);
    Ok(())
}
