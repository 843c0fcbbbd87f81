//! What goes in and out of the rings: tokens, fetched submissions, answers.

use crate::Tick;
use serde::{Deserialize, Serialize};
use vmgmt_abi::{Budget, Mode, Opcode, Status};

/// Where a submission came in.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, Serialize, Deserialize)]
pub enum Channel {
    /// Ring pair of this number.
    Ring(u8),
    /// The port window.
    Port,
}

/// One submission in flight, from fetch to published completion. Tokens of a session that was reset, of a ring that was
/// closed or of a completed submission are stale and harmless: an answer to one is dropped and counted.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash, Serialize, Deserialize)]
pub struct Token {
    /// Session number.
    pub session: u64,
    pub channel: Channel,
    /// Place in the channel's table of submissions in flight.
    pub index: u32,
    /// Tells users of the same place apart.
    pub generation: u32,
}

/// A piece of a guest's buffer, as bounded and checked against overflow (not against the map table, which may change).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Segment {
    pub iova: u64,
    /// Not 0.
    pub bytes: u64,
}

/// A submission, fetched once, whose form is valid: opcode known and of this channel's mode, flags known, lengths in bounds,
/// the buffer's pieces read and bounded. What the operation makes of handle, offset and argument is the mode's business.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fetched {
    pub token: Token,
    pub mode: Mode,
    pub opcode: Opcode,
    /// [`vmgmt_abi::ring::flag`] bits.
    pub flags: u16,
    /// The guest's own tag, for CANCEL and for logs.
    pub tag: u32,
    pub handle: u64,
    pub offset: u64,
    pub argument: u64,
    /// [`Tick::NEVER`] where there is none.
    pub deadline: Tick,
    /// The input at the buffer's start: a path, a name.
    pub meta: Vec<u8>,
    /// Bytes of the data area (the buffer behind meta).
    pub data_bytes: u64,
    /// The data itself, for operations whose data is input and small: SEND and PUBLISH up to 4 KiB, and everything that
    /// came by the port window.
    pub data: Option<Vec<u8>>,
    /// Fetched again after the death of a core life that had fetched it before, with this answer unknown.
    pub again: bool,
}

/// How a submission ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Answer {
    pub status: u16,
    /// [`vmgmt_abi::ring::completion_flag`] bits but PHASE.
    pub flags: u16,
    pub detail: u32,
    pub result: u64,
    pub extra: u64,
}

impl Answer {
    /// Done, with a result.
    #[must_use]
    pub const fn ok(result: u64) -> Self {
        Self {
            status: Status::OK.0,
            flags: 0,
            detail: 0,
            result,
            extra: 0,
        }
    }
    /// Done, with a result and a second answer.
    #[must_use]
    pub const fn ok_extra(result: u64, extra: u64) -> Self {
        Self {
            status: Status::OK.0,
            flags: 0,
            detail: 0,
            result,
            extra,
        }
    }
    /// Failed.
    #[must_use]
    pub const fn failed(status: Status) -> Self {
        Self {
            status: status.0,
            flags: 0,
            detail: 0,
            result: 0,
            extra: 0,
        }
    }
    /// Refused because of a budget.
    #[must_use]
    pub const fn over_budget(budget: Budget) -> Self {
        Self {
            status: Status::OVER_BUDGET.0,
            flags: 0,
            detail: budget.0,
            result: 0,
            extra: 0,
        }
    }
}

/// What the port window's user wrote behind its submission, and room for the output.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct PortInput {
    /// Data area's input.
    pub data: Vec<u8>,
    /// Output so far, at most [`vmgmt_abi::port::OUTPUT_BYTES_MAX`].
    pub output: Vec<u8>,
}

/// What comes out of the rings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Output {
    /// A submission for the hub. (NOOP, ECHO, PROVE and CANCEL of what is here never leave the rings.)
    Submission(Box<Fetched>),
    /// The hub is to end this submission as CANCELLED (its guest said so, with CANCEL): the hub answers it as ever, whatever comes first.
    Cancel(Token),
    /// The submission is void (its ring was closed, the device reset): the hub forgets it, no answer is wanted.
    Void(Token),
    /// All submissions of this channel are void and what the hub keeps for the channel is to go.
    ChannelClosed { session: u64, channel: Channel },
    /// The device was reset: all channels are closed, handles of this session are to be let go.
    Reset { session: u64 },
    /// The completion of a submission whose answer asked for it: `published` tells whether the guest can see it, payload
    /// and all. If not (its buffer is not mapped any more), the guest got BAD_ADDRESS or nothing.
    Published { token: Token, published: bool },
    /// Signal the eventfd of this MSI vector.
    Signal { vector: u8 },
    /// The front is to look at this session (INTx is due, or the device's state changed).
    Kick,
}
