//! GARDEN, rest: nobody begins anything new until all sleep; at that moment nobody may find anything to do.
//!
//! In: the world between two steps. Out: complaints about wake-ups that never came. A lost wake-up hides behind the next one: behind a
//! neighbour's doorbell, a timer, a guest that asks again. So it is looked for at the instant of sleep, by waking everybody for no reason: who
//! then does anything was not woken when it should have been.

use super::World;
use crate::guest::State;
use crate::limits::{
    REST_ACCESSES, REST_CUTS, REST_OVERTAKES_MAX, REST_STEP_NS, REST_TURNS, REST_TURNS_CALM,
};
use vmgmt_device::page::TouchedPage;

impl World {
    /// Lets everybody end what is to be done now, until all sleep, and looks at the sleepers. Now and then something still happens while the
    /// core goes to sleep. A process may stand still meanwhile: what it does not answer wakes nobody.
    pub(super) fn rest(&mut self) {
        let overtakes = {
            let mut town = self.town.borrow_mut();
            let town = &mut *town;
            for still in &mut town.still {
                *still = town.chance.permille(200);
            }
            town.note(format!(
                "nobody begins anything; who stands still: {:?}",
                town.still
            ));
            town.hurries = true;
            town.chance.below(REST_OVERTAKES_MAX + 1)
        };
        let rests = self.come_to_rest(overtakes);
        self.steps.overtake_in(None);
        let every = self.steps.cut_every(None);
        self.steps.cut_in(None);
        self.town.borrow_mut().hurries = false;
        if rests && self.has_adopted() {
            self.town.borrow_mut().note("all sleep".into());
            self.look_at_guests();
            self.look_at_front();
            self.operator.still = true;
            self.look_at_core();
            self.operator.still = false;
        }
        self.steps.cut_every(every);
        self.town.borrow_mut().still.fill(false);
    }

    /// True: nobody has anything to do, but when time passes or a disk ends its work.
    fn come_to_rest(&mut self, mut overtakes: u64) -> bool {
        let mut calm = 0;
        let mut cuts = self.town.borrow_mut().chance.below(REST_OVERTAKES_MAX + 1);
        for _ in 0..REST_TURNS {
            // The rounds before sleep are short.
            let accesses = self.town.borrow_mut().chance.below(REST_ACCESSES);
            let overtaken = self.steps.overtakes();
            self.steps.overtake_in((overtakes > 0).then_some(accesses));
            self.advance(self.clock.now().after_ns(REST_STEP_NS));
            self.spin();
            self.keep();
            // And something still happens of which the front tells, while the core, that was awake, goes to sleep.
            if cuts > 0 && self.core_is_runnable() {
                cuts -= 1;
                let mut town = self.town.borrow_mut();
                for _ in 0..town.chance.between(1, 8) {
                    town.guest_turn();
                }
                let (first, every) = (town.chance.below(REST_CUTS), town.chance.below(REST_CUTS));
                self.steps.cut_in([first]);
                let before = self.steps.cut_every(Some(every));
                town.front_turn();
                self.steps.cut_every(before);
                self.steps.cut_in(None);
            }
            let mut worked = self.run_all();
            self.town.borrow_mut().react();
            self.settle_cuts();
            worked |= self.is_awake();
            overtakes = overtakes.saturating_sub(self.steps.overtakes() - overtaken);
            calm = if worked { 0 } else { calm + 1 };
            if calm == REST_TURNS_CALM {
                return true;
            }
        }
        false
    }

    fn is_awake(&self) -> bool {
        let town = self.town.borrow();
        // While the front is handed over nobody sleeps: it will look at everything.
        town.front.is_stopped() || town.front.is_runnable() || self.core_is_runnable()
    }

    /// Honest guests whose processes run and which a core serves that has taken over all that the one before left.
    fn served(&self) -> Vec<usize> {
        let (town, core) = (self.town.borrow(), self.core.borrow());
        let Some(core) = core.as_ref() else {
            return Vec::new();
        };
        let is_served = |index: &usize| {
            let vm = &town.vms[*index];
            !town.hostile[*index] && !town.still[*index] && vm.is_free() && core.has_taken_up(vm.number)
        };
        (0..town.vms.len()).filter(is_served).collect()
    }

    /// A guest that waits for its interrupt has nothing to take.
    fn look_at_guests(&self) {
        let town = self.town.borrow();
        for index in self.served() {
            let (vm, guest) = (&town.vms[index], &town.guests[index]);
            // A process that has ended hears nothing.
            if guest.state != State::Running {
                continue;
            }
            // While there is no DMA there is no message interrupt either: it comes when there is DMA again.
            if !guest.bus_master || town.front.frozen.until(vm.number).is_some() {
                continue;
            }
            for ring in guest.rings.iter().filter(|ring| ring.sleeping && ring.enabled) {
                let interrupts = vm.eventfds.get(ring.n).map_or(0, |fd| fd.get());
                if interrupts == ring.interrupts_seen && ring.has_completion(&vm.ram) {
                    self.complaints.add(format!(
                        "all sleep, and VM {} ring {} waits for an interrupt while a completion is there",
                        vm.number, ring.n
                    ));
                }
            }
        }
    }

    /// The front finds nothing in a turn that nobody woke it for.
    fn look_at_front(&self) {
        let mut town = self.town.borrow_mut();
        let Some(wires) = town.front.core.clone() else {
            return;
        };
        let touched = TouchedPage::new(wires.touched.clone());
        let before = (
            touched.total(),
            wires.to_core.borrow().len(),
            town.front.bytes_out(),
        );
        town.front.turn(usize::MAX);
        let after = (
            touched.total(),
            wires.to_core.borrow().len(),
            town.front.bytes_out(),
        );
        if before != after {
            self.complaints.add(format!(
                "all sleep, and the front, woken for nothing, finds something (touched, packets, bytes): {before:?}, then {after:?}"
            ));
        }
    }

    /// The core finds nothing, in no ring of an honest guest that has rung, nor anywhere in itself.
    fn look_at_core(&mut self) {
        let sessions: Vec<u64> = {
            let town = self.town.borrow();
            let rung = |index: &usize| town.guests[*index].rings.iter().all(|ring| !ring.doorbell_due);
            let served = self.served().into_iter();
            served
                .filter(rung)
                .filter_map(|index| town.vms[index].session)
                .collect()
        };
        let before = match self.core.borrow_mut().as_mut() {
            Some(core) => {
                core.wake_for_nothing(&sessions);
                core.done
            }
            None => return,
        };
        // Who reaches a guest's memory by message needs some turns to look. What becomes due meanwhile is no finding.
        let due = self.next_due();
        for _ in 0..REST_TURNS {
            self.core_round();
            let (done, what) = match self.core.borrow().as_ref() {
                Some(core) => (core.done, core.last_done),
                None => return,
            };
            if done != before {
                self.complaints.add(format!(
                    "all sleep, and the core, woken for nothing, finds something to do: {what}"
                ));
                return;
            }
            let now = self.clock.now().after_ns(REST_STEP_NS);
            if due.is_some_and(|due| due <= now) || !self.is_awake() {
                return;
            }
            self.advance(now);
            self.run_all();
            self.town.borrow_mut().react();
        }
    }
}
