//! The threads that serve connections.
//!
//! All wait in one epoll_wait(2); each connection is told of to one of them, once, until it is armed again. Whoever is told reads requests and
//! answers them itself, one after the other: waking another thread for each would take longer than most requests do. Before something that takes time,
//! waiting for the disk above all ([`crate::waiting`]) or copying much, it passes the turn to read the connection: arms it, so that
//! whoever is free goes on with the next request. There is always a thread that waits, up to a limit.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::connection::{self, Connection};
use super::receiving::Progress;
use super::rpc;
use super::server::Shared;
use crate::mutex::lock;
use crate::waiting;

/// Requests under way at a time over all connections: each takes a thread, and the memory of a request and a reply.
const THREADS_MAX: usize = 512;
/// Connections at a time.
const CONNECTIONS_MAX: usize = 4096;
/// Requests of a connection that are answered before others have their turn.
const IN_A_ROW: usize = 32;
/// Records and replies of so many bytes take time.
const LONG: usize = 32 << 10;
/// A thread that is not needed ends after this.
const IDLE: u16 = 10_000;

const STOP: u64 = 0;
const LISTENER: u64 = 1;
const FIRST_CONNECTION: u64 = 2;

/// The threads, and what they wait for.
pub(super) struct Threads {
    shared: Arc<Shared>,
    epoll: Epoll,
    /// Written to at the end, and never read: everybody wakes.
    stop: EventFd,
    stopping: AtomicBool,
    listener: TcpListener,
    connections: Mutex<HashMap<u64, Arc<Connection>>>,
    next: AtomicU64,
    /// The listener is not armed: there are too many connections.
    full: AtomicBool,
    /// Threads in epoll_wait(2), or on their way there.
    waiting: AtomicUsize,
    /// All threads that are not needed beyond these end.
    kept: usize,
    running: Mutex<usize>,
    ended: Condvar,
}

/// Dropped when a thread ends, by a fault too.
struct Ending(Arc<Threads>);

impl Drop for Ending {
    fn drop(&mut self) {
        *lock(&self.0.running) -= 1;
        self.0.ended.notify_all();
    }
}

/// What a thread works on.
struct Turn {
    threads: Arc<Threads>,
    number: u64,
    connection: Arc<Connection>,
}

thread_local! {
    /// Set while this thread has the turn to read a connection.
    static TURN: RefCell<Option<Turn>> = const { RefCell::new(None) };
}

impl Threads {
    /// Begins to serve.
    pub(super) fn start(shared: Arc<Shared>, listener: TcpListener) -> io::Result<Arc<Threads>> {
        listener.set_nonblocking(true)?;
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let stop = EventFd::from_flags(EfdFlags::EFD_CLOEXEC)?;
        epoll.add(&stop, EpollEvent::new(EpollFlags::EPOLLIN, STOP))?;
        epoll.add(&listener, EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, LISTENER))?;
        let kept = thread::available_parallelism().map_or(2, |count| count.get().clamp(2, 16));
        let threads = Arc::new(Threads {
            shared,
            epoll,
            stop,
            stopping: AtomicBool::new(false),
            listener,
            connections: Mutex::default(),
            next: AtomicU64::new(FIRST_CONNECTION),
            full: AtomicBool::new(false),
            waiting: AtomicUsize::new(0),
            kept,
            running: Mutex::default(),
            ended: Condvar::new(),
        });
        for _ in 0..kept {
            threads.spawn()?;
        }
        Ok(threads)
    }

    /// Where it listens.
    pub(super) fn address(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Ends all connections.
    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        // A counter far from its limit.
        let _ = self.stop.write(1);
        lock(&self.connections).values().for_each(|connection| connection.shut_down());
    }

    /// Waits until nothing runs any more. After [`Self::stop`].
    pub(super) fn wait(&self) {
        let mut running = lock(&self.running);
        while *running > 0 {
            running = self.ended.wait(running).unwrap_or_else(PoisonError::into_inner);
        }
        drop(running);
        let connections = std::mem::take(&mut *lock(&self.connections));
        connections.values().for_each(|connection| connection.close());
    }

    /// Ends connections that are in the middle of a record for too long.
    pub(super) fn check_patience(&self) {
        let connections: Vec<_> = lock(&self.connections).values().cloned().collect();
        connections.iter().for_each(|connection| connection.check_patience());
    }

    fn spawn(self: &Arc<Threads>) -> io::Result<()> {
        let mut running = lock(&self.running);
        if *running >= THREADS_MAX || self.stopping.load(Ordering::SeqCst) {
            return Ok(());
        }
        *running += 1;
        // Counted as waiting from now on, so that nobody else starts one for the same reason.
        self.waiting.fetch_add(1, Ordering::SeqCst);
        drop(running);
        let threads = self.clone();
        let spawned = thread::Builder::new().name("nfs".into()).spawn(move || {
            let threads = Ending(threads);
            threads.0.run();
        });
        if spawned.is_err() {
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            *lock(&self.running) -= 1;
        }
        spawned.map(drop)
    }

    /// This thread may not come back soon: is there another?
    fn ensure_waiting(self: &Arc<Threads>) {
        if self.waiting.load(Ordering::SeqCst) == 0
            && let Err(e) = self.spawn()
        {
            tracing::warn!("cannot start another thread for NFS: {e}");
        }
    }

    fn run(self: &Arc<Threads>) {
        waiting::on_wait(pass);
        loop {
            // Counted as waiting already.
            let event = self.next_event();
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            match event {
                Some(STOP) => return,
                Some(LISTENER) => self.accept(),
                Some(number) => {
                    let connection = lock(&self.connections).get(&number).cloned();
                    if let Some(connection) = connection {
                        self.serve(number, &connection);
                    }
                }
                None if self.waiting.load(Ordering::SeqCst) >= self.kept => return,
                None => {}
            }
            self.waiting.fetch_add(1, Ordering::SeqCst);
        }
    }

    fn next_event(&self) -> Option<u64> {
        let mut events = [EpollEvent::empty()];
        loop {
            match self.epoll.wait(&mut events, EpollTimeout::from(IDLE)) {
                Ok(0) => return None,
                Ok(_) => return Some(events[0].data()),
                Err(Errno::EINTR) => {}
                Err(e) => panic!("epoll_wait fails: {e}"),
            }
        }
    }

    fn accept(self: &Arc<Threads>) {
        loop {
            if lock(&self.connections).len() >= CONNECTIONS_MAX {
                self.full.store(true, Ordering::SeqCst);
                // One may have ended meanwhile.
                if lock(&self.connections).len() >= CONNECTIONS_MAX || !self.full.swap(false, Ordering::SeqCst) {
                    return;
                }
            }
            match self.listener.accept() {
                Ok((stream, peer)) => {
                    let transfer_max = self.shared.options.transfer_max;
                    let connection = Arc::new(Connection::new(stream, peer.ip(), transfer_max));
                    let number = self.next.fetch_add(1, Ordering::Relaxed);
                    lock(&self.connections).insert(number, connection.clone());
                    let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, number);
                    if let Err(e) = self.epoll.add(connection.socket(), event) {
                        tracing::warn!("an NFS connection is not served: {e}");
                        self.forget(number, &connection);
                    } else if self.stopping.load(Ordering::SeqCst) {
                        // Who stopped may not have seen it.
                        connection.shut_down();
                    }
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                Err(e) => {
                    // Out of file descriptors, most likely: others may end.
                    tracing::warn!("an NFS connection is not accepted: {e}");
                    self.ensure_waiting();
                    thread::sleep(Duration::from_millis(100));
                    break;
                }
            }
        }
        self.arm_listener();
    }

    fn arm_listener(&self) {
        let mut event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT, LISTENER);
        self.epoll.modify(&self.listener, &mut event).expect("the listener is there");
    }

    fn forget(&self, number: u64, connection: &Connection) {
        connection.close();
        lock(&self.connections).remove(&number);
        if self.full.swap(false, Ordering::SeqCst) {
            self.arm_listener();
        }
    }

    /// Answers what comes, with the turn to read the connection.
    fn serve(self: &Arc<Threads>, number: u64, connection: &Arc<Connection>) {
        for _ in 0..IN_A_ROW {
            let record = match connection.receive() {
                Ok(Progress::Record(record)) => record,
                Ok(Progress::NotYet) => return self.arm(number, connection),
                Ok(Progress::Ended) => return self.forget(number, connection),
                Err(e) => {
                    tracing::debug!(peer = %connection.peer, "an NFS connection ends: {e}");
                    return self.forget(number, connection);
                }
            };
            connection.begin();
            TURN.set(Some(Turn { threads: self.clone(), number, connection: connection.clone() }));
            if record.len() >= LONG {
                pass()
            } else {
                waiting::arm(true)
            }
            // A fault of ours costs one caller an error, not all of them the server. What the request held is let go while it unwinds.
            let answered = catch_unwind(AssertUnwindSafe(|| connection::answer(&self.shared, connection, &record)));
            waiting::arm(false);
            let reply = answered.unwrap_or_else(|_| {
                tracing::error!("an NFS request failed by a fault of this program; please report it with the message before this one");
                rpc::system_error(&record)
            });
            if let Some(reply) = reply {
                if reply.len() >= LONG {
                    pass();
                }
                connection.send(&reply, &|| {
                    pass();
                    self.ensure_waiting();
                });
            }
            let has_turn = TURN.take().is_some();
            if connection.end() {
                self.arm(number, connection);
            }
            if !has_turn {
                return;
            }
        }
        self.arm(number, connection);
    }

    /// Has a thread told when there is something to be read.
    fn arm(&self, number: u64, connection: &Connection) {
        if !connection.may_go_on() {
            return;
        }
        // What was received already the socket does not tell of; that it can be written to is told at once.
        let now = if connection.has_more() { EpollFlags::EPOLLOUT } else { EpollFlags::empty() };
        let mut event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLONESHOT | now, number);
        if let Err(e) = self.epoll.modify(connection.socket(), &mut event) {
            tracing::warn!(peer = %connection.peer, "an NFS connection is not served any more: {e}");
            self.forget(number, connection);
        }
    }
}

/// Lets another thread read the connection, if this one has the turn.
fn pass() {
    let Some(Turn { threads, number, connection }) = TURN.take() else { return };
    threads.arm(number, &connection);
    threads.ensure_waiting();
}
