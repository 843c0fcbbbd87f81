//! GARDEN, what goes between the rooms and out of the core: outputs of rings and hub, effects, bulk work, the ends of turns.
//!
//! In: the rooms' outputs. Out: inputs for other rooms, words, signals, work. As `host/core/event_loop/carry.rs`; what an output is to whom says
//! `vmgmt_core::doors`, to both.

use super::*;

impl Core {
    pub(super) fn route(&mut self, number: u64, now: Tick) {
        loop {
            let Some(session) = self.sessions.map.get_mut(&number) else {
                return;
            };
            let Some(output) = session.rings.poll_output() else {
                return;
            };
            (self.done, self.last_done) = (self.done + 1, "an output of the rings");
            let (slot, forgets) = (session.slot, self.outside.fault.get() == Fault::ForgetsSignals);
            let mut beside = Beside {
                session,
                bulk: &mut self.bulk,
                steps: (!forgets).then_some(&self.outside.steps),
                kicked: false,
            };
            let input = doors::from_rings(output, &mut beside);
            if beside.kicked {
                self.kick(slot);
            }
            if let Some(input) = input {
                self.tell_hub(input, now);
            }
        }
    }

    fn tell_hub(&mut self, input: interface::Input, now: Tick) {
        if self.outside.fault.get() == Fault::TakesResetsForDepartures
            && let interface::Input::SessionReset { session } = input
            && let Some(vm) = self.sessions.map.get(&session).map(|session| session.vm)
        {
            self.hub.handle(now, interface::Input::SessionClosed { session });
            self.hub
                .handle(now, interface::Input::SessionOpened { session, vm });
            return;
        }
        self.hub.handle(now, input);
    }

    pub(super) fn kick(&mut self, slot: usize) {
        self.life_page.kick(slot);
        self.kicked = true;
    }

    pub(super) fn carry(&mut self, now: Tick) -> bool {
        let mut worked = false;
        let mut unwritten = VecDeque::new();
        while let Some(output) = self.hub.poll_output() {
            worked = true;
            self.did("an output of the hub");
            match output {
                interface::Output::Complete {
                    token,
                    answer,
                    payload,
                    confirm,
                } => {
                    let input = Input::Complete {
                        token,
                        answer,
                        payload,
                        confirm,
                    };
                    if let Some(session) = self.sessions.open(token.session, now) {
                        let again =
                            (self.outside.fault.get() == Fault::CompletesTwice).then(|| input.clone());
                        let turn = session.handle(now, input);
                        if turn.progressed() {
                            session.active_until = now.after_ns(self.outside.poll_ns);
                            self.active.insert(token.session);
                        }
                        if let Some(input) = again {
                            session.handle(now, input);
                        }
                        self.route(token.session, now);
                    }
                }
                interface::Output::Effect { id, effect } => {
                    if let Err(outcome) = self.begin_effect(id, effect, now) {
                        self.hub
                            .handle(now, interface::Input::Outcome { effect: id, outcome });
                    }
                }
                interface::Output::Journal(record) => match self.outside.fault.get() {
                    Fault::ForgetsJournal => {}
                    Fault::JournalsTooLate => unwritten.push_back(record),
                    _ => self.write_record(&record),
                },
                interface::Output::Control {
                    client, id, reply, ..
                } => {
                    // (The connection may have ended before the answer.)
                    if self.client == Some(client) {
                        self.held.push_back((client, id, reply));
                        self.tell_operator(now);
                    }
                }
                interface::Output::Log { .. } => {}
            }
        }
        for record in unwritten {
            self.write_record(&record);
        }
        worked
    }

    fn begin_effect(&mut self, id: EffectId, effect: Effect, now: Tick) -> Result<(), Outcome> {
        let mut workshop = Workshop {
            sessions: &mut self.sessions,
            bulk: &mut self.bulk,
            files: &mut self.files,
            outside: &self.outside,
            vm: self.hub.owner_of(id),
            now,
        };
        doors::begin(id, effect, &mut workshop)
    }

    pub(super) fn step_bulk(&mut self, now: Tick) {
        for _ in 0..self.bulk.ready() {
            let step = self.bulk.step(&mut self.sessions);
            if !matches!(step, Step::Waits) {
                self.did("bulk work");
            }
            match step {
                Step::Nothing | Step::Waits => {}
                Step::Work(id, work) => self.outside.submit(id, self.hub.owner_of(id), work),
                Step::Finished(effect, outcome) => {
                    self.hub
                        .handle(now, interface::Input::Outcome { effect, outcome });
                }
            }
        }
    }

    pub(super) fn close_sessions(&mut self, now: Tick) {
        for number in std::mem::take(&mut self.sessions.opened) {
            if let Some(session) = self.sessions.map.get_mut(&number) {
                session.handle(now, Input::TurnEnd);
            }
            self.route(number, now);
            let Some(session) = self.sessions.map.get_mut(&number) else {
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
            let slot = session.slot;
            let fenced = session.tell_fenced();
            if session.memory.is_fence_waiting() {
                self.watched.insert(number);
            }
            if fenced {
                self.kick(slot);
            }
        }
        self.send_to_front();
    }
}

/// The shell's part of what a session's rings say.
struct Beside<'a> {
    session: &'a mut Session,
    bulk: &'a mut Bulk,
    /// `None`: interrupts are forgotten.
    steps: Option<&'a Rc<Steps>>,
    kicked: bool,
}

impl RingShell for Beside<'_> {
    fn void(&mut self, token: Token) {
        self.bulk.void(token);
    }
    fn void_channel(&mut self, session: u64, channel: Option<Channel>) {
        self.bulk.void_channel(session, channel);
    }
    fn forget_reads(&mut self) {
        self.session.memory.forget_reads();
        // One that another ring has asked for and that is not on its way yet: no answer comes that would have it asked again.
        self.session.look = true;
    }
    fn signal(&mut self, vector: u8) {
        if let Some(steps) = self.steps {
            self.session.signal(usize::from(vector), steps);
        }
    }
    fn kick(&mut self) {
        self.kicked = true;
    }
}

/// Who carries effects out.
struct Workshop<'a> {
    sessions: &'a mut Sessions,
    bulk: &'a mut Bulk,
    files: &'a mut BTreeMap<u32, OpenFile>,
    outside: &'a Outside,
    /// In whose name it is done.
    vm: u64,
    now: Tick,
}

impl Workshop<'_> {
    fn inode(&self, slot: FileSlot) -> Result<u64, Outcome> {
        self.files
            .get(&slot.index)
            .filter(|file| file.generation == slot.generation)
            .map(|file| file.inode)
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
        let inode = self.inode(file)?;
        self.bulk.read(self.sessions, id, inode, offset, into)
    }
    fn write(
        &mut self,
        id: EffectId,
        file: FileSlot,
        offset: u64,
        from: BufferRange,
        checksum: bool,
    ) -> Result<(), Outcome> {
        let inode = self.inode(file)?;
        self.bulk.write(self.sessions, id, inode, offset, from, checksum)
    }
    fn other(&mut self, id: EffectId, effect: Effect) -> Result<(), Outcome> {
        let inode = match &effect {
            Effect::Close { slot } => {
                self.files.remove(&slot.index);
                return Err(Outcome::Done);
            }
            Effect::Checksum { slot, .. }
            | Effect::Truncate { slot, .. }
            | Effect::Sync { slot }
            | Effect::Commit { slot, .. } => Some(self.inode(*slot)?),
            Effect::Discard { slot, .. } => {
                self.files.remove(&slot.index);
                None
            }
            _ => None,
        };
        self.outside.submit(id, self.vm, Work::Effect { effect, inode });
        Ok(())
    }
}
