//! What the queues of one association share, and the list of all associations.
//!
//! A controller begins with its admin queue and ends with it. Its I/O queues are a group of connections on the reactor
//! of its volume, which is dropped at its end; it leaves the list only when all that came by them was answered. A host that
//! connects anew first waits for that ([`Controllers::outlive`]), so that nothing it sent on its old connections can
//! take effect behind what it sends on the new ones.

use std::collections::{HashSet, VecDeque};
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;

use super::data::HostId;
use super::reservation::Notice;

/// Controller identifiers end before those with a meaning of their own.
const CNTLID_END: u16 = 0xfff0;
/// Reservation notices kept for a host that does not read them.
const NOTICES_MAX: usize = 255;
/// How long a host that connects anew waits for its old controller to end.
const OUTLIVE: Duration = Duration::from_secs(10);

/// Who connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Host {
    /// Its name.
    pub nqn: String,
    /// Its identifier.
    pub id: HostId,
}

/// What there is to tell a host, beside what can be seen by looking.
pub struct Events {
    host: HostId,
    notices: Mutex<VecDeque<Notice>>,
    /// Kinds of notices it does not want, as bits of their numbers.
    unwanted: AtomicU32,
    notify: Arc<Notify>,
}

impl Events {
    /// Whom they concern.
    pub fn host_id(&self) -> &HostId {
        &self.host
    }

    /// Something happened to its reservation.
    pub fn reservation(&self, notice: Notice) {
        if self.unwanted.load(Ordering::Relaxed) & 1 << notice as u32 != 0 {
            return;
        }
        let mut notices = self.notices.lock().expect("no code panics while it holds this lock");
        if notices.len() < NOTICES_MAX {
            notices.push_back(notice);
        }
        drop(notices);
        self.notify.notify_one();
    }

    /// Sets which notices it does not want.
    pub fn mask(&self, unwanted: u32) {
        self.unwanted.store(unwanted, Ordering::Relaxed);
    }

    /// Notices nobody has read.
    pub fn waiting(&self) -> usize {
        self.notices.lock().expect("no code panics while it holds this lock").len()
    }

    /// The oldest notice, and how many are left.
    pub fn take(&self) -> (Option<Notice>, usize) {
        let mut notices = self.notices.lock().expect("no code panics while it holds this lock");
        (notices.pop_front(), notices.len())
    }
}

/// See the module.
pub struct Controller {
    /// Its identifier.
    pub cntlid: u16,
    /// The group of its I/O queues' connections.
    pub group: u64,
    /// Its host.
    pub host: Host,
    /// Its subsystem.
    pub subsystem: String,
    /// The host's address, for messages.
    pub peer: String,
    /// What its host is to be told.
    pub events: Arc<Events>,
    /// Wakes its admin queue.
    pub wake: Arc<Notify>,
    /// CC.EN and CSTS.RDY.
    pub enabled: AtomicBool,
    /// I/O queues it may have.
    pub queues_granted: AtomicU32,
    ending: AtomicBool,
    queues: Mutex<HashSet<u16>>,
    /// The admin queue's socket, to see whether the host is gone.
    socket: Option<OwnedFd>,
    gone: Notify,
}

impl Controller {
    /// Asks its admin queue to end.
    pub fn end(&self) {
        self.ending.store(true, Ordering::SeqCst);
        self.wake.notify_one();
    }

    /// Whether it was asked to end, or has.
    pub fn is_ending(&self) -> bool {
        self.ending.load(Ordering::SeqCst)
    }

    /// Numbers of its I/O queues.
    pub fn queues(&self) -> Vec<u16> {
        let mut queues: Vec<u16> = self.lock().iter().copied().collect();
        queues.sort_unstable();
        queues
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<u16>> {
        self.queues.lock().expect("no code panics while it holds this lock")
    }

    /// Takes the number of an I/O queue and hands its connection over, unless the controller is ending or has it
    /// already. Nothing can come between: a controller that ends later drops the connection.
    pub fn add_queue(self: &Arc<Self>, qid: u16, hand_over: impl FnOnce(QueueNumber)) -> bool {
        let mut queues = self.lock();
        if self.is_ending() || !queues.insert(qid) {
            return false;
        }
        hand_over(QueueNumber { controller: self.clone(), qid });
        true
    }

    fn host_hung_up(&self) -> bool {
        let Some(socket) = &self.socket else { return false };
        let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
        // SAFETY: the call gets one valid struct, and does not wait.
        let ready = unsafe { libc::poll(&raw mut poll, 1, 0) };
        ready > 0 && poll.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
    }
}

/// An I/O queue's number, taken while this lives.
pub struct QueueNumber {
    controller: Arc<Controller>,
    qid: u16,
}

impl Drop for QueueNumber {
    fn drop(&mut self) {
        self.controller.lock().remove(&self.qid);
    }
}

/// All controllers of a target.
pub struct Controllers {
    list: Mutex<Vec<Arc<Controller>>>,
    next_cntlid: Mutex<u16>,
    next_group: AtomicU64,
}

impl Controllers {
    /// None yet. Identifiers begin at a place of their own at each start, so that a host that still knows controllers
    /// of an earlier one, or of another daemon, is unlikely to see one twice.
    pub fn new(seed: u64) -> Self {
        Self {
            list: Mutex::default(),
            next_cntlid: Mutex::new((seed % u64::from(CNTLID_END - 1)) as u16 + 1),
            next_group: AtomicU64::new(1),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Controller>>> {
        self.list.lock().expect("no code panics while it holds this lock")
    }

    /// A new controller; `None` if there are as many as there can be.
    pub fn add(&self, host: Host, subsystem: String, peer: String, socket: Option<OwnedFd>) -> Option<Arc<Controller>> {
        let mut list = self.lock();
        let mut next = self.next_cntlid.lock().expect("no code panics while it holds this lock");
        if list.len() >= usize::from(CNTLID_END - 1) {
            return None;
        }
        let cntlid = loop {
            let cntlid = *next;
            *next = if cntlid + 1 == CNTLID_END { 1 } else { cntlid + 1 };
            if list.iter().all(|controller| controller.cntlid != cntlid) {
                break cntlid;
            }
        };
        let wake = Arc::new(Notify::new());
        let events = Arc::new(Events {
            host: host.id,
            notices: Mutex::default(),
            unwanted: AtomicU32::new(0),
            notify: wake.clone(),
        });
        let controller = Arc::new(Controller {
            cntlid,
            group: self.next_group.fetch_add(1, Ordering::Relaxed),
            host,
            subsystem,
            peer,
            events,
            wake,
            enabled: AtomicBool::new(false),
            queues_granted: AtomicU32::new(u32::from(super::IO_QUEUES_MAX)),
            ending: AtomicBool::new(false),
            queues: Mutex::default(),
            socket,
            gone: Notify::new(),
        });
        list.push(controller.clone());
        Some(controller)
    }

    /// The controller of an identifier.
    pub fn find(&self, cntlid: u16) -> Option<Arc<Controller>> {
        self.lock().iter().find(|controller| controller.cntlid == cntlid).cloned()
    }

    /// All of a subsystem.
    pub fn of(&self, subsystem: &str) -> Vec<Arc<Controller>> {
        self.lock().iter().filter(|controller| controller.subsystem == subsystem).cloned().collect()
    }

    /// Takes a controller from the list when nothing of it is left.
    pub fn remove(&self, controller: &Arc<Controller>) {
        self.lock().retain(|other| !Arc::ptr_eq(other, controller));
        controller.gone.notify_waiters();
    }

    /// Waits until the controllers of this host and subsystem that are ending, or whose host has hung up, have ended.
    /// Others are left alone: a host may have several paths. `false` if they do not end in time.
    pub async fn outlive(&self, host: &Host, subsystem: &str) -> bool {
        let old = self.of(subsystem).into_iter().filter(|old| old.host == *host);
        for controller in old {
            if !controller.is_ending() {
                if !controller.host_hung_up() {
                    continue;
                }
                controller.end();
            }
            let gone = controller.gone.notified();
            let listed = self.lock().iter().any(|other| Arc::ptr_eq(other, &controller));
            if listed && tokio::time::timeout(OUTLIVE, gone).await.is_err() {
                return false;
            }
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn identifiers_are_used_once_at_a_time() {
        let controllers = Controllers::new(u64::from(CNTLID_END) - 3);
        let host = Host { nqn: "h".into(), id: [1; 16] };
        let new = || controllers.add(host.clone(), "s".into(), String::new(), None).unwrap();
        let (a, b, c) = (new(), new(), new());
        assert_eq!((a.cntlid, b.cntlid, c.cntlid), (CNTLID_END - 2, CNTLID_END - 1, 1));
        assert!(controllers.outlive(&host, "s").await, "other paths are no obstacle");
        a.end();
        let waiting = tokio::time::timeout(Duration::from_millis(30), controllers.outlive(&host, "s"));
        assert!(waiting.await.is_err(), "it has not ended yet");
        controllers.remove(&a);
        assert!(controllers.outlive(&host, "s").await);
        assert!(a.add_queue(1, |_| panic!("it is ending")).eq(&false));
        let mut number = None;
        assert!(b.add_queue(1, |taken| number = Some(taken)));
        assert!(!b.add_queue(1, |_| panic!("it is taken")));
        drop(number);
        assert!(b.queues().is_empty());
    }
}
