//! What follows from the death of a core: when to start the next, and whose input it was. Pure.

use super::limits::{BACK_OFF, ROW_OF_DEATHS, SUSPECT_DEATHS_MAX};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::time::Duration;

/// A core's death.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Death {
    /// When, since the keeper's start.
    pub(super) at: Duration,
    /// How long it had been in service.
    pub(super) served: Duration,
    /// It was its own doing (a fault, a panic, a missed fence), not a kill from outside.
    pub(super) by_itself: bool,
    /// The sessions whose input it handled: more than one, where workers had some, too.
    pub(super) suspects: BTreeSet<u64>,
}

/// The record of deaths. It is saved as it is: a new field has a default.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub(super) struct Restarts {
    in_a_row: usize,
    total: u64,
    /// The last death with suspects, its own left being those of all such deaths in a row, and how many those were. What it `served` is what
    /// the cores after it have.
    blamed: Option<(Death, usize)>,
    quarantined: BTreeSet<u64>,
}

impl Restarts {
    /// Notes a death; gives the wait before the next start, and the sessions that are to be quarantined from now on.
    ///
    /// The one that was there at two deaths is, where cores were in service for less than [`ROW_OF_DEATHS`] between them (however long they took
    /// to get there: one that hangs when it takes that session over is killed only when it is late). Where several were, each further death leaves fewer of them; those that were there
    /// at [`SUSPECT_DEATHS_MAX`] deaths are quarantined all, because the others must live.
    pub(super) fn died(&mut self, mut death: Death) -> (Duration, Vec<u64>) {
        self.total += 1;
        self.in_a_row = if death.served >= ROW_OF_DEATHS {
            1
        } else {
            self.in_a_row + 1
        };
        if let Some((before, _)) = &mut self.blamed {
            before.served = before.served.saturating_add(death.served);
        }
        let wait = BACK_OFF[(self.in_a_row - 1).min(BACK_OFF.len() - 1)];
        death
            .suspects
            .retain(|suspect| !self.quarantined.contains(suspect));
        if !death.by_itself || death.suspects.is_empty() {
            return (wait, Vec::new());
        }
        let mut deaths = 1;
        if let Some((before, count)) = &self.blamed
            && before.served <= ROW_OF_DEATHS
            && !before.suspects.is_disjoint(&death.suspects)
        {
            death.suspects.retain(|suspect| before.suspects.contains(suspect));
            deaths = count + 1;
        }
        death.served = Duration::ZERO;
        let found = deaths >= SUSPECT_DEATHS_MAX || (deaths >= 2 && death.suspects.len() == 1);
        if !found {
            self.blamed = Some((death, deaths));
            return (wait, Vec::new());
        }
        self.blamed = None;
        self.quarantined.extend(&death.suspects);
        (wait, death.suspects.into_iter().collect())
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
        self.blamed = None;
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

    fn suspected(at_s: u64, suspects: &[u64]) -> Death {
        Death {
            at: Duration::from_secs(at_s),
            served: Duration::ZERO,
            by_itself: true,
            suspects: suspects.iter().copied().collect(),
        }
    }
    fn death(at_s: u64, served_s: u64, by_itself: bool, blame: u64) -> Death {
        Death {
            served: Duration::from_secs(served_s),
            by_itself,
            ..suspected(
                at_s,
                if blame == 0 {
                    &[]
                } else {
                    std::slice::from_ref(&blame)
                },
            )
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
        let none: Vec<u64> = Vec::new();
        assert_eq!(quarantined(death(0, 0, true, 7)), none);
        assert_eq!(quarantined(death(1, 0, true, 8)), none, "another session");
        assert_eq!(quarantined(death(2, 0, false, 8)), none, "killed from outside");
        assert_eq!(quarantined(death(3, 6, false, 8)), none, "and again");
        assert_eq!(
            quarantined(death(12, 5, true, 8)),
            none,
            "cores served for eleven seconds"
        );
        assert_eq!(quarantined(death(13, 0, true, 0)), none, "nobody");
        assert_eq!(quarantined(death(14, 0, true, 8)), [8]);
        assert_eq!(quarantined(death(15, 0, true, 8)), none, "once");
        assert_eq!(restarts.quarantined(), 1);
        assert!(restarts.release(&BTreeSet::from([7])).is_empty());
        assert_eq!(restarts.release(&BTreeSet::from([7, 8])), [8]);
        // What was before counts no more.
        assert!(restarts.died(death(16, 0, true, 8)).1.is_empty());
        assert_eq!(restarts.died(death(17, 0, true, 8)).1, [8]);
        restarts.session_gone(8);
        assert_eq!(restarts.quarantined(), 0);
    }

    #[test]
    fn deaths_that_are_far_apart_count_where_no_core_served_between_them() {
        let mut restarts = Restarts::default();
        let mut quarantined = |death| restarts.died(death).1;
        // Killed each time because it was not ready in time.
        assert!(quarantined(death(30, 0, true, 8)).is_empty());
        assert!(quarantined(death(60, 0, false, 0)).is_empty());
        assert_eq!(quarantined(death(90, 0, true, 8)), [8]);
        // A core that served in between makes it chance.
        assert!(quarantined(death(120, 0, true, 9)).is_empty());
        assert!(quarantined(death(500, 300, false, 0)).is_empty());
        assert!(quarantined(death(501, 0, true, 9)).is_empty());
        assert_eq!(quarantined(death(540, 8, true, 9)), [9]);
    }

    #[test]
    fn of_several_suspects_each_death_leaves_fewer() {
        let mut restarts = Restarts::default();
        let mut quarantined = |death| restarts.died(death).1;
        assert!(quarantined(suspected(0, &[1, 2, 3])).is_empty());
        assert!(quarantined(suspected(1, &[2, 3, 4])).is_empty());
        assert_eq!(quarantined(suspected(2, &[3, 5])), [3]);
        // Where two were always there, both go: the others must live.
        for at in 3..6 {
            assert!(quarantined(suspected(at, &[6, 7])).is_empty());
        }
        assert_eq!(quarantined(suspected(6, &[6, 7, 8])), [6, 7]);
    }
}
