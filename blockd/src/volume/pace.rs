//! Paces writers as the log fills, so that they slow down smoothly instead of running into a wall.

/// Below this fill nobody is slowed down.
const FREE_FILL: f64 = 0.5;
/// Admitted beyond the drain rate just above [`FREE_FILL`], in bytes per second; falls to nothing as the log fills.
const HEADROOM: f64 = 512.0 * 1024.0 * 1024.0;
/// Admitted however full the log is, in bytes per second, as long as it is not entirely full.
const FLOOR: f64 = 1024.0 * 1024.0;
/// Unused allowance that may be caught up on, in microseconds.
const BURST_US: u64 = 10_000;
/// Weight of the newest second in the drain rate.
const SMOOTHING: f64 = 0.3;

/// Decides when the next write may enter the log.
#[derive(Debug, Default)]
pub struct Pacer {
    /// Earliest time of the next admission, driver clock.
    next_us: u64,
    /// Bytes per second leaving for the bucket.
    drain: f64,
    drained: u64,
    measured_us: u64,
}

impl Pacer {
    /// Counts bytes that left for the bucket.
    pub fn drained(&mut self, bytes: u64) {
        self.drained += bytes;
    }

    /// Bytes per second leaving for the bucket, smoothed.
    pub fn drain_rate(&self) -> f64 {
        self.drain
    }

    /// Takes the measure about once a second.
    pub fn tick(&mut self, now_us: u64) {
        let elapsed = now_us.saturating_sub(self.measured_us);
        if elapsed >= 1_000_000 {
            let rate = self.drained as f64 * 1e6 / elapsed as f64;
            self.drain += SMOOTHING * (rate - self.drain);
            self.drained = 0;
            self.measured_us = now_us;
        }
    }

    /// When `bytes` may enter a log that is `fill` full: at once (none), or not before the returned time.
    pub fn admit(&mut self, now_us: u64, bytes: usize, fill: f64) -> Option<u64> {
        if fill <= FREE_FILL {
            self.next_us = now_us;
            return None;
        }
        if now_us < self.next_us {
            return Some(self.next_us);
        }
        let left = ((1.0 - fill) / (1.0 - FREE_FILL)).clamp(0.0, 1.0);
        let rate = FLOOR + self.drain + HEADROOM * left * left;
        let cost_us = (bytes as f64 / rate * 1e6) as u64;
        self.next_us = self.next_us.max(now_us.saturating_sub(BURST_US)) + cost_us;
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes admitted in one second of 64 KiB writes at a constant fill.
    fn admitted(fill: f64, drain: f64) -> f64 {
        let mut pacer = Pacer { drain, ..Pacer::default() };
        let (mut now, mut bytes) = (0, 0.0);
        while now < 1_000_000 {
            match pacer.admit(now, 65536, fill) {
                None => bytes += 65536.0,
                Some(at) => now = at,
            }
            if fill <= FREE_FILL {
                now += 10;
            }
        }
        bytes
    }

    #[test]
    fn slows_down_monotonically_towards_the_drain_rate() {
        let drain = 50e6;
        let rates: Vec<f64> = [0.55, 0.7, 0.85, 0.95, 1.0].iter().map(|&f| admitted(f, drain)).collect();
        assert!(rates.windows(2).all(|w| w[0] > w[1]), "{rates:?}");
        assert!((drain..drain * 1.1).contains(&rates[4]), "{rates:?}");
        assert!(admitted(0.4, 0.0) > 5e9, "no pacing while there is room");
    }
}
