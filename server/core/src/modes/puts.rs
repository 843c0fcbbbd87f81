//! WORKSHOP file: puts. A target appears only complete: temporary file beside it, contents, checksum, rename.
//!
//! In: PUT, WRITE, COMMIT, CLOSE and outcomes. Out: effects, answers. It never knows where a share is.

use super::coverage::Coverage;
use super::file::{end_transfer, failure, granted};
use super::names::{self, SharePath};
use super::{Submitted, Uses, Verdict};
use crate::effect::{Effect, FailedAt, FileSlot, Identity, Outcome};
use crate::effects::{Continuation, range_in_file, whole};
use crate::limits::{FILE_OFFSET_MAX, PUT_GAPS_MAX};
use crate::office::{Office, Wait, failed, input_bytes, room};
use crate::refusal::Refusal;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vmgmt_abi::file::{SIZE_UNKNOWN, existing, put};
use vmgmt_abi::ring::flag;
use vmgmt_abi::{Opcode, Status};
use vmgmt_device::rings::{Answer, Fetched, Token};

/// A put whose temporary file is being made.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PutOpening {
    pub vm: u64,
    pub share: String,
    /// The target.
    pub path: String,
    pub temporary: String,
    /// Declared bytes, or `SIZE_UNKNOWN`.
    pub size: u64,
    pub existing: u64,
    /// Kept when it breaks off.
    pub resumable: bool,
}

impl PutOpening {
    fn key(&self) -> (String, String) {
        (self.share.clone(), self.temporary.clone())
    }
}

/// How far a COMMIT is.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Step {
    /// Writes are still under way, or nothing is.
    Start,
    /// The file gets the length that is to be checked.
    Truncating,
    /// This range is read back.
    Checking { start: u64, bytes: u64 },
    /// It gets its name: no way back.
    Naming,
}

/// A COMMIT under way.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Commit {
    pub token: Token,
    pub bytes: u64,
    pub crc32: Option<u32>,
    pub durable: bool,
    pub step: Step,
}

/// A put under way.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Put {
    pub what: PutOpening,
    /// `None`: its session is gone.
    pub session: Option<u64>,
    pub slot: FileSlot,
    pub identity: Identity,
    pub coverage: Coverage,
    /// Bytes the temporary file has at least.
    pub extent: u64,
    /// Effects under way.
    pub busy: u32,
    pub commit: Option<Commit>,
    /// CLOSE waits.
    pub closing: Option<Token>,
    /// The shell could not open it again after a restart.
    pub stale: bool,
}

/// All puts.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Puts {
    pub puts: BTreeMap<u64, Put>,
    /// (share, temporary name) of puts from their first effect to their last, with their handle.
    pub live: BTreeMap<(String, String), u64>,
}

impl Puts {
    /// Whether a handle is a put's.
    #[must_use]
    pub fn has(&self, handle: u64) -> bool {
        self.puts.contains_key(&handle)
    }

    /// PUT.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn put(&mut self, office: &mut Office, vm: u64, fetched: &Fetched) -> Submitted {
        Uses {
            offset: true,
            argument: true,
            meta: true,
            ..Uses::default()
        }
        .check(fetched)?;
        let argument = fetched.argument;
        let permission_bits = (argument >> put::PERMISSIONS_SHIFT) & 0x1ff;
        let set_permissions = argument & put::SET_PERMISSIONS != 0;
        if argument & !put::KNOWN != 0
            || argument & existing::MASK > existing::RENAME
            || (!set_permissions && permission_bits != 0)
            || (fetched.offset != SIZE_UNKNOWN && fetched.offset > FILE_OFFSET_MAX)
        {
            return Err(Refusal::Field);
        }
        let SharePath { share, path } = names::path_below(&fetched.meta)?;
        granted(office, vm, share, true)?;
        let what = PutOpening {
            vm,
            share: share.to_owned(),
            path: path.to_owned(),
            temporary: names::temporary(vm, path),
            size: fetched.offset,
            existing: argument & existing::MASK,
            resumable: argument & put::RESUME != 0,
        };
        if self.live.contains_key(&what.key()) {
            return Err(Refusal::PutBusy);
        }
        office.take_file(vm)?;
        let handle = office.handle();
        self.live.insert(what.key(), handle);
        let effect = Effect::CreateTemporary {
            share: what.share.clone(),
            target: what.path.clone(),
            temporary: what.temporary.clone(),
            resume: what.resumable,
            permissions: set_permissions.then(|| u32::try_from(permission_bits).unwrap_or(0)),
        };
        let then = Continuation::PutOpen {
            token: fetched.token,
            handle,
            put: Box::new(what),
        };
        office.park_effect(fetched, effect, false, then);
        Ok(Verdict::Open)
    }

    /// The temporary file is there, or not. Nobody may be there to take it.
    pub fn opened(
        &mut self,
        office: &mut Office,
        token: Token,
        handle: u64,
        what: PutOpening,
        outcome: Outcome,
    ) {
        let (slot, stat, identity) = match outcome {
            Outcome::Opened { slot, stat, identity } => (slot, stat, identity),
            other => {
                self.live.remove(&what.key());
                office.give_file(what.vm);
                office.end(token, failure(&other));
                return;
            }
        };
        let wanted = office.flights.contains_key(&token);
        let session = office.sessions.get_mut(&token.session).filter(|_| wanted);
        let put = Put {
            what,
            session: session.is_some().then_some(token.session),
            slot,
            identity,
            coverage: Coverage::default(),
            extent: stat.size,
            busy: 0,
            commit: None,
            closing: None,
            stale: false,
        };
        if let Some(session) = session {
            session.handles.insert(handle);
        }
        self.puts.insert(handle, put);
        office.end(token, Answer::ok_extra(handle, stat.size));
        self.advance(office, handle);
    }

    /// An operation on the handle of a put.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn submit(&mut self, office: &mut Office, fetched: &Fetched) -> Submitted {
        let token = fetched.token;
        let put = open_put(&mut self.puts, fetched)?;
        if fetched.opcode == Opcode::CLOSE {
            Uses {
                handle: true,
                ..Uses::default()
            }
            .check(fetched)?;
            put.closing = Some(token);
            office.park(fetched, Wait::Room);
            self.advance(office, fetched.handle);
            return Ok(Verdict::Open);
        }
        if put.stale {
            return Err(Refusal::Stale);
        }
        let slot = put.slot;
        let (effect, write) = match fetched.opcode {
            Opcode::WRITE => {
                Uses {
                    handle: true,
                    offset: true,
                    ..Uses::default()
                }
                .check(fetched)?;
                let bytes = input_bytes(fetched);
                range_in_file(fetched.offset, bytes)?;
                if bytes == 0 {
                    return Ok(Verdict::Done(Answer::ok(0)));
                }
                put.coverage.forget(fetched.offset, bytes);
                let effect = Effect::Write {
                    slot,
                    offset: fetched.offset,
                    from: whole(token, bytes),
                    checksum: true,
                };
                (effect, Some((fetched.offset, bytes)))
            }
            Opcode::FSYNC => {
                Uses {
                    handle: true,
                    ..Uses::default()
                }
                .check(fetched)?;
                (Effect::Sync { slot }, None)
            }
            Opcode::CHECKSUM => {
                Uses {
                    handle: true,
                    offset: true,
                    argument: true,
                    ..Uses::default()
                }
                .check(fetched)?;
                range_in_file(fetched.offset, fetched.argument)?;
                (
                    Effect::Checksum {
                        slot,
                        offset: fetched.offset,
                        bytes: fetched.argument,
                    },
                    None,
                )
            }
            _ => return Err(Refusal::HandleKind),
        };
        put.busy += 1;
        let then = Continuation::Put {
            token,
            handle: fetched.handle,
            write,
        };
        office.park_effect(fetched, effect, false, then);
        Ok(Verdict::Open)
    }

    /// An operation on a put ended.
    pub fn done(
        &mut self,
        office: &mut Office,
        token: Token,
        handle: u64,
        write: Option<(u64, u64)>,
        outcome: Outcome,
    ) {
        if let Some(put) = self.puts.get_mut(&handle) {
            put.busy = put.busy.saturating_sub(1);
            if let Some((offset, bytes)) = write {
                match &outcome {
                    Outcome::Written {
                        bytes: written,
                        crc32: Some(crc32),
                    } if *written == bytes => {
                        put.coverage.insert(offset, bytes, *crc32);
                    }
                    _ => put.coverage.forget(offset, bytes),
                }
                if let Outcome::Written { bytes: written, .. } = &outcome {
                    put.extent = put.extent.max(offset.saturating_add(*written));
                }
            }
        }
        end_transfer(office, token, outcome);
        self.advance(office, handle);
    }

    /// COMMIT.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn commit(&mut self, office: &mut Office, fetched: &Fetched) -> Submitted {
        let flags = flag::CHECK | flag::DURABLE;
        Uses {
            handle: true,
            offset: true,
            argument: true,
            flags,
            ..Uses::default()
        }
        .check(fetched)?;
        if fetched.again && !self.has(fetched.handle) {
            // Its first life may have given the file its name.
            return Ok(Verdict::Done(Answer::failed(Status::OUTCOME_UNKNOWN)));
        }
        let put = open_put(&mut self.puts, fetched)?;
        let check = fetched.flags & flag::CHECK != 0;
        let crc32 = u32::try_from(fetched.argument).map_err(|_| Refusal::Field)?;
        if put.stale {
            return Err(Refusal::Stale);
        }
        if (!check && crc32 != 0)
            || fetched.offset > FILE_OFFSET_MAX
            || (put.what.size != SIZE_UNKNOWN && put.what.size != fetched.offset)
        {
            return Err(Refusal::Field);
        }
        // What was written behind the new end is cut off.
        put.coverage.forget(fetched.offset, u64::MAX);
        put.commit = Some(Commit {
            token: fetched.token,
            bytes: fetched.offset,
            crc32: check.then_some(crc32),
            durable: fetched.flags & flag::DURABLE != 0,
            step: Step::Start,
        });
        office.park(fetched, Wait::Room);
        self.advance(office, fetched.handle);
        Ok(Verdict::Open)
    }

    /// A step of a COMMIT ended.
    pub fn committed(&mut self, office: &mut Office, handle: u64, outcome: Outcome) {
        let Some(put) = self.puts.get_mut(&handle) else {
            return;
        };
        put.busy = put.busy.saturating_sub(1);
        let Some(commit) = put.commit.as_mut() else { return };
        match (&commit.step, outcome) {
            (Step::Truncating, Outcome::Done) => {
                put.extent = commit.bytes;
                commit.step = Step::Start;
            }
            (Step::Checking { start, bytes }, Outcome::Checksum { bytes: found, crc32 })
                if *bytes == found =>
            {
                put.coverage.forget(*start, *bytes);
                put.coverage.insert(*start, *bytes, crc32);
                commit.step = Step::Start;
            }
            (Step::Naming, Outcome::Committed { path }) => {
                self.named(office, handle, &path);
                return;
            }
            (_, outcome) => {
                let token = commit.token;
                put.commit = None;
                office.end(token, failure(&outcome));
            }
        }
        self.advance(office, handle);
    }

    /// Does what is next for a put: a step of its COMMIT, or its end.
    fn advance(&mut self, office: &mut Office, handle: u64) {
        let Some(put) = self.puts.get_mut(&handle) else {
            return;
        };
        if put.busy > 0 {
            return;
        }
        let Some(commit) = put.commit.as_mut() else {
            if put.closing.is_some() || put.session.is_none() {
                let answer = put.closing.map(|token| (token, Status::OK.0));
                let keep = put.what.resumable;
                self.finish(office, handle, keep, answer);
            }
            return;
        };
        if !office.is_open(commit.token) {
            // Cancelled in time: the put is as it was.
            put.commit = None;
            self.advance(office, handle);
            return;
        }
        let (vm, slot) = (put.what.vm, put.slot);
        let effect = match commit.crc32 {
            Some(_) if put.extent < commit.bytes => {
                commit.step = Step::Truncating;
                Effect::Truncate {
                    slot,
                    bytes: commit.bytes,
                }
            }
            Some(wanted) => match check(&put.coverage, commit.bytes) {
                Ok(found) if found != wanted => {
                    let answer = Some((commit.token, Refusal::Checksum.status().0));
                    office.log_refusal(vm, Refusal::Checksum);
                    self.finish(office, handle, false, answer);
                    return;
                }
                Ok(_) => naming(&put.what, slot, commit),
                Err((start, bytes)) => {
                    commit.step = Step::Checking { start, bytes };
                    Effect::Checksum {
                        slot,
                        offset: start,
                        bytes,
                    }
                }
            },
            None => naming(&put.what, slot, commit),
        };
        put.busy += 1;
        let token = commit.token;
        let id = office.effect(vm, effect, Continuation::Commit { handle, token });
        if let Some(flight) = office.flights.get_mut(&token) {
            flight.wait = Wait::Effect { id, fills: false };
        }
    }

    /// A put ends without a file: thrown away, or with `keep` left for a later PUT with RESUME.
    fn finish(&mut self, office: &mut Office, handle: u64, keep: bool, answer: Option<(Token, u16)>) {
        let Some(put) = self.remove(office, handle) else {
            return;
        };
        let key = put.what.key();
        if put.stale {
            self.gone(office, &key, answer);
            return;
        }
        let effect = if keep {
            Effect::Close { slot: put.slot }
        } else {
            Effect::Discard {
                slot: put.slot,
                share: key.0.clone(),
                temporary: key.1.clone(),
            }
        };
        let id = office.effect(put.what.vm, effect, Continuation::PutGone { key, answer });
        if let Some(flight) = answer.and_then(|(token, _)| office.flights.get_mut(&token)) {
            flight.wait = Wait::Effect { id, fills: false };
        }
    }

    fn remove(&mut self, office: &mut Office, handle: u64) -> Option<Put> {
        let put = self.puts.remove(&handle)?;
        if let Some(session) = put.session.and_then(|session| office.sessions.get_mut(&session)) {
            session.handles.remove(&handle);
        }
        office.give_file(put.what.vm);
        Some(put)
    }

    fn named(&mut self, office: &mut Office, handle: u64, path: &str) {
        let Some(put) = self.remove(office, handle) else {
            return;
        };
        self.live.remove(&put.what.key());
        let Some(commit) = put.commit else { return };
        if let Some(token) = put.closing {
            office.end(token, Answer::ok(0));
        }
        let Some(flight) = office.flights.get(&commit.token) else {
            return;
        };
        let name = format!("{}/{path}", put.what.share);
        let fits = name.len() as u64 <= room(commit.token, flight.data_bytes);
        let payload = if fits {
            name.clone().into_bytes()
        } else {
            Vec::new()
        };
        let answer = Answer::ok_extra(payload.len() as u64, name.len() as u64);
        office.end_with(commit.token, answer, payload, false);
    }

    /// The temporary name is free again.
    pub fn gone(&mut self, office: &mut Office, key: &(String, String), answer: Option<(Token, u16)>) {
        self.live.remove(key);
        if let Some((token, status)) = answer {
            office.end(token, failed(status));
        }
    }

    /// The session of a put is gone.
    pub fn release(&mut self, office: &mut Office, handle: u64) {
        if let Some(put) = self.puts.get_mut(&handle) {
            put.session = None;
            put.closing = None;
            self.advance(office, handle);
        }
    }
}

fn open_put<'a>(puts: &'a mut BTreeMap<u64, Put>, fetched: &Fetched) -> Result<&'a mut Put, Refusal> {
    let put = puts.get_mut(&fetched.handle).ok_or(Refusal::Stale)?;
    if put.session != Some(fetched.token.session) {
        return Err(Refusal::Stale);
    }
    if put.commit.is_some() || put.closing.is_some() {
        return Err(Refusal::HandleBusy);
    }
    Ok(put)
}

fn naming(what: &PutOpening, slot: FileSlot, commit: &mut Commit) -> Effect {
    commit.step = Step::Naming;
    Effect::Commit {
        slot,
        share: what.share.clone(),
        temporary: what.temporary.clone(),
        target: what.path.clone(),
        existing: what.existing,
        durable: commit.durable,
        bytes: commit.bytes,
    }
}

/// The checksum of the whole, or the range to read back next.
fn check(coverage: &Coverage, bytes: u64) -> Result<u32, (u64, u64)> {
    if let Some(crc32) = coverage.checksum(bytes) {
        return Ok(crc32);
    }
    let gaps = coverage.gaps(bytes);
    match gaps.first() {
        Some(gap) if gaps.len() <= PUT_GAPS_MAX => Err(*gap),
        // Many gaps, or none and yet no checksum (which merging excludes): all of it.
        _ => Err((0, bytes)),
    }
}

/// An outcome that no effect has: what a withdrawn effect ends as.
#[must_use]
pub fn withdrawn(status: u16) -> Outcome {
    Outcome::Failed {
        status,
        budget: 0,
        at: FailedAt::File,
    }
}
