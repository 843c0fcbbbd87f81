//! Operations of chat mode: presence, messages of any length, several receives posted at once.

use std::collections::VecDeque;
use std::time::Instant;

use vmgmt_abi::chat::{
    ALL_NAME, DESCRIPTION_BYTES_MAX, HOST_NAME, MessageHeader, PEER_ALL, PEER_BY_NAME, PEER_HOST, PeerEntry,
    message_flag,
};
use vmgmt_abi::{NAME_BYTES_MAX, Opcode};

use crate::channel::{Finished, Request, Tag};
use crate::client::Client;
use crate::error::{DriverError, Result};
use crate::limits::{MESSAGE_BYTES_MAX, RECEIVE_BYTES};
use crate::records::Records;

/// A VM (or the host) that this one may reach.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Peer {
    pub number: u64,
    pub name: String,
    pub description: String,
    /// `vmgmt_abi::chat::presence` bits.
    pub presence: u32,
}

/// A message, whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    pub sequence: u64,
    pub source: u64,
    pub source_name: String,
    /// Nanoseconds since 1970, when the host accepted it.
    pub accepted_ns: u64,
    /// `vmgmt_abi::chat::message_flag` bits.
    pub flags: u32,
    pub bytes: Vec<u8>,
}

/// Receives that are posted, and the message that is being put together.
#[derive(Debug, Default)]
pub struct Receiver {
    posted: VecDeque<Tag>,
    partial: Option<(Message, u64)>,
}

impl Receiver {
    /// Receives in flight.
    #[must_use]
    pub fn posted(&self) -> usize {
        self.posted.len()
    }
}

impl Client {
    /// Publishes this VM with a description, or withdraws it.
    ///
    /// # Errors
    /// As [`Client::call`]; so for all operations here.
    pub fn publish(&mut self, description: Option<&str>) -> Result<()> {
        let text = description.unwrap_or_default();
        if text.len() > DESCRIPTION_BYTES_MAX {
            return Err(DriverError::BadArgument(format!(
                "a description has at most {DESCRIPTION_BYTES_MAX} bytes"
            )));
        }
        let buffer = self.borrow(text.len().max(1))?;
        buffer.write(0, text.as_bytes())?;
        let request = Request::new(Opcode::PUBLISH).argument(u64::from(description.is_some()));
        let request = if text.is_empty() {
            request
        } else {
            request.input(&buffer, 0, text.len(), 0)
        };
        let published = self.call(request).map(drop);
        self.give_back(buffer);
        published
    }

    /// Who can be reached.
    ///
    /// # Errors
    /// As [`Client::publish`].
    pub fn peers(&mut self) -> Result<Vec<Peer>> {
        self.listing_of_peers(|records| {
            let head: PeerEntry = records.head()?;
            let name = records.text(head.name_bytes.into())?;
            let description = records.text(head.description_bytes.into())?;
            records.padding(usize::from(head.name_bytes) + usize::from(head.description_bytes))?;
            Ok(Peer {
                number: head.number,
                name,
                description,
                presence: head.presence,
            })
        })
    }

    /// Sends a message to a VM by name, to `host`, or to `all`. Gives its number (to all: how many took it).
    ///
    /// # Errors
    /// As [`Client::publish`]: PEER_ABSENT, DENIED, OVER_BUDGET, …
    pub fn send(&mut self, target: &str, message: &[u8], idempotency_key: u64) -> Result<u64> {
        let (handle, meta) = match target {
            HOST_NAME => (PEER_HOST, ""),
            ALL_NAME => (PEER_ALL, ""),
            name if name.is_empty() || name.len() > NAME_BYTES_MAX => {
                return Err(DriverError::BadArgument(format!(
                    "a VM's name has 1 to {NAME_BYTES_MAX} bytes"
                )));
            }
            name => (PEER_BY_NAME, name),
        };
        let length = meta.len() + message.len();
        if length > self.data_bytes_max() {
            let most = self.data_bytes_max() - meta.len();
            return Err(DriverError::BadArgument(format!(
                "a message over this channel has at most {most} bytes"
            )));
        }
        let buffer = self.borrow(length.max(1))?;
        buffer.write(0, meta.as_bytes())?;
        buffer.write(meta.len(), message)?;
        let request = Request::new(Opcode::SEND)
            .handle(handle)
            .argument(idempotency_key);
        let request = if length == 0 {
            request
        } else {
            request.input(&buffer, 0, length, meta.len())
        };
        let sent = self.call(request).map(|finished| finished.result);
        self.give_back(buffer);
        sent
    }

    /// Posts receives until `count` are in flight.
    ///
    /// # Errors
    /// As [`Client::start`].
    pub fn post_receives(&mut self, receiver: &mut Receiver, count: usize) -> Result<()> {
        let count = count.clamp(1, self.depth().saturating_sub(1).max(1));
        let bytes = RECEIVE_BYTES.min(self.data_bytes_max());
        while receiver.posted.len() < count {
            let buffer = self.borrow(bytes)?;
            receiver
                .posted
                .push_back(self.start(Request::new(Opcode::RECEIVE).output(&buffer, 0, bytes, 0))?);
        }
        Ok(())
    }

    /// The next message, of the receives posted (one is, where none was). Nothing when the deadline passed first; they stay posted.
    ///
    /// # Errors
    /// As [`Client::finish`].
    pub fn receive(&mut self, receiver: &mut Receiver, deadline: Option<Instant>) -> Result<Option<Message>> {
        loop {
            if receiver.posted.is_empty() {
                self.post_receives(receiver, 1)?;
            }
            let Some(oldest) = receiver.posted.front().copied() else {
                return Ok(None);
            };
            let Some(finished) = self.finish(oldest, deadline)? else {
                return Ok(None);
            };
            receiver.posted.pop_front();
            let mut finished = finished.ok()?;
            let message = assemble(receiver, &finished)?;
            if let Some(span) = finished.span.take() {
                self.give_back(span.memory);
            }
            if message.is_some() {
                return Ok(message);
            }
        }
    }

    /// Opens the channel anew as [`Client::reopen`] does, with no receive posted. Gives the messages that were delivered before, as far as they are whole:
    /// they do not come again.
    ///
    /// # Errors
    /// As [`Client::reopen`].
    pub fn reopen_receiving(&mut self, receiver: &mut Receiver) -> Result<Vec<Message>> {
        let mut old = std::mem::take(receiver);
        let mut answers = self.reopen_keeping()?;
        let mut delivered = Vec::new();
        while let Some(tag) = old.posted.pop_front() {
            let answer = answers.remove(&tag);
            if let Some(finished) = answer.filter(|finished| finished.status == vmgmt_abi::Status::OK) {
                delivered.extend(assemble(&mut old, &finished)?);
            }
        }
        Ok(delivered)
    }

    /// Takes back the receives that are posted. A message that came meanwhile is given.
    ///
    /// # Errors
    /// As [`Client::cancel`].
    pub fn withdraw_receives(&mut self, receiver: &mut Receiver) -> Result<Vec<Message>> {
        let mut late = Vec::new();
        while let Some(tag) = receiver.posted.pop_front() {
            let finished = self.cancel(tag, crate::limits::SETTLE_TIMEOUT)?;
            if let Some(finished) = finished.filter(|finished| finished.status == vmgmt_abi::Status::OK) {
                late.extend(assemble(receiver, &finished)?);
            }
        }
        Ok(late)
    }
}

/// Takes one RECEIVE's bytes; gives the message when it is whole.
fn assemble(receiver: &mut Receiver, finished: &Finished) -> Result<Option<Message>> {
    let bytes = finished.data(finished.result_bytes(finished.output_bytes)?)?;
    let mut records = Records::new(&bytes, "a message");
    let head: MessageHeader = records.head()?;
    if head.message_bytes > MESSAGE_BYTES_MAX {
        return Err(DriverError::contract(format!(
            "a message of {} bytes",
            head.message_bytes
        )));
    }
    let (mut message, whole) = match receiver.partial.take() {
        None if head.flags & message_flag::CONTINUED == 0 => {
            let source_name = records.text(super::file::bounded(head.source_name_bytes, NAME_BYTES_MAX)?)?;
            let MessageHeader {
                sequence,
                source,
                accepted_ns,
                flags,
                ..
            } = head;
            let message = Message {
                sequence,
                source,
                source_name,
                accepted_ns,
                flags,
                bytes: Vec::new(),
            };
            (message, head.message_bytes)
        }
        Some((message, whole))
            if head.flags & message_flag::CONTINUED != 0
                && (head.source, head.sequence) == (message.source, message.sequence) =>
        {
            (message, whole)
        }
        _ => {
            return Err(DriverError::contract(
                "a piece of a message that does not follow the one before",
            ));
        }
    };
    message.bytes.extend_from_slice(records.rest());
    let got = message.bytes.len() as u64;
    if got > whole || finished.more() != (got < whole) {
        return Err(DriverError::contract(format!(
            "{got} bytes of a message of {whole}"
        )));
    }
    if finished.more() {
        receiver.partial = Some((message, whole));
        return Ok(None);
    }
    Ok(Some(message))
}
