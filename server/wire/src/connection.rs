//! One vfio-user connection, seen from the server: the verbs of the hall.
//!
//! In: `handle_read` (what one read of the socket gave), `reply`, `send_dma_*`. Out: `poll_event` (requests,
//! answers, descriptors to close, the end) and `pending_output` (bytes to send). Must never know: a
//! descriptor's number, the time, how long an answer takes.
//!
//! Requests are decoded when they are polled, not when they are read: so negotiation decides about what
//! follows it however the stream was cut, and a client that does not read its replies waits by itself.

use std::collections::{BTreeSet, VecDeque};

use serde::{Deserialize, Serialize};

use crate::FdSlot;
use crate::dma::{self, DmaKind, DmaReply, DmaSendError, Matched, OwnRequests};
use crate::errno::Errno;
use crate::input::{Frame, Input};
use crate::limits;
use crate::output::{Output, PendingOutput};
use crate::reply::{self, Reply, ReplyHandle, ReplyRefused};
use crate::request::{Command, IovaRange, Refusal, Request};
use crate::request_decode::{self, Decoded, Descriptors};
use crate::uapi::{HEADER_BYTES, Header, user};
use crate::version::{self, ClientCapabilities, Negotiated, ServerOffer};

/// One connection.
#[derive(Debug, Default)]
pub struct Connection {
    pub(crate) phase: Phase,
    pub(crate) input: Input,
    pub(crate) output: Output,
    pub(crate) own: OwnRequests,
    /// What VERSION proposed, until it is answered.
    pub(crate) proposal: Option<ClientCapabilities>,
    pub(crate) negotiated: Option<Negotiated>,
    /// Requests without a reply yet, by sequence.
    pub(crate) owed: BTreeSet<u64>,
    pub(crate) next_sequence: u64,
    pub(crate) closing: VecDeque<FdSlot>,
    /// Why the connection failed, until it is told.
    pub(crate) failure: Option<FatalError>,
    pub(crate) counters: Counters,
}

/// Where a connection stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Phase {
    /// Nothing but VERSION is taken.
    #[default]
    AwaitingVersion,
    /// VERSION came and is unanswered.
    VersionProposed,
    /// Accepted.
    Ready,
    /// VERSION was refused: send what is pending, then close.
    Refused,
    /// The stream lost step: send what is pending, then close.
    Failed,
}

/// What a connection has to tell.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A request to be answered with [`Connection::reply`].
    Request(Request),
    /// The answer to one of our DMA messages.
    DmaReply(DmaReply),
    /// A request was refused here; its error reply is queued. For the log.
    Refused {
        /// The command's number.
        command: u16,
        /// What was wrong.
        refusal: Refusal,
    },
    /// Nobody wants this descriptor: close it.
    CloseDescriptor(FdSlot),
    /// The connection cannot go on. Told once.
    Failed(FatalError),
}

/// Why a connection cannot go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum FatalError {
    /// A header whose message is smaller than itself.
    #[error("message {message_id} claims {message_bytes} bytes, less than its header")]
    TooShort {
        /// The message's id.
        message_id: u16,
        /// What it claims.
        message_bytes: u32,
    },
    /// A header that announces more than is taken.
    #[error("message {message_id} claims {message_bytes} bytes, {message_bytes_max} are the most taken")]
    TooLong {
        /// The message's id.
        message_id: u16,
        /// What it claims.
        message_bytes: u32,
        /// What is taken in this phase.
        message_bytes_max: u32,
    },
    /// Our own door read on without looking at the requests.
    #[error("more was read than can be held; the requests must be polled between reads")]
    InputOverflow,
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Requests handed out.
    pub requests: u64,
    /// Requests refused here.
    pub refused: u64,
    /// Replies to nothing we asked.
    pub replies_unsolicited: u64,
    /// Replies that came after their request was given up.
    pub replies_late: u64,
    /// Descriptors that nobody wanted.
    pub descriptors_refused: u64,
}

impl Connection {
    /// A fresh connection, nothing read yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Takes what one read of the socket gave: bytes, tokens of the descriptors that came with them, and
    /// whether the kernel lost some (MSG_CTRUNC). Poll all events before the next read.
    pub fn handle_read(&mut self, bytes: &[u8], mut descriptors: Vec<FdSlot>, descriptors_lost: bool) {
        if matches!(self.phase, Phase::Failed) || bytes.is_empty() {
            self.close_all(descriptors);
            return;
        }
        if self.input.len().saturating_add(bytes.len()) > limits::INPUT_BYTES_MAX {
            self.close_all(descriptors);
            self.fail(FatalError::InputOverflow);
            return;
        }
        let excess = self.input.push(bytes, &mut descriptors, descriptors_lost);
        self.close_all(excess);
    }

    /// Worth reading the socket: there is no whole request left to poll and room for what comes.
    pub fn wants_read(&self) -> bool {
        self.can_go_on() && self.input.len() < limits::MESSAGE_BYTES_MAX as usize
    }

    /// The next request would be looked at: the client has few enough answers to come and to take.
    pub fn can_go_on(&self) -> bool {
        !self.held_back() && !matches!(self.phase, Phase::Failed | Phase::Refused)
    }

    /// The next thing to tell.
    pub fn poll_event(&mut self) -> Option<Event> {
        loop {
            if let Some(slot) = self.closing.pop_front() {
                return Some(Event::CloseDescriptor(slot));
            }
            if matches!(self.phase, Phase::Failed) {
                return self.failure.take().map(Event::Failed);
            }
            if self.held_back() {
                return None;
            }
            let header = self.input.peek_header()?;
            if let Err(error) = self.check_length(&header) {
                self.fail(error);
                continue;
            }
            let frame = self.input.pop_frame()?;
            let event = match header.flags.get() & user::VFIO_USER_TYPE_MASK {
                user::VFIO_USER_TYPE_REPLY => self.take_reply(frame),
                _ => Some(self.take_command(frame)),
            };
            if event.is_some() {
                return event;
            }
        }
    }

    /// Accepts the VERSION that `handle` names; from now on other commands are taken.
    pub fn accept_version(
        &mut self,
        handle: &ReplyHandle,
        offer: &ServerOffer,
    ) -> Result<Negotiated, ReplyRefused> {
        if handle.command != user::VFIO_USER_VERSION || self.phase != Phase::VersionProposed {
            return Err(ReplyRefused::Mismatch);
        }
        let Some(client) = self.proposal.clone() else {
            return Err(ReplyRefused::Mismatch);
        };
        self.settle(handle)?;
        let negotiated = version::negotiate(&client, offer);
        let body = version::encode_reply(&client, offer);
        self.push_reply(handle, &body, Vec::new());
        self.proposal = None;
        self.negotiated = Some(negotiated.clone());
        self.phase = Phase::Ready;
        Ok(negotiated)
    }

    /// Answers a request. An error answer to VERSION refuses the connection.
    pub fn reply(&mut self, handle: &ReplyHandle, reply: &Reply) -> Result<(), ReplyRefused> {
        if let Reply::Error(errno) = reply {
            self.settle(handle)?;
            if handle.command == user::VFIO_USER_VERSION {
                self.proposal = None;
                self.phase = Phase::Refused;
            }
            self.output
                .push(reply::error_message(handle, *errno), Vec::new(), None);
            return Ok(());
        }
        // Encoded first: a reply that does not fit leaves the request unanswered, not answered wrongly.
        let (body, descriptors) = reply::encode_body(handle, reply)?;
        self.settle(handle)?;
        self.push_reply(handle, &body, descriptors);
        Ok(())
    }

    /// Gives up a reply that would come too late (QEMU loses step over a reply after its time-out, and not
    /// over none). True if it was owed.
    pub fn forget_reply(&mut self, handle: &ReplyHandle) -> bool {
        self.owed.remove(&handle.sequence)
    }

    /// Requests that wait for their reply.
    pub fn replies_owed(&self) -> usize {
        self.owed.len()
    }

    /// Asks the client for `bytes` of guest memory at `iova`. The answer carries `cookie`.
    pub fn send_dma_read(&mut self, iova: u64, bytes: u32, cookie: u64) -> Result<(), DmaSendError> {
        self.send_dma(DmaKind::Read, iova, u64::from(bytes), &[], cookie)
    }

    /// Asks the client to write `data` to guest memory at `iova`. The answer carries `cookie`.
    pub fn send_dma_write(&mut self, iova: u64, data: &[u8], cookie: u64) -> Result<(), DmaSendError> {
        self.send_dma(DmaKind::Write, iova, data.len() as u64, data, cookie)
    }

    /// Takes back DMA messages of which no byte is sent; their cookies. For a fence.
    pub fn drop_unsent_dma(&mut self) -> Vec<u64> {
        let ids = self.output.remove_unsent_dma();
        self.own.cancel(&ids)
    }

    /// Gives up DMA messages under way whose cookie `given_up` names: their answers are dropped and counted,
    /// and they count as outstanding until those come. How many it were.
    pub fn abandon_dma(&mut self, given_up: impl Fn(u64) -> bool) -> usize {
        self.own.abandon(given_up)
    }

    /// Gives up the DMA_READs under way, as [`Connection::abandon_dma`] does; their cookies.
    pub fn abandon_dma_reads(&mut self) -> Vec<u64> {
        self.own.abandon_reads()
    }

    /// DMA messages without an answer, those given up included.
    pub fn dma_outstanding(&self) -> usize {
        self.own.outstanding.len()
    }

    /// What to send next: one message, or the rest of one.
    pub fn pending_output(&self) -> Option<PendingOutput<'_>> {
        self.output.front()
    }

    /// So many bytes of it were sent.
    pub fn advance_output(&mut self, bytes: usize) {
        self.output.advance(bytes);
    }

    /// Bytes waiting to be sent.
    pub fn output_bytes(&self) -> usize {
        self.output.len()
    }

    /// Where the connection stands.
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// True once all is said on a connection that was refused or failed.
    pub fn should_close(&self) -> bool {
        matches!(self.phase, Phase::Refused | Phase::Failed) && self.output.len() == 0
    }

    /// What was agreed, once VERSION is accepted.
    pub fn negotiated(&self) -> Option<&Negotiated> {
        self.negotiated.as_ref()
    }

    /// What happened so far.
    pub fn counters(&self) -> Counters {
        self.counters
    }

    /// The descriptors still held here, for closing when the socket is closed.
    pub fn take_descriptors(&mut self) -> Vec<FdSlot> {
        let mut slots: Vec<FdSlot> = self.closing.drain(..).collect();
        slots.extend(self.input.take_descriptors());
        slots
    }

    /// A client that does not take its answers gets no further ones.
    fn held_back(&self) -> bool {
        self.output.len() > limits::OUTPUT_BYTES_HIGH || self.owed.len() >= limits::REPLIES_OWED_MAX
    }

    fn check_length(&self, header: &Header) -> Result<(), FatalError> {
        let message_id = header.message_id.get();
        let message_bytes = header.message_bytes.get();
        let message_bytes_max = match self.phase {
            Phase::Ready => limits::MESSAGE_BYTES_MAX,
            _ => limits::MESSAGE_BYTES_MAX_BEFORE_VERSION,
        };
        if message_bytes < HEADER_BYTES as u32 {
            return Err(FatalError::TooShort {
                message_id,
                message_bytes,
            });
        }
        if message_bytes > message_bytes_max {
            return Err(FatalError::TooLong {
                message_id,
                message_bytes,
                message_bytes_max,
            });
        }
        Ok(())
    }

    fn take_reply(&mut self, frame: Frame) -> Option<Event> {
        self.close_all(frame.descriptors.slots);
        match self.own.complete(&frame.header, &frame.body) {
            Matched::Answer(reply) => Some(Event::DmaReply(reply)),
            Matched::Late => {
                self.counters.replies_late = self.counters.replies_late.saturating_add(1);
                None
            }
            Matched::Unsolicited => {
                self.counters.replies_unsolicited = self.counters.replies_unsolicited.saturating_add(1);
                None
            }
        }
    }

    fn take_command(&mut self, frame: Frame) -> Event {
        let Frame {
            header,
            body,
            mut descriptors,
        } = frame;
        let command = header.command.get();
        let mut handle = ReplyHandle {
            sequence: self.next_sequence,
            message_id: header.message_id.get(),
            command,
            no_reply: header.flags.get() & user::VFIO_USER_NO_REPLY != 0,
            reply_bytes_max: u32::MAX,
        };
        self.next_sequence = self.next_sequence.wrapping_add(1);
        let decoded = self.decode(&header, &body, &mut descriptors, handle.no_reply);
        // What the command did not take is nobody's.
        self.close_all(descriptors.slots);
        match decoded {
            Ok(Decoded {
                command,
                reply_bytes_max,
            }) => {
                handle.reply_bytes_max = reply_bytes_max;
                if !handle.no_reply {
                    self.owed.insert(handle.sequence);
                }
                self.counters.requests = self.counters.requests.saturating_add(1);
                Event::Request(Request { handle, command })
            }
            Err(refusal) => {
                self.counters.refused = self.counters.refused.saturating_add(1);
                if !handle.no_reply {
                    let errno: Errno = refusal.errno();
                    self.output
                        .push(reply::error_message(&handle, errno), Vec::new(), None);
                }
                Event::Refused { command, refusal }
            }
        }
    }

    fn decode(
        &mut self,
        header: &Header,
        body: &[u8],
        descriptors: &mut Descriptors,
        no_reply: bool,
    ) -> Result<Decoded, Refusal> {
        let flags = header.flags.get();
        let command = header.command.get();
        let kind = flags & user::VFIO_USER_TYPE_MASK;
        if kind != user::VFIO_USER_TYPE_COMMAND {
            return Err(Refusal::MessageType(kind));
        }
        if flags & !user::VFIO_USER_NO_REPLY != 0 || header.error.get() != 0 {
            return Err(Refusal::HeaderReserved);
        }
        if command == user::VFIO_USER_VERSION {
            return self.decode_version(body, descriptors, no_reply);
        }
        if self.phase != Phase::Ready {
            return Err(Refusal::BeforeVersion(command));
        }
        let most = limits::MESSAGE_DESCRIPTORS_MAX as usize;
        if descriptors.slots.len() > most {
            return Err(Refusal::Descriptors {
                actual: descriptors.slots.len(),
                expected: most,
            });
        }
        let write_multiple = self
            .negotiated
            .as_ref()
            .is_some_and(|agreed| agreed.write_multiple);
        request_decode::decode(command, body, descriptors, write_multiple)
    }

    fn decode_version(
        &mut self,
        body: &[u8],
        descriptors: &Descriptors,
        no_reply: bool,
    ) -> Result<Decoded, Refusal> {
        if self.phase != Phase::AwaitingVersion {
            return Err(Refusal::VersionAgain);
        }
        let decoded = if no_reply {
            Err(Refusal::VersionPosted)
        } else if !descriptors.slots.is_empty() {
            Err(Refusal::Descriptors {
                actual: descriptors.slots.len(),
                expected: 0,
            })
        } else {
            version::decode_proposal(body)
        };
        match decoded {
            Ok(proposal) => {
                self.phase = Phase::VersionProposed;
                self.proposal = Some(proposal.capabilities.clone());
                Ok(Decoded {
                    command: Command::Version(proposal),
                    reply_bytes_max: u32::MAX,
                })
            }
            Err(refusal) => {
                self.phase = Phase::Refused;
                Err(refusal)
            }
        }
    }

    fn settle(&mut self, handle: &ReplyHandle) -> Result<(), ReplyRefused> {
        if handle.no_reply {
            return Err(ReplyRefused::NotWanted);
        }
        if self.owed.remove(&handle.sequence) {
            Ok(())
        } else {
            Err(ReplyRefused::NotOwed)
        }
    }

    fn push_reply(&mut self, handle: &ReplyHandle, body: &[u8], descriptors: Vec<FdSlot>) {
        let flags = user::VFIO_USER_TYPE_REPLY;
        self.output.push(
            reply::message(handle.message_id, handle.command, flags, 0, body),
            descriptors,
            None,
        );
    }

    fn send_dma(
        &mut self,
        kind: DmaKind,
        iova: u64,
        bytes: u64,
        data: &[u8],
        cookie: u64,
    ) -> Result<(), DmaSendError> {
        let agreed = match (&self.negotiated, self.phase) {
            (Some(agreed), Phase::Ready) => agreed,
            _ => return Err(DmaSendError::NotNegotiated),
        };
        let bytes_max = agreed.dma_message_bytes_max;
        if bytes > u64::from(bytes_max) {
            return Err(DmaSendError::TooLong { bytes, bytes_max });
        }
        let range = IovaRange::new(iova, bytes).ok_or(DmaSendError::Range { iova })?;
        let id = self.own.begin(kind, range, cookie)?;
        let body = dma::encode_body(range, data);
        let message = reply::message(id, dma::command_of(kind), user::VFIO_USER_TYPE_COMMAND, 0, &body);
        self.output.push(message, Vec::new(), Some(id));
        Ok(())
    }

    fn fail(&mut self, error: FatalError) {
        self.phase = Phase::Failed;
        self.failure = Some(error);
        let held = self.input.take_descriptors();
        self.close_all(held);
    }

    fn close_all(&mut self, slots: Vec<FdSlot>) {
        self.counters.descriptors_refused = self
            .counters
            .descriptors_refused
            .saturating_add(slots.len() as u64);
        self.closing.extend(slots);
    }
}
