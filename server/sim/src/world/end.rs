//! GARDEN, the end of a run: everything heals and runs dry, and the books must balance.
//!
//! In: the world after its last step. Out: complaints about what was accepted and did not come, what is open, what waits.

use super::*;
use crate::limits::{DRY_STEP_NS, DRY_TURNS};
use crate::offers::Step as OfferStep;

impl World {
    /// Heals everything and lets all work come to its end; then the books must balance.
    pub fn run_dry(&mut self) {
        self.steps.die_in(None);
        self.steps.overtake_in(None);
        self.steps.cut_every(None);
        self.steps.cut_in(None);
        self.spindle.borrow_mut().mood = Mood {
            hangs: false,
            slow_ns: 1000,
            errors_permille: 0,
        };
        {
            let mut town = self.town.borrow_mut();
            let town = &mut *town;
            for index in 0..town.vms.len() {
                town.guests[index].files.winding_down = true;
                if town.hostile[index] {
                    town.vms[index].close(&mut town.front);
                }
            }
            town.note("everything heals".into());
        }
        let horizon = self.clock.now().after_ns(120_000_000_000);
        let mut idle = 0;
        for _ in 0..DRY_TURNS {
            if self.complaints.first().is_some() {
                return;
            }
            self.clock.begin_action();
            self.advance(self.clock.now().after_ns(DRY_STEP_NS));
            self.spin();
            self.keep();
            let mut worked = self.run_all();
            worked |= self.wind_down();
            worked |= self.operator_winds_down();
            worked |= self.freezer_winds_down();
            self.look_at_freezes();
            worked |= self.town.borrow().front.is_runnable();
            self.look();
            idle = if worked { 0 } else { idle + 1 };
            // A guest that has just learned something acts on it in its next turn.
            if idle < IDLE_TURNS {
                continue;
            }
            match self.next_due().filter(|due| *due <= horizon) {
                Some(due) => self.advance(due),
                None => break,
            }
        }
        self.balance();
    }

    /// Honest guests end what they have begun, and take what is there for them.
    fn wind_down(&mut self) -> bool {
        let mut town = self.town.borrow_mut();
        let town = &mut *town;
        let mut worked = false;
        let undelivered = town.shadow.undelivered();
        let to_all = town.shadow.unbalanced().is_some();
        for index in 0..town.vms.len() {
            if town.hostile[index] {
                continue;
            }
            let number = town.vms[index].number;
            if town.guests[index].state == State::Off {
                town.with(index, |guest, site| guest.start(site));
                worked = true;
            }
            if !town.with(index, |guest, site| guest.settle(site)) {
                worked |= town.vms[index].is_busy();
                continue;
            }
            if town.guests[index].state != State::Running {
                worked = true;
                continue;
            }
            if !town.guests[index].bus_master {
                town.vms[index].bus_master(true);
                worked = true;
                continue;
            }
            if !town.vms[index].maps.contains_key(&PLUGGED) {
                town.vms[index].plug(PLUGGED, RAM_BYTES - PLUGGED);
                worked = true;
                continue;
            }
            let before = town.shadow.completions;
            let acted = town.with(index, |guest, site| {
                let mut worked = false;
                for n in 0..guest.rings.len() {
                    if guest.rings[n].closing {
                        continue;
                    }
                    if guest.wake(site, n, false) {
                        worked |= guest.reap(site, n, usize::MAX) > 0;
                    }
                }
                let waiting = to_all || undelivered.iter().any(|(_, _, target)| *target == number);
                let posted = guest.rings[CHAT]
                    .flights
                    .values()
                    .any(|flight| matches!(flight.kind, Kind::Receive));
                if waiting && !posted {
                    worked |= guest.act(site, Act::Receive).is_some();
                }
                worked |= guest.act(site, Act::File).is_some();
                worked |= guest.offer(site, true).is_some();
                if std::mem::take(&mut guest.offers.crowded) {
                    guest.act(site, Act::Cancel);
                }
                guest.settle(site);
                for n in 0..guest.rings.len() {
                    worked |= guest.sleep(site, n);
                }
                worked
            });
            if acted {
                let taken = town.shadow.completions - before;
                let rings = town.guests[index].rings.iter().zip(&town.vms[index].eventfds);
                let rings: Vec<_> = rings
                    .map(|(ring, fd)| (ring.sleeping, ring.interrupts_seen, fd.get(), ring.flights.len()))
                    .collect();
                town.note(format!("VM {number} takes {taken} completions; its rings (asleep, seen, interrupts, in flight): {rings:?}"));
            }
            worked |= acted;
        }
        worked
    }

    fn balance(&mut self) {
        self.operator_balance();
        self.freezer_balance(&self.complaints);
        let town = self.town.borrow();
        let complain = |text: String| self.complaints.add(text);
        for (vm, guest) in town.vms.iter().zip(&town.guests) {
            if town.hostile[vm.number as usize - 1] {
                continue;
            }
            if let Some(errand) = vm.errand() {
                complain(format!("everything is idle, and VM {} {errand}", vm.number));
            }
            if guest.state != State::Running {
                complain(format!(
                    "everything is idle, and VM {} is {:?}",
                    vm.number, guest.state
                ));
            }
            for ring in &guest.rings {
                let open: Vec<_> = ring
                    .flights
                    .values()
                    .map(|flight| &flight.kind)
                    .filter(|kind| !matches!(kind, Kind::Receive | Kind::Offer(OfferStep::Next)))
                    .collect();
                let there = ring.has_completion(&vm.ram);
                if !open.is_empty() || there {
                    complain(format!(
                        "everything is idle, and VM {} ring {} waits for {open:?} (asleep: {}, closing: {}, a completion is there: {there}, interrupts: {} seen of {:?}; {:?})",
                        vm.number,
                        ring.n,
                        ring.sleeping,
                        ring.closing,
                        ring.interrupts_seen,
                        vm.eventfds,
                        guest.state
                    ));
                }
            }
            if guest.files.open() > 0 {
                complain(format!(
                    "VM {} has {} transfers that do not end: {:?}",
                    vm.number,
                    guest.files.open(),
                    guest.files
                ));
            }
        }
        if let Some(text) = town.shadow.unbalanced() {
            complain(text);
        }
        let undelivered: Vec<_> = town
            .shadow
            .undelivered()
            .into_iter()
            .filter(|(source, _, target)| {
                !town.shadow.hostile.contains(source) && !town.shadow.hostile.contains(target)
            })
            .collect();
        if !undelivered.is_empty() {
            complain(format!(
                "accepted and never delivered (source, number, target): {undelivered:?}"
            ));
        }
        let spindle = self.spindle.borrow();
        for ((share, path), contents) in spindle.disk.files() {
            let name = path.rsplit('/').next().unwrap_or(path);
            if !name.starts_with(crate::disk::TEMPORARY_PREFIX) && !town.shadow.is_hostile(share) {
                town.shadow.judge(&format!("{share}/{path}"), contents);
            }
        }
        if spindle.len() > 0 {
            complain(format!("{} works of the disk do not end", spindle.len()));
        }
        town.check_secrets();
        if town.trace.aloud
            && self.complaints.first().is_some()
            && let Some(core) = self.core.borrow().as_ref()
        {
            for (number, session) in &core.sessions.map {
                eprintln!("session {number}: {session:#?}");
            }
        }
        match self.core.borrow().as_ref() {
            None => complain("there is no core".into()),
            Some(core) => {
                let receives: usize = town
                    .guests
                    .iter()
                    .zip(&town.hostile)
                    .filter(|(_, hostile)| !**hostile)
                    .flat_map(|(guest, _)| &guest.rings)
                    .map(|ring| ring.flights.len())
                    .sum();
                if core.hub.submissions_open() != receives {
                    complain(format!(
                        "the hub has {} submissions open, the guests {receives}",
                        core.hub.submissions_open()
                    ));
                }
                if core.hub.effects_open() != 0 {
                    complain(format!("the hub has {} effects open", core.hub.effects_open()));
                }
            }
        }
    }
}
