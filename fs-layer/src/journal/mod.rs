//! The journal of a host slot, and the cache of metadata blocks in front of it.
//!
//! An operation collects its changes in a [`Tx`] of its own, under the locks of its inodes, and publishes them as a whole into the
//! *running* transaction: from then on everybody sees them. Whoever needs them to be durable becomes the leader of a *step*
//! ([`Journal::commit`]), and those who come meanwhile wait for it and share the next one.
//!
//! A step, in the order in which things become durable:
//! 1. The running transaction is taken; operations go on in a new one.
//! 2. These writes are started, none ordered before another: its *record* at the head of the journal; *home* some blocks whose images
//!    earlier records hold, that is records that a flush has covered; the journal's header with a tail that the flush before has made true.
//! 3. One flush. Now the transaction is durable, and with it all data that was written before the step began.
//! 4. What the transaction freed is discarded, at once or by a thread ([`discard`]). The next flush makes that durable.
//! 5. The tail may move over a record when all its blocks are home, all it freed is discarded, and a flush came after both. The new tail
//!    is written to the header in the next step, and the space before it is used again after that step's flush.
//!
//! A record holds, for each changed block, its full image or the byte ranges that differ from the image logged last. The first
//! image after a block was written home is full: a home write that a power cut tore is repaired from the journal alone. A block in
//! the record of a step is not written home in the same step.
//!
//! Data blocks are in the journal only where few of them are synced ([`contents`]); others are written to their addresses. These are never used twice, so a
//! record that survives without the data it points to shows zeros, never anything else, and only until the flush that both wait for.
//!
//! After a failed write or flush the journal is dead: nothing can be changed any more, and no flush is tried again.

mod ahead;
mod cache;
mod commit;
mod contents;
mod discard;
mod header;
mod record;
mod replay;
mod shard;
mod tx;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

pub use cache::BlockCache;
pub use replay::{Replayed, is_settled, replay};
pub use tx::Tx;

use crate::blocks::{BlockKind, Body, ReadBlocks};
use crate::disk::{BlockAddress, Disk};
use crate::file::Page;
use crate::layout::{Geometry, HostBody};
use crate::vfs::{Ino, Result, VfsError};

/// A version of a block.
#[derive(Clone, Debug)]
pub(crate) struct Image {
    pub kind: BlockKind,
    pub version: u64,
    pub body: Arc<Body>,
}

/// What has been changed since the last step began.
#[derive(Default)]
struct Running {
    /// `None`: the block was freed.
    blocks: BTreeMap<BlockAddress, Option<Image>>,
    /// Of data blocks.
    contents: BTreeMap<BlockAddress, Page>,
    freed: Vec<(BlockAddress, u64)>,
}

impl Running {
    fn is_empty(&self) -> bool {
        self.blocks.is_empty() && self.contents.is_empty() && self.freed.is_empty()
    }
}

struct State {
    /// The number of the running transaction.
    sequence: u64,
    running: Running,
    counts: Counts,
    /// The host's slot, but for the counts: the requests that were noted.
    host: Box<HostBody>,
    host_version: u64,
    /// All transactions up to this one are durable.
    durable: u64,
    leader: bool,
    flushes_started: u64,
    /// The number of the last flush that is done.
    flushes_done: u64,
    /// Why nothing can be changed any more.
    dead: Option<String>,
}

/// What is stored.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Blocks, those of inodes too.
    pub blocks: i64,
    /// Files.
    pub files: i64,
}

/// A block whose newest durable image is in the journal only.
struct Logged {
    image: Image,
    /// The record with the full image that later differences start from.
    first: u64,
}

/// What only the leader of a step touches.
struct Log {
    salt: u64,
    generation: u64,
    /// Where the next record goes, in blocks since the journal was begun; its place is this modulo the length.
    head: u64,
    /// The tail that the header on the disk has.
    tail: Tail,
    /// The version of the header on the disk.
    header_version: u64,
    /// Whether both copies of it say that records may hold contents.
    announced: bool,
    /// The records from the tail on.
    records: VecDeque<Record>,
    away: contents::Away,
    logged: BTreeMap<BlockAddress, Logged>,
    by_age: BTreeSet<(u64, BlockAddress)>,
    /// The records of which not all that they freed was discarded when the last flush began.
    discarded: BTreeSet<u64>,
}

/// A place between records: the position and the number of the record there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tail {
    position: u64,
    sequence: u64,
}

/// A record that counts.
struct Record {
    begin: Tail,
    /// The data blocks whose contents it holds.
    contents: Vec<BlockAddress>,
}

/// See the module.
pub struct Journal {
    disk: Arc<dyn Disk>,
    geometry: Geometry,
    slot: u64,
    cache: BlockCache,
    held: contents::Held,
    /// The requests that were noted before this opening.
    noted: Vec<u64>,
    state: Mutex<State>,
    wake: Condvar,
    log: Mutex<Log>,
    discards: discard::Discards,
}

impl Journal {
    /// Goes on where [`replay`] left off.
    pub fn open(
        disk: Arc<dyn Disk>,
        geometry: Geometry,
        slot: u64,
        replayed: &Replayed,
        cache_bytes: usize,
    ) -> Result<Journal> {
        let cache = BlockCache::new(disk.clone(), geometry.fragment(), cache_bytes);
        let image = cache.get(geometry.host(slot), BlockKind::Host)?;
        let image = image.ok_or_else(|| VfsError::Io(format!("host slot {slot} is empty; run `fsd check`")))?;
        let host: HostBody =
            zerocopy::FromBytes::read_from_bytes(&image.body[..]).expect("a host slot has the size of a body");
        let sequence = replayed.next_sequence;
        Ok(Journal {
            disk,
            geometry,
            slot,
            cache,
            held: contents::Held::default(),
            noted: host.known().collect(),
            state: Mutex::new(State {
                sequence,
                running: Running::default(),
                counts: Counts { blocks: host.stored_blocks.get() as i64, files: host.files.get() as i64 },
                host: Box::new(host),
                host_version: image.version,
                durable: sequence - 1,
                leader: false,
                flushes_started: 0,
                flushes_done: 0,
                dead: None,
            }),
            wake: Condvar::new(),
            log: Mutex::new(Log {
                salt: replayed.salt,
                generation: replayed.generation,
                head: 0,
                tail: Tail { position: 0, sequence },
                header_version: replayed.header_version,
                announced: false,
                records: VecDeque::new(),
                away: contents::Away::default(),
                logged: BTreeMap::new(),
                by_age: BTreeSet::new(),
                discarded: BTreeSet::new(),
            }),
            discards: discard::Discards::default(),
        })
    }

    /// Where everything is.
    pub fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The requests of which transactions before this opening noted that they were done ([`Tx::note`]), the last few hundred.
    pub fn noted(&self) -> &[u64] {
        &self.noted
    }

    /// The disk below.
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// What is stored, the running transaction included.
    pub fn counts(&self) -> Counts {
        self.lock().counts
    }

    /// The body of a block, or `None` if it was never written or is freed.
    pub fn find(&self, at: BlockAddress, kind: BlockKind) -> Result<Option<Arc<Body>>> {
        Ok(self.cache.get(at, kind)?.map(|image| image.body))
    }

    /// Some of the inodes of a directory with `count` entries were listed, in any order: these and the others are read together from
    /// now on, if they are close to each other.
    pub fn listed(&self, inodes: impl Iterator<Item = Ino>, count: u64) {
        self.cache.listed(inodes.filter_map(|ino| self.geometry.inode(ino)), count);
    }

    /// Reads inodes ahead of who reads them in order, until [`Journal::end_ahead`]; for a thread of its own.
    pub fn run_ahead(&self) {
        self.cache.run_ahead();
    }

    /// Ends [`Journal::run_ahead`].
    pub fn end_ahead(&self) {
        self.cache.end_ahead();
    }

    /// Fails if nothing can be changed any more.
    pub fn check_alive(&self) -> Result<()> {
        match &self.lock().dead {
            Some(why) => Err(dead(why)),
            None => Ok(()),
        }
    }

    /// Ends all changes: `why` says what failed.
    pub fn kill(&self, why: String) {
        let mut state = self.lock();
        if state.dead.is_none() {
            tracing::error!(why, "the disk failed: nothing can be changed until it is mounted again");
            state.dead = Some(why);
        }
        drop(state);
        self.wake.notify_all();
    }

    /// The number of the transaction that a block was last changed in; 0 if that is home already.
    pub fn changed_in(&self, at: BlockAddress) -> u64 {
        self.cache.changed_in(at)
    }

    /// To be called after data was written: [`Journal::commit`] with it covers that data.
    pub fn ticket(&self) -> u64 {
        self.lock().flushes_started + 1
    }

    /// The number of the transaction that holds everything published until now.
    pub fn newest(&self) -> u64 {
        let state = self.lock();
        if state.running.is_empty() { state.sequence - 1 } else { state.sequence }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReadBlocks for Journal {
    fn read(&self, at: BlockAddress, kind: BlockKind) -> Result<Arc<Body>> {
        self.cache.read(at, kind)
    }
}

fn dead(why: &str) -> VfsError {
    VfsError::Io(format!("nothing can be changed since {why}; mount again"))
}
