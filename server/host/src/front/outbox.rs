//! A channel with a queue before it: nobody waits for another role.
//!
//! In: packets. Out: the same packets in order, as the other role takes them. Must never know: what they mean.

use super::closer::SharedFd;
use crate::channel::{Channel, ChannelError};
use rustix::fd::AsFd;
use rustix::io::Errno;
use serde::Serialize;
use std::collections::VecDeque;

/// A packet that waits.
#[derive(Debug)]
pub struct Waiting<T> {
    pub header: T,
    pub payload: Vec<u8>,
    pub fds: Vec<SharedFd>,
}

/// The sending side of a channel.
#[derive(Debug)]
pub struct Outbox<T> {
    channel: Channel,
    pub(super) queue: VecDeque<Waiting<T>>,
    /// Packets that the channel has taken.
    gone: u64,
    /// The other role is gone, or does not speak our language: packets go nowhere.
    pub(super) broken: bool,
}

impl<T: Serialize> Outbox<T> {
    pub const fn new(channel: Channel) -> Self {
        Self {
            channel,
            queue: VecDeque::new(),
            gone: 0,
            broken: false,
        }
    }

    pub const fn channel(&self) -> &Channel {
        &self.channel
    }

    pub const fn is_broken(&self) -> bool {
        self.broken
    }

    pub fn set_broken(&mut self) {
        self.broken = true;
        self.queue.clear();
    }

    /// Packets that wait.
    pub fn len(&self) -> usize {
        self.queue.len()
    }

    pub fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Packets that the channel has taken so far.
    pub const fn gone(&self) -> u64 {
        self.gone
    }

    /// What waits, in order.
    pub fn waiting(&self) -> impl Iterator<Item = &T> {
        self.queue.iter().map(|packet| &packet.header)
    }

    /// Sends a packet, or queues it behind those that wait.
    pub fn send(&mut self, header: T, payload: Vec<u8>, fds: Vec<SharedFd>) {
        if self.broken {
            return;
        }
        self.queue.push_back(Waiting { header, payload, fds });
        self.flush();
    }

    /// Sends what waits, as far as it goes.
    pub fn flush(&mut self) {
        while let Some(packet) = self.queue.front() {
            let fds: Vec<_> = packet.fds.iter().map(|fd| fd.as_fd()).collect();
            match self.channel.send(&packet.header, &packet.payload, &fds) {
                Ok(()) => {
                    self.queue.pop_front();
                    self.gone += 1;
                }
                // Too many descriptors under way is the kernel's word for the same: the other must take some first.
                Err(ChannelError::Full | ChannelError::Io(Errno::TOOMANYREFS)) => return,
                Err(error) => {
                    tracing::warn!(%error, "a channel to another role is broken");
                    self.set_broken();
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packets_wait_in_order_and_go_on() {
        let (ours, theirs) = Channel::pair().unwrap();
        let mut outbox = Outbox::new(ours);
        for number in 0..1000u32 {
            outbox.send(number, vec![0; 4096], vec![]);
        }
        assert!(!outbox.is_empty());
        for number in 0..1000 {
            assert_eq!(theirs.receive::<u32>().unwrap().unwrap().header, number);
            outbox.flush();
        }
        drop(theirs);
        outbox.send(0, vec![], vec![]);
        assert!(outbox.is_broken() && outbox.is_empty());
    }
}
