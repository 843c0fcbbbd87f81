//! GARDEN, the front's shell: moves values between clients' bytes, the real connection codec, the real function and the core's wires, as
//! `host/front` does.
//!
//! In: bytes with descriptors of clients, kicks and packets of the core, the keeper's word about core lives. Out: bytes, packets, words.
//! Must never know: guest memory.

mod core_link;
mod hand_over;

use crate::clockwork::{Clock, SimWords, Steps};
use crate::faults::Fault;
use crate::limits::MAPS_MAX;
use crate::ram::{Complaints, Ram};
use crate::wires::{Eventfd, ToCore, Wires};
use hand_over::HandOver;
pub use hand_over::Successor;
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use vmgmt_abi::feature;
use vmgmt_device::Tick;
use vmgmt_device::page::{CorePage, FrontPage, LifePage, TouchedPage};
use vmgmt_device::registers::{Function, Input, MapObject, Output, Settings};
use vmgmt_device::rings::STATE_WORDS;
use vmgmt_host::front::frozen::Frozen;
use vmgmt_host::front::message_dma::{Answer, Ask, MessageDma};
use vmgmt_host::messages::CoreToFront;
use vmgmt_wire::{Command, Connection, DmaMap, Event, FdSlot, Reply, ReplyHandle, Request, ServerOffer};

/// A descriptor.
#[derive(Clone, Debug)]
pub enum Fd {
    Ram(Rc<Ram>),
    Event(Eventfd),
}

/// One client.
#[derive(Debug)]
pub struct Client {
    pub vm: u64,
    slot: usize,
    connection: Connection,
    pub function: Function<SimWords>,
    front_page: SimWords,
    pub state: SimWords,
    core_pages: BTreeMap<u64, SimWords>,
    dma: MessageDma,
    /// Memory key to object number.
    objects: BTreeMap<u32, (u64, Rc<Ram>)>,
    next_object: u64,
    descriptors: BTreeMap<u32, Fd>,
    next_descriptor: u32,
    stalled: Option<(ReplyHandle, DmaMap, MapObject)>,
    /// What the client has sent: bytes, and descriptors with the first of them.
    pub inbox: VecDeque<(Vec<u8>, Vec<Fd>)>,
    /// What it has not read yet.
    pub outbox: Vec<u8>,
    /// The client has closed its end: what it sent before is still read.
    hung_up: bool,
    closed: bool,
    pub gone: bool,
    told_life: Option<u64>,
    kicked: u64,
}

/// The front's process.
#[derive(Debug)]
pub struct Front {
    clock: Clock,
    complaints: Complaints,
    steps: Rc<Steps>,
    fault: Rc<Cell<Fault>>,
    pub clients: BTreeMap<u64, Client>,
    pub core: Option<Rc<Wires>>,
    queue: VecDeque<ToCore>,
    adopting: Option<VecDeque<u64>>,
    kicks_seen: u64,
    next_session: u64,
    asleep: bool,
    /// The product's: which VMs are frozen.
    pub frozen: Frozen,
    /// It has stopped, and another is to go on.
    stopped: Option<HandOver>,
    /// Hand-overs that came to their end, and those with a successor that served.
    pub handed_over: u64,
    pub succeeded: u64,
}

impl Front {
    pub fn new(clock: &Clock, complaints: &Complaints, steps: &Rc<Steps>, fault: &Rc<Cell<Fault>>) -> Self {
        Self {
            clock: clock.clone(),
            complaints: complaints.clone(),
            steps: Rc::clone(steps),
            fault: Rc::clone(fault),
            clients: BTreeMap::new(),
            core: None,
            queue: VecDeque::new(),
            adopting: None,
            kicks_seen: 0,
            next_session: 100,
            asleep: false,
            frozen: Frozen::default(),
            stopped: None,
            handed_over: 0,
            succeeded: 0,
        }
    }

    fn has(&self, fault: Fault) -> bool {
        self.fault.get() == fault
    }

    /// A VM's process connects, and is admitted.
    pub fn connect(&mut self, vm: u64, suppression: bool) -> u64 {
        // A connection waits in its listener until somebody serves.
        self.end_hand_over();
        self.next_session += 1;
        let session = self.next_session;
        let used: Vec<usize> = self.clients.values().map(|client| client.slot).collect();
        let slot = (0..).find(|slot| !used.contains(slot)).unwrap_or(0);
        let front_page = SimWords::new(FrontPage::<SimWords>::words_needed(MAPS_MAX));
        let features = feature::HOST_PAGE | feature::MODE_FILE | feature::MODE_CHAT;
        let settings = Settings {
            session,
            vm,
            pci_vendor: vmgmt_abi::PCI_VENDOR,
            pci_device: vmgmt_abi::PCI_DEVICE,
            msix: false,
            vectors: 4,
            rings: 4,
            maps_max: MAPS_MAX as u32,
            mapped_bytes_max: 1 << 30,
            objects_max: 8,
            features: features
                | if suppression {
                    feature::EVENT_SUPPRESSION
                } else {
                    0
                },
        };
        let mut function = match Function::new(settings, front_page.of_front(&self.steps)) {
            Ok(function) => function,
            Err(error) => panic!("{error}"),
        };
        if self.frozen.until(vm).is_some() {
            function.handle(self.clock.now(), Input::Freeze(true));
        }
        let client = Client {
            vm,
            slot,
            connection: Connection::new(),
            function,
            front_page,
            state: SimWords::new(STATE_WORDS),
            core_pages: BTreeMap::new(),
            dma: MessageDma::default(),
            objects: BTreeMap::new(),
            next_object: 1,
            descriptors: BTreeMap::new(),
            next_descriptor: 1,
            stalled: None,
            inbox: VecDeque::new(),
            outbox: Vec::new(),
            hung_up: false,
            closed: false,
            gone: false,
            told_life: None,
            kicked: 0,
        };
        self.clients.insert(session, client);
        self.tell_core(session);
        session
    }

    /// The client closes its socket. As with the real one, what it sent before comes before the end: also answers to message DMA.
    pub fn disconnect(&mut self, session: u64) {
        if let Some(client) = self.clients.get_mut(&session) {
            client.hung_up = true;
        }
    }

    /// All that a client sent was read, and it is not there any more.
    fn end(&mut self, session: u64) {
        let Some(client) = self.clients.get_mut(&session).filter(|client| !client.closed) else {
            return;
        };
        client.closed = true;
        client.inbox.clear();
        client.stalled = None;
        for slot in client.connection.take_descriptors() {
            client.descriptors.remove(&slot.0);
        }
        let answers = client.dma.drop_all(&mut client.connection);
        client.objects.clear();
        let told = client.told_life;
        self.answers(session, answers);
        self.input(session, Input::Gone);
        if self.core.as_ref().is_some_and(|core| told == Some(core.life)) {
            self.send(ToCore::SessionGone { session });
        }
    }

    /// It has something to do.
    #[must_use]
    pub fn is_runnable(&self) -> bool {
        let now = self.clock.now();
        if let Some(stopped) = &self.stopped {
            return stopped.until <= now;
        }
        let woken = self
            .core
            .as_ref()
            .is_some_and(|core| core.wake_front.get() || !core.to_front.borrow().is_empty());
        let waiting = self.clients.iter().any(|(session, client)| {
            let stalled = client.stalled.is_some();
            let readable = !client.inbox.is_empty() && !stalled && !client.closed;
            let ends = client.hung_up && !client.closed && !stalled;
            readable
                || ends
                || stalled && !self.has_object_waiting(*session)
                || client.function.poll_timeout() <= now
        });
        let flows = !self.queue.is_empty() && self.core.as_ref().is_some_and(|core| core.has_room());
        let freezes = self.frozen.deadline() <= now || self.can_tell_frozen();
        !self.asleep
            || woken
            || waiting
            || flows
            || freezes
            || self.adopting.is_some() && self.queue.is_empty()
    }

    /// It sleeps, was not woken, and the core has kicked since it looked.
    #[must_use]
    pub fn sleeps_on_a_kick(&self) -> bool {
        let Some(core) = &self.core else { return false };
        let kicks = LifePage::new(core.life_page.clone()).kicks();
        self.asleep && !self.is_stopped() && !core.wake_front.get() && kicks != self.kicks_seen
    }

    /// Bytes for clients that they have not read.
    #[must_use]
    pub fn bytes_out(&self) -> usize {
        self.clients.values().map(|client| client.outbox.len()).sum()
    }

    /// When it wants to be woken.
    #[must_use]
    pub fn due(&self) -> Option<Tick> {
        let due = self
            .clients
            .values()
            .map(|client| client.function.poll_timeout())
            .min();
        let due = match &self.stopped {
            Some(stopped) => Some(stopped.until),
            None => due.into_iter().chain([self.frozen.deadline()]).min(),
        };
        due.filter(|due| *due != Tick::NEVER)
    }

    /// One turn.
    pub fn turn(&mut self, bytes_max: usize) {
        match &self.stopped {
            Some(stopped) if stopped.until > self.clock.now() => return,
            Some(_) => self.end_hand_over(),
            None => {}
        }
        if let Some((touched, _)) = self.shared() {
            touched.set_front_asleep(false);
        }
        if let Some(core) = &self.core {
            core.wake_front.set(false);
        }
        self.flush_queue();
        self.adopt();
        self.packets();
        self.kicks();
        self.freezes();
        let now = self.clock.now();
        for session in self.sessions() {
            self.serve(session, bytes_max);
            let Some(client) = self.clients.get_mut(&session) else {
                continue;
            };
            if client.function.poll_timeout() <= now {
                client.function.handle_timeout(now);
                self.after(session);
            }
        }
        self.clients.retain(|_, client| !client.gone);
        self.asleep = match self.shared() {
            Some((touched, life)) => touched.front_falls_asleep(&life, self.kicks_seen),
            None => true,
        };
    }

    fn sessions(&self) -> Vec<u64> {
        self.clients.keys().copied().collect()
    }

    /// Reads what a client sent, at most so many bytes, and does it.
    pub fn serve(&mut self, session: u64, bytes_max: usize) {
        // Whoever waits for an answer waits until somebody serves.
        self.end_hand_over();
        if !self.finish_stalled(session) {
            return;
        }
        let Some(client) = self.clients.get_mut(&session).filter(|client| !client.closed) else {
            return;
        };
        if client.connection.wants_read()
            && let Some((bytes, fds)) = client.inbox.front_mut()
        {
            let mut slots = Vec::new();
            for fd in fds.drain(..) {
                let slot = client.next_descriptor;
                client.next_descriptor += 1;
                client.descriptors.insert(slot, fd);
                slots.push(FdSlot(slot));
            }
            let step = bytes_max.min(bytes.len());
            let part: Vec<u8> = bytes.drain(..step).collect();
            if bytes.is_empty() {
                client.inbox.pop_front();
            }
            client.connection.handle_read(&part, slots, false);
        }
        loop {
            let Some(client) = self.clients.get_mut(&session) else {
                return;
            };
            if client.stalled.is_some() {
                return;
            }
            self.clock.spend();
            let Some(event) = client.connection.poll_event() else {
                break;
            };
            self.event(session, event);
        }
        let Some(client) = self.clients.get_mut(&session) else {
            return;
        };
        let answers = client.dma.send(&mut client.connection);
        let over = client.hung_up && client.inbox.is_empty();
        self.answers(session, answers);
        self.flush(session);
        if over {
            self.end(session);
        }
    }

    fn event(&mut self, session: u64, event: Event) {
        let unmaps = matches!(
            &event,
            Event::Request(Request {
                command: Command::DmaUnmap(_),
                ..
            })
        );
        if unmaps && self.has(Fault::PanicsInFront) {
            panic!("a deliberate mistake");
        }
        while unmaps && self.has(Fault::NeverEnds) {
            self.clock.spend();
        }
        let Some(client) = self.clients.get_mut(&session) else {
            return;
        };
        match event {
            Event::Request(Request {
                handle,
                command: Command::Version(_),
            }) => {
                let offer = ServerOffer {
                    max_dma_maps: client.function.settings().maps_max,
                    ..ServerOffer::default()
                };
                if client.connection.accept_version(&handle, &offer).is_err() {
                    self.complaints.add("VERSION was not accepted".into());
                }
            }
            Event::Request(Request {
                handle,
                command: Command::DmaMap(map),
            }) => self.map(session, handle, map),
            Event::Request(Request { handle, command }) => {
                self.input(session, Input::Command { handle, command });
            }
            Event::DmaReply(reply) => {
                let mut answers: Vec<Answer> = client.dma.answered(reply).into_iter().collect();
                answers.extend(client.dma.send(&mut client.connection));
                self.answers(session, answers);
            }
            Event::Refused { command, refusal } => {
                self.complaints.add(format!(
                    "session {session}: command {command} was refused: {refusal}"
                ));
            }
            Event::CloseDescriptor(slot) => {
                client.descriptors.remove(&slot.0);
            }
            Event::Failed(error) => {
                self.complaints
                    .add(format!("session {session}: the stream failed: {error}"));
            }
        }
    }

    fn map(&mut self, session: u64, handle: ReplyHandle, map: DmaMap) {
        let Some(client) = self.clients.get_mut(&session) else {
            return;
        };
        let fd = map.descriptor.and_then(|slot| client.descriptors.remove(&slot.0));
        let Some(Fd::Ram(ram)) = fd else {
            return self.input(
                session,
                Input::Map {
                    handle,
                    map,
                    object: None,
                },
            );
        };
        let known = client.objects.get(&ram.key).map(|(number, _)| *number);
        let number = known.unwrap_or(client.next_object);
        let object = MapObject { number, rights: 3 };
        if known.is_none() {
            client.next_object += 1;
            client.objects.insert(ram.key, (number, Rc::clone(&ram)));
            let told = client.told_life;
            if self.core.as_ref().is_some_and(|core| told == Some(core.life)) {
                self.send(ToCore::Object {
                    session,
                    object: number,
                    ram,
                });
                if !self.queue.is_empty() {
                    if let Some(client) = self.clients.get_mut(&session) {
                        client.stalled = Some((handle, map, object));
                    }
                    return;
                }
            }
        }
        self.input(
            session,
            Input::Map {
                handle,
                map,
                object: Some(object),
            },
        );
    }

    /// An object of this session is still to be sent.
    fn has_object_waiting(&self, session: u64) -> bool {
        let of_session =
            |packet: &ToCore| matches!(packet, ToCore::Object { session: of, .. } if *of == session);
        self.core.is_some() && self.queue.iter().any(of_session)
    }

    fn finish_stalled(&mut self, session: u64) -> bool {
        let behind = self.has_object_waiting(session);
        let Some(client) = self.clients.get_mut(&session) else {
            return false;
        };
        if client.stalled.is_some() && behind {
            return false;
        }
        if let Some((handle, map, object)) = client.stalled.take() {
            self.input(
                session,
                Input::Map {
                    handle,
                    map,
                    object: Some(object),
                },
            );
        }
        true
    }

    fn input(&mut self, session: u64, input: Input<SimWords>) {
        let now = self.clock.now();
        let Some(client) = self.clients.get_mut(&session) else {
            return;
        };
        let fence = client.function.fence();
        client
            .function
            .set_messages_out(client.connection.dma_outstanding() > 0);
        client.function.handle(now, input);
        if client.function.fence() != fence {
            let answers = client.dma.fence(&mut client.connection);
            self.answers(session, answers);
        }
        self.after(session);
    }

    fn after(&mut self, session: u64) {
        loop {
            let Some(client) = self.clients.get_mut(&session) else {
                return;
            };
            self.clock.spend();
            let Some(output) = client.function.poll_output() else {
                break;
            };
            match output {
                Output::Reply { handle, reply } => self.reply(session, &handle, &reply),
                Output::GiveUp { handle } => {
                    client.connection.forget_reply(&handle);
                    self.complaints.add(format!(
                        "session {session}: a reply was given up: its fence did not pass in time"
                    ));
                }
                Output::Touched => {
                    let slot = client.slot;
                    if !self.has(Fault::ForgetsToTouch) {
                        self.touch(slot);
                    }
                }
                Output::Signal(slot) => {
                    if let Some(Fd::Event(fd)) = client.descriptors.get(&slot.0) {
                        self.steps.front_access();
                        fd.set(fd.get() + 1);
                    }
                }
                Output::Close(slot) => {
                    client.descriptors.remove(&slot.0);
                }
                Output::Vectors { .. } => self.send_vectors(session),
                Output::WatchUnmask(_) => {}
                Output::ObjectGone(object) => {
                    client.objects.retain(|_, (number, _)| *number != object);
                    let told = client.told_life;
                    if self.core.as_ref().is_some_and(|core| told == Some(core.life)) {
                        self.send(ToCore::ObjectGone { session, object });
                    }
                }
                Output::Gone => {
                    client.descriptors.clear();
                    client.gone = true;
                }
            }
        }
        self.flush(session);
    }

    fn reply(&mut self, session: u64, handle: &ReplyHandle, reply: &Reply) {
        let Some(client) = self.clients.get_mut(&session) else {
            return;
        };
        if client.connection.reply(handle, reply).is_err() {
            self.complaints
                .add(format!("session {session}: {reply:?} does not answer {handle:?}"));
        }
    }

    fn flush(&mut self, session: u64) {
        let Some(client) = self.clients.get_mut(&session).filter(|client| !client.closed) else {
            return;
        };
        while let Some(pending) = client.connection.pending_output() {
            let bytes = pending.bytes.len();
            client.outbox.extend_from_slice(pending.bytes);
            client.connection.advance_output(bytes);
        }
    }

    fn send_vectors(&mut self, session: u64) {
        let Some(client) = self.clients.get(&session) else {
            return;
        };
        let (present, slots) = client.function.vectors();
        let mut slots = slots.into_iter();
        let eventfds = (0..u32::BITS)
            .map(|vector| {
                let slot = (present & (1 << vector) != 0).then(|| slots.next()).flatten()?;
                match client.descriptors.get(&slot.0) {
                    Some(Fd::Event(fd)) => Some(Rc::clone(fd)),
                    _ => None,
                }
            })
            .collect();
        let told = client.told_life;
        if self.core.as_ref().is_some_and(|core| told == Some(core.life)) {
            self.send(ToCore::Vectors { session, eventfds });
        }
    }

    fn answers(&mut self, session: u64, answers: Vec<Answer>) {
        let Some(life) = self.core.as_ref().map(|core| core.life) else {
            return;
        };
        for answer in answers.into_iter().filter(|answer| answer.life == life) {
            self.send(ToCore::DmaAnswer {
                session,
                request: answer.request,
                error: answer.error.0,
                data: answer.data,
            });
        }
    }
}
