//! Cases as Markdown.

use std::fmt::Write;

use super::{Case, number};

/// A document of all cases, grouped by the command that measured them.
pub fn render(cases: &[Case]) -> String {
    let mut text = String::from("# Performance\n\n");
    text.push_str(
        "Made by `cargo run --release -p bench -- render FILE...` from what the commands named here wrote with `--json`. \
         A ratio above 1 means that blockd is the better one. Everything in one table was measured in one run, round by round in \
         turn; values are medians of the rounds. What shaped them, and why some targets are not met, is in \
         [hot-path.md](hot-path.md).\n",
    );
    let mut rest = cases;
    while let Some(first) = rest.first() {
        let same =
            rest.iter().take_while(|case| case.command == first.command && case.machine == first.machine).count();
        let (group, tail) = rest.split_at(same);
        rest = tail;
        let _ = write!(
            text,
            "\n## `cargo run --release -p bench -- {}`\n\n{}.\n\n",
            first.command,
            first.machine.describe()
        );
        group_table(&mut text, group);
        values_table(&mut text, group);
    }
    text
}

fn group_table(text: &mut String, cases: &[Case]) {
    text.push_str("| case | unit | blockd | compared with | its value | ratio | target | |\n");
    text.push_str("|---|---|---:|---|---:|---:|---:|---|\n");
    for case in cases {
        let optional = |value: Option<f64>| value.map(number).unwrap_or_default();
        let met = match case.met {
            Some(true) => "met",
            Some(false) => "**not met**",
            None => "",
        };
        let _ = writeln!(
            text,
            "| {} | {} | {} | {} | {} | {} | {} | {met} |",
            case.name,
            case.unit,
            optional(case.ours),
            case.peer,
            number(case.peer_value),
            optional(case.ratio),
            optional(case.target),
        );
    }
}

/// Everything that ran, with latencies, where there is more than the two compared.
fn values_table(text: &mut String, cases: &[Case]) {
    let mut names: Vec<&String> = cases.iter().flat_map(|case| case.values.keys()).collect();
    names.sort();
    names.dedup();
    if names.is_empty() {
        return;
    }
    text.push_str("\nAll values, and in brackets the 99th percentile of the latency in microseconds:\n\n| case |");
    for name in &names {
        let _ = write!(text, " {name} |");
    }
    text.push_str("\n|---|");
    text.push_str(&"---:|".repeat(names.len()));
    text.push('\n');
    for case in cases.iter().filter(|case| !case.values.is_empty()) {
        let _ = write!(text, "| {} |", case.name);
        for name in &names {
            let value = case.values.get(*name).map(|value| number(*value)).unwrap_or_default();
            let latency = case.latency_p99_us.get(*name).map(|us| format!(" ({})", number(*us)));
            let _ = write!(text, " {value}{} |", latency.unwrap_or_default());
        }
        text.push('\n');
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::Better;

    #[test]
    fn a_missed_target_is_said_loudly() {
        let mut case = Case::new("4 KiB", "op/s", Some(50.0), ("nbdkit", 100.0), Some(0.8), Better::More);
        case.values.insert("blockd".to_owned(), 50.0);
        let text = render(std::slice::from_ref(&case));
        assert!(text.contains("| 4 KiB | op/s | 50.0 | nbdkit | 100 | 0.50 | 0.80 | **not met** |"), "{text}");
        let case = Case::new("memory", "MiB", Some(50.0), ("limit", 300.0), Some(1.0), Better::Less);
        assert_eq!((case.ratio, case.met), (Some(6.0), Some(true)));
        let json = serde_json::to_string(&case).unwrap();
        let back: Case = serde_json::from_str(&json).unwrap();
        assert_eq!(render(&[back]), render(&[case]));
    }
}
