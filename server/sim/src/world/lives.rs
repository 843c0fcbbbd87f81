//! GARDEN, core lives: how each begins, ends and is replaced. The keeper's part.
//!
//! In: time, deaths, upgrades. Out: cores. One is dead for guest memory before the next begins.

use super::*;
use crate::limits::CUT_ROUNDS_MAX;
use std::any::Any;

impl World {
    fn outside(&self, wires: Rc<Wires>) -> Outside {
        Outside {
            clock: self.clock.clone(),
            steps: Rc::clone(&self.steps),
            wires,
            spindle: Rc::clone(&self.spindle),
            hub_words: self.hub_words.clone(),
            replies: Rc::clone(&self.operator.replies),
            glass: Rc::clone(&self.glass),
            fault: Rc::clone(&self.fault),
            complaints: self.complaints.clone(),
            poll_ns: self.poll_ns,
        }
    }

    /// The keeper's part.
    pub(super) fn keep(&mut self) {
        self.settle_cuts();
        let now = self.clock.now();
        // What the keeper has to say to a front that is handed over waits.
        let tells = !self.town.borrow().front.is_stopped();
        if self.haunted
            && self.spindle.borrow().haunted().is_empty()
            && let Some(core) = self.core.borrow_mut().as_mut()
        {
            self.haunted = false;
            core.buried();
            self.town.borrow_mut().note("the undead are buried".into());
        }
        match self.keeper {
            Keeper::Serving => {}
            Keeper::Dead { seen } if seen <= now && tells => {
                let mut town = self.town.borrow_mut();
                if self.fault.get() != Fault::DropsFences {
                    town.front.core_dead(self.life);
                }
                let at = now.after_ns(town.chance.below(20_000_000));
                town.note(format!("core life {} is seen dead", self.life));
                self.keeper = Keeper::Starting { at };
            }
            Keeper::Starting { at } if at <= now && tells => self.start(),
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
            Some(core) => *self.core.borrow_mut() = Some(core),
            None => self.died("died while it recovered"),
        }
    }

    fn alive<T>(&self, run: impl FnOnce() -> T) -> Option<T> {
        alive(&self.steps, &self.complaints, run)
    }

    /// The books about rounds that the core had in the middle of the front's work.
    pub(super) fn settle_cuts(&mut self) {
        let rounds = self.cut.rounds.take();
        if rounds == 0 {
            return;
        }
        self.town.borrow_mut().note(format!(
            "core life {}: {rounds} rounds while the front was at work",
            self.life
        ));
        if self.cut.died.take() {
            self.operator_loses_core(true);
            self.died("died while the front was at work");
        } else {
            self.note_served();
        }
    }

    fn note_served(&self) {
        if let Some(core) = self.core.borrow().as_ref().filter(|core| core.adopted) {
            self.town.borrow_mut().core_serves(|vm| core.has_taken_up(vm));
        }
    }

    pub(super) fn core_round(&mut self) {
        if !self.core_is_runnable() {
            return;
        }
        let Some(mut core) = self.core.take() else { return };
        let before = self.steps.taken();
        self.operator.note_replies();
        match self.alive(|| core.round()) {
            Some(()) => {
                let taken = self.steps.taken() - before;
                *self.core.borrow_mut() = Some(core);
                self.note_served();
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
        drop(self.core.take());
        self.deaths += 1;
        self.steps.die_in(None);
        self.steps.overtake_in(None);
        self.steps.cut_in(None);
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
        self.freezer_loses_core();
    }

    /// Another program is asked whether it could be the core, on copies of the state as it is at this instant; then the old one ends in order,
    /// and the next begins on a copy of the hub's memory, which becomes the memory; or, if it refuses, the old one on the old memory.
    pub(super) fn upgrade(&mut self) {
        if self.core.borrow().is_none() {
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

/// Runs a core; `None`: it died of it.
fn alive<T>(steps: &Steps, complaints: &Complaints, run: impl FnOnce() -> T) -> Option<T> {
    steps.set_running(true);
    let outcome = catch_unwind(AssertUnwindSafe(run));
    steps.set_running(false);
    match outcome {
        Ok(value) => Some(value),
        Err(cause) if cause.is::<Death>() => None,
        Err(cause) => {
            complaints.add(format!("a panic: {}", text_of(&*cause)));
            None
        }
    }
}

/// What a panic says.
pub fn text_of(cause: &(dyn Any + Send)) -> &str {
    let text = cause.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| cause.downcast_ref::<&str>().copied())
        .unwrap_or_default()
}

/// What a core does in the middle of the front's work: a round, if it has something to do.
pub(super) fn rounds_within(
    core: &Rc<RefCell<Option<Core>>>,
    cut: &Rc<Cut>,
    steps: &Rc<Steps>,
    complaints: &Complaints,
    operator: &Operator,
) -> Box<dyn FnMut()> {
    let (core, cut, complaints) = (Rc::clone(core), Rc::clone(cut), complaints.clone());
    let (steps, noting) = (Rc::downgrade(steps), operator.noting());
    Box::new(move || {
        let Some(steps) = steps.upgrade() else { return };
        // It has a round already, which the front overtakes.
        let Ok(Some(mut running)) = core.try_borrow_mut().map(|mut core| core.take()) else {
            return;
        };
        // Only after some it is asleep again.
        for _ in 0..CUT_ROUNDS_MAX {
            if !running.is_runnable() {
                break;
            }
            noting();
            cut.rounds.set(cut.rounds.get() + 1);
            if alive(&steps, &complaints, || running.round()).is_none() {
                return cut.died.set(true);
            }
        }
        if let Ok(mut core) = core.try_borrow_mut() {
            *core = Some(running);
        }
    })
}
