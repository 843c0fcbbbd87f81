//! GARDEN, a guest's programs that hand files to other VMs: who offers what to whom, who takes or refuses it, and the ends of streams that come of it.
//!
//! In: chance, completions. Out: requests; what is known of each offer goes to the shadow. Must never know rings. (No byte goes over: what is looked
//! at here is who waits for whom, and what ends that.)

use crate::chance::Chance;
use crate::shadow::Shadow;
use vmgmt_abi::file::SIZE_UNKNOWN;
use vmgmt_abi::{Opcode, Status};

/// Room for a NEXT_OFFER.
const NEXT_BYTES: u64 = 512;
/// First byte of the names behind an offer's header.
const NAMES_AT: usize = 32;
/// NEXT_OFFERs at once.
const NEXT_MAX: usize = 2;

/// An offer: whose, and its number.
pub type Offer = (u64, u64);

/// A submission of these programs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    Offer(u64),
    Next,
    Accept(u64, Offer),
    Refuse(u64, Offer),
    /// Of a stream's end.
    Close(u64),
}

/// What is asked of the device.
#[derive(Clone, Debug)]
pub struct Request {
    pub opcode: Opcode,
    pub handle: u64,
    pub offset: u64,
    pub deadline_ns: u64,
    pub meta: Vec<u8>,
    /// Bytes that the device may write.
    pub room: u64,
}

/// One guest's programs.
#[derive(Debug)]
pub struct Offers {
    vm: u64,
    /// Handles of offers that it was shown and has not answered.
    shown: Vec<(u64, Offer)>,
    /// Handles of streams' ends.
    ends: Vec<u64>,
    /// NEXT_OFFERs in flight.
    posted: usize,
    /// One was refused, because too many receives are posted.
    pub crowded: bool,
}

fn request(opcode: Opcode) -> Request {
    Request {
        opcode,
        handle: 0,
        offset: 0,
        deadline_ns: 0,
        meta: Vec::new(),
        room: 0,
    }
}

impl Offers {
    pub const fn new(vm: u64) -> Self {
        Self {
            vm,
            shown: Vec::new(),
            ends: Vec::new(),
            posted: 0,
            crowded: false,
        }
    }

    /// Something to ask for.
    pub fn next(
        &mut self,
        shadow: &mut Shadow,
        chance: &mut Chance,
        peers: &[u64],
    ) -> Option<(Step, Request)> {
        match chance.below(4) {
            0 => {
                let target = *chance.pick(peers).filter(|peer| **peer != self.vm)?;
                let deadline_ns = if chance.permille(400) {
                    chance.between(1, 200_000_000)
                } else {
                    0
                };
                let number = shadow.offer(self.vm, target, deadline_ns != 0);
                let request = Request {
                    offset: SIZE_UNKNOWN,
                    deadline_ns,
                    meta: format!("vm{target}\0f{number}").into_bytes(),
                    ..request(Opcode::OFFER)
                };
                Some((Step::Offer(number), request))
            }
            1 => self.post(),
            _ => self.answer(shadow, chance),
        }
    }

    /// What is there for it is asked for, answered and ended; nothing begins.
    pub fn wind_down(&mut self, shadow: &mut Shadow, chance: &mut Chance) -> Option<(Step, Request)> {
        let awaited = self.posted == 0 && shadow.is_offered(self.vm);
        self.answer(shadow, chance)
            .or_else(|| awaited.then(|| self.post())?)
    }

    fn post(&mut self) -> Option<(Step, Request)> {
        if self.posted >= NEXT_MAX {
            return None;
        }
        self.posted += 1;
        let request = Request {
            room: NEXT_BYTES,
            ..request(Opcode::NEXT_OFFER)
        };
        Some((Step::Next, request))
    }

    fn answer(&mut self, shadow: &mut Shadow, chance: &mut Chance) -> Option<(Step, Request)> {
        if let Some(handle) = self.ends.pop() {
            let request = Request {
                handle,
                ..request(Opcode::CLOSE)
            };
            return Some((Step::Close(handle), request));
        }
        let (handle, offer) = self.shown.pop()?;
        let takes = chance.permille(600);
        shadow.answer_offer(offer, takes);
        let (step, opcode) = if takes {
            (Step::Accept(handle, offer), Opcode::ACCEPT)
        } else {
            (Step::Refuse(handle, offer), Opcode::REFUSE)
        };
        let request = Request {
            handle,
            ..request(opcode)
        };
        Some((step, request))
    }

    /// There was no room in the ring.
    pub fn put_back(&mut self, shadow: &mut Shadow, step: Step) {
        match step {
            Step::Offer(number) => shadow.offer_lost((self.vm, number)),
            Step::Next => self.posted -= 1,
            Step::Accept(handle, offer) | Step::Refuse(handle, offer) => self.shown.push((handle, offer)),
            Step::Close(handle) => self.ends.push(handle),
        }
    }

    /// A submission is void: its ring was closed over it. Whether it was carried out is not known; where it was, asking again finds a handle that is STALE.
    pub fn lost(&mut self, shadow: &mut Shadow, step: Step) {
        self.put_back(shadow, step);
    }

    /// The device was reset: handles are void.
    pub fn reset(&mut self) {
        self.shown.clear();
        self.ends.clear();
    }

    /// What came of a submission; the complaint, if that must not be.
    pub fn completed(
        &mut self,
        shadow: &mut Shadow,
        step: Step,
        (status, result): (Status, u64),
        data: &[u8],
        cut: bool,
    ) -> Option<String> {
        if step == Step::Next {
            self.posted -= 1;
        }
        match (step, status) {
            (Step::Offer(number), _) => {
                if status == Status::OK {
                    self.ends.push(result);
                }
                shadow.offer_ended((self.vm, number), status, cut)
            }
            (Step::Next, Status::OK) => {
                let Some((handle, offer)) = parse(data.get(..result as usize)?) else {
                    return Some(format!("not an offer: {data:x?}"));
                };
                self.shown.push((handle, offer));
                shadow.offer_shown(offer, self.vm)
            }
            (Step::Next, Status::OVER_BUDGET) => {
                self.crowded = true;
                None
            }
            (Step::Accept(_, offer), Status::OK) => {
                self.ends.push(result);
                shadow.offer_taken(offer)
            }
            // Both need room for a stream.
            (Step::Accept(handle, offer), Status::OVER_BUDGET) => {
                self.shown.push((handle, offer));
                None
            }
            (Step::Refuse(..) | Step::Close(_), Status::OK) => None,
            // Whoever offered it has taken it back; or it was shown by a core that died over it, and waits to be shown again.
            (Step::Accept(..) | Step::Refuse(..), Status::STALE) => None,
            // A core closed it and died over that.
            (Step::Close(_), Status::STALE) => None,
            (_, Status::NOT_READY) => None,
            _ => Some("no such end".into()),
        }
    }
}

/// Handle, source and number.
fn parse(data: &[u8]) -> Option<(u64, Offer)> {
    let word = |at: usize| Some(u64::from_le_bytes(data.get(at..at + 8)?.try_into().ok()?));
    let names = str::from_utf8(data.get(NAMES_AT..)?).ok()?;
    let (handle, source) = (word(0)?, word(8)?);
    let number = names.strip_prefix(&format!("vm{source}f"))?.parse().ok()?;
    Some((handle, (source, number)))
}
