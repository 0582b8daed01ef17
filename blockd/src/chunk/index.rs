//! Fetching the header of a chunk.

use bytes::Bytes;

use super::error::ReadError;
use super::format::ChunkIndex;
use super::name::ChunkName;
use super::sealed;
use crate::crypt::Keys;
use crate::store::{ObjectStore, StoreError, StoreErrorKind};

/// Asked for first. Holds the header of 16 MiB in 3,500 extents; longer ones cost a second request.
const GUESS: u64 = 64 << 10;

/// Reads and verifies the header of `name`, with the keys of its volume if that is encrypted: one request for most chunks.
/// Does not retry; a chunk that is not there is [`ReadError::Missing`].
pub async fn read_index(
    store: &dyn ObjectStore,
    name: &ChunkName,
    keys: Option<&Keys>,
) -> Result<ChunkIndex, ReadError> {
    let key = name.key();
    let lost = |source: StoreError| match source.kind {
        StoreErrorKind::NotFound => ReadError::Missing { name: *name },
        _ => ReadError::Store(source),
    };
    let damaged = |source| ReadError::Header { name: *name, source };
    let start: Bytes = match store.get_range(&key, 0..GUESS).await {
        Ok(start) => start,
        // Smaller than the guess: then all of it costs one more request and few bytes.
        Err(error) if error.kind == StoreErrorKind::Invalid => store.get(&key).await.map_err(lost)?.0,
        Err(error) => return Err(lost(error)),
    };
    let len = sealed::peek_len(&start, keys).map_err(damaged)?;
    if len as u64 <= GUESS || (start.len() as u64) < GUESS {
        return sealed::decode(&start, name, keys).map_err(damaged);
    }
    let header = match store.get_range(&key, 0..len as u64).await {
        Ok(header) => header,
        // Past the end: decoding what is there says how much is missing.
        Err(error) if error.kind == StoreErrorKind::Invalid => start,
        Err(error) => return Err(lost(error)),
    };
    sealed::decode(&header, name, keys).map_err(damaged)
}
