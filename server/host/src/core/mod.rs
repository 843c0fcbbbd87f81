//! CORE: rings, hub, modes and workers in one event loop. May be killed at any moment, and replaced.
//!
//! In: the keeper's channel (configuration, VMs), the front's channel (sessions, memory, descriptors), words of the pages,
//! operators, results of workers. Out: words, interrupts, requests to the front. What must never come in here: vfio-user,
//! QEMU's sockets, a register.
//!
//! One file, [`event_loop`], moves values between the rooms; the others hold what belongs to one of its sides.

mod ahead;
pub mod bulk;
mod event_loop;
pub mod freezes;
pub mod journal;
pub mod lines;
pub mod memory;
pub mod operators;
pub mod saving;
pub mod sessions;
mod trial;
pub mod wake;

pub use ahead::Ahead;
pub use trial::{Question, check};

use crate::channel::{Channel, Packet};
use crate::config::CoreConfig;
use crate::messages::{KeeperToCore, agree};
use crate::sandbox::{Entered, SandboxConfig, ShareRoot};
use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::Mode;
use rustix::process::umask;
use std::collections::BTreeSet;

/// What the keeper says first. Nothing in it comes from a guest.
#[derive(Debug)]
pub struct Start {
    keeper: Channel,
    life: u64,
    /// The version of the roles' words that is spoken.
    channel: u32,
    config: CoreConfig,
    fds: Vec<OwnedFd>,
    /// The directories of the shares, in the order of the configuration.
    shares: Vec<OwnedFd>,
    umask: u32,
    /// It is only to look whether it could be the core, until the keeper says more.
    trial: bool,
    /// VMs for which workers of killed cores may still do something.
    undead: BTreeSet<u64>,
    /// The keeper can read the configuration anew.
    reloads: bool,
}

impl Start {
    /// Waits for it; `None`: the keeper is gone.
    ///
    /// # Errors
    /// The keeper says something else.
    pub fn receive(keeper: OwnedFd) -> anyhow::Result<Option<Self>> {
        let keeper = Channel::from_fd(keeper);
        let Some(packet) = first_packet(&keeper)? else {
            return Ok(None);
        };
        let Packet {
            header:
                KeeperToCore::Start {
                    life,
                    config,
                    channel,
                    channel_newest,
                    trial,
                    undead,
                    reloads,
                },
            mut fds,
            ..
        } = packet
        else {
            bail!("the keeper's first packet is not Start");
        };
        let channel = agree(channel, channel_newest)?;
        crate::fault::at("start");
        let (count, shares) = (fds.len(), config.shares.len());
        if count != event_loop::START_FDS + shares {
            bail!(
                "Start came with {count} descriptors, {} are needed",
                event_loop::START_FDS + shares
            );
        }
        Ok(Some(Self {
            keeper,
            life,
            channel,
            config: *config,
            shares: fds.split_off(event_loop::START_FDS),
            fds,
            // From here on files get the mode that is asked for: nothing in the sandbox can change it afterwards.
            umask: umask(Mode::empty()).as_raw_mode(),
            trial,
            undead,
            reloads,
        }))
    }

    /// How the core is to be sandboxed.
    #[must_use]
    pub const fn sandbox(&self) -> &SandboxConfig {
        &self.config.sandbox
    }

    /// The directories that it works in.
    #[must_use]
    pub fn share_roots(&self) -> Vec<ShareRoot<'_>> {
        let named = self.config.shares.iter().zip(&self.shares);
        named
            .map(|(share, fd)| ShareRoot {
                name: &share.name,
                fd: fd.as_fd(),
            })
            .collect()
    }
}

/// The core's process: serves until the keeper says stop or is gone. `sandbox` was entered; it is sealed here, when all threads run.
/// `ahead`: until it serves.
///
/// # Errors
/// What makes it impossible to serve: the keeper then logs it and starts another.
pub fn run(start: Start, sandbox: Entered, ahead: Option<Ahead>) -> anyhow::Result<()> {
    tracing::info!(
        "core life {} speaks version {} of the roles' words",
        start.life,
        start.channel
    );
    let seen = start.trial.then(|| trial::Seen::of(&start.fds)).transpose()?;
    let hands = event_loop::Hands::new(start)?;
    // All threads run, and nothing of a guest was read yet.
    let sandbox = sandbox.seal()?;
    let mut held = None;
    if let Some(seen) = seen {
        held = trial::run(hands.keeper(), hands.life(), &seen)?;
        if held.is_none() {
            return Ok(());
        }
    }
    event_loop::EventLoop::new(hands, sandbox)?.run(held, ahead)
}

/// Waits for the first packet; `None`: the keeper is gone.
fn first_packet(keeper: &Channel) -> anyhow::Result<Option<Packet<KeeperToCore>>> {
    loop {
        match keeper.receive::<KeeperToCore>() {
            Ok(Some(packet)) => return Ok(Some(packet)),
            Ok(None) => {}
            Err(crate::channel::ChannelError::Closed) => return Ok(None),
            Err(error) => return Err(error).context("the keeper's channel"),
        }
        let mut fds = [PollFd::from_borrowed_fd(keeper.as_fd(), PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).context("waiting for the keeper"),
        }
    }
}
