//! The loads: what the kernel's client sends for what a program does.

use std::time::Instant;

use anyhow::{Result, ensure};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::client::{Handle, IO_BYTES, Open, Ops, Reply, Session};
use super::server::Server;

/// Connections of the parallel loads.
const CLIENTS: usize = 8;
/// Bytes of a small file and of a random access.
const SMALL: usize = 4096;
/// Calls at once while a file is read or written in order.
const STREAM_DEPTH: usize = 8;
/// The same at random.
const RANDOM_DEPTH: usize = 32;

/// How much is done.
#[derive(Debug)]
pub(super) struct Scale {
    /// Files made by a client.
    creates: usize,
    /// Files looked at.
    stats: usize,
    /// Entries of the directory that is listed, and among which files are looked at.
    entries: usize,
    /// MiB of the file that is written and read in order.
    large_mib: usize,
    /// Accesses at random.
    random: usize,
}

impl Scale {
    pub(super) fn new(percent: u64) -> Self {
        let of = |count: u64| usize::try_from((count * percent / 100).max(1)).expect("counts are small");
        Self { creates: of(2000), stats: of(20_000), entries: of(100_000), large_mib: of(512), random: of(40_000) }
    }
}

/// What a server was filled with before anything is measured.
pub(super) struct Filled {
    root: Handle,
    listed: Handle,
}

/// What is measured.
#[derive(Clone, Copy, Debug)]
pub(super) enum Work {
    Create,
    Commit,
    WriteSmall,
    CreateParallel,
    CommitParallel,
    WriteSmallParallel,
    Stat,
    StatHot,
    List,
    ListHot,
    WriteLarge,
    ReadLarge,
    ReadLargeHot,
    WriteRandom,
    ReadRandom,
    ReadRandomHot,
}

impl Work {
    pub(super) const ALL: &[Work] = &[
        Work::Create,
        Work::Commit,
        Work::WriteSmall,
        Work::CreateParallel,
        Work::CommitParallel,
        Work::WriteSmallParallel,
        Work::Stat,
        Work::StatHot,
        Work::List,
        Work::ListHot,
        Work::WriteLarge,
        Work::ReadLarge,
        Work::ReadLargeHot,
        Work::WriteRandom,
        Work::ReadRandom,
        Work::ReadRandomHot,
    ];

    pub(super) fn name(self, scale: &Scale) -> String {
        match self {
            Work::Create => "creates: OPEN, CLOSE".into(),
            Work::Commit => "durable creates: OPEN, COMMIT, CLOSE".into(),
            Work::WriteSmall => "small files: OPEN, WRITE 4 KiB durably, CLOSE".into(),
            Work::CreateParallel => format!("creates by {CLIENTS} clients"),
            Work::CommitParallel => format!("durable creates by {CLIENTS} clients"),
            Work::WriteSmallParallel => format!("small files by {CLIENTS} clients"),
            Work::Stat => format!("LOOKUP and GETATTR of {} files, cold", scale.stats),
            Work::StatHot => format!("LOOKUP and GETATTR of {} files, hot", scale.stats),
            Work::List => format!("READDIR of {} entries with attributes, cold", scale.entries),
            Work::ListHot => format!("READDIR of {} entries with attributes, hot", scale.entries),
            Work::WriteLarge => format!("write {} MiB in order by 1 MiB, COMMIT", scale.large_mib),
            Work::ReadLarge => format!("read {} MiB in order by 1 MiB, cold", scale.large_mib),
            Work::ReadLargeHot => format!("read {} MiB in order by 1 MiB, hot", scale.large_mib),
            Work::WriteRandom => {
                format!("write {} blocks of 4 KiB at random, {RANDOM_DEPTH} at once, COMMIT", scale.random)
            }
            Work::ReadRandom => {
                format!("read {} blocks of 4 KiB at random, {RANDOM_DEPTH} at once, cold", scale.random)
            }
            Work::ReadRandomHot => {
                format!("read {} blocks of 4 KiB at random, {RANDOM_DEPTH} at once, hot", scale.random)
            }
        }
    }

    pub(super) fn unit(self) -> &'static str {
        match self {
            Work::WriteLarge | Work::ReadLarge | Work::ReadLargeHot => "MiB/s",
            Work::List | Work::ListHot => "entries/s",
            _ => "1/s",
        }
    }

    /// The ratio wanted. A create of Ganesha's is not durable when it is answered, as the protocol wants it to be, so that is for information.
    pub(super) fn target(self) -> Option<f64> {
        match self {
            Work::Commit | Work::CommitParallel | Work::WriteSmall | Work::WriteSmallParallel => Some(1.0),
            Work::Stat | Work::StatHot | Work::List | Work::ListHot => Some(1.0),
            Work::WriteLarge | Work::ReadLarge | Work::ReadLargeHot => Some(0.8),
            Work::Create | Work::CreateParallel | Work::WriteRandom | Work::ReadRandom | Work::ReadRandomHot => None,
        }
    }

    /// How much of it was done per second. `round` names new files.
    pub(super) fn run(self, scale: &Scale, server: &mut Server, filled: &Filled, round: usize) -> Result<f64> {
        match self {
            Work::Create => create(scale.creates, server, filled, &format!("create-{round}"), 1, Durable::Never),
            Work::Commit => create(scale.creates, server, filled, &format!("commit-{round}"), 1, Durable::Commit),
            Work::WriteSmall => create(scale.creates, server, filled, &format!("small-{round}"), 1, Durable::Written),
            Work::CreateParallel => {
                create(scale.creates, server, filled, &format!("creates-{round}"), CLIENTS, Durable::Never)
            }
            Work::CommitParallel => {
                create(scale.creates, server, filled, &format!("commits-{round}"), CLIENTS, Durable::Commit)
            }
            Work::WriteSmallParallel => {
                create(scale.creates, server, filled, &format!("smalls-{round}"), CLIENTS, Durable::Written)
            }
            Work::Stat => stat(scale, server, filled, true),
            Work::StatHot => stat(scale, server, filled, false),
            Work::List => list(scale, server, filled, true),
            Work::ListHot => list(scale, server, filled, false),
            Work::WriteLarge => {
                let mut session = server.connect("writes")?;
                let start = Instant::now();
                large(&mut session, &filled.root, &format!("large-{round}"), scale.large_mib)?;
                Ok(per_second(scale.large_mib, start))
            }
            Work::ReadLarge => read_large(scale, server, filled, true),
            Work::ReadLargeHot => read_large(scale, server, filled, false),
            Work::WriteRandom => write_random(scale, server, filled),
            Work::ReadRandom => read_random(scale, server, filled, true),
            Work::ReadRandomHot => read_random(scale, server, filled, false),
        }
    }
}

/// Makes a directory of many files and a large file, in parallel so that it takes little time.
pub(super) fn fill(server: &Server, scale: &Scale) -> Result<Filled> {
    let mut session = server.connect("fills")?;
    let root = session.root()?;
    let listed = session.mkdir(&root, "listed")?;
    each(server, CLIENTS, |client, session| {
        for i in (client..scale.entries).step_by(CLIENTS) {
            let file = session.open(&listed, &format!("file-{i}"), true)?;
            session.close(&file)?;
        }
        Ok(())
    })?;
    large(&mut session, &root, "large", scale.large_mib)?;
    Ok(Filled { root, listed })
}

fn per_second(count: usize, start: Instant) -> f64 {
    count as f64 / start.elapsed().as_secs_f64()
}

/// With clients of their own, each in a thread; returns when all have ended.
fn each(server: &Server, clients: usize, work: impl Fn(usize, &mut Session) -> Result<()> + Sync) -> Result<()> {
    let mut sessions =
        (0..clients).map(|client| server.connect(&format!("client {client}"))).collect::<Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        let work = &work;
        let threads: Vec<_> = sessions
            .iter_mut()
            .enumerate()
            .map(|(client, session)| scope.spawn(move || work(client, session)))
            .collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("no panics"))
    })
}

/// When a new file is made durable.
#[derive(Clone, Copy)]
enum Durable {
    Never,
    Commit,
    Written,
}

fn create(files: usize, server: &Server, filled: &Filled, name: &str, clients: usize, durable: Durable) -> Result<f64> {
    let mut session = server.connect("prepares")?;
    let dirs = (0..clients)
        .map(|client| session.mkdir(&filled.root, &format!("{name}-{client}")))
        .collect::<Result<Vec<_>>>()?;
    let start = Instant::now();
    each(server, clients, |client, session| {
        for i in 0..files {
            let file = session.open(&dirs[client], &format!("file-{i}"), true)?;
            match durable {
                Durable::Never => (),
                Durable::Commit => session.run(Ops::at(&file.0).commit(), |_| Ok(()))?,
                Durable::Written => session.run(Ops::at(&file.0).write(&file.1, 0, true, &[7; SMALL]), |_| Ok(()))?,
            }
            session.close(&file)?;
        }
        Ok(())
    })?;
    Ok(per_second(files * clients, start))
}

fn stat(scale: &Scale, server: &mut Server, filled: &Filled, cold: bool) -> Result<f64> {
    if cold {
        server.make_cold()?;
    }
    let mut session = server.connect("looks")?;
    let step = (scale.entries / scale.stats).max(1);
    let start = Instant::now();
    for i in 0..scale.stats {
        let name = format!("file-{}", i * step % scale.entries);
        session.run(Ops::at(&filled.listed).lookup(&name), |_| Ok(()))?;
    }
    Ok(per_second(scale.stats, start))
}

fn list(scale: &Scale, server: &mut Server, filled: &Filled, cold: bool) -> Result<f64> {
    if cold {
        server.make_cold()?;
    }
    let mut session = server.connect("lists")?;
    let start = Instant::now();
    let found = session.list(&filled.listed)?;
    let value = per_second(found, start);
    ensure!(found == scale.entries, "{found} of {} entries were listed", scale.entries);
    Ok(value)
}

fn large(session: &mut Session, root: &[u8], name: &str, mib: usize) -> Result<()> {
    let (handle, stateid) = session.open(root, name, true)?;
    let mut block = vec![0; IO_BYTES as usize];
    SmallRng::seed_from_u64(3).fill(&mut block[..]);
    let write = |i: usize| {
        block[..8].copy_from_slice(&(i as u64).to_le_bytes());
        Ops::at(&handle).write(&stateid, i as u64 * u64::from(IO_BYTES), false, &block)
    };
    session.pipeline(mib, STREAM_DEPTH, write, |_, _| Ok(()))?;
    session.run(Ops::at(&handle).commit(), |_| Ok(()))?;
    session.close(&(handle, stateid))
}

fn open_large(server: &mut Server, filled: &Filled, cold: bool) -> Result<(Session, Open)> {
    if cold {
        server.make_cold()?;
    }
    let mut session = server.connect("reads")?;
    let file = session.open(&filled.root, "large", false)?;
    Ok((session, file))
}

fn read_large(scale: &Scale, server: &mut Server, filled: &Filled, cold: bool) -> Result<f64> {
    let (mut session, file) = open_large(server, filled, cold)?;
    let start = Instant::now();
    let read = |i| Ops::at(&file.0).read(&file.1, i as u64 * u64::from(IO_BYTES), IO_BYTES);
    session.pipeline(scale.large_mib, STREAM_DEPTH, read, |i, reply: Reply<'_>| {
        let data = reply.data()?;
        ensure!(data.len() == IO_BYTES as usize, "{} bytes came of MiB {i}", data.len());
        ensure!(data[..8] == (i as u64).to_le_bytes(), "MiB {i} is not what was written");
        Ok(())
    })?;
    let value = per_second(scale.large_mib, start);
    session.close(&file)?;
    Ok(value)
}

fn blocks(scale: &Scale) -> u64 {
    (scale.large_mib * IO_BYTES as usize / SMALL) as u64
}

/// Never the first block of a MiB, by which that is known.
fn at_random(random: &mut SmallRng, scale: &Scale) -> u64 {
    let block = random.random_range(0..blocks(scale));
    block.max(1) * SMALL as u64 + if block.is_multiple_of(256) { SMALL as u64 } else { 0 }
}

fn write_random(scale: &Scale, server: &mut Server, filled: &Filled) -> Result<f64> {
    let (mut session, file) = open_large(server, filled, false)?;
    let mut random = SmallRng::seed_from_u64(9);
    let start = Instant::now();
    let write = |_| Ops::at(&file.0).write(&file.1, at_random(&mut random, scale), false, &[5; SMALL]);
    session.pipeline(scale.random, RANDOM_DEPTH, write, |_, _| Ok(()))?;
    session.run(Ops::at(&file.0).commit(), |_| Ok(()))?;
    let value = per_second(scale.random, start);
    session.close(&file)?;
    Ok(value)
}

fn read_random(scale: &Scale, server: &mut Server, filled: &Filled, cold: bool) -> Result<f64> {
    let (mut session, file) = open_large(server, filled, cold)?;
    let mut random = SmallRng::seed_from_u64(11);
    let start = Instant::now();
    let read = |_| Ops::at(&file.0).read(&file.1, at_random(&mut random, scale), SMALL as u32);
    session.pipeline(scale.random, RANDOM_DEPTH, read, |_, reply| {
        let data = reply.data()?;
        ensure!(data.len() == SMALL, "{} bytes came", data.len());
        Ok(())
    })?;
    let value = per_second(scale.random, start);
    session.close(&file)?;
    Ok(value)
}
