//! The endurance runs' last page: the table of stalls, every mismatch, and one line that is the ledger.
//!
//! In: balance, stalls, how status was answered. Out: text and JSON. It must never judge: what is a mismatch the ledger has said.

use serde_json::{Value, json};

use super::ledger::{Balance, Way};
use super::operator::Answers;
use super::stall::{Figures, Stalls};

/// Prints the table of stalls.
pub fn print_stalls(stalls: &Stalls) {
    println!(
        "\nstalls in ms              windows   register access: median / p99 / most   completion: median / p99 / most"
    );
    for line in stalls.lines() {
        let show = |figures: Figures| {
            format!(
                "{:>9.2} {:>9.2} {:>9.2}",
                figures.median_ms, figures.p99_ms, figures.most_ms
            )
        };
        println!(
            "{:<42} {:>5}  {}  {}",
            line.kind,
            line.windows,
            show(line.registers),
            show(line.completions)
        );
    }
    println!();
}

/// The books in one line.
pub fn ledger_line(balance: &Balance, answers: &Answers) -> String {
    let way = |way| balance.ways.get(&way).copied().unwrap_or_default();
    let (put, get, removed) = (way(Way::Put), way(Way::Get), way(Way::Remove));
    let by: Vec<String> = answers
        .by
        .iter()
        .map(|(who, count)| format!("{who} {count}"))
        .collect();
    let happened: String = balance
        .happened
        .iter()
        .map(|(what, count)| format!(", {count} x {what}"))
        .collect();
    let mut line = format!(
        "ledger: {} disruptions{happened}; letters {} accepted ({} bytes) = {} received once, in order ({} bytes) of {} pairs",
        balance.disruptions,
        balance.accepted,
        balance.accepted_bytes,
        balance.received,
        balance.received_bytes,
        balance.pairs
    );
    if balance.lost > 0 {
        line.push_str(&format!(
            " + {} ({} bytes) gone with a program",
            balance.lost, balance.lost_bytes
        ));
    }
    line.push_str(&format!(
        ", {} refused for a budget; files: put {} ({} bytes), got {} ({} bytes), removed {}, passed on {} ({} bytes, {} twice)",
        balance.refused,
        put.done,
        put.bytes,
        get.done,
        get.bytes,
        removed.done,
        balance.passed.begun,
        balance.passed.bytes,
        balance.passed_again
    ));
    let excused: Vec<String> = balance
        .excused
        .iter()
        .map(|(what, count)| format!("{count} x {what}"))
        .collect();
    let excused = if excused.is_empty() {
        "nothing".into()
    } else {
        excused.join(", ")
    };
    line.push_str(&format!(
        "; excused and repeated: {excused}; status answered by {}, at most after {:.0} ms",
        by.join(", "),
        answers.longest.as_secs_f64() * 1e3
    ));
    line.push_str(&match balance.mismatch_count {
        0 => "; BALANCED".into(),
        count => format!("; NOT BALANCED: {count} mismatches"),
    });
    line
}

/// Everything as one document.
pub fn document(facts: &Value, balance: &Balance, answers: &Answers, stalls: &Stalls) -> Value {
    let figures = |figures: Figures| json!({"median_ms": figures.median_ms, "p99_ms": figures.p99_ms, "max_ms": figures.most_ms});
    let lines: Vec<Value> = stalls
        .lines()
        .into_iter()
        .map(|line| {
            json!({"kind": line.kind, "windows": line.windows, "register_access": figures(line.registers),
                   "completion": figures(line.completions)})
        })
        .collect();
    let ways: serde_json::Map<String, Value> = balance
        .ways
        .iter()
        .map(|(way, count)| {
            let key = format!("{way:?}").to_lowercase();
            (
                key,
                json!({"begun": count.begun, "done": count.done, "bytes": count.bytes}),
            )
        })
        .collect();
    json!({
        "run": facts,
        "stalls": lines,
        "ledger": {
            "disruptions": balance.disruptions, "vms": balance.happened, "pairs": balance.pairs,
            "accepted": balance.accepted, "accepted_bytes": balance.accepted_bytes,
            "received": balance.received, "received_bytes": balance.received_bytes,
            "gone_with_a_program": balance.lost, "refused": balance.refused,
            "files": ways, "passed_on": balance.passed.begun, "passed_on_bytes": balance.passed.bytes,
            "passed_on_twice": balance.passed_again, "excused": balance.excused,
            "mismatches": balance.mismatches, "mismatch_count": balance.mismatch_count,
        },
        "status": {"answers": answers.by, "longest_ms": answers.longest.as_secs_f64() * 1e3},
    })
}
