//! The volumes as NBD clients and NVMe/TCP hosts see them.

use std::pin::Pin;

use super::volumes::{Daemon, Entry, Phase};
use crate::admin::api::NvmeHost;
use crate::export::nbd::server::{Export, Exports};
use crate::export::nvme;
use crate::export::nvme::server::{Changes, Found, Subsystem, Subsystems};
use crate::types::VolumeId;

impl Exports for Daemon {
    fn list(&self) -> Vec<String> {
        let volumes = self.open_places().into_iter().map(|(name, _)| name);
        volumes.chain(self.view_names()).collect()
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
    fn list(&self) -> Vec<Subsystem> {
        self.entries().iter().filter_map(|(name, entry)| self.subsystem(name, entry)).collect()
    }

    fn find(&self, nqn: &str) -> Found {
        if self.refuse_while_closing().is_err() {
            return Found::NotNow("blockd is shutting down".into());
        }
        let entries = self.entries();
        // One that could not be read may be the one.
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
