//! The front's event loop: whose turn it is, and who is told what.
//!
//! In: readiness, time, packets of the keeper and the core. Out: calls of sessions; packets. Must never know: what a request means.
//!
//! mio reports each readiness once: what was not used up is remembered in the session (`readable`, `writable`) and in `ready`.

use super::closer::{Closer, SharedFd};
use super::core_link::CoreLink;
use super::frozen::Frozen;
use super::limits;
use super::log_budget::LogBudget;
use super::outbox::Outbox;
use super::session::{Admission, Outside, Session};
use crate::channel::Channel;
use crate::config::DeviceConfig;
use crate::messages::{FrontToKeeper, SessionFault};
use crate::sandbox::peer_of;
use anyhow::Context;
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{Shutdown, SocketFlags, accept_with, shutdown, sockopt};
use rustix::time::{ClockId, clock_gettime};
use slab::Slab;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Duration;
use vmgmt_ctl::protocol::SandboxedRole;
use vmgmt_device::Tick;
use vmgmt_mem::Signals;

const KEEPER: Token = Token(0);
pub(super) const CORE: Token = Token(1);
pub(super) const WAKE: Token = Token(2);
/// Listener n has LISTENERS + n; session slot n has SESSIONS + 2 n for its socket, and one more for its unmask eventfd.
pub(super) const LISTENERS: usize = 1 << 32;
pub(super) const SESSIONS: usize = 1 << 40;

pub(super) struct Listener {
    pub(super) socket: SharedFd,
    pub(super) device: DeviceConfig,
    /// There may be connections to accept.
    pub(super) ready: bool,
}

/// The front.
pub struct Front {
    pub(super) poll: Poll,
    pub(super) keeper: Outbox<FrontToKeeper>,
    pub(super) listeners: BTreeMap<u32, Listener>,
    pub(super) sessions: Slab<Session>,
    /// Slots by session number.
    pub(super) numbers: BTreeMap<u64, usize>,
    pub(super) core: Option<CoreLink>,
    /// Slots still to be told to the core, before `Adopted`.
    pub(super) adopting: Option<VecDeque<usize>>,
    /// Slots that can go on at once, in turn.
    pub(super) ready: VecDeque<usize>,
    pub(super) deadlines: BTreeSet<(Tick, usize)>,
    /// Slots that wait for the core.
    pub(super) waiting: BTreeSet<usize>,
    /// Slots with a map whose object waits for the core's channel.
    pub(super) stalled: BTreeSet<usize>,
    /// Eventfds that unmask INTx, by slot.
    pub(super) unmask: BTreeMap<usize, SharedFd>,
    /// VMs without DMA.
    pub(super) frozen: Frozen,
    pub(super) next_session: u64,
    pub(super) accept_again: Tick,
    /// Listeners with too many newcomers are looked at again then.
    pub(super) newcomers_again: Tick,
    pub(super) buffer: Vec<u8>,
    pub(super) signals: Signals,
    pub(super) closer: Closer,
    pub(super) keeper_ready: bool,
    pub(super) core_ready: bool,
    pub(super) stopping: Option<Tick>,
    /// Another front serves in its place.
    pub(super) left: bool,
    /// Lines about connections that come and go.
    pub(super) log: LogBudget,
    /// What this process may still do, for the operators: told to each core.
    pub(super) sandbox: SandboxedRole,
    pub(super) now: Tick,
}

impl Front {
    /// A front without listeners; says Ready.
    pub fn new(keeper: Channel) -> anyhow::Result<Self> {
        let poll = Poll::new().context("no event loop for the front")?;
        let mut front = Self {
            poll,
            keeper: Outbox::new(keeper),
            listeners: BTreeMap::new(),
            sessions: Slab::new(),
            numbers: BTreeMap::new(),
            core: None,
            adopting: None,
            ready: VecDeque::new(),
            deadlines: BTreeSet::new(),
            waiting: BTreeSet::new(),
            stalled: BTreeSet::new(),
            unmask: BTreeMap::new(),
            frozen: Frozen::default(),
            next_session: first_session()?,
            accept_again: Tick::NEVER,
            newcomers_again: Tick::NEVER,
            buffer: vec![0; limits::READ_BYTES],
            signals: Signals::new()
                .context("no asynchronous I/O to signal interrupts with (is fs.aio-max-nr used up?)")?,
            closer: Closer::new().context("no threads to close clients' descriptors in")?,
            keeper_ready: true,
            core_ready: false,
            stopping: None,
            left: false,
            log: LogBudget::new(now()?),
            sandbox: SandboxedRole::default(),
            now: now()?,
        };
        let channel = front.keeper.channel().as_fd().as_raw_fd();
        front.register(channel, KEEPER, Interest::READABLE | Interest::WRITABLE)?;
        front.keeper.send(FrontToKeeper::Ready, Vec::new(), Vec::new());
        Ok(front)
    }

    /// Turns until the end.
    pub fn run(mut self) -> anyhow::Result<()> {
        let mut events = Events::with_capacity(1024);
        loop {
            self.wait(&mut events)?;
            self.turn(&events)?;
            if self.left || self.is_over() {
                return Ok(());
            }
        }
    }

    /// Looks at all that came, once.
    pub(super) fn turn(&mut self, events: &Events) -> anyhow::Result<()> {
        self.now = now()?;
        for event in events {
            self.event(event);
        }
        self.keeper_packets()?;
        if self.left {
            return Ok(());
        }
        self.core_packets();
        self.kicks();
        self.adopt();
        self.accept();
        self.flush_core();
        self.work();
        self.timeouts();
        self.freezes();
        self.beat();
        self.resume_maps();
        self.keeper.flush();
        Ok(())
    }

    /// Sleeps until something is due; by the scheme of the shared pages, so that no kick is lost.
    fn wait(&mut self, events: &mut Events) -> anyhow::Result<()> {
        let core = !self.ready.is_empty() || self.adopting.is_some() || self.core_ready;
        let mut awake = self.keeper_ready || core && !self.is_held_up();
        awake |= self.listeners.values().any(|listener| listener.ready) && self.accept_again == Tick::NEVER;
        let mut timeout = Duration::ZERO;
        if !awake && self.core.as_ref().is_none_or(CoreLink::fall_asleep) {
            timeout = Duration::from_nanos(self.next_deadline().since_ns(now()?));
        }
        let polled = self.poll.poll(events, Some(timeout));
        if let Some(core) = &self.core {
            core.wake_up();
        }
        match polled {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => {
                Err(error).context("waiting for events")
            }
            _ => Ok(()),
        }
    }

    /// At most an hour from now: a deadline that never comes needs no exact sleep.
    fn next_deadline(&self) -> Tick {
        let session = self
            .deadlines
            .first()
            .map_or(Tick::NEVER, |(deadline, _)| *deadline);
        let core = self.core.as_ref().map_or(Tick::NEVER, CoreLink::deadline);
        let queued = self.core.as_ref().is_some_and(|core| !core.outbox.is_empty());
        let flush = if queued {
            self.now.after_ns(limits::FLUSH_RETRY_NS)
        } else {
            Tick::NEVER
        };
        let stop = self
            .stopping
            .map_or(Tick::NEVER, |since| since.after_ns(limits::STOP_NS_MAX));
        let hour = self.now.after_ns(3_600_000_000_000);
        session
            .min(core)
            .min(flush)
            .min(stop)
            .min(self.accept_again)
            .min(self.newcomers_again)
            .min(self.frozen.deadline())
            .min(hour)
    }

    fn event(&mut self, event: &mio::event::Event) {
        match event.token() {
            KEEPER => self.keeper_ready = true,
            CORE => self.core_ready = true,
            WAKE => {}
            Token(token) if token >= SESSIONS => {
                let slot = (token - SESSIONS) / 2;
                if token % 2 == 1 {
                    self.unmask_signalled(slot);
                } else if let Some(session) = self.sessions.get_mut(slot) {
                    session.readable |= event.is_readable() || event.is_read_closed() || event.is_error();
                    session.writable |= event.is_writable() || event.is_error();
                    // A client that leaves before it is admitted is not read, but seen.
                    if session.admission == Admission::Asked
                        && event.is_read_closed()
                        && event.is_write_closed()
                    {
                        self.serve(slot, |session, outside| {
                            session.end(outside, "the client left before it was admitted")
                        });
                    } else {
                        self.enqueue(slot);
                    }
                }
            }
            Token(token) => {
                let number = u32::try_from(token.wrapping_sub(LISTENERS)).unwrap_or(u32::MAX);
                if let Some(listener) = self.listeners.get_mut(&number) {
                    listener.ready = true;
                }
            }
        }
    }

    // ---- clients

    fn accept(&mut self) {
        // First: the loop wakes for both, and a tick that has passed would keep it awake.
        if self.newcomers_again <= self.now {
            self.newcomers_again = Tick::NEVER;
            self.listeners
                .values_mut()
                .for_each(|listener| listener.ready = true);
        }
        if self.accept_again > self.now && self.accept_again != Tick::NEVER {
            return;
        }
        self.accept_again = Tick::NEVER;
        let numbers: Vec<u32> = self
            .listeners
            .iter()
            .filter(|(_, listener)| listener.ready)
            .map(|(n, _)| *n)
            .collect();
        let mut counts: BTreeMap<u32, (usize, usize)> = BTreeMap::new();
        for (_, session) in self.sessions.iter().filter(|_| !numbers.is_empty()) {
            let (held, newcomers) = counts.entry(session.listener).or_default();
            *held += 1;
            *newcomers += usize::from(session.is_newcomer());
        }
        for number in numbers {
            if self.closer.is_behind(number) {
                if let Some(listener) = self.listeners.get_mut(&number) {
                    listener.ready = false;
                }
                self.newcomers_again = self.now.after_ns(limits::ACCEPT_RETRY_NS);
                continue;
            }
            let (held, newcomers) = counts.get(&number).copied().unwrap_or_default();
            let room = limits::NEWCOMERS_MAX.saturating_sub(newcomers);
            for accepted in 0..limits::ACCEPTS_PER_TURN_MAX {
                let Some(listener) = self.listeners.get_mut(&number) else {
                    break;
                };
                if accepted == room {
                    listener.ready = false;
                    self.newcomers_again = self.now.after_ns(limits::ACCEPT_RETRY_NS);
                    break;
                }
                match accept_with(&listener.socket, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK) {
                    Ok(socket) => self.accepted(number, held + accepted, socket),
                    Err(Errno::AGAIN) => {
                        listener.ready = false;
                        break;
                    }
                    Err(Errno::INTR | Errno::CONNABORTED) => {}
                    Err(error) => {
                        if self.log.take(self.now).is_some() {
                            tracing::warn!(%error, "cannot accept a connection; trying again");
                        }
                        self.accept_again = self.now.after_ns(limits::ACCEPT_RETRY_NS);
                        return;
                    }
                }
            }
        }
    }

    /// `held`: connections of that listener before.
    fn accepted(&mut self, listener: u32, held: usize, socket: OwnedFd) {
        let known = peer_of(&socket).and_then(|peer| take_all_in_order(&socket).map(|()| peer));
        let (pid, uid) = match known {
            Ok(peer) => peer,
            Err(error) => {
                if self.log.take(self.now).is_some() {
                    tracing::warn!(%error, "a connection is closed: its socket cannot be looked at or set");
                }
                return self.closer.close(listener, socket);
            }
        };
        let name = format!("process {pid} of uid {uid}");
        let quiet = self.log.take(self.now).is_none();
        let all = self.sessions.len();
        if !has_room(held, all) {
            if !quiet {
                tracing::warn!(client = %name, "{all} sessions are connected, {held} of them by this socket: no room for one more");
            }
            self.closer.close(listener, socket);
            return;
        }
        let entry = self.sessions.vacant_entry();
        let slot = entry.key();
        let raw = socket.as_raw_fd();
        let session = self.next_session;
        self.next_session += 1;
        let mut client = Session::new(self.now, session, slot, listener, name, socket);
        client.quiet = quiet;
        entry.insert(client);
        self.numbers.insert(session, slot);
        if let Err(error) = self.register(
            raw,
            Token(SESSIONS + 2 * slot),
            Interest::READABLE | Interest::WRITABLE,
        ) {
            tracing::error!(%error, "cannot watch a connection");
            let socket = self.sessions.remove(slot).socket;
            socket
                .into_iter()
                .for_each(|socket| self.closer.close(listener, socket));
            self.numbers.remove(&session);
            return;
        }
        self.tell_keeper(FrontToKeeper::Admit {
            session,
            listener,
            pid,
            uid,
        });
    }

    /// Gives a slot its turn soon.
    pub(super) fn enqueue(&mut self, slot: usize) {
        if let Some(session) = self.sessions.get_mut(slot).filter(|session| !session.queued) {
            session.queued = true;
            self.ready.push_back(slot);
        }
    }

    /// One turn for each that can go on.
    fn work(&mut self) {
        for _ in 0..self.ready.len() {
            if self.is_held_up() {
                return;
            }
            let Some(slot) = self.ready.pop_front() else {
                return;
            };
            let Some(session) = self.sessions.get_mut(slot) else {
                continue;
            };
            session.queued = false;
            let core = self.core.as_ref().map(|core| core.life);
            session.done |= session.fault.is_lost() && (core.is_none() || session.told_life != core);
            let mut more = false;
            self.serve(slot, |session, outside| more = session.work(outside));
            if more {
                self.enqueue(slot);
            }
        }
    }

    fn timeouts(&mut self) {
        while let Some((_, slot)) = self
            .deadlines
            .first()
            .copied()
            .filter(|(deadline, _)| *deadline <= self.now)
        {
            let before = self.sessions.get(slot).map(|session| session.deadline);
            self.serve(slot, Session::timeout);
            // What did not move on is looked at in the next turn, not now again.
            if self.sessions.get(slot).map(|session| session.deadline) == before {
                break;
            }
        }
    }

    fn unmask_signalled(&mut self, slot: usize) {
        if let Some(fd) = self.unmask.get(&slot).cloned() {
            self.serve(slot, |session, outside| session.unmask_signalled(outside, &fd));
        }
    }

    pub(super) fn end_all(&mut self, reason: &str, wanted: impl Fn(&Session) -> bool) {
        for slot in self.slots() {
            if self.sessions.get(slot).is_some_and(&wanted) {
                self.serve(slot, |session, outside| session.end(outside, reason));
            }
        }
    }

    pub(super) fn slots(&self) -> Vec<usize> {
        self.sessions.iter().map(|(slot, _)| slot).collect()
    }

    /// Calls a session and books what came of it. A panic in it ends that session alone.
    pub(super) fn serve(&mut self, slot: usize, call: impl FnOnce(&mut Session, &mut Outside<'_>)) {
        if catch_unwind(AssertUnwindSafe(|| self.serve_uncaught(slot, call))).is_ok() {
            return;
        }
        let Some(session) = self.sessions.get_mut(slot) else {
            return;
        };
        session.fault = SessionFault::Contained;
        tracing::error!(session = session.number, vm = session.vm, client = %session.name, "a fault of ours in the device of {}: the device ends, all others go on. The VM gets another by a restart, or by device_del and device_add; please report the panic above", session.name);
        let end = |session: &mut Session, outside: &mut Outside<'_>| session.end(outside, "internal error");
        let ends = session.socket.is_some()
            && catch_unwind(AssertUnwindSafe(|| self.serve_uncaught(slot, end))).is_ok();
        if !ends {
            self.lose(slot);
        }
    }

    fn serve_uncaught(&mut self, slot: usize, call: impl FnOnce(&mut Session, &mut Outside<'_>)) {
        let Some(session) = self.sessions.get_mut(slot) else {
            return;
        };
        let mut outside = Outside {
            now: self.now,
            core: self.core.as_mut(),
            buffer: &mut self.buffer,
            signals: &self.signals,
            closer: &self.closer,
        };
        call(session, &mut outside);
        self.close_socket(slot);
        let Some(session) = self.sessions.get_mut(slot) else {
            return;
        };
        if let Some(watch) = session.watch_unmask.take() {
            self.watch_unmask(slot, watch);
        }
        self.book(slot);
    }

    /// Closes the socket of a session that has ended: for the client at once; what it has sent unread, descriptors too, by the closer.
    fn close_socket(&mut self, slot: usize) {
        let Some(session) = self.sessions.get_mut(slot) else {
            return;
        };
        let (listener, socket) = (session.listener, session.ended_socket.take());
        let Some(socket) = socket else { return };
        self.watch_unmask(slot, None);
        self.deregister(socket.as_raw_fd());
        // It may be broken already.
        let _ = shutdown(&socket, Shutdown::Both);
        self.closer.close(listener, socket);
    }

    /// The end of a session that cannot even be ended in order: nothing can be asked of its device any more, its fence least of all. So the
    /// core life that has its memory is given up (its death is the fence, and no VM sees it), and the session is gone with it.
    fn lose(&mut self, slot: usize) {
        self.watch_unmask(slot, None);
        if let Some(session) = self.sessions.get_mut(slot) {
            session.abandon();
        }
        self.close_socket(slot);
        self.give_up_lost();
        self.enqueue(slot);
    }

    /// Has the core killed if it knows of an abandoned session.
    pub(super) fn give_up_lost(&mut self) {
        let life = self.core.as_ref().map(|core| core.life);
        let known =
            |session: &Session| session.fault.is_lost() && life.is_some() && session.told_life == life;
        if self.sessions.iter().any(|(_, session)| known(session)) {
            tracing::error!(
                life,
                "the end of a session failed: the core is killed, which ends its DMA; another goes on"
            );
            self.core_broken(true);
        }
    }

    /// Keeps deadlines, debts and turns up to date, and lets a session go that is done.
    pub(super) fn book(&mut self, slot: usize) {
        let Some(session) = self.sessions.get_mut(slot) else {
            return;
        };
        session.messages_out = session.has_messages_out();
        let deadline = session.next_deadline();
        if deadline != session.deadline {
            self.deadlines.remove(&(session.deadline, slot));
            session.deadline = deadline;
            if deadline != Tick::NEVER {
                self.deadlines.insert((deadline, slot));
            }
        }
        if session.waits_for_core() {
            self.waiting.insert(slot);
        } else {
            self.waiting.remove(&slot);
        }
        if session.stalled_map.is_some() {
            self.stalled.insert(slot);
        } else {
            self.stalled.remove(&slot);
        }
        if session.done {
            self.deadlines.remove(&(session.deadline, slot));
            let (session, fault) = (session.number, session.fault);
            self.numbers.remove(&session);
            self.sessions.remove(slot);
            self.ready.retain(|other| *other != slot);
            self.tell_keeper(FrontToKeeper::SessionGone { session, fault });
        } else if session.can_go_on() {
            // It may have waited for a fence only: where nobody reads the answers, no readiness of the socket follows them.
            self.enqueue(slot);
        }
    }

    fn watch_unmask(&mut self, slot: usize, fd: Option<SharedFd>) {
        if let Some(before) = self.unmask.remove(&slot) {
            self.deregister(before.as_raw_fd());
        }
        let Some(fd) = fd else { return };
        match self.register(fd.as_raw_fd(), Token(SESSIONS + 2 * slot + 1), Interest::READABLE) {
            Ok(()) => drop(self.unmask.insert(slot, fd)),
            Err(error) => tracing::warn!(%error, "an eventfd of a client cannot be watched"),
        }
    }

    // ---- the event loop itself

    pub(super) fn register(&self, fd: i32, token: Token, interest: Interest) -> std::io::Result<()> {
        self.poll.registry().register(&mut SourceFd(&fd), token, interest)
    }

    pub(super) fn deregister(&self, fd: i32) {
        // It was registered; at worst the kernel has forgotten it already.
        let _ = self.poll.registry().deregister(&mut SourceFd(&fd));
    }

    fn is_over(&self) -> bool {
        let Some(since) = self.stopping else { return false };
        self.sessions.is_empty() || self.now.since_ns(since) >= limits::STOP_NS_MAX
    }
}

/// Whether a listener with so many sessions may have one more, where there are `all`: always room is left for those that have few.
pub(super) const fn has_room(held: usize, all: usize) -> bool {
    held < limits::SLOTS_LEFT_FACTOR * limits::SESSIONS_MAX.saturating_sub(all)
}

/// Has a byte that a client marks as urgent come like any other: else the kernel drops it in the middle of a read, and closes in this thread what was sent with it.
pub(super) fn take_all_in_order(socket: &OwnedFd) -> Result<(), Errno> {
    sockopt::set_socket_oobinline(socket, true)
}

/// The time as the rooms see it.
pub(super) fn now() -> anyhow::Result<Tick> {
    let time = clock_gettime(ClockId::Boottime);
    let seconds = u64::try_from(time.tv_sec).context("the boot clock")?;
    let nanoseconds = u64::try_from(time.tv_nsec).context("the boot clock")?;
    Ok(Tick(
        seconds.saturating_mul(1_000_000_000).saturating_add(nanoseconds),
    ))
}

/// Where session numbers begin: at the wall clock's seconds, so that no number comes again after a restart of the daemon or the host
/// (a million sessions each second would catch up).
fn first_session() -> anyhow::Result<u64> {
    let seconds = u64::try_from(clock_gettime(ClockId::Realtime).tv_sec).context("the wall clock")?;
    Ok((seconds << 20) | 1)
}
