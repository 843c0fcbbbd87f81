//! The hand-over of everything from one front to the next, under running VMs.
//!
//! In: the keeper's word, and a channel to the other front. Out: the state in pieces, or this front as it was packed elsewhere. Must never
//! know: what is in the state.
//!
//! The old front stops, packs, sends, and waits for the keeper's verdict. The new one unpacks, says that it can serve, and waits as well: so
//! there is never more than one that touches a socket. Only these two waits block a front, and both end with the keeper's word or its death.

use super::limits::{HAND_OVER_RETRY_NS, PIECE_BYTES, STATE_BYTES_MAX};
use super::server::{Front, now};
use crate::channel::{Channel, ChannelError, PACKET_FDS_MAX};
use crate::messages::{FrontToKeeper, KeeperToFront};
use crate::packed::Refusal;
use anyhow::{Context, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use std::panic::{AssertUnwindSafe, catch_unwind};
use vmgmt_device::Tick;

/// The header of a packet from the old front to the new; with it come bytes of the state and descriptors, both in order.
#[derive(Debug, Serialize, Deserialize)]
struct Piece {
    last: bool,
    /// When the old front stopped.
    stopped: Tick,
}

impl Front {
    /// As the old front: gives everything away; goes on, or leaves, as the keeper says then.
    pub(super) fn hand_over(&mut self, fds: Vec<OwnedFd>) -> anyhow::Result<()> {
        let stopped = now()?;
        // What is said is said by this front: the next one begins with nothing to say.
        while !self.keeper.is_empty() {
            wait(&mut [PollFd::new(self.keeper.channel(), PollFlags::OUT)], None)
                .context("waiting for the keeper")?;
            self.keeper.flush();
        }
        // A fault here must not end the sessions: this front can always go on.
        let sent = catch_unwind(AssertUnwindSafe(|| self.send_all(fds, stopped)));
        let mut verdict = None;
        match sent.unwrap_or_else(|_| Err(Refusal::Other("a fault while packing".into()))) {
            Ok(early) => verdict = early,
            Err(refusal) => {
                let reason = refusal.to_string();
                self.keeper
                    .send(FrontToKeeper::CannotHandOver { reason }, Vec::new(), Vec::new());
            }
        }
        loop {
            match verdict.take() {
                Some(KeeperToFront::Resume) => break,
                Some(KeeperToFront::Leave) => {
                    self.left = true;
                    return Ok(());
                }
                Some(other) => bail!("the keeper says {other:?} in the middle of a hand-over"),
                None => verdict = Some(self.verdict()?),
            }
        }
        let stood_still_ns = now()?.since_ns(stopped);
        self.tell_keeper(FrontToKeeper::Serves { stood_still_ns });
        Ok(())
    }

    /// Sends the state; gives the keeper's verdict if that came before the end.
    fn send_all(&self, fds: Vec<OwnedFd>, stopped: Tick) -> Result<Option<KeeperToFront>, Refusal> {
        let channel = Channel::from_fd(fds.into_iter().next().ok_or("no channel to the other front")?);
        let (bytes, fds) = self.save()?;
        let mut pieces = bytes.chunks(PIECE_BYTES);
        let mut groups = fds.chunks(PACKET_FDS_MAX);
        let mut left = pieces.len().max(groups.len());
        while left > 0 {
            left -= 1;
            let piece = Piece {
                last: left == 0,
                stopped,
            };
            let (bytes, fds) = (
                pieces.next().unwrap_or_default(),
                groups.next().unwrap_or_default(),
            );
            loop {
                match channel.send(&piece, bytes, fds) {
                    Ok(()) => break,
                    Err(ChannelError::Full | ChannelError::Io(Errno::TOOMANYREFS)) => {
                        if let Some(verdict) = self.early_verdict(&channel)? {
                            return Ok(Some(verdict));
                        }
                    }
                    Err(error) => return Err(Refusal::Other(format!("the new front: {error}"))),
                }
            }
        }
        Ok(None)
    }

    /// Waits a moment until the other front may have taken something, or the keeper has decided.
    fn early_verdict(&self, channel: &Channel) -> Result<Option<KeeperToFront>, Refusal> {
        wait(
            &mut [
                PollFd::new(self.keeper.channel(), PollFlags::IN),
                PollFd::new(channel, PollFlags::OUT),
            ],
            Some(HAND_OVER_RETRY_NS),
        )?;
        let packet = self.keeper.channel().receive::<KeeperToFront>();
        Ok(packet
            .map_err(|error| Refusal::Other(error.to_string()))?
            .map(|packet| packet.header))
    }

    /// Waits for the keeper's word.
    fn verdict(&mut self) -> anyhow::Result<KeeperToFront> {
        loop {
            self.keeper.flush();
            let retry = (!self.keeper.is_empty()).then_some(HAND_OVER_RETRY_NS);
            let received = self.keeper.channel().receive::<KeeperToFront>();
            if let Some(packet) = received.context("the keeper is gone")? {
                return Ok(packet.header);
            }
            wait(&mut [PollFd::new(self.keeper.channel(), PollFlags::IN)], retry)
                .context("waiting for the keeper")?;
        }
    }

    /// As the new front: takes everything, says so, and serves when the keeper says so.
    pub(super) fn take_over(&mut self, fds: Vec<OwnedFd>) -> anyhow::Result<()> {
        let taken = catch_unwind(AssertUnwindSafe(|| {
            if !self.sessions.is_empty() || !self.listeners.is_empty() || self.core.is_some() {
                return Err("this front has begun to serve already".into());
            }
            let (bytes, fds, stopped) = receive_all(fds)?;
            let descriptors = fds.len() as u64;
            self.restore(&bytes, fds).map(|()| (descriptors, stopped))
        }));
        let taken = taken.unwrap_or_else(|_| Err(Refusal::Other("a fault while unpacking".into())));
        let (descriptors, stopped) = match taken {
            Ok(taken) => taken,
            Err(refusal) => {
                let reason = refusal.to_string();
                self.tell_keeper(FrontToKeeper::CannotHandOver {
                    reason: reason.clone(),
                });
                bail!("the front's state cannot be taken over: {reason}");
            }
        };
        let sessions = self.sessions.len() as u64;
        self.tell_keeper(FrontToKeeper::CanServe {
            sessions,
            descriptors,
        });
        match self.verdict()? {
            KeeperToFront::Serve => crate::fault::at("serve"),
            other => bail!("the keeper says {other:?} to a front that waits for its turn"),
        }
        self.now = now()?;
        self.tell_sandbox();
        self.give_up_lost();
        let stood_still_ns = self.now.since_ns(stopped);
        self.tell_keeper(FrontToKeeper::Serves { stood_still_ns });
        Ok(())
    }
}

/// Takes the pieces of the state.
fn receive_all(fds: Vec<OwnedFd>) -> Result<(Vec<u8>, Vec<OwnedFd>, Tick), Refusal> {
    let channel = Channel::from_fd(fds.into_iter().next().ok_or("no channel to the other front")?);
    let mut bytes = Vec::new();
    let mut fds = Vec::new();
    loop {
        let packet = channel
            .receive::<Piece>()
            .map_err(|error| Refusal::Other(format!("the old front: {error}")))?;
        let Some(packet) = packet else {
            wait(&mut [PollFd::new(&channel, PollFlags::IN)], None)?;
            continue;
        };
        bytes.extend(packet.payload);
        fds.extend(packet.fds);
        if bytes.len() > STATE_BYTES_MAX {
            return Err("the state is larger than one can be".into());
        }
        if packet.header.last {
            return Ok((bytes, fds, packet.header.stopped));
        }
    }
}

fn wait(fds: &mut [PollFd<'_>], at_most_ns: Option<i64>) -> Result<(), Refusal> {
    let time = at_most_ns.map(|tv_nsec| Timespec { tv_sec: 0, tv_nsec });
    match poll(fds, time.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(Refusal::Other(errno.to_string())),
    }
}
