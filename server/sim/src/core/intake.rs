//! GARDEN, what comes into the core: packets of the front, results of workers.
//!
//! In: the channel, finished work. Out: inputs for the rooms. As `host/core/event_loop/intake.rs`.

use super::*;

impl Core {
    pub(super) fn take_packets(&mut self, now: Tick) {
        self.send_to_front();
        loop {
            self.outside.steps.access();
            let packet = self.outside.wires.to_core.borrow_mut().pop_front();
            match packet {
                Some(packet) => self.packet(packet, now),
                None => break,
            }
        }
        for session in self.sessions.map.values_mut() {
            session.memory.drained();
        }
    }

    fn packet(&mut self, packet: ToCore, now: Tick) {
        match packet {
            ToCore::Session {
                session,
                slot,
                vm,
                front,
                core,
                state,
            } => {
                let mortal = |words: SimWords| words.mortal(&self.outside.steps);
                let (front, core) = (FrontPage::new(mortal(front)), CorePage::new(mortal(core)));
                let settings = Settings {
                    session,
                    modes: Modes::default(),
                };
                let rings = match Rings::attach(settings, mortal(state), &front, &core) {
                    Ok(rings) => rings,
                    Err(error) => panic!("session {session} cannot be taken over: {error}"),
                };
                let memory = Reach::new(
                    session,
                    front.clone(),
                    core.clone(),
                    Rc::clone(&self.outside.steps),
                    self.outside.fault.get(),
                );
                let attached = Session {
                    slot,
                    vm,
                    front,
                    core,
                    rings,
                    memory,
                    vectors: Vec::new(),
                    touched: 0,
                    look: true,
                    active_until: Tick(0),
                    fence_handled: 0,
                    fenced_told: 0,
                    is_open: false,
                    ended: false,
                };
                self.sessions.map.insert(session, attached);
                self.hub
                    .handle(now, interface::Input::SessionOpened { session, vm });
            }
            ToCore::Object { session, object, ram } => {
                if let Some(session) = self.sessions.map.get_mut(&session) {
                    session.memory.object(object, ram);
                    session.look = true;
                }
            }
            ToCore::ObjectGone { session, object } => {
                if let Some(session) = self.sessions.map.get_mut(&session) {
                    session.memory.object_gone(object);
                }
            }
            ToCore::Vectors { session, eventfds } => {
                if let Some(session) = self.sessions.map.get_mut(&session) {
                    session.vectors = eventfds;
                    session.look = true;
                    for vector in 0..session.vectors.len() {
                        session.signal(vector, &self.outside.steps);
                    }
                }
            }
            ToCore::SessionGone { session } => self.end_session(session, now),
            ToCore::Adopted => {
                self.adopted = true;
                self.hub.handle(now, interface::Input::Adopted);
            }
            ToCore::Frozen {
                vm,
                until,
                request,
                kept,
            } => {
                self.freezes.handle_level(now, vm, until, request, kept);
                self.carry_freezes();
            }
            ToCore::DmaAnswer {
                session,
                request,
                error,
                data,
            } => {
                if let Some(session) = self.sessions.map.get_mut(&session) {
                    session.memory.handle_dma_answer(now, request, error, data);
                    session.look = true;
                }
                self.bulk.handle_memory();
            }
        }
    }

    fn end_session(&mut self, number: u64, now: Tick) {
        let Some(session) = self.sessions.map.get_mut(&number) else {
            return;
        };
        session.ended = true;
        self.watched.insert(number);
        // What the guest got, it got: the hub is to know before it hears of the end.
        session.handle(now, Input::End);
        self.bulk.void_channel(number, None);
        self.route(number, now);
        self.hub
            .handle(now, interface::Input::SessionClosed { session: number });
    }

    pub(super) fn take_finished(&mut self, now: Tick) {
        loop {
            let finished = self.outside.wires.finished.borrow_mut().pop_front();
            let Some((effect, done)) = finished else { break };
            let outcome = match done {
                Done::Opened {
                    inode,
                    stat,
                    identity,
                } => {
                    self.next_file += 1;
                    let generation = self.next_file;
                    let index = self.next_file % 64;
                    let mut index = index;
                    while self.files.contains_key(&index) {
                        index += 1;
                    }
                    self.files.insert(index, OpenFile { generation, inode });
                    Some(Outcome::Opened {
                        slot: FileSlot { index, generation },
                        stat,
                        identity,
                    })
                }
                done if self.bulk.has(effect) => self.bulk.handle_worker(effect, done),
                Done::Outcome(outcome) => Some(outcome),
                Done::Scratch(_) | Done::Stored { .. } | Done::Revoked => None,
            };
            if let Some(outcome) = outcome {
                self.hub
                    .handle(now, interface::Input::Outcome { effect, outcome });
            }
        }
    }
}
