//! What a benchmark hands out: cases, as a table, as JSON, and as Markdown.

mod machine;
mod render;

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

pub use machine::Machine;
pub use render::render;

/// One measured question.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Case {
    /// What was measured.
    pub name: String,
    /// Of all values, for instance "op/s".
    pub unit: String,
    /// blockd's value; absent when only peers ran.
    pub ours: Option<f64>,
    /// Whom blockd is compared with.
    pub peer: String,
    /// The peer's value.
    pub peer_value: f64,
    /// Ours by the peer's, or the peer's by ours where less is better: more is better for the ratio, always.
    pub ratio: Option<f64>,
    /// The ratio wanted.
    pub target: Option<f64>,
    /// Whether the ratio reaches the target.
    pub met: Option<bool>,
    /// The values of everything that ran, ours and the peer's among them.
    #[serde(default)]
    pub values: BTreeMap<String, f64>,
    /// 99th percentile of the latency, in microseconds, of everything that ran.
    #[serde(default)]
    pub latency_p99_us: BTreeMap<String, f64>,
    /// The command line that measured it.
    pub command: String,
    /// Where it ran.
    pub machine: Machine,
}

/// Which of two values is the better one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Better {
    /// The larger.
    More,
    /// The smaller.
    Less,
}

impl Case {
    /// A case with its ratio worked out.
    pub fn new(
        name: impl Into<String>,
        unit: &str,
        ours: Option<f64>,
        peer: (&str, f64),
        target: Option<f64>,
        better: Better,
    ) -> Self {
        let (peer, peer_value) = peer;
        let ratio = ours.map(|ours| match better {
            Better::More => ours / peer_value,
            Better::Less => peer_value / ours,
        });
        Self {
            name: name.into(),
            unit: unit.to_owned(),
            ours,
            peer: peer.to_owned(),
            peer_value,
            ratio,
            target,
            met: ratio.zip(target).map(|(ratio, target)| ratio >= target),
            values: BTreeMap::new(),
            latency_p99_us: BTreeMap::new(),
            command: std::env::args().skip(1).collect::<Vec<_>>().join(" "),
            machine: Machine::here(),
        }
    }
}

/// Writes the cases to a file, as a JSON list.
pub fn write_json(path: &Path, cases: &[Case]) -> Result<()> {
    let json = serde_json::to_string_pretty(cases)?;
    std::fs::write(path, json + "\n").with_context(|| format!("cannot write {}", path.display()))
}

/// Reads what [`write_json`] wrote.
pub fn read_json(path: &Path) -> Result<Vec<Case>> {
    let json = std::fs::read(path).with_context(|| format!("cannot read {}", path.display()))?;
    serde_json::from_slice(&json).with_context(|| format!("{} is not a list of cases", path.display()))
}

/// A number with three significant digits or none after the point.
pub fn number(value: f64) -> String {
    match value.abs() {
        0.0..10.0 => format!("{value:.2}"),
        10.0..100.0 => format!("{value:.1}"),
        _ => format!("{value:.0}"),
    }
}

/// Rows of cells as lines with aligned columns; the first row is the head.
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.first().map_or(0, Vec::len);
    let widths: Vec<usize> =
        (0..columns).map(|column| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0)).collect();
    let mut text = String::new();
    for row in rows {
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            // Names to the left, numbers to the right.
            let cell = if column == 0 { format!("{cell:<width$}") } else { format!("  {cell:>width$}") };
            text.push_str(&cell);
        }
        text.truncate(text.trim_end().len());
        text.push('\n');
    }
    text
}

/// The cases as a table for the terminal.
pub fn case_table(cases: &[Case]) -> String {
    let head = ["case", "unit", "ours", "peer", "peer value", "ratio", "target", ""];
    let mut rows = vec![head.map(str::to_owned).to_vec()];
    for case in cases {
        let optional = |value: Option<f64>| value.map(number).unwrap_or_else(|| "-".to_owned());
        rows.push(vec![
            case.name.clone(),
            case.unit.clone(),
            optional(case.ours),
            case.peer.clone(),
            number(case.peer_value),
            optional(case.ratio),
            optional(case.target),
            match case.met {
                Some(true) => "met",
                Some(false) => "NOT MET",
                None => "",
            }
            .to_owned(),
        ]);
    }
    table(&rows)
}

/// The one in the middle, or the mean of the two that are.
///
/// # Panics
/// Without samples.
pub fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    let middle = samples.len() / 2;
    if samples.len() % 2 == 1 { samples[middle] } else { (samples[middle - 1] + samples[middle]) / 2.0 }
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(super::median(vec![3.0, 1.0, 100.0]), 3.0);
        assert_eq!(super::median(vec![4.0, 1.0, 2.0, 100.0]), 3.0);
    }
}
