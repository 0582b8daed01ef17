//! What the daemon says of itself.

use std::sync::Weak;

use futures::future::join_all;

use super::stranded::why_not;
use super::volumes::{Daemon, Entry, Phase, VolumeError, with_volume};
use crate::admin::api::{DaemonInfo, LeaseStatus, MemoryStatus, Status, VolumeInfo, VolumeState, VolumeStatus};
use crate::export::nbd::server::Listen;
use crate::lease::Verdict;

impl Daemon {
    /// Who answers.
    pub fn info(&self) -> DaemonInfo {
        let listens = self.listens.get().map(Vec::as_slice).unwrap_or_default();
        DaemonInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            host: self.data.host_hex(),
            data: self.data.path().to_owned(),
            store: crate::store::ObjectStore::describe(self.store.as_ref()),
            nbd_unix: listens.iter().find_map(|listen| match listen {
                Listen::Unix(path) => Some(path.clone()),
                Listen::Tcp(_) => None,
            }),
            nbd_tcp: listens
                .iter()
                .filter_map(|listen| match listen {
                    Listen::Tcp(addr) => Some(*addr),
                    Listen::Unix(_) => None,
                })
                .collect(),
            nvme: self.nvme.get().and_then(Weak::upgrade).map_or_else(Vec::new, |nvme| nvme.listens().to_vec()),
            uptime_seconds: self.started.elapsed().as_secs_f64(),
        }
    }

    /// One volume.
    ///
    /// # Errors
    /// [`VolumeError::Unknown`].
    pub async fn show(&self, name: &str) -> Result<VolumeStatus, VolumeError> {
        self.entry(name)?;
        self.look_at_lease(name).await;
        let entry = self.entry(name)?;
        Ok(self.describe(&self.info(), name, entry).await)
    }

    /// All volumes, and what other hosts' leases say now.
    pub async fn volumes(&self) -> Vec<VolumeStatus> {
        let names: Vec<String> = self.entries().keys().cloned().collect();
        join_all(names.iter().map(|name| self.look_at_lease(name))).await;
        self.status().await.volumes
    }

    /// Everything.
    pub async fn status(&self) -> Status {
        let daemon = self.info();
        let entries = self.entries().clone();
        let volumes = join_all(entries.into_iter().map(|(name, entry)| {
            let daemon = &daemon;
            async move { self.describe(daemon, &name, entry).await }
        }))
        .await;
        let sum = |value: fn(&crate::volume::VolumeStats) -> u64| {
            volumes.iter().filter_map(|volume| volume.stats.as_ref()).map(value).sum()
        };
        let memory = MemoryStatus {
            resident_bytes: resident_bytes(),
            dirty_bytes: sum(|stats| stats.dirty_memory_bytes),
            dirty_limit_bytes: self.config.dirty_memory_size().0,
            cache_bytes: sum(|stats| stats.cache_memory_bytes),
            cache_limit_bytes: self.config.block_cache_size().0,
        };
        Status { store: self.store.counters(), memory, volumes, followed: self.followed(), daemon }
    }

    async fn describe(&self, daemon: &DaemonInfo, name: &str, entry: Entry) -> VolumeStatus {
        let mut info = VolumeInfo { name: name.to_owned(), state: entry.phase.state(), ..Default::default() };
        if let Some(manifest) = entry.manifest {
            info.id = manifest.id.to_string();
            info.nqn = self.nqn(name, manifest.id);
            info.nvme_hosts = self.nvme_hosts(&info.nqn);
            info.size = manifest.size;
            info.durability = manifest.durability.to_string();
            info.codec = manifest.codec.to_string();
            info.chunk_bytes = manifest.chunk_bytes.into();
            info.created_ms = manifest.created_ms;
            info.snapshots = super::snapshots::list(&manifest).filter(|snapshot| !snapshot.hidden).collect();
            info.origin = manifest.origin.as_ref().map(super::snapshots::origin);
            info.encryption = manifest.encryption.map(|encryption| encryption.kdf.to_string());
        }
        info.stranded = entry.stranded;
        info.notice = entry.notice;
        match entry.phase {
            Phase::Open(place) | Phase::Releasing(place) => {
                info.clients = place.reactor.connections(place.key).await.len() as u64;
                let stats = with_volume(&place, |volume| volume.stats()).await;
                VolumeStatus { uris: daemon.nbd_uris(name), info, stats }
            }
            Phase::Fenced(fenced) => {
                info.error = Some(fenced.why);
                let stats = match &fenced.place {
                    Some(place) => with_volume(place, |volume| volume.stats()).await,
                    None => None,
                };
                VolumeStatus { info, stats, ..Default::default() }
            }
            Phase::Elsewhere(elsewhere) => {
                let lease = &elsewhere.lease;
                info.state = match self.verdict(&elsewhere) {
                    Verdict::Held(_) => VolumeState::Held,
                    Verdict::Free | Verdict::Own => VolumeState::Released,
                    Verdict::Expired | Verdict::Watch(_) => VolumeState::Expired,
                };
                info.holder = (info.state != VolumeState::Released).then(|| LeaseStatus {
                    host: uuid::Uuid::from_bytes(lease.host).simple().to_string(),
                    host_name: lease.host_name.clone(),
                    epoch: lease.epoch,
                    since_ms: lease.since_ms,
                    renewed_ms: lease.renewed_ms,
                    until_ms: lease.renewed_ms.saturating_add(lease.duration_ms),
                    bucket_lsn: lease.bucket_lsn,
                    last_lsn: lease.last_lsn,
                    dirty_bytes: lease.dirty_bytes,
                });
                if let Some(stranded) = &info.stranded {
                    (info.state, info.error) = (VolumeState::Fenced, Some(why_not(stranded)));
                }
                VolumeStatus { info, ..Default::default() }
            }
            Phase::Failed(why) | Phase::Locked(why) => {
                info.error = Some(why);
                VolumeStatus { info, ..Default::default() }
            }
            Phase::Closed | Phase::Opening | Phase::Deleting | Phase::Released => {
                VolumeStatus { info, ..Default::default() }
            }
        }
    }
}

/// Resident memory of this process; 0 where `/proc` is not to be had.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages: u64 = statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).unwrap_or(0);
    // SAFETY: sysconf takes no pointers.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    pages * u64::try_from(page).unwrap_or(4096)
}
