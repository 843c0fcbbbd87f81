//! WORKSHOP file: offers are answered: taken, refused, or come to nothing.
//!
//! In: ACCEPT, REFUSE, an OFFER that answers a request of the host. Out: answers to both sides, and streams (`streams.rs`).

use super::hosted::tell;
use super::offers::{HostFile, Offer, OfferSource, OfferState, Transfers};
use super::streams::Party;
use super::{Submitted, Uses, Verdict};
use crate::kept::{Change, KeptEnd, KeptStream, Settled};
use crate::office::{Office, failed};
use crate::refusal::Refusal;
use vmgmt_abi::Status;
use vmgmt_abi::chat::HOST_NAME;
use vmgmt_device::rings::{Answer, Fetched, Token};

impl Transfers {
    pub(super) fn shown(&self, vm: u64, id: u64) -> Result<&Offer, Refusal> {
        let offer = self
            .offers
            .get(&id)
            .filter(|offer| offer.target == vm)
            .ok_or(Refusal::OfferUnknown)?;
        if offer.state == OfferState::Queued {
            Err(Refusal::OfferUnknown)
        } else {
            Ok(offer)
        }
    }

    pub(super) fn accept(&mut self, office: &mut Office, vm: u64, fetched: &Fetched) -> Submitted {
        Uses {
            handle: true,
            ..Uses::default()
        }
        .check(fetched)?;
        let source = self.shown(vm, fetched.handle)?.source;
        if matches!(source, OfferSource::Pull(_)) {
            return Err(Refusal::HandleKind);
        }
        office.take_file(vm)?;
        if let OfferSource::Vm { vm: source, .. } = source
            && let Err(refusal) = office.take_file(source)
        {
            office.give_file(vm);
            return Err(refusal);
        }
        let kept = &office.ledger.kept;
        let tag = kept.offers.get(&fetched.handle).map_or(0, |kept| kept.tag);
        let Some(offer) = self.withdraw(office, fetched.handle) else {
            return Err(Refusal::OfferUnknown);
        };
        let handle = office.handle();
        let target = KeptEnd {
            vm,
            session: fetched.token.session,
            handle,
            open: true,
        };
        match offer.source {
            OfferSource::Vm { vm: source, token } => {
                let source_handle = office.handle();
                let source = KeptEnd {
                    vm: source,
                    session: token.session,
                    handle: source_handle,
                    open: true,
                };
                let stream = self.start(office, source.into(), target.into(), offer.size);
                let kept = Box::new(KeptStream::new(source, target, offer.size));
                let offerer = settled(token, tag, Answer::ok(source_handle));
                let accepter = settled(fetched.token, fetched.tag, Answer::ok(handle));
                let offer = fetched.handle;
                let began = Change::Began { offer, stream, kept };
                office.settle_all(vec![offerer, accepter], Some(fetched.token), began);
                Ok(Verdict::Open)
            }
            OfferSource::Push(file) | OfferSource::Pull(file) => {
                let stream = self.start(office, Party::Host(file), target.into(), offer.size);
                let size = offer.size;
                Ok(began(office, fetched, file, (stream, target, size)))
            }
        }
    }

    pub(super) fn answer_request(
        &mut self,
        office: &mut Office,
        vm: u64,
        fetched: &Fetched,
        target: &str,
    ) -> Submitted {
        if target != HOST_NAME {
            return Err(Refusal::AnswerToHost);
        }
        let OfferSource::Pull(file) = self.shown(vm, fetched.handle)?.source else {
            return Err(Refusal::HandleKind);
        };
        office.take_file(vm)?;
        self.withdraw(office, fetched.handle);
        let handle = office.handle();
        let source = KeptEnd {
            vm,
            session: fetched.token.session,
            handle,
            open: true,
        };
        let stream = self.start(office, source.into(), Party::Host(file), fetched.offset);
        Ok(began(office, fetched, file, (stream, source, fetched.offset)))
    }

    pub(super) fn refuse(&mut self, office: &mut Office, vm: u64, fetched: &Fetched) -> Submitted {
        Uses {
            handle: true,
            argument: true,
            ..Uses::default()
        }
        .check(fetched)?;
        let status = u16::try_from(fetched.argument).map_err(|_| Refusal::Field)?;
        if fetched.again && !self.offers.contains_key(&fetched.handle) {
            // Its first life refused it.
            return Ok(Verdict::Done(Answer::ok(0)));
        }
        self.shown(vm, fetched.handle)?;
        let status = if status == Status::OK.0 {
            Status::REFUSED.0
        } else {
            status
        };
        self.fail_offer(office, fetched.handle, status);
        Ok(Verdict::Done(Answer::ok(0)))
    }

    /// An offer comes to nothing.
    pub fn fail_offer(&mut self, office: &mut Office, id: u64, status: u16) {
        let tag = office.ledger.kept.offers.get(&id).map_or(0, |kept| kept.tag);
        let Some(offer) = self.withdraw(office, id) else {
            return;
        };
        match offer.source {
            OfferSource::Vm { token, .. } => {
                let settled = settled(token, tag, failed(status));
                office.settle_all(vec![settled], None, Change::OfferGone { offer: id });
            }
            OfferSource::Push(file) | OfferSource::Pull(file) => {
                tell(office, offer.target, file, status, (0, 0));
                if file.key != 0 {
                    office.change(Change::OfferGone { offer: id });
                }
            }
        }
    }
}

/// The VM took the operator's offer: its answer, and what is kept of it.
fn began(
    office: &mut Office,
    fetched: &Fetched,
    file: HostFile,
    (stream, end, size): (u64, KeptEnd, u64),
) -> Verdict {
    let answer = Answer::ok(end.handle);
    if file.key == 0 {
        return Verdict::Done(answer);
    }
    let began = Change::HostBegan {
        offer: fetched.handle,
        stream,
        end,
        size,
    };
    let accepter = settled(fetched.token, fetched.tag, answer);
    office.settle_all(vec![accepter], Some(fetched.token), began);
    Verdict::Open
}

fn settled(token: Token, tag: u32, answer: Answer) -> Settled {
    Settled {
        token,
        tag,
        answer,
        payload: Vec::new(),
        send: false,
    }
}
