//! The renewing of a lease, beside everything else a process does.

use super::*;

/// What passes between a process and the task that renews its lease.
#[derive(Default)]
pub(super) struct Said {
    pub unsent: Unsent,
    pub grant: Option<lease::Grant>,
    pub lost: Option<Lost>,
    release: bool,
    released: Option<bool>,
}

/// The renewing of a lease, beside everything else a process does.
pub(super) struct Renewals {
    pub said: Arc<Mutex<Said>>,
    task: tokio::task::JoinHandle<()>,
}

impl Renewals {
    pub fn start(store: Arc<HostStore>, clocks: Arc<Clocks>, stopped: Arc<AtomicBool>, mut held: Held) -> Self {
        let said: Arc<Mutex<Said>> = Arc::default();
        let task = tokio::spawn({
            let said = said.clone();
            async move {
                loop {
                    tokio::time::sleep(Duration::from_millis(LEASE_MS / 50)).await;
                    if stopped.load(Ordering::Relaxed) {
                        continue;
                    }
                    let (unsent, release) = {
                        let said = said.lock().unwrap();
                        (said.unsent, said.release)
                    };
                    if release {
                        let last =
                            held.write_last(store.as_ref(), LeaseState::Released, Some(unsent), clocks.now().wall_ms);
                        let released = last.await.unwrap_or(false);
                        said.lock().unwrap().released = Some(released);
                        return;
                    }
                    let Order::Renew(number) = held.keeper.tick(clocks.now()) else { continue };
                    let renewing = held.renew(store.as_ref(), Some(unsent), clocks.now().wall_ms);
                    let limit = Duration::from_millis(LEASE_MS / 5);
                    match tokio::time::timeout(limit, renewing).await {
                        Ok(Ok(None)) => {
                            held.keeper.renewed(number, clocks.now());
                            said.lock().unwrap().grant = held.keeper.grant();
                        }
                        Ok(Ok(Some(lost))) => {
                            held.keeper.lose();
                            said.lock().unwrap().lost = Some(lost);
                            return;
                        }
                        Ok(Err(_)) | Err(_) => held.keeper.failed(number, clocks.now()),
                    }
                }
            }
        });
        Self { said, task }
    }

    /// Marks the lease as released; whether that worked.
    pub async fn release(&self, disk: &SimDisk) -> bool {
        self.said.lock().unwrap().release = true;
        loop {
            tokio::time::sleep(Duration::from_millis(2)).await;
            if let Some(released) = self.said.lock().unwrap().released {
                return released;
            }
            if disk.crashed() || self.task.is_finished() {
                return false;
            }
        }
    }

    pub fn stop(&self) {
        self.task.abort();
    }
}
