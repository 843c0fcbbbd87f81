//! GARDEN, bulk work: bytes between files and guests' buffers, piece by piece, as `host/core/bulk` does.
//!
//! In: effects that name buffers; results of workers. Out: one outcome each. Must never know what a transfer is for.

use crate::core::Sessions;
use crate::disk::{Done, Work};
use crate::limits::PIECE_BYTES_MAX;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use vmgmt_abi::Status;
use vmgmt_core::effect::{BufferRange, EffectId, FailedAt, Outcome};
use vmgmt_device::rings::{Channel, Token};
use vmgmt_device::{Direction, GuestMemory, MemoryError};

#[derive(Clone, Debug)]
enum Kind {
    Copy {
        from: BufferRange,
        into: BufferRange,
    },
    Fetch {
        from: BufferRange,
        data: Vec<u8>,
    },
    Read {
        inode: u64,
        offset: u64,
        into: BufferRange,
    },
    Write {
        inode: u64,
        offset: u64,
        from: BufferRange,
        crc32: Option<crc32fast::Hasher>,
    },
}

#[derive(Debug)]
struct Task {
    kind: Kind,
    bytes: u64,
    done: u64,
    scratch: Option<Vec<u8>>,
    on_worker: bool,
    void: bool,
}

/// What a step came to.
pub enum Step {
    Nothing,
    /// It was looked at, and goes on waiting: for a thaw, or for an answer by message.
    Waits,
    /// For a worker.
    Work(EffectId, Work),
    Finished(EffectId, Outcome),
}

/// All of it.
#[derive(Debug, Default)]
pub struct Bulk {
    tasks: BTreeMap<EffectId, Task>,
    ready: VecDeque<EffectId>,
    waiting: Vec<EffectId>,
    /// They hold nothing, and go on when their VM is thawed.
    frozen: Vec<EffectId>,
}

enum Fault {
    Ends(Outcome),
    Waits,
}

impl Bulk {
    pub fn is_ready(&self) -> bool {
        !self.ready.is_empty()
    }
    pub fn ready(&self) -> usize {
        self.ready.len()
    }
    pub fn has(&self, id: EffectId) -> bool {
        self.tasks.contains_key(&id)
    }

    pub fn sessions(&self) -> BTreeSet<u64> {
        self.ready
            .iter()
            .filter_map(|id| self.tasks.get(id))
            .flat_map(|task| task.kind.tokens())
            .map(|token| token.session)
            .collect()
    }

    pub fn copy(
        &mut self,
        sessions: &mut Sessions,
        id: EffectId,
        from: BufferRange,
        into: BufferRange,
    ) -> Result<(), Outcome> {
        check(sessions, from, Direction::FromGuest, FailedAt::From)?;
        check(sessions, into, Direction::IntoGuest, FailedAt::Into)?;
        let bytes = from.bytes.min(into.bytes);
        self.begin(id, bytes, Kind::Copy { from, into });
        Ok(())
    }

    pub fn fetch(&mut self, sessions: &mut Sessions, id: EffectId, from: BufferRange) -> Result<(), Outcome> {
        check(sessions, from, Direction::FromGuest, FailedAt::From)?;
        let data = Vec::new();
        self.begin(id, from.bytes, Kind::Fetch { from, data });
        Ok(())
    }

    pub fn read(
        &mut self,
        sessions: &mut Sessions,
        id: EffectId,
        inode: u64,
        offset: u64,
        into: BufferRange,
    ) -> Result<(), Outcome> {
        check(sessions, into, Direction::IntoGuest, FailedAt::Into)?;
        self.begin(id, into.bytes, Kind::Read { inode, offset, into });
        Ok(())
    }

    pub fn write(
        &mut self,
        sessions: &mut Sessions,
        id: EffectId,
        inode: u64,
        offset: u64,
        from: BufferRange,
        checksum: bool,
    ) -> Result<(), Outcome> {
        check(sessions, from, Direction::FromGuest, FailedAt::From)?;
        let crc32 = checksum.then(crc32fast::Hasher::new);
        let kind = Kind::Write {
            inode,
            offset,
            from,
            crc32,
        };
        self.begin(id, from.bytes, kind);
        Ok(())
    }

    pub fn void(&mut self, token: Token) {
        self.void_where(|other| other == token);
    }

    pub fn void_channel(&mut self, session: u64, channel: Option<Channel>) {
        self.void_where(|token| {
            token.session == session && channel.is_none_or(|channel| token.channel == channel)
        });
    }

    fn void_where(&mut self, is_void: impl Fn(Token) -> bool) {
        for (id, task) in &mut self.tasks {
            if !task.void && task.kind.tokens().into_iter().any(&is_void) {
                task.void = true;
                self.ready.push_back(*id);
            }
        }
    }

    pub fn handle_memory(&mut self) {
        self.ready.extend(self.waiting.drain(..));
    }

    /// A session was touched: who waits for its thaw, or for its messages, tries again. Where a map was taken away, what was asked for in it has
    /// failed, and no answer will say so; where it is frozen, who waits for its messages lets go of it.
    pub fn look_again(&mut self, session: u64) {
        let tasks = &self.tasks;
        let concerned = |id: &mut EffectId| {
            let task = tasks.get(id);
            task.is_none_or(|task| task.kind.tokens().iter().any(|token| token.session == session))
        };
        self.ready.extend(self.frozen.extract_if(.., concerned));
        self.ready.extend(self.waiting.extract_if(.., concerned));
    }

    pub fn handle_worker(&mut self, id: EffectId, done: Done) -> Option<Outcome> {
        let task = self.tasks.get_mut(&id)?;
        task.on_worker = false;
        match done {
            Done::Outcome(outcome) => {
                self.tasks.remove(&id);
                return Some(outcome);
            }
            Done::Stored { bytes, crc32 } => {
                task.done += bytes;
                if let (Kind::Write { crc32: Some(sum), .. }, Some(crc32)) = (&mut task.kind, crc32) {
                    sum.combine(&crc32fast::Hasher::new_with_initial_len(crc32, bytes));
                }
            }
            Done::Scratch(data) => {
                if data.is_empty() {
                    task.bytes = task.done;
                } else {
                    task.scratch = Some(data);
                }
            }
            Done::Revoked | Done::Opened { .. } => {}
        }
        self.ready.push_back(id);
        None
    }

    /// One step of the task whose turn it is.
    pub fn step(&mut self, sessions: &mut Sessions) -> Step {
        let Some(id) = self.ready.pop_front() else {
            return Step::Nothing;
        };
        // (Who ended while it waited is still in that list.)
        let Some(task) = self.tasks.get_mut(&id) else {
            return Step::Waits;
        };
        if task.on_worker {
            // Told void meanwhile: it ends when its worker is back.
            return Step::Nothing;
        }
        if task.void {
            self.tasks.remove(&id);
            return Step::Finished(id, Outcome::failed(Status::CANCELLED, FailedAt::Into));
        }
        if task.done >= task.bytes {
            let outcome = task.outcome();
            self.tasks.remove(&id);
            return Step::Finished(id, outcome);
        }
        if task
            .kind
            .tokens()
            .iter()
            .any(|token| is_frozen(sessions, token.session))
        {
            self.frozen.push(id);
            return Step::Waits;
        }
        match task.piece(sessions) {
            Ok(Some(work)) => {
                task.on_worker = true;
                Step::Work(id, work)
            }
            Ok(None) => {
                self.ready.push_back(id);
                Step::Nothing
            }
            Err(Fault::Waits) => {
                self.waiting.push(id);
                Step::Waits
            }
            Err(Fault::Ends(outcome)) => {
                self.tasks.remove(&id);
                Step::Finished(id, outcome)
            }
        }
    }

    fn begin(&mut self, id: EffectId, bytes: u64, kind: Kind) {
        let task = Task {
            kind,
            bytes,
            done: 0,
            scratch: None,
            on_worker: false,
            void: false,
        };
        self.tasks.insert(id, task);
        self.ready.push_back(id);
    }
}

impl Task {
    fn outcome(&mut self) -> Outcome {
        match &mut self.kind {
            Kind::Copy { .. } | Kind::Read { .. } => Outcome::Bytes(self.done),
            Kind::Fetch { data, .. } => Outcome::Data(std::mem::take(data)),
            Kind::Write { crc32, .. } => Outcome::Written {
                bytes: self.done,
                crc32: crc32.take().map(crc32fast::Hasher::finalize),
            },
        }
    }

    /// Moves a piece, or says what a worker is to do.
    fn piece(&mut self, sessions: &mut Sessions) -> Result<Option<Work>, Fault> {
        let bytes = (self.bytes - self.done).min(PIECE_BYTES_MAX);
        match &mut self.kind {
            Kind::Copy { from, into } => {
                if self.scratch.is_none() {
                    self.scratch = Some(get(sessions, *from, self.done, bytes)?);
                }
                let data = self.scratch.as_deref().unwrap_or_default();
                put(sessions, *into, self.done, data, FailedAt::Into)?;
                self.scratch = None;
                self.done += bytes;
            }
            Kind::Fetch { from, data } => {
                data.extend(get(sessions, *from, self.done, bytes)?);
                self.done += bytes;
            }
            Kind::Read { inode, offset, into } => {
                let Some(data) = self.scratch.as_deref() else {
                    return Ok(Some(Work::ReadPiece {
                        inode: *inode,
                        offset: *offset + self.done,
                        bytes,
                    }));
                };
                put(sessions, *into, self.done, data, FailedAt::Into)?;
                self.done += data.len() as u64;
                self.scratch = None;
            }
            Kind::Write {
                inode,
                offset,
                from,
                crc32,
            } => {
                let (inode, offset, checksum) = (*inode, *offset + self.done, crc32.is_some());
                let session = sessions
                    .map
                    .get_mut(&from.token.session)
                    .ok_or_else(|| bad_address(FailedAt::From))?;
                let segments = session
                    .segments(from.token, from.offset, from.bytes)
                    .map_err(|status| Fault::Ends(Outcome::failed(status, FailedAt::From)))?;
                if let Some(segments) = segments
                    && let Some(lease) = session
                        .memory
                        .lease(&segments, Direction::FromGuest)
                        .map_err(|error| memory_fault(error, FailedAt::From))?
                {
                    return Ok(Some(Work::WritePiece {
                        inode,
                        offset,
                        lease,
                        skip: self.done,
                        bytes,
                        checksum,
                    }));
                }
                let data = get(sessions, *from, self.done, bytes)?;
                return Ok(Some(Work::WriteData {
                    inode,
                    offset,
                    data,
                    checksum,
                }));
            }
        }
        Ok(None)
    }
}

impl Kind {
    fn tokens(&self) -> [Token; 2] {
        match self {
            Self::Copy { from, into } => [from.token, into.token],
            Self::Fetch { from: range, .. }
            | Self::Write { from: range, .. }
            | Self::Read { into: range, .. } => [range.token; 2],
        }
    }
}

fn is_frozen(sessions: &Sessions, session: u64) -> bool {
    let session = sessions.map.get(&session);
    session.is_some_and(|session| session.memory.is_frozen())
}

fn check(
    sessions: &mut Sessions,
    range: BufferRange,
    direction: Direction,
    at: FailedAt,
) -> Result<(), Outcome> {
    let stale = Outcome::failed(Status::STALE, at);
    if is_frozen(sessions, range.token.session) {
        // Looked up when it is thawed, and found to be wrong then.
        return Ok(());
    }
    let session = sessions.map.get_mut(&range.token.session).ok_or(stale)?;
    let segments = session
        .segments(range.token, range.offset, range.bytes)
        .map_err(|status| Outcome::failed(status, at))?;
    for (iova, bytes) in segments.unwrap_or_default() {
        session
            .memory
            .check(iova, bytes, direction)
            .map_err(|error| match memory_fault(error, at) {
                Fault::Ends(outcome) => outcome,
                Fault::Waits => Outcome::failed(Status::BUSY, at),
            })?;
    }
    Ok(())
}

fn get(sessions: &mut Sessions, range: BufferRange, at: u64, bytes: u64) -> Result<Vec<u8>, Fault> {
    let gone = || bad_address(FailedAt::From);
    let session = sessions.map.get_mut(&range.token.session).ok_or_else(gone)?;
    let segments = session
        .segments(range.token, range.offset + at, bytes)
        .map_err(|status| Fault::Ends(Outcome::failed(status, FailedAt::From)))?;
    let Some(segments) = segments else {
        let Some(vmgmt_device::rings::Buffer::Port { input, .. }) = session.rings.buffer(range.token) else {
            return Err(gone());
        };
        let start = (range.offset + at) as usize;
        return input
            .get(start..start + bytes as usize)
            .map(<[u8]>::to_vec)
            .ok_or_else(gone);
    };
    // All of it or nothing: what came is asked for again only when the rest has come too.
    let mut data = vec![0; bytes as usize];
    let (mut rest, mut pending) = (&mut data[..], false);
    let mut parts = Vec::new();
    for (iova, bytes) in &segments {
        parts.push((*iova, vec![0; *bytes as usize]));
    }
    for (iova, part) in &mut parts {
        match session.memory.read(*iova, part) {
            Ok(()) => {}
            Err(MemoryError::Pending) => pending = true,
            Err(error) => return Err(memory_fault(error, FailedAt::From)),
        }
        if pending {
            break;
        }
    }
    if pending {
        return Err(Fault::Waits);
    }
    for (_, part) in parts {
        let (now, later) = rest.split_at_mut(part.len());
        now.copy_from_slice(&part);
        rest = later;
    }
    Ok(data)
}

fn put(
    sessions: &mut Sessions,
    range: BufferRange,
    at: u64,
    from: &[u8],
    failed_at: FailedAt,
) -> Result<(), Fault> {
    let gone = || bad_address(failed_at);
    let session = sessions.map.get_mut(&range.token.session).ok_or_else(gone)?;
    let segments = session
        .segments(range.token, range.offset + at, from.len() as u64)
        .map_err(|status| Fault::Ends(Outcome::failed(status, failed_at)))?;
    let Some(segments) = segments else {
        return if session.rings.port_write(range.token, range.offset + at, from) {
            Ok(())
        } else {
            Err(gone())
        };
    };
    let mut rest = from;
    for (iova, bytes) in segments {
        let (now, later) = rest.split_at(bytes as usize);
        rest = later;
        session
            .memory
            .write_buffer(iova, now)
            .map_err(|error| memory_fault(error, failed_at))?;
    }
    Ok(())
}

const fn bad_address(at: FailedAt) -> Fault {
    Fault::Ends(Outcome::failed(Status::BAD_ADDRESS, at))
}

fn memory_fault(error: MemoryError, at: FailedAt) -> Fault {
    match error {
        MemoryError::Pending => Fault::Waits,
        MemoryError::Quiet => Fault::Ends(Outcome::failed(Status::NOT_READY, at)),
        _ => bad_address(at),
    }
}
