//! WORKSHOPS: the modes. Each takes submissions of its operations and the outcomes of its effects; what they share is the office.

pub mod answers;
pub mod calc;
pub mod chat;
pub mod commit;
pub mod coverage;
pub mod delivery;
pub mod file;
pub mod hosted;
pub mod listing;
pub mod mailbox;
pub mod namely;
pub mod names;
pub mod offers;
pub mod pieces;
pub mod puts;
pub mod stats;
pub mod streaming;
pub mod streams;

use crate::refusal::Refusal;
use vmgmt_device::rings::{Answer, Fetched};

/// What became of a submission at once.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// It is open; its answer comes later.
    Open,
    /// It is answered.
    Done(Answer),
    /// It is answered with data.
    Data(Answer, Vec<u8>),
}

/// Of a mode's operations.
pub type Submitted = Result<Verdict, Refusal>;

/// Fields of a submission that an operation uses; the others must be 0.
#[derive(Clone, Copy, Default)]
pub struct Uses {
    pub handle: bool,
    pub offset: bool,
    pub argument: bool,
    pub meta: bool,
    /// `ring::flag` bits besides LIST.
    pub flags: u16,
}

impl Uses {
    /// Checks that nothing else is set.
    ///
    /// # Errors
    /// [`Refusal::Field`].
    pub fn check(self, fetched: &Fetched) -> Result<(), Refusal> {
        let unused = (!self.handle && fetched.handle != 0)
            || (!self.offset && fetched.offset != 0)
            || (!self.argument && fetched.argument != 0)
            || (!self.meta && !fetched.meta.is_empty())
            || fetched.flags & !(self.flags | vmgmt_abi::ring::flag::LIST) != 0;
        if unused { Err(Refusal::Field) } else { Ok(()) }
    }
}

/// Pads a record to a multiple of 8.
pub fn pad_to_word(bytes: &mut Vec<u8>) {
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}
