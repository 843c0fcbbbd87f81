//! WORKSHOP chat: one mailbox. In: messages, and what became of their delivery. Out: which message is next.
//!
//! It never knows who may send, what a submission is, or what time it is.

use crate::journal::Message;
use crate::limits::MESSAGE_OVERHEAD_BYTES;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use vmgmt_device::rings::Channel;

/// A message in a mailbox.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Held {
    pub message: Arc<Message>,
    /// Bytes of it that the receiver has.
    pub offset: u64,
    /// The channel that has them and gets the rest.
    pub bound: Option<(u64, Channel)>,
    /// A completion with a part of it is on its way.
    pub delivering: bool,
}

/// Messages for one VM (or the host), in order of acceptance.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Mailbox {
    next_position: u64,
    held: BTreeMap<u64, Held>,
    /// Those that any receive may take: neither bound nor on their way. Derived.
    waiting: BTreeSet<u64>,
    /// Derived.
    bytes: u64,
}

/// A mailbox as it is saved.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SavedMailbox {
    pub next_position: u64,
    pub held: Vec<(u64, Held)>,
}

fn charge(message: &Message) -> u64 {
    (message.body.len() as u64).saturating_add(MESSAGE_OVERHEAD_BYTES)
}

impl Mailbox {
    /// Puts a message in; its position.
    pub fn push(&mut self, message: Arc<Message>) -> u64 {
        let position = self.next_position;
        self.next_position += 1;
        self.bytes = self.bytes.saturating_add(charge(&message));
        self.waiting.insert(position);
        self.held.insert(
            position,
            Held {
                message,
                offset: 0,
                bound: None,
                delivering: false,
            },
        );
        position
    }

    /// Takes a message out for good.
    pub fn remove(&mut self, position: u64) -> Option<Held> {
        let held = self.held.remove(&position)?;
        self.waiting.remove(&position);
        self.bytes = self.bytes.saturating_sub(charge(&held.message));
        Some(held)
    }

    /// Position of the first message that any receive may take.
    #[must_use]
    pub fn first_waiting(&self) -> Option<u64> {
        self.waiting.first().copied()
    }

    /// How many wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// A message.
    #[must_use]
    pub fn get(&self, position: u64) -> Option<&Held> {
        self.held.get(&position)
    }

    /// Changes a message's state of delivery.
    pub fn update(&mut self, position: u64, change: impl FnOnce(&mut Held)) {
        if let Some(held) = self.held.get_mut(&position) {
            change(held);
            if held.delivering || held.bound.is_some() {
                self.waiting.remove(&position);
            } else {
                self.waiting.insert(position);
            }
        }
    }

    /// Messages and what they cost, those on their way included.
    #[must_use]
    pub fn usage(&self) -> (u64, u64) {
        (self.held.len() as u64, self.bytes)
    }

    /// Whether a message of this many bytes may come in.
    #[must_use]
    pub fn has_room(&self, body_bytes: u64, bytes_max: u64) -> bool {
        body_bytes
            .saturating_add(MESSAGE_OVERHEAD_BYTES)
            .saturating_add(self.bytes)
            <= bytes_max
    }

    /// The oldest message that is not on its way to somebody: position and stamp.
    #[must_use]
    pub fn oldest(&self) -> Option<(u64, u64)> {
        let position = self.first_waiting()?;
        self.held
            .get(&position)
            .map(|held| (position, held.message.stamp_ns))
    }

    /// All messages, oldest first.
    pub fn iter(&self) -> impl Iterator<Item = (u64, &Held)> {
        self.held.iter().map(|(position, held)| (*position, held))
    }

    #[must_use]
    pub fn save(&self) -> SavedMailbox {
        let Self {
            next_position,
            held,
            waiting: _,
            bytes: _,
        } = self;
        SavedMailbox {
            next_position: *next_position,
            held: held
                .iter()
                .map(|(position, held)| (*position, held.clone()))
                .collect(),
        }
    }

    /// # Errors
    /// What is wrong with the saved state.
    pub fn restore(saved: SavedMailbox) -> Result<Self, &'static str> {
        let SavedMailbox { next_position, held } = saved;
        let mut mailbox = Self {
            next_position,
            ..Self::default()
        };
        for (position, entry) in held {
            if position >= next_position {
                return Err("a mailbox holds a message beyond its end");
            }
            if entry.offset > entry.message.body.len() as u64 || (entry.offset != 0 && entry.bound.is_none())
            {
                return Err("a message in a mailbox is delivered in part to nobody");
            }
            mailbox.bytes = mailbox.bytes.saturating_add(charge(&entry.message));
            if !entry.delivering && entry.bound.is_none() {
                mailbox.waiting.insert(position);
            }
            if mailbox.held.insert(position, entry).is_some() {
                return Err("a mailbox holds two messages in one place");
            }
        }
        Ok(mailbox)
    }
}
