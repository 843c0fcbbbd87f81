//! OFFICE: the hub. Takes inputs, finds the room, sees to it that every submission ends exactly once.
//!
//! In: [`Input`]s. Out: [`Output`]s, in order: a `Journal` comes before the answer or effect that depends on it.
//! It never knows what an operation means; the rooms in `modes/` do.

use crate::deadlines::Timer;
use crate::effect::Outcome;
use crate::effects::Continuation;
use crate::interface::{Input, Output};
use crate::ledger::books::ahead;
use crate::modes::chat::Chat;
use crate::modes::delivery;
use crate::modes::file::{self, Files};
use crate::modes::listing;
use crate::modes::namely;
use crate::modes::offers::Transfers;
use crate::modes::puts::withdrawn;
use crate::modes::{Submitted, Uses, Verdict, calc, stats};
use crate::office::{Office, Wait, failed, room};
use crate::refusal::Refusal;
use vmgmt_abi::{Mode, Opcode, Status};
use vmgmt_device::Tick;
use vmgmt_device::rings::{Answer, Fetched, Token};

/// Handles of one core life: 2^40 of them, before those of the next life begin.
const HANDLES_OF_A_LIFE_BITS: u32 = 40;

/// The hub. Sans-IO: the shell moves values in and out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hub {
    pub(crate) office: Office,
    pub(crate) files: Files,
    pub(crate) transfers: Transfers,
    pub(crate) chat: Chat,
}

impl Hub {
    /// An empty hub. `life`: number of this core life, above that of any core before it (below 2^24), so that no handle is ever used again.
    #[must_use]
    pub fn new(life: u64) -> Self {
        let office = Office {
            next_handle: life << HANDLES_OF_A_LIFE_BITS,
            ..Office::default()
        };
        Self {
            office,
            files: Files::default(),
            transfers: Transfers::default(),
            chat: Chat::default(),
        }
    }

    /// Takes an input.
    pub fn handle(&mut self, now: Tick, input: Input) {
        self.office.now = self.office.now.max(now);
        match input {
            Input::Submission(fetched) => self.submission(fetched),
            Input::Published { token, published } => {
                if !published {
                    // It is over, whatever a core before had begun of it.
                    self.office.forgo(token);
                }
                self.published(token, published);
            }
            Input::Outcome { effect, outcome } => {
                if let Some(then) = self.office.effects.finish(effect) {
                    self.outcome(then, outcome);
                }
            }
            Input::Cancel(token) => self.end_early(token, Status::CANCELLED.0),
            Input::Void(token) => self.void(token),
            Input::ChannelClosed { session, channel } => self.channel_closed(session, channel),
            Input::Vm(config) => self.vm(config),
            Input::VmGone { vm } => self.vm_gone(vm),
            Input::SessionOpened { session, vm } => self.session_opened(session, vm),
            Input::SessionClosed { session } => self.session_closed(session),
            Input::SessionReset { session } => self.session_emptied(session),
            Input::Control { client, id, request } => self.control(client, id, request),
            Input::Told { client, id } => self.chat.told(&mut self.office, client, id),
            Input::ControlClosed { client } => self.control_closed(client),
            Input::Adopted => self.adopted(),
            Input::Buried => {
                self.office.effects.bury();
                self.transfers.pump_all(&mut self.office);
            }
            Input::StateRoom(bytes) => self.office.state_room = Some(bytes),
            Input::WallClock { now_ns } => {
                let floor_ns = if self.office.wall.known {
                    0
                } else {
                    self.office.ledger.youngest_stamp_ns()
                };
                self.office.wall.read(self.office.now, now_ns, floor_ns);
            }
        }
        self.settle();
    }

    /// Does what is due.
    pub fn handle_timeout(&mut self, now: Tick) {
        while self.handle_next_timeout(now) {}
    }

    /// Only the first that is due; false: none is.
    pub fn handle_next_timeout(&mut self, now: Tick) -> bool {
        self.office.now = self.office.now.max(now);
        let Some(timer) = self.office.timers.pop_due(self.office.now) else {
            return false;
        };
        match timer {
            Timer::Deadline(token) => self.end_early(token, Status::TIMED_OUT.0),
            Timer::Release { vm } => self.release(vm),
            Timer::Expiry { vm } => delivery::expire(&mut self.office, vm),
            Timer::ControlReceive { .. } | Timer::ControlOffer { .. } | Timer::ControlStream { .. } => {
                self.control_timer(timer);
            }
            Timer::Sweep => self.sweep(),
        }
        self.settle();
        true
    }

    /// For whom the next timeout is: session and VM, as far as it is somebody's (0: nobody's).
    #[must_use]
    pub fn next_timeout_of(&self) -> (u64, u64) {
        match self.office.timers.first() {
            Some(Timer::Deadline(token)) => (token.session, 0),
            Some(Timer::Release { vm } | Timer::Expiry { vm }) => (0, vm),
            _ => (0, 0),
        }
    }

    /// When to call [`Hub::handle_timeout`]; `None`: nothing waits for a time.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Tick> {
        self.office.timers.next()
    }

    /// The next thing to do. To be called until it gives nothing.
    pub fn poll_output(&mut self) -> Option<Output> {
        self.office.outputs.pop_front()
    }

    /// Whether [`Hub::poll_output`] would give something: a shell that sleeps then forgets it.
    #[must_use]
    pub fn has_output(&self) -> bool {
        !self.office.outputs.is_empty()
    }

    /// Effects that the shell has and has not answered.
    pub fn effects_running(&self) -> impl Iterator<Item = crate::effect::EffectId> {
        self.office.effects.running()
    }

    /// The VM in whose name an effect under way is done; 0: the host's own, or no such effect.
    #[must_use]
    pub fn owner_of(&self, effect: crate::effect::EffectId) -> u64 {
        self.office.effects.vm_of(effect).unwrap_or(0)
    }

    /// VMs whose files an earlier core life's workers may still change: what that life may have begun waits for `Input::Buried`.
    #[must_use]
    pub fn haunted(&self) -> Vec<u64> {
        self.office.effects.haunted().collect()
    }

    /// Effects that are under way or wait their turn.
    #[must_use]
    pub fn effects_open(&self) -> usize {
        self.office.effects.len()
    }

    /// Submissions that are open in the hub.
    #[must_use]
    pub fn submissions_open(&self) -> usize {
        self.office.flights.len()
    }

    /// What a turn leaves: messages for those who wait, and queued effects that may run now.
    fn settle(&mut self) {
        self.chat.dispatch_after(&mut self.office);
        while let Some((id, effect)) = self.office.effects.next() {
            self.office.outputs.push_back(Output::Effect { id, effect });
        }
    }

    fn submission(&mut self, fetched: Box<Fetched>) {
        let Some(vm) = self.office.vm_of(fetched.token) else {
            self.office
                .answer(fetched.token, Refusal::NoSession.answer(), Vec::new(), false);
            return;
        };
        if self.office.is_open(fetched.token) {
            // Not a guest's doing. The first one will be answered; answering this would be a second answer.
            self.office.log_refusal(vm, Refusal::TokenTwice);
            return;
        }
        if fetched.again {
            // It was admitted in its first life, and held up as long as it had to be.
            if !self.answer_again(&fetched) {
                self.route(vm, fetched);
            }
            return;
        }
        match self.admit(vm, &fetched) {
            Ok(None) => self.route(vm, fetched),
            Ok(Some(at)) => {
                self.office.park(&fetched, Wait::Rate);
                self.office.timers.arm(at, Timer::Release { vm });
                if let Some(entry) = self.office.vm_mut(vm) {
                    entry.delayed.push_back((at, fetched));
                }
            }
            Err(refusal) => {
                let what = (fetched.opcode, fetched.tag);
                self.office.refuse_at_once(vm, fetched.token, what, refusal);
            }
        }
    }

    /// A submission of an earlier core life: what its answer carried goes back, as the guest has not got it; and if its answer was settled, it
    /// gets that. False: it is to be done.
    fn answer_again(&mut self, fetched: &Fetched) -> bool {
        let token = fetched.token;
        if let Some(settled) = self.office.ledger.kept.answered(token) {
            let (answer, payload) = (settled.answer, settled.payload.clone());
            self.office.answer(token, answer, payload, true);
            return true;
        }
        self.published(token, false);
        false
    }

    /// A handle of an earlier core life is open again (or stale): what waited for that goes on.
    fn go_on_with(&mut self, handle: u64) {
        for fetched in self.files.reopening.remove(&handle).unwrap_or_default() {
            if let Some(flight) = self.office.unpark(fetched.token) {
                self.route(flight.vm, fetched);
            }
        }
    }

    /// Whether a VM's budgets let a submission in; when, if not now.
    fn admit(&mut self, vm: u64, fetched: &Fetched) -> Result<Option<Tick>, Refusal> {
        let now = self.office.now;
        let room = self.room_ahead(vm, fetched);
        let Some(entry) = self.office.vm_mut(vm) else {
            return Err(Refusal::NoSession);
        };
        entry.counters.submissions = entry.counters.submissions.saturating_add(1);
        let bytes = if fetched.opcode.is_receive() {
            0
        } else {
            fetched.data_bytes
        };
        room?;
        if entry.flights >= entry.limits.submissions_in_flight_max {
            return Err(Refusal::SubmissionsInFlight);
        }
        if bytes > 0 && entry.bytes_in_flight.saturating_add(bytes) > entry.limits.bytes_in_flight_max {
            return Err(Refusal::BytesInFlight);
        }
        let (rate, byte_rate) = (
            entry.limits.submissions_per_second_max,
            entry.limits.bytes_per_second_max,
        );
        if rate == u64::MAX && byte_rate == u64::MAX && entry.delayed.is_empty() {
            return Ok(None);
        }
        let first = entry
            .submission_rate
            .release(now, 1, rate)
            .ok_or(Refusal::SubmissionRate)?;
        let second = if bytes == 0 {
            Some(now)
        } else {
            entry.byte_rate.release(now, bytes, byte_rate)
        };
        let at = first.max(second.ok_or(Refusal::ByteRate)?);
        entry.submission_rate.charge(now, 1, rate);
        entry.byte_rate.charge(now, bytes, byte_rate);
        // Nobody overtakes within a VM.
        let at = entry.delayed.back().map_or(at, |(last, _)| at.max(*last));
        Ok((at > now || !entry.delayed.is_empty()).then_some(at))
    }

    /// Whether there is room for what survives of a submission. (A message has none before it is looked for in its receiver's mailbox.)
    fn room_ahead(&self, vm: u64, fetched: &Fetched) -> Result<(), Refusal> {
        let lasting = match fetched.opcode {
            Opcode::OPEN | Opcode::PUT | Opcode::OFFER => true,
            // (What it is about to make is known as long as a disk is slow, by two long names.)
            Opcode::MAKE_DIRECTORY => true,
            // (Argument 0: what was published goes.)
            Opcode::PUBLISH if fetched.argument == 0 => return Ok(()),
            Opcode::PUBLISH => true,
            _ => false,
        };
        match ahead::submission(fetched.opcode, fetched.meta.len()) {
            0 => Ok(()),
            bytes => self.office.has_room(vm, bytes, lasting),
        }
    }

    /// Lets go what a VM's rate held back until now.
    fn release(&mut self, vm: u64) {
        loop {
            let now = self.office.now;
            let Some(entry) = self.office.vm_mut(vm) else {
                return;
            };
            match entry.delayed.front() {
                Some((at, _)) if *at > now => {
                    let at = *at;
                    self.office.timers.arm(at, Timer::Release { vm });
                    return;
                }
                Some(_) => {}
                None => return,
            }
            if let Some((_, fetched)) = entry.delayed.pop_front()
                && self.office.unpark(fetched.token).is_some()
            {
                self.route(vm, fetched);
                self.chat.dispatch_after(&mut self.office);
            }
        }
    }

    fn route(&mut self, vm: u64, fetched: Box<Fetched>) {
        let (token, opcode, tag) = (fetched.token, fetched.opcode, fetched.tag);
        let submitted = match opcode.mode() {
            Mode::COMMON => self.common(vm, &fetched),
            mode if mode != fetched.mode => Err(Refusal::WrongMode),
            Mode::FILE => self.file(vm, &fetched),
            Mode::CHAT => self.chat.submit(&mut self.office, vm, fetched),
            Mode::STATISTICS => stats::submit(&fetched),
            Mode::CALCULATION => calc::submit(&fetched),
            _ => Err(Refusal::UnknownOpcode),
        };
        // Whether the sender knows that its message was accepted decides about sending again: so it is asked for.
        let confirm = opcode == Opcode::SEND;
        match submitted {
            Ok(Verdict::Open) => {}
            Ok(Verdict::Done(answer)) => self.office.answer(token, answer, Vec::new(), confirm),
            Ok(Verdict::Data(answer, payload)) => self.office.answer(token, answer, payload, false),
            Err(refusal) => self.office.refuse_at_once(vm, token, (opcode, tag), refusal),
        }
    }

    fn common(&self, vm: u64, fetched: &Fetched) -> Submitted {
        match fetched.opcode {
            Opcode::NOOP => Ok(Verdict::Done(Answer::ok(0))),
            Opcode::ECHO => {
                let room = usize::try_from(room(fetched.token, fetched.data_bytes)).unwrap_or(usize::MAX);
                let payload = fetched
                    .meta
                    .get(..room.min(fetched.meta.len()))
                    .unwrap_or(&[])
                    .to_vec();
                Ok(Verdict::Data(Answer::ok(payload.len() as u64), payload))
            }
            Opcode::IDENTITY => {
                Uses::default().check(fetched)?;
                let name = self
                    .office
                    .ledger
                    .vms
                    .get(&vm)
                    .map_or(&b""[..], |account| account.name.as_bytes());
                let fits = name.len() as u64 <= room(fetched.token, fetched.data_bytes);
                let payload = if fits { name.to_vec() } else { Vec::new() };
                Ok(Verdict::Data(Answer::ok_extra(vm, name.len() as u64), payload))
            }
            // A CANCEL that comes here found nothing in the rings; here it is told by `Input::Cancel`.
            _ => Err(Refusal::UnknownOpcode),
        }
    }

    fn file(&mut self, vm: u64, fetched: &Fetched) -> Submitted {
        let office = &mut self.office;
        match fetched.opcode {
            Opcode::OFFER
            | Opcode::NEXT_OFFER
            | Opcode::ACCEPT
            | Opcode::REFUSE
            | Opcode::STREAM_WRITE
            | Opcode::STREAM_READ
            | Opcode::STREAM_END
            | Opcode::STREAM_CONFIRM => self.transfers.submit(office, vm, fetched),
            Opcode::READ
            | Opcode::WRITE
            | Opcode::TRUNCATE
            | Opcode::FSYNC
            | Opcode::CLOSE
            | Opcode::COMMIT
            | Opcode::CHECKSUM
                if self.transfers.ends.contains_key(&fetched.handle) =>
            {
                self.transfers.stream_submit(office, fetched)
            }
            Opcode(number) if number <= Opcode::CHECKSUM.0 => self.files.submit(office, vm, fetched),
            _ => Err(Refusal::UnknownOpcode),
        }
    }

    fn outcome(&mut self, then: Continuation, outcome: Outcome) {
        let office = &mut self.office;
        match then {
            Continuation::Nothing => {}
            Continuation::Plain { token } => file::plain(office, token, &outcome),
            Continuation::Identified { token, operation } => {
                namely::identified(office, token, *operation, outcome);
            }
            Continuation::Named { token, again } => namely::named(office, token, again, &outcome),
            Continuation::Reopened { handle } => {
                self.files.reopened(office, handle, outcome);
                self.go_on_with(handle);
            }
            Continuation::Stat { token } => listing::stat_done(office, token, outcome),
            Continuation::List { token, bytes_max } => listing::list_done(office, token, bytes_max, outcome),
            Continuation::Shares { token, entries, next } => {
                listing::shares_done(office, token, &entries, next, &outcome)
            }
            Continuation::Open {
                token,
                handle,
                vm,
                open,
            } => {
                self.files.opened(office, token, handle, vm, *open, outcome);
            }
            Continuation::File { token, handle } => self.files.file_done(office, token, handle, outcome),
            Continuation::PutOpen { token, handle, put } => {
                self.files.puts.opened(office, token, handle, *put, outcome);
            }
            Continuation::Put { token, handle, write } => {
                self.files.puts.done(office, token, handle, write, outcome);
            }
            Continuation::Commit { handle, token: _ } => self.files.puts.committed(office, handle, outcome),
            Continuation::PutGone { key, answer } => self.files.puts.gone(office, &key, answer),
            Continuation::Fetch { token } => self.chat.fetched(office, token, outcome),
            Continuation::Piece { stream } => self.transfers.piece_done(office, stream, outcome),
            Continuation::PushChecksum { stream } => self.transfers.push_checksum(office, stream, &outcome),
        }
    }

    fn published(&mut self, token: Token, published: bool) {
        delivery::published(&mut self.office, token, published);
        self.transfers.published(&mut self.office, token, published);
    }

    /// A guest gives a submission up, or its deadline passed.
    fn end_early(&mut self, token: Token, status: u16) {
        let Some(flight) = self.office.flights.get(&token).copied() else {
            return;
        };
        match flight.wait {
            Wait::Rate | Wait::Turn | Wait::Receive | Wait::NextOffer => {
                self.dequeue(token, flight.vm, flight.wait);
                self.office.end(token, failed(status));
            }
            Wait::Offer(offer) => {
                self.transfers.fail_offer(&mut self.office, offer, status);
                self.office.end(token, failed(status));
            }
            Wait::StreamWrite(stream) | Wait::StreamRead(stream) | Wait::StreamEnd(stream) => {
                if !self.transfers.give_up(&mut self.office, stream, token, status) {
                    self.mark_ending(token, status);
                }
            }
            Wait::Effect { id, fills } => {
                if let Some(then) = self.office.effects.withdraw(flight.vm, id) {
                    self.outcome(then, withdrawn(status));
                    self.office.end(token, failed(status));
                } else if fills {
                    self.mark_ending(token, status);
                } else {
                    self.office.end(token, failed(status));
                }
            }
            Wait::Reopening(handle) => {
                self.files.forget_waiting(handle, token);
                self.office.end(token, failed(status));
            }
            Wait::Room => {
                self.office.end(token, failed(status));
            }
        }
    }

    /// Its buffer is being written: it ends with that.
    fn mark_ending(&mut self, token: Token, status: u16) {
        if let Some(flight) = self.office.flights.get_mut(&token) {
            flight.ending = Some(status);
        }
    }

    fn dequeue(&mut self, token: Token, vm: u64, wait: Wait) {
        if wait == Wait::Turn {
            self.chat.forget(token);
        }
        let Some(entry) = self.office.vm_mut(vm) else {
            return;
        };
        match wait {
            Wait::Rate => entry.delayed.retain(|(_, fetched)| fetched.token != token),
            Wait::Receive => entry.receives.retain(|posted| *posted != token),
            Wait::NextOffer => entry.next_offers.retain(|posted| *posted != token),
            _ => {}
        }
    }

    /// A submission is void: forgotten without an answer.
    fn void(&mut self, token: Token) {
        let flight = self.office.unpark(token);
        self.office.forgo(token);
        // Answered already, and perhaps not published; or to be answered when something is tidied up.
        self.published(token, false);
        let Some(flight) = flight else {
            self.transfers
                .void_before(&mut self.office, |other| other == token);
            return;
        };
        match flight.wait {
            Wait::Rate | Wait::Turn | Wait::Receive | Wait::NextOffer => {
                self.dequeue(token, flight.vm, flight.wait)
            }
            Wait::Offer(offer) => self.transfers.void_offer(&mut self.office, offer),
            Wait::StreamWrite(stream) | Wait::StreamRead(stream) | Wait::StreamEnd(stream) => {
                self.transfers.void(&mut self.office, stream, token);
            }
            Wait::Effect { id, .. } => {
                if let Some(then) = self.office.effects.withdraw(flight.vm, id) {
                    self.outcome(then, withdrawn(Status::CANCELLED.0));
                }
            }
            Wait::Reopening(handle) => self.files.forget_waiting(handle, token),
            Wait::Room => {}
        }
    }

    pub(crate) fn void_all(&mut self, first: Token, last: Token) {
        let tokens: Vec<Token> = self
            .office
            .flights
            .range(first..=last)
            .map(|(token, _)| *token)
            .collect();
        for token in tokens {
            self.void(token);
        }
    }
}
