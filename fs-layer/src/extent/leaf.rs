//! Leaves of extent maps: records of one length.

use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{Extent, FILE_BLOCKS_MAX};
use crate::blocks::BlockKind;
use crate::tree::{self, NODE_HEADER_BYTES, NodeHeader, Sound, Span};

/// Above any address of the disk, in blocks.
pub const ADDRESS_END: u64 = 1 << 52;
/// The flag of extents that read as zeros.
const UNWRITTEN: u32 = 1;

/// An extent on the disk.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub struct Record {
    start: U64,
    address: U64,
    count: U32,
    before: U32,
    after: U32,
    flags: U32,
}

const RECORD_BYTES: usize = 32;
const _: () = assert!(size_of::<Record>() == RECORD_BYTES);

impl From<Extent> for Record {
    fn from(extent: Extent) -> Record {
        Record {
            start: extent.start.into(),
            address: extent.address.into(),
            count: extent.count.into(),
            before: extent.before.into(),
            after: extent.after.into(),
            flags: if extent.unwritten { UNWRITTEN } else { 0 }.into(),
        }
    }
}

impl Record {
    /// The extent, if it can be one.
    fn read(&self, index: usize) -> Sound<Extent> {
        let flags = self.flags.get();
        let extent = Extent {
            start: self.start.get(),
            address: self.address.get(),
            count: self.count.get(),
            unwritten: flags & UNWRITTEN != 0,
            before: self.before.get(),
            after: self.after.get(),
        };
        let (before, behind) = (u64::from(extent.before), u64::from(extent.count) + u64::from(extent.after));
        if flags & !UNWRITTEN != 0 {
            return Err(format!("flags {flags:#x} of extent {index} are not known"));
        }
        if extent.count == 0 || before > extent.start || extent.start.saturating_add(behind) > FILE_BLOCKS_MAX {
            return Err(format!("extent {index} is not in the file"));
        }
        if before >= extent.address || extent.address.saturating_add(behind) > ADDRESS_END {
            return Err(format!("extent {index} is not on the disk"));
        }
        Ok(extent)
    }
}

/// The leaves of an extent map.
pub struct ExtentLeaf;

/// A leaf to be read. Each extent that is taken out of it is sound in itself.
#[derive(Clone, Copy)]
pub struct LeafRef<'a> {
    records: &'a [Record],
    room: usize,
}

impl<'a> LeafRef<'a> {
    /// Verifies the header.
    pub fn open(node: &'a [u8]) -> Sound<LeafRef<'a>> {
        let header = tree::header(node)?;
        if header.level != 0 {
            return Err("an inner node where a leaf must be".to_string());
        }
        let room = (node.len() - NODE_HEADER_BYTES) / RECORD_BYTES;
        <[Record]>::ref_from_prefix_with_elems(&node[NODE_HEADER_BYTES..], header.count.get().into())
            .map(|(records, _)| LeafRef { records, room })
            .map_err(|_| format!("{} extents do not fit", header.count))
    }

    /// How many extents it has.
    pub fn len(&self) -> usize {
        self.records.len()
    }

    /// Whether a further one finds room.
    pub fn has_room(&self) -> bool {
        self.len() < self.room
    }

    /// An extent, if there is one of that index.
    pub fn get(&self, index: usize) -> Sound<Option<Extent>> {
        self.records.get(index).map(|record| record.read(index)).transpose()
    }

    /// The index of the first extent that starts at `block` or later.
    pub fn find(&self, block: u64) -> usize {
        self.records.partition_point(|record| record.start.get() < block)
    }

    /// Verifies the extents next to an index that [`LeafRef::find`] returned.
    pub fn check_around(&self, index: usize, span: Span) -> Sound<()> {
        let start = index.saturating_sub(1);
        self.check_some(start, &self.records[start.min(self.len())..(index + 2).min(self.len())], span)
    }

    /// Verifies everything.
    pub fn check(&self, span: Span) -> Sound<()> {
        self.check_some(0, self.records, span)
    }

    fn check_some(&self, first: usize, records: &[Record], span: Span) -> Sound<()> {
        let mut least = 0;
        for (index, record) in records.iter().enumerate() {
            let index = first + index;
            let extent = record.read(index)?;
            if !span.contains(extent.start) || extent.start - u64::from(extent.before) < least {
                return Err(format!("extent {index} is out of order or overlaps the one before"));
            }
            least = extent.end() + u64::from(extent.after);
        }
        Ok(())
    }
}

/// Puts `new` in the place of the records from `index` on, `old` of them.
pub fn replace(node: &mut [u8], index: usize, old: usize, new: &[Extent]) -> Sound<()> {
    let count = LeafRef::open(node)?.len();
    if index + old > count {
        return Err("fewer extents than there were".to_string());
    }
    let count_after = count - old + new.len();
    let (records, _) = <[Record]>::mut_from_prefix_with_elems(&mut node[NODE_HEADER_BYTES..], count.max(count_after))
        .map_err(|_| "no room for an extent")?;
    records.copy_within(index + old..count, index + new.len());
    for (record, extent) in records[index..].iter_mut().zip(new) {
        *record = (*extent).into();
    }
    records[count_after..].as_mut_bytes().fill(0);
    set_count(node, count_after);
    Ok(())
}

fn append(to: &mut [u8], new: &[Record]) -> Sound<()> {
    let count = LeafRef::open(to)?.len();
    let all = <[Record]>::mut_from_prefix_with_elems(&mut to[NODE_HEADER_BYTES..], count + new.len());
    let (all, _) = all.map_err(|_| "no room for the extents of a neighbour")?;
    all[count..].copy_from_slice(new);
    set_count(to, count + new.len());
    Ok(())
}

fn set_count(node: &mut [u8], count: usize) {
    if let Ok((header, _)) = NodeHeader::mut_from_prefix(node) {
        header.count = (count as u16).into();
    }
}

impl tree::Leaf for ExtentLeaf {
    const KIND: BlockKind = BlockKind::Extents;
    const WHAT: &'static str = "file's extent map";
    const ASCENDING: bool = true;

    fn check(node: &[u8], span: Span) -> Sound<()> {
        LeafRef::open(node)?.check(span)
    }

    fn clear(node: &mut [u8]) {
        tree::format(node, 0);
    }

    fn used(node: &[u8]) -> Sound<usize> {
        Ok(size_of_val(LeafRef::open(node)?.records))
    }

    fn append(to: &mut [u8], from: &[u8]) -> Sound<()> {
        append(to, LeafRef::open(from)?.records)
    }

    fn split(from: &[u8], left: &mut [u8], right: &mut [u8], most: bool) -> Sound<u64> {
        let records = LeafRef::open(from)?.records;
        let (low, high) = records.split_at(tree::split_at(records.len(), most));
        if low.is_empty() || high.is_empty() {
            return Err("too few extents fill it".to_string());
        }
        append(left, low)?;
        append(right, high)?;
        Ok(high[0].start.get())
    }
}
