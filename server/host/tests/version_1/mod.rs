//! What version 1 of the program took of a hub's state, as it was: never to be changed, so that it stays known what going back needs.
//!
//! In: bytes of a snapshot, or of a record. Out: what version 1 had of it, or its refusal. Fields that it did not know it skipped; those that it
//! knew it demanded, but for `features`.
#![allow(dead_code)] // what is demanded is demanded, used or not

use ciborium::Value;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Debug, Deserialize)]
pub struct Saved {
    now: u64,
    wall: Wall,
    pub ledger: Ledger,
    vms: Vec<Value>,
    sessions: Vec<(u64, u64)>,
    flights: Vec<Value>,
    timers: Vec<Value>,
    effects: Effects,
    outputs: Vec<Value>,
    next_handle: u64,
    files: Vec<Value>,
    puts: Vec<Value>,
    puts_live: Vec<Value>,
    offers: Vec<Value>,
    streams: Vec<Value>,
    fetching: Vec<Value>,
    bodies: Vec<Value>,
    listeners: Vec<Value>,
}

#[derive(Debug, Deserialize)]
struct Wall {
    known: bool,
    at: u64,
    wall_ns: u64,
    mailbox_ns: u64,
}

#[derive(Debug, Deserialize)]
struct Effects {
    next_id: u64,
    running: Vec<Value>,
    queues: Vec<Value>,
    turns: Vec<u64>,
}

#[derive(Debug, Deserialize)]
pub struct Ledger {
    pub accounts: Vec<Account>,
    pub host: Mailbox,
    pub host_sequence: u64,
    pub delivering: Vec<(Token, Delivering)>,
    pub origins: Vec<(Token, Origin)>,
}

#[derive(Debug, Deserialize)]
pub struct Account {
    pub config: VmConfig,
    presence: Option<Presence>,
    pub sequence: u64,
    pub mailbox: Mailbox,
    keys: Vec<(u64, u64, u64)>,
}

#[derive(Debug, Deserialize)]
pub struct VmConfig {
    pub vm: u64,
    pub name: String,
    shares: Vec<Value>,
    reach: Vec<String>,
    send_to_all: bool,
    limits: BTreeMap<String, u64>,
    transient: bool,
}

#[derive(Debug, Deserialize)]
pub struct Presence {
    session: u64,
    description: String,
}

#[derive(Debug, Deserialize)]
pub struct Mailbox {
    next_position: u64,
    pub held: Vec<(u64, Held)>,
}

#[derive(Debug, Deserialize)]
pub struct Held {
    pub message: Message,
    offset: u64,
    bound: Option<(u64, Channel)>,
    delivering: bool,
}

#[derive(Debug, Deserialize)]
pub struct Message {
    sequence: u64,
    source: u64,
    source_name: String,
    accepted_ns: u64,
    stamp_ns: u64,
    to_all: bool,
    pub body: Vec<u8>,
}

#[derive(Debug, Deserialize)]
pub struct Token {
    session: u64,
    channel: Channel,
    index: u32,
    generation: u32,
}

#[derive(Debug, Deserialize)]
pub enum Channel {
    Ring(u8),
    Port,
}

#[derive(Debug, Deserialize)]
pub struct Delivering {
    target: u64,
    position: u64,
    end: u64,
    last: bool,
}

#[derive(Debug, Deserialize)]
pub struct Origin {
    pub tag: u32,
    pub result: u64,
}

#[derive(Debug, Deserialize)]
pub enum Targets {
    One(u64),
    Many(Vec<u64>),
}

#[derive(Debug, Deserialize)]
pub enum Record {
    Vm(Box<VmConfig>),
    VmGone {
        vm: u64,
    },
    Presence {
        vm: u64,
        presence: Option<Presence>,
    },
    Accepted {
        message: Message,
        targets: Targets,
        asked: u64,
        key: u64,
        result: u64,
        origin: Option<(Token, u32)>,
    },
    Delivering {
        token: Token,
        target: u64,
        position: u64,
        end: u64,
        last: bool,
    },
    Published {
        token: Token,
        published: bool,
    },
    Readdressed {
        from: Token,
        to: Token,
    },
    Taken {
        position: u64,
    },
    Dropped {
        target: u64,
        position: u64,
    },
    Unbound {
        session: u64,
        channel: Channel,
    },
}

/// As `Saved::from_bytes` of version 1: first the version, then the features, then all of it.
pub fn snapshot(bytes: &[u8]) -> Result<Saved, String> {
    #[derive(Deserialize)]
    struct Versioned {
        version: u32,
        #[serde(default)]
        features: BTreeSet<String>,
    }
    let unreadable = |error: ciborium::de::Error<std::io::Error>| {
        format!("the saved state of the hub cannot be read: {error}")
    };
    let Versioned { version, features } = ciborium::from_reader(bytes).map_err(unreadable)?;
    if !(1..=1).contains(&version) {
        return Err(format!(
            "the saved state of the hub has version {version}, this program reads version 1: start the program that wrote it"
        ));
    }
    if let Some(name) = features.into_iter().next() {
        return Err(format!(
            "the saved state of the hub uses {name:?}, which this program does not know: upgrade to one that does"
        ));
    }
    ciborium::from_reader(bytes).map_err(unreadable)
}

pub fn record(bytes: &[u8]) -> Result<Record, String> {
    ciborium::from_reader(bytes).map_err(|error| format!("a record of the hub cannot be read: {error}"))
}
