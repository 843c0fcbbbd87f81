//! ATTIC: what must survive the death of a core, as small records of change.
//!
//! In: nothing. Out: [`Record`]s, each given to the shell (`Output::Journal`) *before* the answer or effect that depends on it.
//! A record never says what was asked, only what changed; `ledger.rs` is the one place that applies one, live and in replay.
//!
//! Covered: the VM table, presence, mailboxes, message numbers, idempotency keys, answers and deliveries not known to be published, and what
//! `kept.rs` lists: open files, puts, intents on names, offers and streams between VMs, and those of an operator that have a key (its
//! connection ends with the core, and it asks again by the key). Not covered, and so gone with a crash: rates, and an operator's
//! transfers without a key.

mod form;

pub use form::Unreadable;

use crate::kept::{Change, Settled};
use crate::policy::VmConfig;
use serde::de::value::SeqAccessDeserializer;
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::sync::Arc;
use vmgmt_device::rings::{Channel, Token};

/// An accepted message. Shared by all mailboxes that hold it and by its record.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Message {
    /// One sequence per source.
    pub sequence: u64,
    /// Number of the source VM, or `PEER_HOST`.
    pub source: u64,
    /// Its name when the message was accepted.
    pub source_name: Arc<str>,
    /// Wall time, nanoseconds since 1970.
    pub accepted_ns: u64,
    /// Time of the mailbox clock (wall time clamped against jumps), nanoseconds.
    pub stamp_ns: u64,
    pub to_all: bool,
    /// Written as a byte string; in earlier versions it was an array of numbers, and they read the string as that.
    #[serde(serialize_with = "as_bytes", deserialize_with = "from_bytes")]
    pub body: Vec<u8>,
}

fn as_bytes<S: Serializer>(body: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(body)
}

fn from_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
    struct Bytes;
    impl<'de> Visitor<'de> for Bytes {
        type Value = Vec<u8>;
        fn expecting(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            formatter.write_str("a byte string or an array of bytes")
        }
        fn visit_bytes<E>(self, bytes: &[u8]) -> Result<Vec<u8>, E> {
            Ok(bytes.to_vec())
        }
        fn visit_seq<A: SeqAccess<'de>>(self, array: A) -> Result<Vec<u8>, A::Error> {
            Vec::deserialize(SeqAccessDeserializer::new(array))
        }
    }
    deserializer.deserialize_any(Bytes)
}

/// Who gets a message.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Targets {
    /// One VM, or `PEER_HOST`.
    One(u64),
    /// Several VMs.
    Many(Vec<u64>),
}

impl Targets {
    /// Their numbers.
    #[must_use]
    pub fn numbers(&self) -> &[u64] {
        match self {
            Self::One(number) => std::slice::from_ref(number),
            Self::Many(numbers) => numbers,
        }
    }
}

/// That a VM has published itself, and by which of its sessions: it ends with that.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Presence {
    pub session: u64,
    pub description: String,
}

impl Record {
    /// What of [`crate::kept::feature`] it is about, if it is: a version without that cannot read it.
    #[must_use]
    pub const fn feature(&self) -> Option<&'static str> {
        match self {
            Self::Kept { change, .. } => Some(change.feature()),
            _ => None,
        }
    }
}

/// A change of what survives.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Record {
    /// A VM exists, or its configuration changed.
    Vm(Box<VmConfig>),
    /// It does not any more; its mailbox is gone.
    VmGone { vm: u64 },
    /// A VM published itself or withdrew.
    Presence { vm: u64, presence: Option<Presence> },
    /// A message is in the mailboxes of its targets.
    Accepted {
        message: Arc<Message>,
        targets: Targets,
        /// As the source named it: a number, `PEER_HOST` or `PEER_ALL`. With `key` it tells a repeated send.
        asked: u64,
        /// Idempotency key; 0: none.
        key: u64,
        /// What the sender is answered.
        result: u64,
        /// The submission, whose answer goes out next, and its tag. `None`: the operator.
        origin: Option<(Token, u32)>,
    },
    /// A completion with part of a message (up to byte `end`, the whole of it with `last`) goes out next.
    Delivering {
        token: Token,
        target: u64,
        position: u64,
        end: u64,
        last: bool,
    },
    /// What came of the completion of a `Delivering`, or of an answer that was settled.
    Published { token: Token, published: bool },
    /// Answers that go out next (each asks to be told), and what is different from now on.
    Kept { settled: Vec<Settled>, change: Change },
    /// A submission whose answer is settled was fetched again, under another token. (Not written any more.)
    Readdressed { from: Token, to: Token },
    /// The operator has the host's message: its bytes are in the socket. (One whose record a death prevented is given again.)
    Taken { position: u64 },
    /// A message was too old.
    Dropped { target: u64, position: u64 },
    /// A channel is gone; a message of which it had only a part starts again.
    Unbound { session: u64, channel: Channel },
}
