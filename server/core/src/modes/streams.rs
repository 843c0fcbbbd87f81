//! WORKSHOP file: streams: bytes of one party go to another in order, in pieces of at most 1 MiB, each copied once.
//!
//! In: STREAM_* submissions, outcomes of copies. Out: copies, answers. It never sees the bytes.

use super::hosted::{ask_checksum, tell};
use super::offers::{HostFile, Transfers};
use super::pieces::{end_read, end_write};
use crate::kept::{Change, KeptEnd, KeptStream, Settled};
use crate::office::{Office, failed};
use serde::{Deserialize, Serialize};
use std::cmp::Ordering;
use std::collections::VecDeque;
use vmgmt_abi::Status;
use vmgmt_device::Tick;
use vmgmt_device::rings::{Answer, Token};

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

impl From<KeptEnd> for Party {
    fn from(end: KeptEnd) -> Self {
        let KeptEnd {
            vm,
            session,
            handle,
            open,
        } = end;
        Self::Vm {
            vm,
            session,
            handle,
            open,
        }
    }
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
    /// Bytes of the whole.
    pub bytes: u64,
    pub crc32: Option<u32>,
}

/// A submission that was half moved when the core died: it goes on there when it comes again, and the stream with it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Half {
    pub side: Side,
    pub token: Option<Token>,
    /// Bytes of it that are moved.
    pub done: u64,
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
    pub half: Option<Half>,
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
    /// One of which nothing is moved.
    pub(super) fn new(source: Party, target: Party, size: u64, now: Tick) -> Self {
        Self {
            source,
            target,
            size,
            writes: VecDeque::new(),
            reads: VecDeque::new(),
            moving: false,
            half: None,
            moved: 0,
            taken: 0,
            finish: None,
            end_read: false,
            failure: None,
            crc32: 0,
            progress: now,
        }
    }
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
        let whole = |finish: Finish| match self.source {
            Party::Host(_) => self.moved == self.size,
            Party::Vm { .. } => self.taken >= finish.bytes,
        };
        self.finish.is_some_and(whole) && self.writes.is_empty() && !self.moving && self.half.is_none()
    }
    /// Whether it survives a core: one with an operator at an end does if it has a key.
    pub(super) fn is_kept(&self) -> bool {
        self.host().is_none_or(|file| file.key != 0)
    }
    /// The write, or read, that is half moved.
    pub(super) fn half_moved(queue: &VecDeque<Piece>) -> Option<Token> {
        queue
            .front()
            .filter(|piece| piece.done > 0)
            .map(|piece| piece.token)
    }
    /// How far a submission is that comes in: not at all, but for the half one of an earlier core life. `None`: it must come before others.
    pub(super) fn begun(&mut self, side: Side, token: Token) -> Option<u64> {
        let half = self.half.filter(|half| half.side == side)?;
        if half.token.is_some_and(|wanted| wanted != token) {
            return None;
        }
        self.half = None;
        Some(half.done)
    }
    pub(super) fn host_source(&self) -> Option<HostFile> {
        match self.source {
            Party::Host(file) => Some(file),
            Party::Vm { .. } => None,
        }
    }
    /// Whether its operator has not asked again yet.
    pub(super) fn awaits_operator(&self) -> bool {
        self.host().is_some_and(|file| !file.is_attached())
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
    pub fn start(&mut self, office: &mut Office, source: Party, target: Party, size: u64) -> u64 {
        let id = office.handle();
        for (side, party) in [(Side::Source, source), (Side::Target, target)] {
            if let Party::Vm { session, handle, .. } = party {
                self.ends.insert(handle, (id, side));
                if let Some(session) = office.sessions.get_mut(&session) {
                    session.handles.insert(handle);
                }
            }
        }
        let stream = Stream::new(source, target, size, office.now);
        ask_checksum(office, id, &stream);
        self.streams.insert(id, stream);
        id
    }

    /// Streams as the ledger has them, in a new core life.
    pub(super) fn furnish_streams(&mut self, office: &mut Office) {
        for (id, kept) in office.ledger.kept.streams.clone() {
            let KeptStream {
                source,
                target,
                size,
                written,
                read,
                into,
                from,
                end_read,
                finish: _,
                failure,
            } = kept;
            for (side, end) in [(Side::Source, source), (Side::Target, target)] {
                self.furnish_end(office, id, side, end);
            }
            let half = match written.cmp(&read) {
                Ordering::Less => Some((Side::Source, from, read - written)),
                Ordering::Equal => None,
                Ordering::Greater => Some((Side::Target, into, written - read)),
            };
            let stream = Stream {
                half: half.map(|(side, token, done)| Half { side, token, done }),
                moved: written.max(read),
                taken: written,
                end_read,
                failure,
                ..Stream::new(source.into(), target.into(), size, office.now)
            };
            self.streams.insert(id, stream);
        }
    }

    /// The handle of an end that is open, in a new core life.
    pub(super) fn furnish_end(&mut self, office: &mut Office, id: u64, side: Side, end: KeptEnd) {
        if !end.open {
            return;
        }
        self.ends.insert(end.handle, (id, side));
        if let Some(entry) = office.vm_mut(end.vm) {
            entry.open_files += 1;
        }
    }

    /// Half moved submissions that are meant will not come again: their streams fail.
    pub(super) fn void_halves(&mut self, office: &mut Office, is_meant: impl Fn(Token) -> bool) {
        let lost = self.streams.iter().filter_map(|(id, stream)| {
            let half = stream.half.filter(|half| half.token.is_some_and(&is_meant))?;
            stream.failure.is_none().then_some((*id, half.side))
        });
        let (mine, other) = (Status::CANCELLED.0, Status::PEER_ABSENT.0);
        for (id, side) in lost.collect::<Vec<_>>() {
            let (source, target) = if side == Side::Source {
                (mine, other)
            } else {
                (other, mine)
            };
            self.fail(office, id, Failure { source, target });
        }
    }

    /// The receiver has spoken: both ends go.
    pub(super) fn conclude(&mut self, office: &mut Office, id: u64, status: u16, confirmed: Option<Settled>) {
        let Some(stream) = self.streams.remove(&id) else {
            return;
        };
        let ended = stream.finish.and_then(|finish| finish.token);
        let ended = ended.and_then(|token| Some((token, office.flights.get(&token)?.tag)));
        // Perhaps it has not come again yet.
        let ended = ended.or_else(|| office.ledger.kept.streams.get(&id)?.finish);
        let ended = ended.map(|(token, tag)| Settled {
            token,
            tag,
            answer: if status == Status::OK.0 {
                Answer::ok(stream.taken)
            } else {
                failed(status)
            },
            payload: Vec::new(),
            send: false,
        });
        if let Some(file) = stream.host() {
            let crc32 = stream.finish.and_then(|finish| finish.crc32);
            let done = (stream.moved, crc32.unwrap_or(stream.crc32));
            tell(office, stream.vm(), file, status, done);
        }
        let now = confirmed.as_ref().map(|confirmed| confirmed.token);
        let settled = ended.into_iter().chain(confirmed).collect();
        office.settle_all(settled, now, Change::StreamGone { stream: id });
        for piece in &stream.reads {
            office.end(piece.token, Answer::failed(Status::ENDED));
        }
        for party in [stream.source, stream.target] {
            self.forget_end(office, party);
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
        if stream.is_kept() {
            office.change(Change::EndClosed { stream: id, side });
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
            if stream.is_kept() {
                office.change(Change::StreamFailed { stream: id, failure });
            }
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
            tell(office, vm, file, status, (0, 0));
        }
        if from && into && self.streams.remove(&id).is_some_and(|stream| stream.is_kept()) {
            office.change(Change::StreamGone { stream: id });
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
            let answer = Answer {
                result: piece.done,
                ..failed(status)
            };
            end_write(office, id, stream, piece, answer);
        }
        if let Some(place) = stream.reads.iter().position(|piece| piece.token == token)
            && let Some(piece) = stream.reads.remove(place)
        {
            // Bytes that are in must not be lost.
            let answer = if piece.done > 0 {
                Answer::ok(piece.done)
            } else {
                failed(status)
            };
            end_read(office, id, stream, piece, answer);
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
        let of_it = |stream: &Stream| {
            let file = stream.host();
            file.is_some_and(|file| file.is_attached() && file.client == client)
        };
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
