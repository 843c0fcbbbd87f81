//! OFFICE: what is to happen at a time. In: (tick, what). Out: what is due, earliest first. It never reads a clock.

use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use vmgmt_device::Tick;
use vmgmt_device::rings::Token;

/// What a timer is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub enum Timer {
    /// A submission's deadline.
    Deadline(Token),
    /// The first submission that a VM's rate holds back may go.
    Release { vm: u64 },
    /// The oldest message of a mailbox may be too old.
    Expiry { vm: u64 },
    /// The operator waits no longer for a message.
    ControlReceive { client: u64, id: u64 },
    /// The operator waits no longer for an answer to this offer or request.
    ControlOffer { offer: u64 },
    /// Nobody has taken up the operator's end of this stream again since the core was replaced.
    ControlStream { stream: u64 },
    /// Broken puts are to be swept.
    Sweep,
}

/// All timers, in order of time.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Timers {
    set: BTreeSet<(Tick, Timer)>,
}

impl Timers {
    /// Arms a timer; one for [`Tick::NEVER`] is none.
    pub fn arm(&mut self, at: Tick, timer: Timer) {
        if at != Tick::NEVER {
            self.set.insert((at, timer));
        }
    }

    /// Takes one back.
    pub fn disarm(&mut self, at: Tick, timer: Timer) {
        if at != Tick::NEVER {
            self.set.remove(&(at, timer));
        }
    }

    /// Takes the sweep's back, whenever it was.
    pub fn disarm_sweep(&mut self) {
        self.set.retain(|(_, timer)| *timer != Timer::Sweep);
    }

    /// When the next one is due.
    #[must_use]
    pub fn next(&self) -> Option<Tick> {
        self.set.first().map(|(at, _)| *at)
    }

    /// What it is for.
    #[must_use]
    pub fn first(&self) -> Option<Timer> {
        self.set.first().map(|(_, timer)| *timer)
    }

    /// The next one that is due at `now`.
    pub fn pop_due(&mut self, now: Tick) -> Option<Timer> {
        let (at, timer) = *self.set.first()?;
        if at > now {
            return None;
        }
        self.set.remove(&(at, timer));
        Some(timer)
    }

    /// All of them, for saving.
    pub fn iter(&self) -> impl Iterator<Item = &(Tick, Timer)> {
        self.set.iter()
    }
}

impl FromIterator<(Tick, Timer)> for Timers {
    fn from_iter<I: IntoIterator<Item = (Tick, Timer)>>(timers: I) -> Self {
        Self {
            set: timers.into_iter().filter(|(at, _)| *at != Tick::NEVER).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_come_in_order_and_never_means_none() {
        let mut timers = Timers::default();
        timers.arm(Tick(20), Timer::Sweep);
        timers.arm(Tick(10), Timer::Release { vm: 1 });
        timers.arm(Tick::NEVER, Timer::Expiry { vm: 1 });
        assert_eq!((timers.iter().count(), timers.next()), (2, Some(Tick(10))));
        assert_eq!(timers.pop_due(Tick(9)), None);
        assert_eq!(timers.pop_due(Tick(30)), Some(Timer::Release { vm: 1 }));
        timers.disarm(Tick(20), Timer::Sweep);
        assert_eq!(timers.next(), None);
    }
}
