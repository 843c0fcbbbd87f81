//! Guest memory by messages, for one session: what the core asked for, as it goes to the client.
//!
//! In: the core's requests. Out: DMA_READ and DMA_WRITE of the connection, at most four outstanding; answers. Must never know: guest
//! memory, why the core asks.

use super::limits::MESSAGE_DMA_WAITING_MAX;
use std::collections::{BTreeMap, VecDeque};
use vmgmt_wire::{Connection, DmaAnswer, DmaFailure, DmaReply, DmaSendError, Errno};

/// What the core asked for.
#[derive(Debug)]
pub enum Ask {
    Read { iova: u64, bytes: u32 },
    Write { iova: u64, data: Vec<u8> },
}

/// An answer for the core: its life and request, what was read, and an errno (0: done).
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    pub life: u64,
    pub request: u64,
    pub data: Vec<u8>,
    pub error: Errno,
}

/// The requests of one session.
#[derive(Debug, Default)]
pub struct MessageDma {
    pub(super) waiting: VecDeque<(u64, u64, Ask)>,
    /// Life and request, by cookie.
    pub(super) under_way: BTreeMap<u64, (u64, u64)>,
    pub(super) next_cookie: u64,
    /// Those with smaller cookies were sent before the last fence.
    pub(super) fenced: u64,
}

impl MessageDma {
    /// Takes a request; an answer at once when it cannot be served.
    pub fn ask(&mut self, connection: &mut Connection, life: u64, request: u64, ask: Ask) -> Vec<Answer> {
        if self.waiting.len() >= MESSAGE_DMA_WAITING_MAX {
            return vec![Answer {
                life,
                request,
                data: Vec::new(),
                error: Errno::EBUSY,
            }];
        }
        self.waiting.push_back((life, request, ask));
        self.send(connection)
    }

    /// Sends what waits, as far as it may. Gives answers for what cannot be sent at all.
    pub fn send(&mut self, connection: &mut Connection) -> Vec<Answer> {
        let mut refused = Vec::new();
        while let Some((life, request, ask)) = self.waiting.front() {
            let (life, request) = (*life, *request);
            let cookie = self.next_cookie;
            let sent = match ask {
                Ask::Read { iova, bytes } => connection.send_dma_read(*iova, *bytes, cookie),
                Ask::Write { iova, data } => connection.send_dma_write(*iova, data, cookie),
            };
            let error = match sent {
                Ok(()) => Errno(0),
                Err(DmaSendError::TooManyOutstanding) => break,
                Err(DmaSendError::NotNegotiated) => Errno::ENODEV,
                Err(DmaSendError::TooLong { .. } | DmaSendError::Range { .. }) => Errno::EINVAL,
            };
            self.waiting.pop_front();
            if error == Errno(0) {
                self.next_cookie += 1;
                self.under_way.insert(cookie, (life, request));
            } else {
                refused.push(Answer {
                    life,
                    request,
                    data: Vec::new(),
                    error,
                });
            }
        }
        refused
    }

    /// The client's answer.
    pub fn answered(&mut self, reply: DmaReply) -> Option<Answer> {
        let (life, request) = self.under_way.remove(&reply.cookie)?;
        let (data, error) = match reply.result {
            Ok(DmaAnswer::Read(data)) => (data, Errno(0)),
            Ok(DmaAnswer::Written) => (Vec::new(), Errno(0)),
            Err(DmaFailure::Refused(errno)) => (Vec::new(), errno),
            Err(DmaFailure::Malformed) => (Vec::new(), Errno::EIO),
        };
        if error != Errno(0) && reply.cookie < self.fenced {
            // Refused for what the fence was about, perhaps.
            return Some(Answer::again(life, request));
        }
        Some(Answer {
            life,
            request,
            data,
            error,
        })
    }

    /// A fence: unsent messages are taken back, answers to reads that were sent will be dropped, and these are answered with EAGAIN: ask again, if
    /// it is still wanted. A write that was sent is answered when the client has: it may do it all the same, and the core must not
    /// take for lost what the guest then sees. (Refused, it is EAGAIN.)
    pub fn fence(&mut self, connection: &mut Connection) -> Vec<Answer> {
        let mut back = connection.drop_unsent_dma();
        back.extend(connection.abandon_dma_reads());
        back.sort_unstable();
        self.fenced = self.next_cookie;
        let sent: Vec<_> = back
            .into_iter()
            .filter_map(|cookie| self.under_way.remove(&cookie))
            .collect();
        self.give_back(sent)
    }

    /// The end of a session, or of a core life: unsent messages are taken back, answers to the others will be dropped. All of them are
    /// answered with EAGAIN.
    pub fn drop_all(&mut self, connection: &mut Connection) -> Vec<Answer> {
        if self.waiting.is_empty() && self.under_way.is_empty() {
            return Vec::new();
        }
        connection.drop_unsent_dma();
        connection.abandon_dma(|_| true);
        let under_way = std::mem::take(&mut self.under_way);
        self.give_back(under_way.into_values())
    }

    /// Answers for these, and for what waits, in the order in which the core asked.
    fn give_back(&mut self, under_way: impl IntoIterator<Item = (u64, u64)>) -> Vec<Answer> {
        let waiting = self.waiting.drain(..).map(|(life, request, _)| (life, request));
        under_way
            .into_iter()
            .chain(waiting)
            .map(|(life, request)| Answer::again(life, request))
            .collect()
    }
}

impl Answer {
    /// Not sent, or not waited for: ask again, if it is still wanted.
    pub const fn again(life: u64, request: u64) -> Self {
        Self {
            life,
            request,
            data: Vec::new(),
            error: Errno::EAGAIN,
        }
    }
}
