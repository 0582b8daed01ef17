//! Exclusive creates (RFC 8881 section 18.16.3, RFC 1813 section 3.3.8): the client's verifier tells a request that comes again, because its answer was lost,
//! from another one that finds the name taken.
//!
//! Many servers keep the verifier in the new file's times, which the client then has to set, with a commit of its own. Here creates of this run are
//! remembered, and those of the runs before are known by what was noted with the change ([`Vfs::noting`](crate::vfs::Vfs::noting)).

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::Mutex;

use xxhash_rust::xxh3::xxh3_64_with_seed;

use crate::mutex::lock;
use crate::vfs::{self, Ino, Made, Vfs};

/// Creates that are remembered; more than clients have under way.
const KEPT_MAX: usize = 4096;

#[derive(Debug, Default)]
struct Inner {
    made: HashMap<u64, Ino>,
    /// The oldest first.
    order: VecDeque<u64>,
}

/// The exclusive creates of this run of the server.
#[derive(Debug, Default)]
pub struct Exclusives(Mutex<Inner>);

/// The name of an exclusive create among all requests; never 0.
fn key(dir: Ino, name: &[u8], verifier: [u8; 8]) -> u64 {
    xxh3_64_with_seed(name, dir.0 ^ u64::from_le_bytes(verifier).rotate_left(32)).max(1)
}

impl Exclusives {
    /// Runs `make`, which makes `name` in `dir`, and remembers that, here and over the end of the server.
    ///
    /// # Errors
    /// That of `make`.
    pub fn make(
        &self,
        vfs: &dyn Vfs,
        dir: Ino,
        name: &[u8],
        verifier: [u8; 8],
        make: impl FnOnce() -> vfs::Result<Made>,
    ) -> vfs::Result<Made> {
        let key = key(dir, name, verifier);
        let made = vfs::noting(vfs, key, make)?;
        let mut inner = lock(&self.0);
        if inner.made.insert(key, made.attributes.ino).is_none() {
            inner.order.push_back(key);
        }
        if inner.order.len() > KEPT_MAX
            && let Some(oldest) = inner.order.pop_front()
        {
            inner.made.remove(&oldest);
        }
        Ok(made)
    }

    /// Whether the file that has the name was made by this very request, in this run or, by what was `noted`, in one before it.
    pub fn is_repeated(&self, noted: &HashSet<u64>, dir: Ino, name: &[u8], verifier: [u8; 8], file: Ino) -> bool {
        let key = key(dir, name, verifier);
        noted.contains(&key) || lock(&self.0).made.get(&key) == Some(&file)
    }
}
