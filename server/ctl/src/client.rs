//! A client of the control socket. Blocking, with a deadline on every wait, so that no caller hangs on a daemon that does not answer.
//!
//! In: [`Call`]s and descriptors. Out: their results and events. Knows nothing of what they mean.

use crate::protocol::{Body, Call, ErrorCode, Event, Failure, LINE_BYTES_MAX, Request, Response};
use rustix::fd::{AsFd, BorrowedFd};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::Value;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Bytes of one answer: `vms` with thousands of them is the longest.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// How long a core that is being started again is waited for.
const RESTART_WAIT: Duration = Duration::from_secs(5);
/// The same for a request with a key, which loses nothing by waiting: so long does the daemon keep a transfer for who asks again.
const RESTART_WAIT_WITH_KEY: Duration = Duration::from_secs(30);
/// Between two questions whether it is there.
const RESTART_STEP: Duration = Duration::from_millis(50);

/// Why there is no result.
#[derive(Debug)]
pub enum ClientError {
    /// The daemon cannot be reached.
    Unreachable { path: PathBuf, error: std::io::Error },
    /// It closed the connection without an answer.
    Closed { path: PathBuf },
    /// It did not answer in time.
    Silent { path: PathBuf, after: Duration },
    /// It answered, but not in this protocol.
    Garbled(String),
    /// It refused or failed.
    Failed(Failure),
}

impl std::error::Error for ClientError {}

impl std::fmt::Display for ClientError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Unreachable { path, error } => write!(f, "no daemon at {}: {error}", path.display()),
            Self::Closed { path } => write!(f, "the daemon at {} closed the connection", path.display()),
            Self::Silent { path, after } => {
                write!(
                    f,
                    "the daemon at {} did not answer within {} s",
                    path.display(),
                    after.as_secs()
                )
            }
            Self::Garbled(what) => write!(f, "the daemon's answer makes no sense: {what}"),
            Self::Failed(failure) => f.write_str(&failure.message),
        }
    }
}

impl ClientError {
    /// What to do about it, "" if nothing is known.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Unreachable { error, .. } if error.kind() == ErrorKind::PermissionDenied => {
                "run as a user who may open it (control-mode and control-group in [server] say who)".into()
            }
            Self::Unreachable { .. } => {
                "is vmgmtd running? Its control socket is named by --control or VMGMT_CONTROL".into()
            }
            Self::Closed { .. } => "it was stopped or its core was replaced meanwhile: ask again".into(),
            Self::Silent { .. } => "look at its log; `vmgmtctl status` tells whether it serves".into(),
            Self::Garbled(_) => "use the vmgmtctl that came with the daemon".into(),
            Self::Failed(failure) => failure.remedy.clone(),
        }
    }
}

/// A connection to a daemon.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    stream: UnixStream,
    next_id: u64,
    received: Vec<u8>,
}

impl Client {
    /// Connects.
    ///
    /// # Errors
    /// [`ClientError::Unreachable`].
    pub fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).map_err(|error| ClientError::Unreachable {
            path: path.to_owned(),
            error,
        })?;
        Ok(Self {
            path: path.to_owned(),
            stream,
            next_id: 1,
            received: Vec::new(),
        })
    }

    /// Asks, gives each event to `on_event` (`false` ends it), and returns the result. `silence_max`: how long the daemon may say
    /// nothing; `None`: forever (the caller follows something). While the core is being replaced it asks again for a few
    /// seconds, with a key for half a minute.
    ///
    /// # Errors
    /// [`ClientError`].
    pub fn call(
        &mut self,
        call: &Call,
        fds: &[BorrowedFd<'_>],
        silence_max: Option<Duration>,
        on_event: &mut dyn FnMut(Event) -> bool,
    ) -> Result<Value, ClientError> {
        let mut begin = Instant::now();
        loop {
            let asked = Instant::now();
            let error = match self.call_once(call, fds, silence_max, on_event) {
                Err(ClientError::Failed(failure)) if failure.code == ErrorCode::Restarting => {
                    ClientError::Failed(failure)
                }
                Err(error @ ClientError::Closed { .. }) if call.is_repeatable() => error,
                other => return other,
            };
            if asked.elapsed() > RESTART_WAIT {
                // It served for long before it broke off: that is a trouble of its own.
                begin = Instant::now();
            }
            let wait = if call.key().is_some() {
                RESTART_WAIT_WITH_KEY
            } else {
                RESTART_WAIT
            };
            if begin.elapsed() > wait {
                return Err(error);
            }
            std::thread::sleep(RESTART_STEP);
            *self = Self {
                next_id: self.next_id,
                ..Self::connect(&self.path)?
            };
        }
    }

    fn call_once(
        &mut self,
        call: &Call,
        fds: &[BorrowedFd<'_>],
        silence_max: Option<Duration>,
        on_event: &mut dyn FnMut(Event) -> bool,
    ) -> Result<Value, ClientError> {
        let id = self.next_id;
        self.next_id += 1;
        let line = Request {
            id,
            call: call.clone(),
        }
        .to_line();
        if line.len() > LINE_BYTES_MAX {
            return Err(ClientError::Failed(Failure::new(
                ErrorCode::BadRequest,
                format!(
                    "the request takes {} bytes, more than {LINE_BYTES_MAX}",
                    line.len()
                ),
                "send long contents as a file: vmgmtctl push",
            )));
        }
        self.stream
            .set_read_timeout(silence_max)
            .map_err(|error| self.unreachable(error))?;
        self.stream
            .set_write_timeout(silence_max)
            .map_err(|error| self.unreachable(error))?;
        self.send(&line, fds)
            .map_err(|error| self.broken(error, silence_max))?;
        loop {
            let response = self.receive(silence_max)?;
            if response.id.is_some_and(|other| other != id) {
                continue; // of a request that was given up
            }
            match response.body {
                Body::Result(result) => return Ok(result),
                Body::Error(failure) => return Err(ClientError::Failed(failure)),
                Body::Event(event) => {
                    if !on_event(event) {
                        return Ok(Value::Null);
                    }
                }
            }
        }
    }

    /// The descriptors go with the first byte, in one packet (docs/control-protocol.md, "Descriptors").
    fn send(&mut self, line: &[u8], fds: &[BorrowedFd<'_>]) -> std::io::Result<()> {
        let mut sent = 0;
        if !fds.is_empty() {
            let mut space = vec![MaybeUninit::uninit(); SendAncillaryMessage::ScmRights(fds).size()];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            if !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(std::io::Error::other("the descriptors do not fit"));
            }
            sent = loop {
                match sendmsg(
                    self.stream.as_fd(),
                    &[IoSlice::new(line)],
                    &mut ancillary,
                    SendFlags::NOSIGNAL,
                ) {
                    Ok(sent) => break sent,
                    Err(Errno::INTR) => {}
                    Err(errno) => return Err(errno.into()),
                }
            };
        }
        self.stream.write_all(line.get(sent..).unwrap_or_default())
    }

    fn receive(&mut self, silence_max: Option<Duration>) -> Result<Response, ClientError> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.received[searched..].iter().position(|byte| *byte == b'\n') {
                let rest = self.received.split_off(searched + end + 1);
                let line = std::mem::replace(&mut self.received, rest);
                return serde_json::from_slice(&line)
                    .map_err(|error| ClientError::Garbled(error.to_string()));
            }
            searched = self.received.len();
            if searched > ANSWER_BYTES_MAX {
                return Err(ClientError::Garbled(format!(
                    "a line of more than {ANSWER_BYTES_MAX} bytes"
                )));
            }
            let mut buffer = [0u8; 64 * 1024];
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    return Err(ClientError::Closed {
                        path: self.path.clone(),
                    });
                }
                Ok(bytes) => self.received.extend_from_slice(&buffer[..bytes]),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.broken(error, silence_max)),
            }
        }
    }

    fn unreachable(&self, error: std::io::Error) -> ClientError {
        ClientError::Unreachable {
            path: self.path.clone(),
            error,
        }
    }

    fn broken(&self, error: std::io::Error, silence_max: Option<Duration>) -> ClientError {
        match error.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => ClientError::Silent {
                path: self.path.clone(),
                after: silence_max.unwrap_or_default(),
            },
            ErrorKind::BrokenPipe | ErrorKind::ConnectionReset => ClientError::Closed {
                path: self.path.clone(),
            },
            _ => self.unreachable(error),
        }
    }
}

/// Where the control socket is, if nobody says: root's daemon has it in /run, a user's in the user's run directory.
#[must_use]
pub fn default_control_path() -> PathBuf {
    let user_directory = std::env::var_os("XDG_RUNTIME_DIR").filter(|path| !path.is_empty());
    match user_directory {
        Some(directory) if !rustix::process::geteuid().is_root() => {
            PathBuf::from(directory).join("vmgmt/control.sock")
        }
        _ => PathBuf::from("/run/vmgmt/control.sock"),
    }
}
