//! GARDEN, the front's link to the core: the channel and its order, who is told what in a core life, kicks, requests by message.
//!
//! In: the keeper's word about core lives, packets and kicks. Out: packets, `touched`. Must never know a client's bytes.

use super::*;

impl Front {
    pub(super) fn touch(&mut self, slot: usize) {
        if let Some(core) = &self.core {
            TouchedPage::new(core.touched.clone()).touch(slot);
            if LifePage::new(core.life_page.clone()).core_asleep() {
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
            core.to_core.borrow_mut().push_back(packet);
            core.wake_core.set(true);
        }
    }

    /// A core life begins.
    pub fn core_begins(&mut self, wires: Rc<Wires>) {
        self.queue.clear();
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
        client.kicked = LifePage::new(core.life_page.clone()).kicked(client.slot);
        let now = self.clock.now();
        client.function.handle(
            now,
            Input::CoreBegins {
                life: core.life,
                page: page.clone(),
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
                // The operator's wish comes by another way here.
                CoreToFront::Freeze { .. } => continue,
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
        let Some(core) = self.core.clone() else { return };
        let page = LifePage::new(core.life_page.clone());
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
}
