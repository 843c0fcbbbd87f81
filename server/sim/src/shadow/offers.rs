//! GARDEN, the shadow's part about offers: how each may end, and who may see it.
//!
//! An offer waits until it is answered, withdrawn (by its deadline, a CANCEL, or because its source's device was reset), or, where it has no deadline,
//! until its target has no device any more. That the target's device is reset ends nothing.

use super::Shadow;
use std::collections::{BTreeMap, BTreeSet};
use vmgmt_abi::Status;

/// An offer.
#[derive(Clone, Debug)]
struct Offer {
    target: u64,
    has_deadline: bool,
    /// The target had a device when it was made, and the core knew; so often it had gone before.
    present: Option<u64>,
    /// ACCEPT, REFUSE was submitted.
    accept_asked: bool,
    refuse_asked: bool,
    /// ACCEPT was completed.
    taken: bool,
    /// What its source was told; `None`: nothing yet. `Some(None)`: it does not hear it any more.
    ended: Option<Option<Status>>,
}

/// What is known of offers, and of who is there.
#[derive(Debug, Default)]
pub struct Offers {
    offers: BTreeMap<(u64, u64), Offer>,
    next: u64,
    /// How often each VM's device went away.
    departures: BTreeMap<u64, u64>,
    /// VMs that a core has answered since their device is there.
    heard: BTreeSet<u64>,
    /// How many came to a stream.
    pub taken: u64,
}

impl Shadow {
    /// A core has answered this VM's device.
    pub fn is_heard(&mut self, vm: u64) {
        self.offers.heard.insert(vm);
    }

    /// A VM's device goes away: its process ends.
    pub fn leaves(&mut self, vm: u64) {
        self.offers.heard.remove(&vm);
        *self.offers.departures.entry(vm).or_default() += 1;
    }

    fn departures(&self, vm: u64) -> u64 {
        self.offers.departures.get(&vm).copied().unwrap_or_default()
    }

    /// A VM is about to offer something: the offer's number.
    pub fn offer(&mut self, source: u64, target: u64, has_deadline: bool) -> u64 {
        self.offers.next += 1;
        let number = self.offers.next;
        let present = self.offers.heard.contains(&target) && !self.hostile.contains(&target);
        let offer = Offer {
            target,
            has_deadline,
            present: present.then(|| self.departures(target)),
            accept_asked: false,
            refuse_asked: false,
            taken: false,
            ended: None,
        };
        self.offers.offers.insert((source, number), offer);
        number
    }

    /// Whether something is offered to a VM and not answered.
    #[must_use]
    pub fn is_offered(&self, vm: u64) -> bool {
        let mut offers = self.offers.offers.values();
        offers.any(|offer| offer.target == vm && offer.ended.is_none())
    }

    /// Its target has seen it.
    pub fn offer_shown(&mut self, key: (u64, u64), target: u64) -> Option<String> {
        match self.offers.offers.get(&key) {
            None => Some(format!("offer {} of VM {} was never made", key.1, key.0)),
            Some(offer) if offer.target != target => Some(format!(
                "offer {} of VM {} is for VM {}",
                key.1, key.0, offer.target
            )),
            Some(_) => None,
        }
    }

    /// Its target is about to answer it.
    pub fn answer_offer(&mut self, key: (u64, u64), takes: bool) {
        if let Some(offer) = self.offers.offers.get_mut(&key) {
            offer.accept_asked |= takes;
            offer.refuse_asked |= !takes;
        }
    }

    /// Its target has a stream of it.
    pub fn offer_taken(&mut self, key: (u64, u64)) -> Option<String> {
        let offer = self.offers.offers.get_mut(&key)?;
        let again = std::mem::replace(&mut offer.taken, true);
        self.offers.taken += u64::from(!again);
        match offer.ended {
            _ if again => Some("it was accepted twice".into()),
            None | Some(None | Some(Status::OK)) => None,
            Some(Some(status)) => Some(format!("it was accepted, and its source was told {status:?}")),
        }
    }

    /// Its source will not hear what comes of it.
    pub fn offer_lost(&mut self, key: (u64, u64)) {
        if let Some(offer) = self.offers.offers.get_mut(&key) {
            offer.ended = Some(None);
        }
    }

    /// What its source was told. `cut`: it was cancelled, or has a deadline.
    pub fn offer_ended(&mut self, key: (u64, u64), status: Status, cut: bool) -> Option<String> {
        let offer = self.offers.offers.get(&key)?.clone();
        let stayed = offer
            .present
            .is_some_and(|before| before == self.departures(offer.target));
        if let Some(offer) = self.offers.offers.get_mut(&key) {
            offer.ended = Some(Some(status));
        }
        let target = offer.target;
        let may = match status {
            Status::OK => offer.accept_asked,
            Status::REFUSED => offer.refuse_asked,
            Status::TIMED_OUT => offer.has_deadline,
            Status::CANCELLED => cut,
            Status::PEER_ABSENT => !offer.has_deadline && !stayed,
            Status::OVER_BUDGET | Status::NOT_READY => true,
            _ => false,
        };
        if !may {
            return Some(format!("{status:?} to {offer:?}, the target stayed: {stayed}"));
        }
        (offer.taken && status != Status::OK).then(|| format!("VM {target} has accepted it"))
    }
}
