//! The sessions of this core life: pages, rings, guest memory and interrupt descriptors of each.
//!
//! In: what the front tells of a session. Out: each session's rooms, by session number. Must never know what an operation does.

use super::memory::{MemoryLimits, Pieces, SessionMemory};
use crate::words::MappedWords;
use rustix::fd::OwnedFd;
use std::collections::BTreeMap;
use vmgmt_abi::Status;
use vmgmt_abi::registers::VECTORS_MAX;
use vmgmt_core::effect::BufferRange;
use vmgmt_device::page::{CorePage, FrontPage, control};
use vmgmt_device::rings::{AttachError, Buffer, Input, Modes, Rings, Segment, Settings, Turn, forget_state};
use vmgmt_device::{Direction, MemoryError, Tick};
use vmgmt_mem::MapError;

/// Why a session could not be taken over.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    #[error("its pages cannot be mapped: {0}")]
    Map(#[from] MapError),
    #[error("its pages are not of this version, or another session's")]
    Page,
    #[error(transparent)]
    Rings(#[from] AttachError),
    #[error("its packet has {0} descriptors, 3 are needed")]
    Descriptors(usize),
}

/// One session.
pub struct Session {
    pub slot: usize,
    pub vm: u64,
    pub front: FrontPage<MappedWords>,
    pub core: CorePage<MappedWords>,
    pub rings: Rings<MappedWords>,
    pub memory: SessionMemory,
    vectors: [Option<OwnedFd>; VECTORS_MAX],
    /// The front's counter for this slot when it was last looked at.
    pub touched: u64,
    /// Its page is to be looked at whatever the counter says.
    pub look: bool,
    /// It is to be polled until then.
    pub active_until: Tick,
    /// Rings for which workers write are not armed until then.
    pub spared_until: Tick,
    /// The `fence` word up to which the rings have looked at the page.
    fence_handled: u64,
    /// The `fenced` word that the front was last kicked for.
    fenced_told: u64,
    /// Within this turn of the loop.
    pub is_open: bool,
    /// The front has said that it has ended: only what still holds its memory keeps it.
    pub ended: bool,
}

/// All sessions.
#[derive(Default)]
pub struct Sessions {
    sessions: BTreeMap<u64, Session>,
    /// Sessions opened in this turn of the loop.
    opened: Vec<u64>,
}

impl Session {
    /// Maps the pages and adopts what an earlier core life left.
    ///
    /// # Errors
    /// See [`SessionError`].
    pub fn attach(
        session: u64,
        slot: usize,
        vm: u64,
        fds: Vec<OwnedFd>,
        limits: MemoryLimits,
    ) -> Result<Self, SessionError> {
        let count = fds.len();
        let Ok([front, core, state]) = <[OwnedFd; 3]>::try_from(fds) else {
            return Err(SessionError::Descriptors(count));
        };
        let front = FrontPage::new(MappedWords::read_only(&front)?);
        let core = CorePage::new(MappedWords::writable(&core)?);
        let state = MappedWords::writable(&state)?;
        if !front.is_valid() || !core.is_valid() || front.session() != session || core.session() != session {
            return Err(SessionError::Page);
        }
        if front.control() & control::QUARANTINED != 0 {
            // What it had in flight killed cores. Its device has failed, so the guest is owed nothing more.
            forget_state(&state);
        }
        let rings = Rings::attach(
            Settings {
                session,
                modes: Modes::default(),
            },
            state,
            &front,
            &core,
        )?;
        let memory = SessionMemory::new(session, front.clone(), core.clone(), limits);
        Ok(Self {
            slot,
            vm,
            front,
            core,
            rings,
            memory,
            vectors: Default::default(),
            touched: 0,
            look: true,
            active_until: Tick(0),
            spared_until: Tick(0),
            fence_handled: 0,
            fenced_told: 0,
            is_open: false,
            ended: false,
        })
    }

    /// Hands an input to the rings. The session must be open (but for its last).
    pub fn handle(&mut self, now: Tick, input: Input) -> Turn {
        self.rings
            .handle(now, &self.front, &self.core, &mut self.memory, input)
    }

    /// When the rings are to be looked at again by themselves: never while there is no DMA, a change of that touches the session.
    pub fn rings_due(&self) -> Option<Tick> {
        self.rings.poll_timeout().filter(|_| self.memory.is_allowed())
    }

    /// Whether `fenced` has moved since this was last asked.
    pub fn tell_fenced(&mut self) -> bool {
        let fenced = self.core.fenced();
        std::mem::replace(&mut self.fenced_told, fenced) != fenced
    }

    /// Takes the whole set of interrupt descriptors over, and signals each once: what came before may have gone to the old ones.
    pub fn set_vectors(&mut self, present: u32, fds: Vec<OwnedFd>) {
        let mut fds = fds.into_iter();
        for (vector, slot) in self.vectors.iter_mut().enumerate() {
            *slot = if present & (1 << vector) != 0 {
                fds.next()
            } else {
                None
            };
        }
        for vector in 0..VECTORS_MAX {
            self.signal(vector);
        }
    }

    /// Signals a vector's eventfd, if it has one.
    pub fn signal(&self, vector: usize) {
        if let Some(fd) = self.vectors.get(vector).and_then(Option::as_ref) {
            // EAGAIN: the counter is full, so it is signalled already.
            let _ = rustix::io::write(fd, &1u64.to_ne_bytes());
        }
    }
}

impl Sessions {
    pub fn insert(&mut self, number: u64, session: Session) {
        self.sessions.insert(number, session);
    }
    pub fn remove(&mut self, number: u64) -> Option<Session> {
        self.sessions.remove(&number)
    }
    pub fn get_mut(&mut self, number: u64) -> Option<&mut Session> {
        self.sessions.get_mut(&number)
    }
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (u64, &mut Session)> {
        self.sessions
            .iter_mut()
            .map(|(number, session)| (*number, session))
    }
    #[must_use]
    pub fn count(&self) -> usize {
        self.sessions.len()
    }
    /// The VM of a session; 0: no such session.
    #[must_use]
    pub fn vm_of(&self, session: u64) -> u64 {
        self.sessions.get(&session).map_or(0, |session| session.vm)
    }
    /// Whether the operator has frozen the session: who needs its memory waits.
    #[must_use]
    pub fn is_frozen(&self, session: u64) -> bool {
        self.sessions
            .get(&session)
            .is_some_and(|session| session.memory.is_frozen())
    }

    /// The sessions of a VM that have not ended.
    pub fn of_vm(&self, vm: u64) -> impl Iterator<Item = (u64, &Session)> {
        self.sessions
            .iter()
            .filter(move |(_, session)| session.vm == vm && !session.ended)
            .map(|(number, session)| (*number, session))
    }

    /// Messages about a session's memory that were given up, unanswered.
    #[must_use]
    pub fn messages_given_up(&self, session: u64) -> u64 {
        let session = self.sessions.get(&session);
        session.map_or(0, |session| session.memory.counters().messages_given_up)
    }

    /// Guest memory of a session, within its turn.
    pub fn memory(&mut self, session: u64) -> Option<&mut SessionMemory> {
        self.sessions.get_mut(&session).map(|session| &mut session.memory)
    }

    /// Begins a turn of this session, unless it has begun. False: no such session.
    pub fn open(&mut self, number: u64, now: Tick) -> Option<&mut Session> {
        let session = self.sessions.get_mut(&number).filter(|session| !session.ended)?;
        if !session.is_open {
            session.is_open = true;
            session.memory.begin_dma(now);
            self.opened.push(number);
            // A fence may have passed just now: what the rings still believe of the time before must not lead to DMA after it.
            let fence = session.front.fence();
            if std::mem::replace(&mut session.fence_handled, fence) != fence {
                session.handle(now, Input::Touched);
            }
        }
        Some(session)
    }

    /// Sessions opened in this turn, to be closed by the caller.
    pub fn take_opened(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.opened)
    }

    /// Looks part of a submission's data area up. `None`: it is in the port window.
    ///
    /// # Errors
    /// STALE: no such submission. BAD_ARGUMENT: not within its data area. BAD_ADDRESS, NOT_READY: guest memory.
    pub fn resolve(&mut self, range: BufferRange, direction: Direction) -> Result<Option<Pieces>, Status> {
        let session = self.sessions.get_mut(&range.token.session).ok_or(Status::STALE)?;
        debug_assert!(session.is_open, "a buffer is looked up within its session's turn");
        let end = range
            .offset
            .checked_add(range.bytes)
            .ok_or(Status::BAD_ARGUMENT)?;
        let segments = match session.rings.buffer(range.token).ok_or(Status::STALE)? {
            Buffer::Guest { segments, bytes } if end <= bytes => part_of(segments, range.offset, range.bytes),
            Buffer::Guest { .. } => return Err(Status::BAD_ARGUMENT),
            Buffer::Port { .. } => return Ok(None),
        };
        session
            .memory
            .resolve(&segments, direction)
            .map(Some)
            .map_err(|error| match error {
                MemoryError::Quiet => Status::NOT_READY,
                MemoryError::Pending => Status::BUSY,
                _ => Status::BAD_ADDRESS,
            })
    }

    /// Bytes that the port window's user wrote, from `at` in the range on.
    pub fn port_input(&mut self, range: BufferRange, at: u64, bytes: usize) -> Option<Vec<u8>> {
        let session = self.sessions.get_mut(&range.token.session)?;
        let Buffer::Port { input, .. } = session.rings.buffer(range.token)? else {
            return None;
        };
        let begin = usize::try_from(range.offset.checked_add(at)?).ok()?;
        input.get(begin..begin.checked_add(bytes)?).map(<[u8]>::to_vec)
    }

    /// Output for the port window's user; false: there is no room, or no such submission.
    pub fn port_write(&mut self, range: BufferRange, at: u64, bytes: &[u8]) -> bool {
        let Some(offset) = range.offset.checked_add(at) else {
            return false;
        };
        self.sessions
            .get_mut(&range.token.session)
            .is_some_and(|session| session.rings.port_write(range.token, offset, bytes))
    }
}

/// The segments of part of a buffer, as addresses and bytes: `bytes` of it from its byte `skip` on.
#[must_use]
pub fn part_of(segments: &[Segment], mut skip: u64, mut bytes: u64) -> Vec<(u64, u64)> {
    let mut part = Vec::with_capacity(segments.len());
    for segment in segments {
        if bytes == 0 {
            break;
        }
        if skip >= segment.bytes {
            skip -= segment.bytes;
            continue;
        }
        let take = (segment.bytes - skip).min(bytes);
        part.push((segment.iova + skip, take));
        bytes -= take;
        skip = 0;
    }
    part
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_of_a_buffer_is_the_right_bytes() {
        let segments = [
            Segment { iova: 100, bytes: 10 },
            Segment { iova: 200, bytes: 5 },
            Segment { iova: 300, bytes: 20 },
        ];
        assert_eq!(part_of(&segments, 0, 35), vec![(100, 10), (200, 5), (300, 20)]);
        assert_eq!(part_of(&segments, 9, 7), vec![(109, 1), (200, 5), (300, 1)]);
        assert_eq!(part_of(&segments, 10, 5), vec![(200, 5)]);
        assert_eq!(part_of(&segments, 15, 0), vec![]);
    }
}
