//! Listening, the Connect command, and handing I/O queues to the reactor of the volume they ask for.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio::task::{JoinHandle, JoinSet};
use zerocopy::FromBytes;

use super::admin::{Admin, Subject};
use super::command::{FABRICS, Status, fabrics};
use super::controller::{Controller, Controllers, Host};
use super::data::{ConnectData, name_in};
use super::namespace::Namespace;
use super::queue::{Capsule, Queue, QueueError};
use super::session::SessionParams;
use super::{DISCOVERY_NQN, QUEUE_ENTRIES_MAX};
use crate::reactor::{DeviceKey, ReactorHandle};
use crate::types::VolumeId;

/// Connections at once that are no I/O queues (yet); more are turned away.
const MAX_QUEUES: usize = 4096;
/// Pause after a failed accept (out of descriptors, mostly), so that it does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// How long a connection may take to say what it is for.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);

/// A volume, or a snapshot of one, as hosts may see it.
#[derive(Clone)]
pub struct Subsystem {
    /// Its name among hosts.
    pub nqn: String,
    /// The volume's or the snapshot's name, for messages.
    pub name: String,
    /// Its identity: NGUID, UUID and serial number.
    pub id: VolumeId,
    /// Size in bytes, now.
    pub size: u64,
    /// Refuse writes and reservations. What a snapshot's subsystem says.
    pub read_only: bool,
    /// Hosts that may connect; all of them without a list.
    pub hosts: Option<Arc<[String]>>,
    /// What its hosts share.
    pub namespace: Arc<Namespace>,
    /// Where it lives.
    pub reactor: ReactorHandle,
    /// Its device there.
    pub key: DeviceKey,
}

impl Subsystem {
    /// Whether a host may see it.
    pub fn admits(&self, host: &str) -> bool {
        is_among(host, self.hosts.as_deref())
    }
}

/// A subsystem as discovery tells of it.
#[derive(Clone)]
pub struct Listed {
    /// Its name among hosts.
    pub nqn: String,
    /// As in [`Subsystem`].
    pub hosts: Option<Arc<[String]>>,
}

impl Listed {
    /// Whether a host may see it.
    pub fn admits(&self, host: &str) -> bool {
        is_among(host, self.hosts.as_deref())
    }
}

fn is_among(host: &str, hosts: Option<&[String]>) -> bool {
    hosts.is_none_or(|hosts| hosts.iter().any(|allowed| allowed == host))
}

/// What is known of a subsystem's name.
pub enum Found {
    /// It is there.
    Open(Box<Subsystem>),
    /// It will or may be there again; with the reason, for messages.
    NotNow(String),
    /// There is no such volume.
    Unknown,
}

/// What a target exports; may change while it runs.
pub trait Subsystems: Send + Sync {
    /// All that a host could connect to now.
    fn list(&self) -> Vec<Listed>;
    /// Gets ready for [`Subsystems::find`] what is not served all the time.
    fn prepare<'a>(&'a self, _nqn: &'a str) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async {})
    }
    /// The one of a name.
    fn find(&self, nqn: &str) -> Found;
    /// Told when something changed: a volume came or went, or its size.
    fn changes(&self) -> &Changes;
}

/// Wakes all admin queues, which then look what is different.
#[derive(Default)]
pub struct Changes(Notify);

impl Changes {
    /// Something changed.
    pub fn tell(&self) {
        self.0.notify_waiters();
    }

    /// Waits for the next change after this call.
    pub fn next(&self) -> tokio::sync::futures::Notified<'_> {
        self.0.notified()
    }
}

/// Why listening failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot listen for NVMe/TCP hosts on {address}: {source}")]
pub struct ListenError {
    /// Where.
    address: SocketAddr,
    /// The cause.
    source: io::Error,
}

/// What all connections share.
pub(super) struct Target {
    pub subsystems: Arc<dyn Subsystems>,
    pub controllers: Controllers,
    pub listens: Vec<SocketAddr>,
}

/// A running target. Dropping it stops listening and ends all controllers; their I/O queues end with their devices.
pub struct Server {
    target: Arc<Target>,
    tasks: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens on all of `addresses` and begins to serve. Must be called within a tokio runtime. `seed` decides where
    /// controller identifiers begin; two starts, and two daemons, should have different ones.
    ///
    /// # Errors
    /// One of the addresses cannot be had; then none is kept.
    pub async fn start(
        addresses: &[SocketAddr],
        subsystems: Arc<dyn Subsystems>,
        seed: u64,
    ) -> Result<Self, ListenError> {
        let mut listeners = Vec::new();
        for &address in addresses {
            let failed = |source| ListenError { address, source };
            let listener = TcpListener::bind(address).await.map_err(failed)?;
            listeners.push((listener.local_addr().map_err(failed)?, listener));
        }
        let listens = listeners.iter().map(|(address, _)| *address).collect();
        let target = Arc::new(Target { subsystems, controllers: Controllers::new(seed), listens });
        let tasks = listeners.into_iter().map(|(_, listener)| tokio::spawn(serve(listener, target.clone()))).collect();
        Ok(Self { target, tasks })
    }

    /// Where it listens, with the ports the system chose.
    pub fn listens(&self) -> &[SocketAddr] {
        &self.target.listens
    }

    /// The controllers of a subsystem: host, its address, I/O queues.
    pub fn controllers(&self, nqn: &str) -> Vec<(Host, String, usize)> {
        let of = self.target.controllers.of(nqn);
        of.iter().map(|c| (c.host.clone(), c.peer.clone(), c.queues().len())).collect()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

async fn serve(listener: TcpListener, target: Arc<Target>) {
    let room = Arc::new(Semaphore::new(MAX_QUEUES));
    // Dropped with this task, and the queues with it.
    let mut queues = JoinSet::new();
    loop {
        match listener.accept().await {
            Ok((stream, peer)) => match room.clone().try_acquire_owned() {
                Ok(permit) => {
                    let target = target.clone();
                    queues.spawn(async move {
                        welcome(stream, peer, &target).await;
                        drop(permit);
                    });
                }
                Err(_) => tracing::warn!(%peer, "NVMe/TCP host turned away: too many connections"),
            },
            Err(error) => {
                tracing::warn!(%error, "accepting an NVMe/TCP host failed; trying again");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
        while queues.try_join_next().is_some() {}
    }
}

async fn welcome(stream: TcpStream, peer: SocketAddr, target: &Arc<Target>) {
    let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, connect(stream, peer, target)).await;
    match connected {
        Ok(Ok(Some(admin))) => admin.run(target).await,
        Ok(Ok(None)) => {}
        // Port scanners and health checks connect and leave.
        Ok(Err(QueueError::Io(error))) => tracing::debug!(%peer, %error, "host left before its Connect command"),
        Ok(Err(error)) => tracing::warn!(%peer, "NVMe/TCP connection dropped: {error}"),
        Err(_) => tracing::debug!(%peer, "no Connect command came"),
    }
}

/// Why a Connect command is refused: status, and the offset of the field at fault, in the data if so.
struct Refusal {
    status: Status,
    field: u64,
    in_data: bool,
    why: String,
}

fn refusal(status: Status, why: impl Into<String>) -> Refusal {
    Refusal { status, field: 0, in_data: false, why: why.into() }
}

fn invalid(field: u64, in_data: bool, why: &str) -> Refusal {
    Refusal { status: Status::CONNECT_INVALID, field, in_data, why: why.to_owned() }
}

/// Offsets in the Connect command and in its data.
mod at {
    pub const QID: u64 = 42;
    pub const SQSIZE: u64 = 44;
    pub const HOST_ID: u64 = 0;
    pub const CNTLID: u64 = 16;
    pub const SUBSYSTEM: u64 = 256;
    pub const HOST: u64 = 512;
}

/// Initialises the connection and carries out its Connect command. An admin queue is returned to be run, an I/O queue
/// has moved on.
async fn connect(stream: TcpStream, peer: SocketAddr, target: &Arc<Target>) -> Result<Option<Admin>, QueueError> {
    // Replies are batched already; waiting for more would only add delay.
    stream.set_nodelay(true)?;
    let mut queue = Queue::initialize(stream).await?;
    let Some(capsule) = queue.next().await? else { return Ok(None) };
    let cid = capsule.command.cid.get();
    let outcome = match Asked::of(&capsule) {
        Ok(asked) if asked.qid == 0 => admin_queue(&asked, &queue, peer, target).await.map(Connected::Admin),
        Ok(asked) => io_queue(&asked, target)
            .map(|(controller, subsystem)| Connected::Io(Box::new((asked, controller, subsystem)))),
        Err(refusal) => Err(refusal),
    };
    match outcome {
        Err(Refusal { status, field, in_data, why }) => {
            if status.may_retry() {
                tracing::info!(%peer, "NVMe/TCP host asked to come back later: {why}");
            } else {
                tracing::warn!(%peer, "NVMe/TCP host refused: {why}");
            }
            queue.complete(cid, status, field | u64::from(in_data) << 16);
            queue.flush().await?;
            Ok(None)
        }
        Ok(Connected::Admin((asked, controller, subject, local))) => {
            tracing::info!(
                %peer,
                host = controller.host.nqn,
                subsystem = controller.subsystem,
                cntlid = controller.cntlid,
                "NVMe/TCP host connected"
            );
            // From here on the controller is ended by the admin queue's end, also when it is dropped.
            let mut admin = Admin::new(queue, controller, subject, target.clone(), local, asked.kato);
            let cntlid = u64::from(admin.controller().cntlid);
            let queue = admin.queue();
            queue.complete(cid, Status::SUCCESS, cntlid);
            if asked.flow_control {
                queue.begin_flow_control(asked.entries);
            }
            queue.flush().await?;
            Ok(Some(admin))
        }
        Ok(Connected::Io(connected)) => {
            let (asked, controller, subsystem) = *connected;
            let framing = queue.framing();
            if asked.flow_control {
                queue.begin_flow_control(asked.entries);
            }
            queue.complete(cid, Status::SUCCESS, controller.cntlid.into());
            queue.flush().await?;
            let (stream, early) = queue.into_parts();
            if !early.is_empty() {
                tracing::warn!(%peer, "NVMe/TCP connection dropped: commands before the answer to Connect");
                return Ok(None);
            }
            let stream = stream.into_std()?;
            stream.set_nonblocking(false)?;
            let fd = OwnedFd::from(stream);
            controller.add_queue(asked.qid, |number| {
                let params = SessionParams {
                    peer: peer.to_string(),
                    export: subsystem.name.clone(),
                    framing,
                    entries: asked.entries,
                    flow_control: asked.flow_control,
                    host: asked.host.id,
                    namespace: subsystem.namespace.clone(),
                    read_only: subsystem.read_only,
                    group: controller.group,
                    number: Some(number),
                };
                subsystem.reactor.add_connection(fd, params, subsystem.key);
            });
            Ok(None)
        }
    }
}

enum Connected {
    Admin((Asked, Arc<Controller>, Subject, SocketAddr)),
    Io(Box<(Asked, Arc<Controller>, Box<Subsystem>)>),
}

/// A Connect command.
#[derive(Clone)]
struct Asked {
    host: Host,
    subsystem: String,
    cntlid: u16,
    qid: u16,
    entries: u16,
    flow_control: bool,
    kato: u32,
}

impl Asked {
    fn of(capsule: &Capsule) -> Result<Self, Refusal> {
        const NO_FLOW_CONTROL: u32 = 1 << 2;
        let command = &capsule.command;
        if command.opcode != FABRICS || command.fabrics_type() != fabrics::CONNECT {
            return Err(refusal(Status::SEQUENCE_ERROR, "its first command was no Connect"));
        }
        if !capsule.intact {
            return Err(refusal(Status::TRANSPORT, "the data of its Connect command did not arrive as it was sent"));
        }
        if let Err(status) = command.data_in(capsule.data.len()) {
            return Err(refusal(status, "its Connect command has no data"));
        }
        let Ok((data, _)) = ConnectData::read_from_prefix(&capsule.data) else {
            return Err(refusal(Status::SGL_LENGTH, "the data of its Connect command is too short"));
        };
        let (format, qid) = (command.dword(10) as u16, (command.dword(10) >> 16) as u16);
        let (size, attributes) = (command.dword(11) as u16, command.dword(11) >> 16);
        if format != 0 {
            return Err(refusal(Status::CONNECT_FORMAT, "a Connect command of an unknown format"));
        }
        // 0's based, and a queue of one entry would always be full.
        if size == 0 || size >= QUEUE_ENTRIES_MAX {
            return Err(invalid(at::SQSIZE, false, "a queue of an impossible size"));
        }
        let subsystem = name_in(&data.subsystem).ok_or(invalid(at::SUBSYSTEM, true, "no name of a subsystem"))?;
        let nqn = name_in(&data.host).ok_or(invalid(at::HOST, true, "no name of a host"))?;
        if data.host_id == [0; 16] {
            return Err(invalid(at::HOST_ID, true, "no host identifier"));
        }
        Ok(Self {
            host: Host { nqn: nqn.to_owned(), id: data.host_id },
            subsystem: subsystem.to_owned(),
            cntlid: data.cntlid.get(),
            qid,
            entries: size + 1,
            flow_control: attributes & NO_FLOW_CONTROL == 0,
            kato: command.dword(12),
        })
    }
}

async fn admin_queue(
    asked: &Asked,
    queue: &Queue,
    peer: SocketAddr,
    target: &Target,
) -> Result<(Asked, Arc<Controller>, Subject, SocketAddr), Refusal> {
    const NEW: u16 = 0xffff;
    if asked.cntlid != NEW {
        return Err(invalid(at::CNTLID, true, "controllers are made when asked for; none can be chosen"));
    }
    let subject = if asked.subsystem == DISCOVERY_NQN {
        Subject::Discovery
    } else {
        target.subsystems.prepare(&asked.subsystem).await;
        Subject::Volume(open_subsystem(asked, target)?)
    };
    if !target.controllers.outlive(&asked.host, &asked.subsystem).await {
        return Err(refusal(Status::CONNECT_BUSY, "commands of its last connection are still being carried out"));
    }
    let socket = queue.stream().as_fd().try_clone_to_owned().ok();
    let local = queue.stream().local_addr().map_err(|_| refusal(Status::CONNECT_BUSY, "it has left"))?;
    let controller = target.controllers.add(asked.host.clone(), asked.subsystem.clone(), peer.to_string(), socket);
    let controller = controller.ok_or_else(|| refusal(Status::CONNECT_BUSY, "there are too many controllers"))?;
    Ok((asked.clone(), controller, subject, local))
}

fn open_subsystem(asked: &Asked, target: &Target) -> Result<Box<Subsystem>, Refusal> {
    match target.subsystems.find(&asked.subsystem) {
        Found::Open(subsystem) if subsystem.admits(&asked.host.nqn) => Ok(subsystem),
        Found::Open(subsystem) => {
            let why = format!("{} is not among the hosts of volume {:?}", asked.host.nqn, subsystem.name);
            Err(refusal(Status::CONNECT_HOST, why))
        }
        Found::NotNow(why) => Err(refusal(Status::CONNECT_BUSY, why)),
        Found::Unknown => Err(invalid(at::SUBSYSTEM, true, &format!("there is no subsystem {}", asked.subsystem))),
    }
}

fn io_queue(asked: &Asked, target: &Target) -> Result<(Arc<Controller>, Box<Subsystem>), Refusal> {
    let controller = target.controllers.find(asked.cntlid);
    let controller = controller.filter(|controller| !controller.is_ending());
    // After a restart hosts ask for controllers that are no more; they are to begin anew then, not to give up.
    let controller = controller.ok_or_else(|| refusal(Status::CONNECT_GONE, "its controller is not there any more"))?;
    if controller.subsystem != asked.subsystem {
        return Err(invalid(at::SUBSYSTEM, true, "its controller belongs to another subsystem"));
    }
    if controller.host.nqn != asked.host.nqn {
        return Err(invalid(at::HOST, true, "its controller belongs to another host"));
    }
    if controller.host.id != asked.host.id {
        return Err(invalid(at::HOST_ID, true, "its controller belongs to a host of another identifier"));
    }
    if !controller.enabled.load(Ordering::SeqCst) {
        return Err(refusal(Status::SEQUENCE_ERROR, "its controller is not enabled"));
    }
    if asked.subsystem == DISCOVERY_NQN || u32::from(asked.qid) > controller.queues_granted.load(Ordering::SeqCst) {
        return Err(invalid(at::QID, false, "an I/O queue its controller does not have"));
    }
    if controller.queues().contains(&asked.qid) {
        return Err(refusal(Status::SEQUENCE_ERROR, "an I/O queue that exists already"));
    }
    Ok((controller, open_subsystem(asked, target)?))
}
