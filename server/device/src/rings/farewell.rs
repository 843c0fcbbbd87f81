//! The end of a ring, or of all of them at a reset: first the hub hears which completions the guest has got after all, then that nothing
//! else will come.
//!
//! In: rings that end, and what became of the messages that wrote into them. Out: `Published` of each completion that was on its way, then
//! `ChannelClosed` or `Reset`. Until all of that is said nothing new is begun: not to be taken for what has ended.
//!
//! A reset is written down in the in-flight table, and a ring is set up again there, when the hub has heard of the end and journaled what
//! follows (the end of the turn in which the shell polled it). A core that dies sooner leaves the old generation there, or no ring, and the
//! next one tells the end again.

use super::complete::last_word_address;
use super::interface::{Channel, Output, Token};
use super::room::Rings;
use super::table::{FLAG_CONFIRM, FLAG_LOST};
use crate::GuestMemory;
use crate::page::Words;
use std::collections::VecDeque;

#[derive(Debug)]
enum Farewell {
    /// Whether this completion, whose last word was written `at` by message, is there.
    Completion {
        token: Token,
        at: u64,
        lost: bool,
    },
    Then(Output),
}

/// What is still to be said.
#[derive(Debug, Default)]
pub(super) struct Farewells {
    queue: VecDeque<Farewell>,
    /// The generation that a reset began, until it is in the table.
    pub generation: Option<u64>,
    /// The shell has polled the reset.
    reset_polled: bool,
    /// Ends of rings that the hub has not journaled yet, and how many of them the shell has polled.
    closings: usize,
    closings_polled: usize,
}

impl Farewells {
    /// The shell has polled this.
    pub fn note_polled(&mut self, output: &Output) {
        self.reset_polled |= matches!(output, Output::Reset { .. });
        let of_a_ring = |channel: &Channel| matches!(channel, Channel::Ring(_));
        self.closings_polled +=
            usize::from(matches!(output, Output::ChannelClosed { channel, .. } if of_a_ring(channel)));
    }

    /// No ring may be opened yet: its set-up in the table would hide from the next life that the one before it has ended.
    pub const fn holds_openings_up(&self) -> bool {
        self.closings > 0
    }
}

const LAST_WORD_BYTES: u64 = 8;

impl<W: Words> Rings<W> {
    /// Ring `n` ends: what was written by message and is not known to be there is asked about first.
    pub(super) fn take_leave(&mut self, n: usize) {
        let Some(ring) = self.rings.get_mut(n) else { return };
        let first = ring.published;
        // They follow one another (see `complete::settle`).
        for (at, index) in (0..).zip(std::mem::take(&mut ring.unsettled)) {
            if let Some(slot) = ring.slot(index)
                && slot.flags & FLAG_CONFIRM != 0
            {
                self.farewells.queue.push_back(Farewell::Completion {
                    token: self.desk.token(n, index, slot.generation),
                    at: last_word_address(ring, first.wrapping_add(at)),
                    lost: slot.flags & FLAG_LOST != 0,
                });
            }
        }
    }

    /// The end itself, behind what is to be said before.
    pub(super) fn then_say(&mut self, output: Output) {
        self.farewells.closings += usize::from(matches!(output, Output::ChannelClosed { .. }));
        if self.farewells.queue.is_empty() {
            self.desk.outputs.push_back(output);
        } else {
            self.farewells.queue.push_back(Farewell::Then(output));
        }
    }

    /// Says what can be said. False: nothing new may begin yet.
    pub(super) fn say_farewells<M: GuestMemory>(&mut self, memory: &mut M) -> bool {
        let any = !self.farewells.queue.is_empty();
        while let Some(farewell) = self.farewells.queue.pop_front() {
            match farewell {
                Farewell::Completion { token, at, lost } => match memory.arrived(at, LAST_WORD_BYTES) {
                    Ok(there) => self.desk.tell(token, there && !lost, None),
                    Err(_) => {
                        self.farewells.queue.push_front(farewell);
                        self.desk.turn.waiting = true;
                        return false;
                    }
                },
                Farewell::Then(output) => self.desk.outputs.push_back(output),
            }
        }
        if any {
            memory.forget_given_up();
        }
        // The shell is to come again when the end of this turn has written the generation down.
        let waits = self.farewells.generation.is_some();
        self.desk.turn.more |= waits;
        !waits
    }

    /// The session has ended, and no answer comes any more: what was not answered is not there, as far as anybody knows.
    pub(super) fn end<M: GuestMemory>(&mut self, memory: &mut M) {
        (0..self.rings.len()).for_each(|n| self.take_leave(n));
        while let Some(farewell) = self.farewells.queue.pop_front() {
            match farewell {
                Farewell::Completion { token, at, lost } => {
                    let there = memory.arrived(at, LAST_WORD_BYTES) == Ok(true);
                    self.desk.tell(token, there && !lost, None);
                }
                Farewell::Then(output) => self.desk.outputs.push_back(output),
            }
        }
    }

    /// The end of a turn: a reset that the hub has heard of is written down, and where rings have closed others may be opened.
    pub(super) fn note_told(&mut self) {
        let polled = std::mem::take(&mut self.farewells.closings_polled);
        self.farewells.closings = self.farewells.closings.saturating_sub(polled);
        if std::mem::take(&mut self.farewells.reset_polled)
            && let Some(generation) = self.farewells.generation.take()
        {
            self.desk.table.set_port_free();
            self.desk.table.set_generation(generation);
        }
    }
}
