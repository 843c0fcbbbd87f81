//! GARDEN, the front's link to the core: the channel and its order, who is told what in a core life, kicks, requests by message.
//!
//! In: the keeper's word about core lives, packets and kicks. Out: packets, `touched`. Must never know a client's bytes.

use super::*;

impl Front {
    /// The pages of this core life, as the front sees them.
    pub(super) fn shared(&self) -> Option<(TouchedPage<SimWords>, LifePage<SimWords>)> {
        let core = self.core.as_ref()?;
        Some((
            TouchedPage::new(core.touched.of_front(&self.steps)),
            LifePage::new(core.life_page.of_front(&self.steps)),
        ))
    }

    pub(super) fn touch(&mut self, slot: usize) {
        if let Some((touched, life)) = self.shared() {
            let early = self.has(Fault::WakesTooEarly) && life.must_wake_core();
            touched.touch(slot);
            if (early || !self.has(Fault::WakesTooEarly) && life.must_wake_core())
                && let Some(core) = &self.core
            {
                core.wake_core.set(true);
            }
        }
    }

    pub(super) fn send(&mut self, packet: ToCore) {
        self.queue.push_back(packet);
        self.flush_queue();
    }

    pub(super) fn flush_queue(&mut self) {
        let Some(core) = &self.core else {
            return self.queue.clear();
        };
        while core.has_room() {
            let Some(packet) = self.queue.pop_front() else {
                break;
            };
            self.steps.front_access();
            core.to_core.borrow_mut().push_back(packet);
            core.wake_core.set(true);
        }
    }

    /// A core life begins.
    pub fn core_begins(&mut self, wires: Rc<Wires>) {
        self.queue.clear();
        let then = self.clock.now().after_ns(crate::limits::FREEZE_ORPHANED_NS);
        self.frozen.core_gone(then);
        self.kicks_seen = 0;
        self.core = Some(wires);
        self.adopting = Some(self.sessions().into());
        self.asleep = false;
    }

    /// A core life is dead for guest memory.
    pub fn core_dead(&mut self, life: u64) {
        if self.core.as_ref().is_some_and(|core| core.life == life) {
            self.core = None;
            self.queue.clear();
            let then = self.clock.now().after_ns(crate::limits::FREEZE_ORPHANED_NS);
            self.frozen.core_gone(then);
            self.adopting = None;
        }
        for session in self.sessions() {
            if let Some(client) = self.clients.get_mut(&session) {
                if client.told_life == Some(life) {
                    client.dma.drop_all(&mut client.connection);
                }
                client.core_pages.remove(&life);
            }
            self.input(session, Input::CoreDead { life });
        }
    }

    pub(super) fn adopt(&mut self) {
        while self.queue.is_empty() {
            match self.adopting.as_mut().map(VecDeque::pop_front) {
                None => return,
                Some(Some(session)) => self.tell_core(session),
                Some(None) => {
                    self.adopting = None;
                    for (vm, _) in self.frozen.all() {
                        self.tell_frozen(vm, 0);
                    }
                    self.send(ToCore::Adopted);
                }
            }
        }
    }

    pub(super) fn tell_core(&mut self, session: u64) {
        let Some(core) = self.core.clone() else { return };
        let Some(client) = self.clients.get_mut(&session) else {
            return;
        };
        if client.closed || client.told_life == Some(core.life) {
            return;
        }
        let page = SimWords::new(CorePage::<SimWords>::WORDS);
        client.core_pages.insert(core.life, page.clone());
        client.told_life = Some(core.life);
        client.kicked = LifePage::new(core.life_page.of_front(&self.steps)).kicked(client.slot);
        let now = self.clock.now();
        client.function.handle(
            now,
            Input::CoreBegins {
                life: core.life,
                page: page.of_front(&self.steps),
            },
        );
        let packet = ToCore::Session {
            session,
            slot: client.slot,
            vm: client.vm,
            front: client.front_page.clone(),
            core: page,
            state: client.state.clone(),
        };
        let objects: Vec<_> = client.objects.values().cloned().collect();
        self.send(packet);
        for (object, ram) in objects {
            self.send(ToCore::Object { session, object, ram });
        }
        self.send_vectors(session);
        self.after(session);
    }

    pub(super) fn packets(&mut self) {
        loop {
            let packet = self
                .core
                .as_ref()
                .and_then(|core| core.to_front.borrow_mut().pop_front());
            let Some((message, payload)) = packet else { return };
            let (session, request, fence, ask) = match message {
                CoreToFront::DmaRead {
                    session,
                    request,
                    fence,
                    iova,
                    bytes,
                } => (session, request, fence, Ask::Read { iova, bytes }),
                CoreToFront::DmaWrite {
                    session,
                    request,
                    fence,
                    iova,
                } => (session, request, fence, Ask::Write { iova, data: payload }),
                CoreToFront::Freeze {
                    vm,
                    until,
                    request,
                    kept,
                } => {
                    self.freeze(vm, until, request, kept);
                    continue;
                }
            };
            let Some(client) = self.clients.get_mut(&session).filter(|client| !client.closed) else {
                continue;
            };
            let Some(life) = client.told_life else { continue };
            let answers = if fence < client.function.fence() {
                vec![Answer::again(life, request)]
            } else {
                client.dma.ask(&mut client.connection, life, request, ask)
            };
            self.answers(session, answers);
            self.flush(session);
        }
    }

    pub(super) fn kicks(&mut self) {
        let Some((_, page)) = self.shared() else { return };
        let kicks = page.kicks();
        if std::mem::replace(&mut self.kicks_seen, kicks) == kicks {
            return;
        }
        for session in self.sessions() {
            let Some(client) = self.clients.get_mut(&session) else {
                continue;
            };
            let kicked = page.kicked(client.slot);
            if std::mem::replace(&mut client.kicked, kicked) != kicked {
                self.input(session, Input::Kicked);
            }
        }
    }

    /// The operator's wish, as in `host/front/server_core.rs`: a level that outlives sessions and core lives.
    fn freeze(&mut self, vm: u64, until: Option<Tick>, request: u64, kept: Option<bool>) {
        if kept == Some(true) {
            self.frozen.keep(vm);
            return self.tell_frozen(vm, request);
        }
        self.frozen.set(vm, until, kept.is_none());
        let until = self.frozen.until(vm);
        if until.is_none() {
            self.frozen.asked.retain(|(asked, _)| *asked != vm);
        }
        let of_vm = self.clients.iter().filter(|(_, client)| client.vm == vm);
        for session in of_vm.map(|(session, _)| *session).collect::<Vec<_>>() {
            self.input(session, Input::Freeze(until.is_some()));
        }
        match until {
            Some(_) => self.frozen.asked.push((vm, request)),
            None => self.tell_frozen(vm, request),
        }
    }

    /// Lets those go whose time is over, and answers where no client has a message of ours any more.
    pub(super) fn freezes(&mut self) {
        let now = self.clock.now();
        while let Some(vm) = self.frozen.due(now) {
            self.freeze(vm, None, 0, None);
        }
        for (vm, request) in std::mem::take(&mut self.frozen.asked) {
            if self.has_messages_out(vm) {
                self.frozen.asked.push((vm, request));
            } else {
                self.tell_frozen(vm, request);
            }
        }
    }

    /// A freeze that is asked for can be answered.
    pub(super) fn can_tell_frozen(&self) -> bool {
        let mut asked = self.frozen.asked.iter();
        asked.any(|(vm, _)| !self.has_messages_out(*vm))
    }

    fn has_messages_out(&self, vm: u64) -> bool {
        let mut of_vm = self.clients.values().filter(|client| client.vm == vm);
        of_vm.any(|client| !client.closed && client.connection.dma_outstanding() > 0)
    }

    fn tell_frozen(&mut self, vm: u64, request: u64) {
        let (until, kept) = (self.frozen.until(vm), self.frozen.is_kept(vm));
        self.send(ToCore::Frozen {
            vm,
            until,
            request,
            kept,
        });
    }
}
