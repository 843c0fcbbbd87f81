//! DOOR: reading and writing a client's socket, with descriptors.
//!
//! In: a socket. Out: bytes and descriptors, each read bounded. Must never know: the protocol.

use rustix::fd::{AsFd, OwnedFd};
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;

/// Descriptors that the kernel attaches to one read at most (SCM_MAX_FD).
const READ_FDS_MAX: usize = 253;

/// What one read gave.
#[derive(Debug)]
pub enum Read {
    /// So many bytes at the buffer's start, and what came with them.
    Bytes {
        bytes: usize,
        fds: Vec<OwnedFd>,
        fds_lost: bool,
    },
    /// Nothing now.
    Nothing,
    /// The client closed it, or it broke.
    Closed,
}

/// Reads once.
pub fn read(socket: impl AsFd, buffer: &mut [u8]) -> Read {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(READ_FDS_MAX))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
    let received = loop {
        match recvmsg(&socket, &mut [IoSliceMut::new(buffer)], &mut ancillary, flags) {
            Ok(received) => break received,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Read::Nothing,
            Err(_) => return Read::Closed,
        }
    };
    let mut fds = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            fds.extend(rights);
        }
    }
    if received.bytes == 0 {
        return Read::Closed;
    }
    Read::Bytes {
        bytes: received.bytes,
        fds,
        fds_lost: received.flags.contains(ReturnFlags::CTRUNC),
    }
}

/// Writes once; `Ok(None)`: not now.
///
/// To a client that reads no more, everything counts as sent. It may have said something before it went, which is carried out; the session
/// ends where its own stream does, and whoever leaves that open has a device that gives no answers.
///
/// # Errors
/// The socket broke.
pub fn write(socket: impl AsFd, bytes: &[u8]) -> Result<Option<usize>, Errno> {
    loop {
        match send(&socket, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
            Ok(sent) => return Ok(Some(sent)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN | Errno::NOBUFS) => return Ok(None),
            Err(Errno::PIPE | Errno::CONNRESET) => return Ok(Some(bytes.len())),
            Err(errno) => return Err(errno),
        }
    }
}
