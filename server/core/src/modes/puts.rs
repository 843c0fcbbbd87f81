//! WORKSHOP file: puts. A target appears only complete: temporary file beside it, contents, checksum, rename.
//!
//! In: PUT, WRITE, COMMIT, CLOSE and outcomes. Out: effects, answers. It never knows where a share is.

use super::commit::{check, naming};
use super::coverage::Coverage;
use super::file::{end_transfer, failure, granted};
use super::names::{self, SharePath};
use super::{Submitted, Uses, Verdict};
use crate::effect::{Effect, FailedAt, FileSlot, Outcome};
use crate::effects::{Continuation, range_in_file, whole};
use crate::kept::{Change, KeptPut};
use crate::ledger::books::RANGE_BYTES;
use crate::limits::FILE_OFFSET_MAX;
use crate::office::{Office, Wait, failed, input_bytes};
use crate::refusal::Refusal;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vmgmt_abi::file::{SIZE_UNKNOWN, existing, put};
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
    /// Nobody will ask for a checksum: none is worked out while bytes come.
    #[serde(default)]
    pub unchecked: bool,
}

impl PutOpening {
    /// What no two puts of a VM have at a time.
    pub fn key(&self) -> (String, String) {
        (self.share.clone(), names::temporary(self.vm, &self.path))
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
    /// An earlier core life may have given it its name.
    pub again: bool,
    pub step: Step,
}

/// A put under way. What of its contents is known is in the ledger.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Put {
    pub what: PutOpening,
    /// `None`: its session is gone.
    pub session: Option<u64>,
    pub slot: FileSlot,
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
        let resumable = argument & put::RESUME != 0;
        let what = PutOpening {
            vm,
            share: share.to_owned(),
            path: path.to_owned(),
            temporary: if resumable {
                names::temporary(vm, path)
            } else {
                names::temporary_once(vm, path, office.handle())
            },
            size: fetched.offset,
            existing: argument & existing::MASK,
            resumable,
            unchecked: argument & put::UNCHECKED != 0,
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
        let kept = session.is_some().then(|| KeptPut {
            session: token.session,
            what: what.clone(),
            identity,
            coverage: Coverage::default(),
            extent: stat.size,
        });
        let put = Put {
            what,
            session: session.is_some().then_some(token.session),
            slot,
            busy: 0,
            commit: None,
            closing: None,
            stale: false,
        };
        if let Some(session) = session {
            session.handles.insert(handle);
        }
        self.puts.insert(handle, put);
        match kept.map(Box::new) {
            Some(put) => {
                let answer = Answer::ok_extra(handle, stat.size);
                office.settle(token, answer, Vec::new(), Change::PutOpened { handle, put });
            }
            None => drop(office.end(token, Answer::failed(Status::CANCELLED))),
        }
        self.advance(office, handle);
    }

    /// The file of a put of an earlier core life is open again, or cannot be: then its handle is stale.
    pub fn reopened(&mut self, office: &mut Office, handle: u64, outcome: Outcome) {
        let Some(put) = self.puts.get_mut(&handle) else {
            return;
        };
        put.busy = put.busy.saturating_sub(1);
        let extent = office.ledger.kept.puts.get(&handle).map_or(0, |kept| kept.extent);
        match outcome {
            // Somebody cut it: what is missing would become zeros. Or the configuration took the right away with the core before.
            Outcome::Opened { slot, stat, .. }
                if stat.size < extent || granted(office, put.what.vm, &put.what.share, true).is_err() =>
            {
                put.stale = true;
                office.effect(put.what.vm, Effect::Close { slot }, Continuation::Nothing);
            }
            Outcome::Opened { slot, .. } => put.slot = slot,
            _ => put.stale = true,
        }
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
                forget(office, fetched.handle, fetched.offset, bytes);
                let effect = Effect::Write {
                    slot,
                    offset: fetched.offset,
                    from: whole(token, bytes),
                    checksum: !put.what.unchecked,
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
        }
        if let Some((offset, bytes)) = write
            && self.puts.contains_key(&handle)
        {
            // Where there is no room for one more range, it is read back at COMMIT.
            let vm = self.puts.get(&handle).map_or(0, |put| put.what.vm);
            let fits = office.has_room(vm, RANGE_BYTES, true).is_ok();
            match &outcome {
                Outcome::Written {
                    bytes: written,
                    crc32: Some(crc32),
                } if *written == bytes && fits => office.change(Change::Wrote {
                    handle,
                    offset,
                    bytes,
                    crc32: Some(*crc32),
                    extent: offset.saturating_add(bytes),
                }),
                Outcome::Written {
                    bytes: written,
                    crc32: _,
                } if *written == bytes => {
                    // Another write to these bytes, that was under way with this one, may have said what they are.
                    forget(office, handle, offset, bytes);
                    grown(office, handle, offset, bytes);
                }
                _ => forget(office, handle, offset, bytes),
            }
        }
        end_transfer(office, token, outcome);
        self.advance(office, handle);
    }

    /// Does what is next for a put: a step of its COMMIT, or its end.
    pub(super) fn advance(&mut self, office: &mut Office, handle: u64) {
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
        // What was written behind the new end is cut off, also by writes that were under way when COMMIT came.
        forget(office, handle, commit.bytes, u64::MAX);
        let kept = office.ledger.kept.puts.get(&handle);
        if kept.is_some_and(|kept| kept.extent > commit.bytes) {
            // Known before it is done: a core that begins in between must not take it for somebody else's doing.
            office.change(Change::Cut {
                handle,
                bytes: commit.bytes,
            });
        }
        let empty = Coverage::default();
        let kept = office.ledger.kept.puts.get(&handle);
        let (coverage, extent) = kept.map_or((&empty, 0), |kept| (&kept.coverage, kept.extent));
        let effect = match commit.crc32 {
            Some(_) if extent < commit.bytes => {
                commit.step = Step::Truncating;
                Effect::Truncate {
                    slot,
                    bytes: commit.bytes,
                }
            }
            Some(wanted) => match check(coverage, commit.bytes) {
                Ok(found) if found != wanted => {
                    let answer = Some((commit.token, Refusal::Checksum.status().0));
                    put.commit = None;
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
        match answer.filter(|(_, status)| *status != Status::OK.0) {
            Some((token, status)) => office.foretell(token, failed(status), Change::Closed { handle }),
            None => office.change(Change::Closed { handle }),
        }
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
                share: put.what.share.clone(),
                temporary: put.what.temporary.clone(),
            }
        };
        let id = office.effect(put.what.vm, effect, Continuation::PutGone { key, answer });
        if let Some(flight) = answer.and_then(|(token, _)| office.flights.get_mut(&token)) {
            flight.wait = Wait::Effect { id, fills: false };
        }
    }

    pub(super) fn remove(&mut self, office: &mut Office, handle: u64) -> Option<Put> {
        let put = self.puts.remove(&handle)?;
        if let Some(session) = put.session.and_then(|session| office.sessions.get_mut(&session)) {
            session.handles.remove(&handle);
        }
        office.give_file(put.what.vm);
        Some(put)
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

pub(super) fn open_put<'a>(
    puts: &'a mut BTreeMap<u64, Put>,
    fetched: &Fetched,
) -> Result<&'a mut Put, Refusal> {
    let put = puts.get_mut(&fetched.handle).ok_or(Refusal::Stale)?;
    if put.session != Some(fetched.token.session) {
        return Err(Refusal::Stale);
    }
    if put.commit.is_some() || put.closing.is_some() {
        return Err(Refusal::HandleBusy);
    }
    Ok(put)
}

/// Bytes of a put were written of which no checksum is wanted: the file is that long at least.
fn grown(office: &mut Office, handle: u64, offset: u64, bytes: u64) {
    let extent = offset.saturating_add(bytes);
    let kept = office.ledger.kept.puts.get(&handle);
    if kept.is_some_and(|kept| kept.extent < extent) {
        office.change(Change::Wrote {
            handle,
            offset,
            bytes,
            crc32: None,
            extent,
        });
    }
}

/// Bytes of a put are about to change: what was known of them is not known any more.
pub(super) fn forget(office: &mut Office, handle: u64, offset: u64, bytes: u64) {
    let kept = office.ledger.kept.puts.get(&handle);
    if kept.is_some_and(|kept| kept.coverage.knows(offset, bytes)) {
        office.change(Change::Wrote {
            handle,
            offset,
            bytes,
            crc32: None,
            extent: 0,
        });
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
