//! Leaves of directories: entries of differing length in the order of their keys.
//!
//! A table of offsets stands at the beginning and grows up, the records fill the node from its end down in no order. A removed record leaves
//! a gap; the gaps are closed when room is needed.

use std::cmp::Ordering;

use zerocopy::little_endian::{U16, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Entry, KEY_END, KEY_MIN, Target};
use crate::blocks::{BODY_BYTES, BlockKind};
use crate::tree::{self, Leaf, NODE_HEADER_BYTES, NodeHeader, Sound, Span};
use crate::vfs::{Ino, NAME_MAX};

/// What stands before each name.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Record {
    key: U64,
    ino: U64,
    kind: u8,
    name_bytes: u8,
}

const RECORD_BYTES: usize = 18;
const _: () = assert!(size_of::<Record>() == RECORD_BYTES);
/// Bytes of an offset in the table.
const OFFSET_BYTES: usize = 2;
/// Bytes of an entry in a node.
const ENTRY_BYTES_MAX: usize = OFFSET_BYTES + RECORD_BYTES + NAME_MAX;
// Whatever does not fit into a leaf fits into either half of it.
const _: () = assert!((BODY_BYTES - NODE_HEADER_BYTES) / 2 > 2 * ENTRY_BYTES_MAX);

/// How often a search guesses before it halves.
const GUESSES: u32 = 3;

#[cold]
fn out_of_bounds(index: usize) -> String {
    format!("entry {index} is out of bounds")
}

/// The leaves of a directory.
pub struct DirLeaf;

/// A leaf to be read. Every access is checked, the order of the keys only where [`LeafRef::check`] or [`LeafRef::find`] look.
#[derive(Clone, Copy)]
pub struct LeafRef<'a> {
    node: &'a [u8],
    table: &'a [U16],
    heap: usize,
    gaps: usize,
}

impl<'a> LeafRef<'a> {
    /// Verifies the header.
    pub fn open(node: &'a [u8]) -> Sound<LeafRef<'a>> {
        let header = tree::header(node)?;
        if header.level != 0 {
            return Err("an inner node where a leaf must be".to_string());
        }
        let (heap, gaps) = (usize::from(header.own[0].get()), usize::from(header.own[1].get()));
        let (table, _) = <[U16]>::ref_from_prefix_with_elems(&node[NODE_HEADER_BYTES..], header.count.get().into())
            .map_err(|_| format!("{} entries do not fit", header.count))?;
        if heap > node.len() || NODE_HEADER_BYTES + size_of_val(table) > heap || gaps > node.len() - heap {
            return Err(format!("records from byte {heap} on with gaps of {gaps} bytes do not fit"));
        }
        Ok(LeafRef { node, table, heap, gaps })
    }

    /// How many entries it has.
    pub fn len(&self) -> usize {
        self.table.len()
    }

    /// The key of an entry.
    #[inline]
    pub fn key(&self, index: usize) -> Sound<u64> {
        let key = self.table.get(index).map(|offset| usize::from(offset.get())).and_then(|offset| {
            let bytes = self.node.get(offset.max(self.heap)..)?.first_chunk()?;
            (offset >= self.heap).then(|| u64::from_le_bytes(*bytes))
        });
        key.ok_or_else(|| out_of_bounds(index))
    }

    fn raw(&self, index: usize) -> Sound<(&'a Record, &'a [u8])> {
        let wrong = || out_of_bounds(index);
        let offset = usize::from(self.table.get(index).ok_or_else(wrong)?.get());
        if offset < self.heap {
            return Err(wrong());
        }
        self.node.get(offset..).and_then(|bytes| Record::ref_from_prefix(bytes).ok()).ok_or_else(wrong)
    }

    /// An entry.
    pub fn entry(&self, index: usize) -> Sound<Entry<'a>> {
        let (record, rest) = self.raw(index)?;
        let name = rest.get(..record.name_bytes.into()).filter(|name| !name.is_empty());
        Ok(Entry {
            name: name.ok_or_else(|| out_of_bounds(index))?,
            target: Target { ino: Ino(record.ino.get()), kind: record.kind },
            key: record.key.get(),
        })
    }

    /// The index of the first entry with `key` or more, and whether it is `key`'s. Verifies the order of what it looks at: the entries on
    /// both sides of where `key` belongs, if it is not there.
    pub fn find(&self, key: u64, span: Span) -> Sound<(usize, bool)> {
        let (mut low, mut high) = (0, self.len());
        let (mut above, mut below) = (span.low.max(KEY_MIN), span.high.min(KEY_END));
        let mut guesses = 0;
        while low < high {
            // Keys are hashes, so that their distances say how many are between them, about.
            let middle = if guesses < GUESSES && (above..below).contains(&key) {
                guesses += 1;
                let part = (key - above) as f64 / (below - above) as f64;
                (low + (part * (high - low) as f64) as usize).min(high - 1)
            } else {
                low + (high - low) / 2
            };
            let found = self.key(middle)?;
            if found < above || found >= below {
                return Err(format!("entry {middle} is out of order"));
            }
            match found.cmp(&key) {
                Ordering::Less => (low, above) = (middle + 1, found + 1),
                Ordering::Equal => return Ok((middle, true)),
                Ordering::Greater => (high, below) = (middle, found),
            }
        }
        Ok((low, false))
    }

    /// Verifies everything but hashes.
    pub fn check(&self, span: Span) -> Sound<()> {
        let mut least = span.low.max(KEY_MIN);
        let most = span.high.min(KEY_END);
        let mut bytes = 0;
        for index in 0..self.len() {
            let (record, rest) = self.raw(index)?;
            let (key, name_bytes) = (record.key.get(), usize::from(record.name_bytes));
            if name_bytes == 0 || name_bytes > rest.len() {
                return Err(out_of_bounds(index));
            }
            if key < least || key >= most {
                return Err(format!("entry {index} is out of order"));
            }
            least = key + 1;
            bytes += RECORD_BYTES + name_bytes;
        }
        // With the sum right nothing that is rewritten can run over; overlapping records would read as wrong names, which hashes show.
        if bytes + self.gaps != self.node.len() - self.heap {
            return Err(format!("{bytes} bytes of records and {} of gaps are not all", self.gaps));
        }
        Ok(())
    }

    /// Whether a further entry finds room, maybe after the gaps are closed.
    pub fn has_room(&self, name: &[u8]) -> bool {
        self.heap - NODE_HEADER_BYTES - size_of_val(self.table) + self.gaps >= OFFSET_BYTES + RECORD_BYTES + name.len()
    }

    /// Bytes that the entries need.
    fn used(&self) -> usize {
        size_of_val(self.table) + self.node.len() - self.heap - self.gaps
    }
}

/// Adds an entry as the `index`th; there is room for it.
pub fn insert(node: &mut [u8], index: usize, key: u64, name: &[u8], target: Target) -> Sound<()> {
    let bytes = RECORD_BYTES + name.len();
    let leaf = LeafRef::open(node)?;
    if leaf.heap < NODE_HEADER_BYTES + size_of_val(leaf.table) + OFFSET_BYTES + bytes {
        compact(node)?;
    }
    let leaf = LeafRef::open(node)?;
    let (count, heap, gaps) = (leaf.len(), leaf.heap, leaf.gaps);
    let heap = heap.checked_sub(bytes).filter(|heap| NODE_HEADER_BYTES + (count + 1) * OFFSET_BYTES <= *heap);
    let (Some(heap), true) = (heap, index <= count) else {
        return Err("no room for an entry".to_string());
    };
    let record = Record { key: key.into(), ino: target.ino.0.into(), kind: target.kind, name_bytes: name.len() as u8 };
    node[heap..heap + RECORD_BYTES].copy_from_slice(record.as_bytes());
    node[heap + RECORD_BYTES..heap + bytes].copy_from_slice(name);
    let at = NODE_HEADER_BYTES + index * OFFSET_BYTES;
    node.copy_within(at..NODE_HEADER_BYTES + count * OFFSET_BYTES, at + OFFSET_BYTES);
    node[at..at + OFFSET_BYTES].copy_from_slice(&(heap as u16).to_le_bytes());
    set_header(node, count + 1, heap, gaps);
    Ok(())
}

/// Removes the `index`th entry.
pub fn remove(node: &mut [u8], index: usize) -> Sound<()> {
    let leaf = LeafRef::open(node)?;
    let bytes = RECORD_BYTES + leaf.entry(index)?.name.len();
    let (count, heap, gaps) = (leaf.len(), leaf.heap, leaf.gaps);
    let lowest = usize::from(leaf.table[index].get()) == heap;
    let at = NODE_HEADER_BYTES + index * OFFSET_BYTES;
    node.copy_within(at + OFFSET_BYTES..NODE_HEADER_BYTES + count * OFFSET_BYTES, at);
    match lowest {
        true => {
            node[heap..heap + bytes].fill(0);
            set_header(node, count - 1, heap + bytes, gaps);
        }
        false => set_header(node, count - 1, heap, gaps + bytes),
    }
    Ok(())
}

/// Lets the `index`th entry stand for another file.
pub fn replace(node: &mut [u8], index: usize, target: Target) -> Sound<()> {
    let leaf = LeafRef::open(node)?;
    leaf.entry(index)?;
    let at = usize::from(leaf.table[index].get());
    node[at + 8..at + 16].copy_from_slice(&target.ino.0.to_le_bytes());
    node[at + 16] = target.kind;
    Ok(())
}

/// Closes the gaps.
fn compact(node: &mut [u8]) -> Sound<()> {
    let mut old = [0; BODY_BYTES];
    let old = old.get_mut(..node.len()).ok_or("too long")?;
    old.copy_from_slice(node);
    DirLeaf::clear(node);
    let leaf = LeafRef::open(old)?;
    leaf.check(Span::ALL)?;
    append(node, &leaf, 0..leaf.len())
}

/// Adds some entries of another leaf at the end.
fn append(to: &mut [u8], from: &LeafRef<'_>, which: std::ops::Range<usize>) -> Sound<()> {
    let leaf = LeafRef::open(to)?;
    let (mut count, mut heap, gaps) = (leaf.len(), leaf.heap, leaf.gaps);
    for index in which {
        let (record, rest) = from.raw(index)?;
        let name = rest.get(..record.name_bytes.into()).ok_or("a name is out of bounds")?;
        let bytes = RECORD_BYTES + name.len();
        let at = NODE_HEADER_BYTES + count * OFFSET_BYTES;
        heap = heap.checked_sub(bytes).filter(|heap| at + OFFSET_BYTES <= *heap).ok_or("no room for an entry")?;
        to[heap..heap + RECORD_BYTES].copy_from_slice(record.as_bytes());
        to[heap + RECORD_BYTES..heap + bytes].copy_from_slice(name);
        to[at..at + OFFSET_BYTES].copy_from_slice(&(heap as u16).to_le_bytes());
        count += 1;
    }
    set_header(to, count, heap, gaps);
    Ok(())
}

fn set_header(node: &mut [u8], count: usize, heap: usize, gaps: usize) {
    if let Ok((header, _)) = NodeHeader::mut_from_prefix(node) {
        header.count = (count as u16).into();
        header.own = [(heap as u16).into(), (gaps as u16).into()];
    }
}

impl tree::Leaf for DirLeaf {
    const KIND: BlockKind = BlockKind::Directory;
    const WHAT: &'static str = "directory";
    const ASCENDING: bool = false;

    fn check(node: &[u8], span: Span) -> Sound<()> {
        LeafRef::open(node)?.check(span)
    }

    fn clear(node: &mut [u8]) {
        let bytes = node.len();
        tree::format(node, 0);
        set_header(node, 0, bytes, 0);
    }

    fn used(node: &[u8]) -> Sound<usize> {
        Ok(LeafRef::open(node)?.used())
    }

    fn append(to: &mut [u8], from: &[u8]) -> Sound<()> {
        let from = LeafRef::open(from)?;
        let leaf = LeafRef::open(to)?;
        if leaf.gaps > 0 {
            compact(to)?;
        }
        append(to, &from, 0..from.len())
    }

    fn split(from: &[u8], left: &mut [u8], right: &mut [u8], _most: bool) -> Sound<u64> {
        let from = LeafRef::open(from)?;
        let half = from.used() / 2;
        let (mut at, mut bytes) = (0, 0);
        while at + 1 < from.len() && (at == 0 || bytes < half) {
            bytes += OFFSET_BYTES + RECORD_BYTES + from.entry(at)?.name.len();
            at += 1;
        }
        if at == 0 {
            return Err("too few entries fill it".to_string());
        }
        append(left, &from, 0..at)?;
        append(right, &from, at..from.len())?;
        from.key(at)
    }
}
