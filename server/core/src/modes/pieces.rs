//! WORKSHOP file: the bytes of a stream: which piece is copied next, and what a copied piece ends.
//!
//! In: streams with something to move, outcomes of copies. Out: copies, answers. One piece at a time for each stream, so that streams take turns.

use super::coverage::combine;
use super::offers::{Transfers, reply};
use super::streams::{Failure, Finish, Party, Piece, Side, Stream};
use crate::effect::{BufferRange, Effect, FailedAt, Outcome};
use crate::effects::Continuation;
use crate::interface::ControlReply;
use crate::kept::Change;
use crate::limits::{COPY_PIECE_BYTES_MAX, PROGRESS_INTERVAL_NS};
use crate::office::{Office, failed};
use std::collections::VecDeque;
use vmgmt_abi::Status;
use vmgmt_abi::ring::completion_flag;
use vmgmt_device::rings::Answer;

impl Transfers {
    /// Moves what can be moved.
    pub fn pump(&mut self, office: &mut Office, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        if stream.moving || stream.failure.is_some() || stream.half.is_some() {
            return;
        }
        if stream.ended() {
            self.at_end(office, id);
            return;
        }
        if stream.awaits_operator() {
            return;
        }
        // Into the operator's file an undead core's worker may still write what the sender's buffer holds by then.
        if matches!(stream.target, Party::Host(_)) && office.effects.is_haunted(stream.vm()) {
            return;
        }
        let (write, read) = (stream.writes.front().copied(), stream.reads.front().copied());
        let effect = match (stream.source, stream.target, write, read) {
            (Party::Vm { .. }, Party::Vm { .. }, Some(write), Some(read)) => {
                let bytes = (write.bytes - write.done)
                    .min(read.bytes - read.done)
                    .min(COPY_PIECE_BYTES_MAX);
                Effect::Copy {
                    from: part(write, bytes),
                    into: part(read, bytes),
                }
            }
            (Party::Host(file), _, _, Some(read)) if stream.moved < stream.size => {
                let bytes = (read.bytes - read.done)
                    .min(stream.size - stream.moved)
                    .min(COPY_PIECE_BYTES_MAX);
                Effect::Read {
                    slot: file.slot,
                    offset: stream.moved,
                    into: part(read, bytes),
                }
            }
            (_, Party::Host(file), Some(write), _) => {
                let bytes = (write.bytes - write.done).min(COPY_PIECE_BYTES_MAX);
                Effect::Write {
                    slot: file.slot,
                    offset: stream.moved,
                    from: part(write, bytes),
                    checksum: true,
                }
            }
            _ => return,
        };
        stream.moving = true;
        let vm = stream.vm();
        office.effect(vm, effect, Continuation::Piece { stream: id });
    }

    /// Moves what can be moved, of all streams.
    pub fn pump_all(&mut self, office: &mut Office) {
        for id in self.streams.keys().copied().collect::<Vec<_>>() {
            self.pump(office, id);
        }
    }

    fn at_end(&mut self, office: &mut Office, id: u64) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        let Some(finish) = stream.finish else { return };
        if let Party::Host(_) = stream.target {
            let good = finish.crc32.is_none_or(|crc32| crc32 == stream.crc32);
            let status = if good { Status::OK } else { Status::INTEGRITY };
            self.conclude(office, id, status.0, None);
            return;
        }
        if let Some(read) = stream.reads.pop_front() {
            stream.end_read = true;
            let answer = Answer {
                flags: completion_flag::END,
                detail: u32::from(finish.crc32.is_some()),
                ..Answer::ok_extra(0, u64::from(finish.crc32.unwrap_or(0)))
            };
            let ended = finish
                .token
                .and_then(|token| Some((token, office.flights.get(&token)?.tag)));
            if stream.is_kept() {
                let told = Change::EndRead {
                    stream: id,
                    finish: ended,
                };
                office.settle(read.token, answer, Vec::new(), told);
            } else {
                office.end(read.token, answer);
            }
            for piece in stream.reads.drain(..) {
                office.end(piece.token, Answer::failed(Status::ENDED));
            }
        }
    }

    /// A piece was copied, or not.
    pub fn piece_done(&mut self, office: &mut Office, id: u64, outcome: Outcome) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        stream.moving = false;
        let (bytes, crc32) = match outcome {
            Outcome::Bytes(bytes) if bytes > 0 => (bytes, 0),
            Outcome::Written {
                bytes,
                crc32: Some(crc32),
            } if bytes > 0 => (bytes, crc32),
            Outcome::Failed { status, at, .. } => return self.piece_failed(office, id, status, at),
            // The host's file has become shorter, or a disk took nothing.
            _ => return self.piece_failed(office, id, Status::IO_ERROR.0, FailedAt::File),
        };
        // A shell that reports more than was asked must not break the count.
        let left = |queue: &VecDeque<Piece>| queue.front().map_or(u64::MAX, |piece| piece.bytes - piece.done);
        let bytes = bytes.min(left(&stream.writes)).min(left(&stream.reads));
        stream.moved += bytes;
        if matches!(stream.target, Party::Host(_)) {
            stream.crc32 = combine(stream.crc32, crc32, bytes);
        }
        if let Party::Vm { vm, .. } = stream.source {
            office.bytes_from(vm, bytes);
        }
        if let Party::Vm { vm, .. } = stream.target {
            office.bytes_to(vm, bytes);
        }
        for queue in [&mut stream.writes, &mut stream.reads] {
            if let Some(piece) = queue.front_mut() {
                piece.done += bytes;
            }
        }
        if stream.failure.is_none() {
            advance_write(office, id, stream);
            advance_read(office, id, stream);
            tell_progress(office, stream);
            self.pump(office, id);
        } else {
            self.finish_failed(office, id);
        }
    }

    fn piece_failed(&mut self, office: &mut Office, id: u64, status: u16, at: FailedAt) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        let guilty = match (stream.source, stream.target, at) {
            (Party::Host(_), _, FailedAt::File) => Side::Source,
            (_, Party::Host(_), FailedAt::File) => Side::Target,
            // With a file at one end there is one buffer, wherever the shell says it is.
            (Party::Host(_), ..) => Side::Target,
            (_, Party::Host(_), _) => Side::Source,
            (.., FailedAt::Into) => Side::Target,
            (..) => Side::Source,
        };
        let (mine, other) = (Status::CANCELLED.0, Status::PEER_ABSENT.0);
        // The submission whose buffer it was says why; what else waits there is cancelled.
        let failure = if guilty == Side::Source {
            if let Some(piece) = stream.writes.pop_front() {
                office.end(
                    piece.token,
                    Answer {
                        result: piece.done,
                        ..failed(status)
                    },
                );
            }
            let source = if stream.host_source().is_some() {
                status
            } else {
                mine
            };
            Failure {
                source,
                target: other,
            }
        } else {
            if let Some(piece) = stream.reads.pop_front() {
                office.end(piece.token, failed(status));
            }
            let target = if stream.host().is_some() && stream.host_source().is_none() {
                status
            } else {
                mine
            };
            Failure {
                source: other,
                target,
            }
        };
        self.fail(office, id, failure);
    }

    /// The checksum of a file that is pushed.
    pub fn push_checksum(&mut self, office: &mut Office, id: u64, outcome: &Outcome) {
        let Some(stream) = self.streams.get_mut(&id) else {
            return;
        };
        match outcome {
            Outcome::Checksum { bytes, crc32 } if *bytes == stream.size => {
                stream.finish = Some(Finish {
                    token: None,
                    bytes: stream.size,
                    crc32: Some(*crc32),
                });
                if stream.is_kept() {
                    let crc32 = *crc32;
                    office.change(Change::HostSum { stream: id, crc32 });
                }
                self.pump(office, id);
            }
            _ => {
                let failure = Failure {
                    source: Status::IO_ERROR.0,
                    target: Status::PEER_ABSENT.0,
                };
                self.fail(office, id, failure);
            }
        }
    }
}

fn part(piece: Piece, bytes: u64) -> BufferRange {
    BufferRange {
        token: piece.token,
        offset: piece.done,
        bytes,
    }
}

/// Ends the first write, if it is moved whole or given up.
pub(super) fn advance_write(office: &mut Office, id: u64, stream: &mut Stream) {
    let Some(piece) = stream.writes.front().copied() else {
        return;
    };
    let ending = office.flights.get(&piece.token).and_then(|flight| flight.ending);
    let answer = if piece.done >= piece.bytes {
        Answer::ok(piece.bytes)
    } else if let Some(status) = ending {
        stream.taken -= piece.bytes - piece.done;
        Answer {
            result: piece.done,
            ..failed(status)
        }
    } else {
        return;
    };
    stream.writes.pop_front();
    end_write(office, id, stream, piece, answer);
}

/// Ends a write that is not in the queue any more.
pub(super) fn end_write(office: &mut Office, id: u64, stream: &Stream, piece: Piece, answer: Answer) {
    if !stream.is_kept() {
        office.end(piece.token, answer);
        return;
    }
    let sent = if stream.host().is_some() {
        Change::HostMoved {
            stream: id,
            bytes: piece.done,
            crc32: stream.crc32,
        }
    } else {
        Change::Sent {
            stream: id,
            bytes: piece.done,
            into: Stream::half_moved(&stream.reads),
        }
    };
    office.settle(piece.token, answer, Vec::new(), sent);
}

/// Ends the first read, if it is full, given up, or has something and nothing more is there.
pub(super) fn advance_read(office: &mut Office, id: u64, stream: &mut Stream) {
    let more = if stream.host_source().is_some() {
        stream.moved < stream.size
    } else {
        !stream.writes.is_empty()
    };
    let Some(piece) = stream.reads.front().copied() else {
        return;
    };
    let ending = office
        .flights
        .get(&piece.token)
        .is_none_or(|flight| flight.ending.is_some());
    if piece.done >= piece.bytes || (piece.done > 0 && !more) || ending {
        stream.reads.pop_front();
        end_read(office, id, stream, piece, Answer::ok(piece.done));
    }
}

/// Ends a read that is not in the queue any more.
pub(super) fn end_read(office: &mut Office, id: u64, stream: &Stream, piece: Piece, answer: Answer) {
    if !stream.is_kept() {
        office.end(piece.token, answer);
        return;
    }
    let received = if stream.host().is_some() {
        Change::HostMoved {
            stream: id,
            bytes: piece.done,
            crc32: 0,
        }
    } else {
        Change::Received {
            stream: id,
            bytes: piece.done,
            from: Stream::half_moved(&stream.writes),
        }
    };
    office.settle(piece.token, answer, Vec::new(), received);
}

fn tell_progress(office: &mut Office, stream: &mut Stream) {
    if let Some(file) = stream.host()
        && file.is_attached()
        && office.now.since_ns(stream.progress) >= PROGRESS_INTERVAL_NS
    {
        stream.progress = office.now;
        let progress = ControlReply::Progress {
            bytes: stream.moved,
            total: stream.size,
        };
        reply(office, file.client, file.id, progress, false);
    }
}
