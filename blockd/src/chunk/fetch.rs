//! Getting frames out of the store: neighbours in one request, transient failures waited out.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use backon::{ExponentialBuilder, Retryable};
use bytes::Bytes;
use tokio::time::Instant;

use super::error::ReadError;
use super::plan::Need;
use crate::store::{ObjectStore, StoreErrorKind};
use crate::table::ChunkDirectory;

/// The longest request; longer runs are split, and the parts fetched in parallel.
const REQUEST_BYTES: u64 = 4 << 20;
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
    let bytes = get_range(store, &group.directory, range.clone(), deadline).await?;
    Ok(group
        .frames
        .clone()
        .map(|number| {
            let place = group.directory.frames.frames()[number as usize].range();
            let within = (place.start - range.start) as usize..(place.end - range.start) as usize;
            (number, bytes.slice(within))
        })
        .collect())
}

/// Part of a chunk. Failures that may pass are waited out until `deadline`.
pub(super) async fn get_range(
    store: &dyn ObjectStore,
    directory: &ChunkDirectory,
    range: Range<u64>,
    deadline: Instant,
) -> Result<Bytes, ReadError> {
    let key = directory.name.key();
    // The store spreads its own retries with jitter; these come after it has given up.
    let patience = ExponentialBuilder::new()
        .with_min_delay(Duration::from_millis(50))
        .with_max_delay(Duration::from_secs(2))
        .without_max_times();
    let result = (|| async { store.get_range(&key, range.clone()).await })
        .retry(patience)
        .when(|error| error.is_transient() && Instant::now() < deadline)
        .notify(|error, _| tracing::debug!(%error, "retrying a read of the bucket"))
        .await;
    let error = match result {
        Ok(bytes) if bytes.len() as u64 == range.end - range.start => return Ok(bytes),
        Ok(bytes) => {
            return Err(ReadError::Truncated {
                name: directory.name,
                need: range.end,
                have: range.start + bytes.len() as u64,
            });
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
