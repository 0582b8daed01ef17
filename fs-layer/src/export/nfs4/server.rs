//! Listening, stopping, and what all connections share.

use std::collections::HashSet;
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, mpsc};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use super::exclusive::Exclusives;
use super::handle::{HANDLE_BYTES, Handles};
use super::options::NfsOptions;
use super::records::Start;
use super::state::{Let, Table};
use super::threads::Threads;
use super::waiting::Waiting;
use crate::export::nfs3::replies::Replies;
use crate::vfs::Vfs;

/// Clients that hold something keep it for this many leases of silence, unless it is in somebody's way.
const COURTESY_LEASES: u32 = 960;

/// What all connections share.
pub struct Shared {
    /// The tree.
    pub vfs: Arc<dyn Vfs>,
    /// How it is exported.
    pub options: NfsOptions,
    /// Makes file handles.
    pub handles: Handles,
    /// Who this server is.
    pub start: Start,
    /// Names the filesystem for ever.
    pub fs_id: [u8; 16],
    /// What was answered to requests of version 3.
    pub replies: Replies,
    /// Who wants to know when a lock is free.
    pub waiting: Arc<Waiting>,
    /// What servers before this one did for their clients, and may not have got to answer.
    pub noted: HashSet<u64>,
    /// Which exclusive creates come again.
    pub exclusives: Exclusives,
    /// Whether the filesystem was told that the grace period is over.
    recovered: AtomicBool,
    table: Mutex<Table>,
}

impl Shared {
    /// Begins a start of the server. Blocks.
    ///
    /// # Errors
    /// The records or the filesystem cannot be read.
    pub fn new(vfs: Arc<dyn Vfs>, mut options: NfsOptions) -> io::Result<Shared> {
        options.transfer_max = options.transfer_max.clamp(4 << 10, 4 << 20) / 4096 * 4096;
        options.slots = options.slots.clamp(1, 1024);
        let start = options.records.start()?;
        let fs_id = vfs.statfs().map_err(|e| io::Error::other(e.to_string()))?.id;
        let table = Table::new(
            start.boot,
            start.clients.clone(),
            vfs.clone(),
            options.records.clone(),
            options.lease,
            options.grace,
        );
        let handles = Handles::new(start.handle_key, fs_id);
        let noted = vfs.noted().into_iter().collect();
        Ok(Shared {
            vfs,
            noted,
            exclusives: Exclusives::default(),
            options,
            handles,
            start,
            fs_id,
            replies: Replies::default(),
            waiting: Arc::default(),
            recovered: AtomicBool::new(false),
            table: Mutex::new(table),
        })
    }

    /// What clients hold.
    pub fn table(&self) -> MutexGuard<'_, Table> {
        // A fault in one request must not end all others.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running server.
pub struct Server {
    shared: Arc<Shared>,
    address: SocketAddr,
    threads: Arc<Threads>,
    /// Dropped at the end.
    ticking: Option<(mpsc::Sender<()>, JoinHandle<()>)>,
}

impl Server {
    /// Serves NFSv4.1 and 4.2, and version 3 if wanted, on a listening socket. Blocks while the records are read.
    ///
    /// # Errors
    /// The records or the filesystem cannot be read, or there are no threads to be had.
    pub fn start(listener: TcpListener, vfs: Arc<dyn Vfs>, options: NfsOptions) -> io::Result<Server> {
        let shared = Arc::new(Shared::new(vfs, options)?);
        let threads = Threads::start(shared.clone(), listener)?;
        let (end, ended) = mpsc::channel();
        let ticking = {
            let (shared, threads) = (shared.clone(), threads.clone());
            thread::Builder::new().name("nfs-tick".into()).spawn(move || tick(&shared, &threads, &ended))
        };
        let ticking = ticking.inspect_err(|_| threads.stop())?;
        Ok(Server { shared, address: threads.address()?, threads, ticking: Some((end, ticking)) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The handle of the root directory.
    pub fn root_handle(&self) -> [u8; HANDLE_BYTES] {
        self.shared.handles.make(crate::vfs::ROOT)
    }

    /// Clients, sessions, opens and locks at the moment.
    pub fn counts(&self) -> (usize, usize, usize, usize) {
        self.shared.table().counts()
    }

    /// Ends all connections, waits for what runs, and gives up locks; clients can take back from the next server what they held.
    ///
    /// Open files come back still held. A process that ends just drops them: what of them has no name waits on the disk for the next server's
    /// clients ([`Vfs::end_recovery`]). Who goes on with the same [`Vfs`] releases them when the next server's grace period is over.
    pub fn stop(mut self) -> Let {
        self.threads.stop();
        self.threads.wait();
        if let Some((end, ticking)) = self.ticking.take() {
            drop(end);
            // What it did, it did.
            let _ = ticking.join();
        }
        self.shared.table().clear()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.threads.stop();
    }
}

/// Does what time brings about, until `ended` says that nobody is left who could.
fn tick(shared: &Shared, threads: &Threads, ended: &mpsc::Receiver<()>) {
    let period = shared.options.lease.clamp(Duration::from_millis(100), Duration::from_secs(5));
    while ended.recv_timeout(period) == Err(mpsc::RecvTimeoutError::Timeout) {
        threads.check_patience();
        let (gone, in_grace) = {
            let mut table = shared.table();
            (table.expire_silent(COURTESY_LEASES), table.in_grace())
        };
        gone.go(&*shared.vfs);
        // Whoever held a file that has no name had the time to open it again.
        if !in_grace && !shared.recovered.swap(true, Ordering::Relaxed) {
            shared.vfs.end_recovery();
        }
    }
}
