//! One client: its socket, its connection, its function, and what they say to each other and to the core.
//!
//! In: readiness of the socket, the keeper's verdict, kicks, core lives, answers of time. Out: bytes on the socket, packets for the core,
//! signals. Must never know: another session.

use super::closer::{Closer, SharedFd};
use super::core_link::CoreLink;
use super::descriptors::{Descriptors, Interned, Objects, is_memory, is_served_elsewhere};
use super::limits;
use super::log_budget::LogBudget;
use super::message_dma::{Answer, Ask, MessageDma};
use super::socket::{self, Read};
use crate::fault;
use crate::messages::{FrontToCore, SessionFault};
use crate::words::MappedWords;
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::ReadWriteFlags;
use std::collections::BTreeMap;
use std::io::IoSliceMut;
use std::rc::Rc;
use vmgmt_device::Tick;
use vmgmt_device::registers::{Function, Input, MapObject};
use vmgmt_mem::Signals;
use vmgmt_wire::{
    Command, Connection, DmaMap, Errno, Event, IrqOperation, Phase, Reply, ReplyHandle, Request, ServerOffer,
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
pub(super) struct Device {
    pub(super) function: Function<MappedWords>,
    /// The front page to write: what a hand-over needs.
    pub(super) front_page_writable: Rc<OwnedFd>,
    /// Core pages, by life, for the same.
    pub(super) core_pages: BTreeMap<u64, Rc<OwnedFd>>,
    /// For each core life: the front page to read, and the session's state.
    pub(super) front_page: Rc<OwnedFd>,
    pub(super) state: Rc<OwnedFd>,
}

/// What a session may use of the front while it is served.
pub struct Outside<'a> {
    pub now: Tick,
    pub core: Option<&'a mut CoreLink>,
    pub buffer: &'a mut [u8],
    pub signals: &'a Signals,
    pub closer: &'a Closer,
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
    /// The socket of a session that has just ended: to be closed. Taken by the front.
    pub ended_socket: Option<OwnedFd>,
    pub readable: bool,
    pub writable: bool,
    /// So many connections come and go that this one is not worth a line.
    pub quiet: bool,
    /// It is in the front's list of those that can go on.
    pub queued: bool,
    /// Its entry in the front's list of deadlines.
    pub deadline: Tick,
    /// The eventfd that unmasks INTx: to be watched from now on, or no more. Taken by the front.
    pub watch_unmask: Option<Option<SharedFd>>,
    /// Everything may be freed.
    pub done: bool,
    /// Of ours, in it.
    pub fault: SessionFault,
    /// [`Session::has_messages_out`], as it was last booked.
    pub messages_out: bool,
    /// The core life that was told of this session.
    pub(super) told_life: Option<u64>,
    pub(super) kicked: u64,
    pub(super) connection: Connection,
    pub(super) device: Option<Device>,
    pub(super) descriptors: Descriptors,
    pub(super) objects: Objects,
    pub(super) dma: MessageDma,
    /// A map whose object is not with the core yet; what follows waits.
    pub(super) stalled_map: Option<(ReplyHandle, DmaMap, MapObject)>,
    pub(super) accepted_at: Tick,
    pub(super) held_back_since: Option<Tick>,
    pub(super) log: LogBudget,
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
            ended_socket: None,
            readable: true,
            writable: true,
            quiet: false,
            queued: false,
            deadline: Tick::NEVER,
            watch_unmask: None,
            done: false,
            fault: SessionFault::None,
            messages_out: false,
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
    pub fn admit(&mut self, outside: &mut Outside<'_>, vm: u64, name: String, device: Device) {
        self.admission = Admission::Admitted;
        if self.socket.is_none() {
            self.done = true;
            return;
        }
        self.vm = vm;
        self.name = name;
        self.device = Some(device);
        self.tell_core(outside);
    }

    /// The keeper did not.
    pub fn refuse(&mut self, reason: &str) {
        if !self.quiet {
            tracing::warn!(session = self.number, client = %self.name, reason, "connection refused");
        }
        self.admission = Admission::Refused;
        self.done |= self.socket.is_none();
    }

    /// A core life is dead for guest memory.
    pub fn core_dead(&mut self, outside: &mut Outside<'_>, life: u64) {
        if self.told_life == Some(life) {
            self.dma.drop_all(&mut self.connection);
        }
        if let Some(device) = &mut self.device {
            device.core_pages.remove(&life);
        }
        self.input(outside, Input::CoreDead { life });
    }

    /// The operator stops, or lets go on, all DMA.
    pub fn freeze(&mut self, outside: &mut Outside<'_>, frozen: bool) {
        self.input(outside, Input::Freeze(frozen));
    }

    /// The client has not answered all DMA messages that it was sent, dropped ones included.
    pub fn has_messages_out(&self) -> bool {
        self.socket.is_some() && self.connection.dma_outstanding() > 0
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
    pub fn unmask_signalled(&mut self, outside: &mut Outside<'_>, fd: impl AsFd) {
        let mut count = [0; 8];
        // The client may have read it first, and whether a plain read waits is up to the client as well. (An eventfd has no offset: `MAX`.)
        let mut count = [IoSliceMut::new(&mut count)];
        if rustix::io::preadv2(fd, &mut count, u64::MAX, ReadWriteFlags::NOWAIT).is_ok() {
            self.input(outside, Input::UnmaskSignalled);
        }
    }

    /// The core asks for guest memory by messages.
    ///
    /// `fence`: the one that it had seen. After a newer one (it was answered while this was on its way) nothing is sent: what the request
    /// was checked against may be gone. The core looks again, and asks again.
    pub fn message_dma(&mut self, outside: &mut Outside<'_>, request: u64, fence: u64, ask: Ask) {
        let Some(life) = self.told_life.filter(|_| self.socket.is_some()) else {
            return;
        };
        let newest = self.device.as_ref().map_or(0, |device| device.function.fence());
        let answers = if fence < newest {
            vec![Answer::again(life, request)]
        } else {
            self.dma.ask(&mut self.connection, life, request, ask)
        };
        if answers.iter().any(|answer| answer.error == Errno::EBUSY) {
            let count = self.connection.dma_outstanding();
            self.complain(outside.now, &format!("its process answers none of {count} messages that read or write its memory: no other is sent"));
        }
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
            // Nobody needs one before: a client that has not negotiated must not have the front hold any.
            if self.connection.phase() == Phase::AwaitingVersion && !self.descriptors.slots.is_empty() {
                self.complain(outside.now, "a descriptor came before its VERSION");
                self.end(outside, "protocol error");
                return false;
            }
            // Late answers make room for what waits, and are no event.
            let answers = self.dma.send(&mut self.connection);
            self.tell_answers(outside, answers);
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
            self.done |= self.asked_deadline() <= now;
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
            return function.min(self.asked_deadline());
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

    /// The client has said more, and nothing keeps it from being read.
    pub fn can_go_on(&self) -> bool {
        let served =
            self.socket.is_some() && self.admission != Admission::Asked && self.stalled_map.is_none();
        served && self.readable && self.connection.can_go_on()
    }

    /// Ends the session: the client sees it at once, the rest is let go when its fence has passed.
    pub fn end(&mut self, outside: &mut Outside<'_>, reason: &str) {
        let Some(socket) = self.socket.take() else { return };
        self.ended_socket = Some(socket);
        if !self.quiet {
            tracing::info!(session = self.number, vm = self.vm, client = %self.name, reason, "session ends");
        }
        self.readable = false;
        self.stalled_map = None;
        fault::panic_on("end", self.name.as_bytes());
        for slot in self.connection.take_descriptors() {
            self.descriptors.remove(slot);
        }
        let answers = self.dma.drop_all(&mut self.connection);
        self.tell_answers(outside, answers);
        self.objects.clear();
        if self.device.is_none() {
            // A slot for each that the keeper is asked about, until it has answered: clients that come and go pile nothing up.
            self.done = self.admission != Admission::Asked;
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

    /// After a panic of ours in its end: nothing of it is trusted, so nothing of it is kept but its name.
    pub fn abandon(&mut self) {
        self.fault = SessionFault::Lost;
        self.ended_socket = self.socket.take().or(self.ended_socket.take());
        self.device = None;
        self.connection = Connection::new();
        self.descriptors.clear();
        self.objects.clear();
        self.dma = MessageDma::default();
        self.stalled_map = None;
        self.watch_unmask = None;
        (self.readable, self.held_back_since) = (false, None);
    }

    // ---- the client's side

    fn read(&mut self, outside: &mut Outside<'_>) {
        let Some(socket) = &self.socket else { return };
        match socket::read(socket, outside.buffer) {
            Read::Nothing => self.readable = false,
            Read::Closed => self.end(outside, "the client closed the connection"),
            Read::Bytes { bytes, fds, fds_lost } => {
                let brings = !fds.is_empty();
                let fds = fds.into_iter().map(|fd| outside.closer.watch(self.listener, fd));
                let slots = fds.map(|fd| self.descriptors.insert(fd)).collect();
                if brings && outside.closer.is_behind(self.listener) {
                    return self.end(outside, "descriptors that it or its like sent cannot be closed");
                }
                let bytes = outside.buffer.get(..bytes).unwrap_or_default();
                self.connection.handle_read(bytes, slots, fds_lost);
            }
        }
    }

    /// Sends what is to be sent, as far as the client takes it.
    pub(super) fn flush(&mut self, outside: &mut Outside<'_>) {
        while let (true, Some(socket), Some(output)) =
            (self.writable, &self.socket, self.connection.pending_output())
        {
            // No answer of this device carries descriptors: there is no region to map.
            match socket::write(socket, output.bytes) {
                Ok(Some(sent)) => self.connection.advance_output(sent),
                Ok(None) => self.writable = false,
                Err(_) => return self.end(outside, "its socket broke"),
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
        if let Command::RegionWrite(write) = &command {
            fault::panic_on("register", write.data());
        }
        if let Command::DeviceSetIrqs(request) = &command
            && let IrqOperation::Assign { eventfds, .. } = &request.operation
            && !eventfds.iter().all(|slot| {
                self.descriptors
                    .get(*slot)
                    .is_some_and(|fd| outside.signals.is_eventfd(fd))
            })
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
        let mut fd = map.descriptor.and_then(|slot| self.descriptors.remove(slot));
        if fd.as_ref().is_some_and(is_served_elsewhere) {
            self.complain(outside.now, "its memory is a file that is not on this host's own disks: it is reached by messages, slowly (a memfd, tmpfs or huge pages are not)");
            fd = None;
        }
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
                } else if is_memory(&fd) {
                    // Closed before the answer: a client may count on it. It frees nothing: the same memory is kept.
                    fd.close_here();
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

    fn look(&self, map: &DmaMap, fd: impl AsFd) -> Result<Interned, Errno> {
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

    /// Goes on with a map whose object waited. False: it still does.
    fn finish_stalled_map(&mut self, outside: &mut Outside<'_>) -> bool {
        let behind = |core: &CoreLink| core.objects_waiting().any(|session| session == self.number);
        if self.stalled_map.is_some() && outside.core.as_deref().is_some_and(behind) {
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

    pub(super) fn send_reply(&mut self, handle: &ReplyHandle, reply: &Reply) {
        // Not owed: the client wanted none. A mismatch would be our own bug; QEMU survives no reply.
        let _ = self.connection.reply(handle, reply);
    }

    /// It has not negotiated, or the keeper has not decided on it.
    pub fn is_newcomer(&self) -> bool {
        let asks = self.socket.is_some() && self.connection.phase() == Phase::AwaitingVersion;
        asks || self.admission == Admission::Asked
    }

    fn asked_deadline(&self) -> Tick {
        match self.admission {
            Admission::Asked => self.accepted_at.after_ns(limits::ASKED_NS_MAX),
            _ => Tick::NEVER,
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
    pub(super) fn complain(&mut self, now: Tick, what: &str) {
        if !self.quiet
            && let Some(left_out) = self.log.take(now)
        {
            tracing::warn!(session = self.number, vm = self.vm, client = %self.name, left_out, "{what}");
        }
    }
}
