//! The core's event loop: the one file that moves values between the rooms.
//!
//! A turn: take in what came (keeper, front, operators, workers), run the sessions that were touched or are polled, carry
//! what comes out to the hub and back until nothing comes any more, move bulk bytes for about a millisecond, end the sessions'
//! turns (interrupts go out), and sleep if there was nothing to do.

mod carry;
mod freeze;
mod hands;
mod intake;
mod slices;
mod take_over;

pub use hands::Hands;

use crate::channel::{Channel, ChannelError, Packet};
use crate::config::{CoreConfig, DeviceConfig, VmConfig};
use crate::control::limits::TOKENS as CONTROL_TOKENS;
use crate::control::protocol::UpgradeReport;
use crate::core::bulk::Bulk;
use crate::core::freezes::Freezes;
use crate::core::journal::Journal;
use crate::core::lines::{Line, Lines};
use crate::core::memory::MemoryLimits;
use crate::core::memory::limits::MESSAGE_WAIT_NS;
use crate::core::operators::{Ask, Books, Operators, Transfer};
use crate::core::saving::Saving;
use crate::core::sessions::{Session, Sessions};
use crate::core::trial::Held;
use crate::core::wake::Wake;
use crate::core::{Ahead, Start};
use crate::fault;
use crate::messages::{CoreToFront, CoreToKeeper, FrontToCore, KeeperToCore, Notice};
use crate::store::{Done, Store};
use crate::words::MappedWords;
use anyhow::{Context, anyhow, bail};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::time::{ClockId, clock_gettime};
use slices::Rota;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::mem::ManuallyDrop;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmgmt_abi::Status;
use vmgmt_core::effect::{Effect, EffectId, FailedAt, Outcome};
use vmgmt_core::interface::{self, ControlRequest};
use vmgmt_core::{Hub, Record, RestoreError, Saved};
use vmgmt_ctl::protocol::{LastFault, SandboxedRole};
use vmgmt_device::Tick;
use vmgmt_device::page::{LifePage, TouchedPage, Words};
use vmgmt_device::rings::{Input, Output};

const KEEPER: Token = Token(0);
const FRONT: Token = Token(1);
const WAKE: Token = Token(2);
const STORE: Token = Token(3);
const CONTROL: usize = 16;
const _: () = assert!(CONTROL_TOKENS < usize::MAX - CONTROL);

/// Nothing is written down for the next core. For one measurement: what it costs to do so.
const FORGETFUL: bool = cfg!(feature = "without-crash-consistency");

/// Submissions fetched per session and turn: a batch of the rings, so that neighbours wait for no more than that.
const POLL_BUDGET: u32 = 64;
/// How long a ring's doorbell is spared while a worker writes for it: the worker comes back in some 100 µs, and then the loop looks at the
/// ring anyway, while a doorbell would cost two wake-ups, of the front and of the core. A disk may take longer: hence an end.
const SPARED_NS: u64 = 1_000_000;
/// While the rings give work, descriptors are looked at no more often than this.
const LOOK_NS: u64 = 50_000;
/// While they are polled and give none: what comes next may well come by a descriptor, as a program's answer to a guest. (A look at nothing
/// costs half a microsecond.)
const LOOK_IDLE_NS: u64 = 5_000;
/// The hub is told the wall time when it is older than this.
const WALL_CLOCK_NS: u64 = 1_000_000;
/// Descriptors of the keeper's Start, without those of the shares.
pub(super) const START_FDS: usize = 7;
/// Packets taken from a channel in one turn, so that nobody's flood holds up the rings.
const PACKETS_MAX: usize = 64;

/// The core's process.
pub struct EventLoop {
    poll: Poll,
    keeper: Channel,
    /// The end of this channel is the end of this core for the front, which has it killed then: the process's own end closes it, not that of
    /// a value that is let go before all guest memory is unmapped. Else an ordered end, an error or a panic would be told as a core that stood still.
    front: ManuallyDrop<Channel>,
    /// Packets for the front that found no room.
    to_front: VecDeque<(CoreToFront, Vec<u8>)>,
    /// What the front said while this core was on trial.
    held: VecDeque<Packet<FrontToCore>>,
    /// The front has said more than was taken in.
    more_comes: bool,
    wake: Wake,
    life: u64,
    /// The version of the roles' words that is spoken.
    channel: u32,
    config: CoreConfig,
    vms: BTreeMap<u64, VmConfig>,
    /// Sockets of VMs that the keeper is adding, by request.
    adding: BTreeMap<u64, (Option<String>, std::path::PathBuf)>,
    sessions: Sessions,
    hub: Hub,
    saving: Saving<MappedWords>,
    store: Store,
    bulk: Bulk,
    operators: Operators,
    freezes: Freezes,
    lines: Lines,
    /// The last upgrade, as the keeper tells it.
    upgrade: Option<Box<UpgradeReport>>,
    /// What this process may still do, and the front.
    sandbox: Vec<SandboxedRole>,
    /// The last fault that took a device of a VM out of service, by the VM's name.
    faults: BTreeMap<String, LastFault>,
    /// The keeper can read the configuration anew.
    reloads: bool,
    started: Instant,
    /// Whole until all sessions of before have been told.
    adopted: bool,
    ready: bool,
    stopping: bool,
    /// Another core is to take over: nothing more is fetched, and this one ends when its bulk work has, or then.
    draining: Option<Tick>,
    wall_told: Tick,
    looked: Tick,
    /// Something was done in this turn, beside polling.
    progressed: bool,
    /// When all sessions were last to be looked at for something due.
    scanned: Tick,
    /// Sessions whose rings are polled.
    active: BTreeSet<u64>,
    rota: Rota,
    /// Sessions with a fence that waits, or that have ended.
    watched: BTreeSet<u64>,
    /// All sessions are to be looked at for something due.
    scan: bool,
}

impl EventLoop {
    /// Takes up the state that earlier lives left. `sandbox`: what this process may still do.
    ///
    /// # Errors
    /// The state cannot be read.
    pub fn new(hands: Hands, sandbox: SandboxedRole) -> anyhow::Result<Self> {
        let Hands {
            keeper,
            front,
            wake,
            hub_state,
            life,
            channel,
            config,
            store,
            poll,
            operators,
            undead,
            reloads,
        } = hands;
        let sandbox = vec![sandbox];
        let journal = Journal::open(MappedWords::writable(&hub_state).context("the hub's state")?)?;
        let mut hub = recover(&journal, life, undead)?;
        let saving = Saving::new(journal);
        hub.handle(now(), interface::Input::StateRoom(saving.room_bytes()));
        Ok(Self {
            poll,
            keeper,
            front,
            to_front: VecDeque::new(),
            held: VecDeque::new(),
            more_comes: false,
            wake,
            life,
            channel,
            config,
            vms: BTreeMap::new(),
            adding: BTreeMap::new(),
            sessions: Sessions::default(),
            hub,
            saving,
            store,
            bulk: Bulk::default(),
            operators,
            freezes: Freezes::default(),
            lines: Lines::default(),
            upgrade: None,
            sandbox,
            faults: BTreeMap::new(),
            reloads,
            started: Instant::now(),
            adopted: false,
            ready: false,
            stopping: false,
            draining: None,
            wall_told: Tick(0),
            looked: Tick(0),
            progressed: false,
            scanned: Tick(0),
            active: BTreeSet::new(),
            rota: Rota::default(),
            watched: BTreeSet::new(),
            scan: true,
        })
    }

    /// Serves until the keeper says stop or is gone. `held`: what came in while this core was on trial, if it was. `ahead`: until it serves
    /// what was there before it.
    ///
    /// # Errors
    /// What makes it impossible to go on.
    pub(super) fn run(mut self, held: Option<Held>, mut ahead: Option<Ahead>) -> anyhow::Result<()> {
        let mut events = Events::with_capacity(256);
        match held {
            Some(held) => {
                if let Some(ahead) = &mut ahead {
                    ahead.begin_anew();
                }
                self.take_over(held)?;
            }
            None => {
                let snapshot = self.saving.pack(&mut self.hub);
                self.saving.begin(&self.hub, snapshot)?;
                self.tell_saving();
            }
        }
        ahead.take_if(|ahead| ahead.is_over(false));
        self.take_in_everything()?;
        while !self.stopping {
            let now = now();
            self.wake.beat();
            self.progressed = false;
            let worked = self.turn(now)?;
            let patience_ns = if self.progressed { LOOK_NS } else { LOOK_IDLE_NS };
            if worked && now.since_ns(self.looked) < patience_ns {
                continue;
            }
            let mut timeout = if worked {
                Some(Duration::ZERO)
            } else {
                self.sleep_time(now)
            };
            if timeout != Some(Duration::ZERO) && self.saving.idle(&mut self.hub)? {
                self.tell_saving();
                // The hub may have more to say now.
                timeout = Some(Duration::ZERO);
            }
            // Who is awake again so soon need not be woken for each result of the workers.
            let looks_soon = timeout.is_some_and(|timeout| timeout.as_nanos() <= u128::from(SPARED_NS));
            let untold = !self.store.promise(looks_soon);
            let sleeps = timeout != Some(Duration::ZERO) && !untold && self.wake.fall_asleep();
            let timeout = if sleeps { timeout } else { Some(Duration::ZERO) };
            // It sleeps: nobody is left who waits for it.
            ahead.take_if(|ahead| ahead.is_over(sleeps && self.ready));
            match self.poll.poll(&mut events, timeout) {
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                polled => polled.context("waiting for events")?,
            }
            if sleeps {
                self.wake.wake_up();
            }
            self.looked = self::now();
            if !worked || !events.is_empty() || self.looked.since_ns(self.scanned) >= LOOK_NS {
                self.scanned = self.looked;
                self.scan = true;
                self.handle_events(&events, looks_soon || untold)?;
            }
        }
        self.end()
    }

    /// One turn; whether anything was done, so that it is worth going round at once.
    fn turn(&mut self, now: Tick) -> anyhow::Result<bool> {
        if now.since_ns(self.wall_told) >= WALL_CLOCK_NS {
            self.wall_told = now;
            self.hub.handle(
                now,
                interface::Input::WallClock {
                    now_ns: wall_clock_ns(),
                },
            );
        }
        let mut worked = self.run_sessions(now);
        self.handle_timeouts(now);
        let carried = self.carry(now)?;
        worked |= carried;
        self.progressed |= carried;
        if self.bulk.is_ready() {
            worked = true;
            self.progressed = true;
            for session in self.bulk.sessions() {
                self.sessions.open(session, now);
            }
            let mut finished = Vec::new();
            let wake = &self.wake;
            let mut blame = |session, other| wake.blame_both(session, other);
            self.bulk
                .step(&mut self.sessions, &self.store, &mut finished, &mut blame);
            self.wake.blame(0);
            self.tell_outcomes(finished, now);
            self.carry(now)?;
        }
        self.close_sessions(now)?;
        // The end of a turn tells the hub what was published; what follows from it is done in the next turn, not after the next sleep.
        worked |= self.hub.has_output();
        worked |= self.run_fences(now);
        self.run_freezes(now);
        // A freeze that is taken back goes to the front now, not after the next sleep: the VM would stay frozen until something else happens.
        self.send_to_front()?;
        self.wake.tell();
        if (self.draining).is_some_and(|due| due <= now || (self.bulk.is_idle() && self.store.is_idle())) {
            self.stopping = true;
        }
        if self.adopted && !self.ready {
            self.ready = true;
            self.tell_keeper(&CoreToKeeper::Ready {
                life: self.life,
                channel: self.channel,
            })?;
            self.take_operators();
        }
        Ok(worked)
    }

    /// Lets the rings of touched and of polled sessions run, for a slice of time; who is left has its fences served in this turn all the same.
    fn run_sessions(&mut self, now: Tick) -> bool {
        self.note_touched(now);
        let mut worked = false;
        let mut rota = std::mem::take(&mut self.rota);
        let active = self.active.clone();
        let left = rota.run(&active, self::now, |number| {
            self.wake.blame(number);
            worked |= self.run_session(number, now);
            self.route(number, now);
            self.wake.blame(0);
        });
        self.rota = rota;
        worked |= !left.is_empty();
        for number in left {
            let session = self.sessions.get_mut(number);
            if session.is_some_and(|session| session.front.fence() != session.core.fenced()) {
                self.watched.insert(number);
            }
        }
        worked
    }

    /// Adds the sessions that the front touched, or that have something due, to the active ones.
    fn note_touched(&mut self, now: Tick) {
        let touched = self.wake.is_touched();
        if !touched && !self.scan {
            return;
        }
        self.scan = false;
        for (number, session) in self.sessions.iter_mut() {
            let count = self.wake.touched(session.slot);
            if count != session.touched {
                session.touched = count;
                session.look = true;
            }
            let due = |due: Option<Tick>| due.is_some_and(|due| due <= now);
            if session.ended || due(session.memory.poll_timeout()) {
                self.watched.insert(number);
            }
            if !session.ended && (session.look || due(session.rings_due())) {
                self.active.insert(number);
            }
        }
    }

    /// How long a session is polled after its last work. While a worker moves a megabyte, polling would only take the processor that
    /// it could use.
    fn poll_ns(&self) -> u64 {
        if self.bulk.is_on_workers() {
            0
        } else {
            self.config.poll_ns
        }
    }

    /// Runs one session's rings; whether going round again is worth it.
    fn run_session(&mut self, number: u64, now: Tick) -> bool {
        let poll_ns = self.poll_ns();
        let Some(session) = self.sessions.open(number, now) else {
            self.active.remove(&number);
            return false;
        };
        let look = std::mem::take(&mut session.look);
        if look {
            session.handle(now, Input::Touched);
            self.bulk.look_again(number);
        }
        if session.rings_due().is_some_and(|due| due <= now) {
            session
                .rings
                .handle_timeout(now, &session.front, &session.core, &mut session.memory);
        }
        if self.draining.is_some() {
            session.handle(now, Input::Poll { budget: 0 });
            self.active.remove(&number);
            return false;
        }
        let turn = session.handle(now, Input::Poll { budget: POLL_BUDGET });
        self.progressed |= turn.progressed();
        if turn.progressed() || look {
            session.active_until = now.after_ns(poll_ns);
        }
        if turn.progressed() {
            session.spared_until = now.after_ns(SPARED_NS);
        }
        if turn.more || now < session.active_until {
            return true;
        }
        // A ring for which a worker writes is looked at when the worker is back.
        let spared = match now < session.spared_until {
            true => self.bulk.rings_that_write(number),
            false => 0,
        };
        // The guest may have published just before it could see the event word armed: then once more.
        if session.rings.arm_but(&session.front, &mut session.memory, spared) {
            return true;
        }
        if spared == 0 {
            self.active.remove(&number);
        }
        false
    }

    /// Lets fences pass that wait, and lets sessions go that have ended and whose memory nobody holds any more. True: something was given up, and
    /// who waited for it goes on in the next turn.
    fn run_fences(&mut self, now: Tick) -> bool {
        let mut gave_up = false;
        for number in self.watched.iter().copied().collect::<Vec<_>>() {
            let Some(session) = self.sessions.get_mut(number) else {
                self.watched.remove(&number);
                continue;
            };
            self.wake.blame(number);
            if session.memory.poll_timeout().is_some_and(|due| due <= now) {
                session.memory.handle_timeout(now);
                // As when a message was answered: rings and bulk work may have waited for one that is given up now.
                session.look = true;
                gave_up = true;
            } else {
                session.memory.poll_fences(now);
            }
            if session.tell_fenced() {
                self.wake.kick(session.slot);
            }
            let waits = session.memory.is_fence_waiting();
            if !waits && (!session.ended || session.memory.leases() == 0) {
                self.watched.remove(&number);
                if session.ended {
                    self.sessions.remove(number);
                }
            }
        }
        self.wake.blame(0);
        if gave_up {
            self.scan = true;
            self.bulk.handle_memory();
        }
        gave_up
    }

    /// How long the loop may sleep; zero: not at all.
    fn sleep_time(&mut self, now: Tick) -> Option<Duration> {
        if self.more_comes {
            return Some(Duration::ZERO);
        }
        let mut due = [
            self.hub.poll_timeout(),
            self.freezes.poll_timeout(),
            self.draining,
        ]
        .into_iter()
        .flatten()
        .min();
        for (number, session) in self.sessions.iter_mut() {
            let spared = self.active.contains(&number).then_some(session.spared_until);
            due = [due, spared, session.rings_due(), session.memory.poll_timeout()]
                .into_iter()
                .flatten()
                .min();
            if session.look && !session.ended {
                self.scan = true;
                due = Some(now);
            }
        }
        due.filter(|due| *due != Tick::NEVER)
            .map(|due| Duration::from_nanos(due.since_ns(now)))
    }

    /// An ordered end: what the rings have published is signalled; what is in flight stays in the tables for the next life.
    fn end(mut self) -> anyhow::Result<()> {
        self.close_sessions(now())?;
        self.tidy_up()?;
        // The process's end lets all go at once, and sooner than it could be done mapping by mapping: the next core waits for it.
        std::mem::forget(self);
        Ok(())
    }
}

/// The hub as an earlier life left it.
/// `undead`: VMs for which workers of killed cores may still do something.
pub(super) fn recover<W: Words>(
    journal: &Journal<W>,
    life: u64,
    undead: BTreeSet<u64>,
) -> anyhow::Result<Hub> {
    let recovered = journal.recover().context("the hub's state")?;
    let saved = recovered
        .snapshot
        .map(|bytes| Saved::from_bytes(&bytes))
        .transpose()
        .context("the hub's state")?;
    let mut records = Vec::with_capacity(recovered.records.len());
    for bytes in &recovered.records {
        records.push(Record::read(bytes)?);
    }
    if fault::is("reads", "version 1") {
        let named = saved.iter().flat_map(Saved::features).next();
        let mut newer = records.iter().filter_map(Record::feature);
        named.map_or(Ok(()), |name| Err(RestoreError::Feature(name.to_owned())))?;
        anyhow::ensure!(newer.next().is_none(), "a record of an unknown kind");
    }
    Hub::replay_beside(life, undead, saved, records).context("the hub's state")
}

/// Time since boot, suspended time included: the same clock in every process and life.
fn now() -> Tick {
    let time = clock_gettime(ClockId::Boottime);
    Tick(
        (time.tv_sec as u64)
            .saturating_mul(1_000_000_000)
            .saturating_add(time.tv_nsec as u64),
    )
}

fn wall_clock_ns() -> u64 {
    let time = clock_gettime(ClockId::Realtime);
    u64::try_from(time.tv_sec)
        .unwrap_or(0)
        .saturating_mul(1_000_000_000)
        .saturating_add(time.tv_nsec as u64)
}
