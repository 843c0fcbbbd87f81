//! Freezing a VM: what the room of [`freezes`](crate::core::freezes) says, carried to the front and to the operator in his own words.
//!
//! In: the operators' requests by a VM's name, the front's word. Out: wishes for the front, answers, a line in the log.

use super::*;
use crate::control::protocol::{Done, ErrorCode, Failure, Frozen};
use crate::core::freezes::{Answer, Output};

impl EventLoop {
    pub(super) fn freeze(&mut self, client: u64, id: u64, name: &str, timeout_ns: Option<u64>, now: Tick) {
        let Some(vm) = self.vm_named(client, id, name) else {
            return;
        };
        let until = timeout_ns.map_or(Tick::NEVER, |timeout_ns| now.after_ns(timeout_ns));
        self.freezes.freeze(now, client, id, vm, until);
        self.carry_freezes();
    }

    pub(super) fn thaw(&mut self, client: u64, id: u64, name: &str) {
        let Some(vm) = self.vm_named(client, id, name) else {
            return;
        };
        self.freezes.thaw(client, id, vm);
        self.carry_freezes();
    }

    /// The front says how it stands.
    pub(super) fn frozen(&mut self, vm: u64, until: Option<Tick>, request: u64, kept: bool) {
        self.freezes.handle_level(now(), vm, until, request, kept);
        self.carry_freezes();
    }

    /// Answers those whose VM is quiet, and those who have waited too long.
    pub(super) fn run_freezes(&mut self, now: Tick) {
        let sessions = &self.sessions;
        self.freezes.run(now, |vm, told| quiet(sessions, vm, told));
        self.carry_freezes();
    }

    /// The operator has gone before the answer.
    pub(super) fn end_freezes(&mut self, client: u64) {
        self.freezes.client_gone(client);
        self.carry_freezes();
    }

    /// Levels of VMs that have ended are of no use.
    pub(super) fn thaw_unknown(&mut self) {
        let vms = &self.vms;
        self.freezes.thaw_unknown(|vm| vms.contains_key(&vm));
        self.carry_freezes();
    }

    fn carry_freezes(&mut self) {
        while let Some(output) = self.freezes.poll_output() {
            match output {
                Output::Wish {
                    vm,
                    until,
                    request,
                    kept,
                } => {
                    let wish = CoreToFront::Freeze {
                        vm,
                        until,
                        request,
                        kept: Some(kept),
                    };
                    self.to_front.push_back((wish, Vec::new()));
                }
                Output::Lifted { vm, over } => {
                    let text = match over {
                        true => "thawed: the time that it was to be frozen is over",
                        false => {
                            "thawed: the core died before it answered the freeze, and nobody asked again"
                        }
                    };
                    self.log(Some(vm), text.into());
                }
                Output::Answer {
                    client,
                    id,
                    vm,
                    answer,
                } => self.answer_freeze(client, id, vm, answer),
            }
        }
    }

    fn answer_freeze(&mut self, client: u64, id: u64, vm: u64, answer: Answer) {
        let name = || self.vms.get(&vm).map_or("", |vm| vm.name.as_str());
        let failure = match answer {
            Answer::Quiet { devices } => return self.operators.answer(client, id, &Frozen { devices }),
            Answer::Thawed => return self.operators.answer(client, id, &Done {}),
            Answer::NotFrozen => Failure::new(
                ErrorCode::Stale,
                format!("VM {:?} is not frozen, or not any more", name()),
                "what was saved meanwhile may be torn: freeze it with a longer --timeout, or none, and save it again",
            ),
            Answer::Busy(busy) => Failure::new(
                ErrorCode::Busy,
                format!("VM {:?} does not become quiet: {busy}", name()),
                "the freeze is taken back unless it was frozen before, or others wait for it; try again",
            ),
        };
        self.operators.refuse(client, id, failure);
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
}

/// How many devices of a VM are quiet, or what is busy; `told`: the front has put the level into all its pages.
fn quiet(sessions: &Sessions, vm: u64, told: bool) -> Result<u64, String> {
    if !told {
        let mut text = "QEMU has not answered a message that reads or writes its memory".to_owned();
        let given_up: u64 = sessions
            .of_vm(vm)
            .map(|(_, session)| session.memory.counters().messages_given_up)
            .sum();
        if given_up > 0 {
            text += &format!(
                " ({given_up} were given up after {} s each: if its process is stopped, let it go on; a VM that never answers is quiet when it has ended)",
                MESSAGE_WAIT_NS / 1_000_000_000
            );
        }
        return Err(text);
    }
    let busy = sessions.of_vm(vm).find_map(|(number, session)| {
        let busy = session.memory.busy_with()?;
        Some(format!("device {number}: {busy}"))
    });
    busy.map_or_else(|| Ok(sessions.of_vm(vm).count() as u64), Err)
}
