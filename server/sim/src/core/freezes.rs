//! GARDEN, freezes: as `host/core/event_loop/freeze.rs`, without operators' protocol: what operators wish about the quiet of VMs, and when they are answered.
//!
//! In: wishes, the front's word that a level is in all pages, what of a VM is busy, time. Out: wishes for the front, answers. Must never know: a
//! session, an operator's protocol. The level itself is the front's: it outlives this core life.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use vmgmt_device::Tick;

/// How long a VM may take to become quiet. Transfers let go of its memory within 100 ms; what can take longer is QEMU's answer to a message.
pub const QUIET_NS_MAX: u64 = 6_000_000_000;

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Output {
    /// For the front: freeze the VM until then, or let it go.
    Wish {
        vm: u64,
        until: Option<Tick>,
        request: u64,
        kept: bool,
    },
    /// To the operator.
    Answer {
        client: u64,
        id: u64,
        vm: u64,
        answer: Answer,
    },
}

/// What an operator is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// No byte of its memory is read or written any more.
    Quiet,
    Thawed,
    /// It is not frozen, or not any more.
    NotFrozen,
    /// It does not become quiet.
    Busy(String),
}

/// What the operators wait for, and the levels as the front told them.
#[derive(Debug, Default)]
pub struct Freezes {
    levels: BTreeMap<u64, Tick>,
    /// Those that somebody counts on: who was told, of this life or an earlier one.
    kept: BTreeSet<u64>,
    asked: BTreeMap<u64, Asked>,
    requests: u64,
    outputs: VecDeque<Output>,
}

#[derive(Debug)]
struct Asked {
    client: u64,
    id: u64,
    vm: u64,
    wish: Wish,
}

#[derive(Debug)]
enum Wish {
    Freeze {
        /// The front has put it into all pages.
        told: bool,
        give_up: Tick,
    },
    /// It is quiet: said when the front keeps it.
    Keep,
    Thaw,
    /// A freeze that failed: said when the front has taken it back, so that what the operator sees next agrees with it.
    TakeBack(String),
}

impl Freezes {
    /// When [`Freezes::run`] is to be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Tick> {
        let times = self.asked.values().filter_map(|asked| match asked.wish {
            Wish::Freeze { give_up, .. } => Some(give_up),
            Wish::Keep | Wish::Thaw | Wish::TakeBack(_) => None,
        });
        times.min()
    }

    /// What is to be done next.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.outputs.pop_front()
    }

    /// An operator wants a VM quiet; `until`: [`Tick::NEVER`] or an end that comes by itself.
    pub fn freeze(&mut self, now: Tick, client: u64, id: u64, vm: u64, until: Tick) {
        let wish = Wish::Freeze {
            told: false,
            give_up: now.after_ns(QUIET_NS_MAX),
        };
        self.ask(Asked { client, id, vm, wish }, Some(until), false);
    }

    /// An operator lets it go on.
    pub fn thaw(&mut self, client: u64, id: u64, vm: u64) {
        let wish = Wish::Thaw;
        self.ask(Asked { client, id, vm, wish }, None, false);
    }

    /// The front says how a VM stands; `request`: which wish that answers, 0: none.
    pub fn handle_level(&mut self, vm: u64, until: Option<Tick>, request: u64, kept: bool) {
        let before = match until {
            Some(until) => self.levels.insert(vm, until),
            None => self.levels.remove(&vm),
        };
        match until {
            None => drop(self.kept.remove(&vm)),
            Some(_) if request == 0 && kept => drop(self.kept.insert(vm)),
            Some(_) => {}
        }
        if let Some(Wish::Freeze { told, .. }) = self.asked.get_mut(&request).map(|asked| &mut asked.wish) {
            *told = true;
            return;
        }
        let Some(asked) = self.asked.remove(&request) else {
            return;
        };
        let answer = match &asked.wish {
            Wish::TakeBack(busy) => Answer::Busy(busy.clone()),
            Wish::Keep if until.is_some() => {
                self.kept.insert(vm);
                Answer::Quiet
            }
            Wish::Thaw if before.is_some() => Answer::Thawed,
            _ => Answer::NotFrozen,
        };
        self.answer(&asked, answer);
    }

    /// Answers those whose VM is quiet, and those who have waited too long. `busy_with`: what of a VM is busy (its second argument: the front
    /// has put the level into all its pages).
    pub fn run(&mut self, now: Tick, busy_with: impl Fn(u64, bool) -> Option<String>) {
        if self.asked.is_empty() {
            return;
        }
        let requests: Vec<u64> = self.asked.keys().copied().collect();
        for request in requests {
            let Some(asked) = self.asked.get(&request) else {
                continue;
            };
            let Wish::Freeze { told, give_up } = asked.wish else {
                continue;
            };
            let vm = asked.vm;
            let verdict = match busy_with(vm, told) {
                None => None,
                Some(_) if told && !self.levels.contains_key(&vm) => Some("it was thawed meanwhile".into()),
                Some(busy) if now >= give_up => Some(busy),
                Some(_) => continue,
            };
            let Some(asked) = self.asked.remove(&request) else {
                continue;
            };
            match verdict {
                None => {
                    let until = self.levels.get(&vm).copied();
                    let wish = Wish::Keep;
                    self.ask(Asked { wish, ..asked }, until, true);
                }
                Some(busy) if self.is_wanted(vm) => self.answer(&asked, Answer::Busy(busy)),
                Some(busy) => {
                    let wish = Wish::TakeBack(busy);
                    self.ask(Asked { wish, ..asked }, None, false);
                }
            }
        }
    }

    /// The operator has gone before the answer: a freeze that nobody knows of is taken back.
    pub fn client_gone(&mut self, client: u64) {
        let gone = self.asked.extract_if(.., |_, asked| asked.client == client);
        let gone: Vec<Asked> = gone.map(|(_, asked)| asked).collect();
        for asked in gone {
            if matches!(asked.wish, Wish::Freeze { .. } | Wish::Keep) && !self.is_wanted(asked.vm) {
                self.wish(asked.vm, None, false);
            }
        }
    }

    /// Somebody else counts on a VM's freeze, or waits for it: who fails leaves it as it is.
    fn is_wanted(&self, vm: u64) -> bool {
        let waits = |asked: &Asked| asked.vm == vm && matches!(asked.wish, Wish::Freeze { .. } | Wish::Keep);
        self.kept.contains(&vm) || self.asked.values().any(waits)
    }

    fn ask(&mut self, asked: Asked, until: Option<Tick>, kept: bool) {
        let request = self.wish(asked.vm, until, kept);
        self.asked.insert(request, asked);
    }

    fn wish(&mut self, vm: u64, until: Option<Tick>, kept: bool) -> u64 {
        self.requests += 1;
        let request = self.requests;
        self.outputs.push_back(Output::Wish {
            vm,
            until,
            request,
            kept,
        });
        request
    }

    fn answer(&mut self, asked: &Asked, answer: Answer) {
        self.outputs.push_back(Output::Answer {
            client: asked.client,
            id: asked.id,
            vm: asked.vm,
            answer,
        });
    }
}
