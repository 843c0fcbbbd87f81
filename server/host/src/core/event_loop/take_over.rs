//! Another program becomes the core: all sessions first, then the state.
//!
//! In: what came in while this core was on trial. Out: READY, and only then the first word of state. Until then nothing runs that writes the
//! hub's memory or guest memory, or that begins an effect: whatever happens to this program before, the one before it goes on from
//! where it stopped. (An in-flight table knows the core life that has it; and what was reset meanwhile is voided in it, by whichever core.)

use super::*;

impl EventLoop {
    /// Takes everything over, and says so.
    pub(super) fn take_over(&mut self, held: Held) -> anyhow::Result<()> {
        for packet in held.keeper {
            self.handle_keeper(packet)?;
        }
        self.held = held.front.into();
        // All that is to come before `Adopted` was held: this ends.
        while !self.adopted && !self.stopping {
            self.wake.beat();
            self.take_in_everything()?;
            self.serve_fences();
        }
        let snapshot = self.saving.pack(&mut self.hub);
        fault::at("ready");
        self.ready = true;
        self.tell_keeper(&CoreToKeeper::Ready {
            life: self.life,
            channel: self.channel,
        })?;
        self.saving.begin(&self.hub, snapshot)?;
        self.tell_saving();
        self.take_operators();
        Ok(())
    }

    /// Those that came meanwhile: the guest's processor waits for them.
    fn serve_fences(&mut self) {
        let owed = |(number, session): (u64, &mut Session)| {
            (session.ended || session.front.fence() != session.core.fenced()).then_some(number)
        };
        self.watched.extend(self.sessions.iter_mut().filter_map(owed));
        self.run_fences(now());
        self.wake.tell();
    }
}
