//! What follows from the death of a core: when to start the next, and whose input it was. Pure.

use super::limits::{BACK_OFF, ROW_OF_DEATHS};
use std::collections::BTreeSet;
use std::time::Duration;

/// A core's death.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Death {
    /// When, since the keeper's start.
    pub(super) at: Duration,
    /// How long it had been in service.
    pub(super) served: Duration,
    /// It was its own doing (a fault, a panic, a missed fence), not a kill from outside.
    pub(super) by_itself: bool,
    /// The session whose input it handled, 0: none.
    pub(super) blame: u64,
}

/// The record of deaths.
#[derive(Debug, Default)]
pub(super) struct Restarts {
    in_a_row: usize,
    total: u64,
    last_blamed: Option<Death>,
    quarantined: BTreeSet<u64>,
}

impl Restarts {
    /// Notes a death; gives the wait before the next start, and a session that is to be quarantined from now on.
    pub(super) fn died(&mut self, death: Death) -> (Duration, Option<u64>) {
        self.total += 1;
        self.in_a_row = if death.served >= ROW_OF_DEATHS {
            1
        } else {
            self.in_a_row + 1
        };
        let wait = BACK_OFF[(self.in_a_row - 1).min(BACK_OFF.len() - 1)];
        if !death.by_itself || death.blame == 0 {
            return (wait, None);
        }
        let before = self.last_blamed.replace(death);
        let again = before.is_some_and(|before| {
            before.blame == death.blame && death.at.saturating_sub(before.at) <= ROW_OF_DEATHS
        });
        (
            wait,
            (again && self.quarantined.insert(death.blame)).then_some(death.blame),
        )
    }

    pub(super) const fn in_a_row(&self) -> usize {
        self.in_a_row
    }
    pub(super) const fn total(&self) -> u64 {
        self.total
    }
    /// Forgets a session that has ended.
    pub(super) fn session_gone(&mut self, session: u64) {
        self.quarantined.remove(&session);
    }
    /// Takes those of these sessions out of quarantine that are in it, and gives them.
    pub(super) fn release(&mut self, sessions: &BTreeSet<u64>) -> Vec<u64> {
        self.last_blamed = None;
        let released: Vec<_> = self.quarantined.intersection(sessions).copied().collect();
        self.quarantined.retain(|session| !sessions.contains(session));
        released
    }
    pub(super) fn quarantined(&self) -> usize {
        self.quarantined.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn death(at_s: u64, served_s: u64, by_itself: bool, blame: u64) -> Death {
        Death {
            at: Duration::from_secs(at_s),
            served: Duration::from_secs(served_s),
            by_itself,
            blame,
        }
    }

    #[test]
    fn waits_grow_until_a_core_has_served() {
        let mut restarts = Restarts::default();
        let mut waits = |served| restarts.died(death(0, served, true, 0)).0.as_millis();
        assert_eq!(
            [0, 0, 0, 0, 0, 10, 9, 3].map(&mut waits),
            [0, 0, 100, 1000, 1000, 0, 0, 100]
        );
        assert_eq!((restarts.total(), restarts.in_a_row()), (8, 3));
    }

    #[test]
    fn only_two_deaths_of_its_own_with_the_same_session_in_time_quarantine() {
        let mut restarts = Restarts::default();
        let mut quarantined = |death| restarts.died(death).1;
        assert_eq!(quarantined(death(0, 0, true, 7)), None);
        assert_eq!(quarantined(death(1, 0, true, 8)), None, "another session");
        assert_eq!(quarantined(death(2, 0, false, 8)), None, "killed from outside");
        assert_eq!(quarantined(death(12, 0, true, 8)), None, "too long ago");
        assert_eq!(quarantined(death(13, 0, true, 0)), None, "nobody");
        assert_eq!(quarantined(death(14, 0, true, 8)), Some(8));
        assert_eq!(quarantined(death(15, 0, true, 8)), None, "once");
        assert_eq!(restarts.quarantined(), 1);
        assert!(restarts.release(&BTreeSet::from([7])).is_empty());
        assert_eq!(restarts.release(&BTreeSet::from([7, 8])), [8]);
        // What was before counts no more.
        assert_eq!(restarts.died(death(16, 0, true, 8)).1, None);
        assert_eq!(restarts.died(death(17, 0, true, 8)).1, Some(8));
        restarts.session_gone(8);
        assert_eq!(restarts.quarantined(), 0);
    }
}
