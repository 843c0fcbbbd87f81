//! GARDEN, freezes in the core: what the room says about them, carried to the front and to the operator.
//!
//! In: wishes of an operator, levels of the front. Out: packets, answers. As `host/core/event_loop/freeze.rs`.

use super::*;

impl Core {
    /// The operator wants a VM quiet, or (`None`) lets it go on.
    pub fn freeze(&mut self, client: u64, id: u64, vm: u64, until: Option<Tick>) {
        let now = self.outside.clock.now();
        match until {
            Some(until) => self.freezes.freeze(now, client, id, vm, until),
            None => self.freezes.thaw(client, id, vm),
        }
        self.outside.wires.wake_core.set(true);
    }

    /// Who asked for that has gone.
    pub fn freezer_gone(&mut self, client: u64) {
        self.freezes.client_gone(client);
        self.outside.wires.wake_core.set(true);
    }

    /// Answers those whose VM is quiet, as `host/core/event_loop/freeze.rs`.
    pub(super) fn run_freezes(&mut self, now: Tick) {
        let sessions = &self.sessions;
        self.freezes.run(now, |vm, told| {
            if !told {
                return Some("the front has not put it into its pages".into());
            }
            let mut of_vm = sessions.map.values().filter(|session| session.vm == vm);
            of_vm.find_map(|session| session.memory.busy_with())
        });
        self.carry_freezes();
    }

    pub(super) fn carry_freezes(&mut self) {
        while let Some(output) = self.freezes.poll_output() {
            match output {
                freezes::Output::Wish {
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
                freezes::Output::Answer {
                    client,
                    id,
                    vm,
                    answer,
                } => {
                    self.outside.steps.step();
                    self.outside.glass.answer(client, id, vm, answer);
                }
            }
        }
    }
}
