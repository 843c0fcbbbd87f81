//! What goes between the rooms and out of the core: outputs of rings and hub, effects, records, packets for the front.
//!
//! In: the rooms' outputs. Out: inputs for other rooms, words, signals. A record of the hub is written before what depends on it.

use super::*;
use crate::store::OpenFile;
use vmgmt_core::doors::{self, EffectShell, RingShell};
use vmgmt_core::effect::{BufferRange, FileSlot};
use vmgmt_device::rings::Channel as RingChannel;
use vmgmt_device::rings::Token as Submission;

/// The shell's part of what a session's rings say.
struct Beside<'a> {
    session: &'a mut Session,
    bulk: &'a mut Bulk,
    wake: &'a mut Wake,
}

impl RingShell for Beside<'_> {
    fn void(&mut self, token: Submission) {
        self.bulk.void(token);
    }
    fn void_channel(&mut self, session: u64, channel: Option<RingChannel>) {
        self.bulk.void_channel(session, channel);
    }
    fn forget_reads(&mut self) {
        self.session.memory.forget_reads();
        // One that another ring has asked for and that is not on its way yet: no answer comes that would have it asked again.
        self.session.look = true;
    }
    fn signal(&mut self, vector: u8) {
        self.session.signal(usize::from(vector));
    }
    fn kick(&mut self) {
        self.wake.kick(self.session.slot);
    }
}

/// Who carries effects out, for one of them.
struct Workshop<'a> {
    sessions: &'a mut Sessions,
    bulk: &'a mut Bulk,
    store: &'a mut Store,
    /// The VM that the effect is for; 0: none.
    owner: u64,
    now: Tick,
}

impl Workshop<'_> {
    fn file(&self, slot: FileSlot) -> Result<Arc<OpenFile>, Outcome> {
        self.store
            .file(slot)
            .ok_or(Outcome::failed(Status::STALE, FailedAt::File))
    }
}

impl EffectShell for Workshop<'_> {
    fn open(&mut self, session: u64) {
        self.sessions.open(session, self.now);
    }
    fn copy(&mut self, id: EffectId, from: BufferRange, into: BufferRange) -> Result<(), Outcome> {
        self.bulk.copy(self.sessions, id, from, into)
    }
    fn fetch(&mut self, id: EffectId, from: BufferRange) -> Result<(), Outcome> {
        self.bulk.fetch(self.sessions, id, from)
    }
    fn read(&mut self, id: EffectId, file: FileSlot, offset: u64, into: BufferRange) -> Result<(), Outcome> {
        let file = self.file(file)?;
        self.bulk.read(self.sessions, id, file, offset, into)
    }
    fn write(
        &mut self,
        id: EffectId,
        file: FileSlot,
        offset: u64,
        from: BufferRange,
        checksum: bool,
    ) -> Result<(), Outcome> {
        let file = self.file(file)?;
        self.bulk.write(self.sessions, id, file, offset, from, checksum)
    }
    fn other(&mut self, id: EffectId, effect: Effect) -> Result<(), Outcome> {
        self.store.submit(self.owner, id, effect)
    }
}

impl EventLoop {
    /// Carries a session's outputs to the hub.
    pub(super) fn route(&mut self, number: u64, now: Tick) {
        loop {
            let Some(session) = self.sessions.get_mut(number) else {
                return;
            };
            let Some(output) = session.rings.poll_output() else {
                return;
            };
            if let Output::Submission(fetched) = &output {
                fault::on_submission(&fetched.meta, || self.wake.beat());
                fault::on_submission(fetched.data.as_deref().unwrap_or_default(), || self.wake.beat());
            }
            let mut beside = Beside {
                session,
                bulk: &mut self.bulk,
                wake: &mut self.wake,
            };
            if let Some(input) = doors::from_rings(output, &mut beside) {
                self.hub.handle(now, input);
            }
        }
    }

    /// Carries the hub's outputs out, and what follows from them back, until nothing comes any more.
    pub(super) fn carry(&mut self, now: Tick) -> anyhow::Result<bool> {
        let mut worked = false;
        while let Some(output) = self.hub.poll_output() {
            worked = true;
            match output {
                interface::Output::Complete {
                    token,
                    answer,
                    payload,
                    confirm,
                } => {
                    let poll_ns = self.poll_ns();
                    self.wake.blame(token.session);
                    if let Some(session) = self.sessions.open(token.session, now) {
                        let turn = session.handle(
                            now,
                            Input::Complete {
                                token,
                                answer,
                                payload,
                                confirm,
                            },
                        );
                        if turn.progressed() {
                            session.active_until = now.after_ns(poll_ns);
                            self.active.insert(token.session);
                        }
                        self.route(token.session, now);
                    }
                    self.wake.blame(0);
                }
                interface::Output::Effect { id, effect } => {
                    self.wake.blame_vm(self.hub.owner_of(id));
                    if let Err(outcome) = self.begin_effect(id, effect, now) {
                        self.hub
                            .handle(now, interface::Input::Outcome { effect: id, outcome });
                    }
                    self.wake.blame_vm(0);
                }
                interface::Output::Journal(record) => self.write_record(&record)?,
                interface::Output::Control {
                    client,
                    id,
                    reply,
                    last,
                } => self.reply(client, id, reply, last),
                interface::Output::Log { vm, text } => self.log(Some(vm), text),
            }
        }
        Ok(worked)
    }

    /// What is due in the hub, each in its owner's name.
    pub(super) fn handle_timeouts(&mut self, now: Tick) {
        while self.hub.poll_timeout().is_some_and(|due| due <= now) {
            let (session, vm) = self.hub.next_timeout_of();
            self.wake.blame(session);
            self.wake.blame_vm(vm);
            self.hub.handle_next_timeout(now);
        }
        self.wake.blame(0);
        self.wake.blame_vm(0);
    }

    /// What came of bulk work, each in its owner's name.
    pub(super) fn tell_outcomes(&mut self, finished: Vec<(EffectId, Outcome)>, now: Tick) {
        for (effect, outcome) in finished {
            let owner = self.hub.owner_of(effect);
            self.wake.blame_vm(owner);
            fault::on_any("outcome", &owner);
            self.hub
                .handle(now, interface::Input::Outcome { effect, outcome });
        }
        self.wake.blame_vm(0);
    }

    /// Starts an effect.
    pub(super) fn begin_effect(&mut self, id: EffectId, effect: Effect, now: Tick) -> Result<(), Outcome> {
        let mut workshop = Workshop {
            sessions: &mut self.sessions,
            bulk: &mut self.bulk,
            store: &mut self.store,
            owner: self.hub.owner_of(id),
            now,
        };
        doors::begin(id, effect, &mut workshop)
    }

    /// Ends the turns of the sessions that were opened: signals, `busy`, requests by message.
    pub(super) fn close_sessions(&mut self, now: Tick) -> anyhow::Result<()> {
        for number in self.sessions.take_opened() {
            let Some(session) = self.sessions.get_mut(number) else {
                continue;
            };
            self.wake.blame(number);
            session.handle(now, Input::TurnEnd);
            self.route(number, now);
            let Some(session) = self.sessions.get_mut(number) else {
                continue;
            };
            session.is_open = false;
            session.memory.end_dma(now);
            while let Some(request) = session.memory.poll_output(now) {
                self.to_front.push_back((request.message, request.payload));
            }
            if session.memory.wants_turn() {
                session.look = true;
                self.scan = true;
            }
            if session.tell_fenced() {
                self.wake.kick(session.slot);
            }
            if session.memory.is_fence_waiting() {
                self.watched.insert(number);
            }
            let vm = session.vm;
            while let Some(notice) = self
                .sessions
                .get_mut(number)
                .and_then(|session| session.memory.poll_notice())
            {
                self.log(Some(vm), notice.0);
            }
        }
        self.wake.blame(0);
        // What the ends of the turns told the hub; its answers have the next turn.
        self.send_to_front()
    }

    pub(super) fn reply(&mut self, client: u64, id: u64, reply: interface::ControlReply, last: bool) {
        let books = Books {
            config: &self.config,
            vms: &self.vms,
            lines: &self.lines,
            sandbox: &self.sandbox,
            faults: &self.faults,
            life: self.life,
            started: self.started,
            sessions: &self.sessions,
            upgrade: self.upgrade.as_deref(),
            frozen: self.freezes.levels(),
            now: now(),
        };
        self.operators.handle_reply(client, id, reply, last, &books);
        self.tell_written();
    }

    /// Messages whose bytes are in an operator's socket leave the host's mailbox now: one that a death of this core keeps from there is given
    /// again by the next.
    pub(super) fn tell_written(&mut self) {
        for (client, id) in self.operators.take_written() {
            self.hub.handle(now(), interface::Input::Told { client, id });
        }
    }

    pub(super) fn tell_keeper(&self, message: &CoreToKeeper) -> anyhow::Result<()> {
        self.keeper
            .send(message, &[], &[])
            .map_err(|error| anyhow!("the keeper does not take messages: {error}"))
    }

    /// Sends what waits for the front, as far as there is room.
    pub(super) fn send_to_front(&mut self) -> anyhow::Result<()> {
        while let Some((message, payload)) = self.to_front.front() {
            match self.front.send(message, payload, &[]) {
                Ok(()) => {
                    self.to_front.pop_front();
                }
                Err(ChannelError::Full) => break,
                Err(ChannelError::Closed) => {
                    self.stopping = true;
                    break;
                }
                Err(error) => return Err(error).context("the front's channel"),
            }
        }
        Ok(())
    }

    pub(super) fn log(&mut self, vm: Option<u64>, text: String) {
        let vm = vm.and_then(|vm| self.vms.get(&vm)).map(|vm| vm.name.clone());
        match &vm {
            Some(vm) => tracing::info!(target: "vmgmt", vm, "{text}"),
            None => tracing::info!(target: "vmgmt", "{text}"),
        }
        self.keep_line(wall_clock_ns(), vm, text);
    }

    /// Keeps a line for `vmgmtctl log` that is in the daemon's log already.
    pub(super) fn keep_line(&mut self, time_ns: u64, vm: Option<String>, text: String) {
        self.lines.push(Line { time_ns, vm, text });
        self.operators.tell_followers(&self.lines);
    }

    /// Writes a record of the hub before what depends on it goes out.
    pub(super) fn write_record(&mut self, record: &Record) -> anyhow::Result<()> {
        if FORGETFUL {
            return Ok(());
        }
        self.saving.write(&mut self.hub, record)?;
        self.tell_saving();
        Ok(())
    }

    /// Says what there is to say of the hub's memory.
    pub(super) fn tell_saving(&mut self) {
        while let Some(text) = self.saving.poll_line() {
            self.log(None, text);
        }
    }

    /// A snapshot that names only what is in use now.
    pub(super) fn tidy_up(&mut self) -> anyhow::Result<()> {
        self.saving.tidy_up(&mut self.hub)?;
        self.tell_saving();
        Ok(())
    }
}
