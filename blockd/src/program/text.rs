//! Numbers and tables for people.

use std::fmt;

/// Bytes in the binary unit that leaves one to four digits, for instance `4 KiB` or `1.5 GiB`.
pub fn bytes(bytes: impl Figure) -> String {
    let mut value = bytes.value();
    let mut units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    // 1023.95 would print as 1024.0.
    while value >= 1023.95 {
        let Some(larger) = units.next() else { break };
        unit = larger;
        value /= 1024.0;
    }
    format!("{} {unit}", short(value))
}

/// A count, with k, M, G for thousands, millions, milliards.
pub fn count(count: impl Figure) -> String {
    let mut value = count.value();
    let mut units = ["", "k", "M", "G", "T"].into_iter();
    let mut unit = units.next().unwrap_or_default();
    while value >= 999.95 {
        let Some(larger) = units.next() else { break };
        unit = larger;
        value /= 1000.0;
    }
    format!("{}{unit}", short(value))
}

/// One decimal where it says something.
fn short(value: f64) -> String {
    let tenths = (value * 10.0).round() / 10.0;
    if tenths >= 100.0 || tenths.fract() == 0.0 { format!("{value:.0}") } else { format!("{tenths:.1}") }
}

/// Seconds as `0.5 s`, `12 s`, `3 m 20 s`, `2 h 5 m` or `3 d 4 h`.
pub fn seconds(seconds: f64) -> String {
    if !seconds.is_finite() {
        return "-".into();
    }
    if seconds < 9.95 {
        return format!("{} s", short(seconds.max(0.0)));
    }
    let whole = seconds.round() as u64;
    let (m, h, d) = (60, 3600, 86400);
    match whole {
        _ if whole < m => format!("{whole} s"),
        _ if whole < h => format!("{} m {} s", whole / m, whole % m),
        _ if whole < d => format!("{} h {} m", whole / h, whole % h / m),
        _ => format!("{} d {} h", whole / d, whole % d / h),
    }
}

/// Milliseconds since 1970 as `2026-01-31 23:59:59 UTC`.
pub fn date(unix_ms: u64) -> String {
    let seconds = unix_ms / 1000;
    let (days, time) = (seconds / 86400, seconds % 86400);
    // Days counted from 1 March of year 0, in cycles of 400 years, so that leap days come last.
    let shifted = days + 719_468;
    let (cycle, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let day_of_year = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day_of_year + 2) / 153;
    let day_of_month = day_of_year - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 { (month + 3, 0) } else { (month - 9, 1) };
    let year = cycle * 400 + year + carry;
    format!("{year:04}-{month:02}-{day_of_month:02} {:02}:{:02}:{:02} UTC", time / 3600, time % 3600 / 60, time % 60)
}

/// Numbers that are shown.
pub trait Figure {
    /// The number.
    fn value(self) -> f64;
}

impl Figure for f64 {
    fn value(self) -> f64 {
        self
    }
}

impl Figure for u64 {
    fn value(self) -> f64 {
        self as f64
    }
}

/// On which side of its column a value stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Align {
    /// Words.
    Left,
    /// Figures.
    Right,
}

/// Columns as wide as their widest value.
pub struct Table {
    aligns: Vec<Align>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these titles and no rows.
    pub fn new(columns: &[(&str, Align)]) -> Self {
        Self {
            aligns: columns.iter().map(|(_, align)| *align).collect(),
            rows: vec![columns.iter().map(|(title, _)| (*title).to_owned()).collect()],
        }
    }

    /// Adds a row; it must have a value for each column.
    pub fn row(&mut self, values: impl IntoIterator<Item = String>) {
        let row: Vec<String> = values.into_iter().collect();
        assert_eq!(row.len(), self.aligns.len(), "a value for each column");
        self.rows.push(row);
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let width = |column: usize| self.rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
        let widths: Vec<usize> = (0..self.aligns.len()).map(width).collect();
        for row in &self.rows {
            let cells = row.iter().zip(&self.aligns).zip(&widths);
            let line: Vec<String> = cells
                .map(|((value, align), width)| match align {
                    Align::Left => format!("{value:<width$}"),
                    Align::Right => format!("{value:>width$}"),
                })
                .collect();
            writeln!(f, "{}", line.join("  ").trim_end())?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_short() {
        for (value, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.5 KiB"),
            (150 << 20, "150 MiB"),
            ((1 << 30) - 1, "1 GiB"),
            (1 << 40, "1 TiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(bytes(value), text);
        }
        for (value, text) in [(0, "0"), (999, "999"), (1000, "1k"), (57_300, "57.3k"), (999_990, "1M")] {
            assert_eq!(count(value), text);
        }
        assert_eq!(bytes(0.25), "0.3 B");
    }

    #[test]
    fn times_have_two_units_at_most() {
        for (value, text) in [
            (0.0, "0 s"),
            (0.42, "0.4 s"),
            (9.96, "10 s"),
            (59.0, "59 s"),
            (200.0, "3 m 20 s"),
            (7500.0, "2 h 5 m"),
            (273_600.0, "3 d 4 h"),
            (f64::INFINITY, "-"),
        ] {
            assert_eq!(seconds(value), text);
        }
    }

    #[test]
    fn dates_follow_the_calendar() {
        for (unix, text) in [
            (0, "1970-01-01 00:00:00 UTC"),
            (951_782_399, "2000-02-28 23:59:59 UTC"),
            (951_782_400, "2000-02-29 00:00:00 UTC"),
            (951_868_800, "2000-03-01 00:00:00 UTC"),
            (1_735_689_599, "2024-12-31 23:59:59 UTC"),
            (4_107_542_400, "2100-03-01 00:00:00 UTC"),
        ] {
            assert_eq!(date(unix * 1000), text);
        }
    }
}
