//! A state of a volume as the reactor sees it.

use std::any::Any;
use std::collections::VecDeque;
use std::io;
use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::Sight;
use crate::chunk::ReadError;
use crate::outgoing::Outgoing;
use crate::reactor::Device;
use crate::volume::{Completion, Effect, IoError, JobDone, Outcome, ReadData, ReadNow, Token, WriteData};

/// How long a read waits for a newer state when a chunk of the one it goes by was deleted.
const PATIENCE: Duration = Duration::from_secs(30);
/// Between two looks for one.
const LOOK: Duration = Duration::from_millis(50);

/// See the [module](super).
pub struct View {
    size: u64,
    /// Counted, for reads that wait for another one.
    sight: Arc<Mutex<(u64, Sight)>>,
    /// Whether there may be another one.
    moves: bool,
    effects: VecDeque<Effect>,
    jobs: usize,
    closing: bool,
}

impl View {
    /// Shows `sight`, the first `size` bytes of it. One that `moves` may be told to show another ([`View::show`]).
    pub fn new(sight: Sight, size: u64, moves: bool) -> Self {
        let sight = Arc::new(Mutex::new((0, sight)));
        Self { size, sight, moves, effects: VecDeque::new(), jobs: 0, closing: false }
    }

    /// Shows another state from now on. Reads that run are answered from the one they began with, as long as they can be.
    pub fn show(&mut self, sight: Sight, size: u64) {
        let mut shown = self.sight.lock().expect("no code panics while it holds this lock");
        *shown = (shown.0 + 1, sight);
        self.size = size;
    }

    fn shown(&self) -> Sight {
        self.sight.lock().expect("no code panics while it holds this lock").1.clone()
    }

    /// Reads, by a newer state if the present one is too old to be read.
    fn reading(&self, offset: u64, len: u32) -> impl Future<Output = Result<ReadData, String>> + Send + use<> {
        let (shown, moves) = (self.sight.clone(), self.moves);
        async move {
            let deadline = tokio::time::Instant::now() + PATIENCE;
            loop {
                let (number, sight) = shown.lock().expect("no code panics while it holds this lock").clone();
                let error = match sight.read(offset, len).await {
                    Ok((bytes, holes)) => return Ok(ReadData { bytes: bytes.into(), holes }),
                    Err(error @ ReadError::Missing { .. }) if moves => error,
                    Err(error) => return Err(error.to_string()),
                };
                while shown.lock().expect("no code panics while it holds this lock").0 == number {
                    if tokio::time::Instant::now() > deadline {
                        return Err(error.to_string());
                    }
                    tokio::time::sleep(LOOK).await;
                }
            }
        }
    }

    fn refusal(&self, offset: u64, len: u64) -> Option<IoError> {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.size);
        match (self.closing, inside) {
            (true, _) => Some(IoError::Shutdown),
            (false, false) => Some(IoError::OutOfRange),
            (false, true) => None,
        }
    }

    fn complete(&mut self, token: Token, result: Result<Outcome, IoError>) {
        self.effects.push_back(Effect::Complete(Completion { token, result }));
    }

    fn spawn(&mut self, token: Token, work: impl Future<Output = Result<Outcome, String>> + Send + 'static) {
        self.jobs += 1;
        self.effects.push_back(Effect::Spawn(Box::pin(async move {
            let result = work.await.map_err(|why| {
                tracing::error!("reading a view failed: {why}");
                IoError::Read(why.into())
            });
            JobDone::answer(Completion { token, result })
        })));
    }
}

impl Device for View {
    fn size(&self) -> u64 {
        self.size
    }
    fn read_only(&self) -> bool {
        true
    }
    fn read(&mut self, token: Token, offset: u64, len: u32, _: &mut Outgoing) -> ReadNow {
        if let Some(error) = self.refusal(offset, len.into()) {
            return ReadNow::Failed(error);
        }
        if len == 0 {
            return ReadNow::Ready { holes: Vec::new() };
        }
        let reading = self.reading(offset, len);
        self.spawn(token, async move { Ok(Outcome::Data(reading.await?)) });
        ReadNow::Pending
    }
    fn write(&mut self, token: Token, _: u64, _: WriteData<'_>, _: bool) {
        self.complete(token, Err(IoError::ReadOnly));
    }
    fn compare_write(&mut self, token: Token, _: u64, _: Vec<u8>, _: Vec<u8>, _: bool) {
        self.complete(token, Err(IoError::ReadOnly));
    }
    fn zero(&mut self, token: Token, _: u64, _: u64, _: bool, _: bool) {
        self.complete(token, Err(IoError::ReadOnly));
    }
    fn copy(&mut self, token: Token, _: u64, _: u64, _: u64, _: bool) {
        self.complete(token, Err(IoError::ReadOnly));
    }
    fn trim(&mut self, token: Token, _: u64, _: u64, _: bool) {
        self.complete(token, Err(IoError::ReadOnly));
    }
    fn flush(&mut self, token: Token) {
        self.complete(token, Ok(Outcome::Done));
    }
    fn extents(&mut self, token: Token, offset: u64, len: u64, max: usize) {
        if let Some(error) = self.refusal(offset, len) {
            return self.complete(token, Err(error));
        }
        if len == 0 || max == 0 {
            return self.complete(token, Err(IoError::Invalid("an allocation query of nothing")));
        }
        let sight = self.shown();
        self.spawn(token, async move {
            let blocking = sight.blocking;
            blocking.run(move || sight.extents(offset, len, max)).await.map(Outcome::Extents)
        });
    }
    fn prefetch(&mut self, token: Token, offset: u64, len: u64) {
        if let Some(error) = self.refusal(offset, len) {
            return self.complete(token, Err(error));
        }
        // What is read goes to the frame cache; a client that wants more asks again.
        let len = u32::try_from(len).unwrap_or(u32::MAX).min(4 << 20);
        let reading = (len > 0).then(|| self.reading(offset, len));
        self.spawn(token, async move {
            if let Some(reading) = reading {
                reading.await?;
            }
            Ok(Outcome::Done)
        });
    }
    fn advance(&mut self, _: u64) {}
    fn next_effect(&mut self) -> Option<Effect> {
        self.effects.pop_front()
    }
    fn log_handed(&mut self, _: u64) {}
    fn log_done(&mut self, _: u64, _: io::Result<()>) {}
    fn job_done(&mut self, done: JobDone) {
        self.jobs -= 1;
        if let Some(completion) = done.into_answer() {
            self.effects.push_back(Effect::Complete(completion));
        }
    }
    fn deadline_us(&self) -> Option<u64> {
        None
    }
    fn close(&mut self) {
        self.closing = true;
    }
    fn closed(&self) -> bool {
        self.closing && self.jobs == 0
    }
    fn log_fd(&self, _: u32) -> RawFd {
        unreachable!("a view has no log, and asks for nothing of one")
    }
    fn as_any_mut(&mut self) -> &mut dyn Any {
        self
    }
}
