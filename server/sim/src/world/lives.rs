//! GARDEN, core lives: how each begins, ends and is replaced. The keeper's part.
//!
//! In: time, deaths, upgrades. Out: cores. One is dead for guest memory before the next begins.

use super::*;

impl World {
    fn outside(&self, wires: Rc<Wires>) -> Outside {
        Outside {
            clock: self.clock.clone(),
            steps: Rc::clone(&self.steps),
            wires,
            spindle: Rc::clone(&self.spindle),
            hub_words: self.hub_words.clone(),
            replies: Rc::clone(&self.operator.replies),
            fault: Rc::clone(&self.fault),
            complaints: self.complaints.clone(),
            poll_ns: self.poll_ns,
        }
    }

    /// The keeper's part.
    pub(super) fn keep(&mut self) {
        let now = self.clock.now();
        if self.haunted
            && self.spindle.borrow().haunted().is_empty()
            && let Some(core) = &mut self.core
        {
            self.haunted = false;
            core.buried();
            self.town.borrow_mut().note("the undead are buried".into());
        }
        match self.keeper {
            Keeper::Serving => {}
            Keeper::Dead { seen } if seen <= now => {
                let mut town = self.town.borrow_mut();
                if self.fault.get() != Fault::DropsFences {
                    town.front.core_dead(self.life);
                }
                let at = now.after_ns(town.chance.below(20_000_000));
                town.note(format!("core life {} is seen dead", self.life));
                self.keeper = Keeper::Starting { at };
            }
            Keeper::Starting { at } if at <= now => self.start(),
            Keeper::Dead { .. } | Keeper::Starting { .. } => {}
        }
    }

    fn start(&mut self) {
        self.life += 1;
        self.keeper = Keeper::Serving;
        let wires = Wires::new(self.life);
        if self.fault.get() == Fault::LosesTables {
            for client in self.town.borrow_mut().front.clients.values_mut() {
                client.state = SimWords::new(STATE_WORDS);
            }
        }
        let outside = self.outside(Rc::clone(&wires));
        {
            let mut town = self.town.borrow_mut();
            town.note(format!("core life {} starts", wires.life));
            town.front.core_begins(wires);
        }
        let configs = self.configs.clone();
        let undead = if self.fault.get() == Fault::ForgetsTheUndead {
            BTreeSet::new()
        } else {
            self.spindle.borrow().haunted()
        };
        self.haunted = !undead.is_empty();
        let born = self.alive(move || {
            let mut core = Core::new(outside, undead);
            for config in configs {
                core.vm(config);
            }
            core
        });
        match born {
            Some(core) => self.core = Some(core),
            None => self.died("died while it recovered"),
        }
    }

    /// Runs the core; `None`: it died of it.
    fn alive<T>(&self, run: impl FnOnce() -> T) -> Option<T> {
        self.steps.set_running(true);
        let outcome = catch_unwind(AssertUnwindSafe(run));
        self.steps.set_running(false);
        match outcome {
            Ok(value) => Some(value),
            Err(cause) if cause.is::<Death>() => None,
            Err(cause) => {
                let text = cause
                    .downcast_ref::<String>()
                    .cloned()
                    .or_else(|| cause.downcast_ref::<&str>().map(|text| (*text).to_owned()))
                    .unwrap_or_default();
                self.complaints.add(format!("a panic: {text}"));
                None
            }
        }
    }

    pub(super) fn core_round(&mut self) {
        let Some(mut core) = self.core.take() else { return };
        if !core.is_runnable() {
            self.core = Some(core);
            return;
        }
        let before = self.steps.taken();
        self.note_replies();
        match self.alive(|| core.round()) {
            Some(()) => {
                let taken = self.steps.taken() - before;
                if core.adopted {
                    self.town.borrow_mut().core_serves(|vm| core.has_taken_up(vm));
                }
                self.core = Some(core);
                if taken > 3 {
                    self.town
                        .borrow_mut()
                        .note(format!("core life {}: {taken} steps", self.life));
                }
                self.operator_may_read();
            }
            None => {
                drop(core);
                self.operator_loses_core(true);
                self.died("died");
            }
        }
    }

    pub(super) fn died(&mut self, how: &str) {
        self.core = None;
        self.deaths += 1;
        self.steps.die_in(None);
        self.steps.overtake_in(None);
        let mut town = self.town.borrow_mut();
        town.core_died();
        let undead = town.chance.permille(500);
        let undead = self.spindle.borrow_mut().core_died(self.life, undead);
        self.undead += u64::from(undead);
        let seen = self.clock.now().after_ns(town.chance.below(DEATH_SEEN_NS_MAX));
        self.keeper = Keeper::Dead { seen };
        town.note(format!(
            "core life {} {how}, a worker in disk sleep: {undead}",
            self.life
        ));
        drop(town);
        self.operator_loses_core(false);
    }

    /// Another program is asked whether it could be the core, on copies of the state as it is at this instant; then the old one ends in order,
    /// and the next begins on a copy of the hub's memory, which becomes the memory; or, if it refuses, the old one on the old memory.
    pub(super) fn upgrade(&mut self) {
        if self.core.is_none() {
            return;
        }
        self.ask_the_next();
        let (denied, refused) = {
            let mut town = self.town.borrow_mut();
            (town.chance.permille(200), town.chance.permille(200))
        };
        if denied {
            return self.town.borrow_mut().note("an upgrade is denied".into());
        }
        let Some(core) = self.core.take() else { return };
        self.upgrades += 1;
        match self.alive(|| core.end()) {
            Some(()) => self.died("ends in order"),
            None => self.died("died while it ended"),
        }
        self.ask_the_next();
        if !refused {
            self.hub_words = self.hub_words.copy();
        }
        let word = if refused { "refuses, the old one" } else { "" };
        self.town
            .borrow_mut()
            .note(format!("the next program {word} takes over"));
    }

    /// What lies in the state at any instant is readable.
    fn ask_the_next(&self) {
        let town = self.town.borrow();
        let tables = town.front.clients.values().map(|client| client.state.copy());
        let answer = catch_unwind(AssertUnwindSafe(|| {
            Core::check(&self.hub_words, tables, self.life + 1)
        }));
        if !matches!(answer, Ok(Ok(()))) {
            self.complaints
                .add(format!("another program could not be the core: {answer:?}"));
        }
    }
}
