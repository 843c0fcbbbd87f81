//! CORE: rings, hub, modes and workers in one event loop. May be killed at any moment, and replaced.
//!
//! In: the keeper's channel (configuration, VMs), the front's channel (sessions, memory, descriptors), words of the pages,
//! operators, results of workers. Out: words, interrupts, requests to the front. What must never come in here: vfio-user,
//! QEMU's sockets, a register.
//!
//! One file, [`event_loop`], moves values between the rooms; the others hold what belongs to one of its sides.

pub mod bulk;
mod event_loop;
pub mod journal;
pub mod lines;
pub mod memory;
pub mod operators;
pub mod sessions;
mod trial;
pub mod wake;

pub use trial::check;

use crate::channel::{Channel, Packet};
use crate::messages::{CHANNEL_VERSION, KeeperToCore};
use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};

/// The core's process: speaks with the keeper over `keeper` until it is told to stop or the keeper is gone.
///
/// # Errors
/// What makes it impossible to serve: the keeper then logs it and starts another.
pub fn run(keeper: OwnedFd) -> anyhow::Result<()> {
    let keeper = Channel::from_fd(keeper);
    let Some(packet) = first_packet(&keeper)? else {
        return Ok(());
    };
    let Packet {
        header:
            KeeperToCore::Start {
                life,
                config,
                channel,
                trial,
            },
        fds,
        ..
    } = packet
    else {
        bail!("the keeper's first packet is not Start");
    };
    if channel != CHANNEL_VERSION {
        bail!("the keeper speaks version {channel} of the roles' words, this program {CHANNEL_VERSION}");
    }
    let mut held = trial::Held::default();
    if trial {
        match trial::run(&keeper, life, &config, &fds)? {
            Some(told) => held = told,
            None => return Ok(()),
        }
    }
    event_loop::EventLoop::new(keeper, life, *config, fds)?.run(held)
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
