//! A map that is looked at and changed, extent by extent.

use std::ops::ControlFlow;

use super::area::AreaHeader;
use super::leaf::{self, ExtentLeaf, LeafRef};
use super::{DiskRange, Extent};
use crate::blocks::{ReadBlocks, WriteBlocks};
use crate::disk::BlockAddress;
use crate::tree::{self, IN_INODE, InNode, Leaf, Path, Root, Span, descend};
use crate::vfs::Result;

/// The extents next to a block: the last that starts at or before it, and the first that starts after it.
pub fn around<B: ReadBlocks + ?Sized>(blocks: &B, root: &[u8], block: u64) -> Result<(Option<Extent>, Option<Extent>)> {
    let (path, node) = descend::<ExtentLeaf, B>(blocks, root, block)?;
    let leaf = LeafRef::open(&node).in_node::<ExtentLeaf>(path.leaf)?;
    let index = leaf.find(block.saturating_add(1));
    let left = match index.checked_sub(1) {
        Some(index) => leaf.get(index).in_node::<ExtentLeaf>(path.leaf)?,
        // An extent reaches over the end of its leaf's span if what follows came later.
        None if path.span.low > 0 => {
            let (path, node) = descend::<ExtentLeaf, B>(blocks, root, path.span.low - 1)?;
            let leaf = LeafRef::open(&node).in_node::<ExtentLeaf>(path.leaf)?;
            leaf.len().checked_sub(1).map_or(Ok(None), |last| leaf.get(last)).in_node::<ExtentLeaf>(path.leaf)?
        }
        None => None,
    };
    let right = match leaf.get(index).in_node::<ExtentLeaf>(path.leaf)? {
        None if path.span.high != Span::ALL.high => {
            let (path, node) = descend::<ExtentLeaf, B>(blocks, root, path.span.high)?;
            let leaf = LeafRef::open(&node).in_node::<ExtentLeaf>(path.leaf)?;
            leaf.get(0).in_node::<ExtentLeaf>(path.leaf)?
        }
        right => right,
    };
    let ordered = left.is_none_or(|l| l.start <= block)
        && right.is_none_or(|r| r.start > block)
        && left.is_none_or(|l| right.is_none_or(|r| claimed_end(&l) <= claimed_start(&r)));
    match ordered {
        true => Ok((left, right)),
        false => Err(tree::damaged::<ExtentLeaf>(path.leaf, &format!("extents around block {block} are out of order"))),
    }
}

/// The first block of the file behind the extent's reserve.
pub fn claimed_end(extent: &Extent) -> u64 {
    extent.end() + u64::from(extent.after)
}

/// The first block of the file in the extent's reserve.
pub fn claimed_start(extent: &Extent) -> u64 {
    extent.start - u64::from(extent.before)
}

/// The extents that end after `from`.
pub fn list<B: ReadBlocks + ?Sized>(
    blocks: &B,
    root: &[u8],
    from: u64,
    mut each: impl FnMut(Extent) -> ControlFlow<()>,
) -> Result<bool> {
    if let (Some(left), _) = around(blocks, root, from)?
        && left.start < from
        && left.end() > from
        && each(left).is_break()
    {
        return Ok(false);
    }
    let mut cursor = from;
    loop {
        let (path, node) = descend::<ExtentLeaf, B>(blocks, root, cursor)?;
        let leaf = LeafRef::open(&node).in_node::<ExtentLeaf>(path.leaf)?;
        leaf.check(path.span).in_node::<ExtentLeaf>(path.leaf)?;
        let mut index = leaf.find(cursor);
        while let Some(extent) = leaf.get(index).in_node::<ExtentLeaf>(path.leaf)? {
            if each(extent).is_break() {
                return Ok(false);
            }
            index += 1;
        }
        if path.span.high == Span::ALL.high {
            return Ok(true);
        }
        cursor = path.span.high;
    }
}

/// A map to be changed.
pub struct Map<'a, B: ?Sized> {
    pub blocks: &'a mut B,
    pub header: &'a mut AreaHeader,
    pub root: &'a mut [u8],
}

impl<B: WriteBlocks + ?Sized> Map<'_, B> {
    /// See [`around`].
    pub fn around(&self, block: u64) -> Result<(Option<Extent>, Option<Extent>)> {
        around(&*self.blocks, self.root, block)
    }

    /// The first extent that ends after `block`.
    pub fn next(&self, block: u64) -> Result<Option<Extent>> {
        let (left, right) = self.around(block)?;
        Ok(left.filter(|l| l.end() > block).or(right))
    }

    /// The leaf where an extent with this start is or belongs, the index there, and whether it is there and a further one has room.
    fn place(&self, start: u64) -> Result<(Path, usize, Option<Extent>, bool)> {
        let (path, node) = descend::<ExtentLeaf, B>(&*self.blocks, self.root, start)?;
        let leaf = LeafRef::open(&node).in_node::<ExtentLeaf>(path.leaf)?;
        let index = leaf.find(start);
        leaf.check_around(index, path.span).in_node::<ExtentLeaf>(path.leaf)?;
        let found = leaf.get(index).in_node::<ExtentLeaf>(path.leaf)?;
        Ok((path, index, found.filter(|found| found.start == start), leaf.has_room()))
    }

    fn leaf_mut(&mut self, at: BlockAddress) -> Result<&mut [u8]> {
        Ok(if at == IN_INODE { &mut *self.root } else { self.blocks.modify(at, ExtentLeaf::KIND)?.as_mut_slice() })
    }

    fn count(&mut self, old: &[Extent], new: &[Extent]) {
        let header = &mut *self.header;
        let sum = |of: &[Extent]| of.iter().map(|e| u64::from(e.count)).sum::<u64>();
        let sum_unwritten = |of: &[Extent]| of.iter().filter(|e| e.unwritten).map(|e| u64::from(e.count)).sum::<u64>();
        // Saturating: the counts of a damaged area are not to be trusted.
        let shift = |from: u64, less: u64, more: u64| from.saturating_sub(less).saturating_add(more).into();
        header.extents = shift(header.extents.get(), old.len() as u64, new.len() as u64);
        header.mapped = shift(header.mapped.get(), sum(old), sum(new));
        header.unwritten = shift(header.unwritten.get(), sum_unwritten(old), sum_unwritten(new));
    }

    fn root(&mut self) -> (&mut B, Root<'_>) {
        (&mut *self.blocks, Root { node: &mut *self.root, blocks: &mut self.header.blocks })
    }

    fn missing(start: u64) -> crate::vfs::VfsError {
        tree::damaged::<ExtentLeaf>(IN_INODE, &format!("the extent at {start} was there a moment ago"))
    }

    /// Adds an extent that overlaps none.
    pub fn put(&mut self, extent: Extent) -> Result<()> {
        loop {
            let (path, index, found, room) = self.place(extent.start)?;
            if found.is_some() {
                return Err(tree::damaged::<ExtentLeaf>(path.leaf, &format!("two extents at {}", extent.start)));
            }
            if room {
                let node = self.leaf_mut(path.leaf)?;
                leaf::replace(node, index, 0, &[extent]).in_node::<ExtentLeaf>(path.leaf)?;
                self.count(&[], &[extent]);
                return Ok(());
            }
            let (blocks, mut root) = self.root();
            tree::make_room::<ExtentLeaf, B>(blocks, &mut root, &path)?;
        }
    }

    /// Replaces the extent at `start` by one that does not overlap those beside it.
    pub fn set(&mut self, start: u64, extent: Extent) -> Result<()> {
        let (path, index, found, _) = self.place(start)?;
        let old = found.ok_or_else(|| Self::missing(start))?;
        // Neighbours are not in the way, so that it stays the `index`th if it stays in the leaf.
        if path.span.contains(extent.start) {
            let node = self.leaf_mut(path.leaf)?;
            leaf::replace(node, index, 1, &[extent]).in_node::<ExtentLeaf>(path.leaf)?;
            self.count(&[old], &[extent]);
            return Ok(());
        }
        self.delete(start)?;
        self.put(extent)
    }

    /// Removes the extent at `start`.
    pub fn delete(&mut self, start: u64) -> Result<()> {
        match self.drain(start, u64::MAX, 1, |_| ())? {
            1 => Ok(()),
            _ => Err(Self::missing(start)),
        }
    }

    /// Removes extents of one leaf, at most `max`: that at `start` and those after it, as far as they end by `to`. Returns how many.
    fn drain(&mut self, start: u64, to: u64, max: usize, mut each: impl FnMut(Extent)) -> Result<usize> {
        let (path, index, found, _) = self.place(start)?;
        if found.is_none() {
            return Ok(0);
        }
        let node = self.leaf_mut(path.leaf)?;
        let leaf = LeafRef::open(node).in_node::<ExtentLeaf>(path.leaf)?;
        let mut gone = Vec::new();
        while gone.len() < max
            && let Some(extent) = leaf.get(index + gone.len()).in_node::<ExtentLeaf>(path.leaf)?
            && extent.end() <= to
        {
            each(extent);
            gone.push(extent);
        }
        leaf::replace(node, index, gone.len(), &[]).in_node::<ExtentLeaf>(path.leaf)?;
        self.count(&gone, &[]);
        let (blocks, mut root) = self.root();
        tree::shrink::<ExtentLeaf, B>(blocks, &mut root, &path)?;
        Ok(gone.len())
    }

    /// Adds an extent into a hole, takes what is its reserve now out of its neighbours', and joins it with them.
    pub fn fill(&mut self, new: Extent, left: Option<Extent>, right: Option<Extent>) -> Result<()> {
        let cut_left = left.map(|l| Extent { after: l.after.min((claimed_start(&new) - l.end()) as u32), ..l });
        let cut_right = right.map(|r| Extent { before: r.before.min((r.start - claimed_end(&new)) as u32), ..r });
        let with_left = cut_left.and_then(|l| join(&l, &new));
        let joined = with_left.unwrap_or(new);
        let with_right = cut_right.and_then(|r| join(&joined, &r));
        let joined = with_right.unwrap_or(joined);
        // First what gets smaller, so that extents never overlap.
        if let Some(l) = cut_left.filter(|l| with_left.is_none() && left != Some(*l)) {
            self.set(l.start, l)?;
        }
        if let Some(r) = cut_right.filter(|r| with_right.is_none() && right != Some(*r)) {
            self.set(r.start, r)?;
        }
        match (with_left.and(left), with_right.and(right)) {
            (Some(l), Some(r)) => {
                self.delete(r.start)?;
                self.set(l.start, joined)
            }
            (Some(l), None) => self.set(l.start, joined),
            (None, Some(r)) => self.set(r.start, joined),
            (None, None) => self.put(joined),
        }
    }

    /// Joins the extents that meet at `block`, if they continue each other.
    pub fn join(&mut self, block: u64) -> Result<()> {
        let Some(before) = block.checked_sub(1) else { return Ok(()) };
        if let (Some(left), Some(right)) = self.around(before)?
            && let Some(joined) = join(&left, &right)
        {
            self.delete(right.start)?;
            self.set(left.start, joined)?;
        }
        Ok(())
    }

    /// Cuts what is mapped from `from` up to `to` out of the map, at most `max` extents. Returns where to go on.
    pub fn cut(&mut self, from: u64, to: u64, max: usize, mut each: impl FnMut(Extent)) -> Result<Option<u64>> {
        let (mut cursor, mut left) = (from, max);
        while cursor < to
            && let Some(extent) = self.next(cursor)?.filter(|e| e.start < to)
        {
            if left == 0 {
                return Ok(Some(cursor.max(extent.start)));
            }
            if from <= extent.start && extent.end() <= to {
                let gone = self.drain(extent.start, to, left, |gone| {
                    cursor = gone.end();
                    each(gone);
                })?;
                if gone == 0 {
                    return Err(Self::missing(extent.start));
                }
                left -= gone;
                continue;
            }
            let [low, middle, high] = divide(&extent, from, to);
            match (low, high) {
                (Some(low), high) => {
                    self.set(extent.start, low)?;
                    high.map_or(Ok(()), |high| self.put(high))?;
                }
                (None, Some(high)) => self.set(extent.start, high)?,
                (None, None) => self.delete(extent.start)?,
            }
            cursor = middle.map_or(to, |m| m.end());
            middle.into_iter().for_each(&mut each);
            left -= 1;
        }
        Ok(None)
    }

    /// Says of what is mapped from `from` up to `to` whether it was written.
    pub fn mark(&mut self, from: u64, to: u64, unwritten: bool) -> Result<()> {
        let mut cursor = from;
        while cursor < to
            && let Some(extent) = self.next(cursor)?.filter(|e| e.start < to)
        {
            cursor = extent.end().min(to);
            if extent.unwritten == unwritten {
                continue;
            }
            let [low, middle, high] = divide(&extent, from, to);
            let Some(mut middle) = middle else { continue };
            middle.unwritten = unwritten;
            self.set(extent.start, low.unwrap_or(middle))?;
            if low.is_some() {
                self.put(middle)?;
            }
            high.map_or(Ok(()), |high| self.put(high))?;
            self.join(middle.start)?;
            self.join(middle.end())?;
        }
        Ok(())
    }
}

/// One extent for two, if the second continues the first.
pub fn join(left: &Extent, right: &Extent) -> Option<Extent> {
    let meets = left.end() == right.start
        && left.address + u64::from(left.count) == right.address
        && left.unwritten == right.unwritten;
    let count = left.count.checked_add(right.count)?;
    meets.then_some(Extent { count, after: right.after, ..*left })
}

/// What of an extent is before `from`, between, and from `to` on. The reserve stays with the ends.
fn divide(extent: &Extent, from: u64, to: u64) -> [Option<Extent>; 3] {
    let part = |start: u64, end: u64| {
        let (start, end) = (start.max(extent.start), end.min(extent.end()));
        (start < end).then(|| Extent {
            start,
            address: extent.address_of(start),
            count: (end - start) as u32,
            unwritten: extent.unwritten,
            before: if start == extent.start { extent.before } else { 0 },
            after: if end == extent.end() { extent.after } else { 0 },
        })
    };
    [part(0, from), part(from, to), part(to, u64::MAX)]
}

/// Adds an extent's addresses to the ranges, to the last one if they continue it.
pub fn collect(freed: &mut Vec<DiskRange>, extent: Extent) {
    let count = u64::from(extent.count);
    match freed.last_mut() {
        Some(last) if last.address + last.count == extent.address => last.count += count,
        _ => freed.push(DiskRange { address: extent.address, count }),
    }
}
