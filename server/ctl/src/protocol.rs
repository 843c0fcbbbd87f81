//! The control protocol: what an operator's program and vmgmtd say to each other (docs/control-protocol.md).
//!
//! In: lines of JSON. Out: [`Request`]s and [`Response`]s whose every field was checked for form. Knows no socket and no hub; the
//! daemon and `vmgmtctl` use the same types, so that they cannot differ.

mod upgrade;

pub use upgrade::{Part, PartReport, Release, Upgrade, UpgradeReport, UpgradeState, Upgrading};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;

/// Version of the protocol, the `vmgmt` member of each request.
pub const VERSION: u32 = 1;
/// Bytes of one line, its end included: a message of the largest default size (1 MiB is a budget in the guest's mode, the operator's
/// larger ones are files) and far more than any other request.
pub const LINE_BYTES_MAX: usize = 1 << 20;
/// Descriptors with one request: push and pull need one.
pub const REQUEST_FDS_MAX: usize = 4;

/// All methods, for `hello`.
pub const METHODS: &[&str] = &[
    "hello",
    "status",
    "vms",
    "peers",
    "shares",
    "send",
    "recv",
    "push",
    "pull",
    "add-vm",
    "remove-vm",
    "freeze",
    "thaw",
    "log",
    "upgrade",
    "release",
];

/// One request.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// Chosen by the client; the answers carry it. Not to be used again before its request has ended.
    pub id: u64,
    pub call: Call,
}

/// What is asked.
#[derive(Debug, Clone, PartialEq)]
pub enum Call {
    /// Who is there: [`Hello`].
    Hello,
    /// How the daemon is: [`Status`].
    Status,
    /// All VMs: [`Vms`].
    Vms,
    /// The published peers, as the VMs see them: [`Peers`].
    Peers,
    /// The shares: [`Shares`].
    Shares,
    /// A message of the host: [`Sent`].
    Send(SendMessage),
    /// Messages to the host: events [`Event::Message`], then [`Received`].
    Recv(Receive),
    /// A file (descriptor, to be read) to a VM: events [`Event::Progress`], then [`Transferred`].
    Push(Push),
    /// A file of a VM into a descriptor (to be written): events [`Event::Progress`], then [`Transferred`].
    Pull(Pull),
    /// A VM with a socket of its own, at run time: [`Done`].
    AddVm(Box<AddVm>),
    /// Removes one: [`Done`].
    RemoveVm(RemoveVm),
    /// No DMA of a VM until it is thawed: [`Frozen`], when its memory is quiet.
    Freeze(Freeze),
    /// DMA goes on: [`Done`].
    Thaw(Thaw),
    /// The daemon's last lines: events [`Event::Log`], then [`Done`].
    Log(Log),
    /// Another program takes over, part by part: [`Upgrading`], at once; then see [`Status::upgrade`].
    Upgrade(Upgrade),
    /// Quarantined devices of a VM may work again: [`Done`].
    Release(Release),
}

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

/// One line of an answer.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Response {
    /// The request's; `None`: the request could not be read far enough to know it.
    pub id: Option<u64>,
    #[serde(flatten)]
    pub body: Body,
}

/// What a line of an answer says.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Body {
    /// The last line, the request was done.
    Result(Value),
    /// The last line, it was not.
    Error(Failure),
    /// There will be more.
    Event(Event),
}

/// Something on the way to the result.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Event {
    Message(Message),
    Progress(Progress),
    Log(LogLine),
}

/// A message to the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    pub from: String,
    /// Number of the message, one sequence per source.
    pub sequence: u64,
    /// When it was accepted, nanoseconds since 1970.
    pub accepted_ns: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<String>,
    /// Where it is not text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub base64: Option<String>,
}

/// How far a transfer is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    pub bytes: u64,
    /// `None`: not known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub total: Option<u64>,
}

/// A line of the daemon's log.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogLine {
    /// Nanoseconds since 1970.
    pub time_ns: u64,
    /// The VM it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vm: Option<String>,
    pub text: String,
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub code: ErrorCode,
    /// What was wrong.
    pub message: String,
    /// What to do about it; may be empty.
    #[serde(default)]
    pub remedy: String,
}

/// Kinds of failures; a client decides by these, a person reads the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorCode {
    BadRequest,
    NotSupported,
    Denied,
    OverBudget,
    /// The VM is not there, or does not listen.
    Absent,
    NoSuchName,
    Exists,
    Busy,
    TimedOut,
    Cancelled,
    Integrity,
    Stale,
    /// The core is being started again; the request was not begun.
    Restarting,
    Failed,
    /// One that this version does not know.
    #[serde(other)]
    Unknown,
}

impl Failure {
    /// A failure with its remedy ("" for none).
    #[must_use]
    pub fn new(code: ErrorCode, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
            remedy: remedy.into(),
        }
    }
}

/// Result of `hello`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hello {
    pub product: String,
    pub version: String,
    pub protocol: u32,
    pub methods: Vec<String>,
}

impl Hello {
    /// What a daemon of this version says.
    #[must_use]
    pub fn of_this_version() -> Self {
        Self {
            product: "vmgmtd".into(),
            version: env!("CARGO_PKG_VERSION").into(),
            protocol: VERSION,
            methods: METHODS.iter().map(|method| (*method).to_owned()).collect(),
        }
    }
}

/// Result of `status`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Status {
    /// `serving`, `starting` or `restarting` (then the keeper answers, because no core is ready).
    pub state: String,
    /// Which role answered: `core` or `keeper`.
    pub answered_by: String,
    pub version: String,
    /// The keeper's process.
    pub pid: u32,
    /// Core lives so far, this one included.
    pub life: u64,
    /// Seconds since this core life (or the keeper, if it answers) is in service.
    pub uptime_seconds: u64,
    pub vms: u64,
    pub sessions: u64,
    /// Deaths of the core and other things an operator should know, oldest first.
    pub notices: Vec<String>,
    /// Further numbers, by name.
    pub counters: BTreeMap<String, u64>,
    /// The last upgrade.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub upgrade: Option<UpgradeReport>,
    /// How front and core are sandboxed; while the keeper answers, the front alone.
    pub sandbox: Vec<SandboxedRole>,
}

/// What a role may still do to the host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct SandboxedRole {
    /// `front` or `core`.
    pub role: String,
    pub process: u32,
    /// User and group it runs as: `UID:GID`.
    pub user: String,
    /// Capabilities that it has, as a mask: 0 is none.
    pub capabilities: u64,
    /// The kernel's ABI of landlock that is in force; 0: none.
    pub landlock: u32,
    /// Its system calls are filtered.
    pub seccomp: bool,
    /// What is not as it should be, and why.
    pub notes: Vec<String>,
}

/// Result of `vms`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Vms {
    pub vms: Vec<Vm>,
}

/// One VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Vm {
    pub vm: u64,
    pub name: String,
    /// Ends with its QEMU.
    pub transient: bool,
    /// Numbers of the sessions connected now.
    pub sessions: Vec<u64>,
    /// Its own socket, if it has one.
    pub socket: Option<String>,
    /// `NAME:rw` or `NAME:ro`.
    pub shares: Vec<String>,
    /// It has published itself.
    pub published: bool,
    pub description: String,
    /// Somebody in it waits for messages.
    pub listening: bool,
    pub mailbox_messages: u64,
    pub mailbox_bytes: u64,
    /// The operator has frozen it: no DMA.
    pub frozen: bool,
    /// It is thawed by itself after that time; `None`: never, or it is not frozen.
    pub frozen_seconds_left: Option<u64>,
    /// Counted since the VM exists, by name.
    pub counters: BTreeMap<String, u64>,
}

/// Result of `peers`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peers {
    pub peers: Vec<Peer>,
}

/// One published peer.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Peer {
    pub name: String,
    pub description: String,
    pub connected: bool,
    pub listening: bool,
}

/// Result of `shares`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Shares {
    pub shares: Vec<Share>,
}

/// One share.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Share {
    pub name: String,
    pub path: String,
    pub bytes_max: Option<u64>,
    pub files_max: Option<u64>,
    /// `VM:rw` or `VM:ro`.
    pub granted: Vec<String>,
}

/// Result of `send`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    /// Number of the message; to `all`: how many VMs took it.
    pub number: u64,
}

/// Result of `recv`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Received {
    /// Messages given before.
    pub messages: u64,
}

/// Result of `push` and `pull`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transferred {
    pub bytes: u64,
    /// Over all bytes, hexadecimal.
    pub crc32: String,
}

/// Result of `freeze`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Frozen {
    /// Devices of the VM that are quiet now (0: it is not connected; whatever connects is frozen).
    pub devices: u64,
}

/// Result of what gives nothing back.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}

#[derive(Serialize, Deserialize)]
struct Line {
    vmgmt: u32,
    id: u64,
    method: String,
    #[serde(default, skip_serializing_if = "Value::is_null")]
    params: Value,
}

impl Call {
    /// The method's name.
    #[must_use]
    pub const fn method(&self) -> &'static str {
        match self {
            Self::Hello => "hello",
            Self::Status => "status",
            Self::Vms => "vms",
            Self::Peers => "peers",
            Self::Shares => "shares",
            Self::Send(_) => "send",
            Self::Recv(_) => "recv",
            Self::Push(_) => "push",
            Self::Pull(_) => "pull",
            Self::AddVm(_) => "add-vm",
            Self::RemoveVm(_) => "remove-vm",
            Self::Freeze(_) => "freeze",
            Self::Thaw(_) => "thaw",
            Self::Log(_) => "log",
            Self::Upgrade(_) => "upgrade",
            Self::Release(_) => "release",
        }
    }

    /// Whether asking it twice does no harm, so that a client may ask again after the daemon's core was replaced.
    #[must_use]
    pub const fn is_repeatable(&self) -> bool {
        match self {
            Self::Hello | Self::Status | Self::Vms | Self::Peers | Self::Shares | Self::Freeze(_) => true,
            _ => self.key().is_some(),
        }
    }

    /// The key that makes it safe to ask again.
    #[must_use]
    pub const fn key(&self) -> Option<u64> {
        match self {
            Self::Send(send) => send.key,
            Self::Push(push) => push.key,
            Self::Pull(pull) => pull.key,
            _ => None,
        }
    }

    fn params(&self) -> Value {
        let params = match self {
            Self::Hello | Self::Status | Self::Vms | Self::Peers | Self::Shares => return Value::Null,
            Self::Send(params) => serde_json::to_value(params),
            Self::Recv(params) => serde_json::to_value(params),
            Self::Push(params) => serde_json::to_value(params),
            Self::Pull(params) => serde_json::to_value(params),
            Self::AddVm(params) => serde_json::to_value(params),
            Self::RemoveVm(params) => serde_json::to_value(params),
            Self::Freeze(params) => serde_json::to_value(params),
            Self::Thaw(params) => serde_json::to_value(params),
            Self::Log(params) => serde_json::to_value(params),
            Self::Upgrade(params) => serde_json::to_value(params),
            Self::Release(params) => serde_json::to_value(params),
        };
        params.unwrap_or(Value::Null)
    }

    fn from_parts(method: &str, params: Value) -> Result<Self, Failure> {
        Ok(match method {
            "hello" => Self::Hello,
            "status" => Self::Status,
            "vms" => Self::Vms,
            "peers" => Self::Peers,
            "shares" => Self::Shares,
            "send" => Self::Send(from_params(method, params)?),
            "recv" => Self::Recv(from_params(method, params)?),
            "push" => Self::Push(from_params(method, params)?),
            "pull" => Self::Pull(from_params(method, params)?),
            "add-vm" => Self::AddVm(from_params(method, params)?),
            "remove-vm" => Self::RemoveVm(from_params(method, params)?),
            "freeze" => Self::Freeze(from_params(method, params)?),
            "thaw" => Self::Thaw(from_params(method, params)?),
            "log" => Self::Log(from_params(method, params)?),
            "upgrade" => Self::Upgrade(from_params(method, params)?),
            "release" => Self::Release(from_params(method, params)?),
            _ => {
                return Err(Failure::new(
                    ErrorCode::NotSupported,
                    format!("no method {:?}", method.chars().take(64).collect::<String>()),
                    format!("the methods are: {}", METHODS.join(", ")),
                ));
            }
        })
    }
}

fn from_params<T: DeserializeOwned>(method: &str, params: Value) -> Result<T, Failure> {
    let params = if params.is_null() {
        Value::Object(serde_json::Map::new())
    } else {
        params
    };
    serde_json::from_value(params).map_err(|error| {
        Failure::new(
            ErrorCode::BadRequest,
            format!("params of {method}: {error}"),
            "see docs/control-protocol.md for what this method takes",
        )
    })
}

impl Request {
    /// The line, with its end.
    #[must_use]
    pub fn to_line(&self) -> Vec<u8> {
        let line = Line {
            vmgmt: VERSION,
            id: self.id,
            method: self.call.method().to_owned(),
            params: self.call.params(),
        };
        end_line(serde_json::to_vec(&line))
    }

    /// Reads a line (without its end).
    ///
    /// # Errors
    /// The answer to give instead, with the id if that could be read.
    pub fn from_line(line: &[u8]) -> Result<Self, Response> {
        let value: Value = serde_json::from_slice(line).map_err(|error| {
            Response::failed(
                None,
                Failure::new(
                    ErrorCode::BadRequest,
                    format!("not a line of JSON: {error}"),
                    FORM,
                ),
            )
        })?;
        let id = value.get("id").and_then(Value::as_u64);
        let line: Line = serde_json::from_value(value).map_err(|error| {
            Response::failed(
                id,
                Failure::new(ErrorCode::BadRequest, format!("not a request: {error}"), FORM),
            )
        })?;
        if line.vmgmt != VERSION {
            let message = format!("version {} of the control protocol", line.vmgmt);
            let remedy = format!("this daemon speaks version {VERSION}: use the vmgmtctl that came with it");
            return Err(Response::failed(
                id,
                Failure::new(ErrorCode::NotSupported, message, remedy),
            ));
        }
        match Call::from_parts(&line.method, line.params) {
            Ok(call) => Ok(Self { id: line.id, call }),
            Err(failure) => Err(Response::failed(id, failure)),
        }
    }
}

/// What a request looks like, as a remedy.
const FORM: &str = r#"send one object per line: {"vmgmt":1,"id":1,"method":"status"}"#;

impl Response {
    /// The last line of a request that was done.
    #[must_use]
    pub fn result(id: u64, result: &impl Serialize) -> Self {
        Self {
            id: Some(id),
            body: Body::Result(serde_json::to_value(result).unwrap_or(Value::Null)),
        }
    }

    /// The last line of one that was not.
    #[must_use]
    pub const fn failed(id: Option<u64>, failure: Failure) -> Self {
        Self {
            id,
            body: Body::Error(failure),
        }
    }

    /// A line on the way.
    #[must_use]
    pub const fn event(id: u64, event: Event) -> Self {
        Self {
            id: Some(id),
            body: Body::Event(event),
        }
    }

    /// The line, with its end.
    #[must_use]
    pub fn to_line(&self) -> Vec<u8> {
        end_line(serde_json::to_vec(self))
    }
}

/// Our own types always serialize: they have no map with other keys than strings.
fn end_line(line: Result<Vec<u8>, serde_json::Error>) -> Vec<u8> {
    let mut line = line.unwrap_or_default();
    line.push(b'\n');
    line
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

impl Message {
    /// Puts the message's bytes in, as text where they are text.
    #[must_use]
    pub fn with_bytes(mut self, bytes: Vec<u8>) -> Self {
        match String::from_utf8(bytes) {
            Ok(text) => self.text = Some(text),
            Err(error) => self.base64 = Some(encode_base64(error.as_bytes())),
        }
        self
    }

    /// The message's bytes.
    ///
    /// # Errors
    /// What is not base64.
    pub fn bytes(&self) -> Result<Vec<u8>, Failure> {
        match (&self.text, &self.base64) {
            (Some(text), _) => Ok(text.clone().into_bytes()),
            (None, Some(text)) => decode_base64(text),
            (None, None) => Ok(Vec::new()),
        }
    }
}

/// Standard base64 with padding.
#[must_use]
pub fn encode_base64(bytes: &[u8]) -> String {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD.encode(bytes)
}

fn decode_base64(text: &str) -> Result<Vec<u8>, Failure> {
    use base64::Engine;
    base64::engine::general_purpose::STANDARD
        .decode(text)
        .map_err(|error| {
            Failure::new(
                ErrorCode::BadRequest,
                format!("not base64: {error}"),
                "use the standard alphabet, with padding",
            )
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn calls() -> Vec<Call> {
        vec![
            Call::Hello,
            Call::Status,
            Call::Vms,
            Call::Peers,
            Call::Shares,
            Call::Send(SendMessage {
                key: Some(7),
                to: "web".into(),
                text: Some("hello\n".into()),
                base64: None,
            }),
            Call::Recv(Receive {
                follow: true,
                wait_ms: 5,
            }),
            Call::Push(Push {
                key: Some(7),
                to: "web".into(),
                name: "a.txt".into(),
                wait_ms: 7,
            }),
            Call::Pull(Pull {
                key: Some(7),
                from: "web".into(),
                path: "b".into(),
                wait_ms: 8,
            }),
            Call::AddVm(Box::new(AddVm {
                name: "web".into(),
                socket: "/run/web".into(),
                ..AddVm::default()
            })),
            Call::RemoveVm(RemoveVm { name: "web".into() }),
            Call::Freeze(Freeze {
                name: "web".into(),
                timeout_seconds: Some(9),
            }),
            Call::Thaw(Thaw { name: "web".into() }),
            Call::Log(Log { follow: true }),
            Call::Upgrade(Upgrade {
                to: Some("/usr/sbin/vmgmtd".into()),
                parts: vec![Part::Core, Part::Front],
            }),
            Call::Release(Release { vm: "web".into() }),
        ]
    }

    #[test]
    fn every_request_is_read_as_it_was_written() {
        for (id, call) in calls().into_iter().enumerate() {
            let request = Request { id: id as u64, call };
            let line = request.to_line();
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            assert_eq!(Request::from_line(line.trim_ascii_end()), Ok(request));
        }
        assert_eq!(calls().iter().map(Call::method).collect::<Vec<_>>(), METHODS);
    }

    #[test]
    fn what_is_wrong_with_a_request_is_named_and_its_id_kept() {
        let mistakes: [(&[u8], Option<u64>, &str); 6] = [
            (b"{", None, "not a line of JSON"),
            (br#"{"id":4}"#, Some(4), "missing field `vmgmt`"),
            (br#"{"vmgmt":2,"id":4,"method":"status"}"#, Some(4), "version 2"),
            (
                br#"{"vmgmt":1,"id":4,"method":"reboot"}"#,
                Some(4),
                "no method \"reboot\"",
            ),
            (
                br#"{"vmgmt":1,"id":4,"method":"send","params":{"two":1}}"#,
                Some(4),
                "unknown field `two`",
            ),
            (
                br#"{"vmgmt":1,"id":4,"method":"remove-vm"}"#,
                Some(4),
                "missing field `name`",
            ),
        ];
        for (line, id, text) in mistakes {
            let response = Request::from_line(line).unwrap_err();
            assert_eq!(response.id, id);
            let Body::Error(failure) = response.body else {
                panic!("{text}")
            };
            assert!(failure.message.contains(text), "{} / {text}", failure.message);
            assert!(!failure.remedy.is_empty());
        }
    }

    #[test]
    fn answers_look_as_documented() {
        let lines = [
            (
                Response::result(1, &Sent { number: 7 }),
                r#"{"id":1,"result":{"number":7}}"#,
            ),
            (
                Response::failed(None, Failure::new(ErrorCode::TimedOut, "m", "r")),
                r#"{"id":null,"error":{"code":"timed-out","message":"m","remedy":"r"}}"#,
            ),
            (
                Response::event(
                    2,
                    Event::Progress(Progress {
                        bytes: 1,
                        total: None,
                    }),
                ),
                r#"{"id":2,"event":{"progress":{"bytes":1}}}"#,
            ),
        ];
        for (response, text) in lines {
            let line = response.to_line();
            assert_eq!(std::str::from_utf8(line.trim_ascii_end()).unwrap(), text);
            assert_eq!(serde_json::from_slice::<Response>(&line).unwrap(), response);
        }
        let newer = br#"{"id":1,"error":{"code":"eaten-by-a-bear","message":"m"}}"#;
        let Body::Error(failure) = serde_json::from_slice::<Response>(newer).unwrap().body else {
            panic!()
        };
        assert_eq!(failure.code, ErrorCode::Unknown);
    }

    #[test]
    fn messages_keep_their_bytes() {
        for bytes in [b"text".to_vec(), vec![0xff, 0, 7], Vec::new()] {
            assert_eq!(Message::default().with_bytes(bytes.clone()).bytes(), Ok(bytes));
        }
        assert!(SendMessage::default().bytes().is_err());
    }
}
