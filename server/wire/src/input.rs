//! The incoming byte stream: cut into frames, with the descriptors that belong to each.
//!
//! In: what one read of the socket gave. Out: frames (header, body, descriptors). Must never know: what a
//! command means.
//!
//! # Which message a descriptor belongs to
//!
//! A Unix stream socket keeps what one `sendmsg` sent as a chain of buffers; descriptors hang on the first
//! of them. One `recvmsg` takes bytes from several buffers, but it *stops at the end of a buffer that
//! carried descriptors*, and it hands them out as soon as it touches that buffer's first byte
//! (`unix_stream_read_generic`; `tests/descriptor_attribution.rs` of this crate tries it on a real socket).
//! So the bytes before that buffer may be in the same read, but no byte after it can be: the descriptors of
//! a read came with its **last** byte, not with its first. "A map without descriptor, then one with", both
//! waiting in the queue, arrive as one read with one descriptor, and it is the second map's.
//!
//! Hence the rule: descriptors delivered with a read belong to the message that contains the last byte of
//! that read. It is exact for every client that sends descriptors with bytes of one message only, as QEMU
//! does (one `sendmsg` per message) and as clients that send header and body apart do. Because the rule
//! names a position in the stream and not a read, any cut of the stream gives the same requests.

use std::collections::VecDeque;

use zerocopy::FromBytes;

use crate::FdSlot;
use crate::limits;
use crate::request_decode::Descriptors;
use crate::uapi::{HEADER_BYTES, Header};

/// Descriptors at a position of the stream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Attached {
    /// Position of the byte they came with, from the start of the connection.
    pub position: u64,
    pub slots: Vec<FdSlot>,
    pub lost: bool,
}

/// One whole message.
pub(crate) struct Frame {
    pub header: Header,
    pub body: Vec<u8>,
    pub descriptors: Descriptors,
}

#[derive(Debug, Default)]
pub(crate) struct Input {
    /// Bytes read and not yet cut off; `bytes[consumed..]` is live.
    pub(crate) bytes: Vec<u8>,
    pub(crate) consumed: usize,
    /// Position in the stream of `bytes[0]`.
    pub(crate) base: u64,
    pub(crate) attached: VecDeque<Attached>,
}

impl Input {
    /// Takes what one read gave. Returns descriptors that are too many to hold.
    pub fn push(&mut self, bytes: &[u8], slots: &mut Vec<FdSlot>, lost: bool) -> Vec<FdSlot> {
        if self.consumed > 0 {
            self.bytes.drain(..self.consumed);
            self.base = self.base.saturating_add(self.consumed as u64);
            self.consumed = 0;
        }
        self.bytes.extend_from_slice(bytes);
        if slots.is_empty() && !lost {
            return Vec::new();
        }
        let held: usize = self.attached.iter().map(|attached| attached.slots.len()).sum();
        let room = limits::QUEUED_DESCRIPTORS_MAX
            .saturating_sub(held)
            .min(slots.len());
        let excess = slots.split_off(room);
        let lost = lost || !excess.is_empty();
        let position = self
            .base
            .saturating_add(self.bytes.len().saturating_sub(1) as u64);
        // A peer may lose or attach descriptors with every byte of one long message: records are bounded too.
        let full = self.attached.len() >= limits::QUEUED_DESCRIPTORS_MAX;
        match self
            .attached
            .back_mut()
            .filter(|last| full || last.position == position)
        {
            Some(last) => {
                last.position = position;
                last.slots.append(slots);
                last.lost |= lost;
            }
            None => self.attached.push_back(Attached {
                position,
                slots: std::mem::take(slots),
                lost,
            }),
        }
        excess
    }

    /// Bytes held.
    pub fn len(&self) -> usize {
        self.bytes.len() - self.consumed
    }

    fn live(&self) -> &[u8] {
        self.bytes.get(self.consumed..).unwrap_or_default()
    }

    /// The next header, as soon as it is there.
    pub fn peek_header(&self) -> Option<Header> {
        Header::read_from_prefix(self.live())
            .ok()
            .map(|(header, _)| header)
    }

    /// The next message, as soon as it is whole. The caller has bounded `message_bytes` of its header.
    pub fn pop_frame(&mut self) -> Option<Frame> {
        let header = self.peek_header()?;
        let message_bytes = header.message_bytes.get() as usize;
        let body = self.live().get(HEADER_BYTES..message_bytes)?.to_vec();
        self.consumed += message_bytes;
        let end = self.base.saturating_add(self.consumed as u64);
        let mut descriptors = Descriptors::default();
        while let Some(attached) = self.attached.pop_front_if(|first| first.position < end) {
            descriptors.slots.extend(attached.slots);
            descriptors.lost |= attached.lost;
        }
        Some(Frame {
            header,
            body,
            descriptors,
        })
    }

    /// All descriptors still held, for closing.
    pub fn take_descriptors(&mut self) -> Vec<FdSlot> {
        self.attached
            .drain(..)
            .flat_map(|attached| attached.slots)
            .collect()
    }
}
