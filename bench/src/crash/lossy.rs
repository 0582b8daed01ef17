//! An NBD server in memory that survives its own "crashes", and loses in a way of one's choice. It exists to prove
//! that the tester finds what it looks for.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::Result;
use blockd::export::nbd::client::NbdClient;

use crate::client::Client;
use blockd::export::nbd::proto::{self, command, handshake, info, option, option_reply, transmission};
use zerocopy::IntoBytes;

use super::Target;

/// In which way it is wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// In none.
    None,
    /// Now and then a write is acknowledged and forgotten.
    DropAcknowledged,
    /// A write cut off by the crash is there in half of a block.
    Tear,
    /// A write cut off by the crash is there after the restart, and gone later.
    GoBack,
    /// Trims and zeroings are acknowledged and now and then forgotten.
    DropZeroes,
    /// A read now and then returns what was there before the last crash.
    StaleRead,
}

struct Disk {
    bytes: Vec<u8>,
    /// As it was at the last start.
    at_start: Vec<u8>,
    fault: Fault,
    killed: bool,
    requests: u64,
    zeroings: u64,
    /// Blocks to go back: offset, and what was there.
    undo: Vec<(usize, Vec<u8>)>,
}

/// See the module.
pub struct Lossy {
    dir: tempfile::TempDir,
    disk: Arc<Mutex<Disk>>,
    streams: Arc<Mutex<Vec<UnixStream>>>,
    acceptor: Option<JoinHandle<()>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Lossy {
    /// A stopped server of zeroes.
    pub fn new(size_bytes: usize, fault: Fault) -> Result<Self> {
        let disk = Disk {
            bytes: vec![0; size_bytes],
            at_start: Vec::new(),
            fault,
            killed: true,
            requests: 0,
            zeroings: 0,
            undo: Vec::new(),
        };
        Ok(Self {
            dir: tempfile::tempdir()?,
            disk: Arc::new(Mutex::new(disk)),
            streams: Arc::default(),
            acceptor: None,
        })
    }

    fn path(&self) -> PathBuf {
        self.dir.path().join("nbd.sock")
    }
}

impl Target for Lossy {
    fn start(&mut self) -> Result<()> {
        let mut disk = lock(&self.disk);
        disk.killed = false;
        if disk.fault == Fault::StaleRead {
            disk.at_start = disk.bytes.clone();
        }
        drop(disk);
        let listener = UnixListener::bind(self.path())?;
        let (disk, streams) = (self.disk.clone(), self.streams.clone());
        self.acceptor = Some(thread::spawn(move || {
            let mut threads = Vec::new();
            for stream in listener.incoming() {
                let Ok(stream) = stream else { break };
                if lock(&disk).killed {
                    break;
                }
                if let Ok(copy) = stream.try_clone() {
                    lock(&streams).push(copy);
                }
                let disk = disk.clone();
                threads.push(thread::spawn(move || {
                    // A broken connection is the ordinary end of a client.
                    let _ = serve(stream, &disk);
                }));
            }
            for thread in threads {
                let _ = thread.join();
            }
        }));
        Ok(())
    }

    fn start_and_kill(&mut self, after: Duration) -> Result<()> {
        self.start()?;
        thread::sleep(after.min(Duration::from_millis(1)));
        self.kill()
    }

    fn connect(&self) -> io::Result<Box<dyn Client>> {
        Ok(Box::new(NbdClient::connect_unix(self.path(), "")?))
    }

    fn alive(&mut self) -> bool {
        true
    }

    fn kill(&mut self) -> Result<()> {
        lock(&self.disk).killed = true;
        // Wakes the acceptor.
        drop(UnixStream::connect(self.path()));
        // Requests already received are still read by their threads, which see that they are dead.
        thread::sleep(Duration::from_millis(2));
        for stream in lock(&self.streams).drain(..) {
            let _ = stream.shutdown(Shutdown::Both);
        }
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
        std::fs::remove_file(self.path())?;
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        self.kill()
    }

    fn log_tail(&self) -> String {
        format!("(in memory, with fault {:?})", lock(&self.disk).fault)
    }
}

impl Drop for Lossy {
    fn drop(&mut self) {
        if self.acceptor.is_some() {
            let _ = self.kill();
        }
    }
}

impl Disk {
    /// Carries out a request; `None` if the server is dead.
    fn apply(&mut self, request: &proto::Request, data: &[u8]) -> Option<Vec<u8>> {
        let start = request.offset.get() as usize;
        let len = request.len.get() as usize;
        let kind = request.command.get();
        let first_block = start.next_multiple_of(4096);
        if self.killed {
            if kind == command::WRITE && first_block + 4096 <= start + len {
                let block = &data[first_block - start..][..4096];
                match self.fault {
                    Fault::Tear => self.bytes[first_block..][..2048].copy_from_slice(&block[..2048]),
                    Fault::GoBack => {
                        let place = &mut self.bytes[first_block..][..4096];
                        self.undo.push((first_block, place.to_vec()));
                        place.copy_from_slice(block);
                    }
                    _ => {}
                }
            }
            return None;
        }
        self.requests += 1;
        let now_and_then = self.requests.is_multiple_of(50);
        match kind {
            command::READ => {
                let stale = self.fault == Fault::StaleRead && now_and_then;
                let source = if stale { &self.at_start } else { &self.bytes };
                return Some(source[start..start + len].to_vec());
            }
            command::WRITE => {
                for (at, old) in std::mem::take(&mut self.undo).into_iter().rev() {
                    self.bytes[at..at + old.len()].copy_from_slice(&old);
                }
                if !(self.fault == Fault::DropAcknowledged && now_and_then) {
                    self.bytes[start..start + len].copy_from_slice(data);
                }
            }
            command::TRIM | command::WRITE_ZEROES => {
                self.zeroings += 1;
                if !(self.fault == Fault::DropZeroes && self.zeroings.is_multiple_of(5)) {
                    self.bytes[start..start + len].fill(0);
                }
            }
            _ => {}
        }
        Some(Vec::new())
    }
}

fn serve(mut stream: UnixStream, disk: &Mutex<Disk>) -> io::Result<()> {
    negotiate(&mut stream, lock(disk).bytes.len() as u64)?;
    loop {
        let mut head = [0; proto::Request::SIZE];
        stream.read_exact(&mut head)?;
        let Some((request, _)) = proto::take::<proto::Request>(&head) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let len = if request.command.get() == command::WRITE { request.len.get() } else { 0 };
        let mut data = vec![0; len as usize];
        stream.read_exact(&mut data)?;
        if request.command.get() == command::DISC {
            return Ok(());
        }
        let Some(answer) = lock(disk).apply(&request, &data) else {
            return Ok(());
        };
        let reply = proto::SimpleReply::new(0, request.cookie.get());
        stream.write_all(reply.as_bytes())?;
        stream.write_all(&answer)?;
    }
}

fn negotiate(stream: &mut UnixStream, size: u64) -> io::Result<()> {
    let flags = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
    stream.write_all(proto::Greeting::new(flags).as_bytes())?;
    stream.read_exact(&mut [0; 4])?;
    loop {
        let mut head = [0; proto::OptionHeader::SIZE];
        stream.read_exact(&mut head)?;
        let Some((head, _)) = proto::take::<proto::OptionHeader>(&head) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        stream.read_exact(&mut vec![0; head.len.get() as usize])?;
        let number = head.option.get();
        if number != option::GO {
            stream.write_all(proto::OptionReply::new(number, option_reply::ERR_UNSUP, 0).as_bytes())?;
            continue;
        }
        let export = proto::InfoExport {
            kind: info::EXPORT.into(),
            size: size.into(),
            flags: (transmission::HAS_FLAGS
                | transmission::SEND_FLUSH
                | transmission::SEND_FUA
                | transmission::SEND_TRIM
                | transmission::SEND_WRITE_ZEROES
                | transmission::CAN_MULTI_CONN)
                .into(),
        };
        let reply = proto::OptionReply::new(number, option_reply::INFO, proto::InfoExport::SIZE as u32);
        stream.write_all(reply.as_bytes())?;
        stream.write_all(export.as_bytes())?;
        return stream.write_all(proto::OptionReply::new(number, option_reply::ACK, 0).as_bytes());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::crash::rounds::{self, Plan, Statistics};

    fn torture(fault: Fault, rounds: u32) -> Result<Statistics> {
        let plan = Plan {
            rounds,
            seed: 3,
            load_min: Duration::from_millis(5),
            load_max: Duration::from_millis(40),
            idle_max: Duration::from_millis(10),
            volume_bytes: 64 << 20,
            connections: 3,
            depth: 16,
            trim_is_advisory: false,
            progress_every: 0,
        };
        let mut server = Lossy::new(plan.volume_bytes as usize, fault)?;
        server.start()?;
        rounds::run(&mut server, &plan)
    }

    /// Whether one of these is what the tester says.
    fn found(fault: Fault, whats: &[&str]) {
        let error = torture(fault, 40).expect_err("the tester must notice");
        let text = format!("{error:#}");
        assert!(whats.iter().any(|what| text.contains(what)), "{text}");
    }

    /// What is lost beside a write in flight shows as a block made of two.
    const LOST: &[&str] = &["possible", "the block is torn"];

    #[test]
    fn an_honest_server_passes() {
        // Of so many rounds as the faults are given a slow machine makes three quarters of a second of load, and these numbers.
        let statistics = torture(Fault::None, 40).unwrap();
        assert_eq!(statistics.rounds, 40);
        assert!(statistics.load.acknowledged > 1000 && statistics.cut_off > 50, "{statistics}");
        assert!(statistics.load.reads > 100 && statistics.open_sectors > 0, "{statistics}");
    }

    #[test]
    fn a_lost_acknowledged_write_is_found() {
        found(Fault::DropAcknowledged, LOST);
    }

    #[test]
    fn a_torn_block_is_found() {
        found(Fault::Tear, &["the block is torn"]);
    }

    #[test]
    fn going_back_is_found() {
        found(Fault::GoBack, LOST);
    }

    #[test]
    fn a_lost_zeroing_is_found() {
        found(Fault::DropZeroes, LOST);
    }

    #[test]
    fn a_stale_read_is_found() {
        found(Fault::StaleRead, &["a read returned"]);
    }
}
