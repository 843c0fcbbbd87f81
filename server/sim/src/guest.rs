//! GARDEN, an honest guest: its driver and its programs, one action at a time.
//!
//! In: chance, completions, interrupts, answers of its VM's process. Out: submissions, register accesses; what it did and saw goes to the shadow.
//! It believes only what the contract with guests promises.

use crate::chance::Chance;
use crate::files::{Files, Step as FileStep};
use crate::front::Front;
use crate::limits::{ARENA, BUFFER_BYTES, BUFFERS, PLUGGED, RING_ENTRIES};
use crate::ring::Ring;
use crate::shadow::{ALL, Fate, HEAD_BYTES, HOST, Shadow};
use crate::vm::{About, Vm};
use vmgmt_abi::registers as abi;
use vmgmt_abi::ring::completion_flag;
use vmgmt_abi::{Budget, Completion, Mode, Opcode, Status, Submission, chat, feature};

/// The host's page.
const HOST_PAGE: u64 = 0x5000;
const HOST_PAGE_BYTES: u64 = size_of::<abi::HostPage>() as u64;
/// Ring of chat, ring of files.
pub const CHAT: usize = 0;
pub const FILES: usize = 1;

/// Everything a guest's action may touch.
pub struct Site<'a> {
    pub vm: &'a mut Vm,
    pub front: &'a mut Front,
    pub shadow: &'a mut Shadow,
    pub chance: &'a mut Chance,
    pub complain: &'a dyn Fn(String),
    /// Numbers of all VMs.
    pub peers: &'a [u64],
    pub suppression: bool,
}

/// What is in flight.
#[derive(Clone, Debug)]
pub enum Kind {
    Noop,
    Echo,
    Identity,
    Publish,
    Peers,
    Cancel,
    Send { number: u64, plugged: bool },
    Receive,
    File(FileStep),
}

/// A submission in flight.
#[derive(Clone, Debug)]
pub struct Flight {
    pub kind: Kind,
    first: usize,
    buffers: usize,
    /// Data area.
    data: u64,
    data_bytes: u64,
    meta: Vec<u8>,
    /// It may end as CANCELLED or TIMED_OUT.
    cut: bool,
}

/// Where the driver stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum State {
    Off,
    /// Connected; the device is to be set up.
    Blank,
    Running,
    /// The reset register was written; BLANK is awaited.
    Resetting,
    /// A reset that the VM's process asked for; its answer is awaited.
    FunctionReset,
    /// The process is gone; the end of its session is awaited.
    Leaving,
}

/// The guest.
#[derive(Debug)]
pub struct Guest {
    pub state: State,
    pub rings: Vec<Ring<Flight>>,
    used: [bool; BUFFERS],
    next_tag: u32,
    /// Parts of the message that is being received: whose, and what came.
    partial: Option<(u64, u64, Vec<u8>)>,
    pub files: Files,
    pub bus_master: bool,
}

/// What a guest may do; the weights are the plan's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Act {
    Noop,
    Echo,
    Identity,
    Publish,
    Peers,
    Cancel,
    Send,
    SendHost,
    SendAll,
    Receive,
    File,
    Reap,
    Sleep,
    Look,
    Reset,
    FunctionReset,
    ToggleRing,
    BusMaster,
    Plug,
    Leave,
}

impl Act {
    /// All of them, and how often.
    pub const BASE: [(Self, u32); 20] = [
        (Self::Noop, 8),
        (Self::Echo, 20),
        (Self::Identity, 4),
        (Self::Publish, 4),
        (Self::Peers, 4),
        (Self::Cancel, 6),
        (Self::Send, 60),
        (Self::SendHost, 6),
        (Self::SendAll, 6),
        (Self::Receive, 70),
        (Self::File, 80),
        (Self::Reap, 120),
        (Self::Sleep, 30),
        (Self::Look, 10),
        (Self::Reset, 2),
        (Self::FunctionReset, 2),
        (Self::ToggleRing, 3),
        (Self::BusMaster, 3),
        (Self::Plug, 6),
        (Self::Leave, 2),
    ];
}

impl Guest {
    pub fn new(vm: u64) -> Self {
        Self {
            state: State::Off,
            rings: vec![Ring::new(CHAT, Mode::CHAT), Ring::new(FILES, Mode::FILE)],
            used: [false; BUFFERS],
            next_tag: 1,
            partial: None,
            files: Files::new(vm),
            bus_master: false,
        }
    }

    /// What must be done before anything else: the answers of the VM's process, the driver's set-up. True: the guest runs.
    pub fn settle(&mut self, site: &mut Site<'_>) -> bool {
        site.vm.step(site.front);
        while let Some(about) = site.vm.ended.pop_front() {
            match about {
                About::FunctionReset => self.was_reset(site, "the function was reset"),
                About::BusMaster(on) => self.bus_master = on,
                _ => {}
            }
        }
        let over = site
            .vm
            .session
            .is_some_and(|session| !site.front.clients.contains_key(&session));
        if over {
            if self.state != State::Leaving {
                (site.complain)(format!("VM {}: its session is gone", site.vm.number));
            }
            self.was_reset(site, "the session has ended");
            site.vm.gone();
            self.state = State::Off;
        }
        if !site.vm.is_free() {
            return false;
        }
        match self.state {
            State::Off | State::Leaving | State::FunctionReset => false,
            State::Blank => {
                if !self.bus_master {
                    site.vm.bus_master(true);
                    return false;
                }
                self.set_up(site);
                true
            }
            State::Resetting => {
                if site.vm.register(site.front, abi::STATE) == abi::DeviceState::BLANK.0 {
                    self.was_reset(site, "the reset register said BLANK");
                }
                false
            }
            State::Running => {
                self.doorbells(site);
                self.closed_rings(site);
                true
            }
        }
    }

    /// Its process starts.
    pub fn start(&mut self, site: &mut Site<'_>) {
        site.vm.connect(site.front, site.suppression);
        self.state = State::Blank;
        self.bus_master = false;
    }

    fn set_up(&mut self, site: &mut Site<'_>) {
        if site.vm.register(site.front, abi::MAGIC) != vmgmt_abi::MAGIC {
            (site.complain)(format!("VM {}: no device there", site.vm.number));
        }
        let features = feature::HOST_PAGE
            | feature::MODE_FILE
            | feature::MODE_CHAT
            | if site.suppression {
                feature::EVENT_SUPPRESSION
            } else {
                0
            };
        site.vm
            .set_register(site.front, abi::FEATURES_ACK_LOW, features as u32);
        site.vm
            .set_register(site.front, abi::FEATURES_ACK_HIGH, (features >> 32) as u32);
        site.vm.ram.quiet.set(None);
        site.vm.ram.expect(HOST_PAGE, HOST_PAGE_BYTES);
        site.vm
            .set_register(site.front, abi::HOST_PAGE_LOW, HOST_PAGE as u32);
        site.vm.set_register(site.front, abi::HOST_PAGE_HIGH, 0);
        for n in 0..self.rings.len() {
            self.enable(site, n);
        }
        self.state = State::Running;
    }

    fn enable(&mut self, site: &mut Site<'_>, n: usize) {
        let nonce = site.chance.any() | 1;
        let ring = &mut self.rings[n];
        ring.prepare(&site.vm.ram, nonce);
        ring.interrupts_seen = site.vm.eventfds.get(n).map_or(0, |fd| fd.get());
        let base = abi::RINGS + n as u32 * abi::RING_STRIDE;
        let writes = [
            (abi::RING_SUBMISSIONS_LOW, ring.submissions() as u32),
            (abi::RING_SUBMISSIONS_HIGH, 0),
            (abi::RING_COMPLETIONS_LOW, ring.completions() as u32),
            (abi::RING_COMPLETIONS_HIGH, 0),
            (abi::RING_EVENTS_LOW, ring.base as u32),
            (abi::RING_EVENTS_HIGH, 0),
            (abi::RING_SUBMISSION_ENTRIES, RING_ENTRIES),
            (abi::RING_COMPLETION_ENTRIES, RING_ENTRIES),
            (abi::RING_MODE, ring.mode.0),
            (abi::RING_VECTOR, n as u32),
            (abi::RING_NONCE_LOW, nonce as u32),
            (abi::RING_NONCE_HIGH, (nonce >> 32) as u32),
            (abi::RING_ENABLE, 1),
        ];
        for (offset, value) in writes {
            site.vm.set_register(site.front, base + offset, value);
        }
        ring.enabled = true;
    }

    fn doorbells(&mut self, site: &mut Site<'_>) {
        for ring in &mut self.rings {
            if ring.enabled && std::mem::take(&mut ring.doorbell_due) {
                let at = abi::DOORBELLS + 4 * ring.n as u32;
                site.vm.set_register(site.front, at, ring.tail());
            }
        }
    }

    fn closed_rings(&mut self, site: &mut Site<'_>) {
        for n in 0..self.rings.len() {
            if !self.rings[n].closing {
                continue;
            }
            let at = abi::RINGS + n as u32 * abi::RING_STRIDE + abi::RING_STATUS;
            if site.vm.register(site.front, at) & 0xff == abi::RingState::CLOSED.0 {
                self.drop_ring(site, n);
                self.enable(site, n);
            }
        }
    }

    /// The device was reset, and said that its DMA is over: what it has published counts, what it has not is cancelled.
    fn was_reset(&mut self, site: &mut Site<'_>, why: &'static str) {
        for n in 0..self.rings.len() {
            self.drop_ring(site, n);
        }
        site.vm.ram.forbid_all();
        site.vm.ram.quiet.set(Some(why));
        self.state = State::Blank;
        if why != "the reset register said BLANK" {
            self.bus_master = false;
        }
    }

    fn drop_ring(&mut self, site: &mut Site<'_>, n: usize) {
        self.reap(site, n, usize::MAX);
        let flights = std::mem::take(&mut self.rings[n].flights);
        for flight in flights.into_values() {
            self.free(site, &flight);
            match flight.kind {
                Kind::Send { number, .. } => site.shadow.sent(site.vm.number, number, Fate::Unknown, 0),
                Kind::File(step) => self.files.lost(site.shadow, step),
                _ => {}
            }
        }
        if n == CHAT {
            // What came of a message goes with its ring; it comes again from its start.
            self.partial = None;
        }
        if n == FILES {
            self.files.reset(site.shadow);
        }
        self.rings[n].retire(&site.vm.ram);
        if n == CHAT {
            site.shadow.sharpen(site.vm.number);
        }
    }

    // ---- completions

    /// Takes at most so many completions.
    pub fn reap(&mut self, site: &mut Site<'_>, n: usize, most: usize) -> usize {
        let mut taken = 0;
        while taken < most
            && let Some(completion) = self.rings[n].take(&site.vm.ram)
        {
            taken += 1;
            site.shadow.completions += 1;
            let Some(flight) = self.rings[n].flights.remove(&completion.tag) else {
                (site.complain)(format!(
                    "VM {} ring {n}: a completion for nothing in flight: {completion:?}",
                    site.vm.number
                ));
                continue;
            };
            self.completed(site, n, &flight, &completion);
            self.free(site, &flight);
        }
        taken
    }

    fn completed(&mut self, site: &mut Site<'_>, n: usize, flight: &Flight, completion: &Completion) {
        let status = Status(completion.status);
        let mut data = vec![0; flight.data_bytes as usize];
        site.vm.ram.read(flight.data, &mut data);
        let cut = flight.cut && matches!(status, Status::CANCELLED | Status::TIMED_OUT);
        let unexpected = |site: &Site<'_>, what: &str| {
            (site.complain)(format!(
                "VM {} ring {n}: {what}: {:?} ended as {status:?} with {completion:?}",
                site.vm.number, flight.kind
            ));
        };
        match &flight.kind {
            Kind::Noop | Kind::Cancel | Kind::Publish | Kind::Peers | Kind::Identity => {
                // A description is kept, and the memory for that may be nearly full.
                let no_room = matches!(flight.kind, Kind::Publish)
                    && (status, completion.detail) == (Status::OVER_BUDGET, Budget::STATE_BYTES.0);
                if status != Status::OK && !cut && !no_room {
                    unexpected(site, "not OK");
                }
                if matches!(flight.kind, Kind::Identity)
                    && status == Status::OK
                    && completion.result != site.vm.number
                {
                    unexpected(site, "the wrong identity");
                }
            }
            Kind::Echo => {
                if status == Status::OK && data.get(..flight.meta.len()) != Some(&flight.meta) {
                    unexpected(site, "no echo");
                } else if status != Status::OK && !cut {
                    unexpected(site, "not OK");
                }
            }
            Kind::Send { number, plugged } => {
                let fate = match status {
                    Status::OK => Fate::Done,
                    Status::OUTCOME_UNKNOWN => Fate::Unknown,
                    Status::BAD_ADDRESS if *plugged => Fate::Refused,
                    Status::OVER_BUDGET
                    | Status::PEER_ABSENT
                    | Status::DENIED
                    | Status::NO_SUCH_NAME
                    // Bus mastering went off, or the device was frozen, while the message was fetched.
                    | Status::NOT_READY => {
                        Fate::Refused
                    }
                    _ if cut => Fate::Refused,
                    _ => {
                        unexpected(site, "no such end of a send");
                        Fate::Refused
                    }
                };
                site.shadow.sent(site.vm.number, *number, fate, completion.result);
            }
            Kind::Receive => {
                if status == Status::OK {
                    self.received(site, &data, completion);
                } else if !cut && status != Status::OVER_BUDGET {
                    unexpected(site, "not OK");
                }
            }
            Kind::File(step) => {
                let more = completion.flags & completion_flag::MORE != 0;
                let plugged = flight.data >= PLUGGED;
                let complaint = self.files.completed(
                    site.shadow,
                    step,
                    (status, completion.result, completion.extra, more),
                    &data,
                    plugged,
                );
                if let Some(complaint) = complaint {
                    unexpected(site, &complaint);
                }
            }
        }
    }

    fn received(&mut self, site: &mut Site<'_>, data: &[u8], completion: &Completion) {
        let bad = |what: &str| {
            (site.complain)(format!(
                "VM {}: RECEIVE gave {what}: {completion:?}",
                site.vm.number
            ));
        };
        let bytes = completion.result as usize;
        let Some(data) = data
            .get(..bytes)
            .filter(|data| data.len() >= size_of::<chat::MessageHeader>())
        else {
            return bad("more than its buffer, or less than a header");
        };
        let word = |at: usize| u64::from_le_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|n| data[at + n]));
        let (sequence, source, message_bytes) = (word(0), word(8), word(16));
        let name_bytes = (word(32) & 0xffff_ffff) as usize;
        let flags = (word(32) >> 32) as u32;
        let part = data.get(40 + name_bytes..).unwrap_or_default();
        if flags & chat::message_flag::CONTINUED == 0 {
            if let Some((source, sequence, _)) = &self.partial {
                bad(&format!("a new message before the end of {sequence} of {source}"));
            }
            self.partial = Some((source, sequence, Vec::new()));
        }
        let Some((from, number, whole)) = &mut self.partial else {
            return bad("a part of a message without its start");
        };
        if (*from, *number) != (source, sequence) {
            return bad("a part of another message");
        }
        whole.extend_from_slice(part);
        if completion.flags & completion_flag::MORE == 0 {
            let whole = std::mem::take(whole);
            self.partial = None;
            if whole.len() as u64 != message_bytes {
                bad("another length than its header says");
            }
            site.shadow.deliver(site.vm.number, source, &whole);
        }
    }

    // ---- submissions

    /// One action. What it was, for the trace; `None`: nothing could be done.
    pub fn act(&mut self, site: &mut Site<'_>, act: Act) -> Option<String> {
        match act {
            Act::Noop => self.submit(site, CHAT, Opcode::NOOP, Kind::Noop, &[], 0, |_| {}),
            Act::Echo => {
                let ring = site.chance.below(2) as usize;
                let meta: Vec<u8> = (0..site.chance.between(1, 64))
                    .map(|at| at as u8 ^ crate::ram::mark(site.vm.number))
                    .collect();
                self.submit(site, ring, Opcode::ECHO, Kind::Echo, &meta, 64, |_| {})
            }
            Act::Identity => self.submit(site, CHAT, Opcode::IDENTITY, Kind::Identity, &[], 64, |_| {}),
            Act::Publish => {
                let argument = u64::from(site.chance.below(4) != 0);
                let bytes = site.chance.below(2) * argument * 16;
                self.submit(
                    site,
                    CHAT,
                    Opcode::PUBLISH,
                    Kind::Publish,
                    &[],
                    bytes,
                    |submission| {
                        submission.argument = argument;
                    },
                )
            }
            Act::Peers => self.submit(site, CHAT, Opcode::PEERS, Kind::Peers, &[], 512, |_| {}),
            Act::Cancel => {
                let tags: Vec<u32> = self.rings[CHAT]
                    .flights
                    .iter()
                    .filter(|(_, flight)| matches!(flight.kind, Kind::Receive | Kind::Send { .. }))
                    .map(|(tag, _)| *tag)
                    .collect();
                let tag = *site.chance.pick(&tags)?;
                let done = self.submit(site, CHAT, Opcode::CANCEL, Kind::Cancel, &[], 0, |submission| {
                    submission.argument = u64::from(tag);
                })?;
                if let Some(flight) = self.rings[CHAT].flights.get_mut(&tag) {
                    flight.cut = true;
                }
                Some(done)
            }
            Act::Send => {
                let target = *site.chance.pick(site.peers)?;
                self.send(site, target)
            }
            Act::SendHost => self.send(site, HOST),
            Act::SendAll => self.send(site, ALL),
            Act::Receive => {
                let bytes = [128, 200, 600, 1024, 2048][site.chance.below(5) as usize];
                let deadline = if site.chance.permille(150) {
                    site.chance.between(1, 50_000_000)
                } else {
                    0
                };
                self.submit(
                    site,
                    CHAT,
                    Opcode::RECEIVE,
                    Kind::Receive,
                    &[],
                    bytes,
                    |submission| {
                        submission.deadline_ns = deadline;
                    },
                )
            }
            Act::File => self.file(site),
            Act::Reap => {
                let n = site.chance.below(self.rings.len() as u64) as usize;
                let most = site.chance.between(1, 8) as usize;
                self.wake(site, n, false)
                    .then(|| self.reap(site, n, most))
                    .filter(|taken| *taken > 0)
                    .map(|taken| format!("ring {n}: {taken} completions"))
            }
            Act::Sleep => {
                let n = site.chance.below(self.rings.len() as u64) as usize;
                self.sleep(site, n).then(|| format!("ring {n} sleeps"))
            }
            Act::Look => {
                let state = site.vm.register(site.front, abi::STATE);
                if state == abi::DeviceState::FAILED.0 {
                    let cause = site.vm.register(site.front, abi::FAIL_CAUSE);
                    (site.complain)(format!(
                        "VM {}: its device failed: {:?}",
                        site.vm.number,
                        Status(cause as u16)
                    ));
                }
                Some(format!("state {state}"))
            }
            Act::Reset => {
                site.vm.set_register(site.front, abi::CONTROL, abi::CONTROL_RESET);
                self.state = State::Resetting;
                Some("reset register".into())
            }
            Act::FunctionReset => {
                self.state = State::FunctionReset;
                if site.chance.permille(500) {
                    site.vm.function_level_reset();
                    return Some("function-level reset".into());
                }
                site.vm.device_reset();
                Some("DEVICE_RESET".into())
            }
            Act::ToggleRing => {
                let n = site.chance.below(self.rings.len() as u64) as usize;
                let ring = &mut self.rings[n];
                if ring.closing || !ring.enabled {
                    return None;
                }
                (ring.enabled, ring.closing) = (false, true);
                let at = abi::RINGS + n as u32 * abi::RING_STRIDE + abi::RING_ENABLE;
                site.vm.set_register(site.front, at, 0);
                Some(format!("ring {n} off"))
            }
            Act::BusMaster => {
                site.vm.bus_master(!self.bus_master);
                Some(format!("bus master {}", !self.bus_master))
            }
            Act::Plug => {
                if site.vm.maps.contains_key(&PLUGGED) {
                    site.vm.unplug(PLUGGED);
                    Some("unplug".into())
                } else {
                    site.vm.plug(PLUGGED, crate::limits::RAM_BYTES - PLUGGED);
                    Some("plug".into())
                }
            }
            Act::Leave => {
                site.vm.close(site.front);
                self.state = State::Leaving;
                Some("the process ends".into())
            }
        }
    }

    /// A ring that sleeps is woken by its interrupt alone (or by `force`). True: it is awake.
    pub fn wake(&mut self, site: &Site<'_>, n: usize, force: bool) -> bool {
        let ring = &mut self.rings[n];
        let count = site.vm.eventfds.get(n).map_or(0, |fd| fd.get());
        if ring.sleeping && (force || count != ring.interrupts_seen) {
            ring.sleeping = false;
        }
        ring.interrupts_seen = count;
        !ring.sleeping
    }

    /// Sleeps unless there is a completion.
    pub fn sleep(&mut self, site: &Site<'_>, n: usize) -> bool {
        let ring = &mut self.rings[n];
        if ring.sleeping || !ring.enabled {
            return false;
        }
        ring.interrupts_seen = site.vm.eventfds.get(n).map_or(0, |fd| fd.get());
        ring.arm(&site.vm.ram);
        ring.sleeping = !ring.has_completion(&site.vm.ram);
        ring.sleeping
    }

    fn send(&mut self, site: &mut Site<'_>, target: u64) -> Option<String> {
        let bytes = match site.chance.below(6) {
            0 => site.chance.between(4097, 7000),
            1 => site.chance.between(600, 4096),
            _ => site.chance.between(HEAD_BYTES as u64, 300),
        };
        if !self.rings[CHAT].enabled || !self.rings[CHAT].has_room(&site.vm.ram) {
            return None;
        }
        let (first, buffers) = self.allocate(site, bytes, true)?;
        let (number, body) = site.shadow.send(site.vm.number, target, bytes as usize);
        let at = ARENA + first as u64 * BUFFER_BYTES;
        site.vm.ram.write(at, &body);
        let kind = Kind::Send {
            number,
            plugged: at + bytes > PLUGGED,
        };
        let submission = Submission {
            opcode: Opcode::SEND.0,
            handle: target,
            buffer: at,
            length: bytes,
            ..Submission::default()
        };
        let flight = Flight {
            kind,
            first,
            buffers,
            data: at,
            data_bytes: bytes,
            meta: Vec::new(),
            cut: false,
        };
        self.publish(site, CHAT, submission, flight);
        Some(format!("sends number {number} to {target:#x}, {bytes} bytes"))
    }

    fn file(&mut self, site: &mut Site<'_>) -> Option<String> {
        if !self.rings[FILES].enabled || !self.rings[FILES].has_room(&site.vm.ram) {
            return None;
        }
        let (step, request) = self.files.next(site.shadow, site.chance)?;
        let bytes = (request.meta.len() + request.data.len()) as u64;
        let room = bytes.max(1);
        let Some((first, buffers)) = self.allocate(site, room, !request.into_guest) else {
            self.files.put_back(step);
            return None;
        };
        let at = ARENA + first as u64 * BUFFER_BYTES;
        site.vm.ram.write(at, &request.meta);
        let data = at + request.meta.len() as u64;
        if request.into_guest {
            site.vm.ram.expect(data, request.data.len() as u64);
        } else {
            site.vm.ram.write(data, &request.data);
        }
        let submission = Submission {
            opcode: request.opcode.0,
            flags: request.flags,
            handle: request.handle,
            offset: request.offset,
            argument: request.argument,
            buffer: if bytes == 0 { 0 } else { at },
            length: bytes,
            meta_bytes: request.meta.len() as u32,
            ..Submission::default()
        };
        let what = format!("file: {step:?}");
        let flight = Flight {
            kind: Kind::File(step),
            first,
            buffers,
            data,
            data_bytes: request.data.len() as u64,
            meta: request.meta,
            cut: false,
        };
        self.publish(site, FILES, submission, flight);
        Some(what)
    }

    #[allow(clippy::too_many_arguments)] // one submission, spelled out by its callers
    fn submit(
        &mut self,
        site: &mut Site<'_>,
        n: usize,
        opcode: Opcode,
        kind: Kind,
        meta: &[u8],
        data_bytes: u64,
        fill: impl FnOnce(&mut Submission),
    ) -> Option<String> {
        if !self.rings[n].enabled || !self.rings[n].has_room(&site.vm.ram) {
            return None;
        }
        let bytes = meta.len() as u64 + data_bytes;
        let (first, buffers) = self.allocate(site, bytes.max(1), false)?;
        let at = ARENA + first as u64 * BUFFER_BYTES;
        site.vm.ram.write(at, meta);
        let data = at + meta.len() as u64;
        if matches!(kind, Kind::Publish) {
            site.vm.ram.write(data, &vec![b'x'; data_bytes as usize]);
        } else if data_bytes > 0 {
            site.vm.ram.expect(data, data_bytes);
        }
        let mut submission = Submission {
            opcode: opcode.0,
            buffer: if bytes == 0 { 0 } else { at },
            length: bytes,
            meta_bytes: meta.len() as u32,
            ..Submission::default()
        };
        fill(&mut submission);
        let what = format!("ring {n}: {opcode:?}");
        let flight = Flight {
            cut: submission.deadline_ns != 0,
            kind,
            first,
            buffers,
            data,
            data_bytes,
            meta: meta.to_vec(),
        };
        self.publish(site, n, submission, flight);
        Some(what)
    }

    fn publish(&mut self, site: &mut Site<'_>, n: usize, mut submission: Submission, flight: Flight) {
        submission.tag = self.next_tag;
        self.next_tag = self.next_tag.wrapping_add(1);
        let suppression = site.suppression && !site.vm.unshared;
        self.rings[n].submit(&site.vm.ram, &submission, suppression, flight);
        if site.chance.permille(700) {
            self.doorbells(site);
        }
    }

    /// Finds free buffers in a row; above [`PLUGGED`] only for what is read by the device, and only while it is plugged.
    fn allocate(&mut self, site: &mut Site<'_>, bytes: u64, anywhere: bool) -> Option<(usize, usize)> {
        let buffers = bytes.div_ceil(BUFFER_BYTES) as usize;
        let below = ((PLUGGED - ARENA) / BUFFER_BYTES) as usize;
        let high =
            anywhere && site.chance.permille(300) && site.vm.maps.get(&PLUGGED).is_some_and(|map| map.told);
        let range = if high { below..BUFFERS } else { 0..below };
        let first = range.clone().find(|first| {
            first + buffers <= range.end && !self.used[*first..first + buffers].contains(&true)
        })?;
        self.used[first..first + buffers].fill(true);
        Some((first, buffers))
    }

    fn free(&mut self, site: &Site<'_>, flight: &Flight) {
        site.vm.ram.forbid(flight.data);
        let at = ARENA + flight.first as u64 * BUFFER_BYTES;
        // Whoever reads it later finds this VM's mark and nothing else.
        let blank = vec![crate::ram::mark(site.vm.number); flight.buffers * BUFFER_BYTES as usize];
        site.vm.ram.write(at, &blank);
        self.used[flight.first..flight.first + flight.buffers].fill(false);
    }
}
