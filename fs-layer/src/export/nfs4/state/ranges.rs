//! Which bytes an owner has locked, as far as this server must know: whether any.

/// Ranges of bytes, each first and last, sorted, apart from each other.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ranges(Vec<(u64, u64)>);

impl Ranges {
    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Adds a range.
    pub fn insert(&mut self, start: u64, last: u64) {
        let touches = |range: &(u64, u64)| range.0 <= last.saturating_add(1) && start <= range.1.saturating_add(1);
        let merged = self.0.iter().copied().filter(touches).fold((start, last), |a, b| (a.0.min(b.0), a.1.max(b.1)));
        self.0.retain(|range| !touches(range));
        let at = self.0.partition_point(|range| range.0 < merged.0);
        self.0.insert(at, merged);
    }

    /// Takes a range away.
    pub fn remove(&mut self, start: u64, last: u64) {
        let mut left = Vec::with_capacity(self.0.len() + 1);
        for &(from, to) in &self.0 {
            if to < start || last < from {
                left.push((from, to));
                continue;
            }
            if from < start {
                left.push((from, start - 1));
            }
            if last < to {
                left.push((last + 1, to));
            }
        }
        self.0 = left;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_merge_and_split() {
        let mut ranges = Ranges::default();
        ranges.insert(10, 19);
        ranges.insert(30, 39);
        ranges.insert(20, 20);
        assert_eq!(ranges.0, [(10, 20), (30, 39)]);
        ranges.insert(15, u64::MAX);
        assert_eq!(ranges.0, [(10, u64::MAX)]);
        ranges.remove(12, 13);
        assert_eq!(ranges.0, [(10, 11), (14, u64::MAX)]);
        ranges.remove(0, u64::MAX);
        assert!(ranges.is_empty());
    }
}
