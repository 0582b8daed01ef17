//! Writes of parts of blocks whose rest must be fetched, while something happens to these blocks: each event at its moment,
//! which seeds come across rarely.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use blockd::manifest::{self, Durability, Manifest};
use blockd::outgoing::Outgoing;
use blockd::store::{FaultPlan, FaultyStore, MemoryStore, Outage};
use blockd::types::{BLOCK_SIZE, VolumeId};
use blockd::volume::{
    Effect, IoError, JobDone, LogIo, LogOp, Outcome, Parts, ReadNow, Token, Tuning, Volume, WriteData,
};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use super::disk::SimDisk;
use super::model::{SECTOR, SECTORS_PER_BLOCK, Value, sectors_of, value_of};

const BLOCKS: u64 = 64;
const SEGMENT_BYTES: u64 = 1 << 20;
const READ_PATIENCE: Duration = Duration::from_millis(40);

/// A volume without any memory for what is in the log or in the bucket.
struct Bench {
    volume: Volume,
    disk: Arc<SimDisk>,
    plan: Arc<FaultPlan>,
    logs: Vec<LogIo>,
    jobs: JoinSet<()>,
    sender: mpsc::UnboundedSender<JobDone>,
    done: mpsc::UnboundedReceiver<JobDone>,
    answers: HashMap<Token, Result<Outcome, IoError>>,
    next_token: u64,
    now_us: u64,
}

impl Bench {
    async fn new() -> Self {
        let (bucket, plan) = (Arc::new(MemoryStore::new()), FaultPlan::new(1));
        let id = VolumeId([1; 16]);
        // So that only a flush brings anything to the bucket.
        let manifest = Manifest { durability: Durability::Object, ..Manifest::new(id, "merges", BLOCKS * BLOCK_SIZE) };
        manifest::create(bucket.as_ref(), &manifest).await.unwrap();
        let disk = Arc::new(SimDisk::new(SEGMENT_BYTES));
        let tuning = Tuning {
            dirty_memory_bytes: 0,
            block_cache_bytes: 0,
            destage_age_us: 3_600_000_000,
            read_patience: READ_PATIENCE,
            ..Tuning::default()
        };
        let parts = Parts::repeatable(Arc::new(FaultyStore::new(bucket, plan.clone())), disk.clone(), tuning);
        let (volume, _) = Volume::open_parts(parts, manifest, [1; 16]).await.unwrap();
        let (sender, done) = mpsc::unbounded_channel();
        let (logs, jobs, answers) = (Vec::new(), JoinSet::new(), HashMap::new());
        Self { volume, disk, plan, logs, jobs, sender, done, answers, next_token: 0, now_us: 1_000_000 }
    }

    fn carry_out(&mut self) {
        while let Some(effect) = self.volume.next_effect() {
            match effect {
                Effect::Log(io) => {
                    self.disk.submit(io.id, &io.op);
                    self.logs.push(io);
                }
                Effect::Spawn(job) => {
                    let sender = self.sender.clone();
                    self.jobs.spawn(async move { drop(sender.send(job.await)) });
                }
                Effect::Complete(done) => drop(self.answers.insert(done.token, done.result)),
            }
        }
    }

    /// Tells of the jobs that have ended, and nothing else.
    fn jobs_end(&mut self) {
        while let Ok(done) = self.done.try_recv() {
            self.volume.job_done(done);
        }
        self.carry_out();
    }

    /// What was accepted is on its way to the log.
    fn advance(&mut self) {
        self.now_us += 1_000;
        self.volume.advance(self.now_us);
        self.carry_out();
    }

    /// The log gets on.
    fn log_gets_on(&mut self) {
        self.advance();
        for io in std::mem::take(&mut self.logs) {
            let covers = match &io.op {
                LogOp::Sync { segment } => self.disk.done_writes(*segment),
                LogOp::Write { .. } => Vec::new(),
            };
            self.disk.finish(io.id, &io.op, &covers).unwrap();
            self.volume.log_done(io.id, Ok(()));
        }
        self.carry_out();
    }

    /// Everything gets on until `token` is answered.
    async fn answer(&mut self, token: Token) -> Outcome {
        for _ in 0..10_000 {
            self.log_gets_on();
            tokio::time::sleep(Duration::from_millis(1)).await;
            self.jobs_end();
            if let Some(answer) = self.answers.remove(&token) {
                return answer.unwrap();
            }
        }
        panic!("{token:?} is never answered: {:?}", self.volume.stats());
    }

    fn token(&mut self) -> Token {
        self.next_token += 1;
        Token(self.next_token)
    }

    /// Writes sectors of one value.
    fn write(&mut self, first: usize, sectors: usize, value: Value) -> Token {
        let token = self.token();
        let data = sectors_of(value, sectors);
        self.volume.write(token, (first * SECTOR) as u64, WriteData::Copy(&data), false);
        self.carry_out();
        token
    }

    /// Brings all that was written to the bucket, and nothing of it stays here.
    async fn destage(&mut self) {
        let token = self.token();
        self.volume.flush(token);
        self.answer(token).await;
        for _ in 0..100 {
            self.log_gets_on();
            tokio::time::sleep(Duration::from_millis(1)).await;
            self.jobs_end();
        }
        assert_eq!(self.volume.stats().dirty_bytes, 0);
    }

    async fn read(&mut self, first: usize, sectors: usize) -> Vec<Value> {
        let (token, mut out) = (self.token(), Outgoing::new());
        match self.volume.read(token, (first * SECTOR) as u64, (sectors * SECTOR) as u32, &mut out) {
            ReadNow::Ready { .. } => {}
            ReadNow::Pending => match self.answer(token).await {
                Outcome::Data(data) => out = data.bytes,
                other => panic!("{other:?}"),
            },
            ReadNow::Failed(error) => panic!("{error}"),
        }
        out.to_vec().chunks(SECTOR).map(value_of).collect()
    }
}

const N: usize = SECTORS_PER_BLOCK;

/// A write to the last sector of one block, which is in the bucket, and the first of the next, which is in memory and leaves it
/// for the log while the other is fetched.
#[tokio::test(start_paused = true)]
async fn one_of_two_blocks_leaves_memory_while_the_other_is_fetched() {
    let mut bench = Bench::new().await;
    let token = bench.write(5 * N, N, 1);
    bench.answer(token).await;
    bench.destage().await;
    bench.write(6 * N, N, 2);
    let partial = bench.write(6 * N - 1, 2, 3);
    bench.log_gets_on();
    bench.log_gets_on();
    assert!(!bench.answers.contains_key(&partial), "its first block has to be fetched");
    bench.answer(partial).await;
    let expected: Vec<Value> = [[1; N - 1].as_slice(), &[3, 3], &[2; N - 1]].concat();
    assert_eq!(bench.read(5 * N, 2 * N).await, expected);
}

/// The bucket fails when the rest of a block is fetched. The whole block has been written meanwhile, to the open frame or to one on
/// its way, and leaves memory for the log before the rest is fetched once more.
#[tokio::test(start_paused = true)]
async fn a_block_is_written_while_the_bucket_fails_to_bring_it() {
    for sealed in [true, false] {
        let mut bench = Bench::new().await;
        let token = bench.write(5 * N, N, 1);
        bench.answer(token).await;
        bench.destage().await;
        bench.plan.set_outage(Outage::Failing);
        let partial = bench.write(5 * N, 1, 3);
        tokio::time::sleep(10 * READ_PATIENCE).await;
        assert!(!bench.answers.contains_key(&partial), "the rest of its block has to be fetched");
        bench.write(5 * N, N, 2);
        if sealed {
            bench.advance();
        }
        bench.jobs_end();
        bench.plan.set_outage(Outage::None);
        bench.log_gets_on();
        bench.answer(partial).await;
        let expected: Vec<Value> = [[3].as_slice(), &[2; N - 1]].concat();
        assert_eq!(bench.read(5 * N, N).await, expected, "what was answered is lost");
    }
}
