//! WORKSHOP file: the operator's transfers that outlive a core: taken up again, waited for, told.
//!
//! The operator's connection, and the descriptor that came over it, end with the core. A transfer that has a key stays, stands still, and goes on when
//! the operator asks again with that key; where it ended meanwhile, the operator hears how. In: pushes and pulls with a key, what is
//! kept. Out: offers and streams as they were, answers to the operator. It never sees a byte of a file.

use super::offers::{HostFile, Offer, OfferSource, Transfers, reply, reply_failed};
use super::streams::{Failure, Finish, Party, Side, Stream};
use crate::deadlines::Timer;
use crate::effect::Effect;
use crate::effects::Continuation;
use crate::interface::ControlReply;
use crate::kept::{Change, HostResult, HostStage, KeptHost, KeptHostStream};
use crate::limits::OPERATOR_RETURNS_NS_MAX;
use crate::office::Office;
use vmgmt_abi::Status;
use vmgmt_device::Tick;

/// Tells the operator what came of a transfer, now or when it asks again, and closes its file. `bytes` and `crc32`: of a whole one.
pub(super) fn tell(office: &mut Office, vm: u64, file: HostFile, status: u16, (bytes, crc32): (u64, u32)) {
    let result = HostResult {
        key: file.key,
        status,
        bytes,
        crc32,
    };
    if file.key != 0 {
        office.change(Change::HostTold(result));
    }
    if file.is_attached() {
        answer(office, vm, file, result);
    }
}

fn answer(office: &mut Office, vm: u64, file: HostFile, result: HostResult) {
    office.effect(vm, Effect::Close { slot: file.slot }, Continuation::Nothing);
    let HostResult {
        key: _,
        status,
        bytes,
        crc32,
    } = result;
    if status == Status::OK.0 {
        let done = ControlReply::Transferred { bytes, crc32 };
        reply(office, file.client, file.id, done, true);
    } else {
        let text = format!("not transferred: {}", Status(status).describe());
        reply_failed(office, file.client, file.id, status, text);
    }
}

/// Has the checksum of a file that is pushed worked out, where it is not known and the file is there.
pub(super) fn ask_checksum(office: &mut Office, id: u64, stream: &Stream) {
    let file = stream.host_source().filter(HostFile::is_attached);
    let (Some(file), None) = (file, stream.finish) else {
        return;
    };
    let effect = Effect::Checksum {
        slot: file.slot,
        offset: 0,
        bytes: stream.size,
    };
    office.effect(stream.vm(), effect, Continuation::PushChecksum { stream: id });
}

impl Transfers {
    /// The operator asks for a transfer with a key: if there was one, that goes on (or its result is told), and no other begins.
    pub fn take_up(
        &mut self,
        office: &mut Office,
        source: OfferSource,
        vm: Option<u64>,
        size: u64,
        wait_ns: u64,
    ) -> bool {
        let Some(file) = source.host().filter(|file| file.key != 0) else {
            return false;
        };
        if let Some(result) = office.ledger.kept.host_result(file.key) {
            answer(office, vm.unwrap_or(0), file, result);
            return true;
        }
        let mut kept = office.ledger.kept.host.iter();
        let Some((&id, kept)) = kept.find(|(_, kept)| kept.key == file.key) else {
            return false;
        };
        let push = matches!(source, OfferSource::Push(_));
        let same = kept.push == push && Some(kept.vm) == vm && (!push || kept.size == size);
        if !same {
            let text = "the key is another transfer's: take a new one for each";
            refuse(office, file, Status::BAD_ARGUMENT, text);
            return true;
        }
        if let Some(offer) = self.offers.get_mut(&id) {
            if !offer.source.awaits_operator() {
                refuse(office, file, Status::BUSY, BUSY);
                return true;
            }
            let deadline = office.now.after_ns(wait_ns);
            let timer = Timer::ControlOffer { offer: id };
            office.timers.disarm(offer.deadline, timer);
            office.timers.arm(deadline, timer);
            (offer.source, offer.deadline) = (source, deadline);
        } else if let Some(stream) = self.streams.get_mut(&id) {
            if !stream.awaits_operator() {
                refuse(office, file, Status::BUSY, BUSY);
                return true;
            }
            let end = if push {
                &mut stream.source
            } else {
                &mut stream.target
            };
            *end = Party::Host(file);
            stream.progress = office.now;
            if stream.failure.is_some() {
                self.finish_failed(office, id);
            } else {
                ask_checksum(office, id, stream);
                self.pump(office, id);
            }
        }
        true
    }

    /// The operator's offers and streams as the ledger has them, in a new core life.
    pub(super) fn furnish_hosts(&mut self, office: &mut Office) {
        for (id, kept) in office.ledger.kept.host.clone() {
            let KeptHost {
                key,
                vm,
                push,
                name,
                size,
                stage,
            } = kept;
            let file = HostFile::waiting(key);
            match stage {
                HostStage::Offered(state) => {
                    let source = if push {
                        OfferSource::Push(file)
                    } else {
                        OfferSource::Pull(file)
                    };
                    let offer = Offer {
                        source,
                        target: vm,
                        name,
                        size,
                        state,
                        deadline: Tick::NEVER,
                    };
                    self.place(office, id, offer);
                }
                HostStage::Streaming(stream) => {
                    self.furnish_host_stream(office, id, file, (push, size), stream)
                }
            }
        }
    }

    fn furnish_host_stream(
        &mut self,
        office: &mut Office,
        id: u64,
        file: HostFile,
        (push, size): (bool, u64),
        kept: KeptHostStream,
    ) {
        let KeptHostStream {
            end,
            moved,
            crc32,
            end_read,
            failure,
        } = kept;
        let (mine, side) = (Party::from(end), if push { Side::Target } else { Side::Source });
        self.furnish_end(office, id, side, end);
        let host = Party::Host(file);
        let (source, target) = if push { (host, mine) } else { (mine, host) };
        let finish = crc32.filter(|_| push).map(|crc32| Finish {
            token: None,
            bytes: size,
            crc32: Some(crc32),
        });
        let stream = Stream {
            moved,
            taken: if push { 0 } else { moved },
            finish,
            end_read,
            failure,
            crc32: if push { 0 } else { crc32.unwrap_or(0) },
            ..Stream::new(source, target, size, office.now)
        };
        self.streams.insert(id, stream);
    }

    /// A new core life begins now: operators of an earlier one have some time to ask again.
    pub fn await_operators(&mut self, office: &mut Office) {
        let until = office.now.after_ns(OPERATOR_RETURNS_NS_MAX);
        for (id, offer) in &mut self.offers {
            if offer.source.awaits_operator() {
                let timer = Timer::ControlOffer { offer: *id };
                office.timers.disarm(offer.deadline, timer);
                office.timers.arm(until, timer);
                offer.deadline = until;
            }
        }
        for (id, stream) in &self.streams {
            if stream.awaits_operator() {
                office.timers.arm(until, Timer::ControlStream { stream: *id });
            }
        }
    }

    /// The time is over.
    pub fn nobody_came(&mut self, office: &mut Office, id: u64) {
        if self.streams.get(&id).is_some_and(Stream::awaits_operator) {
            let gone = Status::PEER_ABSENT.0;
            let failure = Failure {
                source: gone,
                target: gone,
            };
            self.fail(office, id, failure);
        }
    }
}

const BUSY: &str = "a transfer with this key is under way, by another connection";

fn refuse(office: &mut Office, file: HostFile, status: Status, text: &str) {
    office.effect(0, Effect::Close { slot: file.slot }, Continuation::Nothing);
    reply_failed(office, file.client, file.id, status.0, text.to_owned());
}
