//! WORKSHOP chat: from the mailbox into a posted RECEIVE, in parts where it must be, and out of the mailbox when published or too old.
//!
//! In: who got something, what was published, who is gone. Out: completions, records. It never knows who may send.

use crate::deadlines::Timer;
use crate::interface::Output;
use crate::journal::Record;
use crate::limits::{HOST_MAILBOX_SECONDS_MAX, NS_PER_SECOND};
use crate::office::{Office, room};
use std::sync::Arc;
use vmgmt_abi::chat::{MessageHeader, PEER_HOST, message_flag};
use vmgmt_abi::ring::completion_flag;
use vmgmt_device::Tick;
use vmgmt_device::rings::{Answer, Channel, Token};
use zerocopy::IntoBytes;

/// Gives messages that wait to RECEIVEs that are posted. `direct`: the message came in just now.
pub fn dispatch(office: &mut Office, target: u64, direct: bool) {
    if office.awaits_session_of(target) {
        return;
    }
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
            if office.inherits_for(*token) {
                continue;
            }
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
    if delivering.is_none() && !office.ledger.kept.settled.contains_key(&token) {
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
    if !published {
        // It waits again, and nothing else may ever look at how old it is.
        arm_expiry(office, delivering.target);
    }
}

/// Nobody will tell what became of these completions: deliveries go back into their mailboxes.
fn unpublished(office: &mut Office, first: Token, last: Token) {
    let ledger = &office.ledger;
    let mut tokens: Vec<Token> = ledger
        .delivering
        .range(first..=last)
        .map(|(token, _)| *token)
        .collect();
    tokens.extend(ledger.kept.settled.range(first..=last).map(|(token, _)| *token));
    let intents: Vec<Token> = ledger
        .kept
        .intents
        .range(first..=last)
        .map(|(token, _)| *token)
        .collect();
    for token in intents {
        office.forgo(token);
    }
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
    arm_expiry(office, vm);
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
    arm_expiry(office, vm);
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
        office.outputs.push_back(Output::Log { vm, text });
    }
    arm_expiry(office, vm);
}

/// The host's mailbox is looked at whenever something comes or goes, and at each sweep: it may be full, so that nothing comes.
pub fn expire_host(office: &mut Office) {
    let dropped = drop_older(office, PEER_HOST, HOST_MAILBOX_SECONDS_MAX * NS_PER_SECOND);
    if dropped > 0 {
        let text = format!(
            "{dropped} messages to the host dropped: nobody took them in {HOST_MAILBOX_SECONDS_MAX} s"
        );
        office.outputs.push_back(Output::Log { vm: PEER_HOST, text });
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
