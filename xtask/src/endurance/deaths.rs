//! The endurance runs' coroner: who died, of what, and whether this run did it.
//!
//! In: the log of vmgmtd, and the deaths that were caused, in their order. Out: what does not fit, with the line of the log. It must never excuse a
//! death because nobody saw it: that nobody sees one is the product's art, and the reason why it has to be looked for.

use std::collections::BTreeMap;

/// What this run does to a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// `kill -9`.
    Killed,
    /// SIGSTOP, until the front misses its beat and has it killed.
    Stopped,
}

/// How the keeper tells of both: nothing that a core does by itself is told so.
const FROM_OUTSIDE: &str = "signal 9 (from outside)";
/// What a core says for good that another takes over from.
const IN_ORDER: &str = "exit code 0";

/// Parts of lines that no run may leave in the log.
const BAD_WORDS: [&str; 9] = [
    "panicked at",
    "is quarantined until",
    "cannot be started now",
    "instead of in order",
    "a fault of ours in this session",
    "a mistake of the core's",
    "the front has died",
    "cannot be taken into service",
    " ERROR ",
];
/// The front's word before the keeper kills a core; once for each that stood still.
const BEAT: &str = "the core's beat stands still";

/// Everything in a log that the deaths caused do not explain.
pub fn unexplained(log: &str, caused: &[Cause]) -> Vec<String> {
    let mut found = Vec::new();
    let mut from_outside = 0;
    for (life, (cause, line)) in told(log, " died: ", "; it had served") {
        if cause == FROM_OUTSIDE {
            from_outside += 1;
        } else {
            found.push(format!(
                "core life {life} died and this run did not do it: {line}"
            ));
        }
    }
    if from_outside != caused.len() {
        found.push(format!(
            "this run killed {} cores, and vmgmtd tells of {from_outside}",
            caused.len()
        ));
    }
    for (cause, line) in told(log, " ended: ", "\n").values() {
        if cause != IN_ORDER {
            found.push(format!(
                "a core that another took over from did not end in order: {line}"
            ));
        }
    }
    let bad = |line: &&str| BAD_WORDS.iter().any(|word| line.contains(word));
    found.extend(log.lines().filter(bad).map(|line| format!("vmgmtd says: {line}")));
    let stopped = |cause: &&Cause| **cause == Cause::Stopped;
    let stood = caused.iter().filter(stopped).count();
    let beats: Vec<&str> = log.lines().filter(|line| line.contains(BEAT)).collect();
    if let Some(line) = beats.get(stood) {
        found.push(format!(
            "{} times the beat of a core stood still, {stood} times by this run; the last: {line}",
            beats.len()
        ));
    }
    found
}

/// What the keeper tells of core lives: each once, though every later core is told of it and says it again.
fn told(log: &str, verb: &str, end: &str) -> BTreeMap<u64, (String, String)> {
    let mut lives = BTreeMap::new();
    for line in log.lines() {
        let Some((_, rest)) = line.split_once("core life ") else {
            continue;
        };
        let Some((life, rest)) = rest.split_once(verb) else {
            continue;
        };
        let Ok(life) = life.parse() else { continue };
        let cause = rest.split(end).next().unwrap_or(rest);
        // Which sessions it handled matters only where it was their doing.
        let cause = cause.split(", while it handled").next().unwrap_or(cause);
        lives
            .entry(life)
            .or_insert_with(|| (cause.to_owned(), line.to_owned()));
    }
    lives
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOG: &str = "\
2026 INFO vmgmt_host::keeper::lives: core life 1 is process 5
2026 WARN vmgmt_host::keeper: core life 1 died: signal 9 (from outside), while it handled sessions {3}; it had served 4 s; the next starts in 0 ms
2026 INFO vmgmt: core life 1 died: signal 9 (from outside), while it handled sessions {3}; it had served 4 s; the next starts in 0 ms
2026 INFO vmgmt_host::keeper::lives: core life 2 ended: exit code 0
2026 WARN vmgmt_host::front::server_core: the core's beat stands still life=3
2026 WARN vmgmt_host::keeper: core life 3 died: signal 9 (from outside); it had served 1 s; the next starts in 0 ms
";

    #[test]
    fn deaths_that_were_caused_are_explained() {
        assert_eq!(
            unexplained(LOG, &[Cause::Killed, Cause::Stopped]),
            Vec::<String>::new()
        );
    }

    #[test]
    fn a_death_too_many_and_one_too_few_are_named() {
        let said = unexplained(LOG, &[Cause::Stopped]).join("\n");
        assert!(said.contains("killed 1 cores, and vmgmtd tells of 2"), "{said}");
        let said = unexplained(LOG, &[Cause::Killed, Cause::Killed]).join("\n");
        assert!(
            said.contains("1 times the beat of a core stood still, 0 times by this run"),
            "{said}"
        );
        let said = unexplained(LOG, &[Cause::Killed, Cause::Stopped, Cause::Killed]).join("\n");
        assert!(said.contains("killed 3 cores, and vmgmtd tells of 2"), "{said}");
    }

    #[test]
    fn a_death_of_another_cause_is_not_taken_for_ours() {
        for cause in [
            "signal 31 (SIGSYS)",
            "signal 11 (SIGSEGV)",
            "exit code 101",
            "killed: it was not ready in time",
            "killed: it stood still while a fence or a doorbell waited",
        ] {
            let log = LOG.replacen("signal 9 (from outside)", cause, 2);
            let said = unexplained(&log, &[Cause::Killed, Cause::Stopped]).join("\n");
            assert!(
                said.contains("core life 1 died and") && said.contains(cause),
                "{said}"
            );
        }
    }

    #[test]
    fn other_words_that_must_not_be_said_are_found() {
        for line in [
            "2026 WARN vmgmt_host::keeper: session 3 of VM \"a\" kills the core again and again: its device is quarantined until `vmgmtctl release a`",
            "thread 'main' panicked at x.rs:1",
            "2026 ERROR vmgmt_host::front::server: a fault of ours in this session: it is closed",
            "2026 INFO vmgmt_host::keeper::lives: core life 9 ended: signal 11 (SIGSEGV)",
        ] {
            let log = format!("{LOG}{line}\n");
            assert_eq!(
                unexplained(&log, &[Cause::Killed, Cause::Stopped]).len(),
                1,
                "{line}"
            );
        }
    }
}
