//! GARDEN, the world: core lives, the keeper's part, time, faults; one step after the other, then everything heals and runs dry.
//!
//! In: chance. Out: complaints. The order of the keeper's words is the real one: a core is dead for guest memory before the next begins.

mod operators;
mod rest;

use crate::chance::Chance;
use crate::clockwork::{Clock, Death, SimWords, Steps};
use crate::core::{Core, Outside};
use crate::faults::Fault;
use crate::guest::{Act, CHAT, Kind, State};
use crate::limits::{DEATH_SEEN_NS_MAX, HUB_WORDS, PLUGGED, RAM_BYTES};
use crate::ram::Complaints;
use crate::town::{Plan, Town};
use crate::wires::{Mood, Spindle, Wires};
use operators::Operator;
pub use operators::Replies;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use vmgmt_core::policy::{Access, ShareGrant, VmConfig, VmLimits};
use vmgmt_device::Tick;
use vmgmt_device::registers::Input;
use vmgmt_device::rings::STATE_WORDS;

/// What may happen next; the weights are the plan's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    Core,
    Front,
    Guest,
    Time,
    Overtake,
    ArmDeath,
    Kill,
    Upgrade,
    HandOver,
    Disk,
    Freeze,
    Operator,
    Rest,
}

impl Next {
    /// All of them, and how often.
    pub const BASE: [(Self, u32); 13] = [
        (Self::Core, 200),
        (Self::Front, 150),
        (Self::Guest, 500),
        (Self::Time, 60),
        (Self::Overtake, 60),
        (Self::ArmDeath, 8),
        (Self::Kill, 2),
        (Self::Upgrade, 2),
        (Self::HandOver, 4),
        (Self::Disk, 4),
        (Self::Freeze, 2),
        (Self::Operator, 10),
        (Self::Rest, 12),
    ];
}

/// Turns without any work after which everything is idle.
const IDLE_TURNS: u32 = 8;

/// Between two core lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Keeper {
    /// A core serves (or is taken to).
    Serving,
    /// It died; the keeper sees it then.
    Dead { seen: Tick },
    /// The next one starts then.
    Starting { at: Tick },
}

/// The world.
pub struct World {
    pub clock: Clock,
    pub complaints: Complaints,
    pub town: Rc<RefCell<Town>>,
    steps: Rc<Steps>,
    spindle: Rc<RefCell<Spindle>>,
    hub_words: SimWords,
    configs: Vec<VmConfig>,
    operator: Operator,
    core: Option<Core>,
    /// It was told of undead ones, and not yet of their end.
    haunted: bool,
    life: u64,
    keeper: Keeper,
    fault: Rc<Cell<Fault>>,
    frozen: Vec<u64>,
    poll_ns: u64,
    pub deaths: u64,
    pub upgrades: u64,
    pub undead: u64,
}

impl World {
    pub fn new(seed: u64, fault: Fault, aloud: bool) -> Self {
        let mut chance = Chance::new(seed);
        let vms = chance.between(1, 4) as usize;
        let act_weights: Vec<u32> = Act::BASE.iter().map(|(_, weight)| *weight).collect();
        let mut acts = chance.swarm(&act_weights);
        for (weight, (act, base)) in acts.iter_mut().zip(Act::BASE) {
            if matches!(act, Act::Reap) {
                *weight = (*weight).max(base);
            }
        }
        let world_weights: Vec<u32> = Next::BASE.iter().map(|(_, weight)| *weight).collect();
        let mut world = chance.swarm(&world_weights);
        for (weight, base) in world.iter_mut().zip(world_weights).take(4) {
            *weight = (*weight).max(base / 2);
        }
        let plan = Plan {
            vms,
            suppression: chance.permille(700),
            acts,
            world,
            hostile: usize::from(vms > 1 && chance.permille(300)),
            kills_permille: [0, 5, 50][chance.below(3) as usize],
        };
        let clock = Clock::default();
        clock.advance_to(Tick(1_000_000_000));
        let complaints = Complaints::default();
        let spindle_seed = chance.any();
        let poll_ns = crate::limits::POLL_NS[chance.below(2) as usize];
        let configs = (1..=vms as u64)
            .map(|vm| config(vm, vm as usize > vms - plan.hostile, &mut chance))
            .collect();
        let mut town = Town::new(&clock, &complaints, chance, plan);
        town.trace.aloud = aloud;
        let town = Rc::new(RefCell::new(town));
        let steps = Rc::new(Steps::default());
        let weak = Rc::downgrade(&town);
        steps.set_world(Box::new(move || {
            if let Some(town) = weak.upgrade() {
                town.borrow_mut().overtake();
            }
        }));
        let spindle = Rc::new(RefCell::new(Spindle::new(&clock, spindle_seed)));
        Self {
            keeper: Keeper::Starting { at: clock.now() },
            clock,
            complaints,
            town,
            steps,
            spindle,
            hub_words: SimWords::new(HUB_WORDS),
            configs,
            operator: Operator::default(),
            core: None,
            haunted: false,
            life: 0,
            fault: Rc::new(Cell::new(fault)),
            frozen: Vec::new(),
            poll_ns,
            deaths: 0,
            upgrades: 0,
            undead: 0,
        }
    }

    /// One step.
    pub fn step(&mut self) {
        let (next, nanoseconds) = {
            let mut town = self.town.borrow_mut();
            let weights = town.plan.world.clone();
            let next = Next::BASE[town.chance.weighted(&weights)].0;
            (next, town.chance.between(50, 4_000))
        };
        self.clock.advance_to(self.clock.now().after_ns(nanoseconds));
        self.spin();
        self.keep();
        match next {
            Next::Core => self.core_round(),
            Next::Front => {
                let mut town = self.town.borrow_mut();
                if town.front.is_runnable() {
                    town.front_turn();
                }
            }
            Next::Guest => self.town.borrow_mut().guest_turn(),
            Next::Time => self.pass_time(),
            Next::Overtake => {
                let accesses = self.town.borrow_mut().chance.below(400);
                self.steps.overtake_in(Some(accesses));
                self.core_round();
            }
            Next::ArmDeath => {
                let mut town = self.town.borrow_mut();
                let reach = town.chance.between(1, 10);
                let steps = town.chance.below(1 << reach);
                town.note(format!("the core dies in {steps} steps"));
                self.steps.die_in(Some(steps));
            }
            Next::Kill => {
                if self.core.take().is_some() {
                    self.died("killed");
                }
            }
            Next::Upgrade => self.upgrade(),
            Next::HandOver => {
                let mut town = self.town.borrow_mut();
                town.front.hand_over();
                town.note("the front is handed over".into());
            }
            Next::Disk => self.disk(),
            Next::Freeze => self.freeze(),
            Next::Operator => self.operate(),
            Next::Rest => self.rest(),
        }
        self.look();
    }

    /// What workers have done by now; each file that got its name is looked at at once.
    fn spin(&self) {
        let mut spindle = self.spindle.borrow_mut();
        spindle.run();
        self.town.borrow_mut().shadow.look_at(&spindle.disk);
    }

    /// What must hold after every step.
    fn look(&self) {
        let town = self.town.borrow();
        let limit_ns = crate::limits::FENCE_NS_MAX;
        for vm in &town.vms {
            vm.check_patience(limit_ns);
        }
    }

    // ---- core lives

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
    fn keep(&mut self) {
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

    fn core_round(&mut self) {
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

    fn died(&mut self, how: &str) {
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
    fn upgrade(&mut self) {
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

    // ---- time, disk, operators

    /// Lets everybody run until nobody has anything to do, then lets time pass to the next event.
    fn pass_time(&mut self) {
        for _ in 0..40 {
            if !self.run_all() {
                break;
            }
        }
        let most = {
            let mut town = self.town.borrow_mut();
            let reach = town.chance.between(10, 26);
            self.clock.now().after_ns(town.chance.below(1 << reach))
        };
        let next = self.next_due().unwrap_or(most).min(most);
        self.clock.advance_to(next);
        self.spin();
        self.keep();
        self.town.borrow_mut().note("time passes".into());
    }

    /// A turn for the core and the front, if they have something to do.
    fn run_all(&mut self) -> bool {
        let mut worked = false;
        if self.core.as_ref().is_some_and(Core::is_runnable) {
            self.core_round();
            worked = true;
        }
        let mut town = self.town.borrow_mut();
        if town.front.is_runnable() {
            town.front_turn();
            worked = true;
        }
        worked
    }

    fn next_due(&self) -> Option<Tick> {
        let keeper = match self.keeper {
            Keeper::Serving => None,
            Keeper::Dead { seen: at } | Keeper::Starting { at } => Some(at),
        };
        [
            keeper,
            self.core.as_ref().and_then(|core| core.due),
            self.town.borrow().front.due(),
            self.spindle.borrow().next_due(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn disk(&mut self) {
        let mut town = self.town.borrow_mut();
        let mood = Mood {
            hangs: town.chance.permille(150),
            slow_ns: 1 << town.chance.between(8, 28),
            errors_permille: [0, 0, 0, 20, 200][town.chance.below(5) as usize],
        };
        self.spindle.borrow_mut().mood = mood;
        town.note(format!("{mood:?}"));
    }

    fn freeze(&mut self) {
        let mut town = self.town.borrow_mut();
        let town = &mut *town;
        if let Some(session) = self.frozen.pop() {
            town.front.command(session, Input::Freeze(false));
            return town.note(format!("session {session} is thawed"));
        }
        let sessions: Vec<u64> = town.vms.iter().filter_map(|vm| vm.session).collect();
        if let Some(session) = town.chance.pick(&sessions).copied() {
            town.front.command(session, Input::Freeze(true));
            self.frozen.push(session);
            town.note(format!("session {session} is frozen"));
        }
    }

    // ---- the end

    /// Heals everything and lets all work come to its end; then the books must balance.
    pub fn run_dry(&mut self) {
        self.steps.die_in(None);
        self.steps.overtake_in(None);
        self.spindle.borrow_mut().mood = Mood {
            hangs: false,
            slow_ns: 1000,
            errors_permille: 0,
        };
        {
            let mut town = self.town.borrow_mut();
            let town = &mut *town;
            for session in std::mem::take(&mut self.frozen) {
                town.front.command(session, Input::Freeze(false));
            }
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
        for _ in 0..20_000 {
            if self.complaints.first().is_some() {
                return;
            }
            self.clock.advance_to(self.clock.now().after_ns(1_000));
            self.spin();
            self.keep();
            let mut worked = self.run_all();
            worked |= self.wind_down();
            worked |= self.operator_winds_down();
            worked |= self.town.borrow().front.is_runnable();
            self.look();
            idle = if worked { 0 } else { idle + 1 };
            // A guest that has just learned something acts on it in its next turn.
            if idle < IDLE_TURNS {
                continue;
            }
            match self.next_due().filter(|due| *due <= horizon) {
                Some(due) => self.clock.advance_to(due),
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
                    .filter(|kind| !matches!(kind, Kind::Receive))
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
            && let Some(core) = &self.core
        {
            for (number, session) in &core.sessions.map {
                eprintln!("session {number}: {session:#?}");
            }
        }
        match &self.core {
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

fn config(vm: u64, hostile: bool, chance: &mut Chance) -> VmConfig {
    let grant = |share: &str| ShareGrant {
        share: share.to_owned(),
        access: Access::ReadWrite,
    };
    let mut shares = vec![grant(&format!("own{vm}"))];
    if !hostile {
        shares.push(grant("common"));
    }
    let mut limits = VmLimits::default();
    if chance.permille(200) {
        limits.mailbox_bytes_max = chance.between(2_000, 20_000);
    }
    if chance.permille(200) {
        limits.receives_max = 4;
    }
    if chance.permille(150) {
        limits.submissions_per_second_max = 20_000;
    }
    VmConfig {
        vm,
        name: format!("vm{vm}"),
        shares,
        reach: Vec::new(),
        send_to_all: !hostile,
        limits,
        transient: false,
    }
}
