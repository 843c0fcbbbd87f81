//! GARDEN, who freezes VMs: an operator's commands, one connection each, what was asked and what came; until when which VM's memory must be quiet.
//!
//! In: the core's answers. Out: wishes; quiet memory, from the instant of the answer on. Whatever becomes of the core, of the front or of the VM's
//! process: the level stays until it is taken back or its time is over.

use super::World;
use crate::clockwork::Clock;
use crate::core::Core;
use crate::limits::FREEZE_NS_MAX_BITS;
use crate::ram::{Complaints, Ram};
use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use vmgmt_device::Tick;
use vmgmt_host::core::freezes::Answer;

/// Where the answers come, and what they are held against. It breaks when a VM moves behind it.
#[derive(Debug)]
pub struct Glass {
    clock: Clock,
    rams: BTreeMap<u64, Rc<Ram>>,
    /// Until when, by request.
    untils: RefCell<BTreeMap<u64, Tick>>,
    answers: RefCell<VecDeque<(u64, u64, Answer)>>,
}

impl Glass {
    pub fn new(clock: &Clock, rams: BTreeMap<u64, Rc<Ram>>) -> Self {
        Self {
            clock: clock.clone(),
            rams,
            untils: RefCell::default(),
            answers: RefCell::default(),
        }
    }

    /// The core answers.
    pub fn answer(&self, _client: u64, id: u64, vm: u64, answer: Answer) {
        // (Its time may be over before the answer comes.)
        let until = self.untils.borrow().get(&id).copied();
        if matches!(answer, Answer::Quiet { .. })
            && until.is_some_and(|until| until > self.clock.now())
            && let Some(ram) = self.rams.get(&vm)
        {
            ram.frozen.set(true);
        }
        self.answers.borrow_mut().push_back((id, vm, answer));
    }
}

/// How a VM stands, as far as the operator knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Standing {
    /// A freeze was asked for and not answered yet.
    Asked {
        client: u64,
        id: u64,
        until: Tick,
    },
    Frozen {
        until: Tick,
    },
    /// A thaw was asked for; `sure`: it must find the VM frozen.
    Thawing {
        client: u64,
        id: u64,
        sure: bool,
    },
    /// The connection ended before the answer.
    Unknown,
}

/// The operator.
#[derive(Debug, Default)]
pub struct Freezer {
    asked: u64,
    vms: BTreeMap<u64, Standing>,
    /// Freezes that were answered, for the report.
    pub quiets: u64,
}

impl World {
    /// Something that this operator does.
    pub(super) fn freeze(&mut self) {
        if !self.has_adopted() {
            return;
        }
        let (vm, choice, until) = {
            let mut town = self.town.borrow_mut();
            let vms = town.vms.len() as u64;
            let reach = town.chance.between(10, FREEZE_NS_MAX_BITS);
            let ns = town.chance.below(1 << reach);
            let forever = town.chance.permille(600);
            let until = if forever {
                Tick::NEVER
            } else {
                self.clock.now().after_ns(ns)
            };
            (town.chance.between(1, vms), town.chance.below(10), until)
        };
        match self.freezer.vms.get(&vm).copied() {
            None => self.ask_freeze(vm, until),
            Some(Standing::Frozen { .. } | Standing::Unknown) if choice < 7 => self.ask_thaw(vm),
            Some(Standing::Frozen { .. } | Standing::Unknown) => self.ask_freeze(vm, until),
            Some(Standing::Asked { client, .. } | Standing::Thawing { client, .. }) if choice < 3 => {
                if let Some(core) = self.core.borrow_mut().as_mut() {
                    core.freezer_gone(client);
                }
                self.freezer.vms.insert(vm, Standing::Unknown);
                self.note(format!("who froze or thawed VM {vm} leaves"));
            }
            Some(_) => {}
        }
    }

    /// Freezes that were answered.
    pub fn quiets(&self) -> u64 {
        self.freezer.quiets
    }

    fn ask_freeze(&mut self, vm: u64, until: Tick) {
        self.loosen(vm);
        let (client, id) = self.next_command();
        self.glass.untils.borrow_mut().insert(id, until);
        self.freezer.vms.insert(vm, Standing::Asked { client, id, until });
        self.note(format!("VM {vm} is to be frozen until {until:?}"));
        self.tell_core(|core| core.freeze(client, id, vm, Some(until)));
    }

    fn ask_thaw(&mut self, vm: u64) {
        let sure = self.freezer.vms.get(&vm) == Some(&Standing::Frozen { until: Tick::NEVER });
        self.loosen(vm);
        let (client, id) = self.next_command();
        self.freezer
            .vms
            .insert(vm, Standing::Thawing { client, id, sure });
        self.note(format!("VM {vm} is to be thawed"));
        self.tell_core(|core| core.freeze(client, id, vm, None));
    }

    fn tell_core(&self, tell: impl FnOnce(&mut Core)) {
        if let Some(core) = self.core.borrow_mut().as_mut() {
            tell(core);
        }
    }

    fn note(&self, text: String) {
        self.town.borrow_mut().note(text);
    }

    fn next_command(&mut self) -> (u64, u64) {
        self.freezer.asked += 1;
        (self.freezer.asked, self.freezer.asked)
    }

    /// From now on its memory may move.
    fn loosen(&self, vm: u64) {
        if let Some(ram) = self.glass.rams.get(&vm) {
            ram.frozen.set(false);
        }
    }

    /// What the core has answered by now, and freezes whose time is over.
    pub(super) fn look_at_freezes(&mut self) {
        let now = self.clock.now();
        let over = |standing: &Standing| matches!(standing, Standing::Frozen { until } if *until <= now);
        let vms = self.freezer.vms.iter().filter(|(_, standing)| over(standing));
        for vm in vms.map(|(vm, _)| *vm).collect::<Vec<_>>() {
            self.loosen(vm);
            self.freezer.vms.remove(&vm);
        }
        loop {
            let next = self.glass.answers.borrow_mut().pop_front();
            let Some((id, vm, answer)) = next else { break };
            self.answered(id, vm, answer);
        }
    }

    fn answered(&mut self, id: u64, vm: u64, answer: Answer) {
        let standing = self.freezer.vms.get(&vm).copied();
        match (standing, &answer) {
            (Some(Standing::Asked { id: asked, until, .. }), Answer::Quiet { .. }) if asked == id => {
                self.freezer.quiets += 1;
                self.freezer.vms.insert(vm, Standing::Frozen { until });
                self.note(format!("VM {vm} is quiet"));
                // (Its time may be over already.)
                if until <= self.clock.now() {
                    self.loosen(vm);
                    self.freezer.vms.remove(&vm);
                }
            }
            (Some(Standing::Asked { id: asked, .. }), Answer::Busy(busy)) if asked == id => {
                self.freezer.vms.insert(vm, Standing::Unknown);
                self.note(format!("VM {vm} does not become quiet: {busy}"));
            }
            // Its time was over before the front could keep it.
            (Some(Standing::Asked { id: asked, until, .. }), Answer::NotFrozen)
                if asked == id && until <= self.clock.now() =>
            {
                self.freezer.vms.remove(&vm);
                self.note(format!("VM {vm} was to be frozen for too short a time"));
            }
            (Some(Standing::Thawing { id: asked, sure, .. }), answer) if asked == id => {
                if sure && *answer != Answer::Thawed {
                    self.complaints
                        .add(format!("VM {vm} was frozen, and its thaw is answered {answer:?}"));
                }
                self.freezer.vms.remove(&vm);
                self.note(format!("VM {vm}: {answer:?}"));
            }
            // Whoever asked has gone.
            _ => {
                let known = self.freezer.vms.values().any(|standing| {
                    matches!(standing, Standing::Asked { id: asked, .. } | Standing::Thawing { id: asked, .. } if *asked == id)
                });
                if known {
                    self.complaints
                        .add(format!("VM {vm}: {answer:?} does not answer what was asked"));
                }
                if matches!(answer, Answer::Quiet { .. })
                    && !matches!(standing, Some(Standing::Frozen { .. }))
                {
                    self.loosen(vm);
                }
            }
        }
    }

    /// Its connections end with the core.
    pub(super) fn freezer_loses_core(&mut self) {
        self.look_at_freezes();
        for standing in self.freezer.vms.values_mut() {
            if matches!(standing, Standing::Asked { .. } | Standing::Thawing { .. }) {
                *standing = Standing::Unknown;
            }
        }
    }

    /// At the end everything is thawed. True: it did something.
    pub(super) fn freezer_winds_down(&mut self) -> bool {
        if !self.has_adopted() {
            return false;
        }
        let frozen = self
            .freezer
            .vms
            .iter()
            .filter(|(_, standing)| matches!(standing, Standing::Frozen { .. } | Standing::Unknown));
        let frozen: Vec<u64> = frozen.map(|(vm, _)| *vm).collect();
        for vm in &frozen {
            self.ask_thaw(*vm);
        }
        !frozen.is_empty()
    }

    /// What this operator still waits for when everything is idle.
    pub(super) fn freezer_balance(&self, complaints: &Complaints) {
        if !self.freezer.vms.is_empty() {
            complaints.add(format!(
                "everything is idle, and freezes are not settled: {:?}",
                self.freezer.vms
            ));
        }
    }
}
