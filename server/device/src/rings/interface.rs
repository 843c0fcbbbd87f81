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

/// What the shell tells the rings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Input {
    /// The front touched this session: all of its page is looked at again (set-ups, doorbells, port window, host page,
    /// generation, interrupts). Also the first input after [`super::Rings::attach`].
    Touched,
    /// Fetch at most `budget` submissions over all open rings in turn, and go on with what waited for memory.
    Poll { budget: u32 },
    /// The hub's answer to a submission: `payload` goes to the start of its data area, then the completion is published. With `confirm`
    /// an [`Output::Published`] follows. An answer to a stale token is dropped and counted.
    Complete {
        token: Token,
        answer: Answer,
        payload: Vec<u8>,
        confirm: bool,
    },
    /// What the host's page is to say from now on.
    HostPage(HostFacts),
    /// The turn is over: completions published in it are signalled now, once per ring. The shell ends each batch of inputs with
    /// it. Whatever [`Output::Published`] or [`Output::Reset`] was polled before it has been handled (and journaled) by the hub.
    TurnEnd,
    /// The session has ended, and every answer about its memory has come: what its guest had got by then is told. The last input.
    End,
}

/// What one call achieved and what it waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Turn {
    /// Submissions fetched.
    pub fetched: u32,
    /// Completions published.
    pub completed: u32,
    /// There is more to fetch now: poll again.
    pub more: bool,
    /// Something waits for memory that is reached by messages: poll (and end the turn) again when an answer of the front came.
    pub waiting: bool,
}

impl Turn {
    /// Whether anything was done, so that polling goes on for a while.
    #[must_use]
    pub const fn progressed(&self) -> bool {
        self.fetched > 0 || self.completed > 0
    }
}

/// What the host tells a VM through its page.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct HostFacts {
    pub throttled_ns: u64,
    /// Thousandths of a CPU; 0: nothing said.
    pub granted_cpu_milli: u64,
    /// 0: nothing said.
    pub granted_memory_bytes: u64,
}

/// What the rings of a session are told once.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// Session number, stamped into every token.
    pub session: u64,
    /// Modes that this core offers.
    pub modes: Modes,
}

/// Modes that are offered; a known mode that is not is refused as NOT_SUPPORTED, an unknown one as BAD_ARGUMENT.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Modes {
    pub file: bool,
    pub chat: bool,
    pub statistics: bool,
    pub calculation: bool,
}

impl Default for Modes {
    fn default() -> Self {
        Self {
            file: true,
            chat: true,
            statistics: false,
            calculation: false,
        }
    }
}

impl Modes {
    /// OK when `mode` may be opened, else why not.
    #[must_use]
    pub const fn judge(self, mode: Mode) -> Status {
        let offered = match mode {
            Mode::COMMON => true,
            Mode::FILE => self.file,
            Mode::CHAT => self.chat,
            Mode::STATISTICS => self.statistics,
            Mode::CALCULATION => self.calculation,
            _ => return Status::BAD_ARGUMENT,
        };
        if offered {
            Status::OK
        } else {
            Status::NOT_SUPPORTED
        }
    }
}

/// Where the data area of a submission in flight is (offset 0 is the first byte behind its meta).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Buffer<'a> {
    /// In guest memory: `bytes` is the sum of the segments.
    Guest { segments: &'a [Segment], bytes: u64 },
    /// In the port window: what its user wrote; output goes through [`super::Rings::port_write`], at most `room` bytes.
    Port { input: &'a [u8], room: u64 },
}

/// Counted since the session began (of this core life, or of all with [`super::Rings::restore`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Counters {
    /// Submissions fetched, of rings and port window.
    pub submissions: u64,
    pub completions: u64,
    /// Submissions whose form was refused by the rings themselves.
    pub refused: u64,
    /// Answers that came for a stale token.
    pub stale_answers: u64,
    /// Completions whose payload or buffer could not be reached.
    pub bad_addresses: u64,
    /// Interrupts raised.
    pub signals: u64,
    /// Batches whose interrupt the guest's event word spared.
    pub signals_spared: u64,
    /// Submissions given to the hub again after the death of a core life.
    pub again: u64,
    /// Times the device was put into FAILED.
    pub failures: u64,
    /// The host's page could not be written.
    pub host_page_errors: u64,
}

/// What a planned handoff carries beside the in-flight table (which is itself the saved state of everything in flight).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Saved {
    /// Of this record.
    pub version: u32,
    pub counters: Counters,
    pub host_facts: HostFacts,
}

/// Why the rings could not be attached to a session's state.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum AttachError {
    #[error("the state memory has {words} words, {needed} are needed")]
    TooSmall { words: usize, needed: usize },
    #[error("the in-flight table has layout {found:#x}, this version reads {known:#x}")]
    Layout { found: u64, known: u64 },
    #[error("the in-flight table uses {0:?}, which this program does not know: upgrade to one that does")]
    Feature(String),
    #[error("ring {ring} of the in-flight table holds a record that this version does not write")]
    Record { ring: usize },
    #[error("saved rings have version {found}, this version reads {known}")]
    Saved { found: u32, known: u32 },
}
