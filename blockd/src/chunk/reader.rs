//! Reading blocks that are in the bucket.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt;
use futures::future::join_all;
use futures::stream::FuturesUnordered;
use tokio::time::Instant;

use super::error::ReadError;
use super::fetch::{self, Group};
use super::flight::{Claim, Flight, Flights};
use super::plan::{Need, Plan};
use crate::cache::{FrameCache, FrameKey};
use crate::crypt::Keys;
use crate::store::ObjectStore;
use crate::table::{Mapped, Table, TableError};
use crate::types::{BLOCK, Lba, VolumeId};

/// Requests of one read that are under way at the same time.
const PARALLEL_REQUESTS: usize = 8;
/// How long a read waits for a store that is away.
const DEADLINE: Duration = Duration::from_secs(30);

/// Reads a volume's blocks through its table, the frame cache and the store. Share it by `Arc`: readers who need the
/// same frame at the same time then share one request.
pub struct BlockReader {
    volume: VolumeId,
    table: Arc<Table>,
    store: Arc<dyn ObjectStore>,
    cache: Option<FrameCache>,
    flights: Flights,
    deadline: Duration,
    keys: Option<Keys>,
}

/// Frames this read must fetch, each with the duty to share it.
type Fetches<'a> = Vec<(Need, Flight<'a>)>;

impl BlockReader {
    /// A reader of `volume`. Store failures that may pass are waited out for 30 seconds.
    pub fn new(volume: VolumeId, table: Arc<Table>, store: Arc<dyn ObjectStore>, cache: Option<FrameCache>) -> Self {
        Self { volume, table, store, cache, flights: Flights::default(), deadline: DEADLINE, keys: None }
    }

    /// Decrypts with the keys of the volume; without, nothing encrypted can be read, and with them nothing else.
    pub fn with_keys(mut self, keys: Option<Keys>) -> Self {
        self.keys = keys;
        self
    }

    /// Waits this long for a store that is away.
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// Fills `out`, whole blocks, from `lba` on. Returns the ranges without data (first block relative to `lba`,
    /// number of blocks), in order, neighbours joined; they are zeroes in `out`. After an error `out` holds anything.
    ///
    /// Runs lookups and decoding on the calling thread: call it on ordinary tokio threads.
    pub async fn read(&self, lba: Lba, out: &mut [u8]) -> Result<Vec<(u64, u64)>, ReadError> {
        assert!(out.len().is_multiple_of(BLOCK), "reads are of whole blocks");
        let blocks = (out.len() / BLOCK) as u64;
        let mut mapped = self.table.lookup(lba, blocks)?;
        loop {
            let gone = match self.read_mapped(lba, &mapped, out).await {
                Err(error @ (ReadError::Missing { .. } | ReadError::Table(TableError::Unlisted { .. }))) => error,
                other => return other,
            };
            // Compaction may have moved the blocks after they were looked up, and the chunk been deleted since.
            let again = self.table.lookup(lba, blocks)?;
            if again == mapped {
                return Err(gone);
            }
            mapped = again;
        }
    }

    /// As [`Self::read`], for blocks that were looked up already: `mapped` covers all of `out`, which begins with block
    /// `lba`.
    pub async fn read_mapped(&self, lba: Lba, mapped: &[Mapped], out: &mut [u8]) -> Result<Vec<(u64, u64)>, ReadError> {
        let Plan { mut needs, zeroes } = Plan::new(&self.table, lba, mapped)?;
        for (first, blocks) in &zeroes {
            out[*first as usize * BLOCK..][..*blocks as usize * BLOCK].fill(0);
        }
        let deadline = Instant::now() + self.deadline;
        // More than one round only when somebody else's fetch that this read waited for came to nothing.
        while !needs.is_empty() {
            needs = self.take_cached(needs, out).await;
            let (mut mine, mut theirs): (Fetches, Vec<_>) = (Vec::new(), Vec::new());
            for need in needs {
                match self.flights.claim(need.key()) {
                    Claim::Mine(flight) => mine.push((need, flight)),
                    Claim::Theirs(waiter) => theirs.push((need, waiter)),
                }
            }
            // One's own first: two reads that wait for each other would otherwise wait forever.
            self.fetch(mine, lba, out, deadline).await?;
            needs = Vec::new();
            for (need, waiter) in theirs {
                match waiter.wait().await {
                    Some(stored) if need.deliver(&stored, self.keys.as_ref(), out) => {}
                    _ => needs.push(need),
                }
            }
        }
        Ok(zeroes)
    }

    /// Delivers what the cache has; returns the rest.
    async fn take_cached(&self, needs: Vec<Need>, out: &mut [u8]) -> Vec<Need> {
        let Some(cache) = &self.cache else {
            return needs;
        };
        let keys: Vec<FrameKey> = needs.iter().map(Need::key).collect();
        let found: Vec<Option<Bytes>> = match &keys[..] {
            [key] => vec![cache.get(key).await],
            // At once, because those on the cache's disk take a while each.
            keys => join_all(keys.iter().map(|key| cache.get(key))).await,
        };
        let mut missing = Vec::new();
        for (need, found) in needs.into_iter().zip(found) {
            match found {
                Some(stored) if need.deliver(&stored, self.keys.as_ref(), out) => {}
                Some(_) => {
                    let key = need.key();
                    tracing::warn!(chunk = %key.chunk, frame = key.frame, "a cached frame does not match its checksum; fetching it again");
                    cache.remove_rotten(&key);
                    missing.push(need);
                }
                None => missing.push(need),
            }
        }
        missing
    }

    /// Fetches and delivers `mine`, sorted by chunk and frame.
    async fn fetch(&self, mine: Fetches<'_>, lba: Lba, out: &mut [u8], deadline: Instant) -> Result<(), ReadError> {
        let mut groups = fetch::group(mine.iter().map(|(need, _)| need)).into_iter();
        let request = |group: Group| async move {
            let frames = fetch::fetch(&*self.store, &group, deadline).await;
            frames.map(|frames| (group, frames))
        };
        let mut running: FuturesUnordered<_> = groups.by_ref().take(PARALLEL_REQUESTS).map(request).collect();
        let mut waiting: BTreeMap<FrameKey, (Need, Flight<'_>)> =
            mine.into_iter().map(|(need, flight)| (need.key(), (need, flight))).collect();
        while let Some(result) = running.next().await {
            let (group, frames) = result?;
            running.extend(groups.next().map(request));
            let alone = frames.len() == 1;
            for (number, stored) in frames {
                let key = FrameKey { chunk: group.directory.name, frame: number };
                match waiting.remove(&key) {
                    Some((need, flight)) => {
                        let stored = self.deliver_or_refetch(&need, stored, lba, out, deadline).await?;
                        self.keep(key, &stored, alone);
                        flight.land(stored);
                    }
                    // Fetched along to fill a gap; whoever wants it checks it.
                    None => self.keep(key, &stored, alone),
                }
            }
        }
        Ok(())
    }

    /// Delivers a frame from the store; a bad one is fetched once more, in case it went bad on the way.
    async fn deliver_or_refetch(
        &self,
        need: &Need,
        stored: Bytes,
        lba: Lba,
        out: &mut [u8],
        deadline: Instant,
    ) -> Result<Bytes, ReadError> {
        if need.deliver(&stored, self.keys.as_ref(), out) {
            return Ok(stored);
        }
        let range = need.frame().range();
        let again = fetch::get_range(&*self.store, &need.directory, range, deadline).await?;
        if need.deliver(&again, self.keys.as_ref(), out) {
            tracing::warn!(chunk = %need.directory.name, frame = need.number, "a frame came damaged from the bucket and intact the second time");
            return Ok(again);
        }
        Err(ReadError::Corrupt { name: need.directory.name, frame: need.number, lba: lba + need.first_block() })
    }

    fn keep(&self, key: FrameKey, stored: &Bytes, alone: bool) {
        if let Some(cache) = &self.cache {
            if alone {
                cache.insert(key, stored.clone());
            } else {
                cache.insert_behind(key, stored.clone());
            }
        }
    }
}

impl std::fmt::Debug for BlockReader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "BlockReader({})", self.volume)
    }
}
