//! The volume as a disk: NBD for everything, and the admin socket for copies that move nothing, which NBD has no command for.
//!
//! A copy comes after the answers to all writes that it is to see, on whatever way, so the engine has them. Nothing the connection
//! sends again after a break can undo one: copies go to addresses that were never written.

use std::io;
use std::sync::mpsc::{self, Receiver, Sender};
use std::sync::{Mutex, PoisonError};

use blockd::admin::api::CopyRange;
use blockd::cli::Client;
use tokio::runtime::Runtime;

use crate::disk::nbd::NbdDisk;
use crate::disk::{BLOCK_BYTES, BlockAddress, Disk};

/// A copy, and where its outcome goes.
type Order = (CopyRange, Sender<anyhow::Result<()>>);

/// See the module.
pub struct EngineDisk {
    nbd: NbdDisk,
    copies: Mutex<Sender<Order>>,
}

impl EngineDisk {
    /// Copies within `volume` by `client`.
    pub(super) fn new(nbd: NbdDisk, client: Client, volume: String) -> io::Result<EngineDisk> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (copies, orders) = mpsc::channel();
        // A thread of its own, since callers may be within a runtime. It ends with the disk.
        let run = move || copy(&runtime, &client, &volume, &orders);
        std::thread::Builder::new().name("engine-copies".to_owned()).spawn(run)?;
        Ok(EngineDisk { nbd, copies: Mutex::new(copies) })
    }
}

fn copy(runtime: &Runtime, client: &Client, volume: &str, orders: &Receiver<Order>) {
    for (range, reply) in orders {
        // Who asked waits for it.
        let _ = reply.send(runtime.block_on(client.copy(volume, &range)));
    }
}

impl Disk for EngineDisk {
    fn blocks(&self) -> u64 {
        self.nbd.blocks()
    }

    fn read(&self, at: BlockAddress, buffer: &mut [u8]) -> io::Result<()> {
        self.nbd.read(at, buffer)
    }

    fn write(&self, at: BlockAddress, data: &[u8]) -> io::Result<()> {
        self.nbd.write(at, data)
    }

    fn write_all(&self, runs: &[(BlockAddress, &[u8])]) -> io::Result<()> {
        self.nbd.write_all(runs)
    }

    fn write_parts(&self, runs: &[(BlockAddress, Vec<&[u8]>)]) -> io::Result<()> {
        self.nbd.write_parts(runs)
    }

    fn flush(&self) -> io::Result<()> {
        self.nbd.flush()
    }

    fn discard(&self, at: BlockAddress, count: u64) -> io::Result<()> {
        self.nbd.discard(at, count)
    }

    fn can_remap(&self) -> bool {
        true
    }

    fn remap(&self, from: BlockAddress, to: BlockAddress, count: u64) -> io::Result<()> {
        const BLOCK: u64 = BLOCK_BYTES as u64;
        let range = CopyRange { from: from * BLOCK, to: to * BLOCK, len: count * BLOCK, durable: false };
        let (reply, outcome) = mpsc::channel();
        let copies = self.copies.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let ended = || io::Error::other("the thread that asks the engine for copies has ended");
        copies.send((range, reply)).map_err(|_| ended())?;
        outcome.recv().map_err(|_| ended())?.map_err(|error| io::Error::other(format!("{error:#}")))
    }
}
