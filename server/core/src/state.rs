//! ATTIC: the hub packed and unpacked.
//!
//! In: a hub, or the bytes of one. Out: the other. Saved types stand apart from those that run; whatever can be worked out from the rest is
//! not saved but worked out again, and what comes back is checked as a stranger's would be.

use crate::cbor;
use crate::deadlines::{Timer, Timers};
use crate::effects::{Continuation, Effects, SavedEffects};
use crate::hub::Hub;
use crate::interface::Output;
use crate::kept::feature;
use crate::ledger::{Ledger, SavedLedger};
use crate::modes::chat::{Chat, Listener};
use crate::modes::file::{Files, OpenFile};
use crate::modes::offers::{Offer, OfferSource, OfferState, Transfers};
use crate::modes::puts::{Put, Puts};
use crate::modes::streams::{Party, Side, Stream};
use crate::office::{Flight, Office, Session, Wall};
use crate::saved::{
    SavedFetched, SavedVm, restore_fetched, restore_flights, restore_vm, save_fetched, save_queue, save_vm,
};
use serde::{Deserialize, Serialize};
use std::collections::BTreeSet;
use vmgmt_device::Tick;
use vmgmt_device::rings::{Channel, Token};

/// Version of the saved form. A reader knows this one and the one before.
const VERSION: u32 = 2;
/// What a snapshot is written as: the oldest version that has all its fields. What that version does not know in them is among the features
/// that are in use; so it reads the state while there are none, and else names one when it refuses.
const VERSION_OF_SNAPSHOTS: u32 = 1;
/// Features that this version understands in a saved hub.
const FEATURES_KNOWN: [&str; 6] = feature::ALL;

/// Why a saved state is refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum RestoreError {
    /// It is no saved hub.
    #[error("the saved state of the hub cannot be read: {0}")]
    Unreadable(String),
    /// It is one of another version.
    #[error(
        "the saved state of the hub has version {found}, this program reads versions 1 and {VERSION}: start the program that wrote it"
    )]
    Version { found: u32 },
    /// It uses something that this version does not know.
    #[error(
        "the saved state of the hub uses {0:?}, which this program does not know: upgrade to one that does"
    )]
    Feature(String),
    /// It contradicts itself.
    #[error("the saved state of the hub is wrong: {0}")]
    Inconsistent(&'static str),
}

impl From<&'static str> for RestoreError {
    fn from(what: &'static str) -> Self {
        Self::Inconsistent(what)
    }
}

/// A hub at rest.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Saved {
    version: u32,
    /// What is in use that an older version would not understand, by name: going back is refused by it, and only by it.
    #[serde(default)]
    features: BTreeSet<String>,
    pub(crate) now: Tick,
    pub(crate) wall: Wall,
    pub(crate) ledger: SavedLedger,
    vms: Vec<SavedVm>,
    /// Session and VM.
    sessions: Vec<(u64, u64)>,
    flights: Vec<(Token, Flight)>,
    timers: Vec<(Tick, Timer)>,
    effects: SavedEffects,
    outputs: Vec<Output>,
    pub(crate) next_handle: u64,
    files: Vec<(u64, OpenFile)>,
    puts: Vec<(u64, Put)>,
    puts_live: Vec<((String, String), u64)>,
    offers: Vec<(u64, Offer)>,
    streams: Vec<(u64, Stream)>,
    reopening: Vec<(u64, Vec<SavedFetched>)>,
    fetching: Vec<((u64, Channel), Vec<SavedFetched>)>,
    bodies: Vec<SavedFetched>,
    listeners: Vec<Listener>,
    /// Only in the first moments after a crash.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    adopting: bool,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    awaited: BTreeSet<(u64, u64)>,
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    inherited: BTreeSet<Token>,
    /// Of no use to another core life, whose operators are others: without it they are only given again.
    #[serde(default)]
    given: Vec<(u64, (u64, u64))>,
}

impl Saved {
    /// As bytes (CBOR).
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        cbor::write(self, &mut bytes);
        bytes
    }

    /// From bytes.
    ///
    /// # Errors
    /// [`RestoreError::Unreadable`], [`RestoreError::Version`].
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, RestoreError> {
        #[derive(Deserialize)]
        struct Versioned {
            version: u32,
            #[serde(default)]
            features: BTreeSet<String>,
        }
        let Versioned { version, features } = cbor::read(bytes).map_err(RestoreError::Unreadable)?;
        if let Some(name) = features
            .into_iter()
            .find(|name| !FEATURES_KNOWN.contains(&name.as_str()))
        {
            return Err(RestoreError::Feature(name));
        }
        match version {
            VERSION => cbor::read(bytes).map_err(RestoreError::Unreadable),
            1 => Ok(cbor::read::<SavedVersion1>(bytes)
                .map_err(RestoreError::Unreadable)?
                .into()),
            found => Err(RestoreError::Version { found }),
        }
    }
}

impl Saved {
    /// Names features that records behind it will use.
    pub fn name<'a>(&mut self, features: impl IntoIterator<Item = &'a str>) {
        self.features.extend(features.into_iter().map(str::to_owned));
    }

    /// Names of the features in use.
    pub fn features(&self) -> impl Iterator<Item = &str> {
        self.features.iter().map(String::as_str)
    }
}

fn features(ledger: &SavedLedger) -> BTreeSet<String> {
    ledger.features().into_iter().map(str::to_owned).collect()
}

/// A snapshot, of this version too: what [`Hub::replay`] needs. (In version 1 handles, offers and streams did not survive, and there were more
/// fields in use; the rest is not read.)
#[derive(Deserialize)]
struct SavedVersion1 {
    #[serde(default)]
    features: BTreeSet<String>,
    now: Tick,
    wall: Wall,
    ledger: SavedLedger,
    next_handle: u64,
}

impl From<SavedVersion1> for Saved {
    fn from(saved: SavedVersion1) -> Self {
        let SavedVersion1 {
            features,
            now,
            wall,
            ledger,
            next_handle,
        } = saved;
        Self {
            features,
            now,
            wall,
            ledger,
            next_handle,
            ..Hub::new(0).save()
        }
    }
}

impl Hub {
    /// A snapshot that is to stand for all records so far: what [`Hub::replay`] uses of a hub, and nothing of what is under way. Before it comes
    /// into force: [`Hub::drop_records`].
    #[must_use]
    pub fn snapshot(&self) -> Saved {
        let office = &self.office;
        let ledger = office.ledger.save();
        Saved {
            version: VERSION_OF_SNAPSHOTS,
            features: features(&ledger),
            now: office.now,
            wall: office.wall,
            ledger,
            next_handle: office.next_handle,
            ..Self::new(0).save()
        }
    }

    /// A snapshot of now comes into force: records that were not polled yet are among those that it stands for, and are dropped. One that is
    /// written behind a snapshot that has its change already would be applied to it a second time.
    pub fn drop_records(&mut self) {
        let outputs = &mut self.office.outputs;
        outputs.retain(|output| !matches!(output, Output::Journal(_)));
    }

    /// Packs everything.
    #[must_use]
    pub fn save(&self) -> Saved {
        let Self {
            office,
            files,
            transfers,
            chat,
        } = self;
        let Office {
            now,
            wall,
            ledger,
            vms,
            sessions,
            flights,
            timers,
            effects,
            outputs,
            next_handle,
            state_room: _,
            ahead_bytes: _,
            woken: _,
            adopting,
            awaited,
            inherited,
        } = office;
        let Files {
            open,
            puts: Puts { puts, live },
            reopening,
        } = files;
        let Transfers {
            offers,
            streams,
            ends: _,
            presenting: _,
        } = transfers;
        let Chat {
            fetching,
            bodies,
            listeners,
            given,
        } = chat;
        let ledger = ledger.save();
        Saved {
            version: VERSION,
            features: features(&ledger),
            now: *now,
            wall: *wall,
            ledger,
            vms: vms.iter().map(|(vm, entry)| save_vm(vm, entry)).collect(),
            sessions: sessions
                .iter()
                .map(|(session, Session { vm, handles: _ })| (session, *vm))
                .collect(),
            flights: flights.iter().map(|(token, flight)| (*token, *flight)).collect(),
            timers: timers.iter().copied().collect(),
            effects: effects.save(),
            outputs: outputs.iter().cloned().collect(),
            next_handle: *next_handle,
            files: open
                .iter()
                .map(|(handle, file)| (*handle, file.clone()))
                .collect(),
            puts: puts.iter().map(|(handle, put)| (*handle, put.clone())).collect(),
            puts_live: live.iter().map(|(key, handle)| (key.clone(), *handle)).collect(),
            offers: offers.iter().map(|(id, offer)| (*id, offer.clone())).collect(),
            streams: streams.iter().map(|(id, stream)| (*id, stream.clone())).collect(),
            reopening: reopening
                .iter()
                .map(|(handle, queue)| (*handle, save_queue(queue)))
                .collect(),
            fetching: fetching
                .iter()
                .map(|(place, queue)| (*place, save_queue(queue)))
                .collect(),
            bodies: bodies.values().map(|fetched| save_fetched(fetched)).collect(),
            listeners: listeners.iter().copied().collect(),
            adopting: *adopting,
            awaited: awaited.clone(),
            inherited: inherited.clone(),
            given: given.iter().map(|(position, to)| (*position, *to)).collect(),
        }
    }

    /// Unpacks a hub.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn restore(saved: Saved) -> Result<Self, RestoreError> {
        let Saved {
            version,
            features: _,
            now,
            wall,
            ledger,
            vms,
            sessions,
            flights,
            timers,
            effects,
            outputs,
            next_handle,
            files,
            puts,
            puts_live,
            offers,
            streams,
            reopening,
            fetching,
            bodies,
            listeners,
            adopting,
            awaited,
            inherited,
            given,
        } = saved;
        if version != VERSION {
            return Err(RestoreError::Version { found: version });
        }
        let mut hub = Self::new(0);
        let office = &mut hub.office;
        office.ledger = Ledger::restore(ledger)?;
        (office.now, office.wall, office.next_handle) = (now, wall, next_handle);
        office.timers = timers.into_iter().collect::<Timers>();
        office.effects = Effects::restore(effects)?;
        office.outputs = outputs.into();
        (office.adopting, office.awaited) = (adopting, awaited);
        office.inherited = inherited;
        for vm in vms {
            restore_vm(office, vm)?;
        }
        if office.vms.len() != office.ledger.vms.len() {
            return Err("a VM is known to the ledger and to nobody else".into());
        }
        for (session, vm) in sessions {
            let entry = office.vms.get_mut(&vm).ok_or("a session is of no VM")?;
            entry.sessions.insert(session);
            if office
                .sessions
                .insert(
                    session,
                    Session {
                        vm,
                        handles: BTreeSet::new(),
                    },
                )
                .is_some()
            {
                return Err("a session is there twice".into());
            }
        }
        restore_flights(office, flights)?;
        hub.transfers.offers = offers.into_iter().collect();
        hub.transfers.streams = streams.into_iter().collect();
        hub.restore_transfers()?;
        hub.files.open = files.into_iter().collect();
        hub.files.puts = Puts {
            puts: puts.into_iter().collect(),
            live: puts_live.into_iter().collect(),
        };
        let queue = |queue: Vec<SavedFetched>| queue.into_iter().map(restore_fetched).collect();
        hub.files.reopening = reopening
            .into_iter()
            .map(|(handle, saved)| (handle, queue(saved)))
            .collect();
        hub.restore_files()?;
        hub.chat = Chat {
            fetching: fetching
                .into_iter()
                .map(|(place, saved)| (place, queue(saved)))
                .collect(),
            bodies: bodies
                .into_iter()
                .map(|saved| (saved.token, restore_fetched(saved)))
                .collect(),
            listeners: listeners.into(),
            given: given.into_iter().collect(),
        };
        hub.office.refresh_reach();
        Ok(hub)
    }

    /// Bytes that a snapshot has at most, as things are.
    #[must_use]
    pub fn state_bytes(&self) -> u64 {
        self.office.ledger.books.total()
    }

    /// The part of the state that survives a crash, for comparison.
    #[must_use]
    pub fn surviving(&self) -> SavedLedger {
        self.office.ledger.save()
    }

    fn restore_files(&mut self) -> Result<(), RestoreError> {
        for put in self.files.puts.puts.values() {
            let bytes = put.commit.as_ref().map_or(0, |commit| commit.bytes);
            if bytes > crate::limits::FILE_OFFSET_MAX {
                return Err("a put is to have a length that no file has".into());
            }
        }
        let office = &mut self.office;
        let files = self
            .files
            .open
            .iter()
            .map(|(handle, file)| (*handle, file.vm, file.session));
        let puts = self
            .files
            .puts
            .puts
            .iter()
            .map(|(handle, put)| (*handle, put.what.vm, put.session));
        let ends = self.transfers.ends.iter().filter_map(|(handle, (id, side))| {
            let stream = self.transfers.streams.get(id)?;
            match if *side == Side::Source {
                stream.source
            } else {
                stream.target
            } {
                Party::Vm { vm, session, .. } => Some((*handle, vm, Some(session))),
                Party::Host(_) => None,
            }
        });
        let mut seen = BTreeSet::new();
        for (handle, vm, session) in files.chain(puts).chain(ends) {
            if handle > office.next_handle || !seen.insert(handle) {
                return Err("a handle is there twice or has a number that is not its own".into());
            }
            if let Some(session) = session {
                // Of an earlier core life, and not told yet: it comes when the session does.
                if let Some(entry) = office.sessions.get_mut(&session) {
                    entry.handles.insert(handle);
                }
            }
            if let Some(entry) = office.vms.get_mut(&vm) {
                entry.open_files += 1;
            }
        }
        let opening: Vec<u64> = office
            .effects
            .continuations()
            .filter_map(|then| match then {
                Continuation::Open { vm, .. } => Some(*vm),
                Continuation::PutOpen { put, .. } => Some(put.vm),
                _ => None,
            })
            .collect();
        for vm in opening {
            if let Some(entry) = office.vms.get_mut(&vm) {
                entry.open_files += 1;
            }
        }
        Ok(())
    }

    fn restore_transfers(&mut self) -> Result<(), RestoreError> {
        let Transfers {
            offers,
            streams,
            ends,
            presenting,
        } = &mut self.transfers;
        for (id, offer) in offers.iter() {
            match offer.state {
                OfferState::Presenting { token } => {
                    presenting.insert(token, *id);
                }
                OfferState::Queued | OfferState::Shown { .. } => {}
            }
            if let OfferSource::Vm { vm, token } = offer.source {
                let kept = self.office.ledger.kept.offers.contains_key(id);
                if !kept && !self.office.flights.contains_key(&token) {
                    return Err("an offer is of no submission".into());
                }
                if let Some(entry) = self.office.vms.get_mut(&vm) {
                    entry.offers_out += 1;
                }
            }
        }
        for (id, stream) in streams.iter() {
            let pieces = || stream.writes.iter().chain(&stream.reads);
            if pieces().any(|piece| piece.done > piece.bytes) {
                return Err("more of a stream is moved than there was".into());
            }
            let to_come = stream
                .writes
                .iter()
                .map(|piece| u128::from(piece.bytes - piece.done))
                .sum::<u128>();
            let pushed = matches!(stream.source, Party::Host(_));
            if u128::from(stream.taken) < to_come || (pushed && stream.moved > stream.size) {
                return Err("a stream has more to come than it took".into());
            }
            for (side, party) in [(Side::Source, stream.source), (Side::Target, stream.target)] {
                if let Party::Vm {
                    handle, open: true, ..
                } = party
                {
                    ends.insert(handle, (*id, side));
                }
            }
        }
        Ok(())
    }
}
