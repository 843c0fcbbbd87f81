//! The control protocol's requests: what each method takes.

use super::{ErrorCode, Failure, decode_base64};
use serde::{Deserialize, Serialize};

/// Parameters of `send`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SendMessage {
    /// A VM's name, `all`, or `host` (the operators who wait in `recv`).
    pub to: String,
    /// The message, if it is text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// The message in base64, if it is not. Exactly one of both.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
    /// Idempotency key, from 1: a message that is sent again with it, because the answer was lost, is taken once. [`new_key`] makes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<u64>,
}

/// Parameters of `recv`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Receive {
    /// All that come until the connection closes; else the first.
    #[serde(default)]
    pub follow: bool,
    /// How long to wait for the first, in milliseconds (0: not at all).
    #[serde(default)]
    pub wait_ms: u64,
}

/// Parameters of `push`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Push {
    pub to: String,
    /// The name that is offered to the VM.
    pub name: String,
    /// How long the VM may take to accept, in milliseconds.
    #[serde(default = "offer_wait_ms")]
    pub wait_ms: u64,
    /// From 1, another for each transfer: whoever asks again with it when the core was replaced, and with the same file, takes the transfer
    /// up where it stands or hears what came of it. Without, it ends with the connection. [`new_key`] makes one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<u64>,
}

/// Parameters of `pull`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pull {
    pub from: String,
    /// As the VM names it.
    pub path: String,
    /// How long the VM may take to answer, in milliseconds.
    #[serde(default = "offer_wait_ms")]
    pub wait_ms: u64,
    /// As [`Push::key`]; the file is to be the same one, with what was written to it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<u64>,
}

/// How long a VM may take to answer an offer, where nothing is said: a person starts the guest's side.
const fn offer_wait_ms() -> u64 {
    60_000
}

/// Parameters of `add-vm`; what is left out is as in the configuration's defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddVm {
    pub name: String,
    /// Path of the socket to make.
    pub socket: String,
    /// Permission bits of the socket file, as text in octal ("0660").
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub group: Option<String>,
    /// `NAME`, `NAME:rw` or `NAME:ro` of shares in the configuration.
    #[serde(default)]
    pub shares: Vec<String>,
    /// VMs it may reach; empty: all.
    #[serde(default)]
    pub reach: Vec<String>,
    #[serde(default)]
    pub send_to_all: bool,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub devices_max: Option<u32>,
}

/// Parameters of `remove-vm`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemoveVm {
    pub name: String,
}

/// Parameters of `freeze`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Freeze {
    pub name: String,
    /// It is thawed by itself after so many seconds; left out: never.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u64>,
}

/// Parameters of `thaw`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Thaw {
    pub name: String,
}

/// Parameters of `log`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Log {
    /// And what comes, until the connection closes.
    #[serde(default)]
    pub follow: bool,
}

/// A key that nobody else has: random, and small enough for every JSON reader (53 bits).
#[must_use]
pub fn new_key() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library's hashers are seeded by the system's random numbers; the process and time part those that are made in one thread.
    let mut hasher = std::hash::RandomState::new().build_hasher();
    hasher.write_u32(std::process::id());
    if let Ok(time) = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH) {
        hasher.write_u128(time.as_nanos());
    }
    (hasher.finish() >> 11).max(1)
}

impl SendMessage {
    /// The message's bytes.
    ///
    /// # Errors
    /// Neither or both of text and base64, or what is not base64.
    pub fn bytes(&self) -> Result<Vec<u8>, Failure> {
        match (&self.text, &self.base64) {
            (Some(text), None) => Ok(text.clone().into_bytes()),
            (None, Some(text)) => decode_base64(text),
            _ => Err(Failure::new(
                ErrorCode::BadRequest,
                "send needs exactly one of \"text\" and \"base64\"",
                "leave one of both out",
            )),
        }
    }
}
