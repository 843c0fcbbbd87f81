//! The caretaker's measuring room, the printer: the same figures for a terminal and for a page.
//!
//! In: facts and groups. Out: text. It must never change a figure: where something is missing a dash stands.

use crate::{
    bench::{Group, Row},
    bench_facts::Facts,
};
use std::fmt::Write;

/// For a terminal.
pub fn text(facts: &Facts, groups: &[Group], command: &str, seconds: f64) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "{command}: {seconds:.0} s");
    for (name, value) in facts.all() {
        let _ = writeln!(out, "  {name}: {value}");
    }
    for group in groups {
        let _ = writeln!(out, "\n{}", group.title);
        for row in &group.rows {
            let _ = write!(
                out,
                "  {:<44} {:>11} {:<5}{}",
                row.name,
                number(row.median()),
                row.unit,
                spread(row)
            );
            for (peer, value) in &row.peers {
                let _ = write!(out, "  {peer} {} (x{:.2})", number(*value), row.median() / value);
            }
            out.push('\n');
        }
        for note in &group.notes {
            let _ = writeln!(out, "  {note}");
        }
    }
    out
}

/// For a page.
pub fn markdown(facts: &Facts, groups: &[Group], command: &str, seconds: f64, quick: bool) -> String {
    let mut out = String::new();
    let _ = writeln!(out, "\nMade by `{command}` in {seconds:.0} s.");
    if quick {
        let _ = writeln!(
            out,
            "\n**A trial run with small sizes: these show that the command works, nothing else.**"
        );
    }
    out.push_str("\n| fact | |\n|---|---|\n");
    for (name, value) in facts.all() {
        let _ = writeln!(out, "| {name} | {} |", value.replace('|', "\\|"));
    }
    for group in groups {
        let _ = writeln!(out, "\n### {}\n", group.title);
        let mut peers: Vec<&str> = Vec::new();
        for (peer, _) in group.rows.iter().flat_map(|row| &row.peers) {
            if !peers.contains(&peer.as_str()) {
                peers.push(peer);
            }
        }
        if !group.rows.is_empty() {
            out.push_str("| figure | vmgmt | spread |");
            for peer in &peers {
                let _ = write!(out, " {peer} | vmgmt / {peer} |");
            }
            out.push_str("\n|---|---:|---|");
            out.push_str(&"---:|---:|".repeat(peers.len()));
            out.push('\n');
        }
        for row in &group.rows {
            let _ = write!(
                out,
                "| {} | {} {} | {} |",
                row.name.replace('|', "\\|"),
                number(row.median()),
                row.unit,
                spread(row).trim()
            );
            for peer in &peers {
                match row.peers.iter().find(|(name, _)| name == peer) {
                    Some((_, value)) => {
                        let _ = write!(out, " {} | {:.2} |", number(*value), row.median() / value);
                    }
                    None => out.push_str(" – | – |"),
                }
            }
            out.push('\n');
        }
        notes(&mut out, &group.notes);
    }
    out.push('\n');
    out
}

/// Notes as paragraphs; indented ones are a program's own words.
fn notes(out: &mut String, notes: &[String]) {
    let mut quoted = false;
    for note in notes {
        let quote = note.starts_with("    ");
        if quote != quoted {
            out.push_str(match quote {
                true => "\n```\n",
                false => "```\n",
            });
            quoted = quote;
        }
        if quote {
            let _ = writeln!(out, "{}", note.trim_start());
        } else {
            let _ = writeln!(out, "\n{note}");
        }
    }
    if quoted {
        out.push_str("```\n");
    }
}

/// What is beside the middle: the smallest and largest sample, or the 99th of a hundred.
fn spread(row: &Row) -> String {
    match (row.p99, row.samples.as_slice()) {
        (Some(p99), _) => format!("  p99 {}", number(p99)),
        (None, [] | [_]) => String::new(),
        (None, samples) => {
            let least = samples.iter().copied().fold(f64::INFINITY, f64::min);
            let most = samples.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            format!("  {} to {}", number(least), number(most))
        }
    }
}

/// Three digits that mean something.
fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 100.0 => format!("{value:.0}"),
        size if size >= 10.0 => format!("{value:.1}"),
        _ => format!("{value:.2}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_shows_the_middle_and_the_ratio() {
        let row = Row {
            name: "get".into(),
            unit: "MB/s".into(),
            samples: vec![300.0, 100.0, 200.0],
            p99: None,
            peers: vec![("virtiofs".into(), 50.0)],
        };
        let group = Group {
            title: "Files".into(),
            rows: vec![row],
            notes: vec![
                "A note.".into(),
                "    said: 1".into(),
                "    said: 2".into(),
                "Another.".into(),
            ],
        };
        let page = markdown(&Facts::of_host(), &[group], "cargo xtask bench", 1.0, false);
        assert!(
            page.contains("| get | 200 MB/s | 100 to 300 | 50.0 | 4.00 |"),
            "{page}"
        );
        assert!(
            page.contains("\nA note.\n\n```\nsaid: 1\nsaid: 2\n```\n\nAnother.\n"),
            "{page}"
        );
    }
}
