//! KEEPER: vmgmtd's main process. It starts front and core, holds what must outlive them, and decides who may come in.
//!
//! In: the configuration; messages of front and core; their deaths; signals. Out: processes, sockets, memory, decisions.
//! Must never know: a byte of the vfio-user protocol, a register, a ring, anything of a VM's data.
//!
//! One thread, one loop. Each turn asks everything anew (children, channels, signals), so that a wake-up lost or made twice
//! means nothing; the event loop only tells when to look.
//!
//! To be read in this order: this file (what there is, and one turn of the loop, from the top down); `lives.rs` and `restart.rs` (a core's
//! start, its death, and what follows): these three are its heart, ten minutes. Then `child.rs` (a process and how it ends); `comers.rs` over
//! `vms.rs` (who may come in). `sockets.rs`, `signals.rs`, `binary.rs`, `role.rs` are leaves; `fallback.rs` answers operators while no core does.
//! All else runs in an upgrade only: `upgrade.rs` (the order of its parts), `core_upgrade.rs`, `hand_over.rs` (the front), `re_exec.rs` over
//! `saved.rs` (this process itself), `reload.rs` (another configuration). `server/host/tests/small_rooms.rs` holds how long all this may become.

mod binary;
mod child;
mod comers;
mod core_upgrade;
mod fallback;
mod hand_over;
mod limits;
mod lives;
mod re_exec;
mod reload;
mod restart;
mod role;
mod saved;
#[cfg(test)]
mod saved_tests;
mod signals;
mod sockets;
mod upgrade;
mod vms;

pub use re_exec::{StartLog, rehearse};
pub use role::enter_role;

use crate::channel::ChannelError;
use crate::config::{Config, CoreConfig, ListenerConfig, ServerConfig, Source};
use crate::control::ControlServer;
use crate::control::protocol::{SandboxedRole, Upgrade};
use crate::messages::{CoreToKeeper, FrontToKeeper, KeeperToCore, KeeperToFront, Notice};
use crate::sandbox::Shares;
use crate::state_memory;
use anyhow::{Context, bail};
use binary::Binary;
use child::Child;
use limits::{
    DEATH_DEADLINE, HUB_STATE_BYTES, IMPATIENCE, LOOK_AGAIN, NOTICES_MAX, PACKETS_PER_TURN, START_DEADLINE,
    STOP_DEADLINE, UNREAD_MAX,
};
use lives::{CoreLife, Standing};
use mio::unix::SourceFd;
use mio::{Events, Interest, Poll, Token};
use reload::Reload;
use restart::Restarts;
use rustix::fd::{AsFd, AsRawFd, OwnedFd};
use signals::Signals;
use sockets::{Socket, listen_on, outlive_the_dead};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::path::PathBuf;
use std::time::{Duration, Instant};
use upgrade::{Step, Upgrades};
use vms::{Guest, Vms};

/// Wakes the loop, no more: what has happened is asked in each turn.
const WAKE: Token = Token(0);

struct Keeper {
    poll: Poll,
    signals: Signals,
    drain_deadline_ms: u64,
    /// Where the configuration is read at a reload, and what it said of the keeper; `None`: an earlier version did not tell.
    origin: Option<(Source, ServerConfig)>,
    /// Where this program was started from: an upgrade that names no other is to what is there then.
    path: PathBuf,
    /// What the core runs.
    core_binary: Binary,
    upgrades: Upgrades,
    /// The upgrade that is under way: to what, and where it stands.
    upgrading: Option<(Binary, Step)>,
    /// The configuration that it is for.
    reload: Option<Reload>,
    core_config: CoreConfig,
    shares: Shares,
    arguments: Vec<String>,
    control: Socket,
    /// Serves the control socket while no core does.
    fallback: Option<ControlServer>,
    listeners: BTreeMap<u32, (ListenerConfig, Socket)>,
    last_listener: u32,
    /// Those listeners that are of the configuration.
    configured: BTreeSet<u32>,
    vms: Vms,
    hub_state: OwnedFd,
    /// The sessions' in-flight tables, which the front holds for the cores: here only to be copied.
    session_states: BTreeMap<u64, OwnedFd>,
    front: Child<KeeperToFront>,
    front_ready: bool,
    /// The last that it said about a hand-over.
    front_said: Option<FrontToKeeper>,
    /// How it is shut in.
    front_sandbox: Option<SandboxedRole>,
    /// Fronts that were replaced, or were not to be: they are killed then.
    leaving: Vec<(Child<KeeperToFront>, Instant)>,
    core: Option<CoreLife>,
    last_life: u64,
    /// How the last core ended.
    core_end: String,
    /// Killed cores that still sleep in the kernel.
    undead: Vec<Child<KeeperToCore>>,
    /// Children that were only asked something: killed, and to be waited for.
    dismissed: Vec<Child<KeeperToCore>>,
    /// VMs for which workers of the undead were doing something.
    undead_vms: BTreeSet<u64>,
    restarts: Restarts,
    /// When the next core is due, while there is none.
    restart_at: Instant,
    begin: Instant,
    announced: bool,
    /// When those who do not end in order are killed.
    stop_at: Option<Instant>,
    notices: VecDeque<Notice>,
    /// Waits until the log is written.
    flush_log: Box<dyn Fn()>,
}

/// Runs vmgmtd until a signal ends it. `source`: where `config` was read; `arguments` are given to front and core.
///
/// # Errors
/// It cannot start, or the front has died: all devices are gone.
pub fn run(
    config: Config,
    source: Source,
    arguments: Vec<String>,
    flush_log: Box<dyn Fn()>,
) -> anyhow::Result<()> {
    raise_descriptor_limit();
    // Without CAP_SYS_RESOURCE it stays as the service manager set it.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-1000");
    turn_until_the_end(Keeper::new(config, source, arguments, flush_log)?)
}

/// Goes on as the keeper that this process was before it executed this program: with what standard input holds. `since_ns`: when that
/// was; `failed`: another program was tried and could not.
///
/// # Errors
/// As [`run`].
pub fn resume(
    arguments: &[String],
    since_ns: u64,
    failed: Option<&str>,
    log: StartLog<'_>,
) -> anyhow::Result<()> {
    turn_until_the_end(re_exec::resume(arguments, since_ns, failed, log)?)
}

fn turn_until_the_end(mut keeper: Keeper) -> anyhow::Result<()> {
    let mut events = Events::with_capacity(64);
    loop {
        let (again, done) = keeper.turn()?;
        if done {
            tracing::info!("stopped");
            return Ok(());
        }
        let wait = if again {
            Some(Duration::ZERO)
        } else {
            keeper.next_look()
        };
        match keeper.poll.poll(&mut events, wait) {
            Err(error) if error.kind() != std::io::ErrorKind::Interrupted => return Err(error.into()),
            _ => {}
        }
        if let Some(fallback) = &mut keeper.fallback {
            for event in &events {
                fallback.handle_ready(event.token());
            }
        }
    }
}

impl Keeper {
    fn new(
        config: Config,
        source: Source,
        arguments: Vec<String>,
        flush_log: Box<dyn Fn()>,
    ) -> anyhow::Result<Self> {
        let Config {
            server,
            core,
            listeners,
            warnings,
        } = config;
        warnings.iter().for_each(|warning| tracing::warn!("{warning}"));
        let signals = Signals::catch()?;
        let paths = listeners.iter().map(|(listener, _)| listener.path.as_path());
        outlive_the_dead(paths.chain([server.control.as_path()]));
        let control = listen_on(
            &server.control,
            server.control_mode,
            server.control_group.as_deref(),
        )
        .map_err(|mistake| anyhow::anyhow!("control {mistake}"))?;
        let bound = listeners
            .into_iter()
            .map(|(listener, vm)| {
                let socket = listen_on(&listener.path, listener.mode, listener.group.as_deref())?;
                Ok((listener, vm, socket))
            })
            .collect::<anyhow::Result<Vec<_>>>()?;
        let poll = Poll::new()?;
        let binary = Binary::own().context("the own program")?;
        let front = Child::start(&binary, "front", false, &arguments)?;
        watch(&poll, &signals.came)?;
        watch(&poll, &front.pidfd)?;
        watch(&poll, &front.channel)?;
        let now = Instant::now();
        let mut keeper = Self {
            poll,
            signals,
            drain_deadline_ms: server.drain_deadline_ms,
            origin: Some((source, server)),
            path: binary.path().to_owned(),
            core_binary: binary,
            upgrades: Upgrades::default(),
            upgrading: None,
            reload: None,
            core_config: core,
            shares: Shares::default(),
            arguments,
            control,
            fallback: None,
            listeners: BTreeMap::new(),
            last_listener: 0,
            configured: BTreeSet::new(),
            vms: Vms::default(),
            hub_state: state_memory::create("vmgmt-hub", HUB_STATE_BYTES)
                .context("memory for the hub's state")?,
            session_states: BTreeMap::new(),
            front,
            front_ready: false,
            front_said: None,
            front_sandbox: None,
            leaving: Vec::new(),
            core: None,
            last_life: 0,
            core_end: String::new(),
            undead: Vec::new(),
            dismissed: Vec::new(),
            undead_vms: BTreeSet::new(),
            restarts: Restarts::default(),
            restart_at: now,
            begin: now,
            announced: false,
            stop_at: None,
            notices: VecDeque::new(),
            flush_log,
        };
        for (listener, vm, socket) in bound {
            let number = keeper.add_listener(listener, vm, socket)?;
            keeper.configured.insert(number);
        }
        Ok(keeper)
    }

    /// Looks at everything once: (there is more to do at once, all is over).
    fn turn(&mut self) -> anyhow::Result<(bool, bool)> {
        self.take_signals();
        let more = self.take_from_front()? | self.take_from_core();
        self.bury_undead();
        self.see_off();
        self.look_at_core()?;
        self.look_at_front()?;
        self.step_upgrade();
        self.serve_fallback();
        self.restart_core()?;
        self.announce();
        self.flush();
        Ok((more, self.is_over()))
    }

    /// Whether all has ended that is to end.
    fn is_over(&mut self) -> bool {
        let Some(at) = self.stop_at.filter(|_| self.core.is_none()) else {
            return false;
        };
        if self.front.ended().is_some() {
            return true;
        }
        let late = at.elapsed() >= DEATH_DEADLINE;
        if late {
            let pid = self.front.pid();
            tracing::error!("the front, process {pid}, was killed and is not gone: it is left behind");
        }
        late
    }

    /// How long nothing can happen that no event tells.
    fn next_look(&self) -> Option<Duration> {
        let now = Instant::now();
        let waits = |core: &CoreLife| core.dying.is_some() || core.child.is_waiting();
        let slow = self.upgrading.is_some()
            || !self.undead.is_empty()
            || !self.leaving.is_empty()
            || self.front.is_waiting()
            || self.core.as_ref().is_some_and(waits);
        let starting = self
            .core
            .as_ref()
            .filter(|core| core.ready.is_none() && core.dying.is_none());
        let restarting = self.core.is_none() && self.stop_at.is_none();
        [
            slow.then_some(LOOK_AGAIN),
            starting.map(|core| (core.started + START_DEADLINE).saturating_duration_since(now)),
            self.stop_at
                .map(|at| at.saturating_duration_since(now).max(LOOK_AGAIN)),
            restarting.then(|| self.restart_at.saturating_duration_since(now)),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn take_signals(&mut self) {
        let asked = self.signals.take();
        if asked.upgrade
            && let Err(text) = self.begin_upgrade(&Upgrade::default())
        {
            self.notice(format!(
                "the upgrade that a signal asked for does not begin: {text}"
            ));
        }
        if asked.reload
            && let Err(text) = self.begin_reload()
        {
            self.notice(format!(
                "the reload that a signal asked for does not begin: {text}"
            ));
        }
        if !asked.stop {
            return;
        }
        let now = Instant::now();
        if let Some(at) = self.stop_at {
            // Some send a signal to the process and to its group: only one that comes later is somebody's impatience.
            if at.saturating_duration_since(now) < STOP_DEADLINE - IMPATIENCE {
                self.stop_at = Some(now);
            }
            return;
        }
        tracing::info!("stopping: all devices end");
        self.stop_at = Some(now + STOP_DEADLINE);
        if let Some(core) = &mut self.core {
            core.child.queue(KeeperToCore::Stop, Vec::new());
        }
        self.front.queue(KeeperToFront::Stop, Vec::new());
    }

    fn take_from_front(&mut self) -> anyhow::Result<bool> {
        for _ in 0..PACKETS_PER_TURN {
            match self.front.receive() {
                Ok(Some(packet)) => match packet.header {
                    FrontToKeeper::Ready => self.front_ready = true,
                    FrontToKeeper::Admit {
                        session,
                        listener,
                        pid,
                        uid,
                    } => {
                        self.admit(listener, Guest { session, pid, uid });
                    }
                    FrontToKeeper::SessionGone { session, fault } => self.session_gone(session, fault),
                    FrontToKeeper::CoreStuck { life, innocent } => self.core_stuck(life, innocent),
                    FrontToKeeper::CanServe { .. }
                    | FrontToKeeper::CannotHandOver { .. }
                    | FrontToKeeper::Serves { .. } => self.front_said = Some(packet.header),
                    FrontToKeeper::Sandboxed(front) => self.front_sandbox = Some(*front),
                },
                Ok(None) | Err(ChannelError::Closed) => return Ok(false), // its pidfd tells the rest
                // A front of another version may say more than this keeper knows.
                Err(ChannelError::Malformed(error)) => {
                    tracing::warn!("a word of the front is left out: {error}")
                }
                Err(error) => bail!("the front cannot be understood: {error}"),
            }
        }
        Ok(true)
    }

    /// The front has no more use for that core. One that is ending anyway is let end, so that how it did is known.
    fn core_stuck(&mut self, life: u64, innocent: bool) {
        let stopping = self.stop_at.is_some();
        if let Some(core) = self.core.as_mut().filter(|core| core.life == life && !stopping) {
            core.dying.get_or_insert_with(Instant::now);
            // Stopped by somebody's signal, it is as little to blame as one that somebody's signal kills.
            let fault = "killed: it stood still while a fence or a doorbell waited";
            if !core.child.is_ending() {
                core.child
                    .kill((!innocent && !core.child.is_frozen()).then_some(fault));
            }
        }
    }

    fn look_at_front(&mut self) -> anyhow::Result<()> {
        if self.stop_at.is_some_and(|at| Instant::now() >= at) {
            self.front.kill(None);
        }
        match self.front.ended() {
            Some(exit) if self.stop_at.is_none() && !self.is_front_moving() => bail!(
                "the front has died ({}): all devices are gone; guests get them back by device_del and device_add, or a restart",
                exit.text
            ),
            _ => Ok(()),
        }
    }

    fn take_from_core(&mut self) -> bool {
        for _ in 0..PACKETS_PER_TURN {
            let Some(core) = &mut self.core else { return false };
            if core.ready.is_some() && core.child.waiting.len() >= UNREAD_MAX {
                return false;
            }
            match core.child.receive() {
                Ok(Some(packet)) => match packet.header {
                    CoreToKeeper::Ready { life, channel } if life == core.life => {
                        tracing::debug!("core life {life} speaks version {channel}");
                        core.ready.get_or_insert_with(Instant::now);
                        if core.standing == Standing::Able {
                            core.standing = Standing::Usual;
                        }
                    }
                    CoreToKeeper::Ready { life, .. } => tracing::warn!("the core says it is life {life}"),
                    CoreToKeeper::Able { .. } if core.standing == Standing::Trial => {
                        core.standing = Standing::Able;
                    }
                    CoreToKeeper::Refused { reason } => core.refusal = Some(reason),
                    CoreToKeeper::Able { .. } => self.upgrades.tidied = true,
                    CoreToKeeper::Checked => {}
                    CoreToKeeper::AddVm {
                        request,
                        vm,
                        listener,
                    } => {
                        let error = self
                            .add_vm(*vm, *listener)
                            .err()
                            .map(|error| format!("{error:#}"));
                        self.tell_core(KeeperToCore::Done { request, error }, Vec::new());
                    }
                    CoreToKeeper::RemoveVm { request, name } => self.remove_vm(request, &name),
                    CoreToKeeper::Upgrade { request, upgrade } => {
                        let begun = self.begin_upgrade(&upgrade);
                        self.tell_begun(request, begun);
                    }
                    CoreToKeeper::Reload { request } => {
                        let begun = self.begin_reload();
                        self.tell_begun(request, begun);
                    }
                    CoreToKeeper::Release { request, vm } => {
                        let error = self.release(&vm).err();
                        self.tell_core(KeeperToCore::Done { request, error }, Vec::new());
                    }
                },
                Ok(None) => return false,
                Err(error) => {
                    if core.dying.is_none() && self.stop_at.is_none() {
                        tracing::debug!("core life {}: {error}", core.life);
                        core.dying = Some(Instant::now());
                    }
                    return false;
                }
            }
        }
        true
    }

    /// Answers the core's request to begin something.
    fn tell_begun(&mut self, request: u64, begun: Result<u64, String>) {
        let answer = match begun {
            Ok(number) => KeeperToCore::Upgrading { request, number },
            Err(text) => KeeperToCore::Done {
                request,
                error: Some(text),
            },
        };
        self.tell_core(answer, Vec::new());
    }

    fn announce(&mut self) {
        if self.announced || !self.front_ready || self.core.as_ref().is_none_or(|core| core.ready.is_none()) {
            return;
        }
        self.announced = true;
        eprintln!("vmgmtd: ready");
        if let Err(error) = sd_notify::notify(&[sd_notify::NotifyState::Ready]) {
            tracing::warn!("the service manager cannot be told: {error}");
        }
    }

    fn tell_core(&mut self, message: KeeperToCore, fds: Vec<OwnedFd>) {
        if let Some(core) = &mut self.core {
            core.child.queue(message, fds);
        }
    }

    fn notice(&mut self, notice: impl Into<Notice>) {
        let notice = notice.into();
        tracing::warn!("{}", notice.text);
        // The one that serves now; the next is told of all at its start.
        self.tell_core(KeeperToCore::Notice(notice.clone()), Vec::new());
        self.notices.push_back(notice);
        if self.notices.len() > NOTICES_MAX {
            self.notices.pop_front();
        }
    }

    /// Sends what waits: to the front only what the core needs not know before, so that no session names a VM that it does not know.
    fn flush(&mut self) {
        if let Some(core) = &mut self.core {
            core.flush();
        }
        if self.core.as_ref().is_none_or(|core| !core.child.is_waiting()) {
            self.front.flush();
        }
    }
}

/// Has the event loop look at a descriptor. It forgets it when it is closed: nobody else has it.
fn watch(poll: &Poll, fd: &impl AsFd) -> std::io::Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    poll.registry()
        .register(&mut SourceFd(&fd), WAKE, Interest::READABLE | Interest::WRITABLE)
}

/// Each device costs the front a handful of descriptors: all that the system allows are asked for. Children inherit it.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(errno) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!("the limit on descriptors stays as it is: {errno}");
    }
}
