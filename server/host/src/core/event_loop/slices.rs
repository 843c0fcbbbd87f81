//! The core's time in slices: however many sessions there are to be taken over or run, fences are served between.
//!
//! In: the sessions that want to run, the time. Out: whose turn it is, and who is left for the next turn. Must never know what a session does.

use std::collections::BTreeSet;
use vmgmt_device::Tick;

/// How long sessions are taken in, or run, before all others' fences are looked at: with what one session's step takes, and the hub's work
/// that follows, a turn stays below the 50 ms of survival.md ("When a core is dead").
pub(super) const SLICE_NS: u64 = 20_000_000;

/// Some of a turn's time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Slice {
    until: Tick,
}

impl Slice {
    pub(super) const fn begin(now: Tick) -> Self {
        Self {
            until: now.after_ns(SLICE_NS),
        }
    }

    pub(super) fn is_over(self, now: Tick) -> bool {
        now >= self.until
    }
}

/// Who comes next: those who were left over, before those who have just run.
#[derive(Debug, Default)]
pub(super) struct Rota {
    /// The last that ran, where others were left.
    last: Option<u64>,
}

impl Rota {
    /// Runs these sessions, each once, until the slice is over; gives those that are left.
    pub(super) fn run(
        &mut self,
        sessions: &BTreeSet<u64>,
        clock: impl Fn() -> Tick,
        mut run: impl FnMut(u64),
    ) -> Vec<u64> {
        let first = self.last.take().map_or(0, |last| last.wrapping_add(1));
        let mut order: Vec<u64> = sessions
            .range(first..)
            .chain(sessions.range(..first))
            .copied()
            .collect();
        let slice = Slice::begin(clock());
        for (place, number) in order.iter().enumerate() {
            run(*number);
            if place + 1 < order.len() && slice.is_over(clock()) {
                self.last = Some(*number);
                return order.split_off(place + 1);
            }
        }
        Vec::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn each_slice_ends_in_time_and_each_session_runs_before_any_runs_again() {
        const SESSIONS: u64 = 512;
        const STEP_NS: u64 = 3_000_000;
        let time = Cell::new(Tick(1));
        let mut rota = Rota::default();
        let mut active: BTreeSet<u64> = (1..=SESSIONS).collect();
        let mut runs = Vec::new();
        let mut slices = 0;
        for _ in 0..3 {
            let mut left = SESSIONS as usize;
            while left > 0 {
                let begin = time.get();
                let before = runs.len();
                let rest = rota.run(
                    &active,
                    || time.get(),
                    |number| {
                        runs.push(number);
                        time.set(time.get().after_ns(STEP_NS));
                    },
                );
                let ran = runs.len() - before;
                assert!(
                    ran > 0 && time.get().since_ns(begin) < 50_000_000,
                    "{ran} sessions in a slice"
                );
                // Whoever did not run is told of, so that its fences are served now.
                assert_eq!(rest.len(), SESSIONS as usize - ran);
                assert!(rest.iter().all(|number| !runs[before..].contains(number)));
                left = left.saturating_sub(ran);
                slices += 1;
            }
        }
        // A slice runs on past the last of a round, into the next one.
        for round in runs.chunks_exact(SESSIONS as usize) {
            assert_eq!(round.iter().collect::<BTreeSet<_>>().len(), SESSIONS as usize);
        }
        assert!(slices >= 3 * 512 / 8, "{slices}");
        // Sessions that end are nobody's loss, and few sessions run as they are.
        active.retain(|number| *number < 4);
        rota = Rota { last: Some(400) };
        let mut order = Vec::new();
        assert!(
            rota.run(&active, || time.get(), |number| order.push(number))
                .is_empty()
        );
        assert_eq!(order, [1, 2, 3]);
    }
}
