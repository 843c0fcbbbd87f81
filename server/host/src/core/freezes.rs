//! CORE, freezes: what operators wish about the quiet of VMs (no byte of a frozen one's memory is read or written by this daemon), and when they are
//! answered.
//!
//! In: wishes, the front's word that a level is in all pages, what of a VM is busy, time. Out: wishes for the front, answers. Must never know: a
//! session, the operators' protocol. The level itself is the front's: it outlives this core life.
//!
//! A freeze has two steps, so that no death of ours lets a VM go of which somebody was told that it is quiet: the front freezes it, and once it is
//! quiet is asked to *keep* that; only then the operator is answered. What is not kept ends with the core that asked.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use vmgmt_device::Tick;

/// How long a VM may take to become quiet. Transfers let go of its memory within 100 ms; what can take longer is QEMU's answer to a message.
const QUIET_NS_MAX: u64 = 6_000_000_000;

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
    /// The front let a VM go by itself; `over`: because its time was over, not because nobody was told of the freeze before a core died.
    Lifted { vm: u64, over: bool },
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
    /// No byte of its memory is read or written any more, by this many devices.
    Quiet {
        devices: u64,
    },
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
    /// So many devices are quiet: said when the front keeps it, so that no death of ours lets the VM go afterwards.
    Keep {
        devices: u64,
    },
    Thaw,
    /// A freeze that failed: said when the front has taken it back, so that what the operator sees next agrees with it.
    TakeBack(String),
}

impl Freezes {
    /// Frozen VMs, and until when, as the front told it.
    #[must_use]
    pub const fn levels(&self) -> &BTreeMap<u64, Tick> {
        &self.levels
    }

    /// When [`Freezes::run`] is to be called at the latest.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Tick> {
        let times = self.asked.values().filter_map(|asked| match asked.wish {
            Wish::Freeze { give_up, .. } => Some(give_up),
            Wish::Keep { .. } | Wish::Thaw | Wish::TakeBack(_) => None,
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
    pub fn handle_level(&mut self, now: Tick, vm: u64, until: Option<Tick>, request: u64, kept: bool) {
        let before = match until {
            Some(until) => self.levels.insert(vm, until),
            None => self.levels.remove(&vm),
        };
        match until {
            None => drop(self.kept.remove(&vm)),
            // As an earlier life left it.
            Some(_) if request == 0 && kept => drop(self.kept.insert(vm)),
            Some(_) => {}
        }
        if request == 0 && until.is_none() {
            let over = before.is_some_and(|until| until <= now);
            self.outputs.push_back(Output::Lifted { vm, over });
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
            Wish::Keep { devices } if until.is_some() => {
                self.kept.insert(vm);
                Answer::Quiet { devices: *devices }
            }
            Wish::Thaw if before.is_some() => Answer::Thawed,
            _ => Answer::NotFrozen,
        };
        self.answer(&asked, answer);
    }

    /// Answers those whose VM is quiet, and those who have waited too long. `look`: how many devices of a VM are quiet, or what is busy (its second
    /// argument: the front has put the level into all its pages; before that nothing is quiet).
    pub fn run(&mut self, now: Tick, look: impl Fn(u64, bool) -> Result<u64, String>) {
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
            let verdict = match look(vm, told) {
                Ok(devices) => Ok(devices),
                Err(_) if told && !self.levels.contains_key(&vm) => Err("it was thawed meanwhile".into()),
                Err(busy) if now >= give_up => Err(busy),
                Err(_) => continue,
            };
            let Some(asked) = self.asked.remove(&request) else {
                continue;
            };
            match verdict {
                Ok(devices) => {
                    let until = self.levels.get(&vm).copied();
                    let wish = Wish::Keep { devices };
                    self.ask(Asked { wish, ..asked }, until, true);
                }
                Err(busy) if self.is_wanted(vm) => self.answer(&asked, Answer::Busy(busy)),
                Err(busy) => {
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
            if matches!(asked.wish, Wish::Freeze { .. } | Wish::Keep { .. }) && !self.is_wanted(asked.vm) {
                self.wish(asked.vm, None, false);
            }
        }
    }

    /// Levels of VMs that have ended are of no use.
    pub fn thaw_unknown(&mut self, is_known: impl Fn(u64) -> bool) {
        let unknown = self.levels.keys().copied().filter(|vm| !is_known(*vm));
        for vm in unknown.collect::<Vec<_>>() {
            self.wish(vm, None, false);
        }
    }

    /// Somebody else counts on a VM's freeze, or waits for it: who fails leaves it as it is.
    fn is_wanted(&self, vm: u64) -> bool {
        let waits =
            |asked: &Asked| asked.vm == vm && matches!(asked.wish, Wish::Freeze { .. } | Wish::Keep { .. });
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

#[cfg(test)]
mod tests {
    use super::*;

    const VM: u64 = 7;
    const QUIET: fn(u64, bool) -> Result<u64, String> = |_, told| told.then_some(2).ok_or_else(String::new);
    const BUSY: fn(u64, bool) -> Result<u64, String> = |_, _| Err("a write".into());

    fn outputs(freezes: &mut Freezes) -> Vec<Output> {
        std::iter::from_fn(|| freezes.poll_output()).collect()
    }

    const fn wish(until: Option<Tick>, request: u64, kept: bool) -> Output {
        Output::Wish {
            vm: VM,
            until,
            request,
            kept,
        }
    }

    const fn answer(client: u64, answer: Answer) -> Output {
        Output::Answer {
            client,
            id: client * 10,
            vm: VM,
            answer,
        }
    }

    /// One that client 1 is told of, with requests 1 and 2.
    fn frozen() -> Freezes {
        let mut freezes = Freezes::default();
        freezes.freeze(Tick(0), 1, 10, VM, Tick::NEVER);
        assert_eq!(outputs(&mut freezes), [wish(Some(Tick::NEVER), 1, false)]);
        freezes.run(Tick(1), QUIET);
        assert_eq!(
            outputs(&mut freezes),
            [],
            "the front has not put it into its pages"
        );
        freezes.handle_level(Tick(1), VM, Some(Tick::NEVER), 1, false);
        freezes.run(Tick(2), BUSY);
        assert_eq!(outputs(&mut freezes), [], "there is time");
        freezes.run(Tick(2), QUIET);
        assert_eq!(
            outputs(&mut freezes),
            [wish(Some(Tick::NEVER), 2, true)],
            "not answered before it is kept"
        );
        freezes.handle_level(Tick(3), VM, Some(Tick::NEVER), 2, true);
        assert_eq!(outputs(&mut freezes), [answer(1, Answer::Quiet { devices: 2 })]);
        assert_eq!(freezes.poll_timeout(), None);
        freezes
    }

    #[test]
    fn who_freezes_is_answered_when_it_is_quiet_and_kept() {
        let mut freezes = frozen();
        assert_eq!(freezes.levels(), &BTreeMap::from([(VM, Tick::NEVER)]));
        freezes.thaw(2, 20, VM);
        assert_eq!(outputs(&mut freezes), [wish(None, 3, false)]);
        freezes.handle_level(Tick(4), VM, None, 3, false);
        freezes.thaw(2, 20, VM);
        freezes.handle_level(Tick(5), VM, None, 4, false);
        let said = outputs(&mut freezes);
        assert_eq!(
            said,
            [
                answer(2, Answer::Thawed),
                wish(None, 4, false),
                answer(2, Answer::NotFrozen)
            ]
        );
    }

    #[test]
    fn what_does_not_become_quiet_is_taken_back_and_then_told() {
        let mut freezes = Freezes::default();
        freezes.freeze(Tick(5), 1, 10, VM, Tick(1 << 50));
        freezes.handle_level(Tick(6), VM, Some(Tick(1 << 50)), 1, false);
        let due = Tick(5).after_ns(QUIET_NS_MAX);
        assert_eq!(freezes.poll_timeout(), Some(due));
        freezes.run(due, BUSY);
        assert_eq!(
            outputs(&mut freezes),
            [wish(Some(Tick(1 << 50)), 1, false), wish(None, 2, false)]
        );
        assert_eq!(freezes.poll_timeout(), None);
        freezes.handle_level(due, VM, None, 2, false);
        assert_eq!(outputs(&mut freezes), [answer(1, Answer::Busy("a write".into()))]);
    }

    #[test]
    fn who_fails_takes_nothing_back_that_others_count_on() {
        let mut freezes = frozen();
        freezes.freeze(Tick(0), 2, 20, VM, Tick::NEVER);
        freezes.handle_level(Tick(1), VM, Some(Tick::NEVER), 3, true);
        freezes.run(Tick(0).after_ns(QUIET_NS_MAX), BUSY);
        freezes.freeze(Tick(0), 3, 30, VM, Tick::NEVER);
        freezes.client_gone(3);
        let said = outputs(&mut freezes);
        let expected = [
            wish(Some(Tick::NEVER), 3, false),
            answer(2, Answer::Busy("a write".into())),
            wish(Some(Tick::NEVER), 4, false),
        ];
        assert_eq!(said, expected);
    }

    #[test]
    fn who_leaves_before_the_answer_lets_it_go_unless_another_waits() {
        let mut freezes = Freezes::default();
        freezes.freeze(Tick(0), 1, 10, VM, Tick::NEVER);
        freezes.freeze(Tick(0), 2, 20, VM, Tick::NEVER);
        freezes.client_gone(1);
        assert_eq!(outputs(&mut freezes).len(), 2, "the other waits");
        freezes.client_gone(2);
        assert_eq!(outputs(&mut freezes), [wish(None, 3, false)]);
        // The front's late answers are nobody's.
        for request in 1..=3 {
            freezes.handle_level(Tick(1), VM, (request < 3).then_some(Tick::NEVER), request, false);
        }
        assert_eq!(outputs(&mut freezes), []);
    }

    #[test]
    fn it_was_thawed_meanwhile() {
        let mut freezes = Freezes::default();
        freezes.freeze(Tick(0), 1, 10, VM, Tick(100));
        freezes.handle_level(Tick(1), VM, Some(Tick(100)), 1, false);
        freezes.handle_level(Tick(100), VM, None, 0, false);
        freezes.run(Tick(100), BUSY);
        freezes.handle_level(Tick(101), VM, None, 2, false);
        let expected = [
            wish(Some(Tick(100)), 1, false),
            Output::Lifted { vm: VM, over: true },
            wish(None, 2, false),
            answer(1, Answer::Busy("it was thawed meanwhile".into())),
        ];
        assert_eq!(outputs(&mut freezes), expected);
    }

    #[test]
    fn it_is_let_go_before_it_can_be_kept() {
        let mut freezes = Freezes::default();
        freezes.freeze(Tick(0), 1, 10, VM, Tick(100));
        freezes.handle_level(Tick(1), VM, Some(Tick(100)), 1, false);
        freezes.run(Tick(2), QUIET);
        freezes.handle_level(Tick(100), VM, None, 2, false);
        assert_eq!(outputs(&mut freezes).last(), Some(&answer(1, Answer::NotFrozen)));
    }

    #[test]
    fn what_an_earlier_life_kept_stays_kept_and_ended_vms_are_let_go() {
        let mut freezes = Freezes::default();
        freezes.handle_level(Tick(0), VM, Some(Tick::NEVER), 0, true);
        freezes.freeze(Tick(0), 1, 10, VM, Tick::NEVER);
        freezes.client_gone(1);
        assert_eq!(outputs(&mut freezes), [wish(Some(Tick::NEVER), 1, false)]);
        freezes.thaw_unknown(|vm| vm == VM);
        assert_eq!(outputs(&mut freezes), []);
        freezes.thaw_unknown(|_| false);
        assert_eq!(outputs(&mut freezes), [wish(None, 2, false)]);
        freezes.handle_level(Tick(1), VM, None, 0, false);
        assert_eq!(outputs(&mut freezes), [Output::Lifted { vm: VM, over: false }]);
    }
}
