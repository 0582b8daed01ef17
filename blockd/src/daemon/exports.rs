//! The volumes as NBD clients see them.

use std::pin::Pin;

use super::volumes::{Daemon, Phase};
use crate::export::nbd::server::{Export, Exports};

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
