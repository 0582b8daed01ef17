//! Sizes as people write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A number of bytes, written as `4096`, `64KiB`, `16MiB`, `4GiB`, `1TiB`, `1EiB`. `K`, `M` and so on alone mean the binary
/// units too; `KB`, `MB` and so on are powers of ten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// `n` mebibytes.
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// `n` gibibytes.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }

    /// As an index or a length in memory.
    pub fn as_usize(self) -> usize {
        // The daemon runs on 64-bit machines only; saturating keeps this total all the same.
        usize::try_from(self.0).unwrap_or(usize::MAX)
    }
}

/// A size that could not be understood.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum BadSize {
    /// Not a number with a known unit.
    #[error("{0:?} is not a size; write for instance 4096, 64KiB, 16MiB, 4GiB or 1TiB")]
    Syntax(String),
    /// More than 2^64 - 1 bytes.
    #[error("{0:?} is more than this program can count")]
    TooLarge(String),
}

impl FromStr for ByteSize {
    type Err = BadSize;

    fn from_str(text: &str) -> Result<Self, BadSize> {
        let syntax = || BadSize::Syntax(text.to_owned());
        let trimmed = text.trim();
        let digits_end = trimmed.find(|c: char| !c.is_ascii_digit()).unwrap_or(trimmed.len());
        let (digits, unit) = trimmed.split_at(digits_end);
        if digits.is_empty() {
            return Err(syntax());
        }
        let factor = unit_factor(unit.trim_start()).ok_or_else(syntax)?;
        digits
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(factor))
            .map(Self)
            .ok_or_else(|| BadSize::TooLarge(text.to_owned()))
    }
}

fn unit_factor(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_lowercase();
    let power = match unit.chars().next() {
        None => return Some(1),
        Some('b') => return (unit == "b").then_some(1),
        Some(letter) => "kmgtpe".find(letter)? as u32 + 1,
    };
    match &unit[1..] {
        "" | "ib" => Some(1 << (10 * power)),
        "b" => Some(1000_u64.pow(power)),
        _ => None,
    }
}

impl fmt::Display for ByteSize {
    /// The largest binary unit that loses nothing, so that what is printed can be read back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (shift, unit) in [(60, "EiB"), (50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
            if self.0 != 0 && self.0.is_multiple_of(1 << shift) {
                return f.pad(&format!("{}{unit}", self.0 >> shift));
            }
        }
        f.pad(&self.0.to_string())
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a size such as \"64MiB\", or a number of bytes")]
        enum Written {
            Bytes(u64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Bytes(bytes) => Ok(Self(bytes)),
            Written::Text(text) => text.parse().map_err(de::Error::custom),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("4096B", 4096),
            ("64KiB", 64 << 10),
            ("64k", 64 << 10),
            ("16 MiB", 16 << 20),
            ("4G", 4 << 30),
            ("4gib", 4 << 30),
            ("1GB", 1_000_000_000),
            ("2TiB", 2 << 40),
            ("1P", 1 << 50),
            ("1EiB", 1 << 60),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused_with_an_example() {
        for text in ["", "GiB", "-1", "1.5GiB", "12 parsecs", "5ib", "1kk", "10MiBs"] {
            let error = text.parse::<ByteSize>().unwrap_err();
            assert_eq!(error, BadSize::Syntax(text.to_owned()));
            assert!(error.to_string().contains("16MiB"), "{error}");
        }
        for text in ["99999999999999999999", "16384PiB"] {
            assert_eq!(text.parse::<ByteSize>(), Err(BadSize::TooLarge(text.to_owned())));
        }
    }

    #[test]
    fn what_is_printed_reads_back_the_same() {
        for bytes in [0, 1, 1023, 1024, 1025, 3 << 20, 1 << 30, (1 << 30) + 1, 5 << 40, 1 << 60, u64::MAX] {
            let size = ByteSize(bytes);
            assert_eq!(size.to_string().parse(), Ok(size));
        }
        assert_eq!(ByteSize(3 << 20).to_string(), "3MiB");
        assert_eq!(ByteSize(1536).to_string(), "1536");
    }
}
