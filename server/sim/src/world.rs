//! GARDEN, the world: core lives, the keeper's part, time, faults; one step after the other, then everything heals and runs dry.
//!
//! In: chance. Out: complaints. The order of the keeper's words is the real one: a core is dead for guest memory before the next begins.

mod end;
mod freezer;
mod lives;
mod operators;
mod rest;

use crate::chance::Chance;
use crate::clockwork::{Clock, Death, SimWords, Steps};
use crate::core::{Core, Outside};
use crate::faults::Fault;
use crate::front::Successor;
use crate::guest::{Act, CHAT, Kind, State};
use crate::limits::{DEATH_SEEN_NS_MAX, HAND_OVER_NS_MAX, HUB_WORDS, PLUGGED, RAM_BYTES};
use crate::ram::Complaints;
use crate::town::{Plan, Town};
use crate::wires::{Mood, Spindle, Wires};
use freezer::Freezer;
pub use freezer::Glass;
pub use lives::text_of;
use operators::Operator;
pub use operators::Replies;
use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::rc::Rc;
use vmgmt_core::policy::{Access, ShareGrant, VmConfig, VmLimits};
use vmgmt_device::Tick;
use vmgmt_device::rings::STATE_WORDS;

/// What may happen next; the weights are the plan's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Next {
    Core,
    Front,
    Guest,
    Time,
    Overtake,
    Cut,
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
    pub const BASE: [(Self, u32); 14] = [
        (Self::Core, 200),
        (Self::Front, 150),
        (Self::Guest, 500),
        (Self::Time, 60),
        (Self::Overtake, 60),
        (Self::Cut, 150),
        (Self::ArmDeath, 8),
        (Self::Kill, 2),
        (Self::Upgrade, 2),
        (Self::HandOver, 4),
        (Self::Disk, 4),
        (Self::Freeze, 6),
        (Self::Operator, 10),
        (Self::Rest, 12),
    ];
}

/// How often guests offer each other files: not at all, in half of the runs.
const OFFERS_PERMILLE: [u32; 4] = [0, 0, 60, 200];
/// That is drawn from a stream of its own: a seed without them tells the story that it told before there were any.
const OFFERS: u64 = 0x4f66_6665_7273;

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

/// What rounds that a core had in the middle of the front's work came to.
#[derive(Debug, Default)]
struct Cut {
    rounds: Cell<u64>,
    /// It died in one of them.
    died: Cell<bool>,
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
    /// Shared with what the front does: the core may have a round in the middle of it.
    core: Rc<RefCell<Option<Core>>>,
    cut: Rc<Cut>,
    /// It was told of undead ones, and not yet of their end.
    haunted: bool,
    life: u64,
    keeper: Keeper,
    fault: Rc<Cell<Fault>>,
    freezer: Freezer,
    glass: Rc<Glass>,
    poll_ns: u64,
    pub deaths: u64,
    pub upgrades: u64,
    pub undead: u64,
}

impl Drop for World {
    fn drop(&mut self) {
        self.steps.disconnect();
    }
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
            offers_permille: OFFERS_PERMILLE[Chance::new(seed ^ OFFERS).below(4) as usize],
        };
        let clock = Clock::default();
        clock.advance_to(Tick(1_000_000_000));
        let complaints = Complaints::default();
        let spindle_seed = chance.any();
        let poll_ns = crate::limits::POLL_NS[chance.below(2) as usize];
        let cut_every = chance.permille(200).then(|| chance.below(8));
        let configs = (1..=vms as u64)
            .map(|vm| config(vm, vm as usize > vms - plan.hostile, &mut chance))
            .collect();
        let steps = Rc::new(Steps::new(&clock));
        steps.cut_every(cut_every);
        let fault = Rc::new(Cell::new(fault));
        let mut town = Town::new(&clock, &complaints, (&steps, &fault), chance, plan);
        town.trace.aloud = aloud;
        let rams = town.vms.iter().map(|vm| (vm.number, Rc::clone(&vm.ram)));
        let glass = Rc::new(Glass::new(&clock, rams.collect()));
        let town = Rc::new(RefCell::new(town));
        let weak = Rc::downgrade(&town);
        steps.set_world(Box::new(move || {
            if let Some(town) = weak.upgrade() {
                town.borrow_mut().overtake();
            }
        }));
        let spindle = Rc::new(RefCell::new(Spindle::new(&clock, &complaints, spindle_seed)));
        let operator = Operator::default();
        let (core, cut) = (Rc::default(), Rc::default());
        steps.set_core(lives::rounds_within(&core, &cut, &steps, &complaints, &operator));
        Self {
            keeper: Keeper::Starting { at: clock.now() },
            clock,
            complaints,
            town,
            steps,
            spindle,
            hub_words: SimWords::new(HUB_WORDS),
            configs,
            operator,
            core,
            cut,
            haunted: false,
            life: 0,
            fault,
            freezer: Freezer::default(),
            glass,
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
        self.advance(self.clock.now().after_ns(nanoseconds));
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
                let accesses = self.draw(400, 60);
                self.steps.overtake_in(accesses);
                self.core_round();
            }
            Next::Cut => {
                let reach = self.town.borrow_mut().chance.between(3, 9);
                let accesses = self.draw(1 << reach, 60);
                self.steps.cut_in(accesses);
                let mut town = self.town.borrow_mut();
                town.guest_turn();
                town.front_turn();
            }
            Next::ArmDeath => {
                let mut town = self.town.borrow_mut();
                let reach = town.chance.between(1, 10);
                let steps = town.chance.below(1 << reach);
                town.note(format!("the core dies in {steps} steps"));
                self.steps.die_in(Some(steps));
            }
            Next::Kill => {
                let killed = self.core.take().is_some();
                if killed {
                    self.died("killed");
                }
            }
            Next::Upgrade => self.upgrade(),
            Next::HandOver => {
                let mut town = self.town.borrow_mut();
                let successor = if town.chance.permille(300) {
                    Successor::Fails
                } else {
                    Successor::Serves
                };
                let reach = [1_000, HAND_OVER_NS_MAX][town.chance.below(2) as usize];
                let until = self.clock.now().after_ns(town.chance.below(reach));
                if town.front.hand_over(until, successor) {
                    town.note(format!(
                        "the front stops until {until:?}; the next one: {successor:?}"
                    ));
                }
            }
            Next::Disk => self.disk(),
            Next::Freeze => self.freeze(),
            Next::Operator => self.operate(),
            Next::Rest => self.rest(),
        }
        self.settle_cuts();
        self.look_at_freezes();
        self.look();
    }

    /// After how many accesses somebody else has a turn, and after how many more again, a few times.
    fn draw(&self, first: u64, then: u64) -> Vec<u64> {
        let mut town = self.town.borrow_mut();
        let mut accesses = vec![town.chance.below(first)];
        for _ in 0..town.chance.below(4) {
            accesses.push(town.chance.below(then));
        }
        accesses
    }

    /// Time goes on.
    fn advance(&mut self, tick: Tick) {
        self.clock.advance_to(tick);
        self.look_at_freezes();
    }

    /// There is a core, and it was told of all that there is: then operators are listened to.
    fn has_adopted(&self) -> bool {
        self.core.borrow().as_ref().is_some_and(|core| core.adopted)
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
        if self.core.borrow().as_ref().is_some_and(Core::sleeps_on_a_touch) {
            self.complaints
                .add("the core sleeps, and was not woken when the front touched something".into());
        }
        // (Who dies between its kicks and the front's eventfd is seen dead: then the front looks.)
        if self.core.borrow().is_some() && town.front.sleeps_on_a_kick() {
            self.complaints
                .add("the front sleeps, and was not woken when the core kicked it".into());
        }
    }

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
        self.advance(next);
        self.spin();
        self.keep();
        self.town.borrow_mut().note("time passes".into());
    }

    /// A turn for the core and the front, if they have something to do.
    fn run_all(&mut self) -> bool {
        let mut worked = false;
        if self.core_is_runnable() {
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

    fn core_is_runnable(&self) -> bool {
        self.core.borrow().as_ref().is_some_and(Core::is_runnable)
    }

    fn next_due(&self) -> Option<Tick> {
        let keeper = match self.keeper {
            Keeper::Serving => None,
            Keeper::Dead { seen: at } | Keeper::Starting { at } => Some(at),
        };
        [
            keeper,
            self.core.borrow().as_ref().and_then(|core| core.due),
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
