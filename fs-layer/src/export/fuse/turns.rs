//! Whose turn it is to read the next request.
//!
//! `fuser` lets all its threads wait in read(2), and the kernel wakes the one that has waited longest: another one for each request, on
//! another processor, with cold caches; and waking a sleeping thread can cost more than the request. Here one thread reads. It
//! answers what is quickly answered itself, and reads on; before something that takes time it passes the turn to another, which until then is
//! kept from read(2) by not returning from its last request. As many more may read as have lately been busy at the same time, so that they need not be
//! fetched first. Work that should be quick and then has to wait, for the disk or for a lock, passes the
//! turn when it begins to wait ([`crate::waiting`]).
//!
//! Before it sleeps in read(2), the reader looks for a short while whether the next request comes at once, as it does when
//! a program makes one call after the other. It does so only as long as that turns out to be worth it.

use std::cell::RefCell;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use super::awake::Awake;
use crate::waiting;

/// How long the reader looks for the next request before it sleeps: about what being woken costs.
const LOOK_MAX: Duration = Duration::from_micros(50);
/// After a second look in vain, so many requests are answered before the next look; each one in vain then doubles that, up to the other. Where the client
/// runs on the reader's own processor, looking only keeps it from its next request.
const PAUSE_MIN: u32 = 16;
const PAUSE_MAX: u32 = 4096;

/// What a request is likely to take.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Work {
    /// Microseconds, unless it has to wait.
    Quick,
    /// Tens of microseconds, unless it has to wait: another thread reads meanwhile if there is something to be read already.
    Copy,
    /// More.
    Long,
}

#[derive(Debug, Default)]
struct State {
    /// Threads that are in read(2), or on their way there. Those that have had no request yet are not counted: when the session ends, one of the
    /// others must be there to say so.
    readers: usize,
    /// Threads that wait for their turn.
    waiting: usize,
    /// Turns passed that nobody has taken up yet.
    passed: usize,
    /// Threads that passed their turn and are not done.
    busy: usize,
    /// The most of them lately; one less after each so many requests.
    busy_most: usize,
    calm: u32,
}

/// So many requests make the time when many threads were busy one less recent.
const CALM: u32 = 256;

impl State {
    fn passes(&mut self) {
        self.readers -= 1;
        self.busy += 1;
        self.busy_most = self.busy_most.max(self.busy);
        self.calm = 0;
    }

    fn done(&mut self, has_turn: bool) {
        if !has_turn {
            self.busy -= 1;
            self.readers += 1;
        }
        self.calm += 1;
        if self.calm >= CALM {
            self.calm = 0;
            self.busy_most = self.busy_most.saturating_sub(1).max(self.busy);
        }
    }

    fn has_too_many(&self) -> bool {
        self.readers > 1 + self.busy_most
    }
}

/// See the module.
#[derive(Debug)]
pub(super) struct Turns {
    state: Mutex<State>,
    turn: Condvar,
    /// To look for requests; set before the first one is read.
    device: OnceLock<OwnedFd>,
    /// The session ended: nobody is kept from finding that out.
    ended: AtomicBool,
    /// How many requests were answered without a look after the last one.
    unlooked: AtomicU32,
    /// How many are to be.
    pause: AtomicU32,
    /// Whether looking can help: on a single processor it only keeps the client from its next request.
    looks: bool,
    awake: Awake,
}

/// A request that is worked on; dropped after the answer was sent.
pub(super) struct Turn<'a> {
    turns: &'a Arc<Turns>,
}

/// Dropped when a thread of `fuser` ends, which it does when the session does.
struct Ending(Arc<Turns>);

impl Drop for Ending {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[derive(Default)]
struct OfThread {
    ending: Option<Ending>,
    /// Whether this thread has kept the turn during the request it works on.
    has_turn: bool,
}

thread_local! {
    static OF_THREAD: RefCell<OfThread> = RefCell::default();
}

impl Turns {
    /// Nobody reads yet.
    pub(super) fn new(awake: Awake) -> Arc<Turns> {
        let several = std::thread::available_parallelism().is_ok_and(|count| count.get() > 1);
        Arc::new(Turns {
            state: Mutex::default(),
            turn: Condvar::new(),
            device: OnceLock::new(),
            ended: AtomicBool::new(false),
            unlooked: AtomicU32::new(0),
            pause: AtomicU32::new(0),
            looks: several,
            awake,
        })
    }

    /// Says where requests come from, before the first is read.
    pub(super) fn set_device(&self, device: BorrowedFd<'_>) -> io::Result<()> {
        let _ = self.device.set(device.try_clone_to_owned()?);
        Ok(())
    }

    /// A request was read.
    pub(super) fn begin(self: &Arc<Turns>, work: Work) -> Turn<'_> {
        self.awake.request();
        OF_THREAD.with_borrow_mut(|of| {
            if of.ending.is_none() {
                of.ending = Some(Ending(self.clone()));
                let turns = Arc::downgrade(self);
                waiting::on_wait(move || turns.upgrade().iter().for_each(|turns| turns.pass()));
                self.state.lock().unwrap_or_else(PoisonError::into_inner).readers += 1;
            }
            of.has_turn = true;
        });
        match work {
            Work::Long => self.pass(),
            Work::Copy if self.is_next_there() => self.pass(),
            Work::Quick | Work::Copy => waiting::arm(true),
        }
        Turn { turns: self }
    }

    /// Lets another thread read, if this one has the turn and no other reads already.
    fn pass(&self) {
        let had = OF_THREAD.with_borrow_mut(|of| std::mem::take(&mut of.has_turn));
        if !had {
            return;
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.passes();
        if state.readers == 0 && state.waiting > state.passed {
            state.readers += 1;
            state.passed += 1;
            drop(state);
            self.turn.notify_one();
        }
    }

    fn finish(&self) {
        waiting::arm(false);
        let has_turn = OF_THREAD.with_borrow(|of| of.has_turn);
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // This one counts among the readers now; of too many it is the one that waits.
        state.done(has_turn);
        while state.has_too_many() && !self.ended.load(Ordering::Relaxed) {
            state.readers -= 1;
            state.waiting += 1;
            while state.passed == 0 && !self.ended.load(Ordering::Relaxed) {
                state = self.turn.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.waiting -= 1;
            if state.passed > 0 {
                // It was counted among the readers by who passed the turn.
                state.passed -= 1;
                break;
            }
            state.readers += 1;
        }
        let alone = state.readers == 1;
        drop(state);
        // Who was given the turn by another, which is busy, is not about to get a request at once; of several, the kernel wakes one.
        if has_turn && alone {
            self.look();
        }
    }

    fn is_next_there(&self) -> bool {
        let Some(device) = self.device.get() else { return true };
        let mut poll = libc::pollfd { fd: device.as_fd().as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one entry that lives on, of an open descriptor; it does not wait.
        unsafe { libc::poll(&raw mut poll, 1, 0) != 0 }
    }

    /// Waits a moment for the next request.
    fn look(&self) {
        let pause = self.pause.load(Ordering::Relaxed);
        if !self.looks || self.unlooked.fetch_add(1, Ordering::Relaxed) < pause {
            return;
        }
        self.unlooked.store(0, Ordering::Relaxed);
        let begin = Instant::now();
        loop {
            if self.is_next_there() {
                self.pause.store(0, Ordering::Relaxed);
                return;
            }
            if begin.elapsed() > LOOK_MAX {
                let longer = if pause == 0 { 1 } else { (pause * 2).clamp(PAUSE_MIN, PAUSE_MAX) };
                self.pause.store(longer, Ordering::Relaxed);
                return;
            }
            std::hint::spin_loop();
        }
    }

    fn end(&self) {
        let _state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        self.ended.store(true, Ordering::Relaxed);
        self.turn.notify_all();
        self.awake.end();
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.turns.finish();
    }
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, Read, Write, pipe};
    use std::sync::mpsc::{self, Receiver, Sender};

    use super::*;

    /// Threads that read requests of one byte each, as those of `fuser` do, and say what they have answered.
    struct Served {
        requests: Option<std::io::PipeWriter>,
        answers: Receiver<u8>,
        go_on: Sender<()>,
        threads: Vec<std::thread::JoinHandle<()>>,
    }

    fn serve(threads: usize) -> Served {
        let (reader, writer) = pipe().unwrap();
        let turns = Turns::new(Awake::never());
        turns.set_device(reader.as_fd()).unwrap();
        let (answer, answers) = mpsc::channel();
        let (go_on, wait) = mpsc::channel();
        let wait = Arc::new(Mutex::new(wait));
        let threads = (0..threads)
            .map(|_| {
                let (turns, reader, answer, wait) =
                    (turns.clone(), reader.try_clone().unwrap(), answer.clone(), wait.clone());
                std::thread::spawn(move || event_loop(&turns, reader, &answer, &wait))
            })
            .collect();
        Served { requests: Some(writer), answers, go_on, threads }
    }

    fn event_loop(turns: &Arc<Turns>, mut reader: PipeReader, answer: &Sender<u8>, wait: &Mutex<Receiver<()>>) {
        let mut request = [0];
        while reader.read(&mut request).unwrap() == 1 {
            let _turn = turns.begin(if request[0] == b'L' { Work::Long } else { Work::Quick });
            if request[0] != b'q' {
                // Long work, or quick work that turns out to have to wait.
                waiting::about_to_wait();
                wait.lock().unwrap().recv().unwrap();
            }
            answer.send(request[0]).unwrap();
        }
    }

    impl Served {
        fn ask(&mut self, request: u8) {
            self.requests.as_mut().unwrap().write_all(&[request]).unwrap();
        }

        fn answer(&self) -> u8 {
            self.answers.recv_timeout(Duration::from_secs(20)).expect("an answer")
        }

        /// The session ends.
        fn end(mut self) {
            drop(self.requests.take());
            for thread in self.threads {
                thread.join().unwrap();
            }
        }
    }

    #[test]
    fn requests_are_answered_while_others_wait() {
        for (threads, rounds) in [(2, 1), (2, 40), (4, 40), (16, 3)] {
            let mut served = serve(threads);
            for _ in 0..rounds {
                for slow in *b"Lw" {
                    served.ask(slow);
                    for _ in 0..5 {
                        served.ask(b'q');
                        assert_eq!(served.answer(), b'q');
                    }
                    served.go_on.send(()).unwrap();
                    assert_eq!(served.answer(), slow);
                }
            }
            served.end();
        }
    }

    #[test]
    fn all_threads_end_with_the_session_however_few_requests_there_were() {
        for requests in [0, 1, 2, 15, 16, 17, 100] {
            let mut served = serve(16);
            for _ in 0..requests {
                served.ask(b'q');
                assert_eq!(served.answer(), b'q');
            }
            served.end();
        }
    }
}
