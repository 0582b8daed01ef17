//! What all hosts of a volume share: its reservations, and how a change of them meets commands that are under way.
//!
//! A command enters before it goes to the device and leaves when the device has answered. A change that takes rights away
//! is answered only when every command that entered under the old state has left: from then on nothing a host did
//! before it lost its right can take effect any more.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak};
use std::time::Duration;

use super::command::Status;
use super::controller::Events;
use super::data::HostId;
use super::reservation::file::{self, FileError};
use super::reservation::{Access, Request, Reservations};
use crate::types::VolumeId;

/// Longest pause between two looks at commands that have not left.
const PAUSE_MAX: Duration = Duration::from_millis(20);

/// A request and what it says of persistence.
#[derive(Clone, Copy, Debug)]
pub struct Change {
    /// Who asks.
    pub host: HostId,
    /// What for.
    pub request: Request,
    /// Whether reservations are to outlive a loss of power, if it says so.
    pub persists: Option<bool>,
}

/// See the module.
pub struct Namespace {
    volume: VolumeId,
    /// Where the reservations are kept; nowhere for tests.
    dir: Option<PathBuf>,
    state: Mutex<Reservations>,
    /// Whether there is a reservation at all, to be seen without a lock.
    reserved: AtomicBool,
    /// Held while a change is made: from the old state to the new one's answer.
    changing: tokio::sync::Mutex<()>,
    /// Which of the two counts is that of commands entering now, in its lowest bit.
    era: AtomicUsize,
    inside: [AtomicUsize; 2],
    watchers: Mutex<Vec<Weak<Events>>>,
}

/// A command that has entered; to be given back by [`Namespace::leave`].
#[derive(Debug)]
#[must_use]
pub struct Entered(u8);

impl Namespace {
    /// With the reservations kept in a volume's directory.
    ///
    /// # Errors
    /// The file is there and cannot be used.
    pub fn open(volume: VolumeId, dir: PathBuf) -> Result<Arc<Self>, FileError> {
        let state = file::load(&dir, volume)?;
        Ok(Self::with(volume, Some(dir), state))
    }

    /// Whose reservations live in memory.
    pub fn transient(volume: VolumeId) -> Arc<Self> {
        Self::with(volume, None, Reservations::default())
    }

    fn with(volume: VolumeId, dir: Option<PathBuf>, state: Reservations) -> Arc<Self> {
        Arc::new(Self {
            volume,
            dir,
            reserved: AtomicBool::new(state.held.is_some()),
            state: Mutex::new(state),
            changing: tokio::sync::Mutex::default(),
            era: AtomicUsize::new(0),
            inside: Default::default(),
            watchers: Mutex::default(),
        })
    }

    /// The volume's identity.
    pub fn volume(&self) -> VolumeId {
        self.volume
    }

    fn lock(&self) -> MutexGuard<'_, Reservations> {
        self.state.lock().expect("no code panics while it holds this lock")
    }

    /// The reservations as they are.
    pub fn reservations(&self) -> Reservations {
        self.lock().clone()
    }

    /// Begins a command that reads or writes.
    ///
    /// # Errors
    /// The status to answer with: another host's reservation does not allow it.
    pub fn enter(&self, host: &HostId, access: Access) -> Result<Entered, Status> {
        // Counted first, looked at then: whoever changes the state either waits for us, or we see the new one.
        let entered = loop {
            let era = self.era.load(Ordering::SeqCst);
            let entered = Entered((era & 1) as u8);
            self.inside[era & 1].fetch_add(1, Ordering::SeqCst);
            // Were the count another era's by now, nobody might wait for it.
            if self.era.load(Ordering::SeqCst) == era {
                break entered;
            }
            self.leave(entered);
        };
        if self.reserved.load(Ordering::SeqCst)
            && let Err(status) = self.lock().check(host, access)
        {
            self.leave(entered);
            return Err(status);
        }
        Ok(entered)
    }

    /// Ends a command.
    pub fn leave(&self, entered: Entered) {
        let before = self.inside[usize::from(entered.0)].fetch_sub(1, Ordering::SeqCst);
        assert!(before > 0, "a command leaves that never entered");
    }

    /// Changes the reservations: on disk first, then for commands, then, when those that entered before have left, for
    /// whoever asked.
    pub async fn change(self: Arc<Self>, change: Change) -> Status {
        let _one_at_a_time = self.changing.lock().await;
        let before = self.reservations();
        let mut after = before.clone();
        let notices = match after.apply(change.host, change.request) {
            Ok(notices) => notices,
            Err(status) => return status,
        };
        if let Some(persists) = change.persists {
            after.persists = persists;
        }
        if after == before {
            return Status::SUCCESS;
        }
        if let Err(error) = self.keep(after.clone()).await {
            tracing::error!(volume = %self.volume, "cannot keep the reservations: {error}");
            return Status::INTERNAL;
        }
        let takes_away = after.held.is_some() && (after.held != before.held || after.registrants != before.registrants);
        *self.lock() = after.clone();
        self.reserved.store(after.held.is_some(), Ordering::SeqCst);
        if takes_away {
            self.wait_for_those_inside().await;
        }
        tracing::info!(
            volume = %self.volume,
            held = ?after.held.map(|(kind, _)| kind),
            registrants = after.registrants.len(),
            "reservations changed: {:?} by {}",
            change.request,
            uuid::Uuid::from_bytes(change.host)
        );
        let mut watchers = self.watchers.lock().expect("no code panics while it holds this lock");
        watchers.retain(|watcher| watcher.strong_count() > 0);
        for events in watchers.iter().filter_map(Weak::upgrade) {
            for (host, notice) in &notices {
                if events.host_id() == host {
                    events.reservation(*notice);
                }
            }
        }
        Status::SUCCESS
    }

    async fn keep(&self, state: Reservations) -> std::io::Result<()> {
        let Some(dir) = self.dir.clone() else { return Ok(()) };
        let volume = self.volume;
        tokio::task::spawn_blocking(move || file::store(&dir, volume, &state)).await.map_err(std::io::Error::other)?
    }

    async fn wait_for_those_inside(&self) {
        let old = self.era.fetch_add(1, Ordering::SeqCst) & 1;
        let mut pause = Duration::from_micros(100);
        while self.inside[old].load(Ordering::SeqCst) > 0 {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }

    /// Tells `events` what concerns its host from now on.
    pub fn watch(&self, events: &Arc<Events>) {
        let mut watchers = self.watchers.lock().expect("no code panics while it holds this lock");
        watchers.retain(|watcher| watcher.strong_count() > 0);
        watchers.push(Arc::downgrade(events));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::export::nvme::reservation::Kind;

    #[tokio::test]
    async fn who_preempts_waits_for_what_is_under_way() {
        let (a, b) = ([1; 16], [2; 16]);
        let namespace = Namespace::transient(VolumeId([0; 16]));
        let change = |host, request| namespace.clone().change(Change { host, request, persists: None });
        assert_eq!(change(a, Request::Register { key: 1 }).await, Status::SUCCESS);
        assert_eq!(change(b, Request::Register { key: 2 }).await, Status::SUCCESS);
        let kind = Kind::WriteExclusive;
        assert_eq!(change(a, Request::Acquire { current: 1, kind }).await, Status::SUCCESS);
        let under_way = namespace.enter(&a, Access::Write).unwrap();
        let preempting = tokio::spawn(change(b, Request::Preempt { current: 2, victim: 1, kind }));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!preempting.is_finished());
        assert_eq!(namespace.enter(&a, Access::Write).unwrap_err(), Status::RESERVATION_CONFLICT);
        let own = namespace.enter(&b, Access::Write).unwrap();
        namespace.leave(under_way);
        assert_eq!(preempting.await.unwrap(), Status::SUCCESS);
        namespace.leave(own);
    }
}
