//! GARDEN, a VM's process: what QEMU does. Bytes on the socket, DMA maps, descriptors, message DMA; the guest's accesses to the device.
//!
//! In: what the guest and chance want. Out: vfio-user messages; answers. It holds the front to its promises: an access is answered at once, a
//! fence in bounded time, no message DMA into what was unmapped.

use crate::clockwork::Clock;
use crate::front::{Fd, Front};
use crate::limits::{PLUGGED, RAM_BYTES};
use crate::ram::{Complaints, Ram};
use crate::wires::Eventfd;
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use vmgmt_device::Tick;
use vmgmt_wire::uapi::user;

const BAR0: u32 = 0;
const BAR2: u32 = 2;
const CONFIG: u32 = 7;
/// The PCI Express capability's device control register, and its bit that resets the function.
const DEVICE_CONTROL: u64 = 0x78;
const INITIATE_RESET: u16 = 0x8000;
const CAPABILITIES: &str =
    r#"{"capabilities":{"max_msg_fds":16,"max_data_xfer_size":1048576,"write_multiple":true}}"#;

/// What a held request is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum About {
    Version,
    Map(u64),
    Unmap(u64),
    Irqs,
    BusMaster(bool),
    /// DEVICE_RESET or the function-level reset.
    FunctionReset,
}

/// A request that may take its time.
#[derive(Debug)]
struct Ask {
    about: About,
    command: u16,
    body: Vec<u8>,
    fds: Vec<Fd>,
}

/// The request whose answer is awaited: the VM stands still.
#[derive(Clone, Debug)]
pub struct Waiting {
    id: u16,
    about: About,
    since: Tick,
}

/// A DMA map.
#[derive(Clone, Debug)]
pub struct Map {
    pub bytes: u64,
    pub ram: Rc<Ram>,
    pub offset: u64,
    id: u64,
    /// The device was told; before, its request waits.
    pub told: bool,
}

/// A VM's process.
#[derive(Debug)]
pub struct Vm {
    pub number: u64,
    clock: Clock,
    complaints: Complaints,
    pub session: Option<u64>,
    /// Its own memory, and a second object that comes and goes above [`PLUGGED`].
    pub ram: Rc<Ram>,
    pub maps: BTreeMap<u64, Map>,
    /// The descriptor that it hands out names other memory than the guest's: it is reached by message.
    pub unshared: bool,
    /// The part above PLUGGED has no descriptor at all.
    pub bare: bool,
    asks: VecDeque<Ask>,
    pub waiting: Option<Waiting>,
    input: Vec<u8>,
    /// Message DMA that came while an answer was awaited.
    dma: VecDeque<(u16, u16, Vec<u8>, bool)>,
    next_id: u16,
    next_map: u64,
    pub eventfds: Vec<Eventfd>,
    /// What the requests that ended were about.
    pub ended: VecDeque<About>,
    next_key: u32,
    /// Its process has ended: nothing is read or said any more.
    closed: bool,
}

impl Vm {
    pub fn new(number: u64, clock: &Clock, complaints: &Complaints, unshared: bool, bare: bool) -> Self {
        let key = (number as u32) << 16;
        Self {
            number,
            clock: clock.clone(),
            complaints: complaints.clone(),
            session: None,
            ram: Ram::new(key, number, RAM_BYTES as usize, complaints),
            maps: BTreeMap::new(),
            unshared,
            bare,
            asks: VecDeque::new(),
            waiting: None,
            input: Vec::new(),
            dma: VecDeque::new(),
            next_id: 1,
            next_map: 1,
            eventfds: Vec::new(),
            ended: VecDeque::new(),
            next_key: key + 1,
            closed: false,
        }
    }

    /// Connects and queues all that QEMU says at the start.
    pub fn connect(&mut self, front: &mut Front, suppression: bool) {
        self.session = Some(front.connect(self.number, suppression));
        self.closed = false;
        self.input.clear();
        self.asks.clear();
        self.dma.clear();
        self.waiting = None;
        self.eventfds = (0..4).map(|_| Rc::new(Cell::new(0))).collect();
        let mut body = vec![0, 0, 0, 0];
        body.extend(CAPABILITIES.as_bytes());
        body.push(0);
        self.ask(About::Version, user::VFIO_USER_VERSION, body, Vec::new());
        self.plug(0, PLUGGED);
        self.plug(PLUGGED, RAM_BYTES - PLUGGED);
        let mut body = Vec::new();
        // MSI (index 1), DATA_EVENTFD | ACTION_TRIGGER, four from 0.
        for word in [20u32, 0x24, 1, 0, 4] {
            body.extend(word.to_le_bytes());
        }
        let fds = self.eventfds.iter().map(|fd| Fd::Event(Rc::clone(fd))).collect();
        self.ask(About::Irqs, user::VFIO_USER_DEVICE_SET_IRQS, body, fds);
        self.bus_master(true);
    }

    /// Its process ends. The session goes when its fence has passed.
    pub fn close(&mut self, front: &mut Front) {
        if let Some(session) = self.session {
            front.disconnect(session);
        }
        self.closed = true;
        self.asks.clear();
        self.waiting = None;
        self.input.clear();
        self.dma.clear();
        self.ended.clear();
    }

    /// The session is over: there is no more DMA.
    pub fn gone(&mut self) {
        self.session = None;
        self.maps.clear();
        self.ram.unmapped_all();
    }

    // ---- requests that may take their time

    /// Maps part of guest memory for the device.
    pub fn plug(&mut self, iova: u64, bytes: u64) {
        let id = self.next_map;
        self.next_map += 1;
        let map = Map {
            bytes,
            ram: Rc::clone(&self.ram),
            offset: iova,
            id,
            told: false,
        };
        let bare = self.bare && iova == PLUGGED;
        let fds = if bare {
            Vec::new()
        } else if self.unshared {
            // A private copy of it: what the device finds there is not what the guest sees.
            self.next_key += 1;
            vec![Fd::Ram(Ram::new(
                self.next_key,
                self.number,
                RAM_BYTES as usize,
                &self.complaints,
            ))]
        } else {
            vec![Fd::Ram(Rc::clone(&self.ram))]
        };
        self.maps.insert(iova, map);
        let mut body = Vec::new();
        for word in [32u32, 3] {
            body.extend(word.to_le_bytes());
        }
        for word in [iova, iova, bytes] {
            body.extend(word.to_le_bytes());
        }
        self.ask(About::Map(iova), user::VFIO_USER_DMA_MAP, body, fds);
    }

    /// Takes it back.
    pub fn unplug(&mut self, iova: u64) {
        let Some(map) = self.maps.get(&iova) else { return };
        let mut body = Vec::new();
        for word in [24u32, 0] {
            body.extend(word.to_le_bytes());
        }
        for word in [iova, map.bytes] {
            body.extend(word.to_le_bytes());
        }
        self.ask(About::Unmap(iova), user::VFIO_USER_DMA_UNMAP, body, Vec::new());
    }

    /// Bus mastering on or off.
    pub fn bus_master(&mut self, on: bool) {
        let command = if on { 0x0406u16 } else { 0x0402 };
        let body = region(CONFIG, 4, &command.to_le_bytes());
        self.ask(
            About::BusMaster(on),
            user::VFIO_USER_REGION_WRITE,
            body,
            Vec::new(),
        );
    }

    /// DEVICE_RESET.
    pub fn device_reset(&mut self) {
        self.ask(
            About::FunctionReset,
            user::VFIO_USER_DEVICE_RESET,
            Vec::new(),
            Vec::new(),
        );
    }

    /// The function-level reset, by configuration space.
    pub fn function_level_reset(&mut self) {
        let body = region(CONFIG, DEVICE_CONTROL, &INITIATE_RESET.to_le_bytes());
        self.ask(
            About::FunctionReset,
            user::VFIO_USER_REGION_WRITE,
            body,
            Vec::new(),
        );
    }

    fn ask(&mut self, about: About, command: u16, body: Vec<u8>, fds: Vec<Fd>) {
        self.asks.push_back(Ask {
            about,
            command,
            body,
            fds,
        });
    }

    /// Nothing is asked and nothing awaited: the guest runs.
    #[must_use]
    pub fn is_free(&self) -> bool {
        self.session.is_some() && self.waiting.is_none() && self.asks.is_empty()
    }

    /// The answer that is awaited comes in time.
    pub fn check_patience(&self, limit_ns: u64) {
        if let Some(waiting) = &self.waiting {
            let for_ns = self.clock.now().since_ns(waiting.since);
            if for_ns > limit_ns {
                self.complaints.add(format!(
                    "VM {}: no answer to {:?} for {for_ns} ns",
                    self.number, waiting.about
                ));
            }
        }
    }

    /// What it is doing, for a report.
    #[must_use]
    pub fn errand(&self) -> Option<String> {
        (self.waiting.is_some() || !self.asks.is_empty())
            .then(|| format!("waits for {:?}, then {:?}", self.waiting, self.asks))
    }

    /// Something is to be asked and nothing is awaited.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.session.is_some() && self.waiting.is_none() && !self.asks.is_empty()
    }

    /// Sends the next request, if none is awaited; reads what came.
    pub fn step(&mut self, front: &mut Front) {
        self.read(front);
        if self.waiting.is_some() {
            return;
        }
        let Some(session) = self.session else { return };
        let Some(ask) = self.asks.pop_front() else { return };
        if let About::Map(iova) = ask.about
            && let Some(map) = self.maps.get_mut(&iova)
        {
            map.told = true;
            map.ram.map(map.id, map.offset, map.bytes);
        }
        if ask.about == About::BusMaster(true) {
            self.ram.quiet.set(None);
        }
        let id = self.post(front, session, ask.command, 0, &ask.body, ask.fds);
        self.waiting = Some(Waiting {
            id,
            about: ask.about,
            since: self.clock.now(),
        });
    }

    fn post(
        &mut self,
        front: &mut Front,
        session: u64,
        command: u16,
        flags: u32,
        body: &[u8],
        fds: Vec<Fd>,
    ) -> u16 {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1).max(1);
        let bytes = message(id, command, flags, 0, body);
        if let Some(client) = front.clients.get_mut(&session).filter(|_| !self.closed) {
            client.inbox.push_back((bytes, fds));
        }
        id
    }

    /// Reads all that has come.
    pub fn read(&mut self, front: &mut Front) {
        let Some(session) = self.session.filter(|_| !self.closed) else {
            return;
        };
        if let Some(client) = front.clients.get_mut(&session) {
            self.input.append(&mut client.outbox);
        }
        while let Some((id, command, flags, error, body)) = take(&mut self.input) {
            if flags & user::VFIO_USER_TYPE_MASK == user::VFIO_USER_TYPE_COMMAND {
                // Sent before the answer to a fence could be: the client has to refuse it by itself.
                self.dma.push_back((id, command, body, self.waiting.is_some()));
            } else {
                self.answered(id, error, &body);
            }
        }
        // QEMU serves these only while it does not wait itself.
        while self.waiting.is_none()
            && let Some((id, command, body, early)) = self.dma.pop_front()
        {
            self.serve_dma(front, session, (id, command), &body, early);
        }
    }

    fn answered(&mut self, id: u16, error: u32, _body: &[u8]) {
        let Some(waiting) = self.waiting.take_if(|waiting| waiting.id == id) else {
            return self
                .complaints
                .add(format!("VM {}: an answer to nothing: {id}", self.number));
        };
        if error != 0 {
            self.complaints.add(format!(
                "VM {}: {:?} answered with errno {error}",
                self.number, waiting.about
            ));
        }
        match waiting.about {
            About::Unmap(iova) => {
                if let Some(map) = self.maps.remove(&iova) {
                    map.ram.unmapped(map.id);
                }
            }
            About::BusMaster(false) => self.ram.quiet.set(Some("bus mastering is off")),
            About::FunctionReset => self.ram.quiet.set(Some("the device was reset")),
            _ => {}
        }
        self.ended.push_back(waiting.about);
    }

    fn serve_dma(
        &mut self,
        front: &mut Front,
        session: u64,
        (id, command): (u16, u16),
        body: &[u8],
        early: bool,
    ) {
        let word = |at: usize| {
            body.get(at..at + 8)
                .and_then(|bytes| bytes.try_into().ok())
                .map_or(0, u64::from_le_bytes)
        };
        let (iova, bytes) = (word(0), word(8));
        let map = self
            .maps
            .range(..=iova)
            .next_back()
            .filter(|(start, map)| map.told && iova + bytes <= *start + map.bytes);
        let errno = match (map, self.ram.quiet.get()) {
            (None, _) => Some(14),
            // As QEMU: ENODEV while bus mastering is off.
            (Some(_), Some(_)) => Some(19),
            (Some(_), None) => None,
        };
        if let Some(errno) = errno.filter(|_| early || command == user::VFIO_USER_DMA_READ) {
            let flags = user::VFIO_USER_TYPE_REPLY | user::VFIO_USER_ERROR;
            let bytes = message(id, command, flags, errno, &[]);
            if let Some(client) = front.clients.get_mut(&session) {
                client.inbox.push_back((bytes, Vec::new()));
            }
            return;
        }
        let Some((start, map)) = map else {
            self.complaints.add(format!(
                "VM {}: message DMA ({command}) of {bytes} bytes at {iova:#x}, which is not mapped",
                self.number
            ));
            return;
        };
        let offset = map.offset + (iova - start);
        let mut reply = body.get(..16).unwrap_or_default().to_vec();
        if command == user::VFIO_USER_DMA_READ {
            let mut data = vec![0; bytes as usize];
            map.ram.device_read(offset, &mut data);
            reply.extend(data);
        } else {
            map.ram
                .device_write(offset, body.get(16..).unwrap_or_default(), 0);
        }
        let bytes = message(id, command, user::VFIO_USER_TYPE_REPLY, 0, &reply);
        if let Some(client) = front.clients.get_mut(&session) {
            client.inbox.push_back((bytes, Vec::new()));
        }
    }

    // ---- accesses of the guest: answered at once

    /// Reads a register of BAR0.
    pub fn register(&mut self, front: &mut Front, offset: u32) -> u32 {
        self.access(front, BAR0, offset, 4)
    }

    /// Reads a port.
    pub fn port(&mut self, front: &mut Front, offset: u32) -> u32 {
        self.access(front, BAR2, offset, 4)
    }

    fn access(&mut self, front: &mut Front, bar: u32, offset: u32, bytes: u32) -> u32 {
        let Some(session) = self.session.filter(|_| self.waiting.is_none()) else {
            return u32::MAX;
        };
        let mut body = u64::from(offset).to_le_bytes().to_vec();
        body.extend(bar.to_le_bytes());
        body.extend(bytes.to_le_bytes());
        let id = self.post(front, session, user::VFIO_USER_REGION_READ, 0, &body, Vec::new());
        let Some(body) = self.await_now(front, session, id) else {
            self.complaints.add(format!(
                "VM {}: the read of BAR{bar} at {offset:#x} is not answered at once",
                self.number
            ));
            return u32::MAX;
        };
        let data = body.get(16..20).and_then(|bytes| bytes.try_into().ok());
        data.map_or(u32::MAX, u32::from_le_bytes)
    }

    fn await_now(&mut self, front: &mut Front, session: u64, id: u16) -> Option<Vec<u8>> {
        // As many turns as there are messages before it, and each at least once cut in two.
        let turns = front
            .clients
            .get(&session)
            .map_or(0, |client| 2 * client.inbox.len());
        for _ in 0..=turns {
            let idle = front
                .clients
                .get(&session)
                .is_none_or(|client| client.inbox.is_empty());
            front.serve(session, usize::MAX);
            if let Some(client) = front.clients.get_mut(&session) {
                self.input.append(&mut client.outbox);
            }
            while let Some((got, command, flags, error, body)) = take(&mut self.input) {
                if flags & user::VFIO_USER_TYPE_MASK == user::VFIO_USER_TYPE_COMMAND {
                    self.dma.push_back((got, command, body, false));
                } else if got == id && error == 0 {
                    return Some(body);
                } else {
                    self.complaints.add(format!(
                        "VM {}: an answer out of turn: {got} (errno {error}), {id} is awaited",
                        self.number
                    ));
                }
            }
            if idle {
                return None;
            }
        }
        None
    }

    /// Writes a register of BAR0, posted.
    pub fn set_register(&mut self, front: &mut Front, offset: u32, value: u32) {
        self.write(front, BAR0, offset, &value.to_le_bytes());
    }

    /// Writes ports, posted.
    pub fn set_port(&mut self, front: &mut Front, offset: u32, data: &[u8]) {
        self.write(front, BAR2, offset, data);
    }

    fn write(&mut self, front: &mut Front, bar: u32, offset: u32, data: &[u8]) {
        let Some(session) = self.session.filter(|_| self.waiting.is_none()) else {
            return;
        };
        let body = region(bar, u64::from(offset), data);
        let flags = user::VFIO_USER_NO_REPLY;
        self.post(
            front,
            session,
            user::VFIO_USER_REGION_WRITE,
            flags,
            &body,
            Vec::new(),
        );
    }
}

fn region(bar: u32, offset: u64, data: &[u8]) -> Vec<u8> {
    let mut body = offset.to_le_bytes().to_vec();
    body.extend(bar.to_le_bytes());
    body.extend((data.len() as u32).to_le_bytes());
    body.extend(data);
    body
}

fn message(id: u16, command: u16, flags: u32, error: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = id.to_le_bytes().to_vec();
    bytes.extend(command.to_le_bytes());
    bytes.extend((16 + body.len() as u32).to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes.extend(error.to_le_bytes());
    bytes.extend(body);
    bytes
}

/// Takes one whole message: id, command, flags, errno, body.
fn take(input: &mut Vec<u8>) -> Option<(u16, u16, u32, u32, Vec<u8>)> {
    let head: [u8; 16] = input.get(..16)?.try_into().ok()?;
    let half = |at: usize| u16::from_le_bytes([head[at], head[at + 1]]);
    let word = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
    let bytes = word(4) as usize;
    if input.len() < bytes {
        return None;
    }
    let body = input[16..bytes].to_vec();
    input.drain(..bytes);
    Some((half(0), half(2), word(8), word(12), body))
}
