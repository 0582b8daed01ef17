//! The dirty map: what has been accepted and is not yet known to the translation table.

use std::collections::BTreeMap;

use crate::types::{Lba, Lsn};

/// Where the newest content of some blocks is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// Payload blocks of a log frame, starting at `block`.
    Log {
        /// Frame number.
        frame: u64,
        /// First payload block.
        block: u32,
    },
    /// Zeroes; `allocated` tells "no hole" from a trim.
    Zero {
        /// Counts as allocated.
        allocated: bool,
    },
    /// What stands in a chunk, in the payload blocks from `index` on.
    Refer {
        /// The chunk's sequence number.
        seq: u64,
        /// Payload index of the first block.
        index: u16,
    },
}

impl Source {
    /// The source `blocks` further on.
    fn skip(self, blocks: u64) -> Source {
        match self {
            Source::Log { frame, block } => Source::Log { frame, block: block + blocks as u32 },
            // Within the chunk's payload: checked where the reference was made or decoded.
            Source::Refer { seq, index } => Source::Refer { seq, index: index + blocks as u16 },
            zero => zero,
        }
    }
}

#[derive(Clone, Copy, Debug)]
struct Extent {
    blocks: u64,
    lsn: Lsn,
    source: Source,
}

/// Part of an answer of [`DirtyMap::pieces`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    /// First block.
    pub lba: Lba,
    /// Number of blocks.
    pub blocks: u64,
    /// The newest accepted content, or none when the map does not know these blocks.
    pub found: Option<(Lsn, Source)>,
}

/// Non-overlapping extents by block address. Later inserts win.
#[derive(Debug, Default)]
pub struct DirtyMap {
    map: BTreeMap<Lba, Extent>,
}

impl DirtyMap {
    /// Number of extents.
    pub fn len(&self) -> usize {
        self.map.len()
    }

    /// Records the content of `blocks` blocks from `lba` on. LSNs of successive calls grow.
    pub fn insert(&mut self, lba: Lba, blocks: u64, lsn: Lsn, source: Source) {
        let new = Extent { blocks, lsn, source };
        // The common case by far: the same blocks again, or nothing in the way.
        if let Some(old) = self.map.get_mut(&lba)
            && old.blocks == blocks
        {
            *old = new;
            return;
        }
        self.remove_range(lba, blocks, Lsn::MAX, |_, _, _| {});
        self.map.insert(lba, new);
    }

    /// Removes what lies in the range with an LSN up to `upto`; `removed` sees each removed piece.
    pub fn remove_range(&mut self, lba: Lba, blocks: u64, upto: Lsn, mut removed: impl FnMut(Lba, u64, Source)) {
        let end = lba + blocks;
        if let Some((&start, &extent)) = self.map.range(..lba).next_back()
            && start + extent.blocks > lba
            && extent.lsn <= upto
        {
            let old_end = start + extent.blocks;
            self.map.get_mut(&start).expect("just seen").blocks = lba - start;
            let inside = old_end.min(end) - lba;
            removed(lba, inside, extent.source.skip(lba - start));
            if old_end > end {
                let rest = Extent { blocks: old_end - end, source: extent.source.skip(end - start), ..extent };
                self.map.insert(end, rest);
            }
        }
        let mut from = lba;
        while from < end
            && let Some((&start, &extent)) = self.map.range(from..end).next()
        {
            let old_end = start + extent.blocks;
            from = old_end;
            if extent.lsn > upto {
                continue;
            }
            self.map.remove(&start);
            removed(start, old_end.min(end) - start, extent.source);
            if old_end > end {
                let rest = Extent { blocks: old_end - end, source: extent.source.skip(end - start), ..extent };
                self.map.insert(end, rest);
            }
        }
    }

    /// The newest content of a single block.
    pub fn get(&self, lba: Lba) -> Option<(Lsn, Source)> {
        let (&start, extent) = self.map.range(..=lba).next_back()?;
        (start + extent.blocks > lba).then(|| (extent.lsn, extent.source.skip(lba - start)))
    }

    /// Covers the whole range, in order, with what is known and gaps.
    pub fn pieces(&self, lba: Lba, blocks: u64) -> Vec<Piece> {
        let end = lba + blocks;
        let mut out = Vec::new();
        let mut at = lba;
        let before = self.map.range(..lba).next_back().filter(|(s, e)| **s + e.blocks > lba);
        for (&start, extent) in before.into_iter().chain(self.map.range(lba..end)) {
            let from = start.max(lba);
            if from > at {
                out.push(Piece { lba: at, blocks: from - at, found: None });
            }
            let to = (start + extent.blocks).min(end);
            let source = extent.source.skip(from - start);
            out.push(Piece { lba: from, blocks: to - from, found: Some((extent.lsn, source)) });
            at = to;
        }
        if at < end {
            out.push(Piece { lba: at, blocks: end - at, found: None });
        }
        out
    }

    /// Every extent, in address order.
    pub fn iter(&self) -> impl Iterator<Item = (Lba, u64, Source)> {
        self.map.iter().map(|(&lba, e)| (lba, e.blocks, e.source))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    enum Op {
        Write(u64, u64),
        Zero(u64, u64),
        Purge(u64, u64, u64),
    }

    fn op() -> impl Strategy<Value = Op> {
        prop_oneof![
            4 => (0u64..60, 1u64..9).prop_map(|(l, b)| Op::Write(l, b)),
            1 => (0u64..60, 1u64..40).prop_map(|(l, b)| Op::Zero(l, b)),
            1 => (0u64..60, 1u64..40, 0u64..50).prop_map(|(l, b, n)| Op::Purge(l, b, n)),
        ]
    }

    proptest! {
        #[test]
        fn agrees_with_an_array(ops in proptest::collection::vec(op(), 1..80)) {
            let mut map = DirtyMap::default();
            let mut model: Vec<Option<(Lsn, Source)>> = vec![None; 128];
            for (i, op) in ops.into_iter().enumerate() {
                let lsn = i as u64 + 1;
                match op {
                    Op::Write(lba, blocks) => {
                        map.insert(lba, blocks, lsn, Source::Log { frame: lsn, block: 3 });
                        for b in 0..blocks {
                            model[(lba + b) as usize] = Some((lsn, Source::Log { frame: lsn, block: 3 + b as u32 }));
                        }
                    }
                    Op::Zero(lba, blocks) => {
                        map.insert(lba, blocks, lsn, Source::Zero { allocated: false });
                        for b in 0..blocks {
                            model[(lba + b) as usize] = Some((lsn, Source::Zero { allocated: false }));
                        }
                    }
                    Op::Purge(lba, blocks, upto) => {
                        let mut gone = Vec::new();
                        map.remove_range(lba, blocks, upto, |l, n, s| gone.push((l, n, s)));
                        for b in lba..lba + blocks {
                            let dead = model[b as usize].filter(|(l, _)| *l <= upto);
                            let reported = gone.iter().find(|(l, n, _)| (*l..l + n).contains(&b)).map(|(l, _, s)| s.skip(b - l));
                            prop_assert_eq!(dead.map(|d| d.1), reported);
                            if dead.is_some() {
                                model[b as usize] = None;
                            }
                        }
                    }
                }
            }
            for lba in 0..128 {
                prop_assert_eq!(map.get(lba), model[lba as usize]);
            }
            let mut at = 5;
            for piece in map.pieces(5, 100) {
                prop_assert_eq!(piece.lba, at);
                for b in 0..piece.blocks {
                    let want = piece.found.map(|(l, s)| (l, s.skip(b)));
                    prop_assert_eq!(model[(piece.lba + b) as usize], want);
                }
                at += piece.blocks;
            }
            prop_assert_eq!(at, 105);
        }
    }
}
