//! The control protocol: what an operator's program and vmgmtd say to each other (docs/control-protocol.md).
//!
//! In: lines of JSON. Out: [`Request`]s and [`Response`]s whose every field was checked for form. Knows no socket and no hub; the
//! daemon and `vmgmtctl` use the same types, so that they cannot differ.

mod requests;
mod results;
mod upgrade;

pub use requests::*;
pub use results::*;
pub use upgrade::{Part, PartReport, Release, Upgrade, UpgradeReport, UpgradeState, Upgrading};

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

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
    "reload",
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
    /// The configuration is read anew: [`Upgrading`], at once; then see [`Status::upgrade`].
    Reload,
    /// Quarantined devices of a VM may work again: [`Done`].
    Release(Release),
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
            Self::Reload => "reload",
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
            Self::Hello | Self::Status | Self::Vms | Self::Peers | Self::Shares | Self::Reload => {
                return Value::Null;
            }
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
            "reload" => Self::Reload,
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
mod tests;
