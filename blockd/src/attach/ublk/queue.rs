//! One queue of a device: the kernel's requests out to the daemon, its replies back, on one thread.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use io_uring::{opcode, types};
use libublk::helpers::IoBuf;
use libublk::io::{UblkDev, UblkIOCtx, UblkQueue};
use libublk::{BufDesc, BufDescList, UblkError, UblkIORes, sys};

use super::super::server::{self, Server};
use crate::export::nbd::client::{Errno, NbdClient, ReplyData, Request};

/// Pauses between attempts to connect: the first, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Sectors of the kernel's interface, in bits of a byte's address.
const SECTOR_SHIFT: u32 = 9;

/// The volume that is served.
pub struct Target {
    /// Where.
    pub server: Server,
    /// Its name.
    pub volume: String,
    /// Its identity.
    pub id: Option<String>,
    /// Bytes of the device.
    pub size: u64,
    /// What the messages begin with.
    pub device: String,
}

impl Target {
    /// For whoever reads the keeper's messages.
    pub fn say(&self, what: &str) {
        use std::io::Write;
        drop(writeln!(io::stderr(), "blockd: {}: {what}", self.device));
    }

    fn connect(&self) -> io::Result<NbdClient> {
        let (mut client, found) = self.server.client(&self.volume)?;
        if found.id != self.id {
            return Err(io::Error::other(format!(
                "there is another volume of this name now (it was {}, it is {})",
                self.id.as_deref().unwrap_or("unnamed"),
                found.id.as_deref().unwrap_or("unnamed")
            )));
        }
        if found.size < self.size {
            return Err(io::Error::other(format!(
                "the volume has shrunk from {} to {} bytes; detach and attach it",
                self.size, found.size
            )));
        }
        // A daemon that takes long, for instance because its log is full, is waited for.
        client.set_timeout(None);
        Ok(client)
    }
}

/// How the device's end reaches queues that wait for the daemon.
pub struct Stop {
    away: AtomicBool,
    now: AtomicBool,
    /// Copies of the queues' sockets.
    sockets: Mutex<Vec<Option<OwnedFd>>>,
}

impl Stop {
    /// For so many queues.
    pub fn new(queues: usize) -> Self {
        let sockets = Mutex::new((0..queues).map(|_| None).collect());
        Self { away: AtomicBool::new(false), now: AtomicBool::new(false), sockets }
    }

    /// From now on, what finds no daemon fails.
    pub fn when_away(&self) {
        self.away.store(true, Ordering::SeqCst);
    }

    /// From now on, everything fails.
    pub fn now(&self) {
        self.when_away();
        let sockets = self.sockets.lock().expect("nobody panics with it");
        self.now.store(true, Ordering::SeqCst);
        sockets.iter().flatten().for_each(server::cut);
    }

    /// Remembers a queue's connection.
    fn watch(&self, queue: u16, client: &NbdClient) -> io::Result<()> {
        let socket = client.as_fd().try_clone_to_owned()?;
        let mut sockets = self.sockets.lock().expect("nobody panics with it");
        // Under the lock, so that it is either cut by `now` or not used.
        if self.now.load(Ordering::SeqCst) {
            server::cut(&socket);
        }
        sockets[usize::from(queue)] = Some(socket);
        Ok(())
    }

    /// Forgets a queue's connection, whose last descriptor is then the client's own.
    fn forget(&self, queue: u16) {
        self.sockets.lock().expect("nobody panics with it")[usize::from(queue)] = None;
    }

    fn is_over(&self) -> bool {
        self.away.load(Ordering::SeqCst)
    }
}

/// A request of the kernel that is not answered.
#[derive(Clone, Copy, Debug)]
struct Waiting {
    /// Which it was, in the order of arrival.
    arrival: u64,
    command: Command,
    offset: u64,
    len: u32,
    fua: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Command {
    Read,
    Write,
    Flush,
    Trim,
    WriteZeroes { no_hole: bool },
}

impl Waiting {
    /// `None`: a command that was not announced.
    fn new(arrival: u64, desc: &sys::ublksrv_io_desc) -> Option<Self> {
        let command = match desc.op_flags & 0xff {
            sys::UBLK_IO_OP_READ => Command::Read,
            sys::UBLK_IO_OP_WRITE => Command::Write,
            sys::UBLK_IO_OP_FLUSH => Command::Flush,
            sys::UBLK_IO_OP_DISCARD => Command::Trim,
            sys::UBLK_IO_OP_WRITE_ZEROES => {
                Command::WriteZeroes { no_hole: desc.op_flags & sys::UBLK_IO_F_NOUNMAP != 0 }
            }
            _ => return None,
        };
        let fua = desc.op_flags & sys::UBLK_IO_F_FUA != 0;
        let len = desc.nr_sectors.checked_shl(SECTOR_SHIFT).filter(|len| len >> SECTOR_SHIFT == desc.nr_sectors)?;
        Some(Self { arrival, command, offset: desc.start_sector << SECTOR_SHIFT, len, fua })
    }

    fn request<'a>(&self, buffer: &'a [u8]) -> Request<'a> {
        let Self { offset, len, fua, .. } = *self;
        match self.command {
            Command::Read => Request::Read { offset, len },
            Command::Write => Request::Write { offset, data: &buffer[..len as usize], fua },
            Command::Flush => Request::Flush,
            Command::Trim => Request::Trim { offset, len, fua },
            Command::WriteZeroes { no_hole } => Request::WriteZeroes { offset, len, fua, no_hole },
        }
    }

    /// What the kernel is told when it is done.
    fn result(&self) -> i32 {
        match self.command {
            Command::Read | Command::Write => self.len as i32,
            _ => 0,
        }
    }
}

/// Serves queue `number` until the device is taken away.
///
/// # Errors
/// The kernel's interface does not work.
pub fn serve(number: u16, device: &UblkDev, client: NbdClient, target: &Target, stop: &Stop) -> Result<(), UblkError> {
    let buffers = device.alloc_queue_io_bufs();
    let queue = UblkQueue::new(number, device)?.submit_fetch_commands_unified(BufDescList::Slices(Some(&buffers)))?;
    stop.watch(number, &client)?;
    let mut forwarder = Forwarder {
        number,
        target,
        stop,
        waiting: vec![None; buffers.len()],
        buffers,
        arrivals: 0,
        client: Some(client),
        tags: HashMap::new(),
        generation: 0,
        polled: false,
    };
    let mut arrived = Vec::new();
    loop {
        forwarder.poll(&queue)?;
        let woken = queue.flush_and_wake_io_tasks(
            |user_data, entry, _| {
                let tag = UblkIOCtx::user_data_to_tag(user_data) as u16;
                if user_data & libublk::UblkUringData::Target as u64 != 0 {
                    forwarder.polled &= tag != forwarder.generation;
                } else if entry.result() == sys::UBLK_IO_RES_OK as i32 {
                    arrived.push(tag);
                }
            },
            1,
        );
        match woken {
            Ok(_) => {}
            Err(UblkError::QueueIsDown) => return Ok(()),
            Err(UblkError::IOError(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        for tag in arrived.drain(..) {
            forwarder.accept(&queue, tag)?;
        }
        forwarder.exchange(&queue)?;
    }
}

struct Forwarder<'a> {
    number: u16,
    target: &'a Target,
    stop: &'a Stop,
    /// By tag.
    waiting: Vec<Option<Waiting>>,
    /// By tag.
    buffers: Vec<IoBuf<u8>>,
    arrivals: u64,
    /// Without one, everything fails: the device is at its end.
    client: Option<NbdClient>,
    /// Tags of the requests that are on the connection, by cookie.
    tags: HashMap<u64, u16>,
    /// Of the connection.
    generation: u16,
    /// The connection is being waited for.
    polled: bool,
}

impl Forwarder<'_> {
    /// Has the ring say when the connection can be read, if it does not do so yet.
    fn poll(&mut self, queue: &UblkQueue<'_>) -> Result<(), UblkError> {
        let Some(client) = self.client.as_ref().filter(|_| !self.polled) else { return Ok(()) };
        let events = (libc::POLLIN | libc::POLLRDHUP) as u32;
        let entry = opcode::PollAdd::new(types::Fd(client.as_fd().as_raw_fd()), events).build();
        queue.ublk_submit_sqe_sync(entry.user_data(UblkIOCtx::build_user_data(self.generation, 0, 0, true)))?;
        self.polled = true;
        Ok(())
    }

    /// Takes a request on and queues it for the connection.
    fn accept(&mut self, queue: &UblkQueue<'_>, tag: u16) -> Result<(), UblkError> {
        let Some(waiting) = Waiting::new(self.arrivals, queue.get_iod(tag)) else {
            return self.complete(queue, tag, -libc::EOPNOTSUPP);
        };
        self.arrivals += 1;
        self.waiting[usize::from(tag)] = Some(waiting);
        if let Err(error) = self.send(tag) {
            self.connect_again(&error);
        }
        Ok(())
    }

    fn send(&mut self, tag: u16) -> io::Result<()> {
        let (Some(client), Some(waiting)) = (&mut self.client, &self.waiting[usize::from(tag)]) else { return Ok(()) };
        let cookie = client.submit(waiting.request(self.buffers[usize::from(tag)].as_slice()))?;
        self.tags.insert(cookie, tag);
        Ok(())
    }

    /// Sends what is queued and answers the kernel what is answered.
    fn exchange(&mut self, queue: &UblkQueue<'_>) -> Result<(), UblkError> {
        while let Some(client) = &mut self.client {
            match client.ready_reply() {
                Ok(Some((cookie, Err(Errno(number))))) if number == libc::ESHUTDOWN as u32 => {
                    // The daemon is stopping; the request waits for the next one.
                    self.tags.remove(&cookie);
                    self.connect_again(&io::Error::from_raw_os_error(libc::ESHUTDOWN));
                }
                Ok(Some((cookie, result))) => self.answer(queue, cookie, result)?,
                Ok(None) => return Ok(()),
                Err(error) => self.connect_again(&error),
            }
        }
        for tag in self.by_arrival() {
            self.complete(queue, tag, -libc::EIO)?;
        }
        Ok(())
    }

    fn answer(
        &mut self,
        queue: &UblkQueue<'_>,
        cookie: u64,
        result: Result<ReplyData, Errno>,
    ) -> Result<(), UblkError> {
        let tag = self.tags.remove(&cookie).expect("the client knows its cookies");
        let waiting = self.waiting[usize::from(tag)].expect("a request stays until it is answered");
        let result = match result {
            Ok(ReplyData::Data(data)) => {
                self.buffers[usize::from(tag)].as_mut_slice()[..data.len()].copy_from_slice(&data);
                waiting.result()
            }
            Ok(_) => waiting.result(),
            Err(Errno(number)) => i32::try_from(number).ok().filter(|number| *number > 0).map_or(-libc::EIO, |n| -n),
        };
        self.complete(queue, tag, result)
    }

    fn complete(&mut self, queue: &UblkQueue<'_>, tag: u16, result: i32) -> Result<(), UblkError> {
        self.waiting[usize::from(tag)] = None;
        let buffer = BufDesc::Slice(self.buffers[usize::from(tag)].as_slice());
        queue.complete_io_cmd_unified(tag, buffer, Ok(UblkIORes::Result(result)))
    }

    /// Requests not answered, in the order in which they came.
    fn by_arrival(&self) -> Vec<u16> {
        let waiting = (0..).zip(&self.waiting).filter_map(|(tag, waiting)| Some((waiting.as_ref()?.arrival, tag)));
        let mut waiting: Vec<(u64, u16)> = waiting.collect();
        waiting.sort_unstable();
        waiting.into_iter().map(|(_, tag)| tag).collect()
    }

    /// Waits for the daemon, and sends what was not answered again. The kernel's new requests wait in the ring meanwhile.
    /// At the device's end it gives up, and there is no connection any more.
    fn connect_again(&mut self, error: &io::Error) {
        self.say(&format!("lost the connection to {}, I/O waits: {error}", self.target.server));
        let (mut pause, mut complaint) = (PAUSE_MIN, String::new());
        loop {
            if let Some(old) = self.client.take() {
                // Before the requests come to the daemon on another connection.
                server::cut(&old.as_fd());
                self.stop.forget(self.number);
            }
            self.tags.clear();
            self.generation = self.generation.wrapping_add(1);
            self.polled = false;
            if self.stop.is_over() {
                return;
            }
            match self.try_again() {
                Ok(()) => {
                    self.say(&format!("connected to {} again", self.target.server));
                    return;
                }
                Err(error) => {
                    let text = format!("cannot connect to {} again, trying on: {error}", self.target.server);
                    if text != complaint {
                        self.say(&text);
                        complaint = text;
                    }
                }
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    fn try_again(&mut self) -> io::Result<()> {
        let client = self.target.connect()?;
        self.stop.watch(self.number, &client)?;
        self.client = Some(client);
        for tag in self.by_arrival() {
            self.send(tag)?;
        }
        Ok(())
    }

    /// All queues go through the same; one is enough to hear of it.
    fn say(&self, what: &str) {
        if self.number == 0 {
            self.target.say(what);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn desc(op_flags: u32, nr_sectors: u32, start_sector: u64) -> sys::ublksrv_io_desc {
        sys::ublksrv_io_desc { op_flags, nr_sectors, start_sector, ..Default::default() }
    }

    #[test]
    fn requests_of_the_kernel_in_bytes() {
        let write = Waiting::new(7, &desc(sys::UBLK_IO_OP_WRITE | sys::UBLK_IO_F_FUA, 8, 16)).unwrap();
        assert_eq!((write.command, write.offset, write.len, write.fua), (Command::Write, 8192, 4096, true));
        assert_eq!(write.result(), 4096);
        assert!(
            matches!(write.request(&[1; 8192]), Request::Write { offset: 8192, data, fua: true } if data.len() == 4096)
        );
        let trim = Waiting::new(8, &desc(sys::UBLK_IO_OP_DISCARD, 1 << 22, 1 << 34)).unwrap();
        assert_eq!((trim.offset, trim.len, trim.result()), (8 << 40, 2 << 30, 0));
        let zero = Waiting::new(9, &desc(sys::UBLK_IO_OP_WRITE_ZEROES | sys::UBLK_IO_F_NOUNMAP, 8, 0)).unwrap();
        assert_eq!(zero.command, Command::WriteZeroes { no_hole: true });
        assert!(Waiting::new(0, &desc(sys::UBLK_IO_OP_READ, 1 << 23, 0)).is_none(), "4 GiB");
        assert!(Waiting::new(0, &desc(sys::UBLK_IO_OP_WRITE_SAME, 8, 0)).is_none());
    }
}
