//! Which snapshots there are, and those that are open.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use super::numbers::{Number, Numbers};
use super::{SnapshotError, SnapshotInfo, SnapshotSource};
use crate::vfs::{Attributes, FileLocks, Filesystem, OpenOptions, ROOT, Result, Time, Vfs, VfsError};
use crate::waiting::about_to_wait;

/// How long what the source said of its snapshots is taken for true: others make and delete some too.
const FRESH: Duration = Duration::from_secs(2);
/// The same where something asked for was not among them.
const FRESH_MISS: Duration = Duration::from_millis(200);
/// How long a deletion waits for calls that are in the snapshot.
const CALLS_MAX: Duration = Duration::from_secs(10);

/// What snapshots may cost.
#[derive(Clone, Debug)]
pub struct ShelfOptions {
    /// How many are open at a time.
    pub open_max: usize,
    /// How long one stays open that nobody uses.
    pub idle: Duration,
    /// Bytes for metadata blocks of each in memory.
    pub metadata_bytes: usize,
    /// Bytes for contents of files of each in memory.
    pub page_bytes: usize,
    /// Whether what large reads bring is kept in memory.
    pub keeps_read: bool,
}

impl Default for ShelfOptions {
    fn default() -> ShelfOptions {
        ShelfOptions {
            open_max: 8,
            idle: Duration::from_secs(60),
            metadata_bytes: 16 << 20,
            page_bytes: 32 << 20,
            keeps_read: true,
        }
    }
}

/// A snapshot that is there.
struct Known {
    number: Number,
    info: SnapshotInfo,
    /// Its root, once somebody saw it: that never changes.
    root: OnceLock<Attributes>,
    /// Held by who opens it.
    opening: Mutex<()>,
}

struct Opened {
    filesystem: Arc<Filesystem>,
    used: Instant,
}

#[derive(Default)]
struct State {
    known: BTreeMap<Number, Arc<Known>>,
    numbers: Numbers,
    open: HashMap<Number, Opened>,
    /// How often files of them are held.
    holds: HashMap<Number, u64>,
    /// Names that are being deleted.
    leaving: Vec<String>,
    /// When the source was asked last, and why it did not answer.
    asked: Option<Instant>,
    failure: Option<String>,
    /// When it last said something else than before.
    changed: Time,
    closed: bool,
    /// Whether a thread closes what nobody uses.
    watched: bool,
}

/// See the module.
pub struct Shelf {
    source: Arc<dyn SnapshotSource>,
    options: ShelfOptions,
    state: Mutex<State>,
    /// Held by who asks the source.
    asking: Mutex<()>,
    /// Of files in snapshots. They outlive the closing of a snapshot that comes back.
    pub(super) locks: FileLocks,
}

impl Shelf {
    /// Nothing is known yet.
    pub fn new(source: Arc<dyn SnapshotSource>, options: ShelfOptions) -> Arc<Shelf> {
        let state = State { changed: Time::now(), ..State::default() };
        Arc::new(Shelf {
            source,
            options,
            state: Mutex::new(state),
            asking: Mutex::default(),
            locks: FileLocks::default(),
        })
    }

    /// How many snapshots are open.
    pub fn open_count(&self) -> usize {
        self.state().open.len()
    }

    /// All snapshots, in the order of their numbers.
    pub(super) fn list(&self) -> Result<Vec<(Number, String)>> {
        self.refresh(FRESH);
        let state = self.state();
        match &state.failure {
            Some(why) if state.known.is_empty() => Err(VfsError::Io(why.clone())),
            _ => Ok(state.known.values().map(|known| (known.number, known.info.name.clone())).collect()),
        }
    }

    /// How many there are, and when that or one of them last changed.
    pub(super) fn summary(&self) -> (usize, Time) {
        self.refresh(FRESH);
        let state = self.state();
        (state.known.len(), state.changed)
    }

    /// The snapshot of this name.
    pub(super) fn find(&self, name: &[u8]) -> Result<Number> {
        for fresh in [FRESH, FRESH_MISS] {
            self.refresh(fresh);
            let state = self.state();
            if let Some(known) = state.known.values().find(|known| known.info.name.as_bytes() == name) {
                return Ok(known.number);
            }
        }
        match &self.state().failure {
            Some(why) => Err(VfsError::Io(why.clone())),
            None => Err(VfsError::NotFound),
        }
    }

    /// The root of a snapshot, as it is outside.
    pub(super) fn root(self: &Arc<Self>, number: Number) -> Result<Attributes> {
        let known = self.known(number)?;
        if let Some(root) = known.root.get() {
            return Ok(root.clone());
        }
        let root = self.with(number, |filesystem| filesystem.getattr(ROOT))?;
        Ok(known.root.get_or_init(|| number.attributes(root)).clone())
    }

    /// Does something with the tree of a snapshot, opened if it is not.
    ///
    /// # Errors
    /// [`VfsError::Stale`] if it is gone; [`VfsError::Io`] if it cannot be opened.
    pub(super) fn with<T>(self: &Arc<Self>, number: Number, what: impl FnOnce(&Filesystem) -> Result<T>) -> Result<T> {
        let result = self.filesystem(number).and_then(|filesystem| what(&filesystem));
        if let Err(VfsError::Io(_)) = result {
            // Somebody else may have deleted it.
            self.refresh(FRESH_MISS);
            if !self.state().known.contains_key(&number) {
                return Err(VfsError::Stale);
            }
        }
        result
    }

    /// Notes that a file of the snapshot is held.
    pub(super) fn hold(&self, number: Number) {
        *self.state().holds.entry(number).or_default() += 1;
    }

    /// Takes back one [`Shelf::hold`].
    pub(super) fn release(&self, number: Number) {
        let mut state = self.state();
        let Some(count) = state.holds.get_mut(&number) else { return };
        *count -= 1;
        if *count == 0 {
            state.holds.remove(&number);
        }
        if let Some(opened) = state.open.get_mut(&number) {
            opened.used = Instant::now();
        }
    }

    /// What the source has now.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub fn infos(&self) -> std::result::Result<Vec<SnapshotInfo>, SnapshotError> {
        // One at a time, so that what is taken last was asked last.
        let _asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        let listed = self.source.list()?;
        self.take(&listed);
        Ok(listed)
    }

    /// Makes a snapshot of what is durable.
    pub(super) fn create(&self, name: &str) -> std::result::Result<SnapshotInfo, SnapshotError> {
        self.source.create(name)?;
        let made = self.infos()?.into_iter().find(|info| info.name == name);
        made.ok_or_else(|| SnapshotError::Unknown(name.to_owned()))
    }

    /// Closes a snapshot, and deletes it.
    pub(super) fn delete(&self, name: &str) -> std::result::Result<(), SnapshotError> {
        if !self.infos()?.iter().any(|info| info.name == name) {
            return Err(SnapshotError::Unknown(name.to_owned()));
        }
        self.state().leaving.push(name.to_owned());
        let closed = self.put_away(|known| known.info.name == name);
        for filesystem in closed {
            let start = Instant::now();
            while Arc::strong_count(&filesystem) > 1 && start.elapsed() < CALLS_MAX {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let deleted = self.source.delete(name);
        self.state().leaving.retain(|leaving| leaving != name);
        // What could not be deleted is back.
        let _ = self.infos();
        deleted
    }

    /// Closes all of them. Nothing is opened any more.
    pub fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        let open = std::mem::take(&mut state.open);
        drop(state);
        drop(open);
    }

    /// Closes those that nobody used for long enough; whether any is left.
    pub fn close_idle(&self) -> bool {
        let mut state = self.state();
        let State { open, holds, .. } = &mut *state;
        let idle = |number: &Number, opened: &Opened| {
            !holds.contains_key(number) && opened.used.elapsed() >= self.options.idle
        };
        let closed: Vec<_> = open.extract_if(|number, opened| idle(number, opened)).collect();
        let left = !open.is_empty();
        state.watched = left;
        drop(state);
        // Not under the lock: connections end.
        drop(closed);
        left
    }

    fn filesystem(self: &Arc<Self>, number: Number) -> Result<Arc<Filesystem>> {
        if let Some(filesystem) = self.opened(number) {
            return Ok(filesystem);
        }
        let known = self.known(number)?;
        about_to_wait();
        let _opening = known.opening.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(filesystem) = self.opened(number) {
            return Ok(filesystem);
        }
        let filesystem = self.open(&known.info)?;
        let mut state = self.state();
        if state.closed || !state.known.contains_key(&number) {
            return Err(VfsError::Stale);
        }
        let mut closed = Vec::new();
        while state.open.len() >= self.options.open_max.max(1) {
            // Nothing is lost where files are held or locked: both are noted here, and it can be opened again.
            let State { open, holds, .. } = &mut *state;
            let oldest = open.iter().min_by_key(|(number, opened)| (holds.contains_key(number), opened.used));
            let oldest = *oldest.expect("some are open").0;
            closed.extend(open.remove(&oldest));
        }
        state.open.insert(number, Opened { filesystem: filesystem.clone(), used: Instant::now() });
        let watch = !std::mem::replace(&mut state.watched, true);
        drop(state);
        drop(closed);
        if watch {
            self.watch();
        }
        Ok(filesystem)
    }

    fn opened(&self, number: Number) -> Option<Arc<Filesystem>> {
        let mut state = self.state();
        let opened = state.open.get_mut(&number)?;
        opened.used = Instant::now();
        Some(opened.filesystem.clone())
    }

    fn open(&self, info: &SnapshotInfo) -> Result<Arc<Filesystem>> {
        let failed = |why: &dyn std::fmt::Display| {
            tracing::warn!(snapshot = info.name, "a snapshot cannot be opened: {why}");
            VfsError::Io(format!("snapshot {} cannot be opened: {why}", info.name))
        };
        let disk = self.source.open(info).map_err(|error| failed(&error))?;
        let options = OpenOptions {
            read_only: true,
            metadata_bytes: self.options.metadata_bytes,
            page_bytes: self.options.page_bytes,
            keeps_read: self.options.keeps_read,
            commit_every: None,
            access_times: false,
            recovers_holds: false,
        };
        let filesystem = Filesystem::open(disk, &options).map_err(|error| failed(&error))?;
        tracing::info!(snapshot = info.name, "snapshot opened");
        Ok(filesystem)
    }

    /// A snapshot that is there.
    fn known(&self, number: Number) -> Result<Arc<Known>> {
        for _ in 0..2 {
            if let Some(known) = self.state().known.get(&number) {
                return Ok(known.clone());
            }
            self.refresh(FRESH_MISS);
        }
        match &self.state().failure {
            Some(why) => Err(VfsError::Io(why.clone())),
            None => Err(VfsError::Stale),
        }
    }

    /// Asks the source what there is, unless that was done a moment ago.
    fn refresh(&self, fresh: Duration) {
        let is_fresh = || self.state().asked.is_some_and(|asked| asked.elapsed() < fresh);
        if is_fresh() {
            return;
        }
        about_to_wait();
        let _asking = self.asking.lock().unwrap_or_else(PoisonError::into_inner);
        if is_fresh() {
            return;
        }
        match self.source.list() {
            Ok(listed) => self.take(&listed),
            Err(error) => {
                tracing::warn!("snapshots cannot be listed: {error}");
                let mut state = self.state();
                state.asked = Some(Instant::now());
                state.failure = Some(format!("snapshots cannot be listed: {error}"));
            }
        }
    }

    /// Takes what the source has for what there is.
    fn take(&self, listed: &[SnapshotInfo]) {
        let mut state = self.state();
        let numbers = state.numbers.of(listed);
        let mut known = BTreeMap::new();
        for (info, number) in listed.iter().zip(numbers) {
            let Some(number) = number.filter(|_| !state.leaving.contains(&info.name)) else { continue };
            let before = state.known.get(&number).filter(|before| before.info == *info).cloned();
            let new = || Known { number, info: info.clone(), root: OnceLock::new(), opening: Mutex::default() };
            known.insert(number, before.unwrap_or_else(|| Arc::new(new())));
        }
        state.asked = Some(Instant::now());
        state.failure = None;
        let same = known.len() == state.known.len()
            && known.iter().all(|(number, new)| state.known.get(number).is_some_and(|old| Arc::ptr_eq(old, new)));
        if same {
            return;
        }
        // Those who keep what they listed look at this.
        state.changed = Time::now().max(Time(state.changed.0 + 1));
        let mut gone = std::mem::replace(&mut state.known, known);
        gone.retain(|number, old| !state.known.get(number).is_some_and(|new| Arc::ptr_eq(old, new)));
        drop(state);
        drop(self.forget(gone.into_keys().collect()));
    }

    /// Takes snapshots away before their source does; the trees of those that were open.
    fn put_away(&self, which: impl Fn(&Known) -> bool) -> Vec<Arc<Filesystem>> {
        let mut state = self.state();
        let gone: Vec<Number> = state.known.extract_if(.., |_, known| which(known)).map(|(number, _)| number).collect();
        state.changed = Time::now().max(Time(state.changed.0 + 1));
        drop(state);
        self.forget(gone)
    }

    /// Forgets what there was of snapshots that are gone.
    fn forget(&self, gone: Vec<Number>) -> Vec<Arc<Filesystem>> {
        let mut state = self.state();
        let open = gone.iter().filter_map(|number| state.open.remove(number)).map(|opened| opened.filesystem).collect();
        for number in &gone {
            state.holds.remove(number);
        }
        drop(state);
        self.locks.forget_where(|ino| gone.iter().any(|number| number.has(ino)));
        open
    }

    /// Closes what nobody uses, as long as something is open.
    fn watch(self: &Arc<Self>) {
        let (weak, pause): (Weak<Shelf>, _) = (Arc::downgrade(self), self.options.idle / 4);
        let watch = move || {
            loop {
                std::thread::sleep(pause);
                let Some(shelf) = weak.upgrade() else { return };
                if !shelf.close_idle() {
                    return;
                }
            }
        };
        if let Err(error) = std::thread::Builder::new().name("snapshots".to_owned()).spawn(watch) {
            tracing::warn!("no thread to close snapshots that nobody uses: {error}");
            self.state().watched = false;
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
