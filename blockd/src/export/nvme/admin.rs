//! The admin queue of a controller: it configures the controller, describes it and its namespace, and tells the host
//! what changes. It lives on tokio; while nothing is asked it costs a timer.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::Instant;
use zerocopy::IntoBytes;

use super::command::{Command, FABRICS, Status, admin, fabrics, property};
use super::controller::Controller;
use super::features::{self, Features};
use super::queue::{Capsule, Queue, QueueError};
use super::server::{Found, Subsystem, Target};
use super::{IO_QUEUES_MAX, NSID, NSID_ALL, QUEUE_ENTRIES_MAX, VERSION, discovery, identify, log_page};

/// Asynchronous event requests kept at once.
pub const EVENTS_MAX: usize = 8;
/// Between two looks at what changed without anybody saying so.
const LOOK: Duration = Duration::from_secs(5);

/// What the controller is of.
pub enum Subject {
    /// The discovery subsystem.
    Discovery,
    /// A volume, as it was when the host connected.
    Volume(Box<Subsystem>),
}

/// Bits of CC and CSTS.
mod bits {
    pub const ENABLE: u32 = 1;
    pub const SHUTDOWN: u32 = 3 << 14;
    pub const READY: u32 = 1;
    pub const SHUTDOWN_COMPLETE: u32 = 2 << 2;
}

/// Asynchronous events: type, information and log page, as they stand in a completion.
mod event {
    use super::log_page::id;

    const NOTICE: u64 = 2;
    const IO_COMMAND_SET: u64 = 6;
    pub const NAMESPACES: u64 = NOTICE | (id::CHANGED_NAMESPACES as u64) << 16;
    pub const DISCOVERY: u64 = NOTICE | 0xf0 << 8 | (id::DISCOVERY as u64) << 16;
    pub const RESERVATION: u64 = IO_COMMAND_SET | (id::RESERVATION as u64) << 16;
}

/// Ends the controller when its admin queue is gone, however that came about.
struct Ending {
    target: Arc<Target>,
    controller: Arc<Controller>,
    /// Where its I/O queues are.
    reactor: Option<crate::reactor::ReactorHandle>,
}

impl Drop for Ending {
    fn drop(&mut self) {
        self.controller.end();
        let (target, controller) = (self.target.clone(), self.controller.clone());
        let reactor = self.reactor.take();
        let last = async move {
            if let Some(reactor) = reactor {
                reactor.drop_group(controller.group).await;
            }
            target.controllers.remove(&controller);
        };
        // Without a runtime the process ends, and all with it.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(last);
        }
    }
}

/// See the module.
pub struct Admin {
    queue: Queue,
    ending: Ending,
    subject: Subject,
    local: SocketAddr,
    cc: u32,
    features: Features,
    last_heard: Instant,
    /// Identifiers of commands that wait for an event.
    waiting: VecDeque<u16>,
    /// What the host was last told of, or found out: whether the volume is open and its size, or the entries.
    seen: Seen,
    /// Events told since whose log page was not read: they are not told again before.
    masked: Masked,
    namespace_changed: bool,
    entries_changed: bool,
    notices: u64,
    generation: u64,
    was_reset: bool,
}

#[derive(Clone, PartialEq, Eq)]
enum Seen {
    Size(Option<u64>),
    Entries(Vec<u8>),
}

#[derive(Default)]
struct Masked {
    namespaces: bool,
    discovery: bool,
    reservation: bool,
}

impl Admin {
    pub(super) fn new(
        queue: Queue,
        controller: Arc<Controller>,
        subject: Subject,
        target: Arc<Target>,
        local: SocketAddr,
        keep_alive_ms: u32,
    ) -> Self {
        let reactor = match &subject {
            Subject::Discovery => None,
            Subject::Volume(subsystem) => {
                subsystem.namespace.watch(&controller.events);
                Some(subsystem.reactor.clone())
            }
        };
        let seen = match &subject {
            Subject::Discovery => Seen::Entries(Vec::new()),
            Subject::Volume(subsystem) => Seen::Size(Some(subsystem.size)),
        };
        let mut admin = Self {
            queue,
            ending: Ending { target, controller, reactor },
            subject,
            local,
            cc: 0,
            features: Features { keep_alive_ms, ..Features::default() },
            last_heard: Instant::now(),
            waiting: VecDeque::new(),
            seen,
            masked: Masked::default(),
            namespace_changed: false,
            entries_changed: false,
            was_reset: false,
            notices: 0,
            generation: 1,
        };
        admin.seen = admin.look();
        admin
    }

    pub(super) fn queue(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Its controller.
    pub fn controller(&self) -> &Arc<Controller> {
        &self.ending.controller
    }

    /// Serves the queue until the host leaves, falls silent, or the controller ends otherwise.
    pub(super) async fn run(mut self, target: &Target) {
        let controller = self.ending.controller.clone();
        let (peer, subsystem) = (controller.peer.clone(), controller.subsystem.clone());
        match self.serve(target).await {
            Ok(why) => tracing::info!(peer, subsystem, cntlid = controller.cntlid, "NVMe/TCP host gone: {why}"),
            Err(QueueError::Io(error)) => {
                tracing::info!(peer, subsystem, cntlid = controller.cntlid, "NVMe/TCP host gone: {error}");
            }
            Err(error) => {
                tracing::warn!(peer, subsystem, cntlid = controller.cntlid, "NVMe/TCP host dropped: {error}");
            }
        }
    }

    async fn serve(&mut self, target: &Target) -> Result<&'static str, QueueError> {
        let subsystems = target.subsystems.clone();
        let controller = self.ending.controller.clone();
        loop {
            let changed = subsystems.changes().next();
            self.tell_events();
            self.queue.flush().await?;
            let look = Instant::now() + LOOK;
            let until = self.expires().map_or(look, |at| at.min(look));
            tokio::select! {
                capsule = self.queue.next() => match capsule? {
                    Some(capsule) => {
                        self.last_heard = Instant::now();
                        self.command(&capsule);
                    }
                    None => return Ok("it disconnected"),
                },
                () = changed => {}
                () = controller.wake.notified() => {}
                () = tokio::time::sleep_until(until) => {}
            }
            if controller.is_ending() {
                return Ok("a new connection takes its place");
            }
            if self.expires().is_some_and(|at| Instant::now() >= at) {
                return Ok("nothing was heard of it within its keep-alive time");
            }
        }
    }

    /// When a silent host is given up: half as much again as it said, for hosts that are slow.
    fn expires(&self) -> Option<Instant> {
        let timeout = self.features.keep_alive_ms;
        (timeout > 0).then(|| self.last_heard + Duration::from_millis(u64::from(timeout) * 3 / 2))
    }

    /// The volume as it is now, if it is open.
    fn volume(&self) -> Option<Box<Subsystem>> {
        let Subject::Volume(subsystem) = &self.subject else { return None };
        match self.ending.target.subsystems.find(&subsystem.nqn) {
            Found::Open(now) if now.id == subsystem.id => Some(now),
            _ => None,
        }
    }

    fn look(&self) -> Seen {
        let target = &self.ending.target;
        match &self.subject {
            Subject::Discovery => {
                let host = &self.ending.controller.host;
                let entries = discovery::entries(target.subsystems.as_ref(), &target.listens, self.local, host);
                Seen::Entries(entries)
            }
            // A volume that is only closed comes back: to say that its namespace is gone would make hosts drop it with all
            // that is mounted.
            Subject::Volume(known) => match target.subsystems.find(&known.nqn) {
                Found::Open(now) if now.id == known.id => Seen::Size(Some(now.size)),
                Found::Unknown => Seen::Size(None),
                _ => self.seen.clone(),
            },
        }
    }

    /// Answers waiting event requests with what is new.
    fn tell_events(&mut self) {
        const NAMESPACES: u32 = 1 << 8;
        const DISCOVERY: u32 = 1 << 31;
        let now = self.look();
        if now != self.seen {
            self.seen = now;
            match self.subject {
                Subject::Discovery => {
                    self.generation += 1;
                    self.entries_changed = true;
                }
                Subject::Volume(_) => self.namespace_changed = true,
            }
        }
        let changed = self.namespace_changed && self.features.events & NAMESPACES != 0;
        if changed && !self.masked.namespaces && self.tell(event::NAMESPACES) {
            self.masked.namespaces = true;
        }
        let discovery = self.entries_changed && self.features.events & DISCOVERY != 0;
        if discovery && !self.masked.discovery && self.tell(event::DISCOVERY) {
            self.masked.discovery = true;
            self.entries_changed = false;
        }
        let notices = self.controller().events.waiting() > 0;
        if notices && !self.masked.reservation && self.tell(event::RESERVATION) {
            self.masked.reservation = true;
        }
    }

    fn tell(&mut self, event: u64) -> bool {
        let Some(cid) = self.waiting.pop_front() else { return false };
        self.queue.complete(cid, Status::SUCCESS, event);
        true
    }

    fn command(&mut self, capsule: &Capsule) {
        let command = &capsule.command;
        let cid = command.cid.get();
        if !capsule.intact {
            return self.queue.complete(cid, Status::TRANSPORT, 0);
        }
        let done = match command.opcode {
            FABRICS => self.fabrics(command),
            _ if self.cc & bits::ENABLE == 0 => Err(Status::SEQUENCE_ERROR),
            admin::KEEP_ALIVE => Ok(Answer::Result(0)),
            admin::IDENTIFY => self.identify(command).map(Answer::Data),
            admin::GET_LOG_PAGE => self.log_page(command).map(Answer::Data),
            admin::SET_FEATURES => self.set_features(command).map(Answer::Result),
            admin::GET_FEATURES => self.get_features(command),
            admin::ASYNC_EVENT if self.waiting.len() >= EVENTS_MAX => Err(Status::ASYNC_LIMIT),
            admin::ASYNC_EVENT => {
                self.waiting.push_back(cid);
                return;
            }
            // Bit 0: not aborted. What is with the device ends by itself; hosts then end the connection.
            admin::ABORT => Ok(Answer::Result(1)),
            _ => Err(Status::INVALID_OPCODE),
        };
        match done {
            Ok(Answer::Result(result)) => self.queue.complete(cid, Status::SUCCESS, result),
            Ok(Answer::Data(data)) => self.queue.answer(command, &data),
            Err(status) => self.queue.complete(cid, status, 0),
        }
    }

    fn fabrics(&mut self, command: &Command) -> Result<Answer, Status> {
        let eight_bytes = command.dword(10) & 7 == 1;
        match command.fabrics_type() {
            fabrics::PROPERTY_GET => match command.property() {
                property::CAP if eight_bytes => Ok(Answer::Result(capabilities())),
                property::VS if !eight_bytes => Ok(Answer::Result(VERSION.into())),
                property::CC if !eight_bytes => Ok(Answer::Result(self.cc.into())),
                property::CSTS if !eight_bytes => {
                    let ready = if self.cc & bits::ENABLE != 0 { bits::READY } else { 0 };
                    let shutdown = if self.cc & bits::SHUTDOWN != 0 { bits::SHUTDOWN_COMPLETE } else { 0 };
                    Ok(Answer::Result((ready | shutdown).into()))
                }
                _ => Err(Status::INVALID_FIELD),
            },
            fabrics::PROPERTY_SET => match command.property() {
                property::CC if !eight_bytes => self.configure(command.dword(12)),
                _ => Err(Status::INVALID_FIELD),
            },
            fabrics::CONNECT => Err(Status::SEQUENCE_ERROR),
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn configure(&mut self, cc: u32) -> Result<Answer, Status> {
        const COMMAND_SET: u32 = 7 << 4;
        const PAGE_SIZE: u32 = 0xf << 7;
        let enable = cc & bits::ENABLE != 0;
        if enable && cc & (COMMAND_SET | PAGE_SIZE) != 0 {
            return Err(Status::INVALID_FIELD);
        }
        if enable && self.was_reset {
            // After a reset a host begins anew, with another controller.
            return Err(Status::SEQUENCE_ERROR);
        }
        let was_enabled = self.cc & bits::ENABLE != 0;
        self.cc = cc;
        if was_enabled && !enable {
            // A reset ends the I/O queues, and what waits for events.
            self.was_reset = true;
            self.waiting.clear();
            if let Some(reactor) = &self.ending.reactor {
                let (reactor, group) = (reactor.clone(), self.controller().group);
                tokio::spawn(async move { reactor.drop_group(group).await });
            }
        }
        let works = enable && cc & bits::SHUTDOWN == 0;
        self.controller().enabled.store(works, Ordering::SeqCst);
        Ok(Answer::Result(0))
    }

    fn identify(&mut self, command: &Command) -> Result<Vec<u8>, Status> {
        let (cns, nsid) = (command.dword(10) as u8, command.nsid.get());
        let command_set = (command.dword(11) >> 24) as u8;
        let cntlid = self.controller().cntlid;
        let Subject::Volume(known) = &self.subject else {
            return match cns {
                0x01 => Ok(identify::discovery(cntlid).as_bytes().to_vec()),
                _ => Err(Status::INVALID_FIELD),
            };
        };
        let there = matches!(self.seen, Seen::Size(Some(_)));
        let namespace = || match nsid {
            NSID if there => Ok(Some(self.volume().unwrap_or_else(|| known.clone()))),
            0 | NSID_ALL => Err(Status::INVALID_NAMESPACE),
            _ if nsid > super::NAMESPACES_MAX => Err(Status::INVALID_NAMESPACE),
            // Not active: all zeroes.
            _ => Ok(None),
        };
        match cns {
            0x00 => Ok(match namespace()? {
                Some(subsystem) => identify::namespace(&subsystem).as_bytes().to_vec(),
                None => vec![0; 4096],
            }),
            0x01 => Ok(identify::controller(known, cntlid).as_bytes().to_vec()),
            0x02 | 0x07 if nsid < 0xffff_fffe => Ok(identify::active_namespaces(nsid, there && command_set == 0)),
            0x03 => match namespace()? {
                Some(subsystem) => Ok(identify::descriptors(&subsystem)),
                None => Err(Status::INVALID_NAMESPACE),
            },
            0x05 if command_set == 0 => namespace().map(|_| vec![0; 4096]),
            0x06 if command_set == 0 => Ok(identify::command_set_controller()),
            0x12 | 0x13 => {
                let of = self.ending.target.controllers.of(&known.nqn);
                let from = (command.dword(10) >> 16) as u16;
                Ok(identify::controllers(of.iter().map(|controller| controller.cntlid).collect(), from))
            }
            _ => Err(Status::INVALID_FIELD),
        }
    }

    fn log_page(&mut self, command: &Command) -> Result<Vec<u8>, Status> {
        use log_page::id;
        let page = command.dword(10) as u8;
        let keep_event = command.dword(10) & 1 << 15 != 0;
        let dwords = u64::from(command.dword(11) & 0xffff) << 16 | u64::from(command.dword(10) >> 16);
        let offset = u64::from(command.dword(13)) << 32 | u64::from(command.dword(12));
        let whole = match (&self.subject, page) {
            (Subject::Discovery, id::DISCOVERY) => {
                let Seen::Entries(entries) = &self.seen else { return Err(Status::INTERNAL) };
                if !keep_event {
                    self.masked.discovery = false;
                }
                discovery::page(entries, self.generation)
            }
            (Subject::Discovery, _) | (Subject::Volume(_), id::DISCOVERY) => return Err(Status::INVALID_LOG_PAGE),
            (_, id::ERRORS) => log_page::errors(),
            (_, id::HEALTH) => log_page::health(),
            (_, id::FIRMWARE) => log_page::firmware(),
            (Subject::Volume(known), id::EFFECTS) => log_page::effects(known.read_only),
            (_, id::CHANGED_NAMESPACES) => {
                let page = log_page::changed_namespaces(self.namespace_changed);
                if !keep_event {
                    (self.namespace_changed, self.masked.namespaces) = (false, false);
                }
                page
            }
            (_, id::RESERVATION) => {
                let (notice, left) = self.controller().events.take();
                self.notices += u64::from(notice.is_some());
                if !keep_event {
                    self.masked.reservation = false;
                }
                log_page::reservation(notice, self.notices, left)
            }
            _ => return Err(Status::INVALID_LOG_PAGE),
        };
        if !offset.is_multiple_of(4) || offset > whole.len() as u64 {
            return Err(Status::INVALID_FIELD);
        }
        let room = command.data_out()?;
        let len = ((dwords + 1) * 4).min(u64::from(room)).min(u64::from(super::TRANSFER_MAX)) as usize;
        let mut part = whole[offset as usize..].to_vec();
        part.resize(len, 0);
        Ok(part)
    }

    fn set_features(&mut self, command: &Command) -> Result<u64, Status> {
        use features::id;
        const SAVE: u32 = 1 << 31;
        let (feature, value) = (command.dword(10) as u8, command.dword(11));
        if command.dword(10) & SAVE != 0 {
            return Err(Status::NOT_SAVEABLE);
        }
        let discovery = matches!(self.subject, Subject::Discovery);
        match feature {
            id::EVENTS => self.features.events = value,
            id::KEEP_ALIVE => self.features.keep_alive_ms = value,
            _ if discovery => return Err(Status::INVALID_FIELD),
            id::QUEUES => {
                if value as u16 == 0xffff || value >> 16 == 0xffff {
                    return Err(Status::INVALID_FIELD);
                }
                let wanted = (value & 0xffff).max(value >> 16) + 1;
                let granted = wanted.min(IO_QUEUES_MAX.into());
                self.controller().queues_granted.store(granted, Ordering::SeqCst);
                return Ok(self.queues().into());
            }
            id::RESERVATION_NOTICES => {
                self.features.unwanted_notices = value;
                self.controller().events.mask(value);
            }
            id::ERROR_RECOVERY => self.features.error_recovery = value,
            // The cache is what answers before a flush; it cannot be turned off, and commands ask for FUA instead.
            id::WRITE_CACHE if value & 1 == 1 => {}
            id::ARBITRATION | id::POWER | id::TEMPERATURE => {}
            // Of the host, and settled by its Connect command.
            id::HOST_ID => return Err(Status::SEQUENCE_ERROR),
            _ => return Err(Status::INVALID_FIELD),
        }
        Ok(0)
    }

    /// Submission and completion queues, both 0's based.
    fn queues(&self) -> u32 {
        let granted = self.controller().queues_granted.load(Ordering::SeqCst) - 1;
        granted << 16 | granted
    }

    fn get_features(&self, command: &Command) -> Result<Answer, Status> {
        let persists = match &self.subject {
            Subject::Volume(subsystem) => subsystem.namespace.reservations().persists,
            Subject::Discovery => false,
        };
        if command.dword(10) as u8 == features::id::HOST_ID {
            return Ok(Answer::Data(self.controller().host.id.to_vec()));
        }
        features::get(&self.features, command, self.queues(), persists).map(|value| Answer::Result(value.into()))
    }
}

enum Answer {
    Result(u64),
    Data(Vec<u8>),
}

/// Queue entries, contiguous queues, ready within 7.5 s, the NVM command set.
fn capabilities() -> u64 {
    u64::from(QUEUE_ENTRIES_MAX - 1) | 1 << 16 | 15 << 24 | 1 << 37
}
