//! The volumes as NBD clients see them.

use super::volumes::{Daemon, Phase};
use crate::export::nbd::server::{Export, Exports};

impl Exports for Daemon {
    fn list(&self) -> Vec<String> {
        self.open_places().into_iter().map(|(name, _)| name).collect()
    }

    fn refusal(&self, name: &str) -> Option<String> {
        self.locked(name)
    }

    fn find(&self, name: &str) -> Option<Export> {
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
