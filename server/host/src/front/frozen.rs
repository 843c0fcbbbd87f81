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
    /// Wishes (VM, the core's request) that are not answered yet. They end with the core that asked.
    pub(super) asked: Vec<(u64, u64)>,
}

impl Frozen {
    /// Freezes a VM until then (also one that is frozen: the new time holds), or lets it go. False: there is no room for one more.
    pub fn set(&mut self, vm: u64, until: Option<Tick>) -> bool {
        match until {
            None => drop(self.vms.remove(&vm)),
            Some(_) if self.vms.len() >= FROZEN_VMS_MAX && !self.vms.contains_key(&vm) => return false,
            Some(until) => drop(self.vms.insert(vm, until)),
        }
        true
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
        self.vms.values().copied().min().unwrap_or(Tick::NEVER)
    }

    /// A VM whose time is over.
    pub fn due(&self, now: Tick) -> Option<u64> {
        let mut due = self.vms.iter().filter(|(_, until)| **until <= now);
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
        assert!(frozen.set(1, Some(Tick::NEVER)) && frozen.set(2, Some(Tick(10))));
        assert_eq!((frozen.until(1), frozen.until(3)), (Some(Tick::NEVER), None));
        assert_eq!(frozen.deadline(), Tick(10));
        assert_eq!((frozen.due(Tick(9)), frozen.due(Tick(10))), (None, Some(2)));
        assert!(frozen.set(2, None) && frozen.set(2, None));
        assert_eq!(frozen.all(), vec![(1, Tick::NEVER)]);
        for vm in 3..(FROZEN_VMS_MAX as u64 + 2) {
            assert!(frozen.set(vm, Some(Tick(50))));
        }
        assert!(!frozen.set(u64::MAX, Some(Tick(50))));
        assert!(
            frozen.set(1, Some(Tick(60))),
            "one that is there is no further one"
        );
    }
}
