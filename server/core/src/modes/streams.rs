//! WORKSHOP file: streams: bytes of one party go to another in order, in pieces of at most 1 MiB, each copied once.
//!
//! In: STREAM_* submissions, outcomes of copies. Out: copies, answers. It never sees the bytes.

use super::offers::{HostFile, Transfers, reply, reply_failed};
use super::{Submitted, Uses, Verdict};
use crate::effect::Effect;
use crate::effects::Continuation;
use crate::interface::ControlReply;
use crate::office::{Office, Wait, failed, input_bytes, room};
use crate::refusal::Refusal;
use serde::{Deserialize, Serialize};
use std::collections::VecDeque;
use vmgmt_abi::file::SIZE_UNKNOWN;
use vmgmt_abi::ring::flag;
use vmgmt_abi::{Opcode, Status};
use vmgmt_device::Tick;
use vmgmt_device::rings::{Answer, Fetched, Token};

/// Which end of a stream.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Side {
    Source,
    Target,
}

/// Who is at an end.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Party {
    /// `open`: the handle was not closed yet.
    Vm {
        vm: u64,
        session: u64,
        handle: u64,
        open: bool,
    },
    Host(HostFile),
}

/// A STREAM_WRITE or STREAM_READ, with the bytes of it that are moved.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Piece {
    pub token: Token,
    pub bytes: u64,
    pub done: u64,
}

/// STREAM_END, as the sender said it (or the host's file says it).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finish {
    pub token: Option<Token>,
    pub crc32: Option<u32>,
}

/// A stream failed: what each side is told.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Failure {
    pub source: u16,
    pub target: u16,
}

/// A stream.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Stream {
    pub source: Party,
    pub target: Party,
    /// Declared bytes, or `SIZE_UNKNOWN`.
    pub size: u64,
    pub writes: VecDeque<Piece>,
    pub reads: VecDeque<Piece>,
    /// A piece is being copied, from and into the first write and read.
    pub moving: bool,
    /// Bytes copied.
    pub moved: u64,
    /// Bytes of all writes taken.
    pub taken: u64,
    pub finish: Option<Finish>,
    /// The reader was told the end.
    pub end_read: bool,
    pub failure: Option<Failure>,
    /// Of the bytes moved, where the host is the target.
    pub crc32: u32,
    /// When the operator was last told.
    pub progress: Tick,
}

impl Stream {
    pub(super) fn vm(&self) -> u64 {
        match (self.source, self.target) {
            (Party::Vm { vm, .. }, _) | (_, Party::Vm { vm, .. }) => vm,
            _ => 0,
        }
    }
    pub(super) fn party(&self, side: Side) -> Party {
        if side == Side::Source {
            self.source
        } else {
            self.target
        }
    }
    pub(super) fn ended(&self) -> bool {
        self.finish.is_some()
            && self.writes.is_empty()
            && !self.moving
            && (self.host_source().is_none() || self.moved == self.size)
    }
    pub(super) fn host_source(&self) -> Option<HostFile> {
        match self.source {
            Party::Host(file) => Some(file),
            Party::Vm { .. } => None,
        }
    }
    pub(super) fn host(&self) -> Option<HostFile> {
        match (self.source, self.target) {
            (Party::Host(file), _) | (_, Party::Host(file)) => Some(file),
            _ => None,
        }
    }
}

impl Transfers {
    /// Both sides agreed.
    pub fn start(&mut self, office: &mut Office, source: Party, target: Party, size: u64) {
        let id = office.handle();
        for (side, party) in [(Side::Source, source), (Side::Target, target)] {
            if let Party::Vm { session, handle, .. } = party {
                self.ends.insert(handle, (id, side));
                if let Some(session) = office.sessions.get_mut(&session) {
                    session.handles.insert(handle);
                }
            }
        }
        let stream = Stream {
            source,
            target,
            size,
            writes: VecDeque::new(),
            reads: VecDeque::new(),
            moving: false,
            moved: 0,
            taken: 0,
            finish: None,
            end_read: false,
            failure: None,
            crc32: 0,
            progress: office.now,
        };
        if let Some(file) = stream.host_source() {
            let effect = Effect::Checksum {
                slot: file.slot,
                offset: 0,
                bytes: size,
            };
            office.effect(stream.vm(), effect, Continuation::PushChecksum { stream: id });
        }
        self.streams.insert(id, stream);
    }

    /// STREAM_*, and CLOSE of a stream.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn stream_submit(&mut self, office: &mut Office, fetched: &Fetched) -> Submitted {
        let &(id, side) = self.ends.get(&fetched.handle).ok_or(Refusal::Stale)?;
        let stream = self.streams.get_mut(&id).ok_or(Refusal::Stale)?;
        if !matches!(stream.party(side), Party::Vm { session, .. } if session == fetched.token.session) {
            return Err(Refusal::Stale);
        }
        if fetched.opcode == Opcode::CLOSE {
            Uses {
                handle: true,
                ..Uses::default()
            }
            .check(fetched)?;
            self.close(office, fetched.handle);
            return Ok(Verdict::Done(Answer::ok(0)));
        }
        let wanted = match fetched.opcode {
            Opcode::STREAM_WRITE | Opcode::STREAM_END => Side::Source,
            Opcode::STREAM_READ | Opcode::STREAM_CONFIRM => Side::Target,
            _ => return Err(Refusal::HandleKind),
        };
        if side != wanted {
            return Err(Refusal::HandleKind);
        }
        if let Some(failure) = stream.failure {
            let status = if side == Side::Source {
                failure.source
            } else {
                failure.target
            };
            let refusal = if status == Status::PEER_ABSENT.0 {
                Refusal::PeerAbsent
            } else {
                Refusal::StreamFailed
            };
            office.log_refusal(stream.vm(), refusal);
            return Ok(Verdict::Done(failed(status)));
        }
        match fetched.opcode {
            Opcode::STREAM_WRITE => write(office, id, stream, fetched)?,
            Opcode::STREAM_READ => read(office, id, stream, fetched)?,
            Opcode::STREAM_END => end(office, id, stream, fetched)?,
            _ => return self.confirm(office, id, fetched),
        }
        self.pump(office, id);
        // A write of no bytes is done before it began.
        if fetched.opcode == Opcode::STREAM_WRITE
            && !office.is_open(fetched.token)
            && input_bytes(fetched) == 0
        {
            return Ok(Verdict::Done(Answer::ok(0)));
        }
        Ok(Verdict::Open)
    }

    fn confirm(&mut self, office: &mut Office, id: u64, fetched: &Fetched) -> Submitted {
        Uses {
            handle: true,
            argument: true,
            ..Uses::default()
        }
        .check(fetched)?;
        let status = u16::try_from(fetched.argument).map_err(|_| Refusal::Field)?;
        let Some(stream) = self.streams.get(&id) else {
            return Err(Refusal::Stale);
        };
        if status == Status::OK.0 && !stream.end_read {
            return Err(Refusal::Field);
        }
        if stream.end_read {
            self.conclude(office, id, status);
        } else {
            self.fail(
                office,
                id,
                Failure {
                    source: status,
                    target: Status::CANCELLED.0,
                },
            );
        }
        self.close(office, fetched.handle);
        Ok(Verdict::Done(Answer::ok(0)))
    }

    /// The receiver has spoken: both ends go.
    pub(super) fn conclude(&mut self, office: &mut Office, id: u64, status: u16) {
        let Some(stream) = self.streams.remove(&id) else {
            return;
        };
        if let Some(token) = stream.finish.and_then(|finish| finish.token) {
            let answer = if status == Status::OK.0 {
                Answer::ok(stream.taken)
            } else {
                failed(status)
            };
            office.end(token, answer);
        }
        for piece in &stream.reads {
            office.end(piece.token, Answer::failed(Status::ENDED));
        }
        for party in [stream.source, stream.target] {
            self.forget_end(office, party);
        }
        if let Some(file) = stream.host() {
            office.effect(
                stream.vm(),
                Effect::Close { slot: file.slot },
                Continuation::Nothing,
            );
            if status == Status::OK.0 {
                let crc32 = stream
                    .finish
                    .and_then(|finish| finish.crc32)
                    .unwrap_or(stream.crc32);
                let done = ControlReply::Transferred {
                    bytes: stream.moved,
                    crc32,
                };
                reply(office, file.client, file.id, done, true);
            } else {
                let text = format!("not transferred: {}", Status(status).describe());
                reply_failed(office, file.client, file.id, status, text);
            }
        }
    }

    fn forget_end(&mut self, office: &mut Office, party: Party) {
        if let Party::Vm {
            vm,
            session,
            handle,
            open,
        } = party
            && open
        {
            self.ends.remove(&handle);
            office.give_file(vm);
            if let Some(session) = office.sessions.get_mut(&session) {
                session.handles.remove(&handle);
            }
        }
    }

    /// One end is closed (or its session gone): the stream ends there.
    pub fn close(&mut self, office: &mut Office, handle: u64) {
        let Some(&(id, side)) = self.ends.get(&handle) else {
            return;
        };
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        let party = stream.party(side);
        let mine = if side == Side::Source {
            &mut stream.source
        } else {
            &mut stream.target
        };
        if let Party::Vm { open, .. } = mine {
            *open = false;
        }
        self.forget_end(office, party);
        let (gone, left) = (Status::CANCELLED.0, Status::PEER_ABSENT.0);
        let failure = if side == Side::Source {
            Failure {
                source: gone,
                target: left,
            }
        } else {
            Failure {
                source: left,
                target: gone,
            }
        };
        self.fail(office, id, failure);
    }

    /// Ends everything that waits on a stream, but what a copy is touching; that ends with the copy.
    pub fn fail(&mut self, office: &mut Office, id: u64, failure: Failure) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if stream.failure.is_none() {
            stream.failure = Some(failure);
            let kept = usize::from(stream.moving);
            for piece in stream.writes.split_off(kept.min(stream.writes.len())) {
                office.end(
                    piece.token,
                    Answer {
                        result: piece.done,
                        ..failed(failure.source)
                    },
                );
            }
            for piece in stream.reads.split_off(kept.min(stream.reads.len())) {
                office.end(piece.token, failed(failure.target));
            }
            if let Some(token) = stream.finish.and_then(|finish| finish.token) {
                office.end(token, failed(failure.source));
            }
        }
        self.finish_failed(office, id);
    }

    /// Once nothing is copied any more: the last submissions end, the host's file closes, and with no handle left the stream goes.
    pub(super) fn finish_failed(&mut self, office: &mut Office, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        let Some(failure) = stream.failure else { return };
        if stream.moving {
            return;
        }
        let vm = stream.vm();
        for piece in stream.writes.drain(..) {
            office.end(
                piece.token,
                Answer {
                    result: piece.done,
                    ..failed(failure.source)
                },
            );
        }
        for piece in stream.reads.drain(..) {
            office.end(piece.token, failed(failure.target));
        }
        let host = stream.host();
        let closed = |party: Party| !matches!(party, Party::Vm { open: true, .. });
        let (from, into) = (closed(stream.source), closed(stream.target));
        if let Some(file) = host
            && stream.progress != Tick::NEVER
        {
            // Told once.
            stream.progress = Tick::NEVER;
            let status = if matches!(stream.source, Party::Host(_)) {
                failure.source
            } else {
                failure.target
            };
            office.effect(vm, Effect::Close { slot: file.slot }, Continuation::Nothing);
            let text = format!("not transferred: {}", Status(status).describe());
            reply_failed(office, file.client, file.id, status, text);
        }
        if from && into {
            self.streams.remove(&id);
        }
    }

    /// A guest gives up a submission (or its deadline passed). Returns false when it must stay until its copy has ended.
    pub fn give_up(&mut self, office: &mut Office, id: u64, token: Token, status: u16) -> bool {
        let Some(stream) = self.streams.get_mut(&id) else {
            return true;
        };
        let first = |queue: &VecDeque<Piece>| queue.front().is_some_and(|piece| piece.token == token);
        if stream.moving && (first(&stream.writes) || first(&stream.reads)) {
            return false;
        }
        if let Some(finish) = stream
            .finish
            .as_mut()
            .filter(|finish| finish.token == Some(token))
        {
            finish.token = None;
        }
        if let Some(place) = stream.writes.iter().position(|piece| piece.token == token)
            && let Some(piece) = stream.writes.remove(place)
        {
            stream.taken -= piece.bytes - piece.done;
            office.end(
                token,
                Answer {
                    result: piece.done,
                    ..failed(status)
                },
            );
        }
        if let Some(place) = stream.reads.iter().position(|piece| piece.token == token)
            && let Some(piece) = stream.reads.remove(place)
        {
            // Bytes that are in must not be lost.
            office.end(
                token,
                if piece.done > 0 {
                    Answer::ok(piece.done)
                } else {
                    failed(status)
                },
            );
        }
        office.end(token, failed(status));
        self.pump(office, id);
        true
    }

    /// A submission is void: its part of the stream is lost, and so is the stream, unless nothing had come of it.
    pub fn void(&mut self, office: &mut Office, id: u64, token: Token) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if !stream.moving
            && let Some(place) = stream
                .reads
                .iter()
                .position(|piece| piece.token == token && piece.done == 0)
        {
            stream.reads.remove(place);
            return;
        }
        let is_read = stream.reads.iter().any(|piece| piece.token == token);
        let (mine, other) = (Status::CANCELLED.0, Status::PEER_ABSENT.0);
        let failure = if is_read {
            Failure {
                source: other,
                target: mine,
            }
        } else {
            Failure {
                source: mine,
                target: other,
            }
        };
        self.fail(office, id, failure);
    }

    /// The operator of a transfer is gone.
    pub fn streams_of_client_gone(&mut self, office: &mut Office, client: u64) {
        let of_it = |stream: &Stream| stream.host().is_some_and(|file| file.client == client);
        let ids: Vec<u64> = self
            .streams
            .iter()
            .filter(|(_, stream)| of_it(stream))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.fail(
                office,
                id,
                Failure {
                    source: Status::PEER_ABSENT.0,
                    target: Status::PEER_ABSENT.0,
                },
            );
        }
    }
}

fn write(office: &mut Office, id: u64, stream: &mut Stream, fetched: &Fetched) -> Result<(), Refusal> {
    Uses {
        handle: true,
        ..Uses::default()
    }
    .check(fetched)?;
    if stream.finish.is_some() {
        return Err(Refusal::StreamEnded);
    }
    let bytes = input_bytes(fetched);
    let taken = stream.taken.checked_add(bytes).ok_or(Refusal::Field)?;
    if stream.size != SIZE_UNKNOWN && taken > stream.size {
        return Err(Refusal::Field);
    }
    if bytes > 0 {
        stream.taken = taken;
        stream.writes.push_back(Piece {
            token: fetched.token,
            bytes,
            done: 0,
        });
        office.park(fetched, Wait::StreamWrite(id));
    }
    Ok(())
}

fn read(office: &mut Office, id: u64, stream: &mut Stream, fetched: &Fetched) -> Result<(), Refusal> {
    Uses {
        handle: true,
        ..Uses::default()
    }
    .check(fetched)?;
    if stream.end_read {
        return Err(Refusal::StreamEnded);
    }
    let bytes = room(fetched.token, fetched.data_bytes);
    if bytes == 0 {
        return Err(Refusal::BufferSmall);
    }
    stream.reads.push_back(Piece {
        token: fetched.token,
        bytes,
        done: 0,
    });
    office.park(fetched, Wait::StreamRead(id));
    Ok(())
}

fn end(office: &mut Office, id: u64, stream: &mut Stream, fetched: &Fetched) -> Result<(), Refusal> {
    Uses {
        handle: true,
        offset: true,
        argument: true,
        flags: flag::CHECK,
        ..Uses::default()
    }
    .check(fetched)?;
    if stream.finish.is_some() {
        return Err(Refusal::StreamEnded);
    }
    let check = fetched.flags & flag::CHECK != 0;
    let crc32 = u32::try_from(fetched.argument).map_err(|_| Refusal::Field)?;
    if fetched.offset != stream.taken
        || (stream.size != SIZE_UNKNOWN && stream.size != stream.taken)
        || (!check && crc32 != 0)
    {
        return Err(Refusal::Field);
    }
    stream.finish = Some(Finish {
        token: Some(fetched.token),
        crc32: check.then_some(crc32),
    });
    office.park(fetched, Wait::StreamEnd(id));
    Ok(())
}
