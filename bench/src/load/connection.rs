//! One connection of the load generator: its slots, and the bytes going each way.

use std::collections::VecDeque;
use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use blockd::export::nbd::proto;
use blockd::export::nvme::client::{Options, Queue, enable};
use rand::rngs::SmallRng;
use rand::{Rng, RngCore};
use zerocopy::IntoBytes;

use super::wire::{Ask, Event, Head, Wire};
use super::{Endpoint, Pattern, Pool, Workload};

/// Bytes asked of the kernel at a time.
const RECEIVE_BYTES: usize = 1 << 20;
/// Pieces handed to the kernel in one send.
const PIECES_MAX: usize = 64;

trait Stream: Read + Write + AsRawFd {}
impl<T: Read + Write + AsRawFd> Stream for T {}

/// A request in flight, and the room for the next one.
struct Slot<'a> {
    head: Head,
    /// Follows the head.
    payload: &'a [u8],
    /// Sent when the server wants it.
    later: &'a [u8],
    /// When its operation began; a flush belongs to the operation of its write.
    began: Instant,
    ask: Ask,
}

/// See the module.
pub struct Connection<'a> {
    wire: Wire,
    /// A controller lives as long as its admin queue.
    _admin: Option<Queue>,
    stream: Box<dyn Stream>,
    workload: Workload,
    range: Range<u64>,
    next_sequential: u64,
    pool: &'a Pool,
    rng: SmallRng,
    slots: Vec<Slot<'a>>,
    in_flight: usize,
    /// Slots whose request is not sent completely; `sent` bytes of the first are.
    unsent: VecDeque<usize>,
    sent: usize,
    inbox: Vec<u8>,
    filled: usize,
    /// The read whose data is arriving and whether that ends it, and the bytes still to be dropped.
    arriving: Option<(usize, bool)>,
    dropping: usize,
    ready: bool,
}

impl<'a> Connection<'a> {
    /// Connects and negotiates.
    pub fn open(
        endpoint: &Endpoint,
        export: &str,
        workload: &Workload,
        range: Range<u64>,
        pool: &'a Pool,
        rng: SmallRng,
        blocking: bool,
    ) -> io::Result<Self> {
        let mut wire = Wire::Nbd;
        let mut controller = None;
        let mut stream: Box<dyn Stream> = match endpoint {
            Endpoint::Unix(path) => {
                let mut stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(Duration::from_secs(30)))?;
                negotiate(&mut stream, export)?;
                stream.set_nonblocking(!blocking)?;
                Box::new(stream)
            }
            Endpoint::Tcp(addr) => {
                let mut stream = TcpStream::connect(addr)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(Duration::from_secs(30)))?;
                negotiate(&mut stream, export)?;
                stream.set_nonblocking(!blocking)?;
                Box::new(stream)
            }
            Endpoint::Nvme(addr) => {
                wire = Wire::Nvme;
                let options = Options { timeout: Some(Duration::from_secs(30)), ..Options::default() };
                let (mut admin, cntlid) = Queue::connect(*addr, export, 0, 0xffff, &options)?;
                enable(&mut admin)?;
                let (queue, _) = Queue::connect(*addr, export, 1, cntlid, &options)?;
                controller = Some(admin);
                let stream = queue.into_stream()?;
                stream.set_read_timeout(Some(Duration::from_secs(30)))?;
                stream.set_nonblocking(!blocking)?;
                Box::new(stream)
            }
        };
        stream.flush()?;
        let slots = (0..workload.depth)
            .map(|_| Slot { head: Head::NONE, payload: &[], later: &[], began: Instant::now(), ask: Ask::Flush })
            .collect();
        Ok(Self {
            wire,
            _admin: controller,
            stream,
            workload: *workload,
            next_sequential: range.start,
            range,
            pool,
            rng,
            slots,
            in_flight: 0,
            unsent: VecDeque::with_capacity(workload.depth),
            sent: 0,
            inbox: vec![0; RECEIVE_BYTES],
            filled: 0,
            arriving: None,
            dropping: 0,
            ready: true,
        })
    }

    pub fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Whether anything is unanswered.
    pub fn busy(&self) -> bool {
        self.in_flight > 0
    }

    /// Whether requests wait for room in the socket.
    pub fn unsent(&self) -> bool {
        !self.unsent.is_empty()
    }

    pub fn ready(&self) -> bool {
        self.ready
    }

    pub fn set_ready(&mut self, ready: bool) {
        self.ready = ready;
    }

    /// Fills all slots, as far as `budget` (operations that may still begin) allows.
    pub fn start(&mut self, budget: &mut u64) {
        let now = Instant::now();
        for slot in 0..self.slots.len() {
            self.begin(slot, now, budget);
        }
    }

    fn begin(&mut self, slot: usize, now: Instant, budget: &mut u64) {
        if *budget == 0 {
            return;
        }
        *budget -= 1;
        let len = self.workload.block_bytes;
        let offset = match self.workload.pattern {
            Pattern::SequentialRead | Pattern::SequentialWrite => {
                let offset = self.next_sequential;
                self.next_sequential += u64::from(len);
                if self.next_sequential + u64::from(len) > self.range.end {
                    self.next_sequential = self.range.start;
                }
                offset
            }
            _ => {
                let blocks = (self.range.end - self.range.start) / u64::from(len);
                self.range.start + self.rng.random_range(0..blocks) * u64::from(len)
            }
        };
        let ask = if self.workload.pattern.writes() { Ask::Write } else { Ask::Read };
        let pool = self.pool;
        let payload: &'a [u8] = if ask == Ask::Write { pool.payload(self.rng.next_u64(), len as usize) } else { &[] };
        let (head, at_once) = self.wire.head(ask, slot, offset, len);
        let (payload, later) = if at_once { (payload, &[][..]) } else { (&[][..], payload) };
        self.slots[slot] = Slot { head, payload, later, began: now, ask };
        self.in_flight += 1;
        self.unsent.push_back(slot);
    }

    /// Ends the slot's operation and begins its next; the latency of the ended one.
    fn finish(&mut self, slot: usize, now: Instant, budget: &mut u64) -> Duration {
        let latency = now.duration_since(self.slots[slot].began);
        self.in_flight -= 1;
        self.begin(slot, now, budget);
        latency
    }

    /// Sends as much as the socket takes; all of it if the socket blocks.
    pub fn send(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            let mut pieces = [IoSlice::new(&[]); PIECES_MAX];
            let mut count = 0;
            let mut skip = self.sent;
            for slot in self.unsent.iter().take(PIECES_MAX / 2).map(|slot| &self.slots[*slot]) {
                let header = slot.head.bytes();
                pieces[count] = IoSlice::new(&header[skip.min(header.len())..]);
                pieces[count + 1] = IoSlice::new(&slot.payload[skip.saturating_sub(header.len())..]);
                count += 2;
                skip = 0;
            }
            match self.stream.write_vectored(&pieces[..count]) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => self.sent += sent,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
            while let Some(&first) = self.unsent.front() {
                let len = self.slots[first].head.bytes().len() + self.slots[first].payload.len();
                if self.sent < len {
                    break;
                }
                self.sent -= len;
                self.unsent.pop_front();
            }
        }
        Ok(())
    }

    /// Receives what is there; waits for something if the socket blocks.
    pub fn receive(&mut self) -> io::Result<()> {
        loop {
            match self.stream.read(&mut self.inbox[self.filled..]) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    self.filled += count;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }

    /// Handles the replies received: `done` is told the latency of each finished operation, and its slot begins the
    /// next one.
    pub fn advance(&mut self, now: Instant, budget: &mut u64, mut done: impl FnMut(Duration)) -> io::Result<()> {
        let mut at = 0;
        loop {
            if let Some((slot, ends)) = self.arriving {
                let dropped = self.dropping.min(self.filled - at);
                self.dropping -= dropped;
                at += dropped;
                if self.dropping > 0 {
                    break;
                }
                self.arriving = None;
                if ends {
                    done(self.finish(slot, now, budget));
                }
            }
            let (slots, len) = (&self.slots, self.workload.block_bytes as usize);
            let reads = |slot: usize| slots.get(slot).and_then(|slot| (slot.ask == Ask::Read).then_some(len));
            let Some((event, used)) = self.wire.event(&self.inbox[at..self.filled], reads)? else {
                break;
            };
            at += used;
            let (Event::Done(slot) | Event::Data(slot, ..) | Event::Wanted(slot, _)) = event;
            if slot >= self.slots.len() {
                return Err(io::Error::new(io::ErrorKind::InvalidData, "an answer to no request"));
            }
            match event {
                Event::Data(slot, len, ends) => {
                    self.arriving = Some((slot, ends));
                    self.dropping = len;
                }
                Event::Wanted(slot, head) => {
                    let request = &mut self.slots[slot];
                    request.head = head;
                    request.payload = std::mem::take(&mut request.later);
                    self.unsent.push_back(slot);
                }
                Event::Done(slot)
                    if self.slots[slot].ask == Ask::Write && self.workload.pattern == Pattern::RandomWriteFlush =>
                {
                    let request = &mut self.slots[slot];
                    request.ask = Ask::Flush;
                    request.head = self.wire.head(Ask::Flush, slot, 0, 0).0;
                    request.payload = &[];
                    self.unsent.push_back(slot);
                }
                Event::Done(slot) => done(self.finish(slot, now, budget)),
            }
        }
        self.inbox.copy_within(at..self.filled, 0);
        self.filled -= at;
        Ok(())
    }
}

/// Fixed newstyle, no structured replies.
fn negotiate(stream: &mut (impl Read + Write), export: &str) -> io::Result<()> {
    let bad = |what: &str| io::Error::new(io::ErrorKind::InvalidData, what.to_owned());
    let mut greeting = [0; proto::Greeting::SIZE];
    stream.read_exact(&mut greeting)?;
    let query = proto::InfoQuery { name: export.to_owned(), wanted: vec![] }.encode();
    let flags = proto::handshake::FIXED_NEWSTYLE | proto::handshake::NO_ZEROES;
    stream.write_all(&u32::from(flags).to_be_bytes())?;
    stream.write_all(proto::OptionHeader::new(proto::option::GO, query.len() as u32).as_bytes())?;
    stream.write_all(&query)?;
    loop {
        let mut head = [0; proto::OptionReply::SIZE];
        stream.read_exact(&mut head)?;
        let (head, _) = proto::take::<proto::OptionReply>(&head).ok_or_else(|| bad("short option reply"))?;
        head.check().map_err(|error| bad(&error.to_string()))?;
        let mut data = vec![0; head.len.get() as usize];
        stream.read_exact(&mut data)?;
        if head.is_error() {
            let message = String::from_utf8_lossy(&data);
            return Err(bad(&format!("the server refuses export {export:?}: {message}")));
        }
        if head.kind.get() == proto::option_reply::ACK {
            return Ok(());
        }
    }
}
