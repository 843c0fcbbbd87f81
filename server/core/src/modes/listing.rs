//! WORKSHOP file: looking: SHARES, LIST, STAT. In: submissions, outcomes. Out: records of `vmgmt_abi::file`, as many as fit.

use super::file::{failure, granted};
use super::names::{self, SharePath};
use super::{Submitted, Uses, Verdict, pad_to_word};
use crate::effect::{Effect, FailedAt, Outcome, StatRecord, entry_bytes};
use crate::effects::Continuation;
use crate::office::{Office, room};
use crate::policy::Access;
use crate::refusal::Refusal;
use vmgmt_abi::Status;
use vmgmt_abi::file::{DirectoryEntry, FileStat, ShareEntry};
use vmgmt_abi::ring::completion_flag;
use vmgmt_device::rings::{Answer, Fetched, Token};
use zerocopy::IntoBytes;

/// Ends STAT.
pub fn stat_done(office: &mut Office, token: Token, outcome: Outcome) {
    match outcome {
        Outcome::Stat(stat) => {
            let record = FileStat::from(stat);
            let answer = Answer::ok(size_of::<FileStat>() as u64);
            office.end_with(token, answer, record.as_bytes().to_vec(), false);
        }
        other => {
            office.end(token, failure(&other));
        }
    }
}

/// Ends LIST.
pub fn list_done(office: &mut Office, token: Token, bytes_max: u64, outcome: Outcome) {
    let (entries, next) = match outcome {
        Outcome::Listed { entries, next } => (entries, next),
        other => {
            office.end(token, failure(&other));
            return;
        }
    };
    let mut payload = Vec::new();
    for (name, stat) in &entries {
        push_entry(&mut payload, name, *stat);
    }
    if payload.len() as u64 > bytes_max {
        // The shell was told how much fits: a fault of ours.
        office.end(token, failure(&Outcome::failed(Status::IO_ERROR, FailedAt::File)));
    } else if entries.is_empty() && next != 0 {
        office.refuse(token, Refusal::BufferSmall);
    } else {
        let answer = listing_answer(payload.len(), next);
        office.end_with(token, answer, payload, false);
    }
}

fn push_entry(payload: &mut Vec<u8>, name: &str, stat: StatRecord) {
    let name_bytes = u32::try_from(name.len()).unwrap_or(u32::MAX);
    let entry = DirectoryEntry {
        stat: stat.into(),
        name_bytes,
        reserved: 0,
    };
    payload.extend_from_slice(entry.as_bytes());
    payload.extend_from_slice(name.as_bytes());
    pad_to_word(payload);
}

/// Answer of a listing; `next` 0: that was all.
#[must_use]
pub fn listing_answer(bytes: usize, next: u64) -> Answer {
    let flags = if next == 0 { 0 } else { completion_flag::MORE };
    Answer {
        flags,
        ..Answer::ok_extra(bytes as u64, next)
    }
}

pub fn shares(office: &mut Office, vm: u64, fetched: &Fetched) -> Submitted {
    Uses {
        offset: true,
        ..Uses::default()
    }
    .check(fetched)?;
    let room = room(fetched.token, fetched.data_bytes);
    let shares = office
        .ledger
        .vms
        .get(&vm)
        .map_or(&[][..], |account| &account.config.shares);
    let start = usize::try_from(fetched.offset).map_err(|_| Refusal::Field)?;
    let (mut entries, mut bytes, mut next) = (Vec::new(), 0, 0);
    for (index, grant) in shares.iter().enumerate().skip(start) {
        bytes += share_entry_bytes(&grant.share);
        if bytes as u64 > room {
            if entries.is_empty() {
                return Err(Refusal::BufferSmall);
            }
            next = index as u64;
            break;
        }
        entries.push((grant.share.clone(), grant.access == Access::ReadWrite));
    }
    if entries.is_empty() {
        return Ok(Verdict::Data(listing_answer(0, 0), Vec::new()));
    }
    let effect = Effect::BytesLeft {
        shares: entries.iter().map(|(share, _)| share.clone()).collect(),
    };
    let then = Continuation::Shares {
        token: fetched.token,
        entries,
        next,
    };
    office.park_effect(fetched, effect, false, then);
    Ok(Verdict::Open)
}

/// The answer to SHARES, when the shell has said what the quotas leave.
pub fn shares_done(
    office: &mut Office,
    token: Token,
    entries: &[(String, bool)],
    next: u64,
    outcome: &Outcome,
) {
    let Outcome::BytesLeft(left) = outcome else {
        office.end(token, failure(outcome));
        return;
    };
    let mut payload = Vec::new();
    for (index, (share, writable)) in entries.iter().enumerate() {
        let entry = ShareEntry {
            bytes_left: left.get(index).copied().unwrap_or(u64::MAX),
            writable: u32::from(*writable),
            name_bytes: u32::try_from(share.len()).unwrap_or(u32::MAX),
        };
        payload.extend_from_slice(entry.as_bytes());
        payload.extend_from_slice(share.as_bytes());
        pad_to_word(&mut payload);
    }
    office.end_with(token, listing_answer(payload.len(), next), payload, false);
}

const fn share_entry_bytes(name: &str) -> usize {
    size_of::<ShareEntry>() + name.len().next_multiple_of(8)
}

pub fn list(office: &mut Office, vm: u64, fetched: &Fetched) -> Submitted {
    Uses {
        offset: true,
        meta: true,
        ..Uses::default()
    }
    .check(fetched)?;
    let SharePath { share, path } = names::share_path(&fetched.meta)?;
    granted(office, vm, share, false)?;
    let bytes_max = room(fetched.token, fetched.data_bytes);
    if bytes_max < entry_bytes("n") as u64 {
        return Err(Refusal::BufferSmall);
    }
    let (share, path) = (share.to_owned(), path.to_owned());
    let effect = Effect::List {
        share,
        path,
        cursor: fetched.offset,
        bytes_max,
    };
    let then = Continuation::List {
        token: fetched.token,
        bytes_max,
    };
    office.park_effect(fetched, effect, false, then);
    Ok(Verdict::Open)
}

pub fn stat(office: &mut Office, vm: u64, fetched: &Fetched) -> Submitted {
    Uses {
        meta: true,
        ..Uses::default()
    }
    .check(fetched)?;
    let SharePath { share, path } = names::share_path(&fetched.meta)?;
    granted(office, vm, share, false)?;
    if room(fetched.token, fetched.data_bytes) < size_of::<FileStat>() as u64 {
        return Err(Refusal::BufferSmall);
    }
    let effect = Effect::Stat {
        share: share.to_owned(),
        path: path.to_owned(),
    };
    office.park_effect(
        fetched,
        effect,
        false,
        Continuation::Stat { token: fetched.token },
    );
    Ok(Verdict::Open)
}
