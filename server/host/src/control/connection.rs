//! One operator's connection: bytes and descriptors in, whole lines out; lines in, bytes out. Never blocks.
//!
//! Knows nothing of requests; the lines are bounded here.

use super::limits::{PENDING_FDS_MAX, READ_BYTES};
use super::protocol::{LINE_BYTES_MAX, REQUEST_FDS_MAX};
use mio::net::UnixStream;
use rustix::fd::OwnedFd;
use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendFlags, recvmsg, send,
};
use std::collections::VecDeque;
use std::io::IoSliceMut;
use std::mem::MaybeUninit;

/// What a read gave.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum ReadState {
    /// There may be more.
    More,
    /// Nothing now; the event loop will tell.
    Empty,
    /// The client is gone, or broke a limit.
    Ended,
}

/// A line with the descriptors that came with it.
#[derive(Debug)]
pub(super) struct LineIn {
    pub(super) bytes: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// Why the next line cannot be had.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct TooLong;

/// See the head of this file.
#[derive(Debug)]
pub(super) struct Connection {
    pub(super) stream: UnixStream,
    input: Vec<u8>,
    /// Bytes of `input` that were searched for an end of line.
    searched: usize,
    /// Bytes of the stream before `input`.
    consumed: u64,
    /// Descriptors, each with the position in the stream of the last byte of the read that brought it: the kernel ends a read behind
    /// the packet with descriptors, so that byte belongs to their request.
    fds: VecDeque<(u64, OwnedFd)>,
    output: VecDeque<u8>,
    /// Bytes sent so far.
    sent: u64,
    /// Whose last byte is the one before this position in the stream that is sent: who wants to know when it is in the socket.
    receipts: VecDeque<(u64, u64)>,
}

impl Connection {
    pub(super) const fn new(stream: UnixStream) -> Self {
        Self {
            stream,
            input: Vec::new(),
            searched: 0,
            consumed: 0,
            fds: VecDeque::new(),
            output: VecDeque::new(),
            sent: 0,
            receipts: VecDeque::new(),
        }
    }

    /// Reads once.
    pub(super) fn read(&mut self) -> ReadState {
        let mut buffer = [0u8; READ_BYTES];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(REQUEST_FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC;
        let received = match recvmsg(
            &self.stream,
            &mut [IoSliceMut::new(&mut buffer)],
            &mut ancillary,
            flags,
        ) {
            Ok(received) => received,
            Err(Errno::INTR) => return ReadState::More,
            Err(Errno::AGAIN) => return ReadState::Empty,
            Err(_) => return ReadState::Ended,
        };
        // Descriptors that were cut off are lost without a trace: the request that named them cannot be trusted.
        if received.bytes == 0 || received.flags.contains(ReturnFlags::CTRUNC) {
            return ReadState::Ended;
        }
        self.input
            .extend_from_slice(buffer.get(..received.bytes).unwrap_or_default());
        let last = self.consumed + self.input.len() as u64 - 1;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                self.fds.extend(rights.map(|fd| (last, fd)));
            }
        }
        if self.fds.len() > PENDING_FDS_MAX {
            ReadState::Ended
        } else {
            ReadState::More
        }
    }

    /// Takes the next whole line, without its end.
    pub(super) fn next_line(&mut self) -> Result<Option<LineIn>, TooLong> {
        let unsearched = self.input.get(self.searched..).unwrap_or_default();
        let Some(end) = unsearched
            .iter()
            .position(|byte| *byte == b'\n')
            .map(|end| self.searched + end)
        else {
            self.searched = self.input.len();
            return if self.searched >= LINE_BYTES_MAX {
                Err(TooLong)
            } else {
                Ok(None)
            };
        };
        if end >= LINE_BYTES_MAX {
            return Err(TooLong);
        }
        let rest = self.input.split_off(end + 1);
        let mut bytes = std::mem::replace(&mut self.input, rest);
        bytes.pop();
        self.searched = 0;
        self.consumed += end as u64 + 1;
        let mut fds = Vec::new();
        while self.fds.front().is_some_and(|(last, _)| *last < self.consumed) {
            fds.extend(self.fds.pop_front().map(|(_, fd)| fd));
        }
        Ok(Some(LineIn { bytes, fds }))
    }

    /// Bytes that wait to be sent.
    pub(super) fn output_bytes(&self) -> usize {
        self.output.len()
    }

    pub(super) fn queue(&mut self, line: &[u8]) {
        self.output.extend(line);
    }

    /// As `queue`; `request` comes out of [`Connection::written`] when all of it is in the socket.
    pub(super) fn queue_with_receipt(&mut self, line: &[u8], request: u64) {
        self.queue(line);
        self.receipts
            .push_back((self.sent + self.output.len() as u64, request));
    }

    /// The next one whose line is in the socket.
    pub(super) fn written(&mut self) -> Option<u64> {
        let sent = self.sent;
        self.receipts
            .pop_front_if(|(end, _)| *end <= sent)
            .map(|(_, request)| request)
    }

    /// Sends what can be sent; `false`: the client is gone.
    pub(super) fn flush(&mut self) -> bool {
        while !self.output.is_empty() {
            let (head, _) = self.output.as_slices();
            match send(&self.stream, head, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(sent) => {
                    self.output.drain(..sent);
                    self.sent += sent as u64;
                }
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return true,
                Err(_) => return false,
            }
        }
        true
    }
}
