//! What the table needs of an ordered key-value store.

use std::io;

/// One change.
#[derive(Clone, Debug)]
pub(super) enum Change {
    Put(Vec<u8>, Vec<u8>),
    Delete(Vec<u8>),
    /// From the first key on, up to but without the second.
    DeleteRange(Vec<u8>, Vec<u8>),
}

/// Changes that happen together or not at all, in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Batch {
    pub(super) changes: Vec<Change>,
}

impl Batch {
    pub(super) fn put(&mut self, key: &[u8], value: Vec<u8>) {
        self.changes.push(Change::Put(key.to_vec(), value));
    }

    pub(super) fn delete(&mut self, key: &[u8]) {
        self.changes.push(Change::Delete(key.to_vec()));
    }

    pub(super) fn delete_range(&mut self, from: &[u8], to: &[u8]) {
        self.changes.push(Change::DeleteRange(from.to_vec(), to.to_vec()));
    }
}

pub(super) type Result<T> = std::result::Result<T, rocksdb::Error>;

/// An ordered key-value store with atomic batches. A crash keeps a prefix of the batches, at least those before the
/// last `persist`.
pub(super) trait Kv: Send + Sync {
    fn get(&self, key: &[u8]) -> Result<Option<Vec<u8>>>;
    /// Values of `keys`, which are in order.
    fn get_many(&self, keys: &[super::key::NumberKey]) -> Result<Vec<Option<Vec<u8>>>>;
    fn write(&self, batch: Batch) -> Result<()>;
    /// Makes everything written so far durable.
    fn persist(&self) -> Result<()>;
    /// Shows the entries from `from` on, up to but without `to`, in order, until `visit` says false.
    fn scan(&self, from: &[u8], to: &[u8], visit: &mut dyn FnMut(&[u8], &[u8]) -> bool) -> Result<()>;
    /// Memory held for cached and unwritten data, and bytes of files.
    fn usage(&self) -> (u64, u64);
    /// A copy of all that was written so far, as files that stay as they are until it is dropped.
    fn freeze(&self) -> io::Result<Box<dyn FrozenFiles>>;
    /// About the bytes that a copy made now would have in lasting files that `known` (name, length) does not know.
    fn unknown_bytes(&self, known: &dyn Fn(&str, u64) -> bool) -> u64;
}

/// A file of a frozen copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FrozenFile {
    /// Its name within the copy.
    pub name: String,
    /// Its length in bytes.
    pub size: u64,
    /// Later copies of the same store have a file of this name only if it is this one. Others are small and change.
    pub lasting: bool,
}

/// The files of a frozen copy.
pub trait FrozenFiles: Send + Sync {
    /// What there is.
    fn files(&self) -> Vec<FrozenFile>;
    /// The content of one.
    fn read(&self, name: &str) -> io::Result<Vec<u8>>;
}
