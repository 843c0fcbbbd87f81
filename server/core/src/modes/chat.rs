//! WORKSHOP chat: presence, messages, mailboxes.
//!
//! In: PUBLISH, PEERS, SEND, RECEIVE, the operator's messages, and whether a delivery was published. Out: answers, records.
//! A message is *accepted* when it is in its target's mailbox (and journaled), *delivered* when the completion that carries it is published.
//! It never knows what a message says.

use super::names;
use super::offers::reply;
use super::{Submitted, Uses, Verdict, pad_to_word};
use crate::deadlines::Timer;
use crate::effect::{Effect, Outcome};
use crate::effects::{Continuation, whole};
use crate::interface::ControlReply;
use crate::journal::{Message, Presence, Record, Targets};
use crate::limits::{HOST_MAILBOX_BYTES_MAX, HOST_MAILBOX_SECONDS_MAX, NS_PER_SECOND, RECEIVE_BYTES_MIN};
use crate::modes::file::{failure, listing_answer};
use crate::office::{Office, Wait, input_bytes, room};
use crate::refusal::Refusal;
use serde::{Deserialize, Serialize};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use vmgmt_abi::chat::{
    ALL_NAME, DESCRIPTION_BYTES_MAX, HOST_NAME, MessageHeader, PEER_ALL, PEER_BY_NAME, PEER_HOST, PeerEntry,
    message_flag, presence,
};
use vmgmt_abi::ring::completion_flag;
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
        if fetched.again
            && let Some((before, result)) = office.ledger.unanswered(token, fetched.tag)
        {
            // Its first life accepted it, and died before the answer was out.
            office.record(Record::Readdressed {
                from: before,
                to: token,
            });
            return Ok(result);
        }
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
            has_room(office, asked, body.len() as u64)?;
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
    pub fn host_send(&mut self, office: &mut Office, target: &str, body: Vec<u8>) -> Result<u64, Refusal> {
        let targets = if target == ALL_NAME {
            let published = office
                .ledger
                .vms
                .iter()
                .filter(|(_, account)| account.presence.is_some());
            let numbers: Vec<u64> = published.map(|(vm, _)| *vm).collect();
            Targets::Many(
                numbers
                    .into_iter()
                    .filter(|vm| has_room(office, *vm, body.len() as u64).is_ok())
                    .collect(),
            )
        } else {
            let number = office.ledger.number(target).ok_or(Refusal::PeerAbsent)?;
            has_room(office, number, body.len() as u64)?;
            Targets::One(number)
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
        let asked = if to_all {
            PEER_ALL
        } else {
            targets.numbers().first().copied().unwrap_or(PEER_ALL)
        };
        office.record(Record::Accepted {
            message: Arc::new(message),
            targets,
            asked,
            key: 0,
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

    fn dispatch_host(&mut self, office: &mut Office) {
        while let Some(position) = office.ledger.host.first_waiting() {
            let Some(listener) = self.listeners.front().copied() else {
                break;
            };
            let Some(held) = office.ledger.host.get(position) else {
                break;
            };
            let message = Arc::clone(&held.message);
            office.record(Record::Taken { position });
            if !listener.follow {
                self.listeners.pop_front();
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
        for (&number, account) in office.ledger.vms.range(fetched.offset.saturating_sub(1)..) {
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

/// Whether a message may come into a mailbox: there is room, or nothing waits before it and somebody takes it at once.
fn has_room(office: &Office, target: u64, bytes: u64) -> Result<(), Refusal> {
    let Some(mailbox) = office.ledger.mailbox(target) else {
        return Err(Refusal::PeerAbsent);
    };
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
    let published = office
        .ledger
        .vms
        .iter()
        .filter(|(_, account)| account.presence.is_some());
    let numbers = published.map(|(number, _)| *number).filter(|number| {
        *number != vm && office.reach(vm, *number).is_ok() && has_room(office, *number, bytes).is_ok()
    });
    Ok(Targets::Many(numbers.collect()))
}

/// Gives messages that wait to RECEIVEs that are posted. `direct`: the message came in just now.
pub fn dispatch(office: &mut Office, target: u64, direct: bool) {
    loop {
        let Some(entry) = office.vms.get(&target) else {
            return;
        };
        let Some(account) = office.ledger.vms.get(&target) else {
            return;
        };
        if entry.receives.is_empty()
            || (account.mailbox.first_waiting().is_none() && !office.ledger.has_bound())
        {
            return;
        }
        // First the channels that have a part of a message: the rest goes to their next RECEIVE, and nothing else does.
        let mut chosen = None;
        for (place, token) in entry.receives.iter().enumerate() {
            let position = match office.ledger.bound(token.session, token.channel) {
                Some((_, position)) if account.mailbox.get(position).is_some_and(|held| !held.delivering) => {
                    position
                }
                Some(_) => continue,
                // Its channel may be about to get a part whose publication is not known yet.
                None => match account.mailbox.first_waiting() {
                    Some(position) if !office.part_on_its_way(*token) => position,
                    _ => continue,
                },
            };
            chosen = Some((place, *token, position));
            break;
        }
        let Some((place, token, position)) = chosen else {
            return;
        };
        if let Some(entry) = office.vm_mut(target) {
            entry.receives.remove(place);
        }
        deliver(office, target, position, token, direct);
    }
}

fn deliver(office: &mut Office, target: u64, position: u64, token: Token, direct: bool) {
    let Some(flight) = office.unpark(token) else {
        return;
    };
    let Some(held) = office
        .ledger
        .mailbox(target)
        .and_then(|mailbox| mailbox.get(position))
    else {
        return;
    };
    let (message, offset) = (Arc::clone(&held.message), held.offset);
    let continued = offset > 0;
    let name = if continued { "" } else { &*message.source_name };
    let room = room(token, flight.data_bytes);
    let header_bytes = (size_of::<MessageHeader>() + name.len()) as u64;
    let body_bytes = message.body.len() as u64;
    let end = offset
        .saturating_add(room.saturating_sub(header_bytes))
        .min(body_bytes);
    let last = end == body_bytes;
    let bit = |set: bool, bit: u32| if set { bit } else { 0 };
    let header = MessageHeader {
        sequence: message.sequence,
        source: message.source,
        message_bytes: body_bytes,
        accepted_ns: message.accepted_ns,
        source_name_bytes: u32::try_from(name.len()).unwrap_or(u32::MAX),
        flags: bit(message.to_all, message_flag::TO_ALL)
            | bit(continued, message_flag::CONTINUED)
            | bit(!direct, message_flag::FROM_MAILBOX),
    };
    let part = usize::try_from(offset).ok().zip(usize::try_from(end).ok());
    let part = part
        .and_then(|(start, end)| message.body.get(start..end))
        .unwrap_or(&[]);
    let mut payload = Vec::with_capacity(size_of::<MessageHeader>() + name.len() + part.len());
    payload.extend_from_slice(header.as_bytes());
    payload.extend_from_slice(name.as_bytes());
    payload.extend_from_slice(part);
    office.record(Record::Delivering {
        token,
        target,
        position,
        end,
        last,
    });
    let flags = if last { 0 } else { completion_flag::MORE };
    let answer = Answer {
        flags,
        ..Answer::ok_extra(payload.len() as u64, body_bytes - end)
    };
    office.answer(token, answer, payload, true);
}

/// What came of a RECEIVE's completion, or of the answer to a SEND.
pub fn published(office: &mut Office, token: Token, published: bool) {
    let delivering = office.ledger.delivering.get(&token).copied();
    if delivering.is_none() && !office.ledger.origins.contains_key(&token) {
        return;
    }
    let bytes = delivering.and_then(|delivering| {
        let held = office
            .ledger
            .mailbox(delivering.target)?
            .get(delivering.position)?;
        Some(delivering.end.saturating_sub(held.offset))
    });
    office.record(Record::Published { token, published });
    let Some(delivering) = delivering else { return };
    if published && let Some(entry) = office.vm_mut(delivering.target) {
        entry.counters.bytes_to_vm = entry.counters.bytes_to_vm.saturating_add(bytes.unwrap_or(0));
        entry.counters.messages_delivered += u64::from(delivering.last);
    }
    dispatch(office, delivering.target, false);
}

/// Nobody will tell what became of these completions: deliveries go back into their mailboxes.
fn unpublished(office: &mut Office, first: Token, last: Token) {
    let ledger = &office.ledger;
    let mut tokens: Vec<Token> = ledger
        .delivering
        .range(first..=last)
        .map(|(token, _)| *token)
        .collect();
    tokens.extend(ledger.origins.range(first..=last).map(|(token, _)| *token));
    for token in tokens {
        office.record(Record::Published {
            token,
            published: false,
        });
    }
}

/// What is said on a channel is over: a message of which it had a part starts again, elsewhere.
pub fn channel_gone(office: &mut Office, session: u64, vm: u64, channel: Channel) {
    let first = Token {
        session,
        channel,
        index: 0,
        generation: 0,
    };
    unpublished(
        office,
        first,
        Token {
            index: u32::MAX,
            generation: u32::MAX,
            ..first
        },
    );
    dispatch(office, vm, false);
    if let Some((target, _)) = office.ledger.bound(session, channel) {
        office.record(Record::Unbound { session, channel });
        dispatch(office, target, false);
    }
}

/// A session is gone: presence that it published ends, deliveries whose publication nobody will tell go back.
pub fn session_gone(office: &mut Office, session: u64, vm: u64) {
    let first = Token {
        session,
        channel: Channel::Ring(0),
        index: 0,
        generation: 0,
    };
    let last = Token {
        session,
        channel: Channel::Port,
        index: u32::MAX,
        generation: u32::MAX,
    };
    unpublished(office, first, last);
    for channel in office.ledger.bound_channels(session) {
        office.record(Record::Unbound { session, channel });
    }
    let presence = office
        .ledger
        .vms
        .get(&vm)
        .and_then(|account| account.presence.as_ref());
    if presence.is_some_and(|presence| presence.session == session) {
        office.record(Record::Presence { vm, presence: None });
    }
    dispatch(office, vm, false);
}

/// Arms the timer for the oldest message of a mailbox, unless it is armed.
pub fn arm_expiry(office: &mut Office, vm: u64) {
    let Some(entry) = office.vms.get(&vm) else { return };
    if entry.expiry.is_some() {
        return;
    }
    let Some((_, stamp_ns)) = office.ledger.mailbox(vm).and_then(|mailbox| mailbox.oldest()) else {
        return;
    };
    let life_ns = entry.limits.mailbox_seconds_max.saturating_mul(NS_PER_SECOND);
    let age_ns = office.wall.mailbox_now_ns(office.now).saturating_sub(stamp_ns);
    let at = office.now.after_ns(life_ns.saturating_sub(age_ns).max(1));
    office.timers.arm(at, Timer::Expiry { vm });
    if let Some(entry) = office.vm_mut(vm) {
        entry.expiry = (at != Tick::NEVER).then_some(at);
    }
}

/// Drops (and counts) messages of a mailbox that are too old.
pub fn expire(office: &mut Office, vm: u64) {
    let Some(entry) = office.vm_mut(vm) else { return };
    entry.expiry = None;
    let life_ns = entry.limits.mailbox_seconds_max.saturating_mul(NS_PER_SECOND);
    let dropped = drop_older(office, vm, life_ns);
    if dropped > 0 {
        if let Some(entry) = office.vm_mut(vm) {
            entry.counters.messages_dropped = entry.counters.messages_dropped.saturating_add(dropped);
        }
        let text = format!("{dropped} messages dropped: older than limits.mailbox-seconds-max");
        office
            .outputs
            .push_back(crate::interface::Output::Log { vm, text });
    }
    arm_expiry(office, vm);
}

/// The host's mailbox is looked at whenever something comes or goes.
fn expire_host(office: &mut Office) {
    let dropped = drop_older(office, PEER_HOST, HOST_MAILBOX_SECONDS_MAX * NS_PER_SECOND);
    if dropped > 0 {
        let text = format!(
            "{dropped} messages to the host dropped: nobody took them in {HOST_MAILBOX_SECONDS_MAX} s"
        );
        office
            .outputs
            .push_back(crate::interface::Output::Log { vm: PEER_HOST, text });
    }
}

fn drop_older(office: &mut Office, target: u64, life_ns: u64) -> u64 {
    let now_ns = office.wall.mailbox_now_ns(office.now);
    let mut dropped = 0;
    while let Some((position, stamp_ns)) = office.ledger.mailbox(target).and_then(|mailbox| mailbox.oldest())
    {
        if now_ns.saturating_sub(stamp_ns) < life_ns {
            break;
        }
        office.record(Record::Dropped { target, position });
        dropped += 1;
    }
    dropped
}

/// The status of a refused host message, with a sentence.
#[must_use]
pub fn host_refusal(refusal: Refusal, target: &str) -> (u16, String) {
    let status: Status = refusal.status();
    (status.0, format!("to {target:?}: {}", refusal.text()))
}
