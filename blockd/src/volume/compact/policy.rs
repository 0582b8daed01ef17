//! Which chunks are worth compacting.

use std::collections::BTreeMap;

use crate::table::Usage;

/// When and how fast dead space is got back.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct CompactionTuning {
    /// Bytes per second, read and written together. 0 turns compaction off.
    pub rate: u64,
    /// Compaction works while the chunks in use take more than this many times the bytes that live in them.
    pub ratio: f64,
    /// A chunk of which less than this part lives is compacted in any case.
    pub floor: f64,
}

impl Default for CompactionTuning {
    fn default() -> Self {
        Self { rate: 64 << 20, ratio: 1.5, floor: 0.2 }
    }
}

/// Most chunks taken at once: each costs a request for its header.
const VICTIMS_MAX: usize = 256;
/// Chunks of less than this part of the chunk size are small.
const SMALL_PART: u64 = 8;
/// So many small chunks are made one.
const SMALL_MAX: usize = 64;

/// Chooses what to compact from `candidates`, none of which a snapshot holds. `applied` is the present seq. In a quiet moment
/// nothing is put off to be done together with more. Empty when nothing is worth it.
pub(super) fn choose(
    candidates: &BTreeMap<u64, Usage>,
    tuning: &CompactionTuning,
    chunk_bytes: u64,
    applied: u64,
    quiet: bool,
) -> Vec<u64> {
    let sum = |value: fn(&Usage) -> u64| candidates.values().map(value).sum::<u64>();
    let (stored, live, tombs) = (sum(|u| u.stored), sum(Usage::live_bytes), sum(Usage::tomb_bytes));
    let part = |usage: &Usage| usage.live_bytes() as f64 / usage.stored.max(1) as f64;
    // Freeing next to nothing is not worth two requests.
    let pays = |usage: &Usage| usage.gain() >= usage.stored / 16 && usage.gain() > 0;
    let below = |usage: &Usage| pays(usage) && part(usage) < tuning.floor;
    let below_floor: u64 = candidates.values().filter(|usage| below(usage)).map(Usage::gain).sum();

    // The more is free and the longer it stays so, the better; what is young loses more by waiting.
    let score = |usage: &Usage| {
        let age = (applied + 1).saturating_sub(usage.birth).max(1) as f64;
        (1.0 - part(usage)) * age / (1.0 + part(usage))
    };
    let take = |wanted: &dyn Fn(&Usage) -> bool| -> Vec<(f64, u64, u64)> {
        let found = candidates.iter().filter(|(_, usage)| wanted(usage));
        found.map(|(id, usage)| (score(usage), *id, usage.copy_bytes() + usage.tomb_bytes())).collect()
    };
    let average = live as f64 / stored.max(1) as f64;
    let mut chosen = if (stored - tombs.min(stored)) as f64 > tuning.ratio * live as f64 {
        take(&|usage| pays(usage) && (part(usage) <= average || part(usage) < tuning.floor))
    } else if below_floor > 0 && (quiet || below_floor >= chunk_bytes / 4) {
        take(&below)
    } else {
        Vec::new()
    };
    // Blocks with several addresses would become several blocks.
    let small = |usage: &Usage| usage.stored < chunk_bytes / SMALL_PART && usage.live <= usage.total;
    if chosen.is_empty() && candidates.values().filter(|usage| small(usage)).count() >= SMALL_MAX {
        chosen = take(&small);
    }
    chosen.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1)));
    let mut bytes = 0;
    let fits = |(_, id, live): &(f64, u64, u64)| {
        let room = bytes < chunk_bytes;
        bytes += live;
        room.then_some(*id)
    };
    chosen.iter().map_while(fits).take(VICTIMS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 1 << 20;

    fn chunks(parts: &[u32]) -> BTreeMap<u64, Usage> {
        let usage = |birth: u64, live| Usage { live, total: 100, stored: CHUNK, birth, ..Usage::default() };
        (1..).zip(parts).map(|(id, live)| (id, usage(id, *live))).collect()
    }

    fn choice(parts: &[u32], quiet: bool) -> Vec<u64> {
        choose(&chunks(parts), &CompactionTuning::default(), CHUNK, 100, quiet)
    }

    #[test]
    fn works_only_above_the_ratio_or_below_the_floor() {
        assert!(choice(&[100, 90, 80, 70], true).is_empty());
        assert!(choice(&[], true).is_empty());
        assert_eq!(choice(&[60, 60, 60], true).len(), 2, "until a chunk is full");
        assert_eq!(choice(&[100, 100, 100, 10], true), [4]);
        assert_eq!(choice(&[100, 100, 100, 10], false), [4]);
    }

    #[test]
    fn takes_what_frees_most_and_stays_free() {
        assert_eq!(choice(&[90, 30, 50, 90], true)[0], 2);
        // As empty, but older.
        assert_eq!(choice(&[30, 90, 90, 30], true)[0], 1);
    }

    #[test]
    fn what_little_is_below_the_floor_waits_for_a_quiet_moment() {
        let mut few = chunks(&[100, 100, 100]);
        few.insert(4, Usage { live: 0, total: 1, stored: 5000, birth: 4, tombs: 1, referred: false });
        let tuning = CompactionTuning::default();
        assert!(choose(&few, &tuning, CHUNK, 9, false).is_empty());
        assert_eq!(choose(&few, &tuning, CHUNK, 9, true), [4]);
        // Nothing but zeroes to tell: never again, encrypted or not.
        for stored in [120, 168] {
            few.insert(4, Usage { live: 0, total: 0, stored, birth: 4, tombs: 1, referred: false });
            assert!(choose(&few, &tuning, CHUNK, 9, true).is_empty());
        }
    }

    #[test]
    fn many_small_chunks_become_one() {
        let small = |id: u64| (id, Usage { live: 1, total: 1, stored: 5000, birth: id, ..Usage::default() });
        let many: BTreeMap<u64, Usage> = (1..=64).map(small).collect();
        let tuning = CompactionTuning { ratio: 1.5, ..Default::default() };
        assert_eq!(choose(&many, &tuning, CHUNK, 64, false).len(), 64);
        let few: BTreeMap<u64, Usage> = (1..=63).map(small).collect();
        assert!(choose(&few, &tuning, CHUNK, 64, true).is_empty());
    }
}
