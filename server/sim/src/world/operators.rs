//! GARDEN, an operator: one connection to the core after the other, what was asked on it, and what came.
//!
//! In: replies that are in its socket, which it reads when it likes, also those of a core that is dead. Out: requests; what it got goes to the
//! shadow. A message that comes again is known to be one that a dying core may have given and not noted.

use super::World;
use crate::limits::REPLIES_MAX;
use crate::shadow::{Fate, HEAD_BYTES, HOST};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;
use vmgmt_core::interface::{ControlReply, ControlRequest};

/// The socket's way to the operator: what is in it stays, whatever becomes of the core.
pub type Replies = Rc<RefCell<VecDeque<(u64, ControlReply)>>>;

/// A message that was asked to be sent.
#[derive(Clone, Debug)]
struct Letter {
    number: u64,
    target: u64,
    message: Vec<u8>,
    /// 0: nobody can tell what came of it when the connection ends.
    key: u64,
}

/// The operator.
#[derive(Debug, Default)]
pub struct Operator {
    pub replies: Replies,
    /// Names its connection.
    client: u64,
    next_request: u64,
    sends: BTreeMap<u64, Letter>,
    receives: BTreeMap<u64, bool>,
    /// Their connection ended before an answer, and they are to be asked again with their key.
    unanswered: VecDeque<Letter>,
    /// Replies in the socket when the core's round began: what came after was perhaps not noted when it dies in that round.
    noted: Rc<Cell<usize>>,
    /// It does not read: where all others sleep, its reading would wake the core.
    pub(super) still: bool,
}

impl Operator {
    /// A round of the core begins.
    pub(super) fn note_replies(&self) {
        self.noting()();
    }

    /// What is to be called when one begins.
    pub(super) fn noting(&self) -> impl Fn() + 'static {
        let (noted, replies) = (Rc::clone(&self.noted), Rc::clone(&self.replies));
        move || noted.set(replies.borrow().len())
    }
}

impl World {
    /// Something that an operator does.
    pub(super) fn operate(&mut self) {
        // As the real one, it listens to operators when it has taken over, and not before.
        if !self.has_adopted() {
            return;
        }
        let what = self.town.borrow_mut().chance.below(20);
        match what {
            0 => self.operator_leaves(),
            1..9 => {
                let letter = self.letter();
                self.send_letter(letter);
            }
            9..12 => self.ask_unanswered(),
            12..18 => {
                let follow = what == 17;
                self.operator_receives(follow);
            }
            _ => self.operator_reads(),
        }
    }

    fn letter(&mut self) -> Letter {
        let mut town = self.town.borrow_mut();
        let vms = town.vms.len() as u64;
        let target = town.chance.between(1, vms);
        let bytes = town.chance.between(HEAD_BYTES as u64, 400) as usize;
        let (number, message) = town.shadow.send(HOST, target, bytes);
        let keyed = town.chance.permille(500);
        town.note(format!(
            "the operator sends number {number} to {target}, keyed: {keyed}"
        ));
        Letter {
            number,
            target,
            message,
            key: if keyed { number } else { 0 },
        }
    }

    fn send_letter(&mut self, letter: Letter) {
        let request = ControlRequest::Send {
            key: letter.key,
            target: format!("vm{}", letter.target),
            message: letter.message.clone(),
        };
        let id = self.ask_core(request);
        self.operator.sends.insert(id, letter);
    }

    fn ask_unanswered(&mut self) {
        if let Some(letter) = self.operator.unanswered.pop_front() {
            {
                let mut town = self.town.borrow_mut();
                town.shadow.ask_again(HOST, letter.number);
                town.note(format!("the operator sends number {} again", letter.number));
            }
            self.send_letter(letter);
        }
    }

    fn operator_receives(&mut self, follow: bool) {
        self.town
            .borrow_mut()
            .note(format!("the operator receives, follow: {follow}"));
        let id = self.ask_core(ControlRequest::Receive { follow, wait_ns: 1 });
        self.operator.receives.insert(id, follow);
    }

    fn ask_core(&mut self, request: ControlRequest) -> u64 {
        self.operator.next_request += 1;
        let id = self.operator.next_request;
        if let Some(core) = self.core.borrow_mut().as_mut() {
            core.control(self.operator.client, id, request);
        }
        id
    }

    /// It closes its connection, after it has read what is there.
    fn operator_leaves(&mut self) {
        self.operator_reads();
        if let Some(core) = self.core.borrow_mut().as_mut() {
            core.control_closed(self.operator.client);
        }
        self.town.borrow_mut().note("the operator leaves".into());
        self.connection_ends();
    }

    fn connection_ends(&mut self) {
        self.operator.client += 1;
        self.operator.receives.clear();
        for letter in std::mem::take(&mut self.operator.sends).into_values() {
            if letter.key == 0 {
                let mut town = self.town.borrow_mut();
                town.shadow.sent(HOST, letter.number, Fate::Unknown, 0);
            } else {
                self.operator.unanswered.push_back(letter);
            }
        }
    }

    /// The core is dead. What it put into the socket is read all the same. `in_a_round`: what that round put there may come again.
    pub(super) fn operator_loses_core(&mut self, in_a_round: bool) {
        let noted = self.operator.noted.get();
        self.read_replies(noted);
        self.town.borrow_mut().shadow.unsure_of_host(in_a_round);
        self.connection_ends();
    }

    /// Now and then it reads.
    pub(super) fn operator_may_read(&mut self) {
        let there = !self.operator.still && !self.operator.replies.borrow().is_empty();
        let reads = there && self.town.borrow_mut().chance.permille(600);
        if reads {
            self.operator_reads();
        }
    }

    /// It reads all that is there: there is room again.
    pub(super) fn operator_reads(&mut self) {
        let was_full = self.operator.replies.borrow().len() >= REPLIES_MAX;
        self.read_replies(usize::MAX);
        if was_full && let Some(core) = self.core.borrow_mut().as_mut() {
            core.operator_has_room();
        }
    }

    /// `noted`: so many replies are known to be noted by the core.
    fn read_replies(&mut self, noted: usize) {
        let replies: Vec<_> = self.operator.replies.borrow_mut().drain(..).collect();
        let mut town = self.town.borrow_mut();
        for (place, (id, reply)) in replies.into_iter().enumerate() {
            match reply {
                ControlReply::Sent { .. } => {
                    if let Some(letter) = self.operator.sends.remove(&id) {
                        town.shadow.sent(HOST, letter.number, Fate::Done, 1);
                    }
                }
                ControlReply::Failed { .. } => {
                    if let Some(letter) = self.operator.sends.remove(&id) {
                        town.shadow.sent(HOST, letter.number, Fate::Refused, 0);
                    }
                }
                ControlReply::Message {
                    source,
                    sequence,
                    message,
                    ..
                } => {
                    if self.operator.receives.get(&id) == Some(&false) {
                        self.operator.receives.remove(&id);
                    }
                    let stamped = source.strip_prefix("vm").and_then(|vm| vm.parse().ok());
                    town.shadow
                        .tell_host(stamped.unwrap_or_default(), sequence, &message, place >= noted);
                }
                ControlReply::NoMessage => {
                    self.operator.receives.remove(&id);
                }
                _ => {}
            }
        }
    }

    /// At the end an operator asks for all that is for it, and again for what was not answered. True: it did something.
    pub(super) fn operator_winds_down(&mut self) -> bool {
        let mut worked = !self.operator.replies.borrow().is_empty();
        self.operator_reads();
        if !self.has_adopted() {
            return worked;
        }
        if !self.operator.unanswered.is_empty() {
            self.ask_unanswered();
            worked = true;
        }
        let waits = self
            .town
            .borrow()
            .shadow
            .undelivered()
            .iter()
            .any(|(_, _, target)| *target == HOST);
        if waits && self.operator.receives.is_empty() {
            self.operator_receives(false);
            worked = true;
        }
        worked
    }

    /// What the operator still waits for when everything is idle.
    pub(super) fn operator_balance(&self) {
        if !self.operator.sends.is_empty() || !self.operator.unanswered.is_empty() {
            self.complaints.add(format!(
                "everything is idle, and the operator waits for answers: {:?}, to be asked again: {:?}",
                self.operator.sends.keys(),
                self.operator.unanswered.len()
            ));
        }
    }
}
