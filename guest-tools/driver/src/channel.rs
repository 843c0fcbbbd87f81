//! What a ring and the port window have in common: submissions go in, completions come out.
//!
//! Comes in: [`Request`]s. Goes out: [`Finished`] ones with their buffers. The typed operations know only this trait, so every
//! mode works over both.

use std::time::{Duration, Instant};

use vmgmt_abi::ring::{META_BYTES_MAX, completion_flag};
use vmgmt_abi::{Completion, Mode, Opcode, Status};

use crate::error::{DriverError, Refusal, Result};
use crate::memory::Buffer;
pub use crate::tags::Tag;

/// A stretch of a buffer that a submission names.
#[derive(Clone, Debug)]
pub struct Span {
    pub memory: Buffer,
    /// First byte.
    pub start: usize,
    /// Bytes.
    pub length: usize,
}

/// One submission, in terms of this program.
#[derive(Clone, Debug)]
pub struct Request {
    pub opcode: Opcode,
    /// CHECK and DURABLE of `vmgmt_abi::ring::flag`; LIST is the channel's business.
    pub flags: u16,
    pub handle: u64,
    pub offset: u64,
    pub argument: u64,
    /// Time after which the device ends it; none: never.
    pub deadline: Option<Duration>,
    /// The buffer: `meta_bytes` of input, then data.
    pub span: Option<Span>,
    /// Bytes of input at the span's start.
    pub meta_bytes: usize,
    /// Whether the data behind them is input too (else it is room for output).
    pub data_is_input: bool,
    /// Longest piece of a list in bytes, to try lists where memory is in one piece; 0: as it is.
    pub piece_bytes_max: u64,
}

impl Request {
    /// A submission without a buffer.
    #[must_use]
    pub const fn new(opcode: Opcode) -> Self {
        Self {
            opcode,
            flags: 0,
            handle: 0,
            offset: 0,
            argument: 0,
            deadline: None,
            span: None,
            meta_bytes: 0,
            data_is_input: false,
            piece_bytes_max: 0,
        }
    }

    /// With a handle.
    #[must_use]
    pub const fn handle(mut self, handle: u64) -> Self {
        self.handle = handle;
        self
    }

    /// With an offset.
    #[must_use]
    pub const fn offset(mut self, offset: u64) -> Self {
        self.offset = offset;
        self
    }

    /// With an argument.
    #[must_use]
    pub const fn argument(mut self, argument: u64) -> Self {
        self.argument = argument;
        self
    }

    /// With flags.
    #[must_use]
    pub const fn flags(mut self, flags: u16) -> Self {
        self.flags = flags;
        self
    }

    /// With a deadline.
    #[must_use]
    pub const fn deadline(mut self, deadline: Option<Duration>) -> Self {
        self.deadline = deadline;
        self
    }

    /// With a buffer whose data is input for the device.
    #[must_use]
    pub fn input(mut self, memory: &Buffer, start: usize, length: usize, meta_bytes: usize) -> Self {
        self.span = Some(Span {
            memory: Buffer::clone(memory),
            start,
            length,
        });
        self.meta_bytes = meta_bytes;
        self.data_is_input = true;
        self
    }

    /// With a buffer whose data is room for the device's output.
    #[must_use]
    pub fn output(mut self, memory: &Buffer, start: usize, length: usize, meta_bytes: usize) -> Self {
        self = self.input(memory, start, length, meta_bytes);
        self.data_is_input = false;
        self
    }

    /// Bytes of room for output.
    #[must_use]
    pub fn output_bytes(&self) -> usize {
        match &self.span {
            Some(span) if !self.data_is_input => span.length.saturating_sub(self.meta_bytes),
            _ => 0,
        }
    }

    pub(crate) fn check(&self) -> Result<()> {
        if let Some(span) = &self.span {
            let inside = span
                .start
                .checked_add(span.length)
                .is_some_and(|end| end <= span.memory.len());
            if !inside {
                let memory_bytes = span.memory.len();
                return Err(DriverError::Bounds {
                    start: span.start,
                    length: span.length,
                    memory_bytes,
                });
            }
        }
        let length = self.span.as_ref().map_or(0, |span| span.length);
        if self.meta_bytes > length || self.meta_bytes > META_BYTES_MAX as usize {
            return Err(DriverError::BadArgument(format!(
                "{} bytes of names are too many",
                self.meta_bytes
            )));
        }
        Ok(())
    }

    /// Nanoseconds for the submission.
    pub(crate) fn deadline_ns(&self) -> u64 {
        self.deadline.map_or(0, |deadline| {
            u64::try_from(deadline.as_nanos()).unwrap_or(u64::MAX).max(1)
        })
    }
}

/// A submission that is over.
#[derive(Debug)]
pub struct Finished {
    pub tag: Tag,
    pub opcode: Opcode,
    pub status: Status,
    pub result: u64,
    pub extra: u64,
    pub detail: u32,
    /// `vmgmt_abi::ring::completion_flag` bits.
    pub flags: u16,
    /// The buffer it named.
    pub span: Option<Span>,
    /// Where the data begins in the span.
    pub meta_bytes: usize,
    /// Most bytes that can have come out.
    pub output_bytes: usize,
}

impl Finished {
    pub(crate) fn new(tag: Tag, request: Request, completion: &Completion) -> Self {
        Self {
            tag,
            opcode: request.opcode,
            status: Status(completion.status),
            result: completion.result,
            extra: completion.extra,
            detail: completion.detail,
            flags: completion.flags & !completion_flag::PHASE,
            output_bytes: request.output_bytes(),
            meta_bytes: request.meta_bytes,
            span: request.span,
        }
    }

    /// Itself when OK, else the refusal.
    ///
    /// # Errors
    /// `Refused` with status and budget.
    pub fn ok(self) -> Result<Self> {
        if self.status == Status::OK {
            return Ok(self);
        }
        Err(DriverError::Refused(Refusal {
            opcode: self.opcode,
            status: self.status,
            detail: self.detail,
        }))
    }

    /// Whether there is more.
    #[must_use]
    pub const fn more(&self) -> bool {
        self.flags & completion_flag::MORE != 0
    }

    /// Whether the stream has ended.
    #[must_use]
    pub const fn end(&self) -> bool {
        self.flags & completion_flag::END != 0
    }

    /// `result` as a number of bytes, which cannot be more than there was room for.
    ///
    /// # Errors
    /// The device says more.
    pub fn result_bytes(&self, most: usize) -> Result<usize> {
        usize::try_from(self.result)
            .ok()
            .filter(|bytes| *bytes <= most)
            .ok_or_else(|| {
                DriverError::contract(format!(
                    "{:?} gave {} bytes where there is room for {most}",
                    self.opcode, self.result
                ))
            })
    }

    /// A copy of `bytes` bytes of the data area.
    ///
    /// # Errors
    /// There are not so many.
    pub fn data(&self, bytes: usize) -> Result<Vec<u8>> {
        match &self.span {
            Some(span) if bytes <= self.output_bytes => {
                span.memory.to_vec(span.start + self.meta_bytes, bytes)
            }
            _ if bytes == 0 => Ok(Vec::new()),
            _ => Err(DriverError::contract(format!(
                "{:?} gave {bytes} bytes where there is no room",
                self.opcode
            ))),
        }
    }
}

/// What a channel did since it was opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counters {
    pub submissions: u64,
    pub doorbells: u64,
    /// Waits that went to sleep.
    pub sleeps: u64,
    /// Sleeps that an interrupt ended.
    pub interrupts: u64,
    /// Answers that a sleeper found because it looked by itself ([`crate::limits::HEALTH_INTERVAL`]) although there are interrupts. A look may
    /// fall between an answer and its interrupt; more than a few say that interrupts are lost.
    pub unannounced: u64,
    /// Doorbells that were rung once more because the device had left a submission where it was from one look at its health to the next. It may have
    /// been frozen meanwhile; else a doorbell got lost.
    pub doorbells_again: u64,
}

/// A ring or the port window, opened in one mode.
pub trait Channel: Send {
    /// The mode.
    fn mode(&self) -> Mode;

    /// Most bytes of data of one submission.
    fn data_bytes_max(&self) -> usize;

    /// What was done since it was opened.
    fn counters(&self) -> Counters {
        Counters::default()
    }

    /// Whether the host reaches this program's memory directly.
    fn is_shared(&self) -> bool {
        false
    }

    /// Most submissions in flight.
    fn depth(&self) -> usize;

    /// Submissions in flight.
    fn in_flight(&self) -> usize;

    /// Memory for buffers.
    ///
    /// # Errors
    /// There is none.
    fn allocate(&self, bytes: usize) -> Result<Buffer>;

    /// Hands a submission to the device. Never waits.
    ///
    /// # Errors
    /// `Full`, a bad request, or a dead channel.
    fn submit(&mut self, request: Request) -> Result<Tag>;

    /// Takes one completion, if there is one. Never waits.
    ///
    /// # Errors
    /// A dead channel, or a device that breaks the contract.
    fn reap(&mut self) -> Result<Option<Finished>>;

    /// Waits until `reap` is worth calling; false when the deadline passed.
    ///
    /// # Errors
    /// As `reap`, and `Interrupted`.
    fn wait(&mut self, deadline: Option<Instant>) -> Result<bool>;

    /// Asks the device to cancel; the completion comes all the same.
    ///
    /// # Errors
    /// As `submit`.
    fn cancel(&mut self, tag: Tag) -> Result<()>;

    /// Opens the same channel anew after the device was reset or replaced. What was in flight is forgotten.
    ///
    /// # Errors
    /// The device does not come back.
    fn reopen(&mut self) -> Result<()>;

    /// Completions that were published before [`Self::reopen`] and not reaped, in their order: for a caller to whom they matter.
    fn late(&mut self) -> Vec<Finished> {
        Vec::new()
    }

    /// Waits until `descriptor` is readable or somebody cancels. For reading the program's own input.
    ///
    /// # Errors
    /// `Interrupted`.
    fn wait_readable(&self, descriptor: std::os::fd::BorrowedFd<'_>) -> Result<()>;
}
