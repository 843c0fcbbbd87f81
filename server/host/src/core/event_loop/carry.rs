//! What goes between the rooms and out of the core: outputs of rings and hub, effects, records, packets for the front.
//!
//! In: the rooms' outputs. Out: inputs for other rooms, words, signals. A record of the hub is written before what depends on it.

use super::*;

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
            let input = match output {
                Output::Submission(fetched) => {
                    fault::on("submission", &fetched.meta);
                    fault::on("submission", fetched.data.as_deref().unwrap_or_default());
                    interface::Input::Submission(fetched)
                }
                Output::Cancel(token) => {
                    session.memory.forget_reads();
                    interface::Input::Cancel(token)
                }
                Output::Void(token) => {
                    self.bulk.void(token);
                    interface::Input::Void(token)
                }
                Output::ChannelClosed {
                    session: number,
                    channel,
                } => {
                    self.bulk.void_channel(number, Some(channel));
                    session.memory.forget_reads();
                    interface::Input::ChannelClosed {
                        session: number,
                        channel,
                    }
                }
                Output::Reset { session: number } => {
                    self.bulk.void_channel(number, None);
                    session.memory.forget_reads();
                    interface::Input::SessionReset { session: number }
                }
                Output::Published { token, published } => interface::Input::Published { token, published },
                Output::Signal { vector } => {
                    session.signal(vector as usize);
                    continue;
                }
                Output::Kick => {
                    let slot = session.slot;
                    self.wake.kick(slot);
                    continue;
                }
            };
            self.hub.handle(now, input);
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

    /// Starts an effect.
    pub(super) fn begin_effect(&mut self, id: EffectId, effect: Effect, now: Tick) -> Result<(), Outcome> {
        let file = |store: &Store, slot| {
            store
                .file(slot)
                .ok_or(Outcome::failed(Status::STALE, FailedAt::File))
        };
        match effect {
            Effect::Copy { from, into } => {
                self.sessions.open(from.token.session, now);
                self.sessions.open(into.token.session, now);
                self.bulk.copy(&mut self.sessions, id, from, into)
            }
            Effect::Fetch { from } => {
                self.sessions.open(from.token.session, now);
                self.bulk.fetch(&mut self.sessions, id, from)
            }
            Effect::Read { slot, offset, into } => {
                self.sessions.open(into.token.session, now);
                self.bulk
                    .read(&mut self.sessions, id, file(&self.store, slot)?, offset, into)
            }
            Effect::Write {
                slot,
                offset,
                from,
                checksum,
            } => {
                self.sessions.open(from.token.session, now);
                self.bulk.write(
                    &mut self.sessions,
                    id,
                    file(&self.store, slot)?,
                    offset,
                    from,
                    checksum,
                )
            }
            effect => self.store.submit(self.hub.owner_of(id), id, effect),
        }
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
            if session.memory.wants_drain() || session.memory.take_late_stores() {
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
            life: self.life,
            started: self.started,
            sessions: self.sessions.count(),
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
        self.lines.push(Line {
            time_ns: wall_clock_ns(),
            vm,
            text,
        });
        self.operators.tell_followers(&self.lines);
    }

    /// Writes a record of the hub before what depends on it goes out.
    pub(super) fn write_record(&mut self, record: &Record) -> anyhow::Result<()> {
        if FORGETFUL {
            return Ok(());
        }
        self.record.clear();
        self.record.shrink_to(RECORD_BYTES_KEPT_MAX);
        record.write(&mut self.record);
        let appended = self.journal.append(&self.record);
        let fill = self.fill();
        match appended {
            Ok(()) if !fill.compact => {
                self.tell_fill(fill);
                Ok(())
            }
            // The hub's state has the change already: the snapshot stands for the record.
            Ok(()) | Err(JournalError::Full { .. }) => self.take_snapshot(),
            Err(error) => Err(error.into()),
        }
    }

    fn fill(&self) -> Fill {
        let journal = &self.journal;
        Fill::of(journal.room_bytes(), self.snapshot_bytes, journal.journal_bytes())
    }

    /// The hub refuses what would make its state larger than its memory, long before it is.
    fn tell_fill(&mut self, fill: Fill) {
        if fill.full == self.state_full {
            return;
        }
        self.state_full = fill.full;
        self.hub.handle(now(), interface::Input::StateFull(fill.full));
        let text = if fill.full {
            "the memory for what survives a crash is nearly full: messages, puts, opens and offers are refused until what waits in mailboxes is read, or lower limits.mailbox-bytes-max"
        } else {
            "there is room again in the memory for what survives a crash"
        };
        self.log(None, text.to_owned());
    }

    pub(super) fn take_snapshot(&mut self) -> anyhow::Result<()> {
        let snapshot = self.hub.snapshot().to_bytes();
        self.snapshot_bytes = snapshot.len();
        self.journal
            .snapshot(&snapshot)
            .context("the hub's state does not fit its memory: lower the mailbox limits")?;
        self.tell_fill(self.fill());
        Ok(())
    }
}
