//! READER: a child of the keeper that reads the configuration anew and opens the directories of its shares, because both may wait for a disk
//! that hangs, and the keeper must never wait.
//!
//! In: where the configuration is. Out: the configuration and the directories, or all mistakes. Must never know what runs now.

use crate::channel::{Channel, ChannelError};
use crate::config::{self, Config, Source};
use crate::sandbox::Shares;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fd::{AsFd, OwnedFd};
use serde::{Deserialize, Serialize};

/// What the reader says.
#[derive(Debug, Serialize, Deserialize)]
pub enum Answer {
    /// fds: the directory of each share, in the order of the configuration.
    Good(Box<Config>),
    /// Why it cannot be used.
    Bad(String),
}

/// The reader's process: answers the keeper's one question and ends.
///
/// # Errors
/// The keeper cannot be understood or told.
pub fn run(keeper: OwnedFd) -> anyhow::Result<()> {
    let keeper = Channel::from_fd(keeper);
    let source = loop {
        match keeper.receive::<Source>() {
            Ok(Some(packet)) => break packet.header,
            Ok(None) => {
                poll(&mut [PollFd::new(&keeper, PollFlags::IN)], None)?;
            }
            Err(ChannelError::Closed) => return Ok(()),
            Err(error) => return Err(error.into()),
        }
    };
    crate::fault::at("read");
    match read(&source) {
        Ok((config, shares)) => {
            let fds: Vec<_> = shares.iter().map(AsFd::as_fd).collect();
            keeper.send(&Answer::Good(Box::new(config)), &[], &fds)?;
        }
        Err(text) => keeper.send(&Answer::Bad(text), &[], &[])?,
    }
    Ok(())
}

fn read(source: &Source) -> Result<(Config, Vec<OwnedFd>), String> {
    let config =
        config::load(source.file.as_deref(), &source.flags).map_err(|mistakes| mistakes.to_string())?;
    let core = &config.core;
    let shares = Shares::default().open(&core.shares, &core.sandbox);
    let shares = shares.map_err(|error| error.to_string())?;
    Ok((config, shares))
}
