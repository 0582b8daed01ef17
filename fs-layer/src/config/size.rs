//! Sizes as people write them, the same as blockd's.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// A number of bytes, written as `4096`, `64KiB`, `16MiB`, `4GiB`, `1TiB`, `1EiB`. `K`, `M` and so on alone mean the binary
/// units too; `KB`, `MB` and so on are powers of ten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

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

    fn from_str(text: &str) -> Result<ByteSize, BadSize> {
        let syntax = || BadSize::Syntax(text.to_owned());
        let text_only = text.trim();
        let unit_at = text_only.find(|c: char| !c.is_ascii_digit()).unwrap_or(text_only.len());
        let (digits, unit) = text_only.split_at(unit_at);
        if digits.is_empty() {
            return Err(syntax());
        }
        let factor = factor(unit.trim_start()).ok_or_else(syntax)?;
        let bytes = digits.parse::<u64>().ok().and_then(|number| number.checked_mul(factor));
        bytes.map(ByteSize).ok_or_else(|| BadSize::TooLarge(text.to_owned()))
    }
}

/// How many bytes a unit is.
fn factor(unit: &str) -> Option<u64> {
    let unit = unit.to_ascii_lowercase();
    if matches!(unit.as_str(), "" | "b") {
        return Some(1);
    }
    let power = "kmgtpe".find(unit.chars().next()?)? as u32 + 1;
    match unit.get(1..)? {
        "" | "ib" => Some(1 << (10 * power)),
        "b" => Some(1000_u64.pow(power)),
        _ => None,
    }
}

impl fmt::Display for ByteSize {
    /// In the largest binary unit that loses nothing, so that what is printed can be read back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let units = [(60, "EiB"), (50, "PiB"), (40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        let unit = units.iter().find(|(shift, _)| self.0 != 0 && self.0.is_multiple_of(1 << shift));
        match unit {
            Some((shift, unit)) => f.pad(&format!("{}{unit}", self.0 >> shift)),
            None => f.pad(&self.0.to_string()),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ByteSize, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a size such as \"64MiB\", or a number of bytes")]
        enum Written {
            Bytes(u64),
            Text(String),
        }
        match Written::deserialize(deserializer)? {
            Written::Bytes(bytes) => Ok(ByteSize(bytes)),
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
            ("4096B", 4096),
            ("64k", 64 << 10),
            ("16 MiB", 16 << 20),
            ("1GB", 1_000_000_000),
            ("1EiB", 1 << 60),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "GiB", "-1", "1.5GiB", "12 parsecs", "5ib", "1kk", "10MiBs"] {
            assert_eq!(text.parse::<ByteSize>(), Err(BadSize::Syntax(text.to_owned())));
        }
        assert_eq!("16EiB".parse::<ByteSize>(), Err(BadSize::TooLarge("16EiB".to_owned())));
    }

    #[test]
    fn what_is_printed_reads_back_the_same() {
        for bytes in [0, 1, 1023, 1024, 3 << 20, (1 << 30) + 1, 1 << 60, u64::MAX] {
            assert_eq!(ByteSize(bytes).to_string().parse(), Ok(ByteSize(bytes)));
        }
    }
}
