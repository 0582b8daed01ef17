//! Lengths of time as people write them.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A length of time with its unit: `500ms`, `5s`, `2m`, `1h`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Interval(pub Duration);

/// A length of time that could not be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0:?} is not a length of time; write a whole number and its unit: 500ms, 5s, 2m or 1h")]
pub struct BadDuration(String);

const UNITS_MS: [(&str, u64); 4] = [("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

impl FromStr for Interval {
    type Err = BadDuration;

    fn from_str(text: &str) -> Result<Self, BadDuration> {
        let bad = || BadDuration(text.to_owned());
        let trimmed = text.trim();
        let unit_start = trimmed.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let (digits, unit) = trimmed.split_at(unit_start);
        let (_, factor) = UNITS_MS.iter().find(|(name, _)| *name == unit.trim_start()).ok_or_else(bad)?;
        let ms = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(*factor)).ok_or_else(bad)?;
        Ok(Self(Duration::from_millis(ms)))
    }
}

impl fmt::Display for Interval {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = u64::try_from(self.0.as_millis()).unwrap_or(u64::MAX);
        if ms == 0 {
            return f.write_str("0s");
        }
        for (unit, factor) in UNITS_MS {
            if ms.is_multiple_of(factor) {
                return write!(f, "{}{unit}", ms / factor);
            }
        }
        unreachable!("every whole number of milliseconds is a multiple of one")
    }
}

impl Serialize for Interval {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Interval {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_and_print() {
        for (text, ms) in [("0s", 0), ("500ms", 500), ("5s", 5000), ("2m", 120_000), ("1h", 3_600_000)] {
            let interval: Interval = text.parse().unwrap();
            assert_eq!(interval.0, Duration::from_millis(ms));
            assert_eq!(interval.to_string(), text);
        }
        assert_eq!("90s".parse::<Interval>().unwrap().to_string(), "90s");
        assert_eq!("1500ms".parse::<Interval>().unwrap().to_string(), "1500ms");
    }

    #[test]
    fn a_time_without_a_unit_is_refused() {
        for text in ["", "5", "s", "1.5s", "-1s", "5 fortnights", "99999999999999999h"] {
            assert_eq!(text.parse::<Interval>(), Err(BadDuration(text.to_owned())));
        }
    }
}
