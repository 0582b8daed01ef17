//! What stays behind a device: new connections for dead ones, and the volume's size.
//!
//! Requests that were on a connection when it died are sent again by the kernel when their timeout is over, new ones at once.
//! While no connection is alive both wait; nothing fails before the device's dead-connection timeout.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use super::device::Device;
use super::kernel::Kernel;
use super::place::Backend;
use super::server::{self, Found, Server};

/// How often the volume's size is asked for, and what cannot be waited for is looked at.
const ROUND: Duration = Duration::from_secs(5);
/// Pauses between attempts to connect: the first, and the longest.
const PAUSE_MIN: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// Why a keeper has nothing to do any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// The device is no longer attached.
    Gone,
    /// A signal asked for it.
    Signalled,
}

/// The keeper of one device.
pub struct Keeper {
    kernel: Kernel,
    device: Device,
    backend: Backend,
    server: Server,
    volume: Volume,
    /// How many connections the device is to have.
    wanted: usize,
    /// Connections the kernel has from us.
    held: Vec<OwnedFd>,
    /// Connections the kernel may have from a keeper before us; they cannot be watched.
    unknown: usize,
    pause: Duration,
    /// The kernel has said that the device is being taken away.
    gone: bool,
    /// What was last complained about, so that it is said once.
    complaint: String,
    say: Box<dyn FnMut(&str)>,
}

impl Keeper {
    /// A keeper of `device`, which the kernel has with `held` connections and `unknown` ones of an earlier keeper.
    #[expect(clippy::too_many_arguments, reason = "each is one fact about the device")]
    pub fn new(
        kernel: Kernel,
        device: Device,
        backend: Backend,
        server: Server,
        id: Option<String>,
        size: u64,
        held: Vec<OwnedFd>,
        unknown: usize,
        say: Box<dyn FnMut(&str)>,
    ) -> Self {
        let wanted = held.len() + unknown;
        let (pause, gone, complaint) = (PAUSE_MIN, false, String::new());
        let volume = Volume { id, size };
        Self { kernel, device, backend, server, volume, wanted, held, unknown, pause, gone, complaint, say }
    }

    /// Looks after the device until it is gone, or until `signals`, a descriptor, can be read.
    ///
    /// # Errors
    /// Waiting is impossible.
    pub fn run(&mut self, signals: &OwnedFd) -> io::Result<End> {
        let mut next_round = Instant::now();
        loop {
            if self.drop_dead() && self.is_gone() {
                return Ok(End::Gone);
            }
            let lacking = self.wanted - self.held.len() - self.unknown;
            if lacking > 0 && !self.connect_one() && self.is_gone() {
                return Ok(End::Gone);
            }
            if Instant::now() >= next_round {
                if self.is_gone() {
                    return Ok(End::Gone);
                }
                self.round();
                next_round = Instant::now() + ROUND;
            }
            let wait = if self.wanted > self.held.len() + self.unknown {
                self.pause
            } else {
                next_round.saturating_duration_since(Instant::now())
            };
            if self.wait(signals, wait)? {
                return Ok(End::Signalled);
            }
        }
    }

    /// Whether the device is no longer the one that was attached.
    fn is_gone(&self) -> bool {
        // A device that is still open somewhere outlives its end, as a name without connections.
        self.gone || !self.device.is_connected() || self.device.backend().is_none_or(|text| text != self.backend.text)
    }

    /// Waits for the end of a connection, a signal, or the time; whether it was a signal.
    fn wait(&self, signals: &OwnedFd, time: Duration) -> io::Result<bool> {
        let poll = |fd: &OwnedFd, events| libc::pollfd { fd: fd.as_raw_fd(), events, revents: 0 };
        let mut polls: Vec<libc::pollfd> = self.held.iter().map(|fd| poll(fd, libc::POLLRDHUP)).collect();
        polls.push(poll(signals, libc::POLLIN));
        let ms = i32::try_from(time.as_millis()).unwrap_or(i32::MAX).max(1);
        // SAFETY: `polls` is as long as said and alive over the call.
        let ready = unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, ms) };
        if ready < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(false) } else { Err(error) };
        }
        Ok(polls.last().is_some_and(|poll| poll.revents != 0))
    }

    /// Lets go of connections that ended; whether there were any.
    fn drop_dead(&mut self) -> bool {
        let before = self.held.len();
        self.held.retain(|socket| {
            let dead = has_ended(socket) || server::is_unheard(socket);
            if dead {
                // Before the kernel's requests come to the server on another connection.
                server::cut(socket);
            }
            !dead
        });
        if self.held.len() < before {
            self.pause = PAUSE_MIN;
            if self.held.is_empty() && self.unknown == 0 {
                (self.say)(&format!("{}: no connection to {} is left; I/O waits", self.device, self.server));
            }
        }
        self.held.len() < before
    }

    /// Makes one connection and offers it to the kernel; whether the kernel took it.
    fn connect_one(&mut self) -> bool {
        match self.try_connect() {
            Ok(true) => {
                if self.held.len() + self.unknown == self.wanted {
                    (self.say)(&format!("{}: connected to {} again", self.device, self.server));
                }
                self.complaint.clear();
                self.pause = PAUSE_MIN;
                true
            }
            // The kernel has not noticed yet that a connection of its own has ended.
            Ok(false) => {
                self.pause = (self.pause * 2).min(PAUSE_MAX);
                false
            }
            Err(error) => {
                self.complain(&format!("cannot connect to {} again, trying on: {error}", self.server));
                self.pause = (self.pause * 2).min(PAUSE_MAX);
                false
            }
        }
    }

    fn try_connect(&mut self) -> io::Result<bool> {
        let (socket, found) = self.server.connect(&self.backend.volume)?;
        self.volume.accepts(&found).map_err(io::Error::other)?;
        if let Err(error) = self.kernel.offer(self.device.0, &self.backend.text, socket.as_fd()) {
            self.gone = error.raw_os_error() == Some(libc::EINVAL);
            return Err(error);
        }
        let taken = server::is_taken(&socket)?;
        if taken {
            self.held.push(socket);
        }
        Ok(taken)
    }

    /// What is done from time to time.
    fn round(&mut self) {
        if self.unknown > 0 {
            // Some of the connections we cannot watch may have ended: the kernel takes ours in their place, or not.
            while self.unknown > 0 && matches!(self.try_connect(), Ok(true)) {
                self.unknown -= 1;
            }
        }
        if self.held.is_empty() && self.unknown == 0 {
            return;
        }
        match self.server.look(&self.backend.volume) {
            Ok(found) if self.volume.is(&found) && found.size > self.volume.size => {
                match self.kernel.resize(self.device.0, &self.backend.text, found.size) {
                    Ok(()) => {
                        let before = std::mem::replace(&mut self.volume.size, found.size);
                        (self.say)(&format!("{}: grew from {before} to {} bytes", self.device, found.size));
                    }
                    Err(error) => self.complain(&format!("the kernel does not take the new size: {error}")),
                }
            }
            Ok(found) if self.volume.is(&found) && found.size < self.volume.size => {
                self.complain(&format!(
                    "the volume has shrunk to {} bytes; beyond that, requests fail. Detach and attach it",
                    found.size
                ));
            }
            // A server that is away is noticed by its connections.
            _ => {}
        }
    }

    fn complain(&mut self, what: &str) {
        if self.complaint != what {
            (self.say)(&format!("{}: {what}", self.device));
            self.complaint = what.to_owned();
        }
    }
}

/// The volume a device was made for.
struct Volume {
    /// Its identity, from servers that tell one.
    id: Option<String>,
    /// The device's size in bytes.
    size: u64,
}

impl Volume {
    fn is(&self, found: &Found) -> bool {
        found.id == self.id
    }

    /// Whether the device can go on with what a server has under the volume's name now; else, why not.
    fn accepts(&self, found: &Found) -> Result<(), String> {
        if !self.is(found) {
            let name = |id: &Option<String>| id.as_deref().unwrap_or("unnamed").to_owned();
            return Err(format!(
                "there is another volume of this name now (it was {}, it is {})",
                name(&self.id),
                name(&found.id)
            ));
        }
        if found.size < self.size {
            return Err(format!(
                "the volume has shrunk from {} to {} bytes; detach and attach it",
                self.size, found.size
            ));
        }
        Ok(())
    }
}

/// Whether the other side has hung up.
fn has_ended(socket: &OwnedFd) -> bool {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: `poll` is one valid pollfd, alive over the call.
    let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
    ready > 0 && poll.revents != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_goes_on_with_its_own_volume_only_and_with_all_of_it() {
        let volume = |id: Option<&str>| Volume { id: id.map(str::to_owned), size: 4096 };
        let found = |id: Option<&str>, size| Found { size, flags: 0, id: id.map(str::to_owned) };
        assert_eq!(volume(Some("a")).accepts(&found(Some("a"), 4096)), Ok(()));
        assert_eq!(volume(Some("a")).accepts(&found(Some("a"), 8192)), Ok(()));
        assert_eq!(volume(None).accepts(&found(None, 4096)), Ok(()));
        for other in [Some("b"), None] {
            let why = volume(Some("a")).accepts(&found(other, 4096)).unwrap_err();
            assert!(why.contains("another volume of this name"), "{why}");
        }
        assert!(volume(None).accepts(&found(Some("a"), 4096)).is_err());
        let why = volume(Some("a")).accepts(&found(Some("a"), 0)).unwrap_err();
        assert!(why.contains("shrunk from 4096 to 0 bytes"), "{why}");
    }

    #[test]
    fn a_connection_has_ended_when_the_other_side_hung_up() {
        let (one, other) = std::os::unix::net::UnixStream::pair().unwrap();
        let one = OwnedFd::from(one);
        assert!(!has_ended(&one));
        drop(other);
        assert!(has_ended(&one));
    }
}
