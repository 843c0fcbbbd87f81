//! A SEQPACKET socket between two roles: packets of a CBOR header, raw payload and descriptors. Never blocks.
//!
//! A header that is too long for a packet goes in a sealed memory, as one more descriptor. In: packets of the other role. Out: packets to it. Knows nothing of what they mean. Our own processes speak here, but
//! each is built so that a hostile other does no harm: sizes are bounded, what does not decode is an error, not a panic.

use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, fstat, memfd_create};
use rustix::io::{Errno, pread, pwrite};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;

/// Descriptors in one packet: the kernel's SCM_MAX_FD.
pub const PACKET_FDS_MAX: usize = 253;
/// Bytes of one packet: a message-DMA piece (60 KiB) and its header, well below the default socket buffer (208 KiB).
pub const PACKET_BYTES_MAX: usize = 96 * 1024;

/// Bytes of a header that goes in a memory of its own: what the keeper knows of many thousands of VMs and sessions.
pub const HEADER_BYTES_MAX: usize = 16 << 20;
/// Stands for the header's length where it is in a memory: the packet's last descriptor, sealed.
const HEADER_IN_MEMORY: u32 = u32::MAX;

/// What a channel can answer instead of a packet.
#[derive(Debug, thiserror::Error)]
pub enum ChannelError {
    /// The other side's buffer is full: keep the packet and try again when the channel is writable.
    #[error("the channel is full")]
    Full,
    /// The other side is gone.
    #[error("the other process closed the channel")]
    Closed,
    /// What came does not decode.
    #[error("a packet does not decode: {0}")]
    Malformed(String),
    /// The operating system refused.
    #[error("channel: {0}")]
    Io(#[from] Errno),
}

/// What came in one packet.
#[derive(Debug)]
pub struct Packet<T> {
    pub header: T,
    pub payload: Vec<u8>,
    pub fds: Vec<OwnedFd>,
}

/// One end. The descriptor is to be registered with the event loop.
#[derive(Debug)]
pub struct Channel {
    fd: OwnedFd,
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Channel {
    /// Takes over an inherited or received end.
    #[must_use]
    pub const fn from_fd(fd: OwnedFd) -> Self {
        Self { fd }
    }

    /// Gives the descriptor up, to hand it to another process.
    #[must_use]
    pub fn into_fd(self) -> OwnedFd {
        self.fd
    }

    /// Two joined ends, close-on-exec and non-blocking.
    ///
    /// # Errors
    /// The operating system's, for want of descriptors.
    pub fn pair() -> Result<(Self, Self), ChannelError> {
        let (a, b) = socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC | SocketFlags::NONBLOCK,
            None,
        )?;
        Ok((Self { fd: a }, Self { fd: b }))
    }

    /// Sends one packet whole or not at all.
    ///
    /// # Errors
    /// Full (nothing was sent, try again later), Closed, or the system's.
    pub fn send<T: Serialize>(
        &self,
        header: &T,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), ChannelError> {
        let mut head = vec![0u8; 4];
        ciborium::into_writer(header, &mut head)
            .map_err(|error| ChannelError::Malformed(error.to_string()))?;
        let mut fds = fds.to_vec();
        let memory;
        let mut header_bytes = (head.len() - 4) as u32;
        if head.len() + payload.len() > PACKET_BYTES_MAX
            && payload.is_empty()
            && head.len() <= HEADER_BYTES_MAX
        {
            memory = memory_of(&head[4..])?;
            fds.push(memory.as_fd());
            head.truncate(4);
            header_bytes = HEADER_IN_MEMORY;
        }
        let fds = fds.as_slice();
        head[..4].copy_from_slice(&header_bytes.to_le_bytes());
        if head.len() + payload.len() > PACKET_BYTES_MAX || fds.len() > PACKET_FDS_MAX {
            return Err(ChannelError::Malformed(format!(
                "{} bytes and {} descriptors are more than a packet holds",
                head.len() + payload.len(),
                fds.len()
            )));
        }
        let mut space = vec![MaybeUninit::uninit(); SendAncillaryMessage::ScmRights(fds).size()];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(fds)) {
            return Err(ChannelError::Malformed("the descriptors do not fit".into()));
        }
        loop {
            match sendmsg(
                &self.fd,
                &[IoSlice::new(&head), IoSlice::new(payload)],
                &mut ancillary,
                SendFlags::NOSIGNAL | SendFlags::DONTWAIT,
            ) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN | Errno::NOBUFS) => return Err(ChannelError::Full),
                Err(Errno::PIPE | Errno::CONNRESET) => return Err(ChannelError::Closed),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Receives one packet; `None` when there is none now.
    ///
    /// # Errors
    /// Closed, Malformed (its descriptors are closed), or the system's.
    pub fn receive<T: DeserializeOwned>(&self) -> Result<Option<Packet<T>>, ChannelError> {
        let Some(length) = self.next_length()? else {
            return Ok(None);
        };
        let mut bytes = vec![0u8; length];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(PACKET_FDS_MAX))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let received = loop {
            match recvmsg(
                &self.fd,
                &mut [IoSliceMut::new(&mut bytes)],
                &mut ancillary,
                RecvFlags::DONTWAIT | RecvFlags::CMSG_CLOEXEC,
            ) {
                Ok(received) => break received,
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::CONNRESET) => return Err(ChannelError::Closed),
                Err(errno) => return Err(errno.into()),
            }
        };
        let mut fds = Vec::new();
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 {
            return Err(ChannelError::Closed);
        }
        let truncated = rustix::net::ReturnFlags::TRUNC | rustix::net::ReturnFlags::CTRUNC;
        if received.flags.intersects(truncated) {
            return Err(ChannelError::Malformed(
                "a packet was cut: too long, or no descriptors left".into(),
            ));
        }
        bytes.truncate(received.bytes);
        let header_bytes = bytes
            .get(..4)
            .and_then(|head| head.try_into().ok())
            .map_or(0, u32::from_le_bytes);
        if header_bytes == HEADER_IN_MEMORY {
            let memory = fds
                .pop()
                .ok_or_else(|| ChannelError::Malformed("no header".into()))?;
            let header = ciborium::from_reader(bytes_of(&memory)?.as_slice())
                .map_err(|error| ChannelError::Malformed(error.to_string()))?;
            return Ok(Some(Packet {
                header,
                payload: bytes.split_off(4),
                fds,
            }));
        }
        let header_bytes = header_bytes as usize;
        let header = bytes
            .get(4..4 + header_bytes)
            .ok_or_else(|| ChannelError::Malformed("no header".into()))?;
        let header =
            ciborium::from_reader(header).map_err(|error| ChannelError::Malformed(error.to_string()))?;
        let payload = bytes.split_off(4 + header_bytes);
        Ok(Some(Packet { header, payload, fds }))
    }

    /// Room for the next packet, or for the news that there will be none; `None` when there is none now. Asked first, because mostly there is none: room for the longest, cleared at each look, takes longer than all else that a look does.
    fn next_length(&self) -> Result<Option<usize>, ChannelError> {
        loop {
            let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK | RecvFlags::TRUNC;
            match recvmsg(&self.fd, &mut [], &mut RecvAncillaryBuffer::default(), flags) {
                // One byte at least, so that no packet is taken for the end.
                Ok(next) => return Ok(Some(next.bytes.clamp(1, PACKET_BYTES_MAX))),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(Errno::CONNRESET) => return Err(ChannelError::Closed),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

/// Seals that say that a memory will always be what it is.
const SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::WRITE);

fn memory_of(bytes: &[u8]) -> Result<OwnedFd, ChannelError> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let memory = memfd_create("vmgmt-header", flags)?;
    let mut at = 0;
    while let Some(rest) = bytes.get(at..).filter(|rest| !rest.is_empty()) {
        at += pwrite(&memory, rest, at as u64)?;
    }
    fcntl_add_seals(&memory, SEALS | SealFlags::SEAL)?;
    Ok(memory)
}

/// What is in a header's memory. Only a memory has seals, so reading it never waits.
fn bytes_of(memory: &OwnedFd) -> Result<Vec<u8>, ChannelError> {
    let malformed = |what: &str| ChannelError::Malformed(format!("the memory of a header {what}"));
    if !fcntl_get_seals(memory).is_ok_and(|seals| seals.contains(SEALS)) {
        return Err(malformed("is not sealed"));
    }
    let length = usize::try_from(fstat(memory)?.st_size).unwrap_or(usize::MAX);
    if length > HEADER_BYTES_MAX {
        return Err(malformed("is too long"));
    }
    let mut bytes = vec![0; length];
    let mut at = 0;
    while let Some(rest) = bytes.get_mut(at..).filter(|rest| !rest.is_empty()) {
        match pread(memory, rest, at as u64)? {
            0 => return Err(malformed("ends early")),
            read => at += read,
        }
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_of_any_length_arrives_with_its_descriptors_and_one_that_is_not_sealed_does_not() {
        let (a, b) = Channel::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        let header: Vec<(u64, u64)> = (0..100_000).map(|n| (n, 1 << 20)).collect();
        a.send(&header, b"", &[file.as_fd()]).unwrap();
        let packet = b.receive::<Vec<(u64, u64)>>().unwrap().unwrap();
        assert_eq!((packet.header.len(), packet.fds.len()), (100_000, 1));
        assert!(packet.header == header && packet.payload.is_empty());
        let text = "x".repeat(HEADER_BYTES_MAX + 1);
        assert!(matches!(a.send(&text, b"", &[]), Err(ChannelError::Malformed(_))));
        // A file, or a pipe that would be waited for, is no header.
        let (pipe, _other) = rustix::pipe::pipe().unwrap();
        for fd in [file.as_fd(), pipe.as_fd()] {
            let head = IoSlice::new(&[0xff; 4]);
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
            let mut ancillary = SendAncillaryBuffer::new(&mut space);
            let fds = [fd];
            assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)));
            sendmsg(&a, &[head], &mut ancillary, SendFlags::empty()).unwrap();
            assert!(matches!(b.receive::<u64>(), Err(ChannelError::Malformed(_))));
        }
    }

    #[test]
    fn a_packet_arrives_with_its_payload_and_descriptors() {
        let (a, b) = Channel::pair().unwrap();
        let file = tempfile::tempfile().unwrap();
        a.send(
            &("hello".to_string(), 7u32),
            b"payload",
            &[file.as_fd(), file.as_fd()],
        )
        .unwrap();
        let packet = b.receive::<(String, u32)>().unwrap().unwrap();
        assert_eq!(
            (packet.header, packet.payload.as_slice(), packet.fds.len()),
            (("hello".into(), 7), &b"payload"[..], 2)
        );
        assert!(b.receive::<u32>().unwrap().is_none());
        drop(a);
        assert!(matches!(b.receive::<u32>(), Err(ChannelError::Closed)));
    }

    #[test]
    fn what_does_not_decode_is_an_error_and_the_next_packet_arrives() {
        let (a, b) = Channel::pair().unwrap();
        a.send(&1u32, b"", &[]).unwrap();
        a.send(&"text".to_string(), b"", &[]).unwrap();
        assert!(matches!(b.receive::<String>(), Err(ChannelError::Malformed(_))));
        assert_eq!(b.receive::<String>().unwrap().unwrap().header, "text");
    }

    #[test]
    fn a_full_channel_says_so() {
        let (a, _b) = Channel::pair().unwrap();
        let full = (0..100_000).find_map(|_| a.send(&0u8, &[0; 4096], &[]).err());
        assert!(matches!(full, Some(ChannelError::Full)));
    }
}
