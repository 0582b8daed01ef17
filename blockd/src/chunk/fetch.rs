//! Getting frames out of the store: neighbours in one request, transient failures waited out.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use bytes::{Bytes, BytesMut};
use tokio::time::Instant;

use super::error::ReadError;
use super::plan::Need;
use crate::store::{ObjectStore, StoreErrorKind};
use crate::table::ChunkDirectory;

/// The longest request; longer runs are split, and the parts fetched in parallel. 4 MiB, wherever they begin in their first
/// frame, and encrypted or not.
const REQUEST_BYTES: u64 = (4 << 20) + (128 << 10);
/// Bytes nobody asked for that are fetched along rather than paying for another request.
const GAP_BYTES: u64 = 64 << 10;

/// Frames of one chunk that one request fetches.
#[derive(Debug)]
pub(super) struct Group {
    pub(super) directory: Arc<ChunkDirectory>,
    /// Numbers of the first and one past the last frame.
    pub(super) frames: Range<u32>,
}

/// Gathers `needs`, sorted by chunk and frame, into requests.
pub(super) fn group<'a>(needs: impl Iterator<Item = &'a Need>) -> Vec<Group> {
    let mut groups: Vec<Group> = Vec::new();
    for need in needs {
        if let Some(last) = groups.last_mut()
            && last.directory.name == need.directory.name
        {
            let bytes = last.bytes();
            let place = need.frame().range();
            if place.start - bytes.end <= GAP_BYTES && place.end - bytes.start <= REQUEST_BYTES {
                last.frames.end = need.number + 1;
                continue;
            }
        }
        groups.push(Group { directory: need.directory.clone(), frames: need.number..need.number + 1 });
    }
    groups
}

impl Group {
    fn bytes(&self) -> Range<u64> {
        let frames = self.directory.frames.frames();
        let (first, last) = (self.frames.start as usize, self.frames.end as usize - 1);
        frames[first].range().start..frames[last].range().end
    }
}

/// The frames of `group`, each with its number, none of them verified.
pub(super) async fn fetch(
    store: &dyn ObjectStore,
    group: &Group,
    deadline: Instant,
) -> Result<Vec<(u32, Bytes)>, ReadError> {
    let range = group.bytes();
    if group.frames.len() == 1 {
        // In memory of its own, for it may be kept there for long.
        return Ok(vec![(group.frames.start, get_range(store, &group.directory, range, deadline).await?)]);
    }
    let mut pieces = Pieces(get(store, &group.directory, range, Shape::Pieces, deadline).await?.into());
    let frames = &group.directory.frames.frames()[group.frames.start as usize..group.frames.end as usize];
    Ok(group.frames.clone().zip(frames.iter().map(|frame| pieces.take(frame.stored_len as usize))).collect())
}

/// What came in several pieces.
struct Pieces(VecDeque<Bytes>);

impl Pieces {
    /// The next `len` bytes; copied only where they are in several pieces.
    fn take(&mut self, len: usize) -> Bytes {
        let mut joined = BytesMut::new();
        while let Some(first) = self.0.front_mut() {
            let want = len - joined.len();
            if joined.is_empty() {
                if first.len() >= want {
                    return first.split_to(want);
                }
                joined.reserve(len);
            }
            joined.extend_from_slice(&first.split_to(want.min(first.len())));
            if joined.len() == len {
                break;
            }
            self.0.pop_front();
        }
        joined.freeze()
    }
}

/// Part of a chunk. Failures that may pass are waited out until `deadline`.
pub(super) async fn get_range(
    store: &dyn ObjectStore,
    directory: &ChunkDirectory,
    range: Range<u64>,
    deadline: Instant,
) -> Result<Bytes, ReadError> {
    Ok(get(store, directory, range, Shape::Whole, deadline).await?.pop().unwrap_or_default())
}

/// How what is fetched is handed over.
#[derive(Clone, Copy)]
enum Shape {
    Whole,
    Pieces,
}

/// As [`get_range`]; if whole, it is one piece.
async fn get(
    store: &dyn ObjectStore,
    directory: &ChunkDirectory,
    range: Range<u64>,
    shape: Shape,
    deadline: Instant,
) -> Result<Vec<Bytes>, ReadError> {
    let key = directory.name.key();
    // The store spreads its own retries with jitter; these come after it has given up.
    let patience = ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(50))
        .with_max_delay(Duration::from_secs(2))
        .without_max_times();
    let ask = || async {
        match shape {
            Shape::Whole => Ok(vec![store.get_range(&key, range.clone()).await?]),
            Shape::Pieces => store.get_pieces(&key, range.clone()).await,
        }
    };
    let result = ask
        .retry(patience)
        .when(|error| error.is_transient() && Instant::now() < deadline)
        .notify(|error, _| tracing::debug!(%error, "retrying a read of the bucket"))
        .await;
    let error = match result {
        Ok(pieces) => {
            let have = range.start + pieces.iter().map(|piece| piece.len() as u64).sum::<u64>();
            if have == range.end {
                return Ok(pieces);
            }
            return Err(ReadError::Truncated { name: directory.name, need: range.end, have });
        }
        Err(error) => error,
    };
    match error.kind {
        StoreErrorKind::NotFound => Err(ReadError::Missing { name: directory.name }),
        // Past the end, or something wrong with the store's configuration: the size tells.
        StoreErrorKind::Invalid => match store.head(&key).await {
            Ok(meta) if meta.size < range.end => {
                Err(ReadError::Truncated { name: directory.name, need: range.end, have: meta.size })
            }
            _ => Err(error.into()),
        },
        _ => Err(error.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_joined_where_they_cross_pieces() {
        let whole: Vec<u8> = (0..200).collect();
        for cuts in [&[200][..], &[50, 50, 50, 50], &[1, 99, 3, 97], &[199, 1], &[0, 120, 0, 80, 0]] {
            let mut at = 0;
            let mut cut = |len: &usize| {
                at += len;
                Bytes::copy_from_slice(&whole[at - len..at])
            };
            let mut pieces = Pieces(cuts.iter().map(&mut cut).collect());
            let mut taken = 0;
            for len in [50, 70, 1, 79] {
                assert_eq!(pieces.take(len), &whole[taken..taken + len], "{cuts:?} at {taken}");
                taken += len;
            }
            assert!(pieces.0.iter().all(Bytes::is_empty));
        }
    }
}
