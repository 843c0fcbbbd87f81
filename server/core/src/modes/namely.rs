//! WORKSHOP file: operations on names that must not happen twice: MAKE_DIRECTORY, REMOVE, RENAME.
//!
//! In: submissions, outcomes. Out: effects, records, answers. Each goes in three steps: which file or directory is it; journal that it is about to
//! be done to that one; do it. A submission that comes again with such an intent is done only where the files do not show it done already.
//! It never knows a path of the host.

use super::file::{failure, granted, not_durable};
use super::names::{self, SharePath};
use super::{Submitted, Uses, Verdict};
use crate::effect::{Effect, Identity, Outcome};
use crate::effects::Continuation;
use crate::kept::{Change, Intent};
use crate::office::{Office, Wait};
use crate::refusal::Refusal;
use serde::{Deserialize, Serialize};
use vmgmt_abi::file::existing;
use vmgmt_abi::ring::flag;
use vmgmt_abi::{Opcode, Status};
use vmgmt_device::rings::{Answer, Fetched, Token};

/// What is to be done.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum NameOperation {
    MakeDirectory {
        share: String,
        path: String,
        temporary: String,
    },
    Remove {
        share: String,
        path: String,
    },
    Rename {
        share: String,
        source: String,
        target: String,
        existing: u64,
        durable: bool,
    },
}

impl NameOperation {
    /// Finds out which file or directory it is about.
    fn first(&self) -> Effect {
        match self.clone() {
            Self::MakeDirectory {
                share,
                path,
                temporary,
            } => Effect::PrepareDirectory {
                share,
                path,
                temporary,
            },
            Self::Remove { share, path } => Effect::Identify { share, path },
            Self::Rename { share, source, .. } => Effect::Identify { share, path: source },
        }
    }

    /// Does it.
    fn second(self, intended: Option<Identity>) -> Effect {
        match self {
            Self::MakeDirectory {
                share,
                path,
                temporary,
            } => Effect::MakeDirectory {
                share,
                path,
                temporary,
                intended,
            },
            Self::Remove { share, path } => Effect::Remove {
                share,
                path,
                intended,
            },
            Self::Rename {
                share,
                source,
                target,
                existing,
                durable,
            } => Effect::Rename {
                share,
                source,
                target,
                existing,
                durable,
                intended,
            },
        }
    }
}

/// MAKE_DIRECTORY, REMOVE.
///
/// # Errors
/// Why it is refused.
pub fn make_or_remove(office: &mut Office, vm: u64, fetched: &Fetched) -> Submitted {
    Uses {
        meta: true,
        ..Uses::default()
    }
    .check(fetched)?;
    let SharePath { share, path } = names::path_below(&fetched.meta)?;
    granted(office, vm, share, true)?;
    let (share, path) = (share.to_owned(), path.to_owned());
    if fetched.opcode == Opcode::REMOVE {
        return begin(office, fetched, NameOperation::Remove { share, path });
    }
    let temporary = names::temporary_directory(&path, office.handle());
    let make = NameOperation::MakeDirectory {
        share,
        path,
        temporary,
    };
    begin(office, fetched, make)
}

/// RENAME.
///
/// # Errors
/// Why it is refused.
pub fn rename(office: &mut Office, vm: u64, fetched: &Fetched) -> Submitted {
    Uses {
        argument: true,
        meta: true,
        flags: flag::DURABLE,
        ..Uses::default()
    }
    .check(fetched)?;
    if fetched.argument > existing::RENAME {
        return Err(Refusal::Field);
    }
    let (source, target) = names::two(&fetched.meta)?;
    let (source, target) = (names::path_below(source)?, names::path_below(target)?);
    granted(office, vm, source.share, true)?;
    granted(office, vm, target.share, true)?;
    if source.share != target.share {
        return Err(Refusal::Path);
    }
    let rename = NameOperation::Rename {
        share: source.share.to_owned(),
        source: source.path.to_owned(),
        target: target.path.to_owned(),
        existing: fetched.argument,
        durable: fetched.flags & flag::DURABLE != 0,
    };
    begin(office, fetched, rename)
}

fn begin(office: &mut Office, fetched: &Fetched, mut operation: NameOperation) -> Submitted {
    let token = fetched.token;
    let kept = &office.ledger.kept;
    let before = fetched.again.then(|| kept.intended(token).cloned()).flatten();
    match before {
        Some(intent) => {
            if let (NameOperation::MakeDirectory { temporary, .. }, Some((_, before))) =
                (&mut operation, intent.temporary)
            {
                *temporary = before;
            }
            // What the files show is judged when its first life can change nothing any more: else a rename that comes through later
            // could take another file, which has the name by then.
            let effect = operation.second(Some(intent.identity));
            office.park_effect_again(fetched, effect, Continuation::Named { token, again: true });
        }
        // Whatever its first life looked at, it did nothing yet.
        None => {
            let effect = operation.first();
            let operation = Box::new(operation);
            office.park_effect(
                fetched,
                effect,
                false,
                Continuation::Identified { token, operation },
            );
        }
    }
    Ok(Verdict::Open)
}

/// It is known which file or directory is meant.
pub fn identified(office: &mut Office, token: Token, operation: NameOperation, outcome: Outcome) {
    let Some(flight) = office.flights.get(&token).copied() else {
        if let (Outcome::Identified(_), NameOperation::MakeDirectory { share, temporary, .. }) =
            (outcome, operation)
        {
            let path = temporary;
            let intended = None;
            office.effect(
                0,
                Effect::Remove {
                    share,
                    path,
                    intended,
                },
                Continuation::Nothing,
            );
        }
        return;
    };
    let Outcome::Identified(identity) = outcome else {
        office.end(token, failure(&outcome));
        return;
    };
    let intent = Intent {
        tag: flight.tag,
        identity,
        temporary: match &operation {
            NameOperation::MakeDirectory { share, temporary, .. } => Some((share.clone(), temporary.clone())),
            NameOperation::Remove { .. } | NameOperation::Rename { .. } => None,
        },
    };
    office.change(Change::Intends { token, intent });
    let then = Continuation::Named { token, again: false };
    let id = office.effect(flight.vm, operation.second(None), then);
    if let Some(flight) = office.flights.get_mut(&token) {
        flight.wait = Wait::Effect { id, fills: false };
    }
}

/// It is done, or not.
pub fn named(office: &mut Office, token: Token, again: bool, outcome: &Outcome) {
    let answer = match outcome {
        Outcome::Done | Outcome::Committed { .. } => Answer::ok(0),
        Outcome::NotDurable { .. } => not_durable(),
        // A broken disk shows nobody what its first life did.
        Outcome::Failed { status, .. } if again && *status == Status::IO_ERROR.0 => {
            Answer::failed(Status::OUTCOME_UNKNOWN)
        }
        other => failure(other),
    };
    office.settle(token, answer, Vec::new(), Change::None);
}
