//! WORKSHOP chat: presence, messages, mailboxes.
//!
//! In: PUBLISH, PEERS, SEND, RECEIVE, the operator's messages, and whether a delivery was published. Out: answers, records.
//! A message is *accepted* when it is in its target's mailbox (and journaled), *delivered* when the completion that carries it is published.
//! It never knows what a message says.

use super::delivery::{arm_expiry, dispatch, expire_host};
use super::names;
use super::offers::reply;
use super::{Submitted, Uses, Verdict, pad_to_word};
use crate::deadlines::Timer;
use crate::effect::{Effect, Outcome};
use crate::effects::{Continuation, whole};
use crate::interface::ControlReply;
use crate::journal::{Message, Presence, Record, Targets};
use crate::ledger::books;
use crate::limits::{HOST_GIVEN_MAX, HOST_MAILBOX_BYTES_MAX, RECEIVE_BYTES_MIN};
use crate::modes::file::failure;
use crate::modes::listing::listing_answer;
use crate::office::{Office, Wait, input_bytes, room};
use crate::refusal::Refusal;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use vmgmt_abi::chat::{
    ALL_NAME, DESCRIPTION_BYTES_MAX, HOST_NAME, PEER_ALL, PEER_BY_NAME, PEER_HOST, PeerEntry, presence,
};
use vmgmt_abi::{Opcode, Status};
use vmgmt_device::Tick;
use vmgmt_device::rings::{Answer, Channel, Fetched, Token};
use zerocopy::IntoBytes;

/// An operator who waits for messages.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Listener {
    pub client: u64,
    pub id: u64,
    pub follow: bool,
    pub deadline: Tick,
}

/// The chat room.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Chat {
    /// Channels with a SEND whose body is being fetched, and the SENDs behind it: first in, first out.
    pub fetching: BTreeMap<(u64, Channel), VecDeque<Box<Fetched>>>,
    /// The SENDs whose bodies are being fetched.
    pub bodies: BTreeMap<Token, Box<Fetched>>,
    pub listeners: VecDeque<Listener>,
    /// Messages to the host that an operator's request (connection, id) was given, by position: out of the mailbox when it has them.
    pub given: BTreeMap<u64, (u64, u64)>,
}

impl Chat {
    /// Takes an operation of chat mode.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn submit(&mut self, office: &mut Office, vm: u64, fetched: Box<Fetched>) -> Submitted {
        match fetched.opcode {
            Opcode::SEND => self.send(office, vm, fetched),
            Opcode::RECEIVE => receive(office, vm, &fetched),
            Opcode::PUBLISH => publish(office, vm, &fetched),
            Opcode::PEERS => self.peers(office, vm, &fetched),
            _ => Err(Refusal::UnknownOpcode),
        }
    }

    fn send(&mut self, office: &mut Office, vm: u64, fetched: Box<Fetched>) -> Submitted {
        if !self.fetching.is_empty()
            && let Some(queue) = self
                .fetching
                .get_mut(&(fetched.token.session, fetched.token.channel))
        {
            office.park(&fetched, Wait::Turn);
            queue.push_back(fetched);
            return Ok(Verdict::Open);
        }
        self.send_now(office, vm, fetched, false)
    }

    /// `open`: it is parked already.
    fn send_now(&mut self, office: &mut Office, vm: u64, mut fetched: Box<Fetched>, open: bool) -> Submitted {
        Uses {
            handle: true,
            argument: true,
            meta: fetched.handle == PEER_BY_NAME,
            ..Uses::default()
        }
        .check(&fetched)?;
        let bytes_max = office
            .vms
            .get(&vm)
            .map_or(0, |entry| entry.limits.message_bytes_max);
        if input_bytes(&fetched) > bytes_max {
            return Err(Refusal::MessageBytes);
        }
        if let Some(body) = fetched.data.take() {
            let result = self.send_body(office, vm, &fetched, body)?;
            return Ok(Verdict::Done(Answer::ok(result)));
        }
        if fetched.data_bytes == 0 {
            let result = self.send_body(office, vm, &fetched, Vec::new())?;
            return Ok(Verdict::Done(Answer::ok(result)));
        }
        let token = fetched.token;
        let effect = Effect::Fetch {
            from: whole(token, fetched.data_bytes),
        };
        if open {
            let id = office.effect(vm, effect, Continuation::Fetch { token });
            if let Some(flight) = office.flights.get_mut(&token) {
                flight.wait = Wait::Effect { id, fills: false };
            }
        } else {
            office.park_effect(&fetched, effect, false, Continuation::Fetch { token });
        }
        self.fetching.entry((token.session, token.channel)).or_default();
        self.bodies.insert(token, fetched);
        Ok(Verdict::Open)
    }

    /// The body of a message is there, or not. The SENDs behind it are next.
    pub fn fetched(&mut self, office: &mut Office, token: Token, outcome: Outcome) {
        if let Some(fetched) = self.bodies.remove(&token)
            && let Some(flight) = office.flights.get(&token).copied()
        {
            match outcome {
                Outcome::Data(body) => match self.send_body(office, flight.vm, &fetched, body) {
                    Ok(result) => {
                        office.end_with(token, Answer::ok(result), Vec::new(), true);
                        self.dispatch_after(office);
                    }
                    Err(refusal) => office.refuse(token, refusal),
                },
                other => {
                    office.end(token, failure(&other));
                }
            }
        }
        self.next_in_turn(office, (token.session, token.channel));
    }

    fn next_in_turn(&mut self, office: &mut Office, place: (u64, Channel)) {
        while let Some(fetched) = self.fetching.get_mut(&place).and_then(VecDeque::pop_front) {
            let token = fetched.token;
            let Some(flight) = office.flights.get(&token).copied() else {
                continue;
            };
            match self.send_now(office, flight.vm, fetched, true) {
                Ok(Verdict::Open) => return,
                Ok(Verdict::Done(answer) | Verdict::Data(answer, _)) => {
                    office.end_with(token, answer, Vec::new(), true);
                    self.dispatch_after(office);
                }
                Err(refusal) => office.refuse(token, refusal),
            }
        }
        self.fetching.remove(&place);
    }

    /// A SEND that waits for its turn or its body is given up or void.
    pub fn forget(&mut self, token: Token) {
        self.bodies.remove(&token);
        if let Some(queue) = self.fetching.get_mut(&(token.session, token.channel)) {
            queue.retain(|fetched| fetched.token != token);
        }
    }

    /// Who is meant, may he be reached, was this sent before: then the message is accepted. The answer's result.
    fn send_body(
        &mut self,
        office: &mut Office,
        vm: u64,
        fetched: &Fetched,
        body: Vec<u8>,
    ) -> Result<u64, Refusal> {
        let token = fetched.token;
        let asked = match fetched.handle {
            PEER_BY_NAME => match names::peer(&fetched.meta)? {
                ALL_NAME => PEER_ALL,
                name => office.resolve(vm, name)?,
            },
            number => number,
        };
        let key = fetched.argument;
        if key != 0
            && let Some(result) = office.ledger.repeated(vm, asked, key)
        {
            return Ok(result);
        }
        let targets = if asked == PEER_ALL {
            all_targets(office, vm, body.len() as u64)?
        } else {
            office.reach(vm, asked)?;
            has_room(office, vm, asked, body.len() as u64, 0)?;
            Targets::One(asked)
        };
        let source = office
            .ledger
            .vms
            .get(&vm)
            .map(|account| (account.sequence, Arc::clone(&account.name)));
        let (sequence, source_name) = source.ok_or(Refusal::NoSession)?;
        let result = if asked == PEER_ALL {
            targets.numbers().len() as u64
        } else {
            sequence + 1
        };
        let message = Message {
            sequence: sequence + 1,
            source: vm,
            source_name,
            accepted_ns: office.wall.wall_now_ns(office.now),
            stamp_ns: office.wall.mailbox_now_ns(office.now),
            to_all: asked == PEER_ALL,
            body,
        };
        if let Some(entry) = office.vm_mut(vm) {
            entry.counters.messages_sent += 1;
            entry.counters.bytes_from_vm = entry
                .counters
                .bytes_from_vm
                .saturating_add(message.body.len() as u64);
        }
        let origin = Some((token, fetched.tag));
        self.pending_dispatch(office, &targets);
        office.record(Record::Accepted {
            message: Arc::new(message),
            targets,
            asked,
            key,
            result,
            origin,
        });
        Ok(result)
    }

    /// A message of the operator. Its number, or to all how many took it.
    ///
    /// # Errors
    /// Why it is refused.
    pub fn host_send(
        &mut self,
        office: &mut Office,
        target: &str,
        body: Vec<u8>,
        key: u64,
    ) -> Result<u64, Refusal> {
        let asked = match target {
            ALL_NAME => PEER_ALL,
            HOST_NAME => PEER_HOST,
            name => office.ledger.number(name).ok_or(Refusal::PeerAbsent)?,
        };
        if key != 0
            && let Some(result) = office.ledger.repeated(PEER_HOST, asked, key)
        {
            return Ok(result);
        }
        let targets = if target == ALL_NAME {
            published(office, PEER_HOST, body.len() as u64, |_| true)?
        } else {
            // To the host itself: the operators who wait for messages.
            has_room(office, PEER_HOST, asked, body.len() as u64, 0)?;
            Targets::One(asked)
        };
        let sequence = office.ledger.host_sequence + 1;
        let to_all = matches!(targets, Targets::Many(_));
        let result = if to_all {
            targets.numbers().len() as u64
        } else {
            sequence
        };
        let message = Message {
            sequence,
            source: PEER_HOST,
            source_name: Arc::from(HOST_NAME),
            accepted_ns: office.wall.wall_now_ns(office.now),
            stamp_ns: office.wall.mailbox_now_ns(office.now),
            to_all,
            body,
        };
        self.pending_dispatch(office, &targets);
        office.record(Record::Accepted {
            message: Arc::new(message),
            targets,
            asked,
            key,
            result,
            origin: None,
        });
        Ok(result)
    }

    fn pending_dispatch(&mut self, office: &mut Office, targets: &Targets) {
        office.woken.extend_from_slice(targets.numbers());
    }

    /// After the sender's answer: gives what was accepted to who waits for it.
    pub fn dispatch_after(&mut self, office: &mut Office) {
        while let Some(target) = office.woken.pop() {
            if target == PEER_HOST {
                self.dispatch_host(office);
            } else {
                dispatch(office, target, true);
                arm_expiry(office, target);
            }
        }
    }

    /// The operator waits for messages.
    pub fn listen(&mut self, office: &mut Office, listener: Listener) {
        self.listeners.push_back(listener);
        let timer = Timer::ControlReceive {
            client: listener.client,
            id: listener.id,
        };
        office.timers.arm(listener.deadline, timer);
        self.dispatch_host(office);
    }

    /// Gives what is in the host's mailbox to those who wait for it. It stays there until [`Chat::told`]: a core that dies before the bytes are
    /// in the operator's socket has not lost it, one that dies just after gives it again.
    fn dispatch_host(&mut self, office: &mut Office) {
        loop {
            let given = |to: &Listener| {
                let to = (to.client, to.id);
                self.given.values().filter(|given| **given == to).count()
            };
            let Some(place) = (self.listeners.iter()).position(|to| given(to) < HOST_GIVEN_MAX) else {
                break;
            };
            let next = |(position, _): &(u64, _)| !self.given.contains_key(position);
            let Some((position, held)) = office.ledger.host.iter().find(next) else {
                break;
            };
            let Some(listener) = self.listeners.get(place).copied() else {
                break;
            };
            let message = Arc::clone(&held.message);
            self.given.insert(position, (listener.client, listener.id));
            if !listener.follow {
                self.listeners.remove(place);
                let timer = Timer::ControlReceive {
                    client: listener.client,
                    id: listener.id,
                };
                office.timers.disarm(listener.deadline, timer);
            }
            let message = ControlReply::Message {
                source: message.source_name.to_string(),
                sequence: message.sequence,
                accepted_ns: message.accepted_ns,
                message: message.body.clone(),
            };
            reply(office, listener.client, listener.id, message, !listener.follow);
        }
        expire_host(office);
    }

    /// The operator has the oldest message that this request was given.
    pub fn told(&mut self, office: &mut Office, client: u64, id: u64) {
        let mut given = self.given.iter();
        let Some(position) = given
            .find(|(_, to)| **to == (client, id))
            .map(|(place, _)| *place)
        else {
            return;
        };
        self.given.remove(&position);
        // (It may have become too old meanwhile.)
        if office.ledger.host.get(position).is_some() {
            office.record(Record::Taken { position });
        }
        self.dispatch_host(office);
    }

    /// The operator waits no longer.
    pub fn listener_timed_out(&mut self, office: &mut Office, client: u64, id: u64) {
        let count = self.listeners.len();
        self.listeners
            .retain(|listener| (listener.client, listener.id) != (client, id));
        if self.listeners.len() != count {
            reply(office, client, id, ControlReply::NoMessage, true);
        }
    }

    /// The operator's connection is gone.
    pub fn client_gone(&mut self, office: &mut Office, client: u64) {
        let timers = &mut office.timers;
        self.listeners.retain(|listener| {
            let stays = listener.client != client;
            if !stays {
                timers.disarm(
                    listener.deadline,
                    Timer::ControlReceive {
                        client,
                        id: listener.id,
                    },
                );
            }
            stays
        });
        self.given.retain(|_, (to, _)| *to != client);
        self.dispatch_host(office);
    }

    fn peers(&self, office: &Office, vm: u64, fetched: &Fetched) -> Submitted {
        Uses {
            offset: true,
            ..Uses::default()
        }
        .check(fetched)?;
        let room = room(fetched.token, fetched.data_bytes);
        let mut payload = Vec::new();
        // Cursor: 0 is the host, n the first VM whose number is at least n - 1.
        if fetched.offset == 0 {
            let listening = if self.listeners.is_empty() {
                0
            } else {
                presence::LISTENING
            };
            let bits = presence::CONNECTED | presence::PUBLISHED | listening;
            push_peer(&mut payload, PEER_HOST, bits, HOST_NAME, "");
            if payload.len() as u64 > room {
                return Err(Refusal::BufferSmall);
            }
        }
        for (number, account) in office.ledger.vms.from(fetched.offset.saturating_sub(1)) {
            if number == vm || office.reach(vm, number).is_err() {
                continue;
            }
            let length = payload.len();
            let description = account
                .presence
                .as_ref()
                .map_or("", |presence| presence.description.as_str());
            push_peer(
                &mut payload,
                number,
                presence_bits(office, number),
                &account.name,
                description,
            );
            if payload.len() as u64 > room {
                payload.truncate(length);
                if payload.is_empty() {
                    return Err(Refusal::BufferSmall);
                }
                return Ok(Verdict::Data(listing_answer(length, number + 1), payload));
            }
        }
        Ok(Verdict::Data(listing_answer(payload.len(), 0), payload))
    }
}

/// What is seen of a VM by those who may reach it.
#[must_use]
pub fn presence_bits(office: &Office, vm: u64) -> u32 {
    let published = office
        .ledger
        .vms
        .get(&vm)
        .is_some_and(|account| account.presence.is_some());
    let Some(entry) = office.vms.get(&vm) else {
        return 0;
    };
    let bit = |set: bool, bit: u32| if set { bit } else { 0 };
    bit(!entry.sessions.is_empty(), presence::CONNECTED)
        | bit(published, presence::PUBLISHED)
        | bit(!entry.receives.is_empty(), presence::LISTENING)
}

fn push_peer(payload: &mut Vec<u8>, number: u64, presence: u32, name: &str, description: &str) {
    // Both are bounded: NAME_BYTES_MAX, DESCRIPTION_BYTES_MAX.
    let entry = PeerEntry {
        number,
        presence,
        name_bytes: u16::try_from(name.len()).unwrap_or(u16::MAX),
        description_bytes: u16::try_from(description.len()).unwrap_or(u16::MAX),
    };
    payload.extend_from_slice(entry.as_bytes());
    payload.extend_from_slice(name.as_bytes());
    payload.extend_from_slice(description.as_bytes());
    pad_to_word(payload);
}

fn publish(office: &mut Office, vm: u64, fetched: &Fetched) -> Submitted {
    Uses {
        argument: true,
        ..Uses::default()
    }
    .check(fetched)?;
    let presence = match fetched.argument {
        0 => None,
        1 => {
            let empty = Vec::new();
            let data = match &fetched.data {
                Some(data) => data,
                None if fetched.data_bytes == 0 => &empty,
                None => return Err(Refusal::Field),
            };
            if data.len() > DESCRIPTION_BYTES_MAX {
                return Err(Refusal::Field);
            }
            let description = std::str::from_utf8(data).map_err(|_| Refusal::Field)?.to_owned();
            Some(Presence {
                session: fetched.token.session,
                description,
            })
        }
        _ => return Err(Refusal::Field),
    };
    office.record(Record::Presence { vm, presence });
    Ok(Verdict::Done(Answer::ok(0)))
}

fn receive(office: &mut Office, vm: u64, fetched: &Fetched) -> Submitted {
    Uses::default().check(fetched)?;
    let Some(entry) = office.vm_mut(vm) else {
        return Err(Refusal::NoSession);
    };
    if entry.next_offers.len() + entry.receives.len() >= entry.limits.receives_max as usize {
        return Err(Refusal::Receives);
    }
    if room(fetched.token, fetched.data_bytes) < RECEIVE_BYTES_MIN {
        return Err(Refusal::BufferSmall);
    }
    entry.receives.push_back(fetched.token);
    office.park(fetched, Wait::Receive);
    dispatch(office, vm, false);
    Ok(Verdict::Open)
}

/// Whether a message may come into a mailbox: there is room, or nothing waits before it and somebody takes it at once. And there is room in
/// the state for it and `copies` of it in other mailboxes: each is saved for itself.
fn has_room(office: &Office, source: u64, target: u64, bytes: u64, copies: u64) -> Result<(), Refusal> {
    let Some(mailbox) = office.ledger.mailbox(target) else {
        return Err(Refusal::PeerAbsent);
    };
    let account = office.ledger.vms.get(&source);
    let name = account.map_or(HOST_NAME, |account| &*account.name);
    let growth = books::message_of(name.len(), bytes)
        .saturating_mul(copies.saturating_add(1))
        .saturating_add(books::KEY_BYTES + books::ANSWER_BYTES);
    office.has_room(source, growth, true)?;
    if target == PEER_HOST {
        return if mailbox.has_room(bytes, HOST_MAILBOX_BYTES_MAX) {
            Ok(())
        } else {
            Err(Refusal::MailboxBytes)
        };
    }
    let Some(entry) = office.vms.get(&target) else {
        return Err(Refusal::PeerAbsent);
    };
    let at_once = mailbox.waiting() < entry.receives.len();
    if at_once || mailbox.has_room(bytes, entry.limits.mailbox_bytes_max) {
        Ok(())
    } else {
        Err(Refusal::MailboxBytes)
    }
}

/// All that publish themselves, within reach, with room; but not the sender.
fn all_targets(office: &Office, vm: u64, bytes: u64) -> Result<Targets, Refusal> {
    if !office
        .ledger
        .vms
        .get(&vm)
        .is_some_and(|account| account.config.send_to_all)
    {
        return Err(Refusal::SendToAll);
    }
    let reached = |number| number != vm && office.reach(vm, number).is_ok();
    published(office, vm, bytes, reached)
}

/// All that publish themselves, of those, with room.
fn published(
    office: &Office,
    source: u64,
    bytes: u64,
    among: impl Fn(u64) -> bool,
) -> Result<Targets, Refusal> {
    // Its key and its answer are kept though nobody takes it.
    office.has_room(source, books::KEY_BYTES + books::ANSWER_BYTES, true)?;
    let mut targets = Vec::new();
    for (number, account) in office.ledger.vms.iter() {
        if account.presence.is_some()
            && among(number)
            && has_room(office, source, number, bytes, targets.len() as u64).is_ok()
        {
            targets.push(number);
        }
    }
    Ok(Targets::Many(targets))
}

/// The status of a refused host message, with a sentence.
#[must_use]
pub fn host_refusal(refusal: Refusal, target: &str) -> (u16, String) {
    let status: Status = refusal.status();
    (status.0, format!("to {target:?}: {}", refusal.text()))
}
