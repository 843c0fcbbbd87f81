//! Whether this program could be the core: asked before it is.
//!
//! In: copies of the state (`--check`), or everything that a core is given at its start (on trial). Out: yes, or the reason why not.
//! Writes no page, no table and no guest memory; what comes in meanwhile is held for the core that it may become.

use super::event_loop::recover;
use super::journal::Journal;
use crate::channel::{Channel, ChannelError, Packet};
use crate::config::CoreConfig;
use crate::fault;
use crate::messages::{CoreToKeeper, FrontToCore, KeeperToCore, agree};
use crate::sandbox::{Entered, SandboxConfig};
use crate::words::MappedWords;
use anyhow::{Context, anyhow, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use std::collections::BTreeSet;
use vmgmt_device::page::{FrontPage, LifePage, Words};
use vmgmt_device::rings::check_state;

/// A core on trial says so often that it lives.
const BEAT_INTERVAL: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 200_000_000,
};

/// What came in during the trial, in order.
#[derive(Default)]
pub(super) struct Held {
    pub(super) keeper: Vec<Packet<KeeperToCore>>,
    pub(super) front: Vec<Packet<FrontToCore>>,
}

/// What a process that only looks is asked.
#[derive(Debug)]
pub struct Question {
    keeper: Channel,
    config: Box<CoreConfig>,
    /// The keeper's oldest and newest version of the roles' words.
    channel: (u32, u32),
    hub_bytes: u64,
    sessions: Vec<(u64, u64)>,
    fds: Vec<OwnedFd>,
}

impl Question {
    /// Waits for it; `None`: the keeper is gone.
    ///
    /// # Errors
    /// The keeper cannot be understood, or asks something else (which it is told).
    pub fn receive(keeper: OwnedFd) -> anyhow::Result<Option<Self>> {
        let keeper = Channel::from_fd(keeper);
        let Some(packet) = super::first_packet(&keeper)? else {
            return Ok(None);
        };
        let KeeperToCore::Check {
            config,
            channel,
            channel_newest,
            hub_bytes,
            sessions,
        } = packet.header
        else {
            let unknown = anyhow!("the keeper asks something that this program does not know");
            answer(&keeper, Err(unknown))?;
            return Ok(None);
        };
        Ok(Some(Self {
            keeper,
            config,
            channel: (channel, channel_newest),
            hub_bytes,
            sessions,
            fds: packet.fds,
        }))
    }

    /// How the process is to be sandboxed.
    #[must_use]
    pub const fn sandbox(&self) -> &SandboxConfig {
        &self.config.sandbox
    }
}

/// The process that only looks: answers the keeper's one question and ends. `sandbox` was entered; it is sealed here.
///
/// # Errors
/// The keeper cannot be told.
pub fn check(question: Question, sandbox: Entered) -> anyhow::Result<()> {
    sandbox.seal()?;
    fault::at("check");
    let result = look_at_copies(&question).map(|()| CoreToKeeper::Checked);
    answer(&question.keeper, result)
}

/// Tells the keeper what came of it.
fn answer(keeper: &Channel, result: anyhow::Result<CoreToKeeper>) -> anyhow::Result<()> {
    let message = match result {
        Ok(message) => message,
        Err(error) => CoreToKeeper::Refused {
            reason: format!("{error:#}"),
        },
    };
    Ok(keeper.send(&message, &[], &[])?)
}

fn look_at_copies(question: &Question) -> anyhow::Result<()> {
    agree(question.channel.0, question.channel.1)?;
    let fd = question.fds.first().context("no copy of the state came")?;
    let words = MappedWords::read_only(fd).context("the copy of the state")?;
    let part = |begin: u64, bytes: u64| Part {
        words: words.clone(),
        begin: usize::try_from(begin / 8).unwrap_or(usize::MAX),
        length: usize::try_from(bytes / 8).unwrap_or(usize::MAX),
    };
    let hub_bytes = question.hub_bytes;
    recover(&Journal::open(part(0, hub_bytes))?, 0, BTreeSet::new())?;
    let mut begin = hub_bytes;
    for (session, bytes) in &question.sessions {
        check_state(part(begin, *bytes)).with_context(|| format!("session {session}"))?;
        begin = begin.saturating_add(*bytes);
    }
    Ok(())
}

/// Part of some words, only to be read.
#[derive(Clone)]
struct Part {
    words: MappedWords,
    begin: usize,
    length: usize,
}

impl Part {
    fn at(&self, index: usize) -> usize {
        if index < self.length {
            self.begin.saturating_add(index)
        } else {
            usize::MAX
        }
    }
}

impl Words for Part {
    fn len(&self) -> usize {
        self.length.min(self.words.len().saturating_sub(self.begin))
    }
    fn load(&self, index: usize) -> u64 {
        self.words.load(self.at(index))
    }
    fn store(&self, _: usize, _: u64) {}
    fn read_bytes(&self, index: usize, into: &mut [u8]) {
        let bytes = into.len().min(self.len().saturating_sub(index).saturating_mul(8));
        if let Some(into) = into.get_mut(..bytes) {
            self.words.read_bytes(self.at(index), into);
        }
    }
}

/// What a core on trial looks at, of what it was given.
pub(super) struct Seen {
    front: Channel,
    life_page: OwnedFd,
    hub_state: OwnedFd,
}

impl Seen {
    /// Copies of the descriptors of Start.
    ///
    /// # Errors
    /// There are not enough, or no more can be had.
    pub(super) fn of(fds: &[OwnedFd]) -> anyhow::Result<Self> {
        let [front, _, life_page, _, _, hub_state, _] = fds else {
            bail!("Start came with {} descriptors, 7 are needed", fds.len());
        };
        Ok(Self {
            front: Channel::from_fd(front.try_clone()?),
            life_page: life_page.try_clone()?,
            hub_state: hub_state.try_clone()?,
        })
    }
}

/// A core on trial: looks at all that it is given until the keeper says go (what was held is given back) or that it is not needed
/// (`None`). What it finds wrong is told to the keeper, and ends it.
///
/// # Errors
/// Why this program cannot be the core.
pub(super) fn run(keeper: &Channel, life: u64, seen: &Seen) -> anyhow::Result<Option<Held>> {
    fault::at("trial");
    let held = look_at_everything(keeper, life, seen);
    if let Err(error) = &held {
        let reason = format!("{error:#}");
        // A keeper that cannot be told sees how this process ends.
        let _ = keeper.send(&CoreToKeeper::Refused { reason }, &[], &[]);
    }
    if matches!(held, Ok(Some(_))) {
        fault::at("go");
    }
    held
}

fn look_at_everything(keeper: &Channel, life: u64, seen: &Seen) -> anyhow::Result<Option<Held>> {
    let front = &seen.front;
    let life_page = LifePage::new(MappedWords::writable(&seen.life_page).context("the life page")?);
    if !life_page.is_valid() {
        bail!("the pages of this core life are not of this version");
    }
    recover(
        &Journal::open(MappedWords::read_only(&seen.hub_state)?)?,
        life,
        BTreeSet::new(),
    )?;
    let mut held = Held::default();
    loop {
        life_page.move_beat();
        while let Some(packet) = receive(keeper)? {
            match packet.header {
                KeeperToCore::Go => return Ok(Some(held)),
                KeeperToCore::Stop => return Ok(None),
                _ => held.keeper.push(packet),
            }
        }
        while let Some(packet) = receive::<FrontToCore>(front)? {
            let adopted = matches!(packet.header, FrontToCore::Adopted);
            if let FrontToCore::Session { session, .. } = packet.header {
                look_at_session(&packet.fds).with_context(|| format!("session {session}"))?;
            }
            held.front.push(packet);
            if adopted {
                keeper.send(&CoreToKeeper::Able { life }, &[], &[])?;
            }
        }
        let mut ready = [
            PollFd::from_borrowed_fd(keeper.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(front.as_fd(), PollFlags::IN),
        ];
        match poll(&mut ready, Some(&BEAT_INTERVAL)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(errno).context("waiting for the keeper"),
        }
    }
}

fn receive<T: serde::de::DeserializeOwned>(channel: &Channel) -> anyhow::Result<Option<Packet<T>>> {
    match channel.receive() {
        Err(ChannelError::Closed) => bail!("the keeper or the front is gone"),
        other => Ok(other?),
    }
}

fn look_at_session(fds: &[OwnedFd]) -> anyhow::Result<()> {
    let [front, _, state] = fds else {
        bail!("its packet has {} descriptors, 3 are needed", fds.len());
    };
    if !FrontPage::new(MappedWords::read_only(front)?).is_valid() {
        bail!("its page is not of this version");
    }
    Ok(check_state(MappedWords::read_only(state)?)?)
}
