//! One piece of bulk work: its ends, how far it is, and its next step.
//!
//! In: a turn. Out: bytes moved, an outcome, or what it waits for. Must never know whose turn is next.

use super::reads::Wanted;
use super::writes::{Range, Source, Writes};
use crate::core::memory::{BulkError, PIECE_BYTES_MAX, Pieces, Side};
use crate::core::sessions::Sessions;
use crate::messages::MESSAGE_DMA_BYTES_MAX;
use crate::store::{Done, OpenFile, Piecewise, Store, status_of};
use std::sync::Arc;
use vmgmt_abi::Status;
use vmgmt_core::effect::{BufferRange, EffectId, FailedAt, Outcome};
use vmgmt_device::rings::Token;
use vmgmt_device::{Direction, MemoryError};

/// Times that a range is read ahead in vain (the page cache is under pressure) before it goes through scratch.
const WARM_TRIES_MAX: u32 = 2;

/// One end of a transfer that is a guest's buffer.
#[derive(Debug)]
pub(super) struct End {
    pub(super) range: BufferRange,
    pub(super) place: Place,
}

#[derive(Debug)]
pub(super) enum Place {
    Guest(Pieces),
    Port,
    /// Let go, or not looked up yet, because its session is frozen.
    Frozen,
}

#[derive(Debug)]
pub(super) enum Work {
    Copy {
        from: End,
        into: End,
    },
    Fetch {
        from: End,
        data: Vec<u8>,
    },
    Read {
        file: Arc<OpenFile>,
        offset: u64,
        into: End,
        warm_tries: u32,
    },
    Write {
        writes: Arc<Writes>,
        offset: u64,
        from: End,
        crc32: Option<crc32fast::Hasher>,
    },
}

#[derive(Debug)]
pub(super) struct Task {
    /// The VM whose turn on the workers it takes.
    pub(super) owner: u64,
    pub(super) work: Work,
    /// Bytes in all, and moved so far.
    pub(super) bytes: u64,
    pub(super) done: u64,
    /// Bytes on their way from a source that has been read into a target that had no room.
    pub(super) scratch: Vec<u8>,
    /// Its submission is void: it ends when its worker is back.
    pub(super) void: bool,
    /// A worker has something of it, or is going to.
    pub(super) on_worker: bool,
    /// A worker found its buffers taken back: they are to be looked up again.
    pub(super) revoked: bool,
}

/// What a step came to.
pub(super) enum Step {
    /// It moved so many bytes and has more to do.
    Moved(usize),
    Finished(Outcome),
    /// A worker has it.
    OnWorker,
    /// Wait for an answer by message.
    OnMemory,
    /// Wait for the thaw of a session.
    Frozen,
}

/// A step that failed.
pub(super) enum Fault {
    Ends(Outcome),
    Waits,
    /// The buffers are to be looked up again.
    Revoked,
}

impl Task {
    pub(super) const fn new(owner: u64, bytes: u64, work: Work) -> Self {
        Self {
            owner,
            work,
            bytes,
            done: 0,
            scratch: Vec::new(),
            void: false,
            on_worker: false,
            revoked: false,
        }
    }

    /// Its submission is void. What it has queued to be written is taken back first: the put that it writes to may be opened again as soon as
    /// it has ended, and get newer bytes. (What is being read goes nowhere.)
    pub(super) fn void(&mut self, id: EffectId) {
        self.void = true;
        self.on_worker = self.on_worker
            && match &self.work {
                Work::Write { writes, .. } => !writes.take_back(id),
                Work::Copy { .. } | Work::Fetch { .. } | Work::Read { .. } => false,
            };
        if self.on_worker {
            // Its session's fences must not wait for a disk.
            self.work.ends_mut().for_each(End::let_go);
        }
    }

    pub(super) fn step(&mut self, id: EffectId, sessions: &mut Sessions, store: &Store) -> Step {
        if self.on_worker {
            // Told void meanwhile: it ends when its worker is back.
            return Step::OnWorker;
        }
        let step = self.step_here(id, sessions, store);
        self.on_worker = matches!(step, Step::OnWorker);
        step
    }

    fn step_here(&mut self, id: EffectId, sessions: &mut Sessions, store: &Store) -> Step {
        if self.void {
            return Step::Finished(Outcome::failed(Status::CANCELLED, FailedAt::Into));
        }
        if std::mem::take(&mut self.revoked) {
            return self.after(Err(Fault::Revoked), sessions);
        }
        if self.done >= self.bytes {
            return Step::Finished(self.outcome());
        }
        let tokens = self.work.tokens();
        if tokens.iter().any(|token| sessions.is_frozen(token.session)) {
            // Also the other end is let go: its session's fences must not wait for this one's thaw.
            self.work.ends_mut().for_each(End::let_go);
            return Step::Frozen;
        }
        if self.work.ends_mut().any(|end| matches!(end.place, Place::Frozen))
            && let Err(outcome) = self.look_up_again(sessions)
        {
            return Step::Finished(outcome);
        }
        let moved = match &self.work {
            Work::Copy { .. } => self.copy_piece(sessions),
            Work::Fetch { .. } => self.fetch_piece(sessions),
            Work::Read { .. } => return self.read_piece(id, sessions, store),
            Work::Write { .. } => return self.write_piece(id, sessions, store),
        };
        self.after(moved, sessions)
    }

    /// Turns what a piece came to into the step's result.
    fn after(&mut self, moved: Result<usize, Fault>, sessions: &mut Sessions) -> Step {
        match moved {
            Ok(bytes) => self.moved(bytes),
            Err(Fault::Waits) => Step::OnMemory,
            Err(Fault::Ends(outcome)) => Step::Finished(outcome),
            Err(Fault::Revoked) => self
                .look_up_again(sessions)
                .map_or_else(Step::Finished, |()| Step::Moved(0)),
        }
    }

    /// The guest unmapped something of the buffer: what is still mapped (also by another map) goes on.
    fn look_up_again(&mut self, sessions: &mut Sessions) -> Result<(), Outcome> {
        let at = |end: &mut End, direction, at| {
            *end = End::new(sessions, end.range, direction).map_err(|status| Outcome::failed(status, at))?;
            Ok(())
        };
        let mut at = at;
        match &mut self.work {
            Work::Copy { from, into } => {
                at(from, Direction::FromGuest, FailedAt::From)?;
                at(into, Direction::IntoGuest, FailedAt::Into)
            }
            Work::Fetch { from, .. } | Work::Write { from, .. } => {
                at(from, Direction::FromGuest, FailedAt::From)
            }
            Work::Read { into, .. } => at(into, Direction::IntoGuest, FailedAt::Into),
        }
    }

    /// What it reads next, where that may go by one call with others; nothing for all that a step of its own has to look after.
    pub(super) fn wanted(&self) -> Option<Wanted<'_>> {
        let Work::Read {
            file,
            offset,
            into,
            warm_tries: 0,
        } = &self.work
        else {
            return None;
        };
        let Place::Guest(pieces) = &into.place else {
            return None;
        };
        let usual = !self.void && !self.revoked && self.done < self.bytes && self.scratch.is_empty();
        (usual && !pieces.needs_messages() && file.piecewise() != Piecewise::Scratch).then_some(())?;
        Some(Wanted {
            session: into.range.token.session,
            file,
            position: offset.checked_add(self.done)?,
            pieces,
            at: self.done,
            bytes: self.piece(),
        })
    }

    /// So many more bytes of it are where they belong.
    pub(super) fn moved(&mut self, bytes: usize) -> Step {
        self.done += bytes as u64;
        if self.done >= self.bytes {
            Step::Finished(self.outcome())
        } else {
            Step::Moved(bytes)
        }
    }

    fn outcome(&mut self) -> Outcome {
        match &mut self.work {
            Work::Copy { .. } | Work::Read { .. } => Outcome::Bytes(self.done),
            Work::Fetch { data, .. } => Outcome::Data(std::mem::take(data)),
            Work::Write { crc32, .. } => Outcome::Written {
                bytes: self.done,
                crc32: crc32.take().map(crc32fast::Hasher::finalize),
            },
        }
    }

    fn piece(&self) -> usize {
        usize::try_from(self.bytes - self.done)
            .unwrap_or(usize::MAX)
            .min(PIECE_BYTES_MAX)
    }

    fn copy_piece(&mut self, sessions: &mut Sessions) -> Result<usize, Fault> {
        let (done, piece) = (self.done, self.piece());
        let Work::Copy { from, into } = &mut self.work else {
            return Ok(0);
        };
        if let (Place::Guest(source), Place::Guest(target)) = (&from.place, &into.place)
            && !source.needs_messages()
            && !target.needs_messages()
        {
            return match target.copy_from(done, source, done, piece) {
                Ok(()) => Ok(piece),
                Err(BulkError::Guest {
                    side: Side::Source, ..
                }) => Err(bad_address(FailedAt::From)),
                Err(error) => Err(fault(error, FailedAt::Into)),
            };
        }
        if self.scratch.is_empty() {
            let mut data = vec![0; piece.min(MESSAGE_DMA_BYTES_MAX as usize)];
            from.read(sessions, done, &mut data)?;
            self.scratch = data;
        }
        into.write(sessions, done, &self.scratch)?;
        Ok(std::mem::take(&mut self.scratch).len())
    }

    fn fetch_piece(&mut self, sessions: &mut Sessions) -> Result<usize, Fault> {
        let (done, mut piece) = (self.done, self.piece());
        let Work::Fetch { from, data } = &mut self.work else {
            return Ok(0);
        };
        if from.is_slow() {
            piece = piece.min(MESSAGE_DMA_BYTES_MAX as usize);
        }
        let mut bytes = vec![0; piece];
        from.read(sessions, done, &mut bytes)?;
        data.extend_from_slice(&bytes);
        Ok(piece)
    }

    fn read_piece(&mut self, id: EffectId, sessions: &mut Sessions, store: &Store) -> Step {
        let (done, piece) = (self.done, self.piece());
        let Work::Read {
            file,
            offset,
            into,
            warm_tries,
        } = &mut self.work
        else {
            return Step::OnWorker;
        };
        let Some(position) = offset.checked_add(done) else {
            return Step::Finished(Outcome::failed(Status::BAD_ARGUMENT, FailedAt::File));
        };
        if !self.scratch.is_empty() {
            let written = into.write(sessions, done, &self.scratch);
            let bytes = self.scratch.len();
            return match written {
                Ok(()) => {
                    self.scratch.clear();
                    self.after(Ok(bytes), sessions)
                }
                Err(fault) => self.after(Err(fault), sessions),
            };
        }
        let mut through_scratch =
            into.is_slow() || file.piecewise() == Piecewise::Scratch || *warm_tries >= WARM_TRIES_MAX;
        if !through_scratch && let Place::Guest(pieces) = &into.place {
            match pieces.read_file(done, piece, file.fd(), position) {
                Ok(0) => {
                    self.bytes = done;
                    return Step::Finished(self.outcome());
                }
                Ok(bytes) => {
                    *warm_tries = 0;
                    return self.after(Ok(bytes), sessions);
                }
                Err(BulkError::WouldWait) => *warm_tries += 1,
                Err(BulkError::NoNowait) => {
                    file.set_no_nowait();
                    through_scratch = true;
                }
                Err(error) => return self.after(Err(fault(error, FailedAt::Into)), sessions),
            }
        }
        let reader = Arc::clone(file);
        *warm_tries = if through_scratch { 0 } else { *warm_tries };
        store.submit_work(self.owner, id, file, move || {
            let mut scratch = vec![0; piece];
            match reader.read_into(position, &mut scratch) {
                Ok(bytes) if through_scratch => {
                    scratch.truncate(bytes);
                    Done::Scratch(scratch)
                }
                Ok(_) => Done::Warm,
                Err(errno) => Done::Outcome(Outcome::failed(status_of(errno), FailedAt::File)),
            }
        });
        Step::OnWorker
    }

    fn write_piece(&mut self, id: EffectId, sessions: &mut Sessions, store: &Store) -> Step {
        let (done, mut piece) = (self.done, self.piece());
        let Work::Write {
            writes,
            offset,
            from,
            crc32,
        } = &mut self.work
        else {
            return Step::OnWorker;
        };
        let Some(position) = offset.checked_add(done).filter(|at| {
            at.checked_add(piece as u64)
                .is_some_and(|end| i64::try_from(end).is_ok())
        }) else {
            return Step::Finished(Outcome::failed(Status::TOO_LARGE, FailedAt::File));
        };
        let source = match &from.place {
            Place::Guest(pieces) if !pieces.needs_messages() => Source::Guest(pieces.clone(), done),
            _ => {
                piece = piece.min(MESSAGE_DMA_BYTES_MAX as usize);
                let mut data = vec![0; piece];
                if let Err(fault) = from.read(sessions, done, &mut data) {
                    return self.after(Err(fault), sessions);
                }
                Source::Here(data)
            }
        };
        let is_due = writes.push(Range {
            effect: id,
            position,
            bytes: piece,
            source,
            checksum: crc32.is_some(),
        });
        if is_due {
            let writer = Arc::clone(writes);
            store.submit_write(self.owner, writes.file(), move || writer.run());
        }
        Step::OnWorker
    }
}

impl Work {
    fn ends_mut(&mut self) -> impl Iterator<Item = &mut End> {
        let (one, other) = match self {
            Self::Copy { from, into } => (from, Some(into)),
            Self::Fetch { from: end, .. } | Self::Write { from: end, .. } | Self::Read { into: end, .. } => {
                (end, None)
            }
        };
        std::iter::once(one).chain(other)
    }

    /// The submissions of its ends (one may be there twice).
    pub(super) fn tokens(&self) -> [Token; 2] {
        match self {
            Self::Copy { from, into } => [from.range.token, into.range.token],
            Self::Fetch { from: end, .. } | Self::Write { from: end, .. } | Self::Read { into: end, .. } => {
                [end.range.token; 2]
            }
        }
    }
}

impl End {
    pub(super) fn new(
        sessions: &mut Sessions,
        range: BufferRange,
        direction: Direction,
    ) -> Result<Self, Status> {
        let place = match sessions.resolve(range, direction) {
            // Looked up when it is thawed, and found to be wrong then.
            Err(_) if sessions.is_frozen(range.token.session) => Place::Frozen,
            place => Self::place(place?),
        };
        Ok(Self { range, place })
    }

    fn place(pieces: Option<Pieces>) -> Place {
        match pieces {
            Some(pieces) => Place::Guest(pieces),
            None => Place::Port,
        }
    }

    /// Holds no memory any more, until it is looked up again.
    fn let_go(&mut self) {
        if matches!(self.place, Place::Guest(_)) {
            self.place = Place::Frozen;
        }
    }

    fn is_slow(&self) -> bool {
        match &self.place {
            Place::Guest(pieces) => pieces.needs_messages(),
            Place::Port | Place::Frozen => true,
        }
    }

    fn read(&self, sessions: &mut Sessions, at: u64, into: &mut [u8]) -> Result<(), Fault> {
        match &self.place {
            Place::Guest(pieces) if !pieces.needs_messages() => pieces
                .read_bytes(at, into)
                .map_err(|error| fault(error, FailedAt::From)),
            // A fence cancelled it: what it named is looked up again, and goes on where it is still there.
            Place::Guest(pieces) if pieces.is_revoked() => Err(Fault::Revoked),
            Place::Guest(pieces) => {
                let memory = sessions
                    .memory(self.range.token.session)
                    .ok_or(bad_address(FailedAt::From))?;
                memory
                    .read_pieces(pieces, at, into)
                    .map_err(|error| memory_fault(error, FailedAt::From))
            }
            Place::Frozen => Err(Fault::Revoked),
            Place::Port => {
                let data = sessions
                    .port_input(self.range, at, into.len())
                    .ok_or(bad_address(FailedAt::From))?;
                into.copy_from_slice(&data);
                Ok(())
            }
        }
    }

    fn write(&self, sessions: &mut Sessions, at: u64, from: &[u8]) -> Result<(), Fault> {
        match &self.place {
            Place::Guest(pieces) if !pieces.needs_messages() => pieces
                .write_bytes(at, from)
                .map_err(|error| fault(error, FailedAt::Into)),
            Place::Guest(pieces) if pieces.is_revoked() => Err(Fault::Revoked),
            Place::Guest(pieces) => {
                let memory = sessions
                    .memory(self.range.token.session)
                    .ok_or(bad_address(FailedAt::Into))?;
                memory
                    .write_pieces(pieces, at, from)
                    .map_err(|error| memory_fault(error, FailedAt::Into))
            }
            Place::Frozen => Err(Fault::Revoked),
            Place::Port => {
                if sessions.port_write(self.range, at, from) {
                    Ok(())
                } else {
                    Err(bad_address(FailedAt::Into))
                }
            }
        }
    }
}

const fn bad_address(at: FailedAt) -> Fault {
    Fault::Ends(Outcome::failed(Status::BAD_ADDRESS, at))
}

fn fault(error: BulkError, at: FailedAt) -> Fault {
    match error {
        BulkError::Revoked => Fault::Revoked,
        BulkError::File(errno) => Fault::Ends(Outcome::failed(status_of(errno), FailedAt::File)),
        BulkError::Misuse => {
            tracing::error!("a transfer left its buffer: a mistake of the core's");
            Fault::Ends(Outcome::failed(Status::IO_ERROR, at))
        }
        BulkError::WouldWait | BulkError::NoNowait | BulkError::Guest { .. } | BulkError::ByMessage => {
            bad_address(at)
        }
    }
}

fn memory_fault(error: MemoryError, at: FailedAt) -> Fault {
    match error {
        MemoryError::Pending => Fault::Waits,
        MemoryError::Quiet => Fault::Ends(Outcome::failed(Status::NOT_READY, at)),
        _ => bad_address(at),
    }
}
