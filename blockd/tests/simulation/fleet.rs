//! Several hosts that want the same volume, each with a disk, a way to the bucket and clocks of its own.
//!
//! Hosts crash, lose their disks, are stopped and go on, are cut off, have their clocks set, release the volume, take it by
//! force, and compact and delete beside each other. The lease is the real one ([`blockd::lease`]); so is the engine. What
//! is checked, whatever happens:
//!
//! - **One history.** The state a host finds is, sector by sector, a prefix of what the owner before it was told, and goes
//!   on from there.
//! - **Kept promises.** A flush with durability `object` is in every later state. One with `local` is there when its host
//!   comes back before anybody else went on; if somebody did, the writes are found stranded, never dropped.
//! - **No mix.** What a read returns is what the history of its host allows.
//! - **One at a time.** While clocks are no further apart than the lease bears and nobody uses force, no host answers after
//!   another took the volume.
//! - **Readers beside the owner** see prefixes of the same history, one after the other.
//! - **A snapshot** reads as the history up to its LSN, whoever has owned the volume since and whatever was compacted.
//! - **A restore** happens or does not; after it the state is the snapshot's, with what is written since on top.
//! - **A clone** has a history of its own, which begins with the snapshot it was made of, whatever became of its origin.
//! - **Nothing needed is deleted**, and when all has come to rest, nothing is left that nobody needs.

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use blockd::chunk::{ChunkName, Codec, ReadError};
use blockd::crypt::Keys;
use blockd::lease::{self, AcquireError, Held, Instants, Lease, LeaseState, Lost, Order, Sighting, Unsent};
use blockd::manifest::{self, CheckpointName, Durability, EpochStart, Hold, Manifest};
use blockd::outgoing::Outgoing;
use blockd::store::{
    FaultPlan, FaultRates, FaultyStore, ListEntry, MemoryStore, ObjectMeta, ObjectStore, Outage, PutMode, Version,
};
use blockd::table::{MemKv, TableHome};
use blockd::types::{BLOCK_SIZE, Lsn, VolumeId};
use blockd::volume::{
    Blocking, CompactionTuning, Effect, IoError, Job, JobDone, LogIo, LogOp, OpenError, OpenReport, Outcome, Parts,
    ReadNow, Stranded, StrandedKind, Token, Tuning, Volume, WriteData,
};
use bytes::Bytes;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use super::bucket::{make_volume, read_snapshot};
use super::disk::SimDisk;
use super::model::{ClientModel, History, SECTOR, SECTORS_PER_BLOCK, Value, sectors_of, value_of};

#[path = "fleet_clones.rs"]
mod clones;
#[path = "fleet_readers.rs"]
mod readers;
#[path = "fleet_renewals.rs"]
mod renewals;
#[path = "fleet_restores.rs"]
mod restores;
#[path = "fleet_store.rs"]
mod store;

use clones::Family;
use readers::{Asked, follow};
use renewals::Renewals;
use restores::Reset;
use store::{Clocks, HostStore};

const BLOCKS: usize = 128;
const SECTORS: usize = BLOCKS * SECTORS_PER_BLOCK;
const SEGMENT_BYTES: u64 = 256 * 1024;
const NAME: &str = "shared";
const LEASE_MS: u64 = 1_000;
/// No request takes effect later than this after it was answered.
const LATEST: Duration = Duration::from_millis(200);

/// What a volume holds, block by block.
type State = Rc<Vec<Value>>;

/// What all hosts of a volume share, and what is known of them from outside.
struct Shared {
    name: String,
    bucket: Arc<MemoryStore>,
    durability: Durability,
    keys: Option<Keys>,
    tuning: Tuning,
    start: Instant,
    /// Clocks stay close enough and nobody uses force: only one host answers at a time.
    strict: bool,
    /// What the owner of each epoch was told, on top of what it found.
    histories: RefCell<BTreeMap<u64, Rc<RefCell<History>>>>,
    /// Flushed to the bucket and acknowledged, with the epoch of the owner that said so.
    promised: RefCell<Vec<(u64, Lsn)>>,
    /// Snapshots whose making was answered, and whose deletion nobody asked for, with the least LSN of each.
    snapshots: RefCell<BTreeMap<String, Lsn>>,
    /// States at which the history begins anew, oldest first: by a restore, or because it is a clone's.
    resets: RefCell<Vec<Reset>>,
    /// What restores that were tried were to lead to, by seq and epoch of the snapshot.
    wanted: RefCell<BTreeMap<(u64, u64), State>>,
    /// Clones for which hidden snapshots were made.
    orders: RefCell<Vec<Hold>>,
    /// Who took the lease last.
    holder: Cell<usize>,
    over: Rc<Cell<bool>>,
    next_value: Rc<Cell<Value>>,
    counts: Rc<RefCell<BTreeMap<&'static str, u64>>>,
}

impl Shared {
    fn count(&self, what: &'static str) {
        *self.counts.borrow_mut().entry(what).or_default() += 1;
    }

    fn value(&self) -> Value {
        let value = self.next_value.get();
        self.next_value.set(value + 1);
        value
    }
}

struct PendingLog {
    io: LogIo,
    covers: Vec<u64>,
}

struct PendingRead {
    first: usize,
    count: usize,
    since: u64,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Closed,
    Killed,
    PowerCut,
    DiskLost,
}

/// A host that holds the volume.
struct Serving {
    volume: Volume,
    epoch: u64,
    history: Rc<RefCell<History>>,
    client: ClientModel,
    logs: Vec<PendingLog>,
    reads: HashMap<Token, PendingRead>,
    /// Changes that were accepted, with their last LSN.
    changes: HashMap<Token, Lsn>,
    /// Flushes, with what was acknowledged when they were sent.
    flushes: HashMap<Token, Lsn>,
    /// Up to here all was acknowledged, and flushed.
    acked: Lsn,
    flushed: Lsn,
    asked: Asked,
    jobs: JoinSet<()>,
    sender: mpsc::UnboundedSender<JobDone>,
    done: mpsc::UnboundedReceiver<JobDone>,
    releasing: bool,
}

/// What clients were told by the last process of a host.
#[derive(Clone, Copy, Debug)]
struct Debt {
    epoch: u64,
    acked: Lsn,
    flushed: Lsn,
}

struct Host {
    index: usize,
    id: [u8; 16],
    rng: SmallRng,
    shared: Rc<Shared>,
    clocks: Arc<Clocks>,
    disk: Arc<SimDisk>,
    kv: Arc<MemKv>,
    plan: Arc<FaultPlan>,
    stopped: Arc<AtomicBool>,
    processes: Arc<AtomicU64>,
    next_token: u64,
    /// How many steps a process makes.
    steps: Range<u32>,
    /// How likely it goes back to a snapshot before it opens the volume.
    goes_back: f64,
    /// What the log here must still hold.
    owes: Option<Debt>,
    seen: Option<Sighting>,
}

impl Host {
    fn new(index: usize, shared: Rc<Shared>, rng: &mut SmallRng) -> Self {
        Self {
            index,
            id: [index as u8 + 1; 16],
            rng: SmallRng::seed_from_u64(rng.random()),
            clocks: Arc::new(Clocks {
                start: shared.start,
                steady_off_ms: rng.random_range(1_000..1_000_000),
                wall_off_ms: AtomicI64::new(0),
            }),
            shared,
            disk: Arc::new(SimDisk::new(SEGMENT_BYTES)),
            kv: MemKv::new(),
            plan: FaultPlan::new(rng.random()),
            stopped: Arc::default(),
            processes: Arc::default(),
            next_token: 0,
            steps: 50..1500,
            goes_back: 0.15,
            owes: None,
            seen: None,
        }
    }

    fn store(&self) -> Arc<HostStore> {
        Arc::new(HostStore {
            inner: FaultyStore::new(self.shared.bucket.clone(), self.plan.clone()),
            disk: self.disk.clone(),
            stopped: self.stopped.clone(),
            process: self.processes.load(Ordering::Relaxed),
            processes: self.processes.clone(),
        })
    }

    fn token(&mut self) -> Token {
        self.next_token += 1;
        Token(self.next_token)
    }

    /// Processes, one after the other, until the world ends.
    async fn live(mut self) -> Self {
        while !self.shared.over.get() {
            let idle = self.rng.random_range(0..400);
            tokio::time::sleep(Duration::from_millis(idle)).await;
            self.process().await;
        }
        self
    }

    /// What goes wrong with requests of a process.
    fn trouble_ahead(&mut self) -> FaultRates {
        let level = [0.0, 0.02, 0.1][self.rng.random_range(0..3)];
        FaultRates {
            fail_before: level,
            fail_after: level,
            land_late: level / 2.0,
            stall: level,
            throttle: level,
            truncate: level / 4.0,
            flip_bit: level / 4.0,
            stall_max: LATEST,
            ops: Vec::new(),
        }
    }

    /// One process: from its start to its end.
    async fn process(&mut self) {
        let rates = self.trouble_ahead();
        self.plan.set_rates(rates);
        self.plan.set_outage(Outage::None);
        let crash = self.rng.random_bool(0.4).then(|| self.rng.random_range(1..1500));
        self.disk.crash_after(crash);
        let disk = self.disk.clone();
        let crashed = async move {
            while !disk.crashed() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let over = self.shared.clone();
        let ended = async move {
            while !over.over.get() {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        let force = !self.shared.strict && self.rng.random_bool(0.2);
        let opened = tokio::select! {
            biased;
            opened = self.open(force) => opened,
            () = crashed => None,
            () = ended => None,
        };
        let end = match opened {
            Some((serving, held)) => self.serve(serving, held).await,
            None => self.crash(),
        };
        self.processes.fetch_add(1, Ordering::Relaxed);
        self.stopped.store(false, Ordering::Relaxed);
        if end == End::DiskLost {
            self.lose_disk();
        }
    }

    fn lose_disk(&mut self) {
        self.disk.wipe();
        self.kv = MemKv::new();
        self.owes = None;
    }

    /// The process ends at once, perhaps with the machine.
    fn crash(&mut self) -> End {
        let end = match self.rng.random_range(0..10) {
            0..=5 => End::Killed,
            6..=7 => End::PowerCut,
            _ => End::DiskLost,
        };
        match end {
            End::Killed => self.disk.kill(&mut self.rng),
            _ => self.disk.power_cut(&mut self.rng),
        }
        self.kv.crash(&mut self.rng);
        if let Some(debt) = &mut self.owes
            && end == End::PowerCut
        {
            debt.acked = debt.flushed;
        }
        end
    }

    /// Takes the lease, whenever it is to be had, and opens the volume; none when that does not work out.
    async fn open(&mut self, force: bool) -> Option<(Serving, Held)> {
        let store = self.store();
        let shared = self.shared.clone();
        let name = shared.name.as_str();
        let mut goes_back = self.rng.random_bool(self.goes_back);
        loop {
            let manifest = manifest::open(store.as_ref(), name, self.shared.keys.as_ref()).await;
            let Ok((manifest, _)) = manifest else {
                tokio::time::sleep(Duration::from_millis(20)).await;
                continue;
            };
            if self.stranded(&manifest) {
                continue;
            }
            let wanted = self.wanted_lease(&manifest);
            let clocks = self.clocks.clone();
            let clock = move || clocks.now();
            let acquired = match lease::acquire(store.as_ref(), name, wanted, self.seen, force, &clock).await {
                Ok(acquired) => acquired,
                Err(AcquireError::Held { seen, .. }) => {
                    self.seen = Some(seen);
                    let pause = self.rng.random_range(10..200);
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                    continue;
                }
                Err(AcquireError::Lease(_)) => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    continue;
                }
            };
            self.shared.holder.set(self.index);
            tracing::info!(host = self.index, verdict = ?acquired.verdict, "took the lease");
            self.shared.count(if force { "forced" } else { "taken" });
            let mut held = Held::new(name, acquired);
            if std::mem::take(&mut goes_back) && manifest.snapshots.iter().any(|snapshot| !snapshot.hidden) {
                let clocks = self.clocks.clone();
                tokio::select! {
                    biased;
                    () = self.go_back(&store, &manifest) => {}
                    _ = Self::renew_while_opening(&clocks, store.as_ref(), &mut held) => {}
                }
                self.stopped.store(false, Ordering::Relaxed);
                // Whatever came of it: as the bucket says.
                continue;
            }
            let expected = manifest.epochs.last().map_or(0, |e| e.epoch);
            let opening = Volume::open_parts(self.parts(store.clone(), expected), manifest, self.id);
            let opened = tokio::select! {
                biased;
                opened = opening => opened,
                lost = Self::renew_while_opening(&self.clocks, store.as_ref(), &mut held) => {
                    tracing::info!(host = self.index, ?lost, "lost while it was being opened");
                    continue;
                }
            };
            match opened {
                Ok((volume, report)) => {
                    let grant = held.keeper.grant()?;
                    let mut serving = self.begin(volume, &report)?;
                    held.lease.epoch = serving.epoch;
                    serving.volume.grant(grant, self.clocks.now());
                    return Some((serving, held));
                }
                Err(error) => {
                    self.judge_refusal(&error);
                    return None;
                }
            }
        }
    }

    /// The lease as this host would hold it.
    fn wanted_lease(&mut self, manifest: &Manifest) -> Lease {
        Lease {
            volume: manifest.id,
            state: LeaseState::Held,
            host: self.id,
            claim: self.rng.random(),
            host_name: format!("host {}", self.index),
            epoch: 0,
            counter: 0,
            duration_ms: LEASE_MS,
            since_ms: 0,
            renewed_ms: 0,
            bucket_lsn: 0,
            last_lsn: 0,
            dirty_bytes: 0,
        }
    }

    /// Opening may take longer than the lease; this ends only when that is lost.
    async fn renew_while_opening(clocks: &Clocks, store: &dyn ObjectStore, held: &mut Held) -> Option<Lost> {
        loop {
            tokio::time::sleep(Duration::from_millis(LEASE_MS / 50)).await;
            let Order::Renew(number) = held.keeper.tick(clocks.now()) else { continue };
            match held.renew(store, None, clocks.now().wall_ms).await {
                Ok(None) => held.keeper.renewed(number, clocks.now()),
                Ok(lost) => return lost,
                Err(_) => held.keeper.failed(number, clocks.now()),
            }
        }
    }

    fn parts(&self, store: Arc<HostStore>, expected: u64) -> Parts {
        let clocks = self.clocks.clone();
        Parts {
            home: TableHome::Memory(self.kv.clone()),
            last_epoch: Some(expected),
            wall: Arc::new(move || clocks.now().wall_ms),
            keys: self.shared.keys.clone(),
            ..Parts::repeatable(store, self.disk.clone(), self.shared.tuning)
        }
    }

    /// Looks for writes that the history went on without; they are set aside. Whether there were any.
    fn stranded(&mut self, manifest: &Manifest) -> bool {
        let Ok(found) = Stranded::find(self.disk.as_ref(), manifest, self.id) else { return false };
        let Some(stranded) = found else {
            // If others went on, it was from behind all that was promised here.
            if let Some(debt) = self.owes {
                let theirs = |e: &&EpochStart| e.epoch > debt.epoch && e.owner != self.id && e.first_seq > 0;
                if let Some(next) = manifest.epochs.iter().find(theirs) {
                    assert!(next.first_lsn > debt.acked, "{debt:?} was dropped by {next:?} without a word");
                }
            }
            return false;
        };
        let (first, last) = stranded.lsns();
        tracing::info!(host = self.index, first, last, epoch = stranded.epoch, "stranded");
        self.shared.count("stranded");
        let history = self.shared.histories.borrow()[&stranded.epoch].clone();
        // They are what was written, and all of it that was promised.
        if let Some(debt) = self.owes {
            assert!(last >= debt.acked, "{debt:?}, but stranded writes end at {last}");
        }
        let then = |lsn| self.shared.state(&history.borrow(), lsn, |reset| reset.epoch <= stranded.epoch);
        let mut state = then(first - 1);
        let replayed = stranded.replay(self.disk.as_ref(), |write, bytes| {
            let from = (write.offset / SECTOR as u64) as usize;
            match bytes {
                // The log does not say more.
                None if matches!(write.kind, StrandedKind::Copy { .. }) => {
                    let to = from + (write.len / SECTOR as u64) as usize;
                    state[from..to].copy_from_slice(&then(write.lsn)[from..to]);
                }
                Some(bytes) => {
                    for (i, sector) in bytes.chunks(SECTOR).enumerate() {
                        state[from + i] = value_of(sector);
                    }
                }
                None => state[from..from + (write.len / SECTOR as u64) as usize].fill(0),
            }
            Ok(())
        });
        if let Err(error) = replayed {
            assert!(self.disk.crashed(), "the log cannot be read: {error}");
            return false;
        }
        self.owes = None;
        assert!(state == then(last), "stranded writes are not what was written");
        self.disk.wipe();
        true
    }

    /// Whether a refusal to open the volume is one that may be.
    fn judge_refusal(&mut self, error: &OpenError) {
        let text = error.to_string();
        let expected = [
            "injected",
            "machine is off",
            "damaged",
            "changed",
            "Precondition",
            "another host",
            "keeps nothing for it",
        ];
        assert!(
            self.disk.crashed() || error.is_not_ours() || expected.iter().any(|e| text.contains(e)),
            "opening failed: {text}"
        );
        assert!(
            !text.contains("were durable, but") && !text.contains("the log starts at"),
            "a crash is no rot: {text}"
        );
        self.shared.count("refused");
    }

    /// Compares what was opened with the history before it.
    fn begin(&mut self, volume: Volume, report: &OpenReport) -> Option<Serving> {
        let epochs = &report.manifest.epochs;
        let epoch = epochs.last().expect("it was claimed").epoch;
        tracing::info!(host = self.index, epoch, ?report, "opened");
        self.shared.count("opened");
        let earlier = {
            let histories = self.shared.histories.borrow();
            let settled = |epoch: &u64| epochs.iter().any(|e| e.epoch == *epoch && e.first_seq > 0);
            // That of a clone begins with its origin's.
            let earlier = histories.range(..epoch).rev().find(|(epoch, _)| **epoch == 0 || settled(epoch));
            earlier.map(|(_, history)| history.clone())
        };
        let mut history = earlier.map(|history| history.borrow().clone()).unwrap_or_default();
        if let Some(debt) = self.owes.take() {
            assert!(report.last_lsn >= debt.acked, "{debt:?} on host {}, but it opened as {report:?}", self.index);
        }
        for &(by, lsn) in self.shared.promised.borrow().iter() {
            assert!(
                by >= epoch || report.bucket_lsn >= lsn,
                "epoch {by} promised {lsn} to be in the bucket: {report:?}"
            );
        }
        history.truncate(report.last_lsn);
        self.shared.learn(&report.manifest);
        let history = Rc::new(RefCell::new(history));
        self.shared.histories.borrow_mut().insert(epoch, history.clone());
        let mut client = ClientModel::new(SECTORS);
        let found = self.shared.state(&history.borrow(), report.last_lsn, |_| true);
        for (sector, &value) in found.iter().enumerate() {
            let token = self.token();
            client.change(token, sector, 1, value, true);
            client.acked(token);
        }
        client.settle(&found, u64::MAX);
        let (sender, done) = mpsc::unbounded_channel();
        Some(Serving {
            volume,
            epoch,
            history,
            client,
            logs: Vec::new(),
            reads: HashMap::new(),
            changes: HashMap::new(),
            flushes: HashMap::new(),
            acked: report.last_lsn,
            flushed: report.last_lsn,
            asked: Asked::default(),
            jobs: JoinSet::new(),
            sender,
            done,
            releasing: false,
        })
    }

    /// Serves the volume until the process ends.
    async fn serve(&mut self, mut serving: Serving, held: Held) -> End {
        let renewals = Renewals::start(self.store(), self.clocks.clone(), self.stopped.clone(), held);
        let steps = self.rng.random_range(self.steps.clone());
        self.read_everything(&mut serving);
        let mut outage_until = Instant::now();
        let mut end = None;
        for step in 0..steps + 2_000 {
            if self.disk.crashed() || self.shared.over.get() {
                break;
            }
            if step == steps {
                match self.rng.random_range(0..3) {
                    0 => break,
                    1 => {
                        end = self.close(&mut serving, &renewals).await;
                        break;
                    }
                    _ => {
                        serving.volume.begin_release();
                        serving.releasing = true;
                    }
                }
            }
            self.trouble(&mut outage_until).await;
            self.look_at_lease(&mut serving, &renewals);
            if serving.releasing && serving.volume.is_drained() {
                end = self.close(&mut serving, &renewals).await;
                if end.is_some() && renewals.release(&self.disk).await {
                    self.shared.count("released");
                }
                break;
            }
            if !serving.releasing {
                self.random_request(&mut serving);
                self.random_snapshot(&mut serving);
            }
            self.step(&mut serving).await;
        }
        self.owes = Some(Debt { epoch: serving.epoch, acked: serving.acked, flushed: serving.flushed });
        let stats = serving.volume.stats();
        if stats.referred_blocks > 0 {
            self.shared.count("referred");
        }
        tracing::info!(host = self.index, epoch = serving.epoch, ?end, ?stats, "process over");
        renewals.stop();
        drop(serving);
        end.unwrap_or_else(|| self.crash())
    }

    /// An orderly end; none when it crashed on the way.
    async fn close(&mut self, serving: &mut Serving, renewals: &Renewals) -> Option<End> {
        // Reads wait for the bucket for half a minute.
        self.plan.set_outage(Outage::None);
        serving.volume.close();
        serving.releasing = true;
        for _ in 0..20_000 {
            if serving.volume.closed() || self.disk.crashed() {
                break;
            }
            self.look_at_lease(serving, renewals);
            self.step(serving).await;
        }
        if self.disk.crashed() {
            return None;
        }
        assert!(serving.volume.closed(), "an orderly shutdown ends");
        self.disk.retire();
        Some(End::Closed)
    }

    /// What befalls a host from outside.
    async fn trouble(&mut self, outage_until: &mut Instant) {
        if *outage_until <= Instant::now() {
            self.plan.set_outage(Outage::None);
        }
        if self.rng.random_bool(0.002) {
            let outage = match self.rng.random_range(0..2) {
                0 => Outage::Failing,
                _ => Outage::Hanging(Duration::from_millis(300)),
            };
            self.plan.set_outage(outage);
            *outage_until = Instant::now() + Duration::from_millis(self.rng.random_range(10..4 * LEASE_MS));
            self.shared.count("cut off");
        }
        if self.rng.random_bool(0.002) {
            // Everything stands still; whatever was sent is on its way.
            self.stopped.store(true, Ordering::Relaxed);
            let pause = self.rng.random_range(10..4 * LEASE_MS);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            self.stopped.store(false, Ordering::Relaxed);
            self.shared.count("stopped");
        }
        if self.rng.random_bool(0.002) {
            let most = if self.shared.strict { LEASE_MS as i64 / 10 } else { 20 * LEASE_MS as i64 };
            self.clocks.wall_off_ms.store(self.rng.random_range(-most..=most), Ordering::Relaxed);
            self.shared.count("clock set");
        }
    }

    fn look_at_lease(&mut self, serving: &mut Serving, renewals: &Renewals) {
        serving.volume.tick(self.clocks.now());
        let mut said = renewals.said.lock().unwrap();
        let stats = serving.volume.stats();
        said.unsent =
            Unsent { bucket_lsn: stats.destaged_lsn, last_lsn: stats.accepted_lsn, dirty_bytes: stats.dirty_bytes };
        if let Some(grant) = said.grant.take() {
            serving.volume.grant(grant, self.clocks.now());
        }
        if let Some(lost) = said.lost.take() {
            tracing::info!(host = self.index, ?lost, "lost the volume");
            self.shared.count("fenced");
            serving.volume.fence("another host has it");
        }
    }

    fn random_request(&mut self, serving: &mut Serving) {
        if self.rng.random_bool(0.4) {
            return;
        }
        let token = self.token();
        let first = self.rng.random_range(0..SECTORS / SECTORS_PER_BLOCK) * SECTORS_PER_BLOCK;
        let count = self.rng.random_range(1..8) * SECTORS_PER_BLOCK;
        let count = count.min(SECTORS - first);
        let (offset, len) = ((first * SECTOR) as u64, (count * SECTOR) as u64);
        match self.rng.random_range(0..23) {
            0..=9 => {
                let value = self.shared.value();
                let data = sectors_of(value, count);
                serving.client.change(token, first, count, value, false);
                serving.volume.write(token, offset, WriteData::Copy(&data), false);
                let accepted = serving.volume.stats().accepted_lsn;
                serving.changes.insert(token, accepted);
            }
            10 => {
                serving.client.change(token, first, count, 0, false);
                serving.volume.zero(token, offset, len, false, false);
                let accepted = serving.volume.stats().accepted_lsn;
                serving.changes.insert(token, accepted);
            }
            11 => {
                serving.client.change(token, first, count, 0, false);
                serving.volume.trim(token, offset, len, false);
                let accepted = serving.volume.stats().accepted_lsn;
                serving.changes.insert(token, accepted);
            }
            20..=22 => {
                let to = self.rng.random_range(0..=(SECTORS - count) / SECTORS_PER_BLOCK) * SECTORS_PER_BLOCK;
                if (first < to + count && to < first + count) || serving.client.is_copied_to(to, count) {
                    return;
                }
                serving.client.copy(token, first, to, count, false);
                serving.volume.copy(token, offset, (to * SECTOR) as u64, len, false);
                // Its LSNs come later, perhaps.
                let accepted = serving.volume.stats().accepted_lsn;
                serving.changes.insert(token, accepted);
            }
            12..=14 => {
                serving.client.flush(token);
                serving.flushes.insert(token, serving.acked);
                serving.volume.flush(token);
            }
            _ => self.read(serving, token, first, count),
        }
    }

    fn read_everything(&mut self, serving: &mut Serving) {
        for first in (0..SECTORS).step_by(SECTORS / 4) {
            let token = self.token();
            self.read(serving, token, first, SECTORS / 4);
        }
    }

    fn read(&mut self, serving: &mut Serving, token: Token, first: usize, count: usize) {
        let since = serving.client.now();
        let mut out = Outgoing::new();
        match serving.volume.read(token, (first * SECTOR) as u64, (count * SECTOR) as u32, &mut out) {
            ReadNow::Ready { .. } => {
                self.answers(serving);
                check_read(serving, &PendingRead { first, count, since }, &out.to_vec());
            }
            ReadNow::Pending => {
                serving.reads.insert(token, PendingRead { first, count, since });
            }
            ReadNow::Failed(error) => assert!(may_fail(serving, &error), "a read was refused: {error}"),
        }
    }

    /// A client hears something: nobody else may have the volume by now.
    fn answers(&self, serving: &Serving) {
        assert!(
            !self.shared.strict || self.shared.holder.get() == self.index,
            "host {} answers in epoch {} although host {} has taken the volume",
            self.index,
            serving.epoch,
            self.shared.holder.get()
        );
    }

    async fn step(&mut self, serving: &mut Serving) {
        match self.rng.random_range(0..4) {
            0 | 1 if !serving.logs.is_empty() => self.finish_log(serving),
            2 => {
                let us = self.rng.random_range(1..8_000);
                tokio::time::sleep(Duration::from_micros(us)).await;
            }
            _ => tokio::time::sleep(Duration::from_micros(50)).await,
        }
        serving.volume.tick(self.clocks.now());
        while let Ok(done) = serving.done.try_recv() {
            serving.volume.job_done(done);
        }
        self.carry_out(serving);
        if self.rng.random_bool(0.7) {
            serving.volume.advance(self.clocks.now_us());
            self.carry_out(serving);
        }
    }

    fn finish_log(&mut self, serving: &mut Serving) {
        let at = self.rng.random_range(0..serving.logs.len());
        let PendingLog { io, covers } = serving.logs.swap_remove(at);
        if self.disk.finish(io.id, &io.op, &covers).is_ok() {
            serving.volume.log_done(io.id, Ok(()));
        }
    }

    fn start_log(&mut self, serving: &mut Serving, io: LogIo) {
        let (client, epoch) = (&serving.client, serving.epoch);
        serving.history.borrow_mut().observe(
            &io.op,
            |sector| client.source_of(sector),
            |history, lsn| self.shared.state(history, lsn, |reset| reset.epoch <= epoch),
        );
        self.disk.submit(io.id, &io.op);
        let covers = match &io.op {
            LogOp::Sync { segment } => self.disk.done_writes(*segment),
            LogOp::Write { .. } => {
                if self.rng.random_bool(0.5) && self.disk.hand(io.id) {
                    serving.volume.log_handed(io.id);
                }
                Vec::new()
            }
        };
        serving.logs.push(PendingLog { io, covers });
    }

    fn carry_out(&mut self, serving: &mut Serving) {
        while let Some(effect) = serving.volume.next_effect() {
            match effect {
                Effect::Log(io) => self.start_log(serving, io),
                Effect::Spawn(job) => spawn(serving, job),
                Effect::Complete(done) => {
                    if self.disk.crashed() {
                        continue;
                    }
                    let flushed = serving.flushes.remove(&done.token);
                    if done.result.is_ok() {
                        self.answers(serving);
                    }
                    match (serving.reads.remove(&done.token), done.result) {
                        (Some(read), Ok(Outcome::Data(data))) => check_read(serving, &read, &data.bytes.to_vec()),
                        (Some(_), Err(IoError::Read(why))) => {
                            let lost = why.contains("missing from the bucket") || why.contains("not listed");
                            // Whoever has the volume now may delete what this one still looks for.
                            let theirs = self.shared.holder.get() != self.index;
                            assert!(!lost || theirs, "a chunk that is needed was deleted: {why}");
                        }
                        (None, Ok(_)) => {
                            serving.client.acked(done.token);
                            // What waited at the gate got its LSN later than this knows of, which only promises less.
                            serving.acked = serving.acked.max(serving.changes.remove(&done.token).unwrap_or(0));
                            if let Some(lsn) = flushed {
                                serving.flushed = serving.flushed.max(lsn);
                                if self.shared.durability == Durability::Object {
                                    self.shared.promised.borrow_mut().push((serving.epoch, lsn));
                                }
                            }
                        }
                        (None, Err(IoError::Read(why))) if why.contains("is damaged") => {}
                        // A copy of what is not mapped to a chunk of the history reads.
                        (None, Err(IoError::Read(why))) if self.shared.holder.get() != self.index => {
                            assert!(why.contains("missing from the bucket") || why.contains("not listed"), "{why}");
                        }
                        (_, Err(error)) => assert!(may_fail(serving, &error), "unexpected answer {error}"),
                        (_, other) => panic!("unexpected answer {other:?}"),
                    }
                }
            }
        }
    }
}

fn spawn(serving: &mut Serving, job: Job) {
    let sender = serving.sender.clone();
    serving.jobs.spawn(async move {
        // Nobody listens once the process is over.
        let _ = sender.send(job.await);
    });
}

fn may_fail(serving: &Serving, error: &IoError) -> bool {
    match error {
        IoError::Stopped(_) => serving.volume.fenced().is_some(),
        IoError::Shutdown => serving.releasing,
        _ => false,
    }
}

fn check_read(serving: &Serving, read: &PendingRead, bytes: &[u8]) {
    assert_eq!(bytes.len(), read.count * SECTOR);
    for (i, sector) in bytes.chunks(SECTOR).enumerate() {
        let (value, sector) = (value_of(sector), read.first + i);
        assert!(
            serving.client.allows(sector, value, read.since + 1),
            "epoch {}: a read returned {value} for sector {sector}: {}",
            serving.epoch,
            serving.client.describe(sector)
        );
    }
}

/// One seed: a few hosts, one volume.
pub struct Fleet {
    rng: SmallRng,
    shared: Rc<Shared>,
}

impl Fleet {
    pub async fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let bucket = Arc::new(MemoryStore::new());
        let durability = if rng.random_bool(0.5) { Durability::Object } else { Durability::Local };
        let manifest = Manifest {
            durability,
            codec: Codec::Lz4,
            chunk_bytes: 64 * 1024,
            ..Manifest::new(VolumeId([rng.random(); 16]), NAME, BLOCKS as u64 * BLOCK_SIZE)
        };
        let keys = make_volume(&bucket, manifest, &mut rng, 0.2).await;
        let dirty_memory_bytes = [0, 64 << 20][rng.random_range(0..2)];
        let tuning = Tuning {
            dirty_memory_bytes,
            block_cache_bytes: [0, 64 << 20][rng.random_range(0..2)],
            // Drawn already: nothing, little or everything.
            keep_sequential_bytes: dirty_memory_bytes as u64,
            destage_age_us: [2_000, 50_000, 500_000][rng.random_range(0..3)],
            puts_max: rng.random_range(1..5),
            log_depth: rng.random_range(1..4),
            checkpoint_chunks: rng.random_range(1..8),
            checkpoint_age_us: [20_000, 500_000][rng.random_range(0..2)],
            checkpoint_grace_us: 5_000_000,
            compaction: CompactionTuning { rate: 1 << 40, ratio: [1.1, 1.5][rng.random_range(0..2)], floor: 0.2 },
            delete_grace_us: 2 * LATEST.as_micros() as u64 * rng.random_range(1..4),
            // As with one host.
            read_patience: Duration::from_millis(if seed.is_multiple_of(2) { 300 } else { 30_000 }),
        };
        let shared = Shared {
            name: NAME.to_owned(),
            bucket,
            durability,
            keys,
            tuning,
            start: Instant::now(),
            strict: rng.random_bool(0.5),
            histories: RefCell::default(),
            promised: RefCell::default(),
            snapshots: RefCell::default(),
            resets: RefCell::default(),
            wanted: RefCell::default(),
            orders: RefCell::default(),
            holder: Cell::new(usize::MAX),
            over: Rc::default(),
            next_value: Rc::new(Cell::new(1)),
            counts: Rc::default(),
        };
        Self { rng, shared: Rc::new(shared) }
    }

    fn host(&mut self, index: usize) -> Host {
        Host::new(index, self.shared.clone(), &mut self.rng)
    }

    /// Hosts live side by side for a while; then one after the other opens the volume in peace. Returns what happened how
    /// often.
    pub async fn run(mut self) -> BTreeMap<&'static str, u64> {
        let hosts = self.rng.random_range(2..4);
        let lives: Vec<_> = (0..hosts).map(|index| tokio::task::spawn_local(self.host(index).live())).collect();
        let reader = SmallRng::seed_from_u64(self.rng.random());
        let reader = tokio::task::spawn_local(follow(self.shared.clone(), reader, FaultPlan::new(self.rng.random())));
        let breeder = SmallRng::seed_from_u64(self.rng.random());
        let breeder = tokio::task::spawn_local(Family::new(self.shared.clone(), breeder).live());
        tokio::time::sleep(Duration::from_millis(self.rng.random_range(2_000..10_000))).await;
        self.shared.over.set(true);
        let mut hosts = Vec::new();
        for life in lives {
            hosts.push(life.await.expect("no host finds anything wrong"));
        }
        reader.await.expect("the follower finds nothing wrong");
        let mut family = breeder.await.expect("no clone finds anything wrong");
        // What was sent long ago has landed by now.
        tokio::time::sleep(2 * LATEST).await;
        family.adopt().await;
        let last = self.rng.random_range(0..hosts.len());
        // The clones go first, or the origin does not wait for them.
        let alone = self.rng.random_bool(0.5);
        if alone {
            family.delete_clones().await;
        }
        self.visit(&mut hosts[last], alone).await;
        let mut stranger = self.host(hosts.len());
        self.visit(&mut stranger, false).await;
        family.delete_all().await;
        self.shared.counts.take()
    }

    /// A host opens the volume, without any trouble, and finds all in order.
    async fn visit(&mut self, host: &mut Host, tidy: bool) {
        host.plan.set_rates(FaultRates::default());
        host.plan.set_outage(Outage::None);
        host.disk.crash_after(None);
        host.goes_back = 0.0;
        let (mut serving, mut held) = host.open(true).await.expect("nothing goes wrong any more");
        host.read_everything(&mut serving);
        self.shared.check_snapshots().await;
        if tidy {
            host.delete_snapshots(&mut serving).await;
            for _ in 0..30 {
                host.random_request(&mut serving);
            }
        }
        let mut rounds = 0;
        loop {
            let now = host.clocks.now();
            if let Order::Renew(number) = held.keeper.tick(now) {
                assert_eq!(held.renew(host.store().as_ref(), None, now.wall_ms).await.unwrap(), None);
                held.keeper.renewed(number, now);
                serving.volume.grant(held.keeper.grant().unwrap(), host.clocks.now());
            }
            host.step(&mut serving).await;
            rounds += 1;
            assert!(rounds < 50_000, "it never comes to rest: {:?}", serving.volume.stats());
            let stats = serving.volume.stats();
            let stored =
                stats.destaged_lsn == stats.accepted_lsn && serving.reads.is_empty() && serving.changes.is_empty();
            let empty = serving.volume.table().position().seq == 0;
            let settled = serving.volume.checkpointed().is_some() && serving.volume.waits_for_checkpoint() == 0;
            // A chunk that the bucket has and the table does not know yet would look like garbage.
            let applied = serving.volume.table().applied().lsn == stats.accepted_lsn;
            if stored
                && (!tidy || (applied && serving.volume.is_tidy() && serving.volume.is_swept() && (empty || settled)))
            {
                break;
            }
        }
        host.read_everything(&mut serving);
        while !serving.reads.is_empty() {
            host.step(&mut serving).await;
        }
        if tidy {
            self.check_garbage(&serving).await;
            self.wait_for_collection(host, &mut serving).await;
        }
        serving.volume.close();
        while !serving.volume.closed() {
            host.step(&mut serving).await;
        }
        let store = host.store();
        let released = held.write_last(store.as_ref(), LeaseState::Released, None, host.clocks.now().wall_ms).await;
        assert!(released.unwrap(), "nobody else is there");
        host.disk.retire();
    }

    /// Every chunk in the bucket is one that the table knows, or a seal.
    async fn check_garbage(&self, serving: &Serving) {
        let table = serving.volume.table();
        table.recount().expect("accounts are exact");
        assert!(table.space().dead_chunks <= 1, "dead chunks are left: {:?}", serving.volume.stats());
        let (manifest, _) = manifest::load(self.shared.bucket.as_ref(), NAME).await.unwrap();
        let epochs = &manifest.epochs;
        for key in self.shared.bucket.keys() {
            let Some(name) = ChunkName::parse(&key) else { continue };
            let known = table.knows(name.seq) && table.directory(name.seq).is_ok_and(|of| of.name == name);
            let is_seal = epochs.windows(2).any(|e| (e[0].epoch, e[1].first_seq) == (name.epoch, name.seq));
            // Who was cut off that long ago is looked for by `blockd volume check`.
            let forgotten = epochs.len() > 8 && name.epoch < epochs[epochs.len() - 8].epoch;
            assert!(known || is_seal || forgotten, "{key} is garbage: {epochs:?}");
        }
    }

    /// Nothing is left of checkpoints but what the newest needs.
    async fn wait_for_collection(&self, host: &mut Host, serving: &mut Serving) {
        for _ in 0..1_000 {
            let (manifest, _) = manifest::load(self.shared.bucket.as_ref(), NAME).await.unwrap();
            let reached =
                blockd::checkpoint::collect::reached(self.shared.bucket.as_ref(), &manifest, self.shared.keys.as_ref())
                    .await
                    .unwrap();
            let own = CheckpointName::prefix(manifest.id);
            let there = self.shared.bucket.keys().into_iter().filter(|key| key.starts_with(&own));
            if manifest.checkpoint.is_none() || there.eq(reached) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
            host.step(serving).await;
        }
        panic!("checkpoints stay: {:?}", self.shared.bucket.keys());
    }
}
