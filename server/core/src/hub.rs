//! OFFICE: the hub. Takes inputs, finds the room, sees to it that every submission ends exactly once.
//!
//! In: [`Input`]s. Out: [`Output`]s, in order: a `Journal` comes before the answer or effect that depends on it.
//! It never knows what an operation means; the rooms in `modes/` do.

use crate::deadlines::Timer;
use crate::effect::{Effect, Outcome};
use crate::effects::Continuation;
use crate::interface::{Input, Output};
use crate::journal::Record;
use crate::limits::{SWEEP_AGE_SECONDS, SWEEP_INTERVAL_NS};
use crate::modes::chat::{self, Chat};
use crate::modes::file::{self, Files};
use crate::modes::offers::Transfers;
use crate::modes::puts::withdrawn;
use crate::modes::{Submitted, Uses, Verdict, calc, stats};
use crate::office::{Office, Session, Wait, failed, room};
use crate::policy::{Access, VmConfig};
use crate::refusal::Refusal;
use std::collections::BTreeSet;
use vmgmt_abi::chat::{ALL_NAME, HOST_NAME, PEER_ALL};
use vmgmt_abi::{Mode, Opcode, Status};
use vmgmt_device::Tick;
use vmgmt_device::rings::{Answer, Channel, Fetched, Token};

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
            Input::Published { token, published } => self.published(token, published),
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
            Input::ControlClosed { client } => self.control_closed(client),
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
        self.office.now = self.office.now.max(now);
        while let Some(timer) = self.office.timers.pop_due(self.office.now) {
            match timer {
                Timer::Deadline(token) => self.end_early(token, Status::TIMED_OUT.0),
                Timer::Release { vm } => self.release(vm),
                Timer::Expiry { vm } => chat::expire(&mut self.office, vm),
                Timer::ControlReceive { .. } | Timer::ControlOffer { .. } => self.control_timer(timer),
                Timer::Sweep => self.sweep(),
            }
            self.settle();
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

    /// Effects that the shell has and has not answered.
    pub fn effects_running(&self) -> impl Iterator<Item = crate::effect::EffectId> {
        self.office.effects.running()
    }

    /// The VM in whose name an effect under way is done; 0: the host's own, or no such effect.
    #[must_use]
    pub fn owner_of(&self, effect: crate::effect::EffectId) -> u64 {
        self.office.effects.vm_of(effect).unwrap_or(0)
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
                self.office.log_refusal(vm, refusal);
                self.office
                    .answer(fetched.token, refusal.answer(), Vec::new(), false);
            }
        }
    }

    /// Whether a VM's budgets let a submission in; when, if not now.
    fn admit(&mut self, vm: u64, fetched: &Fetched) -> Result<Option<Tick>, Refusal> {
        let now = self.office.now;
        let Some(entry) = self.office.vm_mut(vm) else {
            return Err(Refusal::NoSession);
        };
        entry.counters.submissions = entry.counters.submissions.saturating_add(1);
        let bytes = if fetched.opcode.is_receive() {
            0
        } else {
            fetched.data_bytes
        };
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
        let (token, opcode) = (fetched.token, fetched.opcode);
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
            Err(refusal) => {
                self.office.log_refusal(vm, refusal);
                self.office.answer(token, refusal.answer(), Vec::new(), false);
            }
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
            Continuation::Plain { token, again } => file::plain(office, token, again, outcome),
            Continuation::Stat { token } => file::stat_done(office, token, outcome),
            Continuation::List { token, bytes_max } => file::list_done(office, token, bytes_max, outcome),
            Continuation::Rename { token, again } => file::rename_done(office, token, again, outcome),
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
        chat::published(&mut self.office, token, published);
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
        let Some(flight) = self.office.unpark(token) else {
            // Answered already, and perhaps not published.
            self.published(token, false);
            return;
        };
        match flight.wait {
            Wait::Rate | Wait::Turn | Wait::Receive | Wait::NextOffer => {
                self.dequeue(token, flight.vm, flight.wait)
            }
            Wait::Offer(offer) => {
                self.transfers.withdraw(&mut self.office, offer);
            }
            Wait::StreamWrite(stream) | Wait::StreamRead(stream) | Wait::StreamEnd(stream) => {
                self.transfers.void(&mut self.office, stream, token);
            }
            Wait::Effect { id, .. } => {
                if let Some(then) = self.office.effects.withdraw(flight.vm, id) {
                    self.outcome(then, withdrawn(Status::CANCELLED.0));
                }
            }
            Wait::Room => {}
        }
    }

    fn void_all(&mut self, first: Token, last: Token) {
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

    fn channel_closed(&mut self, session: u64, channel: Channel) {
        let first = Token {
            session,
            channel,
            index: 0,
            generation: 0,
        };
        self.void_all(
            first,
            Token {
                index: u32::MAX,
                generation: u32::MAX,
                ..first
            },
        );
        let Some(vm) = self.office.vm_of(first) else {
            return;
        };
        chat::channel_gone(&mut self.office, session, vm, channel);
        let presented: Vec<Token> = self.transfers.presenting.keys().copied().collect();
        for token in presented
            .into_iter()
            .filter(|token| (token.session, token.channel) == (session, channel))
        {
            self.transfers.published(&mut self.office, token, false);
        }
    }

    fn vm(&mut self, config: VmConfig) {
        let vm = config.vm;
        if vm >= PEER_ALL || vm == 0 || config.name == HOST_NAME || config.name == ALL_NAME {
            let text = format!(
                "VM {vm} has a reserved number or name ({HOST_NAME}, {ALL_NAME}): give it another one"
            );
            self.office.outputs.push_back(Output::Log { vm, text });
            return;
        }
        let limits = config.limits.clone();
        self.office.record(Record::Vm(Box::new(config)));
        if self.office.vms.is_empty() {
            self.office
                .timers
                .arm(self.office.now.after_ns(SWEEP_INTERVAL_NS), Timer::Sweep);
        }
        self.office.vms.entry(vm).or_default().limits = limits;
        self.office.refresh_reach();
    }

    fn vm_gone(&mut self, vm: u64) {
        let sessions = self
            .office
            .vms
            .get(&vm)
            .map(|entry| entry.sessions.clone())
            .unwrap_or_default();
        for session in sessions {
            self.session_emptied(session);
            self.office.sessions.remove(&session);
        }
        self.transfers.vm_gone(&mut self.office, vm);
        if self.office.ledger.vms.contains_key(&vm) {
            self.office.record(Record::VmGone { vm });
        }
        if let Some(at) = self.office.vms.remove(&vm).and_then(|entry| entry.expiry) {
            self.office.timers.disarm(at, Timer::Expiry { vm });
        }
        if self.office.vms.is_empty() {
            self.office.timers.disarm_sweep();
        }
        self.office.refresh_reach();
    }

    fn session_opened(&mut self, session: u64, vm: u64) {
        if self.office.sessions.contains_key(&session) {
            self.session_closed(session);
        }
        let Some(entry) = self.office.vm_mut(vm) else {
            let text = format!(
                "session {session} of a VM that is not known: its submissions are answered NOT_READY"
            );
            self.office.outputs.push_back(Output::Log { vm, text });
            return;
        };
        entry.sessions.insert(session);
        self.office.sessions.insert(
            session,
            Session {
                vm,
                handles: BTreeSet::new(),
            },
        );
    }

    fn session_closed(&mut self, session: u64) {
        self.session_emptied(session);
        let Some(Session { vm, handles: _ }) = self.office.sessions.remove(&session) else {
            return;
        };
        let Some(entry) = self.office.vm_mut(vm) else {
            return;
        };
        entry.sessions.remove(&session);
        if entry.sessions.is_empty()
            && self
                .office
                .ledger
                .vms
                .get(&vm)
                .is_some_and(|account| account.config.transient)
        {
            self.vm_gone(vm);
        }
    }

    /// Everything of a session goes: submissions, handles, presence, deliveries under way.
    fn session_emptied(&mut self, session: u64) {
        let first = Token {
            session,
            channel: Channel::Ring(0),
            index: 0,
            generation: 0,
        };
        let last = Token {
            session,
            channel: Channel::Port,
            index: u32::MAX,
            generation: u32::MAX,
        };
        self.void_all(first, last);
        let found = self.office.sessions.get_mut(&session);
        let found = found.map(|entry| (entry.vm, std::mem::take(&mut entry.handles)));
        // After a crash a session may be gone that this life never saw: then only what survived of it is put right.
        let vm = found
            .as_ref()
            .map(|(vm, _)| *vm)
            .or_else(|| self.office.ledger.vm_published_by(session));
        for handle in found.map(|(_, handles)| handles).unwrap_or_default() {
            if self.transfers.ends.contains_key(&handle) {
                self.transfers.close(&mut self.office, handle);
            } else {
                self.files.release(&mut self.office, handle);
            }
        }
        let vm = vm.unwrap_or(0);
        chat::session_gone(&mut self.office, session, vm);
        let others = self
            .office
            .vms
            .get(&vm)
            .is_some_and(|entry| entry.sessions.iter().any(|other| *other != session));
        self.transfers
            .session_gone(&mut self.office, session, vm, !others);
    }

    /// Removes what broken puts left, in every share that some VM may write.
    fn sweep(&mut self) {
        let accounts = self
            .office
            .ledger
            .vms
            .values()
            .flat_map(|account| &account.config.shares);
        let writable = accounts.filter(|grant| grant.access == Access::ReadWrite);
        let shares: BTreeSet<String> = writable.map(|grant| grant.share.clone()).collect();
        for share in shares {
            let effect = Effect::Sweep {
                share,
                older_than_seconds: SWEEP_AGE_SECONDS,
            };
            self.office.effect(0, effect, Continuation::Nothing);
        }
        self.office
            .timers
            .arm(self.office.now.after_ns(SWEEP_INTERVAL_NS), Timer::Sweep);
    }
}
