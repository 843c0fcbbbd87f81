//! ATTIC: records as bytes.
//!
//! In: a [`Record`], or bytes of one. Out: the other. It never knows where the bytes are kept.
//!
//! All records are CBOR with the names that serde gives: another version of this program reads them. (It is asked whether it could take
//! over on a copy of the state as it is in mid-run, and a core that does not end in time before an upgrade is killed.) The three records
//! that each message makes have a *fixed form* within that: the same names, with every number in its longest encoding, so that each
//! is a constant with holes in known places, and numbers, name and body are copied into it. Serde takes twenty times as long, which was
//! half of what the core did for a message.

use super::{Message, Record, Targets};
use crate::cbor;
use std::sync::Arc;
use vmgmt_device::rings::{Channel, Token};

/// Bytes are no record of a version that this program reads.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("a record of the hub cannot be read: {0}")]
pub struct Unreadable(String);

/// A map of one entry, as serde writes an enum. Behind each name the byte that says what comes (`1b`, `1a`, `18`: a number in eight, four, one
/// bytes, the highest first), then the hole. The name of the source and [`BODY`] follow.
const ACCEPTED: &[u8; 258] = b"\xa1\x68Accepted\xa6\
    \x65asked\x1b........\x63key\x1b........\x66result\x1b........\
    \x66origin\x82\xa4\x67session\x1b........\x67channel\xa1\x64Ring\x18.\x65index\x1a....\x6ageneration\x1a....\x1a....\
    \x67targets\xa1\x63One\x1b........\
    \x67message\xa7\x68sequence\x1b........\x66source\x1b........\x6baccepted_ns\x1b........\x68stamp_ns\x1b........\
    \x66to_all.\x6bsource_name\x7a....";
/// What comes between the name of the source and the body.
const BODY: &[u8; 14] = b"\x64body\x5b........";
const DELIVERING: &[u8; 133] = b"\xa1\x6aDelivering\xa5\
    \x65token\xa4\x67session\x1b........\x67channel\xa1\x64Ring\x18.\x65index\x1a....\x6ageneration\x1a....\
    \x66target\x1b........\x68position\x1b........\x63end\x1b........\x64last.";
const PUBLISHED: &[u8; 90] = b"\xa1\x69Published\xa2\
    \x65token\xa4\x67session\x1b........\x67channel\xa1\x64Ring\x18.\x65index\x1a....\x6ageneration\x1a....\
    \x69published.";

/// Where the hole behind `head` begins.
const fn hole(form: &[u8], head: &[u8]) -> usize {
    let mut at = 0;
    loop {
        let mut same = 0;
        while same < head.len() && form[at + same] == head[same] {
            same += 1;
        }
        if same == head.len() {
            return at + same;
        }
        at += 1;
    }
}

/// Writes a number into the hole behind a head.
macro_rules! fill {
    ($form:ident of $constant:ident: $($head:literal = $number:expr),+ $(,)?) => {$({
        const AT: usize = hole($constant, $head);
        let bytes = $number.to_be_bytes();
        $form[AT..AT + bytes.len()].copy_from_slice(&bytes);
    })+};
}

/// The four numbers of a token.
macro_rules! fill_token {
    ($form:ident of $constant:ident: $token:expr, $ring:expr) => {
        fill!($form of $constant:
            b"\x67session\x1b" = $token.session,
            b"\x64Ring\x18" = $ring,
            b"\x65index\x1a" = $token.index,
            b"\x6ageneration\x1a" = $token.generation,
        )
    };
}

/// The number in the hole behind a head.
macro_rules! take {
    ($form:ident of $constant:ident: $head:literal, $number:ty) => {{
        const AT: usize = hole($constant, $head);
        let mut bytes = [0; size_of::<$number>()];
        bytes.copy_from_slice(&$form[AT..AT + size_of::<$number>()]);
        <$number>::from_be_bytes(bytes)
    }};
}

/// The token of a ring.
macro_rules! take_token {
    ($form:ident of $constant:ident) => {
        Token {
            session: take!($form of $constant: b"\x67session\x1b", u64),
            channel: Channel::Ring(take!($form of $constant: b"\x64Ring\x18", u8)),
            index: take!($form of $constant: b"\x65index\x1a", u32),
            generation: take!($form of $constant: b"\x6ageneration\x1a", u32),
        }
    };
}

const fn boolean(value: bool) -> u8 {
    if value { 0xf5 } else { 0xf4 }
}

impl Record {
    /// Appends it to bytes.
    pub fn write(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Accepted {
                message,
                targets: Targets::One(target),
                asked,
                key,
                result,
                origin: Some((token, tag)),
            } => {
                if let Channel::Ring(ring) = token.channel {
                    let mut form = *ACCEPTED;
                    fill_token!(form of ACCEPTED: token, ring);
                    fill!(form of ACCEPTED:
                        b"\x65asked\x1b" = asked,
                        b"\x63key\x1b" = key,
                        b"\x66result\x1b" = result,
                        b"....\x1a" = tag,
                        b"\x63One\x1b" = target,
                    );
                    return write_message(message, form, bytes);
                }
            }
            Self::Delivering {
                token,
                target,
                position,
                end,
                last,
            } => {
                if let Channel::Ring(ring) = token.channel {
                    let mut form = *DELIVERING;
                    fill_token!(form of DELIVERING: token, ring);
                    fill!(form of DELIVERING:
                        b"\x66target\x1b" = target,
                        b"\x68position\x1b" = position,
                        b"\x63end\x1b" = end,
                        b"\x64last" = boolean(*last),
                    );
                    return bytes.extend_from_slice(&form);
                }
            }
            Self::Published { token, published } => {
                if let Channel::Ring(ring) = token.channel {
                    let mut form = *PUBLISHED;
                    fill_token!(form of PUBLISHED: token, ring);
                    fill!(form of PUBLISHED: b"\x69published" = boolean(*published));
                    return bytes.extend_from_slice(&form);
                }
            }
            _ => {}
        }
        cbor::write(self, bytes);
    }

    /// One from bytes that [`Record::write`] of this version, or one that this program reads, has made.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn read(bytes: &[u8]) -> Result<Self, Unreadable> {
        // All but a few are of a fixed form. What is not quite is for serde to judge.
        if let Some(record) = Self::read_fixed(bytes) {
            return Ok(record);
        }
        cbor::read(bytes).map_err(Unreadable)
    }
}

impl Record {
    /// One of a fixed form: the same that serde reads there.
    fn read_fixed(bytes: &[u8]) -> Option<Self> {
        if let Some((form, [])) = fits(PUBLISHED, bytes) {
            return Some(Self::Published {
                token: take_token!(form of PUBLISHED),
                published: truth(take!(form of PUBLISHED: b"\x69published", u8))?,
            });
        }
        if let Some((form, [])) = fits(DELIVERING, bytes) {
            return Some(Self::Delivering {
                token: take_token!(form of DELIVERING),
                target: take!(form of DELIVERING: b"\x66target\x1b", u64),
                position: take!(form of DELIVERING: b"\x68position\x1b", u64),
                end: take!(form of DELIVERING: b"\x63end\x1b", u64),
                last: truth(take!(form of DELIVERING: b"\x64last", u8))?,
            });
        }
        let (form, rest) = fits(ACCEPTED, bytes)?;
        let name_bytes = take!(form of ACCEPTED: b"\x6bsource_name\x7a", u32);
        let (name, rest) = rest.split_at_checked(usize::try_from(name_bytes).ok()?)?;
        let (head, body) = fits(BODY, rest)?;
        if take!(head of BODY: b"\x64body\x5b", u64) != body.len() as u64 {
            return None;
        }
        let message = Message {
            sequence: take!(form of ACCEPTED: b"\x68sequence\x1b", u64),
            source: take!(form of ACCEPTED: b"\x66source\x1b", u64),
            source_name: std::str::from_utf8(name).ok()?.into(),
            accepted_ns: take!(form of ACCEPTED: b"\x6baccepted_ns\x1b", u64),
            stamp_ns: take!(form of ACCEPTED: b"\x68stamp_ns\x1b", u64),
            to_all: truth(take!(form of ACCEPTED: b"\x66to_all", u8))?,
            body: body.to_vec(),
        };
        Some(Self::Accepted {
            message: Arc::new(message),
            targets: Targets::One(take!(form of ACCEPTED: b"\x63One\x1b", u64)),
            asked: take!(form of ACCEPTED: b"\x65asked\x1b", u64),
            key: take!(form of ACCEPTED: b"\x63key\x1b", u64),
            result: take!(form of ACCEPTED: b"\x66result\x1b", u64),
            origin: Some((
                take_token!(form of ACCEPTED),
                take!(form of ACCEPTED: b"....\x1a", u32),
            )),
        })
    }
}

/// Bytes that begin as this form does, whatever is in its holes: those, and what comes behind them.
fn fits<'a, const N: usize>(form: &[u8; N], bytes: &'a [u8]) -> Option<(&'a [u8; N], &'a [u8])> {
    let (head, rest) = bytes.split_first_chunk::<N>()?;
    let same = |same: bool, (byte, form): (&u8, &u8)| same & ((byte == form) | (*form == b'.'));
    head.iter().zip(form).fold(true, same).then_some((head, rest))
}

const fn truth(byte: u8) -> Option<bool> {
    match byte {
        0xf4 => Some(false),
        0xf5 => Some(true),
        _ => None,
    }
}

/// The rest of an accepted message.
fn write_message(message: &Message, mut form: [u8; ACCEPTED.len()], bytes: &mut Vec<u8>) {
    let Message {
        sequence,
        source,
        source_name,
        accepted_ns,
        stamp_ns,
        to_all,
        body,
    } = message;
    fill!(form of ACCEPTED:
        b"\x68sequence\x1b" = sequence,
        b"\x66source\x1b" = source,
        b"\x6baccepted_ns\x1b" = accepted_ns,
        b"\x68stamp_ns\x1b" = stamp_ns,
        b"\x66to_all" = boolean(*to_all),
        // (No configuration has a name of 4 GiB.)
        b"\x6bsource_name\x7a" = source_name.len() as u32,
    );
    let mut head = *BODY;
    fill!(head of BODY: b"\x64body\x5b" = body.len() as u64);
    bytes.reserve(form.len() + source_name.len() + head.len() + body.len());
    bytes.extend_from_slice(&form);
    bytes.extend_from_slice(source_name.as_bytes());
    bytes.extend_from_slice(&head);
    bytes.extend_from_slice(body);
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token() -> impl Strategy<Value = Token> {
        let channel = prop_oneof![4 => any::<u8>().prop_map(Channel::Ring), 1 => Just(Channel::Port)];
        (any::<u64>(), channel, any::<u32>(), any::<u32>()).prop_map(
            |(session, channel, index, generation)| Token {
                session,
                channel,
                index,
                generation,
            },
        )
    }

    fn message() -> impl Strategy<Value = Message> {
        let numbers = (any::<u64>(), any::<u64>(), any::<u64>(), any::<u64>());
        let body = proptest::collection::vec(any::<u8>(), 0..300);
        (numbers, ".{0,40}", any::<bool>(), body).prop_map(|(numbers, name, to_all, body)| Message {
            sequence: numbers.0,
            source: numbers.1,
            source_name: Arc::from(name),
            accepted_ns: numbers.2,
            stamp_ns: numbers.3,
            to_all,
            body,
        })
    }

    fn record() -> impl Strategy<Value = Record> {
        let targets = prop_oneof![
            3 => any::<u64>().prop_map(Targets::One),
            1 => proptest::collection::vec(any::<u64>(), 0..4).prop_map(Targets::Many)
        ];
        let origin = proptest::option::weighted(0.8, (token(), any::<u32>()));
        let numbers = (any::<u64>(), any::<u64>(), any::<u64>());
        prop_oneof![
            (message(), targets, numbers, origin).prop_map(
                |(message, targets, (asked, key, result), origin)| {
                    Record::Accepted {
                        message: Arc::new(message),
                        targets,
                        asked,
                        key,
                        result,
                        origin,
                    }
                }
            ),
            (token(), any::<(u64, u64, u64)>(), any::<bool>()).prop_map(
                |(token, (target, position, end), last)| {
                    Record::Delivering {
                        token,
                        target,
                        position,
                        end,
                        last,
                    }
                }
            ),
            (token(), any::<bool>()).prop_map(|(token, published)| Record::Published { token, published }),
            (any::<u64>(), any::<u64>()).prop_map(|(target, position)| Record::Dropped { target, position }),
        ]
    }

    proptest! {
        /// Serde reads what was written by hand, as any version with these types does; and it says nothing but what serde would have.
        #[test]
        fn the_fixed_form_is_what_serde_reads(record in record()) {
            let mut bytes = b"before".to_vec();
            record.write(&mut bytes);
            let bytes = &bytes[6..];
            prop_assert_eq!(&Record::read(bytes).unwrap(), &record);
            let by_hand: ciborium::Value = ciborium::from_reader(bytes).unwrap();
            let by_serde = ciborium::Value::serialized(&record).unwrap();
            prop_assert_eq!(in_order(by_hand), in_order(by_serde));
        }

        /// Whatever is written over it, and wherever it is cut: what is read by hand is what serde reads.
        #[test]
        fn what_is_read_by_hand_is_what_serde_reads(record in record(), at in any::<prop::sample::Index>(), over: u8, cut: bool) {
            let mut bytes = Vec::new();
            record.write(&mut bytes);
            let fixed = match &record {
                Record::Accepted { targets: Targets::One(_), origin: Some((token, _)), .. }
                | Record::Delivering { token, .. } | Record::Published { token, .. } => matches!(token.channel, Channel::Ring(_)),
                _ => false,
            };
            prop_assert_eq!(Record::read_fixed(&bytes), fixed.then_some(record));
            let at = at.index(bytes.len());
            bytes[at] = over;
            if cut {
                bytes.truncate(at);
            }
            if let Some(read) = Record::read_fixed(&bytes) {
                prop_assert_eq!(ciborium::from_reader::<Record, _>(bytes.as_slice()).unwrap(), read);
            }
        }

        /// A body was an array of numbers in earlier versions.
        #[test]
        fn a_body_that_is_an_array_is_read(message in message()) {
            let mut value = ciborium::Value::serialized(&message).unwrap();
            let body = value.as_map_mut().unwrap().iter_mut().find(|(name, _)| name.as_text() == Some("body")).unwrap();
            body.1 = ciborium::Value::serialized(&message.body).unwrap();
            prop_assert!(body.1.is_array());
            prop_assert_eq!(value.deserialized::<Message>().unwrap(), message);
        }
    }

    /// Entries of maps in the order of their names.
    fn in_order(value: ciborium::Value) -> ciborium::Value {
        match value {
            ciborium::Value::Map(entries) => {
                let mut entries: Vec<_> = entries
                    .into_iter()
                    .map(|(name, value)| (name, in_order(value)))
                    .collect();
                entries.sort_by(|(one, _), (other, _)| one.as_text().cmp(&other.as_text()));
                ciborium::Value::Map(entries)
            }
            ciborium::Value::Array(values) => {
                ciborium::Value::Array(values.into_iter().map(in_order).collect())
            }
            other => other,
        }
    }
}
