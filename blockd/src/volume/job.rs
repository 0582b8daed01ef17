//! Work a volume hands to ordinary threads, and what comes back.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;

use super::api::{Allocation, Completion, ExtentStatus, Token};
use super::compact::{Deleted, Failure, Round};
use super::copy::Resolved;
use super::dirty::{DirtyMap, Source};
use super::snapshot::SnapshotDone;
use crate::buf::{AlignedBuf, Slice};
use crate::checkpoint::{CheckpointError, Made};
use crate::chunk::{BlockReader, Chunk, ChunkDraft, ChunkIndex, ChunkName, Codec, Piece, ReadError};
use crate::crypt::Keys;
use crate::store::{ObjectStore, PutMode, StoreErrorKind};
use crate::table::{Mapped, Pin, Space, Table, Target};
use crate::types::{BLOCK, BLOCK_SIZE, Lba, Lsn};
use crate::wal::device::LogDevice;
use crate::wal::format::{Record, RecordKind};
use crate::wal::writer::{LoggedPayload, Payload};

/// Longest pause between two attempts at the same chunk.
const RETRY_MAX: Duration = Duration::from_secs(5);

/// Pause before the blocks that a sub-block write needs are asked for again.
pub(super) const FETCH_PAUSE: Duration = Duration::from_millis(200);

/// Output of a [`super::Job`].
#[derive(Debug)]
pub struct JobDone(pub(super) Done);

impl JobDone {
    /// A job that answers a request by itself.
    pub(crate) fn answer(completion: Completion) -> Self {
        Self(Done::Answer(completion))
    }

    /// The answer of such a job.
    pub(crate) fn into_answer(self) -> Option<Completion> {
        match self.0 {
            Done::Answer(completion) => Some(completion),
            _ => None,
        }
    }
}

#[derive(Debug)]
pub(super) enum Done {
    Stored {
        seq: u64,
        result: Result<StoredChunk, Stopped>,
    },
    Applied {
        seq: u64,
        result: Result<Space, Stopped>,
    },
    Read {
        id: u64,
        result: Result<Fetched, FetchError>,
    },
    Prefetched {
        id: u64,
        result: Result<Fetched, FetchError>,
    },
    Resolved {
        id: u64,
        result: Result<Vec<Resolved>, FetchError>,
    },
    Segment {
        segment: u32,
        result: io::Result<()>,
    },
    Extents {
        token: Token,
        result: Result<Vec<ExtentStatus>, Arc<str>>,
    },
    Persisted,
    Checkpoint {
        result: Result<Made, CheckpointError>,
    },
    Collected {
        keys: Vec<String>,
        result: Result<usize, CheckpointError>,
    },
    Compacted {
        started_us: u64,
        quiet: bool,
        result: Result<Round, Failure>,
    },
    Deleted(Result<Deleted, String>),
    Snapshot(SnapshotDone),
    /// Of a device that is no volume.
    Answer(Completion),
}

/// Why a chunk will not be stored by this process.
#[derive(Clone, Debug)]
pub(super) enum Stopped {
    /// The volume is closing.
    Closing,
    /// Another owner took the volume over.
    Fenced(String),
}

#[derive(Debug)]
pub(super) struct StoredChunk {
    pub index: Arc<ChunkIndex>,
    pub raw_bytes: u64,
    pub stored_bytes: u64,
}

#[derive(Debug)]
pub(super) struct Fetched {
    /// Whole blocks.
    pub data: Bytes,
    /// Zero ranges in blocks: first, count.
    pub holes: Vec<(u64, u64)>,
}

/// A source of numbers from 0 to 1 that spreads retries.
pub type Jitter = Arc<dyn Fn() -> f64 + Send + Sync>;

/// Why blocks could not be fetched.
#[derive(Clone, Debug)]
pub(super) struct FetchError {
    pub message: Arc<str>,
    /// The bucket is in trouble; the same fetch may succeed later.
    pub bucket: bool,
}

impl std::convert::From<ReadError> for FetchError {
    fn from(error: ReadError) -> Self {
        let bucket = matches!(&error, ReadError::Store(e) if e.kind != StoreErrorKind::NotFound);
        Self { message: error.to_string().into(), bucket }
    }
}

/// Nice value of threads that build chunks.
const DESTAGE_NICE: libc::c_int = 10;

/// Whether heavy work may leave the calling thread. A simulation keeps it there, to stay deterministic.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blocking {
    /// Run on tokio's blocking threads.
    Threads,
    /// Run in place.
    Inline,
}

impl Blocking {
    pub(crate) async fn run<T: Send + 'static>(self, work: impl FnOnce() -> T + Send + 'static) -> T {
        match self {
            Blocking::Inline => work(),
            Blocking::Threads => match tokio::task::spawn_blocking(work).await {
                Ok(value) => value,
                Err(e) => std::panic::resume_unwind(e.into_panic()),
            },
        }
    }

    /// As [`Blocking::run`], but what clients wait for goes first: a thread of lower priority, for work of milliseconds.
    /// Fails when there can be no more threads.
    pub(crate) async fn run_low<T: Send + 'static>(self, work: impl FnOnce() -> T + Send + 'static) -> io::Result<T> {
        let (answer, result) = tokio::sync::oneshot::channel();
        let work = move || {
            // Whoever asked may be gone.
            let _ = answer.send(work());
        };
        match self {
            Blocking::Inline => work(),
            Blocking::Threads => {
                let thread = std::thread::Builder::new().name("destage".to_owned());
                thread.spawn(move || {
                    // SAFETY: no pointers; a thread may always lower its own priority. 0 stands for the caller.
                    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, DESTAGE_NICE) };
                    work();
                })?;
            }
        }
        Ok(result.await.expect("a panic ends the process"))
    }

    /// As [`Blocking::run_low`], for work that fails with a text.
    pub(super) async fn run_behind<T: Send + 'static>(
        self,
        work: impl FnOnce() -> Result<T, String> + Send + 'static,
    ) -> Result<T, String> {
        self.run_low(work).await.unwrap_or_else(|e| Err(format!("no thread for it: {e}")))
    }
}

/// What jobs of a volume share.
#[derive(Clone)]
pub(super) struct Backend {
    /// Name of the volume, and epoch of this owner.
    pub name: Arc<str>,
    pub epoch: u64,
    pub store: Arc<dyn ObjectStore>,
    pub table: Arc<Table>,
    pub keeper: super::checkpoint::SharedKeeper,
    pub reader: Arc<BlockReader>,
    /// Reads past the frame cache, for what will not be asked for again.
    pub copier: Arc<BlockReader>,
    pub device: Arc<dyn LogDevice>,
    pub blocking: Blocking,
    pub closing: Arc<Closing>,
    pub trouble: super::engine::Trouble,
    pub jitter: Jitter,
    pub keys: Option<Keys>,
}

/// Tells running jobs that the volume closes.
#[derive(Debug, Default)]
pub(super) struct Closing {
    flag: AtomicBool,
    wake: tokio::sync::Notify,
}

impl Closing {
    pub fn set(&self) {
        self.flag.store(true, Ordering::Release);
        self.wake.notify_waiters();
    }

    fn is_set(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }

    /// Waits for the closing.
    pub async fn wait(&self) {
        let wake = self.wake.notified();
        if !self.is_set() {
            wake.await;
        }
    }

    /// Sleeps, but not past the closing. Returns whether the volume closes.
    pub async fn sleep(&self, time: Duration) -> bool {
        let wake = self.wake.notified();
        if !self.is_set() {
            tokio::select! {
                biased;
                () = tokio::time::sleep(time) => {}
                () = wake => {}
            }
        }
        self.is_set()
    }
}

/// One frame's contribution to a chunk.
#[derive(Debug)]
pub(super) struct FrameInput {
    pub first_lsn: Lsn,
    pub records: Arc<[Record]>,
    pub payload: Option<Payload>,
}

/// Everything needed to build and store a chunk.
#[derive(Debug)]
pub(super) struct ChunkInput {
    pub name: ChunkName,
    pub first_lsn: Lsn,
    pub last_lsn: Lsn,
    pub codec: Codec,
    pub created_ms: u64,
    pub frames: Vec<FrameInput>,
}

impl Backend {
    pub fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock().expect("no code panics while it holds this lock") = trouble;
    }

    /// Builds the chunk and puts it, however long that takes. Failures of the store are waited out.
    pub async fn store_chunk(self, input: ChunkInput) -> Done {
        let seq = input.name.seq;
        let result = self.store_chunk_inner(input).await;
        Done::Stored { seq, result }
    }

    async fn store_chunk_inner(self, input: ChunkInput) -> Result<StoredChunk, Stopped> {
        let name = input.name;
        let device = self.device.clone();
        let mut pause = Pause::default();
        let input = Arc::new(input);
        let chunk = loop {
            let (device, input, keys) = (device.clone(), input.clone(), self.keys.clone());
            match self.blocking.run_behind(move || build(&input, device.as_ref(), keys.as_ref())).await {
                Ok(chunk) => break chunk,
                Err(message) => {
                    tracing::error!(chunk = %name.key(), "cannot build chunk: {message}");
                    self.set_trouble(Some(message));
                    if self.closing.sleep(pause.next(&self.jitter)).await {
                        return Err(Stopped::Closing);
                    }
                }
            }
        };
        drop(input);
        let raw_bytes = chunk.index.frames.raw_blocks() * BLOCK_SIZE;
        self.put(&name.key(), chunk.bytes.clone()).await?;
        Ok(StoredChunk { raw_bytes, stored_bytes: chunk.bytes.len() as u64, index: Arc::new(chunk.index) })
    }

    /// Puts a chunk, however long that takes.
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<(), Stopped> {
        let mut pause = Pause::default();
        let mut stranger = None;
        loop {
            let attempt = self.store.put(key, bytes.clone(), PutMode::Create).await;
            let error = match attempt {
                Ok(_) => break,
                Err(e) if e.kind == StoreErrorKind::Precondition => match self.store.get(key).await {
                    // An earlier attempt landed although its answer was lost.
                    Ok((found, _)) if found == bytes => break,
                    // Believed only when the same strange content was read twice: a read can be damaged, too.
                    Ok((found, _)) if stranger.as_ref() == Some(&found) => {
                        return Err(Stopped::Fenced(format!(
                            "another host took this volume over: {key} exists with other content"
                        )));
                    }
                    Ok((found, _)) => {
                        stranger = Some(found);
                        e
                    }
                    Err(e) => e,
                },
                Err(e) => e,
            };
            if pause.attempts.is_power_of_two() || pause.attempts == 0 {
                tracing::warn!("cannot store chunk yet, will retry: {error}");
            }
            self.set_trouble(Some(error.to_string()));
            if self.closing.sleep(pause.next(&self.jitter)).await {
                return Err(Stopped::Closing);
            }
        }
        self.set_trouble(None);
        Ok(())
    }

    /// Brings a stored chunk into the translation table.
    pub async fn apply(self, index: Arc<ChunkIndex>) -> Done {
        let seq = index.name.seq;
        let mut pause = Pause::default();
        loop {
            let (table, index) = (self.table.clone(), index.clone());
            let outcome = self
                .blocking
                .run_behind(move || {
                    let applied = table.apply(&index).and_then(|_| {
                        // Bounds how many chunk headers a recovery has to read again.
                        if index.name.seq % 64 == 0 { table.persist() } else { Ok(()) }
                    });
                    applied.map_err(|e| e.to_string())
                })
                .await;
            match outcome {
                Ok(()) => {
                    if pause.attempts > 0 {
                        self.set_trouble(None);
                    }
                    return Done::Applied { seq, result: Ok(self.table.space()) };
                }
                Err(e) if self.table.applied().seq >= seq => {
                    tracing::warn!("cannot persist the translation table: {e}");
                    return Done::Applied { seq, result: Ok(self.table.space()) };
                }
                Err(e) => {
                    tracing::error!(seq, "cannot update the translation table: {e}");
                    self.set_trouble(Some(format!("translation table: {e}")));
                    if self.closing.sleep(pause.next(&self.jitter)).await {
                        return Done::Applied { seq, result: Err(Stopped::Closing) };
                    }
                }
            }
        }
    }

    /// Fills the missing parts of a read of whole blocks.
    pub async fn fetch(&self, mut data: AlignedBuf, missing: Vec<Missing>) -> Result<Fetched, FetchError> {
        let mut holes = Vec::new();
        let mut rest = &mut data[..];
        let mut taken = 0;
        let mut parts = Vec::with_capacity(missing.len());
        for part in missing {
            let (_, tail) = rest.split_at_mut((part.at - taken) * BLOCK);
            let (own, tail) = tail.split_at_mut(part.blocks * BLOCK);
            taken = part.at + part.blocks;
            rest = tail;
            parts.push(self.fetch_part(part, own));
        }
        for found in futures::future::try_join_all(parts).await? {
            holes.extend(found);
        }
        let len = data.len();
        Ok(Fetched { data: data.into_bytes(len), holes })
    }

    async fn fetch_part(&self, part: Missing, own: &mut [u8]) -> Result<Vec<(u64, u64)>, FetchError> {
        match part.from {
            From::Table(lba) => {
                let holes = self.reader.read(lba, own).await?;
                Ok(holes.into_iter().map(|(first, blocks)| (first + part.at as u64, blocks)).collect())
            }
            From::Log(payload) => {
                let device = self.device.clone();
                let bytes = self
                    .blocking
                    .run(move || payload.read(device.as_ref()))
                    .await
                    .map_err(|e| FetchError { message: e.to_string().into(), bucket: false })?;
                own.copy_from_slice(&bytes);
                Ok(Vec::new())
            }
            From::Chunk(pin, index) => {
                let target = Target::Chunk { seq: pin.chunk(), index };
                self.reader.read_mapped(0, &[Mapped { lba: 0, blocks: part.blocks as u64, target }], own).await?;
                Ok(Vec::new())
            }
        }
    }

    /// As [`Backend::fetch`], after a moment in which the bucket may recover.
    pub async fn fetch_later(&self, data: AlignedBuf, missing: Vec<Missing>) -> Result<Fetched, FetchError> {
        if self.closing.sleep(FETCH_PAUSE).await {
            return Err(FetchError { message: "the volume is closing".into(), bucket: false });
        }
        self.fetch(data, missing).await
    }

    /// Allocation status; `ask` ranges are looked up in the table.
    pub async fn extents(self, token: Token, parts: Vec<ExtentPart>, max: usize) -> Done {
        let table = self.table.clone();
        let result = self
            .blocking
            .run(move || {
                let mut runs: Vec<ExtentStatus> = Vec::new();
                'parts: for part in parts {
                    match part {
                        ExtentPart::Known { blocks, allocation } => {
                            push_run(&mut runs, blocks * BLOCK_SIZE, allocation);
                        }
                        ExtentPart::Ask { lba, blocks } => {
                            let mut done = 0;
                            while done < blocks && runs.len() <= max {
                                let found = table
                                    .allocations(lba + done, blocks - done, max + 1 - runs.len())
                                    .map_err(|e| Arc::from(e.to_string()))?;
                                for (count, allocation) in found {
                                    push_run(&mut runs, count * BLOCK_SIZE, allocation);
                                    done += count;
                                }
                            }
                        }
                    }
                    if runs.len() > max {
                        break 'parts;
                    }
                }
                runs.truncate(max);
                Ok(runs)
            })
            .await;
        Done::Extents { token, result }
    }

    /// Makes a log segment.
    pub async fn create_segment(self, segment: u32) -> Done {
        let device = self.device.clone();
        let result = self.blocking.run(move || device.create(segment)).await;
        Done::Segment { segment, result }
    }
}

fn push_run(runs: &mut Vec<ExtentStatus>, len: u64, allocation: Allocation) {
    match runs.last_mut() {
        Some(last) if last.allocation == allocation => last.len += len,
        _ => runs.push(ExtentStatus { len, allocation }),
    }
}

/// A part of an allocation query.
#[derive(Debug)]
pub(super) enum ExtentPart {
    Known { blocks: u64, allocation: Allocation },
    Ask { lba: Lba, blocks: u64 },
}

/// A part of a read that memory could not answer.
#[derive(Debug)]
pub(super) struct Missing {
    /// First block, relative to the buffer.
    pub at: usize,
    pub blocks: usize,
    pub from: From,
}

#[derive(Debug)]
pub(super) enum From {
    Table(Lba),
    Log(LoggedPayload),
    /// Payload blocks of a chunk, from this index on. The pin is for as long as they are being read.
    Chunk(Pin, u16),
}

/// Exponential pauses with jitter, from 50 ms to [`RETRY_MAX`].
#[derive(Default)]
pub(super) struct Pause {
    attempts: u32,
}

impl Pause {
    /// Whether there was one.
    pub fn was_needed(&self) -> bool {
        self.attempts > 0
    }

    pub fn next(&mut self, jitter: &Jitter) -> Duration {
        let ceiling = (Duration::from_millis(50) * 2u32.pow(self.attempts.min(8))).min(RETRY_MAX);
        self.attempts += 1;
        ceiling.mul_f64(0.5 + jitter() / 2.0)
    }
}

/// Collapses overwrites and encodes what is left, in address order.
fn build(input: &ChunkInput, device: &dyn LogDevice, keys: Option<&Keys>) -> Result<Chunk, String> {
    let mut newest = DirtyMap::default();
    for (number, frame) in input.frames.iter().enumerate() {
        for (lsn, record) in (frame.first_lsn..).zip(frame.records.iter()) {
            let source = match record.kind {
                RecordKind::Data { at } => Source::Log { frame: number as u64, block: at },
                RecordKind::Zero { allocated } => Source::Zero { allocated },
                RecordKind::Refer { seq, index } => Source::Refer { seq, index },
            };
            newest.insert(record.lba, record.blocks, lsn, source);
        }
    }
    // Payload that left memory is read back frame by frame, once.
    let mut payloads: Vec<Vec<Slice>> = Vec::with_capacity(input.frames.len());
    for frame in &input.frames {
        payloads.push(match &frame.payload {
            None => Vec::new(),
            Some(Payload::Memory(slices)) => slices.clone(),
            Some(Payload::Logged(logged)) => {
                vec![Slice::from(logged.read(device).map_err(|e| e.to_string())?)]
            }
        });
    }
    let mut pieces = Vec::with_capacity(newest.len());
    for (lba, blocks, source) in newest.iter() {
        match source {
            Source::Zero { allocated } => pieces.push(Piece::Zero { lba, blocks, allocated }),
            Source::Refer { seq, index } => pieces.push(Piece::Refer { lba, blocks, seq, index }),
            Source::Log { frame, block } => {
                let mut lba = lba;
                let (mut from, mut left) = (block as usize * BLOCK, blocks as usize * BLOCK);
                for slice in &payloads[frame as usize] {
                    if from >= slice.len() {
                        from -= slice.len();
                        continue;
                    }
                    let n = left.min(slice.len() - from);
                    pieces.push(Piece::Data { lba, data: slice.slice(from..from + n) });
                    lba += (n / BLOCK) as u64;
                    left -= n;
                    from = 0;
                    if left == 0 {
                        break;
                    }
                }
                assert!(left == 0, "a record's payload lies inside its frame");
            }
        }
    }
    let draft = ChunkDraft {
        name: input.name,
        first_lsn: input.first_lsn,
        last_lsn: input.last_lsn,
        codec: input.codec,
        created_ms: input.created_ms,
        pieces,
    };
    draft.encode(keys).map_err(|e| e.to_string())
}
