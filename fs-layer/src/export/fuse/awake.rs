//! Keeping idle processors from sleeping while requests follow each other.
//!
//! A program that waits for an answer leaves its processor with nothing to do. In a virtual machine that processor is then the hypervisor's, and
//! to get it back for the answer takes tens of microseconds: more than the whole request. Linux can be asked, through `/dev/cpu_dma_latency`, that idle
//! processors stay ready: they look for work instead of sleeping. That is asked for here as long as requests come in quick succession, and given up some
//! milliseconds after the last of them; the kernel takes it back by itself when the process ends. It is about all processors of the machine, so it is not done
//! where there are many, nor outside of virtual machines, where waking takes little. Only root may ask for it.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// The most processors that are kept awake.
const PROCESSORS_MAX: usize = 8;
/// So many requests within this time are worth it.
const BURST: u64 = 16;
const BURST_WITHIN: Duration = Duration::from_micros(2500);
/// How often it is looked whether there still are at least [`BURST`] requests.
const LOOK_EVERY: Duration = Duration::from_millis(10);
/// What is asked for, in microseconds: no delay, and any.
const NONE: i32 = 0;
const ANY: i32 = 2_000_000_000;

/// See the module.
#[derive(Debug)]
pub(super) struct Awake(Option<Arc<Asking>>);

#[derive(Debug)]
struct Asking {
    device: File,
    requests: AtomicU64,
    /// When the last burst of requests began, in microseconds since `start`.
    burst: AtomicU64,
    start: Instant,
    /// Whether they are kept awake; a copy of what the mutex holds.
    held: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    held: bool,
    ended: bool,
}

impl Awake {
    /// One that does it where that is of use and possible.
    pub(super) fn new() -> Awake {
        let device = if is_worth_it() {
            OpenOptions::new().write(true).open("/dev/cpu_dma_latency")
        } else {
            return Awake::never();
        };
        match device.and_then(Awake::with) {
            Ok(awake) => awake,
            Err(error) => {
                tracing::debug!(%error, "processors sleep between requests");
                Awake::never()
            }
        }
    }

    /// One that never does it.
    pub(super) fn never() -> Awake {
        Awake(None)
    }

    fn with(device: File) -> std::io::Result<Awake> {
        // Opening it asks for nothing yet, on all kernels that say so; this makes sure.
        (&device).write_all(&ANY.to_ne_bytes())?;
        let asking = Arc::new(Asking {
            device,
            requests: AtomicU64::new(0),
            burst: AtomicU64::new(0),
            start: Instant::now(),
            held: AtomicBool::new(false),
            state: Mutex::default(),
            changed: Condvar::new(),
        });
        let watched = asking.clone();
        std::thread::Builder::new().name("fuse-awake".to_owned()).spawn(move || watched.watch())?;
        Ok(Awake(Some(asking)))
    }

    /// A request came.
    pub(super) fn request(&self) {
        let Some(asking) = &self.0 else { return };
        let requests = asking.requests.fetch_add(1, Ordering::Relaxed) + 1;
        if !requests.is_multiple_of(BURST) || asking.held.load(Ordering::Relaxed) {
            return;
        }
        let now = asking.start.elapsed().as_micros() as u64;
        let began = asking.burst.swap(now, Ordering::Relaxed);
        if now.saturating_sub(began) < BURST_WITHIN.as_micros() as u64 {
            asking.hold();
        }
    }

    /// There will be no more requests.
    pub(super) fn end(&self) {
        if let Some(asking) = &self.0 {
            asking.state.lock().unwrap_or_else(PoisonError::into_inner).ended = true;
            asking.changed.notify_all();
        }
    }
}

impl Drop for Awake {
    fn drop(&mut self) {
        self.end();
    }
}

impl Asking {
    fn hold(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.held || state.ended {
            return;
        }
        state.held = true;
        self.held.store(true, Ordering::Relaxed);
        self.ask(NONE);
        self.changed.notify_all();
    }

    /// Gives it up when requests become rare.
    fn watch(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while !state.ended {
            if !state.held {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let before = self.requests.load(Ordering::Relaxed);
            (state, _) = self.changed.wait_timeout(state, LOOK_EVERY).unwrap_or_else(PoisonError::into_inner);
            if self.requests.load(Ordering::Relaxed) - before < BURST {
                state.held = false;
                self.held.store(false, Ordering::Relaxed);
                self.ask(ANY);
            }
        }
        self.ask(ANY);
    }

    fn ask(&self, microseconds: i32) {
        if let Err(error) = (&self.device).write_all(&microseconds.to_ne_bytes()) {
            tracing::debug!(%error, "the kernel takes no word about sleeping processors");
        }
    }
}

/// Whether this is a virtual machine with few processors, but several.
fn is_worth_it() -> bool {
    static WORTH: OnceLock<bool> = OnceLock::new();
    *WORTH.get_or_init(|| {
        let processors = std::thread::available_parallelism().map_or(1, usize::from);
        (2..=PROCESSORS_MAX).contains(&processors) && is_virtual_machine()
    })
}

fn is_virtual_machine() -> bool {
    let Ok(text) = std::fs::read_to_string("/proc/cpuinfo") else { return false };
    let flags = text.lines().find(|line| line.starts_with("flags"));
    flags.is_some_and(|flags| flags.split_ascii_whitespace().any(|flag| flag == "hypervisor"))
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;

    /// What the device was told last.
    fn told(file: &mut File) -> i32 {
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes).unwrap();
        i32::from_ne_bytes(*bytes.last_chunk().expect("something was told"))
    }

    #[test]
    fn it_is_asked_for_during_a_burst_and_given_up_after_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("device");
        let last = || told(&mut File::open(&path).unwrap());
        let awake = Awake::with(File::create(&path).unwrap()).unwrap();
        for _ in 0..BURST - 1 {
            awake.request();
        }
        assert_eq!(last(), ANY);
        while last() != NONE {
            awake.request();
        }
        let begin = Instant::now();
        while last() != ANY {
            assert!(begin.elapsed() < Duration::from_secs(20), "it was not given up");
            std::thread::sleep(Duration::from_millis(1));
        }
        awake.end();
    }
}
