//! The loop of a reactor thread.

use std::os::fd::OwnedFd;
use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures::FutureExt;
use tokio::sync::oneshot;

use super::conn::Conn;
use super::device::Device;
use super::handle::{ConnectionInfo, DeviceKey, LogShape, Message, ReactorOptions};
use super::inbox::{Inbox, Sender};
use super::log_io::RingLog;
use super::log_thread::LogThread;
use super::ring::{Event, Op, Ring};
use super::session::{Client, Task};
use super::slab::Slab;
use super::{now_us, wall_ms};
use crate::volume::{Completion, Effect, Job, LogIo, LogOp};

/// How long clients of a closing device may take to collect their answers.
const CLOSE_GRACE_US: u64 = 5_000_000;
/// A token has 16 bits for the connection.
const MAX_CONNECTIONS: usize = 1 << 16;

/// A device and what the reactor knows of it.
struct Managed {
    generation: u32,
    device: Box<dyn Device>,
    /// Waits in `Reactor::touched`.
    touched: bool,
    /// Log operations that run.
    log_ops: usize,
    /// Its answer of [`Device::deadline_us`] after the last turn.
    deadline_us: Option<u64>,
    closing: Option<Closing>,
}

struct Closing {
    waiters: Vec<oneshot::Sender<()>>,
    /// When clients that have not left are dropped.
    drop_clients_us: u64,
    /// The device was told.
    told: bool,
}

/// The state of a reactor thread.
pub(super) struct Reactor {
    ring: Ring,
    inbox: Inbox,
    /// Where the eventfd's counter is read to.
    bell_counter: Box<u64>,
    bell_armed: bool,
    sender: Sender,
    runtime: tokio::runtime::Handle,
    ring_log: RingLog,
    log_thread: Option<LogThread>,
    /// Log operations that run, of all devices.
    log_ops: usize,
    conns: Slab<Conn>,
    devices: Slab<Managed>,
    next_generation: u32,
    /// Connections to look at in this turn.
    runnable: Vec<u32>,
    /// Connections looked at in this turn.
    active: Vec<u32>,
    /// Devices to advance in this turn.
    touched: Vec<u32>,
    events: Vec<Event>,
    /// Groups of which no connection is to be left.
    dropping: Vec<(u64, oneshot::Sender<()>)>,
    stopping: Option<oneshot::Sender<()>>,
}

/// Ends the process if the reactor panics: memory in flight must not be freed, and volumes without their reactor
/// could only hang. The log makes a restart safe.
struct AbortOnUnwind;

impl Drop for AbortOnUnwind {
    fn drop(&mut self) {
        if std::thread::panicking() {
            std::process::abort();
        }
    }
}

impl Reactor {
    pub fn new(
        options: ReactorOptions,
        runtime: tokio::runtime::Handle,
        sender: Sender,
        inbox: Inbox,
    ) -> std::io::Result<Self> {
        let log_thread = match options.log_shape {
            LogShape::Ring => None,
            LogShape::Thread => Some(LogThread::spawn(sender.clone())?),
        };
        Ok(Self {
            ring: Ring::new()?,
            inbox,
            bell_counter: Box::new(0),
            bell_armed: false,
            sender,
            runtime,
            ring_log: RingLog::new(),
            log_thread,
            log_ops: 0,
            conns: Slab::new(),
            devices: Slab::new(),
            next_generation: 0,
            runnable: Vec::new(),
            active: Vec::new(),
            touched: Vec::new(),
            events: Vec::new(),
            dropping: Vec::new(),
            stopping: None,
        })
    }

    /// Runs until told to stop.
    pub fn run(mut self) {
        let _guard = AbortOnUnwind;
        loop {
            if self.stopping.is_some() && self.conns.len() == 0 && self.log_ops == 0 {
                break;
            }
            self.arm_bell();
            // Completions that a hand-over brought along must not wait for more.
            let entered = if self.events.is_empty() { self.ring.wait(self.time_to_wait()) } else { self.ring.submit() };
            if let Err(error) = entered {
                panic!("io_uring wait failed: {error}");
            }
            self.turn();
        }
        // The kernel still holds the bell's counter.
        self.sender.ring();
        while self.ring.outstanding() > 0 {
            if self.events.is_empty() && self.ring.wait(None).is_err() {
                std::process::abort();
            }
            self.events.clear();
            self.ring.collect(&mut self.events);
        }
        if let Some(stopped) = self.stopping.take() {
            drop(self);
            let _ = stopped.send(());
        }
    }

    fn turn(&mut self) {
        let mut events = std::mem::take(&mut self.events);
        self.ring.collect(&mut events);
        let (now, wall) = (now_us(), wall_ms());
        for (_, managed) in self.devices.iter_mut() {
            managed.device.tick(now, wall);
        }
        for event in events.drain(..) {
            self.handle_event(event);
        }
        self.events = events;
        while let Some(message) = self.inbox.next() {
            self.handle_message(message);
        }
        let now = now_us();
        self.touch_due(now);
        // Completions let busy connections read on, which gives the devices more to do.
        loop {
            while !self.runnable.is_empty() || !self.touched.is_empty() {
                self.parse_runnable();
                self.advance_touched(now);
            }
            if !self.ring_log.has_fresh() {
                break;
            }
            self.hand_over();
        }
        for index in std::mem::take(&mut self.active) {
            if let Some(conn) = self.conns.get_mut(index) {
                conn.start_io(&mut self.ring, index);
                if conn.finished() {
                    if let Some(why) = conn.session.broken() {
                        tracing::info!(peer = conn.peer, export = conn.export, "client disconnected: {why}");
                    }
                    tracing::debug!(peer = conn.peer, export = conn.export, "client left");
                    self.conns.remove(index);
                }
            }
        }
        if !self.dropping.is_empty() {
            let conns = &self.conns;
            self.dropping.retain(|(group, _)| conns.iter().any(|(_, conn)| conn.group == *group));
        }
        self.close_devices(now);
    }

    /// Submits the log's writes, so that those the kernel takes on can be acknowledged in this turn.
    fn hand_over(&mut self) {
        if let Err(error) = self.ring.submit() {
            panic!("io_uring refuses submissions: {error}");
        }
        if self.ring.queued() > 0 {
            // The kernel was too busy to take them all; their completions will say that they are written.
            self.ring_log.handed(&[]);
            return;
        }
        let before = self.events.len();
        self.ring.collect(&mut self.events);
        for (key, id) in self.ring_log.handed(&self.events[before..]) {
            if let Some(managed) = managed(&mut self.devices, key) {
                managed.device.log_handed(id);
                self.touch(key.index);
            }
        }
    }

    fn handle_event(&mut self, event: Event) {
        match event.op {
            Op::Recv(index) => {
                let Some(conn) = self.conns.get_mut(index) else {
                    return;
                };
                let key = conn.device;
                let device = managed(&mut self.devices, key).map(|managed| managed.device.as_mut());
                conn.received(event.result, event.more_to_receive, device);
                self.touch(key.index);
                self.queue(index);
            }
            Op::Send(index) => {
                if let Some(conn) = self.conns.get_mut(index) {
                    conn.sent(event.result);
                    self.queue(index);
                }
            }
            Op::Log(slot) => {
                if let Some((key, id, result)) = self.ring_log.completed(&mut self.ring, slot, event.result) {
                    self.log_done(key, id, result);
                }
            }
            Op::Inbox => {
                self.bell_armed = false;
                self.inbox.heard();
            }
        }
    }

    fn handle_message(&mut self, message: Message) {
        match message {
            Message::AddDevice(device, reply) => {
                let generation = self.new_generation();
                let index = self.devices.insert(Managed {
                    generation,
                    device,
                    touched: false,
                    log_ops: 0,
                    deadline_us: None,
                    closing: None,
                });
                self.touch(index);
                let _ = reply.send(DeviceKey { index, generation });
            }
            Message::WithDevice(key, visit) => match managed(&mut self.devices, key) {
                Some(managed) => {
                    visit(Some(managed.device.as_mut()));
                    self.touch(key.index);
                }
                None => visit(None),
            },
            Message::AddConnection(fd, client, key) => self.add_connection(fd, client, key),
            Message::DropGroup(group, reply) => {
                for (_, conn) in self.conns.iter_mut().filter(|(_, conn)| conn.group == group) {
                    conn.kill();
                }
                self.queue_conns(|conn| conn.group == group);
                // Dropping it is the answer.
                self.dropping.push((group, reply));
            }
            Message::TaskDone { conn: index, generation, slot, result } => {
                if let Some(conn) = self.conns.get_mut(index)
                    && conn.generation == generation
                    && let Some(managed) = managed(&mut self.devices, conn.device)
                {
                    conn.session.task_done(slot, result, managed.device.as_mut(), &mut conn.out);
                    let device = conn.device.index;
                    self.queue(index);
                    self.touch(device);
                }
            }
            Message::CloseDevice(key, reply) => self.begin_close(key, reply),
            Message::Connections(key, reply) => {
                let of_device = self.conns.iter().filter(|(_, conn)| conn.device == key);
                let infos = of_device.map(|(_, conn)| ConnectionInfo {
                    peer: conn.peer.clone(),
                    export: conn.export.clone(),
                    in_flight: conn.session.in_flight(),
                    stats: conn.session.stats(),
                });
                let _ = reply.send(infos.collect());
            }
            Message::JobDone(key, done) => {
                if let Some(managed) = managed(&mut self.devices, key) {
                    managed.device.job_done(done);
                    self.touch(key.index);
                }
            }
            Message::LogDone(key, id, result) => self.log_done(key, id, result),
            Message::Stop(reply) => {
                for (_, conn) in self.conns.iter_mut() {
                    conn.abandon();
                }
                self.queue_conns(|_| true);
                self.stopping = Some(reply);
            }
        }
    }

    fn add_connection(&mut self, fd: OwnedFd, client: Client, key: DeviceKey) {
        let open = managed(&mut self.devices, key).is_some_and(|managed| managed.closing.is_none());
        if !open || self.stopping.is_some() || self.conns.len() >= MAX_CONNECTIONS {
            tracing::info!(peer = client.peer, export = client.export, "client turned away: the export is closing");
            return;
        }
        let generation = self.new_generation();
        // A connection carries its own index in its tokens.
        let index = self.conns.insert_with(|index| Conn::new(fd, client, key, index, generation));
        self.queue(index);
    }

    fn new_generation(&mut self) -> u32 {
        self.next_generation = self.next_generation.wrapping_add(1);
        self.next_generation
    }

    fn queue(&mut self, index: u32) {
        if let Some(conn) = self.conns.get_mut(index)
            && !std::mem::replace(&mut conn.queued, true)
        {
            self.runnable.push(index);
        }
    }

    fn queue_conns(&mut self, which: impl Fn(&Conn) -> bool) {
        let indexes: Vec<u32> = self.conns.iter().filter(|(_, conn)| which(conn)).map(|(index, _)| index).collect();
        for index in indexes {
            self.queue(index);
        }
    }

    fn touch(&mut self, index: u32) {
        if let Some(managed) = self.devices.get_mut(index)
            && !std::mem::replace(&mut managed.touched, true)
        {
            self.touched.push(index);
        }
    }

    fn touch_due(&mut self, now: u64) {
        for (index, managed) in self.devices.iter_mut() {
            if managed.deadline_us.is_some_and(|at| at <= now) && !std::mem::replace(&mut managed.touched, true) {
                self.touched.push(index);
            }
        }
    }

    fn parse_runnable(&mut self) {
        for index in std::mem::take(&mut self.runnable) {
            let Some(conn) = self.conns.get_mut(index) else {
                continue;
            };
            conn.queued = false;
            self.active.push(index);
            let key = conn.device;
            let Some(managed) = managed(&mut self.devices, key) else {
                conn.kill();
                continue;
            };
            if let Err(error) = conn.parse(managed.device.as_mut()) {
                tracing::warn!(peer = conn.peer, export = conn.export, %error, "client dropped");
                conn.hang_up();
            }
            for (slot, task) in conn.session.take_tasks() {
                spawn_task(&self.runtime, &self.sender, (index, conn.generation, slot), task);
            }
            self.touch(key.index);
        }
    }

    fn advance_touched(&mut self, now: u64) {
        for index in std::mem::take(&mut self.touched) {
            let Some(managed) = self.devices.get_mut(index) else {
                continue;
            };
            managed.touched = false;
            managed.device.advance(now);
            while let Some(effect) = self.devices.get_mut(index).and_then(|managed| managed.device.next_effect()) {
                self.carry_out(index, effect);
            }
            if let Some(managed) = self.devices.get_mut(index) {
                managed.deadline_us = managed.device.deadline_us();
            }
        }
    }

    fn carry_out(&mut self, device: u32, effect: Effect) {
        match effect {
            Effect::Complete(completion) => self.complete(device, completion),
            Effect::Log(io) => self.start_log(device, io),
            Effect::Spawn(job) => self.spawn_job(device, job),
        }
    }

    fn complete(&mut self, device: u32, completion: Completion) {
        let (index, generation) = Conn::of_token(completion.token.0);
        if let Some(conn) = self.conns.get_mut(index)
            && conn.generation == generation
            && let Some(managed) = self.devices.get_mut(device)
        {
            if completion.result.as_ref().is_err_and(|error| conn.session.hangs_up_for(error)) {
                conn.kill();
            }
            let device = managed.device.as_mut();
            conn.session.complete(completion.token.0 as u16, completion.result, device, &mut conn.out);
            self.queue(index);
        }
    }

    fn start_log(&mut self, device: u32, io: LogIo) {
        let Some(managed) = self.devices.get_mut(device) else {
            return;
        };
        let key = DeviceKey { index: device, generation: managed.generation };
        let (LogOp::Write { segment, .. } | LogOp::Sync { segment }) = io.op;
        let fd = managed.device.log_fd(segment);
        managed.log_ops += 1;
        self.log_ops += 1;
        match &self.log_thread {
            None => self.ring_log.start(&mut self.ring, key, fd, io),
            Some(thread) => thread.start(key, fd, io),
        }
    }

    fn log_done(&mut self, key: DeviceKey, id: u64, result: std::io::Result<()>) {
        self.log_ops -= 1;
        if let Some(managed) = managed(&mut self.devices, key) {
            managed.log_ops -= 1;
            managed.device.log_done(id, result);
            self.touch(key.index);
        }
    }

    fn spawn_job(&mut self, device: u32, job: Job) {
        let Some(managed) = self.devices.get(device) else {
            return;
        };
        let key = DeviceKey { index: device, generation: managed.generation };
        let sender = self.sender.clone();
        self.runtime.spawn(async move {
            match AssertUnwindSafe(job).catch_unwind().await {
                Ok(done) => {
                    sender.send(Message::JobDone(key, done));
                }
                // The device would wait for it for ever. The log makes a restart safe.
                Err(_) => std::process::abort(),
            }
        });
    }

    fn begin_close(&mut self, key: DeviceKey, reply: oneshot::Sender<()>) {
        let Some(managed) = managed(&mut self.devices, key) else {
            let _ = reply.send(());
            return;
        };
        let closing = managed.closing.get_or_insert_with(|| Closing {
            waiters: Vec::new(),
            drop_clients_us: now_us() + CLOSE_GRACE_US,
            told: false,
        });
        closing.waiters.push(reply);
        for (_, conn) in self.conns.iter_mut().filter(|(_, conn)| conn.device == key) {
            conn.session.shut_down();
            conn.leaving = true;
        }
        self.queue_conns(|conn| conn.device == key);
    }

    /// Takes closing devices a step further.
    fn close_devices(&mut self, now: u64) {
        let mut closed = Vec::new();
        for (index, managed) in self.devices.iter_mut() {
            let Some(closing) = &mut managed.closing else {
                continue;
            };
            let key = DeviceKey { index, generation: managed.generation };
            let mut clients = 0;
            for (conn_index, conn) in self.conns.iter_mut().filter(|(_, conn)| conn.device == key) {
                clients += 1;
                if now >= closing.drop_clients_us {
                    conn.abandon();
                    if !std::mem::replace(&mut conn.queued, true) {
                        self.runnable.push(conn_index);
                    }
                }
            }
            if clients == 0 && !closing.told {
                closing.told = true;
                managed.device.close();
                if !std::mem::replace(&mut managed.touched, true) {
                    self.touched.push(index);
                }
            }
            if closing.told && managed.log_ops == 0 && !managed.touched && managed.device.closed() {
                closed.push(index);
            }
        }
        for index in closed {
            if let Some(closing) = self.devices.remove(index).and_then(|managed| managed.closing) {
                for waiter in closing.waiters {
                    let _ = waiter.send(());
                }
            }
        }
    }

    fn arm_bell(&mut self) {
        if !self.bell_armed {
            self.bell_armed = true;
            // SAFETY: the counter is boxed, touched by nobody, and lives until `run` has seen every completion.
            unsafe { self.ring.read_inbox(self.inbox.fd(), &raw mut *self.bell_counter) };
        }
    }

    fn time_to_wait(&self) -> Option<Duration> {
        if !self.runnable.is_empty() || !self.touched.is_empty() {
            return Some(Duration::ZERO);
        }
        let deadlines = self.devices.iter().filter_map(|(_, managed)| {
            let grace = managed.closing.as_ref().filter(|closing| !closing.told);
            let grace = grace.map(|closing| closing.drop_clients_us);
            [managed.deadline_us, grace].into_iter().flatten().min()
        });
        let next = deadlines.min()?;
        Some(Duration::from_micros(next.saturating_sub(now_us())))
    }
}

/// Runs what a session left to others.
fn spawn_task(
    runtime: &tokio::runtime::Handle,
    sender: &Sender,
    (conn, generation, slot): (u32, u32, u16),
    task: Task,
) {
    let sender = sender.clone();
    runtime.spawn(async move {
        match AssertUnwindSafe(task).catch_unwind().await {
            Ok(result) => sender.send(Message::TaskDone { conn, generation, slot, result }),
            // The session would wait for it for ever.
            Err(_) => std::process::abort(),
        }
    });
}

fn managed(devices: &mut Slab<Managed>, key: DeviceKey) -> Option<&mut Managed> {
    let managed = devices.get_mut(key.index)?;
    (managed.generation == key.generation).then_some(managed)
}
