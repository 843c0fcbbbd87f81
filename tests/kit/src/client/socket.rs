//! Bytes and descriptors over a Unix stream socket, with deadlines.
//!
//! In: bytes to send; bytes that came. Out: whole messages. Must never know: what a command means.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

use super::{ClientError, broken, flag};

/// No reply of a server is longer: header, fixed part, 1 MiB of data.
const MESSAGE_BYTES_MAX: usize = 16 + 32 + 1024 * 1024;

/// One message of the server.
#[derive(Debug)]
pub struct RawMessage {
    /// Message id.
    pub id: u16,
    /// Command number.
    pub command: u16,
    /// Header flags.
    pub flags: u32,
    /// Errno of an error reply.
    pub error: u32,
    /// What follows the header.
    pub body: Vec<u8>,
    /// Descriptors that came with it.
    pub fds: Vec<OwnedFd>,
}

impl RawMessage {
    /// The message, or its error.
    pub fn successful(self) -> Result<Self, ClientError> {
        if self.flags & flag::ERROR == 0 {
            return Ok(self);
        }
        if !self.body.is_empty() {
            return broken("an error reply must only include the header");
        }
        Err(ClientError::Refused {
            command: self.command,
            errno: self.error,
        })
    }

    /// A 32-bit word of the body.
    pub fn u32_at(&self, offset: usize) -> Result<u32, ClientError> {
        match self
            .body
            .get(offset..offset + 4)
            .and_then(|bytes| bytes.try_into().ok())
        {
            Some(bytes) => Ok(u32::from_le_bytes(bytes)),
            None => broken(format!(
                "reply to {} has only {} bytes",
                self.command,
                self.body.len()
            )),
        }
    }

    /// A 64-bit word of the body.
    pub fn u64_at(&self, offset: usize) -> Result<u64, ClientError> {
        Ok(u64::from(self.u32_at(offset)?) | u64::from(self.u32_at(offset + 4)?) << 32)
    }
}

pub(super) fn connect(path: &Path) -> Result<OwnedFd, ClientError> {
    Ok(std::os::unix::net::UnixStream::connect(path)?.into())
}

/// Sends everything; descriptors go with the first byte.
pub(super) fn send_all(
    socket: &OwnedFd,
    bytes: &[u8],
    fds: &[BorrowedFd],
    timeout: Duration,
) -> Result<(), ClientError> {
    let deadline = Instant::now() + timeout;
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
    let mut sent = 0;
    while sent < bytes.len() {
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if sent == 0 && !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return broken("more than 253 descriptors cannot be sent at once");
        }
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match sendmsg(socket, &[IoSlice::new(&bytes[sent..])], &mut ancillary, flags) {
            Ok(count) => sent += count,
            Err(Errno::AGAIN) => {
                wait(&mut [PollFd::new(socket, PollFlags::OUT)], deadline, timeout)?;
            }
            Err(Errno::INTR) => {}
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(ClientError::Closed),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Waits until one is readable; true if the first is.
pub(super) fn wait_readable(
    sources: &[&OwnedFd; 2],
    deadline: Instant,
    timeout: Duration,
) -> Result<bool, ClientError> {
    let mut set = sources.map(|source| PollFd::from_borrowed_fd(source.as_fd(), PollFlags::IN));
    wait(&mut set, deadline, timeout)?;
    Ok(!set[0].revents().is_empty())
}

/// Whether something can be read now (or the other side is gone).
pub(super) fn is_readable(socket: &OwnedFd) -> Result<bool, ClientError> {
    let mut set = [PollFd::new(socket, PollFlags::IN)];
    match poll(&mut set, Some(&Timespec::default())) {
        Ok(ready) => Ok(ready > 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn wait(set: &mut [PollFd], deadline: Instant, timeout: Duration) -> Result<(), ClientError> {
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let limit = Timespec {
            tv_sec: left.as_secs() as i64,
            tv_nsec: i64::from(left.subsec_nanos()),
        };
        match poll(set, Some(&limit)) {
            Ok(0) => return Err(ClientError::TimedOut(timeout)),
            Ok(_) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// What came and is not yet a message.
#[derive(Default)]
pub(super) struct InputBuffer {
    bytes: Vec<u8>,
    fds: Vec<OwnedFd>,
}

impl InputBuffer {
    /// A whole message is there.
    pub fn has_message(&self) -> bool {
        self.message_bytes()
            .is_some_and(|length| length < 16 || self.bytes.len() >= length)
    }

    fn message_bytes(&self) -> Option<usize> {
        let length = self.bytes.get(4..8)?.try_into().ok()?;
        Some(u32::from_le_bytes(length) as usize)
    }

    pub fn next_message(&mut self, socket: &OwnedFd, timeout: Duration) -> Result<RawMessage, ClientError> {
        let deadline = Instant::now() + timeout;
        loop {
            if let Some(length) = self.message_bytes() {
                if !(16..=MESSAGE_BYTES_MAX).contains(&length) {
                    return broken(format!("a message of {length} bytes"));
                }
                if self.bytes.len() >= length {
                    return self.cut(length);
                }
            }
            // Read no further than this message: so its descriptors cannot be another's.
            let wanted = self
                .message_bytes()
                .filter(|_| self.bytes.len() >= 16)
                .unwrap_or(16)
                - self.bytes.len();
            self.fill(socket, wanted, deadline, timeout)?;
        }
    }

    fn cut(&mut self, length: usize) -> Result<RawMessage, ClientError> {
        let rest = self.bytes.split_off(length);
        let bytes = std::mem::replace(&mut self.bytes, rest);
        let header = RawMessage {
            id: 0,
            command: 0,
            flags: 0,
            error: 0,
            body: bytes,
            fds: Vec::new(),
        };
        Ok(RawMessage {
            id: header.u32_at(0)? as u16,
            command: (header.u32_at(0)? >> 16) as u16,
            flags: header.u32_at(8)?,
            error: header.u32_at(12)?,
            body: header.body[16..].to_vec(),
            fds: std::mem::take(&mut self.fds),
        })
    }

    fn fill(
        &mut self,
        socket: &OwnedFd,
        wanted: usize,
        deadline: Instant,
        timeout: Duration,
    ) -> Result<(), ClientError> {
        let mut bytes = vec![0; wanted];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
        match recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, flags) {
            Ok(got) if got.bytes == 0 => return Err(ClientError::Closed),
            Ok(got) => self.bytes.extend_from_slice(&bytes[..got.bytes]),
            Err(Errno::AGAIN) => return wait(&mut [PollFd::new(socket, PollFlags::IN)], deadline, timeout),
            Err(Errno::INTR) => return Ok(()),
            Err(Errno::CONNRESET) => return Err(ClientError::Closed),
            Err(error) => return Err(error.into()),
        }
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                self.fds.extend(fds);
            }
        }
        Ok(())
    }
}
