//! What a simulation does with its bucket from outside: making the volume, and reading snapshots.

use std::sync::Arc;

use blockd::crypt::{Keys, Secret};
use blockd::manifest::{self, Encryption, Kdf, Manifest, Snapshot};
use blockd::store::MemoryStore;
use blockd::table::{MemKv, TableHome};
use blockd::view::{Sight, SightOptions};
use blockd::volume::Blocking;
use rand::Rng;
use rand::rngs::SmallRng;
use zeroize::Zeroizing;

use super::model::{SECTOR, Value, value_of};

/// Makes the volume, encrypted as likely as said; its keys if it is.
pub async fn make_volume(
    bucket: &MemoryStore,
    mut manifest: Manifest,
    rng: &mut SmallRng,
    encrypted: f64,
) -> Option<Keys> {
    let keys = rng.random_bool(encrypted).then(|| Keys::new(&rng.random()));
    if let Some(keys) = &keys {
        // A key file, because stretching a passphrase takes longer than a seed.
        let secret = Secret::KeyFile(Zeroizing::new([7; 32]));
        let wrapped = Encryption::wrap_with(keys, &secret, manifest.id, Kdf::KeyFile, rng.random());
        manifest.encrypt(keys, wrapped);
    }
    manifest::create(bucket, &manifest).await.unwrap();
    keys
}

/// What a host reads of a snapshot that has nothing but the bucket; the first `sectors` of it.
pub async fn read_snapshot(
    bucket: &Arc<MemoryStore>,
    manifest: &Manifest,
    snapshot: &Snapshot,
    keys: Option<Keys>,
    sectors: usize,
) -> Result<Vec<Value>, String> {
    let sight = Sight::open(SightOptions {
        store: bucket.clone(),
        volume: manifest.id,
        checkpoint: snapshot.checkpoint,
        home: TableHome::Memory(MemKv::new()),
        donor: None,
        frame_cache: None,
        blocking: Blocking::Inline,
        keys,
    });
    let sight = sight.await.map_err(|e| format!("it cannot be opened: {e}"))?;
    let (bytes, _) = sight.read(0, (sectors * SECTOR) as u32).await.map_err(|e| format!("it cannot be read: {e}"))?;
    Ok(bytes.chunks(SECTOR).map(value_of).collect())
}
