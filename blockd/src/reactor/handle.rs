//! The reactor as seen from other threads.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc as std_mpsc;

use tokio::sync::oneshot;

use super::device::Device;
use super::inbox::{self, Sender};
use super::run::Reactor;
use super::session::{Client, SessionStats};
use crate::volume::JobDone;

/// Who performs log operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum LogShape {
    /// The reactor's own io_uring.
    #[default]
    Ring,
    /// A thread beside the reactor, with blocking system calls.
    Thread,
}

/// See [`ReactorHandle::spawn`].
#[derive(Clone, Debug, Default)]
pub struct ReactorOptions {
    /// Who performs log operations.
    pub log_shape: LogShape,
}

/// Names a device on its reactor; never reused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct DeviceKey {
    pub(super) index: u32,
    pub(super) generation: u32,
}

/// A client of a device.
#[derive(Clone, Debug)]
pub struct ConnectionInfo {
    /// Its address.
    pub peer: String,
    /// The export name it asked for.
    pub export: String,
    /// Requests not answered yet.
    pub in_flight: usize,
    /// Totals.
    pub stats: SessionStats,
}

/// Something to do with a device; gets `None` if the device is gone.
pub(super) type Visit = Box<dyn FnOnce(Option<&mut dyn Device>) + Send>;

/// What a reactor can be told.
pub(super) enum Message {
    AddDevice(Box<dyn Device>, oneshot::Sender<DeviceKey>),
    WithDevice(DeviceKey, Visit),
    AddConnection(OwnedFd, Client, DeviceKey),
    DropGroup(u64, oneshot::Sender<()>),
    TaskDone { conn: u32, generation: u32, slot: u16, result: u32 },
    CloseDevice(DeviceKey, oneshot::Sender<()>),
    Connections(DeviceKey, oneshot::Sender<Vec<ConnectionInfo>>),
    JobDone(DeviceKey, JobDone),
    LogDone(DeviceKey, u64, io::Result<()>),
    Stop(oneshot::Sender<()>),
}

/// A running reactor thread. Clones talk to the same one; it runs until [`ReactorHandle::stop`].
#[derive(Clone)]
pub struct ReactorHandle {
    inbox: Sender,
}

impl ReactorHandle {
    /// Starts a reactor. Its devices' jobs run on `runtime`.
    ///
    /// # Errors
    /// The kernel refuses a ring or a thread.
    pub fn spawn(options: ReactorOptions, runtime: tokio::runtime::Handle) -> io::Result<Self> {
        let (sender, inbox) = inbox::channel()?;
        let (ready, started) = std_mpsc::sync_channel(1);
        let own = sender.clone();
        std::thread::Builder::new()
            .name("reactor".into())
            // The ring belongs to the thread that makes it.
            .spawn(move || match Reactor::new(options, runtime, own, inbox) {
                Ok(reactor) => {
                    let _ = ready.send(Ok(()));
                    reactor.run();
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            })?;
        match started.recv() {
            Ok(result) => result.map(|()| Self { inbox: sender }),
            Err(_) => Err(io::Error::other("the reactor thread died at its start")),
        }
    }

    /// Hands over a device.
    ///
    /// # Errors
    /// The reactor has stopped; the device is dropped.
    pub async fn add_device(&self, device: Box<dyn Device>) -> io::Result<DeviceKey> {
        let (tx, rx) = oneshot::channel();
        self.inbox.send(Message::AddDevice(device, tx));
        rx.await.map_err(|_| stopped())
    }

    /// Runs `visit` on the reactor's thread, which it must not block. `None` if the device is gone.
    pub async fn with_device<R: Send + 'static>(
        &self,
        key: DeviceKey,
        visit: impl FnOnce(&mut dyn Device) -> R + Send + 'static,
    ) -> Option<R> {
        let (tx, rx) = oneshot::channel();
        let visit: Visit = Box::new(move |device| {
            if let Some(device) = device {
                let _ = tx.send(visit(device));
            }
        });
        self.inbox.send(Message::WithDevice(key, visit));
        rx.await.ok()
    }

    /// Serves a client whose handshake is over; if the device is gone or closing, the client is disconnected.
    pub fn add_connection(&self, fd: OwnedFd, client: impl Into<Client>, key: DeviceKey) {
        self.inbox.send(Message::AddConnection(fd, client.into(), key));
    }

    /// Drops all connections of a group as they are, and returns when the device has answered all that came by them:
    /// from then on none of their writes can take effect any more.
    pub async fn drop_group(&self, group: u64) {
        let (tx, rx) = oneshot::channel();
        self.inbox.send(Message::DropGroup(group, tx));
        let _ = rx.await;
    }

    /// Refuses new requests with ESHUTDOWN, answers those that run, disconnects the clients, closes the device, and
    /// returns when it has closed. Returns at once if the device or the reactor is gone already.
    pub async fn close_device(&self, key: DeviceKey) {
        let (tx, rx) = oneshot::channel();
        self.inbox.send(Message::CloseDevice(key, tx));
        let _ = rx.await;
    }

    /// The device's clients.
    pub async fn connections(&self, key: DeviceKey) -> Vec<ConnectionInfo> {
        let (tx, rx) = oneshot::channel();
        self.inbox.send(Message::Connections(key, tx));
        rx.await.unwrap_or_default()
    }

    /// Drops all clients, lets log operations that run end, and ends the thread. Devices still there are dropped as
    /// they are, as in a crash; close them first.
    pub async fn stop(&self) {
        let (tx, rx) = oneshot::channel();
        self.inbox.send(Message::Stop(tx));
        let _ = rx.await;
    }
}

fn stopped() -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, "the reactor has stopped")
}
