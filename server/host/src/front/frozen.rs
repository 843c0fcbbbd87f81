//! Which VMs are frozen, and until when: a level that outlives sessions and core lives (a hand-over of the front takes it along).
//!
//! In: the operator's wishes, time. Out: the level of a VM, whose time is over. Must never know: a session.

use super::limits::FROZEN_VMS_MAX;
use std::collections::BTreeMap;
use vmgmt_device::Tick;

/// Frozen VMs. Time is the boot clock, which goes on over hand-overs.
#[derive(Clone, Debug, Default)]
pub struct Frozen {
    /// Until when, by VM; [`Tick::NEVER`]: until it is thawed.
    vms: BTreeMap<u64, Tick>,
    /// Those of which nobody was told yet, and when they are let go: [`Tick::NEVER`] while the core life that asked can say more.
    pub(super) untold: BTreeMap<u64, Tick>,
    /// Wishes (VM, the core's request) that are not answered yet. They end with the core that asked.
    pub asked: Vec<(u64, u64)>,
}

impl Frozen {
    /// Freezes a VM until then (also one that is frozen: the new time holds), or lets it go. `kept`: whether somebody counts on it in any
    /// case (who once did goes on to). False: there is no room for one more.
    pub fn set(&mut self, vm: u64, until: Option<Tick>, kept: bool) -> bool {
        let known = self.vms.contains_key(&vm);
        if until.is_none() || kept {
            self.untold.remove(&vm);
        }
        match until {
            None => drop(self.vms.remove(&vm)),
            Some(_) if self.vms.len() >= FROZEN_VMS_MAX && !known => return false,
            Some(until) => drop(self.vms.insert(vm, until)),
        }
        if until.is_some() && !kept && (!known || self.untold.contains_key(&vm)) {
            self.untold.insert(vm, Tick::NEVER);
        }
        true
    }

    /// Somebody is told that it is frozen.
    pub fn keep(&mut self, vm: u64) {
        self.untold.remove(&vm);
    }

    /// Somebody counts on it.
    pub fn is_kept(&self, vm: u64) -> bool {
        !self.untold.contains_key(&vm)
    }

    /// The core life that asked is gone: whom nobody was told of is let go then, unless another life asks for it.
    pub fn core_gone(&mut self, then: Tick) {
        self.asked.clear();
        for until in self.untold.values_mut() {
            *until = then.min(*until);
        }
    }

    /// Until when it is frozen; `None`: it is not.
    pub fn until(&self, vm: u64) -> Option<Tick> {
        self.vms.get(&vm).copied()
    }

    /// All of them.
    pub fn all(&self) -> Vec<(u64, Tick)> {
        self.vms.iter().map(|(vm, until)| (*vm, *until)).collect()
    }

    /// When [`Frozen::due`] gives one.
    pub fn deadline(&self) -> Tick {
        let ends = self.vms.values().chain(self.untold.values());
        ends.copied().min().unwrap_or(Tick::NEVER)
    }

    /// A VM whose time is over.
    pub fn due(&self, now: Tick) -> Option<u64> {
        let mut due = self
            .vms
            .iter()
            .chain(&self.untold)
            .filter(|(_, until)| **until <= now);
        due.next().map(|(vm, _)| *vm)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_level_with_an_end() {
        let mut frozen = Frozen::default();
        assert_eq!((frozen.deadline(), frozen.due(Tick(100))), (Tick::NEVER, None));
        assert!(frozen.set(1, Some(Tick::NEVER), true) && frozen.set(2, Some(Tick(10)), true));
        assert_eq!((frozen.until(1), frozen.until(3)), (Some(Tick::NEVER), None));
        assert_eq!(frozen.deadline(), Tick(10));
        assert_eq!((frozen.due(Tick(9)), frozen.due(Tick(10))), (None, Some(2)));
        assert!(frozen.set(2, None, true) && frozen.set(2, None, false));
        assert_eq!(frozen.all(), vec![(1, Tick::NEVER)]);
        for vm in 3..(FROZEN_VMS_MAX as u64 + 2) {
            assert!(frozen.set(vm, Some(Tick(50)), true));
        }
        assert!(!frozen.set(u64::MAX, Some(Tick(50)), false));
        assert!(
            frozen.set(1, Some(Tick(60)), false),
            "one that is there is no further one"
        );
    }

    #[test]
    fn whom_nobody_was_told_of_is_let_go_after_the_core() {
        let mut frozen = Frozen::default();
        for (vm, kept) in [(1, true), (2, false), (3, false), (4, false)] {
            assert!(frozen.set(vm, Some(Tick::NEVER), kept));
        }
        // One is told of; who asks again for one that is kept, and is told nothing, takes nothing back.
        frozen.keep(3);
        assert!(frozen.set(3, Some(Tick::NEVER), false));
        assert_eq!(
            [1, 2, 3, 4].map(|vm| frozen.is_kept(vm)),
            [true, false, true, false]
        );
        assert_eq!(frozen.deadline(), Tick::NEVER, "while the core can say more");
        frozen.asked.push((2, 7));
        frozen.core_gone(Tick(10));
        frozen.core_gone(Tick(20));
        assert!(frozen.asked.is_empty());
        // The next core is asked for one of them.
        assert!(frozen.set(4, Some(Tick::NEVER), false));
        assert_eq!(
            (frozen.deadline(), frozen.due(Tick(9)), frozen.due(Tick(10))),
            (Tick(10), None, Some(2))
        );
        assert!(frozen.set(2, None, false));
        assert_eq!((frozen.deadline(), frozen.due(Tick(100))), (Tick::NEVER, None));
        assert!(!frozen.is_kept(4));
    }
}
