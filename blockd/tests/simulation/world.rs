//! One seed: several lives of a volume on a simulated disk and bucket.

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use blockd::chunk::{ChunkName, Codec};
use blockd::crypt::Keys;
use blockd::manifest::{self, CheckpointPointer, Durability, Manifest};
use blockd::outgoing::Outgoing;
use blockd::store::{
    FaultPlan, FaultRates, FaultyStore, ListEntry, MemoryStore, ObjectMeta, ObjectStore, Outage, PutMode, Version,
};
use blockd::table::{MemKv, TableHome};
use blockd::types::{BLOCK_SIZE, VolumeId};
use blockd::volume::{
    CompactionTuning, Effect, IoError, Job, JobDone, LogIo, LogOp, OpenError, OpenReport, Outcome, Parts, ReadNow,
    TableFrom, Token, Tuning, Volume, WriteData,
};
use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use xxhash_rust::xxh3::Xxh3Default;

use super::bucket::{make_volume, read_snapshot};
use super::disk::SimDisk;
use super::model::{ClientModel, History, SECTOR, SECTORS_PER_BLOCK, Value, sectors_of, value_of};

#[path = "snapshots.rs"]
mod snapshots;

const BLOCKS: usize = 512;
const SECTORS: usize = BLOCKS * SECTORS_PER_BLOCK;
const SEGMENT_BYTES: u64 = 256 * 1024;
const SEGMENTS_MAX: u32 = 8;
const NAME: &str = "sim";
/// Sectors in one compare-and-write, at most.
const COMPARED_MAX: usize = 5 * SECTORS_PER_BLOCK;
/// No request takes effect later than this after it was answered, by the bucket's clock.
const STALL_MAX: Duration = Duration::from_millis(200);

/// Blocks that became references, in all seeds.
pub static REFERRED: AtomicU64 = AtomicU64::new(0);
/// Compare-and-writes that wrote, and that did not.
pub static MATCHES: AtomicU64 = AtomicU64::new(0);
pub static MISMATCHES: AtomicU64 = AtomicU64::new(0);

/// Dies with the machine: a request begun before the crash is never answered after it.
#[derive(Debug)]
struct CrashStore {
    inner: FaultyStore<MemoryStore>,
    disk: Arc<SimDisk>,
}

impl CrashStore {
    /// An I/O that the crash may strike before it happens.
    async fn alive(&self) {
        if self.disk.io().is_err() {
            std::future::pending::<()>().await;
        }
        // Network and queueing take time; others get on meanwhile.
        tokio::time::sleep(Duration::from_micros(200)).await;
        if self.disk.crashed() {
            std::future::pending::<()>().await;
        }
    }
}

#[async_trait]
impl ObjectStore for CrashStore {
    async fn put(&self, key: &str, body: Bytes, mode: PutMode) -> blockd::store::Result<Version> {
        self.alive().await;
        self.inner.put(key, body, mode).await
    }
    async fn get(&self, key: &str) -> blockd::store::Result<(Bytes, Version)> {
        self.alive().await;
        self.inner.get(key).await
    }
    async fn get_range(&self, key: &str, range: Range<u64>) -> blockd::store::Result<Bytes> {
        self.alive().await;
        self.inner.get_range(key, range).await
    }
    async fn head(&self, key: &str) -> blockd::store::Result<ObjectMeta> {
        self.alive().await;
        self.inner.head(key).await
    }
    async fn list(&self, prefix: &str, after: Option<&str>) -> blockd::store::Result<Vec<ListEntry>> {
        self.alive().await;
        self.inner.list(prefix, after).await
    }
    async fn delete(&self, keys: &[String]) -> blockd::store::Result<()> {
        self.alive().await;
        self.inner.delete(keys).await
    }
    async fn delete_version(&self, key: &str, version: &Version) -> blockd::store::Result<()> {
        self.alive().await;
        self.inner.delete_version(key, version).await
    }
    fn describe(&self) -> String {
        "simulated bucket".into()
    }
}

struct PendingLog {
    io: LogIo,
    /// For a sync: what was done when it started.
    covers: Vec<u64>,
}

struct PendingRead {
    first: usize,
    count: usize,
    since: u64,
}

/// No request takes effect later than this after it was answered, by the volume's clock: with a shorter grace time a chunk
/// could come back after it was deleted.
const LATEST_US: u64 = 6_000_000;

/// What lasts from life to life.
pub struct World {
    rng: SmallRng,
    disk: Arc<SimDisk>,
    bucket: Arc<MemoryStore>,
    plan: Arc<FaultPlan>,
    kv: Arc<MemKv>,
    client: ClientModel,
    history: History,
    durability: Durability,
    next_value: Value,
    next_token: u64,
    owner: [u8; 16],
    now_us: u64,
    tuning: Tuning,
    keys: Option<Keys>,
    /// Horizons claimed when the last life ended.
    durable_lsn: u64,
    stored_lsn: u64,
    recoveries: u32,
    /// Whether the next opening goes by chunk headers alone, and where the table of the last one came from.
    rebuild: bool,
    opened_from: Option<TableFrom>,
    /// Whether the checkpoint was damaged, and whether it could not be done without.
    damaged: bool,
    lost: bool,
    snapshots: snapshots::Snapshots,
    /// Everything the engine asked for and answered, in order.
    digest: Xxh3Default,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Closed,
    Killed,
    PowerCut,
    DiskLost,
}

struct Life {
    volume: Volume,
    logs: Vec<PendingLog>,
    reads: HashMap<Token, PendingRead>,
    /// Changes that were not answered: a copy, or a write of part of a block, may get its LSN long after it was asked for.
    changes: HashSet<Token>,
    jobs: JoinSet<()>,
    sender: mpsc::UnboundedSender<JobDone>,
    done: mpsc::UnboundedReceiver<JobDone>,
    closing: bool,
}

impl Life {
    fn spawn(&mut self, job: Job) {
        let sender = self.sender.clone();
        self.jobs.spawn(async move {
            // Nobody listens once the life is over.
            let _ = sender.send(job.await);
        });
    }
}

impl World {
    pub async fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let bucket = Arc::new(MemoryStore::new());
        let durability = if rng.random_bool(0.3) { Durability::Object } else { Durability::Local };
        let codec = [Codec::None, Codec::Lz4, Codec::Zstd(1)][rng.random_range(0..3)];
        let manifest = Manifest {
            durability,
            codec,
            chunk_bytes: 128 * 1024,
            ..Manifest::new(VolumeId([rng.random(); 16]), NAME, BLOCKS as u64 * BLOCK_SIZE)
        };
        let keys = make_volume(&bucket, manifest, &mut rng, 0.3).await;
        let dirty_memory_bytes = [0, 64 << 10, 64 << 20][rng.random_range(0..3)];
        let tuning = Tuning {
            dirty_memory_bytes,
            block_cache_bytes: [0, 64 << 10, 64 << 20][rng.random_range(0..3)],
            // Drawn already: nothing, little or everything.
            keep_sequential_bytes: dirty_memory_bytes as u64,
            destage_age_us: [2_000, 50_000, 5_000_000][rng.random_range(0..3)],
            puts_max: rng.random_range(1..5),
            log_depth: rng.random_range(1..4),
            checkpoint_chunks: rng.random_range(1..12),
            checkpoint_age_us: [20_000, 2_000_000, 600_000_000][rng.random_range(0..3)],
            checkpoint_grace_us: [0, 1_000, 500_000][rng.random_range(0..3)],
            compaction: CompactionTuning {
                rate: [0, 1 << 20, 1 << 40][rng.random_range(0..3)],
                ratio: [1.1, 1.5, 2.0][rng.random_range(0..3)],
                floor: 0.2,
            },
            delete_grace_us: LATEST_US * rng.random_range(1..3),
            // The shorter makes reads fail, and writes of parts of blocks try again, while the bucket is in trouble.
            read_patience: Duration::from_millis(if seed.is_multiple_of(2) { 40 } else { 30_000 }),
        };
        Self {
            disk: Arc::new(SimDisk::new(SEGMENT_BYTES)),
            bucket,
            plan: FaultPlan::new(rng.random()),
            kv: MemKv::new(),
            client: ClientModel::new(SECTORS),
            history: History::default(),
            durability,
            next_value: 1,
            next_token: 1,
            owner: [rng.random(); 16],
            now_us: 1_000_000,
            tuning,
            keys,
            durable_lsn: 0,
            stored_lsn: 0,
            recoveries: 0,
            rebuild: false,
            opened_from: None,
            damaged: false,
            lost: false,
            snapshots: Default::default(),
            digest: Xxh3Default::new(),
            rng,
        }
    }

    /// Several lives, then a quiet end in which everything reaches the bucket, then the bucket alone. Returns a digest
    /// of all that happened: a seed that does not repeat cannot be examined.
    pub async fn run(mut self) -> u64 {
        let mut end = End::Closed;
        for _ in 0..self.rng.random_range(2..6) {
            end = self.life(end).await;
        }
        self.plan.set_rates(FaultRates::default());
        self.plan.set_outage(Outage::None);
        self.disk.crash_after(None);
        // What was given up lands by then: an object of a checkpoint that came after an owner looked for such is only found at a
        // later opening.
        tokio::time::sleep(2 * STALL_MAX).await;
        let mut life = self.open(end).await.expect("nothing goes wrong any more");
        let all = self.read_all(&mut life).await;
        self.check_recovered(&life, &all, end);
        for _ in 0..20 {
            self.random_request(&mut life);
            self.step(&mut life).await;
        }
        let last = self.settle_down(&mut life).await;
        self.check_snapshots().await;
        self.delete_snapshots(&mut life).await;
        self.tidy_up(&mut life).await;
        self.close(&mut life).await;
        drop(life);
        assert_eq!(self.stored_lsn, last, "everything reaches the bucket when it can");

        self.owner = [0xEE; 16];
        let pointer = self.manifest().await.checkpoint;
        let from = self.open_elsewhere(last, false).await;
        assert_eq!(matches!(from, TableFrom::Checkpoint { .. }), pointer.is_some(), "{from:?} with {pointer:?}");
        self.collect_everything().await;
        let last = self.history.last();
        if let Some(pointer) = self.manifest().await.checkpoint {
            // Losing it costs time, and nothing else, as long as all of the history is there.
            let whole = self.history_is_whole(pointer.seq).await;
            self.damage(&pointer).await;
            self.damaged = true;
            if whole {
                assert_eq!(self.open_elsewhere(last, false).await, TableFrom::Headers);
            } else {
                self.disk.wipe();
                self.kv = MemKv::new();
                assert!(self.open(End::DiskLost).await.is_none() && self.lost, "only a rebuild knows what was deleted");
            }
            self.damaged = false;
        }
        assert_eq!(self.open_elsewhere(last, true).await, TableFrom::Headers);
        if let Some(pointer) = self.manifest().await.checkpoint {
            blockd::checkpoint::restore::verify(self.bucket.as_ref(), &pointer, self.keys.as_ref(), |_| {})
                .await
                .expect("a bad one is dropped");
        }
        self.digest.digest()
    }

    /// Whether every chunk of the history up to `end` is there.
    async fn history_is_whole(&self, end: u64) -> bool {
        let manifest = self.manifest().await;
        let keys = self.bucket.keys();
        let there: HashSet<&str> = keys.iter().map(String::as_str).collect();
        (1..=end).all(|seq| {
            let name = ChunkName { volume: manifest.id, epoch: manifest.epoch_of(seq), seq };
            there.contains(name.key().as_str())
        })
    }

    async fn manifest(&self) -> Manifest {
        manifest::load(self.bucket.as_ref(), NAME).await.unwrap().0
    }

    /// Opens the volume on a host that has nothing, and compares it with the history. Returns where its table came from.
    async fn open_elsewhere(&mut self, last: u64, rebuild: bool) -> TableFrom {
        self.disk.wipe();
        self.kv = MemKv::new();
        self.rebuild = rebuild;
        let mut life = self.open(End::DiskLost).await.expect("the bucket alone is enough");
        self.rebuild = false;
        let from = self.opened_from.expect("it is open");
        let all = self.read_all(&mut life).await;
        self.check_recovered(&life, &all, End::DiskLost);
        assert_eq!(all, self.history.state(last, SECTORS));
        self.close(&mut life).await;
        from
    }

    /// An owner that writes and goes on long enough leaves nothing behind that its last checkpoint does not need.
    async fn collect_everything(&mut self) {
        let usual = self.tuning;
        self.tuning = Tuning { checkpoint_chunks: 1, checkpoint_age_us: 20_000, checkpoint_grace_us: 1_000, ..usual };
        let mut life = self.open(End::Closed).await.expect("nothing goes wrong any more");
        let token = self.token();
        let value = self.next_value;
        self.next_value += 1;
        let data = sectors_of(value, SECTORS_PER_BLOCK);
        self.client.change(token, 0, SECTORS_PER_BLOCK, value, false);
        life.volume.write(token, 0, WriteData::Copy(&data), false);
        self.settle_down(&mut life).await;
        let mut left = Vec::new();
        for _ in 0..10_000 {
            let manifest = self.manifest().await;
            let reached: HashSet<String> =
                blockd::checkpoint::collect::reached(self.bucket.as_ref(), &manifest, self.keys.as_ref())
                    .await
                    .unwrap()
                    .into_iter()
                    .collect();
            let there = self.bucket.keys().into_iter().filter(|key| key.starts_with("checkpoints/"));
            let there: HashSet<String> = there.collect();
            left = there.difference(&reached).cloned().collect();
            if there == reached && manifest.checkpoint.is_some_and(|c| c.lsn == self.history.last()) {
                self.close(&mut life).await;
                self.tuning = usual;
                return;
            }
            self.let_pass(&mut life, Duration::from_millis(2), 20_000).await;
        }
        panic!("garbage stays: {left:?}");
    }

    /// Spoils one object of a checkpoint.
    async fn damage(&mut self, pointer: &CheckpointPointer) {
        let checkpoint =
            blockd::checkpoint::restore::fetch_checkpoint(self.bucket.as_ref(), pointer, self.keys.as_ref())
                .await
                .unwrap();
        let keys: Vec<String> = checkpoint.keys().collect();
        let key = &keys[self.rng.random_range(0..keys.len())];
        let (object, _) = self.bucket.get(key).await.unwrap();
        if self.rng.random_bool(0.5) {
            let mut spoilt = object.to_vec();
            let at = self.rng.random_range(0..spoilt.len());
            spoilt[at] ^= 1 << self.rng.random_range(0..8);
            self.bucket.tamper(key, spoilt.into());
        } else {
            self.bucket.delete(std::slice::from_ref(key)).await.unwrap();
        }
    }

    fn faults(&mut self) -> FaultRates {
        let level = [0.0, 0.02, 0.15][self.rng.random_range(0..3)];
        FaultRates {
            fail_before: level,
            fail_after: level,
            land_late: level / 2.0,
            stall: level,
            throttle: level,
            truncate: level / 4.0,
            flip_bit: level / 4.0,
            stall_max: STALL_MAX,
            ops: Vec::new(),
        }
    }

    async fn life(&mut self, previous: End) -> End {
        let rates = self.faults();
        self.plan.set_rates(rates);
        let crash = self.rng.random_bool(0.8).then(|| self.rng.random_range(1..500));
        self.disk.crash_after(crash);
        let mut after = previous;
        let mut life = loop {
            match self.open(after).await {
                Some(life) => break life,
                None if self.disk.crashed() => {
                    after = worse(after, self.crash());
                    let again = self.rng.random_bool(0.5).then(|| self.rng.random_range(1..500));
                    self.disk.crash_after(again);
                }
                None => self.plan.set_rates(FaultRates::default()),
            }
        };
        let found = self.read_all(&mut life).await;
        if !self.disk.crashed() {
            self.check_recovered(&life, &found, after);
            self.check_snapshots().await;
            after = End::Closed;
        }
        let steps = self.rng.random_range(50..600);
        for _ in 0..steps {
            if self.disk.crashed() {
                break;
            }
            if self.rng.random_bool(0.005) {
                let outage = match self.rng.random_range(0..3) {
                    0 => Outage::Failing,
                    1 => Outage::Hanging(Duration::from_millis(300)),
                    _ => Outage::None,
                };
                self.plan.set_outage(outage);
            }
            if self.rng.random_bool(0.01) {
                self.rest(&mut life).await;
            }
            if self.rng.random_bool(0.01) {
                life.volume.set_codec([Codec::None, Codec::Lz4, Codec::Zstd(1)][self.rng.random_range(0..3)]);
            }
            self.random_request(&mut life);
            self.random_snapshot(&mut life);
            self.step(&mut life).await;
        }
        let end = if !self.disk.crashed() {
            self.plan.set_outage(Outage::None);
            if self.rng.random_bool(0.5) {
                self.close(&mut life).await;
            }
            if life.volume.closed() && !self.disk.crashed() {
                self.disk.retire();
                End::Closed
            } else {
                self.crash_now(&life)
            }
        } else {
            self.crash_now(&life)
        };
        self.plan.set_outage(Outage::None);
        life.jobs.abort_all();
        if end == End::DiskLost {
            self.disk.wipe();
            self.kv = MemKv::new();
        }
        worse(after, end)
    }

    fn remember(&mut self, life: &Life) {
        let stats = life.volume.stats();
        tracing::info!(?stats, "life over");
        REFERRED.fetch_add(stats.referred_blocks, Ordering::Relaxed);
        self.durable_lsn = stats.durable_lsn;
        self.stored_lsn = stats.destaged_lsn;
    }

    fn crash_now(&mut self, life: &Life) -> End {
        self.remember(life);
        self.crash()
    }

    fn crash(&mut self) -> End {
        tracing::info!("crash");
        let end = [End::Killed, End::PowerCut, End::DiskLost][self.rng.random_range(0..20usize).min(12) / 5 % 3];
        match end {
            End::Killed => self.disk.kill(&mut self.rng),
            _ => self.disk.power_cut(&mut self.rng),
        }
        self.kv.crash(&mut self.rng);
        end
    }

    /// Opens the volume; none when the disk crashed or the bucket failed on the way.
    async fn open(&mut self, _after: End) -> Option<Life> {
        let store =
            CrashStore { inner: FaultyStore::new(self.bucket.clone(), self.plan.clone()), disk: self.disk.clone() };
        let parts = Parts {
            home: TableHome::Memory(self.kv.clone()),
            rebuild: self.rebuild,
            segments_max: SEGMENTS_MAX,
            keys: self.keys.clone(),
            ..Parts::repeatable(Arc::new(store), self.disk.clone(), self.tuning)
        };
        let disk = self.disk.clone();
        let crashed = async move {
            while !disk.crashed() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let opened = tokio::select! {
            biased;
            opened = async {
                let (manifest, _) = manifest::open(self.bucket.as_ref(), NAME, self.keys.as_ref()).await.unwrap();
                Volume::open_parts(parts, manifest, self.owner).await
            } => opened,
            () = crashed => return None,
        };
        let (volume, report): (Volume, OpenReport) = match opened {
            Ok(opened) => opened,
            Err(OpenError::CheckpointLost { .. }) if self.damaged => {
                self.lost = true;
                return None;
            }
            Err(e) => {
                let text = e.to_string();
                let expected = text.contains("injected") || text.contains("machine is off") || text.contains("damaged");
                let lost_race = text.contains("changed") || text.contains("Precondition");
                assert!(expected || lost_race || self.disk.crashed(), "opening failed: {text}");
                let blames_the_log = text.contains("were durable, but") || text.contains("the log starts at");
                assert!(!blames_the_log, "a crash is no rot: {text}");
                return None;
            }
        };
        tracing::info!(?report, "opened");
        self.opened_from = Some(report.table);
        self.digest.update(format!("{:?}", report.table).as_bytes());
        self.history.truncate(report.last_lsn);
        let (sender, done) = mpsc::unbounded_channel();
        let mut life = Life {
            volume,
            logs: Vec::new(),
            reads: HashMap::new(),
            changes: HashSet::new(),
            jobs: JoinSet::new(),
            sender,
            done,
            closing: false,
        };
        life.volume.advance(self.now_us);
        self.carry_out(&mut life);
        Some(life)
    }

    /// Lets compaction and deletion do all they can, and checks what is left.
    async fn tidy_up(&mut self, life: &mut Life) {
        for round in 0.. {
            assert!(round < 20_000, "compaction and deletion never come to rest: {:?}", life.volume.stats());
            self.let_pass(life, Duration::from_millis(2), 1_000_000).await;
            let empty = life.volume.table().position().seq == 0;
            let settled = life.volume.checkpointed().is_some() && life.volume.waits_for_checkpoint() == 0;
            if life.volume.is_tidy() && (empty || settled) {
                break;
            }
        }
        life.volume.table().recount().expect("accounts are exact");
        let stats = life.volume.stats();
        tracing::info!(?stats, "tidy");
        assert_eq!(stats.compaction_trouble, None);
        // The newest chunk of the history stays in any case.
        let dead = life.volume.table().space().dead_chunks;
        assert!(dead <= 1, "{dead} dead chunks are left: {stats:?}");
        let epochs = manifest::load(self.bucket.as_ref(), NAME).await.unwrap().0.epochs;
        for key in self.bucket.keys() {
            let Some(name) = ChunkName::parse(&key) else { continue };
            let next = epochs.iter().find(|e| e.epoch > name.epoch).map_or(u64::MAX, |e| e.first_seq);
            let current = name.epoch == life.volume.epoch();
            // Of earlier owners there may be chunks that arrived too late to count.
            let in_history = !name.is_relocated() && name.seq < next;
            if current || in_history {
                assert!(life.volume.table().knows(name.seq), "{key} is garbage");
            }
        }
    }

    /// The recovered state is a prefix of the history that contains all it must.
    fn check_recovered(&mut self, life: &Life, found: &[Value], after: End) {
        let last = life.volume.stats().accepted_lsn;
        let (must, horizon) = match after {
            End::Closed | End::Killed => (self.durable_lsn, u64::MAX),
            End::PowerCut => (self.durable_lsn, self.client.flushed),
            End::DiskLost => (self.stored_lsn, self.client.flushed),
        };
        assert!(last >= must, "recovered up to {last} after {after:?}, but {must} was promised");
        assert!(found == self.history.state(last, SECTORS), "the state after {after:?} is no prefix of the history");
        // With the disk goes what only the log held. The client model counts what it saw after a recovery as certain,
        // so it can judge the loss of a disk only for flushes to the bucket and before the first recovery.
        let judges = after != End::DiskLost || (self.durability == Durability::Object && self.recoveries == 1);
        self.recoveries += 1;
        if !judges {
            self.client = ClientModel::new(SECTORS);
            let token = self.token();
            for (sector, &value) in found.iter().enumerate() {
                self.client.change(Token(token.0 + sector as u64), sector, 1, value, false);
                self.client.acked(Token(token.0 + sector as u64));
            }
            self.next_token += found.len() as u64;
        }
        self.client.settle(found, horizon);
        self.durable_lsn = last;
        self.stored_lsn = life.volume.stats().destaged_lsn;
    }

    fn token(&mut self) -> Token {
        self.next_token += 1;
        Token(self.next_token)
    }

    fn random_request(&mut self, life: &mut Life) {
        if life.closing || self.rng.random_bool(0.3) {
            return;
        }
        let token = self.token();
        let first = self.rng.random_range(0..SECTORS);
        let count = match self.rng.random_range(0..10) {
            0 => self.rng.random_range(1..600),
            1..=4 => self.rng.random_range(1..40),
            _ => SECTORS_PER_BLOCK,
        };
        let aligned = self.rng.random_bool(0.7);
        let first = if aligned { first / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK } else { first };
        let count = if aligned { count.next_multiple_of(SECTORS_PER_BLOCK) } else { count };
        let count = count.min(SECTORS - first);
        let (offset, len) = ((first * SECTOR) as u64, (count * SECTOR) as u64);
        let fua = self.rng.random_bool(0.1);
        match self.rng.random_range(0..24) {
            0..=9 => {
                let value = self.next_value;
                self.next_value += 1;
                let data = sectors_of(value, count);
                self.client.change(token, first, count, value, fua);
                life.changes.insert(token);
                if self.rng.random_bool(0.2) && aligned {
                    let buf = blockd::buf::AlignedBuf::copy_of(&data);
                    life.volume.write(token, offset, WriteData::Owned(buf, data.len()), fua);
                } else {
                    life.volume.write(token, offset, WriteData::Copy(&data), fua);
                }
            }
            10 => {
                self.client.change(token, first, count, 0, fua);
                life.changes.insert(token);
                let no_hole = self.rng.random_bool(0.5);
                life.volume.zero(token, offset, len, fua, no_hole);
            }
            11 => {
                // Partial blocks of a trim stay as they are.
                let from = first.next_multiple_of(SECTORS_PER_BLOCK);
                let to = (first + count) / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK;
                self.client.change(token, from.min(to), to.saturating_sub(from), 0, fua);
                life.changes.insert(token);
                life.volume.trim(token, offset, len, fua);
            }
            12..=14 => {
                self.client.flush(token);
                life.volume.flush(token);
            }
            15 => {
                life.volume.prefetch(token, offset, len);
            }
            20..=22 => self.copy(life, token, first, count, fua),
            23 => self.compare(life, token, first, count.min(COMPARED_MAX), fua),
            _ => self.read(life, token, first, count),
        }
    }

    /// Writes if there is what is most likely there.
    fn compare(&mut self, life: &mut Life, token: Token, first: usize, count: usize, fua: bool) {
        let mut expected: Vec<Value> = (first..first + count).map(|sector| self.client.likely(sector)).collect();
        if self.rng.random_bool(0.2) {
            let at = self.rng.random_range(0..count);
            expected[at] = self.next_value;
        }
        let value = self.next_value + 1;
        self.next_value += 2;
        let wanted = expected.iter().flat_map(|value| sectors_of(*value, 1)).collect();
        let data = sectors_of(value, count);
        self.client.compare(token, first, expected, value, fua);
        life.changes.insert(token);
        life.volume.compare_write(token, (first * SECTOR) as u64, wanted, data, fua);
    }

    /// Copies whole blocks to somewhere else.
    fn copy(&mut self, life: &mut Life, token: Token, first: usize, count: usize, fua: bool) {
        let first = first / SECTORS_PER_BLOCK * SECTORS_PER_BLOCK;
        let count = count.next_multiple_of(SECTORS_PER_BLOCK).min(SECTORS - first);
        let to = self.rng.random_range(0..=BLOCKS - count / SECTORS_PER_BLOCK) * SECTORS_PER_BLOCK;
        if (first < to + count && to < first + count) || self.client.is_copied_to(to, count) {
            return;
        }
        self.client.copy(token, first, to, count, fua);
        life.changes.insert(token);
        let bytes = |sectors: usize| (sectors * SECTOR) as u64;
        life.volume.copy(token, bytes(first), bytes(to), bytes(count), fua);
    }

    fn read(&mut self, life: &mut Life, token: Token, first: usize, count: usize) {
        let since = self.client.now();
        let mut out = Outgoing::new();
        match life.volume.read(token, (first * SECTOR) as u64, (count * SECTOR) as u32, &mut out) {
            ReadNow::Ready { holes } => {
                self.check_read(&PendingRead { first, count, since }, &out.to_vec(), &holes);
            }
            ReadNow::Pending => {
                life.reads.insert(token, PendingRead { first, count, since });
            }
            ReadNow::Failed(e) => panic!("a read was refused: {e}"),
        }
    }

    fn check_read(&self, read: &PendingRead, bytes: &[u8], holes: &[(usize, usize)]) {
        assert_eq!(bytes.len(), read.count * SECTOR);
        for &(at, len) in holes {
            assert!(bytes[at..at + len].iter().all(|&b| b == 0), "a hole reads as zeroes");
        }
        for (i, sector) in bytes.chunks(SECTOR).enumerate() {
            let value = value_of(sector);
            assert!(
                self.client.allows(read.first + i, value, read.since + 1),
                "a read begun at {} returned {value} for sector {}, which had been overwritten: {}",
                read.since,
                read.first + i,
                self.client.describe(read.first + i)
            );
        }
    }

    /// Something happens: a log operation ends, a job ends, time passes.
    async fn step(&mut self, life: &mut Life) {
        match self.rng.random_range(0..4) {
            0 | 1 if !life.logs.is_empty() => self.finish_log(life),
            2 => {
                let us = self.rng.random_range(1..3_000);
                tokio::time::sleep(Duration::from_micros(us)).await;
                self.now_us += us;
            }
            _ => tokio::task::yield_now().await,
        }
        while let Ok(done) = life.done.try_recv() {
            life.volume.job_done(done);
        }
        self.carry_out(life);
        if self.rng.random_bool(0.7) {
            life.volume.advance(self.now_us);
            self.carry_out(life);
        }
    }

    /// Nobody asks for anything for a while, long enough for whatever is done only then.
    async fn rest(&mut self, life: &mut Life) {
        for _ in 0..self.rng.random_range(1..40) {
            if self.disk.crashed() {
                return;
            }
            self.let_pass(life, Duration::from_millis(2), 50_000).await;
        }
    }

    /// Ends what runs in the log, lets time pass for the bucket and for the volume, and tells it what ended.
    async fn let_pass(&mut self, life: &mut Life, bucket: Duration, volume_us: u64) {
        while !life.logs.is_empty() && !self.disk.crashed() {
            self.finish_log(life);
        }
        tokio::time::sleep(bucket).await;
        self.now_us += volume_us;
        while let Ok(done) = life.done.try_recv() {
            life.volume.job_done(done);
        }
        life.volume.advance(self.now_us);
        self.carry_out(life);
    }

    fn start_log(&mut self, life: &mut Life, io: LogIo) {
        let client = &self.client;
        self.history.observe(&io.op, |sector| client.source_of(sector), |history, lsn| history.state(lsn, SECTORS));
        self.disk.submit(io.id, &io.op);
        let covers = match &io.op {
            LogOp::Sync { segment } => {
                self.digest.update(&segment.to_le_bytes());
                self.disk.done_writes(*segment)
            }
            LogOp::Write { bufs, .. } => {
                bufs.iter().for_each(|buf| self.digest.update(buf));
                if self.rng.random_bool(0.5) && self.disk.hand(io.id) {
                    life.volume.log_handed(io.id);
                }
                Vec::new()
            }
        };
        life.logs.push(PendingLog { io, covers });
    }

    fn finish_log(&mut self, life: &mut Life) {
        let at = self.rng.random_range(0..life.logs.len());
        let PendingLog { io, covers } = life.logs.swap_remove(at);
        if self.disk.finish(io.id, &io.op, &covers).is_ok() {
            life.volume.log_done(io.id, Ok(()));
        }
    }

    fn carry_out(&mut self, life: &mut Life) {
        while let Some(effect) = life.volume.next_effect() {
            match effect {
                Effect::Log(io) => self.start_log(life, io),
                Effect::Spawn(job) => life.spawn(job),
                Effect::Complete(done) => {
                    self.digest.update(&done.token.0.to_le_bytes());
                    life.changes.remove(&done.token);
                    if self.disk.crashed() {
                        continue;
                    }
                    match (life.reads.remove(&done.token), done.result) {
                        (Some(read), Ok(Outcome::Data(data))) => {
                            self.check_read(&read, &data.bytes.to_vec(), &data.holes)
                        }
                        (Some(_), Err(IoError::Read(why))) => {
                            let lost = why.contains("missing from the bucket") || why.contains("not listed");
                            assert!(!lost, "a chunk that is needed was deleted: {why}");
                        }
                        (Some(_), Err(IoError::Shutdown)) => {}
                        (None, Ok(Outcome::Mismatch)) => {
                            assert!(self.client.compared(done.token, false), "only a comparison is a mismatch");
                            MISMATCHES.fetch_add(1, Ordering::Relaxed);
                        }
                        (None, Ok(_)) => {
                            if self.client.compared(done.token, true) {
                                MATCHES.fetch_add(1, Ordering::Relaxed);
                            }
                            self.client.acked(done.token);
                        }
                        (None, Err(IoError::Shutdown)) if life.closing => {}
                        // Part of a block, whose rest came damaged from the bucket each time it was read.
                        (None, Err(IoError::Read(why))) if why.contains("is damaged") => {}
                        (_, other) => panic!("unexpected answer {other:?}"),
                    }
                }
            }
        }
    }

    async fn read_all(&mut self, life: &mut Life) -> Vec<Value> {
        let mut state = Vec::with_capacity(SECTORS);
        for _ in 0..200 {
            state.clear();
            for first in (0..SECTORS).step_by(SECTORS / 8) {
                let token = self.token();
                let mut out = Outgoing::new();
                let len = (SECTORS / 8 * SECTOR) as u32;
                match life.volume.read(token, (first * SECTOR) as u64, len, &mut out) {
                    ReadNow::Ready { .. } => {}
                    ReadNow::Pending => match self.wait_for(life, token).await {
                        Some(Outcome::Data(data)) => out = data.bytes,
                        _ => break,
                    },
                    ReadNow::Failed(e) => panic!("{e}"),
                }
                state.extend(out.to_vec().chunks(SECTOR).map(value_of));
            }
            if state.len() == SECTORS || self.disk.crashed() {
                return state;
            }
            // The bucket failed for longer than a read waits; a client would see an error and try again.
            self.plan.set_rates(FaultRates::default());
        }
        panic!("the volume cannot be read");
    }

    /// Runs until a request is answered; none when it failed or the machine went off.
    async fn wait_for(&mut self, life: &mut Life, token: Token) -> Option<Outcome> {
        for _ in 0..100_000 {
            if self.disk.crashed() {
                return None;
            }
            let mut found = None;
            while let Some(effect) = life.volume.next_effect() {
                match effect {
                    Effect::Complete(done) if done.token == token => found = Some(done.result.ok()),
                    Effect::Complete(_) => {}
                    Effect::Log(io) => self.start_log(life, io),
                    Effect::Spawn(job) => life.spawn(job),
                }
            }
            if let Some(found) = found {
                return found;
            }
            tokio::time::sleep(Duration::from_micros(500)).await;
            self.now_us += 500;
            while let Ok(done) = life.done.try_recv() {
                life.volume.job_done(done);
            }
        }
        panic!("a read is never answered");
    }

    /// Lets everything reach the bucket; returns the last LSN.
    async fn settle_down(&mut self, life: &mut Life) -> u64 {
        for _ in 0..200_000 {
            self.let_pass(life, Duration::from_millis(2), 20_000).await;
            let stats = life.volume.stats();
            let written = stats.dirty_bytes == 0 && stats.destaged_lsn == stats.accepted_lsn;
            let quiet = life.logs.is_empty() && life.changes.is_empty() && written;
            if quiet && stats.log_used_bytes <= SEGMENT_BYTES {
                assert_eq!(stats.accepted_lsn, self.history.last());
                return stats.accepted_lsn;
            }
        }
        panic!("the volume never comes to rest: {:?}", life.volume.stats());
    }

    async fn close(&mut self, life: &mut Life) {
        life.closing = true;
        life.volume.close();
        for _ in 0..100_000 {
            if life.volume.closed() || self.disk.crashed() {
                break;
            }
            self.let_pass(life, Duration::from_millis(1), 1_000).await;
        }
        assert!(life.volume.closed() || self.disk.crashed(), "an orderly shutdown ends");
        self.remember(life);
    }
}

/// What may be lost by two ends, one after the other.
fn worse(a: End, b: End) -> End {
    let rank = |e: End| [End::Closed, End::Killed, End::PowerCut, End::DiskLost].iter().position(|x| *x == e);
    if rank(a) >= rank(b) { a } else { b }
}
