//! WORKSHOP file: names in shares, and open files. Puts are next door (`puts.rs`), transfers between parties too (`offers.rs`, `streams.rs`).
//!
//! In: submissions, outcomes. Out: effects, answers. It never knows a path of the host: the shell resolves beneath the share's root.

use super::listing::{list, shares, stat};
use super::namely;
use super::names::{self, SharePath};
use super::puts::Puts;
use super::{Submitted, Uses, Verdict};
use crate::effect::{Effect, FileSlot, Outcome};
use crate::effects::{Continuation, range_in_file, whole};
use crate::kept::{Change, KeptFile};
use crate::office::{Office, Wait, failed, input_bytes, room};
use crate::policy::Access;
use crate::refusal::Refusal;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use vmgmt_abi::file::{open, unknown};
use vmgmt_abi::{Opcode, Status};
use vmgmt_device::rings::{Answer, Fetched, Token};

/// A file that is being opened.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Opening {
    pub share: String,
    pub path: String,
    pub read: bool,
    pub write: bool,
    /// Fetched again, and creating: "exists" may be our own doing.
    pub perhaps_ours: bool,
}

/// An open file.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OpenFile {
    /// `None`: its session is gone, it closes when nothing is under way on it.
    pub session: Option<u64>,
    pub vm: u64,
    pub slot: FileSlot,
    pub share: String,
    pub path: String,
    pub read: bool,
    pub write: bool,
    /// Effects under way.
    pub busy: u32,
    /// CLOSE waits for them.
    pub closing: Option<Token>,
    /// The shell could not open it again after a restart.
    pub stale: bool,
}

/// The file room.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Files {
    pub open: BTreeMap<u64, OpenFile>,
    pub puts: Puts,
    /// Handles of an earlier core life whose files are being opened again, with the submissions that wait for that.
    pub reopening: BTreeMap<u64, VecDeque<Box<Fetched>>>,
}

/// Whether a VM has a share, and may write to it.
///
/// # Errors
/// [`Refusal::ShareUnknown`], [`Refusal::ShareReadOnly`].
pub fn granted(office: &Office, vm: u64, share: &str, write: bool) -> Result<(), Refusal> {
    let shares = office
        .ledger
        .vms
        .get(&vm)
        .map_or(&[][..], |account| &account.config.shares);
    match shares.iter().find(|grant| grant.share == share) {
        None => Err(Refusal::ShareUnknown),
        Some(grant) if write && grant.access == Access::ReadOnly => Err(Refusal::ShareReadOnly),
        Some(_) => Ok(()),
    }
}

impl Files {
    /// Takes an operation on names or handles of files and puts.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn submit(&mut self, office: &mut Office, vm: u64, fetched: &Fetched) -> Submitted {
        if fetched.handle != 0
            && let Some(waiting) = self.reopening.get_mut(&fetched.handle)
        {
            waiting.push_back(Box::new(fetched.clone()));
            office.park(fetched, Wait::Reopening(fetched.handle));
            return Ok(Verdict::Open);
        }
        match fetched.opcode {
            Opcode::SHARES => shares(office, vm, fetched),
            Opcode::LIST => list(office, vm, fetched),
            Opcode::STAT => stat(office, vm, fetched),
            Opcode::MAKE_DIRECTORY | Opcode::REMOVE => namely::make_or_remove(office, vm, fetched),
            Opcode::RENAME => namely::rename(office, vm, fetched),
            Opcode::CLOSE
                if fetched.again
                    && !self.open.contains_key(&fetched.handle)
                    && !self.puts.has(fetched.handle) =>
            {
                // Its first life closed it.
                Ok(Verdict::Done(Answer::ok(0)))
            }
            Opcode::OPEN => open_file(office, vm, fetched),
            Opcode::PUT => self.puts.put(office, vm, fetched),
            Opcode::COMMIT => self.puts.commit(office, fetched),
            _ if self.puts.has(fetched.handle) => self.puts.submit(office, fetched),
            _ => self.on_handle(office, fetched),
        }
    }

    /// A submission that waits for its handle to be open again is given up or void: a disk that hangs may keep that handle closed for ever, and
    /// nothing may gather behind it.
    pub fn forget_waiting(&mut self, handle: u64, token: Token) {
        if let Some(waiting) = self.reopening.get_mut(&handle) {
            waiting.retain(|fetched| fetched.token != token);
        }
    }

    fn on_handle(&mut self, office: &mut Office, fetched: &Fetched) -> Submitted {
        let token = fetched.token;
        let uses = match fetched.opcode {
            Opcode::CHECKSUM => Uses {
                handle: true,
                offset: true,
                argument: true,
                ..Uses::default()
            },
            Opcode::READ | Opcode::WRITE | Opcode::TRUNCATE => Uses {
                handle: true,
                offset: true,
                ..Uses::default()
            },
            _ => Uses {
                handle: true,
                ..Uses::default()
            },
        };
        uses.check(fetched)?;
        let file = self.open.get_mut(&fetched.handle).ok_or(Refusal::Stale)?;
        if file.session != Some(token.session) || file.closing.is_some() {
            return Err(Refusal::Stale);
        }
        let (vm, slot, offset) = (file.vm, file.slot, fetched.offset);
        if file.stale && fetched.opcode != Opcode::CLOSE {
            return Err(Refusal::Stale);
        }
        let effect = match fetched.opcode {
            Opcode::READ => {
                let bytes = room(token, fetched.data_bytes);
                range_in_file(offset, bytes)?;
                if !file.read {
                    return Err(Refusal::HandleRight);
                }
                Effect::Read {
                    slot,
                    offset,
                    into: whole(token, bytes),
                }
            }
            Opcode::WRITE => {
                let bytes = input_bytes(fetched);
                range_in_file(offset, bytes)?;
                if !file.write {
                    return Err(Refusal::HandleRight);
                }
                Effect::Write {
                    slot,
                    offset,
                    from: whole(token, bytes),
                    checksum: false,
                }
            }
            Opcode::TRUNCATE if !file.write => return Err(Refusal::HandleRight),
            Opcode::TRUNCATE => {
                range_in_file(offset, 0)?;
                Effect::Truncate { slot, bytes: offset }
            }
            Opcode::FSYNC => Effect::Sync { slot },
            Opcode::CHECKSUM => {
                if !file.read {
                    return Err(Refusal::HandleRight);
                }
                range_in_file(offset, fetched.argument)?;
                Effect::Checksum {
                    slot,
                    offset,
                    bytes: fetched.argument,
                }
            }
            Opcode::CLOSE => {
                file.closing = Some(token);
                office.park(fetched, Wait::Room);
                self.settle(office, fetched.handle);
                return Ok(Verdict::Open);
            }
            _ => return Err(Refusal::UnknownOpcode),
        };
        if let Effect::Read { into: range, .. } | Effect::Write { from: range, .. } = &effect
            && range.bytes == 0
        {
            return Ok(Verdict::Done(Answer::ok(0)));
        }
        file.busy += 1;
        let fills = matches!(effect, Effect::Read { .. });
        let then = Continuation::File {
            token,
            handle: fetched.handle,
        };
        debug_assert_eq!(office.vm_of(token), Some(vm));
        office.park_effect(fetched, effect, fills, then);
        Ok(Verdict::Open)
    }

    /// Closes a file that wants to be closed, once nothing is under way on it.
    fn settle(&mut self, office: &mut Office, handle: u64) {
        let Some(file) = self.open.get(&handle) else {
            return;
        };
        if file.busy > 0 || (file.closing.is_none() && file.session.is_some()) {
            return;
        }
        let Some(file) = self.open.remove(&handle) else {
            return;
        };
        if let Some(session) = file.session.and_then(|session| office.sessions.get_mut(&session)) {
            session.handles.remove(&handle);
        }
        office.give_file(file.vm);
        office.change(Change::Closed { handle });
        if file.stale {
            if let Some(token) = file.closing {
                office.end(token, Answer::ok(0));
            }
            return;
        }
        let then = file
            .closing
            .map_or(Continuation::Nothing, |token| Continuation::Plain { token });
        let id = office.effect(file.vm, Effect::Close { slot: file.slot }, then);
        if let Some(flight) = file.closing.and_then(|token| office.flights.get_mut(&token)) {
            flight.wait = Wait::Effect { id, fills: false };
        }
    }

    /// A file was opened, or not. Nobody may be there to take it.
    pub fn opened(
        &mut self,
        office: &mut Office,
        token: Token,
        handle: u64,
        vm: u64,
        open: Opening,
        outcome: Outcome,
    ) {
        match outcome {
            Outcome::Opened { slot, stat, identity } => {
                let Some(session) = office
                    .sessions
                    .get_mut(&token.session)
                    .filter(|_| office.flights.contains_key(&token))
                else {
                    office.give_file(vm);
                    office.effect(vm, Effect::Close { slot }, Continuation::Nothing);
                    return;
                };
                session.handles.insert(handle);
                let Opening {
                    share,
                    path,
                    read,
                    write,
                    perhaps_ours: _,
                } = open;
                let kept = KeptFile {
                    session: token.session,
                    vm,
                    share: share.clone(),
                    path: path.clone(),
                    read,
                    write,
                    identity,
                };
                let file = OpenFile {
                    session: Some(token.session),
                    vm,
                    slot,
                    share,
                    path,
                    read,
                    write,
                    busy: 0,
                    closing: None,
                    stale: false,
                };
                self.open.insert(handle, file);
                let file = Box::new(kept);
                let answer = Answer::ok_extra(handle, stat.size);
                office.settle(token, answer, Vec::new(), Change::FileOpened { handle, file });
            }
            other => {
                office.give_file(vm);
                let exists = matches!(other, Outcome::Failed { status, .. } if status == Status::EXISTS.0);
                let answer = if exists && open.perhaps_ours {
                    Answer::failed(Status::OUTCOME_UNKNOWN)
                } else {
                    failure(&other)
                };
                office.end(token, answer);
            }
        }
    }

    /// A file of an earlier core life is open again, or cannot be: then its handle is stale.
    pub fn reopened(&mut self, office: &mut Office, handle: u64, outcome: Outcome) {
        if let Some(file) = self.open.get_mut(&handle) {
            file.busy = file.busy.saturating_sub(1);
            // The configuration may have taken the right away with the core before.
            let granted = granted(office, file.vm, &file.share, file.write).is_ok();
            match outcome {
                Outcome::Opened { slot, .. } if granted => file.slot = slot,
                Outcome::Opened { slot, .. } => {
                    file.stale = true;
                    office.effect(file.vm, Effect::Close { slot }, Continuation::Nothing);
                }
                _ => file.stale = true,
            }
            self.settle(office, handle);
        } else {
            self.puts.reopened(office, handle, outcome);
        }
    }

    /// An operation on an open file ended.
    pub fn file_done(&mut self, office: &mut Office, token: Token, handle: u64, outcome: Outcome) {
        if let Some(file) = self.open.get_mut(&handle) {
            file.busy = file.busy.saturating_sub(1);
        }
        end_transfer(office, token, outcome);
        self.settle(office, handle);
    }

    /// The session of a handle is gone.
    pub fn release(&mut self, office: &mut Office, handle: u64) {
        if let Some(file) = self.open.get_mut(&handle) {
            file.session = None;
            file.closing = None;
            self.settle(office, handle);
        } else {
            self.puts.release(office, handle);
        }
    }
}

/// Ends READ, WRITE, TRUNCATE, FSYNC or CHECKSUM by what came of its effect.
pub fn end_transfer(office: &mut Office, token: Token, outcome: Outcome) {
    let Some(flight) = office.flights.get(&token).copied() else {
        return;
    };
    let answer = match outcome {
        Outcome::Bytes(bytes) => {
            office.bytes_to(flight.vm, bytes);
            Answer::ok(bytes)
        }
        Outcome::Written { bytes, crc32: _ } => {
            office.bytes_from(flight.vm, bytes);
            Answer::ok(bytes)
        }
        Outcome::Checksum { bytes, crc32 } => Answer::ok_extra(bytes, u64::from(crc32)),
        Outcome::Done => Answer::ok(0),
        // A guest that gave up a READ got what it gave up for, unless the bytes were there first.
        other => match flight.ending {
            Some(status) => failed(status),
            None => failure(&other),
        },
    };
    office.end(token, answer);
}

/// A failed effect as a completion. An outcome of the wrong kind is a fault of ours, and an I/O error to the guest.
#[must_use]
pub fn failure(outcome: &Outcome) -> Answer {
    match outcome {
        Outcome::Failed {
            status,
            budget,
            at: _,
        } if *status != Status::OK.0 => Answer {
            detail: *budget,
            ..failed(*status)
        },
        _ => Answer::failed(Status::IO_ERROR),
    }
}

/// What was asked for is done, but not known to be durable.
pub fn not_durable() -> Answer {
    Answer {
        detail: unknown::NOT_DURABLE,
        ..Answer::failed(Status::OUTCOME_UNKNOWN)
    }
}

/// Ends CLOSE.
pub fn plain(office: &mut Office, token: Token, outcome: &Outcome) {
    let answer = match outcome {
        Outcome::Done => Answer::ok(0),
        other => failure(other),
    };
    office.end(token, answer);
}

fn open_file(office: &mut Office, vm: u64, fetched: &Fetched) -> Submitted {
    Uses {
        argument: true,
        meta: true,
        ..Uses::default()
    }
    .check(fetched)?;
    let has = |bit: u64| fetched.argument & bit != 0;
    let (read, write) = (has(open::READ), has(open::WRITE));
    let changes = has(open::CREATE) || has(open::EXCLUSIVE) || has(open::TRUNCATE);
    if fetched.argument & !open::KNOWN != 0
        || !(read || write)
        || (changes && !write)
        || (has(open::EXCLUSIVE) && !has(open::CREATE))
    {
        return Err(Refusal::Field);
    }
    let SharePath { share, path } = names::path_below(&fetched.meta)?;
    granted(office, vm, share, write)?;
    office.take_file(vm)?;
    let (share, path) = (share.to_owned(), path.to_owned());
    let perhaps_ours = fetched.again && has(open::EXCLUSIVE);
    let opening = Opening {
        share: share.clone(),
        path: path.clone(),
        read,
        write,
        perhaps_ours,
    };
    let effect = Effect::Open {
        share,
        path,
        read,
        write,
        create: has(open::CREATE),
        exclusive: has(open::EXCLUSIVE),
        truncate: has(open::TRUNCATE),
    };
    let handle = office.handle();
    let then = Continuation::Open {
        token: fetched.token,
        handle,
        vm,
        open: Box::new(opening),
    };
    if fetched.again && has(open::TRUNCATE) {
        // Its first life may still cut off what is written after this.
        office.park_effect_again(fetched, effect, then);
    } else {
        office.park_effect(fetched, effect, false, then);
    }
    Ok(Verdict::Open)
}
