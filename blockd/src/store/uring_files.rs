//! File I/O on one dedicated thread with an io_uring runtime; the only place that knows `tokio-uring`.
//!
//! [`UringFiles`] takes jobs from any thread and runs them concurrently on its own; the free functions are what a job
//! is made of. A job runs to its end even when the caller no longer waits for it, so that an abandoned request leaves
//! no half-written state behind.

use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::ops::Range;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use futures::future::LocalBoxFuture;
use futures::stream::{self, StreamExt, TryStreamExt};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio_uring::buf::BoundedBuf;
use tokio_uring::fs::{File, OpenOptions};

use crate::buf::AlignedBuf;
use crate::types::BLOCK;

/// Jobs that run at the same time; further ones wait in the queue.
const JOBS_IN_FLIGHT: u32 = 64;
/// Jobs that may wait in the queue before senders wait as well.
const JOBS_QUEUED: usize = 256;
/// Size of one write of a big file, in bytes.
const PIECE: usize = 1 << 20;
/// Writes of one file in flight at the same time.
const PIECES_IN_FLIGHT: usize = 4;
/// From this size on a file is written around the page cache. Below, the copy costs less than waiting for the device twice.
const DIRECT_FROM: usize = 1 << 20;

/// Spare buffers kept, at most.
const SPARE_MAX: usize = 32;

type Job = Box<dyn FnOnce() -> LocalBoxFuture<'static, ()> + Send>;

/// The way to the io_uring thread. The thread ends when this is dropped and its last job is done.
#[derive(Debug)]
pub(super) struct UringFiles {
    jobs: mpsc::Sender<Job>,
}

impl UringFiles {
    /// Starts the thread. Fails where the kernel offers no io_uring.
    pub(super) fn start() -> io::Result<Self> {
        let (jobs, queue) = mpsc::channel(JOBS_QUEUED);
        let (ready, started) = std::sync::mpsc::sync_channel(1);
        std::thread::Builder::new().name("dir-store".to_owned()).spawn(move || {
            match tokio_uring::Runtime::new(&tokio_uring::builder()) {
                Ok(runtime) => {
                    // The starter may have gone away; then the queue is closed and the loop ends at once.
                    let _ = ready.send(Ok(()));
                    runtime.block_on(run_jobs(queue));
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        })?;
        started.recv().map_err(|_| gone())??;
        Ok(Self { jobs })
    }

    /// Runs `job` on the io_uring thread and waits for its result.
    pub(super) async fn run<T, F, Fut>(&self, job: F) -> io::Result<T>
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = io::Result<T>> + 'static,
        T: Send + 'static,
    {
        let (answer, result) = oneshot::channel();
        let job: Job = Box::new(move || {
            Box::pin(async move {
                // Nobody may be waiting any more; the work is done all the same.
                let _ = answer.send(job().await);
            })
        });
        self.jobs.send(job).await.map_err(|_| gone())?;
        result.await.map_err(|_| gone())?
    }
}

fn gone() -> io::Error {
    io::Error::other("the file I/O thread has ended")
}

async fn run_jobs(mut queue: mpsc::Receiver<Job>) {
    let room = Arc::new(Semaphore::new(JOBS_IN_FLIGHT as usize));
    while let Some(job) = queue.recv().await {
        // The semaphore is never closed, so this only ever waits.
        let Ok(permit) = room.clone().acquire_owned().await else {
            return;
        };
        tokio_uring::spawn(async move {
            job().await;
            drop(permit);
        });
    }
    // Nobody can send any more: wait for the jobs still running.
    let _ = room.acquire_many(JOBS_IN_FLIGHT).await;
}

/// Writes a new file with content `body` and makes the content durable; the name is durable only once
/// [`sync_dir`] has run on its directory. Fails if the path exists.
pub(super) async fn write_new(path: &Path, body: &Bytes) -> io::Result<()> {
    let options = |flags: i32| {
        let mut options = OpenOptions::new();
        options.write(true).create_new(true).custom_flags(flags);
        options
    };
    let aligned = body.len() - body.len() % BLOCK;
    if body.len() >= DIRECT_FROM {
        match options(libc::O_DIRECT).open(path).await {
            Ok(file) => return write_direct(path, file, body, aligned).await,
            // This filesystem has no O_DIRECT. Some have made the file nevertheless.
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
                let _ = tokio_uring::fs::remove_file(path).await;
            }
            Err(e) => return Err(e),
        }
    }
    let file = options(0).open(path).await?;
    reserve(&file, body.len()).await?;
    write_pieces(&file, body, 0).await?;
    file.sync_data().await?;
    file.close().await
}

/// Writes whole blocks around the page cache and what is left of the last block through it.
async fn write_direct(path: &Path, file: File, body: &Bytes, aligned: usize) -> io::Result<()> {
    reserve(&file, body.len()).await?;
    write_pieces(&file, &body.slice(..aligned), BLOCK).await?;
    if aligned < body.len() {
        let tail = OpenOptions::new().write(true).open(path).await?;
        let (result, _) = tail.write_all_at(body.slice(aligned..), aligned as u64).await;
        result?;
        tail.close().await?;
    }
    file.sync_data().await?;
    file.close().await
}

/// Takes the space beforehand: a full disk shows before anything is written, and writes need not extend the file.
async fn reserve(file: &File, len: usize) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    match file.fallocate(0, len as u64, 0).await {
        Err(e) if e.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(()),
        other => other,
    }
}

thread_local! {
    /// Buffers of [`PIECE`] bytes for reuse: fresh memory costs more processor time than the copy into it.
    static SPARE: RefCell<Vec<AlignedBuf>> = const { RefCell::new(Vec::new()) };
}

/// An aligned copy of a piece.
struct Bounce {
    /// `None` only while it is dropped.
    buf: Option<AlignedBuf>,
    len: usize,
}

impl Bounce {
    fn copy_of(piece: &[u8]) -> Bytes {
        let spare = SPARE.with_borrow_mut(Vec::pop);
        let mut buf = spare.unwrap_or_else(|| AlignedBuf::zeroed(PIECE));
        buf[..piece.len()].copy_from_slice(piece);
        Bytes::from_owner(Self { buf: Some(buf), len: piece.len() })
    }
}

impl AsRef<[u8]> for Bounce {
    fn as_ref(&self) -> &[u8] {
        self.buf.as_ref().map_or(&[], |buf| &buf[..self.len])
    }
}

impl Drop for Bounce {
    fn drop(&mut self) {
        SPARE.with_borrow_mut(|spare| {
            if spare.len() < SPARE_MAX {
                spare.extend(self.buf.take());
            }
        });
    }
}

/// Writes `body` at offset 0 in pieces, from memory aligned to `alignment` bytes (0: any).
async fn write_pieces(file: &File, body: &Bytes, alignment: usize) -> io::Result<()> {
    let copied = alignment > 0 && body.as_ptr().align_offset(alignment) != 0;
    stream::iter((0..body.len()).step_by(PIECE))
        .map(|start| async move {
            let mut piece = body.slice(start..body.len().min(start + PIECE));
            if copied {
                piece = Bounce::copy_of(&piece);
            }
            file.write_all_at(piece, start as u64).await.0
        })
        .buffer_unordered(PIECES_IN_FLIGHT)
        .try_collect()
        .await
}

/// Reads a file, or `range` of it. `None` means that the range reaches past the end.
pub(super) async fn read(path: &Path, range: Option<Range<u64>>) -> io::Result<Option<Bytes>> {
    let file = File::open(path).await?;
    let stat = file.statx().await?;
    if u32::from(stat.stx_mode) & libc::S_IFMT != libc::S_IFREG {
        return Err(io::ErrorKind::NotFound.into());
    }
    if range.is_none() && stat.stx_size >= DIRECT_FROM as u64 {
        // Big whole reads come once (compaction, export); they should not push anything out of the page cache.
        let direct = OpenOptions::new().read(true).custom_flags(libc::O_DIRECT).open(path).await;
        match direct {
            Ok(file) => return read_direct(file, to_len(stat.stx_size)?).await.map(Some),
            Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
            Err(e) => return Err(e),
        }
    }
    let range = range.unwrap_or(0..stat.stx_size);
    if range.start > range.end || range.end > stat.stx_size {
        return Ok(None);
    }
    let len = to_len(range.end - range.start)?;
    let mut content = Vec::with_capacity(len);
    if len > 0 {
        let (result, slice) = file.read_exact_at(content.slice(..len), range.start).await;
        content = slice.into_inner();
        result?;
    }
    file.close().await?;
    Ok(Some(Bytes::from(content)))
}

fn to_len(len: u64) -> io::Result<usize> {
    usize::try_from(len).map_err(io::Error::other)
}

/// Reads `len` bytes around the page cache, several pieces at the same time, into one stretch of aligned memory.
async fn read_direct(file: File, len: usize) -> io::Result<Bytes> {
    let room = BytesMut::with_capacity(len.next_multiple_of(BLOCK) + BLOCK);
    let mut pieces = Vec::with_capacity(len.div_ceil(PIECE));
    let mut rest = split_aligned(room);
    for start in (0..len).step_by(PIECE) {
        let size = (len - start).min(PIECE).next_multiple_of(BLOCK);
        let next = rest.split_off(size);
        pieces.push((start, std::mem::replace(&mut rest, next)));
    }
    let content = stream::iter(pieces)
        .map(|(start, piece)| read_piece(&file, piece, start as u64, len.min(start + PIECE) - start))
        .buffered(PIECES_IN_FLIGHT)
        // The pieces are neighbours, so this joins them without moving a byte.
        .try_fold(BytesMut::new(), |mut content, piece| async move {
            content.unsplit(piece);
            Ok(content)
        })
        .await?;
    file.close().await?;
    Ok(content.freeze())
}

fn split_aligned(mut room: BytesMut) -> BytesMut {
    let skip = room.as_ptr().align_offset(BLOCK);
    room.split_off(skip)
}

/// Fills a piece with the `len` bytes at `pos`. Its capacity is whole blocks, at least `len`; only the file's end may
/// stop a read inside a block.
async fn read_piece(file: &File, mut piece: BytesMut, pos: u64, len: usize) -> io::Result<BytesMut> {
    let whole = len.next_multiple_of(BLOCK);
    let mut done = 0;
    while done < len {
        let (result, slice) = file.read_at(piece.slice(done..whole), pos + done as u64).await;
        piece = slice.into_inner();
        match result? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => done += n,
        }
    }
    piece.truncate(len);
    Ok(piece)
}

/// Makes the names in a directory durable.
pub(super) async fn sync_dir(path: &Path) -> io::Result<()> {
    let dir = File::open(path).await?;
    dir.sync_all().await?;
    dir.close().await
}
