//! The keeper packed for the program that it becomes, and unpacked there.
//!
//! In: a [`Keeper`]; or its saved form of this or another version. Out: the other of both. Must never know: how the program is replaced.
//!
//! A [`Child`] that is dropped kills its process and a [`Socket`] removes its file: so all that can fail is done before there is one.

use super::binary::Binary;
use super::child::Child;
use super::limits::LEAVE_DEADLINE;
use super::lives::{CoreLife, Standing};
use super::restart::Restarts;
use super::sockets::Socket;
use super::upgrade::Upgrades;
use super::vms::{SavedVms, Vms};
use super::{Keeper, Signals, watch};
use crate::channel::Channel;
use crate::config::{CoreConfig, ListenerConfig, ServerConfig, Source};
use crate::control::protocol::{SandboxedRole, UpgradeReport};
use crate::messages::{KeeperToCore, KeeperToFront, Notice};
use crate::packed::{self, Carried, Packer, Refusal, Unpacker};
use crate::sandbox::Shares;
use crate::words::MappedWords;
use mio::Poll;
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use vmgmt_device::page::LifePage;

/// What this version writes. It reads this one and the one before.
pub(super) const VERSION: u32 = 1;
pub(super) const VERSION_OLDEST: u32 = 1;

#[derive(Serialize, Deserialize)]
pub(super) struct SavedKeeper {
    core_binary: SavedBinary,
    report: Option<UpgradeReport>,
    core_config: CoreConfig,
    arguments: Vec<String>,
    control: SavedSocket,
    listeners: Vec<(ListenerConfig, SavedSocket)>,
    last_listener: u32,
    pub(super) vms: SavedVms,
    hub_state: Carried,
    pub(super) session_states: Vec<(u64, Carried)>,
    drain_deadline_ms: u64,
    core_end: String,
    front: SavedChild<KeeperToFront>,
    leaving: Vec<SavedChild<KeeperToFront>>,
    front_ready: bool,
    core: Option<SavedCore>,
    undead: Vec<SavedChild<KeeperToCore>>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    undead_vms: BTreeSet<u64>,
    last_life: u64,
    restarts: Restarts,
    restart_in: Duration,
    begun_ago: Duration,
    announced: bool,
    notices: Vec<String>,
    /// Those of them that tell of a fault.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    faults: Vec<Notice>,
    front_sandbox: Option<SandboxedRole>,
    /// A keeper of the first days was where its program was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    path: Option<PathBuf>,
    /// Paths of the shares' directories, whose descriptors come behind all others, in this order: a program of the first days takes all that
    /// it is given by number, and does not look there.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    shares: Vec<PathBuf>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    origin: Option<(Source, ServerConfig)>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    configured: BTreeSet<u32>,
}

/// A packed keeper.
pub(super) struct Packed<'a> {
    pub(super) bytes: Vec<u8>,
    /// The descriptors that the bytes name by number.
    pub(super) fds: Vec<BorrowedFd<'a>>,
    /// Those of the shares' directories.
    pub(super) shares: Vec<BorrowedFd<'a>>,
}

#[derive(Serialize, Deserialize)]
struct SavedBinary {
    path: PathBuf,
    file: Carried,
    script: bool,
}

#[derive(Serialize, Deserialize)]
struct SavedSocket {
    fd: Carried,
    path: PathBuf,
    file: Option<(u64, u64)>,
}

/// Messages have the form in which roles of different versions talk.
#[derive(Serialize, Deserialize)]
struct SavedChild<T> {
    pid: u32,
    pidfd: Carried,
    channel: Carried,
    waiting: Vec<(T, Vec<Carried>)>,
    killed: bool,
    fault: Option<String>,
}

#[derive(Serialize, Deserialize)]
struct SavedCore {
    life: u64,
    child: SavedChild<KeeperToCore>,
    page: Carried,
    started_ago: Duration,
    ready_ago: Option<Duration>,
    dying_ago: Option<Duration>,
}

impl Keeper {
    /// Packs the keeper. Nothing changes by it.
    pub(super) fn save(&self) -> Result<Packed<'_>, Refusal> {
        // Exhaustive, so that a new field cannot be forgotten.
        let Self {
            poll: _,
            signals: _,
            drain_deadline_ms,
            origin,
            path,
            core_binary,
            upgrades,
            // Its part is what is going on; no other comes after it.
            upgrading: _,
            reload: _,
            core_config,
            arguments,
            control,
            // Who asks it asks again.
            fallback: _,
            shares,
            listeners,
            last_listener,
            configured,
            vms,
            hub_state,
            session_states,
            front,
            front_ready,
            front_said: _,
            front_sandbox,
            leaving,
            core,
            last_life,
            core_end,
            undead,
            // They are dead, or will be.
            dismissed: _,
            undead_vms,
            restarts,
            restart_at,
            begin,
            announced,
            stop_at,
            notices,
            flush_log: _,
        } = self;
        if stop_at.is_some() || self.signals.stop_is_asked() {
            return Err("vmgmtd is stopping".into());
        }
        let (texts, faults) = Notice::save(notices);
        let now = Instant::now();
        let mut packer = Packer::default();
        let core = core
            .as_ref()
            .map(|core| {
                let CoreLife {
                    life,
                    child,
                    page: _,
                    page_fd,
                    started,
                    ready,
                    dying,
                    unread: _,
                    standing,
                    refusal: _,
                } = core;
                if *standing != Standing::Usual {
                    return Err("the core is being replaced".into());
                }
                let ago = |then: &Instant| now.duration_since(*then);
                Ok::<_, Refusal>(SavedCore {
                    life: *life,
                    child: save_child(child, &mut packer)?,
                    page: packer.carry(page_fd),
                    started_ago: ago(started),
                    ready_ago: ready.as_ref().map(ago),
                    dying_ago: dying.as_ref().map(ago),
                })
            })
            .transpose()?;
        let saved = SavedKeeper {
            core_binary: SavedBinary {
                path: core_binary.path.clone(),
                file: packer.carry(core_binary.file.as_ref()),
                script: core_binary.script,
            },
            report: upgrades.report().cloned(),
            core_config: core_config.clone(),
            arguments: arguments.clone(),
            control: save_socket(control, &mut packer),
            listeners: listeners
                .values()
                .map(|(config, socket)| (config.clone(), save_socket(socket, &mut packer)))
                .collect(),
            last_listener: *last_listener,
            vms: vms.save(&mut packer),
            hub_state: packer.carry(hub_state),
            session_states: session_states
                .iter()
                .map(|(session, state)| (*session, packer.carry(state)))
                .collect(),
            drain_deadline_ms: *drain_deadline_ms,
            core_end: core_end.clone(),
            front: save_child(front, &mut packer)?,
            leaving: leaving
                .iter()
                .map(|(child, _)| save_child(child, &mut packer))
                .collect::<Result<_, _>>()?,
            front_ready: *front_ready,
            core,
            undead: undead
                .iter()
                .map(|child| save_child(child, &mut packer))
                .collect::<Result<_, _>>()?,
            undead_vms: undead_vms.clone(),
            last_life: *last_life,
            restarts: restarts.clone(),
            restart_in: restart_at.saturating_duration_since(now),
            begun_ago: now.duration_since(*begin),
            announced: *announced,
            notices: texts,
            faults,
            front_sandbox: front_sandbox.clone(),
            path: Some(path.clone()),
            shares: shares.opened().map(|(path, _)| path.clone()).collect(),
            origin: origin.clone(),
            configured: configured.clone(),
        };
        Ok(Packed {
            bytes: packed::write(VERSION, &saved, packer.fds.len())?,
            fds: packer.fds,
            shares: shares.opened().map(|(_, fd)| fd.as_fd()).collect(),
        })
    }

    /// The keeper that was packed. On an error nothing has happened to its children and sockets.
    pub(super) fn restore(
        bytes: &[u8],
        fds: Vec<OwnedFd>,
        shares: Vec<OwnedFd>,
        signals: Signals,
        flush_log: Box<dyn Fn()>,
    ) -> anyhow::Result<Self> {
        let saved: SavedKeeper = packed::read(bytes, VERSION_OLDEST..=VERSION, fds.len())?;
        anyhow::ensure!(
            shares.len() == saved.shares.len(),
            "{} shares came with {} directories",
            saved.shares.len(),
            shares.len()
        );
        let mut unpacker = Unpacker::new(fds);
        // From the first child on nothing may fail: each descriptor is named once, and all are.
        unpacker.expect_each(&saved.named())?;
        let (poll, own, now) = (Poll::new()?, Binary::own()?, Instant::now());
        let page = saved
            .core
            .as_ref()
            .map(|core| unpacker.shared(core.page))
            .transpose()?;
        let page = page.map(|fd| MappedWords::read_only(&*fd)).transpose()?;
        let before = |ago: Duration| now.checked_sub(ago).unwrap_or(now);
        let mut take = |number| unpacker.alone(number);
        let core = match (saved.core, page) {
            (Some(core), Some(page)) => Some(CoreLife {
                life: core.life,
                page_fd: take(core.page)?,
                page: LifePage::new(page),
                child: restore_child(core.child, &mut take)?,
                started: before(core.started_ago),
                ready: core.ready_ago.map(before),
                dying: core.dying_ago.map(before),
                unread: None,
                standing: Standing::Usual,
                refusal: None,
            }),
            _ => None,
        };
        let mut upgrades = Upgrades::default();
        upgrades.resume(saved.report);
        let keeper = Self {
            poll,
            signals,
            drain_deadline_ms: saved.drain_deadline_ms,
            origin: saved.origin,
            path: saved.path.unwrap_or(own.path),
            core_binary: Binary {
                path: saved.core_binary.path,
                file: take(saved.core_binary.file)?.into(),
                script: saved.core_binary.script,
            },
            upgrades,
            upgrading: None,
            reload: None,
            core_config: saved.core_config,
            arguments: saved.arguments,
            control: restore_socket(saved.control, &mut take)?,
            fallback: None,
            shares: Shares::of_opened(saved.shares.into_iter().zip(shares)),
            listeners: saved
                .listeners
                .into_iter()
                .map(|(config, socket)| Ok((config.listener, (config, restore_socket(socket, &mut take)?))))
                .collect::<Result<_, Refusal>>()?,
            last_listener: saved.last_listener,
            configured: saved.configured,
            vms: Vms::restore(saved.vms, &mut take)?,
            hub_state: take(saved.hub_state)?,
            session_states: saved
                .session_states
                .into_iter()
                .map(|(session, state)| Ok((session, take(state)?)))
                .collect::<Result<_, Refusal>>()?,
            core_end: saved.core_end,
            front: restore_child(saved.front, &mut take)?,
            front_ready: saved.front_ready,
            front_said: None,
            front_sandbox: saved.front_sandbox,
            leaving: saved
                .leaving
                .into_iter()
                .map(|child| Ok((restore_child(child, &mut take)?, now + LEAVE_DEADLINE)))
                .collect::<Result<_, Refusal>>()?,
            core,
            last_life: saved.last_life,
            undead: saved
                .undead
                .into_iter()
                .map(|child| restore_child(child, &mut take))
                .collect::<Result<_, Refusal>>()?,
            dismissed: Vec::new(),
            undead_vms: saved.undead_vms,
            restarts: saved.restarts,
            restart_at: now + saved.restart_in,
            begin: before(saved.begun_ago),
            announced: saved.announced,
            stop_at: None,
            notices: Notice::restore(saved.notices, saved.faults),
            flush_log,
        };
        if let Err(error) = keeper.watch_all() {
            // Neither its children nor its sockets are to end with it.
            std::mem::forget(keeper);
            return Err(error.into());
        }
        Ok(keeper)
    }

    fn watch_all(&self) -> std::io::Result<()> {
        watch(&self.poll, &self.signals.came)?;
        let fronts = self.leaving.iter().map(|(child, _)| child).chain([&self.front]);
        for front in fronts {
            watch(&self.poll, &front.pidfd)?;
            watch(&self.poll, &front.channel)?;
        }
        if let Some(core) = &self.core {
            watch(&self.poll, &core.child.pidfd)?;
            watch(&self.poll, &core.child.channel)?;
        }
        Ok(())
    }
}

impl SavedKeeper {
    /// All descriptors that it names.
    pub(super) fn named(&self) -> Vec<Carried> {
        let sockets = self
            .listeners
            .iter()
            .map(|(_, socket)| socket)
            .chain([&self.control]);
        let mut named: Vec<Carried> = sockets.map(|socket| socket.fd).collect();
        named.extend([self.core_binary.file, self.hub_state]);
        named.extend(self.vms.named());
        named.extend(self.session_states.iter().map(|(_, state)| *state));
        for front in self.leaving.iter().chain([&self.front]) {
            front.name(&mut named);
        }
        for core in self.undead.iter().chain(self.core.iter().map(|core| &core.child)) {
            core.name(&mut named);
        }
        named.extend(self.core.iter().map(|core| core.page));
        named
    }
}

#[cfg(test)]
impl SavedKeeper {
    /// Leaves out what a keeper of the first days did not have.
    pub(super) fn forget_later_fields(&mut self) {
        (self.path, self.origin) = (None, None);
        (self.shares, self.configured) = Default::default();
    }

    /// Sets all that depends on when it was saved.
    pub(super) fn set_times(&mut self, ago: Duration) {
        (self.restart_in, self.begun_ago) = (ago, ago);
        if let Some(core) = &mut self.core {
            core.started_ago = ago;
            core.ready_ago = core.ready_ago.and(Some(ago));
            core.dying_ago = core.dying_ago.and(Some(ago));
        }
    }
}

impl<T> SavedChild<T> {
    fn name(&self, named: &mut Vec<Carried>) {
        named.extend([self.pidfd, self.channel]);
        named.extend(self.waiting.iter().flat_map(|(_, fds)| fds));
    }
}

fn save_socket<'a>(Socket { fd, path, file }: &'a Socket, packer: &mut Packer<'a>) -> SavedSocket {
    SavedSocket {
        fd: packer.carry(fd),
        path: path.clone(),
        file: *file,
    }
}

fn restore_socket(
    SavedSocket { fd, path, file }: SavedSocket,
    take: &mut impl FnMut(Carried) -> Result<OwnedFd, Refusal>,
) -> Result<Socket, Refusal> {
    Ok(Socket {
        fd: take(fd)?,
        path,
        file,
    })
}

fn save_child<'a, T: Clone>(child: &'a Child<T>, packer: &mut Packer<'a>) -> Result<SavedChild<T>, Refusal> {
    let Child {
        pid,
        pidfd,
        channel,
        waiting,
        held,
        killed,
        fault,
        exit,
    } = child;
    if exit.is_some() || held.is_some() {
        return Err("a child has just ended, or is being replaced".into());
    }
    let waiting = waiting.iter().map(|(message, fds)| {
        let fds = fds.iter().map(|fd| packer.carry(fd)).collect();
        (message.clone(), fds)
    });
    Ok(SavedChild {
        pid: *pid,
        waiting: waiting.collect(),
        pidfd: packer.carry(pidfd),
        channel: packer.carry(channel),
        killed: *killed,
        fault: fault.as_ref().map(ToString::to_string),
    })
}

fn restore_child<T>(
    saved: SavedChild<T>,
    take: &mut impl FnMut(Carried) -> Result<OwnedFd, Refusal>,
) -> Result<Child<T>, Refusal> {
    let SavedChild {
        pid,
        pidfd,
        channel,
        waiting,
        killed,
        fault,
    } = saved;
    let mut messages = Vec::new();
    for (message, fds) in waiting {
        let fds = fds.into_iter().map(&mut *take).collect::<Result<_, _>>()?;
        messages.push((message, fds));
    }
    Ok(Child {
        pid,
        pidfd: take(pidfd)?,
        channel: Channel::from_fd(take(channel)?),
        waiting: messages.into(),
        held: None,
        killed,
        fault: fault.map(Into::into),
        exit: None,
    })
}
