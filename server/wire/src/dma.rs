//! Our own requests: guest memory by messages, where it is not shared.
//!
//! In: what to read or write, and the client's replies. Out: messages, and answers matched by our own
//! message ids. Must never know: who asked (a cookie stands for it), and time.
//! Specification: sections "VFIO_USER_DMA_READ" and "VFIO_USER_DMA_WRITE".

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use zerocopy::{FromBytes, IntoBytes};

use crate::errno::Errno;
use crate::limits;
use crate::request::IovaRange;
use crate::uapi::{DmaAccessHead, Header, user};

/// The answer to one of our DMA messages.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DmaReply {
    /// What the sender gave with the request.
    pub cookie: u64,
    /// Which addresses it was about.
    pub range: IovaRange,
    /// What came of it.
    pub result: Result<DmaAnswer, DmaFailure>,
}

/// A DMA message that was served.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DmaAnswer {
    /// The bytes of the range, all of them.
    Read(Vec<u8>),
    /// All bytes were written.
    Written,
}

/// A DMA message that was not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaFailure {
    /// The client's error. QEMU: ENODEV while bus mastering is off, EFAULT where nothing is mapped.
    #[error("the client answered {0}")]
    Refused(Errno),
    /// The reply is not about what was asked.
    #[error("the client's reply does not fit the request")]
    Malformed,
}

/// Why a DMA message was not queued.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DmaSendError {
    /// VERSION is not accepted yet, or the connection has ended.
    #[error("the connection is not negotiated")]
    NotNegotiated,
    /// `limits::DMA_OUTSTANDING_MAX` are on their way; wait for an answer.
    #[error("too many DMA messages are unanswered")]
    TooManyOutstanding,
    /// Longer than `Negotiated::dma_message_bytes_max`.
    #[error("{bytes} bytes are more than the {bytes_max} that one DMA message may carry")]
    TooLong {
        /// What was asked.
        bytes: u64,
        /// What is allowed.
        bytes_max: u32,
    },
    /// No bytes, or past the end of the address space.
    #[error("DMA range at {iova:#x} is empty or wraps")]
    Range {
        /// First address.
        iova: u64,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum DmaKind {
    Read,
    Write,
}

/// A request of ours without an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outstanding {
    pub kind: DmaKind,
    pub range: IovaRange,
    /// `None`: given up; its answer is dropped when it comes, and until then its id is not used again.
    pub cookie: Option<u64>,
}

/// What became of a reply.
pub(crate) enum Matched {
    Answer(DmaReply),
    /// Nobody waits for it any more.
    Late,
    /// Nobody ever asked.
    Unsolicited,
}

#[derive(Debug, Default)]
pub(crate) struct OwnRequests {
    pub(crate) outstanding: BTreeMap<u16, Outstanding>,
    pub(crate) next_id: u16,
}

impl OwnRequests {
    /// Registers a request; its id.
    pub fn begin(&mut self, kind: DmaKind, range: IovaRange, cookie: u64) -> Result<u16, DmaSendError> {
        if self.outstanding.len() >= limits::DMA_OUTSTANDING_MAX {
            return Err(DmaSendError::TooManyOutstanding);
        }
        // Ends: fewer ids are in use than exist.
        while self.outstanding.contains_key(&self.next_id) {
            self.next_id = self.next_id.wrapping_add(1);
        }
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.outstanding.insert(
            id,
            Outstanding {
                kind,
                range,
                cookie: Some(cookie),
            },
        );
        Ok(id)
    }

    /// Forgets requests that never left; their cookies.
    pub fn cancel(&mut self, ids: &[u16]) -> Vec<u64> {
        ids.iter()
            .filter_map(|id| self.outstanding.remove(id)?.cookie)
            .collect()
    }

    /// Gives up the requests whose cookie the predicate names.
    pub fn abandon(&mut self, given_up: impl Fn(u64) -> bool) -> usize {
        let mut count = 0;
        for outstanding in self.outstanding.values_mut() {
            if outstanding.cookie.is_some_and(&given_up) {
                outstanding.cookie = None;
                count += 1;
            }
        }
        count
    }

    /// Gives up the reads; their cookies.
    pub fn abandon_reads(&mut self) -> Vec<u64> {
        let reads = self
            .outstanding
            .values_mut()
            .filter(|one| one.kind == DmaKind::Read);
        reads.filter_map(|read| read.cookie.take()).collect()
    }

    /// Matches a reply by id and checks that it is about what was asked.
    pub fn complete(&mut self, header: &Header, body: &[u8]) -> Matched {
        let Some(outstanding) = self.outstanding.remove(&header.message_id.get()) else {
            return Matched::Unsolicited;
        };
        let Outstanding { kind, range, cookie } = outstanding;
        let Some(cookie) = cookie else {
            return Matched::Late;
        };
        let result = if header.command.get() != command_of(kind) {
            Err(DmaFailure::Malformed)
        } else if header.flags.get() & user::VFIO_USER_ERROR != 0 {
            // "It may be zero even if the Error bit is set."
            let errno = if header.error.get() == 0 {
                Errno::EIO
            } else {
                Errno(header.error.get())
            };
            Err(DmaFailure::Refused(errno))
        } else {
            match kind {
                DmaKind::Read => read_answer(range, body),
                DmaKind::Write => write_answer(range, body),
            }
        };
        Matched::Answer(DmaReply {
            cookie,
            range,
            result,
        })
    }
}

pub(crate) fn command_of(kind: DmaKind) -> u16 {
    match kind {
        DmaKind::Read => user::VFIO_USER_DMA_READ,
        DmaKind::Write => user::VFIO_USER_DMA_WRITE,
    }
}

/// The body of a request; `data` is empty for a read.
pub(crate) fn encode_body(range: IovaRange, data: &[u8]) -> Vec<u8> {
    let head = DmaAccessHead {
        iova: range.start().into(),
        count: range.bytes().into(),
    };
    let mut body = Vec::with_capacity(size_of::<DmaAccessHead>() + data.len());
    body.extend_from_slice(head.as_bytes());
    body.extend_from_slice(data);
    body
}

fn read_answer(range: IovaRange, body: &[u8]) -> Result<DmaAnswer, DmaFailure> {
    let (head, data) = DmaAccessHead::read_from_prefix(body).map_err(|_| DmaFailure::Malformed)?;
    let fits = head.iova.get() == range.start() && head.count.get() == range.bytes();
    if !fits || data.len() as u64 != range.bytes() {
        return Err(DmaFailure::Malformed);
    }
    Ok(DmaAnswer::Read(data.to_vec()))
}

/// The specification has a 32-bit count here, QEMU and libvfio-user a 64-bit one: both are taken.
fn write_answer(range: IovaRange, body: &[u8]) -> Result<DmaAnswer, DmaFailure> {
    let mut iova = [0; 8];
    let mut count = [0; 8];
    let (iova_bytes, count_bytes) = body.split_at_checked(8).ok_or(DmaFailure::Malformed)?;
    if !matches!(count_bytes.len(), 4 | 8) {
        return Err(DmaFailure::Malformed);
    }
    iova.copy_from_slice(iova_bytes);
    for (target, source) in count.iter_mut().zip(count_bytes) {
        *target = *source;
    }
    if u64::from_le_bytes(iova) != range.start() || u64::from_le_bytes(count) != range.bytes() {
        return Err(DmaFailure::Malformed);
    }
    Ok(DmaAnswer::Written)
}
