//! The endurance runs' counting house: what was sent and what was received, per pair and to the byte, and every mismatch by name.
//!
//! In: what each party did, at the moment it knew. Out: the balance. It must never correct anything: what does not fit is written down with
//! who, which number, and after which disruption.
//!
//! What is excused, and nothing more:
//! * an operation that says OUTCOME_UNKNOWN or BUSY when a disruption fell between its begin and its error ([`Ledger::excuse`]); it is repeated,
//!   and counted by name. (Where a VM is cut off in the middle of a transfer, its partner's error is the one that is expected, not an excuse:
//!   `stress/cut.rs`.);
//! * messages that a guest program took along when its VM was reset or killed while it received: at most as many as it had receives posted.

use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use vmgmt_driver::{DriverError, Status};
use vmgmt_testkit::process::locked;

use super::content;

/// Mismatches that are kept in words; further ones are counted.
const MISMATCHES_SHOWN: usize = 40;

/// Letters from one party to another.
#[derive(Clone, Debug, Default)]
pub struct Pair {
    /// Numbers given out so far.
    numbered: u64,
    pub accepted: u64,
    pub accepted_bytes: u64,
    pub received: u64,
    pub received_bytes: u64,
    /// The highest number received.
    last: u64,
    /// Accepted, delivered, and gone with the program that had them.
    lost: u64,
    lost_bytes: u64,
    /// Through a command line.
    short: bool,
}

/// Ways of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Way {
    /// Guest to share; checked on the host.
    Put,
    /// Share to guest; checked in the guest.
    Get,
    /// A name removed.
    Remove,
}

/// A count and its bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    pub begun: u64,
    pub done: u64,
    pub bytes: u64,
}

/// A file from one party to another, through nobody's file system.
#[derive(Clone, Debug, Default)]
struct Passed {
    bytes: u64,
    /// The sender was told: the receiver has it.
    sent: u64,
    received: u64,
    /// Attempts that ended with an excused error on either side.
    broken: u64,
}

#[derive(Default)]
struct State {
    pairs: BTreeMap<(String, String), Pair>,
    ways: BTreeMap<Way, Count>,
    passed: BTreeMap<(String, String, String), Passed>,
    excused: BTreeMap<String, u64>,
    /// Messages that a dead program may have taken along, by its VM.
    taken_along: BTreeMap<String, u64>,
    disruptions: Vec<String>,
    happened: BTreeMap<String, u64>,
    mismatches: Vec<String>,
    mismatch_count: u64,
    refused: u64,
}

/// The books.
pub struct Ledger {
    state: Mutex<State>,
    /// Even: nothing is disturbed. Moves at the begin and at the end of each disruption.
    epoch: AtomicU64,
    begin: Instant,
}

/// What stands at the end.
#[derive(Clone, Debug, Default)]
pub struct Balance {
    pub pairs: usize,
    pub accepted: u64,
    pub accepted_bytes: u64,
    pub received: u64,
    pub received_bytes: u64,
    pub lost: u64,
    pub lost_bytes: u64,
    pub refused: u64,
    pub ways: BTreeMap<Way, Count>,
    pub passed: Count,
    pub passed_again: u64,
    pub excused: BTreeMap<String, u64>,
    pub disruptions: usize,
    /// What happened to VMs.
    pub happened: BTreeMap<String, u64>,
    pub mismatches: Vec<String>,
    pub mismatch_count: u64,
}

impl Ledger {
    pub fn new() -> Self {
        Self {
            state: Mutex::default(),
            epoch: AtomicU64::new(0),
            begin: Instant::now(),
        }
    }

    /// To be noted before an operation that may be excused.
    pub fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    /// A disruption begins. Gives its number, from 1.
    pub fn disruption_begins(&self, what: &str) -> usize {
        self.epoch.fetch_add(1, Ordering::SeqCst);
        let mut state = locked(&self.state);
        let at = self.begin.elapsed().as_secs_f64();
        state.disruptions.push(format!("{what} at {at:.1} s"));
        state.disruptions.len()
    }

    pub fn disruption_ends(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }

    /// Something was done to a VM.
    pub fn happened(&self, what: &str) {
        *locked(&self.state).happened.entry(what.into()).or_default() += 1;
    }

    /// Whether this was ever done to a VM.
    pub fn has_happened(&self, what: &str) -> bool {
        locked(&self.state).happened.contains_key(what)
    }

    /// Whether something did not fit already.
    pub fn has_mismatch(&self) -> bool {
        locked(&self.state).mismatch_count > 0
    }

    /// Writes a mismatch down.
    pub fn mismatch(&self, what: impl Into<String>) {
        self.write_down(&mut locked(&self.state), what.into());
    }

    fn write_down(&self, state: &mut State, what: String) {
        state.mismatch_count += 1;
        if state.mismatches.len() < MISMATCHES_SHOWN {
            let at = self.begin.elapsed().as_secs_f64();
            let after = match state.disruptions.last() {
                Some(last) => format!("after disruption {} ({last})", state.disruptions.len()),
                None => "before any disruption".into(),
            };
            let what = format!("at {at:.1} s, {after}: {what}");
            // At once as well: whoever watches need not wait for the end, and a run that is ended from outside has said it.
            println!("  !     {what}");
            state.mismatches.push(what);
        }
    }

    /// Whether this error of an operation on a handle or stream, begun at `since`, is one that a disruption explains today.
    ///
    /// # Errors
    /// It is not, and is written down.
    pub fn excuse(&self, who: &str, what: &str, error: DriverError, since: u64) -> anyhow::Result<()> {
        let disturbed = since % 2 == 1 || self.epoch() != since;
        let excusable = matches!(error.status(), Some(Status::OUTCOME_UNKNOWN | Status::BUSY));
        if !(disturbed && excusable) {
            return Err(anyhow::Error::new(error).context(format!("{who}: {what}")));
        }
        let kind = what.split(' ').next().unwrap_or(what);
        self.excuse_said(&format!("{kind}: {error}"));
        Ok(())
    }

    /// Counts an excuse that somebody else judged.
    pub fn excuse_said(&self, what: &str) {
        *locked(&self.state).excused.entry(what.into()).or_default() += 1;
    }

    /// The number of the next letter: the same one until it is known what became of it.
    pub fn number(&self, source: &str, target: &str, short: bool) -> u64 {
        let mut state = locked(&self.state);
        let pair = state.pairs.entry((source.into(), target.into())).or_default();
        pair.short = short;
        pair.numbered + 1
    }

    /// The daemon has taken the letter.
    pub fn accepted(&self, source: &str, target: &str, sequence: u64, bytes: usize) {
        let mut state = locked(&self.state);
        let pair = state.pairs.entry((source.into(), target.into())).or_default();
        pair.numbered = sequence;
        pair.accepted += 1;
        pair.accepted_bytes += bytes as u64;
    }

    /// Cleanly refused for a budget; it is sent again later under the same number.
    pub fn refused(&self) {
        locked(&self.state).refused += 1;
    }

    /// The program that received for `target` ended with its VM; it had so many receives posted.
    pub fn program_died(&self, target: &str, receives_posted: u64) {
        *locked(&self.state).taken_along.entry(target.into()).or_default() += receives_posted;
    }

    /// `target` has a letter; the daemon says that `stamp` wrote it.
    pub fn received(&self, target: &str, stamp: &str, body: &[u8]) {
        let letter = content::read_letter(body);
        let mut state = locked(&self.state);
        let letter = match letter {
            Ok(letter) => letter,
            Err(error) => {
                return self.write_down(&mut state, format!("{target} got from {stamp}: {error:#}"));
            }
        };
        let (source, sequence) = (letter.source, letter.sequence);
        if source != stamp || letter.target != target {
            let what = format!(
                "{target} got, stamped {stamp}, letter {sequence} of {source} to {}",
                letter.target
            );
            return self.write_down(&mut state, what);
        }
        let mut along = state.taken_along.get(target).copied().unwrap_or(0);
        let pair = state.pairs.entry((source.clone(), target.into())).or_default();
        if sequence <= pair.last {
            let what = format!(
                "{source} -> {target}: letter {sequence} came again, or after {}",
                pair.last
            );
            return self.write_down(&mut state, what);
        }
        let mut missing = Vec::new();
        for gap in pair.last + 1..sequence {
            if along > 0 {
                along -= 1;
                pair.lost += 1;
                pair.lost_bytes += content::letter(&source, target, gap, pair.short).len() as u64;
            } else {
                missing.push(gap);
            }
        }
        pair.last = sequence;
        pair.received += 1;
        pair.received_bytes += body.len() as u64;
        state.taken_along.insert(target.into(), along);
        if !missing.is_empty() {
            let what = format!("{source} -> {target}: letter {sequence} came, {missing:?} did not");
            self.write_down(&mut state, what);
        }
    }

    /// Letters that are accepted and not received yet.
    pub fn outstanding(&self) -> u64 {
        let state = locked(&self.state);
        let pairs = state.pairs.values();
        pairs
            .map(|pair| pair.accepted.saturating_sub(pair.received + pair.lost))
            .sum()
    }

    /// Letters and files so far, to see whether anything still moves.
    pub fn progress(&self) -> u64 {
        let state = locked(&self.state);
        let letters: u64 = state
            .pairs
            .values()
            .map(|pair| pair.accepted + pair.received)
            .sum();
        let files: u64 = state.ways.values().map(|count| count.done).sum();
        let passed: u64 = state
            .passed
            .values()
            .map(|passed| passed.sent + passed.received)
            .sum();
        letters + files + passed
    }

    /// A file's way begins.
    pub fn begun(&self, way: Way) {
        locked(&self.state).ways.entry(way).or_default().begun += 1;
    }

    /// And has ended, checked.
    pub fn done(&self, way: Way, bytes: usize) {
        let mut state = locked(&self.state);
        let count = state.ways.entry(way).or_default();
        count.done += 1;
        count.bytes += bytes as u64;
    }

    fn passing(&self, source: &str, target: &str, name: &str, act: impl FnOnce(&mut Passed)) {
        let mut state = locked(&self.state);
        let key = (source.into(), target.into(), name.into());
        act(state.passed.entry(key).or_default());
    }

    /// The sender was told that the receiver has the file.
    pub fn sent(&self, source: &str, target: &str, name: &str, bytes: usize) {
        self.passing(source, target, name, |passed| {
            passed.sent += 1;
            passed.bytes = bytes as u64;
        });
    }

    /// The receiver has it, checked.
    pub fn took(&self, source: &str, target: &str, name: &str, bytes: usize) {
        self.passing(source, target, name, |passed| {
            passed.received += 1;
            passed.bytes = bytes as u64;
        });
    }

    /// An attempt broke off, excused.
    pub fn broke(&self, source: &str, target: &str, name: &str) {
        self.passing(source, target, name, |passed| passed.broken += 1);
    }

    /// Closes the books: everything that does not fit is a mismatch.
    pub fn close(&self) -> Balance {
        let mut guard = locked(&self.state);
        let state = &mut *guard;
        let mut wrong = Vec::new();
        let mut balance = Balance {
            pairs: state.pairs.len(),
            ..Balance::default()
        };
        for ((source, target), pair) in &mut state.pairs {
            let along = state.taken_along.entry(target.clone()).or_default();
            // The last ones may have gone with a dead program as well.
            while pair.received + pair.lost < pair.accepted && *along > 0 {
                *along -= 1;
                pair.lost += 1;
                pair.lost_bytes = pair.accepted_bytes.saturating_sub(pair.received_bytes);
            }
            let whole = pair.accepted == pair.received + pair.lost
                && pair.accepted_bytes == pair.received_bytes + pair.lost_bytes;
            if !whole {
                wrong.push(format!(
                    "{source} -> {target}: {} letters of {} bytes accepted, {} of {} received (the last is {}), {} gone with a program",
                    pair.accepted, pair.accepted_bytes, pair.received, pair.received_bytes, pair.last, pair.lost
                ));
            }
            balance.accepted += pair.accepted;
            balance.accepted_bytes += pair.accepted_bytes;
            balance.received += pair.received;
            balance.received_bytes += pair.received_bytes;
            balance.lost += pair.lost;
            balance.lost_bytes += pair.lost_bytes;
        }
        for (way, count) in &state.ways {
            if count.begun != count.done {
                wrong.push(format!("{way:?}: {} begun and {} done", count.begun, count.done));
            }
        }
        for ((source, target, name), passed) in &state.passed {
            balance.passed.begun += 1;
            balance.passed.done += passed.sent.min(1);
            balance.passed.bytes += passed.bytes;
            balance.passed_again += passed.received.saturating_sub(1);
            // Whose last word a disruption took was not told, though all is there; who was told must be right.
            let most = 1 + passed.broken;
            let told = passed.sent + passed.broken > 0;
            if !told || passed.received == 0 || passed.received > most || passed.sent > most {
                wrong.push(format!(
                    "{source} -> {target}: file {name} was told as sent {} times and received {} times, {} attempts broke off",
                    passed.sent, passed.received, passed.broken
                ));
            }
        }
        for what in wrong {
            self.write_down(state, what);
        }
        balance.refused = state.refused;
        balance.ways = state.ways.clone();
        balance.excused = state.excused.clone();
        balance.disruptions = state.disruptions.len();
        balance.happened = state.happened.clone();
        balance.mismatches = state.mismatches.clone();
        balance.mismatch_count = state.mismatch_count;
        balance
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn send(ledger: &Ledger, sequence: u64) -> String {
        let text = content::letter("a", "b", sequence, false);
        ledger.accepted("a", "b", sequence, text.len());
        text
    }

    #[test]
    fn a_gap_a_repetition_and_a_loss_are_named() {
        let ledger = Ledger::new();
        let texts: Vec<String> = (1..=4).map(|number| send(&ledger, number)).collect();
        ledger.received("b", "a", texts[0].as_bytes());
        ledger.disruption_begins("kill -9");
        ledger.received("b", "a", texts[2].as_bytes());
        ledger.received("b", "a", texts[2].as_bytes());
        ledger.received("b", "c", texts[3].as_bytes());
        let said = ledger.close().mismatches.join("\n");
        for part in [
            "letter 3 came, [2] did not",
            "letter 3 came again",
            "stamped c",
            "disruption 1 (kill -9",
        ] {
            assert!(said.contains(part), "{part} is not in {said}");
        }
        assert!(said.contains("4 letters"), "{said}");
    }

    #[test]
    fn a_dead_program_takes_along_what_it_had_posted_and_no_more() {
        let ledger = Ledger::new();
        let texts: Vec<String> = (1..=6).map(|number| send(&ledger, number)).collect();
        ledger.program_died("b", 2);
        ledger.received("b", "a", texts[2].as_bytes());
        assert_eq!(ledger.outstanding(), 3);
        ledger.received("b", "a", texts[4].as_bytes());
        ledger.received("b", "a", texts[5].as_bytes());
        let balance = ledger.close();
        assert!(
            balance.mismatches[0].contains("[4] did not"),
            "{:?}",
            balance.mismatches
        );
        assert_eq!(balance.lost, 2);
    }

    #[test]
    fn a_file_told_as_sent_must_be_there_and_a_second_copy_needs_a_broken_attempt() {
        let ledger = Ledger::new();
        ledger.sent("a", "b", "lost", 1);
        ledger.sent("a", "b", "twice", 1);
        for _ in 0..2 {
            ledger.took("a", "b", "twice", 1);
            ledger.took("a", "b", "again", 1);
        }
        ledger.broke("a", "b", "again");
        ledger.sent("a", "b", "again", 1);
        let said = ledger.close().mismatches.join("\n");
        assert!(
            said.contains("lost") && said.contains("twice") && !said.contains("again "),
            "{said}"
        );
    }

    #[test]
    fn an_error_is_excused_only_by_a_disruption_in_its_time() {
        use vmgmt_driver::{Opcode, Refusal};
        let refused = |status| {
            DriverError::Refused(Refusal {
                opcode: Opcode::WRITE,
                status,
                detail: 0,
            })
        };
        let ledger = Ledger::new();
        let since = ledger.epoch();
        assert!(
            ledger
                .excuse("a", "put", refused(Status::OUTCOME_UNKNOWN), since)
                .is_err()
        );
        ledger.disruption_begins("kill -9");
        assert!(
            ledger
                .excuse("a", "put", refused(Status::OUTCOME_UNKNOWN), since)
                .is_ok()
        );
        assert!(
            ledger
                .excuse("a", "put", refused(Status::INTEGRITY), since)
                .is_err()
        );
        assert!(
            ledger
                .excuse("a", "put", DriverError::DeviceReplaced, since)
                .is_err()
        );
        ledger.disruption_ends();
        assert!(
            ledger
                .excuse("a", "put", refused(Status::CANCELLED), ledger.epoch())
                .is_err()
        );
        // Nobody's stream ends with a core, and a handle outlives it.
        for status in [Status::CANCELLED, Status::STALE] {
            let ledger = Ledger::new();
            ledger.disruption_begins("kill -9");
            assert!(ledger.excuse("a", "put", refused(status), 0).is_err());
        }
        assert_eq!(ledger.close().excused.values().sum::<u64>(), 1);
    }
}
