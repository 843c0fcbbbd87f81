//! WORKSHOP file: offers between VMs and with the host: who wants to give what to whom, until it is answered.
//!
//! In: OFFER, NEXT_OFFER, ACCEPT, REFUSE, the operator's push and pull. Out: answers, and streams (`streams.rs`). It never sees a byte of a file.

use super::streams::{Side, Stream};
use super::{Submitted, Uses, Verdict, names};
use crate::deadlines::Timer;
use crate::effect::FileSlot;
use crate::interface::{ControlReply, Output};
use crate::kept::{Change, HostStage, KeptHost, KeptOffer};
use crate::office::{Office, Wait, room};
use crate::refusal::Refusal;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use vmgmt_abi::chat::{HOST_NAME, PEER_HOST};
use vmgmt_abi::file::{OfferHeader, SIZE_UNKNOWN, offer_kind};
use vmgmt_abi::{Opcode, Status};
use vmgmt_device::Tick;
use vmgmt_device::rings::{Answer, Fetched, Token};
use zerocopy::IntoBytes;

/// A host file in a transfer, and the operator's request that it belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HostFile {
    pub client: u64,
    pub id: u64,
    /// [`FileSlot::NONE`]: the operator's connection has ended with an earlier core, and it has not asked again yet.
    pub slot: FileSlot,
    /// By which it asks again; 0: the transfer ends with the connection.
    #[serde(default)]
    pub key: u64,
}

impl HostFile {
    /// One that waits for its operator.
    #[must_use]
    pub const fn waiting(key: u64) -> Self {
        Self {
            client: 0,
            id: 0,
            slot: FileSlot::NONE,
            key,
        }
    }
    /// Whether the operator is there.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        self.slot != FileSlot::NONE
    }
}

/// Who offers, or asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum OfferSource {
    /// A VM, by this OFFER submission.
    Vm { vm: u64, token: Token },
    /// The operator gives a file.
    Push(HostFile),
    /// The operator asks for one.
    Pull(HostFile),
}

impl OfferSource {
    /// The operator's file.
    #[must_use]
    pub const fn host(&self) -> Option<HostFile> {
        match self {
            Self::Vm { .. } => None,
            Self::Push(file) | Self::Pull(file) => Some(*file),
        }
    }

    /// Whether the operator has not asked again yet.
    #[must_use]
    pub fn awaits_operator(&self) -> bool {
        self.host().is_some_and(|file| !file.is_attached())
    }
}

/// How far an offer is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum OfferState {
    /// In its target's queue.
    Queued,
    /// In a completion of a NEXT_OFFER, not known to be published.
    Presenting { token: Token },
    /// This session of the target has seen it.
    Shown { session: u64 },
}

/// An offer or request that is not answered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Offer {
    pub source: OfferSource,
    pub target: u64,
    pub name: String,
    pub size: u64,
    pub state: OfferState,
    /// The operator's; a VM's is its submission's.
    pub deadline: Tick,
}

impl Offer {
    /// Whether it survives a core: an operator's without a key does not, whose connection ends with it.
    fn is_kept(&self) -> bool {
        self.source.host().is_none_or(|file| file.key != 0)
    }
}

/// Offers and streams.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Transfers {
    pub offers: BTreeMap<u64, Offer>,
    pub streams: BTreeMap<u64, Stream>,
    /// Handles of streams. Derived.
    pub ends: BTreeMap<u64, (u64, Side)>,
    /// NEXT_OFFER completions not known to be published. Derived.
    pub presenting: BTreeMap<Token, u64>,
}

/// Answers the operator.
pub fn reply(office: &mut Office, client: u64, id: u64, reply: ControlReply, last: bool) {
    office.outputs.push_back(Output::Control {
        client,
        id,
        reply,
        last,
    });
}

/// Tells the operator of a failure.
pub fn reply_failed(office: &mut Office, client: u64, id: u64, status: u16, text: String) {
    reply(office, client, id, ControlReply::Failed { status, text }, true);
}

impl Transfers {
    /// OFFER, NEXT_OFFER, ACCEPT, REFUSE.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn submit(&mut self, office: &mut Office, vm: u64, fetched: &Fetched) -> Submitted {
        match fetched.opcode {
            Opcode::OFFER => self.offer(office, vm, fetched),
            Opcode::NEXT_OFFER => self.next_offer(office, vm, fetched),
            Opcode::ACCEPT => self.accept(office, vm, fetched),
            Opcode::REFUSE => self.refuse(office, vm, fetched),
            _ => self.stream_submit(office, fetched),
        }
    }

    fn offer(&mut self, office: &mut Office, vm: u64, fetched: &Fetched) -> Submitted {
        Uses {
            handle: true,
            offset: true,
            meta: true,
            ..Uses::default()
        }
        .check(fetched)?;
        if fetched.again
            && let Some(offer) = office.ledger.kept.offered(fetched.token)
        {
            office.park(fetched, Wait::Offer(offer));
            return Ok(Verdict::Open);
        }
        let (target, name) = names::two(&fetched.meta)?;
        let (target, name) = (names::peer(target)?, names::offered(name)?);
        if fetched.handle != 0 {
            return self.answer_request(office, vm, fetched, target);
        }
        if target == HOST_NAME {
            return Err(Refusal::OfferToHost);
        }
        let target = office.resolve(vm, target)?;
        let while_present = fetched.deadline == Tick::NEVER;
        if while_present && office.is_absent(target) {
            return Err(Refusal::PeerAbsent);
        }
        let full = |vm: u64, count: fn(&crate::office::Vm) -> usize| {
            office
                .vms
                .get(&vm)
                .is_none_or(|entry| count(entry) >= entry.limits.offers_max as usize)
        };
        if full(vm, |entry| entry.offers_out as usize) || full(target, |entry| entry.offers_in.len()) {
            return Err(Refusal::Offers);
        }
        let id = office.handle();
        let source = OfferSource::Vm {
            vm,
            token: fetched.token,
        };
        if let Some(entry) = office.vm_mut(vm) {
            entry.offers_out += 1;
        }
        office.park(fetched, Wait::Offer(id));
        let (name, size, deadline) = (name.to_owned(), fetched.offset, Tick::NEVER);
        let kept = Box::new(KeptOffer {
            vm,
            token: fetched.token,
            tag: fetched.tag,
            target,
            name: name.clone(),
            size,
            state: OfferState::Queued,
            while_present,
        });
        office.change(Change::Offered { offer: id, kept });
        self.queue(
            office,
            id,
            Offer {
                source,
                target,
                name,
                size,
                state: OfferState::Queued,
                deadline,
            },
        );
        Ok(Verdict::Open)
    }

    /// The operator's push or pull.
    pub fn host_offer(
        &mut self,
        office: &mut Office,
        source: OfferSource,
        target: u64,
        name: String,
        size: u64,
        wait_ns: u64,
    ) {
        let id = office.handle();
        let deadline = office.now.after_ns(wait_ns);
        office.timers.arm(deadline, Timer::ControlOffer { offer: id });
        if let Some(file) = source.host().filter(|file| file.key != 0) {
            let kept = Box::new(KeptHost {
                key: file.key,
                vm: target,
                push: matches!(source, OfferSource::Push(_)),
                name: name.clone(),
                size,
                stage: HostStage::Offered(OfferState::Queued),
            });
            office.change(Change::HostOffered { offer: id, kept });
        }
        self.queue(
            office,
            id,
            Offer {
                source,
                target,
                name,
                size,
                state: OfferState::Queued,
                deadline,
            },
        );
    }

    fn queue(&mut self, office: &mut Office, id: u64, offer: Offer) {
        let target = offer.target;
        self.offers.insert(id, offer);
        if let Some(entry) = office.vm_mut(target) {
            entry.offers_in.push_back(id);
        }
        self.present(office, target);
    }

    fn next_offer(&mut self, office: &mut Office, vm: u64, fetched: &Fetched) -> Submitted {
        Uses::default().check(fetched)?;
        let Some(entry) = office.vm_mut(vm) else {
            return Err(Refusal::NoSession);
        };
        if entry.next_offers.len() + entry.receives.len() >= entry.limits.receives_max as usize {
            return Err(Refusal::Receives);
        }
        if room(fetched.token, fetched.data_bytes) < crate::limits::NEXT_OFFER_BYTES_MIN {
            return Err(Refusal::BufferSmall);
        }
        entry.next_offers.push_back(fetched.token);
        office.park(fetched, Wait::NextOffer);
        self.present(office, vm);
        Ok(Verdict::Open)
    }

    /// Gives queued offers to posted NEXT_OFFERs.
    fn present(&mut self, office: &mut Office, target: u64) {
        loop {
            let Some(entry) = office.vm_mut(target) else {
                return;
            };
            let (Some(&token), Some(&id)) = (entry.next_offers.front(), entry.offers_in.front()) else {
                return;
            };
            entry.next_offers.pop_front();
            let Some(offer) = self.offers.get_mut(&id) else {
                entry.offers_in.pop_front();
                entry.next_offers.push_front(token);
                continue;
            };
            let data_bytes = office.flights.get(&token).map_or(0, |flight| flight.data_bytes);
            let payload = offer_payload(office, id, offer);
            if payload.len() as u64 > room(token, data_bytes) {
                office.log_refusal(target, Refusal::BufferSmall);
                let answer = Answer {
                    extra: payload.len() as u64,
                    ..Refusal::BufferSmall.answer()
                };
                office.end(token, answer);
                continue;
            }
            offer.state = OfferState::Presenting { token };
            let (kept, state) = (offer.is_kept(), offer.state);
            if kept {
                office.change(Change::OfferMoved { offer: id, state });
            }
            self.presenting.insert(token, id);
            if let Some(entry) = office.vm_mut(target) {
                entry.offers_in.pop_front();
            }
            office.end_with(token, Answer::ok(payload.len() as u64), payload, true);
        }
    }

    /// What came of a NEXT_OFFER's completion.
    pub fn published(&mut self, office: &mut Office, token: Token, published: bool) {
        let Some(id) = self.presenting.remove(&token) else {
            return;
        };
        let Some(offer) = self.offers.get_mut(&id) else {
            return;
        };
        if published {
            offer.state = OfferState::Shown {
                session: token.session,
            };
            if offer.is_kept() {
                let state = offer.state;
                office.change(Change::OfferMoved { offer: id, state });
            }
        } else {
            self.queue_again(office, id);
        }
    }

    /// An offer whose reader is gone waits for another, in its old place.
    fn queue_again(&mut self, office: &mut Office, id: u64) {
        let Some(offer) = self.offers.get_mut(&id) else {
            return;
        };
        offer.state = OfferState::Queued;
        if offer.is_kept() {
            let state = offer.state;
            office.change(Change::OfferMoved { offer: id, state });
        }
        let target = offer.target;
        if let Some(entry) = office.vm_mut(target) {
            let place = entry.offers_in.partition_point(|queued| *queued < id);
            entry.offers_in.insert(place, id);
        }
        self.present(office, target);
    }

    /// Takes an offer away, wherever it is.
    pub fn withdraw(&mut self, office: &mut Office, id: u64) -> Option<Offer> {
        let offer = self.offers.remove(&id)?;
        match offer.state {
            OfferState::Queued => {
                if let Some(entry) = office.vm_mut(offer.target) {
                    entry.offers_in.retain(|queued| *queued != id);
                }
            }
            OfferState::Presenting { token } => {
                self.presenting.remove(&token);
            }
            OfferState::Shown { .. } => {}
        }
        if let OfferSource::Vm { vm, .. } = offer.source
            && let Some(entry) = office.vm_mut(vm)
        {
            entry.offers_out = entry.offers_out.saturating_sub(1);
        }
        office
            .timers
            .disarm(offer.deadline, Timer::ControlOffer { offer: id });
        Some(offer)
    }

    /// The submission of an offer is void.
    pub fn void_offer(&mut self, office: &mut Office, id: u64) {
        if self.withdraw(office, id).is_some_and(|offer| offer.is_kept()) {
            office.change(Change::OfferGone { offer: id });
        }
    }

    /// Submissions of an earlier core life that are meant here will not come again: what hangs on them ends.
    pub fn void_before(&mut self, office: &mut Office, is_meant: impl Fn(Token) -> bool) {
        let gone = |offer: &Offer| match offer.source {
            OfferSource::Vm { token, .. } => is_meant(token) && !office.is_open(token),
            OfferSource::Push(_) | OfferSource::Pull(_) => false,
        };
        let offers = self.offers.iter().filter(|(_, offer)| gone(offer));
        for id in offers.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.void_offer(office, id);
        }
        self.void_halves(office, is_meant);
    }

    /// Offers and streams as the ledger has them, in a new core life.
    pub fn furnish(&mut self, office: &mut Office) {
        let kept = office.ledger.kept.offers.clone();
        for (id, kept) in kept {
            let KeptOffer {
                vm,
                token,
                tag: _,
                target,
                name,
                size,
                state,
                while_present: _,
            } = kept;
            if let Some(entry) = office.vm_mut(vm) {
                entry.offers_out += 1;
            }
            let offer = Offer {
                source: OfferSource::Vm { vm, token },
                target,
                name,
                size,
                state,
                deadline: Tick::NEVER,
            };
            self.place(office, id, offer);
        }
        self.furnish_streams(office);
        self.furnish_hosts(office);
    }

    /// Puts an offer of an earlier core life where it was.
    pub(super) fn place(&mut self, office: &mut Office, id: u64, offer: Offer) {
        match offer.state {
            OfferState::Queued => {
                if let Some(entry) = office.vm_mut(offer.target) {
                    let place = entry.offers_in.partition_point(|queued| *queued < id);
                    entry.offers_in.insert(place, id);
                }
            }
            OfferState::Presenting { token } => drop(self.presenting.insert(token, id)),
            OfferState::Shown { .. } => {}
        }
        self.offers.insert(id, offer);
    }

    /// A session is gone, or was reset: offers it has seen and not answered wait for another, or for its next program.
    pub fn session_gone(&mut self, office: &mut Office, session: u64) {
        let seen = |offer: &Offer| match offer.state {
            OfferState::Queued => false,
            OfferState::Presenting { token } => token.session == session,
            OfferState::Shown { session: seen } => seen == session,
        };
        let again: Vec<u64> = self
            .offers
            .iter()
            .filter(|(_, offer)| seen(offer))
            .map(|(id, _)| *id)
            .collect();
        for id in again {
            self.presenting.retain(|_, presented| *presented != id);
            self.queue_again(office, id);
        }
    }

    /// A VM's last device is gone: who offered it something and did not say how long that waits is told.
    pub fn vm_absent(&mut self, office: &mut Office, vm: u64) {
        let kept = office.ledger.kept.offers.iter();
        let to_it = kept.filter(|(_, offer)| offer.target == vm && offer.while_present);
        for id in to_it.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.fail_offer(office, id, Status::PEER_ABSENT.0);
        }
    }

    /// A VM is gone: what was offered to it fails.
    pub fn vm_gone(&mut self, office: &mut Office, vm: u64) {
        let to_it = self
            .offers
            .iter()
            .filter(|(_, offer)| offer.target == vm)
            .map(|(id, _)| *id);
        for id in to_it.collect::<Vec<_>>() {
            self.fail_offer(office, id, Status::PEER_ABSENT.0);
        }
    }

    /// The operator's connection is gone.
    pub fn client_gone(&mut self, office: &mut Office, client: u64) {
        let of_it = |source: &OfferSource| match source {
            OfferSource::Vm { .. } => false,
            OfferSource::Push(file) | OfferSource::Pull(file) => file.is_attached() && file.client == client,
        };
        let ids: Vec<u64> = self
            .offers
            .iter()
            .filter(|(_, offer)| of_it(&offer.source))
            .map(|(id, _)| *id)
            .collect();
        for id in ids {
            self.fail_offer(office, id, Status::CANCELLED.0);
        }
        self.streams_of_client_gone(office, client);
    }
}

fn offer_payload(office: &Office, id: u64, offer: &Offer) -> Vec<u8> {
    let (source, name) = match offer.source {
        OfferSource::Vm { vm, .. } => (vm, office.ledger.vms.get(&vm).map_or("", |account| &account.name)),
        OfferSource::Push(_) | OfferSource::Pull(_) => (PEER_HOST, HOST_NAME),
    };
    let kind = if matches!(offer.source, OfferSource::Pull(_)) {
        offer_kind::REQUEST
    } else {
        offer_kind::OFFER
    };
    // Both lengths are bounded by NAME_BYTES_MAX and PATH_BYTES_MAX.
    let header = OfferHeader {
        handle: id,
        source,
        size: if matches!(offer.source, OfferSource::Pull(_)) {
            SIZE_UNKNOWN
        } else {
            offer.size
        },
        kind,
        source_name_bytes: u16::try_from(name.len()).unwrap_or(u16::MAX),
        file_name_bytes: u16::try_from(offer.name.len()).unwrap_or(u16::MAX),
    };
    [header.as_bytes(), name.as_bytes(), offer.name.as_bytes()].concat()
}
