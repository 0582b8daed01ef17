//! Replies to requests that must not run twice, kept for clients that lost their connection before they had them.
//!
//! A request is known by who sent it, its number and a hash of its arguments. How many are kept is bounded; the oldest go.

use std::collections::{HashMap, VecDeque};
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard};

use crate::export::nfs4::rpc::Call;

/// Replies that are kept.
const KEPT_MAX: usize = 4096;

/// Which request.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    peer: IpAddr,
    xid: u32,
    procedure: u32,
    arguments: u64,
}

impl Key {
    /// The key of a call.
    pub fn new(peer: IpAddr, call: &Call<'_>) -> Key {
        let arguments = xxhash_rust::xxh3::xxh3_64(call.arguments);
        Key { peer, xid: call.xid, procedure: call.procedure, arguments }
    }

    /// A number for it that means the same to the next server; never 0.
    pub fn hash(&self) -> u64 {
        let peer = match self.peer {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let numbers = [u64::from(self.xid), u64::from(self.procedure), self.arguments];
        let bytes: Vec<u8> = peer.into_iter().chain(numbers.into_iter().flat_map(u64::to_le_bytes)).collect();
        xxhash_rust::xxh3::xxh3_64(&bytes).max(1)
    }
}

/// What is known of a request.
#[derive(Debug, PartialEq)]
pub enum Found {
    /// Nothing: run it, with [`Replies::running`] until it is done.
    New,
    /// It runs.
    Running,
    /// It ran, with these results.
    Done(Vec<u8>),
}

#[derive(Default)]
struct Inner {
    replies: HashMap<Key, Option<Vec<u8>>>,
    /// Those that ran, the oldest first.
    order: VecDeque<Key>,
}

/// All replies that are kept.
#[derive(Default)]
pub struct Replies(Mutex<Inner>);

impl Replies {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().expect("no panic under the lock")
    }

    /// Notes that a request runs, unless it does or did.
    pub fn begin(&self, key: Key) -> Found {
        match self.inner().replies.entry(key) {
            std::collections::hash_map::Entry::Vacant(entry) => {
                entry.insert(None);
                Found::New
            }
            std::collections::hash_map::Entry::Occupied(entry) => {
                entry.get().clone().map_or(Found::Running, Found::Done)
            }
        }
    }

    /// The request that [`Replies::begin`] found new: forgotten when this is dropped, unless it is done.
    pub fn running(&self, key: Key) -> Running<'_> {
        Running { replies: self, key }
    }

    /// Keeps what was answered.
    fn done(&self, key: Key, results: Vec<u8>) {
        let mut inner = self.inner();
        inner.replies.insert(key, Some(results));
        inner.order.push_back(key);
        if inner.order.len() > KEPT_MAX
            && let Some(oldest) = inner.order.pop_front()
        {
            inner.replies.remove(&oldest);
        }
    }

    /// It did not run after all.
    fn forget(&self, key: Key) {
        let mut inner = self.inner();
        if inner.replies.get(&key).is_some_and(Option::is_none) {
            inner.replies.remove(&key);
        }
    }
}

/// A request that runs.
pub struct Running<'a> {
    replies: &'a Replies,
    key: Key,
}

impl Running<'_> {
    /// Keeps what was answered.
    pub fn done(self, results: Vec<u8>) {
        self.replies.done(self.key, results);
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.replies.forget(self.key);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_kept_in_bounds() {
        let replies = Replies::default();
        let key = |xid| Key { peer: IpAddr::from([127, 0, 0, 1]), xid, procedure: 8, arguments: 0 };
        assert_eq!(replies.begin(key(0)), Found::New);
        assert_eq!(replies.begin(key(0)), Found::Running);
        replies.done(key(0), b"x".to_vec());
        assert_eq!(replies.begin(key(0)), Found::Done(b"x".to_vec()));
        for xid in 1..=KEPT_MAX as u32 {
            assert_eq!(replies.begin(key(xid)), Found::New);
            replies.done(key(xid), b"y".to_vec());
        }
        assert_eq!(replies.begin(key(0)), Found::New);
        replies.forget(key(0));
        assert_eq!(replies.begin(key(0)), Found::New);
    }
}
