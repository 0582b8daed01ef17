//! Latencies, counted in logarithmic buckets.

use std::time::Duration;

/// Buckets per doubling: a bucket's bounds are within 12.5 % of each other.
const STEPS: usize = 8;
const BUCKETS: usize = 64 * STEPS;

/// A fixed-size histogram of durations, in nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], total: 0 }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&mut self, duration: Duration) {
        let nanos = (duration.as_nanos() as u64).max(STEPS as u64);
        let log = nanos.ilog2() as usize;
        let step = (nanos >> (log - 3)) as usize & (STEPS - 1);
        self.counts[log * STEPS + step] += 1;
        self.total += 1;
    }

    /// Adds what another counted.
    pub fn merge(&mut self, other: &Histogram) {
        for (mine, theirs) in self.counts.iter_mut().zip(&other.counts) {
            *mine += theirs;
        }
        self.total += other.total;
    }

    /// The upper bound, in microseconds, of the bucket in which the given share (0 to 1) is reached; 0 when empty.
    pub fn quantile_us(&self, share: f64) -> f64 {
        let wanted = (self.total as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (bucket, count) in self.counts.iter().enumerate() {
            seen += count;
            if *count > 0 && seen >= wanted {
                let low = 2f64.powi((bucket / STEPS) as i32);
                let high = low * (1.0 + (bucket % STEPS + 1) as f64 / STEPS as f64);
                return high / 1e3;
            }
        }
        0.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_are_within_a_bucket() {
        let mut histogram = Histogram::default();
        for us in 1..=1000 {
            histogram.record(Duration::from_micros(us));
        }
        for (share, us) in [(0.5, 500.0), (0.99, 990.0), (1.0, 1000.0)] {
            let found = histogram.quantile_us(share);
            assert!(found >= us && found < us * 1.15, "{share}: {found}");
        }
        assert_eq!(Histogram::default().quantile_us(0.5), 0.0);
        histogram.record(Duration::ZERO);
    }
}
