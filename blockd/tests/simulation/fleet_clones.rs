//! Clones beside their origin: made of its snapshots and of each other's, written to, and deleted in any order, by hosts that
//! crash on the way and whose requests are lost or land late.
//!
//! A clone whose making was not answered may be there or not; its manifest tells. One that is there and may be opened is
//! held by its origin until it is deleted; one that nobody holds is refused. When all are gone nothing is left of any.

use blockd::crypt::Secret;
use blockd::manifest::{Encryption, Kdf, ManifestError, Origin, Snapshot, VolumeState};
use blockd::view::{FollowOptions, Follower};
use blockd::volume::{CloneOrder, Deleted, begin_clone, finish_clone, release_stale, settle_held};
use zeroize::Zeroizing;

use super::*;

/// Clones alive at the same time.
const MOST: usize = 3;

/// A clone, with the host that made it.
struct Kin {
    host: Host,
    /// What it was made of; without a snapshot, of a hidden one.
    source: String,
    snapshot: Option<String>,
    id: VolumeId,
    /// Its deletion was begun.
    deleting: bool,
    /// It was seen that nobody holds for it.
    refused: bool,
}

impl Kin {
    fn name(&self) -> &str {
        &self.host.shared.name
    }
}

/// See the module.
pub(super) struct Family {
    root: Rc<Shared>,
    rng: SmallRng,
    /// Those that are there.
    clones: Vec<Kin>,
    /// Those whose making was tried, and of which nothing has been seen so far.
    begun: Vec<Kin>,
    made: usize,
}

impl Family {
    pub fn new(root: Rc<Shared>, rng: SmallRng) -> Self {
        Self { root, rng, clones: Vec::new(), begun: Vec::new(), made: 0 }
    }

    /// One thing after the other, until the world ends.
    pub async fn live(mut self) -> Self {
        while !self.root.over.get() {
            let idle = self.rng.random_range(20..300);
            tokio::time::sleep(Duration::from_millis(idle)).await;
            self.adopt().await;
            match self.rng.random_range(0..10) {
                0..=4 if self.clones.len() < MOST => self.make().await,
                5 | 6 => self.delete_one().await,
                _ => self.use_one().await,
            }
        }
        self
    }

    /// Looks which clones have come to be.
    pub async fn adopt(&mut self) {
        for mut kin in std::mem::take(&mut self.begun) {
            let bucket = self.root.bucket.clone();
            let found = match manifest::load(bucket.as_ref(), kin.name()).await {
                Ok((found, _)) if found.state == VolumeState::Active => found,
                Ok(_) | Err(ManifestError::NotFound(_)) => {
                    self.begun.push(kin);
                    continue;
                }
                Err(error) => panic!("clone {}: {error}", kin.name()),
            };
            let origin = found.origin.as_ref().expect("it is a clone");
            if is_held(&bucket, origin, found.id).await {
                self.clones.push(kin);
                continue;
            }
            // Its making was given up, and landed all the same.
            if !std::mem::replace(&mut kin.refused, true) {
                kin.host.plan.set_rates(FaultRates::default());
                kin.host.plan.set_outage(Outage::None);
                kin.host.disk.crash_after(None);
                kin.host.goes_back = 0.0;
                assert!(kin.host.open(true).await.is_none(), "clone {} is opened and not held", kin.name());
                self.root.count("not held");
            }
            self.begun.push(kin);
        }
        for kin in self.clones.iter().filter(|kin| !kin.deleting) {
            let (manifest, _) = manifest::load(self.root.bucket.as_ref(), kin.name()).await.expect("it is there");
            let origin = manifest.origin.as_ref().expect("it is a clone");
            assert!(is_held(&self.root.bucket, origin, manifest.id).await, "clone {} is not held", kin.name());
        }
    }

    /// Makes a clone of something, or tries once more.
    async fn make(&mut self) {
        let again = self.begun.iter().position(|kin| !kin.refused).filter(|_| self.rng.random_bool(0.5));
        let kin = match again {
            Some(at) => Some(self.begun.remove(at)),
            None => self.begin().await,
        };
        if let Some(mut kin) = kin {
            if kin.snapshot.is_some() {
                // As whoever says the same again; the hold may say that it has another.
                kin.id = VolumeId(self.rng.random());
            }
            self.try_make(&mut kin).await;
            self.begun.push(kin);
        }
    }

    async fn begin(&mut self) -> Option<Kin> {
        let living = self.clones.iter().filter(|kin| !kin.deleting).map(|kin| kin.host.shared.clone());
        let sources: Vec<Rc<Shared>> = std::iter::once(self.root.clone()).chain(living).collect();
        let source = sources[self.rng.random_range(0..sources.len())].clone();
        let manifest = source.manifest().await;
        let order = source.orders.borrow_mut().pop();
        let snapshot = match &order {
            Some(order) => manifest.snapshots.iter().find(|s| s.holds.iter().any(|hold| hold == order)),
            None => {
                let shown: Vec<&Snapshot> = manifest.snapshots.iter().filter(|s| !s.hidden).collect();
                (!shown.is_empty()).then(|| shown[self.rng.random_range(0..shown.len())])
            }
        }?;
        let name = order.as_ref().map_or_else(|| format!("c{}", source.value()), |order| order.name.clone());
        let shared = Rc::new(source.of_clone(&manifest, snapshot, name));
        self.made += 1;
        let mut host = Host::new(10 + self.made, shared, &mut self.rng);
        (host.steps, host.goes_back) = (20..200, 0.1);
        let id = order.as_ref().map_or(VolumeId([0; 16]), |order| order.volume);
        let snapshot = order.is_none().then(|| snapshot.name.clone());
        Some(Kin { host, source: source.name.clone(), snapshot, id, deleting: false, refused: false })
    }

    /// One attempt, which may end anywhere.
    async fn try_make(&mut self, kin: &mut Kin) {
        let keys = self.root.keys.as_ref();
        let rates = kin.host.trouble_ahead();
        kin.host.plan.set_rates(rates);
        kin.host.plan.set_outage(Outage::None);
        kin.host.disk.crash_after(None);
        let store = kin.host.store();
        let order = CloneOrder {
            source: &kin.source,
            snapshot: kin.snapshot.as_deref(),
            name: kin.name(),
            id: kin.id,
            now_ms: kin.host.clocks.now().wall_ms,
            keys,
        };
        let pause = Duration::from_millis([0, 0, 0, self.rng.random_range(0..1_000)][self.rng.random_range(0..4)]);
        let nonce = self.rng.random();
        let making = async {
            let begun = begin_clone(store.as_ref(), &order).await?;
            tokio::time::sleep(pause).await;
            let secret = Secret::KeyFile(Zeroizing::new([7; 32]));
            let encryption = keys.map(|keys| Encryption::wrap_with(keys, &secret, begun.id, Kdf::KeyFile, nonce));
            finish_clone(store.as_ref(), &order, &begun, encryption).await
        };
        let made = crashing(&mut self.rng, making).await;
        match made {
            None => self.root.count("clone crashed"),
            Some(Ok(manifest)) => {
                let origin = manifest.origin.as_ref().expect("it is a clone");
                assert!(is_held(&self.root.bucket, origin, manifest.id).await, "a clone is answered and not held");
                self.root.count("cloned");
            }
            Some(Err(error)) => {
                let text = error.to_string();
                let expected = ["injected", "damaged", "no snapshot", "exists already", "changed", "being deleted"];
                // A clone that was to be cloned may have been deleted since.
                let gone = format!("no volume named \"{}\"", kin.source);
                assert!(expected.iter().any(|e| text.contains(e)) || text.contains(&gone), "cloning failed: {text}");
                self.root.count("not cloned");
            }
        }
        kin.host.processes.fetch_add(1, Ordering::Relaxed);
    }

    /// A host serves a clone for a while.
    async fn use_one(&mut self) {
        let mut living: Vec<&mut Kin> = self.clones.iter_mut().filter(|kin| !kin.deleting).collect();
        if !living.is_empty() {
            let at = self.rng.random_range(0..living.len());
            living[at].host.process().await;
            self.root.count("clone used");
        }
    }

    /// Deletes a clone, or goes on with one whose deletion was interrupted.
    async fn delete_one(&mut self) {
        if self.clones.is_empty() {
            return;
        }
        let begun = self.clones.iter().position(|kin| kin.deleting);
        let at = begun.unwrap_or_else(|| self.rng.random_range(0..self.clones.len()));
        let kin = &mut self.clones[at];
        kin.deleting = true;
        kin.host.shared.snapshots.borrow_mut().clear();
        // What its last process sent has landed: later, nobody would find it.
        tokio::time::sleep(2 * LATEST).await;
        let rates = kin.host.trouble_ahead();
        kin.host.plan.set_rates(rates);
        kin.host.plan.set_outage(Outage::None);
        kin.host.disk.crash_after(None);
        let store = kin.host.store();
        let deleted = crashing(&mut self.rng, delete_volume(store.as_ref(), &mut kin.host)).await;
        kin.host.processes.fetch_add(1, Ordering::Relaxed);
        match deleted {
            None => self.root.count("deletion crashed"),
            Some(Ok(deleted)) => {
                let there = manifest::load(self.root.bucket.as_ref(), kin.name()).await;
                assert!(matches!(there, Err(ManifestError::NotFound(_))), "{} is deleted: {there:?}", kin.name());
                self.root.count(if deleted == Deleted::Held { "clone held" } else { "clone deleted" });
                self.clones.remove(at);
            }
            Some(Err(OpenError::Manifest { source: ManifestError::NotFound(_), .. })) => {
                self.clones.remove(at);
            }
            Some(Err(error)) => {
                let text = error.to_string();
                assert!(["injected", "damaged", "changed"].iter().any(|e| text.contains(e)), "deleting failed: {text}");
            }
        }
    }

    /// Deletes all clones in any order, in peace.
    pub async fn delete_clones(&mut self) {
        self.delete(|name| name != NAME).await;
        let origin = self.root.manifest().await.id;
        for key in self.root.bucket.keys() {
            let own = key.contains(&origin.to_string()) || key.starts_with(&format!("volumes/{NAME}/"));
            assert!(own || is_lease(&key), "{key} is left of a clone");
        }
    }

    /// Deletes all that is left in any order; nothing stays.
    pub async fn delete_all(&mut self) {
        self.delete(|_| true).await;
        let left: Vec<String> = self.root.bucket.keys().into_iter().filter(|key| !is_lease(key)).collect();
        assert!(left.is_empty(), "left when all volumes are deleted: {left:?}");
    }

    async fn delete(&mut self, wanted: impl Fn(&str) -> bool) {
        let bucket = self.root.bucket.clone();
        // Also those that are half deleted, or half made.
        let mut names = manifest::list(bucket.as_ref()).await.unwrap();
        names.retain(|name| wanted(name));
        while !names.is_empty() {
            let name = names.swap_remove(self.rng.random_range(0..names.len()));
            let shared = self.member(&name).unwrap_or_else(|| self.root.named(&name));
            let mut host = Host::new(200, shared, &mut self.rng);
            // What a deletion of another lets go of may be the last of this one.
            match delete_volume(bucket.as_ref(), &mut host).await {
                Ok(_) | Err(OpenError::Manifest { source: ManifestError::NotFound(_), .. }) => {}
                Err(error) => panic!("volume {name} cannot be deleted: {error}"),
            }
            self.clones.retain(|kin| kin.name() != name);
            let root = (name != NAME && names.iter().any(|left| left == NAME)).then_some(&self.root);
            let living = self.clones.iter().filter(|kin| !kin.deleting).map(|kin| &kin.host.shared);
            for shared in root.into_iter().chain(living) {
                check(shared).await;
            }
        }
        for key in bucket.keys() {
            let Some(id) = key.strip_prefix("held/") else { continue };
            let id = VolumeId(*uuid::Uuid::parse_str(id).expect("a volume's identity").as_bytes());
            settle_held(bucket.as_ref(), id, self.root.keys.as_ref()).await.unwrap();
        }
        // What was half made of what is gone.
        for name in manifest::list(bucket.as_ref()).await.unwrap() {
            assert!(!wanted(&name), "{name} is there again");
        }
    }

    fn member(&self, name: &str) -> Option<Rc<Shared>> {
        self.clones.iter().chain(&self.begun).find(|kin| kin.name() == name).map(|kin| kin.host.shared.clone())
    }
}

impl Shared {
    /// The same world with another volume in it.
    fn named(&self, name: &str) -> Rc<Shared> {
        Rc::new(Shared {
            name: name.to_owned(),
            bucket: self.bucket.clone(),
            durability: self.durability,
            keys: self.keys.clone(),
            tuning: self.tuning,
            start: self.start,
            strict: self.strict,
            histories: RefCell::default(),
            promised: RefCell::default(),
            snapshots: RefCell::default(),
            resets: RefCell::default(),
            wanted: RefCell::default(),
            orders: RefCell::default(),
            holder: Cell::new(usize::MAX),
            over: self.over.clone(),
            next_value: self.next_value.clone(),
            counts: self.counts.clone(),
        })
    }

    /// What is known of a clone of this snapshot.
    fn of_clone(&self, manifest: &Manifest, snapshot: &Snapshot, name: String) -> Shared {
        let state = Rc::new(self.snapshot_state(manifest, snapshot));
        let mut history = History::default();
        if snapshot.seq > 0 {
            history = self.histories.borrow()[&manifest.epoch_of(snapshot.seq)].borrow().clone();
            history.truncate(snapshot.lsn);
        }
        let clone = Rc::into_inner(self.named(&name)).expect("it was just made");
        clone.histories.borrow_mut().insert(0, Rc::new(RefCell::new(history)));
        if snapshot.seq > 0 {
            clone.resets.borrow_mut().push(Reset { lsn: snapshot.lsn, seq: 0, epoch: 0, state });
        }
        clone
    }

    /// Lets go of holds that are nobody's, of the snapshots wanted.
    pub(super) async fn release_stale(&self, store: &dyn ObjectStore, wanted: impl Fn(&Snapshot) -> bool) {
        let Ok((manifest, _)) = manifest::open(store, &self.name, self.keys.as_ref()).await else { return };
        for snapshot in manifest.snapshots.iter().filter(|snapshot| wanted(snapshot)) {
            if release_stale(store, &manifest, snapshot, self.keys.as_ref()).await.is_ok() {
                self.count("holds looked at");
            }
        }
    }
}

/// What a host does to delete a volume.
async fn delete_volume(store: &dyn ObjectStore, host: &mut Host) -> Result<Deleted, OpenError> {
    let shared = host.shared.clone();
    let (name, keys) = (shared.name.as_str(), shared.keys.as_ref());
    let error = |source| OpenError::Manifest { name: name.to_owned(), source };
    let (manifest, _) = manifest::load(store, name).await.map_err(error)?;
    let wanted = host.wanted_lease(&manifest);
    let clocks = host.clocks.clone();
    match lease::acquire(store, name, wanted, None, true, &move || clocks.now()).await {
        Ok(_) => {}
        Err(AcquireError::Lease(error)) => return Err(error.into()),
        Err(AcquireError::Held { .. }) => unreachable!("it is taken by force"),
    }
    for snapshot in &manifest.snapshots {
        release_stale(store, &manifest, snapshot, keys).await?;
    }
    let last_epoch = manifest.epochs.last().map_or(0, |last| last.epoch);
    blockd::volume::delete(store, name, last_epoch, keys, |_, _| {}).await
}

/// Runs `work` to its end, or until a crash comes between two of its requests.
async fn crashing<T>(rng: &mut SmallRng, work: impl Future<Output = T>) -> Option<T> {
    let crash = rng.random_bool(0.4).then(|| Duration::from_micros(rng.random_range(0..8_000)));
    let crashed = async {
        match crash {
            Some(after) => tokio::time::sleep(after).await,
            None => std::future::pending().await,
        }
    };
    tokio::select! {
        biased;
        done = work => Some(done),
        () = crashed => None,
    }
}

/// Whether a clone's origin, or what is left of it, holds for it.
async fn is_held(bucket: &Arc<MemoryStore>, origin: &Origin, clone: VolumeId) -> bool {
    let holds = |m: &Manifest| m.snapshots.iter().any(|s| s.holds.iter().any(|hold| hold.volume == clone));
    match manifest::load(bucket.as_ref(), &origin.name).await {
        Ok((found, _)) if found.id == origin.volume => holds(&found),
        _ => manifest::load_held(bucket.as_ref(), origin.volume).await.unwrap().is_some_and(|(found, _)| holds(&found)),
    }
}

/// An attempt to take a volume that is gone meanwhile may land late; the next volume of the name takes its place.
fn is_lease(key: &str) -> bool {
    key.starts_with("volumes/") && key.ends_with("/lease")
}

/// Reads a volume and its snapshots, as a host would that has nothing but the bucket.
async fn check(shared: &Rc<Shared>) {
    let manifest = shared.manifest().await;
    shared.learn(&manifest);
    let follower = Follower::open(FollowOptions {
        store: shared.bucket.clone(),
        name: shared.name.clone(),
        home: Box::new(|_| TableHome::Memory(MemKv::new())),
        donor: None,
        frame_cache: None,
        blocking: Blocking::Inline,
        keys: shared.keys.clone(),
    });
    let follower = follower.await.unwrap_or_else(|e| panic!("volume {} cannot be read: {e}", shared.name));
    let reached = follower.sight().table().applied();
    let (bytes, _) = follower.sight().read(0, (SECTORS * SECTOR) as u32).await.expect("nothing of it was deleted");
    let found: Vec<Value> = bytes.chunks(SECTOR).map(value_of).collect();
    let at = follower.sight().table().position();
    let expected = match reached.seq {
        0 => vec![0; SECTORS],
        seq => {
            let history = shared.histories.borrow()[&manifest.epoch_of(seq)].clone();
            shared.state(&history.borrow(), reached.lsn, |reset| reset.is_before(at))
        }
    };
    assert!(found == expected, "volume {} is not what it was, at {reached:?}", shared.name);
    shared.check_snapshots().await;
    shared.count("checked");
}
