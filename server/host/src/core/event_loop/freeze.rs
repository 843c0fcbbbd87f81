//! Freezing a VM: no byte of its memory is read or written by this daemon until it is thawed.
//!
//! In: the operators' wishes, the front's word that the level is in all pages. Out: wishes for the front; answers, when every session of
//! the VM is quiet or that takes too long. The level is the front's: it outlives this core life.

use super::*;
use crate::control::protocol::{Done, ErrorCode, Failure, Frozen};
use std::collections::BTreeSet;

/// How long a VM may take to become quiet. Transfers let go of its memory within 100 ms; what can take longer is QEMU's answer to a message.
const QUIET_NS_MAX: u64 = 6_000_000_000;

/// What the operators wait for, and the levels as the front told them.
#[derive(Debug, Default)]
pub(super) struct Freezes {
    levels: BTreeMap<u64, Tick>,
    /// Those that somebody counts on: who was told, of this life or an earlier one.
    kept: BTreeSet<u64>,
    asked: BTreeMap<u64, Asked>,
    requests: u64,
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
    TakeBack(Failure),
}

impl Freezes {
    pub(super) const fn levels(&self) -> &BTreeMap<u64, Tick> {
        &self.levels
    }

    pub(super) fn poll_timeout(&self) -> Option<Tick> {
        let times = self.asked.values().filter_map(|asked| match asked.wish {
            Wish::Freeze { give_up, .. } => Some(give_up),
            Wish::Keep { .. } | Wish::Thaw | Wish::TakeBack(_) => None,
        });
        times.min()
    }
}

impl EventLoop {
    pub(super) fn freeze(&mut self, client: u64, id: u64, name: &str, timeout_ns: Option<u64>, now: Tick) {
        let Some(vm) = self.vm_named(client, id, name) else {
            return;
        };
        let until = timeout_ns.map_or(Tick::NEVER, |timeout_ns| now.after_ns(timeout_ns));
        let wish = Wish::Freeze {
            told: false,
            give_up: now.after_ns(QUIET_NS_MAX),
        };
        let request = self.ask_front(vm, Some(until), false);
        let asked = Asked { client, id, vm, wish };
        self.freezes.asked.insert(request, asked);
    }

    pub(super) fn thaw(&mut self, client: u64, id: u64, name: &str) {
        let Some(vm) = self.vm_named(client, id, name) else {
            return;
        };
        let request = self.ask_front(vm, None, false);
        let asked = Asked {
            client,
            id,
            vm,
            wish: Wish::Thaw,
        };
        self.freezes.asked.insert(request, asked);
    }

    /// The front says how it stands.
    pub(super) fn frozen(&mut self, vm: u64, until: Option<Tick>, request: u64, kept: bool) {
        let before = match until {
            Some(until) => self.freezes.levels.insert(vm, until),
            None => self.freezes.levels.remove(&vm),
        };
        match until {
            None => drop(self.freezes.kept.remove(&vm)),
            // As an earlier life left it.
            Some(_) if request == 0 && kept => drop(self.freezes.kept.insert(vm)),
            Some(_) => {}
        }
        if request == 0 && until.is_none() {
            let text = match before.is_some_and(|until| until > now()) {
                false => "thawed: the time that it was to be frozen is over",
                true => "thawed: the core died before it answered the freeze, and nobody asked again",
            };
            self.log(Some(vm), text.into());
        }
        if let Some(Wish::Freeze { told, .. }) =
            self.freezes.asked.get_mut(&request).map(|asked| &mut asked.wish)
        {
            *told = true;
            return;
        }
        let Some(Asked { client, id, vm, wish }) = self.freezes.asked.remove(&request) else {
            return;
        };
        let failure = match wish {
            Wish::TakeBack(failure) => failure,
            Wish::Keep { devices } if until.is_some() => {
                self.freezes.kept.insert(vm);
                return self.operators.answer(client, id, &Frozen { devices });
            }
            Wish::Thaw if before.is_some() => return self.operators.answer(client, id, &Done {}),
            _ => Failure::new(
                ErrorCode::Stale,
                format!("VM {:?} is not frozen, or not any more", self.name_of(vm)),
                "what was saved meanwhile may be torn: freeze it with a longer --timeout, or none, and save it again",
            ),
        };
        self.operators.refuse(client, id, failure);
    }

    /// Answers those whose VM is quiet, and those who have waited too long.
    pub(super) fn run_freezes(&mut self, now: Tick) {
        if self.freezes.asked.is_empty() {
            return;
        }
        let requests: Vec<u64> = self.freezes.asked.keys().copied().collect();
        for request in requests {
            let Some(asked) = self.freezes.asked.get(&request) else {
                continue;
            };
            let Asked {
                client,
                id,
                vm,
                wish: Wish::Freeze { told, give_up },
            } = *asked
            else {
                continue;
            };
            let busy = self.busy_with(vm, told);
            let verdict = match busy {
                None => Ok(self.sessions.of_vm(vm).count() as u64),
                Some(_) if told && !self.freezes.levels.contains_key(&vm) => {
                    Err("it was thawed meanwhile".into())
                }
                Some(busy) if now >= give_up => Err(busy),
                Some(_) => continue,
            };
            self.freezes.asked.remove(&request);
            match verdict {
                Ok(devices) => {
                    let until = self.freezes.levels.get(&vm).copied();
                    let request = self.ask_front(vm, until, true);
                    let wish = Wish::Keep { devices };
                    self.freezes.asked.insert(request, Asked { client, id, vm, wish });
                }
                Err(busy) => {
                    let failure = Failure::new(
                        ErrorCode::Busy,
                        format!("VM {:?} does not become quiet: {busy}", self.name_of(vm)),
                        "the freeze is taken back unless it was frozen before, or others wait for it; try again",
                    );
                    if self.is_wanted(vm) {
                        self.operators.refuse(client, id, failure);
                        continue;
                    }
                    let request = self.ask_front(vm, None, false);
                    let wish = Wish::TakeBack(failure);
                    self.freezes.asked.insert(request, Asked { client, id, vm, wish });
                }
            }
        }
    }

    /// The operator has gone before the answer: a freeze that nobody knows of is taken back.
    pub(super) fn end_freezes(&mut self, client: u64) {
        let gone = self
            .freezes
            .asked
            .extract_if(.., |_, asked| asked.client == client);
        let gone: Vec<Asked> = gone.map(|(_, asked)| asked).collect();
        for asked in gone {
            let unanswered = matches!(asked.wish, Wish::Freeze { .. } | Wish::Keep { .. });
            if unanswered && !self.is_wanted(asked.vm) {
                self.ask_front(asked.vm, None, false);
            }
        }
    }

    /// Somebody else counts on a VM's freeze, or waits for it: who fails leaves it as it is.
    fn is_wanted(&self, vm: u64) -> bool {
        let waits =
            |asked: &Asked| asked.vm == vm && matches!(asked.wish, Wish::Freeze { .. } | Wish::Keep { .. });
        self.freezes.kept.contains(&vm) || self.freezes.asked.values().any(waits)
    }

    /// Levels of VMs that have ended are of no use.
    pub(super) fn thaw_unknown(&mut self) {
        let unknown = self.freezes.levels.keys().filter(|vm| !self.vms.contains_key(vm));
        for vm in unknown.copied().collect::<Vec<_>>() {
            self.ask_front(vm, None, false);
        }
    }

    /// What of a VM is busy; `told`: the front has put the level into all its pages.
    fn busy_with(&self, vm: u64, told: bool) -> Option<String> {
        if !told {
            let mut text = "QEMU has not answered a message that reads or writes its memory".to_owned();
            let sessions = self.sessions.of_vm(vm);
            let given_up: u64 = sessions
                .map(|(_, session)| session.memory.counters().messages_given_up)
                .sum();
            if given_up > 0 {
                text += &format!(
                    " ({given_up} were given up after {} s each: if its process is stopped, let it go on; a VM that never answers is quiet when it has ended)",
                    MESSAGE_WAIT_NS / 1_000_000_000
                );
            }
            return Some(text);
        }
        self.sessions.of_vm(vm).find_map(|(number, session)| {
            let busy = session.memory.busy_with()?;
            Some(format!("device {number}: {busy}"))
        })
    }

    fn ask_front(&mut self, vm: u64, until: Option<Tick>, kept: bool) -> u64 {
        self.freezes.requests += 1;
        let request = self.freezes.requests;
        self.to_front.push_back((
            CoreToFront::Freeze {
                vm,
                until,
                request,
                kept: Some(kept),
            },
            Vec::new(),
        ));
        request
    }

    fn vm_named(&mut self, client: u64, id: u64, name: &str) -> Option<u64> {
        let vm = self.vms.values().find(|vm| vm.name == name).map(|vm| vm.vm);
        if vm.is_none() {
            let message = format!("no VM {:?}", name.chars().take(64).collect::<String>());
            let failure = Failure::new(ErrorCode::NoSuchName, message, "vmgmtctl vms lists them");
            self.operators.refuse(client, id, failure);
        }
        vm
    }

    fn name_of(&self, vm: u64) -> String {
        self.vms.get(&vm).map_or_else(String::new, |vm| vm.name.clone())
    }
}
