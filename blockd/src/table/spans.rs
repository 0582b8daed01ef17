//! Long spans of allocated zeroes, kept as ranges instead of leaf by leaf.

use std::collections::BTreeMap;
use std::ops::Range;

use super::key;
use super::kv::Batch;

/// Ranges of leaves that, where no leaf is stored, are allocated zeroes rather than holes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct ZeroSpans {
    /// First leaf to one past the last; disjoint and not touching.
    spans: BTreeMap<u64, u64>,
}

impl ZeroSpans {
    /// Takes over a stored span. False when it overlaps another or is empty.
    pub(super) fn load(&mut self, range: Range<u64>) -> bool {
        let free = range.start < range.end
            && self.spans.range(..range.end).next_back().is_none_or(|(_, end)| *end <= range.start);
        if free {
            self.spans.insert(range.start, range.end);
        }
        free
    }

    pub(super) fn contains(&self, leaf: u64) -> bool {
        self.span_at(leaf).is_some()
    }

    fn span_at(&self, leaf: u64) -> Option<Range<u64>> {
        let (start, end) = self.spans.range(..=leaf).next_back()?;
        (leaf < *end).then_some(*start..*end)
    }

    /// Whether `leaf` is in a span, and one past the last leaf of which the same is true.
    pub(super) fn state_from(&self, leaf: u64) -> (bool, u64) {
        match self.span_at(leaf) {
            Some(span) => (true, span.end),
            None => {
                let next = self.spans.range(leaf..).next();
                (false, next.map_or(u64::MAX, |(start, _)| *start))
            }
        }
    }

    /// Adds (`zero`) or removes the leaves of `range`, and puts what that changes into `batch`.
    pub(super) fn set(&mut self, range: Range<u64>, zero: bool, batch: &mut Batch) {
        let mut old: Vec<_> = self.spans.range(range.start..range.end).map(|(start, end)| *start..*end).collect();
        // Spans that reach in from the left, and with `zero` one that only touches, to be joined.
        if let Some((start, end)) = self.spans.range(..range.start).next_back()
            && (*end > range.start || (zero && *end == range.start))
        {
            old.insert(0, *start..*end);
        }
        if zero && let Some(end) = self.spans.get(&range.end) {
            old.push(range.end..*end);
        }
        let mut new = Vec::new();
        let (first, last) = (old.first().cloned(), old.last().cloned());
        if zero {
            let start = first.map_or(range.start, |span| span.start.min(range.start));
            let end = last.map_or(range.end, |span| span.end.max(range.end));
            new.push(start..end);
        } else {
            if let Some(span) = first
                && span.start < range.start
            {
                new.push(span.start..range.start);
            }
            if let Some(span) = last
                && span.end > range.end
            {
                new.push(range.end..span.end);
            }
        }
        for span in old {
            self.spans.remove(&span.start);
            batch.delete(&key::zeroes(span.start));
        }
        for span in new {
            self.spans.insert(span.start, span.end);
            batch.put(&key::zeroes(span.start), key::encode_zeroes(span.end));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn behaves_like_a_set(edits in prop::collection::vec((0u64..40, 1u64..12, any::<bool>()), 1..30)) {
            let mut spans = ZeroSpans::default();
            let mut model = [false; 60];
            let kv = super::super::MemKv::new();
            use super::super::kv::Kv;
            for (start, len, zero) in edits {
                let mut batch = Batch::default();
                spans.set(start..start + len, zero, &mut batch);
                kv.write(batch).unwrap();
                model[start as usize..(start + len) as usize].fill(zero);
                for (leaf, expected) in model.iter().enumerate() {
                    prop_assert_eq!(spans.contains(leaf as u64), *expected);
                    let (state, end) = spans.state_from(leaf as u64);
                    prop_assert_eq!(state, *expected);
                    prop_assert!(end > leaf as u64);
                    let run = &model[leaf..end.min(60) as usize];
                    prop_assert!(run.iter().all(|state| state == expected));
                }
                let mut loaded = ZeroSpans::default();
                kv.scan(&key::zeroes(0), &key::zeroes(u64::MAX), &mut |k, v| {
                    loaded.load(key::number(k).unwrap()..key::decode_zeroes(v).unwrap())
                }).unwrap();
                prop_assert_eq!(&loaded, &spans);
            }
        }
    }
}
