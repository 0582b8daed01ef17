//! The work itself, on ordinary threads.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::super::job::{Backend, Pause, Stopped};
use super::policy::{self, CompactionTuning};
use super::sweep::next_number;
use crate::buf::{AlignedBuf, Slice};
use crate::chunk::{
    Chunk, ChunkDraft, ChunkExtent, ChunkIndex, ChunkName, Codec, ExtentKind, Piece, ReadError, read_index,
};
use crate::table::{Applied, Gathered, Mapped, Moved, Position, Space};
use crate::types::{BLOCK, VolumeId};

/// Chunks deleted at once.
pub(super) const DELETE_BATCH: usize = 500;
/// Headers fetched at the same time.
const HEADERS_AT_ONCE: usize = 4;
/// Zeroes, holes and references told by one chunk; more take another. A header has room for two rows of each beside the
/// blocks.
const TOLD_MAX: usize = 45_000;

/// What a round of compaction goes by.
#[derive(Clone, Debug)]
pub(in super::super) struct Order {
    pub volume: VolumeId,
    pub epoch: u64,
    pub codec: Codec,
    pub chunk_bytes: u64,
    pub created_ms: u64,
    pub tuning: CompactionTuning,
    pub quiet: bool,
    /// No relocated chunks are left that the table does not know.
    pub may_drop: bool,
    pub held: Vec<u64>,
    pub avoid: BTreeSet<u64>,
}

/// What a round of compaction came to.
#[derive(Debug, Default)]
pub(in super::super) struct Round {
    /// Whether there was anything to do.
    pub worked: bool,
    pub chunks: u64,
    pub read_bytes: u64,
    pub stored_bytes: u64,
    pub moved_blocks: u64,
    /// Blocks that stayed where they were, because copies by reference were made of their chunk meanwhile.
    pub pinned_blocks: u64,
    pub space: Space,
}

/// Why a round of compaction failed.
#[derive(Debug, Default)]
pub(in super::super) struct Failure {
    pub message: String,
    /// Nothing more can be done by this owner.
    pub stopped: Option<Stopped>,
    /// Chunks that are better left alone.
    pub avoid: Vec<u64>,
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self { message, ..Self::default() }
    }
}

impl From<Stopped> for Failure {
    fn from(stopped: Stopped) -> Self {
        Self { stopped: Some(stopped), ..Self::default() }
    }
}

/// What a deletion came to.
#[derive(Debug, Default)]
pub(in super::super) struct Deleted {
    pub chunks: u64,
    pub bytes: u64,
    /// There is more to be deleted.
    pub more: bool,
    /// What earlier owners left was looked for as well.
    pub swept: bool,
    pub space: Space,
}

impl Backend {
    /// One round: chooses chunks, copies what lives in them, and lets the table refer to the copies.
    pub async fn compact(self, order: Order) -> Result<Round, Failure> {
        let table = self.table.clone();
        let chosen = {
            let order = order.clone();
            self.blocking
                .run_behind(move || {
                    let mut dropped = 0;
                    if order.may_drop {
                        let number = next_number(&table, order.epoch);
                        dropped = table.drop_pointless(&order.held, number).map_err(|e| e.to_string())?;
                    }
                    let snapshot = order.held.iter().max().copied().unwrap_or(0);
                    let mut candidates = table.with_usage(Clone::clone);
                    candidates.retain(|id, usage| {
                        let free = usage.birth > snapshot && !table.is_pinned(*id);
                        free && !order.avoid.contains(id) && table.is_own(*id)
                    });
                    let applied = table.applied().seq;
                    let chosen = policy::choose(&candidates, &order.tuning, order.chunk_bytes, applied, order.quiet);
                    Ok((dropped, chosen))
                })
                .await?
        };
        let (dropped, victims) = chosen;
        let mut round = Round { worked: dropped > 0 || !victims.is_empty(), ..Round::default() };
        if !victims.is_empty() {
            self.compact_chunks(&order, &victims, &mut round).await?;
        }
        round.space = self.table.space();
        Ok(round)
    }

    async fn compact_chunks(&self, order: &Order, victims: &[u64], round: &mut Round) -> Result<(), Failure> {
        let work = async {
            let headers = self.headers(victims).await?;
            let table = self.table.clone();
            let gathered = self.blocking.run_behind(move || table.gather(&headers).map_err(|e| e.to_string())).await;
            Ok::<_, Failure>(gathered?)
        };
        // Nothing was put yet: a volume that closes need not wait for this.
        let gathered = tokio::select! {
            biased;
            gathered = work => gathered?,
            () = self.closing.wait() => return Err(Stopped::Closing.into()),
        };
        let Gathered { basis, mut sources, told } = gathered;
        round.read_bytes += victims.len() as u64 * (64 << 10);
        // All that is told must be told before the chunks that told it may go: by the last part.
        let mut told: Vec<&[ChunkExtent]> = told.chunks(TOLD_MAX).collect();
        let last = told.pop().unwrap_or_default();
        for told in told {
            self.relocate(order, basis, Vec::new(), told, &[], round).await?;
        }
        // Chunks written with a larger size than the present one may hold more than fits.
        let most = (crate::chunk::MAX_PAYLOAD_BLOCKS / 2) as u64;
        while sources.iter().map(|run| run.blocks).sum::<u64>() > most {
            let rest = split_off(&mut sources, most);
            self.relocate(order, basis, std::mem::replace(&mut sources, rest), &[], &[], round).await?;
        }
        // What an earlier part told as a copy, and the table did not come to use, is still told by nobody else.
        let carried = if round.pinned_blocks == 0 { victims } else { &[] };
        self.relocate(order, basis, sources, last, carried, round).await
    }

    /// Copies `sources` into one chunk that also tells `told`, puts it, and brings it into the table.
    async fn relocate(
        &self,
        order: &Order,
        basis: Applied,
        sources: Vec<Mapped>,
        told: &[ChunkExtent],
        carried: &[u64],
        round: &mut Round,
    ) -> Result<(), Failure> {
        if sources.is_empty() && told.is_empty() {
            // What they told is not true any more, and they hold nothing.
            return self.carry(carried, order.epoch).await;
        }
        let data = tokio::select! {
            biased;
            data = self.copy(&sources) => data?,
            () = self.closing.wait() => return Err(Stopped::Closing.into()),
        };
        round.read_bytes += data.len() as u64;
        // The number is taken when nothing but closing can keep the chunk from being put and applied.
        let seq = next_number(&self.table, order.epoch);
        let name = ChunkName { volume: order.volume, epoch: order.epoch, seq };
        let draft = ChunkDraft {
            name,
            first_lsn: basis.seq,
            last_lsn: basis.lsn,
            codec: order.codec,
            created_ms: order.created_ms,
            pieces: pieces(&sources, data, told),
        };
        let keys = self.keys.clone();
        let chunk: Chunk =
            self.blocking.run_behind(move || draft.encode(keys.as_ref()).map_err(|e| e.to_string())).await?;
        self.put(&name.key(), chunk.bytes.clone()).await?;
        let stored = chunk.bytes.len() as u64;
        let moved = self.bring_in(chunk.index, sources, carried.to_vec()).await?;
        round.chunks += 1;
        round.stored_bytes += stored;
        round.moved_blocks += moved.blocks;
        round.pinned_blocks += moved.pinned;
        Ok(())
    }

    async fn headers(&self, victims: &[u64]) -> Result<Vec<ChunkIndex>, Failure> {
        let mut headers = Vec::with_capacity(victims.len());
        for part in victims.chunks(HEADERS_AT_ONCE) {
            let fetches = part.iter().map(|id| async move {
                let failed = |message, avoid| Failure { message, avoid, stopped: None };
                let directory = self.table.directory(*id).map_err(|e| failed(e.to_string(), vec![*id]))?;
                read_index(self.store.as_ref(), &directory.name, self.keys.as_ref()).await.map_err(|e| {
                    let avoid = blamed(&e).into_iter().collect();
                    failed(e.to_string(), avoid)
                })
            });
            headers.extend(futures::future::try_join_all(fetches).await?);
        }
        Ok(headers)
    }

    /// The blocks of `sources`, one after the other.
    async fn copy(&self, sources: &[Mapped]) -> Result<Slice, Failure> {
        let blocks: u64 = sources.iter().map(|run| run.blocks).sum();
        let mut data = AlignedBuf::zeroed(blocks as usize * BLOCK);
        // In the buffer they follow each other.
        let mut at = 0;
        let packed: Vec<Mapped> = sources
            .iter()
            .map(|run| {
                let lba = at;
                at += run.blocks;
                Mapped { lba, ..*run }
            })
            .collect();
        self.copier.read_mapped(0, &packed, &mut data).await.map_err(|e| Failure {
            avoid: blamed(&e).into_iter().collect(),
            message: e.to_string(),
            stopped: None,
        })?;
        Ok(data.into())
    }

    /// Lets the table refer to a copy that is in the bucket. A table that fails is waited for: the copy is there.
    async fn bring_in(&self, index: ChunkIndex, sources: Vec<Mapped>, carried: Vec<u64>) -> Result<Moved, Failure> {
        let work = Arc::new((index, sources, carried));
        let mut pause = Pause::default();
        loop {
            let (table, work) = (self.table.clone(), work.clone());
            let relocate = move || table.relocate(&work.0, &work.1, &work.2).map_err(|e| e.to_string());
            match self.blocking.run_behind(relocate).await {
                Ok(moved) => return Ok(moved),
                Err(message) => {
                    tracing::error!("cannot update the translation table after compaction: {message}");
                    self.set_trouble(Some(format!("translation table: {message}")));
                    if self.closing.sleep(pause.next(&self.jitter)).await {
                        return Err(Stopped::Closing.into());
                    }
                }
            }
        }
    }

    async fn carry(&self, carried: &[u64], epoch: u64) -> Result<(), Failure> {
        let (table, carried) = (self.table.clone(), carried.to_vec());
        let carry = move || table.carry(&carried, next_number(&table, epoch)).map_err(|e| e.to_string());
        Ok(self.blocking.run_behind(carry).await?)
    }

    /// Deletes a batch of chunks that were dead at `upto` and that no snapshot needs, neither those at `held` nor those that
    /// the manifest names, for the owner of `epoch`.
    pub async fn delete_dead(self, epoch: u64, upto: Position, mut held: Vec<u64>) -> Result<Deleted, String> {
        let table = self.table.clone();
        let manifest = self.manifest().await.map_err(|e| e.to_string())?;
        if manifest.settled().is_none_or(|last| last.epoch != epoch) {
            return Err("another host has the volume now".to_owned());
        }
        held.extend(manifest.held_positions());
        let look = move || {
            let doomed = table.doomed(upto, &held, DELETE_BATCH).map_err(|e| e.to_string())?;
            let more = doomed.len() == DELETE_BATCH || table.doomed_are_pinned(upto, &held);
            Ok((doomed, more))
        };
        let (doomed, more) = self.blocking.run_behind(look).await?;
        let mut done = Deleted { more, ..Deleted::default() };
        if !doomed.is_empty() {
            let keys: Vec<String> = doomed.iter().filter_map(|chunk| Some(chunk.name?.key())).collect();
            if !keys.is_empty() {
                self.store.delete(&keys).await.map_err(|e| e.to_string())?;
            }
            done.chunks = keys.len() as u64;
            done.bytes = doomed.iter().filter(|chunk| chunk.name.is_some()).map(|chunk| chunk.stored).sum();
            let (table, ids) = (self.table.clone(), doomed.iter().map(|chunk| chunk.id).collect::<Vec<_>>());
            self.blocking.run_behind(move || table.forget(&ids).map_err(|e| e.to_string())).await?;
        }
        done.space = self.table.space();
        Ok(done)
    }
}

/// The chunk that is to blame, if it is one: trying it again is of no use.
fn blamed(error: &ReadError) -> Option<u64> {
    match error {
        ReadError::Missing { name }
        | ReadError::Header { name, .. }
        | ReadError::Corrupt { name, .. }
        | ReadError::Truncated { name, .. } => Some(name.seq),
        ReadError::Store(_) | ReadError::Table(_) => None,
    }
}

/// Leaves `blocks` blocks in `sources` and returns the others.
fn split_off(sources: &mut Vec<Mapped>, blocks: u64) -> Vec<Mapped> {
    let mut left = blocks;
    let at = sources.iter().position(|run| {
        let inside = left < run.blocks;
        if !inside {
            left -= run.blocks;
        }
        inside
    });
    let Some(at) = at else { return Vec::new() };
    let mut rest = sources.split_off(at);
    if left > 0 {
        let cut = rest[0];
        sources.push(Mapped { blocks: left, ..cut });
        rest[0] = Mapped { lba: cut.lba + left, blocks: cut.blocks - left, target: cut.target.advanced(left as u16) };
    }
    rest
}

/// `sources`, whose bytes follow each other in `data`, and `told`, in address order.
fn pieces(sources: &[Mapped], data: Slice, told: &[ChunkExtent]) -> Vec<Piece> {
    let mut pieces: Vec<(u64, Piece)> = Vec::with_capacity(sources.len() + told.len());
    let mut at = 0;
    for run in sources {
        let end = at + run.blocks as usize * BLOCK;
        pieces.push((run.lba, Piece::Data { lba: run.lba, data: data.slice(at..end) }));
        at = end;
    }
    pieces.extend(told.iter().filter_map(|extent| {
        let (lba, blocks) = (extent.lba, extent.blocks);
        let piece = match extent.kind {
            ExtentKind::Zero => Piece::Zero { lba, blocks, allocated: true },
            ExtentKind::Hole => Piece::Zero { lba, blocks, allocated: false },
            ExtentKind::Refer { seq, index } => Piece::Refer { lba, blocks, seq, index },
            // Blocks are among the sources.
            ExtentKind::Data { .. } => return None,
        };
        Some((lba, piece))
    }));
    pieces.sort_unstable_by_key(|(lba, _)| *lba);
    pieces.into_iter().map(|(_, piece)| piece).collect()
}
