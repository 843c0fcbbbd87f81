//! WORKSHOP file: the submissions of a stream: taken into its queues, or refused.
//!
//! In: STREAM_WRITE, STREAM_READ, STREAM_END, STREAM_CONFIRM, CLOSE. Out: queues (`pieces.rs` empties them), answers. It never sees the bytes.

use super::offers::Transfers;
use super::pieces::{advance_read, advance_write};
use super::streams::{Failure, Finish, Party, Piece, Side, Stream};
use super::{Submitted, Uses, Verdict};
use crate::kept::Settled;
use crate::office::{Office, Wait, failed, input_bytes, room};
use crate::refusal::Refusal;
use vmgmt_abi::file::SIZE_UNKNOWN;
use vmgmt_abi::ring::flag;
use vmgmt_abi::{Opcode, Status};
use vmgmt_device::rings::{Answer, Fetched};

impl Transfers {
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
            let confirmed = Settled {
                token: fetched.token,
                tag: fetched.tag,
                answer: Answer::ok(0),
                payload: Vec::new(),
                send: false,
            };
            self.conclude(office, id, status, Some(confirmed));
            return Ok(Verdict::Open);
        }
        let failure = Failure {
            source: status,
            target: Status::CANCELLED.0,
        };
        self.fail(office, id, failure);
        self.close(office, fetched.handle);
        Ok(Verdict::Done(Answer::ok(0)))
    }
}

fn write(office: &mut Office, id: u64, stream: &mut Stream, fetched: &Fetched) -> Result<(), Refusal> {
    Uses {
        handle: true,
        ..Uses::default()
    }
    .check(fetched)?;
    let bytes = input_bytes(fetched);
    let taken = stream.taken.checked_add(bytes).ok_or(Refusal::Field)?;
    // Of an earlier core life, an end may come again before what it ends.
    let before = |finish: Finish| fetched.again && taken <= finish.bytes;
    if !stream.finish.is_none_or(before) {
        return Err(Refusal::StreamEnded);
    }
    if stream.size != SIZE_UNKNOWN && taken > stream.size {
        return Err(Refusal::Field);
    }
    if bytes > 0 {
        stream.taken = taken;
        office.park(fetched, Wait::StreamWrite(id));
        let mut piece = Piece {
            token: fetched.token,
            bytes,
            done: 0,
        };
        match stream.begun(Side::Source, fetched.token) {
            None => stream.writes.push_back(piece),
            Some(done) => {
                piece.done = done.min(bytes);
                stream.writes.push_front(piece);
                advance_write(office, id, stream);
            }
        }
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
    office.park(fetched, Wait::StreamRead(id));
    let mut piece = Piece {
        token: fetched.token,
        bytes,
        done: 0,
    };
    match stream.begun(Side::Target, fetched.token) {
        None => stream.reads.push_back(piece),
        Some(done) => {
            piece.done = done.min(bytes);
            stream.reads.push_front(piece);
            advance_read(office, id, stream);
        }
    }
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
    let early = fetched.again && fetched.offset > stream.taken;
    if (fetched.offset != stream.taken && !early)
        || (stream.size != SIZE_UNKNOWN && stream.size != fetched.offset)
        || (!check && crc32 != 0)
    {
        return Err(Refusal::Field);
    }
    stream.finish = Some(Finish {
        token: Some(fetched.token),
        bytes: fetched.offset,
        crc32: check.then_some(crc32),
    });
    office.park(fetched, Wait::StreamEnd(id));
    Ok(())
}
