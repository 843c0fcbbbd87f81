//! GARDEN, the core's shell: moves values between rings, hub, journal, memory and disk, as `host/core/event_loop` does, in virtual time.
//!
//! In: wires, the hub's memory, configuration of VMs. Out: words, packets, signals, work; or a death at any of its steps. Must never know the
//! guests.
//!
//! The order of what it does is the order of the real loop; where the two differ, the simulator proves nothing.

mod carry;
mod freezing;
mod intake;
mod records;

use crate::bulk::{Bulk, Step};
use crate::clockwork::{Clock, SimWords, Steps};
use crate::disk::{Done, Work};
use crate::faults::Fault;
use crate::limits::{JOURNAL_BYTES_MAX, REPLIES_MAX};
use crate::ram::Complaints;
use crate::reach::Reach;
use crate::wires::{Eventfd, Spindle, ToCore, Wires};
use crate::world::{Glass, Replies};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::rc::Rc;
use vmgmt_abi::Status;
use vmgmt_core::doors::{self, EffectShell, RingShell};
use vmgmt_core::effect::{BufferRange, Effect, EffectId, FailedAt, FileSlot, Outcome};
use vmgmt_core::interface::{self, ControlReply, ControlRequest};
use vmgmt_core::policy::VmConfig;
use vmgmt_core::{Hub, Saved};
use vmgmt_device::Tick;
use vmgmt_device::page::{CorePage, FrontPage, LifePage, TouchedPage};
use vmgmt_device::rings::{Buffer, Channel, Input, Modes, Rings, Settings, Token, Turn, check_state};
use vmgmt_host::core::freezes::{self, Freezes};
use vmgmt_host::core::journal::{Fill, Journal, JournalError};
use vmgmt_host::core::sessions::part_of;
use vmgmt_host::messages::CoreToFront;

/// Submissions fetched per session and turn.
const POLL_BUDGET: u32 = 64;

/// A session.
#[derive(Debug)]
pub struct Session {
    slot: usize,
    vm: u64,
    front: FrontPage<SimWords>,
    core: CorePage<SimWords>,
    pub rings: Rings<SimWords>,
    pub memory: Reach,
    vectors: Vec<Option<Eventfd>>,
    touched: u64,
    look: bool,
    active_until: Tick,
    fence_handled: u64,
    fenced_told: u64,
    is_open: bool,
    ended: bool,
}

/// All sessions.
#[derive(Default)]
pub struct Sessions {
    pub map: BTreeMap<u64, Session>,
    opened: Vec<u64>,
}

/// A file that is open in this core life.
#[derive(Clone, Copy, Debug)]
struct OpenFile {
    generation: u32,
    inode: u64,
}

/// What outlives this core.
#[derive(Clone)]
pub struct Outside {
    pub clock: Clock,
    pub steps: Rc<Steps>,
    pub wires: Rc<Wires>,
    pub spindle: Rc<RefCell<Spindle>>,
    pub hub_words: SimWords,
    /// What the operator gets.
    pub replies: Replies,
    /// And what it is told of freezes.
    pub glass: Rc<Glass>,
    pub fault: Rc<Cell<Fault>>,
    pub complaints: Complaints,
    /// How long a core polls after its last work.
    pub poll_ns: u64,
}

impl Outside {
    /// Gives work to the disk, in the name of a VM.
    fn submit(&self, id: EffectId, vm: u64, work: Work) {
        self.steps.step();
        self.spindle.borrow_mut().submit(&self.wires, id, vm, work);
    }
}

/// A core's process.
pub struct Core {
    outside: Outside,
    to_front: VecDeque<(CoreToFront, Vec<u8>)>,
    touched: TouchedPage<SimWords>,
    life_page: LifePage<SimWords>,
    touched_seen: u64,
    kicked: bool,
    pub sessions: Sessions,
    pub hub: Hub,
    journal: Journal<SimWords>,
    snapshot_bytes: usize,
    files: BTreeMap<u32, OpenFile>,
    next_file: u32,
    bulk: Bulk,
    /// What operators wish about quiet.
    freezes: Freezes,
    /// For the operator (connection, request), until its socket has room.
    held: VecDeque<(u64, u64, ControlReply)>,
    /// The operator's connection.
    client: Option<u64>,
    wall_told: Tick,
    active: BTreeSet<u64>,
    watched: BTreeSet<u64>,
    scan: bool,
    /// It said that it sleeps.
    pub asleep: bool,
    /// When it wants to be woken.
    pub due: Option<Tick>,
    /// All sessions of before have been told.
    pub adopted: bool,
    /// How often it has done something that its rooms wanted, and what it was.
    pub done: u64,
    pub last_done: &'static str,
}

impl Sessions {
    /// Begins a session's turn.
    pub fn open(&mut self, number: u64, now: Tick) -> Option<&mut Session> {
        let session = self.map.get_mut(&number).filter(|session| !session.ended)?;
        if !session.is_open {
            session.is_open = true;
            session.memory.begin_dma(now);
            self.opened.push(number);
            let fence = session.front.fence();
            if std::mem::replace(&mut session.fence_handled, fence) != fence {
                session.handle(now, Input::Touched);
            }
        }
        Some(session)
    }
}

impl Session {
    fn handle(&mut self, now: Tick, input: Input) -> Turn {
        self.rings
            .handle(now, &self.front, &self.core, &mut self.memory, input)
    }

    fn tell_fenced(&mut self) -> bool {
        let fenced = self.core.fenced();
        std::mem::replace(&mut self.fenced_told, fenced) != fenced
    }

    fn signal(&self, vector: usize, steps: &Steps) {
        if let Some(fd) = self.vectors.get(vector).and_then(Option::as_ref) {
            steps.step();
            fd.set(fd.get() + 1);
        }
    }

    /// The guest addresses of a submission's data area from `offset` on; `None`: port window.
    pub fn segments(&self, token: Token, offset: u64, bytes: u64) -> Result<Option<Vec<(u64, u64)>>, Status> {
        match self.rings.buffer(token).ok_or(Status::STALE)? {
            Buffer::Guest { segments, bytes: all } if offset + bytes <= all => {
                Ok(Some(part_of(segments, offset, bytes)))
            }
            Buffer::Guest { .. } => Err(Status::BAD_ARGUMENT),
            Buffer::Port { .. } => Ok(None),
        }
    }
}

impl Core {
    /// A core life begins on what the one before left. `undead`: VMs for which workers of dead cores may still do something.
    pub fn new(outside: Outside, undead: BTreeSet<u64>) -> Self {
        let mortal = |words: &SimWords| words.mortal(&outside.steps);
        let journal = match Journal::open(mortal(&outside.hub_words)) {
            Ok(journal) => journal,
            Err(error) => panic!("the hub's memory: {error}"),
        };
        let mut hub = recover(&journal, outside.wires.life, undead);
        // As the real core does: the hub refuses what would make its state larger than its memory.
        let room = interface::Input::StateRoom(journal.room_bytes() as u64);
        hub.handle(outside.clock.now(), room);
        let mut core = Self {
            touched: TouchedPage::new(mortal(&outside.wires.touched)),
            life_page: LifePage::new(mortal(&outside.wires.life_page)),
            touched_seen: u64::MAX,
            to_front: VecDeque::new(),
            kicked: false,
            sessions: Sessions::default(),
            hub,
            journal,
            snapshot_bytes: 0,
            files: BTreeMap::new(),
            next_file: 0,
            bulk: Bulk::default(),
            freezes: Freezes::default(),
            held: VecDeque::new(),
            client: None,
            wall_told: Tick(0),
            active: BTreeSet::new(),
            watched: BTreeSet::new(),
            scan: true,
            asleep: false,
            due: None,
            adopted: false,
            done: 0,
            last_done: "",
            outside,
        };
        core.take_snapshot();
        core
    }

    /// Whether another program could be the core on this state: what it would do first, on a copy of the hub's memory and with the sessions'
    /// in-flight tables as they are, without writing anything.
    pub fn check(
        hub_words: &SimWords,
        tables: impl Iterator<Item = SimWords>,
        life: u64,
    ) -> Result<(), String> {
        let journal =
            Journal::open(hub_words.copy()).map_err(|error| format!("the hub's memory: {error}"))?;
        recover(&journal, life, BTreeSet::new());
        for table in tables {
            check_state(table).map_err(|error| format!("an in-flight table: {error}"))?;
        }
        Ok(())
    }

    /// The keeper tells of a VM.
    pub fn vm(&mut self, config: VmConfig) {
        self.hub
            .handle(self.outside.clock.now(), interface::Input::Vm(config));
    }

    /// The keeper tells that no dead core's worker is left.
    pub fn buried(&mut self) {
        self.hub
            .handle(self.outside.clock.now(), interface::Input::Buried);
        self.outside.wires.wake_core.set(true);
    }

    /// The operator asks.
    pub fn control(&mut self, client: u64, id: u64, request: ControlRequest) {
        self.client = Some(client);
        let input = interface::Input::Control { client, id, request };
        self.hub.handle(self.outside.clock.now(), input);
        self.outside.wires.wake_core.set(true);
    }

    /// The operator's connection is gone.
    pub fn control_closed(&mut self, client: u64) {
        self.client = self.client.filter(|open| *open != client);
        self.held.retain(|(holder, ..)| *holder != client);
        let input = interface::Input::ControlClosed { client };
        self.hub.handle(self.outside.clock.now(), input);
        self.outside.wires.wake_core.set(true);
    }

    /// The operator has read: its socket takes more.
    pub fn operator_has_room(&mut self) {
        self.outside.wires.wake_core.set(true);
    }

    /// Puts into the operator's socket what waits for it. A message's last byte is there, and stays there whatever becomes of this core:
    /// so the hub hears of it behind that.
    fn tell_operator(&mut self, now: Tick) {
        while self.outside.replies.borrow().len() < REPLIES_MAX
            && let Some((client, id, reply)) = self.held.pop_front()
        {
            let told = matches!(reply, ControlReply::Message { .. });
            if told && self.outside.fault.get() == Fault::NotesTooEarly {
                self.hub.handle(now, interface::Input::Told { client, id });
                self.carry(now);
            }
            self.outside.steps.step();
            self.outside.replies.borrow_mut().push_back((id, reply));
            if told && self.outside.fault.get() != Fault::NotesTooEarly {
                self.outside.steps.step();
                self.hub.handle(now, interface::Input::Told { client, id });
            }
        }
    }

    /// Nothing of what an earlier life left with this VM is still to be looked at, and it is known what came of it.
    #[must_use]
    pub fn has_taken_up(&self, vm: u64) -> bool {
        let mut sessions = self.sessions.map.values().filter(|session| session.vm == vm);
        sessions.all(|session| session.ended || session.rings.is_taken_up() && session.rings.is_settled())
    }

    /// It has something to do now.
    #[must_use]
    pub fn is_runnable(&self) -> bool {
        let due = self.due.is_some_and(|due| due <= self.outside.clock.now());
        !self.asleep || due || self.outside.wires.wake_core.get()
    }

    /// One round of the loop: in, work, out, sleep.
    pub fn round(&mut self) {
        let now = self.outside.clock.now();
        if self.asleep {
            self.asleep = false;
            self.life_page.set_core_asleep(false);
        }
        self.outside.wires.wake_core.set(false);
        self.scan = true;
        self.take_packets(now);
        self.take_finished(now);
        self.tell_operator(now);
        self.life_page.move_beat();
        if self.turn(now) {
            return;
        }
        self.due = self.sleep_time(now);
        if self.due.is_some_and(|due| due <= now) {
            return;
        }
        let still = self.life_page.core_falls_asleep(&self.touched, self.touched_seen);
        if self.outside.fault.get() != Fault::SleepsWithoutLooking && !still {
            self.life_page.set_core_asleep(false);
            return;
        }
        // The channel's descriptor would wake it as an eventfd does.
        self.asleep = self.outside.wires.to_core.borrow().is_empty();
        self.look_into_hands();
    }

    /// It sleeps, was not woken, and the front has touched something since it looked.
    #[must_use]
    pub fn sleeps_on_a_touch(&self) -> bool {
        let wires = &self.outside.wires;
        let woken = wires.wake_core.get() || !wires.to_core.borrow().is_empty();
        self.asleep && !woken && self.touched.total() != self.touched_seen
    }

    /// Nobody sleeps on what it has in hand: whoever would wake it next may take for ever.
    fn look_into_hands(&self) {
        let complain = |what: &str| self.outside.complaints.add(format!("the core sleeps on {what}"));
        if self.asleep && self.hub.has_output() {
            complain("outputs of the hub");
        }
        if self.asleep && self.bulk.is_ready() {
            complain("bulk work that could go on");
        }
    }

    /// A wake-up without a cause: it looks at everything of these sessions as if they had been touched.
    pub fn wake_for_nothing(&mut self, sessions: &[u64]) {
        for number in sessions {
            if let Some(session) = self.sessions.map.get_mut(number) {
                session.look = true;
            }
        }
        self.outside.wires.wake_core.set(true);
    }

    fn did(&mut self, what: &'static str) {
        self.done += 1;
        self.last_done = what;
    }

    /// An ordered end.
    pub fn end(mut self) {
        let now = self.outside.clock.now();
        self.close_sessions(now);
        self.take_snapshot();
    }

    fn turn(&mut self, now: Tick) -> bool {
        if now.since_ns(self.wall_told) >= 1_000_000 || self.wall_told == Tick(0) {
            self.wall_told = now;
            // Some day in 2023, and virtual time since.
            let now_ns = 1_700_000_000_000_000_000 + now.0;
            self.hub.handle(now, interface::Input::WallClock { now_ns });
        }
        let mut worked = self.run_sessions(now);
        if self.hub.poll_timeout().is_some_and(|due| due <= now) {
            self.hub.handle_timeout(now);
        }
        worked |= self.carry(now);
        let sleeps_on_answers = self.outside.fault.get() == Fault::SleepsOnAnswers;
        if self.bulk.is_ready() {
            worked |= !sleeps_on_answers;
            for session in self.bulk.sessions() {
                self.sessions.open(session, now);
            }
            self.step_bulk(now);
            if sleeps_on_answers {
                worked |= self.bulk.is_ready();
            } else {
                self.carry(now);
            }
        }
        self.close_sessions(now);
        worked |= self.hub.has_output() && !sleeps_on_answers;
        worked |= self.run_fences(now);
        self.run_freezes(now);
        self.send_to_front();
        if std::mem::take(&mut self.kicked) && self.touched.front_asleep() {
            self.outside.steps.step();
            self.outside.wires.wake_front.set(true);
        }
        worked
    }

    fn run_sessions(&mut self, now: Tick) -> bool {
        self.note_touched(now);
        let mut worked = false;
        for number in self.active.iter().copied().collect::<Vec<_>>() {
            self.life_page.set_blame(number, 0);
            worked |= self.run_session(number, now);
            self.route(number, now);
            self.life_page.set_blame(0, 0);
        }
        worked
    }

    fn note_touched(&mut self, now: Tick) {
        let total = self.touched.total();
        let touched = std::mem::replace(&mut self.touched_seen, total) != total;
        if !touched && !self.scan {
            return;
        }
        self.scan = false;
        for (number, session) in &mut self.sessions.map {
            let count = self.touched.touched(session.slot);
            if count != session.touched {
                session.touched = count;
                session.look = true;
            }
            let due = |due: Option<Tick>| due.is_some_and(|due| due <= now);
            if session.ended || due(session.memory.poll_timeout()) {
                self.watched.insert(*number);
            }
            if !session.ended && (session.look || due(session.rings.poll_timeout())) {
                self.active.insert(*number);
            }
        }
    }

    fn run_session(&mut self, number: u64, now: Tick) -> bool {
        let Some(session) = self.sessions.open(number, now) else {
            self.active.remove(&number);
            return false;
        };
        let look = std::mem::take(&mut session.look);
        if look {
            session.handle(now, Input::Touched);
            self.bulk.look_again(number);
        }
        if session.rings.poll_timeout().is_some_and(|due| due <= now) {
            session
                .rings
                .handle_timeout(now, &session.front, &session.core, &mut session.memory);
        }
        let turn = session.handle(now, Input::Poll { budget: POLL_BUDGET });
        if turn.progressed() || look {
            session.active_until = now.after_ns(self.outside.poll_ns);
        }
        if turn.more || now < session.active_until {
            return true;
        }
        let unarmed = self.outside.fault.get() == Fault::SleepsUnarmed;
        if !unarmed && session.rings.arm(&session.front, &mut session.memory) {
            return true;
        }
        self.active.remove(&number);
        false
    }

    fn run_fences(&mut self, now: Tick) -> bool {
        let mut gave_up = false;
        for number in self.watched.iter().copied().collect::<Vec<_>>() {
            let Some(session) = self.sessions.map.get_mut(&number) else {
                self.watched.remove(&number);
                continue;
            };
            if session.memory.poll_timeout().is_some_and(|due| due <= now) {
                session.look = true;
                gave_up = true;
            }
            session.memory.poll_fences(now);
            let (slot, fenced) = (session.slot, session.tell_fenced());
            let waits = session.memory.is_fence_waiting();
            if !waits && (!session.ended || !session.memory.holds_leases()) {
                self.watched.remove(&number);
                if session.ended {
                    self.sessions.map.remove(&number);
                }
            }
            if fenced {
                self.kick(slot);
            }
        }
        if gave_up {
            self.bulk.handle_memory();
        }
        gave_up
    }

    fn sleep_time(&mut self, now: Tick) -> Option<Tick> {
        let mut due = [self.hub.poll_timeout(), self.freezes.poll_timeout()]
            .into_iter()
            .flatten()
            .min();
        for session in self.sessions.map.values() {
            due = [due, session.rings.poll_timeout(), session.memory.poll_timeout()]
                .into_iter()
                .flatten()
                .min();
            if session.look && !session.ended {
                self.scan = true;
                due = Some(now);
            }
        }
        due.filter(|due| *due != Tick::NEVER)
    }

    fn send_to_front(&mut self) {
        while !self.to_front.is_empty()
            && self.outside.wires.to_front.borrow().len() < crate::limits::CHANNEL_PACKETS_MAX
        {
            self.outside.steps.step();
            if let Some(packet) = self.to_front.pop_front() {
                self.outside.wires.to_front.borrow_mut().push_back(packet);
            }
        }
    }
}

fn recover(journal: &Journal<SimWords>, life: u64, undead: BTreeSet<u64>) -> Hub {
    let recovered = match journal.recover() {
        Ok(recovered) => recovered,
        Err(error) => panic!("the hub's memory after a death: {error}"),
    };
    let saved = recovered
        .snapshot
        .map(|bytes| Saved::from_bytes(&bytes).unwrap_or_else(|error| panic!("a snapshot: {error}")));
    let records = recovered.records.iter();
    let records =
        records.map(|bytes| vmgmt_core::Record::read(bytes).unwrap_or_else(|error| panic!("{error}")));
    Hub::replay_beside(life, undead, saved, records)
        .unwrap_or_else(|error| panic!("the hub's records: {error}"))
}
