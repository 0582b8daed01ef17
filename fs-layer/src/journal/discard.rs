//! Discarding what transactions freed.
//!
//! Addresses are never used again, so nobody waits for a discard but the journal's tail: it stays before the record of a transaction until all
//! that this freed is discarded, and a flush came after that. Where there is a thread for it ([`Journal::run_discards`]), steps
//! leave it to that, which takes its time: a disk may let writes wait while it discards. Otherwise, and where the journal is short of
//! room, the leader of a step does it.

use std::collections::VecDeque;
use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::{Journal, Running};
use crate::disk::BlockAddress;

/// How many blocks the thread discards at a time: few enough that it takes no longer than [`SLOW`].
const PIECE_MIN: u64 = 1024;
const PIECE_MAX: u64 = 1 << 18;
const SLOW: Duration = Duration::from_millis(4);
/// Discards that took longer are followed by a pause of the same length.
const QUICK: Duration = Duration::from_micros(500);

/// What a durable transaction freed.
struct Freed {
    sequence: u64,
    /// What is not discarded yet.
    ranges: VecDeque<(BlockAddress, u64)>,
    /// Metadata blocks among it: the cache knows that they are gone until the disk does.
    blocks: Vec<BlockAddress>,
}

#[derive(Default)]
struct State {
    queue: VecDeque<Freed>,
    /// A piece of the first is being discarded.
    busy: bool,
    /// Transactions of which all is discarded, since the last flush began.
    done: Vec<u64>,
    /// Whether a thread does it.
    apart: bool,
    ended: bool,
}

/// See the module.
#[derive(Default)]
pub(super) struct Discards {
    state: Mutex<State>,
    changed: Condvar,
}

impl Discards {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes up what a transaction freed; with `ranges` in order, adjoining ones as one. Returns whether there is anything.
    pub(super) fn add(&self, running: &Running, sequence: u64, ranges: Vec<(BlockAddress, u64)>) -> bool {
        if ranges.is_empty() {
            return false;
        }
        let blocks = running.blocks.iter().filter(|(_, image)| image.is_none()).map(|(at, _)| *at).collect();
        self.lock().queue.push_back(Freed { sequence, ranges: ranges.into(), blocks });
        self.changed.notify_all();
        true
    }

    /// The transactions of which all is discarded, each once. To be called before a flush begins, which then makes that durable.
    pub(super) fn take_done(&self) -> Vec<u64> {
        std::mem::take(&mut self.lock().done)
    }

    /// Whether a thread does it.
    pub(super) fn are_apart(&self) -> bool {
        self.lock().apart
    }
}

impl State {
    /// What to discard next, at most so many blocks. Nobody else is at it.
    fn piece(&mut self, most: u64) -> Option<(BlockAddress, u64)> {
        let ranges = &mut self.queue.front_mut()?.ranges;
        let (at, count) = ranges.pop_front()?;
        if count > most {
            ranges.push_front((at + most, count - most));
        }
        self.busy = true;
        Some((at, count.min(most)))
    }
}

impl Journal {
    /// Discards everything that is waiting for it.
    pub(super) fn discard_all(&self) -> io::Result<()> {
        let mut state = self.discards.lock();
        loop {
            if state.busy {
                state = self.discards.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let Some(piece) = state.piece(u64::MAX) else { return Ok(()) };
            drop(state);
            self.discard_piece(piece)?;
            state = self.discards.lock();
        }
    }

    fn discard_piece(&self, (at, count): (BlockAddress, u64)) -> io::Result<()> {
        // A discard that is lost costs space, nothing else; the disk must go on taking writes, though.
        let result = self.disk.discard(at, count);
        let mut state = self.discards.lock();
        state.busy = false;
        if state.queue.front().is_some_and(|freed| freed.ranges.is_empty())
            && let Some(freed) = state.queue.pop_front()
        {
            freed.blocks.iter().for_each(|at| self.cache.forget(*at));
            state.done.push(freed.sequence);
        }
        drop(state);
        self.discards.changed.notify_all();
        result
    }

    /// Discards what transactions free, until [`Journal::end_discards`]; for a thread of its own.
    pub fn run_discards(&self) {
        let mut most = PIECE_MIN;
        let mut state = self.discards.lock();
        state.apart = !state.ended;
        while !state.ended {
            let piece = if state.busy { None } else { state.piece(most) };
            let Some(piece) = piece else {
                state = self.discards.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            drop(state);
            let begin = Instant::now();
            let result = self.discard_piece(piece);
            let took = begin.elapsed();
            if let Err(e) = result {
                self.kill(format!("blocks could not be discarded: {e}"));
                state = self.discards.lock();
                break;
            }
            most = match took {
                took if took > SLOW => (most / 2).max(PIECE_MIN),
                took if took < QUICK => (most * 2).min(PIECE_MAX),
                _ => most,
            };
            state = self.discards.lock();
            if took > QUICK && !state.ended {
                // Whoever adds something ends the pause early, which does no harm.
                (state, _) = self.discards.changed.wait_timeout(state, took).unwrap_or_else(PoisonError::into_inner);
            }
        }
        state.apart = false;
    }

    /// Ends [`Journal::run_discards`]; what is left is done by steps from now on.
    pub fn end_discards(&self) {
        let mut state = self.discards.lock();
        state.ended = true;
        state.apart = false;
        drop(state);
        self.discards.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_taken_in_pieces_and_in_order() {
        let freed = |sequence, ranges: &[(u64, u64)]| Freed {
            sequence,
            ranges: ranges.iter().copied().collect(),
            blocks: Vec::new(),
        };
        let mut state = State::default();
        assert_eq!(state.piece(5), None);
        state.queue.push_back(freed(1, &[(10, 7), (30, 2)]));
        state.queue.push_back(freed(2, &[(50, 1)]));
        assert_eq!(state.piece(5), Some((10, 5)));
        assert!(state.busy);
        assert_eq!(state.piece(5), Some((15, 2)));
        assert_eq!(state.piece(u64::MAX), Some((30, 2)));
        // The first transaction is done before the next is begun.
        assert_eq!(state.piece(5), None);
        state.queue.pop_front();
        assert_eq!(state.piece(5), Some((50, 1)));
    }
}
