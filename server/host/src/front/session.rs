//! One client: its socket, its connection, its function, and what they say to each other and to the core.
//!
//! In: readiness of the socket, the keeper's verdict, kicks, core lives, answers of time. Out: bytes on the socket, packets for the core,
//! signals. Must never know: another session.

use super::core_link::CoreLink;
use super::descriptors::{Descriptors, Interned, Objects, accept_eventfd};
use super::limits;
use super::log_budget::LogBudget;
use super::message_dma::{Answer, Ask, MessageDma};
use super::socket::{self, Read};
use crate::messages::FrontToCore;
use crate::words::{MappedWords, create_page};
use rustix::fd::OwnedFd;
use std::rc::Rc;
use vmgmt_device::Tick;
use vmgmt_device::page::CorePage;
use vmgmt_device::registers::{Function, Input, MapObject, Output};
use vmgmt_wire::{
    Command, Connection, DmaMap, Errno, Event, FdSlot, IrqOperation, Phase, Reply, ReplyHandle, Request,
    ServerOffer,
};

/// What the keeper says about a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Admission {
    /// It was asked; nothing is read or answered.
    Asked,
    /// There is a device.
    Admitted,
    /// VERSION is answered with an error.
    Refused,
}

/// The device of an admitted session.
#[derive(Debug)]
struct Device {
    function: Function<MappedWords>,
    /// For each core life: the front page to read, and the session's state.
    front_page: Rc<OwnedFd>,
    state: Rc<OwnedFd>,
}

/// What a session may use of the front while it is served.
pub struct Outside<'a> {
    pub now: Tick,
    pub core: Option<&'a mut CoreLink>,
    pub buffer: &'a mut [u8],
}

/// A client.
#[derive(Debug)]
pub struct Session {
    pub number: u64,
    /// Slot on the shared pages.
    pub slot: usize,
    pub listener: u32,
    pub vm: u64,
    pub admission: Admission,
    /// For the log: the VM's name, or who connected.
    pub name: String,
    /// Until the session ends.
    pub socket: Option<OwnedFd>,
    pub readable: bool,
    pub writable: bool,
    /// It is in the front's list of those that can go on.
    pub queued: bool,
    /// Its entry in the front's list of deadlines.
    pub deadline: Tick,
    /// The eventfd that unmasks INTx: to be watched from now on, or no more. Taken by the front.
    pub watch_unmask: Option<Option<Rc<OwnedFd>>>,
    /// Everything may be freed.
    pub done: bool,
    /// The core life that was told of this session.
    told_life: Option<u64>,
    kicked: u64,
    connection: Connection,
    device: Option<Device>,
    descriptors: Descriptors,
    objects: Objects,
    dma: MessageDma,
    /// A map whose object is not with the core yet; what follows waits.
    stalled_map: Option<(ReplyHandle, DmaMap, MapObject)>,
    accepted_at: Tick,
    held_back_since: Option<Tick>,
    log: LogBudget,
}

impl Session {
    pub fn new(now: Tick, number: u64, slot: usize, listener: u32, name: String, socket: OwnedFd) -> Self {
        Self {
            number,
            slot,
            listener,
            vm: 0,
            admission: Admission::Asked,
            name,
            socket: Some(socket),
            readable: true,
            writable: true,
            queued: false,
            deadline: Tick::NEVER,
            watch_unmask: None,
            done: false,
            told_life: None,
            kicked: 0,
            connection: Connection::new(),
            device: None,
            descriptors: Descriptors::default(),
            objects: Objects::new(),
            dma: MessageDma::default(),
            stalled_map: None,
            accepted_at: now,
            held_back_since: None,
            log: LogBudget::new(now),
        }
    }

    /// The keeper let it in.
    pub fn admit(
        &mut self,
        outside: &mut Outside<'_>,
        vm: u64,
        name: String,
        function: Function<MappedWords>,
        front_page: OwnedFd,
        state: OwnedFd,
    ) {
        self.admission = Admission::Admitted;
        self.vm = vm;
        self.name = name;
        self.device = Some(Device {
            function,
            front_page: Rc::new(front_page),
            state: Rc::new(state),
        });
        self.tell_core(outside);
    }

    /// The keeper did not.
    pub fn refuse(&mut self, reason: &str) {
        tracing::warn!(session = self.number, client = %self.name, reason, "connection refused");
        self.admission = Admission::Refused;
    }

    /// Tells the core life in service of this session, once.
    pub fn tell_core(&mut self, outside: &mut Outside<'_>) {
        let Some(core) = outside.core.as_deref_mut() else {
            return;
        };
        if self.device.is_none() || self.socket.is_none() || self.told_life == Some(core.life) {
            return;
        }
        if let Err(error) = self.try_tell_core(outside.now, core) {
            tracing::error!(session = self.number, client = %self.name, %error, "no page for the core: the session is closed");
            self.end(outside, "no memory for its page");
            return;
        }
        self.after_function(outside);
    }

    fn try_tell_core(&mut self, now: Tick, core: &mut CoreLink) -> anyhow::Result<()> {
        let Some(device) = &mut self.device else {
            return Ok(());
        };
        let (core_page, _) = create_page("vmgmt core page", CorePage::<MappedWords>::WORDS)?;
        let page = MappedWords::writable(&core_page)?;
        device.function.handle(
            now,
            Input::CoreBegins {
                life: core.life,
                page,
            },
        );
        self.told_life = Some(core.life);
        self.kicked = core.kicked(self.slot);
        let (session, vm) = (self.number, self.vm);
        let slot = u32::try_from(self.slot)?;
        let fds = vec![
            device.front_page.clone(),
            Rc::new(core_page),
            device.state.clone(),
        ];
        core.outbox
            .send(FrontToCore::Session { session, slot, vm }, Vec::new(), fds);
        for (number, object) in self.objects.iter() {
            let message = FrontToCore::Object {
                session,
                object: number,
                writable: object.writable,
            };
            core.outbox.send(message, Vec::new(), vec![object.fd.clone()]);
        }
        let (present, eventfds) = device.function.vectors();
        if present != 0 {
            let fds = eventfds
                .iter()
                .filter_map(|slot| self.descriptors.get(*slot).cloned())
                .collect();
            core.outbox
                .send(FrontToCore::Vectors { session, present }, Vec::new(), fds);
        }
        Ok(())
    }

    /// A core life is dead for guest memory.
    pub fn core_dead(&mut self, outside: &mut Outside<'_>, life: u64) {
        if self.told_life == Some(life) {
            self.dma.drop_all(&mut self.connection);
        }
        self.input(outside, Input::CoreDead { life });
    }

    /// The core may have kicked this session.
    pub fn kicks(&mut self, outside: &mut Outside<'_>) {
        let Some(core) = outside.core.as_deref() else {
            return;
        };
        let kicked = core.kicked(self.slot);
        if std::mem::replace(&mut self.kicked, kicked) != kicked {
            self.input(outside, Input::Kicked);
        }
    }

    /// The eventfd that unmasks INTx was signalled.
    pub fn unmask_signalled(&mut self, outside: &mut Outside<'_>, fd: &OwnedFd) {
        let mut count = [0; 8];
        if rustix::io::read(fd, &mut count).is_ok() {
            self.input(outside, Input::UnmaskSignalled);
        }
    }

    /// The core asks for guest memory by messages.
    pub fn message_dma(&mut self, outside: &mut Outside<'_>, request: u64, ask: Ask) {
        let Some(life) = self.told_life.filter(|_| self.socket.is_some()) else {
            return;
        };
        let answers = self.dma.ask(&mut self.connection, life, request, ask);
        self.tell_answers(outside, answers);
        self.flush(outside);
    }

    /// Serves the client: at most [`limits::REQUESTS_PER_TURN_MAX`] requests. True: there is more to do at once.
    pub fn work(&mut self, outside: &mut Outside<'_>) -> bool {
        if self.socket.is_none() || self.admission == Admission::Asked {
            return false;
        }
        self.flush(outside);
        if !self.finish_stalled_map(outside) {
            return false;
        }
        let mut requests = 0;
        let mut reads = 0;
        loop {
            while let Some(event) = self.connection.poll_event() {
                self.event(outside, event);
                requests += 1;
                if self.socket.is_none() || self.stalled_map.is_some() {
                    return false;
                }
                if requests >= limits::REQUESTS_PER_TURN_MAX {
                    self.flush(outside);
                    return true;
                }
            }
            self.flush(outside);
            if self.connection.should_close() {
                self.end(outside, "refused");
                return false;
            }
            if !self.readable || self.socket.is_none() || !self.connection.wants_read() {
                return false;
            }
            if reads >= limits::READS_PER_TURN_MAX {
                return true;
            }
            reads += 1;
            self.read(outside);
        }
    }

    /// Looks at all that is due at `outside.now`.
    pub fn timeout(&mut self, outside: &mut Outside<'_>) {
        let now = outside.now;
        if let Some(device) = &mut self.device
            && device.function.poll_timeout() <= now
        {
            device.function.handle_timeout(now);
            self.after_function(outside);
        }
        if self.socket.is_none() {
            return;
        }
        if self.version_deadline() <= now {
            self.end(outside, "it did not negotiate");
        } else if self
            .held_back_since
            .is_some_and(|since| now.since_ns(since) >= limits::HELD_BACK_NS_MAX)
        {
            self.end(outside, "it does not read its answers");
        }
    }

    /// When [`Session::timeout`] is to be called.
    pub fn next_deadline(&self) -> Tick {
        let function = self
            .device
            .as_ref()
            .map_or(Tick::NEVER, |device| device.function.poll_timeout());
        if self.socket.is_none() {
            return function;
        }
        let held_back = self
            .held_back_since
            .map_or(Tick::NEVER, |since| since.after_ns(limits::HELD_BACK_NS_MAX));
        function.min(held_back).min(self.version_deadline())
    }

    /// Something waits for the core.
    pub fn waits_for_core(&self) -> bool {
        self.device
            .as_ref()
            .is_some_and(|device| device.function.waits_for_core())
    }

    /// Ends the session: the socket is closed now, the rest is let go when its fence has passed.
    pub fn end(&mut self, outside: &mut Outside<'_>, reason: &str) {
        if self.socket.take().is_none() {
            return;
        }
        tracing::info!(session = self.number, vm = self.vm, client = %self.name, reason, "session ends");
        self.readable = false;
        self.stalled_map = None;
        for slot in self.connection.take_descriptors() {
            self.descriptors.remove(slot);
        }
        let answers = self.dma.drop_all(&mut self.connection);
        self.tell_answers(outside, answers);
        self.objects.clear();
        if self.device.is_none() {
            self.done = true;
            return;
        }
        self.input(outside, Input::Gone);
        let told = self.told_life;
        if let Some(core) = outside.core.as_deref_mut().filter(|core| told == Some(core.life)) {
            core.outbox.send(
                FrontToCore::SessionGone { session: self.number },
                Vec::new(),
                Vec::new(),
            );
        }
    }

    /// After a panic of ours in this session: nothing of it is trusted any more but that it must end.
    pub fn abandon(&mut self) {
        self.socket = None;
        self.readable = false;
        self.stalled_map = None;
    }

    // ---- the client's side

    fn read(&mut self, outside: &mut Outside<'_>) {
        let Some(socket) = &self.socket else { return };
        match socket::read(socket, outside.buffer) {
            Read::Nothing => self.readable = false,
            Read::Closed => self.end(outside, "the client closed the connection"),
            Read::Bytes { bytes, fds, fds_lost } => {
                let slots = fds.into_iter().map(|fd| self.descriptors.insert(fd)).collect();
                let bytes = outside.buffer.get(..bytes).unwrap_or_default();
                self.connection.handle_read(bytes, slots, fds_lost);
            }
        }
    }

    /// Sends what is to be sent, as far as the client takes it.
    fn flush(&mut self, outside: &mut Outside<'_>) {
        while let (true, Some(socket), Some(output)) =
            (self.writable, &self.socket, self.connection.pending_output())
        {
            // No answer of this device carries descriptors: there is no region to map.
            match socket::write(socket, output.bytes) {
                Ok(Some(sent)) => self.connection.advance_output(sent),
                Ok(None) => self.writable = false,
                Err(_) => return self.end(outside, "the client closed the connection"),
            }
        }
        let held_back = self.connection.output_bytes() > vmgmt_wire::limits::OUTPUT_BYTES_HIGH;
        self.held_back_since = held_back.then(|| self.held_back_since.unwrap_or(outside.now));
    }

    fn event(&mut self, outside: &mut Outside<'_>, event: Event) {
        match event {
            Event::Request(Request {
                handle,
                command: Command::Version(_),
            }) => self.version(&handle),
            Event::Request(Request {
                handle,
                command: Command::DmaMap(map),
            }) => self.map(outside, handle, map),
            Event::Request(Request { handle, command }) => self.command(outside, handle, command),
            Event::DmaReply(reply) => {
                let mut answers: Vec<Answer> = self.dma.answered(reply).into_iter().collect();
                answers.extend(self.dma.send(&mut self.connection));
                self.tell_answers(outside, answers);
            }
            Event::Refused { command, refusal } => {
                self.complain(outside.now, &format!("command {command} refused: {refusal}"));
            }
            Event::CloseDescriptor(slot) => {
                self.descriptors.remove(slot);
            }
            Event::Failed(error) => {
                self.complain(outside.now, &format!("the stream cannot go on: {error}"));
                self.end(outside, "protocol error");
            }
        }
    }

    fn version(&mut self, handle: &ReplyHandle) {
        let Some(device) = &self.device else {
            self.send_reply(handle, &Reply::Error(Errno::EACCES));
            return;
        };
        let offer = ServerOffer {
            max_dma_maps: device.function.settings().maps_max,
            ..ServerOffer::default()
        };
        if self.connection.accept_version(handle, &offer).is_err() {
            self.send_reply(handle, &Reply::Error(Errno::EINVAL));
        }
    }

    fn command(&mut self, outside: &mut Outside<'_>, handle: ReplyHandle, command: Command) {
        if let Command::DeviceSetIrqs(request) = &command
            && let IrqOperation::Assign { eventfds, .. } = &request.operation
            && !eventfds
                .iter()
                .all(|slot| self.descriptors.get(*slot).is_some_and(|fd| accept_eventfd(fd)))
        {
            for slot in eventfds {
                self.descriptors.remove(*slot);
            }
            self.complain(outside.now, "SET_IRQS with a descriptor that is no eventfd");
            self.send_reply(&handle, &Reply::Error(Errno::EINVAL));
            return;
        }
        self.input(outside, Input::Command { handle, command });
    }

    /// DMA_MAP: its descriptor becomes an object that the core knows before the map is seen.
    fn map(&mut self, outside: &mut Outside<'_>, handle: ReplyHandle, map: DmaMap) {
        let fd = map.descriptor.and_then(|slot| self.descriptors.remove(slot));
        let Some(fd) = fd else {
            self.input(
                outside,
                Input::Map {
                    handle,
                    map,
                    object: None,
                },
            );
            return;
        };
        match self.look(&map, &fd) {
            Ok(interned) => {
                let object = interned.object;
                if interned.is_new {
                    self.objects.insert(&interned, fd.clone());
                    if self.send_object(outside, object.number, fd) {
                        self.stalled_map = Some((handle, map, object));
                        return;
                    }
                } else {
                    // Closed before the answer: a client may count on it.
                    drop(fd);
                }
                self.input(
                    outside,
                    Input::Map {
                        handle,
                        map,
                        object: Some(object),
                    },
                );
            }
            Err(errno) => {
                drop(fd);
                let (start, bytes) = (map.range.start(), map.range.bytes());
                self.complain(
                    outside.now,
                    &format!("map of {bytes:#x} bytes at {start:#x} refused: {errno}"),
                );
                self.send_reply(&handle, &Reply::Error(errno));
            }
        }
    }

    fn look(&self, map: &DmaMap, fd: &OwnedFd) -> Result<Interned, Errno> {
        let interned = self.objects.look(map, fd)?;
        let device = self.device.as_ref().ok_or(Errno::ENODEV)?;
        let asks = (map.readable && interned.object.rights & 1 != 0)
            || (map.writable && interned.object.rights & 2 != 0);
        if !asks {
            return Err(Errno::EACCES);
        }
        device.function.check_map(map, interned.object.number)?;
        Ok(interned)
    }

    /// Sends an object to the core that knows this session. True: it waits in the queue.
    fn send_object(&self, outside: &mut Outside<'_>, object: u64, fd: Rc<OwnedFd>) -> bool {
        let Some(core) = outside.core.as_deref_mut() else {
            return false;
        };
        if self.told_life != Some(core.life) {
            return false;
        }
        let writable = self
            .objects
            .iter()
            .any(|(number, known)| number == object && known.writable);
        core.outbox.send(
            FrontToCore::Object {
                session: self.number,
                object,
                writable,
            },
            Vec::new(),
            vec![fd],
        );
        !core.outbox.is_empty()
    }

    /// Goes on with a map whose object waited. False: it still does.
    fn finish_stalled_map(&mut self, outside: &mut Outside<'_>) -> bool {
        if self.stalled_map.is_some()
            && outside
                .core
                .as_deref()
                .is_some_and(|core| !core.outbox.is_empty())
        {
            return false;
        }
        if let Some((handle, map, object)) = self.stalled_map.take() {
            self.input(
                outside,
                Input::Map {
                    handle,
                    map,
                    object: Some(object),
                },
            );
        }
        true
    }

    fn send_reply(&mut self, handle: &ReplyHandle, reply: &Reply) {
        // Not owed: the client wanted none. A mismatch would be our own bug; QEMU survives no reply.
        let _ = self.connection.reply(handle, reply);
    }

    // ---- the function's side

    /// Hands an input to the function and does what it says.
    pub fn input(&mut self, outside: &mut Outside<'_>, input: Input<MappedWords>) {
        let Some(device) = &mut self.device else { return };
        let fence = device.function.fence();
        device.function.handle(outside.now, input);
        if device.function.fence() != fence {
            let answers = self.dma.drop_all(&mut self.connection);
            self.tell_answers(outside, answers);
        }
        self.after_function(outside);
    }

    fn after_function(&mut self, outside: &mut Outside<'_>) {
        while let Some(output) = self
            .device
            .as_mut()
            .and_then(|device| device.function.poll_output())
        {
            self.output(outside, output);
        }
        self.flush(outside);
    }

    fn output(&mut self, outside: &mut Outside<'_>, output: Output) {
        match output {
            Output::Reply { handle, reply } => {
                if let Reply::Error(errno) = &reply {
                    self.complain(
                        outside.now,
                        &format!("command {} answered with {errno}", handle.command),
                    );
                }
                self.send_reply(&handle, &reply);
            }
            Output::GiveUp { handle } => {
                self.connection.forget_reply(&handle);
                self.complain(
                    outside.now,
                    "the core did not end its DMA in time: no reply is sent",
                );
            }
            Output::Touched => {
                if let Some(core) = outside.core.as_deref_mut() {
                    core.touch(outside.now, self.slot);
                }
            }
            Output::Signal(slot) => self.signal(slot),
            Output::Close(slot) => {
                self.descriptors.remove(slot);
            }
            Output::Vectors { present, eventfds } => {
                let fds: Vec<_> = eventfds
                    .iter()
                    .filter_map(|slot| self.descriptors.get(*slot).cloned())
                    .collect();
                self.tell(
                    outside,
                    FrontToCore::Vectors {
                        session: self.number,
                        present,
                    },
                    fds,
                );
            }
            Output::WatchUnmask(slot) => {
                self.watch_unmask = Some(slot.and_then(|slot| self.descriptors.get(slot).cloned()));
            }
            Output::ObjectGone(object) => {
                self.objects.remove(object);
                self.tell(
                    outside,
                    FrontToCore::ObjectGone {
                        session: self.number,
                        object,
                    },
                    Vec::new(),
                );
            }
            Output::Gone => {
                self.descriptors.clear();
                self.done = true;
            }
        }
    }

    fn signal(&self, slot: FdSlot) {
        if let Some(fd) = self.descriptors.get(slot) {
            // A full counter is as good as a signal; a closed reader hears nothing either way.
            let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
        }
    }

    /// A packet for the core, if it knows this session.
    fn tell(&self, outside: &mut Outside<'_>, message: FrontToCore, fds: Vec<Rc<OwnedFd>>) {
        let told = self.told_life;
        if let Some(core) = outside.core.as_deref_mut().filter(|core| told == Some(core.life)) {
            core.outbox.send(message, Vec::new(), fds);
        }
    }

    fn tell_answers(&self, outside: &mut Outside<'_>, answers: Vec<Answer>) {
        let Some(core) = outside.core.as_deref_mut() else {
            return;
        };
        for answer in answers.into_iter().filter(|answer| answer.life == core.life) {
            let Answer {
                request, data, error, ..
            } = answer;
            let message = FrontToCore::DmaAnswer {
                session: self.number,
                request,
                error: error.0,
            };
            core.outbox.send(message, data, Vec::new());
        }
    }

    fn version_deadline(&self) -> Tick {
        match self.connection.phase() {
            Phase::AwaitingVersion if self.admission != Admission::Asked => {
                self.accepted_at.after_ns(limits::VERSION_NS_MAX)
            }
            _ => Tick::NEVER,
        }
    }

    /// A line about this client, at a bounded rate.
    fn complain(&mut self, now: Tick, what: &str) {
        if let Some(left_out) = self.log.take(now) {
            tracing::warn!(session = self.number, vm = self.vm, client = %self.name, left_out, "{what}");
        }
    }
}
