//! The outgoing messages, each by itself.
//!
//! In: whole messages. Out: what to send next, with its descriptors. Must never know: what is in them.
//!
//! Messages are handed out **one at a time**, never glued together: QEMU reads a header in one piece and
//! gives the connection up when it gets only a part ("short read of header"). The kernel cuts a send only
//! between buffers of many kilobytes, so a message that starts a send always arrives with its whole header.

use std::collections::VecDeque;

use crate::FdSlot;

/// What to send next: with `sendmsg`, the descriptors attached to the first byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PendingOutput<'a> {
    /// The rest of one message; not empty.
    pub bytes: &'a [u8],
    /// Descriptors to attach; empty once the first byte is sent. They stay the shell's.
    pub descriptors: &'a [FdSlot],
}

/// One message on its way out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outgoing {
    pub bytes: Vec<u8>,
    pub sent: usize,
    pub descriptors: Vec<FdSlot>,
    /// Set for our own DMA messages: the id under which the answer is awaited.
    pub dma_id: Option<u16>,
}

#[derive(Debug, Default)]
pub(crate) struct Output {
    pub(crate) queue: VecDeque<Outgoing>,
    bytes: usize,
}

impl Output {
    pub fn restore(queue: VecDeque<Outgoing>) -> Self {
        let bytes = queue
            .iter()
            .map(|message| message.bytes.len().saturating_sub(message.sent))
            .sum();
        Self { queue, bytes }
    }

    pub fn push(&mut self, bytes: Vec<u8>, descriptors: Vec<FdSlot>, dma_id: Option<u16>) {
        self.bytes += bytes.len();
        self.queue.push_back(Outgoing {
            bytes,
            sent: 0,
            descriptors,
            dma_id,
        });
    }

    /// Unsent bytes.
    pub fn len(&self) -> usize {
        self.bytes
    }

    pub fn front(&self) -> Option<PendingOutput<'_>> {
        let message = self.queue.front()?;
        let descriptors = if message.sent == 0 {
            message.descriptors.as_slice()
        } else {
            &[]
        };
        Some(PendingOutput {
            bytes: message.bytes.get(message.sent..)?,
            descriptors,
        })
    }

    /// `bytes` more of the front message are sent; more than it has counts as all of it.
    pub fn advance(&mut self, bytes: usize) {
        let Some(message) = self.queue.front_mut() else {
            return;
        };
        let left = message.bytes.len().saturating_sub(message.sent);
        let step = bytes.min(left);
        message.sent += step;
        self.bytes = self.bytes.saturating_sub(step);
        if step == left {
            self.queue.pop_front();
        }
    }

    /// Takes back our DMA messages of which no byte is sent, and names their ids.
    pub fn remove_unsent_dma(&mut self) -> Vec<u16> {
        let mut removed = Vec::new();
        let mut removed_bytes = 0;
        self.queue.retain(|message| match message.dma_id {
            Some(id) if message.sent == 0 => {
                removed.push(id);
                removed_bytes += message.bytes.len();
                false
            }
            _ => true,
        });
        self.bytes = self.bytes.saturating_sub(removed_bytes);
        removed
    }
}
