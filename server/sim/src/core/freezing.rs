//! GARDEN, freezes in the core: what the product's own room says about them, carried to the front and to the operator.
//!
//! In: wishes of an operator, levels of the front. Out: packets, answers. The carrying is as in `host/core/event_loop/freeze.rs`.

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

    /// Answers those whose VM is quiet, and those who have waited too long.
    pub(super) fn run_freezes(&mut self, now: Tick) {
        let sessions = &self.sessions;
        self.freezes.run(now, |vm, told| {
            if !told {
                return Err("the front has not put it into its pages".into());
            }
            let of_vm = || sessions.map.values().filter(|session| session.vm == vm);
            let busy = of_vm().find_map(|session| session.memory.busy_with());
            busy.map_or_else(|| Ok(of_vm().count() as u64), Err)
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
                freezes::Output::Lifted { .. } => {}
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
