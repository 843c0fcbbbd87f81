//! A vfio-user client for tests: the QEMU side of the socket, blocking, with a time limit on every wait.
//!
//! In: what a test wants to send, honest or not. Out: what the server answered. It is written straight from
//! the specification and shares no code with `server/wire`, so that the two check each other. Must never
//! know: the server's types.
//!
//! While it waits for a reply it serves the server's own DMA_READ and DMA_WRITE from the memory given with
//! [`Client::serve_memory`], as QEMU does from its main loop.

mod commands;
mod dma;
mod ram;
mod socket;

use std::collections::BTreeMap;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

pub use commands::{DeviceInfo, IrqInfo, Mapping, RegionInfo, Write, access_body, irq};
pub use dma::DmaServed;
pub use ram::{GuestRam, Seal};
pub use socket::RawMessage;

/// Command numbers, from the specification's table.
pub mod command {
    #![allow(missing_docs)] // the names say it
    pub const VERSION: u16 = 1;
    pub const DMA_MAP: u16 = 2;
    pub const DMA_UNMAP: u16 = 3;
    pub const DEVICE_GET_INFO: u16 = 4;
    pub const DEVICE_GET_REGION_INFO: u16 = 5;
    pub const DEVICE_GET_REGION_IO_FDS: u16 = 6;
    pub const DEVICE_GET_IRQ_INFO: u16 = 7;
    pub const DEVICE_SET_IRQS: u16 = 8;
    pub const REGION_READ: u16 = 9;
    pub const REGION_WRITE: u16 = 10;
    pub const DMA_READ: u16 = 11;
    pub const DMA_WRITE: u16 = 12;
    pub const DEVICE_RESET: u16 = 13;
    pub const REGION_WRITE_MULTI: u16 = 15;
    pub const DEVICE_FEATURE: u16 = 16;
}

/// Header flags.
pub mod flag {
    /// The message is a reply.
    pub const REPLY: u32 = 1;
    /// No reply is wanted.
    pub const NO_REPLY: u32 = 1 << 4;
    /// The reply is an error.
    pub const ERROR: u32 = 1 << 5;
}

/// What QEMU 11.1.3 proposes, byte by byte (the whole VERSION message has 214 bytes).
pub const QEMU_CAPABILITIES: &str = r#"{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1048576, "migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}"#;

/// Why a call did not succeed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The server answered with an error.
    #[error("the server refused command {command} with errno {errno}")]
    Refused {
        /// The command.
        command: u16,
        /// Its errno.
        errno: u32,
    },
    /// Nothing came in time.
    #[error("nothing from the server within {0:?}")]
    TimedOut(Duration),
    /// The server closed the connection.
    #[error("the server closed the connection")]
    Closed,
    /// The server broke the specification.
    #[error("the server broke the protocol: {0}")]
    Protocol(String),
    /// The socket failed.
    #[error("socket: {0}")]
    Io(#[from] std::io::Error),
}

impl From<rustix::io::Errno> for ClientError {
    fn from(error: rustix::io::Errno) -> Self {
        Self::Io(error.into())
    }
}

impl ClientError {
    /// The errno of a refusal.
    pub fn errno(&self) -> Option<u32> {
        match self {
            Self::Refused { errno, .. } => Some(*errno),
            _ => None,
        }
    }
}

pub(crate) fn broken<T>(what: impl Into<String>) -> Result<T, ClientError> {
    Err(ClientError::Protocol(what.into()))
}

/// The longest wait where nothing else is asked for. Far more than QEMU's five seconds: what a test shows is that an answer does not wait for something that never comes, and a busy machine is
/// slow with all the rest.
pub const TIMEOUT: Duration = Duration::from_secs(60);

/// One connection to a server.
pub struct Client {
    socket: OwnedFd,
    timeout: Duration,
    input: socket::InputBuffer,
    next_id: u16,
    /// Requests sent and unanswered: id to command.
    awaited: BTreeMap<u16, u16>,
    /// Replies that came while another was waited for.
    early: BTreeMap<u16, RawMessage>,
    memory: dma::ServedMemory,
}

impl Client {
    /// Connects; every later wait takes at most a minute.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, ClientError> {
        Ok(Self::from_socket(socket::connect(path.as_ref())?))
    }

    /// Connects and negotiates as QEMU does.
    pub fn connect_ready(path: impl AsRef<Path>) -> Result<Self, ClientError> {
        let mut client = Self::connect(path)?;
        client.negotiate()?;
        Ok(client)
    }

    /// Over a connected stream socket.
    pub fn from_socket(socket: impl Into<OwnedFd>) -> Self {
        Self {
            socket: socket.into(),
            timeout: TIMEOUT,
            input: socket::InputBuffer::default(),
            next_id: 0,
            awaited: BTreeMap::new(),
            early: BTreeMap::new(),
            memory: dma::ServedMemory::default(),
        }
    }

    /// Sets the longest wait.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Sends a request and does not wait: its id.
    pub fn start(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd]) -> Result<u16, ClientError> {
        let id = self.take_id();
        self.send_raw(&encode(id, command, 0, body), fds)?;
        self.awaited.insert(id, command);
        Ok(id)
    }

    /// Sends a request that wants no reply: its id.
    pub fn post(&mut self, command: u16, body: &[u8], fds: &[BorrowedFd]) -> Result<u16, ClientError> {
        let id = self.take_id();
        self.send_raw(&encode(id, command, flag::NO_REPLY, body), fds)?;
        Ok(id)
    }

    /// Waits for the reply to a request that was started. An error reply is an error.
    pub fn finish(&mut self, id: u16) -> Result<RawMessage, ClientError> {
        loop {
            if let Some(reply) = self.early.remove(&id) {
                return reply.successful();
            }
            if !self.awaited.contains_key(&id) {
                return broken(format!("no request with id {id} is under way"));
            }
            self.take_message()?;
        }
    }

    /// Sends a request and waits for its reply.
    pub fn request(
        &mut self,
        command: u16,
        body: &[u8],
        fds: &[BorrowedFd],
    ) -> Result<RawMessage, ClientError> {
        let id = self.start(command, body, fds)?;
        self.finish(id)
    }

    /// Sends bytes as they are, in one `sendmsg`, the descriptors with the first of them.
    pub fn send_raw(&mut self, bytes: &[u8], fds: &[BorrowedFd]) -> Result<(), ClientError> {
        socket::send_all(&self.socket, bytes, fds, self.timeout)
    }

    /// Sends bytes in pieces that end at the positions given; the descriptors with the first byte.
    pub fn send_split(
        &mut self,
        bytes: &[u8],
        fds: &[BorrowedFd],
        cuts: &[usize],
    ) -> Result<(), ClientError> {
        let mut start = 0;
        for end in cuts.iter().copied().chain([bytes.len()]) {
            let end = end.min(bytes.len());
            if end > start {
                let fds = if start == 0 { fds } else { &[] };
                self.send_raw(&bytes[start..end], fds)?;
                start = end;
            }
        }
        Ok(())
    }

    /// The next message, whatever it is.
    pub fn recv_raw(&mut self) -> Result<RawMessage, ClientError> {
        self.input.next_message(&self.socket, self.timeout)
    }

    /// Waits until the server has closed the connection; what it still said before that.
    pub fn wait_closed(&mut self) -> Result<Vec<RawMessage>, ClientError> {
        let mut said = Vec::new();
        loop {
            match self.recv_raw() {
                Ok(message) => said.push(message),
                Err(ClientError::Closed) => return Ok(said),
                Err(ClientError::Io(error)) if error.kind() == std::io::ErrorKind::ConnectionReset => {
                    return Ok(said);
                }
                Err(error) => return Err(error),
            }
        }
    }

    /// Waits for an eventfd, serving DMA meanwhile: how often it was signalled.
    pub fn wait_event(&mut self, eventfd: &OwnedFd) -> Result<u64, ClientError> {
        let deadline = std::time::Instant::now() + self.timeout;
        loop {
            let mut count = [0; 8];
            match rustix::io::read(eventfd, &mut count) {
                Ok(_) => return Ok(u64::from_ne_bytes(count)),
                Err(rustix::io::Errno::AGAIN) => {}
                Err(error) => return Err(error.into()),
            }
            if self.input.has_message()
                || socket::wait_readable(&[&self.socket, eventfd], deadline, self.timeout)?
            {
                self.take_message()?;
            }
        }
    }

    /// Serves DMA until `done` says so (asked after each message), or the time is up.
    pub fn serve_until(&mut self, mut done: impl FnMut(&Self) -> bool) -> Result<(), ClientError> {
        while !done(self) {
            self.take_message()?;
        }
        Ok(())
    }

    /// Serves what has come already, and waits for nothing more than the rest of a message that has begun.
    pub fn serve_pending(&mut self) -> Result<(), ClientError> {
        while self.input.has_message() || socket::is_readable(&self.socket)? {
            self.take_message()?;
        }
        Ok(())
    }

    /// The socket, for a test that wants to do worse.
    pub fn socket(&self) -> &OwnedFd {
        &self.socket
    }

    fn take_id(&mut self) -> u16 {
        // One counter for all requests, wrapping, as QEMU has it.
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        id
    }

    /// Receives one message: serves it, or keeps it for the one who waits.
    fn take_message(&mut self) -> Result<(), ClientError> {
        let message = self.recv_raw()?;
        match message.flags & 0xf {
            0 if self.memory.is_silent => Ok(()),
            0 => {
                let answer = self.memory.serve(&message);
                if message.flags & flag::NO_REPLY == 0 {
                    self.send_raw(&answer, &[])?;
                }
                Ok(())
            }
            1 => {
                let Some(command) = self.awaited.remove(&message.id) else {
                    return broken(format!("a reply to id {}, which waits for none", message.id));
                };
                if command != message.command {
                    return broken(format!("command {command} was answered as {}", message.command));
                }
                self.early.insert(message.id, message);
                Ok(())
            }
            kind => broken(format!("message type {kind}")),
        }
    }
}

/// A message as it goes over the wire.
pub fn encode(id: u16, command: u16, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(16 + body.len());
    bytes.extend_from_slice(&id.to_le_bytes());
    bytes.extend_from_slice(&command.to_le_bytes());
    bytes.extend_from_slice(&(16 + body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&flags.to_le_bytes());
    bytes.extend_from_slice(&0u32.to_le_bytes());
    bytes.extend_from_slice(body);
    bytes
}

/// A fresh eventfd, not blocking.
pub fn eventfd() -> Result<OwnedFd, ClientError> {
    let flags = rustix::event::EventfdFlags::CLOEXEC | rustix::event::EventfdFlags::NONBLOCK;
    Ok(rustix::event::eventfd(0, flags)?)
}
