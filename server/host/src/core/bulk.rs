//! Bulk work: bytes between files and guests' buffers, and from buffer to buffer, piece by piece, nobody held up by another's.
//!
//! In: effects that name buffers; results of workers. Out: one outcome each. Must never know what a transfer is for.
//!
//! A piece is at most [`PIECE_BYTES_MAX`]; after each, the next one's turn comes. Reads go straight from the page cache into guest
//! memory on the loop (never waiting for a disk); a range that is not cached is read on a worker first. Writes go straight from
//! guest memory into the file, on a worker, under a lease. Memory that is not shared goes through scratch and messages.

use super::memory::{BulkError, PIECE_BYTES_MAX, Pieces, Side};
use super::sessions::Sessions;
use crate::messages::MESSAGE_DMA_BYTES_MAX;
use crate::store::{Done, OpenFile, Piecewise, Store, status_of};
use rustix::io::Errno;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use vmgmt_abi::Status;
use vmgmt_core::effect::{BufferRange, EffectId, FailedAt, Outcome};
use vmgmt_device::rings::{Channel, Token};
use vmgmt_device::{Direction, MemoryError};

/// Bytes moved in one turn over all work, so that rings are looked at again within about a millisecond.
const TURN_BYTES_MAX: usize = 4 * PIECE_BYTES_MAX;
/// Times that a range is read ahead in vain (the page cache is under pressure) before it goes through scratch.
const WARM_TRIES_MAX: u32 = 2;

/// One end of a transfer that is a guest's buffer.
#[derive(Debug)]
struct End {
    range: BufferRange,
    place: Place,
}

#[derive(Debug)]
enum Place {
    Guest(Pieces),
    Port,
}

#[derive(Debug)]
enum Work {
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
        file: Arc<OpenFile>,
        offset: u64,
        from: End,
        crc32: Option<crc32fast::Hasher>,
    },
}

#[derive(Debug)]
struct Task {
    /// The VM whose turn on the workers it takes.
    owner: u64,
    work: Work,
    /// Bytes in all, and moved so far.
    bytes: u64,
    done: u64,
    /// Bytes on their way from a source that has been read into a target that had no room.
    scratch: Vec<u8>,
    /// Its submission is void: it ends when its worker is back.
    void: bool,
}

/// What a step came to.
enum Step {
    /// It moved so many bytes and has more to do.
    Moved(usize),
    Finished(Outcome),
    /// A worker has it.
    OnWorker,
    /// Wait for an answer by message.
    OnMemory,
}

/// A step that failed.
enum Fault {
    Ends(Outcome),
    Waits,
    /// The buffers are to be looked up again.
    Revoked,
}

/// All bulk work of this core life.
#[derive(Debug, Default)]
pub struct Bulk {
    tasks: BTreeMap<EffectId, Task>,
    ready: VecDeque<EffectId>,
    waiting_for_memory: Vec<EffectId>,
}

impl Bulk {
    /// Whether there is something to do now.
    #[must_use]
    pub fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }

    /// Whether an effect is bulk work that has not ended.
    #[must_use]
    pub fn has(&self, id: EffectId) -> bool {
        self.tasks.contains_key(&id)
    }

    /// Sessions whose buffers the next step may touch.
    #[must_use]
    pub fn sessions(&self) -> BTreeSet<u64> {
        self.ready
            .iter()
            .filter_map(|id| self.tasks.get(id))
            .flat_map(|task| task.work.tokens())
            .map(|token| token.session)
            .collect()
    }

    /// Memory copy from buffer to buffer.
    ///
    /// # Errors
    /// The outcome at once, when a buffer is not there.
    pub fn copy(
        &mut self,
        sessions: &mut Sessions,
        id: EffectId,
        from: BufferRange,
        into: BufferRange,
    ) -> Result<(), Outcome> {
        let bytes = from.bytes.min(into.bytes);
        let owner = sessions.vm_of(from.token.session);
        let from = End::new(sessions, from, Direction::FromGuest)
            .map_err(|status| Outcome::failed(status, FailedAt::From))?;
        let into = End::new(sessions, into, Direction::IntoGuest)
            .map_err(|status| Outcome::failed(status, FailedAt::Into))?;
        self.begin(id, owner, bytes, Work::Copy { from, into });
        Ok(())
    }

    /// A buffer into private memory.
    ///
    /// # Errors
    /// As [`Bulk::copy`].
    pub fn fetch(&mut self, sessions: &mut Sessions, id: EffectId, from: BufferRange) -> Result<(), Outcome> {
        let owner = sessions.vm_of(from.token.session);
        let bytes = from.bytes;
        let from = End::new(sessions, from, Direction::FromGuest)
            .map_err(|status| Outcome::failed(status, FailedAt::From))?;
        self.begin(
            id,
            owner,
            bytes,
            Work::Fetch {
                from,
                data: Vec::new(),
            },
        );
        Ok(())
    }

    /// File into a buffer.
    ///
    /// # Errors
    /// As [`Bulk::copy`].
    pub fn read(
        &mut self,
        sessions: &mut Sessions,
        id: EffectId,
        file: Arc<OpenFile>,
        offset: u64,
        into: BufferRange,
    ) -> Result<(), Outcome> {
        let owner = sessions.vm_of(into.token.session);
        let bytes = into.bytes;
        let into = End::new(sessions, into, Direction::IntoGuest)
            .map_err(|status| Outcome::failed(status, FailedAt::Into))?;
        self.begin(
            id,
            owner,
            bytes,
            Work::Read {
                file,
                offset,
                into,
                warm_tries: 0,
            },
        );
        Ok(())
    }

    /// Buffer into a file.
    ///
    /// # Errors
    /// As [`Bulk::copy`].
    pub fn write(
        &mut self,
        sessions: &mut Sessions,
        id: EffectId,
        file: Arc<OpenFile>,
        offset: u64,
        from: BufferRange,
        checksum: bool,
    ) -> Result<(), Outcome> {
        let owner = sessions.vm_of(from.token.session);
        let bytes = from.bytes;
        let from = End::new(sessions, from, Direction::FromGuest)
            .map_err(|status| Outcome::failed(status, FailedAt::From))?;
        let crc32 = checksum.then(crc32fast::Hasher::new);
        self.begin(
            id,
            owner,
            bytes,
            Work::Write {
                file,
                offset,
                from,
                crc32,
            },
        );
        Ok(())
    }

    /// The submission is void: its work ends as soon as no worker has it. Its outcome still comes.
    pub fn void(&mut self, token: Token) {
        for (id, task) in &mut self.tasks {
            if task.work.tokens().contains(&token) && !task.void {
                task.void = true;
                self.ready.push_back(*id);
            }
        }
    }

    /// A channel of a session was closed, or (`None`) the session was reset or has ended: all its submissions are void.
    pub fn void_channel(&mut self, session: u64, channel: Option<Channel>) {
        let is_void =
            |token: Token| token.session == session && channel.is_none_or(|channel| token.channel == channel);
        for (id, task) in &mut self.tasks {
            if !task.void && task.work.tokens().into_iter().any(is_void) {
                task.void = true;
                self.ready.push_back(*id);
            }
        }
    }

    /// An answer by message came: those who wait try again.
    pub fn handle_memory(&mut self) {
        self.ready.extend(self.waiting_for_memory.drain(..));
    }

    /// A worker is back. `None`: there is no such work, or it goes on.
    pub fn handle_worker(&mut self, id: EffectId, done: Done) -> Option<Outcome> {
        let task = self.tasks.get_mut(&id)?;
        match done {
            Done::Outcome(outcome) => {
                self.tasks.remove(&id);
                return Some(outcome);
            }
            Done::Stored { bytes, crc32 } => {
                task.scratch.clear();
                task.done += bytes;
                if let (Work::Write { crc32: Some(sum), .. }, Some(crc32)) = (&mut task.work, crc32) {
                    sum.combine(&crc32fast::Hasher::new_with_initial_len(crc32, bytes));
                }
            }
            Done::Scratch(data) => {
                if data.is_empty() {
                    // The file ends here.
                    task.bytes = task.done;
                }
                task.scratch = data;
            }
            // The next step looks the buffers up again.
            Done::Warm | Done::Revoked | Done::Opened { .. } => {}
        }
        self.ready.push_back(id);
        None
    }

    /// Does at most one turn's worth of work; ended effects go to `finished`.
    pub fn step(&mut self, sessions: &mut Sessions, store: &Store, finished: &mut Vec<(EffectId, Outcome)>) {
        let mut budget = TURN_BYTES_MAX;
        for _ in 0..self.ready.len() {
            let Some(id) = self.ready.pop_front() else { break };
            let Some(task) = self.tasks.get_mut(&id) else {
                continue;
            };
            match task.step(id, sessions, store) {
                Step::Moved(bytes) => {
                    self.ready.push_back(id);
                    budget = budget.saturating_sub(bytes);
                }
                Step::Finished(outcome) => {
                    budget = budget.saturating_sub(PIECE_BYTES_MAX.min(task.done as usize));
                    self.tasks.remove(&id);
                    finished.push((id, outcome));
                }
                Step::OnWorker => {}
                Step::OnMemory => self.waiting_for_memory.push(id),
            }
            if budget == 0 {
                break;
            }
        }
    }

    fn begin(&mut self, id: EffectId, owner: u64, bytes: u64, work: Work) {
        self.tasks.insert(
            id,
            Task {
                owner,
                work,
                bytes,
                done: 0,
                scratch: Vec::new(),
                void: false,
            },
        );
        self.ready.push_back(id);
    }
}

impl Task {
    fn step(&mut self, id: EffectId, sessions: &mut Sessions, store: &Store) -> Step {
        if self.void {
            return Step::Finished(Outcome::failed(Status::CANCELLED, FailedAt::Into));
        }
        if self.done >= self.bytes {
            return Step::Finished(self.outcome());
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
            Ok(bytes) => {
                self.done += bytes as u64;
                if self.done >= self.bytes {
                    Step::Finished(self.outcome())
                } else {
                    Step::Moved(bytes)
                }
            }
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
        let (done, piece) = (self.done, self.piece());
        let Work::Write {
            file,
            offset,
            from,
            crc32,
        } = &mut self.work
        else {
            return Step::OnWorker;
        };
        let checksum = crc32.is_some();
        let Some(position) = offset.checked_add(done).filter(|at| {
            at.checked_add(piece as u64)
                .is_some_and(|end| i64::try_from(end).is_ok())
        }) else {
            return Step::Finished(Outcome::failed(Status::TOO_LARGE, FailedAt::File));
        };
        let writer = Arc::clone(file);
        let work: Box<dyn FnOnce() -> Done + Send> = match &from.place {
            Place::Guest(pieces) if !pieces.needs_messages() => {
                let pieces = pieces.clone();
                Box::new(move || {
                    store_piece(&writer, position, piece, checksum, |at| {
                        pieces.write_file(done + at as u64, piece - at, writer.fd(), position + at as u64)
                    })
                })
            }
            _ => {
                let mut data = vec![0; piece.min(MESSAGE_DMA_BYTES_MAX as usize)];
                if let Err(fault) = from.read(sessions, done, &mut data) {
                    return self.after(Err(fault), sessions);
                }
                Box::new(move || {
                    store_piece(&writer, position, data.len(), checksum, |at| {
                        rustix::io::pwrite(writer.fd(), &data[at..], position + at as u64)
                            .map_err(BulkError::File)
                    })
                })
            }
        };
        store.submit_work(self.owner, id, file, work);
        Step::OnWorker
    }
}

/// Writes one piece whole, on a worker; `write` gives the bytes that one call wrote from that offset in the piece on.
fn store_piece(
    file: &OpenFile,
    position: u64,
    bytes: usize,
    checksum: bool,
    write: impl Fn(usize) -> Result<usize, BulkError>,
) -> Done {
    if let Err(outcome) = file.charge_growth(position + bytes as u64) {
        return Done::Outcome(outcome);
    }
    let mut at = 0;
    while at < bytes {
        match write(at) {
            Ok(0) => return Done::Outcome(Outcome::failed(Status::NO_SPACE, FailedAt::File)),
            Ok(written) => at += written,
            Err(BulkError::File(Errno::INTR)) => {}
            Err(BulkError::Revoked) => return Done::Revoked,
            Err(BulkError::File(errno)) => {
                return Done::Outcome(Outcome::failed(status_of(errno), FailedAt::File));
            }
            Err(_) => return Done::Outcome(Outcome::failed(Status::BAD_ADDRESS, FailedAt::From)),
        }
    }
    // Over what the file holds, not over guest memory, which may have changed since: end to end.
    let crc32 = match checksum.then(|| file.checksum(position, bytes as u64)) {
        Some(Ok((_, crc32))) => Some(crc32),
        Some(Err(errno)) => return Done::Outcome(Outcome::failed(status_of(errno), FailedAt::File)),
        None => None,
    };
    Done::Stored {
        bytes: bytes as u64,
        crc32,
    }
}

impl Work {
    /// The submissions of its ends (one may be there twice).
    fn tokens(&self) -> [Token; 2] {
        match self {
            Self::Copy { from, into } => [from.range.token, into.range.token],
            Self::Fetch { from: end, .. } | Self::Write { from: end, .. } | Self::Read { into: end, .. } => {
                [end.range.token; 2]
            }
        }
    }
}

impl End {
    fn new(sessions: &mut Sessions, range: BufferRange, direction: Direction) -> Result<Self, Status> {
        let place = match sessions.resolve(range, direction)? {
            Some(pieces) => Place::Guest(pieces),
            None => Place::Port,
        };
        Ok(Self { range, place })
    }

    fn is_slow(&self) -> bool {
        match &self.place {
            Place::Guest(pieces) => pieces.needs_messages(),
            Place::Port => true,
        }
    }

    fn read(&self, sessions: &mut Sessions, at: u64, into: &mut [u8]) -> Result<(), Fault> {
        match &self.place {
            Place::Guest(pieces) if !pieces.needs_messages() => pieces
                .read_bytes(at, into)
                .map_err(|error| fault(error, FailedAt::From)),
            Place::Guest(pieces) => {
                let memory = sessions
                    .memory(self.range.token.session)
                    .ok_or(bad_address(FailedAt::From))?;
                memory
                    .read_pieces(pieces, at, into)
                    .map_err(|error| memory_fault(error, FailedAt::From))
            }
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
            Place::Guest(pieces) => {
                let memory = sessions
                    .memory(self.range.token.session)
                    .ok_or(bad_address(FailedAt::Into))?;
                memory
                    .write_pieces(pieces, at, from)
                    .map_err(|error| memory_fault(error, FailedAt::Into))
            }
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
