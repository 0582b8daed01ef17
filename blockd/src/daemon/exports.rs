//! The volumes and their snapshots as NBD clients and NVMe/TCP hosts see them.

use std::pin::Pin;

use super::volumes::{Daemon, Entry, Phase};
use crate::admin::api::NvmeHost;
use crate::export::nbd::server::{Export, Exports};
use crate::export::nvme;
use crate::export::nvme::namespace::Namespace;
use crate::export::nvme::server::{Changes, Found, Listed, Subsystem, Subsystems};
use crate::manifest::SnapshotId;
use crate::types::VolumeId;

impl Exports for Daemon {
    fn list(&self) -> Vec<String> {
        let volumes = self.open_places().into_iter().map(|(name, _)| name);
        volumes.chain(self.view_names()).collect()
    }

    fn describe(&self, name: &str) -> String {
        match super::views::split(name) {
            Some((volume, snapshot)) => self.describe_view(volume, snapshot),
            None => Exports::find(self, name).map_or_else(String::new, |export| export.description),
        }
    }

    fn refusal(&self, name: &str) -> Option<String> {
        self.locked(name).or_else(|| self.view_refusal(name))
    }

    fn prepare<'a>(&'a self, name: &'a str) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(self.prepare_view(name))
    }

    fn find(&self, name: &str) -> Option<Export> {
        if super::views::split(name).is_some() {
            return self.find_view(name);
        }
        let entry = self.entries().get(name)?.clone();
        let (Phase::Open(place), Some(manifest)) = (entry.phase, entry.manifest) else { return None };
        Some(Export {
            name: manifest.name,
            description: format!("blockd volume {}, durability {}", manifest.id, manifest.durability),
            size: manifest.size,
            read_only: false,
            reactor: place.reactor,
            key: place.key,
        })
    }
}

impl Subsystems for Daemon {
    fn list(&self) -> Vec<Listed> {
        let mut listed = Vec::new();
        for (name, entry) in self.entries().iter() {
            let Some(manifest) = &entry.manifest else { continue };
            let hosts: Option<std::sync::Arc<[String]>> = self.config.nvme_hosts(name).map(Into::into);
            if let Phase::Open(_) = entry.phase {
                listed.push(Listed { nqn: self.nqn(name, manifest.id), hosts: hosts.clone() });
            }
            let shown = !self.config.nvme_hide_snapshots;
            let snapshots = manifest.snapshots.iter().filter(|snapshot| shown && !snapshot.hidden);
            listed.extend(snapshots.map(|snapshot| Listed { nqn: snapshot_nqn(snapshot.id), hosts: hosts.clone() }));
        }
        listed
    }

    fn prepare<'a>(&'a self, nqn: &'a str) -> Pin<Box<dyn Future<Output = ()> + Send + 'a>> {
        Box::pin(async move {
            if let Some(snapshot) = self.snapshot_called(nqn) {
                self.prepare_view(&snapshot.export()).await;
            }
        })
    }

    fn find(&self, nqn: &str) -> Found {
        if self.refuse_while_closing().is_err() {
            return Found::NotNow("blockd is shutting down".into());
        }
        let entries = self.entries();
        // One that could not be read may be the one, or that of the snapshot.
        let mut unread = None;
        for (name, entry) in entries.iter() {
            let found = match &entry.manifest {
                Some(manifest) => self.nqn(name, manifest.id) == nqn,
                None => self.config.nvme_nqn.iter().any(|given| given.volume == *name && given.nqn == nqn),
            };
            if entry.manifest.is_none() {
                unread = Some(name);
            }
            if found {
                return match self.subsystem(name, entry) {
                    Some(subsystem) => Found::Open(Box::new(subsystem)),
                    None => Found::NotNow(format!("volume {name:?} is {}", entry.phase.state().as_str())),
                };
            }
        }
        let unread = unread.cloned();
        drop(entries);
        if let Some(snapshot) = self.snapshot_called(nqn) {
            return self.find_snapshot(nqn, &snapshot);
        }
        match unread {
            Some(name) => Found::NotNow(format!("volume {name:?} could not be read, and may be the one")),
            None => Found::Unknown,
        }
    }

    fn changes(&self) -> &Changes {
        &self.changes
    }
}

impl Daemon {
    /// A volume's name among NVMe/TCP hosts.
    pub(super) fn nqn(&self, name: &str, id: VolumeId) -> String {
        let given = self.config.nvme_nqn.iter().find(|given| given.volume == name);
        given.map_or_else(|| nvme::default_nqn(id), |given| given.nqn.clone())
    }

    fn subsystem(&self, name: &str, entry: &Entry) -> Option<Subsystem> {
        let (Phase::Open(place), Some(manifest)) = (&entry.phase, &entry.manifest) else { return None };
        Some(Subsystem {
            nqn: self.nqn(name, manifest.id),
            name: name.to_owned(),
            id: manifest.id,
            size: manifest.size,
            read_only: false,
            hosts: self.config.nvme_hosts(name).map(Into::into),
            namespace: place.namespace.clone(),
            reactor: place.reactor.clone(),
            key: place.key,
        })
    }

    /// The snapshot that hosts call `nqn`, if this daemon knows of it.
    fn snapshot_called(&self, nqn: &str) -> Option<KnownSnapshot> {
        let id = nvme::id_in_nqn(nqn)?.0;
        let entries = self.entries();
        let manifests = entries.iter().filter_map(|(name, entry)| Some((name, entry.manifest.as_ref()?)));
        let mut all = manifests.flat_map(|(name, manifest)| manifest.snapshots.iter().map(move |s| (name, s)));
        let (volume, snapshot) = all.find(|(_, snapshot)| !snapshot.hidden && snapshot.id == id)?;
        Some(KnownSnapshot { volume: volume.clone(), name: snapshot.name.clone(), id })
    }

    fn find_snapshot(&self, nqn: &str, snapshot: &KnownSnapshot) -> Found {
        let name = snapshot.export();
        // Another one may have been given its name.
        let export = self.find_view(&name).filter(|_| self.view_shows(&name, snapshot.id));
        let Some(export) = export else {
            return Found::NotNow(self.view_refusal(&name).unwrap_or_else(|| format!("snapshot {name} is not open")));
        };
        let id = VolumeId(snapshot.id);
        Found::Open(Box::new(Subsystem {
            nqn: nqn.to_owned(),
            name,
            id,
            size: export.size,
            read_only: true,
            hosts: self.config.nvme_hosts(&snapshot.volume).map(Into::into),
            // There is nothing to reserve where nobody writes.
            namespace: Namespace::transient(id),
            reactor: export.reactor,
            key: export.key,
        }))
    }

    /// The hosts connected to a subsystem.
    pub(super) fn nvme_hosts(&self, nqn: &str) -> Vec<NvmeHost> {
        let Some(server) = self.nvme.get().and_then(std::sync::Weak::upgrade) else { return Vec::new() };
        let hosts = server.controllers(nqn).into_iter().map(|(host, peer, queues)| NvmeHost {
            nqn: host.nqn,
            id: uuid::Uuid::from_bytes(host.id).to_string(),
            peer,
            queues: queues as u64,
        });
        hosts.collect()
    }
}

/// A snapshot's name among NVMe/TCP hosts: made from its identity, like a volume's.
pub(super) fn snapshot_nqn(id: SnapshotId) -> String {
    nvme::default_nqn(VolumeId(id))
}

struct KnownSnapshot {
    volume: String,
    name: String,
    id: SnapshotId,
}

impl KnownSnapshot {
    /// The name of its view.
    fn export(&self) -> String {
        format!("{}@{}", self.volume, self.name)
    }
}
