//! What a volume takes in the bucket: the engine over a bucket in memory, with its checkpoints.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use blockd::buf::AlignedBuf;
use blockd::chunk::{ChunkName, Codec};
use blockd::manifest::{self, Manifest};
use blockd::outgoing::Outgoing;
use blockd::store::{MemoryStore, ObjectStore};
use blockd::types::{BLOCK, BLOCK_SIZE, VolumeId};
use blockd::volume::{
    CompactionTuning, Effect, JobDone, LogOp, Outcome, Parts, ReadNow, Token, Tuning, Volume, WriteData,
};
use blockd::wal::device::LogDevice;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

const NAME: &str = "space";
const MIB: u64 = 1 << 20;

/// A log in memory that never fails.
#[derive(Debug, Default)]
struct RamLog(Mutex<BTreeMap<u32, Vec<u8>>>);

impl LogDevice for RamLog {
    fn segment_bytes(&self) -> u64 {
        4 * MIB
    }
    fn segments(&self) -> Vec<u32> {
        self.0.lock().unwrap().keys().copied().collect()
    }
    fn create(&self, segment: u32) -> io::Result<()> {
        self.0.lock().unwrap().insert(segment, vec![0; self.segment_bytes() as usize]);
        Ok(())
    }
    fn read(&self, segment: u32, offset: u64, buf: &mut AlignedBuf) -> io::Result<()> {
        let segments = self.0.lock().unwrap();
        let from = offset as usize;
        let to = from + buf.len();
        buf.copy_from_slice(&segments[&segment][from..to]);
        Ok(())
    }
    fn write(&self, segment: u32, offset: u64, buf: &AlignedBuf) -> io::Result<()> {
        let mut segments = self.0.lock().unwrap();
        segments.get_mut(&segment).unwrap()[offset as usize..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }
    fn sync(&self, _: u32) -> io::Result<()> {
        Ok(())
    }
    fn fd(&self, _: u32) -> Option<RawFd> {
        None
    }
    fn describe(&self, segment: u32) -> String {
        format!("segment {segment} in memory")
    }
}

struct World {
    volume: Volume,
    log: Arc<RamLog>,
    bucket: Arc<MemoryStore>,
    jobs: JoinSet<()>,
    sender: mpsc::UnboundedSender<JobDone>,
    done: mpsc::UnboundedReceiver<JobDone>,
    now_us: u64,
    token: u64,
    answers: BTreeMap<u64, Outcome>,
}

impl World {
    async fn new(size: u64, chunk_bytes: u64) -> Self {
        Self::with_checkpoints(size, chunk_bytes, 1_000_000).await
    }

    /// `age_us` is that of [`Tuning::checkpoint_age_us`].
    async fn with_checkpoints(size: u64, chunk_bytes: u64, age_us: u64) -> Self {
        let bucket = Arc::new(MemoryStore::new());
        let id = VolumeId([7; 16]);
        let manifest =
            Manifest { codec: Codec::None, chunk_bytes: chunk_bytes as u32, ..Manifest::new(id, NAME, size) };
        manifest::create(bucket.as_ref(), &manifest).await.unwrap();
        let log = Arc::new(RamLog::default());
        let tuning = Tuning {
            block_cache_bytes: 0,
            compaction: CompactionTuning::default(),
            delete_grace_us: 1_000_000,
            checkpoint_chunks: 1 << 32,
            checkpoint_age_us: age_us,
            ..Tuning::default()
        };
        let parts = Parts { segments_max: 16, ..Parts::repeatable(bucket.clone(), log.clone(), tuning) };
        let (volume, _) = Volume::open_parts(parts, manifest, [1; 16]).await.unwrap();
        let (sender, done) = mpsc::unbounded_channel();
        let (jobs, answers) = (JoinSet::new(), BTreeMap::new());
        Self { volume, log, bucket, jobs, sender, done, now_us: 1, token: 0, answers }
    }

    fn token(&mut self) -> Token {
        self.token += 1;
        Token(self.token)
    }

    /// Does what the volume asks for, once.
    async fn turn(&mut self, passed_us: u64) {
        self.now_us += passed_us;
        self.volume.advance(self.now_us);
        loop {
            while let Some(effect) = self.volume.next_effect() {
                match effect {
                    Effect::Complete(done) => {
                        self.answers.insert(done.token.0, done.result.unwrap());
                    }
                    Effect::Spawn(job) => {
                        let sender = self.sender.clone();
                        self.jobs.spawn(async move {
                            sender.send(job.await).unwrap();
                        });
                    }
                    Effect::Log(io) => {
                        if let LogOp::Write { segment, offset, bufs, .. } = &io.op {
                            let mut at = *offset;
                            for buf in bufs {
                                self.log.write(*segment, at, &AlignedBuf::copy_of(buf)).unwrap();
                                at += buf.len() as u64;
                            }
                        }
                        self.volume.log_done(io.id, Ok(()));
                    }
                }
            }
            tokio::task::yield_now().await;
            let Ok(done) = self.done.try_recv() else { break };
            self.volume.job_done(done);
        }
        while self.jobs.try_join_next().is_some() {}
    }

    /// Nobody asks for anything until nothing is left to be done.
    async fn rest(&mut self) {
        for _ in 0..100_000 {
            self.turn(100_000).await;
            let stats = self.volume.stats();
            let stored = stats.destaged_lsn == stats.accepted_lsn;
            if stored && self.volume.is_tidy() && self.volume.waits_for_checkpoint() == 0 {
                self.volume.table().recount().unwrap();
                return;
            }
        }
        panic!("never at rest: {:?}", self.volume.stats());
    }

    /// Writes the number `value`, repeated, to a block.
    fn write(&mut self, lba: u64, value: u64) {
        let token = self.token();
        let block: Vec<u8> = value.to_le_bytes().into_iter().cycle().take(BLOCK).collect();
        self.volume.write(token, lba * BLOCK_SIZE, WriteData::Copy(&block), false);
    }

    async fn read(&mut self, lba: u64, blocks: u64) -> Vec<u64> {
        let token = self.token();
        let mut out = Outgoing::new();
        if self.volume.read(token, lba * BLOCK_SIZE, (blocks * BLOCK_SIZE) as u32, &mut out) == ReadNow::Pending {
            while !self.answers.contains_key(&token.0) {
                self.turn(100).await;
            }
            match self.answers.remove(&token.0) {
                Some(Outcome::Data(data)) => out = data.bytes,
                other => panic!("{other:?}"),
            }
        }
        out.to_vec().chunks(BLOCK).map(|block| u64::from_le_bytes(block[..8].try_into().unwrap())).collect()
    }

    /// Bytes of all chunks in the bucket.
    async fn bucket_bytes(&self) -> u64 {
        let mut bytes = 0;
        for key in self.bucket.keys().iter().filter(|key| ChunkName::parse(key).is_some()) {
            bytes += self.bucket.head(key).await.unwrap().size;
        }
        bytes
    }
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap().block_on(test);
}

#[test]
fn random_overwrites_stay_within_bounds() {
    run(async {
        let blocks = 64 * MIB / BLOCK_SIZE;
        let mut world = World::new(64 * MIB, MIB).await;
        let mut rng = SmallRng::seed_from_u64(1);
        let mut model = vec![0u64; blocks as usize];
        let mut worst: f64 = 0.0;
        for value in 1..=10 * blocks {
            let lba = rng.random_range(0..blocks);
            world.write(lba, value);
            model[lba as usize] = value;
            // 20 MB/s.
            if value % 64 == 0 {
                world.turn(12_800).await;
            }
            if value % 4096 == 0 && value > 2 * blocks {
                let stats = world.volume.stats();
                worst = worst.max((stats.stored_bytes - stats.deletable_bytes) as f64 / stats.live_bytes as f64);
            }
        }
        world.rest().await;
        let written = model.iter().filter(|value| **value > 0).count() as u64 * BLOCK_SIZE;
        let stats = world.volume.stats();
        let bytes = world.bucket_bytes().await;
        assert_eq!(stats.stored_bytes, bytes);
        let (ratio, amplification) = (bytes as f64 / written as f64, stats.write_amplification().unwrap());
        println!("stored {ratio:.2} x live at rest, {worst:.2} at most; write amplification {amplification:.2}");
        println!("{} fresh, {} relocated chunks", stats.chunks, stats.relocated_chunks);
        assert!(ratio <= 1.6, "{bytes} bytes stored for {written} live ones");
        assert!(worst <= 1.7, "{worst}");
        assert!(amplification < 2.0, "{amplification}");
        for first in (0..blocks).step_by(1024) {
            let found = world.read(first, 1024).await;
            assert!(found == model[first as usize..first as usize + 1024], "blocks from {first} on");
        }
    });
}

#[test]
fn hot_overwrites_coalesce() {
    run(async {
        let mut world = World::new(64 * MIB, MIB).await;
        let mut rng = SmallRng::seed_from_u64(2);
        for value in 1..=50_000 {
            world.write(rng.random_range(0..64), value);
            if value % 64 == 0 {
                world.turn(6_400).await;
            }
        }
        world.rest().await;
        let stats = world.volume.stats();
        let put = stats.chunk_stored_bytes + stats.relocated_bytes;
        println!("{} bytes put for {} written", put, stats.write_bytes);
        assert!(put * 3 < stats.write_bytes, "{put} of {}", stats.write_bytes);
        assert!(world.bucket_bytes().await < MIB);
    });
}

#[test]
fn a_tebibyte_is_discarded_at_once_and_the_bucket_shrinks() {
    run(async {
        let size = 1 << 40;
        let mut world = World::new(size, MIB).await;
        let blocks = size / BLOCK_SIZE;
        for i in 0..16_384 {
            world.write(i * (blocks / 16_384) + i % 7, i + 1);
            if i % 64 == 0 {
                world.turn(6_400).await;
            }
        }
        world.rest().await;
        assert!(world.bucket_bytes().await > 64 * MIB);
        let started = Instant::now();
        let (trim, flush) = (world.token(), world.token());
        world.volume.trim(trim, 0, size, false);
        world.turn(10).await;
        world.volume.flush(flush);
        while !world.answers.contains_key(&flush.0) {
            world.turn(10).await;
        }
        assert!(world.answers.contains_key(&trim.0));
        assert!(started.elapsed() < Duration::from_secs(1), "{:?}", started.elapsed());
        world.rest().await;
        let left = world.bucket_bytes().await;
        assert!(left < 4096, "{left} bytes are left of a discarded volume");
        assert_eq!(world.read(0, 64).await, vec![0; 64]);
    });
}

/// Small chunks, as a trickle of writes leaves them, do not pile up.
#[test]
fn small_chunks_are_merged() {
    run(async {
        let mut world = World::new(64 * MIB, MIB).await;
        for i in 0..1000 {
            world.write(i * 16, i + 1);
            world.turn(5_100_000).await;
        }
        world.rest().await;
        let stats = world.volume.stats();
        assert!(stats.chunks >= 900, "each write went by itself: {}", stats.chunks);
        assert!(stats.bucket_chunks < 150, "{} chunks", stats.bucket_chunks);
        for i in (0..1000).step_by(99) {
            assert_eq!(world.read(i * 16, 1).await, [i + 1]);
        }
    });
}

/// Without a checkpoint nothing is deleted, and nothing copied either, because that could never be got back.
#[test]
fn nothing_happens_without_a_checkpoint() {
    run(async {
        let mut world = World::with_checkpoints(64 * MIB, MIB, u64::MAX).await;
        for value in 1..=2000 {
            world.write(value % 500, value);
            if value % 100 == 0 {
                world.turn(5_100_000).await;
            }
        }
        for _ in 0..100 {
            world.turn(1_000_000).await;
        }
        let stats = world.volume.stats();
        assert!(stats.deletable_bytes > 0);
        assert_eq!((stats.deleted_chunks, stats.relocated_chunks), (0, 0));
    });
}

#[test]
fn a_copy_of_what_is_in_the_bucket_adds_next_to_nothing() {
    run(async {
        // Fewer chunks than are merged for being small, which would move the blocks.
        const PART: u64 = 256 << 20;
        let (blocks, step) = (PART / BLOCK_SIZE, MIB / BLOCK_SIZE);
        let mut world = World::new(3 * PART, 16 * MIB).await;
        world.volume.set_codec(Codec::Lz4);
        for first in (0..blocks).step_by(step as usize) {
            let token = world.token();
            let data: Vec<u8> =
                (first..first + step).flat_map(|lba| (lba + 1).to_le_bytes().into_iter().cycle().take(BLOCK)).collect();
            world.volume.write(token, first * BLOCK_SIZE, WriteData::Copy(&data), false);
            world.turn(20_000).await;
        }
        world.rest().await;
        let before = world.volume.stats();

        let token = world.token();
        let since = world.now_us;
        world.volume.copy(token, 0, 2 * PART, PART, true);
        while !world.answers.contains_key(&token.0) {
            world.turn(10).await;
        }
        let answered = world.volume.stats();
        assert!(world.now_us - since < 10_000, "it took {} us", world.now_us - since);
        assert_eq!((answered.referred_blocks, answered.copied_bytes), (blocks, PART));
        assert_eq!(answered.dirty_bytes, 0, "no data is written");
        for first in [0, 4095, 4096, blocks - 8] {
            let expected: Vec<u64> = (first + 1..first + 9).collect();
            assert_eq!(world.read(2 * PART / BLOCK_SIZE + first, 8).await[..4], expected[..4], "before it is destaged");
        }
        world.rest().await;
        let after = world.volume.stats();
        let put = after.chunk_stored_bytes + after.relocated_bytes - before.chunk_stored_bytes - before.relocated_bytes;
        let checkpoint = after.checkpoint_sent_bytes - before.checkpoint_sent_bytes;
        println!("a copy of 256 MiB: {put} bytes of chunks, {checkpoint} bytes of checkpoints");
        assert!(put < 64 << 10, "{put} bytes were put");

        // Now the sources go, and the copies stay.
        let token = world.token();
        world.volume.trim(token, 0, PART - 16 * MIB, false);
        world.rest().await;
        for first in (0..blocks - 1024).step_by(1024) {
            let found = world.read(2 * PART / BLOCK_SIZE + first, 1024).await;
            assert!(found == (first + 1..first + 1025).collect::<Vec<_>>(), "blocks from {first} on");
        }
        assert_eq!(world.read(0, 1).await, [0]);
    });
}

#[test]
fn what_is_not_in_a_chunk_of_the_history_is_copied_all_the_same() {
    run(async {
        let mut world = World::new(64 * MIB, MIB).await;
        let mut rng = SmallRng::seed_from_u64(3);
        let half = 32 * MIB / BLOCK_SIZE;
        let mut model = vec![0u64; half as usize];
        // Most of this is moved by compaction, some of it is dirty, some is not there.
        for value in 1..=4 * half {
            let lba = rng.random_range(0..half * 3 / 4);
            world.write(lba, value);
            model[lba as usize] = value;
            if value % 64 == 0 {
                world.turn(12_800).await;
            }
        }
        world.rest().await;
        for value in 1_000_000..1_000_100 {
            let lba = rng.random_range(0..half);
            world.write(lba, value);
            model[lba as usize] = value;
        }
        let token = world.token();
        world.volume.copy(token, 0, 32 * MIB, 32 * MIB, false);
        for _ in 0..100_000 {
            if world.answers.contains_key(&token.0) {
                break;
            }
            world.turn(1_000).await;
        }
        assert!(world.answers.contains_key(&token.0), "it is answered");
        let stats = world.volume.stats();
        println!("{} of {half} blocks are references", stats.referred_blocks);
        for round in 0..2 {
            for first in (0..half).step_by(1024) {
                let found = world.read(half + first, 1024).await;
                assert!(found == model[first as usize..first as usize + 1024], "round {round}, blocks from {first} on");
            }
            world.rest().await;
        }
    });
}
